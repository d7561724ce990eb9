"""Log-probabilities of tokens: one definition, by which samplers are compared with learners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Float32 numbers worked on at once: on a CPU they stay in its cache, on a GPU they keep it busy.
_NUMBERS_CPU = 2**17
_NUMBERS_GPU = 2**24
_LOWEST = torch.finfo(torch.float32).min


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Natural log-probabilities of `tokens` under softmax(logits / temperature), and that distribution's entropies in nats.

    logits (..., T, V) of any float type, tokens int64 (..., T); both results float32 (..., T), with gradients to `logits`.
    Nothing is truncated. Beside the logits and their gradient, in their own type, it takes memory for a few rows: at 32,768
    tokens of a vocabulary of 150,000 one float32 copy would be 20 GB.

    Raises ValueError if the shapes differ or the temperature is not above 0.
    """
    if tokens.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected one token for each row of logits {tuple(logits.shape)}, so {tuple(logits.shape[:-1])}, got "
            f"{tuple(tokens.shape)}"
        )
    if not temperature > 0.0:
        raise ValueError(f"expected a temperature above 0, got {temperature}; take the argmax of the logits for greedy")
    log_probs, entropies = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), tokens.flatten(), temperature
    )
    return log_probs.view(tokens.shape), entropies.view(tokens.shape)


class _TokenLogProbs(torch.autograd.Function):
    """Softmax, gather and entropy over a few rows at a time, computed again from the logits in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logits (rows, V), tokens (rows,)."""
        log_probs, entropies, totals = logits.new_empty((3, len(logits)), dtype=torch.float32)
        for rows, scores, spare in _scores(logits, temperature):
            chosen = scores.gather(1, tokens[rows, None]).squeeze(1)
            highest = scores.amax(1, keepdim=True)
            # −inf stands for an impossible token; 0 · −inf below would not be 0.
            shifted = scores.sub_(highest).clamp_(min=_LOWEST)
            exponentials = torch.exp(shifted, out=spare)
            total = exponentials.sum(1)
            log_total = total.log()
            highest = highest.squeeze(1)
            log_probs[rows] = chosen - highest - log_total
            entropies[rows] = log_total - exponentials.mul_(shifted).sum(1) / total
            totals[rows] = highest + log_total
        ctx.save_for_backward(logits, tokens, totals, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return log_probs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """∂ log p(y) / ∂ z_j = [j = y] − p_j and ∂H / ∂ z_j = −p_j (log p_j + H), with z = logits / temperature."""
        by_log_prob, by_entropy = gradients
        if by_log_prob is None and by_entropy is None:
            return None, None, None
        logits, tokens, totals, entropies = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows, scores, spare in _scores(logits, ctx.temperature):
            logs = scores.sub_(totals[rows, None]).clamp_(min=_LOWEST)
            probabilities = torch.exp(logs, out=spare)
            if by_entropy is not None:
                slope = logs.add_(entropies[rows, None]).mul_(-by_entropy[rows, None])
                if by_log_prob is not None:
                    slope.sub_(by_log_prob[rows, None])
                gradient = probabilities.mul_(slope)
            else:
                assert by_log_prob is not None
                gradient = probabilities.mul_(-by_log_prob[rows, None])
            if by_log_prob is not None:
                gradient.scatter_add_(1, tokens[rows, None], by_log_prob[rows, None])
            result[rows] = gradient.div_(ctx.temperature)
        return result, None, None


def _scores(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows, logits / temperature in float32, and as much memory besides; both are used again for the next slice."""
    count, vocabulary = logits.shape
    numbers = _NUMBERS_CPU if logits.device.type == "cpu" else _NUMBERS_GPU
    step = min(max(1, numbers // max(1, vocabulary)), max(1, count))
    buffers = logits.new_empty((2, step, vocabulary), dtype=torch.float32)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores, spare = buffers[:, : rows.stop - start]
        yield rows, scores.copy_(logits[rows]).div_(temperature), spare
