"""Importance weights of windows on the way in; on the way back their errors, as new priorities and as losses of tasks.

Prioritised replay: Schaul et al. 2016, "Prioritized Experience Replay" (arXiv 1511.05952), sections 3.3 and 3.4. What a task's
errors are good for: Jiang et al. 2021, "Prioritized Level Replay" (arXiv 2010.03934), section 3.1.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from learners.policy import TASK
from replay.schema import WindowBatch

LEAST_PRIORITY = 1e-6  # added to |delta|, so that no window is left for ever (section 3.3)
MOST_PENDING = 8  # calls whose errors are on their way from the device


class Prioritised(Protocol):
    """Takes new priorities; a sampler does."""

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        """New priorities, float64 (windows,), of windows drawn; called from another thread than the one that samples."""
        ...


@dataclass(frozen=True)
class Importance:
    """How strongly importance weights undo the preference of prioritised draws: beta, which rises from `start` to 1 over
    `updates` updates (section 3.4)."""

    start: float
    updates: int

    def exponent(self, update: int) -> float:
        """beta at an update, counted from 0."""
        return self.start + (1.0 - self.start) * min(1.0, update / self.updates)

    def weights(self, batch: WindowBatch, *, update: int, calls: int = 1) -> np.ndarray:
        """Weights, float32 (windows,), of a draw for `calls` updates from number `update` on, at most 1 in each update.

        Of several learners each divides by the largest weight of its own part.
        """
        beta = np.array([self.exponent(update + i) for i in range(calls)])
        preference = max(batch.size, 1) * batch.probability.reshape(calls, -1)  # (calls, batch)
        weights = np.power(preference, -beta[:, None])
        scaled: np.ndarray = (weights / weights.max(1, initial=1e-300, keepdims=True)).astype(np.float32)
        return scaled.reshape(-1)


def has_tasks(batch: WindowBatch) -> bool:
    """Whether rows tell the number of their task."""
    return TASK in (batch.steps.dtype.names or ())


class TaskLosses:
    """Sums of the absolute errors of windows by task, since they were last taken; for any thread.

    A window is of the task of its item's row: a task does not change within an episode.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = np.zeros(0)  # by number of the task
        self._windows = np.zeros(0, np.int64)

    def add(self, batch: WindowBatch, delta: np.ndarray) -> None:
        """`delta` float64 (windows,) are the absolute errors of windows that have tasks; negative numbers are of no task."""
        tasks = batch.steps[TASK][:, batch.start]
        known = tasks >= 0
        tasks = tasks[known]
        with self._lock:
            # Dense, for it costs each call no more than its own windows; doubled, for tasks come in any order.
            needed = int(tasks.max(initial=-1)) + 1
            if needed > len(self._sums):
                more = max(needed, 2 * len(self._sums)) - len(self._sums)
                self._sums = np.pad(self._sums, (0, more))
                self._windows = np.pad(self._windows, (0, more))
            np.add.at(self._sums, tasks, delta[known])
            np.add.at(self._windows, tasks, 1)

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Numbers of tasks, int64 (n,) ascending, the sums of their errors, float64 (n,), and of how many windows, int64 (n,).

        None if there were no windows.
        """
        with self._lock:
            tasks = np.flatnonzero(self._windows)
            if not len(tasks):
                return None
            taken = tasks, self._sums[tasks], self._windows[tasks]
            self._sums[tasks] = 0.0
            self._windows[tasks] = 0
        return taken


class WriteBack:
    """Takes errors from the device to those who want them without holding up the updates: they get them once they are there."""

    def __init__(self, sampler: Prioritised | None, losses: TaskLosses | None = None) -> None:
        """
        sampler: gets them as priorities; None where draws are uniform.
        losses: gets them where windows have tasks.
        """
        self._sampler = sampler
        self._losses = losses
        self._pending: deque[tuple[WindowBatch, Tensor, Any]] = deque()  # windows, |delta|, event after its copy

    def put(self, batch: WindowBatch, delta: Tensor) -> None:
        """`delta` (windows,) are the absolute errors of a batch; on the CPU they are handed over at once."""
        if delta.device.type == "cuda":
            host = torch.empty(delta.shape, dtype=delta.dtype, pin_memory=True)
            host.copy_(delta, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            self._pending.append((batch, host, copied))
        else:
            self._pending.append((batch, delta, None))
        self.flush(most=MOST_PENDING)

    def flush(self, most: int = 0) -> None:
        """Hands over what has come, and waits until at most `most` batches are still to come."""
        while self._pending:
            batch, delta, copied = self._pending[0]
            if copied is not None and not copied.query():
                if len(self._pending) <= most:
                    return
                copied.synchronize()
            self._pending.popleft()
            errors = delta.numpy().astype(np.float64)
            # An error that is not finite ends the run at the next publication; the service would refuse it before.
            if not np.isfinite(errors).all():
                continue
            if self._sampler is not None:
                self._sampler.update_priorities(batch, errors + LEAST_PRIORITY)
            if self._losses is not None and has_tasks(batch):
                self._losses.add(batch, errors)
