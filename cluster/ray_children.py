"""The processes that the head of a run has started under Ray: made, asked, found dead, ended."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ray

from cluster.runs import AnyConfig
from configs.llm import LlmConfig

if TYPE_CHECKING:
    from cluster.ray_relay import Relays

STOP_S = 10.0  # how long an actor may take to stop, a learner thrice that
START_S = 120.0  # the longest that a process may take to start
ANSWER_S = 1.0  # where a process takes longer to answer, the head goes on with its last status
MOST_RESTARTS, WITHIN_S = 5, 60.0  # a process that fails more often than this ends the run
# Errors of a start that another try may not meet: of a group of learners, or of a shard that is away.
LOST_ANOTHER = ("GroupError", "FlightUnavailableError", "FlightTimedOutError")
HEAD = "head"  # its name in Ray
HELPERS = ("evaluator", "exporter")  # asked for one thing at a time, and made anew where they are gone
RELAY = "relay-"  # what the names of relays begin with
CLOSE_S = 10.0  # how long a shard may take to close
AGAIN_S = 0.5  # until a process that could not be reached is asked again
SAVE_S = 600.0  # the longest that a process may take to write its part of a checkpoint

log = logging.getLogger(__name__)


class RunError(Exception):
    """What ends a run that cannot go on."""


Phase = Literal["draining", "handing over", "stopping", "counting"]


@dataclass
class Looked:
    """What a look at all processes has found."""

    failed: list[tuple[Child, str]]  # and why; shards first, for the others need theirs to start
    started: list[tuple[Child, dict[str, Any]]]  # and what their `start` has answered


@dataclass
class Child:
    """A process the head has started; its name is a kind, and a number where there are several: `actor 3`."""

    name: str
    worker: Any  # Ray's handle; None where it was found gone by a new head
    starting: Any = None  # answer of its `start`, until that is in
    status: dict[str, Any] = field(default_factory=dict)
    asked: Any = None  # answer of its `status` that has not come yet
    asked_at: float = 0.0  # monotonic
    incarnation: int = 0  # of an actor
    writer: str = ""  # of an actor: the name it writes under
    address: str = ""  # of a shard, once it serves
    port: int = 0
    process: dict[str, Any] = field(default_factory=dict)  # where it runs, once it has started
    starting_since: float = 0.0  # monotonic; of a shard
    is_added: bool = False  # to a run that goes, and has not begun yet
    leaving: Phase | None = None  # that nobody takes the place of when it goes
    leaving_since: float = 0.0  # monotonic
    left: Any = None  # answer of the last thing that it is asked for before it goes
    failures: deque[float] = field(default_factory=deque)

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def index(self) -> int:
        return int(self.name.partition(" ")[2])

    def known(self) -> dict[str, Any]:
        """What a new head needs to find it again, as JSON."""
        return {
            "actor_id": None if self.worker is None else _id(self.worker),
            "incarnation": self.incarnation,
            "writer": self.writer,
            "address": self.address,
            "port": self.port,
            "process": self.process,
            "leaving": self.leaving,
            "is_starting": self.starting is not None,
            "status": self._kept_status(),
        }

    def _kept_status(self) -> dict[str, Any]:
        """What a shard holds, should it be gone; of others nothing is needed, and there may be thousands."""
        if self.kind != "shard":
            return {}
        return {key: value for key, value in self.status.items() if isinstance(value, int | float | str)}

    def end(self) -> None:
        """End it at once."""
        if self.worker is not None:
            ray.kill(self.worker)


class Children:
    """All processes of a run by name, but for the head."""

    def __init__(self, namespace: str, *, tell: Callable[..., None]) -> None:
        """`tell` is `Recorder.event`."""
        self._namespace = namespace
        self._tell = tell
        self._children: dict[str, Child] = {}
        self.lost: set[str] = set()  # dead ones that nobody takes the place of

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __contains__(self, name: str) -> bool:
        return name in self._children

    def all(self) -> list[Child]:
        """All of them; also for other threads than the one that makes them."""
        return list(self._children.values())

    def of(self, kind: str) -> list[Child]:
        """The processes of one kind."""
        return [child for child in self.all() if child.kind == kind]

    def statuses(self, kind: str) -> dict[str, dict[str, Any]]:
        """Newest status of the processes of a kind that have told one."""
        return {child.name: child.status for child in self.of(kind) if len(child.status) > 1}

    def let_go(self, name: str) -> None:
        """Forget a process, which whoever calls ends."""
        self._children.pop(name)
        self.lost.discard(name)

    def remove(self, name: str) -> None:
        """End a process that left, and forget it."""
        self._children.pop(name).end()
        self.lost.discard(name)

    def make(self, name: str, kind: Any, *arguments: Any, options: Mapping[str, Any]) -> Child:
        """A new detached process; one of the same name must be dead.

        options: of Ray's, which say what it takes and where it may run.
        """
        before = self._children.get(name)
        made = kind.options(
            name=_ray_name(name),
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=4,
            **options,
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                worker = made.remote(*arguments)
                break
            except ValueError:  # Ray has not yet let go of the dead one's name
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        child = self._children[name] = Child(name, worker)
        if before is not None:  # what is known of the place that it takes
            child.failures, child.leaving, child.leaving_since = before.failures, before.leaving, before.leaving_since
            child.address, child.port = before.address, before.port
            if child.kind == "shard":  # what it held, until it tells what it holds
                child.status = dict(before.status)
        return child

    def known(self) -> dict[str, dict[str, Any]]:
        """What a new head needs for `adopt`, as JSON."""
        return {child.name: child.known() for child in self._children.values()}

    def adopt(self, known: Mapping[str, Mapping[str, Any]]) -> list[Child]:
        """Take over the processes that a dead head has left. Returns those that it was still starting.

        One that is gone, or that it had begun to replace, has no worker, which `look` tells of. Helpers, whose answer is lost,
        and whatever else it has left are ended.
        """
        starting = []
        for name, about in known.items():
            if name in HELPERS:
                continue
            known_as = about["actor_id"]
            worker = None if known_as is None else _find(_ray_name(name), known_as)
            child = self._children[name] = Child(name, worker)
            child.incarnation, child.writer = about["incarnation"], about["writer"]
            child.address, child.port, child.process = about["address"], about["port"], about["process"]
            child.leaving, child.leaving_since = about["leaving"], time.monotonic()
            child.status = dict(about["status"])
            if about["is_starting"] and child.kind == "shard":  # nobody knows what it was told; its storage stays
                child.end()
                child.worker = None
            if about["is_starting"] and child.worker is not None:
                starting.append(child)
        kept = {_ray_name(child.name) for child in self.all() if child.worker is not None}
        relays = {
            name for name in ray.util.list_named_actors() if name.startswith(RELAY)
        }  # found again as they are needed
        end_processes(but={HEAD, *kept, *relays})
        return starting

    def started(self, name: str, process: Mapping[str, Any]) -> None:
        """Note where a process runs."""
        if name in self._children:
            self._children[name].process = dict(process)
        text = f"{name} runs as process {process['pid']} on {process['node']}"
        if "health" in process:
            text += f", health service at {process['health']}"
        self._tell("process", text, shown=False)

    def answer(self, name: str, reference: Any) -> Any:
        """Wait for an answer that a run cannot start without.

        Raises:
            RunError: it did not come, or was an error.
        """
        try:
            return ray.get(reference, timeout=START_S)
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"{name} did not start within {START_S:g} s; see Ray's logs") from None
        except ray.exceptions.RayError as error:
            raise RunError(f"{name} could not start: {short(error)}") from error

    def ask_all(self, kind: str, method: str, *arguments: Any, timeout_s: float) -> None:
        """Call a method of every started process of a kind and wait; one that fails or takes too long is left behind.

        One that cannot be reached for a while is asked again, so the method must be one that may be called twice.
        """
        children = [c for c in self.of(kind) if c.worker and c.starting is None and c.name not in self.lost]
        deadline = time.monotonic() + timeout_s
        answers = [getattr(child.worker, method).remote(*arguments) for child in children]
        for child, answer in zip(children, answers, strict=True):
            try:
                while True:
                    try:
                        ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
                        break
                    except ray.exceptions.ActorUnavailableError:  # the network was cut: once more
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(AGAIN_S)
                        answer = getattr(child.worker, method).remote(*arguments)
            except ray.exceptions.GetTimeoutError:
                self._tell("warning", f"{child.name} could not {method}: no answer within {timeout_s:g} s")
            except ray.exceptions.RayError as error:
                self._tell("warning", f"{child.name} could not {method}: {short(error)}")

    def look(self, arguments: Mapping[str, tuple[Any, ...]], relays: Relays) -> Looked:
        """Ask every process that tells a status for it, actors on other nodes by their relays; take what has come.

        `arguments`: of the call, by name of the process.

        Raises:
            RunError: a process could not start, or its loss is no longer a number.
        """
        watched = [c for c in self._children.values() if c.kind not in HELPERS and c.name not in self.lost]
        failed = [(child, "died") for child in watched if child.worker is None]
        watched = [child for child in watched if child.worker is not None]
        relayed = {
            child.name: child
            for child in watched
            if child.starting is None and child.asked is None and relays.serves(child.name)
        }
        for child in watched:
            if child.asked is None and child.starting is None and child.name not in relayed:
                child.asked = child.worker.status.remote(*arguments.get(child.name, ()))
                child.asked_at = time.monotonic()
        pending = {reference: child for child in watched if (reference := child.asked or child.starting) is not None}
        found = relays.look({name: arguments.get(name, ()) for name in relayed}, ANSWER_S)
        for name, status in found.items():
            if name in relayed and (why := _take_relayed(relayed[name], status)) is not None:
                failed.append((relayed[name], why))
        asked = [child.asked for child in watched if child.asked is not None]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0.0)
        started: list[tuple[Child, dict[str, Any]]] = []
        for answer in done:
            child = pending[answer]
            if (why := self._take(child, answer, started)) is not None:
                failed.append((child, why))
        for child in watched:
            is_late = child.asked is not None or child.name in relayed.keys() - found.keys()
            child.status["silent_s"] = time.monotonic() - child.asked_at if is_late else 0.0
        return Looked(sorted(failed, key=lambda found: found[0].kind != "shard"), started)

    def _take(self, child: Child, answer: Any, started: list[tuple[Child, dict[str, Any]]]) -> str | None:
        """Take in an answer to `start` or `status`. Returns why the process has failed, where it has."""
        try:
            value = ray.get(answer)
        except ray.exceptions.ActorUnavailableError:  # the network was cut: it lives, or Ray will find that it does not
            child.asked = None
            return None if child.starting is None else "cannot be reached"
        except ray.exceptions.RayActorError:
            return "died"
        except ray.exceptions.RayError as error:
            # What could not start now will not start again, but for one that could not reach another process, which died.
            lost_another = type(getattr(error, "cause", None)).__name__ in LOST_ANOTHER
            if child.starting is not None and not lost_another and not child.is_added:
                raise RunError(f"{child.name} could not start: {short(error)}") from error
            return f"failed: {short(error)}"
        if child.starting is not None:
            child.starting, child.asked_at = None, time.monotonic()
            self.started(child.name, value["process"])
            started.append((child, value))
            return None
        child.asked, child.status = None, value
        if value.get("error_type") == "FloatingPointError":
            raise RunError(f"{child.name}: {value['error']}")
        return f"failed: {value['error']}" if "error" in value else None

    def clear_for_restart(self, child: Child, why: str) -> None:
        """End what is left of a failed process, so that another can take its name.

        Raises:
            RunError: it has failed too often in a short time.
        """
        now = time.monotonic()
        child.failures.append(now)
        while now - child.failures[0] > WITHIN_S:
            child.failures.popleft()
        if len(child.failures) > MOST_RESTARTS:
            raise RunError(f"{child.name} failed {len(child.failures)} times within {WITHIN_S:g} s: {why}")
        child.end()

    def silent(self, seconds: float) -> list[str]:
        """The shards and the learner, where they have not answered for longer than this."""
        asked = [c for c in (*self.of("shard"), *self.of("learner")) if c.asked is not None]
        return [child.name for child in asked if time.monotonic() - child.asked_at > seconds]

    def kill(self, name: str) -> None:
        """End a process at once."""
        child = self._children.pop(name)
        try:
            child.end()
        except ray.exceptions.RayError as error:
            log.warning("%s could not be ended: %s", name, error)

    def close(self) -> None:
        """End all processes, shards by asking, those that start as well: their storage would stay in memory."""
        closed = [child.worker.close.remote() for child in self.of("shard") if child.worker is not None]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=CLOSE_S)
        for name in list(self._children):
            self.kill(name)


def _take_relayed(child: Child, status: dict[str, Any]) -> str | None:
    """Take in a status that a relay has brought. Returns why the process has failed, where it has."""
    child.asked_at = time.monotonic()
    if "died" in status:
        return "died"
    child.status = {**child.status, **status} if "error" in status else status
    return f"failed: {status['error']}" if "error" in status else None


def end_processes(*, but: Collection[str]) -> None:
    """End all processes of this run, whoever started them, but for some by their Ray names.

    Shards are asked to close first: their storage would stay in memory.
    """
    # The head first: it would start the others again.
    for name in sorted(ray.util.list_named_actors(), key=lambda name: name != HEAD):
        worker = None if name in but else _find(name)
        if worker is not None:
            if name.startswith("shard"):
                with suppress(ray.exceptions.RayError):
                    ray.get(worker.close.remote(), timeout=CLOSE_S)
            ray.kill(worker)


def _ray_name(name: str) -> str:
    return name.replace(" ", "-")


def _id(worker: Any) -> str:
    found: str = worker._actor_id.hex()
    return found


def _find(ray_name: str, actor_id: str | None = None) -> Any:
    """Ray's handle of a living process of this run, that of an id where one is given; None where there is none."""
    try:
        worker = ray.get_actor(ray_name)
    except ValueError:
        return None
    return worker if actor_id in (None, _id(worker)) else None


def gpus_of_a_learner(config: AnyConfig, *, tell: Callable[..., None]) -> float:
    """GPUs that Ray sets aside for each learner; `tell` is `Recorder.event`.

    Raises:
        RunError: `learners.device` asks for a GPU each, and the cluster has too few.
    """
    settings = config.learners
    if settings.gpus is not None:
        return settings.gpus
    there = float(ray.cluster_resources().get("GPU", 0.0)) if settings.device != "cpu" else 0.0
    if isinstance(config, LlmConfig):
        there = max(0.0, there - config.actors.count * config.actors.gpus)
    if there >= settings.count:
        return 1.0
    if there and settings.count > 1:
        if settings.device != "auto":
            raise RunError(
                f"learners.device {settings.device} needs a GPU for each of learners.count ({settings.count}) learners, and "
                f"the cluster has {there:g}; lower learners.count"
            )
        tell("warning", f"the learners use CPUs: {settings.count} of them need as many GPUs, and there are {there:g}")
        return 0.0
    return there


def saved(answer: Any) -> Any:
    """What a process that wrote a file answers; an OSError there is one here, so that a full disk is known as one."""
    try:
        return ray.get(answer, timeout=SAVE_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise OSError(error.cause.errno, str(error.cause)) from error
        raise


def short(error: BaseException) -> str:
    """The last line of an error, which in Ray's names the cause."""
    if isinstance(error, ray.exceptions.RayActorError):
        return "a process died"  # Ray's own text is a page about what may have killed it
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
