"""How the files of a snapshot are written: record batches of several segments each, checksums counted on the way."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs

from .columns import SCHEMA_KEY, arrow_fields, concatenate_rows, to_columns
from .copies import SegmentCopy
from .schema import StepSchema

FILE_BYTES = 64 << 20  # a rows file ends when it holds more than this
BATCH_ROWS, BATCH_BYTES = 8192, 4 << 20  # a record batch ends with the segment that exceeds one of these
Place = tuple[str, int, int]  # file, batch in it, and row of that batch


@dataclass(frozen=True)
class FileRecord:
    """One file of a snapshot. `kind` is rows, open, tables or segments; `rows` counts what it holds."""

    name: str
    kind: str
    rows: int
    size: int
    crc32: int


def sync(filesystem: fs.FileSystem, path: str) -> None:
    """Flush a file or folder to disk. An object store has a file once its stream is closed."""
    if isinstance(filesystem, fs.LocalFileSystem):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _ArrowFile:
    """An Arrow IPC file that is being written."""

    closed = False  # this, `write`, `flush` and `close` are what pyarrow asks of a Python file

    def __init__(
        self, filesystem: fs.FileSystem, folder: str, name: str, schema: pa.Schema, *, compression: str | None
    ) -> None:
        self.name = name
        self.size = self.rows = self.batches = 0
        self._crc32 = 0
        self._filesystem, self._path = filesystem, f"{folder}/{name}"
        self._stream = filesystem.open_output_stream(self._path)
        self._sink = pa.PythonFile(self, mode="w")
        options = pa.ipc.IpcWriteOptions(compression=compression)
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)

    def write(self, data: Any) -> None:
        self._crc32 = crc32(data, self._crc32)
        self.size += len(data)
        self._stream.write(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def add(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self.rows += batch.num_rows
        self.batches += 1

    def finish(self, kind: str) -> FileRecord:
        self._writer.close()
        self._stream.close()
        sync(self._filesystem, self._path)
        return FileRecord(self.name, kind, self.rows, self.size, self._crc32)

    def abandon(self) -> None:
        with suppress(OSError, pa.ArrowException):
            self._stream.close()


class _Rows:
    """Rows of segments on their way into files, several segments to a batch and many to a file."""

    def __init__(self, files: SnapshotFiles, kind: str) -> None:
        self._files, self._kind = files, kind
        self._file: _ArrowFile | None = None
        self._made = 0
        self._waiting: list[SegmentCopy] = []
        self._count = 0

    def add(self, segment: SegmentCopy) -> Place:
        """Returns where the segment's first row will lie."""
        files = self._files
        if self._file is None:
            self._file = files.open(self._kind, f"-{self._made:04d}", files.rows_schema)
            self._made += 1
        place = (self._file.name, self._file.batches, self._count)
        self._waiting.append(segment)
        self._count += segment.count
        row_bytes = files.schema.dtype.itemsize
        if self._count >= BATCH_ROWS or self._count * row_bytes >= BATCH_BYTES:
            self._flush(self._file)
            if self._file.rows * row_bytes >= FILE_BYTES:
                self.finish()
        return place

    def _flush(self, file: _ArrowFile) -> None:
        waiting = self._waiting
        if waiting:
            rows = concatenate_rows([s.rows for s in waiting if s.rows is not None])
            numbers = np.repeat(np.array([s.sequence for s in waiting], np.int64), [s.count for s in waiting])
            step = np.concatenate([np.asarray(s.index, np.int64) for s in waiting])
            columns = [pa.array(numbers), pa.array(step), *to_columns(self._files.schema, rows)]
            file.add(pa.record_batch(columns, schema=self._files.rows_schema))
        self._waiting, self._count = [], 0

    def finish(self) -> None:
        if self._file is not None:
            self._flush(self._file)
            self._files.end(self._file, self._kind)
            self._file = None


class SnapshotFiles:
    """The files of one snapshot of a shard, while they are being written."""

    def __init__(self, filesystem: fs.FileSystem, folder: str, number: int, header: Mapping[str, Any]) -> None:
        self.schema = StepSchema.from_json(header["schema"])
        place = [pa.field("segment", pa.int64(), nullable=False), pa.field("step", pa.int64(), nullable=False)]
        self.rows_schema = pa.schema([*place, *arrow_fields(self.schema)], metadata={SCHEMA_KEY: header["schema"]})
        self.referenced: set[str] = set()  # files of an earlier snapshot that this one needs
        self._filesystem, self._folder = filesystem, folder
        # A number may be tried again after a crash; what an earlier try has left is never mistaken for this one's.
        self._tag = f"{number:08d}-{secrets.token_hex(4)}"
        self._table_names = list(header["tables"])
        self._made: list[str] = []
        self._open: list[_ArrowFile] = []
        self._records: list[FileRecord] = []
        self._rows = {kind: _Rows(self, kind) for kind in ("rows", "open")}
        self._segments: list[dict[str, Any]] = []
        self._tables: _ArrowFile | None = None
        self._known: list[dict[str, np.ndarray]] = []  # columns of the tables file that wait
        self._known_rows = 0

    def open(self, kind: str, suffix: str, schema: pa.Schema, *, compression: str | None = None) -> _ArrowFile:
        name = f"{kind}-{self._tag}{suffix}.arrow"
        self._made.append(name)
        file = _ArrowFile(self._filesystem, self._folder, name, schema, compression=compression)
        self._open.append(file)
        return file

    def end(self, file: _ArrowFile, kind: str) -> None:
        self._records.append(file.finish(kind))
        self._open.remove(file)

    def take_over(self, record: FileRecord) -> None:
        """Count a file of an earlier snapshot, which is being brought here, among those made."""
        self._made.append(record.name)

    def add(self, segment: SegmentCopy, place: Place | None) -> None:
        """`place`: where the segment's rows lie already; None writes them."""
        if segment.count == 0:
            return
        if place is not None:
            self.referenced.add(place[0])
        elif segment.rows is None:
            raise ValueError(f"segment {segment.sequence} came without rows, and no earlier snapshot has them")
        else:
            place = self._rows["rows" if segment.complete else "open"].add(segment)
        self._segments.append(
            {
                "segment": segment.sequence,
                "next_segment": segment.following,
                "rows": segment.count,
                "complete": segment.complete,
                **dict(zip(("file", "batch", "row"), place, strict=True)),
                "tables_batch": 0 if self._tables is None else self._tables.batches,
                "tables_row": self._known_rows,
                **{f"items.{t}": int(np.count_nonzero(segment.tables[t].member)) for t in self._table_names},
            }
        )
        if self._table_names:
            self._known.append(
                {
                    f"{name}.{suffix}": values
                    for name in self._table_names
                    for suffix, values in vars(segment.tables[name]).items()
                    if values is not None
                }
            )
            self._known_rows += segment.count
            if self._known_rows >= BATCH_ROWS:
                self._flush_tables()

    def _flush_tables(self) -> None:
        if self._known:
            names = list(self._known[0])
            columns = [pa.array(np.concatenate([known[name] for known in self._known])) for name in names]
            batch = pa.record_batch(columns, names=names)
            if self._tables is None:
                # Flags and priorities are the same few values over and over.
                self._tables = self.open("tables", "", batch.schema, compression="lz4")
            self._tables.add(batch)
        self._known, self._known_rows = [], 0

    def finish(self) -> list[FileRecord]:
        """Write what waits. Returns the files made."""
        for rows in self._rows.values():
            rows.finish()
        self._flush_tables()
        self.end(self._tables or self.open("tables", "", pa.schema([])), "tables")
        types = {"complete": pa.bool_(), "file": pa.string()}
        names = ["segment", "next_segment", "rows", "complete", "file", "batch", "row", "tables_batch", "tables_row"]
        names += [f"items.{name}" for name in self._table_names]
        schema = pa.schema([pa.field(name, types.get(name, pa.int64()), nullable=False) for name in names])
        file = self.open("segments", "", schema)
        file.add(pa.RecordBatch.from_pylist(self._segments, schema=schema))
        self.end(file, "segments")
        return self._records

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._open:
            file.abandon()
        for name in self._made:
            with suppress(OSError):
                self._filesystem.delete_file(f"{self._folder}/{name}")
