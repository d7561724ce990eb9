"""What each token's loss weighs in the loss of a batch, however the batch is divided among learners and micro-batches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mean = Literal["token", "sequence", "constant"]


def token_total(mean: Mean, sequence: Tensor, *, mask: Tensor | None = None) -> int:
    """What the weights of T tokens divide by: the tokens (token), or the completions (sequence, constant), that are learnt from.

    Learners add theirs up and hand the sum to `token_weights`. Arguments as there.
    """
    if mean == "token":
        return len(sequence) if mask is None else int(mask.sum())
    return int((_counts(sequence, mask) > 0).sum())


def token_weights(
    mean: Mean, sequence: Tensor, *, max_tokens: int, mask: Tensor | None = None, total: int | None = None
) -> Tensor:
    """The weight of each token's loss: float32 (T,); 0 outside the mask.

    The sum of loss · weight over all micro-batches of all learners is the loss of the whole batch, so weights are made of all the
    tokens of an update and then divided up; micro-batches' gradients are added, not averaged.

    Args:
        mean: token, 1 / tokens (Yu et al. 2025, DAPO, arXiv 2503.14476 §3.3); sequence, the mean over a completion's tokens, then
            over completions (GRPO as first published); constant, 1 / (completions · max_tokens) (Dr. GRPO, arXiv 2503.20783 §3.2).
        sequence: int64 (T,), the completion of each token of this learner's part of the update.
        max_tokens: most tokens of a completion; for constant.
        mask: bool (T,), tokens that are learnt from; others are in no mean. None takes all. Tokens that a loss clips stay in.
        total: the sum of `token_total` over all learners; None where there is one.
    """
    divisor = token_total(mean, sequence, mask=mask) if total is None else total
    weight = torch.full(sequence.shape, 1.0 / max(divisor, 1), dtype=torch.float32, device=sequence.device)
    if mean == "constant":
        weight /= max_tokens
    elif mean == "sequence":
        weight /= _counts(sequence, mask)[sequence].clamp_min(1)
    return weight if mask is None else weight * mask


def _counts(sequence: Tensor, mask: Tensor | None) -> Tensor:
    if not len(sequence):
        return sequence.new_zeros(0)
    return torch.zeros(int(sequence.max()) + 1, dtype=torch.int64, device=sequence.device).index_add(
        0, sequence, torch.ones_like(sequence) if mask is None else mask.to(sequence.dtype)
    )
