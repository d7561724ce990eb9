"""How a shard that leaves a running service hands its rows over to the others, each exactly once.

Nothing changes any more on the shard (`Shard.leave`, and its writers have ended). Its rows are taken apart into *bundles*:
whole episodes that follow one another in a lane, about a segment long. A plan says how many rows each of the others gets;
bundles are dealt by it, oldest first, always in the same way, and go as numbered parts (`replay.receiving`), one after the
other on each way. The plan lies in the shard's storage and the number of the last part applied in that of who got it, so
that a hand-over that was cut short by the death of either is gone on with where it was.

Where the others have too little room, rows of all shards stay that have at most some number of newer ones on their shard:
the shard leaves its older ones out, and those of the others are overwritten, oldest first, as by ordinary inserts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.flight as flight

from . import kernels
from .copies import TableCopy
from .faults import fault
from .kernels import NONE
from .receiving import Part, part_schema
from .security import REFUSED, Security, flight_client
from .storage import SegmentStorage
from .tables import Table
from .wire import CLOSE, LOST, RETRY_S, SEQUENCE, action

PART_BYTES = 1 << 20
PART_ROWS = 4096
_PAUSE_S = 0.2  # between two attempts to reach a shard


class HandOverError(RuntimeError):
    """A hand-over cannot be done, or not be gone on with, as asked."""


@dataclass(frozen=True)
class HandedOver:
    """What a shard that has left gave to the others, over all attempts.

    steps: rows they got.
    items: of each table, by name.
    left_out: rows that found no room, for they were the oldest of all.
    """

    steps: int
    items: Mapping[str, int]
    left_out: int


@dataclass(frozen=True)
class Plan:
    """Who gets how much: by number of the shard, rows; they sum up to what is handed over at all, but for the last bundle."""

    shares: Mapping[int, int]

    @property
    def rows(self) -> int:
        """Newest rows that are handed over."""
        return sum(self.shares.values())

    def to_json(self) -> dict[str, Any]:
        return {"shares": {str(shard): rows for shard, rows in self.shares.items()}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Plan:
        return cls({int(shard): int(rows) for shard, rows in found["shares"].items()})


def make_plan(held: int, others: Mapping[int, tuple[int, int]]) -> Plan:
    """Deal out `held` rows to shards: number → (rows they can hold, rows of that not in use)."""
    level = _level([held, *(capacity - free for capacity, free in others.values())], sum(c for c, _ in others.values()))
    given = min(held, level)
    room = {shard: capacity - min(capacity - free, level) for shard, (capacity, free) in others.items()}
    total = sum(room.values())
    order = sorted(room)
    ends = np.cumsum([room[shard] for shard in order]) * given // max(1, total)
    return Plan({shard: int(end - begin) for shard, begin, end in zip(order, [0, *ends[:-1]], ends, strict=True)})


def _level(held: Sequence[int], room: int) -> int:
    """The largest number of rows that each shard may keep of those it holds so that all fit into `room`."""
    left = len(held)
    for rows in sorted(held):
        if rows * left >= room:
            return room // left
        room, left = room - rows, left - 1
    return max(held)


@dataclass(frozen=True)
class Bundle:
    """Episodes that follow one another in a lane.

    rows: row numbers, int64 (n,).
    index: place of the first row in its episode.
    begins, ends: whether the first row begins an episode, and the last one ends one.
    """

    rows: np.ndarray
    index: int
    begins: bool
    ends: bool


def bundles(storage: SegmentStorage) -> list[Bundle]:
    """All rows of a storage that does not change, oldest first."""
    segments, steps = storage.arrays["segments"], storage.layout.segment_steps
    first, last = storage.rows["is_first"], storage.rows["is_last"]
    found: list[tuple[int, int, Bundle]] = []
    for chain in _chains(segments):
        rows = np.concatenate([np.arange(s * steps, s * steps + segments[kernels.FILL, s]) for s in chain])
        starts = np.flatnonzero(first[rows])
        # The first episode that begins in each so many rows.
        starts = starts[np.unique(starts // steps, return_index=True)[1]]
        cuts = [*sorted({0, *starts.tolist()}), len(rows)]
        for begin, end in pairwise(cuts):
            head = int(rows[begin])
            begins = bool(first[head])
            index = 0 if begins else int(segments[kernels.FIRST_INDEX, head // steps])
            bundle = Bundle(rows[begin:end], index, begins, bool(last[rows[end - 1]]))
            found.append((int(segments[kernels.SEQUENCE, head // steps]), head, bundle))
    return [bundle for _, _, bundle in sorted(found, key=lambda each: each[:2])]


def _chains(segments: np.ndarray) -> Iterator[list[int]]:
    """Segments that hold rows, those that follow one another in a lane together."""
    used = [int(s) for s in np.flatnonzero((segments[kernels.SEQUENCE] != NONE) & (segments[kernels.FILL] > 0))]
    following = {}
    for segment in used:
        after = int(segments[kernels.NEXT, segment])
        if after != NONE and segments[kernels.PREVIOUS, after] == segment and segments[kernels.FILL, after] > 0:
            following[segment] = after
    for segment in sorted(set(used) - set(following.values())):
        chain = [segment]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        yield chain


def deal(found: Sequence[Bundle], plan: Plan) -> tuple[dict[int, list[Bundle]], int]:
    """The bundles of each shard, oldest first, and how many of the oldest rows are left out."""
    rows = [len(bundle.rows) for bundle in found]
    left_out, excess = 0, sum(rows) - plan.rows
    begin = 0
    while begin < len(found) and left_out + rows[begin] <= excess:
        left_out += rows[begin]
        begin += 1
    dealt: dict[int, list[Bundle]] = {shard: [] for shard in sorted(plan.shares)}
    given = dict.fromkeys(dealt, 0)
    open_to = [shard for shard in dealt if plan.shares[shard] > 0] or list(dealt)
    for bundle in found[begin:]:  # each to the one that lacks the largest part of its share
        shard = max(open_to, key=lambda s: (1.0 - given[s] / max(1, plan.shares[s]), -s))
        dealt[shard].append(bundle)
        given[shard] += len(bundle.rows)
    return dealt, left_out


@dataclass(frozen=True)
class _Piece:
    """Rows of a lane, `begin` to `end`, that go as one part."""

    lane: int
    rows: np.ndarray  # of the whole lane, int64 (n,)
    begin: int
    end: int
    index: int  # place of the first row in its episode


@dataclass
class _Way:
    """What goes to one shard, part by part, and how far it has come."""

    shard: int
    pieces: list[_Piece]
    applied: int = -1  # number of the last part that the shard has
    items: dict[str, int] = field(default_factory=dict)  # of those that it has, by table


def _pieces(given: Sequence[Bundle], most: int, first: np.ndarray) -> list[_Piece]:
    """Bundles put behind one another in lanes, and these cut into pieces of at most so many rows.

    A lane goes on where one bundle ends an episode and the next begins one. first: bool (rows,), of the storage.
    """
    lanes: list[list[Bundle]] = []
    for bundle in given:
        if lanes and lanes[-1][-1].ends and bundle.begins:
            lanes[-1].append(bundle)
        else:
            lanes.append([bundle])
    pieces = []
    for number, lane in enumerate(lanes):
        rows = np.concatenate([bundle.rows for bundle in lane])
        starts = np.flatnonzero(first[rows])
        for begin in range(0, len(rows), most):
            start = int(np.searchsorted(starts, begin, side="right")) - 1
            index = begin - int(starts[start]) if start >= 0 else lane[0].index + begin
            pieces.append(_Piece(number, rows, begin, min(begin + most, len(rows)), index))
    return pieces


class HandOver:
    """One shard's, from its plan to its end; `run` may be called again after it has failed."""

    def __init__(self, storage: SegmentStorage, tables: Mapping[str, Table], plan: Plan, security: Security) -> None:
        """`storage`: changes no more."""
        self._storage = storage
        self._tables = tables
        self._security = security
        self._schema = part_schema(storage.layout)
        self._name = f"hand-over of {storage.identity}"
        dealt, self.left_out = deal(bundles(storage), plan)
        most = max(1, min(PART_ROWS, PART_BYTES // storage.layout.schema.dtype.itemsize))
        first = storage.rows["is_first"]
        self._ways = [_Way(shard, _pieces(given, most, first)) for shard, given in dealt.items() if given]

    def run(self, to: Mapping[int, str], *, retry_s: float = RETRY_S) -> HandedOver:
        """Send what the others do not have yet; returns when they have it all.

        Raises:
            HandOverError: a shard that rows were promised to is not among them, refuses them, or was away for `retry_s`.
        """
        if missing := [way.shard for way in self._ways if way.shard not in to]:
            raise HandOverError(
                f"expected the addresses of the shards that the hand-over was begun with, received {sorted(to)}, without "
                f"{missing}; begin it again once they are there"
            )
        if self._ways:
            with ThreadPoolExecutor(len(self._ways), thread_name_prefix="hand-over") as pool:
                list(pool.map(lambda way: self._send(way, to[way.shard], retry_s), self._ways))
        steps = sum(piece.end - piece.begin for way in self._ways for piece in way.pieces)
        items = {name: sum(way.items[name] for way in self._ways) for name in self._tables}
        return HandedOver(steps, items, self.left_out)

    def _send(self, way: _Way, address: str, retry_s: float) -> None:
        give_up = time.monotonic() + retry_s
        while True:
            before = way.applied
            try:
                self._talk(way, address)
                return
            except REFUSED as error:
                raise HandOverError(f"shard {way.shard} at {address} refuses rows handed over: {error}") from error
            except LOST as error:
                if way.applied > before:
                    give_up = time.monotonic() + retry_s
                if time.monotonic() > give_up:
                    raise HandOverError(f"shard {way.shard} at {address} is away: {error}") from error
            time.sleep(_PAUSE_S)

    def _talk(self, way: _Way, address: str) -> None:
        """Send parts over one stream, each once the one before is applied, and end it."""
        with flight_client(address, self._security) as client:
            descriptor = flight.FlightDescriptor.for_command(json.dumps({"receive": self._name}).encode())
            put, replies = client.do_put(descriptor, self._schema)
            try:
                # Who came back from a snapshot may have fewer than it had said, which are lost with its storage.
                there = max(way.applied, _answer(replies))
                self._count(way, there)
                for number in range(there + 1, len(way.pieces)):
                    put.write_with_metadata(*self._part(number, way.pieces[number]).pack(self._schema))
                    self._count(way, _answer(replies))
                    fault("handover.acknowledged")
                put.write_metadata(CLOSE)
                put.done_writing()
                while replies.read() is not None:
                    pass
            finally:
                put.close()  # raises what the shard said, if it ended the stream

    def _part(self, number: int, piece: _Piece) -> Part:
        rows, begin = piece.rows, piece.begin
        # Where there is no row before, the first one stands in its place, and is void.
        chosen = rows[begin - 1 : piece.end] if begin else np.append(rows[:1], rows[: piece.end])
        tables = {name: TableCopy(*table.copy(chosen)) for name, table in self._tables.items()}
        if begin == 0:
            for known in tables.values():
                known.member[0] = False
        return Part(number, piece.lane, begin > 0, piece.index, self._storage.read(chosen), tables)

    def _count(self, way: _Way, applied: int) -> None:
        """The shard has all parts up to this one: their items are no longer this shard's."""
        for name, table in self._tables.items():
            count = 0
            for piece in way.pieces[way.applied + 1 : applied + 1]:
                flags = self._storage.flags[piece.rows[piece.begin : piece.end]]
                count += int(np.count_nonzero(flags & table.bit))
            way.items[name] = way.items.get(name, 0) + count
            table.gave(count)
        way.applied = max(way.applied, applied)


def _answer(replies: Any) -> int:
    """The number that the shard answers with."""
    answer = replies.read()
    if answer is None:
        raise flight.FlightUnavailableError("it ended the stream")
    (number,) = SEQUENCE.unpack(answer)
    return int(number)


def ask_room(to: Mapping[int, str], security: Security) -> dict[int, tuple[int, int]]:
    """What `make_plan` must know of the others.

    Raises:
        HandOverError: there are none, or one does not answer.
    """
    if not to:
        raise HandOverError("expected the address of at least one other shard to hand rows over to, received none")
    found = {}
    for shard, address in to.items():
        try:
            with flight_client(address, security) as client:
                stats = action(client, "stats", {})
        except LOST as error:
            raise HandOverError(f"shard {shard} at {address} does not answer: {error}") from error
        found[shard] = int(stats["capacity"]), int(stats["free"])
    return found
