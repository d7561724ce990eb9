"""The head of a language-model run under Ray: what `RunHead` does, with the desk that hands out prompts."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import ray

from actors.assignments import Outcome
from cluster.books import STALL_S
from cluster.head_state import read_head_state
from cluster.llm import parts
from cluster.llm.audits import audits
from cluster.llm.desk import PromptDesk
from cluster.llm.examples import ExampleFile
from cluster.llm.head import LlmEvaluation, LlmHead, LlmTick
from cluster.ray_children import Child, saved
from cluster.ray_desk import Answer, HeadDesk, answers
from cluster.ray_files import FILES_GROUP
from cluster.ray_head import RunHead, resumed_at
from cluster.ray_llm_workers import LlmEvaluatorWorker, LlmLearnerWorker, QueueShardWorker, SamplerWorker
from cluster.ray_relay import Request
from cluster.ray_weights import Weights
from cluster.recorder import LEARNER, replay_folder
from cluster.runs import RunFolder

STEPS_KEPT = 256  # versions whose learner steps are remembered; evaluations are of the newest


@ray.remote(concurrency_groups=FILES_GROUP)
class LlmHeadWorker(RunHead):
    """The head of a language-model run, as a named detached Ray actor."""

    FIRST: ClassVar[str] = "completion"
    _head: LlmHead

    def __init__(self, folder: str, wall_started: float, resume: str | None) -> None:
        """
        folder: of the run; the node of the head must reach it.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        """
        opened = RunFolder.open(Path(folder))
        path = None if resume is None else Path(resume)
        kept = read_head_state(opened.path, wall_started)
        started, state = resumed_at(wall_started, path, kept)
        head = LlmHead(opened.config, wall_started=started, state=state)
        super().__init__(opened, head, wall_started, path, kept, hold_back=opened.config.actors.hold_back)
        self._desk: HeadDesk[PromptDesk] = HeadDesk(self._folder.path, tell=self._recorder.event)
        self._examples = ExampleFile(self._folder.path)
        self._readers: dict[str, str] = {}  # learner → name under which the present one reads
        self._steps: deque[tuple[int, int]] = deque(
            maxlen=STEPS_KEPT
        )  # versions published, and the learner steps made then
        self._first: tuple[int, Weights] | None = None  # step and weights that are to be evaluated first
        self._said: deque[str] = deque()  # by the learner while it starts
        self._said_at = -math.inf  # monotonic
        self._replaced: dict[
            str, tuple[str, int]
        ] = {}  # shards that start in the place of another: why, groups that waited
        self._holds = 0  # checkpoints tried: a number for each
        self._gpus = 0.0  # set aside for learners
        self._has_checkpoint = path is not None
        if kept is not None and kept["is_started"]:
            # Here, for the learner may publish at once.
            self._steps.extend((version, step) for version, step in kept["steps"])
        self._begin()

    # ------------------------------------------------- calls from other processes

    def exchange(
        self, actor: str, incarnation: int, first: int, outcomes: Sequence[Outcome], want: int, held: int
    ) -> Answer | None:
        """As `HeadDesk.exchange`; a run that is ending gives no assignments."""
        return self._desk.exchange(actor, incarnation, first, outcomes, 0 if self._finishing else want, held)

    def exchange_many(self, requests: Sequence[Request]) -> list[Answer | Exception | None]:
        """`exchange` of several actors, which a relay has put together; what one raises is its answer."""
        return answers(self.exchange, requests)

    def publish(self, version: int, data: np.ndarray, step: int = 0) -> None:
        """As `RunHead.publish`; `step` counts the learner steps made by these weights."""
        if version not in dict(self._steps):  # else told again
            self._steps.append((version, step))
        newest = self._weights.publish(version, data)
        self._relays.publish()
        if self._first is None and self._config.eval.every and not self._head.first and len(self._steps) == 1:
            self._first = step, newest

    def tell(self, text: str) -> None:
        """A line about the learner's start."""
        self._said.append(text)
        self._said_at = time.monotonic()

    # --------------------------------------------------------------- processes

    def _start(self) -> None:
        config, counts = self._config, self._head.counts
        self._placement.reserve(config.replay.shards, gpus=self._learners.gpus)
        for index in range(config.replay.shards):
            self._spawn_shard(index)
        self._learners.spawn()
        for index in range(config.actors.count):
            self._spawn_actor(index)
        if config.eval.every:  # the first evaluation is due as soon as there are weights
            self._spawn_evaluator()
        self._desk.open(parts.make_desk(config), self._resume)
        kept = self._resume if config.checkpoints.replay else None
        shards = [self._children[f"shard {index}"] for index in range(config.replay.shards)]
        for child in shards:
            self._ask_start(child, kept)
        for child in shards:
            answer = self._children.answer(child.name, child.starting)
            child.starting = None
            self._children.started(child.name, answer["process"])
            self._started(child, answer)
        version = max(counts.version + 1, parts.FIRST_VERSION)
        self._learners.start(None if self._resume is None else self._resume / LEARNER, version)
        for index in range(config.actors.count):
            self._start_actor(index)
        # While the others start; some verifiers take a second for it.
        for kind, line in audits(config.tasks, parts.tasks_of(config)[0]):
            self._recorder.event(kind, line)

    def _spawn_shard(self, index: int) -> None:
        self._children.make(
            f"shard {index}",
            QueueShardWorker,
            self._config,
            index,
            self._folder.path.name,
            self._security,
            self._mark,
            options=self._placement.shard(index),
        )

    def _ask_start(self, child: Child, checkpoint: Path | None, *, recover: bool = False) -> None:
        replay = None if checkpoint is None else str(replay_folder(checkpoint))
        child.starting = child.worker.start.remote(child.port, replay, recover)

    def _started(self, child: Child, answer: Mapping[str, Any]) -> None:
        super()._started(child, answer)
        if child.kind != "shard":
            return
        moved = bool(child.address) and child.address != answer["address"]
        child.address, child.port, child.status = answer["address"], answer["port"], dict(answer["status"])
        self._tell_addresses()
        if answer["recovered"]:
            self._head.recovered(child.name, child.status)
        else:
            self._head.rebase(child.name, child.status)
        if (before := self._replaced.pop(child.name, None)) is not None:
            why, waited = before
            kept = int(child.status["waiting_groups"])
            gone = f"its storage is gone, with {waited} groups that waited; a new one begins empty"
            told = f"a new one serves all its {kept} groups" if answer["recovered"] else gone
            self._recorder.event("restart", f"{child.name} {why}; {told}")
        if moved:  # to another node: whoever writes to it or reads from it begins anew
            lost = f"lost {child.name}, which is elsewhere now"
            for actor in self._children.of("actor"):
                if actor.worker is not None and actor.leaving is None:
                    self._restart(actor, lost)
            self._learners.restart([(self._children["learner"], lost)])
            self._keep()

    def _spawn_actor(self, index: int) -> None:
        name, incarnation = f"actor {index}", self._incarnation()
        child = self._children.make(
            name,
            SamplerWorker,
            self._config,
            index,
            self._self,
            incarnation,
            self._security,
            options=self._placement.actor(near=self._placement.node_of_shard(index % self._config.replay.shards)),
        )
        self._desk.serve(name, incarnation)
        child.incarnation, child.writer = incarnation, parts.writer_name(index, incarnation)

    def _start_actor(self, index: int) -> None:
        child = self._children[f"actor {index}"]
        child.starting = child.worker.start.remote(list(self._routes().values()))

    def _routes(self) -> dict[int, str]:
        shards = sorted(self._children.of("shard"), key=lambda child: child.index)
        return {child.index: child.address for child in shards if child.address}

    def _make_learner(self, rank: int, *, name: str, options: Mapping[str, Any], incarnation: int) -> None:
        if name in self._readers:  # what a dead one was given goes back at once, not when its lease ends
            for shard in self._children.of("shard"):
                shard.worker.end_reader.remote(self._readers[name])
        else:
            self._gpus += options["num_gpus"]
        self._readers[name] = parts.reader_name(rank, incarnation)
        self._children.make(
            name,
            LlmLearnerWorker,
            self._config,
            rank,
            self._self,
            self._readers[name],
            self._security,
            self._mark,
            options=options,
        )

    def _spawn_evaluator(self) -> None:
        """On a GPU as actors are, where one is left; else it would never start."""
        gpus = self._config.actors.gpus
        taken = self._gpus + self._config.actors.count * gpus
        if gpus > float(ray.cluster_resources().get("GPU", 0.0)) - taken:
            gpus = 0.0
        self._children.make(
            "evaluator", LlmEvaluatorWorker, self._config, gpus, options={"num_cpus": 0, "num_gpus": gpus}
        )

    def _forget_actor(self, child: Child) -> None:
        self._end_actor(child)

    def _end_actor(self, child: Child) -> int:
        """Returns how many groups it had begun."""
        self._relays.detach(child.name)
        shard = self._children[f"shard {child.index % self._config.replay.shards}"]
        if shard.worker is not None:
            shard.worker.end_writer.remote(child.writer)
        return self._desk.forget(child.name)

    def _replace(self, child: Child, why: str) -> str | None:
        if child.kind == "shard":
            self._replaced[child.name] = why, int(child.status.get("waiting_groups", 0))
            self._spawn_shard(child.index)
            # Not from a checkpoint: most of what that holds was learnt from since, and new groups are soon sampled.
            self._ask_start(self._children[child.name], None, recover=True)
            return None
        lost = self._end_actor(child)
        self._spawn_actor(child.index)
        self._head.rebase(child.name, {})
        self._start_actor(child.index)
        return f"a new one takes its place; {lost} groups that it had begun are sampled no further"

    def _more_state(self) -> dict[str, Any]:
        return {
            "readers": self._readers,
            "steps": list(self._steps),
            "holds": self._holds,
            "gpus": self._gpus,
            "has_checkpoint": self._has_checkpoint,
        }

    def _restore_more(self, kept: Mapping[str, Any]) -> None:
        self._readers, self._gpus = dict(kept["readers"]), kept["gpus"]
        self._holds, self._has_checkpoint = kept["holds"], kept["has_checkpoint"]
        if (learner := self._children["learner"]).worker is not None:
            learner.worker.release.remote(self._holds)
        for child in self._children.of("actor"):
            self._desk.serve(child.name, child.incarnation)
        self._desk.recover(parts.make_desk(self._config))

    # ----------------------------------------------------------------- watching

    def _tick(self) -> None:
        while self._said:
            self._recorder.event("start", self._said.popleft())
        self._desk.desk.learnt(self._head.counts.updates)
        self._desk.desk.stale(self._head.counts.dropped_stale_groups)
        for child in self._children.of("actor"):
            self._examples.add(child.status.pop("examples", ()), step=self._head.step)
        self._show_row(self._head.tick(LlmTick(**self._moment(), desk=self._desk.desk.metrics())))
        if (barren := self._head.barren()) is not None:
            self._recorder.event("warning", barren)

    def _stall(self) -> str | None:
        """As `RunHead._stall`; while the supervised phase tells of its steps nothing is stuck."""
        is_starting = any(child.starting is not None for child in self._children.of("learner"))
        return None if is_starting and time.monotonic() - self._said_at < STALL_S else super()._stall()

    # ---------------------------------------------------- evaluation, checkpoint

    def _to_evaluate(self) -> tuple[int, Weights]:
        """As `RunHead._to_evaluate`, with the learner steps that made these weights; the run's very first weights come first."""
        if self._first is not None:
            found, self._first = self._first, None
            return found
        newest = self._weights.newest
        return dict(self._steps)[newest.version], newest

    def _ask_evaluation(self, weights: Any) -> Any:
        if "evaluator" not in self._children:
            self._spawn_evaluator()
        return self._children["evaluator"].worker.evaluate.remote(weights)

    def _evaluation_again(self, kept: Mapping[str, Any]) -> LlmEvaluation:
        return LlmEvaluation(**kept)

    def _evaluation_of(self, answer: Any, step: int, version: int) -> LlmEvaluation:
        return LlmEvaluation(step, version, answer)

    def _checkpoint_due(self) -> bool:
        """As `RunHead._checkpoint_due`, but not while a learner starts, for that may take long.

        The first is due at once: a learner that dies must not go through its supervised phase again.
        """
        if any(child.starting is not None or "updates" not in child.status for child in self._children.of("learner")):
            return False
        is_first = not self._has_checkpoint and self._weights.newest.version > 0 and self._checkpoints.may_retry
        return is_first or super()._checkpoint_due()

    def _checkpoint(self) -> bool:
        self._holds += 1
        try:
            return super()._checkpoint()
        finally:
            if "learner" in self._children:
                self._children["learner"].worker.release.remote(self._holds)
            if (latest := self._latest()) is not None:
                self._has_checkpoint = True
                self._desk.saved(latest.path)

    def save_learner(self, path: Path) -> int:
        """As `RunHead.save_learner`; the learners then hold still, so that the shards save exactly what was not learnt from."""
        return int(saved(self._children["learner"].worker.save.remote(str(path), self._holds)))

    def save_shards(self, replay: Path, before: Path | None) -> dict[str, dict[str, int]]:
        counters = super().save_shards(replay, before)
        ray.get(
            self._children["learner"].worker.release.remote(self._holds)
        )  # raises where it did not hold still so long
        return counters

    def save_more(self, path: Path) -> None:
        self._desk.save(path)
