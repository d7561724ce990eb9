"""`millrace status | scale | checkpoint | stop | logs`: look into a run that is going, and change it, by its control plane."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.control_table import MOST_ROWS, log_line, several, shown, waiting
from cluster.runs import CONTROL, TOKEN, RunFolder

if TYPE_CHECKING:
    from cluster.control_client import ControlClient

TOKEN_VARIABLE = "MILLRACE_TOKEN"
_RESTART_S = 60.0  # within which a head that died is there again
_GONE_S = 3.0  # nothing listens for so long where the run's folder cannot be looked into: the run has ended
_POLL_S = 0.5
_TARGET = "folder of the run, or HOST:PORT of its control plane (default: the only run that is going below ./runs)"


@dataclass(frozen=True)
class Target:
    """Which run is meant, and what it takes to be let in."""

    folder: Path | None
    host_port: str | None
    token: str
    authority: str | None

    @property
    def address(self) -> str | None:
        """Where its control plane is at this moment; None: its folder says that the run has ended."""
        return self.host_port if self.folder is None else address_of(self.folder)

    def client(self) -> ControlClient:
        """Connect.

        Raises:
            RuntimeError: the run has ended.
        """
        client = self._connect()
        if client is None:
            raise RuntimeError(
                f"{self.folder} is not going: it holds no {CONTROL}; the run has ended, or is just starting"
            )
        return client

    def again(self) -> ControlClient | None:
        """A client of the head that takes the place of one that died; None: the run has ended."""
        from cluster.control_client import UnreachableError

        deadline = time.monotonic() + (_GONE_S if self.folder is None else _RESTART_S)
        while time.monotonic() < deadline and (client := self._connect()) is not None:
            try:
                client.status()
                return client
            except UnreachableError:
                client.close()
                time.sleep(_POLL_S)
        return None

    def _connect(self) -> ControlClient | None:
        from cluster.control_client import ControlClient

        address = self.address
        return None if address is None else ControlClient(address, self.token, authority=self.authority)


def address_of(folder: Path) -> str | None:
    """Where a run's folder says that its control plane is; None: it says nothing."""
    try:
        return str(json.loads((folder / CONTROL).read_text(encoding="utf-8"))["address"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{folder / CONTROL} cannot be used: expected {{"address": "host:port"}}') from None


# ------------------------------------------------------------------ commands


def status(words: Sequence[str]) -> int:
    """`millrace status`."""
    parser = _parser("status", "What a run does: its processes, counts, rates, and what waits for what.")
    parser.add_argument(
        "--all", action="store_true", help=f"a row for each process, also where there are > {MOST_ROWS}"
    )
    chosen = parser.parse_args(words)
    with _target(chosen).client() as client:
        found = client.status()
    if chosen.json:
        from cluster.files import without_nonfinite

        print(json.dumps(without_nonfinite(found)))
        return 0
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for part in shown(found, every=chosen.all):
        if part:
            console.print(part, soft_wrap=isinstance(part, Text))
    return 0


def scale(words: Sequence[str]) -> int:
    """`millrace scale`."""
    parser = _parser("scale", "Change how many actors and replay shards a run has, without losing what they wrote.")
    parser.add_argument("--actors", type=_positive, metavar="N")
    parser.add_argument("--shards", type=_positive, metavar="N")
    parser.add_argument(
        "--wait", type=_seconds, metavar="SECONDS", help="wait until it is so; exit code 1 if it takes longer"
    )
    chosen = parser.parse_args(words)
    if chosen.actors is None and chosen.shards is None:
        parser.error("give --actors N, --shards N, or both")
    with _target(chosen).client() as client:
        wanted = client.scale(actors=chosen.actors, shards=chosen.shards)
        late = None if chosen.wait is None else _wait_for(client, chosen.wait)
    if chosen.json:
        print(json.dumps({**wanted, "reached": None if chosen.wait is None else late is None}))
    else:
        state = "wanted" if chosen.wait is None or late else "running"
        print(f"{state}: {several(wanted['actors'], 'actor')}, {several(wanted['shards'], 'shard')}")
    if late is not None:
        raise RuntimeError(
            f"not so within {chosen.wait:g} s: {late}; what is wanted stays wanted, see `millrace status`"
        )
    return 0


def checkpoint(words: Sequence[str]) -> int:
    """`millrace checkpoint`."""
    parser = _parser("checkpoint", "Have a run write a checkpoint, and wait until it is whole.")
    chosen = parser.parse_args(words)
    with _target(chosen).client() as client:
        saved = client.checkpoint()
    print(json.dumps(saved) if chosen.json else f"{saved['path']}, at step {saved['step']}")
    return 0


def stop(words: Sequence[str]) -> int:
    """`millrace stop`."""
    parser = _parser("stop", "Have a run end, with a checkpoint first, and wait until it has.")
    parser.add_argument("--reason", default="", help="for the run's log and summary")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the run has ended")
    chosen = parser.parse_args(words)
    target = _target(chosen)
    with target.client() as client:
        run = client.status()["run"]
        client.stop(chosen.reason)
    if not chosen.no_wait:
        if not chosen.json:
            print(f"{run} is stopping: a checkpoint is written first", flush=True)
        _wait_for_end(target)
    ended = not chosen.no_wait
    print(
        json.dumps({"run": run, "ended": ended}) if chosen.json else f"{run} {'has ended' if ended else 'is stopping'}"
    )
    return 0


def logs(words: Sequence[str]) -> int:
    """`millrace logs`."""
    parser = _parser(
        "logs", "The log of a run or of one of its processes; with --json one line of JSON for each of its lines."
    )
    parser.add_argument("--process", default="", metavar="NAME", help='the log of this one, such as "actor 3"')
    parser.add_argument("--lines", type=_count, default=100, metavar="N", help="the newest so many (default 100)")
    parser.add_argument("--follow", action="store_true", help="go on with lines to come, until the run ends or Ctrl-C")
    chosen = parser.parse_args(words)
    target = _target(chosen)

    from cluster.control import MOST_LINES
    from cluster.control_client import UnreachableError

    client: ControlClient | None = target.client()
    after, lines = 0, chosen.lines
    while client is not None:
        with client:
            try:
                for line in client.logs(process=chosen.process, lines=lines, follow=chosen.follow, after=after):
                    print(json.dumps(line) if chosen.json else log_line(line), flush=True)
                    after, lines = line["number"], MOST_LINES
                return 0
            except BrokenPipeError:  # whoever reads has enough; Python would try once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            except UnreachableError:
                if not chosen.follow:
                    raise
        client = target.again()
    return 0


# ------------------------------------------------------------------- targets


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"millrace {name}", description=about)
    parser.add_argument("target", nargs="?", metavar="TARGET", help=_TARGET)
    parser.add_argument(
        "--token-file", type=Path, help=f"file with the run's token (default: in its folder, or ${TOKEN_VARIABLE})"
    )
    parser.add_argument(
        "--tls-authority", metavar="FILE", help="PEM file of the certificate to trust (default: by the run's settings)"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    return parser


def _target(chosen: argparse.Namespace) -> Target:
    """The run that a command line names.

    Raises:
        ValueError: it names none, or its token is not known.
        FileNotFoundError: a file or folder is missing.
    """
    text: str = chosen.target if chosen.target is not None else str(_only_run())
    folder, host_port, authority = Path(text), None, chosen.tls_authority
    if folder.is_dir():
        settings = RunFolder.open(folder).config.replay
        authority = authority or settings.tls_authority or settings.tls_certificate
    elif re.fullmatch(r"(\[[^\]/]+\]|[^:/\[\]]+):\d+", text):
        host_port = text
    else:
        raise FileNotFoundError(f"{text} is neither the folder of a run nor HOST:PORT of a control plane")
    file = chosen.token_file or (folder / TOKEN if host_port is None else None)
    token = os.environ.get(TOKEN_VARIABLE, "") if file is None else file.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(
            f"the token of the run at {text} is needed: give --token-file FILE or set {TOKEN_VARIABLE}; it is in the file "
            f"`{TOKEN}` of the run's folder"
        )
    return Target(None if host_port else folder, host_port, token, authority)


def _only_run() -> Path:
    """The only run below ./runs that is going.

    Raises:
        ValueError: there is none, or there are several.
    """
    going = [path.parent for path in sorted(Path("runs").glob(f"*/{CONTROL}")) if _listens(address_of(path.parent))]
    if len(going) != 1:
        found = (
            f"{len(going)} runs are going: {', '.join(map(str, going))}" if going else "no run below ./runs is going"
        )
        raise ValueError(f"{found}; name the folder of a run, or HOST:PORT of its control plane")
    return going[0]


def _listens(address: str | None) -> bool:
    """Whether anything accepts connections there: a head that was killed leaves its file behind."""
    host, _, port = (address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number ≥ 1, got {text}")
    return number


def _count(text: str) -> int:
    from cluster.control import MOST_LINES

    number = int(text)
    if not 0 <= number <= MOST_LINES:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {MOST_LINES}, got {text}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds ≥ 0, got {text}")
    return number


# ------------------------------------------------------------------- waiting


def _wait_for(client: ControlClient, seconds: float) -> str | None:
    """Wait until as many actors and shards run as are wanted. Returns what is still missing after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = client.status()
        counts = {"actors": found["actors"], "shards": found["shards"]}
        if all(count["running"] == count["wanted"] for count in counts.values()):
            return None
        if time.monotonic() >= deadline:
            short = [f"{count['running']} of {count['wanted']} {what} run" for what, count in counts.items()]
            return "; ".join([*short, *waiting(found, running=False)[:3]])
        time.sleep(_POLL_S)


def _wait_for_end(target: Target) -> None:
    """Wait until the run's control plane is gone for good and, where its folder is here, its report is written."""
    from cluster.control_client import UnreachableError

    client = target.again()
    while client is not None:
        with client:
            try:
                while target.address is not None:
                    client.status()
                    time.sleep(_POLL_S)
                break
            except UnreachableError:
                pass
        client = target.again()
    while target.folder is not None:
        try:
            with RunFolder.open(target.folder).held():
                return
        except RuntimeError:  # the command that started the run is not done yet
            time.sleep(_POLL_S)
