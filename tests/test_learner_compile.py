"""`learners.compile`: the same updates where there is a compiler, the eager ones and one line where there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UPDATES = """
import logging, sys
import numpy as np, torch
from configs.algorithms import SacSettings
from learners.sac import Sac
from replay.schema import Field, StepSchema, WindowBatch

logging.basicConfig(format="%(levelname)s %(message)s")
torch.set_num_threads(1)
schema = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (1,)))
generator = np.random.default_rng(0)
learners = [
    Sac(schema, SacSettings(hidden=(16, 16)), batch_size=8, device="cpu", seed=0, compile=compile)
    for compile in (False, True)
]
for _ in range(20):
    steps = np.zeros((8, 2), schema.dtype)
    for name in ("observation", "action", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    batch = WindowBatch(steps, np.ones(8, "i4"), np.zeros(8, "i8"), np.zeros(8, "i4"), np.ones(8))
    for learner in learners:
        learner.update(batch)
eager, compiled = (learner.state() for learner in learners)
assert eager["critic.online.steps"] == compiled["critic.online.steps"] == 20
print(max((eager[name].double() - compiled[name].double()).abs().max().item() for name in eager))
"""


def run(tmp_path: Path, **environment: str) -> tuple[float, str]:
    """Largest difference between eager and compiled learner after 20 updates, and the log; with an empty kernel cache."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", UPDATES],
        env=kept | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": root} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr


def test_without_a_compiler_updates_are_eager_and_one_line_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    largest, log = run(tmp_path, PATH=str(empty))
    assert largest == 0.0
    lines = [
        line for line in log.splitlines() if line.startswith("WARNING torch.compile failed, so updates run eagerly")
    ]
    assert len(lines) == 1
    assert "compiler" in lines[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_updates_agree_with_eager_ones(tmp_path: Path) -> None:
    largest, log = run(tmp_path)
    assert "torch.compile failed" not in log
    assert 0.0 < largest < 1e-5
