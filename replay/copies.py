"""A shard's contents as plain data, segment by segment: what snapshots, exports and imports pass around."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .schema import StepSchema

NONE = -1


@dataclass(frozen=True)
class TableCopy:
    """What one table knows of a segment's rows.

    member: bool (n,), which rows are items of the table.
    priority: float64 (n,), or None where the table keeps none.
    times_sampled: int32 (n,), or None where the table counts none.
    """

    member: np.ndarray
    priority: np.ndarray | None = None
    times_sampled: np.ndarray | None = None

    def rows(self, chosen: slice | np.ndarray) -> TableCopy:
        """The same of some of the rows."""
        priority = None if self.priority is None else self.priority[chosen]
        times_sampled = None if self.times_sampled is None else self.times_sampled[chosen]
        return TableCopy(self.member[chosen], priority, times_sampled)


@dataclass(frozen=True)
class SegmentCopy:
    """Neighbouring steps of one lane.

    sequence: number of the segment, greater than those of all segments before it.
    following: number of the segment in which the lane goes on, NONE where it ends here.
    complete: its lane has gone on or is closed: these rows never change again.
    count: rows, n.
    index: int64 (n,), each row's place in its episode.
    rows: structured (n,) with all fields of the schema.
    tables: by table name. A table that is missing takes every transition as an item.

    `index` and `rows` are None where the caller has asked to leave them out.
    """

    sequence: int
    following: int
    complete: bool
    count: int
    index: np.ndarray | None
    rows: np.ndarray | None
    tables: Mapping[str, TableCopy] = field(default_factory=dict)


class Copyable(Protocol):
    """What a snapshot can be made of: a shard, or episodes that are being imported.

    The header is what JSON can hold:
        storage: a name no other storage ever had; segment numbers count within it.
        schema: `StepSchema.to_json()`.
        settings: whatever settings a reader may want to compare.
        counters: whole numbers over the storage's life, `inserted` and `sampled` among them.
        tables: by name, {"settings": …, "counters": …} of each table, as above.
    """

    def copy(self, skip: Set[tuple[int, int]] = frozenset()) -> tuple[dict[str, Any], Iterator[SegmentCopy]]:
        """The header, and the segments, oldest first.

        Rows of segments whose (sequence, count) is in `skip` may be left out.
        """
        ...


class Restorable(Protocol):
    """What a snapshot can be loaded into: an empty shard."""

    schema: StepSchema

    def restore(self, header: dict[str, Any], segments: Iterator[SegmentCopy]) -> None:
        """Take over counters and segments, oldest first; a lane that goes on nowhere is closed."""
        ...
