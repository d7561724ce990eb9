"""Completions at the limit of their length (Yu et al. 2025, DAPO, arXiv 2503.14476 §3.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(length: Tensor, *, max_tokens: int, buffer: int, factor: float) -> Tensor:
    """min(0, −(length − (max_tokens − buffer)) / buffer · factor), to be added to the reward: float32 (N,).

    0 up to max_tokens − buffer, −factor at max_tokens. It lowers a reward that an advantage is made of; the outcome that is
    reported, and whether a completion passed, stay as the verifier gave them.

    Args:
        length: int64 (N,), tokens of each completion.
        max_tokens: most tokens of a completion.
        buffer: tokens before the limit over which the penalty grows, at least 1.
        factor: penalty at the limit.
    """
    return (max_tokens - buffer - length).clamp_max(0).float() / buffer * factor


def complete_tokens(cut_off: Tensor, sequence: Tensor) -> Tensor:
    """The tokens of completions that were not cut off, bool (T,): the mask of overlong filtering.

    Args:
        cut_off: bool (N,), completions that reached the limit before their end.
        sequence: int64 (T,), the completion of each token.
    """
    return torch.logical_not(cut_off)[sequence]
