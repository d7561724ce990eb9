"""What every test needs, set before anything imports torch."""

from __future__ import annotations

import os

from hypothesis import settings

# Waiting OpenMP threads spin: with more of them than idle cores, every process of a test slows to a fraction.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run, and no time limit per example: a busy machine is no failure.
settings.register_profile("millrace", deadline=None, derandomize=True)
settings.load_profile("millrace")
