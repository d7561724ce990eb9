"""The head's desk: hands tasks to actors, takes what became of them, and keeps the record of both.

    take    ← an actor asks for assignments, ahead of need
    report  ← an actor tells outcomes, numbered by itself: what it repeats, because an answer was lost, counts once
    state   → the checkpoint; what was reported since is in the journal (`cluster.curriculum.journal`)

Prompts and environments are tasks alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import numpy as np

from actors.assignments import Assignment, Outcome
from actors.task_set import TaskSet
from cluster.curriculum.drawing import Drawing
from cluster.curriculum.filter import Amount, Waste
from cluster.curriculum.journal import Journal
from cluster.curriculum.tracker import Tracker

MOST_LABELS = 64  # tasks that metrics tell of one by one; of more, families are told
RECENT = 1_000  # draws over which the shares of tasks are taken
CHANGED = 0.5  # share of the draws that must have moved to other tasks for the curriculum to count as changed
RESERVED = 65_536  # numbers of groups that one entry of the journal reserves


class Desk:
    """Assignments out, outcomes in. Any thread may call it."""

    def __init__(
        self,
        tasks: TaskSet[Any],
        tracker: Tracker,
        drawing: Drawing,
        *,
        group_size: int,
        distinct: bool = True,
        names: tuple[str, str] = ("completions", "tokens"),
    ) -> None:
        """
        tasks: the run's.
        tracker, drawing: of these tasks; the desk alone writes to them from now on.
        group_size: attempts of a whole group.
        distinct: whether no task comes twice in one call of `take`, as far as there are as many; where tasks are few, that
            would even out what is drawn the more, the more are asked for at once.
        names: what attempts and their units are called in metrics.
        """
        self._tasks = tasks
        self._tracker = tracker
        self._drawing = drawing
        self._group_size = group_size
        self._distinct = distinct
        self._names = names
        self.waste = Waste()
        self.journal: Journal | None = None  # where reports are written before they are acknowledged
        self.lock = threading.RLock()
        self._next_group = 0
        self._reserved = 0  # groups whose numbers the journal has reserved
        self._reported: dict[str, int] = {}  # outcomes that each actor has reported; those of dead actors stay
        self._lost = 0  # outcomes that were acknowledged and then lost
        self._out: dict[str, int] = {}  # assignments that each living actor has and has not reported
        self._labels, self._label_of = _labels(tasks)
        self._drawn = np.zeros(len(self._labels))  # draws by label, the older the lighter
        self._drawn_at_change: np.ndarray | None = None  # shares of the draws when the curriculum last changed
        self._since_change = 0  # draws
        self._own_changes = 0
        self._drawing_changes = drawing.changes  # when last looked

    # ------------------------------------------------------------------------------------------- for actors

    def take(self, actor: str, count: int, *, held: int | None = None) -> list[Assignment[Any]]:
        """The next `count` assignments, for an actor that says how many it holds; None where it got every answer so far."""
        with self.lock:
            chosen = self._choose(count)
            self._reserve(len(chosen))
            found = []
            for number, hint in chosen:
                found.append(Assignment(self._next_group, number, self._tasks[number], hint))
                self._next_group += 1
            self._out[actor] = (self._out.get(actor, 0) if held is None else held) + len(found)
            self._count_draws([number for number, _ in chosen])
            return found

    def report(self, actor: str, first: int, outcomes: Sequence[Outcome]) -> int:
        """Take in outcomes of an actor, the first of which is the `first` it ever reports, counted from 0.

        Those it has reported before change nothing. Returns the number of the next one: all before it are safe, and need not be
        reported again. Where some are missing before the first, for a disk took no entry and the head was lost, they are
        counted as lost.
        """
        with self.lock:
            known = self._reported.get(actor, 0)
            new = list(outcomes[max(0, known - first) :])
            if new:
                first = max(first, known)
                self._write({"actor": actor, "first": first, "outcomes": [list(asdict(o).values()) for o in new]})
                self._take_in(actor, first, new)
            return self._reported.get(actor, 0)

    def forget(self, actor: str) -> int:
        """An actor died: what it still had will hardly be reported. Returns how many assignments those were."""
        with self.lock:
            return self._out.pop(actor, 0)

    # ------------------------------------------------------------------------------------------- for learners

    def score(self, tasks: np.ndarray, sums: np.ndarray, windows: np.ndarray) -> None:
        """The learner's losses by task, as `Tracker.score` takes them: numbers (n,), sums of losses and windows (n,)."""
        with self.lock:
            self._write({"tasks": tasks.tolist(), "sums": sums.tolist(), "windows": windows.tolist()})
            self._take_in_scores(tasks, sums, windows)

    def stale(self, groups: int) -> None:
        """The groups, over the whole run, that were written and then found too old to be learnt from.

        They are moved from what was kept to what was wasted, each with the mean size of those kept: shards count groups only.
        """
        with self.lock:
            waste = self.waste
            new, kept = groups - waste.rejected["stale"].groups, waste.kept
            if 0 < new <= kept.groups:
                share = new / kept.groups
                waste.discard("stale", Amount(new, round(share * kept.attempts), round(share * kept.units)))

    # --------------------------------------------------------------------------------------------- watching it

    @property
    def changes(self) -> int:
        """How often the curriculum has changed what it draws: a stage was unlocked, or half of the draws went elsewhere."""
        with self.lock:
            return self._drawing.changes + self._own_changes

    def metrics(self) -> dict[str, float]:
        """Waste, assignments not yet reported, and by task (by family where tasks are many) what is known and drawn of it."""
        with self.lock:
            self._look_for_change()
            found = {
                "groups_out": float(sum(self._out.values())),
                "outcomes_lost": float(self._lost),
                "curriculum/changes": float(self._drawing.changes + self._own_changes),
            }
            shares = self._drawn / max(1e-9, self._drawn.sum())
            known = self._known()
            for index, label in enumerate(self._labels):
                found |= {f"{label}/{name}": float(values[index]) for name, values in known.items()}
                found[f"{label}/drawn"] = float(shares[index])
            return {name: value for name, value in found.items() if np.isfinite(value)} | self.waste.metrics(
                attempts=self._names[0], units=self._names[1]
            )

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a resumed run needs: as JSON, and as arrays. Assignments handed out and not reported are not in it."""
        with self.lock:
            about = {
                "next_group": self._next_group,
                "reported": dict(self._reported),
                "lost": self._lost,
                "own_changes": self._own_changes,
                "since_change": self._since_change,
                "waste": self.waste.state(),
                "tasks": self._fingerprint(),
            }
            parts = {"tracker": self._tracker.state(), "drawing": self._drawing.state()}
            arrays = {f"{part}.{name}": array for part, found in parts.items() for name, array in found.items()}
            if self._drawn_at_change is not None:
                arrays["drawn_at_change"] = self._drawn_at_change.copy()
            return about, {**arrays, "drawn": self._drawn.copy()}

    def load_state(self, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was called.

        Raises:
            ValueError: it is of another set of tasks.
        """
        if about["tasks"] != self._fingerprint():
            raise ValueError(
                "tasks: the checkpoint's record is of other tasks than there are now; go on with those it was made with"
            )
        with self.lock:
            for part, owner in (("tracker", self._tracker), ("drawing", self._drawing)):
                mine = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{part}.")}
                owner.load_state(mine)
            self._next_group = self._reserved = int(about["next_group"])
            self._reported = {str(actor): int(count) for actor, count in about["reported"].items()}
            self._lost = int(about["lost"])
            self._own_changes, self._since_change = int(about["own_changes"]), int(about["since_change"])
            self.waste = Waste.from_state(about["waste"])
            self._drawn = np.array(arrays["drawn"])
            self._drawing_changes = self._drawing.changes
            before = arrays.get("drawn_at_change")
            self._drawn_at_change = None if before is None else np.array(before)

    def replay(self, entries: Any) -> int:
        """Take in the entries of a journal again, as they were taken in first. Returns how many outcomes they held."""
        count = 0
        with self.lock:
            for entry in entries:
                if "outcomes" in entry:
                    outcomes = [Outcome(*values) for values in entry["outcomes"]]
                    self._take_in(entry["actor"], entry["first"], outcomes)
                    count += len(outcomes)
                elif "changed_to" in entry:
                    self._take_in_change(np.array(entry["changed_to"]))
                elif "tasks" in entry:
                    self._take_in_scores(*(np.array(entry[name]) for name in ("tasks", "sums", "windows")))
                else:
                    self._next_group = self._reserved = int(entry["reserved"])
        return count

    # ------------------------------------------------------------------------------------------- of a kind of run

    def _choose(self, count: int) -> list[tuple[int, float]]:
        """The tasks that are handed out next, each with its hint."""
        return [(int(number), 0.0) for number in self._drawing.draw(count, distinct=self._distinct)]

    def _learnt_of(self, outcomes: Sequence[Outcome]) -> None:
        """Whatever else a kind of run makes of new outcomes."""

    # --------------------------------------------------------------------------------------------------- its parts

    def _write(self, entry: Any) -> None:
        if self.journal is not None:
            self.journal.append(entry)

    def _reserve(self, count: int) -> None:
        # A number that was given must not be given again by a head that takes this one's place.
        if self._next_group + count > self._reserved:
            self._reserved = self._next_group + count + RESERVED
            self._write({"reserved": self._reserved})

    def _take_in(self, actor: str, first: int, outcomes: Sequence[Outcome]) -> None:
        self._lost += first - self._reported.get(actor, 0)
        self._reported[actor] = first + len(outcomes)
        if actor in self._out:
            self._out[actor] = max(0, self._out[actor] - len(outcomes))
        for outcome in outcomes:
            if outcome.fate != "failed":  # nothing was sampled
                self.waste.count(outcome.fate, Amount(1, outcome.sampled, outcome.units))
        # With a hint a task is another, easier one: its own pass rate learns nothing from that.
        judged = [o for o in outcomes if not o.hint]
        if judged:
            numbers = np.array([o.number for o in judged])
            # Of a task that cannot be tried or judged nothing comes either: else it would stay as promising as an untried one.
            attempts = np.array([o.attempts or self._group_size for o in judged])
            self._tracker.record(
                numbers,
                np.array([o.passes for o in judged]),
                attempts,
                lengths=np.array([o.units / o.sampled if o.sampled else np.nan for o in judged]),
                returns=np.array([o.returns / o.attempts if o.attempts else np.nan for o in judged]),
            )
            self._drawing.update(numbers)
        self._learnt_of(outcomes)

    def _take_in_scores(self, tasks: np.ndarray, sums: np.ndarray, windows: np.ndarray) -> None:
        self._tracker.score(tasks, sums, windows)
        self._drawing.update(tasks)

    def _count_draws(self, numbers: Sequence[int]) -> None:
        if len(numbers):
            labels = self._label_of[np.array(numbers)]
            self._drawn *= (1.0 - 1.0 / RECENT) ** len(numbers)
            self._drawn += np.bincount(labels, minlength=len(self._labels))
            self._since_change += len(numbers)

    def _look_for_change(self) -> None:
        if self._drawing.changes != self._drawing_changes:
            # What it counts itself moves the draws as well, and is one change.
            self._drawing_changes = self._drawing.changes
            self._drawn_at_change, self._since_change = None, 0
        if self._since_change < RECENT:
            return
        shares = self._drawn / self._drawn.sum()
        if self._drawn_at_change is None:
            self._drawn_at_change = shares
        elif 0.5 * np.abs(shares - self._drawn_at_change).sum() > CHANGED:
            self._write({"changed_to": self._drawn.tolist()})
            self._take_in_change(self._drawn)

    def _take_in_change(self, drawn: np.ndarray) -> None:
        self._drawn, self._drawn_at_change = drawn, drawn / drawn.sum()
        self._since_change = 0
        self._own_changes += 1

    def _known(self) -> dict[str, np.ndarray]:
        """Figures by label, NaN where nothing is known."""
        tracker = self._tracker
        if len(self._labels) == len(self._tasks) and self._labels[0].startswith("task/"):
            alpha, beta = tracker.posterior()
            return {
                "pass_rate": alpha / (alpha + beta),
                "return": tracker.mean_return,
                "length": tracker.mean_length,
            }
        alpha, beta = tracker.prior()
        return {"pass_rate": alpha / (alpha + beta)}

    def _fingerprint(self) -> str:
        """Tells this set of tasks, in this order, from every other."""
        return blake2b(b"".join(task.key.to_bytes(8, "little") for task in self._tasks), digest_size=16).hexdigest()


def families_of(tasks: TaskSet[Any]) -> np.ndarray:
    """int64 (tasks,): number of each task's family."""
    found = np.zeros(len(tasks), np.int64)
    for index, family in enumerate(tasks.families):
        found[tasks.of(family)] = index
    return found


def _labels(tasks: TaskSet[Any]) -> tuple[list[str], np.ndarray]:
    """Under what names metrics tell of tasks, and the number of each task's name, int64 (tasks,)."""
    if len(tasks) <= MOST_LABELS and all(hasattr(task, "name") for task in tasks):
        return [f"task/{task.name}" for task in tasks], np.arange(len(tasks))
    return [f"family/{family}" for family in tasks.families], families_of(tasks)
