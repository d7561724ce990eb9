"""Prior data into a running replay service, or into a snapshot that a service starts from."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .columns import check_schema, concatenate_rows
from .copies import NONE, SegmentCopy
from .datasets import Chunk
from .schema import StepSchema
from .snapshot import Snapshot, SnapshotStore
from .writers import Writer

SEGMENT_STEPS = 4096


@dataclass
class Imported:
    """What has been imported: rows, transitions among them (rows with a successor), and episodes."""

    steps: int = 0
    transitions: int = 0
    episodes: int = 0

    def count(self, chunk: Chunk) -> None:
        self.steps += len(chunk.rows)
        self.transitions += int(np.count_nonzero(~chunk.rows["is_last"]))
        self.episodes += int(np.count_nonzero(chunk.starts))


def import_into_service(chunks: Iterable[Chunk], writers: Sequence[Writer]) -> Imported:
    """Write episodes to shards, each whole to the one that was given the fewest steps; closes the writers.

    Blocks where a table's limiter holds writers back.

    Raises:
        SchemaError, flight.FlightError: a shard refused the rows; what went before is stored.
    """
    done = Imported()
    given = np.zeros(len(writers), np.int64)
    shard = 0
    try:
        for chunk in chunks:
            bounds = [0, *(np.flatnonzero(chunk.starts[1:]) + 1).tolist(), len(chunk.rows)]
            pieces: dict[int, list[np.ndarray]] = {}
            for begin, end in pairwise(bounds):
                if begin < end:
                    if chunk.starts[begin]:
                        shard = int(given.argmin())
                    given[shard] += end - begin
                    pieces.setdefault(shard, []).append(chunk.rows[begin:end])
            for number, parts in pieces.items():
                rows = concatenate_rows(parts)
                writers[number].append(np.zeros(len(rows), np.int32), rows)
            done.count(chunk)
    except BaseException:
        for writer in writers:
            with suppress(Exception):  # what went wrong first is what is told
                writer.close()
        raise
    for writer in writers:
        writer.close()
    return done


class _ImportedSteps:
    """Chunks as the segments of one lane; its header's counters are right once they are used up."""

    def __init__(self, chunks: Iterable[Chunk], schema: StepSchema) -> None:
        self.done = Imported()
        self._chunks = chunks
        self._counters = {"inserted": 0, "sampled": 0}
        self._header = {
            "storage": secrets.token_hex(16),
            "schema": schema.to_json(),
            "settings": {},
            "counters": self._counters,
            "tables": {},
        }

    def copy(self, skip: Set[tuple[int, int]] = frozenset()) -> tuple[dict[str, Any], Iterator[SegmentCopy]]:
        return self._header, self._segments()

    def _segments(self) -> Iterator[SegmentCopy]:
        sequence = 0
        held: tuple[np.ndarray, np.ndarray] | None = None
        for rows, index in self._blocks():
            if held is not None:
                yield _segment(sequence, sequence + 1, *held)
                sequence += 1
            held = rows, index
        if held is not None:
            yield _segment(sequence, NONE, *held)
        self._counters["inserted"] = self.done.transitions

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows and their places in their episodes, SEGMENT_STEPS at a time."""
        rows: list[np.ndarray] = []
        index: list[np.ndarray] = []
        waiting, last = 0, -1
        for chunk in self._chunks:
            self.done.count(chunk)
            here = np.arange(len(chunk.rows))
            start = np.maximum.accumulate(np.where(chunk.starts, here, -1))
            place = np.where(start >= 0, here - start, here + last + 1)
            last = int(place[-1]) if len(place) else last
            begin = 0
            while begin < len(here):
                end = min(begin + SEGMENT_STEPS - waiting, len(here))
                rows.append(chunk.rows[begin:end])
                index.append(place[begin:end])
                waiting += end - begin
                begin = end
                if waiting == SEGMENT_STEPS:
                    yield concatenate_rows(rows), np.concatenate(index)
                    rows, index, waiting = [], [], 0
        if rows:
            yield concatenate_rows(rows), np.concatenate(index)


def _segment(sequence: int, following: int, rows: np.ndarray, index: np.ndarray) -> SegmentCopy:
    return SegmentCopy(
        sequence=sequence, following=following, complete=True, count=len(rows), index=index, rows=rows, tables={}
    )


def import_into_snapshot(
    chunks: Iterable[Chunk], schema: StepSchema, store: SnapshotStore
) -> tuple[Imported, Snapshot]:
    """Write episodes as a further shard of a snapshot store, beside those that are there.

    Raises:
        SchemaError: the store's shards have other fields, or a file has.
        OSError: it could not be written; the store is as it was.
    """
    there = store.shards()
    for shard in there:
        if (known := store.latest(shard)) is not None:
            check_schema(known.schema, schema, what="the data to import")
    steps = _ImportedSteps(chunks, schema)
    snapshot = store.save(steps, shard=max(there, default=-1) + 1)
    return steps.done, snapshot
