"""The one-process mode of language-model runs: sampler, queue and learner called in lock step, without Ray.

    learn if a batch of groups waits → else decode one token of every running completion → judge what finished → metrics,
    evaluation, checkpoint when due

Same seed and settings give the same completions and updates, those things aside that follow a clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from actors.assignments import Assignment
from actors.llm.tasks import Task
from cluster.checkpoint import Checkpoint
from cluster.curriculum.desk_files import load_desk, save_desk
from cluster.files import read_json
from cluster.llm import parts
from cluster.llm.audits import audits
from cluster.llm.examples import ExampleFile
from cluster.llm.head import LlmEvaluation, LlmHead, LlmTick, with_settings
from cluster.recorder import HEAD, LEARNER, Recorder, replay_folder
from cluster.runs import RunFolder
from cluster.warned import Warned
from configs.llm import LlmConfig
from learners.llm.rows import TABLE
from replay.files import storage_path
from replay.queue_readers import CallQueueSource
from replay.queue_sampler import QueueSampler
from replay.queue_writers import CallQueueWriter
from replay.queues import Queue

ACTOR = "actor 0"


class LlmSyncRun:
    """A run in this process. `run` ends by closing everything."""

    def __init__(
        self,
        folder: RunFolder[LlmConfig],
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
            OSError: too little space for the replay.
            ValueError: the model or the prompts cannot be used.
        """
        from learners.loop import set_threads

        config = self._config = folder.config
        self._resume = None if resume is None else resume.path
        state = None if self._resume is None else read_json(self._resume / HEAD)
        self._head = LlmHead(config, wall_started=wall_started, state=state)
        set_threads(config.learners.cpus, config.learners.threads)
        self._warned, self._told = Warned(), 0
        self._recorder = Recorder(folder, self._head, show=show, resume=resume)
        self._examples = ExampleFile(folder.path)
        self._version = 0
        self._paused_s = 0.0
        self._first: float | None = None
        path = storage_path(config.replay.directory, run=folder.path.name, shard=0, part=f"queue_{TABLE}")
        path.unlink(missing_ok=True)
        self._queue = Queue(parts.queue_spec(config), path)
        try:
            self._assemble()
        except BaseException:
            self._warned.close()
            self._queue.close(remove=True)
            raise

    def _assemble(self) -> None:
        config, resume = self._config, self._resume
        self._desk = parts.make_desk(config)
        load_desk(self._desk, resume)
        self._actor = f"{ACTOR} of {self._head.counts.incarnation}"  # each process counts its outcomes from 0
        self._reported = 0
        for kind, line in audits(config.tasks, parts.tasks_of(config)[0]):
            self._recorder.event(kind, line)
        model = parts.make_model(config, device=config.learners.device)
        self._model = model
        if resume is None:
            parts.warm_start(config, model, self._say)
        self._learner = parts.make_learner(config, model)
        version = parts.FIRST_VERSION
        if resume is not None:
            version = 1 + parts.load_learner(resume / LEARNER, self._learner)
            if config.checkpoints.replay:
                parts.restore_shard(self._queue, replay_folder(resume), index=0, count=1)
            self._head.rebase("shard 0", self._queue.stats())
        sampler = QueueSampler(
            [CallQueueSource(self._queue, groups=config.learners.batch_groups)], groups=config.learners.batch_groups
        )
        self._loop = parts.make_loop(config, self._learner, sampler, publish=self._take_weights, version=version)
        self._rollout = parts.make_rollout(
            config, parts.make_sampling_model(config), CallQueueWriter(self._queue), ask=self._ask
        )
        self._evaluator = parts.make_evaluator(config, parts.make_sampling_model(config)) if config.eval.every else None

    def _say(self, text: str) -> None:
        self._recorder.event("start", text)

    def _ask(self, count: int) -> Sequence[Assignment[Task]]:
        return self._desk.take(self._actor, count)

    def _take_weights(self, version: int, data: bytes) -> None:
        self._version = version
        self._rollout.set_weights(version, data)

    def run(self, stopping: threading.Event) -> dict[str, Any]:
        """Train until a stop condition is met or `stopping` is set. Returns the summary, which the run's folder holds too."""
        try:
            self._loop.publish()
            self._tick()
            reason = self._train(stopping)
            self._tick(ending=True)
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
            told = with_settings(f"{who}: {error}")
            self._recorder.event("error", told, shown=False)
            raise RuntimeError(told) from error
        finally:
            self._warned.close()
            self._recorder.close()
            self._rollout.close()
            if self._evaluator is not None:
                self._evaluator.close()
            self._queue.close(remove=True)

    def _train(self, stopping: threading.Event) -> str:
        next_row = time.monotonic()
        while True:
            if self._head.evaluation_due():
                self._evaluate()
            reason = "stopped by a signal" if stopping.is_set() else self._head.stop_reason()
            if reason is not None:
                return reason
            if self._head.checkpoint_due(time.monotonic()):
                self._checkpoint(None)
            moved = self._sample_and_learn(stopping)
            if moved or time.monotonic() >= next_row:
                next_row = time.monotonic() + self._config.report_every_s
                self._tick()

    def _sample_and_learn(self, stopping: threading.Event) -> bool:
        """Sample until a learner step was made, or for as long as lies between two metrics rows. Returns whether one was.

        What waits is learnt from before more is sampled: one decode step may finish several batches, which would pile up and grow
        too old.
        """
        until = time.monotonic() + self._config.report_every_s
        while time.monotonic() < until and not stopping.is_set():
            if self._queue.waiting_groups >= self._config.learners.batch_groups:
                try:
                    self._loop.step(timeout_s=0.0)
                except TimeoutError:  # groups among them were too old
                    pass
                else:
                    self._desk.learnt(self._learner.updates)
                    return True
            if self._rollout.step() and self._first is None:
                self._first = time.monotonic()
            self._reported = self._desk.report(self._actor, self._reported, self._rollout.take_outcomes())
        return False

    def _tick(self, *, ending: bool = False, evaluating: bool = False) -> None:
        learner = parts.learner_status(self._loop)
        shards = {"shard 0": self._queue.stats()}
        self._head.count_shards(shards)
        self._desk.stale(self._head.counts.dropped_stale_groups)
        tick = LlmTick(
            time=time.monotonic(),
            actors={ACTOR: parts.actor_status(self._rollout, None)},
            shards=shards,
            learner=learner,
            learner_metrics=learner["metrics"],
            paused_s=self._paused_s,
            ending=ending,
            evaluating=evaluating,
            first_step=self._first,
            desk=self._desk.metrics(),
        )
        self._paused_s = 0.0
        self._recorder.row(self._head.tick(tick))
        if (barren := self._head.barren()) is not None:
            self._recorder.event("warning", barren)
        self._examples.add(self._rollout.examples(), step=self._head.step)
        self._tell_warnings()

    def _tell_warnings(self) -> None:
        for line in self._warned.after(self._told):
            self._told += 1
            self._recorder.event("warning", f"learner: {line}")

    def _evaluate(self) -> None:
        from actors.llm.evaluate import summary

        assert self._evaluator is not None
        settings = self._config.eval
        began = time.monotonic()
        # Of the learner as it is now, which is not always what was last published (`learners.publish_every`).
        passes = self._evaluator.run(self._version, self._learner.policy_bytes())
        figures = summary(passes, attempts=settings.attempts, families=settings.families)
        evaluation = LlmEvaluation(self._head.step, self._version, figures)
        self._paused_s += time.monotonic() - began
        best = self._head.evaluated(evaluation)
        self._recorder.event("evaluation", evaluation.text)
        self._tick(evaluating=True)  # a row of its own, for the curves over time; it says nothing of throughput
        if best and self._head.step:
            self._checkpoint(evaluation.score)

    def _checkpoint(self, evaluation: float | None) -> None:
        self._recorder.checkpoint(
            save_learner=lambda path: parts.save_learner(path, self._learner, version=self._version),
            save_shards=lambda path, _before: {"shard 0": parts.save_shard(self._queue, path, index=0)},
            save_more=lambda path: save_desk(self._desk, path),
            policy=self._learner.policy_bytes(),
            evaluation=evaluation,
        )
