"""What the processes of every kind of run have in common under Ray."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from typing import Any, TypeVar

import ray

from cluster.logs import ProcessLog

Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """A method that runs when it is first called; every other call waits for that one, and returns or raises the same.

    A head that takes the place of a dead one cannot know which of its last calls have come.
    """

    @wraps(method)
    def answer(self: Any, *arguments: Any) -> Any:
        mine: Future[Any] = Future()
        # Of several at the same moment `setdefault` lets one through; a lock would not survive how Ray ships classes.
        first = self.__dict__.setdefault(f"_answer_of_{method.__name__}", mine)
        if first is mine:
            try:
                mine.set_result(method(self, *arguments))
            except BaseException as error:
                mine.set_exception(error)
        return first.result()

    return answer  # type: ignore[return-value]


def failure_of(error: BaseException) -> dict[str, str]:
    """An error as part of a status."""
    return {"error": f"{type(error).__name__}: {error}", "error_type": type(error).__name__}


class Thread:
    """Runs a function in a thread and keeps the error it ended with."""

    def __init__(self, target: Callable[[], None], *, name: str) -> None:
        self.error: BaseException | None = None
        self._target = target
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:
            logging.getLogger(__name__).exception("%s failed", self._thread.name)
            self.error = error

    def failure(self) -> dict[str, str]:
        """{"error": …, "error_type": …} once the function has failed; else empty."""
        return {} if self.error is None else failure_of(self.error)

    def join(self, timeout_s: float) -> bool:
        """Wait for the function to end; whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


class RunProcess:
    """A process of a run: its name on Ray's dashboard and in Ray's logs, and the log of its own."""

    _name = "starting"
    _log: ProcessLog

    def _called(self, role: str, number: int | None, *, run: str | None) -> None:
        """Take a name, and begin the log."""
        self._name = role if number is None else f"{role} {number}"
        text = "" if number is None else str(number)
        self._log = ProcessLog.install(run=run or "", role=role, id=text, node=ray.util.get_node_ip_address())

    def __repr__(self) -> str:
        return self._name

    def logs(self, after: int) -> tuple[list[dict[str, Any]], int]:
        """As `ProcessLog.after`."""
        return self._log.after(after)


def process() -> dict[str, Any]:
    """Where this process runs: its number there, the node's address, and Ray's name of the node."""
    node_id = ray.get_runtime_context().get_node_id()
    return {"pid": os.getpid(), "node": ray.util.get_node_ip_address(), "node_id": node_id}
