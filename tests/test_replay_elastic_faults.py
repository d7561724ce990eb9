"""Shards that are killed while rows are handed over, and one that comes back at another address: every row is there once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from replay.faults import VARIABLE
from replay.handover import PART_ROWS
from replay.process import ShardProcess
from replay.samplers import stream_sampler
from replay.snapshot import SnapshotStore
from replay.wire import LOST, action
from tests.elastic_for_tests import Stored, actor, check_episodes, numbers, stored
from tests.shards_for_tests import SCHEMA, SECURITY, connect, spec_of, wait_until

EPISODE = 10
LANES, STEPS = 6, 2000  # rows for two parts on each of two ways, of which the first takes 64 segments
RETRY_S = 60.0


@pytest.fixture
def memory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="millrace-elastic-", dir="/dev/shm") as folder:
        yield Path(folder)


class Shards:
    """Shards in processes, each of which may be killed and started again with its storage."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._spec = spec_of(memory, capacity=65_536, segment_steps=64)
        self.running: dict[int, ShardProcess] = {}

    def start(self, number: int, *, fault: str = "", recover: bool = False, port: int = 0) -> None:
        leader = self.running[0].address if number else None
        spec = replace(self._spec, index=number, limiter_address=leader, port=port)
        environment = {VARIABLE: fault} if fault else {}
        self.running[number] = ShardProcess(spec, SECURITY, recover=recover, environment=environment)

    def restart(self, number: int) -> None:
        """Start a shard that was killed, at the address it had."""
        dead = self.running[number]
        dead.wait(60.0)
        self.start(number, recover=True, port=dead.port)

    def ask(self, number: int, kind: str, **body: Any) -> dict[str, Any]:
        with connect(self.running[number].address) as client:
            return action(client, kind, body)

    def table(self, number: int) -> dict[str, int]:
        found: dict[str, int] = self.running[number].stats()["tables"]["steps"]
        return found

    def routes(self, *without: int) -> dict[int, str]:
        return {number: process.address for number, process in self.running.items() if number not in without}

    def hand_over(self, number: int) -> dict[str, Any]:
        to = {str(other): address for other, address in self.routes(number).items()}
        return self.ask(number, "hand_over", to=to, retry_s=RETRY_S)

    def stored(self, number: int) -> list[Stored]:
        """All rows of a shard, read from a snapshot of it."""
        location = self._memory / f"snapshot-{number}"
        self.ask(number, "snapshot", location=str(location))
        (snapshot,) = SnapshotStore(location).all()
        return stored(snapshot.copies(range(snapshot.segments.num_rows)))

    def close(self) -> None:
        for process in self.running.values():
            process.close()


@pytest.fixture
def shards(memory: Path) -> Iterator[Shards]:
    with closing(Shards(memory)) as made:
        yield made


# Where the receiver dies: with rows written that nobody knows of, with a record published and not applied, with a part
# applied of which the tables know nothing yet, in the taking of a segment, and before it has answered.
AT_RECEIVER = ("rows_written:70", "record_published:80", "record_applied:64", "segment_taken:75", "handover.received:2")
ALWAYS = ("record_applied:64", "handover.received:2", "handover.acknowledged:3")


@pytest.mark.parametrize(
    "fault", [*ALWAYS, *(pytest.param(f, marks=pytest.mark.slow) for f in AT_RECEIVER if f not in ALWAYS)]
)
def test_a_hand_over_cut_short_by_a_kill_ends_with_every_row_once(shards: Shards, fault: str) -> None:
    of_leaver = fault.startswith("handover.acknowledged")
    shards.start(0)
    shards.start(1, fault="" if of_leaver else fault)
    shards.start(2, fault=fault if of_leaver else "")
    with actor(shards.routes(0, 1), episode=EPISODE, message_rows=4096) as writing:
        for _ in range(0, STEPS, 500):
            writing.write(dict.fromkeys(range(LANES), 500))
    before = shards.table(2)["items"]
    shards.ask(2, "leave")
    told: list[dict[str, Any]] = []

    def hand_over() -> None:
        try:
            told.append(shards.hand_over(2))
        except LOST:  # the shard that leaves was killed
            assert of_leaver

    thread = threading.Thread(target=hand_over)
    thread.start()
    shards.restart(2 if of_leaver else 1)
    thread.join(RETRY_S)
    if of_leaver:
        assert not told
        assert shards.running[2].stats()["leaving"]
        hand_over()
    assert told == [{"steps": LANES * STEPS, "items": {"steps": before}, "left_out": 0}]
    assert shards.hand_over(2) == told[0], "once more changes nothing"
    rows = [row for number in (0, 1) for row in shards.stored(number)]
    assert numbers(rows) == writing.numbers()
    assert check_episodes(rows, episode=EPISODE) == 0
    assert shards.table(2)["items"] == 0
    for key in ("items", "received"):
        held = [shards.table(number)[key] for number in (0, 1)]
        assert sum(held) == before
        assert abs(held[0] - held[1]) <= 64, "dealt evenly"
    assert [shards.table(number)["inserted"] for number in range(3)] == [0, 0, before]
    leader = shards.running[0].stats()["tables"]["steps"]["limiter"]
    assert leader["removed"] == 0
    assert leader["inserted"] >= before, "and what is leased"


@pytest.mark.slow
def test_a_receiver_that_has_lost_its_storage_loses_what_it_had_and_gets_nothing_twice(shards: Shards) -> None:
    shards.start(0)
    shards.start(1, fault="handover.received:2")
    shards.start(2)
    with actor(shards.routes(0, 1), episode=3000, message_rows=4096) as writing:
        for _ in range(0, STEPS, 500):
            writing.write(dict.fromkeys(range(LANES), 500))
    shards.ask(2, "leave")
    thread = threading.Thread(target=shards.hand_over, args=(2,))
    thread.start()
    port = shards.running[1].port
    shards.running[1].wait(60.0)
    shards.start(1, port=port)
    thread.join(RETRY_S)
    rows = [row for number in (0, 1) for row in shards.stored(number)]
    assert max(numbers(rows).values()) == 1
    assert len(rows) == LANES * STEPS - PART_ROWS, "the one part it had acknowledged"
    assert sum(row.successor is not None for row in shards.stored(1)) == shards.table(1)["items"]
    assert shards.table(1)["items"] == shards.table(1)["received"]


def test_a_shard_that_leaves_and_is_started_again_still_serves_nobody(shards: Shards) -> None:
    shards.start(0)
    shards.start(1)
    with actor(shards.routes(0), episode=EPISODE) as writing:
        writing.write({0: 100})
    shards.ask(1, "leave")
    shards.running[1].kill()
    shards.start(1, recover=True)
    assert shards.running[1].stats()["leaving"]
    with actor(shards.routes(1), name="second", episode=EPISODE) as second:
        second.write({1: 100})
    with closing(stream_sampler(shards.routes(), SCHEMA, batch_size=32, seed=0, security=SECURITY)) as sampler:
        for _ in range(4):
            assert (sampler.sample(20.0).shard == 0).all()
    assert shards.hand_over(1)["steps"] == 100
    assert numbers(shards.stored(0)) == writing.numbers() + second.numbers()


@pytest.mark.parametrize("killed_while", [pytest.param("idle", marks=pytest.mark.slow), "writing"])
def test_a_shard_that_comes_back_at_another_address_has_every_row_once(shards: Shards, killed_while: str) -> None:
    shards.start(0)
    shards.start(1, fault="shard.before_reply:4" if killed_while == "writing" else "")
    with actor(shards.routes(), episode=EPISODE, message_rows=64) as writing:
        stopped = threading.Event()

        def write() -> None:
            for k in range(60):
                writing.write({0: 8, 1: 8, 2: 8})
                if k == 10 and killed_while == "idle":
                    writing.writer.flush()
                    shards.running[1].kill()
            writing.writer.flush()
            stopped.set()

        thread = threading.Thread(target=write)
        thread.start()
        shards.running[1].wait(60.0) if killed_while == "writing" else wait_until(lambda: _is_dead(shards.running[1]))
        shards.start(1, recover=True)  # at another port
        writing.writer.route(shards.routes(), within_s=60.0)
        thread.join(60.0)
        assert stopped.is_set()
    rows = [row for number in (0, 1) for row in shards.stored(number)]
    assert numbers(rows) == writing.numbers()
    assert check_episodes(rows, episode=EPISODE) == 0
    assert {row.number // 10_000 for row in shards.stored(1)} == {1}


def _is_dead(process: ShardProcess) -> bool:
    return process._child.poll() is not None


def test_a_reader_follows_a_shard_to_another_address(shards: Shards) -> None:
    shards.start(0)
    shards.start(1)
    with actor(shards.routes(), episode=EPISODE) as writing:
        writing.write({0: 100, 1: 100})
    with closing(stream_sampler(shards.routes(), SCHEMA, batch_size=32, seed=0, security=SECURITY)) as sampler:
        assert set(sampler.sample(20.0).shard.tolist()) == {0, 1}
        shards.running[1].kill()
        shards.start(1, recover=True)
        sampler.route(shards.routes())
        found = Counter[int]()
        wait_until(lambda: found.update(sampler.sample(20.0).shard.tolist()) or found[1] > 100)
        assert np.all(sampler.sample(20.0).length >= 1)
