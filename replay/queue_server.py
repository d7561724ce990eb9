"""A shard that serves queue tables and no steps, with `grpc.health.v1` beside it."""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from .ending import end_serving
from .files import storage_path
from .health import Health
from .queue_service import QueueService, queue_message
from .queue_spec import QueueSpec
from .queues import Queue
from .schema import SchemaError
from .security import ListenError, Security, flight_location, flight_server_options

_GRACE_S = 1.0


class QueueServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves one shard's part of a queue table over Arrow Flight, in the protocol of `replay.queue_service`.

    The constructor returns when it listens; `close` ends it, or at the latest the interpreter's exit.
    """

    def __init__(
        self,
        spec: QueueSpec,
        security: Security,
        *,
        run: str,
        index: int,
        directory: str,
        host: str = "127.0.0.1",
        port: int = 0,
        recover: bool = False,
        prepare: Callable[[Queue], None] | None = None,
    ) -> None:
        """
        security: what callers must show.
        run, index: name of the run and number of the shard, which name its file in `directory`.
        port: 0 takes any free one.
        recover: take over the file of the shard of the same run and number that has died, if it is there.
        prepare: called with the queue before anybody else can reach it, unless rows were taken over.

        Raises:
            OSError: too little space for the queue, or the address cannot be bound.
            LogError: the file to be taken over is damaged.
            ValueError: the TLS files cannot be used.
        """
        path = storage_path(directory, run=run, shard=index, part=f"queue_{spec.name}")
        if not recover:
            path.unlink(missing_ok=True)
        self._closing = threading.Event()
        self.queue = Queue(spec, path)
        self.recovered = not self.queue.empty  # one killed while it was being filled is empty
        try:
            if prepare is not None and not self.recovered:
                prepare(self.queue)
            self._service = QueueService({spec.name: self.queue}, closing=self._closing)
            try:
                super().__init__(flight_location(host, port, security), **flight_server_options(security))
            except pa.ArrowException as error:
                raise ListenError(f"cannot listen on {host}:{port} ({error}); set replay.host") from error
            self.address = flight_location(host, self.port, security)
            self._health = Health(host, security)
        except BaseException:
            self.queue.close(remove=not self.recovered)
            raise
        self.health_address = self._health.address
        # Called before what Flight itself has left for the exit, which would wait for every open stream.
        atexit.register(self._end)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._service.do_put(context, _required(descriptor.command), reader, writer)

    def do_get(self, context: Any, ticket: Any) -> Any:
        return self._service.do_get(context, _required(ticket.ticket))

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        if request.type == "stats" and queue_message(request.body) is None:
            return [json.dumps({"queues": {self.queue.spec.name: self.queue.stats()}}).encode()]
        return [json.dumps(self._service.do_action(request.type, _required(request.body))).encode()]

    def close(self, *, remove: bool = True) -> None:
        """Stop serving, and remove the file unless told otherwise."""
        self._closing.set()
        self.queue.close(remove=remove)
        self._end()

    def _end(self) -> None:
        """Stop serving. At the interpreter's exit that is all, and the file stays, as after a crash."""
        atexit.unregister(self._end)
        self._closing.set()
        self._health.close()
        end_serving(self, grace_s=_GRACE_S)


def _required(command: Any) -> dict[str, Any]:
    found = queue_message(command)
    if found is None:
        raise flight.FlightServerError(
            str(SchemaError('this shard serves queue tables: expected JSON with the key "queue"; received none'))
        )
    return found
