"""The one-process mode: the same shards, actors and learner, called in lock step without Ray.

    every actor steps once → the learner updates as often as the limiter allows → metrics, evaluation, checkpoint when due

Same seed and settings give the same metrics to the last digit, those taken from clocks aside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.task_env import TaskEnv
from cluster import parts
from cluster.checkpoint import Checkpoint
from cluster.curriculum.desk_files import load_desk, save_desk
from cluster.evaluating import Evaluating
from cluster.files import read_json
from cluster.head import Evaluation, Head, Tick
from cluster.prior import with_prior
from cluster.recorder import HEAD, LEARNER, Recorder, replay_folder
from cluster.runs import RunFolder
from cluster.warned import Warned
from configs.schema import RunConfig
from learners.loop import set_threads
from replay.samplers import CallSource, Sampler
from replay.schema import StepSchema
from replay.shard import Shard
from replay.snapshot import SnapshotStore
from replay.writers import CallWriter, LaneWriter

ROW_STEPS = 200  # environment steps between two metrics rows: by steps, so that two runs report at the same moments
MOST_TAKEN = 10  # times as many steps are taken between two rows, where a filter keeps few of them or none


@dataclass
class _TaskEnv:
    """The environments of an actor, and how many of their outcomes the desk has."""

    env: TaskEnv
    name: str
    reported: int = 0


class SyncRun:
    """A run in this process. `run` ends by closing everything."""

    def __init__(
        self,
        folder: RunFolder[RunConfig],
        *,
        wall_started: float,
        resume: Checkpoint | None,
        show: Callable[[dict[str, float] | None, str | None], None],
    ) -> None:
        """
        wall_started: monotonic time at which the command was started.
        resume: the checkpoint to go on from.
        show: called with each metrics row, and with each line of text.

        Raises:
            EnvError: the environment is unknown or does not fit.
            OSError: too little space for the replay.
        """
        config = self._config = folder.config
        state = None if resume is None else read_json(resume.path / HEAD)
        head = self._head = Head(config, wall_started=wall_started, state=state)
        incarnation = head.counts.incarnation
        set_threads(config.learners.cpus, config.learners.threads)
        tasks = self._tasks = parts.make_tasks(config)
        schema = parts.env_schema(config, tasks)
        self._desk = None if tasks is None else parts.make_desk(config, tasks)
        rows = parts.row_schema(config, schema)
        specs = [
            parts.shard_spec(config, rows, index, run=folder.path.name, incarnation=incarnation)
            for index in range(config.replay.shards)
        ]
        self._shards: list[Shard] = []
        self._warned, self._told = Warned(), 0
        try:
            limiters = specs[0].limiters()  # one for all shards
            self._shards.extend(Shard.from_spec(spec, limiters) for spec in specs)
            self._assemble(schema, rows, resume)
            if self._desk is not None:
                load_desk(self._desk, None if resume is None else resume.path)
            self._recorder = Recorder(folder, head, show=show, resume=resume)
        except BaseException:
            self._warned.close()
            self._close_shards()
            raise
        self._policy = parts.make_policy(config, schema)
        self._evaluating: Evaluating | None = None
        self._paused_s = 0.0
        self._first_step: float | None = None

    def _assemble(self, schema: StepSchema, rows: StepSchema, resume: Checkpoint | None) -> None:
        """Make the learner and the actors; `schema` is that of the environment's steps, `rows` that of the replay's."""
        config, head = self._config, self._head
        incarnation = head.counts.incarnation
        self._algorithm = parts.make_algorithm(config, rows, incarnation=incarnation)
        version = parts.FIRST_VERSION
        if resume is not None:
            version = 1 + parts.load_learner(resume.path / LEARNER, self._algorithm)
            self._restore(resume.path)
        window = parts.window(config, rows)
        sampler = Sampler(
            [CallSource(shard, window=window) for shard in self._shards],
            rows,
            window=window,
            batch_size=config.draw_size,
            seed=parts.seed_of(config, "sampler", 0, incarnation),
            table=parts.table(config),
        )
        self._loop = parts.make_loop(
            config,
            self._algorithm,
            with_prior(config, rows, sampler, seed=parts.seed_of(config, "prior", 0, incarnation)),
            publish=self._take_weights,
            prefetch=1,
            version=version,
        )
        self._version, self._weights = 0, b""
        self._actors = []
        self._task_envs: list[_TaskEnv] = []
        for index in range(config.actors.count):
            chosen = parts.shards_of_actor(index, actors=config.actors.count, shards=range(len(self._shards)))
            writers = [CallWriter(self._shards[number]) for number in chosen]
            writer = writers[0] if len(writers) == 1 else LaneWriter(writers)
            common = {"random_steps": head.random_steps_left, "incarnation": incarnation}
            if self._tasks is None or self._desk is None:
                rollout = parts.make_rollout(config, schema, index, writer, **common)
            else:
                name = f"actor {index} of {incarnation}"  # each process counts its outcomes from 0
                ask = partial(self._desk.take, name)
                rollout, env = parts.make_task_rollout(
                    config, schema, index, writer, tasks=self._tasks, ask=ask, **common
                )
                self._task_envs.append(_TaskEnv(env, name))
            self._actors.append((rollout, writer))
        self._next_episode = [0] * config.actors.count

    def _close_shards(self) -> None:
        for shard in self._shards:
            shard.close()

    def _save_shards(self, replay: Path, before: Path | None) -> dict[str, dict[str, int]]:
        store, previous = SnapshotStore(replay), None if before is None else SnapshotStore(before)
        return {f"shard {shard.index}": parts.save_shard(shard, store, previous) for shard in self._shards}

    def _restore(self, checkpoint: Path) -> None:
        if self._config.checkpoints.replay:
            for shard in self._shards:
                parts.restore_shard(shard, SnapshotStore(replay_folder(checkpoint)), shards=len(self._shards))
        stats = [parts.shard_status(shard.stats()) for shard in self._shards]
        for index, found in enumerate(stats):
            self._head.rebase(f"shard {index}", found)
        counts = self._head.counts
        counts.sampled = parts.samples_used(self._config, counts)
        items = sum(int(found["items"]) for found in stats)
        found = parts.limiter_counters(self._config, inserted=counts.env_steps, sampled=counts.sampled, items=items)
        parts.set_limiter(self._shards[0], **found)

    def _take_weights(self, version: int, data: bytes) -> None:
        self._version, self._weights = version, data

    def run(self, stopping: threading.Event) -> dict[str, Any]:
        """Train until a stop condition is met or `stopping` is set. Returns the summary, which the run's folder holds too."""
        try:
            self._loop.publish()
            reason = self._train(stopping)
            for rollout, _ in self._actors:
                rollout.close()
            self._tick(ending=True)  # the rows that waited in the actors count as well
            if self._head.final_evaluation_due:
                self._evaluate()
                self._tick(ending=True)
            self._checkpoint(self._head.evaluation_now)
            summary = self._head.summary(stop_reason=reason)
            self._recorder.finish(summary)
            return summary
        except Exception as error:
            self._tell_warnings()
            who = "learner" if isinstance(error, FloatingPointError) else type(error).__name__
            self._recorder.event("error", f"{who}: {error}", shown=False)
            raise RuntimeError(f"{who}: {error}") from error
        finally:
            self._warned.close()
            self._recorder.close()
            if self._evaluating is not None:
                self._evaluating.close()
            self._close_shards()

    def _train(self, stopping: threading.Event) -> str:
        every = max(ROW_STEPS, self._config.lanes)
        has_filter = self._config.has_tasks and self._config.curriculum.filter != "none"
        next_row = taken = 0
        tables = [shard.table(parts.TABLE) for shard in self._shards]
        before = self._head.counts.env_steps - sum(table.inserted for table in tables)  # of steps not kept
        while True:
            for rollout, _ in self._actors:
                if rollout.version != self._version:
                    rollout.set_policy(self._version, self._weights)
                taken += rollout.step()
                if taken and self._first_step is None:
                    self._first_step = time.monotonic()
            self._report()
            self._update()
            steps = before + sum(table.inserted for table in tables)
            late = has_filter and taken >= MOST_TAKEN * every
            if steps >= min(next_row, self._head.next_due) or late or stopping.is_set():
                next_row, taken = steps - steps % every + every, 0
                self._tick()
                if self._head.evaluation_due():
                    self._loop.publish()
                    self._evaluate()
                reason = "stopped by a signal" if stopping.is_set() else self._head.stop_reason()
                if reason is not None:
                    return reason
                if self._head.checkpoint_due(time.monotonic()):
                    self._checkpoint()

    def _report(self) -> None:
        for one in self._task_envs:
            assert self._desk is not None
            one.reported = self._desk.report(one.name, one.reported, one.env.take_outcomes())

    def _update(self) -> None:
        while True:
            try:
                self._loop.step(timeout_s=0.0)
            except TimeoutError:
                return

    def _tick(self, *, ending: bool = False) -> None:
        actors = {
            f"actor {index}": parts.actor_status(
                rollout,
                writer,
                after=self._next_episode[index],
                tasks=self._task_envs[index].env if self._task_envs else None,
            )
            for index, (rollout, writer) in enumerate(self._actors)
        }
        self._next_episode = [int(status["next_episode"]) for status in actors.values()]
        learner = parts.learner_status(self._loop)
        losses = learner.pop("task_losses")
        if self._desk is not None and losses is not None:
            self._desk.score(*losses)
        tick = Tick(
            time=time.monotonic(),
            actors=actors,
            shards={f"shard {shard.index}": parts.shard_status(shard.stats()) for shard in self._shards},
            learner=learner,
            learner_metrics=learner["metrics"],
            desk={} if self._desk is None else self._desk.metrics(),
            returns=[r for status in actors.values() for r in status["returns"]],
            lengths=[n for status in actors.values() for n in status["lengths"]],
            paused_s=self._paused_s,
            ending=ending,
            first_step=self._first_step,
        )
        self._paused_s = 0.0
        self._recorder.row(self._head.tick(tick))
        self._tell_warnings()
        if self._head.return_extent is not None:
            self._loop.tell_returns(*self._head.return_extent)

    def _tell_warnings(self) -> None:
        for line in self._warned.after(self._told):
            self._told += 1
            self._recorder.event("warning", f"learner: {line}")

    def _evaluate(self) -> None:
        if self._evaluating is None:
            self._evaluating = Evaluating(self._config, self._tasks, self._policy)
        found = self._evaluating.run(self._weights)
        evaluation = Evaluation.of(found, step=self._head.counts.env_steps, version=self._version)
        self._paused_s += evaluation.seconds
        if self._head.evaluated(evaluation):
            self._checkpoint(evaluation.score)
        assert self._head.last_evaluation is not None
        self._recorder.event("evaluation", self._head.last_evaluation.text)

    def _checkpoint(self, evaluation: float | None = None) -> None:
        self._recorder.checkpoint(
            save_learner=lambda path: parts.save_learner(path, self._algorithm, version=self._version),
            save_shards=self._save_shards,
            policy=self._weights,
            evaluation=evaluation,
            save_more=None if self._desk is None else partial(save_desk, self._desk),
        )
