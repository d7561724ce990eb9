"""Deliveries of one shard's queue: over Arrow Flight, or by calls in the one-process mode."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.flight as flight

from .queue_spec import SETTINGS, QueueSpec
from .queue_writers import AGAIN_S, REFUSED, Connect
from .queues import Delivery, Queue
from .schema import SchemaError
from .wire import LOST, RETRY_S, action


class QueueSource(Protocol):
    """Deliveries of one shard's queue."""

    max_policy_lag: int | None

    @property
    def waiting(self) -> int:
        """Groups that wait at the shard, as far as is known; 0 while it is lost."""
        ...

    def tell(self, version: int) -> None:
        """Say the reader's policy version."""

    def take(self, timeout_s: float) -> Delivery | None:
        """The next delivery; None when none came in time."""

    def acknowledge(self, used: Sequence[int], returned: Sequence[int] = ()) -> None:
        """Consume the groups of leases, and give others back. It is sent again until the shard has confirmed it."""

    def flush(self) -> None:
        """Wait until what was acknowledged is consumed for good."""

    def why(self) -> str:
        """What deliveries wait for, in words."""

    def close(self) -> None:
        """Give back what was delivered and not acknowledged."""


class CallQueueSource:
    """Deliveries of a queue in this process."""

    def __init__(
        self, source: Queue, *, groups: int | None = None, rows: int | None = None, partial: bool = False
    ) -> None:
        self.max_policy_lag = source.spec.max_policy_lag
        self._queue = source
        self._name = uuid.uuid4().hex
        self._wanted: dict[str, Any] = {"groups": groups, "rows": rows, "partial": partial}
        self._version: int | None = None
        source.spec.check_batch(groups=groups, rows=rows)
        source.open_reader(self._name, self._name)

    @property
    def waiting(self) -> int:
        return self._queue.waiting_groups

    def tell(self, version: int) -> None:
        self._version = version

    def take(self, timeout_s: float) -> Delivery | None:
        return self._queue.deliver(self._name, self._name, version=self._version, timeout_s=timeout_s, **self._wanted)

    def acknowledge(self, used: Sequence[int], returned: Sequence[int] = ()) -> None:
        self._queue.acknowledge(self._name, used, returned)

    def flush(self) -> None:
        pass

    def why(self) -> str:
        return self._queue.why(self._name)

    def close(self) -> None:
        self._queue.close_reader(self._name)


class QueueReader:
    """Deliveries of one shard's queue over a DoGet stream, drawn ahead.

    After a lost connection a new stream begins: what was delivered and not taken goes back to the queue, what was taken stays
    this reader's, and what was acknowledged without a confirmation is sent again.
    """

    def __init__(
        self,
        address: str,
        schema: pa.Schema,
        *,
        table: str,
        groups: int | None = None,
        rows: int | None = None,
        partial: bool = False,
        prefetch: int = 2,
        retry_s: float = RETRY_S,
        name: str | None = None,
        connect: Connect = flight.FlightClient,
    ) -> None:
        """
        groups, rows, partial: as `Queue.deliver`.
        prefetch: deliveries drawn ahead of use.
        name: tells this reader from every other alive; None makes one up.
        """
        self.max_policy_lag: int | None = None
        self.waiting = 1  # until the shard has told: its groups may be the oldest
        self._address = address
        self._schema = schema.remove_metadata()
        self._retry_s = retry_s
        self._new_client = connect
        self._table = table
        self._name = uuid.uuid4().hex if name is None else name
        self._ticket = {"groups": groups, "rows": rows, "partial": partial, "prefetch": prefetch}
        self._received: queue.SimpleQueue[tuple[str, Delivery] | Exception] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over what follows
        self._stream = ""
        self._client: Any = None
        self._say: Any = None  # the stream of acknowledgements
        self._version: int | None = None
        self._numbers = 0
        self._taken: set[int] = set()  # leases, not acknowledged
        self._unconfirmed: dict[int, tuple[list[int], list[int]]] = {}  # number → (used, returned)
        self._why = f"the queue at {address}"
        self._reader: Any = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"queue-{table}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        lost_since: float | None = None
        while not self._closing.is_set():
            try:
                self._open()
                while True:
                    self._hear(self._reader.read_chunk())
                    lost_since = None
            except StopIteration:
                error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
            except (SchemaError, *LOST) as lost:
                error = lost
            self.waiting = 0  # meanwhile the table is its other shards
            lost_since = lost_since or time.monotonic()
            if isinstance(error, REFUSED) or time.monotonic() - lost_since > self._retry_s:
                self._received.put(error)
                return
            self._why = f"the shard at {self._address}, lost {time.monotonic() - lost_since:.0f} s ago"
            self._closing.wait(AGAIN_S)

    def _open(self) -> None:
        """Open the stream of deliveries and that of acknowledgements, and send again what is not confirmed."""
        client, stream = self._new_client(self._address), uuid.uuid4().hex
        about = {"queue": self._table, "reader": self._name, "stream": stream}
        with self._lock:
            self._stream = stream  # from here on, what earlier streams brought is not taken any more
            again = list(self._unconfirmed.items())
            holding = list(self._taken) + [lease for _, (used, _) in again for lease in used]
            version = self._version
        ticket = {**about, **self._ticket, "version": version, "holding": holding}
        self._reader = client.do_get(flight.Ticket(json.dumps(ticket).encode()))
        found = self._reader.schema
        if not found.equals(self._schema):
            raise SchemaError(f"the rows of {self._address} do not fit: expected {self._schema}; received {found}")
        self.max_policy_lag = QueueSpec.from_json(found.metadata[SETTINGS].decode()).max_policy_lag
        say, _ = client.do_put(flight.FlightDescriptor.for_command(json.dumps(about).encode()), pa.schema([]))
        with self._lock:
            self._say, self._client = say, client
            for number, (used, returned) in self._unconfirmed.items():
                self._write({"number": number, "taken": 0, "used": used, "returned": returned})

    def _hear(self, chunk: Any) -> None:
        said = json.loads(chunk.app_metadata.to_pybytes())
        self.waiting = int(said["waiting"])
        with self._lock:
            for number in [n for n in self._unconfirmed if n <= int(said["confirmed"])]:
                del self._unconfirmed[number]
        if "leases" in said:
            groups = {name: said[name] for name in ("leases", "sizes", "times", "versions")}
            batch = chunk.data.replace_schema_metadata(None)
            self._received.put((self._stream, Delivery(batch=batch, **groups)))
        else:
            self._why = str(said["why"])

    def _write(self, message: Mapping[str, Any]) -> None:
        if self._say is None:
            return
        try:
            self._say.write_metadata(json.dumps({"version": self._version, **message}).encode())
        except LOST:
            self._say = None
            self._reader.cancel()  # the reading thread opens new streams, and says again what was not confirmed

    def _tell(self, *, taken: int = 0, used: Sequence[int] = (), returned: Sequence[int] = ()) -> None:
        """The caller holds the lock."""
        self._numbers += 1
        if used or returned:
            self._unconfirmed[self._numbers] = list(used), list(returned)
        self._write({"number": self._numbers, "taken": taken, "used": list(used), "returned": list(returned)})

    def tell(self, version: int) -> None:
        """As `QueueSource.tell`."""
        with self._lock:
            if version != self._version:
                self._version = version
                self._tell()

    def take(self, timeout_s: float) -> Delivery | None:
        """As `QueueSource.take`.

        Raises:
            SchemaError: the queue has other columns.
            flight.FlightError: the shard refused the reader, or stayed away longer than `retry_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                received = self._received.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(received, Exception):
                self._received.put(received)  # so it stays for the next call
                raise received
            stream, delivery = received
            with self._lock:
                if stream == self._stream:  # else the shard has taken it back
                    self._taken.update(delivery.leases)
                    self._tell(taken=1)
                    return delivery

    def acknowledge(self, used: Sequence[int], returned: Sequence[int] = ()) -> None:
        """As `QueueSource.acknowledge`."""
        with self._lock:
            self._taken.difference_update(used, returned)
            self._tell(used=used, returned=returned)

    def flush(self) -> None:
        """As `QueueSource.flush`.

        Raises:
            flight.FlightError: the shard stayed away longer than `retry_s`.
        """
        with self._lock:
            open_ = dict(self._unconfirmed)
        for number, (used, returned) in open_.items():
            # A lease is consumed once, however often that is said.
            self._ask("acknowledge", {"reader": self._name, "used": used, "returned": returned}, self._retry_s)
            with self._lock:
                self._unconfirmed.pop(number, None)

    def _ask(self, kind: str, body: dict[str, Any], retry_s: float) -> None:
        deadline = time.monotonic() + retry_s
        while True:
            try:
                with self._new_client(self._address) as client:
                    action(client, kind, {"queue": self._table, **body})
                    return
            except LOST as lost:
                if isinstance(lost, REFUSED) or time.monotonic() > deadline:
                    raise
                time.sleep(AGAIN_S)

    def why(self) -> str:
        """As `QueueSource.why`."""
        return self._why

    def close(self) -> None:
        """As `QueueSource.close`; what was acknowledged is consumed before."""
        self._closing.set()
        with suppress(*LOST):
            self.flush()
        deadline = time.monotonic() + 5.0
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self._reader is not None:
                self._reader.cancel()
            self._thread.join(timeout=0.1)
        with suppress(*LOST):  # else its leases end by themselves
            self._ask("end_reader", {"reader": self._name}, 0.0)
        with self._lock, suppress(*LOST):
            if self._say is not None:
                self._say.close()
                self._client.close()
