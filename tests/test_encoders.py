# mypy: disable-error-code="no-untyped-call"
"""Encoders: gradients against autograd of plain torch models, the flat layout, and users' own modules with their errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import conv2d, layer_norm, linear, max_pool2d

from configs.algorithms import DqnSettings
from learners.convolutions import Impala, Nature
from learners.encoders import EncodedMlp, Encoder, make_encoder, make_network
from learners.modules import ModuleError, load_class
from learners.networks import EPSILON, Layer, Mlp, Network

VECTOR, ACTIONS, OUTPUTS, BATCH = 3, 2, 4, 3
HERE = "tests.test_encoders"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ encoders of a user


class Both(nn.Module):
    """Sees frames and vector; one of its parameters plays no part in the features."""

    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__()
        assert frame_shape is not None
        self.frames = Nature(frame_shape)
        self.vector = nn.Sequential(nn.Linear(vector_size, 5), nn.LayerNorm(5), nn.Tanh())
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, frames: Tensor, vector: Tensor) -> Tensor:
        return torch.cat((self.frames(frames), self.vector(vector.float())), -1)


class Wide(Impala):
    def __init__(self, frame_shape: tuple[int, int, int], vector_size: int) -> None:
        super().__init__(frame_shape, width=2)


class VectorOnly(nn.Module):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__()
        assert frame_shape is None
        self.linear = nn.Linear(vector_size, 6)

    def forward(self, frames: None, vector: Tensor) -> Tensor:
        return torch.sin(self.linear(vector))


class NoParameters(VectorOnly):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__(frame_shape, vector_size)
        del self.linear

    def forward(self, frames: None, vector: Tensor) -> Tensor:
        return torch.cat((torch.sin(vector), torch.cos(vector)), -1)


class WrongShape(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Tensor:
        return super().forward(frames, vector).sum(-1)


class WrongType(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Any:
        return super().forward(frames, vector), vector


class Bytes(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Tensor:
        return super().forward(frames, vector).to(torch.uint8)


class BatchNorm(VectorOnly):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__(frame_shape, vector_size)
        self.norm = nn.BatchNorm1d(6)


class Mixing(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Tensor:
        y = super().forward(frames, vector)
        return y - y.mean(0)


class Noisy(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Tensor:
        return torch.dropout(super().forward(frames, vector), 0.5, True)


class Frozen(VectorOnly):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__(frame_shape, vector_size)
        self.linear.bias.requires_grad_(False)


class Double(VectorOnly):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__(frame_shape, vector_size)
        self.linear.double()


class Lazy(VectorOnly):
    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__(frame_shape, vector_size)
        self.linear = nn.LazyLinear(6)


class Raises(VectorOnly):
    def forward(self, frames: None, vector: Tensor) -> Tensor:
        raise KeyError("left eye")


class NoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class NoModule:
    pass


def a_function() -> None:
    pass


# ------------------------------------------------------------------------------------------------- a plain torch model

CASES: dict[str, tuple[str, tuple[int, int, int] | None, int]] = {
    "nature, MinAtar-sized": ("nature", (4, 10, 10), 2),
    "nature, Atari": ("nature", (4, 84, 84), 2),
    "nature, one network": ("auto", (4, 36, 40), 1),
    "impala": ("impala", (3, 64, 64), 2),
    "impala, MinAtar-sized": ("impala", (4, 10, 10), 3),
    "user's, of both": (f"{HERE}:Both", (1, 12, 10), 2),
    "user's, of vectors": (f"{HERE}:VectorOnly", None, 3),
    "user's, without parameters": (f"{HERE}:NoParameters", None, 2),
}


def network(name: str, frame_shape: tuple[int, int, int] | None, networks: int, **options: Any) -> EncodedMlp:
    settings = DqnSettings(encoder=name, hidden=(7, 5))
    made = make_network(
        settings,
        networks=networks,
        inputs=VECTOR + ACTIONS,
        outputs=OUTPUTS,
        vector_size=VECTOR,
        frame_shape=frame_shape,
        **options,
    )
    assert isinstance(made, EncodedMlp)
    return made


def plain_module(name: str, frame_shape: tuple[int, int, int] | None) -> nn.Module:
    if ":" in name:
        made: nn.Module = load_class(name, "encoder")(frame_shape, VECTOR)
        return made
    assert frame_shape is not None
    return Impala(frame_shape) if name == "impala" else Nature(frame_shape)


def plain_output(module: nn.Module, layers: list[Layer], replaced: int, x: Tensor, frames: Tensor | None) -> Tensor:
    """One network, in torch's own operators: (batch, outputs); `layers` are its own, without a dimension of networks."""
    y = torch.cat((module(frames, x[:, :VECTOR]), x[:, replaced:]), -1)
    for i, layer in enumerate(layers):
        y = linear(y, layer.weight.mT, layer.bias[0])
        if layer.scale is not None and layer.shift is not None:
            y = layer_norm(y, y.shape[-1:], layer.scale[0], layer.shift[0], EPSILON)
        if i + 1 < len(layers):
            y = y.relu()
    return y


def own(view: Tensor | None, network: int) -> Any:
    """The part of one network, as a leaf of autograd."""
    return None if view is None else view[network].clone().requires_grad_()


def inputs(frame_shape: tuple[int, int, int] | None, *, seed: int = 0) -> tuple[Tensor, Tensor | None, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((BATCH, VECTOR + ACTIONS), generator=generator)
    if frame_shape is None:
        return x, None, generator
    return x, torch.randint(256, (BATCH, *frame_shape), dtype=torch.uint8, generator=generator), generator


@pytest.mark.parametrize(("normalised", "grad_mode"), [(False, False), (True, True)])
@pytest.mark.parametrize(("name", "frame_shape", "networks"), CASES.values(), ids=CASES)
def test_each_network_is_the_plain_model_and_has_its_gradients(
    name: str, frame_shape: tuple[int, int, int] | None, networks: int, normalised: bool, grad_mode: bool
) -> None:
    group = network(name, frame_shape, networks, layer_norm=normalised)
    x, frames, generator = inputs(frame_shape)
    flat = group.initial(generator)
    views, grad_flat = group.views(flat), torch.full((group.size,), 7.0)
    grad_views = group.views(grad_flat)
    of_output = torch.randn((networks, BATCH, OUTPUTS), generator=generator)
    with torch.set_grad_enabled(grad_mode):
        made = group(views, x, frames)
        made.parameter_gradient(of_output, grad_views)
        of_action = made.input_gradient(of_output, start=VECTOR)
    assert made.output.shape == (networks, BATCH, OUTPUTS)
    assert not made.output.requires_grad
    assert not flat.requires_grad

    of_x = torch.zeros_like(x)
    for n in range(networks):
        module = plain_module("nature" if name == "auto" else name, frame_shape)
        module.load_state_dict({key: view[n] for key, view in views.encoder.items()})
        layers = [Layer(*(own(view, n) for view in layer)) for layer in views.layers]
        own_x = x.clone().requires_grad_()
        expected = plain_output(module, layers, group.encoder.replaced, own_x, frames)
        torch.testing.assert_close(made.output[n], expected, rtol=1e-4, atol=1e-5)
        (expected * of_output[n]).sum().backward()
        for key, parameter in module.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(grad_views.encoder[key][n], wanted, rtol=1e-3, atol=1e-4)
        for layer, of_layer in zip(layers, grad_views.layers, strict=True):
            for view, of_view in zip(layer, of_layer, strict=True):
                if view is not None and of_view is not None:
                    torch.testing.assert_close(of_view[n], view.grad, rtol=1e-3, atol=1e-4)
        assert own_x.grad is not None
        of_x += own_x.grad
    torch.testing.assert_close(of_action, of_x[:, VECTOR:], rtol=1e-3, atol=1e-5)


def test_rows_of_x_may_differ_between_networks() -> None:
    group = network(f"{HERE}:Both", (1, 12, 10), 2)
    x, frames, generator = inputs((1, 12, 10))
    views = group.views(group.initial(generator))
    apart = torch.stack((x, 2.0 * x))
    made = group(views, apart, frames).output
    torch.testing.assert_close(made[0], group(views, x, frames).output[0])
    torch.testing.assert_close(made[1], group(views, 2.0 * x, frames).output[1])
    assert not torch.allclose(made[1], group(views, x, frames).output[1])


@pytest.mark.parametrize("name", ["nature", f"{HERE}:Both"])
def test_first_rows_of_a_pass_have_the_gradient_of_a_pass_over_them(name: str) -> None:
    group = network(name, (1, 12, 10), 2)
    x, frames, generator = inputs((1, 12, 10))
    assert frames is not None
    flat = group.initial(generator)
    of_output = torch.randn((2, 2, OUTPUTS), generator=generator)
    found, expected = torch.zeros(group.size), torch.zeros(group.size)
    made = group(group.views(flat), x, frames).first(2)
    made.parameter_gradient(of_output, group.views(found))
    group(group.views(flat), x[:2], frames[:2]).parameter_gradient(of_output, group.views(expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    made.parameter_gradient(of_output, group.views(expected))
    assert torch.equal(found, expected), "a pass can be asked again"
    assert made.output.shape == (2, 2, OUTPUTS)
    assert made.features.shape == (2, 2, 5)


def test_a_pass_without_gradient_keeps_no_graph() -> None:
    group = network("nature", (4, 10, 10), 2)
    x, frames, generator = inputs((4, 10, 10))
    views = group.views(group.initial(generator))
    wanted = group(views, x, frames)
    of_output = torch.ones_like(wanted.output)
    assert wanted.encoded.requires_grad
    made = group(views, x, frames, gradient=False)
    with torch.inference_mode():
        inferred = group(views, x, frames)
    for one in (made, made.first(1), inferred):
        assert one.encoded.grad_fn is None
        with pytest.raises(RuntimeError, match="gradient=False"):
            one.parameter_gradient(of_output, views)
    torch.testing.assert_close(made.output, wanted.output)
    # The gradient of the actions needs no encoder.
    assert torch.equal(made.input_gradient(of_output, start=VECTOR), wanted.input_gradient(of_output, start=VECTOR))


def test_the_input_gradient_stops_at_what_the_encoder_takes() -> None:
    group = network(f"{HERE}:VectorOnly", None, 2)
    x, _, generator = inputs(None)
    made = group(group.views(group.initial(generator)), x)
    with pytest.raises(ValueError, match=f"start ≥ {VECTOR}"):
        made.input_gradient(torch.ones_like(made.output), start=VECTOR - 1)


@pytest.mark.parametrize("name", ["nature", f"{HERE}:Both"])
def test_bfloat16_parameters(name: str) -> None:
    """Ours are evaluated in bfloat16, users' in float32; gradients are float32 in both."""
    group = network(name, (4, 10, 10), 2)
    x, frames, generator = inputs((4, 10, 10))
    flat = group.initial(generator)
    of_output = torch.randn((2, BATCH, OUTPUTS), generator=generator)
    exact, rough = torch.zeros(group.size), torch.zeros(group.size)
    group(group.views(flat), x, frames).parameter_gradient(of_output, group.views(exact))
    made = group(group.views(flat.bfloat16()), x, frames)
    made.parameter_gradient(of_output, group.views(rough))
    assert made.encoded.dtype == (torch.bfloat16 if name == "nature" else torch.float32)
    assert made.output.dtype == torch.float32
    assert torch.cosine_similarity(exact, rough, dim=0) > 0.99


@pytest.mark.parametrize("networks", [1, 2])
def test_float64_parameters_are_learnt_in_float64(networks: int) -> None:
    group = network("nature", (4, 10, 10), networks)
    x, frames, generator = inputs((4, 10, 10))
    flat = group.initial(generator).double()
    made = group(group.views(flat), x.double(), frames)
    of_output = torch.randn((networks, BATCH, OUTPUTS), generator=generator, dtype=torch.float64)
    grad = torch.zeros_like(flat)
    made.parameter_gradient(of_output, group.views(grad))
    # A parameter's gradient is the slope of the loss: central differences of the largest one, of the encoders alone.
    size = networks * group.encoder.size
    at, step = int(grad[:size].abs().argmax()), 1e-6
    ends = []
    for sign in (1.0, -1.0):
        moved = flat.clone()
        moved[at] += sign * step
        ends.append((group(group.views(moved), x.double(), frames).output * of_output).sum())
    torch.testing.assert_close(grad[at], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------- the flat tensor


def test_flat_layout() -> None:
    group = network("nature", (4, 10, 10), 3)
    flat = torch.arange(group.size, dtype=torch.float32)
    views = group.views(flat)
    held = [*views.encoder.values(), *(view for layer in views.layers for view in layer if view is not None)]
    assert torch.equal(torch.cat([view.flatten() for view in held]), flat), "every number once, in order"
    assert all(view.shape[0] == 3 for view in held)
    assert all(view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in held)
    for member, view in zip(group.members(flat, slice(1, 3)), held, strict=True):
        assert torch.equal(member, view[1:])
    with pytest.raises(ValueError, match=f"shape \\({group.size},\\)"):
        group.views(flat[1:])


def test_export_round_trip() -> None:
    group: Network = network("nature", (4, 10, 10), 2)
    flat = group.initial(torch.Generator().manual_seed(1))
    sent: Mapping[str, Tensor] = load(save({k: v.contiguous() for k, v in group.named("critics", flat).items()}))
    assert list(group.named("critics", flat))[:2] == [
        "critics.encoder.convolutions.0.weight",
        "critics.encoder.convolutions.0.bias",
    ]
    assert sent["critics.encoder.convolutions.0.weight"].shape == (2, 16, 4, 3, 3)
    assert sent["critics.0.weight"].shape == (2, 128 + VECTOR + ACTIONS, 7)
    back = torch.zeros(group.size)
    for name, view in group.named("critics", back).items():
        view.copy_(sent[name])
    assert torch.equal(back, flat)


def test_selected_networks_are_themselves() -> None:
    group = network("nature", (4, 10, 10), 3)
    x, frames, generator = inputs((4, 10, 10))
    views = group.views(group.initial(generator))
    chosen, own = group.select(views, torch.tensor([2, 0]))
    assert chosen.networks == 2
    torch.testing.assert_close(chosen(own, x, frames).output, group(views, x, frames).output[[2, 0]])
    one, single = group.select(views, torch.tensor([1]))
    torch.testing.assert_close(one(single, x, frames).output, group(views, x, frames).output[1:2])


def test_more_outputs_leave_all_but_the_last_layer() -> None:
    group = network("nature", (4, 10, 10), 2)
    wider = group.with_outputs(9)
    flat = group.initial(torch.Generator().manual_seed(0))
    last = group.last_layer(flat)
    kept = group.size - last.weight.numel() - last.bias.numel()
    fresh = torch.zeros(wider.size)
    fresh[:kept] = flat[:kept]
    for name, view in wider.named("g", fresh).items():
        if not name.startswith("g.2."):
            assert torch.equal(view, group.named("g", flat)[name])
    assert wider.last_layer(fresh).weight.shape == (2, 5, 9)
    assert not wider.last_layer(fresh).weight.any()


@pytest.mark.parametrize("name", ["nature", f"{HERE}:Both"])
def test_initial_parameters_follow_from_the_generator_alone(name: str) -> None:
    group = network(name, (4, 10, 10), 2)
    torch.manual_seed(1)
    first = group.initial(torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = group.initial(torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before), "the default generator is left as it was"
    assert not torch.equal(first, group.initial(torch.Generator().manual_seed(6)))
    weight = next(view for view in group.views(first).encoder.values() if view.dim() == 5)
    assert not torch.equal(weight[0], weight[1]), "networks of a group start apart"


# -------------------------------------------------------------------------------------------------------- convolutions

SHAPES: dict[str, tuple[type[Nature] | type[Impala], tuple[int, int, int], int]] = {
    "MinAtar": (Nature, (4, 10, 10), 128),
    "smallest": (Nature, (1, 3, 3), 128),
    "largest of the small": (Nature, (1, 35, 80), 128),
    "smallest of the large": (Nature, (1, 36, 36), 512),
    "Atari": (Nature, (4, 84, 84), 512),
    "uncropped": (Nature, (3, 210, 160), 512),
    "impala, MinAtar": (Impala, (4, 10, 10), 256),
    "impala, smallest": (Impala, (1, 3, 3), 256),
    "impala, Procgen": (Impala, (3, 64, 64), 256),
    "impala, Atari": (Impala, (4, 84, 84), 256),
}


@pytest.mark.parametrize(("kind", "frame_shape", "features"), SHAPES.values(), ids=SHAPES)
def test_shapes(kind: type[Nature] | type[Impala], frame_shape: tuple[int, int, int], features: int) -> None:
    module = kind(frame_shape)
    assert module(torch.zeros((2, *frame_shape), dtype=torch.uint8)).shape == (2, features)
    name = "nature" if kind is Nature else "impala"
    assert Encoder(name, frame_shape=frame_shape, vector_size=0).features == features


def test_parameters_of_the_published_networks() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # Mnih et al. 2015: 32 filters 8×8, 64 of 4×4, 64 of 3×3, 512 units on 7×7×64.
    nature = (4 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64 + (3136 + 1) * 512
    assert count(Nature((4, 84, 84))) == nature
    # Espeholt et al. 2018: per section one convolution and two blocks of two; 256 units on 11×11×32.
    impala = sum((a * 9 + 1) * b + 4 * (b * 9 + 1) * b for a, b in ((4, 16), (16, 32), (32, 32))) + (121 * 32 + 1) * 256
    assert count(Impala((4, 84, 84))) == impala
    assert count(Impala((4, 84, 84), width=2)) > 2 * impala - 256
    assert network(f"{HERE}:Wide", (4, 10, 10), 1).encoder.features == 256


def test_residual_blocks_add_to_what_they_get() -> None:
    module = Impala((2, 10, 12))
    for name, parameter in module.named_parameters():
        if "second" in name:
            nn.init.zeros_(parameter)
    frames = torch.randint(256, (3, 2, 10, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = frames / 255.0
    for section in module.sections:
        if isinstance(section, nn.Conv2d):
            y = max_pool2d(conv2d(y, section.weight, section.bias, padding=1), 3, stride=2, padding=1)
    expected = linear(y.relu().flatten(1), module.linear.weight, module.linear.bias).relu()
    torch.testing.assert_close(module(frames), expected)


@pytest.mark.parametrize("kind", [Nature, Impala])
def test_bytes_become_zero_to_one(kind: type[Nature] | type[Impala]) -> None:
    module = kind((1, 10, 10))
    seen: list[Tensor] = []
    first = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    frames = torch.arange(256, dtype=torch.uint8)[:100].view(1, 1, 10, 10) + 100
    module(frames)
    torch.testing.assert_close(seen[0], frames.float() / 255.0)


@pytest.mark.parametrize("kind", [Nature, Impala])
@pytest.mark.parametrize("frame_shape", [(1, 2, 10), (1, 10, 2), (0, 10, 10)])
def test_frames_without_room_are_refused(kind: type[nn.Module], frame_shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 3 × 3 pixels, got \("):
        kind(frame_shape)


# -------------------------------------------------------------------------------------------------- choice and errors


def test_without_frames_and_encoder_the_network_is_bare() -> None:
    for name in ("auto", "none"):
        settings = DqnSettings(encoder=name, hidden=(7, 5))
        made = make_network(settings, networks=2, inputs=5, outputs=4, vector_size=5, frame_shape=None, layer_norm=True)
        assert made == Mlp(2, 5, (7, 5), 4, layer_norm=True)
    assert make_encoder("auto", frame_shape=None, vector_size=5) is None
    chosen = make_encoder("auto", frame_shape=(4, 10, 10), vector_size=5)
    assert chosen is not None
    assert chosen.name == "nature"


@pytest.mark.parametrize(
    ("name", "frame_shape", "message"),
    [
        ("impala", None, "shows no frames"),
        ("none", (1, 10, 10), "columns of the observation vector"),
        ("imapla", (1, 10, 10), "expected auto, none, nature, impala or package.module:Class; nearest: impala"),
        ("nature", (1, 2, 10), "at least 3 × 3 pixels"),
    ],
)
def test_an_encoder_that_does_not_fit(name: str, frame_shape: tuple[int, int, int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(name, frame_shape=frame_shape, vector_size=3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WrongShape", r"expected features \(3, features\) of floating point .* got \(3,\) of torch.float32"),
        ("Bytes", r"expected features .* got \(3, 6\) of torch.uint8"),
        ("WrongType", "expected features as a tensor, got tuple"),
        ("BatchNorm", "buffers norm.running_mean, .* function of its parameters alone.* LayerNorm"),
        ("Mixing", "change with the other samples"),
        ("Noisy", "draws random numbers"),
        ("Frozen", "linear.bias requires no gradient"),
        ("Double", "expected float32 parameters, got torch.float64 for linear.weight"),
        ("Lazy", "linear.weight has no shape yet"),
        ("Raises", r"evaluating it on frames None and a vector \(3, 3\) raised KeyError: 'left eye'"),
        ("NoArguments", "making it with frame_shape None and vector_size 3 raised TypeError"),
        ("NoModule", r"derived from torch.nn.modules.module.Module, got one derived from builtins.object"),
        ("a_function", "holds function, expected a class"),
        ("VektorOnly", "has no class 'VektorOnly'; nearest: VectorOnly"),
    ],
)
def test_what_a_user_can_get_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        make_encoder(f"{HERE}:{name}", frame_shape=None, vector_size=3)
    assert "algorithm.encoder" in str(raised.value)


@pytest.mark.parametrize("path", ["no.such_module:Class", "tests:", ":Class", "a b:Class", "tests.test_encoders:a.b"])
def test_paths_that_name_nothing(path: str) -> None:
    with pytest.raises(ModuleError, match="the setting"):
        load_class(path, "the setting")


def test_a_class_is_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eyes_of_a_user.py").write_text("class Eye:\n    def see(self): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    assert load_class("eyes_of_a_user:Eye", "eye", methods=("see",)).__name__ == "Eye"
    with pytest.raises(ModuleError, match="expected a class with see, blink; blink is missing"):
        load_class("eyes_of_a_user:Eye", "eye", methods=("see", "blink"))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (None, r"\(4, 10, 10\), got None"),
        (torch.zeros((BATCH, 4, 10, 11), dtype=torch.uint8), r"\(4, 10, 10\), got \(4, 10, 11\)"),
        (torch.zeros((BATCH, 4, 10, 10)), "of torch.float32"),
    ],
)
def test_other_frames_than_expected(frames: Tensor | None, message: str) -> None:
    group = network("nature", (4, 10, 10), 1)
    views = group.views(torch.zeros(group.size))
    with pytest.raises(ValueError, match=message):
        group(views, torch.zeros((BATCH, VECTOR + ACTIONS)), frames)


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "learners" / "encoders.md").read_text()
    eyes, tried = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    (tmp_path / "eyes.py").write_text(eyes)
    (tmp_path / "try_eyes.py").write_text(tried)
    found = subprocess.run(
        [sys.executable, "try_eyes.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split("\n")[:2] == ["288", "torch.Size([2, 2, 1])"]
