"""The learners of a run, as its head keeps them: one group, which starts, stops and is replaced together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray

from cluster.books import Books
from cluster.ray_children import START_S, Child, Children, gpus_of_a_learner
from cluster.ray_placement import Placement
from cluster.recorder import LEARNER
from cluster.runs import RunFolder

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint


class MakeLearner(Protocol):
    """Makes one learner process, without starting it; the incarnation is the same for all learners of a group."""

    def __call__(self, rank: int, *, name: str, options: Mapping[str, Any], incarnation: int) -> None: ...


class Learners:
    """All learners of a run; used by the head's control loop alone."""

    def __init__(
        self,
        folder: RunFolder[Any],
        books: Books,
        children: Children,
        placement: Placement,
        *,
        make: MakeLearner,
        routes: Callable[[], Mapping[int, str]],
        incarnation: Callable[[], int],
        highest_version: Callable[[], int],
        latest: Callable[[], Checkpoint | None],
        tell: Callable[..., None],
    ) -> None:
        """
        routes: addresses of the shards to read from, by their numbers.
        incarnation: a number that no other process of the run has.
        highest_version: of the weights that were ever published.
        latest: the newest checkpoint.
        tell: `Recorder.event`.
        """
        self._folder = folder
        self._books = books
        self._children = children
        self._placement = placement
        self._make = make
        self._routes = routes
        self._incarnation = incarnation
        self._highest_version = highest_version
        self._latest = latest
        self._tell = tell
        self._began_with: tuple[str | None, int] | None = None  # file and version
        self._next_warning = 0  # of learner 0

    def all(self) -> list[Child]:
        """In the order of their ranks."""
        return [self._children[learner_name(rank)] for rank in range(self._folder.config.learners.count)]

    @property
    def are_starting(self) -> bool:
        """Whether one of them has not begun."""
        return any(child.starting is not None for child in self._children.of("learner"))

    @property
    def status_arguments(self) -> tuple[int]:
        """Arguments of the next `status` of learner 0."""
        return (self._next_warning,)

    @property
    def gpus(self) -> float:
        """GPUs of each."""
        gpus = self._placement.learner_gpus
        return gpus_of_a_learner(self._folder.config, tell=self._tell) if gpus is None else gpus

    def spawn(self) -> None:
        """Make new ones, without starting them."""
        gpus = self.gpus
        incarnation = self._incarnation()  # one for all: they draw the same numbers
        self._next_warning = 0
        for rank in range(self._folder.config.learners.count):
            options = self._placement.learner(rank, gpus=gpus)
            self._make(rank, name=learner_name(rank), options=options, incarnation=incarnation)

    def start(self, checkpoint: Path | None, version: int) -> None:
        """Have them begin, together: those of a group wait for each other where learner 0 tells.

        One that has begun already tells once more how.
        """
        learners = self.all()
        self._began_with = None if checkpoint is None else str(checkpoint), version
        # Not waited for: Ray hands the answer to the others once it is there.
        rendezvous = learners[0].worker.rendezvous.remote() if len(learners) > 1 else None
        for child in learners:
            child.starting = child.worker.start.remote(dict(self._routes()), *self._began_with, rendezvous)

    def await_start(self) -> None:
        """Wait until those that start have begun, or take too long."""
        starting = [child.starting for child in self._children.of("learner") if child.starting is not None]
        if starting:
            ray.wait(starting, num_returns=len(starting), timeout=START_S)

    def restart(self, failed: Sequence[tuple[Child, str]]) -> None:
        """Put new learners in the place of all, where one is dead or failed: they must go on from the same parameters."""
        self._books.counts.restarts += 1
        # One that died explains why others, left alone, failed.
        child, why = next((found for found in failed if found[1] == "died"), failed[0])
        self._children.clear_for_restart(child, why)
        others = [other for other in self.all() if other is not child]
        for other in others:
            other.end()
        checkpoint = self._latest()
        before = self._books.counts.updates
        self.spawn()
        self.start(None if checkpoint is None else checkpoint.path / LEARNER, self._highest_version() + 1)
        self._books.rebase("learner", {})
        back = 0 if checkpoint is None else checkpoint.updates
        lost = max(0, before - back)
        self._books.counts.updates_lost += lost
        new = f"{len(others) + 1} new learners go on" if others else "a new one goes on"
        self._tell("restart", f"{child.name} {why}; {new} from update {back}, {lost} updates are lost")

    def route(self) -> None:
        """Tell those that have been made where the shards are now."""
        for child in self._children.of("learner"):
            if child.worker is not None:
                child.worker.route.remote(self._incarnation(), dict(self._routes()))

    def tell_warnings(self) -> None:
        """Tell of what learner 0 has warned of since; the others of a group see the same."""
        status = self._children["learner"].status if "learner" in self._children else {}
        # A status that came late is looked at again.
        if status.get("next_warning", 0) > self._next_warning:
            self._next_warning = status["next_warning"]
            for line in status["warnings"]:
                self._tell("warning", f"learner: {line}")

    # ------------------------------------------------------ after the head's death

    def state(self) -> dict[str, Any]:
        """What a new head needs, as JSON."""
        return {"learner_start": self._began_with, "next_warning": self._next_warning}

    def restore(self, state: Mapping[str, Any], starting: Sequence[Child]) -> bool:
        """Take over those of the head that died; `starting`: processes that it was still starting.

        Returns whether they had begun, so that they may have published weights.
        """
        self._next_warning, self._began_with = state["next_warning"], state["learner_start"]
        if not all(child.worker for child in self._children.of("learner")):
            return False
        if any(child.kind == "learner" for child in starting):
            checkpoint, version = state["learner_start"]
            self.start(None if checkpoint is None else Path(checkpoint), version)
            return False
        return True


def learner_name(rank: int) -> str:
    """Name of a learner; the first, which there always is, needs no number."""
    return f"learner {rank}" if rank else "learner"
