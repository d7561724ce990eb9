"""Publication of weights beside the updates."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Publisher:
    """Hands weights to a slow callable in its own thread. Only the newest version waits: it replaces an older one."""

    def __init__(self, publish: Callable[[int, bytes], None]) -> None:
        self._publish = publish
        self._changed = threading.Condition()
        self._waiting: tuple[int, bytes] | None = None
        self._closed = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="publish", daemon=True)
        self._thread.start()

    def put(self, version: int, data: bytes) -> None:
        """Hands over a version, and waits for nothing."""
        with self._changed:
            self._waiting = (version, data)
            self._changed.notify()

    def close(self) -> None:
        """Returns once the newest version is published (or publishing failed)."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._waiting is None:
                    return
                (version, data), self._waiting = self._waiting, None
            try:
                self._publish(version, data)
            except BaseException as error:
                self.error = error
                return
