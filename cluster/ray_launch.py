"""Start a run under Ray, private or attached, and follow it until it ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.checkpoint import Checkpoint
from cluster.head_state import STATE
from cluster.ray_children import HEAD, end_processes
from cluster.ray_placement import PRIVATE, alive_nodes, await_resources, needs, on_this_node, remove_groups
from cluster.runs import AnyConfig, RunFolder
from configs.llm import LlmConfig
from replay.security import check_host

POLL_S = 0.5
PROBE_S = 2.0  # between two looks whether Ray's control store is there
LOST_S = 30.0  # without an answer it is lost; Ray waits twice as long
LOOPBACK = ("127.0.0.1", "localhost", "::1")
REACH_S = 5.0  # how long a cluster may take to accept a connection


class ClusterError(RuntimeError):
    """Ray cannot be reached, or cannot hold the run."""


def namespace(run: str) -> str:
    """Ray namespace of a run's processes."""
    return f"millrace-{run}"


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
        ClusterError: Ray cannot be reached, has too few CPUs, GPUs or other resources, or lost the head.
        RuntimeError: the run failed; the message says why.
    """
    config, security = folder.config, folder.security()
    security.check_files()
    if (warning := check_host(config.replay.host, security)) is not None:
        show(None, warning)
    head_class, arguments = _head_of(config)
    name = namespace(folder.path.name)
    counts = ((config.replay.shards, "shard"), (config.actors.count, "actor"), (config.learners.count, "learner"))
    show(None, "starting " + ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts) + " under Ray")
    try:
        with _sigterm_kept():
            _init(config, name, show, stopping)
        if HEAD not in ray.util.list_named_actors():  # what a run of this name has left that was killed as a whole
            remove_groups(name)
        options = head_class.options(
            name=HEAD,
            namespace=name,
            lifetime="detached",
            num_cpus=0,
            **on_this_node(),  # where the run's folder is
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
        except StoreLostError as error:
            show(None, str(error))  # at once: what follows may take long
            raise
        finally:
            if not isinstance(sys.exception(), StoreLostError):
                end_processes(but=())
                remove_groups(name)
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


def _init(config: AnyConfig, name: str, show: Callable[[None, str], None], stopping: threading.Event) -> None:
    """Start a private Ray or attach to a cluster, and see to it that the run finds room there."""
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
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # A laptop may run more actors than it has cores; Ray would let the rest wait for ever.
        needed = sum(need.count * need.resources.get("CPU", 0.0) for need in needs(config))
        context = ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, int(needed + 1)),
            resources={PRIVATE: 1.0},
            include_dashboard=config.ray.dashboard,
            object_store_memory=config.ray.object_store_mb * 2**20,
            **common,
        )
    try:
        _check_host(config, address)
        _check_resources(config, address, show, stopping)
        _check_host(config, address)  # once more: a node may have joined meanwhile
    except BaseException:
        ray.shutdown()
        raise
    if len(alive_nodes()) > 1 and config.control.host in LOOPBACK:
        show(
            None,
            f"only this node reaches the run (millrace status, scale, stop), for control.host is {config.control.host}; "
            "--control.host node opens it to others",
        )
    if url := context.dashboard_url:
        show(None, f"Ray dashboard: http://{url}")


def _check_host(config: AnyConfig, address: str | None) -> None:
    """Raises ClusterError where nodes of a cluster could not reach the shards."""
    nodes = len(alive_nodes())
    if nodes > 1 and config.replay.host in LOOPBACK:
        raise ClusterError(
            f"the cluster at {address} has {nodes} nodes, and shards that listen on replay.host {config.replay.host} are "
            "reached from their own node only; set --replay.host node, on a network you trust"
        )


def _check_resources(
    config: AnyConfig, address: str | None, show: Callable[[None, str], None], stopping: threading.Event
) -> None:
    """See to it that the run finds room; in a cluster it is waited for as long as `wait_for_resources` says."""
    seconds = config.wait_for_resources if address else 0.0  # nobody adds nodes to a private Ray
    missing = await_resources(needs(config), seconds, tell=lambda line: show(None, line), stopping=stopping)
    if missing is None:
        return
    if stopping.is_set():
        raise ClusterError("stopped by a signal while waiting for resources: nothing has been trained")
    where = f"the cluster at {address}" if address else "this machine"
    waited = f" after {seconds:g} s" if seconds else ""
    advice = "" if seconds or not address else "; --wait-for-resources SECONDS waits for nodes that join"
    raise ClusterError(f"{where} is too small{waited}: {missing}{advice}")


def _reach(address: str) -> None:
    """Raises OSError unless something listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


class StoreLostError(ClusterError):
    """The cluster's head node is gone; nothing can be asked of Ray any more."""


class _ControlStore:
    """Ray's control store, on the cluster's head node: Ray itself ends the process a minute after it is gone, with no word of ours."""

    def __init__(self) -> None:
        self._address = ray.get_runtime_context().gcs_address
        self._seen = self._tried = time.monotonic()

    def check(self) -> None:
        """Look whether it answers, from time to time.

        Raises:
            StoreLostError: it has not for `LOST_S`.
        """
        now = time.monotonic()
        if now - self._tried < PROBE_S:
            return
        self._tried = now
        try:
            _reach(self._address)
            self._seen = time.monotonic()
        except OSError as error:
            if (silent := time.monotonic() - self._seen) > LOST_S:
                raise StoreLostError(
                    f"the head node of the cluster is lost: Ray's control store at {self._address} has not answered for "
                    f"{silent:.0f} s ({error}); start the cluster again, and go on from the last checkpoint with --resume"
                ) from None


def _follow(
    head: Any, show: Callable[[dict[str, float] | None, str | None], None], stopping: threading.Event
) -> dict[str, Any]:
    after, told = 0, False
    store = _ControlStore()
    while True:
        try:
            answer = head.status.remote(after)
            while not ray.wait([answer], timeout=PROBE_S)[0]:
                store.check()
            store.check()
            status = ray.get(answer)
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
