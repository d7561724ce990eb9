"""Requests that other threads make of the head's control loop, which alone may change a run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

ANSWER_S = 900.0  # the longest that a request waits: a checkpoint may take that long


class Requests:
    """A queue of requests, each answered once by the loop; for any thread."""

    def __init__(self, wake: threading.Event) -> None:
        """wake: set where the loop should look sooner than it would."""
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[tuple[str, dict[str, Any], Future[Any]]] = deque()
        self._closed = ""

    def ask(self, name: str, **arguments: Any) -> Any:
        """Have the loop call what it knows by this name; what that returns, or raises.

        Raises:
            RuntimeError: the loop takes no more requests.
            TimeoutError: it has not answered within `ANSWER_S`.
        """
        answer: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(self._closed)
            self._waiting.append((name, arguments, answer))
        self._wake.set()
        return answer.result(ANSWER_S)

    def answer(self, calls: Mapping[str, Callable[..., Any]]) -> None:
        """Answer all that wait; of the loop."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                name, arguments, answer = self._waiting.popleft()
            try:
                answer.set_result(calls[name](**arguments))
            except Exception as error:
                answer.set_exception(error)

    def close(self, why: str) -> None:
        """Refuse what waits and what comes; once more does nothing."""
        with self._lock:
            self._closed = self._closed or why
            waiting, self._waiting = self._waiting, deque()
        for _, _, answer in waiting:
            answer.set_exception(RuntimeError(why))
