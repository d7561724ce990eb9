"""The log of one process of a run: lines of JSON on its standard error, and the newest of them in memory for whoever asks.

    {"time": 1767225600.25, "level": "warning", "run": "a", "role": "actor", "id": "3", "node": "10.0.0.7", "pid": 4711,
     "logger": "cluster.ray_workers", "text": "…", "exception": "Traceback …"}

Ray keeps what a process writes to its standard error in its session's logs on that node, and shows it on its dashboard.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any, TextIO

MOST_LINES = 1000  # kept in memory
MOST_CHARACTERS = 8192  # of a text, or of the end of an exception: a line must not fill the memory, or a terminal
OURS = ("actors", "cluster", "configs", "learners", "replay")  # told from `info` on, everybody else from `warning` on


class ProcessLog(logging.Handler):
    """Takes whatever this process logs; `install` makes it, once for a process."""

    def __init__(self, *, run: str, role: str, id: str, node: str, stream: TextIO | None = None) -> None:
        """
        role, id: of this process in the run, such as "actor" and "3"; the id is empty where there is only one.
        node: address of the node that it is on.
        stream: where the lines go besides; None takes the standard error.
        """
        super().__init__()
        self._about = {"run": run, "role": role, "id": id, "node": node, "pid": os.getpid()}
        self._stream = stream
        self._lines: deque[dict[str, Any]] = deque(maxlen=MOST_LINES)
        self._count = 0
        self.setFormatter(logging.Formatter())  # of exceptions

    @classmethod
    def install(cls, *, run: str, role: str, id: str, node: str, stream: TextIO | None = None) -> ProcessLog:
        """Have all that this process logs or warns of, and errors that end its threads, go to a new log, and to no earlier one."""
        root = logging.getLogger()
        for handler in [one for one in root.handlers if isinstance(one, ProcessLog)]:
            root.removeHandler(handler)
        made = cls(run=run, role=role, id=id, node=node, stream=stream)
        root.addHandler(made)
        for name in OURS:
            logging.getLogger(name).setLevel(logging.INFO)
        logging.captureWarnings(True)
        threading.excepthook = _log_end_of_thread
        return made

    def emit(self, record: logging.LogRecord) -> None:
        line: dict[str, Any] = {"time": record.created, "level": _level(record.levelno), **self._about}
        line |= {"logger": record.name, "text": _text(record)}
        if record.exc_info and record.exc_info[0] is not None and self.formatter is not None:
            line["exception"] = self.formatter.formatException(record.exc_info)[-MOST_CHARACTERS:]
        self._count += 1  # `logging` lets one thread in at a time
        self._lines.append({"number": self._count, "kind": "log", **line})
        with suppress(OSError, ValueError):  # a full disk under Ray's logs, or a stream that was closed
            stream = self._stream or sys.stderr
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()

    def after(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """The lines that are kept with numbers above this one, oldest first, and the number to ask for the next ones with.

        A line has, besides what is written, its `number`, which counts from 1 on, and the `kind` "log"; the text of one with an
        exception ends with that.
        """
        self.acquire()
        try:
            found, count = [line for line in self._lines if line["number"] > number], self._count
        finally:
            self.release()
        return [{**line, "text": _whole(line)} for line in found], count


def _text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception as error:  # of a format that does not fit its arguments
        text = f"{record.msg!r} % {record.args!r}: {error}"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _whole(line: dict[str, Any]) -> str:
    return "\n".join(line[key] for key in ("text", "exception") if key in line)


def _level(number: int) -> str:
    return "error" if number >= logging.ERROR else "warning" if number >= logging.WARNING else "info"


def _log_end_of_thread(ended: threading.ExceptHookArgs) -> None:
    if ended.exc_type is not SystemExit and ended.exc_value is not None:
        name = "a thread" if ended.thread is None else ended.thread.name
        error = (ended.exc_type, ended.exc_value, ended.exc_traceback)
        logging.getLogger(__name__).error("%s has ended with an error", name, exc_info=error)
