"""Convolutions for frames: those of Mnih et al. 2015 and of Espeholt et al. 2018, as plain torch modules.

Frames come as bytes and become numbers in [0, 1] here, on the device they are on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from learners.modules import FrameShape

SMALLEST = 3  # pixels, of the smallest convolution
SMALLEST_NATURE = 36  # pixels in both directions, below which the strides of Mnih et al. leave nothing


class Nature(nn.Module):
    """The convolutions of Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods.

    Frames (channels, height, width) below 36 pixels in a direction get the smaller ones of Young and Tian 2019, "MinAtar"
    (arXiv 1903.03176). Raises ValueError below 3. Weights and biases are torch's own, uniform within ±1/√inputs.
    """

    def __init__(self, frame_shape: FrameShape, vector_size: int = 0) -> None:
        super().__init__()
        channels = _checked(frame_shape)
        if min(frame_shape[1:]) < SMALLEST_NATURE:
            self.convolutions = nn.Sequential(nn.Conv2d(channels, 16, 3), nn.ReLU())
            features = 128
        else:
            self.convolutions = nn.Sequential(
                nn.Conv2d(channels, 32, 8, stride=4),
                nn.ReLU(),
                nn.Conv2d(32, 64, 4, stride=2),
                nn.ReLU(),
                nn.Conv2d(64, 64, 3),
                nn.ReLU(),
            )
            features = 512
        self.linear = nn.Linear(flat_size(self.convolutions, frame_shape), features)

    def forward(self, frames: Tensor, vector: Tensor | None = None) -> Tensor:
        """Features (batch, 512), or (batch, 128) of small frames, of `frames` (batch, channels, height, width) uint8."""
        y = self.convolutions(_scaled(frames, self.linear.weight))
        return torch.relu(self.linear(y.flatten(1)))


class Impala(nn.Module):
    """The residual convolutions of Espeholt et al. 2018, "IMPALA" (arXiv 1802.01561), Figure 3 right, without the recurrence.

    Three sections of a convolution, a pooling that halves height and width, and two residual blocks, with 16, 32 and 32
    channels times `width`. Raises ValueError below 3 pixels. Weights and biases as those of `Nature`.
    """

    def __init__(self, frame_shape: FrameShape, vector_size: int = 0, *, width: int = 1) -> None:
        super().__init__()
        channels = _checked(frame_shape)
        sections: list[nn.Module] = []
        for depth in (16 * width, 32 * width, 32 * width):
            sections += [
                nn.Conv2d(channels, depth, 3, padding=1),
                nn.MaxPool2d(3, stride=2, padding=1),
                _Residual(depth),
                _Residual(depth),
            ]
            channels = depth
        self.sections = nn.Sequential(*sections, nn.ReLU())
        self.linear = nn.Linear(flat_size(self.sections, frame_shape), 256)

    def forward(self, frames: Tensor, vector: Tensor | None = None) -> Tensor:
        """Features (batch, 256) of `frames` (batch, channels, height, width) uint8."""
        y = self.sections(_scaled(frames, self.linear.weight))
        return torch.relu(self.linear(y.flatten(1)))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + y


def _checked(frame_shape: FrameShape) -> int:
    """The channels of frames that are large enough."""
    channels, height, width = frame_shape
    if channels < 1 or min(height, width) < SMALLEST:
        raise ValueError(
            f"expected frames (channels, height, width) of at least {SMALLEST} × {SMALLEST} pixels, got {frame_shape}"
        )
    return channels


def flat_size(layers: nn.Module, frame_shape: FrameShape) -> int:
    """Numbers that `layers` return for one of `frame_shape`."""
    # On the meta device shapes are computed and nothing else; the layers' parameters stay where they are.
    on_meta = {name: parameter.to("meta") for name, parameter in layers.named_parameters()}
    made: Tensor = functional_call(layers, on_meta, (torch.empty((1, *frame_shape), device="meta"),))
    return made.numel()


def _scaled(frames: Tensor, like: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1], on their own device, of the parameters' type."""
    return frames.to(like.dtype) / 255.0
