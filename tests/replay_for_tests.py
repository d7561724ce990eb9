"""What the replay tests share: small schemas, rows that tell where they come from, shards and their specs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from replay.layout import Layout, TableSpec
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.schema import Field, StepSchema, Window, WindowBatch
from replay.shard import Shard, ShardSpec

SCHEMA = StepSchema(
    {
        "observation/state": Field("observation/state", "float32", (3,)),
        "observation/image": Field("observation/image", "uint8", (2, 2)),
    },
    Field("action", "float32", (2,)),
)
HALF_CHEETAH = StepSchema({"observation": Field("observation", "float32", (17,))}, Field("action", "float32", (6,)))
FRAMES = StepSchema(  # its frame is just large enough to lie in a file of its own
    {
        "observation/frame": Field("observation/frame", "uint8", (64, 64)),
        "observation/state": Field("observation/state", "float64", (2,)),
    },
    Field("action", "int16"),
)
FREE = 1e12  # an error buffer that never holds anyone up


def numbered(count: int, first: int = 0, *, last: bool = False) -> np.ndarray:
    """`count` steps of one lane; every field of step k holds values that only k gives."""
    rows = SCHEMA.zeros(count)
    k = np.arange(first, first + count)
    rows["observation/state"] = k[:, None] + np.array([0.0, 0.25, 0.5])
    rows["observation/image"] = ((k[:, None] * 7 + np.arange(4)) % 256).reshape(count, 2, 2)
    rows["action"] = np.stack([k * 2.0 + 1, -k], axis=1)
    rows["reward"] = k + 0.125
    rows["policy_version"] = k
    if last:
        end(rows, terminal=True)
    return rows


def end(rows: np.ndarray, *, terminal: bool) -> None:
    """Make the last of these rows an episode's last: action and reward void."""
    rows["is_last"][-1], rows["is_terminal"][-1], rows["reward"][-1] = True, terminal, 0.0
    rows["action"][-1] = 0.0


def joined(*parts: np.ndarray) -> np.ndarray:
    """The rows one after another, in the schema's layout (which np.concatenate packs)."""
    rows = SCHEMA.zeros(sum(map(len, parts)))
    at = 0
    for part in parts:
        rows[at : at + len(part)] = part
        at += len(part)
    return rows


def schema(*, frames: bool = False) -> StepSchema:
    """A small schema, with frames that can be stacked or without."""
    return FRAMES if frames else SCHEMA


def rows(numbers: np.ndarray, *, frames: bool = False) -> np.ndarray:
    """Steps that hold, in every field, values that only their number (below 32 768) gives; numbers int64 (n,)."""
    if not frames:
        return joined(*(numbered(1, int(number)) for number in numbers))
    found = FRAMES.zeros(len(numbers))
    found["observation/state"] = numbers[:, None] + np.array([0.0, 0.5])
    frame = found["observation/frame"]
    frame[:] = (numbers % 251)[:, None, None]
    frame[:, 0, 0], frame[:, -1, -1] = numbers % 256, numbers // 256
    found["action"] = numbers
    found["reward"] = numbers + 0.125
    found["policy_version"] = numbers
    return found


def make_shard(
    *,
    capacity: int = 1024,
    segment_steps: int = 16,
    tables: tuple[TableSpec, ...] = (TableSpec(),),
    limiters: Mapping[str, RateLimiter] | None = None,
    index: int = 0,
    seed: int = 0,
    stack: int = 1,
    lease_s: float = 30.0,
    schema: StepSchema = SCHEMA,
) -> Shard:
    """A shard in ordinary memory, whose limiters let everything through unless others are given."""
    limiters = limiters or {table.name: RateLimiter(RateLimit.from_min_size(1)) for table in tables}
    layout = Layout(schema, capacity // segment_steps, segment_steps, tables)
    return Shard(layout, limiters, index=index, seed=seed, stack=stack, lease_s=lease_s)


def make_spec(directory: str | Path, **changes: Any) -> ShardSpec:
    """What a shard process needs, with a table that lets everything through."""
    tables = changes.get("tables", (TableSpec(),))
    values: dict[str, Any] = {
        "schema": SCHEMA.to_json(),
        "run": "test",
        "index": 0,
        "capacity": 4096,
        "segment_steps": 64,
        "limits": tuple(RateLimit.from_min_size(1) for _ in tables),
        "seed": 0,
        "directory": str(directory),
        **changes,
    }
    return ShardSpec(**values)


def draw_all(shard: Shard, horizon: int = 1, *, table: str = "steps", window: Window | None = None) -> WindowBatch:
    """One window per item of a table, in the order of their ids: drawn until each was seen."""
    items = shard.tables[table].items
    count = max(64, 24 * items)
    drawn = shard.sample(table, count, count, window or Window(horizon), timeout_s=5.0)
    assert drawn is not None
    batch = drawn[1]
    _, places = np.unique(batch.item, return_index=True)
    assert len(places) == items, "24 draws per item left one out: once in ten billion for one item"
    return pick(batch, places)


def pick(batch: WindowBatch, places: np.ndarray) -> WindowBatch:
    """Some of a batch's windows."""
    values = dict(vars(batch))
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            values[name] = value[places]
    values.pop("_raw")
    if batch.frame_index is None:
        values["frames"] = {name: frames[places] for name, frames in batch.frames.items()}
    return WindowBatch(**values)


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
