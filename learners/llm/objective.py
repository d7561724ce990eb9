"""The objective of a learner step: advantages, what is learnt from, and the loss of each token, of one or several learners."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.policy_gradient import PolicyGradientSettings
from learners.llm.advantages import make_advantage, pass_rate
from learners.llm.aggregation import token_total, token_weights
from learners.llm.batching import Rollouts
from learners.llm.divergences import reference_term, teacher_term
from learners.llm.entropy_control import clip_cov, covariance, kl_cov, kl_cov_penalty
from learners.llm.losses import Tokens, correction, make_loss, needs_proximal
from learners.llm.parallel import Learners
from learners.llm.shaping import complete_tokens, overlong_penalty
from learners.llm.step_credit import step_advantage
from learners.llm.subsample import select_rollouts, select_tokens


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the losses of a learner step compare with: this learner's T tokens."""

    advantage: Tensor  # float32 (T,)
    passed: Tensor  # bool (T,), of each token's completion
    pass_rate: Tensor  # float32 (T,), of its group
    mask: Tensor  # bool (T,), tokens that are learnt from
    proximal: Tensor | None = None  # float32 (T,), log-probabilities at the start of the step
    removed: Tensor | None = None  # bool (T,), whose policy loss is left out, but not out of the mean (Clip-Cov)
    penalised: Tensor | None = None  # bool (T,), with a divergence from the behaviour policy (KL-Cov)


@dataclass(frozen=True)
class Terms:
    """The loss of t tokens of a micro-batch, and what it is made of."""

    per_token: Tensor  # (t,), with a gradient
    clipped: Tensor  # bool (t,)
    reference: Tensor | None  # (t,), the divergence from the reference, times its coefficient
    teacher: Tensor | None  # (t,), that from the teacher, times its coefficient


class Objective:
    """The parts that `settings` name, put together. Every learner makes the same calls."""

    def __init__(
        self,
        settings: PolicyGradientSettings,
        *,
        max_tokens: int,
        minibatches: int,
        learners: Learners,
        generator: torch.Generator,
    ) -> None:
        """
        max_tokens: most tokens of a completion.
        minibatches: updates of a learner step.
        generator: on the CPU, in the same state on all learners.
        """
        self._settings = settings
        self._max_tokens = max_tokens
        self._learners = learners
        self._generator = generator
        self._advantage = make_advantage(settings, total=learners.sum_)
        self._loss = make_loss(settings)
        self._uses_proximal = needs_proximal(settings) or settings.correction_cap is not None
        # With one update those of the start of the step are those of the update itself.
        self.needs_pass = (
            settings.entropy.kind != "none"
            or settings.subsample.tokens < 1
            or (self._uses_proximal and minibatches > 1)
        )
        """Whether `refine` is to be called, with a forward pass over the batch at the start of the step."""

    def targets(self, batch: Rollouts) -> Targets:
        """What follows from rewards alone."""
        settings = self._settings
        reward = batch.reward + batch.shaped
        if settings.overlong.kind == "shape":
            reward = reward + overlong_penalty(
                batch.length,
                max_tokens=self._max_tokens,
                buffer=settings.overlong.buffer,
                factor=settings.overlong.factor,
            )
        outcome = self._advantage(reward, batch.group, batch.passed).float()
        advantage = outcome[batch.sequence]
        if settings.steps.coefficient:
            steps = batch.step_rewards
            device = reward.device
            advantage = advantage + settings.steps.coefficient * step_advantage(
                torch.from_numpy(steps.values.astype("f4")).to(device),
                torch.from_numpy(batch.step_ends.values.astype("i8")).to(device),
                torch.repeat_interleave(torch.from_numpy(steps.lengths)).to(device),
                length=batch.length,
                group=batch.group,
                temperature=settings.steps.temperature,
            )
        mask = torch.ones_like(batch.sequence, dtype=torch.bool)
        if settings.overlong.kind == "mask":
            mask &= complete_tokens(batch.cut, batch.sequence)
        if settings.subsample.rollouts is not None:
            mask &= select_rollouts(outcome, batch.group, settings.subsample.rollouts)[batch.sequence]
        return Targets(
            advantage=advantage,
            passed=batch.passed[batch.sequence],
            pass_rate=pass_rate(batch.passed, batch.group)[batch.sequence],
            mask=mask,
        )

    def refine(self, batch: Rollouts, targets: Targets, *, proximal: Tensor, entropy: Tensor) -> Targets:
        """What follows from log-probabilities and entropies (T,) of all tokens in the mask, at the start of the step."""
        settings, gather = self._settings, self._learners.gather
        targets = replace(targets, proximal=proximal)
        if settings.subsample.tokens < 1:
            advantage, own = gather(targets.advantage)
            chosen = select_tokens(
                advantage, gather(entropy)[0], settings.subsample.tokens, mask=gather(targets.mask)[0]
            )
            targets = replace(targets, mask=chosen[own])
        if settings.entropy.kind == "none":
            return targets
        found, own = gather(
            covariance(proximal, targets.advantage, mask=targets.mask, total=self._learners.sum_).float()
        )
        mask = gather(targets.mask)[0]
        if settings.entropy.kind == "kl_cov":
            return replace(targets, penalised=kl_cov(found, fraction=settings.entropy.fraction, mask=mask)[own])
        everything = torch.arange(len(batch.tokens), device=batch.tokens.device)
        removed = clip_cov(
            found,
            fraction=settings.entropy.fraction,
            low=settings.entropy.low,
            high=settings.entropy.high,
            generator=self._generator,
            mask=mask,
            clipped=gather(self.terms(batch, targets, everything, proximal).clipped)[0],
        )
        return replace(targets, removed=removed[own])

    def weights(self, batch: Rollouts, mask: Tensor, update: Tensor, updates: int) -> tuple[Tensor, list[int]]:
        """The weight of each token, float32 (T,), in the mean over the update that it belongs to, and what these divide by.

        update: int64 (N,), the update that each completion belongs to, of `updates`.
        """
        weights, totals = torch.zeros_like(batch.old), []
        of_token = update[batch.sequence]
        for number in range(updates):
            part = mask & (of_token == number)
            own = token_total(self._settings.mean, batch.sequence, mask=part)
            totals.append(sum(self._learners.counts(own)))
            weights += token_weights(
                self._settings.mean, batch.sequence, max_tokens=self._max_tokens, mask=part, total=totals[-1]
            )
        return weights, totals

    def terms(
        self,
        batch: Rollouts,
        targets: Targets,
        places: Tensor,
        new: Tensor,
        *,
        reference: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Terms:
        """The loss of the tokens at `places`, int64 (t,), of whole completions one after another.

        new: (t,), with a gradient. reference, teacher: (t,), log-probabilities under those models.
        """
        settings = self._settings
        old, actor = batch.old[places], batch.old[places]
        proximal = None
        if self._uses_proximal:
            proximal = new.detach() if targets.proximal is None else targets.proximal[places]
        cap = settings.correction_cap
        if cap is not None and proximal is not None:
            old = proximal  # the actor's own is in the correction
        tokens = Tokens(
            new=new,
            old=old,
            advantage=targets.advantage[places],
            sequence=torch.unique_consecutive(batch.sequence[places], return_inverse=True)[1],
            proximal=proximal,
            passed=targets.passed[places],
            pass_rate=targets.pass_rate[places],
        )
        losses = self._loss(tokens)
        loss = losses.per_token
        if cap is not None and proximal is not None:
            loss = loss * correction(proximal, actor, cap)
        if targets.removed is not None:
            loss = torch.where(targets.removed[places], 0.0, loss)
        if targets.penalised is not None:
            loss = loss + kl_cov_penalty(new, actor, targets.penalised[places], settings.entropy.coefficient)
        from_reference = from_teacher = None
        if reference is not None:
            from_reference = reference_term(settings.kl, new, reference, actor)
            loss = loss + from_reference
        if teacher is not None:
            from_teacher = teacher_term(settings.teacher, new, teacher, targets.passed[places])
            loss = loss + from_teacher
        return Terms(loss, losses.clipped, from_reference, from_teacher)
