"""One completion as a row of the queue table: what actors write and learners read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter

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

_NO_VERSION = 2**31 - 1  # the policy version of a row without tokens: never too old
_TYPES = {column.name: column.type for column in SCHEMA}
_GIVEN = [name for name in _TYPES if name not in ("group_size", "policy_version")]  # the others follow from these
_LISTS = {name: kind.value_type for name, kind in _TYPES.items() if pa.types.is_list(kind)}
_DTYPES = {name: np.dtype(inner.to_pandas_dtype()) for name, inner in _LISTS.items()}
_of = attrgetter(*_GIVEN)


def to_rows(group: Sequence[Completion]) -> pa.RecordBatch:
    """The completions of one whole group as rows of `SCHEMA`.

    Raises `pyarrow.ArrowInvalid` for a number that does not fit its column.
    """
    given = dict(zip(_GIVEN, zip(*map(_of, group), strict=True), strict=True)) if group else dict.fromkeys(_GIVEN, ())
    columns = {"group_size": pa.array([len(group)] * len(group), _TYPES["group_size"])}
    known: dict[tuple[int, ...], np.ndarray] = {}  # offsets by lengths: the lists of tokens have the same ones
    for name, values in given.items():
        if name not in _LISTS:
            columns[name] = pa.array(values, _TYPES[name])
            continue
        lengths = tuple(map(len, values))
        offsets = known.get(lengths)
        if offsets is None:
            offsets = known[lengths] = np.array([0, *accumulate(lengths)], np.int32)
        flat = _flat(name, values)
        columns[name] = _lists(name, flat, offsets)
        if name == "versions":
            columns["policy_version"] = _oldest(flat, offsets)
    return pa.RecordBatch.from_arrays([columns[name] for name in _TYPES], schema=SCHEMA)


def _flat(name: str, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """These one after another, in the type of the column."""
    values = np.concatenate(arrays) if arrays else np.zeros(0, _DTYPES[name])
    if values.dtype == _DTYPES[name]:
        return values
    narrowed: np.ndarray = pa.array(
        values, _LISTS[name]
    ).to_numpy()  # refuses what does not fit, which numpy would wrap
    return narrowed


def _lists(name: str, values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    # From buffers: pa.array and ListArray.from_arrays take three times as long for so few numbers.
    flat = pa.Array.from_buffers(_LISTS[name], len(values), [None, pa.py_buffer(values)])
    return pa.ListArray.from_buffers(_TYPES[name], len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[flat])


def _oldest(versions: np.ndarray, offsets: np.ndarray) -> pa.Array:
    """The least of each list."""
    begins, some = offsets[:-1], offsets[:-1] < offsets[1:]
    oldest = np.full(len(begins), _NO_VERSION, np.int32)
    if len(versions):
        # Each from its begin to that of the next one; between two with tokens lie only lists without any.
        oldest[some] = np.minimum.reduceat(versions, begins[some])
    return pa.array(oldest)


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
