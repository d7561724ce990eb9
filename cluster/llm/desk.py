"""The head's desk for language models: hands prompts to actors, takes what became of them, and keeps the record of both.

An outcome counts once: only for a group that was handed out and has not been reported yet. Prompts that no completion passed may
come again with the beginning of their solution (GHPO, arXiv 2507.10628).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from actors.assignments import Assignment, Outcome
from actors.llm.tasks import Task, TaskSet
from cluster.curriculum.drawing import make_drawing
from cluster.curriculum.filter import Amount, Waste
from cluster.curriculum.tracker import Tracker
from configs.llm import LlmConfig


class Desk:
    """Prompts out, outcomes in. Any thread may call it."""

    def __init__(self, config: LlmConfig, tasks: TaskSet, *, seed: int) -> None:
        self._config = config
        self._tasks = tasks
        self.waste = Waste()
        self._family_of = np.zeros(len(tasks), np.int64)
        for index, family in enumerate(tasks.families):
            self._family_of[tasks.of(family)] = index
        self._tracker = Tracker(self._family_of, discount=config.curriculum.discount)
        self._drawing = make_drawing(config.curriculum, self._tracker, group_size=config.sampling.group_size, seed=seed)
        self._lock = threading.Lock()
        self._next_group = 0
        self._out: dict[int, tuple[str, int, float]] = {}  # group → who has it, its prompt, its hint
        self._again: deque[tuple[int, float]] = deque()  # prompts to be sampled again with a hint
        self._updates = 0  # learner steps made
        self._drawn_at = np.zeros(len(tasks.families), np.int64)  # groups drawn, by family

    def take(self, actor: str, count: int) -> list[Assignment[Task]]:
        """The next `count` assignments, for an actor."""
        with self._lock:
            hinted = [self._again.popleft() for _ in range(min(count, len(self._again)))]
            drawn = [(int(number), 0.0) for number in self._drawing.draw(count - len(hinted))]
            found = []
            for number, hint in hinted + drawn:
                group, self._next_group = self._next_group, self._next_group + 1
                self._out[group] = (actor, number, hint)
                self._drawn_at[self._family_of[number]] += 1
                found.append(Assignment(group, number, self._tasks[number], hint))
            return found

    def record(self, outcomes: Sequence[Outcome]) -> int:
        """Take in outcomes. Returns how many of them were known: a second report of a group changes nothing."""
        with self._lock:
            new = [o for o in outcomes if self._out.pop(o.group, None) is not None]
            for outcome in new:
                if outcome.fate != "failed":  # nothing was sampled
                    self.waste.count(outcome.fate, Amount(1, outcome.sampled, outcome.units))
            # With a hint a prompt is another, easier one: its own pass rate learns nothing from that.
            judged = [o for o in new if not o.hint]
            if judged:
                numbers = np.array([o.number for o in judged])
                passes = np.array([o.passes for o in judged])
                # Of a prompt that cannot be sampled or judged nothing comes either: else it would stay as promising as untried.
                attempts = np.array([o.attempts or self._config.sampling.group_size for o in judged])
                self._tracker.record(numbers, passes, attempts)
                self._drawing.update(numbers)
            self._hint([o for o in new if o.attempts and not o.passes])
            return len(new)

    def _hint(self, failed: Sequence[Outcome]) -> None:
        settings = self._config.algorithm.hints
        if not settings.shares or self._updates < settings.after:
            return
        for outcome in failed:
            more = [share for share in settings.shares if share > outcome.hint]
            if more and self._tasks[outcome.number].solution:
                self._again.append((outcome.number, more[0]))

    def learnt(self, updates: int) -> None:
        """The learner steps made so far."""
        self._updates = updates

    def stale(self, groups: int) -> None:
        """The groups, over the whole run, that were written and then found too old to be learnt from.

        They are moved from what was kept to what was wasted, each with the mean size of those kept: shards count groups only.
        """
        with self._lock:
            waste = self.waste
            new, kept = groups - waste.rejected["stale"].groups, waste.kept
            if 0 < new <= kept.groups:
                share = new / kept.groups
                waste.discard("stale", Amount(new, round(share * kept.attempts), round(share * kept.units)))

    def forget(self, actor: str) -> int:
        """An actor died: nobody will report the groups it had. Returns how many those were."""
        with self._lock:
            lost = [group for group, (who, _, _) in self._out.items() if who == actor]
            for group in lost:
                del self._out[group]
            return len(lost)

    def metrics(self) -> dict[str, float]:
        """Waste, groups handed out and not yet reported, and by family the tracker's pass rate and the share of the draws."""
        with self._lock:
            passed, failed = self._tracker.prior()
            rates = passed / (passed + failed)
            drawn = self._drawn_at / max(1, self._drawn_at.sum())
            found = {"groups_out": float(len(self._out)), "hinted_waiting": float(len(self._again))}
            for index, family in enumerate(self._tasks.families):
                found[f"family/{family}/pass_rate"] = float(rates[index])
                found[f"family/{family}/drawn"] = float(drawn[index])
            return found | self.waste.metrics()

    def _prompts(self) -> str:
        """Tells this set of prompts, in this order, from every other."""
        return blake2b(b"".join(task.key.to_bytes(8, "little") for task in self._tasks), digest_size=16).hexdigest()

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What a resumed run needs: as JSON, and as arrays. Groups that were handed out and not reported are not in it."""
        with self._lock:
            about = {
                "next_group": self._next_group,
                "again": [[number, hint] for number, hint in self._again],
                "waste": self.waste.state(),
                "updates": self._updates,
                "tasks": self._prompts(),
            }
            parts = {"tracker": self._tracker.state(), "drawing": self._drawing.state()}
            arrays = {f"{part}.{name}": array for part, found in parts.items() for name, array in found.items()}
            return about, {**arrays, "drawn": self._drawn_at.copy()}

    def load_state(self, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was called.

        Raises:
            ValueError: it is of another set of prompts.
        """
        if about["tasks"] != self._prompts():
            raise ValueError(
                "tasks: the checkpoint's record is of other prompts than there are now; go on with those it was made with"
            )
        with self._lock:
            self._next_group = int(about["next_group"])
            self._again = deque((int(number), float(hint)) for number, hint in about["again"])
            self.waste = Waste.from_state(about["waste"])
            self._updates = int(about["updates"])
            self._drawn_at = np.array(arrays["drawn"])
            for part, owner in (("tracker", self._tracker), ("drawing", self._drawing)):
                mine = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{part}.")}
                owner.load_state(mine)
