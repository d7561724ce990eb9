"""On which nodes of a Ray cluster the processes of a run are: what they need, what is missing, and the groups that hold it.

    head        the node of the command that started the run: the run's folder is there
    shards      spread over the nodes, in placement groups that outlive them: a new shard in the place of a dead one is on the
                same node as long as that lives
    learners    as close together as can be, in a placement group
    actors      on the node of a shard that they write to, or wherever there is room
    evaluator   anywhere

Placement groups are reservations of Ray. These are detached, so they outlive the head as well, which finds them again by name.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.runs import AnyConfig
from configs.llm import LlmConfig

POLL_S = 1.0
RESERVE_S = 10.0  # how long a run that starts waits for what it reserves
PRIVATE = (
    "millrace_private"  # resource of a Ray that a run has to itself: its actors may be more than the CPUs there are
)
ROUNDING = 1e-4  # Ray counts resources in units of this
SHARDS, LEARNERS = "shards", "learners"  # names of groups
NODES_KEPT_S = 1.0  # for how long it is not asked again where the shards are

Resources = dict[str, float]


@dataclass(frozen=True)
class Need:
    """Processes of one kind: how many, and what Ray sets aside for each, as `{"CPU": 0.5, "GPU": 1.0, "spot": 1.0}`."""

    name: str
    count: int
    resources: Resources


def needs(config: AnyConfig) -> list[Need]:
    """What Ray must set aside for a run, but for GPUs that learners take only where there are some."""
    replay, actors, learners = config.replay, config.actors, config.learners
    gpus = config.actors.gpus if isinstance(config, LlmConfig) else 0.0
    return [
        Need("shard", replay.shards, _resources(replay.cpus, 0.0, replay.resources)),
        Need("actor", actors.count, _resources(actors.cpus, gpus, actors.resources)),
        Need("learner", learners.count, _resources(learners.cpus, learners.gpus or 0.0, learners.resources)),
    ]


def shortage(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Say what is missing for all of them to run at once on nodes of these total resources; None where they all fit.

    Every process must fit on one node. Nodes are filled with the processes of one kind after the other, in every order of the
    kinds; where none of these would do, something is missing, though a more cunning arrangement might still have fitted.
    """
    asked = [need for need in needs if need.count and need.resources]
    left = min((_left_over(order, nodes) for order in permutations(asked)), key=lambda left: sum(left.values()))
    if not any(left.values()):
        return None
    kinds = sorted({kind for need in asked for kind in need.resources}, key=lambda kind: (kind != "CPU", kind))
    have = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in kinds}
    want = {kind: sum(need.count * need.resources.get(kind, 0.0) for need in asked) for kind in kinds}
    missing = {kind: want[kind] - have[kind] for kind in kinds if want[kind] > have[kind] + ROUNDING}
    asks = "; ".join(f"{_processes(need)} of {_text(need.resources)}{' each' * (need.count > 1)}" for need in asked)
    if missing:
        lacks = f"{_text(missing)} missing"
    else:
        homeless = [
            f"{_processes(need, left[need.name])} of {_text(need.resources)}" for need in asked if left[need.name]
        ]
        lacks = f"enough in sum, but no single node has as much left for {' and '.join(homeless)}"
    lower = [name for need in asked if left[need.name] or missing.keys() & need.resources for name in _settings(need)]
    there = "the one node has" if len(nodes) == 1 else f"the {len(nodes)} nodes have"
    return (
        f"the run asks for {_text(want)} ({asks}), and {there} {_text(have)}: {lacks}; "
        f"lower {', '.join(dict.fromkeys(lower))}, or add nodes"
    )


def await_resources(
    needs: Sequence[Need], seconds: float, *, tell: Callable[[str], object], stopping: threading.Event
) -> str | None:
    """Wait until the cluster has what a run needs, at most so long. Returns what is missing then; None where nothing is.

    tell: called with a line at the beginning, and whenever what is missing has changed.
    stopping: ends the waiting once it is set.
    """
    told = missing = shortage(needs, alive_nodes())
    if missing is None or not seconds:
        return missing
    deadline = time.monotonic() + seconds
    # What an autoscaler is to see, which acts on what waits. Not `ray.autoscaler.sdk.request_resources`: that is one number for
    # the cluster, so a second run that waits would take back what the first has asked for, and it would have to be taken back
    # by whoever asked, even where that was killed. Groups add up, and this one goes with this process. It asks for everything,
    # not only for what is missing, which would fit onto the nodes that are there.
    bundles = [need.resources for need in needs if need.resources for _ in range(need.count)]
    wanted = placement_group(bundles, strategy="PACK")
    try:
        tell(f"waiting up to {seconds:g} s for resources: {missing}")
        while missing is not None and time.monotonic() < deadline and not stopping.wait(POLL_S):
            missing = shortage(needs, alive_nodes())
            if missing not in (None, told):
                told = missing
                tell(f"still waiting: {missing}")
    finally:
        remove_placement_group(wanted)
    return missing


def alive_nodes() -> list[dict[str, float]]:
    """Total resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def on_this_node() -> dict[str, Any]:
    """Options for a Ray actor that must be on this node."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)}


class Placement:
    """Where the shards, learners and actors of a run go: each method gives the options of one process for `.options(...)`.

    Nothing here waits: a process for which there is no room yet is pending in Ray, and `pending` says so.
    """

    def __init__(self, config: AnyConfig, namespace: str) -> None:
        """`namespace`: of the run, which must be that of this process."""
        self._config = config
        self._namespace = namespace
        shard, actor, _ = needs(config)
        self._shard, self._actor = shard.resources, actor.resources
        self._groups: dict[str, PlacementGroup] = {}
        self._nodes: dict[str, str] = {}  # "<group> <bundle>" of a shard → node id, or the one it should be on
        self._nodes_at = -NODES_KEPT_S  # monotonic

    def adopt(self) -> None:
        """Take over the groups of a head that died."""
        for name in (SHARDS, LEARNERS):
            self._find(name)

    def add_shards(self, count: int) -> None:
        """Reserve room for the shards that a run begins with; those that are added later get theirs in `shard`."""
        if not self._find(SHARDS):
            self._make(SHARDS, [self._shard] * count, strategy="SPREAD")

    def reserve(self, shards: int, *, gpus: float, wait_s: float = RESERVE_S) -> None:
        """Have room set aside for the shards and learners that a run begins with, before its actors can take it.

        gpus: for each learner. wait_s: the longest that it waits; what finds no room by then stays pending.
        """
        self.add_shards(shards)
        self.learner(0, gpus=gpus)
        deadline = time.monotonic() + wait_s
        for group in self._groups.values():
            group.wait(max(0.0, deadline - time.monotonic()))

    def shard(self, index: int) -> dict[str, Any]:
        """Options of a shard. One that the run has not begun with is given room where the fewest shards are."""
        name, bundle = self._place(index)
        if not self._find(name):
            fewest = self._node_of_fewest()
            # Of all strategies this one alone takes a wish for a node, and a single bundle is packed in any case.
            self._make(name, [self._shard], strategy="STRICT_PACK", _soft_target_node_id=fewest)
            if fewest is not None:  # the next one goes elsewhere, even where Ray has not placed this one yet
                self._nodes[f"{name} {bundle}"] = fewest
        return _in_group(self._groups[name], bundle, self._shard)

    def remove_shard(self, index: int) -> None:
        """Give back the room of a shard that has left; that of the first ones is kept for another of the same number."""
        name, bundle = self._place(index)
        if name != SHARDS and self._find(name):
            remove_placement_group(self._groups.pop(name))
            self._nodes.pop(f"{name} {bundle}", None)

    @property
    def learner_gpus(self) -> float | None:
        """GPUs that each learner has, which stay the same as long as the run goes; None before there are learners."""
        return float(self._groups[LEARNERS].bundle_specs[0].get("GPU", 0.0)) if LEARNERS in self._groups else None

    def learner(self, rank: int, *, gpus: float) -> dict[str, Any]:
        """Options of a learner; the first call reserves room for all, with so many GPUs each."""
        settings = self._config.learners
        resources = _resources(settings.cpus, gpus, settings.resources)
        if not resources:  # Ray reserves no room for nothing
            return _options(resources)
        if not self._find(LEARNERS):
            self._make(LEARNERS, [resources] * settings.count, strategy="PACK")
        group = self._groups[LEARNERS]
        return _in_group(group, rank, group.bundle_specs[rank])

    def actor(self, near: str | None = None) -> dict[str, Any]:
        """Options of an actor, which goes to the node of this id, or elsewhere where that has no room or is gone."""
        options = _options(self._actor)
        if PRIVATE in ray.cluster_resources():
            options["num_cpus"] = 0.0
        if near is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(near, soft=True, _spill_on_unavailable=True)
        return options

    def node_of_shard(self, index: int) -> str | None:
        """Id of the node that a shard has room on; None while none has room."""
        name, bundle = self._place(index)
        if not self._find(name):
            return None
        if time.monotonic() - self._nodes_at > NODES_KEPT_S:
            self._look()
        return self._nodes.get(f"{name} {bundle}")

    def pending(self) -> list[str]:
        """A line for each group that waits for room."""
        lines = []
        for name, group in list(self._groups.items()):
            table = placement_group_table(group)
            if table.get("state") in ("PENDING", "PREPARED", "RESCHEDULING"):
                waiting = [
                    resources
                    for bundle, resources in table["bundles"].items()
                    if not table["bundles_to_node_id"].get(bundle)
                ]
                if waiting:
                    lines.append(f"{name}: no node has room for {len(waiting)} times {_text(waiting[0])} yet")
        return lines

    def close(self) -> None:
        """Remove all groups, those of a dead head too."""
        self._groups.clear()
        self._nodes.clear()
        remove_groups(self._namespace)

    def _place(self, index: int) -> tuple[str, int]:
        """The group of a shard, and its bundle in that."""
        first = self._groups[SHARDS].bundle_count if SHARDS in self._groups else 0
        return (SHARDS, index) if index < first else (f"shard-{index}", 0)

    def _find(self, name: str) -> bool:
        """Whether there is a group of this name; where there is, it is among those known afterwards."""
        if name not in self._groups:
            with suppress(ValueError):
                self._groups[name] = get_placement_group(f"{self._namespace}:{name}")
                self._nodes_at = -NODES_KEPT_S  # of it nothing is known yet
        return name in self._groups

    def _make(self, name: str, bundles: list[Resources], **how: Any) -> None:
        full = f"{self._namespace}:{name}"
        self._groups[name] = placement_group(bundles, name=full, lifetime="detached", **how)

    def _look(self) -> None:
        """Ask Ray where the shards are."""
        self._nodes_at = time.monotonic()
        for name, group in list(self._groups.items()):  # other threads may ask
            if name != LEARNERS:
                for bundle, node in placement_group_table(group).get("bundles_to_node_id", {}).items():
                    if node:
                        self._nodes[f"{name} {bundle}"] = node

    def _node_of_fewest(self) -> str | None:
        """Id of the node with the fewest shards, of those that could hold one."""
        self._look()
        able = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(kind, 0.0) >= a for kind, a in self._shard.items())
        ]
        held = Counter(self._nodes.values())
        return min(able, key=lambda node: held[node], default=None)


def remove_groups(namespace: str) -> None:
    """Remove all placement groups of a run, whoever made them."""
    ours = re.compile(rf"{re.escape(namespace)}:(shards|shard-\d+|learners)")
    for group in placement_group_table().values():
        if ours.fullmatch(group["name"]) and group["state"] != "REMOVED":
            # By its name, for that is gone once the group is.
            try:
                remove_placement_group(get_placement_group(group["name"]))
            except ValueError:
                continue


def _in_group(group: PlacementGroup, bundle: int, resources: Resources) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {**_options(resources), "scheduling_strategy": strategy}


def _options(resources: Resources) -> dict[str, Any]:
    custom = {kind: amount for kind, amount in resources.items() if kind not in ("CPU", "GPU")}
    return {
        "num_cpus": resources.get("CPU", 0.0),
        "num_gpus": resources.get("GPU", 0.0),
        **({"resources": custom} if custom else {}),
    }


def _resources(cpus: float, gpus: float, custom: Mapping[str, float]) -> Resources:
    return {kind: amount for kind, amount in {"CPU": cpus, "GPU": gpus, **custom}.items() if amount}


def _left_over(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """How many processes of each kind find no node, where the kinds are placed one after the other."""
    free = [dict(node) for node in nodes]
    left = {}
    for need in needs:
        left[need.name] = need.count
        for node in sorted(free, key=partial(_excess, need=need)):
            fits = min(int(node.get(kind, 0.0) / amount + ROUNDING) for kind, amount in need.resources.items())
            taken = min(fits, left[need.name])
            left[need.name] -= taken
            for kind, amount in need.resources.items() if taken else ():
                node[kind] -= taken * amount
    return left


def _excess(node: Mapping[str, float], *, need: Need) -> tuple[int, float]:
    """How much a node has that processes of this kind have no use for: they go first to where nobody else could."""
    others = sum(kind not in need.resources and amount > 0.0 and ":" not in kind for kind, amount in node.items())
    return others, sum(node.get(kind, 0.0) for kind in need.resources)


def _processes(need: Need, count: int | None = None) -> str:
    number = need.count if count is None else count
    return f"{number} {need.name}{'s' * (number != 1)}"


def _settings(need: Need) -> list[str]:
    """The settings that decide what this kind of processes needs."""
    room = {"shard": "replay", "actor": "actors", "learner": "learners"}[need.name]
    names = ["replay.shards" if room == "replay" else f"{room}.count"]
    names += [f"{room}.cpus"] * ("CPU" in need.resources) + [f"{room}.gpus"] * ("GPU" in need.resources)
    return names + [f"{room}.resources"] * bool(need.resources.keys() - {"CPU", "GPU"})


def _text(resources: Mapping[str, float]) -> str:
    """Resources for a person: `4 CPUs and 1 GPU`."""
    words = []
    for kind, amount in sorted(resources.items(), key=lambda item: (item[0] != "CPU", item[0] != "GPU", item[0])):
        number = f"{round(amount, 4):g}"
        words.append(f"{number} {kind}" + ("s" if kind in ("CPU", "GPU") and number != "1" else ""))
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else "nothing"
