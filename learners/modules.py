"""Torch modules of users, checked before a learner trains them.

A learner trains a module as a function of its parameters alone, for several networks at once and without knowing what is
inside. What such a function cannot be (one with a memory, with noise of its own, one that mixes the samples of a batch) is
refused here, with the reason, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from learners.classes import ModuleError, load_class

__all__ = ["FrameShape", "ModuleError", "check_encoder", "construct", "evaluate", "load_class"]

FrameShape = tuple[int, int, int]  # channels, height, width

PROBE_ROWS = 3  # samples on which a user's module is tried; two of them again, to see that rows do not mix


def construct(make: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """A new module of `make`, whose initial parameters follow from `generator`.

    Torch's layers draw them from the default generator, which no constructor takes as an argument: it is seeded for the call
    and afterwards as it was.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def evaluate(
    module: nn.Module, parameters: Mapping[str, Tensor], networks: int, frames: Tensor | None, vector: Tensor
) -> Tensor:
    """Features (networks, batch, features) of `networks` copies of `module`, each with its own parameters.

    Args:
        module: the structure; its own parameters are not read.
        parameters: by name, those of all networks stacked (networks, *shape).
        networks: how many.
        frames: (batch, channels, height, width) uint8, seen by every network.
        vector: (batch, size), or one for each network (networks, batch, size).

    Raises:
        RuntimeError: the module draws random numbers, or does what torch.func.vmap cannot batch.
    """
    apart = vector.dim() == 3

    def call(own: dict[str, Tensor], vector: Tensor) -> Tensor:
        features: Tensor = functional_call(module, own, (frames, vector), strict=True)
        return features

    if networks == 1:
        return call({name: p[0] for name, p in parameters.items()}, vector[0] if apart else vector).unsqueeze(0)
    if not parameters and not apart:
        one = call({}, vector)
        return one.expand(networks, *one.shape)
    batched: Tensor = vmap(call, in_dims=(0 if parameters else None, 0 if apart else None), randomness="error")(
        dict(parameters), vector
    )
    return batched


def check_encoder(module: nn.Module, what: str, frame_shape: FrameShape | None, vector_size: int) -> int:
    """Tries a user's encoder on random inputs; the number of its features.

    Raises:
        ModuleError: it cannot be trained as a function of its parameters, or returns something else than (batch, features).
    """
    _check_parameters(module, what)
    generator = torch.Generator().manual_seed(0)
    frames = None
    if frame_shape is not None:
        frames = torch.randint(256, (PROBE_ROWS, *frame_shape), dtype=torch.uint8, generator=generator)
    vector = torch.randn((PROBE_ROWS, vector_size), generator=generator)
    stacked = {name: torch.stack((p.detach(), p.detach())) for name, p in module.named_parameters()}
    fewer = PROBE_ROWS - 1
    seen = f"frames {None if frames is None else tuple(frames.shape)} and a vector {tuple(vector.shape)}"
    try:
        with torch.no_grad():
            alone = module(frames, vector)
            if not isinstance(alone, Tensor):
                raise ModuleError(f"{what}: expected features as a tensor, got {type(alone).__name__}")
            if alone.dim() != 2 or len(alone) != PROBE_ROWS or alone.shape[1] == 0 or not alone.is_floating_point():
                raise ModuleError(
                    f"{what}: expected features ({PROBE_ROWS}, features) of floating point for {seen}, got "
                    f"{tuple(alone.shape)} of {alone.dtype}"
                )
            both = evaluate(module, stacked, 2, frames, vector)
            part = evaluate(module, stacked, 2, None if frames is None else frames[:fewer], vector[:fewer])
    except ModuleError:
        raise
    except Exception as error:  # evaluating runs the user's code: anything may come
        if "randomness" in str(error):
            raise ModuleError(
                f"{what}: it draws random numbers (dropout, noise), which a function of parameters and observation cannot: "
                "leave them out"
            ) from error
        raise ModuleError(f"{what}: evaluating it on {seen} raised {type(error).__name__}: {error}") from error
    if not torch.allclose(both[:, :fewer], part, rtol=1e-3, atol=1e-4):
        raise ModuleError(
            f"{what}: the features of a sample change with the other samples of its batch (batch normalisation does that) or "
            "from call to call; an encoder must look at each sample alone: take LayerNorm or GroupNorm"
        )
    return int(alone.shape[1])


def _check_parameters(module: nn.Module, what: str) -> None:
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise ModuleError(
            f"{what}: it has the buffers {', '.join(buffers)}, and an encoder must be a function of its parameters alone. "
            "Running statistics (batch normalisation) would differ between learner, targets and actors: take LayerNorm or "
            "GroupNorm. Make constants in forward, on the device of its input"
        )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModuleError(f"{what}: the parameter {name} has no shape yet; take the layer that is not Lazy")
        if parameter.dtype != torch.float32:
            raise ModuleError(f"{what}: expected float32 parameters, got {parameter.dtype} for {name}")
        if not parameter.requires_grad:
            raise ModuleError(
                f"{what}: the parameter {name} requires no gradient, and a learner trains every parameter"
            )
