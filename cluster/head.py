"""The head's books in a control run: environment steps, episodes, returns, and the replay they fill.

Who runs the processes they are about is decided by the caller: `cluster.ray_control` under Ray, `cluster.sync` in one process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from cluster.books import Books, CommonCounts, Measured, Moment
from cluster.curriculum.forgetting import Forgetting
from configs.schema import RunConfig

TOLD_DROP = 0.1  # of a task's success from which on the line about an evaluation names it


@dataclass
class Counts(CommonCounts):
    """What a control run has done since it was first started, over all its resumptions and restarts."""

    env_steps: int = 0
    sampled: int = 0
    episodes: int = 0
    broken_episodes: int = 0
    trained_steps: int = 0  # environment steps taken during `trained_s`
    unassigned_steps: int = (
        0  # of episodes that no task was assigned for, as the head had no time: they are not reported
    )


@dataclass(frozen=True)
class TaskEvaluation:
    """Episodes of one task in an evaluation."""

    returns: tuple[float, ...]
    passed: tuple[bool, ...]

    @property
    def mean(self) -> float:
        """The mean return."""
        return math.fsum(self.returns) / len(self.returns)

    @property
    def success(self) -> float:
        """Share of the episodes that passed."""
        return sum(self.passed) / len(self.passed)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one policy version."""

    step: int
    version: int
    returns: tuple[float, ...]
    seconds: float
    tasks: Mapping[str, TaskEvaluation] = field(
        default_factory=dict
    )  # of runs with tasks: by name, `returns` all of theirs
    worst_drop: tuple[float, str | None] = (
        0.0,
        None,
    )  # of a task's success since the curriculum changed, and that task

    @classmethod
    def of(cls, found: Mapping[str, Any], *, step: int, version: int) -> Evaluation:
        """From what `Evaluating.run` gave, as JSON."""
        tasks = {
            name: TaskEvaluation(tuple(one["returns"]), tuple(one["passed"])) for name, one in found["tasks"].items()
        }
        return cls(step, version, tuple(found["returns"]), float(found["seconds"]), tasks)

    @property
    def mean(self) -> float:
        return math.fsum(self.returns) / len(self.returns)

    @property
    def std(self) -> float:
        """Population standard deviation of the returns."""
        return math.sqrt(math.fsum((r - self.mean) ** 2 for r in self.returns) / len(self.returns))

    @property
    def success(self) -> float | None:
        """Mean share of passed episodes over the tasks; None without tasks."""
        return math.fsum(one.success for one in self.tasks.values()) / len(self.tasks) if self.tasks else None

    @property
    def score(self) -> float:
        """The mean success over the tasks; without tasks, the mean return."""
        return self.mean if self.success is None else self.success

    @property
    def text(self) -> str:
        """The evaluation in one line."""
        success = f"success {self.success:.2f} over {len(self.tasks)} tasks, " if self.success is not None else ""
        drop, task = self.worst_drop
        fallen = f"; {task} has fallen by {drop:.2f}" if drop >= TOLD_DROP else ""
        return (
            f"evaluation at step {self.step}: {success}mean return {self.mean:.1f} ± {self.std:.1f} over {len(self.returns)} "
            f"episodes in {self.seconds:.1f} s{fallen}"
        )

    def row(self) -> dict[str, float]:
        """Its metrics."""
        found = {
            "eval/mean_return": self.mean,
            "eval/std_return": self.std,
            "eval/episodes": float(len(self.returns)),
            "eval/seconds": self.seconds,
            "eval/step": float(self.step),
        }
        if self.success is not None:
            found |= {"eval/mean_success": self.success, "eval/worst_drop": self.worst_drop[0]}
        for name, one in self.tasks.items():
            found |= {f"eval/task/{name}/return": one.mean, f"eval/task/{name}/success": one.success}
        return found


@dataclass
class Tick(Moment):
    """Status of every process at one moment, with what has ended since the last one."""

    returns: Sequence[float] = ()  # of the episodes finished since the last tick
    lengths: Sequence[int] = ()
    desk: Mapping[str, float] = field(default_factory=dict)  # `Desk.metrics`; of runs with tasks


class Head(Books):
    """Bookkeeping of one control run: its `step`, and its `work`, are the environment steps that the shards have taken in."""

    SHARD_COUNTS: ClassVar[Mapping[str, str]] = {"inserted": "env_steps", "sampled": "sampled"}
    config: RunConfig
    counts: Counts
    last_evaluation: Evaluation | None

    def __init__(self, config: RunConfig, *, wall_started: float, state: Mapping[str, Any] | None = None) -> None:
        """
        wall_started: monotonic time at which the command was started.
        state: what `state` returned before the run was stopped.
        """
        counts = Counts() if state is None else Counts(**state["counts"])
        super().__init__(config, counts, wall_started=wall_started, state=state)
        self.return_extent: tuple[float, float] | None = None  # lowest and highest discounted return actors ever met
        self._returns: deque[float] = deque(maxlen=100)
        self._lengths: deque[int] = deque(maxlen=100)
        self._forgetting = Forgetting()
        self._changes = 0  # of the curriculum
        if state is not None:
            self._returns.extend(state["returns"])
            self._lengths.extend(state["lengths"])
            if (extent := state.get("return_extent")) is not None:
                self.return_extent = (float(extent[0]), float(extent[1]))
            if (forgetting := state.get("forgetting")) is not None:
                self._forgetting.load_state(forgetting)

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.counts.env_steps

    @property
    def work(self) -> int:
        """Environment steps so far."""
        return self.counts.env_steps

    @property
    def _stop_step(self) -> float:
        return self.config.stop.steps or math.inf

    @property
    def random_steps_left(self) -> int:
        """Steps of `actors.random_steps` that are still to be taken by each actor."""
        left = max(0, self.config.actors.random_steps - self.counts.env_steps)
        return -(-left // self.config.actors.count)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        own: dict[str, Any] = {
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "return_extent": self.return_extent,
        }
        if self.config.has_tasks:
            own["forgetting"] = self._forgetting.state()
        return super().state() | own

    def evaluated(self, evaluation: Measured) -> bool:
        """As `Books.evaluated`; how far tasks have fallen since the curriculum changed is found here."""
        assert isinstance(evaluation, Evaluation)
        if evaluation.tasks:
            success = {name: one.success for name, one in evaluation.tasks.items()}
            evaluation = replace(evaluation, worst_drop=self._forgetting.evaluated(success, changes=self._changes))
        return super().evaluated(evaluation)

    def summary(self, *, stop_reason: str) -> dict[str, Any]:
        """How the run ended."""
        counts, last = self.counts, self.last_evaluation
        return super().summary(stop_reason=stop_reason) | {
            "steps": counts.env_steps,
            "episodes": counts.episodes,
            "broken_episodes": counts.broken_episodes,
            "steps_per_s": counts.trained_steps / counts.trained_s if counts.trained_s > 0 else None,
            "mean_return": last.mean if last else None,
            "std_return": last.std if last else None,
            **({"success": last.success, "worst_drop": last.worst_drop[0]} if last and last.tasks else {}),
            "best_success" if self.config.has_tasks else "best_mean_return": self.best,
        }

    def _take_in(self, moment: Tick) -> None:
        counts = self.counts
        for name, stats in moment.actors.items():
            counts.episodes += int(self._delta(name, stats, "episodes"))
            counts.broken_episodes += int(self._delta(name, stats, "broken_episodes"))
            counts.unassigned_steps += int(self._delta(name, stats, "unassigned_steps"))
            self._add_seconds("actor", name, stats, "")
            if (extent := stats.get("return_extent")) is not None:
                low, high = self.return_extent or extent
                self.return_extent = (min(low, extent[0]), max(high, extent[1]))
        self._changes = int(moment.desk.get("curriculum/changes", self._changes))
        self._returns.extend(moment.returns)
        self._lengths.extend(moment.lengths)

    def _counted(self) -> dict[str, float]:
        counts = self.counts
        return {
            "env_steps": counts.env_steps,
            "episodes": counts.episodes,
            "broken_episodes": counts.broken_episodes,
            **({"unassigned_steps": counts.unassigned_steps} if self.config.has_tasks else {}),
        }

    def _trained(self, work: int, seconds: float) -> dict[str, float]:
        self.counts.trained_steps += work
        return {"steps_per_s": work / seconds}

    def _row(self, moment: Tick) -> dict[str, float]:
        counts = self.counts
        size = sum(int(s["items"]) for s in moment.shards.values())
        capacity = sum(int(s["capacity"]) for s in moment.shards.values())
        row: dict[str, float] = {"replay_size": size, "replay_capacity": capacity}
        row["replay_fill"] = size / capacity if capacity else 0.0
        after_warm_up = counts.env_steps - self.config.replay.min_size
        if after_warm_up > 0:
            row["samples_per_insert"] = counts.sampled / after_warm_up
        if self._returns:
            row["return_mean_100"] = math.fsum(self._returns) / len(self._returns)
            row["length_mean_100"] = math.fsum(self._lengths) / len(self._lengths)
        versions = [float(s["version"]) for s in moment.actors.values() if s.get("version")]
        if versions and not moment.ending:
            row["policy_lag"] = counts.version - math.fsum(versions) / len(versions)
        return row | dict(moment.desk)

    def _solved(self) -> str | None:
        stop, last = self.config.stop, self.last_evaluation
        if last is None:
            return None
        if stop.mean_return is not None and last.mean >= stop.mean_return:
            return f"solved: mean return {last.mean:.1f} ≥ {stop.mean_return:g}"
        if stop.success is not None and last.success is not None and last.success >= stop.success:
            return f"solved: success {last.success:.2f} ≥ {stop.success:g}"
        return None

    def _done(self) -> str | None:
        steps, done = self.config.stop.steps, self.counts.env_steps
        return f"{done} of {steps} environment steps done" if steps is not None and done >= steps else None
