"""Benchmarks, run by `millrace bench NAME`. They measure; nothing here asserts, and CI times nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.load import load_config

# What each benchmark runs with where its command line says nothing else.
DEFAULTS: dict[str, tuple[str | None, tuple[str, ...], float]] = {
    # Large writes and asynchronous stepping: settings for throughput, where a training run prefers fresh weights.
    "actors": (
        None,
        ("--env.id=HalfCheetah-v4", "--actors.envs=64", "--actors.batch_size=32", "--actors.rows_per_write=512"),
        30.0,
    ),
    "train": ("halfcheetah_sac", (), 60.0),
}


def run_benchmark(name: str, config: str | None, settings: Sequence[str], *, seconds: float | None) -> dict[str, Any]:
    """Run one benchmark with a config file and settings laid over its defaults.

    Raises:
        ConfigError: as `load_config`.
        RuntimeError: a measuring process failed; its error is in the message.
    """
    default_config, default_settings, default_seconds = DEFAULTS[name]
    loaded = load_config(config or default_config, [*default_settings, *settings])
    limit = default_seconds if seconds is None else seconds
    if name == "actors":
        from tests.benchmarks.actors import bench as bench_actors

        return bench_actors(loaded, seconds=limit)
    from tests.benchmarks.train import bench as bench_train

    return bench_train(loaded, seconds=limit)
