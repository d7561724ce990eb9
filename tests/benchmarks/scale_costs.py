"""What one message, byte, row or status costs the processes of a run in processor seconds, measured on this machine."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray

from cluster.head import Head, Tick
from cluster.ray_relay import RelayWorker
from configs.load import load_config
from configs.schema import RunConfig
from replay.layout import TableSpec
from replay.process import ShardProcess
from replay.rate_limit import RateLimit
from replay.security import Security, flight_client, new_token
from replay.shard import ShardSpec
from replay.wire import action
from replay.writers import FlightWriter, LaneWriter
from tests.benchmarks import replay_roles as roles
from tests.benchmarks.cluster_runs import cpu_s
from tests.benchmarks.replay_limits import child
from tests.relays_for_tests import SmallHead

CALLS = 320  # of which the cost of one is taken
CALLERS = 8
POLL_S = 0.05  # `actors.poll_policy_s`
PACE_S = 0.05  # between two calls for many: processes that never sleep pay less for each
TOGETHER = 64  # actors of a node
REPEATS = 3
SHARD_ROWS = 200_000
MESSAGES = 1000
STATUS = {
    **dict.fromkeys(("env_steps", "episodes", "broken_episodes"), 100_000.0),
    **dict.fromkeys(("infer_s", "env_s", "write_s", "wall_s"), 123.456),
    "version": 1234,
    "returns": [-123.4],
    "lengths": [200],
    "next_episode": 500,
    "return_extent": (-1000.0, 0.0),
    "waiting_for": None,
    "first_step_at": 1.8e9,
}  # as `cluster.parts.actor_status`


@dataclass(frozen=True)
class Costs:
    """Processor seconds; an actor of Ray has a process of its own."""

    idle: float  # of a process of Ray's, for each second
    serve: float  # a call that comes in, answered by a thread
    call: float  # a call made of one actor among many at once, with its answer, a status
    relay_serve: float  # a call that comes into a relay
    relay_status: float  # of a relay: a call to an actor for its status, with the answer
    look: float  # of the head: a call to a relay for the statuses of a node
    relayed_status: float  # of the head: each status in its answer
    books: float  # of the head: each actor's status counted in a row of metrics and kept for a new head
    exchange: float  # of the head: an actor's exchange with the desk, in a relay's call for several
    put_byte: float  # a byte put into the object store
    insert_row: float  # of a shard, in messages of many
    insert_message: float  # of a shard, beside its rows
    sample_row: float  # of a shard
    lease: float  # of shard 0: a call of another shard's limiter


@ray.remote(num_cpus=0, max_concurrency=TOGETHER)
class _Small:
    def status(self, _after: int) -> dict[str, Any]:
        return STATUS

    def policy(self, _have: int) -> None:
        return None

    def pid(self) -> int:
        return os.getpid()


def measure(progress: Callable[[str], None]) -> Costs:
    """Measure them all. progress: takes a line about what comes next."""
    with started_ray(256):
        progress("costs of calls under Ray")
        found = _calls()
        progress("costs of relays and of the desk")
        found |= _relays()
        data = np.zeros(64 * 2**20, np.uint8)
        found["put_byte"] = _median(lambda: _own(lambda: ray.put(data))) / data.nbytes
    progress("costs of the head's books")
    found["books"] = _books()
    progress("costs of a shard")
    found |= _shard()
    return Costs(**found)


@contextmanager
def started_ray(object_store_mb: int) -> Iterator[None]:
    """A private Ray, with this process as its driver."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="millrace-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=object_store_mb * 2**20,
            namespace="bench",
            log_to_driver=False,
            logging_level="error",
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def _median(measured: Callable[[], float]) -> float:
    return median(measured() for _ in range(REPEATS))


def _own(work: Callable[[], object]) -> float:
    """Processor seconds of this process for some work."""
    before = time.process_time()
    work()
    return time.process_time() - before


def _of(pid: int, work: Callable[[], object], *, idle: float = 0.0) -> float:
    """Processor seconds of another process meanwhile, beyond what it uses anyway."""
    before, began = cpu_s(pid), time.monotonic()
    work()
    return max(0.0, cpu_s(pid) - before - idle * (time.monotonic() - began))


def _pid_of(title: str) -> int:
    (found,) = (p.pid for p in psutil.Process().children(recursive=True) if "".join(p.cmdline()[:1]).startswith(title))
    return found


def _paced(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()
        time.sleep(PACE_S)


def _polled(actor: Any) -> None:
    """So many calls by several callers that sleep between them, as actors do."""

    def poll(_: int) -> None:
        for _ in range(CALLS // CALLERS):
            ray.get(actor.policy.remote(0))
            time.sleep(POLL_S)

    with ThreadPoolExecutor(CALLERS) as callers:
        list(callers.map(poll, range(CALLERS)))


def _calls() -> dict[str, float]:
    actor = _Small.remote()  # type: ignore[attr-defined]
    pid = ray.get(actor.pid.remote())
    time.sleep(2.0)
    idle = _of(pid, lambda: time.sleep(5.0)) / 5.0
    serve = _median(lambda: _of(pid, lambda: _polled(actor), idle=idle)) / CALLS

    def ask() -> None:
        asked = [actor.status.remote(0) for _ in range(TOGETHER)]
        ray.wait(asked, num_returns=len(asked))
        ray.get(asked)

    turns = 10
    call = _median(lambda: _own(lambda: _paced(ask, turns))) / (turns * TOGETHER)
    return {"idle": idle, "serve": serve, "call": call}


def _relays() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        head = SmallHead.options(num_cpus=0, max_concurrency=TOGETHER).remote(folder, 10.0)  # type: ignore[attr-defined]
        relay = RelayWorker.options(num_cpus=0, max_concurrency=1000).remote(head)  # type: ignore[attr-defined]
        actor = _Small.remote()  # type: ignore[attr-defined]
        names = [f"actor {number}" for number in range(TOGETHER)]
        ray.get(relay.attach.remote(dict.fromkeys(names, actor)))
        for name in names:
            ray.get(head.attach.remote(name, actor, ray.get_runtime_context().get_node_id()))
        relay_pid, head_pid = _pid_of("ray::RelayWorker"), ray.get(head.pid.remote())

        def look(count: int) -> None:
            ray.get(relay.look.remote(dict.fromkeys(names[:count], (0,)), 5.0))

        turns = 15

        def own(count: int) -> float:
            return _median(lambda: _own(lambda: _paced(lambda: look(count), turns))) / turns

        one = own(1)
        relayed = max(0.0, (own(TOGETHER) - one) / (TOGETHER - 1))
        status = _median(lambda: _of(relay_pid, lambda: _paced(lambda: look(TOGETHER), turns))) / (turns * TOGETHER)

        version = 0

        def follow() -> None:
            nonlocal version
            waiting = [relay.policy.remote(version, 30.0) for _ in names]
            version += 1
            relay.publish.remote(version, [ray.put(b"weights")])
            ray.get(waiting)

        policy = _median(lambda: _of(relay_pid, lambda: _paced(follow, turns))) / (turns * TOGETHER)

        def exchange() -> None:
            ray.get([relay.exchange.remote(name, 0, 0, [], 1, 0) for name in names])

        desk = _median(lambda: _of(head_pid, lambda: _paced(exchange, turns))) / (turns * TOGETHER)
    return {
        "relay_serve": policy,
        "relay_status": status,
        "look": one,
        "relayed_status": relayed,
        "exchange": desk,
    }


def _books(actors: int = 2000) -> float:
    config = load_config("pendulum_sac", ["--name", "bench"])
    assert isinstance(config, RunConfig)
    head = Head(config, wall_started=time.monotonic())
    statuses = {f"actor {number}": {**STATUS, "waiting_for": None} for number in range(actors)}

    def row() -> None:
        head.tick(Tick(time=time.monotonic(), actors=statuses, returns=[1.0] * 10, lengths=[1] * 10))
        json.dumps(head.live_state(), separators=(",", ":"), default=float)

    row()
    return _median(lambda: _own(row)) / actors


def _shard() -> dict[str, float]:
    shape = "transition"
    schema = roles.schema_of(shape)
    token = new_token()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="millrace-bench-", dir="/dev/shm"))
        spec = ShardSpec(
            schema=schema.to_json(),
            run=f"bench-{os.getpid()}",
            index=0,
            capacity=SHARD_ROWS * 2,
            segment_steps=64,
            seed=0,
            directory=folder,
            tables=(TableSpec(name=roles.TABLE),),
            limits=(RateLimit.from_min_size(1),),
        )
        shard = stack.enter_context(ShardProcess(spec, security=Security(token)))
        case = {"addresses": [shard.address], "shape": shape, "token": token}
        child(roles.MODULE, "fill", {**case, "rows": SHARD_ROWS})

        def counted(role: str, counter: str, **more: Any) -> float:
            before, cpu = _counter(shard, counter), cpu_s(shard.pid)
            child(roles.MODULE, role, {**case, "seconds": 1.0, **more})
            return (cpu_s(shard.pid) - cpu) / (_counter(shard, counter) - before)

        insert = _median(lambda: counted("insert", "inserted"))
        message = _median(lambda: _of(shard.pid, lambda: _write_small(case))) / MESSAGES
        reading = {"batch": 256, "stack_on_device": False, "selector": "uniform", "batches_ahead": 16}
        sample = _median(lambda: counted("read", "sampled", transport="flight", **reading))
        with flight_client(shard.address, shard.security) as client:
            lease: dict[str, Any] = {
                "table": roles.TABLE,
                "shard": 1,
                "side": "insert",
                "least": 1,
                "most": 1,
                "deleted": 0,
            }
            asked = {**lease, "timeout_s": 0.0}
            leased = (
                _median(lambda: _of(shard.pid, lambda: [action(client, "lease", asked) for _ in range(CALLS)])) / CALLS
            )
    return {"insert_row": insert, "insert_message": message, "sample_row": sample, "lease": leased}


def _write_small(case: dict[str, Any]) -> None:
    """Messages of a row each, every one of them waited for."""
    schema = roles.schema_of(case["shape"])
    connect = partial(flight_client, security=Security(case["token"]))
    (address,) = case["addresses"]
    writer = LaneWriter([FlightWriter(address, schema, connect=connect)])
    for _ in range(MESSAGES):
        writer.append(np.zeros(1, np.int32), schema.zeros(1))
        writer.flush()
    writer.close()


def _counter(shard: ShardProcess, name: str) -> int:
    (table,) = shard.stats()["tables"].values()
    return int(table[name])
