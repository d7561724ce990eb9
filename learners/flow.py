"""Implicit values and the best of N actions that a flow proposes: the whole update in one method, `Flow._update`.

Li, Park and Levine 2025, "Decoupled Q-chunking" (arXiv 2512.10926), section 4, with the value heads of this package in place
of binary cross-entropy. A value network regresses on the critics at replayed actions, leaning to the best of them (Kostrikov et
al. 2022, IQL, arXiv 2110.06169), so that no policy is needed to bootstrap; a flow clones the replayed actions (Lipman et al.
2023, arXiv 2210.02747), and acting takes the best of its proposals. flow.md lists what is logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from configs.algorithms import FlowSettings
from learners.critic import Critic, expectile_weight, smallest
from learners.staging import Batch
from learners.updates import LABEL_METRICS, Noise, Options, Updates
from replay.schema import StepSchema


class Flow(Updates):
    """Critics, an implicit value and a flow-matching behaviour policy, over single actions or chunks of them.

    `algorithm.target.kind` decides what the critic values, as for `Sac`.
    """

    def __init__(
        self,
        schema: StepSchema,
        settings: FlowSettings,
        *,
        batch_size: int,
        seed: int,
        **options: Unpack[Options],
    ) -> None:
        target = settings.target
        self.means = (
            "loss/critic",
            "loss/value",
            "loss/flow",
            "value/mean",
            "q/mean",
            "q/target",
            "batch/reward",
            *(("loss/distilled",) if settings.distils else ()),
            *(LABEL_METRICS if settings.head.classifies else ()),
        )
        super().__init__(schema, settings, batch_size=batch_size, seed=seed, **options)
        self._flow = settings
        action_dim = self._staging.action_dim
        self._chunk_dim = settings.chunk * action_dim
        start = torch.Generator().manual_seed(seed)  # one of the CPU: the same parameters on every device
        self._velocity = self._trained(
            self._network(1, self._chunk_dim + 1, self._chunk_dim), start, lr=settings.policy_lr
        )
        self._critic = self._make_critic(self._chunk_dim, start, lr=settings.critic_lr, ensemble=settings.ensemble)
        self._chunk_critic: Critic | None = None
        if settings.distils:
            self._chunk_critic = self._make_critic(
                target.length * action_dim, start, lr=settings.critic_lr, ensemble=settings.ensemble, has_target=False
            )
        self._value = self._make_critic(0, start, lr=settings.critic_lr, ensemble=1, has_target=False)

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, batch: Batch, noise: Noise) -> Sequence[Tensor]:
        size = len(batch.action)
        observation = self._normalised(batch.observation)
        now = observation[:size]
        frames = None if batch.frames is None else batch.frames[:size]
        head, critic = self._critic.head, self._critic
        action = batch.action[:, : self._chunk_dim]
        acted = torch.cat((now, action), -1)

        # Value: implicit regression on the target critics at the replayed action. One pass serves the bootstrap too.
        seen = self._value(observation, batch.frames)
        value_logits = seen.output  # (1, 2 * batch, outputs)
        replayed = critic.targets(acted, frames)
        if self._flow.subset is not None:
            replayed = replayed.index_select(1, noise[2])
        aggregated = smallest(head, replayed) if self._flow.aggregate == "min" else head.mixture(replayed, 1)
        value_loss, of_value = self._implicit(value_logits[:, :size], aggregated, batch.weight)

        # Critics: to y = r + discount V(s').
        label = head.label(value_logits[:, size:], batch.reward, batch.discount, 0.0)
        learner = self._chunk_critic or critic
        learnt = learner.learn(
            torch.cat((now, batch.action), -1), frames, label, weight=batch.weight, expectile=self._expectile
        )
        if batch.weight is not None:
            # A window without weight is one that nothing is learnt from: it must not be drawn for its lasting error.
            self._errors.copy_(learnt.error.abs().mean((0, 1)) * (batch.weight > 0))
        distilled = []
        if self._chunk_critic is not None:
            label_of_chunks = head.label(learnt.logits, self._zero, self._one, 0.0)
            shorter = critic.learn(
                acted,
                frames,
                label_of_chunks,
                weight=batch.weight,
                expectile=self._settings.target.distill_expectile,
            )
            distilled = [shorter.loss]
        self._value.regress(seen.first(size), (of_value / size).unsqueeze(0))

        # Flow: the velocity at a point between noise and the replayed action is their difference.
        start, time = noise[0], noise[1]
        towards = action - start
        x = torch.cat((now, torch.addcmul(start, time, towards), time), -1)
        carried = self._velocity.network(self._velocity.views, x, frames)
        error = carried.output[0] - towards
        if batch.weight is not None:  # the actions behind a time limit were never taken
            error = error * (batch.weight > 0).unsqueeze(-1)
        carried.parameter_gradient((error * (2.0 / error.numel())).unsqueeze(0), self._velocity.grads)
        self._velocity.descend()

        critic.track(self._flow.polyak)
        return (
            learnt.loss,
            value_loss,
            error.square().mean(),
            head.mean(value_logits[:, :size]).mean(),
            learnt.value.mean(),
            label.value.mean(),
            batch.reward.mean(),
            *distilled,
            *self._label_metrics(label),
        )

    def _implicit(self, logits: Tensor, of: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and gradient (1, batch, outputs) of value `logits` (1, batch, outputs) regressing on those `of` the critics.

        The expectile weighs the head's own loss by the sign of the error, the quantile is the pinball loss of the head's mean.
        """
        head = self._critic.head
        target, wanted = head.label(of, self._zero, self._one, 0.0)
        above = wanted - head.mean(logits)
        if self._flow.value_loss == "expectile":
            loss, grad = head.loss(logits, target)
            scale = expectile_weight(above, self._flow.value_expectile)
            loss, grad = loss * scale, grad * scale.unsqueeze(-1)
        else:
            share = torch.where(above < 0, self._flow.value_expectile - 1.0, self._flow.value_expectile)
            loss, grad = share * above, head.mean_gradient(logits, -share)
        if weight is not None:
            loss, grad = loss * weight, grad * weight.unsqueeze(-1)
        return loss.sum() / logits.shape[-2], grad

    # --------------------------------------------------------------------------------------------------- its parts

    def _draw(self) -> Noise:
        size = self._batch_size * self._share.count
        start = self._share.rows(self._normal(size, self._chunk_dim), 0)
        time = torch.rand((size, 1), generator=self._generator, device=self.device, dtype=self._dtype)
        noise = [start, self._share.rows(time, 0)]
        if self._flow.subset is not None:
            noise.append(self._permutation(self._flow.ensemble)[: self._flow.subset])
        return tuple(noise)

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"velocity": self._velocity.tensors, "critic": self._critic.tensors, "value": self._value.tensors}
        if self._chunk_critic is not None:
            groups["chunk_critic"] = self._chunk_critic.tensors
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def _critics(self) -> list[Critic]:
        return [self._critic, self._value, *([] if self._chunk_critic is None else [self._chunk_critic])]

    def _inputs(self, batch: Batch) -> list[tuple[Critic, Tensor, Tensor | None]]:
        size = len(batch.action)
        now = self._normalised(batch.observation[:size])
        frames = None if batch.frames is None else batch.frames[:size]
        found = [(self._critic, torch.cat((now, batch.action[:, : self._chunk_dim]), -1), frames)]
        if self._chunk_critic is not None:
            found.append((self._chunk_critic, torch.cat((now, batch.action), -1), frames))
        return [*found, (self._value, now, frames)]

    def _refresh(self) -> None:
        super()._refresh()
        self._velocity.refresh()

    def _policy(self) -> tuple[str, dict[str, Tensor]]:
        tensors = self._velocity.network.named("velocity", self._velocity.value)
        critics = self._critic.online.network.named("critics", self._critic.online.value)
        return "flow_best_of_n", tensors | critics | self._support_tensor()

    def values(self, observation: Mapping[str, np.ndarray], action: np.ndarray) -> np.ndarray:
        """Values (1, n) of action chunks (n, chunk * action_dim) at observation fields (n, *shape), the least of the ensemble."""
        x, frames = self._observed(observation)
        acted = torch.as_tensor(action, dtype=self._dtype, device=self.device)
        output = self._critic(torch.cat((x, acted), -1), frames).output
        found: np.ndarray = self._critic.head.mean(self._critic.by_function(output)).amin(1).cpu().numpy()
        return found

    def state_values(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Implicit values (n,) of observation fields (n, *shape)."""
        found: np.ndarray = self._value.head.mean(self._value(*self._observed(observation)).output)[0].cpu().numpy()
        return found
