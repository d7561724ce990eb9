"""What the tracker knows, and what drawing by it saves, in a population of tasks whose truth is known.

`python -m tests.benchmarks.curriculum [--groups N] [--tasks N] [--seed N]` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from cluster.curriculum.drawing import Drawing, PassRateDrawing, UniformDrawing
from cluster.curriculum.filter import GroupFilter
from cluster.curriculum.tracker import Tracker

GROUP_SIZE = 8
LOW, HIGH = 0.2, 0.8
FLOOR = 0.1
SHARPNESS = 3.0  # of the kind sharp
STEP_GROUPS = 50  # groups drawn at once, as for one learner step
DRIFT_GROUPS = 1_000  # the pass rates move once in so many groups
SPACING, REACH = 0.1, 15.0  # of the exact filter's grid of logits


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

    def passes(self, tasks: np.ndarray) -> np.ndarray:
        """Passes of one group of each of `tasks`."""
        passes: np.ndarray = self._generator.binomial(GROUP_SIZE, self.rates[tasks])
        return passes

    def move(self) -> None:
        """The walk of 1 000 groups."""
        self._logits += self._drift * self._generator.standard_normal(len(self._logits))


class ExactFilter:
    """Bayes' rule on a grid of logits, which knows the prior and the drift: no tracker predicts better."""

    def __init__(self, tasks: int, *, drift: float) -> None:
        points = round(2 * REACH / SPACING) + 1
        logits = np.linspace(-REACH, REACH, points)
        self._rates = 1.0 / (1.0 + np.exp(-logits))
        # Beta(½, ½) in logits: its density times the derivative p(1 − p).
        prior = np.sqrt(self._rates * (1.0 - self._rates))
        self._beliefs = np.tile((prior / prior.sum()).astype(np.float32), (tasks, 1))
        steps = np.abs(np.subtract.outer(np.arange(points), np.arange(points))) * SPACING
        if drift < 0.7 * SPACING:  # too narrow for the grid: three points of the same variance
            side = 0.5 * (drift / SPACING) ** 2
            kernel = np.select([steps < 0.5 * SPACING, steps < 1.5 * SPACING], [1.0 - 2.0 * side, side], 0.0)
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
    kind: str,
    *,
    tasks: int = 10_000,
    groups: int = 200_000,
    drift: float = 0.1,
    discount: float = 0.8,
    exact: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """One run of drawing, sampling, filtering and recording.

    Brier scores are expected ones, over all tasks alike: the mean of (prediction − rate)² + rate (1 − rate), taken every
    10 000 groups, the first tenth of the run left out.

    Args:
        kind: uniform, pass_rate, or sharp, which is pass_rate with a sharpness of 3.
        drift: standard deviation of a logit's walk over 1 000 groups.
        exact: run the exact filter beside the tracker.

    Returns:
        waste: share of the sampled groups outside the band; brier, brier_exact and brier_rates: of the tracker, of the exact filter
        and of the true rates, which nothing goes below.
    """
    tracker = Tracker(np.zeros(tasks, np.int64), discount=discount)
    band = GroupFilter(LOW, HIGH, GROUP_SIZE)
    low, high = band.counts
    drawing: Drawing = UniformDrawing(tasks, seed=seed)
    if kind != "uniform":
        sharpness = {"pass_rate": 1.0, "sharp": SHARPNESS}[kind]
        drawing = PassRateDrawing(
            tracker, group_size=GROUP_SIZE, low=low, high=high, floor=FLOOR, sharpness=sharpness, seed=seed
        )
    population = Population(tasks, drift=drift, seed=seed + 1)
    best = ExactFilter(tasks, drift=drift) if exact else None
    kept = 0
    scores: list[tuple[float, ...]] = []
    for done in range(STEP_GROUPS, groups + 1, STEP_GROUPS):
        drawn = drawing.draw(STEP_GROUPS)
        passes = population.passes(drawn)
        kept += int(((passes >= low) & (passes <= high)).sum())
        tracker.record(drawn, passes, np.full(STEP_GROUPS, GROUP_SIZE))
        drawing.update(drawn)
        if best:
            best.record(drawn, passes)
        if done % DRIFT_GROUPS == 0:
            population.move()
            if best:
                best.move()
        if done % 10_000 == 0 and done > groups // 10:
            alpha, beta = tracker.posterior()
            rates = population.rates
            predicted = [alpha / (alpha + beta), rates, *([best.predictions()] if best else [])]
            scores.append(tuple(float(np.mean((p - rates) ** 2 + rates * (1.0 - rates))) for p in predicted))
    means = np.mean(scores, axis=0)
    found = {"waste": 1.0 - kept / groups, "brier": float(means[0]), "brier_rates": float(means[1])}
    return found | ({"brier_exact": float(means[2])} if best else {})


def drawing_time(tasks: int = 1_000_000, *, count: int = 1_024, rounds: int = 50, seed: int = 0) -> dict[str, float]:
    """Milliseconds to draw tasks and to take in their outcomes, medians; half of the tasks have been tried."""
    generator = np.random.default_rng(seed)
    tracker = Tracker(generator.integers(100, size=tasks))
    tried = generator.permutation(tasks)[: tasks // 2]
    tracker.record(tried, generator.binomial(GROUP_SIZE, generator.beta(0.5, 0.5, len(tried))), np.full(len(tried), 8))
    started = time.perf_counter()
    drawing = PassRateDrawing(tracker, group_size=GROUP_SIZE, low=2, high=6, floor=FLOOR, seed=seed)
    found = {"build_ms": 1e3 * (time.perf_counter() - started)}
    times: dict[str, list[float]] = {"draw_ms": [], "record_ms": []}
    for _ in range(rounds):
        started = time.perf_counter()
        drawn = drawing.draw(count)
        times["draw_ms"].append(1e3 * (time.perf_counter() - started))
        passes = generator.binomial(GROUP_SIZE, 0.5, count)
        started = time.perf_counter()
        tracker.record(drawn, passes, np.full(count, GROUP_SIZE))
        drawing.update(drawn)
        times["record_ms"].append(1e3 * (time.perf_counter() - started))
    return found | {name: float(np.median(values)) for name, values in times.items()}


def bench(*, tasks: int = 10_000, groups: int = 200_000, seed: int = 0) -> dict[str, Any]:
    """Waste of uniform and of pass-rate drawing with the same filter, Brier scores, and the time of a draw at 1 M tasks.

    `drift` 0.1 is what the default discount was chosen at; 0.03 and 0.3 it was not.
    """
    found: dict[str, Any] = {"tasks": tasks, "groups": groups, "group_size": GROUP_SIZE, "seed": seed}
    for drift in (0.1, 0.03, 0.3):
        for kind in ("uniform", "pass_rate", "sharp"):
            for name, value in simulate(kind, tasks=tasks, groups=groups, drift=drift, seed=seed).items():
                found[f"drift_{drift:g}/{kind}/{name}"] = value
    return found | drawing_time(seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(bench(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
