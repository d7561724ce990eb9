"""What goes over the wire between a shard and its clients: Arrow schemas, batches and the small messages beside them."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .schema import SchemaError, StepSchema, WindowBatch

SEQUENCE = struct.Struct("<q")
MASS = struct.Struct("<q")
CLOSE = b"close"
LOST = (pa.ArrowException, flight.FlightError, OSError)  # what Flight raises when the other side is gone
RETRY_S = 60.0  # how long a lost shard is waited for


def window_schema(schema: StepSchema, horizon: int) -> pa.Schema:
    """Arrow schema of a batch of windows: the packed rows of a window side by side in one FixedSizeBinary value."""
    return pa.schema(
        [
            pa.field("steps", pa.binary((horizon + 1) * schema.dtype.itemsize)),
            pa.field("length", pa.int32()),
            pa.field("item", pa.int64()),
            pa.field("probability", pa.float64()),
        ],
        metadata=schema.arrow().metadata,
    )


def column(type_: pa.DataType, values: np.ndarray, count: int) -> pa.Array:
    """`count` values of a fixed-size type over the memory of a contiguous array, without a copy."""
    return pa.Array.from_buffers(type_, count, [None, pa.py_buffer(values)])


def to_arrow(batch: WindowBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch of windows as one record batch, without a copy."""
    values = (batch.steps.reshape(-1).view(np.uint8), batch.length, batch.item, batch.probability)
    columns = [column(f.type, v, len(batch)) for f, v in zip(schema, values, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def rows_from_arrow(batch: pa.RecordBatch, schema: StepSchema) -> tuple[np.ndarray, np.ndarray]:
    """(lanes int32 (n,), rows structured (n,)) of a record batch that a writer sent, without a copy."""
    lanes, rows = batch.column(0), batch.column(1)
    if lanes.null_count or rows.null_count:
        raise SchemaError("expected rows without nulls")
    size = schema.dtype.itemsize
    data = np.frombuffer(rows.buffers()[1], np.uint8, len(rows) * size, rows.offset * size)
    return lanes.to_numpy(), data.view(schema.dtype)


def action(client: flight.FlightClient, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask a shard by DoAction; question and answer are JSON."""
    (result,) = client.do_action(flight.Action(kind, json.dumps(body).encode()))
    answer: dict[str, Any] = json.loads(result.body.to_pybytes())
    return answer
