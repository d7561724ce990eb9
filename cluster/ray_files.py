"""Files of a run's checkpoints for processes on nodes that do not see the run's folder: read and written through the head.

The head serves the folder (`ServedFolder`, behind its method `files`), and leaves a mark in it by which every process tells
whether it sees the same folder (`FolderMark`). `RunFiles` is what a process uses: where the folder is the same, everything is
done there, without the head; elsewhere it asks the head. For snapshots of shards the head is one more `pyarrow` file system
(`HeadFiles`), as an object store would be: rows go there as they are written, without a copy on the node's own disk, rows
files of the checkpoint before become links, which the head makes, and a shard that begins with a checkpoint reads its own part.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.fs as fs
import ray

from cluster.files import sync, write_atomically
from cluster.ray_children import HEAD

if TYPE_CHECKING:
    from replay.snapshot import SnapshotStore

SERVED = "checkpoints"  # the part of a run's folder that other nodes may read and write
MARK = ".mark"
CHUNK_BYTES = 8 << 20  # in one message; large enough that the messages cost nothing beside the bytes
ASK_S = 300.0  # the longest that the head may take for one message: a disk may be slow, a head may be coming back
FILES_GROUP = {"files": 4}  # threads of the head that serve files, so that all others stay free for the other calls

Kind = Literal["file", "folder", "absent"]
Entry = tuple[str, Kind, int]  # path below the served folder, kind, and bytes
Ask = Callable[..., Any]


@dataclass(frozen=True)
class FolderMark:
    """The folder of a run, and a random text that the head has left in it."""

    folder: str
    text: str

    @classmethod
    def leave(cls, folder: Path, *, afresh: bool) -> FolderMark:
        """Mark a folder; not `afresh` takes the mark that a dead head of the same run has left.

        It is another one for each time a run is started, for somebody may have copied the folder to this path on another node.
        """
        path = folder / MARK
        text = "" if afresh or not path.is_file() else path.read_text(encoding="ascii")
        if not text:
            text = secrets.token_hex(16)
            write_atomically(path, text.encode())
        return cls(str(folder), text)

    def is_here(self) -> bool:
        """Whether this process sees that very folder."""
        try:
            return Path(self.folder, MARK).read_text(encoding="ascii") == self.text
        except (OSError, ValueError):
            return False


class ServedFolder:
    """A folder whose files others read and write in parts. Paths are relative to it, with `/`; none leads out of it.

    Every operation may be asked for twice, with the effect of once: a head that is started again is asked again.
    """

    OPERATIONS = ("info", "entries", "read", "write", "finish", "make_folder", "link", "move", "delete")

    def __init__(self, root: Path) -> None:
        self._root = root

    def do(self, operation: str, *arguments: Any) -> Any:
        """Do one of `OPERATIONS`.

        Raises:
            ValueError: there is no such operation.
            PermissionError: a path leads out of the folder.
            OSError: what the operating system says.
        """
        if operation not in self.OPERATIONS:
            raise ValueError(f"expected one of {', '.join(self.OPERATIONS)}; received {operation!r}")
        return getattr(self, operation)(*arguments)

    def info(self, path: str) -> Entry:
        """Kind and size of what is at a path."""
        return self._entry(self._at(path))

    def entries(self, path: str, recursive: bool) -> list[Entry]:
        """What is in a folder, hidden files too."""
        found = self._at(path)
        return sorted(self._entry(one) for one in (found.rglob("*") if recursive else found.iterdir()))

    def read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset` on; fewer at the file's end."""
        with self._at(path).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def write(self, path: str, offset: int, data: bytes) -> None:
        """Put `data` at `offset`; at 0 the file begins anew."""
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if offset == 0 else 0)
        descriptor = os.open(self._at(path), flags, 0o644)
        try:
            left = memoryview(data)
            while left:
                written = os.pwrite(descriptor, left, offset)
                left, offset = left[written:], offset + written
        finally:
            os.close(descriptor)

    def finish(self, path: str) -> None:
        """Flush a file to disk."""
        sync(self._at(path))

    def make_folder(self, path: str) -> None:
        """Make a folder, and those it lies in, where there is none."""
        self._at(path).mkdir(parents=True, exist_ok=True)

    def link(self, source: str, target: str) -> None:
        """Have a file at another path too: as a link, or copied where the file system has no links."""
        found, made = self._at(source), self._at(target)
        with suppress(FileNotFoundError):
            made.unlink()
        try:
            os.link(found, made)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(found, made)
            sync(made)

    def move(self, source: str, target: str) -> None:
        """Give a file another path, over what is there."""
        found, made = self._at(source), self._at(target)
        if found.exists() or not made.exists():  # else it was moved before
            found.replace(made)
        sync(made.parent)

    def delete(self, path: str) -> None:
        """Remove a file, where there is one."""
        self._at(path).unlink(missing_ok=True)

    def _at(self, path: str) -> Path:
        root = self._root.resolve()
        found = (root / path).resolve()
        if not found.is_relative_to(root):
            raise PermissionError(errno.EACCES, f"expected a path below {root}", path)
        return found

    def _entry(self, path: Path) -> Entry:
        name = path.relative_to(self._root.resolve()).as_posix()
        if path.is_dir():
            return name, "folder", 0
        return (name, "file", path.stat().st_size) if path.is_file() else (name, "absent", 0)


class RunFiles:
    """The files of a run's checkpoints as one process has them, on whichever node it is."""

    def __init__(self, mark: FolderMark, *, ask: Ask | None = None) -> None:
        """`ask`: has the head do an operation of `ServedFolder` and returns its answer; None asks the head of this run."""
        self._mark = mark
        self._ask = ask or ask_head
        self._remote = fs.PyFileSystem(HeadFiles(self._ask))

    def store(self, folder: str | Path) -> SnapshotStore:
        """The snapshots in a folder."""
        from replay.snapshot import SnapshotStore

        path = self._served(folder)
        return SnapshotStore(folder) if path is None else SnapshotStore(self._remote, path)

    @contextmanager
    def writing(self, path: str | Path) -> Iterator[Path]:
        """Give a path at which to write what belongs at `path`, a file or a folder of files; it is there once the block ends.

        Raises:
            OSError: it could not be written, here or there.
        """
        served = self._served(path)
        if served is None:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
            local = Path(scratch, Path(path).name)
            yield local
            for file in sorted([local] if local.is_file() else (one for one in local.rglob("*") if one.is_file())):
                self._send(file, served if file == local else f"{served}/{file.relative_to(local).as_posix()}")

    @contextmanager
    def reading(self, path: str | Path) -> Iterator[Path]:
        """Give a path from which to read what is at `path`, a file or a folder with all that is in it.

        Raises:
            OSError: it could not be fetched.
        """
        served = self._served(path)
        if served is None:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="millrace-") as scratch:
            local = Path(scratch, Path(path).name)
            found: list[Entry] = [self._ask("info", served)]
            if found[0][1] == "folder":
                found += self._ask("entries", served, True)
            for name, kind, size in found:
                here = local / Path(name).relative_to(served)
                if kind == "folder":
                    here.mkdir(parents=True, exist_ok=True)
                elif kind == "file":
                    self._fetch(name, size, here)
            yield local

    def _served(self, path: str | Path) -> str | None:
        """Where the head has a path; None where this process has it itself."""
        folder = Path(self._mark.folder, SERVED)
        if self._mark.is_here() or not Path(path).is_relative_to(folder):
            return None
        return Path(path).relative_to(folder).as_posix()

    def _send(self, file: Path, path: str) -> None:
        final = PurePosixPath(path)
        self._ask("make_folder", str(final.parent))
        temporary = str(final.with_name(f".{final.name}.part"))
        with file.open("rb") as source, self._remote.open_output_stream(temporary) as target:
            while data := source.read(CHUNK_BYTES):
                target.write(data)
        self._ask("move", temporary, path)

    def _fetch(self, path: str, size: int, file: Path) -> None:
        with file.open("wb") as target:
            while (at := target.tell()) < size:
                data = self._ask("read", path, at, CHUNK_BYTES)
                if not data:
                    raise OSError(errno.EIO, f"expected {size} bytes, and the file ends after {at}", path)
                target.write(data)


class HeadFiles(fs.FileSystemHandler):  # type: ignore[misc]
    """What the head serves, as a file system for pyarrow."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadFiles)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "millrace-head"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [_file_info(*self._ask("info", path)) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        try:
            return [_file_info(*entry) for entry in self._ask("entries", selector.base_dir, selector.recursive)]
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise

    def create_dir(self, path: str, recursive: bool) -> None:
        self._ask("make_folder", path)

    def delete_dir(self, path: str) -> None:
        raise NotImplementedError("the head removes its folders itself")

    delete_dir_contents = delete_dir
    delete_root_dir_contents = delete_dir

    def delete_file(self, path: str) -> None:
        self._ask("delete", path)

    def move(self, source: str, target: str) -> None:
        self._ask("move", source, target)

    def copy_file(self, source: str, target: str) -> None:
        self._ask("link", source, target)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self._ask, path), mode="r")

    open_input_file = open_input_stream

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Writer(self._ask, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("files of a checkpoint are written once")


class _Reader:
    """A file of the head, read in chunks, of which the last is kept."""

    closed = False

    def __init__(self, ask: Ask, path: str) -> None:
        self._ask, self._path = ask, path
        name, kind, self._size = ask("info", path)
        if kind != "file":
            raise FileNotFoundError(errno.ENOENT, "the head has no such file", name)
        self._at = self._begin = 0  # where to read next; where the chunk lies
        self._chunk = b""

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        parts = []
        while self._at < end:
            inside = self._at - self._begin
            if not 0 <= inside < len(self._chunk):
                self._begin, inside = self._at, 0
                self._chunk = self._ask("read", self._path, self._at, CHUNK_BYTES)
                if not self._chunk:
                    raise OSError(
                        errno.EIO, f"expected {self._size} bytes, and the file ends after {self._at}", self._path
                    )
            parts.append(self._chunk[inside : inside + end - self._at])
            self._at += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed, self._chunk = True, b""


class _Writer:
    """A file of the head that is written in chunks; closed, it is on the head's disk."""

    closed = False

    def __init__(self, ask: Ask, path: str) -> None:
        self._ask, self._path = ask, path
        self._chunk = bytearray()
        self._sent = 0
        ask("write", path, 0, b"")  # so that an error of the path is one of the opening

    def write(self, data: Any) -> int:
        self._chunk += data
        while len(self._chunk) >= CHUNK_BYTES:
            self._send(CHUNK_BYTES)
        return len(data)

    def _send(self, size: int) -> None:
        self._ask("write", self._path, self._sent, bytes(self._chunk[:size]))
        del self._chunk[:size]
        self._sent += size

    def tell(self) -> int:
        return self._sent + len(self._chunk)

    def writable(self) -> bool:
        return True

    def flush(self) -> None: ...

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self._chunk:
                self._send(len(self._chunk))
            self._ask("finish", self._path)


def ask_head(operation: str, *arguments: Any) -> Any:
    """Have the head of this run do an operation of `ServedFolder`.

    Raises:
        OSError: as the operation does; or the head is gone, or did not answer.
    """
    try:
        return ray.get(ray.get_actor(HEAD).files.remote(operation, *arguments), timeout=ASK_S)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise type(error.cause)(error.cause.errno, error.cause.strerror, error.cause.filename) from error
        raise
    except (ValueError, ray.exceptions.RayActorError) as error:
        raise OSError(errno.EHOSTUNREACH, f"the head of the run, which has this file, is gone: {error}") from error
    except ray.exceptions.GetTimeoutError as error:
        raise OSError(errno.ETIMEDOUT, f"the head of the run did not {operation} a file within {ASK_S:g} s") from error


def _file_info(path: str, kind: Kind, size: int) -> fs.FileInfo:
    types = {"file": fs.FileType.File, "folder": fs.FileType.Directory, "absent": fs.FileType.NotFound}
    return fs.FileInfo(path, types[kind], size=size if kind == "file" else None)
