"""Arrays that batches of windows are delivered in."""

from __future__ import annotations

import numpy as np

from .schema import StepSchema, Window, WindowBatch


def buffers(schema: StepSchema, window: Window, batch: int) -> WindowBatch:
    """Room for a batch of windows, to be filled again and again."""
    steps = schema.packed if window.observations == "all" else schema.rest
    distinct = window.stack_on_device and bool(schema.large)
    # Windows drawn in place of overwritten ones bring frames of their own, each of a batch once at most.
    frames = (2 * batch + 1) * window.observed * window.stack
    shape = (frames,) if distinct else (batch, window.observed, window.stack)
    return WindowBatch(
        steps=np.zeros((batch, window.rows), steps),
        ends=np.zeros((batch, 2), schema.packed) if window.observations == "ends" else None,
        length=np.zeros(batch, np.int32),
        burn_in=np.zeros(batch, np.int32) if window.burn_in else None,
        item=np.zeros(batch, np.int64),
        shard=np.zeros(batch, np.int32),
        probability=np.zeros(batch, np.float64),
        frames={f.name: np.zeros((*shape, *f.shape), f.dtype) for f in schema.large},
        start=window.burn_in,
        frame_index=np.zeros((batch, window.observed, window.stack), np.int32) if distinct else None,
    )


def as_bytes(array: np.ndarray, ndim: int) -> np.ndarray:
    """A contiguous array as uint8, its first `ndim` axes kept and the others together in one more."""
    shape = array.shape[:ndim]
    width = array.dtype.itemsize * int(np.prod(array.shape[ndim:], dtype=np.int64))
    return array.reshape(-1).view(np.uint8).reshape(*shape, width)
