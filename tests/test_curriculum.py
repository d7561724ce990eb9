"""The curriculum: the tracker against a plain reference, the band exactly, drawing by its frequencies, filter and waste."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.curriculum.band import band_probability
from cluster.curriculum.drawing import SWEEP, Drawing, PassRateDrawing, UniformDrawing, make_drawing
from cluster.curriculum.filter import Amount, GroupFilter, Waste
from cluster.curriculum.tracker import Tracker
from configs.curriculum import CurriculumSettings, pass_counts
from tests.benchmarks.curriculum import simulate

FAMILIES = np.array([0, 0, 0, 1, 1, 2])
DRAWS = 400_000
Groups = list[tuple[int, int, int]]


@st.composite
def recorded_groups(draw: st.DrawFn) -> Groups:
    """Groups as (task, passes, attempts)."""
    sizes = st.integers(0, 9)
    return [
        (draw(st.integers(0, len(FAMILIES) - 1)), draw(st.integers(0, size)), size)
        for size in draw(st.lists(sizes, max_size=40))
    ]


def record(tracker: Tracker, groups: Groups) -> None:
    tracker.record(*np.array(groups, np.int64).reshape(-1, 3).T)


def reference(groups: Groups, discount: float, family_discount: float) -> tuple[np.ndarray, np.ndarray]:
    """The posterior by the definition: one group after another, each a call of its own."""
    own = {task: [0.0, 0.0] for task in range(len(FAMILIES))}
    tried: set[int] = set()
    firsts: dict[int, list[tuple[float, float | None]]] = {family: [] for family in range(3)}
    for task, passes, attempts in groups:
        if attempts == 0:
            continue
        if task not in tried:
            pairs = None if attempts == 1 else comb(passes, 2) / comb(attempts, 2)
            firsts[FAMILIES[task]].append((passes / attempts, pairs))
            tried.add(task)
        own[task] = [discount * own[task][0] + passes, discount * own[task][1] + attempts - passes]
    alpha, beta = np.zeros(len(FAMILIES)), np.zeros(len(FAMILIES))
    for task, family in enumerate(FAMILIES):
        seen = firsts[family]
        weights = [family_discount ** (len(seen) - 1 - i) for i in range(len(seen))]
        rate = (1 + sum(w * r for w, (r, _) in zip(weights, seen, strict=True))) / (2 + sum(weights))
        pairs_seen = [(w, q) for w, (_, q) in zip(weights, seen, strict=True) if q is not None]
        between = max(0.0, sum(w * (q - rate**2) for w, q in pairs_seen))
        whole = sum(w * rate * (1 - rate) for w, _ in pairs_seen)
        strength = min(50.0, max(0.5, (whole + 0.5) / (between + 1 / 6) - 1))
        alpha[task] = strength * rate + own[task][0]
        beta[task] = strength * (1 - rate) + own[task][1]
    return alpha, beta


@given(recorded_groups(), st.sampled_from([0.5, 0.9, 1.0]), st.sampled_from([0.8, 1.0]))
def test_the_posterior_is_the_definitions(groups: Groups, discount: float, family_discount: float) -> None:
    tracker = Tracker(FAMILIES, discount=discount, family_discount=family_discount)
    for group in groups:
        record(tracker, [group])
    for found, expected in zip(tracker.posterior(), reference(groups, discount, family_discount), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    totals = np.bincount([g[0] for g in groups], [g[2] for g in groups], len(FAMILIES))
    np.testing.assert_array_equal(tracker.attempts, totals)
    scored = [g for g in groups if g[2]]
    assert tracker.groups == len(scored)
    for task in range(len(FAMILIES)):
        solved = [i + 1 for i, g in enumerate(scored) if g[0] == task and g[1]]
        assert tracker.last_solved[task] == (solved[-1] if solved else -1)
        assert tracker.once_solved[task] == bool(solved)


@given(recorded_groups(), st.randoms(use_true_random=False))
def test_one_call_does_not_depend_on_the_order_of_its_groups(groups: Groups, random: object) -> None:
    first, second = Tracker(FAMILIES), Tracker(FAMILIES)
    record(first, groups)
    shuffled = list(groups)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    record(second, shuffled)
    for name, array in first.state().items():
        np.testing.assert_allclose(second.state()[name], array, rtol=1e-12, err_msg=name)


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.5, 0.9, 1.0]))
def test_equal_groups_weigh_the_same_in_one_call_and_one_by_one(count: int, passes: int, discount: float) -> None:
    together, single = Tracker(FAMILIES, discount=discount), Tracker(FAMILIES, discount=discount)
    for tracker in (together, single):
        record(tracker, [(1, 4, 8)])
    record(together, [(1, passes, 8)] * count)
    for _ in range(count):
        record(single, [(1, passes, 8)])
    np.testing.assert_allclose(together.posterior(), single.posterior(), rtol=1e-12)


def test_a_family_predicts_its_untried_tasks_and_no_others() -> None:
    tracker = Tracker(FAMILIES)
    np.testing.assert_allclose(tracker.posterior(), np.ones((2, 6)))  # uniform, before anything is known
    record(tracker, [(0, 0, 8), (1, 1, 8)])
    alpha, beta = tracker.posterior()
    assert alpha[2] / (alpha[2] + beta[2]) < 0.35
    np.testing.assert_allclose((alpha[3:], beta[3:]), 1.0)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 6.0), (10.0, 10.0)])
def test_a_familys_prior_is_fitted_to_its_tasks(a: float, b: float) -> None:
    """Over 4 000 tasks the mean's standard error is below 0.006, and at ten seeds the strength was within 25 % of the truth."""
    generator = np.random.default_rng(0)
    tracker = Tracker(np.zeros(5_000, np.int64), family_discount=1.0)
    passes = generator.binomial(8, generator.beta(a, b, 4_000))
    tracker.record(np.arange(4_000), passes, np.full(4_000, 8))
    alpha, beta = (float(values[-1]) for values in tracker.posterior())
    assert alpha / (alpha + beta) == pytest.approx(a / (a + b), abs=0.025)
    assert alpha + beta == pytest.approx(a + b, rel=0.3)


def test_drawing_by_outcome_does_not_bias_the_family() -> None:
    """Hopeless tasks tried once, one task in reach tried a thousand times: the next untried one is probably hopeless."""
    tracker = Tracker(np.zeros(20, np.int64))
    record(tracker, [(task, 0, 8) for task in range(10)])
    for _ in range(1_000):
        record(tracker, [(10, 4, 8)])
    alpha, beta = tracker.posterior()
    assert alpha[-1] / (alpha[-1] + beta[-1]) < 0.2


@given(recorded_groups(), recorded_groups())
def test_the_trackers_state_comes_back(before: Groups, after: Groups) -> None:
    tracker, other = Tracker(FAMILIES), Tracker(FAMILIES)
    record(tracker, before)
    saved = tracker.state()
    record(tracker, after)  # a state is a copy
    other.load_state(saved)
    record(other, after)
    for name, array in tracker.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)
    np.testing.assert_array_equal(other.posterior(), tracker.posterior())


def test_the_tracker_names_what_is_wrong() -> None:
    tracker = Tracker(FAMILIES)
    before = tracker.state()
    for groups, message in (
        ([(0, 1, 2), (6, 0, 1)], "expected numbers in 0…5"),
        ([(-1, 0, 1)], "expected numbers in 0…5"),
        ([(0, 1, 2), (3, 3, 2)], "task 3 came with 3 passes of 2"),
        ([(0, -1, 2)], "task 0 came with -1 passes"),
    ):
        with pytest.raises(ValueError, match=message):
            record(tracker, groups)
    with pytest.raises(ValueError, match="expected one of each"):
        tracker.record(np.array([1]), np.array([1, 2]), np.array([1]))
    for name, array in tracker.state().items():
        np.testing.assert_array_equal(array, before[name])
    with pytest.raises(ValueError, match="the state is of other tasks"):
        tracker.load_state(Tracker(np.zeros(5, np.int64)).state())
    with pytest.raises(ValueError, match="of other families"):
        tracker.load_state(Tracker(FAMILIES[::-1].copy()).state())
    with pytest.raises(ValueError, match="lacks passes"):
        tracker.load_state({name: array for name, array in before.items() if name != "passes"})
    for wrong in (np.zeros(0, np.int64), np.array([-1]), np.array([0.5]), np.zeros((2, 2), np.int64)):
        with pytest.raises(ValueError, match="expected integers from 0"):
            Tracker(wrong)
    with pytest.raises(ValueError, match="discount is 0"):
        Tracker(FAMILIES, discount=0.0)


def exact_band(alpha: Fraction, beta: Fraction, size: int, low: int, high: int) -> Fraction:
    """The beta-binomial sum in rational numbers."""

    def rising(start: Fraction, count: int) -> Fraction:
        product = Fraction(1)
        for k in range(count):
            product *= start + k
        return product

    return sum(
        (
            comb(size, k) * rising(alpha, k) * rising(beta, size - k) / rising(alpha + beta, size)
            for k in range(max(0, low), min(size, high) + 1)
        ),
        Fraction(0),
    )


positive = st.builds(Fraction, st.integers(1, 100_000), st.sampled_from([1, 2, 100, 1_000]))


@settings(max_examples=200)
@given(positive, positive, st.integers(1, 40), st.integers(-2, 42), st.integers(-2, 42))
def test_the_band_is_exact(alpha: Fraction, beta: Fraction, size: int, low: int, high: int) -> None:
    found = band_probability(np.array([float(alpha)]), np.array([float(beta)]), size=size, low=low, high=high)
    assert found[0] == pytest.approx(float(exact_band(alpha, beta, size, low, high)), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("alpha", [1e-60, 1e-3, 0.5, 30.0, 1e4, 1e60])
@pytest.mark.parametrize("beta", [1e-60, 1e-3, 0.5, 30.0, 1e4, 1e60])
def test_the_band_holds_at_the_limits(alpha: float, beta: float) -> None:
    """What lies below, within and above the band adds up to 1, for the largest groups and any posterior."""
    parts = [
        band_probability(np.array([alpha]), np.array([beta]), size=4096, low=low, high=high)[0]
        for low, high in ((0, 819), (820, 3276), (3277, 4096))
    ]
    assert sum(parts) == pytest.approx(1.0, rel=1e-10)
    assert min(parts) >= 0.0


def test_the_bands_of_known_pass_rates() -> None:
    """A posterior that is sure of the rate gives the binomial: the chances of a usable group at 8 and 16 completions."""
    rates = np.array([0.01, 0.05, 0.25, 0.5])
    sure = (1e9 * rates, 1e9 * (1 - rates))
    np.testing.assert_allclose(band_probability(*sure, size=8, low=2, high=6), [0.003, 0.06, 0.63, 0.93], atol=0.005)
    np.testing.assert_allclose(band_probability(*sure, size=16, low=4, high=12), [0, 0.007, 0.59, 0.98], atol=0.006)


def test_the_band_names_what_is_wrong() -> None:
    one = np.ones(1)
    with pytest.raises(ValueError, match="alpha is from 0"):
        band_probability(np.zeros(1), one, size=4, low=1, high=3)
    with pytest.raises(ValueError, match="beta is from nan"):
        band_probability(one, np.full(1, np.nan), size=4, low=1, high=3)
    with pytest.raises(ValueError, match="size is 0"):
        band_probability(one, one, size=0, low=0, high=0)
    with pytest.raises(ValueError, match="one length"):
        band_probability(one, np.ones(2), size=4, low=1, high=3)
    assert band_probability(np.zeros(0), np.zeros(0), size=4, low=1, high=3).shape == (0,)


@pytest.mark.parametrize(
    ("low", "high", "size", "counts"),
    [
        (0.2, 0.8, 4, (1, 3)),
        (0.25, 0.75, 4, (1, 3)),
        (0.2, 0.8, 8, (2, 6)),
        (0.25, 0.75, 8, (2, 6)),
        (0.2, 0.8, 16, (4, 12)),
        (0.25, 0.75, 16, (4, 12)),
        (0.2, 0.8, 15, (3, 12)),  # 0.2 · 15 is above 3 in floating point
        (0.3, 0.7, 10, (3, 7)),
        (0.2, 0.8, 1, (1, 0)),
        (0.0, 1.0, 8, (0, 8)),
    ],
)
def test_bands_as_counts(low: float, high: float, size: int, counts: tuple[int, int]) -> None:
    assert pass_counts(low, high, size) == counts


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 300))
def test_counts_are_those_of_exact_rates_and_of_the_settings(one: int, other: int, size: int) -> None:
    low, high = min(one, other), max(one, other)
    found = pass_counts(low / 100, high / 100, size)
    assert found == (-(-low * size // 100), high * size // 100)


def test_the_filter_states_its_counts() -> None:
    assert GroupFilter(0.2, 0.8, 16).text == "band 0.2–0.8 of 16 completions: groups with 4 to 12 passes are kept"
    assert GroupFilter(0.5, 0.5, 8).text == "band 0.5–0.5 of 8 completions: groups with exactly 4 passes are kept"
    assert GroupFilter(0.0, 1.0, 8).text == "band 0–1 of 8 completions: every group is kept"


def test_the_filter_judges_by_counts() -> None:
    band = GroupFilter(0.2, 0.8, 8)
    assert [band.verdict(passes) for passes in range(9)] == ["too_hard"] * 2 + ["kept"] * 5 + ["too_easy"] * 2
    assert [band.keeps(passes, 5) for passes in range(6)] == [False, True, True, True, True, False]
    assert [band.verdict(passes, 1) for passes in range(2)] == ["too_hard", "too_easy"]
    assert all(GroupFilter(0.0, 1.0, 8).keeps(passes) for passes in range(9))


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 64), st.data())
def test_the_filter_is_the_rule_in_rational_numbers(one: int, other: int, size: int, data: st.DataObject) -> None:
    low, high = Fraction(min(one, other), 100), Fraction(max(one, other), 100)
    passes = data.draw(st.integers(0, size))
    rate = Fraction(passes, size)
    expected = "too_hard" if rate < low else "too_easy" if rate > high else "kept"
    assert GroupFilter(float(low), float(high), 100).verdict(passes, size) == expected


def test_the_filter_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="keeps no group of 3"):
        GroupFilter(0.4, 0.6, 3)
    with pytest.raises(ValueError, match="expected 0 ≤ low ≤ high ≤ 1"):
        GroupFilter(0.8, 0.2, 8)
    with pytest.raises(ValueError, match="9 passes of 8"):
        GroupFilter(0.2, 0.8, 8).verdict(9)


def test_waste_is_counted_by_reason_and_merged() -> None:
    actor, other = Waste(), Waste()
    assert actor.share == 0.0
    actor.count("kept", Amount(2, 16, 300))
    actor.count("too_hard", Amount(1, 8, 100))
    other.count("too_easy", Amount(1, 8, 40))
    other.count("unscored", Amount(0, 1, 10))
    other.count("kept", Amount(1, 8, 50))
    other.discard("stale", Amount(1, 8, 50))
    total = Waste()
    total.merge(actor)
    total.merge(Waste.from_state(json.loads(json.dumps(other.state()))))
    assert total.sampled == Amount(5, 41, 500)
    assert total.kept == Amount(2, 16, 300)
    assert total.wasted == Amount(3, 25, 200)
    assert total.share == 0.4
    metrics = total.metrics()
    assert metrics["waste/share"] == pytest.approx(sum(metrics[f"waste/{reason}"] for reason in total.rejected))
    assert metrics["waste/stale"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="expected three numbers"):
        Waste.from_state({"kept": [1, 2, 3]})


# --- drawing


def trained_tracker(tasks: int = 60, families: int = 3, *, seed: int = 0) -> Tracker:
    """Half of the tasks tried, those of each family with a pass rate of its own."""
    generator = np.random.default_rng(seed)
    tracker = Tracker(np.arange(tasks) % families)
    tried = generator.permutation(tasks)[: tasks // 2]
    rates = generator.beta(0.3, 0.3 + tracker.families[tried])
    tracker.record(tried, generator.binomial(40, rates), np.full(len(tried), 40))
    return tracker


def pass_rate_drawing(
    tracker: Tracker, *, floor: float = 0.1, sharpness: float = 1.0, seed: int = 0
) -> PassRateDrawing:
    return PassRateDrawing(tracker, group_size=8, low=2, high=6, floor=floor, sharpness=sharpness, seed=seed)


def expected_shares(tracker: Tracker, *, floor: float, sharpness: float = 1.0) -> np.ndarray:
    weights: np.ndarray = band_probability(*tracker.posterior(), size=8, low=2, high=6) ** sharpness
    shares: np.ndarray = floor / len(tracker) + (1.0 - floor) * weights / weights.sum()
    return shares


def assert_frequencies(draws: np.ndarray, shares: np.ndarray) -> None:
    """A chi-square test whose threshold 1 of 30 000 correct runs passes.

    Draws of other shares raise its mean of 59, for 60 tasks, by draws · Σ (theirs − right)² / right. Tasks that are drawn 2 %
    too often or too seldom raise it by 160: 1 of 100 000 such runs stays below the threshold of 113.
    """
    counts = np.bincount(draws, minlength=len(shares))
    expected = shares * len(draws)
    degrees = len(shares) - 1
    assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(("floor", "sharpness"), [(0.1, 1.0), (0.5, 1.0), (1.0, 1.0), (0.1, 3.0)])
def test_tasks_are_drawn_in_proportion(floor: float, sharpness: float) -> None:
    tracker = trained_tracker()
    draws = pass_rate_drawing(tracker, floor=floor, sharpness=sharpness).draw(DRAWS, distinct=False)
    assert_frequencies(draws, expected_shares(tracker, floor=floor, sharpness=sharpness))


def test_the_frequency_test_has_power() -> None:
    """A floor that is wrong by a fifth of itself, which moves 0.5 % of the draws, does not pass."""
    tracker = trained_tracker()
    draws = pass_rate_drawing(tracker, floor=0.12).draw(DRAWS, distinct=False)
    with pytest.raises(AssertionError):
        assert_frequencies(draws, expected_shares(tracker, floor=0.1))


def test_outcomes_change_what_is_drawn() -> None:
    """Of tried tasks, and of untried ones through their family, after updates and after draws of distinct tasks."""
    tracker = trained_tracker()
    drawing = pass_rate_drawing(tracker)
    generator = np.random.default_rng(3)
    for _ in range(6):
        tasks = drawing.draw(5)
        passes = generator.binomial(8, 0.1 + 0.4 * (tracker.families[tasks] == 0))
        tracker.record(tasks, passes, np.full(5, 8))
        drawing.update(tasks)
    drawing.draw(1)  # the sweep, which takes all 60 tasks in
    assert (tracker.attempts == 0).any()
    assert_frequencies(drawing.draw(DRAWS, distinct=False), expected_shares(tracker, floor=0.1))


def test_family_changes_reach_untried_tasks_at_once() -> None:
    tasks = 5 * SWEEP
    tracker = Tracker(np.arange(tasks) % 2)
    drawing = pass_rate_drawing(tracker, floor=0.0)
    assert abs(np.mean(drawing.draw(2_000, distinct=False) % 2) - 0.5) < 0.06  # 5 standard deviations
    failed = np.arange(400) * 2 + 1  # of family 1
    tracker.record(failed, np.zeros(400, np.int64), np.full(400, 8))
    drawing.update(failed)
    expected = expected_shares(tracker, floor=0.0)[1::2].sum()
    assert expected < 0.1
    assert abs(np.mean(drawing.draw(2_000, distinct=False) % 2) - expected) < 0.04


def test_distinct_draws_are_one_after_another_from_what_is_left() -> None:
    """Two distinct draws of four tasks: P(i, then j) = w_i · w_j / (1 − w_i), by chi-square over the 12 ordered pairs."""
    tracker = Tracker(np.array([0, 0, 0, 1]))
    record(tracker, [(0, 4, 8), (0, 4, 8), (1, 0, 8), (3, 8, 8)])
    drawing = pass_rate_drawing(tracker, floor=0.0)
    weights = expected_shares(tracker, floor=0.0)
    pairs = np.array([drawing.draw(2) for _ in range(3_000)])
    shares = np.array(
        [[0.0 if i == j else weights[i] * weights[j] / (1 - weights[i]) for j in range(4)] for i in range(4)]
    )
    flat = shares.ravel() > 0
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)
    assert counts[~flat].sum() == 0
    expected = 3_000 * shares.ravel()[flat]
    assert ((counts[flat] - expected) ** 2 / expected).sum() < 11 + 5 * 22**0.5
    before = drawing.state()["weights"]
    assert sorted(drawing.draw(4)) == [0, 1, 2, 3]
    np.testing.assert_array_equal(drawing.state()["weights"], before)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 2**32))
def test_no_task_comes_twice_in_a_call(tasks: int, count: int, floor: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tracker = Tracker(generator.integers(3, size=tasks))
    for drawing in (pass_rate_drawing(tracker, floor=floor, seed=seed), UniformDrawing(tasks, seed=seed)):
        for _ in range(3):
            drawn = drawing.draw(count)
            assert drawn.shape == (count,)
            assert ((drawn >= 0) & (drawn < tasks)).all()
            assert len(np.unique(drawn)) == count or count > tasks
            assert drawing.draw(count, distinct=False).shape == (count,)
            tracker.record(drawn, generator.binomial(8, 0.5, count), np.full(count, 8))
            drawing.update(drawn)


def test_the_floor_keeps_every_task_alive() -> None:
    """Half of 200 tasks always fail. Each is drawn still; one is missed by 40 000 floor draws with a probability of 2e-9."""
    tracker = Tracker(np.zeros(200, np.int64), discount=1.0)
    hopeless = np.arange(100)
    for _ in range(200):
        tracker.record(np.arange(200), np.where(np.arange(200) < 100, 0, 4), np.full(200, 8))
    counts = np.bincount(pass_rate_drawing(tracker, floor=0.1).draw(40_000, distinct=False), minlength=200)
    assert counts[hopeless].min() > 0
    assert counts[hopeless].sum() < 0.08 * 40_000  # and hardly more than the floor: 5 %
    none = np.bincount(pass_rate_drawing(tracker, floor=0.0).draw(40_000, distinct=False), minlength=200)
    assert none[hopeless].sum() < 0.001 * 40_000


def test_the_sweep_takes_in_what_a_family_shows() -> None:
    """A tried task's weight follows its family's prior within a call or two per 1 024 tasks."""
    tasks = 3 * SWEEP
    tracker = Tracker(np.zeros(tasks, np.int64))
    drawing = pass_rate_drawing(tracker, floor=0.0)
    for begin, passes in ((0, 4), (tasks // 2, 0)):
        half = np.arange(begin, begin + tasks // 2)
        tracker.record(half, np.full(len(half), passes), np.full(len(half), 8))
        drawing.update(half)
    expected = band_probability(*tracker.posterior(), size=8, low=2, high=6)
    assert np.abs(drawing.state()["weights"][:tasks] - expected).max() > 1e-3
    for _ in range(3):
        drawing.draw(1)
    np.testing.assert_allclose(drawing.state()["weights"][:tasks], expected, rtol=1e-12)


def uniform(tracker: Tracker) -> Drawing:
    return UniformDrawing(len(tracker), seed=1)


@pytest.mark.parametrize("make", [uniform, pass_rate_drawing])
def test_the_drawings_state_comes_back(make: Callable[[Tracker], Drawing]) -> None:
    def go_on(tracker: Tracker, drawing: Drawing, steps: int) -> list[np.ndarray]:
        drawn = []
        for _ in range(steps):
            drawn.append(drawing.draw(7))
            tracker.record(drawn[-1], drawn[-1] % 9, np.full(7, 8))
            drawing.update(drawn[-1])
        return drawn

    tracker = trained_tracker()
    drawing = make(tracker)
    go_on(tracker, drawing, 5)
    saved, tracked = drawing.state(), tracker.state()
    expected = go_on(tracker, drawing, 5)
    again = trained_tracker(seed=9)
    other = make(again)
    again.load_state(tracked)
    other.load_state(saved)
    np.testing.assert_array_equal(go_on(again, other, 5), expected)


def test_a_drawings_state_of_another_moment_is_refused() -> None:
    tracker = trained_tracker()
    drawing = pass_rate_drawing(tracker)
    saved = drawing.state()
    with pytest.raises(ValueError, match="load the tracker's state of that moment first"):
        pass_rate_drawing(Tracker(tracker.families)).load_state(saved)
    with pytest.raises(ValueError, match="expected 30"):
        pass_rate_drawing(trained_tracker(30)).load_state(saved)
    with pytest.raises(ValueError, match="lacks generator"):
        drawing.load_state({name: array for name, array in saved.items() if name != "generator"})
    with pytest.raises(ValueError, match="six words"):
        UniformDrawing(3, seed=0).load_state({})


def test_drawing_names_what_is_wrong() -> None:
    tracker = trained_tracker()
    with pytest.raises(ValueError, match="floor is 2"):
        pass_rate_drawing(tracker, floor=2.0)
    with pytest.raises(ValueError, match="sharpness is -1"):
        pass_rate_drawing(tracker, sharpness=-1.0)
    with pytest.raises(ValueError, match="no count of passes of 8"):
        PassRateDrawing(tracker, group_size=8, low=5, high=4, floor=0.1, seed=0)


def test_the_settings_choose_the_drawing() -> None:
    tracker = trained_tracker()

    def probability(group_size: int, **changes: object) -> np.ndarray:
        drawing = make_drawing(CurriculumSettings(**changes), tracker, group_size=group_size, seed=0)  # type: ignore[arg-type]
        assert isinstance(drawing, PassRateDrawing)
        return drawing.probability()

    def expected(size: int, low: int, high: int) -> np.ndarray:
        return band_probability(*tracker.posterior(), size=size, low=low, high=high)

    assert isinstance(make_drawing(CurriculumSettings(draw="uniform"), tracker, group_size=8, seed=0), UniformDrawing)
    np.testing.assert_array_equal(probability(16), expected(16, 4, 12))
    np.testing.assert_array_equal(probability(16, filter="none"), expected(16, 4, 12))
    np.testing.assert_array_equal(probability(8, low=0.0, high=1.0), expected(8, 1, 7))
    np.testing.assert_array_equal(probability(3, low=0.4, high=0.6, filter="none"), expected(3, 1, 2))
    np.testing.assert_array_equal(probability(1), expected(2, 1, 1))


def test_drawing_by_pass_rate_wastes_less_and_the_tracker_keeps_up_with_exact_bayes() -> None:
    """The population of `tests/benchmarks/curriculum.py`, a tenth of it: each task as often, its drift between times the same."""
    small = {"tasks": 1_000, "groups": 20_000, "drift": 0.1 * 10**0.5}
    alike, by_rate = (simulate(kind, **small) for kind in ("uniform", "pass_rate"))  # type: ignore[arg-type]
    assert by_rate["waste"] < 0.75 * alike["waste"]
    for found in (alike, by_rate):
        assert found["brier_rates"] < found["brier_exact"] < found["brier"] < 1.1 * found["brier_exact"]
