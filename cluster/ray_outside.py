"""Actors outside Ray, in the head of a control run: who they are, what policy they get, and what shards say of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from cluster.control import Process
from cluster.outside import Joined, OutsideActors, Policy
from cluster.ray_children import Children, short
from cluster.ray_weights import PublishedWeights

RETRY_S = 30.0  # until an export that failed is tried again


class RayOutside:
    """What the control plane serves outside actors with; `tick` is of the head's control loop, the rest for any thread."""

    def __init__(
        self,
        actors: OutsideActors,
        children: Children,
        weights: PublishedWeights,
        *,
        routes: Callable[[], Mapping[int, str]],
        make_exporter: Callable[[], object],
        every_s: float,
        tell: Callable[..., None],
    ) -> None:
        """
        routes: addresses of the shards that may be written to, by their numbers.
        make_exporter: makes the child `exporter`, an `ExporterWorker`.
        every_s: the least time between two exports.
        tell: `Recorder.event`.
        """
        self._actors = actors
        self._children = children
        self._weights = weights
        self._routes = routes
        self._make_exporter = make_exporter
        self._every_s = every_s
        self._tell = tell
        self._policy: Policy | None = None
        self._exporting: Any = None  # answer of the export that is under way
        self._next_export = 0.0  # monotonic
        self._here = {one["name"] for one in actors.processes()}  # at the last tick

    # ------------------------------------------------------------------- calls

    def join(self, name: str, lanes: int, writer: str) -> Joined:
        """As `OutsideActors.join`."""
        return self._actors.join(name, lanes, self._routes(), writer=writer)

    def policy(self, name: str, have: int) -> Policy | None:
        """The newest exported policy; None where that is the version `have`, or there is none yet."""
        self._actors.seen(name)
        newest = self._policy
        return None if newest is None or newest.version == have else newest

    def leave(self, name: str) -> None:
        """As `OutsideActors.leave`."""
        self._actors.leave(name)

    def processes(self) -> list[Process]:
        """One for each that is here."""
        found: list[Process] = self._actors.processes()
        return found

    # ------------------------------------------------------------ control loop

    def tick(self) -> dict[str, float]:
        """Export the policy where it is wanted, end what was given up, shut out whom a shard has shut out. Returns figures."""
        for index, writer in self._actors.ended():
            name = f"shard {index}"
            if name in self._children and self._children[name].worker is not None:
                self._children[name].worker.end_writer.remote(writer)
        for shard in self._children.of("shard"):
            for writer, guest in shard.status.get("guests", {}).items():
                if guest["quarantined"]:
                    self._shut_out(writer, guest["last_refusal"])
        self._tell_changes()
        stats = self._actors.stats()
        self._export(stats["outside"] > 0)
        return {f"actors/{name}": float(count) for name, count in stats.items()}

    def _tell_changes(self) -> None:
        """Who has come and gone since the last tick: not each call, so that one that joins again and again fills no disk."""
        here = {one["name"]: one["figures"]["lanes"] for one in self._actors.processes()}
        for name in sorted(here.keys() - self._here):
            self._tell("outside", f"{name} has joined with {here[name]:.0f} lanes")
        for name in sorted(self._here - here.keys()):
            self._tell("outside", f"{name} has gone")
        self._here = set(here)

    def _shut_out(self, writer: str, why: str) -> None:
        before = self._actors.stats()["outside_shut_out"]
        self._actors.shut_out(writer, why)
        if self._actors.stats()["outside_shut_out"] > before:
            self._tell("warning", f"outside actor {writer} is shut out: {why}")

    def _export(self, is_wanted: bool) -> None:
        now = time.monotonic()
        if self._exporting is not None:
            if ray.wait([self._exporting], timeout=0.0)[0]:
                self._take(now)
            return
        newest = self._weights.newest
        is_new = newest.version > (0 if self._policy is None else self._policy.version)
        if is_wanted and is_new and now >= self._next_export:
            if "exporter" not in self._children:
                self._make_exporter()
            self._next_export = now + self._every_s
            self._exporting = self._children["exporter"].worker.export.remote(newest.version, newest.reference)

    def _take(self, now: float) -> None:
        answer, self._exporting = self._exporting, None
        try:
            self._policy = ray.get(answer)
        except ray.exceptions.RayActorError:
            self._children.remove("exporter")  # another is made for the next export
        except ray.exceptions.RayError as error:
            self._next_export = now + RETRY_S
            self._tell("warning", f"exporter: the policy could not be exported for actors outside Ray: {short(error)}")

    def state(self) -> dict[str, Any]:
        """What a new head needs, as JSON."""
        return self._actors.state()
