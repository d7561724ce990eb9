"""The warnings that learners log, gathered where they run, so that the run can tell of them."""

from __future__ import annotations

import logging


class Warned(logging.Handler):
    """Keeps the warnings of the `learners` package in this process, from when it is made until it is closed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []
        self._logger = logging.getLogger("learners")
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message of a record, on one line."""
        self._lines.append(" ".join(record.getMessage().split()))

    def after(self, index: int) -> list[str]:
        """The lines from number `index` on."""
        return self._lines[index:]

    def close(self) -> None:
        """Gather no more; a second call does nothing."""
        self._logger.removeHandler(self)
        super().close()
