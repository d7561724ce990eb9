"""The loops that change a storage: rows are appended, linked and recycled.

All state they change lies in the arrays of a shard's file (`replay.layout`), so it survives the process. A change of
several words is made crash-safe by a journal of one record: rows are written where nobody looks yet, the record of
what is about to change is written beside the last one, one aligned 8-byte store publishes it (`HEAD`), then it is applied,
and a second store says so (`APPLIED`). After a crash in between, applying the record again completes the change.
"""

from __future__ import annotations

import numpy as np

from .kernels import (
    APPEND,
    APPLIED,
    BATCH,
    COUNT,
    COUNTERS,
    DONE,
    FILL,
    FIRST_INDEX,
    HAND,
    HEAD,
    INDEX,
    INSERTED,
    KIND,
    LINKED,
    MAX_TABLES,
    NEWEST,
    NEXT,
    NONE,
    OWNER,
    PARTIAL,
    PREVIOUS,
    RECEIVED,
    RECORD_APPLIED,
    RECORD_HEAD,
    RECORD_LANES,
    RECORD_PUBLISHED,
    ROWS_WRITTEN,
    SEGMENT,
    SEGMENT_PUBLISHED,
    SEGMENT_TAKEN,
    SEQUENCE,
    SEQUENCE_DONE,
    TAKE,
    TAKEN,
    WHO,
    WRITER_RECEIVING,
    WRITER_STATE,
    fence,
    kernel,
    stackable,
)


@kernel
def _due(fault: np.ndarray, point: int) -> bool:
    """Whether a kill is asked for at this passing of a point. fault: int64 (2,), the point (0: none) and passings left."""
    if fault[0] != point:
        return False
    fault[1] -= 1
    return bool(fault[1] == 0)


@kernel
def _checksum(record: np.ndarray, words: int) -> int:
    """FNV-1a over 64-bit words."""
    value = np.uint64(0xCBF29CE484222325)
    for i in range(words):
        value = (value ^ np.uint64(record[i])) * np.uint64(0x100000001B3)
    return np.int64(value)  # type: ignore[return-value]


@kernel
def _record_words(record: np.ndarray) -> int:
    return RECORD_HEAD + (4 * record[COUNT] if record[KIND] == APPEND else 0)


@kernel
def _publish(journal: np.ndarray, state: np.ndarray, number: int) -> None:
    """Seal record `number` and make it the newest."""
    record = journal[number & 1]
    record[0] = number
    words = _record_words(record)
    record[words] = _checksum(record, words)
    fence()
    state[HEAD] = number
    fence()


@kernel
def _counted(writers: np.ndarray, writer: int) -> int:
    """The first word of the counters that a writer's items are counted in."""
    return RECEIVED if writer != NONE and writers[WRITER_STATE, writer] == WRITER_RECEIVING else INSERTED


@kernel
def _apply_append(
    record: np.ndarray,
    packed: np.ndarray,
    flags: np.ndarray,
    state: np.ndarray,
    segments: np.ndarray,
    lanes: np.ndarray,
    writers: np.ndarray,
    strides: np.ndarray,
    first_byte: int,
    last_byte: int,
    steps: int,
    history: int,
    new: np.ndarray,
    count: int,
) -> int:
    """Make the rows of a record visible: link them, make them items, move the lanes' heads. Doing it twice is doing it once.

    Rows that became items are listed in `new` from `count` on, as row · 256 + flags, and without the bit LINKED those that
    would have, were they, or the rows that their frames are stacked from, not gone; returns where the list ends.
    """
    tables = len(strides)
    inserted = np.zeros(MAX_TABLES, np.int64)
    for k in range(record[COUNT]):
        at = RECORD_HEAD + 4 * k
        lane, old, newest, index = record[at], record[at + 1], record[at + 2], record[at + 3]
        segment = newest // steps
        row = old + 1 if old != NONE and old // steps == segment else segment * steps
        previous = old
        # After a crash, between the lane's taking of this segment and the first row in it, others may have recycled the
        # one before. Its last row is then inserted and deleted at once, as writers and limiters have counted on; that it
        # ended no episode is told by its successor alone.
        gone = old != NONE and old // steps != segment and segments[NEXT, old // steps] != segment
        while row <= newest:
            is_first = packed[row, first_byte] != 0
            if previous != NONE and not is_first and (gone or packed[previous, last_byte] == 0):
                bits = LINKED
                for table in range(tables):
                    if index % strides[table] == 0:
                        bits |= 2 << table
                        inserted[table] += 1
                if bits != LINKED and (gone or not stackable(previous, history, packed, segments, first_byte, steps)):
                    new[count] = previous << 8 | bits ^ LINKED
                    count += 1
                    bits = LINKED
                if not gone:  # else the place is another lane's
                    flags[previous] = bits
                if bits != LINKED:
                    new[count] = previous << 8 | bits
                    count += 1
            gone = False
            index = 0 if is_first else index + 1
            previous = row
            row += 1
        lanes[INDEX, lane] = index
        segments[FILL, segment] = newest - segment * steps + 1
        lanes[NEWEST, lane] = newest
    writer = record[WHO]
    counted = _counted(writers, writer)
    for table in range(tables):
        state[counted + table] = record[COUNTERS + table] + inserted[table]
    if writer != NONE:
        writers[PARTIAL, writer] = record[DONE]
        if record[DONE] == 0:  # the whole batch is applied
            writers[SEQUENCE_DONE, writer] = record[BATCH]
    fence()
    state[APPLIED] = record[0]
    return count


@kernel
def _apply_take(
    record: np.ndarray,
    packed: np.ndarray,
    flags: np.ndarray,
    state: np.ndarray,
    segments: np.ndarray,
    lanes: np.ndarray,
    first_byte: int,
    steps: int,
    history: int,
    gone: np.ndarray,
    count: int,
) -> int:
    """Give a lane the segment of a record, whose old rows go. Doing it twice is doing it once.

    Rows that were items and no longer are, are listed in `gone` from `count` on, as row · 256 + the flags they had; returns
    where the list ends.
    """
    segment, lane, previous, taken = record[WHO], record[BATCH], record[DONE], record[COUNTERS]
    following = segments[NEXT, segment]
    begin = segment * steps
    segments[SEQUENCE, segment] = taken  # from here on readers know that its old rows are going
    fence()
    for row in range(begin, begin + steps):
        if flags[row] > LINKED:
            gone[count] = row << 8 | flags[row]
            count += 1
        flags[row] = 0
    # Without the steps before them, the first items of the lane's next segments could not be stacked any more.
    here, left = segment, history
    while left > 0 and following != NONE and segments[PREVIOUS, following] == here:
        here, following = following, segments[NEXT, following]
        row, end = here * steps, here * steps + segments[FILL, here]
        while left > 0 and row < end and packed[row, first_byte] == 0:
            if flags[row] > LINKED:
                gone[count] = row << 8 | flags[row]
                count += 1
            flags[row] &= LINKED
            row += 1
            left -= 1
        if row < end:
            break
    # Where items go early, a lane's segment may go before the one that leads to it, whose windows now end with it.
    before = segments[PREVIOUS, segment]
    if before != NONE and before != previous and segments[NEXT, before] == segment:
        flags[(before + 1) * steps - 1] = 0
    segments[FILL, segment] = 0
    segments[NEXT, segment] = NONE
    segments[PREVIOUS, segment] = previous
    segments[OWNER, segment] = lane
    segments[FIRST_INDEX, segment] = lanes[INDEX, lane] + 1
    if previous != NONE:
        segments[NEXT, previous] = segment
        segments[OWNER, previous] = NONE
    lanes[SEGMENT, lane] = segment
    state[TAKEN] = taken + 1
    state[HAND] = record[COUNT]
    fence()
    state[APPLIED] = record[0]
    return count


@kernel
def _choose(state: np.ndarray, segments: np.ndarray, flags: np.ndarray, steps: int, sparse: bool) -> tuple[int, int]:
    """The segment to take next, and the hand after it: a fresh one, else the oldest that no lane fills.

    `sparse`: tables drop items early, so a segment without any, and whose predecessor has none, goes first.
    """
    count = segments.shape[1]
    if state[TAKEN] < count:
        return state[TAKEN], state[HAND]
    hand = state[HAND]
    if sparse:
        for offset in range(count):
            segment = (hand + offset) % count
            if segments[OWNER, segment] != NONE or _has_items(flags, segment, steps):
                continue
            previous = segments[PREVIOUS, segment]
            linked = previous != NONE and segments[NEXT, previous] == segment
            if not linked or not _has_items(flags, previous, steps):
                return segment, hand
        # Out of turn as segments go then, the oldest is not where the hand is.
        oldest = NONE
        for segment in range(count):
            if segments[OWNER, segment] == NONE and (
                oldest == NONE or segments[SEQUENCE, segment] < segments[SEQUENCE, oldest]
            ):
                oldest = segment
        return oldest, hand
    # One that a lane still fills is passed over: it stays older than every successor it will be linked to.
    while segments[OWNER, hand] != NONE:
        hand = (hand + 1) % count
    return hand, (hand + 1) % count


@kernel
def _has_items(flags: np.ndarray, segment: int, steps: int) -> bool:
    for row in range(segment * steps, (segment + 1) * steps):  # noqa: SIM110 (numba compiles no any())
        if flags[row] > LINKED:
            return True
    return False


@kernel
def append(
    source: np.ndarray,
    lane_of: np.ndarray,
    begin: int,
    writer: int,
    batch: int,
    words: np.ndarray,
    large: np.ndarray,
    packed: np.ndarray,
    flags: np.ndarray,
    state: np.ndarray,
    segments: np.ndarray,
    lanes: np.ndarray,
    writers: np.ndarray,
    journal: np.ndarray,
    strides: np.ndarray,
    mark: np.ndarray,
    first_byte: int,
    last_byte: int,
    history: int,
    sparse: bool,
    new: np.ndarray,
    gone: np.ndarray,
    fault: np.ndarray,
) -> tuple[int, int, int]:
    """Write rows from `begin` on, commit them and make them visible.

    source: uint64 (n, row words), those of one lane in time order; lane_of: int64 (n,); words: uint64 (rows, packed words),
    large: uint64 (rows, large words) and packed: uint8 (rows, packed bytes), the storage; mark: int64 (lanes,) filled with
    NONE, scratch. Returns (rows done, entries of `new`, entries of `gone`); fewer rows than there are when `gone` is full:
    take the lists in, call again. Stopped at a fault, the rows done are −1.
    """
    n, narrow, wide = len(source), words.shape[1], large.shape[1]
    counted = _counted(writers, writer)
    steps = len(flags) // segments.shape[1]
    tables = len(strides)
    news = gones = 0
    done = begin
    while done < n:
        number = state[HEAD] + 1
        record = journal[number & 1]
        count, row, needs = 0, done, NONE
        while row < n:
            lane = lane_of[row]
            entry = mark[lane]
            if entry == NONE:
                if count == RECORD_LANES:
                    break
                if lanes[SEGMENT, lane] == NONE:
                    needs = lane
                    break
                entry = mark[lane] = count
                at = RECORD_HEAD + 4 * entry
                record[at], record[at + 1] = lane, lanes[NEWEST, lane]
                record[at + 2] = lanes[SEGMENT, lane] * steps + segments[FILL, lanes[SEGMENT, lane]] - 1
                record[at + 3] = lanes[INDEX, lane]
                count += 1
            at = RECORD_HEAD + 4 * entry
            place = record[at + 2] + 1
            if place == (lanes[SEGMENT, lane] + 1) * steps:
                needs = lane
                break
            for k in range(narrow):
                words[place, k] = source[row, k]
            for k in range(wide):
                large[place, k] = source[row, narrow + k]
            record[at + 2] = place
            row += 1
        for k in range(count):
            mark[record[RECORD_HEAD + 4 * k]] = NONE
        if row > done:
            # A lane whose segment was full when it was looked at has no new rows.
            kept = 0
            for k in range(count):
                at = RECORD_HEAD + 4 * k
                lane = record[at]
                if record[at + 2] >= lanes[SEGMENT, lane] * steps + segments[FILL, lanes[SEGMENT, lane]]:
                    to = RECORD_HEAD + 4 * kept
                    for word in range(4):
                        record[to + word] = record[at + word]
                    kept += 1
            if _due(fault, ROWS_WRITTEN):
                return -1, news, gones
            record[KIND], record[WHO], record[BATCH], record[COUNT] = APPEND, writer, batch, kept
            record[DONE] = row if row < n else 0
            for table in range(tables):
                record[COUNTERS + table] = state[counted + table]
            for table in range(tables, MAX_TABLES):
                record[COUNTERS + table] = 0
            _publish(journal, state, number)
            if _due(fault, RECORD_PUBLISHED):
                return -1, news, gones
            news = _apply_append(
                record,
                packed,
                flags,
                state,
                segments,
                lanes,
                writers,
                strides,
                first_byte,
                last_byte,
                steps,
                history,
                new,
                news,
            )
            if _due(fault, RECORD_APPLIED):
                return -1, news, gones
            done = row
        if needs != NONE:
            if gones + steps + history > len(gone):
                break
            segment, hand = _choose(state, segments, flags, steps, sparse)
            number = state[HEAD] + 1
            record = journal[number & 1]
            record[KIND], record[WHO], record[BATCH], record[DONE], record[COUNT] = (
                TAKE,
                segment,
                needs,
                lanes[SEGMENT, needs],
                hand,
            )
            record[COUNTERS] = state[TAKEN]
            _publish(journal, state, number)
            if _due(fault, SEGMENT_PUBLISHED):
                return -1, news, gones
            gones = _apply_take(record, packed, flags, state, segments, lanes, first_byte, steps, history, gone, gones)
            if _due(fault, SEGMENT_TAKEN):
                return -1, news, gones
    return done, news, gones


@kernel
def replay_journal(
    packed: np.ndarray,
    flags: np.ndarray,
    state: np.ndarray,
    segments: np.ndarray,
    lanes: np.ndarray,
    writers: np.ndarray,
    journal: np.ndarray,
    strides: np.ndarray,
    first_byte: int,
    last_byte: int,
    history: int,
    scratch: np.ndarray,
) -> int:
    """After a crash: complete the change that was published and not applied. `scratch`: int64 (rows,).

    Returns 1 when there was one, 0 when not, −1 when its checksum is wrong.
    """
    number = state[HEAD]
    if number == state[APPLIED]:
        return 0
    record = journal[number & 1]
    words = _record_words(record)
    if record[0] != number or not RECORD_HEAD <= words < journal.shape[1] or record[words] != _checksum(record, words):
        return -1
    steps = len(flags) // segments.shape[1]
    if record[KIND] == APPEND:
        _apply_append(
            record,
            packed,
            flags,
            state,
            segments,
            lanes,
            writers,
            strides,
            first_byte,
            last_byte,
            steps,
            history,
            scratch,
            0,
        )
    else:
        _apply_take(record, packed, flags, state, segments, lanes, first_byte, steps, history, scratch, 0)
    return 1


@kernel
def count_items(
    source: np.ndarray,
    lane_of: np.ndarray,
    begin: int,
    lanes: np.ndarray,
    strides: np.ndarray,
    index: np.ndarray,
    seen: np.ndarray,
    first_byte: int,
    last_byte: int,
    counts: np.ndarray,
) -> None:
    """How many items of each table rows will make, sooner or later: those that end no episode, at the table's stride.

    source: uint8 (n, row bytes); index, seen: int64 (lanes,) scratch, `seen` zero before and after; counts: int64 (tables,).
    """
    for row in range(begin, len(source)):
        lane = lane_of[row]
        if seen[lane] == 0:
            seen[lane] = 1
            index[lane] = lanes[INDEX, lane]
        index[lane] = 0 if source[row, first_byte] != 0 else index[lane] + 1
        if source[row, last_byte] == 0:
            for table in range(len(strides)):
                if index[lane] % strides[table] == 0:
                    counts[table] += 1
    for row in range(begin, len(source)):
        seen[lane_of[row]] = 0


@kernel
def open_row(lane: int, packed: np.ndarray, segments: np.ndarray, lanes: np.ndarray, last_byte: int, steps: int) -> int:
    """The newest row of a lane, unless it ends an episode or is gone: then NONE."""
    newest, segment = lanes[NEWEST, lane], lanes[SEGMENT, lane]
    if newest == NONE or packed[newest, last_byte] != 0:
        return NONE
    if newest // steps != segment and segments[NEXT, newest // steps] != segment:
        return NONE  # recycled after a crash, before the lane had written to its new segment
    return int(newest)


@kernel
def count_open(
    first: np.ndarray,
    last: np.ndarray,
    lane_of: np.ndarray,
    begin: int,
    packed: np.ndarray,
    segments: np.ndarray,
    lanes: np.ndarray,
    last_byte: int,
    seen: np.ndarray,
    stamp: int,
) -> tuple[int, int]:
    """(Rows from `begin` on that end no episode, NONE), or (0, the row that begins one though the lane's is not ended).

    first, last: uint8 (n,), of each row; seen: int64 (lanes,) scratch, kept between calls, of values below `stamp`, which
    grows by n with each call: so nothing has to be cleared.
    """
    steps = packed.shape[0] // segments.shape[1]
    n = len(first)
    starts = np.empty(64, np.int64)
    count = found = 0
    for row in range(begin, n):
        count += last[row] == 0
        if first[row] != 0:
            if found < len(starts):
                starts[found] = row
            found += 1
    # From each beginning back, looking at n rows at most; where there are many, one way forward is shorter.
    budget = n if found <= len(starts) else -1
    for k in range(found if budget >= 0 else 0):
        row, lane = starts[k], lane_of[starts[k]]
        before = row - 1
        while before >= begin and lane_of[before] != lane:
            before -= 1
        budget -= row - before
        if budget < 0:
            break
        if before >= begin:
            if last[before] == 0:
                return 0, row
        elif open_row(lane, packed, segments, lanes, last_byte, steps) != NONE:
            return 0, row
    if budget >= 0:
        return count, NONE
    for row in range(begin, n):
        lane = lane_of[row]
        if first[row] != 0:
            before = seen[lane] - stamp
            if before >= 0:
                if last[before] == 0:
                    return 0, row
            elif open_row(lane, packed, segments, lanes, last_byte, steps) != NONE:
                return 0, row
        seen[lane] = stamp + row
    return count, NONE


@kernel
def drop_unstackable(
    packed: np.ndarray, flags: np.ndarray, segments: np.ndarray, first_byte: int, history: int
) -> None:
    """Rows whose frames before them are gone are no items: for a storage found after a crash."""
    count = segments.shape[1]
    steps = len(flags) // count
    for segment in range(count):
        for row in range(segment * steps, segment * steps + min(history, segments[FILL, segment])):
            if flags[row] > LINKED and not stackable(row, history, packed, segments, first_byte, steps):
                flags[row] = LINKED
