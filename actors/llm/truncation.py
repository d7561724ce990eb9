"""The distribution that tokens are sampled from: temperature, then truncation to the most probable ones."""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 256  # most probable tokens that nearly always hold the mass asked for


def distribution(
    logits: Tensor, temperature: Tensor, *, top_k: int | None = None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Natural log-probabilities after temperature and truncation, renormalised, and what truncation left.

    Temperature comes first, then the `top_k` most probable tokens, and of those the most probable whose probabilities, among
    those kept so far, add up to `top_p` (Holtzman et al. 2020, "The curious case of neural text degeneration", arXiv 1904.09751,
    section 3.1). Tokens exactly as probable as the last one kept are kept too, so what is kept does not depend on their order.

    Args:
        logits: (n, V) of any float type.
        temperature: float32 (n,), above 0.
        top_k: tokens to keep, at least 1; None keeps all.
        top_p: probability to keep, in (0, 1]; 1 keeps all.

    Returns:
        log_probs: float32 (n, V), −inf for tokens left out.
        kept: float32 (n,), log of the probability that the kept tokens had before; exactly 0 without truncation.
    """
    log_probs = torch.log_softmax(logits.float() / temperature.unsqueeze(-1), -1)
    vocab = log_probs.shape[-1]
    kept = torch.zeros_like(temperature)
    if top_k is not None and top_k < vocab:
        last = log_probs.topk(top_k, sorted=True).values[:, -1:]
        log_probs, kept = _keep(log_probs, last, kept)
    if top_p < 1.0:
        log_probs, kept = _keep(log_probs, _last_of_mass(log_probs, top_p), kept)
    return log_probs, kept


def _keep(log_probs: Tensor, last: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves out what is less probable than `last` (n, 1) and adds what that leaves, in log, to `kept` (n,)."""
    log_probs = log_probs.masked_fill(log_probs < last, -torch.inf)
    mass = torch.logsumexp(log_probs, -1, keepdim=True).clamp(max=0.0)  # rounding must not make it more than all
    return log_probs - mass, kept + mass.squeeze(-1)


def _last_of_mass(log_probs: Tensor, mass: float) -> Tensor:
    """(n, 1): log-probability of the last of the most probable tokens that together have at least `mass`."""
    vocab = log_probs.shape[-1]
    for count in (min(_FEW, vocab), vocab):
        # Sorting a whole vocabulary costs more than a decode step of a small model: mostly the first few suffice.
        highest = log_probs.topk(count, sorted=True).values if count < vocab else log_probs.sort(descending=True).values
        cumulative = highest.exp().cumsum(-1)
        if count == vocab or bool((cumulative[:, -1] >= mass).all()):
            break
    fewest = (cumulative < mass).sum(-1, keepdim=True).clamp(max=count - 1)
    return highest.gather(-1, fewest)
