"""What the head of any run does under Ray: watches the other processes, starts them again, and keeps the books.

One thread runs the control loop; calls from actors, the learner and the driver are answered beside it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import ray

from cluster.books import SILENT_S, Books, Measured
from cluster.checkpoint import Checkpoint, Checkpoints, read_manifest
from cluster.files import read_json, write_json
from cluster.ray_children import START_S, Child, Children, RunError, gpus_of_a_learner, saved, short
from cluster.recorder import HEAD, LEARNER, Recorder
from cluster.runs import ADDRESSES, RunFolder

SHORTEST_S = 0.05  # between two looks at all processes
RETRY_S = 30.0  # until a checkpoint that could not be written is tried again
EVALUATE_S = 1800.0  # the longest that the end of a run waits for an evaluation
STOP_S = 10.0  # how long an actor may take to stop, a learner thrice that
LINGER_S = 60.0  # how long the head of an ended run waits for a driver to ask how it ended

log = logging.getLogger(__name__)


def resumed_at(wall_started: float, resume: Path | None) -> tuple[float, dict[str, Any] | None]:
    """What `Books` begins with: the monotonic time of the epoch second `wall_started`, and the state in a checkpoint."""
    return time.monotonic() - (time.time() - wall_started), None if resume is None else read_json(resume / HEAD)


class RunHead(ABC):
    """What the heads of all kinds of runs have in common; a subclass is the named detached Ray actor.

    A subclass makes its own fields after those of this class, and then calls `_begin`, which starts the control loop. What
    it fills in are the abstract methods; `_arguments`, `_start_learners`, `_save_learner`, `_save_shards`, `_save_more`,
    `_stall`, `_checkpoint_due` and `_to_evaluate` have a body that it may replace.
    """

    FIRST: ClassVar[str]  # what actors do first, as the event of it says: "environment step"

    def __init__(self, folder: RunFolder[Any], head: Books, wall_started: float, resume: Path | None) -> None:
        """
        folder: of the run; the node of the head must reach it.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        """
        self._folder = folder
        self._config = folder.config
        self._security = folder.security()
        self._resume = resume
        self._wall_started = wall_started
        self._head = head
        resumed = None if resume is None else read_manifest(resume)
        self._recorder = Recorder(folder, head, show=self._show, resume=resumed)
        self._self = ray.get_runtime_context().current_actor
        self._born = itertools.count()
        self._children = Children(ray.get_runtime_context().namespace, tell=self._recorder.event)
        self._addresses: list[str] = []  # of the shards
        self._ports: list[int] = []
        self._weights: tuple[int, bytes, Any] = (0, b"", None)
        self._weights_lock = threading.Lock()
        self._unsaved_best: tuple[float, bytes] | None = None  # score and policy
        self._tried_at = 0.0  # to write a checkpoint; monotonic
        self._evaluation: tuple[Any, int, int, bytes] | None = None  # answer, step, version, weights
        self._is_second_try = False  # of the evaluation
        self._next_warning = 0  # of learner 0
        self._first_step_told = False
        self._first_step: float | None = None  # monotonic
        self._finishing = False
        self._shown: deque[tuple[dict[str, float] | None, str | None]] = deque()
        self._shown_before = 0  # shown earlier, and let go of
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

    def _stall(self) -> str | None:
        """A line about what is stuck, told once; None where nothing is."""
        return self._head.stall()

    def _checkpoint_due(self) -> bool:
        """Whether a checkpoint should be written now."""
        return self._head.checkpoint_due(time.monotonic())

    def _to_evaluate(self) -> tuple[int, tuple[int, bytes, Any]]:
        """The step and the weights (version, data, reference) of an evaluation that begins now."""
        return self._head.step, self._weights

    # ------------------------------------------------- calls from other processes

    def publish(self, version: int, data: bytes) -> None:
        """The learner's new weights. They are put into the object store by the head, which outlives the learner."""
        reference = ray.put(data)
        with self._weights_lock:
            if version > self._weights[0]:
                self._weights = (version, data, reference)

    def policy(self, have: int) -> tuple[int, Any] | None:
        """Newest (version, reference to its weights), or None where `have` is the newest."""
        version, _, reference = self._weights
        return None if version <= have else (version, reference)

    def status(self, after: int) -> dict[str, Any]:
        """What was shown from index `after` on as (row, line), and how the run ended once it has.

        What lies before `after` has arrived and is let go of.
        """
        shown = self._shown
        while self._shown_before < after and shown:
            shown.popleft()
            self._shown_before += 1
        return {"shown": list(shown), "outcome": self._outcome}

    def stop(self, reason: str) -> None:
        """End the run with a checkpoint."""
        self._stop_asked = self._stop_asked or reason
        self._wake.set()

    def _show(self, row: dict[str, float] | None, line: str | None) -> None:
        self._shown.append((row, line))

    # ------------------------------------------------------------- control loop

    def _control(self) -> None:
        try:
            self._start()
            reason = self._supervise()
            summary = self._finish(reason)
            outcome: dict[str, Any] = {"summary": summary}
        except BaseException as error:
            log.exception("the run failed")
            text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            outcome = {"error": text}
            self._recorder.event("error", text)
        finally:
            (self._folder.path / ADDRESSES).unlink(missing_ok=True)
            for part in (self._recorder, self._children):
                try:
                    part.close()
                except Exception:  # the driver waits for the outcome all the same
                    log.exception("the run was not cleaned up")
        self._outcome = outcome
        # Where the driver has died, nobody else would end this process.
        time.sleep(LINGER_S)
        ray.kill(self._self)

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
            reason = self._stop_asked or self._head.stop_reason()
            if reason is not None:
                return reason
            if self._evaluation is None and self._weights[0] and self._head.evaluation_due():
                self._begin_evaluation()
            # Not while somebody does not answer: the checkpoint would wait for it, and nobody tell of the stall.
            again = self._unsaved_best is not None and time.monotonic() - self._tried_at > RETRY_S
            if (again or self._checkpoint_due()) and not self._children.silent(0.0):
                self._checkpoint()

    def _finish(self, reason: str) -> dict[str, Any]:
        head = self._head
        self._finishing = True
        # Actors first: one that waits for room in the replay needs the learner to go on.
        for child in self._children.of("actor"):
            if child.starting is not None:
                self._children.lost.add(child.name)
                ray.kill(child.worker)
        self._children.ask_all("actor", "stop", STOP_S, timeout_s=STOP_S + 5.0)
        self._stop_learners()
        if not self._stop_asked:  # who asks to stop has no time for it
            self._await_evaluation()
        if head.final_evaluation_due and self._weights[0] and self._evaluation is None:
            self._begin_evaluation()
            self._await_evaluation()
        if self._stop_asked and not self._weights[0]:
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
        while self._evaluation is not None:
            if not ray.wait([self._evaluation[0]], timeout=max(0.0, deadline - time.monotonic()))[0]:
                text = f"the last evaluation took longer than {EVALUATE_S:g} s and is left out"
                self._recorder.event("warning", text)
                return
            self._follow_evaluation()
            self._tick()  # a row holds one evaluation, and there may be another one to come

    def _stop_learners(self) -> None:
        """Stop the learners, once they have started where they still do; the counts are final then."""
        self._collect()
        starting = [child.starting for child in self._children.of("learner") if child.starting is not None]
        if starting and (self._weights[0] or not self._stop_asked):
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
        """Have the learners begin, together: those of a group wait for each other where learner 0 tells."""
        learners = [self._children[_learner(rank)] for rank in range(self._config.learners.count)]
        # Not waited for: Ray hands the answer to the others once it is there.
        rendezvous = learners[0].worker.rendezvous.remote() if len(learners) > 1 else None
        for child in learners:
            child.starting = child.worker.start.remote(
                self._addresses, None if checkpoint is None else str(checkpoint), version, rendezvous
            )

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
                ray.kill(other.worker)
        checkpoint = self._latest()
        before = self._head.counts.updates
        self._spawn_learners()
        version = max(self._head.counts.version, self._weights[0]) + 1
        self._start_learners(None if checkpoint is None else checkpoint.path / LEARNER, version)
        self._head.rebase("learner", {})
        back = 0 if checkpoint is None else checkpoint.updates
        lost = max(0, before - back)
        self._head.counts.updates_lost += lost
        new = "a new one goes on" if count == 1 else f"{count} new learners go on"
        self._recorder.event("restart", f"{child.name} {why}; {new} from update {back}, {lost} updates are lost")

    def _incarnation(self) -> int:
        """Tells every process that this run ever starts from every other, for their seeds."""
        return (self._head.counts.incarnation << 20) + next(self._born)

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

    def _latest(self) -> Checkpoint | None:
        return Checkpoints(self._folder.checkpoints, keep=self._config.checkpoints.keep).latest()

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
        # Actors may act with weights that the learner's last status does not know of.
        self._head.counts.version = max(self._head.counts.version, self._weights[0])
        return {
            "time": time.monotonic(),
            "actors": actors,
            "shards": self._children.statuses("shard"),
            "learner": learner,
            "learner_metrics": learner.get("metrics", {}),
            "evaluating": self._evaluation is not None,
            "ending": self._finishing,
            "first_step": self._first_step,
        }

    # ---------------------------------------------------- evaluation, checkpoint

    def _begin_evaluation(self) -> None:
        step, (version, data, reference) = self._to_evaluate()
        self._evaluation = (self._ask_evaluation(reference), step, version, data)

    def _follow_evaluation(self) -> None:
        """Take in an evaluation that has ended."""
        if self._evaluation is None:
            return
        answer, step, version, data = self._evaluation
        if not ray.wait([answer], timeout=0.0)[0]:
            return
        self._evaluation = None
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError as error:
            again = isinstance(error, ray.exceptions.RayActorError) and not self._is_second_try
            ending = "; it is begun again" if again else ""
            self._recorder.event("warning", f"the evaluation at step {step} failed: {short(error)}{ending}")
            self._children.kill("evaluator")
            self._is_second_try = again
            if again:
                self._evaluation = (self._ask_evaluation(ray.put(data)), step, version, data)
            return
        self._is_second_try = False
        evaluation = self._evaluation_of(found, step, version)
        best = self._head.evaluated(evaluation)
        self._recorder.event("evaluation", evaluation.text)
        if best:
            self._unsaved_best = (evaluation.score, data)
            self._checkpoint()

    def _checkpoint(self) -> bool:
        """Write a checkpoint, or a line that says why there is none. Returns whether every process did its part.

        It holds the best policy where that is in no checkpoint yet, else the newest.
        """
        self._tried_at = time.monotonic()
        evaluation, policy = self._unsaved_best or (self._head.evaluation_now, self._weights[1])
        if silent := self._children.silent(SILENT_S):
            self._recorder.event("warning", f"no checkpoint was written: no answer from {', '.join(silent)}")
            return False
        if any(child.starting is not None or child.status.get("error") for child in self._children.of("learner")):
            self._recorder.event("warning", "no checkpoint was written: the learner was not running")
            return False
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
        if written:
            self._unsaved_best = None
        return True


def _learner(rank: int) -> str:
    """Name of a learner; the first, which there always is, needs no number."""
    return f"learner {rank}" if rank else "learner"
