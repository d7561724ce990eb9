"""How a shard receives guests: writers outside the run, who may be wrong, slow or hostile (`replay.guests`).

A guest's stream is a DoPut as that of every writer, but for its answers: one to each message, in order, of the message's
number and, where it was refused, a text that says why. A message is refused as a whole and the stream goes on. Since what
follows would not join on to what is stored, the episodes of the message's lanes are cut there, as truncated, and each of
these lanes goes on with a step that begins one.

What a guest does costs nobody else anything but the time of its own thread, of which gRPC makes one for each stream: it is
held back before its next message is read, while neither the shard's lock nor credits of a limiter are held. One thing is
not bounded here: Flight takes in a message as a whole, and unpacks it, before anybody can ask how large it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .guests import PREFIX, GuestLimits, RowBudget, RowCheck, check_name, guest_named
from .schema import SchemaError
from .security import HEADER, Security, check_batch, check_schema, parse_json, read_chunks, unauthenticated
from .shard import Shard, ShardLeavingError, WriterClosedError
from .wire import CLOSE, SEQUENCE, rows_from_arrow

_POLL_S = 0.5  # how often a guest that is held back is looked after
_STREAMS = 2  # a guest's at once: its own, and the one that takes its place
_MESSAGE_ROWS = 16  # a message counts as this many rows at least
_STREAM_S = 0.25  # a new stream, whose place may have to be made, counts as what the rate allows in this time
_IN_FLIGHT = 16  # messages that a guest may have sent before it knew that one before them was refused
_KNOWN = 1024  # guests that a shard remembers
_SHOWN = 500  # characters of a refusal in the statistics
_LANES_SHARE = 4  # guests' lanes together may take one segment in this many


class _Guest:
    """What a shard knows of a guest."""

    def __init__(self, limits: GuestLimits) -> None:
        # Held from the check of a message until it is applied, also while a limiter is waited for: what was checked is
        # still so then. It is the guest's own.
        self.turn = threading.Lock()
        self.calls = 0
        self.streams: list[_Stream] = []  # the newest last
        self.budget = RowBudget(limits.rows_per_s)
        self.rows = 0
        self.refused = 0
        self.last_refusal = ""
        self.waiting_s = 0.0
        self.bad = 0  # refused messages that count
        self.shut_out = ""  # why; "": it is not
        self.cut: set[int] = set()  # lanes whose episode a refusal has cut, until they begin another
        self.excused = 0  # messages that may still go on with such an episode

    def stats(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "refused": self.refused,
            "quarantined": bool(self.shut_out),
            "last_refusal": self.last_refusal,
            "waiting_s": self.waiting_s,
            "streams": len(self.streams),
        }


class _Stream:
    """One stream of a guest."""

    def __init__(self, name: str, guest: _Guest, context: Any) -> None:
        self.name = name
        self.guest = guest
        self.peer: str = context.peer()
        self.context = context
        self.ended = False  # by a newer one, or because the guest is shut out


class GuestCall(flight.ServerMiddleware):  # type: ignore[misc]
    """A call that showed a guest's token; the middleware of every other call is None."""

    def __init__(self, name: str, ended: Callable[[], None]) -> None:
        self.name = name
        self._ended = ended

    def call_completed(self, exception: BaseException | None) -> None:
        self._ended()


class GuestGate(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Lets calls in that show the run's token, and those of guests where they want to write."""

    def __init__(self, security: Security, admit: Callable[[str], GuestCall]) -> None:
        self._security = security
        self._admit = admit

    def start_call(self, info: Any, headers: Mapping[str, list[str | bytes]]) -> GuestCall | None:
        given = headers.get(HEADER, [])
        name = self._guest(given)
        if name is None:
            if (why := unauthenticated(given, self._security)) is not None:
                raise flight.FlightUnauthenticatedError(why)
            return None
        if info.method != flight.FlightMethod.DO_PUT:
            raise flight.FlightUnauthorizedError(f"the token of {name} lets it write (DoPut) and do nothing else")
        return self._admit(name)

    def _guest(self, given: list[str | bytes]) -> str | None:
        if len(given) != 1:
            return None
        text = given[0].decode(errors="replace") if isinstance(given[0], bytes) else given[0]
        scheme, _, token = text.partition(" ")
        return guest_named(self._security, token) if scheme == "Bearer" else None


class GuestService:
    """The guests of one shard; thread-safe."""

    def __init__(
        self, shard: Shard, limits: GuestLimits, *, closing: threading.Event, cut: Callable[[str], None]
    ) -> None:
        """
        closing: set when the shard ends.
        cut: ends the connection of a peer, as Flight writes its address.
        """
        self._shard = shard
        self._limits = limits
        self._closing = closing
        self._cut = cut
        self._expected = shard.schema.arrow()
        # A message may have bitmaps of validity, and pads each buffer.
        self._max_bytes = limits.message_rows * (shard.schema.dtype.itemsize + 5) + 1024
        self._check = RowCheck(shard.schema, limits.lanes)
        self._guests: dict[str, _Guest] = {}
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ who may come

    def admit(self, name: str) -> GuestCall:
        """A guest calls, before anything it sends is read.

        Raises:
            flight.FlightUnauthorizedError: it is shut out.
            flight.FlightUnavailableError: it has too many calls open, or too many guests are known.
        """
        with self._lock:
            guest = self._known(name)
            if guest.shut_out:
                raise flight.FlightUnauthorizedError(guest.shut_out)
            if guest.calls >= _STREAMS:
                raise flight.FlightUnavailableError(
                    f"{name} has {_STREAMS} streams open, as many as it may; end one, or try again later"
                )
            guest.calls += 1

        def ended() -> None:
            with self._lock:
                guest.calls -= 1

        return GuestCall(name, ended)

    def _known(self, name: str) -> _Guest:
        guest = self._guests.get(name)
        if guest is None:
            if len(self._guests) >= _KNOWN:
                idle = (known for known, guest in self._guests.items() if not (guest.calls or guest.shut_out))
                if (oldest := next(idle, None)) is None:
                    raise flight.FlightUnavailableError(f"this shard knows {_KNOWN} guests, as many as it can")
                del self._guests[oldest]
            guest = self._guests[name] = _Guest(self._limits)
        return guest

    def quarantine(self, name: str, why: str) -> None:
        """Shut a guest out: its connections end, its lanes end as truncated, and later calls are refused with `why`.

        The storage remembers a writer that was ended so: a shard that comes back refuses it too, without telling why.

        Raises:
            ValueError: the name is none of a guest.
        """
        check_name(name)
        self._shut_out(name, why, by=None)

    def _shut_out(self, name: str, why: str, *, by: _Stream | None) -> None:
        """`by`: the stream that was at fault, which is yet to be told."""
        with self._lock:
            guest = self._known(name)
            guest.shut_out = f"{name} is shut out: {why}; who runs this can let it in again"
            streams = list(guest.streams)
        self._shard.end_writer(name)
        self._end(streams, by=by)

    def _end(self, streams: list[_Stream], *, by: _Stream | None) -> None:
        """End some streams, which may wait for a guest that has long gone; not `by`, nor what shares its connection."""
        for stream in streams:
            if stream is not by:
                stream.ended = True
                if by is None or stream.peer != by.peer:
                    self._cut(stream.peer)

    def readmit(self, name: str) -> None:
        """Let a guest in again, with no bad message to its name; its numbers go on where they were.

        Raises:
            ValueError: the name is none of a guest.
        """
        check_name(name)
        with self._lock:
            guest = self._known(name)
            guest.shut_out, guest.bad = "", 0
        self._shard.reopen_writer(name)

    def stats(self) -> dict[str, Any]:
        """Of each guest by name: its rows, messages `refused`, whether it is `quarantined`, its `last_refusal`, how long
        it was held back in all (`waiting_s`), and how many `streams` it has open."""
        with self._lock:
            return {name: guest.stats() for name, guest in self._guests.items()}

    # ------------------------------------------------------------------ what they send

    def do_put(self, context: Any, name: str, command: bytes | None, reader: Any, writer: Any) -> None:
        """A guest's stream, for as long as it lasts. A newer one takes its place, for it may have been lost without a word.

        Raises:
            flight.FlightError: the guest did something that ends it.
        """
        with self._lock:
            guest = self._guests[name]
            before = list(guest.streams)
            stream = _Stream(name, guest, context)
            guest.streams.append(stream)
        try:
            if self._hold_back(stream, self._limits.rows_per_s * _STREAM_S):
                self._end(before, by=stream)
                _check_writer(name, command)
                self._read(stream, reader, writer)
            if guest.shut_out:
                raise flight.FlightUnauthorizedError(guest.shut_out)
            if stream.ended:
                raise flight.FlightUnavailableError(f"a newer stream of {name} took the place of this one")
        except ShardLeavingError as error:  # the guest is to ask where to write now
            raise flight.FlightUnavailableError(str(error)) from None
        except WriterClosedError as error:
            raise flight.FlightUnauthorizedError(guest.shut_out or str(error)) from None
        except SchemaError as error:
            raise flight.FlightServerError(str(error)) from None
        finally:
            with self._lock:
                guest.streams.remove(stream)

    def _read(self, stream: _Stream, reader: Any, writer: Any) -> None:
        check_schema(reader.schema, self._expected)
        last = self._shard.connect(stream.name)
        closed = False
        try:
            writer.write(SEQUENCE.pack(last))
            for chunk in self._chunks(stream, reader):
                metadata = b"" if chunk.app_metadata is None else chunk.app_metadata.to_pybytes()
                if chunk.data is None:
                    closed = metadata == CLOSE
                    return
                number = self._number(stream, metadata)
                why = self._take(stream, number, chunk.data)
                if why is None:
                    return
                writer.write(SEQUENCE.pack(number) + why.encode())
                if stream.guest.shut_out:
                    return
                rows = min(chunk.data.num_rows, self._limits.message_rows)
                if not self._hold_back(stream, max(rows, _MESSAGE_ROWS)):
                    return
        finally:
            self._shard.disconnect(stream.name, closed=closed)

    def _over(self, stream: _Stream) -> bool:
        return stream.ended or self._closing.is_set() or bool(stream.context.is_cancelled())

    def _hold_back(self, stream: _Stream, rows: float) -> bool:
        """Wait until the guest's rate lets it go on. Returns whether its stream does."""
        guest = stream.guest
        with self._lock:
            left = guest.budget.spend(rows)
            guest.waiting_s += left
        until = time.monotonic() + left
        while (left := until - time.monotonic()) > 0:
            if self._closing.wait(min(left, _POLL_S)) or self._over(stream):
                return False
        return True

    def _take(self, stream: _Stream, number: int, batch: pa.RecordBatch) -> str | None:
        """Check a message and insert it. Returns why it is refused, "" if it is not; None: the stream is over."""
        shard, guest = self._shard, stream.guest
        with guest.turn:
            if self._over(stream):
                return None
            try:
                columns = check_batch(
                    batch, self._expected, max_rows=self._limits.message_rows, max_bytes=self._max_bytes
                )
            except SchemaError as error:
                return self._refuse(stream, f"message {number}: {error}")
            lanes, rows = rows_from_arrow(columns, shard.schema)
            found = shard.progress(stream.name, number, lanes)
            if found is not None:  # else it is a duplicate, which is left out
                fault = self._check(lanes, rows, found.is_open, begin=found.applied)
                if fault is not None:
                    in_flight = fault.unopened and int(lanes[fault.row]) in guest.cut and guest.excused > 0
                    return self._refuse(stream, f"message {number}, {fault}", lanes, in_flight=in_flight)
                self._check_room(found.new_lanes)
            while not shard.insert(stream.name, number, lanes, rows, timeout_s=_POLL_S):
                if self._over(stream):
                    return None
            if found is not None:
                guest.rows += len(rows)
                guest.cut.difference_update(lanes.tolist())
            return ""

    def _check_room(self, new: int) -> None:
        """
        Raises:
            SchemaError: with so many new lanes guests would take room that the run's own writers need.
        """
        if not new:
            return
        most, taken = self._shard.layout.segments // _LANES_SHARE, self._shard.count_lanes(PREFIX)
        if taken + new > most:
            raise SchemaError(
                f"expected at most {most} lanes of guests together on this shard, received {new} more beside {taken}; "
                "write fewer, or raise replay.capacity"
            )

    def _chunks(self, stream: _Stream, reader: Any) -> Iterator[Any]:
        try:
            yield from read_chunks(reader)
        except SchemaError as error:
            with stream.guest.turn:
                self._refuse(stream, str(error))
            raise

    def _number(self, stream: _Stream, metadata: bytes) -> int:
        """The number of a message.

        Raises:
            SchemaError: it has none.
        """
        number = SEQUENCE.unpack(metadata)[0] if len(metadata) == SEQUENCE.size else -1
        if number < 0:
            why = (
                f"expected a message's number, 0 or more, as {SEQUENCE.size} bytes of metadata; received "
                f"{len(metadata)} bytes{f' that hold {number}' if len(metadata) == SEQUENCE.size else ''}"
            )
            with stream.guest.turn:
                self._refuse(stream, why)
            raise SchemaError(why)
        return int(number)

    def _refuse(self, stream: _Stream, why: str, lanes: np.ndarray | None = None, *, in_flight: bool = False) -> str:
        """Count a refusal, cut the episodes of the message's lanes (None: of all), and shut out whom that was one too
        many of. Returns what the guest is told. Its `turn` is held.

        in_flight: it may have been sent before the guest knew of the last refusal, and follows from that alone.
        """
        guest = stream.guest
        cut = self._shard.end_lanes(stream.name, lanes)
        with self._lock:
            guest.refused += 1
            guest.last_refusal = why[:_SHOWN]
            guest.cut.update(cut)
            if lanes is not None:
                guest.cut.update(lane for lane in lanes.tolist() if 0 <= lane < self._limits.lanes)
            if in_flight:
                guest.excused -= 1
            else:
                guest.bad, guest.excused = guest.bad + 1, _IN_FLIGHT
        if guest.bad >= self._limits.bad_messages and not guest.shut_out:
            self._shut_out(stream.name, f"{guest.bad} of its messages were refused, the last: {why}", by=stream)
        return f"{why}; nothing of it is stored, and the episodes of its lanes end here: go on with is_first"


def _check_writer(name: str, command: bytes | None) -> None:
    """
    Raises:
        flight.FlightUnauthorizedError: the stream of this guest is to be something else than its rows.
    """
    try:
        parse_json(command or b"", what="the descriptor of DoPut", required={"writer": (name,)})
    except SchemaError as error:
        raise flight.FlightUnauthorizedError(f"the token of {name} lets it write as {name} alone: {error}") from None
