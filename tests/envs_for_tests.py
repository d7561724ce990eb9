"""Environments of our own for tests, as a user would write them: named `tests.envs_for_tests:<function>`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.protocol import EnvStep
from replay.schema import Field, StepSchema


class Counter(gymnasium.Env[Any, Any]):
    """Observes [episode, step]; the reward of step t (from 1) is t. Ends as it is told.

    terminate_at, truncate_at: steps after which an episode terminates or is truncated; 0 is never.
    raise_at: step that raises, in every episode whose number is odd; 0 is never.
    spread: lane-dependent number of steps added to `terminate_at`, drawn at reset.
    """

    def __init__(
        self,
        terminate_at: int = 0,
        truncate_at: int = 0,
        raise_at: int = 0,
        spread: int = 0,
        broken_reset: bool = False,
    ) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(np.array([-1.0, 0.0]), np.array([3.0, 10.0]), dtype=np.float64)
        self._ends = (terminate_at, truncate_at, raise_at)
        self._spread = spread
        self._broken_reset = broken_reset
        self._episode = -1
        self._extra = 0
        self.last_action: Any = None

    def _observe(self) -> np.ndarray:
        return np.array([self._episode, self._step], np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self._broken_reset:
            raise OSError("simulator lost")
        self._episode += 1
        self._step = 0
        if seed is not None and self._spread:
            self._extra = int(self.np_random.integers(self._spread + 1))
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        terminate_at, truncate_at, raise_at = self._ends
        self._step += 1
        self.last_action = action
        if self._step == raise_at and self._episode % 2 == 1:
            raise RuntimeError("physics exploded")
        terminated = bool(terminate_at) and self._step >= terminate_at + self._extra
        return self._observe(), float(self._step), terminated, bool(truncate_at) and self._step >= truncate_at, {}

    def render(self) -> Any:
        picture = np.zeros((400, 700, 3), np.uint8)
        picture[:, : self._step % 700] = 255
        return picture


class Camera(gymnasium.Env[Any, Any]):
    """Nested Dict observation with a uint8 picture; discrete actions counted from 1."""

    def __init__(self) -> None:
        self.observation_space = spaces.Dict(
            {
                "picture": spaces.Box(0, 255, (4, 5, 3), np.uint8),
                "body": spaces.Dict({"joints": spaces.Box(-1.0, 1.0, (3,), np.float64), "gear": spaces.Discrete(4)}),
            }
        )
        self.action_space = spaces.Discrete(3, start=1)

    def _observe(self, value: int) -> dict[str, Any]:
        return {
            "picture": np.full((4, 5, 3), value, np.uint8),
            "body": {"joints": np.full(3, value / 10, np.float64), "gear": value % 4},
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(int(action)), float(action), False, False, {}


class Scripted:
    """A `VectorEnv` whose lanes play episodes of random lengths and ends, in random order where `batch_size < num_envs`.

    Observes [lane, episode, step], as frames too if asked; the reward of step t (from 1) is t. The actions are [lane, episode,
    step of the decision, place in the chunk, policy version], which `Clockwork` chooses. One end in three is terminal, one is
    truncated, and one breaks.
    """

    def __init__(self, num_envs: int, batch_size: int, *, longest: int, seed: int, frames: bool = False) -> None:
        self.num_envs, self.batch_size = num_envs, batch_size
        fields = [Field("observation/state", "float32", (3,))]
        if frames:
            fields.append(Field("observation/frame", "uint8", (64, 64)))
        self.schema = StepSchema({f.name: f for f in fields}, Field("action", "float32", (5,)))
        self._longest, self._frames = longest, frames
        self._generator = np.random.default_rng(seed)
        self.broken: set[tuple[int, int]] = set()  # (lane, episode) of those that broke

    def start(self) -> None:
        self._episode = np.full(self.num_envs, -1)
        self._step = np.zeros(self.num_envs, np.int64)
        self._length = np.zeros(self.num_envs, np.int64)
        self._over = np.ones(self.num_envs, np.bool_)
        self._waiting = list(range(self.num_envs))

    def recv(self) -> EnvStep:
        if self.batch_size < self.num_envs:
            self._generator.shuffle(self._waiting)
        lanes = np.array(self._waiting[: self.batch_size], np.int32)
        del self._waiting[: self.batch_size]
        reset = self._over[lanes]
        begun = lanes[reset]
        self._episode[begun] += 1
        self._step[begun] = 0
        self._length[begun] = self._generator.integers(1, self._longest + 1, len(begun))
        self._step[lanes[~reset]] += 1
        ends = ~reset & (self._step[lanes] == self._length[lanes])
        kind = self._generator.integers(3, size=len(lanes))
        broken = ends & (kind == 2)
        self._over[lanes] = ends
        self.broken |= {(int(lane), int(self._episode[lane])) for lane in lanes[broken]}
        seen = np.stack([lanes, self._episode[lanes], self._step[lanes] - broken], 1)
        observation: dict[str, NDArray[Any]] = {"observation/state": seen.astype(np.float32)}
        if self._frames:
            shade = (seen @ [89, 23, 1]) % 251
            observation["observation/frame"] = np.tile(shade[:, None, None], (1, 64, 64)).astype(np.uint8)
        return EnvStep(
            env_id=lanes,
            observation=observation,
            reward=self._step[lanes].astype(np.float32),
            terminated=ends & (kind == 0),
            truncated=ends & (kind > 0),
            reset=reset,
            broken=broken,
        )

    def send(self, action: NDArray[Any], env_id: NDArray[np.int32]) -> None:
        assert action.shape == (len(env_id), *self.schema.action.shape)
        self._waiting += env_id.tolist()

    def sample_actions(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        return -np.ones((count, *self.schema.action.shape), np.float32)

    def frame(self, lane: int) -> NDArray[np.uint8]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def make_counter(render_mode: str | None = None, **kwargs: Any) -> Counter:
    return Counter(**kwargs)


def make_camera() -> Camera:
    return Camera()


def make_unbounded() -> Counter:
    env = Counter()
    env.action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return env


def make_tuple() -> Counter:
    env = Counter()
    env.observation_space = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3)))
    return env


def make_multi_discrete() -> Counter:
    env = Counter()
    env.action_space = spaces.MultiDiscrete([2, 3])
    return env


def make_failing() -> Counter:
    raise RuntimeError("no licence file")


def make_number() -> int:
    return 3


not_a_function = 5


class Spoilt(Counter):
    """A counter whose reward becomes `reward` after `good` steps."""

    def __init__(self, good: int = 300, reward: float = 1e38) -> None:
        super().__init__(truncate_at=20)
        self._left, self._reward = good, reward

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._left -= 1
        observation, reward, terminated, truncated, info = super().step(action)
        return observation / 20, reward if self._left >= 0 else self._reward, terminated, truncated, info


def make_spoilt(**kwargs: Any) -> Spoilt:
    return Spoilt(**kwargs)
