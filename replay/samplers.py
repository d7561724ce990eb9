"""How learners read from the replay service: batches over all shards of a table.

A table over several shards is read as one. Where items are drawn at random, each batch takes from each shard a number of
windows drawn in proportion to the shards' masses (their item counts, or the sums of their priorities); where they are served
in order, it takes those of the best keys. The shards have drawn ahead, in blocks of many batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from .buffers import buffers
from .layout import TableSpec
from .schema import SchemaError, StepSchema, Window, WindowBatch
from .security import Security
from .shard import Shard
from .streams import StreamSource, Transport

_CLOSE_S = 10.0  # how long a source may take to end
_TURN_S = 0.2  # how long one shard is waited for before another look at whether it lives
# What the keys of an ordered selector are multiplied with so that the best is the least.
BEST_FIRST = {"fifo": 1.0, "lifo": -1.0, "min_heap": 1.0, "max_heap": -1.0}


class Source(Protocol):
    """Windows drawn by one shard."""

    @property
    def mass(self) -> float:
        """What the shard weighs in a draw, as far as is known; NaN before it has told."""
        ...

    @property
    def items(self) -> int:
        """Items of the table on this shard, as far as is known."""
        ...

    @property
    def refused(self) -> Exception | None:
        """Why the shard will never be read, if that is so."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether the shard was away for so long that it is looked for no more."""
        ...

    def keys(self, count: int, timeout_s: float) -> np.ndarray:
        """Keys of the next windows, up to `count`, in the order in which `take` gives them; none come within `timeout_s`: ()."""
        ...

    def take(self, count: int, out: WindowBatch, at: int, timeout_s: float) -> bool:
        """Put the next `count` windows into places `at` … of `out`. False when they did not come in time: nothing was taken."""
        ...

    def skip(self) -> None:
        """A batch is made. Of an ordered table whose items stay: what else was offered for it by `keys` is of no use."""
        ...

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None: ...

    def close(self) -> None: ...


class CallSource:
    """Windows of a shard in this process."""

    refused: Exception | None = None
    has_ended = False

    def __init__(self, shard: Shard, *, window: Window, table: str = "steps") -> None:
        self._shard = shard
        self._table = shard.table(table)
        self._window = window

    @property
    def mass(self) -> float:
        return self._table.offered[0]

    @property
    def items(self) -> int:
        return self._table.offered[1]

    def keys(self, count: int, timeout_s: float) -> np.ndarray:
        return self._shard.best_keys(self._table.spec.name, count)

    def take(self, count: int, out: WindowBatch, at: int, timeout_s: float) -> bool:
        name, frames = self._table.spec.name, out.frame_count
        found = self._shard.sample(name, count, count, self._window, timeout_s=timeout_s, out=out, at=at)
        if found is not None and len(found[0]) < count:  # the others may not be drawn: used up, or without mass
            self._shard.unused(name, len(found[0]))
            out.frame_count = frames
            return False
        return found is not None

    def skip(self) -> None:
        pass

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None:
        self._shard.update_priorities(self._table.spec.name, items, priorities)

    def close(self) -> None:
        pass


def _is_served_afresh(table: TableSpec) -> bool:
    """Whether items are served in order and stay, so that every batch begins with the best ones."""
    return table.selector in BEST_FIRST and table.max_times_sampled is None


# Makes the source of a shard: its number, its address, and how many shards there are.
MakeSource = Callable[[int, str, int], Source]


class Sampler:
    """Draws batches of windows over all shards of a table.

    `route` and `update_priorities` are for any thread, the other methods for one at a time.
    """

    def __init__(
        self,
        sources: Mapping[int, Source] | Sequence[Source],
        schema: StepSchema,
        *,
        window: Window,
        batch_size: int,
        seed: int,
        table: TableSpec | None = None,
        routes: Mapping[int, str] | None = None,
        make: MakeSource | None = None,
    ) -> None:
        """
        sources: by number of their shard, or in the order of the numbers, from 0 on.
        table: its selector decides how the shards' draws are put together; None: at random.
        routes: the addresses that the sources were made for, and `make` what made them; without it `route` cannot be used.
        """
        known = sources if isinstance(sources, Mapping) else dict(enumerate(sources))
        # Replaced as a whole, by the thread that samples; others take what they find.
        self._sources: dict[int, Source] = dict(sorted(known.items()))
        self._schema = schema
        self._window = window
        self._batch_size = batch_size
        table = table or TableSpec()
        self._best_first = BEST_FIRST.get(table.selector)
        self._afresh = _is_served_afresh(table)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._out: WindowBatch | None = None  # of the batch begun
        self._counts: dict[int, int] = {}  # windows still to come from each shard for it
        self._shares: dict[int, float] = {}
        self._at = 0
        self._routes = dict(routes or {})
        self._make = make
        self._wanted: dict[int, str] | None = None  # routes not taken over yet
        self._untold = set(self._sources)  # shards whose masses are waited for before anything is drawn
        self._closing: list[threading.Thread] = []

    def route(self, routes: Mapping[int, str]) -> None:
        """Draw from these shards from now on: number of each → its address. Returns at once; for any thread.

        It is done between two batches, or while a batch waits for windows: those that a shard no longer there was to give
        come from others. What had been drawn ahead on such a shard is given back. A shard that is new is drawn from once
        it has told what it holds.

        Raises:
            ValueError: there are no routes, or the sampler was not made with addresses.
        """
        if not routes or self._make is None:
            raise ValueError(f"expected addresses of shards, for a sampler made by stream_sampler; received {routes}")
        self._wanted = dict(sorted(routes.items()))

    def _follow(self) -> bool:
        """Take over the routes wanted. Returns whether a batch that was begun can be gone on with."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return True
        assert self._make is not None
        # One that has given its shard up is made anew: the shard may be back where it was.
        same = {n: s for n, s in self._sources.items() if wanted.get(n) == self._routes.get(n)}
        kept = {n: s for n, s in same.items() if not s.has_ended}
        if wanted == self._routes and len(kept) == len(self._sources):
            return True
        gone = [source for number, source in self._sources.items() if number not in kept]
        made = {n: self._make(n, address, len(wanted)) for n, address in wanted.items() if n not in kept}
        self._sources, self._routes = dict(sorted((kept | made).items())), wanted
        self._untold &= kept.keys()
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        for source in gone:  # its shard may be dead, and not tell that it has heard
            thread = threading.Thread(target=source.close, name="source that left", daemon=True)
            thread.start()
            self._closing.append(thread)
        return all(number in kept for number, count in self._counts.items() if count)

    def buffers(self) -> WindowBatch:
        """Room for a batch, to be passed to `sample` again and again."""
        return buffers(self._schema, self._window, self._batch_size)

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
        """The next batch, in `out` or in arrays of its own.

        A batch that was begun when the time was over is gone on with by the next call, in the arrays it was begun in.

        Raises:
            TimeoutError: the shards had no windows to give, or were not allowed to, within `timeout_s`.
        """
        if self._wanted is not None and not self._follow():
            self._out = None
        if len(self._sources) == 1 and self._best_first is None and self._out is None:
            return self._sample_one(self.buffers() if out is None else out, timeout_s)
        deadline = time.monotonic() + timeout_s
        if self._out is None:
            self._begin(self.buffers() if out is None else out, deadline)
        batch = self._out
        assert batch is not None
        for number, count in self._counts.items():
            if count == 0:
                continue
            source = self._sources[number]
            while not source.take(count, batch, self._at, self._turn(deadline)):
                left = deadline - time.monotonic()
                # The shard is lost or gone, or has nothing left: begin the batch again from the others.
                if self._wanted is not None and not self._follow():
                    self._out = None
                    return self.sample(max(0.0, left), batch)
                if source.mass == 0:
                    self._out = None
                    if len(self._sources) > 1 and left > 0:
                        return self.sample(left, batch)
                if left <= 0:
                    raise TimeoutError(f"shard {number} gave no windows within {timeout_s:g} s")
            if len(self._counts) > 1:
                batch.probability[self._at : self._at + count] *= self._shares[number]
            self._at += count
            self._counts[number] = 0
        batch.size = sum(source.items for source in self._sources.values())
        if self._best_first is not None:
            for source in self._sources.values():
                source.skip()
        self._out = None
        return batch

    def _sample_one(self, out: WindowBatch, timeout_s: float) -> WindowBatch:
        """The next batch of the only shard, at random: the way that has to be short."""
        ((number, source),) = self._sources.items()
        out.frame_count = 0
        deadline = time.monotonic() + timeout_s
        while True:
            turn = self._turn(deadline)
            try:
                if source.take(self._batch_size, out, 0, turn):
                    break
            except TimeoutError:  # in the middle of it
                if turn < _TURN_S:
                    raise
            if turn < _TURN_S:
                raise TimeoutError(f"shard {number} gave no windows within {timeout_s:g} s")
            if self._wanted is not None:
                return self.sample(max(0.0, deadline - time.monotonic()), out)
        out.size = source.items
        return out

    def _begin(self, out: WindowBatch, deadline: float) -> None:
        """Decide how many windows of a batch come from which shard."""
        out.frame_count = 0
        if self._best_first is None:
            while not (masses := self._masses(deadline)).any():
                if time.monotonic() >= deadline:
                    raise TimeoutError("no shard has a window to give")
                time.sleep(0.002)
            shares = masses / masses.sum()
            counts = self._rng.multinomial(self._batch_size, shares)
            self._shares = dict(zip(self._sources, shares.tolist(), strict=True))
        elif len(self._sources) == 1:
            counts = np.array([self._batch_size])
            self._shares = dict.fromkeys(self._sources, 1.0)
        else:
            counts = self._merge(self._best_first, deadline)
            self._shares = dict.fromkeys(self._sources, 1.0)
        self._counts = dict(zip(self._sources, counts.tolist(), strict=True))
        self._out, self._at = out, 0

    def _turn(self, deadline: float) -> float:
        """Seconds to wait for one shard, before another look at whether it lives."""
        return min(max(0.0, deadline - time.monotonic()), _TURN_S)

    def _masses(self, deadline: float) -> np.ndarray:
        """What each shard weighs, float64 (shards,), once those of the beginning have told; 0 of those that are away."""
        while True:
            if self._wanted is not None:
                self._follow()
            masses = np.array([source.mass for source in self._sources.values()], np.float64)
            for source in self._sources.values():
                if source.refused is not None:
                    raise source.refused
            unknown = np.isnan(masses)
            self._untold -= {number for number, nan in zip(self._sources, unknown, strict=True) if not nan}
            if not self._untold or time.monotonic() >= deadline:
                return np.where(unknown, 0.0, masses)
            time.sleep(0.002)

    def _merge(self, sign: float, deadline: float) -> np.ndarray:
        """How many windows each shard gives to a batch of the best keys over all shards; int64 (shards,).

        A shard that has items and has not sent any yet is waited for, and left out when the time is over.
        """
        size = self._batch_size
        self._masses(deadline)
        while True:
            if self._wanted is not None:
                self._follow()
            sources = self._sources.values()
            keys = [source.keys(size, self._turn(deadline) if source.items else 0.0) for source in sources]
            known = np.concatenate(keys)
            enough = 1 if self._afresh else size
            whole = all(len(k) >= enough or not source.items for k, source in zip(keys, sources, strict=True))
            if len(known) >= size and (whole or time.monotonic() >= deadline):
                shard = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
                best = np.argsort(sign * known, kind="stable")[:size]
                return np.bincount(shard[best], minlength=len(keys))
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the shards have {len(known)} windows to give, {size} make a batch")
            time.sleep(0.002)

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        """New priorities, (batch,), of the items of a batch; those that have left the table meanwhile are left out.

        Items of shards that are not drawn from any more are left out as well.

        Raises:
            SchemaError: there are not as many as items, or one is negative or not a finite number.
        """
        values = np.asarray(priorities, np.float64)
        if values.shape != batch.item.shape:
            raise SchemaError(f"expected a priority for each of the {len(batch)} items, received shape {values.shape}")
        values = np.ascontiguousarray(values)
        if not (np.isfinite(values) & (values >= 0.0)).all():
            wrong = int(np.argmin(np.isfinite(values) & (values >= 0.0)))
            raise SchemaError(f"expected priorities that are finite and ≥ 0, received {values[wrong]} at place {wrong}")
        for number, source in self._sources.items():
            mine = batch.shard == number
            if mine.all():
                source.update_priorities(batch.item, values)
                return
            if mine.any():
                source.update_priorities(batch.item[mine], values[mine])

    def close(self) -> None:
        """End; what was drawn ahead is given back."""
        for source in self._sources.values():
            source.close()
        for thread in self._closing:
            thread.join(_CLOSE_S)


def stream_sampler(
    routes: Mapping[int, str] | Sequence[str],
    schema: StepSchema,
    *,
    batch_size: int,
    seed: int,
    security: Security,
    window: Window | None = None,
    table: TableSpec | None = None,
    prefetch: int = 8,
    transport: Transport = "auto",
) -> Sampler:
    """A sampler over the shards at these Flight addresses: by number, or in the order of their numbers, from 0 on.

    prefetch: batches drawn ahead, over all shards that there are when one is connected to.
    """
    addresses = dict(routes if isinstance(routes, Mapping) else enumerate(routes))
    window, table = window or Window(), table or TableSpec()
    afresh = _is_served_afresh(table)

    def make(number: int, address: str, shards: int) -> Source:
        least = -(-batch_size // shards)
        block = max(1, prefetch // 4) * least
        if afresh:
            least = block = batch_size
        return StreamSource(
            address,
            schema,
            window=window,
            security=security,
            index=number,
            table=table.name,
            least=1 if table.max_times_sampled else least,  # the last few items count as well
            block=block,
            # A shard that holds nearly all the mass gives whole batches, of which all but one window may be there already.
            ahead=max(prefetch * least, block + least, batch_size + least),
            afresh=afresh,
            transport=transport,
        )

    return Sampler(
        {number: make(number, address, len(addresses)) for number, address in addresses.items()},
        schema,
        window=window,
        batch_size=batch_size,
        seed=seed,
        table=table,
        routes=addresses,
        make=make,
    )
