"""How learners read from the replay service: batches over all shards of a table.

A table over several shards is read as one. Where items are drawn at random, each batch takes from each shard a number of
windows drawn in proportion to the shards' masses (their item counts, or the sums of their priorities); where they are served
in order, it takes those of the best keys. The shards have drawn ahead, in blocks of many batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .buffers import buffers
from .layout import TableSpec
from .schema import SchemaError, StepSchema, Window, WindowBatch
from .security import Security
from .shard import Shard
from .streams import StreamSource, Transport

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

    def __init__(self, shard: Shard, *, window: Window, table: str = "steps") -> None:
        self._shard = shard
        self._table = shard.table(table)
        self._window = window

    @property
    def mass(self) -> float:
        return self._table.mass

    @property
    def items(self) -> int:
        return self._table.items

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


class Sampler:
    """Draws batches of windows over all shards of a table."""

    def __init__(
        self,
        sources: Sequence[Source],
        schema: StepSchema,
        *,
        window: Window,
        batch_size: int,
        seed: int,
        table: TableSpec | None = None,
    ) -> None:
        """`table`: its selector decides how the shards' draws are put together; None: at random."""
        self._sources = list(sources)
        self._schema = schema
        self._window = window
        self._batch_size = batch_size
        table = table or TableSpec()
        self._best_first = BEST_FIRST.get(table.selector)
        self._afresh = _is_served_afresh(table)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._out: WindowBatch | None = None  # of the batch begun
        self._counts = np.zeros(len(sources), np.int64)  # windows still to come from each shard for it
        self._shares = np.ones(len(sources))
        self._at = 0

    def buffers(self) -> WindowBatch:
        """Room for a batch, to be passed to `sample` again and again."""
        return buffers(self._schema, self._window, self._batch_size)

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
        """The next batch, in `out` or in arrays of its own.

        A batch that was begun when the time was over is gone on with by the next call, in the arrays it was begun in.

        Raises:
            TimeoutError: the shards had no windows to give, or were not allowed to, within `timeout_s`.
        """
        if len(self._sources) == 1 and self._best_first is None:
            return self._sample_one(self.buffers() if out is None else out, timeout_s)
        deadline = time.monotonic() + timeout_s
        if self._out is None:
            self._begin(self.buffers() if out is None else out, deadline)
        batch = self._out
        assert batch is not None
        for index, source in enumerate(self._sources):
            if (count := int(self._counts[index])) == 0:
                continue
            while not source.take(count, batch, self._at, self._turn(deadline)):
                left = deadline - time.monotonic()
                if source.mass == 0:  # the shard is lost, or has nothing left: begin the batch again from the others
                    self._out = None
                    if len(self._sources) > 1 and left > 0:
                        return self.sample(left, batch)
                if left <= 0:
                    raise TimeoutError(f"shard {index} gave no windows within {timeout_s:g} s")
            if len(self._sources) > 1:
                batch.probability[self._at : self._at + count] *= self._shares[index]
            self._at += count
            self._counts[index] = 0
        batch.size = sum(source.items for source in self._sources)
        if self._best_first is not None:
            for source in self._sources:
                source.skip()
        self._out = None
        return batch

    def _sample_one(self, out: WindowBatch, timeout_s: float) -> WindowBatch:
        """The next batch of the only shard, at random: the way that has to be short."""
        source = self._sources[0]
        out.frame_count = 0
        if not source.take(self._batch_size, out, 0, timeout_s):
            raise TimeoutError(f"shard 0 gave no windows within {timeout_s:g} s")
        out.size = source.items
        return out

    def _begin(self, out: WindowBatch, deadline: float) -> None:
        """Decide how many windows of a batch come from which shard."""
        out.frame_count = 0
        if len(self._sources) == 1:
            self._counts[0] = self._batch_size
        elif self._best_first is None:
            while not (masses := self._masses(deadline)).any():
                if time.monotonic() >= deadline:
                    raise TimeoutError("no shard has a window to give")
                time.sleep(0.002)
            self._shares = masses / masses.sum()
            self._counts = self._rng.multinomial(self._batch_size, self._shares)
        else:
            self._counts = self._merge(self._best_first, deadline)
        self._out, self._at = out, 0

    def _turn(self, deadline: float) -> float:
        """Seconds to wait for one shard, before another look at whether it lives."""
        left = max(0.0, deadline - time.monotonic())
        return left if len(self._sources) == 1 else min(left, _TURN_S)

    def _masses(self, deadline: float) -> np.ndarray:
        """What each shard weighs, float64 (shards,), once each has told; 0 of those that are away."""
        while True:
            masses = np.array([source.mass for source in self._sources], np.float64)
            for source in self._sources:
                if source.refused is not None:
                    raise source.refused
            unknown = np.isnan(masses)
            if not unknown.any() or time.monotonic() >= deadline:
                return np.where(unknown, 0.0, masses)
            time.sleep(0.002)

    def _merge(self, sign: float, deadline: float) -> np.ndarray:
        """How many windows each shard gives to a batch of the best keys over all shards; int64 (shards,).

        A shard that has items and has not sent any yet is waited for, and left out when the time is over.
        """
        size = self._batch_size
        self._masses(deadline)
        while True:
            keys = [source.keys(size, self._turn(deadline) if source.items else 0.0) for source in self._sources]
            known = np.concatenate(keys)
            enough = 1 if self._afresh else size
            whole = all(len(k) >= enough or not source.items for k, source in zip(keys, self._sources, strict=True))
            if len(known) >= size and (whole or time.monotonic() >= deadline):
                shard = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
                best = np.argsort(sign * known, kind="stable")[:size]
                return np.bincount(shard[best], minlength=len(keys))
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the shards have {len(known)} windows to give, {size} make a batch")
            time.sleep(0.002)

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        """New priorities, (batch,), of the items of a batch; those that have left the table meanwhile are left out.

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
        if len(self._sources) == 1:
            self._sources[0].update_priorities(batch.item, values)
            return
        for index, source in enumerate(self._sources):
            mine = batch.shard == index
            if mine.any():
                source.update_priorities(batch.item[mine], values[mine])

    def close(self) -> None:
        for source in self._sources:
            source.close()


def stream_sampler(
    addresses: Sequence[str],
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
    """A sampler over the shards at these Flight addresses.

    prefetch: batches drawn ahead, over all shards.
    """
    window, table = window or Window(), table or TableSpec()
    least = -(-batch_size // len(addresses))
    block = max(1, prefetch // 4) * least
    afresh = _is_served_afresh(table)
    if afresh:
        least = block = batch_size
    sources = [
        StreamSource(
            address,
            schema,
            window=window,
            security=security,
            index=index,
            table=table.name,
            least=1 if table.max_times_sampled else least,  # the last few items count as well
            block=block,
            # A shard that holds nearly all the mass gives whole batches, of which all but one window may be there already.
            ahead=max(prefetch * least, block + least, batch_size + least),
            afresh=afresh,
            transport=transport,
        )
        for index, address in enumerate(addresses)
    ]
    return Sampler(sources, schema, window=window, batch_size=batch_size, seed=seed, table=table)
