"""How learners read a queue table: batches of whole groups over all its shards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.flight as flight

from .queue_readers import QueueReader, QueueSource
from .queue_spec import GROUP
from .queue_writers import Connect
from .queues import Delivery


@dataclass(frozen=True)
class QueueBatch:
    """Whole groups, one after another, oldest first."""

    rows: pa.RecordBatch
    sizes: list[int]  # per group: its rows
    times: list[int]  # per group: microseconds since the epoch at its completion
    versions: list[int]  # per group: the oldest policy version in it
    leases: list[list[int]]  # per source


@dataclass
class _Ready:
    source: int
    lease: int
    size: int
    time: int
    version: int
    rows: pa.RecordBatch

    @property
    def identity(self) -> tuple[int, int, int | str]:
        """The same for another delivery of this group, and no other's."""
        return self.source, self.time, self.rows.column(GROUP)[0].as_py()


class QueueSampler:
    """Batches of whole groups over all shards of a queue table, oldest first over the shards to within one batch.

    A batch is consumed by `acknowledge`. A group that is sampled several times is in as many batches: a second delivery of one
    waits for the next. With several shards and several readers each may hold a part of a batch that lacks the groups the
    other holds; both go on when more groups come or one of them closes.
    """

    def __init__(self, sources: Sequence[QueueSource], *, groups: int | None = None, rows: int | None = None) -> None:
        """A batch has `groups` groups, or as many as have at least `rows` rows."""
        if (groups is None) == (rows is None) or (groups or rows or 0) < 1:
            raise ValueError(f"a batch has a number of groups or of rows, at least 1; received {groups=}, {rows=}")
        self._sources = list(sources)
        self._groups, self._rows = groups, rows
        self._ready: list[deque[_Ready]] = [deque() for _ in sources]
        self._begun: list[_Ready] = []  # of the next batch
        self._version: int | None = None

    def sample(self, timeout_s: float, *, version: int | None = None) -> QueueBatch:
        """The next batch.

        version: the policy version it is for; groups that lag too far behind are given back, dropped and counted by their shard.

        Raises:
            TimeoutError: not so many groups within `timeout_s`; those that came wait for the next call.
        """
        deadline = time.monotonic() + timeout_s
        if version is not None:
            self._version = version
            for source in self._sources:
                source.tell(version)
            self._begun = [g for g in self._begun if self._is_fresh(g)]
        again: list[_Ready] = []
        begun = {group.identity for group in self._begun}
        try:
            while not self._is_full():
                if (group := self._oldest(deadline)) is None:
                    whys = "; ".join(dict.fromkeys(source.why() for source in self._sources))
                    raise TimeoutError(f"no batch within {timeout_s:g} s: waiting for {whys}")
                if group.identity in begun:
                    again.append(group)
                elif self._is_fresh(group):
                    self._begun.append(group)
                    begun.add(group.identity)
        finally:
            for group in reversed(again):
                self._ready[group.source].appendleft(group)
        picked, self._begun = self._begun, []
        leases: list[list[int]] = [[] for _ in self._sources]
        for group in picked:
            leases[group.source].append(group.lease)
        return QueueBatch(
            rows=_joined([g.rows for g in picked]),
            sizes=[g.size for g in picked],
            times=[g.time for g in picked],
            versions=[g.version for g in picked],
            leases=leases,
        )

    def _is_full(self) -> bool:
        if self._rows is not None:
            return sum(g.size for g in self._begun) >= self._rows
        return len(self._begun) == self._groups

    def _is_fresh(self, group: _Ready) -> bool:
        source = self._sources[group.source]
        lag = source.max_policy_lag
        if lag is None or self._version is None or group.version >= self._version - lag:
            return True
        source.acknowledge((), [group.lease])
        return False

    def _oldest(self, deadline: float) -> _Ready | None:
        """The oldest group of all shards, so far as they have sent theirs."""
        while True:
            missing = False
            for index, source in enumerate(self._sources):
                if not self._ready[index]:
                    left = max(0.0, deadline - time.monotonic())
                    # A shard that has groups is about to send them, and they may be the oldest.
                    delivery = source.take(left if len(self._sources) == 1 else min(left, 0.05 * (source.waiting > 0)))
                    if delivery is not None:
                        self._ready[index].extend(_split(index, delivery))
                    missing = missing or (delivery is None and source.waiting > 0)
            heads = [ready for ready in self._ready if ready]
            if heads and not missing:
                return min(heads, key=lambda ready: ready[0].time).popleft()
            if time.monotonic() >= deadline:
                return min(heads, key=lambda ready: ready[0].time).popleft() if heads else None
            if not heads and not missing:
                time.sleep(0.002)

    def acknowledge(self, batch: QueueBatch) -> None:
        """Consume a batch. It counts for good once `flush` has returned, or else soon."""
        for source, leases in zip(self._sources, batch.leases, strict=True):
            if leases:
                source.acknowledge(leases)

    def flush(self) -> None:
        """Wait until what was acknowledged is consumed for good."""
        for source in self._sources:
            source.flush()

    def close(self) -> None:
        """Give back what was not acknowledged."""
        for source in self._sources:
            source.close()


def _split(source: int, delivery: Delivery) -> list[_Ready]:
    found, at = [], 0
    for lease, size, time_, version in zip(
        delivery.leases, delivery.sizes, delivery.times, delivery.versions, strict=True
    ):
        found.append(_Ready(source, lease, size, time_, version, delivery.batch.slice(at, size)))
        at += size
    return found


def _joined(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    if len(parts) == 1:
        return parts[0]
    (batch,) = pa.Table.from_batches(parts).combine_chunks().to_batches()
    return batch


def queue_sampler(
    addresses: Sequence[str],
    schema: pa.Schema,
    *,
    table: str,
    groups: int | None = None,
    rows: int | None = None,
    prefetch: int = 2,
    connect: Connect = flight.FlightClient,
) -> QueueSampler:
    """A sampler over the shards at these Flight addresses; `prefetch` counts batches drawn ahead, over all shards."""
    count = len(addresses)
    readers = [
        QueueReader(
            address,
            schema,
            table=table,
            groups=None if groups is None else -(-groups // count),
            rows=None if rows is None else -(-rows // count),
            partial=count > 1,
            prefetch=prefetch,
            connect=connect,
        )
        for address in addresses
    ]
    return QueueSampler(readers, groups=groups, rows=rows)
