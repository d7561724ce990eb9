"""The loop around SAC, on prefilled data: order, threads, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import SacSettings
from learners.loop import LearnerLoop, set_threads
from learners.policy import SquashedGaussianPolicy
from learners.priorities import LEAST_PRIORITY, MOST_PENDING, Importance, WriteBack
from learners.sac import Sac
from learners.staging import Batch
from replay.schema import Field, StepSchema, WindowBatch

SCHEMA = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (1,)))
SETTINGS = SacSettings(hidden=(8,))
BATCH = 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Prefilled:
    """Serves seeded random windows, `size` at a time; at number `fault_at` does what `fault` does instead."""

    def __init__(
        self, *, size: int = BATCH, fault_at: int = -1, fault: Callable[[WindowBatch], None] | None = None
    ) -> None:
        self.served = 0
        self.written: list[tuple[list[int], np.ndarray]] = []  # item ids and their new priorities
        self._size = size
        self._generator = np.random.default_rng(0)
        self._fault_at, self._fault = fault_at, fault

    def sample(self, timeout_s: float) -> WindowBatch:
        size = self._size
        steps = np.zeros((size, 2), SCHEMA.dtype)
        for start in range(0, size, BATCH):  # the same windows, whatever the size of the draws
            for name in ("observation", "action", "reward"):
                values = steps[name][start : start + BATCH]
                values[:] = self._generator.uniform(-1, 1, values.shape)
        item = np.arange(size) + size * self.served
        probability = (1.0 + item % 5) / 1000.0
        batch = WindowBatch(steps, np.ones(size, "i4"), item, np.zeros(size, "i4"), probability, size=400)
        if self.served == self._fault_at and self._fault is not None:
            self._fault(batch)
        self.served += 1
        return batch

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        self.written.append((batch.item.tolist(), priorities))

    def close(self) -> None:
        pass


class Empty:
    """A table that never has enough."""

    def sample(self, timeout_s: float) -> WindowBatch:
        time.sleep(timeout_s)
        raise TimeoutError

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        raise AssertionError("nothing was drawn")

    def close(self) -> None:
        pass


class Log:
    """Keeps what is published, after `delay_s`."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.published: list[tuple[int, bytes]] = []
        self._delay_s = delay_s

    def __call__(self, version: int, data: bytes) -> None:
        time.sleep(self._delay_s)
        self.published.append((version, data))

    @property
    def versions(self) -> list[int]:
        return [version for version, _ in self.published]


def make(
    sampler: Prefilled | Empty, publish: Callable[[int, bytes], None], *, publish_every: int = 5, version: int = 0
) -> tuple[Sac, LearnerLoop[list[Batch]]]:
    algorithm = Sac(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0)
    loop = LearnerLoop(algorithm, sampler, publish=publish, publish_every=publish_every, prefetch=4, version=version)
    return algorithm, loop


class Running:
    """A loop running in a thread, for the length of a `with`; keeps the error that `run` raised."""

    def __init__(self, loop: LearnerLoop[list[Batch]]) -> None:
        self.until = threading.Event()
        self.error: BaseException | None = None
        self._loop = loop
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._loop.run(self.until)
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.until.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, "timed out"
        time.sleep(0.005)


def wait_for_updates(algorithm: Sac, count: int) -> None:
    wait_until(lambda: algorithm.updates >= count)


def test_steps_publish_in_order_and_repeat_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        log = Log()
        algorithm, loop = make(Prefilled(), log, version=7)
        assert loop.stats()["version"] == -1
        for _ in range(12):
            loop.step()
        assert log.versions == [7, 8, 9]
        assert loop.stats()["version"] == 9
        runs.append((log.published, algorithm.state(), algorithm.metrics()))
    assert runs[0][0] == runs[1][0]
    assert runs[0][2] == runs[1][2]
    assert all(torch.equal(runs[0][1][name], tensor) for name, tensor in runs[1][1].items())


def test_running_gives_the_updates_that_stepping_gives() -> None:
    stepped, stepping = make(Prefilled(), Log())
    for _ in range(20):
        stepping.step()

    until = threading.Event()

    class Twenty(Sac):
        def update(self, batches: WindowBatch | Sequence[Batch]) -> Tensor | None:
            delta = super().update(batches)
            if self.updates == 20:
                until.set()
            return delta

    log = Log()
    ran = Twenty(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0)
    LearnerLoop(ran, Prefilled(), publish=log, publish_every=5, prefetch=4).run(until)
    assert ran.updates == 20
    theirs = stepped.state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ran.state().items())
    assert log.published[-1] == (4, ran.policy_bytes())


def test_a_slow_publication_delays_no_update_and_the_newest_wins() -> None:
    log = Log(delay_s=0.2)
    algorithm, loop = make(Prefilled(), log, publish_every=1)
    with Running(loop) as running:
        wait_for_updates(algorithm, 300)
    assert running.error is None
    stats = loop.stats()
    assert len(log.versions) < algorithm.updates / 5
    assert log.versions == sorted(set(log.versions))
    # What is newest when the loop ends is still published.
    assert log.published[-1] == (int(stats["version"]), algorithm.policy_bytes())
    assert stats["publish_s"] < 0.2 * len(log.versions)
    assert stats["update_s"] + stats["wait_s"] + stats["publish_s"] <= stats["wall_s"]
    assert stats["update_s"] > 0


def test_prefetch_is_bounded() -> None:
    sampler = Prefilled()
    algorithm, loop = make(sampler, Log())
    with Running(loop):
        wait_for_updates(algorithm, 11)
        with loop.between_updates():
            time.sleep(0.3)
            # Four wait in the queue, one in the loop's hand, one in the prefetch thread's.
            assert sampler.served <= algorithm.updates + 6


def test_between_updates_holds_the_loop_still() -> None:
    algorithm, loop = make(Prefilled(), Log())
    with Running(loop) as running:
        for _ in range(5):
            with loop.between_updates():
                first = algorithm.state()
                time.sleep(0.02)
                second = algorithm.state()
            assert all(torch.equal(first[name], second[name]) for name in first)
            wait_for_updates(algorithm, algorithm.updates + 1)
        assert loop.metrics()["q/mean"] != 0.0
    assert running.error is None


def test_waiting_is_named_timed_and_ends_when_told() -> None:
    algorithm, loop = make(Empty(), Log())
    with Running(loop) as running:
        wait_until(lambda: loop.waiting_for is not None)
        assert loop.waiting_for == "a batch from replay for 0 s"
        time.sleep(0.3)
    assert running.error is None
    assert loop.waiting_for is None
    assert algorithm.updates == 0
    assert loop.stats()["wait_s"] >= 0.3
    with pytest.raises(TimeoutError):
        loop.step(timeout_s=0.01)


def test_a_sampler_error_ends_the_run_after_the_batches_before_it() -> None:
    def fail(batch: WindowBatch) -> None:
        raise ConnectionError("shard 3 is gone")

    algorithm, loop = make(Prefilled(fault_at=9, fault=fail), Log())
    with pytest.raises(ConnectionError, match="shard 3"):
        loop.run(threading.Event())
    assert algorithm.updates == 9


def test_a_publish_error_ends_the_run() -> None:
    def publish(version: int, data: bytes) -> None:
        if version == 2:
            raise ConnectionError("no head")

    _, loop = make(Prefilled(), publish)
    with pytest.raises(ConnectionError, match="no head"):
        loop.run(threading.Event())


def test_a_broken_loss_stops_the_loop_and_is_never_published() -> None:
    def poison(batch: WindowBatch) -> None:
        batch.steps["reward"][0, 0] = np.nan

    log = Log()
    algorithm, loop = make(Prefilled(fault_at=7, fault=poison), log)
    with pytest.raises(FloatingPointError, match="loss/critic = nan"):
        loop.run(threading.Event())
    assert 8 <= algorithm.updates <= 10
    assert log.versions == [0, 1]
    policy = SquashedGaussianPolicy(SCHEMA, SETTINGS)
    policy.load(log.published[-1][1])
    action = policy.act(
        {"observation": np.ones((1, 3), np.float32)}, deterministic=True, generator=np.random.default_rng(0)
    )
    assert np.isfinite(action).all()


def test_a_broken_loss_between_publications_is_raised_when_the_run_ends() -> None:
    def poison(batch: WindowBatch) -> None:
        batch.steps["observation"][0, 0] = np.inf

    algorithm, loop = make(Prefilled(fault_at=2, fault=poison), Log(), publish_every=1_000_000)
    with Running(loop) as running:
        wait_for_updates(algorithm, 6)
    assert isinstance(running.error, FloatingPointError)


# -- several updates per call, priorities, returns --------------------------------------------------------------------


def test_calls_of_several_updates_make_the_updates_of_single_ones() -> None:
    one, single = make(Prefilled(), Log())
    for _ in range(24):
        single.step()
    log = Log()
    four = Sac(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0, updates_per_call=4)
    loop = LearnerLoop(
        four, Prefilled(size=4 * BATCH), publish=log, publish_every=10, prefetch=2, version=3, updates_per_call=4
    )
    for _ in range(6):
        loop.step()
    assert loop.stats()["updates"] == four.updates == 24
    theirs = one.state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in four.state().items())
    # After updates 0, 12 and 24: the first ends of calls at which ten updates had been made since.
    assert log.versions == [3, 4, 5]


IMPORTANCE = Importance(0.4, 10)


def test_importance_weights_follow_the_schedule_and_are_scaled_within_each_update() -> None:
    assert [IMPORTANCE.exponent(update) for update in (0, 5, 10, 99)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    batch = Prefilled(size=2 * BATCH).sample(0.0)
    weights = IMPORTANCE.weights(batch, update=5, calls=2).reshape(2, BATCH)
    for row, beta in enumerate((0.7, 0.76)):
        plain = (400 * batch.probability[row * BATCH : (row + 1) * BATCH]) ** -beta
        np.testing.assert_allclose(weights[row], plain / plain.max(), rtol=1e-6)
    whole = IMPORTANCE.weights(batch, update=0)
    np.testing.assert_array_equal(whole, batch.importance_weights(0.4))


class Weighing(Sac):
    """Keeps the weights it was given, and returns errors of which each tells its window."""

    def __init__(self, updates_per_call: int = 1) -> None:
        super().__init__(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0, updates_per_call=updates_per_call)
        self.given: list[np.ndarray] = []
        self.returned: list[np.ndarray] = []

    def stage(self, windows: WindowBatch, weights: np.ndarray | None = None) -> list[Batch]:
        assert weights is not None
        self.given.append(weights)
        return super().stage(windows, weights)

    def update(self, batches: WindowBatch | Sequence[Batch]) -> Tensor | None:
        delta = super().update(batches)
        assert delta is not None
        self.returned.append(delta.numpy().copy())
        return delta


@pytest.mark.parametrize("threads", [False, True])
def test_errors_go_back_as_priorities_of_their_windows(threads: bool) -> None:
    algorithm, sampler = Weighing(2), Prefilled(size=2 * BATCH)
    loop = LearnerLoop(
        algorithm, sampler, publish=Log(), publish_every=5, prefetch=3, updates_per_call=2, importance=IMPORTANCE
    )
    if threads:
        with Running(loop) as running:
            wait_for_updates(algorithm, 12)
        assert running.error is None
    else:
        for _ in range(6):
            loop.step()
            assert len(sampler.written) * 2 == algorithm.updates  # at once, on a CPU
    calls = algorithm.updates // 2
    assert len(sampler.written) == calls >= 6
    for number, (items, priorities) in enumerate(sampler.written):
        assert items == list(range(number * 2 * BATCH, (number + 1) * 2 * BATCH))
        np.testing.assert_array_equal(priorities, algorithm.returned[number].astype("f8") + LEAST_PRIORITY)
    # beta is that of the update which the windows are for, also of those staged ahead.
    again = Prefilled(size=2 * BATCH)
    for number, weights in enumerate(algorithm.given):
        np.testing.assert_array_equal(weights, IMPORTANCE.weights(again.sample(0.0), update=2 * number, calls=2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_priorities_come_from_a_gpu_in_order_and_none_is_left_behind() -> None:
    sampler = Prefilled()
    write_back = WriteBack(sampler)
    expected = []
    for number in range(50):
        batch = sampler.sample(0.0)
        delta = torch.full((BATCH,), float(number), device="cuda")
        write_back.put(batch, delta)
        delta.zero_()  # the next update writes there
        expected.append((batch.item.tolist(), [number + LEAST_PRIORITY] * BATCH))
        assert len(sampler.written) >= number - MOST_PENDING
    write_back.flush()
    assert [(items, priorities.tolist()) for items, priorities in sampler.written] == expected


def test_an_error_that_is_not_finite_is_not_written_back() -> None:
    sampler = Prefilled()
    write_back = WriteBack(sampler)
    write_back.put(sampler.sample(0.0), torch.tensor([1.0] * (BATCH - 1) + [torch.nan]))
    assert sampler.written == []


def test_uniform_windows_have_no_weights_and_no_priorities() -> None:
    sampler = Prefilled()
    _, loop = make(sampler, Log())
    loop.step()
    assert sampler.written == []


def test_returns_reach_the_algorithm_between_updates_once_for_each_change() -> None:
    seen: list[tuple[int, float, float]] = []

    class Observing(Sac):
        def observe_returns(self, low: float, high: float) -> None:
            seen.append((self.updates, low, high))

    algorithm = Observing(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0)
    loop = LearnerLoop(algorithm, Prefilled(), publish=Log(), publish_every=5, prefetch=1)
    loop.step()
    for low, high in ((-1.0, 2.0), (-1.0, 2.0), (-3.0, 2.0)):
        loop.tell_returns(low, high)
        loop.step()
    assert seen == [(1, -1.0, 2.0), (3, -3.0, 2.0)]
    with Running(loop) as running:
        loop.tell_returns(-4.0, 5.0)
        wait_until(lambda: len(seen) == 3)
    assert running.error is None


def test_threads_follow_the_cpus_unless_set() -> None:
    assert (set_threads(0.5, 0), torch.get_num_threads()) == (1, 1)
    assert (set_threads(2.9, 0), torch.get_num_threads()) == (2, 2)
    assert (set_threads(8, 3), torch.get_num_threads()) == (3, 3)
    torch.set_flush_denormal(False)
