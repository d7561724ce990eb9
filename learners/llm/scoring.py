"""Log-probabilities of a micro-batch under a language model, with logits for the sampled positions only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from learners.llm.batching import MicroBatch
from learners.llm.log_probs import token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 1 << 28  # that are held at once: with a vocabulary of 150,000, those of 1,800 tokens


class Scorer(nn.Module):
    """A network as a function from micro-batches to log-probabilities and entropies at one sampling temperature.

    Prompts take up much of a batch, and logits of a large vocabulary more memory than all else: where logits are a linear
    function of the last hidden states, those of the sampled positions are computed alone, and in pieces that the backward pass
    computes again. A module of its own, so that FSDP2 gathers the outermost weights when it is called.

    Logits are float32 whatever matrix products are computed in: rounded to bfloat16, those near 22 are off by up to 0.06, and
    log-probabilities of a vocabulary of 150,000 by 0.026 nats in the mean, 0.079 at most; by 0.009 and 0.034 where only hidden
    states and weights of the head are rounded, as they are here. Of models that cap or scale their logits, which are computed as
    the model does it, all are rounded.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        *,
        temperature: float,
        precision: torch.dtype | None = None,
        logits: int = LOGITS,
    ) -> None:
        """
        temperature: that completions were sampled at.
        precision: type that matrix products are computed in (autocast); None: that of the weights.
        logits: that are held at once.
        """
        super().__init__()
        self.network = network
        self._temperature = temperature
        self._precision = precision
        self._logits = logits
        base: Any = network.get_base_model() if hasattr(network, "peft_config") else network
        # Kept out of the tree of modules, where each would have its parameters twice.
        self._inner: tuple[Any, Any] | None = None
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        if decoder is not base and head is not None and _is_all(base, decoder, head):
            self._inner = decoder, head

    def forward(self, batch: MicroBatch, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities comparable with those that the actor stored, and entropies (nats, without truncation), both (t,).

        tokens: int64 (t,), the batch's sampled ones. kept: (t,), log of the probability that truncation left the actor.
        """
        device = batch.ids.device.type
        with torch.autocast(device, self._precision, enabled=self._precision is not None):
            if self._inner is None:
                logits = self.network(input_ids=batch.ids, use_cache=False).logits
                log_probs, entropy = self._score(logits.flatten(0, 1)[batch.predicts], tokens)
            else:
                decoder, head = self._inner
                hidden = decoder(input_ids=batch.ids, use_cache=False).last_hidden_state
                log_probs, entropy = self._pieces(head, hidden.flatten(0, 1)[batch.predicts], tokens)
        return log_probs - kept, entropy

    def _pieces(self, head: nn.Module, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        size = max(1, self._logits // self.network.config.get_text_config().vocab_size)
        if len(hidden) <= size:
            return self._score(self._logits_of(head, hidden), tokens)

        def piece(part: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
            return self._score(self._logits_of(head, part), sampled)

        found = [
            checkpoint(piece, part, sampled, use_reentrant=False)
            for part, sampled in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True)
        ]
        log_probs, entropies = zip(*found, strict=True)
        return torch.cat(log_probs), torch.cat(entropies)

    def _logits_of(self, head: nn.Module, hidden: Tensor) -> Tensor:
        if self._precision is None:
            logits: Tensor = head(hidden)
            return logits
        with torch.autocast(hidden.device.type, enabled=False):
            if type(head) is not nn.Linear:
                logits = head(hidden.float())
                return logits
            logits = _Product.apply(hidden, head.weight, self._precision)  # type: ignore[no-untyped-call]
            return logits if head.bias is None else logits + head.bias.float()

    def _score(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropy = token_log_probs(logits, tokens, self._temperature)
        return log_probs, entropy.detach()


class _Product(torch.autograd.Function):
    """hidden @ weight.T (rows, V) in float32, of both rounded to a shorter type; so are the products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, precision: torch.dtype) -> Tensor:
        """hidden (rows, width), weight (V, width)."""
        rounded = hidden.to(precision)
        ctx.save_for_backward(rounded, weight)  # not the weight rounded: with a large vocabulary that is much memory
        ctx.precision, ctx.type = precision, hidden.dtype
        return _wide(rounded, weight.to(precision).T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rounded, weight = ctx.saved_tensors
        gradient = gradient.to(ctx.precision)
        by_hidden = by_weight = None
        if ctx.needs_input_grad[0]:
            by_hidden = _wide(gradient, weight.to(ctx.precision)).to(ctx.type)
        if ctx.needs_input_grad[1]:
            by_weight = _wide(gradient.T, rounded).to(weight.dtype)
        return by_hidden, by_weight, None


def _wide(one: Tensor, two: Tensor) -> Tensor:
    """The matrix product in float32 of tensors of a shorter type."""
    if one.is_cuda:
        # Tensor cores add up in float32 anyway; float32 factors would cost many times as much.
        return torch.mm(one, two, out_dtype=torch.float32)
    return one.float() @ two.float()


def store_rounded(network: PreTrainedModel, precision: torch.dtype) -> None:
    """Keeps a frozen network's matrices in the type that autocast multiplies them in, which saves memory and changes no result.

    Embeddings stay as they are, and so does a head that shares theirs: they begin the sum that runs through all layers.
    """
    embeddings = network.get_input_embeddings().weight
    for module in network.modules():
        if type(module) is nn.Linear and module.weight is not embeddings:
            module.weight.data = module.weight.data.to(precision)


@torch.no_grad()
def _is_all(network: Any, decoder: nn.Module, head: nn.Module) -> bool:
    """Whether logits are `head` of the hidden states and no more: some models cap or scale them afterwards."""
    device = next(network.parameters()).device
    ids = torch.arange(4, device=device)[None] % network.config.get_text_config().vocab_size
    expected = network(input_ids=ids, use_cache=False).logits.float()
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return bool(torch.allclose(head(hidden).float(), expected, rtol=1e-4, atol=1e-5))


def no_dropout(network: nn.Module) -> None:
    """Takes dropout out for good: log-probabilities of one model must be the same each time, in training mode as well."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
