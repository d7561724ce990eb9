"""Real runs under Ray for the benchmarks of the cluster: light actors, and what their processes use and say."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pyarrow.flight as flight

from cluster.runs import ADDRESSES, RunFolder
from replay.security import flight_client

ROOT = Path(__file__).parents[2]
STARTED_S = 300.0
STATS_S = 2.0  # how often Ray writes the counters of a process to its log
STEP_S = 0.2  # of the light environment
# An environment that uses next to no processor: what is measured are the processes around it.
LIGHT = f"""
import time

import gymnasium
import numpy as np


class Light(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(3, np.float32), {{}}

    def step(self, action):
        time.sleep({STEP_S})
        self.steps += 1
        return np.zeros(3, np.float32), 0.0, False, self.steps >= 100, {{}}
"""
COMMON = [
    "--env.id",
    "light:Light",
    "--algorithm.hidden",
    "8",
    "8",
    "--learners.batch_size",
    "8",
    "--replay.capacity",
    "65536",
    "--eval.every",
    "0",
    "--stop.mean_return",
    "none",
    "--stop.steps",
    "100000000",
    "--actors.envs",
    "1",
    "--actors.cpus",
    "0.1",
    "--learners.cpus",
    "0.1",
    "--checkpoints.replay",
    "false",
]


class LightRun:
    """A run of `millrace train` whose environments sleep; every process of it ends with the block."""

    def __init__(self, folder: Path, *words: str, env: Mapping[str, str] | None = None) -> None:
        """folder: where the run is made. words: more settings. env: more variables."""
        (folder / "light.py").write_text(LIGHT)
        self.name = f"bench-{secrets.token_hex(4)}"
        self.path = folder / "runs" / self.name
        self._log = folder / f"{self.name}.log"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", "pendulum_sac", "--name", self.name, *COMMON, *words],
            cwd=folder,
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RAY_ADDRESS": "",
                "RAY_event_stats_print_interval_ms": str(int(1000 * STATS_S)),
                **(env or {}),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(60.0)
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self._process.pid:
                    process.kill()
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        self._process.wait()

    def until(self, true: Callable[[], Any], timeout_s: float = STARTED_S) -> Any:
        """What `true` returns, as soon as that is true.

        Raises:
            RuntimeError: the run ended, or it did not come to be in time.
        """
        deadline = time.monotonic() + timeout_s
        while not (found := true()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the run {self.name} ended or hangs; its last words: {self._log.read_text()[-2000:]}"
                )
            time.sleep(0.02)
        return found

    def pids(self) -> dict[str, int]:
        """Newest process of each name."""
        try:
            lines = (self.path / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return {}
        found = {}
        for line in lines:
            event = json.loads(line)
            if event["kind"] == "process" and (told := re.match(r"(.+) runs as process (\d+) ", event["text"])):
                found[told[1]] = int(told[2])
        return found

    def started(self, actors: int) -> None:
        """Wait until so many actors have started."""
        self.until(lambda: sum(name.startswith("actor ") for name in self.pids()) == actors)

    def inserted(self) -> int | None:
        """Rows that shard 0 has ever taken in; None where it does not answer."""
        try:
            addresses = json.loads((self.path / ADDRESSES).read_text())["addresses"]
            address = addresses["0"] if isinstance(addresses, dict) else addresses[0]
            with flight_client(address, RunFolder.open(self.path).security()) as client:
                (answer,) = client.do_action(flight.Action("stats", b"{}"), flight.FlightCallOptions(timeout=0.3))
                (table,) = json.loads(answer.body.to_pybytes())["tables"].values()
                return int(table["inserted"])
        except (OSError, flight.FlightError, ValueError, KeyError):
            return None


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def calls(pid: int) -> list[tuple[float, int, int]]:
    """What Ray's log of a process says now and then: epoch seconds, calls taken in so far, and calls made so far."""
    (log,) = Path("/tmp/ray").glob(f"session_2*/logs/python-core-worker-*_{pid}.log") or [None]
    found: list[tuple[float, int, int]] = []
    taken = made = 0
    for line in log.read_text().splitlines() if log else ():
        if line.endswith("core_worker.cc:591: Event stats:") or re.search(r"core_worker\.cc:\d+: Event stats:$", line):
            at = datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            found.append((at, 0, 0))
        elif told := re.match(r"\s*CoreWorkerService\.grpc_(server|client)\.PushTask - (\d+) total", line):
            taken, made = (int(told[2]), made) if told[1] == "server" else (taken, int(told[2]))
            if found:
                found[-1] = (found[-1][0], taken, made)
    return found


def call_rates(pid: int, since: float) -> tuple[float, float] | None:
    """Calls per second that a process has taken in and made since an epoch second; None where Ray's log does not tell."""
    told = [one for one in calls(pid) if one[0] >= since and one[1]]
    if len(told) < 2:
        return None
    first, last = told[0], told[-1]
    seconds = last[0] - first[0]
    return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds
