"""The two ends of a relay as small Ray actors: a head that publishes, looks and keeps a desk, and an actor that does the rest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.assignments import Outcome
from actors.env_tasks import EnvTask
from actors.task_set import TaskSet
from cluster.curriculum.desk import Desk, families_of
from cluster.curriculum.desk_client import DeskClient
from cluster.curriculum.drawing import make_drawing
from cluster.curriculum.tracker import Tracker
from cluster.ray_desk import Answer, HeadDesk, answers
from cluster.ray_relay import Relays, Request, Upstream
from cluster.ray_threads import Thread
from cluster.ray_weights import PublishedWeights
from configs.curriculum import EpisodeCurriculumSettings

TASKS = TaskSet([EnvTask(f"Env-{n}", {}, f"task {n}", "all", 0, threshold=1.0) for n in range(12)])
THIEF = "thief"  # an actor of this name is refused by the desk


def _make_desk() -> Desk:
    settings = EpisodeCurriculumSettings(draw="uniform")
    tracker = Tracker(families_of(TASKS), discount=settings.discount)
    drawing = make_drawing(settings, tracker, group_size=8, seed=0, stages=np.zeros(len(TASKS), np.int64))
    return Desk(TASKS, tracker, drawing, group_size=8, names=("episodes", "steps"))


@ray.remote
class SmallHead:
    """What of a head its actors and relays ask; killed, it goes on with the record on disk."""

    def __init__(self, folder: str, late_s: float) -> None:
        myself = ray.get_runtime_context().current_actor
        self._weights = PublishedWeights()
        self._relays = Relays(myself, self._weights, late_s=late_s)
        self._desk: HeadDesk[Desk] = HeadDesk(Path(folder), tell=lambda kind, text: None)
        if (Path(folder) / "desk").exists():
            self._desk.recover(_make_desk())
        else:
            self._desk.open(_make_desk(), None)
        self._calls = {"policy": 0, "exchange": 0, "exchange_many": 0}

    def attach(self, name: str, actor: Any, node: str) -> None:
        self._desk.serve(name, 0)
        self._relays.attach(name, actor, node)

    def detach(self, name: str) -> None:
        self._relays.detach(name)

    def publish(self, version: int, size: int) -> None:
        self._weights.publish(version, bytes([version]) * size)
        self._relays.publish()

    def look(self, names: Sequence[str], after: int) -> dict[str, Any]:
        """Statuses of those that relays serve."""
        return self._relays.look({name: (after,) for name in names if self._relays.serves(name)}, 1.0)

    def served(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._relays.serves(name)]

    def names(self) -> set[str]:
        return self._relays.names()

    def policy(self, have: int, wait_s: float) -> tuple[int, Any] | None:
        self._calls["policy"] += 1
        return self._weights.policy(have, wait_s)

    def exchange(self, actor: str, *request: Any) -> Answer | None:
        self._calls["exchange"] += 1
        if actor == THIEF:
            raise ValueError("no assignments for thieves")
        return self._desk.exchange(actor, *request)

    def exchange_many(self, requests: Sequence[Request]) -> list[Answer | Exception | None]:
        self._calls["exchange_many"] += 1
        return answers(self.exchange, requests)

    def told(self) -> dict[str, Any]:
        """Calls so far, and what the desk knows."""
        desk = self._desk.desk
        return {"calls": dict(self._calls), "reported": desk.state()[0]["reported"], **desk.metrics()}

    def pid(self) -> int:
        return os.getpid()


@ray.remote
class SmallActor:
    """Follows the weights, and does what it is assigned at once."""

    def __init__(self, name: str, head: Any, *, is_slow: bool = False) -> None:
        self._name = name
        self._upstream = Upstream(head)
        self._desk = DeskClient(ahead=4)
        self._versions: list[tuple[int, int, int]] = []  # version, first byte and size
        self._done = 0
        self._stopping = threading.Event()
        self._awake = threading.Event()
        if not is_slow:
            self._awake.set()
        self._following = Thread(lambda: self._upstream.follow(self._stopping, 0.02, self._take), name="policy")
        self._working = Thread(self._work, name="desk")

    def relay(self, relay: Any) -> None:
        self._upstream.use(relay)

    def node(self) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def status(self, after: int) -> dict[str, Any]:
        self._awake.wait(60.0)
        if after < 0:
            raise ValueError("expected a number of an episode")
        return {"pid": os.getpid(), "after": after, "versions": list(self._versions), **self._working.failure()}

    def wake(self) -> None:
        self._awake.set()

    def _take(self, version: int, weights: Any) -> None:
        self._versions.append((version, int(np.frombuffer(weights, np.uint8)[0]), len(weights)))

    def _work(self) -> None:
        while not self._stopping.wait(0.02):
            if given := self._desk.ask(1):
                self._done += 1
                self._desk.add([Outcome(given[0].group, given[0].number, 1, 1, 1, 10, "kept", returns=1.0)])
            self._desk.exchange(self._upstream.exchange_within(self._name, 0, 5.0))

    def finish(self) -> int:
        """Report everything. Returns how many assignments were done."""
        self._stopping.set()
        self._working.join(30.0)
        deadline = time.monotonic() + 30.0
        while self._desk.exchange(self._upstream.exchange_within(self._name, 0, 5.0), fetch=False):
            assert time.monotonic() < deadline
        return self._done
