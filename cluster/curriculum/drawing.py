"""Draws tasks by the weights that a curriculum gives them, and a share of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.curriculum import CurriculumSettings
from replay.kernels import kernel
from replay.trees import SumTree

from .curricula import Band, Curriculum, make_curriculum
from .records import Records
from .tracker import Tracker

SWEEP = 1024  # tasks whose weights are computed again at each call, in turn
LARGEST = 1e250  # a weight


class Drawing:
    """Draws tasks for the actors, and hears which ones have new outcomes.

    Weights are kept in a sum tree: one leaf for each task that was tried, and one for all untried tasks of a family and stage,
    of which the same is known. What a family shows thus reaches its untried tasks at once; it reaches the prior of tried ones,
    where it weighs little, when they have a new outcome or when the sweep comes by, some tasks at each call.

    Each of several curricula has a share of the draws and a tree of its own; where one weighs no task at all, the others
    share its draws.
    """

    def __init__(
        self,
        tracker: Tracker,
        parts: Sequence[tuple[Curriculum, float]],
        *,
        floor: float,
        seed: int,
        stages: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            tracker: what is known of the tasks; `update` is to be called after each of its records and scores.
            parts: the curricula, and the share above 0 that each has of the draws that are not uniform.
            floor: probability that a draw is from all tasks alike, in [0, 1]; with 0, a task once found hopeless may be lost.
            seed: 0 or more.
            stages: int (tasks,), in the order of the staged curriculum; None takes the families as stages.

        Raises:
            ValueError: floor is out of range, stages are not one for each task, or a curriculum gives no weights.
        """
        if not 0.0 <= floor <= 1.0:
            raise ValueError(f"floor is {floor}; expected a share from 0 to 1")
        stages = tracker.families if stages is None else np.asarray(stages)
        if stages.shape != (len(tracker),) or stages.dtype.kind not in "iu":
            raise ValueError(
                f"stages are {stages.dtype} {stages.shape}; expected an integer for each of {len(tracker)} tasks"
            )
        self._tracker, self._floor = tracker, floor
        self._curricula = [curriculum for curriculum, _ in parts]
        self._shares = np.array([share for _, share in parts])
        self._generator = np.random.Generator(np.random.SFC64(seed))  # its state is an array of 64-bit words
        self._swept = 0
        stage_numbers, self._stages = np.unique(stages, return_inverse=True)
        # Tasks of one kind, that is of one family and stage, are alike until they are tried.
        kinds, self._kinds = np.unique(
            tracker.families.astype(np.int64) * len(stage_numbers) + self._stages, return_inverse=True
        )
        self._kind_families, self._kind_stages = np.divmod(kinds, len(stage_numbers))
        # Tasks kind by kind, each kind's untried ones first: `_order[_begins[k] : _begins[k] + _untried[k]]`.
        tried = tracker.attempts > 0
        self._order = np.lexsort((tried, self._kinds))
        self._positions = np.empty(len(tracker), np.int64)
        self._positions[self._order] = np.arange(len(tracker))
        self._begins = np.concatenate([[0], np.cumsum(np.bincount(self._kinds))[:-1]])
        self._untried = np.bincount(self._kinds[~tried], minlength=len(kinds))
        self._trees = [SumTree(np.zeros(len(tracker) + len(kinds))) for _ in parts]
        for curriculum in self._curricula:
            curriculum.update(tracker, self._stages)
        self._weigh_all()

    @property
    def changes(self) -> int:
        """How often what is drawn from has changed altogether, as when a stage was unlocked."""
        return sum(curriculum.changes for curriculum in self._curricula)

    def draw(self, count: int, *, distinct: bool = True) -> np.ndarray:
        """Numbers of tasks, int64 (count,).

        distinct: no task twice within the call, as long as `count` tasks can be drawn; they are then drawn one after another
            from what the call has left. Else each is drawn by itself.
        """
        self._sweep()
        if not distinct or count > len(self._tracker):
            return self._independent(count)
        found = np.zeros(0, np.int64)
        taken = np.zeros(len(self._tracker), bool)
        leaves = [np.zeros(0) for _ in self._trees]
        untried = self._untried.copy()
        weighted = self._weighted()
        while len(found) < count and (self._floor > 0.0 or self._weighted() == weighted):
            # A task that comes again is drawn anew, which is to draw from the tasks that are left.
            drawn = self._independent(count - len(found), taken)
            _, firsts = np.unique(drawn, return_index=True)
            fresh = drawn[np.sort(firsts)]
            fresh = fresh[~taken[fresh]]
            found, taken[fresh] = np.concatenate([found, fresh]), True
            if len(found) < count:
                # Out of the trees until the call ends: else few tasks that hold nearly all of the weight would be drawn
                # again and again.
                for part, tree in enumerate(self._trees):
                    leaves[part] = np.concatenate([leaves[part], tree.leaves[fresh]])
                    tree.set(fresh, np.zeros(len(fresh)))
                self._take_out(fresh)
        for part, tree in enumerate(self._trees):
            tree.set(found[: len(leaves[part])], leaves[part])
        # What was taken out lies just behind its kind's untried tasks.
        changed = np.flatnonzero(self._untried != untried)
        self._untried = untried
        self._weigh_kinds(changed)
        return np.concatenate([found, self._independent(count - len(found))]) if len(found) < count else found

    def _weighted(self) -> bool:
        return any(tree.total > 0.0 for tree in self._trees)

    def _independent(self, count: int, taken: np.ndarray | None = None) -> np.ndarray:
        """int64 (count,), each by itself; from tasks that are not `taken`, bool (tasks,), as far as that is cheap."""
        generator, tasks = self._generator, len(self._tracker)
        # Part −1 is all tasks alike.
        shares = np.cumsum([s if t.total > 0.0 else 0.0 for s, t in zip(self._shares, self._trees, strict=True)])
        part_of = np.full(count, -1)
        if len(shares) and shares[-1] > 0.0:
            chosen = np.searchsorted(shares[:-1], generator.random(count) * shares[-1], side="right")
            part_of = np.where(generator.random(count) < self._floor, -1, chosen)
        drawn = np.empty(count, np.int64)
        alike = part_of < 0
        if taken is not None and 2 * np.count_nonzero(taken) > tasks:
            drawn[alike] = generator.choice(np.flatnonzero(~taken), int(alike.sum()))
        else:
            drawn[alike] = generator.integers(tasks, size=int(alike.sum()))
        for part, tree in enumerate(self._trees):
            mine = part_of == part
            if mine.any():
                rows = tree.draw(generator.random(int(mine.sum())))
                kinds = rows[rows >= tasks] - tasks
                rows[rows >= tasks] = self._order[self._begins[kinds] + generator.integers(self._untried[kinds])]
                drawn[mine] = rows
        return drawn

    def update(self, tasks: np.ndarray) -> None:
        """After the tracker has taken in outcomes or losses: int (n,), the tasks they were of; one may come several times."""
        tasks = np.unique(np.asarray(tasks, np.int64))
        tasks = tasks[self._tracker.attempts[tasks] > 0]
        self._take_out(tasks)
        renew = [curriculum.update(self._tracker, self._stages) for curriculum in self._curricula]
        if any(renew):
            self._weigh_all()
        else:
            self._weigh(tasks)

    def state(self) -> dict[str, np.ndarray]:
        """What the next draws depend on besides the tracker, in copies."""
        state: Any = self._generator.bit_generator.state
        words = [*state["state"]["state"].tolist(), state["has_uint32"], state["uinteger"]]
        found = {
            "generator": np.array(words, np.uint64),
            "swept": np.array([self._swept], np.int64),
            "order": self._order.copy(),
        }
        for name, curriculum, tree in zip(self._names(), self._curricula, self._trees, strict=True):
            found[f"{name}.weights"] = tree.leaves.copy()
            found |= {f"{name}.{key}": array for key, array in curriculum.state().items()}
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave; the tracker's state is loaded before.

        Raises:
            ValueError: it is of another curriculum or other tasks, or of another moment than the tracker's.
        """
        mine = self.state()
        if mine.keys() != state.keys():
            raise ValueError(
                f"the state holds {', '.join(sorted(state))}; expected {', '.join(sorted(mine))}: go on with the curriculum "
                "that it was saved with"
            )
        if state["generator"].shape != (6,) or state["generator"].dtype != np.uint64:
            raise ValueError("the state lacks the generator's six words; expected what Drawing.state() gave")
        order, weights = state["order"], [state[f"{name}.weights"] for name in self._names()]
        if order.shape != self._order.shape or any(
            w.shape != mine[f"{name}.weights"].shape for name, w in zip(self._names(), weights, strict=True)
        ):
            raise ValueError(
                f"the state is of {len(order)} tasks, or of other families and stages; expected {len(self._order)}"
            )
        places, alike = np.arange(len(order)), self._tracker.attempts == 0  # untried tasks of a kind are alike
        by_place = self._kinds[self._order]
        untried = np.bincount(self._kinds[alike], minlength=len(self._begins))
        if (
            not np.array_equal(np.sort(order), places)
            or not np.array_equal(self._kinds[order], by_place)
            or not np.array_equal(alike[order], places < (self._begins + untried)[by_place])
            or any(w[: len(order)][alike].any() for w in weights)
        ):
            raise ValueError(
                "the state is of other outcomes than the tracker's; load the tracker's state of that moment first"
            )
        words = state["generator"]
        self._generator.bit_generator.state = {
            "bit_generator": "SFC64",
            "state": {"state": words[:4].copy()},
            "has_uint32": int(words[4]),
            "uinteger": int(words[5]),
        }
        self._swept = int(state["swept"][0])
        self._order, self._untried = order.copy(), untried
        self._positions[self._order] = places
        self._trees = [SumTree(w.copy()) for w in weights]
        for name, curriculum in zip(self._names(), self._curricula, strict=True):
            curriculum.load_state({key: state[f"{name}.{key}"] for key in curriculum.state()})

    def _names(self) -> list[str]:
        return [f"{index}.{type(curriculum).__name__}" for index, curriculum in enumerate(self._curricula)]

    def _weigh_all(self) -> None:
        self._weigh_kinds(np.arange(len(self._begins)))
        self._weigh(np.flatnonzero(self._tracker.attempts))

    def _weigh(self, tried: np.ndarray) -> None:
        if len(tried) and self._trees:
            records = Records.tried(self._tracker, tried, self._stages[tried])
            for curriculum, tree in zip(self._curricula, self._trees, strict=True):
                tree.set(tried, _weights(curriculum, records))

    def _weigh_kinds(self, kinds: np.ndarray) -> None:
        if len(kinds) and self._trees:
            records = Records.untried(self._tracker, self._kind_families[kinds], self._kind_stages[kinds])
            for curriculum, tree in zip(self._curricula, self._trees, strict=True):
                tree.set(len(self._tracker) + kinds, self._untried[kinds] * _weights(curriculum, records))

    def _take_out(self, tasks: np.ndarray) -> None:
        """Take tasks out of the untried ones, those that are among them, and weigh what is left of their families anew."""
        _to_the_back(self._order, self._positions, self._begins, self._untried, tasks, self._kinds[tasks])
        families = np.zeros(int(self._kind_families[-1]) + 1, bool)
        families[self._tracker.families[tasks]] = True
        self._weigh_kinds(np.flatnonzero(families[self._kind_families]))

    def _sweep(self) -> None:
        tasks = np.arange(self._swept, min(self._swept + SWEEP, len(self._tracker)))
        kinds = self._kinds[tasks]
        self._weigh(tasks[self._positions[tasks] >= self._begins[kinds] + self._untried[kinds]])
        self._swept = (self._swept + SWEEP) if self._swept + SWEEP < len(self._tracker) else 0


def _weights(curriculum: Curriculum, records: Records) -> np.ndarray:
    weights = np.asarray(curriculum.weights(records), np.float64)
    if weights.shape != records.alpha.shape or not ((weights >= 0.0) & (weights <= LARGEST)).all():
        span = f"from {weights.min()} to {weights.max()}" if weights.size else "none"
        raise ValueError(
            f"{type(curriculum).__name__}.weights gave {weights.shape}, {span}, for {len(records.alpha)} records; expected a "
            f"number from 0 to {LARGEST:g} for each"
        )
    return weights


@kernel
def _to_the_back(
    order: np.ndarray,
    positions: np.ndarray,
    begins: np.ndarray,
    untried: np.ndarray,
    tasks: np.ndarray,
    kinds: np.ndarray,
) -> None:
    for i in range(len(tasks)):
        task, kind = tasks[i], kinds[i]
        at, last = positions[task], begins[kind] + untried[kind] - 1
        if at <= last:
            other = order[last]
            order[at], positions[other] = other, at
            order[last], positions[task] = task, last
            untried[kind] -= 1


def make_drawing(
    settings: CurriculumSettings,
    tracker: Tracker,
    *,
    group_size: int,
    seed: int,
    stages: np.ndarray | None = None,
) -> Drawing:
    """The drawing that the settings ask for.

    Args:
        settings: of the curriculum.
        tracker: what is known of the tasks.
        group_size: attempts that the band is judged on, 1 or more, whether they come one by one or not.
        seed: 0 or more.
        stages: int (tasks,), in the order of the staged curriculum; None takes the families as stages.

    Raises:
        ValueError: a curriculum of the user's cannot be made, or stages are not one for each task.
    """
    chosen = make_curriculum(settings, group_size)
    floor = settings.floor if chosen.floor is None else chosen.floor
    parts = [(chosen, chosen.share), (Band(settings, group_size), 1.0 - chosen.share)]
    drawn_by = [(curriculum, share) for curriculum, share in parts if share > 0.0 and floor < 1.0]
    return Drawing(tracker, drawn_by, floor=floor, seed=seed, stages=stages)
