"""How learners read from the replay service: over Arrow Flight, from mapped storage, or by a call in the one-process mode.

A table over several shards is read as one. Where items are drawn at random, each batch takes from each shard a number of
windows drawn in proportion to the shards' masses (their item counts, or the sums of their priorities); where they are served
in order, it takes those of the best keys. The shards have drawn ahead, in blocks of many batches.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .buffers import as_bytes, buffers
from .files import map_for_reading
from .gather import WindowReader
from .layout import Layout, TableSpec, read_header
from .priorities import PriorityWriter
from .schema import SchemaError, StepSchema, Window, WindowBatch
from .security import REFUSED, Security, flight_client
from .shard import Shard
from .wire import BLOCK, ITEMS, LOST, RETRY_S, SEQUENCE, action, from_arrow, window_bytes, window_schema

_TURN_S = 0.2
MESSAGE_BYTES = 1 << 20  # of gathered windows: larger messages come no faster, and more are waited for at once
Transport = Literal["auto", "local", "flight"]
# What the keys of an ordered selector are multiplied with so that the best is the least.
BEST_FIRST = {"fifo": 1.0, "lifo": -1.0, "min_heap": 1.0, "max_heap": -1.0}


class Source(Protocol):
    """Windows drawn by one shard."""

    @property
    def mass(self) -> float:
        """What the shard weighs in a draw, as far as is known; NaN before it has told."""
        ...

    @property
    def items(self) -> int:
        """Items of the table on this shard, as far as is known."""
        ...

    @property
    def refused(self) -> Exception | None:
        """Why the shard will never be read, if that is so."""
        ...

    def keys(self, count: int, timeout_s: float) -> np.ndarray:
        """Keys of the next windows, up to `count`, in the order in which `take` gives them; none come within `timeout_s`: ()."""
        ...

    def take(self, count: int, out: WindowBatch, at: int, timeout_s: float) -> bool:
        """Put the next `count` windows into places `at` … of `out`. False when they did not come in time: nothing was taken."""
        ...

    def skip(self) -> None:
        """A batch is made. Of an ordered table whose items stay: what else was offered for it by `keys` is of no use."""
        ...

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None: ...

    def close(self) -> None: ...


class CallSource:
    """Windows of a shard in this process."""

    refused: Exception | None = None

    def __init__(self, shard: Shard, *, window: Window, table: str = "steps") -> None:
        self._shard = shard
        self._table = shard.table(table)
        self._window = window

    @property
    def mass(self) -> float:
        return self._table.mass

    @property
    def items(self) -> int:
        return self._table.items

    def keys(self, count: int, timeout_s: float) -> np.ndarray:
        return self._shard.best_keys(self._table.spec.name, count)

    def take(self, count: int, out: WindowBatch, at: int, timeout_s: float) -> bool:
        name = self._table.spec.name
        return self._shard.sample(name, count, count, self._window, timeout_s=timeout_s, out=out, at=at) is not None

    def skip(self) -> None:
        pass

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None:
        self._shard.update_priorities(self._table.spec.name, items, priorities)

    def close(self) -> None:
        pass


@dataclass
class _Block:
    """Windows that a shard has drawn, or the row numbers of those that the reader gathers."""

    stream: _Stream
    columns: dict[str, np.ndarray]
    count: int
    taken: int  # stamp of the draw
    used: int = 0


class _Stream:
    """One DoGet stream, and how many of its windows were used and not yet acknowledged."""

    def __init__(self, client: flight.FlightClient, name: str) -> None:
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"acknowledge": name}).encode())
        self._put, _ = client.do_put(descriptor, pa.schema([]))
        self._client = client
        self._open = True
        self._lock = threading.Lock()
        self.used = 0  # windows, over the stream's life; written by the one who takes them
        self.told = 0  # how many of them the shard knows of
        self.skipped = 0  # windows thrown away, over the stream's life
        self.skips_told = 0
        self.reader: WindowReader | None = None  # of the mapped storage

    def acknowledge(self) -> None:
        with self._lock, suppress(*LOST):  # the reading thread finds the lost shard and opens a new stream
            used = self.used
            count, self.told = used - self.told, used
            if self._open and count:
                self._put.write_metadata(SEQUENCE.pack(count))
            skipped = self.skipped
            count, self.skips_told = skipped - self.skips_told, skipped
            if self._open and count:
                self._put.write_metadata(SEQUENCE.pack(-count))

    def close(self) -> None:
        """Acknowledge what was used, and wait until the shard knows."""
        self.acknowledge()
        with self._lock, suppress(*LOST):
            if self._open:
                self._open = False
                self._put.close()


class StreamSource:
    """Windows of a shard over one DoGet stream that serves blocks of windows, drawn ahead.

    Where the storage lies on this host the blocks hold row numbers, and the windows are gathered here from the mapped file;
    those overwritten since they were drawn are replaced by the next ones.
    """

    def __init__(
        self,
        address: str,
        schema: StepSchema,
        *,
        window: Window,
        security: Security,
        index: int = 0,
        table: str = "steps",
        least: int = 1,
        block: int,
        ahead: int,
        afresh: bool = False,
        transport: Transport = "auto",
        retry_s: float = RETRY_S,
    ) -> None:
        """
        index: number of the shard.
        least, block: windows in one message.
        ahead: windows drawn and not used, at most.
        afresh: each block begins anew with the best items of an ordered table, and serves one batch.
        transport: local gathers from the mapped storage, flight lets the shard do it, auto is local where that can be.
        """
        self.mass = math.nan
        self.items = 0
        self.refused: Exception | None = None  # why the shard will never be read
        self.transport: str | None = None  # local or flight, once connected
        self._address = address
        self._security = security
        self._schema = schema
        self._index = index
        self._table = table
        self._window = window
        self._wanted_transport = transport
        self._afresh = afresh
        self._offered: _Block | None = None  # for the batch that is being made
        self._retry_s = retry_s
        self._ticket: dict[str, Any] = {
            "table": table,
            "window": asdict(window),
            "least": least,
            "block": block,
            "ahead": ahead,
        }
        self._received: queue.SimpleQueue[_Block | Exception] = queue.SimpleQueue()
        self._blocks: list[_Block] = []  # taken over from `_received`
        self._ready = 0  # windows in them
        self._ack_every = block  # windows
        self._opened: _Stream | None = None  # the one being read
        self._reader: Any = None
        self._priorities: PriorityWriter | None = None
        self._closing = threading.Event()
        self._to_acknowledge = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"stream-{index}", daemon=True)
        self._thread.start()
        threading.Thread(target=self._acknowledge, name=f"acknowledge-{index}", daemon=True).start()

    # ----------------------------------------------------------- the threads

    def _acknowledge(self) -> None:
        """Tell the shard what was used: a message takes as long as it takes to gather ten batches."""
        while not self._closing.is_set():
            self._to_acknowledge.wait()
            self._to_acknowledge.clear()
            if (stream := self._opened) is not None:
                stream.acknowledge()

    def _read(self) -> None:
        lost_since: float | None = None
        while not self._closing.is_set():
            stream: _Stream | None = None
            try:
                client = flight_client(self._address, self._security)
                stream = self._open(client)
                lost_since = None
                while True:
                    chunk = self._reader.read_chunk()
                    mass, self.items, taken = BLOCK.unpack(chunk.app_metadata)
                    self.mass = mass
                    if count := chunk.data.num_rows:
                        if stream.reader is None:
                            columns = from_arrow(chunk.data)
                        else:  # copied, so that they lie where compiled loops expect them
                            columns = {name: np.array(chunk.data[name]) for name in ITEMS.names}
                        self._received.put(_Block(stream, columns, count, taken))
            except StopIteration:
                error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
            except (SchemaError, *LOST) as lost:
                error = lost
            lost_since = lost_since or time.monotonic()
            if isinstance(error, (SchemaError, *REFUSED)):
                self.refused = error
            self.mass, self.items = 0.0, 0  # meanwhile the table is its other shards
            if stream is not None:
                stream.close()
            if self.refused is not None or time.monotonic() - lost_since > self._retry_s:
                self._received.put(error)
                return
            self._closing.wait(0.2)

    def _open(self, client: flight.FlightClient) -> _Stream:
        found = action(client, "describe", {})
        layout = Layout.from_json(found)
        if layout.schema != self._schema:
            raise SchemaError(
                f"the steps of {self._address} do not fit: expected {self._schema}, received {layout.schema}"
            )
        reader = self._map(found, layout)
        self.transport = "flight" if reader is None else "local"
        expected = ITEMS if reader is not None else window_schema(self._schema, self._window)
        name = uuid.uuid4().hex
        ticket = {"stream": name, "gather": "shard" if reader is None else "reader", **self._ticket}
        if reader is None:
            fitting = MESSAGE_BYTES // window_bytes(self._schema, self._window)
            ticket["block"] = max(ticket["least"], min(ticket["block"], fitting))
        self._ack_every = ticket["block"]
        self._reader = client.do_get(flight.Ticket(json.dumps(ticket).encode()))
        if not self._reader.schema.equals(expected, check_metadata=True):
            raise SchemaError(
                f"the windows of {self._address} do not fit: expected {expected}, received {self._reader.schema}"
            )
        self._opened = stream = _Stream(client, name)
        stream.reader = reader
        return stream

    def _map(self, found: dict[str, Any], layout: Layout) -> WindowReader | None:
        """A reader of the shard's storage; None where it is not on this host, or the shard is to gather.

        Raises:
            SchemaError: local transport was asked for and cannot be.
        """
        if self._wanted_transport == "flight":
            return None
        spec = next((table for table in layout.tables if table.name == self._table), TableSpec())
        why = f"its storage {found['path']} is not on this host"
        if spec.drops_early:
            why = (
                f"items of table {self._table} leave it when they are drawn or replaced, and their rows may go at once"
            )
        elif found["path"] is not None:
            with suppress(OSError):
                memory = map_for_reading(found["path"])
                header = read_header(memory)
                if header is not None and header["identity"] == found["identity"]:
                    return WindowReader(layout, layout.carve(memory[: layout.size]), self._window)
        if self._wanted_transport == "local":
            raise SchemaError(f"{self._address} cannot be read with transport local: {why}; use auto or flight")
        return None

    # ---------------------------------------------------------------- taking

    def _fill(self, count: int, timeout_s: float) -> bool:
        """Have `count` windows ready; False when they did not come in time.

        Raises:
            SchemaError: the shard's steps have other fields than this reader's.
            flight.FlightError: the shard refused the stream, or stayed away for `retry_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self._blocks and self._blocks[0].stream is not self._opened:
                # The shard has taken back what an earlier stream sent and did not see acknowledged.
                self._blocks = [block for block in self._blocks if block.stream is self._opened]
                self._ready = sum(block.count - block.used for block in self._blocks)
            if self._ready >= count:
                return True
            try:
                received = self._received.get_nowait()
            except queue.Empty:
                self._to_acknowledge.set()  # the shard may be waiting for it
                try:
                    received = self._received.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return False
            if isinstance(received, Exception):
                self._received.put(received)  # for the next call
                raise received
            self._blocks.append(received)
            self._ready += received.count

    def keys(self, count: int, timeout_s: float) -> np.ndarray:
        self._fill(count, timeout_s)
        if self._afresh and self._blocks:
            self._offered = self._blocks[0]
            return _distinct_keys(self._offered)[:count]
        # Of windows that the shard has gathered, columns are bytes.
        found = [block.columns["key"].reshape(-1).view(np.float64)[block.used :] for block in self._blocks]
        return np.concatenate(found)[:count] if found else np.empty(0)

    def skip(self) -> None:
        """As `Source.skip`; the shard takes the windows back."""
        block, self._offered = self._offered, None
        if block is not None and self._blocks and self._blocks[0] is block:
            del self._blocks[0]
            self._ready -= block.count - block.used
            block.stream.skipped += block.count - block.used
            self._to_acknowledge.set()

    def take(self, count: int, out: WindowBatch, at: int, timeout_s: float) -> bool:
        """As `Source.take`; raises what `_fill` does, and TimeoutError where nothing comes in place of overwritten windows."""
        if not self._fill(count, timeout_s):
            return False
        out.shard[at : at + count] = self._index
        again: list[int] = []  # places of windows that were overwritten before they were read
        while count:
            used = min(count, self._blocks[0].count - self._blocks[0].used)
            again += [at + k for k in self._put(used, out, at)]
            at, count = at + used, count - used
        while again:
            if not self._fill(1, timeout_s):
                raise TimeoutError(f"windows of shard {self._index} were overwritten, and none came in their place")
            if not self._put(1, out, again[-1]):
                again.pop()
        return True

    def _put(self, count: int, out: WindowBatch, at: int) -> list[int]:
        """Put the next `count` windows of the first block into places `at` …; which of them hold nothing of use."""
        block = self._blocks[0]
        begin, end = block.used, block.used + count
        reader = block.stream.reader
        if reader is None:
            _copy(block.columns, begin, end, out, at)
            bad: list[int] = []
        else:
            out.probability[at : at + count] = block.columns["probability"][begin:end]
            rows = block.columns["row"][begin:end]
            bad = reader.read(rows, out, at, out.frame_count, drawn=block.taken).tolist()
            out.frame_count += reader.distinct
        block.used = end
        if bad:
            self._drop_overwritten(block)
        block.stream.used += count
        self._ready -= count
        if block.used == block.count:
            del self._blocks[0]
        if block.stream.used - block.stream.told >= self._ack_every:
            self._to_acknowledge.set()
        return bad

    def _drop_overwritten(self, block: _Block) -> None:
        """Take out of a block what is gone already: found one by one, it would make the reader slower and more be gone."""
        assert block.stream.reader is not None
        there = block.stream.reader.there(block.columns["row"][block.used :], block.taken)
        gone = len(there) - int(np.count_nonzero(there))
        if gone:
            block.columns = {name: column[block.used :][there] for name, column in block.columns.items()}
            block.used, block.count = 0, len(there) - gone
            block.stream.used += gone
            self._ready -= gone

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None:
        """As `PriorityWriter.put`."""
        if self._priorities is None:
            self._priorities = PriorityWriter(lambda: flight_client(self._address, self._security), self._table)
        self._priorities.put(items, priorities)

    def close(self) -> None:
        self._closing.set()
        self._to_acknowledge.set()
        if self._priorities is not None:
            self._priorities.close()
        if self._opened is not None:
            self._opened.close()
        deadline = time.monotonic() + 5.0
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self._reader is not None:
                self._reader.cancel()
            self._thread.join(timeout=0.1)


def _distinct_keys(block: _Block) -> np.ndarray:
    """Keys of a block drawn in order, float64 (n,), up to where it begins again with its first item."""
    name = "row" if "row" in block.columns else "item"
    item = block.columns[name].reshape(-1).view(np.int64)[block.used :]
    again = np.flatnonzero(item[1:] == item[:1])
    keys: np.ndarray = block.columns["key"].reshape(-1).view(np.float64)[block.used :]
    return keys[: again[0] + 1] if len(again) else keys


def _copy(columns: dict[str, np.ndarray], begin: int, end: int, out: WindowBatch, at: int) -> None:
    """Windows that the shard has gathered, from its block into places `at` … of a batch."""
    to = at + end - begin
    for name, source in columns.items():
        if name == "key" or name.startswith("frames/") or name == "frame_index":
            continue
        as_bytes(getattr(out, name)[at:to], 1)[:] = source[begin:end]
    if out.frame_index is None:
        for name, frames in out.frames.items():
            as_bytes(frames[at:to], 1)[:] = columns[f"frames/{name}"][begin:end]
        return
    index = columns["frame_index"].view(np.int32)[begin:end].reshape(out.frame_index[at:to].shape)
    used, renumbered = np.unique(index, return_inverse=True)
    first, last = out.frame_count, out.frame_count + len(used)
    out.frame_index[at:to] = first + renumbered.reshape(index.shape)
    for name, frames in out.frames.items():
        as_bytes(frames[first:last], 1)[:] = columns[f"frames/{name}"][used]
    out.frame_count = last


def _is_served_afresh(table: TableSpec) -> bool:
    """Whether items are served in order and stay, so that every batch begins with the best ones."""
    return table.selector in BEST_FIRST and table.max_times_sampled is None


class Sampler:
    """Draws batches of windows over all shards of a table."""

    def __init__(
        self,
        sources: Sequence[Source],
        schema: StepSchema,
        *,
        window: Window,
        batch_size: int,
        seed: int,
        table: TableSpec | None = None,
    ) -> None:
        """`table`: its selector decides how the shards' draws are put together; None: at random."""
        self._sources = list(sources)
        self._schema = schema
        self._window = window
        self._batch_size = batch_size
        table = table or TableSpec()
        self._best_first = BEST_FIRST.get(table.selector)
        self._afresh = _is_served_afresh(table)
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._out: WindowBatch | None = None  # of the batch begun
        self._counts = np.zeros(len(sources), np.int64)  # windows still to come from each shard for it
        self._shares = np.ones(len(sources))
        self._at = 0

    def buffers(self) -> WindowBatch:
        """Room for a batch, to be passed to `sample` again and again."""
        return buffers(self._schema, self._window, self._batch_size)

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
        """The next batch, in `out` or in arrays of its own.

        A batch that was begun when the time was over is gone on with by the next call, in the arrays it was begun in.

        Raises:
            TimeoutError: the shards had no windows to give, or were not allowed to, within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        if self._out is None:
            self._begin(self.buffers() if out is None else out, deadline)
        batch = self._out
        assert batch is not None
        for index, source in enumerate(self._sources):
            if (count := int(self._counts[index])) == 0:
                continue
            while not source.take(count, batch, self._at, self._turn(deadline)):
                left = deadline - time.monotonic()
                if source.mass == 0:  # the shard is lost, or has nothing left: begin the batch again from the others
                    self._out = None
                    if len(self._sources) > 1 and left > 0:
                        return self.sample(left, batch)
                if left <= 0:
                    raise TimeoutError(f"shard {index} gave no windows within {timeout_s:g} s")
            if len(self._sources) > 1:
                batch.probability[self._at : self._at + count] *= self._shares[index]
            self._at += count
            self._counts[index] = 0
        batch.size = sum(source.items for source in self._sources)
        if self._best_first is not None:
            for source in self._sources:
                source.skip()
        self._out = None
        return batch

    def _begin(self, out: WindowBatch, deadline: float) -> None:
        """Decide how many windows of a batch come from which shard."""
        out.frame_count = 0
        if len(self._sources) == 1:
            self._counts[0] = self._batch_size
        elif self._best_first is None:
            while not (masses := self._masses(deadline)).any():
                if time.monotonic() >= deadline:
                    raise TimeoutError("no shard has a window to give")
                time.sleep(0.002)
            self._shares = masses / masses.sum()
            self._counts = self._rng.multinomial(self._batch_size, self._shares)
        else:
            self._counts = self._merge(self._best_first, deadline)
        self._out, self._at = out, 0

    def _turn(self, deadline: float) -> float:
        """Seconds to wait for one shard, before another look at whether it lives."""
        left = max(0.0, deadline - time.monotonic())
        return left if len(self._sources) == 1 else min(left, _TURN_S)

    def _masses(self, deadline: float) -> np.ndarray:
        """What each shard weighs, float64 (shards,), once each has told; 0 of those that are away."""
        while True:
            masses = np.array([source.mass for source in self._sources], np.float64)
            for source in self._sources:
                if source.refused is not None:
                    raise source.refused
            unknown = np.isnan(masses)
            if not unknown.any() or time.monotonic() >= deadline:
                return np.where(unknown, 0.0, masses)
            time.sleep(0.002)

    def _merge(self, sign: float, deadline: float) -> np.ndarray:
        """How many windows each shard gives to a batch of the best keys over all shards; int64 (shards,).

        A shard that has items and has not sent any yet is waited for, and left out when the time is over.
        """
        size = self._batch_size
        self._masses(deadline)
        while True:
            keys = [source.keys(size, self._turn(deadline) if source.items else 0.0) for source in self._sources]
            known = np.concatenate(keys)
            enough = 1 if self._afresh else size
            whole = all(len(k) >= enough or not source.items for k, source in zip(keys, self._sources, strict=True))
            if len(known) >= size and (whole or time.monotonic() >= deadline):
                shard = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
                best = np.argsort(sign * known, kind="stable")[:size]
                return np.bincount(shard[best], minlength=len(keys))
            if time.monotonic() >= deadline:
                raise TimeoutError(f"the shards have {len(known)} windows to give, {size} make a batch")
            time.sleep(0.002)

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        """New priorities, (batch,), of the items of a batch; those that have left the table meanwhile are left out.

        Raises:
            SchemaError: there are not as many as items, or one is negative or not a finite number.
        """
        values = np.asarray(priorities, np.float64)
        if values.shape != batch.item.shape:
            raise SchemaError(f"expected a priority for each of the {len(batch)} items, received shape {values.shape}")
        values = np.ascontiguousarray(values)
        if not (np.isfinite(values) & (values >= 0.0)).all():
            wrong = int(np.argmin(np.isfinite(values) & (values >= 0.0)))
            raise SchemaError(f"expected priorities that are finite and ≥ 0, received {values[wrong]} at place {wrong}")
        if len(self._sources) == 1:
            self._sources[0].update_priorities(batch.item, values)
            return
        for index, source in enumerate(self._sources):
            mine = batch.shard == index
            if mine.any():
                source.update_priorities(batch.item[mine], values[mine])

    def close(self) -> None:
        for source in self._sources:
            source.close()


def stream_sampler(
    addresses: Sequence[str],
    schema: StepSchema,
    *,
    batch_size: int,
    seed: int,
    security: Security,
    window: Window | None = None,
    table: TableSpec | None = None,
    prefetch: int = 8,
    transport: Transport = "auto",
) -> Sampler:
    """A sampler over the shards at these Flight addresses.

    prefetch: batches drawn ahead, over all shards.
    """
    window, table = window or Window(), table or TableSpec()
    least = -(-batch_size // len(addresses))
    block = max(1, prefetch // 4) * least
    afresh = _is_served_afresh(table)
    if afresh:
        least = block = batch_size
    sources = [
        StreamSource(
            address,
            schema,
            window=window,
            security=security,
            index=index,
            table=table.name,
            least=1 if table.max_times_sampled else least,  # the last few items count as well
            block=block,
            # A shard that holds nearly all the mass gives whole batches, of which all but one window may be there already.
            ahead=max(prefetch * least, block + least, batch_size + least),
            afresh=afresh,
            transport=transport,
        )
        for index, address in enumerate(addresses)
    ]
    return Sampler(sources, schema, window=window, batch_size=batch_size, seed=seed, table=table)
