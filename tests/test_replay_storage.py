"""Windows, eviction and uniform draws against a plain reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.samplers import CallSource, Sampler
from replay.schema import Field, SchemaError, StepSchema, WindowBatch
from replay.shard import Shard, WriterClosedError
from replay.storage import SegmentStorage
from replay.writers import CallWriter

from .replay_for_tests import SCHEMA, draw_all, end, joined, make_shard, numbered


@dataclass
class Lane:
    """What a lane has written: the plain list that the storage is compared with."""

    rows: list[np.void] = field(default_factory=list)
    number: int = 0


@dataclass
class Reference:
    """All lanes ever opened; a step is known by the unique number in its `policy_version`."""

    lanes: list[Lane] = field(default_factory=list)

    def at(self) -> dict[int, tuple[list[np.void], int]]:
        """Step number → (its lane's rows, place in them)."""
        return {int(row["policy_version"]): (lane.rows, k) for lane in self.lanes for k, row in enumerate(lane.rows)}


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[str, list[tuple[int, int, bool, bool]]]]]:
    """(segments, segment_steps, horizon, operations); an operation is a batch of (lane, rows, last, terminal), or a close."""
    segments = draw(st.integers(4, 9))
    pieces = st.tuples(st.integers(0, 2), st.integers(1, 12), st.booleans(), st.booleans())
    operation = st.one_of(
        st.tuples(st.just("append"), st.lists(pieces, min_size=1, max_size=4)),
        st.tuples(st.just("close"), st.lists(pieces, min_size=1, max_size=1)),
    )
    operations = draw(st.lists(operation, min_size=1, max_size=25))
    return segments, draw(st.integers(2, 8)), draw(st.integers(1, 5)), operations


def check(storage: SegmentStorage, reference: Reference, horizon: int) -> None:
    starts = np.flatnonzero(storage.is_item)
    assert len(starts) == storage.items == storage.items_inserted - storage.items_deleted
    ids = storage.item_ids(starts)
    assert len(set(ids.tolist())) == len(ids)
    rows, length = storage.windows(starts, horizon)
    steps = storage.gather(rows)  # (items, horizon + 1)
    at = reference.at()
    for window, n in zip(steps, length.tolist(), strict=True):
        lane, k = at[int(window[0]["policy_version"])]
        assert 1 <= n <= horizon
        for j in range(n + 1):
            assert window[j] == lane[k + j]
            assert j == n or not lane[k + j]["is_last"]
        assert all(window[j] == window[n] for j in range(n, horizon + 1))
        # As long as it can be: it ends only with its episode or with what its lane has written.
        assert n == horizon or lane[k + n]["is_last"] or k + n == len(lane) - 1
    # Exactly the stored steps with a successor in the same episode are items: what is gone is the oldest of each lane.
    stored = {int(window[0]["policy_version"]) for window in steps}
    for lane in (lane.rows for lane in reference.lanes):
        valid = [int(a["policy_version"]) for a in lane[:-1] if not a["is_last"]]
        kept = [number in stored for number in valid]
        assert kept == sorted(kept)


@settings(max_examples=120, deadline=None)
@given(histories())
def test_every_window_equals_the_reference(
    history: tuple[int, int, int, list[tuple[str, list[tuple[int, int, bool, bool]]]]],
) -> None:
    segments, segment_steps, horizon, operations = history
    storage = SegmentStorage(SCHEMA, segments=segments, segment_steps=segment_steps)
    reference = Reference()
    lanes: dict[int, tuple[int, Lane]] = {}  # test's lane → (storage lane, reference)
    given_ids: dict[int, int] = {}  # item id → step
    written = 0
    for kind, pieces in operations:
        if kind == "close":
            if pieces[0][0] not in lanes:
                continue
            number, lane = lanes.pop(pieces[0][0])
            cut = storage.close_lane(number)
            assert cut == (not lane.rows[-1]["is_last"])
            if cut:
                newest = lane.rows[-1]
                newest["is_last"], newest["is_terminal"], newest["reward"] = True, False, 0.0
                newest["action"] = 0.0
        else:
            numbers, batch = [], []
            for lane_number, count, last, terminal in pieces:
                if lane_number not in lanes:
                    lanes[lane_number] = (storage.open_lane(), Lane())
                    reference.lanes.append(lanes[lane_number][1])
                number, lane = lanes[lane_number]
                rows = numbered(count, written)
                written += count
                rows["is_first"][0] = not lane.rows or bool(lane.rows[-1]["is_last"])
                if last:
                    end(rows, terminal=terminal)
                lane.rows += [row.copy() for row in rows]
                numbers.append(np.full(count, number))
                batch.append(rows)
            # Rows of different lanes come in any order, those of one lane in time order.
            all_rows, all_lanes = joined(*batch), np.concatenate(numbers)
            order = np.random.default_rng(written).permutation(len(all_rows))
            for lane_rows in (np.flatnonzero(all_lanes[order] == lane) for lane in np.unique(all_lanes)):
                order[lane_rows] = np.sort(order[lane_rows])
            items = storage.items_inserted
            assert storage.append(all_lanes[order], all_rows[order]) == storage.items_inserted - items
        check(storage, reference, horizon)
        starts = np.flatnonzero(storage.is_item)
        versions = storage.rows["policy_version"][starts].tolist()
        for item, version in zip(storage.item_ids(starts).tolist(), versions, strict=True):
            assert given_ids.setdefault(item, version) == version
    if written <= segments:  # every segment holds a row of its own at least
        assert storage.items_deleted == 0


def test_a_full_storage_keeps_the_newest_steps() -> None:
    storage = SegmentStorage(SCHEMA, segments=8, segment_steps=4)
    lane = storage.open_lane()
    storage.append(np.full(1000, lane), numbered(1000))
    kept = np.sort(storage.rows["policy_version"][storage.is_item])
    assert kept.tolist() == list(range(1000 - 32, 999))
    assert (storage.items, storage.items_inserted, storage.items_deleted) == (31, 999, 968)


def test_more_lanes_than_segments_are_refused_before_anything_changes() -> None:
    storage = SegmentStorage(SCHEMA, segments=3, segment_steps=4)
    lanes = np.array([storage.open_lane() for _ in range(3)])
    storage.append(lanes[:2], numbered(2))
    before = storage.rows.copy()
    with pytest.raises(SchemaError, match=r"3 lanes write to a shard of 3 segments.*raise replay\.capacity"):
        storage.append(lanes, numbered(3, 10))
    assert (storage.rows == before).all()
    storage.close_lane(int(lanes[0]))
    storage.append(lanes[1:], numbered(2, 20))


def test_a_writer_that_closes_leaves_truncated_episodes() -> None:
    shard = make_shard()
    writer = CallWriter(shard)
    writer.append(np.array([0, 0, 0, 1, 1], np.int32), joined(numbered(3), numbered(2, 10, last=True)))
    assert shard.items == 3
    writer.close()
    windows = draw_all(shard, horizon=4)
    ends = windows.steps[np.arange(len(windows)), windows.length]
    assert windows.length.tolist() == [2, 1, 1]
    assert ends["is_last"].all()
    assert ends["is_terminal"].tolist() == [False, False, True]
    assert ends["observation/state"][:, 0].tolist() == [2.0, 2.0, 11.0]
    assert not ends["action"].any()
    assert not ends["reward"].any()
    with pytest.raises(WriterClosedError, match="is not connected"):
        writer.append(np.zeros(1, np.int32), numbered(1))


def test_a_sequence_number_is_applied_once() -> None:
    shard = make_shard()
    assert shard.connect("w") == -1
    lanes = np.zeros(4, np.int32)
    for _ in range(2):
        assert shard.insert("w", 0, lanes, numbered(4), timeout_s=0.0)
    assert shard.insert("w", 1, lanes, numbered(4, 4), timeout_s=0.0)
    assert (shard.items, shard.stats()["inserted"], shard.stats()["duplicates"]) == (7, 7, 1)
    assert shard.connect("w") == 1


@pytest.mark.parametrize(
    ("lanes", "rows", "message"),
    [
        (np.array([-1], np.int32), numbered(1), r"lanes -1…-1 lie outside 0…65535"),
        (np.array([70_000], np.int32), numbered(1), r"lanes 70000…70000 lie outside"),
        (np.zeros(2, np.int32), numbered(1), r"2 lanes came with 1 rows"),
        (
            np.zeros(1, np.int32),
            np.zeros(1, [("reward", "f4")]),
            r"rows have the layout .*reward.*; the table expects StepS",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(lanes: np.ndarray, rows: np.ndarray, message: str) -> None:
    shard = make_shard()
    shard.connect("w")
    with pytest.raises(SchemaError, match=message):
        shard.insert("w", 0, lanes, rows, timeout_s=0.0)
    assert shard.stats()["inserted"] == shard.items == 0
    assert shard.insert("w", 0, np.zeros(2, np.int32), numbered(2), timeout_s=0.0)


def test_a_schema_survives_its_text() -> None:
    assert StepSchema.from_json(SCHEMA.to_json()) == SCHEMA
    other = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (2,)))
    assert other != SCHEMA
    for name in SCHEMA.dtype.names or ():
        dtype, offset = SCHEMA.dtype.fields[name][:2]  # type: ignore[index]
        assert offset % dtype.base.itemsize == 0


# ------------------------------------------------------------------- uniformity


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic, in standard deviations above its mean (it is near normal for so many cells)."""
    freedom = len(counts) - 1
    statistic = float((((counts - expected) ** 2) / expected).sum())
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def fill(shard: Shard, lanes: int, count: int) -> None:
    """Lanes of `count` rows with episodes of uneven length."""
    writer = CallWriter(shard)
    for lane in range(lanes):
        rows = numbered(count, lane * count)
        for k in range(5 + lane, count, 11 + lane):
            end(rows[: k + 1], terminal=True)
        writer.append(np.full(count, lane, np.int32), rows)


@pytest.mark.parametrize("rare", [False, True], ids=["guessed", "listed"])
def test_draws_are_uniform_over_items(rare: bool) -> None:
    # 200 draws per item: were half of the items 10 % likelier than the others, the statistic would lie
    # about 22 standard deviations above its mean; 4 is passed by chance 3 times in 100 000.
    shard = make_shard(capacity=64 * 1024 if rare else 1024, segment_steps=1024 if rare else 16)
    fill(shard, lanes=7, count=20 if rare else 140)
    found = np.zeros(0, np.int64)
    for _ in range(20):
        batch = shard.sample(10 * shard.items, 1, timeout_s=0.0)
        assert batch is not None
        assert np.all(batch.probability == 1.0 / shard.items)
        found = np.concatenate([found, batch.item])
    ids, counts = np.unique(found, return_counts=True)
    assert len(ids) == shard.items
    assert abs(chi_square(counts, np.full(len(ids), 200.0))) < 4


def test_a_sampler_draws_as_from_one_table() -> None:
    shards = [make_shard(index=0, seed=1), make_shard(index=1, seed=1)]
    fill(shards[0], lanes=6, count=150)
    fill(shards[1], lanes=1, count=120)
    sampler = Sampler([CallSource(shard, horizon=2) for shard in shards], batch_size=500, seed=5)
    total = sum(shard.items for shard in shards)
    keys = np.zeros(0, np.int64)
    for _ in range(400):
        batch = sampler.sample(1.0)
        assert isinstance(batch, WindowBatch)
        assert len(batch) == 500
        assert np.allclose(batch.probability, 1.0 / total, rtol=1e-12)
        keys = np.concatenate([keys, batch.shard * 10**9 + batch.item])
    ids, counts = np.unique(keys, return_counts=True)
    assert len(ids) == total
    # 200 000 draws over about 900 items: shares off by 10 % in half of the items would lie 24 deviations off.
    assert abs(chi_square(counts, np.full(total, 200_000 / total))) < 4
    # And the shards' shares alone, which a per-item test would see only faintly: within 4 binomial deviations.
    share = shards[1].items / total
    of_second = int(counts[ids >= 10**9].sum())
    assert abs(of_second - 200_000 * share) < 4 * np.sqrt(200_000 * share * (1 - share))


def test_the_same_seed_draws_the_same() -> None:
    drawn = []
    for _ in range(2):
        shard = make_shard(seed=3)
        fill(shard, lanes=3, count=100)
        batch = shard.sample(256, 3, timeout_s=0.0)
        assert batch is not None
        drawn.append(batch)
    for name, value in vars(drawn[0]).items():
        assert np.array_equal(value, vars(drawn[1])[name])


def test_sampling_an_empty_shard_waits_and_says_so() -> None:
    shard = make_shard()
    assert shard.sample(1, 1, timeout_s=0.01) is None
    with pytest.raises(TimeoutError, match=r"no batch within 0\.01 s"):
        Sampler([CallSource(shard, horizon=1)], batch_size=8, seed=0).sample(0.01)
