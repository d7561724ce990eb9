"""What the head knows, on disk while the run goes on: a killed head is started again, and goes on from there.

`<run folder>/head.json` is one moment, replaced whole at every look at the processes. It need not be the newest one: counters
are those of that moment together with what each process told then, so what happened since is the difference to what it tells
now, and counts once.

The file survives the process. It is not synced to disk, for where the machine is lost so are the processes it is about.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.files import read_json

STATE = "head.json"
MOST_SHOWN = 1_000  # lines kept for a driver that does not ask for them; a dead one never does
AHEAD = 1 << 20  # numbers of lines that a dead head may have given since its last state

Row = dict[str, float] | None


def read_head_state(run: Path, wall_started: float) -> dict[str, Any] | None:
    """What the head that was started by the same command has left in the folder of the run; None where there was none.

    Raises:
        ValueError: the file is damaged.
    """
    if not (run / STATE).exists():
        return None
    state: dict[str, Any] = read_json(run / STATE)
    return state if state["wall_started"] == wall_started else None


class HeadStateFile:
    """Keeps the newest state of the head; a disk that takes none is told of once, and ends no run."""

    def __init__(self, run: Path, *, tell: Callable[[str], object]) -> None:
        """
        run: folder of the run.
        tell: takes a line about a disk that takes no state.
        """
        self._path = run / STATE
        self._tell = tell
        self._has_failed = False

    def write(self, state: Mapping[str, Any]) -> None:
        """Put `state`, which JSON holds but for NumPy's numbers, in the place of the one before."""
        temporary = self._path.with_name(f".{STATE}.{os.getpid()}.tmp")
        data = json.dumps(state, separators=(",", ":"), default=float)
        try:
            temporary.write_text(data, encoding="utf-8")
            temporary.replace(self._path)
            self._has_failed = False
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if not self._has_failed:
                self._has_failed = True
                self._tell(
                    f"should the head die, it would go on from an older state, for the newest is not kept: {error}"
                )


class Shown:
    """Rows and lines for the driver, numbered, until it has them; any thread may call it."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """state: what `state` returned before the head died; what the driver has had since is told by the numbers it asks for."""
        self._waiting: deque[tuple[int, Row, str | None]] = deque(maxlen=MOST_SHOWN)
        self._next = 0
        self._lock = threading.Lock()
        if state is not None:
            self._waiting.extend((number, row, line) for number, row, line in state["waiting"])
            self._next = state["next"] + AHEAD

    def add(self, row: Row, line: str | None) -> None:
        """Show a metrics row, or a line of text."""
        with self._lock:
            self._waiting.append((self._next, row, line))
            self._next += 1

    def after(self, number: int) -> tuple[list[tuple[Row, str | None]], int]:
        """What was shown from a number on, and the number to ask for next. What lies before it has arrived and is let go of."""
        with self._lock:
            while self._waiting and self._waiting[0][0] < number:
                self._waiting.popleft()
            found = list(self._waiting)
        return [(row, line) for _, row, line in found], found[-1][0] + 1 if found else number

    def state(self) -> dict[str, Any]:
        """What a new head needs, as JSON."""
        with self._lock:
            return {"waiting": list(self._waiting), "next": self._next}
