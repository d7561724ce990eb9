"""How actors write to the replay service: over Arrow Flight, or by a call in the one-process mode."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .schema import SchemaError, StepSchema
from .wire import CLOSE, LOST, RETRY_S, SEQUENCE, pack_sequence

if TYPE_CHECKING:
    from .shard import Shard  # it compiles kernels, which an actor has no use for

MESSAGE_BYTES = 2**20  # larger messages gain nothing over loopback
MOST_BYTES = 2**30  # Arrow Flight sends no more than 2 GiB at once
REFUSED = (flight.FlightServerError, flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)
_PAUSE_S = 0.2  # between two attempts to connect
_END_S = 5.0  # how long `close` waits for a shard that has stored every row to end the stream


class Writer(Protocol):
    """Where an actor's steps go."""

    @property
    def waiting_for(self) -> str | None:
        """What `append`, `flush` or `close` is blocked by, in words; None while none is."""

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """Hand over steps: lanes int32 (n,), rows structured (n,), those of one lane in time order. Blocks when behind.

        Both arrays are the caller's again when it returns.
        """

    def flush(self) -> None:
        """Wait until everything appended is stored."""

    def close(self) -> None:
        """Flush, and end the writer's lanes: their open episodes are closed as truncated."""


class CallWriter:
    """Writes to a shard in this process; never waits."""

    waiting_for: str | None = None

    def __init__(self, shard: Shard, *, writer: str | None = None) -> None:
        self._shard = shard
        self._name = writer or uuid.uuid4().hex
        self._sequence = shard.connect(self._name)

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `Writer.append`.

        Raises:
            RuntimeError: the limiter lets no more in before the learner has sampled.
        """
        self._sequence += 1
        if not self._shard.insert(self._name, self._sequence, lanes, rows, timeout_s=0.0):
            waits = "; ".join(table.limiter.why("insert") for table in self._shard.tables.values())
            raise RuntimeError(f"inserting waits for {waits}; raise replay.error_buffer")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._shard.disconnect(self._name, closed=True)


class _Message:
    """Memory for the rows of one message, used again once the shard has acknowledged them."""

    def __init__(self, schema: pa.Schema, rows: int) -> None:
        self.lanes = np.empty(rows, np.int32)
        self.rows = np.empty((rows, schema.field("row").type.byte_width), np.uint8)
        columns = [
            pa.Array.from_buffers(field.type, rows, [None, pa.py_buffer(values)], 0)
            for field, values in zip(schema, (self.lanes, self.rows), strict=True)
        ]
        self._all = pa.RecordBatch.from_arrays(columns, schema=schema)
        self.count = 0
        self.ended: list[int] = []  # lanes that end behind its rows
        self.sequence = -1

    def put_into(self, put: Any) -> None:
        """Send it over a stream."""
        put.write_with_metadata(self.batch(), pack_sequence(self.sequence, self.ended))

    def batch(self) -> pa.RecordBatch:
        """The rows that are in it, without a copy."""
        return self._all.slice(0, self.count)


class FlightWriter:
    """Writes to a shard over one DoPut stream.

    `append` copies the rows into a message. It is sent at once while fewer than `in_flight` messages are unacknowledged;
    else it gathers what is appended until a reply comes, and is sent then (group commit): a single batch is stored
    soon, and many are stored with few messages. From then on it keeps its sequence number and its contents, also when it
    is sent again after a lost connection; the shard applies a number once, so a retry never doubles a step.

    A thread of the writer's own reads the replies, sends what was gathered meanwhile, and connects again. An error that
    it meets is raised by the next call. The other methods are for one thread at a time.
    """

    def __init__(
        self,
        address: str,
        schema: StepSchema,
        *,
        in_flight: int = 2,
        message_rows: int | None = None,
        retry_s: float = RETRY_S,
        name: str | None = None,
        wait: bool = True,
        connect: Callable[[str], flight.FlightClient] = flight.FlightClient,
    ) -> None:
        """Returns when the shard has accepted the writer, or at once.

        in_flight: messages sent and not acknowledged, at most. One more is being filled: `append` blocks when
            (in_flight + 1) · message_rows rows are not stored.
        message_rows: rows in a message, at most. The limiter lets a message in as a whole, so it must not be more than
            the table's error buffer allows one writer. None: what fits `MESSAGE_BYTES`.
        retry_s: how long a lost shard is waited for, in seconds, while there are rows for it.
        name: tells this writer from every other, dead or alive; None makes one up.
        wait: return when the shard has accepted the writer; else the next call raises why it has not.
        connect: makes the client of an address.

        Raises:
            flight.FlightError: the shard refused the writer, or was not there for `retry_s`.
        """
        self._arrow = schema.arrow()
        size = schema.dtype.itemsize
        if message_rows is None:
            message_rows = max(1, MESSAGE_BYTES // size)
        if in_flight < 1 or not 1 <= message_rows <= MOST_BYTES // size:
            raise ValueError(
                f"expected in_flight of at least 1 and message_rows of 1 to {MOST_BYTES // size} ({size} bytes each); "
                f"received {in_flight} and {message_rows}"
            )
        self._address = address
        self._dtype = schema.dtype
        self._opaque = np.dtype((np.void, size))
        self._retry_s = retry_s
        self._in_flight = in_flight
        self._message_rows = message_rows
        self._name = uuid.uuid4().hex if name is None else name
        self._new_client = connect

        # All below is guarded by `_changed`. A message is in one of three places, oldest in front.
        self._changed = threading.Condition()
        self._sent: deque[_Message] = deque()  # numbered, not acknowledged
        self._filling = _Message(self._arrow, message_rows)
        self._free = [_Message(self._arrow, message_rows) for _ in range(in_flight)]
        self._held = 0  # rows appended and not acknowledged
        self._sequence = -1  # of the newest message sent
        self._put: Any = None  # where messages go; None while there is no connection
        self._sending: Any = None  # the `_put` a thread is writing to: the one that may, which keeps messages in order
        self._generation = 0  # of the address: the thread of an earlier one changes nothing any more
        self._accepted = False  # by the shard, at least once
        self._closing = False
        self._lost: Exception | None = None  # why there is no connection
        self._error: Exception | None = None  # why there will be none
        self._blocked_since: float | None = None

        self._thread = self._start()
        if not wait:
            return
        try:
            self.wait_accepted()
        except BaseException:
            self._end()
            raise

    def wait_accepted(self, timeout_s: float | None = None) -> bool:
        """Wait until the shard has accepted the writer; False: not within `timeout_s`.

        Raises:
            flight.FlightError: the shard refused the writer, or was not there for `retry_s`.
        """
        if self._accepted:
            return True
        with self._changed:
            self._wait(lambda: self._accepted or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            return self._accepted

    @property
    def unacknowledged(self) -> int:
        """Rows appended that the shard has not said to have."""
        return self._held

    @property
    def waiting_for(self) -> str | None:
        since, held, lost = self._blocked_since, self._held, self._lost
        if since is None:
            return None
        why = f"{held} rows not acknowledged"
        if lost is not None:
            why += f", connection lost: {str(lost).partition(chr(10))[0][:200] or type(lost).__name__}"
        return f"replay at {self._address} for {time.monotonic() - since:.0f} s: {why}"

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `Writer.append`.

        Raises:
            SchemaError: the rows have another layout than the table, or there are not as many lanes.
            flight.FlightError: the shard refused rows, or stayed away longer than `retry_s`.
            ValueError: the writer is closed.
        """
        if rows.dtype is not self._dtype and rows.dtype != self._dtype:
            raise SchemaError(f"rows have the layout {rows.dtype}; the table expects {self._dtype}")
        count = len(rows)
        if rows.ndim != 1 or lanes.shape != rows.shape:
            raise SchemaError(f"lanes {lanes.shape} came with rows {rows.shape}; expected one lane for each row")
        # Whole rows as opaque bytes: numpy copies structured rows field by field otherwise.
        if not rows.flags.c_contiguous:
            rows = np.ascontiguousarray(rows.view(self._opaque))
        data = rows.view(np.uint8).reshape(count, self._opaque.itemsize)
        done = 0
        while True:
            with self._changed:
                if not self._has_room():
                    self._wait(self._has_room)
                message = self._filling
                begin = message.count
                end = min(begin + count - done, self._message_rows)
                part = slice(done, done + end - begin)
                message.lanes[begin:end] = lanes[part]
                message.rows[begin:end] = data[part]
                message.count = end
                self._held += end - begin
                if self._put is None:
                    self._changed.notify_all()  # the thread may have given the shard up until there are rows for it
                put = self._may_send()
            done = part.stop
            if put is not None:
                self._blocked_since = time.monotonic()  # the connection may be full
                self._send(put)
                self._blocked_since = None
            if done == count:
                return

    def end_lanes(self, lanes: Iterable[int]) -> None:
        """End some lanes: their open episodes are closed as truncated. Rows for them that follow begin afresh. Never blocks."""
        with self._changed:
            self._filling.ended += lanes  # no more rows go into this message
            put = self._may_send()
        if put is not None:
            self._send(put)

    def readdress(self, address: str) -> None:
        """Write to the shard at another address from now on; what is not acknowledged is sent there. For any thread.

        Whoever waits for the shard waits for the new address, as long again. Does nothing where the address is the same.
        """
        with self._changed:
            if address == self._address or self._closing or self._error is not None:
                return
            self._address = address
            old, self._put, self._sending = self._put, None, None
            self._generation += 1
            self._thread = self._start()
            self._changed.notify_all()
        if old is not None:  # in a thread: it waits for what lies in a connection that may be dead
            threading.Thread(target=_end_stream, args=(old,), name="writer that moved", daemon=True).start()

    def flush(self) -> None:
        """As `Writer.flush`.

        Raises:
            flight.FlightError: the shard refused rows, or stayed away longer than `retry_s`.
        """
        with self._changed:
            if self._held:
                self._wait(lambda: self._held == 0 or self._error is not None)
            if self._held and self._error is not None:
                raise self._error

    def close(self) -> None:
        """As `Writer.close`; once more does nothing.

        Raises:
            flight.FlightError: the shard refused rows, or stayed away longer than `retry_s`.
        """
        try:
            self.flush()
        finally:
            if self._error is not None:
                self._thread.join()  # to set it was the thread's last act
        self._end()

    def _end(self) -> None:
        """End the lanes and the thread."""
        with self._changed:
            first, self._closing = not self._closing, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._sending is None)
            put = self._sending = self._put if first else None
        if put is not None:
            _say_close(put)
            with self._changed:
                self._sending = None
                self._changed.notify_all()
        self._thread.join(_END_S)

    def _has_room(self) -> bool:
        """Whether a row can be staged. `_changed` is held, as in all methods below that do not take it themselves."""
        if self._error is not None:
            raise self._error
        if self._closing:
            raise ValueError(f"the writer to {self._address} is closed")
        return self._filling.count < self._message_rows and not self._filling.ended

    def _wait(self, until: Callable[[], bool], timeout_s: float | None = None) -> None:
        self._blocked_since = time.monotonic()
        try:
            self._changed.wait_for(until, timeout_s)
        finally:
            self._blocked_since = None

    def _may_send(self) -> Any:
        """The stream, if there is a message to send over it and nobody who does; who asked must then call `_send`."""
        if self._sending is None and self._ready():
            self._sending = self._put
            return self._put
        return None

    def _ready(self) -> bool:
        staged = self._filling.count > 0 or bool(self._filling.ended)
        return self._put is not None and staged and len(self._sent) < self._in_flight

    def _send(self, put: Any) -> None:
        """Send what is staged, and what is staged meanwhile, until the stream has enough. Takes `_changed`."""
        try:
            while True:
                with self._changed:
                    if self._sending is not put:
                        return  # the shard has another address now, and another stream
                    if not self._ready():
                        self._sending = None
                        if self._put is None or self._closing:
                            self._changed.notify_all()
                        return
                    message = self._filling
                    self._sequence += 1
                    message.sequence = self._sequence
                    self._sent.append(message)
                    self._filling = self._free.pop()
                message.put_into(put)
        except BaseException as error:  # an interrupt too: nobody knows then whether the message is on its way
            with self._changed:
                if self._sending is put:
                    self._put = self._sending = None
                    self._changed.notify_all()
            # That ends the replies as well, if they have not ended yet: their reader then sends all again, over a new stream.
            _end_stream(put)
            if not isinstance(error, LOST):
                raise

    def _acknowledge(self, answer: pa.Buffer, generation: int) -> Any:
        """Free what was applied. Returns `_may_send`. Takes `_changed`."""
        (applied,) = SEQUENCE.unpack(answer)
        with self._changed:
            if generation != self._generation:
                return None  # the messages are being sent elsewhere
            self._sequence = max(self._sequence, applied)  # a writer of this name may have been before
            while self._sent and self._sent[0].sequence <= applied:
                message = self._sent.popleft()
                self._held -= message.count
                message.count = 0
                message.ended.clear()
                self._free.append(message)  # used next: it is still in the cache
            self._changed.notify_all()
            return self._may_send()

    # ------------------------------------------------------------------ thread

    def _start(self) -> threading.Thread:
        """The thread that talks to the present address."""
        name = f"writer to {self._address}"
        thread = threading.Thread(target=self._run, args=(self._generation,), name=name, daemon=True)
        thread.start()
        return thread

    def _run(self, generation: int) -> None:
        give_up = time.monotonic() + self._retry_s

        def over() -> bool:
            return self._closing or generation != self._generation

        try:
            while True:
                accepted, lost = self._talk(generation)
                with self._changed:
                    if over():
                        return
                    # What the shard has refused on purpose, it will refuse again.
                    if isinstance(lost, REFUSED):
                        raise lost
                    self._lost = lost
                    if accepted:
                        give_up = time.monotonic() + self._retry_s
                    if time.monotonic() > give_up:
                        if self._wanted():
                            raise lost
                        self._changed.wait_for(lambda: over() or self._wanted())
                        give_up = time.monotonic() + self._retry_s
                    else:
                        self._changed.wait_for(over, _PAUSE_S)
                    if over():
                        return
        except Exception as error:
            with self._changed:
                if generation == self._generation:
                    self._error = error
                self._changed.notify_all()

    def _wanted(self) -> bool:
        """Whether somebody waits for the connection."""
        return self._held > 0 or not self._accepted

    def _talk(self, generation: int) -> tuple[bool, Exception]:
        """Open a stream, send again what the shard has not applied, and read replies until it ends.

        Returns whether the shard accepted the writer, and what ended the stream.
        """
        client = put = None
        accepted = False
        address = self._address
        lost: Exception = flight.FlightUnavailableError(f"{address} ended the stream")
        try:
            client = self._new_client(address)
            descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": self._name}).encode())
            put, replies = client.do_put(descriptor, self._arrow)
            # The first reply comes once the stream's schema is there, which `begin` inside do_put has sent.
            if (answer := replies.read()) is not None:
                self._acknowledge(answer, generation)
                self._resend(put, generation)
                accepted = True
                while (answer := replies.read()) is not None:
                    if (free := self._acknowledge(answer, generation)) is not None:
                        self._send(free)
        except LOST as error:
            lost = error
        finally:
            with self._changed:
                if generation == self._generation:
                    self._put = None
                    self._changed.wait_for(lambda: self._sending is None or generation != self._generation)
            if put is not None:
                try:
                    put.close()  # raises what the shard said, if it ended the stream
                except LOST as said:
                    lost = said
            if client is not None:
                client.close()
        return accepted, lost

    def _resend(self, put: Any, generation: int) -> None:
        """Send what is not acknowledged over a new stream, and open it for what follows. Takes `_changed`."""
        with self._changed:
            again = list(self._sent) if generation == self._generation else []
        for message in again:
            message.put_into(put)
        with self._changed:
            if generation != self._generation:
                return
            self._put, self._lost, self._accepted = put, None, True
            self._changed.notify_all()
            free, closing = self._may_send(), self._closing
        if free is not None:
            self._send(free)
        if closing:  # said while there was no stream to say it on
            _say_close(put)


def _say_close(put: Any) -> None:
    with suppress(*LOST):  # every step is stored; the lanes then end with the writer's lease
        put.write_metadata(CLOSE)
        put.done_writing()


def _end_stream(put: Any) -> None:
    with suppress(*LOST):
        put.done_writing()


class LaneWriter:
    """Spreads the lanes of one actor over several shards: lane l goes to writer l modulo their number."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        if not 1 <= len(writers) < 256:
            raise ValueError(f"expected 1 to 255 writers, received {len(writers)}")
        self._writers = list(writers)

    @property
    def waiting_for(self) -> str | None:
        return next((why for w in self._writers if (why := w.waiting_for)), None)

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `Writer.append`."""
        writer = (lanes % len(self._writers)).astype(np.uint8)
        # Stable, so that a lane's rows stay in order; numpy sorts bytes in linear time.
        order = np.argsort(writer, kind="stable")
        counts = np.bincount(writer, minlength=len(self._writers)).tolist()
        lanes = lanes[order]
        # Whole rows as opaque bytes: numpy copies structured rows field by field otherwise.
        rows = rows.view(np.dtype((np.void, rows.dtype.itemsize)))[order].view(rows.dtype)
        begin = 0
        for one, count in zip(self._writers, counts, strict=True):
            if count:
                one.append(lanes[begin : begin + count], rows[begin : begin + count])
            begin += count

    def flush(self) -> None:
        """As `Writer.flush`."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """As `Writer.close`, all of them; raises what the first one that failed has raised."""
        failed: Exception | None = None
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed
