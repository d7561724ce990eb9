"""Queue tables against a plain model, over real Flight, and killed at every point of their work."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.llm import rows as completions
from replay.queue_log import LogError, RingLog, encode
from replay.queue_readers import CallQueueSource, QueueReader
from replay.queue_sampler import QueueSampler, queue_sampler
from replay.queue_spec import QueueSpec
from replay.queue_writers import CallQueueWriter, QueueWriter
from replay.queues import Queue, ReaderReplacedError, WriterEndedError
from replay.schema import SchemaError

from .queue_server_for_tests import QueueServer

ROOT = Path(__file__).parents[1]
SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("group_size", pa.int32()),
        ("policy_version", pa.int32()),
        ("row", pa.int64()),  # no two rows of a test have the same
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("blob", pa.binary()),
    ]
)


def rows(ids: list[int], group: list[int], size: list[int], *, version: int = 0, blob: int = 0) -> pa.RecordBatch:
    """Rows whose every value tells which they are; `blob`: bytes to make each longer by."""
    return pa.record_batch(
        [
            group,
            size,
            [version] * len(ids),
            ids,
            [[i] * (i % 5) for i in ids],
            [[i / 2] * (i % 3) for i in ids],
            [f"row {i}" for i in ids],
            [bytes([i % 256]) * blob for i in ids],
        ],
        schema=SCHEMA,
    )


def whole(group: int, *, size: int = 2, version: int = 0, blob: int = 0) -> pa.RecordBatch:
    """One complete group; its rows are `size * group` and those after."""
    ids = list(range(group * size, group * size + size))
    return rows(ids, [group] * size, [size] * size, version=version, blob=blob)


def check_values(batch: pa.RecordBatch) -> list[int]:
    """The ids of delivered rows, whose other values are found to be theirs."""
    for row in batch.to_pylist():
        i = row["row"]
        assert row["tokens"] == [i] * (i % 5)
        assert row["logprobs"] == [i / 2] * (i % 3)
        assert row["text"] == f"row {i}"
        assert set(row["blob"]) <= {i % 256}
    return list(batch.column("row").to_pylist())


def make_spec(**changes: Any) -> QueueSpec:
    values = {"name": "q", "schema": SCHEMA, "capacity_bytes": 1 << 20, "max_message_bytes": 1 << 18, **changes}
    return QueueSpec(**values)


def opened(spec: QueueSpec, path: Path) -> Queue:
    queue = Queue(spec, path)
    queue.open_reader("reader", "s")
    return queue


def take(queue: Queue, groups: int = 1, **changes: Any) -> list[int] | None:
    """Deliver and acknowledge; the rows' ids."""
    found = queue.deliver("reader", "s", groups=groups, timeout_s=0.0, **changes)
    if found is None:
        return None
    assert queue.acknowledge("reader", found.leases) == 0
    return check_values(found.batch)


# ------------------------------------------------------------------ the model


@dataclass
class Begun:
    key: int
    size: int
    rows: list[int] = field(default_factory=list)
    version: int = 1 << 30
    consumed: int = 0
    leased: int = 0


class Model:
    """What a queue should do, in plain Python."""

    def __init__(self, times: int, lag: int, limit: int) -> None:
        self.times, self.lag, self.limit = times, lag, limit
        self.open: dict[tuple[str, int], Begun] = {}
        self.complete: list[Begun] = []
        self.stale = self.used = self.incomplete = self.consumed = self.delivered = self.delivered_rows = 0

    def waiting(self) -> list[Begun]:
        return [g for g in self.complete if g.consumed + g.leased < self.times]

    def insert(self, writer: str, entries: list[tuple[int, int, list[int], int]]) -> bool:
        new = [key for key, *_ in entries if (writer, key) not in self.open]
        if new and len(self.waiting()) + len(self.open) + len(new) > self.limit:
            return False
        for key, size, ids, version in entries:
            group = self.open.setdefault((writer, key), Begun(key, size))
            group.rows += ids
            group.version = min(group.version, version)
            if len(group.rows) == size:
                self.complete.append(self.open.pop((writer, key)))
        return True

    def deliver(self, count: int, version: int) -> list[Begun] | None:
        picked: list[Begun] = []
        for group in self.waiting():
            if group.version < version - self.lag:
                self.complete.remove(group)
                self.used += group.consumed > 0
                self.stale += group.consumed == 0
            elif len(picked) < count:
                picked.append(group)
            if len(picked) == count:
                break
        if len(picked) < count:
            return None
        for group in picked:
            group.leased += 1
        self.delivered += len(picked)
        self.delivered_rows += sum(group.size for group in picked)
        return picked

    def end_lease(self, group: Begun, used: bool) -> None:
        group.leased -= 1
        if used and any(g is group for g in self.complete):
            group.consumed += 1
            self.consumed += 1
            if group.consumed == self.times:
                self.complete.remove(group)

    def end_writer(self, writer: str) -> None:
        for key in [k for k in self.open if k[0] == writer]:
            del self.open[key]
            self.incomplete += 1


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 2), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=3), st.integers(0, 40)),
        st.tuples(st.just("deliver"), st.integers(1, 4), st.integers(0, 3)),
        st.tuples(st.just("resolve"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("end"), st.integers(0, 2)),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=60)
@given(operations=OPERATIONS, times=st.integers(1, 2), sizes=st.integers(1, 4), seed=st.integers(0, 1 << 20))
def test_a_queue_does_what_the_model_says_and_comes_back_so(
    tmp_path_factory: pytest.TempPathFactory, operations: list[Any], times: int, sizes: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("queue") / "q"
    spec = make_spec(times_sampled=times, max_policy_lag=2, max_waiting_groups=12)
    queue, model = opened(spec, path), Model(times, 2, 12)
    lives, sequences = [0, 0, 0], [-1, -1, -1]
    deliveries: list[tuple[list[int], list[Begun]]] = []
    next_id = version = 0
    for index in range(3):
        queue.connect(f"w{index}.0")
    for operation, *arguments in operations:
        if operation == "insert":
            index, wanted, kib = arguments
            writer = f"w{index}.{lives[index]}"
            parts: dict[int, list[int]] = {}
            order: list[int] = []
            for key, count in wanted:
                begun = model.open.get((writer, key))
                left = sizes + key - (0 if begun is None else len(begun.rows)) - len(parts.get(key, []))
                for _ in range(min(count, left)):
                    parts.setdefault(key, []).append(next_id)
                    order.append(key)
                    next_id += 1
            if not order:
                continue
            # Rows of the groups one after another in turn, not group by group.
            random.Random(seed + next_id).shuffle(order)
            iterators = {key: iter(ids) for key, ids in parts.items()}
            ids = [next(iterators[key]) for key in order]
            batch = rows(ids, order, [sizes + k for k in order], version=version, blob=kib << 10)
            entries = [(k, sizes + k, parts[k], version) for k in dict.fromkeys(order)]
            stats = queue.stats()
            if stats["bytes"] + batch.nbytes + 8192 > spec.capacity_bytes:
                continue  # to block by bytes is tested apart
            expected = model.insert(writer, entries)
            assert queue.insert(writer, sequences[index] + 1, batch, timeout_s=0.0) == expected
            if expected:
                sequences[index] += 1
                assert queue.insert(writer, sequences[index], batch, timeout_s=0.0), "applied before, and not again"
        elif operation == "deliver":
            count, step = arguments
            version += step
            found, expected_groups = (
                queue.deliver("reader", "s", groups=count, version=version, timeout_s=0.0),
                model.deliver(count, version),
            )
            if expected_groups is None:
                assert found is None
            else:
                assert found is not None
                assert check_values(found.batch) == [i for g in expected_groups for i in g.rows]
                assert found.sizes == [g.size for g in expected_groups]
                assert found.versions == [g.version for g in expected_groups]
                deliveries.append((found.leases, expected_groups))
        elif operation == "resolve" and deliveries:
            number, used = arguments
            leases, groups = deliveries.pop(number % len(deliveries))
            assert queue.acknowledge("reader", *((leases, []) if used else ([], leases))) == 0
            assert queue.acknowledge("reader", leases) == len(leases), "a lease ends once"
            for group in groups:
                model.end_lease(group, used)
        elif operation == "reopen":
            queue.close(remove=False)  # all that a killed process would leave
            queue = Queue(spec, path)
            queue.open_reader("reader", "s", [lease for leases, _ in deliveries for lease in leases])
            for index in range(3):
                assert queue.connect(f"w{index}.{lives[index]}") == sequences[index]
        elif operation == "end":
            (index,) = arguments
            writer = f"w{index}.{lives[index]}"
            queue.disconnect(writer, closed=True)
            model.end_writer(writer)
            with pytest.raises(WriterEndedError):
                queue.insert(writer, 99, whole(1), timeout_s=0.0)
            lives[index], sequences[index] = lives[index] + 1, -1
            queue.connect(f"w{index}.{lives[index]}")
        stats = queue.stats()
        assert stats["waiting_groups"] == len(model.waiting())
        assert stats["incomplete_groups"] == len(model.open)
        assert stats["groups"] == len(model.open) + len(model.complete)
        assert stats["rows"] == sum(len(g.rows) for g in [*model.open.values(), *model.complete])
        assert stats["leased_groups"] == sum(len(leases) for leases, _ in deliveries)
        assert (stats["dropped_stale_groups"], stats["dropped_used_groups"]) == (model.stale, model.used)
        assert stats["dropped_incomplete_groups"] == model.incomplete
        assert stats["consumed_groups"] == model.consumed
        assert (stats["delivered_groups"], stats["delivered_rows"]) == (model.delivered, model.delivered_rows)
    queue.close(remove=True)


# ------------------------------------------------------------- one at a time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "q"


def test_a_slow_group_and_a_long_lease_never_block_the_ring(path: Path) -> None:
    spec = make_spec(capacity_bytes=1 << 19, max_message_bytes=1 << 16)
    queue = opened(spec, path)
    queue.connect("slow")
    queue.insert("slow", 0, rows([1_000_000], [7], [2]), timeout_s=0.0)
    queue.connect("fast")
    queue.insert("fast", 0, whole(1), timeout_s=0.0)
    lent = queue.deliver("reader", "s", groups=1, timeout_s=0.0)
    assert lent is not None
    for number in range(2, 402):  # 400 messages of 32 KiB go three times round the ring of 4 MiB
        assert queue.insert("fast", number, whole(number, blob=1 << 14), timeout_s=0.0)
        assert take(queue) == [2 * number, 2 * number + 1]
        if number % 100 == 0:
            queue.close(remove=False)
            queue = Queue(spec, path)
            queue.open_reader("reader", "s", lent.leases)
            assert [queue.connect("slow"), queue.connect("fast")] == [0, number]
    assert queue.acknowledge("reader", [], lent.leases) == 0
    assert take(queue) == [2, 3]
    assert queue.insert("slow", 1, rows([1_000_001], [7], [2]), timeout_s=0.0)
    assert take(queue) == [1_000_000, 1_000_001]
    assert queue.stats()["bytes"] == queue.stats()["rows"] == 0
    queue.close(remove=True)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"max_waiting_groups": 3}, "max_waiting_groups"), ({"max_waiting_rows": 6}, "max_waiting_rows")],
)
def test_a_full_queue_holds_its_writers_back_until_groups_are_taken(
    path: Path, changes: dict[str, int], name: str
) -> None:
    queue = opened(make_spec(**changes), path)
    queue.connect("w")
    for number in range(2):
        assert queue.insert("w", number, whole(number), timeout_s=0.0)
    assert queue.insert("w", 2, rows([4], [2], [2]), timeout_s=0.0)
    assert not queue.insert("w", 3, whole(3), timeout_s=0.0)
    assert name in queue.why("w")
    assert queue.insert("w", 3, rows([5], [2], [2]), timeout_s=0.0), "a group begun can be completed"
    done = threading.Event()

    def insert() -> None:
        assert queue.insert("w", 4, whole(3), timeout_s=30.0)
        done.set()

    thread = threading.Thread(target=insert)
    thread.start()
    try:
        assert not done.wait(0.2)
        assert any(name in text for text in queue.stats()["waiting"])
        assert take(queue) == [0, 1]
        assert done.wait(10.0)
    finally:
        thread.join()
    assert [take(queue), take(queue), take(queue)] == [[2, 3], [4, 5], [6, 7]]


def test_delivered_rows_count_against_the_capacity_until_they_are_acknowledged(path: Path) -> None:
    queue = opened(make_spec(capacity_rows=4), path)
    queue.connect("w")
    assert queue.insert("w", 0, whole(0), timeout_s=0.0)
    assert queue.insert("w", 1, whole(1), timeout_s=0.0)
    found = queue.deliver("reader", "s", groups=1, timeout_s=0.0)
    assert found is not None
    assert not queue.insert("w", 2, whole(2), timeout_s=0.0)
    assert "1 are delivered and not acknowledged" in queue.why("w")
    queue.acknowledge("reader", found.leases)
    assert queue.insert("w", 2, whole(2), timeout_s=0.0)


def test_bytes_hold_back_too_and_say_when_nothing_can_leave(path: Path) -> None:
    queue = opened(make_spec(capacity_bytes=1 << 18, max_message_bytes=1 << 17), path)
    queue.connect("w")
    for number in range(4):
        assert queue.insert("w", number, rows([number], [number], [2], blob=60_000), timeout_s=0.0)
    assert not queue.insert("w", 4, rows([9], [9], [2], blob=60_000), timeout_s=0.0)
    assert "capacity_bytes" in queue.why("w")
    assert "raise it" in queue.why("w"), "only incomplete groups are held"


def test_a_batch_of_rows_takes_whole_groups_and_leaves_the_surplus(path: Path) -> None:
    queue = opened(make_spec(), path)
    queue.connect("w")
    for number, size in enumerate([3, 2, 4]):
        ids = list(range(10 * number, 10 * number + size))
        queue.insert("w", number, rows(ids, [number] * size, [size] * size), timeout_s=0.0)
    found = queue.deliver("reader", "s", rows=4, timeout_s=0.0)
    assert found is not None
    assert (found.sizes, check_values(found.batch)) == ([3, 2], [0, 1, 2, 10, 11])
    assert queue.deliver("reader", "s", rows=5, timeout_s=0.0) is None, "the last group has four"
    part = queue.deliver("reader", "s", rows=5, partial=True, timeout_s=0.0)
    assert part is not None
    assert part.sizes == [4]


def test_a_lost_writer_s_incomplete_groups_are_dropped_and_counted(path: Path) -> None:
    spec = make_spec(lease_s=0.2)
    queue = opened(spec, path)
    for writer in ("lost", "there"):
        queue.connect(writer)
        queue.insert(writer, 0, rows([0, 1, 2], [1, 2, 2], [2, 2, 2]), timeout_s=0.0)
    queue.disconnect("lost", closed=False)
    queue.close(remove=False)
    queue = opened(spec, path)  # a restart in between begins the lease anew, and loses nothing
    queue.connect("there")
    wait_for(lambda: queue.stats()["dropped_incomplete_groups"] == 1)
    assert queue.stats()["dropped_incomplete_rows"] == queue.stats()["incomplete_groups"] == 1
    with pytest.raises(WriterEndedError, match="lease"):
        queue.connect("lost")
    assert queue.insert("there", 1, rows([3], [1], [2]), timeout_s=0.0)
    assert [take(queue), take(queue), take(queue)] == [[1, 2], [1, 2], [0, 3]]


def test_a_lost_reader_s_groups_go_to_others_when_its_lease_ends(path: Path) -> None:
    spec = make_spec(lease_s=0.2)
    queue = opened(spec, path)
    queue.connect("w")
    for number in range(3):
        queue.insert("w", number, whole(number), timeout_s=0.0)
    queue.open_reader("lost", "one")
    lent = queue.deliver("lost", "one", groups=2, timeout_s=0.0)
    assert lent is not None
    queue.close_stream("lost", "one")
    queue.close(remove=False)
    queue = opened(spec, path)  # a restarted shard still knows who has what
    assert take(queue, 2) is None
    wait_for(lambda: queue.stats()["leased_groups"] == 0)
    assert take(queue, 3) == [0, 1, 2, 3, 4, 5], "in their old order"
    assert queue.acknowledge("lost", lent.leases) == 2
    assert queue.stats()["unknown_acknowledgements"] == 2
    with pytest.raises(ReaderReplacedError):
        queue.deliver("lost", "one", groups=1, timeout_s=0.0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pa.record_batch([pa.array([1])], names=["a"]), "expected group: int64.*received a: int64"),
        (rows([], [], []), "received 0"),
        (rows([1, 2], [1, 1], [2, 3]), r"group_size \[2, 3\]"),
        (rows([1], [1], [0]), "above 0"),
        (rows([1, 2, 3], [1, 1, 1], [2, 2, 2]), "has 2 rows.*received 3"),
        (rows([1, 2], [5, 5], [3, 3]), "of which 2 are here; received 2"),
        (rows([1], [5], [4]), "began with group_size 3; received 4"),
        (rows([1], [1], [1], blob=1 << 20), "max_message_bytes"),
        (rows([1], [1], [1 << 30]), "capacity_rows"),
        (rows([1, 2], [1, None], [2, 2]), "'group' has 1 empty"),  # type: ignore[list-item]
    ],
)
def test_a_message_that_does_not_fit_is_refused_and_changes_nothing(
    path: Path, batch: pa.RecordBatch, message: str
) -> None:
    queue = opened(make_spec(), path)
    queue.connect("w")
    queue.insert("w", 0, rows([0, 1], [5, 5], [3, 3]), timeout_s=0.0)
    before = {name: value for name, value in queue.stats().items() if not name.startswith("time/")}
    with pytest.raises(SchemaError, match=message):
        queue.insert("w", 1, batch, timeout_s=0.0)
    assert {name: value for name, value in queue.stats().items() if not name.startswith("time/")} == before
    assert queue.insert("w", 1, rows([2], [5], [3]), timeout_s=0.0)
    assert take(queue) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": pa.schema([("policy_version", pa.int32())])}, "'group'"),
        ({"schema": SCHEMA.remove(1)}, "'group_size'"),
        ({"schema": SCHEMA.append(pa.field("x", pa.list_(pa.string())))}, "'x'"),
        ({"schema": SCHEMA.append(pa.field("x", pa.dictionary(pa.int8(), pa.string())))}, "'x'"),
        ({"times_sampled": 0}, "times_sampled"),
        ({"group_size": 8, "max_waiting_rows": 4}, "block forever"),
        ({"max_message_bytes": 1 << 30}, "max_message_bytes"),
        ({"max_policy_lag": -1}, "max_policy_lag"),
        *(
            ({"name": name}, r"letters, digits and underscores, received '")
            for name in ("", "a/b", "../b", "a b", "a\n")
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_spec(**changes)


def test_settings_travel_as_json_and_impossible_batches_are_refused() -> None:
    spec = make_spec(max_waiting_groups=4, capacity_rows=100, max_policy_lag=3)
    assert QueueSpec.from_json(spec.to_json()) == spec
    for wanted in ({"groups": 5, "rows": None}, {"groups": None, "rows": 101}, {"groups": 1, "rows": 1}):
        with pytest.raises(ValueError, match=r"never fill|groups or of rows"):
            spec.check_batch(**wanted)


def test_string_groups_and_a_fixed_group_size(path: Path) -> None:
    schema = pa.schema([("group", pa.string()), ("policy_version", pa.int32())])
    queue = opened(make_spec(schema=schema, group_size=2), path)
    writer = CallQueueWriter(queue)
    writer.append(pa.record_batch([["a", "b", "b"], [1, 2, 3]], schema=schema))
    writer.append(pa.record_batch([["a"], [4]], schema=schema))
    found = queue.deliver("reader", "s", groups=2, timeout_s=0.0)
    assert found is not None
    assert found.batch.to_pydict() == {"group": ["b", "b", "a", "a"], "policy_version": [2, 3, 1, 4]}
    writer.close()


def test_a_file_of_another_queue_or_in_use_or_damaged_is_refused(path: Path) -> None:
    queue = opened(make_spec(), path)
    with pytest.raises(OSError, match="in use"):
        Queue(make_spec(), path)
    queue.connect("w")
    queue.insert("w", 0, whole(0), timeout_s=0.0)
    queue.close(remove=False)
    with pytest.raises(LogError, match="other columns or group size"):
        Queue(make_spec(group_size=3), path)
    with pytest.raises(LogError, match="expected 5246976 bytes, found 4198400"):
        Queue(make_spec(capacity_bytes=1 << 21), path)
    with path.open("r+b") as file:
        file.seek(4096 + 200)
        file.write(b"\xff\xff")
    with pytest.raises(LogError, match="damaged"):
        Queue(make_spec(), path)


def test_a_file_removed_while_it_was_waited_for_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what is then written would lie in a file that nobody finds."""
    first = Queue(make_spec(), path)
    monkeypatch.setattr("fcntl.flock", closes_first(first))
    second = opened(make_spec(), path)
    assert path.exists()
    second.connect("w")
    second.insert("w", 0, whole(0), timeout_s=0.0)
    second.close(remove=False)
    assert take(opened(make_spec(), path)) == [0, 1]


def closes_first(queue: Queue) -> Callable[[int, int], None]:
    """`flock` that lets the queue be closed and removed between its caller's opening the file and locking it."""
    flock = fcntl.flock

    def locked(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            queue.close(remove=True)
        flock(fd, operation)

    return locked


def test_a_disk_without_room_is_an_error_that_says_what_is_needed(path: Path) -> None:
    with pytest.raises(OSError, match="MiB free and the queue needs") as caught:
        Queue(make_spec(capacity_bytes=1 << 55), path)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()


def test_a_commit_is_whole_or_not_there(path: Path) -> None:
    """Records written behind the last commit, and a torn commit record in the other slot, say nothing."""
    log = RingLog(path, size=4096, identity=b"")
    log.append(1, 0, encode({"a": 1}), b"one")
    log.commit([1] * 16)
    log.append(1, 1, encode({"a": 2}), b"two")
    log._bytes[1024:1100] = bytes(76)  # the slot of the third commit, not published
    log.close(remove=False)
    again = RingLog(path, size=4096, identity=b"")
    assert [again.read(r)[0] for r in again.records] == [{"a": 1}]
    assert again.counters == [1] * 16
    again.close(remove=True)


# --------------------------------------------------------------------- Flight


def wait_for(true: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def served(path: Path, **changes: Any) -> Iterator[tuple[Queue, str]]:
    queue = Queue(make_spec(**changes), path)
    server = QueueServer({"q": queue})
    try:
        yield queue, server.address
    finally:
        server.close()
        queue.close(remove=True)


def test_rows_travel_both_ways_and_a_writer_in_front_waits(path: Path) -> None:
    with served(path, max_waiting_groups=4) as (queue, address):
        writer = QueueWriter(address, SCHEMA, table="q", in_flight=2)
        done = threading.Event()

        def write() -> None:
            for number in range(40):
                writer.append(whole(number))
            writer.flush()
            done.set()

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        wait_for(lambda: "max_waiting_groups is 4" in (writer.waiting_for or ""))
        assert not done.is_set()
        assert queue.stats()["groups"] == 4
        sampler = queue_sampler([address], SCHEMA, table="q", groups=4)
        for number in range(10):
            batch = sampler.sample(10.0, version=0)
            assert check_values(batch.rows) == list(range(8 * number, 8 * number + 8))
            sampler.acknowledge(batch)
        sampler.flush()
        assert done.wait(10.0)
        thread.join()
        assert queue.stats()["consumed_groups"] == 40
        with pytest.raises(TimeoutError, match="writers of queue 'q' to complete 4 groups"):
            sampler.sample(0.8)
        sampler.close()
        writer.close()
        wait_for(lambda: queue.stats()["writers"] == queue.stats()["readers"] == 0)


def test_stale_groups_drawn_ahead_are_given_back_and_dropped(path: Path) -> None:
    with served(path, max_policy_lag=1) as (queue, address):
        writer = QueueWriter(address, SCHEMA, table="q")
        for number in range(8):
            writer.append(whole(number, version=number // 2))
        writer.flush()
        sampler = queue_sampler([address], SCHEMA, table="q", groups=2, prefetch=4)
        assert check_values(sampler.sample(10.0, version=0).rows) == [0, 1, 2, 3]
        # The rest lies here already; only versions 3 and later may be used at version 4.
        batch = sampler.sample(10.0, version=4)
        assert batch.versions == [3, 3]
        assert check_values(batch.rows) == [12, 13, 14, 15]
        sampler.acknowledge(batch)
        sampler.flush()
        # What was given back while the shard still served version 0 has come once more, and is given back by the next call.
        for _ in range(100):
            if queue.stats()["dropped_stale_groups"] == 4:
                break
            with pytest.raises(TimeoutError):
                sampler.sample(0.1, version=4)
        assert queue.stats()["dropped_stale_groups"] == 4
        assert queue.stats()["consumed_groups"] == 2
        sampler.close()
        writer.close()


def test_a_reader_that_closes_or_is_cut_off_gives_back_what_it_did_not_acknowledge(path: Path) -> None:
    with served(path) as (queue, address):
        writer = CallQueueWriter(queue)
        for number in range(6):
            writer.append(whole(number))
        first = QueueReader(address, SCHEMA, table="q", groups=2, prefetch=2)
        used, held = first.take(10.0), first.take(10.0)
        assert used is not None
        assert held is not None
        first.acknowledge(used.leases)
        first.flush()
        first.flush()
        assert queue.stats()["consumed_groups"] == 2
        first.close()
        assert queue.stats()["leased_groups"] == 0
        second = QueueReader(address, SCHEMA, table="q", groups=4)
        found = second.take(10.0)
        assert found is not None
        assert check_values(found.batch) == [4, 5, 6, 7, 8, 9, 10, 11]
        second.close()


def test_a_killed_sampler_s_and_learner_s_leases_end(path: Path) -> None:
    """A process that writes half a group and holds a delivery is killed: the half is dropped, the delivery comes again."""
    code = (
        "import sys; from tests.test_replay_queues import *\n"
        "writer = QueueWriter(sys.argv[1], SCHEMA, table='q'); writer.append(rows([8], [9], [2])); writer.flush()\n"
        "assert QueueReader(sys.argv[1], SCHEMA, table='q', groups=2, prefetch=1).take(10.0)\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with served(path, lease_s=0.3) as (queue, address):
        writer = CallQueueWriter(queue)
        for number in range(3):
            writer.append(whole(number))
        command = [sys.executable, "-c", code, address]
        child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert (queue.stats()["incomplete_groups"], queue.stats()["leased_groups"]) == (1, 2)
        child.kill()
        child.communicate()
        reader = QueueReader(address, SCHEMA, table="q", groups=3)
        found = reader.take(30.0)
        assert found is not None
        assert check_values(found.batch) == [0, 1, 2, 3, 4, 5]
        wait_for(lambda: queue.stats()["dropped_incomplete_rows"] == 1)
        reader.close()


def test_groups_of_two_shards_come_oldest_first(tmp_path: Path) -> None:
    with served(tmp_path / "a") as (one, a), served(tmp_path / "b") as (two, b):
        writers = [CallQueueWriter(one), CallQueueWriter(two)]
        rng = random.Random(3)
        for number in range(120):
            writers[rng.random() < 0.8].append(whole(number))
            time.sleep(0.0002)  # to be told apart in microseconds
        sampler = queue_sampler([a, b], SCHEMA, table="q", groups=8)
        seen = []
        for _ in range(15):
            batch = sampler.sample(10.0)
            seen += batch.rows.column("group").to_pylist()[::2]
            sampler.acknowledge(batch)
        sampler.flush()
        assert sorted(seen) == list(range(120))
        assert max(abs(place - group) for place, group in enumerate(seen)) <= 8
        assert one.stats()["consumed_groups"] + two.stats()["consumed_groups"] == 120
        sampler.close()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_group_sampled_twice_is_in_two_batches(tmp_path: Path, shards: int) -> None:
    """Though a shard with few groups delivers the same one again before the batch is full."""
    queues = [Queue(make_spec(times_sampled=2, max_policy_lag=0), tmp_path / str(i)) for i in range(shards)]
    sampler = QueueSampler([CallQueueSource(q, groups=1, partial=True) for q in queues], groups=3)
    writers = [CallQueueWriter(queue) for queue in queues]
    writers[0].append(whole(0))
    writers[-1].append(whole(1))
    with pytest.raises(TimeoutError):
        sampler.sample(0.1)
    for number in range(2, 7):
        writers[number % shards].append(whole(number))
    seen = []
    for _ in range(4):
        batch = sampler.sample(1.0)
        groups = batch.rows.column("group").to_pylist()[::2]
        assert len(set(groups)) == 3
        assert batch.sizes == [2, 2, 2]
        seen += groups
        sampler.acknowledge(batch)
    assert sum(queue.stats()["consumed_groups"] for queue in queues) == 12
    assert all(seen.count(group) <= 2 for group in range(7))
    with pytest.raises(TimeoutError):
        sampler.sample(0.0)  # two deliveries are left
    sampler.close()


def test_a_group_that_was_used_and_then_grows_too_old_is_no_stale_one(path: Path) -> None:
    spec = make_spec(times_sampled=2, max_policy_lag=0)
    queue = opened(spec, path)
    writer = CallQueueWriter(queue)
    writer.append(whole(0, version=1))
    assert take(queue, version=1) == [0, 1]
    writer.append(whole(1, version=1))
    queue.close(remove=False)  # all that a killed process would leave
    queue = opened(spec, path)
    assert take(queue, version=2) is None
    counts = {name: value for name, value in queue.stats().items() if name.startswith("dropped") and value}
    assert counts == {
        "dropped_used_groups": 1,
        "dropped_used_rows": 2,
        "dropped_stale_groups": 1,
        "dropped_stale_rows": 2,
    }
    queue.close(remove=False)
    queue = opened(spec, path)
    assert queue.stats()["dropped_used_groups"] == 1
    queue.close(remove=True)


def test_what_the_shard_refuses_surfaces_at_the_client(path: Path) -> None:
    with served(path) as (queue, address):
        with pytest.raises(flight.FlightServerError, match="no queue 'other'"):
            QueueWriter(address, SCHEMA, table="other")
        with pytest.raises(flight.FlightServerError, match="expected"):
            QueueWriter(address, SCHEMA.remove(6), table="q")
        writer = QueueWriter(address, SCHEMA, table="q")
        writer.append(rows([1, 2], [1, 1], [1, 1]))
        with pytest.raises(flight.FlightServerError, match="has 1 rows"):
            writer.flush()
        reader = QueueReader(address, SCHEMA, table="q", groups=1, rows=1)
        with pytest.raises(flight.FlightServerError, match="groups or of rows"):
            reader.take(10.0)
        reader.close()
        other = QueueReader(address, SCHEMA.remove(6), table="q", groups=1)
        with pytest.raises(SchemaError, match="do not fit"):
            other.take(10.0)
        other.close()
        assert queue.stats()["rows"] == 0


def test_calls_in_one_process(path: Path) -> None:
    queue = Queue(make_spec(max_waiting_groups=2), path)
    writer, sampler = CallQueueWriter(queue), QueueSampler([CallQueueSource(queue, groups=2)], groups=2)
    writer.append(whole(0))
    with pytest.raises(TimeoutError, match="1 groups of 2 rows wait"):
        sampler.sample(0.0)
    writer.append(whole(1))
    with pytest.raises(RuntimeError, match="max_waiting_groups"):
        writer.append(whole(2))
    batch = sampler.sample(0.0, version=3)
    writer.append(whole(2))
    assert check_values(batch.rows) == [0, 1, 2, 3]
    sampler.acknowledge(batch)
    sampler.close()
    assert queue.stats()["consumed_rows"] == 4
    assert queue.stats()["waiting_groups"] == 1


# ------------------------------------------------------------------- kill -9


class Served:
    """A server process that comes back on its port, each time to die at the next of some faults."""

    def __init__(self, spec: QueueSpec, path: Path, faults: list[str]) -> None:
        self._spec, self._path, self._faults = spec, path, list(faults)
        self.port, self.deaths = 0, 0
        self._closing = False
        self._next = self._spawn()
        self._start()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _spawn(self) -> subprocess.Popen[str]:
        """A process that has everything imported when it is needed."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.queue_server_for_tests"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MILLRACE_FAULT": self._faults.pop(0) if self._faults else ""},
        )

    def _start(self) -> None:
        self._child, self._next = self._next, self._spawn()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        given = {"spec": self._spec.to_json(), "path": str(self._path), "port": self.port}
        self._child.stdin.write(json.dumps(given) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        assert line, "the server did not start"
        self.port = int(line)

    def _watch(self) -> None:
        while not self._closing:
            if self._child.poll() is None:
                time.sleep(0.005)
                continue
            assert self._child.returncode == -signal.SIGKILL
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                pipe.close()
            self._start()
            self.deaths += 1

    def kill(self) -> None:
        self._child.kill()

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        for child in (self._child, self._next):
            child.kill()
            child.communicate()


def run_under_faults(
    path: Path, faults: list[str], kills: int, *, seed: int, spec: QueueSpec
) -> tuple[dict[str, Any], int]:
    """Three writers and two readers over a server that dies; what was acknowledged is checked, its last statistics returned."""
    server = Served(spec, path, faults)
    address = f"grpc://127.0.0.1:{server.port}"
    stop, rng = threading.Event(), random.Random(seed)
    inserted: list[list[int]] = [[], []]
    consumed: list[list[int]] = [[], []]
    failures: list[BaseException] = []

    def write(index: int) -> None:
        writer = QueueWriter(address, SCHEMA, table="q", in_flight=3)
        group = index
        while not stop.is_set():
            ids = [4 * group, 4 * group + 1, 4 * group + 2]
            for part in (ids[:2], ids[2:]) if group % 3 else (ids,):  # in one message, or in two
                writer.append(rows(part, [group] * len(part), [3] * len(part), blob=5000))
            inserted[index] += ids
            group += 2
        writer.flush()
        writer.close()

    def read(index: int) -> None:
        sampler = queue_sampler([address], SCHEMA, table="q", groups=3)
        while True:
            try:
                batch = sampler.sample(0.5)
            except TimeoutError:
                if stop.is_set() and not any(w.is_alive() for w in writers):
                    break
                continue
            groups = batch.rows.column("group").to_pylist()
            assert groups == [g for g in groups[::3] for _ in range(3)], "groups are whole"
            consumed[index] += check_values(batch.rows)
            sampler.acknowledge(batch)
        sampler.flush()
        sampler.close()

    def write_slowly(index: int) -> None:
        """One group that is open all the time, so that its message is moved again and again."""
        writer = QueueWriter(address, SCHEMA, table="q", name="slow")
        ids = [-1, -2, -3]
        writer.append(rows(ids[:1], [-1], [3]))
        stop.wait()
        writer.append(rows(ids[1:], [-1, -1], [3, 3]))
        inserted[index] += ids
        writer.flush()
        writer.close()

    def guarded(call: Any, index: int) -> None:
        try:
            call(index)
        except BaseException as error:
            failures.append(error)
            stop.set()

    writers = [threading.Thread(target=guarded, args=(write, i), daemon=True) for i in range(2)]
    writers.append(threading.Thread(target=guarded, args=(write_slowly, 0), daemon=True))
    readers = [threading.Thread(target=guarded, args=(read, i), daemon=True) for i in range(2)]
    try:
        for thread in writers + readers:
            thread.start()
        deadline = time.monotonic() + 120.0
        wait_for(lambda: failures or server.deaths >= len(faults), 120.0)
        for _ in range(kills):
            time.sleep(rng.uniform(0.05, 0.3))
            before = server.deaths
            server.kill()
            wait_for(lambda before=before: server.deaths > before)
        stop.set()
        for thread in writers + readers:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert failures == []
        with flight.FlightClient(address) as client:
            (answer,) = client.do_action(flight.Action("stats", b'{"queue": "q"}'))
            stats = json.loads(answer.body.to_pybytes())
    finally:
        stop.set()
        server.close()
    left = Queue(spec, path)
    left.open_reader("last", "s")
    found = left.deliver("last", "s", groups=16, partial=True, timeout_s=0.0)
    rest = [] if found is None else check_values(found.batch)
    everything = sorted(consumed[0] + consumed[1] + rest)
    assert everything == sorted(inserted[0] + inserted[1]), "nothing lost, nothing doubled"
    assert stats["inserted_rows"] == len(everything)
    assert stats["consumed_rows"] == len(consumed[0] + consumed[1])
    return stats, server.deaths


INSERT = [f"queue.insert.{where}:7" for where in ("rows", "record", "commit", "reply")]
DELIVER = [f"queue.deliver.{where}:5" for where in ("rows", "record", "commit", "reply")]
CONSUME = [f"queue.consume.{where}:3" for where in ("rows", "record", "commit", "reply")]
MOVE = [f"queue.move.{where}:1" for where in ("rows", "record", "commit")]
TIGHT = {"capacity_bytes": 1 << 18, "max_message_bytes": 1 << 16, "max_waiting_groups": 16}
LLM = QueueSpec(
    name="q",
    schema=completions.SCHEMA,
    times_sampled=2,
    max_policy_lag=2,
    max_waiting_groups=6,
    capacity_bytes=1 << 18,
    max_message_bytes=1 << 16,
)


def completions_of(group: int, version: int) -> pa.RecordBatch:
    """A whole group of 4 completions whose every value tells which it is."""
    return completions.to_rows(
        [
            completions.Completion(
                group=group,
                index=index,
                task=group % 7,
                family=f"{group % 3} numbers",
                seed=4 * group + index,
                prompt=np.full(group % 5, group, np.int32),
                tokens=np.arange((group + index) % 9, dtype=np.int32) + group,
                log_probs=-np.arange((group + index) % 9, dtype=np.float32),
                kept=np.zeros((group + index) % 9, np.float32),
                versions=np.full((group + index) % 9, version, np.int32),
                finish=("stop", "length")[index % 2],
                reward=index / 2,
                passed=index > 1,
                reason="x" * (group % 300),
            )
            for index in range(4)
        ]
    )


def test_groups_of_completions_over_two_shards_that_are_killed(tmp_path: Path) -> None:
    """Each sampled twice, within bounded staleness, by writers that are held back: all is accounted for."""
    paths = [tmp_path / "a", tmp_path / "b"]
    faults = [[INSERT[0], INSERT[2], DELIVER[3]], [CONSUME[1], CONSUME[3], DELIVER[1]]]
    servers = [Served(LLM, path, points) for path, points in zip(paths, faults, strict=True)]
    addresses = [f"grpc://127.0.0.1:{server.port}" for server in servers]
    stop = threading.Event()
    inserted: list[list[int]] = [[], []]
    used: Counter[int] = Counter()
    learner_version = 0
    failures: list[BaseException] = []

    def write(index: int) -> None:
        rng = random.Random(index)
        writer = QueueWriter(addresses[index], LLM.schema, table="q", in_flight=2)
        group = index
        while not stop.is_set():
            writer.append(completions_of(group, max(0, learner_version - rng.randrange(4))))  # some are too old
            inserted[index].append(group)
            group += 2
        writer.flush()
        writer.close()

    def read() -> None:
        nonlocal learner_version
        sampler = queue_sampler(addresses, LLM.schema, table="q", groups=4)
        while True:
            try:
                batch = sampler.sample(1.0, version=learner_version)
            except TimeoutError:
                if stop.is_set() and not any(writer.is_alive() for writer in writers):
                    break
                continue
            groups = batch.rows.column("group").to_pylist()[::4]
            assert len(set(groups)) == 4, "a group is in a batch once"
            for place, (group, version) in enumerate(zip(groups, batch.versions, strict=True)):
                assert version >= learner_version - 2
                expected = completions_of(group, 0).drop_columns(["versions", "policy_version"])
                assert batch.rows.slice(4 * place, 4).drop_columns(["versions", "policy_version"]).equals(expected)
            sampler.acknowledge(batch)
            used.update(groups)
            learner_version += sum(used.values()) % 3 == 0
        sampler.flush()
        sampler.close()

    def guarded(call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as error:
            failures.append(error)
            stop.set()

    writers = [threading.Thread(target=guarded, args=(write, i), daemon=True) for i in range(2)]
    reader = threading.Thread(target=guarded, args=(read,), daemon=True)
    try:
        for thread in (*writers, reader):
            thread.start()
        wait_for(lambda: failures or all(server.deaths >= 3 for server in servers), 120.0)
        for server in servers:
            before = server.deaths
            server.kill()
            wait_for(lambda server=server, before=before: server.deaths > before)
        stop.set()
        for thread in (*writers, reader):
            thread.join(60.0)
            assert not thread.is_alive()
    finally:
        stop.set()
        for server in servers:
            server.close()
    assert failures == []
    queues = [Queue(LLM, path) for path in paths]
    stats = [queue.stats() for queue in queues]
    total = Counter({name: sum(found[name] for found in stats) for name in stats[0] if name.endswith("_groups")})
    everything = {*inserted[0], *inserted[1]}
    left = {}
    for queue in queues:
        copy = queue.copy()
        groups = [group for batch in copy.batches for group in batch.column("group").to_pylist()[::4]]
        left.update({group: known.consumed for group, known in zip(groups, copy.groups, strict=True)})
    dropped = everything - left.keys() - {group for group, times in used.items() if times == 2}
    assert max(used.values()) == 2
    assert used.keys() <= everything
    assert left == {group: used[group] for group in left}, "what is consumed is what was acknowledged"
    assert total["inserted_groups"] == len(everything) == len(inserted[0] + inserted[1])
    assert total["dropped_stale_groups"] + total["dropped_used_groups"] == len(dropped) > 0
    assert total["dropped_used_groups"] <= len(dropped & used.keys())
    assert total["dropped_stale_groups"] >= len(dropped - used.keys())
    assert total["incomplete_groups"] == total["dropped_incomplete_groups"] == 0, (
        "a message is there whole or not at all"
    )
    late = sum(used.values()) - total["consumed_groups"]  # acknowledged when the group's other delivery was too old
    assert 0 <= late <= sum(used[group] for group in dropped)
    assert total["delivered_groups"] >= sum(used.values())


def test_killed_at_every_point_it_loses_and_doubles_nothing(path: Path) -> None:
    run_under_faults(path, INSERT + DELIVER[2:] + CONSUME, 0, seed=0, spec=make_spec(**TIGHT))


@pytest.mark.slow
def test_killed_while_it_moves_records_and_at_random_moments(path: Path) -> None:
    _, deaths = run_under_faults(path, MOVE + DELIVER[:2], 40, seed=1, spec=make_spec(**TIGHT))
    assert deaths == len(MOVE) + 2 + 40


def test_a_fault_is_named_or_refused() -> None:
    code = "from replay.faults import fault\nfor _ in range(3): fault('a')\nfault('b')\nprint('alive')"

    def ends(variable: str) -> tuple[int, str]:
        environment = {**os.environ, "MILLRACE_FAULT": variable}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert ends("") == ends("a:4") == ends("c:1") == (0, "alive\n")
    assert ends("a:3") == (-signal.SIGKILL, "")
    assert "expected '<point>:<n>'" in ends("a")[1]
