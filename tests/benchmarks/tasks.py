"""Does a curriculum help on the hardest of a family of tasks? Runs that draw all levels alike against runs that draw by difficulty.

Every run is a `millrace train` of configs/minigrid.yaml in mode sync with one thread, in a process of its own; `--jobs` run at a
time. Curricula differ in `curriculum.draw` alone and have the same environment steps. Runs that have finished are left as they
are, so the command can be stopped and given again. What is compared is the share of passed episodes of each level in the evaluations
of the last fifth of the steps, the hardest level being the last task of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.curriculum import CURRICULA
from configs.schema import RunConfig
from tests.benchmarks.curves import COLOURS, RESULTS, ROOT, CurveRun, OtherSettingsError, _png, _say, make, summary_of

CONFIG = ROOT / "configs" / "minigrid.yaml"
BASE = "uniform"  # the curriculum that others are compared with
GRID = 200  # points of a mean curve
END = 0.8  # of the steps: evaluations from there on are the end of a run


@dataclass(frozen=True)
class CurriculumRun(CurveRun):
    """One run: `variant` is its curriculum."""

    def words(self, folder: Path) -> list[str]:
        """What follows `millrace train`."""
        return [
            str(CONFIG),
            "--mode=sync",
            "--learners.threads=1",
            "--learners.device=cpu",
            "--actors.threads=1",
            "--checkpoints.keep=1",
            "--checkpoints.replay=false",
            f"--root={folder}",
            f"--name={self.name}",
            f"--seed={self.seed}",
            f"--curriculum.draw={self.variant}",
            *self.settings,
        ]


def planned(curricula: Sequence[str], seeds: Sequence[int], more: Sequence[str] = ()) -> list[CurriculumRun]:
    """The runs, seed by seed; `more` are settings laid over those of every run."""
    return [CurriculumRun("minigrid", curriculum, tuple(more), seed) for seed in seeds for curriculum in curricula]


def level_names(config: RunConfig) -> list[str]:
    """Names of the run's tasks, in the order of the file: the easiest first."""
    from actors.env_tasks import make_env_tasks

    return [task.name for task in make_env_tasks(config.tasks, config.env)]


def successes(run_folder: Path, levels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps of a run's evaluations, (evaluations,), and the share of passed episodes, (evaluations, levels).

    Raises:
        ValueError: the run has no evaluation of every level.
    """
    from cluster.charts import Curves

    curves = Curves.read(run_folder)
    columns = [f"eval/task/{level}/success" for level in levels]
    if missing := [name for name in columns if not curves.has(name)]:
        raise ValueError(f"{run_folder} has no {missing[0]}; expected an evaluation of every level, so see eval.every")
    values = np.stack([curves.get(name) for name in columns], axis=1)
    steps = curves.get("eval/step")
    there = np.isfinite(values).all(axis=1) & np.isfinite(steps)
    return steps[there], values[there]


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over seeds of values (seeds, …); the error of a single seed is NaN."""
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, values.std(axis=0, ddof=1) / np.sqrt(len(values))


@dataclass(frozen=True)
class Finished:
    """What came of a run that has finished."""

    run: CurriculumRun
    levels: list[str]
    steps: np.ndarray  # (evaluations,)
    success: np.ndarray  # (evaluations, levels)
    summary: dict[str, Any]

    @property
    def end(self) -> np.ndarray:
        """Success by level, (levels,), in the mean over the evaluations of the end."""
        found: np.ndarray = self.success[self.steps >= END * self.steps[-1]].mean(axis=0)
        return found

    def line(self) -> dict[str, Any]:
        """The run as a JSON object."""
        return {
            "curriculum": self.run.variant,
            "seed": self.run.seed,
            "settings": list(self.run.settings),
            "levels": self.levels,
            "steps": self.steps.tolist(),
            "success": np.round(self.success, 4).tolist(),
            "end": dict(zip(self.levels, np.round(self.end, 4).tolist(), strict=True)),
            "last_evaluation": dict(zip(self.levels, np.round(self.success[-1], 4).tolist(), strict=True)),
            **{name: self.summary.get(name) for name in ("updates", "time_s", "commit", "machine")},
        }


def finished_runs(runs: Sequence[CurriculumRun], folder: Path) -> list[Finished]:
    """The runs that have finished, with their evaluations.

    Raises:
        OtherSettingsError: a run with other settings has ended in the folder of one.
    """
    found = []
    for run in runs:
        if (summary := summary_of(run, folder)) is not None:
            levels = level_names(run.config(folder))
            found.append(Finished(run, levels, *successes(folder / run.name, levels), summary))
    return found


def table(found: Sequence[Finished]) -> list[dict[str, Any]]:
    """A line for each curriculum: success on the hardest level and over all, mean and standard error over its seeds.

    The lead over uniform drawing is of the seeds that both have.
    """
    base = {one.run.seed: one.end[-1] for one in found if one.run.variant == BASE}
    lines = []
    for curriculum in dict.fromkeys(one.run.variant for one in found):
        mine = [one for one in found if one.run.variant == curriculum]
        last = np.stack([one.end for one in mine])  # (seeds, levels)
        by_level, by_level_error = mean_and_error(last)
        over = np.array([one.end[-1] - base[one.run.seed] for one in mine if one.run.seed in base])
        lead, lead_error = mean_and_error(over) if len(over) else (np.nan, np.nan)
        throughout, _ = mean_and_error(np.array([one.success[:, -1].mean() for one in mine]))
        lines.append(
            {
                "curriculum": curriculum,
                "seeds": [one.run.seed for one in mine],
                "levels": mine[0].levels,
                "hardest": float(by_level[-1]),
                "hardest_error": _number(by_level_error[-1]),
                "hardest_of_seeds": last[:, -1].tolist(),
                "hardest_last_evaluation": float(np.mean([one.success[-1, -1] for one in mine])),
                "over_uniform": _number(lead),
                "over_uniform_error": _number(lead_error),
                "hardest_over_training": float(throughout),
                "all_levels": float(by_level.mean()),
                "by_level": by_level.tolist(),
                "by_level_error": [_number(value) for value in by_level_error],
                "steps": max(int(one.summary["steps"]) for one in mine),
                "updates": max(int(one.summary["updates"]) for one in mine),
                "wall_s": float(np.mean([one.summary["time_s"] for one in mine])),
                "commits": sorted({str(one.summary["commit"]) for one in mine}),
            }
        )
    return lines


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table as people read it."""

    def cell(mean: float | None, error: float | None) -> str:
        if mean is None:
            return "–"
        return f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")

    rows = [
        "| curriculum | seeds | hardest level | over uniform | hardest, mean over training | all levels | steps | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        rows.append(
            f"| {line['curriculum']} | {len(line['seeds'])} | {cell(line['hardest'], line['hardest_error'])} | "
            f"{cell(line['over_uniform'], line['over_uniform_error'])} | {line['hardest_over_training']:.2f} | "
            f"{line['all_levels']:.2f} | {line['steps']:,} | {line['wall_s']:.0f} |"
        )
    return "\n".join(rows) + "\n"


def draw(found: Sequence[Finished], out: Path) -> Iterator[Path]:
    """Two PNGs, mean and standard error of every curriculum: the hardest level over steps, and all levels at the end."""
    from cluster.charts import Chart, Series

    over_steps, by_level = [], []
    curricula = dict.fromkeys(one.run.variant for one in found)
    for curriculum, colour in zip(curricula, COLOURS, strict=False):
        mine = [one for one in found if one.run.variant == curriculum]
        grid = np.linspace(max(one.steps[0] for one in mine), min(one.steps[-1] for one in mine), GRID)
        mean, error = mean_and_error(np.stack([np.interp(grid, one.steps, one.success[:, -1]) for one in mine]))
        over_steps.append(Series(curriculum, grid, mean, colour, np.nan_to_num(error), thin=False))
        mean, error = mean_and_error(np.stack([one.end for one in mine]))
        numbers = np.arange(1.0, len(mean) + 1)
        by_level.append(Series(curriculum, numbers, mean, colour, np.nan_to_num(error), markers=True, thin=False))
    seeds = max(sum(one.run.variant == curriculum for one in found) for curriculum in curricula)
    levels = found[0].levels
    measure = f"share of episodes passed, mean ± standard error over {seeds} seeds"
    charts = {
        "hardest": Chart(
            f"Success on the hardest level, {levels[-1]}", "environment steps", measure, over_steps, from_zero=True
        ),
        "levels": Chart(
            "Success by level at the end",
            f"level, from {levels[0]} to {levels[-1]}",
            measure,
            by_level,
            from_zero=True,
        ),
    }
    for name, chart in charts.items():
        yield _png(chart, chart.title, out / f"tasks-{name}.png")


def main(words: Sequence[str]) -> int:
    """`millrace bench tasks`; its exit code."""
    parser = argparse.ArgumentParser(prog="millrace bench tasks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--curricula", nargs="+", choices=CURRICULA, default=[BASE, "band"], help="to compare (default uniform band)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each curriculum (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="first of the seeds (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/tasks"), help="of the runs (default runs/tasks)")
    parser.add_argument("--plot-only", action="store_true", help="make no run; tell of those that are there")
    parser.add_argument("--json", action="store_true", help="one JSON object per curriculum")
    parser.add_argument("--save", action="store_true", help="put results and charts into tests/benchmarks/results/")
    chosen, more = parser.parse_known_args(words)
    if min(chosen.seeds, chosen.jobs) < 1 or chosen.first_seed < 0:
        parser.error("--seeds and --jobs must be positive, and --first-seed 0 or more")
    runs = planned(chosen.curricula, range(chosen.first_seed, chosen.first_seed + chosen.seeds), more)
    folder = chosen.folder.resolve()
    try:
        failed = [] if chosen.plot_only else make(runs, folder, chosen.jobs)
        found = finished_runs(runs, folder)
    except (OtherSettingsError, ValueError, RuntimeError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    except KeyboardInterrupt:
        print("millrace: interrupted; give the command again to go on", file=sys.stderr)
        return 130
    lines = table(found)
    if found:
        out = RESULTS if chosen.save else folder
        out.mkdir(parents=True, exist_ok=True)
        (out / "tasks.jsonl").write_text("".join(json.dumps(one.line()) + "\n" for one in found))
        (out / "tasks.md").write_text(markdown(lines))
        for path in draw(found, out):
            _say(f"drawn: {path}")
    if chosen.json:
        for line in lines:
            print(json.dumps(line))
    else:
        print(markdown(lines), end="")
    for line_failed in failed:
        print(f"millrace: failed: {line_failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
