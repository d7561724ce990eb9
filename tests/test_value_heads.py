# mypy: disable-error-code="no-untyped-call"
"""Value heads against autograd, numerical differences, and projections written as plain loops."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.algorithms import HeadSettings
from learners.heads import C51, REACH, Classification, HlGauss, Label, Mse, TwoHot, ValueHead, make_head

Kind = Literal["mse", "two_hot", "hl_gauss", "c51"]
KINDS: tuple[Kind, ...] = ("mse", "two_hot", "hl_gauss", "c51")
CLASSES = KINDS[1:]
SUPPORT = (-10.0, 10.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def head_of(kind: Kind, bins: int = 21, *, dtype: torch.dtype = torch.float32) -> ValueHead:
    return make_head(HeadSettings(kind=kind, bins=bins), SUPPORT, dtype=dtype)


def classification(kind: Kind, bins: int = 21, *, dtype: torch.dtype = torch.float32) -> Classification:
    head = head_of(kind, bins, dtype=dtype)
    assert isinstance(head, Classification)
    return head


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numerical(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a function that gives a scalar, in float64."""
    flat = at.flatten()
    gradient = torch.empty_like(flat)
    for i in range(len(flat)):
        ends = []
        for sign in (1.0, -1.0):
            moved = flat.clone()
            moved[i] += sign * step
            ends.append(function(moved.view_as(at)).item())
        gradient[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient.view_as(at)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_loss_is_that_of_numerical_differences_and_of_autograd(kind: Kind) -> None:
    head = head_of(kind, 11, dtype=torch.float64)
    logits = 2.0 * random(2, 3, head.outputs)
    after, reward = random(1, 3, head.outputs, seed=1), random(1, 3, seed=2)
    target = head.label(after, reward, torch.full((3,), 0.9, dtype=torch.float64), 0.5).target
    weight = random(2, 3, seed=3)  # each sample's gradient is its own

    loss, gradient = head.loss(logits, target)
    assert loss.shape == (2, 3)
    assert gradient.shape == logits.shape
    differences = numerical(lambda x: (head.loss(x, target)[0] * weight).sum(), logits)
    torch.testing.assert_close(gradient * weight.unsqueeze(-1), differences, rtol=1e-6, atol=1e-8)

    leaf = logits.clone().requires_grad_()
    if kind == "mse":
        reference = 0.5 * (leaf.squeeze(-1) - target) ** 2
    else:
        expanded = target.expand_as(leaf).reshape(6, -1)
        reference = torch.nn.functional.cross_entropy(leaf.view(6, -1), expanded, reduction="none").view(2, 3)
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad((reference * weight).sum(), leaf)
    torch.testing.assert_close(gradient * weight.unsqueeze(-1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_mean_is_that_of_numerical_differences_and_of_autograd(kind: Kind) -> None:
    head = head_of(kind, 11, dtype=torch.float64)
    logits, of_mean = 2.0 * random(2, 3, head.outputs), random(2, 3, seed=1)
    gradient = head.mean_gradient(logits, of_mean)
    differences = numerical(lambda x: (head.mean(x) * of_mean).sum(), logits)
    torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-8)
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad((head.mean(leaf) * of_mean).sum(), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_step_along_the_gradient_of_its_own_label_leaves_a_perfect_network_alone(kind: Kind) -> None:
    head = classification(kind, dtype=torch.float64)
    logits = random(4, head.outputs)
    _, gradient = head.loss(logits, torch.softmax(logits, -1))
    assert gradient.abs().max() < 1e-15


# --------------------------------------------------------------------------------------------------------- labels


def test_mse_is_the_plain_squared_error_bit_for_bit() -> None:
    head = Mse()
    q, after = random(2, 5, 1, dtype=torch.float32), random(5, 1, seed=1, dtype=torch.float32)
    reward, log_prob = random(5, seed=2, dtype=torch.float32), random(5, seed=3, dtype=torch.float32)
    discount, temperature = torch.full((5,), 0.99), torch.tensor(0.2)
    label = head.label(after, reward, discount, -(temperature * log_prob))
    y = reward + discount * (after.squeeze(-1) - temperature * log_prob)
    assert torch.equal(label.target, y)
    assert torch.equal(label.value, y)
    loss, gradient = head.loss(q, label.target)
    error = q - y.unsqueeze(-1)
    assert torch.equal(gradient, error)
    assert torch.equal(loss, 0.5 * error.squeeze(-1).square())


@pytest.mark.parametrize("bins", [2, 51, 101, 401, 4096])
@pytest.mark.parametrize("support", [SUPPORT, (0.0, 1.0), (-1000.0, 3000.0)])
@pytest.mark.parametrize("kind", CLASSES)
def test_label_recovers_every_value_to_a_thousandth_of_a_bin_in_float32(
    kind: Kind, support: tuple[float, float], bins: int
) -> None:
    head = make_head(HeadSettings(kind=kind), support, bins=bins)
    assert isinstance(head, Classification)
    y = torch.linspace(*support, 2003)
    probability = head.distribution(y)
    assert probability.min() >= 0.0
    torch.testing.assert_close(probability.sum(-1), torch.ones(len(y)), rtol=0, atol=1e-6)
    mean = probability.double() @ head.centres.double()
    assert (mean - y.double()).abs().max() < 1e-3 * head.width
    # A network that fits the label says the value: in float32, from logits.
    said = head.mean(probability.clamp(min=1e-30).log())
    assert (said - y).abs().max() < 2e-3 * head.width


@given(y=st.floats(-10.0, 10.0), bins=st.integers(2, 200))
def test_two_hot_keeps_the_mean_exactly_and_touches_two_neighbours(y: float, bins: int) -> None:
    head = TwoHot(*SUPPORT, bins, dtype=torch.float64)
    probability = head.distribution(torch.tensor(y, dtype=torch.float64))
    assert (probability @ head.centres).item() == pytest.approx(y, abs=1e-12)
    used = probability.nonzero().flatten().tolist()
    assert len(used) <= 2
    assert used[-1] - used[0] <= 1
    assert head.centres[0].item() == -10.0
    assert head.centres[-1].item() == pytest.approx(10.0, abs=1e-12)


def normal_mass(low: float, high: float) -> float:
    return 0.5 * (math.erf(high / math.sqrt(2.0)) - math.erf(low / math.sqrt(2.0)))


@settings(max_examples=40)
@given(y=st.floats(-10.0, 10.0), bins=st.integers(2, 60), sigma=st.floats(0.6, 2.0))
def test_hl_gauss_is_the_mass_of_a_truncated_gaussian_in_each_bin(y: float, bins: int, sigma: float) -> None:
    head = HlGauss(*SUPPORT, bins, sigma=sigma, dtype=torch.float64)
    width = 20.0 / bins
    outside = math.ceil(REACH * sigma)
    edges = [-10.0 + (i - outside) * width for i in range(bins + 2 * outside + 1)]
    deviation = sigma * width
    masses = [normal_mass((a - y) / deviation, (b - y) / deviation) for a, b in pairwise(edges)]
    whole = normal_mass((edges[0] - y) / deviation, (edges[-1] - y) / deviation)
    expected = torch.tensor([mass / whole for mass in masses], dtype=torch.float64)
    probability = head.distribution(torch.tensor(y, dtype=torch.float64))
    torch.testing.assert_close(probability, expected, rtol=1e-9, atol=1e-12)
    centres = torch.tensor([(a + b) / 2 for a, b in pairwise(edges)], dtype=torch.float64)
    torch.testing.assert_close(head.centres, centres)
    assert edges[0] <= -10.0 - REACH * deviation + 1e-9
    assert (probability @ centres).item() == pytest.approx(y, abs=1e-3 * width)


def test_hl_gauss_cut_at_the_support_would_be_biased_there() -> None:
    """Why bins reach beyond it: with 101 bins on ±10 and none beyond, the label of 10 has a mean 0.137 lower."""
    head = HlGauss(*SUPPORT, 101, dtype=torch.float64)
    outside = (head.outputs - head.bins) // 2
    inside = slice(outside, -outside)
    cut = head.distribution(torch.tensor(10.0, dtype=torch.float64))[inside]
    assert 10.0 - (cut / cut.sum() @ head.centres[inside]).item() == pytest.approx(0.137, abs=1e-3)


def plain_projection(head: C51, probability: list[float], reward: float, discount: float, shift: float) -> list[float]:
    """The categorical projection as Bellemare et al. 2017 write it in algorithm 1, atom by atom."""
    low, high = head.support
    atoms = head.bins
    width = (high - low) / (atoms - 1)
    target = [0.0] * atoms
    for j in range(atoms):
        z = low + j * width
        moved = min(max(reward + discount * (z + shift), low), high)
        b = (moved - low) / width
        lower = min(math.floor(b), atoms - 1)
        upper = min(math.ceil(b), atoms - 1)
        if lower == upper:
            target[lower] += probability[j]
        else:
            target[lower] += probability[j] * (upper - b)
            target[upper] += probability[j] * (b - lower)
    return target


@given(
    reward=st.floats(-30.0, 30.0),
    discount=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    shift=st.floats(-5.0, 5.0),
    bins=st.integers(2, 30),
    seed=st.integers(0, 1000),
)
def test_c51_projects_as_the_plain_loop_does(
    reward: float, discount: float, shift: float, bins: int, seed: int
) -> None:
    head = C51(*SUPPORT, bins, dtype=torch.float64)
    logits = 3.0 * random(1, bins, seed=seed)
    as_tensor = [torch.tensor([x], dtype=torch.float64) for x in (reward, discount, shift)]
    label = head.label(logits, *as_tensor)
    probability = torch.softmax(logits[0], -1)
    expected = plain_projection(head, probability.tolist(), reward, discount, shift)
    torch.testing.assert_close(label.target[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    mean = sum(p * (-10.0 + j * head.width) for j, p in enumerate(probability.tolist()))
    assert label.value.item() == pytest.approx(reward + discount * (mean + shift), abs=1e-9)


def test_c51_keeps_the_distribution_where_two_hot_keeps_its_mean() -> None:
    logits = torch.full((1, 21), -40.0)
    logits[0, [0, 20]] = 0.0  # -10 or 10, evenly
    reward, discount = torch.zeros(1), torch.tensor([0.5])
    c51, two_hot = (head_of(kind).label(logits, reward, discount, 0.0).target[0] for kind in ("c51", "two_hot"))
    assert c51[[5, 15]].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)  # -5 or 5
    assert two_hot[10].item() == pytest.approx(1.0, abs=1e-6)  # 0


@pytest.mark.parametrize("kind", KINDS)
def test_label_is_of_the_backed_up_mean(kind: Kind) -> None:
    head = head_of(kind, dtype=torch.float64)
    logits = random(4, head.outputs)
    reward, discount, shift = random(4, seed=1), random(4, seed=2).sigmoid(), random(4, seed=3)
    y = reward + discount * (head.mean(logits) + shift)
    label = head.label(logits, reward, discount, shift)
    torch.testing.assert_close(label.value, y)
    if isinstance(head, Classification):
        assert label.target.shape == (4, head.outputs)
        torch.testing.assert_close(label.target @ head.centres, y, rtol=0, atol=1e-3 * head.width)
    without = head.label(logits, reward, discount, 0.0)
    zeros = head.label(logits, reward, discount, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(without.target, zeros.target)


@pytest.mark.parametrize("kind", KINDS)
def test_one_label_serves_an_ensemble_and_arguments_broadcast(kind: Kind) -> None:
    head = head_of(kind, dtype=torch.float64)
    after, logits = random(2, 5, head.outputs), random(3, 2, 5, head.outputs, seed=1)
    reward, discount = random(5, seed=2), torch.tensor(0.9, dtype=torch.float64)
    label = head.label(after, reward, discount, random(2, 1, seed=3))
    assert label.value.shape == (2, 5)
    one_by_one = [
        head.label(after[i, j], reward[j], discount, random(2, 1, seed=3)[i, 0]).target
        for i in range(2)
        for j in range(5)
    ]
    torch.testing.assert_close(label.target.flatten(0, 1), torch.stack(one_by_one))
    loss, gradient = head.loss(logits, label.target)
    assert loss.shape == (3, 2, 5)
    for member in range(3):
        alone = head.loss(logits[member], label.target)
        torch.testing.assert_close((loss[member], gradient[member]), alone)


# ----------------------------------------------------------------------------------------------- beyond the support


@pytest.mark.parametrize("kind", CLASSES)
def test_values_beyond_the_support_are_clamped_and_counted(kind: Kind) -> None:
    head = classification(kind)
    reward = torch.tensor([-1e6, -10.5, 10.5, 1e6, -10.0, 0.0, 10.0, 9.99])
    label = head.label(torch.zeros(8, head.outputs), reward, torch.zeros(8), 0.0)
    assert torch.equal(label.value, reward)
    assert head.clipped(label).item() == 0.5
    assert head.clipped(label).shape == ()
    assert label.target.isfinite().all()
    mean = label.target @ head.centres
    assert mean[:4].tolist() == pytest.approx([-10.0, -10.0, 10.0, 10.0], abs=2e-3)
    torch.testing.assert_close(label.target[3], label.target[6], rtol=0, atol=1e-6)


def test_mse_clips_nothing() -> None:
    value = torch.tensor([1e30, -1e30])
    assert Mse().clipped(Label(value, value)).item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_and_breaks_no_index(kind: Kind) -> None:
    head = head_of(kind)
    logits = torch.zeros(3, head.outputs)
    logits[2] = math.nan
    label = head.label(logits, torch.tensor([math.nan, 0.0, 0.0]), torch.ones(3), 0.0)
    loss, _ = head.loss(torch.zeros(3, head.outputs), label.target)
    assert loss.isnan().tolist() == [True, False, True]


# --------------------------------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_mean_of_a_mixture_is_the_mean_of_the_means(kind: Kind, dim: int) -> None:
    head = head_of(kind, dtype=torch.float64)
    logits = 5.0 * random(3, 4, head.outputs)
    mixed = head.mixture(logits, dim)
    torch.testing.assert_close(head.mean(mixed), head.mean(logits).mean(0 if dim == 0 else 1))
    if kind != "mse":
        average = torch.softmax(logits, -1).mean(dim)
        torch.testing.assert_close(mixed.exp(), average)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_mixture_of_certain_and_distant_members_stays_finite(kind: Kind) -> None:
    head = classification(kind)
    logits = torch.full((2, 1, head.outputs), -1e4)
    logits[0, 0, 0] = logits[1, 0, -1] = 1e4
    mixed = head.mixture(logits, 0)
    assert mixed.isfinite().all()
    assert head.mean(mixed).item() == pytest.approx(0.0, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ making them


def test_settings_choose_the_head_and_its_outputs() -> None:
    expected: dict[Kind, tuple[type, int]] = {
        "mse": (Mse, 1),
        "two_hot": (TwoHot, 21),
        "c51": (C51, 21),
        "hl_gauss": (HlGauss, 27),
    }
    for kind, (cls, outputs) in expected.items():
        head = head_of(kind)
        assert type(head) is cls
        assert head.outputs == outputs
        assert head.support == (None if kind == "mse" else SUPPORT)
    assert make_head(HeadSettings(kind="two_hot"), SUPPORT, bins=33).outputs == 33
    assert make_head(HeadSettings(), None).outputs == 1


@pytest.mark.parametrize("support", [None, (1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_support_that_is_none_is_refused(kind: Kind, support: tuple[float, float] | None) -> None:
    with pytest.raises(ValueError, match=r"support|low < high"):
        make_head(HeadSettings(kind=kind), support)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_bin_is_refused(kind: Kind) -> None:
    with pytest.raises(ValueError, match="at least 2 bins"):
        make_head(HeadSettings(kind=kind), SUPPORT, bins=1)


# --------------------------------------------------------------------------------------------------- they learn


@pytest.mark.parametrize("kind", KINDS)
def test_descending_the_loss_learns_the_mean_of_a_random_target(kind: Kind) -> None:
    """Targets 0 and 6, evenly: the head's own kind of label, averaged over samples, has the mean 3."""
    head = head_of(kind, dtype=torch.float64)
    target = head.label(
        torch.zeros(2, head.outputs, dtype=torch.float64),
        torch.tensor([0.0, 6.0]).double(),
        torch.zeros(2).double(),
        0.0,
    ).target
    logits = torch.zeros(1, head.outputs, dtype=torch.float64)
    for _ in range(4000):
        logits = logits - 0.5 * head.loss(logits.expand(2, -1), target)[1].mean(0)
    assert head.mean(logits).item() == pytest.approx(3.0, abs=5e-2)


# ---------------------------------------------------------------------------------------------------- compilation


def everything(head: ValueHead, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    label = head.label(head.mixture(logits, 0), reward, discount, shift)
    loss, gradient = head.loss(logits, label.target)
    return label.target, loss, gradient, head.mean_gradient(logits, head.mean(logits)), head.clipped(label)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_traces_into_one_graph(kind: Kind) -> None:
    head = head_of(kind)
    arguments = [random(2, 8, head.outputs, dtype=torch.float32), *(random(8, seed=i).float() for i in range(3))]
    traced = torch.compile(everything, fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(head, *arguments), everything(head, *arguments))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_methods_agree_with_eager_ones(kind: Kind) -> None:
    head = head_of(kind)
    arguments = [random(2, 8, head.outputs, dtype=torch.float32), *(random(8, seed=i).float() for i in range(3))]
    compiled = torch.compile(everything, fullgraph=True)
    torch.testing.assert_close(compiled(head, *arguments), everything(head, *arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_agrees_with_the_cpu_without_waiting(kind: Kind) -> None:
    arguments = [
        random(2, 8, head_of(kind).outputs, dtype=torch.float32),
        *(random(8, seed=i).float() for i in range(3)),
    ]
    head = make_head(HeadSettings(kind=kind, bins=21), SUPPORT, device="cuda")
    on_device = [argument.cuda() for argument in arguments]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = everything(head, *on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = everything(head_of(kind), *arguments)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), reference, rtol=1e-4, atol=1e-5)
