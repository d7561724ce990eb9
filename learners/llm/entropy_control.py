"""Against the collapse of entropy: the few tokens whose log-probability and advantage covary most (Cui et al. 2025, 2505.22617).

Under a policy gradient the entropy changes by about minus that covariance (§3), and few tokens make most of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learners.llm.advantages import Total, alone


def covariance(log_probs: Tensor, advantage: Tensor, *, mask: Tensor | None = None, total: Total = alone) -> Tensor:
    """(log π − mean) · (A − mean) of each token (T,), float64 (§4); its mean is the covariance. Without a gradient.

    Args:
        log_probs: (T,), of all tokens of this learner's batch.
        advantage: (T,).
        mask: bool (T,), tokens that are learnt from; the means are over them, and others have 0. None takes all.
        total: sums a tensor over all learners: the means are over the batch of all.
    """
    x, y = log_probs.detach().double(), advantage.detach().double()
    kept = torch.ones_like(x) if mask is None else mask.double()
    sum_x, sum_y, count = total(torch.stack([(x * kept).sum(), (y * kept).sum(), kept.sum()])).unbind()
    count = count.clamp_min(1)
    return (x - sum_x / count) * (y - sum_y / count) * kept


def clip_cov(
    covariances: Tensor,
    *,
    fraction: float,
    low: float,
    high: float,
    generator: torch.Generator,
    mask: Tensor | None = None,
    clipped: Tensor | None = None,
) -> Tensor:
    """Tokens that are taken out of the loss, bool (T,): drawn at random among those of covariance within (low, high) (§4).

    As many as max(1, round(fraction · tokens)), or all of them where there are fewer. Their loss is 0, and they stay in the mean's
    denominator.

    Args:
        covariances: (T,), of `covariance`, for the tokens of the whole batch; of one learner's, where each is to choose alone.
        fraction: share of the tokens.
        low: lowest covariance, not reached.
        high: highest covariance, not reached.
        generator: on the CPU.
        mask: bool (T,), tokens that are learnt from; None takes all.
        clipped: bool (T,), tokens without a gradient as it is, which are not drawn.
    """
    candidate = (covariances > low) & (covariances < high)
    if mask is not None:
        candidate &= mask
    if clipped is not None:
        candidate &= ~clipped
    among = candidate.nonzero().squeeze(1)
    order = torch.randperm(len(among), generator=generator).to(among.device)
    drawn = among[order[: _share(fraction, covariances, mask)]]
    return torch.zeros_like(candidate).index_fill(0, drawn, True)


def kl_cov(covariances: Tensor, *, fraction: float, mask: Tensor | None = None) -> Tensor:
    """The max(1, round(fraction · tokens)) tokens of the largest covariance, bool (T,) (§4); for `kl_cov_penalty`.

    Of equal ones the first are taken. Arguments as of `clip_cov`.
    """
    selected = torch.zeros_like(covariances, dtype=torch.bool)
    among = torch.arange(len(covariances), device=covariances.device) if mask is None else mask.nonzero().squeeze(1)
    order = torch.sort(covariances[among], descending=True, stable=True).indices
    return selected.index_fill(0, among[order[: _share(fraction, covariances, mask)]], True)


def kl_cov_penalty(new: Tensor, old: Tensor, selected: Tensor, coefficient: float) -> Tensor:
    """coefficient · |log π − log π_old| of the selected tokens (T,), 0 of others, to be added to the loss.

    Args:
        new: (T,), log-probabilities under the current policy, with a gradient.
        old: (T,), under the behaviour policy.
        selected: bool (T,), of `kl_cov`.
        coefficient: weight.
    """
    return torch.where(selected, coefficient * (new - old).abs(), 0.0)


def _share(fraction: float, covariances: Tensor, mask: Tensor | None) -> int:
    tokens = len(covariances) if mask is None else int(mask.sum())
    return max(1, round(fraction * tokens))
