"""Which items of a table are served next, or removed next: the selectors of one table on one shard.

A selector works on row numbers, under the shard's lock. Whether a row is an item says the table's bit of the row's
flag, which the shard owns; the keys of items are the selector's, one leaf per row in memory that the shard gives it.

The table sets or clears the flag bits first, then calls `add` or `remove`, then sets `items`, their number. After a crash in
between, `rebuild` finds what fell out of step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .kernels import kernel
from .trees import MOST, SumTree, TournamentTree

SELECTORS = ("uniform", "prioritised", "fifo", "lifo", "max_heap", "min_heap")
FIRST_PRIORITY = 1.0  # of an item whose priority a crash lost, where no other item has one
_RARE = 32  # rows per item beyond which items may be listed and not guessed at
_LIST_SHARE = 8  # rows that are listed in the time of one guess
_ROUNDS = 64  # of guessing; each ends the draw with a probability above one half
_BLOCK = 64  # rows that a listing looks at together
_LEAST = float(np.finfo(np.float64).tiny)  # leaf of a priority above 0 at least: what may be drawn is no empty leaf


@dataclass(frozen=True, slots=True)
class Drawn:
    """Items drawn from one table of one shard."""

    rows: np.ndarray  # int64 (n,)
    probability: np.ndarray  # float64 (n,), inside this shard; 1 from an ordered selector
    key: np.ndarray | None  # float64 (n,), from an ordered selector: what draws of several shards are merged by


class Selector(Protocol):
    """Keeps the items of one table on one shard, and picks among them.

    Rows are int64 (n,). Raises ValueError for keys that do not fit, before anything is changed.
    """

    @property
    def ordered(self) -> bool:
        """Items are served by key, best first, and not at random."""

    @property
    def largest_first(self) -> bool:
        """Of an ordered selector: the largest key is the best."""

    @property
    def by_age(self) -> bool:
        """Keys are ages."""

    @property
    def by_priority(self) -> bool:
        """Keys are priorities."""

    items: int  # the table counts them, and tells after each change

    @property
    def mass(self) -> float:
        """The shard's weight in a draw over shards: the sum of p^alpha where prioritised, else the number of items."""

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        """New items, their flag bits set already.

        rows: distinct, and no items before. keys: float64 (n,): the age in microseconds since the epoch, strictly
        increasing, for `fifo` and `lifo`; the priority (>= 0) for the heaps and `prioritised`; `uniform` ignores them.
        """

    def update(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        """New priorities, float64 (n,). Rows that are no items are left out; of a row given twice the last one holds."""

    def remove(self, rows: np.ndarray) -> None:
        """Rows that are no items any more, or never were."""

    def draw(self, rng: np.random.Generator, count: int) -> Drawn:
        """`count` items; none when nothing can be drawn.

        At random: independently, with replacement. Ordered: the best ones, from the start again when all were served.
        """

    def victims(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Up to `count` distinct items in the order in which the selector would have them removed; int64 (m,).

        Fewer than `count` only where the table has fewer items.
        """

    def priorities(self, rows: np.ndarray) -> np.ndarray:
        """The priorities (or ages) of items as they were given; float64 (n,)."""

    def rebuild(self) -> None:
        """Fit the selector to flags and leaves that a crashed shard has left.

        Rows without the flag bit lose their key; items without one get the largest priority of all, or an age after
        all others.
        """


def check_priorities(priorities: np.ndarray) -> None:
    """Refuse what is no priority.

    Raises:
        ValueError: one of them is NaN, infinite or negative.
    """
    good = np.isfinite(priorities) & (priorities >= 0.0)
    if not good.all():
        k = int(np.argmin(good))
        raise ValueError(
            f"priority {priorities[k]} at position {k} of {len(priorities)}: expected a finite number >= 0; "
            "no priority was changed"
        )


@kernel
def _count(flags: Any, bit: int, begin: int, end: int) -> int:
    found = 0
    for flag in flags[begin:end]:
        found += (flag & bit) != 0
    return found


@kernel
def _listed(flags: Any, bit: int, bound: int, most: int) -> Any:
    """Up to `most` rows below `bound` that have the bit."""
    rows = np.empty(most, np.int64)
    found = 0
    for begin in range(0, bound, _BLOCK):
        union = np.uint8(0)
        for flag in flags[begin : min(begin + _BLOCK, bound)]:
            union |= flag
        if union & bit:
            for row in range(begin, min(begin + _BLOCK, bound)):
                if flags[row] & bit and found < most:
                    rows[found] = row
                    found += 1
    return rows[:found]


@kernel
def _accept(flags: Any, bit: int, bound: int, uniforms: Any, rows: Any, found: int) -> int:
    """Guess rows below `bound` and append those that have the bit to rows[:found]. Returns how many there are then."""
    for k in range(len(uniforms)):
        if found == len(rows):
            break
        row = np.int64(uniforms[k] * bound)
        rows[found] = row
        found += (flags[row] & bit) != 0
    return found


@kernel
def _powers(priorities: Any, exponent: float, lowest: float, highest: float) -> Any:
    """Leaves of priorities. Priority 0 is −0: no mass, but not the +0 of an empty leaf."""
    leaves = np.empty(len(priorities))
    for k in range(len(priorities)):
        p = priorities[k]
        if p == 0.0:
            leaves[k] = -0.0
        else:
            leaves[k] = min(max(p if exponent == 1.0 else p**exponent, lowest), highest)
    return leaves


class _Items:
    """The rows of a table's items as the flags have them, and their number."""

    ordered = False
    largest_first = False
    by_age = False
    by_priority = False

    def __init__(self, flags: np.ndarray, bit: int, rows_bound: Callable[[], int]) -> None:
        self._flags = flags
        self._bit = bit
        self._rows_bound = rows_bound
        self.items = _count(flags, bit, 0, len(flags))

    @property
    def mass(self) -> float:
        return float(self.items)

    def _among(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which rows are items."""
        found: np.ndarray = (self._flags[rows] & self._bit) != 0
        return found

    def _all(self) -> np.ndarray:
        """The rows of all items, in ascending order."""
        rows: np.ndarray = _listed(self._flags, self._bit, self._rows_bound(), self.items)
        if len(rows) != self.items:
            raise self._out_of_step()
        return rows

    def _out_of_step(self) -> RuntimeError:
        found = _count(self._flags, self._bit, 0, len(self._flags))
        return RuntimeError(
            f"the selector counts {self.items} items, the flags show {found} below row {len(self._flags)} with rows in use "
            f"up to {self._rows_bound()}: flags were changed without the selector; call rebuild()"
        )


class Uniform(_Items):
    """Every item alike. Keeps no keys: rows are guessed, and those that are no items thrown away."""

    def __init__(self, flags: np.ndarray, bit: int, rows_bound: Callable[[], int]) -> None:
        super().__init__(flags, bit, rows_bound)
        self._rare: np.ndarray | None = None  # all items, listed since the last change
        self._guessed = 0.0  # rows guessed at since the last change, where items are rare

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        self._changed()

    def update(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        pass

    def remove(self, rows: np.ndarray) -> None:
        self._changed()

    def draw(self, rng: np.random.Generator, count: int) -> Drawn:
        if not self.items:
            return _nothing()
        return Drawn(self._draw(rng, count), np.full(count, 1.0 / self.items), None)

    def victims(self, rng: np.random.Generator, count: int) -> np.ndarray:
        count = min(count, self.items)
        if 2 * count >= self.items or self.items * _RARE < self._rows_bound():
            chosen: np.ndarray = rng.choice(self._all(), count, replace=False)
            return chosen
        rows = _distinct(self._draw(rng, count))
        while len(rows) < count:
            rows = _distinct(np.concatenate([rows, self._draw(rng, count)]))
        return rows[:count]

    def priorities(self, rows: np.ndarray) -> np.ndarray:
        return np.full(len(rows), FIRST_PRIORITY)

    def rebuild(self) -> None:
        self.items = _count(self._flags, self._bit, 0, len(self._flags))
        self._changed()

    def _changed(self) -> None:
        self._rare = None
        self._guessed = 0.0

    def _draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        bound = self._rows_bound()
        if self.items * _RARE < bound:
            # Guess until that has cost as much as a list, which the next change makes worthless.
            self._guessed += count * bound / self.items
            if self._rare is None and self._guessed * _LIST_SHARE > bound:
                self._rare = self._all()
            if self._rare is not None:
                listed: np.ndarray = self._rare[rng.integers(0, self.items, size=count)]
                return listed
        rows = np.empty(count, np.int64)
        found, share = 0, self.items / bound
        for _ in range(_ROUNDS):
            wanted = count - found
            guesses = math.ceil((wanted + 4.0 * math.sqrt(wanted * max(0.0, 1.0 - share))) / share)
            found = _accept(self._flags, self._bit, bound, rng.random(guesses), rows, found)
            if found == count:
                return rows
        raise self._out_of_step()


class Prioritised(_Items):
    """In proportion to p^alpha (Schaul et al. 2016, arXiv 1511.05952, section 3.3), p being an item's priority.

    An item of priority 0 is never drawn, whatever alpha. p^alpha is held within 2e-308…1e290, so that what is above 0
    can be drawn and no sum overflows.
    """

    def __init__(
        self, flags: np.ndarray, bit: int, rows_bound: Callable[[], int], *, leaves: np.ndarray, exponent: float
    ) -> None:
        if not 0.0 <= exponent < math.inf:
            raise ValueError(f"the priority exponent is {exponent}; expected a finite number >= 0")
        super().__init__(flags, bit, rows_bound)
        self.by_priority = True
        self._exponent = exponent
        self._leaves = leaves
        self._fit()
        self._tree = SumTree(leaves)

    @property
    def mass(self) -> float:
        return self._tree.total

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        self._tree.set(rows, self._powers(keys))

    def update(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        leaves = self._powers(priorities)
        among = self._among(rows)
        if among.all():
            self._tree.set(rows, leaves)
        else:
            self._tree.set(rows[among], leaves[among])

    def remove(self, rows: np.ndarray) -> None:
        self._tree.set(rows, np.zeros(len(rows)))

    def draw(self, rng: np.random.Generator, count: int) -> Drawn:
        total = self._tree.total
        if not total > 0.0:
            return _nothing()
        rows = self._tree.draw(rng.random(count))
        return Drawn(rows, self._leaves[rows] / total, None)

    def victims(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Drawn one after the other without replacement, in proportion to p^alpha; those of priority 0 come last."""
        count = min(count, self.items)
        rows = np.empty(0, np.int64)
        if self._tree.total > 0.0:
            # The first occurrences in draws with replacement are draws without.
            for _ in range(4):
                if len(rows) < count:
                    rows = _distinct(np.concatenate([rows, self._tree.draw(rng.random(2 * count))]))
        if len(rows) < count:  # few items hold nearly all the mass: rank all others at once
            left = np.setdiff1d(self._all(), rows, assume_unique=True)
            weights = self._leaves[left]
            drawable, never = left[weights > 0.0], left[weights == 0.0]
            # The largest log w + Gumbel noise in order are successive draws in proportion to w.
            ranks = np.log(self._leaves[drawable]) + rng.gumbel(size=len(drawable))
            rows = np.concatenate([rows, drawable[np.argsort(-ranks)], rng.permutation(never)])
        return rows[:count]

    def priorities(self, rows: np.ndarray) -> np.ndarray:
        """As given, to within rounding; 1 for all that are above 0 where the exponent is 0."""
        leaves: np.ndarray = np.abs(self._leaves[rows])
        return leaves if self._exponent in (0.0, 1.0) else leaves ** (1.0 / self._exponent)

    def rebuild(self) -> None:
        self.items = _count(self._flags, self._bit, 0, len(self._flags))
        self._fit()
        self._tree.rebuild()

    def _fit(self) -> None:
        leaves, items = self._leaves, (self._flags & self._bit) != 0
        keyed = (leaves > 0.0) & (leaves <= MOST) | (leaves == 0.0) & np.signbit(leaves)
        largest = leaves.max(where=items & keyed, initial=0.0)
        leaves[~items] = 0.0
        leaves[items & ~keyed] = largest if largest > 0.0 else FIRST_PRIORITY

    def _powers(self, priorities: np.ndarray) -> np.ndarray:
        priorities = np.ascontiguousarray(priorities, np.float64)
        check_priorities(priorities)
        leaves: np.ndarray = _powers(priorities, self._exponent, _LEAST, MOST)
        return leaves


class Ordered(_Items):
    """By key, best first, the lower row first among equals: by age (`fifo`, `lifo`) or by priority (the heaps)."""

    ordered = True

    def __init__(
        self,
        flags: np.ndarray,
        bit: int,
        rows_bound: Callable[[], int],
        *,
        leaves: np.ndarray,
        by_age: bool,
        largest_first: bool,
    ) -> None:
        super().__init__(flags, bit, rows_bound)
        self.largest_first = largest_first
        self.by_age = by_age
        self.by_priority = not by_age
        self._leaves = leaves
        self._empty = -math.inf if largest_first else math.inf
        self._fit()
        self._tree = TournamentTree(leaves, best="max" if largest_first else "min")

    def add(self, rows: np.ndarray, keys: np.ndarray) -> None:
        check_priorities(keys)
        self._tree.set(rows, keys)

    def update(self, rows: np.ndarray, priorities: np.ndarray) -> None:
        if self.by_age:
            return
        check_priorities(priorities)
        among = self._among(rows)
        self._tree.set(rows[among], priorities[among])

    def remove(self, rows: np.ndarray) -> None:
        self._tree.set(rows, np.full(len(rows), self._empty))

    def draw(self, rng: np.random.Generator, count: int) -> Drawn:
        best = self._tree.best(count)
        if not len(best):
            return _nothing(ordered=True)
        rows = best if len(best) == count else np.resize(best, count)
        return Drawn(rows, np.ones(count), self._leaves[rows])

    def victims(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return self._tree.best(count)

    def priorities(self, rows: np.ndarray) -> np.ndarray:
        keys: np.ndarray = self._leaves[rows]
        return keys

    def rebuild(self) -> None:
        self.items = _count(self._flags, self._bit, 0, len(self._flags))
        self._fit()
        self._tree.rebuild()

    def _fit(self) -> None:
        leaves, items = self._leaves, (self._flags & self._bit) != 0
        keyed = np.isfinite(leaves) & (leaves >= 0.0)
        known = items & keyed
        lost = np.flatnonzero(items & ~keyed)
        largest = leaves.max(where=known, initial=0.0)
        leaves[~items] = self._empty
        if self.by_age:
            leaves[lost] = largest + 1.0 + np.arange(len(lost))
        else:
            leaves[lost] = largest if known.any() else FIRST_PRIORITY


def make_selector(
    name: str,
    *,
    flags: np.ndarray,
    bit: int,
    rows_bound: Callable[[], int],
    leaves: np.ndarray | None = None,
    exponent: float = 1.0,
) -> Selector:
    """The selector of one table, fitted to the flags and leaves as they are (`Selector.rebuild`).

    name: one of SELECTORS. flags: uint8 (rows,). bit: the table's mask. rows_bound: rows below it may be items.
    leaves: float64 (rows,), where the keys lie, zeros at first; not for `uniform`. exponent: alpha of `prioritised`.

    Raises:
        ValueError: an unknown name, or a setting that does not fit.
    """
    if name not in SELECTORS:
        raise ValueError(f"selector is {name!r}; expected one of {', '.join(SELECTORS)}")
    if flags.dtype != np.uint8 or flags.ndim != 1 or not 0 < bit < 256:
        raise ValueError(
            f"flags are {flags.dtype} {flags.shape}, the bit {bit}; expected uint8 (rows,) and a mask of it"
        )
    if name == "uniform":
        return Uniform(flags, bit, rows_bound)
    if leaves is None or leaves.shape != flags.shape:
        shape = None if leaves is None else leaves.shape
        raise ValueError(f"selector {name} got leaves of shape {shape}; expected one for each of {len(flags)} rows")
    if name == "prioritised":
        return Prioritised(flags, bit, rows_bound, leaves=leaves, exponent=exponent)
    return Ordered(
        flags,
        bit,
        rows_bound,
        leaves=leaves,
        by_age=name in ("fifo", "lifo"),
        largest_first=name in ("lifo", "max_heap"),
    )


def _nothing(*, ordered: bool = False) -> Drawn:
    return Drawn(np.empty(0, np.int64), np.empty(0), np.empty(0) if ordered else None)


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Each row once, in the order of the first occurrences."""
    _, first = np.unique(rows, return_index=True)
    distinct: np.ndarray = rows[np.sort(first)]
    return distinct
