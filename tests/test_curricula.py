"""Drawing: each curriculum's weights against plain references, draws by their frequencies, states, and what each is for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.curriculum import curricula
from cluster.curriculum.band import band_probability
from cluster.curriculum.curricula import Band, Curriculum, Staged, make_curriculum
from cluster.curriculum.drawing import SWEEP, Drawing, make_drawing
from cluster.curriculum.records import Records
from cluster.curriculum.tracker import Tracker
from configs.curriculum import CURRICULA, CurriculumSettings
from tests.benchmarks.curriculum import simulate

DRAWS = 400_000
GUIDE = Path(curricula.__file__).with_name("curriculum.md")


def trained_tracker(tasks: int = 60, families: int = 3, *, seed: int = 0) -> Tracker:
    """Half of the tasks tried, those of each family with a pass rate of its own; every third of them has a value loss.

    The first four have been solved and forgotten.
    """
    generator = np.random.default_rng(seed)
    tracker = Tracker(np.arange(tasks) % families)
    tried = generator.permutation(tasks)[: tasks // 2]
    rates = generator.beta(0.3, 0.3 + tracker.families[tried])
    for _ in range(2):
        tracker.record(tried, generator.binomial(40, rates), np.full(len(tried), 40))
    for forgotten in [40] * 6 + [5] * 12:
        tracker.record(tried[:4], np.full(4, forgotten), np.full(4, 40))
    tracker.score(tried[::3], generator.random(len(tried[::3])), np.ones(len(tried[::3])))
    return tracker


def drawing_of(tracker: Tracker, draw: str = "band", *, seed: int = 0, stages: Any = None, **changes: Any) -> Drawing:
    changes = {"sharpness": 1.0, **changes}
    return make_drawing(CurriculumSettings(draw=draw, **changes), tracker, group_size=8, seed=seed, stages=stages)


def mixed(weights: np.ndarray, floor: float) -> np.ndarray:
    shares: np.ndarray = floor / len(weights) + (1.0 - floor) * weights / weights.sum()
    return shares


def band_shares(tracker: Tracker, *, floor: float, sharpness: float = 1.0) -> np.ndarray:
    return mixed(band_probability(*tracker.posterior(), size=8, low=2, high=6) ** sharpness, floor)


def expected_shares(tracker: Tracker, draw: str, *, floor: float = 0.1) -> np.ndarray:
    """By each curriculum's definition, task by task, at a sharpness and a temperature of 1; families are stages."""
    alpha, beta = tracker.posterior()
    rates = alpha / (alpha + beta)
    if draw == "uniform":
        return np.full(len(tracker), 1 / len(tracker))
    if draw == "staged":
        return mixed(np.where(tracker.families == 0, 1.0, 0.0), 0.0)
    if draw == "band":
        return band_shares(tracker, floor=floor)
    weights = np.zeros(len(tracker))
    if draw == "rehearsal":
        for task in range(len(tracker)):
            if tracker.best[task] >= 0.5 and rates[task] < 0.5 * tracker.best[task]:
                weights[task] = 1.0 - rates[task]
        assert 4 <= np.count_nonzero(weights) < len(tracker) // 4
        return 0.25 * mixed(weights, floor) + 0.75 * band_shares(tracker, floor=floor)
    for task in range(len(tracker)):
        if draw == "learning_progress":
            variance = rates[task] * (1.0 - rates[task]) / (alpha[task] + beta[task] + 1.0)
            weights[task] = np.sqrt(tracker.progress()[task] ** 2 + variance)
        else:
            loss = tracker.losses[task]
            before = tracker.attempts[task] if np.isnan(loss) else np.sum(tracker.losses > loss)
            weights[task] = 1.0 / (1.0 + before)
    return mixed(weights, floor)


def assert_frequencies(draws: np.ndarray, shares: np.ndarray) -> None:
    """A chi-square test whose threshold 1 of 30 000 correct runs passes; tasks expected fewer than 10 times count as one.

    Draws of other shares raise its mean of 59, for 60 tasks, by draws · Σ (theirs − right)² / right. Tasks that are drawn 2 %
    too often or too seldom raise it by 160: 1 of 100 000 such runs stays below the threshold of 113.
    """
    counts = np.bincount(draws, minlength=len(shares)).astype(float)
    expected = shares * len(draws)
    assert not counts[shares == 0.0].any()
    rare = (expected < 10.0) & (shares > 0.0)
    often = expected >= 10.0
    counts, expected = (np.append(v[often], v[rare].sum()) if rare.any() else v[often] for v in (counts, expected))
    degrees = max(1, len(expected) - 1)
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5


# --- frequencies


@pytest.mark.parametrize(("floor", "sharpness"), [(0.1, 1.0), (0.5, 1.0), (1.0, 1.0), (0.0, 1.0), (0.1, 3.0)])
def test_tasks_are_drawn_in_proportion(floor: float, sharpness: float) -> None:
    tracker = trained_tracker()
    draws = drawing_of(tracker, floor=floor, sharpness=sharpness).draw(DRAWS, distinct=False)
    assert_frequencies(draws, band_shares(tracker, floor=floor, sharpness=sharpness))


@pytest.mark.parametrize("draw", CURRICULA)
def test_each_curriculum_draws_by_its_definition(draw: str) -> None:
    tracker = trained_tracker()
    drawing = drawing_of(tracker, draw, temperature=1.0)
    assert_frequencies(drawing.draw(DRAWS, distinct=False), expected_shares(tracker, draw))


@pytest.mark.parametrize("draw", CURRICULA)
def test_each_curriculum_follows_new_outcomes(draw: str) -> None:
    """Of tried tasks, and of untried ones through their family, after updates and after draws of distinct tasks."""
    tracker = trained_tracker()
    drawing = drawing_of(tracker, draw, temperature=1.0)
    generator = np.random.default_rng(3)
    for _ in range(6):
        tasks = drawing.draw(5)
        passes = generator.binomial(8, 0.1 + 0.4 * (tracker.families[tasks] == 0))
        tracker.record(tasks, passes, np.full(5, 8))
        tracker.score(tasks[:2], generator.random(2), np.full(2, 100))
        drawing.update(tasks)
    drawing.draw(1)  # the sweep, which takes all 60 tasks in
    tracker_now = drawing.draw(DRAWS, distinct=False)
    assert (tracker.attempts == 0).any()
    assert_frequencies(tracker_now, expected_shares(tracker, draw))


def test_the_frequency_test_has_power() -> None:
    """A floor that is wrong by a fifth of itself, which moves 0.5 % of the draws, does not pass."""
    tracker = trained_tracker()
    draws = drawing_of(tracker, floor=0.12).draw(DRAWS, distinct=False)
    with pytest.raises(AssertionError):
        assert_frequencies(draws, band_shares(tracker, floor=0.1))


def test_family_changes_reach_untried_tasks_at_once() -> None:
    """Those of all its stages."""
    tasks = 5 * SWEEP
    tracker = Tracker(np.arange(tasks) % 2)
    drawing = drawing_of(tracker, floor=0.0, stages=np.arange(tasks) // SWEEP)
    assert abs(np.mean(drawing.draw(2_000, distinct=False) % 2) - 0.5) < 0.06  # 5 standard deviations
    failed = np.arange(400) * 2 + 1  # of family 1
    tracker.record(failed, np.zeros(400, np.int64), np.full(400, 8))
    drawing.update(failed)
    expected = band_shares(tracker, floor=0.0)[1::2].sum()
    assert expected < 0.1
    assert abs(np.mean(drawing.draw(2_000, distinct=False) % 2) - expected) < 0.04


def test_the_floor_keeps_every_task_alive() -> None:
    """Half of 200 tasks always fail. Each is drawn still; one is missed by 40 000 floor draws with a probability of 2e-9."""
    tracker = Tracker(np.zeros(200, np.int64), discount=1.0)
    hopeless = np.arange(100)
    for _ in range(200):
        tracker.record(np.arange(200), np.where(np.arange(200) < 100, 0, 4), np.full(200, 8))
    counts = np.bincount(drawing_of(tracker, floor=0.1).draw(40_000, distinct=False), minlength=200)
    assert counts[hopeless].min() > 0
    assert counts[hopeless].sum() < 0.08 * 40_000  # and hardly more than the floor: 5 %
    none = np.bincount(drawing_of(tracker, floor=0.0).draw(40_000, distinct=False), minlength=200)
    assert none[hopeless].sum() < 0.001 * 40_000


def test_the_sweep_takes_in_what_a_family_shows() -> None:
    """A tried task's weight follows its family's prior within a call or two per 1 024 tasks."""
    tasks = 3 * SWEEP
    tracker = Tracker(np.zeros(tasks, np.int64))
    drawing = drawing_of(tracker, floor=0.0)
    for begin, passes in ((0, 4), (tasks // 2, 0)):
        half = np.arange(begin, begin + tasks // 2)
        tracker.record(half, np.full(len(half), passes), np.full(len(half), 8))
        drawing.update(half)
    expected = band_probability(*tracker.posterior(), size=8, low=2, high=6)
    assert np.abs(drawing.state()["0.Band.weights"][:tasks] - expected).max() > 1e-3
    for _ in range(3):
        drawing.draw(1)
    np.testing.assert_allclose(drawing.state()["0.Band.weights"][:tasks], expected, rtol=1e-12)


# --- distinct draws


def test_distinct_draws_are_one_after_another_from_what_is_left() -> None:
    """Two distinct draws of four tasks: P(i, then j) = w_i · w_j / (1 − w_i), by chi-square over the 12 ordered pairs."""
    tracker = Tracker(np.array([0, 0, 0, 1]))
    tracker.record(np.array([0, 0, 1, 3]), np.array([4, 4, 0, 8]), np.full(4, 8))
    drawing = drawing_of(tracker, floor=0.0)
    weights = band_shares(tracker, floor=0.0)
    pairs = np.array([drawing.draw(2) for _ in range(3_000)])
    shares = np.array(
        [[0.0 if i == j else weights[i] * weights[j] / (1 - weights[i]) for j in range(4)] for i in range(4)]
    )
    flat = shares.ravel() > 0
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)
    assert counts[~flat].sum() == 0
    expected = 3_000 * shares.ravel()[flat]
    assert ((counts[flat] - expected) ** 2 / expected).sum() < 11 + 5 * 22**0.5
    before = drawing.state()["0.Band.weights"]
    assert sorted(drawing.draw(4)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(drawing.state()["0.Band.weights"], before)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in CURRICULA if name != "staged"]),
    st.integers(1, 40),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 2**32),
)
def test_no_task_comes_twice_in_a_call(draw: str, tasks: int, count: int, floor: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tracker = Tracker(generator.integers(3, size=tasks))
    drawing = drawing_of(tracker, draw, floor=floor, seed=seed, stages=generator.integers(3, size=tasks))
    for _ in range(3):
        drawn = drawing.draw(count)
        assert drawn.shape == (count,)
        assert ((drawn >= 0) & (drawn < tasks)).all()
        assert len(np.unique(drawn)) == count or count > tasks
        assert drawing.draw(count, distinct=False).shape == (count,)
        tracker.record(drawn, generator.binomial(8, 0.5, count), np.full(count, 8))
        tracker.score(drawn, generator.random(count), np.ones(count))
        drawing.update(drawn)


def test_what_weighs_nothing_is_not_drawn_to_make_draws_distinct() -> None:
    """Three tasks are unlocked: first each of them, then they again."""
    tracker = Tracker(np.array([0, 1, 0, 2, 0, 1, 1, 2]))
    drawing = drawing_of(tracker, "staged")
    for _ in range(20):
        drawn = drawing.draw(7)
        assert sorted(drawn[:3]) == [0, 2, 4]
        assert set(drawn[3:]) <= {0, 2, 4}
    assert_frequencies(drawing.draw(3_000, distinct=False), mixed(np.where(tracker.families == 0, 1.0, 0.0), 0.0))


# --- states


def go_on(tracker: Tracker, drawing: Drawing, steps: int) -> list[np.ndarray]:
    drawn = []
    for _ in range(steps):
        drawn.append(drawing.draw(7))
        tracker.record(drawn[-1], np.where(tracker.families[drawn[-1]] == 0, 8, drawn[-1] % 9), np.full(7, 8))
        tracker.score(drawn[-1][:3], drawn[-1][:3] % 5, np.full(3, 20))
        drawing.update(drawn[-1])
    return drawn


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CURRICULA), st.integers(0, 12), st.integers(0, 2**32), st.booleans())
def test_the_drawings_state_comes_back(draw: str, steps: int, seed: int, prompts: bool) -> None:
    stages = None if prompts else np.random.default_rng(seed).integers(5, size=60)
    tracker = trained_tracker(seed=seed)
    drawing = drawing_of(tracker, draw, seed=seed, stages=stages)
    go_on(tracker, drawing, steps)
    saved, tracked, changes = drawing.state(), tracker.state(), drawing.changes
    expected = go_on(tracker, drawing, 8)
    again = trained_tracker(seed=9)
    other = drawing_of(again, draw, seed=1, stages=stages)
    again.load_state(tracked)
    other.load_state(saved)
    assert other.changes == changes
    np.testing.assert_array_equal(go_on(again, other, 8), expected)
    assert other.changes == drawing.changes
    for name, array in drawing.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)


def test_a_drawings_state_of_another_moment_is_refused() -> None:
    tracker = trained_tracker()
    drawing = drawing_of(tracker)
    saved = drawing.state()
    with pytest.raises(ValueError, match="load the tracker's state of that moment first"):
        drawing_of(Tracker(tracker.families)).load_state(saved)
    with pytest.raises(ValueError, match="expected 30"):
        drawing_of(trained_tracker(30)).load_state(saved)
    with pytest.raises(ValueError, match="other families and stages"):
        drawing_of(tracker, stages=np.arange(60) % 7).load_state(saved)
    with pytest.raises(ValueError, match="go on with the curriculum that it was saved with"):
        drawing.load_state({name: array for name, array in saved.items() if name != "generator"})
    with pytest.raises(ValueError, match="go on with the curriculum that it was saved with"):
        drawing_of(tracker, "level_replay").load_state(saved)
    with pytest.raises(ValueError, match="six words"):
        drawing.load_state({**saved, "generator": np.zeros(5, np.uint64)})
    for name, array in drawing.state().items():
        np.testing.assert_array_equal(array, saved[name])


# --- what each is for


def play(
    drawing: Drawing, tracker: Tracker, rates: Callable[[int], np.ndarray], rounds: int, count: int = 4
) -> np.ndarray:
    """Draws of each round, int (rounds, count); single episodes whose pass rates the round decides."""
    generator = np.random.default_rng(5)
    drawn = []
    for round in range(rounds):
        drawn.append(drawing.draw(count))
        passes = generator.random(count) < rates(round)[drawn[-1]]
        tracker.record(drawn[-1], passes, np.ones(count))
        drawing.update(drawn[-1])
    return np.array(drawn)


def test_stages_are_unlocked_in_order_and_for_good() -> None:
    """A task is learnt by playing it; when all are unlocked, the first stage is forgotten."""
    stages = np.repeat([7, 0, 3], 4)  # numbers need not follow each other
    tracker = Tracker(np.zeros(12, np.int64), discount=0.95)
    drawing = drawing_of(tracker, "staged", stages=stages, unlock=0.8)
    generator = np.random.default_rng(0)
    played, seen = np.zeros(12), []
    for _ in range(400):
        drawn = drawing.draw(8)
        seen += [stage for stage in np.unique(stages[drawn]).tolist() if stage not in seen]
        played[drawn] += 1
        rates = np.minimum(1.0, played / 20)
        if drawing.changes == 2:
            rates[stages == 0] = 0.0
        tracker.record(drawn, generator.random(8) < rates[drawn], np.ones(8))
        drawing.update(drawn)
        unlocked = np.unique(stages)[: drawing.changes + 1]
        assert set(stages[drawing.draw(12, distinct=False)]) <= set(unlocked)
    assert seen == [0, 3, 7]
    assert drawing.changes == 2
    assert_frequencies(drawing.draw(12_000, distinct=False), np.full(12, 1 / 12))


def test_a_stage_is_not_passed_before_it_was_tried() -> None:
    """Though the prior alone predicts ½ of every task."""
    tracker = Tracker(np.array([0, 0, 1]))
    drawing = drawing_of(tracker, "staged", unlock=0.3)
    assert drawing.changes == 0
    for task, changes in ((0, 0), (1, 1)):
        tracker.record(np.array([task]), np.array([4]), np.array([8]))
        drawing.update(np.array([task]))
        assert drawing.changes == changes


def test_many_tasks_of_a_stage_are_looked_at_now_and_then() -> None:
    """Every 64th part of the tasks; a stage of 640 that is passed is not missed."""
    tracker = Tracker(np.repeat([0, 1], 640))
    drawing = drawing_of(tracker, "staged")
    changed = []
    for _ in range(80):
        tasks = drawing.draw(5)
        tracker.record(tasks, np.full(5, 8), np.full(5, 8))
        drawing.update(tasks)
        changed.append(drawing.changes)
    assert 0 < changed.index(1) < 40
    assert changed[-1] == 1


def test_learning_progress_prefers_tasks_whose_rate_moves() -> None:
    """Of 40 tasks, 10 are learnt meanwhile; 10 always fail, 10 always pass, 10 pass half of the time. Then 10 are forgotten."""
    tracker = Tracker(np.zeros(40, np.int64), discount=0.95)
    drawing = drawing_of(tracker, "learning_progress", sharpness=3.0)

    def rates(round: int) -> np.ndarray:
        moving = [0.0, min(1.0, max(0.0, (round - 400) / 400))][round >= 400]
        forgotten = min(1.0, max(0.0, (2_000 - round) / 400))
        return np.repeat([moving, 0.0, forgotten, 0.5], 10)

    drawn = play(drawing, tracker, rates, 2_200)
    learnt, before, back = (np.mean((t >= 0) & (t < 10)) for t in (drawn[500:850], drawn[200:400], drawn[1_300:1_600]))
    assert before < 0.25
    assert learnt > 0.4
    assert back < 0.25
    assert np.mean((drawn[1_700:2_050] >= 20) & (drawn[1_700:2_050] < 30)) > 0.4


def test_level_replay_prefers_high_losses_and_tries_what_has_none() -> None:
    tracker = Tracker(np.zeros(50, np.int64))
    drawing = drawing_of(tracker, "level_replay", floor=0.1, temperature=0.5)
    losses = np.linspace(1.0, 2.0, 50)
    seen: set[int] = set()
    for _ in range(10):  # each task once, before any comes again by its rank
        drawn = drawing.draw(5)
        seen |= set(drawn.tolist())
        tracker.record(drawn, np.zeros(5), np.ones(5))
        tracker.score(drawn, 32 * losses[drawn], np.full(5, 32))
        drawing.update(drawn)
    assert len(seen) > 25
    for _ in range(40):
        drawn = drawing.draw(5)
        tracker.record(drawn, np.zeros(5), np.ones(5))
        tracker.score(drawn, 32 * losses[drawn], np.full(5, 32))
        drawing.update(drawn)
    assert not np.isnan(tracker.losses).any()
    shares = np.bincount(drawing.draw(40_000, distinct=False), minlength=50) / 40_000
    assert shares[49] == pytest.approx(0.1 / 50 + 0.9 / np.sum(np.arange(1, 51) ** -2.0), abs=0.02)
    assert shares[48] == pytest.approx(0.1 / 50 + 0.9 / 4 / np.sum(np.arange(1, 51) ** -2.0), abs=0.02)
    tracker.score(np.arange(50), 1e4 * losses[::-1], np.full(50, 1e4))  # what was learnt least now is another
    drawing.update(np.arange(50))
    drawing.draw(1)
    assert np.bincount(drawing.draw(4_000, distinct=False), minlength=50).argmax() == 0


def test_level_replay_does_not_wait_for_a_loss_that_never_comes() -> None:
    """Ten of twenty tasks are never learnt from: all their groups are thrown away."""
    tracker = Tracker(np.zeros(20, np.int64))
    drawing = drawing_of(tracker, "level_replay", floor=0.0, temperature=0.5)
    drawn = np.zeros(0, np.int64)
    for _ in range(200):
        drawn = drawing.draw(2)
        tracker.record(drawn, np.zeros(2), np.ones(2))
        scored = drawn[drawn < 10]
        tracker.score(scored, 8.0 + scored, np.full(len(scored), 8))
        drawing.update(drawn)
    assert np.mean(drawing.draw(4_000, distinct=False) >= 10) < 0.3


def test_rehearsal_brings_back_a_forgotten_task_and_band_alone_does_not() -> None:
    """Twenty tasks: one is forgotten at round 300, the others stay as they are; some hard ones were passed by luck."""
    shares = {}
    for draw in ("band", "rehearsal"):
        tracker = Tracker(np.zeros(20, np.int64), discount=0.95)
        drawing = drawing_of(tracker, draw, sharpness=3.0)

        def rates(round: int) -> np.ndarray:
            return np.array([1.0 if round < 300 else 0.0] + [0.05] * 9 + [0.5] * 10)

        drawn = play(drawing, tracker, rates, 900)
        assert np.mean(drawn[200:300] == 0) < 0.05
        shares[draw] = np.mean(drawn[600:] == 0)
    assert shares["band"] < 0.05
    assert shares["rehearsal"] > 0.15  # 0.9 · 0.25 for it alone, less what distinct draws lose


def test_rehearsal_without_forgotten_tasks_is_the_band() -> None:
    tracker = Tracker(np.zeros(30, np.int64))
    tracker.record(np.arange(10), np.arange(10) % 9, np.full(10, 8))
    assert_frequencies(drawing_of(tracker, "rehearsal").draw(DRAWS, distinct=False), expected_shares(tracker, "band"))
    share = drawing_of(tracker, "rehearsal", rehearsal=0.0)
    assert "0.Band.weights" in share.state()


def test_drawing_by_the_band_wastes_half_and_the_tracker_keeps_up_with_exact_bayes() -> None:
    """The population of `tests/benchmarks/curriculum.py`, a tenth of it: each task as often, its drift between times the same."""
    small: dict[str, Any] = {"tasks": 1_000, "groups": 20_000, "drift": 0.1 * 10**0.5}
    alike, band = (simulate(draw, **small) for draw in ("uniform", "band"))
    assert band["waste"] < 0.5 * alike["waste"]
    for found in (alike, band):
        assert found["brier_rates"] < found["brier_exact"] < found["brier"] < 1.1 * found["brier_exact"]


@pytest.mark.parametrize("draw", CURRICULA)
def test_the_simulation_runs_with_every_curriculum(draw: str) -> None:
    found = simulate(draw, tasks=200, groups=2_000, exact=False)
    assert 0.1 < found["waste"] < 0.75
    assert found["covered_share"] > 0.2
    assert (found["changes"] > 0) == (draw == "staged")


# --- settings, and curricula of users


def test_the_settings_name_every_curriculum() -> None:
    assert tuple(curricula.CLASSES) == CURRICULA
    for name, chosen in curricula.CLASSES.items():
        assert type(make_curriculum(CurriculumSettings(draw=name), 8)) is chosen


@pytest.mark.parametrize(
    ("size", "changes", "expected"),
    [
        (16, {}, (16, 4, 12)),
        (16, {"filter": "none"}, (16, 4, 12)),
        (8, {"low": 0.0, "high": 1.0}, (8, 1, 7)),
        (3, {"low": 0.4, "high": 0.6, "filter": "none"}, (3, 1, 2)),
        (1, {}, (2, 1, 1)),
    ],
)
def test_the_band_is_that_of_the_filter_without_groups_of_one_outcome(
    size: int, changes: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    tracker = trained_tracker()
    band = Band(CurriculumSettings(**changes), size)
    tried = np.flatnonzero(tracker.attempts)
    attempts, low, high = expected
    np.testing.assert_array_equal(
        band.weights(Records.tried(tracker, tried, tried)),
        band_probability(*tracker.posterior(tried), size=attempts, low=low, high=high)
        ** CurriculumSettings().sharpness,
    )


def test_records_hold_what_the_tracker_knows() -> None:
    tracker = Tracker(np.array([0, 0, 1, 1]), discount=0.5)
    both = np.array([1, 3])
    tracker.record(
        both, np.array([0, 8]), np.array([8, 8]), lengths=np.array([5.0, np.nan]), returns=np.array([1.0, 2.0])
    )
    tracker.record(np.array([1]), np.array([4]), np.array([8]), returns=np.array([4.0]))
    tracker.record(np.array([3]), np.array([0]), np.array([8]))
    tracker.score(np.array([1]), np.array([6.0]), np.array([2]))
    found = Records.tried(tracker, both, np.array([2, 0]))
    np.testing.assert_array_equal(found.families, [0, 1])
    np.testing.assert_array_equal(found.stages, [2, 0])
    np.testing.assert_array_equal((found.alpha, found.beta), tracker.posterior(both))
    np.testing.assert_array_equal(found.attempts, [16, 16])
    np.testing.assert_array_equal(found.since_solved, [1, 2])  # of the groups of 1 and 3, 3 were before the latest two
    np.testing.assert_array_equal(found.best, tracker.best[both])
    np.testing.assert_array_equal(found.progress, tracker.progress(both))
    np.testing.assert_array_equal(found.loss, [3.0, np.nan])
    np.testing.assert_array_equal(found.length, [5.0, np.nan])
    np.testing.assert_allclose(found.mean_return, [3.0, 2.0])
    np.testing.assert_allclose(found.rate, found.alpha / (found.alpha + found.beta))
    untried = Records.untried(tracker, np.array([1, 0]), np.array([0, 5]))
    np.testing.assert_array_equal((untried.alpha, untried.beta), tracker.prior(np.array([1, 0])))
    for name, value in (("attempts", 0), ("since_solved", -1), ("best", 0.0), ("progress", 0.0), ("loss", np.nan)):
        np.testing.assert_array_equal(getattr(untried, name), [value, value], err_msg=name)
    # A uniform rate deviates by the root of 1/12.
    np.testing.assert_allclose(Records.untried(Tracker(np.zeros(1, int)), *np.zeros((2, 1), int)).deviation, 12**-0.5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a run is started from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_guides_example_of_a_curriculum_draws_as_it_says(folder: Path) -> None:
    """Copied out of curriculum.md as it stands, with its settings."""
    code, words = re.findall(r"```python\n(.*?)```.*?```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0]
    (folder / "seldom.py").write_text(code)
    assert words == "curriculum:\n  draw: seldom:Seldom\n  kwargs: {power: 2.0}\n"
    tracker = trained_tracker()
    drawing = drawing_of(tracker, "seldom:Seldom", kwargs={"power": 2.0})
    weights = (1.0 + tracker.attempts) ** -2.0
    assert_frequencies(drawing.draw(DRAWS, distinct=False), mixed(weights, 0.1))
    saved = drawing.state()
    expected = go_on(tracker, drawing, 3)
    again = trained_tracker()
    other = drawing_of(again, "seldom:Seldom", kwargs={"power": 2.0}, seed=1)
    other.load_state(saved)
    np.testing.assert_array_equal(go_on(again, other, 3), expected)


OWN = """
import numpy as np
from cluster.curriculum.curricula import Curriculum

class Wrong(Curriculum):
    def __init__(self, settings, group_size, gives="nan"):
        super().__init__(settings, group_size)
        self.gives = gives
        self.share = 2.0 if gives == "share" else 1.0

    def weights(self, records):
        n = len(records.alpha)
        return {"nan": np.full(n, np.nan), "negative": -np.ones(n), "shape": np.ones(n + 1), "share": np.ones(n)}[self.gives]

class Without(Curriculum):
    pass

class Half(Curriculum):
    share = 0.5

    def weights(self, records):
        return records.families == 1

class Other:
    pass
"""


@pytest.mark.parametrize(
    ("draw", "kwargs", "message"),
    [
        (
            "own:Wrong",
            {"gives": "nan"},
            r"Wrong.weights gave \(3,\), from nan to nan, for 3 records; expected a number from 0",
        ),
        ("own:Wrong", {"gives": "negative"}, "from -1.0 to -1.0, for 3 records"),
        ("own:Wrong", {"gives": "shape"}, r"gave \(4,\)"),
        ("own:Wrong", {"gives": "share"}, "share is 2.0 and floor None; expected shares from 0 to 1"),
        ("own:Wrong", {"takes": 1}, r"Wrong\(settings, group_size, \*\*curriculum.kwargs\) raised TypeError.*'takes'"),
        ("own:Without", {}, "abstract method"),
        ("own:Other", {}, "expected a class derived from cluster.curriculum.curricula.Curriculum"),
        ("own:Wron", {}, "nearest: Wrong"),
        ("nowhere:Any", {}, "curriculum.draw 'nowhere:Any': importing the module 'nowhere' raised"),
    ],
)
def test_a_curriculum_of_a_user_that_cannot_be_used_is_named(
    folder: Path, draw: str, kwargs: dict[str, Any], message: str
) -> None:
    (folder / "own.py").write_text(OWN)
    with pytest.raises(ValueError, match=message):
        drawing_of(trained_tracker(), draw, kwargs=kwargs)


def test_a_curriculum_of_a_user_may_leave_a_share_to_the_band(folder: Path) -> None:
    (folder / "own.py").write_text(OWN)
    tracker = trained_tracker()
    draws = drawing_of(tracker, "own:Half").draw(DRAWS, distinct=False)
    half = mixed((tracker.families == 1).astype(float), 0.1)
    assert_frequencies(draws, 0.5 * half + 0.5 * band_shares(tracker, floor=0.1))


def test_drawing_names_what_is_wrong() -> None:
    tracker = trained_tracker()
    band: list[tuple[Curriculum, float]] = [(Band(CurriculumSettings(), 8), 1.0)]
    with pytest.raises(ValueError, match="floor is 2"):
        Drawing(tracker, band, floor=2.0, seed=0)
    for stages in (np.zeros(59, int), np.zeros(60), np.zeros((60, 1), int)):
        with pytest.raises(ValueError, match="expected an integer for each of 60 tasks"):
            Drawing(tracker, band, floor=0.1, seed=0, stages=stages)


def test_staged_looks_at_most_every_64th_of_the_tasks() -> None:
    """Which keeps a report of outcomes short where tasks are many."""
    tracker = Tracker(np.zeros(6_400, np.int64))
    staged = Staged(CurriculumSettings(), 8)
    stages = np.repeat([0, 1], 3_200)
    assert not staged.update(tracker, stages)
    for groups, unlocked in ((99, False), (1, True)):
        tracker.record(np.arange(groups), np.full(groups, 8), np.full(groups, 8))
        assert staged.update(tracker, stages) == unlocked
