"""A shard's steps in a file and back."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from replay import snapshot
from replay.limiter import RateLimiter
from replay.schema import Field, SchemaError, StepSchema
from replay.server import ShardServer
from replay.shard import Shard
from replay.writers import CallWriter, FlightWriter

from .replay_for_tests import FREE, SCHEMA, draw_all, end, joined, make_shard, make_spec, numbered


def write(shard: Shard, lanes: int, count: int, *, episode: int = 13) -> CallWriter:
    writer = CallWriter(shard)
    for k in range(0, count, 10):
        parts = []
        for lane in range(lanes):
            rows = numbered(10, lane * 10_000 + k)
            for last in range(9 - k % episode, 10, episode):
                if last >= 0:
                    end(rows[: last + 1], terminal=lane % 2 == 0)
            parts.append(rows)
        writer.append(np.repeat(np.arange(lanes, dtype=np.int32), 10), joined(*parts))
    return writer


def load(path: Path, *, capacity: int, segment_steps: int = 16) -> tuple[Shard, dict[str, int]]:
    """A fresh shard filled from the file, its limiter's counters set as the owner of the table does."""
    limiter = RateLimiter(samples_per_insert=1.0, min_size=1, error_buffer=FREE)
    shard = make_shard(capacity=capacity, segment_steps=segment_steps, limiter=limiter)
    counters = snapshot.load(shard, path)
    inserted, sampled = counters["inserted"], counters["sampled"]
    limiter.restore(inserted=inserted, sampled=sampled, removed=inserted - shard.items)
    return shard, counters


def contents(shard: Shard, horizon: int = 4) -> list[tuple[bytes, int]]:
    """Every item's window and its length, in an order that does not depend on item ids."""
    windows = draw_all(shard, horizon)
    packed = windows.steps.astype([(f.name, f.dtype, f.shape) for f in SCHEMA.fields])  # padding holds anything
    return sorted((w.tobytes(), int(n)) for w, n in zip(packed, windows.length, strict=True))


def test_a_loaded_shard_holds_the_same_items_with_its_lanes_closed(tmp_path: Path) -> None:
    shard = make_shard(capacity=1024, segment_steps=16)
    writer = write(shard, lanes=5, count=400)  # 2 000 steps: the oldest are gone
    assert shard.stats()["deleted"] > 0
    assert shard.sample(77, 1, timeout_s=0.0) is not None
    counters = snapshot.save(shard, tmp_path / "shard.arrow")
    assert counters == {"inserted": shard.stats()["inserted"], "sampled": 77}

    fresh, loaded = load(tmp_path / "shard.arrow", capacity=1024)
    assert loaded == counters
    stats = fresh.stats()
    assert (stats["inserted"], stats["sampled"], stats["items"]) == (counters["inserted"], 77, shard.items)
    assert stats["deleted"] == stats["inserted"] - stats["items"]
    assert stats["writers"] == 0
    writer.close()  # so that the first shard's lanes end like those of the loaded one
    assert contents(fresh) == contents(shard)
    # And it goes on: new lanes, new steps, the old ones evicted first.
    write(fresh, lanes=5, count=100)
    assert fresh.stats()["inserted"] > counters["inserted"]
    with pytest.raises(ValueError, match=r"holds \d+ steps; only an empty one can be restored"):
        snapshot.load(fresh, tmp_path / "shard.arrow")


@pytest.mark.parametrize("segment_steps", [8, 24])
def test_a_smaller_shard_keeps_the_newest(tmp_path: Path, segment_steps: int) -> None:
    shard = make_shard(capacity=1024, segment_steps=16)
    write(shard, lanes=3, count=200).close()
    snapshot.save(shard, tmp_path / "shard.arrow")
    small, _ = load(tmp_path / "shard.arrow", capacity=240, segment_steps=segment_steps)
    assert 240 * 0.6 < small.items <= 240
    assert small.stats()["inserted"] == shard.stats()["inserted"]
    assert set(contents(small, 1)) <= set(contents(shard, 1))
    steps = draw_all(small).steps["policy_version"][:, 0]
    for lane in range(3):
        kept = steps[steps // 10_000 == lane] - lane * 10_000
        assert kept.max() >= 197  # 199 and, where an episode ends before it, 198 are no starts
        assert kept.min() > 80


def test_a_snapshot_taken_while_writers_insert_is_whole(tmp_path: Path) -> None:
    shard = make_shard(capacity=2048, segment_steps=16)
    stop = threading.Event()
    failures: list[BaseException] = []

    def insert(first: int) -> None:
        try:
            writer = CallWriter(shard)
            k = first
            while not stop.is_set():
                rows = numbered(7, k)
                if k % 5 == 0:
                    end(rows, terminal=True)
                writer.append(np.zeros(7, np.int32), rows)
                k += 7
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=insert, args=(10**6 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        for n in range(5):
            while shard.stats()["inserted"] < 3000 * (n + 1):
                pass
            path = tmp_path / f"{n}.arrow"
            snapshot.save(shard, path)
            fresh, _ = load(path, capacity=2048)
            assert fresh.items > 0  # how many are recycled meanwhile is up to the scheduler
            windows = draw_all(fresh, horizon=3)
            number = windows.steps["policy_version"].astype(np.int64)  # (items, 4)
            offset = np.minimum(np.arange(4), windows.length[:, None])
            assert (number == number[:, :1] + offset).all()
            ends = windows.steps[np.arange(len(windows)), windows.length]
            assert ((windows.length == 3) | ends["is_last"]).all()
            inner = np.arange(4) < windows.length[:, None]
            assert not windows.steps["is_last"][inner].any()
            # Every step but those cut at a lane's end is as it was written.
            assert (windows.steps["reward"][inner] == number[inner].astype(np.float32) + np.float32(0.125)).all()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def test_another_schema_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    shard = make_shard()
    write(shard, lanes=1, count=20)
    snapshot.save(shard, tmp_path / "shard.arrow")
    other = StepSchema({"observation": Field("observation", "float32", (5,))}, Field("action", "float32", (2,)))
    fresh = make_shard(schema=other)
    with pytest.raises(SchemaError, match=r"holds .*observation/image.*; this run's environment gives .*float32\[5\]"):
        snapshot.load(fresh, tmp_path / "shard.arrow")
    assert fresh.items == fresh.stats()["inserted"] == 0


def test_any_arrow_reader_sees_ordinary_columns(tmp_path: Path) -> None:
    shard = make_shard()
    rows = numbered(30, last=True)
    CallWriter(shard).append(np.zeros(30, np.int32), rows)
    snapshot.save(shard, tmp_path / "shard.arrow")
    with pa.memory_map(str(tmp_path / "shard.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    names = ["observation/state", "observation/image", "action", "reward", "policy_version"]
    assert table.column_names == ["segment", "next_segment", *names, "is_first", "is_last", "is_terminal"]
    assert table.schema.field("observation/state").type == pa.list_(pa.float32(), 3)
    assert table.schema.field("is_last").type == pa.bool_()
    assert table["reward"].to_pylist() == rows["reward"].tolist()
    assert table["observation/image"].to_pylist() == rows["observation/image"].reshape(30, 4).tolist()
    assert table["is_last"].to_pylist() == [False] * 29 + [True]


def test_a_server_starts_from_a_snapshot_and_its_limiter_goes_on(tmp_path: Path) -> None:
    limits = {"samples_per_insert": 2.0, "min_size": 10, "error_buffer": 30.0}
    shard = make_shard(limiter=RateLimiter(**limits))  # type: ignore[arg-type]
    CallWriter(shard).append(np.zeros(25, np.int32), numbered(25))
    assert shard.sample(40, 1, timeout_s=0.0) is not None
    path = tmp_path / "shard.arrow"
    counters = snapshot.save(shard, path)
    server = ShardServer(make_spec(tmp_path, **limits), restore=path)
    server.restore_limiter(**counters, items=server.shard.items)
    assert server.stats()["limiter"] == {"inserted": 24, "sampled": 40, "removed": 0}
    assert server.shard.sample(19, 1, timeout_s=0.0) is None  # 24 · 2 − 40 − 19 < 10 · 2 − 30
    assert server.shard.sample(18, 1, timeout_s=0.0) is not None
    writer = FlightWriter(server.address, SCHEMA)
    writer.append(np.zeros(5, np.int32), numbered(5, 100))
    writer.flush()
    assert server.shard.items == 28
    writer.close()
    server.close()
