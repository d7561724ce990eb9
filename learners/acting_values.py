"""Greedy policies over discrete actions, plain and recurrent, as actors run them: numpy alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.algorithms import DqnSettings, R2d2Settings
from learners.acting_networks import EVERY, Eyes, Floats, Group, Gru, Head, Tensors
from replay.schema import StepSchema


class Lanes(NamedTuple):
    """What a policy is told of the lanes it acts in."""

    rank: Floats  # (batch,): place on the ladder of exploration, 0 the first of all lanes and 1 the last
    state: Floats  # (batch, state_size): recurrent state before this step; the policy overwrites it by that after


class _Critics:
    """The K value networks of a chain, with as many values each as there are action sequences."""

    def __init__(
        self,
        tensors: Tensors,
        settings: DqnSettings,
        head: Head,
        sequences: int,
        *,
        inputs: int,
        hidden: tuple[int, ...],
        eyes: Eyes | None = None,
    ) -> None:
        self._dueling = settings.dueling
        self._chain = settings.chain.length
        self._values = sequences + settings.dueling
        encoder = None if eyes is None else eyes.encoder
        self.group = Group(
            tensors, "critics", networks=self._chain, inputs=inputs, hidden=hidden, outputs=None, encoder=encoder
        )
        self._head = head
        self._outputs = head.outputs(tensors, self.group, self._values)

    def functions(self, *, deterministic: bool, generator: np.random.Generator) -> slice:
        """The functions to act by: one drawn uniformly (Vincent et al. 2025), or all where nothing is to be drawn."""
        if self._chain == 1 or deterministic:
            return EVERY
        k = int(generator.integers(self._chain))
        return slice(k, k + 1)

    def __call__(self, x: Floats, which: slice) -> Floats:
        """Mean over the functions `which` of the values (batch, sequences)."""
        output = self.group(x, which)
        logits = output.reshape(*output.shape[:2], self._values, self._outputs)
        if self._dueling:
            advantage = logits[:, :, 1:]
            logits = logits[:, :, :1] + advantage - advantage.mean(2, keepdims=True)
        values: Floats = self._head.values(logits).mean(0)
        return values


class _Explorer:
    """Epsilon-greedy choice of action sequences, with an epsilon for each lane (Horgan et al. 2018, Ape-X, §4.1)."""

    def __init__(self, schema: StepSchema, settings: DqnSettings) -> None:
        choices = schema.action.choices
        if not choices:
            raise ValueError(f"algorithm.name {settings.name} needs discrete actions, and the environment has {schema}")
        self.sequences = choices**settings.chunk
        self._epsilon, self._ladder = settings.epsilon, settings.epsilon_ladder
        # A sequence is a number base `choices`, its first action the most significant digit.
        self._places = choices ** np.arange(settings.chunk - 1, -1, -1)
        self._choices = choices

    def choose(
        self, values: Floats, lanes: Lanes | None, *, deterministic: bool, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Action sequences (batch, chunk) for values (batch, sequences)."""
        chosen = values.argmax(1)
        if not deterministic and self._epsilon > 0.0:
            rank = 0.0 if lanes is None else lanes.rank
            explores = generator.random(len(chosen)) < self._epsilon ** (1.0 + self._ladder * rank)
            if explores.any():
                chosen[explores] = generator.integers(self.sequences, size=int(explores.sum()))
        actions: NDArray[np.int64] = chosen[:, None] // self._places % self._choices
        return actions


class GreedyPolicy:
    """Acts by value networks over action sequences, with weights that `Dqn.policy_bytes` wrote."""

    state_size = 0

    def __init__(self, schema: StepSchema, settings: DqnSettings, *, stack: int = 1) -> None:
        """Raises ValueError if the actions are not discrete."""
        self.chunk = settings.chunk
        self._settings = settings
        self._eyes = Eyes(schema, settings.encoder, stack=stack)
        self._explorer = _Explorer(schema, settings)
        self._head = Head(settings.head)
        self._critics: _Critics | None = None

    def load(self, data: bytes) -> None:
        """Takes weights from a safetensors buffer; raises ValueError, keeping the old ones, if they do not fit."""
        tensors = Tensors(data)
        normaliser = self._eyes.normaliser(tensors)
        critics = _Critics(
            tensors,
            self._settings,
            self._head,
            self._explorer.sequences,
            inputs=self._eyes.size,
            hidden=self._settings.hidden,
            eyes=self._eyes,
        )
        tensors.finish()
        self._critics, self._normaliser = critics, normaliser

    def act(
        self,
        observation: Mapping[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Action sequences (batch, chunk): see `learners.policy.Policy.act`. Deterministic ones follow the chain's mean."""
        if self._critics is None:
            raise RuntimeError("the policy has no weights yet; load() a published version first")
        which = self._critics.functions(deterministic=deterministic, generator=generator)
        seen = self._eyes.see(observation, self._normaliser)
        values = self._critics(self._critics.group.inputs(seen, which), which)
        return self._explorer.choose(values, lanes, deterministic=deterministic, generator=generator)


class RecurrentPolicy:
    """Acts by value networks behind a recurrent layer, with weights that `R2d2.policy_bytes` wrote (Kapturowski et al. 2019).

    The state of each lane is the caller's, who stores it with the step it belongs to.
    """

    chunk = 1

    def __init__(self, schema: StepSchema, settings: R2d2Settings, *, stack: int = 1) -> None:
        """Raises ValueError if the actions are not discrete."""
        self.state_size = settings.recurrent
        self._settings = settings
        self._eyes = Eyes(schema, settings.encoder, stack=stack)
        self._explorer = _Explorer(schema, settings)
        self._head = Head(settings.head)
        self._parts: tuple[Group, Gru, _Critics] | None = None

    def load(self, data: bytes) -> None:
        """Takes weights from a safetensors buffer; raises ValueError, keeping the old ones, if they do not fit."""
        tensors, hidden = Tensors(data), self._settings.hidden
        normaliser = self._eyes.normaliser(tensors)
        embed = Group(
            tensors,
            "embed",
            networks=1,
            inputs=self._eyes.size,
            hidden=(),
            outputs=hidden[0],
            encoder=self._eyes.encoder,
        )
        gru = Gru(tensors, inputs=hidden[0], units=self.state_size)
        critics = _Critics(
            tensors,
            self._settings,
            self._head,
            self._explorer.sequences,
            inputs=self.state_size,
            hidden=hidden[1:],
        )
        tensors.finish()
        self._parts, self._normaliser = (embed, gru, critics), normaliser

    def act(
        self,
        observation: Mapping[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Actions (batch, 1): see `learners.policy.Policy.act`. Without `lanes` every lane is at an episode's start."""
        if self._parts is None:
            raise RuntimeError("the policy has no weights yet; load() a published version first")
        embed, gru, critics = self._parts
        seen = self._eyes.see(observation, self._normaliser)
        x = np.maximum(embed(embed.inputs(seen))[0], 0.0)
        state = gru(x, np.zeros((len(x), self.state_size), np.float32) if lanes is None else lanes.state)
        if lanes is not None:
            lanes.state[:] = state
        which = critics.functions(deterministic=deterministic, generator=generator)
        return self._explorer.choose(critics(state, which), lanes, deterministic=deterministic, generator=generator)
