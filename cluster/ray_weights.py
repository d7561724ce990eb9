"""The weights that the learner publishes, in the head's process, which outlives it: the newest, and those that actors play with."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import ray

ANSWER_S = 60.0  # how long a new head waits for the learner's newest weights


class Weights(NamedTuple):
    """One version of the learner's weights; versions count from 1, and 0 is before the first."""

    version: int
    data: bytes
    reference: Any  # Ray's, to `data`


class PublishedWeights:
    """The newest weights of a run; any thread may call it."""

    def __init__(self, *, hold_back: int = 0) -> None:
        """hold_back: how many versions actors stay behind the newest."""
        self._lock = threading.Lock()
        self._newest = Weights(0, b"", None)
        self._held: deque[tuple[int, Any]] = deque(maxlen=hold_back + 1)  # version and reference, the oldest first
        self._highest_had = 0  # version that an actor has said to have

    @property
    def newest(self) -> Weights:
        """The newest; version 0 where there are none yet."""
        return self._newest

    @property
    def highest(self) -> int:
        """The highest version that is known of: published to this head, or to one that died, and had by an actor since."""
        return max(self._newest.version, self._highest_had)

    def publish(self, version: int, data: bytes) -> Weights:
        """Put new weights into the object store; older ones than the newest, of a learner that was replaced, change nothing.

        Returns:
            The newest weights, with these among them.
        """
        reference = ray.put(data)
        with self._lock:
            if version > self._newest.version:
                self._newest = Weights(version, data, reference)
                self._held.append((version, reference))
            return self._newest

    def policy(self, have: int) -> tuple[int, Any] | None:
        """(version, reference) of the weights that actors should play with; None where they have these or newer ones."""
        with self._lock:
            self._highest_had = max(self._highest_had, have)
            if not self._held:
                return None
            version, reference = self._held[0]
        return None if version <= have else (version, reference)


def newest_of(learner: Any) -> tuple[Any, ...] | None:
    """What a learner published last, as it told `publish` of the head; None where that is nothing, or it gives no answer.

    For a head that takes the place of a dead one: what that kept of them for others is gone with it.
    """
    try:
        newest: tuple[Any, ...] | None = ray.get(learner.newest.remote(), timeout=ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return None  # the next ones come by themselves; if it is dead, the next look tells
    return newest
