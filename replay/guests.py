"""Writers outside the run: what one shows, what it may write and how fast, and how its rows are checked.

A *guest* is a program that a run does not control: an actor outside Ray. It holds no token of the run but one that lets it
join, and then one of its own, with which a shard lets it write as its name and do nothing else; both are derived from the
run's. Whatever it sends must hurt nobody: `replay.guest_service` receives it, by the rules of this module.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .schema import Field, StepSchema
from .security import Security

PREFIX = "outside-"  # of the names of guests, and of no other writer
_NAME = re.compile(re.escape(PREFIX) + r"[A-Za-z0-9._-]{1,100}")
_PURPOSE = b"millrace guest\0"  # a token of the run signs nothing else like it
_JOIN_PURPOSE = b"millrace join\0"
_BURST_S = 1.0  # what a guest left unused of its rate for this long, it may use at once


@dataclass(frozen=True)
class GuestLimits:
    """What a shard takes from each guest.

    lanes: most lanes, numbered from 0.
    rows_per_s: most rows per second; who sends faster is read later.
    bad_messages: messages refused for their rows after which a guest is shut out.
    message_rows: most rows of one message. The limiter lets a message in as a whole, so it should not be more than the
        run's own actors send.
    """

    lanes: int = 256
    rows_per_s: float = 10_000.0
    bad_messages: int = 10
    message_rows: int = 1024

    def __post_init__(self) -> None:
        if min(self.lanes, self.bad_messages, self.message_rows) < 1 or not 0 < self.rows_per_s < math.inf:
            raise ValueError(
                f"expected lanes, bad_messages and message_rows of at least 1 and a finite rows_per_s above 0; "
                f"received {self}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> GuestLimits:
        return cls(**found)


# ------------------------------------------------------------------------------------------------------------ tokens


def check_name(writer: str) -> None:
    """
    Raises:
        ValueError: the name is none of a guest.
    """
    if _NAME.fullmatch(writer) is None:
        raise ValueError(
            f"expected a guest's name, {PREFIX!r} and 1 to 100 of A-Z a-z 0-9 . _ -; received {writer[:200]!r}"
        )


def guest_token(run: Security | str, writer: str) -> str:
    """The token that lets its holder write as `writer`, to every shard of the run, and do nothing else.

    It follows from the run's token (or security) and the name, so nothing has to be kept, and it is worth nothing in
    another run. A client shows it as any token: `Security(guest_token(…), authority=…)`, or the header
    `authorization: Bearer <token>`.

    Raises:
        ValueError: the name is none of a guest: `outside-` and 1 to 100 letters, digits, dots, hyphens, underscores.
    """
    check_name(writer)
    return f"{writer}:{_seal(run, _PURPOSE + writer.encode())}"


def guest_named(run: Security | str, token: str) -> str | None:
    """The guest whose token this is; None: it is that of no guest of the run."""
    writer = token.partition(":")[0]
    if not token.isascii() or _NAME.fullmatch(writer) is None:
        return None
    return writer if hmac.compare_digest(token, guest_token(run, writer)) else None


def join_token(run: Security | str) -> str:
    """The token that lets its holder join the run as an actor outside Ray, fetch policies and leave, and do nothing else.

    It follows from the run's token (or security), which it does not tell. No shard takes it: one answers a join with the
    token to write with.
    """
    return f"join:{_seal(run, _JOIN_PURPOSE)}"


def _seal(run: Security | str, signed: bytes) -> str:
    secret = run.token if isinstance(run, Security) else run
    seal = hmac.new(secret.encode(), signed, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(seal).rstrip(b"=").decode()


# -------------------------------------------------------------------------------------------------------------- rows


class Fault(NamedTuple):
    """The first row of a message that does not fit."""

    row: int
    what: str  # which field, what was expected and what received
    unopened: bool = False  # all that is wrong is that its lane has no episode to go on with

    def __str__(self) -> str:
        return f"row {self.row}: {self.what}"


class RowCheck:
    """Whether a guest's rows are steps that a learner can use. The cost is a few passes over a message."""

    def __init__(self, schema: StepSchema, lanes: int) -> None:
        """lanes: lane numbers must be below it."""
        self._lanes = lanes
        self._floats = [f for f in schema.fields if np.dtype(f.dtype).kind == "f"]
        self._bools = [f for f in schema.fields if f.dtype == "bool"]
        self._action = schema.action

    def __call__(self, lanes: np.ndarray, rows: np.ndarray, is_open: np.ndarray, *, begin: int = 0) -> Fault | None:
        """The first row that does not fit; None: all do.

        lanes: int32 (n,), the lane of each row; rows: structured (n,), those of one lane in time order.
        is_open: bool (n,), whether each row's lane had, before the message, an episode that has not ended.
        begin: rows before it are applied already and `is_open` holds for after them: their order is not asked for.

        Every lane begins an episode with is_first and ends it with is_last, and only then begins the next; is_terminal comes
        with is_last alone. Floats are finite, flags 0 or 1, a discrete action one of its choices, a continuous one
        within [−1, 1], the policy's version not negative; in an episode's last row too, whose action is 0 where it
        is void.
        """
        faults = [self._lane(lanes), *(self._flag(f, rows) for f in self._bools)]
        faults += [self._finite(f, rows) for f in self._floats]
        faults += [self._act(rows), self._version(rows), self._terminal(rows), self._order(lanes, rows, is_open, begin)]
        return min((fault for fault in faults if fault is not None), key=lambda fault: fault.row, default=None)

    def _lane(self, lanes: np.ndarray) -> Fault | None:
        return _first(
            (lanes < 0) | (lanes >= self._lanes),
            lambda row: f"expected a lane from 0 to {self._lanes - 1}, received {lanes[row]}",
        )

    def _flag(self, field: Field, rows: np.ndarray) -> Fault | None:
        values = rows[field.name].view(np.uint8)
        return _first(values > 1, lambda row: f"expected {field.name} to be 0 or 1, received {_pick(values[row], 1)}")

    def _finite(self, field: Field, rows: np.ndarray) -> Fault | None:
        values = rows[field.name]
        return _first(
            ~np.isfinite(values),
            lambda row: (
                f"expected {field.name} to be finite, received {_place(values[row], ~np.isfinite(values[row]))}"
            ),
        )

    def _act(self, rows: np.ndarray) -> Fault | None:
        values, choices = rows["action"], self._action.choices
        if choices:
            return _first(
                (values < 0) | (values >= choices),
                lambda row: (
                    f"expected action to be from 0 to {choices - 1}, received {_pick(values[row], choices - 1)}"
                ),
            )
        if np.dtype(self._action.dtype).kind != "f":  # discrete, of a table that does not say how many there are
            return None
        return _first(
            np.abs(values) > 1,
            lambda row: (
                f"expected action to be within [−1, 1], received {_place(values[row], np.abs(values[row]) > 1)}"
            ),
        )

    def _version(self, rows: np.ndarray) -> Fault | None:
        values = rows["policy_version"]
        return _first(values < 0, lambda row: f"expected policy_version to be 0 or more, received {values[row]}")

    def _terminal(self, rows: np.ndarray) -> Fault | None:
        return _first(
            _set(rows, "is_terminal") & ~_set(rows, "is_last"),
            lambda row: "expected is_last where is_terminal is set, received is_terminal alone",
        )

    def _order(self, lanes: np.ndarray, rows: np.ndarray, is_open: np.ndarray, begin: int) -> Fault | None:
        first, last = (_set(rows[begin:], name) for name in ("is_first", "is_last"))
        order = np.argsort(lanes[begin:], kind="stable")
        lane, goes_on = lanes[begin:][order], ~last[order]
        going = is_open[begin:][order]  # whether the row before it, of its lane, leaves an episode open
        same = lane[1:] == lane[:-1]
        going[1:][same] = goes_on[:-1][same]
        wrong = np.zeros(len(order), bool)
        wrong[order] = going == first[order]
        if not wrong.any():
            return None
        row = int(np.argmax(wrong))
        number = lanes[begin + row]
        if first[row]:
            return Fault(
                begin + row, f"expected is_last in lane {number} before is_first, received is_first in an open episode"
            )
        what = f"expected is_first, for lane {number} has no open episode; received a row without it"
        return Fault(begin + row, what, unopened=True)


def _set(rows: np.ndarray, flag: str) -> np.ndarray:
    """Where a flag is set, bool (n,), whatever byte it holds."""
    found: np.ndarray = rows[flag].view(np.uint8) != 0
    return found


def _first(wrong: np.ndarray, what: Callable[[int], str]) -> Fault | None:
    """The first row with something wrong. wrong: bool (n, …)."""
    if not wrong.any():
        return None
    row = int(np.argmax(wrong.reshape(len(wrong), -1).any(1)))
    return Fault(row, what(row))


def _place(values: np.ndarray, wrong: np.ndarray) -> str:
    """The first wrong value of a field in one row, with its place."""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{values[at]}" + (f" at {list(at)}" if at else "")


def _pick(values: np.ndarray, most: int) -> str:
    return _place(np.asarray(values), (np.asarray(values) < 0) | (np.asarray(values) > most))


# -------------------------------------------------------------------------------------------------------------- pace


class RowBudget:
    """Rows per second, with what was left unused in the last second on top. Not thread-safe."""

    def __init__(self, rows_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows_per_s = rows_per_s
        self._clock = clock
        self._paid = -math.inf  # the rows spent are what the rate allows until this time

    def spend(self, rows: float) -> float:
        """Count rows that came. Returns the seconds after which more may come."""
        now = self._clock()
        self._paid = max(self._paid, now - _BURST_S) + rows / self._rows_per_s
        return max(0.0, self._paid - now)
