"""Value heads of users: imported by the name that `algorithm.head.kind` gives, and tried before a critic trusts them.

Nothing differentiates a head: what it says its gradients are is what networks learn by. So they are compared with differences
of its loss and its mean; a wrong sign or a lost factor is found here and not after a night of training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.classes import ModuleError, load_class

METHODS = ("mean", "mean_gradient", "label", "loss", "mixture")
STEP = 1e-6  # of the differences, in float64
TOLERANCE = 1e-4
BATCH, MEMBERS = 5, 2  # of the networks that a head is tried on


def make_own_head(settings: HeadSettings, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The head of the class that `settings.kind` names, as `Class(settings, device=device, dtype=dtype)`.

    Raises:
        ModuleError: there is no such class, or it is no value head; the message says what is wrong.
    """
    return _checked_class(settings)(settings, device=torch.device(device), dtype=dtype)


@functools.cache
def _checked_class(settings: HeadSettings) -> type[Any]:
    cls = load_class(settings.kind, "algorithm.head.kind", methods=METHODS)
    what = f"algorithm.head.kind {settings.kind!r}"
    try:
        head = cls(settings, device=torch.device("cpu"), dtype=torch.float64)
        outputs = getattr(head, "outputs", None)
        if not isinstance(outputs, int) or outputs < 1:
            raise ModuleError(f"{what}: expected instances with a whole number outputs, at least 1, got {outputs!r}")
        with torch.no_grad():
            _try(head, what, outputs)
    except ModuleError:
        raise
    except Exception as error:  # trying it runs the user's code: anything may come
        raise ModuleError(
            f"{what}: trying it on logits ({MEMBERS}, {BATCH}, outputs) raised {type(error).__name__}: {error}"
        ) from error
    return cls


def _try(head: Any, what: str, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def expect(name: str, got: object, *shape: int) -> Tensor:
        if not isinstance(got, Tensor) or tuple(got.shape) != shape or not got.isfinite().all():
            seen = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ModuleError(f"{what}: expected {name} to be a finite tensor {shape}, got {seen}: {got}")
        return got

    logits, one = random(MEMBERS, BATCH, outputs), random(1, BATCH, outputs)
    mean = expect("mean(logits)", head.mean(logits), MEMBERS, BATCH)
    of_mean = random(MEMBERS, BATCH)
    gradient = head.mean_gradient(logits, of_mean)
    expect("mean_gradient(logits, of_mean)", gradient, *logits.shape)
    _compare(f"{what}: mean_gradient", gradient, _differences(lambda x: of_mean * head.mean(x), logits))
    expect("mean(mixture(logits, 0))", head.mean(head.mixture(logits, 0)), BATCH)

    reward, discount = random(BATCH), torch.full((BATCH,), 0.9, dtype=torch.float64)
    for shift in (0.0, random(BATCH)):
        label = head.label(logits, reward, discount, shift)
        value = expect("label(logits, reward, discount, shift).value", label.value, MEMBERS, BATCH)
        wanted = reward + discount * (mean + shift)
        if not torch.allclose(value, wanted, rtol=1e-3, atol=1e-3):
            raise ModuleError(
                f"{what}: expected label(…).value to be reward + discount * (mean(logits) + shift), {wanted.tolist()}, "
                f"got {value.tolist()}"
            )
    alone = head.label(logits, torch.zeros_like(reward[0]), torch.ones_like(reward[0]), 0.0)
    expect("label(logits, zero, one, 0.0).value, of scalars,", alone.value, MEMBERS, BATCH)
    target = head.label(one, reward, discount, 0.0).target
    loss, gradient = head.loss(logits, target)  # one label for both networks
    expect("the loss of loss(logits, target)", loss, MEMBERS, BATCH)
    expect("the gradient of loss(logits, target)", gradient, *logits.shape)
    _compare(f"{what}: the gradient of loss", gradient, _differences(lambda x: head.loss(x, target)[0], logits))


def _differences(of: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Central differences (…, outputs) of `of`, (…, outputs) to (…), each element of which depends on its own logits alone."""
    columns = []
    for i in range(logits.shape[-1]):
        step = torch.zeros_like(logits)
        step[..., i] = STEP
        columns.append((of(logits + step) - of(logits - step)) / (2.0 * STEP))
    return torch.stack(columns, -1)


def _compare(what: str, got: Tensor, wanted: Tensor) -> None:
    if not torch.allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE):
        at = int((got - wanted).abs().argmax())
        raise ModuleError(
            f"{what} is not the derivative: expected {wanted.flatten()[at]:.6g} by differences, got "
            f"{got.flatten()[at]:.6g}; all methods must compute in the dtype that the head was constructed with"
        )
