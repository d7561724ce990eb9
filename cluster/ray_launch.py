"""Start a run under Ray, private or attached, and follow it until it ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.checkpoint import Checkpoint
from cluster.head_state import STATE
from cluster.ray_children import HEAD, end_processes
from cluster.runs import AnyConfig, RunFolder
from configs.llm import LlmConfig
from replay.security import check_host

POLL_S = 0.5
REACH_S = 5.0  # how long a cluster may take to accept a connection


class ClusterError(RuntimeError):
    """Ray cannot be reached, or cannot hold the run."""


def namespace(run: str) -> str:
    """Ray namespace of a run's processes."""
    return f"millrace-{run}"


def needed_cpus(config: AnyConfig) -> float:
    """CPUs that Ray must set aside for a run."""
    return config.actors.count * config.actors.cpus + config.learners.count * config.learners.cpus


def needed_gpus(config: AnyConfig) -> float:
    """GPUs that Ray must set aside for a run, but for those that learners take where there are some."""
    actors = config.actors.count * config.actors.gpus if isinstance(config, LlmConfig) else 0.0
    return actors + config.learners.count * (config.learners.gpus or 0.0)


def _head_of(config: AnyConfig) -> tuple[Any, dict[str, Any]]:
    """The actor class of the head for this kind of run, and what it takes besides what every head does.

    Raises:
        EnvError: the environment is unknown or does not fit.
        TaskError: the tasks cannot be made.
    """
    if isinstance(config, LlmConfig):
        from cluster.ray_llm import LlmHeadWorker

        return LlmHeadWorker, {}
    from cluster import parts
    from cluster.ray_control import ControlHeadWorker

    schema = parts.env_schema(config, parts.make_tasks(config))
    return ControlHeadWorker, {"schema": schema.to_json()}


def run_on_ray(
    folder: RunFolder[Any],
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
        ValueError: the TLS files cannot be used.
        ClusterError: Ray cannot be reached, has too few CPUs or GPUs, or lost the head.
        RuntimeError: the run failed; the message says why.
    """
    config, security = folder.config, folder.security()
    security.check_files()
    if (warning := check_host(config.replay.host, security)) is not None:
        show(None, warning)
    head_class, arguments = _head_of(config)
    counts = ((config.replay.shards, "shard"), (config.actors.count, "actor"), (config.learners.count, "learner"))
    show(None, "starting " + ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts) + " under Ray")
    try:
        with _sigterm_kept():
            _init(config, namespace(folder.path.name), show)
        options = head_class.options(
            name=HEAD,
            namespace=namespace(folder.path.name),
            lifetime="detached",
            num_cpus=0,
            # A head that dies is started again, and what it was asked, which may be asked twice, is asked of the new one.
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=64,
        )
        try:
            head = options.remote(
                str(folder.path.resolve()),
                wall_started,
                None if resume is None else str(resume.path.resolve()),
                **arguments,
            )
        except ValueError as error:  # the name is taken
            raise ClusterError(
                f"a run named {folder.path.name} is still on this cluster; wait until it has ended, or choose another --name"
            ) from error
        try:
            return _follow(head, show, stopping)
        finally:
            end_processes(but=())
            (folder.path / STATE).unlink(missing_ok=True)
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Within it `ray.init` puts in a SIGTERM handler that exits at once; afterwards ours is back, which asks for a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        raise ClusterError("stopped by a signal while Ray was starting: nothing has been trained") from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _init(config: AnyConfig, name: str, show: Callable[[None, str], None]) -> None:
    """Start a private Ray or attach to a cluster."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    common = {"namespace": name, "log_to_driver": False, "logging_level": "error"}
    if address:
        try:
            _reach(address)
            context = ray.init(address=address, **common)
        except (OSError, ray.exceptions.RayError, RuntimeError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address}: {error}; start one (`ray start --head`), or leave out --address to "
                "start a private one"
            ) from error
        nodes = sum(node["Alive"] for node in ray.nodes())
        if nodes > 1 and config.replay.host in ("127.0.0.1", "localhost"):
            ray.shutdown()
            raise ClusterError(
                f"the cluster at {address} has {nodes} nodes, and shards that listen on replay.host {config.replay.host} are "
                "reached from their own node only; set --replay.host node, on a network you trust"
            )
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A laptop may run more actors than it has cores; Ray would let the rest wait for ever.
        cpus = max(os.cpu_count() or 1, int(needed_cpus(config) + 1))
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.ray.object_store_mb * 2**20,
            **common,
        )
    have, want = ray.cluster_resources(), {"CPU": needed_cpus(config), "GPU": needed_gpus(config)}
    if short := [f"{want[k]:g} {k}s, and it has {have.get(k, 0):g}" for k in want if want[k] > have.get(k, 0)]:
        ray.shutdown()
        raise ClusterError(
            f"{f'the cluster at {address}' if address else 'this machine'} is too small: the run asks for {'; '.join(short)}; "
            f"lower actors.count, actors.cpus, {'actors.gpus, ' * isinstance(config, LlmConfig)}learners.cpus or learners.gpus"
        )
    if url := context.dashboard_url:
        show(None, f"Ray dashboard: http://{url}")


def _reach(address: str) -> None:
    """Raises OSError unless something listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


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
        after = status["next"]
        outcome = status["outcome"]
        if outcome is not None:
            if "error" in outcome:
                raise RuntimeError(outcome["error"])
            summary: dict[str, Any] = outcome["summary"]
            return summary
        if stopping.is_set():
            if not told:
                told = True
                show(None, "stopping: a checkpoint is written first")
            head.stop.remote("stopped by a signal")  # each time: a head that dies may forget
        stopping.wait(POLL_S) if not told else time.sleep(POLL_S)
