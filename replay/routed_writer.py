"""How an actor writes to the shards of a service while shards join, leave and come back at other addresses."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow.flight as flight

from .schema import SchemaError, StepSchema
from .wire import LOST, RETRY_S
from .writers import REFUSED, FlightWriter

MOST_SHARDS = 2**16 - 1
MOST_LANES = 2**16  # of a writer, as a shard allows
_NOWHERE = MOST_SHARDS  # of a lane that has not written yet
_TURN_S = 0.2  # how long a new connection is waited for before another look at the routes
_LOG = logging.getLogger(__name__)


class RoutedWriter:
    """Spreads the lanes of one actor over the shards there are; a `Writer`.

    Each lane writes to one shard, all shards have as many lanes as any other or one more. When `route` says that the shards
    are others now, lanes move: as few as make the spread even again, each with the row that begins its next episode, or at
    the end of a grace time with whatever row comes next, which then begins an episode of its own. A lane that has moved is
    ended where it was, and a shard to which no lane writes any more is flushed and let go of by a thread of its own.

    There is one connection to each shard that a lane writes to, made when its first row comes. `route`, `waiting_for`,
    `connections` and `lost_rows` are for any thread, the other methods for one at a time.
    """

    def __init__(
        self,
        routes: Mapping[int, str],
        schema: StepSchema,
        *,
        name: str,
        message_rows: int | None = None,
        in_flight: int = 2,
        retry_s: float = RETRY_S,
        first: int = 0,
        connect: Callable[[str], flight.FlightClient] = flight.FlightClient,
    ) -> None:
        """
        routes: number of each shard → its Flight address.
        name: tells this writer from every other, dead or alive. Connections made later are `<name>/1`, `<name>/2`, …:
            `Shard.end_writer(name)` ends them all.
        message_rows, in_flight, retry_s, connect: as of `FlightWriter`.
        first: lane l begins on the shard in place (first + l) modulo their number, in the order of the numbers, so that
            actors of few lanes do not all begin on the same ones.

        Raises:
            ValueError: there are no routes, or a number is no shard's.
        """
        self._schema = schema
        self._name = name
        self._first = first
        self._settings: dict[str, Any] = {
            "message_rows": message_rows,
            "in_flight": in_flight,
            "retry_s": retry_s,
            "connect": connect,
        }
        self._writing = threading.Lock()  # held by who appends, flushes, closes, or moves lanes
        self._place = np.empty(0, np.uint16)  # lane → the shard it writes to
        self._target = np.empty(0, np.uint16)  # lane → the shard it is to write to
        self._cut = np.empty(0, bool)  # whether a lane's next row begins an episode, whatever it says
        self._moving = False  # whether there are lanes whose place is not their target

        # All below is guarded by `_changed`, which nobody holds while waiting for a shard.
        self._changed = threading.Lock()
        self._routes = _checked(routes)
        self._addresses = dict(self._routes)  # of shards that have left as well
        self._new_routes = False  # lanes have not been given new targets yet
        self._deadline = math.inf
        self._timer: threading.Timer | None = None
        self._writers: dict[int, FlightWriter] = {}  # of each shard that a lane writes to
        self._ending: dict[threading.Thread, tuple[int, FlightWriter]] = {}
        self._made = 0  # writers, over its life
        self._lost_rows = 0
        self._error: Exception | None = None  # of a shard that refused rows while it was let go of
        self._closed = False

    def route(self, routes: Mapping[int, str], *, within_s: float) -> None:
        """Write to these shards from now on: number of each → its address. Returns at once; for any thread.

        A shard whose address has changed gets at the new one what it has not acknowledged. Lanes that have to move do so
        with their next episode, and all that are left after `within_s` seconds in the middle of one: the episode is cut
        (`Writer.close` says how), and their next row begins another. Lanes that write nothing meanwhile move as well.

        Raises:
            ValueError: there are no routes, or a number is no shard's.
        """
        routes = _checked(routes)
        with self._changed:
            pending = self._moving or self._new_routes  # lanes that were told to move before get no longer for it
            self._routes, self._new_routes = routes, True
            self._addresses |= routes
            for shard, writer in self._writers.items():
                if shard in routes:
                    writer.readdress(routes[shard])
            now = time.monotonic()
            self._deadline = min(self._deadline if pending else math.inf, now + within_s)
            if self._timer is not None:
                self._timer.cancel()
            if not self._closed:
                self._timer = threading.Timer(max(0.0, self._deadline - now), self._move_all)
                self._timer.daemon = True
                self._timer.start()

    @property
    def connections(self) -> int:
        """Connections to shards that are open: those in use, and those that are being let go of."""
        with self._changed:
            return len(self._writers) + len(self._ending)

    @property
    def lost_rows(self) -> int:
        """Rows for shards that left and died before they had acknowledged them, over the writer's life."""
        return self._lost_rows

    @property
    def waiting_for(self) -> str | None:
        """As `Writer.waiting_for`; it names the shard."""
        with self._changed:
            known = [*self._writers.items(), *self._ending.values()]
        return next((f"shard {shard}: {why}" for shard, writer in known if (why := writer.waiting_for)), None)

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """As `FlightWriter.append`."""
        with self._writing:
            if self._closed:
                raise ValueError(f"the writer {self._name} is closed")
            if self._error is not None:
                raise self._error
            count = len(rows)
            if rows.ndim != 1 or lanes.shape != rows.shape:
                raise SchemaError(f"lanes {lanes.shape} came with rows {rows.shape}; expected one lane for each row")
            if not count:
                return
            self._know(lanes)
            if self._new_routes:
                self._aim()
            if self._moving:
                if time.monotonic() >= self._deadline:
                    self._move(np.flatnonzero(self._place != self._target))
                else:
                    lanes, rows = self._append_before_moves(lanes, rows)
            self._append(lanes, rows)

    def flush(self) -> None:
        """As `FlightWriter.flush`, of all shards, those that are being let go of as well."""
        with self._writing:
            for _, writer in self._known():
                writer.flush()
            self._end_all()
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """As `FlightWriter.close`, of all shards; raises what the first one that failed has raised."""
        with self._writing:
            with self._changed:
                self._closed = True
                if self._timer is not None:
                    self._timer.cancel()
            failed: Exception | None = None
            for _, writer in self._known():
                try:
                    writer.close()
                except Exception as error:
                    failed = failed or error
            self._end_all()
            with self._changed:
                self._writers.clear()
                failed = failed or self._error
            if failed is not None:
                raise failed

    # ---------------------------------------------------------------- writing

    def _append(self, lanes: np.ndarray, rows: np.ndarray) -> None:
        """Hand rows to the shards where their lanes are. `_writing` is held, as in all methods below but `_move_all`."""
        while True:
            place = self._place[lanes]
            shards = [int(place[0])] if (place == place[0]).all() else np.unique(place).tolist()
            # Nothing is staged before all have accepted the writer: until then, its lanes may go elsewhere.
            if all(self._is_accepted(shard) for shard in shards):
                break
        if self._cut[lanes].any():
            rows = _copy(rows, np.arange(len(rows)))
            lane, at = np.unique(lanes, return_index=True)
            rows["is_first"][at[self._cut[lane]]] = True
            self._cut[lane] = False
        if len(shards) == 1:
            self._writers[shards[0]].append(lanes, rows)
            return
        # Stable, so that a lane's rows stay in order; numpy sorts numbers of 16 bits in linear time.
        order = np.argsort(place, kind="stable")
        lanes, rows, place = lanes[order], _copy(rows, order), place[order]
        begins = np.searchsorted(place, shards).tolist()
        for shard, begin, end in zip(shards, begins, [*begins[1:], len(rows)], strict=True):
            self._writers[shard].append(lanes[begin:end], rows[begin:end])

    def _append_before_moves(self, lanes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hand over what lanes write before they begin an episode, and move those that do; what is left."""
        moving = self._place[lanes] != self._target[lanes]
        starts = np.flatnonzero(moving & rows["is_first"])
        if not len(starts):
            return lanes, rows
        begun, first = np.unique(lanes[starts], return_index=True)
        start = np.full(len(self._place), len(rows))
        start[begun] = starts[first]
        before = np.arange(len(rows)) < start[lanes]
        before &= np.isin(lanes, begun)
        if before.any():
            self._append(lanes[before], _copy(rows, np.flatnonzero(before)))
            lanes, rows = lanes[~before], _copy(rows, np.flatnonzero(~before))
        self._move(begun)
        return lanes, rows

    def _is_accepted(self, shard: int) -> bool:
        """Wait until a shard has accepted the writer to it, made if there is none; False: lanes no longer go there."""
        with self._changed:
            writer = self._writers.get(shard)
            if writer is None:
                name = f"{self._name}/{self._made}" if self._made else self._name
                address = self._addresses[shard]
                writer = FlightWriter(address, self._schema, name=name, wait=False, **self._settings)
                self._writers[shard] = writer
                self._made += 1
        while not writer.wait_accepted(_TURN_S):
            if self._new_routes:
                self._aim()
                if shard not in self._routes:
                    self._move(np.flatnonzero(self._place == shard))
                    return False
        return True

    def _known(self) -> list[tuple[int, FlightWriter]]:
        with self._changed:
            return list(self._writers.items())

    # ----------------------------------------------------------------- moving

    def _know(self, lanes: np.ndarray) -> None:
        """Give lanes that have not written yet a place."""
        if (most := int(lanes.max())) >= len(self._place) or lanes.min() < 0:
            if most >= MOST_LANES or lanes.min() < 0:
                wrong = most if most >= MOST_LANES else int(lanes.min())
                raise SchemaError(f"expected lane numbers from 0 to {MOST_LANES - 1}, received {wrong}")
            grown = most + 1 - len(self._place)
            self._place, self._target = (
                np.append(known, np.full(grown, _NOWHERE, np.uint16)) for known in (self._place, self._target)
            )
            self._cut = np.append(self._cut, np.zeros(grown, bool))
        here = self._place[lanes]
        if (here == _NOWHERE).any():
            new = np.unique(lanes[here == _NOWHERE])
            with self._changed:
                shards = np.array(list(self._routes), np.uint16)
            self._place[new] = self._target[new] = shards[(self._first + new) % len(shards)]

    def _aim(self) -> None:
        """Choose where each lane is to write: where it is, as far as the shard stays and has no more than its share."""
        with self._changed:
            shards, self._new_routes = list(self._routes), False
        lanes = np.flatnonzero(self._place != _NOWHERE)
        begin = self._first % len(shards)
        shards = shards[begin:] + shards[:begin]
        share, more = divmod(len(lanes), len(shards))
        self._target[lanes] = _NOWHERE
        room: list[int] = []
        for number, shard in enumerate(shards):
            most = share + (number < more)
            here = lanes[self._place[lanes] == shard][:most]
            self._target[here] = shard
            room += [shard] * (most - len(here))
        self._target[lanes[self._target[lanes] == _NOWHERE]] = room
        self._moving = bool((self._place != self._target).any())

    def _move_all(self) -> None:
        """Move all lanes that have not moved by themselves in time; the timer's."""
        with self._writing:
            if self._closed:
                return
            if self._new_routes:
                self._aim()
            if time.monotonic() >= self._deadline:  # else `route` has been called again
                self._move(np.flatnonzero(self._place != self._target))

    def _move(self, lanes: np.ndarray) -> None:
        """Have lanes write to their targets, and end them where they were."""
        before = self._place[lanes]
        self._place[lanes] = self._target[lanes]
        self._cut[lanes] = True
        self._moving = bool((self._place != self._target).any())
        for shard in np.unique(before).tolist():
            with self._changed:
                writer = self._writers.get(shard)
                over = writer is not None and not (self._place == shard).any()
                if writer is not None and over:
                    del self._writers[shard]
                    thread = threading.Thread(target=self._end, args=(shard, writer), name=f"leaving shard {shard}")
                    thread.daemon = True
                    self._ending[thread] = shard, writer
                    thread.start()
            if writer is not None and not over:
                writer.end_lanes(lanes[before == shard].tolist())

    def _end(self, shard: int, writer: FlightWriter) -> None:
        """Let go of a shard to which no lane writes any more."""
        error: Exception | None = None
        try:
            writer.close()
        except Exception as raised:
            error = raised
        lost = writer.unacknowledged
        with self._changed:
            self._ending.pop(threading.current_thread(), None)
            if isinstance(error, LOST) and not isinstance(error, REFUSED):
                self._lost_rows += lost
            elif error is not None:
                self._error = self._error or error
        if isinstance(error, LOST) and not isinstance(error, REFUSED):
            _LOG.warning(
                "%s: %d rows for shard %d, which has left, were not acknowledged: %s", self._name, lost, shard, error
            )

    def _end_all(self) -> None:
        """Wait until shards that are being let go of have all rows."""
        with self._changed:
            ending = list(self._ending)
        for thread in ending:
            thread.join()


def _checked(routes: Mapping[int, str]) -> dict[int, str]:
    """Routes in the order of their numbers."""
    if not routes or not all(0 <= shard < MOST_SHARDS for shard in routes):
        raise ValueError(
            f"expected the address of at least one shard, numbered from 0 to {MOST_SHARDS - 1}; received {routes}"
        )
    return dict(sorted(routes.items()))


def _copy(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Some rows in an order, copied; as opaque bytes: numpy copies structured rows field by field otherwise."""
    copied: np.ndarray = rows.view(np.dtype((np.void, rows.dtype.itemsize)))[order].view(rows.dtype)
    return copied
