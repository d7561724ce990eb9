"""Rows of other shards into a storage: a copy into an empty one, and the parts that a shard which leaves hands over.

The caller holds the shard's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from . import kernels
from .copies import SegmentCopy, TableCopy
from .kernels import NONE
from .receiving import Part
from .schema import SchemaError
from .storage import SegmentStorage
from .tables import Table


def restore(
    storage: SegmentStorage, tables: Mapping[str, Table], header: Mapping[str, Any], segments: Iterator[SegmentCopy]
) -> None:
    """Fill an empty storage from a copy, every lane closed, and take over its counters."""
    slot = storage.open_writer("restored")
    lane_of: dict[int, int] = {}  # number of the next segment of a lane → lane
    last: dict[int, Any] = {}
    number = 0
    for sequence, copied in enumerate(segments):
        assert copied.rows is not None
        lane = lane_of.pop(copied.sequence, NONE)
        if lane == NONE:
            lane, number = storage.open_lane(slot, number), number + 1
        _restore_segment(storage, tables, slot, sequence, lane, copied, last)
        if copied.following == NONE:
            storage.close_lane(lane)
        else:
            lane_of[copied.following] = lane
    storage.close_writer(slot)  # lanes whose next segment was recycled while the copy was made
    storage.forget_writer(slot)
    state = storage.state
    for place, (name, table) in enumerate(tables.items()):
        known = header["tables"].get(name, {}).get("counters") or {**header["counters"]}
        inserted, received = int(known["inserted"]), known.get("received")
        if received is None:  # the copy does not tell them apart
            inserted, received = max(inserted, table.items), 0
        state[kernels.INSERTED + place] = inserted
        state[kernels.RECEIVED + place] = max(int(received), table.items - inserted)
        state[kernels.SAMPLED + place] = int(known["sampled"])


def _restore_segment(
    storage: SegmentStorage,
    tables: Mapping[str, Table],
    slot: int,
    sequence: int,
    lane: int,
    copied: SegmentCopy,
    last: dict[int, Any],
) -> None:
    """Append a segment to a lane; `last` keeps what tables knew of each lane's newest row, which is no item yet."""
    rows = copied.rows
    assert rows is not None
    lanes = storage.arrays["lanes"]
    if copied.index is not None and len(copied.index):
        storage.begin_index(lane, int(copied.index[0]))  # the lane's earlier steps are gone
    before = int(lanes[kernels.NEWEST, lane])
    storage.append(slot, sequence, np.full(len(rows), lane, np.int64), np.ascontiguousarray(rows))
    if before != NONE and lane in last:
        _restore_tables(storage, tables, np.array([before]), last.pop(lane))
    _restore_tables(storage, tables, storage.newest(lane, len(rows)), copied.tables)
    last[lane] = {name: known.rows(slice(-1, None)) for name, known in copied.tables.items()}


def _restore_tables(
    storage: SegmentStorage, tables: Mapping[str, Table], rows: np.ndarray, known: Mapping[str, TableCopy]
) -> None:
    """Make of those rows, int64 (n,), that are items what a copy told of them; NONE among them are left out."""
    for name, table in tables.items():
        if name in known:
            here = (rows != NONE) & (storage.flags[rows] & table.bit != 0)
            copied = known[name].rows(here)
            table.restore(rows[here], copied.member, copied.priority, copied.times_sampled)


class Receiver:
    """Takes in what other shards hand over, each under a name of its own."""

    def __init__(self, storage: SegmentStorage, tables: Mapping[str, Table]) -> None:
        self._storage = storage
        self._tables = tables
        # Those that a crash has cut short go on.
        self._slots = {
            name: slot
            for name, (slot, is_open) in storage.find_writers().items()
            if is_open and storage.is_receiving(slot)
        }

    @property
    def names(self) -> list[str]:
        """Of hand-overs that have not ended."""
        return list(self._slots)

    def begin(self, name: str) -> int:
        """Returns the number of the last part applied, −1 for none; also of a hand-over that has ended."""
        slot, _ = self._storage.find_writers().get(name, (NONE, False))
        if slot == NONE:
            slot = self._slots[name] = self._storage.open_writer(name, receiving=True)
        return self._storage.last_sequence(slot)

    def end(self, name: str) -> bool:
        """End the lanes. Returns whether there was such a hand-over that had not ended."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._storage.close_writer(slot)
        return slot is not None

    def apply(self, name: str, part: Part) -> None:
        """Apply a part once; what tables know of its rows is set again if it comes again.

        Raises:
            SchemaError: the hand-over was not begun, or there are too few segments for its lane.
        """
        slot, storage, tables = self._slots.get(name), self._storage, list(self._tables.values())
        if slot is None:
            raise SchemaError(f"expected a hand-over that was begun and has not ended, received a part of {name!r}")
        last = storage.last_sequence(slot)
        if part.sequence < last:
            return
        rows, lane = np.ascontiguousarray(part.rows[1:]), self._lane(slot, part)
        done = storage.applied(slot, part.sequence, len(rows)) if part.sequence > last else len(rows)
        before = [(table.items, table.received) for table in tables]
        for table in tables:
            table.quiet = True
        try:
            if part.sequence > last:
                storage.append(slot, part.sequence, np.full(len(rows), lane, np.int64), rows)
            # Also of a part that comes again: a crash may have come between.
            _restore_tables(storage, self._tables, storage.newest(lane, len(part.rows)), part.tables)
        finally:
            for table in tables:
                table.quiet = False
        if done < len(rows):
            self._count(part, done, before)

    def _count(self, part: Part, done: int, before: Sequence[tuple[int, int]]) -> None:
        """Count items that came with the rows of a part from `done` on, and tell the limiters what left for them."""
        for place, (table, (items, received)) in enumerate(zip(self._tables.values(), before, strict=True)):
            # A row becomes an item with the one behind it: the one before the part's rows does, its last one not yet.
            came = int(np.count_nonzero(part.tables[table.spec.name].member[done:-1]))
            self._storage.received(place, less=table.received - received - came)
            if deleted := items + came - table.items:
                table.limiter.deleted(deleted)

    def _lane(self, slot: int, part: Part) -> int:
        """The lane of a part; those before it on its way end."""
        lanes = self._storage.lanes_of(slot)
        lane = lanes.pop(part.lane, None)
        for other in lanes.values():
            self._storage.close_lane(other)
        if lane is None:
            lane = self._storage.open_lane(slot, part.lane)
        if self._storage.begin_index(lane, part.first_index):
            # Where this shard has lost the parts before with its storage, the row before is not here.
            for table in part.tables.values():
                table.member[0] = False
        return lane
