"""Windows, masks, returns and frame stacks against a plain reference, with the shard's lock and without it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.buffers import buffers
from replay.gather import WindowReader
from replay.layout import Layout, TableSpec
from replay.schema import SchemaError, Window
from replay.storage import SegmentStorage

from .replay_for_tests import FRAMES, SCHEMA, rows
from .replay_reference_for_tests import Piece, Recorder

WRITERS, LANES = 2, 3  # of each writer


@dataclass(frozen=True)
class Write:
    pieces: list[Piece]


@dataclass(frozen=True)
class Close:
    writer: int


@dataclass(frozen=True)
class Drop:
    """Every `step`-th item leaves a table."""

    table: int
    step: int


@dataclass(frozen=True)
class Draw:
    """Items are drawn, to be read when some more operations are done."""

    window: Window
    after: int


@dataclass(frozen=True)
class History:
    segments: int
    segment_steps: int
    strides: tuple[int, ...]
    stack: int
    operations: list[Write | Close | Drop | Draw]


@st.composite
def histories(draw: st.DrawFn, *, frames: bool, drops: bool) -> History:
    stack = draw(st.integers(1, 4)) if frames else 1
    pieces = st.builds(
        Piece,
        writer=st.integers(0, WRITERS - 1),
        lane=st.integers(0, LANES - 1),
        count=st.integers(1, 12),
        first=st.booleans(),
        last=st.booleans(),
        terminal=st.booleans(),
    )
    windows = st.builds(
        Window,
        length=st.integers(1, 6),
        burn_in=st.integers(0, 4),
        observations=st.sampled_from(["all", "ends"]),
        stack=st.integers(1, stack),
        stack_on_device=st.booleans() if frames else st.just(False),
    )
    operation = st.one_of(
        st.builds(Write, st.lists(pieces, min_size=1, max_size=4)),
        st.builds(Write, st.lists(pieces, min_size=1, max_size=4)),
        st.builds(Draw, windows, st.integers(0, 3)),
        st.builds(Close, st.integers(0, WRITERS - 1)),
        *([st.builds(Drop, st.integers(0, 1), st.integers(1, 3))] if drops else []),
    )
    return History(
        segments=draw(st.integers(WRITERS * LANES + 1, 10)),
        segment_steps=draw(st.integers(1, 8)),
        strides=(1, draw(st.integers(1, 4))),
        stack=stack,
        operations=draw(st.lists(operation, min_size=1, max_size=20)),
    )


def run(history: History, *, frames: bool, drops: bool) -> None:
    """Do what the history says to a storage and to the reference, and compare all there is after each operation."""
    # A table with a size of its own makes the storage look for segments whose items are all gone.
    size = 10**6 if drops else None
    tables = tuple(TableSpec(f"t{k}", stride=stride, max_size=size) for k, stride in enumerate(history.strides))
    recorder = Recorder(
        tables,
        segments=history.segments,
        segment_steps=history.segment_steps,
        history=history.stack - 1,
        frames=frames,
    )
    pending: list[tuple[int, Window, np.ndarray, list[int], int]] = []
    for now, operation in enumerate(history.operations):
        match operation:
            case Write(pieces):
                recorder.write(*pieces)
            case Close(writer):
                recorder.close(writer)
            case Drop(table, step):
                items = recorder.rows_of_items(table)
                recorder.drop(table, set(recorder.number(items[::step])))
            case Draw(window, after):
                items = recorder.rows_of_items(0)
                recorder.read(items, window)
                pending.append((now + after, window, items, recorder.number(items), recorder.storage.taken))
        recorder.check()
        for due, window, items, numbers, taken in pending:
            if due == now:
                recorder.read_drawn(items, numbers, window, taken)
    for _, window, items, numbers, taken in pending:
        recorder.read_drawn(items, numbers, window, taken)


@settings(max_examples=100)
@given(histories(frames=False, drops=False))
def test_windows_equal_the_reference(history: History) -> None:
    run(history, frames=False, drops=False)


@settings(max_examples=60)
@given(histories(frames=True, drops=False))
def test_windows_of_stacked_frames_equal_the_reference(history: History) -> None:
    run(history, frames=True, drops=False)


@settings(max_examples=60)
@given(histories(frames=False, drops=True))
def test_windows_equal_the_reference_where_tables_drop_items(history: History) -> None:
    run(history, frames=False, drops=True)


@settings(max_examples=40)
@given(histories(frames=True, drops=True))
def test_windows_of_stacked_frames_equal_the_reference_where_tables_drop_items(history: History) -> None:
    run(history, frames=True, drops=True)


# ------------------------------------------------------------- by hand, to be read


def one_lane(episodes: list[int], *, frames: bool = False, history: int = 0, segments: int = 8) -> Recorder:
    """A storage with a lane of episodes of these lengths, the last of them unfinished."""
    recorder = Recorder((TableSpec(),), segments=segments, segment_steps=4, history=history, frames=frames)
    for k, length in enumerate(episodes):
        recorder.write(Piece(0, 0, length, first=True, last=k < len(episodes) - 1, terminal=k % 2 == 0))
    return recorder


def numbers_of(recorder: Recorder, window: Window) -> dict[int, list[int]]:
    """Item → the numbers of its window's columns."""
    items = recorder.rows_of_items(0)
    recorder.reference.stored = set(recorder.places())
    batch = buffers(recorder.storage.layout.schema, window, len(items))
    WindowReader(recorder.storage.layout, recorder.storage.arrays, window).read(items, batch, 0)
    return dict(zip(recorder.number(items), batch.steps["policy_version"].tolist(), strict=True))


def test_windows_end_with_their_episode_and_begin_in_it() -> None:
    recorder = one_lane([5, 3])
    assert numbers_of(recorder, Window(3)) == {
        0: [0, 1, 2, 3],
        1: [1, 2, 3, 4],
        2: [2, 3, 4, 4],
        3: [3, 4, 4, 4],
        5: [5, 6, 7, 7],
        6: [6, 7, 7, 7],
    }
    assert numbers_of(recorder, Window(1, burn_in=2))[6] == [5, 5, 6, 7]


def test_a_window_is_bootstrapped_unless_its_episode_has_come_to_its_end() -> None:
    recorder = one_lane([3, 3, 2])  # the first ends in a terminal state, the second is truncated
    items, window = recorder.rows_of_items(0), Window(2)
    batch = buffers(SCHEMA, window, len(items))
    WindowReader(recorder.storage.layout, recorder.storage.arrays, window).read(items, batch, 0)
    assert recorder.number(items) == [0, 1, 3, 4, 6]
    gained, discount = batch.returns(0.5)
    assert gained.tolist() == [0.125 + 1.125 / 2, 1.125, 3.125 + 4.125 / 2, 4.125, 6.125]
    assert discount.tolist() == [0.0, 0.0, 0.25, 0.5, 0.5]
    assert batch.mask().tolist() == [[True, True], [True, False], [True, True], [True, False], [True, False]]


def test_a_chunk_brings_all_actions_and_only_its_first_and_last_observation() -> None:
    recorder = one_lane([6, 1])
    window = Window(4, observations="ends")
    items = recorder.rows_of_items(0)
    batch = buffers(SCHEMA, window, len(items))
    WindowReader(recorder.storage.layout, recorder.storage.arrays, window).read(items, batch, 0)
    assert recorder.number(items) == [0, 1, 2, 3, 4]
    assert set(batch.steps.dtype.names or ()) == {
        "action",
        "reward",
        "policy_version",
        "is_first",
        "is_last",
        "is_terminal",
    }
    assert batch.steps["reward"][0].tolist() == [0.125, 1.125, 2.125, 3.125, 4.125]
    assert batch.ends is not None
    assert batch.ends["observation/state"][:, :, 0].tolist() == [[0, 4], [1, 5], [2, 5], [3, 5], [4, 5]]


def test_frames_are_stacked_within_their_episode() -> None:
    recorder = one_lane([3, 4], frames=True, history=2)
    window = Window(1, stack=3)
    items = recorder.rows_of_items(0)
    batch = buffers(FRAMES, window, len(items))
    WindowReader(recorder.storage.layout, recorder.storage.arrays, window).read(items, batch, 0)
    assert batch.frames["observation/frame"][:, :, :, 0, 0].tolist() == [
        [[0, 0, 0], [0, 0, 1]],
        [[0, 0, 1], [0, 1, 2]],
        [[3, 3, 3], [3, 3, 4]],
        [[3, 3, 4], [3, 4, 5]],
        [[3, 4, 5], [4, 5, 6]],
    ]


def test_stack_on_device_are_delivered_once_also_where_a_batch_is_put_together_from_two_reads() -> None:
    recorder = one_lane([9, 1], frames=True, history=2)
    window = Window(2, stack=3, stack_on_device=True)
    items = recorder.rows_of_items(0)
    batch = buffers(FRAMES, window, len(items))
    reader = WindowReader(recorder.storage.layout, recorder.storage.arrays, window)
    reader.read(items[:3], batch, 0)
    assert reader.distinct == 5
    reader.read(items[3:], batch, 3, reader.distinct)
    assert reader.distinct == 8  # steps 1 to 8: step 1 and 2 are stacked at step 3
    recorder.reference.stored = set(recorder.places())
    recorder.reference.check(batch, recorder.number(items), window, set())


def test_a_window_is_read_into_its_place_and_nowhere_else() -> None:
    recorder = one_lane([9, 1])
    window = Window(2, burn_in=1)
    items = recorder.rows_of_items(0)
    batch = buffers(SCHEMA, window, len(items) + 2)
    batch.steps["reward"], batch.length[:], batch.item[:] = -1.0, -1, -1
    WindowReader(recorder.storage.layout, recorder.storage.arrays, window).read(items, batch, 1)
    for edge in (0, -1):
        assert (batch.steps["reward"][edge] == -1.0).all()
        assert (batch.length[edge], batch.item[edge]) == (-1, -1)
    assert (batch.length[1:-1] > 0).all()
    assert batch.item[1:-1].tolist() == recorder.storage.item_ids(items).tolist()


@pytest.mark.parametrize(
    "wrong", [{"length": 0}, {"burn_in": -1}, {"stack": 0}, {"observations": "some"}, {"length": -3, "stack": 2}]
)
def test_windows_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"expected length ≥ 1, burn_in ≥ 0, stack ≥ 1.*received Window\("):
        Window(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [Window(stack=2), Window(stack_on_device=True)])
def test_small_fields_are_not_stacked(window: Window) -> None:
    recorder = one_lane([3, 1])
    with pytest.raises(SchemaError, match=r"expected a field of frames \(≥ 4096 bytes\) to stack"):
        WindowReader(recorder.storage.layout, recorder.storage.arrays, window)


# -------------------------------------------------------------- while rows are written

EPISODE, LANES_WRITTEN = 37, 3
CYCLE = EPISODE * LANES_WRITTEN * 20  # numbers begin again, long after those of the turn before were overwritten


@pytest.mark.parametrize(
    "window",
    [
        Window(5, burn_in=2),
        Window(3, observations="ends"),
        Window(2, burn_in=1, stack=4),
        Window(2, stack=3, stack_on_device=True),
    ],
    ids=str,
)
def test_what_a_reader_without_the_lock_does_not_report_is_right(window: Window) -> None:
    # 192 steps of three lanes, overwritten all the time in another thread; only the draw takes the lock.
    layout = Layout(FRAMES, 24, 8, (TableSpec(),))
    storage = SegmentStorage(layout, history=3)
    numbers = np.arange(CYCLE)
    episode_step = numbers // LANES_WRITTEN % EPISODE
    steps = rows(numbers, frames=True)
    steps["is_first"], steps["is_last"] = episode_step == 0, episode_step == EPISODE - 1
    slot = storage.open_writer("w")
    lanes = np.array([storage.open_lane(slot, lane) for lane in range(LANES_WRITTEN)])
    lock, done = threading.Lock(), threading.Event()

    def write() -> None:
        sequence, at = 0, 0
        while not done.is_set():
            count = 3 + sequence % 11
            chosen = numbers.take(range(at, at + count), mode="wrap")
            with lock:
                storage.append(slot, sequence, lanes[chosen % LANES_WRITTEN], steps[chosen])
            sequence, at = sequence + 1, (at + count) % CYCLE

    def number(back: int, of: np.ndarray) -> np.ndarray:
        """The step so many before another, its episode's first at the earliest."""
        earlier: np.ndarray = of - LANES_WRITTEN * np.minimum(back, episode_step[of])
        return earlier

    writer = threading.Thread(target=write)
    writer.start()
    reported = read = 0
    rng = np.random.default_rng(0)
    try:
        while read < 20_000 or not reported:
            with lock:
                items = np.flatnonzero(storage.flags & 2)
                if len(items) < 100:
                    continue
                items = rng.choice(items, 64)
                taken = storage.taken
            batch = buffers(FRAMES, window, len(items))
            bad = WindowReader(layout, storage.arrays, window).read(items, batch, 0, drawn=taken)
            good = np.setdiff1d(np.arange(len(items)), bad)
            reported, read = reported + len(bad), read + len(items)
            column = np.arange(window.rows) - window.burn_in
            got = batch.steps["policy_version"][good]
            item = got[:, window.burn_in]
            length = batch.length[good]
            warm = np.zeros(len(good), int) if batch.burn_in is None else batch.burn_in[good]
            assert (length >= 1).all()
            expected = item[:, None] + LANES_WRITTEN * np.clip(column, -warm[:, None], length[:, None])
            assert (got == expected).all()
            assert (episode_step[item] + length < EPISODE).all()
            assert (warm <= episode_step[item]).all()
            assert (batch.steps["reward"][good] == expected + 0.125).all()
            seen = expected
            if batch.ends is not None:
                seen = np.stack([item, item + LANES_WRITTEN * length], 1)
                assert (batch.ends["observation/state"][good, :, 0] == seen).all()
            frames = batch.frames["observation/frame"]
            if batch.frame_index is not None:
                frames = frames[batch.frame_index]
            stack = np.stack([number(back, seen) for back in range(window.stack - 1, -1, -1)], 2)
            assert (frames[good][..., 0, 0] == stack % 256).all()
            assert (frames[good][..., -1, -1] == stack // 256).all()
            assert (frames[good][..., 1, :] == (stack % 251)[..., None]).all()
    finally:
        done.set()
        writer.join()
