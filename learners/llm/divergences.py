"""Divergences of the policy from another model, estimated at the tokens that were sampled."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.policy_gradient import KlSettings, TeacherSettings

LARGEST = 20.0  # of a log ratio; beyond, its exponential swamps every other term of the loss


def k1(new: Tensor, other: Tensor) -> Tensor:
    """log π − log π_other (T,) (Schulman 2020, Approximating KL Divergence).

    On policy its mean is KL(π ‖ other), and its gradient by itself is 0 in the mean: multiply it by `importance`.
    """
    return new - other


def k2(new: Tensor, other: Tensor) -> Tensor:
    """Half the square of log π − log π_other (T,): never negative, biased, and on policy with the gradient of KL(π ‖ other)."""
    return (new - other).square() / 2


def k3(new: Tensor, other: Tensor) -> Tensor:
    """e^x − 1 − x (T,), x = log π_other − log π: never negative, and on policy its mean is KL(π ‖ other).

    Its gradient by itself is that of KL(other ‖ π) in the mean; multiplied by `importance` it is that of KL(π ‖ other).
    """
    x = (other - new).clamp(-LARGEST, LARGEST)
    # e^x − 1 rounds to below x for small x; expm1 does not.
    return torch.expm1(x) - x


def importance(new: Tensor, old: Tensor) -> Tensor:
    """π / π_old (T,), with a gradient: times an estimate at tokens of π_old, it makes value and gradient those at tokens of π.

    DeepSeek-V3.2 (DeepSeek-AI 2025) multiplies k3 by it.
    """
    return (new - old).clamp(-LARGEST, LARGEST).exp()


def reference_term(settings: KlSettings, new: Tensor, reference: Tensor, old: Tensor) -> Tensor:
    """coefficient · divergence from the frozen model (T,), to be added to the loss of each token.

    k2 and k3 are taken as GRPO takes them, without a correction for the age of tokens; k1 is multiplied by `importance`, without
    which its gradient would be noise.

    Args:
        settings: `coefficient`, `estimator`.
        new: (T,), log-probabilities under the current policy, with a gradient.
        reference: (T,), under the frozen model.
        old: (T,), under the behaviour policy.
    """
    if settings.estimator == "k1":
        return settings.coefficient * importance(new, old) * k1(new, reference)
    estimate = k2 if settings.estimator == "k2" else k3
    return settings.coefficient * estimate(new, reference)


def teacher_term(settings: TeacherSettings, new: Tensor, teacher: Tensor, passed: Tensor) -> Tensor:
    """coefficient · k2 of policy and teacher (T,), to be added to the loss (KDRL, Xu et al. 2025, arXiv 2506.02208).

    Args:
        settings: `coefficient`; with `only_failed` tokens of completions that passed have 0.
        new: (T,), log-probabilities under the current policy, with a gradient.
        teacher: (T,), under the teacher, of the same tokens after the same prompt.
        passed: bool (T,), of each token's completion.
    """
    term = settings.coefficient * k2(new, teacher)
    return torch.where(passed, 0.0, term) if settings.only_failed else term
