"""The pace of sampling against inserting, for one table over all its shards (`replay.rate_limit` has the rule).

The limiter lives on the table's first shard; the others lease credits from it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import Literal, Protocol

from .rate_limit import RateLimit

Side = Literal["insert", "sample"]

_OTHER: dict[Side, Side] = {"insert": "sample", "sample": "insert"}
BREAK_S = 0.1  # who asks again within this time has waited all along: callers wait in short turns


class Limiter(Protocol):
    """Where a shard asks before it inserts or samples."""

    def acquire(self, side: Side, least: int, most: int, *, timeout_s: float) -> int:
        """Ask for `least` to `most` items. Returns as many as are allowed as soon as `least` are; 0 after `timeout_s`.

        Raises:
            ValueError: not 1 ≤ least ≤ most.
        """

    def give_back(self, side: Side, count: int) -> None:
        """Return what was asked for and not used."""

    def deleted(self, count: int) -> None:
        """Tell of items that left the table."""

    def why(self, side: Side) -> str:
        """What the side waits for, in words."""


def _check_request(side: str, least: int, most: int) -> None:
    if side not in _OTHER:
        raise ValueError(f"side must be insert or sample, received {side!r}")
    if not 1 <= least <= most:
        raise ValueError(f"a request to {side} needs 1 ≤ least ≤ most, received least {least} and most {most}")


class _Place:
    """Who asks has a place in the line of its side, and keeps it between the turns of a wait, whatever it asks for."""

    def __init__(self, who: Hashable, least: int) -> None:
        self.who = who
        self.least = least
        self.until = math.inf  # inf while somebody waits in it


class RateLimiter:
    """Counts a table's inserts and samples and holds back the side that is ahead; thread-safe.

    First come, first served on each side, so that small requests do not starve a large one. A request that cannot be
    granted lets those behind it go first while the other side waits too: holding them back would help nobody.
    """

    def __init__(self, limit: RateLimit) -> None:
        self.limit = limit
        self.inserted = 0
        self.sampled = 0
        self.removed = 0
        self._changed = threading.Condition()
        self._lines: dict[Side, list[_Place]] = {"insert": [], "sample": []}

    def _allows(self, side: Side, count: int) -> bool:
        limit = self.limit
        if side == "sample":
            lead = self.inserted * limit.ratio - self.sampled - count
            return self.inserted - self.removed >= limit.min_size and lead >= limit.low
        inserted = self.inserted + count
        return inserted - self.removed <= limit.min_size or inserted * limit.ratio - self.sampled <= limit.high

    def _allowed(self, side: Side, least: int, most: int) -> int:
        """The most that is allowed now; 0 if that is less than `least`."""
        if self._allows(side, most):
            return most
        if not self._allows(side, least):
            return 0
        granted, refused = least, most
        while refused - granted > 1:  # halving, for the bounds of a quotient would round differently from the rule
            middle = (granted + refused) // 2
            granted, refused = (middle, refused) if self._allows(side, middle) else (granted, middle)
        return granted

    def acquire(self, side: Side, least: int, most: int, *, timeout_s: float) -> int:
        return self._acquire(side, least, most, timeout_s, threading.get_ident())

    def _acquire(self, side: Side, least: int, most: int, timeout_s: float, who: Hashable) -> int:
        _check_request(side, least, most)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            line = self._line(side)
            if not line and (granted := self._allowed(side, least, most)):
                self._add(side, granted)
                return granted
            place = next((known for known in line if known.who == who and known.until < math.inf), None)
            fresh = place is None
            if place is None:
                place = _Place(who, least)
                line.append(place)
            place.least, place.until = least, math.inf
            self._changed.notify_all()  # now that this side waits as well, the other's first may be passed by
            granted = 0
            try:
                while True:
                    line = self._line(side)
                    if (line[0] is place or self._may_pass(side)) and (granted := self._allowed(side, least, most)):
                        self._add(side, granted)
                        return granted
                    now = time.monotonic()
                    if now >= deadline:
                        return 0
                    left_alone = (other.until for other in line)  # nobody wakes us when such a place lapses
                    self._changed.wait(min(deadline, *left_alone) - now)
            finally:
                if granted or (timeout_s <= 0 and fresh):  # a mere try holds up nobody, nor does it give up a place
                    line.remove(place)
                    self._changed.notify_all()
                else:
                    place.until = time.monotonic() + BREAK_S

    def _line(self, side: Side) -> list[_Place]:
        line = self._lines[side]
        if line:
            now = time.monotonic()
            line[:] = [place for place in line if place.until > now]
        return line

    def _may_pass(self, side: Side) -> bool:
        """Whether a side's first request may be passed by: neither it nor the other side's first can be granted."""
        own, other = self._line(side), self._line(_OTHER[side])
        return bool(own and other) and not (
            self._allows(side, own[0].least) or self._allows(_OTHER[side], other[0].least)
        )

    def _add(self, side: Side, count: int) -> None:
        if side == "insert":
            self.inserted += count
        else:
            self.sampled += count
        self._changed.notify_all()

    def give_back(self, side: Side, count: int) -> None:
        with self._changed:
            self._add(side, -count)

    def deleted(self, count: int) -> None:
        """Tell of items that left the table.

        An item dropped before it was sampled as often as the ratio wants still counts as inserted, and the samples it
        lacks are waited for. Where they cannot come (a queue drops what is too old), give the insert back instead.
        """
        with self._changed:
            self.removed += count
            self._changed.notify_all()

    def lease(
        self, side: Side, least: int, most: int, deleted: int, timeout_s: float, *, who: Hashable
    ) -> tuple[int, str]:
        """`acquire` for the `LeasedLimiter` of shard `who`, told of its deletions; with the reason if nothing is granted."""
        self.take_back(0, 0, deleted)
        granted = self._acquire(side, least, most, timeout_s, ("shard", who))
        return granted, "" if granted else self.why(side)

    def take_back(self, inserts: int, samples: int, deleted: int) -> None:
        """What another shard had leased and does not need, and its deletions.

        Raises:
            ValueError: a count is negative.
        """
        if min(inserts, samples, deleted) < 0:
            raise ValueError(f"counts must not be negative, received {inserts}, {samples} and {deleted}")
        with self._changed:
            self.inserted -= inserts
            self.sampled -= samples
            self.removed += deleted
            self._changed.notify_all()

    def restore(self, *, inserted: int, sampled: int, removed: int) -> None:
        """Set the counters, after a restart."""
        with self._changed:
            self.inserted, self.sampled, self.removed = inserted, sampled, removed
            self._changed.notify_all()

    def change(self, limit: RateLimit) -> None:
        """Keep other limits from now on; the counters stay."""
        with self._changed:
            self.limit = limit
            self._changed.notify_all()

    def why(self, side: Side) -> str:
        limit, size = self.limit, self.inserted - self.removed
        if side == "sample" and size < limit.min_size:
            return f"actors to insert: the table holds {size} of the {limit.min_size} steps of replay.min_size"
        if side == "sample":
            return f"actors to insert: {self.sampled} samples drawn, as many as {self.inserted} inserts allow"
        return (
            f"the learner to sample: {self.sampled} samples drawn, too few for more than {self.inserted} inserts "
            f"({limit.bound_name})"
        )


class LeasedLimiter:
    """A shard's share of a limiter that lives on another shard: credits leased in blocks; thread-safe.

    What is leased and not used is the limiter's stated error: at most a block on each side, and what was given back.
    """

    def __init__(
        self,
        lease: Callable[[Side, int, int, int, float], tuple[int, str]],
        take_back: Callable[[int, int, int], None],
        *,
        insert_block: int,
        sample_block: int,
    ) -> None:
        """
        lease, take_back: `RateLimiter.lease` for this shard, and `RateLimiter.take_back` of the limiter's shard, over the wire.
        insert_block, sample_block: items leased at once.
        """
        self._lease = lease
        self._take_back = take_back
        self._block: dict[Side, int] = {"insert": insert_block, "sample": sample_block}
        self._credits: dict[Side, int] = {"insert": 0, "sample": 0}
        self._asked: dict[Side, float] = {"insert": -math.inf, "sample": -math.inf}
        self._why: dict[Side, str] = {"insert": "", "sample": ""}
        self._deleted = 0
        self._lock = threading.Lock()
        self._asking: dict[Side, threading.Lock] = {"insert": threading.Lock(), "sample": threading.Lock()}

    def lease_in(self, *, insert_block: int, sample_block: int) -> None:
        """Lease so many items at once from now on."""
        with self._lock:
            self._block = {"insert": insert_block, "sample": sample_block}

    def _take(self, side: Side, least: int, most: int) -> int:
        with self._lock:
            self._asked[side] = time.monotonic()
            if self._credits[side] < least:
                return 0
            taken = min(most, self._credits[side])
            self._credits[side] -= taken
            return taken

    def acquire(self, side: Side, least: int, most: int, *, timeout_s: float) -> int:
        """As `Limiter.acquire`; raises what `lease` raises, nothing changed."""
        _check_request(side, least, most)
        deadline = time.monotonic() + timeout_s
        if taken := self._take(side, least, most):
            return taken
        if not self._asking[side].acquire(timeout=max(0.0, timeout_s)):
            return 0
        try:
            if taken := self._take(side, least, most):
                return taken
            with self._lock:
                # Set aside, or small requests would use up what a large one has to wait for.
                held, self._credits[side] = self._credits[side], 0
                deleted, self._deleted = self._deleted, 0
            wanted = max(most, self._block[side]) - held
            left = max(0.0, deadline - time.monotonic())
            try:
                granted, why = self._lease(side, least - held, wanted, deleted, left)
            except BaseException:
                with self._lock:
                    self._credits[side] += held
                    self._deleted += deleted
                raise
            taken = min(most, held + granted) if granted else 0
            with self._lock:
                self._why[side] = why
                self._credits[side] += held + granted - taken
            return taken
        finally:
            self._asking[side].release()

    def give_back(self, side: Side, count: int) -> None:
        with self._lock:
            self._credits[side] += count

    def deleted(self, count: int) -> None:
        with self._lock:
            self._deleted += count

    def forget_deletions(self) -> None:
        """Tell of no deletions before now: the limiter's counters are set to what the shards hold."""
        with self._lock:
            self._deleted = 0

    def outstanding(self, side: Side) -> int:
        """Credits leased and not used."""
        with self._lock:
            return self._credits[side]

    def return_unused(self, *, idle_s: float = 0.0) -> tuple[int, int]:
        """Hand back the credits of a side that nobody has asked for within `idle_s`, of the others what exceeds a block.

        Tells of deletions as well. Returns how many inserts and samples went back; raises what `take_back` raises,
        nothing changed.
        """
        counts: dict[Side, int] = {}
        with self._lock:
            now = time.monotonic()
            for side in _OTHER:
                kept = 0 if now - self._asked[side] >= idle_s else self._block[side]
                counts[side] = max(0, self._credits[side] - kept)
                self._credits[side] -= counts[side]
            deleted, self._deleted = self._deleted, 0
        inserts, samples = counts["insert"], counts["sample"]
        if inserts or samples or deleted:
            try:
                self._take_back(inserts, samples, deleted)
            except BaseException:
                with self._lock:
                    self._credits["insert"] += inserts
                    self._credits["sample"] += samples
                    self._deleted += deleted
                raise
        return inserts, samples

    def why(self, side: Side) -> str:
        return self._why[side] or "credits of the table's limiter, on shard 0"
