"""The running mean and variance against numpy over all rows at once, whatever batches and learners they came through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.normaliser import EPSILON, Normaliser


def draw(seed: int, sizes: list[int], centre: float, spread: float) -> list[np.ndarray]:
    """Batches (size, 3) float32: a component about `centre`, one about 0, one constant."""
    generator = np.random.default_rng(seed)
    batches = []
    for size in sizes:
        rows = generator.standard_normal((size, 3)) * spread
        rows[:, 0] += centre
        rows[:, 2] = centre
        batches.append(rows.astype("f4"))
    return batches


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    centre=st.floats(-1e4, 1e4),
    spread=st.floats(1e-2, 1e3),
    learners=st.integers(1, 4),
)
def test_mean_and_variance_are_those_of_all_rows(
    seed: int, sizes: list[int], centre: float, spread: float, learners: int
) -> None:
    normaliser = Normaliser(3)
    batches = draw(seed, sizes, centre, spread)
    for batch in batches:
        parts = np.array_split(batch, learners)  # one learner may get nothing
        sums = torch.stack([normaliser.sums(torch.from_numpy(part)) for part in parts])
        normaliser.merge(sums.sum(0))
    rows = np.concatenate(batches).astype("f8")
    state = normaliser.state()
    mean, variance = rows.mean(0), rows.var(0)
    assert state["count"].item() == len(rows)
    np.testing.assert_allclose(state["mean"].numpy(), mean, rtol=1e-12, atol=1e-12 * spread)
    # The first batch is summed about 0, so its variance keeps the digits that the square of its mean leaves.
    rounding = 1e-14 * len(rows) * float(np.square(rows).max())
    np.testing.assert_allclose(state["squares"].numpy() / len(rows), variance, rtol=1e-11, atol=rounding)
    assert torch.equal(normaliser.mean, state["mean"].float())
    exact = 1.0 / np.sqrt(state["squares"].numpy() / len(rows) + EPSILON)
    np.testing.assert_allclose(normaliser.scale.numpy(), exact, rtol=1e-6)


def test_known_answer() -> None:
    normaliser = Normaliser(2)
    normaliser.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    normaliser.update(torch.tensor([[[5.0, 5.0]], [[7.0, 5.0]]]))  # leading dimensions are free
    # 1, 3, 5, 7: mean 4, population variance 5.
    torch.testing.assert_close(normaliser.mean, torch.tensor([4.0, 5.0]))
    torch.testing.assert_close(normaliser.scale[0], torch.tensor(1 / np.sqrt(5.0 + 1e-8)).float())
    assert normaliser.scale[1] == 1e4, "a constant has the largest scale there is"
    found = normaliser(torch.tensor([[9.0, 5.0], [1e9, 5.1], [-1e9, 4.9]]))
    torch.testing.assert_close(found, torch.tensor([[np.sqrt(5.0), 0.0], [10.0, 10.0], [-10.0, -10.0]]).float())


def test_rounding_leaves_no_negative_variance() -> None:
    constants = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 1e6
    normaliser = Normaliser(200)
    normaliser.update(constants.expand(1001, 200))
    assert (normaliser.state()["squares"] >= 0.0).all()
    assert normaliser.scale.isfinite().all()
    assert torch.equal(normaliser(constants), torch.zeros(200))


def test_before_any_data_nothing_is_scaled() -> None:
    normaliser = Normaliser(2)
    x = torch.tensor([[0.5, -3.0]])
    assert torch.equal(normaliser(x), x)
    normaliser.update(torch.empty((0, 2)))
    assert torch.equal(normaliser(x), x)
    normaliser.load_state(Normaliser(2).state())
    assert torch.equal(normaliser(x), x)


def test_published_tensors_are_those_that_the_learner_reads() -> None:
    """Actors compute with numpy what the learner computes with torch, to the last bit."""
    normaliser = Normaliser(3)
    published = normaliser.published()
    for batch in draw(0, [50, 20], 12.0, 3.0):
        normaliser.update(torch.from_numpy(batch))
    x = draw(1, [64], 11.0, 30.0)[0]
    mean, scale = published["normaliser.mean"].numpy(), published["normaliser.scale"].numpy()
    assert mean.dtype == scale.dtype == np.dtype(np.float32)
    expected = np.clip((x - mean) * scale, np.float32(-10.0), np.float32(10.0))
    assert np.array_equal(normaliser(torch.from_numpy(x)).numpy(), expected)


def test_state_round_trip_goes_on_as_before() -> None:
    first, second = draw(3, [40, 30], -5.0, 2.0)
    whole, stopped, resumed = Normaliser(3), Normaliser(3), Normaliser(3)
    whole.update(torch.from_numpy(first))
    stopped.update(torch.from_numpy(first))
    kept = {name: tensor.clone() for name, tensor in stopped.state().items()}
    held = resumed.mean
    resumed.load_state(kept)
    assert torch.equal(held, stopped.mean), "in place: what holds a reference sees the new values"
    for normaliser in (whole, resumed):
        normaliser.update(torch.from_numpy(second))
    assert torch.equal(whole.mean, resumed.mean)
    assert torch.equal(whole.scale, resumed.scale)


@pytest.mark.parametrize("name", ["count", "mean", "squares"])
def test_another_state_is_refused_and_changes_nothing(name: str) -> None:
    normaliser = Normaliser(3)
    normaliser.update(torch.randn((5, 3), generator=torch.Generator().manual_seed(0)))
    before = {key: tensor.clone() for key, tensor in normaliser.state().items()}
    fresh = Normaliser(3).state()
    for wrong in (
        fresh | {name: fresh[name].float()},
        {k: v for k, v in fresh.items() if k != name},
        Normaliser(4).state(),
    ):
        with pytest.raises(ValueError, match="expected the state of a normaliser"):
            normaliser.load_state(wrong)
    assert all(torch.equal(tensor, before[key]) for key, tensor in normaliser.state().items())


def test_float64_observations_stay_float64() -> None:
    normaliser = Normaliser(2)
    x = torch.randn((8, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normaliser.update(x)
    assert normaliser(x).dtype == torch.float64
