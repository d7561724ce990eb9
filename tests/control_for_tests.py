"""A run of nothing, for tests of the control plane."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cluster.control import Line, Process, Saved, Status, Wanted
from cluster.outside import Joined, Limits, Policy, Tensor


class Run:
    """A run of nothing: it has as many processes as are wanted, `late` seconds after they are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted: Wanted = {"actors": 2, "shards": 1}
        self.running: Wanted = self.wanted
        self.scaled_at = -1e9
        self.late = 0.0
        self.stopped: str | None = None
        self.on_stop: Callable[[], None] = lambda: None
        self.lines: list[Line] = []
        self.saving = threading.Event()
        self.pause = threading.Event()  # of a checkpoint; set: it does not wait
        self.pause.set()
        self.extra: list[Process] = []
        self.followed = threading.Event()  # somebody has read the second line and asks for more
        self.newest = policy(version=7, size=10)
        self.joined: dict[str, str] = {}

    def say(self, text: str, *, role: str = "head", id: str = "") -> None:
        with self.lock:
            number = len(self.lines) + 1
            self.lines.append(
                {
                    "number": number,
                    "time": 1e9,
                    "level": "info",
                    "kind": "line",
                    "role": role,
                    "id": id,
                    "text": text,
                    "time_s": 0.5,
                }
            )

    def status(self) -> Status:
        with self.lock:
            if time.monotonic() - self.scaled_at >= self.late:
                self.running = self.wanted
            actors: list[Process] = [
                {
                    "name": f"actor {i}",
                    "kind": "actor",
                    "index": i,
                    "node": "10.0.0.1",
                    "pid": 100 + i,
                    "state": "running",
                    "waits_for": "room in shard 0" if i == 1 else "",
                    "figures": {"env_steps": 1234.0, "unknown": None},
                }
                for i in range(self.running["actors"])
            ]
            return {
                "run": "pond",
                "state": "training" if self.stopped is None else "stopping",
                "step": 2**40,
                "updates": 17,
                "time_s": 3661.5,
                "actors": {"wanted": self.wanted["actors"], "running": self.running["actors"]},
                "shards": {"wanted": self.wanted["shards"], "running": self.running["shards"]},
                "learners": {"wanted": 1, "running": 1},
                "processes": [*actors, *self.extra],
                "metrics": {
                    "steps_per_s": 2500.0,
                    "replay_fill": 0.25,
                    "return_mean_100": float("nan"),
                    "policy_lag": None,
                    "time/actor/env_s": 30.0,
                    "time/actor/infer_s": 10.0,
                    "time/actor/wall_s": 50.0,
                },
                "waiting": ["actor 1 waits for room in shard 0"],
            }

    def scale(self, actors: int | None, shards: int | None) -> Wanted:
        if actors is not None and actors > 1000:
            raise ValueError(f"expected at most 1000 actors, received {actors}")
        with self.lock:
            self.wanted = {"actors": actors or self.wanted["actors"], "shards": shards or self.wanted["shards"]}
            self.scaled_at = time.monotonic()
            return self.wanted

    def checkpoint(self) -> Saved:
        if self.stopped is not None:
            raise RuntimeError("the run is ending, and writes a checkpoint anyway")
        self.saving.set()
        assert self.pause.wait(20)
        return {"path": "/runs/pond/checkpoints/000012", "step": 12}

    def stop(self, reason: str) -> None:
        self.stopped = reason
        self.on_stop()

    def logs(self, after: int, process: str | None) -> tuple[list[Line], int]:
        if process == "nobody":
            raise ValueError("expected the name of a process of the run, received 'nobody'")
        if after >= 2:
            self.followed.set()
        with self.lock:
            mine = [x for x in self.lines if process is None or f"{x['role']} {x['id']}".strip() == process]
            return [line for line in mine if line["number"] > after], len(self.lines)

    def join(self, name: str, lanes: int, writer: str) -> Joined:
        if lanes > 8:
            raise ValueError(f"expected at most 8 lanes, received {lanes}")
        self.joined[name] = writer or f"outside-{name}"
        return Joined(
            name=name,
            writer=self.joined[name],
            token="a guest's",
            shard="grpc://10.0.0.1:5000",
            arrow_schema=bytes(range(256)),
            step_schema='[["observation", "float32", [3]]]',
            task='{"env": "Pendulum-v1"}',
            limits=Limits(lanes=8, message_rows=1024, rows_per_s=500.0, bad_messages=10, lease_s=60.0),
            rules="in order",
        )

    def policy(self, name: str, have: int) -> Policy | None:
        if name not in self.joined:
            raise ValueError(f"{name} has no place; join again")
        return None if have >= self.newest.version else self.newest

    def leave(self, name: str) -> None:
        if name == "defect":
            raise KeyError("a defect of the head")
        self.joined.pop(name, None)


def policy(*, version: int, size: int) -> Policy:
    inputs = (
        Tensor("observation", "float32", (3,), "observation"),
        Tensor("noise", "float32", (1,), "standard_normal"),
    )
    outputs = (Tensor("action", "float32", (1,), "action"),)
    return Policy(version, bytes(i % 251 for i in range(size)), b"weights", inputs, outputs)
