"""The curricula: each says how much every task weighs in the draws, and nothing else.

One of your own is a class derived from `Curriculum`, named by `curriculum.draw: package.module:Class`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from configs.curriculum import CurriculumSettings, pass_counts
from learners.classes import load_class

from .band import band_probability
from .records import Records
from .tracker import Tracker


class Curriculum(ABC):
    """How much each task weighs: what is not drawn alike, by `floor`, is drawn in proportion.

    A weight may depend on the task's record and on what `update` has found. It is computed when the record changes, and now and
    then besides, by the sweep of `Drawing`; after an `update` that returns True all of them are.
    """

    floor: float | None = None  # share of the draws that is uniform over all tasks; None is the setting's
    share: float = 1.0  # of the draws that are not uniform; the rest is by the band
    changes: int = 0  # how often what is drawn from has changed altogether, as when a stage was unlocked

    def __init__(self, settings: CurriculumSettings, group_size: int) -> None:
        """
        settings: of the curriculum.
        group_size: attempts of a whole group.
        A class of your own is called with `settings.kwargs` besides.
        """
        self.settings = settings
        self.group_size = group_size

    @abstractmethod
    def weights(self, records: Records) -> np.ndarray:
        """float (n,), from 0 to 1e250, one weight for each record; of several tasks, if it stands for several."""

    def update(self, tracker: Tracker, stages: np.ndarray) -> bool:
        """At the start and after each report of outcomes or losses: whether all weights are to be computed anew.

        stages: int (tasks,), each task's, from 0 and without gaps. What is long to compute for many tasks is not for every
        call.
        """
        return False

    def state(self) -> dict[str, np.ndarray]:
        """What `weights` depends on besides the records and the settings, in copies."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave; the names are those, checked before."""
        return None


class Uniform(Curriculum):
    """All tasks alike."""

    floor = 1.0

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        return np.ones(len(records.alpha))


class Band(Curriculum):
    """By the probability that a group is learnt from: that its passes fall within the band (Bae et al. 2025).

    It is under the posterior, so what is badly known is tried sooner than its mean alone would have it. Groups with a single
    outcome are never meant, even where the band lets them in: nothing is learnt from them by comparison. Where that leaves
    no count of passes, groups of both outcomes are drawn for; single attempts are weighed as pairs.
    """

    def __init__(self, settings: CurriculumSettings, group_size: int) -> None:
        super().__init__(settings, group_size)
        self.size = max(2, group_size)
        low, high = pass_counts(settings.low, settings.high, self.size)
        self.low, self.high = max(1, low), min(self.size - 1, high)
        if self.low > self.high:
            self.low, self.high = 1, self.size - 1

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        probability = band_probability(records.alpha, records.beta, size=self.size, low=self.low, high=self.high)
        weights: np.ndarray = probability**self.settings.sharpness
        return weights


class Staged(Curriculum):
    """All tasks of the unlocked stages alike; the next one is unlocked when the newest is passed well enough, for good.

    Passed well enough: the predicted pass rate, in the mean over the newest stage's tasks, is `settings.unlock`. Of the first
    stage nothing is known before some of its tasks were tried, so that many are waited for.
    """

    floor = 0.0  # what is locked is not drawn
    TRIED = 16  # tasks of a stage, or all where it has fewer

    def __init__(self, settings: CurriculumSettings, group_size: int) -> None:
        super().__init__(settings, group_size)
        self._checked = -1  # the tracker's groups when last looked

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        return (records.stages <= self.changes).astype(np.float64)

    def update(self, tracker: Tracker, stages: np.ndarray) -> bool:
        """As `Curriculum.update`."""
        if self._checked >= 0 and tracker.groups - self._checked < len(stages) // 64:
            return False
        self._checked = tracker.groups
        tasks = np.flatnonzero(stages == self.changes)
        if self.changes == stages.max() or np.count_nonzero(tracker.attempts[tasks]) < min(self.TRIED, len(tasks)):
            return False
        alpha, beta = tracker.posterior(tasks)
        if np.mean(alpha / (alpha + beta)) < self.settings.unlock:
            return False
        self.changes += 1
        return True

    def state(self) -> dict[str, np.ndarray]:
        """As `Curriculum.state`."""
        return {"unlocked": np.array([self.changes, self._checked], np.int64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Curriculum.load_state`."""
        self.changes, self._checked = map(int, state["unlocked"])


class LearningProgress(Curriculum):
    """By how much the pass rate moves, up or down (Matiisen et al. 2017; Kanitscheider et al. 2021).

    The weight is the root of progress² + posterior variance, the size of a movement that may be there, to the power of the
    sharpness: what is hardly known may be moving, what always fails or always passes is not.
    """

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        weights: np.ndarray = np.hypot(records.progress, records.deviation) ** self.settings.sharpness
        return weights


class LevelReplay(Curriculum):
    """By rank of the learner's value loss, (1 / rank)^(1 / temperature) (Jiang et al. 2021, section 3).

    In place of their staleness-aware part stands the uniform floor. A task without a loss ranks as if as many tasks as it
    had attempts were before it: untried with the best, and soon behind where its attempts are never learnt from.
    """

    def __init__(self, settings: CurriculumSettings, group_size: int) -> None:
        super().__init__(settings, group_size)
        self._losses = np.zeros(0)  # of all tasks that have one, when last ranked, in ascending order
        self._ranked = 0  # the tracker's scores at that time

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        larger = len(self._losses) - np.searchsorted(self._losses, records.loss, side="right")
        rank = 1.0 + np.where(np.isnan(records.loss), records.attempts, larger)
        weights: np.ndarray = rank ** (-1.0 / self.settings.temperature)
        return weights

    def update(self, tracker: Tracker, stages: np.ndarray) -> bool:
        """As `Curriculum.update`. Ranks are taken anew when one loss in twenty may be another; the sweep brings them in."""
        if tracker.scores - self._ranked >= max(1, len(stages) // 20):
            self._losses = np.sort(tracker.losses[~np.isnan(tracker.losses)])
            self._ranked = tracker.scores
        return False

    def state(self) -> dict[str, np.ndarray]:
        """As `Curriculum.state`."""
        return {"losses": self._losses.copy(), "ranked": np.array([self._ranked], np.int64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Curriculum.load_state`."""
        self._losses, self._ranked = state["losses"].copy(), int(state["ranked"][0])


class Rehearsal(Curriculum):
    """A share of the draws for tasks once solved and now failing, by the probability that they fail; the rest by the band.

    Solved is a predicted pass rate of ½ or more, failing one below half of the best it was. One pass of many attempts would
    be no sign: a hard task has that as well. Where there are no such tasks, all draws are by the band.
    """

    SOLVED, FALLEN = 0.5, 0.5

    def __init__(self, settings: CurriculumSettings, group_size: int) -> None:
        super().__init__(settings, group_size)
        self.share = settings.rehearsal

    def weights(self, records: Records) -> np.ndarray:
        """As `Curriculum.weights`."""
        forgotten = (records.best >= self.SOLVED) & (records.rate < self.FALLEN * records.best)
        return np.where(forgotten, 1.0 - records.rate, 0.0)


CLASSES: dict[str, type[Curriculum]] = {
    "uniform": Uniform,
    "staged": Staged,
    "band": Band,
    "learning_progress": LearningProgress,
    "level_replay": LevelReplay,
    "rehearsal": Rehearsal,
}


def make_curriculum(settings: CurriculumSettings, group_size: int) -> Curriculum:
    """The curriculum that `settings.draw` names.

    Raises:
        ValueError: a class of the user's cannot be imported, is no curriculum, or does not take `settings.kwargs`.
    """
    if settings.draw in CLASSES:
        return CLASSES[settings.draw](settings, group_size)
    own: type[Curriculum] = load_class(settings.draw, "curriculum.draw", base=Curriculum)
    try:
        made = own(settings, group_size, **settings.kwargs)
    except Exception as error:  # it runs the user's code: anything may come
        raise ValueError(
            f"curriculum.draw {settings.draw!r}: {own.__name__}(settings, group_size, **curriculum.kwargs) raised "
            f"{type(error).__name__}: {error}; kwargs are {dict(settings.kwargs)}"
        ) from error
    if not 0.0 <= made.share <= 1.0 or not (made.floor is None or 0.0 <= made.floor <= 1.0):
        raise ValueError(
            f"curriculum.draw {settings.draw!r}: share is {made.share} and floor {made.floor}; expected shares from 0 to 1"
        )
    return made
