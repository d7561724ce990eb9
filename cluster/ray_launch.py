"""Start a run under Ray, private or attached, and follow it until it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.envs import check_env
from cluster.checkpoint import Checkpoint
from cluster.ray_head import HeadWorker
from cluster.runs import RunFolder
from configs.schema import RunConfig

POLL_S = 0.5


class ClusterError(Exception):
    """Ray cannot be reached, or cannot hold the run."""


def namespace(run: str) -> str:
    """Ray namespace of a run's processes."""
    return f"millrace-{run}"


def needed_cpus(config: RunConfig) -> float:
    """CPUs that Ray must set aside for a run."""
    return config.actors.count * config.actors.cpus + config.learners.cpus


def run_on_ray(
    folder: RunFolder,
    *,
    wall_started: float,
    resume: Checkpoint | None,
    show: Callable[[dict[str, float] | None, str | None], None],
    stopping: threading.Event,
) -> dict[str, Any]:
    """Train under Ray until the run ends; `stopping` ends it with a checkpoint. Returns the summary.

    wall_started: epoch seconds at which the command was started.
    show: called with each metrics row, and with each line of text.

    Raises:
        EnvError: the environment is unknown or does not fit.
        ClusterError: Ray cannot be reached, has too few CPUs or GPUs, or lost the head.
        RuntimeError: the run failed; the message says why.
    """
    config = folder.config
    schema = check_env(config.env, num_envs=config.actors.envs, batch_size=config.actors.batch_size)
    attached = _init(config, namespace(folder.path.name), show)
    try:
        head = HeadWorker.options(  # type: ignore[attr-defined]
            name="head",
            namespace=namespace(folder.path.name),
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_concurrency=64,
        ).remote(
            str(folder.path.resolve()),
            schema.to_json(),
            wall_started,
            None if resume is None else str(resume.path.resolve()),
        )
        try:
            return _follow(head, show, stopping)
        finally:
            if attached:
                ray.kill(head)
    finally:
        ray.shutdown()


def _init(config: RunConfig, name: str, show: Callable[[None, str], None]) -> bool:
    """Start a private Ray or attach to a cluster. Returns whether it is attached."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    common = {"namespace": name, "log_to_driver": False, "logging_level": "error"}
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ray.exceptions.RayError, RuntimeError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address}: {error}; start one (`ray start --head`), or leave out --address to "
                "start a private one"
            ) from error
        have, want = ray.cluster_resources(), {"CPU": needed_cpus(config), "GPU": config.learners.gpus or 0.0}
        short = [f"{want[k]:g} {k}s, and it has {have.get(k, 0):g}" for k in want if want[k] > have.get(k, 0)]
        if short:
            ray.shutdown()
            raise ClusterError(
                f"the cluster at {address} is too small: the run asks for {'; '.join(short)}; lower actors.count, "
                "actors.cpus, learners.cpus or learners.gpus"
            )
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A laptop may run more actors than it has cores; Ray would let the rest wait for ever.
        cpus = max(os.cpu_count() or 1, int(needed_cpus(config) + 1))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.ray.object_store_mb * 2**20,
            **common,
        )
    url = ray.get_runtime_context().gcs_address and ray._private.worker.get_dashboard_url()
    if url:
        show(None, f"Ray dashboard: http://{url}")
    return bool(address)


def _follow(
    head: Any, show: Callable[[dict[str, float] | None, str | None], None], stopping: threading.Event
) -> dict[str, Any]:
    after, told = 0, False
    while True:
        try:
            status = ray.get(head.status.remote(after))
        except ray.exceptions.RayActorError as error:
            raise ClusterError(f"the head is lost: {error}; go on from the last checkpoint with --resume") from error
        for row, line in status["shown"]:
            show(row, line)
        after += len(status["shown"])
        outcome = status["outcome"]
        if outcome is not None:
            if "error" in outcome:
                raise RuntimeError(outcome["error"])
            summary: dict[str, Any] = outcome["summary"]
            return summary
        if stopping.is_set() and not told:
            told = True
            show(None, "stopping: a checkpoint is written first")
            head.stop.remote("stopped by a signal")
        stopping.wait(POLL_S) if not told else time.sleep(POLL_S)
