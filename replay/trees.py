"""Wide trees over the rows of a shard: a sum tree for draws in proportion, a tournament tree for the best in order.

Both have one leaf per row number, in memory that the caller owns (a mapped file: the leaves outlive the process), and
inner nodes in ordinary memory, which `rebuild` computes from the leaves. An inner node is always computed from all its
children and never by adding a difference, so that rounding errors do not pile up over the tree's life.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numba import njit

from .kernels import kernel

SHIFT = 3
BRANCHING = 1 << SHIFT  # eight float64 are a cache line; over 1 M leaves faster than 16, though two levels deeper
MOST = 1e290  # the largest leaf of a sum tree: no sum over any number of rows overflows
_LARGEST = np.finfo(np.float64).max

_SUM, _MAX, _MIN = range(3)


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a kernel, copied to where it is used: a call would cost more than the work on one node."""
    part: Callable[..., Any] = njit(nogil=True, inline="always")(function)
    return part


@_inlined
def _combined(values: Any, begin: int, end: int, kind: int) -> float:
    """What a parent holds of its children, `values[begin:end]`."""
    if kind == _SUM:
        if end - begin == BRANCHING:
            even, odd = 0.0, 0.0
            for k in range(0, BRANCHING, 2):
                even += values[begin + k]
                odd += values[begin + k + 1]
            return even + odd
        total = 0.0
        for k in range(begin, end):
            total += values[k]
        return total
    best = values[begin]
    for k in range(begin + 1, end):
        if values[k] > best if kind == _MAX else values[k] < best:
            best = values[k]
    return best  # type: ignore[no-any-return]


@_inlined
def _compute(leaves: Any, inner: Any, starts: Any, kind: int, level: int, node: int) -> None:
    if level == 0:
        begin = node << SHIFT
        inner[starts[0] + node] = _combined(leaves, begin, min(begin + BRANCHING, len(leaves)), kind)
    else:
        begin = starts[level - 1] + (node << SHIFT)
        inner[starts[level] + node] = _combined(inner, begin, begin + BRANCHING, kind)


@kernel
def _compute_span(leaves: Any, inner: Any, starts: Any, kind: int, begin: int, end: int) -> None:
    """Compute every inner node above the leaves [begin, end)."""
    first, last = begin, end - 1
    for level in range(len(starts)):
        first >>= SHIFT
        last >>= SHIFT
        for node in range(first, last + 1):
            _compute(leaves, inner, starts, kind, level, node)


@kernel
def _set(leaves: Any, inner: Any, starts: Any, kind: int, rows: Any, values: Any, lowest: float, highest: float) -> int:
    """Set leaves and compute what lies above them. Returns −1, or the first position that does not fit: nothing set."""
    count = len(rows)
    for k in range(count):
        if not (0 <= rows[k] < len(leaves) and lowest <= values[k] <= highest):
            return k
    nodes = np.empty(count, np.int64)
    for k in range(count):
        leaves[rows[k]] = values[k]
        nodes[k] = rows[k]
    # Level by level, so that each node is computed after all its children. Neighbours mostly share their parent.
    for level in range(len(starts)):
        kept, last = 0, -1
        for k in range(count):
            node = nodes[k] >> SHIFT
            if node != last:
                nodes[kept] = node
                kept += 1
                last = node
        count = kept
        for k in range(count):
            _compute(leaves, inner, starts, kind, level, nodes[k])
    return -1


@kernel
def _child(values: Any, begin: int, end: int, target: float) -> int:
    """The child, in values[begin:end], in whose span of the running sum `target` lies.

    The first child that takes the running sum above the target: that child is above 0, whatever the rounding. Where
    the target lies behind them all (the parent was summed in another order, to a rounding error more), the last above 0.
    """
    running, last = 0.0, begin
    for child in range(begin, end):
        if values[child] > 0.0:
            last = child
            running += values[child]
            if running > target:
                break
    return last


@kernel
def _draw(leaves: Any, inner: Any, starts: Any, uniforms: Any) -> Any:
    count = len(uniforms)
    nodes = np.zeros(count, np.int64)
    targets = uniforms * inner[starts[-1]]
    # All draws go down one level before the next: their cache misses overlap. The loops over children are those of
    # `_child` without a branch, so that they unroll.
    for level in range(len(starts) - 2, -1, -1):
        start = starts[level]
        for k in range(count):
            begin = start + (nodes[k] << SHIFT)
            target = targets[k]
            passed, running, before = 0, 0.0, 0.0
            for child in range(BRANCHING):
                running += inner[begin + child]
                if running <= target:
                    passed += 1
                    before = running
            if passed == BRANCHING:
                passed = _child(inner, begin, begin + BRANCHING, target) - begin
            nodes[k] = begin - start + passed
            targets[k] = target - before
    for k in range(count):
        begin = nodes[k] << SHIFT
        passed, running = BRANCHING, 0.0
        if begin + BRANCHING <= len(leaves):
            passed = 0
            for child in range(BRANCHING):
                running += leaves[begin + child]
                passed += running <= targets[k]
        if passed == BRANCHING:
            nodes[k] = _child(leaves, begin, min(begin + BRANCHING, len(leaves)), targets[k])
        else:
            nodes[k] = begin + passed
    return nodes


@kernel
def _ahead(key: float, first: int, other_key: float, other_first: int) -> bool:
    return key > other_key or (key == other_key and first < other_first)


@kernel
def _push(keys: Any, firsts: Any, levels: Any, size: int, key: float, first: int, level: int) -> None:
    hole = size
    while hole > 0:
        parent = (hole - 1) >> 1
        if not _ahead(key, first, keys[parent], firsts[parent]):
            break
        keys[hole], firsts[hole], levels[hole] = keys[parent], firsts[parent], levels[parent]
        hole = parent
    keys[hole], firsts[hole], levels[hole] = key, first, level


@kernel
def _pop(keys: Any, firsts: Any, levels: Any, size: int) -> None:
    """Take the top off a heap of `size`."""
    size -= 1
    key, first, level = keys[size], firsts[size], levels[size]
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= size:
            break
        if child + 1 < size and _ahead(keys[child + 1], firsts[child + 1], keys[child], firsts[child]):
            child += 1
        if not _ahead(keys[child], firsts[child], key, first):
            break
        keys[hole], firsts[hole], levels[hole] = keys[child], firsts[child], levels[child]
        hole = child
    keys[hole], firsts[hole], levels[hole] = key, first, level


@kernel
def _best(leaves: Any, inner: Any, starts: Any, sign: float, count: int) -> Any:
    """The `count` best leaves by search from the root, best node first; the tree is only read.

    The heap holds nodes whose spans of leaves are disjoint, ordered by (key, first row of the span): a node is opened
    before a leaf of the same key that lies behind it.
    """
    rows = np.empty(min(count, len(leaves)), np.int64)
    # A pop replaces one entry by at most BRANCHING, and a leaf takes at most one pop per level.
    room = min(len(rows) * len(starts) * (BRANCHING - 1), len(leaves) + len(inner)) + BRANCHING
    keys, firsts, levels = np.empty(room), np.empty(room, np.int64), np.empty(room, np.int64)
    found, size = 0, 0
    if sign * inner[starts[-1]] > -np.inf:
        _push(keys, firsts, levels, 0, sign * inner[starts[-1]], 0, len(starts))
        size = 1
    while size > 0 and found < len(rows):
        first, level = firsts[0], levels[0]
        _pop(keys, firsts, levels, size)
        size -= 1
        if level == 0:
            rows[found] = first
            found += 1
            continue
        level -= 1
        node = first >> (SHIFT * level)
        if level == 0:
            for row in range(node, min(node + BRANCHING, len(leaves))):
                if sign * leaves[row] > -np.inf:
                    _push(keys, firsts, levels, size, sign * leaves[row], row, 0)
                    size += 1
        else:
            for child in range(node, node + BRANCHING):
                key = sign * inner[starts[level - 1] + child]
                if key > -np.inf:
                    _push(keys, firsts, levels, size, key, child << (SHIFT * level), level)
                    size += 1
    return rows[:found]


class _Tree:
    """Leaves, and the inner nodes above them: level by level in one array, each level padded to whole cache lines."""

    def __init__(self, leaves: np.ndarray, *, kind: int, empty: float, lowest: float, highest: float) -> None:
        if leaves.dtype != np.float64 or leaves.ndim != 1 or not len(leaves) or not leaves.flags.c_contiguous:
            raise ValueError(
                f"leaves are {leaves.dtype} {leaves.shape}; expected contiguous float64 (size,) with a size of 1 or more"
            )
        if not leaves.flags.writeable:
            raise ValueError("leaves cannot be written; map the file for reading and writing")
        self.leaves = leaves
        self.empty = empty
        self._kind = kind
        self._lowest, self._highest = lowest, highest
        starts: list[int] = []
        width, position = len(leaves), 0
        while not starts or width > 1:
            width = -(-width // BRANCHING)
            starts.append(position)
            position += -(-width // BRANCHING) * BRANCHING
        self._starts = np.array(starts, np.int64)
        self._inner = np.full(position, empty)
        self.rebuild()

    def set(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set leaves.

        rows: int64 (n,), of a row given twice the last value holds; values: float64 (n,), `empty` allowed.

        Raises:
            ValueError: a row or a value is out of range; no leaf was changed.
        """
        rows = np.ascontiguousarray(rows, np.int64)
        values = np.ascontiguousarray(values, np.float64)
        if rows.shape != values.shape or rows.ndim != 1:
            raise ValueError(f"{values.shape} values came for {rows.shape} rows; expected one for each row")
        bad = _set(self.leaves, self._inner, self._starts, self._kind, rows, values, self._lowest, self._highest)
        if bad >= 0:
            raise ValueError(
                f"row {rows[bad]} with value {values[bad]} at position {bad}: expected a row in 0…{len(self.leaves) - 1} "
                f"and a value in {self._lowest:g}…{self._highest:g}"
            )

    def clear(self, begin: int, end: int) -> None:
        """Empty the leaves [begin, end).

        Raises:
            ValueError: not a span of leaves.
        """
        if not 0 <= begin <= end <= len(self.leaves):
            raise ValueError(f"[{begin}, {end}) is no span of the {len(self.leaves)} leaves")
        if begin < end:
            self.leaves[begin:end] = self.empty
            _compute_span(self.leaves, self._inner, self._starts, self._kind, begin, end)

    def rebuild(self) -> None:
        """Compute the inner nodes after the leaves were changed from outside."""
        _compute_span(self.leaves, self._inner, self._starts, self._kind, 0, len(self.leaves))

    @property
    def _root(self) -> float:
        return float(self._inner[self._starts[-1]])


class SumTree(_Tree):
    """Leaves from 0 to `MOST`, drawn in proportion to their values; an empty leaf is 0."""

    def __init__(self, leaves: np.ndarray) -> None:
        """leaves: float64 (size,), kept and written to; every one a number in 0…MOST, the sign of a zero being free."""
        super().__init__(leaves, kind=_SUM, empty=0.0, lowest=0.0, highest=MOST)

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return self._root

    def draw(self, uniforms: np.ndarray) -> np.ndarray:
        """Rows, each independently, with probability leaf / total; never one whose leaf is 0.

        uniforms: float64 (n,) in [0, 1). Returns int64 (n,).

        Raises:
            ValueError: all leaves are 0.
        """
        if not self.total > 0.0:
            raise ValueError("all leaves are 0: there is nothing to draw")
        rows: np.ndarray = _draw(self.leaves, self._inner, self._starts, np.ascontiguousarray(uniforms, np.float64))
        return rows


class TournamentTree(_Tree):
    """Finite leaves, served in order; an empty leaf is −inf where the largest is best, +inf where the smallest is."""

    def __init__(self, leaves: np.ndarray, *, best: Literal["max", "min"]) -> None:
        """leaves: float64 (size,), kept and written to; every one a finite number or `empty`."""
        if best == "max":
            super().__init__(leaves, kind=_MAX, empty=-np.inf, lowest=-np.inf, highest=_LARGEST)
        elif best == "min":
            super().__init__(leaves, kind=_MIN, empty=np.inf, lowest=-_LARGEST, highest=np.inf)
        else:
            raise ValueError(f"best is {best!r}; expected 'max' or 'min'")
        self._sign = 1.0 if best == "max" else -1.0

    def best(self, count: int) -> np.ndarray:
        """The `count` best rows, best first, the lower row first among equals; fewer where fewer are not empty.

        Returns int64 (min(count, leaves not empty),).
        """
        rows: np.ndarray = _best(self.leaves, self._inner, self._starts, self._sign, max(0, count))
        return rows
