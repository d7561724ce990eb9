"""What a cluster costs and how it heals: the head's work for each actor, weights to many actors, and what follows a SIGKILL.

head         processor seconds that the head uses each second, with so many actors whose environments sleep, on the head's
             own node and (`relays`) on another one; the slope is what an actor costs
broadcast    seconds from a learner's publication until so many actors of one node have the weights
recovery     seconds from the SIGKILL of an actor, or of a shard, until the first row of the one in its place
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray

from cluster.ray_relay import Upstream
from cluster.ray_threads import Thread
from cluster.ray_weights import PublishedWeights
from tests.benchmarks.cluster_runs import LightRun, call_rates, cpu_s
from tests.benchmarks.replay import machine

PARTS = ("head", "relays", "broadcast", "recovery")
SETTLE_S = 5.0  # after the start of a run
QUIET = ("--replay.min_size", "20000")  # the learner waits for more rows than come
GOALS = {"actor 0": 10.0, "shard 0": 5.0}  # seconds to the first row
POLL_S = 0.05  # `actors.poll_policy_s`
VERSIONS = 3  # publications of which the median counts


def head_cost(counts: Sequence[int], *, seconds: float, relays: bool) -> dict[str, Any]:
    """Runs of so many actors, and the regression over them."""
    lines = []
    with _two_nodes() if relays else nullcontext(()) as words:
        for count in counts:
            with (
                tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder,
                LightRun(Path(folder), "--actors.count", str(count), *QUIET, *words) as run,
            ):
                run.started(count)
                time.sleep(SETTLE_S)
                pid, since = run.pids()["head"], time.time()
                before = cpu_s(pid)
                time.sleep(seconds)
                line = {"actors": count, "cpu_s_per_s": (cpu_s(pid) - before) / (time.time() - since)}
                if (rates := call_rates(pid, since)) is not None:
                    line |= {"calls_in_per_s": rates[0], "calls_out_per_s": rates[1]}
                lines.append(line)
    found: dict[str, Any] = {"runs": lines}
    if len(lines) > 1:
        slope, base = np.polyfit([line["actors"] for line in lines], [line["cpu_s_per_s"] for line in lines], 1)
        found |= {"cpu_s_per_actor_s": float(slope), "cpu_s_of_no_actor": float(base)}
    return found


@contextmanager
def _two_nodes() -> Any:
    """A Ray cluster of two nodes on this machine. Yields the settings that put all actors on the one that is not the head's."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_event_stats_print_interval_ms"] = "2000"  # noqa: SIM112 - so Ray reads it
    common = {"num_cpus": 64, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=common)
    try:
        cluster.add_node(**common, resources={"far": 1000})
        yield ("--address", cluster.address, "--replay.host", "node", "--actors.resources", "far=1")
    finally:
        cluster.shutdown()


# -------------------------------------------------------------------- broadcast


@ray.remote(num_cpus=0, max_concurrency=64)
class _Head:
    def __init__(self) -> None:
        self._weights = PublishedWeights()

    def publish(self, version: int, data: Any) -> None:
        self._weights.publish(version, data)

    def policy(self, have: int, wait_s: float) -> tuple[int, Any] | None:
        return self._weights.policy(have, wait_s)


@ray.remote(num_cpus=0, max_concurrency=4)
class _Actor:
    def __init__(self, head: Any) -> None:
        self._got: dict[int, float] = {}
        self._following = Thread(lambda: Upstream(head).follow(threading.Event(), POLL_S, self._take), name="policy")

    def _take(self, version: int, weights: Any) -> None:
        self._weights = weights
        self._got[version] = time.time()

    def got(self, version: int) -> float | None:
        """Epoch second at which it had a version."""
        return self._got.get(version)


@ray.remote(num_cpus=0)
class _Learner:
    def publish(self, head: Any, version: int, size: int) -> tuple[float, float]:
        """Epoch second of the beginning, and how long it took."""
        data = bytes(size)
        began = time.time()
        ray.get(head.publish.remote(version, np.frombuffer(data, np.uint8)))
        return began, time.time() - began


def broadcast(sizes: Sequence[int], counts: Sequence[int]) -> list[dict[str, float]]:
    """Every size, in bytes, to every number of actors on this node."""
    from tests.benchmarks.scale_costs import started_ray

    lines = []
    with started_ray(int(5 * max(sizes) / 2**20) + 200):
        learner = _Learner.remote()  # type: ignore[attr-defined]
        for size in sizes:
            for count in counts:
                head = _Head.remote()  # type: ignore[attr-defined]
                actors = [_Actor.remote(head) for _ in range(count)]  # type: ignore[attr-defined]
                ray.get([actor.got.remote(0) for actor in actors])
                took, published = [], []
                for version in range(1, VERSIONS + 1):
                    began, own = ray.get(learner.publish.remote(head, version, size))
                    while None in (at := ray.get([actor.got.remote(version) for actor in actors])):
                        time.sleep(0.02)
                    took.append(max(at) - began)
                    published.append(own)
                line = {"bytes": size, "actors": count, "seconds": median(took), "publish_s": median(published)}
                lines.append(line | {"first_s": took[0]})
                for process in (*actors, head):
                    ray.kill(process)
    return lines


# --------------------------------------------------------------------- recovery


def recovery(repeats: int) -> dict[str, Any]:
    """Kill the only actor, then the only shard, so many times each, in one run."""
    found: dict[str, list[float]] = {name: [] for name in GOALS}
    with (
        tempfile.TemporaryDirectory(prefix="millrace-bench-") as folder,
        LightRun(Path(folder), "--actors.count", "1", *QUIET) as run,
    ):
        run.until(lambda: (run.inserted() or 0) > 10)
        for _ in range(repeats):
            for name, seconds in found.items():
                time.sleep(SETTLE_S)
                began = time.monotonic()
                os.kill(run.pids()[name], signal.SIGKILL)
                time.sleep(0.1)  # what the dead one has sent arrives
                rows = run.until(run.inserted)
                run.until(lambda rows=rows: (run.inserted() or 0) > rows)  # type: ignore[misc]
                seconds.append(time.monotonic() - began)
    return {
        name.partition(" ")[0]: {"median_s": median(seconds), "goal_s": GOALS[name], "seconds": seconds}
        for name, seconds in found.items()
    }


def main(words: Sequence[str]) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="millrace bench cluster", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of head and relays")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of these runs (default 15)")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4, 8], help="actors of broadcast")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.0, 1000.0], help="weights of broadcast")
    parser.add_argument("--repeats", type=int, default=5, help="of each kill (default 5)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = parser.parse_args(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends as well
    found: dict[str, Any] = {"machine": machine()}
    for part in chosen.only:
        print(f"{part} …", file=sys.stderr, flush=True)
        if part in ("head", "relays"):
            found[part] = head_cost(chosen.actors, seconds=chosen.seconds, relays=part == "relays")
        elif part == "broadcast":
            found[part] = broadcast([int(1e6 * size) for size in chosen.megabytes], chosen.readers)
        else:
            found[part] = recovery(chosen.repeats)
    if chosen.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _show(found: dict[str, Any]) -> None:
    for part in ("head", "relays"):
        for line in found.get(part, {}).get("runs", []):
            print(f"{part:<10}" + "  ".join(f"{name} {value:.4g}" for name, value in line.items()))
        if "cpu_s_per_actor_s" in found.get(part, {}):
            print(f"{part:<10}{1000 * found[part]['cpu_s_per_actor_s']:.2f} ms of a core for each actor and second")
    for line in found.get("broadcast", []):
        print("broadcast " + "  ".join(f"{name} {value:.4g}" for name, value in line.items()))
    for name, line in found.get("recovery", {}).items():
        print(f"recovery  {name}: {line['median_s']:.1f} s (goal {line['goal_s']:g} s)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
