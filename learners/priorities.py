"""Prioritised replay on the learner's side: importance weights on the way in, new priorities on the way back.

Schaul et al. 2016, "Prioritized Experience Replay" (arXiv 1511.05952), sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from replay.schema import WindowBatch

LEAST_PRIORITY = 1e-6  # added to |delta|, so that no window is left for ever (section 3.3)
MOST_PENDING = 8  # calls whose priorities are on their way from the device


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


class WriteBack:
    """Takes priorities from the device to the sampler without holding up the updates: they are written once they are there."""

    def __init__(self, sampler: Prioritised) -> None:
        self._sampler = sampler
        self._pending: deque[tuple[WindowBatch, Tensor, Any]] = deque()  # windows, |delta|, event after its copy

    def put(self, batch: WindowBatch, delta: Tensor) -> None:
        """`delta` (windows,) are the absolute errors of a batch; on the CPU they are written at once."""
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
        """Writes what has come, and waits until at most `most` batches are still to come."""
        while self._pending:
            batch, delta, copied = self._pending[0]
            if copied is not None and not copied.query():
                if len(self._pending) <= most:
                    return
                copied.synchronize()
            self._pending.popleft()
            priorities = delta.numpy().astype(np.float64) + LEAST_PRIORITY
            # An error that is not finite ends the run at the next publication; the service would refuse it before.
            if np.isfinite(priorities).all():
                self._sampler.update_priorities(batch, priorities)
