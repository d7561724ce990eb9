"""What a run survives on a cluster of several machines, which are made on this one: `tests.nodes_for_tests`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.checkpoint import Checkpoints
from cluster.metrics import read_metrics
from tests import runs_for_tests as runs
from tests.journal_for_tests import Compared, compare
from tests.nodes_for_tests import Inside, Network, Node, requires_namespaces
from tests.ray_nodes_for_tests import QUICK, RayNodes

pytestmark = pytest.mark.timeout(600)
NAME = "a"
ROWS = 16  # of a message of an actor
ACTOR = ("--actors.envs", "2", "--actors.rows_per_write", str(ROWS), "--actors.threads", "1")
SMALL = [
    *("train", "pendulum_sac", *runs.SMALL, *ACTOR, "--name", NAME, "--learners.updates_per_step", "0.25"),
    *("--replay.capacity", "262144", "--stop.steps", "1e9", "--report_every_s", "0.5"),
]
APART = [  # actors on nodes of their own
    *("--actors.resources", "plays=1", "--replay.resources", "keeps=1", "--learners.resources", "keeps=1"),
]
TARGET = -300.0  # mean return of an evaluation; a policy that does nothing gets about -1200


@contextmanager
def cluster(folder: Path, **settings: Any) -> Iterator[RayNodes]:
    """A Ray cluster of one node, without CPUs, to which the tests add others; settings as of `RayNodes`."""
    requires_namespaces()
    (folder / "notes").mkdir(exist_ok=True)
    with RayNodes(folder, **settings) as nodes:
        try:
            yield nodes
        finally:
            if (log := folder / "run.log").exists():  # pytest shows it where the test has failed
                print(log.read_text()[-8000:])


def train(nodes: RayNodes, folder: Path, *words: str, node: Node | None = None, log: str = "run.log") -> Inside:
    """Start to train in `folder`, with environments that note what they observe."""
    noted = ("--env.id", "tests.journal_for_tests:make_pendulum", "--env.kwargs", f"folder={folder / 'notes'}")
    return nodes.start(*SMALL, *noted, *words, node=node, cwd=folder, log=folder / log)


def stop(process: Inside, run: Path) -> None:
    """Stop a run by SIGTERM; it ends well."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 0
    assert runs.summary(run)["stop_reason"] == "stopped by a signal"


def wait_for_steps(run: Path, process: Inside, count: int, timeout_s: float = 120.0) -> None:
    """Wait until checkpoints hold so many steps more than they do now."""
    goal = count + max((found.env_steps for found in Checkpoints(run / "checkpoints").all()), default=0)
    runs.wait_for(
        lambda: any(found.env_steps >= goal for found in Checkpoints(run / "checkpoints").all()), process, timeout_s
    )


def ended_actors(nodes: RayNodes, run: Path) -> set[tuple[str, int]]:
    """(host name, process) of the actors that were there when the run ended: those that nobody killed."""
    return {(node.name, pid) for name, (node, pid) in nodes.where(run).items() if name.startswith("actor")}


def check_no_step_is_lost(compared: Compared, stopped: set[tuple[str, int]], *, shards: int) -> None:
    """Every step that was acknowledged is in the replay, and none is there twice.

    Of an actor that stopped by itself every step but the last of each environment, which has no observation after it that was
    acted on; of one that was killed all but what it had not been told of: the messages on their way and those being filled.
    """
    assert compared.doubled == 0
    unacknowledged: dict[tuple[str, int], int] = {}
    for host, pid, number in compared.notes:
        missing = compared.missing_behind((host, pid, number))
        if (host, pid) in stopped:
            assert missing <= 1, f"{host} {pid} {number}: {missing} steps are lost"
        elif compared.there[host, pid, number].any():  # of an actor, not of an evaluator
            unacknowledged[host, pid] = unacknowledged.get((host, pid), 0) + missing
    for who, missing in unacknowledged.items():
        assert missing <= 4 * ROWS * shards, f"{who}: {missing} steps are lost"


def check_counts(run: Path, notes: Path, *, stopped: set[tuple[str, int]], shards: int) -> None:
    """No step is lost, none is doubled, and what was counted is what is there."""
    last, summary = runs.newest_checkpoint(run), runs.summary(run)
    compared = compare(notes, last)
    assert compared.items == runs.recount(last)[0] == runs.head_counts(last)["env_steps"] == summary["steps"]
    check_no_step_is_lost(compared, stopped, shards=shards)


def told(run: Path, kind: str, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    """Events of a kind whose texts match."""
    return [found for event in runs.events(run, kind) if (found := pattern.match(event["text"]))]


def test_nodes_are_machines_of_their_own_and_what_they_send_is_dropped_while_they_are_cut() -> None:
    requires_namespaces()
    with Network() as network:
        one, two, three = (network.add() for _ in range(3))
        assert {node.run("hostname").strip() for node in (one, two, three)} == {"node-0", "node-1", "node-2"}
        assert one.run("sh", "-c", "echo $$ > /tmp/pid; echo $$ > /dev/shm/pid; cat /tmp/pid").strip().isdecimal()
        with pytest.raises(RuntimeError, match="No such file"):
            two.run("cat", "/tmp/pid")
        assert (one.seen(Path("/tmp/pid"))).read_text() == (one.seen(Path("/dev/shm/pid"))).read_text()
        serve = "import socket; s = socket.create_server(('', 7000))\nwhile True: s.accept()[0].sendall(b'here')"
        (server,) = (two.start("python3", "-c", serve),)

        def reaches(node: Node, timeout_s: float = 0.5) -> bool:
            ask = f"import socket; print(socket.create_connection(('{two.name}', 7000), {timeout_s}).recv(4))"
            try:
                return "here" in node.run("python3", "-c", ask)
            except RuntimeError:
                return False

        runs.wait_for(lambda: reaches(one), server)
        with network.cut_for(0.0, (one, two)):
            assert not reaches(one)
            assert reaches(three)
        assert reaches(one)
        with socket.create_connection((two.address, 7000), 5.0) as connection:  # this process reaches them as well
            assert connection.recv(4) == b"here"
        (pid,) = (pid for pid, words in two.processes().items() if "create_server" in words)
        two.signal(pid, signal.SIGKILL)
        assert server.wait(5.0) == -signal.SIGKILL
        two.lose()
        assert not two.is_alive
        assert not reaches(one)


@pytest.mark.slow
def test_a_node_is_lost_and_its_actors_and_its_shard_come_back_on_others(tmp_path: Path) -> None:
    run = tmp_path / "runs" / NAME
    with cluster(tmp_path, health=QUICK) as nodes:
        workers = [nodes.add() for _ in range(2)]
        process = train(nodes, tmp_path, "--actors.count", "3", "--replay.shards", "2", "--checkpoints.every_s", "2")
        wait_for_steps(run, process, 600)
        before = nodes.where(run)
        lost = next(node for node in workers if node is not before["learner"][0])
        gone = [name for name, (node, _) in before.items() if node is lost]
        assert any(name.startswith("shard") for name in gone), f"shards are not spread over the nodes: {before}"
        # What the last checkpoint holds must be there at the end.
        kept = tmp_path / "kept"
        shutil.copytree(runs.newest_checkpoint(run), kept)
        lost.lose()

        back = re.compile(
            r"shard \d died; its storage is gone; a new one serves (\d+) of its (\d+) steps, from the last"
        )
        events = runs.wait_for(lambda: told(run, "restart", back), process, 180.0)
        runs.wait_for(lambda: all(nodes.where(run)[name][0] is not lost for name in gone), process, 180.0)
        wait_for_steps(run, process, 600)
        # In the middle of a checkpoint.
        runs.wait_for(lambda: list((run / "checkpoints").glob(".writing-*")), process)
        stop(process, run)

    last, summary = runs.newest_checkpoint(run), runs.summary(run)
    assert summary["restarts"] == len(gone)
    compared = compare(tmp_path / "notes", last)
    assert compared.doubled == 0
    assert compared.contains(compare(tmp_path / "notes", kept))
    served, held = (int(number) for number in events[0].groups())
    assert compared.items == runs.recount(last)[0] == summary["steps"] - (held - served)
    assert summary["steps"] == runs.head_counts(last)["env_steps"]
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("between", ["actors and shards", "head and actors", "head and shards"])
def test_a_network_that_is_cut_for_20_s_costs_time_and_nothing_else(tmp_path: Path, between: str) -> None:
    run = tmp_path / "runs" / NAME
    with cluster(tmp_path) as nodes:
        actors, shards = nodes.add(resources={"plays": 9}), nodes.add(resources={"keeps": 9})
        process = train(
            nodes, tmp_path, *APART, "--actors.count", "2", "--replay.shards", "2", "--checkpoints.every_s", "2"
        )  # fmt: skip
        wait_for_steps(run, process, 600)
        before = nodes.where(run)
        ends = {"actors": actors, "shards": shards, "head": nodes.head}
        one, other = between.split(" and ")
        with nodes.network.cut_for(20.0, (ends[one], ends[other])):
            pass
        wait_for_steps(run, process, 600, 240.0)
        assert nodes.where(run) == before  # not one process was replaced
        stop(process, run)
    check_counts(run, tmp_path / "notes", stopped={(node.name, pid) for node, pid in before.values()}, shards=2)
    assert runs.summary(run)["restarts"] == 0


@pytest.mark.slow
def test_rays_control_store_is_lost_and_the_run_is_resumed_on_another_cluster(tmp_path: Path) -> None:
    run = tmp_path / "runs" / NAME
    with cluster(tmp_path) as nodes:
        commanding = nodes.add(cpus=0)
        nodes.add()
        process = train(
            nodes, tmp_path, "--actors.count", "2", "--replay.shards", "2", "--checkpoints.every_s", "2", node=commanding
        )  # fmt: skip
        wait_for_steps(run, process, 600)
        nodes.head.lose()
        assert process.wait(timeout=300) == 1
        log = (tmp_path / "run.log").read_text()
        assert re.search(r"millrace: .*--resume", log), log
        assert "Traceback" not in log
    kept = tmp_path / "kept"
    shutil.copytree(runs.newest_checkpoint(run), kept)
    count = runs.head_counts(kept)["env_steps"]
    rows = read_metrics(run).num_rows

    (tmp_path / "again").mkdir()
    with cluster(tmp_path / "again", keep=[tmp_path]) as nodes:
        nodes.add()
        process = nodes.start("train", "--resume", str(run), cwd=tmp_path, log=tmp_path / "again" / "run.log")
        wait_for_steps(run, process, 600)
        stop(process, run)
    first = read_metrics(run).to_pylist()[rows]
    assert count <= first["env_steps"] < count + 600
    last, summary = runs.newest_checkpoint(run), runs.summary(run)
    compared = compare(tmp_path / "notes", last)
    assert compared.doubled == 0
    assert compared.contains(compare(tmp_path / "notes", kept))
    assert compared.items == runs.recount(last)[0] == runs.head_counts(last)["env_steps"] == summary["steps"]


@pytest.mark.slow
def test_a_disk_that_is_full_costs_checkpoints_and_nodes_need_no_folder_in_common(tmp_path: Path) -> None:
    root = Path("/tmp/runs")  # of the first node alone
    with cluster(tmp_path, private={root: "32m"}) as nodes:
        run = nodes.head.seen(root / NAME)
        nodes.add()
        nodes.add()
        process = train(
            nodes, tmp_path, "--root", str(root), "--actors.count", "2", "--replay.shards", "2",
            "--checkpoints.every_s", "2", "--checkpoints.keep", "1",
        )  # fmt: skip
        wait_for_steps(run, process, 600)
        before = nodes.where(run)
        nodes.head.run("sh", "-c", f"cat /dev/zero > {root}/filler || true")
        said = tmp_path / "run.log"
        runs.wait_for(lambda: "no checkpoint was written: [Errno 28]" in said.read_text(), process)
        (left,) = (run / "checkpoints").glob("step_*")
        written = runs.recount(left)[0]  # it is whole
        nodes.head.run("rm", f"{root}/filler")
        wait_for_steps(run, process, 600)
        stop(process, run)
        assert not list((run / "checkpoints").glob(".*"))
        assert runs.summary(run)["restarts"] == 0
        assert runs.summary(run)["steps"] > written > 0
        check_counts(run, tmp_path / "notes", stopped={(node.name, pid) for node, pid in before.values()}, shards=2)


@pytest.mark.slow
def test_a_preempted_node_takes_its_actors_with_it_and_the_next_one_gets_them(tmp_path: Path) -> None:
    run = tmp_path / "runs" / NAME
    with cluster(tmp_path, health=QUICK) as nodes:
        nodes.add(resources={"keeps": 9})
        few, many = nodes.add(resources={"plays": 1}), nodes.add(resources={"plays": 4})
        process = train(
            nodes, tmp_path, *APART, "--actors.count", "5", "--replay.shards", "2", "--checkpoints.every_s", "2"
        )  # fmt: skip
        runs.wait_for(lambda: {f"actor {i}" for i in range(5)} <= nodes.where(run).keys(), process, 120.0)
        wait_for_steps(run, process, 600)
        before = nodes.where(run)
        gone = [name for name, (node, _) in before.items() if node is many]
        assert len(gone) == 4
        many.lose()
        runs.wait_for(lambda: len(runs.events(run, "restart")) == 4, process, 120.0)
        wait_for_steps(run, process, 600)  # with the one that is left
        assert [name for name, (node, _) in nodes.where(run).items() if node is few] == [
            name for name, (node, _) in before.items() if node is few
        ]
        status = json.loads(nodes.millrace("status", str(run), "--json"))
        assert (status["actors"]["wanted"], status["actors"]["running"]) == (5, 1)

        next_one = nodes.add(resources={"plays": 4})
        runs.wait_for(lambda: all(nodes.where(run)[name][0] is next_one for name in gone), process, 120.0)
        status = json.loads(nodes.millrace("status", str(run), "--json"))
        assert (status["actors"]["wanted"], status["actors"]["running"]) == (5, 5)
        wait_for_steps(run, process, 600)
        stopped = ended_actors(nodes, run)
        stop(process, run)
    assert runs.summary(run)["restarts"] == 4
    check_counts(run, tmp_path / "notes", stopped=stopped, shards=2)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_training_reaches_its_target_while_processes_of_every_kind_are_killed(tmp_path: Path) -> None:
    """For MILLRACE_FAULTS_S seconds (120), at moments drawn from the seed MILLRACE_FAULTS_SEED (0)."""
    seconds = float(os.environ.get("MILLRACE_FAULTS_S", "120"))
    generator = np.random.default_rng(int(os.environ.get("MILLRACE_FAULTS_SEED", "0")))
    run = tmp_path / "runs" / NAME
    killed: Counter[str] = Counter()
    with cluster(tmp_path) as nodes:
        nodes.add(resources={"keeps": 9})
        playing = nodes.add(resources={"plays": 9})
        process = train(
            nodes, tmp_path, *APART, "--actors.count", "2", "--actors.envs", "4", "--replay.shards", "2",
            "--checkpoints.every_s", "10", "--replay.capacity", str(2**20), "--algorithm.hidden", "64", "64",
            "--learners.batch_size", "128", "--learners.updates_per_step", "0.5", "--actors.random_steps", "1000",
            "--eval.every", "1000", "--eval.episodes", "10",
        )  # fmt: skip
        wait_for_steps(run, process, 600)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(generator.uniform(2.0, 12.0))
            kind = str(generator.choice(["actor", "shard", "learner", "head", "evaluator", "relay", "raylet"]))
            found = living(nodes, run, kind, playing)
            if not found:
                continue
            node, pid = found[int(generator.integers(len(found)))]
            node.signal(pid, signal.SIGKILL)
            killed[kind] += 1
            if kind == "raylet":
                nodes.wait_until_ray_ended(node)
                nodes.join(node, resources={"plays": 9})
                nodes.wait_for_ray(node)
            assert process.poll() is None
        runs.wait_for(lambda: best_return(run) >= TARGET, process, 600.0)
        runs.wait_for(lambda: len(living(nodes, run, "actor", playing)) == 2, process, 180.0)
        wait_for_steps(run, process, 600)
        stopped = ended_actors(nodes, run)
        stop(process, run)
    print(f"killed: {dict(killed)}; best return {best_return(run):.0f}; {runs.summary(run)}")
    assert len(killed) >= 5 or seconds < 120, f"too few kinds of processes were killed: {killed}"
    assert runs.summary(run)["restarts"] >= sum(killed[kind] for kind in ("actor", "shard", "learner", "head")) > 0
    check_counts(run, tmp_path / "notes", stopped=stopped, shards=2)


def living(nodes: RayNodes, run: Path, kind: str, playing: Node) -> list[tuple[Node, int]]:
    """The living processes of a kind; of Ray's own daemons that of the actors' node, where no shard is."""
    if kind == "raylet":
        return [found for found in nodes.find(r"\S*/raylet ") if found[0] is playing]
    if kind in ("evaluator", "relay"):
        return nodes.find(rf"(?i)ray::\S*{kind}")
    there = {node: node.processes() for node in nodes.network.nodes}
    known = nodes.where(run).items()
    return [(node, pid) for name, (node, pid) in known if name.split(" ")[0] == kind and pid in there[node]]


def best_return(run: Path) -> float:
    """Mean return of the best evaluation so far."""
    table = read_metrics(run)
    found = table["eval/mean_return"].drop_null().to_pylist() if "eval/mean_return" in table.column_names else []
    return max(found, default=-math.inf)
