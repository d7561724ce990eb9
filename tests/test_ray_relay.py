"""Relays on a real Ray cluster of three nodes: what they pass on, and what becomes of it when one of the processes is killed.

All tests are of one run, which each leaves as it was: Ray takes long to start processes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.relays_for_tests import THIEF, SmallActor, SmallHead

SIZE = 300_000  # of weights, bytes: more than Ray keeps in its messages
LATE_S = 2.0


class Run:
    """A head, and actors of it."""

    def __init__(self, nodes: Sequence[str], folder: Path) -> None:
        self.nodes = nodes
        self.actors: dict[str, Any] = {}
        options = {"max_restarts": -1, "max_task_retries": -1, "max_concurrency": 64}
        self.head = _made(SmallHead, nodes[0], **options).remote(str(folder), LATE_S)
        self.version = 0

    def add(self, name: str, node: int, **more: Any) -> Any:
        made = _made(SmallActor, self.nodes[node], max_concurrency=4)
        actor = self.actors[name] = made.remote(name, self.head, **more)
        return actor

    def attach(self) -> None:
        for name, actor in self.actors.items():
            ray.get(self.head.attach.remote(name, actor, ray.get(actor.node.remote())[0]))

    def publish(self) -> None:
        """The next version, which all actors are to have soon."""
        self.version += 1
        ray.get(self.head.publish.remote(self.version, SIZE))
        until(partial(self.have, self.version, list(self.actors)))

    def look(self, after: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(self.head.look.remote(list(self.actors), after))
        return found

    def have(self, version: int, names: Sequence[str]) -> bool:
        """Whether these actors act with this version; the head looks now and then, as its control loop does."""
        self.look()
        statuses = ray.get([self.actors[name].status.remote(0) for name in names])
        return all((version, version, SIZE) in status["versions"][-1:] for status in statuses)

    def served(self) -> list[str]:
        found: list[str] = ray.get(self.head.served.remote(list(self.actors)))
        return found

    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = ray.get(self.head.told.remote())
        return found


def _made(kind: Any, node: str, **options: Any) -> Any:
    return kind.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **options)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's own folder: Ray's sockets lie in it, and their paths must be short.
    with (
        TemporaryDirectory(prefix="millrace-ray-", ignore_cleanup_errors=True) as folder,
        mock.patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0"}),
    ):
        os.environ.pop("RAY_ADDRESS", None)
        common = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False, "temp_dir": folder}
        made = Cluster(initialize_head=True, head_node_args=common)
        try:
            for _ in range(2):
                made.add_node(**common)
            ray.init(address=made.address, namespace="relays", log_to_driver=False, logging_level="error")
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an actor on the node of its head, two on the next and one on the last."""
    nodes = [cluster.head_node.node_id, *(node.node_id for node in sorted(cluster.worker_nodes, key=str))]
    made = Run(nodes, tmp_path_factory.mktemp("run"))
    for number, node in enumerate((0, 1, 1, 2)):
        made.add(f"actor {number}", node)
    made.attach()
    return made


def until(true: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def relay_processes() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::RelayWorker"):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_weights_and_statuses_of_other_nodes_pass_through_their_relays(run: Run) -> None:
    others = ["actor 1", "actor 2", "actor 3"]
    assert run.served() == others
    for _ in range(3):
        run.publish()
    ray.get(run.head.publish.remote(1, SIZE))  # of a learner that was replaced: older than what they have
    statuses = until(lambda: len(found := run.look(7)) == 3 and found)
    assert statuses.keys() == set(others)
    assert {status["after"] for status in statuses.values()} == {7}
    assert {status["versions"][-1][0] for status in statuses.values()} == {3}
    assert len(relay_processes()) == 2

    before, began = run.told()["calls"], time.monotonic()
    time.sleep(1.0)
    asked = {kind: count - before[kind] for kind, count in run.told()["calls"].items()}
    seconds = time.monotonic() - began
    # While there is nothing new, the one of the head's node waits for it there, and the three others at their relays.
    assert asked["policy"] <= seconds + 2
    assert 0 < asked["exchange_many"] <= 2 * 20 * seconds + 2


def test_one_that_hangs_fails_or_dies_holds_up_no_other(run: Run) -> None:
    slow = run.add("slow", 1, is_slow=True)
    run.add(THIEF, 1)
    run.attach()
    wrong = until(lambda: (found := run.look()).get(THIEF, {}).get("error") and found)
    assert "no assignments for thieves" in wrong[THIEF]["error"]
    assert "error" not in wrong["actor 1"]
    assert "slow" not in wrong
    slow.wake.remote()
    until(lambda: "slow" in run.look())
    failed = until(lambda: run.look(-1).get("slow"))
    assert "expected a number of an episode" in failed["error"]

    first = run.actors.pop(THIEF)
    os.kill(ray.get(first.node.remote())[1], signal.SIGKILL)
    run.actors[THIEF] = first
    until(lambda: run.look().get(THIEF) == {"died": True})
    run.actors[THIEF] = slow
    run.attach()
    for _ in range(3):  # what is still said of the dead one is not taken for its successor's
        assert not run.look().get(THIEF, {}).get("died")
    until(lambda: "pid" in run.look().get(THIEF, {}))
    for name in ("slow", THIEF):
        ray.get(run.head.detach.remote(name))
        del run.actors[name]
    ray.kill(slow)


def test_killed_relays_come_back(run: Run) -> None:
    killed = until(lambda: len(found := relay_processes()) == 2 and found)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    run.publish()
    until(lambda: run.look().keys() == {"actor 1", "actor 2", "actor 3"})
    again = relay_processes()
    assert len(again) == 2
    assert not again & killed


def test_a_new_head_finds_the_relays_that_lived_on(run: Run) -> None:
    relays, names = until(relay_processes), ray.get(run.head.names.remote())
    os.kill(ray.get(run.head.pid.remote()), signal.SIGKILL)
    late = run.add("late", 1)
    run.attach()
    # As a learner tells a new head: what the dead one held is gone, also for the one that comes only now.
    ray.get(run.head.publish.remote(run.version, SIZE))
    until(partial(run.have, run.version, ["late"]))
    assert len(ray.get(late.status.remote(0))["versions"]) == 1
    run.publish()
    assert ray.get(run.head.names.remote()) == names
    assert relay_processes() == relays


@pytest.mark.slow
def test_the_head_does_without_a_relay_that_hangs(run: Run) -> None:
    served = run.served()
    hung = until(relay_processes)
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    until(lambda: not run.look() and not run.served())
    run.publish()
    until(lambda: run.look().keys() == set(served))
    assert relay_processes().isdisjoint(hung)
    run.publish()


def test_after_all_that_every_outcome_was_counted_once(run: Run) -> None:
    done = {f"{name} of 0": ray.get(actor.finish.remote()) for name, actor in run.actors.items()}
    told = run.told()
    assert {actor: count for actor, count in told["reported"].items() if actor in done} == done
    assert told["waste/sampled_episodes"] == sum(told["reported"].values()) > sum(done.values()) // 2 > 0
    assert told["outcomes_lost"] == 0


def test_the_actors_of_a_lost_node_are_known_to_be_dead(run: Run, cluster: Cluster) -> None:
    (lost,) = (node for node in cluster.worker_nodes if node.node_id == run.nodes[2])
    cluster.remove_node(lost, allow_graceful=False)
    # By its relay, or by nobody's: the head then asks the actor itself, as it does one without a relay.
    until(lambda: run.look().get("actor 3") == {"died": True} or "actor 3" not in run.served())
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(run.actors["actor 3"].status.remote(0), timeout=60.0)

    def is_only_one_left() -> bool:
        run.look()
        return len(ray.get(run.head.names.remote())) == 1

    until(is_only_one_left)
    until(lambda: {"actor 1", "actor 2"} <= run.look().keys())
