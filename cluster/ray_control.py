"""The head of a control run under Ray: actors that step environments, shards that keep steps, learners that draw windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from actors.assignments import Outcome
from cluster import parts
from cluster.curriculum.desk import Desk
from cluster.head import Evaluation, Head, TaskEvaluation, Tick
from cluster.head_state import read_head_state
from cluster.ray_children import ANSWER_S, Child
from cluster.ray_desk import Answer, HeadDesk
from cluster.ray_head import RunHead, resumed_at
from cluster.ray_workers import ActorWorker, EvaluatorWorker, LearnerWorker, ShardWorker
from cluster.recorder import LEARNER, replay_folder
from cluster.runs import RunFolder
from configs.schema import RunConfig


@ray.remote
class ControlHeadWorker(RunHead):
    """The head, as a named detached Ray actor."""

    FIRST = "environment step"
    _config: RunConfig
    _head: Head

    def __init__(self, folder: str, wall_started: float, resume: str | None, *, schema: str) -> None:
        """
        folder: of the run; the node of the head must reach it.
        wall_started: epoch seconds at which the command was started.
        resume: folder of the checkpoint to go on from.
        schema: StepSchema as JSON.
        """
        opened: RunFolder[RunConfig] = RunFolder.open(Path(folder))
        checkpoint = None if resume is None else Path(resume)
        kept = read_head_state(opened.path, wall_started)
        started, state = resumed_at(wall_started, checkpoint, kept)
        head = Head(opened.config, wall_started=started, state=state)
        super().__init__(opened, head, wall_started, checkpoint, kept)
        self._schema = schema
        self._told_extent: tuple[float, float] | None = None  # of returns, to learner 0, which tells the others
        self._desk: HeadDesk[Desk] = HeadDesk(self._folder.path, tell=self._recorder.event)  # open in runs with tasks
        self._next_episode: dict[str, int] = {}
        self._begin()

    # ------------------------------------------------- calls from other processes

    def exchange(
        self, actor: str, incarnation: int, first: int, outcomes: Sequence[Outcome], want: int, held: int
    ) -> Answer | None:
        """As `HeadDesk.exchange`; a run that is ending gives no assignments."""
        return self._desk.exchange(actor, incarnation, first, outcomes, 0 if self._finishing else want, held)

    # --------------------------------------------------------------- processes

    def _start(self) -> None:
        config, counts = self._config, self._head.counts
        for index in range(config.replay.shards):
            self._spawn_shard(index)
        for index in range(config.actors.count):
            self._spawn_actor(index)
        self._spawn_learners()
        tasks = parts.make_tasks(config)
        if tasks is not None:
            self._desk.open(parts.make_desk(config, tasks), self._resume)
        self._addresses = [""] * config.replay.shards
        self._ports = [0] * config.replay.shards
        kept = self._resume if config.checkpoints.replay else None
        for index in range(config.replay.shards):
            self._start_shard(index, kept)
        if self._resume is not None:
            self._resume_limiter()
        self._tell_addresses()
        for index in range(config.actors.count):
            self._start_actor(index)
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

    def _resume_limiter(self) -> None:
        """Set the limiter of a run that goes on, before anybody inserts or samples."""
        counts = self._head.counts
        counts.sampled = parts.samples_used(self._config, counts)
        items = sum(int(child.status["items"]) for child in self._children.of("shard"))
        counters = parts.limiter_counters(self._config, inserted=counts.env_steps, sampled=counts.sampled, items=items)
        self._children.answer("shard 0", self._children["shard 0"].worker.restore_limiter.remote(counters))

    def _other_shards(self) -> list[dict[str, Any]]:
        """Newest status of all shards but the first, from those that answer now."""
        others = [child for child in self._children.of("shard") if child.index != 0 and child.worker]
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
        child.incarnation, child.writer = incarnation, parts.writer_name(index, incarnation)
        self._desk.serve(child.name, incarnation)

    def _start_actor(self, index: int) -> None:
        child = self._children[f"actor {index}"]
        child.starting = child.worker.start.remote(self._addresses)

    def _make_learner(self, rank: int, *, name: str, gpus: float, incarnation: int) -> None:
        self._children.make(
            name,
            LearnerWorker,
            self._config,
            self._schema,
            rank,
            self._self,
            incarnation,
            self._security,
            cpus=self._config.learners.cpus,
            gpus=gpus,
        )

    def _start_learners(self, checkpoint: Path | None, version: int) -> None:
        super()._start_learners(checkpoint, version)
        self._told_extent = None

    def _replace(self, child: Child) -> str:
        if child.kind == "shard":
            return self._restart_shard(child)
        if self._desk.is_open:
            self._desk.forget(child.name)
        for shard in parts.shards_of_actor(self._config, child.index):
            self._children[f"shard {shard}"].worker.end_writer.remote(child.writer)
        self._spawn_actor(child.index)
        self._head.rebase(child.name, {})
        self._start_actor(child.index)
        return "a new one takes its place"

    def _more_state(self) -> dict[str, Any]:
        return {"next_episode": self._next_episode}

    def _restore_more(self, kept: Mapping[str, Any]) -> None:
        self._next_episode = dict(kept["next_episode"])
        if (tasks := parts.make_tasks(self._config)) is not None:
            for child in self._children.of("actor"):
                self._desk.serve(child.name, child.incarnation)
            self._desk.recover(parts.make_desk(self._config, tasks))

    # ----------------------------------------------------------------- watching

    def _arguments(self) -> dict[str, tuple[Any, ...]]:
        return {name: (index,) for name, index in self._next_episode.items()} | super()._arguments()

    def _tick(self) -> None:
        moment = self._moment()
        returns: list[float] = []
        lengths: list[int] = []
        for name, status in moment["actors"].items():
            # A status that came late is looked at again: its episodes were counted then.
            if status["next_episode"] > self._next_episode[name]:
                returns += status["returns"]
                lengths += status["lengths"]
                self._next_episode[name] = status["next_episode"]
        desk = self._ask_desk()
        self._recorder.row(self._head.tick(Tick(**moment, returns=returns, lengths=lengths, desk=desk)))
        extent = self._head.return_extent
        if moment["learner"] and extent is not None and extent != self._told_extent:
            self._told_extent = extent
            self._children["learner"].worker.observe_returns.remote(*extent)

    def _stall(self) -> str | None:
        """As `RunHead._stall`, with what the filter has thrown away."""
        line = super()._stall()
        if line is None or not self._desk.is_open or self._config.curriculum.filter == "none":
            return line
        share = self._desk.desk.metrics()["waste/share"]
        return f"{line}; curriculum.filter has thrown away {100 * share:.0f} % of the steps sampled"

    def _ask_desk(self) -> dict[str, float]:
        """The desk's metrics, once it was told of the learner's losses."""
        if not self._desk.is_open:
            return {}
        # Taken away, for a status that came late is looked at again.
        for child in self._children.of("learner"):  # the first alone tells some
            if (losses := child.status.pop("task_losses", None)) is not None:
                self._desk.desk.score(*losses)
        return self._desk.desk.metrics()

    # -------------------------------------------------- evaluation, checkpoint

    def _ask_evaluation(self, weights: Any) -> Any:
        if "evaluator" not in self._children:
            self._children.make("evaluator", EvaluatorWorker, self._config, self._schema, cpus=0.0)
        return self._children["evaluator"].worker.evaluate.remote(weights)

    def _evaluation_again(self, kept: Mapping[str, Any]) -> Evaluation:
        lists = {name: tuple(kept[name]) for name in ("returns", "worst_drop")}
        tasks = {
            name: TaskEvaluation(tuple(one["returns"]), tuple(one["passed"])) for name, one in kept["tasks"].items()
        }
        return Evaluation(**{**kept, **lists, "tasks": tasks})

    def _evaluation_of(self, answer: Any, step: int, version: int) -> Evaluation:
        return Evaluation.of(answer, step=step, version=version)

    def _checkpoint(self) -> bool:
        done = super()._checkpoint()
        if self._desk.is_open and (latest := self._latest()) is not None:
            self._desk.saved(latest.path)
        return done

    def _save_more(self, path: Path) -> None:
        if self._desk.is_open:
            self._desk.save(path)
