"""The random numbers that choose tokens, and the distribution that they choose from."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.llm.noise import inverse_cdf, uniform
from actors.llm.truncation import distribution
from tests.truncation_for_tests import naive_truncation


def split_mix(state: int) -> int:
    """SplitMix64's finaliser in whole numbers."""
    mask = 2**64 - 1
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@given(seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**31))
def test_uniform_numbers_are_split_mix(seed: int, position: int) -> None:
    step = 0x9E3779B97F4A7C15
    expected = split_mix((split_mix((seed % 2**64) ^ step) + (position + 1) * step) % 2**64) >> 11
    assert uniform(np.array([seed]), np.array([position]))[0] == expected / 2**53


def test_uniform_numbers_are_even_and_independent() -> None:
    """Over neighbouring seeds and positions: means within 4 standard errors, correlations of neighbours too."""
    numbers = np.stack([uniform(np.arange(1_000), np.full(1_000, position)) for position in range(100)])
    error = 1 / np.sqrt(12 * numbers.size)
    assert abs(numbers.mean() - 0.5) < 4 * error
    assert np.abs(numbers.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 100)
    for axis in (0, 1):
        product = np.diff(np.signbit(numbers - 0.5).astype(int), axis=axis) != 0
        assert abs(product.mean() - 0.5) < 4 * 0.5 / np.sqrt(product.size)


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 37, 1023, 1024, 4096, 5001]),
    seed=st.integers(0, 2**32 - 1),
    zeros=st.floats(0.0, 0.99),
    spread=st.floats(0.0, 30.0),
)
def test_inverse_cdf_is_that_of_the_weights(vocab: int, seed: int, zeros: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(-spread * rng.random((20, vocab))).astype(np.float32)
    weights[rng.random(weights.shape) < zeros] = 0.0
    weights[np.arange(20), rng.integers(0, vocab, 20)] = 1.0
    uniforms = rng.random(20)
    uniforms[:2] = 0.0, 1 - 2.0**-53
    found = inverse_cdf(torch.from_numpy(weights), torch.from_numpy(uniforms)).numpy()
    assert (weights[np.arange(20), found] > 0).all()
    cumulative = weights.astype(np.float64).cumsum(1)
    cumulative /= cumulative[:, -1:]
    above = cumulative[np.arange(20), found]
    below = np.where(found > 0, cumulative[np.arange(20), found - 1], 0.0)
    assert (below <= uniforms + 1e-6).all()
    assert (uniforms <= above + 1e-6).all()


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """A tail of 3,996 tokens of 1e-9 each beside four likely ones, behind them, where sums in float32 would swallow it."""
    weights = torch.full((1, 4_000), 1e-9)
    weights[0, :4] = 0.25
    total = float(weights.double().sum())
    inside = (1.0 + 2_000.5 * 1e-9) / total  # in the middle of the tail
    found = int(inverse_cdf(weights, torch.tensor([inside], dtype=torch.float64)))
    assert abs(found - 2_004) <= 1


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([3, 50, 300, 700]),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.2, 3.0),
    top_k=st.one_of(st.none(), st.integers(1, 800)),
    top_p=st.floats(0.01, 1.0),
)
def test_truncation_keeps_the_most_probable(
    vocab: int, seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (5, vocab)))
    log_probs, kept = distribution(logits, torch.full((5,), temperature), top_k=top_k, top_p=top_p)
    allowed, mass = naive_truncation(logits / temperature, top_k, top_p)
    # Where the mass asked for is met to rounding, one token more or fewer is right as well.
    assert ((log_probs > -torch.inf) != allowed).sum(1).max() <= 1
    same = ((log_probs > -torch.inf) == allowed).all(1).numpy()
    np.testing.assert_allclose(kept[same], mass[same], atol=1e-5)
    np.testing.assert_allclose(log_probs.exp().sum(1), 1.0, atol=1e-5)
    plain = torch.log_softmax(logits.float() / temperature, -1)
    inside = log_probs > -torch.inf
    np.testing.assert_allclose((log_probs + kept[:, None])[inside], plain[inside], atol=1e-5)
    assert (kept <= 0).all()


def test_truncation_keeps_tokens_as_probable_as_the_last() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.3, 0.3, 0.3]]))
    log_probs, kept = distribution(logits, torch.ones(1), top_k=2)
    np.testing.assert_allclose(log_probs.exp()[0], [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(kept.exp(), 0.9, atol=1e-6)
    assert distribution(logits, torch.ones(1))[1].tolist() == [0.0]
