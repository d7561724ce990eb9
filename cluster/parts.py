"""How the parts of a run are made from its settings: the same for the one-process mode and for Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.checkpoint import load_tensors, save_tensors
from cluster.head import Counts
from configs.load import ConfigError
from configs.schema import RunConfig
from replay.limiter import LeasedLimiter, RateLimiter
from replay.rate_limit import DeadlockError, RateLimit
from replay.schema import StepSchema, Window
from replay.writers import LaneWriter, Writer

if TYPE_CHECKING:
    from actors.rollout import Rollout
    from learners.loop import LearnerLoop
    from learners.policy import SquashedGaussianPolicy
    from learners.sac import Sac
    from replay.shard import Shard, ShardSpec  # they compile kernels, which head and actors have no use for

FIRST_VERSION = 1  # 0 stands for random actions
TABLE = "steps"
_ROLES = ("shard", "sampler", "learner", "actor")


def seed_of(config: RunConfig, role: str, index: int = 0, incarnation: int = 0) -> int:
    """An independent seed for one process of a run; a process started again gets another."""
    sequence = np.random.SeedSequence([config.seed, _ROLES.index(role), index, incarnation])
    return int(sequence.generate_state(1)[0])


def rate_limit(config: RunConfig) -> RateLimit:
    """The pace of the one table."""
    spi = config.samples_per_insert
    buffer = config.error_buffer * spi
    return RateLimit.from_samples_per_insert(spi, min_size=config.replay.min_size, error_buffer=buffer)


def check_limits(config: RunConfig) -> list[str]:
    """Look for settings under which actors and learner would wait for each other. Returns a line for each that may.

    Raises:
        ConfigError: they must.
    """
    actors, batch, shards = config.actors, config.learners.batch_size, config.replay.shards
    write = max(actors.rows_per_write, actors.batch_size or actors.envs)
    try:
        if config.mode == "sync":  # all actors write before the learner samples
            return rate_limit(config).check(
                insert=write * actors.count, sample=batch, max_size=config.replay.capacity // 2
            )
        return rate_limit(config).check(
            insert=actors.rows_per_write,
            sample=-(-batch // shards),
            max_size=config.replay.capacity // 2,
            shards=shards,
            insert_block=actors.rows_per_write,
            sample_block=batch,
        )
    except DeadlockError as error:
        raise ConfigError(str(error)) from None


def window(config: RunConfig) -> Window:
    """What the algorithm learns from."""
    return Window(length=config.algorithm.n_step)


def shard_spec(config: RunConfig, schema: StepSchema, index: int, *, run: str, incarnation: int) -> ShardSpec:
    """Settings of shard `index`; its limiter's address is still to be filled in."""
    from replay.layout import TableSpec
    from replay.shard import ShardSpec

    return ShardSpec(
        schema=schema.to_json(),
        run=run,
        index=index,
        capacity=config.replay.capacity // config.replay.shards,
        segment_steps=config.replay.segment_steps,
        tables=(TableSpec(TABLE),),
        limits=(rate_limit(config),),
        seed=seed_of(config, "shard", index, incarnation),
        directory=config.replay.directory,
        host=config.replay.host,
        insert_block=config.actors.rows_per_write,
        sample_block=config.learners.batch_size,
    )


def shard_status(stats: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's statistics, those of its one table among them, as the head counts them."""
    table = stats["tables"][TABLE]
    return {**{key: value for key, value in stats.items() if key != "tables"}, **table}


def restore_shard(shard: Shard, replay: Path, *, shards: int) -> None:
    """Fill an empty shard with its part, of `shards`, of what a checkpoint keeps.

    Raises:
        SnapshotError: a file is damaged or missing.
        SchemaError: the steps have other fields.
    """
    from replay.restore import load
    from replay.snapshot import SnapshotStore

    # The checkpoint's own checksums are those of the same files.
    load(shard, SnapshotStore(replay).all(), index=shard.index, count=shards, verify=False)
    limiter = shard.table(TABLE).limiter
    if isinstance(limiter, LeasedLimiter):
        limiter.forget_deletions()  # the caller sets the limiter's counters, or tells it of what was lost


def save_shard(shard: Shard, replay: Path, previous: Path | None) -> dict[str, int]:
    """Write a shard's part of a checkpoint into the folder `replay`, all but what that of an earlier one, `previous`, holds.

    Returns the counters it holds.
    """
    from replay.snapshot import SnapshotStore

    before = None if previous is None else SnapshotStore(previous)
    saved = SnapshotStore(replay).save(shard, shard=shard.index, previous=before)
    counters: dict[str, int] = saved.header["tables"][TABLE]["counters"]
    return counters


def limiter_counters(config: RunConfig, *, inserted: int, sampled: int, items: int) -> dict[str, int]:
    """Counters for the limiter of a table that goes on after a restart."""
    if items < config.replay.min_size:
        # The table fills up again as at the start of a run: what is inserted until then is not to be caught up on.
        sampled = math.floor((inserted - items) * config.samples_per_insert)
    return {"inserted": inserted, "sampled": sampled, "items": items}


def limiter_sums(config: RunConfig, shards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counters for a limiter that was lost with its shard, from those of all shards."""
    inserted, sampled, items = (sum(int(shard[key]) for shard in shards) for key in ("inserted", "sampled", "items"))
    return limiter_counters(config, inserted=inserted, sampled=sampled, items=items)


def set_limiter(shard: Shard, *, inserted: int, sampled: int, items: int) -> None:
    """Set the counters of the limiter on shard 0 to the sums over all shards."""
    limiter = shard.table(TABLE).limiter
    assert isinstance(limiter, RateLimiter)
    limiter.restore(inserted=inserted, sampled=sampled, removed=inserted - items)


def samples_used(config: RunConfig, counts: Counts) -> int:
    """Samples that became updates: what a resumed limiter counts, for those drawn ahead and lost were never used."""
    return (counts.updates + counts.updates_lost) * config.learners.batch_size


def shards_of_actor(config: RunConfig, index: int) -> list[int]:
    """The shards an actor writes to: one, or several where there are more shards than actors."""
    count, shards = config.actors.count, config.replay.shards
    return list(range(index, shards, count)) if shards > count else [index % shards]


def writer_name(index: int, incarnation: int) -> str:
    """Name under which an actor writes; the one that replaces it has another."""
    return f"actor-{index}-{incarnation}"


def make_policy(config: RunConfig, schema: StepSchema) -> SquashedGaussianPolicy:
    """The acting policy, without weights."""
    from learners.policy import SquashedGaussianPolicy

    return SquashedGaussianPolicy(schema, config.algorithm.hidden)


def make_algorithm(config: RunConfig, schema: StepSchema, *, incarnation: int) -> Sac:
    """The algorithm with fresh parameters."""
    from learners.sac import Sac

    return Sac(
        schema,
        config.algorithm,
        batch_size=config.learners.batch_size,
        device=config.learners.device,
        seed=seed_of(config, "learner", 0, incarnation),
        compile=config.learners.compile,
    )


def make_rollout(
    config: RunConfig,
    schema: StepSchema,
    index: int,
    writers: Sequence[Writer],
    *,
    random_steps: int,
    incarnation: int,
) -> Rollout:
    """Actor `index`: its environments, its policy, and the writers to its shards."""
    from actors.envs import make_env
    from actors.rollout import Rollout

    seed = seed_of(config, "actor", index, incarnation)
    env = make_env(
        config.env,
        num_envs=config.actors.envs,
        batch_size=config.actors.batch_size,
        threads=config.actors.threads,
        seed=seed % 2**31,
    )
    return Rollout(
        env,
        make_policy(config, schema),
        writers[0] if len(writers) == 1 else LaneWriter(writers),
        random_steps=random_steps,
        rows_per_write=config.actors.rows_per_write,
        write_every_s=config.actors.write_every_s if config.mode == "cluster" else math.inf,
        seed=seed,
    )


def save_learner(path: Path, algorithm: Sac, *, version: int) -> int:
    """Write everything the learner needs to go on: parameters, optimiser, noise, counts. Returns the updates made.

    Raises:
        FloatingPointError: a loss or a parameter is not finite; nothing is written.
    """
    algorithm.check_finite()
    state = {name: tensor.numpy() for name, tensor in algorithm.state().items()}
    # The update before the one whose loss tells may have spoilt them.
    broken = [name for name, array in state.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if broken:
        raise FloatingPointError(f"not finite after update {algorithm.updates}: {', '.join(broken)}")
    save_tensors(path, state, {"updates": algorithm.updates, "version": version})
    return algorithm.updates


def load_learner(path: Path, algorithm: Sac) -> int:
    """Go on where `save_learner` was called. Returns the policy version then."""
    import torch

    arrays, metadata = load_tensors(path)
    algorithm.load_state({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return int(metadata["version"])


def learner_status(loop: LearnerLoop[Any]) -> dict[str, Any]:
    """Counters, metrics and what the learner waits for."""
    return {**loop.stats(), "metrics": loop.metrics(), "waiting_for": loop.waiting_for}


def actor_status(rollout: Rollout, writers: Sequence[Writer], *, after: int) -> dict[str, Any]:
    """Counters of an actor, its episodes from index `after` on, and what it waits for."""
    # A copy first: the rollout appends meanwhile.
    episodes = [e for e in list(rollout.episodes) if e.index >= after]
    return {
        **rollout.stats(),
        "version": rollout.version,
        "returns": [e.return_ for e in episodes],
        "lengths": [e.length for e in episodes],
        "next_episode": episodes[-1].index + 1 if episodes else after,
        "waiting_for": next((w.waiting_for for w in writers if w.waiting_for), None),
    }
