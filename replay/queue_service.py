"""Queue tables behind Arrow Flight: what a shard's server hands every call to that names a queue.

DoPut   descriptor {"queue": name, "writer": id}: record batches with their sequence number as metadata. Every answer is JSON:
        {"applied": n}, the number last applied, first of all that before the stream began, so that the writer knows what
        to send again; or {"waiting_for": text} while the queue has no room. Metadata `close` ends the writer.
DoGet   ticket {"queue", "reader", "stream", "groups" or "rows", "partial", "prefetch", "version", "holding"}: deliveries
        without end, at most `prefetch` ahead of what was taken. The schema's metadata has the queue's settings; a message's
        metadata is JSON: {"leases", "sizes", "times", "versions"} of the groups in it, {"waiting": groups that wait at the
        shard, "confirmed": the stream's last acknowledgement applied, "why": what is waited for}. A stream that waits
        sends this with an empty batch.
DoPut   descriptor {"queue": name, "reader": id, "stream": id}: metadata only, JSON {"number": n, "taken": messages taken since,
        "version": policy version, "used": leases, "returned": leases}.
DoAction stats, end_writer {"writer"}, end_reader {"reader"}, acknowledge {"reader", "used", "returned"}; each with "queue".
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from .faults import fault
from .queue_spec import SETTINGS
from .queues import Delivery, Queue, ReaderReplacedError, WriterEndedError
from .schema import SchemaError
from .security import MAX_JSON_BYTES
from .wire import CLOSE, SEQUENCE

_POLL_S = 0.5  # how often a blocked call looks whether its caller is still there
_REFUSED = (SchemaError, WriterEndedError, ReaderReplacedError, ValueError, KeyError, TypeError)


def queue_message(command: Any) -> dict[str, Any] | None:
    """A message to the queue tables; None where it is to the tables of steps, or is none at all."""
    with suppress(ValueError, TypeError, RecursionError):
        found = json.loads(bytes(memoryview(command or b"")[:MAX_JSON_BYTES]))
        if isinstance(found, dict) and "queue" in found:
            return found
    return None


class _Stream:
    """A reader's stream: how far it may run ahead, and what the reader has said."""

    def __init__(self, *, prefetch: int, version: int | None) -> None:
        self._prefetch = prefetch
        self._sent = 0
        self._taken = 0
        self._changed = threading.Condition()
        self.version = version
        self.confirmed = 0

    def may_send(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._sent - self._taken < self._prefetch, timeout_s)

    def sent(self) -> None:
        with self._changed:
            self._sent += 1

    def heard(self, *, number: int, taken: int) -> None:
        with self._changed:
            self._taken += taken
            self.confirmed = number
            self._changed.notify_all()


class QueueService:
    """Serves the queues of one shard. A server passes calls on whose command, ticket or action has the key "queue"."""

    def __init__(self, queues: Mapping[str, Queue], *, closing: threading.Event) -> None:
        """`closing`: set when the server ends; its streams then do within half a second."""
        self._queues = dict(queues)
        self._closing = closing
        self._streams: dict[str, _Stream] = {}

    def _queue(self, message: Mapping[str, Any]) -> Queue:
        name = message.get("queue")
        found = self._queues.get(name) if isinstance(name, str) else None
        if found is None:
            raise flight.FlightServerError(f"no queue {name!r} here; there are {sorted(self._queues)}")
        return found

    def _is_over(self, context: Any) -> bool:
        return self._closing.is_set() or bool(context.is_cancelled())

    # ----------------------------------------------------------------- writers

    def do_put(self, context: Any, command: Mapping[str, Any], reader: Any, writer: Any) -> None:
        """As `FlightServerBase.do_put`, its descriptor's command parsed."""
        queue = self._queue(command)
        try:
            if "writer" in command:
                self._read_rows(queue, context, str(command["writer"]), reader, writer)
            else:
                self._read_acknowledgements(queue, str(command["reader"]), str(command["stream"]), reader)
        except _REFUSED as error:
            raise _refusal(error) from None

    def _read_rows(self, queue: Queue, context: Any, name: str, reader: Any, writer: Any) -> None:
        if not reader.schema.equals(queue.spec.schema):
            raise SchemaError(
                f"rows do not fit queue {queue.spec.name!r}: expected {queue.spec.schema.names} of "
                f"{[str(t) for t in queue.spec.schema.types]}, received {reader.schema.names} of "
                f"{[str(t) for t in reader.schema.types]}"
            )
        applied = queue.connect(name)
        closed = False
        try:
            writer.write(_json({"applied": applied}))
            while True:
                try:
                    chunk = reader.read_chunk()
                except StopIteration:
                    return
                if chunk.data is None:
                    closed = chunk.app_metadata.to_pybytes() == CLOSE
                    return
                sequence = _sequence(chunk.app_metadata)
                while not queue.insert(name, sequence, chunk.data, timeout_s=_POLL_S):
                    if self._is_over(context):
                        return
                    writer.write(_json({"waiting_for": queue.why(name)}))
                fault("queue.insert.reply")
                writer.write(_json({"applied": sequence}))
        finally:
            queue.disconnect(name, closed=closed)

    # ----------------------------------------------------------------- readers

    def _read_acknowledgements(self, queue: Queue, name: str, stream: str, reader: Any) -> None:
        with suppress(StopIteration):
            while True:
                metadata = reader.read_chunk().app_metadata
                said = json.loads(b"{}" if metadata is None else metadata.to_pybytes())
                known = self._streams.get(stream)
                if known is not None and said["version"] is not None:
                    known.version = int(said["version"])  # before what is returned can be delivered again
                queue.acknowledge(name, said["used"], said["returned"])
                fault("queue.consume.reply")
                if known is not None:
                    known.heard(number=int(said["number"]), taken=int(said["taken"]))

    def do_get(self, context: Any, wanted: Mapping[str, Any]) -> Any:
        """As `FlightServerBase.do_get`, its ticket parsed."""
        queue = self._queue(wanted)
        try:
            name, id_, prefetch = str(wanted["reader"]), str(wanted["stream"]), int(wanted["prefetch"])
            groups, rows, partial = wanted["groups"], wanted["rows"], bool(wanted["partial"])
            queue.spec.check_batch(groups=groups, rows=rows)
            if prefetch < 1:
                raise ValueError(f"prefetch must be at least 1, received {prefetch}")
            stream = _Stream(prefetch=prefetch, version=wanted["version"])
            queue.open_reader(name, id_, [int(lease) for lease in wanted["holding"]])
        except _REFUSED as error:
            raise _refusal(error) from None
        schema = queue.spec.schema.with_metadata({SETTINGS: queue.spec.to_json()})
        empty = pa.RecordBatch.from_pylist([], schema=schema)

        def deliver() -> Delivery | None:
            if not stream.may_send(_POLL_S):
                return None
            return queue.deliver(
                name, id_, groups=groups, rows=rows, partial=partial, version=stream.version, timeout_s=_POLL_S
            )

        def messages() -> Iterator[tuple[pa.RecordBatch, bytes]]:
            self._streams[id_] = stream
            try:
                while not self._is_over(context):
                    delivery = deliver()
                    about: dict[str, Any] = {"waiting": queue.waiting_groups, "confirmed": stream.confirmed}
                    if delivery is None:
                        yield empty, _json({**about, "why": queue.why(name)})
                        continue
                    stream.sent()
                    fault("queue.deliver.reply")
                    about.update({k: v for k, v in vars(delivery).items() if k != "batch"})
                    yield delivery.batch.replace_schema_metadata(schema.metadata), _json(about)
            except _REFUSED as error:
                raise _refusal(error) from None
            finally:
                del self._streams[id_]
                queue.close_stream(name, id_)

        return flight.GeneratorStream(schema, messages())

    # ----------------------------------------------------------------- actions

    def do_action(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to an action about a queue, to be sent as JSON."""
        queue = self._queue(body)
        answer: dict[str, Any] = {}
        try:
            match kind:
                case "stats":
                    answer = queue.stats()
                case "end_writer":
                    queue.end_writer(str(body["writer"]))
                case "end_reader":
                    queue.close_reader(str(body["reader"]))
                case "acknowledge":
                    answer = {"unknown": queue.acknowledge(str(body["reader"]), body["used"], body["returned"])}
                    fault("queue.consume.reply")
                case unknown:
                    known = "stats, end_writer, end_reader, acknowledge"
                    raise flight.FlightServerError(f"unknown action {unknown!r} for a queue; known are {known}")
        except _REFUSED as error:
            raise _refusal(error) from None
        return answer


def _refusal(error: Exception) -> flight.FlightServerError:
    text = f"the message lacks {error}" if isinstance(error, KeyError) else str(error)
    return flight.FlightServerError(text)


def _sequence(metadata: Any) -> int:
    if metadata is None or metadata.size != SEQUENCE.size:
        received = "none" if metadata is None else f"{metadata.size} bytes"
        raise SchemaError(
            f"expected a sequence number of {SEQUENCE.size} bytes with every message, received {received}"
        )
    (sequence,) = SEQUENCE.unpack(metadata)
    return int(sequence)


def _json(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()
