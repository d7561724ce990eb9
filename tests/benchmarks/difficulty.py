"""What drawing and filtering by difficulty give, and how losses take stale data: language-model runs against each other.

Every run is a `millrace train countdown` in mode sync with one thread, in a process of its own; `--jobs` run at a time. Arms of one
seed begin with the same warm start. Compared is pass@1 on the held-out prompts of 2 and 3 numbers: at equal learner steps (the
last all arms have made) and at equal completions sampled (as many as the arm with fewest has sampled).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.curves import COLOURS, POLL_S, RESULTS, ROOT, _end, _png, _say, _start

DIFFICULTY: dict[str, tuple[str, ...]] = {
    "uniform": ("--curriculum.draw=uniform", "--curriculum.filter=none"),
    "uniform + band": ("--curriculum.draw=uniform", "--curriculum.filter=band"),
    "drawn": ("--curriculum.draw=band", "--curriculum.sharpness=2.0", "--curriculum.filter=none"),
    "drawn + band": ("--curriculum.draw=band", "--curriculum.sharpness=2.0", "--curriculum.filter=band"),
}
STALE = ("--actors.hold_back=8", "--learners.minibatches=4", "--curriculum.filter=none", "--learners.publish_every=1")
STALENESS: dict[str, tuple[str, ...]] = {
    "clip, lag 8": (*STALE, "--algorithm.loss=clip"),
    "reinforce, lag 8": (*STALE, "--algorithm.loss=reinforce"),
    "truncated, lag 8": (*STALE, "--algorithm.loss=truncated"),
    "decoupled, lag 8": (*STALE, "--algorithm.loss=decoupled"),
}
SUBJECTS = {"difficulty": DIFFICULTY, "staleness": STALENESS}


@dataclass(frozen=True)
class ArmRun:
    """One run: an arm of a subject, and a seed."""

    subject: str
    arm: str
    seed: int
    updates: int
    more: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder: letters, digits and dashes; the last of them follow from the settings, so that others are other runs."""
        words = "".join(c if c.isalnum() else " " for c in self.arm).split()
        settings = json.dumps([self.updates, SUBJECTS[self.subject][self.arm], self.more])
        return "-".join([self.subject, *words, str(self.seed), hashlib.sha1(settings.encode()).hexdigest()[:6]])

    def words(self, folder: Path) -> list[str]:
        """What follows `millrace train`."""
        return [
            str(ROOT / "configs" / "countdown.yaml"),
            "--mode=sync",
            "--learners.threads=1",
            f"--eval.every={max(1, self.updates // 8)}",
            "--checkpoints.replay=false",
            "--checkpoints.keep=1",
            f"--stop.updates={self.updates}",
            f"--root={folder}",
            f"--name={self.name}",
            f"--seed={self.seed}",
            *SUBJECTS[self.subject][self.arm],
            *self.more,
        ]


def finished(run: ArmRun, folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended, None of any other."""
    file = folder / run.name / "run.json"
    found: dict[str, Any] | None = json.loads(file.read_text()).get("summary") if file.is_file() else None
    return found if found is not None and found["updates"] >= run.updates else None


def make(runs: Sequence[ArmRun], folder: Path, jobs: int) -> list[str]:
    """Make the runs that have not finished, `jobs` at a time. Returns a line for each that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [run for run in runs if finished(run, folder) is None]
    _say(f"{len(left)} of {len(runs)} runs are to be made in {folder}")
    going: dict[Any, Any] = {}
    failed = []
    try:
        while left or going:
            while left and len(going) < jobs:
                run = left.pop(0)
                shutil.rmtree(folder / run.name, ignore_errors=True)
                going[_start(run, folder)] = (run, time.monotonic())  # type: ignore[arg-type]
            time.sleep(POLL_S)
            for process in [process for process in going if process.poll() is not None]:
                run, began = going.pop(process)
                summary = finished(run, folder)
                if summary is None:
                    failed.append(f"{run.name}: exit status {process.returncode} ({folder / run.name}.log)")
                    _say(f"failed: {failed[-1]}")
                else:
                    _say(f"{run.name}: pass@1 {summary['pass_at_1']:.3f} in {time.monotonic() - began:.0f} s")
    finally:
        _end(going)
    return failed


def curve(run: ArmRun, folder: Path) -> dict[str, np.ndarray]:
    """Evaluations of a run: learner steps, completions sampled before each, seconds, pass@1, greedy, and pass@1 of the prompts of
    4 and 5 numbers; each (evaluations,)."""
    from cluster.charts import Curves

    curves = Curves.read(folder / run.name)
    there = np.isfinite(curves.get("eval/pass_at_1"))
    names = {
        "step": "eval/step",
        "samples": "samples",
        "time_s": "time_s",
        "pass@1": "eval/pass_at_1",
        "greedy": "eval/greedy",
    }
    found = {name: curves.get(column)[there] for name, column in names.items()}
    apart = [curves.get(f"eval/{size} numbers/pass_at_1")[there] for size in (4, 5)]
    return {**found, "apart": np.mean(apart, axis=0)}


def table(runs: Sequence[ArmRun], folder: Path) -> list[dict[str, Any]]:
    """A line for each arm: pass@1 at equal learner steps and at equal completions, over the seeds that all arms have."""
    done = [run for run in runs if finished(run, folder) is not None]
    arms = list(dict.fromkeys(run.arm for run in done))
    seeds = [
        seed
        for seed in sorted({run.seed for run in done})
        if all((a, seed) in {(r.arm, r.seed) for r in done} for a in arms)
    ]
    found = {(run.arm, run.seed): curve(run, folder) for run in done if run.seed in seeds}
    lines = []
    # Each seed by itself: as many completions as the arm that sampled fewest with that seed, and as many steps as all have made.
    least = [min(found[other, seed]["samples"][-1] for other in arms) for seed in seeds]
    steps = [min(found[other, seed]["step"][-1] for other in arms) for seed in seeds]

    def values(arm: str, axis: str, ends: Sequence[float]) -> np.ndarray:
        return np.array(
            [np.interp(end, found[arm, s][axis], found[arm, s]["pass@1"]) for end, s in zip(ends, seeds, strict=True)]
        )

    for arm in arms:
        mine = [found[arm, seed] for seed in seeds]
        at_samples, at_steps = values(arm, "samples", least), values(arm, "step", steps)
        over_samples, over_steps = (
            at_samples - values(arms[0], "samples", least),
            at_steps - values(arms[0], "step", steps),
        )
        waste = [float(_last(folder / run.name, "waste/share")) for run in done if run.arm == arm and run.seed in seeds]
        lines.append(
            {
                "arm": arm,
                "seeds": seeds,
                "updates": int(min(c["step"][-1] for c in mine)),
                "pass_at_1_before": float(np.mean([c["pass@1"][0] for c in mine])),
                "pass_at_1_at_equal_steps": float(at_steps.mean()),
                "error_at_equal_steps": _error(at_steps),
                "over_first_arm_at_equal_steps": float(over_steps.mean()),
                "error_over_first_arm_at_equal_steps": _error(over_steps),
                "over_first_arm_at_equal_completions": float(over_samples.mean()),
                "error_over_first_arm_at_equal_completions": _error(over_samples),
                "pass_at_1_of_4_and_5_numbers": float(np.mean([c["apart"][-1] for c in mine])),
                "greedy_at_equal_steps": float(np.mean([c["greedy"][-1] for c in mine])),
                "completions_compared": float(np.mean(least)),
                "pass_at_1_at_equal_completions": float(at_samples.mean()),
                "error_at_equal_completions": _error(at_samples),
                "completions": float(np.mean([c["samples"][-1] for c in mine])),
                "seconds": float(np.mean([c["time_s"][-1] for c in mine])),
                "waste": float(np.mean(waste)),
            }
        )
    return lines


def _error(values: np.ndarray) -> float | None:
    """Standard error of the mean over seeds."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _last(folder: Path, name: str) -> float:
    from cluster.charts import Curves

    return Curves.read(folder).last(name) or 0.0


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table as people read it."""

    def cell(mean: float, error: float | None) -> str:
        return f"{mean:.3f}" + (f" ± {error:.3f}" if error is not None else "")

    text = "| arm | pass@1 before | at equal steps | over the first arm | at equal completions | over the first arm "
    text += "| 4 and 5 numbers | completions | tokens wasted | seconds |\n"
    text += "|---|---|---|---|---|---|---|---|---|---|\n"
    for line in lines:
        steps = cell(line["pass_at_1_at_equal_steps"], line["error_at_equal_steps"])
        samples = cell(line["pass_at_1_at_equal_completions"], line["error_at_equal_completions"])
        over_steps = cell(line["over_first_arm_at_equal_steps"], line["error_over_first_arm_at_equal_steps"])
        over_samples = cell(
            line["over_first_arm_at_equal_completions"], line["error_over_first_arm_at_equal_completions"]
        )
        text += (
            f"| {line['arm']} | {line['pass_at_1_before']:.3f} | {steps} | {over_steps} | {samples} | {over_samples} | "
            f"{line['pass_at_1_of_4_and_5_numbers']:.3f} | {line['completions']:,.0f} | "
            f"{100 * line['waste']:.0f} % | {line['seconds']:.0f} |\n"
        )
    return text


def draw(subject: str, runs: Sequence[ArmRun], folder: Path, out: Path) -> list[Path]:
    """A PNG for each axis: learner steps, completions sampled, seconds."""
    from cluster.charts import Chart, Series
    from tests.benchmarks.curves import mean_curve

    paths = []
    for axis, label in (("step", "learner steps"), ("samples", "completions sampled"), ("time_s", "seconds, one core")):
        series = []
        for arm, colour in zip(SUBJECTS[subject], COLOURS, strict=False):
            mine = [curve(run, folder) for run in runs if run.arm == arm and finished(run, folder) is not None]
            if mine:
                x, mean, spread = mean_curve([(c[axis], c["pass@1"]) for c in mine])
                series.append(Series(arm, x, mean, colour, spread, thin=False))
        if series:
            chart = Chart(
                "pass@1 on held-out countdown prompts of 2 and 3 numbers", label, "pass@1", series, from_zero=True
            )
            paths.append(_png(chart, chart.title, out / f"{subject}-{axis.replace('_s', '')}.png"))
    return paths


def main(words: Sequence[str]) -> int:
    """`millrace bench difficulty`; its exit code."""
    parser = argparse.ArgumentParser(prog="millrace bench difficulty", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--subject", choices=tuple(SUBJECTS), default="difficulty", help="arms to compare (default difficulty)"
    )
    parser.add_argument("--only", nargs="*", default=["*"], help="arms, by names or patterns (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm (default 3)")
    parser.add_argument("--updates", type=int, default=200, help="learner steps of each run (default 200)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (default 2)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/difficulty"), help="of the runs (default runs/difficulty)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per arm")
    parser.add_argument("--save", action="store_true", help="put table and charts into tests/benchmarks/results/")
    chosen, more = parser.parse_known_args(words)
    if min(chosen.seeds, chosen.jobs, chosen.updates) < 1:
        parser.error("--seeds, --jobs and --updates must be positive")
    arms = [arm for arm in SUBJECTS[chosen.subject] if any(fnmatch(arm, only) for only in chosen.only)]
    runs = [
        ArmRun(chosen.subject, arm, seed, chosen.updates, tuple(more)) for seed in range(chosen.seeds) for arm in arms
    ]
    folder = chosen.folder.resolve()
    try:
        failed = make(runs, folder, chosen.jobs)
    except KeyboardInterrupt:
        print("millrace: interrupted; give the command again to go on", file=sys.stderr)
        return 130
    lines = table(runs, folder)
    out = RESULTS if chosen.save else folder
    (out / f"{chosen.subject}.json").write_text(json.dumps({"lines": lines, "settings": more}, indent=1) + "\n")
    (out / f"{chosen.subject}.md").write_text(markdown(lines))
    for path in draw(chosen.subject, runs, folder, out):
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
