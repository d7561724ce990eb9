"""What goes over the wire between a shard and its clients: Arrow schemas, batches and the small messages beside them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .buffers import as_bytes
from .schema import SchemaError, StepSchema, Window, WindowBatch

SEQUENCE = struct.Struct("<q")
# Of the shard's part of a table: mass, items; of the block: stamp of its draw, probability where its items have no own.
BLOCK = struct.Struct("<dqqd")
CLOSE = b"close"
LOST = (pa.ArrowException, flight.FlightError, OSError)  # what Flight raises when the other side is gone
RETRY_S = 60.0  # how long a lost shard is waited for
MAX_ROWS = 1_048_576  # rows of one message
MAX_BYTES = 1 << 30  # bytes of one message

PRIORITIES = pa.schema([("item", pa.int64()), ("priority", pa.float64())])


def pack_sequence(sequence: int, ended: Sequence[int] = ()) -> bytes:
    """Metadata of a writer's message: its number, and the lanes that end behind its rows."""
    return SEQUENCE.pack(sequence) + np.asarray(ended, np.int32).tobytes()


def unpack_sequence(metadata: bytes) -> tuple[int, np.ndarray]:
    """What `pack_sequence` packed: the number, and lanes, int32 (n,).

    Raises:
        SchemaError: it is no such metadata.
    """
    if len(metadata) < SEQUENCE.size or len(metadata) % 4:
        raise SchemaError(
            f"expected metadata of {SEQUENCE.size} bytes, a message's number, and 4 for each lane that ends; received "
            f"{len(metadata)} bytes"
        )
    return SEQUENCE.unpack_from(metadata)[0], np.frombuffer(metadata, np.int32, offset=SEQUENCE.size)


def window_schema(schema: StepSchema, window: Window) -> pa.Schema:
    """Arrow schema of a block of windows: what belongs to one window, side by side, is one FixedSizeBinary value.

    The metadata holds the layout of the rows and the window's settings. `frames` are stacked; or each distinct one once, all
    in the first window's list, with the `frame_index` that stacks them.
    """
    steps = schema.packed if window.observations == "all" else schema.rest
    fields = [
        pa.field("steps", pa.binary(window.rows * steps.itemsize)),
        pa.field("length", pa.int32()),
        pa.field("item", pa.int64()),
        pa.field("probability", pa.float64()),
        pa.field("key", pa.float64()),
    ]
    if window.observations == "ends":
        fields.append(pa.field("ends", pa.binary(2 * schema.packed.itemsize)))
    if window.burn_in:
        fields.append(pa.field("burn_in", pa.int32()))
    stacked = window.observed * window.stack
    distinct = window.stack_on_device and bool(schema.large)
    for f in schema.large:
        one = pa.binary(f.nbytes)
        fields.append(pa.field(f"frames/{f.name}", pa.list_(one) if distinct else pa.binary(stacked * f.nbytes)))
    if distinct:
        fields.append(pa.field("frame_index", pa.list_(pa.int32(), stacked)))
    metadata = {**schema.arrow().metadata, b"millrace.window": json.dumps(asdict(window)).encode()}
    return pa.schema(fields, metadata=metadata)


def items_schema(selector: str) -> pa.Schema:
    """Arrow schema of a block of items that the reader gathers by itself."""
    fields = [("row", pa.int64())]
    if selector == "prioritised":
        fields.append(("probability", pa.float64()))
    elif selector != "uniform":
        fields.append(("key", pa.float64()))
    return pa.schema(fields)


def window_bytes(schema: StepSchema, window: Window) -> int:
    """Bytes of one window in a message, its frames stacked."""
    steps = schema.packed if window.observations == "all" else schema.rest
    frames = window.observed * window.stack * sum(f.nbytes for f in schema.large)
    ends = 2 * schema.packed.itemsize if window.observations == "ends" else 0
    return window.rows * steps.itemsize + ends + frames


def column(type_: pa.DataType, values: np.ndarray, count: int) -> pa.Array:
    """`count` values of a fixed-size type over the memory of a contiguous array, without a copy."""
    if pa.types.is_fixed_size_list(type_):
        flat = column(type_.value_type, values, count * type_.list_size)
        return pa.FixedSizeListArray.from_arrays(flat, type=type_)
    return pa.Array.from_buffers(type_, count, [None, pa.py_buffer(values)])


def to_arrow(batch: WindowBatch, key: np.ndarray | None, schema: pa.Schema) -> pa.RecordBatch:
    """A block of windows as one record batch, without a copy."""
    n = len(batch)
    columns = []
    for f in schema:
        if f.name.startswith("frames/") and pa.types.is_list(f.type):
            frames = batch.frames[f.name.partition("/")[2]][: batch.frame_count]
            distinct = column(f.type.value_type, as_bytes(frames, 0), len(frames))
            offsets = np.full(n + 1, len(frames), np.int32)
            offsets[0] = 0
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), distinct, type=f.type))
            continue
        if f.name.startswith("frames/"):
            array = batch.frames[f.name.partition("/")[2]]
        elif f.name == "key":
            array = np.zeros(n) if key is None else key
        else:
            array = getattr(batch, f.name)
        columns.append(column(f.type, as_bytes(array, 0), n))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def values(array: pa.Array) -> np.ndarray:
    """The bytes of a column of fixed size, uint8 (n, width), without a copy."""
    if pa.types.is_fixed_size_list(array.type):
        child = values(array.values)
        width = array.type.list_size * child.shape[1]
        return child.reshape(-1, width)[array.offset : array.offset + len(array)]
    width = array.type.byte_width if pa.types.is_fixed_size_binary(array.type) else array.type.bit_width // 8
    data = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return data.reshape(len(array), width)


def from_arrow(block: pa.RecordBatch) -> dict[str, np.ndarray]:
    """The columns of a block of windows as bytes, uint8 (n, width), without a copy; distinct frames as (frames, width)."""
    found = {}
    for f, array in zip(block.schema, block.columns, strict=True):
        found[f.name] = values(array.values if pa.types.is_list(f.type) else array)
    return found


def rows_from_arrow(columns: list[pa.Array], schema: StepSchema) -> tuple[np.ndarray, np.ndarray]:
    """(lanes int32 (n,), rows structured (n,)) of the columns that a writer sent, without a copy."""
    lanes, rows = columns
    return lanes.to_numpy(), values(rows).reshape(-1).view(schema.dtype)


def action(
    client: flight.FlightClient, kind: str, body: dict[str, Any], *, timeout_s: float | None = None
) -> dict[str, Any]:
    """Ask a shard by DoAction; question and answer are JSON. Raises `FlightTimedOutError` after `timeout_s`."""
    options = flight.FlightCallOptions(timeout=timeout_s)
    (result,) = client.do_action(flight.Action(kind, json.dumps(body).encode()), options)
    answer: dict[str, Any] = json.loads(result.body.to_pybytes())
    return answer
