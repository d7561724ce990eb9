"""Steps as packed rows in a pool of segments that lanes fill and that are recycled, oldest first.

A lane (one environment of one actor) writes its steps in time order into a segment of its own and takes the next one from
the pool when that is full. Rows of a lane are therefore neighbours, but where a segment ends: `_next` links it to the
lane's next one. A *row number* is a place in the storage; an *item* is a row that a window can start at: it is not an
episode's last row, and its successor is written.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from .schema import SchemaError, StepSchema

NONE = -1


class SegmentStorage:
    """Packed rows of one shard. Not thread-safe: the shard holds a lock."""

    def __init__(
        self, schema: StepSchema, *, segments: int, segment_steps: int, memory: np.ndarray | None = None
    ) -> None:
        """Room for `segments` × `segment_steps` rows.

        `memory`: uint8 (≥ segments · segment_steps · row bytes,) to keep the rows in; None takes ordinary memory.
        """
        self.schema = schema
        self.segments = segments
        self.segment_steps = segment_steps
        row_bytes = schema.dtype.itemsize
        size = segments * segment_steps * row_bytes
        memory = np.zeros(size, np.uint8) if memory is None else memory[:size]
        self.rows = memory.view(schema.dtype)  # (segments · segment_steps,)
        # numpy copies a structured row field by field, and a void row by memcpy.
        self._raw = memory.view(np.dtype((np.void, row_bytes)))
        self.is_item = np.zeros(segments * segment_steps, bool)
        self.items = 0
        self.items_inserted = 0
        self.items_deleted = 0
        self._fill = np.zeros(segments, np.int64)
        self._next = np.full(segments, NONE, np.int64)
        self._sequence = np.full(
            segments, NONE, np.int64
        )  # place of a segment in the order in which segments were taken
        self._taken = 0
        self._age: deque[int] = deque()  # segments in use, oldest first
        self._lane_row = np.full(64, NONE, np.int64)  # newest row of each lane
        self._lane_segment = np.full(64, NONE, np.int64)
        self._free_lanes: list[int] = []
        self._lanes = 0

    @property
    def rows_in_use(self) -> int:
        """Row numbers below this one may be items."""
        return min(self._taken, self.segments) * self.segment_steps

    # ------------------------------------------------------------------ lanes

    def open_lane(self) -> int:
        """A lane number for a new lane."""
        if self._free_lanes:
            return self._free_lanes.pop()
        lane = self._lanes
        if lane == len(self._lane_row):
            self._lane_row = np.concatenate([self._lane_row, np.full(lane, NONE, np.int64)])
            self._lane_segment = np.concatenate([self._lane_segment, np.full(lane, NONE, np.int64)])
        self._lanes += 1
        return lane

    def close_lane(self, lane: int) -> bool:
        """End a lane: its newest row becomes the last of a truncated episode, its action and reward void.

        Returns whether a row was changed so, and will now never be an item.
        """
        newest = self._lane_row[lane]
        cut = bool(newest != NONE and not self.rows["is_last"][newest])
        if cut:
            row = self.rows[newest]
            row["is_last"], row["is_terminal"], row["reward"] = True, False, 0.0
            row["action"] = 0
        self._lane_row[lane] = self._lane_segment[lane] = NONE
        self._free_lanes.append(lane)
        return cut

    # ---------------------------------------------------------------- writing

    def append(self, lanes: np.ndarray, rows: np.ndarray) -> int:
        """Write rows, those of one lane in time order.

        lanes: int (n,) lane numbers; rows: structured (n,) of the schema's dtype. Returns how many items came to be.
        """
        if rows.dtype != self.schema.dtype:
            raise SchemaError(f"rows have the layout {rows.dtype}, the table's schema is {self.schema.dtype}")
        before = self.items_inserted
        rows = np.ascontiguousarray(rows)
        if (lanes[1:] < lanes[:-1]).any():
            order = np.argsort(lanes, kind="stable")
            lanes, rows = lanes[order], rows.view(self._raw.dtype)[order].view(rows.dtype)
        starts_lane = np.ones(len(lanes), bool)
        np.not_equal(lanes[1:], lanes[:-1], out=starts_lane[1:])
        first = np.flatnonzero(starts_lane)  # (unique lanes,) index of each lane's first row
        unique = lanes[first]
        counts = np.diff(first, append=len(lanes))
        if (counts <= self._room(unique)).all():
            self._write(unique, first, counts, rows)
            return self.items_inserted - before
        self._check_lanes(unique)
        # Where a segment fills up, lane by lane and piece by piece: taking a segment may recycle another.
        for lane, begin, count in zip(unique, first.tolist(), counts.tolist(), strict=True):
            this, done = np.array([lane]), 0
            while done < count:
                piece = min(count - done, int(self._room(this)[0]))
                if piece == 0:
                    self._extend(int(lane))
                    continue
                at = begin + done
                self._write(this, np.zeros(1, np.int64), np.array([piece]), rows[at : at + piece])
                done += piece
        return self.items_inserted - before

    def _check_lanes(self, lanes: np.ndarray) -> None:
        """Refuse lanes before anything is written: one segment must be left to recycle."""
        writing = np.count_nonzero(self._lane_segment[: self._lanes] != NONE)
        writing += np.count_nonzero(self._lane_segment[lanes] == NONE)
        if writing >= self.segments:
            raise SchemaError(
                f"{writing} lanes write to a shard of {self.segments} segments, which must be fewer than its segments; "
                "raise replay.capacity or lower replay.segment_steps"
            )

    def _room(self, lanes: np.ndarray) -> np.ndarray:
        segment = self._lane_segment[lanes]
        return np.where(segment == NONE, 0, self.segment_steps - self._fill[segment])

    def _write(self, lanes: np.ndarray, first: np.ndarray, counts: np.ndarray, rows: np.ndarray) -> None:
        """Write `counts[i]` rows from `first[i]` on to each of the distinct `lanes`; their segments have the room."""
        segment = self._lane_segment[lanes]
        begin = segment * self.segment_steps + self._fill[segment]
        place = np.repeat(begin - first, counts) + np.arange(len(rows))
        self._raw[place] = rows.view(self._raw.dtype)
        self._fill[segment] += counts
        previous = np.empty(len(rows), np.int64)  # the row before each new one in its lane
        previous[1:] = place[:-1]
        previous[first] = self._lane_row[lanes]
        self._lane_row[lanes] = place[first + counts - 1]
        previous = previous[previous != NONE]
        previous = previous[~self.rows["is_last"][previous]]
        self.is_item[previous] = True
        self.items += len(previous)
        self.items_inserted += len(previous)

    def _extend(self, lane: int) -> None:
        """Give a lane its next segment."""
        full = int(self._lane_segment[lane])
        fresh = self._take_segment()
        if full != NONE:
            self._next[full] = fresh
        self._lane_segment[lane] = fresh

    def _take_segment(self) -> int:
        """A free segment; when none is left, the oldest that no lane is writing to is recycled."""
        if self._taken < self.segments:
            segment = self._taken
        else:
            open_segments = set(self._lane_segment[: self._lanes].tolist())
            while (segment := self._age.popleft()) in open_segments:
                # A lane still fills it. Behind the others it stays older than every successor it will be linked to.
                self._age.append(segment)
            span = slice(segment * self.segment_steps, (segment + 1) * self.segment_steps)
            gone = int(np.count_nonzero(self.is_item[span]))
            self.is_item[span] = False
            self.items -= gone
            self.items_deleted += gone
        self._fill[segment] = 0
        self._next[segment] = NONE
        self._sequence[segment] = self._taken
        self._taken += 1
        self._age.append(segment)
        return segment

    # ---------------------------------------------------------------- reading

    def windows(self, start: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the windows that start at items.

        start: int64 (batch,) items. Returns rows int64 (batch, horizon + 1) and length int32 (batch,): the window ends
        with its episode, or with what is written, at row `length`, which the rows after it repeat.
        """
        rows = np.empty((len(start), horizon + 1), np.int64)
        rows[:, 0] = start
        length = np.ones(len(start), np.int32)
        rows[:, 1] = self._successor(start)
        goes_on = np.ones(len(start), bool)
        for k in range(1, horizon):
            goes_on &= self.is_item[rows[:, k]]
            rows[:, k + 1] = np.where(goes_on, self._successor(rows[:, k]), rows[:, k])
            length += goes_on
        return rows, length

    def _successor(self, row: np.ndarray) -> np.ndarray:
        following = row + 1
        segment, offset = np.divmod(following, self.segment_steps)
        at_end = offset == 0
        if at_end.any():
            following[at_end] = self._next[segment[at_end] - 1] * self.segment_steps
        return following

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Copies of rows: int64 (…,) to structured (…,)."""
        return self._raw.take(rows).view(self.schema.dtype)

    def item_ids(self, rows: np.ndarray) -> np.ndarray:
        """Stable ids of items, int64: no id is given out twice, also when its place in the storage is recycled."""
        segment, offset = np.divmod(rows, self.segment_steps)
        return self._sequence[segment] * self.segment_steps + offset

    def filled(self) -> list[tuple[int, int, int]]:
        """(segment, sequence, rows written) of the segments in use, oldest first."""
        return [(s, int(self._sequence[s]), int(self._fill[s])) for s in self._age]

    def still(self, segment: int, sequence: int) -> bool:
        """Whether a segment still holds what it held when it was taken as number `sequence`."""
        return bool(self._sequence[segment] == sequence)

    def next_sequence(self, segment: int) -> int:
        """Sequence of the segment that goes on where this one ends; NONE when it is its lane's newest."""
        following = int(self._next[segment])
        return int(self._sequence[following]) if following != NONE else NONE
