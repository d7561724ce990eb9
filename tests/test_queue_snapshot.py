"""Snapshots of queue tables: what comes back from one, in which order, and what is refused."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.queue_readers import CallQueueSource
from replay.queue_sampler import QueueSampler
from replay.queue_snapshot import queue_files, restore_queue, save_queue
from replay.queue_spec import QueueSpec
from replay.queues import Queue
from replay.schema import SchemaError
from replay.snapshot import SnapshotError

ROOT = Path(__file__).parents[1]
SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),
        pa.field("group_size", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("text", pa.string()),
    ]
)
COUNTERS = tuple(f"{what}_{unit}" for what in ("inserted", "delivered", "consumed", "dropped_stale", "dropped_incomplete") for unit in ("rows", "groups"))  # fmt: skip


def rows(group: int, count: int, size: int, *, version: int = 0, tokens: int = 3) -> pa.RecordBatch:
    columns = [
        [group] * count,
        [size] * count,
        [version] * count,
        [[group] * tokens] * count,
        [f"row of {group}"] * count,
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def make_spec(**changes: Any) -> QueueSpec:
    return QueueSpec(**{"name": "q", "schema": SCHEMA, "capacity_bytes": 1 << 20, **changes})


def new_queue(path: Path, groups: int = 0, *, first: int = 0, size: int = 2, **changes: Any) -> Queue:
    """A queue with a reader "r", and whole groups of a writer "w"."""
    queue = Queue(make_spec(**changes), path)
    queue.open_reader("r", "s")
    queue.connect("w")
    for number in range(groups):
        assert queue.insert("w", number, rows(first + number, size, size), timeout_s=0.0)
    return queue


def deliver(queue: Queue, groups: int = 1) -> tuple[list[int], list[int]]:
    """Leases, and the numbers of the groups."""
    found = queue.deliver("r", "s", groups=groups, timeout_s=0.0)
    assert found is not None
    assert found.batch.column("tokens").to_pylist() == [[g] * 3 for g in found.batch.column("group").to_pylist()]
    ends = [sum(found.sizes[: i + 1]) - 1 for i in range(groups)]
    return found.leases, [found.batch.column("group")[i].as_py() for i in ends]


def rest(queue: Queue) -> list[int]:
    """The groups of all deliveries that are left, one by one."""
    found = []
    while queue.waiting_groups:
        leases, groups = deliver(queue)
        queue.acknowledge("r", leases)
        found += groups
    return found


def counters(queue: Queue) -> dict[str, int]:
    stats = queue.stats()
    return {name: stats[name] for name in COUNTERS}


def test_a_snapshot_restores_the_consumed_frontier(tmp_path: Path) -> None:
    queue = new_queue(tmp_path / "q", 5, times_sampled=2)
    queue.insert("w", 5, rows(9, 1, 2), timeout_s=0.0)  # incomplete
    for _ in range(2):
        leases, _ = deliver(queue, 2)
        queue.acknowledge("r", leases)  # 0 and 1, twice
    leases, groups = deliver(queue, 1)
    queue.acknowledge("r", leases)  # 2, once
    held, groups = deliver(queue, 2)  # 2 for the second time and 3 for the first, not acknowledged
    assert groups == [2, 3]
    saved = save_queue(queue, tmp_path)
    assert (saved["groups"], saved["rows"]) == (3, 6)
    assert saved["bytes"] == (tmp_path / "q-0.arrow").stat().st_size
    assert queue.acknowledge("r", held) == 0, "the queue goes on"

    again = new_queue(tmp_path / "again", times_sampled=2)
    assert again.empty
    assert restore_queue(again, queue_files(tmp_path, "q")) == 3
    assert not again.empty
    expected = {
        "inserted_rows": 11, "inserted_groups": 5, "delivered_rows": 14, "delivered_groups": 7, "consumed_rows": 10,
        "consumed_groups": 5, "dropped_stale_rows": 0, "dropped_stale_groups": 0, "dropped_incomplete_rows": 1,
        "dropped_incomplete_groups": 1,
    }  # fmt: skip
    assert counters(again) == expected == {name: saved[name] for name in COUNTERS}
    again.close(remove=False)  # all that a killed process would leave
    again = new_queue(tmp_path / "again", times_sampled=2)
    assert counters(again) == expected
    assert rest(again) == [2, 3, 3, 4, 4]
    assert again.insert("w", 0, rows(7, 2, 2), timeout_s=0.0)
    assert rest(again) == [7, 7]


@settings(max_examples=40)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["insert", "deliver", "use", "return"]), st.integers(1, 3)), max_size=30),
    times=st.integers(1, 3),
    shards=st.integers(1, 3),
    count=st.integers(1, 4),
)
def test_restored_shards_deliver_what_the_saved_ones_would_have(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], times: int, shards: int, count: int
) -> None:
    """Whatever had happened: the same groups as often, in the order of their completion on every shard."""
    folder = tmp_path_factory.mktemp("queues")
    queues = [new_queue(folder / f"old{i}", times_sampled=times) for i in range(shards)]
    sequences = [0] * shards
    lent: list[tuple[Queue, int]] = []
    for number, (step, amount) in enumerate(steps):
        place = number % shards
        queue = queues[place]
        if step == "insert":
            for _ in range(amount):
                batch = rows(1000 * number + sequences[place], amount, amount)
                assert queue.insert("w", sequences[place], batch, timeout_s=0.0)
                sequences[place] += 1
        elif step == "deliver" and queue.waiting_groups:
            lent += [(queue, lease) for lease in deliver(queue, min(amount, queue.waiting_groups))[0]]
        elif lent:
            one, lease = lent.pop(amount % len(lent))
            one.acknowledge("r", *(([lease], []) if step == "use" else ([], [lease])))
    for index, queue in enumerate(queues):
        save_queue(queue, folder / "saved", shard=index)
    restored = [new_queue(folder / f"new{i}", times_sampled=times) for i in range(count)]
    files = queue_files(folder / "saved", "q")
    for index, queue in enumerate(restored):
        held = restore_queue(queue, files, index=index, count=count)
        assert held == queue.stats()["groups"]
    total = [sum((Counter(counters(q)) for q in some), Counter()) for some in (queues, restored)]
    assert total[0] == total[1]
    for queue in queues:
        queue.open_reader("r", "s")  # gives back what is lent
    expected = [rest(queue) for queue in queues]
    found = [rest(queue) for queue in restored]
    if shards == count:
        assert found == expected
    assert Counter(chain(*found)) == Counter(chain(*expected))
    for old in expected:
        for new in found:
            mine = [group for group in new if group in set(old)]
            assert mine == [group for group in old if group in set(new)], "no two groups have changed places"
    held_groups = [queue_stats["inserted_groups"] for queue_stats in map(counters, restored)]
    if shards != count:
        assert max(len(set(f)) for f in found) - min(len(set(f)) for f in found) <= 1, "dealt out evenly"
        assert all(inserted >= len(set(f)) for inserted, f in zip(held_groups, found, strict=True))
    for queue in [*queues, *restored]:
        queue.close(remove=True)


def test_another_number_of_shards_has_the_groups_dealt_out_oldest_first(tmp_path: Path) -> None:
    queues = [new_queue(tmp_path / f"old{i}") for i in range(2)]
    times = []
    for number in range(12):
        assert queues[number % 3 == 0].insert("w", number, rows(number, 1, 1), timeout_s=0.0)
        time.sleep(0.001)  # to be told apart in microseconds
        times.append(time.time_ns() // 1000)
    for queue in queues:
        queue.acknowledge("r", deliver(queue, 2)[0])  # 0 and 3; 1 and 2
    for index, queue in enumerate(queues):
        save_queue(queue, tmp_path, shard=index)
    for count, expected in ((1, [[*range(4, 12)]]), (3, [[4, 7, 10], [5, 8, 11], [6, 9]])):
        restored = [new_queue(tmp_path / f"{count}-{i}") for i in range(count)]
        for index, queue in enumerate(restored):
            restore_queue(queue, queue_files(tmp_path, "q"), index=index, count=count)
            found = queue.deliver("r", "s", groups=1, timeout_s=0.0)
            assert found is not None
            first = expected[index][0]
            assert times[first - 1] <= found.times[0] <= times[first], "it keeps the time of its completion"
            queue.acknowledge("r", [], found.leases)
        sums = {name: sum(counters(queue)[name] for queue in restored) for name in COUNTERS}
        assert sums["inserted_groups"] == sums["inserted_rows"] == 12
        assert sums["consumed_groups"] == sums["consumed_rows"] == 4
        assert [rest(queue) for queue in restored] == expected


def test_a_learner_that_resumes_sees_every_group_once(tmp_path: Path) -> None:
    """It has drawn a batch and begun the next one when it is saved, between two updates."""
    queues = [new_queue(tmp_path / f"old{i}", 7, first=10 * i) for i in range(2)]

    def groups_of(queues: list[Queue], batches: int) -> tuple[QueueSampler, list[int]]:
        sampler = QueueSampler([CallQueueSource(q, groups=2, partial=True) for q in queues], groups=3)
        seen: list[int] = []
        for _ in range(batches):
            batch = sampler.sample(0.0)
            seen += batch.rows.column("group").to_pylist()[::2]
            sampler.acknowledge(batch)
        sampler.flush()
        return sampler, seen

    sampler, before = groups_of(queues, 2)
    unused = sampler.sample(0.0)
    for index, queue in enumerate(queues):
        save_queue(queue, tmp_path, shard=index)
    sampler.acknowledge(unused)  # after the snapshot, and lost with the learner's state
    for count in (1, 2, 3):
        restored = [new_queue(tmp_path / f"{count}-{i}") for i in range(count)]
        for index, queue in enumerate(restored):
            restore_queue(queue, queue_files(tmp_path, "q"), index=index, count=count)
        sampler, after = groups_of(restored, 2)
        sampler.close()
        left = [group for queue in restored for group in rest(queue)]
        assert len(left) < 3
        assert sorted(before + after + left) == [*range(7), *range(10, 17)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": SCHEMA.append(pa.field("x", pa.int8()))}, r"expected group: int64 not null.*x: int8; found group"),
        ({"group_size": 3}, "expected one group of 2 rows, found 2 rows of group 0 of 3"),
        ({"capacity_bytes": 1 << 12, "max_message_bytes": 1 << 12}, "raise capacity_bytes above 4096"),
        ({"capacity_rows": 5}, "group 2 does not fit; raise capacity_rows above 5"),
        ({"max_message_bytes": 512}, "raise max_message_bytes above 512"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_queue_empty(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_queue(new_queue(tmp_path / "old", 4), tmp_path)
    queue = Queue(make_spec(**changes), tmp_path / "new")
    with pytest.raises((SchemaError, ValueError), match=message):
        restore_queue(queue, tmp_path / "q-0.arrow")
    assert queue.empty
    assert queue.stats()["bytes"] == queue.stats()["groups"] == 0
    save_queue(Queue(make_spec(**changes), tmp_path / "other"), tmp_path / "empty")
    assert restore_queue(queue, tmp_path / "empty" / "q-0.arrow") == 0, "and it can be used"


def test_only_an_empty_queue_is_restored(tmp_path: Path) -> None:
    save_queue(new_queue(tmp_path / "old", 4), tmp_path)
    queue = new_queue(tmp_path / "new", 1, first=50)
    with pytest.raises(ValueError, match="has taken 2 rows; expected an empty one"):
        restore_queue(queue, tmp_path / "q-0.arrow")
    assert rest(queue) == [50]
    with pytest.raises(ValueError, match="expected an empty one"):
        restore_queue(queue, tmp_path / "q-0.arrow")
    for arguments in ({"index": 2, "count": 2}, {"index": -1}):
        with pytest.raises(ValueError, match="0 ≤ index < count"):
            restore_queue(queue, tmp_path / "q-0.arrow", **arguments)


def test_a_group_of_several_messages_comes_back_though_it_is_too_large_for_one(tmp_path: Path) -> None:
    size = {"capacity_bytes": 1 << 18, "max_message_bytes": 1 << 14}
    queue = new_queue(tmp_path / "old", **size)
    for number in range(8):
        assert queue.insert("w", number, rows(1, 1, 8, tokens=3000), timeout_s=0.0)
    assert queue.insert("w", 8, rows(2, 1, 1), timeout_s=0.0)
    save_queue(queue, tmp_path)
    again = new_queue(tmp_path / "new", **size)
    restore_queue(again, tmp_path / "q-0.arrow")
    again.close(remove=False)
    again = new_queue(tmp_path / "new", **size)
    found = again.deliver("r", "s", groups=2, timeout_s=0.0)
    assert found is not None
    assert found.sizes == [8, 1]
    assert found.batch.column("tokens").to_pylist() == [[1] * 3000] * 8 + [[2] * 3]


def test_fewer_times_sampled_than_when_it_was_saved(tmp_path: Path) -> None:
    queue = new_queue(tmp_path / "old", 3, times_sampled=3)
    for _ in range(2):
        queue.acknowledge("r", deliver(queue, 1)[0])
    queue.acknowledge("r", deliver(queue, 2)[0])  # 0 three times, 1 once, 2 not at all
    save_queue(queue, tmp_path)
    again = new_queue(tmp_path / "new", times_sampled=1)
    restore_queue(again, tmp_path / "q-0.arrow")
    assert rest(again) == [2]


# ------------------------------------------------------------------- the file


def test_any_arrow_reader_opens_the_file(tmp_path: Path) -> None:
    queue = new_queue(tmp_path / "old", 3)
    save_queue(queue, tmp_path / "deep" / "folder", shard=12)
    path = tmp_path / "deep" / "folder" / "q-12.arrow"
    with pa.ipc.open_file(str(path)) as file:
        table = file.read_all()
    assert table.schema.equals(SCHEMA)
    assert table.column("group").to_pylist() == [0, 0, 1, 1, 2, 2]
    polars = pytest.importorskip("polars")
    assert polars.read_ipc(path)["tokens"].to_list() == [[g] * 3 for g in (0, 0, 1, 1, 2, 2)]


def test_files_of_many_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbers = range(12)
    for name in (*(f"q-{i}.arrow" for i in numbers), ".q-1.arrow.tmp", "other-1.arrow", "q-x.arrow", "qq-30.arrow"):
        (tmp_path / name).touch()
    assert [path.name for path in queue_files(tmp_path, "q")] == [f"q-{i}.arrow" for i in numbers]
    assert queue_files(tmp_path / "missing", "q") == []
    (tmp_path / "q-7.arrow").unlink()
    with pytest.raises(SnapshotError, match=r"of 11 shards of queue 'q', but not q-7\.arrow"):
        queue_files(tmp_path, "q")


def test_a_large_queue_is_written_in_batches_of_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.queue_copies.BATCH_BYTES", 4096)
    save_queue(new_queue(tmp_path / "old", 40, size=3), tmp_path)
    with pa.ipc.open_file(str(tmp_path / "q-0.arrow")) as file:
        sizes = [file.get_batch(number).num_rows for number in range(file.num_record_batches)]
    assert len(sizes) > 3
    assert all(size % 3 == 0 for size in sizes)
    again = new_queue(tmp_path / "new")
    assert restore_queue(again, tmp_path / "q-0.arrow") == 40
    assert rest(again) == list(range(40))


def test_a_damaged_missing_or_other_file_is_refused(tmp_path: Path) -> None:
    save_queue(new_queue(tmp_path / "old", 4), tmp_path)
    whole = (tmp_path / "q-0.arrow").read_bytes()
    queue = new_queue(tmp_path / "new")

    def refused(data: bytes | None) -> str:
        path = tmp_path / "file.arrow"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(SnapshotError) as caught:
            restore_queue(queue, path)
        assert str(path) in str(caught.value)
        assert queue.empty
        return str(caught.value)

    assert "missing" in refused(None)
    for data in (b"", b"no Arrow file at all", whole[:-20], whole[: len(whole) // 2]):
        assert "damaged" in refused(data)
    assert "tells of 9 rows, it has 8" in refused(whole.replace(b'"rows": [2, 2, 2, 2]', b'"rows": [2, 2, 2, 3]'))
    assert "not whole" in refused(whole.replace(b'"rows": [2, 2, 2, 2]', b'"rows": [9,-5, 2, 2]'))
    assert "format 7" in refused(whole.replace(b'"format": 1', b'"format": 7'))
    with pa.OSFile(str(tmp_path / "plain"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(rows(0, 2, 2))
    assert "no snapshot of a queue" in refused((tmp_path / "plain").read_bytes())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file is an error, as on a full disk; Python ignores the signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_os_error_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    queue = new_queue(tmp_path / "old", 1)
    save_queue(queue, tmp_path / "saved")
    earlier = (tmp_path / "saved" / "q-0.arrow").read_bytes()
    for number in range(1, 100):
        assert queue.insert("w", number, rows(number, 2, 2, tokens=100), timeout_s=0.0)
    with file_size_limit(20_000), pytest.raises(OSError, match="File too large"):
        save_queue(queue, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["q-0.arrow"]
    assert (tmp_path / "saved" / "q-0.arrow").read_bytes() == earlier
    save_queue(queue, tmp_path / "saved")
    assert (tmp_path / "saved" / "q-0.arrow").stat().st_size > 20_000


@pytest.mark.parametrize("fault", ["queue.insert.rows:3", "queue.insert.record:1", "queue.insert.commit:5"])
def test_a_restore_that_is_killed_leaves_an_empty_queue(tmp_path: Path, fault: str) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.test_queue_snapshot import *\n"
        "queue = Queue(make_spec(), Path(sys.argv[1]) / 'new')\n"
        "restore_queue(queue, Path(sys.argv[1]) / 'q-0.arrow')"
    )
    save_queue(new_queue(tmp_path / "old", 5), tmp_path)
    environment = {**os.environ, "MILLRACE_FAULT": fault}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -9
    queue = new_queue(tmp_path / "new")
    assert queue.empty
    assert queue.stats()["groups"] == queue.stats()["waiting_groups"] == 0
    assert restore_queue(queue, tmp_path / "q-0.arrow") == 5
    assert rest(queue) == list(range(5))
