"""Steps as ordinary Arrow columns, which other programs read: one column per field, a fixed shape as a FixedSizeList.

A list holds the values of one step in C order; the shape itself stands in the field's metadata, and the whole schema in
that of the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from .schema import Field, SchemaError, StepSchema

SCHEMA_KEY = b"millrace.schema"


def size_of(field: Field) -> int:
    """Values of the field in one step."""
    return int(np.prod(field.shape, dtype=np.int64))


def arrow_fields(schema: StepSchema) -> list[pa.Field]:
    """One column for each field of a step."""
    found = []
    for f in schema.fields:
        value = pa.from_numpy_dtype(np.dtype(f.dtype))
        type_ = pa.list_(pa.field("item", value, nullable=False), size_of(f)) if f.shape else value
        found.append(pa.field(f.name, type_, nullable=False, metadata={"shape": json.dumps(list(f.shape))}))
    return found


def to_columns(schema: StepSchema, rows: np.ndarray) -> list[pa.Array]:
    """rows: structured (n,) of the schema's dtype. Returns the arrays of `arrow_fields`."""
    columns = []
    for f, column in zip(schema.fields, arrow_fields(schema), strict=True):
        flat = pa.array(np.ascontiguousarray(rows[f.name]).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=column.type) if f.shape else flat)
    return columns


def from_columns(schema: StepSchema, batch: pa.RecordBatch) -> np.ndarray:
    """The opposite of `to_columns`, from a batch that has these columns among others: structured (n,)."""
    rows = schema.zeros(batch.num_rows)
    for f in schema.fields:
        flat = batch.column(f.name)
        if f.shape:
            flat = flat.flatten()
        rows[f.name] = flat.to_numpy(zero_copy_only=False).reshape(rows[f.name].shape)
    return rows


def concatenate_rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Structured rows one after another, in their own layout, which np.concatenate would pack."""
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    raw = np.dtype((np.void, dtype.itemsize))  # numpy copies a structured row field by field, and a void row by memcpy
    return np.concatenate([np.ascontiguousarray(part).view(raw) for part in parts]).view(dtype)


def schema_difference(expected: StepSchema, received: StepSchema) -> list[str]:
    """What tells two schemas apart, a line for each field; empty where nothing does."""

    def text(field: Field | None) -> str:
        return "none" if field is None else field.dtype + (str(list(field.shape)) if field.shape else "")

    ours, theirs = ({f.name: f for f in schema.fields} for schema in (expected, received))
    names: Iterable[str] = dict.fromkeys([*ours, *theirs])
    return [
        f"{name}: expected {text(ours.get(name))}, received {text(theirs.get(name))}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def check_schema(expected: StepSchema, received: StepSchema, *, what: str) -> None:
    """
    Raises:
        SchemaError: they differ; the message names `what` was received and each field that differs.
    """
    if lines := schema_difference(expected, received):
        raise SchemaError(f"{what} has other fields than this table: " + "; ".join(lines))
