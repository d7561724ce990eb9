"""The loop around a language model's learner: take a batch of groups, update, acknowledge, publish; and where its time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import pyarrow as pa
from torch import Tensor

from learners.distributed import Group
from learners.publisher import Publisher
from replay.queue_sampler import QueueBatch, QueueSampler

POLL_S = 0.25  # longest time that the loop takes to see that it is told to end


class Algorithm(Protocol):
    """What the loop drives; `PolicyGradient` is one."""

    @property
    def updates(self) -> int:
        """Learner steps made, over all restarts."""
        ...

    @property
    def is_divided(self) -> bool:
        """Whether the weights are divided among learners, so that `policy_bytes` and `state` need all of them."""
        ...

    def published(self, version: int) -> None:
        """The present weights are out as `version`."""
        ...

    def update(self, batch: pa.RecordBatch) -> None: ...

    def check_finite(self) -> None: ...

    def metrics(self) -> dict[str, float]: ...

    def policy_bytes(self) -> bytes: ...

    def state(self) -> dict[str, Tensor]: ...


def _nowhere(version: int, data: bytes) -> None:
    pass


class LlmLoop:
    """Learns from each group that comes, and publishes the weights every `publish_every` learner steps.

    `run` does so until told to end, with a thread of its own that publishes; `step` does one learner step with none, in lock step
    with its caller. The weights that the loop finds are published first, before anything is learnt.

    Version v is the weights that were published as v. Batches are drawn with the newest version, right before their update and
    never ahead of it: how far a group lags, and so whether it is still used, is decided against the weights that it will change.
    Little is lost by that, as a `QueueReader` fetches deliveries while the learner works, so drawing joins what is here already.

    A batch is acknowledged after its update, in one turn with it: whoever saves the state between two turns finds the weights
    and what they were learnt from together. A learner that is lost within an update leaves its batch to the next one.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        sampler: QueueSampler,
        *,
        publish: Callable[[int, bytes], None] | None,
        publish_every: int = 1,
        version: int = 0,
        group: Group | None = None,
    ) -> None:
        """
        sampler: this learner's batches, each with its part of the groups of a learner step.
        publish: takes a version and its weights; None on all learners of a group but the first.
        publish_every: learner steps between two publications.
        version: that of the first publication.
        group: the learners that this one is one of.
        """
        self._algorithm = algorithm
        self._sampler = sampler
        self._publish_callable = publish
        self._publish_every = publish_every
        self._next_version = version
        self._published = False
        self._since_publish = 0
        self._group = group
        self._publisher: Publisher | None = None
        self._turn = threading.Condition()
        self._updating = False
        self._holders = 0
        self._is_state_wanted = False
        self._gathered: dict[str, Tensor] | None = None
        self._waiting_since: float | None = None
        self._update_s = self._wait_s = self._publish_s = self._wall_s = 0.0
        self._running_since: float | None = None

    # ------------------------------------------------------------------------------------------------- running it

    def run(self, until: threading.Event) -> None:
        """Learns until `until` is set, then publishes what is waiting and returns; in a group, once any of them is told.

        Raises what the sampler or `publish` raised, FloatingPointError from the learner step, and GroupError.
        """
        publisher = self._publisher = Publisher(self._publish_callable or _nowhere)
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            batch: QueueBatch | None = None
            while True:
                if batch is None and not until.is_set():
                    batch = self._next()
                stop = until.is_set() or publisher.error is not None
                stop, ready, is_state_wanted = self._agree(stop=stop, ready=batch is not None)
                if is_state_wanted:
                    self._gather_state()
                if stop:
                    break
                if ready and batch is not None:
                    self._update(batch)
                    batch = None
            self._sampler.flush()
            self._algorithm.check_finite()
        finally:
            publisher.close()
            self._publisher = self._waiting_since = None
            self._wall_s = self._wall()
            with self._turn:
                self._running_since = None
                self._turn.notify_all()
        if publisher.error is not None:
            raise publisher.error

    def step(self, timeout_s: float = 60.0) -> None:
        """One learner step in the calling thread, publication included, without a group.

        Raises TimeoutError if there was no batch within `timeout_s`.
        """
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            self._waiting_since = time.perf_counter()
            try:
                batch = self._sample(timeout_s)
            finally:
                self._wait_s += time.perf_counter() - self._waiting_since
            self._update(batch)
            self._sampler.flush()
        finally:
            self._waiting_since = None
            self._wall_s, self._running_since = self._wall(), None

    def publish(self) -> int:
        """Publishes the weights now and returns their version; a running loop does so by itself.

        Where weights are divided among learners, all of them have to call it.
        """
        start = time.perf_counter()
        self._algorithm.check_finite()
        version = self._next_version
        if self._publish_callable is not None or self._algorithm.is_divided:
            data = self._algorithm.policy_bytes()
            if self._publisher is not None:
                self._publisher.put(version, data)
            elif self._publish_callable is not None:
                self._publish_callable(version, data)
        self._algorithm.published(version)
        self._next_version = version + 1
        self._published = True
        self._since_publish = 0
        self._publish_s += time.perf_counter() - start
        return version

    def state(self) -> dict[str, Tensor]:
        """The algorithm's state between two turns, with all that it learnt from consumed for good; any thread but the loop's own.

        Where weights are divided, the running loops of all learners gather it together at their next turn, if one is asked.

        Raises RuntimeError if such loops ended first.
        """
        if self._running_since is None or not self._algorithm.is_divided:
            with self.between_updates():
                self._sampler.flush()
                return self._algorithm.state()
        with self._turn:
            self._gathered, self._is_state_wanted = None, True
            self._turn.wait_for(lambda: self._gathered is not None or self._running_since is None)
            self._is_state_wanted = False
            if self._gathered is None:
                raise RuntimeError(
                    "the learners' loops ended before they could gather their state: expected them to be running, or all learners "
                    "to ask their algorithm together"
                )
            gathered, self._gathered = self._gathered, None
        return gathered

    @contextmanager
    def between_updates(self) -> Iterator[None]:
        """Holds the loop still, so that the algorithm's state can be read or written; any thread but the loop's own."""
        with self._turn:
            self._holders += 1
            try:
                self._turn.wait_for(lambda: not self._updating)
                yield
            finally:
                self._holders -= 1
                self._turn.notify_all()

    # ---------------------------------------------------------------------------------------------- watching it

    def stats(self) -> dict[str, float]:
        """Cumulative: updates (learner steps) over all restarts; seconds of this loop spent updating, waiting for batches,
        publishing and in all; the newest published version (-1: none)."""
        return {
            "updates": float(self._algorithm.updates),
            "update_s": self._update_s,
            "wait_s": self._wait_s,
            "publish_s": self._publish_s,
            "wall_s": self._wall(),
            "version": float(self._next_version - 1) if self._published else -1.0,
        }

    def metrics(self) -> dict[str, float]:
        """The algorithm's metrics since the last call, taken between two updates."""
        with self.between_updates():
            return self._algorithm.metrics()

    @property
    def waiting_for(self) -> str | None:
        """What the loop waits for at this moment, and since when; None while it works."""
        since = self._waiting_since
        return None if since is None else f"a batch from replay for {time.perf_counter() - since:.0f} s"

    # --------------------------------------------------------------------------------------------------- its parts

    def _publish_first(self) -> None:
        if not self._published:
            self.publish()

    def _agree(self, *, stop: bool, ready: bool) -> tuple[bool, bool, bool]:
        """Whether any learner stops, all have a batch, and any is asked for the state."""
        if self._group is None:
            return stop, ready, False
        start = time.perf_counter()
        # The extent of returns, which language models have no use for, is the largest of numbers that learners tell each other.
        agreed = self._group.agree(stop=stop, ready=ready, extent=(0.0, float(self._is_state_wanted)))
        self._wait_s += time.perf_counter() - start
        return agreed.stop, agreed.ready, agreed.extent is not None and agreed.extent[1] > 0.0

    def _gather_state(self) -> None:
        self._sampler.flush()
        with self._updates():
            state = self._algorithm.state()
        with self._turn:
            if self._is_state_wanted:
                self._gathered = state
                self._turn.notify_all()

    @contextmanager
    def _updates(self) -> Iterator[None]:
        """The algorithm changes within it; waits for those in `between_updates`."""
        with self._turn:
            self._turn.wait_for(lambda: self._holders == 0)
            self._updating = True
        try:
            yield
        finally:
            with self._turn:
                self._updating = False
                self._turn.notify_all()

    def _update(self, batch: QueueBatch) -> None:
        self._waiting_since = None
        with self._updates():
            start = time.perf_counter()
            self._algorithm.update(batch.rows)
            self._sampler.acknowledge(batch)
            self._update_s += time.perf_counter() - start
            self._since_publish += 1
            if self._since_publish >= self._publish_every:
                self.publish()

    def _sample(self, timeout_s: float) -> QueueBatch:
        return self._sampler.sample(timeout_s, version=self._next_version - 1)

    def _next(self) -> QueueBatch | None:
        """The next batch; None when none has come for a while: the loop, or another one of its group, may be told to end."""
        start = time.perf_counter()
        if self._waiting_since is None:
            self._waiting_since = start
        try:
            return self._sample(POLL_S)
        except TimeoutError:
            return None
        finally:
            self._wait_s += time.perf_counter() - start

    def _wall(self) -> float:
        since = self._running_since
        return self._wall_s + (0.0 if since is None else time.perf_counter() - since)
