"""Flattens the observation fields of a step into one float32 vector, for learner and actor alike (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from replay.schema import SchemaError, StepSchema

BYTE_SCALE = np.float32(1.0 / 255.0)


class ObservationVector:
    """The observation fields of a schema, in its order, as columns of one float32 matrix; uint8 fields become [0, 1]."""

    def __init__(self, schema: StepSchema) -> None:
        self._columns: list[tuple[str, slice, bool]] = []
        at = 0
        for field in schema.observations:
            width = int(np.prod(field.shape, dtype=np.int64))
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
