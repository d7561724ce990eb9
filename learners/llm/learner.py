"""Policy gradients for a language model: one learner step from a batch of judged completions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs.llm import LlmConfig, LlmLearnersSettings, ModelSettings, SamplingSettings
from configs.policy_gradient import PolicyGradientSettings
from learners.llm.batching import MicroBatch, Rollouts, buckets, micro_batch, rollouts
from learners.llm.gap_check import GapCheck
from learners.llm.measures import Measures
from learners.llm.models import Model, make_model, weights_bytes
from learners.llm.objective import Objective, Targets
from learners.llm.optimiser import Optimiser
from learners.llm.parallel import Learners, fill_, local, shard, whole
from learners.llm.scoring import Scorer, no_dropout, store_rounded
from learners.staging import ALONE, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyGradient:
    """Updates a model from batches of whole groups; driven by `learners.llm.loop.LlmLoop`.

    A step divides its batch into `minibatches` updates, and each into micro-batches whose gradients add up, so that neither
    micro-batches nor the number of learners change what is learnt, but for rounding. All learners of a group make the same calls.
    """

    def __init__(
        self,
        model: Model,
        settings: PolicyGradientSettings,
        learners: LlmLearnersSettings,
        sampling: SamplingSettings,
        *,
        seed: int,
        share: Share = ALONE,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        """
        model: that is trained, in place, on the device it lies on; as it is now it is the reference of `settings.kl`.
        seed: of what is drawn at random; the same on all learners.
        share: this learner's place among several.
        teacher: of `settings.teacher`, with the same tokens.

        Raises ValueError if the settings ask for what this model or these learners do not have.
        """
        if (teacher is None) != (settings.teacher.path is None):
            raise ValueError(
                f"expected a teacher exactly where algorithm.teacher.path is set, received "
                f"{'none' if teacher is None else type(teacher).__name__} for {settings.teacher.path!r}"
            )
        if learners.shard_parameters and share.count == 1:
            raise ValueError(
                "learners.shard_parameters divides the weights among several learners, and there is one; leave it off, or "
                "raise learners.count"
            )
        self.updates = 0  # learner steps
        self._network: Any = model.network
        self._pad = model.tokenizer.pad
        self.device = next(self._network.parameters()).device
        self._settings = settings
        self._learning = learners
        self._learners = Learners(share, self.device)
        self._generator = torch.Generator().manual_seed(seed)
        self._version: int | None = None
        self._is_published = False
        self._measures = Measures(settings, self._learners, device=self.device, gap_warning=learners.gap_warning)
        self._objective = Objective(
            settings,
            max_tokens=sampling.max_tokens,
            minibatches=learners.minibatches,
            learners=self._learners,
            generator=self._generator,
        )

        precision = torch.bfloat16 if learners.precision == "bfloat16" else None
        self._network.eval()
        self._scorer = Scorer(self._network, temperature=sampling.temperature, precision=precision)
        self._has_additions = hasattr(self._network, "peft_config")
        self._reference: Scorer | None = None
        if settings.kl.coefficient and not self._has_additions:
            frozen = copy.deepcopy(self._network).requires_grad_(False)
            self._reference = Scorer(frozen, temperature=sampling.temperature, precision=precision)
        self._teacher: Scorer | None = None
        if teacher is not None:
            teacher.requires_grad_(False).eval()
            self._teacher = Scorer(teacher, temperature=sampling.temperature, precision=precision)
        if precision is not None and not learners.shard_parameters:  # FSDP2 wants one type in a layer
            for scorer in (self._reference, self._teacher):
                if scorer is not None:
                    store_rounded(scorer.network, precision)
        no_dropout(self._network)
        if learners.activation_checkpointing:
            # Older releases of transformers call it by the other name.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(self._network, name) for name in names if hasattr(self._network, name))
            enable({"use_reentrant": False})
            self._network.train()  # it is ignored in evaluation mode
        if learners.shard_parameters:
            for scorer in (self._scorer, self._reference, self._teacher):
                if scorer is not None:
                    shard(scorer, scorer.network, device=self.device, count=share.count)
        trained = {name: p for name, p in self._network.named_parameters() if p.requires_grad}
        self._optimiser = Optimiser(trained, learners, self._learners)
        self._gap_check = GapCheck(
            list(trained.values()), self._scorer, self._learners, is_divided=learners.shard_parameters
        )

    @property
    def is_divided(self) -> bool:
        """Whether the weights are divided among learners, so that `policy_bytes` and `state` need all of them."""
        return self._learning.shard_parameters

    # ------------------------------------------------------------------------------------------------- learner steps

    def published(self, version: int) -> None:
        """The present weights are out as `version`: what tokens' versions are compared with."""
        self._version = version
        self._is_published = True
        self._gap_check.published(version)

    def update(self, batch: pa.RecordBatch) -> None:
        """One learner step from whole groups of `rows.SCHEMA`, this learner's part.

        Raises ValueError for rows that cannot be learnt from, and FloatingPointError, before it reaches the weights, for a loss or
        gradient that is not finite.
        """
        flat = rollouts(batch, device=self.device)
        parts = self._learning.minibatches
        if flat.groups < parts:
            raise ValueError(
                f"expected at least {parts} groups for as many updates (learners.minibatches), received {flat.groups}"
            )
        update = flat.group * parts // flat.groups
        targets = self._objective.targets(flat)
        if self._objective.needs_pass:
            proximal, entropy = self._pass(flat, targets.mask)
            targets = self._objective.refine(flat, targets, proximal=proximal, entropy=entropy)
        weights, totals = self._objective.weights(flat, targets.mask, update, parts)
        self._measures.batch(flat, targets, version=self._version)
        if not (self._is_published and self._gap_check.version == self._version):  # the update's own pass is by these
            self._measures.checked(
                self._gap_check.measure(flat, pad=self._pad, micro_tokens=self._learning.micro_tokens)
            )
        for number, total in enumerate(totals):
            if total == 0:
                continue  # all of it was cut off
            loss = torch.zeros(1, dtype=torch.float64, device=self.device)
            for completions, counts in self._micro_batches(flat, targets.mask, update == number):
                loss += self._accumulate(flat, targets, weights, completions, counts=counts)
            self._apply(float(self._learners.sum_(loss)))
        self.updates += 1
        if self._measures.end():
            self._gap_check.measured(self._version)

    def _accumulate(
        self, flat: Rollouts, targets: Targets, weights: Tensor, completions: np.ndarray, *, counts: bool
    ) -> Tensor:
        """Adds the gradient of a micro-batch and returns its loss; nothing, in a call that others need, where it does not count."""
        micro = micro_batch(flat, completions, pad=self._pad)
        places = micro.places
        tokens, kept, old = flat.tokens[places], flat.kept[places], flat.old[places]
        reference, teacher = self._frozen(micro, tokens, kept)
        new, entropy = self._scorer(micro, tokens, kept)
        terms = self._objective.terms(flat, targets, places, new, reference=reference, teacher=teacher)
        weight = weights[places] * counts
        loss = (terms.per_token * weight).sum()
        # FSDP2 takes the mean over the learners where the sum is meant.
        torch.autograd.backward(loss * self._learners.count if self.is_divided else loss)
        if counts:
            if self._is_published:
                self._measures.gap(flat, places, new)
            self._measures.losses(terms, weight, new, old, entropy, targets.mask[places])
        return loss.detach()

    def _apply(self, loss: float) -> None:
        norm = self._optimiser.gather()
        # A loss that is no number can have a gradient of zeros.
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._optimiser.forget()
            raise FloatingPointError(
                f"not finite in learner step {self.updates + 1}: the loss is {loss}, the norm of its gradient {norm}; the weights are "
                f"as before this update. In this learner's part: {self._measures.statistics()}. If actors' log-probabilities are "
                "not finite, look at the sampler; if ratios are large, lower replay.max_policy_lag; otherwise lower "
                "learners.learning_rate"
            )
        self._measures.updated(norm, self._optimiser.learning_rate)
        self._optimiser.step()
        self._is_published = False

    @torch.no_grad()
    def _pass(self, flat: Rollouts, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (T,) under the present weights, of completions with tokens in the mask."""
        log_probs, entropies = torch.zeros_like(flat.old), torch.zeros_like(flat.old)
        for completions, _ in self._micro_batches(flat, mask, torch.ones_like(flat.passed)):
            micro = micro_batch(flat, completions, pad=self._pad)
            places = micro.places
            log_probs[places], entropies[places] = self._scorer(micro, flat.tokens[places], flat.kept[places])
        return log_probs, entropies

    def _micro_batches(self, flat: Rollouts, mask: Tensor, among: Tensor) -> Iterator[tuple[np.ndarray, bool]]:
        """Completions of each micro-batch of those `among` all, bool (N,), with tokens in the mask; and whether they count.

        Learners that share parameters need each other in every pass, so all make as many as the one with most.
        """
        learnt = torch.zeros_like(flat.passed).index_put(
            (flat.sequence[mask],), torch.ones((), dtype=torch.bool).to(mask)
        )
        own = buckets(flat, (learnt & among).nonzero().squeeze(1).cpu().numpy(), self._learning.micro_tokens)
        most = max(self._learners.counts(len(own))) if self.is_divided else len(own)
        yield from ((completions, True) for completions in own)
        yield from ((np.zeros(1, np.int64), False) for _ in range(most - len(own)))

    @torch.no_grad()
    def _frozen(self, micro: MicroBatch, tokens: Tensor, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities (t,) under the reference and the teacher, where there are such."""
        reference = teacher = None
        if self._settings.kl.coefficient:
            with self._network.disable_adapter() if self._has_additions else nullcontext():
                reference, _ = (self._reference or self._scorer)(micro, tokens, kept)
        if self._teacher is not None:
            teacher, _ = self._teacher(micro, tokens, kept)
        return reference, teacher

    # ------------------------------------------------------------------------------------------------- watching it

    def check_finite(self) -> None:
        """Raises FloatingPointError if a weight is not finite; `update` raises it for gradients before they reach one."""
        weights = dict(self._network.named_parameters())
        sums = torch.stack([local(weight.detach()).sum() for weight in weights.values()])
        broken = [name for name, is_finite in zip(weights, sums.isfinite().tolist(), strict=True) if not is_finite]
        if broken:
            raise FloatingPointError(
                f"not finite after {self.updates} learner steps: {len(broken)} weights, the first {broken[0]}; expected finite "
                "ones. Lower learners.learning_rate"
            )

    def metrics(self) -> dict[str, float]:
        """Means over the learner steps since the last call, and over all learners; empty if there were none.

        Per token of the response: entropy, ratio, clipped_fraction, kl (those learnt from), advantage, staleness (all). Per
        completion: reward, length. Per update: loss, gradient_norm. Per step: completions, tokens. `staleness/lag_<n>` are counts.
        """
        return self._measures.report()

    # ------------------------------------------------------------------------------------------- weights and state

    def policy_bytes(self) -> bytes:
        """The weights for actors (`models.weights_bytes`); where they are divided, all learners have to call it."""
        return weights_bytes(self._network)

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of everything that updates read; where it is divided, all learners have to call it.

        The same batches then give the same weights. The frozen reference is among it, the teacher is not.
        """
        state = {name: whole(tensor) for name, tensor in self._tensors().items()}
        state |= {f"optimiser.{name}": tensor for name, tensor in self._optimiser.state().items()}
        return state | {"random": self._generator.get_state(), "updates": torch.tensor(self.updates)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `state` was taken. Raises ValueError, changing nothing, if names or shapes differ."""
        tensors = self._tensors()
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        expected |= {f"optimiser.{name}": tuple(tensor.shape) for name, tensor in self._optimiser.tensors().items()}
        expected |= {"optimiser.steps": (), "updates": (), "random": tuple(self._generator.get_state().shape)}
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        if differing:
            shown = "; ".join(f"{name}: expected {expected.get(name)}, got {got.get(name)}" for name in differing[:4])
            raise ValueError(
                "the checkpoint is of another model or algorithm.kl; resume with the settings it was written with "
                f"({len(differing)} tensors differ: {shown}{'; …' if len(differing) > 4 else ''})"
            )
        for name, tensor in tensors.items():
            fill_(tensor, state[name])
        begin = "optimiser."
        self._optimiser.load_state({n.removeprefix(begin): t for n, t in state.items() if n.startswith(begin)})
        self._generator.set_state(state["random"].cpu())
        self.updates = int(state["updates"])
        self._is_published = False
        self._gap_check.forget()

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters, by names such as `model.lm_head.weight`: those trained, those frozen, and the reference's."""
        found: dict[str, Tensor] = {f"model.{name}": p for name, p in self._network.named_parameters()}
        if self._reference is not None:
            found |= {f"reference.{name}": p for name, p in self._reference.network.named_parameters()}
        return found


def make_learner(config: LlmConfig, model: Model, *, share: Share = ALONE) -> PolicyGradient:
    """The learner that `config` describes, of a model on the learner's device; loads the teacher beside it."""
    device = next(model.network.parameters()).device
    teacher = None
    if config.algorithm.teacher.path is not None:
        loaded = make_model(ModelSettings(path=config.algorithm.teacher.path), seed=config.seed, device=device)
        if loaded.tokenizer.vocab_size != model.tokenizer.vocab_size:
            raise ValueError(
                f"algorithm.teacher.path {config.algorithm.teacher.path!r}: expected a teacher with the model's "
                f"{model.tokenizer.vocab_size} tokens, received one with {loaded.tokenizer.vocab_size}"
            )
        teacher = loaded.network
    return PolicyGradient(
        model,
        config.algorithm,
        config.learners,
        config.sampling,
        seed=config.seed,
        share=share,
        teacher=teacher,
    )
