"""A plain reference of what a replay storage holds, in lists, and a recorder that writes the same into both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from replay import kernels
from replay.buffers import buffers
from replay.gather import WindowReader
from replay.layout import Layout, TableSpec
from replay.schema import Window, WindowBatch
from replay.storage import SegmentStorage

from .replay_for_tests import end, rows, schema


@dataclass(frozen=True)
class Piece:
    """Some steps of one lane: `first` begins an episode with them in any case, `last` ends one."""

    writer: int
    lane: int
    count: int
    first: bool = False
    last: bool = False
    terminal: bool = False


class Reference:
    """What lanes have written, as plain lists; a step is known by its number, all numbers count from 0 on.

    `stored` are the numbers of the steps that are not evicted: the storage chooses those, and the tests check its choice.
    """

    def __init__(self, *, frames: bool) -> None:
        self.frames = frames
        self.steps = schema(frames=frames).zeros(0)
        self.lanes: list[list[int]] = []
        self.places: list[tuple[int, int, int]] = []  # by number: lane, place in the lane, index in the episode
        self.stored: set[int] = set()

    def write(self, lane: int, piece: Piece) -> np.ndarray:
        """The next rows of a lane."""
        begin, numbers = len(self.steps), self.lanes[lane]
        new = rows(np.arange(begin, begin + piece.count), frames=self.frames)
        new["is_first"][0] = piece.first or (bool(numbers) and bool(self.steps["is_last"][numbers[-1]]))
        if piece.last:
            end(new, terminal=piece.terminal)
        for k in range(piece.count):
            number = begin + k
            index = 0 if new["is_first"][k] or not numbers else self.places[numbers[-1]][2] + 1
            self.places.append((lane, len(numbers), index))
            numbers.append(number)
        grown = schema(frames=self.frames).zeros(begin + piece.count)
        grown[:begin], grown[begin:] = self.steps, new
        self.steps = grown
        return new

    def cut(self, lane: int) -> bool:
        """A lane ends; whether its newest step was changed for that."""
        newest = self.lanes[lane][-1:]
        if not newest or self.steps["is_last"][newest[0]]:
            return False
        row = self.steps[newest[0]]
        row["is_last"], row["is_terminal"], row["reward"], row["action"] = True, False, 0.0, 0
        return True

    def ever_linked(self, number: int) -> bool:
        """Whether a step's successor in its episode was ever written."""
        lane, place, _ = self.places[number]
        numbers = self.lanes[lane]
        if place + 1 == len(numbers) or self.steps["is_last"][number]:
            return False
        return not self.steps["is_first"][numbers[place + 1]]

    def after(self, number: int) -> int | None:
        """The successor in the episode, if it is stored."""
        if not self.ever_linked(number):
            return None
        lane, place, _ = self.places[number]
        following = self.lanes[lane][place + 1]
        return following if following in self.stored else None

    def before(self, number: int) -> int | None:
        """The predecessor in the episode, if it is stored."""
        lane, place, _ = self.places[number]
        if place == 0 or self.steps["is_first"][number]:
            return None
        previous = self.lanes[lane][place - 1]
        return previous if previous in self.stored else None

    def stack(self, number: int, count: int) -> list[int] | None:
        """The steps whose frames are stacked at this one, oldest first; None where one of them is gone."""
        found = [number]
        while len(found) < count:
            if self.steps["is_first"][found[0]]:
                found.insert(0, found[0])
                continue
            previous = self.before(found[0])
            if previous is None:
                return None
            found.insert(0, previous)
        return found

    def items(self, table: TableSpec, history: int) -> set[int]:
        """Steps that are items of a table which drops none."""
        return {
            number
            for number in self.stored
            if self.after(number) is not None
            and self.places[number][2] % table.stride == 0
            and self.stack(number, history + 1) is not None
        }

    def window(self, number: int, window: Window) -> tuple[list[int], int, int]:
        """(the steps of a window's columns, its length, its burn-in)."""
        columns, length, warm = [number], 0, 0
        while length < window.length and (following := self.after(columns[-1])) is not None:
            columns.append(following)
            length += 1
        columns += columns[-1:] * (window.length - length)
        while warm < window.burn_in and (previous := self.before(columns[0])) is not None:
            if window.observations == "all" and self.stack(previous, window.stack) is None:
                break
            columns.insert(0, previous)
            warm += 1
        return columns[:1] * (window.burn_in - warm) + columns, length, warm

    def check(self, batch: WindowBatch, numbers: list[int], window: Window, bad: set[int]) -> None:
        """Compare the windows of steps with those delivered, but for the places in `bad`."""
        start = window.burn_in
        discount = 0.9
        masks = batch.mask()
        returns, bootstraps = batch.returns(discount)
        for place, number in enumerate(numbers):
            if place in bad:
                continue
            columns, length, warm = self.window(number, window)
            assert batch.length[place] == length
            assert length >= 1
            assert batch.burn_in is None or batch.burn_in[place] == warm
            steps = batch.steps[place]
            for name in steps.dtype.names or ():
                np.testing.assert_array_equal(steps[name], self.steps[name][columns], err_msg=name)
            assert len(columns) == window.rows == len(steps)
            seen = columns
            if window.observations == "ends":
                seen = [columns[start], columns[start + length]]
                assert not [name for name in steps.dtype.names or () if name.startswith("observation")]
                assert batch.ends is not None
                for name in batch.ends.dtype.names or ():
                    np.testing.assert_array_equal(batch.ends[place][name], self.steps[name][seen])
            for name, frames in batch.frames.items():
                delivered = frames[place] if batch.frame_index is None else frames[batch.frame_index[place]]
                for column, step in enumerate(seen):
                    stack = self.stack(step, window.stack)
                    np.testing.assert_array_equal(delivered[column], self.steps[name][stack])
            expected_mask = [start - warm <= column < start + length for column in range(window.rows - 1)]
            assert masks[place].tolist() == expected_mask
            expected = sum(discount**k * float(self.steps["reward"][columns[start + k]]) for k in range(length))
            assert np.isclose(returns[place], expected, rtol=1e-5)
            terminal = self.steps["is_terminal"][columns[start + length]]
            assert np.isclose(bootstraps[place], 0.0 if terminal else discount**length, rtol=1e-6)


class Recorder:
    """Writes the same into a storage and into a reference, and compares them."""

    def __init__(
        self,
        tables: tuple[TableSpec, ...],
        *,
        segments: int,
        segment_steps: int,
        history: int = 0,
        frames: bool = False,
    ) -> None:
        layout = Layout(schema(frames=frames), segments, segment_steps, tables)
        self.history = history
        self.memory = np.zeros(layout.size, np.uint8)
        self.storage = SegmentStorage(layout, memory=self.memory, history=history, changed=self.changed)
        self.reference = Reference(frames=frames)
        self.items = [0] * len(tables)  # by what the storage told
        self.dropped: list[set[int]] = [set() for _ in tables]
        self.ids: dict[int, int] = {}  # every id ever given → the step's number
        self._slots: dict[int, int] = {}
        self._sequences: dict[int, int] = {}
        self._lanes: dict[tuple[int, int], tuple[int, int]] = {}  # writer and its lane → storage's and reference's lane
        self._names = 0

    def changed(self, gone: np.ndarray, new: np.ndarray) -> None:
        """Count items as the storage tells of them."""
        for table in range(len(self.items)):
            self.items[table] += int(((new & 2 << table != 0) & (new & 1 != 0)).sum()) - int(
                (gone & 2 << table != 0).sum()
            )

    def write(self, *pieces: Piece) -> None:
        """One batch for each writer among the pieces; rows of its lanes come in a mixed order, those of one lane in time."""
        for writer in dict.fromkeys(piece.writer for piece in pieces):
            lanes, steps = self.batch(writer, [piece for piece in pieces if piece.writer == writer])
            self.apply(writer, lanes, steps)

    def batch(self, writer: int, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """A writer's next batch, as the storage takes it: (lanes, rows)."""
        if writer not in self._slots:
            self._names += 1
            self._slots[writer], self._sequences[writer] = self.storage.open_writer(f"w{self._names}"), 0
        numbers, parts = [], []
        for piece in pieces:
            key = (writer, piece.lane)
            if key not in self._lanes:
                self._lanes[key] = self.storage.open_lane(self._slots[writer], piece.lane), len(self.reference.lanes)
                self.reference.lanes.append([])
            lane, own = self._lanes[key]
            numbers.append(np.full(piece.count, lane))
            parts.append(self.reference.write(own, piece))
        lanes = np.concatenate(numbers)
        order = np.random.default_rng(len(self.reference.steps)).permutation(len(lanes))
        for lane in np.unique(lanes):
            of_lane = lanes[order] == lane
            order[of_lane] = np.sort(order[of_lane])
        steps = self.storage.layout.schema.zeros(len(lanes))
        at = 0
        for part in parts:
            steps[at : at + len(part)] = part
            at += len(part)
        return lanes[order], steps[order]

    def apply(self, writer: int, lanes: np.ndarray, steps: np.ndarray) -> None:
        """Write and commit a batch."""
        slot, sequence = self._slots[writer], self._sequences[writer]
        before = np.array([self.storage.inserted(table) for table in range(len(self.items))])
        assert self.storage.last_sequence(slot) == sequence - 1
        self.storage.append(slot, sequence, lanes, steps)
        assert self.storage.last_sequence(slot) == sequence
        self._sequences[writer] = sequence + 1
        assert (np.array([self.storage.inserted(table) for table in range(len(self.items))]) >= before).all()

    def slot(self, writer: int) -> int:
        """A writer's slot in the storage."""
        return self._slots[writer]

    def sequence(self, writer: int) -> int:
        """Number of a writer's next batch."""
        return self._sequences[writer]

    def skip(self, writer: int) -> None:
        """A writer's next batch is found to be applied."""
        self._sequences[writer] += 1

    def close(self, writer: int) -> None:
        """End a writer and its lanes."""
        if writer in self._slots:
            cut = self.storage.close_writer(self._slots.pop(writer))
            own = [lane for (who, _), (_, lane) in self._lanes.items() if who == writer]
            assert cut == sum(self.reference.cut(lane) for lane in own)
            self._lanes = {key: lanes for key, lanes in self._lanes.items() if key[0] != writer}

    def drop(self, table: int, numbers: set[int]) -> None:
        """Some steps leave a table."""
        places = self.places()
        kept = [number for number in numbers if self.storage.flags[places[number]] & 2 << table]
        self.storage.drop(np.array([places[number] for number in kept], np.int64), table)
        self.items[table] -= len(kept)
        self.dropped[table] |= set(kept)

    def places(self) -> dict[int, int]:
        """Number → row of every step that is stored."""
        storage, steps = self.storage, self.storage.layout.segment_steps
        segments = storage.arrays["segments"]
        found = {}
        for segment in np.flatnonzero(segments[kernels.SEQUENCE] != kernels.NONE).tolist():
            for row in range(segment * steps, segment * steps + int(segments[kernels.FILL, segment])):
                found[int(storage.rows["policy_version"][row])] = row
        return found

    def number(self, rows: np.ndarray) -> list[int]:
        """Numbers of the steps in rows."""
        found: list[int] = self.storage.rows["policy_version"][rows].tolist()
        return found

    def rows_of_items(self, table: int) -> np.ndarray:
        """Rows of a table's items."""
        return np.flatnonzero(self.storage.flags & 2 << table)

    def check(self) -> None:
        """Flags, counters, ids, and which steps are there."""
        storage, reference = self.storage, self.reference
        places = self.places()
        stored = reference.stored = set(places)
        assert len(stored) == int(storage.arrays["segments"][kernels.FILL].sum())
        if not any(table.drops_early for table in storage.layout.tables):  # what is gone are the oldest of each lane
            for numbers in reference.lanes:
                kept = [number in stored for number in numbers]
                assert kept == sorted(kept)
        linked = {number for number, row in places.items() if storage.flags[row] & kernels.LINKED}
        assert linked == {number for number in stored if reference.after(number) is not None}
        for table, spec in enumerate(storage.layout.tables):
            expected = reference.items(spec, self.history) - self.dropped[table]
            found = set(self.number(self.rows_of_items(table)))
            assert found == expected
            assert len(found) == self.items[table] == len(self.rows_of_items(table))
            ever = [n for n in range(len(reference.places)) if reference.ever_linked(n)]
            assert storage.inserted(table) == sum(reference.places[n][2] % spec.stride == 0 for n in ever)
        rows_stored = np.array(list(places.values()), np.int64)
        ids = storage.item_ids(rows_stored)
        for item, number in zip(ids.tolist(), places, strict=True):
            assert self.ids.setdefault(item, number) == number, "an id was given twice"
        expected_rows = [places.get(number, kernels.NONE) for number in self.ids.values()]
        assert storage.rows_of(np.array(list(self.ids), np.int64)).tolist() == expected_rows

    def read(self, rows: np.ndarray, window: Window, *, drawn: int = kernels.NONE) -> None:
        """Read the windows of rows and compare them with the reference.

        Without `drawn`, the stamp of the draw, as under the shard's lock, all must be right.
        """
        numbers = self.number(rows)
        self.read_drawn(rows, numbers, window, drawn)

    def read_drawn(self, rows: np.ndarray, numbers: list[int], window: Window, drawn: int) -> set[int]:
        """Read the windows of rows that were drawn as these steps; returns which were overwritten since."""
        reference, layout = self.reference, self.storage.layout
        reference.stored = set(self.places())
        reader = WindowReader(layout, self.storage.arrays, window)
        batch = buffers(layout.schema, window, len(rows))
        bad = reader.read(rows, batch, 0, drawn=drawn).tolist()
        lost = {
            place
            for place, number in enumerate(numbers)
            if number not in reference.stored
            or reference.after(number) is None
            or reference.stack(number, window.stack) is None
        }
        assert sorted(lost) == bad
        if batch.frame_index is not None:
            assert reader.distinct == len(np.unique(batch.frame_index))
        reference.check(batch, numbers, window, lost)
        good = [place for place in range(len(rows)) if place not in lost]
        assert [self.ids.get(int(batch.item[place]), numbers[place]) for place in good] == [numbers[p] for p in good]
        return lost
