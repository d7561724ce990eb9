"""The loop around an algorithm: prefetch batches, update, write priorities back, publish weights; and where its time goes."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from learners.distributed import Agreement, Group
from learners.priorities import Importance, Prioritised, TaskLosses, WriteBack, has_tasks
from learners.publisher import Publisher
from replay.schema import WindowBatch

Staged = TypeVar("Staged")
POLL_S = 0.25  # longest time that a thread takes to see that the loop has ended
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
Extent = tuple[float, float]


class Sampler(Prioritised, Protocol):
    """Where windows come from."""

    def sample(self, timeout_s: float) -> WindowBatch:
        """Blocks for the next windows; raises TimeoutError after `timeout_s`, losing nothing."""
        ...

    def close(self) -> None: ...


class Algorithm(Protocol[Staged]):
    """What the loop drives; `Sac` is one."""

    @property
    def updates(self) -> int:
        """Updates made, over all restarts."""
        ...

    def stage(self, batch: WindowBatch, weights: np.ndarray | None = None) -> Staged:
        """The windows of a call, those of its first update first, on the learner's device; called in the prefetch thread.

        weights: float32 (windows,), at most 1 in each update: importance weights of prioritised windows, and 1 for each window
            where its error is wanted all the same. None: all are 1.
        """
        ...

    def update(self, batch: Staged) -> Tensor | None:
        """The updates of one call. Where the batch has weights, returns |delta| of its windows, (windows,), on the device; an
        algorithm that returns None has neither priorities nor losses of tasks."""
        ...

    def observe_returns(self, low: float, high: float) -> None:
        """The lowest and highest discounted return that actors have met, called between updates when they have changed."""
        ...

    def check_finite(self) -> None:
        """Raises FloatingPointError, with the statistics of the batches, if a loss was not finite."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def policy_bytes(self) -> bytes: ...

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything needed to go on exactly."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state` was taken; raises ValueError, changing nothing, if it is of another algorithm."""
        ...


def set_threads(cpus: float, threads: int) -> int:
    """Sets up the calling process and thread for updates; call it first in the thread that runs them.

    `threads` torch threads, or as many as the process was given `cpus` if 0. Returns the number set.
    """
    # More threads than cores left free is a disaster, not a loss: OpenMP's waiting threads spin, and beside one other busy
    # process two threads on two cores fell to a tenth of the updates of one.
    count = threads or max(1, int(cpus))
    torch.set_num_threads(count)
    # The Adam moments of dead ReLU units decay into denormal numbers and stay there; each costs a hundred cycles.
    torch.set_flush_denormal(True)
    # glibc gives large freed blocks back to the system and faults every page again: 600 faults and an eighth of the
    # time of each update. A learner asks for the same blocks again at once, so it keeps them.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 28)
        mallopt(M_TRIM_THRESHOLD, 1 << 28)
    return count


@dataclass(frozen=True)
class _Call(Generic[Staged]):
    """What one call of the algorithm learns from; `windows` where their errors are wanted."""

    staged: Staged
    windows: WindowBatch | None


def _nowhere(version: int, data: bytes) -> None:
    pass


class LearnerLoop(Generic[Staged]):
    """Draws windows, updates the algorithm and publishes its weights every `publish_every` updates.

    `run` does so until told to end, sampling and publishing in threads of their own; `step` does one call with none, in
    lock step with its caller. A call makes `updates_per_call` updates on windows drawn together. The first weights are
    published as `version` before the first update, each later publication raises the version by one. Weights are checked to
    be finite before they are published. Learners of a group make the same updates and end after the same one.
    """

    def __init__(
        self,
        algorithm: Algorithm[Staged],
        sampler: Sampler,
        *,
        publish: Callable[[int, bytes], None] | None,
        publish_every: int,
        prefetch: int,
        version: int = 0,
        updates_per_call: int = 1,
        importance: Importance | None = None,
        group: Group | None = None,
    ) -> None:
        """
        publish: takes a version and its weights; None on all learners of a group but the first.
        prefetch: calls whose windows wait on the device at most.
        version: that of the first publication.
        importance: of a prioritised table: windows get weights, and their errors go back as priorities.
        group: the learners that this one is one of.
        """
        self._algorithm = algorithm
        self._sampler = sampler
        self._publish_callable = publish
        self._publish_every = publish_every
        self._next_version = version
        self._published = False
        self._since_publish = 0
        self._updates_per_call = updates_per_call
        self._importance = importance
        self._group = group
        self._losses = TaskLosses()
        self._write_back = WriteBack(None if importance is None else sampler, self._losses)
        self._staged = algorithm.updates  # updates whose windows were staged
        self._told: Extent | None = None  # returns that actors have met, as far as this learner was told
        self._observed: Extent | None = None  # those that the algorithm knows of
        self._batches: queue.Queue[_Call[Staged]] = queue.Queue(prefetch)
        self._publisher: Publisher | None = None
        self._prefetch_error: BaseException | None = None
        self._turn = threading.Condition()
        self._updating = False
        self._holders = 0
        self._waiting_since: float | None = None
        self._update_s = self._wait_s = self._publish_s = self._wall_s = 0.0
        self._running_since: float | None = None

    # ------------------------------------------------------------------------------------------------- running it

    def run(self, until: threading.Event) -> None:
        """Updates until `until` is set, then publishes what is waiting and returns.

        Raises what the sampler or `publish` raised, and FloatingPointError after a loss that was not finite.
        """
        ended = threading.Event()
        prefetcher = threading.Thread(target=self._prefetch, args=(ended,), name="prefetch", daemon=True)
        publisher = self._publisher = Publisher(self._publish_callable or _nowhere)
        self._prefetch_error = None
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            prefetcher.start()
            call: _Call[Staged] | None = None
            while True:
                call = call or self._next(until)
                agreed = self._agree(stop=until.is_set() or publisher.error is not None, ready=call is not None)
                if agreed.stop:
                    break
                self._observe(agreed.extent)
                if agreed.ready and call is not None:
                    self._update(call)
                    call = None
            self._write_back.flush()
            self._algorithm.check_finite()
        finally:
            ended.set()
            if prefetcher.is_alive():
                prefetcher.join()
            publisher.close()
            self._publisher = self._waiting_since = None
            self._wall_s, self._running_since = self._wall(), None
        if publisher.error is not None:
            raise publisher.error

    def step(self, timeout_s: float = 60.0) -> None:
        """One call in the calling thread, publication and priorities included, without a group.

        Raises TimeoutError if no windows came in `timeout_s`.
        """
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            self._waiting_since = time.perf_counter()
            batch = self._sampler.sample(timeout_s)
            self._wait_s += time.perf_counter() - self._waiting_since
            self._observe(self._told)
            self._update(self._stage(batch))
            self._write_back.flush()
        finally:
            self._waiting_since = None
            self._wall_s, self._running_since = self._wall(), None

    def publish(self) -> int:
        """Publishes the weights now and returns their version; a running loop does so by itself."""
        start = time.perf_counter()
        self._algorithm.check_finite()
        version = self._next_version
        if self._publish_callable is not None:
            data = self._algorithm.policy_bytes()
            if self._publisher is not None:
                self._publisher.put(version, data)
            else:
                self._publish_callable(version, data)
        self._next_version = version + 1
        self._published = True
        self._since_publish = 0
        self._publish_s += time.perf_counter() - start
        return version

    def tell_returns(self, low: float, high: float) -> None:
        """The lowest and highest discounted return that actors have met; the algorithm hears of them before its next update."""
        self._told = (low, high)

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
        """Cumulative: updates over all restarts; seconds of this loop spent updating, waiting for batches, publishing and
        in all; the newest published version (-1: none). On a GPU an update is launched, not awaited: its time shows up
        where the loop next waits for the device, in publish_s."""
        return {
            "updates": float(self._algorithm.updates),
            "update_s": self._update_s,
            "wait_s": self._wait_s,
            "publish_s": self._publish_s,
            "wall_s": self._wall(),
            "version": float(self._next_version - 1) if self._published else -1.0,
        }

    def metrics(self) -> dict[str, float]:
        """The algorithm's metrics since the last call, taken between two updates; raises FloatingPointError as it does."""
        with self.between_updates():
            return self._algorithm.metrics()

    def task_losses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Numbers of the tasks that were learnt from since the last call, int64 (n,); sums of |delta| of their windows,
        float64 (n,), as the algorithm returns them for priorities (R2D2: its mixture of a sequence's largest and mean error);
        and of how many windows, int64 (n,). Any thread; it waits for no update.

        None where rows have no tasks, nothing was learnt, or the algorithm returns no errors. Of several learners each tells
        of its own windows, a fair sample of all. Windows are as they were drawn: from a prioritised table rather those with
        large errors. One that nothing is learnt from, because a time limit cut its chunk short, counts with an error of 0.
        """
        return self._losses.take()

    @property
    def waiting_for(self) -> str | None:
        """What the loop waits for at this moment, and since when; None while it works."""
        since = self._waiting_since
        return None if since is None else f"a batch from replay for {time.perf_counter() - since:.0f} s"

    # --------------------------------------------------------------------------------------------------- its parts

    def _publish_first(self) -> None:
        if not self._published:
            self.publish()

    def _agree(self, *, stop: bool, ready: bool) -> Agreement:
        if self._group is None:
            return Agreement(stop, ready, self._told)
        start = time.perf_counter()
        agreed = self._group.agree(stop=stop, ready=ready, extent=self._told)
        self._wait_s += time.perf_counter() - start
        return agreed

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

    def _observe(self, extent: Extent | None) -> None:
        if extent is not None and extent != self._observed:
            with self._updates():
                self._algorithm.observe_returns(*extent)
            self._observed = extent

    def _stage(self, batch: WindowBatch) -> _Call[Staged]:
        count, importance = self._updates_per_call, self._importance
        first, self._staged = self._staged, self._staged + count
        if importance is not None:
            weights = importance.weights(batch, update=first, calls=count)
        elif has_tasks(batch):
            weights = np.ones(len(batch), np.float32)  # errors are returned of windows with weights
        else:
            return _Call(self._algorithm.stage(batch), None)
        return _Call(self._algorithm.stage(batch, weights), batch)

    def _update(self, call: _Call[Staged]) -> None:
        with self._updates():
            start, before = time.perf_counter(), self._algorithm.updates
            delta = self._algorithm.update(call.staged)
            if call.windows is not None and delta is not None:
                self._write_back.put(call.windows, delta)
            self._update_s += time.perf_counter() - start
            self._since_publish += self._algorithm.updates - before
            if self._since_publish >= self._publish_every:
                self.publish()

    def _next(self, until: threading.Event) -> _Call[Staged] | None:
        """The next prefetched windows; None when the loop was told to end first, and in a group when none have come for a
        while, so that the others can be told. Raises what ended the prefetch thread."""
        start = time.perf_counter()
        if self._waiting_since is None:
            self._waiting_since = start
        try:
            while not until.is_set():
                error = self._prefetch_error  # read before the queue: batches sampled before the error are used first
                try:
                    call = self._batches.get(timeout=0.0 if error else POLL_S)
                    self._waiting_since = None
                    return call
                except queue.Empty:
                    if error is not None:
                        raise error from None
                    if self._group is not None:
                        return None
            return None
        finally:
            self._wait_s += time.perf_counter() - start

    def _prefetch(self, ended: threading.Event) -> None:
        try:
            while not ended.is_set():
                try:
                    call = self._stage(self._sampler.sample(POLL_S))
                except TimeoutError:
                    continue
                # A batch that finds no room when the loop ends stays out: the sampler has drawn it, nobody learns from it.
                while not ended.is_set():
                    try:
                        self._batches.put(call, timeout=POLL_S)
                        break
                    except queue.Full:
                        pass
        except BaseException as error:
            self._prefetch_error = error

    def _wall(self) -> float:
        since = self._running_since
        return self._wall_s + (0.0 if since is None else time.perf_counter() - since)
