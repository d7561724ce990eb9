"""Observation fields as networks see them: one float32 vector, and frames apart, for learner and actor alike (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from replay.schema import Field, SchemaError, StepSchema

BYTE_SCALE = np.float32(1.0 / 255.0)
SMALLEST_FRAME = 7  # pixels; smaller fields of bytes are no pictures


class ObservationVector:
    """The observation fields of a schema, in its order, as columns of one float32 matrix; uint8 fields become [0, 1]."""

    def __init__(self, schema: StepSchema, *, without: Field | None = None, stack: int = 1) -> None:
        """`without` is a field that is no column, because an encoder sees it; large fields come in stacks of `stack`."""
        self._columns: list[tuple[str, slice, bool]] = []
        at = 0
        for field in schema.observations:
            if without is not None and field.name == without.name:
                continue
            width = int(np.prod(field.shape, dtype=np.int64)) * (stack if field in schema.large else 1)
            self._columns.append((field.name, slice(at, at + width), field.dtype == "uint8"))
            at += width
        self.size = at

    def write(self, source: Mapping[str, np.ndarray] | np.ndarray, out: np.ndarray) -> None:
        """Fills `out` (batch, size) float32 from `source`: arrays (batch, *shape) by field name, or packed rows (batch,)."""
        for name, columns, is_bytes in self._columns:
            try:
                values = source[name]
            except (KeyError, ValueError):
                held = source.dtype.names if isinstance(source, np.ndarray) else list(source)
                raise SchemaError(f"expected the observation field {name!r}, got only {held}") from None
            values = values.reshape(len(out), -1)
            if is_bytes:
                np.multiply(values, BYTE_SCALE, out=out[:, columns])
            else:
                out[:, columns] = values


def frame_field(schema: StepSchema, encoder: str) -> Field | None:
    """The field that an encoder sees as a picture: the first of bytes with a height and a width. None for encoder `none`."""
    if encoder == "none":
        return None
    for field in schema.observations:
        if field.dtype == "uint8" and len(field.shape) in (2, 3) and min(_picture(field.shape)[1:]) >= SMALLEST_FRAME:
            return field
    return None


def frame_shape(field: Field, stack: int) -> tuple[int, int, int]:
    """(channels, height, width) of `stack` frames of a field."""
    channels, height, width = _picture(field.shape)
    return stack * channels, height, width


def channels_first(field: Field, frames: np.ndarray) -> np.ndarray:
    """(batch, channels, height, width) of frames (batch, *field.shape) or stacks of them (batch, stack, *field.shape)."""
    if len(field.shape) == 3 and _picture(field.shape) != field.shape:
        frames = np.moveaxis(frames, -1, -3)
    return frames.reshape(len(frames), -1, *frames.shape[-2:])


def _picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width), whether the channels come first, last or not at all; the fewest are channels."""
    if len(shape) == 2:
        return 1, *shape
    if shape[2] < shape[0]:
        return shape[2], shape[0], shape[1]
    return shape[0], shape[1], shape[2]
