"""A Ray cluster whose every node is a machine of its own, all of them on this one."""

from __future__ import annotations

import json
import re
import secrets
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests import runs_for_tests as runs
from tests.nodes_for_tests import Inside, Network, Node
from tests.runs_for_tests import ROOT, wait_for

REACHED = ("--replay.host", "node", "--control.host", "node")  # from other nodes
STARTED_S = 120.0  # the longest that Ray may take to start on a node
# Ray gives up a node after so many health checks without an answer. With its own settings (10 s until a check has failed, 3 s
# between two, 5 of them) a lost node was given up after 64 s, with these after 40 s. Both let the network be cut for 20 s.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "6000",
    "RAY_health_check_failure_threshold": "5",
}
# These give up a node after some 10 s, for tests that cut nothing.
QUICK = {**HEALTH, "RAY_health_check_timeout_ms": "4000", "RAY_health_check_failure_threshold": "2"}


class RayNodes:
    """A Ray cluster whose nodes are machines of their own: the first holds its control store. A context manager."""

    def __init__(self, folder: Path, *, cpus: float = 0, health: Mapping[str, str] = HEALTH, **settings: Any) -> None:
        """
        folder: for logs; every node sees it.
        cpus: that Ray believes the first node to have.
        health: environment variables with Ray's settings of health checks.
        settings: of the first node, as `add` takes them.
        """
        self.network = Network()
        self.folder = folder
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_ADDRESS": "",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            **health,
        }
        self._started: dict[Node, Inside] = {}
        self._commands: dict[Node, list[str]] = {}
        try:
            self.head = self.add(cpus=cpus, **settings)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """Of Ray's control store."""
        return f"{self.head.address}:6379"

    @property
    def nodes(self) -> list[Node]:
        """All nodes but the first, lost ones left out."""
        return [node for node in self.network.nodes[1:] if node.is_alive]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self, *, cpus: float = 4, resources: Mapping[str, float] | None = None, wait: bool = True, **settings: Any
    ) -> Node:
        """A new node that takes part in the cluster.

        cpus: that Ray believes it to have. resources: Ray's custom ones.
        wait: until Ray runs on it; `wait_for_ray` does it later.
        settings: as `Network.add` takes them.
        """
        node = self.network.add(keep=[self.folder, *settings.pop("keep", ())], **settings)
        self.join(node, cpus=cpus, resources=resources)
        if wait:
            self.wait_for_ray(node)
        return node

    def join(self, node: Node, *, cpus: float = 4, resources: Mapping[str, float] | None = None) -> None:
        """Begin to start Ray on a node where it does not run, or no longer: one that Ray has given up leaves the cluster for good."""
        is_first = node is self.network.nodes[0]
        place = ["--head", "--port=6379", "--include-dashboard=false"] if is_first else [f"--address={self.address}"]
        self._commands[node] = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--block", *place),
            *(f"--node-ip-address={node.address}", f"--num-cpus={cpus:g}", "--object-store-memory=100000000"),
            *("--num-gpus=0", f"--resources={json.dumps(dict(resources or {}))}", "--include-log-monitor=false"),
        ]
        self._start(node)

    def _start(self, node: Node) -> None:
        log = self.folder / f"{node.name}.log"
        log.unlink(missing_ok=True)
        self._started[node] = node.start(*self._commands[node], log=log, env=self.env)

    def wait_for_ray(self, node: Node) -> None:
        """Wait until Ray runs on a node.

        Raises:
            AssertionError: it does not; the message holds what it said.
        """
        log = self.folder / f"{node.name}.log"
        for is_last in (False, True):  # Ray itself gives up after 30 s, which on a busy machine may be too short
            try:
                wait_for(lambda: "will now block" in log.read_text(), self._started[node], STARTED_S)
                return
            except AssertionError as error:
                if is_last:
                    raise AssertionError(f"{node.name}: {error}: {log.read_text()}") from None
            self._start(node)

    def wait_until_ray_ended(self, node: Node, timeout_s: float = 60.0) -> None:
        """Wait until a node whose raylet was killed has nothing of Ray any more, so that it can `join` again."""
        self._started[node].wait(timeout_s)
        for pid, words in node.processes().items():
            if "ray" in words.split(" ")[0]:
                with suppress(ProcessLookupError):
                    node.signal(pid, signal.SIGKILL)

    def start(self, *words: str, node: Node | None = None, cwd: Path, log: Path) -> Inside:
        """Start `millrace` in a node, the first where none is given, attached to this cluster where it trains."""
        attached = ("--address", self.address, *REACHED) if words[0] == "train" else ()
        return (node or self.head).start(
            *(sys.executable, "-m", "cluster.cli", *words, *attached), cwd=cwd, log=log, env=self.env
        )

    def millrace(self, *words: str, node: Node | None = None, timeout_s: float = 60.0) -> str:
        """What a `millrace` command prints in a node, the first where none is given."""
        command = (sys.executable, "-m", "cluster.cli", *words)
        return (node or self.head).run(*command, env=self.env, timeout_s=timeout_s)

    def node_of(self, name: str) -> Node:
        """The node of a host name or an address, as events tell it.

        Raises:
            KeyError: there is none.
        """
        for node in self.network.nodes:
            if name in (node.name, node.address):
                return node
        raise KeyError(name)

    def find(self, title: str) -> list[tuple[Node, int]]:
        """Nodes and numbers of the processes whose command line begins so, as `re.match` sees it."""
        living = [node for node in self.network.nodes if node.is_alive]
        return [(node, pid) for node in living for pid, words in node.processes().items() if re.match(title, words)]

    def where(self, run: Path) -> dict[str, tuple[Node, int]]:
        """Node and number of the newest process of each name, from the events of a run."""
        found = {}
        for event in runs.events(run, "process"):
            told = re.match(r"(.+) runs as process (\d+) on ([\d.]+)", event["text"])
            if told is not None:
                found[told[1]] = self.node_of(told[3]), int(told[2])
        return found

    def kill(self, run: Path, *names: str) -> None:
        """Kill processes of a run, by their names in its events."""
        found = self.where(run)
        for name in names:
            node, pid = found[name]
            node.signal(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the cluster and all its nodes."""
        self.network.close()
