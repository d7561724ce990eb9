"""A generator of tasks and a curriculum of a user's own, which the processes of a run import by name."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.curriculum.curricula import Curriculum
from cluster.curriculum.records import Records
from configs.tasks import EnvTaskRow


def many_tasks(count: int) -> Iterator[EnvTaskRow]:
    """So many tasks, all of CartPole and alike; they differ in an argument without effect on so short episodes."""
    for number in range(count):
        yield EnvTaskRow.model_construct(id="CartPole-v1", kwargs={"max_episode_steps": 1000 + number}, threshold=20.0)


class Untried(Curriculum):
    """A curriculum of a user's own: every task once."""

    floor = 0.0

    def weights(self, records: Records) -> np.ndarray:
        return np.where(records.attempts > 0, 0.0, 1.0)
