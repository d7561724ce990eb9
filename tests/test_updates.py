"""What algorithms share: a support that follows the data, normalised observations, product libraries, checks of losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from configs.algorithms import DqnSettings, FlowSettings, HeadSettings, SacSettings, TargetSettings
from learners.dqn import Dqn
from learners.flow import Flow
from learners.normaliser import Normaliser
from learners.products import ONEDNN, TORCH, choose
from learners.sac import Sac
from learners.updates import Updates
from replay.buffers import buffers
from replay.schema import Field, StepSchema, Window, WindowBatch

BATCH = 256
OBSERVATION = {"observation": Field("observation", "float32", (4,))}
CONTINUOUS = StepSchema(OBSERVATION, Field("action", "float32", (2,)))
DISCRETE = StepSchema(OBSERVATION, Field("action", "int64", choices=3))
SHARED: dict[str, Any] = {"hidden": (16, 16), "discount": 0.9}

Make = Callable[..., Updates]


def sac(head: HeadSettings, **more: Any) -> Sac:
    settings = SacSettings(head=head, critic_lr=3e-3, polyak=0.05, **SHARED, **more)
    return Sac(CONTINUOUS, settings, batch_size=BATCH, device="cpu", seed=0)


def flow(head: HeadSettings, **more: Any) -> Flow:
    decoupled = TargetSettings(kind="decoupled", length=2, distill_expectile=0.7)
    settings = FlowSettings(head=head, critic_lr=3e-3, polyak=0.05, target=decoupled, **SHARED, **more)
    return Flow(CONTINUOUS, settings, batch_size=BATCH, device="cpu", seed=0)


def dqn(head: HeadSettings, **more: Any) -> Dqn:
    settings = DqnSettings(head=head, lr=3e-3, shift_every=20, **SHARED, **more)
    return Dqn(DISCRETE, settings, batch_size=BATCH, device="cpu", seed=0)


def dueling(head: HeadSettings) -> Dqn:
    return dqn(head, dueling=True)


def windows(learner: Updates, generator: np.random.Generator, *, reward: float) -> WindowBatch:
    schema = DISCRETE if isinstance(learner, Dqn) else CONTINUOUS
    length = learner._settings.target.length
    steps = np.zeros((BATCH, length + 1), schema.dtype)
    steps["observation"] = generator.uniform(-1, 1, steps["observation"].shape)
    steps["reward"] = reward * generator.uniform(0.5, 1.5, steps["reward"].shape)
    if schema is DISCRETE:
        steps["action"] = generator.integers(3, size=steps["action"].shape)
    else:
        steps["action"] = generator.uniform(-1, 1, steps["action"].shape)
    zeros = np.zeros(BATCH, np.int32)
    return WindowBatch(steps, np.full(BATCH, length, np.int32), zeros.astype(np.int64), zeros, np.ones(BATCH))


def values(learner: Updates) -> np.ndarray:
    generator = np.random.default_rng(9)
    observation = {"observation": generator.uniform(-1, 1, (200, 4)).astype(np.float32)}
    if isinstance(learner, Dqn):
        return learner.values(observation)
    assert isinstance(learner, Sac | Flow)
    return learner.values(observation, generator.uniform(-1, 1, (200, 2)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [sac, flow, dqn, dueling])
@pytest.mark.parametrize("kind", ["two_hot", "hl_gauss", "c51"])
def test_a_support_grows_with_the_returns_and_moves_no_value(make: Make, kind: str) -> None:
    learner = make(HeadSettings(kind=kind, bins=31, max_bins=61))
    generator = np.random.default_rng(0)
    widths = []
    for reward in (1.0, 2.0, 8.0):
        for _ in range(45):  # 45 · 256 rows are enough for a refit
            learner.update(windows(learner, generator, reward=reward))
        before = values(learner)
        row = learner.metrics()
        assert row["support/low"] <= before.min() <= before.max() <= row["support/high"]
        width = row["support/high"] - row["support/low"]
        assert np.abs(values(learner) - before).max() < 0.01 * width
        assert row["support/refit_error"] < 0.005
        assert row["support/bins"] <= 61
        widths.append(width)
    assert widths[0] < widths[-1] / 2, "the support did not follow the returns"

    resumed = make(HeadSettings(kind=kind, bins=31, max_bins=61))
    resumed.load_state(learner.state())
    np.testing.assert_array_equal(values(resumed), values(learner))
    batch = windows(learner, generator, reward=8.0)
    learner.update(batch)
    resumed.update(batch)
    ours, theirs = learner.state(), resumed.state()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0, equal_nan=True)


def test_returns_that_actors_saw_are_held_from_the_first_update_on() -> None:
    learner = sac(HeadSettings(kind="hl_gauss"))
    learner.observe_returns(-50.0, 20.0)
    learner.update(windows(learner, np.random.default_rng(0), reward=1.0))
    row = learner.metrics()
    assert row["support/low"] < -50.0
    assert row["support/high"] > 20.0
    assert row["value/clipped_fraction"] == 0.0


def test_values_beyond_a_fixed_support_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    learner = sac(HeadSettings(kind="two_hot", low=-1.0, high=1.0))
    generator = np.random.default_rng(0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            learner.update(windows(learner, generator, reward=10.0))
            row = learner.metrics()
            assert row["value/clipped_fraction"] == 1.0
            assert (row["support/low"], row["support/high"]) == (-1.0, 1.0)
    lines = [record.getMessage() for record in caplog.records if "clamped" in record.getMessage()]
    assert lines == ["100.0 % of the targets lay outside the value support, -1 to 1, and were clamped"]


@pytest.mark.parametrize("make", [sac, flow, dqn])
def test_normalised_observations_are_those_that_plain_networks_would_be_shown(make: Make) -> None:
    learner, plain = make(HeadSettings(), normalise_observations=True), make(HeadSettings())
    normaliser, generator = Normaliser(4), np.random.default_rng(0)
    for _ in range(5):
        batch = windows(learner, generator, reward=1.0)
        batch.steps["observation"] = 100.0 + 5.0 * batch.steps["observation"]
        normaliser.update(torch.tensor(batch.steps["observation"][:, 0]))
        learner.update(batch)
        shown = WindowBatch(batch.steps.copy(), batch.length, batch.item, batch.shard, batch.probability)
        shown.steps["observation"] = normaliser(torch.tensor(batch.steps["observation"])).numpy()
        plain.update(shown)
    ours, theirs = learner.state(), plain.state()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
    assert set(ours) - set(theirs) == {"normaliser.count", "normaliser.mean", "normaliser.squares"}


@pytest.mark.parametrize("make", [sac, flow, dqn])
def test_a_loss_that_is_not_finite_is_reported_with_its_batch(make: Make) -> None:
    learner, generator = make(HeadSettings()), np.random.default_rng(0)
    learner.update(windows(learner, generator, reward=1.0))
    learner.check_finite()
    learner.update(windows(learner, generator, reward=np.nan))
    with pytest.raises(FloatingPointError, match=r"updates 1 to 2: .*loss/critic = nan.*\|return\| nan"):
        learner.metrics()


def test_both_product_libraries_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 8, 5), (3, 5, 7), (3, 1, 7)))
    grad = torch.randn((3, 8, 7), generator=generator)
    for relu in (False, True):
        torch.testing.assert_close(ONEDNN.affine(x, weight, bias, relu=relu), TORCH.affine(x, weight, bias, relu=relu))
    torch.testing.assert_close(ONEDNN.input_gradient(grad, weight), TORCH.input_gradient(grad, weight))
    into, expected = torch.empty(3, 5, 7), torch.empty(3, 5, 7)
    ONEDNN.weight_gradient(x, grad, into)
    TORCH.weight_gradient(x, grad, expected)
    torch.testing.assert_close(into, expected)
    assert choose("onednn", torch.device("cpu"), torch.float32) is ONEDNN
    assert choose("auto", torch.device("cpu"), torch.float64) is TORCH


def test_small_pictures_are_not_stacked_beside_large_ones() -> None:
    """Only fields that lie apart are kept as single frames and stacked; what an encoder sees must say the same."""
    schema = StepSchema(
        {
            "observation/map": Field("observation/map", "uint8", (10, 10)),
            "observation/camera": Field("observation/camera", "uint8", (64, 64)),
        },
        Field("action", "int64", choices=3),
    )
    settings = DqnSettings(hidden=(8,))
    learner = Dqn(schema, settings, batch_size=2, device="cpu", seed=0, stack=4)
    batch = buffers(schema, Window(length=1, stack=4), 2)
    batch.length[:] = 1
    batch.steps["observation/map"][0, 0] = 7
    (staged,) = learner.stage(batch)
    assert staged.frames is not None
    assert staged.frames.shape == (4, 1, 10, 10)
    assert staged.frames[0].unique().tolist() == [7]
    assert staged.observation.shape == (4, 4 * 64 * 64)
    learner.update([staged])
    learner.check_finite()


def test_observations_of_frames_alone_have_nothing_to_normalise() -> None:
    schema = StepSchema(
        {"observation": Field("observation", "uint8", (10, 10, 2))}, Field("action", "int64", choices=3)
    )
    settings = DqnSettings(hidden=(8,), normalise_observations=True)
    learner = Dqn(schema, settings, batch_size=2, device="cpu", seed=0)
    batch = buffers(schema, Window(length=1), 2)
    batch.length[:] = 1
    learner.update(batch)
    learner.check_finite()


def test_a_refused_checkpoint_changes_nothing() -> None:
    head = HeadSettings(kind="hl_gauss", bins=31)
    learner, generator = sac(head), np.random.default_rng(0)
    learner.update(windows(learner, generator, reward=1.0))
    other = Sac(CONTINUOUS, SacSettings(head=head, hidden=(8,)), batch_size=BATCH, device="cpu", seed=0)
    other.update(windows(other, generator, reward=100.0))
    before = learner.state()
    with pytest.raises(ValueError, match=r"algorithm\.hidden.*tensors differ"):
        learner.load_state(other.state())
    after = learner.state()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_from_before_the_first_update_leaves_the_support_open() -> None:
    head = HeadSettings(kind="hl_gauss", bins=31)
    fresh, resumed = sac(head), sac(head)
    resumed.load_state(sac(head).state())
    for learner in (fresh, resumed):
        learner.update(windows(learner, np.random.default_rng(0), reward=1e-3))
    assert fresh.metrics()["support/high"] == resumed.metrics()["support/high"] < 0.1
