"""What the head of any run knows and decides: counts, evaluations, when to checkpoint, when to stop, and what is stuck.

Pure bookkeeping. It is fed the status of the other processes and answers with a metrics row and with what is due; who
runs those processes is decided by its caller.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from cluster.runs import AnyConfig

STALL_S = 30.0
SILENT_S = 5.0  # a process that answers later than this is named as one that does not
Stats = Mapping[str, Any]


@dataclass
class CommonCounts:
    """What a run of any kind has done since it was first started, over all its resumptions and restarts."""

    updates: int = 0
    updates_lost: int = 0
    restarts: int = 0
    incarnation: int = 0  # times the run was started or resumed; part of the seeds of actors
    version: int = 0  # highest policy version ever published
    time_s: float = 0.0  # since the first work of an actor, time between a stop and its resumption left out
    eval_s: float = 0.0  # spent in evaluations, beside training or (one-process mode) instead of it
    trained_s: float = 0.0  # part of time_s that throughput is reckoned over: no evaluation ran


class Measured(Protocol):
    """One evaluation of one policy version."""

    @property
    def step(self) -> int:
        """`Books.step` when the policy was taken."""

    @property
    def seconds(self) -> float:
        """Time it took."""

    @property
    def score(self) -> float:
        """What the best policy is chosen by; higher is better."""

    @property
    def text(self) -> str:
        """The evaluation in one line."""

    def row(self) -> dict[str, float]:
        """Its metrics, each named `eval/…`."""


@dataclass
class Moment:
    """Status of every process at one moment. The keys of `actors`, `shards` tell processes apart over restarts."""

    time: float  # monotonic seconds
    actors: Mapping[str, Stats] = field(default_factory=dict)
    shards: Mapping[str, Stats] = field(default_factory=dict)
    learner: Stats = field(default_factory=dict)
    learner_metrics: Mapping[str, float] = field(default_factory=dict)
    evaluating: bool = False  # an evaluation runs beside training
    paused_s: float = 0.0  # training stood still for evaluations since the last one
    ending: bool = False  # processes are being stopped
    first_step: float | None = None  # monotonic time of the first work of an actor since the start


class Books(ABC):
    """Bookkeeping of one run; what is particular to a kind of run stands in a subclass.

    Two counts have a meaning of their own: `step` is the unit in which evaluations are scheduled and checkpoints are named,
    and `work` is what actors do: throughput and the run's clock are of it.
    """

    SHARD_COUNTS: ClassVar[Mapping[str, str]]  # counter in a shard's status → the count that sums it over all shards

    def __init__(
        self, config: AnyConfig, counts: CommonCounts, *, wall_started: float, state: Mapping[str, Any] | None
    ) -> None:
        """
        counts: those of `state`, or fresh ones.
        wall_started: monotonic time at which the command was started.
        state: what `state` returned before the run was stopped, or `live_state` before the head died.
        """
        self.config = config
        self.counts = counts
        self.best: float | None = None
        self.last_evaluation: Measured | None = None
        self._next_eval = config.eval.every
        if state is not None:
            self.best = state["best"]
            self._next_eval = state["next_eval"]
        live = None if state is None else state.get("live")
        if live is None:
            counts.incarnation += 1
        self._wall_started = wall_started
        self._time_before = counts.time_s
        self.first_step_at: float | None = None  # monotonic
        self._last: dict[str, dict[str, float]] = {}  # newest counters of each process
        self._seconds: dict[str, float] = {}  # "time/<kind>/<state>" → seconds over all processes and restarts
        self._previous: Moment | None = None
        self._previous_counts = (0, 0, 0)  # step, work, updates
        self._rate: float | None = None  # of `step`, per second
        self._moved_at: float | None = None
        self._stall_told = False
        self._checkpointed_at = wall_started
        self._pending_evaluation: Measured | None = None
        if live is not None:
            self._go_on(live)

    # ------------------------------------------------------- of a kind of run

    @property
    @abstractmethod
    def step(self) -> int:
        """How far the run is, in the unit of `eval.every`."""

    @property
    @abstractmethod
    def work(self) -> int:
        """What actors have done so far."""

    @property
    @abstractmethod
    def _stop_step(self) -> float:
        """`step` at which the run stops; infinite where another count or nothing decides."""

    @abstractmethod
    def _take_in(self, moment: Any) -> None:
        """Count what actors have done, their seconds as well, and what else only this kind of run has."""

    @abstractmethod
    def _counted(self) -> dict[str, float]:
        """The counts of this kind of run for a metrics row."""

    @abstractmethod
    def _trained(self, work: int, seconds: float) -> dict[str, float]:
        """Note the work done in some seconds of undisturbed training; its throughput for the metrics row."""

    @abstractmethod
    def _row(self, moment: Any) -> dict[str, float]:
        """Whatever else of this kind of run belongs into a metrics row."""

    @abstractmethod
    def _solved(self) -> str | None:
        """Why the last evaluation ends the run; None where it does not."""

    @abstractmethod
    def _done(self) -> str | None:
        """Why the counts of this kind of run end it; None where they do not."""

    # ------------------------------------------------------------------ counts

    def rebase(self, process: str, stats: Stats) -> None:
        """A process was started again: what its counters now say was counted before."""
        self._last[process] = {k: float(v) for k, v in stats.items() if isinstance(v, int | float)}

    def forget(self, process: str) -> None:
        """A process is gone whose counters were counted, and nobody takes its place."""
        self._last.pop(process, None)

    def recovered(self, shard: str, stats: Stats) -> None:
        """A shard was started again with the rows of the one before, those since its last status as well; its clocks are new."""
        before = self._last.get(shard, {})
        self.rebase(shard, stats)
        self._last[shard] |= {key: before.get(key, 0.0) for key in self.SHARD_COUNTS}

    def count_shards(self, shards: Mapping[str, Stats]) -> None:
        """Count what shards have taken in and given out since their counters were last seen."""
        for name, stats in shards.items():
            last = self._last.setdefault(name, {})
            for key, count in self.SHARD_COUNTS.items():
                new = float(stats[key])
                setattr(self.counts, count, getattr(self.counts, count) + int(new - last.get(key, 0.0)))
                last[key] = new

    def _delta(self, process: str, stats: Stats, key: str) -> float:
        return float(stats.get(key, 0.0)) - self._last.get(process, {}).get(key, 0.0)

    def _add_seconds(self, kind: str, process: str, stats: Stats, prefix: str) -> None:
        for key in stats:
            if key.startswith(prefix) and key.endswith("_s") and key != "silent_s":
                name = f"time/{kind}/{key.removeprefix(prefix)}"
                self._seconds[name] = self._seconds.get(name, 0.0) + self._delta(process, stats, key)

    def _count(self, moment: Moment) -> None:
        counts = self.counts
        self.count_shards(moment.shards)
        for name, stats in moment.shards.items():
            self._add_seconds("shard", name, stats, "time/")
        self._take_in(moment)
        if moment.learner:
            counts.updates = int(moment.learner["updates"])
            counts.version = max(counts.version, int(moment.learner["version"]))
            self._add_seconds("learner", "learner", moment.learner, "")
        for name, stats in (*moment.shards.items(), *moment.actors.items(), ("learner", moment.learner)):
            self.rebase(name, stats)

    @property
    def _progress(self) -> tuple[int, int, int]:
        return self.step, self.work, self.counts.updates

    # ------------------------------------------------------------------- ticks

    def tick(self, moment: Moment) -> dict[str, float]:
        """Take in the status of all processes; the metrics row of this moment."""
        counts, previous = self.counts, self._previous
        step_before, work_before, updates_before = self._previous_counts if previous else self._progress
        self._count(moment)
        self._set_clock(moment, moved=self.work > work_before)
        row: dict[str, float] = {
            "time_s": counts.time_s,
            "wall_s": moment.time - self._wall_started,
            **self._counted(),
            "updates": counts.updates,
            "updates_lost": counts.updates_lost,
            "restarts": counts.restarts,
            "policy_version": counts.version,
        }
        if previous is not None and moment.time > previous.time:
            seconds = moment.time - previous.time - moment.paused_s
            if self.step > step_before:  # between two writes of the actors nothing seems to move
                self._rate = (self.step - step_before) / (moment.time - previous.time)
            if not (moment.evaluating or previous.evaluating or moment.ending) and self.first_step_at is not None:
                counts.trained_s += seconds
                row |= self._trained(self.work - work_before, seconds)
                row["updates_per_s"] = max(0, counts.updates - updates_before) / seconds
        row |= self._row(moment)
        row |= moment.learner_metrics
        row |= self._seconds
        if self._pending_evaluation is not None:
            row |= self._pending_evaluation.row()
            self._pending_evaluation = None
        if self._moved_at is None or self._progress != self._previous_counts:
            self._moved_at, self._stall_told = moment.time, False
        self._previous, self._previous_counts = moment, self._progress
        return row

    def _set_clock(self, moment: Moment, *, moved: bool) -> None:
        if self.first_step_at is None:
            self.first_step_at = moment.time if moment.first_step is None and moved else moment.first_step
            if self.first_step_at is not None:  # another node's clock may be ahead
                self.first_step_at = min(self.first_step_at, moment.time)
        if self.first_step_at is not None:
            self.counts.time_s = self._time_before + moment.time - self.first_step_at

    def stall(self) -> str | None:
        """One line that names who waits for whom, once after nothing moved for `STALL_S`; else None."""
        moment = self._previous
        if moment is None or self._moved_at is None or self._stall_told or moment.time - self._moved_at < STALL_S:
            return None
        self._stall_told = True
        processes = {**moment.actors, **moment.shards, "learner": moment.learner}
        silent = {n: s["silent_s"] for n, s in processes.items() if s.get("silent_s", 0.0) > SILENT_S}
        waits = [f"{n} has not answered for {seconds:.0f} s" for n, seconds in silent.items()]
        waits += [f"{n} waits for {s['waiting_for']}" for n, s in moment.actors.items() if s.get("waiting_for")]
        waits += [f"{n}: {text}" for n, s in moment.shards.items() for text in s.get("waiting", ())]
        if moment.learner.get("waiting_for"):
            waits.append(f"learner waits for {moment.learner['waiting_for']}")
        if not moment.learner:
            waits.append("the learner has not started")
        if not moment.actors:
            waits.append("no actor has started")
        reason = "; ".join(waits) or "every process says it is busy"
        return f"nothing moved for {moment.time - self._moved_at:.0f} s: {reason}"

    # --------------------------------------------------------------- decisions

    def evaluation_due(self) -> bool:
        """Whether an evaluation should begin; asking again answers for the next one."""
        every = self.config.eval.every
        if every == 0 or self.step < self._next_eval or self.counts.version == 0:
            return False
        self._next_eval = (self.step // every + 1) * every
        return True

    def evaluated(self, evaluation: Measured) -> bool:
        """Take in an evaluation; it stands in the next metrics row. Returns whether it is the best so far."""
        self.last_evaluation = self._pending_evaluation = evaluation
        self.counts.eval_s += evaluation.seconds
        every = self.config.eval.every
        if every and evaluation.step >= self._next_eval:
            self._next_eval = (evaluation.step // every + 1) * every
        if self.best is not None and evaluation.score <= self.best:
            return False
        self.best = evaluation.score
        return True

    @property
    def evaluation_now(self) -> float | None:
        """Score of the evaluation made at the present step; None if there was none."""
        last = self.last_evaluation
        return last.score if last is not None and last.step == self.step else None

    def checkpoint_due(self, now: float) -> bool:
        """Whether `checkpoints.every_s` have passed since the last checkpoint."""
        return now - self._checkpointed_at >= self.config.checkpoints.every_s

    def checkpointed(self, now: float) -> None:
        """A checkpoint was written."""
        self._checkpointed_at = now

    def stop_reason(self) -> str | None:
        """Why training ends now; None while it goes on."""
        if (reason := self._solved() or self._done()) is not None:
            return reason
        wall_s = self.config.stop.wall_s
        if wall_s is not None and self.counts.time_s >= wall_s:
            return f"{self.counts.time_s:.0f} of {wall_s:g} s are over"
        return None

    @property
    def final_evaluation_due(self) -> bool:
        """Whether a run that has reached its end is to be evaluated once more, with its last weights."""
        ended = self.config.eval.every > 0 and self.stop_reason() is not None and self.counts.version > 0
        return ended and self._solved() is None and self.evaluation_now is None

    def seconds_to_due(self) -> float:
        """Time until the next evaluation or the stop is due, at the present rate; infinite where nothing moves."""
        ahead = [due for due in (self.next_due, self._stop_step) if due > self.step]
        return (min(ahead) - self.step) / self._rate if ahead and self._rate else math.inf

    @property
    def next_due(self) -> float:
        """`step` at which an evaluation or the stop is due next."""
        evaluation = self._next_eval if self.config.eval.every else math.inf
        return min(evaluation, self._stop_step)

    # ------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"counts": asdict(self.counts), "best": self.best, "next_eval": self._next_eval}

    def live_state(self) -> dict[str, Any]:
        """What a new head needs to go on with the same processes, as JSON; evaluations are left out (`restore_evaluation`).

        The counts, and what each process told when they were taken: what it has done since is the difference.
        """
        live = {
            "last": {name: dict(stats) for name, stats in self._last.items()},
            "seconds": dict(self._seconds),
            "rate": self._rate,
            "time_before": self._time_before,
            # Seconds since the command was started, for a monotonic clock is of one process.
            "first_step": None if self.first_step_at is None else self.first_step_at - self._wall_started,
            "checkpointed": self._checkpointed_at - self._wall_started,
        }
        return self.state() | {"live": live}

    def _go_on(self, live: Mapping[str, Any]) -> None:
        self._last = {name: dict(stats) for name, stats in live["last"].items()}
        self._seconds = dict(live["seconds"])
        self._rate = live["rate"]
        self._time_before = live["time_before"]
        if live["first_step"] is not None:
            self.first_step_at = self._wall_started + live["first_step"]
        self._checkpointed_at = self._wall_started + live["checkpointed"]

    @property
    def evaluation_row_due(self) -> bool:
        """Whether the last evaluation is still to stand in a metrics row."""
        return self._pending_evaluation is not None

    def restore_evaluation(self, evaluation: Measured, *, row_due: bool) -> None:
        """The last evaluation that the head which died has taken in."""
        self.last_evaluation = evaluation
        self._pending_evaluation = evaluation if row_due else None

    def summary(self, *, stop_reason: str) -> dict[str, Any]:
        """How the run ended."""
        counts = self.counts
        return {
            "stop_reason": stop_reason,
            "updates": counts.updates,
            "updates_lost": counts.updates_lost,
            "restarts": counts.restarts,
            "time_s": counts.time_s,
            "eval_s": counts.eval_s,
        }
