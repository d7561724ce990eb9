"""How far returns reach, for the support of value heads that classify."""

from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np

from actors.protocol import FloatArray, IntArray

MOST_LANES = 64  # watched of a rollout, evenly spread over its lanes
MOST_STEPS = 10_000  # of one episode that are looked at together
PIECES = 1_000  # finished episodes, or pieces of long ones, that are remembered


class ReturnExtent:
    """Lowest and highest discounted return-to-go, G_t = r_t + gamma G_{t+1}, of the episodes of some lanes.

    Behind the last known reward of an episode nothing is added: that of a truncated or running one is what was seen of it.
    """

    def __init__(self, lanes: int, discount: float) -> None:
        """`lanes` of the rollout; `discount` is gamma."""
        self._discount = discount
        self._stride = -(-lanes // MOST_LANES)
        self._watched = -(-lanes // self._stride)
        self._rewards: FloatArray = np.zeros((self._watched, 64), np.float32)
        self._length = np.zeros(self._watched, np.int64)
        self._found: deque[tuple[float, float]] = deque(maxlen=PIECES)

    def add(self, lanes: IntArray, rewards: FloatArray) -> None:
        """Rewards (batch,) of the next steps of lanes (batch,)."""
        rows, rewards = self._rows(lanes, rewards)
        at = self._length[rows]
        if len(at) and int(at.max()) >= self._rewards.shape[1]:
            if self._rewards.shape[1] >= MOST_STEPS:
                self._close(rows[at >= MOST_STEPS])
                at = self._length[rows]
            else:
                self._rewards = np.pad(self._rewards, ((0, 0), (0, min(at.max(), MOST_STEPS - self._rewards.shape[1]))))
        self._rewards[rows, at] = rewards
        self._length[rows] = at + 1

    def end(self, lanes: IntArray) -> None:
        """The episodes of lanes (batch,) are over."""
        self._close(self._rows(lanes)[0])

    def extent(self) -> tuple[float, float] | None:
        """Lowest and highest over recent episodes and the running ones; None before the first reward. From any thread."""
        rewards = self._rewards
        running = (self._of(rewards[row, :length]) for row, length in enumerate(self._length.tolist()))
        found = [pair for pair in (*list(self._found), *running) if pair is not None]
        if not found:
            return None
        return min(low for low, _ in found), max(high for _, high in found)

    def _rows(self, lanes: IntArray, rewards: FloatArray | None = None) -> tuple[IntArray, FloatArray]:
        """The watched lanes, by the row that holds their rewards."""
        values = np.zeros(len(lanes), np.float32) if rewards is None else rewards
        if self._stride == 1:
            return lanes, values
        mine = lanes % self._stride == 0
        return lanes[mine] // self._stride, values[mine]

    def _close(self, rows: IntArray) -> None:
        for row in rows.tolist():
            found = self._of(self._rewards[row, : self._length[row]])
            if found is not None:
                self._found.append(found)
        self._length[rows] = 0

    def _of(self, rewards: FloatArray) -> tuple[float, float] | None:
        if not len(rewards):
            return None
        gamma = self._discount
        backwards = rewards[::-1].tolist()
        returns = list(itertools.accumulate(backwards, lambda later, reward: reward + gamma * later))
        low, high = min(returns), max(returns)
        return (low, high) if math.isfinite(low + high) else None
