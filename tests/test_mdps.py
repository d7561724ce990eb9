"""The known answers that learners are held to, themselves held to enumeration, simulation and closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from replay.schema import WindowBatch
from tests.mdps_for_tests import (
    REST,
    VOID,
    Array,
    ImplicitBackup,
    Mdp,
    Regulator,
    SoftBackup,
    chain,
    chunk,
    decoupled,
    expectile,
    fixed_point,
    grid,
    n_step,
    one_step,
    regulator_windows,
    solve,
    windows,
)

MDPS = {"chain": chain(), "grid": grid()}
HALF = Fraction(1, 2)


@pytest.fixture(params=list(MDPS))
def mdp(request: pytest.FixtureRequest) -> Mdp:
    return MDPS[request.param]


def uneven(mdp: Mdp) -> NDArray[np.int64]:
    """A behaviour policy that takes its last action twice as often as the others, its first one in odd states never."""
    counts = np.ones((mdp.states, mdp.actions), np.int64)
    counts[:, -1] = 2
    counts[1::2, 0] = 0
    return counts


def policy_values(mdp: Mdp, policies: NDArray[np.int64], reward: Array, reached: Array) -> Array:
    """Values (policies, states) of `policies` (policies, states) that map states to columns of `reward` and `reached`."""
    state = np.arange(mdp.states)
    solved = np.linalg.solve(np.eye(mdp.states) - reached[state, policies], reward[state, policies][..., None])
    return np.asarray(solved[..., 0], np.float64)


def policies_of(mdp: Mdp, choices: int) -> NDArray[np.int64]:
    """Every map from the live states to `choices`; 0 in terminal ones."""
    found = np.zeros((choices ** len(mdp.live), mdp.states), np.int64)
    found[:, mdp.live] = np.array(list(itertools.product(range(choices), repeat=len(mdp.live))))
    return found


def largest(first: Array, second: Array) -> float:
    return float(np.abs(first - second).max())


def span(mdp: Mdp, values: Array) -> float:
    return float(np.ptp(values[mdp.live]))


# ------------------------------------------------------------------------------------------------ finite problems


def test_one_step_is_the_best_of_every_policy(mdp: Mdp) -> None:
    reward, step = mdp.one()
    best = policy_values(mdp, policies_of(mdp, mdp.actions), reward, step).max(0)
    assert largest(one_step(mdp)[mdp.live], (reward + step @ best)[mdp.live]) < 1e-12


def test_chunk_is_the_best_of_every_open_loop_policy() -> None:
    for problem, length in ((chain(), 2), (_fork(), 2), (_fork(), 3)):
        reward, reached = problem.sequences(length)
        best = policy_values(problem, policies_of(problem, problem.actions**length), reward, reached).max(0)
        assert largest(chunk(problem, length)[problem.live], (reward + reached @ best)[problem.live]) < 1e-12


def _fork() -> Mdp:
    """A state that leads to one of two, which want opposite actions: knowing which is worth more than guessing."""
    counts, rewards = np.zeros((4, 2, 4), np.int64), np.zeros((4, 2, 4))
    counts[0, :, 1] = counts[0, :, 2] = 1
    counts[0, 1, 0] = 1
    counts[1, :, 3] = counts[2, :, 3] = counts[3, :, 3] = 1
    rewards[1, 0, 3] = rewards[2, 1, 3] = 1.0
    return Mdp("fork", counts, rewards, np.arange(4) == 3, 0.9)


def test_open_loop_values_of_the_fork_by_hand() -> None:
    q = one_step(_fork())
    assert q[0, 0] == pytest.approx(0.9)
    assert q[0, 1] == pytest.approx((0.9 * (1 + 1 + 0.9)) / 3)
    sequence = chunk(_fork(), 2)[0]  # (0, 0), (0, 1): the second action is right in one of two cases
    assert sequence[:2] == pytest.approx([0.45, 0.45])
    # (1, a): in one of three cases the fork is met again, and the sequence's second action is taken there.
    value = sequence.max()
    assert sequence[2] == pytest.approx(0.9 / 3 * 1 + 0.9 / 3 * 0.9 * 1.0)
    assert sequence[3] == pytest.approx(0.9 / 3 * 1 + 0.9 / 3 * (0.9 * (0.9 + 0.9 + 0.9 * value) / 3) / 0.9)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_sequences_are_what_simulation_finds(length: int, mdp: Mdp) -> None:
    generator = np.random.default_rng(length)
    reward, reached = mdp.sequences(length)
    runs = 4000
    cumulative = mdp.probability.cumsum(-1)
    for state, number in zip(
        mdp.live.tolist(), generator.integers(mdp.actions**length, size=len(mdp.live)), strict=True
    ):
        actions = np.unravel_index(number, (mdp.actions,) * length)
        at, gained, alive = np.full(runs, state), np.zeros(runs), np.ones(runs, bool)
        for i, action in enumerate(actions):
            after = (generator.random((runs, 1)) > cumulative[at, action]).sum(-1)
            gained += alive * mdp.discount**i * mdp.rewards[at, action, after]
            at, alive = after, alive & ~mdp.terminal[after]
        ended = np.bincount(at[alive], minlength=mdp.states) * mdp.discount**length / runs
        assert gained.mean() == pytest.approx(reward[state, number], abs=0.06)
        np.testing.assert_allclose(ended, reached[state, number], atol=0.04)


def test_targets_agree_where_they_must(mdp: Mdp) -> None:
    """And differ by much more than a learner may err where they must not, so one target cannot pass for another."""
    q = one_step(mdp)
    for same in (n_step(mdp, 1), chunk(mdp, 1), decoupled(mdp, 1, 1, 0.9)[0]):
        assert largest(q, same) < 1e-12
    assert largest(n_step(mdp, 3, cut=Fraction(1)), q) < 1e-12
    greedy = np.eye(mdp.actions, dtype=np.int64)[q.argmax(-1)]
    assert largest(n_step(mdp, 3, greedy), q) < 1e-12, "data of the best policy: no bias is left to correct"
    assert largest(decoupled(mdp, 2, 2, 0.7)[0], chunk(mdp, 2)) < 1e-12
    assert largest(decoupled(mdp, 2, 1, 0.5)[0], n_step(mdp, 2)) < 1e-12, "the mean over uniformly random rests"
    best_rest = chunk(mdp, 2).reshape(mdp.states, mdp.actions, -1).max(-1)
    assert largest(decoupled(mdp, 2, 1, 1 - 1e-9)[0], best_rest) < 1e-6
    assert (best_rest <= q + 1e-12).all()

    apart = [q, n_step(mdp, 2), n_step(mdp, 2, uneven(mdp)), n_step(mdp, 2, cut=HALF), decoupled(mdp, 2, 1, 0.8)[0]]
    apart += [best_rest] if mdp.name == "grid" else []
    for first, second in itertools.combinations(apart, 2):
        assert largest(first[mdp.live], second[mdp.live]) > 0.05 * span(mdp, q)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_sequences_lose_nothing_on_the_deterministic_chain(length: int) -> None:
    mdp = chain()
    best_rest = chunk(mdp, length).reshape(mdp.states, mdp.actions, -1).max(-1)
    assert largest(best_rest, one_step(mdp)) < 1e-12


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0.02, 0.98))
def test_expectile_balances_what_lies_above_and_below(values: list[float], share: float) -> None:
    y = np.array(values)
    q = expectile(y, share)
    assert abs(np.sum(np.where(y >= q, share, 1 - share) * (y - q))) < 1e-9
    assert y.min() - 1e-9 <= q <= y.max() + 1e-9


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_weighted_cross_entropy_has_the_same_expectile(share: float) -> None:
    """Gradient descent on cross-entropies to two-hot labels, weighted by the sign of target − predicted mean."""
    y, atoms = np.array([-0.9, -0.2, 0.15, 0.7]), np.linspace(-1, 1, 5)
    labels = np.stack([np.interp(y, atoms, row) for row in np.eye(5)], -1)
    logits = np.zeros(5)
    for _ in range(20_000):
        probability = np.exp(logits) / np.exp(logits).sum()
        weight = np.where(y >= probability @ atoms, share, 1 - share)
        logits -= 0.2 * (weight[:, None] * (probability - labels)).sum(0)
    assert probability @ atoms == pytest.approx(float(expectile(y, share)), abs=1e-3)


# --------------------------------------------------------------------------------------- data of the finite problems


def tabular(
    mdp: Mdp,
    batch: WindowBatch,
    value: Callable[[Array], Array],
    columns: Callable[[NDArray[np.int64]], int],
    size: int,
) -> Callable[[Array], Array]:
    """The operator that fits a table to a batch: the mean over its windows of reward + discount · value(table)[last state].

    `columns` gives the table's column from the window's actions; a terminated window fills every completion of them.
    """

    def operator(table: Array) -> Array:
        last = value(table)
        total, count = np.zeros((mdp.states, size)), np.zeros((mdp.states, size))
        reward, discount = batch.returns(mdp.discount)
        for row, length, gained, factor in zip(batch.steps, batch.length, reward, discount, strict=True):
            state, after = (int(row["observation"][i].argmax()) for i in (0, length))
            horizon = len(row) - 1
            known = row["action"][:length].tolist()
            missing = horizon - length if row["is_terminal"][length] else 0
            complete = [(*known, *more) for more in itertools.product(range(mdp.actions), repeat=missing)]
            for actions in complete:
                column = columns(np.array(actions))
                total[state, column] += (gained + factor * last[after]) / len(complete)
                count[state, column] += 1 / len(complete)
        return np.divide(total, count, out=np.zeros_like(total), where=count > 0)

    return operator


@pytest.mark.parametrize("cut", [Fraction(0), HALF])
def test_windows_have_the_expectations_of_n_step(cut: Fraction, mdp: Mdp) -> None:
    for behaviour in (None, uneven(mdp)):
        batch = windows(mdp, 2, behaviour=behaviour, cut=cut)
        answer = n_step(mdp, 2, behaviour, cut)
        operator = tabular(mdp, batch, lambda q: q.max(-1), lambda a: int(a[0]), mdp.actions)
        assert largest(operator(answer)[mdp.live], answer[mdp.live]) < 1e-6


def test_windows_have_the_expectations_of_sequences(mdp: Mdp) -> None:
    def number(actions: NDArray[np.int64]) -> int:
        return int(np.ravel_multi_index(tuple(actions), (mdp.actions,) * len(actions)))

    batch = windows(mdp, 2)
    answer = chunk(mdp, 2)
    operator = tabular(mdp, batch, lambda q: q.max(-1), number, mdp.actions**2)
    assert largest(operator(answer)[mdp.live], answer[mdp.live]) < 1e-6
    prefix, full = decoupled(mdp, 2, 1, 0.8)
    operator = tabular(
        mdp, batch, lambda q: expectile(q.reshape(mdp.states, mdp.actions, -1), 0.8).max(-1), number, mdp.actions**2
    )
    assert largest(operator(full)[mdp.live], full[mdp.live]) < 1e-6
    assert largest(expectile(full.reshape(mdp.states, mdp.actions, -1), 0.8), prefix) < 1e-12


def test_rest_of_a_sequence_is_even_in_the_windows(mdp: Mdp) -> None:
    """Where a window goes on, each next action is taken equally often after each state and first action."""
    batch = windows(mdp, 2)
    whole = batch.steps[batch.length == 2]
    state = whole["observation"][:, 0].argmax(-1)
    table = np.zeros((mdp.states, mdp.actions, mdp.actions))
    np.add.at(table, (state, whole["action"][:, 0], whole["action"][:, 1]), 1)
    assert (table == table[..., :1]).all()


def test_rows_after_a_window_repeat_its_last(mdp: Mdp) -> None:
    horizon = 3 if mdp.name == "chain" else 2
    batch = windows(mdp, horizon, cut=HALF)
    assert set(batch.length.tolist()) == set(range(1, horizon + 1))
    for row, length in zip(batch.steps, batch.length, strict=True):
        assert (row[length:] == row[length]).all()
        assert (row["reward"][length:] == VOID).all()
        assert row["is_terminal"][length] == mdp.terminal[row["observation"][length].argmax()]
        assert not row["is_terminal"][:length].any()
        assert not row["is_last"][:length].any()
    cut_short = (batch.length < horizon) & ~np.take_along_axis(batch.steps["is_terminal"], batch.length[:, None], 1)[
        :, 0
    ]
    assert cut_short.any()


# ---------------------------------------------------------------------------------------- linear-quadratic regulator

STATES = np.linspace(-1, 1, 9)


def test_regulator_without_entropy_is_the_riccati_solution() -> None:
    problem = Regulator(temperature=1e-4)
    p, k = problem.riccati()
    after = problem.decay - problem.gain * k
    assert p == pytest.approx(1 + problem.price * k**2 + problem.discount * p * after**2)
    assert k < 1, "actions must not meet their bounds"
    found = solve(problem, SoftBackup(problem.temperature, 1))
    np.testing.assert_allclose(found.v(STATES), -p * STATES**2, atol=4e-3)
    np.testing.assert_allclose(np.tanh(found.policy[0][:, 0]), -k * found.states, atol=2e-2)
    x, a = np.meshgrid(STATES, STATES)
    expected = -(x**2) - problem.price * a**2 - problem.discount * p * (problem.decay * x + problem.gain * a) ** 2
    np.testing.assert_allclose(found.q(x, a[..., None]), expected, atol=1e-3)


@pytest.mark.parametrize(("length", "prefix", "share"), [(1, 1, 0.5), (2, 1, 0.5), (2, 2, 0.5), (2, 1, 0.8)], ids=str)
def test_no_policy_of_the_class_is_better_and_its_value_is_what_it_earns(
    length: int, prefix: int, share: float
) -> None:
    problem = Regulator()
    soft = SoftBackup(problem.temperature, prefix)
    found = solve(problem, soft, length=length, prefix=prefix, share=share)
    generator = np.random.default_rng(0)
    at = np.concatenate(found.policy, -1)
    best = soft.objective(found.q, found.states, at)
    np.testing.assert_allclose(found.v(found.states), best, atol=1e-9)
    for scale in (0.01, 0.1, 1.0):
        for _ in range(20):
            other = at + scale * generator.standard_normal(at.shape)
            assert (soft.objective(found.q, found.states, other) <= best + 1e-9).all()

    # E[Q − α log π] again, by plain sampling, and Q by playing the windows of the data.
    mean, deviation = found.policy[0][3], np.exp(found.policy[1][3])
    noise = generator.standard_normal((40_000, prefix))
    u = mean + deviation * noise
    action = np.tanh(u)
    log_prob = (-0.5 * noise**2 - np.log(deviation) - 0.5 * np.log(2 * np.pi) - np.log(1 - action**2)).sum(-1)
    x = np.full(len(u), found.states[3])
    sampled = found.q(x, action) - problem.temperature * log_prob
    assert sampled.mean() == pytest.approx(float(best[3]), abs=5e-3)


def test_values_of_the_regulator_by_simulation() -> None:
    """The soft return of the solved policy, summed over rollouts, is its value."""
    problem = Regulator()
    found = solve(problem, SoftBackup(problem.temperature, 1))
    generator = np.random.default_rng(1)
    means, deviations = found.policy
    order = np.argsort(found.states)
    x = np.repeat([-0.9, 0.1, 0.6], 5000)
    start, total = x, np.zeros(len(x))
    for t in range(60):
        noise = generator.standard_normal(len(x))
        mean = np.interp(x, found.states[order], means[order, 0])
        log_deviation = np.interp(x, found.states[order], deviations[order, 0])
        action = np.tanh(mean + np.exp(log_deviation) * noise)
        log_prob = -0.5 * noise**2 - log_deviation - 0.5 * np.log(2 * np.pi) - np.log(1 - action**2)
        reward, after = problem.play(x, action[:, None])
        total += problem.discount**t * (reward - problem.temperature * log_prob)
        x = after
    np.testing.assert_allclose(total.reshape(3, -1).mean(1), found.v(start.reshape(3, -1)[:, 0]), atol=0.01)


def test_targets_of_the_regulator_differ() -> None:
    """By more than a learner may err, so that one target cannot pass for another, nor a lost entropy term for none."""
    problem = Regulator()
    x, a = np.meshgrid(STATES, STATES)
    targets: list[dict[str, Any]] = [{}, {"length": 2}, {"length": 2, "share": 0.8}]

    def answers(backup: Callable[[], SoftBackup | ImplicitBackup]) -> list[Array]:
        return [solve(problem, backup(), **target).q(x, a[..., None]) for target in targets]

    soft = answers(lambda: SoftBackup(problem.temperature, 1))
    soft.append(solve(problem, SoftBackup(1e-4, 1)).q(x, a[..., None]))
    quantile = answers(lambda: ImplicitBackup("quantile", 0.7))
    implicit = answers(lambda: ImplicitBackup("expectile", 0.7))
    for family in (soft, quantile, implicit, *zip(quantile, implicit, strict=True)):
        for first, second in itertools.combinations(family, 2):
            assert largest(first, second) > 0.02 * np.ptp(first)


@pytest.mark.parametrize("kind", ["quantile", "expectile"])
def test_implicit_values_by_sampling(kind: str) -> None:
    found = solve(Regulator(), ImplicitBackup(kind, 0.7, 2), length=2, prefix=2)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 100_000, 2))
    x = np.array([-1.0, 0.2, 0.7])
    values = found.q(x[:, None], actions)
    expected = np.quantile(values, 0.7, axis=-1) if kind == "quantile" else expectile(values, 0.7)
    np.testing.assert_allclose(found.v(x), expected, atol=5e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 100))
def test_windows_of_the_regulator_are_its_own(length: int, prefix: int, seed: int) -> None:
    problem, prefix = Regulator(), min(prefix, length)
    batches = regulator_windows(problem, length=length, prefix=prefix, count=64, batches=2, seed=seed)
    for batch in batches:
        steps = batch.steps
        x, a, reward = steps["observation"][..., 0], steps["action"][..., 0], steps["reward"]
        assert np.abs(x).max() <= 1
        assert np.abs(a).max() <= 1
        np.testing.assert_allclose(reward[:, :-1], -(x**2 + problem.price * a**2)[:, :-1], atol=1e-6)
        np.testing.assert_allclose(x[:, 1:], 0.5 * x[:, :-1] + 0.5 * a[:, :-1], atol=1e-6)
        assert len(batch) == 64 * len(REST) ** (length - prefix)
        rest = a[:, prefix:length].reshape(64, len(batch) // 64, length - prefix)
        assert all(len(np.unique(rows, axis=0)) == len(rows) for rows in rest), "each combination once"
        # The points fill the square: no quarter of it has fewer than a fifth of them.
        share = np.histogram2d(x[:, 0], a[:, 0], bins=2, range=[[-1, 1], [-1, 1]])[0] / len(batch)
        assert share.min() > 0.2
    assert not np.array_equal(batches[0].steps, batches[1].steps)


def test_a_contraction_is_needed() -> None:
    with pytest.raises(AssertionError, match="contract"):
        fixed_point(lambda v: v + 1.0, np.zeros(1))
