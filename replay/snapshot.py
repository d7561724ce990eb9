"""A shard's steps as an Arrow IPC file: one ordinary column per field, one record batch per segment.

Any Arrow reader (DuckDB, Polars, pandas) opens it; a fixed shape becomes a FixedSizeList of the flattened values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from .schema import Field, SchemaError, StepSchema
from .shard import Shard

_SEQUENCE, _FOLLOWING = "segment", "next_segment"


def _size(field: Field) -> int:
    return int(np.prod(field.shape, dtype=np.int64))


def _column_type(field: Field) -> pa.DataType:
    value = pa.from_numpy_dtype(np.dtype(field.dtype))
    return pa.list_(value, _size(field)) if field.shape else value


def _arrow_schema(schema: StepSchema, counters: dict[str, int]) -> pa.Schema:
    columns = [pa.field(_SEQUENCE, pa.int64()), pa.field(_FOLLOWING, pa.int64())]
    columns += [pa.field(f.name, _column_type(f)) for f in schema.fields]
    return pa.schema(columns, metadata={"millrace.schema": schema.to_json(), "millrace.counters": json.dumps(counters)})


def _columns(schema: StepSchema, rows: np.ndarray) -> list[pa.Array]:
    columns = []
    for f in schema.fields:
        flat = pa.array(np.ascontiguousarray(rows[f.name]).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, _size(f)) if f.shape else flat)
    return columns


def save(shard: Shard, path: Path) -> dict[str, int]:
    """Write the shard's steps to `path` while it goes on serving. Returns its counters, which the file holds too."""
    counters, segments = shard.copy()
    arrow = _arrow_schema(shard.schema, counters)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, arrow) as writer:
        for sequence, following, rows in segments:
            place = [pa.array(np.full(len(rows), number)) for number in (sequence, following)]
            writer.write_batch(pa.record_batch(place + _columns(shard.schema, rows), schema=arrow))
    return counters


def load(shard: Shard, path: Path) -> dict[str, int]:
    """Fill an empty shard from a file that `save` wrote. Returns the counters it holds.

    Raises:
        SchemaError: the file holds other fields than the shard.
    """
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        metadata = reader.schema.metadata or {}
        saved = StepSchema.from_json(metadata[b"millrace.schema"].decode())
        if saved != shard.schema:
            raise SchemaError(f"{path} holds {saved!r}; this run's environment gives {shard.schema!r}")
        counters: dict[str, int] = json.loads(metadata[b"millrace.counters"])

        def segments() -> Iterator[tuple[int, int, np.ndarray]]:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                rows = saved.zeros(batch.num_rows)
                for f in saved.fields:
                    column = batch.column(f.name)
                    flat = (column.flatten() if f.shape else column).to_numpy(zero_copy_only=False)
                    rows[f.name] = flat.reshape(-1, *f.shape)
                yield int(batch.column(_SEQUENCE)[0].as_py()), int(batch.column(_FOLLOWING)[0].as_py()), rows

        shard.restore(segments(), counters)
    return counters
