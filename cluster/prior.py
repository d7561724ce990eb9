"""Prior data of a run: an imported dataset in the learner's memory, of which every batch takes a fixed share.

Ball et al. 2023, "Efficient Online Reinforcement Learning with Offline Data" (RLPD, arXiv 2302.02948), section 4.1. The
dataset is no part of the run's own replay: no limiter waits for it, no count includes it, no checkpoint holds it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cluster import parts
from cluster.replay_cli import snapshots_of
from configs.algorithms import R2d2Settings
from configs.schema import RunConfig
from learners.policy import STATE
from replay.datasets import Chunk, files_of, infer_schema, read_chunks
from replay.imports import import_into_service
from replay.layout import Layout, TableSpec
from replay.limiter import RateLimiter
from replay.mixing import MixedSampler
from replay.rate_limit import RateLimit
from replay.restore import chains_of, load
from replay.samplers import CallSource, Sampler
from replay.schema import SchemaError, StepSchema
from replay.shard import Shard
from replay.snapshot import Snapshot, SnapshotError
from replay.writers import CallWriter

TOLERANCE = 1e-5  # beyond [-1, 1], of actions that were scaled in float32


def check_source(config: RunConfig, schema: StepSchema) -> RunConfig:
    """Look at `prior.source` before a run starts, for `schema` the steps of its environment.

    Of files only the first rows are read. Returns the settings with the whole path of a local source, for processes that
    run elsewhere.

    Raises:
        ValueError, FileNotFoundError: it is no dataset, or one that cannot be read.
        SchemaError: its fields are others than those of the run's replay.
    """
    source = config.prior.source
    if source is None:
        return config
    if "://" not in source:
        source = str(Path(source).expanduser().absolute())
        config = config.model_copy(update={"prior": config.prior.model_copy(update={"source": source})})
    rows = parts.row_schema(config, schema)
    try:
        if _is_snapshot(source):
            _check_fields(config, rows, snapshots_of(source))
        else:
            with closing(_of_files(config, rows, files_of([source]))) as chunks:
                next(chunks, None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"prior.source: {error}") from error
    except (SnapshotError, OSError) as error:
        raise ValueError(f"prior.source {source} cannot be read: {error}") from error
    except ValueError as error:
        if str(error).startswith("prior.source"):
            raise
        kind = SchemaError if isinstance(error, SchemaError) else ValueError
        raise kind(f"prior.source: {error}") from error
    return config


def with_prior(config: RunConfig, schema: StepSchema, sampler: Any, *, seed: int) -> Any:
    """A sampler of a learner's batches: those of `sampler`, and `prior.share` of each from the dataset, where there is one.

    Without a dataset it is `sampler`, which draws `RunConfig.draw_size` windows either way. Each update's part of a call
    holds exactly its share.

    Raises:
        FileNotFoundError, ValueError: `prior.source` is no dataset, or holds no transition.
        SchemaError: its fields are others than `schema`'s, the rows of the run's replay.
    """
    if config.prior.source is None:
        return sampler
    shard = prior_shard(config, schema)
    window = parts.window(config, schema)
    prior = Sampler(
        [CallSource(shard, window=window, table=parts.TABLE)],
        schema,
        window=window,
        batch_size=config.prior_part,
        seed=seed,
    )
    counts = [config.batch_part - config.prior_part, config.prior_part]
    updates = config.learners.updates_per_call
    return MixedSampler([sampler, prior] * updates, counts * updates, batch_size=config.batch_part * updates)


def prior_shard(config: RunConfig, schema: StepSchema) -> Shard:
    """The whole dataset `prior.source` in a shard of this process, in ordinary memory; raises as `with_prior`."""
    source = config.prior.source
    assert source is not None
    if _is_snapshot(source):
        shard = _from_snapshots(config, schema, snapshots_of(source))
    else:
        shard = _from_files(config, schema, files_of([source]))
    if shard.table(parts.TABLE).items == 0:
        raise ValueError(f"prior.source {source} holds no transition that a window could begin at")
    return shard


def _is_snapshot(source: str) -> bool:
    path = Path(source)
    return (
        "://" in source
        or (path / "config.yaml").is_file()
        or (path / "replay").is_dir()
        or any(path.glob("shard-*/manifest-*.json"))
    )


def _shard(config: RunConfig, schema: StepSchema, segments: int) -> Shard:
    """An empty shard, with room for so many segments and the one that is kept free."""
    layout = Layout(schema, segments + 1, config.replay.segment_steps, (TableSpec(parts.TABLE),))
    limiters = {parts.TABLE: RateLimiter(RateLimit.from_min_size(1))}
    stack = parts.window(config, schema).stack
    return Shard(layout, limiters, index=0, seed=parts.seed_of(config, "shard"), stack=stack)


def _from_snapshots(config: RunConfig, schema: StepSchema, snapshots: list[Snapshot]) -> Shard:
    _check_fields(config, schema, snapshots)
    steps, segments = config.replay.segment_steps, 0
    for snapshot in snapshots:
        rows = snapshot.segments.column("rows").to_numpy()
        segments += sum(math.ceil(int(rows[chain].sum()) / steps) for chain in chains_of(snapshot))
    # Restored segments end where they were saved, so that each may begin a new one here.
    shard = _shard(config, schema, segments + sum(len(chains_of(snapshot)) for snapshot in snapshots))
    load(shard, snapshots)
    items = shard.table(parts.TABLE).items
    parts.set_limiter(shard, inserted=items, sampled=0, items=items)
    return shard


def _from_files(config: RunConfig, schema: StepSchema, files: list[Path]) -> Shard:
    """Reads the files twice, first to count, so that memory holds the dataset once."""
    count = sum(len(chunk.rows) for chunk in _of_files(config, schema, files))
    shard = _shard(config, schema, math.ceil(count / config.replay.segment_steps))
    import_into_service(read_chunks(files, schema), [CallWriter(shard)])
    return shard


def _check_fields(config: RunConfig, schema: StepSchema, snapshots: Iterable[Snapshot]) -> None:
    for snapshot in snapshots:
        if snapshot.schema != schema:
            raise _other_fields(config, schema, snapshot.schema)


def _of_files(config: RunConfig, schema: StepSchema, files: list[Path]) -> Generator[Chunk, None, None]:
    """The steps of files; raises SchemaError or ValueError where they do not fit, in words that name the setting."""
    try:
        yield from _checked(config, schema, read_chunks(files, schema))
    except SchemaError as error:
        raise _other_fields(config, schema, infer_schema(files[0]), why=str(error)) from error


def _checked(config: RunConfig, schema: StepSchema, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The chunks; raises ValueError where an action is none that the run's policy could take."""
    choices = schema.action.choices
    for chunk in chunks:
        action = chunk.rows["action"][~chunk.rows["is_last"]]
        low, high = (0, choices - 1) if choices else (-1.0 - TOLERANCE, 1.0 + TOLERANCE)
        if len(action) and not (low <= np.min(action) and np.max(action) <= high):
            expected = (
                f"numbers from 0 to {choices - 1}" if choices else "values in [-1, 1], scaled from the action bounds"
            )
            raise ValueError(
                f"prior.source {config.prior.source}: expected actions as {config.env.id} stores them, {expected}; received "
                f"{np.min(action):.6g} to {np.max(action):.6g}"
            )
        yield chunk


def _other_fields(config: RunConfig, expected: StepSchema, received: StepSchema, *, why: str = "") -> SchemaError:
    reason = f" ({why})" if why else ""
    state = {field.name: field for field in received.fields}.get(STATE)
    if STATE in (field.name for field in expected.extra) and state not in expected.extra:
        reason += f"; the field {STATE} is that of the policy of algorithm.name {config.algorithm.name}" + (
            f" with algorithm.recurrent {config.algorithm.recurrent}: take steps of such a run"
            if isinstance(config.algorithm, R2d2Settings)
            else ""
        )
    return SchemaError(
        f"prior.source {config.prior.source} does not fit env.id {config.env.id}: expected {expected}, received "
        f"{received}{reason}"
    )
