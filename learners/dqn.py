"""Deep Q-learning over single actions or sequences of them: the whole update in one method, `Dqn._update`, top to bottom.

Mnih et al. 2015, "Human-level control through deep reinforcement learning"; double Q: van Hasselt et al. 2016 (arXiv
1509.06461); dueling streams: Wang et al. 2016 (arXiv 1511.06581); chains: Vincent et al. 2025, "Iterated Q-Network" (arXiv
2403.02107); sequences: Li et al. 2025, "Q-chunking" (arXiv 2507.07969) and "Decoupled Q-chunking" (arXiv 2512.10926), here
with every sequence listed. dqn.md lists what is logged and where implementations differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from configs.algorithms import MAX_SEQUENCES, DqnSettings
from learners.critic import Critic, Learnt, advance, loss_and_gradient
from learners.heads import Label
from learners.networks import Pass
from learners.staging import Batch
from learners.updates import LABEL_METRICS, Noise, Options, Updates
from replay.schema import StepSchema


@dataclass(frozen=True)
class ActionValues:
    """How the outputs of a network stand for the values of all action sequences, of m outputs of the value head each.

    They lie side by side, or as two streams: first a value v, then an advantage a for each sequence, and q = v + a − mean a
    (Wang et al. 2016, equation 9), for each of the m outputs.
    """

    sequences: int
    dueling: bool

    @property
    def values(self) -> int:
        """What a network puts out, in values of the head."""
        return self.sequences + self.dueling

    def logits(self, output: Tensor) -> Tensor:
        """(…, sequences, m) of the outputs (…, values * m)."""
        values = output.view(*output.shape[:-1], self.values, -1)
        if not self.dueling:
            return values
        value, advantage = values[..., :1, :], values[..., 1:, :]
        return value + (advantage - advantage.mean(-2, keepdim=True))

    def gradient(self, of_taken: Tensor, number: Tensor) -> Tensor:
        """Gradient of the outputs (…, batch, values * m), given that of the logits of sequences `number` (…, batch, m)."""
        of_taken = of_taken.unsqueeze(-2)
        shape = (*of_taken.shape[:-2], self.sequences, of_taken.shape[-1])
        index = number[..., None, None].expand(of_taken.shape)
        of_values = of_taken.new_zeros(shape).scatter(-2, index, of_taken)
        if self.dueling:
            # Every advantage is in the mean, of which each has a share of 1 / sequences.
            of_values = torch.cat((of_taken, of_values - of_taken / self.sequences), -2)
        return of_values.flatten(-2)


def taken(logits: Tensor, number: Tensor) -> Tensor:
    """The logits (…, batch, m) of the sequences `number`, (batch,) or (…, batch), of (…, batch, sequences, m)."""
    return logits.take_along_dim(number[..., None, None].expand(*logits.shape[:-2], 1, 1), -2).squeeze(-2)


class Dqn(Updates):
    """Deep Q-learning with one network for each function of a chain, on vectors of observations or frames.

    `algorithm.target.kind` decides what the critic values: an action (one_step, n_step), each sequence of `target.length`
    actions (chunk), or both (decoupled): then a chunk critic learns from the rewards of the whole window, and the critic that
    acts, of sequences of `algorithm.chunk` actions, is distilled from it. Where the two would be the same function (sequences
    of one length, expectile ½) there is one critic. A sequence is a number base A, its first action the most significant digit.
    """

    def __init__(
        self,
        schema: StepSchema,
        settings: DqnSettings,
        *,
        batch_size: int,
        seed: int,
        **options: Unpack[Options],
    ) -> None:
        """Raises ValueError if the actions are not discrete, or if there are too many sequences of them to list."""
        target, choices = settings.target, schema.action.choices
        length = target.length if target.kind in ("chunk", "decoupled") else 1
        check_choices(choices, length, settings)
        self.means = (
            "loss/critic",
            "q/mean",
            "q/target",
            "batch/reward",
            *(("loss/distilled",) if settings.distils else ()),
            *(LABEL_METRICS if settings.head.classifies else ()),
        )
        super().__init__(schema, settings, batch_size=batch_size, seed=seed, **options)
        self._dqn = settings
        self._shared = choices ** (length - settings.chunk)  # sequences that begin with one that is acted
        start = torch.Generator().manual_seed(seed)  # one of the CPU: the same parameters on every device
        self._acting = ActionValues(choices**settings.chunk, settings.dueling)
        self._critic = self._make_critic(0, start, lr=settings.lr, ensemble=1, values=self._acting.values)
        self._chunk_critic: Critic | None = None
        if settings.distils:
            self._of_chunks = ActionValues(choices**length, settings.dueling)
            self._chunk_critic = self._make_critic(
                0, start, lr=settings.lr, ensemble=1, values=self._of_chunks.values, has_target=False
            )

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, batch: Batch, noise: Noise) -> Sequence[Tensor]:
        size = len(batch.action)
        observation = self._normalised(batch.observation)
        now, after = observation[:size], observation[size:]
        frames, frames_after = (None, None) if batch.frames is None else (batch.frames[:size], batch.frames[size:])
        head, critic = self._critic.head, self._critic

        # y = r + discount Q'(s', a*): each function of the chain from the target before it. With double Q it chooses a* by
        # itself, which is what that target becomes at the next shift; a chain of one is then ordinary double Q.
        next_logits = self._acting.logits(critic.targets(after, frames_after).squeeze(1))  # (K, batch, sequences, m)
        chooser = next_logits
        if self._dqn.double:
            chooser = self._acting.logits(critic(after, frames_after, gradient=False).output)
        best = head.mean(chooser).argmax(-1)  # (K, batch)
        label = head.label(taken(next_logits, best), batch.reward, batch.discount, 0.0)

        if self._chunk_critic is None:
            learnt = self._learn(critic, self._acting, critic(now, frames), batch.action, label, batch, self._expectile)
        else:
            made = self._chunk_critic(now, frames)
            learnt = self._learn(self._chunk_critic, self._of_chunks, made, batch.action, label, batch, self._expectile)
        if batch.weight is not None:
            # A window without weight is one that nothing is learnt from: it must not be drawn for its lasting error.
            self._errors.copy_(learnt.error.abs().mean((0, 1)) * (batch.weight > 0))
        distilled = []
        if self._chunk_critic is not None:
            # Each function from its own chunk critic, whose values the expectile takes the best completions of.
            begun = batch.action // self._shared
            label_of_chunks = head.label(learnt.logits.squeeze(1), self._zero, self._one, 0.0)
            expectile = self._settings.target.distill_expectile
            shorter = self._learn(critic, self._acting, critic(now, frames), begun, label_of_chunks, batch, expectile)
            distilled = [shorter.loss]

        return (
            learnt.loss,
            learnt.value.mean(),
            label.value.mean(),
            batch.reward.mean(),
            *distilled,
            *self._label_metrics(label),
        )

    def _learn(
        self,
        critic: Critic,
        values: ActionValues,
        made: Pass,
        number: Tensor,
        label: Label,
        batch: Batch,
        expectile: Tensor | float | None,
    ) -> Learnt:
        """One step of a critic's networks towards a label (K, batch, …), on the logits of the sequences `number` (batch,)."""
        logits = taken(values.logits(made.output), number).unsqueeze(1)
        learnt, grad = loss_and_gradient(critic.head, logits, label, weight=batch.weight, expectile=expectile)
        critic.regress(made, values.gradient(grad, number))
        return learnt

    # --------------------------------------------------------------------------------------------------- its parts

    def _after_update(self) -> None:
        super()._after_update()
        if self.updates % self._dqn.shift_every == 0:
            self._critic.shift()
            if self._chunk_critic is not None:
                advance(self._chunk_critic.online, 1)

    def _draw(self) -> Noise:
        return ()

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"critic": self._critic.tensors}
        if self._chunk_critic is not None:
            groups["chunk_critic"] = self._chunk_critic.tensors
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def _critics(self) -> list[Critic]:
        return [self._critic] if self._chunk_critic is None else [self._critic, self._chunk_critic]

    def _inputs(self, batch: Batch) -> list[tuple[Critic, Tensor, Tensor | None]]:
        size = len(batch.action)
        now = self._normalised(batch.observation[:size])
        frames = None if batch.frames is None else batch.frames[:size]
        return [(critic, now, frames) for critic in self._critics()]

    def _policy(self) -> tuple[str, dict[str, Tensor]]:
        critic = self._critic.online
        return "greedy", critic.network.named("critics", critic.value) | self._support_tensor()

    def values(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Values (K, n, choices ** chunk) of every action sequence at observation fields (n, *shape)."""
        x, frames = self._observed(observation)
        found: np.ndarray = self._critic.head.mean(self._acting.logits(self._critic(x, frames).output)).cpu().numpy()
        return found


def check_choices(choices: int, length: int, settings: DqnSettings) -> None:
    """Raises ValueError unless there are `choices` discrete actions, and few enough sequences of `length` of them."""
    if not choices:
        raise ValueError(
            f"algorithm.name {settings.name} needs discrete actions, and those of the environment are continuous; take sac"
        )
    if choices**length > MAX_SEQUENCES:
        raise ValueError(
            f"expected at most {MAX_SEQUENCES} action sequences, got {choices}^{length}: shorten algorithm.target.length"
        )
