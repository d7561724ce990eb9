"""What the head was told since its last checkpoint, on disk before it is acknowledged: a killed head forgets nothing.

    desk/base.json          the checkpoint that the journal continues, and the number of the file that does so
    desk/000003.jsonl       one entry on each line, in the order in which they were taken in

A file is flushed to the system, not synced to the disk: it survives the process. Where the machine is lost, the run goes on
from its last checkpoint, whose record is whole without a journal.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from cluster.files import read_json, write_json

BASE = "base.json"


class Journal:
    """Entries in numbered files; a new file is begun with each checkpoint."""

    def __init__(self, folder: Path, *, tell: Callable[[str], None]) -> None:
        """
        folder: of the files; made where it is missing.
        tell: takes a line about a disk that takes no entries; called once until it does again.
        """
        self._folder = folder
        self._tell = tell
        self._file: IO[str] | None = None
        self._number = 0
        self._session = ""  # tells the journals of a run and of its resumptions apart
        self._has_failed = False

    def begin(self, checkpoint: Path | None) -> None:
        """Start empty, behind the state in a checkpoint's folder; None stands for a run's very beginning."""
        self.close()
        if self._folder.exists():
            for path in self._files():
                path.unlink()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._session = uuid.uuid4().hex
        self._open(1)
        self._set_base(checkpoint, 1)

    def recover(self, written: Sequence[tuple[Path, Mapping[str, Any]]] = ()) -> tuple[Path | None, Iterator[Any]]:
        """The checkpoint that the journal continues, and the entries since. New ones follow behind them, in a file of their own.

        written: whole checkpoints, oldest first, each with what `rotate` returned for it. The head may have died between writing
            one and noting it here, and one of the same step takes the place of the one before.

        Raises:
            FileNotFoundError: there is no journal here.
        """
        base = read_json(self._folder / BASE)
        self._session = base["session"]
        for checkpoint, end in written:
            if end["session"] == base["session"] and end["first"] >= base["first"]:
                base |= {"checkpoint": str(checkpoint.resolve()), "first": end["first"]}
        kept = [path for path in self._files() if int(path.stem) >= base["first"]]
        self._open(max((int(path.stem) for path in kept), default=int(base["first"]) - 1) + 1)
        return None if base["checkpoint"] is None else Path(base["checkpoint"]), _entries(kept)

    def append(self, entry: Any) -> None:
        """Write an entry, anything that JSON holds; it survives this process once the call returns."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            self._file.flush()
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                self._tell(f"the record of outcomes is held in memory alone, and would be lost with the head: {error}")
            self._has_failed = True
            self._open(self._number + 1)  # what is behind a line cut off would be no entry

    def rotate(self) -> dict[str, Any]:
        """Begin a new file, because what comes from now on is not in the state that a checkpoint now takes.

        Returns where that state ends, as JSON, for `saved`.
        """
        self._open(self._number + 1)
        return {"session": self._session, "first": self._number}

    def saved(self, checkpoint: Path, end: Mapping[str, Any]) -> None:
        """A checkpoint with the state that ends at `end` is whole: what lies before is let go of.

        One that another session of the run has written changes nothing.
        """
        if end["session"] != self._session:
            return
        self._set_base(checkpoint, end["first"])
        for path in self._files():
            if int(path.stem) < end["first"]:
                path.unlink()

    def close(self) -> None:
        """Append nothing more."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self, number: int) -> None:
        self.close()
        self._number = number
        try:
            self._file = (self._folder / f"{number:06}.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            if not self._has_failed:
                self._tell(f"the record of outcomes is held in memory alone, and would be lost with the head: {error}")
            self._has_failed = True

    def _set_base(self, checkpoint: Path | None, first: int) -> None:
        name = None if checkpoint is None else str(checkpoint.resolve())
        with suppress(OSError):  # a full disk: the older base and its files still say the same
            write_json(self._folder / BASE, {"session": self._session, "checkpoint": name, "first": first})

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.jsonl"))


def _entries(files: list[Path]) -> Iterator[Any]:
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):  # cut off with the process, before it was acknowledged
                    break
                yield json.loads(line)
