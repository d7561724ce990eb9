"""Forward passes of a transformers language model over prompts and over slots, through its public interface alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from actors.llm.slot_cache import SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 16_384  # most tokens, padding among them, of one pass over several prompts
MASK_ELEMENTS = 1 << 24  # most elements of such a pass's attention mask
ATTENTION = ("sdpa", "eager")  # implementations that take an attention mask of four dimensions


@dataclass(frozen=True, eq=False)
class Prefilled:
    """Prompts that one pass has read, their ends in the same column: much memory, to let go of soon."""

    states: list[tuple[Tensor, Tensor]]  # keys and values (prompts, heads, columns, units) of each layer
    logits: Tensor  # (prompts, V), of the token that comes next

    def only(self, number: int, length: int) -> Prefilled:
        """A copy of one prompt, of `length` tokens, without which the others need not stay in memory."""
        own = slice(number, number + 1)
        states = [(keys[own, :, -length:].clone(), values[own, :, -length:].clone()) for keys, values in self.states]
        return Prefilled(states, self.logits[own].clone())


class SlotNetwork:
    """A causal language model and the cache of its slots.

    All passes get positions and an additive attention mask of four dimensions explicitly, so that padding and the columns where
    rows lie are invisible to the model. Their shapes follow what runs; on a GPU one would rather round rows and columns up and
    replay a recorded graph for each shape: the cache already writes and reads slices without indices.
    """

    def __init__(self, network: PreTrainedModel, slots: int) -> None:
        """Takes the model over, without dropout.

        Raises:
            ValueError: its attention is not the ordinary one over all tokens before.
        """
        self.network = network.eval()
        self.device = network.device
        config = network.config.get_text_config(decoder=True)
        self._config = config
        self._lowest = torch.finfo(network.dtype).min
        # All logits of a prompt may take more memory than all else; the few models without this option compute them.
        takes_keep = "logits_to_keep" in inspect.signature(network.forward).parameters
        self._last: dict[str, Any] = {"logits_to_keep": 1} if takes_keep else {}
        self.vocab = int(network.get_input_embeddings().num_embeddings)
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        layers = _ordinary_layers(network, config)
        with torch.inference_mode():
            self.cache = SlotCache(2, layers)
            self._check()
            self.cache = SlotCache(slots, layers)

    def prefill(self, prompts: Sequence[np.ndarray]) -> Iterator[tuple[Prefilled, list[int]]]:
        """Reads prompts, in as few passes as memory allows; use up and drop each pass before asking for the next.

        Args:
            prompts: int32 (tokens,) each, at least one token.

        Yields:
            a pass with the numbers of the prompts it holds, in its order.
        """
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        members = list[int]()
        for number in order:
            length = len(prompts[number])  # no shorter than those before
            count = len(members) + 1
            alike = not members or len(prompts[members[0]]) == length
            if members and (count * length > PASS_TOKENS or (not alike and count * length**2 > MASK_ELEMENTS)):
                yield self._read([prompts[i] for i in members]), members
                members = []
            members.append(number)
        if members:
            yield self._read([prompts[i] for i in members]), members

    def _read(self, prompts: Sequence[np.ndarray]) -> Prefilled:
        columns = len(prompts[-1])
        tokens = np.zeros((len(prompts), columns), np.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[columns - len(prompt) :] = prompt
        padding = torch.tensor([[columns - len(prompt)] for prompt in prompts], device=self.device)
        column = torch.arange(columns, device=self.device)
        mask = None  # means causal, which has faster kernels
        if len(prompts[0]) < columns:
            hidden = (column > column[:, None]) | (column < padding)[:, None, None, :]
            mask = torch.zeros(hidden.shape, dtype=self.network.dtype, device=self.device)
            mask.masked_fill_(hidden, self._lowest)
        cache = DynamicCache(config=self._config)
        logits = self.network(
            input_ids=torch.from_numpy(tokens).to(self.device),
            position_ids=(column - padding).clamp_(min=0),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._last,
        ).logits
        return Prefilled([(layer.keys, layer.values) for layer in cache.layers], logits[:, -1])

    def decode(self, tokens: np.ndarray, starts: np.ndarray) -> Tensor:
        """One more token of each of the first rows, at the cache's column.

        Args:
            tokens: int64 (rows,).
            starts: int64 (rows,), columns of the rows' first tokens; of a row that is not in use the current column.

        Returns:
            logits (rows, V) of the tokens that come next.
        """
        low = int(starts.min())
        # One transfer for both, should the device be another.
        inputs = torch.from_numpy(np.stack([tokens, starts])).to(self.device, non_blocking=True)
        start = inputs[1].unsqueeze(-1)
        columns = torch.arange(low, self.cache.column + 1, device=self.device)
        mask = torch.zeros((len(tokens), len(columns)), dtype=self.network.dtype, device=self.device)
        mask.masked_fill_(columns < start, self._lowest)
        self.cache.begin(len(tokens), low)
        logits: Tensor = self.network(
            input_ids=inputs[0].unsqueeze(-1),
            position_ids=self.cache.column - start,
            attention_mask=mask[:, None, None, :],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.cache.advance()
        return logits[:, -1]

    def _check(self) -> None:
        """Compares with a plain pass: a model that makes its own of masks or positions would sample something else."""
        vocab, longest = self.vocab, min(6, self.max_length or 6)
        sequences = [np.arange(1, length + 1) * 7 % vocab for length in (longest - 1, max(longest - 3, 1))]
        try:
            ((filled, members),) = self.prefill([sequence[:-1] for sequence in sequences if len(sequence) > 1])
            self.cache.make_room(0, self.cache.column, len(sequences[0]), 1)
            rows = torch.arange(len(members), device=self.device)
            self.cache.place(rows, rows, filled.states)
            ends = np.array([sequences[number][-1] for number in members])
            starts = np.array([self.cache.column - len(sequences[number]) + 1 for number in members])
            found = torch.stack([filled.logits, self.decode(ends, starts)], 1).float()
            plain = [
                self.network(input_ids=torch.from_numpy(sequences[number])[None].to(self.device)).logits[:, -2:]
                for number in members
            ]
            expected = torch.cat(plain).float()
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise _refusal(self.network, f"a pass over two slots raised {type(error).__name__}: {error}") from error
        difference = float((found - expected).abs().max())
        size = 1.0 + float(expected.abs().max())
        if not difference <= size * (1e-3 if self.network.dtype == torch.float32 else 0.1):
            raise _refusal(
                self.network,
                f"with padding and explicit positions its logits differ by {difference:.2g} from a plain pass",
            )


def _ordinary_layers(network: PreTrainedModel, config: Any) -> int:
    """Number of layers; ValueError if any of them needs something else than all keys and values before."""
    try:
        kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    except KeyError as error:
        raise _refusal(network, f"its layers are of a type without keys and values, {error}") from error
    if others := sorted({kind.__name__ for kind in kinds if kind is not DynamicLayer}):
        raise _refusal(
            network,
            f"its layers need {', '.join(others)} (a sliding window, a recurrent state, shared keys or the like)",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise _refusal(
            network, f"its rope_type {rope['rope_type']!r} makes positions depend on what else is in the batch"
        )
    if (attention := network.config._attn_implementation) not in ATTENTION:
        raise _refusal(
            network, f"its attention is {attention!r}; load it with attn_implementation set to {' or '.join(ATTENTION)}"
        )
    return len(kinds)


def _refusal(network: PreTrainedModel, reason: str) -> ValueError:
    return ValueError(
        f"{type(network).__name__} cannot be sampled from slot by slot: {reason}. Expected a causal language model in which every "
        "layer attends to all tokens before, such as Llama, Qwen, Mistral without a window, GPT-NeoX or GPT-2; take another "
        "model, or set sampling.engine to an engine of your own (package.module:Class)"
    )
