"""A shard behind Arrow Flight, with `grpc.health.v1` beside it.

Data plane, all on long-lived streams:
  DoPut   descriptor {"writer": id}: batches of (lane, row) with their sequence number as metadata, each answered with the
          number last applied; the first answer is that number before the stream began, so that a writer knows what to
          send again. Metadata `close` ends the writer and its lanes.
          {"receive": id}: rows of a shard that leaves (`replay.receiving`).
          {"priorities": table}: batches of (item, priority), not answered.
          {"acknowledge": id}: the number of a stream's windows used since the last message, as metadata; a negative number
          gives back windows that were thrown away.
  DoGet   ticket {"stream": id, "table": name, "window": …, "gather": "shard" or "reader", "least": n, "block": n,
          "ahead": n}: blocks of `least` to `block` windows without end, at most `ahead` windows beyond what the reader has
          acknowledged; or only their row numbers, for a reader that has mapped the storage. The metadata (`wire.BLOCK`) tells
          the table's mass and items on this shard; a stream that waits sends it with an empty block, so that readers of
          several shards know how their masses change.
  DoAction  describe, stats; snapshot {"location"}; lease, take_back: between shards; leave, hand_over {"to",
          "retry_s"}: of a shard that leaves (`replay.handover`); quarantine {"writer", "why"},
          readmit {"writer"}: of guests.

Writers outside the run (`replay.guests`) may do the first of these alone, and are answered in more words
(`replay.guest_service`).

Every call shows the run's token (`replay.security`). What does not parse or fit is refused with what was expected and what was
received, and changes nothing.
"""

from __future__ import annotations

import atexit
import json
import struct
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from .ending import cut, end_serving
from .faults import fault
from .files import storage_path
from .guest_service import GuestGate, GuestService
from .handover import HandedOver, HandOverError
from .health import Health
from .limiter import LeasedLimiter, Limiter, RateLimiter, Side
from .queue_service import QueueService, queue_message
from .queues import Queue
from .receiving import receive
from .schema import SchemaError, Window
from .security import (
    Between,
    ListenError,
    Security,
    check_batch,
    check_object,
    check_schema,
    flight_client,
    flight_location,
    flight_server_options,
    parse_json,
    read_chunks,
)
from .shard import Shard, ShardLeavingError, ShardSpec, WriterClosedError
from .snapshot import SnapshotError, SnapshotStore
from .storage import StorageError
from .tables import Draw
from .wire import (
    BLOCK,
    CLOSE,
    MAX_BYTES,
    MAX_ROWS,
    PRIORITIES,
    RETRY_S,
    SEQUENCE,
    action,
    column,
    items_schema,
    rows_from_arrow,
    to_arrow,
    unpack_sequence,
    window_bytes,
    window_schema,
)

_POLL_S = 0.5  # how often a blocked call looks whether its caller is still there
_MANY = range(1, MAX_ROWS + 1)
MOST_STEPS, MOST_STACK = 65_536, 64  # of a window
_LATE_S = 5.0  # by which shard 0 may answer later than it was asked to
_IDLE_S = 5.0  # credits that nobody has asked for this long go back to the limiter
# The interpreter hands itself from one thread to the next after this time at the latest. Its default of 5 ms is what a reader
# would wait for while a writer's thread is at work.
_SWITCH_S = 0.0005


class _Stream:
    """How far a reader's stream may run ahead."""

    def __init__(self, table: str, ahead: int) -> None:
        self.table = table
        self._ahead = ahead
        self._sent = 0
        self._acknowledged = 0
        self._changed = threading.Condition()

    def room(self, least: int, timeout_s: float) -> int:
        """Windows that may be sent, once there are `least`; 0 when there are not."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ahead - self.unused >= least, timeout_s):
                return 0
            return self._ahead - self.unused

    def sent(self, count: int) -> None:
        with self._changed:
            self._sent += count

    def acknowledge(self, count: int) -> None:
        with self._changed:
            self._acknowledged += count
            self._changed.notify_all()

    @property
    def unused(self) -> int:
        return self._sent - self._acknowledged


class ShardServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves one shard. The constructor returns when it listens; `close` ends it, or at the latest the interpreter's exit."""

    def __init__(
        self,
        spec: ShardSpec,
        security: Security,
        *,
        recover: bool = False,
        afresh_if_damaged: bool = False,
        prepare: Callable[[Shard], None] | None = None,
    ) -> None:
        """
        security: what callers must show.
        recover: take over the storage of the shard of the same run and number that has died, if it is there.
        afresh_if_damaged: where the steps to be recovered are damaged, begin without any (`damage` tells what was found); the
            queues are recovered all the same.
        prepare: called with the shard before anybody else can reach it, to fill it or to set its limiters.

        Raises:
            OSError: too little space for the storage, or the address cannot be bound.
            StorageError: the storage that is to be recovered is damaged, and `afresh_if_damaged` is not set.
            ValueError: the TLS files cannot be used.
        """
        sys.setswitchinterval(_SWITCH_S)
        self._security = security
        self._leaders: dict[str, RateLimiter] = {}
        self._leased: dict[str, LeasedLimiter] = {}
        limiters: dict[str, Limiter] = {}
        if spec.limiter_address is None:
            self._leaders = spec.limiters()
            limiters.update(self._leaders)
        else:
            self._followed = _Leader(spec.limiter_address, security)
            for table in spec.tables:
                self._leased[table.name] = _leased(self._followed, table.name, spec)
            limiters.update(self._leased)
        self.damage = ""
        try:
            self.shard = Shard.from_spec(spec, limiters, recover=recover)
        except StorageError as error:
            if not afresh_if_damaged:
                raise
            self.damage = str(error)
            self.shard = Shard.from_spec(spec, limiters)
        if self.shard.recovered:  # what other shards have is told by `restore_limiter`
            coming = self.shard.coming_items()
            for name, leader in self._leaders.items():
                mine = self.shard.table(name)
                asked = mine.inserted + coming[name]  # a row's insert is asked for before its successor is written
                leader.restore(inserted=asked, sampled=mine.sampled, removed=mine.inserted - mine.items)
        self._streams: dict[str, _Stream] = {}
        self._closing = threading.Event()
        self._opened: dict[str, Queue] = {}
        found: set[str] = set()  # queues that were there before
        try:
            if prepare is not None:
                prepare(self.shard)
            for queue in spec.queues:
                path = storage_path(spec.directory, run=spec.run, shard=spec.index, part=f"queue_{queue.name}")
                if not recover:
                    path.unlink(missing_ok=True)
                elif path.exists():
                    found.add(queue.name)
                self._opened[queue.name] = Queue(queue, path)
            self._queues = QueueService(self._opened, closing=self._closing)
            self._guests = GuestService(
                self.shard, spec.guests, closing=self._closing, cut=lambda peer: cut(self.port, peer=peer)
            )
            self._listen(spec, security)
        except BaseException:
            self._release(steps=not self.shard.recovered, queues=self._opened.keys() - found)
            raise
        threading.Thread(target=self._return_credits, name="credits", daemon=True).start()
        # Called before what Flight itself has left for the exit, which would wait for every open stream.
        atexit.register(self._end)

    def _listen(self, spec: ShardSpec, security: Security) -> None:
        try:
            options = flight_server_options(security, check=GuestGate(security, self._guests.admit))
            super().__init__(flight_location(spec.host, spec.port, security), **options)
        except pa.ArrowException as error:
            raise ListenError(f"cannot listen on {spec.host}:{spec.port} ({error}); set replay.host") from error
        self.address = flight_location(spec.host, self.port, security)
        self._health = Health(spec.host, security)
        self.health_address = self._health.address

    def follow(self, limiter_address: str) -> None:
        """Lease from the limiter at another address from now on: shard 0 is elsewhere. Of a shard that is not shard 0."""
        self._followed.follow(limiter_address)

    def _return_credits(self) -> None:
        """Hand back the credits of sides that nobody uses any more, so that other shards can go on."""
        while not self._closing.wait(_IDLE_S / 2):
            for limiter in self._leased.values():
                with suppress(pa.ArrowException, flight.FlightError):  # shard 0 is away: later, then
                    limiter.return_unused(idle_s=_IDLE_S)

    # ------------------------------------------------------------------ Flight

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        if (guest := context.get_middleware("token")) is not None:
            self._guests.do_put(context, guest.name, descriptor.command, reader, writer)
            return
        kinds: dict[str, Any] = {"writer": str, "priorities": str, "acknowledge": str, "receive": str}
        if (queue := queue_message(descriptor.command)) is not None:
            self._queues.do_put(context, queue, reader, writer)
            return
        try:
            command = parse_json(descriptor.command or b"", what="the descriptor of DoPut", required={}, optional=kinds)
            if len(command) != 1:
                raise SchemaError(f"the descriptor of DoPut: expected one of {', '.join(kinds)}; received {command}")
            ((kind, name),) = command.items()
            match kind:
                case "writer":
                    self._read_rows(context, name, reader, writer)
                case "receive":
                    receive(self.shard, name, reader, writer)
                case "priorities":
                    self._read_priorities(name, reader)
                case "acknowledge":
                    self._read_acknowledgements(name, reader)
        except ShardLeavingError as error:  # who writes here has not been told yet, and may try again
            raise flight.FlightUnavailableError(str(error)) from None
        except (SchemaError, WriterClosedError) as error:
            raise flight.FlightServerError(str(error)) from None
        except struct.error as error:
            raise flight.FlightServerError(f"expected 8 bytes of metadata: {error}") from None

    def _read_acknowledgements(self, stream: str, reader: Any) -> None:
        for chunk in read_chunks(reader):
            (count,) = SEQUENCE.unpack(chunk.app_metadata or b"")
            known = self._streams.get(stream)
            if known is not None:
                if abs(count) > known.unused:
                    raise SchemaError(f"expected at most {known.unused} windows to be acknowledged, received {count}")
                known.acknowledge(abs(count))
                if count < 0:
                    self.shard.unused(known.table, -count)

    def _read_priorities(self, table: str, reader: Any) -> None:
        check_schema(reader.schema, PRIORITIES)
        self.shard.table(table)
        for chunk in read_chunks(reader):
            item, priority = check_batch(chunk.data, PRIORITIES, max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
            self.shard.update_priorities(table, item.to_numpy(), priority.to_numpy())

    def _read_rows(self, context: Any, name: str, reader: Any, writer: Any) -> None:
        shard = self.shard
        expected = shard.schema.arrow()
        check_schema(reader.schema, expected)
        last = shard.connect(name)
        closed = False
        try:
            writer.write(SEQUENCE.pack(last))
            for chunk in read_chunks(reader):
                if chunk.data is None:
                    closed = chunk.app_metadata.to_pybytes() == CLOSE
                    break
                sequence, ended = unpack_sequence(chunk.app_metadata or b"")
                columns = check_batch(chunk.data, expected, max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
                lanes, rows = rows_from_arrow(columns, shard.schema)
                while not shard.insert(name, sequence, lanes, rows, timeout_s=_POLL_S):
                    if self._closing.is_set() or context.is_cancelled():
                        return
                if len(ended):
                    shard.end_lanes(name, ended, behind=sequence)
                fault("shard.before_reply")
                writer.write(SEQUENCE.pack(sequence))
        finally:
            shard.disconnect(name, closed=closed)

    def do_get(self, context: Any, ticket: Any) -> Any:
        if (queue := queue_message(ticket.ticket)) is not None:
            return self._queues.do_get(context, queue)
        try:
            wanted = parse_json(
                ticket.ticket,
                what="the ticket of DoGet",
                required={
                    "stream": str,
                    "table": str,
                    "window": dict,
                    "gather": ("shard", "reader"),
                    "least": _MANY,
                    "block": _MANY,
                    "ahead": _MANY,
                },
            )
            window = _window(wanted["window"], self.shard)
            table = self.shard.table(wanted["table"])
            if not wanted["least"] <= wanted["block"] <= wanted["ahead"]:
                raise SchemaError(f"expected least ≤ block ≤ ahead, received {wanted}")
            if wanted["stream"] in self._streams:
                raise SchemaError(f"expected a stream id of its own, received {wanted['stream']!r}, which is in use")
            most = MAX_BYTES // window_bytes(self.shard.schema, window)
            if wanted["gather"] == "shard" and wanted["block"] > most:
                raise SchemaError(f"expected blocks of at most {most} such windows, received block {wanted['block']}")
            schema = window_schema(self.shard.schema, window)
        except (SchemaError, ValueError, OverflowError) as error:
            raise flight.FlightServerError(str(error)) from None
        if wanted["gather"] == "reader":
            schema = items_schema(table.spec.selector)
        return flight.GeneratorStream(schema, self._blocks(context, wanted, window, schema))

    def _blocks(
        self, context: Any, wanted: dict[str, Any], window: Window, schema: pa.Schema
    ) -> Iterator[tuple[pa.RecordBatch, bytes]]:
        """Blocks of windows for a reader, for as long as it is there."""
        name, table = wanted["table"], self.shard.table(wanted["table"])
        least, most = wanted["least"], wanted["block"]
        empty = pa.RecordBatch.from_pylist([], schema=schema)
        stream = self._streams[wanted["stream"]] = _Stream(name, wanted["ahead"])
        try:
            while not self._closing.is_set() and not context.is_cancelled():
                room = stream.room(least, _POLL_S)
                found: tuple[pa.RecordBatch, Draw] | None = None
                if room and wanted["gather"] == "reader":
                    found = self._items(name, least, min(most, room), schema)
                elif room:
                    found = self._windows(name, least, min(most, room), window, schema)
                block, draw = found or (empty, None)
                stream.sent(block.num_rows)
                stamp, probability = (0, 0.0) if draw is None else (draw.taken, float(draw.probability[0]))
                yield block, BLOCK.pack(*table.offered, stamp, probability)
        finally:
            self._streams.pop(wanted["stream"], None)
            self.shard.unused(name, stream.unused)

    def _items(self, name: str, least: int, most: int, schema: pa.Schema) -> tuple[pa.RecordBatch, Draw] | None:
        draw = self.shard.draw(name, least, most, timeout_s=_POLL_S)
        if draw is None:
            return None
        arrays = {"row": draw.rows, "probability": draw.probability}
        if draw.key is not None:
            arrays["key"] = draw.key
        columns = [column(f.type, arrays[f.name], len(draw)) for f in schema]
        return pa.RecordBatch.from_arrays(columns, schema=schema), draw

    def _windows(
        self, name: str, least: int, most: int, window: Window, schema: pa.Schema
    ) -> tuple[pa.RecordBatch, Draw] | None:
        found = self.shard.sample(name, least, most, window, timeout_s=_POLL_S)
        if found is None:
            return None
        draw, batch = found
        return to_arrow(batch, draw.key, schema), draw

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        if (queue := queue_message(request.body)) is not None:
            return [json.dumps(self._queues.do_action(request.type, queue)).encode()]
        try:
            return [json.dumps(self._act(request.type, request.body)).encode()]
        except (SchemaError, ValueError, SnapshotError, HandOverError, OSError, pa.ArrowException) as error:
            raise flight.FlightServerError(str(error)) from None

    def _act(self, kind: str, body: pa.Buffer) -> dict[str, Any]:
        what = f"the action {kind}"
        match kind:
            case "stats":
                parse_json(body, what=what, required={})
                return self.stats()
            case "describe":
                parse_json(body, what=what, required={})
                return self.describe()
            case "snapshot":
                return self.save(parse_json(body, what=what, required={"location": str})["location"])
            case "lease":
                counts: dict[str, Any] = {
                    "least": _MANY,
                    "most": _MANY,
                    "deleted": range(2**62),
                    "timeout_s": Between(0.0, 3600.0),
                }
                counts["shard"] = range(2**31)
                words: dict[str, Any] = {"table": str, "side": ("insert", "sample"), "shard": range(2**31)}
                asked = parse_json(body, what=what, required={**words, **counts})
                side: Side = asked["side"]
                granted, why = self._leader(asked["table"]).lease(
                    side,
                    asked["least"],
                    asked["most"],
                    asked["deleted"],
                    min(asked["timeout_s"], _POLL_S),
                    who=asked["shard"],
                )
                return {"granted": granted, "why": why}
            case "take_back":
                some = dict.fromkeys(("inserts", "samples", "deleted"), range(2**62))
                asked = parse_json(body, what=what, required={"table": str, **some})
                self._leader(asked["table"]).take_back(asked["inserts"], asked["samples"], asked["deleted"])
                return {}
            case "leave":
                parse_json(body, what=what, required={})
                self.leave()
                return {}
            case "hand_over":
                asked = parse_json(body, what=what, required={"to": dict, "retry_s": Between(0.0, 3600.0)})
                return asdict(self.hand_over(_routes(asked["to"], what=what), retry_s=asked["retry_s"]))
            case "quarantine":
                asked = parse_json(body, what=what, required={"writer": str, "why": str})
                self.quarantine(asked["writer"], asked["why"])
                return {}
            case "readmit":
                self.readmit(parse_json(body, what=what, required={"writer": str})["writer"])
                return {}
        raise SchemaError(
            "expected one of the actions describe, hand_over, lease, leave, quarantine, readmit, snapshot, stats, take_back; "
            f"received {kind!r}"
        )

    def _leader(self, table: str) -> RateLimiter:
        self.shard.table(table)
        if table not in self._leaders:
            raise SchemaError(f"shard {self.shard.index} does not hold the limiters, shard 0 does")
        return self._leaders[table]

    # ----------------------------------------------------------------- control

    def describe(self) -> dict[str, Any]:
        """What a reader must know: the layout of the storage, where it lies, and how its tables draw."""
        return {
            "index": self.shard.index,
            "identity": self.shard.identity,
            "path": self.shard.path,
            **self.shard.layout.to_json(),
        }

    def stats(self) -> dict[str, Any]:
        """The shard's statistics; on shard 0 with the limiters' counters as well."""
        found = self.shard.stats()
        found["queues"] = {name: queue.stats() for name, queue in self._opened.items()}
        found["guests"] = self._guests.stats()
        for name, leader in self._leaders.items():
            found["tables"][name]["limiter"] = {
                "inserted": leader.inserted,
                "sampled": leader.sampled,
                "removed": leader.removed,
            }
        return found

    def save(self, location: str, previous: str | None = None) -> dict[str, int]:
        """Write a snapshot to a folder or URI while serving. Returns its counters and bytes.

        previous: where the last one was written: what has not changed since is linked or copied, not gathered again.
        """
        store = None if previous is None else SnapshotStore(previous)
        saved = SnapshotStore(location).save(self.shard, shard=self.shard.index, previous=store)
        return {**saved.header["counters"], "bytes": saved.size}

    def leave(self) -> None:
        """As `Shard.leave`.

        Raises:
            HandOverError: this is shard 0, which holds the limiters.
        """
        if self._leaders:
            raise HandOverError(
                f"expected another shard than {self.shard.index} to leave: it holds the limiters of all"
            )
        self.shard.leave()

    def hand_over(self, to: Mapping[int, str], *, retry_s: float = RETRY_S) -> HandedOver:
        """As `Shard.hand_over`."""
        return self.shard.hand_over(to, self._security, retry_s=retry_s)

    def end_writer(self, writer: str) -> None:
        """End the lanes of a writer that is known to be dead."""
        self.shard.end_writer(writer)

    def quarantine(self, guest: str, why: str) -> None:
        """Shut a writer outside the run out of this shard.

        Raises:
            ValueError: the name is none of a guest.
        """
        self._guests.quarantine(guest, why)

    def readmit(self, guest: str) -> None:
        """Let a writer outside the run in again that was shut out.

        Raises:
            ValueError: the name is none of a guest.
        """
        self._guests.readmit(guest)

    def lost(self, table: str, items: int) -> None:
        """Another shard has lost items of a table; on shard 0 only."""
        self._leader(table).deleted(items)

    def restore_limiter(self, table: str, *, inserted: int, sampled: int, items: int) -> None:
        """Set a limiter's counters to the sums over all shards; on shard 0 only."""
        self._leader(table).restore(inserted=inserted, sampled=sampled, removed=inserted - items)

    def _release(self, *, steps: bool, queues: Container[str]) -> None:
        """Let go of the files, and remove that of the steps and those of some queues."""
        self.shard.close(remove=steps)
        for name, queue in self._opened.items():
            queue.close(remove=name in queues)

    def close(self, *, remove: bool = True) -> None:
        """Stop serving, and remove the storage file unless told otherwise."""
        self._closing.set()
        for limiter in self._leased.values():
            with suppress(pa.ArrowException, flight.FlightError):
                limiter.return_unused()
        self._release(steps=remove, queues=self._opened if remove else ())
        self._end()

    def _end(self) -> None:
        """Stop serving. At the interpreter's exit that is all, and the files stay, as after a crash."""
        atexit.unregister(self._end)
        self._closing.set()
        self._health.close()
        end_serving(self, grace_s=2 * _POLL_S)


def _routes(found: dict[str, Any], *, what: str) -> dict[int, str]:
    """Numbers of shards → addresses."""
    if not all(number.isdecimal() and isinstance(address, str) for number, address in found.items()):
        raise SchemaError(f"{what}: expected numbers of shards with their addresses, received {str(found)[:200]}")
    return {int(number): address for number, address in found.items()}


def _window(found: dict[str, Any], shard: Shard) -> Window:
    """The window that a ticket asks for."""
    rules: dict[str, Any] = {
        "length": range(1, MOST_STEPS + 1),
        "burn_in": range(MOST_STEPS + 1),
        "stack": range(1, MOST_STACK + 1),
        "observations": ("all", "ends"),
        "stack_on_device": bool,
    }
    check_object(found, what="the window of DoGet", required={}, optional=rules)
    window = Window(**found)
    shard.check(window)
    return window


class _Leader:
    """Where the limiter of shard 0 is reached, which may change."""

    def __init__(self, address: str, security: Security) -> None:
        self._security = security
        self.follow(address)

    def follow(self, address: str) -> None:
        # The old client ends once its last call has.
        self._client = flight_client(address, self._security)

    def action(self, kind: str, body: dict[str, Any], *, timeout_s: float = 0.0) -> dict[str, Any]:
        """Ask it, where it may take `timeout_s`: a host that is gone without a word is waited for no longer than `_LATE_S` more."""
        found: dict[str, Any] = action(self._client, kind, body, timeout_s=timeout_s + _LATE_S)
        return found


def _leased(leader: _Leader, table: str, spec: ShardSpec) -> LeasedLimiter:
    """A share of the limiter on shard 0."""

    def lease(side: Side, least: int, most: int, deleted: int, timeout_s: float) -> tuple[int, str]:
        body = {
            "side": side,
            "least": least,
            "most": most,
            "deleted": deleted,
            "timeout_s": timeout_s,
            "shard": spec.index,
        }
        answer = leader.action("lease", {"table": table, "shard": spec.index, **body}, timeout_s=timeout_s)
        return int(answer["granted"]), str(answer["why"])

    def take_back(inserts: int, samples: int, deleted: int) -> None:
        leader.action("take_back", {"table": table, "inserts": inserts, "samples": samples, "deleted": deleted})

    return LeasedLimiter(lease, take_back, insert_block=spec.insert_block, sample_block=spec.sample_block)
