"""The desk between processes under Ray: the head's end, and what an actor calls it by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray

from actors.assignments import Assignment, Outcome
from cluster.curriculum.desk import Desk
from cluster.curriculum.desk_client import Exchange
from cluster.curriculum.desk_files import begin_journal, checkpoint_is_whole, load_desk, recover_desk, save_desk

AnyDesk = TypeVar("AnyDesk", bound=Desk)
Answer = tuple[int, list[Assignment[Any]]]


class HeadDesk(Generic[AnyDesk]):
    """The desk in the head's process, and its record on disk."""

    def __init__(self, run: Path, *, tell: Callable[[str, str], object]) -> None:
        """
        run: folder of the run.
        tell: takes the kind of an event and its text.
        """
        self._run = run
        self._tell = tell
        self._opened = threading.Event()
        self._at_work: dict[str, int] = {}  # actor → incarnation of the one that is served
        self.desk: AnyDesk  # once it is open

    def open(self, desk: AnyDesk, checkpoint: Path | None) -> None:
        """Begin with the record in a checkpoint, or with an empty one.

        Raises:
            ValueError: the record is of other tasks.
        """
        load_desk(desk, checkpoint)
        begin_journal(desk, self._run, checkpoint, tell=self._warn)
        self._open(desk)

    def recover(self, desk: AnyDesk) -> None:
        """Go on with the record of the head that died."""
        count = recover_desk(desk, self._run, tell=self._warn)
        self._open(desk)
        self._tell("restart", f"the record of tasks is back, {count} outcomes of it from the journal")

    def _open(self, desk: AnyDesk) -> None:
        self.desk = desk
        self._opened.set()

    def _warn(self, text: str) -> None:
        self._tell("warning", text)

    @property
    def is_open(self) -> bool:
        """Whether `desk` is there."""
        return self._opened.is_set()

    def serve(self, actor: str, incarnation: int) -> None:
        """Give assignments to this incarnation of an actor, and no more to those before it."""
        self._at_work[actor] = incarnation

    def forget(self, actor: str) -> int:
        """The actor's served incarnation died. Returns how many assignments it had."""
        return self.desk.forget(_name(actor, self._at_work.get(actor, 0)))

    def exchange(
        self, actor: str, incarnation: int, first: int, outcomes: Sequence[Outcome], want: int, held: int
    ) -> Answer | None:
        """As `DeskClient.exchange` calls it; one that is not served gets no assignments. None until the desk is open."""
        if not self._opened.is_set():
            return None
        name = _name(actor, incarnation)
        following = self.desk.report(name, first, outcomes)
        served = self._at_work.get(actor) == incarnation
        return following, self.desk.take(name, want, held=held) if served else []

    def save(self, checkpoint: Path) -> None:
        """Write the record into the folder of a checkpoint."""
        save_desk(self.desk, checkpoint)

    def saved(self, checkpoint: Path) -> None:
        """The newest checkpoint that is whole."""
        checkpoint_is_whole(self.desk, checkpoint)


def exchange_with(head: Any, actor: str, incarnation: int, *, timeout_s: float) -> Exchange:
    """What a `DeskClient` calls: asks the head, whose method `exchange` is `HeadDesk.exchange`.

    It raises what the head raises; a head that is away gives no answer.
    """

    def call(first: int, outcomes: Sequence[Outcome], want: int, held: int) -> Answer | None:
        reference = head.exchange.remote(actor, incarnation, first, list(outcomes), want, held)
        try:
            answer: Answer | None = ray.get(reference, timeout=timeout_s)
        except ray.exceptions.RayTaskError:
            raise
        except (ray.exceptions.RayError, TimeoutError):
            return None
        return answer

    return call


def answers(
    exchange: Callable[..., Answer | None], requests: Sequence[Sequence[Any]]
) -> list[Answer | Exception | None]:
    """Call `exchange` with each of these arguments; what a call raises stands in the place of its answer."""
    found: list[Answer | Exception | None] = []
    for request in requests:
        try:
            found.append(exchange(*request))
        except Exception as error:
            found.append(error)
    return found


def _name(actor: str, incarnation: int) -> str:
    return f"{actor} of {incarnation}"
