"""Snapshots into shards, as many as were saved or another number.

A *chain* is what is left of a lane: segments each of which goes on in the next. Chains are dealt out to the shards whole, so
that windows and episodes stay whole; only one that is longer than a shard's fair share is cut, between two segments, which
costs the transition across the cut. Shards of the same number as were saved get back what they had.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from .columns import check_schema
from .copies import NONE, Restorable, SegmentCopy
from .snapshot import Snapshot, SnapshotError

Counters = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A saved segment that goes to a shard.

    snapshot: which of the saved shards it is from.
    place: its place in `Snapshot.segments`.
    sequence, following: its number and that of its successor there, counted anew.
    """

    snapshot: int
    place: int
    sequence: int
    following: int


class Deal:
    """Who gets what of the saved shards: the same on every shard that works it out."""

    def __init__(self, snapshots: Sequence[Snapshot], count: int) -> None:
        """`count`: shards to restore onto."""
        if count < 1 or not snapshots:
            raise ValueError(f"expected at least one snapshot and one shard; received {len(snapshots)} and {count}")
        self._snapshots = list(snapshots)
        self.count = count
        self._rows = [s.segments.column("rows").to_numpy() for s in snapshots]

    @cached_property
    def parts(self) -> list[list[Part]]:
        """The segments of each shard, oldest first."""
        total = sum(int(rows.sum()) for rows in self._rows)
        identity = self.count == len(self._snapshots)
        fair = math.inf if identity else max(1, -(-total // self.count))
        chains = [
            (saved, piece)
            for saved in range(len(self._snapshots))
            for chain in chains_of(self._snapshots[saved])
            for piece in _cut(chain, self._rows[saved], fair)
        ]
        size = [int(self._rows[saved][chain].sum()) for saved, chain in chains]
        held = np.zeros(self.count, np.int64)
        given: list[list[tuple[int, list[int]]]] = [[] for _ in range(self.count)]
        for number in sorted(range(len(chains)), key=lambda n: -size[n]):  # the longest first, each to the emptiest
            shard = chains[number][0] if identity else int(held.argmin())
            held[shard] += size[number]
            given[shard].append(chains[number])
        return [self._ordered(chains) for chains in given]

    def _ordered(self, chains: Sequence[tuple[int, list[int]]]) -> list[Part]:
        # Shards have no clock in common: how far into its shard's life a segment was taken stands for its age.
        age = {(saved, p): (p + 1) / len(self._rows[saved]) for saved, chain in chains for p in chain}
        order = sorted(age, key=lambda key: (age[key], key))
        number = {key: n for n, key in enumerate(order)}
        following = {(saved, p): number[saved, q] for saved, chain in chains for p, q in pairwise(chain)}
        return [Part(*key, sequence=number[key], following=following.get(key, NONE)) for key in order]

    def header(self, index: int) -> dict[str, Any]:
        """The header for one shard: settings of the first saved one, counters such that their sums stay what they were."""
        headers = [snapshot.header for snapshot in self._snapshots]
        first = headers[0]
        tables = {}
        for name, table in first["tables"].items():
            saved = [h["tables"][name]["counters"] for h in headers if name in h["tables"]]
            items = [self._items(shard, name) for shard in range(self.count)]
            tables[name] = {**table, "counters": self._share(index, saved, items)}
        steps = [sum(int(self._rows[p.snapshot][p.place]) for p in parts) for parts in self.parts]
        counters = self._share(index, [h["counters"] for h in headers], steps)
        return {**first, "counters": counters, "tables": tables}

    def _items(self, shard: int, table: str) -> int:
        column = f"items.{table}"
        held = [
            s.segments.column(column).to_numpy() if column in s.segments.column_names else np.zeros(len(rows), np.int64)
            for s, rows in zip(self._snapshots, self._rows, strict=True)
        ]
        return sum(int(held[p.snapshot][p.place]) for p in self.parts[shard])

    def _share(self, index: int, saved: Sequence[Counters], held: Sequence[int]) -> dict[str, Any]:
        """Shard `index`'s part of the sums of `saved`. What it holds was inserted there; the rest is spread evenly."""
        if len(saved) == self.count:
            return dict(saved[index])
        found: dict[str, Any] = {}
        for name in saved[0]:
            total = sum(counters.get(name, 0) for counters in saved)
            if name == "items":
                found[name] = held[index]
            elif name == "inserted" and total >= sum(held):
                found[name] = held[index] + _spread(total - sum(held), index, self.count)
            else:
                found[name] = _spread(total, index, self.count)
        return found

    def segments(self, index: int) -> Iterator[SegmentCopy]:
        """What shard `index` gets, oldest first."""
        parts = self.parts[index]
        sources = [s.copies([p.place for p in parts if p.snapshot == saved]) for saved, s in enumerate(self._snapshots)]
        for part in parts:
            yield replace(next(sources[part.snapshot]), sequence=part.sequence, following=part.following)


def chains_of(snapshot: Snapshot) -> list[list[int]]:
    """Places of segments that follow one another, a list for each chain, in the order of their first ones."""
    numbers = snapshot.segments.column("segment").to_pylist()
    following = snapshot.segments.column("next_segment").to_pylist()
    place = {number: p for p, number in enumerate(numbers)}
    later = {p for n in following if (p := place.get(n)) is not None}
    chains = []
    for first in range(len(numbers)):
        if first not in later:
            chain, at = [], place.get(numbers[first])
            while at is not None:
                chain.append(at)
                at = place.get(following[at])
            chains.append(chain)
    return chains


def _cut(chain: list[int], rows: np.ndarray, most: float) -> Iterator[list[int]]:
    piece: list[int] = []
    held = 0
    for place in chain:
        if piece and held + rows[place] > most:
            yield piece
            piece, held = [], 0
        piece.append(place)
        held += int(rows[place])
    yield piece


def _spread(total: int, index: int, count: int) -> int:
    share, left = divmod(total, count)
    return share + (index < left)


def load(
    shard: Restorable, snapshots: Sequence[Snapshot], *, index: int = 0, count: int = 1, verify: bool = True
) -> dict[str, Any]:
    """Fill an empty shard, number `index` of `count`, with its part of saved shards. Returns the header it was given.

    Raises:
        SnapshotError: a file is damaged; nothing has changed. `verify=False` leaves checksums out.
        SchemaError: a saved shard has other fields; nothing has changed.
    """
    for snapshot in snapshots:
        check_schema(shard.schema, snapshot.schema, what=f"the snapshot {snapshot.path_of(snapshot.name)}")
        if lines := snapshot.missing():
            raise SnapshotError(lines[0])
    deal = Deal(snapshots, count)
    used = {part.snapshot for part in deal.parts[index]}
    for saved, snapshot in enumerate(snapshots):
        if verify and saved in used:
            snapshot.verify()
    header = deal.header(index)
    shard.restore(header, deal.segments(index))
    return header


def settings_differences(saved: Mapping[str, Any], current: Mapping[str, Any], *, prefix: str = "replay") -> list[str]:
    """A line for each setting that has changed since a snapshot; mappings are gone through, key by key."""
    lines = []
    for key in dict.fromkeys([*saved, *current]):
        name = f"{prefix}.{key}" if prefix else str(key)
        before, now = saved.get(key), current.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += settings_differences(before, now, prefix=name)
        elif key not in saved:
            lines.append(f"{name}: not in the snapshot, now {_text(now)}")
        elif key not in current:
            lines.append(f"{name}: saved {_text(before)}, no longer there")
        elif before != now:
            lines.append(f"{name}: saved {_text(before)}, now {_text(now)} (the current one is used)")
    return lines


def header_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """`settings_differences` of two headers: the service's settings, and those of each table as `table <name>.<setting>`."""
    lines = settings_differences(saved["settings"], current["settings"])
    tables = (saved["tables"], current["tables"])
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        if name not in tables[1]:
            lines.append(f"table {name}: saved, no longer there; its items are left out")
        elif name not in tables[0]:
            lines.append(f"table {name}: not in the snapshot; it takes every stored transition as an item")
        else:
            lines += settings_differences(
                tables[0][name]["settings"], tables[1][name]["settings"], prefix=f"table {name}"
            )
    return lines


def _text(value: Any) -> str:
    return "{…}" if isinstance(value, Mapping) else str(value)
