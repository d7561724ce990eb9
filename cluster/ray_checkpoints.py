"""Checkpoints of a run under Ray: what keeps one from being written now, and how the head has all processes write theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ray

from cluster.books import SILENT_S, Books
from cluster.ray_children import Children, saved, short
from cluster.ray_evaluations import Evaluations
from cluster.ray_weights import PublishedWeights
from cluster.recorder import Recorder

RETRY_S = 30.0  # until a checkpoint that could not be written is tried again


class Saves(Protocol):
    """What a kind of run writes into a checkpoint, and when it cannot."""

    def save_learner(self, path: Path) -> int:
        """Have the learners' state written to a file. Returns the updates made."""

    def save_shards(self, replay: Path, before: Path | None) -> Mapping[str, Mapping[str, int]]:
        """Have all shards that serve write their rows at once. Returns their counters by name."""

    def save_more(self, path: Path) -> None:
        """Write further files into the folder of a checkpoint."""

    def moving(self) -> str | None:
        """Why none can be written now, where data is on its way from one process to another."""


class RunCheckpoints:
    """Writes the checkpoints of a run; used by the head's control loop alone."""

    def __init__(
        self,
        books: Books,
        children: Children,
        recorder: Recorder,
        evaluations: Evaluations,
        weights: PublishedWeights,
        saves: Saves,
        *,
        fetch_weights: Callable[[], None],
        keep: Callable[[], None],
    ) -> None:
        """
        fetch_weights: publishes what the learner has published to a head that died.
        keep: puts the head's state on disk, in which it stands whether a checkpoint is being written.
        """
        self._books = books
        self._children = children
        self._recorder = recorder
        self._evaluations = evaluations
        self._weights = weights
        self._saves = saves
        self._fetch_weights = fetch_weights
        self._keep = keep
        self._tried_at = 0.0  # monotonic
        self.is_writing = False

    @property
    def may_retry(self) -> bool:
        """Whether the last one was tried long enough ago."""
        return time.monotonic() - self._tried_at > RETRY_S

    def _obstacle(self) -> str | None:
        if silent := self._children.silent(SILENT_S):
            return f"no answer from {', '.join(silent)}"
        if any(child.starting is not None or child.status.get("error") for child in self._children.of("learner")):
            return "the learner was not running"
        return None

    def write(self, *, is_last: bool = False) -> bool:
        """Write one, or a line that says why there is none. Returns whether every process did its part.

        It holds the best policy where that is in no checkpoint yet, else the newest. The last one is written without the shards
        that do not serve.
        """
        self._tried_at = time.monotonic()
        missing = [
            c.name for c in self._children.of("shard") if c.address and (c.starting or c.leaving == "handing over")
        ]
        why = self._obstacle()
        if why is None and not is_last:
            why = self._saves.moving() or (f"{', '.join(missing)} was not running" if missing else None)
        if why is None and not self._weights.newest.version:
            self._fetch_weights()
        evaluation, policy = self._evaluations.unsaved_best or (self._books.evaluation_now, self._weights.newest.data)
        if why is None and not policy:
            why = "the learner has published no weights yet"
        if why is not None:
            self._recorder.event("warning", f"no checkpoint was written: {why}")
            return False
        if missing:
            self._recorder.event("warning", f"the last checkpoint is without the steps of {', '.join(missing)}")
        self.is_writing = True
        self._keep()
        try:
            written = self._recorder.checkpoint(
                save_learner=self._saves.save_learner,
                save_shards=self._saves.save_shards,
                policy=policy,
                evaluation=evaluation,
                save_more=self._saves.save_more,
            )
        except ray.exceptions.RayError as error:
            # A process died meanwhile: the next look at it starts it again, and what was written is gone.
            self._recorder.event("warning", f"no checkpoint was written: {short(error)}")
            return False
        finally:
            self.is_writing = False
        if written:
            self._evaluations.saved()
        self._keep()
        return True


def save_learner(children: Children, path: Path) -> int:
    """As `Saves.save_learner`; raises what `saved` does."""
    return int(saved(children["learner"].worker.save.remote(str(path))))


def save_shards(children: Children, replay: Path, before: Path | None) -> dict[str, Any]:
    """As `Saves.save_shards`, of those whose rows are nowhere else; raises what `saved` does."""
    previous = None if before is None else str(before)
    serving = [child for child in children.of("shard") if child.worker is not None and child.starting is None]
    shards = [child for child in serving if child.leaving != "handing over"]
    answers = {child.name: child.worker.save.remote(str(replay), previous) for child in shards}
    return {name: saved(answer) for name, answer in answers.items()}
