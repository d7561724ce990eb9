"""Steps out to Parquet and in from other programs' files; batches mixed with prior data; the commands for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli, replay_cli
from replay import datasets
from replay.columns import concatenate_rows
from replay.copies import NONE
from replay.datasets import files_of, infer_schema, read_chunks
from replay.export import export_parquet
from replay.imports import SEGMENT_STEPS, import_into_service, import_into_snapshot
from replay.mixing import MixedSampler, split
from replay.schema import Field, SchemaError, StepSchema, WindowBatch
from replay.security import Security, new_token
from replay.server import ShardServer
from replay.shard import ShardSpec
from replay.snapshot import SnapshotStore

from .replay_for_tests import SCHEMA, end, numbered
from .test_replay_snapshot import Segments, grown

PLAIN = [(f.name, f.dtype, f.shape) for f in SCHEMA.fields]


def episode(count: int, first: int = 0, *, terminal: bool = True) -> np.ndarray:
    """`count` steps from `is_first` to `is_last`."""
    rows = numbered(count, first)
    rows["is_first"][0] = True
    end(rows, terminal=terminal)
    return rows


def nested(values: np.ndarray) -> pa.Array:
    """(n, …) as n lists of lists."""
    return pa.array(values.tolist(), pa.list_(pa.list_(pa.float32())) if values.ndim == 3 else pa.list_(pa.float32()))


def read(paths: Sequence[Path], schema: StepSchema = SCHEMA, **mapped: str) -> np.ndarray:
    chunks = list(read_chunks(files_of(paths), schema, mapped))
    rows = concatenate_rows([chunk.rows for chunk in chunks])
    starts = np.concatenate([chunk.starts for chunk in chunks])
    assert (starts == rows["is_first"]).all()
    assert (starts[1:] == rows["is_last"][:-1]).all()
    return rows.astype([(f.name, f.dtype, f.shape) for f in schema.fields])


def as_table(rows: np.ndarray, schema: StepSchema = SCHEMA) -> dict[str, Any]:
    return {f.name: list(rows[f.name].tolist()) for f in schema.fields}


# ------------------------------------------------------------------------------ export


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, list[Segments]]:
    sources = [grown(400, lanes=4, seed=shard) for shard in range(2)]
    for shard, source in enumerate(sources):
        source.recycle(5)
        SnapshotStore(tmp_path / "snapshot").save(source, shard=shard)
    out = tmp_path / "steps.parquet"
    done = export_parquet(SnapshotStore(tmp_path / "snapshot").all(), out)
    assert (
        done.steps == pq.read_metadata(out).num_rows == sum(len(k["rows"]) for s in sources for k in s.filled.values())
    )
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    return out, sources


def test_every_step_is_exported_once_episodes_together(exported: tuple[Path, list[Segments]]) -> None:
    path, sources = exported
    table = pq.read_table(path)
    assert table.column_names == ["shard", "episode", "step", *(f.name for f in SCHEMA.fields)]
    shard, number, step = (table[name].to_numpy() for name in ("shard", "episode", "step"))
    value = table["policy_version"].to_numpy()
    last = table["is_last"].to_numpy(zero_copy_only=False)
    for index, source in enumerate(sources):
        written = [int(row["policy_version"][0]) for kept in source.filled.values() for row in kept["rows"]]
        assert sorted(value[shard == index].tolist()) == sorted(written)
    same = number[1:] == number[:-1]
    assert (np.diff(number) >= 0).all(), "rows of an episode stand together"
    assert (step[1:][same] == step[:-1][same] + 1).all()
    assert not last[:-1][same].any()
    begun = ~same & (step[1:] > 0)  # episodes whose first steps were recycled: each begins a chain
    assert 0 < begun.sum() <= 5 * len(sources)
    state = np.array(table["observation/state"].to_pylist())
    assert (state[:, 0] == value).all()
    assert table["observation/image"].to_pylist()[7] == ((value[7] * 7 + np.arange(4)) % 256).tolist()


def test_duckdb_and_polars_read_the_same(exported: tuple[Path, list[Segments]]) -> None:
    path, _ = exported
    table = pq.read_table(path)
    with duckdb.connect() as database:
        query = 'select episode, count(*), sum(reward), max("observation/state"[2]) from read_parquet(?) group by 1 order by 1'
        by_duckdb = database.execute(query, [str(path)]).fetchall()
    frame = (
        pl.read_parquet(path)
        .group_by("episode")
        .agg(pl.len().alias("n"), pl.col("reward").cast(pl.Float64).sum(), pl.col("step").max())
        .sort("episode")
    )
    assert [row[0] for row in by_duckdb] == frame["episode"].to_list() == list(range(len(by_duckdb)))
    assert [row[1] for row in by_duckdb] == frame["n"].to_list()
    assert [row[2] for row in by_duckdb] == pytest.approx(frame["reward"].to_list())
    assert by_duckdb[0][3] == max(
        np.array(table.filter(pa.compute.equal(table["episode"], 0))["observation/state"].to_pylist())[:, 1]
    )


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshot")
    snapshot = store.save(grown())
    (name,) = (f.name for f in snapshot.files if f.kind == "rows")
    (tmp_path / "snapshot/shard-0" / name).write_bytes(b"ARROW1")
    with pytest.raises(Exception, match=f"{name} has 6 bytes"):
        export_parquet(store.all(), tmp_path / "out.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot"]


# ------------------------------------------------------------------------------ import


@pytest.fixture(params=[3, 10_000])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Files are read in pieces: episodes lie across them."""
    monkeypatch.setattr(datasets, "CHUNK_ROWS", request.param)
    return int(request.param)


def test_what_was_exported_is_imported_again(exported: tuple[Path, list[Segments]], chunk_rows: int) -> None:
    path, _ = exported
    assert infer_schema(path) == SCHEMA
    table, rows = pq.read_table(path), read([path])
    number, last = table["episode"].to_numpy(), table["is_last"].to_numpy(zero_copy_only=False)
    ends = np.append(number[1:] != number[:-1], True)
    assert (rows["is_last"] == ends).all()
    cut = ends & ~last
    assert cut.any()
    for f in SCHEMA.fields:
        if f.name not in ("is_first", "is_last"):
            want = np.array(table[f.name].to_pylist()).reshape(rows[f.name].shape)
            void = cut if f.name in ("action", "reward", "is_terminal") else np.zeros(len(cut), bool)
            assert (rows[f.name][~void] == want[~void]).all(), f.name
            assert not rows[f.name][void].any()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rlds_steps(tmp_path: Path, suffix: str, chunk_rows: int) -> None:
    rows = concatenate_rows([episode(5), episode(4, 100, terminal=False), episode(2, 200)])
    columns = as_table(rows)
    columns["obs"] = [
        {"state": state, "image": image}
        for state, image in zip(columns.pop("observation/state"), columns.pop("observation/image"), strict=True)
    ]
    columns["act"] = columns.pop("action")
    del columns["policy_version"]  # not RLDS's; actions of unknown policies count as version 0
    table = pa.table(columns)
    path = tmp_path / f"steps.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    with pytest.raises(
        SchemaError, match=r"steps\.\w+: expected columns observation/state, .*action.*received.*obs/state"
    ):
        read([path])
    found = read([path], obs="observation", act="action")
    for f in SCHEMA.fields:
        assert (found[f.name] == (0 if f.name == "policy_version" else rows[f.name])).all(), f.name
    inferred = {f.name: f for f in infer_schema(path, {"obs": "observation", "act": "action"}).fields}
    assert inferred["observation/image"].shape == (2, 2)
    assert inferred["observation/state"].shape == (3,)


@pytest.mark.parametrize("form", ["lists", "steps"])
def test_rlds_episodes(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CHUNK_EPISODES", 2)
    episodes = [episode(5), episode(3, 100, terminal=False), episode(2, 200), episode(7, 300)]
    if form == "lists":
        names = [f.name for f in SCHEMA.fields if f.name not in ("is_first", "is_last", "policy_version")]
        table = pa.table({name: [rows[name].tolist() for rows in episodes] for name in names} | {"id": list("abcd")})
    else:
        steps = [
            [dict(zip(as_table(rows), row, strict=True)) for row in zip(*as_table(rows).values(), strict=True)]
            for rows in episodes
        ]
        table = pa.table({"steps": steps, "note": list("abcd")})
    pq.write_table(table, tmp_path / "episodes.parquet")
    found = read([tmp_path / "episodes.parquet"])
    rows = concatenate_rows(episodes)
    for f in SCHEMA.fields:
        if form == "steps" or f.name != "policy_version":
            assert (found[f.name] == rows[f.name]).all(), f.name
    assert {f.name: f.shape for f in infer_schema(tmp_path / "episodes.parquet").fields}["observation/image"] == (2, 2)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("reward", lambda v: [str(x) for x in v], "reward: expected numbers, received string"),
        ("reward", lambda v: [None, *v[1:]], "reward: expected a value in every row, received 1 nulls"),
        ("action", lambda v: [x[:1] for x in v], r"action: expected shape \[2\] for each step, received \[1\]"),
        ("action", lambda v: [v[0][:1], *v[1:]], r"action: expected \[2\] values for each step, received lists of"),
        ("policy_version", lambda v: [0.5 for x in v], "policy_version: expected int32, received double|float64"),
        ("policy_version", lambda v: [2**40 for x in v], r"policy_version: 1099511627776 … .* do not fit int32"),
        ("is_terminal", lambda v: None, "expected columns is_terminal, received"),
        ("is_last", lambda v: None, "expected columns is_last, received"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, change: Any, words: str) -> None:
    columns = as_table(episode(6))
    columns[name] = change(columns[name])
    pq.write_table(pa.table({k: v for k, v in columns.items() if v is not None}), tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=words):
        read([tmp_path / "x.parquet"])


def test_minari_episodes(tmp_path: Path, chunk_rows: int) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    schema = StepSchema(
        {
            "observation/a": Field("observation/a", "float32", (3,)),
            "observation/b/c": Field("observation/b/c", "int32"),
        },
        Field("action", "float32", (2,)),
    )
    (tmp_path / "data").mkdir()
    lengths = [5, 1, 12]
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as file:
        file.attrs["total_episodes"] = 3
        for number in (2, 0, 1):  # in any order; there may be more than ten
            t = lengths[number]
            group = file.create_group(f"episode_{number}")
            group["observations/a"] = rng.random((t + 1, 3))  # float64: digits may be lost
            group["observations/b/c"] = np.arange(t + 1) + 100 * number
            group["actions"] = rng.random((t, 2), np.float32)
            group["rewards"] = np.arange(t) + 0.5
            group["terminations"] = np.arange(t) == (t - 1 if number == 0 else -1)
            group["truncations"] = np.arange(t) == (t - 1 if number == 2 else -1)
            group["infos/x"] = np.zeros(t + 1)
    rows = read([tmp_path], schema)
    assert len(rows) == sum(lengths) + 3
    assert np.flatnonzero(rows["is_last"]).tolist() == [5, 7, 20]
    assert np.flatnonzero(rows["is_terminal"]).tolist() == [5]
    assert rows["observation/b/c"].tolist() == [*range(6), *range(100, 102), *range(200, 213)]
    assert rows["reward"][:6].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 0.0]
    assert not rows["action"][rows["is_last"]].any()
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "r+") as file:
        assert (rows["observation/a"][8:21] == file["episode_2/observations/a"][:].astype(np.float32)).all()
        assert infer_schema(tmp_path / "data/main_data.hdf5").action == Field("action", "float32", (2,))
        kept = file["episode_1/observations/a"][:1]
        del file["episode_1/observations/a"]
        file["episode_1/observations/a"] = kept
    with pytest.raises(SchemaError, match=r"episode_1: expected 2 of observation/a with 1 rewards, received 1"):
        read([tmp_path], schema)


class Collected:
    """A writer that keeps what it is given."""

    waiting_for: str | None = None

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.closed = False

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        assert (lanes == 0).all()
        self.rows.append(rows.copy())

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_episodes_go_whole_to_the_shards_in_turn(tmp_path: Path, chunk_rows: int) -> None:
    episodes = [episode(n, 100 * k) for k, n in enumerate((9, 4, 4, 2, 8, 3))]
    pq.write_table(pa.table(as_table(concatenate_rows(episodes))), tmp_path / "x.parquet")
    writers = [Collected(), Collected()]
    done = import_into_service(read_chunks([tmp_path / "x.parquet"], SCHEMA), writers)
    assert (done.steps, done.transitions, done.episodes) == (30, 24, 6)
    assert all(w.closed for w in writers)
    got = [concatenate_rows(w.rows) for w in writers]
    assert abs(len(got[0]) - len(got[1])) < 9
    for rows in got:
        assert (rows["is_first"][1:] == rows["is_last"][:-1]).all()
    steps = np.concatenate([rows["policy_version"] for rows in got])
    assert sorted(steps.tolist()) == sorted(np.concatenate([rows["policy_version"] for rows in episodes]).tolist())


def test_episodes_become_a_shard_of_a_snapshot(tmp_path: Path) -> None:
    episodes = [episode(n, 10_000 * k) for k, n in enumerate((SEGMENT_STEPS - 1, 2, 5000))]
    pq.write_table(pa.table(as_table(concatenate_rows(episodes))), tmp_path / "x.parquet")
    store = SnapshotStore(tmp_path / "prior")
    store.save(grown(), shard=0)
    before = [s.rows for s in store.all()[0].copies()]
    done, snapshot = import_into_snapshot(read_chunks([tmp_path / "x.parquet"], SCHEMA), SCHEMA, store)
    assert (done.steps, done.transitions, done.episodes) == (SEGMENT_STEPS + 5001, SEGMENT_STEPS + 4998, 3)
    assert store.shards() == [0, 1]
    assert len(before) == len(list(store.all()[0].copies()))
    assert snapshot.header["counters"] == {"inserted": done.transitions, "sampled": 0}
    copies = list(snapshot.copies())
    assert [(s.sequence, s.following, s.count) for s in copies] == [
        (0, 1, SEGMENT_STEPS), (1, 2, SEGMENT_STEPS), (2, NONE, done.steps - 2 * SEGMENT_STEPS),
    ]  # fmt: skip
    rows = concatenate_rows([s.rows for s in copies if s.rows is not None])
    assert (rows.astype(PLAIN) == concatenate_rows(episodes).astype(PLAIN)).all()
    index = np.concatenate([s.index for s in copies if s.index is not None])
    assert index.tolist() == [*range(SEGMENT_STEPS - 1), 0, 1, *range(5000)]
    other = StepSchema({"observation": Field("observation", "float32", (1,))}, SCHEMA.action)
    with pytest.raises(SchemaError, match="the data to import has other fields"):
        import_into_snapshot([], other, store)


# ------------------------------------------------------------------------------ mixing


class Numbers:
    """A sampler whose windows tell which they are."""

    def __init__(self, first: int, count: int, size: int) -> None:
        self.next, self.count, self.size = first, count, size
        self.late = 0
        self.priorities: list[tuple[list[int], list[float]]] = []
        self.closed = False

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
        if self.late:
            self.late -= 1
            raise TimeoutError("nothing")
        item = np.arange(self.next, self.next + self.count)
        self.next += self.count
        steps = SCHEMA.zeros(2 * self.count).reshape(self.count, 2)
        steps["policy_version"] = item[:, None]
        batch = WindowBatch(
            steps=steps,
            length=np.ones(self.count, np.int32),
            item=item,
            shard=np.zeros(self.count, np.int32),
            probability=np.full(self.count, 1 / self.size),
            size=self.size,
            frames={"x": np.broadcast_to(item[:, None], (self.count, 2)).astype(np.uint8)},
        )
        if out is not None:
            for name in ("steps", "length", "item", "shard", "probability"):
                getattr(out, name)[...] = getattr(batch, name)
            out.frames["x"][...] = batch.frames["x"]
            out.size = batch.size
            return out
        return batch

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        self.priorities.append((batch.item.tolist(), priorities.tolist()))

    def close(self) -> None:
        self.closed = True


def test_a_batch_is_split_exactly() -> None:
    assert split(256, [0.5, 0.5]) == [128, 128]
    assert split(256, [3, 1]) == [192, 64]
    assert split(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert split(100, [0.9, 0.1]) == [90, 10]
    for shares in ([0.999, 0.001], [1.0, 0.0], [1.0, float("nan")], []):
        with pytest.raises(ValueError, match="share"):
            split(256, shares)


@pytest.mark.parametrize("reuse", [False, True])
def test_each_source_gives_its_share_and_gets_its_priorities(reuse: bool) -> None:
    online, prior = Numbers(0, 6, 300), Numbers(1000, 2, 100)
    mixed = MixedSampler([online, prior], [0.75, 0.25], batch_size=8)
    out: WindowBatch | None = Numbers(0, 8, 1).sample(1.0) if reuse else None
    assert out is None or out.frames["x"].flags.writeable
    prior.late = 1
    with pytest.raises(TimeoutError):
        mixed.sample(0.1, out)
    batch = mixed.sample(0.1, out)  # the share of the first is not drawn again
    assert batch.item.tolist() == [*range(6), 1000, 1001]
    assert batch.steps["policy_version"][:, 1].tolist() == batch.item.tolist()
    assert batch.frames["x"][:, 1].tolist() == [x % 256 for x in batch.item.tolist()]
    assert batch.size == 400
    assert batch.importance_weights(1.0).tolist() == [1.0] * 8  # uniform inside each source: nothing to undo
    if out is not None:
        assert batch.steps.base is out.steps or np.shares_memory(batch.steps, out.steps)
        assert np.shares_memory(batch.frames["x"], out.frames["x"])
    mixed.update_priorities(batch, np.arange(8.0))
    assert online.priorities == [([0, 1, 2, 3, 4, 5], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])]
    assert prior.priorities == [([1000, 1001], [6.0, 7.0])]
    assert mixed.sample(0.1, out).item.tolist() == [*range(6, 12), 1002, 1003]
    mixed.close()
    assert online.closed
    assert prior.closed


def test_stack_on_device_of_all_sources_are_counted_through() -> None:
    class Distinct(Numbers):
        def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
            assert out is None
            batch = super().sample(timeout_s)
            batch.frames = {"x": np.arange(10, dtype=np.uint8)[:, None] + np.uint8(self.size)}
            batch.frame_index, batch.frame_count = np.arange(self.count, dtype=np.int32)[:, None], self.count
            return batch

    mixed = MixedSampler([Distinct(0, 3, 50), Distinct(0, 2, 100)], [3, 2], batch_size=5)
    batch = mixed.sample(0.1)
    assert batch.frame_count == 5
    assert batch.frame_index is not None
    assert batch.frames["x"][batch.frame_index[:, 0], 0].tolist() == [50, 51, 52, 100, 101]


def test_a_source_of_another_size_is_told() -> None:
    mixed = MixedSampler([Numbers(0, 4, 9), Numbers(0, 3, 9)], [0.5, 0.5], batch_size=8)
    with pytest.raises(ValueError, match="source 1 gave 3 windows; its share of a batch is 4"):
        mixed.sample(0.1)


# ---------------------------------------------------------------------------- commands


def run(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setitem(cli.COMMANDS, "replay", replay_cli.main)
    code = cli.main(["replay", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_snapshot_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table(as_table(episode(9))), tmp_path / "x.parquet")
    prior, out = str(tmp_path / "prior"), str(tmp_path / "out.parquet")
    code, text, _ = run(["import", str(tmp_path / "x.parquet"), "--into", prior, "--json"], capsys, monkeypatch)
    assert code == 0
    assert json.loads(text) | {"bytes": 0} == {
        "into": prior, "kind": "snapshot", "shard": 0, "bytes": 0, "steps": 9, "transitions": 8, "episodes": 1,
    }  # fmt: skip
    code, text, _ = run(["stats", prior, "--json"], capsys, monkeypatch)
    (shard,) = json.loads(text)["shards"]
    assert (shard["steps"], shard["inserted"], shard["sampled"]) == (9, 8, 0)
    code, text, _ = run(["stats", f"file://{prior}"], capsys, monkeypatch)
    assert code == 0
    assert text.startswith("shard 0: steps 9, segments 1, ")
    assert "observation/image" in text
    code, text, _ = run(["export", prior, out], capsys, monkeypatch)
    assert text.startswith(f"{out}: 9 steps of 1 episodes")
    assert pq.read_table(out)["policy_version"].to_pylist() == list(range(9))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[str, list[ShardServer]]]:
    """Two shards, and their addresses as they stand on a command line. Their token is in the environment."""
    security = Security(new_token())
    servers: list[ShardServer] = []
    for index in range(2):
        spec = ShardSpec(
            schema=SCHEMA.to_json(),
            run="test-export",
            index=index,
            capacity=4096,
            segment_steps=64,
            seed=0,
            directory=str(tmp_path),
            limiter_address=servers[0].address if servers else None,
        )
        servers.append(ShardServer(spec, security))
    os.environ[replay_cli.TOKEN_VARIABLE] = security.token
    try:
        yield ",".join(server.address for server in servers), servers
    finally:
        del os.environ[replay_cli.TOKEN_VARIABLE]
        for server in reversed(servers):
            server.close()


def test_a_running_service_by_command(
    service: tuple[str, list[ShardServer]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    addresses, servers = service
    episodes = [episode(40, 100 * k) for k in range(6)]
    pq.write_table(pa.table(as_table(concatenate_rows(episodes))), tmp_path / "x.parquet")
    code, text, error = run(["import", str(tmp_path / "x.parquet"), "--into", addresses, "--json"], capsys, monkeypatch)
    assert code == 0, error
    assert json.loads(text) | {"into": ""} == {
        "into": "", "kind": "service", "steps": 240, "transitions": 234, "episodes": 6,
    }  # fmt: skip
    assert [server.shard.stats()["tables"]["steps"]["items"] for server in servers] == [117, 117]
    code, text, _ = run(["stats", addresses, "--json"], capsys, monkeypatch)
    assert [shard["tables"]["steps"]["items"] for shard in json.loads(text)["shards"]] == [117, 117]
    out = tmp_path / "out.parquet"
    code, text, error = run(["export", addresses, str(out)], capsys, monkeypatch)
    assert code == 0, error
    assert text.startswith(f"{out}: 240 steps of 6 episodes")
    steps = pq.read_table(out)
    assert sorted(steps["policy_version"].to_pylist()) == [100 * k + n for k in range(6) for n in range(40)]
    monkeypatch.setenv(replay_cli.TOKEN_VARIABLE, "wrong")
    code, _, error = run(["stats", addresses], capsys, monkeypatch)
    assert code == 1
    assert "token" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["stats", "{tmp}/none"], 2, "none is no address, no run and no snapshot: it does not exist"),
        (["stats", "{tmp}"], 1, "holds no snapshot: no shard-*/manifest-*.json in it"),
        (["import", "{tmp}/none.parquet", "--into", "{tmp}/s"], 2, "none.parquet does not exist"),
        (["import", "{tmp}/bad.parquet", "--into", "{tmp}/s"], 2, "expected columns observation and action, found []"),
        (["import", "{tmp}/bad.parquet", "--into", "{tmp}/s", "--map", "x"], 2, "--map expects THEIRS=OURS"),
        (["stats", "localhost:1"], 1, ""),
    ],
)
def test_a_command_says_what_is_wrong_in_one_line(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pq.write_table(pa.table({"a": [1.0]}), tmp_path / "bad.parquet")
    got, _, error = run([word.format(tmp=tmp_path) for word in words], capsys, monkeypatch)
    assert got == code, error
    assert error.startswith("millrace: ")
    assert message in error
    assert error.count("\n") == 1
