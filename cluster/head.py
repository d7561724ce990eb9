"""The head's books in a control run: environment steps, episodes, returns, and the replay they fill.

Who runs the processes they are about is decided by the caller: `cluster.ray_control` under Ray, `cluster.sync` in one process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cluster.books import Books, CommonCounts, Moment
from configs.schema import RunConfig


@dataclass
class Counts(CommonCounts):
    """What a control run has done since it was first started, over all its resumptions and restarts."""

    env_steps: int = 0
    sampled: int = 0
    episodes: int = 0
    broken_episodes: int = 0
    trained_steps: int = 0  # environment steps taken during `trained_s`


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one policy version."""

    step: int
    version: int
    returns: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        return math.fsum(self.returns) / len(self.returns)

    @property
    def std(self) -> float:
        """Population standard deviation of the returns."""
        return math.sqrt(math.fsum((r - self.mean) ** 2 for r in self.returns) / len(self.returns))

    @property
    def score(self) -> float:
        """The mean return."""
        return self.mean

    @property
    def text(self) -> str:
        """The evaluation in one line."""
        return (
            f"evaluation at step {self.step}: mean return {self.mean:.1f} ± {self.std:.1f} over {len(self.returns)} "
            f"episodes in {self.seconds:.1f} s"
        )

    def row(self) -> dict[str, float]:
        """Its metrics."""
        return {
            "eval/mean_return": self.mean,
            "eval/std_return": self.std,
            "eval/episodes": len(self.returns),
            "eval/seconds": self.seconds,
            "eval/step": self.step,
        }


@dataclass
class Tick(Moment):
    """Status of every process at one moment, with what has ended since the last one."""

    returns: Sequence[float] = ()  # of the episodes finished since the last tick
    lengths: Sequence[int] = ()


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
        if state is not None:
            self._returns.extend(state["returns"])
            self._lengths.extend(state["lengths"])
            if (extent := state.get("return_extent")) is not None:
                self.return_extent = (float(extent[0]), float(extent[1]))

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
        own = {"returns": list(self._returns), "lengths": list(self._lengths), "return_extent": self.return_extent}
        return super().state() | own

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
            "best_mean_return": self.best,
        }

    def _take_in(self, moment: Tick) -> None:
        counts = self.counts
        for name, stats in moment.actors.items():
            counts.episodes += int(self._delta(name, stats, "episodes"))
            counts.broken_episodes += int(self._delta(name, stats, "broken_episodes"))
            self._add_seconds("actor", name, stats, "")
            if (extent := stats.get("return_extent")) is not None:
                low, high = self.return_extent or extent
                self.return_extent = (min(low, extent[0]), max(high, extent[1]))
        self._returns.extend(moment.returns)
        self._lengths.extend(moment.lengths)

    def _counted(self) -> dict[str, float]:
        counts = self.counts
        return {
            "env_steps": counts.env_steps,
            "episodes": counts.episodes,
            "broken_episodes": counts.broken_episodes,
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
        return row

    def _solved(self) -> str | None:
        goal, last = self.config.stop.mean_return, self.last_evaluation
        if goal is None or last is None or last.mean < goal:
            return None
        return f"solved: mean return {last.mean:.1f} ≥ {goal:g}"

    def _done(self) -> str | None:
        steps, done = self.config.stop.steps, self.counts.env_steps
        return f"{done} of {steps} environment steps done" if steps is not None and done >= steps else None
