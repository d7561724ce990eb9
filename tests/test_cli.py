"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.metrics import read_metrics
from cluster.parts import check_limits
from configs.load import load_config
from tests import runs_for_tests as runs

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command in this process and an empty folder; its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*os.sys.path, str(runs.ROOT)])  # type: ignore[attr-defined]

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as ended:  # argparse's way out
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small run made by `millrace train --json` in a process of its own: its folder and standard output."""
    folder = tmp_path_factory.mktemp("cli")
    words = [
        *runs.sync_words(folder),
        "--learners.updates_per_step",
        "0.1",
    ]
    words += ["--stop.steps", "500", "--eval.every", "400", "--eval.episodes", "2"]
    process = runs.start("train", "pendulum_sac", *words, "--json", cwd=folder)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return folder / "runs" / "a", out


def test_train_json_ends_with_one_line_that_sums_the_run_up(trained: tuple[Path, str]) -> None:
    run, out = trained
    assert out.count("\n") == 1  # all else goes to standard error
    found = json.loads(out)
    assert (run.parents[1] / found["run"]).samefile(run)
    rows = read_metrics(run).to_pylist()
    assert found["steps"] == rows[-1]["env_steps"] >= 500
    assert found["updates"] == rows[-1]["updates"] > 0
    assert found["wall_s"] > rows[-1]["time_s"] > 0
    assert found["mean_return"] == rows[-1]["eval/mean_return"]  # evaluated once more at its end


def test_eval_prints_its_figures_and_draws(trained: tuple[Path, str], call: Call, tmp_path: Path) -> None:
    run, _ = trained
    code, out, _ = call("eval", str(run), "--episodes", "3", "--json")
    found = json.loads(out)
    assert (code, found["episodes"]) == (0, 3)
    assert -2000 < found["mean_return"] < 0
    assert found["std_return"] > 0
    code, again, _ = call("eval", str(run), "--episodes", "3", "--json")
    assert again == out  # the same seeds
    other = json.loads(call("eval", str(run), "--episodes", "3", "--seed", "5", "--json")[1])
    assert other["mean_return"] != found["mean_return"]
    # With the seeds and episodes of the training's own evaluation, its figure comes out again.
    measured = json.loads(call("eval", str(run), "--episodes", "2", "--json")[1])
    best = max(row["eval/mean_return"] for row in read_metrics(run).to_pylist() if row["eval/mean_return"] is not None)
    assert measured["mean_return"] == pytest.approx(best, abs=1e-3)

    picture = tmp_path / "out.gif"
    code, out, err = call("eval", str(run), "--episodes", "1", "--video", str(picture))
    assert (code, err) == (0, "")
    assert picture.read_bytes().startswith(b"GIF8")
    assert "over 1 episodes" in out
    assert "one episode with return -" in out


def test_report_is_made_again(trained: tuple[Path, str], call: Call) -> None:
    run, _ = trained
    report = run / "report.html"
    report.unlink()
    code, out, _ = call("report", str(run), "--json")
    assert (code, json.loads(out)) == (0, {"report": str(report)})
    assert report.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train pendulum_sac --actor.count 4", "actors.count"),
        ("train pendulum_sac --replay.shard 2", "replay.shards"),
        ("train pendulum_sac --actors.count 0", "actors.count"),
        ("train pendulum_sac --algorithm.discount 1.5", "algorithm.discount"),
        ("train pendulum_sac --actors.batch_size 9 --actors.envs 8", "must not exceed actors.envs"),
        ("train pendulum_sac --mode sync --address auto", "drop one of the two"),
        ("train pendulum_sac --env.id Pendulum-v2 --replay.directory .", "nearest: Pendulum-v1"),
        ("train pendulum_sac --env.id CartPole-v1 --replay.directory .", "CartPole-v1 has 2 discrete actions"),
        ("train pendulum_sac --env.id no_such_module:make --replay.directory .", "no_such_module"),
        ("train pendulum_sac --prior.source nowhere", "prior.source: "),
        ("train pendulum_sac --prior.source nowhere.parquet --mode sync", "nowhere.parquet does not exist"),
        (
            "train pendulum_sac --mode sync --learners.device cuda:99",
            "learners.device: expected a device that torch finds",
        ),
        ("train pendulum_sca", "pendulum_sac"),
        ("train --resume nowhere", "nowhere is not the folder of a run"),
        ("train pendulum_sac --resume nowhere", "leave pendulum_sac out"),
        ("train pendulum_sac --resume", "--resume needs a value"),
        ("trian pendulum_sac", "did you mean train?"),
        ("eval nowhere", "nowhere is not the folder of a run"),
        ("eval", "required: run"),
        ("eval nowhere --episodes 0", "whole number ≥ 1"),
        ("eval nowhere --episodes many", "--episodes"),
        ("report nowhere", "nowhere"),
        ("bench walkers", "actors, train"),
        ("bench", "actors, train"),
        ("clean --everything", "--everything"),
    ],
)
def test_what_is_impossible_is_refused_with_one_clear_message(
    words: str, message: str, call: Call, tmp_path: Path
) -> None:
    code, out, err = call(*words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_name_that_is_taken_is_refused_and_the_run_left_as_it_is(trained: tuple[Path, str], call: Call) -> None:
    run, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, err = call("train", "pendulum_sac", "--name", "a", "--root", str(run.parent), "--mode", "sync")
    assert code == 2
    assert f"{run} exists already" in err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_checkpoint_without_steps_is_not_resumed_as_if_it_had_some(
    trained: tuple[Path, str], call: Call, tmp_path: Path
) -> None:
    run = shutil.copytree(trained[0], tmp_path / "copy")
    manifest = max((run / "checkpoints").glob("step_*")) / "manifest.json"
    found = json.loads(manifest.read_text())
    found["files"] = [file for file in found["files"] if not file["path"].startswith("replay/")]
    manifest.write_text(json.dumps(found))
    shutil.rmtree(manifest.parent / "replay")
    code, _, err = call("train", "--resume", str(run))
    assert code == 2
    assert "holds no steps; resume with --no-checkpoints.replay" in err


def test_settings_under_which_all_would_wait_for_ever_are_refused_before_anything_starts(call: Call) -> None:
    words = ("train", "pendulum_sac", "--root", "nowhere")
    code, _, err = call(*words, "--replay.error_buffer", "1")
    assert code == 2
    assert err.startswith("millrace: ")
    assert err.count("\n") == 1
    assert "updates_per_call" not in err
    code, _, several = call(*words, "--replay.error_buffer", "1", "--learners.updates_per_call", "3")
    assert code == 2
    assert "; 768 windows are those of learners.updates_per_call (3) updates, which may be lowered as well" in several
    least = re.search(r"raise replay.error_buffer to at least (\d+) steps", err)
    assert least is not None
    assert call(*words, "--replay.error_buffer", str(int(least[1]) - 1))[0] == 2
    check_limits(load_config("pendulum_sac", ["--replay.error_buffer", least[1]]))
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "eval",
        "report",
        "export",
        "replay",
        "clean",
        "bench",
        "status",
        "scale",
        "checkpoint",
        "stop",
        "logs",
    ],
)
def test_every_command_explains_itself(command: str, call: Call) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert f"millrace {command}" in out


def test_help_lists_commands_and_settings(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in ("train", "eval", "report", "replay", "bench", "clean"))
    assert call()[0] == 2
    _, out, _ = call("train", "pendulum_sac", "--help")
    assert "--actors.count" in out
    assert "Number of actor processes." in out


def test_storage_of_a_killed_run_is_listed_and_removed(call: Call, tmp_path: Path) -> None:
    words = [
        *runs.SMALL,
        "--mode",
        "sync",
        "--name",
        "dead",
        "--replay.directory",
        str(tmp_path),
        "--stop.steps",
        "1e9",
    ]
    process = runs.start("train", "pendulum_sac", *words, cwd=tmp_path)
    (file,) = runs.wait_for(lambda: list(tmp_path.glob("millrace.dead.*")), process)
    assert json.loads(call("clean", "--directory", str(tmp_path), "--json")[1])["files"] == []  # it is alive
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    expected = {"path": str(file), "run": "dead", "shard": 0, "bytes": file.stat().st_size}
    found = json.loads(call("clean", "--directory", str(tmp_path), "--json")[1])
    assert found == {"files": [expected], "removed": False}
    _, out, _ = call("clean", "--directory", str(tmp_path))
    assert f"{file}  " in out
    assert file.exists()
    # The next start tells of it.
    _, out, _ = call(
        "train", "pendulum_sac", "--mode", "sync", "--replay.directory", str(tmp_path), "--env.id", "Pendulum-v2"
    )
    assert f"left by a dead run: {file}" in out.replace("\n", "")
    assert call("clean", "--directory", str(tmp_path), "--yes")[0] == 0
    assert not file.exists()


def test_python_does_what_the_command_does(tmp_path: Path) -> None:
    from cluster import train

    shown: list[Any] = []
    words = [
        *runs.SMALL,
        "--mode",
        "sync",
        "--root",
        str(tmp_path),
        "--replay.directory",
        str(tmp_path),
        "--stop.steps",
        "250",
    ]
    run = train(load_config("pendulum_sac", words), show=lambda row, line: shown.append((row, line)))
    assert run.summary == runs.summary(run.path)
    assert run.summary["steps"] >= 250
    assert run.report.is_file()
    assert run.path.parent == tmp_path
    assert shown[-1][0]["env_steps"] == run.summary["steps"]
    facts = json.loads((run.path / "run.json").read_text())
    assert facts["seed"] == 0
    assert facts["command"]
    assert {"ray", "torch", "envpool", "python"} <= facts["versions"].keys()
    assert len(facts["commit"].removesuffix("-dirty")) == 40
