"""What the head knows of each task's pass rate: a discounted Beta posterior, shrunk to what the task's family shows.

A task's prior is the Beta distribution that fits the pass rates of its family (empirical Bayes by moments: Kleinman 1973,
"Proportions with extraneous variance"); its own outcomes, the older the lighter, are added to that. Passes are counts, so the
same record serves groups of completions and episodes of control, which are groups of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Of one imaginary family with pass rates uniform in [0, 1], in groups: what a family is taken for before it shows anything.
PRIOR_GROUPS = 2.0
PRIOR_RATE, PRIOR_CORRELATION = 1 / 2, 1 / 3
# Limits of alpha + beta of a family's prior: no family is so uniform that a hundred attempts of a task say nothing of it.
WEAKEST, STRONGEST = 0.5, 50.0

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
        self.groups = 0  # recorded so far, over all tasks
        self.attempts = np.zeros(len(families), np.int64)  # (tasks,), not discounted; 0 is a task never tried
        self.last_solved = np.full(len(families), -1, np.int64)  # (tasks,), `groups` at the latest pass; −1 is never
        self._passes = np.zeros(len(families))
        self._failures = np.zeros(len(families))
        self._family_sums = np.zeros((int(families.max()) + 1, 4))

    def __len__(self) -> int:
        return len(self.families)

    @property
    def once_solved(self) -> np.ndarray:
        """bool (tasks,): at least one attempt ever passed."""
        return self.last_solved >= 0

    def record(self, tasks: np.ndarray, passes: np.ndarray, attempts: np.ndarray) -> None:
        """Take in the outcomes of groups.

        Groups of one task in one call count as of one moment: the result does not depend on their order, and together they
        weigh what they would one after another. A group of 0 attempts (none of them could be scored) changes nothing.

        Args:
            tasks: int (groups,), number of each group's task; a task may come several times.
            passes: int (groups,), attempts that passed.
            attempts: int (groups,), attempts that were scored.

        Raises:
            ValueError: shapes differ, a task does not exist, or passes are not within 0 and attempts; nothing was recorded.
        """
        tasks, passes, attempts = (np.asarray(values, np.int64) for values in (tasks, passes, attempts))
        if tasks.ndim != 1 or tasks.shape != passes.shape or tasks.shape != attempts.shape:
            raise ValueError(
                f"tasks {tasks.shape}, passes {passes.shape} and attempts {attempts.shape} came; expected one of each per group"
            )
        if len(tasks) and not (tasks.min() >= 0 and tasks.max() < len(self)):
            raise ValueError(f"tasks {tasks.min()}…{tasks.max()} came; expected numbers in 0…{len(self) - 1}")
        if (wrong := np.flatnonzero((passes < 0) | (passes > attempts))).size:
            at = wrong[0]
            raise ValueError(
                f"task {tasks[at]} came with {passes[at]} passes of {attempts[at]} attempts; expected 0 to attempts"
            )
        scored = attempts > 0
        rows, group_of, repeats = np.unique(tasks[scored], return_inverse=True, return_counts=True)
        passed = np.bincount(group_of, passes[scored], len(rows))
        tried = np.bincount(group_of, attempts[scored], len(rows))

        self._record_first(rows, passed, tried)
        old, new = _weights(self.discount, repeats)
        self._passes[rows] = old * self._passes[rows] + new * passed
        self._failures[rows] = old * self._failures[rows] + new * (tried - passed)
        self.attempts[rows] += tried.astype(np.int64)
        self.groups += int(scored.sum())
        self.last_solved[rows[passed > 0]] = self.groups

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
        alpha, beta = self.prior()
        family = self.families[chosen]
        return alpha[family] + self._passes[chosen], beta[family] + self._failures[chosen]

    def state(self) -> dict[str, np.ndarray]:
        """Everything that was recorded, in copies."""
        return {
            "families": self.families.copy(),
            "groups": np.array([self.groups], np.int64),
            "attempts": self.attempts.copy(),
            "last_solved": self.last_solved.copy(),
            "passes": self._passes.copy(),
            "failures": self._failures.copy(),
            "family_sums": self._family_sums.copy(),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: it is of another set of tasks, or arrays are missing; nothing was changed.
        """
        mine = self.state()
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
        self.groups = int(state["groups"][0])
        self.attempts = state["attempts"].copy()
        self.last_solved = state["last_solved"].copy()
        self._passes = state["passes"].copy()
        self._failures = state["failures"].copy()
        self._family_sums = state["family_sums"].copy()


def _weights(discount: float, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the old counts and each of `repeats` new groups weigh: the mean of discount⁰…discount^(repeats − 1) for the new."""
    old = discount**repeats
    if discount == 1.0:
        return old, np.ones(len(repeats))
    return old, (1.0 - old) / (repeats * (1.0 - discount))
