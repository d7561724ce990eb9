"""What the control plane is told and asks, in the head of a run: `cluster.control.Controlled` over the run's processes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

import ray

from cluster.books import Books
from cluster.control import ControlServer, Count, Line, Process, Saved, Status, Wanted
from cluster.events import read_event
from cluster.files import write_json
from cluster.ray_children import HELPERS, Child, Children
from cluster.ray_placement import Placement
from cluster.requests import Requests
from cluster.runs import CONTROL, RunFolder
from replay.security import check_host

if TYPE_CHECKING:
    from cluster.outside import Joined, Policy

KINDS = ("shard", "learner", "actor", *HELPERS)
LINE = ("number", "time", "level", "kind", "role", "id", "text")
LINES_KEPT = 10_000
ANSWER_S = 10.0  # how long a process may take to tell its log


class Outside(Protocol):
    """What serves actors outside Ray; see `cluster.outside.OutsideActors`."""

    def join(self, name: str, lanes: int, writer: str) -> Joined: ...

    def policy(self, name: str, have: int) -> Policy | None: ...

    def leave(self, name: str) -> None: ...

    def processes(self) -> list[Process]: ...


class ControlPlane:
    """Serves a run's control plane; its methods answer calls from any thread, and leave all changes to the control loop."""

    def __init__(
        self,
        folder: RunFolder[Any],
        books: Books,
        children: Children,
        placement: Placement,
        requests: Requests,
        *,
        stop: Callable[[str], None],
        own_log: Callable[[int], tuple[list[dict[str, Any]], int]],
    ) -> None:
        """
        requests: answered by the control loop, which knows "scale" and "checkpoint".
        stop: has the run end, for a reason.
        own_log: the head's, as `ProcessLog.after`.
        """
        self._folder = folder
        self._books = books
        self._children = children
        self._placement = placement
        self._requests = requests
        self._stop = stop
        self._own_log = own_log
        self._server: ControlServer | None = None
        self._row: Mapping[str, float] = {}
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque(maxlen=LINES_KEPT)
        self._read_to = 0  # bytes of events.jsonl
        self._count = 0  # lines of it
        self.state = "starting"
        self.outside: Outside | None = None  # where a run takes any

    # -------------------------------------------------------------- the server

    @property
    def port(self) -> int | None:
        """Where it listens, once it does."""
        return None if self._server is None else int(self._server.address.rpartition(":")[2])

    def open(self, port: int | None, *, tell: Callable[..., None]) -> None:
        """Serve, at the port that a head which died had, if it is free; the run's folder tells where.

        tell: `Recorder.event`, of what cannot be: a run goes on without.
        """
        settings, security = self._folder.config.control, self._folder.security()
        host = ray.util.get_node_ip_address() if settings.host == "node" else settings.host
        if (warning := check_host(host, security, setting="control.host")) is not None:
            tell("warning", warning)
        ports = dict.fromkeys([settings.port or port or 0, settings.port])
        for number in ports:
            try:
                self._server = ControlServer(self, host, number, security)
                break
            except RuntimeError as error:
                if number == [*ports][-1]:
                    tell("warning", str(error))
                    return
        assert self._server is not None
        with suppress(OSError):  # a full disk: the event below tells it as well
            write_json(self._folder.path / CONTROL, {"address": self._server.address})
        tell("control", f"head: control plane at {self._server.address}", shown=False)

    def close(self) -> None:
        """Serve no more."""
        (self._folder.path / CONTROL).unlink(missing_ok=True)
        if self._server is not None:
            self._server.close()

    def row(self, row: Mapping[str, float]) -> None:
        """The newest row of metrics."""
        self._row = row

    # ------------------------------------------------------------------- calls

    def status(self) -> Status:
        """As `Controlled.status`."""
        config, books = self._folder.config, self._books
        processes = [_process(child) for kind in KINDS for child in self._children.of(kind)]
        outside = [] if self.outside is None else self.outside.processes()
        waiting = [f"{each['name']} waits for {each['waits_for']}" for each in processes if each.get("waits_for")]
        return {
            "run": self._folder.path.name,
            "state": self.state,
            "step": books.step,
            "updates": books.counts.updates,
            "time_s": books.counts.time_s,
            "actors": _count("actor", config.actors.count, processes),
            "shards": _count("shard", config.replay.shards, processes),
            "learners": _count("learner", config.learners.count, processes),
            "processes": [*processes, *outside],
            "metrics": dict(self._row),
            "waiting": [*self._placement.pending(), *waiting],
        }

    def scale(self, actors: int | None, shards: int | None) -> Wanted:
        """As `Controlled.scale`."""
        wanted: Wanted = self._requests.ask("scale", actors=actors, shards=shards)
        return wanted

    def checkpoint(self) -> Saved:
        """As `Controlled.checkpoint`."""
        saved: Saved = self._requests.ask("checkpoint")
        return saved

    def stop(self, reason: str) -> None:
        """As `Controlled.stop`."""
        self._stop(reason or "stopped by `millrace stop`")

    def logs(self, after: int, process: str | None) -> tuple[list[Line], int]:
        """As `Controlled.logs`: the run's events, or what one process has logged itself."""
        if process == "head":
            own, following = self._own_log(after)
            return [_line(line) for line in own], following
        if process is not None:
            return self._logs_of(process, after)
        with self._lock:
            self._read_events()
            lines = [line for line in self._lines if line["number"] > after]
            return lines, self._count

    def _logs_of(self, process: str, after: int) -> tuple[list[Line], int]:
        if process not in self._children:
            names = ", ".join(["head", *(child.name for child in self._children.all())])
            raise ValueError(f"expected the name of a process of the run ({names}), received {process!r}")
        worker = self._children[process].worker
        if worker is None:
            raise RuntimeError(f"{process} is being replaced; ask again in a few seconds")
        try:
            lines, following = ray.get(worker.logs.remote(after), timeout=ANSWER_S)
        except (ray.exceptions.RayError, TimeoutError):
            raise RuntimeError(f"{process} does not answer: it has died, has not started yet, or is busy") from None
        return [_line(line) for line in lines], following

    def _read_events(self) -> None:
        """Take in the lines that events.jsonl has got since."""
        with suppress(OSError), open(self._folder.path / "events.jsonl", "rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read_to += len(line)
                self._count += 1
                if (event := read_event(line)) is not None:
                    self._lines.append(_line(event | {"number": self._count}))

    def join(self, name: str, lanes: int, writer: str) -> Joined:
        """As `Controlled.join`."""
        return self._outside().join(name, lanes, writer)

    def policy(self, name: str, have: int) -> Policy | None:
        """As `Controlled.policy`."""
        return self._outside().policy(name, have)

    def leave(self, name: str) -> None:
        """As `Controlled.leave`."""
        self._outside().leave(name)

    def _outside(self) -> Outside:
        if self.outside is None:
            raise RuntimeError(
                "this run takes no actors from outside: it has not started yet, or trains a language model"
            )
        return self.outside


def _line(found: Mapping[str, Any]) -> Line:
    return cast(Line, {key: found[key] for key in LINE if key in found})


def _count(kind: str, wanted: int, processes: list[Process]) -> Count:
    running = sum(each["kind"] == kind and each["state"] in ("running", "leaving") for each in processes)
    return {"wanted": wanted, "running": running}


def _process(child: Child) -> Process:
    status = dict(child.status)  # the control loop may change it
    figures = {key: float(value) for key, value in status.items() if isinstance(value, int | float)}
    found: Process = {
        "name": child.name,
        "kind": child.kind,
        "index": child.index if " " in child.name else 0,
        "state": _state(child),
        "figures": figures,
    }
    if child.process:
        found |= {"node": child.process["node"], "pid": child.process["pid"]}
    if child.starting is not None and not child.process:
        found["waits_for"] = "a node with room for it, or its start there"
    elif waits := status.get("waiting_for") or "; ".join(status.get("waiting", ())):
        found["waits_for"] = str(waits)
    return found


def _state(child: Child) -> str:
    if child.worker is None or child.status.get("error"):
        return "lost"
    if child.leaving is not None:
        return "leaving"
    if child.kind in HELPERS:
        return "running"
    return "starting" if child.starting is not None or not child.process else "running"
