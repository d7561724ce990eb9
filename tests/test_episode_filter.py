"""The filter of episodes hands on exactly the rows of kept groups, however rows and verdicts come."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.envs import check_env
from actors.episode_filter import EpisodeFilter
from configs.schema import EnvSettings
from learners.policy import TASK
from replay.schema import Field, StepSchema
from tests.test_rollout import Sink

SCHEMA = StepSchema({"observation": Field("observation", "float32")}, Field("action", "int64", choices=2))


def judge(passes: int, attempts: int) -> Literal["kept", "too_easy", "too_hard"]:
    return "too_hard" if passes == 0 else "too_easy" if passes == attempts else "kept"


def episode(number: int, length: int) -> NDArray[Any]:
    """Rows that tell their episode and their place in it."""
    rows = SCHEMA.zeros(length)
    rows["observation"], rows["action"] = number, np.arange(length)
    rows["is_first"][0] = rows["is_last"][-1] = True
    return rows


@given(
    # Each lane's episodes: the group of each, and its rows.
    lanes=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=6), min_size=1, max_size=4),
    passes=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    rows_per_write=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
def test_kept_groups_are_written_whole(
    lanes: list[list[tuple[int, int]]], passes: list[int], rows_per_write: int, seed: int
) -> None:
    """Rows lag behind the episodes' ends by random amounts; a group is judged when its last episode is over."""
    generator = np.random.default_rng(seed)
    sink = Sink()
    writer = EpisodeFilter(sink, judge, rows_per_write=rows_per_write)
    size_of: dict[int, int] = defaultdict(int)
    for episodes in lanes:
        for group, _ in episodes:
            size_of[group] += 1
    fate_of = {group: judge(min(passes[group], size), size) for group, size in size_of.items()}

    over: dict[int, int] = defaultdict(int)
    ended = [0] * len(lanes)  # episodes of each lane that are over
    # What the rollout has not handed over yet: rows lag, and come in the order in which they were made.
    backlog: list[tuple[int, NDArray[Any]]] = []
    expected: dict[int, list[int]] = defaultdict(list)
    numbers = iter(range(10_000))
    while any(ended[lane] < len(lanes[lane]) for lane in range(len(lanes))) or backlog:
        open_lanes = [lane for lane in range(len(lanes)) if ended[lane] < len(lanes[lane])]
        if open_lanes and generator.random() < 0.5:
            lane = int(generator.choice(open_lanes))
            group, length = lanes[lane][ended[lane]]
            ended[lane] += 1
            number = next(numbers)
            backlog += [(lane, row) for row in episode(number, length)]
            if fate_of[group] == "kept":
                expected[lane].append(number)
            writer.end(lane, group)
            over[group] += 1
            if over[group] == size_of[group]:
                assert writer.settle(group, min(passes[group], size_of[group]), size_of[group]) == fate_of[group]
        elif backlog:
            count = int(generator.integers(1, len(backlog) + 1))
            handed, backlog = backlog[:count], backlog[count:]
            rows = np.array([row for _, row in handed], SCHEMA.dtype)
            before = len(sink.writes)
            writer.append(np.array([lane for lane, _ in handed], np.int32), rows)
            rows["observation"] = -1  # the arrays are the caller's again
            assert len(sink.writes) <= before + 1
            assert all(len(rows_lanes) <= max(rows_per_write, count) for rows_lanes, _ in sink.writes[before:])
    writer.flush()
    assert writer.held_rows == 0
    assert not writer._groups
    writer.close()
    assert sink.closed
    for lane in range(len(lanes)):
        rows = sink.lanes().get(lane, SCHEMA.zeros(0))
        begins, ends = np.flatnonzero(rows["is_first"]), np.flatnonzero(rows["is_last"])
        assert len(begins) == len(ends)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            assert (rows["observation"][begin : end + 1] == rows["observation"][begin]).all()
            assert rows["action"][begin : end + 1].tolist() == list(range(end - begin + 1))
        assert sorted(rows["observation"][begins].tolist()) == expected[lane]


def test_groups_without_a_verdict_are_dropped_at_the_end() -> None:
    sink = Sink()
    writer = EpisodeFilter(sink, judge, rows_per_write=100)
    lanes = np.zeros(3, np.int32)
    writer.append(lanes[:2], episode(0, 3)[:2])
    assert (writer.held_rows, sink.writes) == (2, [])
    writer.end(0, 5)
    writer.append(lanes, np.concatenate([episode(0, 3)[2:], episode(1, 4)[:2]]))
    assert writer.settle(5, 0, 0) == "unscored"
    writer.end(0, 6)
    writer.append(lanes[:2], episode(1, 4)[2:])
    writer.end(0, 7)
    assert writer.held_rows == 4
    writer.close()
    assert sink.writes == []
    assert sink.closed


def test_a_kept_group_is_handed_on_by_pieces() -> None:
    """As large as writes were announced to be: a limiter may not let a whole group in at once."""
    sink = Sink()
    writer = EpisodeFilter(sink, judge, rows_per_write=4)
    writer.end(0, 1)
    writer.end(1, 1)
    assert writer.settle(1, 1, 2) == "kept"
    writer.append(np.zeros(7, np.int32), episode(0, 7))
    assert [len(lanes) for lanes, _ in sink.writes] == [7]
    writer.append(np.ones(9, np.int32), episode(1, 9))
    writer.end(2, 2)
    writer.append(np.full(2, 2, np.int32), episode(2, 2))
    assert [len(lanes) for lanes, _ in sink.writes] == [7, 9]
    writer.settle(2, 1, 2)
    writer.append(np.full(1, 3, np.int32), episode(3, 5)[:1])
    assert [len(lanes) for lanes, _ in sink.writes] == [7, 9, 2]
    held = [episode(n, 5) for n in (4, 5)]
    for lane, rows in enumerate(held, 4):
        writer.end(lane, 3)
        writer.append(np.full(5, lane, np.int32), rows)
    writer.settle(3, 1, 2)
    sizes = []
    for _ in range(3):
        writer.append(np.full(1, 3, np.int32), episode(3, 5)[1:2])
        sizes.append(len(sink.writes[-1][0]))
    assert sizes == [4, 4, 2]
    np.testing.assert_array_equal(sink.lanes()[4], held[0])
    np.testing.assert_array_equal(sink.lanes()[5], held[1])


def test_rows_keep_the_layout_of_their_table() -> None:
    """Fields of an environment's rows do not lie in the order in which they are named, nor without gaps between them."""
    schema = check_env(EnvSettings(id="MiniGrid-Empty-Random-5x5-v0")).with_extra(Field(TASK, "int32"))
    offsets = [schema.dtype.fields[name][1] for name in schema.dtype.names or ()] if schema.dtype.fields else []
    assert offsets != sorted(offsets)
    rows = schema.zeros(9)
    for name in schema.dtype.names or ():
        rows[name] = np.random.default_rng(0).integers(0, 100, rows[name].shape)
    for name in ("is_first", "is_last", "is_terminal"):
        rows[name] = False
    rows["is_first"][[0, 4]] = rows["is_last"][[3, 8]] = True
    sink = Sink()
    writer = EpisodeFilter(sink, judge, rows_per_write=100)
    writer.end(0, 1)
    writer.end(0, 1)
    for piece in (rows[:2], rows[2:6], rows[6:]):
        writer.append(np.zeros(len(piece), np.int32), piece.copy())
    assert writer.settle(1, 1, 2) == "kept"
    writer.flush()
    ((lanes, written),) = sink.writes
    assert written.dtype == schema.dtype
    np.testing.assert_array_equal(written, rows)
    assert lanes.tolist() == [0] * 9


def test_what_the_other_writer_waits_for_is_told() -> None:
    sink = Sink()
    writer = EpisodeFilter(sink, judge, rows_per_write=4)
    assert writer.waiting_for is None
    sink.waiting_for = "replay"
    assert writer.waiting_for == "replay"
    with pytest.raises(IndexError):  # rows of an episode that nobody has said the end of
        writer.append(np.zeros(2, np.int32), episode(0, 2))
