"""A table of one shard: which rows are its items, how they are drawn, and when they leave."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .clock import Clock
from .kernels import LINKED, RECEIVED, SAMPLED
from .layout import TableSpec
from .limiter import Limiter
from .selectors import Drawn, Selector, make_selector
from .storage import SegmentStorage


@dataclass(frozen=True)
class Draw:
    """Items drawn by a shard.

    rows: int64 (n,) row numbers; probability: float64 (n,) inside the shard; key: float64 (n,) or None: what ordered
    selectors (FIFO, LIFO, heaps) go by, in microseconds since the epoch or as priority.
    taken: stamp of the draw, for those who read the rows later without a lock (`replay.gather`).
    """

    rows: np.ndarray
    probability: np.ndarray
    key: np.ndarray | None
    taken: int

    def __len__(self) -> int:
        return len(self.rows)


class Table:
    """Items over the rows of a storage. Not thread-safe: the shard holds a lock, but for `limiter` and `clock`."""

    def __init__(self, spec: TableSpec, index: int, storage: SegmentStorage, limiter: Limiter, seed: int) -> None:
        """`index`: the table's place among those of the storage, which may have been found after a crash."""
        self.spec = spec
        self.limiter = limiter
        self.clock = Clock()
        self.evicted_updates = 0  # priorities that came for items no longer there
        self.leaving = False  # whether nothing is drawn any more, for the shard leaves the service
        self.handed_over = 0  # items that are another shard's now, though their rows are here still
        self.left_out = 0  # items that no other shard had room for
        self.quiet = False  # whether the limiter is told of what is deleted by who changes the table
        self._index = index
        self.bit = np.uint8(2 << index)  # of a row's flags
        self._storage = storage
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
        arrays = storage.arrays
        flags = storage.flags
        untold = storage.untold_rows()
        for name in (f"keys{index}", f"removal_keys{index}"):
            if name in arrays:
                arrays[name][untold] = np.nan  # no key: see `Selector.rebuild`
        self._selector = self._make(spec.selector, arrays.get(f"keys{index}"))
        self._remover: Selector | None = None
        if spec.max_size is not None:
            shared = spec.remover == spec.selector
            self._remover = self._selector if shared else self._make(spec.remover, arrays.get(f"removal_keys{index}"))
        self._times = arrays.get(f"times_sampled{index}")
        if self._times is not None:
            self._times[untold] = 0
        self.items = int(np.count_nonzero(flags & self.bit))
        self._highest = 1.0  # priority of new items: they are drawn soon at least once
        self._age = 0.0
        if self.items:
            self._recover()

    def _make(self, name: str, keys: np.ndarray | None) -> Selector:
        return make_selector(
            name,
            flags=self._storage.flags,
            bit=int(self.bit),
            rows_bound=lambda: self._storage.rows_in_use,
            leaves=keys,
            exponent=self.spec.priority_exponent,
        )

    def _selectors(self) -> list[Selector]:
        two = self._remover is not None and self._remover is not self._selector
        return [self._selector, self._remover] if two and self._remover is not None else [self._selector]

    def _recover(self) -> None:
        rows = np.flatnonzero(self._storage.flags & self.bit)
        for selector in self._selectors():
            selector.rebuild()
            keys = selector.priorities(rows)
            if selector.by_age:
                self._age = max(self._age, float(keys.max(initial=0.0)))
            elif selector.by_priority:
                self._highest = max(self._highest, float(keys.max(initial=0.0)))

    # --------------------------------------------------------------- changing

    def changed(self, gone: np.ndarray, new: np.ndarray) -> None:
        """Rows stopped being items, and rows became items, as `SegmentStorage` tells."""
        removed = gone[gone & int(self.bit) != 0] >> 8
        wanted = new[new & int(self.bit) != 0]
        added = wanted[wanted & LINKED != 0] >> 8  # the others, or frames before them, are gone: deleted at once
        self.items += len(added) - len(removed)
        if deleted := len(removed) + len(wanted) - len(added):
            self._tell_deleted(deleted)
        if len(added) and len(removed):
            # In a small storage a row may have come and gone at once.
            added = added[self._storage.flags[added] & self.bit != 0]
        for selector in self._selectors():
            if len(removed):
                selector.remove(removed)
            if len(added):
                selector.add(added, self._keys(selector, len(added)))
            selector.items = self.items
        if self._times is not None:
            self._times[removed] = 0
            self._times[added] = 0
        if self.spec.max_size is not None and self.items > self.spec.max_size:
            assert self._remover is not None
            self._drop(self._remover.victims(self._rng, self.items - self.spec.max_size))

    def _keys(self, selector: Selector, count: int) -> np.ndarray:
        """Keys of new items: their age, or the highest priority there has been."""
        if not selector.by_age:
            return np.full(count, self._highest)
        first = max(time.time_ns() // 1000, int(self._age) + 1)
        keys = np.arange(first, first + count, dtype=np.float64)
        if selector is [known for known in self._selectors() if known.by_age][-1]:
            self._age = float(keys[-1])
        return keys

    def _drop(self, rows: np.ndarray) -> None:
        """Items leave the table; their rows stay for as long as another table needs them."""
        self._storage.drop(rows, self._index)
        if self._times is not None:
            self._times[rows] = 0
        self.items -= len(rows)
        for selector in self._selectors():
            selector.remove(rows)
            selector.items = self.items
        self._tell_deleted(len(rows))

    def _tell_deleted(self, count: int) -> None:
        if not self.quiet:
            self.limiter.deleted(count)

    def gave(self, items: int) -> None:
        """Another shard has so many of the items now; those of a shard that leaves stay where they are until it ends."""
        self.handed_over += items

    def give_up(self) -> int:
        """What has not been handed over is left out. Returns how many items that are; the limiter is the caller's to tell."""
        self.left_out = self.items - self.handed_over
        return self.left_out

    def update_priorities(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities for rows, int64 (n,), NONE among them for items no longer there; those are counted and left out.

        Raises:
            ValueError: a priority is negative or not a number.
        """
        there = rows >= 0
        there[there] = self._storage.flags[rows[there]] & self.bit != 0
        rows, known = rows[there], priorities[there]
        for selector in self._selectors():
            selector.update(rows, known)
        self._highest = max(self._highest, float(known.max(initial=0.0)))
        self.evicted_updates += len(there) - len(rows)

    # ---------------------------------------------------------------- drawing

    def can_draw(self, least: int) -> bool:
        """Whether `draw` would give `least` items."""
        if self.leaving:
            return False
        if self._times is None or self.items >= least:
            return self.items > 0 and self.mass > 0
        rows = np.flatnonzero(self._storage.flags & self.bit)
        return len(rows) * (self.spec.max_times_sampled or 0) - int(self._times[rows].sum()) >= least

    def draw(self, count: int) -> Draw | None:
        """Draw `count` items with the selector, fewer where they may not be sampled that often; None: nothing to draw."""
        if self.items == 0:
            return None
        drawn = self._selector.draw(self._rng, count)
        if self._times is not None:
            drawn = self._count_times(drawn, count)
        if not len(drawn.rows):
            return None
        draw = Draw(drawn.rows, drawn.probability, drawn.key, self._storage.taken)
        self._storage.state[SAMPLED + self._index] += len(draw)
        return draw

    def _count_times(self, drawn: Drawn, count: int) -> Drawn:
        """A draw without what would be sampled too often, gone on with; items that are used up leave the table."""
        assert self._times is not None
        most = self.spec.max_times_sampled or 0
        kept: list[Drawn] = []
        while len(drawn.rows):
            left = most - self._times[drawn.rows]
            good = _earlier(drawn.rows) < left
            key = None if drawn.key is None else drawn.key[good]
            part = Drawn(drawn.rows[good], drawn.probability[good], key)
            kept.append(part)
            count -= len(part.rows)
            np.add.at(self._times, part.rows, 1)
            rows = np.unique(part.rows)
            used_up = rows[self._times[rows] >= most]
            if len(used_up):
                self._drop(used_up)
            if count == 0 or self.items == 0:
                break
            drawn = self._selector.draw(self._rng, count)
        if not kept:
            return drawn
        keys = [part.key for part in kept if part.key is not None]
        return Drawn(
            np.concatenate([part.rows for part in kept]),
            np.concatenate([part.probability for part in kept]),
            np.concatenate(keys) if keys else None,
        )

    def best_keys(self, count: int) -> np.ndarray:
        """Keys of the next items of an ordered selector, up to `count`; float64 (n,)."""
        drawn = self._selector.draw(self._rng, min(count, self.items))
        return np.empty(0) if drawn.key is None else drawn.key

    def undrawn(self, count: int) -> None:
        """Items were drawn and never used. Where items may be sampled so often only, their draws count all the same."""
        if self._times is None:
            self._storage.state[SAMPLED + self._index] -= count
            self.limiter.give_back("sample", count)

    # ------------------------------------------------------------------ state

    @property
    def mass(self) -> float:
        """What the shard weighs in a draw over all shards: its items, or their priorities' sum."""
        return float(self._selector.mass)

    @property
    def offered(self) -> tuple[float, int]:
        """What readers are told that the shard has: `mass` and `items`; nothing once it leaves."""
        return (0.0, 0) if self.leaving else (self.mass, self.items)

    @property
    def inserted(self) -> int:
        """Items inserted over the table's life, those received from other shards left out."""
        return self._storage.inserted(self._index)

    @property
    def received(self) -> int:
        """Items that shards which have left handed over, over the table's life."""
        return int(self._storage.state[RECEIVED + self._index])

    @property
    def sampled(self) -> int:
        """Items drawn over the table's life, those given back left out."""
        return int(self._storage.state[SAMPLED + self._index])

    def stats(self) -> dict[str, Any]:
        """Counters over the table's life, and seconds per state."""
        return {
            "items": self.items - self.handed_over - self.left_out,
            "inserted": self.inserted,
            "received": self.received,
            "handed_over": self.handed_over,
            "deleted": self.inserted + self.received - self.items + self.left_out,
            "sampled": self.sampled,
            "mass": self.mass,
            "evicted_updates": self.evicted_updates,
            **{f"time/{state}": seconds for state, seconds in self.clock.seconds().items()},
        }

    def copy(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(items bool (n,), priorities float64 (n,) or None, times sampled int32 (n,) or None) of rows."""
        member = self._storage.flags[rows] & self.bit != 0
        priorities = None
        if self._selector.by_priority:
            numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            priorities = np.where(member, self._selector.priorities(numbers), 0.0)
        return member, priorities, None if self._times is None else self._times[rows].copy()

    def restore(
        self, rows: np.ndarray, member: np.ndarray, priorities: np.ndarray | None, times: np.ndarray | None
    ) -> None:
        """Make of rows, int64 (n,), all of which are items, what `copy` told of them."""
        if not member.all():
            self._drop(rows[~member])
            rows = rows[member]
        if priorities is not None and self._selector.by_priority:
            self.update_priorities(rows, priorities[member])
        if times is not None and self._times is not None:
            self._times[rows] = times[member]


def _earlier(rows: np.ndarray) -> np.ndarray:
    """How often each row came before in the array; int64 (n,)."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    found = np.empty(len(rows), np.int64)
    found[order] = np.arange(len(rows)) - np.repeat(begins, np.diff(np.append(begins, len(rows))))
    return found
