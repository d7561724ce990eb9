"""What the compiled loops of the replay service share: where their state lies, and what numba lacks.

The loops run without the GIL: those of `replay.append_kernels` change a shard's storage, those of `replay.read_kernels` read
it, in the shard or in a reader that has mapped it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

NONE = -1
LINKED = 1  # flag of a row whose successor in the episode is written: a transition
MAX_TABLES = 7  # the other bits of a flag: the tables the row is an item of

# state: int64 words
HEAD, APPLIED, TAKEN, HAND, LANES, TOLD, CLOSED_WRITERS = range(7)  # TOLD: TAKEN when tables last knew of all changes
LEAVING = 7  # whether the shard leaves its service
# First of one word per table: items that other shards handed over, items inserted, samples drawn.
RECEIVED, INSERTED, SAMPLED = 8, 16, 24
STATE_WORDS = 32

# segments: one int64 row each
FILL, NEXT, PREVIOUS, SEQUENCE, OWNER, FIRST_INDEX = range(6)
SEGMENT_ROWS = 6

# lanes: one int64 row each. INDEX is the step index of the newest row in its episode.
NEWEST, SEGMENT, INDEX, WRITER, NUMBER = range(5)
LANE_ROWS = 5

# writers: one int64 row each. PARTIAL rows of the batch after SEQUENCE_DONE are applied.
WRITER_STATE, SEQUENCE_DONE, PARTIAL = range(3)
WRITER_ROWS = 3
# WRITER_RECEIVING: another shard hands its rows over, which are no inserts.
WRITER_FREE, WRITER_OPEN, WRITER_CLOSED, WRITER_RECEIVING = range(4)

# journal records: a head of words, then the lanes of an append, four words each
KIND, WHO, BATCH, DONE, COUNT, COUNTERS = range(1, 7)  # word 0 is the record's number
RECORD_HEAD = COUNTERS + MAX_TABLES
RECORD_LANES = 1024
JOURNAL_WORDS = RECORD_HEAD + 4 * RECORD_LANES + 1
APPEND, TAKE = 1, 2

# where a kill is asked for, for tests (`replay.faults`)
FAULTS = ("rows_written", "record_published", "record_applied", "segment_published", "segment_taken")
ROWS_WRITTEN, RECORD_PUBLISHED, RECORD_APPLIED, SEGMENT_PUBLISHED, SEGMENT_TAKEN = range(1, 6)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop that runs without the GIL; the machine code is kept on disk."""
    compiled: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled


def _fence(typingctx: Any) -> Any:
    """Neither compiler nor processor moves a load or store across it: what comes before is seen before what comes after."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


fence: Any = intrinsic(_fence)


def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, to be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0i8") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0i8"
        )
        pointer = builder.inttoptr(arguments[0], byte)
        builder.call(function, [pointer, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


prefetch: Any = intrinsic(_prefetch)


def _copy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """memcpy between addresses: for pieces of unknown size it beats a loop over words."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, of, size = arguments
        cgutils.raw_memcpy(builder, builder.inttoptr(to, byte), builder.inttoptr(of, byte), size, 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


copy: Any = intrinsic(_copy)


def _copy_line(typingctx: Any, target: Any, source: Any) -> Any:
    """Copy 64 bytes to an address that is a multiple of 64, past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8).as_pointer()
        to, of = (builder.inttoptr(address, line) for address in arguments)
        store = builder.store(builder.load(of, align=1), to, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


copy_line: Any = intrinsic(_copy_line)


@kernel
def after(row: int, steps: int, segments: np.ndarray) -> int:
    """The row that follows in the lane."""
    following = row + 1
    if following % steps == 0:
        segment = segments[NEXT, row // steps]
        return segment * steps if segment != NONE else row
    return following


@kernel
def before(row: int, steps: int, segments: np.ndarray) -> int:
    """The row before in the lane; NONE when it is gone."""
    if row % steps != 0:
        return row - 1
    segment = row // steps
    previous: int = segments[PREVIOUS, segment]
    if (
        previous == NONE
        or segments[NEXT, previous] != segment
        or segments[SEQUENCE, previous] >= segments[SEQUENCE, segment]
    ):
        return NONE
    return (previous + 1) * steps - 1


@kernel
def stackable(row: int, history: int, packed: np.ndarray, segments: np.ndarray, first_byte: int, steps: int) -> bool:
    """Whether the `history` rows before a row, of its episode, are there: its frames can be stacked."""
    for _ in range(history):
        if packed[row, first_byte] != 0:
            return True
        row = before(row, steps, segments)
        if row == NONE:
            return False
    return True
