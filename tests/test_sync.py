"""The one-process mode: whole runs, repeated to the last digit, stopped, resumed, and met by what can go wrong."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.api import Run, train
from cluster.checkpoint import Checkpoints, load_tensors, verify
from cluster.cli import main
from cluster.metrics import read_metrics
from cluster.resume import check_resumable
from cluster.runs import RunFolder
from cluster.warned import Warned
from configs.load import load_config
from tests import runs_for_tests as runs

BY_CLOCK = re.compile(r"time(_s|/.*)|wall_s|.*_per_s|eval/seconds")  # columns read from a clock
Trained = Callable[..., Run]


@pytest.fixture
def sync(tmp_path: Path) -> Trained:
    """Train in this process, with more settings; keywords go to `train`."""

    def run(*words: str, resume: Path | None = None, folder: Path = tmp_path, **more: Any) -> Run:
        words = ("--mode", "sync", "--root", str(folder / "runs"), "--replay.directory", str(tmp_path), *words)
        more.setdefault("show", lambda *_: None)
        return train(load_config("pendulum_sac", [*runs.SMALL, *words]), resume=resume, **more)

    return run


def test_the_same_seed_gives_the_same_metrics_to_the_last_digit(sync: Trained) -> None:
    settings = [
        "--actors.count",
        "2",
        "--actors.envs",
        "2",
        "--replay.shards",
        "2",
        "--learners.updates_per_step",
        "0.5",
    ]
    settings += ["--eval.every", "450", "--eval.episodes", "1", "--stop.steps", "900"]

    def metrics(name: str, seed: int) -> tuple[pa.Table, dict[str, Any]]:
        run = sync(*settings, "--name", name, "--seed", str(seed))
        table = read_metrics(run.path)
        exact = table.select(sorted(c for c in table.column_names if not BY_CLOCK.fullmatch(c)))
        return exact, load_tensors(runs.newest_checkpoint(run.path) / "learner.safetensors")[0]

    (one, learner_one), (two, learner_two), (other, _) = metrics("a", 7), metrics("b", 7), metrics("c", 8)
    assert {"loss/critic", "return_mean_100", "eval/mean_return", "samples_per_insert"} <= set(one.column_names)
    assert one.equals(two)
    assert all(learner_one[name].tobytes() == learner_two[name].tobytes() for name in learner_one)
    assert one.column("loss/critic") != other.column("loss/critic")
    assert one.column("eval/mean_return") != other.column("eval/mean_return")


def test_counts_are_those_of_the_rows_and_a_resumed_run_goes_on_with_them(sync: Trained) -> None:
    settings = [
        "--actors.count",
        "2",
        "--actors.envs",
        "3",
        "--replay.shards",
        "2",
        "--learners.updates_per_step",
        "0.25",
        "--name",
        "a",
    ]
    first = sync(*settings, "--stop.steps", "1500")
    before = runs.newest_checkpoint(first.path)
    assert first.summary["stop_reason"].endswith("of 1500 environment steps done")
    assert runs.recount(before) == (first.summary["steps"], first.summary["episodes"])
    assert first.summary["episodes"] == 6  # 1500 steps in 6 lanes: each has ended one of 200

    rows_before = read_metrics(first.path).num_rows
    second = sync(*settings, "--stop.steps", "2800", resume=first.path)
    assert second.path == first.path
    after = runs.newest_checkpoint(first.path)
    assert runs.recount(after) == (second.summary["steps"], second.summary["episodes"])
    assert second.summary["episodes"] == 12
    rows = read_metrics(first.path).to_pylist()
    assert [row["env_steps"] for row in rows] == sorted(row["env_steps"] for row in rows)
    assert rows[rows_before]["updates"] >= first.summary["updates"]
    assert rows[rows_before]["replay_size"] >= first.summary["steps"]
    assert second.summary["updates"] == load_tensors(after / "learner.safetensors")[1]["updates"]
    # No sample was forgotten: each update drew one batch, and the limiter went on from both counts.
    counts = runs.head_counts(after)
    assert counts["sampled"] == 32 * counts["updates"]
    assert counts["sampled"] / (counts["env_steps"] - 200) == pytest.approx(0.25 * 32, rel=0.1)
    assert counts["version"] > runs.head_counts(before)["version"]


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ("", "--algorithm.hidden 32 16", {"algorithm.hidden": ("32 32", "32 16")}),
        ("", "--algorithm.head.kind two_hot", {"algorithm.head.kind": ("mse", "two_hot")}),
        (
            "--algorithm.head.kind hl_gauss",
            "--algorithm.head.sigma 1 --algorithm.head.low -9 --algorithm.head.high 9",
            {
                "algorithm.head.sigma": ("0.75", "1.0"),
                "algorithm.head.low": ("None", "-9.0"),
                "algorithm.head.high": ("None", "9.0"),
            },
        ),
        ("", "--algorithm.name flow --algorithm.hidden 8", {"algorithm.name": ("sac", "flow")}),
        (
            "--algorithm.target.kind chunk --algorithm.target.length 3 --algorithm.chunk 3",
            "--algorithm.target.length 2 --algorithm.chunk 2",
            {"algorithm.target.length": ("3", "2"), "algorithm.chunk": ("3", "2")},
        ),
        (
            "",
            "--algorithm.target.kind decoupled --algorithm.target.length 2",
            {"algorithm.target.kind": ("one_step", "decoupled")},
        ),
        ("--algorithm.name dqn", "--algorithm.dueling", {"algorithm.dueling": ("False", "True")}),
        ("--algorithm.name r2d2", "--algorithm.recurrent 9", {"algorithm.recurrent": ("128", "9")}),
        (
            "",
            "--algorithm.target.kind n_step --algorithm.target.length 3 --algorithm.policy_lr 1 --algorithm.encoder none",
            {},
        ),
        ("", "--algorithm.discount 0.5 --algorithm.target.expectile 0.7 --algorithm.head.bins 9", {}),
        ("--algorithm.head.kind c51", "--algorithm.head.sigma 2 --algorithm.head.max_bins 999", {}),
        ("--algorithm.name r2d2", "--algorithm.burn_in 3 --algorithm.sequence 5", {}),
    ],
)
def test_only_what_networks_are_made_of_is_kept_by_a_resumed_run(
    before: str, after: str, refused: dict[str, tuple[str, str]]
) -> None:
    old, new = (load_config(None, [*runs.SMALL, *words.split()]) for words in (before, f"{before} {after}"))
    expected = [
        f"{path}: the checkpoint was trained with {was}, received {now}; resume with --{path} {was}, or start a new run"
        for path, (was, now) in refused.items()
    ]
    if not expected:
        return check_resumable(old, new, frames=False)
    with pytest.raises(ValueError, match=": the checkpoint was trained with ") as why:
        check_resumable(old, new, frames=False)
    assert sorted(str(why.value).splitlines()) == sorted(expected)


def test_a_resumption_that_fails_leaves_the_settings_that_the_checkpoint_was_trained_with(
    sync: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--name", "a", "--learners.updates_per_step", "0.1"]
    first = sync(*words, "--stop.steps", "300")
    settings = first.path / "config.yaml"
    before = settings.read_bytes()
    with pytest.raises(ValueError, match=r"algorithm\.hidden: the checkpoint was trained with 32 32"):
        sync(*words, "--stop.steps", "400", "--algorithm.hidden", "16", resume=first.path)
    assert settings.read_bytes() == before
    # One that fails later: the storage cannot be made.
    with pytest.raises(OSError, match="nowhere"):
        sync(*words, "--stop.steps", "400", "--replay.directory", str(tmp_path / "nowhere"), resume=first.path)
    assert settings.read_bytes() == before
    second = sync(*words, "--stop.steps", "400", "--algorithm.discount", "0.5", resume=first.path)
    assert RunFolder.open(second.path).config.algorithm.discount == 0.5


def test_what_the_learner_warns_of_is_told(sync: Trained) -> None:
    lines: list[str] = []
    words = ["--algorithm.head.kind", "hl_gauss", "--algorithm.head.low", "-1", "--algorithm.head.high", "1"]
    run = sync(
        *words, "--learners.updates_per_step", "0.2", "--stop.steps", "600", "--name", "a",
        show=lambda _, line: lines.append(line) if line else None,
    )  # fmt: skip
    (warning,) = runs.events(run.path, "warning")
    assert re.fullmatch(r"learner: \d+\.\d % of the targets lay outside the value support, .*clamped", warning["text"])
    assert warning["text"] in lines
    assert "lay outside the value support" in run.report.read_text()
    assert not [handler for handler in logging.getLogger("learners").handlers if isinstance(handler, Warned)]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_run_is_resumed_with_another_number_of_shards(sync: Trained, before: int, after: int) -> None:
    lines: list[str] = []
    settings = ["--actors.envs", "3", "--learners.updates_per_step", "0.25", "--name", "a"]
    first = sync(*settings, "--replay.shards", str(before), "--stop.steps", "1500")
    old = runs.newest_checkpoint(first.path)
    assert len(list((old / "replay").iterdir())) == before
    changed = ["--replay.shards", str(after), "--stop.steps", "2200"]
    second = sync(*settings, *changed, resume=first.path, show=lambda _, line: lines.append(line) if line else None)
    assert f"replay.shards: saved {before}, now {after} (the current one is used)" in lines
    new = runs.newest_checkpoint(first.path)
    assert len(list((new / "replay").iterdir())) == after
    # No step is lost but those across a lane's cut, of which there may be one for each lane.
    items, _ = runs.recount(new)
    assert second.summary["steps"] - 3 <= items <= second.summary["steps"]
    counts = runs.head_counts(new)
    assert counts["sampled"] == 32 * counts["updates"]
    ahead = counts["sampled"] / (0.25 * 32) - (counts["env_steps"] - 200)  # in steps
    assert abs(ahead) <= RunFolder.open(second.path).config.error_buffer + 3


def test_a_checkpoint_links_to_the_steps_of_the_one_before_and_outlives_it(sync: Trained) -> None:
    run = sync(
        "--replay.segment_steps", "64", "--actors.envs", "3", "--learners.updates_per_step", "0.1", "--name", "a",
        "--eval.every", "400", "--eval.episodes", "1", "--stop.steps", "1500", "--checkpoints.keep", "9",
    )  # fmt: skip
    first, *_, last = sorted((run.path / "checkpoints").iterdir())
    files = {path.name: path.stat().st_ino for path in (first / "replay").rglob("rows-*")}
    again = {path.name: path.stat().st_ino for path in (last / "replay").rglob("rows-*")}
    assert files.items() <= again.items()
    assert files
    assert len(again) > len(files)
    shutil.rmtree(first)
    assert verify(last).env_steps == run.summary["steps"] == runs.recount(last)[0]


def test_a_run_ends_by_the_clock_or_when_it_is_solved(sync: Trained) -> None:
    timed = sync("--stop.wall_s", "0.3", "--learners.updates_per_step", "0.1", "--name", "timed")
    assert timed.summary["stop_reason"].endswith("of 0.3 s are over")
    solved = sync(
        "--eval.every", "250", "--eval.episodes", "2", "--stop.mean_return", "-2000", "--name", "solved",
        "--learners.updates_per_step", "0.1",
    )  # fmt: skip
    assert solved.summary["stop_reason"].startswith("solved: mean return -")
    assert 250 <= solved.summary["steps"] < 400  # steps come in writes of 64
    best = Checkpoints(solved.path / "checkpoints").best()
    assert best is not None
    assert best.eval_mean_return == solved.summary["mean_return"]


def test_sigterm_leaves_a_whole_checkpoint_and_a_report(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    words = [
        *runs.sync_words(tmp_path),
        "--learners.updates_per_step",
        "0.1",
    ]
    process = runs.start(
        "train", "pendulum_sac", *words, "--stop.steps", "1e9", "--checkpoints.every_s", "1", cwd=tmp_path
    )
    runs.wait_for(lambda: runs.events(run, "checkpoint"), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "stopped by a signal" in out
    assert (run / "report.html").stat().st_size > 10_000
    latest = Checkpoints(run / "checkpoints").latest()
    assert latest is not None
    assert latest.env_steps == runs.summary(run)["steps"] > 0
    assert not list(tmp_path.glob("millrace.*"))


def test_it_runs_with_ray_uninstalled(tmp_path: Path) -> None:
    words = [
        "train",
        "pendulum_sac",
        *runs.sync_words(tmp_path),
        "--stop.steps",
        "300",
    ]
    code = f"import sys; sys.modules['ray'] = None; from cluster.cli import main; sys.exit(main({words!r}))"
    environment = {"PYTHONPATH": str(runs.ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert runs.summary(tmp_path / "runs" / "a")["steps"] >= 300


@pytest.mark.parametrize("reward", ["1e38", "inf"])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(
    reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(runs.ROOT))
    words = [
        *runs.sync_words(tmp_path),
        "--checkpoints.every_s",
        "1",
    ]
    words += [
        "--env.id",
        "tests.envs_for_tests:make_spoilt",
        "--env.kwargs",
        "good=200",
        f"reward={reward}",
        "--actors.envs",
        "4",
    ]
    assert main(["train", "pendulum_sac", *words]) == 1
    message = capsys.readouterr().err
    assert message.startswith("millrace: learner: not finite in updates ")
    assert "loss/critic = inf" in message or "loss/critic = nan" in message
    assert "|return| " in message
    assert message.count("\n") == 1
    for checkpoint in Checkpoints(tmp_path / "runs" / "a" / "checkpoints").all():
        tensors, _ = load_tensors(checkpoint.path / "learner.safetensors")
        assert all(
            abs(tensor).max() < float("inf") for tensor in tensors.values() if tensor.dtype.kind == "f" and tensor.size
        )
    assert [event["kind"] for event in runs.events(tmp_path / "runs" / "a")][-1] == "error"
    assert not list(tmp_path.glob("millrace.*"))


def in_small_disk(disk: Path, size: str, before: str, words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `millrace` where `disk` is a file system of `size` of its own, after the shell commands `before`."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount namespace")
    mount = f'mount -t tmpfs -o size={size} none "{disk}" && {before} && exec "$0" -m cluster.cli "$@"'
    environment = {"PYTHONPATH": str(runs.ROOT), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [unshare, "-rm", "sh", "-c", mount, sys.executable, *words],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(sync: Trained, tmp_path: Path) -> None:
    run = sync("--stop.steps", "300", "--name", "a").path
    old = runs.newest_checkpoint(run)
    kept = tmp_path / "kept"
    shutil.copytree(run / "checkpoints", kept)
    done = in_small_disk(
        run / "checkpoints", "200k", f'cp -r "{kept}/." "{run}/checkpoints"',
        ["train", "--resume", str(run), "--stop.steps", "3000", "--learners.updates_per_step", "0.1", "--checkpoints.every_s", "1"],
        tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert runs.summary(run)["steps"] >= 3000
    (warning, *_) = runs.events(run, "warning")
    assert "no checkpoint was written" in warning["text"]
    assert re.search(r"no room on disk for .*: .* free, .* needed; free some space", warning["text"])
    assert warning["text"] in done.stdout.replace("\n", "")
    assert Checkpoints(run / "checkpoints").latest() is not None  # outside the namespace, untouched
    assert old.exists()


def test_too_little_room_for_the_replay_is_one_clear_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["train", "pendulum_sac", *runs.SMALL, "--mode", "sync", "--name", "a", "--replay.directory", str(disk)]
    done = in_small_disk(disk, "100k", "true", words, tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"millrace: .*{re.escape(str(disk))} has 0 MiB free and the replay shard needs .*\n", done.stderr
    )
    assert "lower replay.capacity" in done.stderr
    assert not (tmp_path / "runs" / "a").exists()  # the name is free for another try
