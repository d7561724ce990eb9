"""Reading windows out of a storage: by the shard that owns it, or by a reader on its host that has mapped its file.

A reader holds no lock. The shard publishes that it is about to overwrite a segment before it does, so the reader copies
first, then looks whether any segment it has read was taken meanwhile, and asks for other items in place of those.
"""

from __future__ import annotations

import numpy as np

from . import kernels, read_kernels
from .buffers import as_bytes
from .kernels import NONE
from .layout import Layout
from .schema import Field, Window, WindowBatch

_NOTHING = np.empty(0, np.int64)


class WindowReader:
    """Gathers windows of items into a batch's arrays."""

    def __init__(self, layout: Layout, arrays: dict[str, np.ndarray], window: Window) -> None:
        """
        arrays: those of `Layout.carve`.

        Raises:
            SchemaError: frames are to be stacked and the schema has no large fields.
        """
        schema = layout.schema
        window.check(schema)
        self.layout = layout
        self.window = window
        self._state, self._segments = arrays["state"], arrays["segments"]
        self._flags, self._packed, self._large = arrays["flags"], arrays["packed"], arrays["large"]
        self._first_byte = int(schema.dtype.fields["is_first"][1])  # type: ignore[index]
        self._offset = 0 if window.observations == "all" else schema.rest_offset
        self._large_offsets: list[tuple[Field, int]] = [
            (f, int(schema.dtype.fields[f.name][1]) - schema.packed.itemsize)  # type: ignore[index]
            for f in schema.large
        ]
        # Burn-in is cut where frames to stack at its rows are gone, if they are delivered at all.
        self._burn_in_stack = window.stack if window.observations == "all" else 1
        self._observes = window.observations == "ends" or bool(schema.large)
        self._rows = np.empty((0, window.rows), np.int64)
        self._warm = np.empty(0, np.int32)
        self._bad = np.empty(0, np.int64)
        self.distinct = 0  # frames that the last `read` delivered, where each distinct one is delivered once

    @property
    def taken(self) -> int:
        """Number of the next segment that the shard will take: the stamp of items drawn now."""
        return int(self._state[kernels.TAKEN])

    def there(self, rows: np.ndarray, drawn: int) -> np.ndarray:
        """Which rows, int64 (n,), were not overwritten since the draw with this stamp; bool (n,)."""
        found: np.ndarray = self._segments[kernels.SEQUENCE, rows // self.layout.segment_steps] < drawn
        return found

    def read(self, start: np.ndarray, out: WindowBatch, at: int, frames: int = 0, *, drawn: int = NONE) -> np.ndarray:
        """Fill places `at` … of a batch with the windows of items.

        start: int64 (n,) rows. frames: distinct frames that the batch holds already. drawn: the stamp of the draw; NONE
        where the caller holds the shard's lock. Returns the indices into `start` of the windows that were overwritten
        before they were read, whose places hold nothing of use; int64 (few,).
        """
        n = len(start)
        if len(self._rows) != n:
            self._rows = np.empty((n, self.window.rows), np.int64)
            self._warm = np.empty(n, np.int32)
            self._bad = np.empty(3 * n, np.int64)
        rows, taken = self._rows, NONE if drawn == NONE else int(self._state[kernels.TAKEN])
        end = at + n
        bad = read_kernels.read(
            start,
            self.window.burn_in,
            self.window.length,
            self._burn_in_stack,
            self._packed,
            self._flags,
            self._segments,
            self._first_byte,
            self._offset,
            drawn,
            taken,
            rows,
            out.length[at:end],
            self._warm if out.burn_in is None else out.burn_in[at:end],
            out.item[at:end],
            out.raw("steps")[at:end],
            self._bad,
        )
        if self._observes:
            bad = self._read_observations(rows, out, at, frames, taken, bad)
        return np.unique(self._bad[:bad]) if bad else _NOTHING

    def _read_observations(self, rows: np.ndarray, out: WindowBatch, at: int, frames: int, taken: int, bad: int) -> int:
        """The ends, and the large fields. Returns the length of the list of bad windows."""
        n, window, steps = len(rows), self.window, self.layout.segment_steps
        end = at + n
        seen = rows
        if window.observations == "ends":
            column = window.burn_in + out.length[at:end].astype(np.int64)
            seen = np.stack([rows[:, window.burn_in], rows[np.arange(n), column]], axis=1)
        if out.ends is not None:
            read_kernels.gather(self._packed, 0, seen, out.raw("ends")[at:end])
        if not self._large_offsets:
            return bad
        stacked = np.empty((n, window.observed * window.stack), np.int64)
        bad = int(
            read_kernels.stacks(
                seen, window.stack, self._packed, self._segments, self._first_byte, steps, stacked, self._bad, bad
            )
        )
        wanted = stacked
        if out.frame_index is not None:
            distinct, index = np.unique(stacked, return_inverse=True)
            out.frame_index[at:end] = frames + index.reshape(n, window.observed, window.stack)
            wanted = distinct[:, None]
            self.distinct = len(distinct)
        for field, offset in self._large_offsets:
            array = out.frames[field.name]
            target = array[frames : frames + len(wanted)] if out.frame_index is not None else array[at:end]
            read_kernels.gather(self._large, offset, wanted, as_bytes(target, 0).reshape(*wanted.shape, field.nbytes))
        if taken != NONE:
            bad = int(read_kernels.overwritten(stacked, steps, self._segments, NONE, NONE, taken, self._bad, bad))
        return bad
