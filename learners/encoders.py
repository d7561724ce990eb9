"""Encoders, which turn frames into features, and the networks that have one in front of their perceptron.

Encoders, ours and those of users, are torch modules, the one place of an update
where autograd is at work: the gradient of the features is computed by hand, like everything behind it, and autograd takes it
from there to the encoders' parameters. encoders.md says how to bring your own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.algorithms import AlgorithmSettings
from learners.convolutions import Impala, Nature, flat_size
from learners.modules import FrameShape, check_encoder, construct, evaluate, load_class
from learners.networks import Layer, Mlp, MlpPass, Network
from learners.products import TORCH, Products

BUILT_IN: dict[str, type[Nature] | type[Impala]] = {"nature": Nature, "impala": Impala}


class Encoder:
    """What an encoder is, apart from its parameters: its structure, its features, and what it takes of an observation.

    Learners and actors evaluate it with parameters that they hold. Encoders of ours see frames, and the observation vector
    goes past them; one of a user's sees frames and vector, and its features stand for both.
    """

    def __init__(self, name: str, *, frame_shape: FrameShape | None, vector_size: int) -> None:
        """`name` is nature, impala or package.module:Class; `vector_size` the width of the observation vector, 0 or more.

        Raises:
            ValueError: there is no such encoder, or it does not go with these observations; `ModuleError`, which is one,
                where a user's class is at fault.
        """
        self.name = name
        self.frame_shape = frame_shape
        self.vector_size = vector_size
        what = f"algorithm.encoder {name!r}"
        if name in BUILT_IN:
            if frame_shape is None:
                raise ValueError(
                    f"{what} is made of convolutions, and the environment shows no frames (uint8 fields with a height and a "
                    "width); take none, or auto"
                )
            self.replaced = 0
        elif ":" in name:
            self.replaced = vector_size
        else:
            near = difflib.get_close_matches(name, ("auto", "none", *BUILT_IN), n=1)
            raise ValueError(
                f"{what}: expected auto, none, nature, impala or package.module:Class"
                + (f"; nearest: {near[0]}" if near else "")
            )
        self._class: type[Any] = (
            BUILT_IN[name] if name in BUILT_IN else load_class(name, "algorithm.encoder", base=nn.Module)
        )
        self._keeps_float32 = name not in BUILT_IN
        self._module = self._make(torch.Generator().manual_seed(0))
        if name in BUILT_IN and frame_shape is not None:
            self.features = flat_size(self._module, frame_shape)
        else:
            self.features = check_encoder(self._module, what, frame_shape, vector_size)
        self.shapes = {key: parameter.shape for key, parameter in self._module.named_parameters()}

    @property
    def size(self) -> int:
        """Parameters of one network's encoder."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters of one network, float32 on the CPU, as the class draws them."""
        made = {name: parameter.detach() for name, parameter in self._make(generator).named_parameters()}
        shapes = {name: parameter.shape for name, parameter in made.items()}
        if shapes != self.shapes:
            raise ValueError(
                f"algorithm.encoder {self.name!r}: expected the same parameters each time it is made, got {shapes} after "
                f"{self.shapes}"
            )
        return made

    def __call__(
        self, networks: int, parameters: Mapping[str, Tensor], frames: Tensor | None, vector: Tensor
    ) -> Tensor:
        """Features (networks, batch, features).

        Args:
            networks: how many.
            parameters: by name, those of all networks stacked (networks, *shape).
            frames: (batch, channels, height, width) uint8, where the encoder sees frames.
            vector: (batch, vector_size), or one for each network (networks, batch, vector_size).

        Raises:
            ValueError: other frames than it was made for.
        """
        got = None if frames is None else tuple(frames.shape[1:])
        if got != self.frame_shape or (frames is not None and frames.dtype != torch.uint8):
            kind = "" if frames is None else f" of {frames.dtype}"
            raise ValueError(
                f"algorithm.encoder {self.name!r}: expected uint8 frames of (channels, height, width) {self.frame_shape}, "
                f"got {got}{kind}"
            )
        return evaluate(self._module, parameters, networks, frames, vector)

    def leaf(self, parameter: Tensor) -> Tensor:
        """`parameter` as the module takes it: users' modules compute in float32 where learners.precision is bfloat16."""
        parameter = parameter.detach()
        return parameter.float() if self._keeps_float32 and parameter.dtype == torch.bfloat16 else parameter

    def _make(self, generator: torch.Generator) -> nn.Module:
        def make() -> nn.Module:
            try:
                made: nn.Module = self._class(self.frame_shape, self.vector_size)
            except Exception as error:  # constructing runs the user's code: anything may come
                raise ValueError(
                    f"algorithm.encoder {self.name!r}: making it with frame_shape {self.frame_shape} and vector_size "
                    f"{self.vector_size} raised {type(error).__name__}: {error}"
                ) from error
            return made

        return construct(make, generator)


class EncodedViews(NamedTuple):
    """Views of a flat tensor of parameters of an `EncodedMlp`."""

    encoder: dict[str, Tensor]  # by name, all networks' stacked: (networks, *shape)
    layers: list[Layer]


@dataclass(frozen=True)
class EncodedMlp:
    """A group of networks, each a perceptron behind an encoder of its own.

    Encoders are never shared, so that the members of an ensemble and the functions of a chain stay independent. Their
    parameters come first in the flat tensor, one after the other, those of all networks side by side; then the perceptrons'.
    `mlp` takes (features, x without its first `encoder.replaced` columns).
    """

    encoder: Encoder
    mlp: Mlp

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        *,
        networks: int,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int,
        layer_norm: bool = False,
        products: Products = TORCH,
    ) -> EncodedMlp:
        """`inputs` is the width of x, whose first columns are the observation vector."""
        if inputs < encoder.vector_size:
            raise ValueError(
                f"expected inputs with the observation vector of {encoder.vector_size} columns, got {inputs}"
            )
        width = encoder.features + inputs - encoder.replaced
        return cls(encoder, Mlp(networks, width, hidden, outputs, layer_norm, products))

    @property
    def networks(self) -> int:
        return self.mlp.networks

    @property
    def outputs(self) -> int:
        return self.mlp.outputs

    @property
    def size(self) -> int:
        return self._encoder_size + self.mlp.size

    @property
    def _encoder_size(self) -> int:
        return self.networks * self.encoder.size

    def initial(self, generator: torch.Generator) -> Tensor:
        """Encoders as their classes draw them, one after the other, then the perceptrons as `Mlp.initial` does."""
        flat = torch.empty(self.size)
        views = self.views(flat).encoder
        for network in range(self.networks):
            for name, parameter in self.encoder.initial(generator).items():
                views[name][network] = parameter
        flat[self._encoder_size :] = self.mlp.initial(generator)
        return flat

    def views(self, flat: Tensor) -> EncodedViews:
        if flat.shape != (self.size,):
            raise ValueError(f"expected a flat tensor of shape ({self.size},) for {self}, got {tuple(flat.shape)}")
        encoder, at = {}, 0
        for name, shape in self.encoder.shapes.items():
            count = self.networks * math.prod(shape)
            encoder[name] = flat[at : at + count].view(self.networks, *shape)
            at += count
        return EncodedViews(encoder, self.mlp.views(flat[at:]))

    def members(self, flat: Tensor, chosen: slice) -> list[Tensor]:
        encoder = [view[chosen] for view in self.views(flat).encoder.values()]
        return encoder + self.mlp.members(flat[self._encoder_size :], chosen)

    def select(self, views: EncodedViews, chosen: Tensor) -> tuple[EncodedMlp, EncodedViews]:
        encoder = {name: view.index_select(0, chosen) for name, view in views.encoder.items()}
        mlp, layers = self.mlp.select(views.layers, chosen)
        return replace(self, mlp=mlp), EncodedViews(encoder, layers)

    def with_outputs(self, outputs: int) -> EncodedMlp:
        return replace(self, mlp=self.mlp.with_outputs(outputs))

    def last_layer(self, flat: Tensor) -> Layer:
        return self.mlp.last_layer(flat[self._encoder_size :])

    def named(self, group: str, flat: Tensor) -> dict[str, Tensor]:
        """As `Mlp.named`, and `<group>.encoder.<parameter>` (networks, *shape)."""
        encoder = {f"{group}.encoder.{name}": view for name, view in self.views(flat).encoder.items()}
        return encoder | self.mlp.named(group, flat[self._encoder_size :])

    def __call__(
        self, views: EncodedViews, x: Tensor, frames: Tensor | None = None, *, gradient: bool = True
    ) -> EncodedPass:
        """`gradient` False builds no graph: for targets and for acting, whose parameters get no gradient.

        Otherwise a graph from copies-by-reference of the encoders' parameters to the features is built, also where grad mode
        is off around the call, but not in inference mode.
        """
        gradient = gradient and not torch.is_inference_mode_enabled()
        with torch.set_grad_enabled(gradient):
            leaves = {name: self.encoder.leaf(view).requires_grad_(gradient) for name, view in views.encoder.items()}
            like = next(iter(leaves.values()), x)
            vector = x[..., : self.encoder.vector_size].detach().to(like.dtype)
            features = self.encoder(self.networks, leaves, frames, vector)
        dtype = views.layers[0].weight.dtype
        rest = x[..., self.encoder.replaced :].to(dtype).expand(self.networks, -1, -1)
        made = self.mlp(views.layers, torch.cat((features.detach().to(dtype), rest), -1))
        return EncodedPass(self.encoder, made, features, leaves if gradient else None)


@dataclass(frozen=True)
class EncodedPass:
    """One evaluation of an `EncodedMlp`; the encoders' graph hangs on `encoded`, (networks, batch, features)."""

    encoder: Encoder
    made: MlpPass
    encoded: Tensor
    leaves: dict[str, Tensor] | None  # the parameters that the graph ends in; None where there is no graph

    @property
    def output(self) -> Tensor:
        return self.made.output

    @property
    def features(self) -> Tensor:
        return self.made.features

    def first(self, rows: int) -> EncodedPass:
        """This pass over the first `rows` of the batch alone; the encoders' backward pass still runs over the whole batch."""
        with torch.set_grad_enabled(self.leaves is not None):
            encoded = self.encoded[:, :rows]
        return replace(self, made=self.made.first(rows), encoded=encoded)

    def parameter_gradient(self, grad: Tensor, into: EncodedViews) -> None:
        """As `Pass` says. Raises RuntimeError if the pass was made without a gradient."""
        if self.leaves is None:
            raise RuntimeError(
                "this pass was made with gradient=False or in inference mode, so it keeps no graph to go back"
            )
        self.made.parameter_gradient(grad, into.layers)
        if not self.leaves or not self.encoded.requires_grad:
            for view in into.encoder.values():
                view.zero_()
            return
        of_encoded = self.made.inputs_gradient(grad, start=0)[..., : self.encoder.features]
        found = torch.autograd.grad(
            self.encoded,
            list(self.leaves.values()),
            of_encoded.to(self.encoded.dtype),
            retain_graph=True,  # as other passes, this one may be asked again; the graph goes with it
            allow_unused=True,
        )
        for name, gradient in zip(self.leaves, found, strict=True):
            if gradient is None:
                into.encoder[name].zero_()
            else:
                into.encoder[name].copy_(gradient)

    def input_gradient(self, grad: Tensor, *, start: int) -> Tensor:
        """As `Pass` says, without touching the encoder; so not for columns that it takes (ValueError)."""
        if start < self.encoder.replaced:
            raise ValueError(
                f"expected start ≥ {self.encoder.replaced}, behind the observation vector that the encoder takes, got {start}"
            )
        return self.made.input_gradient(grad, start=self.encoder.features + start - self.encoder.replaced)


def make_encoder(name: str, *, frame_shape: FrameShape | None, vector_size: int) -> Encoder | None:
    """The encoder that `algorithm.encoder` names, None where there is none; raises as `Encoder`.

    auto is nature where there are frames and none elsewhere. none takes no frames: they are columns of the vector then.
    """
    if name == "auto":
        name = "none" if frame_shape is None else "nature"
    if name != "none":
        return Encoder(name, frame_shape=frame_shape, vector_size=vector_size)
    if frame_shape is not None:
        raise ValueError(
            f"algorithm.encoder 'none' takes frames as columns of the observation vector, got frames {frame_shape} apart"
        )
    return None


def make_network(
    settings: AlgorithmSettings,
    *,
    networks: int,
    inputs: int,
    outputs: int,
    vector_size: int,
    frame_shape: FrameShape | None,
    layer_norm: bool = False,
    products: Products = TORCH,
) -> Network:
    """A group of networks as the settings describe it: a bare `Mlp`, or an `EncodedMlp` where there is an encoder.

    Args:
        settings: hidden layers and encoder.
        networks: in the group.
        inputs: width of x: the observation vector, then for instance actions.
        outputs: of each network.
        vector_size: width of the observation vector.
        frame_shape: (stack · channels of a frame, height, width), None where the environment shows no frames.
        layer_norm: in the hidden layers.
        products: library of matrix products; convolutions are torch's own.

    Raises:
        ValueError: as `Encoder`.
    """
    encoder = make_encoder(settings.encoder, frame_shape=frame_shape, vector_size=vector_size)
    if encoder is None:
        return Mlp(networks, inputs, settings.hidden, outputs, layer_norm, products)
    return EncodedMlp.build(
        encoder,
        networks=networks,
        inputs=inputs,
        hidden=settings.hidden,
        outputs=outputs,
        layer_norm=layer_norm,
        products=products,
    )
