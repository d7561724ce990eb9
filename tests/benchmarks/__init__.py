"""Benchmarks, run by `millrace bench NAME`. They measure; nothing here asserts, and CI times nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import RunConfig

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
        ValueError: the settings, or the environment, are wrong.
        RuntimeError: a measuring process failed; its error is in the message.
    """
    default_config, default_settings, default_seconds = DEFAULTS[name]
    loaded = load_config(config or default_config, [*default_settings, *settings])
    limit = default_seconds if seconds is None else seconds
    from actors.envs import check_env
    from cluster.api import check_algorithm

    check_algorithm(loaded, check_env(loaded.env, num_envs=loaded.actors.envs, batch_size=loaded.actors.batch_size))
    if name == "actors":
        from tests.benchmarks.actors import bench as bench_actors

        return bench_actors(loaded, seconds=limit)
    from tests.benchmarks.train import bench as bench_train

    return bench_train(loaded, seconds=limit)


def run_child(module: str, *words: str, config: RunConfig) -> dict[str, Any]:
    """Run a measuring module in a process of its own, `config` on its standard input; the JSON line it ends with.

    In its own process, because BLAS reads its thread count when numpy is imported, and a second BLAS thread, spinning while
    it waits, takes a core from what is measured.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", module, *words],
        input=config.model_dump_json(),
        env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        last = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
        raise RuntimeError(f"the benchmark's process failed: {last}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found
