"""Networks as actors evaluate them: numpy alone, so an actor process never imports torch.

At 8 environments (two hidden layers of 256, one thread) numpy takes about half of torch's time per call, at 64 the same; and
importing torch takes 1.3 s and 190 MB more.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from configs.algorithms import HeadSettings
from learners.observations import ObservationVector, channels_first, frame_field, frame_shape
from replay.schema import StepSchema

if TYPE_CHECKING:
    from learners.acting_torch import TorchHead

Floats = NDArray[np.float32]

EPSILON = np.float32(1e-5)  # added to the variance by layer normalisation
MOST_DEVIATIONS = np.float32(10.0)  # to which normalised observations are clipped
EVERY = slice(None)


class Tensors:
    """The named arrays of one publication of weights; each is taken once, and none may be left over."""

    def __init__(self, data: bytes) -> None:
        """Raises ValueError if `data` is no safetensors buffer of float32 arrays."""
        try:
            self._arrays = load(data)
        except SafetensorError as error:
            raise ValueError(
                f"expected policy weights as a safetensors buffer, got {len(data)} bytes: {error}"
            ) from error
        self._shapes = {name: array.shape for name, array in self._arrays.items()}
        wrong = {name: array.dtype.name for name, array in self._arrays.items() if array.dtype != np.float32}
        if wrong:
            raise ValueError(f"expected float32 policy weights, got {wrong}")

    def take(self, name: str, *shape: int | None) -> Floats:
        """The array `name`; None stands for any size. Raises ValueError if there is none of this shape."""
        array = self._arrays.pop(name, None)
        if (
            array is None
            or len(array.shape) != len(shape)
            or any(size not in (None, got) for size, got in zip(shape, array.shape, strict=True))
        ):
            raise self._misfit(f"{name} {tuple('any' if size is None else size for size in shape)}")
        return array

    def optional(self, name: str, *shape: int | None) -> Floats | None:
        """`take`, or None where there is no array of the name."""
        return self.take(name, *shape) if name in self._arrays else None

    def under(self, prefix: str) -> dict[str, Floats]:
        """Takes every array whose name begins with `prefix`, by the rest of its name."""
        found = [name for name in self._arrays if name.startswith(prefix)]
        return {name.removeprefix(prefix): self._arrays.pop(name) for name in found}

    def finish(self) -> None:
        """Raises ValueError if an array was not taken."""
        if self._arrays:
            raise self._misfit(f"nothing like {sorted(self._arrays)}")

    def _misfit(self, expected: str) -> ValueError:
        return ValueError(
            f"expected float32 policy weights with {expected}, got {self._shapes}: actor and learner must have the same "
            "environment and the same settings of the algorithm"
        )


class Encode(Protocol):
    """The encoders of one group of networks."""

    def __call__(self, frames: NDArray[Any] | None, vector: Floats, which: slice) -> Floats:
        """Features (networks, batch, features) that the networks `which` find in frames and observation vector."""


class Encoder(Protocol):
    """What turns an observation into features, in every network that sees frames, or that a user gave an encoder."""

    @property
    def features(self) -> int:
        """Width of what it returns."""

    @property
    def replaced(self) -> int:
        """Columns of the observation vector that its features stand for."""

    def build(self, parameters: Mapping[str, Floats], networks: int) -> Encode:
        """The encoders of a group of networks, from parameters (networks, *shape); raises ValueError if they do not fit."""


class Seen(NamedTuple):
    """An observation as networks take it."""

    vector: Floats  # (batch, size)
    frames: NDArray[Any] | None  # (batch, channels, height, width), where an encoder sees some


class Eyes:
    """Makes what networks see from observation fields, exactly as the learner does."""

    def __init__(self, schema: StepSchema, encoder: str, *, stack: int) -> None:
        self._field = frame_field(schema, encoder)
        self._vector = ObservationVector(schema, without=self._field, stack=stack)
        self._normaliser: tuple[Floats, Floats] | None = None
        self.size = self._vector.size
        self.encoder: Encoder | None = None
        if self._field is not None or encoder not in ("auto", "none"):
            from learners.acting_torch import TorchEncoder

            shape = None
            if self._field is not None:
                shape = frame_shape(self._field, stack if self._field in schema.large else 1)
            self.encoder = TorchEncoder(encoder, shape, self.size)

    def normaliser(self, tensors: Tensors) -> tuple[Floats, Floats] | None:
        """Mean and scale of the observation vector, where the weights hold them."""
        mean = tensors.optional("normaliser.mean", self.size)
        return None if mean is None else (mean, tensors.take("normaliser.scale", self.size))

    def see(self, observation: Mapping[str, NDArray[Any]], normaliser: tuple[Floats, Floats] | None) -> Seen:
        """Observation fields (batch, *shape), those of stacked frames (batch, stack, *shape)."""
        count = len(next(iter(observation.values()), ()))
        vector = np.empty((count, self.size), np.float32)
        self._vector.write(observation, vector)
        if normaliser is not None:
            vector -= normaliser[0]
            vector *= normaliser[1]
            np.clip(vector, -MOST_DEVIATIONS, MOST_DEVIATIONS, out=vector)
        if self._field is None:
            return Seen(vector, None)
        return Seen(vector, channels_first(self._field, observation[self._field.name]))


class _Layer(NamedTuple):
    weight: Floats  # (networks, inputs, outputs)
    bias: Floats  # (networks, 1, outputs)
    scale: Floats | None  # (networks, 1, outputs), of layer normalisation
    shift: Floats | None


class Group:
    """A group of networks of one shape: perceptrons with ReLU between their layers, behind encoders where there are frames."""

    def __init__(
        self,
        tensors: Tensors,
        name: str,
        *,
        networks: int,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int | None,
        encoder: Encoder | None = None,
    ) -> None:
        """Takes the arrays of group `name`.

        Args:
            tensors: the weights.
            name: of the group.
            networks: in the group.
            inputs: of the networks, were there no encoder: the observation vector, then others.
            hidden: widths of the hidden layers; layers whose scale and shift are there are normalised.
            outputs: of each network; None takes what is there.
            encoder: in front of the perceptrons.

        Raises:
            ValueError: an array is missing or has another shape.
        """
        self._encode: Encode | None = None
        if encoder is not None:
            inputs += encoder.features - encoder.replaced
            self._replaced = encoder.replaced
            self._encode = encoder.build(tensors.under(f"{name}.encoder."), networks)
        self._layers: list[_Layer] = []
        for i, (before, after) in enumerate(pairwise((inputs, *hidden, outputs))):
            weight = tensors.take(f"{name}.{i}.weight", networks, before, after)
            width = weight.shape[2]
            self._layers.append(
                _Layer(
                    weight,
                    tensors.take(f"{name}.{i}.bias", networks, 1, width),
                    tensors.optional(f"{name}.{i}.scale", networks, 1, width),
                    tensors.optional(f"{name}.{i}.shift", networks, 1, width),
                )
            )
        self.outputs: int = self._layers[-1].weight.shape[2]

    def inputs(self, seen: Seen, which: slice = EVERY) -> Floats:
        """What the networks `which` take of an observation: features and vector, (batch, …) or (networks, batch, …)."""
        if self._encode is None:
            return seen.vector
        features = self._encode(seen.frames, seen.vector, which)
        rest = seen.vector[:, self._replaced :]
        return np.concatenate((features, np.broadcast_to(rest, (*features.shape[:2], rest.shape[1]))), -1)

    def __call__(self, x: Floats, which: slice = EVERY) -> Floats:
        """Outputs (networks, batch, outputs) of the networks `which` at `x` (batch, inputs) or (networks, batch, inputs)."""
        for layer in self._layers[:-1]:
            x = _affine(x, layer, which)
            if layer.scale is not None and layer.shift is not None:
                x -= x.mean(-1, keepdims=True)
                variance = np.square(x).mean(-1, keepdims=True)
                x *= layer.scale[which] / np.sqrt(variance + EPSILON)
                x += layer.shift[which]
            np.maximum(x, 0.0, out=x)
        return _affine(x, self._layers[-1], which)


def _affine(x: Floats, layer: _Layer, which: slice) -> Floats:
    y: Floats = np.matmul(x, layer.weight[which])
    y += layer.bias[which]
    return y


class Gru:
    """One gated recurrent layer, with the gates in torch.nn.GRU's order: reset, update, new."""

    def __init__(self, tensors: Tensors, *, inputs: int, units: int) -> None:
        """Takes the arrays `recurrent.*`; raises ValueError if they do not fit."""
        self._weight_input = tensors.take("recurrent.weight_input", inputs, 3 * units)
        self._weight_state = tensors.take("recurrent.weight_state", units, 3 * units)
        self._bias_input = tensors.take("recurrent.bias_input", 3 * units)
        self._bias_state = tensors.take("recurrent.bias_state", 3 * units)

    def __call__(self, x: Floats, state: Floats) -> Floats:
        """The state (batch, units) after `x` (batch, inputs), given that before it."""
        of_input = np.split(x @ self._weight_input + self._bias_input, 3, axis=1)
        of_state = np.split(state @ self._weight_state + self._bias_state, 3, axis=1)
        reset = _sigmoid(of_input[0] + of_state[0])
        update = _sigmoid(of_input[1] + of_state[1])
        new = np.tanh(of_input[2] + reset * of_state[2])
        after: Floats = new + update * (state - new)
        return after


def _sigmoid(x: Floats) -> Floats:
    half = np.float32(0.5)
    y: Floats = half + half * np.tanh(half * x)  # never overflows
    return y


def means(logits: Floats) -> Floats:
    """Values (…), up to a shift and a factor that all share, of outputs (…, bins); exact where there is one output.

    The bins of a value head lie evenly, and neither an argmax nor a minimum or mean over networks cares for shift and factor:
    so acting needs no support.
    """
    if logits.shape[-1] == 1:
        return logits[..., 0]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    values: Floats = weights @ np.linspace(-1.0, 1.0, logits.shape[-1], dtype=np.float32)
    values /= weights.sum(-1)
    return values


class Head:
    """The value head of networks that are acted by: which of their outputs stand for a value, and for which."""

    def __init__(self, settings: HeadSettings) -> None:
        """Raises ValueError where the head is a class of the user's and that is no value head."""
        self._settings = settings
        self._own: TorchHead | None = None
        if settings.is_own:
            from learners.acting_torch import TorchHead

            self._own = TorchHead(settings)

    def outputs(self, tensors: Tensors, group: Group, values: int) -> int:
        """Outputs per value of a group with `values` values per network; takes the support. Raises ValueError if misfit."""
        kind, classifies = self._settings.kind, self._settings.classifies
        support = tensors.optional("support", 2)
        bins, rest = divmod(group.outputs, values)
        fits = bins > 1 if classifies else bins == (1 if self._own is None else self._own.outputs)
        if rest or not fits or (support is not None) != classifies:
            raise ValueError(
                f"expected {values} values of a head of kind {kind} in {group.outputs} outputs "
                f"{'with' if classifies else 'without'} a support: actor and learner must have the same algorithm.head"
            )
        return bins

    def values(self, logits: Floats) -> Floats:
        """`means` of outputs (…, outputs), exact where the head is the user's."""
        return means(logits) if self._own is None else self._own.mean(logits)
