"""What a table's callers spend their time on, and what they wait for."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import Literal, NamedTuple

from .limiter import BREAK_S, Limiter, Side

State = Literal["inserting", "sampling", "waiting_for_inserts", "waiting_for_samples"]

_STATES: tuple[State, ...] = ("inserting", "sampling", "waiting_for_inserts", "waiting_for_samples")

_log = logging.getLogger(__name__)


class _Record(NamedTuple):
    """A thread's time, replaced as a whole, so that a reader without a lock never sees half a change."""

    seconds: tuple[float, ...]  # by state, over the blocks that have ended
    state: int  # index of the present state, or of the last
    begin: float  # of the present block
    since: float  # the thread has been in the state, short breaks left out
    until: float  # the last block ended; inf inside a block


_NEW = _Record((0.0,) * len(_STATES), -1, 0.0, 0.0, -math.inf)


class _Block:
    """Context manager that counts a state's time; has no state of its own, so that threads share it."""

    def __init__(self, records: dict[int, _Record], state: int) -> None:
        self._records = records
        self._state = state

    def __enter__(self) -> None:
        thread, state = threading.get_ident(), self._state
        last = self._records.get(thread, _NEW)
        now = time.monotonic()
        since = last.since if last.state == state and now - last.until < BREAK_S else now
        self._records[thread] = _Record(last.seconds, state, now, since, math.inf)

    def __exit__(self, *_: object) -> None:
        thread, state = threading.get_ident(), self._state
        seconds, _state, begin, since, _until = self._records[thread]
        now = time.monotonic()
        total = (*seconds[:state], seconds[state] + now - begin, *seconds[state + 1 :])
        self._records[thread] = _Record(total, state, begin, since, now)


class Clock:
    """Seconds that a table's callers spend in each state, summed over threads. A thread is in one state at a time.

    inserting, sampling: at work; waiting_for_inserts: a sampler held back by the limiter or an empty table;
    waiting_for_samples: a writer held back.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        # By thread number: the system gives those of ended threads away again, and so there are not many.
        self._records: dict[int, _Record] = {}
        self._blocks = {state: _Block(self._records, index) for index, state in enumerate(_STATES)}
        self._shown = [0.0] * len(_STATES)
        self._told: dict[State, float] = {}
        self._lock = threading.Lock()

    def state(self, name: State) -> _Block:
        """Context manager: count the time of the block under `name`."""
        return self._blocks[name]

    def seconds(self) -> dict[str, float]:
        """`<state>_s` for each state, blocks still going on included, and `wall_s` since the start. Never falls."""
        now = time.monotonic()
        total = [0.0] * len(_STATES)
        for record in list(self._records.values()):
            for index, seconds in enumerate(record.seconds):
                total[index] += seconds
            if record.until == math.inf:
                total[record.state] += max(0.0, now - record.begin)
        with self._lock:
            # A thread between the end of a block and its record was counted for a moment too long the last time.
            self._shown = [max(pair) for pair in zip(self._shown, total, strict=True)]
            shown = {f"{state}_s": seconds for state, seconds in zip(_STATES, self._shown, strict=True)}
        return {**shown, "wall_s": now - self._started}

    def longest(self, name: State) -> float:
        """Seconds that some thread has now been in state `name`, short breaks left out; 0 when none is."""
        now, state = time.monotonic(), _STATES.index(name)
        records = list(self._records.values())
        return max((now - r.since for r in records if r.state == state and now - r.until < BREAK_S), default=0.0)

    def overdue(self, name: State, *, every_s: float) -> float:
        """`longest`, if it is `every_s` or more and was not returned for as long; else 0."""
        waited = self.longest(name)
        with self._lock:
            if waited < every_s or time.monotonic() - self._told.get(name, -math.inf) < every_s:
                return 0.0
            self._told[name] = time.monotonic()
            return waited


def log_waits(clock: Clock, limiter: Limiter, *, table: str, every_s: float = 10.0) -> list[str]:
    """Log what a table's callers have waited for, those that have for `every_s`; as often at most. Returns the lines.

    Cheap enough to be called after each turn of a wait.
    """
    sides: tuple[tuple[str, State, Side], ...] = (
        ("a writer", "waiting_for_samples", "insert"),
        ("a sampler", "waiting_for_inserts", "sample"),
    )
    lines = [
        f"table {table}: {who} has waited {waited:.0f} s for {limiter.why(side)}"
        for who, state, side in sides
        if (waited := clock.overdue(state, every_s=every_s))
    ]
    for line in lines:
        _log.warning("%s", line)
    return lines
