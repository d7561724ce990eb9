"""Rows of a queue table as arrays, and micro-batches of whole completions for forward passes.

Everything known per token lies flat: the tokens of completion 0, then those of completion 1, and so on. Micro-batches are
views into that order, so what they compute goes back to its place by index, however the completions were bucketed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from learners.llm.rows import Ragged, ragged


@dataclass(frozen=True)
class Rollouts:
    """N completions of T tokens in all, in the order of their rows; tensors on the learner's device."""

    sequence: Tensor  # int64 (T,), the completion of each token
    tokens: Tensor  # int64 (T,)
    old: Tensor  # float32 (T,), behaviour log-probabilities, after temperature and truncation
    kept: Tensor  # float32 (T,), log of the probability that truncation had left
    versions: Tensor  # int64 (T,), of the weights that sampled each token
    group: Tensor  # int64 (N,), from 0 on in the order of their first rows
    reward: Tensor  # float32 (N,), of the outcome
    shaped: Tensor  # float32 (N,)
    passed: Tensor  # bool (N,)
    length: Tensor  # int64 (N,), tokens
    cut: Tensor  # bool (N,), ended by the limit, not by the end of sequence
    offsets: np.ndarray  # int64 (N + 1,), of the completions among the T tokens
    inputs: Ragged  # int32, per completion: the prompt, then all its tokens but the last
    prompt_lengths: np.ndarray  # int64 (N,)
    step_ends: Ragged  # int32, per completion: tokens up to the end of each scored step
    step_rewards: Ragged  # float32, per completion

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1 if len(self.group) else 0


@dataclass(frozen=True)
class MicroBatch:
    """Whole completions, right-padded to one width.

    There is no attention mask: a causal model's tokens never see what comes after them, and without a mask attention takes its
    fast path.
    """

    ids: Tensor  # int64 (completions, width), padded with the id given
    predicts: Tensor  # int64 (tokens,), places in the flattened `ids` whose next token was sampled
    places: Tensor  # int64 (tokens,), of those next tokens among the T of the batch


def rollouts(rows: pa.RecordBatch, *, device: torch.device | str) -> Rollouts:
    """The arrays of a batch of `rows.SCHEMA`.

    Raises ValueError for an empty batch, and for completions without a prompt, which have nothing that predicts their first
    token.
    """
    if rows.num_rows == 0:
        raise ValueError("expected a batch of completions, received one of no rows")
    prompts, tokens = ragged(rows, "prompt"), ragged(rows, "tokens")
    if not prompts.lengths.all():
        row = int(np.argmin(prompts.lengths))
        raise ValueError(
            f"expected prompts of at least one token, received an empty one in row {row} (group {rows['group'][row]}): nothing "
            "predicts its first token; begin prompts with a token of their own"
        )
    columns = {name: ragged(rows, name) for name in ("log_probs", "kept", "versions")}
    for name, column in columns.items():
        if not np.array_equal(column.lengths, tokens.lengths):
            row = int(np.argmax(column.lengths != tokens.lengths))
            raise ValueError(
                f"expected as many {name} as tokens, received {column.lengths[row]} for {tokens.lengths[row]} tokens in row {row} "
                f"(group {rows['group'][row]})"
            )
    lengths = tokens.lengths

    def whole(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    def fraction(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    def flags(column: str, yes: pa.Scalar) -> Tensor:
        return torch.from_numpy(np.array(pc.equal(rows[column], yes).to_numpy(zero_copy_only=False))).to(device)

    return Rollouts(
        sequence=whole(np.repeat(np.arange(rows.num_rows), lengths)),
        tokens=whole(tokens.values),
        old=fraction(columns["log_probs"].values),
        kept=fraction(columns["kept"].values),
        versions=whole(columns["versions"].values),
        group=whole(_numbered(rows["group"].to_numpy())),
        reward=fraction(rows["reward"].to_numpy()),
        shaped=fraction(rows["shaped"].to_numpy()),
        passed=flags("passed", pa.scalar(True)),
        length=whole(lengths),
        cut=flags("finish", pa.scalar("length")),
        offsets=tokens.offsets,
        inputs=_inputs(prompts, tokens),
        prompt_lengths=prompts.lengths,
        step_ends=ragged(rows, "step_ends"),
        step_rewards=ragged(rows, "step_rewards"),
    )


def buckets(of: Rollouts, completions: np.ndarray, micro_tokens: int) -> list[np.ndarray]:
    """Divides `completions`, int64 numbers, into micro-batches of at most `micro_tokens` tokens, padding included.

    Those of like length go together, the longest first: if memory is short, that shows at the first. One that is longer than
    `micro_tokens` by itself has a micro-batch of its own; one without tokens has none.
    """
    completions = completions[np.diff(of.offsets)[completions] > 0]
    widths = of.inputs.lengths
    order = completions[np.argsort(-widths[completions], kind="stable")]
    found, at = [], 0
    while at < len(order):
        count = max(1, micro_tokens // int(widths[order[at]]))
        found.append(order[at : at + count])
        at += count
    return found


def micro_batch(of: Rollouts, completions: np.ndarray, *, pad: int) -> MicroBatch:
    """The inputs of these completions, int64 numbers, none without tokens; right-padded with `pad`."""
    lengths, sampled = of.inputs.lengths[completions], np.diff(of.offsets)[completions]
    width = int(lengths.max())
    ids = np.full((len(completions), width), pad, np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = of.inputs.values[_spans(of.inputs.offsets[completions], lengths)]
    # The last token of the prompt predicts the first one sampled.
    predicts = _spans(np.arange(len(completions)) * width + of.prompt_lengths[completions] - 1, sampled)
    arrays = (ids, predicts, _spans(of.offsets[completions], sampled))
    return MicroBatch(*(torch.from_numpy(values).to(of.tokens.device) for values in arrays))


def _inputs(prompts: Ragged, tokens: Ragged) -> Ragged:
    """Each prompt and all of its tokens but the last, which predicts nothing."""
    continued = np.maximum(tokens.lengths - 1, 0)
    offsets = np.concatenate([[0], np.cumsum(prompts.lengths + continued)])
    values = np.empty(int(offsets[-1]), np.int32)
    values[_spans(offsets[:-1], prompts.lengths)] = prompts.values
    values[_spans(offsets[:-1] + prompts.lengths, continued)] = tokens.values[_spans(tokens.offsets[:-1], continued)]
    return Ragged(values, offsets)


def _spans(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, … (lengths[0] of them), begins[1], …"""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def _numbered(names: np.ndarray) -> np.ndarray:
    """The numbers from 0 on that stand for `names`, in the order of their first appearance."""
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    numbers: np.ndarray = np.argsort(np.argsort(first))[inverse]
    return numbers
