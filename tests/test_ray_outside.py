"""Programs outside Ray that write to a run under Ray."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.metrics import read_metrics
from tests import runs_for_tests as runs
from tests.test_outside import BROKEN, EXAMPLE, LANES, check_episodes, running, wait_for
from tests.test_ray_elastic import millrace
from tests.test_ray_run import GENTLE, Started, ended, start, wait_until_gone

__all__ = ["start"]

COLUMNS = ("observation", "action", "reward", "policy_version", "is_first", "is_last", "is_terminal")


@contextmanager
def program(run: Path, folder: Path, *, name: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """The example in the run, or other `code` with its arguments; its output goes to a file in `folder`."""
    address = json.loads((run / "control.json").read_text())["address"]
    command = [sys.executable, *(["-c", code] if code else [str(EXAMPLE)]), "--name", name, "--lanes", str(LANES)]
    command += ["--address", address, "--token", str(run / "outside_token")]
    with running(command, folder) as process:
        yield process


def begins(name: str) -> set[float]:
    """What the program of that name begins with: the first number of the first observation of each of its lanes."""
    of_env, _ = np.random.default_rng([0, *name.encode()]).spawn(2)
    return {float(cosine) for cosine in np.cos(of_env.uniform(-np.pi, np.pi, LANES)).astype(np.float32)}


def lanes_of(checkpoint: Path, name: str) -> list[dict[str, Any]]:
    """The rows of each lane that the program of that name has written, by field."""
    found = []
    for table in runs.lanes(checkpoint, *COLUMNS):
        rows = {column: np.array(table[column].to_pylist()) for column in COLUMNS}
        if float(rows["observation"][0][0]) in begins(name):
            found.append(rows)
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_learns_from_a_program_outside_and_shuts_out_one_that_is_wrong(start: Started, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        "pendulum_sac", *runs.SMALL, *GENTLE, "--name", "a", "--stop.steps", "1000000", "--actors.envs", "4",
        "--replay.capacity", "262144", "--learners.updates_per_step", "0.25", "--report_every_s", "0.5",
        "--outside.bad_messages", "3", "--outside.export_every_s", "1",
    )  # fmt: skip
    runs.wait_for(lambda: (run / "control.json").exists() and "learner" in runs.pids(run), process, timeout_s=150.0)
    assert (run / "outside_token").stat().st_mode & 0o777 == 0o600

    robot, broken = tmp_path / "robot", tmp_path / "broken"
    with program(run, robot, name="robot") as good:
        said = robot / "output"
        wait_for(lambda: re.search(r"policy [1-9]\d*, mean return", said.read_text()), good, robot, timeout_s=120.0)
        status = millrace(run, "status")
        (one,) = (one for one in status["processes"] if one["kind"] == "outside")
        assert (one["name"], one["state"], one["figures"]["lanes"]) == ("outside robot", "running", LANES)
        assert status["metrics"]["actors/outside"] == 1
        good.send_signal(signal.SIGINT)
        assert good.wait(30) == 0
    assert "refused" not in said.read_text()
    runs.wait_for(lambda: millrace(run, "status")["metrics"]["actors/outside_left"] == 1, process)
    assert not [one for one in millrace(run, "status")["processes"] if one["kind"] == "outside"]

    with program(run, broken, name="broken", code=BROKEN) as bad:
        assert bad.wait(120) == 1
    assert (broken / "output").read_text().count("refused: message ") == 3
    shut_out = r"outside actor outside-broken-\w+ is shut out: .*expected reward to be finite, received nan"
    runs.wait_for(lambda: any(re.match(shut_out, e["text"]) for e in runs.events(run, "warning")), process)
    with program(run, tmp_path / "again", name="broken") as again:
        assert again.wait(60) == 1
    assert "cannot join: broken was shut out: " in (tmp_path / "again" / "output").read_text()

    millrace(run, "stop")
    ended(process, tmp_path)
    summary, last = runs.summary(run), runs.newest_checkpoint(run)
    assert runs.recount(last)[0] == summary["steps"] == runs.head_counts(last)["env_steps"]
    assert summary["restarts"] == 0
    written = lanes_of(last, "robot")
    assert len(written) == LANES
    assert sum((~rows["is_last"]).sum() for rows in written) > LANES * runs.PENDULUM_STEPS
    told = [event["text"] for event in runs.events(run, "outside")]
    names = ("outside robot", "outside broken")
    assert told == [f"{name} has {what}" for name in names for what in (f"joined with {LANES} lanes", "gone")]
    for rows in written:
        check_episodes(rows)
        assert rows["policy_version"][-1] > 0
    for rows in lanes_of(last, "broken"):
        check_episodes(rows)
    metrics = read_metrics(run)
    assert max(value for value in metrics["actors/outside"].to_pylist() if value is not None) == 1
    assert metrics["actors/outside_shut_out"].to_pylist()[-1] == 1
    wait_until_gone(lambda: [one.pid for one in runs.session(process.pid)])
