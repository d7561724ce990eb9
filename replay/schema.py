"""What one step holds: field names, types and shapes, packed side by side into one row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa

OBSERVATION = "observation"
LARGE_BYTES = (
    4096  # fields of this size or more (frames) lie in a file of their own: a packed row stays a few cache lines
)


class SchemaError(ValueError):
    """Rows or a request do not fit the schema of the table."""


@dataclass(frozen=True)
class Field:
    """One named, fixed-shape part of a step."""

    name: str
    dtype: str  # numpy name: "float32", "uint8", …
    shape: tuple[int, ...] = ()
    # Of a discrete action, how many there are; 0 elsewhere. Data that do not tell (imported ones) fit all the same.
    choices: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of one value."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


def _place(fields: Sequence[Field], at: int) -> tuple[dict[str, int], int]:
    """Offsets of fields laid side by side from `at` on, largest item size first so that there are no holes; and the end."""
    order = sorted(fields, key=lambda f: -np.dtype(f.dtype).itemsize)
    offsets = {}
    for f in order:
        size = np.dtype(f.dtype).itemsize
        offsets[f.name] = at = -(-at // size) * size
        at += f.nbytes
    return offsets, at


def _structured(fields: Sequence[Field], offsets: Mapping[str, int], itemsize: int) -> np.dtype[np.void]:
    return np.dtype(
        {
            "names": [f.name for f in fields],
            "formats": [(f.dtype, f.shape) for f in fields],
            "offsets": [offsets[f.name] for f in fields],
            "itemsize": itemsize,
        }
    )


class StepSchema:
    """The fields of an RLDS step (Ramos et al. 2021, arXiv 2111.02767) and their packed layout.

    A row is (observation o_t, action a_t taken at it, reward r_t it earned, flags, policy version). A Dict observation
    becomes one field `observation/<key>` per entry. A row is laid out as

        observation | action, reward, policy version, flags | large fields (frames)

    each part sorted by alignment and padded to whole 8-byte words. The first two parts are the *packed* row, which the
    storage keeps together; the large fields of a row lie together in a file of their own.
    """

    def __init__(self, observation: Mapping[str, Field], action: Field, extra: Sequence[Field] = ()) -> None:
        """`observation` maps each field name (`observation` or `observation/<key>`) to its field; `action` is named `action`.

        `extra` are further fields of a row, whatever their names but these: a recurrent policy stores its state so.

        Raises:
            SchemaError: two fields have one name, or an extra one that of an observation.
        """
        self.extra: tuple[Field, ...] = tuple(extra)
        self.fields: tuple[Field, ...] = (
            *observation.values(),
            action,
            Field("reward", "float32"),
            Field("policy_version", "int32"),
            Field("is_first", "bool"),
            Field("is_last", "bool"),
            Field("is_terminal", "bool"),
            *self.extra,
        )
        names = [f.name for f in self.fields]
        if len(set(names)) != len(names) or any(f.name.split("/")[0] == OBSERVATION for f in self.extra):
            raise SchemaError(f"expected different names, extra ones not those of observations; received {names}")

    @property
    def observations(self) -> tuple[Field, ...]:
        """The observation fields, in order."""
        return tuple(f for f in self.fields if f.name == OBSERVATION or f.name.startswith(OBSERVATION + "/"))

    @property
    def action(self) -> Field:
        return next(f for f in self.fields if f.name == "action")

    def with_extra(self, *fields: Field) -> StepSchema:
        """This schema and further fields of a row, behind the others."""
        return StepSchema({f.name: f for f in self.observations}, self.action, (*self.extra, *fields))

    @cached_property
    def large(self) -> tuple[Field, ...]:
        """Observation fields that lie in a file of their own."""
        return tuple(f for f in self.observations if f.nbytes >= LARGE_BYTES)

    @cached_property
    def _layout(self) -> tuple[dict[str, int], int, int, int]:
        """Offset of every field, start of the part after the observation, size of the packed row, size of the row."""
        large = {f.name for f in self.large}
        observations = [f for f in self.observations if f.name not in large]
        rest = [f for f in self.fields if f not in self.observations]
        offsets, at = _place(observations, 0)
        widest = max(np.dtype(f.dtype).itemsize for f in rest)
        rest_at = -(-at // widest) * widest
        placed, at = _place(rest, rest_at)
        offsets |= placed
        packed = at = -(-at // 8) * 8
        for f in self.large:
            offsets[f.name] = at
            at += -(-f.nbytes // 8) * 8
        return offsets, rest_at, packed, at

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """Structured numpy type of a whole row, as writers hand it over; its size is a multiple of 8."""
        offsets, _, _, size = self._layout
        return _structured(self.fields, offsets, size)

    @cached_property
    def packed(self) -> np.dtype[np.void]:
        """Structured numpy type of the packed part of a row: all fields that are not large."""
        offsets, _, size, _ = self._layout
        return _structured([f for f in self.fields if f not in self.large], offsets, size)

    @cached_property
    def rest(self) -> np.dtype[np.void]:
        """Structured numpy type of a packed row without its observation; it starts at byte `rest_offset` of the row."""
        offsets, begin, size, _ = self._layout
        fields = [f for f in self.fields if f not in self.observations]
        return _structured(fields, {name: at - begin for name, at in offsets.items()}, size - begin)

    @property
    def rest_offset(self) -> int:
        """Byte of a packed row at which its observation has ended."""
        return self._layout[1]

    @property
    def large_bytes(self) -> int:
        """Bytes of the large fields of one row, padding included."""
        _, _, packed, size = self._layout
        return size - packed

    def zeros(self, count: int) -> np.ndarray:
        """`count` empty rows, shape (count,)."""
        return np.zeros(count, self.dtype)

    def to_json(self) -> str:
        """The schema as text, as it stands in Arrow metadata and in files."""
        return json.dumps([[f.name, f.dtype, list(f.shape), *([f.choices] if f.choices else [])] for f in self.fields])

    @classmethod
    def from_json(cls, text: str) -> StepSchema:
        """The schema that `to_json` wrote."""
        fields = [
            Field(str(name), str(dtype), tuple(shape), *choices) for name, dtype, shape, *choices in json.loads(text)
        ]
        observation = {f.name: f for f in fields if f.name.split("/")[0] == OBSERVATION}
        action = next(f for f in fields if f.name == "action")
        schema = cls(observation, action, fields[len(cls(observation, action).fields) :])
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


@dataclass(frozen=True)
class Window:
    """What a reader wants around each item: `length` steps from the item on, and what of them.

    length: transitions, h; a window ends earlier with its episode.
    burn_in: steps before the item, to warm up a recurrent network (Kapturowski et al. 2019, R2D2); fewer at an episode's
        start.
    observations: `all` steps' observations, or only the `ends`: the item's and the one after the window (for chunks, whose
        critic sees the first observation, all actions and rewards, and bootstraps from the last).
    stack: frames per large field, the newest last; a frame before the episode's start repeats its first.
    stack_on_device: deliver each distinct frame of a batch once, and an index that stacks them (on the learner's device).
    """

    length: int = 1
    burn_in: int = 0
    observations: Literal["all", "ends"] = "all"
    stack: int = 1
    stack_on_device: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.burn_in < 0 or self.stack < 1 or self.observations not in ("all", "ends"):
            raise ValueError(f"expected length ≥ 1, burn_in ≥ 0, stack ≥ 1, observations all or ends; received {self}")

    def check(self, schema: StepSchema) -> None:
        """
        Raises:
            SchemaError: frames are to be stacked and the schema has no large fields.
        """
        if (self.stack > 1 or self.stack_on_device) and not schema.large:
            raise SchemaError(f"expected a field of frames (≥ {LARGE_BYTES} bytes) to stack, received {schema}")

    @property
    def rows(self) -> int:
        """Rows of a window: the burn-in, its steps, and the observation after them."""
        return self.burn_in + self.length + 1

    @property
    def observed(self) -> int:
        """Rows of a window whose observation is delivered."""
        return self.rows if self.observations == "all" else 2


@dataclass
class WindowBatch:
    """A batch of windows, as the learner gets it. With `start` the column of the item itself, `Window.burn_in`:

    steps: structured (batch, rows), rows = burn-in + horizon + 1. Column `start` is the item, column start + `length` the
        row with the observation after the window; columns beyond repeat it, columns before the burn-in repeat its first.
        With `Window.observations` = `ends` the rows have no observation fields.
    ends: structured (batch, 2), the packed rows at columns start and start + length; only where `Window.observations` is
        `ends`, else None.
    length: int32 (batch,): transitions in the window, 1 … horizon.
    burn_in: int32 (batch,): steps before the item that are real, 0 … `Window.burn_in`; None without burn-in.
    frames: uint8 or other (batch, rows or 2, stack, *shape) for each large field; with `Window.stack_on_device` (n, *shape),
        the first `frame_count` in use, to be stacked by `frame_index` int32 (batch, rows or 2, stack).
    item: int64 (batch,): stable item ids, unique over the table's life within a shard.
    shard: int32 (batch,): the shard each item came from.
    probability: float64 (batch,): probability with which each item was really drawn.
    size: items in the whole table, over all its shards, as far as was known at the draw.
    """

    steps: np.ndarray
    length: np.ndarray
    item: np.ndarray
    shard: np.ndarray
    probability: np.ndarray
    size: int = 0
    ends: np.ndarray | None = None
    burn_in: np.ndarray | None = None
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    frame_index: np.ndarray | None = None
    frame_count: int = 0
    start: int = 0
    _raw: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def raw(self, name: str) -> np.ndarray:
        """The bytes of `steps` or `ends`, uint8 (batch, rows, row bytes), sharing their memory."""
        found = self._raw.get(name)
        if found is None:
            array: np.ndarray = getattr(self, name)
            found = self._raw[name] = array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)
        return found

    def __len__(self) -> int:
        return len(self.length)

    def mask(self) -> np.ndarray:
        """Which columns are transitions of the window: bool (batch, rows − 1), burn-in included."""
        column = np.arange(self.steps.shape[1] - 1) - self.start
        first = 0 if self.burn_in is None else -self.burn_in[:, None]
        mask: np.ndarray = (column >= first) & (column < self.length[:, None])
        return mask

    def returns(self, discount: float) -> tuple[np.ndarray, np.ndarray]:
        """Discounted reward of each window and the discount of its bootstrap: Σ γ^k r_k over k < length, and γ^length,
        0 where the row after the window is terminal. Both float32 (batch,)."""
        start = self.start
        horizon = self.steps.shape[1] - 1 - start
        weights = np.power(discount, np.arange(horizon))
        reward = np.where(
            np.arange(horizon) < self.length[:, None], self.steps["reward"][:, start : start + horizon], 0.0
        )
        last = np.take_along_axis(self.steps["is_terminal"], (start + self.length.astype(np.int64))[:, None], 1)[:, 0]
        gained = (reward * weights).sum(1).astype(np.float32)
        return gained, np.where(last, 0.0, np.power(discount, self.length)).astype(np.float32)

    def importance_weights(self, exponent: float) -> np.ndarray:
        """Weights that undo the draw's preference, (size · probability)^−β, divided by their largest in the batch; float32
        (batch,) (Schaul et al. 2016, arXiv 1511.05952, §3.4). `exponent` is β."""
        weights = np.power(max(self.size, 1) * self.probability, -exponent)
        scaled: np.ndarray = (weights / weights.max(initial=1e-300)).astype(np.float32)
        return scaled
