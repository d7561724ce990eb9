"""How a Flight server ends, whatever its clients do."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from urllib.parse import unquote

import psutil
import pyarrow.flight as flight

_AGAIN_S = 0.1
_CUT_S = 10.0  # what holds a server up for longer is no client


def end_serving(server: flight.FlightServerBase, *, grace_s: float) -> None:
    """Shut a server down: its streams have `grace_s` to end by themselves, then their connections are cut.

    Flight waits for its streams without end, and waits for them again when the interpreter exits. A stream ends when its client
    ends it; a client that nobody closes, perhaps one in this very process, would keep the process from ending for ever.
    """
    port = server.port
    stop = threading.Thread(target=server.shutdown, name="shutdown", daemon=True)
    stop.start()
    stop.join(timeout=grace_s)
    deadline = time.monotonic() + _CUT_S
    while stop.is_alive() and time.monotonic() < deadline:
        cut(port)
        stop.join(timeout=_AGAIN_S)


def cut(port: int, *, peer: str | None = None) -> None:
    """End the connections that this process has accepted on a port. Flight has no call for that.

    peer: only that of this caller, as Flight writes its address (`ServerCallContext.peer`); None: all.
    """
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.laddr.port == port:
            if peer is not None and not _is_peer(peer, *connection.raddr):
                continue
            with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as end:
                if end.getsockname()[1] == port:  # the number may mean another file by now
                    end.shutdown(socket.SHUT_RDWR)


def _is_peer(peer: str, host: str, port: int) -> bool:
    """Whether gRPC's name of a peer, such as `ipv4:10.0.0.1:4711` or `ipv6:%5B::1%5D:4711`, is that of an address."""
    address, _, number = unquote(peer).partition(":")[2].rpartition(":")
    return number == str(port) and address.strip("[]").removeprefix("::ffff:") == host.removeprefix("::ffff:")
