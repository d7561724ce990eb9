"""From sampled windows with a burn-in to the tensors of a recurrent learner's update; numpy until the copy to the device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.algorithms import R2d2Settings
from learners.observations import ObservationVector, channels_first, frame_field, frame_shape
from learners.policy import STATE
from replay.schema import SchemaError, StepSchema, WindowBatch


class Sequences(NamedTuple):
    """What one update of a recurrent learner reads, on its device; a sequence has S steps to learn from.

    What there is for each step is flat, all sequences' first steps first: step t of sequence b is row t * batch + b. Steps
    beyond the end of an episode repeat the last one before it, and their mask is 0.
    """

    observation: Tensor  # (burn_in + S + 1, batch, observation_dim)
    frames: Tensor | None  # ((burn_in + S + 1) * batch, channels, height, width) uint8, where the networks see frames
    action: Tensor  # (S * batch,) int64
    reward: Tensor  # (S * batch,): discounted sum over the steps of the target
    discount: Tensor  # (S * batch,): gamma^steps, or 0 where they end in a terminal state
    bootstrap: Tensor  # (S * batch,) int64: the row of the state behind these steps, among (S + 1) * batch
    mask: Tensor  # (S * batch,): 1 where there is a step
    is_real: Tensor  # (burn_in, batch, 1) bool: burn-in steps of the same episode
    state: Tensor  # (batch, units): recurrent state before the first real step
    weight: Tensor | None  # (batch,): of each sequence's loss; None where all are 1


class SequenceStaging:
    """Makes the batches of `updates` updates of one sampled batch of windows. For one thread at a time."""

    def __init__(
        self,
        schema: StepSchema,
        settings: R2d2Settings,
        *,
        batch_size: int,
        updates: int,
        stack: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._settings = settings
        self._batch_size = batch_size
        self._updates = updates
        self._device = device
        self._numbers = np.dtype(np.float64 if dtype == torch.float64 else np.float32)
        self._frame_field = frame_field(schema, settings.encoder)
        self._frame_shape = None
        if self._frame_field is not None:
            self._frame_shape = frame_shape(self._frame_field, stack if self._frame_field in schema.large else 1)
        self._vector = ObservationVector(schema, without=self._frame_field, stack=stack)
        self._names = set(schema.packed.names or ()) | {STATE}

    def __call__(self, windows: WindowBatch, weights: np.ndarray | None = None) -> list[Sequences]:
        """One batch for each update; `weights` (updates * batch,) are importance weights.

        Raises SchemaError when the windows are not this learner's: other fields, batch size or number of steps.
        """
        settings, steps = self._settings, windows.steps
        burn_in, length = settings.burn_in, settings.sequence
        expected = (self._updates * self._batch_size, burn_in + length + 1)
        got = set(steps.dtype.names or ())
        state_shape = steps.dtype[STATE].shape if STATE in got else None
        if (
            steps.shape != expected
            or not self._names <= got
            or windows.start != burn_in
            or state_shape != (settings.recurrent,)
        ):
            raise SchemaError(
                f"expected windows of shape {expected} from column {burn_in} on with the fields {sorted(self._names)}, "
                f"{STATE} of {settings.recurrent} numbers; got {steps.shape} from column {windows.start} on with {steps.dtype}; "
                "the table must serve windows of algorithm.burn_in and algorithm.sequence steps, batches of "
                "learners.batch_size, and rows with the recurrent state that actors store"
            )
        targets = self._targets(steps[:, burn_in:], windows.length)
        real = np.zeros(len(steps), np.int32) if windows.burn_in is None else windows.burn_in
        is_real = np.arange(burn_in) >= burn_in - real[:, None]
        return [self._batch(windows, targets, is_real, weights, u) for u in range(self._updates)]

    def _targets(self, steps: np.ndarray, length: NDArray[np.int32]) -> dict[str, np.ndarray]:
        """Parts of every step's target, each (windows, S), from rows (windows, S + 1)."""
        count, most = len(steps), self._settings.sequence
        window, discount = np.arange(count)[:, None], self._settings.discount
        is_step = np.arange(most) < length[:, None]
        step = np.minimum(np.arange(most), length[:, None] - 1)
        after = np.minimum(step + self._settings.target.length, length[:, None])  # fewer steps at a sequence's end
        earned = np.where(is_step, steps["reward"][:, :most], 0.0)
        summed = np.zeros(earned.shape)
        for i in range(min(self._settings.target.length, most)):
            summed[:, : most - i] += discount**i * earned[:, i:]
        goes_on = ~steps["is_terminal"][window, after]
        return {
            "action": steps["action"][window, step],
            "reward": summed[window, step].astype(self._numbers),
            "discount": (discount ** (after - step) * goes_on).astype(self._numbers),
            "after": after,
            "mask": is_step.astype(self._numbers),
        }

    def _batch(
        self,
        windows: WindowBatch,
        targets: dict[str, np.ndarray],
        is_real: np.ndarray,
        weights: np.ndarray | None,
        u: int,
    ) -> Sequences:
        size = self._batch_size
        mine = slice(u * size, (u + 1) * size)
        rows = np.ascontiguousarray(windows.steps[mine].T)  # (rows, batch)
        flat = {name: values[mine].T.reshape(-1) for name, values in targets.items()}
        bootstrap = flat["after"] * size + np.tile(np.arange(size), self._settings.sequence)
        return Sequences(
            self._put(self._observed(windows, rows, mine)),
            self._frames(windows, rows, mine),
            self._put(flat["action"].astype(np.int64)),
            self._put(flat["reward"]),
            self._put(flat["discount"]),
            self._put(bootstrap),
            self._put(flat["mask"]),
            self._put(is_real[mine].T[..., None]),
            # Columns before the first real step repeat its row.
            self._put(rows[0][STATE].astype(self._numbers)),
            None if weights is None else self._put(weights[mine].astype(self._numbers)),
        )

    def _put(self, values: np.ndarray) -> Tensor:
        made = torch.from_numpy(np.ascontiguousarray(values))
        return made.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else made

    def _observed(self, windows: WindowBatch, rows: np.ndarray, mine: slice) -> np.ndarray:
        """Observation vectors (rows, batch, observation_dim); large fields lie apart where no encoder sees them."""
        source = {name: rows[name].reshape(-1, *rows.dtype[name].shape) for name in rows.dtype.names or ()}
        for name, held in windows.frames.items():
            if self._frame_field is None or name != self._frame_field.name:
                stacks = held[mine].swapaxes(0, 1)
                source[name] = stacks.reshape(rows.size, *stacks.shape[2:])
        found = np.empty((rows.size, self._vector.size), self._numbers)
        self._vector.write(source, found)
        return found.reshape(*rows.shape, -1)

    def _frames(self, windows: WindowBatch, rows: np.ndarray, mine: slice) -> Tensor | None:
        field = self._frame_field
        if field is None or self._frame_shape is None:
            return None
        held = windows.frames[field.name][mine].swapaxes(0, 1) if field.name in windows.frames else rows[field.name]
        return self._put(channels_first(field, held.reshape(rows.size, *held.shape[2:])))
