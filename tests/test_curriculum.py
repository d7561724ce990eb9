"""What the curriculum knows: the tracker against plain references, the band exactly, filter and waste."""

from __future__ import annotations

import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.curriculum.band import band_probability
from cluster.curriculum.filter import Amount, GroupFilter, Waste
from cluster.curriculum.tracker import LOSS_WINDOWS, SLOWER, Tracker
from configs.curriculum import CurriculumSettings, EpisodeCurriculumSettings, pass_counts

FAMILIES = np.array([0, 0, 0, 1, 1, 2])
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


def record_all(tracker: Tracker, groups: Groups) -> None:
    """With lengths, returns, of which some are not known, and value losses that depend on the group."""
    tasks, passes, attempts = np.array(groups, np.int64).reshape(-1, 3).T
    returns = np.where(passes % 3 == 1, np.nan, passes - 2.5)
    tracker.record(tasks, passes, attempts, 10.0 + 3.0 * passes, returns)
    tracker.score(tasks, 0.5 * attempts * passes, attempts)


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
    record_all(first, groups)
    shuffled = list(groups)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    record_all(second, shuffled)
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
    record_all(tracker, before)
    saved = tracker.state()
    record_all(tracker, after)  # a state is a copy
    other.load_state(saved)
    record_all(other, after)
    for name, array in tracker.state().items():
        np.testing.assert_array_equal(other.state()[name], array, err_msg=name)
    for mine, theirs in (
        (other.posterior(), tracker.posterior()),
        (other.progress(), tracker.progress()),
        (other.means(), tracker.means()),
        ((other.groups, other.scores), (tracker.groups, tracker.scores)),
    ):
        np.testing.assert_array_equal(mine, theirs)


@given(recorded_groups(), st.sampled_from([0.5, 0.9, 1.0]))
def test_lengths_and_returns_are_means_over_attempts_discounted_as_the_counts(groups: Groups, discount: float) -> None:
    """Against sums by the definition, group after group; a return that is not known leaves the task's as it is."""
    tracker = Tracker(FAMILIES, discount=discount)
    sums = np.zeros((2, 2, len(FAMILIES)))  # (length or return, sum or attempts, task)
    for task, passes, attempts in groups:
        record_all(tracker, [(task, passes, attempts)])
        for measure, mean in enumerate((10.0 + 3.0 * passes, np.nan if passes % 3 == 1 else passes - 2.5)):
            if attempts and not np.isnan(mean):
                sums[measure, :, task] = discount * sums[measure, :, task] + np.array([mean * attempts, attempts])
    with np.errstate(invalid="ignore"):
        expected = sums[:, 0] / sums[:, 1]
    np.testing.assert_allclose(tracker.means(), expected, rtol=1e-9)
    np.testing.assert_array_equal((tracker.mean_length, tracker.mean_return), tracker.means())
    some = np.array([5, 0, 0, 2])
    np.testing.assert_array_equal(tracker.means(some), np.array(tracker.means())[:, some])


@given(recorded_groups(), st.sampled_from([0.5, 0.9, 1.0]))
def test_progress_is_the_recent_rate_less_a_slower_one(groups: Groups, discount: float) -> None:
    """And the best prediction is the highest after any group of the task."""
    tracker = Tracker(FAMILIES, discount=discount)
    slow = 1.0 - (1.0 - discount) / SLOWER
    counts, best = np.zeros((len(FAMILIES), 4)), np.zeros(len(FAMILIES))
    for task, passes, attempts in groups:
        record(tracker, [(task, passes, attempts)])
        if attempts:
            passed, tried, slow_passed, slow_tried = counts[task]
            counts[task] = (
                discount * passed + passes,
                discount * tried + attempts,
                slow * slow_passed + passes,
                slow * slow_tried + attempts,
            )
            alpha, beta = tracker.posterior(np.array([task]))
            best[task] = max(best[task], alpha[0] / (alpha[0] + beta[0]))
    tried = counts[:, 1] > 0
    counts = counts[tried]
    expected = np.zeros(len(FAMILIES))
    expected[tried] = counts[:, 0] / counts[:, 1] - counts[:, 2] / counts[:, 3]
    np.testing.assert_allclose(tracker.progress(), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tracker.progress(np.array([4, 4, 1])), expected[[4, 4, 1]], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tracker.best, best, rtol=1e-12)


def test_progress_has_the_sign_of_the_movement_and_ends_with_it() -> None:
    tracker = Tracker(np.zeros(3, np.int64))
    peaks = np.zeros(3)
    for passes in [(0, 8, 4)] * 30 + [(8, 0, 4)] * 60:  # one is learnt, one forgotten, one stays
        tracker.record(np.arange(3), np.array(passes), np.full(3, 8))
        peaks = np.where(np.abs(tracker.progress()) > np.abs(peaks), tracker.progress(), peaks)
    np.testing.assert_allclose(peaks, [0.44, -0.44, 0.0], atol=0.01)
    np.testing.assert_allclose(tracker.progress(), 0.0, atol=0.05)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1e3), st.floats(0, 200)), max_size=20))
def test_value_losses_are_exponential_means_over_windows(reports: list[tuple[int, float, float]]) -> None:
    tracker = Tracker(FAMILIES)
    expected = np.full(6, np.nan)
    taken = 0
    for task, mean, windows in reports:
        tracker.score(np.array([task]), np.array([mean * windows]), np.array([windows]))
        if windows > 0.0:
            kept = 0.0 if np.isnan(expected[task]) else np.exp(-windows / LOSS_WINDOWS)
            mean = mean * windows / windows  # as rounded
            expected[task] = kept * (0.0 if kept == 0.0 else expected[task]) + (1.0 - kept) * mean
            taken += 1
    np.testing.assert_allclose(tracker.losses, expected, rtol=1e-9, atol=1e-300)
    assert tracker.scores == taken
    assert tracker.groups == 0


def test_a_few_windows_move_a_value_loss_little() -> None:
    tracker = Tracker(FAMILIES)
    tracker.score(np.array([1, 2]), np.array([1.0, 4.0]), np.array([1, 4]))
    np.testing.assert_array_equal(tracker.losses, [np.nan, 1.0, 1.0, np.nan, np.nan, np.nan])
    tracker.score(np.array([1, 2, 2]), np.array([2.0, 600.0, 1000.0]), np.array([1, 300, 500]))
    assert tracker.losses[1] == pytest.approx(1.0155, abs=1e-3)
    assert tracker.losses[2] == pytest.approx(2.0, abs=1e-3)


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
    two = np.array([1, 2])
    for means in ({"lengths": np.ones(1)}, {"returns": np.array([1.0, np.inf])}):
        with pytest.raises(ValueError, match="expected a number or nan for each"):
            tracker.record(two, two, two, **means)
    for losses, weights, message in (
        ([1.0, np.nan], [1, 1], "task 2 came with a loss of nan"),
        ([1.0, -1.0], [1, 1], "task 2 came with a loss of -1"),
        ([1.0, 1.0], [np.inf, 1], "task 1 came with a weight of inf"),
        ([1.0], [1, 1], "expected one of each per task"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.score(two, np.array(losses), np.array(weights))
    with pytest.raises(ValueError, match="expected numbers in 0…5"):
        tracker.score(np.array([6]), np.ones(1), np.ones(1))
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
    assert GroupFilter(0.2, 0.8, 16).text == "band 0.2–0.8 of 16 attempts: groups with 4 to 12 passes are kept"
    assert GroupFilter(0.5, 0.5, 8).text == "band 0.5–0.5 of 8 attempts: groups with exactly 4 passes are kept"
    assert GroupFilter(0.0, 1.0, 8).text == "band 0–1 of 8 attempts: every group is kept"


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


def test_settings_that_cannot_run_together_are_named() -> None:
    assert not list(CurriculumSettings().conflicts(group_size=8))
    assert not list(EpisodeCurriculumSettings(draw="mine:Own", kwargs={"power": 2.0}).conflicts(group_size=8))
    for chosen, message in (
        (CurriculumSettings(low=0.8, high=0.2, filter="none"), "must not exceed"),
        (CurriculumSettings(low=0.4, high=0.6), "keeps no group: with groups of 3"),
        (CurriculumSettings(kwargs={"power": 2.0}, filter="none"), "band takes none"),
        (CurriculumSettings(draw="learning_progress", discount=1.0, filter="none"), "below 1"),
    ):
        (found,) = chosen.conflicts(group_size=3)
        assert message in found
