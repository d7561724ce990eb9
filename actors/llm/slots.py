"""Continuous batching over a transformers language model: a slot that falls free takes the next request."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from actors.llm.engine import Request, Sample
from actors.llm.forward import Prefilled, SlotNetwork
from actors.llm.noise import inverse_cdf, uniform
from actors.llm.truncation import distribution
from configs.llm import SamplingSettings
from learners.llm.models import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REFILL_SHARE = 16  # new requests begin once one slot in so many is free, or all that wait have room
IDLE_SHARE = 8  # rows are moved together once one in so many of those computed is idle
PREFILLED_KEPT = 8  # prompts whose keys and values are kept for requests of their group that still wait


class SlotEngine:
    """An `Engine` in which up to `slots` completions advance by one token in each step.

    Rows of running completions lie at the front of the cache, so a step computes few rows when few run. Those that finish leave
    idle rows behind; before these become many, they are filled with waiting requests, several in one pass over their prompts, or
    closed by moving other rows. All bookkeeping is in arrays over rows: a step runs no Python per row, but for those that finish.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        network: PreTrainedModel,
        *,
        end: int | Collection[int],
        slots: int,
        version: int = 0,
    ) -> None:
        """Takes over the network; see `make_engine`."""
        self._model = SlotNetwork(network, slots)
        ends = list(end) if isinstance(end, Collection) else [end]
        if not ends or not all(0 <= one < self._model.vocab for one in ends):
            raise ValueError(
                f"end: expected one or more tokens of the model, 0 to {self._model.vocab - 1}, received {end}"
            )
        self._settings = settings
        self._is_end = np.zeros(self._model.vocab, bool)  # by token
        self._is_end[ends] = True
        self._slots = slots
        self._version = version
        self._waiting: deque[Request] = deque()
        self._waiting_prompts: Counter[bytes] = Counter()
        self._prefilled: dict[bytes, Prefilled] = {}  # of one prompt each
        self._new_weights: tuple[int, bytes | memoryview] | None = None
        self._recompute = False
        self._stats: Counter[str] = Counter()

        self._width = 0  # rows that a step computes: all active ones are among them
        self._requests: list[Request | None] = [None] * slots
        self._active = np.zeros(slots, bool)
        self._start = np.zeros(slots, np.int64)  # column of the prompt's first token
        self._token = np.zeros(slots, np.int64)  # the newest, which the next step feeds to the model
        self._count = np.zeros(slots, np.int64)  # tokens sampled
        self._limit = np.zeros(slots, np.int64)
        self._seed = np.zeros(slots, np.int64)
        self._temperature = np.zeros(slots, np.float32)  # 0: greedy
        self._tokens = np.zeros((slots, 0), np.int32)  # (slots, most tokens so far), as in Sample
        self._log_probs = np.zeros((slots, 0), np.float32)
        self._kept = np.zeros((slots, 0), np.float32)
        self._versions = np.zeros((slots, 0), np.int32)

    @property
    def version(self) -> int:
        """Version of the weights that the next token is sampled with."""
        return self._version

    @property
    def running(self) -> int:
        """Completions that have begun and not finished."""
        return int(self._active.sum())

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def stats(self) -> dict[str, float]:
        """Totals since the start, by name.

        tokens: sampled; steps: decode steps; rows: computed in them, idle ones too; prompt_tokens: read; shared_tokens: of
        prompts that were read once for several completions, the tokens that were not read again; swaps: weights taken;
        recomputed_tokens: read again after one.
        """
        names = ("tokens", "steps", "rows", "prompt_tokens", "shared_tokens", "swaps", "recomputed_tokens")
        return {f"engine/{name}": float(self._stats[name]) for name in names}

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests; see `Engine`."""
        for request in requests:
            self._validate(request)
        self._waiting.extend(requests)
        self._waiting_prompts.update(request.prompt.tobytes() for request in requests)

    def load(self, version: int, data: bytes | memoryview) -> None:
        """New weights; see `Engine`. Those that have to wait are looked at when they are taken, within `step`."""
        if self._new_weights is not None and version < self._new_weights[0]:
            return  # of several that wait the newest is taken
        if self._settings.swap == "finish" and self._active.any():
            self._new_weights = version, data
        else:
            self._take(version, data)
            self._new_weights = None  # older ones that waited

    def step(self) -> list[Sample]:
        """Advances all running completions by a token; see `Engine`."""
        finished: list[Sample] = []
        if self._new_weights is not None and not self._active.any():
            self._take(*self._new_weights)
            self._new_weights = None
        with torch.inference_mode():
            if self._recompute:
                self._read_again()
            if self._new_weights is None:
                finished += self._begin()
            self._close_up()
            if self._width:
                finished += self._decode()
        return finished

    def _validate(self, request: Request) -> None:
        where = f"request {request.index} of group {request.group}"
        prompt, most = request.prompt, self._most_tokens(request)
        if prompt.ndim != 1 or not len(prompt) or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(
                f"{where}: expected a prompt of at least one token, int32 (tokens,), received {prompt.dtype} {prompt.shape}"
            )
        if prompt.min() < 0 or prompt.max() >= self._model.vocab:
            raise ValueError(
                f"{where}: expected prompt tokens from 0 to {self._model.vocab - 1}, received {prompt.min()} to {prompt.max()}; "
                "the tokenizer is not this model's"
            )
        if most < 1:
            raise ValueError(f"{where}: expected max_tokens of at least 1, received {most}")
        if request.temperature is not None and not 0.0 <= request.temperature < np.inf:
            raise ValueError(f"{where}: expected a temperature of 0 (greedy) or more, received {request.temperature}")
        longest = self._model.max_length
        if longest is not None and len(prompt) + most > longest:
            raise ValueError(
                f"{where}: a prompt of {len(prompt)} tokens and max_tokens {most} make {len(prompt) + most}, and the model's "
                f"max_position_embeddings is {longest}; shorten the prompt or lower max_tokens"
            )

    def _most_tokens(self, request: Request) -> int:
        return self._settings.max_tokens if request.max_tokens is None else request.max_tokens

    def _take(self, version: int, data: bytes | memoryview) -> None:
        load_weights(self._model.network, data)
        self._version = version
        self._stats["swaps"] += 1
        self._prefilled.clear()  # by the old weights
        self._recompute = self._settings.cache == "recompute"

    def _read_again(self) -> None:
        """Keys and values of all running completions by the weights of now; the newest token's follow in the next step."""
        self._recompute = False
        rows = np.flatnonzero(self._active)
        sequences = [
            np.concatenate([request.prompt, self._tokens[row, : self._count[row] - 1]])
            for row, request in self._running_at(rows)
        ]
        self._stats["recomputed_tokens"] += sum(map(len, sequences))
        for filled, members in self._model.prefill(sequences):
            self._model.cache.place(self._indices(rows[members]), self._indices(np.arange(len(members))), filled.states)
            del filled  # before the next pass is made

    def _running_at(self, rows: np.ndarray) -> list[tuple[int, Request]]:
        return [(row, request) for row in rows.tolist() if (request := self._requests[row]) is not None]

    def _begin(self) -> list[Sample]:
        """Waiting requests into free slots: their prompts and first tokens."""
        running = self.running
        count = min(self._slots - running, len(self._waiting))
        # Not for every slot that falls free: a pass over one prompt costs nearly as much as one over several.
        if not count or (running and count < min(len(self._waiting), max(1, self._slots // REFILL_SHARE))):
            return []
        requests = [self._waiting.popleft() for _ in range(count)]
        rows = np.flatnonzero(~self._active)[:count]
        self._make_room(before=max(len(request.prompt) for request in requests), after=1)
        self._width = max(self._width, int(rows[-1]) + 1)
        self._occupy(rows, requests)
        order, logits = self._read_prompts(requests, rows)
        return self._record(order, *self._sample(logits, order))

    def _read_prompts(self, requests: Sequence[Request], rows: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Puts the requests' prompts into their rows; each is read once.

        Returns:
            the rows in the order in which they were filled, and the logits (rows, V) of their first tokens.
        """
        prompts = {request.prompt.tobytes(): request.prompt for request in requests}
        places = defaultdict[bytes, list[int]](list)
        for request, row in zip(requests, rows.tolist(), strict=True):
            places[request.prompt.tobytes()].append(row)
        self._waiting_prompts.subtract({key: len(taken) for key, taken in places.items()})
        order: list[int] = []
        logits: list[Tensor] = []

        def put(filled: Prefilled, keys: Sequence[bytes]) -> None:
            taken = [row for key in keys for row in places[key]]
            sources = self._indices(np.repeat(np.arange(len(keys)), [len(places[key]) for key in keys]))
            self._model.cache.place(self._indices(np.array(taken)), sources, filled.states)
            logits.append(filled.logits.index_select(0, sources))
            order.extend(taken)

        fresh = [key for key in places if key not in self._prefilled]
        for key in places:
            if key in self._prefilled:
                put(self._prefilled[key], [key])
        for filled, members in self._model.prefill([prompts[key] for key in fresh]):
            keys = [fresh[number] for number in members]
            put(filled, keys)
            for number, key in enumerate(keys):
                if self._waiting_prompts[key]:
                    self._prefilled[key] = filled.only(number, len(prompts[key]))
                    if len(self._prefilled) > PREFILLED_KEPT:
                        del self._prefilled[next(iter(self._prefilled))]
            del filled  # before the next pass is made
        for key in places:
            if not self._waiting_prompts[key]:
                del self._waiting_prompts[key]
                self._prefilled.pop(key, None)
        read = sum(len(prompts[key]) for key in fresh)
        self._stats["prompt_tokens"] += read
        self._stats["shared_tokens"] += sum(len(request.prompt) for request in requests) - read
        return np.array(order), torch.cat(logits)

    def _occupy(self, rows: np.ndarray, requests: Sequence[Request]) -> None:
        for row, request in zip(rows.tolist(), requests, strict=True):
            self._requests[row] = request
        self._active[rows] = True
        self._start[rows] = self._model.cache.column - np.array([len(request.prompt) for request in requests])
        self._count[rows] = 0
        self._limit[rows] = [self._most_tokens(request) for request in requests]
        self._seed[rows] = [request.seed for request in requests]
        own = self._settings.temperature
        self._temperature[rows] = [own if one.temperature is None else one.temperature for one in requests]

    def _close_up(self) -> None:
        """Moves the last running rows to where earlier ones are idle, so that steps compute fewer."""
        running = self.running
        if (self._width - running) * IDLE_SHARE <= self._width and running:
            return
        targets = np.flatnonzero(~self._active[:running])
        sources = np.flatnonzero(self._active[running : self._width]) + running
        self._width = running
        if not len(sources):
            return
        low = int(self._start[sources].min())
        self._model.cache.move(self._indices(sources), self._indices(targets), low)
        for array in (self._start, self._token, self._count, self._limit, self._seed, self._temperature, self._active):
            array[targets] = array[sources]
        for table in (self._tokens, self._log_probs, self._kept, self._versions):
            table[targets] = table[sources]
        self._active[sources] = False
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            self._requests[target], self._requests[source] = self._requests[source], None

    def _make_room(self, *, before: int, after: int) -> None:
        cache = self._model.cache
        low = int(self._start[self._active].min()) if self._active.any() else cache.column
        self._start -= cache.make_room(self._width, low, before, after)

    def _decode(self) -> list[Sample]:
        self._make_room(before=0, after=1)
        width = self._width
        active = self._active[:width]
        starts = np.where(active, self._start[:width], self._model.cache.column)
        logits = self._model.decode(self._token[:width], starts)
        self._stats["steps"] += 1
        self._stats["rows"] += width
        tokens, log_probs, kept = self._sample(logits, np.arange(width))
        rows = np.flatnonzero(active)
        return self._record(rows, tokens[rows], log_probs[rows], kept[rows])

    def _sample(self, logits: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The next token of each of these rows, its log-probability and the kept mass, float64 (rows,) each."""
        settings, device = self._settings, logits.device
        greedy = self._temperature[rows] == 0.0
        temperature = np.where(greedy, np.float32(1.0), self._temperature[rows])
        uniforms = torch.from_numpy(uniform(self._seed[rows], self._count[rows])).to(device, non_blocking=True)
        all_log_probs, kept = distribution(
            logits, torch.from_numpy(temperature).to(device), top_k=settings.top_k, top_p=settings.top_p
        )
        tokens = inverse_cdf(all_log_probs.exp(), uniforms)
        log_probs = all_log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        if greedy.any():
            mask = torch.from_numpy(greedy).to(device)
            tokens = torch.where(mask, logits.argmax(-1), tokens)
            log_probs, kept = log_probs.masked_fill(mask, 0.0), kept.masked_fill(mask, 0.0)
        # One transfer for all three; float64 holds token numbers and float32 exactly.
        sampled = torch.stack([tokens.double(), log_probs.double(), kept.double()]).cpu().numpy()
        return sampled[0], sampled[1], sampled[2]

    def _record(self, rows: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray, kept: np.ndarray) -> list[Sample]:
        """Appends a token to each of these rows and hands out the completions that end with it."""
        if np.isnan(log_probs).any():
            raise FloatingPointError(
                f"the model's logits are not finite with the weights of version {self._version}; nothing can be sampled from them"
            )
        count = self._count[rows]
        if count.max(initial=0) >= self._tokens.shape[1]:
            self._lengthen(min(2 * int(count.max()) + 16, int(self._limit[self._active].max())))
        self._tokens[rows, count] = tokens
        self._log_probs[rows, count] = log_probs
        self._kept[rows, count] = kept
        self._versions[rows, count] = self._version
        self._token[rows] = tokens
        self._count[rows] = count + 1
        self._stats["tokens"] += len(rows)
        stopped = self._is_end[self._token[rows]]
        done = rows[stopped | (count + 1 >= self._limit[rows])]
        finished = [self._sample_of(row, request) for row, request in self._running_at(done)]
        self._active[done] = False
        for row in done.tolist():
            self._requests[row] = None
        return finished

    def _sample_of(self, row: int, request: Request) -> Sample:
        count = self._count[row]
        finish: Literal["stop", "length"] = "stop" if self._is_end[self._token[row]] else "length"
        return Sample(
            request,
            self._tokens[row, :count].copy(),
            self._log_probs[row, :count].copy(),
            self._kept[row, :count].copy(),
            self._versions[row, :count].copy(),
            finish,
        )

    def _lengthen(self, tokens: int) -> None:
        for name in ("_tokens", "_log_probs", "_kept", "_versions"):
            table = getattr(self, name)
            setattr(self, name, np.pad(table, ((0, 0), (0, tokens - table.shape[1]))))

    def _indices(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._model.device)
