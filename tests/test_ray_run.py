"""Runs under a real Ray: attached to a cluster and private, with processes killed in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.flight as flight
import pytest
import torch

from cluster.checkpoint import Checkpoints, load_tensors
from cluster.files import read_json
from cluster.metrics import read_metrics
from cluster.runs import RunFolder
from replay.security import Security, flight_client
from replay.snapshot import SnapshotStore
from replay.wire import action
from tests import runs_for_tests as runs
from tests.runs_for_tests import RayCluster
from tests.test_replay_security import make_certificate

Started = Callable[..., subprocess.Popen[str]]
TWO_OF_EACH = [
    "--actors.count",
    "2",
    "--actors.envs",
    "4",
    "--replay.shards",
    "2",
]
GENTLE = ["--actors.cpus", "0.5", "--actors.threads", "1"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Started]:
    """Start `millrace train` on Pendulum in `tmp_path`; what is left of it at the end of the test is killed."""
    started = []
    clusters: list[RayCluster] = []
    (tmp_path / "storage").mkdir()

    def run(*words: str, cluster: RayCluster | None = None) -> subprocess.Popen[str]:
        words = ("train", *words, "--replay.directory", str(tmp_path / "storage"))
        if cluster is not None:
            words = (*words, "--address", cluster.address)
            clusters.append(cluster)
        process = runs.start(
            *words, cwd=tmp_path, log=tmp_path / "log", env={"RAY_ADDRESS": ""} if cluster is None else cluster.env
        )
        started.append(process)
        return process

    yield run
    for process in started:
        for left in runs.session(process.pid):
            left.kill()
        process.wait()
    for cluster in clusters:
        cluster.end_runs()


def ended(process: subprocess.Popen[str], tmp_path: Path) -> str:
    """What a run that ended well has printed; it left no storage."""
    code = process.wait(timeout=90)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    assert "Traceback" not in log
    assert not list((tmp_path / "storage").iterdir())
    return log


def log_lines(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def wait_until_gone(left: Callable[[], list[object]]) -> None:
    deadline = time.monotonic() + 10.0
    while found := left():
        assert time.monotonic() < deadline, f"still there: {found}"
        time.sleep(0.1)


def test_a_run_survives_the_death_of_an_actor_and_of_the_learner(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *TWO_OF_EACH, *GENTLE, "--name", "a", "--stop.steps", "5000",
        "--checkpoints.every_s", "1", "--report_every_s", "0.5", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: "learner" in runs.pids(run) and runs.pids(run).keys() >= {"actor 0", "actor 1"}, process)
    first = runs.pids(run)
    os.kill(first["actor 1"], signal.SIGKILL)
    checkpoint = runs.wait_for(lambda: [c for c in Checkpoints(run / "checkpoints").all() if c.updates], process)[-1]
    os.kill(first["learner"], signal.SIGKILL)
    ended(process, tmp_path)

    summary = runs.summary(run)
    assert summary["stop_reason"].endswith("of 5000 environment steps done")
    assert summary["restarts"] == 2
    told = sorted(event["text"] for event in runs.events(run, "restart"))
    assert told[0] == "actor 1 died; a new one takes its place"
    lost = re.fullmatch(r"learner died; a new one goes on from update (\d+), (\d+) updates are lost", told[1])
    assert lost is not None
    assert int(lost[1]) >= checkpoint.updates > 0
    assert int(lost[2]) == summary["updates_lost"]

    rows = read_metrics(run).to_pylist()
    for name in ("env_steps", "episodes", "policy_version", "time_s"):
        values = [row[name] for row in rows]
        assert values == sorted(values), name
    last = runs.newest_checkpoint(run)
    items, _ = runs.recount(last)
    assert items == summary["steps"] == runs.head_counts(last)["env_steps"]
    assert summary["updates"] == load_tensors(last / "learner.safetensors")[1]["updates"]
    wait_until_gone(lambda: list(ray_cluster.workers()))


def test_two_learners_with_prior_data_survive_the_death_of_one(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    """All learners go on from the checkpoint, after as many updates, though only one of them has died."""
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *GENTLE, "--name", "a", "--stop.steps", "3000", "--learners.count", "2",
        "--learners.cpus", "0.5", "--learners.updates_per_call", "2", "--learners.updates_per_step", "0.25",
        "--prior.source", str(runs.minari(tmp_path / "prior", [300])), "--prior.share", "0.25", "--checkpoints.every_s", "1",
        "--algorithm.head.kind", "hl_gauss", "--algorithm.head.low", "-100", "--algorithm.head.high", "100", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: [c for c in Checkpoints(run / "checkpoints").all() if c.updates], process)
    assert runs.pids(run).keys() >= {"learner", "learner 1"}
    os.kill(runs.pids(run)["learner 1"], signal.SIGKILL)
    ended(process, tmp_path)

    summary = runs.summary(run)
    assert summary["stop_reason"].endswith("of 3000 environment steps done")
    assert summary["restarts"] == 1
    # Rewards of the prior data lie outside of the support, of which each of the two learners 0 warns once.
    told = [event["text"] for event in runs.events(run, "warning") if event["text"].startswith("learner: ")]
    assert 0 < len(told) <= 2
    for text in told:
        assert re.fullmatch(r"learner: \d+\.\d % of the targets lay outside the value support, -100 to 100, .*", text)
    assert told[0] in (tmp_path / "log").read_text()
    (event,) = runs.events(run, "restart")
    pattern = r"learner 1 died; 2 new learners go on from update (\d+), (\d+) updates are lost"
    lost = re.fullmatch(pattern, event["text"])
    assert lost is not None, event["text"]
    assert int(lost[1]) > 0
    assert int(lost[2]) == summary["updates_lost"]
    last = runs.newest_checkpoint(run)
    assert summary["updates"] == load_tensors(last / "learner.safetensors")[1]["updates"]
    made = summary["updates"] + summary["updates_lost"]
    # What a dead learner had drawn is given back late or never; 24 of the 32 windows are the run's own.
    assert runs.head_counts(last)["sampled"] >= 24 * summary["updates"]
    assert made <= 0.25 * (summary["steps"] - 200) + 100
    wait_until_gone(lambda: list(ray_cluster.workers()))


def test_priorities_and_returns_find_their_way_between_the_processes(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    settings = {"--env.id": "CartPole-v1", "--algorithm.name": "dqn", "--algorithm.head.kind": "hl_gauss"}
    settings |= {
        "--replay.selector": "prioritised",
        "--learners.batch_size": "32",
        "--learners.updates_per_step": "0.25",
    }
    settings |= {
        "--replay.min_size": "200",
        "--actors.random_steps": "200",
        "--replay.capacity": "16384",
        "--eval.every": "0",
    }
    settings |= {"--stop.steps": "2000", "--name": "a", "--replay.shards": "2"}
    process = start(
        *(word for pair in settings.items() for word in pair), "--algorithm.hidden", "16", *GENTLE, cluster=ray_cluster
    )
    ended(process, tmp_path)
    last = runs.newest_checkpoint(run)
    low, high = runs.head_state(last)["return_extent"]
    assert low == 1.0  # a pole that falls at once
    assert 10.0 < high < 100.0
    for snapshot in SnapshotStore(str(last / "replay")).all():
        tables = [copied.tables["steps"] for copied in snapshot.copies(range(snapshot.segments.num_rows))]
        found = [table.priority[table.member] for table in tables if table.priority is not None]
        assert len(np.unique(np.concatenate(found))) > 100


def test_a_private_ray_ends_by_ctrl_c_and_the_run_is_resumed_in_a_cluster_and_ends_by_sigterm(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start("pendulum_sac", *runs.SMALL, *TWO_OF_EACH, *GENTLE, "--name", "a", "--stop.steps", "1e9")
    runs.wait_for(lambda: [row for row in log_lines(tmp_path) if "first environment step" in row], process)
    runs.wait_for(lambda: "learner" in runs.pids(run), process)
    assert any(re.fullmatch(r"Ray dashboard: http://[\d.]+:\d+", line) for line in log_lines(tmp_path))
    # It joined no cluster of the host.
    assert ray_cluster.workers() == []
    assert {os.getsid(pid) for pid in runs.pids(run).values()} == {process.pid}
    # As a terminal does: to every process of the foreground group.
    os.killpg(process.pid, signal.SIGINT)
    assert "stopped by a signal" in ended(process, tmp_path)
    wait_until_gone(lambda: [p.pid for p in runs.session(process.pid)])
    first, before = runs.summary(run), runs.newest_checkpoint(run)
    assert runs.recount(before)[0] == first["steps"] == runs.head_counts(before)["env_steps"] > 0
    assert (run / "report.html").is_file()
    rows_before = read_metrics(run).num_rows

    process = start("--resume", str(run), cluster=ray_cluster)
    runs.wait_for(lambda: len(runs.events(run, "start")) == 2, process)
    time.sleep(1.0)  # in the middle
    process.send_signal(signal.SIGTERM)
    assert "stopped by a signal" in ended(process, tmp_path)
    second, after = runs.summary(run), runs.newest_checkpoint(run)
    assert second["steps"] > first["steps"]
    assert runs.recount(after)[0] == second["steps"] == runs.head_counts(after)["env_steps"]
    assert second["updates"] == load_tensors(after / "learner.safetensors")[1]["updates"] >= first["updates"]
    rows = read_metrics(run).to_pylist()
    for name in ("env_steps", "updates", "episodes", "policy_version", "time_s"):
        values = [row[name] for row in rows]
        assert values == sorted(values), name
    assert rows[rows_before]["replay_size"] >= first["steps"]
    wait_until_gone(lambda: list(ray_cluster.workers()))


def inserted(run: Path) -> list[int]:
    """Steps that each shard of a running run has taken in."""
    security = RunFolder.open(run).security()
    found = []
    for address in json.loads((run / "replay.json").read_text())["addresses"]:
        with flight_client(address, security) as client:
            found.append(int(action(client, "stats", {})["tables"]["steps"]["inserted"]))
    return found


def test_shards_that_are_killed_come_back_with_every_step(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *TWO_OF_EACH, *GENTLE, "--name", "a",
        "--checkpoints.every_s", "1000", "--stop.steps", "1e9", "--learners.updates_per_step", "0.25",
        "--replay.capacity", "131072", cluster=ray_cluster,  # on a busy machine one shard takes in most, and must not overwrite
    )  # fmt: skip
    runs.wait_for(lambda: runs.events(run, "start") and "learner" in runs.pids(run), process)
    runs.wait_for(lambda: min(inserted(run)) > 100, process)
    for number in (1, 0, 0):  # shard 0 holds the limiter as well
        name = f"shard {number}"
        dead = runs.pids(run)[name]
        os.kill(dead, signal.SIGKILL)
        runs.wait_for(lambda name=name, dead=dead: runs.pids(run)[name] != dead, process)  # type: ignore[misc]
    goal = 400 + sum(inserted(run))
    runs.wait_for(lambda: sum(inserted(run)) > goal, process)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path)
    told = [event["text"] for event in runs.events(run, "restart")]
    assert len(told) == 3
    for number, text in zip((1, 0, 0), told, strict=True):
        assert re.fullmatch(rf"shard {number} died; a new one serves all its [1-9]\d+ steps", text), text
    summary, last = runs.summary(run), runs.newest_checkpoint(run)
    assert summary["steps"] >= goal
    # Not one step is missing, and none is there twice: what the head has counted, what the files hold, and what the
    # actors have finished in whole episodes agree.
    assert runs.recount(last) == (summary["steps"], summary["episodes"])
    assert summary["steps"] == runs.head_counts(last)["env_steps"]
    # The ratio holds to within the error buffer and what each death leaves unsettled: the batches drawn ahead, and a lease.
    config = RunFolder.open(run).config
    ahead = summary["updates"] / config.learners.updates_per_step - (summary["steps"] - config.replay.min_size)
    batches = 2 * (config.replay.prefetch + 1) / config.learners.updates_per_step
    assert abs(ahead) <= config.error_buffer + 3 * (batches + config.actors.rows_per_write)
    wait_until_gone(lambda: list(ray_cluster.workers()))


@pytest.mark.slow
def test_a_run_with_tasks_survives_deaths_and_its_record_goes_on_when_it_is_resumed(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    settings = {
        "--env.id": "CartPole-v1",
        "--tasks.product": "max_episode_steps=20,30,40,500",
        "--tasks.threshold": "10",
    }
    settings |= {"--curriculum.draw": "level_replay", "--curriculum.filter": "band", "--curriculum.group_size": "4"}
    settings |= {"--algorithm.name": "dqn", "--algorithm.hidden": "16", "--learners.batch_size": "32", "--name": "a"}
    settings |= {"--learners.updates_per_step": "0.25", "--replay.min_size": "200", "--actors.random_steps": "200"}
    settings |= {"--stop.steps": "1e9", "--eval.every": "0", "--checkpoints.every_s": "1"}
    process = start(*(word for pair in settings.items() for word in pair), *TWO_OF_EACH, *GENTLE, cluster=ray_cluster)
    runs.wait_for(lambda: [c for c in Checkpoints(run / "checkpoints").all() if c.updates], process)
    for name in ("actor 1", "learner"):
        dead = runs.pids(run)[name]
        os.kill(dead, signal.SIGKILL)
        runs.wait_for(lambda name=name, dead=dead: runs.pids(run)[name] != dead, process)  # type: ignore[misc]
    written = len(runs.events(run, "checkpoint"))
    runs.wait_for(lambda: len(runs.events(run, "checkpoint")) > written + 2, process)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path)
    assert runs.summary(run)["restarts"] == 2
    first = record_of_tasks(runs.newest_checkpoint(run))
    assert len(first["reported"]) == 3  # by two actors, and by the one that took the place of a dead one

    process = start("--resume", str(run), cluster=ray_cluster)
    runs.wait_for(lambda: len(runs.events(run, "start")) == 2, process)
    written = len(runs.events(run, "checkpoint"))
    runs.wait_for(lambda: len(runs.events(run, "checkpoint")) > written + 1, process)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path)
    second = record_of_tasks(runs.newest_checkpoint(run))
    assert second["next_group"] > first["next_group"]
    assert first["reported"].items() < second["reported"].items()
    wait_until_gone(lambda: list(ray_cluster.workers()))


def record_of_tasks(checkpoint: Path) -> dict[str, Any]:
    """What the desk has of groups of 4 episodes, each counted alike in all places; the learner has told losses."""
    desk: dict[str, Any] = read_json(checkpoint / "desk.json")
    tracker = load_tensors(checkpoint / "tracker.safetensors")[0]
    reported = sum(desk["reported"].values())
    assert tracker["tracker.attempts"].sum() == 4 * reported
    groups, episodes, steps = np.sum(list(desk["waste"].values()), axis=0)
    assert (groups, episodes) == (reported, 4 * reported)
    assert 0 < desk["waste"]["kept"][2] < steps
    assert np.isfinite(tracker["tracker.losses"]).any()
    assert runs.recount(checkpoint)[0] == runs.head_counts(checkpoint)["env_steps"]
    return desk


@pytest.mark.slow
def test_a_shard_whose_storage_is_lost_comes_back_from_the_last_checkpoint(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *TWO_OF_EACH, *GENTLE, "--name", "a",
        "--checkpoints.every_s", "1", "--stop.steps", "8000", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: [c for c in Checkpoints(run / "checkpoints").all() if c.env_steps > 500], process)
    for number in (0, 1):
        name = f"shard {number}"
        dead = runs.pids(run)[name]
        (file,) = (tmp_path / "storage").glob(f"*.shard{number}.*")
        if number:
            file.unlink()
            why = "its storage is gone"
        else:
            with file.open("r+b") as damaged:
                damaged.write(bytes(4096))
            why = r"its storage is damaged \(the file is no replay storage\)"
        os.kill(dead, signal.SIGKILL)
        runs.wait_for(lambda name=name, dead=dead: runs.pids(run)[name] != dead, process)  # type: ignore[misc]
        text = runs.wait_for(lambda number=number: runs.events(run, "restart")[number:], process)[0]["text"]  # type: ignore[misc]
        words = rf"shard {number} died; {why}; a new one serves (\d+) of its (\d+) steps, from the last checkpoint"
        kept = re.fullmatch(words, text)
        assert kept is not None, text
        assert 0 < int(kept[1]) <= int(kept[2])
    ended(process, tmp_path)
    assert runs.summary(run)["steps"] >= 8000
    wait_until_gone(lambda: list(ray_cluster.workers()))


def test_a_run_over_tls_lets_nobody_in_without_its_token_which_is_in_its_file_alone(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    certificate, key = make_certificate(tmp_path, "shards")
    process = start(
        "pendulum_sac", *runs.SMALL, *GENTLE, "--name", "a", "--stop.steps", "1e9",
        "--replay.tls_certificate", certificate, "--replay.tls_key", key, cluster=ray_cluster,
    )  # fmt: skip
    addresses = runs.wait_for(lambda: (run / "replay.json").is_file() and (run / "replay.json").read_text(), process)
    (address,) = json.loads(addresses)["addresses"]
    assert address.startswith("grpc+tls://127.0.0.1:")
    runs.wait_for(lambda: runs.events(run, "start"), process)
    file = run / "token"
    assert file.stat().st_mode & 0o777 == 0o600
    token = file.read_text().strip()
    trusting = Path(certificate).read_bytes()
    for client in (
        flight.FlightClient(address, tls_root_certs=trusting),
        flight_client(address, Security("wrong", authority=certificate)),
    ):
        with client, pytest.raises(flight.FlightUnauthenticatedError, match="expected the token of this run"):
            action(client, "stats", {})
    assert inserted(run)[0] > 0
    told = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "replay", "stats", str(run), "--json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(runs.ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(told.stdout)["shards"][0]["tables"]["steps"]["inserted"] > 0

    processes = [*runs.session(ray_cluster.leader), *runs.session(process.pid)]
    arguments = " ".join(word for found in processes for word in found.cmdline())
    assert "ray::ShardWorker" in arguments
    assert token not in arguments
    process.send_signal(signal.SIGTERM)
    assert token not in ended(process, tmp_path)
    assert not (run / "replay.json").exists()
    logs = [*run.rglob("*"), *ray_cluster.folder.rglob("*.log"), *ray_cluster.folder.rglob("*.out")]
    logs += ray_cluster.folder.rglob("*.err")
    found = [path for path in logs if path.is_file() and token.encode() in path.read_bytes()]
    assert found == [file]


def test_no_cluster_and_too_small_a_cluster_are_clear_errors(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    began = time.monotonic()
    process = start("pendulum_sac", *runs.SMALL, "--name", "a", "--address", "127.0.0.1:9")
    assert process.wait(timeout=60) == 1
    assert time.monotonic() - began < 30.0
    log = (tmp_path / "log").read_text()
    assert "millrace: no Ray cluster answers at 127.0.0.1:9" in log
    assert "leave out --address to start a private one" in log
    assert "Traceback" not in log

    # The same name again: the try before left nothing.
    process = start(
        "pendulum_sac",
        *runs.SMALL,
        "--name",
        "a",
        "--actors.count",
        "100",
        "--replay.capacity",
        "1e6",
        cluster=ray_cluster,
    )
    assert process.wait(timeout=60) == 1
    log = (tmp_path / "log").read_text()
    assert "the run asks for 51.1 CPUs" in log
    assert "8 CPUs: 43.1 CPUs missing" in log
    assert "actors.count, actors.cpus" in log
    assert "Traceback" not in log
    assert not (tmp_path / "runs" / "a").exists()
    assert ray_cluster.workers() == []


def test_a_learner_whose_node_has_no_such_device_says_so(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    process = start(
        "pendulum_sac", *runs.SMALL, *GENTLE, "--name", "a", "--learners.device", "cuda", cluster=ray_cluster
    )
    assert process.wait(timeout=90) == 1
    log = (tmp_path / "log").read_text()
    assert (
        "millrace: learner could not start: ValueError: learners.device: expected a device that torch finds on " in log
    )
    assert "Traceback" not in log
    assert not runs.events(tmp_path / "runs" / "a", "restart")
