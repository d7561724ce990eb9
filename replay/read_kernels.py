"""The loops that read a storage: windows, stacks of frames, ids, and what was overwritten meanwhile."""

from __future__ import annotations

import numpy as np

from .kernels import (
    LINKED,
    NONE,
    SEQUENCE,
    after,
    before,
    copy,
    copy_line,
    fence,
    kernel,
    prefetch,
    stackable,
)
from .schema import LARGE_BYTES

AHEAD = 8  # windows whose rows are asked for before they are copied
TOGETHER = 256  # windows whose rows are asked for before anything else is done with them: they fit the cache
MOST_AHEAD = 512  # bytes of a window that are asked for


@kernel
def windows(
    start: np.ndarray,
    burn_in: int,
    horizon: int,
    stack: int,
    packed: np.ndarray,
    flags: np.ndarray,
    segments: np.ndarray,
    first_byte: int,
    rows: np.ndarray,
    length: np.ndarray,
    warm: np.ndarray,
) -> None:
    """Row numbers of windows.

    start: int64 (batch,); rows: int64 (batch, burn_in + horizon + 1); length, warm: int32 (batch,). See `WindowBatch`.
    """
    steps = len(flags) // segments.shape[1]
    for b in range(len(start)):
        row = start[b]
        rows[b, burn_in] = row
        taken = 0
        for k in range(horizon):
            if flags[row] & LINKED:
                row = after(row, steps, segments)
                taken += 1
                rows[b, burn_in + 1 + k] = row
            else:
                for rest in range(k, horizon):
                    rows[b, burn_in + 1 + rest] = row
                break
        length[b] = taken
        row = start[b]
        real = 0
        for k in range(burn_in - 1, -1, -1):
            earlier = NONE if packed[row, first_byte] != 0 else before(row, steps, segments)
            if earlier == NONE or not stackable(earlier, stack - 1, packed, segments, first_byte, steps):
                for rest in range(k + 1):
                    rows[b, rest] = row
                break
            row = earlier
            rows[b, k] = row
            real += 1
        warm[b] = real


@kernel
def stacks(
    rows: np.ndarray,
    stack: int,
    packed: np.ndarray,
    segments: np.ndarray,
    first_byte: int,
    steps: int,
    out: np.ndarray,
    bad: np.ndarray,
    count: int,
) -> int:
    """Row numbers of the frames stacked at each row, oldest first; before an episode's start its first frame.

    rows: int64 (batch, n); out: int64 (batch, n · stack). Windows that lack a frame, which is gone, are listed in `bad` from
    `count` on; returns where the list ends.
    """
    batch, n = rows.shape
    for b in range(batch):
        lacks = False
        for i in range(n):
            row = rows[b, i]
            at = i * stack
            out[b, at + stack - 1] = row
            for k in range(stack - 2, -1, -1):
                if packed[row, first_byte] == 0:
                    earlier = before(row, steps, segments)
                    if earlier == NONE:
                        lacks = True
                    else:
                        row = earlier
                out[b, at + k] = row
        if lacks:
            bad[count] = b
            count += 1
    return count


@kernel
def _copy_past_caches(target: int, source: int, size: int) -> None:
    """Copy much: what is written is not read into the caches first, which saves a third of the traffic to memory."""
    head = min(-target & 63, size)
    copy(target, source, head)
    end = head + (size - head) // 64 * 64
    for at in range(head, end, 64):
        copy_line(target + at, source + at)
    copy(target + end, source + end, size - end)


@kernel
def gather(source: np.ndarray, offset: int, rows: np.ndarray, out: np.ndarray) -> None:
    """Copy bytes of rows, neighbours in one go.

    source: uint8 (rows, row bytes), from byte `offset` of a row on; rows: int64 (batch, n); out: uint8 (batch, n, bytes),
    all of a row from the offset on, or fewer.
    """
    batch, n = rows.shape
    stride, width = source.shape[1], out.shape[2]
    whole = width == stride
    first, target = source.ctypes.data + offset, out.ctypes.data
    for b in range(batch):
        if b + AHEAD < batch:
            address = first + rows[b + AHEAD, 0] * stride
            for line in range(0, min(width * (n if whole else 1), 256), 64):
                prefetch(address + line)
        k = 0
        while k < n:
            row, run = rows[b, k], 1
            if whole:
                while k + run < n and rows[b, k + run] == row + run:
                    run += 1
            if width >= LARGE_BYTES:
                _copy_past_caches(target + (b * n + k) * width, first + row * stride, run * width)
            else:
                copy(target + (b * n + k) * width, first + row * stride, run * width)
            k += run
    fence()  # for what went past the caches


@kernel
def overwritten(
    rows: np.ndarray, steps: int, segments: np.ndarray, start: int, drawn: int, taken: int, bad: np.ndarray, count: int
) -> int:
    """Windows with a row in a segment taken as number `taken` or later: listed in `bad` from `count` on.

    rows: int64 (batch, n). Of column `start`, the items, segments taken as number `drawn` or later count; −1 where there is
    no such column. Returns where the list ends.
    """
    fence()
    for b in range(rows.shape[0]):
        begin = 0
        end = 0  # of the rows that were looked at
        gone = False
        if start != NONE:
            row = rows[b, start]
            segment = row // steps
            begin = segment * steps
            end = begin + steps
            gone = segments[SEQUENCE, segment] >= drawn
        for k in range(rows.shape[1]):
            row = rows[b, k]
            if row < begin or row >= end:
                segment = row // steps
                begin = segment * steps
                end = begin + steps
                gone |= segments[SEQUENCE, segment] >= taken
        if gone:
            bad[count] = b
            count += 1
    return count


@kernel
def item_ids(rows: np.ndarray, steps: int, segments: np.ndarray, out: np.ndarray) -> None:
    """Stable ids of rows, which tell the row and the number under which its segment was taken: int64 (n,) both."""
    total = segments.shape[1] * steps
    for i in range(len(rows)):
        out[i] = segments[SEQUENCE, rows[i] // steps] * total + rows[i]


@kernel
def read(
    start: np.ndarray,
    burn_in: int,
    horizon: int,
    stack: int,
    packed: np.ndarray,
    flags: np.ndarray,
    segments: np.ndarray,
    first_byte: int,
    offset: int,
    drawn: int,
    taken: int,
    rows: np.ndarray,
    length: np.ndarray,
    warm: np.ndarray,
    item: np.ndarray,
    out: np.ndarray,
    bad: np.ndarray,
) -> int:
    """Windows of items: their rows, lengths, ids and packed rows, and which of them were overwritten meanwhile.

    As `windows`, `item_ids` and `gather`. drawn: number of the next segment to be taken when the items were drawn; taken:
    the same now; −1 for both where nobody writes meanwhile. Returns the length of the list `bad`.
    """
    steps, n = len(flags) // segments.shape[1], len(start)
    stride = packed.shape[1]
    first = packed.ctypes.data
    touched = min(stride * (horizon + 1), MOST_AHEAD)
    for begin in range(0, n, TOGETHER):
        end = min(begin + TOGETHER, n)
        for b in range(begin, end):
            address = first + start[b] * stride
            for line in range(0, touched, 64):
                prefetch(address + line)
        some = rows[begin:end]
        windows(
            start[begin:end],
            burn_in,
            horizon,
            stack,
            packed,
            flags,
            segments,
            first_byte,
            some,
            length[begin:end],
            warm[begin:end],
        )
        item_ids(start[begin:end], steps, segments, item[begin:end])
        gather(packed, offset, some, out[begin:end])
    if drawn == NONE:
        return 0
    count: int = overwritten(rows, steps, segments, burn_in, drawn, taken, bad, 0)
    for b in range(n):
        if length[b] == 0:
            bad[count] = b
            count += 1
    return count


@kernel
def rows_of(ids: np.ndarray, steps: int, segments: np.ndarray, out: np.ndarray) -> int:
    """Rows of stable ids, NONE for those overwritten since: int64 (n,) both. Returns how many are gone."""
    total = segments.shape[1] * steps
    gone = 0
    for i in range(len(ids)):
        sequence, row = divmod(ids[i], total)
        if ids[i] >= 0 and segments[SEQUENCE, row // steps] == sequence:
            out[i] = row
        else:
            out[i] = NONE
            gone += 1
    return gone
