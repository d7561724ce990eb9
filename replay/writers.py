"""How actors write to the replay service: over Arrow Flight, or by a call in the one-process mode."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .schema import SchemaError, StepSchema
from .shard import Shard
from .wire import CLOSE, LOST, RETRY_S, SEQUENCE, column


class Writer(Protocol):
    """Where an actor's steps go."""

    @property
    def waiting_for(self) -> str | None:
        """What `append` has been blocked by, in words; None while it is not blocked."""

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """Hand over steps: lanes int32 (n,), rows structured (n,), those of one lane in time order. Blocks when behind."""

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
            raise RuntimeError(f"inserting waits for {self._shard.limiter.why('insert')}; raise replay.error_buffer")

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._shard.disconnect(self._name, closed=True)


class FlightWriter:
    """Writes to a shard over one DoPut stream, with at most `in_flight` batches not yet acknowledged.

    A batch keeps its sequence number when it is sent again after a lost connection, and the shard applies a number
    once: so a retry never doubles a step.
    """

    def __init__(
        self, address: str, schema: StepSchema, *, in_flight: int = 4, retry_s: float = RETRY_S, name: str | None = None
    ) -> None:
        """`name` tells this writer from every other, dead or alive; None makes one up."""
        self._address = address
        self._dtype = schema.dtype
        self._schema = schema.arrow()
        self._retry_s = retry_s
        self._in_flight = in_flight
        self._name = uuid.uuid4().hex if name is None else name
        self._sequence = -1
        self._put: Any = None
        self._replies: Any = None
        self._unacknowledged: deque[tuple[int, pa.RecordBatch]] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._blocked_since: float | None = None
        try:
            self._connect()
        except LOST as lost:
            self._reconnect(lost)

    @property
    def waiting_for(self) -> str | None:
        since = self._blocked_since
        return None if since is None else f"replay at {self._address} for {time.monotonic() - since:.0f} s"

    def _connect(self) -> None:
        """Open a stream and send again what the shard has not applied."""
        self._client = flight.FlightClient(self._address)
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": self._name}).encode())
        self._put, self._replies = self._client.do_put(descriptor, self._schema)
        # The server's first answer comes once the stream's schema is there, which `begin` inside do_put has sent.
        answer = self._replies.read()
        if answer is None:
            self._put.close()  # raises what the server said
            raise flight.FlightUnavailableError(f"{self._address} ended the stream")
        self._applied(answer)
        with self._changed:
            self._error = None
            again = list(self._unacknowledged)
        for sequence, batch in again:
            self._put.write_with_metadata(batch, SEQUENCE.pack(sequence))
        threading.Thread(target=self._read_replies, args=(self._replies,), name="writer-replies", daemon=True).start()

    def _applied(self, answer: Any) -> None:
        (applied,) = SEQUENCE.unpack(answer)
        with self._changed:
            while self._unacknowledged and self._unacknowledged[0][0] <= applied:
                self._unacknowledged.popleft()
            self._changed.notify_all()

    def _read_replies(self, replies: Any) -> None:
        error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
        try:
            while (answer := replies.read()) is not None:
                self._applied(answer)
        except LOST as lost:
            error = lost
        with self._changed:
            if replies is self._replies:
                self._error = error
                self._changed.notify_all()

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `Writer.append`.

        Raises:
            SchemaError: the rows have another layout than the table.
            flight.FlightError: the shard refused the rows, or stayed away longer than `retry_s`.
        """
        if rows.dtype != self._dtype:
            raise SchemaError(f"rows have the layout {rows.dtype}; the table expects {self._dtype}")
        columns = [
            # The caller may use its buffers again at once: the copies are ours until the shard has answered.
            pa.array(np.array(lanes, np.int32)),
            column(self._schema.field(1).type, np.array(rows, order="C").view(np.uint8), len(rows)),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=self._schema)
        self._wait(self._in_flight - 1)
        with self._changed:
            self._sequence += 1
            self._unacknowledged.append((self._sequence, batch))
        self._blocked_since = time.monotonic()  # the connection may be full
        try:
            self._put.write_with_metadata(batch, SEQUENCE.pack(self._sequence))
        except LOST as lost:
            self._reconnect(lost)
        self._blocked_since = None

    def _wait(self, most: int) -> None:
        """Wait until at most `most` batches are unacknowledged."""
        while True:
            with self._changed:
                if len(self._unacknowledged) <= most:
                    self._blocked_since = None
                    return
                self._blocked_since = self._blocked_since or time.monotonic()
                self._changed.wait_for(lambda: self._error is not None or len(self._unacknowledged) <= most, 1.0)
                error = self._error
            if error is not None and len(self._unacknowledged) > most:
                self._reconnect(error)

    def _reconnect(self, error: Exception) -> None:
        deadline = time.monotonic() + self._retry_s
        if self._put is not None:
            try:
                self._put.close()  # raises what the shard said, if it ended the stream
            except LOST as said:
                error = said
        while True:
            # What the server has refused on purpose, it will refuse again.
            if isinstance(error, flight.FlightServerError) or time.monotonic() > deadline:
                raise error
            time.sleep(0.2)
            try:
                self._connect()
                return
            except LOST as again:
                error = again

    def flush(self) -> None:
        self._wait(0)

    def close(self) -> None:
        self._wait(0)
        with suppress(*LOST):  # every step is stored; the lanes then end with the writer's lease
            self._put.write_metadata(CLOSE)
            self._put.done_writing()
            self._put.close()
        self._client.close()


class LaneWriter:
    """Spreads the lanes of one actor over several shards."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)

    @property
    def waiting_for(self) -> str | None:
        return next((w.waiting_for for w in self._writers if w.waiting_for), None)

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        for index, writer in enumerate(self._writers):
            mine = lanes % len(self._writers) == index
            if mine.any():
                writer.append(lanes[mine], rows[mine])

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
