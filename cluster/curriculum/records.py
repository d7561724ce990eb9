"""What a curriculum is told of tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tracker import Tracker


@dataclass(frozen=True)
class Records:
    """What is known of some tasks; every field is an array (n,).

    Most records are of one task that was tried. One without attempts stands for all untried tasks of one family and stage,
    about which the same is known: what their family's prior says.
    """

    families: np.ndarray  # int, number of the family
    stages: np.ndarray  # int from 0, without gaps: the order of the staged curriculum
    alpha: np.ndarray  # float, of the Beta posterior of the pass rate
    beta: np.ndarray  # float
    attempts: np.ndarray  # int, over the whole run; 0: never tried
    since_solved: np.ndarray  # int, groups of all tasks since the latest pass; −1: never passed
    best: np.ndarray  # float, highest pass rate ever predicted; 0 where never tried
    progress: np.ndarray  # float in [−1, 1], recent pass rate less the one over a longer span; 0 where never tried
    loss: np.ndarray  # float, mean |TD error| of the learner's value function; nan: never reported
    length: np.ndarray  # float, mean tokens or environment steps of an attempt; nan: not known
    mean_return: np.ndarray  # float, of an attempt; nan: not known

    @property
    def rate(self) -> np.ndarray:
        """Predicted pass rate, float (n,)."""
        rate: np.ndarray = self.alpha / (self.alpha + self.beta)
        return rate

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation of the pass rate under its posterior, float (n,)."""
        deviation: np.ndarray = np.sqrt(self.rate * (1.0 - self.rate) / (self.alpha + self.beta + 1.0))
        return deviation

    @classmethod
    def tried(cls, tracker: Tracker, tasks: np.ndarray, stages: np.ndarray) -> Records:
        """Of single tasks. tasks, stages: int (n,)."""
        alpha, beta = tracker.posterior(tasks)
        last_solved = tracker.last_solved[tasks]
        length, mean_return = tracker.means(tasks)
        return cls(
            families=tracker.families[tasks],
            stages=stages,
            alpha=alpha,
            beta=beta,
            attempts=tracker.attempts[tasks],
            since_solved=np.where(last_solved < 0, -1, tracker.groups - last_solved),
            best=tracker.best[tasks],
            progress=tracker.progress(tasks),
            loss=tracker.losses[tasks],
            length=length,
            mean_return=mean_return,
        )

    @classmethod
    def untried(cls, tracker: Tracker, families: np.ndarray, stages: np.ndarray) -> Records:
        """Of the untried tasks of families and stages, int (n,), one record for each pair."""
        alpha, beta = tracker.prior(families)
        none, nothing, unknown = (
            np.zeros(len(families), np.int64),
            np.zeros(len(families)),
            np.full(len(families), np.nan),
        )
        return cls(
            families=families,
            stages=stages,
            alpha=alpha,
            beta=beta,
            attempts=none,
            since_solved=none - 1,
            best=nothing,
            progress=nothing,
            loss=unknown,
            length=unknown,
            mean_return=unknown,
        )
