"""Do the parts learn? Runs of every variant on every task, over several seeds with one budget, and what came of them.

Each run is a `millrace train` in mode sync with one thread, in a process of its own; `--jobs` run at a time. Runs that have
finished are left as they are, so the command can be stopped and given again. Budgets and settings are those of the tasks'
files in configs/curves, the same for every variant of a task; a variant is named by the settings that it adds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from configs.load import load_config
from configs.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
POLL_S = 0.5
GRID = 200  # points of a mean curve

CONTINUOUS: dict[str, tuple[str, ...]] = {
    "sac": (),
    "sac + hl_gauss": ("--algorithm.head.kind=hl_gauss",),
    "sac + chain of 4": ("--algorithm.chain.length=4",),
    "sac + dqc 5 to 1": (
        "--algorithm.target.kind=decoupled",
        "--algorithm.target.length=5",
        "--algorithm.chunk=1",
        "--algorithm.target.distill_expectile=0.7",
    ),
}
DISCRETE: dict[str, tuple[str, ...]] = {
    "dqn": (),
    "dqn + hl_gauss": ("--algorithm.head.kind=hl_gauss",),
    "iterated dqn, 4": ("--algorithm.chain.length=4",),
}
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "pendulum": CONTINUOUS,
    "ball_in_cup": CONTINUOUS,
    "cartpole": DISCRETE,
    "lunar_lander": DISCRETE,
}
COLOURS = ("blue", "orange", "green", "purple")  # of cluster.charts, in the variants' order


class OtherSettingsError(ValueError):
    """A folder holds a run with other settings than the one that is wanted there."""


@dataclass(frozen=True)
class CurveRun:
    """One run: a task, a variant and a seed."""

    task: str
    variant: str
    settings: tuple[str, ...]
    seed: int

    @property
    def label(self) -> str:
        return f"{self.task}/{self.variant}/{self.seed}"

    @property
    def name(self) -> str:
        """Of its folder: letters, digits and dashes."""
        words = "".join(c if c.isalnum() or c == "_" else " " for c in self.variant).split()
        return "-".join([self.task, *words, str(self.seed)])

    def words(self, folder: Path) -> list[str]:
        """What follows `millrace train`."""
        return [
            str(ROOT / "configs" / "curves" / f"{self.task}.yaml"),
            "--mode=sync",
            "--learners.threads=1",
            "--learners.device=cpu",
            "--checkpoints.keep=1",
            "--checkpoints.replay=false",
            f"--root={folder}",
            f"--name={self.name}",
            f"--seed={self.seed}",
            *self.settings,
        ]

    def config(self, folder: Path) -> RunConfig:
        path, *flags = self.words(folder)
        return load_config(path, flags)


def planned(pattern: str, seeds: int, *, more: Sequence[str] = ()) -> list[CurveRun]:
    """The runs whose label has `pattern`, seed by seed, so that what is stopped early has the first seeds of everything.

    more: settings laid over those of every run.
    """
    runs = [
        CurveRun(task, variant, (*settings, *more), seed)
        for seed in range(seeds)
        for task, variants in TASKS.items()
        for variant, settings in variants.items()
    ]
    return [run for run in runs if fnmatch(run.label, f"*{pattern}*")]


# ----------------------------------------------------------------------------------------------------- running


def summary_of(run: CurveRun, folder: Path) -> dict[str, Any] | None:
    """How the run ended; None where it has not finished.

    Raises:
        OtherSettingsError: a run with other settings has ended in its folder.
    """
    from cluster.runs import RunFolder

    path = folder / run.name
    if not (path / "run.json").is_file():
        return None
    wanted = run.config(folder)
    facts = RunFolder(path, wanted).facts()
    summary: dict[str, Any] | None = facts.get("summary")
    if summary is None:
        return None  # killed
    try:
        same = RunFolder.open(path).config == wanted
    except ValueError:
        same = False
    if not same:
        raise OtherSettingsError(
            f"{path} holds a run with other settings than {run.label} has now; remove it, or choose another --folder"
        )
    if summary["steps"] < (wanted.stop.steps or 0):
        return None  # stopped early
    return {**summary, "commit": facts["commit"], "machine": facts["machine"]}


def make(runs: Sequence[CurveRun], folder: Path, jobs: int) -> list[str]:
    """Make the runs that have not finished, `jobs` at a time. Returns a line for each that failed.

    Raises:
        OtherSettingsError: a folder holds a run with other settings.
        RuntimeError: another process is making one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if summary_of(run, folder) is None]
    _say(f"{len(left)} of {len(runs)} runs are to be made in {folder}")
    failed: list[str] = []
    going: dict[subprocess.Popen[bytes], tuple[CurveRun, float]] = {}
    with ExitStack() as stack:
        stack.callback(_end, going)
        while left or going:
            while left and len(going) < jobs:
                run = left.pop(0)
                _remove_unfinished(run, folder)
                going[_start(run, folder)] = (run, time.monotonic())
            time.sleep(POLL_S)
            for process in [process for process in going if process.poll() is not None]:
                run, began = going.pop(process)
                took = f"{time.monotonic() - began:.0f} s; {len(left) + len(going)} to go"
                if process.returncode == 0 and (summary := summary_of(run, folder)) is not None:
                    _say(f"{run.label}: mean return {summary['mean_return']:.1f} in {took}")
                else:
                    log = folder / f"{run.name}.log"
                    lines = log.read_text(errors="replace").strip().splitlines()
                    failed.append(f"{run.label}: {lines[-1] if lines else f'exit status {process.returncode}'} ({log})")
                    _say(f"failed: {failed[-1]}; {took}")
    return failed


def _start(run: CurveRun, folder: Path) -> subprocess.Popen[bytes]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with (folder / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "cluster.cli", "train", *run.words(folder), "--json"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _remove_unfinished(run: CurveRun, folder: Path) -> None:
    """Remove what a run that was stopped left, so that it can begin again; RuntimeError where it is still going."""
    from cluster.runs import RunFolder

    path = folder / run.name
    if path.is_dir():
        with RunFolder(path, run.config(folder)).held():
            shutil.rmtree(path)


def _end(going: dict[subprocess.Popen[bytes], tuple[CurveRun, float]]) -> None:
    """End the processes that were started and have not ended, and wait for them."""
    for process in going:
        process.terminate()
    for process in going:
        process.wait()


# ----------------------------------------------------------------------------------------------------- telling


def table(runs: Sequence[CurveRun], folder: Path) -> list[dict[str, Any]]:
    """A line for each task and variant of which a run has finished.

    `final_return` is the last evaluation's mean return, `mean_over_training` the mean over all evaluations of a run; each with
    its mean and its standard deviation over seeds (population).
    """
    found = []
    for task, variant in dict.fromkeys((run.task, run.variant) for run in runs):
        mine = [run for run in runs if (run.task, run.variant) == (task, variant)]
        finished = [(run, summary) for run in mine if (summary := summary_of(run, folder)) is not None]
        if not finished:
            continue
        final = np.array([summary["mean_return"] for _, summary in finished])
        whole = np.array([evaluations(folder / run.name)[1].mean() for run, _ in finished])
        found.append(
            {
                "task": task,
                "variant": variant,
                "settings": list(finished[0][0].settings),
                "seeds": [run.seed for run, _ in finished],
                "final_return": float(final.mean()),
                "final_return_std": float(final.std()),
                "final_returns": final.tolist(),
                "mean_over_training": float(whole.mean()),
                "mean_over_training_std": float(whole.std()),
                "steps": max(summary["steps"] for _, summary in finished),
                "updates": max(summary["updates"] for _, summary in finished),
                "wall_s": float(np.mean([summary["time_s"] for _, summary in finished])),
                "commits": sorted({str(summary["commit"]) for _, summary in finished}),
            }
        )
    return found


def evaluations(run_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps of a run's evaluations, and their mean returns; each (evaluations,)."""
    from cluster.charts import Curves

    steps, mean, _ = Curves.read(run_folder).evaluations("env_steps")
    return steps, mean


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table for a page."""
    rows = [
        "| task | variant | seeds | final return | mean over training | steps | updates | wall s |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        final = f"{line['final_return']:.1f} ± {line['final_return_std']:.1f}"
        whole = f"{line['mean_over_training']:.1f} ± {line['mean_over_training_std']:.1f}"
        counts = f"{line['steps']:,} | {line['updates']:,} | {line['wall_s']:.0f}"
        rows.append(f"| {line['task']} | {line['variant']} | {len(line['seeds'])} | {final} | {whole} | {counts} |")
    return "\n".join(rows) + "\n"


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and standard deviation, each (points,), of (steps, returns) as far as the shortest goes, interpolated."""
    start, end = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    grid = np.linspace(start, end, GRID)
    returns = np.stack([np.interp(grid, steps, mean) for steps, mean in curves])  # (seeds, points)
    return grid, returns.mean(axis=0), returns.std(axis=0)


def draw(runs: Sequence[CurveRun], folder: Path, out: Path) -> Iterator[Path]:
    """A PNG for each task of which a run has finished: a mean curve for each variant, and its spread over seeds."""
    from cluster.charts import Chart, Series

    for task in dict.fromkeys(run.task for run in runs):
        series, most = [], 0
        for variant, colour in zip(TASKS[task], COLOURS, strict=False):
            mine = [run for run in runs if (run.task, run.variant) == (task, variant)]
            finished = [run for run in mine if summary_of(run, folder) is not None]
            if finished:
                most = max(most, len(finished))
                steps, mean, spread = mean_curve([evaluations(folder / run.name) for run in finished])
                series.append(Series(variant, steps, mean, colour, spread, thin=False))
        if series:
            title = f"{load_config(ROOT / 'configs' / 'curves' / f'{task}.yaml').env.id}, mean ± std over {most} seeds"
            chart = Chart(title, "environment steps", "evaluation return per episode", series)
            yield _png(chart, title, out / f"curves-{task}.png")


def _png(chart: Any, title: str, path: Path) -> Path:
    import matplotlib

    from cluster import charts

    figure = charts._figure((7.0, 4.0))
    with matplotlib.rc_context({"font.sans-serif": charts._FONT}):
        charts._draw(figure, chart, heading=title)
        figure.savefig(path, format="png", dpi=160, facecolor="white")
    return path


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """`millrace bench curves`; its exit code."""
    parser = argparse.ArgumentParser(prog="millrace bench curves", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="runs whose task/variant/seed has this part or pattern: pendulum/*chain"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each variant (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="of the runs (default runs/curves)")
    parser.add_argument("--plot-only", action="store_true", help="make no run; tell of those that are there")
    parser.add_argument("--json", action="store_true", help="one JSON object per task and variant")
    parser.add_argument("--save", action="store_true", help="put table and charts into tests/benchmarks/results/")
    chosen = parser.parse_args(words)
    if min(chosen.seeds, chosen.jobs) < 1:
        parser.error("--seeds and --jobs must be positive")
    runs, folder = planned(chosen.only, chosen.seeds), chosen.folder.resolve()
    if not runs:
        labels = ", ".join(run.label for run in planned("", 1))
        parser.error(f"--only {chosen.only}: no such run; there are {labels}, and the other seeds")
    try:
        failed = [] if chosen.plot_only else make(runs, folder, chosen.jobs)
        lines = table(runs, folder)
    except (OtherSettingsError, RuntimeError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 2 if isinstance(error, OtherSettingsError) else 1
    except KeyboardInterrupt:
        print("millrace: interrupted; give the command again to go on", file=sys.stderr)
        return 130
    if lines:
        out = RESULTS if chosen.save else folder
        out.mkdir(parents=True, exist_ok=True)
        (out / "curves.json").write_text(json.dumps({"lines": lines, "runs": [asdict(run) for run in runs]}, indent=1))
        (out / "curves.md").write_text(markdown(lines))
        for path in draw(runs, folder, out):
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
