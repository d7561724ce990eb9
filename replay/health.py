"""The health service (`grpc.health.v1`) beside a Flight server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from .security import GRPC_OPTIONS, Security, TokenInterceptor, flight_location, grpc_listen


class Health:
    """Serves health checks on any free port of `host`, to callers that show the run's token."""

    def __init__(self, host: str, security: Security) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="health"),
            interceptors=[TokenInterceptor(security)],
            options=GRPC_OPTIONS,
        )
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        host = flight_location(host, 0, security).partition("://")[2].removesuffix(":0")  # IPv6 in brackets
        self.address = f"{host}:{grpc_listen(self._server, f'{host}:0', security)}"
        self._server.start()

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(grace=None)
