"""Evaluation: episodes on environments and seeds of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from numpy.typing import NDArray

from actors.agent import Agent
from actors.assignments import Assignment
from actors.env_tasks import EnvTask
from actors.envs import make_env
from actors.protocol import BoolArray, EnvError, Policy, VectorEnv
from actors.task_env import TaskEnv, passed
from actors.task_set import TaskSet
from configs.schema import EnvSettings, EnvTasksSettings

MAX_LANES = 32
MAX_FRAMES = 500  # in one GIF; longer episodes are shown with a stride
MAX_PIXELS = 320  # of a frame's longer side
FRAME_MS = 40


class Evaluator:
    """Runs the same episodes with one policy after another.

    Every lane plays a fixed number of episodes. Taking the first `episodes` to finish would prefer short ones.
    """

    def __init__(
        self, settings: EnvSettings, *, episodes: int, seed: int, deterministic: bool = True, threads: int = 0
    ) -> None:
        """Builds the environments.

        Args:
            settings: the environment.
            episodes: episodes in one evaluation, ≥ 1.
            seed: of the environments; every `run` begins with it again.
            deterministic: act without noise for exploration; else as the lane that explores least.
            threads: EnvPool's threads; 0 lets EnvPool decide.

        Raises:
            EnvError: as `make_env`.
        """
        self._quota = _quota(episodes)
        self._seed, self._deterministic = seed, deterministic
        self._id = settings.id
        self._stack = settings.stack
        self._env = make_env(settings, num_envs=len(self._quota), threads=threads, seed=seed)

    def run(self, policy: Policy) -> list[float]:
        """Returns of the episodes, undiscounted, lane by lane and in time order within a lane.

        Raises:
            EnvError: an environment raises so often that the episodes cannot be finished.
        """
        played = _play(
            self._env,
            policy,
            self._quota,
            seed=self._seed,
            deterministic=self._deterministic,
            stack=self._stack,
            name=self._id,
        )
        return [return_ for return_, _ in played]

    def close(self) -> None:
        """Release the environments."""
        self._env.close()


@dataclass(frozen=True)
class TaskResult:
    """The episodes of one task in an evaluation."""

    number: int  # of the task
    returns: list[float]  # of each episode, undiscounted
    successes: list[bool] | None  # of each episode; None where nothing says when one has passed


class TaskEvaluator:
    """Runs the same episodes of a fixed list of tasks with one policy after another.

    The environments of a task are built, played and closed before the next: those of one task live at a time.
    """

    def __init__(
        self,
        env: EnvSettings,
        settings: EnvTasksSettings,
        tasks: TaskSet[EnvTask],
        numbers: Sequence[int],
        *,
        episodes: int,
        seed: int,
        deterministic: bool = True,
        threads: int = 0,
    ) -> None:
        """
        Args:
            env: library and stack of frames.
            settings: how tasks are told and padded.
            tasks: all tasks of the run.
            numbers: of the tasks to evaluate, in the order of the results.
            episodes: of each task in one evaluation, ≥ 1.
            seed: of the environments, for every task alike; a task's episodes are the same whatever the list.
            threads: EnvPool's threads; 0 lets EnvPool decide.

        Raises:
            EnvError: as `task_schema`.
        """
        self._tasks, self._numbers = tasks, list(numbers)
        self._quota, self._seed, self._stack = _quota(episodes), seed, env.stack
        self._deterministic = deterministic
        self._playing = 0  # number of the task in play
        self._env = TaskEnv(
            env,
            settings,
            tasks,
            lambda count: [Assignment(0, self._playing, tasks[self._playing])] * count,
            num_envs=len(self._quota),
            threads=threads,
            seed=seed,
        )

    def run(self, policy: Policy) -> list[TaskResult]:
        """Results of the tasks, in the order of their list.

        Raises:
            EnvError: a task's environments cannot be built, or one raises so often that the episodes cannot be finished.
        """
        return [self._run(policy, number) for number in self._numbers]

    def close(self) -> None:
        """Release the environments."""
        self._env.close()

    def _run(self, policy: Policy, number: int) -> TaskResult:
        self._playing, task = number, self._tasks[number]
        try:
            played = _play(
                self._env,
                policy,
                self._quota,
                seed=self._seed,
                deterministic=self._deterministic,
                stack=self._stack,
                name=task.name,
            )
        finally:
            self._env.close()
        successes = None
        if task.threshold is not None or task.success is not None:
            successes = [passed(task, return_, success) for return_, success in played]
        return TaskResult(number, [return_ for return_, _ in played], successes)


def _quota(episodes: int) -> NDArray[np.int64]:
    """Episodes of each lane, which are alike but for one."""
    lanes = min(episodes, MAX_LANES)
    quota = np.full(lanes, episodes // lanes, np.int64)
    quota[: episodes % lanes] += 1
    return quota


def _play(
    env: VectorEnv, policy: Policy, quota: NDArray[np.int64], *, seed: int, deterministic: bool, stack: int, name: str
) -> list[tuple[float, bool]]:
    """Play the first `quota` (lanes,) episodes of each lane that do not break.

    Returns the undiscounted return of each, and whether its flag of success was true at any step, lane by lane and in time
    order within a lane.

    Raises:
        EnvError: the environment called `name` raises so often that the episodes cannot be finished.
    """
    lanes = env.num_envs
    generator = np.random.default_rng(seed)
    played: list[list[tuple[float, bool]]] = [[] for _ in range(lanes)]
    running = np.zeros(lanes)
    success: BoolArray = np.zeros(lanes, np.bool_)
    missing = quota.copy()
    broken = 0
    agent = Agent(policy, env.schema, lanes, stack=stack, first_lane=lanes)
    env.start()
    while missing.any():
        result = env.recv()
        ids = result.env_id
        running[ids] += np.where(result.reset, 0.0, result.reward)
        if result.success is not None:
            success[ids] |= result.success & ~(result.reset | result.broken)
        ended = result.terminated | result.truncated
        for lane in ids[ended & ~result.broken].tolist():
            if missing[lane]:
                missing[lane] -= 1
                played[lane].append((float(running[lane]), bool(success[lane])))
        running[ids[ended]] = 0.0
        success[ids[ended]] = False
        broken += int(result.broken.sum())
        if broken > 10 * quota.sum():
            raise EnvError(f"environment {name!r} raised in {broken} episodes of one evaluation")
        agent.observe(result)
        env.send(agent.act(result, deterministic=deterministic, generator=generator).action, ids)
    return [episode for lane in played for episode in lane]


def evaluate(settings: EnvSettings, policy: Policy, *, episodes: int, seed: int, threads: int = 0) -> list[float]:
    """Returns of `episodes` deterministic episodes; see `Evaluator`."""
    evaluator = Evaluator(settings, episodes=episodes, seed=seed, threads=threads)
    try:
        return evaluator.run(policy)
    finally:
        evaluator.close()


def record(settings: EnvSettings, policy: Policy, *, path: Path | str, seed: int) -> float:
    """Draw one deterministic episode into a GIF, with the environment's own renderer. Returns its return.

    Long episodes are drawn with a stride and large pictures with fewer pixels; folders of `path` are made.

    Raises:
        EnvError: the environment cannot be built, draw itself on this machine, or finish an episode.
    """
    env = make_env(settings, num_envs=1, seed=seed, render=True)
    agent = Agent(policy, env.schema, 1, stack=settings.stack)
    generator = np.random.default_rng(seed)
    frames: list[NDArray[np.uint8]] = []
    stride, total, step = 1, 0.0, 0
    try:
        env.start()
        while True:
            result = env.recv()
            if result.broken[0]:
                raise EnvError(f"environment {settings.id!r} raised while its episode was recorded; see the log")
            total += float(result.reward[0]) * (not result.reset[0])
            ended = bool(result.terminated[0] or result.truncated[0])
            if step % stride == 0 or ended:
                frames.append(_shrink(env.frame(0)))
            if len(frames) > MAX_FRAMES:
                frames, stride = frames[::2], stride * 2
            if ended:
                break
            agent.observe(result)
            env.send(agent.act(result, deterministic=True, generator=generator).action, result.env_id)
            step += 1
    finally:
        env.close()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(Path(path), frames, extension=".gif", duration=FRAME_MS, loop=0)
    return total


def _shrink(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    step = -(-max(frame.shape[:2]) // MAX_PIXELS)
    return frame[::step, ::step].copy()
