"""What goes from a shard that leaves to the shards that take its rows over, and how they take it in (`replay.handover`).

A DoPut stream {"receive": name} is answered with the number of the last part applied; then each part with its own number.
A part is applied once: its rows are committed as a writer's batch is, and what tables know of them is set again when it
comes again. Metadata `close` ends the hand-over on this shard.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .copies import TableCopy
from .faults import fault
from .layout import Layout
from .schema import SchemaError
from .security import check_batch, check_schema, read_chunks
from .wire import CLOSE, MAX_BYTES, MAX_ROWS, SEQUENCE, column, values

if TYPE_CHECKING:
    from .shard import Shard

_HEAD = struct.Struct("<qqqq")


@dataclass(frozen=True)
class Part:
    """Rows that follow one another in a lane, n of them, behind the one before them.

    sequence: number of the part on this way, from 0 on.
    lane: number of the lane on this way; a new one ends the lane before.
    continues: whether rows of the lane were in the part before.
    first_index: place of the first row in its episode, for a lane that begins with it.
    rows: structured (n + 1,); the first one is the one before, or void where the lane begins here.
    tables: what each knows of all n + 1 rows: the one before becomes an item only now.
    """

    sequence: int
    lane: int
    continues: bool
    first_index: int
    rows: np.ndarray
    tables: Mapping[str, TableCopy]

    def pack(self, schema: pa.Schema) -> tuple[pa.RecordBatch, bytes]:
        """The part as a batch of `part_schema` and its metadata."""
        count = len(self.rows)
        columns = [column(schema.field("row").type, self.rows.view(np.uint8), count)]
        for table in self.tables.values():
            priority = np.zeros(count) if table.priority is None else table.priority
            times = np.zeros(count, np.int32) if table.times_sampled is None else table.times_sampled
            columns += [pa.array(table.member.astype(np.uint8)), pa.array(priority), pa.array(times)]
        head = _HEAD.pack(self.sequence, self.lane, self.continues, self.first_index)
        return pa.RecordBatch.from_arrays(columns, schema=schema), head

    @classmethod
    def unpack(
        cls, batch: pa.RecordBatch | None, metadata: pa.Buffer | None, layout: Layout, schema: pa.Schema
    ) -> Part:
        """What `pack` packed.

        Raises:
            SchemaError: it is no such batch.
        """
        row, *known = check_batch(batch, schema, max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
        if len(row) < 2 or metadata is None or metadata.size != _HEAD.size:
            raise SchemaError(f"expected 2 rows or more and {_HEAD.size} bytes of metadata, received {len(row)} rows")
        sequence, lane, continues, first_index = _HEAD.unpack(metadata)
        if min(sequence, lane, first_index) < 0:
            raise SchemaError(f"expected numbers from 0 on, received {(sequence, lane, first_index)}")
        tables = {}
        for place, spec in enumerate(layout.tables):
            member, priority, times = (each.to_numpy() for each in known[3 * place : 3 * place + 3])
            if not (np.isfinite(priority) & (priority >= 0.0)).all():
                raise SchemaError("expected priorities that are finite and ≥ 0")
            tables[spec.name] = TableCopy(
                member != 0,
                priority if spec.keeps_priorities else None,
                times if spec.max_times_sampled is not None else None,
            )
        rows = values(row).reshape(-1).view(layout.schema.dtype)
        return cls(sequence, lane, bool(continues), first_index, rows, tables)


def part_schema(layout: Layout) -> pa.Schema:
    """Arrow schema of parts: packed rows, and three columns for each table; the layout of the rows in its metadata."""
    known = layout.schema.arrow()
    fields = [known.field("row")]
    for spec in layout.tables:
        fields += [
            pa.field(f"{spec.name}.member", pa.uint8()),
            pa.field(f"{spec.name}.priority", pa.float64()),
            pa.field(f"{spec.name}.times_sampled", pa.int32()),
        ]
    return pa.schema(fields, metadata=known.metadata)


def receive(shard: Shard, name: str, reader: Any, writer: Any) -> None:
    """Take in what a shard that leaves hands over on a DoPut stream.

    Raises:
        SchemaError: a part does not fit; nothing of it was applied.
        WriterClosedError: this shard leaves itself.
    """
    expected = part_schema(shard.layout)
    check_schema(reader.schema, expected)
    writer.write(SEQUENCE.pack(shard.begin_receiving(name)))
    for chunk in read_chunks(reader):
        if chunk.data is None:
            if chunk.app_metadata.to_pybytes() == CLOSE:
                shard.end_receiving(name)
            return
        part = Part.unpack(chunk.data, chunk.app_metadata, shard.layout, expected)
        shard.receive(name, part)
        fault("handover.received")
        writer.write(SEQUENCE.pack(part.sequence))
