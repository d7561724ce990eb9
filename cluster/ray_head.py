"""The head of a run under Ray: starts the other processes, watches them, starts them again, and keeps the books.

One thread runs the control loop; calls from actors, the learner and the driver are answered beside it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from cluster import parts
from cluster.checkpoint import Checkpoint, Checkpoints, read_manifest
from cluster.files import read_json, write_json
from cluster.head import SILENT_S, Evaluation, Head, Tick
from cluster.ray_children import ANSWER_S, START_S, Child, Children, RunError, short
from cluster.ray_workers import ActorWorker, EvaluatorWorker, LearnerWorker, ShardWorker
from cluster.recorder import HEAD, LEARNER, Recorder, replay_folder
from cluster.runs import ADDRESSES, RunFolder

SHORTEST_S = 0.05  # between two looks at all processes
RETRY_S = 30.0  # until a checkpoint that could not be written is tried again
EVALUATE_S = 1800.0  # the longest that the end of a run waits for an evaluation
STOP_S = 10.0  # how long an actor may take to stop, a learner thrice that
SAVE_S = 600.0  # the longest that a process may take to write its part of a checkpoint
LINGER_S = 60.0  # how long the head of an ended run waits for a driver to ask how it ended

log = logging.getLogger(__name__)


@ray.remote
class HeadWorker:
    """The head, as a named detached Ray actor."""

    def __init__(self, folder: str, schema: str, wall_started: float, resume: str | None) -> None:
        """
        folder: of the run; the node of the head must reach it.
        schema: StepSchema as JSON.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        """
        self._folder = RunFolder.open(Path(folder))
        self._config = self._folder.config
        self._security = self._folder.security()
        self._schema = schema
        self._resume = None if resume is None else Path(resume)
        self._wall_started = wall_started
        started = time.monotonic() - (time.time() - wall_started)
        state = None if self._resume is None else read_json(self._resume / HEAD)
        self._head = Head(self._config, wall_started=started, state=state)
        resumed = None if self._resume is None else read_manifest(self._resume)
        self._recorder = Recorder(self._folder, self._head, show=self._show, resume=resumed)
        self._self = ray.get_runtime_context().current_actor
        self._born = itertools.count()
        self._children = Children(ray.get_runtime_context().namespace, tell=self._recorder.event)
        self._addresses: list[str] = []
        self._ports: list[int] = []
        self._weights: tuple[int, bytes, Any] = (0, b"", None)
        self._weights_lock = threading.Lock()
        self._unsaved_best: tuple[float, bytes] | None = None  # mean return and policy
        self._tried_at = 0.0  # to write a checkpoint; monotonic
        self._evaluation: tuple[Any, int, int, bytes] | None = None  # answer, step, version, weights
        self._told_extent: tuple[float, float] | None = None  # of returns, to learner 0, which tells the others
        self._next_episode: dict[str, int] = {}
        self._next_warning = 0  # of learner 0
        self._first_step_told = False
        self._first_step: float | None = None  # monotonic
        self._finishing = False
        self._shown: deque[tuple[dict[str, float] | None, str | None]] = deque()
        self._shown_before = 0  # shown earlier, and let go of
        self._stop_asked: str | None = None
        self._wake = threading.Event()
        self._outcome: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._control, name="control", daemon=True)
        self._thread.start()

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
            if (stall := self._head.stall()) is not None:
                self._recorder.event("warning", stall)
            self._follow_evaluation()
            reason = self._stop_asked or self._head.stop_reason()
            if reason is not None:
                return reason
            if self._evaluation is None and self._weights[0] and self._head.evaluation_due():
                self._begin_evaluation()
            # Not while somebody does not answer: the checkpoint would wait for it, and nobody tell of the stall.
            again = self._unsaved_best is not None and time.monotonic() - self._tried_at > RETRY_S
            due_now = again or self._head.checkpoint_due(time.monotonic())
            if due_now and not self._children.silent(0.0):
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
        if self._evaluation is not None:
            ray.wait([self._evaluation[0]], timeout=EVALUATE_S)
            self._follow_evaluation()
            if self._evaluation is not None:
                self._recorder.event(
                    "warning", f"the last evaluation took longer than {EVALUATE_S:g} s and is left out"
                )

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

    def _start(self) -> None:
        """Start everything: all processes at once, for most of the time goes into their imports."""
        config, counts = self._config, self._head.counts
        for index in range(config.replay.shards):
            self._spawn_shard(index)
        for index in range(config.actors.count):
            self._spawn_actor(index)
        self._spawn_learners()
        self._addresses = [""] * config.replay.shards
        self._ports = [0] * config.replay.shards
        kept = self._resume if config.checkpoints.replay else None
        for index in range(config.replay.shards):
            self._start_shard(index, kept)
        if self._resume is not None:
            self._resume_limiter()
        self._tell_addresses()
        for index in range(config.actors.count):
            child = self._children[f"actor {index}"]
            child.starting = child.worker.start.remote(self._addresses)
        version = max(counts.version + 1, parts.FIRST_VERSION)
        self._start_learners(None if self._resume is None else self._resume / LEARNER, version)

    def _spawn_shard(self, index: int) -> None:
        self._children.make(
            f"shard {index}",
            ShardWorker,
            self._config,
            self._schema,
            index,
            self._folder.path.name,
            self._incarnation(),
            self._security,
            cpus=0.0,
        )

    def _start_shard(
        self,
        index: int,
        checkpoint: Path | None,
        *,
        recover: bool = False,
        others: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Have a shard serve, with the steps of a checkpoint unless it recovers those of the one before; see its `start`."""
        name = f"shard {index}"
        child = self._children[name]
        limiter = None if index == 0 else self._addresses[0]
        replay = None if checkpoint is None else str(replay_folder(checkpoint))
        started = child.worker.start.remote(limiter, self._ports[index], replay, recover, others)
        answer: dict[str, Any] = self._children.answer(name, started)
        self._addresses[index], self._ports[index] = answer["address"], answer["port"]
        child.status = answer["status"]
        self._children.started(name, answer["process"])
        if answer["recovered"]:
            self._head.recovered(name, child.status)
        else:
            self._head.rebase(name, child.status)
        return answer

    def _tell_addresses(self) -> None:
        """For `millrace replay`, and whoever else wants to look into the service of a run."""
        with suppress(OSError):  # a full disk costs them that
            write_json(self._folder.path / ADDRESSES, {"addresses": self._addresses})

    def _resume_limiter(self) -> None:
        """Set the limiter of a run that goes on, before anybody inserts or samples."""
        counts = self._head.counts
        counts.sampled = parts.samples_used(self._config, counts)
        items = sum(int(child.status["items"]) for child in self._children.of("shard"))
        counters = parts.limiter_counters(self._config, inserted=counts.env_steps, sampled=counts.sampled, items=items)
        self._children.answer("shard 0", self._children["shard 0"].worker.restore_limiter.remote(counters))

    def _other_shards(self) -> list[dict[str, Any]]:
        """Newest status of all shards but the first, from those that answer now."""
        others = [child for child in self._children.of("shard") if child.index != 0]
        answers = [child.worker.status.remote() for child in others]
        ray.wait(answers, num_returns=len(answers), timeout=ANSWER_S) if answers else None
        found = []
        for child, answer in zip(others, answers, strict=True):
            try:
                found.append(ray.get(answer, timeout=0.0))
            except (ray.exceptions.RayError, TimeoutError):
                found.append({"inserted": 0, "sampled": 0, "items": 0, **child.status})
        return found

    def _restart_shard(self, child: Child) -> str:
        """Put a new shard in the place of a dead one. Returns what became of its steps."""
        checkpoint = self._latest() if self._config.checkpoints.replay else None
        before = int(child.status.get("items", 0))
        others = self._other_shards() if child.index == 0 else None
        self._spawn_shard(child.index)
        usable = checkpoint is not None and replay_folder(checkpoint.path).is_dir()
        path = checkpoint.path if checkpoint is not None and usable else None
        answer = self._start_shard(child.index, path, recover=True, others=others)
        self._tell_addresses()
        kept = int(answer["status"]["items"])
        if answer["recovered"]:
            return f"a new one serves all its {kept} steps"
        if child.index != 0:
            # Not waited for: where shard 0 is dead as well, its successor's limiter is set from the shards' counters.
            self._children["shard 0"].worker.lost.remote(max(0, before - kept))
        why = f"its storage is damaged ({answer['damage']})" if answer["damage"] else "its storage is gone"
        return f"{why}; a new one serves {kept} of its {before} steps" + (", from the last checkpoint" if path else "")

    def _spawn_actor(self, index: int) -> None:
        self._next_episode[f"actor {index}"] = 0
        incarnation = self._incarnation()
        child = self._children.make(
            f"actor {index}",
            ActorWorker,
            self._config,
            self._schema,
            index,
            self._self,
            self._head.random_steps_left,
            incarnation,
            self._security,
            cpus=self._config.actors.cpus,
        )
        child.writer = parts.writer_name(index, incarnation)

    def _spawn_learners(self) -> None:
        settings = self._config.learners
        gpus = self._gpus_of_a_learner()
        incarnation = self._incarnation()  # one for all: they draw the same numbers
        self._next_warning = 0
        for rank in range(settings.count):
            self._children.make(
                _learner(rank),
                LearnerWorker,
                self._config,
                self._schema,
                rank,
                self._self,
                incarnation,
                self._security,
                cpus=settings.cpus,
                gpus=gpus,
            )

    def _gpus_of_a_learner(self) -> float:
        settings = self._config.learners
        if settings.gpus is not None:
            return settings.gpus
        there = ray.cluster_resources().get("GPU", 0.0) if settings.device != "cpu" else 0.0
        if there >= settings.count:
            return 1.0
        if there and settings.count > 1:
            if settings.device != "auto":
                raise RunError(
                    f"learners.device {settings.device} needs a GPU for each of learners.count ({settings.count}) learners, and "
                    f"the cluster has {there:g}; lower learners.count"
                )
            self._recorder.event(
                "warning", f"the learners use CPUs: {settings.count} of them need as many GPUs, and there are {there:g}"
            )
            return 0.0
        return there

    def _start_learners(self, checkpoint: Path | None, version: int) -> None:
        """Have the learners begin, together: those of a group wait for each other where learner 0 tells."""
        learners = [self._children[_learner(rank)] for rank in range(self._config.learners.count)]
        # Not waited for: Ray hands the answer to the others once it is there.
        rendezvous = learners[0].worker.rendezvous.remote() if len(learners) > 1 else None
        for child in learners:
            child.starting = child.worker.start.remote(
                self._addresses, None if checkpoint is None else str(checkpoint), version, rendezvous
            )
        self._told_extent = None

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
        if child.kind == "actor":
            for shard in parts.shards_of_actor(self._config, child.index):
                self._children[f"shard {shard}"].worker.end_writer.remote(child.writer)
            self._spawn_actor(child.index)
            self._head.rebase(name, {})
            fresh = self._children[name]
            fresh.starting = fresh.worker.start.remote(self._addresses)
            told = "a new one takes its place"
        else:
            told = self._restart_shard(child)
        self._recorder.event("restart", f"{name} {why}; {told}")

    def _latest(self) -> Checkpoint | None:
        return Checkpoints(self._folder.checkpoints, keep=self._config.checkpoints.keep).latest()

    # ----------------------------------------------------------------- watching

    def _collect(self) -> None:
        """Take in every process's status, and start the dead ones again."""
        after = {name: (index,) for name, index in self._next_episode.items()}
        try:
            failed = self._children.look({**after, "learner": (self._next_warning,)})
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

    def _tick(self) -> None:
        actors = self._children.statuses("actor")
        returns: list[float] = []
        lengths: list[int] = []
        for name, status in actors.items():
            # A status that came late is looked at again: its episodes were counted then.
            if status["next_episode"] > self._next_episode[name]:
                returns += status["returns"]
                lengths += status["lengths"]
                self._next_episode[name] = status["next_episode"]
            if not self._first_step_told and status["first_step_at"]:
                self._first_step_told = True
                self._first_step = time.monotonic() - (time.time() - status["first_step_at"])
                seconds = status["first_step_at"] - self._wall_started
                self._recorder.event("start", f"first environment step {seconds:.1f} s after the command")
        learner = self._children.statuses("learner").get("learner", {})
        # Actors may act with weights that the learner's last status does not know of.
        self._head.counts.version = max(self._head.counts.version, self._weights[0])
        tick = Tick(
            time=time.monotonic(),
            actors=actors,
            shards=self._children.statuses("shard"),
            learner=learner,
            learner_metrics=learner.get("metrics", {}),
            returns=returns,
            lengths=lengths,
            evaluating=self._evaluation is not None,
            ending=self._finishing,
            first_step=self._first_step,
        )
        self._recorder.row(self._head.tick(tick))
        extent = self._head.return_extent
        if learner and extent is not None and extent != self._told_extent:
            self._told_extent = extent
            self._children["learner"].worker.observe_returns.remote(*extent)

    # ---------------------------------------------------- evaluation, checkpoint

    def _begin_evaluation(self) -> None:
        if "evaluator" not in self._children:
            self._children.make("evaluator", EvaluatorWorker, self._config, self._schema, cpus=0.0)
        version, data, reference = self._weights
        evaluator = self._children["evaluator"]
        self._evaluation = (evaluator.worker.evaluate.remote(reference), self._head.counts.env_steps, version, data)

    def _follow_evaluation(self) -> None:
        """Take in an evaluation that has ended."""
        if self._evaluation is None:
            return
        answer, step, version, data = self._evaluation
        if not ray.wait([answer], timeout=0.0)[0]:
            return
        self._evaluation = None
        try:
            returns, seconds = ray.get(answer)
        except ray.exceptions.RayError as error:
            self._recorder.event("warning", f"the evaluation at step {step} failed: {short(error)}")
            self._children.kill("evaluator")
            return
        evaluation = Evaluation(step, version, tuple(returns), seconds)
        best = self._head.evaluated(evaluation)
        self._recorder.event("evaluation", evaluation.text)
        if best:
            self._unsaved_best = (evaluation.mean, data)
            self._checkpoint()

    def _checkpoint(self) -> bool:
        """Write a checkpoint, or a line that says why there is none. Returns whether every process did its part.

        It holds the best policy where that is in no checkpoint yet, else the newest.
        """
        self._tried_at = time.monotonic()
        evaluation, policy = self._unsaved_best or (self._head.evaluation_now, self._weights[1])
        shards = [self._children[f"shard {index}"] for index in range(self._config.replay.shards)]
        learner = self._children["learner"]
        if silent := self._children.silent(SILENT_S):
            self._recorder.event("warning", f"no checkpoint was written: no answer from {', '.join(silent)}")
            return False
        if any(child.starting is not None or child.status.get("error") for child in self._children.of("learner")):
            self._recorder.event("warning", "no checkpoint was written: the learner was not running")
            return False
        try:
            written = self._recorder.checkpoint(
                save_learner=lambda path: _saved(learner.worker.save.remote(str(path))),
                save_shards=lambda path, before: _saved_by(shards, path, before),
                policy=policy,
                evaluation=evaluation,
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


def _saved_by(shards: Sequence[Child], replay: Path, before: Path | None) -> list[dict[str, int]]:
    """Have all shards write their steps at once. Returns their counters; raises what `_saved` does."""
    previous = None if before is None else str(before)
    return [_saved(answer) for answer in [shard.worker.save.remote(str(replay), previous) for shard in shards]]


def _saved(answer: Any) -> Any:
    """What a process that wrote a file answers; an OSError there is one here, so that a full disk is known as one."""
    try:
        return ray.get(answer, timeout=SAVE_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise OSError(error.cause.errno, str(error.cause)) from error
        raise
