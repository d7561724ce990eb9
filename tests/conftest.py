"""What every test needs, set before anything imports torch."""

from __future__ import annotations

import os

# Waiting OpenMP threads spin: with more of them than idle cores, every process of a test slows to a fraction.
os.environ.setdefault("OMP_NUM_THREADS", "1")
