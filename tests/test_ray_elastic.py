"""Runs whose numbers of actors and shards change while they go."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests import runs_for_tests as runs
from tests.runs_for_tests import RayCluster
from tests.test_ray_run import GENTLE, TWO_OF_EACH, Started, ended, start, wait_until_gone

__all__ = ["start"]


def millrace(run: Path, *words: str) -> Any:
    """What one of the commands of the control plane answers, as JSON."""
    command, *rest = words
    process = runs.start(command, str(run), *rest, "--json", cwd=run.parent)
    try:
        out, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return json.loads(out)


def scale(run: Path, actors: int, shards: int) -> None:
    """Want so many actors and shards."""
    answer = millrace(run, "scale", "--actors", str(actors), "--shards", str(shards))
    assert (answer["actors"], answer["shards"]) == (actors, shards)


def alive(run: Path, kind: str) -> set[int]:
    """Numbers of the processes of a kind that run and do not leave."""
    processes = millrace(run, "status")["processes"]
    return {p.get("index", 0) for p in processes if p["kind"] == kind and p["state"] == "running"}


def packed(checkpoint: Path) -> Counter[tuple[Any, ...]]:
    """How often each step, by what makes it unique, is in the replay files of a checkpoint."""
    found: Counter[tuple[Any, ...]] = Counter()
    for lane in runs.lanes(checkpoint, "observation", "action", "is_last"):
        rows = pa.table({name: lane[name] for name in lane.column_names}).to_pylist()
        found.update((*row["observation"], *row["action"]) for row in rows[:-1] if not row["is_last"])
    return found


@pytest.mark.timeout(400)
def test_a_run_grows_and_shrinks_and_keeps_every_step_once(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *TWO_OF_EACH, *GENTLE, "--name", "a", "--stop.steps", "1000000", "--actors.cpus", "0.2",
        "--learners.updates_per_step", "0.25", "--replay.capacity", "65536", "--report_every_s", "0.5", "--replay.cpus", "2",
        cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: "learner" in runs.pids(run), process, timeout_s=120.0)

    # For the fourth shard there is no room: it is waited for, and holds up nothing.
    scale(run, 3, 4)
    runs.wait_for(lambda: alive(run, "shard") == {0, 1, 2}, process)
    waiting = millrace(run, "status")
    assert [p["state"] for p in waiting["processes"] if p["name"] == "shard 3"] == ["starting"]
    assert any("shard 3 waits for a node" in text for text in waiting["waiting"]), waiting["waiting"]
    assert millrace(run, "checkpoint")["step"] > 0
    scale(run, 3, 3)
    runs.wait_for(lambda: alive(run, "actor") == {0, 1, 2} and alive(run, "shard") == {0, 1, 2}, process)

    # Lanes move to the new shard with their next episodes, whole, and learners draw from it.
    def written() -> bool:
        shards = [p for p in millrace(run, "status")["processes"] if p["name"] == "shard 2"]
        figures = shards[0]["figures"]
        return figures["inserted"] > 300 and figures["sampled"] > 300

    runs.wait_for(written, process)

    scale(run, 1, 1)
    runs.wait_for(
        lambda: [p["name"] for p in millrace(run, "status")["processes"] if p["kind"] in ("actor", "shard")]
        == ["shard 0", "actor 0"],
        process,
        timeout_s=120.0,
    )  # fmt: skip
    before = millrace(run, "checkpoint")
    saved = Path(before["path"])
    assert runs.recount(saved)[0] <= runs.head_counts(saved)["env_steps"]  # the newest row of a lane is no item yet
    millrace(run, "stop")
    ended(process, tmp_path)

    summary, last = runs.summary(run), runs.newest_checkpoint(run)
    assert summary["restarts"] == 0
    items, _ = runs.recount(last)
    assert items == summary["steps"] == runs.head_counts(last)["env_steps"]
    counts = packed(last)
    assert max(counts.values()) == 1, "a step is there twice"
    told = [event["text"] for event in runs.events(run, "scale")]
    assert sum(" has left; " in text for text in told) == 2
    assert {"actor 1 leaves", "actor 2 leaves"} <= set(told)
    wait_until_gone(lambda: list(ray_cluster.workers()))
