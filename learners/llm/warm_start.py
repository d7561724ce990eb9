"""A supervised phase before reinforcement: next-token prediction on generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.llm import WarmStartSettings
from learners.llm.models import Model
from learners.llm.tokenizers import Tokenizer

TELL_EVERY = 50  # steps between two lines of progress
# Tokens in one forward and backward pass. A CPU is fastest while the activations of a pass stay in its cache.
MICRO_TOKENS_CPU = 2048
MICRO_TOKENS_GPU = 65_536


def warm_start(
    model: Model,
    examples: Iterator[tuple[str, str]],
    settings: WarmStartSettings,
    *,
    max_tokens: int,
    tell: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Trains the network on the answers of `settings.steps` batches of (prompt, answer) pairs.

    The loss is the mean of −log p over all tokens of the batch's answers and the end tokens after them; an answer longer than
    `max_tokens` is cut there, where sampling ends as well. The result depends on the network and the examples alone. `tell`
    is handed a line of progress now and then.

    Returns the means over the last steps of `loss` (nats per token) and `accuracy` (share of tokens that were the most
    probable), both NaN at 0 steps, `tokens` trained on, and `seconds`. Raises ValueError if the examples run out.
    """
    network = model.network
    device = next(network.parameters()).device
    most = MICRO_TOKENS_CPU if device.type == "cpu" else MICRO_TOKENS_GPU
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, settings.learning_rate, fused=True)
    begun = perf_counter()
    told = torch.zeros(2, device=device)
    result = {"loss": float("nan"), "accuracy": float("nan"), "tokens": 0.0, "seconds": 0.0}
    since = 0
    for step in range(1, settings.steps + 1):
        batch = [
            _encode(model.tokenizer, prompt, answer, max_tokens)
            for prompt, answer in islice(examples, settings.batch_size)
        ]
        if len(batch) < settings.batch_size:
            raise ValueError(
                f"expected {settings.steps} batches of {settings.batch_size} examples for the warm start, got "
                f"{len(batch)} in batch {step}; lower warm_start.steps, or generate more"
            )
        answered = sum(len(answer) for _, answer in batch)
        optimiser.zero_grad(set_to_none=True)
        for part in _parts(batch, most):
            loss, right = _loss(network, part, model.tokenizer.pad, device)
            (loss / answered).backward()  # type: ignore[no-untyped-call]
            told += torch.stack([loss.detach(), right])
        optimiser.step()
        since += answered
        result["tokens"] += answered
        if step % TELL_EVERY == 0 or step == settings.steps:
            result["loss"], result["accuracy"] = (told / since).tolist()
            told.zero_()
            since = 0
            if tell is not None:
                tell(
                    f"warm start: step {step} of {settings.steps}, loss {result['loss']:.3f}, "
                    f"tokens right {result['accuracy']:.2f}"
                )
    optimiser.zero_grad(set_to_none=True)
    result["seconds"] = perf_counter() - begun
    return result


def _encode(tokenizer: Tokenizer, prompt: str, answer: str, max_tokens: int) -> tuple[list[int], list[int]]:
    tokens = tokenizer.encode_prompt(prompt)
    if not tokens:
        raise ValueError(
            f"expected prompts of a token or more, got {prompt!r} with no tokens: nothing predicts the answer's first"
        )
    return tokens, [*tokenizer.encode(answer), tokenizer.end][:max_tokens]


def _parts(batch: Sequence[tuple[list[int], list[int]]], most: int) -> Iterator[Sequence[tuple[list[int], list[int]]]]:
    """The batch in parts of like length, each of at most `most` tokens with padding, or of one example."""
    ordered = sorted(batch, key=lambda example: (len(example[0]) + len(example[1]), len(example[0])))
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or (stop + 1 - start) * (len(ordered[stop][0]) + len(ordered[stop][1])) > most:
            yield ordered[start:stop]
            start = stop


def _loss(
    network: torch.nn.Module, part: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Sum of −log p over the answers' tokens, and how many of them were the most probable."""
    length = max(len(prompt) + len(answer) for prompt, answer in part) - 1  # nothing follows the last token
    first = min(len(prompt) for prompt, _ in part) - 1  # before it no position predicts a token of an answer
    inputs = np.full((len(part), length), pad, np.int64)
    targets = np.full((len(part), length), -1, np.int64)
    for row, (prompt, answer) in enumerate(part):
        tokens = prompt + answer
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, len(prompt) - 1 : len(tokens) - 1] = answer
    # Padding is on the right, so causal attention keeps it from all tokens before it: no mask is needed.
    logits = network(
        input_ids=torch.from_numpy(inputs).to(device), use_cache=False, logits_to_keep=length - first
    ).logits
    wanted = torch.from_numpy(targets[:, first:]).to(device)
    answers = wanted >= 0
    kept, wanted = logits[answers].float(), wanted[answers]
    right = (kept.detach().argmax(-1) == wanted).sum()
    return F.cross_entropy(kept, wanted, reduction="sum"), right
