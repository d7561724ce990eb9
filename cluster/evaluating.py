"""Evaluations of a control run: what plays them, and what the head is told of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig
from learners.policy import Policy

if TYPE_CHECKING:
    from actors.env_tasks import EnvTask
    from actors.task_set import TaskSet


class Evaluating:
    """Plays the episodes of evaluations, the same ones every time: those of the environment, or of a fixed list of tasks."""

    def __init__(self, config: RunConfig, tasks: TaskSet[EnvTask] | None, policy: Policy) -> None:
        """
        tasks: of the run, None where there is the environment alone.
        policy: gets the weights that are evaluated.

        Raises:
            EnvError: an environment cannot be built or does not fit.
        """
        from actors.evaluate import Evaluator, TaskEvaluator

        settings = config.eval
        self._policy = policy
        self._plain: Evaluator | None = None
        if tasks is None:
            self._plain = Evaluator(
                config.env, episodes=settings.episodes, seed=settings.seed, deterministic=settings.deterministic
            )
            return
        numbers = evaluated_tasks(len(tasks), settings.tasks)
        self._names = [tasks[number].name for number in numbers]
        self._by_task = TaskEvaluator(
            config.env,
            config.tasks,
            tasks,
            numbers,
            episodes=settings.episodes,
            seed=settings.seed,
            deterministic=settings.deterministic,
        )

    def run(self, weights: bytes) -> dict[str, Any]:
        """Evaluate these weights. Returns what `Evaluation.of` takes, as JSON.

        Raises:
            EnvError: as `actors.evaluate` does.
        """
        began = time.monotonic()
        self._policy.load(weights)
        if self._plain is not None:
            return {"returns": self._plain.run(self._policy), "tasks": {}, "seconds": time.monotonic() - began}
        tasks = {
            name: {"returns": found.returns, "passed": found.successes}
            for name, found in zip(self._names, self._by_task.run(self._policy), strict=True)
        }
        returns = [value for one in tasks.values() for value in one["returns"] or ()]
        return {"returns": returns, "tasks": tasks, "seconds": time.monotonic() - began}

    def close(self) -> None:
        """Release the environments."""
        (self._by_task if self._plain is None else self._plain).close()


def evaluated_tasks(count: int, most: int | None) -> list[int]:
    """Numbers of the tasks, of `count`, that every evaluation plays: at most `most`, spread evenly over all."""
    chosen = count if most is None else min(most, count)
    return [index * count // chosen for index in range(chosen)]
