"""One completion as a row of the queue table: what actors write and learners read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

TABLE = "completions"


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int32)


def _no_numbers() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A completion that was sampled and judged.

    Its `seed` follows from (run, prompt, group, index), so it can be sampled again; the probability it was sampled with is that
    of the distribution after temperature and truncation.
    """

    group: int  # number of the group, over the whole run
    index: int  # number of the completion within it; above group_size − 1 where another one was dropped
    task: int  # number of the prompt in the run's task set
    family: str
    seed: int
    prompt: np.ndarray  # int32 (prompt tokens,)
    tokens: np.ndarray  # int32 (tokens,), the end of sequence among them where one was sampled
    log_probs: np.ndarray  # float32 (tokens,), natural, as sampled
    kept: (
        np.ndarray
    )  # float32 (tokens,), log of the probability that truncation had left in the distribution; 0 without
    versions: np.ndarray  # int32 (tokens,), of the weights that sampled each
    finish: str  # stop: the end of sequence was sampled; length: it was cut off
    reward: float  # of the outcome, by the verifier
    passed: bool
    shaped: float = 0.0  # what the verifier gave besides, for progress or form
    reason: str = ""  # the verifier's, in words
    hint: float = 0.0  # share of the reference solution that the prompt ends with
    step_ends: np.ndarray = field(
        default_factory=_no_tokens
    )  # int32 (steps,), tokens up to the end of each scored step
    step_rewards: np.ndarray = field(default_factory=_no_numbers)  # float32 (steps,)


SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),
        pa.field("group_size", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),  # of the oldest token
        pa.field("index", pa.int32(), nullable=False),
        pa.field("task", pa.int64(), nullable=False),
        pa.field("family", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("log_probs", pa.list_(pa.float32()), nullable=False),
        pa.field("kept", pa.list_(pa.float32()), nullable=False),
        pa.field("versions", pa.list_(pa.int32()), nullable=False),
        pa.field("finish", pa.string(), nullable=False),
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("passed", pa.bool_(), nullable=False),
        pa.field("shaped", pa.float32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("hint", pa.float32(), nullable=False),
        pa.field("step_ends", pa.list_(pa.int32()), nullable=False),
        pa.field("step_rewards", pa.list_(pa.float32()), nullable=False),
    ]
)

_LISTS = ("prompt", "tokens", "log_probs", "kept", "versions", "step_ends", "step_rewards")


def to_rows(group: Sequence[Completion]) -> pa.RecordBatch:
    """The completions of one whole group as rows of `SCHEMA`."""
    columns: list[pa.Array] = []
    for column in SCHEMA:
        if column.name == "group_size":
            columns.append(pa.array([len(group)] * len(group), column.type))
        elif column.name == "policy_version":
            columns.append(pa.array([int(one.versions.min(initial=2**31 - 1)) for one in group], column.type))
        elif column.name in _LISTS:
            columns.append(_lists([getattr(one, column.name) for one in group], column.type))
        else:
            columns.append(pa.array([getattr(one, column.name) for one in group], column.type))
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(arrays: Sequence[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int32)
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, kind.value_type), type=kind)


@dataclass(frozen=True)
class Ragged:
    """Lists of numbers, one after another: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray  # int64 (lists + 1,), the first 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 (lists,)."""
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def ragged(rows: pa.RecordBatch, name: str) -> Ragged:
    """A column of lists as numpy arrays, without a copy."""
    column = rows.column(name)
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])
