"""What the head of any run does under Ray: watches the other processes, starts them again, and keeps the books.

One thread runs the control loop; calls from actors, the learner and the driver are answered beside it. A head that dies is
started again by Ray: it takes over the processes, which live on, with the state that the dead one left (`cluster.head_state`).
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import ray

from cluster.books import SILENT_S, Books, Measured
from cluster.checkpoint import Checkpoint, Checkpoints, read_manifest
from cluster.files import read_json, write_json
from cluster.head_state import HeadStateFile, Shown
from cluster.ray_children import HEAD as HEAD_NAME
from cluster.ray_children import (
    MOST_RESTARTS,
    SAVE_S,
    START_S,
    WITHIN_S,
    Child,
    Children,
    RunError,
    end_processes,
    gpus_of_a_learner,
    saved,
    short,
)
from cluster.ray_evaluations import Evaluations
from cluster.ray_threads import process
from cluster.ray_weights import PublishedWeights, Weights, newest_of
from cluster.recorder import HEAD, LEARNER, Recorder
from cluster.runs import ADDRESSES, RunFolder

SHORTEST_S = 0.05  # between two looks at all processes
RETRY_S = 30.0  # until a checkpoint that could not be written is tried again
EVALUATE_S = 1800.0  # the longest that the end of a run waits for an evaluation
STOP_S = 10.0  # how long an actor may take to stop, a learner thrice that
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


class RunHead(ABC):
    """What the heads of all kinds of runs have in common; a subclass is the named detached Ray actor.

    A subclass makes its own fields after those of this class, and then calls `_begin`, which starts the control loop. What
    it fills in are the abstract methods; `_arguments`, `_start_learners`, `_save_learner`, `_save_shards`, `_save_more`,
    `_stall`, `_checkpoint_due`, `_to_evaluate`, `_more_state` and `_restore_more` have a body that it may replace.
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
        self._folder = folder
        self._config = folder.config
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
        self._is_checkpointing = False
        self._stop_reason: str | None = None  # once the run is ending
        self._learner_start: tuple[str | None, int] | None = None  # file and version that learners began with
        self._children = Children(ray.get_runtime_context().namespace, tell=self._recorder.event)
        self._addresses: list[str] = []  # of the shards
        self._ports: list[int] = []
        self._weights = PublishedWeights(hold_back=hold_back)
        self._evaluations = Evaluations(
            head, self._children, ask=self._ask_evaluation, read=self._evaluation_of, tell=self._recorder.event
        )
        self._tried_at = 0.0  # to write a checkpoint; monotonic
        self._next_warning = 0  # of learner 0
        self._first_step_told = False
        self._first_step: float | None = None  # monotonic
        self._finishing = False
        self._stop_asked: str | None = None
        self._wake = threading.Event()
        self._outcome: dict[str, Any] | None = None

    def _begin(self) -> None:
        """Start the control loop."""
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()

    # ------------------------------------------------------- of a kind of run

    @abstractmethod
    def _start(self) -> None:
        """Start everything: all processes at once, for most of the time goes into their imports."""

    @abstractmethod
    def _make_learner(self, rank: int, *, name: str, gpus: float, incarnation: int) -> None:
        """Make one learner process, without starting it; the incarnation is the same for all learners of a group."""

    @abstractmethod
    def _replace(self, child: Child) -> str:
        """Make and start a new process in the place of an actor or shard that was cleared away; what became of its data."""

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
        return {"learner": (self._next_warning,)}

    def _save_learner(self, path: Path) -> int:
        """Have the learners' state written to a file. Returns the updates made; raises what `saved` does."""
        return int(saved(self._children["learner"].worker.save.remote(str(path))))

    def _save_shards(self, replay: Path, before: Path | None) -> list[dict[str, int]]:
        """Have all shards write their rows at once. Returns their counters; raises what `saved` does."""
        shards = [self._children[f"shard {index}"] for index in range(self._config.replay.shards)]
        previous = None if before is None else str(before)
        return [saved(answer) for answer in [shard.worker.save.remote(str(replay), previous) for shard in shards]]

    def _save_more(self, path: Path) -> None:  # noqa: B027 - most runs have none
        """Write further files into the folder of a checkpoint."""

    def _more_state(self) -> dict[str, Any]:
        """What else a new head needs that takes this one's place, as JSON."""
        return {}

    def _restore_more(self, kept: Mapping[str, Any]) -> None:  # noqa: B027 - most runs have none
        """Take over what `_more_state` has returned; the processes that live on are known by now, and not looked at yet."""

    @abstractmethod
    def _start_actor(self, index: int) -> None:
        """Have an actor begin, or, where it is told so again, tell once more how it began."""

    def _stall(self) -> str | None:
        """A line about what is stuck, told once; None where nothing is."""
        return self._head.stall()

    def _checkpoint_due(self) -> bool:
        """Whether a checkpoint should be written now; not while a learner starts."""
        if any(child.starting is not None for child in self._children.of("learner")):
            return False
        return self._head.checkpoint_due(time.monotonic())

    def _to_evaluate(self) -> tuple[int, Weights]:
        """The step and the weights of an evaluation that begins now."""
        return self._head.step, self._weights.newest

    # ------------------------------------------------- calls from other processes

    def publish(self, version: int, data: bytes) -> None:
        """The learner's new weights. They are put into the object store by the head, which outlives the learner."""
        self._weights.publish(version, data)

    def policy(self, have: int) -> tuple[int, Any] | None:
        """As `PublishedWeights.policy`."""
        return self._weights.policy(have)

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
                self._start()
        self._is_started = True
        self._keep()
        return self._finish(self._stop_reason or self._supervise())

    def _remove_addresses(self) -> None:
        (self._folder.path / ADDRESSES).unlink(missing_ok=True)

    def _end_processes(self) -> None:
        self._children.close()
        end_processes(but={HEAD_NAME})  # of a head that died meanwhile

    def _supervise(self) -> str:
        period = self._config.report_every_s
        due = time.monotonic()
        while True:
            # Sooner than the next row where a stop or an evaluation comes sooner.
            due = max(due + min(period, self._head.seconds_to_due()), time.monotonic() + SHORTEST_S)
            self._wake.wait(max(0.0, due - time.monotonic()))
            self._collect()
            self._tick()
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
            again = evaluations.unsaved_best is not None and time.monotonic() - self._tried_at > RETRY_S
            if (again or self._checkpoint_due()) and not self._children.silent(0.0):
                self._checkpoint()

    def _finish(self, reason: str) -> dict[str, Any]:
        head = self._head
        self._finishing, self._stop_reason = True, reason
        self._keep()
        # Actors first: one that waits for room in the replay needs the learner to go on.
        for child in self._children.of("actor"):
            if child.starting is not None:
                self._children.lost.add(child.name)
                ray.kill(child.worker)
        self._children.ask_all("actor", "stop", STOP_S, timeout_s=STOP_S + 5.0)
        self._stop_learners()
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

    def _stop_learners(self) -> None:
        """Stop the learners, once they have started where they still do; the counts are final then."""
        self._collect()
        starting = [child.starting for child in self._children.of("learner") if child.starting is not None]
        if starting and (self._weights.newest.version or not self._stop_asked):
            ray.wait(starting, num_returns=len(starting), timeout=START_S)
            self._collect()
        if not self._children.silent(SILENT_S):
            self._children.ask_all("learner", "stop", 3 * STOP_S, timeout_s=3 * STOP_S + 5.0)
        self._collect()
        self._tick()

    # --------------------------------------------------------------- processes

    def _tell_addresses(self) -> None:
        """For `millrace replay`, and whoever else wants to look into the service of a run."""
        with suppress(OSError):  # a full disk costs them that
            write_json(self._folder.path / ADDRESSES, {"addresses": self._addresses})

    def _spawn_learners(self) -> None:
        gpus = gpus_of_a_learner(self._config, tell=self._recorder.event)
        incarnation = self._incarnation()  # one for all: they draw the same numbers
        self._next_warning = 0
        for rank in range(self._config.learners.count):
            self._make_learner(rank, name=_learner(rank), gpus=gpus, incarnation=incarnation)

    def _start_learners(self, checkpoint: Path | None, version: int) -> None:
        """Have the learners begin, together: those of a group wait for each other where learner 0 tells.

        One that has begun already tells once more how.
        """
        learners = [self._children[_learner(rank)] for rank in range(self._config.learners.count)]
        self._learner_start = None if checkpoint is None else str(checkpoint), version
        # Not waited for: Ray hands the answer to the others once it is there.
        rendezvous = learners[0].worker.rendezvous.remote() if len(learners) > 1 else None
        for child in learners:
            child.starting = child.worker.start.remote(self._addresses, *self._learner_start, rendezvous)

    def _restart_learners(self, failed: Sequence[tuple[Child, str]]) -> None:
        """Put new learners in the place of all, where one is dead or failed: they must go on from the same parameters."""
        self._head.counts.restarts += 1
        # One that died explains why others, left alone, failed.
        child, why = next((found for found in failed if found[1] == "died"), failed[0])
        count = self._config.learners.count
        self._children.clear_for_restart(child, why)
        for rank in range(count):
            other = self._children[_learner(rank)]
            if other is not child:
                other.end()
        checkpoint = self._latest()
        before = self._head.counts.updates
        self._spawn_learners()
        version = self._highest_version() + 1
        self._start_learners(None if checkpoint is None else checkpoint.path / LEARNER, version)
        self._head.rebase("learner", {})
        back = 0 if checkpoint is None else checkpoint.updates
        lost = max(0, before - back)
        self._head.counts.updates_lost += lost
        new = "a new one goes on" if count == 1 else f"{count} new learners go on"
        self._recorder.event("restart", f"{child.name} {why}; {new} from update {back}, {lost} updates are lost")
        self._keep()

    def _incarnation(self) -> int:
        """Tells every process that this run ever starts from every other, for their seeds."""
        self._born += 1
        return (self._head.counts.incarnation << 20) + self._born - 1

    def _restart(self, child: Child, why: str) -> None:
        """Put a new process in the place of a dead or failed shard or actor."""
        name = child.name
        if self._finishing and child.kind == "actor":
            self._children.lost.add(name)
            self._recorder.event("warning", f"{name} {why} while the run was ending")
            return
        self._children.clear_for_restart(child, why)
        self._head.counts.restarts += 1
        told = self._replace(child)
        self._recorder.event("restart", f"{name} {why}; {told}")
        self._keep()

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
            "addresses": self._addresses,
            "ports": self._ports,
            "learner_start": self._learner_start,
            "next_warning": self._next_warning,
            "first_step": None if first_step is None else first_step - time.monotonic() + time.time(),
            "is_checkpointing": self._is_checkpointing,
        }
        self._state_file.write(state | self._evaluations.state() | self._more_state())

    def _come_back(self, kept: Mapping[str, Any]) -> None:
        """Take over the processes of the head that died, and all that it knew; those that are gone are found by the first look."""
        self._stop_asked = self._stop_asked or kept["stop_asked"]
        self._stop_reason = kept["stop_reason"]
        self._finishing = self._stop_reason is not None
        self._addresses, self._ports = kept["addresses"], kept["ports"]
        self._next_warning = kept["next_warning"]
        if kept["first_step"] is not None:
            self._first_step_told = True
            self._first_step = time.monotonic() - (time.time() - kept["first_step"])
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
        for child in starting:
            if child.kind == "actor":
                self._start_actor(child.index)
        learners = self._children.of("learner")
        if all(child.worker for child in learners):
            if any(child.kind == "learner" for child in starting):
                checkpoint, version = kept["learner_start"]
                self._start_learners(None if checkpoint is None else Path(checkpoint), version)
            else:
                self._fetch_weights()
        self._learner_start = self._learner_start or kept["learner_start"]
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
            failed = self._children.look(self._arguments())
        finally:  # what the learner warned of may explain why it failed
            self._tell_warnings()
        for child, why in failed:
            if child.kind != "learner":
                self._restart(child, why)
        if learners := [(child, why) for child, why in failed if child.kind == "learner"]:
            self._restart_learners(learners)

    def _tell_warnings(self) -> None:
        """Tell of what learner 0 has warned of since; the others of a group see the same."""
        status = self._children["learner"].status if "learner" in self._children else {}
        # A status that came late is looked at again.
        if status.get("next_warning", 0) > self._next_warning:
            self._next_warning = status["next_warning"]
            for line in status["warnings"]:
                self._recorder.event("warning", f"learner: {line}")

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
        """Write a checkpoint, or a line that says why there is none. Returns whether every process did its part.

        It holds the best policy where that is in no checkpoint yet, else the newest.
        """
        self._tried_at = time.monotonic()
        if silent := self._children.silent(SILENT_S):
            self._recorder.event("warning", f"no checkpoint was written: no answer from {', '.join(silent)}")
            return False
        if any(child.starting is not None or child.status.get("error") for child in self._children.of("learner")):
            self._recorder.event("warning", "no checkpoint was written: the learner was not running")
            return False
        if not self._weights.newest.version:
            self._fetch_weights()
        evaluation, policy = self._evaluations.unsaved_best or (self._head.evaluation_now, self._weights.newest.data)
        if not policy:
            self._recorder.event("warning", "no checkpoint was written: the learner has published no weights yet")
            return False
        self._is_checkpointing = True
        self._keep()
        try:
            written = self._recorder.checkpoint(
                save_learner=self._save_learner,
                save_shards=self._save_shards,
                policy=policy,
                evaluation=evaluation,
                save_more=self._save_more,
            )
        except ray.exceptions.RayError as error:
            # A process died meanwhile: the next look at it starts it again, and what was written is gone.
            self._recorder.event("warning", f"no checkpoint was written: {short(error)}")
            return False
        finally:
            self._is_checkpointing = False
        if written:
            self._evaluations.saved()
        self._keep()
        return True


def _learner(rank: int) -> str:
    """Name of a learner; the first, which there always is, needs no number."""
    return f"learner {rank}" if rank else "learner"
