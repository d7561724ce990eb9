"""Policies over continuous actions as actors run them: the squashed Gaussian, and the best of a flow's proposals; numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.algorithms import FlowSettings, SacSettings
from learners.acting_networks import Eyes, Floats, Group, Head, Tensors
from learners.acting_values import Lanes
from replay.schema import StepSchema

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # where log sigma is squashed to


def _action_dim(schema: StepSchema, name: str) -> int:
    if schema.action.dtype != "float32":
        raise ValueError(f"algorithm.name {name} needs continuous actions, and the environment has {schema}")
    return int(np.prod(schema.action.shape, dtype=np.int64))


class SquashedGaussianPolicy:
    """Acts by tanh of a Gaussian over action chunks, with weights that `Sac.policy_bytes` wrote."""

    state_size = 0

    def __init__(self, schema: StepSchema, settings: SacSettings, *, stack: int = 1) -> None:
        """Raises ValueError if the actions are not continuous."""
        self.chunk = settings.chunk
        self._hidden = settings.hidden
        self._eyes = Eyes(schema, settings.encoder, stack=stack)
        self._action_dim = _action_dim(schema, settings.name)
        self._network: Group | None = None

    def load(self, data: bytes) -> None:
        """Takes weights from a safetensors buffer; raises ValueError, keeping the old ones, if they do not fit."""
        tensors = Tensors(data)
        normaliser = self._eyes.normaliser(tensors)
        network = Group(
            tensors,
            "policy",
            networks=1,
            inputs=self._eyes.size,
            hidden=self._hidden,
            outputs=2 * self.chunk * self._action_dim,
            encoder=self._eyes.encoder,
        )
        tensors.finish()
        self._network, self._normaliser = network, normaliser

    def act(
        self,
        observation: Mapping[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> Floats:
        """Chunks (batch, chunk, action_dim): see `learners.policy.Policy.act`. Deterministic ones are tanh of the mean."""
        if self._network is None:
            raise RuntimeError("the policy has no weights yet; load() a published version first")
        seen = self._eyes.see(observation, self._normaliser)
        mean, raw = np.split(self._network(self._network.inputs(seen))[0], 2, axis=1)
        if not deterministic:
            half = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
            sigma = np.exp(half * np.tanh(raw) + (LOG_STD_MIN + half))
            mean = mean + sigma * generator.standard_normal(mean.shape, np.float32)
        action: Floats = np.tanh(mean)
        return action.reshape(len(action), self.chunk, self._action_dim)


class BestOfNPolicy:
    """Acts by the best of N chunks that a flow proposes, with weights that `Flow.policy_bytes` wrote (Li et al. 2025, DQC).

    A flow carries noise x_0 along a velocity v(s, x_τ, τ) from τ = 0 to 1, here by Euler steps; the critics value where it
    ends. The proposals are drawn in evaluation too: the policy *is* their best.
    """

    state_size = 0

    def __init__(self, schema: StepSchema, settings: FlowSettings, *, stack: int = 1) -> None:
        """Raises ValueError if the actions are not continuous."""
        self.chunk = settings.chunk
        self._settings = settings
        self._eyes = Eyes(schema, settings.encoder, stack=stack)
        self._action_dim = _action_dim(schema, settings.name)
        self._head = Head(settings.head)
        self._networks: tuple[Group, Group] | None = None

    def load(self, data: bytes) -> None:
        """Takes weights from a safetensors buffer; raises ValueError, keeping the old ones, if they do not fit."""
        settings, tensors = self._settings, Tensors(data)
        normaliser = self._eyes.normaliser(tensors)
        width = self.chunk * self._action_dim
        velocity = Group(
            tensors,
            "velocity",
            networks=1,
            inputs=self._eyes.size + width + 1,
            hidden=settings.hidden,
            outputs=width,
            encoder=self._eyes.encoder,
        )
        critics = Group(
            tensors,
            "critics",
            networks=settings.ensemble,
            inputs=self._eyes.size + width,
            hidden=settings.hidden,
            outputs=None,
            encoder=self._eyes.encoder,
        )
        self._head.outputs(tensors, critics, 1)
        tensors.finish()
        self._networks, self._normaliser = (velocity, critics), normaliser

    def act(
        self,
        observation: Mapping[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> Floats:
        """Chunks (batch, chunk, action_dim): see `learners.policy.Policy.act`. Both kinds draw noise."""
        if self._networks is None:
            raise RuntimeError("the policy has no weights yet; load() a published version first")
        velocity, critics = self._networks
        settings, width = self._settings, self.chunk * self._action_dim
        seen = self._eyes.see(observation, self._normaliser)
        count, proposals = len(seen.vector), settings.proposals
        x = self._carry(
            velocity, velocity.inputs(seen), generator.standard_normal((count * proposals, width), np.float32)
        )
        np.clip(x, -1.0, 1.0, out=x)
        state = np.repeat(critics.inputs(seen), proposals, axis=-2)
        output = critics(_beside(state, x))
        values = self._head.values(output)  # (ensemble, count * proposals)
        value = values.min(0) if settings.aggregate == "min" else values.mean(0)
        best = value.reshape(count, proposals).argmax(1)
        chosen: Floats = x.reshape(count, proposals, self.chunk, self._action_dim)[np.arange(count), best]
        return chosen

    def _carry(self, velocity: Group, state: Floats, x: Floats) -> Floats:
        """Where the flow carries the noise `x` (batch * proposals, width) to, by `flow_steps` Euler steps."""
        steps = self._settings.flow_steps
        state = np.repeat(state, self._settings.proposals, axis=-2)
        tau = np.zeros((len(x), 1), np.float32)
        for step in range(steps):
            tau[:] = step / steps
            x += velocity(_beside(state, x, tau))[0] / np.float32(steps)
        return x


def _beside(state: Floats, *others: Floats) -> Floats:
    """`others` (batch, …) behind `state`, (batch, …) or (networks, batch, …)."""
    return np.concatenate((state, *(np.broadcast_to(o, (*state.shape[:-1], o.shape[-1])) for o in others)), -1)
