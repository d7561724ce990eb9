"""The pool of segments, writers and lanes, and what is found again after a crash."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay import faults, kernels
from replay.kernels import NONE
from replay.layout import MAX_WRITERS, NAME_BYTES, PAGE, Layout, TableSpec, read_header
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.schema import Field, SchemaError, StepSchema, Window
from replay.shard import WriterClosedError
from replay.storage import SegmentStorage, StorageError
from replay.writers import CallWriter

from .replay_for_tests import FRAMES, HALF_CHEETAH, SCHEMA, draw_all, end, joined, make_shard, numbered
from .replay_reference_for_tests import Piece, Recorder

ONE = (TableSpec(),)


def make_storage(segments: int, segment_steps: int, tables: tuple[TableSpec, ...] = ONE) -> SegmentStorage:
    return SegmentStorage(Layout(SCHEMA, segments, segment_steps, tables))


# ----------------------------------------------------------------------- layout


@pytest.mark.parametrize("schema", [SCHEMA, HALF_CHEETAH, FRAMES], ids=["dict", "half_cheetah", "frames"])
def test_a_schema_survives_its_text_and_is_laid_out_in_whole_words(schema: StepSchema) -> None:
    assert StepSchema.from_json(schema.to_json()) == schema
    assert schema.dtype.itemsize % 8 == schema.packed.itemsize % 8 == 0
    assert schema.packed.itemsize + schema.large_bytes == schema.dtype.itemsize
    taken = np.zeros(schema.dtype.itemsize, int)
    for field in schema.fields:
        dtype, offset = schema.dtype.fields[field.name][:2]  # type: ignore[index]
        assert offset % dtype.base.itemsize == 0
        taken[offset : offset + field.nbytes] += 1
        if field in schema.large:
            assert offset >= schema.packed.itemsize
        else:
            assert schema.packed.fields[field.name][1] == offset  # type: ignore[index]
        if field.name in (schema.rest.names or ()):
            assert schema.rest.fields[field.name][1] + schema.rest_offset == offset  # type: ignore[index]
    assert taken.max() == 1


def test_half_cheetah_steps_take_as_many_bytes_as_their_fields_and_five_more() -> None:
    fields = sum(field.nbytes for field in HALF_CHEETAH.fields)
    assert (fields, HALF_CHEETAH.packed.itemsize) == (103, 104)


def test_schemas_of_other_fields_differ() -> None:
    assert (
        StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (2,))) != SCHEMA
    )
    with pytest.raises(SchemaError, match="not a step schema"):
        StepSchema.from_json('[["observation", "float32", [3]], ["action", "float32", [2]]]')


def test_the_arrays_of_a_layout_lie_apart_on_pages_of_their_own() -> None:
    tables = (TableSpec("a"), TableSpec("b", "prioritised", max_size=9, remover="lifo", max_times_sampled=2))
    layout = Layout(FRAMES, 5, 3, tables)
    assert Layout.from_json(layout.to_json()) == layout
    end_of_last = 0
    for offset, dtype, shape in layout.arrays.values():
        assert offset % PAGE == 0
        assert offset >= end_of_last
        end_of_last = offset + dtype.itemsize * int(np.prod(shape))
    assert layout.size >= end_of_last
    memory = np.zeros(layout.size, np.uint8)
    views = layout.carve(memory)
    for name, view in views.items():
        view[...] = np.zeros((), view.dtype)
        assert view.base is not None, name
    assert {"keys1", "removal_keys1", "times_sampled1"} <= set(views)
    assert not {"keys0", "removal_keys0", "times_sampled0"} & set(views)


@pytest.mark.parametrize("names", [[], ["a", "a"], [f"t{k}" for k in range(kernels.MAX_TABLES + 1)]])
def test_one_to_seven_tables_of_different_names_share_a_storage(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"expected 1 to 7 tables with names of their own, received \["):
        Layout(SCHEMA, 4, 4, tuple(TableSpec(name) for name in names))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"selector": "best"}, r"table t: expected selector one of uniform, .*received 'best'"),
        ({"remover": "worst"}, r"table t: expected remover one of uniform, .*received 'worst'"),
        ({"stride": 0}, r"expected stride of at least 1, received 0"),
        ({"max_size": 0}, r"expected max_size of at least 1, received 0"),
        ({"max_times_sampled": -1}, r"expected max_times_sampled of at least 1, received -1"),
    ],
)
def test_table_settings_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSpec("t", **wrong)  # type: ignore[arg-type]


# --------------------------------------------------------------------- segments


def test_a_full_storage_keeps_the_newest_steps() -> None:
    recorder = Recorder(ONE, segments=8, segment_steps=4)
    recorder.write(Piece(0, 0, 1000, first=True))
    recorder.check()
    assert sorted(recorder.places()) == list(range(1000 - 32, 1000))
    assert (recorder.items[0], recorder.storage.inserted(0)) == (31, 999)


def test_a_lane_that_lags_keeps_its_segment_and_loses_those_before() -> None:
    recorder = Recorder(ONE, segments=4, segment_steps=4)
    recorder.write(Piece(0, 0, 6, first=True))  # segments 0 and 1, which it still fills
    recorder.write(Piece(0, 1, 400, first=True))
    recorder.check()
    assert [number for number in recorder.places() if number < 6] == [4, 5]
    recorder.write(Piece(0, 0, 1))
    recorder.check()
    recorder.read(recorder.rows_of_items(0), Window(3, burn_in=2))


def test_as_many_rows_are_kept_as_the_storage_holds() -> None:
    recorder = Recorder(ONE, segments=9, segment_steps=4)
    for _ in range(30):
        recorder.write(*(Piece(0, lane, 3) for lane in range(3)))
        used = min(recorder.storage.taken, 9)
        assert len(recorder.places()) >= used * 4 - 3 * 3  # but what three lanes have yet to fill
        assert recorder.storage.rows_in_use == used * 4
    recorder.check()


def test_more_lanes_than_segments_are_refused_before_anything_changes() -> None:
    shard = make_shard(capacity=12, segment_steps=4)
    shard.connect("w")
    assert shard.insert("w", 0, np.array([0, 1], np.int32), numbered(2), timeout_s=0.0)
    with pytest.raises(SchemaError, match=r"3 lanes write to a shard of 3 segments.*raise replay\.capacity"):
        shard.insert("w", 1, np.arange(3, dtype=np.int32), numbered(3, 10), timeout_s=0.0)
    assert shard.connect("w") == 0
    assert shard.insert("w", 1, np.array([0, 1], np.int32), numbered(2, 20), timeout_s=0.0)
    assert draw_all(shard).steps["policy_version"].tolist() == [[0, 20], [1, 21]]


def test_a_batch_of_more_lanes_than_a_journal_record_holds_is_written_in_full() -> None:
    lanes = kernels.RECORD_LANES + 100
    recorder = Recorder(ONE, segments=lanes + 1, segment_steps=2)
    for _ in range(2):
        recorder.write(*(Piece(0, lane, 1) for lane in range(lanes)))
    assert recorder.items[0] == recorder.storage.inserted(0) == lanes
    assert len(recorder.places()) == 2 * lanes


def test_an_empty_batch_counts_as_applied() -> None:
    storage = make_storage(4, 4)
    slot = storage.open_writer("w")
    storage.append(slot, 0, np.empty(0, np.int64), SCHEMA.zeros(0))
    assert storage.last_sequence(slot) == 0
    assert storage.taken == 0


def test_rows_of_another_layout_are_refused() -> None:
    storage = make_storage(4, 4)
    slot = storage.open_writer("w")
    lane = storage.open_lane(slot, 0)
    with pytest.raises(SchemaError, match=r"rows have the layout .*, the table's schema is "):
        storage.append(slot, 0, np.array([lane]), HALF_CHEETAH.zeros(1))
    assert storage.last_sequence(slot) == NONE


def test_ids_that_were_never_given_are_no_rows() -> None:
    storage = make_storage(4, 4)
    slot = storage.open_writer("w")
    lane = storage.open_lane(slot, 0)
    storage.append(slot, 0, np.full(5, lane), numbered(5))
    given_ids = storage.item_ids(np.arange(4))
    for item in (-1, -17, 10**6, 2**62, int(given_ids.max()) + 1000):
        assert storage.rows_of(np.array([item])).tolist() == [NONE]
    assert storage.rows_of(given_ids).tolist() == [0, 1, 2, 3]


# --------------------------------------------------------------------- counting


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_rows_are_counted_as_the_items_they_will_make(
    pieces: list[tuple[int, int, bool, bool]], stride: int, batches: int
) -> None:
    tables = (TableSpec("all"), TableSpec("some", stride=stride))
    storage = make_storage(200, 4, tables)
    slot = storage.open_writer("w")
    lanes = np.array([storage.open_lane(slot, lane) for lane in range(3)])
    counted = np.zeros(2, np.int64)
    going = [False] * 3  # whether the lane's episode goes on
    for sequence in range(batches):
        numbers, parts = [], []
        for lane, count, last, terminal in pieces:
            part = numbered(count, 100 * sequence)
            part["is_first"][0] = not going[lane]
            if last:
                end(part, terminal=terminal)
            going[lane] = not last
            numbers.append(np.full(count, lanes[lane]))
            parts.append(part)
        batch = np.concatenate(numbers), joined(*parts)
        counted += storage.count_items(slot, sequence, *batch)
        storage.append(slot, sequence, *batch)
    # One more step and one that ends each episode: what was counted has come.
    for lane in range(3):
        part = numbered(1)
        part["is_first"] = not going[lane]
        end(part, terminal=False)
        storage.append(slot, storage.last_sequence(slot) + 1, lanes[[lane]], part)
    assert [storage.inserted(table) for table in range(2)] == counted.tolist()


# ---------------------------------------------------------------------- writers


def test_a_writer_that_closes_leaves_truncated_episodes() -> None:
    shard = make_shard()
    writer = CallWriter(shard)
    writer.append(np.array([0, 0, 0, 1, 1], np.int32), joined(numbered(3), numbered(2, 10, last=True)))
    assert shard.tables["steps"].items == 3
    writer.close()
    windows = draw_all(shard, 4)
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
    stats = shard.stats()
    assert (stats["tables"]["steps"]["items"], stats["tables"]["steps"]["inserted"], stats["duplicates"]) == (7, 7, 1)
    assert shard.connect("w") == 1


@pytest.mark.parametrize(
    ("lanes", "rows", "message"),
    [
        (np.array([-1], np.int32), numbered(1), r"expected lane numbers from 0 to 65535, received -1"),
        (np.array([70_000], np.int32), numbered(1), r"expected lane numbers from 0 to 65535, received 70000"),
        (np.zeros(2, np.int32), numbered(1), r"expected a lane for each row, received 2 lanes and 1 rows"),
        (np.zeros(1, np.int32), np.zeros(1, [("reward", "f4")]), r"rows have the layout .*reward.*schema is "),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(lanes: np.ndarray, rows: np.ndarray, message: str) -> None:
    shard = make_shard()
    shard.connect("w")
    with pytest.raises(SchemaError, match=message):
        shard.insert("w", 0, lanes, rows, timeout_s=0.0)
    assert shard.stats()["tables"]["steps"]["inserted"] == shard.tables["steps"].items == 0
    assert shard.insert("w", 0, np.zeros(2, np.int32), numbered(2), timeout_s=0.0)


def starting(*flags: bool) -> np.ndarray:
    """Steps that begin an episode where a flag is set."""
    rows = numbered(len(flags))
    rows["is_first"] = flags
    return rows


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("before", "lanes", "starts", "wrong"),
    [
        ((), (0, 0, 0), (1, 0, 1), 2),  # in the batch
        ((0,), (0,), (1,), 0),  # across batches
        ((0, 1), (1, 0, 2, 1), (0, 0, 1, 1), 3),  # in another lane's rows
        ((), tuple(range(8)) * 8, (1,) * 8 + (0,) * 55 + (1,), 63),  # after episodes of many lanes began
        ((), tuple(range(8)) * 2, (1,) * 15 + (0,), 8),
    ],
)
def test_an_episode_that_begins_before_the_last_one_ended_is_refused(
    stride: int, before: tuple[int, ...], lanes: tuple[int, ...], starts: tuple[int, ...], wrong: int
) -> None:
    shard = make_shard(tables=(TableSpec("steps", stride=stride),))
    shard.connect("w")
    sequence = 0
    if before:
        assert shard.insert("w", 0, np.array(before, np.int32), numbered(len(before)), timeout_s=0.0)
        sequence = 1
    limiter = shard.tables["steps"].limiter
    assert isinstance(limiter, RateLimiter)
    counted, state = limiter.inserted, shard._storage.state.copy()
    rows = starting(*map(bool, starts))
    number = lanes[wrong]
    expected = rf"expected is_last before is_first in every lane; row {wrong} of the batch .*\(number {number}\)"
    with pytest.raises(SchemaError, match=expected):
        shard.insert("w", sequence, np.array(lanes, np.int32), rows, timeout_s=0.0)
    assert limiter.inserted == counted
    changed = np.flatnonzero(shard._storage.state != state)
    assert set(changed.tolist()) <= {kernels.LANES}  # how many lanes there have ever been
    assert set(shard._storage.lanes_of(0)) == set(before)
    rows["is_first"] = False
    assert shard.insert("w", sequence, np.array(lanes, np.int32), rows, timeout_s=0.0)


def test_episodes_may_follow_one_another_in_every_lane() -> None:
    shard = make_shard(capacity=4096)
    shard.connect("w")
    for lanes, steps in ((40, 2), (1, 50), (3, 7)):  # many begin at once, or one after the other
        sequence = shard.connect("w") + 1
        for batch in range(3):
            rows = numbered(lanes * steps)
            time = np.arange(lanes * steps) // lanes
            rows["is_first"], rows["is_last"] = time == 0, time == steps - 1
            here = np.tile(np.arange(lanes, dtype=np.int32), steps)
            assert shard.insert("w", sequence + batch, here, rows, timeout_s=0.0)
    limiter = shard.tables["steps"].limiter
    assert isinstance(limiter, RateLimiter)
    assert limiter.inserted == shard.tables["steps"].inserted == 3 * (40 + 49 + 3 * 6)


def test_a_queue_lets_writers_in_for_as_long_as_what_they_cut_is_given_back() -> None:
    # Each writes steps 0 to 2 and closes: step 0 becomes an item, step 2 would have.
    table = TableSpec("steps", "fifo", stride=2, max_times_sampled=1)
    limiter = RateLimiter(RateLimit.queue(4))
    shard = make_shard(tables=(table,), limiters={"steps": limiter})
    for k in range(20):
        writer = CallWriter(shard)
        writer.append(np.zeros(3, np.int32), numbered(3, 3 * k))
        writer.close()
        found = shard.sample("steps", 1, 1, Window(), timeout_s=0.0)
        assert found is not None
        assert (limiter.inserted, limiter.sampled) == (k + 1, k + 1)


def test_a_writer_that_closes_gives_back_what_each_table_counted_of_it() -> None:
    tables = (TableSpec("all"), TableSpec("some", stride=2), TableSpec("few", stride=3))
    shard = make_shard(tables=tables)
    writer = CallWriter(shard)
    for number, count in enumerate((1, 2, 3, 4, 5)):  # cut at steps 0 to 4
        writer.append(np.full(count, number, np.int32), numbered(count))
    writer.append(np.full(3, 5, np.int32), numbered(3, last=True))
    writer.close()
    for place, table in enumerate(shard.tables.values()):
        assert isinstance(table.limiter, RateLimiter)
        assert table.limiter.inserted == table.inserted == [12, 7, 6][place]


def test_a_message_of_too_many_lanes_takes_none() -> None:
    shard = make_shard(capacity=40, segment_steps=4)
    for name in ("greedy", "modest"):
        shard.connect(name)
    for _ in range(2):
        with pytest.raises(SchemaError, match=r"20 lanes write to a shard of 10 segments"):
            shard.insert("greedy", 0, np.arange(20, dtype=np.int32), numbered(20), timeout_s=0.0)
    assert shard.insert("modest", 0, np.arange(9, dtype=np.int32), numbered(9), timeout_s=0.0)


def test_the_writer_closed_first_is_forgotten_where_none_is_free() -> None:
    storage = make_storage(4, 4)
    slots = [storage.open_writer(f"w{k}") for k in range(MAX_WRITERS)]
    assert sorted(slots) == list(range(MAX_WRITERS))
    with pytest.raises(SchemaError, match=r"4096 writers are open"):
        storage.open_writer("one too many")
    for k in (7, 3, 9):
        storage.close_writer(slots[k])
    storage.open_writer("first")
    known = storage.find_writers()
    assert "w7" not in known
    assert known["first"] == (slots[7], True)
    assert known["w3"] == (slots[3], False)
    storage.open_writer("second")
    assert "w3" not in storage.find_writers()
    assert storage.find_writers()["w9"] == (slots[9], False)


def test_long_names_are_refused() -> None:
    storage = make_storage(4, 4)
    storage.open_writer("é" * (NAME_BYTES // 2))
    with pytest.raises(SchemaError, match=r"name of at most 128 bytes, received 130"):
        storage.open_writer("é" * (NAME_BYTES // 2 + 1))


# ------------------------------------------------------------------ after a crash


def recovered(recorder: Recorder) -> SegmentStorage:
    """The storage as a new process finds it in a copy of the memory."""
    return SegmentStorage(
        recorder.storage.layout,
        memory=recorder.memory.copy(),
        recover=True,
        history=recorder.history,
        changed=recorder.changed,
    )


TWO = (TableSpec("all", "prioritised"), TableSpec("some", stride=3, max_size=40, remover="lifo"))


def some_history(*, frames: bool = False) -> Recorder:
    """Three writers, one of them closed, of several lanes, which have been overwritten in part."""
    recorder = Recorder(TWO, segments=12, segment_steps=5, history=2 if frames else 0, frames=frames)
    for k in range(20):
        recorder.write(
            Piece(0, 0, 3, last=k % 3 == 0), Piece(0, 1, 5, last=k % 5 == 0, terminal=True), Piece(1, 0, 2 + k % 4)
        )
    recorder.write(Piece(2, 0, 3))
    recorder.close(2)
    return recorder


@pytest.mark.parametrize("frames", [False, True], ids=["steps", "frames"])
def test_a_copy_of_the_memory_at_rest_holds_everything(frames: bool) -> None:
    recorder = some_history(frames=frames)
    live = recorder.storage
    found = recovered(recorder)
    assert found.identity == live.identity
    for name in found.arrays:
        assert (found.arrays[name] == live.arrays[name]).all(), name
    assert found.find_writers() == live.find_writers()
    assert found.find_writers()["w3"] == (2, False)
    for slot in range(2):
        assert found.last_sequence(slot) == live.last_sequence(slot) == 19
        assert found.lanes_of(slot) == live.lanes_of(slot)
    # And what comes then is written as if nothing had happened.
    recorder.storage = found
    recorder.write(Piece(0, 0, 7, last=True), Piece(1, 0, 9), Piece(0, 1, 30))
    recorder.write(Piece(4, 0, 11), Piece(0, 0, 2))
    recorder.check()
    recorder.read(recorder.rows_of_items(0), Window(4, burn_in=3, stack=3 if frames else 1))


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process, whose memory then lies as it was."""


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def die() -> None:
        raise Killed

    monkeypatch.setattr(faults, "die", die)
    return monkeypatch


@pytest.mark.parametrize("point", kernels.FAULTS)
def test_a_batch_cut_short_by_a_crash_is_applied_once_when_it_is_sent_again(
    killing: pytest.MonkeyPatch, point: str
) -> None:
    crashes = 0
    pieces = st.builds(
        Piece, st.integers(0, 1), st.integers(0, 2), st.integers(1, 9), last=st.booleans(), terminal=st.booleans()
    )
    histories = st.lists(st.lists(pieces, min_size=1, max_size=4), min_size=1, max_size=12)

    @settings(max_examples=40)
    @given(st.integers(1, 12), st.booleans(), st.booleans(), histories, st.sampled_from((0, 1, 6, 30, 80)))
    def check(passing: int, frames: bool, drops: bool, batches: list[list[Piece]], between: int) -> None:
        """`between`: steps that the other writer writes between the crash and the retry."""
        nonlocal crashes
        tables = (TableSpec("all"), TableSpec("some", stride=2, max_size=1000 if drops else None))
        killing.setattr(faults, "wanted", lambda points: (points.index(point) + 1, passing))
        recorder = Recorder(tables, segments=9, segment_steps=4, history=2 if frames else 0, frames=frames)
        killing.setattr(faults, "wanted", lambda points: (0, 0))
        for written in batches:
            for writer in dict.fromkeys(piece.writer for piece in written):
                lanes, steps = recorder.batch(writer, [piece for piece in written if piece.writer == writer])
                try:
                    recorder.apply(writer, lanes, steps)
                except Killed:
                    crashes += 1
                    recover(recorder)
                    if between:
                        recorder.write(Piece(1 - writer, 0, between))
                    if recorder.storage.last_sequence(recorder.slot(writer)) < recorder.sequence(writer):
                        recorder.apply(writer, lanes, steps)
                    else:
                        recorder.skip(writer)
            recorder.check()
        recorder.read(recorder.rows_of_items(0), Window(3, burn_in=2, stack=3 if frames else 1))

    check()
    assert crashes > 5


def recover(recorder: Recorder) -> None:
    """Go on with the storage that is found in a copy of the memory."""
    before = recorder.storage
    found = recorder.storage = recovered(recorder)
    assert found.find_writers() == before.find_writers()
    for slot, is_open in before.find_writers().values():
        assert is_open
        assert found.lanes_of(slot) == before.lanes_of(slot)
    assert found.state[kernels.HEAD] == found.state[kernels.APPLIED] == before.state[kernels.HEAD]
    recorder.items = [len(recorder.rows_of_items(table)) for table in range(len(recorder.items))]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_retry_shorter_than_what_is_applied_of_it_is_refused(killing: pytest.MonkeyPatch, count: int) -> None:
    shard = make_shard(segment_steps=4)
    shard.connect("w")
    lanes = np.zeros(7, np.int32)
    assert shard.insert("w", 0, lanes[:2], numbered(2), timeout_s=0.0)
    storage = shard._storage
    storage._fault[:] = kernels.RECORD_APPLIED, 1
    with pytest.raises(Killed):
        shard.insert("w", 1, lanes, numbered(7, 2), timeout_s=0.0)  # two fit into the segment
    assert storage.arrays["writers"][kernels.PARTIAL, 0] == 2
    with pytest.raises(SchemaError, match=rf"of batch 1 2 rows are applied already .* received {count} rows"):
        shard.insert("w", 1, lanes[:count], numbered(count, 2), timeout_s=0.0)
    assert shard.insert("w", 1, lanes, numbered(7, 2), timeout_s=0.0)
    assert storage.rows["policy_version"][:9].tolist() == list(range(9))


@pytest.mark.parametrize("kind", ["APPEND", "TAKE"])
def test_a_change_published_and_not_applied_is_completed(killing: pytest.MonkeyPatch, kind: str) -> None:
    recorder = Recorder(ONE, segments=4, segment_steps=4)
    recorder.write(Piece(0, 0, 14, first=True))
    before = recorder.memory.copy()
    lanes, steps = recorder.batch(0, [Piece(0, 0, 2 if kind == "APPEND" else 5)])
    point = "record_published" if kind == "APPEND" else "segment_published"
    killing.setattr(faults, "wanted", lambda points: (points.index(point) + 1, 1))
    cut = SegmentStorage(recorder.storage.layout, memory=before, recover=True)
    with pytest.raises(Killed):
        cut.append(0, 1, lanes, steps)
    assert cut.state[kernels.HEAD] == cut.state[kernels.APPLIED] + 1
    found = SegmentStorage(cut.layout, memory=before.copy(), recover=True)
    assert found.state[kernels.HEAD] == found.state[kernels.APPLIED] == cut.state[kernels.HEAD]
    if kind == "APPEND":
        assert found.last_sequence(0) == 1
        assert found.inserted(0) == 15
        recorder.storage.append(0, 1, lanes, steps)
        for name in ("state", "segments", "lanes", "writers", "flags", "packed"):
            assert (found.arrays[name] == recorder.storage.arrays[name]).all(), name
    else:
        assert found.taken == 5
        assert found.last_sequence(0) == 0
        assert found.arrays["writers"][kernels.PARTIAL, 0] == 2  # rows that fitted into the segment before


def test_a_lane_whose_newest_step_was_overwritten_after_a_crash_goes_on_alone(killing: pytest.MonkeyPatch) -> None:
    # Lane 0 has taken a segment and written nothing to it: the segment with its newest step is anybody's.
    recorder = Recorder(ONE, segments=4, segment_steps=4)
    recorder.write(Piece(0, 0, 4, first=True))
    recorder.write(Piece(1, 0, 1, first=True))
    lanes, steps = recorder.batch(0, [Piece(0, 0, 3)])
    killing.setattr(faults, "wanted", lambda points: (points.index("segment_taken") + 1, 1))
    recorder.storage = SegmentStorage(recorder.storage.layout, memory=recorder.memory, recover=True)
    with pytest.raises(Killed):
        recorder.apply(0, lanes, steps)
    killing.setattr(faults, "wanted", lambda points: (0, 0))
    closed, written = recovered(recorder), recovered(recorder)
    for storage in (closed, written):
        recorder.storage = storage
        slot = storage.find_writers()["w2"][0]
        lane = storage.lanes_of(slot)[0]
        for sequence in range(1, 9):
            storage.append(slot, sequence, np.full(4, lane), numbered(4, 1000 + 4 * sequence))
    others = sorted(closed.rows["policy_version"][closed.flags & kernels.LINKED != 0].tolist())
    assert closed.close_writer(closed.find_writers()["w1"][0]) == 0
    assert not closed.rows["is_last"].any()
    written.append(written.find_writers()["w1"][0], 1, lanes, steps)
    linked = sorted(written.rows["policy_version"][written.flags & kernels.LINKED != 0].tolist())
    assert linked == sorted([*others, 5, 6])
    assert min(others) > 1000
    # The step that was overwritten counts as inserted once it has a successor, as do those overwritten later.
    assert written.inserted(0) == closed.inserted(0) + 3


def test_a_step_overwritten_before_its_successor_came_is_inserted_and_deleted_at_once(
    killing: pytest.MonkeyPatch,
) -> None:
    tables = (TableSpec("all"), TableSpec("some", stride=2), TableSpec("few", stride=3))
    shard = make_shard(capacity=16, segment_steps=4, tables=tables)
    for name in ("late", "other"):
        shard.connect(name)
    lane = np.zeros(4, np.int32)
    assert shard.insert("late", 0, lane, numbered(4), timeout_s=0.0)  # a full segment
    shard._storage._fault[:] = kernels.SEGMENT_TAKEN, 1
    with pytest.raises(Killed):
        shard.insert("late", 1, lane, numbered(4, 4), timeout_s=0.0)
    for sequence in range(8):
        assert shard.insert("other", sequence, lane, numbered(4, 100 + 4 * sequence), timeout_s=0.0)
    assert 3 not in shard._storage.rows["policy_version"]
    assert shard.insert("late", 1, lane, numbered(4, 4), timeout_s=0.0)
    for name in ("late", "other"):
        shard.end_writer(name)
    for table in shard.tables.values():
        limiter = table.limiter
        assert isinstance(limiter, RateLimiter)
        # Each lane's steps but the last one, at the stride: what the limiter was asked for.
        assert table.inserted == sum(len(range(0, count - 1, table.spec.stride)) for count in (8, 32))
        assert limiter.inserted == table.inserted
        assert limiter.removed == table.inserted - table.items


def test_a_damaged_or_foreign_file_is_refused() -> None:
    recorder = some_history()
    layout, memory = recorder.storage.layout, recorder.memory
    assert read_header(memory) is not None
    with pytest.raises(StorageError, match="is no replay storage"):
        SegmentStorage(layout, memory=np.zeros_like(memory), recover=True)
    for other in (
        Layout(SCHEMA, 5, 12, TWO),
        Layout(SCHEMA, 12, 5, TWO[:1]),
        Layout(SCHEMA, 12, 5, (TableSpec("all", "prioritised", priority_exponent=0.5), TWO[1])),
    ):
        with pytest.raises(StorageError, match=r"another layout: expected .*, found "):
            SegmentStorage(other, memory=np.concatenate([memory, np.zeros(10**6, np.uint8)]), recover=True)
    damaged = memory.copy()
    arrays = layout.carve(damaged)
    arrays["state"][kernels.APPLIED] -= 1
    arrays["journal"][int(arrays["state"][kernels.HEAD]) & 1, kernels.RECORD_HEAD] ^= 1
    with pytest.raises(StorageError, match="checksum of the journal's last record is wrong"):
        SegmentStorage(layout, memory=damaged, recover=True)
