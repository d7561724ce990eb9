"""What the head of a language-model run knows and decides: counts, waste, evaluations, when to stop.

Pure bookkeeping, as `cluster.head` is for control. The unit in which evaluations are due is the learner step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from textwrap import shorten
from typing import Any, ClassVar

from cluster.books import Books, CommonCounts, Moment, Stats
from cluster.curriculum.forgetting import Forgetting
from configs.llm import LlmConfig

# Counter of an actor's status → field of the counts.
_FATES = ("too_hard_groups", "too_easy_groups", "unscored_groups")  # of groups that are not kept
_ACTOR_COUNTS = (
    "samples",
    "tokens",
    "groups",
    "kept_groups",
    *_FATES,
    "passes",
    "scored",
    "unscored",
    "cut_off",
    "failed",
)
_BY_FAMILY = "/pass_at_1"  # ends the names of what an evaluation says of families
_REASON = 300  # most characters of a verifier's failure that are told
BARREN_BATCHES = 10  # learner steps' worth of groups that end with none kept before that is told
_REMEDIES = {
    "too_hard_groups": "the model passes too seldom to learn from: give it a supervised start (warm_start.steps, or a trained "
    "model.path), easier prompts (tasks.kwargs) or hints (algorithm.hints.shares), or widen the band (curriculum.low)",
    "too_easy_groups": "the prompts are too easy to learn from: take harder ones (tasks.kwargs), or widen the band "
    "(curriculum.high)",
    "unscored_groups": "the verifier fails: correct it (tasks.verifier), or raise its limits (tasks.timeout_s, tasks.memory_mb)",
}
# Limit of a queue that a message names → the setting it follows from.
_LIMITS = {
    "capacity_bytes": "capacity_bytes is replay.capacity_mb divided by replay.shards",
    "max_message_bytes": "max_message_bytes is a quarter of replay.capacity_mb divided by replay.shards, and 16 MiB at most; a "
    "group is one message",
    "max_waiting_groups": "max_waiting_groups is replay.max_waiting_groups divided by replay.shards",
}


@dataclass
class LlmCounts(CommonCounts):
    """What a run has done since it was first started, over all its resumptions and restarts."""

    samples: int = 0  # completions sampled
    tokens: int = 0  # of them
    groups: int = 0  # whole groups that came to an end
    kept_groups: int = 0  # of those, written to the replay service
    too_hard_groups: int = 0  # of those, below the band
    too_easy_groups: int = 0  # above it
    unscored_groups: int = 0  # without enough completions that somebody could judge
    scored: int = 0  # completions judged
    passes: int = 0  # of those, passed
    unscored: int = 0  # completions dropped because nobody could judge them
    cut_off: int = 0  # completions that reached the most tokens
    failed: int = 0  # prompts that could not be sampled
    inserted_groups: int = 0  # taken in by the shards
    consumed_groups: int = 0  # used by the learners, and acknowledged
    dropped_stale_groups: int = 0  # too old, and never used
    trained_samples: int = 0  # completions sampled while throughput was reckoned


@dataclass(frozen=True)
class LlmEvaluation:
    """One evaluation of one policy version; `figures` as `actors.llm.evaluate.summary` names them."""

    step: int
    version: int
    figures: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return float(self.figures["seconds"])

    @property
    def score(self) -> float:
        """pass@1: what the best evaluation is the best in."""
        return float(self.figures["pass_at_1"])

    @property
    def text(self) -> str:
        figures = self.figures
        more = "".join(f", pass@{k.removeprefix('pass_at_')} {v:.3f}" for k, v in figures.items() if _is_more(k))
        return (
            f"evaluation at learner step {self.step}: pass@1 {self.score:.3f} ± {figures['pass_at_1_error']:.3f}, greedy "
            f"{figures['greedy']:.3f}{more} over {figures['prompts']:.0f} prompts in {self.seconds:.1f} s"
        )

    def row(self) -> dict[str, float]:
        """Its metrics."""
        return {"eval/step": float(self.step), **{f"eval/{name}": value for name, value in self.figures.items()}}


def _is_more(name: str) -> bool:
    return name.startswith("pass_at_") and name.removeprefix("pass_at_").isdecimal() and name != "pass_at_1"


@dataclass
class LlmTick(Moment):
    """Status of every process at one moment."""

    desk: Mapping[str, float] = field(default_factory=dict)  # `Desk.metrics`


class LlmHead(Books):
    """Bookkeeping of one run that trains a language model."""

    SHARD_COUNTS: ClassVar[Mapping[str, str]] = {
        name: name for name in ("inserted_groups", "consumed_groups", "dropped_stale_groups")
    }
    config: LlmConfig
    counts: LlmCounts
    last_evaluation: LlmEvaluation | None

    def __init__(self, config: LlmConfig, *, wall_started: float, state: Mapping[str, Any] | None = None) -> None:
        """
        wall_started: monotonic time at which the command was started.
        state: what `state` returned before the run was stopped.
        """
        counts = LlmCounts() if state is None else LlmCounts(**state["counts"])
        super().__init__(config, counts, wall_started=wall_started, state=state)
        self.first: dict[str, float] = {} if state is None else dict(state["first"])
        self._forgetting = Forgetting()
        if state is not None and "forgetting" in state:
            self._forgetting.load_state(state["forgetting"])
        self._changes = 0  # of the curriculum
        self._first_asked = False
        self._before = self._work_done()
        self._new_tokens = 0  # sampled between the last two ticks
        self._fruitful = self._fruits  # as `barren` has last seen them
        self._ended_before = self._ended  # groups that had ended by then
        self._barren_told = False
        self._unscored_reason = ""

    # ------------------------------------------------------------------- units

    @property
    def step(self) -> int:
        return self.counts.updates

    @property
    def work(self) -> int:
        return self.counts.samples

    @property
    def _stop_step(self) -> float:
        return self.config.stop.updates or math.inf

    # ------------------------------------------------------------------- ticks

    def _take_in(self, tick: Moment) -> None:
        counts, tokens_before = self.counts, self.counts.tokens
        for name, stats in tick.actors.items():
            self._unscored_reason = stats.get("unscored_reason") or self._unscored_reason
            for key in _ACTOR_COUNTS:
                setattr(counts, key, getattr(counts, key) + int(self._delta(name, stats, key)))
            self._add_seconds("actor", name, stats, "")
        self._new_tokens = counts.tokens - tokens_before

    def _counted(self) -> dict[str, float]:
        found = asdict(self.counts)
        return {
            # The learner's metrics have tokens of their own.
            **{"sampled_tokens" if key == "tokens" else key: float(found[key]) for key in _ACTOR_COUNTS},
            **{key: float(found[key]) for key in self.SHARD_COUNTS},
            "step": float(self.step),
        }

    def _trained(self, work: int, seconds: float) -> dict[str, float]:
        self.counts.trained_samples += work
        return {"samples_per_s": work / seconds, "sampled_tokens_per_s": self._new_tokens / seconds}

    def _row(self, tick: Moment) -> dict[str, float]:
        assert isinstance(tick, LlmTick)
        self._changes = int(tick.desk.get("curriculum/changes", self._changes))
        counts = self.counts
        row = {
            "waiting_groups": _sum(tick.shards, "waiting_groups"),
            "leased_groups": _sum(tick.shards, "leased_groups"),
        }
        if counts.groups:
            row["kept_share"] = counts.kept_groups / counts.groups
        if counts.scored:
            row["pass_rate"] = counts.passes / counts.scored
        if counts.samples:
            row["length_mean"] = counts.tokens / counts.samples
            row["cut_off_share"] = counts.cut_off / counts.samples
        row["running"] = _sum(tick.actors, "running")
        versions = [float(s["version"]) for s in tick.actors.values() if s.get("version")]
        if versions and not tick.ending:
            row["policy_lag"] = counts.version - math.fsum(versions) / len(versions)
        return row | self._rates(tick) | dict(tick.desk)

    def _work_done(self) -> dict[str, float]:
        """Counts, over the whole run, and the seconds they took, since this process began."""
        names = {"decode_s": "time/actor/decode_s", "update_s": "time/learner/update_s"}
        seconds = {name: self._seconds.get(key, 0.0) for name, key in names.items()}
        return {"tokens": float(self.counts.tokens), "updates": float(self.counts.updates), **seconds}

    def _rates(self, tick: LlmTick) -> dict[str, float]:
        """Tokens per second of decoding and of updating, since the last row."""
        now, before = self._work_done(), self._before
        self._before = now
        more = {name: value - before[name] for name, value in now.items()}
        found = {}
        if more["decode_s"] > 0:
            found["decode_tokens_per_s"] = more["tokens"] / more["decode_s"]
        if more["update_s"] > 0 and more["updates"] > 0 and "tokens" in tick.learner_metrics:
            found["learner_tokens_per_s"] = tick.learner_metrics["tokens"] * more["updates"] / more["update_s"]
        return found

    # --------------------------------------------------------------- warnings

    def stall(self) -> str | None:
        """As `Books.stall`, with the settings that the limits it names follow from."""
        told = super().stall()
        return None if told is None else with_settings(told)

    @property
    def _fruits(self) -> tuple[int, int]:
        return self.counts.kept_groups, self.counts.updates

    @property
    def _ended(self) -> dict[str, int]:
        return {name: getattr(self.counts, name) for name in ("groups", *_FATES)}

    def barren(self) -> str | None:
        """A line, once, when nothing was to be learnt from so many groups that `BARREN_BATCHES` batches could have been; else None.

        A group that is kept, or a learner step, begins anew.
        """
        if self._fruits != self._fruitful:
            self._fruitful, self._ended_before, self._barren_told = self._fruits, self._ended, False
        ended = {name: count - self._ended_before[name] for name, count in self._ended.items()}
        groups = ended.pop("groups")
        if self._barren_told or groups < BARREN_BATCHES * self.config.learners.batch_groups:
            return None
        self._barren_told = True
        shares = [
            f"{100 * count / groups:.0f} % {name.removesuffix('_groups').replace('_', ' ')}"
            for name, count in ended.items()
        ]
        reason = f" (last reason: {shorten(self._unscored_reason, _REASON)})" if self._unscored_reason else ""
        return f"no group was kept of the last {groups}: {', '.join(shares)}{reason}; {_REMEDIES[max(ended, key=ended.__getitem__)]}"

    # --------------------------------------------------------------- decisions

    def evaluated(self, evaluation: LlmEvaluation) -> bool:  # type: ignore[override]
        """As `Books.evaluated`; the first of a run is kept to be compared with the last."""
        if not self.first:
            self.first = dict(evaluation.figures)
        by_family = {
            name.removesuffix(_BY_FAMILY): value
            for name, value in evaluation.figures.items()
            if name.endswith(_BY_FAMILY) and math.isfinite(value)
        }
        if by_family:
            drop, _ = self._forgetting.evaluated(by_family, changes=self._changes)
            evaluation = replace(evaluation, figures={**evaluation.figures, "worst_drop": drop})
        before = self.best
        is_best = super().evaluated(evaluation)
        if math.isfinite(evaluation.score):
            return is_best
        self.best = before  # of no prompt could a completion be judged: that is no comparison
        return False

    def evaluation_due(self) -> bool:
        """As `Books.evaluation_due`; the first is due as soon as there are weights, before anything is learnt by reward."""
        if self.config.eval.every and self.counts.version > 0 and not (self.first or self._first_asked):
            self._first_asked = True  # once: one that fails is not tried again at every look
            return True
        return super().evaluation_due()

    def _solved(self) -> str | None:
        goal, last = self.config.stop.pass_at_1, self.last_evaluation
        if goal is None or last is None or last.score < goal:
            return None
        return f"solved: pass@1 {last.score:.3f} ≥ {goal:g}"

    def _done(self) -> str | None:
        stop, counts = self.config.stop, self.counts
        if stop.updates is not None and counts.updates >= stop.updates:
            return f"{counts.updates} of {stop.updates} learner steps done"
        if stop.samples is not None and counts.samples >= stop.samples:
            return f"{counts.samples} of {stop.samples} completions sampled"
        return None

    # ------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        return {**super().state(), "first": self.first, "forgetting": self._forgetting.state()}

    def summary(self, *, stop_reason: str) -> dict[str, Any]:
        """How the run ended."""
        counts, last = self.counts, self.last_evaluation
        figures = {} if last is None else last.figures
        return {
            **super().summary(stop_reason=stop_reason),
            "samples": counts.samples,
            "tokens": counts.tokens,
            "groups": counts.groups,
            "kept_groups": counts.kept_groups,
            "consumed_groups": counts.consumed_groups,
            "unscored": counts.unscored,
            "pass_at_1": figures.get("pass_at_1"),
            "greedy": figures.get("greedy"),
            "pass_at_1_before": self.first.get("pass_at_1"),
            "greedy_before": self.first.get("greedy"),
            "best_pass_at_1": self.best,
            "samples_per_s": counts.trained_samples / counts.trained_s if counts.trained_s > 0 else None,
        }


def with_settings(text: str) -> str:
    """`text` with the settings that the limits of a queue which it names follow from."""
    found = [told for limit, told in _LIMITS.items() if limit in text.replace(f"replay.{limit}", "")]
    return "; ".join([text, *found])


def _sum(statuses: Mapping[str, Stats], key: str) -> float:
    return math.fsum(float(s.get(key, 0.0)) for s in statuses.values())
