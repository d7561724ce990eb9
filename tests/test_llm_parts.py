"""Parts of the language model's learner put together: extensions of the objective, and actors' log-probabilities and its own."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from actors.llm.engine import Request, make_engine
from configs.llm import SamplingSettings
from configs.policy_gradient import PolicyGradientSettings
from learners.llm import objective as objective_module
from learners.llm.batching import Rollouts, buckets, micro_batch, rollouts
from learners.llm.gap_check import OLDEST, SPREAD, GapCheck, _leading
from learners.llm.learner import PolicyGradient
from learners.llm.objective import Objective, Targets
from learners.llm.parallel import Learners
from learners.llm.rows import Completion, to_rows
from learners.llm.scoring import Scorer, _Product, store_rounded
from learners.staging import ALONE
from tests.test_llm_learner import completions, learner, model, naive, replaced, weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- extensions of the objective, each on one batch of four completions -----------------------------------------------

GROUP = [0, 0, 1, 1]
REWARD = [1.0, 0.0, 0.0, 1.0]
SHAPED = [0.0, 0.25, 0.5, 0.0]
LENGTH = [3, 2, 4, 1]  # of at most 4 tokens: the third was cut off
SEQUENCE = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
OLD = [math.log(p) for p in (0.5, 0.4, 0.3, 0.6, 0.2, 0.5, 0.1, 0.7, 0.4, 0.25)]
PROXIMAL = [math.log(p) for p in (0.6, 0.3, 0.35, 0.3, 0.25, 0.9, 0.2, 0.5, 0.5, 0.2)]
NEW = [math.log(p) for p in (0.55, 0.6, 0.2, 0.5, 0.3, 0.6, 0.15, 0.4, 0.8, 0.3)]
OTHER = [math.log(p) for p in (0.3, 0.7, 0.1, 0.2, 0.5, 0.4, 0.3, 0.6, 0.9, 0.1)]  # of a reference or a teacher
ENTROPY = [0.5, 1.0, 0.1, 3.0, 0.2, 0.3, 2.0, 0.4, 0.1, 5.0]
# Rewards with what is shaped: 1 and 0.25, mean 0.625; 0.5 and 1, mean 0.75.
ADVANTAGE = [0.375, -0.375, -0.25, 0.25]
STEPS = [[(1, 0.2), (3, 0.8)], [(2, 0.5)], [], [(1, 0.9)]]  # (tokens to its end, reward)


def example() -> Rollouts:
    batches, at = [], 0
    for group in range(2):
        made = []
        for row in (2 * group, 2 * group + 1):
            span = slice(at, at + LENGTH[row])
            at += LENGTH[row]
            made.append(
                Completion(
                    group=group,
                    index=row % 2,
                    task=group,
                    family="test",
                    seed=row,
                    prompt=np.array([5, 6], np.int32),
                    tokens=np.arange(10, 10 + LENGTH[row], dtype=np.int32),
                    log_probs=np.array(OLD[span], np.float32),
                    kept=np.zeros(LENGTH[row], np.float32),
                    versions=np.zeros(LENGTH[row], np.int32),
                    finish="length" if LENGTH[row] == 4 else "stop",
                    reward=REWARD[row],
                    passed=REWARD[row] == 1.0,
                    shaped=SHAPED[row],
                    step_ends=np.array([end for end, _ in STEPS[row]], np.int32),
                    step_rewards=np.array([reward for _, reward in STEPS[row]], np.float32),
                )
            )
        batches.append(to_rows(made))
    (rows,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return rollouts(rows, device=CPU)


def objective(*, minibatches: int = 2, **changes: Any) -> Objective:
    return Objective(
        PolicyGradientSettings(**{"advantage": "dr_grpo", **changes}),
        max_tokens=4,
        minibatches=minibatches,
        learners=Learners(ALONE, CPU),
        generator=torch.Generator().manual_seed(0),
    )


def found(made: Objective, targets: Targets, **others: Tensor) -> tuple[list[float], list[bool], Any]:
    terms = made.terms(example(), targets, torch.arange(10), torch.tensor(NEW), **others)
    return terms.per_token.tolist(), terms.clipped.tolist(), terms


def refined(made: Objective) -> Targets:
    batch = example()
    assert made.needs_pass
    return made.refine(batch, made.targets(batch), proximal=torch.tensor(PROXIMAL), entropy=torch.tensor(ENTROPY))


def plain(new: list[float], old: list[float], advantage: list[float]) -> list[float]:
    """PPO's loss of each token, with the bounds 0.8 and 1.28."""
    ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
    return [-min(r * a, min(max(r, 0.8), 1.28) * a) for r, a in zip(ratios, advantage, strict=True)]


def of_tokens(values: list[float]) -> list[float]:
    return [values[row] for row in SEQUENCE]


BASE = plain(NEW, OLD, of_tokens(ADVANTAGE))


def about(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-6)


def test_without_extensions_the_loss_is_that_of_ppo_with_shaped_rewards() -> None:
    made = objective()
    assert not made.needs_pass
    targets = made.targets(example())
    assert targets.advantage.tolist() == about(of_tokens(ADVANTAGE))
    assert targets.pass_rate.tolist() == [0.5] * 10
    assert targets.mask.all()
    assert found(made, targets)[0] == about(BASE)


def test_correction_weighs_a_loss_that_is_taken_against_the_learners_own_policy() -> None:
    made = objective(correction_cap=1.5)
    weight = [min(math.exp(p - o), 1.5) for p, o in zip(PROXIMAL, OLD, strict=True)]
    assert 1 <= weight.count(1.5) < 9
    inner = plain(NEW, PROXIMAL, of_tokens(ADVANTAGE))
    assert found(made, refined(made))[0] == about([w * x for w, x in zip(weight, inner, strict=True)])
    # With one update π is the learner's policy at the start of the step: the ratio is 1, the weight min(π / μ, cap).
    made = objective(correction_cap=1.5, minibatches=1)
    assert not made.needs_pass
    expected = [-min(math.exp(n - o), 1.5) * a for n, o, a in zip(NEW, OLD, of_tokens(ADVANTAGE), strict=True)]
    assert found(made, made.targets(example()))[0] == about(expected)


def test_decoupled_has_its_three_policies() -> None:
    made = objective(loss="decoupled", weight_cap=1.25)
    weight = [min(math.exp(p - o), 1.25) for p, o in zip(PROXIMAL, OLD, strict=True)]
    inner = plain(NEW, PROXIMAL, of_tokens(ADVANTAGE))
    assert found(made, refined(made))[0] == about([w * x for w, x in zip(weight, inner, strict=True)])


def test_the_penalty_for_length_lowers_rewards() -> None:
    made = objective(overlong={"kind": "shape", "buffer": 2, "factor": 0.5})
    # From 2 tokens on, down to −0.5 at 4: rewards 1 − 0.25, 0.25; 0.5 − 0.5, 1. Means 0.5 and 0.5.
    advantage = [0.25, -0.25, -0.5, 0.5]
    targets = made.targets(example())
    assert targets.advantage.tolist() == about(of_tokens(advantage))
    assert found(made, targets)[0] == about(plain(NEW, OLD, of_tokens(advantage)))


def test_step_credit_is_added_to_the_advantage() -> None:
    made = objective(steps={"coefficient": 0.5, "temperature": 0.2})
    # First completion: weights e^(−0.2/0.2), e^(−0.8/0.2); its steps end with tokens 1 and 3.
    raw = [math.exp(-1.0), math.exp(-4.0)]
    first, last = (w / sum(raw) * p for w, p in zip(raw, (0.2, 0.8), strict=True))
    # The other one's reward per token is 0.5 / 2, and this one's is a third of the sum; the second group has one with steps.
    own, other = (first + last) / 3, 0.5 / 2
    credit = [first + last - 3 * other, last - 2 * other, last - other, 0.5 - 2 * own, 0.5 - own, 0, 0, 0, 0, 0]
    expected = [a + 0.5 * c for a, c in zip(of_tokens(ADVANTAGE), credit, strict=True)]
    targets = made.targets(example())
    assert targets.advantage.tolist() == about(expected)
    assert found(made, targets)[0] == about(plain(NEW, OLD, expected))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_from_the_reference_is_added(estimator: str) -> None:
    made = objective(kl={"coefficient": 0.3, "estimator": estimator})
    x = [o - n for n, o in zip(NEW, OTHER, strict=True)]
    terms = {
        "k1": [-0.3 * v * math.exp(n - o) for v, n, o in zip(x, NEW, OLD, strict=True)],
        "k2": [0.3 * v * v / 2 for v in x],
        "k3": [0.3 * (math.exp(v) - 1 - v) for v in x],
    }[estimator]
    loss, _, parts = found(made, made.targets(example()), reference=torch.tensor(OTHER))
    assert parts.reference.tolist() == about(terms)
    assert loss == about([b + t for b, t in zip(BASE, terms, strict=True)])


@pytest.mark.parametrize("only_failed", [False, True])
def test_the_divergence_from_the_teacher_is_added(only_failed: bool) -> None:
    made = objective(teacher={"path": "t", "coefficient": 0.4, "only_failed": only_failed})
    terms = [
        0.0 if only_failed and REWARD[row] == 1.0 else 0.4 * (n - o) ** 2 / 2
        for row, n, o in zip(SEQUENCE, NEW, OTHER, strict=True)
    ]
    loss, _, parts = found(made, made.targets(example()), teacher=torch.tensor(OTHER))
    assert parts.teacher.tolist() == about(terms)
    assert loss == about([b + t for b, t in zip(BASE, terms, strict=True)])


def covariances(tokens: list[int]) -> dict[int, float]:
    advantage = of_tokens(ADVANTAGE)
    x, y = (sum(values[t] for t in tokens) / len(tokens) for values in (PROXIMAL, advantage))
    return {t: (PROXIMAL[t] - x) * (advantage[t] - y) for t in tokens}


def test_kl_cov_adds_its_penalty_to_the_tokens_that_covary_most() -> None:
    made = objective(entropy={"kind": "kl_cov", "fraction": 0.2, "coefficient": 0.7})
    order = sorted(range(10), key=lambda token: -covariances(list(range(10)))[token])
    chosen = set(order[:2])
    targets = refined(made)
    assert targets.penalised is not None
    assert {t for t in range(10) if targets.penalised[t]} == chosen
    expected = [b + 0.7 * abs(NEW[t] - OLD[t]) * (t in chosen) for t, b in enumerate(BASE)]
    assert found(made, targets)[0] == about(expected)
    assert min(abs(NEW[t] - OLD[t]) for t in chosen) > 0.05


def test_clip_cov_takes_tokens_out_that_are_within_its_bounds_and_not_clipped() -> None:
    values = covariances(list(range(10)))
    clipped = {  # at the start of the step
        t
        for t, a in enumerate(of_tokens(ADVANTAGE))
        if (a > 0 and PROXIMAL[t] - OLD[t] > math.log(1.28)) or (a < 0 and PROXIMAL[t] - OLD[t] < math.log(0.8))
    }
    assert clipped
    among = sorted((t for t in values if t not in clipped), key=lambda t: -values[t])
    # Bounds with two tokens that are not clipped between them, both of which are drawn; then all that are not clipped.
    narrow = (values[among[2]] + values[among[1]]) / 2, 10.0
    for (low, high), fraction, expected in ((narrow, 0.2, among[:2]), ((-10.0, 10.0), 0.9, among)):
        made = objective(entropy={"kind": "clip_cov", "fraction": fraction, "low": low, "high": high})
        targets = refined(made)
        assert targets.removed is not None
        assert {t for t in range(10) if targets.removed[t]} == set(expected)
        assert found(made, targets)[0] == about([0.0 if t in expected else b for t, b in enumerate(BASE)])
    assert all(abs(BASE[t]) > 0.01 for t in range(10))


def test_the_tokens_learnt_from_have_the_largest_advantage_times_entropy() -> None:
    made = objective(subsample={"tokens": 0.3})
    scores = [abs(a) * e for a, e in zip(of_tokens(ADVANTAGE), ENTROPY, strict=True)]
    # 0.1875, 0.375, 0.0375, 1.125, 0.075, 0.075, 0.5, 0.1, 0.025, 1.25.
    assert sorted(range(10), key=lambda t: -scores[t])[:3] == [9, 3, 6]
    assert refined(made).mask.nonzero().squeeze(1).tolist() == [3, 6, 9]


def test_masks_leave_out_whole_completions_and_count_in_no_mean() -> None:
    made = objective(overlong={"kind": "mask"}, mean="sequence")
    mask = made.targets(example()).mask
    assert mask.tolist() == [row != 2 for row in SEQUENCE]
    # Two updates, of a group each: in the first 2 completions, in the second that of one token alone.
    weight, totals = made.weights(example(), mask, torch.tensor(GROUP), 2)
    assert totals == [2, 1]
    assert weight.tolist() == about([1 / 6] * 3 + [1 / 4] * 2 + [0] * 4 + [1])
    made = objective(subsample={"rollouts": 2})
    assert made.targets(example()).mask.all()


# -- actor and learner at the same weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5}], ids=str)
def test_the_learner_computes_what_the_engine_sampled_with(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    engine = make_engine(SamplingSettings(temperature=0.7, **options), network, end=1, slots=6, version=3)
    generator = np.random.default_rng(1)
    prompts = [generator.integers(2, 61, count).astype(np.int32) for count in (1, 9, 30, 4)]
    engine.submit(
        [
            Request(group, index, prompt, 100 * group + index, max_tokens=int(generator.integers(1, 30)))
            for group, prompt in enumerate(prompts)
            for index in range(4)
        ]
    )
    samples = []
    while engine.running or engine.waiting:
        samples += engine.step()
    batches = []
    for group in range(len(prompts)):
        made = [
            Completion(
                group=group, index=s.request.index, task=group, family="test", seed=s.request.seed, prompt=s.request.prompt,
                tokens=s.tokens, log_probs=s.log_probs, kept=s.kept, versions=s.versions, finish=s.finish, reward=0.0,
                passed=False,
            )
            for s in samples
            if s.request.group == group
        ]  # fmt: skip
        batches.append(to_rows(made))
    (rows,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    flat = rollouts(rows, device=CPU)
    assert rows.num_rows == 16
    assert set(flat.versions.tolist()) == {3}
    assert bool((flat.kept < -0.05).any()) == bool(options), "truncation left something out"
    scorer = Scorer(network, temperature=0.7)
    new = torch.full_like(flat.old, math.nan)
    with torch.no_grad():
        for numbers in buckets(flat, np.arange(16), 120):
            micro = micro_batch(flat, numbers, pad=0)
            new[micro.places] = scorer(micro, flat.tokens[micro.places], flat.kept[micro.places])[0]
    assert float((new - flat.old).abs().max()) < 1e-4
    assert float(flat.old.std()) > 0.2, "log-probabilities that are all alike say little"


def sampled(network: Any, seed: int, version: int, *, wrong: float = 0.0, **options: Any) -> pa.RecordBatch:
    """Completions with the log-probabilities that they have under the network, or by `wrong` beside them."""
    rows = completions(seed, version=version, **options)
    with torch.no_grad():
        values = torch.cat([new for new, _ in naive(network, rows, 0.8)])
    return replaced(rows, "log_probs", values.numpy().astype(np.float32) + np.float32(wrong))


def lagging(algorithm: PolicyGradient, network: Any, *, wrong: float) -> list[dict[str, float]]:
    """Rows of metrics of five steps, whose batches are two versions old."""
    waiting = [completions(90 + i, version=i - 2) for i in range(2)]
    found = []
    for version in range(5):
        algorithm.published(version)
        waiting.append(sampled(network, version, version, wrong=wrong))
        algorithm.update(waiting.pop(0))
        found.append(algorithm.metrics())
    return found


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "low-rank additions": ({"lora_rank": 4}, {"kl": {"coefficient": 0.1}}),
    "checkpointed, with a pass": (
        {},
        {
            "learners": {"activation_checkpointing": True, "minibatches": 2},
            "entropy": {"kind": "clip_cov", "fraction": 0.2, "low": 0.0, "high": 9.0},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrong", [0.0, 0.3])
def test_a_wrong_log_probability_shows_at_a_lag_of_two(
    case: str, wrong: float, caplog: pytest.LogCaptureFixture
) -> None:
    changes, options = CASES[case]
    options = {**options, "learners": {"learning_rate": 0.02, **options.get("learners", {})}}
    made = model(dtype=torch.float32, **changes)
    algorithm = learner(made, **options)
    with caplog.at_level(logging.WARNING, "learners"):
        rows = lagging(algorithm, made.network, wrong=wrong)
    assert rows[2]["gap/lag_2"] > 0.01, "the policy has moved since"
    assert [("gap/mean" in row) for row in rows] == [False, False, True, False, False]
    assert rows[2]["gap/mean"] == pytest.approx(wrong, abs=1e-4)
    assert rows[2]["gap/max"] == pytest.approx(wrong, abs=1e-3)
    assert ("at the same weights" in caplog.text) == bool(wrong)
    # Without checks, for the copy of the weights is above the limit, updates are the same to the last bit.
    twin = model(dtype=torch.float32, **changes)
    other = learner(twin, **options)
    with caplog.at_level(logging.INFO, "learners"):
        other._gap_check = GapCheck(
            list(twin.network.parameters()), other._scorer, other._learners, is_divided=False, most_bytes=1000
        )
    assert "above the limit of 0.0 GB" in caplog.text
    assert all("gap/mean" not in row for row in lagging(other, twin.network, wrong=wrong))
    one, two = algorithm.state(), other.state()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_at_no_lag_the_updates_own_pass_measures_the_gap() -> None:
    made = model(dtype=torch.float32)
    algorithm = learner(made)
    passes: list[int] = []
    made.network.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    algorithm.published(0)
    rows = sampled(made.network, 0, 0, wrong=0.3)
    passes.clear()
    algorithm.update(rows)
    assert len(passes) == 1
    row = algorithm.metrics()
    assert row["gap/mean"] == row["gap/lag_0"] == pytest.approx(0.3, abs=1e-4)
    assert algorithm._gap_check.version is None, "the copy is dropped"
    algorithm.load_state(learner(model(seed=1, dtype=torch.float32)).state())
    algorithm.published(1)
    assert algorithm._gap_check.version == 1
    algorithm.load_state(algorithm.state())
    assert algorithm._gap_check.version is None, "other weights are out as that version, or none"


def test_weights_under_the_wrong_version_are_found_within_some_steps(caplog: pytest.LogCaptureFixture) -> None:
    """From version 8 on, actors have the weights before those that they name; batches are of two versions, two to three back."""
    made = model(dtype=torch.float32)
    algorithm = learner(made, learners={"learning_rate": 0.02})
    waiting = [completions(90 + i, version=-2) for i in range(3)]
    previous: Any = model(dtype=torch.float32).network
    found = {}
    with caplog.at_level(logging.WARNING, "learners"):
        for version in range(30):
            algorithm.published(version)
            actor = previous if version >= 8 else made.network
            groups = [sampled(actor, version + i, version, groups=2, first=2 * i) for i in range(2)]
            late, early = groups
            waiting[-1] = pa.Table.from_batches([waiting[-1], late]).combine_chunks().to_batches()[0]
            waiting.append(early)
            previous.load_state_dict(made.network.state_dict())
            algorithm.update(waiting.pop(0))
            row = algorithm.metrics()
            if "gap/mean" in row:
                found[version] = row["gap/mean"], "at the same weights" in caplog.text
    assert 2 <= len(found) <= 6
    assert all(gap < 1e-4 and not warned for version, (gap, warned) in found.items() if version < 8)
    assert all(gap > 0.05 and warned for version, (gap, warned) in found.items() if version > 14)
    assert min(found) < 8
    assert max(found) > 14


def check_of(network: Any, **options: Any) -> tuple[GapCheck, Scorer]:
    scorer = Scorer(network, temperature=0.8)
    learners = Learners(ALONE, CPU)
    return GapCheck(list(network.parameters()), scorer, learners, is_divided=False, **options), scorer


def move(network: Any) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.full_like(parameter, 0.1))


def test_weights_are_the_same_to_the_last_bit_after_a_check_and_after_one_that_fails() -> None:
    made = model(dtype=torch.float32)
    check, scorer = check_of(made.network)
    check.published(4)
    rows = sampled(made.network, 0, 4)
    move(made.network)
    after = weights(made)
    gap = check.measure(rollouts(rows, device=CPU), pad=0, micro_tokens=10**6)
    assert len(gap) == len(rows["tokens"].flatten())
    assert float(gap.max()) < 1e-4
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(made).items())
    assert check.version is None
    assert not len(check.measure(rollouts(rows, device=CPU), pad=0, micro_tokens=10**6)), "it is done"
    check.forget()
    check.published(5)
    broken = rollouts(replaced(rows, "versions", np.full(len(gap), 5)), device=CPU)

    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    handle = scorer.register_forward_hook(fail)
    move(made.network)
    after = weights(made)
    with pytest.raises(MemoryError):
        check.measure(broken, pad=0, micro_tokens=10**6)
    handle.remove()
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(made).items())


def test_a_check_keeps_to_its_tokens_and_to_those_that_no_other_version_precedes() -> None:
    made = model(dtype=torch.float32)
    rows = sampled(made.network, 1, 4)
    versions = [np.array(v) for v in rows["versions"].to_pylist()]
    versions[0][1:] = 5
    versions[1][:1] = 3
    versions[2][:] = 5
    log_probs = rows["log_probs"].flatten().to_numpy().copy()
    flat_versions = np.concatenate(versions)
    leading = [np.logical_and.accumulate(v == 4) for v in versions]
    good = np.concatenate(leading)
    assert 5 < good.sum() < len(good)
    log_probs[~good] = 7.0
    flat = rollouts(replaced(replaced(rows, "versions", flat_versions), "log_probs", log_probs), device=CPU)
    for micro_tokens, most in ((10**6, int(good.sum())), (1, max(map(np.sum, leading)))):
        check, _ = check_of(made.network)
        check.published(4)
        gap = check.measure(flat, pad=0, micro_tokens=micro_tokens)
        assert len(gap) == most
        assert float(gap.max()) < 1e-4


@given(st.lists(st.lists(st.sampled_from([2, 3, 3, 4]), max_size=5), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_leading_tokens_are_those_of_a_plain_loop(versions: list[list[int]]) -> None:
    empty = completions(0, groups=1, size=len(versions))
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(v) for v in versions])]), pa.int32())
    flat = np.array([v for one in versions for v in one], np.int32)
    for name in ("tokens", "log_probs", "kept", "versions"):
        kind = empty.schema.field(name).type
        values = pa.array(flat, pa.int32()).cast(kind.value_type)
        column = pa.ListArray.from_arrays(offsets, values, type=kind)
        empty = empty.set_column(empty.schema.get_field_index(name), empty.schema.field(name), column)
    expected = [all(v == 3 for v in one[: at + 1]) for one in versions for at in range(len(one))]
    assert _leading(rollouts(empty, device=CPU), 3).tolist() == expected


def test_versions_that_actors_pass_over_or_that_become_too_old_are_given_up() -> None:
    made = model(dtype=torch.float32)
    check, _ = check_of(made.network)

    def flat(version: int) -> Rollouts:
        return rollouts(completions(0, version=version), device=CPU)

    check.published(0)
    assert check.version == 0
    for version in (-1, -2):  # older data say nothing about what is still to come
        assert not len(check.measure(flat(version), pad=0, micro_tokens=100))
        assert check.version == 0
    assert not len(check.measure(flat(1), pad=0, micro_tokens=100))
    assert check.version is None
    kept = []
    for version in range(1, SPREAD + 2):
        check.published(version)
        kept.append(check.version)
    again = kept[-1]
    assert again is not None, "another is tried soon"
    check.published(again + OLDEST)
    assert check.version == again
    check.published(again + OLDEST + 1)
    assert check.version is None
    check.published(again + OLDEST + 2)
    assert check.version == again + OLDEST + 2


# -- what is reported ------------------------------------------------------------------------------------------------


def test_metrics_have_the_names_that_are_documented() -> None:
    text = Path(objective_module.__file__).with_suffix(".md").read_text()
    cells = [line.split("|")[1] for line in text.partition("## Metrics")[2].splitlines() if line.startswith("| `")]
    names: list[str] = []
    for cell in cells:
        for name in re.findall(r"`([\w/]+)`", cell):
            names.append(names[-1].partition("/")[0] + name if name.startswith("/") else name)
    algorithm = learner(model(), kl={"coefficient": 0.1}, entropy={"kind": "kl_cov"})
    algorithm.update(completions(0))
    assert {"kl/reference", "advantage/deviation"} < set(names)
    assert set(names) - algorithm.metrics().keys() == {"kl/teacher"}


def test_the_divergence_is_reported_without_its_coefficient() -> None:
    made = model()
    algorithm = learner(made, kl={"coefficient": 0.25, "estimator": "k2"})
    algorithm.update(completions(0))
    algorithm.metrics()
    rows = completions(1)
    new, reference = (
        torch.cat([x for x, _ in naive(network, rows, 0.8)]) for network in (made.network, model().network)
    )
    expected = float(((new - reference).square() / 2).mean().detach())
    assert expected > 1e-6
    algorithm.update(rows)
    assert algorithm.metrics()["kl/reference"] == pytest.approx(expected, rel=1e-5)


# -- bfloat16 -----------------------------------------------------------------------------------------------------


def test_logits_are_not_rounded_under_bfloat16() -> None:
    """Hidden states and head alike, to which bfloat16 logits of about 22 would add errors of 0.03 in the mean."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16().float().requires_grad_()
    weight = (torch.randn(3000, 64, generator=generator) * 0.8).bfloat16().float().requires_grad_()
    exact = hidden @ weight.T
    assert float(exact.max()) > 22.0
    logits = _Product.apply(hidden, weight, torch.bfloat16)  # type: ignore[no-untyped-call]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.0, atol=1e-4)
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert float((rounded - exact).abs().max()) > 0.03
    slope = torch.randn(exact.shape, generator=generator).bfloat16().float()
    for mine, expected in zip(
        torch.autograd.grad(logits, (hidden, weight), slope),
        torch.autograd.grad(exact, (hidden, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=0.0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same_logits_and_gradients() -> None:
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(40, 64, generator=generator).to(device).requires_grad_()
        weight = torch.randn(3000, 64, generator=generator).to(device).requires_grad_()
        logits = _Product.apply(hidden, weight, torch.bfloat16)  # type: ignore[no-untyped-call]
        slopes = torch.autograd.grad(logits.sin().sum(), (hidden, weight))
        found.append([tensor.detach().cpu() for tensor in (logits, *slopes)])
    for one, two in zip(*found, strict=True):
        assert one.dtype == two.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=0.01, atol=0.05)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("logits", [1 << 20, 300])
def test_a_scorer_rounds_products_but_not_logits(logits: int) -> None:
    network: Any = model(dtype=torch.float32).network
    flat = rollouts(completions(0), device=CPU)
    micro = micro_batch(flat, np.arange(16), pad=0)
    arguments = micro, flat.tokens[micro.places], flat.kept[micro.places]
    seen: list[Tensor] = []
    network.get_decoder().register_forward_hook(lambda _m, _a, result: seen.append(result.last_hidden_state))
    found, _ = Scorer(network, temperature=0.8, precision=torch.bfloat16, logits=logits)(*arguments)
    hidden = seen[-1].flatten(0, 1)[micro.predicts].bfloat16().double()
    head = network.get_output_embeddings().weight.bfloat16().double()
    expected = ((hidden @ head.T) / 0.8).log_softmax(1).gather(1, arguments[1][:, None]).squeeze(1) - arguments[2]
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-5)
    assert found.requires_grad


def test_a_frozen_network_that_is_stored_rounded_scores_the_same() -> None:
    network: Any = model(dtype=torch.float32).network
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone() * 1.1)  # a head of its own
    flat = rollouts(completions(0), device=CPU)
    micro = micro_batch(flat, np.arange(16), pad=0)
    arguments = micro, flat.tokens[micro.places], flat.kept[micro.places]
    scorer = Scorer(network, temperature=0.8, precision=torch.bfloat16)
    with torch.no_grad():
        before, _ = scorer(*arguments)
        store_rounded(network, torch.bfloat16)
        after, _ = scorer(*arguments)
    assert torch.equal(before, after)
    types = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {
        name for name in types if "norm" in name or "embed" in name
    }


def test_the_reference_learns_with_rounded_matrices_in_bfloat16() -> None:
    rows = []
    for precision in ("float32", "bfloat16"):
        algorithm = learner(model(dtype=torch.float32), kl={"coefficient": 0.5}, learners={"precision": precision})
        for seed in range(2):
            algorithm.update(completions(seed))
            rows.append(algorithm.metrics()["kl/reference"])
        dtypes = {t.dtype for name, t in algorithm.state().items() if name.startswith("reference.")}
        assert dtypes == ({torch.float32} if precision == "float32" else {torch.float32, torch.bfloat16})
        again = learner(model(seed=3, dtype=torch.float32), kl={"coefficient": 0.5}, learners={"precision": precision})
        again.load_state(algorithm.state())
        assert all(torch.equal(t, again.state()[name]) for name, t in algorithm.state().items())
    assert rows[0] == pytest.approx(0.0, abs=1e-9) == rows[2]
    assert rows[1] == pytest.approx(rows[3], rel=0.3)
