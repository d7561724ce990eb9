"""How learners read from the replay service: over Arrow Flight, or by a call in the one-process mode.

A table over several shards is read as one: each batch takes from each shard a number of windows drawn in proportion to
the shards' masses (their item counts), from a stream of windows that the shard has already drawn.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .schema import SchemaError, StepSchema, WindowBatch
from .shard import Shard
from .wire import LOST, MASS, RETRY_S, SEQUENCE, window_schema


class Source(Protocol):
    """Windows drawn by one shard."""

    @property
    def mass(self) -> int:
        """Items of the shard, as far as is known."""
        ...

    def take(self, count: int, timeout_s: float) -> WindowBatch | None:
        """The next `count` windows; None when they did not come in time."""

    def close(self) -> None: ...


class CallSource:
    """Windows of a shard in this process."""

    def __init__(self, shard: Shard, *, horizon: int) -> None:
        self._shard = shard
        self._horizon = horizon

    @property
    def mass(self) -> int:
        return self._shard.items

    def take(self, count: int, timeout_s: float) -> WindowBatch | None:
        return self._shard.sample(count, self._horizon, timeout_s=timeout_s)

    def close(self) -> None:
        pass


class StreamSource:
    """Windows of a shard over one DoGet stream that serves blocks of windows, drawn ahead."""

    def __init__(
        self, address: str, schema: StepSchema, *, index: int, block: int, horizon: int, prefetch: int
    ) -> None:
        """
        index: number of the shard.
        block: windows in one message.
        prefetch: messages drawn ahead of use.
        """
        self.mass = 0
        self._address = address
        self._schema = schema
        self._index = index
        self._horizon = horizon
        self._ticket = {"batch": block, "horizon": horizon, "prefetch": prefetch}
        self._received: queue.SimpleQueue[tuple[_Stream, WindowBatch] | Exception] = queue.SimpleQueue()
        self._ready: deque[WindowBatch] = deque()  # taken over from `_received`; what is used of the first is cut off
        self._ready_count = 0
        self._ack_every = max(1, prefetch // 2)
        self._opened: _Stream | None = None  # the one being read
        self._reader: Any = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"stream-{index}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        lost_since: float | None = None
        while not self._closing.is_set():
            try:
                name, client = uuid.uuid4().hex, flight.FlightClient(self._address)
                self._reader = client.do_get(flight.Ticket(json.dumps({"stream": name, **self._ticket}).encode()))
                self._opened = stream = _Stream(client, name)
                lost_since = None
                expected = window_schema(self._schema, self._horizon)
                if not self._reader.schema.equals(expected, check_metadata=True):
                    raise SchemaError(
                        f"the windows of {self._address} do not fit: expected {expected.metadata}, received "
                        f"{self._reader.schema.names} with {self._reader.schema.metadata}"
                    )
                while True:
                    chunk = self._reader.read_chunk()
                    (self.mass,) = MASS.unpack(chunk.app_metadata)
                    if chunk.data.num_rows:
                        self._received.put((stream, self._windows(chunk.data)))
            except StopIteration:
                error: Exception = flight.FlightUnavailableError(f"{self._address} ended the stream")
            except (SchemaError, *LOST) as lost:
                error = lost
            lost_since = lost_since or time.monotonic()
            refused = isinstance(error, SchemaError | flight.FlightServerError)
            self.mass = 0  # meanwhile the table is its other shards
            if self._opened is not None:
                self._opened.close()
            if refused or time.monotonic() - lost_since > RETRY_S:
                self._received.put(error)
                return
            self._closing.wait(0.2)

    def _windows(self, batch: pa.RecordBatch) -> WindowBatch:
        count = batch.num_rows
        steps = np.frombuffer(batch.column(0).buffers()[1], self._schema.dtype, count * (self._horizon + 1))
        return WindowBatch(
            steps=steps.reshape(count, self._horizon + 1),
            length=batch.column(1).to_numpy(),
            item=batch.column(2).to_numpy(),
            shard=np.full(count, self._index, np.int32),
            probability=batch.column(3).to_numpy(),
        )

    def take(self, count: int, timeout_s: float) -> WindowBatch | None:
        """As `Source.take`.

        Raises:
            SchemaError: the shard's steps have other fields than this reader's.
            flight.FlightError: the shard refused the stream, or stayed away for `RETRY_S`.
        """
        deadline = time.monotonic() + timeout_s
        while self._ready_count < count:
            try:
                received = self._received.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(received, Exception):
                raise received
            stream, block = received
            if stream is not self._opened:
                continue  # the shard has taken back what an earlier stream sent and did not see acknowledged
            self._ready.append(block)
            self._ready_count += len(block)
            # Now and not once all of it is used: a batch may need more blocks than are drawn ahead.
            stream.used += 1
            if stream.used >= self._ack_every:
                stream.acknowledge()
        self._ready_count -= count
        parts: list[WindowBatch] = []
        while count > 0:
            block = self._ready.popleft()
            if count < len(block):
                self._ready.appendleft(_slice(block, count, len(block)))
                block = _slice(block, 0, count)
            parts.append(block)
            count -= len(block)
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def close(self) -> None:
        self._closing.set()
        if self._opened is not None:
            self._opened.close()
        deadline = time.monotonic() + 5.0
        while self._thread.is_alive() and time.monotonic() < deadline:
            if self._reader is not None:
                self._reader.cancel()
            self._thread.join(timeout=0.1)


class _Stream:
    """One DoGet stream, and how many of its messages were taken over and not yet acknowledged."""

    def __init__(self, client: flight.FlightClient, name: str) -> None:
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"acknowledge": name}).encode())
        self._put, _ = client.do_put(descriptor, pa.schema([]))
        self._client = client
        self._open = True
        self._lock = threading.Lock()
        self.used = 0

    def acknowledge(self) -> None:
        with self._lock, suppress(*LOST):  # the reading thread finds the lost shard and opens a new stream
            count, self.used = self.used, 0
            if self._open:
                self._put.write_metadata(SEQUENCE.pack(count))

    def close(self) -> None:
        """Acknowledge what was used, and wait until the shard knows."""
        self.acknowledge()
        with self._lock, suppress(*LOST):
            if self._open:
                self._open = False
                self._put.close()


def _slice(batch: WindowBatch, begin: int, end: int) -> WindowBatch:
    return WindowBatch(**{name: value[begin:end] for name, value in vars(batch).items()})


def concatenate(parts: Sequence[WindowBatch]) -> WindowBatch:
    """One batch of several, in order."""
    columns = {name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0]) if name != "steps"}
    dtype = parts[0].steps.dtype
    # numpy copies a structured row field by field, and a void row by memcpy.
    raw = np.dtype((np.void, dtype.itemsize))
    return WindowBatch(steps=np.concatenate([p.steps.view(raw) for p in parts]).view(dtype), **columns)


class Sampler:
    """Draws batches of windows over all shards of a table, in proportion to their masses."""

    def __init__(self, sources: Sequence[Source], *, batch_size: int, seed: int) -> None:
        self._sources = list(sources)
        self._batch_size = batch_size
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._counts: np.ndarray | None = None  # windows still to come from each shard for the batch begun
        self._shares = np.ones(1)
        self._parts: list[WindowBatch] = []

    def sample(self, timeout_s: float) -> WindowBatch:
        """The next batch.

        Raises:
            TimeoutError: the shards had no windows to give, or were not allowed to, within `timeout_s`.
        """
        if len(self._sources) == 1:
            batch = self._sources[0].take(self._batch_size, timeout_s)
            if batch is None:
                raise TimeoutError(f"no batch within {timeout_s:g} s")
            return batch
        deadline = time.monotonic() + timeout_s
        if self._counts is None:
            while not (masses := np.array([s.mass for s in self._sources], np.float64)).any():
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"no shard had a window within {timeout_s:g} s")
                time.sleep(0.005)
            self._shares = masses / masses.sum()
            self._counts = self._rng.multinomial(self._batch_size, self._shares)
        for index, source in enumerate(self._sources):
            if (count := int(self._counts[index])) == 0:
                continue
            part = source.take(count, max(0.0, deadline - time.monotonic()))
            if part is None:
                if source.mass == 0:  # the shard is lost: begin the batch again from those that live
                    self._counts, self._parts = None, []
                raise TimeoutError(f"shard {index} gave no windows within {timeout_s:g} s")
            self._parts.append(replace(part, probability=part.probability * self._shares[index]))
            self._counts[index] = 0
        parts, self._parts, self._counts = self._parts, [], None
        return concatenate(parts)

    def close(self) -> None:
        for source in self._sources:
            source.close()


def stream_sampler(
    addresses: Sequence[str], schema: StepSchema, *, batch_size: int, horizon: int, prefetch: int, seed: int
) -> Sampler:
    """A sampler over the shards at these Flight addresses; `prefetch` counts batches drawn ahead, over all shards."""
    block = -(-batch_size // len(addresses))
    sources = [
        StreamSource(address, schema, index=index, block=block, horizon=horizon, prefetch=prefetch)
        for index, address in enumerate(addresses)
    ]
    return Sampler(sources, batch_size=batch_size, seed=seed)
