"""What a queue table holds and how it is consumed, and the check of rows that come in."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from .schema import SchemaError

GROUP, GROUP_SIZE, POLICY_VERSION = "group", "group_size", "policy_version"
SETTINGS = b"millrace.queue"  # key of the schema metadata that has the settings, as JSON
MAX_ROWS = 1 << 20  # rows in a message: a group is named by its message's number and its place in it
MAX_GROUPS = 2048  # groups in a batch


@dataclass(frozen=True, kw_only=True)
class QueueSpec:
    """Settings of a queue table; each shard of the table has a queue of its own with these.

    A row is one completion. Its group (the completions of one prompt) is delivered whole or not at all.
    """

    name: str
    schema: pa.Schema
    """Columns of numbers, strings, binaries and lists of numbers; among them `group` (int64 or string), `policy_version`
    (int32) and, without a `group_size` below, `group_size` (int32)."""
    group_size: int | None = None
    """Rows of a group; None: each row says it in its column `group_size`."""
    capacity_bytes: int = 1 << 30
    """Bytes of the rows held, those delivered and not yet acknowledged included. The file is larger by 8 messages."""
    capacity_rows: int = 1 << 20
    """Rows held. A group counts in full from its first row on, so that a group begun can always be completed."""
    max_message_bytes: int | None = None
    """The largest message taken; None: 16 MiB, or a quarter of `capacity_bytes` if that is less."""
    times_sampled: int = 1
    """How often a group is delivered: 1 consumes it at once."""
    max_policy_lag: int | None = None
    """Policy versions by which a row may be behind its reader's; a group with an older row is dropped and counted."""
    max_waiting_groups: int | None = None
    """Groups that wait to be delivered, incomplete ones included, before insertion blocks; None: no limit."""
    max_waiting_rows: int | None = None
    """The same in rows."""
    lease_s: float = 60.0
    """How long a lost writer may stay away before its incomplete groups are dropped, and a lost reader before what it
    was given goes to others."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):  # it is part of a file's name
            raise ValueError(
                f"the name of a queue: expected letters, digits and underscores, received {self.name!r}; rename it"
            )
        object.__setattr__(self, "schema", self.schema.remove_metadata())
        _check_schema(self.schema, self.group_size)
        for name in ("capacity_bytes", "capacity_rows", "times_sampled", "lease_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of queue {self.name!r} must be above 0, received {getattr(self, name)}")
        for name in ("group_size", "max_message_bytes", "max_waiting_groups", "max_waiting_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of queue {self.name!r} must be at least 1 or None, received {value}")
        if self.max_policy_lag is not None and self.max_policy_lag < 0:
            raise ValueError(f"max_policy_lag of queue {self.name!r} must not be negative: {self.max_policy_lag}")
        if self.message_bytes > self.capacity_bytes:
            raise ValueError(
                f"queue {self.name!r} takes messages of {self.message_bytes} bytes (max_message_bytes) and holds "
                f"{self.capacity_bytes} (capacity_bytes); lower the first or raise the second"
            )
        for name in ("capacity_rows", "max_waiting_rows"):
            limit = getattr(self, name)
            if limit is not None and self.group_size is not None and limit < self.group_size:
                raise ValueError(
                    f"queue {self.name!r} would block forever: {name} is {limit} and a group has {self.group_size} rows"
                )

    @property
    def message_bytes(self) -> int:
        """The largest message taken, in bytes of its record."""
        return self.max_message_bytes or min(16 << 20, self.capacity_bytes // 4)

    @cached_property
    def required(self) -> list[str]:
        """Columns in which no value may be missing."""
        always = {GROUP, POLICY_VERSION} | ({GROUP_SIZE} if self.group_size is None else set())
        return [field.name for field in self.schema if field.name in always or not field.nullable]

    def check_batch(self, *, groups: int | None, rows: int | None) -> None:
        """Refuse a batch that could never be filled.

        Raises:
            ValueError: not exactly one of `groups` and `rows` is set, or the queue cannot hold as many.
        """
        if (groups is None) == (rows is None) or (groups or rows or 0) < 1:
            raise ValueError(f"a batch has a number of groups or of rows, at least 1; received {groups=}, {rows=}")
        if groups is not None and groups > MAX_GROUPS:
            raise ValueError(f"a batch has at most {MAX_GROUPS} groups, received {groups}")
        least = rows if groups is None else groups * (self.group_size or 1)
        for name, limit in (("capacity_rows", self.capacity_rows), ("max_waiting_rows", self.max_waiting_rows)):
            if limit is not None and least is not None and least > limit:
                raise ValueError(
                    f"queue {self.name!r} can never fill a batch of {least} rows: its {name} is {limit}; raise it or "
                    f"ask for less"
                )
        if groups is not None and self.max_waiting_groups is not None and groups > self.max_waiting_groups:
            raise ValueError(
                f"queue {self.name!r} can never fill a batch of {groups} groups: its max_waiting_groups is "
                f"{self.max_waiting_groups}; raise it or ask for less"
            )

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["schema"] = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> QueueSpec:
        values: dict[str, Any] = json.loads(text)
        values["schema"] = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(values["schema"])))
        return cls(**values)


def _check_schema(schema: pa.Schema, group_size: int | None) -> None:
    for field in schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        plain = pa.types.is_primitive(inner)  # numbers, booleans and times
        if not plain and (inner is not field.type or not (pa.types.is_string(inner) or pa.types.is_binary(inner))):
            raise SchemaError(
                f"column {field.name!r} has the type {field.type}; expected a number, string, binary or list of numbers"
            )
    if len(set(schema.names)) != len(schema.names):
        raise SchemaError(f"two columns have one name: {schema.names}")
    required: dict[str, tuple[pa.DataType, ...]] = {
        GROUP: (pa.int64(), pa.string()),
        POLICY_VERSION: (pa.int32(),),
    }
    if group_size is None:
        required[GROUP_SIZE] = (pa.int32(),)
    for name, types in required.items():
        if name not in schema.names or schema.field(name).type not in types:
            found = schema.field(name).type if name in schema.names else f"only the columns {schema.names}"
            raise SchemaError(
                f"a queue's rows need a column {name!r} of type {' or '.join(map(str, types))}; received {found}"
            )


@dataclass(frozen=True)
class Part:
    """The rows of one group in one message."""

    key: int | str
    size: int  # rows of the whole group
    rows: np.ndarray  # int64 (n,), in order
    version: int  # the oldest policy version among them


def parts_of(batch: pa.RecordBatch, spec: QueueSpec) -> list[Part]:
    """The groups in a message, in the order of their first rows.

    Raises:
        SchemaError: the columns are others than the queue's, the values are damaged or missing, or a group contradicts
            itself.
    """
    if not batch.schema.equals(spec.schema):
        raise SchemaError(
            f"rows do not fit queue {spec.name!r}: expected {columns_text(spec.schema)}; received {columns_text(batch.schema)}"
        )
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"rows for queue {spec.name!r} are damaged: {error}") from None
    if not 1 <= batch.num_rows <= MAX_ROWS:
        raise SchemaError(f"expected 1 to {MAX_ROWS} rows in a message, received {batch.num_rows}")
    columns = dict(zip(spec.schema.names, batch.columns, strict=True))
    for name in spec.required:
        if columns[name].null_count:
            raise SchemaError(f"column {name!r} has {columns[name].null_count} empty values; expected none")
    versions = columns[POLICY_VERSION].to_numpy()
    places: dict[int | str, list[int]] = {}
    for row, key in enumerate(columns[GROUP].to_pylist()):
        places.setdefault(key, []).append(row)
    sizes = None if spec.group_size is not None else columns[GROUP_SIZE].to_numpy()
    parts = []
    for key, found in places.items():
        rows = np.array(found)
        size = spec.group_size
        if sizes is not None:
            said = set(sizes[rows].tolist())
            size = min(said)
            if len(said) > 1 or size < 1:
                raise SchemaError(
                    f"the rows of group {key!r} have the group_size {sorted(said)}; expected one, above 0"
                )
        assert size is not None
        parts.append(Part(key, size, rows, int(versions[rows].min())))
    return parts


def columns_text(schema: pa.Schema) -> str:
    """Columns and their types in words."""
    return ", ".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in schema)
