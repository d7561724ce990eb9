"""Where the processes of a run go in a Ray cluster: what is missing, what is waited for, and which node each is on."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.ray_placement import Need, Placement, await_resources, needs, on_this_node, remove_groups, shortage
from configs.llm import LlmConfig
from configs.schema import RunConfig
from tests import runs_for_tests as runs

NAMESPACE = "millrace-a"
STORE_BYTES = 80 << 20


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate({"replay": {"shards": 2}, **settings})


# ------------------------------------------------------------- what is missing


def fits(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether all processes find a place, by trying every arrangement."""
    processes = [need.resources for need in needs for _ in range(need.count)]

    @cache
    def place(number: int, free: tuple[tuple[float, ...], ...]) -> bool:
        if number == len(processes):
            return True
        for node in range(len(free)):
            left = tuple(have - processes[number].get(kind, 0.0) for kind, have in zip(KINDS, free[node], strict=True))
            if min(left) >= 0.0 and place(number + 1, (*free[:node], left, *free[node + 1 :])):
                return True
        return False

    return place(0, tuple(tuple(node.get(kind, 0.0) for kind in KINDS) for node in nodes))


KINDS = ("CPU", "GPU", "spot")
AMOUNTS = st.fixed_dictionaries({}, optional={kind: st.sampled_from([0.5, 1.0, 2.0]) for kind in KINDS})
NODES = st.lists(
    st.fixed_dictionaries({"CPU": st.sampled_from([1.0, 2.0, 3.5])}, optional={"GPU": st.just(1.0)}), max_size=3
)


@given(
    st.lists(st.tuples(st.sampled_from(["shard", "actor", "learner"]), st.integers(0, 3), AMOUNTS), max_size=3, unique_by=lambda n: n[0]),
    NODES,
)  # fmt: skip
def test_nothing_is_missing_only_where_there_is_room_for_all(
    asked: list[tuple[str, int, dict[str, float]]], nodes: list[dict[str, float]]
) -> None:
    wanted = [Need(*need) for need in asked]
    missing = shortage(wanted, nodes)
    if missing is None:
        assert fits([need for need in wanted if need.resources], nodes)
    sums = {kind: sum(need.count * need.resources.get(kind, 0.0) for need in wanted) for kind in KINDS}
    for kind, amount in sums.items():
        if amount > sum(node.get(kind, 0.0) for node in nodes):
            assert missing is not None
            assert kind in missing


@given(st.integers(0, 6), AMOUNTS, NODES)
def test_of_one_kind_of_processes_it_is_known_exactly(
    count: int, resources: dict[str, float], nodes: list[dict[str, float]]
) -> None:
    wanted = [Need("actor", count, resources)]
    assert (shortage(wanted, nodes) is None) == (not resources or fits(wanted, nodes))


def test_processes_that_need_a_gpu_are_not_kept_out_by_those_that_need_none() -> None:
    nodes = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}]
    assert shortage([Need("actor", 4, {"CPU": 0.5}), Need("learner", 1, {"CPU": 2.0, "GPU": 1.0})], nodes) is None


def test_processes_go_where_others_could_not() -> None:
    actor, learner = Need("actor", 1, {"CPU": 1.0}), Need("learner", 1, {"CPU": 2.0})
    assert shortage([actor, learner], [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]) is None  # the learner first
    both, spot, gpu = {"CPU": 1.0, "spot": 1.0, "GPU": 1.0}, {"CPU": 1.0, "spot": 1.0}, {"CPU": 1.0, "GPU": 1.0}
    for nodes in ([both, both, spot, gpu], [gpu, spot, both, both]):
        assert shortage([Need("actor", 2, spot), Need("learner", 2, gpu)], nodes) is None


def test_ten_thousand_actors_on_a_thousand_nodes_are_soon_counted() -> None:
    wanted = [Need("shard", 64, {"CPU": 0.1}), Need("actor", 10_000, {"CPU": 0.5}), Need("learner", 64, {"CPU": 1.0})]
    nodes = [{"CPU": 8.0, "memory": 1e9} for _ in range(1000)]
    began = time.process_time()
    assert shortage(wanted, nodes) is None
    assert time.process_time() - began < 2.0


def test_what_is_missing_is_told() -> None:
    wanted = needs(config(actors={"count": 100, "cpus": 0.5, "resources": {"spot": 1.0}}, learners={"gpus": 1.0}))
    assert shortage(wanted, [{"CPU": 8.0, "spot": 200.0}, {"CPU": 0.5}]) == (
        "the run asks for 51.2 CPUs, 1 GPU and 100 spot (2 shards of 0.1 CPUs each; 100 actors of 0.5 CPUs and 1 spot each; "
        "1 learner of 1 CPU and 1 GPU), and the 2 nodes have 8.5 CPUs, 0 GPUs and 200 spot: 42.7 CPUs and 1 GPU missing; lower "
        "replay.shards, replay.cpus, actors.count, actors.cpus, actors.resources, learners.count, learners.cpus, learners.gpus, "
        "or add nodes"
    )


def test_what_no_single_node_has_is_told() -> None:
    assert shortage([Need("learner", 3, {"CPU": 2.0})], [{"CPU": 3.0}, {"CPU": 3.0}]) == (
        "the run asks for 6 CPUs (3 learners of 2 CPUs each), and the 2 nodes have 6 CPUs: enough in sum, but no single node has "
        "as much left for 1 learner of 2 CPUs; lower learners.count, learners.cpus, or add nodes"
    )


def test_what_a_run_with_a_language_model_needs() -> None:
    found = needs(LlmConfig.model_validate({"actors": {"count": 2, "cpus": 1.0, "gpus": 0.5}, "replay": {"cpus": 0.2}}))
    assert {need.name: (need.count, need.resources) for need in found} == {
        "shard": (1, {"CPU": 0.2}),
        "actor": (2, {"CPU": 1.0, "GPU": 0.5}),
        "learner": (1, {"CPU": 1.0}),
    }


# --------------------------------------------------------- on a real cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of two CPUs each, and this process attached to them."""
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        made.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        ray.init(address=made.address, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def placed() -> Iterator[list[Any]]:
    """Ray actors that the test puts here are ended with it, and no group is left."""
    workers: list[Any] = []
    yield workers
    for worker in workers:
        ray.kill(worker)
    remove_groups(NAMESPACE)


def put(placed: list[Any], options: Mapping[str, Any]) -> Any:
    """A Ray actor with these options."""

    class Somewhere:
        def node(self) -> str:
            found: str = ray.get_runtime_context().get_node_id()
            return found

    placed.append(ray.remote(Somewhere).options(**options).remote())
    return placed[-1]


def nodes_of(*workers: Any) -> list[str]:
    found: list[str] = ray.get([worker.node.remote() for worker in workers], timeout=60)
    return found


def wait_until(true: Any, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_shards_are_spread_and_actors_are_near_them(cluster: Cluster, placed: list[Any]) -> None:
    placement = Placement(config(actors={"cpus": 1.0}), NAMESPACE)
    placement.add_shards(2)
    first, second = nodes_of(*(put(placed, placement.shard(index)) for index in (0, 1)))
    assert first != second
    wait_until(lambda: placement.node_of_shard(1))
    assert [placement.node_of_shard(index) for index in (0, 1)] == [first, second]
    # Each has 1.9 CPUs left: one actor near the second shard, and the other elsewhere rather than nowhere.
    near = nodes_of(*(put(placed, placement.actor(near=second)) for _ in range(2)))
    assert sorted(near) == sorted([first, second])
    assert nodes_of(put(placed, {"num_cpus": 0, **on_this_node()})) == [ray.get_runtime_context().get_node_id()]
    for worker in placed:
        ray.kill(worker)
    assert nodes_of(put(placed, placement.actor(near=f"{1:056x}")))[0] in (first, second)  # of a node that is gone


def test_a_new_head_finds_where_everything_is_and_leaves_nothing(cluster: Cluster, placed: list[Any]) -> None:
    settings = config(learners={"cpus": 0.25, "count": 2})
    old = Placement(settings, NAMESPACE)
    old.add_shards(2)
    for index in (2, 3):
        old.shard(index)
    learners = [put(placed, old.learner(rank, gpus=0.0)) for rank in range(2)]
    wait_until(lambda: all(old.node_of_shard(index) for index in range(4)))
    before = [old.node_of_shard(index) for index in range(4)]
    assert before[0] != before[1]
    assert before[2] != before[3]  # each where fewer were
    together = nodes_of(*learners)
    assert together[0] == together[1]
    new = Placement(settings, NAMESPACE)
    assert new.learner_gpus is None
    new.adopt()
    assert new.learner_gpus == 0.0
    assert [new.node_of_shard(index) for index in range(4)] == before
    ray.kill(learners[1])
    again = [new.shard(1), new.shard(3), new.learner(1, gpus=1.0)]  # which needs no more than the one before
    assert nodes_of(*(put(placed, options) for options in again)) == [before[1], before[3], together[0]]
    assert len(states()) == 4
    new.remove_shard(3)
    new.remove_shard(1)  # whose room stays
    assert states() == {f"{NAMESPACE}:{name}": "CREATED" for name in ("shards", "shard-2", "learners")}
    other = Placement(settings, NAMESPACE + "-b")
    other.close()
    assert len(states()) == 3
    new.close()
    assert states() == {}


def states() -> dict[str, str]:
    """State of each placement group that is there, by its name."""
    groups = placement_group_table().values()
    return {group["name"]: group["state"] for group in groups if group["state"] != "REMOVED"}


def test_a_group_without_room_is_told_of_and_holds_nobody_up(cluster: Cluster, placed: list[Any]) -> None:
    placement = Placement(config(replay={"shards": 2, "cpus": 1.5, "resources": {"spot": 1.0}}), NAMESPACE)
    began = time.monotonic()
    placement.add_shards(2)
    shard = put(placed, placement.shard(0))
    assert placement.node_of_shard(0) is None
    assert placement.pending() == ["shards: no node has room for 2 times 1.5 CPUs and 1 spot yet"]
    assert time.monotonic() - began < 5.0
    assert ray.wait([shard.node.remote()], timeout=0.5)[0] == []


@pytest.mark.slow
def test_a_shard_whose_node_is_lost_starts_on_another(cluster: Cluster, placed: list[Any]) -> None:
    lost = cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES)
    wait_until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 3)
    placement = Placement(config(), NAMESPACE)
    placement.add_shards(3)
    on = nodes_of(*(put(placed, placement.shard(index)) for index in range(3)))
    index = on.index(lost.node_id)
    cluster.remove_node(lost, allow_graceful=True)
    wait_until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 2)
    (found,) = nodes_of(put(placed, placement.shard(index)))
    assert found in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.slow
def test_resources_are_waited_for_as_long_as_told(cluster: Cluster) -> None:
    wanted = [Need("actor", 2, {"CPU": 1.0, "spot": 1.0})]
    told: list[str] = []
    missing = await_resources(wanted, 0.0, tell=told.append, stopping=threading.Event())
    assert missing is not None
    assert "2 spot missing" in missing
    assert told == []
    assert await_resources(wanted, 1.5, tell=told.append, stopping=threading.Event()) == missing
    assert told == [f"waiting up to 1.5 s for resources: {missing}"]
    stopping = threading.Event()
    stopping.set()
    assert await_resources(wanted, 600.0, tell=told.append, stopping=stopping) == missing

    told.clear()
    nodes: list[Any] = []

    def join(line: str) -> None:  # one node for each line that is told
        told.append(line)
        assert len([state for state in states().values() if state == "PENDING"]) == 1  # what an autoscaler sees
        nodes.append(cluster.add_node(num_cpus=1, resources={"spot": 1}, object_store_memory=STORE_BYTES))

    try:
        assert await_resources(wanted, 120.0, tell=join, stopping=threading.Event()) is None
        assert told[1].startswith("still waiting: ")
        assert "1 spot missing" in told[1]
    finally:
        for node in nodes:
            cluster.remove_node(node)
    wait_until(lambda: states() == {})


@contextmanager
def autoscaled(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray of one CPU whose autoscaler adds nodes of two, all on this machine: its address, and what reaches it."""
    with socket.socket() as free, socket.socket() as another:
        free.bind(("", 0))
        another.bind(("", 0))
        port, client_port = free.getsockname()[1], another.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    types = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 2, "spot": 2, "object_store_memory": STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 4,
        },
    }
    settings = {
        "cluster_name": "fake",
        "max_workers": 4,
        "provider": {"type": "fake_multinode", "launch_multiple": True, "gcs_address": address},
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 20,
        "idle_timeout_minutes": 1,
        "auth": {"ssh_user": "nobody"},
        **{name: {} for name in ("docker", "file_mounts", "head_node", "worker_nodes")},
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        "cluster_synced_files": [],
    }
    (folder / "cluster.json").write_text(json.dumps(settings))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    env = {**os.environ, **access, "PYTHONPATH": str(runs.ROOT)}
    log = folder / "log"
    with TemporaryDirectory(prefix="millrace-ray-", ignore_cleanup_errors=True) as temporary:  # whose path is short
        words = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        words += [f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0", "--num-cpus=1"]
        words += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temporary}", "--include-dashboard=false"]
        words += [f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={folder / 'cluster.json'}"]
        process = subprocess.Popen(
            words,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**env, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
        )
        try:
            runs.wait_for(lambda: "will now block" in log.read_text(), process)
            yield address, env
        finally:
            while left := runs.session(process.pid):
                for one in left:
                    with suppress(psutil.NoSuchProcess):
                        one.send_signal(signal.SIGKILL)
                process.poll()
                time.sleep(0.05)
            process.wait()


@pytest.mark.slow
def test_an_autoscaler_adds_the_nodes_that_a_run_waits_for(tmp_path: Path) -> None:
    """In a process of its own: this one is attached to another cluster."""
    code = """if True:
        import sys, threading, ray
        from cluster.ray_placement import Need, alive_nodes, await_resources
        ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
        wanted = [Need("actor", 3, {"CPU": 1.0, "spot": 1.0}), Need("learner", 1, {"CPU": 1.0})]
        assert await_resources(wanted, 90.0, tell=print, stopping=threading.Event()) is None
        print(len(alive_nodes()), "nodes")
    """
    with autoscaled(tmp_path) as (address, env):
        done = subprocess.run(
            [sys.executable, "-c", code, address], env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=150
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("waiting up to 90 s for resources: the run asks for 4 CPUs and 3 spot")
    assert done.stdout.endswith("3 nodes\n")
