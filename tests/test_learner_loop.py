"""The loop around SAC, on prefilled data: order, threads, faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from configs.schema import SacSettings
from learners.loop import LearnerLoop, set_threads
from learners.policy import SquashedGaussianPolicy
from learners.sac import Sac, SacBatch
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
    """Serves seeded random batches; at number `fault_at` does what `fault` does instead."""

    def __init__(self, *, fault_at: int = -1, fault: Callable[[WindowBatch], None] | None = None) -> None:
        self.served = 0
        self._generator = np.random.default_rng(0)
        self._fault_at, self._fault = fault_at, fault

    def sample(self, timeout_s: float) -> WindowBatch:
        steps = np.zeros((BATCH, 2), SCHEMA.dtype)
        for name in ("observation", "action", "reward"):
            steps[name] = self._generator.uniform(-1, 1, steps[name].shape)
        batch = WindowBatch(steps, np.ones(BATCH, "i4"), np.zeros(BATCH, "i8"), np.zeros(BATCH, "i4"), np.ones(BATCH))
        if self.served == self._fault_at and self._fault is not None:
            self._fault(batch)
        self.served += 1
        return batch

    def close(self) -> None:
        pass


class Empty:
    """A table that never has enough."""

    def sample(self, timeout_s: float) -> WindowBatch:
        time.sleep(timeout_s)
        raise TimeoutError

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
) -> tuple[Sac, LearnerLoop[SacBatch]]:
    algorithm = Sac(SCHEMA, SETTINGS, batch_size=BATCH, device="cpu", seed=0)
    loop = LearnerLoop(algorithm, sampler, publish=publish, publish_every=publish_every, prefetch=4, version=version)
    return algorithm, loop


class Running:
    """A loop running in a thread, for the length of a `with`; keeps the error that `run` raised."""

    def __init__(self, loop: LearnerLoop[SacBatch]) -> None:
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
        def update(self, batch: WindowBatch | SacBatch) -> None:
            super().update(batch)
            if self.updates == 20:
                until.set()

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
    policy = SquashedGaussianPolicy(SCHEMA, SETTINGS.hidden)
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


def test_threads_follow_the_cpus_unless_set() -> None:
    assert (set_threads(0.5, 0), torch.get_num_threads()) == (1, 1)
    assert (set_threads(2.9, 0), torch.get_num_threads()) == (2, 2)
    assert (set_threads(8, 3), torch.get_num_threads()) == (3, 3)
    torch.set_flush_denormal(False)
