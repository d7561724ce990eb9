"""Files of a run that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any


class DiskFullError(OSError):
    """The disk that holds `path` has no room for what was to be written there."""

    def __init__(self, path: Path, *, what: str, needed: int, advice: str) -> None:
        free = shutil.disk_usage(existing_parent(path)).free
        super().__init__(
            errno.ENOSPC,
            f"no room on disk for {what}: {size_text(free)} free, {size_text(needed)} needed; {advice}",
            str(path),
        )
        self.free = free
        self.needed = needed


def is_disk_full(error: OSError) -> bool:
    """Whether the system refused to write because the disk or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def existing_parent(path: Path) -> Path:
    """The path itself, or its nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path


def size_text(size: int) -> str:
    """Bytes for a person, in decimal units as `df -H` gives them: 1 500 000 is `1.5 MB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def sync(path: Path) -> None:
    """Flush a file or a folder to disk, whichever process wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, advice: str = "free some space") -> None:
    """Put `data` at `path`: readers and crashes see the old file or the new one, never a part.

    Raises:
        DiskFullError: too little room; the old file is untouched and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFullError(path, what=f"{path.name}", needed=len(data), advice=advice) from error
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that every reader accepts: NaN and infinities, which JSON lacks, become null."""
    write_atomically(path, (json.dumps(without_nonfinite(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one raises ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def without_nonfinite(value: Any) -> Any:
    """A copy of a JSON value with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return value
