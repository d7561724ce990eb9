"""Which library builds an environment, and the one way to build it."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import envpool
import gymnasium

from actors import envpool_env, gymnasium_env
from actors.envpool_env import EnvPoolEnv
from actors.gymnasium_env import GymnasiumEnv
from actors.protocol import EnvError, EnvStep, Policy, VectorEnv
from actors.sub_pools import GymnasiumSlots, SlotEnv
from configs.schema import EnvSettings
from replay.schema import LARGE_BYTES, StepSchema

__all__ = ["EnvError", "EnvStep", "Policy", "VectorEnv", "backend_of", "check_env", "make_env", "make_slots"]


def make_env(
    settings: EnvSettings,
    *,
    num_envs: int,
    batch_size: int | None = None,
    threads: int = 0,
    seed: int,
    render: bool = False,
) -> VectorEnv:
    """Build `num_envs` lanes; lane i is seeded from (`seed`, i). `start` them before the first `recv`.

    Args:
        settings: id, library and arguments of the environment.
        num_envs: lanes.
        batch_size: lanes whose results one `recv` waits for; None waits for all. Fewer than `num_envs` needs EnvPool.
        threads: EnvPool's threads; 0 lets EnvPool decide.
        seed: any integer ≥ 0.
        render: make the lanes able to draw themselves.

    Raises:
        EnvError: the environment is unknown, cannot be built or does not fit.
    """
    if batch_size is not None and not 1 <= batch_size <= num_envs:
        raise EnvError(f"batch_size must lie in 1 … num_envs ({num_envs}), got {batch_size}")
    env: VectorEnv
    if backend_of(settings) == "envpool":
        env = EnvPoolEnv(
            settings.id,
            _arguments(settings),
            num_envs=num_envs,
            batch_size=batch_size,
            threads=threads,
            seed=seed,
            render=render,
        )
    else:
        _check_synchronous(settings, batch_size, num_envs)
        try:
            env = GymnasiumEnv(settings.id, settings.kwargs, num_envs=num_envs, seed=seed, render=render)
        except gymnasium.error.UnregisteredEnv as error:
            raise _unknown(settings) from error
    try:
        _check_stack(settings, env.schema)
    except EnvError:
        env.close()
        raise
    return env


def make_slots(
    settings: EnvSettings, *, num_envs: int, threads: int, seed: int, render: bool = False, success: str | None = None
) -> SlotEnv:
    """Environments that are stepped one without the other; slot i is seeded from (`seed`, i). `build` them first.

    Args:
        settings: id, library and arguments of the environment.
        num_envs: slots.
        threads: EnvPool's threads; 0 lets EnvPool decide.
        seed: any integer ≥ 0.
        render: make the slots able to draw themselves.
        success: entry of info that says whether an episode has succeeded; None asks for none.

    Raises:
        EnvError: as `make_env`.
    """
    slots: SlotEnv
    if backend_of(settings) == "envpool":
        slots = EnvPoolEnv(
            settings.id,
            _arguments(settings),
            num_envs=num_envs,
            batch_size=None,
            threads=threads,
            seed=seed,
            render=render,
            success=success,
        )
    else:
        try:
            slots = GymnasiumSlots(
                settings.id, settings.kwargs, num_envs=num_envs, seed=seed, render=render, success=success
            )
        except gymnasium.error.UnregisteredEnv as error:
            raise _unknown(settings) from error
    try:
        _check_stack(settings, slots.schema)
    except EnvError:
        slots.close()
        raise
    return slots


def check_env(settings: EnvSettings, *, num_envs: int = 1, batch_size: int | None = None) -> StepSchema:
    """The schema of an environment's steps, found without leaving a process or a thread behind.

    EnvPool is asked for its specification; other environments are built once and closed.

    Raises:
        EnvError: as `make_env`.
    """
    if backend_of(settings) == "envpool":
        schema = envpool_env.space_map(settings.id, _arguments(settings)).schema
    else:
        _check_synchronous(settings, batch_size, num_envs)
        try:
            schema = gymnasium_env.space_map(settings.id, settings.kwargs).schema
        except gymnasium.error.UnregisteredEnv as error:
            raise _unknown(settings) from error
    _check_stack(settings, schema)
    return schema


def backend_of(settings: EnvSettings) -> Literal["envpool", "gymnasium"]:
    """The library that builds an environment.

    Raises:
        EnvError: EnvPool is asked for and does not know the id.
    """
    if settings.backend == "gymnasium":
        return "gymnasium"
    if settings.id in envpool_env.ids():
        return "envpool"
    if settings.backend == "envpool":
        raise _unknown(settings)
    return "gymnasium"


def _arguments(settings: EnvSettings) -> dict[str, Any]:
    """EnvPool's arguments; where the agent stacks frames, EnvPool does not."""
    if settings.stack > 1:
        return envpool_env.single_frames(settings.id, settings.kwargs)
    return dict(settings.kwargs)


def _check_stack(settings: EnvSettings, schema: StepSchema) -> None:
    if settings.stack > 1 and not schema.large:
        shapes = ", ".join(f"{field.name} {field.dtype}{list(field.shape)}" for field in schema.observations)
        raise EnvError(
            f"env.stack ({settings.stack}) stacks frames, which are observation fields of at least {LARGE_BYTES} bytes, and "
            f"{settings.id} has {shapes}; set env.stack to 1"
        )


def _check_synchronous(settings: EnvSettings, batch_size: int | None, num_envs: int) -> None:
    if batch_size not in (None, num_envs):
        if ":" not in settings.id and settings.id not in gymnasium_env.ids():
            raise _unknown(settings)
        raise EnvError(
            f"actors.batch_size ({batch_size}) below actors.envs ({num_envs}) steps asynchronously, which needs EnvPool, and "
            f"{settings.id!r} comes from gymnasium; leave actors.batch_size unset"
        )


def _unknown(settings: EnvSettings) -> EnvError:
    known: dict[str, list[str]] = {}
    if settings.backend in ("auto", "envpool"):
        known[f"EnvPool {envpool.__version__}"] = envpool_env.ids()
    if settings.backend in ("auto", "gymnasium"):
        known[f"gymnasium {gymnasium.__version__}"] = gymnasium_env.ids()
    by_lower = {name.lower(): name for names in known.values() for name in names}
    nearest = [by_lower[name] for name in difflib.get_close_matches(settings.id.lower(), by_lower, n=3)]
    asked = " and ".join(f"{library} ({len(names)} ids)" for library, names in known.items())
    return EnvError(
        f"env.id {settings.id!r} is unknown to {asked}"
        + (f"; nearest: {', '.join(nearest)}" if nearest else "")
        + "; write package.module:make for an environment of your own"
    )
