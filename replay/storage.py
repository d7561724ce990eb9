"""Steps as packed rows in a pool of segments that lanes fill and that are recycled, oldest first.

A lane (one environment of one actor) writes its steps in time order into a segment of its own and takes the next one from
the pool when that is full. Rows of a lane are therefore neighbours, but where a segment ends: a link leads to the lane's
next one. A *row number* is a place in the storage. A row is *linked* when its successor in the episode is written; the
linked rows at a table's stride are its *items*.

Everything lies in one block of memory, which a shard maps from a file: what was committed is there after a crash
(`replay.kernels` says how).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import append_kernels, faults, kernels, read_kernels
from .kernels import NONE
from .layout import MAX_WRITERS, NAME_BYTES, Layout, read_header, read_plan, write_plan
from .schema import SchemaError


class StorageError(RuntimeError):
    """A storage file does not hold what its shard expects."""


Changed = Callable[[np.ndarray, np.ndarray], None]


class SegmentStorage:
    """The rows of one shard. Not thread-safe: the shard holds a lock."""

    def __init__(
        self,
        layout: Layout,
        *,
        memory: np.ndarray | None = None,
        recover: bool = False,
        history: int = 0,
        changed: Changed = lambda gone, new: None,
    ) -> None:
        """
        memory: uint8 (≥ layout.size,) to keep everything in, zeros unless `recover`; None takes ordinary memory.
        recover: `memory` is that of a shard that has died.
        history: rows before an item, of its episode, without which it is no item: what its frames are stacked from.
        changed: called with the rows that are items no longer and those that have become items, both int64 (n,), as
            row · 256 + flags: the flags they had, or have. A row may be in both lists; what it is now, its flags tell.
            Without the bit LINKED, a new row was to be an item and is none: frames before it are gone, or it is itself.

        Raises:
            StorageError: what is to be recovered is no storage, or one of another layout.
        """
        self.layout = layout
        self.history = history
        self._changed = changed
        memory = np.zeros(layout.size, np.uint8) if memory is None else memory[: layout.size]
        self._memory = memory
        arrays = layout.carve(memory)
        self.arrays = arrays
        self.state, self.flags = arrays["state"], arrays["flags"]
        self.packed, self.large = arrays["packed"], arrays["large"]
        self._segments, self._lanes, self._writers = arrays["segments"], arrays["lanes"], arrays["writers"]
        self._names = arrays["names"]
        schema = layout.schema
        self.rows = self.packed.reshape(-1).view(schema.packed)  # structured (rows,)
        self._row_words = schema.dtype.itemsize // 8
        self._first_byte = int(schema.dtype.fields["is_first"][1])  # type: ignore[index]
        self._last_byte = int(schema.dtype.fields["is_last"][1])  # type: ignore[index]
        self._strides = np.array([table.stride for table in layout.tables], np.int64)
        self._dense = bool((self._strides == 1).all())
        self._sparse = any(table.drops_early for table in layout.tables)
        self._words = self.packed.view(np.uint64)
        self._large_words = self.large.view(np.uint64)
        self._mark = np.full(layout.segments, NONE, np.int64)
        self._scratch = np.zeros((3, layout.segments), np.int64)
        self._stamp = 1
        self._gone = np.empty(64 * (layout.segment_steps + history), np.int64)
        self._fault = np.array(faults.wanted(kernels.FAULTS), np.int64)
        if recover:
            self._recover(memory)
        else:
            self._segments[kernels.FILL] = 0
            self._segments[kernels.NEXT :] = NONE
            self._lanes[:] = NONE
            layout.write_header(memory, uuid.uuid4().hex)
        header = read_header(memory)
        assert header is not None
        self.identity = str(header["identity"])
        lanes = int(self.state[kernels.LANES])
        self._free_lanes = [lane for lane in range(lanes) if self._lanes[kernels.WRITER, lane] == NONE]
        self._writing = int(np.count_nonzero(self._lanes[kernels.SEGMENT, :lanes] != NONE))

    def _recover(self, memory: np.ndarray) -> None:
        header = read_header(memory)
        if header is None:
            raise StorageError("the file is no replay storage")
        if Layout.from_json(header) != self.layout:
            raise StorageError(f"the file has another layout: expected {self.layout}, found {Layout.from_json(header)}")
        found = append_kernels.replay_journal(
            self.packed,
            self.flags,
            self.state,
            self._segments,
            self._lanes,
            self._writers,
            self.arrays["journal"],
            self._strides,
            self._first_byte,
            self._last_byte,
            self.history,
            np.empty(self.layout.rows + self.history, np.int64),
        )
        if found < 0:
            raise StorageError("the checksum of the journal's last record is wrong: the file is damaged")
        owners = self._segments[kernels.OWNER]
        owned = np.flatnonzero(owners != NONE)
        owners[owned[self._lanes[kernels.SEGMENT, owners[owned]] != owned]] = NONE
        if self.history:
            append_kernels.drop_unstackable(self.packed, self.flags, self._segments, self._first_byte, self.history)

    # ---------------------------------------------------------------- writers

    def find_writers(self) -> dict[str, tuple[int, bool]]:
        """(slot, open) of every writer that is known, by name."""
        state = self._writers[kernels.WRITER_STATE]
        return {
            self._names[slot].decode(): (int(slot), bool(state[slot] != kernels.WRITER_CLOSED))
            for slot in np.flatnonzero(state != kernels.WRITER_FREE)
        }

    def is_receiving(self, slot: int) -> bool:
        """Whether a writer's rows are those of another shard."""
        return bool(self._writers[kernels.WRITER_STATE, slot] == kernels.WRITER_RECEIVING)

    def open_writer(self, name: str, *, receiving: bool = False) -> int:
        """A slot for a new writer. Where none is free, that of the writer closed first is forgotten.

        receiving: its rows are those that another shard hands over, which count as received and not as inserted.

        Raises:
            SchemaError: too many writers are open, or the name is too long.
        """
        encoded = name.encode()
        if len(encoded) > NAME_BYTES:
            raise SchemaError(f"expected a writer's name of at most {NAME_BYTES} bytes, received {len(encoded)}")
        state, closed = self._writers[kernels.WRITER_STATE], self._writers[kernels.PARTIAL]
        free = np.flatnonzero(state == kernels.WRITER_FREE)
        if len(free):
            slot = int(free[0])
        else:
            old = np.flatnonzero(state == kernels.WRITER_CLOSED)
            if not len(old):
                raise SchemaError(f"{MAX_WRITERS} writers are open, as many as a shard can hold")
            slot = int(old[np.argmin(closed[old])])
            state[slot] = kernels.WRITER_FREE
        self._names[slot] = encoded
        self._writers[kernels.SEQUENCE_DONE, slot] = NONE
        self._writers[kernels.PARTIAL, slot] = 0
        state[slot] = kernels.WRITER_RECEIVING if receiving else kernels.WRITER_OPEN
        return slot

    def last_sequence(self, slot: int) -> int:
        """Sequence number of the last batch of a writer that is applied in full; −1 for none."""
        return int(self._writers[kernels.SEQUENCE_DONE, slot])

    def lanes_of(self, slot: int) -> dict[int, int]:
        """A writer's own lane number → lane of the storage."""
        lanes = np.flatnonzero(self._lanes[kernels.WRITER, : self.state[kernels.LANES]] == slot)
        return dict(zip(self._lanes[kernels.NUMBER, lanes].tolist(), lanes.tolist(), strict=True))

    def is_newest(self, slot: int, sequence: int) -> bool:
        """Whether a writer's batch is applied in full, and nothing of a later one."""
        return self.last_sequence(slot) == sequence and self._writers[kernels.PARTIAL, slot] == 0

    def coming_items(self, lanes: Iterable[int]) -> np.ndarray:
        """Items of each table that lanes' newest rows were counted as, and will not be if they end now; int64 (tables,)."""
        counts = np.zeros(len(self._strides), np.int64)
        for lane in lanes:
            if self._open_row(lane) != NONE:
                counts += self._lanes[kernels.INDEX, lane] % self._strides == 0
        return counts

    def close_writer(self, slot: int) -> int:
        """End a writer and its lanes. Returns how many episodes were cut, each by a row that will now never be an item."""
        cut = sum(self.close_lane(lane) for lane in self.lanes_of(slot).values())
        self.state[kernels.CLOSED_WRITERS] += 1
        self._writers[kernels.PARTIAL, slot] = self.state[kernels.CLOSED_WRITERS]  # how long ago, in closings
        self._writers[kernels.WRITER_STATE, slot] = kernels.WRITER_CLOSED
        return cut

    def reopen_writer(self, slot: int) -> None:
        """Let a closed writer go on, with new lanes and the numbers it had."""
        self._writers[kernels.PARTIAL, slot] = 0  # of a closed writer it is something else
        self._writers[kernels.WRITER_STATE, slot] = kernels.WRITER_OPEN

    def forget_writer(self, slot: int) -> None:
        """Make a closed writer's slot free."""
        self._writers[kernels.WRITER_STATE, slot] = kernels.WRITER_FREE

    # ------------------------------------------------------------------ lanes

    def check_lanes(self, count: int) -> None:
        """
        Raises:
            SchemaError: with `count` more there would be as many lanes as segments: none would be left to recycle.
        """
        lanes = int(self.state[kernels.LANES]) - len(self._free_lanes) + count
        if lanes > self.layout.segments - 1:
            raise SchemaError(
                f"{lanes} lanes write to a shard of {self.layout.segments} segments, which must be fewer than its "
                "segments; raise replay.capacity or lower replay.segment_steps"
            )

    def open_lane(self, slot: int, number: int) -> int:
        """A lane for a writer's lane `number`.

        Raises:
            SchemaError: there are as many lanes as segments: none would be left to recycle.
        """
        self.check_lanes(1)
        if self._free_lanes:
            lane = self._free_lanes.pop()
        else:
            lane = int(self.state[kernels.LANES])
            self.state[kernels.LANES] = lane + 1
        self._lanes[kernels.NEWEST : kernels.INDEX + 1, lane] = NONE
        self._lanes[kernels.NUMBER, lane] = number
        self._lanes[kernels.WRITER, lane] = slot
        return lane

    def close_lane(self, lane: int) -> bool:
        """End a lane: its newest row becomes the last of a truncated episode, its action and reward void.

        Returns whether a row was changed so, and will now never be an item.
        """
        newest, segment = self._open_row(lane), int(self._lanes[kernels.SEGMENT, lane])
        cut = newest != NONE
        if cut:
            row = self.rows[newest]
            row["is_last"], row["is_terminal"], row["reward"] = True, False, 0.0
            row["action"] = 0
        self._lanes[kernels.NEWEST : kernels.INDEX + 1, lane] = NONE
        if segment != NONE:
            self._segments[kernels.OWNER, segment] = NONE  # after a crash in between, `_recover` does it
        self._lanes[kernels.WRITER, lane] = NONE
        self._free_lanes.append(lane)
        return cut

    def has_open_episode(self, lanes: np.ndarray) -> np.ndarray:
        """Whether the newest row of each lane ends no episode: bool (n,) for int64 (n,), False where that is NONE."""
        newest, segment = self._lanes[kernels.NEWEST, lanes], self._lanes[kernels.SEGMENT, lanes]
        here = newest // self.layout.segment_steps
        # As `open_row`: recycled after a crash, before the lane had written to its new segment.
        there = (here == segment) | (self._segments[kernels.NEXT, here] == segment)
        found: np.ndarray = (lanes != NONE) & (newest != NONE) & there & (self.packed[newest, self._last_byte] == 0)
        return found

    def _open_row(self, lane: int) -> int:
        """The newest row of a lane, unless it ends an episode or is gone: then NONE."""
        steps = self.layout.segment_steps
        return int(append_kernels.open_row(lane, self.packed, self._segments, self._lanes, self._last_byte, steps))

    # ---------------------------------------------------------------- writing

    def count_items(self, slot: int, sequence: int, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Items of each table that rows not yet applied will make, sooner or later; int64 (tables,).

        Raises:
            SchemaError: a row begins an episode before the one before it in its lane has ended, or more rows of the batch
                are applied than there are; nothing changed.
        """
        begin = self.applied(slot, sequence, len(rows))
        index, seen, stamps = self._scratch
        first, last = rows["is_first"].view(np.uint8), rows["is_last"].view(np.uint8)
        count, wrong = append_kernels.count_open(
            first, last, lanes, begin, self.packed, self._segments, self._lanes, self._last_byte, stamps, self._stamp
        )
        self._stamp += len(rows)
        if wrong != NONE:
            raise SchemaError(
                f"expected is_last before is_first in every lane; row {wrong} of the batch begins an episode, and the row "
                f"before it in its lane (number {self._lanes[kernels.NUMBER, lanes[wrong]]}) ended none"
            )
        if self._dense:
            return np.full(len(self._strides), count, np.int64)
        counts = np.zeros(len(self._strides), np.int64)
        source = rows.view(np.uint8).reshape(len(rows), -1)
        append_kernels.count_items(
            source, lanes, begin, self._lanes, self._strides, index, seen, self._first_byte, self._last_byte, counts
        )
        return counts

    def applied(self, slot: int, sequence: int, count: int) -> int:
        """Rows of a writer's batch of `count` that are applied already: a crash may have come in the middle of it.

        Raises:
            SchemaError: it was a longer batch then.
        """
        following = self._writers[kernels.SEQUENCE_DONE, slot] + 1 == sequence
        done = int(self._writers[kernels.PARTIAL, slot]) if following else 0
        if 0 < done >= count:
            raise SchemaError(
                f"of batch {sequence} {done} rows are applied already and some were left, received {count} rows; send it "
                "again as it was"
            )
        return done

    def append(self, slot: int, sequence: int, lanes: np.ndarray, rows: np.ndarray) -> None:
        """Write and commit a writer's batch, what is applied of it already left out.

        lanes: int64 (n,) lanes of the storage; rows: structured (n,) of the schema's dtype, contiguous, those of one lane in
        time order.

        Raises:
            SchemaError: the rows have another layout, or more of the batch's rows are applied than there are.
        """
        if rows.dtype != self.layout.schema.dtype:
            raise SchemaError(f"rows have the layout {rows.dtype}, the table's schema is {self.layout.schema.dtype}")
        n = len(rows)
        done = self.applied(slot, sequence, n)
        if n == 0:
            self._writers[kernels.SEQUENCE_DONE, slot] = sequence
            return
        source = np.ascontiguousarray(rows).view(np.uint64).reshape(n, self._row_words)
        new = np.empty(n, np.int64)
        while True:
            done, news, gones = append_kernels.append(
                source,
                lanes,
                done,
                slot,
                sequence,
                self._words,
                self._large_words,
                self.packed,
                self.flags,
                self.state,
                self._segments,
                self._lanes,
                self._writers,
                self.arrays["journal"],
                self._strides,
                self._mark,
                self._first_byte,
                self._last_byte,
                self.history,
                self._sparse,
                new,
                self._gone,
                self._fault,
            )
            if done < 0:
                faults.die()
            self._changed(self._gone[:gones], new[:news])
            self.told()
            if done == n:
                return

    def told(self) -> None:
        """The tables know of all changes until now."""
        self.state[kernels.TOLD] = self.state[kernels.TAKEN]

    def untold_rows(self) -> np.ndarray:
        """Rows of segments of whose taking a crash kept the tables from knowing; int64 (n,).

        What tables keep for them is that of the rows before.
        """
        segments = np.flatnonzero(self._segments[kernels.SEQUENCE] >= self.state[kernels.TOLD])
        rows: np.ndarray = (
            segments[:, None] * self.layout.segment_steps + np.arange(self.layout.segment_steps)
        ).ravel()
        return rows

    def begin_index(self, lane: int, index: int) -> bool:
        """Let a lane begin with row `index` of an episode. Returns whether it has no rows; else nothing is done."""
        empty = bool(self._lanes[kernels.NEWEST, lane] == NONE)
        if empty:
            self._lanes[kernels.INDEX, lane] = index - 1
        return empty

    def received(self, table: int, *, less: int) -> None:
        """Some of the rows that were handed over were no items of a table."""
        self.state[kernels.RECEIVED + table] -= less

    def drop(self, rows: np.ndarray, table: int) -> None:
        """Rows, int64 (n,), are no items of a table any more."""
        self.flags[rows] &= np.uint8(0xFF ^ 2 << table)

    # ---------------------------------------------------------------- leaving

    @property
    def leaving(self) -> int:
        """0: the shard serves; 1: it leaves its service; 2: it has left."""
        return int(self.state[kernels.LEAVING])

    @leaving.setter
    def leaving(self, phase: int) -> None:
        self.state[kernels.LEAVING] = phase

    @property
    def plan(self) -> dict[str, Any] | None:
        """What a shard that leaves has planned; it is set once."""
        return read_plan(self._memory)

    @plan.setter
    def plan(self, plan: dict[str, Any]) -> None:
        write_plan(self._memory, plan)

    # ---------------------------------------------------------------- reading

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Whole rows, structured (n,), of neighbouring ones or of row numbers, int64 (n,)."""
        packed, large = self.packed[rows], self.large[rows]
        found = np.empty(len(packed), self.layout.schema.dtype)
        raw = found.view(np.uint8).reshape(len(packed), -1)
        raw[:, : packed.shape[1]], raw[:, packed.shape[1] :] = packed, large
        return found

    def newest(self, lane: int, count: int) -> np.ndarray:
        """Rows of a lane's newest `count` steps, in time order; NONE for those that are not there. int64 (count,)."""
        row, found = int(self._lanes[kernels.NEWEST, lane]), []
        while count > 0:
            segment, offset = divmod(row, self.layout.segment_steps)
            here = min(offset + 1, count)
            found.append(np.arange(row - here + 1, row + 1))
            count -= here
            previous = int(self._segments[kernels.PREVIOUS, segment])
            if previous == NONE or self._segments[kernels.NEXT, previous] != segment:
                found.append(np.full(count, NONE))
                break
            row = (previous + 1) * self.layout.segment_steps - 1
        return np.concatenate(found[::-1])

    @property
    def free_rows(self) -> int:
        """Rows in segments that no lane has taken yet."""
        return (self.layout.segments - min(self.taken, self.layout.segments)) * self.layout.segment_steps

    @property
    def rows_in_use(self) -> int:
        """Row numbers below this one may be items."""
        return min(self.taken, self.layout.segments) * self.layout.segment_steps

    @property
    def taken(self) -> int:
        """Segments taken over the storage's life; the sequence number of the next."""
        return int(self.state[kernels.TAKEN])

    def inserted(self, table: int) -> int:
        """Items of a table inserted over its life."""
        return int(self.state[kernels.INSERTED + table])

    def item_ids(self, rows: np.ndarray) -> np.ndarray:
        """Stable ids of rows, int64 (n,): no id is given out twice, also when its place in the storage is recycled."""
        ids = np.empty(len(rows), np.int64)
        read_kernels.item_ids(rows, self.layout.segment_steps, self._segments, ids)
        return ids

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows of stable ids, int64 (n,); NONE where the row has been overwritten."""
        rows = np.empty(len(ids), np.int64)
        read_kernels.rows_of(ids, self.layout.segment_steps, self._segments, rows)
        return rows
