"""One shard of a replay table: storage, uniform selector, pace, and the writers it knows.

The class is the same behind the Arrow Flight server (`replay.server`) and in the one-process mode, where it is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .files import StorageFile
from .limiter import Clock, Limiter, RateLimiter, Side
from .schema import SchemaError, StepSchema, WindowBatch
from .storage import NONE, SegmentStorage

MAX_LANES_PER_WRITER = 65_536
LEASE_S = 90.0  # a writer away for longer is taken for dead; writers give up trying before that
_RARE = 32  # rows in use per item beyond which items are listed and not guessed at


@dataclass
class _Writer:
    last_sequence: int = -1
    lanes: np.ndarray = field(default_factory=lambda: np.full(0, NONE, np.int64))  # the writer's lane → storage lane
    connections: int = 0
    seen: float = field(default_factory=time.monotonic)


class WriterClosedError(ValueError):
    """Rows from a writer that has closed or whose lease has ended."""


@dataclass(frozen=True)
class ShardSpec:
    """Everything a shard needs to start."""

    schema: str  # StepSchema.to_json()
    run: str
    index: int
    capacity: int  # steps of this shard
    segment_steps: int
    samples_per_insert: float
    min_size: int
    error_buffer: float
    seed: int
    directory: str
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    limiter_address: str | None = None  # Flight address of shard 0; None on shard 0 itself
    insert_block: int = 64  # credits that another shard than 0 leases from the limiter at once
    sample_block: int = 256
    lease_s: float = LEASE_S  # how long a writer may be away

    def limiter(self) -> RateLimiter:
        """The limiter of the table, for its first shard."""
        return RateLimiter(
            samples_per_insert=self.samples_per_insert, min_size=self.min_size, error_buffer=self.error_buffer
        )


class Shard:
    """Storage and uniform selection of windows; thread-safe."""

    def __init__(
        self,
        schema: StepSchema,
        limiter: Limiter,
        *,
        index: int,
        capacity: int,
        segment_steps: int,
        seed: int,
        lease_s: float = LEASE_S,
        file: StorageFile | None = None,
    ) -> None:
        """
        index: number of this shard in its table.
        capacity: steps it holds; rounded down to whole segments.
        lease_s: seconds that a writer may be away before its lanes are ended.
        file: where the rows lie; None keeps them in ordinary memory.
        """
        self.schema = schema
        self.limiter = limiter
        self.index = index
        self.clock = Clock()
        self._lease_s = lease_s
        self._file = file
        self._storage = SegmentStorage(
            schema,
            segments=capacity // segment_steps,
            segment_steps=segment_steps,
            memory=None if file is None else file.array(),
        )
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
        self._writers: dict[str, _Writer] = {}
        self._closed_writers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._grew = threading.Condition(self._lock)
        self.duplicates = 0
        self.leases_ended = 0
        self._sampled = 0

    @classmethod
    def from_spec(cls, spec: ShardSpec, limiter: Limiter) -> Shard:
        """A shard whose rows lie in a storage file.

        Raises:
            OSError: too little space for the file.
        """
        schema = StepSchema.from_json(spec.schema)
        size = spec.capacity // spec.segment_steps * spec.segment_steps * schema.dtype.itemsize
        return cls(
            schema,
            limiter,
            index=spec.index,
            capacity=spec.capacity,
            segment_steps=spec.segment_steps,
            seed=spec.seed,
            lease_s=spec.lease_s,
            file=StorageFile(spec.directory, run=spec.run, shard=spec.index, size=size),
        )

    # ---------------------------------------------------------------- writing

    def connect(self, writer: str) -> int:
        """A writer opens a stream. Returns the sequence number of its last batch applied, −1 for a new writer."""
        with self._lock:
            self._end_leases()
            if writer in self._closed_writers:
                raise WriterClosedError(
                    f"writer {writer} was closed (its lease is {self._lease_s:g} s); open a new one"
                )
            known = self._writers.setdefault(writer, _Writer())
            known.connections += 1
            return known.last_sequence

    def disconnect(self, writer: str, *, closed: bool) -> None:
        """A stream of a writer ended; `closed`: the writer is done, and its lanes end."""
        with self._lock:
            known = self._writers.get(writer)
            if known is None:
                return
            known.connections -= 1
            known.seen = time.monotonic()
            if closed:
                self._close_writer(writer)

    def end_writer(self, writer: str) -> None:
        """End the lanes of a writer that is known to be dead, without waiting for its lease to end."""
        with self._lock:
            if writer in self._writers:
                self._close_writer(writer)

    def insert(self, writer: str, sequence: int, lanes: np.ndarray, rows: np.ndarray, *, timeout_s: float) -> bool:
        """Apply a batch of steps once.

        lanes: int32 (n,), the writer's own lane numbers; rows: structured (n,), those of one lane in time order.
        Returns False when the limiter did not let it in within `timeout_s`: nothing changed, ask again. A batch whose
        sequence number was applied before is left out, and True returned.

        Raises:
            SchemaError: the rows' layout or the lane numbers do not fit.
            WriterClosedError: the writer is not connected, or its lease has ended.
        """
        if rows.dtype != self.schema.dtype:
            raise SchemaError(f"rows have the layout {rows.dtype}; the table expects {self.schema!r}")
        if len(lanes) != len(rows):
            raise SchemaError(f"{len(lanes)} lanes came with {len(rows)} rows; expected one lane for each row")
        if len(lanes) and not 0 <= int(lanes.min()) <= int(lanes.max()) < MAX_LANES_PER_WRITER:
            raise SchemaError(f"lanes {lanes.min()}…{lanes.max()} lie outside 0…{MAX_LANES_PER_WRITER - 1}")
        with self._lock:
            if sequence <= self._known(writer).last_sequence:
                self.duplicates += 1
                return True
        # An episode's last row is no insert. The newest row of a lane is one, though it can be drawn only after the next.
        wanted = len(rows) - int(np.count_nonzero(rows["is_last"]))
        with self.clock.state("wait_insert_s"):
            if not self.limiter.acquire("insert", wanted, timeout_s=timeout_s):
                return False
        with self._lock, self.clock.state("insert_s"):
            try:
                known = self._known(writer)
                if sequence <= known.last_sequence:  # an older stream of the writer applied it meanwhile
                    self.duplicates += 1
                    self.limiter.give_back("insert", wanted)
                    return True
                deleted = self._storage.items_deleted
                self._storage.append(self._storage_lanes(known, lanes), rows)
                known.last_sequence = sequence
                known.seen = time.monotonic()
            except Exception:
                self.limiter.give_back("insert", wanted)
                raise
            if self._storage.items_deleted != deleted:
                self.limiter.deleted(self._storage.items_deleted - deleted)
            self._grew.notify_all()
        return True

    def _known(self, writer: str) -> _Writer:
        known = self._writers.get(writer)
        if known is None:
            raise WriterClosedError(f"writer {writer} is not connected to shard {self.index}, or its lease has ended")
        return known

    def _storage_lanes(self, writer: _Writer, lanes: np.ndarray) -> np.ndarray:
        most = int(lanes.max(initial=-1))
        if most >= len(writer.lanes):
            grown = np.full(most + 1, NONE, np.int64)
            grown[: len(writer.lanes)] = writer.lanes
            writer.lanes = grown
        mapped: np.ndarray = writer.lanes[lanes]
        if (mapped == NONE).any():
            for lane in np.unique(lanes[mapped == NONE]).tolist():
                writer.lanes[lane] = self._storage.open_lane()
            mapped = writer.lanes[lanes]
        return mapped

    def _close_writer(self, writer: str) -> None:
        known = self._writers.pop(writer)
        self._closed_writers[writer] = known.last_sequence
        cut = sum(self._storage.close_lane(lane) for lane in known.lanes[known.lanes != NONE].tolist())
        self.limiter.give_back("insert", cut)

    def _end_leases(self) -> None:
        now = time.monotonic()
        for name, known in list(self._writers.items()):
            if known.connections <= 0 and now - known.seen > self._lease_s:
                self._close_writer(name)
                self.leases_ended += 1

    # --------------------------------------------------------------- sampling

    def sample(self, count: int, horizon: int, *, timeout_s: float) -> WindowBatch | None:
        """Windows of up to `horizon` steps, drawn uniformly with replacement over the shard's items.

        `probability` is the share inside this shard. None: not allowed, or nothing stored, within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self.clock.state("wait_sample_s"):
            with self._lock:
                if not self._grew.wait_for(lambda: self._storage.items > 0, timeout_s):
                    return None
            if not self.limiter.acquire("sample", count, timeout_s=max(0.0, deadline - time.monotonic())):
                return None
        with self._lock, self.clock.state("sample_s"):
            storage = self._storage
            if storage.items == 0:  # recycled meanwhile
                self.limiter.give_back("sample", count)
                return None
            start = self._draw(count)
            rows, length = storage.windows(start, horizon)
            self._sampled += count
            return WindowBatch(
                steps=storage.gather(rows),
                length=length,
                item=storage.item_ids(start),
                shard=np.full(count, self.index, np.int32),
                probability=np.full(count, 1.0 / storage.items),
            )

    def _draw(self, count: int) -> np.ndarray:
        """Items, uniformly with replacement: row numbers, those that are no item thrown away."""
        storage, bound = self._storage, self._storage.rows_in_use
        if storage.items * _RARE < bound:
            rows = np.flatnonzero(storage.is_item[:bound])
            return rows[self._rng.integers(0, len(rows), size=count)]
        drawn = np.empty(0, np.int64)
        while len(drawn) < count:
            share = storage.items / bound
            guess = self._rng.integers(0, bound, size=int((count - len(drawn)) / share * 1.1) + 8)
            drawn = np.concatenate([drawn, guess[storage.is_item[guess]]])
        return drawn[:count]

    def unused(self, count: int) -> None:
        """Give back samples that were drawn and never used."""
        self.limiter.give_back("sample", count)
        with self._lock:
            self._sampled -= count

    # ------------------------------------------------------------------ state

    @property
    def items(self) -> int:
        """Windows that can be drawn: the shard's mass."""
        return self._storage.items

    @property
    def inserted(self) -> int:
        """Items inserted over the shard's life."""
        return self._storage.items_inserted

    def stats(self) -> dict[str, Any]:
        """Counters since the shard's start, seconds per state, and what it waits for."""
        with self._lock:
            self._end_leases()
            storage = self._storage
            found: dict[str, Any] = {
                "items": storage.items,
                "inserted": storage.items_inserted,
                "deleted": storage.items_deleted,
                "sampled": self._sampled,
                "capacity": len(storage.rows),
                "writers": len(self._writers),
                "duplicates": self.duplicates,
                "leases_ended": self.leases_ended,
            }
        found.update({f"time/{state}": seconds for state, seconds in self.clock.seconds().items()})
        sides: tuple[tuple[str, Side], ...] = (("writer", "insert"), ("sampler", "sample"))
        found["waiting"] = [
            f"{who} for {seconds:.0f} s: waiting for {self.limiter.why(side)}"
            for who, side in sides
            if (seconds := self.clock.longest(f"wait_{side}_s")) > 1.0
        ]
        return found

    def copy(self) -> tuple[dict[str, int], Iterator[tuple[int, int, np.ndarray]]]:
        """The shard as it stands: its counters, and its segments, oldest first.

        A segment is (sequence, sequence of the lane's next segment or NONE, rows). Steps that come in while the caller
        iterates are left out, segments recycled meanwhile skipped. The lock is held for one copy at a time, so that
        writers and samplers are hardly held up.
        """
        with self._lock:
            filled = self._storage.filled()
            counters = {"inserted": self._storage.items_inserted, "sampled": self._sampled}

        def segments() -> Iterator[tuple[int, int, np.ndarray]]:
            for segment, sequence, count in filled:
                with self._lock:
                    if not self._storage.still(segment, sequence):
                        continue
                    start = segment * self._storage.segment_steps
                    following = self._storage.next_sequence(segment)
                    rows = self._storage.gather(np.arange(start, start + count))
                yield sequence, following, rows

        return counters, segments()

    def restore(self, segments: Iterator[tuple[int, int, np.ndarray]], counters: dict[str, int]) -> None:
        """Fill an empty shard from a `copy`, every lane closed, and take over its counters.

        The limiter's counters are the caller's to restore.
        """
        with self._lock:
            if self._storage.items_inserted:
                raise ValueError(
                    f"shard {self.index} holds {self._storage.items_inserted} steps; only an empty one can be restored"
                )
            lane_of: dict[int, int] = {}  # sequence of the next segment of a lane → lane
            for sequence, following, rows in segments:
                lane = lane_of.pop(sequence, NONE)
                if lane == NONE:
                    lane = self._storage.open_lane()
                self._storage.append(np.full(len(rows), lane), rows)
                if following == NONE:
                    self._storage.close_lane(lane)
                else:
                    lane_of[following] = lane
            for lane in lane_of.values():  # their next segment was recycled while the copy was made
                self._storage.close_lane(lane)
            self._storage.items_inserted = counters["inserted"]
            self._storage.items_deleted = counters["inserted"] - self._storage.items
            self._sampled = counters["sampled"]
            self._grew.notify_all()

    def close(self) -> None:
        """Remove the storage file."""
        if self._file is not None:
            self._file.close()
