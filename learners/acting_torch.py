"""The parts of acting that need torch, imported where they are used: encoders, and value heads of users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.algorithms import HeadSettings
from learners.encoders import Encoder, make_encoder
from learners.heads import make_head

Floats = NDArray[np.float32]


class TorchEncoder:
    """An encoder of `learners.encoders`, with arrays for tensors."""

    def __init__(self, name: str, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        """`name` as `algorithm.encoder` has it; raises ValueError as `learners.encoders.Encoder`."""
        encoder = make_encoder(name, frame_shape=frame_shape, vector_size=vector_size)
        if encoder is None:
            raise ValueError(f"expected an encoder, got {name!r} with frames {frame_shape}")
        self._encoder = encoder
        self.features = encoder.features
        self.replaced = encoder.replaced

    def build(self, parameters: Mapping[str, Floats], networks: int) -> GroupEncoder:
        """The encoders of a group of networks, from parameters (networks, *shape); raises ValueError if they do not fit."""
        expected = {name: (networks, *shape) for name, shape in self._encoder.shapes.items()}
        got = {name: array.shape for name, array in parameters.items()}
        if got != expected:
            raise ValueError(
                f"expected encoder weights {expected}, got {got}: actor and learner must have the same environment, "
                "algorithm.encoder and env.stack"
            )
        return GroupEncoder(self._encoder, {name: torch.tensor(array) for name, array in parameters.items()}, networks)


class TorchHead:
    """A value head of `learners.heads`, with arrays for tensors."""

    def __init__(self, settings: HeadSettings) -> None:
        """Raises ValueError where a user's class is no value head."""
        self._head = make_head(settings, None)
        self.outputs = self._head.outputs

    def mean(self, logits: Floats) -> Floats:
        """The values (…) that `logits` (…, outputs) stand for."""
        with torch.inference_mode():
            found: Floats = self._head.mean(torch.from_numpy(logits)).float().numpy()
        return found


class GroupEncoder:
    """The encoders of one group of networks."""

    def __init__(self, encoder: Encoder, parameters: Mapping[str, torch.Tensor], networks: int) -> None:
        self._encoder = encoder
        self._parameters = parameters
        self._networks = networks

    def __call__(self, frames: NDArray[Any] | None, vector: Floats, which: slice) -> Floats:
        """Features (networks, batch, features) that the networks `which` find, as `Encoder.__call__`."""
        networks = len(range(*which.indices(self._networks)))
        parameters = {name: value[which] for name, value in self._parameters.items()}
        with torch.inference_mode():
            seen = None if frames is None else torch.from_numpy(np.ascontiguousarray(frames))
            features = self._encoder(networks, parameters, seen, torch.from_numpy(vector))
        found: Floats = features.float().numpy()
        return found
