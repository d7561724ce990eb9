"""The head's desk for language models: prompts that no completion passed may come again with the beginning of their solution.

GHPO (arXiv 2507.10628).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from actors.assignments import Outcome
from actors.llm.tasks import Task
from actors.task_set import TaskSet
from cluster.curriculum.desk import Desk, families_of
from cluster.curriculum.drawing import make_drawing
from cluster.curriculum.tracker import Tracker
from configs.llm import LlmConfig


class PromptDesk(Desk):
    """Hands out prompts. Any thread may call it."""

    def __init__(self, config: LlmConfig, tasks: TaskSet[Task], *, seed: int) -> None:
        """seed: of the draws."""
        families = families_of(tasks)
        tracker = Tracker(families, discount=config.curriculum.discount)
        size = config.sampling.group_size
        drawing = make_drawing(config.curriculum, tracker, group_size=size, seed=seed, stages=families)
        super().__init__(tasks, tracker, drawing, group_size=size)
        self._hints = config.algorithm.hints
        self._again: deque[tuple[int, float]] = deque()  # prompts to be sampled again with a hint
        self._updates = 0  # learner steps made

    def learnt(self, updates: int) -> None:
        """The learner steps made so far."""
        self._updates = updates

    def metrics(self) -> dict[str, float]:
        """As `Desk.metrics`, with the prompts that wait to be sampled with a hint."""
        return super().metrics() | {"hinted_waiting": float(len(self._again))}

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """As `Desk.state`."""
        with self.lock:
            about, arrays = super().state()
            return {**about, "again": [list(one) for one in self._again], "updates": self._updates}, arrays

    def load_state(self, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """As `Desk.load_state`."""
        with self.lock:
            super().load_state(about, arrays)
            self._again = deque((int(number), float(hint)) for number, hint in about["again"])
            self._updates = int(about["updates"])

    def _choose(self, count: int) -> list[tuple[int, float]]:
        hinted = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        return hinted + super()._choose(count - len(hinted))

    def _learnt_of(self, outcomes: Sequence[Outcome]) -> None:
        if not self._hints.shares or self._updates < self._hints.after:
            return
        for outcome in outcomes:
            more = [share for share in self._hints.shares if share > outcome.hint]
            if outcome.attempts and not outcome.passes and more and self._tasks[outcome.number].solution:
                self._again.append((outcome.number, more[0]))
