"""Value heads: how the outputs of a network stand for a value, and what it learns from.

`mse` regresses a scalar. The others say the value as the mean of a distribution over fixed points and learn by
cross-entropy: `two_hot` and `hl_gauss` from a label that stands for the mean of the target (Farebrother et al. 2024, "Stop
Regressing", arXiv 2403.03950, sections 2 and 3), `c51` from the target's own distribution (Bellemare et al. 2017, arXiv
1707.06887, section 4). value_heads.md compares them.

Gradients are written out. Nothing here waits for a device, and every method compiles into one graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.own_head import make_own_head

REACH = 4.0  # standard deviations of hl_gauss's Gaussian by which its bins reach beyond the support


class Label(NamedTuple):
    """What a network is to learn for y = reward + discount * (value + shift)."""

    target: Tensor  # (..., batch) for mse, else probabilities (..., batch, outputs): the second argument of `loss`
    value: Tensor  # (..., batch): y before it is clamped to the support, for c51 the mean before it is projected


class ValueHead(Protocol):
    """How a network's last dimension, `outputs` wide, stands for a value. Leading dimensions are free.

    `support` and `clipped` are asked of heads that classify, never of a user's.
    """

    @property
    def outputs(self) -> int:
        """Network outputs per value."""

    @property
    def support(self) -> tuple[float, float] | None:
        """Lowest and highest value that a label can stand for; None where every value can."""

    def mean(self, logits: Tensor) -> Tensor:
        """The value (...) that `logits` (..., outputs) stand for."""

    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        """Gradient of the logits (..., outputs), given that of their mean (...)."""

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        """The label of y = reward + discount * (value(logits) + shift).

        `logits` (..., batch, outputs) are those of the next state; the others broadcast to (..., batch). No y is lost:
        one outside the support is clamped to it, and `clipped` counts it.
        """

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each sample (..., batch) and its gradient with respect to `logits` (..., batch, outputs).

        `target` is a label's and broadcasts to the logits: one label may serve an ensemble.
        """

    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        """Logits of the average over `dim` of `logits`, which is not their last: the mean is the mean of the means."""

    def clipped(self, label: Label) -> Tensor:
        """Share of the label's values that lie outside the support, in [0, 1]; 0-dimensional, on the device."""


class Mse:
    """The network's one output is the value; the loss is half the squared error."""

    outputs = 1
    support = None

    def mean(self, logits: Tensor) -> Tensor:
        return logits.squeeze(-1)

    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        return of_mean.unsqueeze(-1)

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        value = _backup(self.mean(logits), reward, discount, shift)
        return Label(value, value)

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        error = logits - target.unsqueeze(-1)
        return 0.5 * error.squeeze(-1).square(), error

    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        return logits.mean(dim)

    def clipped(self, label: Label) -> Tensor:
        return label.value.new_zeros(())


class Classification(ABC):
    """What two_hot, hl_gauss and c51 share: softmax(logits) weighs fixed points, `centres`, `width` apart.

    A subclass says which distribution a scalar or a distribution is learnt as. `bins` counts what lies between `low` and
    `high` (hl_gauss has more outputs than that). Raises ValueError for less than two bins or a support that is empty or
    not finite.
    """

    def __init__(
        self,
        low: float,
        high: float,
        bins: int,
        *,
        outside: int,
        width: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or bins < 2:
            raise ValueError(f"expected low < high, both finite, and at least 2 bins; got {low}, {high} and {bins}")
        self.bins = bins
        self.width = width
        self._low = low
        self._high = high
        first = low - (outside - 0.5) * width if outside else low
        places = first + width * torch.arange(bins + 2 * outside, dtype=torch.float64)
        self.centres = places.to(device, dtype)  # (outputs,)

    @property
    def outputs(self) -> int:
        return len(self.centres)

    @property
    def support(self) -> tuple[float, float]:
        return self._low, self._high

    def mean(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, -1) @ self.centres

    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        # d mean / d logit_i = p_i (c_i - mean): softmax's own backward pass, which is one operator.
        probability = torch.softmax(logits, -1)
        of_probability = of_mean.unsqueeze(-1) * self.centres
        gradient: Tensor = torch.ops.aten._softmax_backward_data(of_probability, probability, -1, probability.dtype)
        return gradient

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        value = _backup(self.mean(logits), reward, discount, shift)
        return Label(self.distribution(value), value)

    @abstractmethod
    def distribution(self, value: Tensor) -> Tensor:
        """Probabilities (..., outputs) that stand for the scalar `value` (...), clamped to the support."""

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, in nats; its gradient softmax(logits) - target takes the probabilities that the loss needed."""
        log_probability = torch.log_softmax(logits, -1)
        loss = (log_probability * target).sum(-1).neg_()
        return loss, log_probability.exp_().sub_(target)

    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        log_probability = torch.log_softmax(logits, -1)
        return torch.logsumexp(log_probability, dim) - math.log(logits.shape[dim])

    def clipped(self, label: Label) -> Tensor:
        outside = (label.value < self._low) | (label.value > self._high)
        return outside.to(label.value.dtype).mean()


class TwoHot(Classification):
    """`bins` atoms from low to high inclusive; a scalar is the pair of neighbours whose mean it is."""

    def __init__(
        self,
        low: float,
        high: float,
        bins: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        width = (high - low) / max(bins - 1, 1)
        super().__init__(low, high, bins, outside=0, width=width, device=torch.device(device), dtype=dtype)
        self._index = torch.arange(bins, device=device, dtype=dtype)

    def distribution(self, value: Tensor) -> Tensor:
        position = ((value - self._low) / self.width).clamp_(0.0, self.bins - 1.0)
        return (position.unsqueeze(-1) - self._index).abs_().neg_().add_(1.0).clamp_(min=0.0)


class C51(TwoHot):
    """`bins` atoms from low to high inclusive; the distribution of reward + discount * (Z + shift) is projected on them.

    Where `torch.use_deterministic_algorithms` is not set, a GPU adds in any order, so labels may differ in the last bit.
    """

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        probability = torch.softmax(logits, -1)
        value = _backup(probability @ self.centres, reward, discount, shift)
        # Where the atoms land, in widths from the first: discount * index from where that of `low` lands.
        start = (_backup(self._low, reward, discount, shift) - self._low) / self.width
        position = torch.addcmul(start.unsqueeze(-1), discount.unsqueeze(-1), self._index)
        position = position.clamp_(0.0, self.bins - 1.0)
        position, probability = torch.broadcast_tensors(position, probability)  # type: ignore[no-untyped-call]
        # The atom below, for the last atom the one before it. Clamped as an integer: of NaN too it must be an index.
        index = position.long().clamp_(0, self.bins - 2)
        above = probability * (position - index)
        target = torch.zeros_like(above).scatter_add_(-1, index, probability - above)
        target[..., 1:].scatter_add_(-1, index, above)
        return Label(target, value)


class HlGauss(Classification):
    """`bins` bins from low to high; a scalar is the Gaussian round it, of `sigma` bins, that each bin holds the mass of.

    Bins go on for REACH standard deviations on either side, `outside` of them, so that the Gaussian of a scalar at the very
    end of the support is hardly cut and its mean recovers the scalar (to 1e-3 of a bin with sigma >= 0.6; narrower
    Gaussians fall between the bins). There are bins + 2 * outside outputs.
    """

    def __init__(
        self,
        low: float,
        high: float,
        bins: int,
        *,
        sigma: float = 0.75,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        width = (high - low) / max(bins, 1)
        outside = math.ceil(REACH * sigma)
        super().__init__(low, high, bins, outside=outside, width=width, device=torch.device(device), dtype=dtype)
        # Edges and scalars are measured from `low` in units of sqrt(2) sigma, the unit of erf.
        self._per_bin = 1.0 / (math.sqrt(2.0) * sigma)
        edges = torch.arange(-outside, bins + outside + 1, dtype=torch.float64) * self._per_bin
        self._edges = edges.to(device, dtype)  # (outputs + 1,)

    def distribution(self, value: Tensor) -> Tensor:
        position = ((value - self._low) * (self._per_bin / self.width)).clamp_(0.0, self.bins * self._per_bin)
        # Far from the scalar erf is exactly 1 in size, so differences of it err by its last bit and never by more.
        below = torch.erf(self._edges - position.unsqueeze(-1))
        return (below[..., 1:] - below[..., :-1]).div_(below[..., -1:] - below[..., :1])


def make_head(
    settings: HeadSettings,
    support: tuple[float, float] | None,
    *,
    bins: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ValueHead:
    """The head that `settings` describe, over `support` (low, high), its tensors on `device` in `dtype`.

    `bins` overrides settings.bins for a support that has grown. mse and heads of users ignore support and bins. Raises
    ValueError where another kind has no support, or one that is empty or not finite, and where a user's class is no head.
    """
    if settings.kind == "mse":
        return Mse()
    if settings.is_own:
        own: ValueHead = make_own_head(settings, device=device, dtype=dtype)
        return own
    if support is None:
        raise ValueError(f"head {settings.kind} needs a support (low, high); SupportTracker finds one in the data")
    count = settings.bins if bins is None else bins
    match settings.kind:
        case "two_hot":
            return TwoHot(*support, count, device=device, dtype=dtype)
        case "c51":
            return C51(*support, count, device=device, dtype=dtype)
        case "hl_gauss":
            return HlGauss(*support, count, sigma=settings.sigma, device=device, dtype=dtype)
    raise ValueError(
        f"expected algorithm.head.kind mse, two_hot, hl_gauss, c51 or package.module:Class, got {settings.kind}"
    )


def _backup(value: Tensor | float, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Tensor:
    """reward + discount * (value + shift), without the operator that adds a shift of 0."""
    if not (isinstance(shift, float) and shift == 0.0):
        value = value + shift
    return reward + discount * value
