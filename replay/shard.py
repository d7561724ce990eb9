"""One shard of a replay service: its storage, its part of every table, and the writers it knows.

The class is the same behind the Arrow Flight server (`replay.server`) and in the one-process mode, where it is called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from . import kernels
from .buffers import buffers
from .clock import log_waits
from .copies import SegmentCopy, TableCopy
from .files import StorageFile
from .gather import WindowReader
from .guests import GuestLimits
from .handover import HandedOver, HandOver, HandOverError, Plan, ask_room, make_plan
from .kernels import NONE
from .layout import Layout, TableSpec
from .limiter import Limiter, RateLimiter
from .queue_spec import QueueSpec
from .rate_limit import RateLimit
from .receiving import Part
from .restoring import Receiver, restore
from .schema import SchemaError, StepSchema, Window, WindowBatch
from .security import Security
from .storage import SegmentStorage
from .tables import Draw, Table
from .wire import RETRY_S

MAX_LANES_PER_WRITER = 65_536
LEAVES, LEFT = 1, 2  # `SegmentStorage.leaving`
LEASE_S = 90.0  # a writer away for longer is taken for dead; writers give up trying before that


class WriterClosedError(ValueError):
    """Rows from a writer that has closed or whose lease has ended."""


class ShardLeavingError(WriterClosedError):
    """A new writer to a shard that leaves its service."""


@dataclass(frozen=True)
class ShardSpec:
    """Everything a shard needs to start."""

    schema: str  # StepSchema.to_json()
    run: str
    index: int
    capacity: int  # steps of this shard
    segment_steps: int
    seed: int
    directory: str
    tables: tuple[TableSpec, ...] = (TableSpec(),)
    limits: tuple[RateLimit, ...] = (RateLimit.from_min_size(1),)  # of each table, over all shards
    queues: tuple[QueueSpec, ...] = ()  # queue tables of rows of variable length, this shard's part
    stack: int = 1  # frames that readers will stack: items that lack one are none
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    limiter_address: str | None = None  # Flight address of shard 0; None on shard 0 itself
    insert_block: int = 64  # credits that another shard than 0 leases from a limiter at once
    sample_block: int = 256
    lease_s: float = LEASE_S  # how long a writer may be away
    guests: GuestLimits = field(default_factory=GuestLimits)  # what each writer outside the run may do

    def __post_init__(self) -> None:
        if len(self.tables) != len(self.limits):
            raise ValueError(f"expected a limit for each table, received {len(self.limits)} for {len(self.tables)}")

    @property
    def layout(self) -> Layout:
        """What the shard's storage looks like: the capacity in whole segments."""
        segments = self.capacity // self.segment_steps
        return Layout(StepSchema.from_json(self.schema), segments, self.segment_steps, self.tables)

    def limiters(self) -> dict[str, RateLimiter]:
        """The limiters of the tables, for the first shard."""
        return {table.name: RateLimiter(limit) for table, limit in zip(self.tables, self.limits, strict=True)}

    def to_json(self) -> dict[str, Any]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **found,
            "tables": [asdict(table) for table in self.tables],
            "limits": [limit.to_dict() for limit in self.limits],
            "queues": [queue.to_json() for queue in self.queues],
            "guests": self.guests.to_json(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> ShardSpec:
        tables = tuple(TableSpec(**table) for table in found["tables"])
        limits = tuple(RateLimit.from_dict(limit) for limit in found["limits"])
        queues = tuple(QueueSpec.from_json(queue) for queue in found["queues"])
        guests = GuestLimits.from_json(found["guests"])
        return cls(**{**found, "tables": tables, "limits": limits, "queues": queues, "guests": guests})


class FairLock:
    """A lock that a thread which lets go of it and wants it back at once leaves to those who wait."""

    def __init__(self) -> None:
        self._turn = threading.Lock()  # held by whoever is next
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As `threading.Lock.acquire`; the interface that a condition needs."""
        if not blocking:
            return self._lock.acquire(blocking=False)
        with self._turn:
            return self._lock.acquire()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _Together:
    """Context managers that keep no state of their own, entered together; threads share it."""

    def __init__(self, parts: Sequence[AbstractContextManager[None]]) -> None:
        self._parts = parts

    def __enter__(self) -> None:
        for part in self._parts:
            part.__enter__()

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            part.__exit__(None, None, None)


@dataclass
class _Writer:
    slot: int
    lanes: np.ndarray = field(default_factory=lambda: np.full(0, NONE, np.int64))  # the writer's lane → storage lane
    connections: int = 0
    seen: float = field(default_factory=time.monotonic)


class Progress(NamedTuple):
    """What a writer's batch comes upon.

    is_open: bool (n,), whether the lane of each row has an episode that has not ended.
    applied: rows of the batch that are applied already, before a crash; `is_open` holds after them.
    new_lanes: lanes of the batch that are not the writer's yet.
    """

    is_open: np.ndarray
    applied: int
    new_lanes: int


class Shard:
    """Storage and tables; thread-safe."""

    def __init__(
        self,
        layout: Layout,
        limiters: Mapping[str, Limiter],
        *,
        index: int,
        seed: int,
        stack: int = 1,
        lease_s: float = LEASE_S,
        file: StorageFile | None = None,
    ) -> None:
        """
        limiters: of each table, by name.
        index: number of this shard in its service.
        stack: frames that readers will stack.
        lease_s: seconds that a writer may be away before its lanes are ended.
        file: where everything lies; what a dead shard left in it is taken over. None keeps it in ordinary memory.

        Raises:
            StorageError: the file is no storage of this layout, or is damaged.
        """
        self.schema = layout.schema
        self.layout = layout
        self.index = index
        self._stack = stack
        self._lease_s = lease_s
        self._file = file
        self.recovered = file is not None and file.found
        self._storage = SegmentStorage(
            layout,
            memory=None if file is None else file.array(),
            recover=self.recovered,
            history=stack - 1 if layout.schema.large else 0,
            changed=self._changed,
        )
        self.tables = {
            spec.name: Table(spec, place, self._storage, limiters[spec.name], seed + index)
            for place, spec in enumerate(layout.tables)
        }
        self._storage.told()
        if self._storage.leaving:  # and was killed meanwhile
            self._stop_drawing()
        self._limited = list(self.tables.values())
        blocks = [table.clock.state("inserting") for table in self._limited]
        self._inserting = blocks[0] if len(blocks) == 1 else _Together(blocks)
        self._writers: dict[str, _Writer] = {}
        self._closed_writers: set[str] = set()
        self._receiver = Receiver(self._storage, self.tables)
        self._handing_over = threading.Lock()
        self._hand_over: HandOver | None = None
        self._find_writers()
        self._readers: dict[Window, WindowReader] = {}
        self._lock = FairLock()
        self._grew = threading.Condition(self._lock)  # type: ignore[arg-type]
        self.duplicates = 0
        self.leases_ended = 0

    @classmethod
    def from_spec(cls, spec: ShardSpec, limiters: Mapping[str, Limiter], *, recover: bool = False) -> Shard:
        """A shard whose storage lies in a file; `recover`: in that of the shard it takes the place of, if there is one.

        Raises:
            OSError: too little space for the file.
            StorageError: what is to be recovered is damaged.
        """
        layout = spec.layout
        marks = (
            0,
            layout.arrays["state"][0] + 8 * kernels.HEAD,
        )  # the magic, written last, and the first record applied
        file = StorageFile(spec.directory, run=spec.run, shard=spec.index, size=layout.size, keep=recover, marks=marks)
        try:
            return cls(
                layout,
                limiters,
                index=spec.index,
                seed=spec.seed,
                stack=spec.stack,
                lease_s=spec.lease_s,
                file=file,
            )
        except BaseException:
            file.close(remove=not file.found)
            raise

    def _find_writers(self) -> None:
        """The writers of a shard found after a crash; each has a lease from now on."""
        for name, (slot, is_open) in self._storage.find_writers().items():
            if not is_open:
                self._closed_writers.add(name)
                continue
            if self._storage.is_receiving(slot):
                continue
            lanes = self._storage.lanes_of(slot)
            known = self._writers[name] = _Writer(slot, np.full(max(lanes, default=-1) + 1, NONE, np.int64))
            for number, lane in lanes.items():
                known.lanes[number] = lane

    def _changed(self, gone: np.ndarray, new: np.ndarray) -> None:
        for table in self.tables.values():
            table.changed(gone, new)

    # ---------------------------------------------------------------- writing

    def connect(self, writer: str) -> int:
        """A writer opens a stream. Returns the sequence number of its last batch applied, −1 for a new writer.

        Raises:
            WriterClosedError: a writer of this name was closed, or it is new and the shard leaves.
            SchemaError: too many writers, or a name too long.
        """
        with self._lock:
            self._end_leases()
            if self.leaving and writer not in self._writers:
                raise ShardLeavingError(
                    f"expected no new writers, received {writer}: shard {self.index} leaves its service; write to another one"
                )
            if writer in self._closed_writers:
                raise WriterClosedError(
                    f"writer {writer} was closed (its lease is {self._lease_s:g} s); open a new one"
                )
            known = self._writers.get(writer)
            if known is None:
                known = self._writers[writer] = _Writer(self._storage.open_writer(writer))
            known.connections += 1
            return self._storage.last_sequence(known.slot)

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
        """End the lanes of a writer that is known to be dead, those of its later connections (`<writer>/…`) as well.

        Its lease is not waited for.
        """
        with self._lock:
            for name in [name for name in self._writers if name == writer or name.startswith(f"{writer}/")]:
                self._close_writer(name)

    def reopen_writer(self, writer: str) -> None:
        """Let a writer go on that was closed; one that is not is left alone."""
        with self._lock:
            if writer in self._closed_writers:
                self._closed_writers.remove(writer)
                slot, _ = self._storage.find_writers().get(writer, (NONE, False))
                if slot != NONE:  # not forgotten yet
                    self._storage.reopen_writer(slot)
                    self._writers[writer] = _Writer(slot)

    def progress(self, writer: str, sequence: int, lanes: np.ndarray) -> Progress | None:
        """What a batch would come upon, for a check before `insert`; None: it is applied already.

        lanes: int32 (n,), the writer's own lane numbers, whatever they are.

        Raises:
            WriterClosedError: the writer is not connected, or its lease has ended.
        """
        with self._lock:
            known = self._known(writer)
            if sequence <= self._storage.last_sequence(known.slot):
                return None
            mine = np.full(len(lanes), NONE, np.int64)
            in_range = (lanes >= 0) & (lanes < len(known.lanes))
            mine[in_range] = known.lanes[lanes[in_range]]
            return Progress(
                self._storage.has_open_episode(mine),
                self._storage.applied(known.slot, sequence, len(lanes)),
                len(np.unique(lanes[mine == NONE])),
            )

    def end_lanes(self, writer: str, lanes: np.ndarray | None, *, behind: int | None = None) -> list[int]:
        """End those of some lanes, int32 (n,), that are a writer's, or all of its lanes. Returns which; a row in them opens
        one anew.

        behind: number of the batch that they end behind. Where a later one was applied, this one has come again, and they
            ended the first time: nothing is done.
        """
        with self._lock:
            known = self._writers.get(writer)
            if known is None or not (behind is None or self._storage.is_newest(known.slot, behind)):
                return []
            mine = np.flatnonzero(known.lanes != NONE)
            if lanes is not None:
                mine = np.intersect1d(mine, lanes)
            lost = self._storage.coming_items(known.lanes[mine].tolist())
            for lane in mine.tolist():
                self._storage.close_lane(int(known.lanes[lane]))
                known.lanes[lane] = NONE
            self._take_back(lost.tolist())  # counted as inserts to come, which they will never be
            return [int(lane) for lane in mine]

    def count_lanes(self, prefix: str) -> int:
        """Lanes of the writers whose names begin so."""
        with self._lock:
            return sum(
                int(np.count_nonzero(known.lanes != NONE))
                for name, known in self._writers.items()
                if name.startswith(prefix)
            )

    def insert(self, writer: str, sequence: int, lanes: np.ndarray, rows: np.ndarray, *, timeout_s: float) -> bool:
        """Apply a batch of steps once.

        lanes: int32 (n,), the writer's own lane numbers; rows: structured (n,), those of one lane in time order.
        Returns False when a limiter did not let it in within `timeout_s`: nothing changed, ask again. A batch whose
        sequence number was applied before is left out, and True returned.

        Raises:
            SchemaError: the rows' layout or the lane numbers do not fit, a row begins an episode in a lane whose last one
                has not ended, or the batch is shorter than when a part of it was applied; nothing changed.
            WriterClosedError: the writer is not connected, or its lease has ended.
        """
        with self._lock:
            known = self._known(writer)
            if sequence <= self._storage.last_sequence(known.slot):
                self.duplicates += 1
                return True
            if rows.dtype != self.schema.dtype:
                raise SchemaError(f"rows have the layout {rows.dtype}, the table's schema is {self.schema.dtype}")
            if len(lanes) != len(rows):
                raise SchemaError(f"expected a lane for each row, received {len(lanes)} lanes and {len(rows)} rows")
            places, opened = self._storage_lanes(known, lanes)
            try:
                wanted = self._storage.count_items(known.slot, sequence, places, rows).tolist()
            except SchemaError:
                for lane in opened:
                    self._storage.close_lane(int(known.lanes[lane]))
                    known.lanes[lane] = NONE
                raise
        if not self._admit(wanted, timeout_s):
            return False
        try:
            with self._lock, self._inserting:
                known = self._known(writer)
                if sequence <= self._storage.last_sequence(known.slot):  # an older stream applied it meanwhile
                    self.duplicates += 1
                    self._take_back(wanted)
                    return True
                self._storage.append(known.slot, sequence, places, rows)
                known.seen = time.monotonic()
                self._grew.notify_all()
        except Exception:
            self._take_back(wanted)
            raise
        return True

    def _admit(self, wanted: Sequence[int], timeout_s: float) -> bool:
        """Ask every table's limiter."""
        for place, (table, count) in enumerate(zip(self._limited, wanted, strict=True)):
            if count == 0:
                continue
            if table.limiter.acquire("insert", count, count, timeout_s=0.0):
                continue
            with table.clock.state("waiting_for_samples"):
                granted = table.limiter.acquire("insert", count, count, timeout_s=timeout_s)
            log_waits(table.clock, table.limiter, table=table.spec.name)
            if not granted:
                self._take_back(wanted[:place])
                return False
        return True

    def _take_back(self, wanted: Sequence[int]) -> None:
        for table, count in zip(self._limited, wanted, strict=False):
            if count:
                table.limiter.give_back("insert", count)

    def _known(self, writer: str) -> _Writer:
        known = self._writers.get(writer)
        if known is None:
            raise WriterClosedError(f"writer {writer} is not connected to shard {self.index}, or its lease has ended")
        return known

    def _storage_lanes(self, writer: _Writer, lanes: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The storage's lanes for a writer's own, int64 (n,), and those of its own that were opened for it."""
        least, most = int(lanes.min(initial=0)), int(lanes.max(initial=-1))
        if least < 0 or most >= MAX_LANES_PER_WRITER:
            wrong = least if least < 0 else most
            raise SchemaError(f"expected lane numbers from 0 to {MAX_LANES_PER_WRITER - 1}, received {wrong}")
        if most >= len(writer.lanes):
            grown = np.full(most + 1, NONE, np.int64)
            grown[: len(writer.lanes)] = writer.lanes
            writer.lanes = grown
        mapped: np.ndarray = writer.lanes[lanes]
        fresh: list[int] = []
        if (mapped == NONE).any():
            fresh = np.unique(lanes[mapped == NONE]).tolist()
            self._storage.check_lanes(len(fresh))
            for lane in fresh:
                writer.lanes[lane] = self._storage.open_lane(writer.slot, lane)
            mapped = writer.lanes[lanes]
        return mapped, fresh

    def _close_writer(self, writer: str) -> None:
        known = self._writers.pop(writer)
        self._closed_writers.add(writer)
        lost = self._storage.coming_items(self._storage.lanes_of(known.slot).values()).tolist()
        self._storage.close_writer(known.slot)
        self._take_back(lost)  # counted as inserts to come, which they will never be

    def coming_items(self) -> dict[str, int]:
        """Items of each table that the newest rows of open lanes are yet to become; limiters count them as inserted."""
        with self._lock:
            lanes = [known.lanes[known.lanes != NONE].tolist() for known in self._writers.values()]
            counts = self._storage.coming_items(chain.from_iterable(lanes))
        return dict(zip(self.tables, counts.tolist(), strict=True))

    def _end_leases(self) -> None:
        now = time.monotonic()
        for name, known in list(self._writers.items()):
            if known.connections <= 0 and now - known.seen > self._lease_s:
                self._close_writer(name)
                self.leases_ended += 1

    # --------------------------------------------------------------- sampling

    def table(self, name: str) -> Table:
        """A table by name.

        Raises:
            SchemaError: there is none of this name.
        """
        if name not in self.tables:
            raise SchemaError(
                f"expected a table of shard {self.index}, which has {', '.join(self.tables)}; received {name!r}"
            )
        return self.tables[name]

    def _allowed(self, table: Table, least: int, most: int, timeout_s: float) -> int:
        """Wait until the table has items and its limiter lets `least` to `most` be sampled; 0 when it does not."""
        deadline = time.monotonic() + timeout_s
        if table.can_draw(least) and (granted := table.limiter.acquire("sample", least, most, timeout_s=0.0)):
            return granted
        with table.clock.state("waiting_for_inserts"):
            with self._lock:
                filled = self._grew.wait_for(lambda: table.can_draw(least), timeout_s)
            granted = 0
            if filled:
                left = max(0.0, deadline - time.monotonic())
                granted = table.limiter.acquire("sample", least, most, timeout_s=left)
        log_waits(table.clock, table.limiter, table=table.spec.name)
        return granted

    def check(self, window: Window) -> None:
        """
        Raises:
            SchemaError: a window that this shard cannot give.
        """
        window.check(self.schema)
        if window.stack > self._stack:
            raise SchemaError(
                f"expected a stack of at most {self._stack} frames, for which the shard keeps items whole (ShardSpec.stack); "
                f"received {window.stack}"
            )

    def draw(self, name: str, least: int, most: int, *, timeout_s: float) -> Draw | None:
        """Draw `least` to `most` items of a table. None: not allowed, or nothing stored, within `timeout_s`."""
        table = self.table(name)
        granted = self._allowed(table, least, most, timeout_s)
        if not granted:
            return None
        with self._lock, table.clock.state("sampling"):
            return self._draw(table, granted)

    def _draw(self, table: Table, granted: int) -> Draw | None:
        draw = table.draw(granted)
        if (missing := granted - (0 if draw is None else len(draw))) > 0:  # recycled or used up meanwhile
            table.limiter.give_back("sample", missing)
        return draw

    def sample(
        self,
        name: str,
        least: int,
        most: int,
        window: Window,
        *,
        timeout_s: float,
        out: WindowBatch | None = None,
        at: int = 0,
    ) -> tuple[Draw, WindowBatch] | None:
        """Draw items of a table, and gather their windows into places `at` … of `out`, or into a batch of their own.

        None: not allowed, or nothing stored, within `timeout_s`. `probability` is the share inside this shard.
        """
        table = self.table(name)
        reader = self._readers.get(window)
        if reader is None:
            self.check(window)
            reader = self._readers[window] = WindowReader(self.layout, self._storage.arrays, window)
        granted = self._allowed(table, least, most, timeout_s)
        if not granted:
            return None
        with self._lock, table.clock.state("sampling"):
            draw = self._draw(table, granted)
            if draw is None:
                return None
            if out is None:
                out = buffers(self.schema, window, len(draw))
            reader.read(draw.rows, out, at, out.frame_count)
            out.frame_count += reader.distinct
            end = at + len(draw)
            out.probability[at:end] = draw.probability
            out.shard[at:end] = self.index
            return draw, out

    def best_keys(self, name: str, count: int) -> np.ndarray:
        """Keys of the next items of an ordered table, up to `count`, which stay where they are."""
        with self._lock:
            return self.table(name).best_keys(count)

    def unused(self, name: str, count: int) -> None:
        """Give back samples that were drawn and never used."""
        table = self.table(name)
        with self._lock:
            table.undrawn(count)

    def update_priorities(self, name: str, ids: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities by stable item id: int64 (n,), float64 (n,). Items no longer there are left out and counted.

        Raises:
            SchemaError: no such table, or a priority that is negative or not a number; nothing changed.
        """
        table = self.table(name)
        with self._lock:
            try:
                table.update_priorities(self._storage.rows_of(ids), priorities)
                self._grew.notify_all()  # what had no mass may have some now
            except ValueError as error:
                raise SchemaError(str(error)) from None

    # ------------------------------------------------------------------ state

    def stats(self) -> dict[str, Any]:
        """Counters over the shard's life, those of its tables, and what is waited for. Leases that are over end here."""
        with self._lock:
            self._end_leases()
            found: dict[str, Any] = {
                "capacity": self.layout.rows,
                "free": self._storage.free_rows,
                "leaving": self.leaving,
                "bytes": self.layout.size,
                "writers": len(self._writers),
                "duplicates": self.duplicates,
                "leases_ended": self.leases_ended,
                "recovered": self.recovered,
                "tables": {name: table.stats() for name, table in self.tables.items()},
            }
        waiting = []
        for name, table in self.tables.items():
            log_waits(table.clock, table.limiter, table=name)
            for who, state, side in (
                ("writer", "waiting_for_samples", "insert"),
                ("sampler", "waiting_for_inserts", "sample"),
            ):
                if (seconds := table.clock.longest(state)) > 1.0:  # type: ignore[arg-type]
                    why = table.limiter.why(side)  # type: ignore[arg-type]
                    waiting.append(f"{who} of table {name} for {seconds:.0f} s: waiting for {why}")
        return {**found, "waiting": waiting}

    @property
    def path(self) -> str | None:
        """The storage file; None where it is ordinary memory."""
        return None if self._file is None else str(self._file.path)

    @property
    def identity(self) -> str:
        """A name no other storage ever had."""
        return self._storage.identity

    def copy(self, skip: Set[tuple[int, int]] = frozenset()) -> tuple[dict[str, Any], Iterator[SegmentCopy]]:
        """The shard as it stands: a header, and its segments, oldest first (`replay.copies`).

        Steps that come in while the caller iterates are left out, segments recycled meanwhile skipped. The lock is held
        for one copy at a time, so that writers and samplers are hardly held up.
        """
        storage, steps = self._storage, self.layout.segment_steps
        segments = storage.arrays["segments"]
        with self._lock:
            used = np.flatnonzero(segments[kernels.SEQUENCE] != NONE)
            used = used[np.argsort(segments[kernels.SEQUENCE, used])]
            filled = [(int(s), int(segments[kernels.SEQUENCE, s]), int(segments[kernels.FILL, s])) for s in used]
            header = {
                "storage": self.identity,
                "schema": self.schema.to_json(),
                "settings": {
                    "capacity": self.layout.rows,
                    "segment_steps": steps,
                },
                "counters": self._counters(),
                "tables": {
                    name: {
                        "settings": asdict(table.spec),
                        "counters": {
                            "inserted": table.inserted,
                            "sampled": table.sampled,
                            "received": table.received,
                            "items": table.items,
                        },
                    }
                    for name, table in self.tables.items()
                },
            }

        def copies() -> Iterator[SegmentCopy]:
            for segment, sequence, count in filled:
                with self._lock:
                    if segments[kernels.SEQUENCE, segment] != sequence or count == 0:
                        continue
                    copied = self._copy_segment(segment, sequence, count, with_rows=(sequence, count) not in skip)
                yield copied

        return header, copies()

    def _counters(self) -> dict[str, int]:
        first = self._limited[0]
        return {"inserted": first.inserted, "sampled": first.sampled}

    def _copy_segment(self, segment: int, sequence: int, count: int, *, with_rows: bool) -> SegmentCopy:
        storage, steps = self._storage, self.layout.segment_steps
        segments = storage.arrays["segments"]
        following = int(segments[kernels.NEXT, segment])
        if following != NONE and segments[kernels.PREVIOUS, following] != segment:
            following = NONE  # recycled before this one
        begin = segment * steps
        place = slice(begin, begin + count)
        rows = index = None
        if with_rows:
            rows = storage.read(place)
            index = np.arange(count) + int(segments[kernels.FIRST_INDEX, segment])
            first = rows["is_first"]
            starts = np.maximum.accumulate(np.where(first, np.arange(count), -1))
            index = np.where(starts >= 0, np.arange(count) - starts, index)
        return SegmentCopy(
            sequence=sequence,
            following=int(segments[kernels.SEQUENCE, following]) if following != NONE else NONE,
            complete=bool(segments[kernels.OWNER, segment] == NONE),  # full, or its lane has ended
            count=count,
            index=index,
            rows=rows,
            tables={name: TableCopy(*table.copy(place)) for name, table in self.tables.items()},
        )

    def restore(self, header: dict[str, Any], segments: Iterator[SegmentCopy]) -> None:
        """Fill an empty shard from a `copy`, every lane closed, and take over its counters.

        The limiters' counters are the caller's to restore.
        """
        with self._lock:
            if self._storage.taken:
                raise ValueError(f"shard {self.index} holds steps already; only an empty one can be restored")
            restore(self._storage, self.tables, header, segments)
            self._grew.notify_all()

    # ---------------------------------------------------------------- leaving

    @property
    def leaving(self) -> bool:
        """Whether the shard leaves its service, now or before it was killed."""
        return self._storage.leaving > 0

    def leave(self) -> None:
        """Begin to leave the service: from now on there are no new writers, and nothing is drawn; once more does nothing.

        Writers that are known may go on until `hand_over`.
        """
        with self._lock:
            if not self.leaving:
                self._storage.leaving = LEAVES
            self._stop_drawing()
            self._grew.notify_all()

    def _stop_drawing(self) -> None:
        for table in self.tables.values():
            table.leaving = True

    def hand_over(self, to: Mapping[int, str], security: Security, *, retry_s: float = RETRY_S) -> HandedOver:
        """End all writers and give all rows to other shards: number of each → its Flight address. `leave` comes before.

        What has failed, or was cut short by the death of this process, is gone on with where it was by another call, also on
        a shard that has taken over the storage.

        retry_s: how long a shard that is away is waited for, in seconds.

        Raises:
            HandOverError: the shard does not leave, or one of the others is not there, or has refused rows.
        """
        with self._handing_over:
            if self._hand_over is None:
                self._hand_over = self._begin_hand_over(to, security)
            found = self._hand_over.run(to, retry_s=retry_s)
            with self._lock:
                left_out = [table.give_up() for table in self._limited]
                if self._storage.leaving != LEFT:
                    self._storage.leaving = LEFT
                    for table, count in zip(self._limited, left_out, strict=True):
                        if count:
                            table.limiter.deleted(count)
            return found

    def _begin_hand_over(self, to: Mapping[int, str], security: Security) -> HandOver:
        with self._lock:
            if not self.leaving:
                raise HandOverError(
                    f"expected shard {self.index} to have been told to leave, and it was not; call leave"
                )
            for name in list(self._writers):
                self._close_writer(name)
            for name in self._receiver.names:
                self._receiver.end(name)
        known = self._storage.plan
        if known is None:
            segments = self._storage.arrays["segments"]
            held = int(segments[kernels.FILL, segments[kernels.SEQUENCE] != NONE].sum())
            plan = make_plan(held, ask_room(to, security))
            self._storage.plan = plan.to_json()
        else:
            plan = Plan.from_json(known)
        return HandOver(self._storage, self.tables, plan, security)

    # -------------------------------------------------------------- receiving

    def begin_receiving(self, name: str) -> int:
        """A shard that leaves is to hand its rows over. Returns the number of the last part applied, −1 for none.

        Raises:
            ShardLeavingError: this shard leaves as well.
        """
        with self._lock:
            if self.leaving:
                raise ShardLeavingError(f"expected no rows of others, for shard {self.index} leaves its service itself")
            return self._receiver.begin(name)

    def receive(self, name: str, part: Part) -> None:
        """Apply a part of what another shard hands over, once; what tables know of its rows is set again if it comes again.

        Raises:
            SchemaError: `begin_receiving` did not come before, or there are too few segments for its lane.
        """
        with self._lock:
            self._receiver.apply(name, part)
            self._grew.notify_all()

    def end_receiving(self, name: str) -> None:
        """Another shard has handed over all its rows; once more does nothing."""
        with self._lock:
            if self._receiver.end(name):
                self._closed_writers.add(name)

    def close(self, *, remove: bool = True) -> None:
        """Let go of the storage file, and remove it unless told otherwise."""
        if self._file is not None:
            self._file.close(remove=remove)
