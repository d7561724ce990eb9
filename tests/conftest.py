"""What every test needs, set before anything imports torch."""

from __future__ import annotations

import os

# Waiting OpenMP threads spin: with more of them than idle cores, every process of a test slows to a fraction.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
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
