"""The learning curves: every planned run is legal and fair, finished ones are left alone, and the table tells what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.metrics import MetricsWriter
from cluster.runs import RunFolder
from tests.benchmarks import curves
from tests.benchmarks.curves import CurveRun, OtherSettingsError, planned

TINY = ("--stop.steps=160", "--eval.every=80", "--eval.episodes=1", "--replay.min_size=64", "--replay.capacity=8192")


def finished(run: CurveRun, folder: Path, returns: list[float], *, steps: int | None = None) -> None:
    """A run's folder as `millrace train` leaves it, with evaluations at equal distances."""
    made = RunFolder.create(run.config(folder), ["millrace", "train"])
    most = made.config.stop.steps
    assert most is not None
    with MetricsWriter(made.path) as metrics:
        for number, value in enumerate(returns, 1):
            at = float(most * number // len(returns))
            metrics.write({"env_steps": at, "eval/step": at, "eval/mean_return": value, "eval/std_return": 0.0})
    summary = {"steps": most if steps is None else steps, "updates": 10, "time_s": 5.0, "mean_return": returns[-1]}
    made.finished(summary)


def test_runs_of_a_task_differ_in_the_variants_settings_alone(tmp_path: Path) -> None:
    runs = planned("", 3)
    assert len(runs) == 42
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    for task, variants in curves.TASKS.items():
        assert len(variants) <= len(curves.COLOURS)
        mine = [run for run in runs if run.task == task]
        assert {run.variant for run in mine} == set(variants)
        plain = {**mine[0].config(tmp_path).model_dump(), "name": "", "seed": 0}
        assert mine[0].settings == ()
        for run in mine:
            config = run.config(tmp_path)
            assert (config.seed, config.mode, config.learners.threads) == (run.seed, "sync", 1)
            found = {**config.model_dump(), "name": "", "seed": 0}
            assert {group for group in found if found[group] != plain[group]} <= {"algorithm"}
            changed = {key for key in found["algorithm"] if found["algorithm"][key] != plain["algorithm"][key]}
            assert changed == {flag.split("=")[0].split(".")[1] for flag in run.settings} - {"chunk"}


def test_patterns_choose_runs() -> None:
    assert [run.label for run in planned("pendulum/*chain", 2)] == [
        "pendulum/sac + chain of 4/0",
        "pendulum/sac + chain of 4/1",
    ]
    with pytest.raises(SystemExit):
        curves.main(["--only", "nothing of this name"])


def test_only_whole_runs_count_as_finished(tmp_path: Path) -> None:
    whole, short, absent = planned("cartpole/dqn/", 3)
    finished(whole, tmp_path, [10.0, 20.0])
    finished(short, tmp_path, [10.0], steps=100)
    found = [curves.summary_of(run, tmp_path) for run in (whole, short, absent)]
    assert found[0] is not None
    assert found[0]["mean_return"] == 20.0
    assert found[1:] == [None, None]


def test_a_finished_run_with_other_settings_is_neither_counted_nor_made_again(tmp_path: Path) -> None:
    (run,) = planned("cartpole/dqn/0", 1)
    finished(run, tmp_path, [10.0])
    (other,) = planned("cartpole/dqn/0", 1, more=["--algorithm.lr=0.5"])
    with pytest.raises(OtherSettingsError, match=f"{run.name}.* remove it"):
        curves.make([other], tmp_path, 1)
    assert (tmp_path / run.name / "run.json").is_file()


def test_a_run_that_is_still_going_is_not_removed(tmp_path: Path) -> None:
    (run,) = planned("cartpole/dqn/0", 1)
    folder = RunFolder.create(run.config(tmp_path), ["millrace", "train"])
    with folder.held(), pytest.raises(RuntimeError, match="still going"):
        curves.make([run], tmp_path, 1)
    assert folder.path.is_dir()


def test_table_and_charts_tell_mean_and_spread_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    returns: dict[str, list[list[float]]] = {
        "dqn": [[0.0, 10.0], [0.0, 20.0], [0.0, 60.0]],
        "dqn + hl_gauss": [[4.0, 8.0]],
    }
    for variant, seeds in returns.items():
        for run, found in zip([r for r in planned("cartpole", 3) if r.variant == variant], seeds, strict=False):
            finished(run, tmp_path, found)
    assert curves.main(["--plot-only", "--json", "--folder", str(tmp_path), "--only", "cartpole"]) == 0
    lines: list[dict[str, Any]] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [(line["variant"], line["seeds"]) for line in lines] == [("dqn", [0, 1, 2]), ("dqn + hl_gauss", [0])]
    assert lines[0]["final_return"] == pytest.approx(30.0)
    assert lines[0]["final_return_std"] == pytest.approx(float(np.std([10.0, 20.0, 60.0])))
    assert lines[0]["mean_over_training"] == pytest.approx(15.0)
    steps = planned("cartpole", 1)[0].config(tmp_path).stop.steps
    assert lines[0]["steps"] == steps
    assert (tmp_path / "curves-cartpole.png").stat().st_size > 5_000
    assert not (tmp_path / "curves-pendulum.png").exists()
    text = (tmp_path / "curves.md").read_text()
    assert f"| cartpole | dqn | 3 | 30.0 ± 21.6 | 15.0 ± 10.8 | {steps:,} | 10 | 5 |" in text
    assert json.loads((tmp_path / "curves.json").read_text())["lines"] == lines


def test_a_mean_curve_ends_with_the_shortest_run() -> None:
    short = np.array([0.0, 10.0]), np.array([0.0, 10.0])
    long = np.array([0.0, 10.0, 20.0]), np.array([2.0, 12.0, 100.0])
    steps, mean, spread = curves.mean_curve([short, long])
    assert (steps[0], steps[-1]) == (0.0, 10.0)
    np.testing.assert_allclose(mean, steps + 1.0)
    np.testing.assert_allclose(spread, 1.0)


def test_runs_are_made_once_and_those_that_fail_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (good,) = planned("pendulum/sac/0", 1, more=TINY)
    (bad,) = planned("pendulum/sac/1", 2, more=[*TINY, "--env.id=NoSuchTask-v0"])
    (unfinished := tmp_path / good.name).mkdir()
    (unfinished / "rubbish").touch()
    failed = curves.make([bad, good], tmp_path, 2)
    assert len(failed) == 1
    assert "NoSuchTask" in failed[0]
    assert not (unfinished / "rubbish").exists()
    facts = RunFolder.open(tmp_path / good.name).facts()
    capsys.readouterr()
    assert curves.make([good], tmp_path, 2) == []
    assert "0 of 1 runs" in capsys.readouterr().err
    assert RunFolder.open(tmp_path / good.name).facts() == facts
    assert facts["summary"]["steps"] >= 160
