"""The matrix products of the networks, and the choice of the library that computes them.

On a CPU torch's batched product comes from MKL or OpenBLAS, which on some processors reaches half of what oneDNN does for
the same float32 product, on others the same: `choose` times both. On a GPU there is one.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Protocol

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

TRIES = 12  # timings of each library; the least counts, since noise only adds


class Products(Protocol):
    """Products of all networks of a group; x (networks, batch, inputs), weight (networks, inputs, outputs)."""

    name: str

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
        """x @ weight + bias, negative results set to 0 with `relu`."""

    def weight_gradient(self, x: Tensor, grad: Tensor, into: Tensor) -> None:
        """Overwrites `into`, float32, with xᵀ @ grad."""

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """grad @ weightᵀ; the result is fresh, so the caller may change it."""


class _Torch:
    name = "torch"

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
        y = torch.baddbmm(bias, x, weight)
        return y.relu_() if relu else y

    def weight_gradient(self, x: Tensor, grad: Tensor, into: Tensor) -> None:
        if x.dtype == into.dtype:
            torch.bmm(x.mT, grad, out=into)
        else:
            into.copy_(torch.bmm(x.mT, grad))

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        # With one output the product is an outer one, which broadcasting computes without the call of a matrix product.
        return grad * weight.mT if grad.shape[-1] == 1 else torch.bmm(grad, weight.mT)


class _OneDnn:
    """Network by network, since oneDNN's fused product is not batched; a group has few networks and large products."""

    name = "onednn"

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
        return torch.stack([_linear(x[i], weight[i].mT, bias[i, 0], relu) for i in range(len(weight))])

    def weight_gradient(self, x: Tensor, grad: Tensor, into: Tensor) -> None:
        for i in range(len(x)):
            into[i].copy_(_linear(x[i].mT, grad[i].mT, None, False))

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        if grad.shape[-1] == 1:
            return grad * weight.mT
        return torch.stack([_linear(grad[i], weight[i], None, False) for i in range(len(weight))])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """x @ weightᵀ + bias by oneDNN."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    return y


TORCH: Products = _Torch()
ONEDNN: Products = _OneDnn()


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Products:
    """The products called `name`; auto takes the faster on this machine, for float32 and bfloat16 on a CPU."""
    if name == "onednn" and device.type == "cpu" and dtype != torch.float64:
        return ONEDNN
    if name != "auto" or device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return TORCH
    return _fastest(dtype, torch.get_num_threads())


@functools.cache
def _fastest(dtype: torch.dtype, threads: int) -> Products:
    """The products that take the least time for one layer's forward and backward pass, the best of some tries each."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return TORCH
    x, weight, bias = (torch.full((2, rows, 256), 0.5, dtype=dtype) for rows in (256, 256, 1))
    into = torch.empty(2, 256, 256)
    times: dict[str, list[float]] = {TORCH.name: [], ONEDNN.name: []}
    for _ in range(TRIES):
        for products in (TORCH, ONEDNN):
            began = time.perf_counter()
            products.weight_gradient(
                x, products.input_gradient(products.affine(x, weight, bias, relu=True), weight), into
            )
            times[products.name].append(time.perf_counter() - began)
    best = {name: min(taken) for name, taken in times.items()}
    # oneDNN copies between networks, so it must be clearly ahead.
    chosen = ONEDNN if best[ONEDNN.name] < 0.9 * best[TORCH.name] else TORCH
    LOG.info("matrix products by %s: %s", chosen.name, ", ".join(f"{n} {1e6 * t:.0f} µs" for n, t in best.items()))
    return chosen
