"""Steps of a snapshot as one Parquet file: a row for each step, ordinary columns, episodes one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import SCHEMA_KEY, arrow_fields, check_schema, to_columns
from .restore import chains_of
from .schema import StepSchema
from .snapshot import Snapshot

GROUP_ROWS, GROUP_BYTES = 122_880, 128 << 20  # a row group ends with the segment that exceeds one of these


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    steps: int
    episodes: int


def export_parquet(snapshots: Sequence[Snapshot], path: str | Path, *, compression: str = "zstd") -> Exported:
    """Write the steps of a table's shards to `path`, in the memory of a row group.

    Columns: `shard`; `episode`, counted through the file; `step`, the place in the episode (it begins above 0 where the
    episode's first steps had been overwritten); then the fields of the schema, RLDS flags included. A value with a shape
    is a list in C order. Rows of an episode stand together, in time order; an open one has no `is_last` row.

    Raises:
        SnapshotError: a file is damaged.
        SchemaError: the shards' fields differ.
        OSError: the file could not be written; nothing is left of it.
    """
    path, schema = Path(path), snapshots[0].schema
    for snapshot in snapshots:
        check_schema(schema, snapshot.schema, what=f"shard {snapshot.shard}")
        snapshot.verify()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    steps = episodes = 0
    try:
        with pq.ParquetWriter(temporary, _arrow_schema(schema), compression=compression) as writer:
            for table, begun in _groups(snapshots, schema):
                writer.write_table(table, row_group_size=len(table))
                steps, episodes = steps + len(table), begun
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Exported(path, steps, episodes)


def _arrow_schema(schema: StepSchema) -> pa.Schema:
    place = [("shard", pa.int32()), ("episode", pa.int64()), ("step", pa.int64())]
    fields = [pa.field(name, type_, nullable=False) for name, type_ in place]
    return pa.schema([*fields, *arrow_fields(schema)], metadata={SCHEMA_KEY: schema.to_json()})


def _groups(snapshots: Sequence[Snapshot], schema: StepSchema) -> Iterator[tuple[pa.Table, int]]:
    """Row groups, and the episodes begun by their end."""
    arrow = _arrow_schema(schema)
    row_bytes = schema.dtype.itemsize
    waiting: list[pa.RecordBatch] = []
    count = 0
    episode = -1
    for snapshot in snapshots:
        chains = chains_of(snapshot)
        begins = {chain[0] for chain in chains}
        order = [place for chain in chains for place in chain]
        goes_on = False
        for place, copied in zip(order, snapshot.copies(order), strict=True):
            rows, index = copied.rows, copied.index
            assert rows is not None
            assert index is not None
            first = np.empty(len(rows), bool)
            first[0] = place in begins or not goes_on or index[0] == 0
            first[1:] = rows["is_last"][:-1] | (index[1:] == 0)
            episodes = episode + np.cumsum(first)
            episode, goes_on = int(episodes[-1]), not rows["is_last"][-1]
            columns = [
                pa.array(np.full(len(rows), snapshot.shard, np.int32)),
                pa.array(episodes),
                pa.array(np.asarray(index, np.int64)),
                *to_columns(schema, rows),
            ]
            waiting.append(pa.record_batch(columns, schema=arrow))
            count += len(rows)
            if count >= GROUP_ROWS or count * row_bytes >= GROUP_BYTES:
                yield pa.Table.from_batches(waiting, schema=arrow), episode + 1
                waiting, count = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting, schema=arrow), episode + 1
