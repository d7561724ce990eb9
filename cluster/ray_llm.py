"""The head of a language-model run under Ray: what `RunHead` does, with the desk that hands out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray

from actors.llm.assignments import Assignment, Outcome
from cluster.llm import parts
from cluster.llm.examples import ExampleFile
from cluster.llm.head import LlmEvaluation, LlmHead, LlmTick
from cluster.ray_children import Child
from cluster.ray_head import RunHead, resumed_at
from cluster.ray_llm_workers import LlmEvaluatorWorker, LlmLearnerWorker, QueueShardWorker, SamplerWorker
from cluster.recorder import LEARNER, replay_folder
from cluster.runs import RunFolder


@ray.remote
class LlmHeadWorker(RunHead):
    """The head of a language-model run, as a named detached Ray actor."""

    FIRST: ClassVar[str] = "completion"

    def __init__(self, folder: str, wall_started: float, resume: str | None) -> None:
        """
        folder: of the run; the node of the head must reach it.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        """
        opened = RunFolder.open(Path(folder))
        path = None if resume is None else Path(resume)
        started, state = resumed_at(wall_started, path)
        super().__init__(opened, LlmHead(opened.config, wall_started=started, state=state), wall_started, path)
        self._desk = parts.make_desk(self._config, path)
        self._examples = ExampleFile(self._folder.path)
        self._at_work: dict[str, int] = {}  # actor → incarnation of the one that is served
        self._begin()

    # ------------------------------------------------- calls from other processes

    def exchange(self, actor: str, incarnation: int, count: int, outcomes: Sequence[Outcome]) -> list[Assignment]:
        """An actor hands in outcomes and takes at most `count` assignments; one that was replaced gets none."""
        self._desk.record(outcomes)
        if self._finishing or self._at_work.get(actor) != incarnation:
            return []
        return self._desk.take(actor, count)

    # --------------------------------------------------------------- processes

    def _start(self) -> None:
        config, counts = self._config, self._head.counts
        for index in range(config.replay.shards):
            self._spawn_shard(index)
        self._spawn_learners()
        for index in range(config.actors.count):
            self._spawn_actor(index)
        self._addresses = [""] * config.replay.shards
        self._ports = [0] * config.replay.shards
        kept = self._resume if config.checkpoints.replay else None
        for index in range(config.replay.shards):
            self._start_shard(index, kept)
        self._tell_addresses()
        version = max(counts.version + 1, parts.FIRST_VERSION)
        self._start_learners(None if self._resume is None else self._resume / LEARNER, version)
        for index in range(config.actors.count):
            self._start_actor(index)

    def _spawn_shard(self, index: int) -> None:
        self._children.make(
            f"shard {index}", QueueShardWorker, self._config, index, self._folder.path.name, self._security, cpus=0.0
        )

    def _start_shard(self, index: int, checkpoint: Path | None, *, recover: bool = False) -> dict[str, Any]:
        name = f"shard {index}"
        child = self._children[name]
        replay = None if checkpoint is None else str(replay_folder(checkpoint))
        answer: dict[str, Any] = self._children.answer(
            name, child.worker.start.remote(self._ports[index], replay, recover)
        )
        self._addresses[index], self._ports[index] = answer["address"], answer["port"]
        child.status = answer["status"]
        self._children.started(name, answer["process"])
        if answer["recovered"]:
            self._head.recovered(name, child.status)
        else:
            self._head.rebase(name, child.status)
        return answer

    def _spawn_actor(self, index: int) -> None:
        name, incarnation = f"actor {index}", self._incarnation()
        settings = self._config.actors
        child = self._children.make(
            name,
            SamplerWorker,
            self._config,
            index,
            self._self,
            incarnation,
            self._security,
            cpus=settings.cpus,
            gpus=settings.gpus,
        )
        self._at_work[name] = incarnation
        child.writer = parts.writer_name(index, incarnation)

    def _start_actor(self, index: int) -> None:
        child = self._children[f"actor {index}"]
        child.starting = child.worker.start.remote(self._addresses)

    def _make_learner(self, rank: int, *, name: str, gpus: float, incarnation: int) -> None:
        self._children.make(
            name,
            LlmLearnerWorker,
            self._config,
            rank,
            self._self,
            self._security,
            cpus=self._config.learners.cpus,
            gpus=gpus,
        )

    def _replace(self, child: Child) -> str:
        if child.kind == "shard":
            return self._replace_shard(child)
        lost = self._desk.forget(child.name)
        self._children[f"shard {child.index % self._config.replay.shards}"].worker.end_writer.remote(child.writer)
        self._spawn_actor(child.index)
        self._head.rebase(child.name, {})
        self._start_actor(child.index)
        return f"a new one takes its place; {lost} groups that it had begun are sampled no further"

    def _replace_shard(self, child: Child) -> str:
        before = int(child.status.get("waiting_groups", 0))
        self._spawn_shard(child.index)
        # Not from a checkpoint: most of what that holds was learnt from since, and new groups are soon sampled.
        answer = self._start_shard(child.index, None, recover=True)
        self._tell_addresses()
        kept = int(answer["status"]["waiting_groups"])
        if answer["recovered"]:
            return f"a new one serves all its {kept} groups"
        return f"its storage is gone, with {before} groups that waited; a new one begins empty"

    # ----------------------------------------------------------------- watching

    def _tick(self) -> None:
        self._desk.learnt(self._head.counts.updates)
        for child in self._children.of("actor"):
            self._examples.add(child.status.pop("examples", ()), step=self._head.step)
        self._recorder.row(self._head.tick(LlmTick(**self._moment(), desk=self._desk.metrics())))

    # ---------------------------------------------------- evaluation, checkpoint

    def _ask_evaluation(self, reference: Any) -> Any:
        if "evaluator" not in self._children:
            self._children.make("evaluator", LlmEvaluatorWorker, self._config, cpus=0.0)
        return self._children["evaluator"].worker.evaluate.remote(self._weights[0], reference)

    def _evaluation_of(self, answer: Any, step: int, version: int) -> LlmEvaluation:
        return LlmEvaluation(step, version, answer)

    def _checkpoint(self) -> bool:
        try:
            return super()._checkpoint()
        finally:
            if "learner" in self._children:
                self._children["learner"].worker.release.remote()

    def _save_more(self, path: Path) -> None:
        parts.save_desk(self._desk, path)
