"""Batched multilayer perceptrons whose parameters are one flat tensor.

A group of networks of one shape is one float32 vector and named views of it, so an optimiser step, a Polyak step, a
checkpoint or a publication is one operator on one tensor. The group is evaluated as one batched matrix product per
layer. The backward pass is written out, in two halves: a loss calls for the half it needs, so no product is computed
that nobody reads, and the whole update is straight-line code that compiles into one graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """Views of one affine layer of all networks of a group: y = x @ weight + bias."""

    weight: Tensor  # (networks, inputs, outputs)
    bias: Tensor  # (networks, 1, outputs)


@dataclass(frozen=True)
class Mlp:
    """Shape of a group of `networks` perceptrons with ReLU between their layers."""

    networks: int
    inputs: int
    hidden: tuple[int, ...]
    outputs: int

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        return list(pairwise((self.inputs, *self.hidden, self.outputs)))

    @property
    def size(self) -> int:
        """Parameters of the whole group."""
        return self.networks * sum((inputs + 1) * outputs for inputs, outputs in self.widths)

    def layers(self, flat: Tensor) -> list[Layer]:
        """Views of `flat` (size,): all networks' weights of a layer side by side, then their biases, layer by layer."""
        if flat.shape != (self.size,):
            raise ValueError(f"expected a flat tensor of shape ({self.size},) for {self}, got {tuple(flat.shape)}")
        layers, at = [], 0
        for inputs, outputs in self.widths:
            weights, biases = self.networks * inputs * outputs, self.networks * outputs
            weight = flat[at : at + weights].view(self.networks, inputs, outputs)
            bias = flat[at + weights : at + weights + biases].view(self.networks, 1, outputs)
            layers.append(Layer(weight, bias))
            at += weights + biases
        return layers

    def initial(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters (size,), on the CPU: uniform within ±1/√inputs, as torch.nn.Linear draws them."""
        flat = torch.empty(self.size)
        for layer, (inputs, _) in zip(self.layers(flat), self.widths, strict=True):
            bound = 1.0 / math.sqrt(inputs)
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
        return flat


def forward(layers: list[Layer], x: Tensor) -> list[Tensor]:
    """All networks at once on the same inputs `x` (batch, inputs).

    Returns the input of every layer, each (networks, batch, width), and last the outputs (networks, batch, outputs):
    what the backward halves need.
    """
    values = [x.expand(layers[0].weight.shape[0], *x.shape)]
    for layer in layers[:-1]:
        values.append(torch.baddbmm(layer.bias, values[-1], layer.weight).relu_())
    last = layers[-1]
    values.append(torch.baddbmm(last.bias, values[-1], last.weight))
    return values


def _below(layer: Layer, value: Tensor, grad: Tensor) -> Tensor:
    """Gradient before the ReLU that made `value`, given `grad` behind the `layer` above it."""
    # With one output the product is an outer one, which broadcasting computes without the call of a matrix product.
    grad = grad * layer.weight.mT if grad.shape[-1] == 1 else torch.bmm(grad, layer.weight.mT)
    torch.ops.aten.threshold_backward.grad_input(grad, value, 0.0, grad_input=grad)
    return grad


def parameter_gradient(layers: list[Layer], values: list[Tensor], grad: Tensor, into: list[Layer]) -> None:
    """Writes the gradient of every parameter to `into` and computes none for the inputs.

    `values` is what `forward` returned, `grad` (networks, batch, outputs) the gradient of the outputs; `into` are views of
    a flat gradient, overwritten.
    """
    for i in reversed(range(len(layers))):
        torch.bmm(values[i].mT, grad, out=into[i].weight)
        torch.sum(grad, 1, keepdim=True, out=into[i].bias)
        if i > 0:
            grad = _below(layers[i], values[i], grad)


def input_gradient(layers: list[Layer], values: list[Tensor], grad: Tensor, *, start: int) -> Tensor:
    """Gradient (batch, inputs − start) of the inputs from column `start` on, summed over networks; none of a parameter.

    Arguments as for `parameter_gradient`.
    """
    for i in reversed(range(1, len(layers))):
        grad = _below(layers[i], values[i], grad)
    return torch.bmm(grad, layers[0].weight[:, start:].mT).sum(0)
