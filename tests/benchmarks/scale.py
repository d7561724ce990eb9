"""How far a run scales: a model of who tells whom what and how often, with costs measured on this machine.

    millrace bench scale [--json] [--actors N] [--shards N] [--learners N] [--weights BYTES] …

Every edge between roles is so many messages and bytes a second; every process is so many processor seconds a second, from what
the same command measures of one call, byte, row and status (`scale_costs`). All of it is linear in the number of actors, so the
model also says at how many actors each resource is full. `--check` compares it with the real runs of `millrace bench cluster`.

Not modelled: the network between nodes but for the bytes that leave the head's, Ray's own control store and its node managers,
stragglers and queueing (what is full here is slow before), the gradients that learners send each other, a GPU's time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.ray_relay import HEAD_WAIT_S, WAIT_S, tick_s
from tests.benchmarks.cluster_runs import STEP_S
from tests.benchmarks.scale_costs import Costs, measure

# As it was: every actor asks the head, and a shard leases for one message or draw. As it is: the actors of a node share a
# relay, and leases grow with the number of actors and learners.
DESIGNS = ("direct", "relays")
# What is told of: a design, and what is otherwise than asked.
VARIANTS: dict[str, tuple[str, dict[str, float]]] = {
    "direct": ("direct", {}),
    "relays": ("relays", {}),
    "relays, with tasks": ("relays", {"exchanges_per_s": 0.5}),
    "relays, larger messages": ("relays", {"write_every_s": 0.2}),
}
CALL_BYTES = 400  # of a call without much in it, there and back
STATUS_BYTES = 500
ROW_OVERHEAD = 40  # bytes of a row on the wire beside its own, and of its share of the message
MOST_EXCHANGES = 20.0  # that an actor makes in a second
DRIVER_POLLS = 2.0  # of the head's status, by the command, each second
MOST_ACTORS = 1e8


@dataclass(frozen=True)
class Scenario:
    """What is asked about."""

    actors: int = 10_000
    actors_per_node: int = 64
    shards: int = 64
    learners: int = 64
    rows_per_actor: float = 100.0  # each second
    row_bytes: float = 104.0
    samples_per_row: float = 8.0
    batch: int = 256  # rows that a learner asks for at once
    weights_bytes: float = 1e6
    publish_per_s: float = 1.0
    poll_s: float = 0.05
    report_s: float = 1.0
    rows_per_write: int = 64
    write_every_s: float = 0.02
    exchanges_per_s: float = 0.0  # of each actor with the desk, as often as its episodes end; 0 without tasks
    checkpoint_s: float = 600.0
    capacity: float = 100e6  # rows
    network_bytes_per_s: float = 3.1e9  # of a node: 25 Gbit/s

    @property
    def nodes(self) -> float:
        """Of actors."""
        return self.actors / self.actors_per_node


@dataclass(frozen=True)
class Edge:
    """What one role sends to another."""

    name: str
    messages_per_s: float
    bytes_per_s: float


def edges(asked: Scenario, design: str) -> list[Edge]:
    """All messages of a run, by what they are for; an answer is counted with its question."""
    s = asked
    rows = s.actors * s.rows_per_actor
    writes = _writes(s)
    draws = rows * s.samples_per_row / s.batch
    others = (s.shards - 1) / s.shards
    exchanges = s.actors * min(MOST_EXCHANGES, s.exchanges_per_s)
    # A shard leases for a block at once, however few rows a message brings (`RunConfig.insert_block`, `sample_block`).
    is_old = design == "direct"
    writes_leased = 1.0 if is_old else math.ceil(s.actors / s.shards)
    draws_leased = 1.0 if is_old else s.learners
    leases = others * (rows / s.rows_per_write / writes_leased + draws / draws_leased)
    found = [
        Edge("actors → shards: rows", writes, writes * CALL_BYTES + rows * (s.row_bytes + ROW_OVERHEAD)),
        Edge("shards → learners: samples", draws, rows * s.samples_per_row * (s.row_bytes + ROW_OVERHEAD)),
        Edge("shards → shard 0: leases", *_calls(leases)),
        Edge("learner → head: weights", s.publish_per_s, s.publish_per_s * s.weights_bytes),
        Edge("head → nodes: weights", s.nodes * s.publish_per_s, s.nodes * s.publish_per_s * s.weights_bytes),
        Edge("head → shards, learners: statuses", *_calls((s.shards + s.learners) / s.report_s, STATUS_BYTES)),
        Edge("shards → disk: checkpoints", s.shards / s.checkpoint_s, s.capacity * s.row_bytes / s.checkpoint_s),
        Edge("head → disk: metrics", 1.0 / s.report_s, 2000.0 / s.report_s),
    ]
    if design == "direct":
        return [
            *found,
            Edge("actors → head: polls for weights", *_calls(s.actors * (1.0 / s.poll_s + s.publish_per_s))),
            Edge("head → actors: statuses", *_calls(s.actors / s.report_s, STATUS_BYTES)),
            Edge("actors → head: exchanges", *_calls(exchanges)),
        ]
    batches = s.nodes * min(1.0 / tick_s(s.nodes), exchanges / s.nodes)
    return [
        *found,
        Edge("actors → relays: polls for weights", *_calls(s.actors * (1.0 / WAIT_S + s.publish_per_s))),
        Edge("head → relays: news of weights", *_calls(s.nodes * s.publish_per_s)),
        Edge("head → relays: statuses", s.nodes / s.report_s, s.actors / s.report_s * STATUS_BYTES),
        Edge("relays → actors: statuses", *_calls(s.actors / s.report_s, STATUS_BYTES)),
        Edge("actors → relays: exchanges", *_calls(exchanges)),
        Edge("relays → head: exchanges", batches, exchanges * CALL_BYTES),
    ]


def _calls(per_s: float, more_bytes: float = 0.0) -> tuple[float, float]:
    return per_s, per_s * (CALL_BYTES + more_bytes)


def _writes(s: Scenario) -> float:
    """Messages with rows, each second: a full one, or one when a row has waited long enough."""
    return s.actors * min(s.rows_per_actor, max(s.rows_per_actor / s.rows_per_write, 1.0 / s.write_every_s))


def load(asked: Scenario, costs: Costs, design: str) -> dict[str, float]:
    """Share of what it has that each resource uses: of one core for a process, of a node's network for its bytes."""
    s, c = asked, costs
    rate = {edge.name: edge.messages_per_s for edge in edges(s, design)}
    rows = s.actors * s.rows_per_actor
    leases = rate["shards → shard 0: leases"]
    shard = c.idle + rows / s.shards * (c.insert_row + s.samples_per_row * c.sample_row)
    shard += rate["actors → shards: rows"] / s.shards * c.insert_message
    head = c.idle + DRIVER_POLLS * c.serve + (s.shards + s.learners) / s.report_s * c.call
    head += s.publish_per_s * (c.serve + s.weights_bytes * c.put_byte) + s.actors / s.report_s * c.books
    exchanges = s.actors * min(MOST_EXCHANGES, s.exchanges_per_s) * c.exchange
    found = {
        "shard 0, which leases to the others": shard + leases * c.lease,
        "a shard": shard + leases / s.shards * c.lease,
        "network of the head's node": s.nodes * s.publish_per_s * s.weights_bytes / s.network_bytes_per_s,
    }
    if design == "direct":
        served = rate["actors → head: polls for weights"] + rate["actors → head: exchanges"]
        return {"head": head + served * c.serve + s.actors / s.report_s * c.call + exchanges, **found}
    head += (rate["head → relays: statuses"]) * c.look + s.actors / s.report_s * c.relayed_status
    head += rate["head → relays: news of weights"] * c.call + rate["relays → head: exchanges"] * c.serve + exchanges
    served = rate["actors → relays: polls for weights"] + rate["actors → relays: exchanges"]
    relay = c.idle + (served * c.relay_serve + s.actors / s.report_s * c.relay_status) / s.nodes
    return {"head": head, "a relay": relay, **found}


def limit(asked: Scenario, resource: Callable[[Scenario], float]) -> float:
    """The number of actors at which a resource is full, with all else as asked; inf where it never is."""
    low, high = 1.0, MOST_ACTORS
    if resource(replace(asked, actors=int(high))) < 1.0:
        return float("inf")
    while high - low > 1.0:
        middle = (low + high) / 2
        low, high = (middle, high) if resource(replace(asked, actors=int(middle))) < 1.0 else (low, middle)
    return float(int(low))


def answer(asked: Scenario, costs: Costs, design: str) -> dict[str, Any]:
    """Edges, loads, and what is full first."""
    now = load(asked, costs, design)
    limits = {name: limit(asked, lambda s, name=name: load(s, costs, design)[name]) for name in now}  # type: ignore[misc]
    first = min(limits, key=lambda name: limits[name])
    return {
        "edges": [asdict(edge) for edge in edges(asked, design)],
        "load": now,
        "actors_at_full": {name: None if found == float("inf") else found for name, found in limits.items()},
        "full_first": first,
    }


def check(measured: Mapping[str, Any], costs: Costs) -> list[dict[str, Any]]:
    """What the model says of the runs that `millrace bench cluster` has measured; an error is relative to what was measured."""
    found = []
    for design, part in zip(DESIGNS, ("head", "relays"), strict=True):
        for line in measured.get(part, {}).get("runs", []):
            asked = Scenario(
                actors=line["actors"],
                actors_per_node=line["actors"],
                shards=1,
                learners=1,
                rows_per_actor=1.0 / STEP_S,
                samples_per_row=0.0,
                publish_per_s=0.0,
                exchanges_per_s=0.0,
                poll_s=HEAD_WAIT_S,  # on the head's own node actors ask it still, and wait for news so long
            )
            taken, made = _of_head(asked, design)
            pairs = {
                "cpu_s_per_s": load(asked, costs, design)["head"],
                "calls_in_per_s": taken,
                "calls_out_per_s": made,
            }
            compared = {
                name: {"predicted": said, "measured": line[name], "error": said / line[name] - 1.0}
                for name, said in pairs.items()
                if line.get(name)
            }
            found.append({"design": design, "actors": line["actors"], **compared})
    return found


def _of_head(asked: Scenario, design: str) -> tuple[float, float]:
    """Calls that the head takes in and makes, each second."""
    rate = {edge.name: edge.messages_per_s for edge in edges(asked, design)}
    others = rate["head → shards, learners: statuses"]
    if design == "direct":
        taken = rate["actors → head: polls for weights"] + rate["actors → head: exchanges"]
        return taken + DRIVER_POLLS, rate["head → actors: statuses"] + others
    news = rate["head → relays: news of weights"]
    return rate["relays → head: exchanges"] + DRIVER_POLLS, rate["head → relays: statuses"] + news + others


def main(words: Sequence[str]) -> int:
    """Run the command. Returns its exit code."""
    from tests.benchmarks.replay import machine

    chosen = _parser().parse_args(words)
    asked = Scenario(
        actors=chosen.actors,
        actors_per_node=chosen.actors_per_node,
        shards=chosen.shards,
        learners=chosen.learners,
        rows_per_actor=chosen.rows,
        weights_bytes=chosen.weights,
        publish_per_s=chosen.publish,
        rows_per_write=chosen.rows_per_write,
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    costs = Costs(**json.loads(chosen.costs.read_text())["costs"]) if chosen.costs else measure(say)
    found: dict[str, Any] = {"machine": machine(), "costs": asdict(costs), "scenario": asdict(asked)}
    found["answers"] = {
        name: answer(replace(asked, **changed), costs, design)  # type: ignore[arg-type]
        for name, (design, changed) in VARIANTS.items()
    }
    for file in chosen.check:
        found["check"] = found.get("check", []) + check(json.loads(file.read_text()), costs)
    if chosen.json:
        print(json.dumps(found))
    else:
        _show(found)
    return 0


def _parser() -> argparse.ArgumentParser:
    asked = Scenario()
    parser = argparse.ArgumentParser(prog="millrace bench scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--actors", type=int, default=asked.actors)
    parser.add_argument("--actors-per-node", type=int, default=asked.actors_per_node)
    parser.add_argument("--shards", type=int, default=asked.shards)
    parser.add_argument("--learners", type=int, default=asked.learners)
    parser.add_argument("--rows", type=float, default=asked.rows_per_actor, help="rows/s of each actor")
    parser.add_argument("--weights", type=float, default=asked.weights_bytes, help="bytes of one publication")
    parser.add_argument("--publish", type=float, default=asked.publish_per_s, help="publications each second")
    parser.add_argument("--rows-per-write", type=int, default=asked.rows_per_write, help="actors.rows_per_write")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="take the costs of an earlier --json, measure none")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="compare with the runs that `millrace bench cluster --json` has measured",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


def _show(found: dict[str, Any]) -> None:
    print("costs, microseconds of a core:")
    for name, cost in found["costs"].items():
        print(f"  {name:<16}{1e6 * cost:12.4f}")
    for name, one in found["answers"].items():
        print(f"\n{name}: full first is {one['full_first']}")
        for edge in one["edges"]:
            print(f"  {edge['name']:<38}{edge['messages_per_s']:14,.0f} /s{edge['bytes_per_s'] / 1e6:14,.2f} MB/s")
        for resource, share in one["load"].items():
            most = one["actors_at_full"][resource]
            print(f"  {resource:<38}{100 * share:13,.1f} %  full at {'–' if most is None else f'{most:,.0f}'} actors")
    for line in found.get("check", []):
        pairs = {name: pair for name, pair in line.items() if isinstance(pair, dict)}
        told = [f"{name} {one['measured']:.3g} ({100 * one['error']:+.0f} %)" for name, one in pairs.items()]
        print(f"{line['design']}, {line['actors']} actors: measured {', '.join(told)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
