"""The squashed Gaussian policy as actors run it: numpy alone, so an actor process never imports torch.

At 8 environments (two hidden layers of 256, one thread) numpy takes about half of torch's time per call, at 64 the same; and
importing torch takes 1.3 s and 190 MB more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from learners.observations import ObservationVector
from replay.schema import StepSchema

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # where log sigma is squashed to


class SquashedGaussianPolicy:
    """Acts with weights that `Sac.policy_bytes` wrote. Not for several threads at once: it reuses its buffers."""

    def __init__(self, schema: StepSchema, hidden: tuple[int, ...]) -> None:
        """`hidden` are the widths of the policy's hidden layers, as in the algorithm's settings."""
        self._observations = ObservationVector(schema)
        self._action_dim = int(np.prod(schema.action.shape, dtype=np.int64))
        self._widths = (self._observations.size, *hidden, 2 * self._action_dim)
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._values: list[np.ndarray] = []

    @property
    def loaded(self) -> bool:
        """Whether weights have been loaded."""
        return bool(self._layers)

    def load(self, data: bytes) -> None:
        """Takes weights from a safetensors buffer; raises ValueError, keeping the old ones, if they do not fit."""
        expected: dict[str, tuple[int, ...]] = {}
        for i, (inputs, outputs) in enumerate(zip(self._widths, self._widths[1:], strict=False)):
            expected[f"{i}.weight"], expected[f"{i}.bias"] = (inputs, outputs), (outputs,)
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ValueError(
                f"expected policy weights as a safetensors buffer, got {len(data)} bytes: {error}"
            ) from error
        got = {name: tensor.shape for name, tensor in tensors.items()}
        if got != expected or any(tensor.dtype != np.float32 for tensor in tensors.values()):
            raise ValueError(
                f"expected float32 policy weights {expected}, got {got}: "
                "actor and learner must have the same environment and algorithm.hidden"
            )
        self._layers = [(tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in range(len(self._widths) - 1)]

    def act(
        self, observation: Mapping[str, np.ndarray], *, deterministic: bool, generator: np.random.Generator
    ) -> np.ndarray:
        """Actions (n, action_dim) float32 in [-1, 1] for observation fields (n, *shape) by name.

        Deterministic actions are tanh of the mean and draw nothing from `generator`. Raises RuntimeError before `load`.
        """
        if not self._layers:
            raise RuntimeError("the policy has no weights yet; load() a published version first")
        count = len(next(iter(observation.values()), ()))
        if not self._values or len(self._values[0]) != count:
            self._values = [np.empty((count, width), np.float32) for width in self._widths]
        self._observations.write(observation, self._values[0])
        for i, (weight, bias) in enumerate(self._layers):
            value = np.matmul(self._values[i], weight, out=self._values[i + 1])
            value += bias
            if i + 1 < len(self._layers):
                np.maximum(value, 0.0, out=value)
        mean, raw = np.split(self._values[-1], 2, axis=1)
        if deterministic:
            action: np.ndarray = np.tanh(mean)
            return action
        half = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        sigma = np.exp(half * np.tanh(raw) + (LOG_STD_MIN + half))
        noise = generator.standard_normal(mean.shape, np.float32)
        action = np.tanh(mean + sigma * noise)
        return action
