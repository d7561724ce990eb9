"""The head of a control run under Ray: actors that step environments, shards that keep steps, learners that draw windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

from actors.assignments import Outcome
from cluster import parts
from cluster.curriculum.desk import Desk
from cluster.head import Evaluation, Head, TaskEvaluation, Tick
from cluster.head_state import read_head_state
from cluster.outside import OutsideActors
from cluster.ray_children import Child
from cluster.ray_desk import Answer, HeadDesk, answers
from cluster.ray_files import FILES_GROUP
from cluster.ray_head import RunHead, resumed_at
from cluster.ray_outside import RayOutside
from cluster.ray_placement import on_this_node
from cluster.ray_relay import Request
from cluster.ray_shards import MOVE_S, Shards
from cluster.ray_workers import ActorWorker, EvaluatorWorker, ExporterWorker, LearnerWorker
from cluster.recorder import LEARNER
from cluster.runs import RunFolder
from configs.schema import RunConfig
from replay.schema import StepSchema


@ray.remote(concurrency_groups=FILES_GROUP)
class ControlHeadWorker(RunHead):
    """The head, as a named detached Ray actor."""

    FIRST = "environment step"
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
        self._shards = Shards(
            self._folder,
            head,
            self._children,
            self._placement,
            schema=schema,
            security=self._security,
            mark=self._mark,
            incarnation=self._incarnation,
            latest=self._latest,
            changed=self._reroute,
            keep=self._keep,
            tell=self._recorder.event,
        )
        self._outside = RayOutside(
            OutsideActors(
                self._config,
                StepSchema.from_json(schema),
                self._security,
                state=None if kept is None else kept.get("outside"),
            ),
            self._children,
            self._weights,
            routes=partial(self._shards.routes, writing=True),
            make_exporter=self._make_exporter,
            every_s=self._config.outside.export_every_s,
            tell=self._recorder.event,
        )
        self._plane.outside = self._outside
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

    def exchange_many(self, requests: Sequence[Request]) -> list[Answer | Exception | None]:
        """`exchange` of several actors, which a relay has put together; what one raises is its answer."""
        return answers(self.exchange, requests)

    # --------------------------------------------------------------- processes

    def _start(self) -> None:
        config, counts = self._config, self._head.counts
        self._placement.reserve(config.replay.shards, gpus=self._learners.gpus)
        self._shards.spawn(config.replay.shards)
        for index in range(config.actors.count):
            self._spawn_actor(index)
        self._learners.spawn()
        tasks = parts.make_tasks(config)
        if tasks is not None:
            self._desk.open(parts.make_desk(config, tasks), self._resume)
        self._shards.start(self._resume if config.checkpoints.replay else None)
        if self._resume is not None:
            self._shards.resume_limiter()
        for index in range(config.actors.count):
            self._start_actor(index)
        version = max(counts.version + 1, parts.FIRST_VERSION)
        self._learners.start(None if self._resume is None else self._resume / LEARNER, version)

    def _routes(self) -> dict[int, str]:
        return self._shards.routes(writing=False)

    def _reroute(self) -> None:
        """Tell everybody where the shards are now."""
        self._tell_addresses()
        if not self._is_started:  # they are told when they start
            return
        number = self._incarnation()
        for child in self._children.of("actor"):
            if child.worker is not None:
                child.worker.route.remote(number, self._routes_of_actor(child.index), MOVE_S)
        self._learners.route()

    def _routes_of_actor(self, index: int) -> dict[int, str]:
        routes = self._shards.routes(writing=True)
        chosen = parts.shards_of_actor(index, actors=self._config.actors.count, shards=sorted(routes))
        return {number: routes[number] for number in chosen}

    def _spawn_actor(self, index: int) -> None:
        self._next_episode[f"actor {index}"] = 0
        incarnation = self._incarnation()
        shards = [child.index for child in self._children.of("shard") if child.leaving is None]
        nearest = parts.shards_of_actor(index, actors=self._config.actors.count, shards=sorted(shards))[0]
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
            options=self._placement.actor(near=self._placement.node_of_shard(nearest)),
        )
        child.incarnation, child.writer = incarnation, parts.writer_name(index, incarnation)
        self._desk.serve(child.name, incarnation)

    def _start_actor(self, index: int) -> None:
        child = self._children[f"actor {index}"]
        child.starting = child.worker.start.remote(self._incarnation(), self._routes_of_actor(index))

    def _make_learner(self, rank: int, *, name: str, options: Mapping[str, Any], incarnation: int) -> None:
        self._children.make(
            name,
            LearnerWorker,
            self._config,
            self._schema,
            rank,
            self._self,
            incarnation,
            self._security,
            self._mark,
            options=options,
        )

    def _make_exporter(self) -> None:
        self._children.make(
            "exporter", ExporterWorker, self._config, self._schema, options={"num_cpus": 0, **on_this_node()}
        )

    def _learners_restarted(self) -> None:
        self._told_extent = None

    def _started(self, child: Child, answer: Mapping[str, Any]) -> None:
        super()._started(child, answer)
        if child.kind == "shard":
            self._shards.started(child, answer)

    def _replace(self, child: Child, why: str) -> str | None:
        if child.kind == "shard":
            self._shards.replace(child, why)
            return None
        self._end_actor(child)
        self._spawn_actor(child.index)
        self._head.rebase(child.name, {})
        self._start_actor(child.index)
        return "a new one takes its place"

    def _end_actor(self, child: Child) -> None:
        self._relays.detach(child.name)
        if self._desk.is_open:
            self._desk.forget(child.name)
        for shard in self._children.of("shard"):
            if shard.worker is not None:
                shard.worker.end_writer.remote(child.writer)

    def _forget_actor(self, child: Child) -> None:
        self._end_actor(child)
        self._next_episode.pop(child.name, None)

    # ------------------------------------------------------------------- scale

    def _scale(self, actors: int | None, shards: int | None) -> dict[str, int]:
        before = self._config
        wanted = super()._scale(actors, shards)
        if self._config != before:
            for child in self._children.of("shard"):
                if child.worker is not None and child.starting is None:
                    child.worker.set_limit.remote(self._config)
            self._reroute()
        return wanted

    def _scale_shards(self) -> None:
        self._shards.scale(self._config.replay.shards)

    def _checkpoint_due(self) -> bool:
        """As `RunHead._checkpoint_due`, and soon after a shard has left: the one before has its rows elsewhere."""
        has_changed = self._shards.has_changed and self._shards.is_settled and not self._learners.are_starting
        return super()._checkpoint_due() or (has_changed and self._checkpoints.may_retry)

    def moving(self) -> str | None:
        return "steps are on their way from a shard that leaves to the others" if self._shards.is_handing_over else None

    def _more_state(self) -> dict[str, Any]:
        return {
            "next_episode": self._next_episode,
            "shards": self._shards.state(),
            "outside": self._outside.state(),
        }

    def _restore_more(self, kept: Mapping[str, Any]) -> None:
        self._next_episode = dict(kept["next_episode"])
        self._shards.restore(kept["shards"])
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
        row = self._head.tick(Tick(**moment, returns=returns, lengths=lengths, desk=desk))
        self._show_row(row | self._outside.tick())
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
            self._children.make("evaluator", EvaluatorWorker, self._config, self._schema, options={"num_cpus": 0})
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
        self._shards.has_changed = self._shards.has_changed and not done
        if self._desk.is_open and (latest := self._latest()) is not None:
            self._desk.saved(latest.path)
        return done

    def save_more(self, path: Path) -> None:
        if self._desk.is_open:
            self._desk.save(path)
