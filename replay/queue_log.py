"""A log of records in a mapped file that is used as a ring: what a queue table writes before it answers.

Layout: one page of head, then the ring.

    0     magic, written last when the file is made
    64    size of the ring, SHA-256 of what the log's owner stores in it
    256   number of the last commit: one aligned 8-byte store publishes it
    512   commit record of even numbers        1024  of odd numbers
    4096  ring

A record lies in one piece, in multiples of 64 bytes. Records are written behind the last committed one; then the commit record
(first and end position, the owner's counters, a checksum) goes to the slot that is not in use, and its number is
published. Whatever kills the process, the log then ends with its last whole commit. Positions count bytes over the log's
life; the place in the ring is their remainder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .faults import fault
from .files import open_locked

ALIGN = 64  # bytes; Arrow reads buffers so aligned without a copy
PAGE = 4096
COUNTERS = 16
PAD = 0  # the kind of a record that fills the ring's end
_MAGIC = int.from_bytes(b"MILLQUE1", "little")
_IDENTITY, _CURRENT, _SLOT, _SLOT_STEP = 64, 256, 512, 512
_HEAD = struct.Struct("<IIqqIIqQ")  # checksum, kind, number, size, bytes of meta, 0, bytes of payload, position
_COMMIT = struct.Struct(f"<qqq{COUNTERS}q")
_CHECKSUM = struct.Struct("<I")


class LogError(ValueError):
    """The file holds something else than expected."""


@dataclass
class Record:
    """Where a record lies."""

    kind: int
    number: int
    position: int
    size: int  # bytes, head and filling included


def encode(meta: dict[str, Any]) -> bytes:
    """The meta of a record as it is stored."""
    return json.dumps(meta, separators=(",", ":")).encode()


def record_size(meta: int, payload: int) -> int:
    """Bytes that a record takes whose meta and payload are so long."""
    return _aligned(_HEAD.size + meta) + _aligned(payload)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class RingLog:
    """Records of JSON and bytes, oldest first, of which the owner drops the oldest to make room."""

    def __init__(self, path: str | Path, *, size: int, identity: bytes) -> None:
        """Open the file at `path`, or make it.

        size: bytes of the ring.
        identity: what the owner's records depend on, such as their schema; another one is refused.

        Raises:
            OSError: the folder has too little space (ENOSPC, with what is free and what is needed), or another process
                holds the file.
            LogError: the file is another log's, or damaged.
        """
        self.path = Path(path)
        self.size = -(-size // PAGE) * PAGE
        self.records: deque[Record] = deque()  # all that are committed or about to be, fillings included
        self.counters = [0] * COUNTERS
        self.begin = self.end = 0
        self._committed_begin = 0
        self._commits = 0
        self._fd = open_locked(self.path, "a queue's file", "choose another directory")
        try:
            self._reserve()
            self._map = mmap.mmap(self._fd, PAGE + self.size)
            self._bytes = memoryview(self._map)
            self._words = np.frombuffer(self._map, np.int64, PAGE // 8)
            self._load(hashlib.sha256(identity).digest())
        except BaseException:
            self.close(remove=False)
            raise

    # ------------------------------------------------------------------- file

    def _reserve(self) -> None:
        wanted, found = PAGE + self.size, os.fstat(self._fd).st_size
        if found not in (0, wanted) and self._is_made():
            raise LogError(
                f"{self.path} holds a queue of another capacity: expected {wanted} bytes, found {found}; set the "
                f"capacity it was made with, or remove the file and the rows in it"
            )
        try:
            if found != wanted:
                os.ftruncate(self._fd, 0)
            # Pages of a sparse file are found missing only when they are touched, as a SIGBUS; this finds it now.
            os.posix_fallocate(self._fd, 0, wanted)
        except OSError as error:
            free = os.statvfs(self.path.parent)
            if found == 0:
                self.path.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            raise OSError(
                errno.ENOSPC,
                f"{self.path.parent} has {free.f_bavail * free.f_frsize / 2**20:.0f} MiB free and the queue needs "
                f"{wanted / 2**20:.0f} MiB; lower its capacity_bytes, choose a directory on a larger disk, or free "
                f"what `millrace clean` lists (Ray's object store lives in /dev/shm too)",
            ) from None

    def _is_made(self) -> bool:
        return os.pread(self._fd, 8, 0) == _MAGIC.to_bytes(8, "little")

    def _load(self, identity: bytes) -> None:
        head = struct.pack("<q", self.size) + identity
        if not self._is_made():
            self._bytes[_IDENTITY : _IDENTITY + len(head)] = head
            self.commit(self.counters)
            self._words[0] = _MAGIC
            return
        if self._bytes[_IDENTITY : _IDENTITY + len(head)] != head:
            raise LogError(
                f"{self.path} holds a queue with other columns or group size than this one; remove it, or give this "
                f"run another name"
            )
        self._commits = int(self._words[_CURRENT // 8])
        at = _SLOT + self._commits % 2 * _SLOT_STEP
        record = self._bytes[at : at + _COMMIT.size]
        (checksum,) = _CHECKSUM.unpack_from(self._bytes, at + _COMMIT.size)
        number, begin, end, *counters = _COMMIT.unpack(record)
        if zlib.crc32(record) != checksum or number != self._commits or not 0 <= end - begin <= self.size:
            raise LogError(f"{self.path} is damaged: its commit record {self._commits} does not match its checksum")
        self.begin = self._committed_begin = begin
        self.end, self.counters = end, list(counters)
        self._scan()

    def _scan(self) -> None:
        at = self.begin
        while at < self.end:
            checksum, kind, number, size, meta, _, payload, position = _HEAD.unpack_from(self._bytes, self._place(at))
            whole = position == at and ALIGN <= size <= self.end - at and size % ALIGN == 0
            if not whole or (kind != PAD and record_size(meta, payload) != size):
                raise LogError(f"{self.path} is damaged at byte {at}: no record begins there")
            record = Record(kind, number, at, size)
            if kind != PAD and self._checksum(record) != checksum:
                raise LogError(f"{self.path} is damaged at byte {at}: record {number} does not match its checksum")
            self.records.append(record)
            at += size

    def _place(self, position: int) -> int:
        return PAGE + position % self.size

    def _checksum(self, record: Record) -> int:
        place = self._place(record.position)
        return zlib.crc32(self._bytes[place + _CHECKSUM.size : place + record.size])

    def close(self, *, remove: bool) -> None:
        """Let go of the file; `remove`: delete it, with the rows in it."""
        if self._fd >= 0:
            if remove:
                self.path.unlink(missing_ok=True)
            fcntl.flock(
                self._fd, fcntl.LOCK_UN
            )  # the mapping holds a copy of the descriptor, and lives a little longer
            os.close(self._fd)
            self._fd = -1

    # ---------------------------------------------------------------- records

    @property
    def free(self) -> int:
        """Bytes that can be written, as far as the oldest record that a crash now would need."""
        return self.size - (self.end - self._committed_begin)

    def room_for(self, size: int) -> int:
        """Bytes that a record of `size` bytes takes where it would come now, with the filling before it."""
        left = self.size - self.end % self.size
        return size if size <= left else left + size

    def append(self, kind: int, number: int, meta: bytes, payload: Any = b"") -> Record:
        """Write a record behind the last one. It counts once `commit` returns. The caller has made room for it.

        Raises:
            LogError: there is no room.
        """
        body = memoryview(payload)
        size = record_size(len(meta), body.nbytes)
        if self.room_for(size) > self.free:
            raise LogError(f"no room for a record of {size} bytes in {self.path}: {self.free} bytes are free")
        left = self.size - self.end % self.size
        if size > left:
            _HEAD.pack_into(self._bytes, self._place(self.end), 0, PAD, 0, left, 0, 0, 0, self.end)
            self.records.append(Record(PAD, 0, self.end, left))
            self.end += left
        record = Record(kind, number, self.end, size)
        place = self._place(self.end)
        _HEAD.pack_into(self._bytes, place, 0, kind, number, size, len(meta), 0, body.nbytes, self.end)
        at = place + _HEAD.size
        self._bytes[at : at + len(meta)] = meta
        at = place + _aligned(_HEAD.size + len(meta))
        self._bytes[at : at + body.nbytes] = body.cast("B")
        _CHECKSUM.pack_into(self._bytes, place, self._checksum(record))
        self.records.append(record)
        self.end += size
        return record

    def read(self, record: Record) -> tuple[dict[str, Any], pa.Buffer]:
        """A record's meta, and its payload where it lies: valid until the record is dropped."""
        place = self._place(record.position)
        _, _, _, _, length, _, payload, _ = _HEAD.unpack_from(self._bytes, place)
        at = place + _HEAD.size
        meta: dict[str, Any] = json.loads(bytes(self._bytes[at : at + length]))
        at = place + _aligned(_HEAD.size + length)
        return meta, pa.py_buffer(self._bytes[at : at + payload])

    def drop_first(self) -> None:
        """Let go of the oldest record. Its bytes are written over only after the next `commit`."""
        self.begin += self.records.popleft().size

    def commit(self, counters: Sequence[int], *, point: str | None = None) -> None:
        """Publish everything written and dropped since the last commit.

        point: where in the owner's work this is, for `fault`: dies there after the rows, after the commit record, and after
            its publication (`<point>.rows`, `.record`, `.commit`).
        """
        if point:
            fault(f"{point}.rows")
        number = self._commits + 1
        at = _SLOT + number % 2 * _SLOT_STEP
        record = _COMMIT.pack(number, self.begin, self.end, *counters)
        self._bytes[at : at + len(record)] = record
        _CHECKSUM.pack_into(self._bytes, at + len(record), zlib.crc32(record))
        if point:
            fault(f"{point}.record")
        self._words[_CURRENT // 8] = number  # one aligned store: the old commit or the new one
        self._commits, self._committed_begin = number, self.begin
        self.counters = list(counters)
        if point:
            fault(f"{point}.commit")

    def undo(self) -> None:
        """Forget what was written since the last commit; nothing may have been dropped since."""
        at = _SLOT + self._commits % 2 * _SLOT_STEP
        _, _, end, *_ = _COMMIT.unpack_from(self._bytes, at)
        while self.records and self.records[-1].position >= end:
            self.records.pop()
        self.end = end
