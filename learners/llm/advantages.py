"""Advantages of completions within their groups: how much better each did than others of the same prompt.

Rows of a group may lie anywhere in the batch: `group` labels them. Tensors of a step's N completions, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.policy_gradient import ADVANTAGES, PolicyGradientSettings
from learners.classes import load_function

TOLERANCE = 1e-6  # groups whose rewards deviate less have no variance: equal rewards may differ by rounding

Advantage = Callable[[Tensor, Tensor, Tensor], Tensor]  # (reward, group, passed) -> advantage, each (N,)
Total = Callable[[Tensor], Tensor]  # the sum of a tensor over all learners


def alone(local: Tensor) -> Tensor:
    """The `Total` of a single learner."""
    return local


@dataclass(frozen=True)
class Groups:
    """What the groups of N completions have in common, per completion; float64."""

    index: Tensor  # int64 (N,), groups numbered from 0
    count: Tensor  # (N,), completions of the group
    mean: Tensor  # (N,), of their values
    squares: Tensor  # (N,), sum of the squared deviations from it
    deviation: Tensor  # (N,), value − mean; exactly 0 in groups without variance

    def spread(self, *, population: bool = False) -> Tensor:
        """Standard deviation (N,) of each completion's group, divided by G − 1, or G; 0 in groups without variance."""
        divisor = self.count if population else (self.count - 1).clamp_min(1)
        return (self.squares / divisor).sqrt()


def groups(value: Tensor, group: Tensor) -> Groups:
    """Means and deviations of `value` (N,), of any number type, within the groups that `group` (N,), int64, labels.

    A group whose values all deviate less than `TOLERANCE` from their mean has no variance.

    Raises:
        ValueError: the shapes are not those, or a value is not finite.
    """
    if value.ndim != 1 or value.shape != group.shape:
        raise ValueError(
            f"expected a value and a group for each completion, both of shape (N,), got {tuple(value.shape)} and "
            f"{tuple(group.shape)}"
        )
    value = value.double()
    if not bool(value.isfinite().all()):
        row = int((~value.isfinite()).nonzero()[0])
        raise ValueError(f"expected finite rewards, got {float(value[row])} in row {row}; correct the verifier")
    labels, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index, minlength=len(labels)).double()[index]
    mean = _sums(value, index, len(labels))[index] / count
    deviation = value - mean
    furthest = deviation.new_zeros(len(labels)).scatter_reduce(0, index, deviation.abs(), "amax")[index]
    deviation = torch.where(furthest > TOLERANCE, deviation, 0.0)
    return Groups(index, count, mean, _sums(deviation.square(), index, len(labels))[index], deviation)


def pass_rate(passed: Tensor, group: Tensor) -> Tensor:
    """Share of each completion's group that passed: float32 (N,), from bool (N,) and int64 (N,)."""
    return groups(passed, group).mean.float()


def grpo(reward: Tensor, group: Tensor, *, population: bool = False, epsilon: float = 1e-6) -> Tensor:
    """(r − mean) / (standard deviation + epsilon) of the group (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300 §4.1).

    Args:
        reward: float (N,).
        group: int64 (N,).
        population: divide the squared deviations by G and not by G − 1. With it and `epsilon` 0 the squares of a group's
            advantages add up to G, and the gradient on policy is that of negative-aware fine-tuning (`losses.nft`).
        epsilon: added to the standard deviation.

    Returns:
        float (N,) of the reward's type; 0 in groups without variance, those of one completion among them.
    """
    found = groups(reward, group)
    spread = found.spread(population=population)
    return torch.where(spread > 0, found.deviation / (spread + epsilon), 0.0).to(_type(reward))


def dr_grpo(reward: Tensor, group: Tensor) -> Tensor:
    """r − mean of the group (Liu et al. 2025, Dr. GRPO, arXiv 2503.20783 §3.2): (N,); 0 in groups without variance."""
    return groups(reward, group).deviation.to(_type(reward))


def rloo(reward: Tensor, group: Tensor) -> Tensor:
    """r − mean of the others of the group, which is G / (G − 1) · (r − mean) (Ahmadian et al. 2024, arXiv 2402.14740).

    (N,); 0 in groups without variance, those of one completion among them.
    """
    found = groups(reward, group)
    return (found.deviation * found.count / (found.count - 1).clamp_min(1)).to(_type(reward))


def whiten(reward: Tensor, group: Tensor, *, epsilon: float = 1e-6, total: Total = alone) -> Tensor:
    """r − mean of the group, divided by the deviation over the batch (Hu et al. 2025, REINFORCE++, arXiv 2501.03262).

    The deviation is the root mean square of r − mean over all completions of all learners; their mean is 0 by construction.

    Args:
        reward: float (N,) of this learner.
        group: int64 (N,).
        epsilon: added to the deviation.
        total: sums a tensor over all learners.

    Returns:
        (N,); 0 in groups without variance.
    """
    deviation = groups(reward, group).deviation
    squares, count = total(
        torch.stack([deviation.square().sum(), deviation.new_tensor(float(len(deviation)))])
    ).unbind()
    return (deviation / ((squares / count.clamp_min(1)).sqrt() + epsilon)).to(_type(reward))


def sign(passed: Tensor, *, positive_weight: float = 0.1, negative_weight: float = 1.0) -> Tensor:
    """positive_weight where bool `passed` (N,), else −negative_weight: float32 (N,) (Zhu et al. 2025, arXiv 2506.01347).

    Weights 1, 0 are PSR, 0, 1 NSR, and the defaults W-REINFORCE. There is no baseline: a group that all passed counts.
    """
    return torch.where(passed, positive_weight, -negative_weight).float()


def make_advantage(settings: PolicyGradientSettings, *, total: Total = alone) -> Advantage:
    """The function (reward, group, passed) -> advantage, each (N,), that `settings.advantage` names.

    `package.module:function` is called as `function(reward, group, passed)` with float32, int64 and bool tensors of shape (N,)
    and returns a finite floating-point tensor of that shape.

    Args:
        settings: `advantage`, `positive_weight`, `negative_weight`.
        total: sums a tensor over all learners, for `whiten`.

    Raises:
        ModuleError: an own function cannot be imported or called so.
    """
    kind = settings.advantage

    def made(reward: Tensor, group: Tensor, passed: Tensor) -> Tensor:
        if kind == "grpo":
            return grpo(reward, group)
        if kind == "dr_grpo":
            return dr_grpo(reward, group)
        if kind == "rloo":
            return rloo(reward, group)
        if kind == "whiten":
            return whiten(reward, group, total=total)
        return sign(passed, positive_weight=settings.positive_weight, negative_weight=settings.negative_weight)

    if kind in ADVANTAGES:
        return made
    function = load_function(kind, "algorithm.advantage", ("reward", "group", "passed"))

    def own(reward: Tensor, group: Tensor, passed: Tensor) -> Tensor:
        return checked(function(reward, group, passed), reward.shape, f"algorithm.advantage {kind!r}")

    return own


def checked(returned: Any, shape: torch.Size, what: str) -> Tensor:
    """`returned`, where it is a finite floating-point tensor of this shape; else a ValueError that says what it is."""
    if not isinstance(returned, Tensor):
        raise ValueError(
            f"{what}: expected it to return a tensor of shape {tuple(shape)}, got {type(returned).__name__}"
        )
    if returned.shape != shape or not returned.is_floating_point():
        raise ValueError(
            f"{what}: expected it to return floating-point numbers of shape {tuple(shape)}, got {returned.dtype} of shape "
            f"{tuple(returned.shape)}"
        )
    if not bool(returned.isfinite().all()):
        raise ValueError(f"{what}: expected it to return finite numbers; {int((~returned.isfinite()).sum())} are not")
    return returned


def _sums(value: Tensor, index: Tensor, count: int) -> Tensor:
    return value.new_zeros(count).index_add(0, index, value)


def _type(reward: Tensor) -> torch.dtype:
    return reward.dtype if reward.is_floating_point() else torch.float32
