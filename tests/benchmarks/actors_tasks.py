"""What it costs an actor to play many tasks: steps per second of `TaskEnv` against a pool of one environment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from actors.assignments import Assignment
from actors.env_tasks import EnvTask
from actors.envs import make_env
from actors.protocol import VectorEnv
from actors.task_env import TaskEnv
from actors.task_set import TaskSet
from configs.schema import EnvSettings, EnvTasksSettings

LANES = 40
ROUNDS = 5  # each measures everything once, so that a machine that drifts drifts for all
MT10 = (
    "Reach",
    "Push",
    "PickPlace",
    "DoorOpen",
    "DrawerOpen",
    "DrawerClose",
    "ButtonPressTopdown",
    "PegInsertSide",
    "WindowOpen",
    "WindowClose",
)
SETS: dict[str, list[EnvTask]] = {
    "minigrid": [
        EnvTask("MiniGrid-Empty-5x5-v0", {"size": size}, f"size {size}", "all", 0, 0.1)
        for size in (5, 6, 7, 8, 10, 12, 14, 16)
    ],
    "mt10": [EnvTask(f"MetaWorld/{name}-v3", {}, name, "all", 0, None, "success") for name in MT10],
}


def measure_tasks(*, seconds: float, threads: int = 0) -> dict[str, Any]:
    """Steps per second with random actions of a set's first task as a plain pool, alone in a `TaskEnv`, and of all its tasks.

    `mixed` steps one plain environment of each task in turn: what the tasks cost by themselves, which differs between
    them. Medians of five rounds; the tasks are drawn uniformly, without waiting.

    Args:
        seconds: time for all measurements together.
        threads: EnvPool's threads for all lanes; 0 takes one for each core.
    """
    slice_s = seconds / (len(SETS) * ROUNDS * 4)
    found: dict[str, Any] = {}
    for name, tasks in SETS.items():
        env = EnvSettings(id=tasks[0].id)
        plain = make_env(tasks[0].settings(env), num_envs=LANES, threads=threads, seed=0)
        alone = [make_env(task.settings(env), num_envs=LANES // len(tasks), threads=threads, seed=0) for task in tasks]
        one, many = (_task_env(env, some, threads) for some in (tasks[:1], tasks))
        steppers = {
            "plain": _stepper([plain]),
            "one_task": _stepper([one]),
            "all_tasks": _stepper([many]),
            "mixed": _stepper(alone),
        }
        rates: dict[str, list[float]] = {key: [] for key in steppers}
        for _ in range(ROUNDS):
            for key, step in steppers.items():
                rates[key].append(_rate(step, slice_s))
        for made in (plain, one, many, *alone):
            made.close()
        medians = {key: statistics.median(values) for key, values in rates.items()}
        found[name] = {
            "lanes": LANES,
            "tasks": len(tasks),
            **{f"{key}_steps_per_s": value for key, value in medians.items()},
            "one_task_ratio": medians["one_task"] / medians["plain"],
            "all_tasks_ratio": medians["all_tasks"] / medians["mixed"],
        }
    return found


def _task_env(env: EnvSettings, some: Sequence[EnvTask], threads: int) -> TaskEnv:
    tasks = TaskSet(some)
    generator = np.random.default_rng(0)

    def ask(count: int) -> list[Assignment[EnvTask]]:
        return [Assignment(0, number, tasks[number]) for number in generator.integers(len(tasks), size=count).tolist()]

    return TaskEnv(env, EnvTasksSettings(), tasks, ask, num_envs=LANES, threads=threads, seed=0)


def _stepper(envs: Sequence[VectorEnv]) -> Callable[[], int]:
    """A function that steps started environments once, all of them sent to before the first is waited for."""
    generator = np.random.default_rng(0)
    actions = [[env.sample_actions(env.num_envs, generator) for _ in range(16)] for env in envs]
    for env in envs:
        env.start()
    turn = 0

    def step() -> int:
        nonlocal turn
        lanes = [env.recv().env_id for env in envs]
        for env, acting, some in zip(envs, lanes, actions, strict=True):
            env.send(some[turn % 16][: len(acting)], acting)
        turn += 1
        return sum(map(len, lanes))

    return step


def _rate(step: Callable[[], int], seconds: float) -> float:
    """Steps per second of calling `step` for so long."""
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        steps += step()
    return steps / elapsed
