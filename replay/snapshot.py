"""Snapshots of shards: Arrow IPC files and a manifest, in a folder or an object store, written a little at a time.

    <store>/shard-0/rows-….arrow         steps of complete segments, which never change: written once
                    open-….arrow         steps of the segments still being filled
                    tables-….arrow       items, priorities and times sampled of every table
                    segments-….arrow     which segments there are, and where their steps lie
                    manifest-00000007.json   counters, settings, and size and CRC-32 of every file; written last

A snapshot is its manifest and the files it names. The next one names the rows files again and writes only what has changed:
the newest rows, and the tables, which are small. A file is never changed once a manifest names it, so a snapshot stays
whole until it is pruned, and one cut short leaves nothing but files that no manifest names.

Any Arrow reader opens the files (Polars `read_ipc`; pyarrow, and DuckDB through it). Row i of the tables file belongs to
row i of the segments in their order, and `file`, `batch` and `row` of a segment say where its first step lies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs

from .columns import from_columns
from .copies import Copyable, SegmentCopy, TableCopy
from .schema import StepSchema
from .snapshot_files import FILE_BYTES, FileRecord, Place, SnapshotFiles, sync

FORMAT = 1
SMALL_FILES = 16  # rows files below a quarter of FILE_BYTES, before they are written anew as larger ones
CACHE_BYTES = 256 << 20  # batches kept decoded while a snapshot is read from elsewhere than local disk
_MANIFEST = re.compile(r"manifest-(\d{8,})\.json")
_OURS = re.compile(r"(rows|open|tables|segments)-.*\.arrow|manifest-\d{8,}\.json|\..*\.tmp")


class SnapshotError(RuntimeError):
    """A snapshot is missing, damaged or incomplete; the message names the file and what is wrong with it."""


def open_location(location: str | Path | fs.FileSystem, path: str | None = None) -> tuple[fs.FileSystem, str]:
    """The file system and path of a local path, a `pyarrow.fs` URI, or a file system with a path on it.

    URIs are those of `pyarrow.fs.FileSystem.from_uri`: file://, s3://bucket/path?region=…, gs://, abfs://, hdfs://, with the
    credentials that each looks for by itself (AWS_ACCESS_KEY_ID and the like).
    """
    if isinstance(location, fs.FileSystem):
        return location, path or ""
    text = str(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(text)
        return found
    return fs.LocalFileSystem(), str(Path(text).absolute())


class SnapshotStore:
    """The snapshots of a table's shards in one place. One process at a time writes those of a shard."""

    def __init__(self, location: str | Path | fs.FileSystem, path: str | None = None) -> None:
        """As `open_location`."""
        self.filesystem, self.path = open_location(location, path)

    def __repr__(self) -> str:
        return f"SnapshotStore({self.path})"

    def shards(self) -> list[int]:
        """Numbers of the shards that have a snapshot here."""
        folders = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        numbers = [int(m[1]) for f in folders if (m := re.fullmatch(r"shard-(\d+)", f.base_name))]
        return [number for number in sorted(numbers) if self.numbers(number)]

    def numbers(self, shard: int) -> list[int]:
        """Numbers of a shard's snapshots, oldest first."""
        return sorted(int(m[1]) for name in self._names(shard) if (m := _MANIFEST.fullmatch(name)))

    def latest(self, shard: int) -> Snapshot | None:
        """The newest snapshot of a shard, None where there is none.

        Raises:
            SnapshotError: its manifest is damaged.
        """
        numbers = self.numbers(shard)
        return Snapshot.read(self, shard, numbers[-1]) if numbers else None

    def all(self) -> list[Snapshot]:
        """The newest snapshot of every shard.

        Raises:
            SnapshotError: a manifest is damaged, or there is none at all.
        """
        found = [snapshot for shard in self.shards() if (snapshot := self.latest(shard)) is not None]
        if not found:
            raise SnapshotError(f"{self.path} holds no snapshot: no shard-*/manifest-*.json in it")
        return found

    def save(
        self, source: Copyable, *, shard: int = 0, keep: int = 1, previous: SnapshotStore | None = None
    ) -> Snapshot:
        """Write a snapshot of `source`, which may go on serving meanwhile, and remove all but the newest `keep`.

        previous: where an earlier snapshot of the shard lies, if not here; its rows files are linked, or copied where
            that cannot be done, instead of written anew.

        Raises:
            OSError: it could not be written; nothing is left of it, and the earlier snapshots are as they were.
        """
        last = self._last_usable(shard) or (None if previous is None else previous._last_usable(shard))
        reused = last.reusable() if last is not None else {}
        header, segments = source.copy(frozenset(reused))
        if last is not None and header["storage"] != last.header["storage"]:
            reused = {}
            header, segments = source.copy()
        self.filesystem.create_dir(self._folder(shard), recursive=True)
        number = max([0, *self.numbers(shard)]) + 1
        writing = SnapshotFiles(self.filesystem, self._folder(shard), number, header)
        try:
            for segment in segments:
                known = reused.get((segment.sequence, segment.count))
                writing.add(segment, known if segment.rows is None else None)
            files = writing.finish()
            for record in () if last is None else last.files:
                if record.name in writing.referenced:
                    if last is not None and last.store is not self:
                        writing.take_over(record)
                        self._take_over(record, last, shard)
                    files.append(record)
            manifest = {"format": FORMAT, "shard": shard, "header": header, "files": [asdict(f) for f in files]}
            self._put(shard, f"manifest-{number:08d}.json", (json.dumps(manifest, indent=1) + "\n").encode())
        except BaseException:
            with suppress(OSError):
                # Where it cannot be told that no manifest names them, the files stay.
                self._delete(shard, f"manifest-{number:08d}.json")
                writing.abandon()
            raise
        with suppress(OSError):  # the snapshot is there; what is left over goes with the next
            self.prune(shard, keep=keep)
        return Snapshot(self, shard, number, header, tuple(files))

    def prune(self, shard: int, *, keep: int) -> None:
        """Remove all but the newest `keep` snapshots of a shard, and the files that none of them names."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        numbers = self.numbers(shard)
        try:
            kept = [Snapshot.read(self, shard, number) for number in numbers[-keep:]]
        except SnapshotError:
            return  # which files it names is unknown
        named = {f.name for s in kept for f in s.files} | {s.name for s in kept}
        doomed = [name for name in self._names(shard) if _OURS.fullmatch(name) and name not in named]
        for name in sorted(doomed, key=lambda n: not _MANIFEST.fullmatch(n)):  # a manifest goes before its files
            self._delete(shard, name)

    def _folder(self, shard: int) -> str:
        return f"{self.path}/shard-{shard}" if self.path else f"shard-{shard}"

    def _delete(self, shard: int, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self._folder(shard)}/{name}")

    def _names(self, shard: int) -> list[str]:
        selector = fs.FileSelector(self._folder(shard), allow_not_found=True)
        return [f.base_name for f in self.filesystem.get_file_info(selector)]

    def _last_usable(self, shard: int) -> Snapshot | None:
        try:
            last = self.latest(shard)
            return last if last is not None and not last.missing() and last.segments is not None else None
        except SnapshotError:
            return None  # everything is written anew

    def _put(self, shard: int, name: str, data: bytes) -> None:
        """Write a small file: whole or not at all."""
        path, temporary = f"{self._folder(shard)}/{name}", f"{self._folder(shard)}/.{name}.tmp"
        with self.filesystem.open_output_stream(temporary) as stream:
            stream.write(data)
        sync(self.filesystem, temporary)
        self.filesystem.move(temporary, path)
        sync(self.filesystem, self._folder(shard))

    def _take_over(self, record: FileRecord, snapshot: Snapshot, shard: int) -> None:
        """Have a file of a snapshot elsewhere in this place too."""
        source, target = snapshot.path_of(record.name), f"{self._folder(shard)}/{record.name}"
        theirs = snapshot.store.filesystem
        if isinstance(self.filesystem, fs.LocalFileSystem) and isinstance(theirs, fs.LocalFileSystem):
            with suppress(FileNotFoundError):
                os.unlink(target)
            try:
                os.link(source, target)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source, target)
                sync(self.filesystem, target)
        else:
            fs.copy_files(source, target, source_filesystem=theirs, destination_filesystem=self.filesystem)


@dataclass(frozen=True)
class Snapshot:
    """One shard as it stood once."""

    store: SnapshotStore
    shard: int
    number: int
    header: dict[str, Any]
    files: tuple[FileRecord, ...]

    @classmethod
    def read(cls, store: SnapshotStore, shard: int, number: int) -> Snapshot:
        """Read a manifest.

        Raises:
            SnapshotError: it is missing, damaged or of another format.
        """
        path = f"{store._folder(shard)}/manifest-{number:08d}.json"
        try:
            with store.filesystem.open_input_file(path) as file:
                manifest = json.loads(file.readall())
            if manifest["format"] != FORMAT:
                raise SnapshotError(f"{path} has format {manifest['format']}, this version of Millrace reads {FORMAT}")
            files = tuple(FileRecord(**record) for record in manifest["files"])
            header = dict(manifest["header"])
            StepSchema.from_json(header["schema"])
            return cls(store, int(manifest["shard"]), number, header, files)
        except FileNotFoundError as error:
            raise SnapshotError(f"{path} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise SnapshotError(f"{path} is damaged: {error!r}") from error

    @property
    def name(self) -> str:
        """Name of the manifest."""
        return f"manifest-{self.number:08d}.json"

    @cached_property
    def schema(self) -> StepSchema:
        return StepSchema.from_json(self.header["schema"])

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def path_of(self, name: str) -> str:
        """Path of a file on the store's file system."""
        return f"{self.store._folder(self.shard)}/{name}"

    def missing(self) -> list[str]:
        """Files that are absent or of another size than the manifest says, a line for each."""
        paths = [self.path_of(file.name) for file in self.files]
        lines = []
        for file, info in zip(self.files, self.store.filesystem.get_file_info(paths), strict=True):
            if info.type != fs.FileType.File:
                lines.append(f"{info.path} is missing; {self.name} names it")
            elif info.size != file.size:
                lines.append(f"{info.path} has {info.size} bytes, {self.name} says {file.size}")
        return lines

    def verify(self) -> None:
        """Check every file.

        Raises:
            SnapshotError: names the first file that is missing, of another size or of other content.
        """
        if lines := self.missing():
            raise SnapshotError(lines[0])
        for record in self.files:
            checksum = 0
            with self.store.filesystem.open_input_stream(self.path_of(record.name)) as stream:
                while block := stream.read(1 << 22):
                    checksum = zlib.crc32(block, checksum)
            if checksum != record.crc32:
                raise SnapshotError(
                    f"{self.path_of(record.name)} has CRC-32 {checksum:08x}, {self.name} says {record.crc32:08x}"
                )

    @cached_property
    def segments(self) -> pa.Table:
        """The segments, oldest first: columns `segment`, `next_segment`, `rows`, `complete`, `file`, `batch`, `row`,
        `tables_batch`, `tables_row`, and `items.<table>` for each table."""
        (record,) = (file for file in self.files if file.kind == "segments")
        with self._open(record.name) as source:
            data = source.readall()
        if len(data) != record.size or zlib.crc32(data) != record.crc32:
            raise SnapshotError(f"{self.path_of(record.name)} is not the file that {self.name} names: it is damaged")
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()

    def reusable(self) -> dict[tuple[int, int], Place]:
        """(sequence, rows) → (file, batch, row) of the segments whose rows the next snapshot need not write.

        Left out are those of files that hold little else than what has been recycled since, and of small files when there
        are many.
        """
        segments = self.segments.select(["segment", "rows", "complete", "file", "batch", "row"]).to_pylist()
        live: dict[str, int] = {}
        for s in segments:
            live[s["file"]] = live.get(s["file"], 0) + s["rows"]
        kept = {f.name for f in self.files if f.kind == "rows" and 2 * live.get(f.name, 0) >= f.rows}
        small = {f.name for f in self.files if f.name in kept and f.size < FILE_BYTES // 4}
        if len(small) > SMALL_FILES:
            kept -= small
        return {
            (s["segment"], s["rows"]): (s["file"], s["batch"], s["row"])
            for s in segments
            if s["complete"] and s["file"] in kept
        }

    def copies(self, order: Sequence[int] | None = None) -> Iterator[SegmentCopy]:
        """The segments, or those at these places of `segments`, in this order."""
        table, names = self.segments, list(self.header["tables"])
        (tables_file,) = (file.name for file in self.files if file.kind == "tables")
        batches = _Batches(self)
        for place in range(table.num_rows) if order is None else order:
            s = {
                name: column[0].as_py() for name, column in zip(table.column_names, table.slice(place, 1), strict=True)
            }
            count = s["rows"]
            steps = batches.get(s["file"], s["batch"]).slice(s["row"], count)
            known = batches.get(tables_file, s["tables_batch"]).slice(s["tables_row"], count) if names else None
            yield SegmentCopy(
                sequence=s["segment"],
                following=s["next_segment"],
                complete=s["complete"],
                count=count,
                index=steps.column("step").to_numpy(),
                rows=from_columns(self.schema, steps),
                tables={} if known is None else {name: _table_copy(name, known) for name in names},
            )

    def _open(self, name: str) -> pa.NativeFile:
        try:
            if isinstance(self.store.filesystem, fs.LocalFileSystem):
                return pa.memory_map(self.path_of(name))
            return self.store.filesystem.open_input_file(self.path_of(name))
        except FileNotFoundError as error:
            raise SnapshotError(f"{self.path_of(name)} is missing; {self.name} names it") from error


def _table_copy(name: str, known: pa.RecordBatch) -> TableCopy:
    def column(suffix: str) -> np.ndarray | None:
        index = known.schema.get_field_index(f"{name}.{suffix}")
        return None if index < 0 else known.column(index).to_numpy(zero_copy_only=False)

    member = column("member")
    assert member is not None
    return TableCopy(member, column("priority"), column("times_sampled"))


class _Batches:
    """Record batches of a snapshot's files, the last used ones kept."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._readers: dict[str, pa.ipc.RecordBatchFileReader] = {}
        self._cache: OrderedDict[tuple[str, int], pa.RecordBatch] = OrderedDict()
        self._bytes = 0

    def get(self, name: str, number: int) -> pa.RecordBatch:
        key = (name, number)
        batch = self._cache.pop(key, None)
        if batch is None:
            if name not in self._readers:
                self._readers[name] = pa.ipc.open_file(self._snapshot._open(name))
            batch = self._readers[name].get_batch(number)
            self._bytes += batch.nbytes
        self._cache[key] = batch
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= dropped.nbytes
        return batch
