"""The processes around a shard in the replay benchmark: a writer and a reader, each a program of its own."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np

from replay.schema import Field, StepSchema, Window, WindowBatch
from replay.security import Security, flight_client
from replay.writers import FlightWriter, LaneWriter
from tests.benchmarks.replay_limits import write_until_closed
from tests.benchmarks.replay_peers import ACTION_DIM, CALL_ROWS, FRAME, OBSERVATION_DIM, STACK, measure, priorities

MODULE = "tests.benchmarks.replay_roles"  # as a program its __name__ is another
TABLE = "steps"
LANES = 64  # environments of the writer; a call brings CALL_ROWS / LANES steps of each
EPISODE_STEPS = {"transition": 1000, "frames": 128}


def schema_of(shape: str) -> StepSchema:
    """The steps of one shape of data; frames are single, and stacked when sampled."""
    if shape == "transition":
        observation = Field("observation", "float32", (OBSERVATION_DIM,))
    else:
        observation = Field("observation", "uint8", FRAME)
    return StepSchema({"observation": observation}, Field("action", "float32", (ACTION_DIM,)))


def episodes(shape: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """One episode of every lane, in calls: lanes int32 (256,), and the rows of each call, structured (256,)."""
    rng = np.random.default_rng(2)
    schema = schema_of(shape)
    per_call = CALL_ROWS // LANES
    calls = []
    for _ in range(EPISODE_STEPS[shape] // per_call):
        rows = schema.zeros(CALL_ROWS)
        if shape == "transition":
            rows["observation"] = rng.standard_normal((CALL_ROWS, OBSERVATION_DIM), np.float32)
        else:
            rows["observation"] = rng.integers(0, 256, (CALL_ROWS, *FRAME), np.uint8)
        rows["action"] = rng.standard_normal((CALL_ROWS, ACTION_DIM), np.float32)
        rows["reward"] = rng.standard_normal(CALL_ROWS, np.float32)
        calls.append(rows)
    calls[0]["is_first"][:LANES] = True
    calls[-1]["is_last"][-LANES:] = True
    return np.tile(np.arange(LANES, dtype=np.int32), per_call), calls


def nbytes_of(batch: WindowBatch) -> int:
    """Bytes of a delivered batch: of all its arrays, with distinct frames only of those there are."""
    columns = [batch.steps, batch.length, batch.item, batch.shard, batch.probability]
    columns += [column for column in (batch.ends, batch.burn_in, batch.frame_index) if column is not None]
    frames = batch.frames.values()
    columns += frames if batch.frame_index is None else [f[: batch.frame_count] for f in frames]
    return sum(column.nbytes for column in columns)


def _writer(case: dict[str, Any]) -> LaneWriter:
    schema = schema_of(case["shape"])
    connect = partial(flight_client, security=Security(case["token"]))
    return LaneWriter([FlightWriter(address, schema, connect=connect) for address in case["addresses"]])


def _fill(case: dict[str, Any]) -> dict[str, Any]:
    """Write so many rows, and close: the table is full, and its lanes are free again."""
    writer = _writer(case)
    lanes, calls = episodes(case["shape"])
    for k in range(-(-case["rows"] // CALL_ROWS)):
        writer.append(lanes, calls[k % len(calls)])
    writer.close()
    return {}


def _insert(case: dict[str, Any]) -> dict[str, Any]:
    """Insert at full speed; the time until all of it is acknowledged counts."""
    writer = _writer(case)
    lanes, calls = episodes(case["shape"])
    done = 0

    def call(k: int) -> None:
        nonlocal done
        writer.append(lanes, calls[k % len(calls)])
        done += 1

    # measure() warms up for a fifth of its time, so what is acknowledged is counted here, from the first call on.
    began = time.perf_counter()
    timing = measure(call, case["seconds"])
    writer.flush()
    timing["calls_per_s"] = done / (time.perf_counter() - began)
    writer.close()
    return {**timing, "nbytes": CALL_ROWS * schema_of(case["shape"]).dtype.itemsize}


def _write(case: dict[str, Any]) -> dict[str, Any]:
    """Insert at a pace until standard input ends."""
    writer = _writer(case)
    lanes, calls = episodes(case["shape"])
    found = write_until_closed(
        lambda k: writer.append(lanes, calls[k % len(calls)]), CALL_ROWS, case["writer_rows_per_s"]
    )
    writer.close()
    return found


def _read(case: dict[str, Any]) -> dict[str, Any]:
    """Sample batches into buffers of this process, with priorities written back where they matter."""
    from replay.layout import TableSpec
    from replay.samplers import stream_sampler

    framed, batch_size = case["shape"] == "frames", case["batch"]
    reader = stream_sampler(
        case["addresses"],
        schema_of(case["shape"]),
        batch_size=batch_size,
        seed=3,
        security=Security(case["token"]),
        window=Window(length=1, stack=STACK if framed else 1, stack_on_device=case["stack_on_device"]),
        table=TableSpec(name=TABLE, selector=case["selector"]),
        prefetch=case["batches_ahead"],
        transport=case["transport"],
    )
    out, fresh = reader.buffers(), priorities()
    latest = reader.sample(30.0, out)

    def call(_: int) -> None:
        nonlocal latest
        latest = reader.sample(30.0, out)
        if case["selector"] == "prioritised":
            reader.update_priorities(latest, fresh(batch_size))

    timing = measure(call, case["seconds"])
    found = {**timing, "nbytes": nbytes_of(latest)}
    began = time.perf_counter()
    reader.close()  # waits until the shards have applied the priorities still on their way
    return {**found, "close_s": time.perf_counter() - began}


ROLES = {"fill": _fill, "insert": _insert, "write": _write, "read": _read}


def main() -> None:
    print(json.dumps(ROLES[sys.argv[1]](json.loads(sys.stdin.readline()))), flush=True)


if __name__ == "__main__":
    main()
