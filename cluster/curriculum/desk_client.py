"""An actor's side of the desk: assignments fetched ahead of need, and outcomes kept until the head has them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from actors.assignments import Assignment, Outcome

Exchange = Callable[[int, Sequence[Outcome], int, int], tuple[int, Sequence[Assignment[Any]]] | None]


class DeskClient:
    """`ask` and `add` are called by the thread that acts and never wait; `exchange` by another one, which may."""

    def __init__(self, *, ahead: int) -> None:
        """ahead: assignments to be at hand beyond those that were asked for and not there."""
        self._ahead = ahead
        self._assigned: deque[Assignment[Any]] = deque()
        self._missing = 0  # assignments that were asked for since the last answer and not there, `ahead` at most
        self._outcomes: deque[Outcome] = deque()  # that the head may not have, oldest first
        self._first = 0  # number of the oldest of them
        self._held = 0  # assignments received whose outcome was not added yet
        self._lock = threading.Lock()

    def ask(self, count: int) -> list[Assignment[Any]]:
        """At most `count` assignments, those that are there."""
        found = [self._assigned.popleft() for _ in range(min(count, len(self._assigned)))]
        with self._lock:
            self._missing = min(self._ahead, self._missing + count - len(found))
        return found

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Outcomes to be reported."""
        with self._lock:
            self._outcomes.extend(outcomes)
            self._held -= len(outcomes)

    def exchange(self, call: Exchange, *, fetch: bool = True) -> bool:
        """Report what was added, and fetch what is needed unless `fetch` is off. Whether anything was to be done.

        call: asks the head. Takes the number of the first outcome, the outcomes, how many assignments are wanted and how many
            the actor holds; returns the number of the next outcome that the head expects, and the assignments; None where the
            head does not answer. It is asked again then, with the same outcomes.
        """
        with self._lock:
            first, outcomes, held, missing = self._first, list(self._outcomes), self._held, self._missing
        want = max(0, self._ahead + missing - len(self._assigned)) if fetch else 0
        if not want and not outcomes:
            return False
        answer = call(first, outcomes, want, held)
        if answer is not None:
            following, given = answer
            with self._lock:
                for _ in range(following - self._first):
                    self._outcomes.popleft()
                self._first = following
                self._held += len(given)
                self._missing -= missing
            self._assigned.extend(given)
        return True
