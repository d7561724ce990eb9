"""Windows of one shard over Arrow Flight: gathered by the shard, or from its mapped storage by the reader."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .buffers import as_bytes
from .files import map_for_reading
from .gather import WindowReader
from .layout import Layout, TableSpec, read_header
from .priorities import PriorityWriter
from .schema import SchemaError, StepSchema, Window, WindowBatch
from .security import REFUSED, Security, flight_client
from .wire import BLOCK, LOST, RETRY_S, SEQUENCE, action, from_arrow, items_schema, window_bytes, window_schema

MESSAGE_BYTES = 1 << 21  # of gathered windows: larger messages come no faster, and more are waited for at once
Transport = Literal["auto", "local", "flight"]
_NUMBERS: dict[str, Any] = {
    "length": np.int32,
    "burn_in": np.int32,
    "item": np.int64,
    "probability": np.float64,
    "key": np.float64,
}


@dataclass
class _Block:
    """Windows that a shard has drawn, or the row numbers of those that the reader gathers."""

    stream: _Stream
    columns: dict[str, np.ndarray]
    count: int
    taken: int  # stamp of the draw
    probability: float  # of each window, where there is no such column
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

    @property
    def untold(self) -> int:
        """Windows used or skipped that the shard does not know of."""
        return self.used - self.told + self.skipped - self.skips_told

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
        self.has_ended = False  # it was away for so long that it is looked for no more
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
                    mass, self.items, taken, probability = BLOCK.unpack(chunk.app_metadata)
                    self.mass = mass
                    if count := chunk.data.num_rows:
                        if stream.reader is None:
                            columns = self._typed(from_arrow(chunk.data))
                        else:  # copied, so that they lie where compiled loops expect them
                            names = chunk.data.schema.names
                            columns = {name: np.array(chunk.data[name]) for name in names}
                        self._received.put(_Block(stream, columns, count, taken, probability))
            except StopIteration:
                error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
            except (SchemaError, *LOST) as lost:
                error = lost
            except Exception as unexpected:  # or the sampler would wait for this thread for ever
                error = self.refused = unexpected
            lost_since = lost_since or time.monotonic()
            if isinstance(error, (SchemaError, *REFUSED)):
                self.refused = error
            self.mass, self.items = 0.0, 0  # meanwhile the table is its other shards
            if stream is not None:
                stream.close()
            if self.refused is not None or time.monotonic() - lost_since > self._retry_s:
                self.has_ended = True
                self._received.put(error)
                return
            self._closing.wait(0.2)

    def _typed(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of windows as they lie in a batch: numbers as such, rows as bytes, uint8 (n, rows, row bytes)."""
        found = {}
        for name, column in columns.items():
            if name in _NUMBERS:
                found[name] = column.reshape(-1).view(_NUMBERS[name])
            elif name in ("steps", "ends"):
                found[name] = column.reshape(len(column), 2 if name == "ends" else self._window.rows, -1)
            else:
                found[name] = column
        return found

    def _open(self, client: flight.FlightClient) -> _Stream:
        found = action(client, "describe", {})
        layout = Layout.from_json(found)
        if layout.schema != self._schema:
            raise SchemaError(
                f"the steps of {self._address} do not fit: expected {self._schema}, received {layout.schema}"
            )
        reader = self._map(found, layout)
        self.transport = "flight" if reader is None else "local"
        selector = next((table.selector for table in layout.tables if table.name == self._table), "uniform")
        expected = window_schema(self._schema, self._window) if reader is None else items_schema(selector)
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
        found = [block.columns["key"][block.used :] for block in self._blocks]
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
        there = self._ready >= count and self._blocks[0].stream is self._opened
        if not there and not self._fill(count, timeout_s):
            return False
        frames = out.frame_count
        out.shard[at : at + count] = self._index
        again: list[int] = []  # places of windows that were overwritten before they were read
        while count:
            used = min(count, self._blocks[0].count - self._blocks[0].used)
            again += [at + k for k in self._put(used, out, at)]
            at, count = at + used, count - used
        while again:
            if not self._fill(1, timeout_s):
                out.frame_count = frames  # the call that follows begins again
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
            columns = block.columns
            known = columns["probability"][begin:end] if "probability" in columns else block.probability
            out.probability[at : at + count] = known
            rows = columns["row"][begin:end]
            bad = reader.read(rows, out, at, out.frame_count, drawn=block.taken).tolist()
            if count > 1 or not bad:  # of one overwritten window drawn again, nothing stays
                out.frame_count += reader.distinct
        block.used = end
        if bad:
            self._drop_overwritten(block)
        block.stream.used += count - len(bad)
        block.stream.skipped += len(bad)  # nobody got them: the shard takes them back
        self._ready -= count
        if block.used == block.count:
            del self._blocks[0]
        if block.stream.untold >= self._ack_every:
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
            block.stream.skipped += gone
            self._ready -= gone

    def update_priorities(self, items: np.ndarray, priorities: np.ndarray) -> None:
        """As `PriorityWriter.put`; nothing once the source is closed."""
        if self._closing.is_set():
            return
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
    item = block.columns[name][block.used :]
    again = np.flatnonzero(item[1:] == item[:1])
    keys: np.ndarray = block.columns["key"][block.used :]
    return keys[: again[0] + 1] if len(again) else keys


def _copy(columns: dict[str, np.ndarray], begin: int, end: int, out: WindowBatch, at: int) -> None:
    """Windows that the shard has gathered, from its block into places `at` … of a batch."""
    to = at + end - begin
    for name, source in columns.items():
        if name in ("steps", "ends"):
            out.raw(name)[at:to] = source[begin:end]
        elif name in _NUMBERS and name != "key":
            getattr(out, name)[at:to] = source[begin:end]
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
