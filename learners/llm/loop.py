"""The loop around a language model's learner: take a batch of groups, update, acknowledge, publish; and where its time goes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import pyarrow as pa
from torch import Tensor

from learners.distributed import Group
from learners.publisher import Publisher
from replay.queue_sampler import QueueBatch, QueueSampler

POLL_S = 0.25  # longest time that the loop takes to see that it is told to end
HOLD_S = 240.0  # longest time that it is held still; learners of a group wait for each other no longer than 300 s


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

    A batch is acknowledged after its update, in one turn with it: whoever saves the state between two turns (`hold`) finds the
    weights and what they were learnt from together. A learner that is lost within an update leaves its batch to the next one.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        sampler: QueueSampler,
        *,
        publish: Callable[[int, bytes], None] | None,
        publish_every: int = 1,
        version: int = 0,
        most_updates: int | None = None,
        group: Group | None = None,
    ) -> None:
        """
        sampler: this learner's batches, each with its part of the groups of a learner step.
        publish: takes a version and its weights; None on all learners of a group but the first.
        publish_every: learner steps between two publications.
        version: that of the first publication.
        most_updates: learner steps, over all restarts, after which nothing more is learnt; the loop then waits to be told to end.
        group: the learners that this one is one of.
        """
        self._algorithm = algorithm
        self._sampler = sampler
        self._publish_callable = publish
        self._publish_every = publish_every
        self._next_version = version
        self._published = False
        self._since_publish = 0
        self._most_updates = math.inf if most_updates is None else most_updates
        self._group = group
        self._publisher: Publisher | None = None
        self._turn = threading.Condition()  # over what follows
        self._phase: Literal["new", "running", "ended", "failed"] = "new"  # of `run`
        self._updating = False
        self._is_hold_wanted = self._is_held_too_long = False
        self._held: dict[str, Tensor] | None = None  # the state, while the loop is held still with it
        self._last: dict[str, Tensor] | None = None  # the state at the end, where learners divide it
        self._is_report_wanted = False
        self._report: dict[str, float] | None = None
        self._waiting_since: float | None = None
        self._update_s = self._wait_s = self._publish_s = self._wall_s = 0.0
        self._running_since: float | None = None

    # ------------------------------------------------------------------------------------------------- running it

    def run(self, until: threading.Event) -> None:
        """Learns until `until` is set, then publishes the last weights and returns; in a group, once any of them is told.

        Raises what the sampler or `publish` raised, FloatingPointError from the learner step, and GroupError.
        """
        publisher = self._publisher = Publisher(self._publish_callable or _nowhere)
        self._running_since = time.perf_counter()
        self._enter("running")
        phase: Literal["ended", "failed"] = "failed"
        try:
            self._publish_first()
            self._learn(until, publisher)
            self._sampler.flush()
            self._algorithm.check_finite()
            if self._since_publish and publisher.error is None:
                self.publish()
            if self._algorithm.is_divided:
                self._last = self._algorithm.state()
            phase = "ended"
        finally:
            publisher.close()
            self._publisher = self._waiting_since = None
            self._wall_s = self._wall()
            self._running_since = None
            self._enter(phase)
        if publisher.error is not None:
            raise publisher.error

    def _learn(self, until: threading.Event, publisher: Publisher) -> None:
        batch: QueueBatch | None = None
        while True:
            if self._algorithm.updates >= self._most_updates:
                self._waiting_since = None
                until.wait(POLL_S)
            elif batch is None and not until.is_set():
                batch = self._next()
            stop = until.is_set() or publisher.error is not None
            stop, ready, is_held = self._agree(stop=stop, ready=batch is not None)
            if is_held:
                self._hold_still()
            if stop:
                return
            if ready and batch is not None:
                self._update(batch)
                batch = None

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

    def hold(self) -> dict[str, Tensor]:
        """Holds the running loops of all learners still after a turn, until `release` or for `HOLD_S` at most. Any thread but theirs.

        Returns the algorithm's state. All that it learnt from, on every learner, is then consumed for good, and nothing else is: a
        copy of the queue that is made before `release` has exactly what this state has not learnt from. A loop that has ended is
        as good as held.

        Raises RuntimeError if the loop has failed, or the hold was released before it began.
        """
        with self._turn:
            self._is_hold_wanted, self._is_held_too_long = True, False
            if self._phase == "new" and not self._algorithm.is_divided:  # `run` begins by holding still
                return self._algorithm.state()
            self._turn.wait_for(
                lambda: self._held is not None or not self._is_hold_wanted or self._phase in ("ended", "failed")
            )
            if self._held is not None:
                return self._held
            self._is_hold_wanted = False
            if self._phase != "ended":
                why = "it has failed" if self._phase == "failed" else "it was let go of before it was held"
                raise RuntimeError(f"the learner's loop could not be held still for its state: {why}")
        self._sampler.flush()
        return self._algorithm.state() if self._last is None else self._last

    def release(self) -> bool:
        """Lets a held loop go on. Returns whether it was held until now: it goes on by itself after `HOLD_S`."""
        with self._turn:
            self._is_hold_wanted, self._held = False, None
            self._turn.notify_all()
            return not self._is_held_too_long

    def state(self) -> dict[str, Tensor]:
        """The algorithm's state between two turns; as `hold`, followed by `release`."""
        try:
            return self.hold()
        finally:
            self.release()

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
        """The algorithm's metrics since the last call. Waits for no update: during one, those that the end of an earlier one left.

        Empty where there are none; what they leave out comes with a later call.
        """
        with self._turn:
            found, self._report = self._report, None
            if self._updating:
                self._is_report_wanted = True
            elif found is None:
                found = self._algorithm.metrics()
            return found or {}

    @property
    def waiting_for(self) -> str | None:
        """What the loop waits for at this moment, and since when; None while it works."""
        since = self._waiting_since
        return None if since is None else f"a batch from replay for {time.perf_counter() - since:.0f} s"

    # --------------------------------------------------------------------------------------------------- its parts

    def _publish_first(self) -> None:
        if not self._published:
            self.publish()

    def _enter(self, phase: Literal["running", "ended", "failed"]) -> None:
        with self._turn:
            self._phase = phase
            self._turn.notify_all()

    def _agree(self, *, stop: bool, ready: bool) -> tuple[bool, bool, bool]:
        """Whether any learner stops, all have a batch, and any is to be held still."""
        if self._group is None:
            return stop, ready, self._is_hold_wanted
        start = time.perf_counter()
        # The extent of returns, which language models have no use for, is the largest of numbers that learners tell each other.
        agreed = self._group.agree(stop=stop, ready=ready, extent=(0.0, float(self._is_hold_wanted)))
        self._wait_s += time.perf_counter() - start
        return agreed.stop, agreed.ready, agreed.extent is not None and agreed.extent[1] > 0.0

    def _hold_still(self) -> None:
        """Gives the state to who asked for it, and waits for the release; the other learners of a group then wait for this one."""
        self._sampler.flush()
        if self._group is not None:
            self._agree(stop=False, ready=False)  # all have flushed
        if not (self._is_hold_wanted or self._algorithm.is_divided):
            return
        state = self._algorithm.state()
        with self._turn:
            if self._is_hold_wanted:
                self._held = state
                self._turn.notify_all()
                self._is_held_too_long = not self._turn.wait_for(lambda: not self._is_hold_wanted, HOLD_S)
                self._is_hold_wanted, self._held = False, None

    @contextmanager
    def _updates(self) -> Iterator[None]:
        """The algorithm changes within it."""
        with self._turn:
            self._updating = True
        try:
            yield
        finally:
            with self._turn:
                self._updating = False

    def _update(self, batch: QueueBatch) -> None:
        self._waiting_since = None
        with self._updates():
            start = time.perf_counter()
            self._algorithm.update(batch.rows)
            self._sampler.acknowledge(batch)
            self._update_s += time.perf_counter() - start
            if self._is_report_wanted:
                self._is_report_wanted = False
                self._report = self._algorithm.metrics()
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
