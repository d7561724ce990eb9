"""The support of a classification head: found in the data, grown when values outgrow it, and the last layer to match.

Values beyond the support are clamped, so a user would have to know the largest return before training. `SupportTracker`
watches returns and targets instead. When they leave the support, `grow` says what comes next: more bins of the same
width, to which `grow_columns` fits the last layer without changing any value, or, at the most bins that the settings
allow, bins of twice the width, to which `refit` fits it on replayed states with a small error that it reports.

value_heads.md says when each happens. Farebrother et al. 2024, arXiv 2403.03950, fix the support by hand; this is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.heads import Classification

NEW_BIAS = -20.0  # logit of a new bin, measured from the mean of the old ones: e^-20 of an old bin's probability
QUANTILES = (0.01, 0.99)  # of the targets; a critic's rare wild guesses are not worth bins
RECORD = 16_384  # targets remembered
SAMPLE = 1024  # of them from one call
LEAST_WIDTH = 0.1  # width of a support, of the largest magnitude in it: float32 resolves a bin's fractions there
REFIT_ROWS = 10_000  # replayed states that a refit needs
REFIT_GOAL = 1e-3  # of the support's width: a refit stops when no value moves further; 1e-2 is what a user may accept
REFIT_ROUNDS, REFIT_STEPS = 8, 30  # of L-BFGS; the goal is looked at, and the penalty sharpened, after each round
SHARPEN = 4.0  # how much heavier each round's penalty on moved values is


class SupportTracker:
    """Which values the data asks for: the extremes of observed returns and quantiles of recent targets, with a margin.

    With settings.low and settings.high fixed it says those and nothing outgrows them.
    """

    def __init__(self, settings: HeadSettings) -> None:
        self._settings = settings
        self._returns = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
        self._targets = torch.full((RECORD,), math.nan)
        self._written = torch.zeros((), dtype=torch.int64)

    @property
    def observed(self) -> bool:
        """Whether any data was seen."""
        return bool(self._returns[0] <= self._returns[1]) or int(self._written) > 0

    def observe_returns(self, low: float, high: float) -> None:
        """Takes note of the smallest and largest discounted return of some steps. Both count as they are, for ever.

        Raises ValueError for a pair that is not finite or not in order.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"expected finite discounted returns with low <= high, got low {low} and high {high}")
        self._returns[0].clamp_(max=low)
        self._returns[1].clamp_(min=high)

    def observe_targets(self, values: Tensor) -> None:
        """Takes note of target values, `Label.value` of any shape, now and then: it waits for the device.

        Of one call at most SAMPLE values are kept, of all calls the last RECORD. Values that are not finite are left
        out: the learner's own check reports them.
        """
        flat = values.detach().reshape(-1)
        flat = flat[:: -(-len(flat) // SAMPLE) or 1].float().cpu()
        flat = flat[flat.isfinite()]
        at = (int(self._written) + torch.arange(len(flat))) % RECORD
        self._targets[at] = flat
        self._written += len(flat)

    def needed(self) -> tuple[float, float]:
        """The support (low, high) for what was seen: its range and the margin, and at least LEAST_WIDTH of its magnitude.

        (-1, 1) where every value was 0 or nothing was seen.
        """
        if self._settings.low is not None and self._settings.high is not None:
            return self._settings.low, self._settings.high
        low, high = self._extent()
        magnitude = max(abs(low), abs(high))
        if magnitude == 0.0:
            return -1.0, 1.0
        margin = self._settings.margin * (high - low)
        lacking = LEAST_WIDTH * magnitude - (high - low) - 2.0 * margin
        margin += 0.5 * max(lacking, 0.0)
        return low - margin, high + margin

    def outgrown(self, support: tuple[float, float]) -> bool:
        """Whether what was seen, without the margin, leaves `support`. The margin keeps growth rare."""
        if self._settings.low is not None and self._settings.high is not None:
            return False
        low, high = self._extent()
        slack = 1e-6 * (support[1] - support[0])  # rounding, which without a margin would ask for growth for ever
        return self.observed and (low < support[0] - slack or high > support[1] + slack)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"returns": self._returns, "targets": self._targets, "written": self._written}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`. Raises KeyError where a part is missing."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def _extent(self) -> tuple[float, float]:
        """Smallest and largest value that counts; (0, 0) where there is none."""
        low, high = self._returns.tolist()
        seen = self._targets[: min(int(self._written), RECORD)]
        if len(seen):
            quantiles = torch.quantile(seen.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
            low, high = min(low, quantiles[0]), max(high, quantiles[1])
        return (low, high) if low <= high else (0.0, 0.0)


class Growth(NamedTuple):
    """A larger support, and how the last layer gets there."""

    support: tuple[float, float]
    bins: int  # for make_head
    before: int  # bins of the same width added below low, for grow_columns; 0 where the width changed
    after: int  # the same above high
    doublings: int  # of the width; 0 means grow_columns, else refit


def grow(head: Classification, needed: tuple[float, float], settings: HeadSettings) -> Growth:
    """The smallest growth of `head` that covers `needed` with whole bins; it never shrinks.

    The width stays as long as settings.max_bins allows, then doubles as often as it must; there are never less than
    settings.bins bins. Raises ValueError where `needed` is not finite.
    """
    if not all(map(math.isfinite, needed)):
        raise ValueError(f"expected a finite support, got {needed}")
    low, high = head.support
    intervals = round((high - low) / head.width)
    atoms = head.bins - intervals  # 1 where atoms sit on both ends of the support, 0 where bins fill it
    before = _whole((low - needed[0]) / head.width)
    after = _whole((needed[1] - high) / head.width)
    if head.bins + before + after <= settings.max_bins:
        support = (low - before * head.width, high + after * head.width)
        return Growth(support, head.bins + before + after, before, after, 0)
    low, high = min(low, needed[0]), max(high, needed[1])
    doublings = 1
    while _whole((high - low) / (head.width * 2.0**doublings)) + atoms > settings.max_bins:
        doublings += 1
    width = head.width * 2.0**doublings
    count = max(_whole((high - low) / width), settings.bins - atoms)
    spare = max(count * width - (high - low), 0.0)
    return Growth((low - 0.5 * spare, high + 0.5 * spare), count + atoms, 0, 0, doublings)


def grow_columns(
    weight: Tensor, bias: Tensor, before: int, after: int, *, values: int = 1, offset: float = NEW_BIAS
) -> tuple[Tensor, Tensor]:
    """A last layer with `before` and `after` more bins per value; the old columns are copied, so old logits stay as they are.

    `weight` (networks, inputs, values * outputs) and `bias` (networks, 1, values * outputs), a value's outputs side by side. A new
    column is the mean of the old ones with `offset` on its bias: for any input and any weights its probability is below
    e^offset of an old column's mean one, which a bias alone would not ensure. `offset` is 0 for Adam's moments, so
    that new columns step as far as old ones do, and NEW_BIAS for parameters and their targets.
    """

    def grown(tensor: Tensor, offset: float) -> Tensor:
        columns = _by_value(tensor, values)
        new = columns.mean(-1, keepdim=True) + offset
        parts = (new.expand(*columns.shape[:-1], before), columns, new.expand(*columns.shape[:-1], after))
        return torch.cat(parts, -1).flatten(-2)

    return grown(weight, 0.0), grown(bias, offset)


def resample_columns(
    weight: Tensor, bias: Tensor, old: Classification, new: Classification, *, offset: float = NEW_BIAS
) -> tuple[Tensor, Tensor]:
    """A last layer for the wider bins of `new`: each column the average of those of `old` that it overlaps.

    Shapes and `offset`, which is for columns outside the old ones, as in `grow_columns`. Linear, so it is right for the
    streams of a dueling network (offset 0 for the advantages) and for Adam's moments too, and where `refit` starts.
    """
    overlap = _overlap(old, new)
    total = overlap.sum(0)
    outside = total == 0.0
    values = weight.shape[-1] // old.outputs
    average = torch.where(outside, 1.0 / old.outputs, overlap / total.clamp(min=1e-9)).to(weight)

    def resampled(tensor: Tensor) -> Tensor:
        return (_by_value(tensor, values) @ average).flatten(-2)

    return resampled(weight), resampled(bias) + (offset * outside).to(bias).repeat(values)


class Refit(NamedTuple):
    """A last layer for other bins, and how far it moves values."""

    weight: Tensor  # (networks, inputs, values * outputs)
    bias: Tensor  # (networks, 1, values * outputs)
    error: float  # largest |change of a value| over all rows, in units of reward
    share: float  # the same as a share of the new support's width: must stay under 0.01


def refit(features: Tensor, weight: Tensor, bias: Tensor, old: Classification, new: Classification) -> Refit:
    """Fits the last layer to the bins of `new`, wider than those of `old`, so that values stay.

    `features` (networks, rows, inputs) are the last layer's inputs on at least REFIT_ROWS replayed states; `weight` and
    `bias` as in `grow_columns`. For every value by itself it minimises the cross-entropy to the old distribution,
    projected on the new bins, plus the fourth power of the mean's change in bins, which weighs more in each round: the
    largest change is what must stay small. A tenth of the rows is held out, and counts in the error all the same.
    Raises ValueError for too few rows.
    """
    networks, rows, _ = features.shape
    if rows < REFIT_ROWS:
        raise ValueError(f"a refit needs at least {REFIT_ROWS} rows of replay, got {rows}")
    values = weight.shape[-1] // old.outputs
    old_weight, old_bias = _by_value(weight, values), _by_value(bias, values)
    start_weight, start_bias = resample_columns(weight, bias, old, new)
    fitted_weight = _by_value(start_weight, values).clone()  # (networks, inputs, values, outputs)
    fitted_bias = _by_value(start_bias, values).clone()
    overlap = _overlap(old, new).to(weight)
    error = 0.0
    for network in range(networks):
        x = features[network].to(weight.dtype)
        for value in range(values):
            at = (network, slice(None), value)
            old_logits = torch.addmm(old_bias[at], x, old_weight[at])
            problem = _Problem(x, old_logits, overlap, old, new)
            error = max(error, problem.solve(fitted_weight[at], fitted_bias[at]))
    low, high = new.support
    return Refit(fitted_weight.flatten(-2), fitted_bias.flatten(-2), error, error / (high - low))


@dataclass(frozen=True)
class _Problem:
    """The refit of one value of one network."""

    features: Tensor  # (rows, inputs)
    old_logits: Tensor  # (rows, old.outputs)
    overlap: Tensor  # (old.outputs, new.outputs)
    old: Classification
    new: Classification

    def solve(self, weight: Tensor, bias: Tensor) -> float:
        """Improves `weight` (inputs, outputs) and `bias` (1, outputs) in place; returns the largest error in units of reward."""
        mean = self.old.mean(self.old_logits)
        error = self._error(weight, bias, mean)
        low, high = self.new.support
        goal = REFIT_GOAL * (high - low)
        if error <= goal:
            return error
        held_out = torch.arange(len(mean), device=mean.device) % 10 == 9
        x, mean_in = self.features[~held_out], mean[~held_out]
        target = torch.softmax(self.old_logits[~held_out], -1) @ self.overlap
        best = weight.clone(), bias.clone()
        parameters = [weight.clone(), bias.clone()]
        scale = 0.5

        def evaluate() -> Tensor:
            logits = torch.addmm(parameters[1], x, parameters[0])
            loss, gradient = self.new.loss(logits, target)
            off = (self.new.mean(logits) - mean_in) / self.new.width  # in bins
            gradient += self.new.mean_gradient(logits, 4.0 * scale / self.new.width * off**3)
            gradient /= len(x)
            parameters[0].grad, parameters[1].grad = x.T @ gradient, gradient.sum(0, keepdim=True)
            return (loss + scale * off**4).mean()

        for _ in range(REFIT_ROUNDS):
            optimiser = torch.optim.LBFGS(  # afresh, since what it knows of the curvature belongs to the last penalty
                parameters,
                max_iter=REFIT_STEPS,
                tolerance_grad=0.0,
                tolerance_change=0.0,
                line_search_fn="strong_wolfe",
            )
            optimiser.step(evaluate)  # type: ignore[no-untyped-call]
            now = self._error(parameters[0], parameters[1], mean)
            if now < error:
                error, best = now, (parameters[0].clone(), parameters[1].clone())
            if error <= goal:
                break
            scale *= SHARPEN
        weight.copy_(best[0])
        bias.copy_(best[1])
        return error

    def _error(self, weight: Tensor, bias: Tensor, mean: Tensor) -> float:
        return float((self.new.mean(torch.addmm(bias, self.features, weight)) - mean).abs().max())


def _by_value(tensor: Tensor, values: int) -> Tensor:
    """(..., values * outputs) as (..., values, outputs)."""
    return tensor.reshape(*tensor.shape[:-1], values, -1)


def _whole(bins: float) -> int:
    """Whole bins that cover `bins`, forgiving the rounding of a sum of widths; never negative."""
    return max(math.ceil(bins - 1e-9 * max(bins, 1.0)), 0)


def _overlap(old: Classification, new: Classification) -> Tensor:
    """(old.outputs, new.outputs), on the CPU in float64: how an old point is shared by its two new neighbours, mean kept.

    Rows of old points inside the new ones sum to 1. Its columns say which old points a new one stands for.
    """
    low, high = old.support
    if new.support[0] > low or new.support[1] < high or new.width < old.width:
        raise ValueError(
            f"expected a support and bins no smaller than {old.support} and {old.width}, got {new.support}"
        )
    apart = old.centres.double().cpu().unsqueeze(-1) - new.centres.double().cpu()
    return (1.0 - apart.abs() / new.width).clamp_(min=0.0)
