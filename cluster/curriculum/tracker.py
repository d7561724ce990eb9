"""What the head knows of each task: a discounted Beta posterior of its pass rate, shrunk to what its family shows, and more.

A task's prior is the Beta distribution that fits the pass rates of its family (empirical Bayes by moments: Kleinman 1973,
"Proportions with extraneous variance"); its own outcomes, the older the lighter, are added to that. Passes are counts, so the
same record serves groups of completions and episodes of control, which are groups of one. Beside it stand the mean length and
return of an attempt, the learning progress, and the value loss that the learner reports.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Of one imaginary family with pass rates uniform in [0, 1], in groups: what a family is taken for before it shows anything.
PRIOR_GROUPS = 2.0
PRIOR_RATE, PRIOR_CORRELATION = 1 / 2, 1 / 3
# Limits of alpha + beta of a family's prior: no family is so uniform that a hundred attempts of a task say nothing of it.
WEAKEST, STRONGEST = 0.5, 50.0

# The slow record of a task's pass rate forgets so many times more slowly than the posterior does.
SLOWER = 4.0
LOSS_WINDOWS = 64.0  # windows of new value losses after which the earlier ones weigh 1/e

_GROUPS, _RATES, _PAIR_GROUPS, _PAIRS = range(4)  # columns of a family's sums


class Tracker:
    """Pass rates of a fixed set of tasks.

    Each new group of a task first multiplies the task's earlier counts by `discount`, because the pass rate moves while the
    policy learns: with groups of G attempts the counts never weigh more than G / (1 − discount) attempts.

    A family is judged by the first group of each of its tasks alone. Which tasks are drawn again depends on their outcomes, so
    all groups together would say more of the tasks that are drawn than of the family; tasks never tried are alike, and
    their first groups an unbiased sample of what the next untried one will do. `family_discount` forgets those slowly.
    """

    def __init__(self, families: np.ndarray, *, discount: float = 0.8, family_discount: float = 0.99) -> None:
        """
        Args:
            families: int (tasks,), number of each task's family, from 0.
            discount: what a task's earlier counts weigh after each new group of it, in (0, 1].
            family_discount: what a family's earlier first groups weigh after each new one, in (0, 1].

        Raises:
            ValueError: no tasks, a negative family, or a discount out of range.
        """
        families = np.asarray(families)
        if families.ndim != 1 or not len(families) or families.dtype.kind not in "iu" or families.min() < 0:
            raise ValueError(
                f"families are {families.dtype} {families.shape}; expected integers from 0, one for each of 1 or more tasks"
            )
        for name, value in (("discount", discount), ("family_discount", family_discount)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"{name} is {value}; expected a number above 0 and at most 1")
        self.families = families.astype(np.int32)
        self.discount = discount
        self.family_discount = family_discount
        self.slow_discount = 1.0 - (1.0 - discount) / SLOWER
        self._recorded = np.zeros(2, np.int64)  # groups, and value losses of tasks
        self.attempts = np.zeros(len(families), np.int64)  # (tasks,), not discounted; 0 is a task never tried
        self.last_solved = np.full(len(families), -1, np.int64)  # (tasks,), `groups` at the latest pass; −1 is never
        self.best = np.zeros(len(families))  # (tasks,), highest pass rate that was predicted after a group of the task
        self.losses = np.full(len(families), np.nan)  # (tasks,), mean |TD error|; nan is never reported
        self._passes = np.zeros(len(families))
        self._failures = np.zeros(len(families))
        self._slow_passes = np.zeros(len(families))
        self._slow_attempts = np.zeros(len(families))
        # (tasks, 2): sums over attempts, and the attempts, both discounted
        self._lengths = np.zeros((len(families), 2))
        self._returns = np.zeros((len(families), 2))
        self._family_sums = np.zeros((int(families.max()) + 1, 4))

    def __len__(self) -> int:
        return len(self.families)

    @property
    def groups(self) -> int:
        """Groups recorded so far, over all tasks."""
        return int(self._recorded[0])

    @property
    def scores(self) -> int:
        """Value losses of tasks taken in so far."""
        return int(self._recorded[1])

    @property
    def once_solved(self) -> np.ndarray:
        """bool (tasks,): at least one attempt ever passed."""
        return self.last_solved >= 0

    def record(
        self,
        tasks: np.ndarray,
        passes: np.ndarray,
        attempts: np.ndarray,
        lengths: np.ndarray | None = None,
        returns: np.ndarray | None = None,
    ) -> None:
        """Take in the outcomes of groups.

        Groups of one task in one call count as of one moment: the result does not depend on their order, and together they
        weigh what they would one after another. A group of 0 attempts (none of them could be scored) changes nothing.

        Args:
            tasks: int (groups,), number of each group's task; a task may come several times.
            passes: int (groups,), attempts that passed.
            attempts: int (groups,), attempts that were scored.
            lengths: float (groups,), mean length of a group's attempts, in tokens or environment steps; nan, or None for all,
                where it is not known, which leaves the task's as it is.
            returns: float (groups,), mean of their undiscounted returns, or nan or None, alike.

        Raises:
            ValueError: shapes differ, a task does not exist, passes are not within 0 and attempts, or a length or return is
                infinite; nothing was recorded.
        """
        tasks, passes, attempts = (np.asarray(values, np.int64) for values in (tasks, passes, attempts))
        if tasks.ndim != 1 or tasks.shape != passes.shape or tasks.shape != attempts.shape:
            raise ValueError(
                f"tasks {tasks.shape}, passes {passes.shape} and attempts {attempts.shape} came; expected one of each per group"
            )
        self._check_tasks(tasks)
        if (wrong := np.flatnonzero((passes < 0) | (passes > attempts))).size:
            at = wrong[0]
            raise ValueError(
                f"task {tasks[at]} came with {passes[at]} passes of {attempts[at]} attempts; expected 0 to attempts"
            )
        scored = attempts > 0
        measures = []
        for name, means, record in (("lengths", lengths, self._lengths), ("returns", returns, self._returns)):
            if means is not None:
                means = np.asarray(means, np.float64)
                if means.shape != tasks.shape or np.isinf(means).any():
                    raise ValueError(
                        f"{name} {means.shape} came for {len(tasks)} groups; expected a number or nan for each"
                    )
                measures.append((means, record))
        rows, group_of, repeats = np.unique(tasks[scored], return_inverse=True, return_counts=True)
        passed = np.bincount(group_of, passes[scored], len(rows))
        tried = np.bincount(group_of, attempts[scored], len(rows))

        self._record_first(rows, passed, tried)
        old, new = _weights(self.discount, repeats)
        self._passes[rows] = old * self._passes[rows] + new * passed
        self._failures[rows] = old * self._failures[rows] + new * (tried - passed)
        old, new = _weights(self.slow_discount, repeats)
        self._slow_passes[rows] = old * self._slow_passes[rows] + new * passed
        self._slow_attempts[rows] = old * self._slow_attempts[rows] + new * tried
        self.attempts[rows] += tried.astype(np.int64)
        self._recorded[0] += int(scored.sum())
        self.last_solved[rows[passed > 0]] = self.groups
        alpha, beta = self.posterior(rows)
        self.best[rows] = np.maximum(self.best[rows], alpha / (alpha + beta))
        for means, record in measures:
            told = scored & ~np.isnan(means)
            self._record_means(record, tasks[told], means[told], attempts[told])

    def _record_means(self, record: np.ndarray, tasks: np.ndarray, means: np.ndarray, attempts: np.ndarray) -> None:
        rows, group_of, repeats = np.unique(tasks, return_inverse=True, return_counts=True)
        added = np.stack([np.bincount(group_of, w, len(rows)) for w in (means * attempts, attempts)], axis=1)
        old, new = _weights(self.discount, repeats)
        record[rows] = old[:, None] * record[rows] + new[:, None] * added

    def _record_first(self, rows: np.ndarray, passed: np.ndarray, tried: np.ndarray) -> None:
        first = self.attempts[rows] == 0
        passed, tried = passed[first], tried[first]
        # Two attempts of a task both pass with probability p²: their share shows how pass rates scatter, free of the noise
        # of small groups.
        pairs = tried >= 2
        sums = np.stack(
            [
                np.ones(len(passed)),
                passed / tried,
                pairs.astype(np.float64),
                np.where(pairs, passed * (passed - 1) / np.maximum(1.0, tried * (tried - 1)), 0.0),
            ],
            axis=1,
        )
        families, group_of, repeats = np.unique(self.families[rows[first]], return_inverse=True, return_counts=True)
        added = np.zeros((len(families), 4))
        np.add.at(added, group_of, sums)
        old, new = _weights(self.family_discount, repeats)
        self._family_sums[families] = old[:, None] * self._family_sums[families] + new[:, None] * added

    def prior(self, families: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """alpha and beta of families' pass rates, which is what a task never tried is predicted by.

        families: int (n,), None for all. Returns two float64 (n,).
        """
        sums = self._family_sums if families is None else self._family_sums[families]
        rate = (sums[:, _RATES] + PRIOR_GROUPS * PRIOR_RATE) / (sums[:, _GROUPS] + PRIOR_GROUPS)
        # The correlation of two attempts of one task, variance / (rate · (1 − rate)), is 1 / (alpha + beta + 1).
        prior_variance = PRIOR_GROUPS * PRIOR_RATE * (1.0 - PRIOR_RATE)
        between = np.maximum(0.0, sums[:, _PAIRS] - sums[:, _PAIR_GROUPS] * rate**2)
        whole = sums[:, _PAIR_GROUPS] * rate * (1.0 - rate)
        correlation = (between + PRIOR_CORRELATION * prior_variance) / (whole + prior_variance)
        strength = np.clip(1.0 / correlation - 1.0, WEAKEST, STRONGEST)
        return strength * rate, strength * (1.0 - rate)

    def posterior(self, tasks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """alpha and beta of tasks' pass rates; the predicted rate is alpha / (alpha + beta).

        tasks: int (n,), None for all. Returns two float64 (n,).
        """
        chosen = slice(None) if tasks is None else tasks
        family = self.families[chosen]
        if len(family) < len(self._family_sums):
            alpha, beta = self.prior(family)
        else:
            alpha, beta = (values[family] for values in self.prior())
        return alpha + self._passes[chosen], beta + self._failures[chosen]

    def progress(self, tasks: np.ndarray | None = None) -> np.ndarray:
        """Learning progress: the recent pass rate less the one over a span `SLOWER` times as long, float64 (n,) in [−1, 1].

        Above 0 where a task is being learnt, below where it is being forgotten, 0 before its second group (the absolute
        value is the measure of Matiisen et al. 2017, "Teacher-Student Curriculum Learning", and of Kanitscheider et al.
        2021, arXiv 2106.14876). Both rates are the task's own, without its family's prior, which would pull them apart.

        tasks: int (n,), None for all.
        """
        chosen = slice(None) if tasks is None else tasks
        passes = self._passes[chosen]
        recent = _ratio(passes, passes + self._failures[chosen], unknown=0.0)
        slow = _ratio(self._slow_passes[chosen], self._slow_attempts[chosen], unknown=0.0)
        moved: np.ndarray = recent - slow
        return moved

    def means(self, tasks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Length (tokens or environment steps) and return of an attempt, both discounted as the counts are.

        tasks: int (n,), None for all. Returns two float64 (n,), nan where not known.
        """
        chosen = slice(None) if tasks is None else tasks
        lengths, returns = self._lengths[chosen], self._returns[chosen]
        return (
            _ratio(lengths[:, 0], lengths[:, 1], unknown=np.nan),
            _ratio(returns[:, 0], returns[:, 1], unknown=np.nan),
        )

    @property
    def mean_length(self) -> np.ndarray:
        """Of all tasks, as `means`."""
        return self.means()[0]

    @property
    def mean_return(self) -> np.ndarray:
        """Of all tasks, as `means`."""
        return self.means()[1]

    def score(self, tasks: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> None:
        """Take in value losses: how wrong the learner's value function was on tasks since the last report.

        `losses` keeps an exponential mean over windows, so that a report of a few of them moves it little.

        Args:
            tasks: int (n,), numbers of tasks; one may come several times.
            losses: float (n,), sums of windows' |TD errors|.
            weights: float (n,), how many windows each is the sum of; a sum of none changes nothing.

        Raises:
            ValueError: shapes differ, a task does not exist, or a number is negative or not finite; nothing was recorded.
        """
        tasks, losses, weights = np.asarray(tasks, np.int64), np.asarray(losses, float), np.asarray(weights, float)
        if tasks.ndim != 1 or tasks.shape != losses.shape or tasks.shape != weights.shape:
            raise ValueError(
                f"tasks {tasks.shape}, losses {losses.shape} and weights {weights.shape} came; expected one of each per task"
            )
        self._check_tasks(tasks)
        for name, values in (("loss", losses), ("weight", weights)):
            if (wrong := np.flatnonzero(~((values >= 0.0) & (values < np.inf)))).size:
                at = wrong[0]
                raise ValueError(f"task {tasks[at]} came with a {name} of {values[at]}; expected a number from 0")
        told = weights > 0.0
        rows, report_of = np.unique(tasks[told], return_inverse=True)
        windows = np.bincount(report_of, weights[told], len(rows))
        mean = np.bincount(report_of, losses[told], len(rows)) / windows
        kept = np.where(np.isnan(self.losses[rows]), 0.0, np.exp(-windows / LOSS_WINDOWS))
        self.losses[rows] = kept * np.nan_to_num(self.losses[rows]) + (1.0 - kept) * mean
        self._recorded[1] += len(rows)

    def _check_tasks(self, tasks: np.ndarray) -> None:
        if len(tasks) and not (tasks.min() >= 0 and tasks.max() < len(self)):
            raise ValueError(f"tasks {tasks.min()}…{tasks.max()} came; expected numbers in 0…{len(self) - 1}")

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "families": self.families,
            "recorded": self._recorded,
            "attempts": self.attempts,
            "last_solved": self.last_solved,
            "best": self.best,
            "losses": self.losses,
            "passes": self._passes,
            "failures": self._failures,
            "slow_passes": self._slow_passes,
            "slow_attempts": self._slow_attempts,
            "lengths": self._lengths,
            "returns": self._returns,
            "family_sums": self._family_sums,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything that was recorded, in copies."""
        return {name: array.copy() for name, array in self._arrays().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: it is of another set of tasks, or arrays are missing; nothing was changed.
        """
        mine = self._arrays()
        if missing := sorted(mine.keys() - state.keys()):
            raise ValueError(f"the state lacks {', '.join(missing)}; expected what Tracker.state() gave")
        for name, array in mine.items():
            given = state[name]
            if given.shape != array.shape or given.dtype != array.dtype:
                raise ValueError(
                    f"{name} is {given.dtype} {given.shape}; expected {array.dtype} {array.shape}: the state is of other tasks, "
                    "so start the run with those it was saved with"
                )
        if not np.array_equal(state["families"], self.families):
            raise ValueError("the state's tasks are of other families; start the run with the tasks it was saved with")
        for name, array in mine.items():
            array[:] = state[name]


def _ratio(sums: np.ndarray, counts: np.ndarray, *, unknown: float) -> np.ndarray:
    ratios = np.full(len(sums), unknown)
    np.divide(sums, counts, out=ratios, where=counts > 0.0)
    return ratios


def _weights(discount: float, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the old counts and each of `repeats` new groups weigh: the mean of discount⁰…discount^(repeats − 1) for the new."""
    old = discount**repeats
    if discount == 1.0:
        return old, np.ones(len(repeats))
    return old, (1.0 - old) / (repeats * (1.0 - discount))
