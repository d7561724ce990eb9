"""The folder of a run: its resolved settings, the facts of how it was started, and its events."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import psutil
import yaml

from cluster.events import event_line
from cluster.files import read_json, write_atomically, write_json
from configs.llm import LlmConfig
from configs.schema import RunConfig
from replay.guests import join_token
from replay.security import Security, new_token

PACKAGES = (
    *("millrace", "ray", "torch", "envpool", "gymnasium", "pyarrow", "grpcio", "numpy", "numba"),
    *("transformers", "peft"),
)
TOKEN = "token"
OUTSIDE_TOKEN = "outside_token"  # what actors outside Ray show, where the run takes any
CONTROL = "control.json"  # while the run is going: {"address": "host:port"} of its control plane
ADDRESSES = "replay.json"  # while the run is going: {"addresses": […]} of its shards

AnyConfig = RunConfig | LlmConfig
Config = TypeVar("Config", bound=AnyConfig)


class RunFolder(Generic[Config]):
    """`<config.root>/<config.name>/`: config.yaml, run.json, token, outside_token, events.jsonl, and folders of other parts."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config

    @classmethod
    def create(cls, config: Config, command: Sequence[str]) -> RunFolder[Config]:
        """Make the folder, with config.yaml, run.json and the tokens in it; the returned config carries the run's name.

        Raises:
            FileExistsError: a run of that name is there already; it is left as it is.
        """
        root = Path(config.root)
        root.mkdir(parents=True, exist_ok=True)
        names = [config.name] if config.name is not None else _default_names(config)
        for name in names:
            try:
                (root / name).mkdir()
                break
            except FileExistsError:
                continue
        else:
            taken = root / names[0]
            raise FileExistsError(
                f"{taken} exists already; choose another --name, remove that folder, or go on with it by --resume {taken}"
            )
        config = cast(Config, config.model_copy(update={"name": name}))
        run = RunFolder(root / name, config)
        run.rewrite(config)
        write_json(run.path / "run.json", _facts(config, command))
        run.security()
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder[Any]:
        """Open the folder of an earlier run; the `kind` in its settings says whether they are a RunConfig or an LlmConfig.

        Raises:
            FileNotFoundError: the path holds no config.yaml.
            ValueError: config.yaml is no YAML, or its settings do not fit this version of Millrace.
        """
        file = path / "config.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"{path} is not the folder of a run: it holds no config.yaml")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            # A run of an earlier version says nothing of its kind.
            llm = isinstance(values, dict) and values.get("kind") == "llm"
            config = (LlmConfig if llm else RunConfig).model_validate(values)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{file} cannot be used: {error}") from error
        return RunFolder(path, config)

    def rewrite(self, config: Config) -> None:
        """Put other settings in the place of those in config.yaml."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_atomically(self.path / "config.yaml", text.encode())
        self.config = config

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from running in the folder.

        Raises:
            RuntimeError: another process holds it: the run is still going.
        """
        with open(self.path / ".lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
            except BlockingIOError:
                lock.seek(0)
                raise RuntimeError(f"{self.path} is still going, as process {lock.read().strip() or '?'}") from None
            except OSError:  # a file system without locks, or a full one
                pass
            yield

    def security(self) -> Security:
        """What the run's services ask of their callers. The token lies in a file of its own, which nobody else may read.

        So does that of actors outside Ray, which follows from it, beside it.

        Raises:
            ValueError: the file holds no token.
        """
        path = self.path / TOKEN
        _write_secret(path, new_token())
        replay = self.config.replay
        try:
            security = Security(
                path.read_text(encoding="ascii").strip(),
                certificate=replay.tls_certificate,
                key=replay.tls_key,
                authority=replay.tls_authority,
            )
        except ValueError as error:
            raise ValueError(f"{path} cannot be used ({error}); remove it, and a new one is made") from None
        self._renew_outside_token(security)
        return security

    def _renew_outside_token(self, security: Security) -> None:
        """Another one than that of the run's token and settings is of an earlier token, or of a write that was cut short."""
        path, wanted = self.path / OUTSIDE_TOKEN, join_token(security)
        is_wanted = isinstance(self.config, RunConfig) and self.config.outside.most > 0
        with suppress(FileNotFoundError):
            if is_wanted and path.read_text(encoding="ascii", errors="replace").strip() == wanted:
                return
        path.unlink(missing_ok=True)
        if is_wanted:
            _write_secret(path, wanted)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, see cluster.checkpoint."""
        return self.path / "checkpoints"

    def facts(self) -> dict[str, Any]:
        """What run.json holds."""
        facts: dict[str, Any] = read_json(self.path / "run.json")
        return facts

    def resumed(self, command: Sequence[str]) -> None:
        """Note in run.json that the run goes on, and by which command."""
        facts = self.facts()
        facts.setdefault("resumed", []).append({"command": list(command), "started": _now(), "commit": _commit()})
        write_json(self.path / "run.json", facts)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Put how the run ended into run.json; a resumed run replaces its earlier summary."""
        write_json(self.path / "run.json", self.facts() | {"finished": _now(), "summary": dict(summary)})

    def event(self, kind: str, text: str, *, time_s: float | None) -> None:
        """Append one line to events.jsonl: what happened, `time_s` seconds after the run's clock began."""
        line = event_line(kind, text, time_s=time_s)
        # One write of one line at the end of the file: lines of two processes do not mix.
        descriptor = os.open(self.path / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def _write_secret(path: Path, text: str) -> None:
    """Make a file that nobody else may read; one that is there is left as it is."""
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")


def _default_names(config: AnyConfig) -> list[str]:
    """Names to try in turn; the later ones serve runs that start in the same second."""
    trained, how = (
        (Path(config.tasks.source).name, config.algorithm.loss)
        if isinstance(config, LlmConfig)
        else (config.env_name, config.algorithm.name)
    )
    words = (re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "run" for text in (trained, how))
    base = f"{'-'.join(words)}-{time.strftime('%Y%m%d-%H%M%S')}"
    return [base, *(f"{base}-{number}" for number in range(2, 100))]


def _facts(config: AnyConfig, command: Sequence[str]) -> dict[str, Any]:
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "seed": config.seed,
        "command": list(command),
        "started": _now(),
        "machine": {
            "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "platform": platform.platform(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree this file lies in, with `-dirty` where tracked files differ; None outside a checkout."""
    source = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository, whose commit would say nothing about this code.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changes else commit or None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
