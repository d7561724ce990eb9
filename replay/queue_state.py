"""What a queue holds, kept in a log so that it comes back after a crash: messages, groups, deliveries and writers.

Every change is one record of the log: a message of rows, a delivery, its acknowledgement, a drop, the end of a writer. Rows lie in the
log as Arrow IPC messages. A record is live while the state needs it; a live one that comes to be the oldest is written
again at the end, with what has become of it, so that one slow group never blocks the ring, and a record that is not live
says nothing that those behind it do not say.

Not for several threads at once; `queues` has the lock.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from .queue_log import COUNTERS, LogError, Record, RingLog, encode
from .queue_spec import GROUP, Part, QueueSpec

INSERT, DELIVER, RESOLVE, DROP, WRITER = range(1, 6)  # kinds of records
_DEAD = -1  # of a group, in place of how often it was consumed
_CONTROL = 128 << 10  # bytes that no record without rows is longer than
_LEASE_BYTES = 384  # of the log, charged to a group for each of its deliveries: the record of one alone
_COUNTS = (
    "number",  # of the next record
    "inserted_rows",
    "inserted_groups",
    "consumed_rows",
    "consumed_groups",
    "dropped_stale_rows",
    "dropped_stale_groups",
    "dropped_incomplete_rows",
    "dropped_incomplete_groups",
    "delivered_rows",
    "delivered_groups",
    "restoring",  # 1 while groups are being restored: a process that finds it begins anew
    "dropped_used_rows",  # here, since the log has the counts by their places
    "dropped_used_groups",
)
_INTERNAL = ("number", "restoring")
Leases = Sequence[tuple[int, int]]  # (lease, group)


@dataclass
class Message:
    """Rows of one message, at least one of whose groups is there."""

    record: Record
    charge: int  # bytes counted against the capacity
    groups: int
    batch: pa.RecordBatch | None = None  # over the log's memory


@dataclass
class Group:
    """A group that is not yet consumed or dropped."""

    name: int  # number of its first message and its place in that
    key: int | str
    writer: str
    size: int  # rows when it is complete
    version: int  # the oldest policy version
    parts: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (number of a message, rows in it)
    rows: int = 0
    order: tuple[int, int] = (0, 0)  # last message, place in it
    time: int = 0  # of its completion, microseconds since the epoch
    consumed: int = 0
    leased: int = 0
    waits: bool = False

    @property
    def complete(self) -> bool:
        return self.rows == self.size


@dataclass
class Lent:
    """A delivery, of which something is not yet acknowledged."""

    reader: str
    position: int
    leases: dict[int, int]  # lease → group


@dataclass
class Writer:
    """How far a writer has come."""

    sequence: int = -1
    position: int = -1  # of the record that says so
    closed: bool = False
    open: dict[int | str, Group] = field(default_factory=dict)  # incomplete groups


class QueueState:
    """The durable part of a queue."""

    def __init__(self, spec: QueueSpec, path: str | Path) -> None:
        """As `RingLog`."""
        self.spec = spec
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.messages: dict[int, Message] = {}
        self.groups: dict[int, Group] = {}
        self.lent: dict[int, Lent] = {}
        self.waiting: list[Group] = []  # complete, to be delivered once more at least; oldest first
        self.writers: dict[str, Writer] = {}
        self.charged = 0  # bytes
        self.held_rows = 0  # a group begun counts in full here and below
        self.pending_rows = 0
        self.pending_groups = 0  # waiting, or incomplete
        self._carriers: dict[int, str] = {}  # position of a record → the writer whose progress it says
        self._largest = max(spec.message_bytes, _CONTROL)
        identity = spec.schema.serialize().to_pybytes() + str(spec.group_size).encode()
        # The live records, room to move the oldest while the ring turns, and the writers' records.
        ring = spec.capacity_bytes + 8 * self._largest + (1 << 20)
        self._log = RingLog(path, size=ring, identity=identity)
        try:
            self._replay()
        except BaseException:
            self._log.close(remove=False)
            raise

    def close(self, *, remove: bool) -> None:
        """Let go of the file; `remove`: delete it."""
        self._log.close(remove=remove)

    # ---------------------------------------------------------------- changes

    def message_meta(
        self,
        writer: str,
        sequence: int,
        rows: int,
        parts: Sequence[Part],
        consumed: int = 0,
        time_us: int | None = None,
    ) -> dict[str, Any]:
        """What a message's record says beside its rows, were it the next."""
        known = self.writers[writer]
        groups = []
        for place, part in enumerate(parts):
            begun = known.open.get(part.key)
            name = self.counts["number"] << 20 | place if begun is None else begun.name
            groups.append([name, part.size, consumed, part.version, _runs(part.rows)])
        now = time.time_ns() // 1000 if time_us is None else time_us
        return {"writer": writer, "sequence": sequence, "time": now, "rows": rows, "groups": groups}

    def charge(self, size: int, groups: int) -> int:
        """Bytes that a message counts against the capacity: its record's, and those of its groups' deliveries."""
        return size + groups * _LEASE_BYTES * self.spec.times_sampled

    def insert(self, meta: dict[str, Any], payload: pa.Buffer) -> None:
        """Add a message, `meta` of `message_meta`."""
        self._make_room()
        record = self._append(INSERT, meta, payload)
        self.counts["inserted_rows"] += meta["rows"]
        self._progress(meta["writer"], meta["sequence"], record)
        for group in self._add(record, meta, {}):
            self.counts["inserted_groups"] += 1
            self._let_wait(group)
        self._commit("queue.insert")

    def lend(self, reader: str, groups: Sequence[Group]) -> list[int]:
        """Lease waiting groups to a reader. Returns the leases."""
        self._make_room()
        number = self.counts["number"]
        leases = {number << 20 | place: group.name for place, group in enumerate(groups)}
        record = self._append(DELIVER, {"reader": reader, "leases": list(leases.items())})
        self.lent[number] = Lent(reader, record.position, leases)
        for group in groups:
            self.counts["delivered_groups"] += 1
            self.counts["delivered_rows"] += group.size
            group.leased += 1
            if group.consumed + group.leased >= self.spec.times_sampled:
                self._let_wait(group, False)
        self.waiting = [g for g in self.waiting if g.waits]
        self._commit("queue.deliver")
        return list(leases)

    def resolve(self, used: Leases, returned: Leases) -> None:
        """End leases: those used consume their groups, those returned give them back."""
        self._make_room()
        self._append(RESOLVE, {"used": used, "returned": returned})
        for lease, name in [*used, *returned]:
            lent = self.lent[lease >> 20]
            del lent.leases[lease]
            if not lent.leases:
                del self.lent[lease >> 20]
            if name in self.groups:
                self.groups[name].leased -= 1
        for _, name in used:
            group = self.groups.get(name)
            if group is None:  # dropped as stale before its second delivery was acknowledged
                continue
            self.counts["consumed_groups"] += 1
            self.counts["consumed_rows"] += group.size
            group.consumed += 1
            if group.consumed >= self.spec.times_sampled:
                self._remove(group)
        for _, name in returned:
            group = self.groups.get(name)
            if group is not None and not group.waits:
                self._let_wait(group)
        self._commit("queue.consume")

    def drop(self, groups: Sequence[Group], reason: Literal["stale", "incomplete"]) -> None:
        """Drop groups for good, and count them: those that are stale but were used before as `used`."""
        self._make_room()
        self._append(DROP, {"groups": [g.name for g in groups]})
        for group in groups:
            kind = "used" if reason == "stale" and group.consumed else reason
            self.counts[f"dropped_{kind}_rows"] += group.rows
            self.counts[f"dropped_{kind}_groups"] += 1
            self._remove(group)
        self.waiting = [g for g in self.waiting if g.waits]
        self._commit("queue.drop")

    def close_writer(self, name: str) -> None:
        """Let a writer never come back. Its incomplete groups have been dropped."""
        self._make_room()
        self.writers[name].closed = True
        self._write_progress(name)
        self._commit(None)

    def forget_writer(self, name: str) -> None:
        """Forget one without incomplete groups: were it to come back, it would be a new one."""
        self._carriers.pop(self.writers.pop(name).position, None)

    def counters(self) -> dict[str, int]:
        """What was inserted, delivered, consumed and dropped over the queue's life, in rows and groups."""
        return {name: count for name, count in self.counts.items() if name not in _INTERNAL}

    def begin_restore(self, writer: str) -> None:
        """From the next `insert` to `end_restore`, a process that takes over from a killed one finds an empty queue."""
        self.writers[writer] = Writer()
        self.counts["restoring"] = 1

    def end_restore(self, writer: str, counters: Mapping[str, int]) -> None:
        """Let what `writer` inserted count, and take over another queue's counters."""
        self.forget_writer(writer)
        self.counts.update({name: counters.get(name, 0) for name in self.counters()})
        self.counts["restoring"] = 0
        self._commit(None)

    def clear(self) -> None:
        """Forget all rows and counters. Writers that are connected may stay: they have inserted nothing."""
        while self._log.records:
            self._log.drop_first()
        self.writers = {name: Writer() for name, known in self.writers.items() if known.position < 0}
        for held in (self.messages, self.groups, self.lent, self.waiting, self._carriers):
            held.clear()
        self.charged = self.held_rows = self.pending_rows = self.pending_groups = 0
        self.counts = dict.fromkeys(_COUNTS, 0)
        self._commit(None)

    def _append(self, kind: int, meta: dict[str, Any], payload: Any = b"") -> Record:
        record = self._log.append(kind, self.counts["number"], encode(meta), payload)
        self.counts["number"] += 1
        return record

    def _commit(self, point: str | None) -> None:
        counts = list(self.counts.values())
        self._log.commit(counts + [0] * (COUNTERS - len(counts)), point=point)

    def _progress(self, name: str, sequence: int, record: Record) -> None:
        """Note which record says how far a writer has come."""
        known = self.writers[name]
        self._carriers.pop(known.position, None)
        known.sequence, known.position = sequence, record.position
        self._carriers[record.position] = name

    def _write_progress(self, name: str) -> None:
        known = self.writers[name]
        meta = {"writer": name, "sequence": known.sequence, "closed": known.closed}
        self._progress(name, known.sequence, self._append(WRITER, meta))

    def _add(self, record: Record, meta: dict[str, Any], consumed: dict[int, int]) -> list[Group]:
        """Add a message's rows to their groups. Returns those now complete.

        consumed: how often groups were consumed, where that is not what `meta` says.
        """
        counts = {entry[0]: consumed.get(entry[0], entry[2]) for entry in meta["groups"]}
        alive = {name for name, count in counts.items() if 0 <= count < self.spec.times_sampled}
        if not alive:
            return []
        message = Message(record, self.charge(record.size, len(counts)), len(alive))
        self.messages[record.number] = message
        self.charged += message.charge
        complete = []
        for place, (name, size, _, version, runs) in enumerate(meta["groups"]):
            if name not in alive:
                continue
            rows = np.concatenate([np.arange(begin, end) for begin, end in runs])
            group = self.groups.get(name)
            if group is None:
                key = self._rows(record.number).column(GROUP)[int(rows[0])].as_py()
                group = Group(name, key, meta["writer"], size, version, consumed=counts[name])
                self.groups[name] = self.writers[meta["writer"]].open[key] = group
                self.held_rows += size
                self.pending_rows += size
                self.pending_groups += 1
            group.parts.append((record.number, rows))
            group.rows += len(rows)
            group.version = min(group.version, version)
            if group.complete:
                del self.writers[group.writer].open[group.key]
                self.pending_rows -= size
                self.pending_groups -= 1
                group.order, group.time = (record.number, place), meta["time"]
                complete.append(group)
        return complete

    def _let_wait(self, group: Group, waits: bool = True) -> None:
        """Begin to let a complete group wait for a delivery, or end it: the caller then takes it out of `waiting`."""
        if group.waits == waits:
            return
        group.waits = waits
        self.pending_rows += group.size if waits else -group.size
        self.pending_groups += 1 if waits else -1
        if waits:
            insort(self.waiting, group, key=lambda g: g.order)

    def _remove(self, group: Group) -> None:
        """Forget a group, and its messages where they hold no other."""
        del self.groups[group.name]
        self.held_rows -= group.size
        if not group.complete:
            del self.writers[group.writer].open[group.key]
            self.pending_rows -= group.size
            self.pending_groups -= 1
        self._let_wait(group, False)
        for number, _ in group.parts:
            message = self.messages[number]
            message.groups -= 1
            if message.groups == 0:
                self.charged -= message.charge
                del self.messages[number]

    # ------------------------------------------------------------------- rows

    def gather(self, groups: Iterable[Group]) -> pa.RecordBatch:
        """The rows of groups, one group after another: copied, because the log writes over its memory again."""
        takes: list[tuple[int, list[np.ndarray]]] = []
        for number, rows in (part for group in groups for part in group.parts):
            if takes and takes[-1][0] == number:
                takes[-1][1].append(rows)
            else:
                takes.append((number, [rows]))
        pieces = [self._rows(number).take(pa.array(np.concatenate(rows))) for number, rows in takes]
        if len(pieces) == 1:
            return pieces[0]
        (batch,) = pa.Table.from_batches(pieces).combine_chunks().to_batches()
        return batch

    def _rows(self, number: int) -> pa.RecordBatch:
        message = self.messages[number]
        if message.batch is None:
            _, payload = self._log.read(message.record)
            message.batch = pa.ipc.read_record_batch(payload, self.spec.schema)
        return message.batch

    # -------------------------------------------------------------------- log

    def _make_room(self) -> None:
        """Let go of the log's oldest records, moving those that are live, until the largest record fits."""
        log = self._log
        wanted = 6 * self._largest  # a record and a filling before it; the same for the next move; and as much to spare
        for _ in range(4 * len(log.records) + 16):
            if log.free >= wanted or not log.records:
                return
            moved = self._move(log.records[0])
            log.drop_first()
            self._commit("queue.move" if moved else None)
        raise LogError(f"queue {self.spec.name!r} has no room beside {self.charged} live bytes in {log.size}")

    def _move(self, record: Record) -> bool:
        """Write a record again at the log's end, with what has become of it. False: it is not live."""
        message = self.messages.get(record.number) if record.kind == INSERT else None
        lent = self.lent.get(record.number) if record.kind == DELIVER else None
        writer = self._carriers.get(record.position)
        if message is not None and message.record.position == record.position:
            meta, payload = self._log.read(record)
            for entry in meta["groups"]:
                entry[2] = self.groups[entry[0]].consumed if entry[0] in self.groups else _DEAD
            message.record = self._log.append(INSERT, record.number, encode(meta), payload)
            message.batch = None
            self.charged -= message.charge
            message.charge = self.charge(message.record.size, len(meta["groups"]))
            self.charged += message.charge
            if writer is not None:
                self._progress(writer, self.writers[writer].sequence, message.record)
        elif lent is not None and lent.position == record.position:
            meta = {"reader": lent.reader, "leases": list(lent.leases.items())}
            lent.position = self._log.append(DELIVER, record.number, encode(meta)).position
        elif writer is not None:
            self._write_progress(writer)
        else:
            return False
        return True

    def _replay(self) -> None:
        """Build the state from the log's records."""
        self.counts = dict(zip(_COUNTS, self._log.counters, strict=False))
        if self.counts["restoring"]:
            self.clear()
            return
        messages: dict[int, tuple[Record, dict[str, Any]]] = {}
        consumed: dict[int, int] = {}  # group → how often
        for record in self._log.records:
            meta = self._log.read(record)[0] if record.kind in range(1, 6) else {}
            match record.kind:
                case 1:  # INSERT: a moved one says what had become of its groups by then
                    messages[record.number] = record, meta
                    consumed.update({name: count for name, _, count, _, _ in meta["groups"]})
                case 2:  # DELIVER
                    self.lent[record.number] = Lent(meta["reader"], record.position, dict(meta["leases"]))
                case 3:  # RESOLVE
                    for lease, _ in meta["used"] + meta["returned"]:
                        if (lent := self.lent.get(lease >> 20)) is not None:
                            lent.leases.pop(lease, None)
                    for _, name in meta["used"]:
                        if consumed.get(name, _DEAD) != _DEAD:  # else it lies in a message moved later, or is gone
                            consumed[name] += 1
                case 4:  # DROP
                    consumed.update(dict.fromkeys(meta["groups"], _DEAD))
            if "writer" in meta:
                known = self.writers.setdefault(meta["writer"], Writer())
                known.closed |= meta.get("closed", False)
                if meta["sequence"] >= known.sequence:
                    self._progress(meta["writer"], meta["sequence"], record)
        self.lent = {number: lent for number, lent in self.lent.items() if lent.leases}
        complete = [g for _, (r, meta) in sorted(messages.items()) for g in self._add(r, meta, consumed)]
        for name in (name for lent in self.lent.values() for name in lent.leases.values()):
            if name in self.groups:
                self.groups[name].leased += 1
        for group in complete:
            if group.consumed + group.leased < self.spec.times_sampled:
                self._let_wait(group)


def _runs(rows: np.ndarray) -> list[list[int]]:
    """Ascending rows as [begin, end) runs."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(r[0]), int(r[-1]) + 1] for r in np.split(rows, cuts)]
