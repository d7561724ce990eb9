"""What the tests of a changing service share: shards served from this process, and all their rows, read and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from replay.copies import NONE, SegmentCopy
from replay.routed_writer import RoutedWriter
from replay.schema import StepSchema
from replay.server import ShardServer
from replay.shard import ShardSpec
from tests.shards_for_tests import SCHEMA, SECURITY, checked, connect, mixed

LANE = 10_000  # step k of lane l has the number l · LANE + k, below 8191 · 251


class Stored(NamedTuple):
    """One row of one shard: which step it is, whether it begins or ends an episode there, and what follows it in its lane."""

    number: int
    is_first: bool
    is_last: bool
    successor: int | None


def steps(lane: int, first: int, count: int, *, episode: int, schema: StepSchema = SCHEMA) -> np.ndarray:
    """Steps of a lane whose fields all follow from its number and theirs; episodes of `episode` steps."""
    rows = checked(schema, lane * LANE + first, count)
    k = np.arange(first, first + count)
    rows["is_first"], rows["is_last"] = k % episode == 0, k % episode == episode - 1
    return rows


def stored(copies: Iterable[SegmentCopy]) -> list[Stored]:
    """All rows of a shard."""
    segments = {copy.sequence: copy for copy in copies}
    later = {copy.following for copy in segments.values()}
    found: list[Stored] = []
    for first in segments.values():
        if first.sequence in later:
            continue
        chain = [first]
        while (following := chain[-1].following) != NONE and following in segments:
            chain.append(segments[following])
        parts = []
        for copy in chain:
            assert copy.rows is not None
            parts.append(copy.rows)
        rows = np.concatenate([part.view(np.void) for part in parts]).view(parts[0].dtype)
        # A cut row's action is void: the policy version and the observation tell its number as well, modulo 8191 and 251.
        version, seen = rows["policy_version"].astype(np.int64), rows["observation"][:, 0].astype(np.int64)
        number = version + 8191 * ((seen - version) * pow(8191, -1, 251) % 251)
        void = rows["is_last"] & ~rows["action"].any(axis=1)
        assert (void | (rows["action"][:, 0] == number) & (rows["action"][:, 1] == mixed(number))).all()
        following_number = [int(n) for n in number[1:]]
        for place in range(len(rows)):
            ends = bool(rows["is_last"][place]) or place + 1 == len(rows) or bool(rows["is_first"][place + 1])
            successor = None if ends else following_number[place]
            found.append(
                Stored(int(number[place]), bool(rows["is_first"][place]), bool(rows["is_last"][place]), successor)
            )
    return found


def check_episodes(rows: Sequence[Stored], *, episode: int) -> int:
    """A step is followed by the next of its lane, or by none, and where an episode was cut another begins. Returns the cuts."""
    begins = {row.number for row in rows if row.is_first}
    cuts = 0
    for row in rows:
        last = row.number % LANE % episode == episode - 1
        assert row.successor == (None if row.is_last else row.number + 1), row
        assert row.is_last or not last, row
        if row.is_last and not last:  # nothing was written behind it, or that begins an episode
            cuts += 1
            assert row.number + 1 in begins or all(other.number != row.number + 1 for other in rows), row
    return cuts


def numbers(rows: Iterable[Stored]) -> Counter[int]:
    return Counter(row.number for row in rows)


class Service:
    """Shards of one service, in this process; the first holds the limiters."""

    def __init__(self, spec: ShardSpec) -> None:
        self._spec = spec
        self._made = 0
        self.shards: dict[int, ShardServer] = {}
        self.gone: list[dict[str, int]] = []  # last counters of the shards that have left
        self.join()

    @property
    def routes(self) -> dict[int, str]:
        return {number: server.address for number, server in self.shards.items()}

    def join(self, **changes: object) -> int:
        """Add a shard; its number."""
        leader = self.shards[0].address if self.shards else None
        number, self._made = self._made, self._made + 1
        spec = replace(self._spec, index=number, limiter_address=leader, **changes)  # type: ignore[arg-type]
        self.shards[number] = ShardServer(spec, SECURITY)
        return number

    def leave(self, number: int) -> int:
        """Have a shard hand its rows over to all others and end. Returns how many were left out."""
        server = self.shards[number]
        server.leave()
        told = server.hand_over({n: a for n, a in self.routes.items() if n != number})
        self.gone.append(server.stats()["tables"][self._spec.tables[0].name])
        assert self.gone[-1]["items"] == 0
        del self.shards[number]
        server.close()
        return told.left_out

    def stored(self, number: int) -> list[Stored]:
        return stored(self.shards[number].shard.copy()[1])

    def table(self, number: int) -> dict[str, int]:
        found: dict[str, int] = self.shards[number].stats()["tables"][self._spec.tables[0].name]
        return found

    def settle(self) -> None:
        """Hand back what shards have leased and not used."""
        for server in self.shards.values():
            for limiter in server._leased.values():
                limiter.return_unused()

    def close(self) -> None:
        for number in sorted(self.shards, reverse=True):
            self.shards.pop(number).close()


@contextmanager
def service(spec: ShardSpec, shards: int = 1) -> Iterator[Service]:
    with closing(Service(spec)) as made:
        for _ in range(shards - 1):
            made.join()
        yield made


class Lanes:
    """An actor that writes steps of lanes in time order, and knows how many."""

    def __init__(self, writer: RoutedWriter, *, episode: int = 10, schema: StepSchema = SCHEMA) -> None:
        self.writer = writer
        self.written: dict[int, int] = {}
        self._episode = episode
        self._schema = schema

    def write(self, counts: Mapping[int, int]) -> None:
        """So many more steps of each lane, in one call."""
        lanes, rows = [], []
        for lane, count in counts.items():
            begin = self.written.get(lane, 0)
            lanes.append(np.full(count, lane, np.int32))
            rows.append(steps(lane, begin, count, episode=self._episode, schema=self._schema))
            self.written[lane] = begin + count
        joined = np.concatenate([part.view(np.void) for part in rows]).view(rows[0].dtype)
        self.writer.append(np.concatenate(lanes), joined)

    def numbers(self) -> Counter[int]:
        """All steps written, each once."""
        return Counter(lane * LANE + k for lane, count in self.written.items() for k in range(count))


@contextmanager
def actor(routes: Mapping[int, str], name: str = "actor", **settings: object) -> Iterator[Lanes]:
    with ExitStack() as stack:
        episode = settings.pop("episode", 10)
        schema = settings.pop("schema", SCHEMA)
        assert isinstance(episode, int)
        assert isinstance(schema, StepSchema)
        writer = RoutedWriter(routes, schema, name=name, connect=connect, **settings)  # type: ignore[arg-type]
        stack.enter_context(closing(writer))
        yield Lanes(writer, episode=episode, schema=schema)
