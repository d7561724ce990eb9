"""EnvPool environments (Weng et al. 2022, arXiv 2206.10558): C++ environments stepped by a thread pool."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import envpool
import numpy as np
from numpy.typing import NDArray

import actors
from actors.protocol import BoolArray, EnvError, EnvStep, IntArray
from actors.spaces import SpaceMap, lane_seeds
from replay.schema import StepSchema

OURS = {"num_envs", "batch_size", "num_threads", "seed", "env_seed", "env_type", "render_mode", "max_num_players"}


def ids() -> list[str]:
    """Every environment id of the installed EnvPool."""
    return list(envpool.list_all_envs())


def space_map(env_id: str, kwargs: Mapping[str, Any]) -> SpaceMap:
    """Spaces of an environment, without building one. Found once for the same arguments, because that takes longer than a step.

    Raises:
        EnvError: an argument is unknown or taken, something the environment needs is missing, or its spaces do not fit.
    """
    # Text, because 1, 1.0 and True are the same key.
    return _space_map(env_id, json.dumps(dict(kwargs)))


@functools.lru_cache(maxsize=1024)
def _space_map(env_id: str, arguments: str) -> SpaceMap:
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(arguments).items()}
    taken = OURS & set(kwargs)
    if taken:
        raise EnvError(
            f"env.kwargs of {env_id!r} must not hold {', '.join(sorted(taken))}: the actor settings decide them"
        )
    try:
        known = envpool.make_spec(env_id).config._fields
        unknown = [name for name in kwargs if name not in known and not name.startswith("render_")]
        if unknown and "from_pixels" not in kwargs:
            nearest = difflib.get_close_matches(unknown[0], known, n=3)
            raise EnvError(
                f"env.kwargs: EnvPool's {env_id!r} has no argument {unknown[0]!r}; "
                + (f"nearest: {', '.join(nearest)}" if nearest else f"it takes {', '.join(sorted(set(known) - OURS))}")
            )
        spec = envpool.make_spec(env_id, **kwargs)
        with _quiet():
            spaces = spec.gymnasium_observation_space, spec.gymnasium_action_space
    except EnvError:
        raise
    # EnvPool answers a bad argument with TypeError, AssertionError or RuntimeError, a missing library with ImportError.
    except Exception as error:
        raise EnvError(f"EnvPool cannot build {env_id!r} with env.kwargs {dict(kwargs)}: {error}") from error
    if spec.config.max_num_players > 1:
        raise EnvError(f"EnvPool's {env_id!r} has several players in one environment; one player is supported")
    return SpaceMap(env_id, *spaces)


def single_frames(env_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs`, and where EnvPool would stack frames itself, as its Atari games do, one that turns this off."""
    found = dict(kwargs)
    if "stack_num" in envpool.make_spec(env_id).config._fields:
        found.setdefault("stack_num", 1)
    return found


class EnvPoolEnv:
    """EnvPool behind the `VectorEnv` protocol; `batch_size < num_envs` steps asynchronously.

    EnvPool resets a finished environment on its next step call and ignores that call's action; such results are marked
    `reset` here, and no other code knows of the rule. EnvPool reports an episode that ends on its step limit as truncated,
    also when it would have terminated on that very step. A C++ environment that fails takes its process with it, so no
    result is ever `broken`.
    """

    def __init__(
        self,
        env_id: str,
        kwargs: Mapping[str, Any],
        *,
        num_envs: int,
        batch_size: int | None,
        threads: int,
        seed: int,
        render: bool = False,
        success: str | None = None,
    ) -> None:
        """
        Args:
            env_id, kwargs: the environment and its arguments.
            num_envs: environments.
            batch_size: results that one `recv` waits for; None waits for those of everything that was sent.
            threads: that step them; 0 lets EnvPool decide.
            seed: any integer ≥ 0; environment i is seeded from (`seed`, i).
            render: make the environments able to draw themselves.
            success: entry of info that says whether an episode has succeeded; None asks for none.

        Raises:
            EnvError: as `space_map`, or it cannot draw itself on this machine.
        """
        self.num_envs = num_envs
        self.batch_size = num_envs if batch_size is None else batch_size
        self._spaces = space_map(env_id, kwargs)
        self._id = env_id
        self._success = success
        self._arguments = {
            **kwargs,
            "num_envs": num_envs,
            "batch_size": self.batch_size,
            "num_threads": threads,
            "seed": lane_seeds(seed, num_envs),
        }
        if render:
            _check_rendering(env_id, kwargs)
            self._arguments["render_mode"] = "rgb_array"
        self._pool: Any = None
        self._unbroken: BoolArray = np.zeros(self.batch_size, np.bool_)
        self._finished: BoolArray = np.ones(num_envs, np.bool_)

    @property
    def schema(self) -> StepSchema:
        return self._spaces.schema

    def start(self) -> None:
        """Build the pool, and reset all of it: EnvPool seeds environments when it builds them and never again."""
        self.build()
        self._pool.async_reset()

    def build(self) -> None:
        """Build the pool without a reset; the first action of each environment, which is void, then resets it.

        With `batch_size == num_envs` actions may be sent to some environments only: `recv` waits for those sent.

        Raises:
            EnvError: EnvPool cannot build it, or its info has no success flag of that name.
        """
        self.close()
        try:
            self._pool = envpool.make(self._id, env_type="gymnasium", **self._arguments)
            with _quiet():
                _ = self._pool.observation_space  # kept by the pool, which asks for it at every recv
        except Exception as error:
            raise EnvError(f"EnvPool cannot build {self._id!r}: {error}") from error
        if self._success is not None and f"info:{self._success}" not in self._pool.spec.state_array_spec:
            raise EnvError(f"EnvPool's {self._id!r} has no {self._success!r} in its info to tell success by")
        self._finished[:] = True

    def recv(self) -> EnvStep:
        observation, reward, terminated, truncated, info = self._pool.recv()
        env_id: IntArray = info["env_id"]
        reset = self._finished[env_id]
        self._finished[env_id] = terminated | truncated
        return EnvStep(
            env_id=env_id,
            observation=self._spaces.observation(observation),
            reward=np.asarray(reward, np.float32),
            terminated=terminated & ~reset,
            truncated=truncated & ~(terminated | reset),
            reset=reset,
            broken=self._unbroken[: len(env_id)],
            success=None if self._success is None else np.asarray(info[self._success]) > 0.5,
        )

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        self._pool.send(self._spaces.action(action), env_id)

    def sample_actions(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        return self._spaces.sample(count, generator)

    def frame(self, lane: int) -> NDArray[np.uint8]:
        return np.asarray(self._pool.render(env_ids=np.array([lane], np.int32))[0], np.uint8)

    def close(self) -> None:
        """Drop the pool: its threads end with its last reference."""
        self._pool = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # EnvPool makes float32 boxes from float64 bounds, and gymnasium warns the user, who can do nothing about it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
        yield


def _render_once(env_id: str, kwargs: Mapping[str, Any], scratch: str) -> None:
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=1, render_mode="rgb_array", **kwargs)
    pool.reset()
    os.chdir(scratch)  # MuJoCo writes a log into the current directory when it fails
    pool.render(env_ids=np.zeros(1, np.int32))


def _check_rendering(env_id: str, kwargs: Mapping[str, Any]) -> None:
    """Draw one frame in another process, because a renderer without OpenGL ends the process it runs in."""
    code = "import json, sys; from actors import envpool_env as e; e._render_once(*json.loads(sys.argv[1]))"
    if actors.envpool_was_first:  # as it is in this process
        code = "import envpool; " + code
    with tempfile.TemporaryDirectory() as scratch:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, json.dumps([env_id, dict(kwargs), scratch])],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    if child.returncode != 0:
        reason = (child.stderr.strip() or child.stdout.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise EnvError(
            f"EnvPool's renderer cannot draw {env_id!r} on this machine: {reason}. MuJoCo tasks need OpenGL: on Debian or "
            "Ubuntu without a screen install libegl1 and libgl1-mesa-dri; in Python import actors before envpool"
        )
