"""Snapshots: what is read back, what is written again, what a crash leaves, and other numbers of shards."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.fs as fs
import pytest

from cluster.checkpoint import Checkpoints
from replay.columns import concatenate_rows
from replay.copies import NONE, SegmentCopy, TableCopy
from replay.layout import Layout, TableSpec
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.restore import Deal, chains_of, header_differences, load
from replay.schema import Field, SchemaError, StepSchema, Window
from replay.shard import Shard
from replay.snapshot import Snapshot, SnapshotError, SnapshotStore

from .replay_for_tests import SCHEMA, end, numbered

STEPS = 8  # of a segment here


class Segments:
    """A plain storage of segments: lanes that grow, and are recycled, oldest first. It says what it was asked for."""

    def __init__(self, *, lanes: int = 3, seed: int = 0, schema: StepSchema = SCHEMA) -> None:
        self.rng = np.random.default_rng(seed)
        self.schema = schema
        self.storage = secrets.token_hex(8)
        self.filled: dict[int, dict[str, Any]] = {}
        self.open: list[int | None] = [None] * lanes
        self.place = [0] * lanes
        self.written = 0
        self.taken = 0
        self.priorities = True
        self.sampled = 0
        self.fail_at: int | None = None
        self.copied_rows = 0

    def write(self, lane: int, count: int, *, closed: bool = False) -> None:
        for _ in range(count):
            number = self.open[lane]
            if number is None or len(self.filled[number]["rows"]) == STEPS:
                self.filled[self.taken] = {"rows": [], "index": [], "following": NONE, "closed": False}
                if number is not None:
                    self.filled[number]["following"] = self.taken
                self.open[lane] = number = self.taken
                self.taken += 1
            row = numbered(1, 10_000 * lane + self.written)
            row["is_first"] = self.place[lane] == 0
            last = self.rng.random() < 0.1
            if last:
                end(row, terminal=True)
            self.filled[number]["rows"].append(row)
            self.filled[number]["index"].append(self.place[lane])
            self.place[lane] = 0 if last else self.place[lane] + 1
            self.written += 1
        if closed and (number := self.open[lane]) is not None:
            self.filled[number]["closed"] = True
            self.open[lane] = None

    def recycle(self, count: int) -> None:
        for number in sorted(set(self.filled) - set(self.open))[:count]:
            del self.filled[number]

    def copy(self, skip: Set[tuple[int, int]] = frozenset()) -> tuple[dict[str, Any], Iterator[SegmentCopy]]:
        header = {
            "storage": self.storage,
            "schema": self.schema.to_json(),
            "settings": {"capacity": 1000},
            "counters": {"inserted": self.written, "sampled": self.sampled},
            "tables": {
                "steps": {"settings": {"selector": "uniform"}, "counters": {"inserted": self.written, "sampled": 7}},
                "best": {
                    "settings": {"selector": "prioritised", "priority_exponent": 0.6},
                    "counters": {"inserted": self.written, "sampled": self.sampled},
                },
            },
        }

        def segments() -> Iterator[SegmentCopy]:
            for order, (number, kept) in enumerate(sorted(self.filled.items())):
                if order == self.fail_at:
                    raise OSError(28, "No space left on device")
                count, following = len(kept["rows"]), kept["following"]
                known = (number, count) in skip
                self.copied_rows += 0 if known else count
                some = np.random.default_rng(number)
                member = some.random(count) < 0.7
                yield SegmentCopy(
                    sequence=number,
                    following=following,
                    complete=count == STEPS and (following != NONE or kept["closed"]),
                    count=count,
                    index=None if known else np.array(kept["index"]),
                    rows=None if known else concatenate_rows(kept["rows"]),
                    tables={
                        "steps": TableCopy(np.ones(count, bool)),
                        "best": TableCopy(member, some.random(count), some.integers(0, 9, count).astype(np.int32)),
                    },
                )

        return header, segments()


class Received:
    """What a shard is given when it is restored."""

    def __init__(self, schema: StepSchema = SCHEMA) -> None:
        self.schema = schema
        self.header: dict[str, Any] = {}
        self.segments: list[SegmentCopy] = []

    def restore(self, header: dict[str, Any], segments: Iterator[SegmentCopy]) -> None:
        self.header, self.segments = header, list(segments)


def plain(segment: SegmentCopy, *, numbers: bool = True) -> tuple[Any, ...]:
    """A segment as values that compare; padding between fields holds anything."""
    assert segment.rows is not None
    assert segment.index is not None
    packed = segment.rows.astype([(f.name, f.dtype, f.shape) for f in SCHEMA.fields])
    tables = [
        (name, *(None if v is None else (v.dtype.str, v.tobytes()) for v in vars(table).values()))
        for name, table in segment.tables.items()
    ]
    place = (segment.sequence, segment.following, segment.complete) if numbers else ()
    return (*place, segment.count, segment.index.tolist(), packed.tobytes(), *tables)


def expected(source: Segments) -> list[tuple[Any, ...]]:
    return [plain(segment) for segment in source.copy()[1]]


def grown(steps: int = 300, *, lanes: int = 3, seed: int = 0) -> Segments:
    source = Segments(lanes=lanes, seed=seed)
    for _ in range(steps // 5):
        source.write(int(source.rng.integers(lanes)), 5)
    return source


def files(store: SnapshotStore, shard: int = 0) -> dict[str, int]:
    """Names and modification times of a shard's files."""
    found = store.filesystem.get_file_info(fs.FileSelector(f"{store.path}/shard-{shard}"))
    return {f.base_name: f.mtime_ns for f in found}


@pytest.fixture(params=["path", "uri", "memory", "subtree"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SnapshotStore:
    match request.param:
        case "path":
            return SnapshotStore(tmp_path / "snapshots")
        case "uri":
            return SnapshotStore(f"file://{tmp_path}/snapshots")
        case "memory":
            return SnapshotStore(fs._MockFileSystem(), "bucket/run")
        case _:
            return SnapshotStore(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run")


def test_a_snapshot_holds_what_the_storage_held(store: SnapshotStore) -> None:
    source = grown()
    store.save(source, shard=2)
    assert store.shards() == [2]
    snapshot = store.latest(2)
    assert snapshot is not None
    snapshot.verify()
    assert [plain(s) for s in snapshot.copies()] == expected(source)
    shard = Received()
    header = load(shard, store.all())
    assert shard.header == header == source.copy()[0]
    assert [plain(s) for s in shard.segments] == [  # numbered anew
        (i, *rest) for i, (_, *rest) in enumerate([plain(s) for s in shard.segments])
    ]
    assert [plain(s, numbers=False) for s in shard.segments] == [plain(s, numbers=False) for s in source.copy()[1]]


def test_only_what_has_changed_is_written(store: SnapshotStore) -> None:
    source = grown()
    first = store.save(source)
    before = files(store)
    source.copied_rows = 0
    for lane in range(3):
        source.write(lane, 10)
    source.recycle(3)
    source.sampled = 99
    second = store.save(source, keep=2)
    assert source.copied_rows < 3 * (10 + 2 * STEPS)
    (rows,) = (f.name for f in first.files if f.kind == "rows")
    assert rows in {f.name for f in second.files}
    after = files(store)
    assert {name: after[name] for name in before} == before, "a file of the first snapshot has changed"
    assert [plain(s) for s in second.copies()] == expected(source)
    assert second.header["tables"]["best"]["counters"]["sampled"] == 99
    assert second.number == first.number + 1
    third = store.save(source, keep=2)
    assert store.numbers(0) == [2, 3]
    assert set(files(store)) == {f.name for s in (second, third) for f in s.files} | {second.name, third.name}
    assert [plain(s) for s in Snapshot.read(store, 0, 2).copies()] == expected(source)


def test_another_storage_of_the_same_numbers_is_written_anew(tmp_path: Path) -> None:
    """Numbers of segments are those of one storage: after a restart the same ones may stand for other rows."""
    store = SnapshotStore(tmp_path)
    store.save(grown(seed=1))
    other = grown(seed=2)
    snapshot = store.save(other)
    assert [plain(s) for s in snapshot.copies()] == expected(other)


def test_files_of_recycled_segments_go_and_small_ones_are_joined(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    source = Segments(lanes=1)
    most = 0
    for _ in range(60):
        source.write(0, 3 * STEPS)
        source.recycle(len(source.filled) - 20)
        snapshot = store.save(source)
        assert [plain(s) for s in snapshot.copies()] == expected(source)
        most = max(most, sum(f.kind == "rows" for f in snapshot.files))
        held = sum(f.rows for f in snapshot.files if f.kind == "rows")
        assert held <= 2 * 20 * STEPS + 3 * STEPS
    assert 2 < most <= 18
    assert len(files(store)) == len(snapshot.files) + 1


class FailingHandler(fs.FileSystemHandler):  # type: ignore[misc]
    """A local file system that fails at the n-th change, once: before it is made, or after."""

    def __init__(self, base: fs.FileSystem, fail_at: int, after: bool) -> None:
        self.base, self.left, self.after = base, fail_at, after

    def _change(self, change: Callable[[], Any]) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise OSError(5, "the disk is gone")
        done = change()
        if self.left == 0:
            raise OSError(5, "the disk is gone")
        return done

    def __eq__(self, other: object) -> bool:
        return self is other

    def get_type_name(self) -> str:
        return "failing"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return self.base.get_file_info(paths)  # type: ignore[no-any-return]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return self.base.get_file_info(selector)  # type: ignore[no-any-return]

    def create_dir(self, path: str, recursive: bool) -> None:
        self._change(lambda: self.base.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        raise NotImplementedError

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        raise NotImplementedError

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._change(lambda: self.base.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._change(lambda: self.base.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._change(lambda: self.base.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.base.open_input_stream(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.base.open_input_file(path)

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        return self._change(lambda: self.base.open_output_stream(path))

    def open_append_stream(self, path: str, metadata: object) -> pa.NativeFile:
        raise NotImplementedError


@pytest.mark.parametrize("after", [False, True])
def test_whatever_fails_an_earlier_snapshot_stays(tmp_path: Path, after: bool) -> None:
    source = grown()
    base = fs.LocalFileSystem()
    kept = SnapshotStore(tmp_path)
    kept.save(source)
    before = expected(source)
    source.write(1, 40)
    failures = 0
    for fail_at in range(1, 30):
        handler = FailingHandler(base, fail_at, after)
        failing = SnapshotStore(fs.PyFileSystem(handler), str(tmp_path))
        try:
            failing.save(source, keep=2)
        except OSError:
            failures += 1
        if handler.left > 0:
            break
        last = kept.latest(0)
        assert last is not None
        last.verify()
        assert [plain(s) for s in last.copies()] in (before, expected(source))
        if last.number == 1:
            assert [plain(s) for s in last.copies()] == before
    assert failures >= 6  # the folder, four files and the manifest
    done = kept.save(source)
    assert [plain(s) for s in done.copies()] == expected(source)
    assert set(files(kept)) == {f.name for f in done.files} | {done.name}, "what was cut short is cleared away"


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    source = grown()
    store.save(source)
    before = files(store)
    source.write(0, 30)
    for source.fail_at in (0, 5, 20):
        with pytest.raises(OSError, match="No space left"):
            store.save(source)
        assert files(store) == before


@pytest.mark.parametrize("kind", ["rows", "open", "tables", "segments"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found_and_named(tmp_path: Path, kind: str, damage: str) -> None:
    store = SnapshotStore(tmp_path)
    snapshot = store.save(grown())
    (name,) = (f.name for f in snapshot.files if f.kind == kind)
    path = tmp_path / "shard-0" / name
    data = bytearray(path.read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case _:
            path.unlink()
    words = {"flip": "(has CRC-32|.* is damaged)", "cut": f"has {len(data) - 1} bytes, manifest", "gone": "is missing"}[
        damage
    ]
    shard = Received()
    with pytest.raises(SnapshotError, match=rf"{name} {words}"):
        load(shard, [Snapshot.read(store, 0, 1)])
    assert not shard.segments
    # And the next snapshot does not build on a file that is not there.
    if damage != "flip" or kind == "segments":
        source = grown(seed=3)
        assert [plain(s) for s in store.save(source).copies()] == expected(source)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError, match="holds no snapshot"):
        store.all()
    manifest = Path(tmp_path) / "shard-0" / store.save(grown()).name
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(SnapshotError, match=r"manifest-00000001\.json is damaged"):
        store.all()
    manifest.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(SnapshotError, match="has format 99, this version of Millrace reads 1"):
        store.all()


def test_rows_of_a_snapshot_elsewhere_are_linked_or_copied(tmp_path: Path) -> None:
    source = grown()
    first = SnapshotStore(tmp_path / "step_1")
    name = next(f.name for f in first.save(source).files if f.kind == "rows")
    source.write(0, 20)
    source.copied_rows = 0
    second = SnapshotStore(tmp_path / "step_2")
    snapshot = second.save(source, previous=first)
    assert source.copied_rows < 100
    inode = (tmp_path / "step_1/shard-0" / name).stat()
    assert (tmp_path / "step_2/shard-0" / name).stat().st_ino == inode.st_ino
    memory = SnapshotStore(fs._MockFileSystem(), "far")
    far = memory.save(source, previous=second)
    for path in (tmp_path / "step_1/shard-0").iterdir():
        path.unlink()
    for found in (snapshot, far):
        found.verify()
        assert [plain(s) for s in found.copies()] == expected(source)


def test_any_arrow_reader_sees_ordinary_columns(tmp_path: Path) -> None:
    source = Segments(lanes=1)
    source.write(0, 3 * STEPS)
    SnapshotStore(tmp_path).save(source)
    (path,) = tmp_path.glob("shard-0/rows-*.arrow")
    frame = pl.read_ipc(path)
    names = ["observation/state", "observation/image", "action", "reward", "policy_version"]
    assert frame.columns == ["segment", "step", *names, "is_first", "is_last", "is_terminal"]
    rows = concatenate_rows([r for kept in list(source.filled.values())[:2] for r in kept["rows"]])
    assert frame["policy_version"].to_list() == rows["policy_version"].tolist()
    assert (
        np.array(frame["observation/image"].to_list()).reshape(-1, 2, 2).tolist() == rows["observation/image"].tolist()
    )
    assert frame["is_last"].to_list() == rows["is_last"].tolist()
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.schema.field("observation/state").type.list_size == 3
    with duckdb.connect() as database:
        database.register("steps", table)
        found = database.execute("select count(*), sum(reward), max(action[1]) from steps").fetchone()
    assert found is not None
    assert found[0] == len(rows)
    assert found[1:] == pytest.approx((float(rows["reward"].sum()), float(rows["action"][:, 0].max())))


def test_another_schema_is_refused_field_by_field(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    store.save(grown())
    state = Field("observation/state", "float64", (3,))
    other = StepSchema({"observation/state": state, "observation/x": Field("observation/x", "bool")}, SCHEMA.action)
    shard = Received(other)
    with pytest.raises(SchemaError) as caught:
        load(shard, store.all())
    text = str(caught.value)
    assert "observation/state: expected float64[3], received float32[3]" in text
    assert "observation/x: expected bool, received none" in text
    assert "observation/image: expected none, received uint8[2, 2]" in text
    assert "action" not in text
    assert not shard.segments


@pytest.mark.parametrize(("saved", "count"), [(1, 1), (3, 3), (1, 3), (4, 2), (2, 5), (3, 1)])
def test_shards_are_dealt_to_another_number_of_shards(tmp_path: Path, saved: int, count: int) -> None:
    store = SnapshotStore(tmp_path)
    sources = []
    for shard in range(saved):
        source = grown(200 * (shard + 1), lanes=6, seed=shard)
        source.recycle(shard)
        store.save(source, shard=shard)
        sources.append(source)
    snapshots = store.all()
    received = [Received() for _ in range(count)]
    for index, shard_ in enumerate(received):
        load(shard_, snapshots, index=index, count=count)
    everything = [plain(s, numbers=False) for source in sources for s in source.copy()[1]]
    got = [plain(s, numbers=False) for shard_ in received for s in shard_.segments]
    assert sorted(map(repr, got)) == sorted(map(repr, everything)), "each segment goes to one shard"
    links = 0
    for shard_ in received:
        by_number = {s.sequence: s for s in shard_.segments}
        assert list(by_number) == list(range(len(shard_.segments)))
        for s in shard_.segments:
            if s.following != NONE:
                links += 1
                assert s.following > s.sequence
                before, after = s, by_number[s.following]
                assert before.rows is not None
                assert before.index is not None
                assert after.index is not None
                ended = before.rows["is_last"][-1]
                assert after.index[0] == (0 if ended else before.index[-1] + 1)
    chains = [chain for s in snapshots for chain in chains_of(s)]
    pieces = sum(len(chain) - 1 for chain in chains) - links  # links that were cut
    assert pieces <= (0 if saved == count else count)
    if saved == count:
        for source, shard_ in zip(sources, received, strict=True):
            header = source.copy()[0]
            assert [shard_.header[key] for key in ("counters", "tables")] == [header["counters"], header["tables"]]
    sizes = [sum(s.count for s in shard_.segments) for shard_ in received]
    if saved != count:
        assert max(sizes) <= 1.6 * sum(sizes) / count
    for table in (None, "steps", "best"):
        for name in ("inserted", "sampled"):

            def counter(header: dict[str, Any], table: str | None = table, name: str = name) -> int:
                at = header if table is None else header["tables"][table]
                return int(at["counters"][name])

            assert sum(counter(r.header) for r in received) == sum(counter(s.copy()[0]) for s in sources)
    for shard_ in received:
        best = sum(int(s.tables["best"].member.sum()) for s in shard_.segments)
        assert shard_.header["tables"]["best"]["counters"]["inserted"] >= best


def test_one_long_lane_is_cut_into_fair_shares(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    source = Segments(lanes=1)
    source.write(0, 40 * STEPS)
    store.save(source)
    deal = Deal(store.all(), 4)
    assert [len(parts) for parts in deal.parts] == [10, 10, 10, 10]
    assert sum(part.following == NONE for parts in deal.parts for part in parts) == 4


def test_changed_settings_are_listed(tmp_path: Path) -> None:
    saved = SnapshotStore(tmp_path).save(grown()).header
    current = json.loads(json.dumps(saved))
    assert header_differences(saved, current) == []
    current["settings"] = {"capacity": 500, "segment_steps": 8}
    current["tables"]["best"]["settings"]["priority_exponent"] = 0.7
    current["tables"]["new"] = current["tables"].pop("steps")
    assert header_differences(saved, current) == [
        "replay.capacity: saved 1000, now 500 (the current one is used)",
        "replay.segment_steps: not in the snapshot, now 8",
        "table steps: saved, no longer there; its items are left out",
        "table best.priority_exponent: saved 0.6, now 0.7 (the current one is used)",
        "table new: not in the snapshot; it takes every stored transition as an item",
    ]


# ---------------------------------------------------------------------- real shards


def make(*, capacity: int = 1024, seed: int = 0) -> Shard:
    tables = (TableSpec(), TableSpec(name="best", selector="prioritised", max_times_sampled=3))
    layout = Layout(SCHEMA, capacity // 16, 16, tables)
    limiters = {table.name: RateLimiter(RateLimit.from_min_size(1)) for table in tables}
    return Shard(layout, limiters, index=0, seed=seed)


def fill(shard: Shard, *, lanes: int, count: int, writer: str = "w", close: bool = False) -> None:
    sequence = shard.connect(writer)
    for k in range(0, count, 10):
        for lane in range(lanes):
            rows = numbered(10, lane * 10_000 + k)
            rows["is_first"] = (k + np.arange(10)) % 20 == 0
            if k % 20 == 10:
                end(rows, terminal=lane % 2 == 0)
            sequence += 1
            assert shard.insert(writer, sequence, np.full(10, lane, np.int32), rows, timeout_s=0.0)
    shard.disconnect(writer, closed=close)


def items(shard: Shard) -> dict[str, list[tuple[Any, ...]]]:
    """Every item of each table: its step, its place in the episode, its priority and times drawn."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for copied in shard.copy()[1]:
        assert copied.rows is not None
        assert copied.index is not None
        for name, table in copied.tables.items():
            columns = [copied.rows["policy_version"], copied.rows["action"][:, 0], copied.index]
            columns += [c for c in (table.priority, table.times_sampled) if c is not None]
            found.setdefault(name, []).extend(tuple(c[i].item() for c in columns) for i in np.flatnonzero(table.member))
    return {name: sorted(rows) for name, rows in found.items()}


def test_a_shard_comes_back_with_its_items_priorities_and_counters(tmp_path: Path) -> None:
    shard = make()
    fill(shard, lanes=5, count=400, close=True)  # 2 000 steps: the oldest are gone
    drawn = shard.sample("best", 64, 64, Window(), timeout_s=0.0)
    assert drawn is not None
    _, batch = drawn
    shard.update_priorities("best", batch.item, np.random.default_rng(0).random(64) + 0.1)
    store = SnapshotStore(tmp_path)
    store.save(shard)
    fresh = make()
    load(fresh, store.all())
    assert items(fresh) == items(shard)
    ours, theirs = fresh.stats()["tables"], shard.stats()["tables"]
    for name in ("steps", "best"):
        assert {k: ours[name][k] for k in ("items", "inserted", "sampled")} == {
            k: theirs[name][k] for k in ("items", "inserted", "sampled")
        }
        assert ours[name]["mass"] == pytest.approx(theirs[name]["mass"])
    fill(fresh, lanes=2, count=100, writer="later")  # and it goes on
    with pytest.raises(ValueError, match="only an empty one can be restored"):
        load(fresh, store.all())


@pytest.mark.parametrize(("saved", "count"), [(2, 3), (3, 1)])
def test_items_of_shards_come_back_on_another_number_of_shards(tmp_path: Path, saved: int, count: int) -> None:
    store = SnapshotStore(tmp_path)
    shards = [make(seed=index) for index in range(saved)]
    for index, shard in enumerate(shards):
        fill(shard, lanes=4, count=60 * (index + 1), close=True)
        store.save(shard, shard=index)
    fresh = [make(capacity=2048) for _ in range(count)]
    for index, shard in enumerate(fresh):
        load(shard, store.all(), index=index, count=count)
    for name in ("steps", "best"):
        before = sorted(row for shard in shards for row in items(shard)[name])
        after = sorted(row for shard in fresh for row in items(shard).get(name, []))
        assert after == before
        for counter in ("items", "inserted", "sampled"):
            sums = [sum(s.stats()["tables"][name][counter] for s in group) for group in (shards, fresh)]
            assert sums[0] == sums[1]


def test_snapshots_while_writers_insert_are_whole(tmp_path: Path) -> None:
    shard = make(capacity=2048)
    stop = threading.Event()
    failures: list[BaseException] = []

    def insert(writer: str, first: int) -> None:
        try:
            sequence, k = shard.connect(writer), first
            while not stop.is_set():
                rows = numbered(7, k)
                if k % 5 == 0:
                    end(rows, terminal=True)
                sequence += 1
                assert shard.insert(writer, sequence, np.zeros(7, np.int32), rows, timeout_s=1.0)
                k += 7
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=insert, args=(f"w{n}", 10**6 * n)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        store = SnapshotStore(tmp_path)
        for n in range(5):
            while shard.stats()["tables"]["steps"]["inserted"] < 3000 * (n + 1) and not failures:
                pass
            snapshot = store.save(shard)
            snapshot.verify()
            by_number = {s.sequence: s for s in snapshot.copies()}
            steps = 0
            for s in by_number.values():
                assert s.rows is not None
                number = s.rows["policy_version"]
                ended = s.rows["is_last"]
                assert (np.diff(number) == 1).all(), "neighbours of one lane"
                assert (s.rows["reward"] == np.where(ended, 0, number + np.float32(0.125))).all()
                after = by_number.get(s.following)
                if after is not None:
                    assert after.rows is not None
                    assert after.rows["policy_version"][0] == number[-1] + 1
                steps += s.count
            assert steps > 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


def test_checkpoints_share_the_rows_and_outlive_each_other(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    source, before = Segments(lanes=2), None
    for step in range(1, 6):
        source.write(step % 2, 6 * STEPS)
        source.copied_rows = 0
        with checkpoints.write(env_steps=step, updates=0) as folder:
            SnapshotStore(folder / "replay").save(source, previous=before)
        assert source.copied_rows <= 8 * STEPS, "rows of complete segments are written once"
        latest = checkpoints.latest()
        assert latest is not None
        before = SnapshotStore(latest.path / "replay")
        (snapshot,) = before.all()
        snapshot.verify()
        assert [plain(s) for s in snapshot.copies()] == expected(source)
    assert len(checkpoints.all()) == 2
    rows = list((tmp_path / "checkpoints").glob("step_*/replay/shard-0/rows-*.arrow"))
    assert len({path.stat().st_ino for path in rows}) < len(rows)
