"""Absolute errors of windows summed by task: from rows in replay, through every algorithm, to those who ask the loop."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.algorithms import (
    AlgorithmSettings,
    ChainSettings,
    DqnSettings,
    FlowSettings,
    R2d2Settings,
    SacSettings,
    TargetSettings,
)
from learners.dqn import Dqn
from learners.flow import Flow
from learners.loop import LearnerLoop
from learners.policy import STATE, TASK
from learners.priorities import LEAST_PRIORITY, Importance, TaskLosses, WriteBack
from learners.r2d2 import RecurrentDqn
from learners.sac import Sac
from learners.updates import Updates
from replay.layout import Layout, TableSpec
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.samplers import CallSource, Sampler
from replay.schema import Field, StepSchema, Window, WindowBatch
from replay.shard import Shard
from replay.writers import CallWriter

BATCH, CALLS, UNITS, EPISODE = 8, 5, 4, 7
TASKS = np.array([0, 3, 500])
OBSERVATION = {"observation": Field("observation", "float32", (3,))}
CONTINUOUS = StepSchema(OBSERVATION, Field("action", "float32", (2,)))
DISCRETE = StepSchema(OBSERVATION, Field("action", "int64", choices=3))
CHUNK = TargetSettings(kind="chunk", length=3)
ALGORITHMS: dict[str, AlgorithmSettings] = {
    "sac": SacSettings(hidden=(8,)),
    "sac chain": SacSettings(hidden=(8,), chain=ChainSettings(length=2, copy_every=2)),
    "sac chunk": SacSettings(hidden=(8,), target=CHUNK, chunk=3),
    "flow": FlowSettings(hidden=(8,), target=TargetSettings(kind="decoupled", length=2, distill_expectile=0.7)),
    "dqn": DqnSettings(hidden=(8,), chain=ChainSettings(length=2, copy_every=2)),
    "r2d2": R2d2Settings(hidden=(8, 8), recurrent=UNITS, sequence=4, burn_in=2),
}
MAKERS: dict[type[AlgorithmSettings], type[Updates]] = {
    SacSettings: Sac,
    FlowSettings: Flow,
    DqnSettings: Dqn,
    R2d2Settings: RecurrentDqn,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain_rows(algorithm: AlgorithmSettings) -> StepSchema:
    """Rows without tasks."""
    if isinstance(algorithm, R2d2Settings):
        return DISCRETE.with_extra(Field(STATE, "float32", (UNITS,)))
    return DISCRETE if isinstance(algorithm, DqnSettings) else CONTINUOUS


def task_rows(algorithm: AlgorithmSettings) -> StepSchema:
    return plain_rows(algorithm).with_extra(Field(TASK, "int32"))


def learner(algorithm: AlgorithmSettings, schema: StepSchema, updates: int = 1) -> Updates:
    made: Any = MAKERS[type(algorithm)]
    found: Updates = made(schema, algorithm, batch_size=BATCH, device="cpu", seed=0, updates_per_call=updates)
    return found


class Recorded:
    """Windows of episodes of one task each, drawn from a shard; keeps them and the priorities that were written."""

    def __init__(self, algorithm: AlgorithmSettings, *, updates: int = 1) -> None:
        schema, generator = task_rows(algorithm), np.random.default_rng(0)
        rows = schema.zeros(60 * EPISODE)
        for name in ("observation", "reward"):
            rows[name] = generator.uniform(-1, 1, rows[name].shape)
        rows["action"] = (
            generator.integers(3, size=len(rows))
            if schema.action.choices
            else generator.uniform(-1, 1, rows["action"].shape)
        )
        at = np.arange(len(rows)) % EPISODE
        rows["is_first"], rows["is_last"] = at == 0, at == EPISODE - 1
        rows["is_terminal"] = rows["is_last"] & (np.arange(len(rows)) // EPISODE % 2 == 0)
        rows[TASK] = np.repeat(generator.choice(TASKS, 60), EPISODE)
        table = TableSpec("steps")
        limiter = RateLimiter(RateLimit.from_min_size(1))
        shard = Shard(Layout(schema, 8, 64, (table,)), {"steps": limiter}, index=0, seed=0)
        CallWriter(shard).append(np.zeros(len(rows), np.int32), rows)
        if isinstance(algorithm, R2d2Settings):
            window = Window(length=algorithm.sequence, burn_in=algorithm.burn_in)
        else:
            window = Window(length=algorithm.target.length, observations="ends")
        source = CallSource(shard, window=window, table="steps")
        self._sampler = Sampler([source], schema, window=window, batch_size=updates * BATCH, seed=0)
        self.drawn: list[WindowBatch] = []
        self.written: list[np.ndarray] = []

    def sample(self, timeout_s: float) -> WindowBatch:
        batch = self._sampler.sample(timeout_s)
        self.drawn.append(batch)
        return batch

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        self.written.append(priorities)

    def close(self) -> None:
        self._sampler.close()


def summed(batches: list[WindowBatch], errors: list[np.ndarray]) -> dict[int, tuple[float, int]]:
    """Sum and number of errors by task, window by window."""
    found: dict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for batch, delta in zip(batches, errors, strict=True):
        for task, error in zip(batch.steps[TASK][:, batch.start].tolist(), delta.tolist(), strict=True):
            total, count = found[task]
            found[task] = total + error, count + 1
    return dict(found)


def as_dict(losses: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> dict[int, tuple[float, int]]:
    if losses is None:
        return {}
    tasks, sums, windows = losses
    assert [values.dtype.name for values in losses] == ["int64", "float64", "int64"]
    return {int(task): (float(total), int(count)) for task, total, count in zip(tasks, sums, windows, strict=True)}


def check_equal(found: dict[int, tuple[float, int]], expected: dict[int, tuple[float, int]]) -> None:
    assert set(found) == set(expected)
    for task, (total, count) in expected.items():
        assert found[task][0] == pytest.approx(total, rel=1e-9)
        assert found[task][1] == count


def loop_of(
    algorithm: Any, sampler: Any, *, updates: int = 1, importance: Importance | None = None
) -> LearnerLoop[Any]:
    return LearnerLoop(
        algorithm,
        sampler,
        publish=lambda version, data: None,
        publish_every=1000,
        prefetch=2,
        updates_per_call=updates,
        importance=importance,
    )


def without_tasks(batch: WindowBatch, schema: StepSchema) -> WindowBatch:
    def copied(rows: np.ndarray, dtype: np.dtype[np.void]) -> np.ndarray:
        made = np.zeros(rows.shape, dtype)
        for name in dtype.names or ():
            made[name] = rows[name]
        return made

    if batch.ends is None:
        return replace(batch, steps=copied(batch.steps, schema.packed))
    return replace(batch, steps=copied(batch.steps, schema.rest), ends=copied(batch.ends, schema.packed))


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_errors_are_summed_by_task_and_change_no_update(name: str, updates: int) -> None:
    algorithm, sampler = ALGORITHMS[name], Recorded(ALGORITHMS[name], updates=updates)
    made = learner(algorithm, task_rows(algorithm), updates)
    loop = loop_of(made, sampler, updates=updates)
    assert loop.task_losses() is None
    for _ in range(CALLS):
        loop.step()
    losses = as_dict(loop.task_losses())
    assert loop.task_losses() is None  # since the last call
    assert sampler.written == []

    # One that is asked for the errors itself, and one that never heard of tasks.
    asked, plain = learner(algorithm, task_rows(algorithm), updates), learner(algorithm, plain_rows(algorithm), updates)
    errors = []
    for batch in sampler.drawn:
        delta = asked.update(asked.stage(batch, np.ones(len(batch), np.float32)))
        assert delta is not None
        errors.append(delta.double().numpy().copy())
        plain.update(plain.stage(without_tasks(batch, plain_rows(algorithm))))
    expected = summed(sampler.drawn, errors)
    assert set(expected) == set(TASKS.tolist())
    assert min(total for total, _ in expected.values()) > 0
    check_equal(losses, expected)
    theirs = plain.state()
    for key, tensor in made.state().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=0, equal_nan=True)


def test_prioritised_windows_give_priorities_and_losses() -> None:
    algorithm, importance = ALGORITHMS["sac"], Importance(0.4, 10)
    sampler = Recorded(algorithm)
    loop = loop_of(learner(algorithm, task_rows(algorithm)), sampler, importance=importance)
    for _ in range(CALLS):
        loop.step()
    assert len(sampler.written) == CALLS
    errors = [priorities - LEAST_PRIORITY for priorities in sampler.written]
    check_equal(as_dict(loop.task_losses()), summed(sampler.drawn, errors))


def test_a_running_loop_is_asked_from_another_thread_and_loses_nothing() -> None:
    algorithm = ALGORITHMS["sac"]
    made = learner(algorithm, task_rows(algorithm))
    loop = loop_of(made, Recorded(algorithm))
    until = threading.Event()
    thread = threading.Thread(target=loop.run, args=(until,))
    thread.start()
    found: dict[int, int] = defaultdict(int)
    try:
        end = time.perf_counter() + 20
        while made.updates < 200:
            assert time.perf_counter() < end, "timed out"
            for task, (_, count) in as_dict(loop.task_losses()).items():
                found[task] += count
    finally:
        until.set()
        thread.join(20)
    assert not thread.is_alive()
    for task, (_, count) in as_dict(loop.task_losses()).items():
        found[task] += count
    assert set(found) == set(TASKS.tolist())
    assert sum(found.values()) == made.updates * BATCH


class Silent(Sac):
    """Returns no errors, as an algorithm of the user's may."""

    def update(self, batches: Any) -> Tensor | None:
        super().update(batches)
        return None


def test_without_tasks_or_errors_there_are_no_losses() -> None:
    class Plain(Recorded):
        def sample(self, timeout_s: float) -> WindowBatch:
            return without_tasks(super().sample(timeout_s), CONTINUOUS)

    algorithm = SacSettings(hidden=(8,))
    silent = Silent(task_rows(algorithm), algorithm, batch_size=BATCH, device="cpu", seed=0)
    for loop in (loop_of(learner(algorithm, CONTINUOUS), Plain(algorithm)), loop_of(silent, Recorded(algorithm))):
        loop.step()
        assert loop.task_losses() is None


def windows(tasks: list[int]) -> WindowBatch:
    """Windows of two rows, of which the first is the item's, with a burn-in of one that is of no task."""
    steps = np.zeros((len(tasks), 3), [(TASK, "<i4")])
    steps[TASK] = -1
    steps[TASK][:, 1] = tasks
    zeros = np.zeros(len(tasks), np.int32)
    return WindowBatch(steps, zeros + 1, zeros.astype(np.int64), zeros, np.ones(len(tasks)), start=1)


CALL = st.lists(st.tuples(st.integers(-1, 40), st.floats(0.0, 100.0)), max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(CALL, st.none()), max_size=12))
def test_sums_are_those_of_a_dictionary(calls: list[list[tuple[int, float]] | None]) -> None:
    """A call is added, and None takes what there is; task −1 is none."""
    losses, expected = TaskLosses(), dict[int, tuple[float, int]]()
    for call in [*calls, None]:
        if call is None:
            taken = losses.take()
            check_equal(as_dict(taken), expected)
            assert taken is None or bool((np.diff(taken[0]) > 0).all())
            expected = {}
            continue
        losses.add(windows([task for task, _ in call]), np.array([error for _, error in call]))
        for task, error in call:
            if task >= 0:
                total, count = expected.get(task, (0.0, 0))
                expected[task] = total + error, count + 1


def test_errors_that_are_not_finite_are_not_summed() -> None:
    losses = TaskLosses()
    write_back = WriteBack(None, losses)
    write_back.put(windows([1, 2]), torch.tensor([1.0, torch.nan]))
    assert losses.take() is None
    write_back.put(windows([1, 2]), torch.tensor([1.0, 2.0]))
    assert as_dict(losses.take()) == {1: (1.0, 1), 2: (2.0, 1)}
