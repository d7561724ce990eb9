"""What the tracker knows, and what drawing by it saves, in a population of tasks whose truth is known.

`millrace bench curriculum [--tasks 10000] [--groups 200000] [--seeds 3] [--json] [--save]`
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.curriculum.band import band_probability
from cluster.curriculum.drawing import make_drawing
from cluster.curriculum.tracker import Tracker
from configs.curriculum import CURRICULA, CurriculumSettings, pass_counts

RESULTS = Path(__file__).with_name("results") / "curriculum.json"
SETTINGS = CurriculumSettings()
GROUP_SIZE = 8
LOW, HIGH = pass_counts(SETTINGS.low, SETTINGS.high, GROUP_SIZE)
DRIFT = 0.1  # of a logit over 1 000 groups; the settings were chosen at this one
OTHER_DRIFTS = (0.03, 0.3, 1.0)
SHARPNESSES = (1.0, 2.0, 3.0, 4.0, 6.0)
STEP_GROUPS = 50  # groups drawn at once, as for one learner step
DRIFT_GROUPS = 1_000  # the pass rates move once in so many groups
LOOK_GROUPS = 10_000  # figures are taken once in so many
SPACING, REACH = 0.1, 15.0  # of the exact filter's grid of logits
SURE = 1e9  # alpha + beta of a rate that is known
STAGES = 4  # of the staged curriculum, by the rates at the start


class Population:
    """Tasks whose pass rates start as Beta(½, ½); their logits walk at random by `drift` for every 1 000 groups."""

    def __init__(self, tasks: int, *, drift: float, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        rates = np.clip(self._generator.beta(0.5, 0.5, tasks), 1e-6, 1.0 - 1e-6)
        self._logits = np.log(rates / (1.0 - rates))
        self._drift = drift

    @property
    def rates(self) -> np.ndarray:
        """True pass rates, float64 (tasks,)."""
        rates: np.ndarray = 1.0 / (1.0 + np.exp(-self._logits))
        return rates

    def in_band(self) -> np.ndarray:
        """True probability that a group of each task is kept, float64 (tasks,)."""
        rates = np.clip(self.rates, 1e-9, 1.0 - 1e-9)
        return band_probability(SURE * rates, SURE * (1.0 - rates), size=GROUP_SIZE, low=LOW, high=HIGH)

    def passes(self, tasks: np.ndarray) -> np.ndarray:
        """Passes of one group of each of `tasks`."""
        passes: np.ndarray = self._generator.binomial(GROUP_SIZE, self.rates[tasks])
        return passes

    def move(self) -> None:
        """The walk of 1 000 groups."""
        self._logits += self._drift * self._generator.standard_normal(len(self._logits))


class ExactFilter:
    """Bayes' rule on a grid of logits, which knows the prior and the drift: no tracker predicts better."""

    def __init__(self, tasks: int, *, drift: float, moves: int) -> None:
        reach = REACH + 3.0 * drift * moves**0.5  # where the walks end
        spacing = max(SPACING, drift / 5.0)
        points = round(2 * reach / spacing) + 1
        logits = np.linspace(-reach, reach, points)
        self._rates = 1.0 / (1.0 + np.exp(-logits))
        # Beta(½, ½) in logits: its density times the derivative p(1 − p).
        prior = np.sqrt(self._rates * (1.0 - self._rates))
        self._beliefs = np.tile((prior / prior.sum()).astype(np.float32), (tasks, 1))
        steps = np.abs(np.subtract.outer(np.arange(points), np.arange(points))) * spacing
        if drift < 0.7 * spacing:  # too narrow for the grid: three points of the same variance
            side = 0.5 * (drift / spacing) ** 2
            kernel = np.select([steps < 0.5 * spacing, steps < 1.5 * spacing], [1.0 - 2.0 * side, side], 0.0)
        else:
            kernel = np.exp(-0.5 * (steps / drift) ** 2)
        self._kernel = (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)

    def record(self, tasks: np.ndarray, passes: np.ndarray) -> None:
        """Distinct tasks."""
        likelihood = self._rates ** passes[:, None] * (1.0 - self._rates) ** (GROUP_SIZE - passes)[:, None]
        beliefs = self._beliefs[tasks] * likelihood
        self._beliefs[tasks] = beliefs / beliefs.sum(axis=1, keepdims=True)

    def move(self) -> None:
        """The drift of 1 000 groups."""
        self._beliefs = np.matmul(self._beliefs, self._kernel)

    def predictions(self) -> np.ndarray:
        """Expected pass rates, float64 (tasks,)."""
        means: np.ndarray = self._beliefs @ self._rates
        return means


def simulate(
    draw: str,
    *,
    tasks: int = 10_000,
    groups: int = 200_000,
    drift: float = DRIFT,
    exact: bool = True,
    seed: int = 0,
    **settings: Any,
) -> dict[str, float]:
    """One run of drawing, sampling, filtering and recording.

    All but `waste` is the mean of looks every 10 000 groups, the first tenth of the run left out. Brier scores are expected
    ones, over all tasks alike: the mean of (prediction − rate)² + rate (1 − rate). A task is learnable if the true
    probability that its group is kept is ½ or more. The value loss of a task is taken to be its return's standard deviation.

    Args:
        draw: the curriculum.
        drift: standard deviation of a logit's walk over 1 000 groups.
        exact: run the exact filter beside the tracker.
        settings: of the curriculum, others than the defaults.

    Returns:
        waste: share of the sampled groups outside the band;
        brier, brier_exact, brier_rates: of the tracker, of the exact filter, and of the true rates, which nothing goes below;
        effective_share: of the groups kept between two looks, 1 / Σ (a task's share)², over the number of learnable tasks;
        covered_share: learnable tasks of which a group was kept between the two latest looks, over their number;
        learnable_age: groups since a learnable task was last drawn, the median;
        learnable_error: root of the mean of (prediction − rate)² over learnable tasks.
    """
    chosen = CurriculumSettings(draw=draw, **settings)
    population = Population(tasks, drift=drift, seed=seed + 1)
    tracker = Tracker(np.zeros(tasks, np.int64), discount=chosen.discount)
    stages = np.argsort(np.argsort(-population.rates)) * STAGES // tasks
    drawing = make_drawing(
        chosen, tracker, group_size=GROUP_SIZE, seed=seed, stages=stages if draw == "staged" else None
    )
    best = ExactFilter(tasks, drift=drift, moves=groups // DRIFT_GROUPS) if exact else None
    kept, kept_of, last_drawn = 0, np.zeros(tasks), np.full(tasks, -groups)
    looks: list[dict[str, float]] = []
    for done in range(STEP_GROUPS, groups + 1, STEP_GROUPS):
        drawn = drawing.draw(STEP_GROUPS)
        passes = population.passes(drawn)
        keep = (passes >= LOW) & (passes <= HIGH)
        kept += int(keep.sum())
        kept_of[drawn[keep]] += 1
        last_drawn[drawn] = done
        tracker.record(drawn, passes, np.full(STEP_GROUPS, GROUP_SIZE))
        if draw == "level_replay":
            rates = population.rates[drawn]
            tracker.score(drawn, GROUP_SIZE * np.sqrt(rates * (1.0 - rates)), np.full(STEP_GROUPS, GROUP_SIZE))
        drawing.update(drawn)
        if best:
            best.record(drawn, passes)
        if done % DRIFT_GROUPS == 0:
            population.move()
            if best:
                best.move()
        if done % min(LOOK_GROUPS, groups // 10) == 0:
            if done > groups // 10:
                looks.append(_look(tracker, population, best, kept_of, done - last_drawn))
            kept_of[:] = 0
    found = {name: float(np.mean([look[name] for look in looks])) for name in looks[0]}
    return {"waste": 1.0 - kept / groups, **found, "changes": float(drawing.changes)}


def _look(
    tracker: Tracker, population: Population, best: ExactFilter | None, kept_of: np.ndarray, age: np.ndarray
) -> dict[str, float]:
    alpha, beta = tracker.posterior()
    rates, predicted = population.rates, alpha / (alpha + beta)
    learnable = population.in_band() >= 0.5
    noise = rates * (1.0 - rates)
    shares = kept_of / max(1.0, kept_of.sum())
    found = {
        "brier": np.mean((predicted - rates) ** 2 + noise),
        "brier_rates": np.mean(noise),
        "effective_share": 1.0 / max(1e-12, (shares**2).sum()) / learnable.sum(),
        "covered_share": np.mean(kept_of[learnable] > 0),
        "learnable_age": np.median(age[learnable]),
        "learnable_error": np.sqrt(np.mean((predicted - rates)[learnable] ** 2)),
    }
    if best:
        found["brier_exact"] = np.mean((best.predictions() - rates) ** 2 + noise)
    return {name: float(value) for name, value in found.items()}


def drawing_time(
    draw: str, *, tasks: int = 1_000_000, count: int = 1_024, rounds: int = 50, seed: int = 0
) -> dict[str, float]:
    """Milliseconds to draw tasks and to take in what came of them; half of the tasks have been tried, of 100 families.

    Returns:
        build_ms: to make the drawing; draw_ms, draw_cpu_ms, draw_worst_ms: median of the draws, by the clock and of processor
        time, and the longest; record_ms: to take in outcomes and losses, the mean, for some calls do more than others.
    """
    generator = np.random.default_rng(seed)
    tracker = Tracker(generator.integers(100, size=tasks))
    tried = generator.permutation(tasks)[: tasks // 2]
    tracker.record(tried, generator.binomial(GROUP_SIZE, generator.beta(0.5, 0.5, len(tried))), np.full(len(tried), 8))
    tracker.score(tried, generator.random(len(tried)), np.ones(len(tried)))
    started = time.perf_counter()
    drawing = make_drawing(CurriculumSettings(draw=draw), tracker, group_size=GROUP_SIZE, seed=seed)
    build_ms = 1e3 * (time.perf_counter() - started)
    draw_ms, draw_cpu_ms, record_ms = [], [], []
    for _ in range(rounds + 2):
        started, worked = time.perf_counter(), time.thread_time()
        drawn = drawing.draw(count)
        draw_cpu_ms.append(1e3 * (time.thread_time() - worked))
        draw_ms.append(1e3 * (time.perf_counter() - started))
        passes, losses = generator.binomial(GROUP_SIZE, 0.5, count), generator.random(count)
        started = time.perf_counter()
        tracker.record(drawn, passes, np.full(count, GROUP_SIZE), np.full(count, 100.0), passes / GROUP_SIZE)
        tracker.score(drawn, losses, np.ones(count))
        drawing.update(drawn)
        record_ms.append(1e3 * (time.perf_counter() - started))
    draw_ms, draw_cpu_ms, record_ms = draw_ms[2:], draw_cpu_ms[2:], record_ms[2:]  # the first compile
    return {
        "build_ms": build_ms,
        "draw_ms": float(np.median(draw_ms)),
        "draw_cpu_ms": float(np.median(draw_cpu_ms)),
        "draw_worst_ms": max(draw_ms),
        "record_ms": float(np.mean(record_ms)),
    }


def bench(*, tasks: int = 10_000, groups: int = 200_000, seeds: int = 3) -> dict[str, Any]:
    """The figures of `curriculum.md`: waste and Brier scores over seeds and drifts, sharpness, all curricula, and times."""
    size: dict[str, Any] = {"tasks": tasks, "groups": groups}
    found: dict[str, Any] = {**size, "group_size": GROUP_SIZE, "seeds": seeds}

    def add(label: str, figures: dict[str, float]) -> None:
        found.update({f"{label}/{name}": value for name, value in figures.items()})

    for drift in (DRIFT, *OTHER_DRIFTS):
        for seed in range(seeds if drift == DRIFT else 1):
            label = f"drift_{drift:g}/seed_{seed}"
            alike, band = (simulate(draw, drift=drift, seed=seed, **size) for draw in ("uniform", "band"))
            add(f"{label}/uniform", alike)
            add(f"{label}/band", band)
            found[f"{label}/waste_ratio"] = band["waste"] / alike["waste"]
            found[f"{label}/brier_ratio"] = band["brier"] / band["brier_exact"]
    for sharpness in SHARPNESSES:
        add(f"sharpness_{sharpness:g}", simulate("band", sharpness=sharpness, exact=False, **size))
    for draw in CURRICULA:
        add(draw, simulate(draw, exact=False, **size))
        add(draw, drawing_time(draw))
    ratios = {
        name: [found[f"drift_{DRIFT:g}/seed_{seed}/{name}"] for seed in range(seeds)]
        for name in ("waste_ratio", "brier_ratio")
    }
    found |= {f"worst_{name}": max(values) for name, values in ratios.items()}
    found["worst_draw_ms"] = max(found[f"{draw}/draw_ms"] for draw in CURRICULA)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    words = parser.parse_args()
    found = bench(tasks=words.tasks, groups=words.groups, seeds=words.seeds)
    if words.save:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if words.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<44} {value:.4g}" if isinstance(value, float) else f"{name:<44} {value}")


if __name__ == "__main__":
    main()
