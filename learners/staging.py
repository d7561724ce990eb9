"""From sampled windows to the tensors of an update, in one buffer; numpy until the copy to the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.algorithms import AlgorithmSettings
from learners.observations import ObservationVector, channels_first, frame_field, frame_shape
from learners.trained import Reduce
from replay.schema import Field, SchemaError, StepSchema, WindowBatch


@dataclass(frozen=True)
class Share:
    """One learner's place among several that update together.

    Random numbers are drawn for the whole batch by every learner, from the same seed, and each takes its own rows: so N
    learners compute what one does on their batches together.
    """

    rank: int = 0
    count: int = 1
    mean: Reduce | None = field(default=None, compare=False)  # makes a gradient the mean over all learners, in place

    def rows(self, drawn: Tensor, dim: int) -> Tensor:
        """This learner's part of what was drawn for all, along `dim`."""
        if self.count == 1:
            return drawn
        size = drawn.shape[dim] // self.count
        return drawn.narrow(dim, self.rank * size, size)


ALONE = Share()


class Batch(NamedTuple):
    """What one update reads, on the learner's device; float32 but for frames and discrete actions."""

    observation: Tensor  # (2 * batch, observation_dim): at the windows' starts, then after their last transitions
    frames: Tensor | None  # (2 * batch, channels, height, width) uint8, where the networks see frames
    action: Tensor  # (batch, steps * action_dim) in [-1, 1], or (batch,) int64: the number of the action sequence
    reward: Tensor  # (batch,): discounted sum over the window
    discount: Tensor  # (batch,): gamma^length, or 0 where the window ends in a terminal state
    weight: Tensor | None  # (batch,): of each window's loss; None where all are 1


class Staging:
    """Makes the batches of `updates` updates of one sampled batch of windows. For one thread at a time."""

    def __init__(
        self,
        schema: StepSchema,
        settings: AlgorithmSettings,
        *,
        batch_size: int,
        updates: int,
        stack: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        share: Share = ALONE,
    ) -> None:
        self._schema = schema
        self._settings = settings
        self._batch_size = batch_size
        self._updates = updates
        self._share = share
        self._device = device
        self._dtype = dtype
        self._numbers = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self.frame_field: Field | None = frame_field(schema, settings.encoder)
        self._vector = ObservationVector(schema, without=self.frame_field, stack=stack)
        self.observation_dim = self._vector.size
        self.frame_shape = None
        if self.frame_field is not None:
            self.frame_shape = frame_shape(self.frame_field, stack if self.frame_field in schema.large else 1)
        self.choices = schema.action.choices
        self.action_dim = int(np.prod(schema.action.shape, dtype=np.int64))
        self._is_chunk = settings.target.kind in ("chunk", "decoupled")
        self.action_steps = settings.target.length if self._is_chunk else 1
        self._generator = np.random.default_rng(seed)
        length = settings.target.length
        # Row k holds gamma^0 … gamma^(k-1), then zeros: multiplied with a window of length k it leaves the return.
        powers = settings.discount ** np.arange(length + 1)
        rows = np.broadcast_to(powers[:-1], (length + 1, length))
        self._return_weights = np.tril(rows, -1).astype(self._numbers)
        self._bootstrap = powers.astype(self._numbers)  # gamma^k by window length k

    def __call__(self, windows: WindowBatch, weights: np.ndarray | None = None) -> list[Batch]:
        """One batch for each update; `weights` (updates * batch,) are importance weights.

        Raises SchemaError when the windows are not this learner's: other fields, batch size or number of steps.
        """
        count, steps = self._updates * self._batch_size, windows.steps
        expected = (count, self._settings.target.length + 1)
        names = set(self._schema.packed.names or ()) - (
            {f.name for f in self._schema.observations} if windows.ends is not None else set()
        )
        if steps.shape != expected or not names <= set(steps.dtype.names or ()):
            raise SchemaError(
                f"expected windows of shape {expected} with {self._schema}, got {steps.shape} with {steps.dtype}; "
                "the table must serve windows of algorithm.target.length and batches of learners.batch_size"
            )
        rows, length = np.arange(count), windows.length
        last = steps[rows, length]
        ended = last["is_terminal"]
        first, after = (steps[:, 0], last) if windows.ends is None else (windows.ends[:, 0], windows.ends[:, 1])
        weight = self._weights(length, ended, weights)
        discrete = self.choices > 0
        widths = {
            "observation": 2 * self.observation_dim,
            "action": 0 if discrete else self.action_steps * self.action_dim,
            "reward": 1,
            "discount": 1,
            "weight": 0 if weight is None else 1,
        }
        cuda = self._device.type == "cuda"
        packed = torch.empty(
            (self._updates, self._batch_size * sum(widths.values())), dtype=self._dtype, pin_memory=cuda
        )
        host, parts, at = packed.numpy(), {}, 0
        for name, width in widths.items():
            parts[name] = slice(at, at + width * self._batch_size)
            at += width * self._batch_size

        action = self._actions(steps, length)
        reward, discount = self._returns(steps, length, ended)
        for u in range(self._updates):
            mine = slice(u * self._batch_size, (u + 1) * self._batch_size)
            row = host[u]
            both = row[parts["observation"]].reshape(2 * self._batch_size, -1)
            self._vector.write(self._observed(windows, first, mine, at_end=False), both[: self._batch_size])
            self._vector.write(self._observed(windows, after, mine, at_end=True), both[self._batch_size :])
            if not discrete:
                row[parts["action"]].reshape(self._batch_size, -1)[:] = action[mine]
            row[parts["reward"]] = reward[mine]
            row[parts["discount"]] = discount[mine]
            if weight is not None:
                row[parts["weight"]] = weight[mine]
        frames = self._frames(windows, first, after)
        numbers = torch.from_numpy(action) if discrete else None
        if cuda:
            packed = packed.to(self._device, non_blocking=True)
            frames = None if frames is None else frames.pin_memory().to(self._device, non_blocking=True)
            numbers = None if numbers is None else numbers.pin_memory().to(self._device, non_blocking=True)
        return [self._batch(packed[u], parts, u, frames, numbers, weight is not None) for u in range(self._updates)]

    def observed(self, observation: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """Vector (n, observation_dim) and frames of observation fields (n, *shape), frames (n, stack, *shape), on the device."""
        count = len(next(iter(observation.values())))
        vector = np.empty((count, self.observation_dim), np.float32)
        self._vector.write(observation, vector)
        frames = None
        if self.frame_field is not None:
            found = channels_first(self.frame_field, observation[self.frame_field.name])
            frames = torch.from_numpy(np.ascontiguousarray(found)).to(self._device)
        return torch.from_numpy(vector).to(self._device, self._dtype), frames

    def _batch(
        self,
        packed: Tensor,
        parts: dict[str, slice],
        u: int,
        frames: Tensor | None,
        numbers: Tensor | None,
        weighted: bool,
    ) -> Batch:
        mine = slice(u * self._batch_size, (u + 1) * self._batch_size)
        return Batch(
            packed[parts["observation"]].view(2 * self._batch_size, -1),
            None if frames is None else frames[u],
            packed[parts["action"]].view(self._batch_size, -1) if numbers is None else numbers[mine],
            packed[parts["reward"]],
            packed[parts["discount"]],
            packed[parts["weight"]] if weighted else None,
        )

    def _weights(self, length: np.ndarray, ended: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
        """A chunk that a time limit cut short has no value as a chunk: its weight is 0 (Li et al. 2025, §4)."""
        if not self._is_chunk or self._settings.target.length == 1:
            return weights
        whole: np.ndarray = (length == self._settings.target.length) | ended
        return whole.astype(self._numbers) if weights is None else np.multiply(whole, weights, dtype=self._numbers)

    def _returns(self, steps: np.ndarray, length: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if steps.shape[1] == 2:
            reward = steps["reward"][:, 0]
        else:
            reward = np.einsum("bi,bi->b", steps["reward"][:, :-1], self._return_weights[length])
        return reward, self._bootstrap[length] * ~ended

    def _actions(self, steps: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Actions (windows, steps * action_dim), or numbers (windows,) of sequences of discrete actions.

        Those missing behind a terminal state are drawn at random: anything continues a finished episode.
        """
        if self.action_steps == 1:
            action = steps["action"][:, 0]
            return action if self.choices else action.reshape(len(steps), -1)
        actions = steps["action"][:, : self.action_steps]
        missing = np.arange(self.action_steps) >= length[:, None]
        shape = (self._updates, self._batch_size * self._share.count, self.action_steps, *self._schema.action.shape)
        if self.choices:
            drawn: np.ndarray = self._generator.integers(self.choices, size=shape)
        else:
            drawn = self._generator.uniform(-1.0, 1.0, shape)
        begin = self._share.rank * self._batch_size
        drawn = drawn[:, begin : begin + self._batch_size].reshape(actions.shape)
        played = np.where(missing.reshape(*missing.shape, *(1 for _ in self._schema.action.shape)), drawn, actions)
        if self.choices:
            places = self.choices ** np.arange(self.action_steps - 1, -1, -1)
            numbers: np.ndarray = played.reshape(len(steps), -1) @ places
            return numbers
        return played.reshape(len(steps), -1)

    def _frames(self, windows: WindowBatch, first: np.ndarray, after: np.ndarray) -> Tensor | None:
        """(updates, 2 * batch, channels, height, width)"""
        field = self.frame_field
        if field is None or self.frame_shape is None:
            return None
        size, shape = self._batch_size, self.frame_shape
        frames = torch.empty((self._updates, 2, size, *shape), dtype=torch.uint8)
        host = frames.numpy()
        if field.name in windows.frames:
            start, end = _stacks(windows, field.name, at_end=False), _stacks(windows, field.name, at_end=True)
        else:
            start, end = first[field.name], after[field.name]
        host[:, 0] = channels_first(field, start).reshape(self._updates, size, *shape)
        host[:, 1] = channels_first(field, end).reshape(self._updates, size, *shape)
        return frames.flatten(1, 2)

    def _observed(
        self, windows: WindowBatch, rows: np.ndarray, mine: slice, *, at_end: bool
    ) -> Mapping[str, np.ndarray] | np.ndarray:
        """Observation fields of the windows `mine`; large ones, which lie apart, are among them where no encoder sees them."""
        apart = [name for name in windows.frames if self.frame_field is None or name != self.frame_field.name]
        if not apart:
            return rows[mine]
        small = {name: rows[name][mine] for name in rows.dtype.names or ()}
        return small | {name: _stacks(windows, name, at_end=at_end)[mine] for name in apart}


def _stacks(windows: WindowBatch, name: str, *, at_end: bool) -> np.ndarray:
    """Stacked frames (windows, stack, *shape) at the windows' starts or ends."""
    held = windows.frames[name]  # (windows, rows or 2, stack, *shape)
    if not at_end:
        return held[:, 0]
    columns = windows.length if windows.ends is None else np.ones_like(windows.length)
    found: np.ndarray = held[np.arange(len(held)), columns]
    return found
