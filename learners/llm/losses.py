"""Policy losses: from log-probabilities and advantages of T tokens to a loss of each, whose gradient flows through `new` alone.

Every loss is to be multiplied by `aggregation.token_weights` and added up. A ratio is the probability of a token under the
current policy divided by that under the policy it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.policy_gradient import LOSSES, PolicyGradientSettings
from learners.classes import load_function
from learners.llm.advantages import checked

LARGEST_LOG_RATIO = 20.0  # e^20 = 4.9e8; a ratio beyond would overflow, and 0 · inf is no number
LARGEST_NFT_LOG_RATIO = 10.0
PASS_RATES = (0.02, 0.98)  # bounds of the pass rate in nft, where it divides


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """T response tokens of whole completions, laid one after another; what a loss may use."""

    new: Tensor  # (T,), log-probability under the current policy, with a gradient
    old: Tensor  # (T,), under the behaviour policy, as sampled
    advantage: Tensor  # (T,)
    sequence: Tensor  # int64 (T,), the completion each belongs to, numbered from 0
    proximal: Tensor | None = None  # (T,), under the learner's policy at the start of the step; decoupled needs it
    passed: Tensor | None = None  # bool (T,), of its completion; nft needs it
    pass_rate: Tensor | None = None  # (T,), of its group; nft needs it


@dataclass(frozen=True)
class Losses:
    """Of T tokens."""

    per_token: Tensor  # (T,), with a gradient
    clipped: Tensor  # bool (T,), tokens whose gradient was cut off or whose weight was capped


Loss = Callable[[Tokens], Losses]


def clip(
    new: Tensor, old: Tensor, advantage: Tensor, *, low: float = 0.2, high: float = 0.28, dual: float | None = None
) -> Losses:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) (Schulman et al. 2017, PPO, arXiv 1707.06347 §3), ρ = exp(new − old).

    Bounds of their own below and above are DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476 §3.1).

    Args:
        new: (T,), with a gradient.
        old: (T,), of the policy that the ratio is clipped around.
        advantage: (T,).
        low: the ratio is clipped below at 1 − low.
        high: the ratio is clipped above at 1 + high.
        dual: of a negative advantage the loss is at most −dual · A (Ye et al. 2020, dual clip, arXiv 1912.09729 §3); above 1.

    Returns:
        Losses; clipped are tokens without a gradient: above with A > 0, below with A < 0, and beyond `dual`.
    """
    ratio = _ratio(new, old)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    clipped = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    if dual is not None:
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual * advantage), surrogate)
        clipped = clipped | ((advantage < 0) & (ratio > dual))
    return Losses(-surrogate, clipped)


def reinforce(new: Tensor, advantage: Tensor) -> Losses:
    """−A log π without a correction for where the tokens came from (Williams 1992, REINFORCE); (T,) each, none clipped."""
    return Losses(-advantage * new, torch.zeros_like(new, dtype=torch.bool))


def truncated(new: Tensor, old: Tensor, advantage: Tensor, *, cap: float = 2.0) -> Losses:
    """−min(ρ, cap) A log π, the weight without a gradient (Espeholt et al. 2018, IMPALA, arXiv 1802.01561 §4.1, per token).

    (T,) each; clipped are tokens whose weight was capped, which keep a gradient.
    """
    ratio = _ratio(new.detach(), old)
    return Losses(-ratio.clamp_max(cap) * advantage * new, ratio > cap)


def cispo(new: Tensor, old: Tensor, advantage: Tensor, *, high: float = 0.28) -> Losses:
    """−min(ρ, 1 + high) A log π, the weight without a gradient (MiniMax 2025, CISPO, arXiv 2506.13585 §3.1).

    Without a lower bound, as the paper runs it; so it is `truncated` with the cap 1 + high.
    """
    return truncated(new, old, advantage, cap=1 + high)


def gspo(
    new: Tensor, old: Tensor, advantage: Tensor, sequence: Tensor, *, low: float = 3e-4, high: float = 4e-4
) -> Losses:
    """PPO's surrogate of the ratio of whole completions (Zheng et al. 2025, GSPO, arXiv 2507.18071 §4), in its token form.

    The ratio of a completion is s = exp(mean over its tokens of new − old); of a token s · π / π without gradient through s and
    the denominator, which has the value s, and over a completion's mean the gradient of s where A is the same for its tokens.

    Args:
        new: (T,), with a gradient.
        old: (T,), of the behaviour policy.
        advantage: (T,).
        sequence: int64 (T,), the completion of each token; completions must be whole.
        low: s is clipped below at 1 − low.
        high: s is clipped above at 1 + high.
    """
    change = (new - old).detach()
    size = int(sequence.max()) + 1 if len(sequence) else 0
    sums = change.new_zeros(size).index_add(0, sequence, change)
    mean = (sums / torch.bincount(sequence, minlength=size).clamp_min(1))[sequence]
    return clip(new - new.detach() + mean, torch.zeros_like(mean), advantage, low=low, high=high)


def decoupled(
    new: Tensor,
    old: Tensor,
    proximal: Tensor,
    advantage: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = None,
    cap: float = 2.0,
) -> Losses:
    """min(π_proximal / π_old, cap) · clip loss of new against proximal (Hilton et al. 2022, arXiv 2110.00641; AReaL 2505.24298).

    Three policies: the weight corrects for the age of the data, the clip bounds the step from the learner's own policy at its
    start. Tokens whose weight is capped keep their gradient and count in every mean.

    Args:
        new: (T,), with a gradient.
        old: (T,), of the behaviour policy.
        proximal: (T,), of the learner's policy at the start of the step.
        advantage: (T,).
        low: see `clip`.
        high: see `clip`.
        dual: see `clip`.
        cap: largest weight.
    """
    weight = _ratio(proximal, old).detach()
    inner = clip(new, proximal.detach(), advantage, low=low, high=high, dual=dual)
    return Losses(weight.clamp_max(cap) * inner.per_token, inner.clipped | (weight > cap))


def nft(
    new: Tensor, old: Tensor, passed: Tensor, pass_rate: Tensor, *, floor: float = 1.0, weighing: str = "grpo"
) -> Losses:
    """Negative-aware fine-tuning (Chen et al. 2025, NFT, arXiv 2505.18116 §3): likelihood of passes, implicit one of failures.

    With R = π / π_old and c the group's pass rate within `PASS_RATES`: −log R where passed; else −log max((1 − c R) / (1 − c),
    floor), whose gradient passes the maximum as if it were not there. Times the weight of the group: sqrt((1 − c) / c) for
    grpo, 1 − c for dr_grpo and rloo, 1 for others. Groups that passed or failed as a whole have loss 0.

    Args:
        new: (T,), with a gradient.
        old: (T,), of the behaviour policy.
        passed: bool (T,), of the token's completion.
        pass_rate: (T,), of its group.
        floor: lowest implicit ratio of a failed completion, above 0.
        weighing: the advantage whose gradient on policy the weight reproduces.

    Returns:
        Losses; clipped are tokens at the floor, which keep a gradient.
    """
    rate = pass_rate.to(new.dtype).clamp(*PASS_RATES)
    log_ratio = (new - old).clamp_max(LARGEST_NFT_LOG_RATIO)
    implicit = (1 - rate * log_ratio.exp()) / (1 - rate)
    # Its value is exactly that of the maximum: implicit reaches -1e6, where a sum with the floor would round it away.
    held = implicit.clamp_min(floor).detach() + (implicit - implicit.detach())
    if weighing == "grpo":
        weight = ((1 - rate) / rate).sqrt()
    elif weighing in ("dr_grpo", "rloo"):
        weight = 1 - rate
    else:
        weight = torch.ones_like(rate)
    weight = torch.where((pass_rate > 0) & (pass_rate < 1), weight, 0.0)
    return Losses(weight * torch.where(passed, -log_ratio, -held.log()), ~passed & (implicit < floor))


def correction(proximal: Tensor, old: Tensor, cap: float) -> Tensor:
    """min(π_proximal / π_old, cap) (T,), without a gradient: truncated importance sampling between learner's and actor's kernels.

    Both are log-probabilities (T,) of the sampled tokens, `proximal` computed by the learner, `old` by the actor. A loss that is
    multiplied by it must itself be taken against `proximal` and not `old`, or the correction counts twice (Yao et al. 2025, Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training).
    """
    return _ratio(proximal, old).detach().clamp_max(cap)


def make_loss(settings: PolicyGradientSettings) -> Loss:
    """The function `Tokens` -> `Losses` that `settings.loss` names.

    `package.module:function` is called as `function(tokens)` with a `Tokens`, all fields set, and returns the loss of each token,
    a tensor (T,) with a gradient through `tokens.new`, or a `Losses`.

    Raises:
        ModuleError: an own function cannot be imported or called so.
    """
    kind = settings.loss
    low, high, dual, cap = settings.clip_low, settings.clip_high, settings.dual_clip, settings.weight_cap

    def made(tokens: Tokens) -> Losses:
        new, old, advantage = tokens.new, tokens.old, tokens.advantage
        if kind == "clip":
            return clip(new, old, advantage, low=low, high=high, dual=dual)
        if kind == "reinforce":
            return reinforce(new, advantage)
        if kind == "truncated":
            return truncated(new, old, advantage, cap=cap)
        if kind == "gspo":
            return gspo(new, old, advantage, tokens.sequence, low=low, high=high)
        if kind == "cispo":
            return cispo(new, old, advantage, high=high)
        if kind == "decoupled":
            proximal = _present(tokens.proximal, kind, "proximal")
            return decoupled(new, old, proximal, advantage, low=low, high=high, dual=dual, cap=cap)
        passed, rate = _present(tokens.passed, kind, "passed"), _present(tokens.pass_rate, kind, "pass_rate")
        return nft(new, old, passed, rate, floor=settings.negative_floor, weighing=settings.advantage)

    if kind in LOSSES:
        return made
    function = load_function(kind, "algorithm.loss", ("tokens",))

    def own(tokens: Tokens) -> Losses:
        returned = function(tokens)
        what = f"algorithm.loss {kind!r}"
        if isinstance(returned, Losses):
            clipped, shape = returned.clipped, tokens.new.shape
            if clipped.dtype != torch.bool or clipped.shape != shape:
                raise ValueError(
                    f"{what}: expected Losses.clipped to be bool of shape {tuple(shape)}, got {clipped.dtype} of shape "
                    f"{tuple(clipped.shape)}"
                )
            return Losses(checked(returned.per_token, shape, what), clipped)
        return Losses(checked(returned, tokens.new.shape, what), torch.zeros_like(tokens.new, dtype=torch.bool))

    return own


def needs_proximal(settings: PolicyGradientSettings) -> bool:
    """Whether the loss needs `Tokens.proximal`; an own function may."""
    return settings.loss == "decoupled" or settings.loss not in LOSSES


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def _present(value: Tensor | None, kind: str, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"the loss {kind} needs Tokens.{name}, got None")
    return value
