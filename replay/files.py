"""Memory-mapped storage files: reserved in full when they are made, named after their run, listed when their run is dead."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LOCK_S = 1.0  # how long a file held by somebody else is waited for
_NAME = re.compile(r"^millrace\.(?P<run>.+)\.shard(?P<shard>\d+)\.(?P<part>[a-z]\w*)$")


def storage_path(directory: str | Path, *, run: str, shard: int, part: str) -> Path:
    """Where a part of a shard's storage lies."""
    return Path(directory) / f"millrace.{run}.shard{shard}.{part}"


def open_locked(path: Path, what: str, advice: str) -> int:
    """A descriptor of the file at `path`, made if it is not there, which this process alone holds.

    Raises:
        OSError: the folder is missing, or another process holds the file; told with `what` the file is and `advice`.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            text = f"cannot make {what} in {path.parent} ({error.strerror}); {advice}"
            raise OSError(error.errno, text) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return fd
            os.close(fd)  # whoever held it has removed it meanwhile: what is there now is another file
        except BlockingIOError as error:
            os.close(fd)
            if time.monotonic() >= deadline:
                text = f"{path} is in use by another process; give this run another name"
                raise OSError(error.errno, text) from None
            time.sleep(0.01)  # somebody may just be looking: see `leftovers`


def _is_at(path: Path, fd: int) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


class StorageFile:
    """A file of fixed size, mapped into memory, that this process holds locked. It outlives the process unless `close` removes it."""

    def __init__(
        self,
        directory: str | Path,
        *,
        run: str,
        shard: int,
        size: int,
        part: str = "steps",
        keep: bool = False,
        marks: Sequence[int] = (0,),
    ) -> None:
        """Reserve `size` bytes under `directory`.

        part: what of the shard lies in it.
        keep: take over what a dead process left there, when it has the same size (`found` tells); else it is emptied.
        marks: offsets of words, one of which at least is not 0 in a file that its owner had finished making. One that was
            killed before it had leaves a file that is not taken over.

        Raises:
            OSError: the folder has too little space (ENOSPC, naming the path, what is free and what is needed) or is missing,
                or another process holds the file.
        """
        self.path = storage_path(directory, run=run, shard=shard, part=part)
        self.size = size
        self._open()
        found = os.fstat(self._fd).st_size
        self.found = keep and found == size and any(any(os.pread(self._fd, 8, at)) for at in marks)
        if found and not self.found:
            # Not emptied but replaced: somebody may still have the old one mapped.
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._open()
        try:
            # Pages of a sparse file are found missing only when they are touched, as a SIGBUS; this finds it now.
            os.posix_fallocate(self._fd, 0, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            free = os.statvfs(directory)
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            if error.errno not in (errno.ENOSPC, errno.EFBIG):
                raise
            raise OSError(
                errno.ENOSPC,
                f"{directory} has {free.f_bavail * free.f_frsize / 2**20:.0f} MiB free and the replay shard needs "
                f"{size / 2**20:.0f} MiB; lower replay.capacity, set replay.directory to a larger disk, or free what "
                f"`millrace clean` lists (Ray's object store lives in /dev/shm too)",
            ) from None

    def _open(self) -> None:
        self._fd = open_locked(self.path, "a storage file", "set replay.directory")

    def array(self) -> np.ndarray:
        """The mapped bytes as uint8 (size,)."""
        return np.frombuffer(self._map, np.uint8)

    def close(self, *, remove: bool = True) -> None:
        """Let go of the file, and remove it unless told otherwise; the mapping lives on until its last array is gone."""
        if self._fd >= 0:
            if remove:
                self.path.unlink(missing_ok=True)
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, which would hold it
            os.close(self._fd)
            self._fd = -1


def map_for_reading(path: str | Path) -> np.ndarray:
    """The bytes of another process's storage file, uint8 (size,), read-only.

    Raises:
        OSError: there is no such file, or it is another user's.
    """
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


@dataclass(frozen=True)
class Leftover:
    """A storage file whose process is gone."""

    path: Path
    run: str
    shard: int
    size: int


def leftovers(directory: str | Path) -> list[Leftover]:
    """Storage files in `directory` that no living process holds."""
    found = []
    for path in sorted(Path(directory).glob("millrace.*")):
        match = _NAME.match(path.name)
        if match is None:
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # removed meanwhile, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                found.append(Leftover(path, match["run"], int(match["shard"]), os.fstat(fd).st_size))
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return found
