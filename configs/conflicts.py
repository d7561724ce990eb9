"""Settings that are each legal and cannot run together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.schema import RunConfig, ServiceSettings


def conflicts(config: RunConfig) -> Iterator[str]:
    """One line for each combination of settings, each legal by itself, that cannot run."""
    actors, replay, learners, stop = config.actors, config.replay, config.learners, config.stop
    if actors.batch_size is not None and actors.batch_size > actors.envs:
        yield f"actors.batch_size ({actors.batch_size}) must not exceed actors.envs ({actors.envs})"
    if config.mode == "sync" and actors.batch_size not in (None, actors.envs):
        yield (
            "actors.batch_size below actors.envs steps in completion order, which mode sync (lock step) rules out; "
            "leave it unset"
        )
    if config.mode == "sync" and config.address is not None:
        yield "address names a Ray cluster, and mode sync runs without Ray; drop one of the two"

    lanes_per_shard = math.ceil(config.lanes / replay.shards)
    capacity = 2 * lanes_per_shard * replay.segment_steps * replay.shards
    if replay.capacity < capacity:
        yield (
            f"replay.capacity ({replay.capacity}) is too small: {config.lanes} lanes (actors.count × actors.envs) need "
            f"two segments of replay.segment_steps ({replay.segment_steps}) each, {capacity} steps; raise the "
            f"capacity or lower replay.segment_steps"
        )
    if replay.min_size > replay.capacity // 2:
        yield f"replay.min_size ({replay.min_size}) must not exceed half of replay.capacity ({replay.capacity})"
    yield from config.algorithm.conflicts()
    if config.algorithm.window_steps >= replay.segment_steps:
        yield (
            f"windows of {config.algorithm.window_steps} steps ({config.algorithm.window_settings}) must be shorter than "
            f"replay.segment_steps ({replay.segment_steps})"
        )

    yield from service_conflicts(replay)

    if learners.batch_size % learners.count:
        yield (
            f"learners.batch_size ({learners.batch_size}) must be a multiple of learners.count ({learners.count}): each "
            "learner takes an equal part"
        )
    if learners.count > 1 and config.mode == "sync":
        yield f"learners.count ({learners.count}) must be 1 in mode sync, which is one process"
    if learners.count > 1 and learners.compile:
        yield (
            f"learners.compile needs learners.count ({learners.count}) to be 1: what goes between learners is outside of what "
            "can be compiled"
        )
    if learners.count > 1 and config.algorithm.head.is_automatic:
        yield (
            f"learners.count ({learners.count}) needs a value head whose range is fixed: each learner would find another "
            "one in its part of the data; set algorithm.head.low and algorithm.head.high"
        )
    elif config.prior.source is not None and not 0 < config.prior_part < config.batch_part:
        yield (
            f"prior.share ({config.prior.share:g}) of the {config.batch_part} windows that each learner takes of "
            f"learners.batch_size ({learners.batch_size}) leaves one of the two parts empty"
        )
    if config.prior.source is not None and replay.selector == "prioritised":
        yield "prior.source is drawn uniformly, and replay.selector prioritised would weigh the two parts apart; use uniform"

    if config.mode == "cluster" and learners.device.startswith("cuda") and learners.gpus == 0:
        yield "learners.device names a GPU and learners.gpus is 0: Ray would hide every GPU; leave learners.gpus unset"

    if config.mode == "cluster" and ":" in learners.device:
        yield (
            f"learners.device {learners.device} names one GPU, and in mode cluster Ray gives each learner its own; set "
            "learners.device to cuda"
        )

    yield from config.tasks.conflicts()
    if config.has_tasks:
        yield from config.curriculum.conflicts(group_size=config.curriculum.group_size)
        if actors.batch_size is not None and actors.batch_size < actors.envs:
            yield (
                f"actors.batch_size ({actors.batch_size}) below actors.envs ({actors.envs}) steps in completion order, and lanes "
                "that play tasks step together; leave it unset"
            )
        if config.prior.source is not None:
            yield "prior.source holds steps that do not say which task they are of, and there are tasks; drop one of the two"
    elif changed := [f"curriculum.{name}" for name in config.curriculum.changed]:
        yield (
            f"{', '.join(changed)} is set and there are no tasks to draw; set one of tasks.ids, tasks.product, tasks.list and "
            "tasks.source"
        )

    if stop.success is not None and not config.has_tasks:
        yield "stop.success is a share of passed episodes, and only tasks say when one has; set tasks.ids or stop.mean_return"
    if stop.success is not None and config.eval.every == 0:
        yield "stop.success is measured by evaluations, and eval.every is 0; set eval.every"
    if stop.mean_return is not None and config.eval.every == 0:
        yield "stop.mean_return is measured by evaluations, and eval.every is 0; set eval.every"
    if stop.steps is None and stop.wall_s is None and stop.mean_return is None and stop.success is None:
        yield "one of stop.steps, stop.wall_s, stop.mean_return and stop.success must be set"


def service_conflicts(replay: ServiceSettings) -> Iterator[str]:
    """As `conflicts`, of how the shards are reached."""
    if (replay.tls_certificate is None) != (replay.tls_key is None):
        given, missing = ("certificate", "key") if replay.tls_key is None else ("key", "certificate")
        yield f"replay.tls_{given} is set and replay.tls_{missing} is not; set both, or neither to go without TLS"
    elif replay.tls_authority is not None and replay.tls_certificate is None:
        yield "replay.tls_authority is set and the shards serve without TLS; set replay.tls_certificate and replay.tls_key"
