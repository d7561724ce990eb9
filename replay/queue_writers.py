"""How samplers write groups to a queue table: over Arrow Flight, or by calls in the one-process mode."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from .queues import Queue
from .schema import SchemaError
from .wire import CLOSE, LOST, RETRY_S, SEQUENCE

Connect = Callable[[str], flight.FlightClient]
AGAIN_S = 0.2  # between two tries to reach a lost shard
# What a server answers on purpose, and will again.
REFUSED = (flight.FlightServerError, flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError, SchemaError)


class CallQueueWriter:
    """Writes to a queue in this process; never waits."""

    def __init__(self, target: Queue, *, name: str | None = None) -> None:
        self._queue = target
        self._name = name or uuid.uuid4().hex
        self._sequence = target.connect(self._name)

    def append(self, batch: pa.RecordBatch) -> None:
        """As `QueueWriter.append`.

        Raises:
            RuntimeError: the queue has no room before the learner has taken some.
        """
        if not self._queue.insert(self._name, self._sequence + 1, batch, timeout_s=0.0):
            raise RuntimeError(f"inserting waits for {self._queue.why(self._name)}")
        self._sequence += 1

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._queue.disconnect(self._name, closed=True)


class QueueWriter:
    """Writes to one shard's queue over a DoPut stream, with at most `in_flight` messages not yet acknowledged.

    A message keeps its sequence number when it is sent again after a lost connection, and the shard applies a number once.
    """

    def __init__(
        self,
        address: str,
        schema: pa.Schema,
        *,
        table: str,
        in_flight: int = 4,
        retry_s: float = RETRY_S,
        name: str | None = None,
        connect: Connect = flight.FlightClient,
    ) -> None:
        """
        schema: the queue's columns.
        table: name of the queue.
        name: tells this writer from every other alive; None makes one up.
        connect: opens a Flight client.
        """
        self._address = address
        self._schema = schema.remove_metadata()
        self._in_flight = in_flight
        self._retry_s = retry_s
        self._new_client = connect
        self._command = {"queue": table, "writer": uuid.uuid4().hex if name is None else name}
        self._sequence = -1
        self._client: Any = None
        self._put: Any = None
        self._replies: Any = None
        self._unacknowledged: deque[tuple[int, pa.RecordBatch]] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._blocked_since: float | None = None
        self._shard_waits_for: str | None = None
        try:
            self._connect()
        except LOST as lost:
            self._reconnect(lost)
        self._sequence = max(self._sequence, self._applied_before)

    @property
    def waiting_for(self) -> str | None:
        """What `append` has been blocked by, in words; None while it is not blocked."""
        since, why = self._blocked_since, self._shard_waits_for
        if since is None:
            return None
        return f"the queue at {self._address} for {time.monotonic() - since:.0f} s" + (f": {why}" if why else "")

    def _connect(self) -> None:
        """Open a stream and send again what the shard has not applied."""
        self._client = self._new_client(self._address)
        descriptor = flight.FlightDescriptor.for_command(json.dumps(self._command).encode())
        self._put, self._replies = self._client.do_put(descriptor, self._schema)
        answer = self._replies.read()
        if answer is None:
            self._put.close()  # raises what the server said
            raise flight.FlightUnavailableError(f"{self._address} ended the stream")
        self._applied_before = int(json.loads(answer.to_pybytes())["applied"])
        self._applied(self._applied_before)
        with self._changed:
            self._error = None
            again = list(self._unacknowledged)
        # Read before anything is sent: the shard may have no room for what is sent again, and says so.
        reading = threading.Thread(target=self._read_replies, args=(self._replies,), name="queue-replies", daemon=True)
        reading.start()
        for sequence, batch in again:
            self._put.write_with_metadata(batch, SEQUENCE.pack(sequence))

    def _applied(self, number: int) -> None:
        with self._changed:
            self._shard_waits_for = None
            while self._unacknowledged and self._unacknowledged[0][0] <= number:
                self._unacknowledged.popleft()
            self._changed.notify_all()

    def _read_replies(self, replies: Any) -> None:
        error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
        try:
            while (answer := replies.read()) is not None:
                said = json.loads(answer.to_pybytes())
                if "applied" in said:
                    self._applied(int(said["applied"]))
                else:
                    self._shard_waits_for = said["waiting_for"]
        except LOST as lost:
            error = lost
        with self._changed:
            if replies is self._replies:
                self._error = error
                self._changed.notify_all()

    def append(self, batch: pa.RecordBatch) -> None:
        """Hand over rows of one or more groups, whole or in part. Blocks when the shard is behind. The batch is not copied.

        Raises:
            SchemaError: the rows have other columns than the queue.
            flight.FlightError: the shard refused the rows, or stayed away longer than `retry_s`.
        """
        if not batch.schema.equals(self._schema):
            raise SchemaError(f"expected rows with the columns {self._schema}; received {batch.schema}")
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
        """Wait until at most `most` messages are unacknowledged."""
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
            if isinstance(error, REFUSED) or time.monotonic() > deadline:
                raise error
            time.sleep(AGAIN_S)
            try:
                self._connect()
                return
            except LOST as again:
                error = again

    def flush(self) -> None:
        """Wait until everything appended is stored."""
        self._wait(0)

    def close(self) -> None:
        """Flush, and end the writer: groups that are still incomplete are dropped."""
        self._wait(0)
        with suppress(*LOST):  # every row is stored; incomplete groups then end with the writer's lease
            self._put.write_metadata(CLOSE)
            self._put.done_writing()
            self._put.close()
        self._client.close()
