"""Automatic supports: what the data asks for, growth that changes no value, and the refit to wider bins."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.heads import Classification, make_head
from learners.support import (
    RECORD,
    REFIT_ROWS,
    SAMPLE,
    SupportTracker,
    grow,
    grow_columns,
    refit,
    resample_columns,
)

Kind = Literal["two_hot", "hl_gauss", "c51"]
CLASSES: tuple[Kind, ...] = ("two_hot", "hl_gauss", "c51")


def classification(
    kind: Kind, support: tuple[float, float], bins: int, dtype: torch.dtype = torch.float32
) -> Classification:
    head = make_head(HeadSettings(kind=kind), support, bins=bins, dtype=dtype)
    assert isinstance(head, Classification)
    return head


def by_value(tensor: Tensor, values: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], values, -1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------- what is needed


def test_returns_count_as_they_are_and_get_the_margin() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.25))
    assert not tracker.observed
    tracker.observe_returns(2.0, 4.0)
    tracker.observe_returns(0.0, 3.0)
    assert tracker.observed
    assert tracker.needed() == (-1.0, 5.0)
    assert not tracker.outgrown((0.0, 4.0))
    assert tracker.outgrown((0.1, 4.0))
    assert tracker.outgrown((0.0, 3.9))


def test_targets_count_by_their_quantiles() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.0))
    values = torch.linspace(0.0, 1000.0, 1001)[torch.randperm(1001, generator=generator())]
    tracker.observe_targets(values)
    assert tracker.needed() == pytest.approx((10.0, 990.0))
    tracker.observe_returns(-5.0, 20.0)
    assert tracker.needed() == pytest.approx((-5.0, 990.0))


def test_every_call_adds_to_the_record() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.0))
    for value in (0.0, 50.0, 100.0):
        tracker.observe_targets(torch.full((100,), value))
    assert tracker.needed() == (0.0, 100.0)


def test_targets_are_forgotten_after_a_while_and_returns_are_not() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.0))
    tracker.observe_targets(torch.tensor([-500.0, 500.0]))
    tracker.observe_returns(0.0, 100.0)
    assert tracker.needed()[1] > 400.0
    for _ in range(RECORD // SAMPLE + 1):
        tracker.observe_targets(torch.linspace(0.0, 50.0, SAMPLE).view(2, -1))
    assert tracker.needed() == (0.0, 100.0)


def test_one_call_keeps_a_sample_and_drops_what_is_not_finite() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.0))
    tracker.observe_targets(torch.tensor([math.nan, math.inf, -math.inf]))
    assert not tracker.observed
    tracker.observe_targets(torch.linspace(0.0, 100.0, 10 * SAMPLE + 1))
    assert SAMPLE // 2 <= int(tracker.state()["written"]) <= SAMPLE
    assert tracker.needed() == pytest.approx((1.0, 99.0), abs=0.2)
    tracker.observe_targets(torch.empty(0))


@pytest.mark.parametrize("pair", [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_returns_that_are_none_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite discounted returns"):
        SupportTracker(HeadSettings()).observe_returns(*pair)


def test_without_rewards_the_support_is_around_zero() -> None:
    tracker = SupportTracker(HeadSettings())
    assert tracker.needed() == (-1.0, 1.0)
    assert not tracker.outgrown((5.0, 6.0))
    tracker.observe_returns(0.0, 0.0)
    assert tracker.needed() == (-1.0, 1.0)
    assert not tracker.outgrown((-1.0, 1.0))


def test_rounding_outgrows_nothing() -> None:
    tracker = SupportTracker(HeadSettings(margin=0.0))
    tracker.observe_returns(-7.0, 7.0)
    assert not tracker.outgrown((-7.0 + 1e-9, 7.0 - 1e-9))


@given(
    low=st.floats(-1e9, 1e9, allow_subnormal=False),
    width=st.floats(0.0, 1e9, allow_subnormal=False),
    margin=st.floats(0.0, 10.0),
)
def test_a_support_covers_what_was_seen_and_is_wide_enough_for_float32(low: float, width: float, margin: float) -> None:
    tracker = SupportTracker(HeadSettings(margin=margin))
    tracker.observe_returns(low, low + width)
    needed = tracker.needed()
    assert needed[0] <= low
    assert needed[1] >= low + width
    assert not tracker.outgrown(needed)
    magnitude = max(abs(low), abs(low + width))
    assert needed[1] - needed[0] >= 0.0999 * magnitude
    assert needed[1] > needed[0]
    assert (needed[1] - needed[0]) >= width * (1 + 2 * margin) * 0.9999


def test_a_support_fixed_by_hand_stays() -> None:
    tracker = SupportTracker(HeadSettings(low=-1.0, high=2.0))
    tracker.observe_returns(-100.0, 100.0)
    assert tracker.needed() == (-1.0, 2.0)
    assert not tracker.outgrown((-1.0, 2.0))


def test_a_tracker_continues_from_its_state() -> None:
    first, second = SupportTracker(HeadSettings()), SupportTracker(HeadSettings())
    first.observe_returns(-3.0, 2.0)
    first.observe_targets(torch.linspace(0, 50, 100))
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    assert second.needed() == first.needed()
    for tracker in (first, second):
        tracker.observe_targets(torch.linspace(-50, 0, 100))
    assert second.needed() == first.needed()


# ---------------------------------------------------------------------------------------------------------- growth


@settings(max_examples=200)
@given(
    kind=st.sampled_from(CLASSES),
    bins=st.integers(2, 120),
    extra=st.integers(0, 300),
    low=st.floats(-1e3, 1e3),
    width=st.floats(0.1, 1e3),
    below=st.floats(0.0, 5.0),
    above=st.floats(0.0, 5.0),
    far=st.sampled_from([1.0, 1e-3, 1e4]),
)
def test_growth_covers_what_is_needed_within_the_most_bins(
    kind: Kind, bins: int, extra: int, low: float, width: float, below: float, above: float, far: float
) -> None:
    setting = HeadSettings(kind=kind, bins=bins, max_bins=bins + extra)
    head = classification(kind, (low, low + width), bins)
    needed = (low - below * far * width, low + width + above * far * width)
    growth = grow(head, needed, setting)
    grown = classification(kind, growth.support, growth.bins)
    slack = 1e-6 * grown.width
    assert growth.support[0] <= min(needed[0], low) + slack
    assert growth.support[1] >= max(needed[1], low + width) - slack
    assert bins <= growth.bins <= bins + extra
    if growth.doublings == 0:
        assert grown.width == pytest.approx(head.width)
        assert growth.bins == bins + growth.before + growth.after
        assert grown.outputs == head.outputs + growth.before + growth.after
        assert growth.before * head.width < low - needed[0] + head.width
    else:
        # Not doubled without need, and never by less than what is asked for.
        assert grown.width >= head.width * 2**growth.doublings * (1 - 1e-9)
        wider = (needed[1] - needed[0]) / (head.width * 2 ** (growth.doublings - 1))
        assert wider + 2 > bins + extra - 1 or growth.doublings == 1


def test_growth_on_either_side_and_what_is_inside() -> None:
    setting = HeadSettings(kind="two_hot", bins=11, max_bins=20)
    head = classification("two_hot", (0.0, 10.0), 11)
    assert grow(head, (2.0, 9.0), setting) == ((0.0, 10.0), 11, 0, 0, 0)
    assert grow(head, (-1.5, 9.0), setting) == ((-2.0, 10.0), 13, 2, 0, 0)
    assert grow(head, (2.0, 12.0), setting) == ((0.0, 12.0), 13, 0, 2, 0)
    assert grow(head, (-1e-12, 10.0 + 1e-12), setting) == ((0.0, 10.0), 11, 0, 0, 0)
    assert grow(head, (-4.0, 15.0), setting) == ((-4.0, 15.0), 20, 4, 5, 0)
    assert grow(head, (-4.0, 16.0), setting) == ((-4.0, 16.0), 11, 0, 0, 1)
    assert grow(head, (-4.0, 40.0), setting) == ((-4.0, 40.0), 12, 0, 0, 2)
    with pytest.raises(ValueError, match="finite"):
        grow(head, (-math.inf, 1.0), setting)


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", CLASSES)
def test_growth_changes_no_value(kind: Kind, scale: float, values: int) -> None:
    """Whatever the weights: logits far below zero, where new biases of -20 alone would outweigh old bins, included."""
    draw = generator()
    head = classification(kind, (-10.0, 10.0), 21)
    setting = HeadSettings(kind=kind, bins=21, max_bins=401)
    growth = grow(head, (-40.0, 100.0), setting)
    assert growth.before > 0
    assert growth.after > growth.before
    grown = classification(kind, growth.support, growth.bins)
    features = torch.rand(2, 500, 32, generator=draw)
    weight = scale * torch.randn(2, 32, values * head.outputs, generator=draw)
    bias = scale * torch.randn(2, 1, values * head.outputs, generator=draw) - 15.0
    grown_weight, grown_bias = grow_columns(weight, bias, growth.before, growth.after, values=values)
    assert grown_weight.shape == (2, 32, values * grown.outputs)
    assert grown_bias.shape == (2, 1, values * grown.outputs)

    def values_of(head: Classification, weight: Tensor, bias: Tensor) -> Tensor:
        return head.mean(by_value(features.double() @ weight.double() + bias.double(), values).float())

    moved = values_of(grown, grown_weight, grown_bias) - values_of(head, weight, bias)
    assert moved.abs().max() < 1e-3 * head.width


def test_growth_copies_old_columns_and_averages_moments() -> None:
    weight = torch.arange(12.0).view(1, 2, 6)  # two inputs, two values of three bins
    bias = torch.arange(6.0).view(1, 1, 6)
    new_weight, new_bias = grow_columns(weight, bias, 1, 2, values=2)
    assert new_weight[0].tolist() == [[1, 0, 1, 2, 1, 1, 4, 3, 4, 5, 4, 4], [7, 6, 7, 8, 7, 7, 10, 9, 10, 11, 10, 10]]
    assert new_bias.flatten().tolist() == [-19, 0, 1, 2, -19, -19, -16, 3, 4, 5, -16, -16]
    _, moments = grow_columns(weight, bias, 1, 2, values=2, offset=0.0)
    assert moments.flatten().tolist() == [1, 0, 1, 2, 1, 1, 4, 3, 4, 5, 4, 4]


# ----------------------------------------------------------------------------------------------------------- refit


def trained(
    kind: Kind, head: Classification, values: int = 1, networks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of 10 000 states and of as many others, and a last layer trained on the first (Adam) to say one steep function per network and value."""
    draw = generator(1)
    states = torch.randn(networks, 2 * REFIT_ROWS, 4, generator=draw)
    below = torch.randn(networks, 4, 64, generator=draw)
    features = torch.relu(states @ below + torch.randn(networks, 1, 64, generator=draw))
    slopes = torch.randn(networks, 4, values, generator=draw)
    targets = head.distribution(9.5 * torch.tanh(states @ slopes))  # (networks, rows, values, outputs)
    weight = torch.zeros(networks, 64, values * head.outputs)
    bias = torch.zeros(networks, 1, values * head.outputs)
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in (weight, bias)]
    for step in range(1, 201):
        rows = torch.randint(REFIT_ROWS, (256,), generator=draw)
        x = features[:, rows]
        logits = by_value(x @ weight + bias, values)
        gradient = head.loss(logits, targets[:, rows])[1].flatten(-2) / 256
        gradients = (x.mT @ gradient, gradient.sum(1, keepdim=True))
        for parameter, grad, (first, second) in zip((weight, bias), gradients, moments, strict=True):
            first.lerp_(grad, 0.1)
            second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
            parameter -= 3e-2 / (1 - 0.9**step) * first / scale
    return features[:, :REFIT_ROWS], features[:, REFIT_ROWS:], weight, bias


@pytest.mark.parametrize(("needed", "doublings"), [((-12.0, 14.0), 1), ((-60.0, 60.0), 3)])
@pytest.mark.parametrize("kind", ["two_hot", "hl_gauss"])  # c51 labels a scalar as two_hot does
def test_refit_of_a_trained_network_moves_no_value_by_a_two_hundredth_of_the_support(
    kind: Kind, needed: tuple[float, float], doublings: int
) -> None:
    setting = HeadSettings(kind=kind, bins=51, max_bins=51)
    old = classification(kind, (-10.0, 10.0), 51)
    features, unseen, weight, bias = trained(kind, old)
    growth = grow(old, needed, setting)
    assert growth.doublings == doublings
    new = classification(kind, growth.support, growth.bins)
    before = old.mean(features @ weight + bias)
    assert before.std() > 3.0  # it learnt something that can be lost
    assert torch.softmax(features @ weight + bias, -1).amax(-1).mean() > 0.15  # and is sure of it

    result = refit(features, weight, bias, old, new)
    after = new.mean(features @ result.weight + result.bias)
    error = (after - before).abs().max().item()
    assert result.error == pytest.approx(error, rel=1e-2, abs=1e-4)
    assert result.share == pytest.approx(result.error / (growth.support[1] - growth.support[0]))
    assert result.share < 0.005
    moved = new.mean(unseen @ result.weight + result.bias) - old.mean(unseen @ weight + bias)
    assert moved.abs().max() < 0.02 * (growth.support[1] - growth.support[0])
    assert moved.square().mean().sqrt() < 0.001 * (growth.support[1] - growth.support[0])
    # The fit is worth its time: it is better than where it starts.
    start = resample_columns(weight, bias, old, new)
    assert (new.mean(features @ start[0] + start[1]) - before).abs().max().item() > result.error


def test_refit_of_several_values_leaves_each_its_own() -> None:
    old = classification("hl_gauss", (-10.0, 10.0), 21)
    features, _, weight, bias = trained("hl_gauss", old, values=2)
    new = classification("hl_gauss", (-30.0, 30.0), 31)
    result = refit(features, weight, bias, old, new)
    assert result.weight.shape == (1, 64, 2 * new.outputs)
    before = old.mean(by_value(features @ weight + bias, 2))
    after = new.mean(by_value(features @ result.weight + result.bias, 2))
    assert (before - after).abs().max() < 0.005 * 60.0
    assert result.share < 0.005


def test_refit_of_dueling_streams_keeps_their_sums() -> None:
    """An advantage by itself is no value: it is v + a - mean a that must stay."""
    old, new = classification("two_hot", (-10.0, 10.0), 21), classification("two_hot", (-30.0, 30.0), 31)
    features, _, weight, bias = trained("two_hot", old, values=3)
    draw = generator(4)
    of_value, of_bias = 0.3 * torch.randn(1, 64, 21, generator=draw), torch.randn(1, 1, 21, generator=draw)

    def streams(sums: Tensor, shift: Tensor) -> Tensor:
        """Value and advantages of the sums, the advantages moved by what their mean takes away again."""
        sums = by_value(sums, 3)
        mean = sums.mean(2, keepdim=True)
        return torch.cat((mean, sums - mean + shift.unsqueeze(2)), 2).flatten(-2)

    result = refit(features, streams(weight, of_value), streams(bias, of_bias), old, new, dueling=True)
    assert result.weight.shape == (1, 64, 4 * new.outputs)
    outputs = by_value(features @ result.weight + result.bias, 4)
    value, advantage = outputs[:, :, :1], outputs[:, :, 1:]
    after = new.mean(value + advantage - advantage.mean(2, keepdim=True))
    moved = (after - old.mean(by_value(features @ weight + bias, 3))).abs().max().item()
    assert moved == pytest.approx(result.error, rel=1e-2)
    assert result.share < 0.005


@pytest.mark.parametrize("kind", ["two_hot", "c51"])
def test_refit_of_one_distribution_is_its_projection(kind: Kind) -> None:
    """With a bias alone every row says the same, which wider bins can say exactly."""
    old, new = classification(kind, (-10.0, 10.0), 21), classification(kind, (-30.0, 30.0), 31)
    bias = 3.0 * torch.randn(1, 1, old.outputs, generator=generator(3))
    features = torch.zeros(1, REFIT_ROWS, 2)
    result = refit(features, torch.zeros(1, 2, old.outputs), bias, old, new)
    projected = torch.softmax(bias, -1) @ new.distribution(old.centres)
    torch.testing.assert_close(torch.softmax(result.bias, -1), projected, rtol=0, atol=1e-4)
    assert result.share < 1e-5


@pytest.mark.parametrize("kind", CLASSES)
def test_refit_leaves_out_bins_that_are_not_used(kind: Kind) -> None:
    """A wide bin that holds a used and an unused one counts as used: it is not pulled down by the other's low logits."""
    old = classification(kind, (0.0, 20.0), 21)
    draw = generator(2)
    features = torch.rand(1, REFIT_ROWS, 8, generator=draw)
    weight = torch.randn(1, 8, old.outputs, generator=draw)
    bias = torch.where(torch.arange(old.outputs) % 2 == 0, 0.0, -60.0).view(1, 1, -1)
    new = classification(kind, (-10.0, 32.0), 22)
    before = old.mean(features @ weight + bias)
    assert before.std() > 1.0
    result = refit(features, weight, bias, old, new)
    moved = new.mean(features @ result.weight + result.bias) - before
    assert moved.abs().max() < 0.005 * 42.0
    start = resample_columns(weight, bias, old, new)
    averaged = new.mean(features @ start[0] + start[1]) - before
    assert averaged.abs().max() > moved.abs().max()


@pytest.mark.parametrize("kind", CLASSES)
def test_resampled_columns_are_linear_and_outside_ones_are_low(kind: Kind) -> None:
    old, new = classification(kind, (0.0, 10.0), 11), classification(kind, (-10.0, 20.0), 11)
    draw = generator()
    tensors = [torch.randn(2, 5, 2 * old.outputs, generator=draw) for _ in range(2)]
    zero = torch.zeros(2, 1, 2 * old.outputs)
    parts = [resample_columns(tensor, zero, old, new)[0] for tensor in tensors]
    whole, bias = resample_columns(tensors[0] + tensors[1], zero, old, new)
    torch.testing.assert_close(whole, parts[0] + parts[1])
    assert bias[0, 0, 0] == -20.0
    assert bias.shape == (2, 1, 2 * new.outputs)
    assert bias[0, 0, new.outputs // 2] == 0.0
    positive, _ = resample_columns(tensors[0].square(), zero, old, new, offset=0.0)
    assert positive.min() >= 0.0  # second moments stay what they are


def test_refit_refuses_too_few_rows_and_smaller_supports() -> None:
    old = classification("two_hot", (0.0, 10.0), 11)
    weight, bias = torch.zeros(1, 4, 11), torch.zeros(1, 1, 11)
    with pytest.raises(ValueError, match="10000 rows"):
        refit(torch.zeros(1, 100, 4), weight, bias, old, classification("two_hot", (0.0, 20.0), 11))
    with pytest.raises(ValueError, match="no smaller"):
        resample_columns(weight, bias, old, classification("two_hot", (1.0, 20.0), 11))
