"""The groups of a queue copied out of it and into another one: what snapshots are made of, and what they are restored by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from .queue_log import encode, record_size
from .queue_spec import Part, parts_of
from .queue_state import Group, QueueState

BATCH_BYTES = 4 << 20  # a record batch of a copy ends with the group that exceeds this
_WRITER = "millrace.restore"


@dataclass(frozen=True)
class GroupCopy:
    """What is known of a complete group beside its rows."""

    rows: int
    consumed: int  # deliveries that were acknowledged
    time: int  # microseconds since the epoch at the commit of its last row


@dataclass(frozen=True)
class QueueCopy:
    """A queue as it stood once. Its groups are in the order in which they are delivered."""

    counters: dict[str, int]
    groups: list[GroupCopy]
    batches: list[pa.RecordBatch]  # the groups' rows; a batch holds whole groups


def copy_of(state: QueueState) -> QueueCopy:
    """All complete groups. The caller holds the queue's lock.

    One that is delivered and not acknowledged is among them, in its place and not consumed. Incomplete ones are left out and
    counted as dropped: their writers do not outlive a resumed run.
    """
    complete = sorted((g for g in state.groups.values() if g.complete), key=lambda g: g.order)
    incomplete = [g for g in state.groups.values() if not g.complete]
    counters = state.counters()
    counters["dropped_incomplete_groups"] += len(incomplete)
    counters["dropped_incomplete_rows"] += sum(g.rows for g in incomplete)
    return QueueCopy(
        counters=counters,
        groups=[GroupCopy(g.size, g.consumed, g.time) for g in complete],
        batches=[state.gather(some) for some in _batched(state, complete)],
    )


def _batched(state: QueueState, groups: Iterable[Group]) -> Iterator[list[Group]]:
    batch: list[Group] = []
    held: set[int] = set()
    size = 0
    for group in groups:
        messages = {number for number, _ in group.parts} - held
        held |= messages
        size += sum(state.messages[number].record.size for number in messages)
        batch.append(group)
        if size >= BATCH_BYTES:
            yield batch
            batch, held, size = [], set(), 0
    if batch:
        yield batch


def fill(state: QueueState, counters: Mapping[str, int], groups: Iterable[tuple[GroupCopy, pa.RecordBatch]]) -> None:
    """Put groups into an empty queue, in their order, and take over counters. The caller holds the queue's lock.

    All or nothing: after an error, or in a process that takes over from one killed meanwhile, the queue is empty.

    Raises:
        ValueError: the queue is not empty, is too small, or has another `group_size`.
        SchemaError: the groups have other columns, or are damaged.
    """
    spec = state.spec
    if state.counts["inserted_rows"]:
        raise ValueError(
            f"queue {spec.name!r} has taken {state.counts['inserted_rows']} rows; expected an empty one to restore into"
        )
    state.begin_restore(_WRITER)
    sequence = 0
    try:
        for about, rows in groups:
            if about.consumed < spec.times_sampled:  # it may have been more when the group was saved
                for message in _messages(state, sequence, about, rows):
                    _insert(state, sequence, about, message)
                    sequence += 1
    except BaseException:
        state.clear()
        state.writers.pop(_WRITER, None)
        raise
    state.end_restore(_WRITER, counters)


def _messages(state: QueueState, sequence: int, about: GroupCopy, rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A group's rows in messages that the queue takes: it may have come in several, and be too large for one."""
    part = _only_part(state, about, rows)
    meta = state.message_meta(_WRITER, sequence, rows.num_rows, [part], about.consumed, about.time)
    size = record_size(len(encode(meta)), pa.ipc.get_record_batch_size(rows))
    if size <= state.spec.message_bytes:
        yield rows
    elif rows.num_rows == 1:
        raise ValueError(
            f"queue {state.spec.name!r} is too small for the groups to restore: a row of group {part.key!r} takes {size} "
            f"bytes; raise max_message_bytes above {state.spec.message_bytes}"
        )
    else:
        half = rows.num_rows // 2
        yield from _messages(state, sequence, about, rows.slice(0, half))
        yield from _messages(state, sequence, about, rows.slice(half))


def _only_part(state: QueueState, about: GroupCopy, rows: pa.RecordBatch) -> Part:
    parts = parts_of(rows, state.spec)
    if len(parts) != 1 or parts[0].size != about.rows:
        found = [f"{len(part.rows)} rows of group {part.key!r} of {part.size}" for part in parts]
        raise ValueError(
            f"the groups to restore do not fit queue {state.spec.name!r}: expected one group of {about.rows} rows, found "
            f"{', '.join(found)}; restore with the group_size that they were saved with"
        )
    return parts[0]


def _insert(state: QueueState, sequence: int, about: GroupCopy, rows: pa.RecordBatch) -> None:
    spec, part, payload = state.spec, _only_part(state, about, rows), rows.serialize()
    meta = state.message_meta(_WRITER, sequence, rows.num_rows, [part], about.consumed, about.time)
    charge = state.charge(record_size(len(encode(meta)), payload.size), 1)
    new = 0 if part.key in state.writers[_WRITER].open else part.size
    for name, wanted, limit in (
        ("capacity_bytes", state.charged + charge, spec.capacity_bytes),
        ("capacity_rows", state.held_rows + new, spec.capacity_rows),
    ):
        if wanted > limit:
            raise ValueError(
                f"queue {spec.name!r} is too small for the groups to restore: group {part.key!r} does not fit; raise "
                f"{name} above {limit}"
            )
    state.insert(meta, payload)
