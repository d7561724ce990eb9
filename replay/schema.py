"""What one step holds: field names, types and shapes, packed side by side into one row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

OBSERVATION = "observation"


class SchemaError(ValueError):
    """Rows or a request do not fit the schema of the table."""


@dataclass(frozen=True)
class Field:
    """One named, fixed-shape part of a step."""

    name: str
    dtype: str  # numpy name: "float32", "uint8", …
    shape: tuple[int, ...] = ()


class StepSchema:
    """The fields of an RLDS step (Ramos et al. 2021, arXiv 2111.02767) and their packed layout.

    A row is (observation o_t, action a_t taken at it, reward r_t it earned, flags, policy version). A Dict observation
    becomes one field `observation/<key>` per entry. Fields are sorted by alignment, so a row has no holes but at its end.
    """

    def __init__(self, observation: Mapping[str, Field], action: Field) -> None:
        """`observation` maps each field name (`observation` or `observation/<key>`) to its field; `action` is named `action`."""
        self.fields: tuple[Field, ...] = (
            *observation.values(),
            action,
            Field("reward", "float32"),
            Field("policy_version", "int32"),
            Field("is_first", "bool"),
            Field("is_last", "bool"),
            Field("is_terminal", "bool"),
        )

    @property
    def observations(self) -> tuple[Field, ...]:
        """The observation fields, in order."""
        return tuple(f for f in self.fields if f.name == OBSERVATION or f.name.startswith(OBSERVATION + "/"))

    @property
    def action(self) -> Field:
        return next(f for f in self.fields if f.name == "action")

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """Structured numpy type of a packed row; every field is aligned to its own item size."""
        order = sorted(self.fields, key=lambda f: -np.dtype(f.dtype).itemsize)
        offsets, at = {}, 0
        for f in order:
            offsets[f.name] = at
            at += np.dtype(f.dtype).itemsize * int(np.prod(f.shape, dtype=np.int64))
        alignment = max(np.dtype(f.dtype).itemsize for f in order)
        return np.dtype(
            {
                "names": [f.name for f in self.fields],
                "formats": [(f.dtype, f.shape) for f in self.fields],
                "offsets": [offsets[f.name] for f in self.fields],
                "itemsize": -(-at // alignment) * alignment,
            }
        )

    def zeros(self, count: int) -> np.ndarray:
        """`count` empty rows, shape (count,)."""
        return np.zeros(count, self.dtype)

    def to_json(self) -> str:
        """The schema as text, as it stands in Arrow metadata and in files."""
        return json.dumps([[f.name, f.dtype, list(f.shape)] for f in self.fields])

    @classmethod
    def from_json(cls, text: str) -> StepSchema:
        """The schema that `to_json` wrote."""
        fields = [Field(str(name), str(dtype), tuple(shape)) for name, dtype, shape in json.loads(text)]
        observation = {f.name: f for f in fields if f.name.split("/")[0] == OBSERVATION}
        schema = cls(observation, next(f for f in fields if f.name == "action"))
        if schema.fields != tuple(fields):
            raise SchemaError(f"not a step schema: {text}")
        return schema

    def arrow(self) -> pa.Schema:
        """Arrow schema of packed rows: lane number and one FixedSizeBinary column, the layout in its metadata."""
        layout = {f.name: [f.dtype, list(f.shape), self.dtype.fields[f.name][1]] for f in self.fields}  # type: ignore[index]
        return pa.schema(
            [pa.field("lane", pa.int32()), pa.field("row", pa.binary(self.dtype.itemsize))],
            metadata={"millrace.schema": self.to_json(), "millrace.layout": json.dumps(layout)},
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepSchema) and self.fields == other.fields

    def __hash__(self) -> int:
        return hash(self.fields)

    def __repr__(self) -> str:
        return "StepSchema(" + ", ".join(f"{f.name}: {f.dtype}{list(f.shape) or ''}" for f in self.fields) + ")"


@dataclass
class WindowBatch:
    """A batch of windows, as the learner gets it.

    steps: structured (batch, horizon + 1); row 0 is the window's start, row `length` holds the observation after it.
        Rows beyond `length` repeat row `length`.
    length: int32 (batch,): transitions in the window, 1 … horizon.
    item: int64 (batch,): stable item ids, unique over the table's life within a shard.
    shard: int32 (batch,): the shard each item came from.
    probability: float64 (batch,): probability with which each item was really drawn.
    """

    steps: np.ndarray
    length: np.ndarray
    item: np.ndarray
    shard: np.ndarray
    probability: np.ndarray

    def __len__(self) -> int:
        return len(self.length)
