"""What the replay tests share: a small schema, rows that tell where they come from, and a plain reference."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from replay.limiter import RateLimiter
from replay.schema import Field, StepSchema, WindowBatch
from replay.shard import Shard, ShardSpec

SCHEMA = StepSchema(
    {
        "observation/state": Field("observation/state", "float32", (3,)),
        "observation/image": Field("observation/image", "uint8", (2, 2)),
    },
    Field("action", "float32", (2,)),
)
HALF_CHEETAH = StepSchema({"observation": Field("observation", "float32", (17,))}, Field("action", "float32", (6,)))
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


def make_shard(
    *,
    capacity: int = 1024,
    segment_steps: int = 16,
    limiter: RateLimiter | None = None,
    index: int = 0,
    seed: int = 0,
    lease_s: float = 30.0,
    schema: StepSchema = SCHEMA,
) -> Shard:
    limiter = limiter or RateLimiter(samples_per_insert=1.0, min_size=1, error_buffer=FREE)
    return Shard(
        schema, limiter, index=index, capacity=capacity, segment_steps=segment_steps, seed=seed, lease_s=lease_s
    )


def make_spec(directory: str | Path, **changes: object) -> ShardSpec:
    values: dict[str, object] = {
        "schema": SCHEMA.to_json(),
        "run": "test",
        "index": 0,
        "capacity": 4096,
        "segment_steps": 64,
        "samples_per_insert": 1.0,
        "min_size": 1,
        "error_buffer": FREE,
        "seed": 0,
        "directory": str(directory),
        **changes,
    }
    return ShardSpec(**values)  # type: ignore[arg-type]


def draw_all(shard: Shard, horizon: int = 1) -> WindowBatch:
    """One window per item of the shard, in the order of their ids: drawn until each was seen."""
    seen: dict[int, int] = {}
    batch = shard.sample(max(64, 20 * shard.items), horizon, timeout_s=5.0)
    assert batch is not None
    for place, item in enumerate(batch.item.tolist()):
        seen.setdefault(item, place)
    assert len(seen) == shard.items, "20 draws per item left one out: once in a billion for one item"
    places = [seen[item] for item in sorted(seen)]
    return WindowBatch(**{name: value[places] for name, value in vars(batch).items()})


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
