"""A shard behind Arrow Flight, with `grpc.health.v1` beside it.

Data plane, all on long-lived streams:
  DoPut   descriptor {"writer": id}: batches of (lane, row) with their sequence number as metadata, each answered with the
          number last applied; the first answer is that number before the stream began, so that a writer knows what to
          send again. Metadata `close` ends the writer and its lanes.
  DoGet   ticket {"stream": id, "batch": n, "horizon": h, "prefetch": k}: batches of windows without end, at most k ahead of
          what the reader has acknowledged. The metadata is the shard's mass; a stream that waits sends it with an
          empty batch, so that readers of several shards know how their masses change.
          DoPut descriptor {"acknowledge": id}: the number of a stream's batches used since the last message, as metadata.
  DoAction lease {"side", "count", "block", "deleted", "timeout_s"}; stats.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from . import snapshot
from .limiter import LeasedLimiter, Limiter, RateLimiter, Side
from .schema import SchemaError
from .shard import Shard, ShardSpec, WriterClosedError
from .wire import CLOSE, MASS, SEQUENCE, action, rows_from_arrow, to_arrow, window_schema

_POLL_S = 0.5  # how often a blocked call looks whether its caller is still there


class _Stream:
    """How far a reader's stream may run ahead."""

    def __init__(self, prefetch: int) -> None:
        self._prefetch = prefetch
        self._sent = 0
        self._acknowledged = 0
        self._changed = threading.Condition()

    def may_send(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._sent - self._acknowledged < self._prefetch, timeout_s)

    def sent(self) -> None:
        with self._changed:
            self._sent += 1

    def acknowledge(self, count: int) -> None:
        with self._changed:
            self._acknowledged += count
            self._changed.notify_all()

    @property
    def unused(self) -> int:
        return self._sent - self._acknowledged


class ShardServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves one shard. The constructor returns when it listens; `close` ends it."""

    def __init__(self, spec: ShardSpec, *, restore: Path | None = None) -> None:
        """`restore`: a snapshot file to start from."""
        self._leader: RateLimiter | None = None
        limiter: Limiter
        if spec.limiter_address is None:
            limiter = self._leader = spec.limiter()
        else:
            leader = flight.FlightClient(spec.limiter_address)

            def lease(side: Side, count: int, block: int, deleted: int, timeout_s: float) -> tuple[int, str]:
                body = {"side": side, "count": count, "block": block, "deleted": deleted, "timeout_s": timeout_s}
                answer = action(leader, "lease", body)
                return int(answer["granted"]), str(answer["why"])

            limiter = LeasedLimiter(lease, insert_block=spec.insert_block, sample_block=spec.sample_block)
        self.shard = Shard.from_spec(spec, limiter)
        self._streams: dict[str, _Stream] = {}
        self._closing = threading.Event()
        try:
            if restore is not None:
                snapshot.load(self.shard, restore)
            self._listen(spec)
        except BaseException:
            self.shard.close()
            raise

    def _listen(self, spec: ShardSpec) -> None:
        try:
            super().__init__(f"grpc://{spec.host}:{spec.port}")
        except pa.ArrowException as error:
            raise OSError(f"cannot listen on {spec.host}:{spec.port} ({error}); set replay.host") from error
        self.address = f"grpc://{spec.host}:{self.port}"
        self._health = grpc.server(ThreadPoolExecutor(max_workers=2, thread_name_prefix="health"))
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._health)
        self.health_address = f"{spec.host}:{self._health.add_insecure_port(f'{spec.host}:0')}"
        self._health.start()

    # ------------------------------------------------------------------ Flight

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        command = json.loads(descriptor.command)
        if "acknowledge" in command:
            self._read_acknowledgements(str(command["acknowledge"]), reader)
        else:
            self._read_rows(context, str(command["writer"]), reader, writer)

    def _read_acknowledgements(self, stream: str, reader: Any) -> None:
        with suppress(StopIteration):
            while True:
                (count,) = SEQUENCE.unpack(reader.read_chunk().app_metadata)
                known = self._streams.get(stream)
                if known is not None:
                    known.acknowledge(count)

    def _read_rows(self, context: Any, name: str, reader: Any, writer: Any) -> None:
        shard = self.shard
        expected = shard.schema.arrow()
        if not reader.schema.equals(expected, check_metadata=True):
            raise flight.FlightServerError(
                f"the writer's rows do not fit shard {shard.index}: expected {expected.metadata}, received "
                f"{reader.schema.names} with {reader.schema.metadata}"
            )
        closed = False
        try:
            writer.write(SEQUENCE.pack(shard.connect(name)))
            while True:
                try:
                    chunk = reader.read_chunk()
                except StopIteration:
                    break
                if chunk.data is None:
                    closed = chunk.app_metadata.to_pybytes() == CLOSE
                    break
                (sequence,) = SEQUENCE.unpack(chunk.app_metadata)
                lanes, rows = rows_from_arrow(chunk.data, shard.schema)
                while not shard.insert(name, sequence, lanes, rows, timeout_s=_POLL_S):
                    if self._closing.is_set() or context.is_cancelled():
                        return
                writer.write(SEQUENCE.pack(sequence))
        except (SchemaError, WriterClosedError, struct.error) as error:
            raise flight.FlightServerError(str(error)) from None
        finally:
            shard.disconnect(name, closed=closed)

    def do_get(self, context: Any, ticket: Any) -> Any:
        wanted = json.loads(ticket.ticket)
        name, batch, horizon = str(wanted["stream"]), int(wanted["batch"]), int(wanted["horizon"])
        if batch < 1 or horizon < 1 or int(wanted["prefetch"]) < 1:
            raise flight.FlightServerError(f"batch, horizon and prefetch must be at least 1, received {wanted}")
        stream = _Stream(int(wanted["prefetch"]))
        schema = window_schema(self.shard.schema, horizon)
        empty = pa.RecordBatch.from_pylist([], schema=schema)

        def batches() -> Iterator[tuple[pa.RecordBatch, bytes]]:
            self._streams[name] = stream
            try:
                while not self._closing.is_set() and not context.is_cancelled():
                    windows = None
                    if stream.may_send(_POLL_S):
                        windows = self.shard.sample(batch, horizon, timeout_s=_POLL_S)
                    if windows is not None:
                        stream.sent()
                    message = empty if windows is None else to_arrow(windows, schema)
                    yield message, MASS.pack(self.shard.items)
            finally:
                del self._streams[name]
                self.shard.unused(stream.unused * batch)

        return flight.GeneratorStream(schema, batches())

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        body: dict[str, Any] = json.loads(request.body.to_pybytes() or b"{}")
        match request.type:
            case "lease":
                if self._leader is None:
                    raise flight.FlightServerError(f"shard {self.shard.index} does not hold the table's limiter")
                self._leader.deleted(int(body["deleted"]))
                timeout_s = min(float(body["timeout_s"]), _POLL_S)
                side, count, block = body["side"], int(body["count"]), int(body["block"])
                granted = self._leader.acquire_block(side, count, block, timeout_s=timeout_s)
                answer: dict[str, Any] = {"granted": granted, "why": "" if granted else self._leader.why(side)}
            case "stats":
                answer = self.stats()
            case unknown:
                raise flight.FlightServerError(f"unknown action {unknown!r}; known are lease, stats")
        return [json.dumps(answer).encode()]

    # ----------------------------------------------------------------- control

    def stats(self) -> dict[str, Any]:
        """The shard's statistics; on shard 0 with the limiter's counters as well."""
        found = self.shard.stats()
        if self._leader is not None:
            found["limiter"] = {
                "inserted": self._leader.inserted,
                "sampled": self._leader.sampled,
                "removed": self._leader.removed,
            }
        return found

    def save(self, path: Path) -> dict[str, int]:
        """Write a snapshot while serving. Returns the counters it holds."""
        return snapshot.save(self.shard, path)

    def end_writer(self, writer: str) -> None:
        """End the lanes of a writer that is known to be dead."""
        self.shard.end_writer(writer)

    def lost(self, items: int) -> None:
        """Another shard of the table has lost items; on shard 0 only."""
        if self._leader is None:
            raise ValueError(f"shard {self.shard.index} does not hold the table's limiter")
        self._leader.deleted(items)

    def restore_limiter(self, *, inserted: int, sampled: int, items: int) -> None:
        """Set the limiter's counters to the sums over all shards; on shard 0 only."""
        if self._leader is None:
            raise ValueError(f"shard {self.shard.index} does not hold the table's limiter")
        self._leader.restore(inserted=inserted, sampled=sampled, removed=inserted - items)

    def close(self) -> None:
        """Stop serving and remove the storage file."""
        self._closing.set()
        self.shard.close()
        self._health.stop(grace=None)
        # Flight waits for its streams, and that of an idle writer ends only when the writer does.
        stop = threading.Thread(target=self.shutdown, name="shutdown", daemon=True)
        stop.start()
        stop.join(timeout=2 * _POLL_S)
