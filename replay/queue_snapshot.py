"""Snapshots of queue tables: the groups that a shard's queue holds as one Arrow IPC file, written and restored whole.

    <folder>/<queue>-<shard>.arrow      rows in the queue's own columns, one group after another in the order of delivery

The schema's metadata has, under the key `millrace.queue_snapshot`, JSON with the counters of `Queue.stats` over the queue's
life, and per group in the file's order its `rows`, how often it was `consumed`, and the `time` of its completion in
microseconds since the epoch. Any Arrow reader opens the file (Polars `read_ipc`; pyarrow, and DuckDB through it).

What is consumed: a group whose acknowledgement had come when the file was written is not in it, and one that was
delivered and not acknowledged is, in its place. So a learner that flushes its acknowledgements
(`QueueSampler.flush`) and has its state saved before it acknowledges more finds, when both are restored, the groups
it has not learned from, each once for every delivery that is left of `times_sampled`. Incomplete groups are left out and
counted as dropped: their writers do not outlive a resumed run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs

from .queue_copies import GroupCopy
from .queue_spec import columns_text
from .queues import Queue
from .schema import SchemaError
from .snapshot import SnapshotError
from .snapshot_files import sync

FORMAT = 1
_KEY = b"millrace.queue_snapshot"
Counters = dict[str, int]
Groups = Iterator[tuple[GroupCopy, pa.RecordBatch]]


def save_queue(queue: Queue, folder: str | Path, *, shard: int = 0) -> Counters:
    """Write what a queue holds to `folder`, over an earlier file of the shard. Nobody is served until the rows are copied.

    Returns the counters that the file has, and `groups`, `rows` and `bytes` of it.

    Raises:
        OSError: it could not be written; nothing is left of it, and the earlier file is as it was.
    """
    copy = queue.copy()
    about = {
        "format": FORMAT,
        "queue": queue.spec.name,
        "counters": copy.counters,
        "groups": {name: [getattr(group, name) for group in copy.groups] for name in ("rows", "consumed", "time")},
    }
    path = Path(folder).absolute() / f"{queue.spec.name}-{shard}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    schema = queue.spec.schema.with_metadata({_KEY: json.dumps(about)})
    try:
        with temporary.open("wb") as stream:
            with pa.ipc.new_file(stream, schema) as writer:
                for batch in copy.batches:
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(fs.LocalFileSystem(), str(path.parent))
    return {**copy.counters, "groups": len(copy.groups), "rows": sum(g.rows for g in copy.groups), "bytes": size}


def queue_files(folder: str | Path, name: str) -> list[Path]:
    """The files of all shards of a queue in `folder`, by the numbers of the shards; none where there is no snapshot.

    Raises:
        SnapshotError: a shard's file is missing between those of others.
    """
    found = {
        int(match[1]): path
        for path in Path(folder).glob(f"{name}-*.arrow")
        if (match := re.fullmatch(rf"{name}-(\d+)\.arrow", path.name))
    }
    if missing := set(range(max(found, default=-1))) - found.keys():
        names = ", ".join(f"{name}-{number}.arrow" for number in sorted(missing))
        raise SnapshotError(f"{folder} has files of {len(found)} shards of queue {name!r}, but not {names}")
    return [found[number] for number in sorted(found)]


def restore_queue(queue: Queue, files: str | Path | Sequence[str | Path], *, index: int = 0, count: int = 1) -> int:
    """Fill the empty queue of shard `index`, of `count`, from the files of all shards that were saved.

    As many shards as were saved get back what they had. Another number has the groups of all dealt out in turn, oldest first,
    and counters whose sums are those saved. Returns how many groups the queue then has.

    All or nothing, whatever kills the process meanwhile.

    Raises:
        SnapshotError: a file is missing, damaged or of another format.
        SchemaError: it has other columns than the queue.
        ValueError: the queue is not empty, is too small for the groups, or has another `group_size`.
    """
    paths = [files] if isinstance(files, str | Path) else files
    if not paths or not 0 <= index < count:
        raise ValueError(f"expected files and 0 ≤ index < count; received {len(paths)} files, {index=} and {count=}")
    saved = [_Saved(Path(path)) for path in paths]
    for one in saved:
        one.check_schema(queue.spec.schema)
    if len(saved) == count:
        queue.restore(saved[index].counters, iter(saved[index]))
        return len(saved[index].groups)
    held = list(_dealt((s.groups for s in saved), index, count))
    queue.restore(
        _shares(saved, held, index, count),
        islice(merge(*saved, key=lambda found: found[0].time), index, None, count),
    )
    return len(held)


def _dealt(groups: Iterable[Sequence[GroupCopy]], index: int, count: int) -> Iterator[GroupCopy]:
    """Every `count`-th group of all, by the times of completion; those of a shard keep their order."""
    return islice(merge(*groups, key=lambda group: group.time), index, None, count)


def _shares(saved: Sequence[_Saved], held: Sequence[GroupCopy], index: int, count: int) -> Counters:
    """Shard `index`'s part of the sums of all counters. What it holds was inserted there; the rest is spread evenly."""
    everything = [group for one in saved for group in one.groups]
    here = {"inserted_rows": sum(g.rows for g in held), "inserted_groups": len(held)}
    there = {"inserted_rows": sum(g.rows for g in everything), "inserted_groups": len(everything)}
    shares = {}
    for name in saved[0].counters:
        rest = sum(one.counters.get(name, 0) for one in saved) - there.get(name, 0)
        shares[name] = here.get(name, 0) + rest // count + (index < rest % count)
    return shares


class _Saved:
    """A file that `save_queue` wrote. Iterating gives its groups with their rows, oldest first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            about: dict[str, Any] = json.loads((self._reader.schema.metadata or {})[_KEY])
            if about["format"] != FORMAT:
                raise SnapshotError(f"{path} has format {about['format']}, this version of Millrace reads {FORMAT}")
            self.counters: Counters = {str(name): int(value) for name, value in about["counters"].items()}
            columns = (about["groups"][name] for name in ("rows", "consumed", "time"))
            self.groups = [GroupCopy(*map(int, values)) for values in zip(*columns, strict=True)]
            told, found = sum(group.rows for group in self.groups), self._reader.count_rows()
            if told != found:
                raise SnapshotError(f"{path} is damaged: its metadata tells of {told} rows, it has {found}")
        except FileNotFoundError as error:
            raise SnapshotError(f"{path} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{path} is damaged, or no snapshot of a queue: {error!r}") from error

    def check_schema(self, expected: pa.Schema) -> None:
        found = self._reader.schema.remove_metadata()
        if not found.equals(expected):
            raise SchemaError(
                f"the groups in {self._path} do not fit: expected {columns_text(expected)}; found {columns_text(found)}"
            )

    def __iter__(self) -> Groups:
        number, rows = 0, None
        for group in self.groups:
            if rows is None or rows.num_rows == 0:
                rows, number = self._batch(number), number + 1
            if rows.num_rows < group.rows:
                raise SnapshotError(f"{self._path} is damaged: a group of {group.rows} rows is not whole")
            yield group, rows.slice(0, group.rows)
            rows = rows.slice(group.rows)

    def _batch(self, number: int) -> pa.RecordBatch:
        try:
            batch = self._reader.get_batch(number)
            batch.validate(full=True)
            return batch.replace_schema_metadata(None)
        except (OSError, pa.ArrowException) as error:
            raise SnapshotError(f"{self._path} is damaged: {error}") from error
