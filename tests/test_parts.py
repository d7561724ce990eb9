"""What a run is made of: pairings that are refused, and every algorithm in a run of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import parts
from cluster.api import Run, check_algorithm, train
from cluster.checkpoint import load_tensors
from cluster.metrics import read_metrics
from configs.load import load_config
from replay.schema import Field, StepSchema
from replay.snapshot import SnapshotStore
from tests import runs_for_tests as runs

VECTOR = {"observation": Field("observation", "float32", (3,))}
FRAMES = {"observation": Field("observation", "uint8", (1, 84, 84))}
CONTINUOUS = StepSchema(VECTOR, Field("action", "float32", (1,)))
DISCRETE = StepSchema(VECTOR, Field("action", "int64", choices=4))
SMALL = [
    *(
        "--algorithm.hidden",
        "16",
        "--learners.batch_size",
        "16",
        "--replay.min_size",
        "100",
        "--replay.capacity",
        "16384",
    ),
    *("--actors.random_steps", "100", "--actors.envs", "4", "--stop.steps", "300", "--replay.segment_steps", "64"),
    *("--learners.updates_per_step", "0.25", "--eval.every", "150", "--eval.episodes", "1", "--mode", "sync"),
]


# -- pairings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "schema", "message"),
    [
        (
            "--algorithm.name sac",
            DISCRETE,
            "has 4 discrete actions, and algorithm.name sac .*set algorithm.name to dqn, or",
        ),
        ("--algorithm.name flow", DISCRETE, "algorithm.name flow needs continuous ones"),
        ("--algorithm.name dqn", CONTINUOUS, "has continuous actions, and algorithm.name dqn .* to sac, or to flow"),
        ("--algorithm.name r2d2", CONTINUOUS, "algorithm.name r2d2 needs discrete ones"),
        (
            "--algorithm.name dqn --algorithm.target.kind chunk --algorithm.target.length 7 --algorithm.chunk 7",
            DISCRETE,
            r"7 actions out of 4 would list 4\^7 sequences, and at most 4096 .* can be at most 6",
        ),
    ],
)
def test_an_algorithm_that_cannot_act_in_the_environment_is_refused(
    flags: str, schema: StepSchema, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_algorithm(load_config(None, flags.split()), schema)


@pytest.mark.parametrize(
    ("flags", "schema"),
    [
        ("--algorithm.name sac", CONTINUOUS),
        ("--algorithm.name flow", CONTINUOUS),
        ("--algorithm.name r2d2", DISCRETE),
        (
            "--algorithm.name dqn --algorithm.target.kind decoupled --algorithm.target.length 6 --algorithm.chunk 2",
            DISCRETE,
        ),
        # Windows of many steps that no critic takes as a sequence.
        ("--algorithm.name dqn --algorithm.target.kind n_step --algorithm.target.length 20", DISCRETE),
        ("--algorithm.name dqn --env.stack 4", StepSchema(FRAMES, DISCRETE.action)),
    ],
)
def test_an_algorithm_that_can_is_not(flags: str, schema: StepSchema) -> None:
    check_algorithm(load_config(None, flags.split()), schema)


def test_windows_are_what_the_algorithm_learns_from() -> None:
    def window(flags: str, schema: StepSchema) -> tuple[int, int, str, int]:
        found = parts.window(load_config(None, flags.split()), schema)
        return found.length, found.burn_in, found.observations, found.stack

    frames = StepSchema(FRAMES, DISCRETE.action)
    assert window("", CONTINUOUS) == (1, 0, "ends", 1)
    assert window("--algorithm.target.kind n_step --algorithm.target.length 5", CONTINUOUS) == (5, 0, "ends", 1)
    assert window("--algorithm.name dqn --env.stack 4", frames) == (1, 0, "ends", 4)
    length, burn_in, observations, _ = window("--algorithm.name r2d2 --algorithm.burn_in 3", DISCRETE)
    assert (burn_in, observations) == (3, "all")
    assert length >= load_config(None, ["--algorithm.name", "r2d2"]).algorithm.sequence  # type: ignore[union-attr]


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sync(tmp_path: Path) -> Callable[..., Run]:
    def run(*words: str, **more: Any) -> Run:
        where = ("--root", str(tmp_path / "runs"), "--replay.directory", str(tmp_path))
        return train(load_config(None, [*SMALL, *where, *words]), show=lambda *_: None, **more)

    return run


@pytest.mark.parametrize(
    "words",
    [
        "--env.id Pendulum-v1 --algorithm.head.kind hl_gauss --algorithm.chain.length 2 --learners.updates_per_call 3",
        "--env.id Pendulum-v1 --algorithm.name flow --algorithm.proposals 4 --algorithm.target.kind decoupled "
        "--algorithm.target.length 4 --algorithm.chunk 2",
        "--env.id CartPole-v1 --algorithm.name dqn --replay.selector prioritised --algorithm.target.kind n_step "
        "--algorithm.target.length 3 --learners.updates_per_call 2",
        "--env.id CartPole-v1 --algorithm.name r2d2 --replay.selector prioritised --algorithm.burn_in 2 "
        "--algorithm.sequence 4 --algorithm.recurrent 8",
    ],
    ids=["sac", "flow", "dqn", "r2d2"],
)
def test_every_algorithm_runs_stops_resumes_and_counts(words: str, sync: Callable[..., Run]) -> None:
    first = sync(*words.split(), "--name", "a")
    second = sync(*words.split(), "--name", "a", "--stop.steps", "400", resume=first.path)
    checkpoint = runs.newest_checkpoint(second.path)
    counts = runs.head_counts(checkpoint)
    tensors, metadata = load_tensors(checkpoint / "learner.safetensors")
    assert counts["updates"] == metadata["updates"] > first.summary["updates"] > 0
    assert counts["sampled"] == 16 * counts["updates"]
    learnt = [array for name, array in tensors.items() if array.dtype.kind == "f" and not name.startswith("support.")]
    assert all(np.isfinite(array).all() for array in learnt)
    evaluated = [
        row["eval/mean_return"] for row in read_metrics(second.path).to_pylist() if row.get("eval/mean_return")
    ]
    assert len(evaluated) >= 3


def test_prioritised_runs_repeat_to_the_last_digit(sync: Callable[..., Run]) -> None:
    """Priorities, weights and the support that the data decides on are all in lock step."""
    words = "--env.id CartPole-v1 --algorithm.name dqn --replay.selector prioritised --algorithm.head.kind hl_gauss"
    one, two = (sync(*words.split(), "--name", name, "--eval.every", "0") for name in "ab")
    states = [load_tensors(runs.newest_checkpoint(run.path) / "learner.safetensors")[0] for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].tobytes() == states[1][name].tobytes() for name in states[0])


def test_priorities_of_a_run_reach_its_table(sync: Callable[..., Run]) -> None:
    words = "--env.id CartPole-v1 --algorithm.name dqn --replay.selector prioritised --name a"
    run = sync(*words.split())
    (snapshot,) = SnapshotStore(str(runs.newest_checkpoint(run.path) / "replay")).all()
    tables = [copied.tables["steps"] for copied in snapshot.copies(range(snapshot.segments.num_rows))]
    priority = np.concatenate([found.priority[found.member] for found in tables if found.priority is not None])
    # New items have the highest priority there has been; those that were learnt from have one of their own.
    assert len(np.unique(priority)) > 100


def test_the_extent_of_returns_is_kept_over_a_resumption(sync: Callable[..., Run]) -> None:
    words = "--env.id Pendulum-v1 --algorithm.head.kind two_hot --name a --eval.every 0"
    first = sync(*words.split())
    low, high = runs.head_state(runs.newest_checkpoint(first.path))["return_extent"]
    assert -16.3 * 100 < low < -10.0 < high <= 0.0
    second = sync(*words.split(), "--stop.steps", "400", resume=first.path)
    lower, higher = runs.head_state(runs.newest_checkpoint(second.path))["return_extent"]
    assert lower <= low
    assert higher >= high
