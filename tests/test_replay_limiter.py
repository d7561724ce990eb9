"""The pace of sampling against inserting, alone and leased over several shards."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from replay.limiter import Clock, LeasedLimiter, Limiter, RateLimiter, Side


def test_nothing_is_sampled_below_the_minimum_size() -> None:
    limiter = RateLimiter(samples_per_insert=4.0, min_size=10, error_buffer=100.0)
    assert limiter.acquire("insert", 9, timeout_s=0.0)
    assert not limiter.acquire("sample", 1, timeout_s=0.0)
    assert limiter.why("sample") == "actors to insert: the table holds 9 of the 10 steps of replay.min_size"
    assert limiter.acquire("insert", 1, timeout_s=0.0)
    assert limiter.acquire("sample", 1, timeout_s=0.0)
    limiter.deleted(1)
    assert not limiter.acquire("sample", 1, timeout_s=0.0)


def test_either_side_runs_ahead_by_the_error_buffer_and_no_further() -> None:
    limiter = RateLimiter(samples_per_insert=2.0, min_size=10, error_buffer=6.0)
    assert limiter.acquire("insert", 13, timeout_s=0.0)  # (13 − 10) · 2 = 6
    assert not limiter.acquire("insert", 1, timeout_s=0.0)
    assert (
        limiter.why("insert")
        == "the learner to sample: 0 samples drawn, too few for more than 13 inserts (replay.error_buffer)"
    )
    assert limiter.acquire("sample", 12, timeout_s=0.0)  # 26 − 12 = 20 − 6
    assert not limiter.acquire("sample", 1, timeout_s=0.0)
    assert limiter.why("sample") == "actors to insert: 12 samples drawn, as many as 13 inserts allow"
    limiter.give_back("sample", 12)
    assert limiter.acquire("sample", 12, timeout_s=0.0)


def test_a_waiting_side_goes_on_when_the_other_moves() -> None:
    limiter = RateLimiter(samples_per_insert=1.0, min_size=1, error_buffer=2.0)
    limiter.acquire("insert", 3, timeout_s=0.0)
    waited: list[float] = []

    def insert() -> None:
        begin = time.monotonic()
        assert limiter.acquire("insert", 1, timeout_s=10.0)
        waited.append(time.monotonic() - begin)

    thread = threading.Thread(target=insert)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    limiter.acquire("sample", 1, timeout_s=0.0)
    thread.join(timeout=5.0)
    assert 0.1 <= waited[0] < 5.0


def test_a_block_is_granted_whole_or_just_as_asked() -> None:
    limiter = RateLimiter(samples_per_insert=1.0, min_size=1, error_buffer=50.0)
    assert limiter.acquire_block("insert", 8, 40, timeout_s=0.0) == 40
    assert limiter.acquire_block("insert", 8, 40, timeout_s=0.0) == 8
    assert limiter.acquire_block("insert", 8, 40, timeout_s=0.0) == 0
    assert limiter.inserted == 48


class Watched(RateLimiter):
    """Checks the invariant after every change; its condition is held then."""

    def _add(self, side: Side, count: int) -> None:
        super()._add(side, count)
        lead = self.inserted * self.samples_per_insert - self.sampled
        if side == "sample":
            assert lead >= self.low
            assert self.inserted - self.removed >= self.min_size
        else:
            assert lead <= self.high or self.inserted - self.removed <= self.min_size


def drive(limiters: list[Limiter], *, items: int) -> tuple[int, int]:
    """Insert and sample through each limiter by two threads until `items` are in; returns what was used (I, S)."""
    used = {"insert": 0, "sample": 0}
    lock = threading.Lock()
    failures: list[BaseException] = []
    deadline = time.monotonic() + 10.0

    def run(limiter: Limiter, side: Side, seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while True:
                count = int(rng.integers(1, 20))
                with lock:
                    if used["insert"] >= items:
                        return
                if limiter.acquire(side, count, timeout_s=0.05):
                    with lock:
                        used[side] += count
                assert time.monotonic() < deadline, f"deadlock at {used}: {side} waits for {limiter.why(side)}"
        except BaseException as failure:
            failures.append(failure)

    sides: tuple[Side, Side] = ("insert", "sample")
    threads = [
        threading.Thread(target=run, args=(limiter, side, 10 * k + n))
        for k, limiter in enumerate(limiters)
        for n, side in enumerate(sides)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return used["insert"], used["sample"]


@pytest.mark.parametrize("samples_per_insert", [0.25, 1.0, 8.0])
def test_the_bounds_hold_under_threads(samples_per_insert: float) -> None:
    limiter = Watched(samples_per_insert=samples_per_insert, min_size=100, error_buffer=20 * (1 + samples_per_insert))
    inserted, sampled = drive([limiter] * 3, items=20_000)
    assert (limiter.inserted, limiter.sampled) == (inserted, sampled)


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("error_buffer", [40.0, 2000.0], ids=["smaller than a block", "larger"])
def test_the_ratio_holds_over_shards_up_to_their_leases(shards: int, error_buffer: float) -> None:
    leader = Watched(samples_per_insert=1.0, min_size=100, error_buffer=error_buffer)

    def lease(side: Side, count: int, block: int, deleted: int, timeout_s: float) -> tuple[int, str]:
        leader.deleted(deleted)
        return leader.acquire_block(side, count, block, timeout_s=timeout_s), leader.why(side)

    blocks = {"insert": 64, "sample": 256}
    others = [LeasedLimiter(lease, insert_block=64, sample_block=256) for _ in range(shards - 1)]
    inserted, sampled = drive([leader, *others], items=20_000)
    # What was leased and not used is the only difference between the leader's counts and what happened.
    assert 0 <= leader.inserted - inserted <= len(others) * blocks["insert"]
    assert 0 <= leader.sampled - sampled <= len(others) * blocks["sample"]
    lead = inserted - sampled - leader.min_size
    assert -error_buffer - len(others) * blocks["insert"] <= lead <= error_buffer + len(others) * blocks["sample"]


def test_leases_tell_of_deletions_and_survive_a_lost_leader() -> None:
    calls: list[tuple[Side, int, int, int]] = []
    lost = [True]

    def lease(side: Side, count: int, block: int, deleted: int, timeout_s: float) -> tuple[int, str]:
        if lost[0]:
            raise ConnectionError("the leader is gone")
        calls.append((side, count, block, deleted))
        return block, ""

    limiter = LeasedLimiter(lease, insert_block=10, sample_block=10)
    limiter.deleted(7)
    with pytest.raises(ConnectionError):
        limiter.acquire("insert", 4, timeout_s=0.0)
    lost[0] = False
    assert limiter.acquire("insert", 4, timeout_s=0.0)
    assert limiter.acquire("insert", 6, timeout_s=0.0)
    assert calls == [("insert", 4, 10, 7)]
    limiter.give_back("insert", 3)
    assert limiter.acquire("insert", 3, timeout_s=0.0)
    assert len(calls) == 1


def test_a_clock_counts_states_and_a_wait_over_many_short_calls() -> None:
    clock = Clock()
    begin = time.monotonic()
    while time.monotonic() - begin < 0.3:
        with clock.state("wait_insert_s"):
            time.sleep(0.03)
            if time.monotonic() - begin > 0.2:
                assert clock.longest("wait_insert_s") > 0.15
    with clock.state("insert_s"):
        pass
    with clock.state("wait_insert_s"):
        assert clock.longest("wait_insert_s") < 0.1
        assert clock.longest("wait_sample_s") == 0.0
    seconds = clock.seconds()
    assert 0.25 < seconds["wait_insert_s"] <= seconds["wall_s"]
