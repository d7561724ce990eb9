"""Learning from part of what was sampled (D³S, arXiv 2509.22115): completions that vary most, tokens that matter most."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rollouts(advantage: Tensor, group: Tensor, count: int) -> Tensor:
    """The `count` completions of each group whose advantages have the largest variance: bool (N,), exact.

    The variance of a set is convex in each of its values, so the largest is that of the i lowest and the count − i highest of a
    group, for some i; all of them are compared. Of splits with equal variance the one nearest to halves is taken, and of equal
    advantages the first rows are the lower ones.

    Args:
        advantage: float (N,).
        group: int64 (N,).
        count: completions that are kept of each group, at least 1; smaller groups are kept whole.
    """
    labels, index = torch.unique(group, return_inverse=True)
    by_value = torch.sort(advantage, stable=True).indices
    order = by_value[torch.sort(index[by_value], stable=True).indices]  # by group, within it by advantage
    size = torch.bincount(index, minlength=len(labels))
    first = size.cumsum(0) - size
    rank = torch.empty_like(index)
    rank[order] = torch.arange(len(order), device=order.device) - first[index[order]]

    value = advantage.double()[order]
    value = value - value.mean() if len(value) else value
    sums, squares = (torch.cat([value.new_zeros(1), x.cumsum(0)]) for x in (value, value.square()))
    kept = size.clamp_max(count)[:, None]  # (groups, 1)
    low = torch.arange(count + 1, device=size.device)[None, :].clamp_max(
        kept
    )  # (groups, count + 1), lowest that are kept
    begin, end = first[:, None], (first + size)[:, None]

    def kept_sum(through: Tensor) -> Tensor:
        return through[begin + low] - through[begin] + through[end] - through[end - (kept - low)]

    variance = kept_sum(squares) / kept - (kept_sum(sums) / kept).square()
    best = variance.max(1, keepdim=True).values
    # Sums of floats differ by rounding between splits that are equal.
    equal = variance >= best - 1e-9 * (1.0 + best.abs())
    distance = torch.where(equal, (2 * low - kept).abs(), 2 * count + 2)
    split = low.gather(1, distance.argmin(1, keepdim=True))[:, 0]
    return (rank < split[index]) | (rank >= (size - kept[:, 0] + split)[index])


def select_tokens(advantage: Tensor, entropy: Tensor, fraction: float, *, mask: Tensor | None = None) -> Tensor:
    """The max(1, round(fraction · tokens)) tokens with the largest |advantage| · entropy: bool (T,); of equal ones the first.

    Args:
        advantage: (T,).
        entropy: (T,), of the policy's distribution at each token, nats.
        fraction: of the tokens of the mask.
        mask: bool (T,), tokens to choose among; None takes all.
    """
    among = torch.arange(len(advantage), device=advantage.device) if mask is None else mask.nonzero().squeeze(1)
    order = torch.sort((advantage.abs() * entropy).detach()[among], descending=True, stable=True).indices
    chosen = among[order[: max(1, round(fraction * len(among)))]]
    return torch.zeros_like(advantage, dtype=torch.bool).index_fill(0, chosen, True)
