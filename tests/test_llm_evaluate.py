"""Evaluation on held-out prompts: the estimator against brute force, and what stands in the figures and what does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.llm.engine import Request, make_engine
from actors.llm.evaluate import Evaluator, Passes, pass_at_k, summary
from actors.llm.seeds import sample_seed
from actors.llm.tasks import Task
from actors.llm.verifiers.pool import VerifierPool
from configs.llm import ModelSettings, SamplingSettings
from learners.llm.models import Model, make_model, weights_bytes
from tests.verifiers_for_tests import weight

SAMPLES, MOST = 4, 6
EVEN, FRAGILE, BROKEN = (f"tests.verifiers_for_tests:{name}" for name in ("even", "fragile", "broken"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, 10))))
def test_pass_at_k_is_the_share_of_all_subsets_with_a_pass(counts: tuple[int, int, int]) -> None:
    n, c, k = counts
    (found,) = pass_at_k(np.array([n]), np.array([c]), k)
    if k > n:
        assert math.isnan(found)
        return
    outcomes = [True] * c + [False] * (n - c)
    subsets = [any(chosen) for chosen in combinations(outcomes, k)]
    assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    found = pass_at_k(np.array([4096, 4096]), np.array([1, 4000]), 1024)
    assert found == pytest.approx([0.25, 1.0])


def passes(**changes: Any) -> Passes:
    return Passes(
        **{
            "families": ("a", "b", "a", "b"),
            "attempts": np.array([4, 4, 1, 0]),
            "passes": np.array([1, 4, 0, 0]),
            "greedy": np.array([1.0, 0.0, math.nan, 1.0]),
            "tokens": 100,
            "mean_length": 5.5,
            "cut_off": 0.25,
            "unscored": 8,
            "failed": 0,
            "seconds": 2.0,
            **changes,
        }
    )


def test_means_leave_out_prompts_of_which_too_few_completions_were_judged() -> None:
    figures = summary(passes(), attempts=(1, 2, 4), families=())
    assert figures["pass_at_1"] == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert figures["pass_at_2"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["pass_at_4"] == 1.0
    assert figures["greedy"] == pytest.approx(2 / 3)
    assert figures["prompts"] == 3
    assert (figures["unscored"], figures["failed"], figures["seconds"]) == (8, 0, 2.0)
    assert (figures["mean_length"], figures["cut_off"]) == (5.5, 0.25)
    each = [1 / 4, 1.0, 0.0]
    assert figures["pass_at_1_error"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(3))
    assert (figures["a/pass_at_1"], figures["b/pass_at_1"]) == pytest.approx((1 / 8, 1.0))
    assert (figures["a/greedy"], figures["b/greedy"]) == (1.0, 0.5)


def test_means_are_over_the_families_that_are_asked_for_and_each_is_reported() -> None:
    figures = summary(passes(), attempts=(4,), families=("b",))
    assert (figures["pass_at_4"], figures["pass_at_1"], figures["greedy"], figures["prompts"]) == (1.0, 1.0, 0.5, 1)
    assert figures["a/pass_at_4"] == 1.0
    assert math.isnan(figures["pass_at_1_error"])  # of one prompt


def test_pass_at_1_is_among_the_figures_whatever_is_asked_for() -> None:
    """It is what policies are compared by."""
    assert "pass_at_1" in summary(passes(), attempts=(4,), families=())


def model() -> Model:
    made = make_model(ModelSettings(layers=1, width=16, heads=2, inner=16), seed=0)
    with torch.no_grad():
        for parameter in made.network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return made


def evaluator(tasks: Sequence[Task], *, slots: int = 7, seed: int = 3, temperature: float = 0.9) -> Evaluator:
    made = model()
    engine = make_engine(SamplingSettings(max_tokens=MOST), made.network, end=made.tokenizer.end, slots=slots)
    pool = VerifierPool(processes=1, retries=0)
    return Evaluator(engine, made.tokenizer, pool, tasks, samples=SAMPLES, temperature=temperature, seed=seed)


def task(number: int, verifier: str = EVEN, family: str = "a") -> Task:
    return Task(f"{number}:", family, verifier)


def expected(one: Task, *, seed: int, temperature: float) -> tuple[list[str], str, int, int]:
    """The texts of a prompt's completions, sampled one at a time, and of the greedy one; tokens and cut off ones of the former."""
    made = model()
    engine = make_engine(SamplingSettings(max_tokens=MOST), made.network, end=made.tokenizer.end, slots=1)
    prompt = np.array(made.tokenizer.encode_prompt(one.prompt), np.int32)
    requests = [
        Request(0, index, prompt, sample_seed(seed, one.key, 0, index), temperature=temperature)
        for index in range(SAMPLES)
    ]
    requests.append(Request(0, SAMPLES, prompt, 0, temperature=0.0))
    engine.submit(requests)
    found = {}
    while engine.running or engine.waiting:
        found.update({s.request.index: s for s in engine.step()})
    texts = [made.tokenizer.decode(found[index].tokens.tolist()) for index in range(SAMPLES + 1)]
    sampled = [found[index] for index in range(SAMPLES)]
    tokens, cut_off = sum(len(s.tokens) for s in sampled), sum(s.finish == "length" for s in sampled)
    return texts[:SAMPLES], texts[SAMPLES], tokens, cut_off


def test_counts_are_those_of_completions_sampled_and_judged_by_hand() -> None:
    tasks = [task(n, family="ab"[n % 2]) for n in range(9)]
    one = evaluator(tasks)
    found = one.run(1, None)
    assert found.families == tuple("ab"[n % 2] for n in range(9))
    tokens = cut_off = 0
    for number, each in enumerate(tasks):
        sampled, greedy, more, cut = expected(each, seed=3, temperature=0.9)
        tokens, cut_off = tokens + more, cut_off + cut
        assert found.attempts[number] == SAMPLES
        assert found.passes[number] == sum(weight(text) % 2 == 0 for text in sampled)
        assert found.greedy[number] == float(weight(greedy) % 2 == 0)
    assert 0 < found.passes.sum() < 9 * SAMPLES
    assert found.mean_length == pytest.approx(tokens / (9 * SAMPLES))
    assert found.cut_off == pytest.approx(cut_off / (9 * SAMPLES))
    assert 0 < cut_off < 9 * SAMPLES
    assert tokens + 9 <= found.tokens <= tokens + 9 * MOST  # the greedy ones as well
    assert (found.unscored, found.failed) == (0, 0)
    again = one.run(2, weights_bytes(model().network))
    np.testing.assert_array_equal(again.passes, found.passes)  # the same prompts and seeds at every evaluation
    other = make_model(ModelSettings(layers=1, width=16, heads=2, inner=16), seed=9)
    assert one.run(3, weights_bytes(other.network)).passes.tolist() != found.passes.tolist()
    one.close()
    other_seed = evaluator(tasks, seed=4)
    assert other_seed.run(1, None).passes.tolist() != found.passes.tolist()
    other_seed.close()


def test_what_nobody_could_judge_is_left_out_and_reported() -> None:
    tasks = [task(0, BROKEN), *(task(n, FRAGILE) for n in range(1, 8))]
    one = evaluator(tasks)
    found = one.run(1, None)
    one.close()
    unscored = 0
    for number, each in enumerate(tasks):
        sampled, greedy, _, _ = expected(each, seed=3, temperature=0.9)
        judged = [text for text in sampled if number and weight(text) % 3 != 0]
        assert found.attempts[number] == len(judged)
        assert found.passes[number] == sum(weight(text) % 2 == 0 for text in judged)
        if number == 0 or weight(greedy) % 3 == 0:
            assert math.isnan(found.greedy[number])
        else:
            assert found.greedy[number] == float(weight(greedy) % 2 == 0)
        unscored += SAMPLES - len(judged) + math.isnan(found.greedy[number])
    assert found.unscored == unscored > SAMPLES + 1
    figures = summary(found, attempts=(1,), families=())
    assert figures["prompts"] == np.count_nonzero(found.attempts)
    assert figures["unscored"] == unscored


def test_prompts_that_cannot_be_sampled_are_left_out_and_reported() -> None:
    longest = model().network.config.max_position_embeddings
    one = evaluator([task(0), Task("ü:", "b", EVEN), task(2), Task("1" * longest, "a", EVEN)])
    found = one.run(1, None)
    one.close()
    assert found.attempts.tolist() == [SAMPLES, 0, SAMPLES, 0]
    assert np.isnan(found.greedy).tolist() == [False, True, False, True]
    assert found.failed == 2
    figures = summary(found, attempts=(1,), families=())
    assert (figures["failed"], figures["prompts"]) == (2, 2)
    assert math.isnan(figures["b/pass_at_1"])
    assert found.mean_length <= MOST


def test_where_no_prompt_can_be_sampled_there_is_no_evaluation() -> None:
    one = evaluator([Task("ü:", "b", EVEN)])
    with pytest.raises(ValueError, match=r"none of the 1 held-out prompts can be sampled.*printable ASCII"):
        one.run(1, None)
    one.close()
