"""A shard in a process of its own, without Ray: for tests, benchmarks, and use of the replay service alone."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .security import Security, flight_client, new_token
from .server import ShardServer
from .shard import ShardSpec
from .wire import action


class ShardProcess:
    """A shard in a child process. It ends with its parent."""

    def __init__(
        self,
        spec: ShardSpec,
        security: Security | None = None,
        *,
        recover: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        security: what callers must show; None makes a token up.
        recover: take over the storage of a shard of the same run and number that has died.
        environment: variables for the child beside this process's own.

        Raises:
            RuntimeError: the shard could not start; what it says is on standard error.
        """
        self.security = security or Security(new_token())
        self._child = subprocess.Popen(
            [sys.executable, "-m", "replay.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        # Not as an argument: every user of the machine can read those, and the token is among it.
        start = {"spec": spec.to_json(), "security": asdict(self.security), "recover": recover}
        self._child.stdin.write(json.dumps(start) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the shard process ended with exit code {self._child.wait()}; its error is above")
        answer = json.loads(line)
        self.address: str = answer["address"]
        self.port: int = answer["port"]
        self.health: str = answer["health"]
        self.pid = self._child.pid

    def stats(self) -> dict[str, Any]:
        """As `ShardServer.stats`."""
        with flight_client(self.address, self.security) as client:
            return action(client, "stats", {})

    def kill(self) -> None:
        """End the process as a crash would: its storage stays."""
        self._child.send_signal(signal.SIGKILL)
        self.wait(10)

    def wait(self, timeout_s: float) -> int:
        """Wait until the process has ended by itself. Returns its exit code."""
        code = self._child.wait(timeout=timeout_s)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()
        return code

    def close(self) -> None:
        """End the process and remove its storage."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> ShardProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def main() -> None:
    """Serve a shard: its settings as JSON on the first line of standard input, its addresses out.

    It ends when standard input does, so that it never outlives its parent.
    """
    start = json.loads(sys.stdin.readline())
    spec, security = ShardSpec.from_json(start["spec"]), Security(**start["security"])
    server = ShardServer(spec, security, recover=start["recover"])
    answer = {"address": server.address, "port": server.port, "health": server.health_address}
    # What is there now stays: a full collection would look through all of it, for tens of milliseconds.
    gc.collect()
    gc.freeze()
    print(json.dumps(answer), flush=True)
    sys.stdin.read()
    server.close()
    os._exit(0)  # a stream still open would hold up the interpreter's own end


if __name__ == "__main__":
    main()
