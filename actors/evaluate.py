"""Evaluation: deterministic episodes on environments and seeds of their own."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from numpy.typing import NDArray

from actors.agent import Agent
from actors.envs import make_env
from actors.protocol import EnvError, Policy
from configs.schema import EnvSettings

MAX_LANES = 32
MAX_FRAMES = 500  # in one GIF; longer episodes are shown with a stride
MAX_PIXELS = 320  # of a frame's longer side
FRAME_MS = 40


class Evaluator:
    """Runs the same deterministic episodes with one policy after another.

    Every lane plays a fixed number of episodes. Taking the first `episodes` to finish would prefer short ones.
    """

    def __init__(self, settings: EnvSettings, *, episodes: int, seed: int, threads: int = 0) -> None:
        """Builds the environments.

        Args:
            settings: the environment.
            episodes: episodes in one evaluation, ≥ 1.
            seed: of the environments; every `run` begins with it again.
            threads: EnvPool's threads; 0 lets EnvPool decide.

        Raises:
            EnvError: as `make_env`.
        """
        lanes = min(episodes, MAX_LANES)
        self._quota = np.full(lanes, episodes // lanes)
        self._quota[: episodes % lanes] += 1
        self._seed = seed
        self._id = settings.id
        self._stack = settings.stack
        self._env = make_env(settings, num_envs=lanes, threads=threads, seed=seed)

    def run(self, policy: Policy) -> list[float]:
        """Returns of the episodes, undiscounted, lane by lane and in time order within a lane.

        Raises:
            EnvError: an environment raises so often that the episodes cannot be finished.
        """
        env, lanes = self._env, self._env.num_envs
        generator = np.random.default_rng(self._seed)
        returns: list[list[float]] = [[] for _ in range(lanes)]
        running = np.zeros(lanes)
        missing = self._quota.copy()
        broken = 0
        agent = Agent(policy, env.schema, lanes, stack=self._stack)
        env.start()
        while missing.any():
            result = env.recv()
            ids = result.env_id
            running[ids] += np.where(result.reset, 0.0, result.reward)
            ended = result.terminated | result.truncated
            for lane in ids[ended & ~result.broken].tolist():
                if missing[lane]:
                    missing[lane] -= 1
                    returns[lane].append(float(running[lane]))
            running[ids[ended]] = 0.0
            broken += int(result.broken.sum())
            if broken > 10 * self._quota.sum():
                raise EnvError(f"environment {self._id!r} raised in {broken} episodes of one evaluation")
            agent.observe(result)
            env.send(agent.act(result, deterministic=True, generator=generator).action, ids)
        return [value for lane in returns for value in lane]

    def close(self) -> None:
        """Release the environments."""
        self._env.close()


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
