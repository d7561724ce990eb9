"""Machines of a cluster, all of them on this one: each is a set of Linux namespaces with a network address of its own.

A `Node` has its own network interface on a bridge, its own process numbers, host name, /tmp and /dev/shm. The disk is shared,
but for the folders that a node has for itself (`Network.add(private=...)`). Nodes can be lost as a machine is that loses its
power (`Node.lose`), and the network between two of them can be cut (`Network.cut`): what they send each other is then dropped
without a word. All of it ends with the process that made it, however that ends.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Self

import pytest

from tests.runs_for_tests import ROOT

NOBODY = "02:00:00:00:00:00"  # a hardware address that no interface has
_numbers = itertools.count()


@cache
def missing() -> str | None:
    """Why there can be no nodes here; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter", "setpriv", "bash"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (Debian's packages iproute2 and util-linux)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    if tried.returncode:
        return f"the kernel gives no namespaces: {tried.stderr.strip()}"
    bridge = f"mrt{os.getpid()}"
    tried = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True, text=True)
    if tried.returncode:
        return f"the kernel gives no network bridge: {tried.stderr.strip()}"
    _ip("link", "delete", bridge)
    return None


def requires_namespaces() -> None:
    """Skip the test, or all that need a fixture which calls this, where there can be no nodes."""
    if (why := missing()) is not None:
        pytest.skip(f"needs machines of its own: {why}")


def _ip(*words: str) -> str:
    return _said("ip", *words)


def _said(*words: str) -> str:
    """What a command has printed; what it complains of is in the error where it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Inside(subprocess.Popen[str]):
    """A command that runs in a node. `pid` is that of the `nsenter` around it, `send_signal` reaches the command itself."""

    def send_signal(self, sig: int) -> None:
        """As `Popen.send_signal`, to the command."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(next(iter(_children(self.pid)), self.pid), sig)


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Node:
    """One machine. Made by `Network.add`."""

    def __init__(self, name: str, address: str, interface: str, holder: subprocess.Popen[str]) -> None:
        """interface: the node's end on the bridge. holder: the `unshare` whose child is the node's first process."""
        self.name = name
        self.address = address
        self._interface = interface
        self._holder = holder
        (self._first,) = _children(holder.pid)
        self._processes = os.readlink(f"/proc/{self._first}/ns/pid")

    @property
    def is_alive(self) -> bool:
        return self._holder.poll() is None

    def words(self, *words: str) -> list[str]:
        """The command line that runs a command in this node."""
        return ["nsenter", "--target", str(self._first), "--net", "--pid", "--mount", "--uts", "--ipc", "--", *words]

    def start(
        self, *words: str, cwd: Path | None = None, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Inside:
        """Start a command in this node; its output is added to `log`, or goes into pipes.

        env: added to this process's environment.
        """
        output: int | IO[str] = subprocess.PIPE if log is None else log.open("a")
        try:
            return Inside(
                self.words("env", f"--chdir={cwd or '/tmp'}", *words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        finally:
            if not isinstance(output, int):
                output.close()

    def run(self, *words: str, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
        """What a command in this node prints.

        Raises:
            RuntimeError: it failed; the message holds what it complained of.
        """
        with self.start(*words, env=env) as process:
            try:
                said, complained = process.communicate(timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(f"{shlex.join(words)} in {self.name}: code {process.returncode}: {complained.strip()}")
        return said

    def seen(self, path: Path) -> Path:
        """Where this process finds what a path is in the node, its own /tmp for instance."""
        return Path(f"/proc/{self._first}/root", *path.parts[1:])

    def processes(self) -> dict[int, str]:
        """Command line of every process in this node, by its number there."""
        return {inner: words for inner, (_, words) in self._found().items()}

    def signal(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process by its number in this node.

        Raises:
            ProcessLookupError: there is none of that number.
        """
        found = self._found()
        if pid not in found:
            raise ProcessLookupError(f"no process {pid} in {self.name}")
        os.kill(found[pid][0], number)

    def _found(self) -> dict[int, tuple[int, str]]:
        """(number in this process's namespace, command line) by the number in the node's; zombies are left out."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with suppress(OSError):
                if os.readlink(folder / "ns" / "pid") == self._processes:
                    (numbers,) = re.findall(r"^NSpid:(.*)$", (folder / "status").read_text(), re.MULTILINE)
                    if words := (folder / "cmdline").read_bytes():
                        found[int(numbers.split()[-1])] = int(folder.name), words.replace(b"\0", b" ").decode().strip()
        return found

    def ip(self, *words: str) -> str:
        """Run `ip` on the node's network."""
        return _said("nsenter", "--target", str(self._first), "--net", "--", "ip", *words)

    def lose(self) -> None:
        """The machine is gone: its network first, so that nobody is told of the end of its processes."""
        self._unplug()
        self.close()

    def _unplug(self) -> None:
        with suppress(RuntimeError):  # that was done before
            _ip("link", "delete", self._interface)

    def close(self) -> None:
        """End the node with all its processes."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self._first, signal.SIGKILL)
            self._holder.kill()
            self._holder.communicate()
            self._unplug()  # sockets that still have to send something would keep it for minutes


class Network:
    """Nodes on one bridge, which this process reaches as well. A context manager: all of it is gone at the end."""

    def __init__(self) -> None:
        """Raises RuntimeError where `missing()` says why."""
        if (why := missing()) is not None:
            raise RuntimeError(why)
        _remove_leftovers()
        self.nodes: list[Node] = []
        number = next(_numbers)
        self._bridge = f"mr{os.getpid()}.{number}"
        taken, at = _ip("-4", "route"), os.getpid() + 4099 * number
        while (subnet := f"10.{64 + (at >> 8) % 64}.{at % 256}") + "." in taken:
            at += 1
        self._subnet = subnet
        self._folder = TemporaryDirectory(prefix="millrace-nodes-")
        self._hosts = Path(self._folder.name) / "hosts"
        self._hosts.write_text("127.0.0.1 localhost\n")
        _ip("link", "add", self._bridge, "type", "bridge")
        try:
            _ip("address", "add", f"{subnet}.1/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self,
        *,
        shm: str = "512m",
        tmp: str = "1g",
        private: Mapping[Path, str] | None = None,
        keep: Iterable[Path] = (),
    ) -> Node:
        """A new node.

        shm, tmp: sizes of its /dev/shm and /tmp, as `mount -o size=` takes them.
        private: other folders, made where they are not there, that it has for itself, and their sizes.
        keep: folders under /tmp or a private one that it shares with the others all the same.
        """
        number = len(self.nodes)
        name, address = f"node-{number}", f"{self._subnet}.{number + 2}"
        with self._hosts.open("a") as hosts:
            hosts.write(f"{address} {name}\n")
        own = {Path("/tmp"): tmp, Path("/dev/shm"): shm, **(private or {})}
        shared = {ROOT, Path(sys.prefix), *(path.resolve() for path in keep)}
        script = self._script(name, own, sorted(shared))
        holder = subprocess.Popen(
            [
                # Whatever happens to this process, its nodes end with it.
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--pid", "--mount", "--uts", "--ipc"),
                *("--fork", "--kill-child", "--mount-proc", "bash", "-c", script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        interface = f"{self._bridge}.{number}"
        try:
            assert holder.stdout is not None
            said = holder.stdout.readline()
            if said != "ready\n":
                raise RuntimeError(f"{name} did not start: {said}{holder.stdout.read()}")
            node = Node(name, address, interface, holder)
        except BaseException:
            holder.kill()
            holder.communicate()
            raise
        self.nodes.append(node)
        _ip("link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", str(_children(holder.pid)[0]))
        _ip("link", "set", interface, "master", self._bridge, "up")
        node.ip("link", "set", "lo", "up")
        node.ip("address", "add", f"{address}/24", "dev", "eth0")
        node.ip("link", "set", "eth0", "up")
        node.ip("route", "add", "default", "via", f"{self._subnet}.1")
        return node

    def _script(self, name: str, own: Mapping[Path, str], shared: Iterable[Path]) -> str:
        """What a node's first process does: mount, say so, and then wait for the ends of processes that nobody waits for."""
        hidden = [path for path in shared if any(path.is_relative_to(folder) for folder in own)]
        lines = ["set -e", f"hostname {name}", f"mount --bind {shlex.quote(str(self._hosts))} /etc/hosts"]
        lines += ["mount -t tmpfs tmpfs /mnt"]
        for number, path in enumerate(hidden):
            lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
        for path, size in own.items():
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount -t tmpfs -o size={size},mode=1777 tmpfs {quoted}"]
        for number, path in enumerate(hidden):
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --bind /mnt/{number} {quoted}"]
        return "\n".join([*lines, "echo ready", "exec > /dev/null", "while :; do sleep 3600 & wait $!; done"])

    def cut(self, one: Node, other: Node) -> None:
        """Have everything dropped that two nodes send each other."""
        for node, peer in ((one, other), (other, one)):
            node.ip("neighbour", "replace", peer.address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")

    def heal(self, one: Node, other: Node) -> None:
        """Undo `cut`."""
        for node, peer in ((one, other), (other, one)):
            node.ip("neighbour", "delete", peer.address, "dev", "eth0")

    @contextmanager
    def cut_for(self, seconds: float, *pairs: tuple[Node, Node]) -> Iterator[None]:
        """Cut the network between pairs of nodes, for at least so long and as long as the body takes."""
        until = time.monotonic() + seconds
        for one, other in pairs:
            self.cut(one, other)
        try:
            yield
            time.sleep(max(0.0, until - time.monotonic()))
        finally:
            for one, other in pairs:
                self.heal(one, other)

    def close(self) -> None:
        """End all nodes and remove the network."""
        for node in self.nodes:
            node.close()
        with suppress(RuntimeError):
            _ip("link", "delete", self._bridge)
        self._folder.cleanup()


def _remove_leftovers() -> None:
    """Remove the bridges and interfaces of processes that are gone; their nodes ended with them."""
    for name, pid in re.findall(r"^\d+: (mr(\d+)\.[.\d]+)[:@]", _ip("-o", "link", "show"), re.MULTILINE):
        if not Path(f"/proc/{pid}").exists():
            with suppress(RuntimeError):  # another did it meanwhile
                _ip("link", "delete", name)
