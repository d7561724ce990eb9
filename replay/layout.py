"""Where everything lies in a shard's storage file, which the shard writes and readers on its host map.

header (one page, JSON): schema, sizes, tables, a random identity
control arrays: counters, journal, segments, lanes, writers, flags, keys and counts of the tables
packed rows, then the large fields of every row
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from . import kernels
from .schema import SchemaError, StepSchema

PAGE = 4096
HEADER_BYTES = 16 * PAGE
MAX_WRITERS = 4096  # writers that a shard remembers, closed ones included
NAME_BYTES = 128  # longest name of a writer
_MAGIC = b"MILLRACE"
_PLAN = b"HANDOVER"
PLAN_AT = 12 * PAGE  # in the header: what a shard that leaves has planned

SelectorName = Literal["uniform", "prioritised", "fifo", "lifo", "max_heap", "min_heap"]


@dataclass(frozen=True)
class TableSpec:
    """One table over the steps of a shard: which rows are its items, how they are drawn, and when they leave it.

    selector: how items are drawn.
    stride: an item every so many steps of an episode.
    priority_exponent: α of a prioritised selector; an item's mass is priority^α.
    max_size: items of this shard's part; beyond it the remover picks who goes. None: as many as the storage holds.
    remover: how those are picked.
    max_times_sampled: an item leaves the table when it has been drawn so often. None: never.
    """

    name: str = "steps"
    selector: SelectorName = "uniform"
    stride: int = 1
    priority_exponent: float = 0.6
    max_size: int | None = None
    remover: SelectorName = "fifo"
    max_times_sampled: int | None = None

    def __post_init__(self) -> None:
        names = SelectorName.__args__  # type: ignore[attr-defined]
        for what, chosen in (("selector", self.selector), ("remover", self.remover)):
            if chosen not in names:
                raise ValueError(f"table {self.name}: expected {what} one of {', '.join(names)}, received {chosen!r}")
        for what, number in (
            ("stride", self.stride),
            ("max_size", self.max_size),
            ("max_times_sampled", self.max_times_sampled),
        ):
            if number is not None and number < 1:
                raise ValueError(f"table {self.name}: expected {what} of at least 1, received {number}")

    @property
    def keeps_priorities(self) -> bool:
        """Whether the selector draws by priorities."""
        return self.selector in ("prioritised", "max_heap", "min_heap")

    @property
    def drops_early(self) -> bool:
        """Whether items leave the table before their rows are overwritten."""
        return self.max_size is not None or self.max_times_sampled is not None


@dataclass(frozen=True)
class Layout:
    """Sizes of a storage, and the offsets that follow from them."""

    schema: StepSchema
    segments: int
    segment_steps: int
    tables: tuple[TableSpec, ...]

    def __post_init__(self) -> None:
        names = [table.name for table in self.tables]
        if not 1 <= len(names) <= kernels.MAX_TABLES or len(set(names)) < len(names):
            raise ValueError(f"expected 1 to {kernels.MAX_TABLES} tables with names of their own, received {names}")

    @property
    def rows(self) -> int:
        """Rows of the storage."""
        return self.segments * self.segment_steps

    @cached_property
    def arrays(self) -> dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]]:
        """Offset, type and shape of each array."""
        word, rows = np.dtype(np.int64), self.rows
        shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "state": (word, (kernels.STATE_WORDS,)),
            "journal": (word, (2, kernels.JOURNAL_WORDS)),
            "segments": (word, (kernels.SEGMENT_ROWS, self.segments)),
            "lanes": (word, (kernels.LANE_ROWS, self.segments)),
            "writers": (word, (kernels.WRITER_ROWS, MAX_WRITERS)),
            "names": (np.dtype(f"S{NAME_BYTES}"), (MAX_WRITERS,)),
            "flags": (np.dtype(np.uint8), (rows,)),
        }
        for index, table in enumerate(self.tables):
            if table.selector != "uniform":
                shapes[f"keys{index}"] = (np.dtype(np.float64), (rows,))
            if table.max_size is not None and table.remover not in ("uniform", table.selector):
                shapes[f"removal_keys{index}"] = (np.dtype(np.float64), (rows,))
            if table.max_times_sampled is not None:
                shapes[f"times_sampled{index}"] = (np.dtype(np.int32), (rows,))
        shapes["packed"] = (np.dtype(np.uint8), (rows, self.schema.packed.itemsize))
        shapes["large"] = (np.dtype(np.uint8), (rows, self.schema.large_bytes))
        at, placed = HEADER_BYTES, {}
        for name, (dtype, shape) in shapes.items():
            placed[name] = (at, dtype, shape)
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            at = -(-(at + size) // PAGE) * PAGE
        placed["end"] = (at, word, (0,))
        return placed

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.arrays["end"][0]

    def carve(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays as views of the file's bytes, uint8 (size,)."""
        views = {}
        for name, (at, dtype, shape) in self.arrays.items():
            size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            views[name] = memory[at : at + size].view(dtype).reshape(shape)
        return views

    def write_header(self, memory: np.ndarray, identity: str) -> None:
        """Say in the file what it is."""
        text = json.dumps({**self.to_json(), "identity": identity}).encode()
        if len(text) > PLAN_AT - 16:
            raise SchemaError(f"the schema takes {len(text)} bytes, more than the header of a storage file holds")
        memory[16 : 16 + len(text)] = np.frombuffer(text, np.uint8)
        memory[8:16] = np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)
        memory[:8] = np.frombuffer(_MAGIC, np.uint8)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.schema.to_json(),
            "segments": self.segments,
            "segment_steps": self.segment_steps,
            "tables": [asdict(table) for table in self.tables],
        }

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> Layout:
        return cls(
            StepSchema.from_json(header["schema"]),
            int(header["segments"]),
            int(header["segment_steps"]),
            tuple(TableSpec(**table) for table in header["tables"]),
        )


def read_header(memory: np.ndarray) -> dict[str, Any] | None:
    """What `write_header` wrote; None when there is no header."""
    if len(memory) < HEADER_BYTES or memory[:8].tobytes() != _MAGIC:
        return None
    (size,) = memory[8:16].view(np.int64).tolist()
    try:
        header: dict[str, Any] = json.loads(memory[16 : 16 + size].tobytes())
    except ValueError:
        return None
    return header


def write_plan(memory: np.ndarray, plan: dict[str, Any]) -> None:
    """Keep a plan in a storage that has none; from the last store on it is there.

    Raises:
        ValueError: it is too long.
    """
    text = json.dumps(plan).encode()
    if len(text) > HEADER_BYTES - PLAN_AT - 16:
        raise ValueError(f"the plan takes {len(text)} bytes, more than the header of a storage file holds")
    at = PLAN_AT
    memory[at + 16 : at + 16 + len(text)] = np.frombuffer(text, np.uint8)
    memory[at + 8 : at + 16] = np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)
    memory[at : at + 8].view(np.int64)[0] = np.frombuffer(_PLAN, np.int64)[0]


def read_plan(memory: np.ndarray) -> dict[str, Any] | None:
    """What `write_plan` wrote; None where there is none."""
    at = PLAN_AT
    if memory[at : at + 8].tobytes() != _PLAN:
        return None
    (size,) = memory[at + 8 : at + 16].view(np.int64).tolist()
    found: dict[str, Any] = json.loads(memory[at + 16 : at + 16 + size].tobytes())
    return found
