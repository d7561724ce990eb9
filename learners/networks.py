"""Batched multilayer perceptrons whose parameters are one flat tensor, and what every network of a learner offers.

A group of networks of one shape is one float32 vector and named views of it, so an optimiser step, a Polyak step, a
checkpoint or a publication is one operator on one tensor. The group is evaluated as one batched matrix product per
layer. The backward pass is written out, in two halves: a loss calls for the half it needs, so no product is computed
that nobody reads, and the whole update is straight-line code that compiles into one graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from learners.products import TORCH, Products

EPSILON = 1e-5  # added to the variance by layer normalisation


class Pass(Protocol):
    """One evaluation of a group of networks, kept until its gradients are taken."""

    @property
    def output(self) -> Tensor:
        """(networks, batch, outputs), float32 where products are in bfloat16."""

    @property
    def features(self) -> Tensor:
        """(networks, batch, width): the input of the last layer."""

    def first(self, rows: int) -> Pass:
        """This pass over the first `rows` of the batch alone."""

    def parameter_gradient(self, grad: Tensor, into: Any) -> None:
        """Overwrites `into`, views of a flat gradient as `Network.views` gives them; `grad` is that of the output."""

    def input_gradient(self, grad: Tensor, *, start: int) -> Tensor:
        """Gradient (batch, inputs − start) of the columns of x from `start` on, summed over networks; none of a parameter."""


class Network(Protocol):
    """A group of networks of one shape over one flat tensor of parameters."""

    @property
    def networks(self) -> int: ...

    @property
    def outputs(self) -> int: ...

    @property
    def size(self) -> int:
        """Parameters of the whole group."""

    def initial(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters (size,), float32 on the CPU."""

    def views(self, flat: Tensor) -> Any:
        """`flat` (size,) as `__call__` and `Pass.parameter_gradient` take it, sharing its memory."""

    def members(self, flat: Tensor, chosen: slice) -> list[Tensor]:
        """Views of every parameter of the networks `chosen` alone."""

    def select(self, views: Any, chosen: Tensor) -> tuple[Network, Any]:
        """A group of the networks `chosen` (count,) int64 alone, and copies of their parameters as views of it."""

    def with_outputs(self, outputs: int) -> Network:
        """The same networks with another number of outputs. Only the last layer differs, and it is the end of the flat tensor."""

    def last_layer(self, flat: Tensor) -> Layer:
        """Views of the last layer's parameters."""

    def named(self, group: str, flat: Tensor) -> dict[str, Tensor]:
        """Views of every parameter by the names that actors read: `<group>.<layer>.weight` (networks, inputs, outputs), …"""

    def __call__(self, views: Any, x: Tensor, frames: Tensor | None = None, *, gradient: bool = True) -> Pass:
        """Evaluates every network on `x`, (batch, inputs) or one for each network (networks, batch, inputs).

        With `gradient` False no parameter's gradient will be asked for, so nothing is kept for an encoder's.

        `frames` (batch, channels, height, width) uint8 go through an encoder, where the network has one.
        """


class Layer(NamedTuple):
    """Views of one affine layer of all networks of a group: y = x @ weight + bias, normalised and scaled where it has a scale."""

    weight: Tensor  # (networks, inputs, outputs)
    bias: Tensor  # (networks, 1, outputs)
    scale: Tensor | None = None  # (networks, 1, outputs)
    shift: Tensor | None = None  # (networks, 1, outputs)


@dataclass(frozen=True)
class Mlp:
    """Shape of a group of `networks` perceptrons with ReLU between their layers, and layer normalisation before it if asked."""

    networks: int
    inputs: int
    hidden: tuple[int, ...]
    outputs: int
    layer_norm: bool = False
    products: Products = TORCH

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        return list(pairwise((self.inputs, *self.hidden, self.outputs)))

    @property
    def size(self) -> int:
        affine = sum((inputs + 1) * outputs for inputs, outputs in self.widths)
        return self.networks * (affine + (2 * sum(self.hidden) if self.layer_norm else 0))

    def views(self, flat: Tensor) -> list[Layer]:
        """Layer by layer: all networks' weights side by side, then biases, scales and shifts."""
        if flat.shape != (self.size,):
            raise ValueError(f"expected a flat tensor of shape ({self.size},) for {self}, got {tuple(flat.shape)}")
        layers, at = [], 0

        def take(*shape: int) -> Tensor:
            nonlocal at
            count = math.prod(shape)
            at += count
            return flat[at - count : at].view(shape)

        for i, (inputs, outputs) in enumerate(self.widths):
            weight, bias = take(self.networks, inputs, outputs), take(self.networks, 1, outputs)
            if self.layer_norm and i < len(self.hidden):
                layers.append(Layer(weight, bias, take(self.networks, 1, outputs), take(self.networks, 1, outputs)))
            else:
                layers.append(Layer(weight, bias))
        return layers

    def members(self, flat: Tensor, chosen: slice) -> list[Tensor]:
        return [view[chosen] for layer in self.views(flat) for view in layer if view is not None]

    def with_outputs(self, outputs: int) -> Mlp:
        return replace(self, outputs=outputs)

    def last_layer(self, flat: Tensor) -> Layer:
        return self.views(flat)[-1]

    def named(self, group: str, flat: Tensor) -> dict[str, Tensor]:
        return {
            f"{group}.{i}.{name}": view
            for i, layer in enumerate(self.views(flat))
            for name, view in layer._asdict().items()
            if view is not None
        }

    def select(self, views: Sequence[Layer], chosen: Tensor) -> tuple[Mlp, list[Layer]]:
        layers = []
        for weight, bias, *affine in views:
            scale, shift = (None if view is None else view.index_select(0, chosen) for view in affine)
            layers.append(Layer(weight.index_select(0, chosen), bias.index_select(0, chosen), scale, shift))
        return replace(self, networks=len(chosen)), layers

    def initial(self, generator: torch.Generator) -> Tensor:
        """Weights and biases uniform within ±1/√inputs, as torch.nn.Linear draws them; scales 1, shifts 0."""
        flat = torch.empty(self.size)
        for layer, (inputs, _) in zip(self.views(flat), self.widths, strict=True):
            bound = 1.0 / math.sqrt(inputs)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
            if layer.scale is not None and layer.shift is not None:
                layer.scale.fill_(1.0)
                layer.shift.zero_()
        return flat

    def __call__(
        self, views: Sequence[Layer], x: Tensor, frames: Tensor | None = None, *, gradient: bool = True
    ) -> MlpPass:
        x = x.to(views[0].weight.dtype)  # bfloat16 parameters: products in bfloat16
        if x.dim() == 2:
            x = x.expand(self.networks, *x.shape)
        values, normalised = [x], []
        for layer in views[:-1]:
            if layer.scale is None or layer.shift is None:
                values.append(self.products.affine(values[-1], layer.weight, layer.bias, relu=True))
                continue
            y = self.products.affine(values[-1], layer.weight, layer.bias, relu=False)
            centred, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], None, None, EPSILON)
            normalised.append((y, centred, mean, rstd))
            values.append(torch.addcmul(layer.shift, centred, layer.scale).relu_())
        last = views[-1]
        values.append(self.products.affine(values[-1], last.weight, last.bias, relu=False))
        return MlpPass(self, views, values, normalised)


@dataclass(frozen=True)
class MlpPass:
    """`values` holds the input of every layer, each (networks, batch, width), and last the outputs."""

    mlp: Mlp
    layers: Sequence[Layer]
    values: list[Tensor]
    normalised: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # per hidden layer: before, after, mean, 1 / deviation

    @property
    def output(self) -> Tensor:
        return _full(self.values[-1])

    @property
    def features(self) -> Tensor:
        return _full(self.values[-2])

    def first(self, rows: int) -> MlpPass:
        """This pass over the first `rows` of the batch alone."""
        normalised = [(y[:, :rows], c[:, :rows], m[:, :rows], r[:, :rows]) for y, c, m, r in self.normalised]
        return MlpPass(self.mlp, self.layers, [value[:, :rows] for value in self.values], normalised)

    def parameter_gradient(self, grad: Tensor, into: Sequence[Layer]) -> None:
        grad = grad.to(self.values[-1].dtype)
        for i in reversed(range(len(self.layers))):
            self.mlp.products.weight_gradient(self.values[i], grad, into[i].weight)
            torch.sum(grad, 1, keepdim=True, dtype=into[i].bias.dtype, out=into[i].bias)
            if i > 0:
                grad = self._below(i, grad, into[i - 1])

    def input_gradient(self, grad: Tensor, *, start: int) -> Tensor:
        return self.inputs_gradient(grad, start=start).sum(0)

    def inputs_gradient(self, grad: Tensor, *, start: int) -> Tensor:
        """`input_gradient` for each network apart, (networks, batch, inputs − start)."""
        grad = grad.to(self.values[-1].dtype)
        for i in reversed(range(1, len(self.layers))):
            grad = self._below(i, grad, None)
        return _full(self.mlp.products.input_gradient(grad, self.layers[0].weight[:, start:]))

    def _below(self, i: int, grad: Tensor, into: Layer | None) -> Tensor:
        """Gradient behind layer i − 1's product, given that behind layer i's; fills its scale and shift in `into`."""
        grad = self.mlp.products.input_gradient(grad, self.layers[i].weight)
        torch.ops.aten.threshold_backward.grad_input(grad, self.values[i], 0.0, grad_input=grad)
        if not self.normalised:
            return grad
        y, centred, mean, rstd = self.normalised[i - 1]
        scale = self.layers[i - 1].scale
        assert scale is not None
        if into is not None:
            torch.sum(grad * centred, 1, keepdim=True, dtype=into.bias.dtype, out=into.scale)
            torch.sum(grad, 1, keepdim=True, dtype=into.bias.dtype, out=into.shift)
        scaled = grad * scale
        below: Tensor = torch.ops.aten.native_layer_norm_backward(
            scaled, y, y.shape[-1:], mean, rstd, None, None, [True, False, False]
        )[0]
        return below


def _full(values: Tensor) -> Tensor:
    """Losses are computed in float32 at least, whatever the products' type."""
    return values.float() if values.dtype == torch.bfloat16 else values
