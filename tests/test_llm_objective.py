"""The objective of the language model's policy gradient: examples by hand, identities, and plain references.

Hand-computed examples show their arithmetic; log-probabilities are written as logarithms of simple fractions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.policy_gradient import EntropySettings, KlSettings, PolicyGradientSettings, TeacherSettings
from learners.classes import ModuleError
from learners.llm import advantages, divergences, entropy_control, losses, shaping, step_credit, subsample
from learners.llm.aggregation import Mean, token_total, token_weights
from learners.llm.losses import Losses, Tokens, make_loss

MEANS: tuple[Mean, ...] = ("token", "sequence", "constant")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*probabilities: float) -> Tensor:
    return real(*probabilities).log()


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def gradient(loss: Callable[[Tensor], Tensor], new: Tensor) -> Tensor:
    """Of the sum of the per-token losses by each token's log-probability."""
    variable = new.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(variable).sum(), variable)
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


# Advantages


def test_advantages_by_hand() -> None:
    # Group 7: rewards 1, 0, 0; mean 1/3, deviations 2/3, −1/3, −1/3, squares 4/9 + 1/9 + 1/9 = 2/3.
    # Group −2: rewards 3, 1; mean 2, deviations 1, −1, squares 2. The rows lie mixed.
    reward, group = real(1, 3, 0, 0, 1), whole(7, -2, 7, 7, -2)
    # Unbiased: sqrt((2/3)/2) = sqrt(1/3) = 0.5773503, 2/3 / 0.5773503 = 1.1547005; sqrt(2/1) = 1.4142136, 1 / that = 0.7071068.
    expected = real(1.1547005, 0.7071068, -0.5773503, -0.5773503, -0.7071068)
    close(advantages.grpo(reward, group, epsilon=0.0), expected, 1e-7)
    # With epsilon 1e-6: 2/3 / (0.57735027 + 0.000001) = 1.15469854.
    assert float(advantages.grpo(reward, group)[0]) == pytest.approx(1.15469854, abs=1e-8)
    # Population: sqrt((2/3)/3) = 0.4714045, 2/3 / that = sqrt 2; sqrt(2/2) = 1.
    expected = real(math.sqrt(2), 1, -math.sqrt(0.5), -math.sqrt(0.5), -1)
    close(advantages.grpo(reward, group, population=True, epsilon=0.0), expected)
    close(advantages.dr_grpo(reward, group), real(2 / 3, 1, -1 / 3, -1 / 3, -1))
    # Means of the others: 0, 1/2, 1/2; and 1, 3.
    close(advantages.rloo(reward, group), real(1 - 0, 3 - 1, 0 - 0.5, 0 - 0.5, 1 - 3))
    # Over the batch: squares 2/3 + 2 = 8/3, over 5 rows: sqrt(8/15) = 0.7302967; 2/3 / that = 0.9128709, 1 / that = 1.3693064.
    expected = real(0.9128709, 1.3693064, -0.4564355, -0.4564355, -1.3693064)
    close(advantages.whiten(reward, group, epsilon=0.0), expected, 1e-7)
    close(advantages.sign(flags(1, 0)), real(0.1, -1.0), 1e-7)
    close(advantages.sign(flags(1, 0), positive_weight=1.0, negative_weight=0.0), real(1.0, 0.0))
    close(advantages.pass_rate(flags(1, 1, 0, 0, 0), group), real(1 / 3, 0.5, 1 / 3, 1 / 3, 0.5), 1e-7)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    group = draw(st.lists(st.sampled_from([-5, 0, 3, 2**40]), min_size=1, max_size=24))
    reward = st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0, 10.0])
    return draw(st.lists(reward, min_size=len(group), max_size=len(group))), group


@given(batches())
@settings(deadline=None)
def test_advantages_are_those_of_a_loop_over_the_groups(batch: tuple[list[float], list[int]]) -> None:
    reward, group = batch
    expected: dict[str, list[float]] = {name: [] for name in ("grpo", "population", "dr_grpo", "rloo")}
    for one, label in zip(reward, group, strict=True):
        same = [r for r, g in zip(reward, group, strict=True) if g == label]
        varies, size = max(same) > min(same), len(same)
        deviation = one - float(np.mean(same))
        expected["grpo"].append(deviation / (float(np.std(same, ddof=1)) + 1e-6) if varies else 0.0)
        expected["population"].append(deviation / float(np.std(same)) if varies else 0.0)
        expected["dr_grpo"].append(deviation if varies else 0.0)
        expected["rloo"].append(one - (sum(same) - one) / (size - 1) if varies else 0.0)
    r, g = real(*reward), whole(*group)
    close(advantages.grpo(r, g), real(*expected["grpo"]))
    close(advantages.grpo(r, g, population=True, epsilon=0.0), real(*expected["population"]))
    close(advantages.dr_grpo(r, g), real(*expected["dr_grpo"]))
    close(advantages.rloo(r, g), real(*expected["rloo"]))
    squares = np.mean(np.square(expected["dr_grpo"]))
    close(advantages.whiten(r, g), real(*expected["dr_grpo"]) / (math.sqrt(squares) + 1e-6))


@given(st.integers(2, 16), st.data())
@settings(deadline=None)
def test_squared_advantages_of_a_group_add_up_to_its_size(size: int, data: st.DataObject) -> None:
    passes = data.draw(st.integers(1, size - 1))
    reward = torch.tensor([1.0] * passes + [0.0] * (size - passes), dtype=torch.float64)
    group = torch.zeros(size, dtype=torch.int64)
    found = advantages.grpo(reward, group, population=True, epsilon=0.0)
    assert float(found.square().sum()) == pytest.approx(size)
    c = passes / size  # What a pass has: sqrt((1 − c) / c); a failure: −sqrt(c / (1 − c)).
    assert float(found[0]) == pytest.approx(math.sqrt((1 - c) / c))
    assert float(found[-1]) == pytest.approx(-math.sqrt(c / (1 - c)))
    assert float(advantages.dr_grpo(reward, group).square().sum()) == pytest.approx(size * c * (1 - c))
    close(advantages.rloo(reward, group), size / (size - 1) * advantages.dr_grpo(reward, group))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "whiten"])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.3, 0.1 + 0.2, 0.3], [0.0, 1e-9], [1.0]])
def test_groups_without_variance_have_no_advantage(name: str, rewards: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        reward = torch.tensor(rewards, dtype=dtype)
        for epsilon in ({}, {"epsilon": 0.0}) if name == "grpo" else ({},):
            found = getattr(advantages, name)(reward, torch.zeros(len(reward), dtype=torch.int64), **epsilon)
            assert found.dtype == dtype
            assert found.tolist() == [0.0] * len(rewards)


def test_deviation_of_whiten_is_that_of_all_learners() -> None:
    reward, group = real(1, 0, 0, 4, 2, 2), whole(0, 0, 0, 1, 1, 1)
    sums: list[Tensor] = []

    def record(local: Tensor) -> Tensor:
        sums.append(local)
        return local

    for rows in (slice(0, 3), slice(3, 6)):
        advantages.whiten(reward[rows], group[rows], total=record)
    parts = [
        advantages.whiten(reward[rows], group[rows], total=lambda local: sums[0] + sums[1])
        for rows in (slice(0, 3), slice(3, 6))
    ]
    close(torch.cat(parts), advantages.whiten(reward, group))


def test_advantages_refuse_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"finite rewards, got nan in row 1"):
        advantages.grpo(real(1, math.nan), whole(0, 0))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        advantages.rloo(real(1, 0), whole(0, 0, 0))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_objective_for_tests.py").write_text(
        "import torch\n"
        "from learners.llm.losses import Losses\n"
        "number = 3\n"
        "def centred(reward, group, passed): return reward - reward.mean()\n"
        "def integers(reward, group, passed): return group\n"
        "def infinite(reward, group, passed): return reward / 0\n"
        "def short(reward, group): return reward\n"
        "def squares(tokens): return tokens.advantage * (tokens.new - tokens.old) ** 2\n"
        "def both(tokens): return Losses(-tokens.new, tokens.advantage > 0)\n"
        "def one(tokens): return tokens.new.sum()\n"
        "def counted(tokens): return Losses(-tokens.new, (tokens.advantage > 0).sum())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_all_names_of_advantages_can_be_made(own: None) -> None:
    reward, group, passed = real(1, 0, 0, 5, 1), whole(0, 0, 0, 1, 1), flags(1, 0, 0, 1, 0)
    expected = {
        "grpo": advantages.grpo(reward, group),
        "dr_grpo": advantages.dr_grpo(reward, group),
        "rloo": advantages.rloo(reward, group),
        "whiten": advantages.whiten(reward, group),
        "sign": real(0.5, -2, -2, 0.5, -2),
        "own_objective_for_tests:centred": reward - 1.4,
    }
    for name, value in expected.items():
        chosen = PolicyGradientSettings(advantage=name, positive_weight=0.5, negative_weight=2.0)
        close(advantages.make_advantage(chosen)(reward, group, passed), value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_anywhere:f", "importing the module"),
        ("own_objective_for_tests:missing", "has nothing named 'missing'"),
        ("own_objective_for_tests:number", "holds int, expected a function"),
        ("own_objective_for_tests:short", r"expected a function of \(reward, group, passed\)"),
    ],
)
def test_own_functions_that_cannot_be_had_say_why(own: None, name: str, message: str) -> None:
    with pytest.raises(ModuleError, match=message):
        advantages.make_advantage(PolicyGradientSettings(advantage=name))


def test_what_own_functions_return_is_checked(own: None) -> None:
    reward, group = real(1, 0), whole(0, 0)
    for name, message in (
        ("integers", r"floating-point .* got torch.int64"),
        ("infinite", "finite numbers; 2 are not"),
    ):
        made = advantages.make_advantage(PolicyGradientSettings(advantage=f"own_objective_for_tests:{name}"))
        with pytest.raises(ValueError, match=message):
            made(reward, group, reward > 0)
    tokens = Tokens(new=logs(0.5, 0.5), old=logs(0.5, 0.25), advantage=real(1, -1), sequence=whole(0, 0))
    squares = make_loss(PolicyGradientSettings(loss="own_objective_for_tests:squares"))(tokens)
    close(squares.per_token, real(0.0, -(math.log(2) ** 2)))
    assert squares.clipped.tolist() == [False, False]
    assert make_loss(PolicyGradientSettings(loss="own_objective_for_tests:both"))(tokens).clipped.tolist() == [
        True,
        False,
    ]
    with pytest.raises(ValueError, match=r"shape \(2,\), got torch.float64 of shape \(\)"):
        make_loss(PolicyGradientSettings(loss="own_objective_for_tests:one"))(tokens)
    with pytest.raises(ValueError, match=r"clipped to be bool of shape \(2,\), got torch.int64 of shape \(\)"):
        make_loss(PolicyGradientSettings(loss="own_objective_for_tests:counted"))(tokens)


# Losses: value, gradient by log π, and clipped tokens. Ratios are 3/2, 1/2, 5, 1/2 and 1.1 in turn.

OLD = logs(0.5, 0.5, 0.1, 0.5, 0.5)
NEW = logs(0.75, 0.25, 0.5, 0.25, 0.55)
ADVANTAGE = real(1.0, 1.0, -2.0, -1.0, -1.0)


def check(loss: Callable[[Tensor], Losses], value: Tensor, slope: Tensor, clipped: list[int]) -> None:
    found = loss(NEW)
    close(found.per_token, value)
    close(gradient(lambda new: loss(new).per_token, NEW), slope)
    assert found.clipped.tolist() == [bool(one) for one in clipped]


def test_clip_by_hand() -> None:
    # min(1.5·1, 1.28·1) = 1.28; min(0.5, 0.8) = 0.5; min(5·−2, 1.28·−2) = −10; min(0.5·−1, 0.8·−1) = −0.8; min(−1.1, −1.1).
    # The slope of −ρ A by log π is −ρ A itself, and 0 where the clipped one is the least.
    value, slope = real(-1.28, -0.5, 10.0, 0.8, 1.1), real(0.0, -0.5, 10.0, 0.0, 1.1)
    check(lambda new: losses.clip(new, OLD, ADVANTAGE), value, slope, [1, 0, 0, 1, 0])
    # With low 0.6, high 0.6 the bounds are 0.4 and 1.6, and no surrogate is changed but that of the third, which min keeps.
    value = slope = real(-1.5, -0.5, 10.0, 0.5, 1.1)
    check(lambda new: losses.clip(new, OLD, ADVANTAGE, low=0.6, high=0.6), value, slope, [0, 0, 0, 0, 0])
    # Dual at 3: a loss of at most 3·2 = 6 in place of 10; 3·1 = 3 is above 0.8 and 1.1.
    value, slope = real(-1.28, -0.5, 6.0, 0.8, 1.1), real(0.0, -0.5, 0.0, 0.0, 1.1)
    check(lambda new: losses.clip(new, OLD, ADVANTAGE, dual=3.0), value, slope, [1, 0, 1, 1, 0])


def test_reinforce_by_hand() -> None:
    # −A log π: −log 0.75, −log 0.25, 2 log 0.5, log 0.25, log 0.55; slope −A.
    value = real(-math.log(0.75), -math.log(0.25), 2 * math.log(0.5), math.log(0.25), math.log(0.55))
    check(lambda new: losses.reinforce(new, ADVANTAGE), value, real(-1, -1, 2, 1, 1), [0] * 5)


def test_truncated_and_cispo_by_hand() -> None:
    # Weights min(ρ, 2): 1.5, 0.5, 2, 0.5, 1.1. Loss −w A log π, slope −w A.
    value = real(
        -1.5 * math.log(0.75), -0.5 * math.log(0.25), 4 * math.log(0.5), 0.5 * math.log(0.25), 1.1 * math.log(0.55)
    )
    check(lambda new: losses.truncated(new, OLD, ADVANTAGE), value, real(-1.5, -0.5, 4.0, 0.5, 1.1), [0, 0, 1, 0, 0])
    # Weights min(ρ, 1.28): 1.28, 0.5, 1.28, 0.5, 1.1: no token loses its gradient.
    value = real(
        -1.28 * math.log(0.75), -0.5 * math.log(0.25), 2.56 * math.log(0.5), 0.5 * math.log(0.25), 1.1 * math.log(0.55)
    )
    check(lambda new: losses.cispo(new, OLD, ADVANTAGE), value, real(-1.28, -0.5, 2.56, 0.5, 1.1), [1, 0, 1, 0, 0])
    close(
        losses.cispo(NEW, OLD, ADVANTAGE, high=1.0).per_token, losses.truncated(NEW, OLD, ADVANTAGE, cap=2.0).per_token
    )


def test_gspo_by_hand() -> None:
    # Completion 0 has ratios 4 and 1: s = exp((log 4 + 0) / 2) = 2. Completion 1 has 1.21: s = 1.21. Completion 2 has 0.25, 1: 0.5.
    old, new = logs(0.1, 0.5, 0.5, 0.4, 0.3), logs(0.4, 0.5, 0.605, 0.1, 0.3)
    sequence, advantage = whole(0, 0, 1, 2, 2), real(-1, -1, 1, 1, 1)

    def loss(one: Tensor) -> Losses:
        return losses.gspo(one, old, advantage, sequence, low=0.2, high=0.1)

    # min(2·−1, 1.1·−1) = −2 for both tokens; min(1.21, 1.1) = 1.1, cut off; min(0.5, 0.8) = 0.5.
    close(loss(new).per_token, real(2, 2, -1.1, -0.5, -0.5))
    close(gradient(lambda one: loss(one).per_token, new), real(2, 2, 0, -0.5, -0.5))
    assert loss(new).clipped.tolist() == [False, False, True, False, False]

    # Over the means of completions its gradient is that of the sequence form, −min(s A, clip(s) A), by finite differences.
    def sequence_form(one: Tensor) -> float:
        total = 0.0
        for number, a in ((0, -1.0), (1, 1.0), (2, 1.0)):
            s = math.exp(float((one - old)[sequence == number].mean()))
            total -= min(s * a, min(max(s, 0.8), 1.1) * a) / 3
        return total

    weight = token_weights("sequence", sequence, max_tokens=9)
    found = gradient(lambda one: loss(one).per_token * weight, new)
    close(found, differences(sequence_form, new), 1e-7)


def differences(function: Callable[[Tensor], float], point: Tensor, step: float = 1e-6) -> Tensor:
    rows = torch.eye(len(point), dtype=torch.float64) * step
    return real(*((function(point + row) - function(point - row)) / (2 * step) for row in rows))


def test_decoupled_by_hand() -> None:
    # proximal / old: 0.6/0.5 = 1.2, 1, 0.5/0.1 = 5 -> capped at 2, 0.5/0.5 = 1, 1. new / proximal: 1.25, 0.5, 1, 0.5, 1.1.
    proximal = logs(0.6, 0.5, 0.5, 0.5, 0.5)
    # 1.2 · min(1.25, 1.28) = 1.5; 1 · 0.5; 2 · min(1·−2) = −4; 1 · min(−0.5, −0.8) = −0.8, cut off; −1.1.
    value, slope = real(-1.5, -0.5, 4.0, 0.8, 1.1), real(-1.5, -0.5, 4.0, 0.0, 1.1)
    check(lambda new: losses.decoupled(new, OLD, proximal, ADVANTAGE), value, slope, [0, 0, 1, 1, 0])
    # A dual clip below the third's ratio of 1 is none; with new / proximal = 5 it would bind.
    far = losses.decoupled(NEW, OLD, OLD, ADVANTAGE, dual=3.0)
    close(far.per_token, losses.clip(NEW, OLD, ADVANTAGE, dual=3.0).per_token)


def test_nft_by_hand() -> None:
    # c = 1/4, weight sqrt(0.75 / 0.25) = sqrt 3. Ratios 1.5 (passed), 0.5 (failed), 2 (failed), 1 (failed, group of c = 0).
    old, new = logs(0.5, 0.5, 0.25, 0.5), logs(0.75, 0.25, 0.5, 0.5)
    passed, rate = flags(1, 0, 0, 0), real(0.25, 0.25, 0.25, 0.0)

    def loss(one: Tensor) -> Losses:
        return losses.nft(one, old, passed, rate)

    # Passed −log 1.5. Failed: (1 − 0.25·0.5)/0.75 = 7/6, −log(7/6); (1 − 0.25·2)/0.75 = 2/3 -> floor 1, −log 1 = 0.
    # Slopes: −1; c R / (1 − c) / (7/6) = (1/6)/(7/6) = 1/7; at the floor c R / (1 − c) / 1 = 2/3.
    root = math.sqrt(3)
    close(loss(new).per_token, root * real(-math.log(1.5), -math.log(7 / 6), 0.0, 0.0))
    close(gradient(lambda one: loss(one).per_token, new), root * real(-1, 1 / 7, 2 / 3, 0))
    assert loss(new).clipped.tolist() == [False, False, True, False]
    # Other weighings: 1 − c = 3/4, and 1. A floor of 1/2 is below 2/3: −log(2/3), slope (2/3)/(2/3) = 1.
    close(
        losses.nft(new, old, passed, rate, weighing="rloo").per_token[:2], 0.75 * real(-math.log(1.5), -math.log(7 / 6))
    )
    low = losses.nft(new, old, passed, rate, weighing="sign", floor=0.5)
    close(low.per_token, real(-math.log(1.5), -math.log(7 / 6), -math.log(2 / 3), 0.0))
    close(
        gradient(lambda one: losses.nft(one, old, passed, rate, weighing="sign", floor=0.5).per_token, new),
        real(-1, 1 / 7, 1, 0),
    )


def test_nft_bounds_pass_rate_and_ratio() -> None:
    # c = 1/100 becomes 0.02: weight sqrt(0.98/0.02) = 7. c = 0.99 becomes 0.98: sqrt(0.02/0.98) = 1/7, slope 0.98·R/0.02 = 49 R.
    old = logs(0.5, 0.5)
    passed, rate = flags(1, 0), real(0.01, 0.99)
    close(gradient(lambda one: losses.nft(one, old, passed, rate).per_token, old), real(-7.0, 49 / 7))
    # A log ratio above 10 counts as 10 and has no slope, and no rounding takes the floor away, in float32 neither.
    new = torch.tensor([-1.0, -1.0])
    found = losses.nft(new, new - 30, passed, rate.float(), floor=0.01, weighing="sign")
    close(found.per_token, real(-10.0, -math.log(0.01)), 1e-5)


def test_correction_by_hand() -> None:
    # Learner / actor 1.2, 0.5, 5; capped at 2.
    found = losses.correction(logs(0.6, 0.25, 0.5).requires_grad_(), logs(0.5, 0.5, 0.1), 2.0)
    close(found, real(1.2, 0.5, 2.0))
    assert not found.requires_grad


def test_no_ratio_overflows() -> None:
    new, old = torch.tensor([-1.0, -900.0, -1.0]), torch.tensor([-900.0, -1.0, -900.0])
    advantage, sequence = torch.tensor([-1.0, 1.0, 0.0]), whole(0, 1, 2)
    for name in ("clip", "truncated", "gspo", "cispo", "decoupled", "nft"):
        tokens = Tokens(
            new=new.clone().requires_grad_(),
            old=old,
            advantage=advantage,
            sequence=sequence,
            proximal=old,
            passed=flags(0, 1, 0),
            pass_rate=torch.full((3,), 0.5),
        )
        loss = make_loss(PolicyGradientSettings(loss=name))(tokens).per_token
        (slope,) = torch.autograd.grad(loss.sum(), tokens.new)
        assert loss.isfinite().all(), name
        assert slope.isfinite().all(), name


def test_settings_reach_the_losses() -> None:
    proximal = logs(0.6, 0.5, 0.5, 0.5, 0.5)
    tokens = Tokens(
        new=NEW,
        old=OLD,
        advantage=ADVANTAGE,
        sequence=whole(0, 0, 1, 1, 2),
        proximal=proximal,
        passed=ADVANTAGE > 0,
        pass_rate=real(0.5, 0.5, 0.25, 0.25, 0.25),
    )
    low, high, dual, cap = 0.3, 0.4, 4.0, 1.1
    expected = {
        "clip": losses.clip(NEW, OLD, ADVANTAGE, low=low, high=high, dual=dual),
        "reinforce": losses.reinforce(NEW, ADVANTAGE),
        "truncated": losses.truncated(NEW, OLD, ADVANTAGE, cap=cap),
        "gspo": losses.gspo(NEW, OLD, ADVANTAGE, tokens.sequence, low=low, high=high),
        "cispo": losses.cispo(NEW, OLD, ADVANTAGE, high=high),
        "decoupled": losses.decoupled(NEW, OLD, proximal, ADVANTAGE, low=low, high=high, dual=dual, cap=cap),
        "nft": losses.nft(NEW, OLD, ADVANTAGE > 0, real(0.5, 0.5, 0.25, 0.25, 0.25), floor=0.7, weighing="dr_grpo"),
    }
    for name, value in expected.items():
        chosen = PolicyGradientSettings(
            loss=name,
            advantage="dr_grpo",
            clip_low=low,
            clip_high=high,
            dual_clip=dual,
            weight_cap=cap,
            negative_floor=0.7,
        )
        found = make_loss(chosen)(tokens)
        close(found.per_token, value.per_token)
        assert torch.equal(found.clipped, value.clipped)
        assert losses.needs_proximal(chosen) == (name == "decoupled")
    bare = Tokens(new=NEW, old=OLD, advantage=ADVANTAGE, sequence=tokens.sequence)
    for name, missing in (("decoupled", "proximal"), ("nft", "passed")):
        with pytest.raises(ValueError, match=rf"{name} needs Tokens\.{missing}"):
            make_loss(PolicyGradientSettings(loss=name))(bare)


@pytest.mark.parametrize("name", ["clip", "truncated", "gspo", "cispo", "decoupled"])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_on_policy_every_loss_has_the_gradient_of_reinforce(name: str, dual: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    new = -torch.rand(9, generator=generator, dtype=torch.float64)
    tokens = {"old": new, "proximal": new, "sequence": whole(0, 0, 0, 1, 1, 2, 2, 2, 2)}
    advantage = real(1.5, -0.5, 0.25)[tokens["sequence"]]
    loss = make_loss(PolicyGradientSettings(loss=name, dual_clip=dual))
    found = gradient(lambda one: loss(Tokens(new=one, advantage=advantage, **tokens)).per_token, new)
    close(found, gradient(lambda one: losses.reinforce(one, advantage).per_token, new))
    assert not loss(Tokens(new=new, advantage=advantage, **tokens)).clipped.any()


@given(st.integers(2, 16), st.data())
@settings(deadline=None)
def test_on_policy_nft_has_the_gradient_of_grpo_with_the_population_deviation(size: int, data: st.DataObject) -> None:
    passes = data.draw(st.integers(0, size))
    passed = torch.arange(size) < passes
    group = torch.zeros(size, dtype=torch.int64)
    new = -torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    rate = advantages.groups(passed, group).mean

    def same(weighing: str, advantage: Tensor) -> None:
        found = gradient(lambda one: losses.nft(one, new, passed, rate, weighing=weighing).per_token, new)
        close(found, gradient(lambda one: losses.clip(one, new, advantage).per_token, new))

    same("grpo", advantages.grpo(passed.double(), group, population=True, epsilon=0.0))
    same("dr_grpo", advantages.dr_grpo(passed.double(), group))


def test_gradients_against_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    old, new, other = -2 * torch.rand((3, 40), generator=generator, dtype=torch.float64) - 0.1
    advantage = torch.randn(40, generator=generator, dtype=torch.float64)
    passed, rate = advantage > 0, torch.full((40,), 0.3, dtype=torch.float64)
    # Where no gradient is held back on purpose, the derivative of the value is the gradient.
    smooth: list[Callable[[Tensor], Tensor]] = [
        lambda one: losses.clip(one, old, advantage, dual=2.0).per_token,
        lambda one: losses.reinforce(one, advantage).per_token,
        lambda one: losses.decoupled(one, old, other, advantage).per_token,
        lambda one: losses.nft(one, new + 0.1, passed, rate, floor=1e-3).per_token,
        lambda one: divergences.k1(one, other),
        lambda one: divergences.k2(one, other),
        lambda one: divergences.k3(one, other),
        lambda one: divergences.importance(one, old) * divergences.k3(one, other),
        lambda one: entropy_control.kl_cov_penalty(one, old, passed, 0.7),
    ]

    def check_slope(loss: Callable[[Tensor], Tensor]) -> None:
        close(gradient(loss, new), differences(lambda one: float(loss(one).sum()), new), 1e-6)

    for loss in smooth:
        check_slope(loss)


# Aggregation


def test_weights_by_hand() -> None:
    # Completions of 1, 2 and 3 tokens; the last token of the third and all of the second are left out.
    sequence, mask = whole(0, 1, 1, 2, 2, 2), flags(1, 0, 0, 1, 1, 0)
    close(token_weights("token", sequence, max_tokens=4), real(*[1 / 6] * 6), 1e-7)
    close(token_weights("token", sequence, max_tokens=4, mask=mask), real(1, 0, 0, 1, 1, 0) / 3, 1e-7)
    # 3 completions of 1, 2 and 3 tokens; with the mask 2 of 1 and 2.
    close(token_weights("sequence", sequence, max_tokens=4), real(1, 1 / 2, 1 / 2, *[1 / 3] * 3) / 3, 1e-7)
    close(token_weights("sequence", sequence, max_tokens=4, mask=mask), real(1, 0, 0, 1 / 2, 1 / 2, 0) / 2, 1e-7)
    # 3 completions of at most 4 tokens: 1/12; with the mask 2: 1/8.
    close(token_weights("constant", sequence, max_tokens=4), real(*[1 / 12] * 6), 1e-7)
    close(token_weights("constant", sequence, max_tokens=4, mask=mask), real(1, 0, 0, 1, 1, 0) / 8, 1e-7)
    for mean in MEANS:
        nothing = token_weights(mean, sequence, max_tokens=4, mask=torch.zeros(6, dtype=torch.bool))
        assert nothing.tolist() == [0.0] * 6
        assert token_weights(mean, sequence[:0], max_tokens=4).tolist() == []
        assert token_weights(mean, sequence, max_tokens=4).dtype == torch.float32


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=12),
    st.integers(1, 3),
    st.sampled_from(MEANS),
    st.sampled_from(["clip", "gspo", "cispo"]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(deadline=None)
def test_micro_batches_of_several_learners_add_up_to_the_whole_batch(
    lengths: list[int], learners: int, mean: Mean, name: str, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), whole(*lengths))
    old, new = (-torch.rand(len(sequence), generator=generator, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(len(lengths), generator=generator, dtype=torch.float64)[sequence]
    mask = torch.rand(len(sequence), generator=generator) < 0.7 if masked else None
    loss = make_loss(PolicyGradientSettings(loss=name))

    def total(one: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        _, numbered = torch.unique(sequence[rows], return_inverse=True)
        part = Tokens(new=one[rows], old=old[rows], advantage=advantage[rows], sequence=numbered)
        return (loss(part).per_token * weight).sum()

    everything = torch.arange(len(sequence))
    weight = token_weights(mean, sequence, max_tokens=6, mask=mask)
    expected = gradient(lambda one: total(one, weight, everything), new)
    value = float(total(new, weight, everything))

    parts = [everything[sequence % learners == learner] for learner in range(learners)]
    masks = [None if mask is None else mask[rows] for rows in parts]
    divisor = sum(token_total(mean, sequence[rows], mask=m) for rows, m in zip(parts, masks, strict=True))

    def micro_batches(one: Tensor) -> Tensor:
        """The sum over all learners' micro-batches, of one completion each."""
        sums = []
        for rows, m in zip(parts, masks, strict=True):
            own_weight = token_weights(mean, sequence[rows], max_tokens=6, mask=m, total=divisor)
            for completion in torch.unique(sequence[rows]):
                here = sequence[rows] == completion
                sums.append(total(one, own_weight[here], rows[here]))
        return torch.stack(sums)

    assert float(micro_batches(new).sum()) == pytest.approx(value, abs=1e-6)
    close(gradient(micro_batches, new), expected, 1e-6)


# Divergences


def test_divergences_by_hand() -> None:
    # π 1/2, other 1/4 and 1/2 in turn: x = log(1/2) and 0. k1 log 2; k2 (log 2)² / 2; k3 1/2 − 1 + log 2.
    new, other = logs(0.5, 0.5), logs(0.25, 0.5)
    log2 = math.log(2)
    close(divergences.k1(new, other), real(log2, 0))
    close(divergences.k2(new, other), real(log2**2 / 2, 0))
    close(divergences.k3(new, other), real(log2 - 0.5, 0))
    # Slopes by log π: 1; log 2; 1 − e^x = 1/2.
    close(gradient(lambda one: divergences.k1(one, other), new), real(1, 1))
    close(gradient(lambda one: divergences.k2(one, other), new), real(log2, 0))
    close(gradient(lambda one: divergences.k3(one, other), new), real(0.5, 0))
    # π / π_old = (1/2) / (2/5) = 1.25 on k1.
    old = logs(0.4, 0.5)
    for chosen, value in (
        (KlSettings(coefficient=0.3, estimator="k1"), real(1.25 * log2, 0)),
        (KlSettings(coefficient=0.3, estimator="k2"), real(log2**2 / 2, 0)),
        (KlSettings(coefficient=0.3, estimator="k3"), real(log2 - 0.5, 0)),
    ):
        close(divergences.reference_term(chosen, new, other, old), 0.3 * value)
    passed = flags(1, 0)
    close(divergences.teacher_term(TeacherSettings(coefficient=2.0), new, other, passed), real(log2**2, 0))
    masked = TeacherSettings(coefficient=2.0, only_failed=True)
    close(divergences.teacher_term(masked, new, logs(0.25, 0.25), passed), real(0, log2**2))


@given(st.floats(-50, 0), st.floats(-50, 0), st.sampled_from([torch.float32, torch.float64]))
@example(-0.25, -0.5, torch.float32)  # where e^x − 1 rounds to 0
@example(-0.25, -0.5, torch.float64)
def test_k3_is_never_negative(new: float, other: float, dtype: torch.dtype) -> None:
    for near in (other, new * (1 + 1e-7), new * (1 - 1e-7), new * (1 - 1e-15)):
        found = divergences.k3(torch.tensor([new], dtype=dtype), torch.tensor([near], dtype=dtype))
        assert float(found) >= 0


def test_divergences_summed_over_a_vocabulary() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, other, behaviour = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(3))
    other, behaviour = other.log_softmax(0), behaviour.log_softmax(0)

    def policy(values: Tensor) -> Tensor:
        return values.log_softmax(0)

    def by_logits(function: Callable[[Tensor], Tensor]) -> Tensor:
        return gradient(function, logits)

    def forward(values: Tensor) -> Tensor:
        return policy(values).exp() * (policy(values) - other)  # KL(π ‖ other)

    def backward(values: Tensor) -> Tensor:
        return other.exp() * (other - policy(values))  # KL(other ‖ π)

    def sampled(
        estimate: Callable[[Tensor, Tensor], Tensor], source: Tensor, old: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """The mean over all tokens, drawn from `source`."""

        def mean(values: Tensor) -> Tensor:
            value = estimate(policy(values), other)
            return source.exp() * (value if old is None else divergences.importance(policy(values), old) * value)

        return mean

    on_policy = policy(logits)
    truth = float(forward(logits).sum())
    for estimate in (divergences.k1, divergences.k3):  # unbiased on policy, and off policy with the ratio
        assert float(sampled(estimate, on_policy)(logits).sum()) == pytest.approx(truth)
        assert float(sampled(estimate, behaviour, behaviour)(logits).sum()) == pytest.approx(truth)
        close(by_logits(sampled(estimate, behaviour, behaviour)), by_logits(forward))
    assert abs(float(sampled(divergences.k2, on_policy)(logits).sum()) - truth) > 0.01
    # Without the ratio: k1 has no gradient, k2 that of KL(π ‖ other), k3 that of KL(other ‖ π).
    close(by_logits(sampled(divergences.k1, on_policy)), torch.zeros(7))
    close(by_logits(sampled(divergences.k2, on_policy)), by_logits(forward))
    close(by_logits(sampled(divergences.k3, on_policy)), by_logits(backward))


# Entropy control


def test_covariance_by_hand() -> None:
    # Tokens of the mask: log π −1, −2, −3 (mean −2), A 2, 0, 1 (mean 1). Products: 1·1, 0·−1, −1·0; the fourth is left out.
    found = entropy_control.covariance(real(-1, -2, -3, -9), real(2, 0, 1, 5), mask=flags(1, 1, 1, 0))
    close(found, real(1, 0, 0, 0))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    found = entropy_control.covariance(x, y)
    assert float(found.mean()) == pytest.approx(float(np.cov(x, y, ddof=0)[0, 1]))
    # Two learners' tokens are centred on the means of both.
    sums: list[Tensor] = []
    halves = (slice(0, 20), slice(20, 50))

    def record(local: Tensor) -> Tensor:
        sums.append(local)
        return local

    for half in halves:
        entropy_control.covariance(x[half], y[half], total=record)
    parts = [entropy_control.covariance(x[half], y[half], total=lambda local: sums[0] + sums[1]) for half in halves]
    close(torch.cat(parts), found)


@given(st.integers(1, 60), st.floats(0.001, 0.9), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None)
def test_clip_cov_and_kl_cov_choose_what_a_plain_loop_chooses(
    count: int, fraction: float, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    covariances = (6 * torch.randn(count, generator=generator, dtype=torch.float64)).round() / 2
    mask = torch.rand(count, generator=generator) < 0.8 if masked else None
    clipped = torch.rand(count, generator=generator) < 0.2
    kept = [i for i in range(count) if mask is None or bool(mask[i])]
    share = max(1, round(fraction * len(kept)))

    candidates = [i for i in kept if 1.0 < float(covariances[i]) < 5.0 and not bool(clipped[i])]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(9)).tolist()
    expected = {candidates[i] for i in order[:share]}
    found = entropy_control.clip_cov(
        covariances,
        fraction=fraction,
        low=1.0,
        high=5.0,
        generator=torch.Generator().manual_seed(9),
        mask=mask,
        clipped=clipped,
    )
    assert set(found.nonzero().squeeze(1).tolist()) == expected

    expected = set(sorted(kept, key=lambda i: (-float(covariances[i]), i))[:share])
    found = entropy_control.kl_cov(covariances, fraction=fraction, mask=mask)
    assert set(found.nonzero().squeeze(1).tolist()) == expected


def test_clip_cov_draws_evenly_and_the_default_fraction_is_a_fraction() -> None:
    covariances = real(0.5, 2, 2, 2, 2, 9)
    times = torch.zeros(6)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        times += entropy_control.clip_cov(covariances, fraction=0.4, low=1, high=5, generator=generator)
    # 2 of 4 each time: 200 of 400 for each, standard deviation sqrt(400/4) = 10.
    assert times[0] == times[5] == 0
    assert ((times[1:5] - 200).abs() < 45).all()
    assert int(times.sum()) == 800
    chosen = entropy_control.kl_cov(
        torch.randn(100_000, generator=torch.Generator()), fraction=EntropySettings().fraction
    )
    assert int(chosen.sum()) == 20  # 0.02 % of 100,000


def test_kl_cov_penalty_by_hand() -> None:
    # |log(3/2)| and |log(1/2)| times 2, the third not selected. The slopes are the signs times 2.
    new, old, selected = logs(0.75, 0.25, 0.5), logs(0.5, 0.5, 0.1), flags(1, 1, 0)
    close(entropy_control.kl_cov_penalty(new, old, selected, 2.0), 2 * real(math.log(1.5), math.log(2), 0))
    close(gradient(lambda one: entropy_control.kl_cov_penalty(one, old, selected, 2.0), new), real(2, -2, 0))


# Shaping


def test_overlong_by_hand() -> None:
    # Limit 24, buffer 4: nothing up to 20, a quarter of 2 for each token beyond.
    found = shaping.overlong_penalty(whole(1, 20, 21, 23, 24), max_tokens=24, buffer=4, factor=2.0)
    close(found, real(0, 0, -0.5, -1.5, -2.0))
    assert math.copysign(1.0, float(found[0])) == 1.0
    assert shaping.complete_tokens(flags(0, 1), whole(0, 1, 1, 0)).tolist() == [True, False, False, True]


# Credit for steps


def test_min_form_by_hand() -> None:
    # p = 0, log 3 at temperature 1: e^0 : e^−log 3 = 1 : 1/3, so weights 3/4, 1/4; w p = 0, log 3 / 4. One step alone weighs 1.
    found = step_credit.min_form(real(0, math.log(3), -0.5), whole(0, 0, 1), temperature=1.0)
    close(found, real(0, math.log(3) / 4, -0.5))
    sharp = step_credit.min_form(real(0.9, -0.8, 0.3), whole(0, 0, 0), temperature=1e-3)
    assert float(sharp.sum()) == pytest.approx(-0.8)
    close(step_credit.min_form(real(0.9, -0.8), whole(0, 0), temperature=1e6), real(0.45, -0.4), 1e-5)


def test_step_advantages_by_hand() -> None:
    # At a temperature near 0 all credit falls on the worst step. Group 0: completion 0 of 4 tokens, steps end after 2 and 4 with
    # p 1, −1; completion 2 of 2 tokens, one step of p 1/2. Group 1: completion 1 is alone with steps, completion 3 has none.
    # Per token: −1/4 and 1/4, each the other's baseline. Completion 0, tokens to go 4, 3, 2, 1, return −1 throughout:
    # −1 − 4/4 = −2, −1 − 3/4, −1 − 2/4, −1 − 1/4. Completion 2: 1/2 + 2/4 = 1, 1/2 + 1/4 = 3/4.
    found = step_credit.step_advantage(
        real(1, -1, 0.7, 0.5),
        whole(2, 4, 1, 2),
        whole(0, 0, 1, 2),
        length=whole(4, 1, 2, 3),
        group=whole(0, 1, 0, 1),
        temperature=1e-3,
    )
    close(found, real(-2, -1.75, -1.5, -1.25, 0, 1, 0.75, 0, 0, 0), 1e-6)


@given(st.integers(1, 5), st.floats(0.05, 2.0), st.integers(0, 2**31))
@settings(deadline=None)
def test_step_advantages_are_those_of_a_plain_loop(groups: int, temperature: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    completions = 3 * groups
    group = random.permutation(np.repeat(np.arange(groups), 3))
    length = random.integers(1, 7, completions)
    ends = [np.sort(random.choice(n, random.integers(0, n + 1), replace=False)) + 1 for n in length]
    rewards = [random.uniform(-1, 1, len(e)) for e in ends]

    credits = []
    for n, e, p in zip(length, ends, rewards, strict=True):
        at = np.zeros(n)
        if len(e):
            w = np.exp(-p / temperature)
            at[e - 1] = w / w.sum() * p
        credits.append(at)
    expected: list[float] = []
    for i, at in enumerate(credits):
        others = [credits[k].mean() for k in range(completions) if k != i and group[k] == group[i] and len(ends[k])]
        for t in range(len(at)):
            baseline = np.mean(others) if others else 0.0
            expected.append(float(np.sum(at[t:] - baseline)) if others and len(ends[i]) else 0.0)
    found = step_credit.step_advantage(
        torch.from_numpy(np.concatenate(rewards)),
        torch.from_numpy(np.concatenate(ends)).long(),
        torch.from_numpy(np.repeat(np.arange(completions), [len(e) for e in ends])),
        length=torch.from_numpy(length),
        group=torch.from_numpy(group),
        temperature=temperature,
    )
    close(found, real(*expected), 1e-5)


def test_steps_that_end_outside_their_completion_are_refused() -> None:
    for end in (0, 3):
        with pytest.raises(ValueError, match="end within its completion"):
            step_credit.step_advantage(real(1), whole(end), whole(0), length=whole(2), group=whole(0), temperature=0.1)
    with pytest.raises(ValueError, match=r"as step rewards \(2\), got 1 and 2"):
        step_credit.step_advantage(real(1, 1), whole(1), whole(0, 0), length=whole(2), group=whole(0), temperature=0.1)


# Subsets


@given(
    st.lists(
        st.tuples(st.sampled_from([3, -1, 8]), st.sampled_from([-2.0, -0.5, 0.0, 0.1, 1.0, 3.0])),
        min_size=1,
        max_size=15,
    ),
    st.integers(1, 6),
)
@settings(deadline=None)
def test_the_completions_kept_have_the_largest_variance_of_all_subsets(
    rows: list[tuple[int, float]], count: int
) -> None:
    group, advantage = whole(*(g for g, _ in rows)), real(*(a for _, a in rows))
    found = subsample.select_rollouts(advantage, group, count)
    for label in {g for g, _ in rows}:
        values = [a for g, a in rows if g == label]
        chosen = advantage[found & (group == label)]
        assert len(chosen) == min(count, len(values))
        best = max(float(np.var(subset)) for subset in itertools.combinations(values, len(chosen)))
        assert float(np.var(chosen.numpy())) == pytest.approx(best, abs=1e-9)


def test_of_passes_and_failures_equal_numbers_are_kept() -> None:
    # 2 passes and 6 failures: with 4 kept, both passes and 2 failures.
    reward = real(0, 1, 0, 0, 0, 1, 0, 0)
    kept = subsample.select_rollouts(
        advantages.grpo(reward, torch.zeros(8, dtype=torch.int64)), torch.zeros(8).long(), 4
    )
    assert kept.tolist() == [True, True, True, False, False, True, False, False]
    # Of a group without variance as many, from both ends.
    assert int(subsample.select_rollouts(real(0, 0, 0, 0), whole(1, 1, 1, 1), 2).sum()) == 2


def test_tokens_by_hand() -> None:
    # |A| H: 2·1 = 2, 1·0.5 = 0.5, 3·1 = 3 (left out), 1·2 = 2, 0. Half of the four: the two with 2.
    advantage, entropy, mask = real(-2, 1, 3, 1, 0), real(1, 0.5, 1, 2, 3), flags(1, 1, 0, 1, 1)
    assert subsample.select_tokens(advantage, entropy, 0.5, mask=mask).tolist() == [True, False, False, True, False]
    assert subsample.select_tokens(advantage, entropy, 0.01).tolist() == [False, False, True, False, False]
    assert subsample.select_tokens(advantage, entropy, 1.0, mask=mask).tolist() == mask.tolist()
