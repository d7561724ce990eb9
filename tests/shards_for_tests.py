"""What the tests of the replay service share: shards in processes of their own, and rows that tell whether they are whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.flight as flight

from replay.layout import TableSpec
from replay.process import ShardProcess
from replay.rate_limit import RateLimit
from replay.schema import Field, StepSchema, Window, WindowBatch
from replay.security import Security, flight_client, new_token
from replay.shard import ShardSpec
from replay.writers import FlightWriter

SCHEMA = StepSchema(
    {"observation": Field("observation", "float32", (3,))},
    Field("action", "int64", (2,)),
)
FRAMES = StepSchema(
    {
        "observation/frame": Field("observation/frame", "uint8", (64, 64)),
        "observation/state": Field("observation/state", "float64", (2,)),
    },
    Field("action", "int64", (2,)),
)
SECURITY = Security(new_token())  # one run's, for all shards of a test process
FREE = RateLimit.from_min_size(1)
_MIX = np.uint64(0x9E3779B97F4A7C15)


def mixed(number: np.ndarray) -> np.ndarray:
    """A checksum of each number that no other number of a test shares a byte pattern with: int64 (n,)."""
    value = (number.astype(np.uint64) + np.uint64(1)) * _MIX
    value ^= value >> np.uint64(29)
    return (value * _MIX).view(np.int64)


def checked(schema: StepSchema, first: int, count: int, *, episode: int | None = None) -> np.ndarray:
    """Steps `first` … of a lane, whose fields all follow from their number; structured (count,).

    episode: steps of an episode, the first of which is step 0; None: one without an end.
    """
    rows = schema.zeros(count)
    number = np.arange(first, first + count)
    rows["action"] = np.stack([number, mixed(number)], axis=1)
    rows["reward"] = number % 4093
    rows["policy_version"] = number % 8191
    for f in schema.observations:
        column = rows[f.name].reshape(count, -1)
        column[:] = (number % 251)[:, None] + (np.arange(column.shape[1]) % 5)
    if episode is not None:
        rows["is_first"], rows["is_last"] = number % episode == 0, number % episode == episode - 1
    return rows


def number_of(batch: WindowBatch, column: int = 0) -> np.ndarray:
    """Numbers of the steps at a column of the windows, int64 (batch,)."""
    return batch.steps["action"][:, column, 0].copy()


def check_whole(batch: WindowBatch, window: Window, *, episode: int | None = None, settled: bool = False) -> None:
    """Every window is what was written: rows untorn, consecutive, within their episode.

    settled: the steps of whole episodes were there when it was drawn, so that it is as long as it can be.
    """
    number, check = batch.steps["action"][..., 0], batch.steps["action"][..., 1]
    assert (check == mixed(number)).all()
    assert (batch.steps["reward"] == number % 4093).all()
    assert (batch.steps["policy_version"] == number % 8191).all()
    start, column = window.burn_in, np.arange(window.rows)
    real = np.zeros(len(batch), np.int32) if batch.burn_in is None else batch.burn_in
    offset = np.clip(column - start, -real[:, None], batch.length[:, None])
    expected = number[:, start : start + 1] + offset
    assert (number == expected).all()
    if episode is not None:
        assert (expected // episode == number[:, start : start + 1] // episode).all()
        most = np.minimum(window.length, episode - 1 - number[:, start] % episode)
        assert (batch.length == most).all() if settled else ((batch.length >= 1) & (batch.length <= most)).all()
    if window.observations == "all":
        seen = batch.steps["observation"][..., 0] if "observation" in (batch.steps.dtype.names or ()) else None
        assert seen is None or (seen == number % 251).all()


def spec_of(directory: str | Path, **changes: object) -> ShardSpec:
    """Settings of one shard; a limit for each table unless given."""
    tables = changes.get("tables", (TableSpec(),))
    assert isinstance(tables, tuple)
    values: dict[str, object] = {
        "schema": SCHEMA.to_json(),
        "run": "test",
        "index": 0,
        "capacity": 4096,
        "segment_steps": 64,
        "seed": 0,
        "directory": str(directory),
        "tables": tables,
        "limits": (FREE,) * len(tables),
        **changes,
    }
    return ShardSpec(**values)  # type: ignore[arg-type]


@contextmanager
def shards(spec: ShardSpec, count: int) -> Iterator[list[ShardProcess]]:
    """Processes of `count` shards with these settings; the first holds the limiters."""
    running: list[ShardProcess] = []
    try:
        for index in range(count):
            first = running[0].address if running else None
            running.append(ShardProcess(replace(spec, index=index, limiter_address=first), SECURITY))
        yield running
    finally:
        for process in running:
            process.close()


def connect(address: str) -> flight.FlightClient:
    return flight_client(address, SECURITY)


def writer_to(address: str, schema: StepSchema = SCHEMA, **settings: object) -> FlightWriter:
    return FlightWriter(address, schema, connect=connect, **settings)  # type: ignore[arg-type]


def write(writer: FlightWriter, rows: np.ndarray, *, lane: int = 0) -> None:
    """Append steps of one lane, and wait until they are stored."""
    writer.append(np.full(len(rows), lane, np.int32), rows)
    writer.flush()


def addresses(processes: Sequence[ShardProcess]) -> list[str]:
    return [process.address for process in processes]


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
