"""Soft actor-critic, over single actions or chunks of them: the whole update in one method, `Sac._update`, top to bottom.

Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications" (arXiv 1812.05905), sections 4 to 6; chains of critics:
Vincent et al. 2025, "Iterated Q-Network"; chunks: Li et al. 2025, "Q-chunking" (arXiv 2507.07969) and "Decoupled
Q-chunking" (arXiv 2512.10926), here with the policy of SAC. The gradients are written out beside the losses they belong to;
the tests hold them to those that autograd finds. sac.md lists what is logged and where implementations differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from configs.algorithms import SacSettings
from learners.critic import Critic, smallest
from learners.policy import LOG_STD_MAX, LOG_STD_MIN
from learners.staging import Batch
from learners.trained import Adam
from learners.updates import LABEL_METRICS, Noise, Options, Updates
from replay.schema import StepSchema


@dataclass(frozen=True)
class Squashed:
    """A sample of the tanh-squashed Gaussian policy, and what its gradient needs; every tensor (batch, action_dim) but one."""

    action: Tensor  # tanh(u), u = mean + deviation
    log_prob: Tensor  # (batch,)
    deviation: Tensor  # sigma * noise
    slope: Tensor  # d log sigma / d raw

    @classmethod
    def sample(cls, head: Tensor, noise: Tensor) -> Squashed:
        """From `head` (batch, 2 * action_dim), means and raw log standard deviations, and standard normal `noise`."""
        mean, raw = head.chunk(2, -1)
        squashed = torch.tanh(raw)
        half = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        log_std = half * squashed + (LOG_STD_MIN + half)
        deviation = log_std.exp() * noise
        u = mean + deviation
        # log N(u) - log(1 - tanh(u)^2), the latter as 2 (log 2 - u - softplus(-2u)): exact where tanh saturates.
        density = 2.0 * (u + softplus(-2.0 * u)) - 0.5 * noise.square() - log_std
        constant = noise.shape[-1] * (0.5 * math.log(2.0 * math.pi) + 2.0 * math.log(2.0))
        return cls(torch.tanh(u), density.sum(-1) - constant, deviation, half * (1.0 - squashed.square()))

    def gradient(self, of_action: Tensor, of_log_prob: Tensor) -> Tensor:
        """Gradient (rows, 2 * action_dim) of the first rows of the head.

        `of_action` (rows, action_dim) is that of their actions, `of_log_prob` that of each log-probability.
        """
        rows = len(of_action)
        action = self.action[:rows]
        # d log_prob / du = 2 tanh(u) at fixed noise, so sigma moves log_prob through u and by -1 directly.
        of_u = of_action * (1.0 - action.square()) + 2.0 * of_log_prob * action
        of_raw = (of_u * self.deviation[:rows] - of_log_prob) * self.slope[:rows]
        return torch.cat((of_u, of_raw), -1)


class Sac(Updates):
    """Soft actor-critic with an ensemble of critics and a learned temperature, on vectors of observations or frames.

    `algorithm.target.kind` decides what the critic values: an action (one_step, n_step), a chunk of `target.length`
    actions (chunk), or both (decoupled): then a chunk critic learns from the rewards of the whole window, and the critic that
    the policy climbs, of its own `algorithm.chunk` actions, is distilled from it. Where the two would be the same function
    (chunks of one length, expectile ½) there is one critic.
    """

    def __init__(
        self,
        schema: StepSchema,
        settings: SacSettings,
        *,
        batch_size: int,
        seed: int,
        **options: Unpack[Options],
    ) -> None:
        target = settings.target
        self.means = (
            "loss/critic",
            "loss/policy",
            "loss/temperature",
            "temperature",
            "entropy",
            "q/mean",
            "q/target",
            "batch/reward",
            *(("loss/distilled",) if settings.distils else ()),
            *(LABEL_METRICS if settings.head.classifies else ()),
        )
        super().__init__(schema, settings, batch_size=batch_size, seed=seed, **options)
        self._sac = settings
        action_dim = self._staging.action_dim
        self._chunk_dim = settings.chunk * action_dim
        self._entropy_goal = -float(self._chunk_dim) if settings.target_entropy is None else settings.target_entropy

        start = torch.Generator().manual_seed(seed)  # one of the CPU: the same parameters on every device
        self._actor = self._trained(self._network(1, 0, 2 * self._chunk_dim), start, lr=settings.policy_lr)
        self._critic = self._make_critic(self._chunk_dim, start, lr=settings.critic_lr, ensemble=settings.ensemble)
        self._chunk_critic: Critic | None = None
        if settings.distils:
            self._chunk_critic = self._make_critic(
                target.length * action_dim, start, lr=settings.critic_lr, ensemble=settings.ensemble, has_target=False
            )
        log_temperature = math.log(settings.initial_temperature)
        self._log_temperature = torch.tensor([log_temperature], dtype=self._dtype, device=self.device)
        self._temperature_grad = torch.zeros_like(self._log_temperature)
        self._temperature_adam = Adam(self._log_temperature, self._temperature_grad, lr=settings.temperature_lr)

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, batch: Batch, noise: Noise) -> Sequence[Tensor]:
        size = len(batch.action)
        observation = self._normalised(batch.observation)
        now, after = observation[:size], observation[size:]
        frames, frames_after = (None, None) if batch.frames is None else (batch.frames[:size], batch.frames[size:])
        temperature = self._log_temperature.exp()
        head, critic = self._critic.head, self._critic

        # One forward pass of the policy serves the targets (second half) and its own loss (first half).
        acted = self._actor.network(self._actor.views, observation, batch.frames)
        sample = Squashed.sample(acted.output[0], noise[0])
        log_prob, next_log_prob = sample.log_prob[:size], sample.log_prob[size:]

        # Critics: to y = r + discount (min Q' - alpha log pi), each function of the chain from the target before it.
        next_logits = critic.targets(torch.cat((after, sample.action[size:]), -1), frames_after)
        if self._sac.subset is not None:
            next_logits = next_logits.index_select(1, noise[1])
        next_logits = smallest(head, next_logits)
        label = head.label(next_logits, batch.reward, batch.discount, -temperature * next_log_prob)
        learner = self._chunk_critic or critic
        learnt = learner.learn(
            torch.cat((now, batch.action), -1), frames, label, weight=batch.weight, expectile=self._expectile
        )
        if batch.weight is not None:
            # A window without weight is one that nothing is learnt from: it must not be drawn for its lasting error.
            self._errors.copy_(learnt.error.abs().mean((0, 1)) * (batch.weight > 0))
        distilled = []
        if self._chunk_critic is not None:
            # Each member from its own chunk critic, whose values the expectile takes the best completions of.
            label_of_chunks = head.label(learnt.logits, self._zero, self._one, 0.0)
            x = torch.cat((now, batch.action[:, : self._chunk_dim]), -1)
            shorter = critic.learn(
                x, frames, label_of_chunks, weight=batch.weight, expectile=self._settings.target.distill_expectile
            )
            distilled = [shorter.loss]

        # Policy: E[alpha log pi - min Q], by the critics just updated; each sample's gradient goes through its smallest critic.
        x = torch.cat((now, sample.action[:size]), -1)
        if self._sac.chain.policy_value == "mean":
            valued = critic(x, frames, gradient=False)
        else:
            valued = critic.function(noise[-1], x, frames)
        logits = valued.output.view(-1, critic.ensemble, size, head.outputs)  # (K or 1, E, batch, outputs)
        least, member = head.mean(logits).min(1, keepdim=True)
        of_value = torch.zeros_like(logits[..., 0]).scatter_(1, member, -1.0 / (size * len(logits)))
        of_output = head.mean_gradient(logits, of_value).flatten(0, 1)
        of_action = valued.input_gradient(of_output, start=observation.shape[1])
        of_head = sample.gradient(of_action, temperature / size)
        acted.first(size).parameter_gradient(of_head.unsqueeze(0), self._actor.grads)
        self._actor.descend()

        # Temperature: E[-log alpha (log pi + goal)], with the log-probabilities the policy loss used.
        entropy = -log_prob.mean()
        torch.sub(entropy, self._entropy_goal, out=self._temperature_grad[0])
        temperature_loss = self._log_temperature[0] * self._temperature_grad[0]
        self._reduce(self._temperature_grad)
        self._temperature_adam.step()

        critic.track(self._sac.polyak)

        alpha = temperature[0]
        policy_loss = -alpha * entropy - least.mean()
        return (
            learnt.loss,
            policy_loss,
            temperature_loss,
            alpha,
            entropy,
            learnt.value.mean(),
            label.value.mean(),
            batch.reward.mean(),
            *distilled,
            *self._label_metrics(label),
        )

    # --------------------------------------------------------------------------------------------------- its parts

    def _draw(self) -> Noise:
        size = self._batch_size
        normal = self._share.rows(self._normal(2, size * self._share.count, self._chunk_dim), 1)
        noise = [normal.reshape(2 * size, self._chunk_dim)]
        if self._sac.subset is not None:
            noise.append(self._permutation(self._sac.ensemble)[: self._sac.subset])
        if self._sac.chain.policy_value == "one":
            noise.append(self._integer(self._sac.chain.length))
        return tuple(noise)

    def _tensors(self) -> dict[str, Tensor]:
        groups = {"actor": self._actor.tensors, "critic": self._critic.tensors}
        if self._chunk_critic is not None:
            groups["chunk_critic"] = self._chunk_critic.tensors
        groups["log_temperature"] = {"value": self._log_temperature, **self._temperature_adam.tensors}
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def _critics(self) -> list[Critic]:
        return [self._critic] if self._chunk_critic is None else [self._critic, self._chunk_critic]

    def _inputs(self, batch: Batch) -> list[tuple[Critic, Tensor, Tensor | None]]:
        size = len(batch.action)
        now = self._normalised(batch.observation[:size])
        frames = None if batch.frames is None else batch.frames[:size]
        found = [(self._critic, torch.cat((now, batch.action[:, : self._chunk_dim]), -1), frames)]
        if self._chunk_critic is not None:
            found.append((self._chunk_critic, torch.cat((now, batch.action), -1), frames))
        return found

    def _refresh(self) -> None:
        super()._refresh()
        self._actor.refresh()

    def _policy(self) -> tuple[str, dict[str, Tensor]]:
        return "squashed_gaussian", self._actor.network.named("policy", self._actor.value)

    def values(self, observation: Mapping[str, np.ndarray], action: np.ndarray) -> np.ndarray:
        """Values (K, n) of action chunks (n, chunk * action_dim) at observation fields (n, *shape), the least of the ensemble."""
        x, frames = self._observed(observation)
        acted = torch.as_tensor(action, dtype=self._dtype, device=self.device)
        output = self._critic(torch.cat((x, acted), -1), frames).output
        found: np.ndarray = self._critic.head.mean(self._critic.by_function(output)).amin(1).cpu().numpy()
        return found
