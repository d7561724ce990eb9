"""How a reader's new priorities go back to a shard."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight

from .security import REFUSED
from .wire import LOST, PRIORITIES

_MOST = 65_536  # priorities that wait to be sent; beyond it `put` blocks


class PriorityWriter:
    """Sends priorities over one DoPut stream from a thread of its own, as many in one message as have gathered meanwhile.

    They are not acknowledged: those on their way to a shard that dies are lost, and its items keep the priorities they had.
    """

    def __init__(self, connect: Callable[[], flight.FlightClient], table: str) -> None:
        self._connect = connect
        self._descriptor = flight.FlightDescriptor.for_command(json.dumps({"priorities": table}).encode())
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0  # priorities in `_waiting`
        self._sending = False
        self._closing = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._client: Any = None
        self._put: Any = None
        self._thread = threading.Thread(target=self._run, name=f"priorities of {table}", daemon=True)
        self._thread.start()

    def put(self, items: np.ndarray, priorities: np.ndarray) -> None:
        """Hand over priorities, float64 (n,), of items, int64 (n,). Blocks while very many wait.

        Raises:
            flight.FlightError: the shard refused earlier ones.
            Exception: what else ended the sending.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._count < _MOST or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting.append((items.copy(), priorities.copy()))
            self._count += len(items)
            if not self._sending:
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything was sent, or lost."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._sending) or self._error is not None)

    def close(self) -> None:
        """Send what waits, and wait until the shard has taken it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            self._send_all()
        except Exception as error:  # or `put` would wait for this thread for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _send_all(self) -> None:
        while self._error is None:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    break
                batches, self._waiting, self._count = self._waiting, [], 0
                self._sending = True
                self._changed.notify_all()
            items, priorities = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
            message = pa.record_batch([items, priorities], schema=PRIORITIES)
            for _ in range(2):  # a shard that has gone may be back
                if self._send(message):
                    break
            with self._changed:
                self._sending = False
                self._changed.notify_all()
        self._end()

    def _send(self, message: pa.RecordBatch) -> bool:
        try:
            if self._put is None:
                self._client = self._connect()
                self._put, _ = self._client.do_put(self._descriptor, PRIORITIES)
            self._put.write_batch(message)
            return True
        except LOST:
            self._end()
            return False

    def _end(self) -> None:
        """Close the stream, and keep what the shard refused, if it did."""
        put, self._put = self._put, None
        if put is not None:
            try:
                put.close()
            except REFUSED as error:
                self._error = error
            except LOST:
                pass
            self._client.close()
