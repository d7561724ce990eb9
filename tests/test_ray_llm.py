"""Runs that train a language model under a real Ray: whole, with processes killed in the middle, stopped and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from cluster.checkpoint import Checkpoints, load_tensors
from cluster.metrics import read_metrics
from cluster.runs import RunFolder
from replay.security import flight_client
from replay.wire import LOST, action
from tests import runs_for_tests as runs
from tests.runs_for_tests import RayCluster

Started = Callable[..., subprocess.Popen[str]]
BATCH = 4  # groups in a learner step
SETTINGS = {
    "--name": "a",
    "--model.layers": "1",
    "--model.width": "16",
    "--model.heads": "2",
    "--model.inner": "16",
    "--tasks.count": "100",
    "--warm_start.steps": "3",
    "--warm_start.batch_size": "16",
    "--curriculum.filter": "none",
    "--sampling.group_size": "2",
    "--sampling.max_tokens": "8",
    "--actors.slots": "16",
    "--actors.prompts_ahead": "2",
    "--actors.cpus": "0.25",
    "--learners.cpus": "0.25",
    "--learners.batch_groups": str(BATCH),
    "--replay.capacity_mb": "8",
    "--eval.prompts": "8",
    "--eval.samples": "2",
    "--eval.every": "0",
    "--report_every_s": "0.25",
}
# Small numbers alone: the groups are drawn from few prompts, and prompts are short.
WORDS = ["--tasks.kwargs", "low=2", "high=2", "largest=20", "largest_target=40", "--eval.attempts", "1", "2"]
WORDS += ["--eval.families", "2 numbers", "--warm_start.families", "2 numbers"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Started]:
    """Start `millrace train countdown` in `tmp_path`; what is left of it at the end of the test is killed."""
    started = []
    (tmp_path / "storage").mkdir()

    def run(*words: str, cluster: RayCluster | None = None, resume: Path | None = None) -> subprocess.Popen[str]:
        if resume is None:
            chosen = SETTINGS | dict(zip(words[::2], words[1::2], strict=True))
            words = ("countdown", *WORDS, *(word for pair in chosen.items() for word in pair))
        else:
            words = ("--resume", str(resume), *words)
        words = ("train", *words, "--replay.directory", str(tmp_path / "storage"))
        if cluster is not None:
            words = (*words, "--address", cluster.address)
        process = runs.start(
            *words, cwd=tmp_path, log=tmp_path / "log", env={"RAY_ADDRESS": ""} if cluster is None else cluster.env
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:  # so that a run in the cluster, whose driver this is, ends as well
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        for left in runs.session(process.pid):
            left.kill()
        process.wait()
    if (tmp_path / "log").exists():  # pytest shows it where the test has failed
        print((tmp_path / "log").read_text())


def ended(process: subprocess.Popen[str], tmp_path: Path) -> str:
    """What a run that ended well has printed; it left no storage."""
    code = process.wait(timeout=120)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    assert "Traceback" not in log
    assert not list((tmp_path / "storage").iterdir())
    return log


def wait_until_gone(cluster: RayCluster) -> None:
    deadline = time.monotonic() + 10.0
    while left := cluster.workers():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Ledger:
    """What one checkpoint says of every group there has been."""

    updates: int  # of the learner's state
    waiting: list[int]  # numbers of the groups in the queues' snapshots
    counters: dict[str, int]  # of all shards
    next_group: int  # of the desk
    kept: int  # groups that actors told the desk they had written
    counts: dict[str, Any]  # of the head
    version: int

    def check(self, *, lost: float = 0) -> None:
        """The parts agree; `lost` are learner steps whose weights went with a learner."""
        counters = self.counters
        assert counters["consumed_groups"] == BATCH * (self.updates + lost), (
            "a group is learnt from once, and then consumed"
        )
        gone = counters["consumed_groups"] + counters["dropped_stale_groups"]
        assert counters["inserted_groups"] == gone + len(self.waiting)
        assert len(set(self.waiting)) == len(self.waiting)
        assert max(self.waiting, default=-1) < self.next_group
        assert self.counts["updates"] == self.updates
        for name in ("inserted_groups", "consumed_groups", "dropped_stale_groups"):
            assert self.counts[name] == counters[name], name


def ledger(checkpoint: Path) -> Ledger:
    waiting: list[int] = []
    counters: dict[str, int] = {}
    for file in sorted((checkpoint / "replay").glob("completions-*.arrow")):
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        about = json.loads(reader.schema.metadata[b"millrace.queue_snapshot"])
        for name, value in about["counters"].items():
            counters[name] = counters.get(name, 0) + value
        numbers = reader.read_all()["group"].to_pylist()
        for rows in about["groups"]["rows"]:
            (number,) = set(numbers[:rows])
            waiting.append(number)
            del numbers[:rows]
    learner = load_tensors(checkpoint / "learner.safetensors")[1]
    desk = json.loads((checkpoint / "desk.json").read_text())
    counts = runs.head_counts(checkpoint)
    return Ledger(
        int(learner["updates"]),
        waiting,
        counters,
        desk["next_group"],
        desk["waste"]["kept"][0],
        counts,
        int(learner["version"]),
    )


def consumed(run: Path) -> int:
    """Groups that the learners of a running run have used."""
    security = RunFolder.open(run).security()
    found = 0
    for address in json.loads((run / "replay.json").read_text())["addresses"]:
        with suppress(*LOST), flight_client(address, security) as client:
            found += int(action(client, "stats", {})["queues"]["completions"]["consumed_groups"])
    return found


def wait_for_updates(run: Path, process: subprocess.Popen[str], more: int) -> None:
    """Until as many learner steps were made after those of now."""
    goal = consumed(run) + BATCH * more
    runs.wait_for(lambda: consumed(run) >= goal, process)


def kill(run: Path, name: str) -> int:
    """Kill a process of a run; its id."""
    number = runs.pids(run)[name]
    os.kill(number, signal.SIGKILL)
    return number


def judges(run: Path, name: str) -> list[int]:
    """The processes that judge for an actor."""
    found = []
    for process in psutil.Process(runs.pids(run)[name]).children(recursive=True):
        with suppress(psutil.Error):
            if "actors.llm.verifiers.worker" in process.cmdline():
                found.append(process.pid)
    return found


def rises(run: Path, *names: str) -> None:
    """In no row of the metrics is one of these less than before."""
    rows = read_metrics(run).to_pylist()
    for name in names:
        values = [row[name] for row in rows]
        assert values == sorted(values), name


def test_a_run_learns_is_stopped_and_goes_on_with_the_same_groups(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "--stop.updates", "1000000", "--eval.every", "1000000", "--checkpoints.every_s", "1", "--checkpoints.keep", "100",
        cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: runs.events(run, "evaluation"), process)
    before = len(runs.events(run, "checkpoint"))
    runs.wait_for(lambda: len(runs.events(run, "checkpoint")) > before + 3, process)
    process.send_signal(signal.SIGTERM)
    log = ended(process, tmp_path)
    for line in (
        "band 0–1 of 2 attempts: every group is kept",
        "learner: 3 steps of supervised training come first",
        "warm start: step 3 of 3, loss ",
        "evaluation at learner step 0: ",
        "stopped by a signal",
    ):
        assert line in log
    assert re.search(r"first completion \d+\.\d s after the command", log)
    assert "warning" not in {event["kind"] for event in runs.events(run)}
    for checkpoint in Checkpoints(run / "checkpoints").all():
        ledger(checkpoint.path).check()
    first = ledger(runs.newest_checkpoint(run))
    assert first.updates > 0
    # One may have come into the queue whose actor had been stopped before it could tell.
    assert 0 <= first.counters["inserted_groups"] - first.kept <= 1
    assert first.version == first.updates + 1
    before = read_metrics(run).num_rows

    process = start(
        "--stop.updates", str(first.updates + 3), "--eval.every", "2", "--checkpoints.every_s", "1",
        cluster=ray_cluster, resume=run,
    )  # fmt: skip
    log = ended(process, tmp_path)
    assert "supervised" not in log
    assert f"{first.updates + 3} of {first.updates + 3} learner steps done" in log
    for checkpoint in Checkpoints(run / "checkpoints").all():
        ledger(checkpoint.path).check()
    second = ledger(runs.newest_checkpoint(run))
    assert second.updates == first.updates + 3
    assert second.version > first.version
    assert second.next_group > first.next_group
    for name in ("samples", "tokens", "groups", "scored", "time_s"):
        assert second.counts[name] > first.counts[name], name
    # Those that waited are the oldest: learnt from first, or still there, and never sampled again.
    taken = second.counters["consumed_groups"] - first.counters["consumed_groups"]
    taken += second.counters["dropped_stale_groups"] - first.counters["dropped_stale_groups"]
    left = first.waiting[taken:]
    assert second.waiting[: len(left)] == left
    assert min(second.waiting[len(left) :], default=first.next_group) >= first.next_group

    rises(run, "samples", "updates", "policy_version", "consumed_groups", "inserted_groups", "time_s")
    rows = read_metrics(run).to_pylist()
    assert rows[before]["consumed_groups"] >= first.counters["consumed_groups"]
    evaluated = [row["eval/step"] for row in rows if row.get("eval/step") is not None]
    assert (evaluated[0], evaluated[-1]) == (0.0, float(second.updates))
    assert max((row["gap/mean"] for row in rows if row.get("gap/mean") is not None), default=0.0) < 1e-3
    assert (run / "report.html").is_file()
    wait_until_gone(ray_cluster)


def test_every_process_may_die_and_the_run_goes_on(ray_cluster: RayCluster, start: Started, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    process = start("--stop.updates", "1000000", cluster=ray_cluster)
    runs.wait_for(lambda: Checkpoints(run / "checkpoints").all(), process)  # at once, before it is due
    wait_for_updates(run, process, 5)
    (judge,) = judges(run, "actor 0")
    os.kill(judge, signal.SIGKILL)
    runs.wait_for(lambda: set(judges(run, "actor 0")) - {judge}, process)
    wait_for_updates(run, process, 5)
    for name in ("actor 0", "shard 0", "learner"):
        dead = kill(run, name)
        runs.wait_for(lambda name=name, dead=dead: runs.pids(run)[name] != dead, process)  # type: ignore[misc]
        wait_for_updates(run, process, 5)
    process.send_signal(signal.SIGTERM)
    log = ended(process, tmp_path)

    actor, shard, learner = [event["text"] for event in runs.events(run, "restart")]
    words = r"actor 0 died; a new one takes its place; (\d+) groups that it had begun are sampled no further"
    told = re.fullmatch(words, actor)
    assert told is not None, actor
    assert int(told[1]) > 0
    assert re.fullmatch(r"shard 0 died; a new one serves all its \d+ groups", shard), shard
    words = r"learner died; a new one goes on from update (\d+), (\d+) updates are lost"
    lost = re.fullmatch(words, learner)
    assert lost is not None, learner
    assert "warm start" not in log.partition("learner died")[2]

    last, summary = ledger(runs.newest_checkpoint(run)), runs.summary(run)
    assert summary["restarts"] == 3
    assert summary["unscored"] == 0
    assert summary["updates_lost"] == int(lost[2])
    # The head had heard of the dead learner's last steps or not, but there is no half of one.
    unheard = last.counters["consumed_groups"] // BATCH - last.updates - int(lost[2])
    assert unheard >= 0
    last.check(lost=int(lost[2]) + unheard)
    wait_until_gone(ray_cluster)


@pytest.mark.slow
def test_two_of_each_share_the_work_and_one_that_stands_still_holds_up_nobody(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "--actors.count", "2", "--replay.shards", "2", "--learners.count", "2", "--checkpoints.every_s", "1",
        "--learners.shard_parameters", "true", "--stop.updates", "1000000", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: Checkpoints(run / "checkpoints").all(), process)
    wait_for_updates(run, process, 10)
    slow = runs.pids(run)["actor 1"]
    os.kill(slow, signal.SIGSTOP)
    wait_for_updates(run, process, 30)
    os.kill(slow, signal.SIGCONT)
    dead = kill(run, "learner 1")
    runs.wait_for(lambda: runs.pids(run)["learner 1"] != dead, process)
    wait_for_updates(run, process, 10)
    newest = runs.newest_checkpoint(run)
    runs.wait_for(lambda: runs.newest_checkpoint(run) > newest, process)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path)
    (restart,) = runs.events(run, "restart")
    assert "learner 1 died; 2 new learners go on from update" in restart["text"]
    last = ledger(runs.newest_checkpoint(run))
    lost = last.counters["consumed_groups"] / BATCH - last.updates
    # A learner that has learnt from its half of a batch may have died before it could say so.
    last.check(lost=lost)
    wait_until_gone(ray_cluster)


@pytest.mark.slow
def test_a_run_of_which_everything_is_killed_goes_on_from_its_checkpoint(start: Started, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    process = start("--stop.updates", "1000000", "--checkpoints.every_s", "1", "--ray.dashboard", "false")
    runs.wait_for(lambda: len(runs.events(run, "checkpoint")) > 4, process, timeout_s=120.0)
    for _ in range(3):  # what is being started meanwhile as well
        for found in runs.session(process.pid):
            with suppress(psutil.Error):
                found.kill()
        time.sleep(0.2)
    process.wait()
    latest = Checkpoints(run / "checkpoints").latest()
    assert latest is not None
    first = ledger(latest.path)
    first.check()
    assert first.updates > 0

    process = start("--stop.updates", str(first.updates + 5), resume=run)
    log = ended(process, tmp_path)
    assert "supervised" not in log
    second = ledger(runs.newest_checkpoint(run))
    second.check()
    assert second.updates == first.updates + 5
    assert second.version > first.version


@pytest.mark.slow
def test_an_evaluation_whose_process_dies_is_made_again(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "--stop.updates", "40", "--eval.every", "20", "--tasks.count", "20", "--eval.prompts", "170",
        "--eval.samples", "100", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: "first completion" in (tmp_path / "log").read_text(), process)
    (evaluator,) = [
        found
        for found in runs.session(ray_cluster.leader)
        if found.cmdline()[:1] == ["ray::LlmEvaluatorWorker.evaluate"]
    ]
    evaluator.kill()
    log = ended(process, tmp_path)
    assert "the evaluation at step 0 failed: a process died; it is begun again" in log
    evaluated = [row["eval/step"] for row in read_metrics(run).to_pylist() if row.get("eval/step") is not None]
    assert (evaluated[0], evaluated[-1]) == (0.0, 40.0)
    wait_until_gone(ray_cluster)


@pytest.mark.slow
def test_a_stop_within_the_supervised_phase_ends_at_once(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start("--warm_start.steps", "1000000", cluster=ray_cluster)
    runs.wait_for(lambda: "warm start: step" in (tmp_path / "log").read_text(), process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    log = ended(process, tmp_path)
    assert time.monotonic() - began < 30.0
    assert "no checkpoint was written: stopped before the learner had started" in log
    assert not list((run / "checkpoints").glob("step_*"))
    wait_until_gone(ray_cluster)
