"""A server of one queue in a process of its own, to be killed: `python -m tests.queue_server_for_tests`.

Standard input: {"spec": settings, "path": file, "port": 0 or one} as JSON on the first line. Standard output: its port.
It ends, keeping the file, when standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import pyarrow.flight as flight

from replay.ending import end_serving
from replay.queue_service import QueueService
from replay.queue_spec import QueueSpec
from replay.queues import Queue


class QueueServer(flight.FlightServerBase):  # type: ignore[misc]
    """Serves queues and nothing else."""

    def __init__(self, queues: dict[str, Queue], *, port: int = 0) -> None:
        self.closing = threading.Event()
        self._service = QueueService(queues, closing=self.closing)
        super().__init__(f"grpc://127.0.0.1:{port}")
        self.address = f"grpc://127.0.0.1:{self.port}"

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._service.do_put(context, json.loads(descriptor.command), reader, writer)

    def do_get(self, context: Any, ticket: Any) -> Any:
        return self._service.do_get(context, json.loads(ticket.ticket))

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        return [json.dumps(self._service.do_action(request.type, json.loads(request.body.to_pybytes()))).encode()]

    def close(self) -> None:
        self.closing.set()
        end_serving(self, grace_s=1.0)


def main() -> None:
    given = json.loads(sys.stdin.readline())
    queue = Queue(QueueSpec.from_json(given["spec"]), given["path"])
    server = QueueServer({queue.spec.name: queue}, port=given["port"])
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
