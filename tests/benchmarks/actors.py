"""Speed of the whole actor path against bare EnvPool stepping."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import envpool
import numpy as np

from actors.envpool_env import space_map
from actors.envs import check_env, make_env
from actors.rollout import Rollout
from cluster.parts import make_algorithm, make_policy
from configs.schema import RunConfig
from replay.process import ShardProcess
from replay.security import flight_client
from replay.shard import ShardSpec
from replay.writers import FlightWriter
from tests.benchmarks import run_child
from tests.benchmarks.actors_tasks import measure_tasks

ROUNDS = 10  # each measures everything once, so that a machine that drifts drifts for all


def bench(config: RunConfig, *, seconds: float) -> dict[str, Any]:
    """Environment steps per second of one actor and of bare EnvPool with as many environments; medians of ten rounds.

    The actor runs a policy, a rollout and a writer to a shard in another process through Arrow Flight. Bare EnvPool is
    the better of its synchronous and asynchronous mode, with its default threads and random actions made beforehand.

    Under `tasks` stands what lanes cost that play one task or many in turn, on environments of their own choice
    (`measure_tasks`): the time for that, a third of `seconds`, comes on top.

    Args:
        config: environment, actor, algorithm and replay settings; an EnvPool environment with continuous actions.
        seconds: time for all measurements together.

    Raises:
        RuntimeError: the measuring process failed; its error is in the message.
    """
    return run_child(__name__, str(seconds), config=config)


def _measure(config: RunConfig, seconds: float) -> dict[str, Any]:
    envs, schema = config.actors.envs, check_env(config.env)
    policy = make_policy(config, schema)
    weights = make_algorithm(config, schema, incarnation=0).policy_bytes()
    spec = ShardSpec(
        schema=schema.to_json(),
        run=f"bench-actors-{os.getpid()}",
        index=0,
        capacity=config.replay.capacity,
        segment_steps=config.replay.segment_steps,
        seed=config.seed,
        directory=config.replay.directory,
    )
    slice_s = seconds / (3 * ROUNDS)
    raw_modes = {"sync": _raw(config, envs), "async": _raw(config, max(1, envs // 2))}
    measured: dict[str, list[float]] = {"sync": [], "async": [], "actor": []}
    with ShardProcess(spec) as shard:
        env = make_env(
            config.env,
            num_envs=envs,
            batch_size=config.actors.batch_size,
            threads=config.actors.threads,
            seed=config.seed,
        )
        rollout = Rollout(
            env,
            policy,
            FlightWriter(
                shard.address,
                schema,
                message_rows=config.actors.rows_per_write,
                connect=partial(flight_client, security=shard.security),
            ),
            random_steps=0,
            rows_per_write=config.actors.rows_per_write,
            write_every_s=config.actors.write_every_s,
            seed=config.seed,
            stack=config.env.stack,
        )
        rollout.set_policy(1, weights)
        stepped = {**raw_modes, "actor": rollout.step}
        for step in stepped.values():
            _rate(step, slice_s / 4)
        for _ in range(ROUNDS):
            for name, step in stepped.items():
                measured[name].append(_rate(step, slice_s))
        rollout.close()
    actor = statistics.median(measured["actor"])
    raw = max(statistics.median(measured["sync"]), statistics.median(measured["async"]))
    return {
        "steps_per_s": actor,
        "raw_envpool_steps_per_s": raw,
        "ratio": actor / raw,
        "env_id": config.env.id,
        "envs": envs,
        "batch_size": config.actors.batch_size,
        "rows_per_write": config.actors.rows_per_write,
        "seconds": seconds,
        "tasks": measure_tasks(seconds=seconds / 3, threads=config.actors.threads),
    }


def _raw(config: RunConfig, batch_size: int) -> Callable[[], int]:
    """A function that steps bare EnvPool once and returns the steps taken."""
    spaces = space_map(config.env.id, config.env.kwargs)
    generator = np.random.default_rng(config.seed)
    actions = [spaces.action(spaces.sample(batch_size, generator)) for _ in range(64)]
    pool = envpool.make(
        config.env.id,
        env_type="gymnasium",
        num_envs=config.actors.envs,
        batch_size=batch_size,
        seed=config.seed,
        **config.env.kwargs,
    )
    pool.async_reset()
    count = 0

    def step() -> int:
        nonlocal count
        *_, info = pool.recv()
        pool.send(actions[count % len(actions)], info["env_id"])
        count += 1
        return batch_size

    return step


def _rate(step: Callable[[], int], seconds: float) -> float:
    """Steps per second of calling `step` for so long."""
    steps, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        steps += step()
    return steps / elapsed


if __name__ == "__main__":
    print(json.dumps(_measure(RunConfig.model_validate_json(sys.stdin.read()), float(sys.argv[1]))))
