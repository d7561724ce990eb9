"""What every test needs, set before anything imports torch."""

from __future__ import annotations

import os

# Waiting OpenMP threads spin: with more of them than idle cores, every process of a test slows to a fraction.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import faulthandler
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings

import actors  # noqa: F401  before any test imports EnvPool, for MuJoCo's renderer
from tests.runs_for_tests import RayCluster

# The same examples in every run, and no time limit per example: a busy machine is no failure.
settings.register_profile("millrace", deadline=None, derandomize=True)
settings.load_profile("millrace")


# Whole runs, killed ones among them: a run tells of what a dead one has left, so tests of them do not run beside each other.
WHOLE_RUNS = (
    "test_cli",
    "test_replay_faults",
    "test_replay_service",
    "test_ray_run",
    "test_ray_llm",
    "test_ray_head_restart",
    "test_ray_elastic",
    "test_replay_elastic_faults",
    "test_ray_relay",
    "test_ray_placement",
    "test_ray_submit",
    "test_cluster_faults",
    "test_outside",
    "test_ray_outside",
    "test_ray_files",
    "test_ray_metrics",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of whole runs. Where tests run in several processes, those of a file stay together: they share fixtures."""
    for item in items:
        if item.path.stem in WHOLE_RUNS:
            item.add_marker(pytest.mark.whole_run)
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """A learner in this process flushes denormal numbers to zero, which the next test need not expect."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster of one node beside the tests, as somebody else would have started it."""
    # Not pytest's own folder: Ray's sockets lie in it, and their paths must be short.
    with TemporaryDirectory(prefix="millrace-ray-", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """See to it that this process ends, and never as if nothing was wrong where something keeps it from that."""
    main = threading.main_thread()
    deadline = time.monotonic() + 10.0
    while left := [thread for thread in threading.enumerate() if thread is not main and not thread.daemon]:
        if time.monotonic() > deadline:
            _end_in_spite_of(left)
        left[0].join(timeout=0.1)
    # What is still to come is the interpreter's end, where a native library may wait for ever: its stacks are then shown. The
    # alarm, which needs no interpreter, is for the part of it after which Python's own watchdog is gone.
    sys.stdout.flush()
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(90)


def _end_in_spite_of(threads: list[threading.Thread]) -> None:
    """End with exit status 1: any other way would wait for these threads."""
    frames = sys._current_frames()
    for thread in threads:
        stack = traceback.format_stack(frames.get(thread.ident or 0))
        print(f"still running 10 s after the last test: {thread}\n{''.join(stack)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
