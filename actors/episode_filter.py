"""Control episodes wait for the verdict on their group before they are written, whole, or dropped."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from replay.writers import Writer

Rows = NDArray[Any]  # structured (n,), as replay.schema lays them out
Fate = Literal["kept", "too_easy", "too_hard", "unscored"]


@dataclass
class _Group:
    """Episodes of one task that are judged together."""

    ended: int = 0  # episodes whose rows are here or on the way
    arrived: int = 0  # of those, the ones whose rows are here
    kept: bool | None = None  # None: no verdict yet
    held: list[tuple[int, Rows]] = field(default_factory=list)  # lane and rows of the episodes that arrived


class EpisodeFilter:
    """A `Writer` in front of another: rows wait for their group's verdict (Bae et al. 2025, arXiv 2504.03380).

    The environments (`actors.task_env.TaskEnv`) say which group each episode was of, in the order in which a lane ends
    them, and let a group be judged when all of its episodes are over; their rows come later, in batches. A kept
    episode is handed on whole; of one that is dropped the other writer sees nothing. What is open waits here: at most the
    groups that lanes play, and so at most (lanes + 1) · group size episodes. For one thread only.
    """

    def __init__(
        self,
        writer: Writer,
        judge: Callable[[int, int], Literal["kept", "too_easy", "too_hard"]],
        *,
        rows_per_write: int,
    ) -> None:
        """
        Args:
            writer: takes the rows of kept episodes; closed by `close`.
            judge: says what becomes of a group with so many passes of so many attempts.
            rows_per_write: most rows handed on by one `append`, unless it is called with more: a limiter that was told of
                writes so large need not let a whole group in at once.
        """
        self._writer = writer
        self._judge = judge
        self._rows_per_write = rows_per_write
        self._groups: dict[int, _Group] = {}
        self._order: dict[int, deque[int]] = defaultdict(deque)  # lane → groups of its ended episodes without rows
        self._open: dict[int, list[Rows]] = defaultdict(list)  # lane → rows of its episode whose last is not there yet
        self._due: deque[tuple[int, Rows]] = deque()  # lane and rows to be handed on

    @property
    def waiting_for(self) -> str | None:
        return self._writer.waiting_for

    def end(self, lane: int, group: int) -> None:
        """An episode of a group is over in a lane; its rows come, or have come, as the next of the lane that end."""
        self._order[lane].append(group)
        self._groups.setdefault(group, _Group()).ended += 1

    def settle(self, group: int, passes: int, attempts: int) -> Fate:
        """Judge a group, all of whose episodes are over, by its passes of the attempts that could be judged."""
        fate: Fate = self._judge(passes, attempts) if attempts else "unscored"
        self._groups[group].kept = fate == "kept"
        self._release(group)
        return fate

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `Writer.append`; hands on what has been kept since."""
        order = np.argsort(lanes, kind="stable")
        lanes = lanes[order]
        # Whole rows as opaque bytes: numpy copies structured rows field by field otherwise.
        rows = rows.view(np.dtype((np.void, rows.dtype.itemsize)))[order].view(rows.dtype)
        # A piece ends where the lane changes, and where an episode does.
        last = rows["is_last"]
        cuts = np.flatnonzero(last[:-1] | (lanes[1:] != lanes[:-1])) + 1
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
            if begin < end:
                lane = int(lanes[begin])
                self._open[lane].append(rows[begin:end])
                if last[end - 1]:
                    self._arrive(lane)
        self._hand_on(max(self._rows_per_write, len(rows)))

    def flush(self) -> None:
        """Hand on all that is kept, and wait until it is stored; what has no verdict stays."""
        self._hand_on(None)
        self._writer.flush()

    def close(self) -> None:
        """As `Writer.close`; what has not been handed on is dropped: the limiter may have no room for it, and nobody waits."""
        self._groups.clear()
        self._order.clear()
        self._open.clear()
        self._due.clear()
        self._writer.close()

    @property
    def held_rows(self) -> int:
        """Rows that are here."""
        held = [rows for group in self._groups.values() for _, rows in group.held]
        return sum(map(len, [*held, *(rows for pieces in self._open.values() for rows in pieces)])) + sum(
            len(rows) for _, rows in self._due
        )

    def _arrive(self, lane: int) -> None:
        """The rows of a lane's episode are complete."""
        number = self._order[lane].popleft()
        group = self._groups[number]
        group.arrived += 1
        group.held.append((lane, _joined(self._open.pop(lane))))
        self._release(number)

    def _release(self, number: int) -> None:
        """Let go of what is here of a group that has been judged."""
        group = self._groups[number]
        if group.kept is None:
            return
        if group.kept:
            self._due.extend(group.held)
        group.held.clear()
        if group.arrived == group.ended:
            del self._groups[number]

    def _hand_on(self, most: int | None) -> None:
        """Hand on up to `most` rows of kept episodes, None for all, in the order of the verdicts."""
        lanes: list[NDArray[np.int32]] = []
        rows: list[Rows] = []
        room = most
        while self._due and room != 0:
            lane, episode = self._due[0]
            part = episode[:room]
            lanes.append(np.full(len(part), lane, np.int32))
            rows.append(part)
            if len(part) < len(episode):
                self._due[0] = lane, episode[len(part) :]
            else:
                self._due.popleft()
            room = None if room is None else room - len(part)
        if rows:
            self._writer.append(np.concatenate(lanes), _joined(rows))


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts; np.concatenate alone would pack the fields anew, and a table would not take them."""
    rows = np.empty(sum(map(len, parts)), parts[0].dtype)
    return np.concatenate(parts, out=rows)
