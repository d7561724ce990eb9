"""How a policy's network becomes an ONNX graph."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

    from learners.acting_modules import ActingModule
    from learners.policy_modules import PolicyModule

OPSET = 18
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that write and check graphs


def write_graph(module: PolicyModule | ActingModule, *, optimise: bool) -> onnx.ModelProto:
    """The graph of a policy, with a dynamic batch size; `optimise` folds what does not depend on the inputs.

    Raises:
        RuntimeError: something in the policy, such as a user's encoder, has no counterpart in ONNX.
    """
    import torch

    example = module.example(2, np.random.default_rng(0))
    batch = torch.export.Dim("batch")
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(module.inputs),
                output_names=list(module.outputs),
                dynamic_shapes={"inputs": tuple({0: batch} for _ in example)},
                optimize=optimise,
                verbose=False,
            )
        except Exception as error:  # tracing runs a user's encoder, and the exporter raises what it likes
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            told = f"{type(cause).__name__}: {str(cause).strip()}".partition("\n")[0]
            raise RuntimeError(f"the policy cannot be written as ONNX: {told}") from error
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed and of torch's own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
