"""Which tasks are tried next: all alike, or by the probability that what comes of it can be learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from configs.curriculum import CurriculumSettings, pass_counts
from replay.kernels import kernel
from replay.trees import SumTree

from .band import band_probability
from .tracker import Tracker

SWEEP = 1024  # tasks whose weights are computed again at each call, in turn


class Drawing(Protocol):
    """Draws tasks for the actors, and hears which ones have new outcomes."""

    def draw(self, count: int, *, distinct: bool = True) -> np.ndarray:
        """Numbers of tasks, int64 (count,).

        distinct: no task twice within the call, as long as there are `count` tasks; else each is drawn by itself.
        """
        ...

    def update(self, tasks: np.ndarray) -> None:
        """After the tracker has recorded outcomes: int (n,), the tasks they were of; a task may come several times."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """What the next draws depend on besides the tracker, in copies."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave; the tracker's state is loaded before. A wrong one is a ValueError."""
        ...


class UniformDrawing:
    """Draws all tasks alike."""

    def __init__(self, tasks: int, *, seed: int) -> None:
        """tasks: how many there are, 1 or more. seed: 0 or more."""
        self._tasks = tasks
        self._generator = _generator(seed)

    def draw(self, count: int, *, distinct: bool = True) -> np.ndarray:
        """As `Drawing.draw`."""
        return self._generator.choice(self._tasks, count, replace=not (distinct and count <= self._tasks))

    def update(self, tasks: np.ndarray) -> None:
        """Nothing depends on outcomes."""

    def state(self) -> dict[str, np.ndarray]:
        """The generator's."""
        return _generator_state(self._generator)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Drawing.load_state`."""
        _load_generator(self._generator, state)


class PassRateDrawing:
    """Draws a task in proportion to the probability that its group's passes fall within a band, and a share of them alike.

    That probability is under the tracker's posterior, so what is known badly is tried sooner than its mean alone would have it.
    It is kept in a sum tree: one leaf for each task that was tried, and one for all those of a family that were not, which
    are all predicted alike. What a family shows thus reaches its untried tasks at once; it reaches the prior of tried ones, where it
    weighs little, when they have a new outcome or when the sweep comes by, some tasks at each call.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        group_size: int,
        low: int,
        high: int,
        floor: float,
        sharpness: float = 1.0,
        seed: int,
    ) -> None:
        """
        Args:
            tracker: pass rates; `update` is to be called after each of its records.
            group_size: attempts in a group.
            low, high: the fewest and the most passes worth learning from.
            floor: probability that a draw is from all tasks alike, in [0, 1]; with 0, a task once found hopeless may be lost.
            sharpness: weights are the probabilities raised to this power, 0 or more. Above 1 less is sampled outside the
                band, from fewer tasks, and the record of the others grows older.
            seed: 0 or more.

        Raises:
            ValueError: floor or sharpness is out of range, or no count of passes is within the band.
        """
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor is {floor}; expected a share from 0 to 1")
        if not 0.0 <= sharpness < np.inf:
            raise ValueError(f"sharpness is {sharpness}; expected a number from 0")
        if max(0, low) > min(high, group_size):
            raise ValueError(f"no count of passes of {group_size} attempts is from {low} to {high}")
        self._tracker, self._floor, self._sharpness = tracker, floor, sharpness
        self._group_size, self._low, self._high = group_size, low, high
        self._generator = _generator(seed)
        self._swept = 0
        families = tracker.families
        # Tasks family by family, each family's untried ones first: `_order[_begins[f] : _begins[f] + _untried[f]]`.
        self._order = np.argsort(families, kind="stable")
        self._positions = np.empty(len(tracker), np.int64)
        sizes = np.bincount(families)
        self._begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._untried = np.zeros(len(sizes), np.int64)
        self._tree = SumTree(np.zeros(len(tracker) + len(sizes)))
        self._weigh_all()

    def probability(self, tasks: np.ndarray | None = None) -> np.ndarray:
        """Predicted probability that the next group of each task lies in the band: float64 (n,), of all tasks for None."""
        return self._in_band(*self._tracker.posterior(tasks))

    def draw(self, count: int, *, distinct: bool = True) -> np.ndarray:
        """As `Drawing.draw`. Distinct draws are one after another from what the call has left."""
        self._sweep()
        if not distinct or count > len(self._tracker):
            return self._independent(count)
        found = np.zeros(0, np.int64)
        leaves, untried = np.zeros(0), self._untried.copy()
        taken = np.zeros(len(self._tracker), bool)
        while len(found) < count:
            # A task that comes again is drawn anew, which is to draw from the tasks that are left.
            drawn = self._independent(count - len(found), taken)
            _, firsts = np.unique(drawn, return_index=True)
            fresh = drawn[np.sort(firsts)]
            fresh = fresh[~taken[fresh]]
            found, taken[fresh] = np.concatenate([found, fresh]), True
            if len(found) < count:
                # Out of the tree until the call ends: else few tasks that hold nearly all of the weight would be drawn
                # again and again.
                leaves = np.concatenate([leaves, self._tree.leaves[fresh]])
                self._tree.set(fresh, np.zeros(len(fresh)))
                self._take_out(fresh)
        if len(leaves):
            self._tree.set(found[: len(leaves)], leaves)
            # What was taken out lies just behind its family's untried tasks.
            changed = np.flatnonzero(self._untried != untried)
            self._untried = untried
            self._weigh_families(changed)
        return found

    def _independent(self, count: int, taken: np.ndarray | None = None) -> np.ndarray:
        """int64 (count,), each by itself; from tasks that are not `taken`, bool (tasks,), as far as that is cheap."""
        generator, tasks = self._generator, len(self._tracker)
        alike = generator.random(count) < self._floor
        if not self._tree.total > 0.0:
            alike[:] = True
        drawn = np.empty(count, np.int64)
        uniform = int(alike.sum())
        if taken is not None and 2 * np.count_nonzero(taken) > tasks:
            drawn[alike] = generator.choice(np.flatnonzero(~taken), uniform)
        else:
            drawn[alike] = generator.integers(tasks, size=uniform)
        if uniform < count:
            rows = self._tree.draw(generator.random(count - uniform))
            families = rows[rows >= tasks] - tasks
            rows[rows >= tasks] = self._order[self._begins[families] + generator.integers(self._untried[families])]
            drawn[~alike] = rows
        return drawn

    def update(self, tasks: np.ndarray) -> None:
        """As `Drawing.update`."""
        tasks = np.unique(np.asarray(tasks, np.int64))
        tasks = tasks[self._tracker.attempts[tasks] > 0]
        self._take_out(tasks)
        self._weigh(tasks)

    def state(self) -> dict[str, np.ndarray]:
        """The generator's, and the weights that the next draws will use."""
        return {
            **_generator_state(self._generator),
            "swept": np.array([self._swept], np.int64),
            "order": self._order.copy(),
            "weights": self._tree.leaves.copy(),
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """As `Drawing.load_state`.

        Raises:
            ValueError: it is of other tasks, or of another moment than the tracker's.
        """
        if missing := sorted(self.state().keys() - state.keys()):
            raise ValueError(f"the state lacks {', '.join(missing)}; expected what PassRateDrawing.state() gave")
        order, weights = state["order"], state["weights"]
        if order.shape != self._order.shape or weights.shape != self._tree.leaves.shape:
            raise ValueError(f"the state is of {len(order)} tasks; expected {len(self._order)}")
        places, families = np.arange(len(order)), self._tracker.families
        by_place, alike = families[self._order], self._tracker.attempts == 0  # untried tasks are all predicted alike
        untried = np.bincount(families[alike], minlength=len(self._begins))
        if (
            not np.array_equal(np.sort(order), places)
            or not np.array_equal(families[order], by_place)
            or not np.array_equal(alike[order], places < (self._begins + untried)[by_place])
            or weights[: len(order)][alike].any()
        ):
            raise ValueError(
                "the state is of other outcomes than the tracker's; load the tracker's state of that moment first"
            )
        _load_generator(self._generator, state)
        self._swept = int(state["swept"][0])
        self._order, self._untried = order.copy(), untried
        self._positions[self._order] = np.arange(len(order))
        self._tree = SumTree(weights.copy())

    def _in_band(self, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        return band_probability(alpha, beta, size=self._group_size, low=self._low, high=self._high)

    def _weigh_all(self) -> None:
        tried = self._tracker.attempts > 0
        families = self._tracker.families
        self._order = np.lexsort((tried, families))
        self._positions[self._order] = np.arange(len(self._order))
        self._untried = np.bincount(families[~tried], minlength=len(self._begins))
        self._weigh_families(np.arange(len(self._begins)))
        self._weigh(np.flatnonzero(tried))

    def _weigh(self, tried: np.ndarray) -> None:
        self._tree.set(tried, self.probability(tried) ** self._sharpness)

    def _weigh_families(self, families: np.ndarray) -> None:
        probability = self._in_band(*self._tracker.prior(families))
        self._tree.set(len(self._tracker) + families, self._untried[families] * probability**self._sharpness)

    def _take_out(self, tasks: np.ndarray) -> None:
        """Take tasks out of their families' untried ones, those that are among them, and weigh the families anew."""
        families = self._tracker.families[tasks]
        _to_the_back(self._order, self._positions, self._begins, self._untried, tasks, families)
        self._weigh_families(np.unique(families))

    def _sweep(self) -> None:
        tasks = np.arange(self._swept, min(self._swept + SWEEP, len(self._tracker)))
        families = self._tracker.families[tasks]
        self._weigh(tasks[self._positions[tasks] >= self._begins[families] + self._untried[families]])
        self._swept = (self._swept + SWEEP) if self._swept + SWEEP < len(self._tracker) else 0


@kernel
def _to_the_back(
    order: np.ndarray,
    positions: np.ndarray,
    begins: np.ndarray,
    untried: np.ndarray,
    tasks: np.ndarray,
    families: np.ndarray,
) -> None:
    for k in range(len(tasks)):
        task, family = tasks[k], families[k]
        at, last = positions[task], begins[family] + untried[family] - 1
        if at <= last:
            other = order[last]
            order[at], positions[other] = other, at
            order[last], positions[task] = task, last
            untried[family] -= 1


def make_drawing(settings: CurriculumSettings, tracker: Tracker, *, group_size: int, seed: int) -> Drawing:
    """The drawing that the settings ask for.

    pass_rate draws by the band of the filter, with or without a filter, and never counts groups of a single outcome in: nothing
    is learnt from them by comparison. Where that leaves no count, groups of both outcomes are what is drawn for; attempts
    without a group are weighed as pairs.

    Args:
        settings: of the curriculum.
        tracker: pass rates of the tasks.
        group_size: attempts in a group, 1 or more.
        seed: 0 or more.
    """
    if settings.draw == "uniform":
        return UniformDrawing(len(tracker), seed=seed)
    size = max(2, group_size)
    low, high = pass_counts(settings.low, settings.high, size)
    low, high = max(1, low), min(size - 1, high)
    if low > high:
        low, high = 1, size - 1
    return PassRateDrawing(
        tracker, group_size=size, low=low, high=high, floor=settings.floor, sharpness=settings.sharpness, seed=seed
    )


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))  # its state is an array of 64-bit words


def _generator_state(generator: np.random.Generator) -> dict[str, np.ndarray]:
    state: Any = generator.bit_generator.state
    words = [*state["state"]["state"].tolist(), state["has_uint32"], state["uinteger"]]
    return {"generator": np.array(words, np.uint64)}


def _load_generator(generator: np.random.Generator, state: Mapping[str, np.ndarray]) -> None:
    words = state.get("generator")
    if words is None or words.shape != (6,) or words.dtype != np.uint64:
        raise ValueError("the state lacks the generator's six words; expected what state() gave")
    generator.bit_generator.state = {
        "bit_generator": "SFC64",
        "state": {"state": words[:4].copy()},
        "has_uint32": int(words[4]),
        "uinteger": int(words[5]),
    }
