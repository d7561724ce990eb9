"""A shard in a process of its own, without Ray: for tests, benchmarks, and use of the replay service alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pyarrow.flight as flight

from .server import ShardServer
from .shard import ShardSpec
from .wire import action


class ShardProcess:
    """A shard in a child process, without Ray: for tests and benchmarks. It ends with its parent."""

    def __init__(self, spec: ShardSpec) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "replay.process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(asdict(spec)) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the shard process ended with exit code {self._child.wait()}; its error is above")
        answer = json.loads(line)
        self.address: str = answer["address"]
        self.health: str = answer["health"]
        self.pid = self._child.pid

    def stats(self) -> dict[str, Any]:
        """As `ShardServer.stats`."""
        with flight.FlightClient(self.address) as client:
            return action(client, "stats", {})

    def close(self) -> None:
        """End the process and remove its storage."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        assert self._child.stdout is not None
        self._child.stdout.close()

    def __enter__(self) -> ShardProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Serve a shard: its spec as JSON on the first line of standard input, its addresses out.

    It ends when standard input does, so that it never outlives its parent.
    """
    server = ShardServer(ShardSpec(**json.loads(sys.stdin.readline())))
    print(json.dumps({"address": server.address, "health": server.health_address}), flush=True)
    sys.stdin.read()
    server.close()
    os._exit(0)  # a stream still open would hold up the interpreter's own end


if __name__ == "__main__":
    main()
