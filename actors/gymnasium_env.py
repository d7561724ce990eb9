"""Environments that follow gymnasium's interface: its own, and the user's as `package.module:make`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from actors.protocol import BoolArray, EnvError, EnvStep, IntArray
from actors.spaces import SpaceMap, lane_seeds
from replay.schema import StepSchema

MAX_FAILURES = 10  # exceptions of one environment with no step between them, after which it is given up

Env = gymnasium.Env[Any, Any]
log = logging.getLogger(__name__)


def ids() -> list[str]:
    """Every environment id registered with gymnasium."""
    return list(gymnasium.registry)


def is_own(env_id: str) -> bool:
    """Whether an id is `package.module:make`, and not gymnasium's own `module:Name-v0`."""
    module, _, attribute = env_id.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def constructor(env_id: str, kwargs: Mapping[str, Any], *, render: bool = False) -> Callable[[], Env]:
    """A function that builds one environment.

    Raises:
        EnvError: `package.module:make` cannot be imported. The function itself raises it when building fails, and
            `gymnasium.error.UnregisteredEnv` for an id that gymnasium does not know.
    """
    arguments = {**kwargs, "render_mode": "rgb_array"} if render else dict(kwargs)
    if is_own(env_id):
        make = _import(env_id)
    else:

        def make(**arguments: Any) -> Env:
            return gymnasium.make(env_id, disable_env_checker=True, **arguments)

    def build() -> Env:
        try:
            env = make(**arguments)
        except gymnasium.error.UnregisteredEnv:
            raise
        except Exception as error:  # the constructor is the user's: anything may come
            raise EnvError(
                f"building {env_id!r} with arguments {arguments} raised {type(error).__name__}: {error}"
            ) from error
        if not isinstance(env, gymnasium.Env):
            raise EnvError(f"{env_id!r} must return a gymnasium.Env, and returned {type(env).__name__}")
        return env

    return build


def space_map(env_id: str, kwargs: Mapping[str, Any]) -> SpaceMap:
    """Spaces of an environment; builds one and closes it.

    Raises:
        EnvError: it cannot be imported or built, or its spaces do not fit.
        gymnasium.error.UnregisteredEnv: gymnasium does not know the id.
    """
    env = constructor(env_id, kwargs)()
    try:
        return SpaceMap(env_id, env.observation_space, env.action_space)
    finally:
        env.close()


class GymnasiumEnv:
    """`gymnasium.vector.SyncVectorEnv` behind the `VectorEnv` protocol.

    An environment that raises is built anew; its episode ends with a result marked `broken` and truncated.
    """

    def __init__(
        self,
        env_id: str,
        kwargs: Mapping[str, Any],
        *,
        num_envs: int,
        seed: int,
        render: bool = False,
        success: str | None = None,
    ) -> None:
        """As `EnvPoolEnv`, which has no exceptions to expect: raises EnvError or UnregisteredEnv as `constructor` does."""
        self.num_envs = self.batch_size = num_envs
        self._success, self._flag_seen = success, False
        self._id = env_id
        build = constructor(env_id, kwargs, render=render)
        # NEXT_STEP is EnvPool's rule: a finished environment is reset by the next call, whose action is void.
        self._envs = SyncVectorEnv(
            [lambda: _Rebuilding(env_id, build)] * num_envs, autoreset_mode=AutoresetMode.NEXT_STEP
        )
        self._spaces = SpaceMap(env_id, self._envs.single_observation_space, self._envs.single_action_space)
        self._seeds: list[int | None] = [*lane_seeds(seed, num_envs)]
        self._lanes: IntArray = np.arange(num_envs, dtype=np.int32)
        self._finished: BoolArray = np.ones(num_envs, np.bool_)
        self._none: BoolArray = np.zeros(num_envs, np.bool_)
        self._action: NDArray[Any] | None = None

    @property
    def schema(self) -> StepSchema:
        return self._spaces.schema

    def start(self) -> None:
        self._finished[:] = True
        self._action = None

    def recv(self) -> EnvStep:
        if self._action is None:
            observation, _ = self._envs.reset(seed=self._seeds)
            reward, terminated, truncated = np.zeros(self.num_envs), self._none, self._none
            info: dict[str, Any] = {}
        else:
            observation, reward, terminated, truncated, info = self._envs.step(self._action)
        reset = self._finished
        self._finished = terminated | truncated
        if self._success is not None:
            self._flag_seen = self._flag_seen or self._success in info
            if not self._flag_seen and (self._finished & ~reset).any() and "broken" not in info:
                raise EnvError(
                    f"an episode of {self._id!r} has ended, and info never had {self._success!r}; it has "
                    f"{', '.join(sorted(name for name in info if not name.startswith('_'))) or 'nothing'}: correct tasks.success, "
                    "or set a threshold"
                )
        return EnvStep(
            env_id=self._lanes,
            observation=self._spaces.observation(observation),
            reward=np.asarray(reward, np.float32),
            terminated=terminated & ~reset,
            truncated=truncated & ~(terminated | reset),
            reset=reset,
            broken=np.asarray(info.get("broken", self._none), np.bool_),
            success=None if self._success is None else np.asarray(info.get(self._success, self._none)) > 0.5,
        )

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        in_order = np.empty_like(action)
        in_order[env_id] = action
        self._action = self._spaces.action(in_order)

    def sample_actions(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        return self._spaces.sample(count, generator)

    def frame(self, lane: int) -> NDArray[np.uint8]:
        try:
            picture: Any = self._envs.envs[lane].render()
        except Exception as error:  # the renderer is the user's: anything may come
            raise EnvError(f"drawing {self._id!r} raised {type(error).__name__}: {error}") from error
        if np.ndim(picture) != 3:
            raise EnvError(
                f"render() of {self._id!r} must return a picture (height, width, 3) where render_mode is rgb_array, and "
                f"returned {type(picture).__name__}"
            )
        return np.asarray(picture, np.uint8)

    def close(self) -> None:
        self._envs.close()


class _Rebuilding(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Builds its environment anew when it raises, and ends the episode there."""

    def __init__(self, env_id: str, build: Callable[[], Env]) -> None:
        super().__init__(build())
        self._id = env_id
        self._build = build
        self._observation: Any = None
        self._failures = 0
        self._seeds = np.random.default_rng(0)
        self._next_seed: int | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._seeds = np.random.default_rng(seed)
        else:
            seed = self._next_seed
        while True:
            try:
                self._observation, info = self.env.reset(seed=seed, options=options)
                break
            except Exception as error:
                self._rebuild("reset", error)
                seed = self._next_seed
        self._next_seed = None
        return self._observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            self._observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            self._rebuild("step", error)
            return self._observation, 0.0, False, True, {"broken": True}
        self._failures = 0
        return self._observation, reward, terminated, truncated, info

    def _rebuild(self, call: str, error: Exception) -> None:
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise EnvError(
                f"environment {self._id!r} raised {self._failures} times with no step between, the last time in {call}(): "
                f"{type(error).__name__}: {error}"
            ) from error
        log.warning("environment %r raised in %s() and is built anew: %r", self._id, call, error)
        with contextlib.suppress(Exception):  # what is broken may not close either
            self.env.close()
        self.env = self._build()
        # A new environment would seed itself from the operating system; the run must stay reproducible.
        self._next_seed = int(self._seeds.integers(2**31))


def _import(env_id: str) -> Callable[..., Any]:
    name, _, attribute = env_id.partition(":")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing runs the user's code: anything may come
        raise EnvError(
            f"env.id {env_id!r}: importing the module {name!r} raised {type(error).__name__}: {error}; install it, or start "
            f"from the folder that holds it (now {folder})"
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        near = difflib.get_close_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))], n=3)
        raise EnvError(
            f"env.id {env_id!r}: the module {name!r} ({module.__file__}) has no function {attribute!r}"
            + (f"; nearest: {', '.join(near)}" if near else "")
            + "; write a function that returns a gymnasium.Env"
        )
    found: Callable[..., Any] = make
    return found
