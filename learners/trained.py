"""Parameters that an optimiser moves: each group one flat tensor, so that a step of it is one fused operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learners.networks import Network

Reduce = Callable[[Tensor], None]  # makes a gradient the mean over all learners, in place

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults (Kingma and Ba 2015, arXiv 1412.6980)


class Trained:
    """The parameters of one group of networks with their gradient and Adam moments, each one flat tensor.

    With `precision` bfloat16 the products read a copy in bfloat16, made anew after each step; the parameters, their gradient
    and their moments stay as they are. Decoupled weight decay is that of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).
    """

    def __init__(
        self,
        network: Network,
        initial: Tensor,
        *,
        lr: float,
        weight_decay: float = 0.0,
        precision: torch.dtype = torch.float32,
        reduce: Reduce | None = None,
    ) -> None:
        """`initial` (network.size,) lies on the learner's device, in the parameters' type; it is used, not copied."""
        self.network = network
        self.value = initial
        self.grad = torch.zeros_like(initial)
        self._adam = Adam(initial, self.grad, lr=lr, weight_decay=weight_decay)
        self._reduce = reduce
        self._low = None if precision == initial.dtype else initial.to(precision)
        self.views: Any = network.views(self.value if self._low is None else self._low)  # what products read
        self.grads: Any = network.views(self.grad)

    def descend(self) -> None:
        """One step of Adam along `grad`."""
        if self._reduce is not None:
            self._reduce(self.grad)
        self._adam.step()
        self.refresh()

    def refresh(self) -> None:
        """Call after `value` was changed from outside."""
        if self._low is not None:
            self._low.copy_(self.value)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"value": self.value, **self._adam.tensors}


class Adam:
    """Adam's state for one flat tensor, and its step."""

    def __init__(self, value: Tensor, grad: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
        self._value, self._grad = value, grad
        self._first = torch.zeros_like(value)
        self._second = torch.zeros_like(value)
        self._steps = torch.zeros((), device=value.device)
        self._lr = lr
        self._weight_decay = weight_decay

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def step(self) -> None:
        """One step: one fused operator eagerly, formulas under the compiler, which cannot look into that operator."""
        self._steps += 1.0
        if torch.compiler.is_compiling():
            if self._weight_decay:
                self._value.mul_(1.0 - self._lr * self._weight_decay)
            self._first.lerp_(self._grad, 1.0 - BETA1)
            self._second.mul_(BETA2).addcmul_(self._grad, self._grad, value=1.0 - BETA2)
            scale = (self._second / (1.0 - BETA2**self._steps)).sqrt_().add_(EPSILON)
            self._value.sub_(self._lr / (1.0 - BETA1**self._steps) * self._first / scale)
            return
        fused = torch._fused_adamw_ if self._weight_decay else torch._fused_adam_
        fused(
            [self._value],
            [self._grad],
            [self._first],
            [self._second],
            [],
            [self._steps],
            lr=self._lr,
            beta1=BETA1,
            beta2=BETA2,
            weight_decay=self._weight_decay,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
