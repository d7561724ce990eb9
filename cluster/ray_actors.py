"""The actors of a run, as its head keeps them when their number changes: they leave in order, and others come."""

from __future__ import annotations

import time
from collections.abc import Callable

import ray

from cluster.books import Books
from cluster.ray_children import STOP_S, Child, Children
from cluster.ray_relay import Relays


class Actors:
    """All actors of a run; used by the head's control loop alone.

    One that leaves goes through two phases: *stopping*, while it writes what is complete and ends its lanes, and *counting*,
    until the books have taken in its last counters.
    """

    def __init__(
        self,
        children: Children,
        books: Books,
        relays: Relays,
        *,
        spawn: Callable[[int], None],
        start: Callable[[int], None],
        forget: Callable[[Child], None],
        tell: Callable[..., None],
    ) -> None:
        """
        relays: an actor that leaves is asked directly, for its last status must be the last.
        spawn, start: make the actor of a number, and have it begin.
        forget: an actor is gone and nobody takes its place: ends what it wrote, and takes back what it was given.
        tell: `Recorder.event`.
        """
        self._children = children
        self._books = books
        self._relays = relays
        self._spawn = spawn
        self._start = start
        self._forget = forget
        self._tell = tell

    def scale(self, count: int) -> None:
        """Take a step towards `count` actors: add those that lack, have those beyond leave.

        Called once after every look, whose statuses the books have taken in.
        """
        there = {child.index: child for child in self._children.of("actor")}
        for child in there.values():
            if child.index >= count and child.leaving is None:
                self._tell("scale", f"{child.name} leaves")
                child.leaving, child.leaving_since = "stopping", time.monotonic()
                self._relays.detach(child.name)
            self._follow(child)
        for index in range(count):
            if index not in there:
                self._spawn(index)
                self._children[f"actor {index}"].is_added = True
                self._start(index)

    def _follow(self, child: Child) -> None:
        if child.leaving == "stopping":
            if child.starting is not None:  # it waits for room that there is not, perhaps for ever
                self.remove(child)
            elif child.left is None:
                child.left = child.worker.stop.remote(STOP_S)
            elif ray.wait([child.left], timeout=0.0)[0]:
                child.leaving, child.asked = "counting", None  # what comes of an earlier call is not the last
        elif child.leaving == "counting" and child.asked is None:
            self.remove(child)

    def remove(self, child: Child) -> None:
        """An actor is gone for good."""
        self._forget(child)
        self._books.forget(child.name)
        self._children.remove(child.name)
