"""What the head of any run does under Ray: watches the other processes, starts them again, and keeps the books.

One thread runs the control loop; calls from actors, the learner and the driver are answered beside it. A head that dies is
started again by Ray: it takes over the processes, which live on, with the state that the dead one left (`cluster.head_state`).
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray

from cluster.books import SILENT_S, Books, Measured
from cluster.checkpoint import Checkpoint, Checkpoints, read_manifest
from cluster.files import read_json, write_json
from cluster.head_state import HeadStateFile, Shown
from cluster.ray_actors import Actors
from cluster.ray_checkpoints import RunCheckpoints, save_learner, save_shards
from cluster.ray_children import HEAD as HEAD_NAME
from cluster.ray_children import (
    MOST_RESTARTS,
    SAVE_S,
    STOP_S,
    WITHIN_S,
    Child,
    Children,
    RunError,
    end_processes,
)
from cluster.ray_control_plane import ControlPlane
from cluster.ray_evaluations import Evaluations
from cluster.ray_files import FolderMark, ServedFolder
from cluster.ray_learners import Learners
from cluster.ray_metrics import RayMetrics
from cluster.ray_placement import Placement
from cluster.ray_relay import Relays
from cluster.ray_threads import RunProcess, process
from cluster.ray_weights import PublishedWeights, Weights, newest_of
from cluster.recorder import HEAD, Recorder
from cluster.requests import Requests
from cluster.runs import ADDRESSES, RunFolder
from cluster.scaling import scaled

SHORTEST_S = 0.05  # between two looks at all processes
EVALUATE_S = 1800.0  # the longest that the end of a run waits for an evaluation
LINGER_S = 60.0  # how long the head of an ended run waits for a driver to ask how it ended
BORN_AHEAD = 1 << 12  # processes that a dead head may have started since its last state

log = logging.getLogger(__name__)


def resumed_at(
    wall_started: float, resume: Path | None, kept: Mapping[str, Any] | None = None
) -> tuple[float, dict[str, Any] | None]:
    """What `Books` begins with: the monotonic time of the epoch second `wall_started`, and the state in a checkpoint.

    kept: what a head that died has left; its state comes first.
    """
    since = time.monotonic() - (time.time() - wall_started)
    if kept is not None and kept["is_started"]:
        return since, kept["books"]
    return since, None if resume is None else read_json(resume / HEAD)


class RunHead(RunProcess, ABC):
    """What the heads of all kinds of runs have in common; a subclass is the named detached Ray actor.

    A subclass makes its own fields after those of this class, and then calls `_begin`, which starts the control loop. What
    it fills in are the abstract methods; the others have a body that it may replace.
    """

    FIRST: ClassVar[str]  # what actors do first, as the event of it says: "environment step"

    def __init__(
        self,
        folder: RunFolder[Any],
        head: Books,
        wall_started: float,
        resume: Path | None,
        kept: Mapping[str, Any] | None = None,
        *,
        hold_back: int = 0,
    ) -> None:
        """
        folder: of the run; the node of the head must reach it.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        kept: what a head that died has left in the folder; None for the first head of a run.
        hold_back: how many versions actors stay behind the newest weights.
        """
        self._called("head", None, run=folder.config.name)
        self._folder = folder
        self._metrics = RayMetrics(folder.path.name) if folder.config.ray.metrics else None
        self._security = folder.security()
        self._resume = resume
        self._wall_started = wall_started
        self._head = head
        # A checkpoint that the dead head began with may be gone by now; `Recorder.go_on` looks for the newest.
        is_back = kept is not None and kept["is_started"]
        resumed = None if resume is None or is_back else read_manifest(resume)
        self._shown = Shown(None if kept is None else kept["shown"])
        self._recorder = Recorder(folder, head, show=self._shown.add, resume=resumed)
        self._self = ray.get_runtime_context().current_actor
        self._kept = kept
        self._state_file = HeadStateFile(folder.path, tell=lambda text: self._recorder.event("warning", text))
        now = time.time()
        deaths = [] if kept is None else [*kept["deaths"], now]
        self._deaths = [at for at in deaths if now - at <= WITHIN_S]  # of heads; epoch
        self._born = 0 if kept is None else kept["born"] + BORN_AHEAD
        self._is_started = False
        self._stop_reason: str | None = None  # once the run is ending
        namespace = ray.get_runtime_context().namespace
        self._children = Children(namespace, tell=self._recorder.event)
        self._placement = Placement(folder.config, namespace)
        self._mark = FolderMark.leave(folder.path, afresh=kept is None)
        self._served = ServedFolder(folder.checkpoints)
        self._learners = Learners(
            folder,
            head,
            self._children,
            self._placement,
            make=self._make_learner,
            routes=self._routes,
            incarnation=self._incarnation,
            highest_version=self._highest_version,
            latest=self._latest,
            tell=self._recorder.event,
        )
        self._weights = PublishedWeights(hold_back=hold_back)
        self._relays = Relays(self._self, self._weights)
        self._evaluations = Evaluations(
            head, self._children, ask=self._ask_evaluation, read=self._evaluation_of, tell=self._recorder.event
        )
        self._checkpoints = RunCheckpoints(
            head,
            self._children,
            self._recorder,
            self._evaluations,
            self._weights,
            self,
            fetch_weights=self._fetch_weights,
            keep=self._keep,
        )
        self._first_step_told = False
        self._first_step: float | None = None  # monotonic
        self._finishing = False
        self._stop_asked: str | None = None
        self._wake = threading.Event()
        self._requests = Requests(self._wake)
        self._actors = Actors(
            self._children,
            head,
            self._relays,
            spawn=self._spawn_actor,
            start=self._start_actor,
            forget=self._forget_actor,
            tell=self._recorder.event,
        )
        self._plane = ControlPlane(
            folder, head, self._children, self._placement, self._requests, stop=self.stop, own_log=self.logs
        )
        self._outcome: dict[str, Any] | None = None

    @property
    def _config(self) -> Any:
        """The settings of the run; scaling changes some."""
        return self._folder.config

    def _begin(self) -> None:
        """Start the control loop."""
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()

    # ------------------------------------------------------- of a kind of run

    @abstractmethod
    def _start(self) -> None:
        """Start everything: all processes at once, for most of the time goes into their imports."""

    @abstractmethod
    def _make_learner(self, rank: int, *, name: str, options: Mapping[str, Any], incarnation: int) -> None:
        """As `cluster.ray_learners.MakeLearner`."""

    @abstractmethod
    def _replace(self, child: Child, why: str) -> str | None:
        """Make and start a new process in the place of an actor or shard that was cleared away.

        Returns what became of its data; None where that is told once it is known.
        """

    @abstractmethod
    def _routes(self) -> dict[int, str]:
        """Addresses of the shards that are read from, by their numbers."""

    @abstractmethod
    def _spawn_actor(self, index: int) -> None:
        """Make an actor, without starting it."""

    @abstractmethod
    def _forget_actor(self, child: Child) -> None:
        """An actor is gone and nobody takes its place: end what it wrote, and take back what it was given."""

    @abstractmethod
    def _tick(self) -> None:
        """Give the books the newest statuses, and the recorder their row."""

    @abstractmethod
    def _ask_evaluation(self, weights: Any) -> Any:
        """Have the child `evaluator`, made where there is none, evaluate; takes and returns a Ray reference."""

    @abstractmethod
    def _evaluation_of(self, answer: Any, step: int, version: int) -> Measured:
        """The evaluation in the value of the reference that `_ask_evaluation` returned."""

    @abstractmethod
    def _evaluation_again(self, kept: Mapping[str, Any]) -> Measured:
        """An evaluation of which `dataclasses.asdict` was kept as JSON."""

    def _arguments(self) -> dict[str, tuple[Any, ...]]:
        """Arguments of the next `status` of processes, by their name."""
        return {"learner": self._learners.status_arguments}

    def save_learner(self, path: Path) -> int:
        """As `Saves.save_learner`."""
        return save_learner(self._children, path)

    def save_shards(self, replay: Path, before: Path | None) -> dict[str, dict[str, int]]:
        """As `Saves.save_shards`."""
        return save_shards(self._children, replay, before)

    def save_more(self, path: Path) -> None:
        """As `Saves.save_more`."""

    def _more_state(self) -> dict[str, Any]:
        """What else a new head needs that takes this one's place, as JSON."""
        return {}

    def _restore_more(self, kept: Mapping[str, Any]) -> None:
        """Take over what `_more_state` has returned; the processes that live on are known by now, and not looked at yet."""

    @abstractmethod
    def _start_actor(self, index: int) -> None:
        """Have an actor begin, or, where it is told so again, tell once more how it began."""

    def _learners_restarted(self) -> None:
        """New learners take the place of others."""

    def _started(self, child: Child, answer: Mapping[str, Any]) -> None:
        """A process that was started has answered."""
        child.is_added = False
        if child.kind == "actor":
            self._relays.attach(child.name, child.worker, answer["process"]["node_id"])

    def _reroute(self) -> None:
        """Tell everybody where the shards are now."""

    def _scale_shards(self) -> None:
        """Take a step towards as many shards as there should be."""

    def moving(self) -> str | None:
        """As `Saves.moving`."""
        return None

    def _stall(self) -> str | None:
        """A line about what is stuck, told once; None where nothing is."""
        return self._head.stall()

    def _checkpoint_due(self) -> bool:
        """Whether a checkpoint should be written now; not while a learner starts."""
        if self._learners.are_starting or self.moving() is not None:
            return False
        if any(child.starting is not None and child.address for child in self._children.of("shard")):
            return False
        return self._head.checkpoint_due(time.monotonic())

    def _to_evaluate(self) -> tuple[int, Weights]:
        """The step and the weights of an evaluation that begins now."""
        return self._head.step, self._weights.newest

    # ------------------------------------------------- calls from other processes

    def publish(self, version: int, data: np.ndarray) -> None:
        """The learner's new weights. They are put into the object store by the head, which outlives the learner."""
        self._weights.publish(version, data)
        self._relays.publish()

    def policy(self, have: int, wait_s: float = 0.0) -> tuple[int, Any] | None:
        """As `PublishedWeights.policy`."""
        return self._weights.policy(have, wait_s)

    @ray.method(concurrency_group="files")  # type: ignore[untyped-decorator]
    def files(self, operation: str, *arguments: Any) -> Any:
        """As `ServedFolder.do`, for processes on nodes that do not see the run's folder."""
        return self._served.do(operation, *arguments)

    def status(self, after: int) -> dict[str, Any]:
        """What was shown from number `after` on as (row, line), the number to ask for `next`, and how the run ended once it has.

        What lies before `after` has arrived and is let go of.
        """
        outcome = self._outcome  # first: all that is shown before it must have come
        shown, following = self._shown.after(after)
        return {"shown": shown, "next": following, "outcome": outcome}

    def stop(self, reason: str) -> None:
        """End the run with a checkpoint."""
        self._stop_asked = self._stop_asked or reason
        self._wake.set()

    # ------------------------------------------------------------- control loop

    def _control(self) -> None:
        kept = self._kept
        self._children.started(HEAD_NAME, process())
        outcome: dict[str, Any] | None = None if kept is None else kept["outcome"]
        try:
            self._plane.open(None if kept is None else kept["control_port"], tell=self._recorder.event)
            if outcome is None:
                outcome = {"summary": self._run()}
        except BaseException as error:
            log.exception("the run failed")
            text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            outcome = {"error": text}
            self._recorder.event("error", text)
        finally:
            # Before anything is removed that a head which takes this one's place would miss.
            for end in (
                partial(self._keep, outcome),
                partial(self._requests.close, "the run has ended"),
                self._plane.close,
                self._remove_addresses,
                self._recorder.close,
                self._end_processes,
            ):
                try:
                    end()
                except Exception:  # the driver waits for the outcome all the same
                    log.exception("the run was not cleaned up")
        self._outcome = outcome
        # Where the driver has died, nobody else would end this process.
        time.sleep(LINGER_S)
        ray.kill(self._self)

    def _run(self) -> dict[str, Any]:
        """Start, or go on where the head that died has left off, until the run ends. Returns the summary."""
        kept = self._kept
        if kept is None:
            if set(ray.util.list_named_actors()) - {HEAD_NAME}:
                raise RunError(
                    "the head died and left no state to go on from, as where the disk is full; go on from the last checkpoint with "
                    "--resume"
                )
            self._keep()
            self._start()
        else:
            # Should this one die as well before it knows more.
            mine = {"shown": self._shown.state(), "born": self._born, "deaths": self._deaths}
            self._state_file.write({**kept, **mine})
            if len(self._deaths) > MOST_RESTARTS:
                raise RunError(f"the head died {len(self._deaths)} times within {WITHIN_S:g} s")
            if kept["is_started"]:
                self._come_back(kept)
            else:
                self._head.counts.restarts = kept["books"]["counts"]["restarts"] + 1
                self._recorder.event(
                    "restart", "the head died while the run was starting; everything is started afresh"
                )
                self._keep()
                end_processes(but={HEAD_NAME})
                self._placement.close()
                self._start()
        self._is_started = True
        self._plane.state = "training"
        if kept is not None:  # the dead one may not have come to it
            self._reroute()
        self._keep()
        return self._finish(self._stop_reason or self._supervise())

    def _remove_addresses(self) -> None:
        (self._folder.path / ADDRESSES).unlink(missing_ok=True)

    def _end_processes(self) -> None:
        self._children.close()
        self._relays.close()
        end_processes(but={HEAD_NAME})  # of a head that died meanwhile
        self._placement.close()

    def _supervise(self) -> str:
        period = self._config.report_every_s
        due = time.monotonic()
        while True:
            # Sooner than the next row where a stop or an evaluation comes sooner.
            now = time.monotonic()
            due = max(min(due, now) + min(period, self._head.seconds_to_due()), now + SHORTEST_S)
            if self._wake.wait(max(0.0, due - time.monotonic())) and self._stop_asked is None:
                self._wake.clear()
            self._collect()
            self._tick()
            self._requests.answer({"scale": self._scale, "checkpoint": self._checkpoint_asked})
            self._scale_shards()
            self._actors.scale(self._config.actors.count)
            if (stall := self._stall()) is not None:
                self._recorder.event("warning", stall)
            self._follow_evaluation()
            self._keep()
            reason = self._stop_asked or self._head.stop_reason()
            if reason is not None:
                return reason
            evaluations = self._evaluations
            can_begin = not evaluations.is_running and self._weights.newest.version > 0
            if can_begin and (evaluations.is_lost or self._head.evaluation_due()):
                evaluations.begin(*self._to_evaluate())
            # Not while somebody does not answer: the checkpoint would wait for it, and nobody tell of the stall.
            again = evaluations.unsaved_best is not None and self._checkpoints.may_retry
            if (again or self._checkpoint_due()) and not self._children.silent(0.0):
                self._checkpoint()

    def _finish(self, reason: str) -> dict[str, Any]:
        head = self._head
        self._finishing, self._stop_reason = True, reason
        self._plane.state = "stopping"
        self._requests.close("the run is ending")
        self._keep()
        # Actors first: one that waits for room in the replay needs the learner to go on.
        for child in self._children.of("actor"):
            if child.starting is not None:
                self._children.lost.add(child.name)
                ray.kill(child.worker)
        self._children.ask_all("actor", "stop", STOP_S, timeout_s=STOP_S + 5.0)
        self._stop_learners()
        self._settle()
        if not self._stop_asked:  # who asks to stop has no time for it
            self._await_evaluation()
        due = head.final_evaluation_due or (self._evaluations.is_lost and not self._stop_asked)
        if due and self._weights.newest.version and not self._evaluations.is_running:
            self._evaluations.begin(*self._to_evaluate())
            self._await_evaluation()
        if self._stop_asked and not self._weights.newest.version:
            self._recorder.event("warning", "no checkpoint was written: stopped before the learner had started")
        else:
            for _ in range(3):  # a process may die even now, and is started again
                self._stop_learners()
                if self._checkpoint() or self._children.silent(SILENT_S):
                    break
        summary = head.summary(stop_reason=reason)
        self._recorder.finish(summary)
        return summary

    def _await_evaluation(self) -> None:
        deadline = time.monotonic() + EVALUATE_S
        while self._evaluations.is_running:
            if not self._evaluations.wait(max(0.0, deadline - time.monotonic())):
                text = f"the last evaluation took longer than {EVALUATE_S:g} s and is left out"
                self._recorder.event("warning", text)
                return
            self._follow_evaluation()
            self._tick()  # a row holds one evaluation, and there may be another one to come

    def _settle(self) -> None:
        """Wait for shards that start or hand their rows over, so that the last checkpoint has all rows once."""
        deadline = time.monotonic() + (SAVE_S if self._stop_asked is None else STOP_S)  # who asks to stop has no time
        while time.monotonic() < deadline:
            is_starting = any(child.starting is not None and child.address for child in self._children.of("shard"))
            if not is_starting and self.moving() is None:
                return
            time.sleep(SHORTEST_S)
            self._collect()
            self._scale_shards()
            self._tick()

    def _stop_learners(self) -> None:
        """Stop the learners, once they have started where they still do; the counts are final then."""
        self._collect()
        if self._learners.are_starting and (self._weights.newest.version or not self._stop_asked):
            self._learners.await_start()
            self._collect()
        if not self._children.silent(SILENT_S):
            self._children.ask_all("learner", "stop", 3 * STOP_S, timeout_s=3 * STOP_S + 5.0)
        self._collect()
        self._tick()

    # --------------------------------------------------------------- processes

    def _tell_addresses(self) -> None:
        """For `millrace replay`, and whoever else wants to look into the service of a run."""
        with suppress(OSError):  # a full disk costs them that
            write_json(self._folder.path / ADDRESSES, {"addresses": list(self._routes().values())})

    def _incarnation(self) -> int:
        """Tells every process that this run ever starts from every other, for their seeds."""
        self._born += 1
        return (self._head.counts.incarnation << 20) + self._born - 1

    def _restart(self, child: Child, why: str) -> None:
        """Put a new process in the place of a dead or failed shard or actor."""
        name = child.name
        if child.is_added and why != "died":  # it cannot start here: the run goes on with those it has
            self._recorder.event("warning", f"{name} {why}; the run goes on without it")
            self._scale(**{"actors": None, "shards": None, f"{child.kind}s": child.index})
            return
        if child.kind == "actor" and child.leaving is not None:
            self._recorder.event("warning", f"{name} {why} while it was leaving")
            self._actors.remove(child)
            return
        if self._finishing and child.kind == "actor":
            self._children.lost.add(name)
            self._recorder.event("warning", f"{name} {why} while the run was ending")
            return
        self._children.clear_for_restart(child, why)
        self._head.counts.restarts += 1
        told = self._replace(child, why)
        if told is not None:
            self._recorder.event("restart", f"{name} {why}; {told}")
        self._keep()

    # ------------------------------------------------------------------- scale

    def _scale(self, actors: int | None, shards: int | None) -> dict[str, int]:
        """Want other numbers of processes from now on; None leaves one as it is. Returns what is wanted.

        Raises:
            ValueError: there cannot be so many.
        """
        before = self._config
        config = scaled(before, actors=actors, shards=shards)
        wanted = {"actors": config.actors.count, "shards": config.replay.shards}
        if config != before:
            self._folder.rewrite(config)
            self._head.config = config
            had = {"actors": before.actors.count, "shards": before.replay.shards}
            changes = [f"{kind} from {had[kind]} to {wanted[kind]}" for kind in wanted if wanted[kind] != had[kind]]
            self._recorder.event("scale", f"scaled: {', '.join(changes)}")
            self._keep()
            self._wake.set()
        return wanted

    def _checkpoint_asked(self) -> dict[str, Any]:
        """Write a checkpoint because somebody asked for one. Returns its folder and step.

        Raises:
            RuntimeError: there is none now; the events say why.
        """
        if (why := self.moving()) is not None:
            raise RuntimeError(f"no checkpoint was written: {why}; ask again")
        before = self._head.step
        if not self._checkpoint() or (latest := self._latest()) is None or latest.env_steps < before:
            raise RuntimeError("no checkpoint was written; `millrace logs` tells why")
        return {"path": str(latest.path), "step": latest.env_steps}

    def _latest(self) -> Checkpoint | None:
        return Checkpoints(self._folder.checkpoints, keep=self._config.checkpoints.keep).latest()

    # ------------------------------------------------------ after the head's death

    def _keep(self, outcome: dict[str, Any] | None = None) -> None:
        """Put what a new head needs on disk: one moment, in which the counts are those of the statuses they were taken from."""
        first_step = self._first_step
        state = {
            "wall_started": self._wall_started,
            "is_started": self._is_started,
            "outcome": outcome,
            "stop_asked": self._stop_asked,
            "stop_reason": self._stop_reason,
            "deaths": self._deaths,
            "books": self._head.live_state(),
            "metrics": self._recorder.waiting(),
            "shown": self._shown.state(),
            "children": self._children.known(),
            "lost": sorted(self._children.lost),
            "born": self._born,
            "control_port": self._plane.port,
            "first_step": None if first_step is None else first_step - time.monotonic() + time.time(),
            "is_checkpointing": self._checkpoints.is_writing,
        }
        self._state_file.write(state | self._learners.state() | self._evaluations.state() | self._more_state())

    def _come_back(self, kept: Mapping[str, Any]) -> None:
        """Take over the processes of the head that died, and all that it knew; those that are gone are found by the first look."""
        self._stop_asked = self._stop_asked or kept["stop_asked"]
        self._stop_reason = kept["stop_reason"]
        self._finishing = self._stop_reason is not None
        if kept["first_step"] is not None:
            self._first_step_told = True
            self._first_step = time.monotonic() - (time.time() - kept["first_step"])
        self._placement.adopt()
        starting = self._children.adopt(kept["children"])
        self._children.lost.update(kept["lost"])
        if kept["is_checkpointing"]:
            # What the dead head had them write is nobody's now; the next one may go to the same place.
            for kind in ("learner", "shard"):
                self._children.ask_all(kind, "settle", timeout_s=SAVE_S)
        self._recorder.go_on(kept["metrics"])
        checkpoints = Checkpoints(self._folder.checkpoints)
        self._evaluations.restore(kept, again=self._evaluation_again, checkpoints=checkpoints)
        self._restore_more(kept)
        for child in self._children.of("actor"):
            if child.worker is not None and child.process and child.leaving is None:
                self._relays.attach(child.name, child.worker, child.process["node_id"])
        for child in starting:
            if child.kind == "actor":
                self._start_actor(child.index)
        if self._learners.restore(kept, starting):
            self._fetch_weights()
        self._head.counts.restarts += 1
        count = sum(child.worker is not None for child in self._children.all())
        told = f"the head died; a new one goes on at step {self._head.step} with {count} processes, which lived on"
        self._recorder.event("restart", told)

    def _fetch_weights(self) -> None:
        """The weights that a dead head had been given."""
        if (newest := newest_of(self._children["learner"].worker)) is not None:
            self.publish(*newest)

    # ----------------------------------------------------------------- watching

    def _collect(self) -> None:
        """Take in every process's status, and start the dead ones again."""
        try:
            found = self._children.look(self._arguments(), self._relays)
        finally:  # what the learner warned of may explain why it failed
            self._learners.tell_warnings()
        for child, answer in found.started:
            self._started(child, answer)
        # One that has come back elsewhere may have had others replaced.
        failed = [(c, why) for c, why in found.failed if c.name in self._children and self._children[c.name] is c]
        for child, why in failed:
            if child.kind != "learner":
                self._restart(child, why)
        if learners := [(child, why) for child, why in failed if child.kind == "learner"]:
            self._learners.restart(learners)
            self._learners_restarted()
            self._keep()

    def _show_row(self, row: dict[str, float]) -> None:
        """Keep and show a row of metrics."""
        self._recorder.row(row)
        self._plane.row(row)
        if self._metrics is not None:
            self._metrics.row(row)

    def _moment(self) -> dict[str, Any]:
        """The fields of a `cluster.books.Moment`, from the newest statuses."""
        actors = self._children.statuses("actor")
        for status in actors.values():
            if not self._first_step_told and status["first_step_at"]:
                self._first_step_told = True
                self._first_step = time.monotonic() - (time.time() - status["first_step_at"])
                seconds = status["first_step_at"] - self._wall_started
                self._recorder.event("start", f"first {self.FIRST} {seconds:.1f} s after the command")
        learner = self._children.statuses("learner").get("learner", {})
        self._head.counts.version = self._highest_version()
        return {
            "time": time.monotonic(),
            "actors": actors,
            "shards": self._children.statuses("shard"),
            "learner": learner,
            "learner_metrics": learner.get("metrics", {}),
            "evaluating": self._evaluations.is_running,
            "ending": self._finishing,
            "first_step": self._first_step,
        }

    def _highest_version(self) -> int:
        """Of the weights that were ever published: actors take no older ones."""
        # The learner's last status may not know of them, nor a new head of what a dead one was given.
        acting = (int(status.get("version") or 0) for status in self._children.statuses("actor").values())
        return max(self._head.counts.version, self._weights.highest, *acting)

    # ---------------------------------------------------- evaluation, checkpoint

    def _follow_evaluation(self) -> None:
        """Take in an evaluation that has ended; the best policy goes into a checkpoint at once."""
        is_best = self._evaluations.follow()
        if is_best is None:
            return
        self._keep()
        if is_best:
            self._checkpoint()

    def _checkpoint(self) -> bool:
        """As `RunCheckpoints.write`."""
        return self._checkpoints.write(is_last=self._finishing)
