"""Metrics of a run: one row per report tick, kept as Parquet part files and as TensorBoard events.

`metrics/part-000007.parquet` holds the rows of one stretch of time; `metrics/part-000001-000100.parquet` is the same as
its hundred parts and replaces them. The order of part numbers, and of rows in a part, is the order of writing.
"""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.files import DiskFullError, is_disk_full, write_atomically

FOLDER = "metrics"
_PART = re.compile(r"part-(\d{6,})(?:-(\d{6,}))?\.parquet")
_MOST_PARTS = 100


class MetricsWriter:
    """Appends rows to `<run folder>/metrics/`.

    A row maps names to numbers; its names may differ from row to row, and what a row lacks reads as null. Rows reach disk
    after `rows_per_part` rows or `seconds_per_part` seconds, whichever is first, so a crash loses at most that much.
    A second writer on the same folder, as after a resume, goes on behind the rows that are there.
    """

    def __init__(self, folder: Path, *, rows_per_part: int = 512, seconds_per_part: float = 30.0) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".part-*.tmp"):
            leftover.unlink()
        self._rows_per_part = rows_per_part
        self._seconds_per_part = seconds_per_part
        self._rows: list[dict[str, float | None]] = []
        self._oldest_row = 0.0
        parts = _parts(self._folder)
        self._next_part = parts[-1][1] + 1 if parts else 1
        # Only when rows follow older ones may TensorBoard have to drop events of steps that are now taken again.
        self._resumed = bool(parts)
        self._events: Any = None
        self._events_ended = False
        self._closed = False

    def write(self, row: Mapping[str, float | None]) -> None:
        """Add one row; its TensorBoard step is `env_steps`, or else `step`, where one of them is there.

        Raises:
            ValueError: the writer is closed, or a value is no number.
            DiskFullError: a part file found no room; its rows are kept and tried again with the next row.
        """
        if self._closed:
            raise ValueError(f"metrics of {self._folder} are closed; make a new MetricsWriter to append")
        if not self._rows:
            self._oldest_row = time.monotonic()
        clean = {key: _number(key, value) for key, value in row.items()}
        self._rows.append(clean)
        self._write_events(clean)
        if len(self._rows) >= self._rows_per_part or time.monotonic() - self._oldest_row >= self._seconds_per_part:
            self.flush()

    def waiting(self) -> dict[str, Any]:
        """The rows that are not on disk yet, as JSON, for `restore`."""
        return {"part": self._next_part, "rows": list(self._rows)}

    def restore(self, waiting: Mapping[str, Any]) -> None:
        """Take over what waited in a writer that was killed, before the first row; rows that have reached disk are not repeated."""
        self._resumed = True
        if waiting["rows"] and waiting["part"] == self._next_part:
            self._rows = [dict(row) for row in waiting["rows"]]
            self._oldest_row = time.monotonic()

    def flush(self) -> None:
        """Write the buffered rows as one part file."""
        if self._rows:
            _write_part(self._folder / f"part-{self._next_part:06d}.parquet", _table(self._rows))
            self._rows = []
            self._next_part += 1
            singles = [part for part in _parts(self._folder) if part[0] == part[1]]
            if len(singles) >= _MOST_PARTS:
                _merge(self._folder, singles)
        if self._events is not None:
            self._on_events(self._events.flush)

    def close(self) -> None:
        """Write what is buffered and merge all parts into one; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        _merge(self._folder, _parts(self._folder))
        if self._events is not None:
            self._on_events(self._events.close)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_events(self, row: Mapping[str, float | None]) -> None:
        step = int(row.get("env_steps") or row.get("step") or 0)
        if self._events is None and not self._events_ended:
            self._on_events(lambda: self._open_events(step))
        if self._events is not None:
            values = {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
            self._on_events(lambda: self._events.write_event(_event(step, values)))

    def _open_events(self, step: int) -> None:
        """Begin an event file, written in this thread: tensorboardX's own thread dies of a full disk, and its queue blocks."""
        folder = self._folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = _tensorboard().EventsWriter(str(folder / "events"))
        if self._resumed:  # TensorBoard drops the events of steps that are taken again
            self._events.write_event(_tensorboard().Event(step=step, session_log={"status": "START"}))

    def _on_events(self, act: Callable[[], object]) -> None:
        """Do something with the event file. What a full disk has cut short cannot be gone on with: it ends there."""
        try:
            act()
        except OSError as error:
            self._events, self._events_ended = None, True
            if not is_disk_full(error):
                raise
            advice = "the TensorBoard events end here; the Parquet metrics go on once there is room"
            raise DiskFullError(self._folder, what="TensorBoard events", needed=1 << 16, advice=advice) from error


def read_metrics(folder: Path) -> pa.Table:
    """All rows of `<run folder>/metrics/` in the order in which they were written, one float64 column per name.

    A file that cannot be read is left out with a warning that names it. No rows at all give a table without columns.
    """
    while True:
        try:
            tables = [table for _, _, path in _parts(folder / FOLDER) if (table := _read_part(path)) is not None]
            return pa.concat_tables(tables, promote_options="default") if tables else pa.table({})
        except FileNotFoundError:
            # The run's writer merged parts between the listing and the reading; the merged file is there now.
            continue


def _number(key: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {key!r} must be a number or None, got {value!r}") from error


def _table(rows: list[dict[str, float | None]]) -> pa.Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names})


def _write_part(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes(), advice="metrics go on once there is room")


def _read_part(path: Path) -> pa.Table | None:
    try:
        return pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        warnings.warn(f"{path} is damaged and left out: {error}", RuntimeWarning, stacklevel=3)
        return None


def _spans(folder: Path) -> list[tuple[int, int, Path]]:
    """First and last part number and path of every part file; of two that begin alike, the wider first."""
    spans = []
    for path in folder.glob("part-*.parquet"):
        if match := _PART.fullmatch(path.name):
            spans.append((int(match[1]), int(match[2] or match[1]), path))
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def _parts(folder: Path) -> list[tuple[int, int, Path]]:
    """The part files in order, without those whose rows a merged file already holds."""
    parts: list[tuple[int, int, Path]] = []
    for span in _spans(folder):
        if not parts or span[0] > parts[-1][1]:
            parts.append(span)
    return parts


def _merge(folder: Path, parts: list[tuple[int, int, Path]]) -> None:
    """Replace neighbouring parts by one file; after a crash half-way the reader ignores what the new file holds."""
    if len(parts) < 2:
        return
    tables = [_read_part(path) for _, _, path in parts]
    # A damaged part stays, in case somebody can mend it, so no file may be written that would hide it.
    whole = [table for table in tables if table is not None]
    if len(whole) < len(parts):
        return
    first, last = parts[0][0], parts[-1][1]
    merged = folder / f"part-{first:06d}-{last:06d}.parquet"
    _write_part(merged, pa.concat_tables(whole, promote_options="default"))
    for span in _spans(folder):
        if first <= span[0] and span[1] <= last and span[2] != merged:
            span[2].unlink()


@cache
def _tensorboard() -> SimpleNamespace:
    """What is used of tensorboardX, which imports torch where it finds it, only to accept tensors: 1.5 s and 200 MB."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
    finally:
        if hide:
            del sys.modules["torch"]
    return SimpleNamespace(EventsWriter=EventsWriter, Event=Event)


def _event(step: int, values: Mapping[str, float]) -> Any:
    scalars = [{"tag": key, "simple_value": value} for key, value in values.items()]
    return _tensorboard().Event(wall_time=time.time(), step=step, summary={"value": scalars})
