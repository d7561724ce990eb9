"""The pace of sampling against inserting, for one table over all its shards.

With I items inserted and S sampled over the table's life, I·spi − S may stray from its value at `min_size` by the error
buffer: sampling waits when it is too far ahead, inserting when sampling is too far behind (after Cassirer et al. 2021,
"Reverb", arXiv 2102.04736, §3.4). The limiter lives on the table's first shard; the others lease credits from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

Side = Literal["insert", "sample"]


class Limiter(Protocol):
    """Where a shard asks before it inserts or samples."""

    def acquire(self, side: Side, count: int, *, timeout_s: float) -> bool:
        """Ask for `count` items; waits up to `timeout_s`. False: not granted, nothing changed."""

    def give_back(self, side: Side, count: int) -> None:
        """Return what was asked for and not used."""

    def deleted(self, count: int) -> None:
        """Tell of items that were overwritten."""

    def why(self, side: Side) -> str:
        """What the side waits for, in words."""


class RateLimiter:
    """Samples per insert with an error buffer and a minimum size."""

    def __init__(self, *, samples_per_insert: float, min_size: int, error_buffer: float) -> None:
        """
        samples_per_insert: items sampled per item inserted.
        min_size: items in the table before the first sample.
        error_buffer: samples by which either side may be ahead.
        """
        self.samples_per_insert = samples_per_insert
        self.min_size = min_size
        self.low = min_size * samples_per_insert - error_buffer
        self.high = min_size * samples_per_insert + error_buffer
        self.inserted = 0
        self.sampled = 0
        self.removed = 0
        self._changed = threading.Condition()

    def _allows(self, side: Side, count: int) -> bool:
        if side == "sample":
            lead = self.inserted * self.samples_per_insert - self.sampled - count
            return self.inserted - self.removed >= self.min_size and lead >= self.low
        inserted = self.inserted + count
        return (
            inserted - self.removed <= self.min_size or inserted * self.samples_per_insert - self.sampled <= self.high
        )

    def acquire(self, side: Side, count: int, *, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._allows(side, count):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            self._add(side, count)
            return True

    def acquire_block(self, side: Side, count: int, block: int, *, timeout_s: float) -> int:
        """Ask for `count` items, and for as many as `block` where that is allowed at once. Returns how many were granted."""
        if block > count and self.acquire(side, block, timeout_s=0.0):
            return block
        return count if self.acquire(side, count, timeout_s=timeout_s) else 0

    def _add(self, side: Side, count: int) -> None:
        if side == "insert":
            self.inserted += count
        else:
            self.sampled += count
        self._changed.notify_all()

    def give_back(self, side: Side, count: int) -> None:
        with self._changed:
            self._add(side, -count)

    def deleted(self, count: int) -> None:
        with self._changed:
            self.removed += count
            self._changed.notify_all()

    def restore(self, *, inserted: int, sampled: int, removed: int) -> None:
        """Set the counters, after a restart."""
        with self._changed:
            self.inserted, self.sampled, self.removed = inserted, sampled, removed
            self._changed.notify_all()

    def why(self, side: Side) -> str:
        size = self.inserted - self.removed
        if side == "sample" and size < self.min_size:
            return f"actors to insert: the table holds {size} of the {self.min_size} steps of replay.min_size"
        if side == "sample":
            return f"actors to insert: {self.sampled} samples drawn, as many as {self.inserted} inserts allow"
        return f"the learner to sample: {self.sampled} samples drawn, too few for more than {self.inserted} inserts (replay.error_buffer)"


class LeasedLimiter:
    """A shard's share of a limiter that lives on another shard: credits leased in blocks."""

    def __init__(
        self, lease: Callable[[Side, int, int, int, float], tuple[int, str]], *, insert_block: int, sample_block: int
    ) -> None:
        """
        lease: (side, count, block, deleted since the last call, timeout in seconds) → granted, as
            `RateLimiter.acquire_block`, and what is waited for if none; asks the limiter's shard.
        insert_block, sample_block: items leased at once. What is leased and not used is the limiter's stated error.
        """
        self._lease = lease
        self._block: dict[Side, int] = {"insert": insert_block, "sample": sample_block}
        self._credits: dict[Side, int] = {"insert": 0, "sample": 0}
        self._why: dict[Side, str] = {"insert": "", "sample": ""}
        self._deleted = 0
        self._lock = threading.Lock()
        self._asking: dict[Side, threading.Lock] = {"insert": threading.Lock(), "sample": threading.Lock()}

    def _take(self, side: Side, count: int) -> bool:
        with self._lock:
            if self._credits[side] < count:
                return False
            self._credits[side] -= count
            return True

    def acquire(self, side: Side, count: int, *, timeout_s: float) -> bool:
        if self._take(side, count):
            return True
        with self._asking[side]:
            if self._take(side, count):
                return True
            with self._lock:
                deleted, self._deleted = self._deleted, 0
            try:
                granted, self._why[side] = self._lease(side, count, self._block[side], deleted, timeout_s)
            except Exception:
                with self._lock:
                    self._deleted += deleted
                raise
            if granted == 0:
                return False
            with self._lock:
                self._credits[side] += granted - count
            return True

    def give_back(self, side: Side, count: int) -> None:
        with self._lock:
            self._credits[side] += count

    def deleted(self, count: int) -> None:
        with self._lock:
            self._deleted += count

    def why(self, side: Side) -> str:
        return self._why[side] or "credits of the table's limiter, on shard 0"


class Clock:
    """Seconds spent in named states, summed over threads, and who waits now. A thread is in one state at a time."""

    _GAP_S = 0.05  # who asks again within this time has waited all along

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._inside: dict[int, tuple[str, float, float]] = {}  # thread → (state, since, waiting since)
        self._last: dict[int, tuple[str, float, float]] = {}  # thread → (state, waiting since, until)
        self._lock = threading.Lock()

    @contextmanager
    def state(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        begin, token = time.monotonic(), threading.get_ident()
        with self._lock:
            last, since, until = self._last.get(token, ("", 0.0, 0.0))
            since = since if last == name and begin - until < self._GAP_S else begin
            self._inside[token] = (name, begin, since)
        try:
            yield
        finally:
            end = time.monotonic()
            with self._lock:
                del self._inside[token]
                self._last[token] = (name, since, end)
                self._seconds[name] = self._seconds.get(name, 0.0) + end - begin

    def seconds(self) -> dict[str, float]:
        """Seconds in each state, those still going on included, and `wall_s` since the start."""
        now = time.monotonic()
        with self._lock:
            total = dict(self._seconds)
            for name, begin, _ in self._inside.values():
                total[name] = total.get(name, 0.0) + now - begin
        return {**total, "wall_s": now - self._started}

    def longest(self, name: str) -> float:
        """Seconds that some thread has now been in state `name`, short breaks left out; 0 when none is."""
        now = time.monotonic()
        with self._lock:
            return max((now - since for state, _, since in self._inside.values() if state == name), default=0.0)
