"""What the tests of whole runs share: small settings, the command as a process, and a recount of what it left."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

ROOT = Path(__file__).parents[1]
PENDULUM_STEPS = 200  # after which every episode is truncated
SMALL = [
    "--algorithm.hidden",
    "32",
    "32",
    "--learners.batch_size",
    "32",
    "--replay.min_size",
    "200",
    "--replay.capacity",
    "16384",
    "--actors.random_steps",
    "200",
    "--eval.every",
    "0",
    "--stop.mean_return",
    "none",
]


def sync_words(folder: Path) -> list[str]:
    """Settings of a small lock-step run named `a`, with its storage under `folder`."""
    return [*SMALL, "--mode", "sync", "--name", "a", "--replay.directory", str(folder)]


def start(
    *words: str, cwd: Path, log: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `millrace` in `cwd`, in a session of its own; its output goes to `log`, or into pipes."""
    pipe: Any = subprocess.PIPE if log is None else log.open("w")
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *words],
        cwd=cwd,
        stdout=pipe,
        stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})},
    )


def wait_for(true: Callable[[], Any], process: subprocess.Popen[Any], timeout_s: float = 60.0) -> Any:
    """What `true` returns, as soon as that is true; fails when the process ends first."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert process.poll() is None, f"the run ended with code {process.returncode} too early"
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Lines of events.jsonl, those of one kind; none while there is no file."""
    try:
        text = (run / "events.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in text.splitlines()]
    return [event for event in found if kind in (None, event["kind"])]


def pids(run: Path) -> dict[str, int]:
    """Newest process of each name, from the events."""
    words = [event["text"].split() for event in events(run, "process")]
    return {" ".join(w[: w.index("runs")]): int(w[w.index("process") + 1]) for w in words}


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["summary"]
    return found


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def head_state(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "head.json").read_text())
    return found


def head_counts(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = head_state(checkpoint)["counts"]
    return found


def lanes(checkpoint: Path, *columns: str) -> Iterator[pa.Table]:
    """Columns of the rows of each lane in the replay files of a checkpoint, oldest first, from segments that follow on each other."""
    for folder in sorted((checkpoint / "replay").glob("shard-*")):
        (manifest,) = folder.glob("manifest-*.json")
        files = [record["name"] for record in json.loads(manifest.read_text())["files"]]
        (index,) = (name for name in files if name.startswith("segments-"))
        readers = {name: pa.ipc.open_file(pa.memory_map(str(folder / name))) for name in files}
        segments = {s["segment"]: s for s in readers[index].read_all().to_pylist()}
        followers = {s["next_segment"] for s in segments.values()}
        for first in segments.keys() - followers:
            parts = []
            at: int = first
            while at in segments:  # a lane, from its first segment on
                s = segments[at]
                rows = readers[s["file"]].get_batch(s["batch"]).slice(s["row"], s["rows"])
                parts.append(rows.select(list(columns)))
                at = s["next_segment"]
            yield pa.Table.from_batches(parts)


def recount(checkpoint: Path) -> tuple[int, int]:
    """(items, whole Pendulum episodes) in the replay files of a checkpoint, counted row by row."""
    items = episodes = 0
    for lane in lanes(checkpoint, "is_last"):
        last = lane["is_last"].to_pylist()
        items += sum(not ended for ended in last[:-1])
        ends = [row for row, ended in enumerate(last) if ended]
        episodes += sum(b - a == PENDULUM_STEPS + 1 for a, b in zip([-1, *ends], ends, strict=False))
    return items, episodes


def episodes_of_tasks(checkpoint: Path) -> tuple[list[tuple[int, int]], set[int]]:
    """(task, steps) of every finished episode of `many_tasks` in the replay files of a checkpoint; the tasks of those cut off."""
    finished, cut_off = [], set()
    for lane in lanes(checkpoint, "is_last", "is_terminal", "task"):
        rows = lane.to_pylist()
        begin = 0
        for number, row in enumerate(rows):
            if not row["is_last"] and number + 1 < len(rows):
                continue
            assert {row["task"] for row in rows[begin : number + 1]} == {row["task"]}, "an episode is of one task"
            if row["is_terminal"]:
                finished.append((row["task"], number - begin))
            else:  # the shard has closed it when the actor stopped
                cut_off.add(row["task"])
            begin = number + 1
    return finished, cut_off


def session(leader: int) -> list[psutil.Process]:
    """Living processes of a session; all that Ray starts stays in that of whoever started it."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def minari(path: Path, episodes: list[int], *, width: int = 3, scale: float = 1.0) -> Path:
    """A Pendulum data set as Minari writes it, of episodes of so many steps, with float64 numbers as MuJoCo gives them."""
    h5py = pytest.importorskip("h5py")
    path.mkdir()
    generator = np.random.default_rng(0)
    with h5py.File(path / "main_data.hdf5", "w") as file:
        for number, steps in enumerate(episodes):
            episode = file.create_group(f"episode_{number}")
            episode["observations"] = generator.uniform(-1, 1, (steps + 1, width))
            episode["actions"] = scale * generator.uniform(-1, 1, (steps, 1)).astype("f4")
            episode["rewards"] = np.full(steps, 1000.0 + number)
            episode["terminations"] = np.zeros(steps, bool)
            episode["truncations"] = np.arange(steps) == steps - 1
    return path


class RayCluster:
    """A Ray cluster of one node, in a session of its own; `close` ends the processes of that session and no others."""

    def __init__(self, folder: Path, *, cpus: int = 8) -> None:
        self.folder = folder
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        with socket.socket() as free:
            free.bind(("", 0))
            client_port = free.getsockname()[1]
        ports = ["--port=0", f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0"]
        ports += ["--min-worker-port=0", "--max-worker-port=0"]
        log = folder / "start.log"
        self._process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *ports),
                *(f"--num-cpus={cpus}", f"--temp-dir={folder}", "--include-dashboard=false"),
                "--object-store-memory=100000000",
            ],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **self.env, "PYTHONPATH": str(ROOT)},
        )
        try:
            wait_for(lambda: "will now block" in log.read_text(), self._process)
        except AssertionError as error:
            self.close()
            raise AssertionError(f"{error}: {log.read_text()}") from None
        address = re.search(r"ray start --address='([^']+)'", log.read_text())
        assert address is not None, log.read_text()
        self.address = address[1]
        self.leader = self._process.pid

    def workers(self) -> list[str]:
        """Titles of the processes that Ray runs for somebody, such as ray::ActorWorker."""
        return [title for _, title in self._workers()]

    def _workers(self) -> Iterator[tuple[psutil.Process, str]]:
        for process in session(self.leader):
            try:
                title = "".join(process.cmdline()[:1])
            except psutil.NoSuchProcess:
                continue
            if re.fullmatch(r"ray::(.*:)?\w+Worker.*", title):
                yield process, title

    def end_runs(self) -> None:
        """Kill what a test that failed has left of its run, which would go on for ever: heads too, until Ray starts none again."""
        deadline = time.monotonic() + 30.0
        while (left := list(self._workers())) and time.monotonic() < deadline:
            for process, _ in left:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.5)

    def close(self) -> None:
        while processes := session(self._process.pid):
            for process in processes:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            self._process.poll()
            time.sleep(0.05)
        self._process.wait()
