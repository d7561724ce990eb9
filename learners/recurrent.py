"""A gated recurrent layer behind an embedding of the observation, unrolled over sequences, with its gradients.

Cho et al. 2014 (arXiv 1406.1078), in the form and with the gate order of torch.nn.GRU: reset r, update z, new n,

    r = σ(W_r x + b_r + U_r h + c_r),  z = σ(W_z x + b_z + U_z h + c_z),
    n = tanh(W_n x + b_n + r (U_n h + c_n)),  h' = n + z (h − n).

The products with x are one for all steps; only those with h are made step by step. The backward pass is written out likewise:
it collects the gradients before the gates of every step, and what remains is one product for each matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learners.networks import Network, Pass


class GruLayer(NamedTuple):
    """Views of a layer's parameters, the three gates side by side."""

    weight_input: Tensor  # (inputs, 3 * units): W
    weight_state: Tensor  # (units, 3 * units): U
    bias_input: Tensor  # (3 * units,): b
    bias_state: Tensor  # (3 * units,): c


class _Gates(NamedTuple):
    """What one step leaves for its gradient, each (batch, units)."""

    before: Tensor  # h
    reset: Tensor
    update: Tensor
    new: Tensor
    recalled: Tensor  # U_n h + c_n


@dataclass(frozen=True)
class Gru:
    """Shape of a gated recurrent layer."""

    inputs: int
    units: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters, in the order of `GruLayer`."""
        gates = 3 * self.units
        return [(self.inputs, gates), (self.units, gates), (gates,), (gates,)]

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, flat: Tensor) -> GruLayer:
        """The parameters in `flat` (size,)."""
        parts = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        return GruLayer(*(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)))

    def initial(self, generator: torch.Generator) -> Tensor:
        """Parameters (size,) uniform within ±1/√units, as torch.nn.GRU draws them."""
        bound = 1.0 / math.sqrt(self.units)
        return torch.empty(self.size).uniform_(-bound, bound, generator=generator)

    def __call__(self, layer: GruLayer, x: Tensor, state: Tensor) -> GruPass:
        """Unrolls over `x` (steps, batch, inputs) from `state` (batch, units)."""
        of_input = x @ layer.weight_input + layer.bias_input
        states, gates = [], []
        for i in range(len(x)):
            state, kept = _step(layer, of_input[i], state)
            states.append(state)
            gates.append(kept)
        return GruPass(layer, x, torch.stack(states), gates)

    def warmed(self, layer: GruLayer, x: Tensor, state: Tensor, is_real: Tensor) -> Tensor:
        """State (batch, units) after those steps of `x` (steps, batch, inputs) where `is_real` (steps, batch, 1)."""
        of_input = x @ layer.weight_input + layer.bias_input
        for i in range(len(x)):
            state = torch.where(is_real[i], _step(layer, of_input[i], state)[0], state)
        return state


@dataclass(frozen=True)
class GruPass:
    """One unrolled evaluation, kept until its gradient is taken."""

    layer: GruLayer
    x: Tensor  # (steps, batch, inputs)
    states: Tensor  # (steps, batch, units): after each step
    gates: list[_Gates]

    def gradient(self, of_states: Tensor, into: GruLayer) -> Tensor:
        """Gradient (steps, batch, inputs) of x, given that of the first `steps` states (steps, batch, units).

        Overwrites `into`, views of a flat gradient. The initial state gets none: it is data.
        """
        steps = len(of_states)
        of_input: list[Tensor] = []  # of each step's W x + b, last step first
        of_recalled: list[Tensor] = []  # of the rest of U h + c, which differs in the new gate alone
        carried = torch.zeros_like(of_states[0])
        for i in reversed(range(steps)):
            before, reset, update, new, recalled = self.gates[i]
            of_state = of_states[i] + carried
            of_new = of_state * (1.0 - update) * (1.0 - new.square())
            of_update = of_state * (before - new) * update * (1.0 - update)
            of_reset = of_new * recalled * reset * (1.0 - reset)
            both = torch.cat((of_reset, of_update), -1)
            of_input.append(torch.cat((both, of_new), -1))
            of_recalled.append(torch.cat((both, of_new * reset), -1))
            carried = of_state * update + of_recalled[-1] @ self.layer.weight_state.mT
        x_side = torch.stack(of_input[::-1])  # (steps, batch, 3 * units)
        h_side = torch.stack(of_recalled[::-1]).flatten(0, 1)
        before_all = torch.stack([gates.before for gates in self.gates[:steps]]).flatten(0, 1)
        rows = x_side.flatten(0, 1)
        torch.mm(self.x[:steps].flatten(0, 1).mT, rows, out=into.weight_input)
        torch.mm(before_all.mT, h_side, out=into.weight_state)
        torch.sum(rows, 0, out=into.bias_input)
        torch.sum(h_side, 0, out=into.bias_state)
        return x_side @ self.layer.weight_input.mT


def _step(layer: GruLayer, of_input: Tensor, state: Tensor) -> tuple[Tensor, _Gates]:
    """State after a step, given W x + b (batch, 3 * units) and the state before it."""
    units = state.shape[-1]
    of_state = torch.addmm(layer.bias_state, state, layer.weight_state)
    reset, update = torch.sigmoid(of_input[:, : 2 * units] + of_state[:, : 2 * units]).chunk(2, -1)
    recalled = of_state[:, 2 * units :]
    new = torch.tanh(of_input[:, 2 * units :] + reset * recalled)
    return new + update * (state - new), _Gates(state, reset, update, new, recalled)


class TrunkViews(NamedTuple):
    """Views of a flat tensor of parameters of a `Trunk`."""

    embed: Any
    gru: GruLayer


@dataclass(frozen=True)
class Trunk:
    """Observation to recurrent state: an embedding (a group of one network, and ReLU), then a gated recurrent layer."""

    embed: Network
    gru: Gru

    @property
    def size(self) -> int:
        """Parameters."""
        return self.embed.size + self.gru.size

    def initial(self, generator: torch.Generator) -> Tensor:
        """Fresh parameters (size,), float32 on the CPU."""
        return torch.cat((self.embed.initial(generator), self.gru.initial(generator)))

    def views(self, flat: Tensor) -> TrunkViews:
        """`flat` (size,) as `__call__` and `TrunkPass.parameter_gradient` take it, sharing its memory."""
        return TrunkViews(self.embed.views(flat[: self.embed.size]), self.gru.views(flat[self.embed.size :]))

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of every parameter by the names that actors read: `embed.<layer>.weight`, `recurrent.weight_input`, …"""
        layer = self.gru.views(flat[self.embed.size :])
        recurrent = {f"recurrent.{name}": view for name, view in layer._asdict().items()}
        return self.embed.named("embed", flat[: self.embed.size]) | recurrent

    def __call__(self, views: TrunkViews, x: Tensor, frames: Tensor | None, state: Tensor) -> TrunkPass:
        """Unrolls over observations `x` (steps, batch, inputs) from `state` (batch, units).

        `frames` (steps * batch, channels, height, width) uint8 are for an encoder in the embedding.
        """
        made, seen = self._embedded(views, x, frames)
        return TrunkPass(made, self.gru(views.gru, seen, state))

    def warmed(self, views: TrunkViews, x: Tensor, frames: Tensor | None, state: Tensor, is_real: Tensor) -> Tensor:
        """State (batch, units) after those steps of `x` where `is_real` (steps, batch, 1): the burn-in, without a gradient."""
        if not len(x):
            return state
        return self.gru.warmed(views.gru, self._embedded(views, x, frames)[1], state, is_real)

    def _embedded(self, views: TrunkViews, x: Tensor, frames: Tensor | None) -> tuple[Pass, Tensor]:
        """The embedding's pass, and what the recurrent layer sees of it (steps, batch, width)."""
        made = self.embed(views.embed, x.flatten(0, 1), frames)
        return made, torch.relu(made.output[0]).view(*x.shape[:2], -1)


@dataclass(frozen=True)
class TrunkPass:
    """One unrolled evaluation of a trunk, kept until its gradient is taken."""

    made: Pass
    unrolled: GruPass

    @property
    def states(self) -> Tensor:
        """(steps, batch, units), after each step."""
        return self.unrolled.states

    def parameter_gradient(self, of_states: Tensor, into: TrunkViews) -> None:
        """Overwrites `into`, views of a flat gradient, given the gradient (steps, batch, units) of the first states."""
        of_seen = self.unrolled.gradient(of_states, into.gru)
        of_output = (of_seen * (self.unrolled.x[: len(of_states)] > 0)).flatten(0, 1)
        self.made.first(len(of_output)).parameter_gradient(of_output.unsqueeze(0), into.embed)
