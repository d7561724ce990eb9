"""The loop around an algorithm: prefetch batches, update, publish weights; and where its time goes."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

from replay.schema import WindowBatch

Staged = TypeVar("Staged")
POLL_S = 0.25  # longest time that a thread takes to see that the loop has ended
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


class Sampler(Protocol):
    """Where batches come from."""

    def sample(self, timeout_s: float) -> WindowBatch:
        """Blocks for the next batch; raises TimeoutError after `timeout_s`, losing nothing."""
        ...

    def close(self) -> None: ...


class Algorithm(Protocol[Staged]):
    """What the loop drives; `Sac` is one."""

    @property
    def updates(self) -> int:
        """Updates made, over all restarts."""
        ...

    def stage(self, batch: WindowBatch) -> Staged:
        """The batch on the learner's device; called in the prefetch thread."""
        ...

    def update(self, batch: Staged) -> None: ...

    def check_finite(self) -> None:
        """Raises FloatingPointError if a loss was not finite."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def policy_bytes(self) -> bytes: ...


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


class _Publisher:
    """Hands weights to a slow callable in its own thread. Only the newest version waits: it replaces an older one."""

    def __init__(self, publish: Callable[[int, bytes], None]) -> None:
        self._publish = publish
        self._changed = threading.Condition()
        self._waiting: tuple[int, bytes] | None = None
        self._closed = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="publish", daemon=True)
        self._thread.start()

    def put(self, version: int, data: bytes) -> None:
        with self._changed:
            self._waiting = (version, data)
            self._changed.notify()

    def close(self) -> None:
        """Returns once the newest version is published (or publishing failed)."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._waiting is None:
                    return
                (version, data), self._waiting = self._waiting, None
            try:
                self._publish(version, data)
            except BaseException as error:
                self.error = error
                return


class LearnerLoop(Generic[Staged]):
    """Draws batches, updates the algorithm and publishes its weights every `publish_every` updates.

    `run` does so until told to end, sampling and publishing in threads of their own; `step` does one update with none, in
    lock step with its caller. The first weights are published as `version` before the first update, each later publication
    raises the version by one. Weights are checked to be finite before they are published.
    """

    def __init__(
        self,
        algorithm: Algorithm[Staged],
        sampler: Sampler,
        *,
        publish: Callable[[int, bytes], None],
        publish_every: int,
        prefetch: int,
        version: int = 0,
    ) -> None:
        """`prefetch` batches wait on the device at most; `version` is that of the first publication."""
        self._algorithm = algorithm
        self._sampler = sampler
        self._publish_callable = publish
        self._publish_every = publish_every
        self._next_version = version
        self._published = False
        self._since_publish = 0
        self._batches: queue.Queue[Staged] = queue.Queue(prefetch)
        self._publisher: _Publisher | None = None
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
        publisher = self._publisher = _Publisher(self._publish_callable)
        self._prefetch_error = None
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            prefetcher.start()
            while not until.is_set():
                batch = self._next(until)
                if batch is not None:
                    self._update(batch)
                if publisher.error is not None:
                    break
            self._algorithm.check_finite()
        finally:
            ended.set()
            if prefetcher.is_alive():
                prefetcher.join()
            publisher.close()
            self._publisher = None
            self._wall_s, self._running_since = self._wall(), None
        if publisher.error is not None:
            raise publisher.error

    def step(self, timeout_s: float = 60.0) -> None:
        """One update in the calling thread, publication included; raises TimeoutError if no batch came in `timeout_s`."""
        self._running_since = time.perf_counter()
        try:
            self._publish_first()
            self._waiting_since = time.perf_counter()
            batch = self._sampler.sample(timeout_s)
            self._wait_s += time.perf_counter() - self._waiting_since
            self._update(self._algorithm.stage(batch))
        finally:
            self._waiting_since = None
            self._wall_s, self._running_since = self._wall(), None

    def publish(self) -> int:
        """Publishes the weights now and returns their version; a running loop does so by itself."""
        start = time.perf_counter()
        self._algorithm.check_finite()
        version = self._next_version
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

    @property
    def waiting_for(self) -> str | None:
        """What the loop waits for at this moment, and since when; None while it works."""
        since = self._waiting_since
        return None if since is None else f"a batch from replay for {time.perf_counter() - since:.0f} s"

    # --------------------------------------------------------------------------------------------------- its parts

    def _publish_first(self) -> None:
        if not self._published:
            self.publish()

    def _update(self, batch: Staged) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._holders == 0)
            self._updating = True
        try:
            start = time.perf_counter()
            self._algorithm.update(batch)
            self._update_s += time.perf_counter() - start
            self._since_publish += 1
            if self._since_publish >= self._publish_every:
                self.publish()
        finally:
            with self._turn:
                self._updating = False
                self._turn.notify_all()

    def _next(self, until: threading.Event) -> Staged | None:
        """The next prefetched batch; None when the loop was told to end first. Raises what ended the prefetch thread."""
        start = self._waiting_since = time.perf_counter()
        try:
            while not until.is_set():
                error = self._prefetch_error  # read before the queue: batches sampled before the error are used first
                try:
                    return self._batches.get(timeout=0.0 if error else POLL_S)
                except queue.Empty:
                    if error is not None:
                        raise error from None
            return None
        finally:
            self._waiting_since = None
            self._wait_s += time.perf_counter() - start

    def _prefetch(self, ended: threading.Event) -> None:
        try:
            while not ended.is_set():
                try:
                    batch = self._algorithm.stage(self._sampler.sample(POLL_S))
                except TimeoutError:
                    continue
                # A batch that finds no room when the loop ends stays out: the sampler has drawn it, nobody learns from it.
                while not ended.is_set():
                    try:
                        self._batches.put(batch, timeout=POLL_S)
                        break
                    except queue.Full:
                        pass
        except BaseException as error:
            self._prefetch_error = error

    def _wall(self) -> float:
        since = self._running_since
        return self._wall_s + (0.0 if since is None else time.perf_counter() - since)
