"""The weights that the learner publishes, in the head's process, which outlives it: the newest, and those that actors play with."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import ray

MOST_WAITING = 32  # calls that wait for newer weights at once, each in a thread of the head, which has 64
ANSWER_S = 60.0  # how long a new head waits for the learner's newest weights


class Weights(NamedTuple):
    """One version of the learner's weights; versions count from 1, and 0 is before the first."""

    version: int
    reference: Any  # Ray's, to the bytes as uint8 (size,), which processes map and do not copy; None before the first

    @property
    def data(self) -> bytes:
        """A copy of the bytes."""
        return b"" if self.reference is None else ray.get(self.reference).tobytes()


class PublishedWeights:
    """The newest weights of a run; any thread may call it."""

    def __init__(self, *, hold_back: int = 0) -> None:
        """hold_back: how many versions actors stay behind the newest."""
        self._changed = threading.Condition()
        self._newest = Weights(0, None)
        self._held: deque[Weights] = deque(maxlen=hold_back + 1)  # the oldest first
        self._highest_had = 0  # version that an actor has said to have
        self._waiting = 0  # calls

    @property
    def newest(self) -> Weights:
        """The newest; version 0 where there are none yet."""
        return self._newest

    @property
    def highest(self) -> int:
        """The highest version that is known of: published to this head, or to one that died, and had by an actor since."""
        return max(self._newest.version, self._highest_had)

    def publish(self, version: int, data: bytes | np.ndarray) -> Weights:
        """Put new weights into the object store; older ones than the newest, of a learner that was replaced, change nothing.

        Returns:
            The newest weights, with these among them.
        """
        weights = Weights(version, ray.put(np.frombuffer(data, np.uint8)))
        with self._changed:
            if version > self._newest.version:
                self._newest = weights
                self._held.append(weights)
                self._changed.notify_all()
            return self._newest

    def policy(self, have: int, wait_s: float = 0.0) -> tuple[int, Any] | None:
        """(version, reference) of the weights that actors should play with; None where they have these or newer ones.

        wait_s: how long to wait for newer ones; not at all where many calls do.
        """
        with self._changed:
            self._highest_had = max(self._highest_had, have)
            if wait_s and self._waiting < MOST_WAITING:
                self._waiting += 1
                self._changed.wait_for(lambda: bool(self._held) and self._held[0].version > have, timeout=wait_s)
                self._waiting -= 1
            version, reference = self._held[0] if self._held else (0, None)
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
