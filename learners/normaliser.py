"""Running mean and deviation of observation vectors, by which networks see them scaled.

Batches are merged by the update of Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample variance", American
Statistician 37, section 3), in float64: the result is the mean and variance of all rows so far, whatever batches they came in.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-8  # added to the variance
MOST_DEVIATIONS = 10.0  # to which normalised observations are clipped


class Normaliser:
    """x ↦ clip((x − mean) · scale, −10, 10), scale = 1/√(variance + 1e-8); before any data mean 0 and scale 1.

    Everything stays on the device, changes in place and waits for nothing, so an update that contains it compiles and
    records as before. A component that is constant maps to 0.
    """

    def __init__(self, size: int, *, device: torch.device | str = "cpu") -> None:
        """`size` is the width of the observation vector."""
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(size, dtype=torch.float64, device=device)
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)  # Σ (x − mean)²
        self.mean = torch.zeros(size, device=device)  # (size,) float32, as actors read it
        self.scale = torch.ones(size, device=device)  # (size,) float32

    def __call__(self, x: Tensor) -> Tensor:
        """Observations (…, size), normalised."""
        return ((x - self.mean) * self.scale).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)

    def update(self, x: Tensor) -> None:
        """Takes the rows of `x` (…, size) in."""
        self.merge(self.sums(x))

    def sums(self, x: Tensor) -> Tensor:
        """What `merge` needs of the rows of `x` (…, size): (1 + 2 · size,) float64, to be added over several learners.

        Number of rows, then Σ (x − mean) and Σ (x − mean)² of each component, about the mean so far, which is the same for
        all learners: the squares of a component far from 0 would lose the digits that its variance is made of.
        """
        centred = x.flatten(0, -2).double() - self._mean
        rows = self._count.new_full((1,), len(centred))
        return torch.cat((rows, centred.sum(0), centred.square().sum(0)))

    def merge(self, sums: Tensor) -> None:
        """Takes in rows by their `sums`, which must be those about the present mean."""
        rows, (of_first, of_squares) = sums[0], sums[1:].view(2, -1)
        self._count.add_(rows)
        total = self._count.clamp(min=1.0)  # no rows so far change nothing
        # With n of N + n rows new: mean += Σ/(N + n), squares += Σ² − (Σ)²/(N + n); rounding must not make them negative.
        self._mean.add_(of_first / total)
        self._squares.add_(of_squares - of_first.square() / total).clamp_(min=0.0)
        self._refresh()

    def _refresh(self) -> None:
        scale = (self._squares / self._count + EPSILON).rsqrt()
        self.mean.copy_(self._mean)
        self.scale.copy_(torch.where(self._count > 0, scale, 1.0))

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: count (), mean (size,) and squares (size,), float64; the tensors themselves, not copies."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what `state` gave; raises ValueError, changing nothing, if it is not of this size."""
        own = self.state()
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
        got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
        if got != expected:
            raise ValueError(f"expected the state of a normaliser {expected}, got {got}")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._refresh()

    def published(self) -> dict[str, Tensor]:
        """What goes to actors with the weights: normaliser.mean and normaliser.scale, (size,) float32."""
        return {"normaliser.mean": self.mean, "normaliser.scale": self.scale}
