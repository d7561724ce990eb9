"""AdamW over accumulated gradients of one or several learners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.llm import LlmLearnersSettings
from learners.llm.parallel import Learners, fill_, whole

BUCKET = 1 << 25  # elements of gradients that are summed over the learners at once
MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimiser:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a linear warm-up, and gradients clipped by their norm.

    Weight decay is on all parameters alike.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: LlmLearnersSettings, learners: Learners
    ) -> None:
        """`parameters` are those trained; where they are divided among the learners (FSDP2), so is everything here."""
        self.steps = 0
        self._parameters = dict(parameters)
        self._settings = settings
        self._learners = learners
        self._adam = torch.optim.AdamW(
            self._parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        for parameter in self._parameters.values():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
            self._adam.state[parameter] = {"step": torch.tensor(0.0), **moments}

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        rise = self._settings.warm_up
        return self._settings.learning_rate * (min(1.0, (self.steps + 1) / rise) if rise else 1.0)

    def gather(self) -> float:
        """Sums the accumulated gradients over all learners and scales them down to the largest norm; returns their norm."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._learners.count > 1:
            for bucket in self._buckets():
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                self._learners.sum_(flat)
                for gradient, summed in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_gradient_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self) -> None:
        """Changes the parameters by their gradients and forgets these."""
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._adam.step()
        self.forget()
        self.steps += 1

    def forget(self) -> None:
        """Drops the accumulated gradients."""
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Copies of the moments, whole and on the CPU, by names such as `exp_avg.model.norm.weight`, and the steps made."""
        moments = {name: whole(tensor) for name, tensor in self.tensors().items()}
        return moments | {"steps": torch.tensor(self.steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, of parameters with the same names and shapes."""
        for name, tensor in self.tensors().items():
            fill_(tensor, state[name])
        self.steps = int(state["steps"])
        for parameter in self._parameters.values():
            self._adam.state[parameter]["step"].fill_(float(self.steps))

    def tensors(self) -> dict[str, Tensor]:
        """The moments themselves."""
        return {
            f"{moment}.{name}": self._adam.state[parameter][moment]
            for moment in MOMENTS
            for name, parameter in self._parameters.items()
        }

    def _buckets(self) -> Iterator[list[Tensor]]:
        """Gradients that are not divided, in lists of about `BUCKET` elements: those that are were summed in the backward pass."""
        bucket: list[Tensor] = []
        for parameter in self._parameters.values():
            gradient = parameter.grad
            if gradient is None or isinstance(gradient, DTensor):
                continue
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
