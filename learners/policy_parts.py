"""What policies as torch modules are made of: the same parts as those of `learners.acting_networks`, in tensors.

Their parameters are buffers, float32; arithmetic is of the type of the observation vector, so that it can be repeated in
float64 to see how much of a difference is rounding.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.algorithms import HeadSettings, R2d2Settings
from learners.acting_networks import Tensors
from learners.encoders import BUILT_IN, Encoder, make_encoder
from learners.heads import Classification, make_head
from learners.networks import EPSILON
from learners.normaliser import MOST_DEVIATIONS
from learners.observations import BYTE_SCALE, frame_field, frame_shape
from replay.schema import Field, StepSchema


class ActionSpace(NamedTuple):
    """Actions as the environment takes them."""

    shape: tuple[int, ...]  # of one continuous action; () for numbers
    low: NDArray[np.float32]  # (action_dim,): lowest continuous action; empty for numbers
    high: NDArray[np.float32]  # (action_dim,)
    start: int = 0  # number of the first discrete action


class Seen(NamedTuple):
    """An observation as networks take it, and what else a decision depends on."""

    vector: Tensor  # (batch, size); its type is that of all arithmetic behind it
    frames: Tensor | None  # (batch, channels, height, width) uint8
    extra: Tensor | None  # noise (batch, proposals, chunk * action_dim), or recurrent state (batch, units)


class Eyes(nn.Module):
    """Observation fields to vector and frames, as `learners.acting_networks.Eyes`."""

    mean: Tensor | None
    scale: Tensor | None

    def __init__(self, schema: StepSchema, encoder: str, tensors: Tensors, *, stack: int) -> None:
        super().__init__()
        self._fields = schema.observations
        self._stacks = {f.name: stack if f in schema.large else 1 for f in self._fields}
        self._picture = frame_field(schema, encoder)
        self.size = sum(self._width(f) for f in self._fields if f != self._picture)
        self._frame_shape = None
        if self._picture is not None:
            self._frame_shape = frame_shape(self._picture, self._stacks[self._picture.name])
        self.encoder = make_encoder(encoder, frame_shape=self._frame_shape, vector_size=self.size)
        mean = tensors.optional("normaliser.mean", self.size)
        self.register_buffer("mean", None if mean is None else torch.tensor(mean))
        self.register_buffer(
            "scale", None if mean is None else torch.tensor(tensors.take("normaliser.scale", self.size))
        )

    def forward(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        columns, frames = [], None
        for field, values in zip(self._fields, inputs, strict=False):
            if field == self._picture:
                frames = self._channels_first(field, values)
                continue
            column = values.to(dtype).reshape(-1, self._width(field))
            columns.append(column * float(BYTE_SCALE) if field.dtype == "uint8" else column)
        vector = torch.cat(columns, 1) if columns else inputs[0].new_zeros((inputs[0].shape[0], 0), dtype=dtype)
        if self.mean is not None and self.scale is not None:
            vector = (vector - self.mean) * self.scale
            vector = vector.clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        return vector, frames

    def example(self, count: int, generator: np.random.Generator) -> list[Tensor]:
        made, at = [], 0
        for field in self._fields:
            stack = self._stacks[field.name]
            shape = (count, *((stack,) if stack > 1 else ()), *field.shape)
            kind = np.dtype(field.dtype).kind
            if kind == "f":
                values = generator.standard_normal(shape)
                if self.mean is not None and self.scale is not None:
                    columns = slice(at, at + self._width(field))
                    spread = values.reshape(count, -1) / self.scale[columns].numpy() + self.mean[columns].numpy()
                    values = spread.reshape(shape)
                made.append(torch.from_numpy(values.astype(field.dtype)))
            else:
                most = 2 if kind == "b" else 256 if field.dtype == "uint8" else 8
                made.append(torch.from_numpy(generator.integers(most, size=shape).astype(field.dtype)))
            if field != self._picture:
                at += self._width(field)
        return made

    def _width(self, field: Field) -> int:
        return math.prod(field.shape) * self._stacks[field.name]

    def _channels_first(self, field: Field, frames: Tensor) -> Tensor:
        assert self._frame_shape is not None
        if len(field.shape) == 3 and frame_shape(field, 1) != field.shape:
            frames = frames.movedim(-1, -3)
        return frames.reshape(-1, *self._frame_shape)


class Group(nn.Module):
    """A group of networks of one shape, as `learners.acting_networks.Group`."""

    def __init__(
        self,
        tensors: Tensors,
        name: str,
        *,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int | None,
        networks: int = 1,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self._networks, self._encoder = networks, encoder
        self._parameters_of_encoder: list[str] = []
        if encoder is not None:
            inputs += encoder.features - encoder.replaced
            for parameter, array in tensors.under(f"{name}.encoder.").items():
                self._parameters_of_encoder.append(parameter)
                self.register_buffer(_buffer("encoder", parameter), torch.tensor(array))
        self._layers = len(hidden) + 1
        width = 0
        for i, (before, after) in enumerate(pairwise((inputs, *hidden, outputs))):
            weight = tensors.take(f"{name}.{i}.weight", networks, before, after)
            width = weight.shape[2]
            self.register_buffer(_buffer(i, "weight"), torch.tensor(weight))
            self.register_buffer(_buffer(i, "bias"), torch.tensor(tensors.take(f"{name}.{i}.bias", networks, 1, width)))
            for part in ("scale", "shift"):
                affine = tensors.optional(f"{name}.{i}.{part}", networks, 1, width)
                self.register_buffer(_buffer(i, part), None if affine is None else torch.tensor(affine))
        self.outputs = width

    def inputs(self, seen: Seen) -> Tensor:
        """What the networks take of an observation, (networks, batch, …)."""
        vector = seen.vector
        if self._encoder is None:
            return vector.expand(self._networks, -1, -1)
        # Users' modules expect float32, whatever the arithmetic behind them.
        dtype = vector.dtype if self._encoder.name in BUILT_IN else torch.float32
        features = []
        for k in range(self._networks):
            parameters = {
                name: self._part("encoder", name)[k : k + 1].to(dtype) for name in self._parameters_of_encoder
            }
            features.append(self._encoder(1, parameters, seen.frames, vector.to(dtype)))
        rest = vector[:, self._encoder.replaced :].expand(self._networks, -1, -1)
        return torch.cat((torch.cat(features).to(vector.dtype), rest), -1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (networks, batch, outputs) at `x` (networks, batch, inputs)."""
        for i in range(self._layers):
            x = x @ self._part(i, "weight").to(x.dtype) + self._part(i, "bias").to(x.dtype)
            if i + 1 == self._layers:
                break
            if getattr(self, _buffer(i, "scale")) is not None:
                x = nn.functional.layer_norm(x, (x.shape[-1],), eps=EPSILON)
                x = x * self._part(i, "scale").to(x.dtype) + self._part(i, "shift").to(x.dtype)
            x = torch.relu(x)
        return x

    def _part(self, *path: object) -> Tensor:
        part: Tensor = getattr(self, _buffer(*path))
        return part


def _buffer(*path: object) -> str:
    return "/".join(map(str, path)).replace(".", "/")  # torch allows no dots in names of buffers


class Head(nn.Module):
    """Logits (…, outputs) to values (…), as the value head of the learner has them."""

    centres: Tensor | None

    def __init__(self, settings: HeadSettings, tensors: Tensors, group: Group, values: int) -> None:
        super().__init__()
        self.bins = group.outputs // values
        self._own = make_head(settings, None) if settings.is_own else None
        centres = None
        if settings.classifies:
            low, high = map(float, tensors.take("support", 2))
            outside = make_head(settings, (low, high), bins=2).outputs - 2
            head = make_head(settings, (low, high), bins=self.bins - outside)
            assert isinstance(head, Classification)
            centres = head.centres
        self.register_buffer("centres", centres)

    def forward(self, logits: Tensor) -> Tensor:
        if self._own is not None:
            return self._own.mean(logits.float()).to(logits.dtype)
        if self.centres is None:
            return logits.squeeze(-1)
        return torch.softmax(logits, -1) @ self.centres.to(logits.dtype)


class Scale(nn.Module):
    """Chunks (batch, chunk, action_dim) in [−1, 1] to the environment's units and shape."""

    low: Tensor
    high: Tensor

    def __init__(self, space: ActionSpace, chunk: int) -> None:
        super().__init__()
        self._shape = (*((chunk,) if chunk > 1 else ()), *space.shape)
        self._flat = (chunk, len(space.low))
        self.register_buffer("low", torch.tensor(space.low))
        self.register_buffer("high", torch.tensor(space.high))

    def forward(self, action: Tensor) -> Tensor:
        half, middle = (self.high - self.low) / 2, (self.high + self.low) / 2
        return (action * half + middle).float().clamp(self.low, self.high).reshape(-1, *self._shape)

    def distances(self, action: Tensor, others: Tensor) -> Tensor:
        """(batch, n): largest difference of `action`, in the environment's units, from chunks `others` (batch, n, width)."""
        half, middle = (self.high - self.low) / 2, (self.high + self.low) / 2
        in_units = (others.reshape(*others.shape[:2], *self._flat) * half + middle).clamp(self.low, self.high)
        apart = (action.reshape(-1, 1, *self._flat) - in_units).abs() / torch.where(half > 0, half, 1.0)
        return apart.flatten(2).amax(2)


class Trunk(nn.Module):
    """Observation and state to the state after it, as `learners.acting_networks.Gru` behind an embedding."""

    weight_input: Tensor
    weight_state: Tensor
    bias_input: Tensor
    bias_state: Tensor

    def __init__(self, settings: R2d2Settings, tensors: Tensors, size: int, encoder: Encoder | None) -> None:
        super().__init__()
        width, gates = settings.hidden[0], 3 * settings.recurrent
        self.embed = Group(tensors, "embed", inputs=size, hidden=(), outputs=width, encoder=encoder)
        shapes: dict[str, tuple[int, ...]] = {
            "weight_input": (width, gates),
            "weight_state": (settings.recurrent, gates),
            "bias_input": (gates,),
            "bias_state": (gates,),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.tensor(tensors.take(f"recurrent.{name}", *shape)))

    def forward(self, seen: Seen) -> Tensor:
        assert seen.extra is not None
        state, dtype = seen.extra, seen.vector.dtype
        x = torch.relu(self.embed(self.embed.inputs(seen))[0])
        of_input = (x @ self.weight_input.to(dtype) + self.bias_input.to(dtype)).chunk(3, 1)
        of_state = (state @ self.weight_state.to(dtype) + self.bias_state.to(dtype)).chunk(3, 1)
        reset = torch.sigmoid(of_input[0] + of_state[0])
        update = torch.sigmoid(of_input[1] + of_state[1])
        new = torch.tanh(of_input[2] + reset * of_state[2])
        return new + update * (state - new)


def regret(values: Tensor) -> Tensor:
    """What each of `values` (batch, n) lacks to the best, in units of the largest absolute one, and at least 1."""
    lacking: Tensor = (values.amax(1, keepdim=True) - values) / values.abs().amax().clamp(min=1.0)
    return lacking
