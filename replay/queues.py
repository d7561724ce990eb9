"""Queue tables: rows of variable length, kept by groups, delivered in the order they came and consumed when acknowledged.

A group is one writer's rows with one value of `group`; it is complete when `group_size` of them are there. Complete groups
are delivered whole, oldest first, by the commit of their last row. What is delivered is leased to its reader: an
acknowledgement consumes it; a reader that closes, or stays away for `lease_s`, gives it back, and it is delivered again in its old
place. With `times_sampled` n a group keeps its place until it was delivered n times, at most once in a batch.

A full queue blocks its writers and drops nothing. Groups are dropped, and counted, when they are behind the reader's
policy version by more than `max_policy_lag`, or when their writer is closed or lost before they are complete.

Rows, deliveries, acknowledgements and drops are in the mapped file before they are answered: `queue_state`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from .clock import Clock
from .queue_copies import GroupCopy, QueueCopy, copy_of, fill
from .queue_log import encode, record_size
from .queue_spec import MAX_GROUPS, Part, QueueSpec, parts_of
from .queue_state import Group, QueueState, Writer
from .schema import SchemaError

_WRITERS = 4096  # that are remembered, of those not connected
_NAME = 64  # characters


class WriterEndedError(RuntimeError):
    """A writer that was closed, or whose lease has ended, wants to write."""


class ReaderReplacedError(RuntimeError):
    """A reader has opened another stream since this one, or was closed."""


@dataclass(frozen=True)
class Delivery:
    """Whole groups that a reader was given, one after another."""

    batch: pa.RecordBatch
    leases: list[int]  # per group: what to acknowledge
    sizes: list[int]  # per group: its rows
    times: list[int]  # per group: microseconds since the epoch at the commit of its last row
    versions: list[int]  # per group: the oldest policy version in it


@dataclass
class _Party:
    """A writer or reader as a caller: whether it is there."""

    seen: float
    connections: int = 0
    stream: str | None = None
    why: str | None = None  # what its last call waited for in vain


class Queue:
    """One shard's part of a queue table. Any thread may call it."""

    def __init__(self, spec: QueueSpec, path: str | Path) -> None:
        """Open the file at `path` with all that a killed process has left in it, or make it.

        Raises:
            OSError: too little space (ENOSPC, with what is free and what is needed), or another process holds the file.
            LogError: the file is damaged, or another queue's.
        """
        self.spec = spec
        self._state = QueueState(spec, path)
        self._duplicates = self._unknown = 0
        self._clock = Clock()
        self._changed = threading.Condition()
        self._wanting: dict[int, str] = {}  # thread → what it waits for
        now = time.monotonic()
        self._lease_check = now
        self._writers = {name: _Party(now) for name in self._state.writers}
        self._readers = {lent.reader: _Party(now) for lent in self._state.lent.values()}

    # ---------------------------------------------------------------- writing

    def connect(self, writer: str) -> int:
        """A writer opens a stream. Returns the sequence number of its last message applied, −1 for a new writer.

        Raises:
            WriterEndedError: it was closed, or its lease has ended.
        """
        _check_name(writer)
        with self._changed:
            self._end_leases()
            if writer not in self._state.writers:
                self._forget_writers()
            self._state.writers.setdefault(writer, Writer())
            known = self._open_writer(writer)
            self._writers.setdefault(writer, _Party(time.monotonic())).connections += 1
            return known.sequence

    def disconnect(self, writer: str, *, closed: bool) -> None:
        """A stream of a writer ended; `closed`: the writer is done, and its incomplete groups are dropped."""
        with self._changed:
            if writer in self._writers:
                self._writers[writer].connections -= 1
                self._writers[writer].seen = time.monotonic()
                if closed:
                    self._close_writer(writer)

    def end_writer(self, writer: str) -> None:
        """Drop the incomplete groups of a writer that is known to be dead, without waiting for its lease to end."""
        with self._changed:
            if writer in self._writers:
                self._close_writer(writer)

    def insert(self, writer: str, sequence: int, batch: pa.RecordBatch, *, timeout_s: float) -> bool:
        """Apply a message once.

        Returns False when there was no room within `timeout_s`: nothing changed, ask again. A message whose sequence
        number was applied before is left out, and True returned.

        Raises:
            SchemaError: the rows do not fit the queue, contradict their groups, or could never fit into it.
            WriterEndedError: the writer is not connected, was closed, or its lease has ended.
        """
        parts = parts_of(batch, self.spec)
        payload = batch.serialize()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            size, waited = 0, False
            with self._clock.state("waiting_for_samples"):
                while True:
                    self._end_leases()
                    known = self._open_writer(writer)
                    if sequence <= known.sequence:
                        self._duplicates += 1
                        return True
                    _check_groups(known, parts)
                    if size == 0:
                        meta = self._state.message_meta(writer, sequence, batch.num_rows, parts)
                        size = record_size(len(encode(meta)), payload.size)
                        self._check_size(parts, size)
                    if (why := self._no_room(known, parts, size)) is None:
                        break
                    if not self._wait(f"writer {writer} waits for {why}", deadline):
                        self._writers[writer].why = why
                        return False
                    waited = True
            with self._clock.state("inserting"):
                if waited:  # others have written, and time has passed
                    meta = self._state.message_meta(writer, sequence, batch.num_rows, parts)
                self._state.insert(meta, payload)
                self._changed.notify_all()
        return True

    def _open_writer(self, name: str) -> Writer:
        known = self._state.writers.get(name)
        if known is None:
            raise WriterEndedError(f"writer {name} is not connected to queue {self.spec.name!r}")
        if known.closed:
            raise WriterEndedError(
                f"writer {name} was closed (its lease on queue {self.spec.name!r} is {self.spec.lease_s:g} s); open a "
                f"new one"
            )
        return known

    def _check_size(self, parts: Sequence[Part], size: int) -> None:
        spec, rows = self.spec, sum(p.size for p in parts)
        limits: tuple[tuple[str, int, int | None], ...] = (
            ("max_message_bytes", size, spec.message_bytes),
            ("capacity_bytes", self._state.charge(size, len(parts)), spec.capacity_bytes),
            ("capacity_rows", rows, spec.capacity_rows),
            ("max_waiting_rows", rows, spec.max_waiting_rows),
            ("max_waiting_groups", len(parts), spec.max_waiting_groups),
        )
        for name, wanted, limit in limits:
            if limit is not None and wanted > limit:
                raise SchemaError(
                    f"a message to queue {spec.name!r} is too large: expected at most {limit} ({name}), received "
                    f"{wanted}; send fewer rows at a time, or raise {name}"
                )

    def _no_room(self, writer: Writer, parts: Sequence[Part], size: int) -> str | None:
        """What inserting waits for, in words; None: nothing."""
        spec, state = self.spec, self._state
        new = [p.size for p in parts if p.key not in writer.open]
        # A group was counted in full when it began: rows and groups never block its completion.
        limits: tuple[tuple[str, int, int, int | None], ...] = (
            ("capacity_bytes", state.charged, state.charge(size, len(parts)), spec.capacity_bytes),
            ("capacity_rows", state.held_rows, sum(new), spec.capacity_rows),
            ("max_waiting_rows", state.pending_rows, sum(new), spec.max_waiting_rows),
            ("max_waiting_groups", state.pending_groups, len(new), spec.max_waiting_groups),
        )
        for name, held, wanted, limit in limits:
            if limit is not None and wanted and held + wanted > limit:
                stuck = "; no group can be taken before that: raise it" if self._is_stuck() else ""
                return (
                    f"readers of queue {spec.name!r} to take groups: {name} is {limit}, {held} are held and {wanted} "
                    f"more wanted ({self._holdings()}){stuck}"
                )
        return None

    def _is_stuck(self) -> bool:
        """Whether nothing that is held can leave, but by a drop."""
        state = self._state
        return not state.lent and (not state.waiting or any(why.startswith("reader") for why in self._wanting.values()))

    def _holdings(self) -> str:
        state = self._state
        rows, lent = sum(g.size for g in state.waiting), sum(len(d.leases) for d in state.lent.values())
        incomplete = sum(len(w.open) for w in state.writers.values())
        return (
            f"{len(state.waiting)} groups of {rows} rows wait, {lent} are delivered and not acknowledged, {incomplete} "
            f"are incomplete"
        )

    # ---------------------------------------------------------------- reading

    def open_reader(self, reader: str, stream: str, holding: Iterable[int] = ()) -> None:
        """A reader opens a stream, which ends its earlier ones. What it was given and does not hold is given back.

        holding: leases that the reader has, and has not seen confirmed as consumed.
        """
        _check_name(reader)
        with self._changed:
            self._readers.setdefault(reader, _Party(0.0)).stream = stream
            self._give_back(reader, keep=set(holding))

    def close_stream(self, reader: str, stream: str) -> None:
        """A reader's stream ended. What it was given stays leased for `lease_s`."""
        with self._changed:
            known = self._readers.get(reader)
            if known is not None and known.stream == stream:
                known.stream, known.seen = None, time.monotonic()

    def close_reader(self, reader: str) -> None:
        """A reader is done, or known to be dead: what it was given and did not acknowledge is given back."""
        with self._changed:
            self._readers.pop(reader, None)
            self._give_back(reader, keep=set())

    def deliver(
        self,
        reader: str,
        stream: str,
        *,
        groups: int | None = None,
        rows: int | None = None,
        partial: bool = False,
        version: int | None = None,
        timeout_s: float,
    ) -> Delivery | None:
        """Lease the oldest `groups` groups, or as many as have at least `rows` rows (in at most 2048 groups).

        partial: do not wait for more once there is one group.
        version: the reader's policy version; groups further behind it than `max_policy_lag` are dropped and counted.
        Returns None when there were not so many within `timeout_s`.

        Raises:
            ValueError: the batch could never be filled.
            ReaderReplacedError: this is not the reader's open stream.
        """
        self.spec.check_batch(groups=groups, rows=rows)
        deadline = time.monotonic() + timeout_s
        wanted = f"{groups} groups" if rows is None else f"{rows} rows"
        with self._changed:
            with self._clock.state("waiting_for_inserts"):
                while True:
                    self._end_leases()
                    known = self._readers.get(reader)
                    if known is None or known.stream != stream:
                        raise ReaderReplacedError(f"reader {reader} has opened another stream, or was closed")
                    if picked := self._pick(groups, rows, partial, version):
                        break
                    why = f"writers of queue {self.spec.name!r} to complete {wanted}: {self._holdings()}"
                    if not self._wait(f"reader {reader} waits for {why}", deadline):
                        known.why = why
                        return None
            with self._clock.state("sampling"):
                batch = self._state.gather(picked)
                leases = self._state.lend(reader, picked)
                self._changed.notify_all()  # writers may have waited for it
                return Delivery(
                    batch=batch,
                    leases=leases,
                    sizes=[g.size for g in picked],
                    times=[g.time for g in picked],
                    versions=[g.version for g in picked],
                )

    def _pick(self, groups: int | None, rows: int | None, partial: bool, version: int | None) -> list[Group]:
        fresh: list[Group] = []
        stale: list[Group] = []
        lag = self.spec.max_policy_lag
        count, full = 0, False
        for group in self._state.waiting:
            if version is not None and lag is not None and group.version < version - lag:
                stale.append(group)
                continue
            fresh.append(group)
            count += group.size
            full = len(fresh) == (groups or MAX_GROUPS) or (rows is not None and count >= rows)
            if full:
                break
        for begin in range(0, len(stale), MAX_GROUPS):
            self._state.drop(stale[begin : begin + MAX_GROUPS], "stale")
            self._changed.notify_all()
        return fresh if full or partial else []

    def acknowledge(self, reader: str, used: Iterable[int], returned: Iterable[int] = ()) -> int:
        """Consume the groups of leases, all of one call or none; those `returned` go back to their place in the queue.

        Returns how many of the leases are not this reader's: acknowledged before, or ended and given back. They change
        nothing.

        Raises:
            ValueError: more than 2048 leases.
        """
        with self._changed:
            return self._resolve(reader, list(used), list(returned))

    def _resolve(self, reader: str, used: list[int], returned: list[int]) -> int:
        if len(used) + len(returned) > MAX_GROUPS:
            raise ValueError(f"at most {MAX_GROUPS} groups are acknowledged at once, received {len(used + returned)}")
        held = {
            lease: name
            for lent in map(self._state.lent.get, {lease >> 20 for lease in used + returned})
            if lent is not None and lent.reader == reader
            for lease, name in lent.leases.items()
        }
        mine = [(lease, held.pop(lease)) for lease in used if lease in held]
        back = [(lease, held.pop(lease)) for lease in returned if lease in held]
        unknown = len(used) + len(returned) - len(mine) - len(back)
        self._unknown += unknown
        if mine or back:
            self._state.resolve(mine, back)
            self._changed.notify_all()
        return unknown

    def _give_back(self, reader: str, *, keep: set[int]) -> None:
        lent = [d for d in self._state.lent.values() if d.reader == reader]
        leases = [lease for d in lent for lease in d.leases if lease not in keep]
        for begin in range(0, len(leases), MAX_GROUPS):
            self._resolve(reader, [], leases[begin : begin + MAX_GROUPS])

    # ------------------------------------------------------------------- ends

    def _end_leases(self) -> None:
        now = time.monotonic()
        if now < self._lease_check:
            return
        self._lease_check = now + min(0.25, self.spec.lease_s / 4)
        for name, party in list(self._writers.items()):
            # One without incomplete groups may come back at any time.
            if self._state.writers[name].open and party.connections <= 0 and now - party.seen > self.spec.lease_s:
                self._close_writer(name)
        for name, party in list(self._readers.items()):
            if party.stream is None and now - party.seen > self.spec.lease_s:
                self.close_reader(name)

    def _close_writer(self, name: str) -> None:
        known = self._state.writers[name]
        incomplete = list(known.open.values())
        for begin in range(0, len(incomplete), MAX_GROUPS):
            self._state.drop(incomplete[begin : begin + MAX_GROUPS], "incomplete")
        if not known.closed:
            self._state.close_writer(name)
        self._changed.notify_all()

    def _forget_writers(self) -> None:
        idle = [(p.seen, n) for n, p in self._writers.items() if p.connections <= 0 and not self._state.writers[n].open]
        for _, name in sorted(idle)[: max(0, len(idle) - _WRITERS + 1)]:
            self._state.forget_writer(name)
            del self._writers[name]

    def _wait(self, why: str, deadline: float) -> bool:
        """Wait until something changes. False: it is too late."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        me = threading.get_ident()
        self._wanting[me] = why
        try:
            self._changed.wait(min(left, 0.25))  # a lease ends without a sound
        finally:
            del self._wanting[me]
        return True

    # ------------------------------------------------------------------ state

    def stats(self) -> dict[str, Any]:
        """Counters over the queue's life, what it holds, and what callers wait for.

        Over its life, kills and restores included, each as `…_rows` and `…_groups`:
            inserted: rows taken, and groups that were completed.
            delivered: handed to readers; what is given back and delivered again counts again.
            consumed: acknowledged; a group sampled n times counts n times. What is acknowledged after the group was dropped does
                not count.
            dropped_stale: behind the reader's version by more than `max_policy_lag`.
            dropped_incomplete: left incomplete by their writer; `inserted_rows` has them, `inserted_groups` does not.
        Now: `groups` and `rows` held; `waiting_groups` and `waiting_rows` to be delivered; `leased_groups`, delivered and not
            acknowledged; `incomplete_groups`; `bytes` of `capacity_bytes`; `writers` and `readers` that are connected;
            `waiting`, what callers wait for in words.
        Since the process began: `duplicates`, messages that came again; `unknown_acknowledgements`, of leases that had
            ended; `time/…`, seconds per state.
        """
        with self._changed:
            self._end_leases()
            state = self._state
            found: dict[str, Any] = {
                "rows": sum(g.rows for g in state.groups.values()),
                "groups": len(state.groups),
                "waiting_groups": len(state.waiting),
                "waiting_rows": sum(g.size for g in state.waiting),
                "incomplete_groups": sum(len(w.open) for w in state.writers.values()),
                "leased_groups": sum(len(d.leases) for d in state.lent.values()),
                "bytes": state.charged,
                "capacity_bytes": self.spec.capacity_bytes,
                **state.counters(),
                "duplicates": self._duplicates,
                "unknown_acknowledgements": self._unknown,
                "writers": sum(p.connections > 0 for p in self._writers.values()),
                "readers": sum(p.stream is not None for p in self._readers.values()),
                "waiting": list(self._wanting.values()),
            }
        found.update({f"time/{name}": seconds for name, seconds in self._clock.seconds().items()})
        return found

    @property
    def waiting_groups(self) -> int:
        """Complete groups that wait to be delivered."""
        return len(self._state.waiting)

    def why(self, caller: str) -> str:
        """What the last call of a writer or reader that ran out of time had waited for, in words."""
        with self._changed:
            party = self._writers.get(caller) or self._readers.get(caller)
            return (party and party.why) or "nothing"

    @property
    def empty(self) -> bool:
        """Whether nothing was ever inserted, so that groups may be restored."""
        return self._state.counts["inserted_rows"] == 0

    def copy(self) -> QueueCopy:
        """The queue as it stands, for a snapshot; nobody is served until its rows are copied.

        A group is consumed when its acknowledgement has come: one that is delivered and not acknowledged is in the copy.
        """
        with self._changed:
            return copy_of(self._state)

    def restore(self, counters: Mapping[str, int], groups: Iterable[tuple[GroupCopy, pa.RecordBatch]]) -> None:
        """Fill an empty queue, before it has callers, with groups of a `copy` in their order, and take over its counters.

        All or nothing, whatever kills the process meanwhile.

        Raises:
            ValueError: the queue is not empty, is too small for the groups, or has another `group_size`.
            SchemaError: the groups have other columns, or are damaged.
        """
        with self._changed:
            fill(self._state, counters, groups)
            self._changed.notify_all()

    def close(self, *, remove: bool) -> None:
        """Let go of the file. `remove`: delete it with its rows; else another process may go on from it."""
        with self._changed:
            self._state.close(remove=remove)


def _check_groups(writer: Writer, parts: Sequence[Part]) -> None:
    for part in parts:
        begun = writer.open.get(part.key)
        if begun is not None and begun.size != part.size:
            raise SchemaError(f"group {part.key!r} began with group_size {begun.size}; received {part.size}")
        here = 0 if begun is None else begun.rows
        if here + len(part.rows) > part.size:
            raise SchemaError(
                f"group {part.key!r} has {part.size} rows, of which {here} are here; received {len(part.rows)} more"
            )


def _check_name(name: str) -> None:
    if not 1 <= len(name.encode()) <= _NAME:
        raise ValueError(f"a writer's or reader's name has 1 to {_NAME} bytes, received {len(name.encode())}")
