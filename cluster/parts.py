"""How the parts of a run are made from its settings: the same for the one-process mode and for Ray."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.checkpoint import load_tensors, save_tensors
from cluster.head import Counts
from configs.algorithms import CustomSettings, R2d2Settings
from configs.load import ConfigError
from configs.schema import RunConfig
from replay.guests import GuestLimits
from replay.limiter import LeasedLimiter, RateLimiter
from replay.rate_limit import DeadlockError, RateLimit
from replay.schema import StepSchema, Window
from replay.writers import Writer

if TYPE_CHECKING:
    from actors.assignments import Assignment
    from actors.env_tasks import EnvTask
    from actors.protocol import VectorEnv
    from actors.rollout import Rollout
    from actors.task_env import TaskEnv
    from actors.task_set import TaskSet
    from cluster.curriculum.desk import Desk
    from learners.distributed import Group
    from learners.loop import Algorithm, LearnerLoop
    from learners.policy import Policy
    from learners.priorities import Importance
    from replay.layout import TableSpec
    from replay.shard import Shard, ShardSpec  # they compile kernels, which head and actors have no use for
    from replay.snapshot import SnapshotStore

FIRST_VERSION = 1  # 0 stands for random actions
TABLE = "steps"
_ROLES = ("shard", "sampler", "learner", "actor", "prior", "desk")


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
    actors, draw, shards = config.actors, config.draw_size, config.replay.shards
    write = max(actors.rows_per_write, actors.batch_size or actors.envs)
    try:
        if config.mode == "sync":  # all actors write before the learner samples
            return rate_limit(config).check(
                insert=write * actors.count, sample=draw, max_size=config.replay.capacity // 2
            )
        return rate_limit(config).check(
            insert=actors.rows_per_write,
            sample=-(-draw // shards),
            max_size=config.replay.capacity // 2,
            shards=shards,
            insert_block=config.insert_block,
            sample_block=config.sample_block,
        )
    except DeadlockError as error:
        text = str(error)
        if config.learners.updates_per_call > 1 and draw == config.batch_part * config.learners.updates_per_call:
            text += (
                f"; {draw} windows are those of learners.updates_per_call ({config.learners.updates_per_call}) updates, which "
                "may be lowered as well"
            )
        raise ConfigError(text) from None


def check_device(config: RunConfig) -> None:
    """
    Raises:
        ValueError: torch does not find `learners.device` on this machine.
    """
    device = config.learners.device
    if not device.startswith("cuda"):
        return
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= there:
        raise ValueError(
            f"learners.device: expected a device that torch finds on {socket.gethostname()}, received {device}; it finds "
            f"{there or 'no'} GPU{'s' * (there > 1)} there; set learners.device to cpu, or to auto"
        )


def window(config: RunConfig, schema: StepSchema) -> Window:
    """What the algorithm learns from: whole sequences where its network is recurrent, else the ends of windows alone."""
    algorithm = config.algorithm
    stack = config.env.stack if schema.large else 1
    if isinstance(algorithm, R2d2Settings):
        return Window(length=algorithm.sequence, burn_in=algorithm.burn_in, observations="all", stack=stack)
    observations = algorithm.observations if isinstance(algorithm, CustomSettings) else "ends"
    return Window(length=algorithm.window_steps, observations=observations, stack=stack)


def make_tasks(config: RunConfig) -> TaskSet[EnvTask] | None:
    """The tasks of a run; None where every episode plays `env`.

    Raises:
        TaskError: they cannot be read or generated, or nothing says when an episode of one has passed.
    """
    if not config.has_tasks:
        return None
    from actors.env_tasks import make_env_tasks

    return make_env_tasks(config.tasks, config.env)


def env_schema(config: RunConfig, tasks: TaskSet[EnvTask] | None) -> StepSchema:
    """The schema of the environments' steps, found without leaving a process or a thread behind.

    Raises:
        EnvError: an environment is unknown, cannot be built or does not fit, or does not fit the other tasks.
    """
    if tasks is not None:
        from actors.task_schema import task_schema

        return task_schema(config.env, config.tasks, tasks)
    from actors.envs import check_env

    return check_env(config.env, num_envs=config.actors.envs, batch_size=config.actors.batch_size)


def row_schema(config: RunConfig, schema: StepSchema) -> StepSchema:
    """The rows of the replay, from the schema of the environment's steps: with a recurrent policy's state, and the task."""
    from learners.policy import row_schema

    return row_schema(schema, make_policy(config, schema), tasks=config.has_tasks)


def make_desk(config: RunConfig, tasks: TaskSet[EnvTask]) -> Desk:
    """The head's desk for a run with tasks, with an empty record."""
    from cluster.curriculum.desk import Desk, families_of
    from cluster.curriculum.drawing import make_drawing
    from cluster.curriculum.tracker import Tracker

    settings, size = config.curriculum, episodes_in_group(config)
    # The setting is per episode, the tracker's per group; above 0, which large groups would come to.
    tracker = Tracker(families_of(tasks), discount=max(1e-9, settings.discount**size))
    stages = np.array([task.stage for task in tasks], np.int64)
    drawing = make_drawing(
        settings, tracker, group_size=settings.group_size, seed=seed_of(config, "desk"), stages=stages
    )
    return Desk(tasks, tracker, drawing, group_size=size, distinct=False, names=("episodes", "steps"))


def episodes_in_group(config: RunConfig) -> int:
    """Episodes of one task that are judged together."""
    return 1 if config.curriculum.filter == "none" else config.curriculum.group_size


def table(config: RunConfig) -> TableSpec:
    """The one table."""
    from replay.layout import TableSpec

    settings = config.replay
    return TableSpec(TABLE, selector=settings.selector, priority_exponent=settings.priority_exponent)


def importance(config: RunConfig) -> Importance | None:
    """How windows of the table are weighed; None where all are drawn alike."""
    from learners.priorities import Importance

    settings = config.replay
    if settings.selector == "uniform":
        return None
    return Importance(settings.importance_exponent, settings.importance_updates)


def shard_spec(config: RunConfig, schema: StepSchema, index: int, *, run: str, incarnation: int) -> ShardSpec:
    """Settings of shard `index`, for rows of `schema`; its limiter's address is still to be filled in."""
    from replay.shard import ShardSpec

    return ShardSpec(
        schema=schema.to_json(),
        run=run,
        index=index,
        capacity=config.replay.capacity // config.replay.shards,
        segment_steps=config.replay.segment_steps,
        tables=(table(config),),
        limits=(rate_limit(config),),
        seed=seed_of(config, "shard", index, incarnation),
        directory=config.replay.directory,
        host=config.replay.host,
        insert_block=config.insert_block,
        sample_block=config.sample_block,
        stack=config.env.stack if schema.large else 1,
        guests=GuestLimits(
            lanes=config.outside.lanes,
            rows_per_s=config.outside.rows_per_s,
            bad_messages=config.outside.bad_messages,
            message_rows=config.actors.rows_per_write,
        ),
    )


def shard_status(stats: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's statistics, those of its one table among them, as the head counts them."""
    table = stats["tables"][TABLE]
    return {**{key: value for key, value in stats.items() if key != "tables"}, **table}


def restore_shard(shard: Shard, replay: SnapshotStore, *, shards: int | None) -> None:
    """Fill an empty shard with its part, of `shards`, of what a checkpoint keeps; None: with what it has saved itself, if any.

    Raises:
        SnapshotError: a file is damaged or missing.
        SchemaError: the steps have other fields.
    """
    from replay.restore import load

    # The checkpoint's own checksums are those of the same files.
    saved = replay.all()
    count = len(saved) if shards is None else shards
    if shard.index >= count:
        return
    load(shard, saved, index=shard.index, count=count, verify=False)
    limiter = shard.table(TABLE).limiter
    if isinstance(limiter, LeasedLimiter):
        limiter.forget_deletions()  # the caller sets the limiter's counters, or tells it of what was lost


def save_shard(shard: Shard, replay: SnapshotStore, previous: SnapshotStore | None) -> dict[str, int]:
    """Write a shard's part of a checkpoint, all but what an earlier one, `previous`, holds. Returns the counters it holds."""
    saved = replay.save(shard, shard=shard.index, previous=previous)
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
    return (counts.updates + counts.updates_lost) * config.replay_windows


def set_limit(shard: Shard, config: RunConfig) -> None:
    """Keep the pace of these settings, of which more or fewer processes ask for more or less room."""
    limiter = shard.table(TABLE).limiter
    if isinstance(limiter, RateLimiter):
        limiter.change(rate_limit(config))
    if isinstance(limiter, LeasedLimiter):
        limiter.lease_in(insert_block=config.insert_block, sample_block=config.sample_block)


def shards_of_actor(index: int, *, actors: int, shards: Sequence[int]) -> list[int]:
    """The shards, of these numbers, that one of so many actors writes to: one, or several where there are more shards."""
    count = len(shards)
    return list(shards[index % actors :: actors]) if count > actors else [shards[index % count]]


def writer_name(index: int, incarnation: int) -> str:
    """Name under which an actor writes; the one that replaces it has another."""
    return f"actor-{index}-{incarnation}"


def make_policy(config: RunConfig, schema: StepSchema) -> Policy:
    """The acting policy, without weights; `schema` is that of the environment's steps."""
    from learners.policy import acting_policy

    return acting_policy(schema, config.algorithm, stack=config.env.stack)


def make_algorithm(
    config: RunConfig, schema: StepSchema, *, incarnation: int, group: Group | None = None
) -> Algorithm[Any]:
    """The algorithm with fresh parameters, for the windows of one learner; `schema` is that of the replay's rows."""
    from learners.staging import Share

    made: Algorithm[Any] = _maker(config.algorithm.name)(
        schema,
        config.algorithm,
        batch_size=config.batch_part,
        seed=seed_of(config, "learner", 0, incarnation),
        device=config.learners.device,
        compile=config.learners.compile,
        graphs=config.learners.graphs,
        precision=config.learners.precision,
        products=config.learners.products,
        updates_per_call=config.learners.updates_per_call,
        stack=config.env.stack,
        share=Share() if group is None else Share(group.rank, group.count, group.mean_),
    )
    return made


def _maker(name: str) -> Any:
    """What makes the algorithm of `algorithm.name`; only its module is imported."""
    match name:
        case "sac":
            from learners.sac import Sac

            return Sac
        case "flow":
            from learners.flow import Flow

            return Flow
        case "dqn":
            from learners.dqn import Dqn

            return Dqn
        case "r2d2":
            from learners.r2d2 import RecurrentDqn

            return RecurrentDqn
        case "custom":
            from learners.custom import make_learner

            return make_learner
    raise ValueError(f"expected algorithm.name sac, flow, dqn, r2d2 or custom, received {name}")


def make_loop(
    config: RunConfig,
    algorithm: Algorithm[Any],
    sampler: Any,
    *,
    publish: Callable[[int, bytes], None] | None,
    prefetch: int,
    version: int,
    group: Group | None = None,
) -> LearnerLoop[Any]:
    """The loop that drives an algorithm; arguments as `LearnerLoop`'s."""
    from learners.loop import LearnerLoop

    return LearnerLoop(
        algorithm,
        sampler,
        publish=publish,
        publish_every=config.learners.publish_every,
        prefetch=prefetch,
        version=version,
        updates_per_call=config.learners.updates_per_call,
        importance=importance(config),
        group=group,
    )


def make_rollout(
    config: RunConfig,
    schema: StepSchema,
    index: int,
    writer: Writer,
    *,
    random_steps: int,
    incarnation: int,
) -> Rollout:
    """Actor `index` of a run without tasks: its environments, its policy, and the writer to its shards."""
    from actors.envs import make_env

    env = make_env(
        config.env,
        num_envs=config.actors.envs,
        batch_size=config.actors.batch_size,
        threads=config.actors.threads,
        seed=seed_of(config, "actor", index, incarnation) % 2**31,
    )
    return _rollout(config, schema, index, env, writer, random_steps=random_steps, incarnation=incarnation)


def make_task_rollout(
    config: RunConfig,
    schema: StepSchema,
    index: int,
    writer: Writer,
    *,
    tasks: TaskSet[EnvTask],
    ask: Callable[[int], Sequence[Assignment[EnvTask]]],
    random_steps: int,
    incarnation: int,
) -> tuple[Rollout, TaskEnv]:
    """As `make_rollout`, of a run with tasks: `ask` gives assignments; outcomes are taken from the environments."""
    from actors.episode_filter import EpisodeFilter
    from actors.task_env import TaskEnv
    from cluster.curriculum.filter import GroupFilter

    settings, size = config.curriculum, episodes_in_group(config)
    held = None
    if settings.filter != "none":
        band = GroupFilter(settings.low, settings.high, size)
        writer = held = EpisodeFilter(writer, band.verdict, rows_per_write=config.actors.rows_per_write)
    env = TaskEnv(
        config.env,
        config.tasks,
        tasks,
        ask,
        num_envs=config.actors.envs,
        threads=config.actors.threads,
        seed=seed_of(config, "actor", index, incarnation) % 2**31,
        group_size=size,
        episode_filter=held,
    )
    made = _rollout(config, schema, index, env, writer, random_steps=random_steps, incarnation=incarnation)
    return made, env


def _rollout(
    config: RunConfig,
    schema: StepSchema,
    index: int,
    env: VectorEnv,
    writer: Writer,
    *,
    random_steps: int,
    incarnation: int,
) -> Rollout:
    from actors.rollout import Rollout

    return Rollout(
        env,
        make_policy(config, schema),
        writer,
        random_steps=random_steps,
        rows_per_write=config.actors.rows_per_write,
        write_every_s=config.actors.write_every_s if config.mode == "cluster" else math.inf,
        seed=seed_of(config, "actor", index, incarnation),
        stack=config.env.stack,
        first_lane=index * config.actors.envs,
        of_lanes=config.lanes,
        discount=config.algorithm.discount if config.algorithm.head.is_automatic else None,
        tasks=config.has_tasks,
    )


def save_learner(path: Path, algorithm: Algorithm[Any], *, version: int) -> int:
    """Write everything the learner needs to go on: parameters, optimiser, noise, counts. Returns the updates made.

    Raises:
        FloatingPointError: a loss or a parameter is not finite; nothing is written.
    """
    algorithm.check_finite()
    state = {name: tensor.numpy() for name, tensor in algorithm.state().items()}
    # The update before the one whose loss tells may have spoilt them.
    # What the support of a value head has seen is no part of the networks, and NaN where nothing was seen.
    learnt = {
        name: array for name, array in state.items() if array.dtype.kind == "f" and name.partition(".")[0] != "support"
    }
    broken = [name for name, array in learnt.items() if not np.isfinite(array).all()]
    if broken:
        raise FloatingPointError(f"not finite after update {algorithm.updates}: {', '.join(broken)}")
    save_tensors(path, state, {"updates": algorithm.updates, "version": version})
    return algorithm.updates


def load_learner(path: Path, algorithm: Algorithm[Any]) -> int:
    """Go on where `save_learner` was called. Returns the policy version then."""
    import torch

    arrays, metadata = load_tensors(path)
    algorithm.load_state({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    return int(metadata["version"])


def learner_status(loop: LearnerLoop[Any]) -> dict[str, Any]:
    """Counters, metrics, what the learner waits for, and errors by task since the last call, as `LearnerLoop.task_losses`."""
    return {
        **loop.stats(),
        "metrics": loop.metrics(),  # raises where a loss is not finite: before the losses are taken
        "waiting_for": loop.waiting_for,
        "task_losses": loop.task_losses(),
    }


def actor_status(rollout: Rollout, writer: Writer, *, after: int, tasks: TaskEnv | None = None) -> dict[str, Any]:
    """Counters of an actor and of its environments of `tasks`, its episodes from index `after` on, and what it waits for."""
    # A copy first: the rollout appends meanwhile.
    episodes = [e for e in list(rollout.episodes) if e.index >= after]
    return {
        **rollout.stats(),
        **({} if tasks is None else tasks.stats()),
        "version": rollout.version,
        "returns": [e.return_ for e in episodes],
        "lengths": [e.length for e in episodes],
        "next_episode": episodes[-1].index + 1 if episodes else after,
        "return_extent": rollout.return_extent(),
        "waiting_for": writer.waiting_for,
    }
