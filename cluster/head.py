"""What the head knows and decides: counts, evaluations, when to checkpoint, when to stop, and what is stuck.

Pure bookkeeping. It is fed the status of the other processes and answers with a metrics row and with what is due; who
runs those processes is decided by its caller: `cluster.ray_head` under Ray, `cluster.sync` in one process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.schema import RunConfig

STALL_S = 30.0
SILENT_S = 5.0  # a process that answers later than this is named as one that does not
Stats = Mapping[str, Any]


@dataclass
class Counts:
    """What a run has done since it was first started, over all its resumptions and restarts."""

    env_steps: int = 0
    sampled: int = 0
    updates: int = 0
    updates_lost: int = 0
    episodes: int = 0
    broken_episodes: int = 0
    restarts: int = 0
    incarnation: int = 0  # times the run was started or resumed; part of the seeds of actors
    version: int = 0  # highest policy version ever published
    time_s: float = 0.0  # since the first environment step, time between a stop and its resumption left out
    eval_s: float = 0.0  # spent in evaluations, beside training or (one-process mode) instead of it
    trained_s: float = 0.0  # part of time_s that throughput is reckoned over: no evaluation ran
    trained_steps: int = 0  # environment steps taken meanwhile


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
    def text(self) -> str:
        """The evaluation in one line."""
        return (
            f"evaluation at step {self.step}: mean return {self.mean:.1f} ± {self.std:.1f} over {len(self.returns)} "
            f"episodes in {self.seconds:.1f} s"
        )


@dataclass
class Tick:
    """Status of every process at one moment. The keys of `actors`, `shards` tell processes apart over restarts."""

    time: float  # monotonic seconds
    actors: Mapping[str, Stats] = field(default_factory=dict)
    shards: Mapping[str, Stats] = field(default_factory=dict)
    learner: Stats = field(default_factory=dict)
    learner_metrics: Mapping[str, float] = field(default_factory=dict)
    returns: Sequence[float] = ()  # of the episodes finished since the last tick
    lengths: Sequence[int] = ()
    evaluating: bool = False  # an evaluation runs beside training
    paused_s: float = 0.0  # training stood still for evaluations since the last tick
    ending: bool = False  # processes are being stopped
    first_step: float | None = None  # monotonic time of the first environment step since the start


class Head:
    """Bookkeeping of one run."""

    def __init__(self, config: RunConfig, *, wall_started: float, state: Mapping[str, Any] | None = None) -> None:
        """
        wall_started: monotonic time at which the command was started.
        state: what `state` returned before the run was stopped.
        """
        self.config = config
        self.counts = Counts()
        self.best: float | None = None
        self.last_evaluation: Evaluation | None = None
        self.return_extent: tuple[float, float] | None = None  # lowest and highest discounted return actors ever met
        self._next_eval = config.eval.every
        self._returns: deque[float] = deque(maxlen=100)
        self._lengths: deque[int] = deque(maxlen=100)
        if state is not None:
            self.counts = Counts(**state["counts"])
            self.best = state["best"]
            self._next_eval = state["next_eval"]
            self._returns.extend(state["returns"])
            self._lengths.extend(state["lengths"])
            if (extent := state.get("return_extent")) is not None:
                self.return_extent = (float(extent[0]), float(extent[1]))
        self.counts.incarnation += 1
        self._wall_started = wall_started
        self._time_before = self.counts.time_s
        self.first_step_at: float | None = None  # monotonic
        self._last: dict[str, dict[str, float]] = {}  # newest counters of each process
        self._seconds: dict[str, float] = {}  # "time/<kind>/<state>" → seconds over all processes and restarts
        self._previous: Tick | None = None
        self._previous_counts = (0, 0)
        self._rate: float | None = None
        self._moved_at: float | None = None
        self._stall_told = False
        self._checkpointed_at = wall_started
        self._pending_evaluation: Evaluation | None = None

    # ------------------------------------------------------------------ counts

    def rebase(self, process: str, stats: Stats) -> None:
        """A process was started again: what its counters now say was counted before."""
        self._last[process] = {k: float(v) for k, v in stats.items() if isinstance(v, int | float)}

    def recovered(self, shard: str, stats: Stats) -> None:
        """A shard was started again with the steps of the one before, those since its last status as well; its clocks are new."""
        before = self._last.get(shard, {})
        self.rebase(shard, stats)
        self._last[shard] |= {key: before.get(key, 0.0) for key in ("inserted", "sampled")}

    def _delta(self, process: str, stats: Stats, key: str) -> float:
        return float(stats.get(key, 0.0)) - self._last.get(process, {}).get(key, 0.0)

    def _count(self, tick: Tick) -> None:
        counts = self.counts
        self.count_shards(tick.shards)
        for name, stats in tick.shards.items():
            self._add_seconds("shard", name, stats, "time/")
        for name, stats in tick.actors.items():
            counts.episodes += int(self._delta(name, stats, "episodes"))
            counts.broken_episodes += int(self._delta(name, stats, "broken_episodes"))
            self._add_seconds("actor", name, stats, "")
            if (extent := stats.get("return_extent")) is not None:
                low, high = self.return_extent or extent
                self.return_extent = (min(low, extent[0]), max(high, extent[1]))
        if tick.learner:
            counts.updates = int(tick.learner["updates"])
            counts.version = max(counts.version, int(tick.learner["version"]))
            self._add_seconds("learner", "learner", tick.learner, "")
        for name, stats in (*tick.shards.items(), *tick.actors.items(), ("learner", tick.learner)):
            self.rebase(name, stats)
        self._returns.extend(tick.returns)
        self._lengths.extend(tick.lengths)

    def count_shards(self, shards: Mapping[str, Stats]) -> None:
        """Count what shards have taken in and given out since their counters were last seen."""
        for name, stats in shards.items():
            last = self._last.setdefault(name, {})
            for key, count in (("inserted", "env_steps"), ("sampled", "sampled")):
                new = float(stats[key])
                setattr(self.counts, count, getattr(self.counts, count) + int(new - last.get(key, 0.0)))
                last[key] = new

    def _add_seconds(self, kind: str, process: str, stats: Stats, prefix: str) -> None:
        for key in stats:
            if key.startswith(prefix) and key.endswith("_s") and key != "silent_s":
                name = f"time/{kind}/{key.removeprefix(prefix)}"
                self._seconds[name] = self._seconds.get(name, 0.0) + self._delta(process, stats, key)

    # ------------------------------------------------------------------- ticks

    def tick(self, tick: Tick) -> dict[str, float]:
        """Take in the status of all processes; the metrics row of this moment."""
        counts, previous = self.counts, self._previous
        steps_before, updates_before = self._previous_counts if previous else (counts.env_steps, counts.updates)
        self._count(tick)
        if self.first_step_at is None:
            moved = counts.env_steps > steps_before
            self.first_step_at = tick.time if tick.first_step is None and moved else tick.first_step
            if self.first_step_at is not None:  # another node's clock may be ahead
                self.first_step_at = min(self.first_step_at, tick.time)
        if self.first_step_at is not None:
            counts.time_s = self._time_before + tick.time - self.first_step_at
        row: dict[str, float] = {
            "time_s": counts.time_s,
            "wall_s": tick.time - self._wall_started,
            "env_steps": counts.env_steps,
            "episodes": counts.episodes,
            "broken_episodes": counts.broken_episodes,
            "updates": counts.updates,
            "updates_lost": counts.updates_lost,
            "restarts": counts.restarts,
            "policy_version": counts.version,
        }
        if previous is not None and tick.time > previous.time:
            seconds = tick.time - previous.time - tick.paused_s
            if counts.env_steps > steps_before:  # between two writes of the actors nothing seems to move
                self._rate = (counts.env_steps - steps_before) / (tick.time - previous.time)
            if not (tick.evaluating or previous.evaluating or tick.ending) and self.first_step_at is not None:
                counts.trained_s += seconds
                counts.trained_steps += counts.env_steps - steps_before
                row["steps_per_s"] = (counts.env_steps - steps_before) / seconds
                row["updates_per_s"] = max(0, counts.updates - updates_before) / seconds
        size = sum(int(s["items"]) for s in tick.shards.values())
        capacity = sum(int(s["capacity"]) for s in tick.shards.values())
        row["replay_size"], row["replay_capacity"] = size, capacity
        row["replay_fill"] = size / capacity if capacity else 0.0
        after_warm_up = counts.env_steps - self.config.replay.min_size
        if after_warm_up > 0:
            row["samples_per_insert"] = counts.sampled / after_warm_up
        if self._returns:
            row["return_mean_100"] = math.fsum(self._returns) / len(self._returns)
            row["length_mean_100"] = math.fsum(self._lengths) / len(self._lengths)
        versions = [float(s["version"]) for s in tick.actors.values() if s.get("version")]
        if versions and not tick.ending:
            row["policy_lag"] = counts.version - math.fsum(versions) / len(versions)
        row |= tick.learner_metrics
        row |= self._seconds
        if (evaluation := self._pending_evaluation) is not None:
            row |= {
                "eval/mean_return": evaluation.mean,
                "eval/std_return": evaluation.std,
                "eval/episodes": len(evaluation.returns),
                "eval/seconds": evaluation.seconds,
                "eval/step": evaluation.step,
            }
            self._pending_evaluation = None
        if self._moved_at is None or (counts.env_steps, counts.updates) != self._previous_counts:
            self._moved_at, self._stall_told = tick.time, False
        self._previous, self._previous_counts = tick, (counts.env_steps, counts.updates)
        return row

    def stall(self) -> str | None:
        """One line that names who waits for whom, once after nothing moved for `STALL_S`; else None."""
        tick = self._previous
        if tick is None or self._moved_at is None or self._stall_told or tick.time - self._moved_at < STALL_S:
            return None
        self._stall_told = True
        processes = {**tick.actors, **tick.shards, "learner": tick.learner}
        silent = {n: s["silent_s"] for n, s in processes.items() if s.get("silent_s", 0.0) > SILENT_S}
        waits = [f"{n} has not answered for {seconds:.0f} s" for n, seconds in silent.items()]
        waits += [f"{n} waits for {s['waiting_for']}" for n, s in tick.actors.items() if s.get("waiting_for")]
        waits += [f"{n}: {text}" for n, s in tick.shards.items() for text in s.get("waiting", ())]
        if tick.learner.get("waiting_for"):
            waits.append(f"learner waits for {tick.learner['waiting_for']}")
        if not tick.learner:
            waits.append("the learner has not started")
        if not tick.actors:
            waits.append("no actor has started")
        reason = "; ".join(waits) or "every process says it is busy"
        return f"nothing moved for {tick.time - self._moved_at:.0f} s: {reason}"

    # --------------------------------------------------------------- decisions

    def evaluation_due(self) -> bool:
        """Whether an evaluation should begin; asking again answers for the next one."""
        every = self.config.eval.every
        if every == 0 or self.counts.env_steps < self._next_eval or self.counts.version == 0:
            return False
        self._next_eval = (self.counts.env_steps // every + 1) * every
        return True

    def evaluated(self, evaluation: Evaluation) -> bool:
        """Take in an evaluation; it stands in the next metrics row. Returns whether it is the best so far."""
        self.last_evaluation = self._pending_evaluation = evaluation
        self.counts.eval_s += evaluation.seconds
        every = self.config.eval.every
        if every and evaluation.step >= self._next_eval:
            self._next_eval = (evaluation.step // every + 1) * every
        if self.best is not None and evaluation.mean <= self.best:
            return False
        self.best = evaluation.mean
        return True

    @property
    def evaluation_now(self) -> float | None:
        """Mean return of the evaluation made at the present step; None if there was none."""
        last = self.last_evaluation
        return last.mean if last is not None and last.step == self.counts.env_steps else None

    def checkpoint_due(self, now: float) -> bool:
        """Whether `checkpoints.every_s` have passed since the last checkpoint."""
        return now - self._checkpointed_at >= self.config.checkpoints.every_s

    def checkpointed(self, now: float) -> None:
        """A checkpoint was written."""
        self._checkpointed_at = now

    def stop_reason(self) -> str | None:
        """Why training ends now; None while it goes on."""
        stop, counts = self.config.stop, self.counts
        if self.last_evaluation is not None and self._solved:
            return f"solved: mean return {self.last_evaluation.mean:.1f} ≥ {stop.mean_return:g}"
        if stop.steps is not None and counts.env_steps >= stop.steps:
            return f"{counts.env_steps} of {stop.steps} environment steps done"
        if stop.wall_s is not None and counts.time_s >= stop.wall_s:
            return f"{counts.time_s:.0f} of {stop.wall_s:g} s are over"
        return None

    @property
    def _solved(self) -> bool:
        goal, last = self.config.stop.mean_return, self.last_evaluation
        return goal is not None and last is not None and last.mean >= goal

    @property
    def final_evaluation_due(self) -> bool:
        """Whether a run that has reached its end is to be evaluated once more, with its last weights."""
        ended = self.config.eval.every > 0 and self.stop_reason() is not None and self.counts.version > 0
        return ended and not self._solved and self.evaluation_now is None

    def seconds_to_due(self) -> float:
        """Time until the next evaluation or the stop is due, at the present rate; infinite where nothing moves."""
        stop = self.config.stop.steps or math.inf
        ahead = [due for due in (self.next_due, stop) if due > self.counts.env_steps]
        return (min(ahead) - self.counts.env_steps) / self._rate if ahead and self._rate else math.inf

    @property
    def next_due(self) -> float:
        """Environment steps at which an evaluation or the stop is due next."""
        evaluation = self._next_eval if self.config.eval.every else math.inf
        return min(evaluation, self.config.stop.steps or math.inf)

    @property
    def random_steps_left(self) -> int:
        """Steps of `actors.random_steps` that are still to be taken by each actor."""
        left = max(0, self.config.actors.random_steps - self.counts.env_steps)
        return -(-left // self.config.actors.count)

    # ------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {
            "counts": asdict(self.counts),
            "best": self.best,
            "next_eval": self._next_eval,
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "return_extent": self.return_extent,
        }

    def summary(self, *, stop_reason: str) -> dict[str, Any]:
        """How the run ended."""
        counts, last = self.counts, self.last_evaluation
        return {
            "stop_reason": stop_reason,
            "steps": counts.env_steps,
            "updates": counts.updates,
            "updates_lost": counts.updates_lost,
            "episodes": counts.episodes,
            "broken_episodes": counts.broken_episodes,
            "restarts": counts.restarts,
            "time_s": counts.time_s,
            "eval_s": counts.eval_s,
            "steps_per_s": counts.trained_steps / counts.trained_s if counts.trained_s > 0 else None,
            "mean_return": last.mean if last else None,
            "std_return": last.std if last else None,
            "best_mean_return": self.best,
        }
