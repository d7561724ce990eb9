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
REFIT_GOAL = 3e-3  # of the support's width: a refit stops when no value moves further; 1e-2 is what a user may accept
REFIT_ROUNDS, REFIT_TRIES = 12, 3  # Gauss-Newton steps of a refit, and how often one is tried, damped ten times more
REFIT_PART = 1024  # rows that a step looks at: the cost of its equations grows with their cube
UNUSED = 1e-6  # probability of an old bin that no row uses; it is left out where a neighbour is used


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


def refit(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    old: Classification,
    new: Classification,
    *,
    dueling: bool = False,
) -> Refit:
    """Fits the last layer to the bins of `new`, wider than those of `old`, so that values stay.

    `features` (networks, rows, inputs) are the last layer's inputs on at least REFIT_ROWS replayed states; `weight` and
    `bias` as in `grow_columns`. Every value is fitted by itself, in closed form and then by Gauss-Newton steps on the
    largest changes of its mean, until none is more than REFIT_GOAL of the support or REFIT_ROUNDS are over. A step looks
    at REFIT_PART of the rows, the error at all. With `dueling` the first value is v and the others advantages a: what is
    to stay, v + a - mean a, is fitted in their place, and taken apart again. Raises ValueError for too few rows.
    """
    networks, rows, _ = features.shape
    if rows < REFIT_ROWS:
        raise ValueError(f"a refit needs at least {REFIT_ROWS} rows of replay, got {rows}")
    columns = _by_value(torch.cat((weight, bias), 1), weight.shape[-1] // old.outputs)
    if dueling:
        advantage = columns[:, :, 1:]
        columns = columns[:, :, :1] + (advantage - advantage.mean(2, keepdim=True))
    values = columns.shape[2]  # of columns (networks, inputs + 1, values, old.outputs)
    fitted = columns.new_empty(*columns.shape[:-1], new.outputs)
    overlap = _overlap(old, new).to(weight)
    error = 0.0
    for network in range(networks):
        x = torch.cat((features[network].to(weight.dtype), weight.new_ones(rows, 1)), 1)
        for value in range(values):
            mine = columns[network, :, value]
            logits = x @ mine
            start = _merge(mine, torch.softmax(logits, -1).mean(0), overlap)
            fitted[network, :, value], moved = _Means(x, old.mean(logits), new).fit(start)
            error = max(error, moved)
    low, high = new.support
    if dueling:
        mean = fitted.mean(2, keepdim=True)
        fitted = torch.cat((mean, fitted - mean), 2)
    made = fitted.flatten(-2)
    return Refit(made[:, :-1], made[:, -1:], error, error / (high - low))


def _merge(columns: Tensor, probability: Tensor, overlap: Tensor) -> Tensor:
    """The linear map (inputs + 1, new outputs) nearest to the merged bins of `columns` (inputs + 1, old outputs).

    Merged exactly, new bin j has the logit log sum_i overlap_ij e^(l_i), which is convex in the old logits l. Its tangent
    sum_i s_ij (l_i + log(overlap_ij / s_ij)) is linear in them; s_ij is the share of old bin i in what j holds on average,
    by the old bins' mean `probability` (old outputs,). So a bin that is never used does not pull its neighbour down.
    """
    held = overlap * (probability + UNUSED).unsqueeze(-1)
    outside = overlap.sum(0) == 0.0  # of all old bins; these get their mean, far below, as in `grow_columns`
    share = torch.where(outside, 1.0 / len(overlap), held / held.sum(0).clamp(min=1e-30))
    merged = columns @ share
    excess = torch.where(share > 0.0, share * (overlap / share.clamp(min=1e-30)).clamp(min=1e-30).log(), 0.0).sum(0)
    merged[-1] += torch.where(outside, NEW_BIAS, excess)
    return merged


@dataclass(frozen=True)
class _Means:
    """The means that one value is to have, and how far columns are from them."""

    x: Tensor  # (rows, inputs + 1), the last a one
    wanted: Tensor  # (rows,), in units of reward
    head: Classification

    def fit(self, columns: Tensor) -> tuple[Tensor, float]:
        """Changes `columns` (inputs + 1, outputs) as little as brings the means to the wanted ones.

        Returns them and the largest error that is left, in units of reward. Gauss-Newton with Levenberg and Marquardt's damping.
        """
        low, high = self.head.support
        off, error = self._look(columns)
        damping = 1e-2
        for step in range(REFIT_ROUNDS):
            if not error * self.head.width > REFIT_GOAL * (high - low):  # so that what is not a number ends it too
                break
            equations = self._equations(columns, off, step)
            found = None
            for _ in range(REFIT_TRIES):
                direction = equations.solve(damping)
                found = self._better(columns, direction, error)
                if found is not None:
                    break
                damping *= 10.0
            if found is None:
                break
            columns, off, error = found
            damping *= 0.3
        return columns, error * self.head.width

    def _look(self, columns: Tensor) -> tuple[Tensor, float]:
        """Every row's error (rows,) in bins, and the largest."""
        off = (self.wanted - self.head.mean(self.x @ columns)) / self.head.width
        return off, float(off.abs().max())

    def _better(self, columns: Tensor, direction: Tensor, error: float) -> tuple[Tensor, Tensor, float] | None:
        """The columns, errors and largest error at the longest step along `direction` that is worth its time, if any."""
        for length in (1.0, 0.5, 0.2):
            changed = columns + length * direction
            off, now = self._look(changed)
            if now < 0.98 * error:
                return changed, off, now
        return None

    def _equations(self, columns: Tensor, off: Tensor, step: int) -> _Equations:
        """Those of the largest errors and, so that they stay, of as many rows that lie evenly over all."""
        rows, half = len(off), REFIT_PART // 2
        stride = -(-rows // half)
        chosen = torch.zeros(rows, dtype=torch.bool, device=off.device)
        chosen[step % stride :: stride] = True
        chosen[off.abs().topk(half).indices] = True
        part = chosen.nonzero().squeeze(-1)
        x = self.x[part]
        gradient = self.head.mean_gradient(x @ columns, off.new_full((len(part),), 1.0 / self.head.width))
        return _Equations(x, gradient, off[part])


class _Equations(NamedTuple):
    """How the means of some rows move with the columns: linearly, by the outer product of x and the mean's gradient.

    There is one unknown per row instead of one per parameter (the dual form), since the inner product of two rows' outer
    products is that of their x times that of their gradients.
    """

    x: Tensor  # (rows, inputs + 1)
    gradient: Tensor  # (rows, outputs), of the mean in bins with respect to the logits
    off: Tensor  # (rows,), in bins

    def solve(self, damping: float) -> Tensor:
        """The smallest change of the columns (inputs + 1, outputs) that removes the errors, as far as `damping` lets it."""
        x, gradient = self.x.double(), self.gradient.double()  # in float32 rounding can make them indefinite
        products = (x @ x.T) * (gradient @ gradient.T)
        diagonal = products.diagonal()
        diagonal += max(damping, 1e-6) * diagonal.mean() + 1e-12
        factor = torch.linalg.cholesky(products)
        multiplier = torch.cholesky_solve(self.off.double().unsqueeze(-1), factor).to(self.x)
        return self.x.T @ (multiplier * self.gradient)


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
