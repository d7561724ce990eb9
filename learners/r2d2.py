"""Recurrent deep Q-learning with stored state and burn-in: the whole update in one method, `RecurrentDqn._update`.

Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2), sections 2.3 and 3. What
values actions is as in `learners.dqn`, behind a recurrent layer that all functions of a chain share. r2d2.md lists what is
logged and where implementations differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from configs.algorithms import R2d2Settings
from learners.critic import Critic, loss_and_gradient
from learners.dqn import ActionValues, check_choices, taken
from learners.encoders import make_network
from learners.networks import Mlp
from learners.recurrent import Gru, Trunk, TrunkPass, TrunkViews
from learners.sequences import Sequences, SequenceStaging
from learners.trained import Adam
from learners.updates import LABEL_METRICS, Noise, Options, Updates
from replay.schema import StepSchema, WindowBatch

ETA = 0.9  # share of the largest error in a sequence's priority, of which the rest is the mean error (section 2.3)


class RecurrentDqn(Updates):
    """Deep Q-learning for partly observed tasks, on sequences with the recurrent state that actors stored with them.

    The embedding of the observation and the recurrent layer are one trunk, whose state is an actor's memory; a chain's
    functions are heads on it. Of its targets θ̄_0 moves at shifts alone and the others also every `chain.copy_every` updates:
    so a chain has two target trunks, and a plain learner one.
    """

    def __init__(
        self,
        schema: StepSchema,
        settings: R2d2Settings,
        *,
        batch_size: int,
        seed: int,
        **options: Unpack[Options],
    ) -> None:
        """Raises ValueError if the actions are not discrete."""
        check_choices(schema.action.choices, 1, settings)
        self.means = (
            "loss/critic",
            "q/mean",
            "q/target",
            "batch/reward",
            *(LABEL_METRICS if settings.head.classifies else ()),
        )
        super().__init__(schema, settings, batch_size=batch_size, seed=seed, **options)
        self._r2d2 = settings
        self._sequences = SequenceStaging(
            schema,
            settings,
            batch_size=batch_size,
            updates=options.get("updates_per_call", 1),
            stack=options.get("stack", 1),
            device=self.device,
            dtype=self._dtype,
        )
        start = torch.Generator().manual_seed(seed)  # one of the CPU: the same parameters on every device
        width = settings.hidden[0]
        embed = make_network(
            settings.model_copy(update={"hidden": ()}),
            networks=1,
            inputs=self._staging.observation_dim,
            outputs=width,
            vector_size=self._staging.observation_dim,
            frame_shape=self._staging.frame_shape,
            products=self._products,
        )
        self._trunk = Trunk(embed, Gru(width, settings.recurrent))
        self._trunk_value = self._trunk.initial(start).to(self.device, self._dtype)
        self._trunk_grad = torch.zeros_like(self._trunk_value)
        self._trunk_adam = Adam(self._trunk_value, self._trunk_grad, lr=settings.lr, weight_decay=settings.weight_decay)
        self._views, self._grads = self._trunk.views(self._trunk_value), self._trunk.views(self._trunk_grad)
        chain = settings.chain.length
        self._trunk_targets = [self._trunk_value.clone() for _ in range(min(chain, 2))]
        self._target_views = [self._trunk.views(target) for target in self._trunk_targets]
        self._acting = ActionValues(schema.action.choices, settings.dueling)
        outputs = self._acting.values * self._head.outputs
        heads = Mlp(chain, settings.recurrent, settings.hidden[1:], outputs, settings.layer_norm, self._products)
        self._critic = Critic(
            heads,
            self._head,
            heads.initial(start).to(self.device, self._dtype),
            chain=chain,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            precision=self._precision,
            reduce=self._share.mean,
        )

    # ------------------------------------------------------------------------------------------------ the update

    def _update(self, batch: Sequences, noise: Noise) -> Sequence[Tensor]:  # type: ignore[override]
        steps, size = self._r2d2.sequence, len(batch.state)
        learnt_rows = steps * size
        head, critic, chain = self._critic.head, self._critic, self._r2d2.chain.length

        # Online and target networks each warm their own state up from the stored one (section 3), then see S + 1 rows.
        x = self._normalised(batch.observation)
        unrolled = self._unrolled(self._views, x, batch)
        made = critic(unrolled.states.flatten(0, 1))
        logits = self._acting.logits(made.output)  # (K, rows, choices, m), row t * batch + b
        target_states = [self._unrolled(views, x, batch).states.flatten(0, 1) for views in self._target_views]
        of_each = torch.stack([target_states[min(k, 1)] for k in range(chain)])
        next_logits = self._acting.logits(critic.targets(of_each).squeeze(1))

        # y = r + discount Q'(s', a*) with n-step returns inside the sequence, in the pairs of function and target of `Dqn`.
        best = head.mean(logits if self._r2d2.double else next_logits).argmax(-1)
        bootstrapped = taken(next_logits, best).index_select(1, batch.bootstrap)
        label = head.label(bootstrapped, batch.reward, batch.discount, 0.0)

        weight = batch.mask if batch.weight is None else batch.mask * batch.weight.repeat(steps)
        chosen = taken(logits[:, :learnt_rows], batch.action).unsqueeze(1)
        learnt, grad = loss_and_gradient(head, chosen, label, weight=weight, expectile=self._expectile)
        of_output = self._acting.gradient(grad, batch.action)
        valued = made.first(learnt_rows)
        of_states = valued.input_gradient(of_output.flatten(0, 1), start=0)  # before the step that changes the weights
        critic.regress(valued, of_output)
        unrolled.parameter_gradient(of_states.view(steps, size, -1), self._grads)
        self._reduce(self._trunk_grad)
        self._trunk_adam.step()

        count = batch.mask.sum()
        if batch.weight is not None:
            error = (learnt.error.abs().mean((0, 1)) * batch.mask).view(steps, size)
            mean = error.sum(0) / batch.mask.view(steps, size).sum(0)
            self._errors.copy_(ETA * error.amax(0) + (1.0 - ETA) * mean)
        return (
            learnt.loss,
            (learnt.value.mean((0, 1)) * batch.mask).sum() / count,
            (label.value.mean(0) * batch.mask).sum() / count,
            (batch.reward * batch.mask).sum() / count,
            *self._label_metrics(label),
        )

    def _unrolled(self, views: TrunkViews, x: Tensor, batch: Sequences) -> TrunkPass:
        """The S + 1 steps behind the burn-in, whose state has no gradient; `x` are the batch's observations, normalised."""
        burn_in = self._r2d2.burn_in
        rows = burn_in * x.shape[1]
        early, late = (None, None) if batch.frames is None else (batch.frames[:rows], batch.frames[rows:])
        state = self._trunk.warmed(views, x[:burn_in], early, batch.state, batch.is_real)
        return self._trunk(views, x[burn_in:], late, state)

    # --------------------------------------------------------------------------------------------------- its parts

    def stage(self, windows: WindowBatch, weights: np.ndarray | None = None) -> list[Sequences]:  # type: ignore[override]
        """As `Updates.stage`, of windows with a burn-in and the observations of all steps."""
        return self._sequences(windows, weights)

    def _after_update(self) -> None:
        super()._after_update()
        chain = self._r2d2.chain
        if chain.length > 1 and self.updates % chain.copy_every == 0:
            self._trunk_targets[1].copy_(self._trunk_value)
        if self.updates % self._r2d2.shift_every == 0:
            self._critic.shift()
            for target in self._trunk_targets:
                target.copy_(self._trunk_value)

    def _draw(self) -> Noise:
        return ()

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"critic.{name}": tensor for name, tensor in self._critic.tensors.items()}
        found["trunk.value"] = self._trunk_value
        found |= {f"trunk.{name}": tensor for name, tensor in self._trunk_adam.tensors.items()}
        return found | {f"trunk.target.{i}": target for i, target in enumerate(self._trunk_targets)}

    def _critics(self) -> list[Critic]:
        return [self._critic]

    def _seen(self, batch: Sequences) -> Tensor:  # type: ignore[override]
        return batch.observation[self._r2d2.burn_in]

    def _inputs(self, batch: Sequences) -> list[tuple[Critic, Tensor, Tensor | None]]:  # type: ignore[override]
        states = self._unrolled(self._views, self._normalised(batch.observation), batch).states
        return [(self._critic, states[:-1].flatten(0, 1), None)]

    def _policy(self) -> tuple[str, dict[str, Tensor]]:
        critic = self._critic.online
        named = self._trunk.named(self._trunk_value) | critic.network.named("critics", critic.value)
        return "recurrent_greedy", named | self._support_tensor()

    def values(self, observation: Mapping[str, np.ndarray], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (K, n, choices) at observation fields (n, *shape), and the state (n, units) after them.

        `state` (n, units) is the recurrent state before them, zero at an episode's start.
        """
        x, frames = self._observed(observation)
        before = torch.as_tensor(state, dtype=self._dtype, device=self.device)
        after = self._trunk(self._views, x.unsqueeze(0), frames, before).states[0]
        found = self._critic.head.mean(self._acting.logits(self._critic(after).output))
        return found.cpu().numpy(), after.cpu().numpy()
