"""Completions as rows: made, taken apart again, and through a queue, with lists of every length."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from learners.llm.rows import SCHEMA, Completion, Ragged, ragged, to_rows
from replay.queue_readers import CallQueueSource
from replay.queue_sampler import QueueSampler
from replay.queue_snapshot import restore_queue, save_queue
from replay.queue_spec import QueueSpec
from replay.queue_writers import CallQueueWriter
from replay.queues import Queue

LISTS = {"prompt": np.int32, "tokens": np.int32, "log_probs": np.float32, "kept": np.float32, "versions": np.int32, "step_ends": np.int32, "step_rewards": np.float32}  # fmt: skip
NUMBERS = st.floats(-1e6, 1e6, width=32)


def arrays(dtype: Any, length: st.SearchStrategy[int] | int) -> st.SearchStrategy[np.ndarray]:
    return st_numpy.arrays(dtype, length, elements=NUMBERS if dtype is np.float32 else st.integers(0, 2**31 - 1))


@st.composite
def completions(draw: st.DrawFn, group: int, index: int) -> Completion:
    count = draw(st.integers(0, 6))
    steps = draw(st.integers(0, 3))
    lengths = {"prompt": st.integers(0, 5), "step_ends": steps, "step_rewards": steps}
    return Completion(
        group=group,
        index=index,
        task=draw(st.integers(-(2**63), 2**63 - 1)),
        family=draw(st.text(max_size=4)),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        finish=draw(st.sampled_from(["stop", "length"])),
        reward=draw(NUMBERS),
        passed=draw(st.booleans()),
        shaped=draw(NUMBERS),
        reason=draw(st.text(max_size=4)),
        hint=draw(st.floats(0, 1, width=32)),
        **{name: draw(arrays(dtype, lengths.get(name, count))) for name, dtype in LISTS.items()},
    )


@st.composite
def groups(draw: st.DrawFn) -> list[list[Completion]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    return [[draw(completions(number, index)) for index in range(size)] for number, size in enumerate(sizes)]


def check(rows: pa.RecordBatch, expected: list[Completion]) -> None:
    """Every value of every row, by Arrow's own reading and by `ragged`."""
    assert rows.schema.equals(SCHEMA)
    assert rows.num_rows == len(expected)
    for row, one in zip(rows.to_pylist(), expected, strict=True):
        assert row["policy_version"] == min(one.versions.tolist(), default=2**31 - 1)
        for field in fields(Completion):
            value = getattr(one, field.name)
            assert row[field.name] == (value.tolist() if isinstance(value, np.ndarray) else value), field.name
    for name, dtype in LISTS.items():
        found = ragged(rows, name)
        assert found.values.dtype == dtype
        assert found.offsets.dtype == np.int64
        assert (found.offsets[0], found.offsets[-1]) == (0, len(found.values))
        assert found.lengths.tolist() == [len(getattr(one, name)) for one in expected]
        for index, one in enumerate(expected):
            np.testing.assert_array_equal(found[index], getattr(one, name))


@settings(max_examples=40)
@given(written=groups(), data=st.data())
def test_completions_are_rows_and_back(written: list[list[Completion]], data: st.DataObject) -> None:
    batches = [to_rows(group) for group in written]
    for batch, group in zip(batches, written, strict=True):
        batch.validate(full=True)
        check(batch, group)
        assert batch.column("group_size").to_pylist() == [len(group)] * len(group)
        begin = data.draw(st.integers(0, len(group)))
        count = data.draw(st.integers(0, len(group) - begin))
        check(batch.slice(begin, count), group[begin : begin + count])
    (joined,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    everything = [one for group in written for one in group]
    check(joined, everything)
    order = data.draw(st.permutations(range(len(everything))))
    check(joined.take(pa.array(order, pa.int64())), [everything[i] for i in order])


@settings(max_examples=25)
@given(written=groups(), per_batch=st.integers(1, 3))
def test_rows_come_through_a_queue_and_its_snapshot_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, written: list[list[Completion]], per_batch: int
) -> None:
    folder = tmp_path_factory.mktemp("queue")
    spec = QueueSpec(name="completions", schema=SCHEMA, capacity_bytes=1 << 20)
    queues = [Queue(spec, folder / name) for name in ("first", "restored")]
    writer = CallQueueWriter(queues[0])
    for group in written:
        writer.append(to_rows(group))
    save_queue(queues[0], folder)
    restore_queue(queues[1], folder / "completions-0.arrow")
    for queue in queues:
        sampler = QueueSampler([CallQueueSource(queue, groups=per_batch)], groups=per_batch)
        for begin in range(0, len(written) - per_batch + 1, per_batch):
            batch = sampler.sample(0.0)
            picked = written[begin : begin + per_batch]
            check(batch.rows, [one for group in picked for one in group])
            assert batch.sizes == [len(group) for group in picked]
            assert batch.versions == [
                min(int(one.versions.min(initial=2**31 - 1)) for one in group) for group in picked
            ]
            sampler.acknowledge(batch)
        sampler.close()
        queue.close(remove=True)


def one(**changes: Any) -> Completion:
    values = {name: np.zeros(2, dtype) for name, dtype in LISTS.items()}
    rest = {"group": 1, "index": 0, "task": 0, "family": "", "seed": 0, "finish": "stop", "reward": 0.0, "passed": True}
    return Completion(**{**values, **rest, **changes})


def test_a_row_of_no_steps_has_empty_lists_and_ragged_copies_nothing() -> None:
    plain = Completion(**{k: v for k, v in vars(one()).items() if not k.startswith("step")})
    rows = to_rows([plain, plain])
    assert [len(ragged(rows, name).values) for name in ("step_ends", "step_rewards")] == [0, 0]
    found = ragged(rows, "tokens")
    assert np.shares_memory(found.values, rows.column("tokens").values.to_numpy())
    assert isinstance(found, Ragged)


def test_the_oldest_token_says_the_version_of_a_row(tmp_path: Path) -> None:
    """And the oldest row that of its group, by which it is found too old."""
    group = [one(versions=np.array(v, np.int32)) for v in ([7, 8], [9, 5])]
    assert to_rows(group).column("policy_version").to_pylist() == [7, 5]
    queue = Queue(QueueSpec(name="q", schema=SCHEMA, capacity_bytes=1 << 20, max_policy_lag=2), tmp_path / "q")
    CallQueueWriter(queue).append(to_rows(group))
    sampler = QueueSampler([CallQueueSource(queue, groups=1)], groups=1)
    batch = sampler.sample(0.0, version=7)
    assert batch.versions == [5]
    sampler.close()
    with pytest.raises(TimeoutError):
        QueueSampler([CallQueueSource(queue, groups=1)], groups=1).sample(0.0, version=8)
    stats = queue.stats()
    assert (stats["dropped_stale_groups"], stats["dropped_stale_rows"]) == (1, 2)


@pytest.mark.parametrize("name", ["tokens", "log_probs"])
def test_lists_of_a_wider_type_are_narrowed_and_what_does_not_fit_is_refused(name: str) -> None:
    wide = np.int64 if name == "tokens" else np.float64
    rows = to_rows([one(**{name: np.array([1, 2], wide)})])
    assert rows.column(name).type == SCHEMA.field(name).type
    assert ragged(rows, name)[0].tolist() == [1, 2]
    with pytest.raises(pa.ArrowInvalid):
        to_rows([one(tokens=np.array([2**40]))])
