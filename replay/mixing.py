"""Batches of a fixed share from each of several tables: fresh experience beside prior data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import numpy as np

from .schema import WindowBatch


class Sampler(Protocol):
    """Where batches of one table come from."""

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch: ...

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None: ...

    def close(self) -> None: ...


def split(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Rows of a batch that come from each source, by largest remainder: [128, 128] for a batch of 256 and equal shares.

    Raises:
        ValueError: a share is not positive, or too small to give a row.
    """
    if not shares or min(shares) <= 0.0 or not np.isfinite(shares).all():
        raise ValueError(f"expected positive shares, received {list(shares)}")
    exact = batch_size * np.asarray(shares, np.float64) / sum(shares)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(counts - exact, kind="stable")[: batch_size - int(counts.sum())]
    counts[rest] += 1
    if counts.min() == 0:
        raise ValueError(
            f"shares {list(shares)} of a batch of {batch_size} leave a source without a row: {counts.tolist()}"
        )
    found: list[int] = counts.tolist()
    return found


_PARTS = [f.name for f in fields(WindowBatch) if f.init]


class MixedSampler:
    """Each batch holds a fixed number of rows of each source, one source after the other (RLPD: Ball et al. 2023, arXiv
    2302.02948, §4.1, halves it between online and prior data).

    Probabilities are rescaled so that importance weights undo the preferences inside each source and leave the shares, which
    are chosen on purpose, as they are: of an item with probability p in a source of n items, of N in all, it is p · n / N.
    """

    def __init__(self, samplers: Sequence[Sampler], shares: Sequence[float], *, batch_size: int) -> None:
        """`samplers[i]` draws batches of `split(batch_size, shares)[i]` windows, all of the same form."""
        if len(samplers) != len(shares):
            raise ValueError(f"expected a share for each of {len(samplers)} samplers, received {len(shares)}")
        self._samplers = list(samplers)
        self._counts = split(batch_size, shares)
        self._ends = np.cumsum(self._counts).tolist()
        self._parts: list[WindowBatch] = []  # of the batch begun
        self._shards = 0

    def sample(self, timeout_s: float, out: WindowBatch | None = None) -> WindowBatch:
        """The next batch, in `out` where that is given (but with distinct frames); the first source's windows come first.

        Raises:
            TimeoutError: a source gave nothing within `timeout_s`; what others gave is kept for the next call.
            ValueError: a source's batches are of another size than its share.
        """
        deadline = time.monotonic() + timeout_s
        into = None if out is None or out.frame_index is not None else out
        while len(self._parts) < len(self._samplers):
            number = len(self._parts)
            begin, end = self._ends[number] - self._counts[number], self._ends[number]
            part = self._samplers[number].sample(
                max(0.0, deadline - time.monotonic()), None if into is None else rows(into, begin, end)
            )
            if len(part) != self._counts[number]:
                raise ValueError(
                    f"source {number} gave {len(part)} windows; its share of a batch is {self._counts[number]}"
                )
            self._parts.append(part)
        parts, self._parts = self._parts, []
        total = sum(part.size for part in parts)
        scaled = [replace(part, probability=part.probability * (part.size / total if total else 1.0)) for part in parts]
        return _join(scaled, total, into)

    def update_priorities(self, batch: WindowBatch, priorities: np.ndarray) -> None:
        """Write priorities back, float (batch,), to the source of each window, which its place in the batch tells."""
        for sampler, count, end in zip(self._samplers, self._counts, self._ends, strict=True):
            sampler.update_priorities(rows(batch, end - count, end), priorities[end - count : end])

    def close(self) -> None:
        for sampler in self._samplers:
            sampler.close()


def rows(batch: WindowBatch, begin: int, end: int) -> WindowBatch:
    """Windows `begin` to `end` of a batch, as views of it. Distinct frames, which belong to no one window, stay whole."""
    found: dict[str, Any] = {}
    for name in _PARTS:
        value = getattr(batch, name)
        if isinstance(value, np.ndarray):
            found[name] = value[begin:end]
        elif isinstance(value, dict):
            distinct = batch.frame_index is not None
            found[name] = value if distinct else {key: array[begin:end] for key, array in value.items()}
        else:
            found[name] = value
    return WindowBatch(**found)


def _join(parts: Sequence[WindowBatch], size: int, out: WindowBatch | None) -> WindowBatch:
    """One batch of several, in `out` where that is given; what lies there already is not copied."""
    found: dict[str, Any] = {
        "size": size,
        "start": parts[0].start,
        "frames": {},
        "frame_count": sum(part.frame_count for part in parts),
    }
    for name in _PARTS:
        if name in found:
            continue
        values = [getattr(part, name) for part in parts]
        if name == "frame_index" and values[0] is not None:
            # Each part counts its own distinct frames from 0.
            begins = np.cumsum([0, *(part.frame_count for part in parts[:-1])])
            values = [v + np.int32(begin) for v, begin in zip(values, begins, strict=True)]
        found[name] = None if values[0] is None else _joined(values, None if out is None else getattr(out, name))
    for key in parts[0].frames:
        distinct = parts[0].frame_index is not None
        frames = [part.frames[key][: part.frame_count] if distinct else part.frames[key] for part in parts]
        found["frames"][key] = _joined(frames, None if out is None else out.frames[key])
    return WindowBatch(**found)


def _joined(values: Sequence[np.ndarray], out: np.ndarray | None) -> np.ndarray:
    dtype = values[0].dtype
    if out is None:
        out = np.empty((sum(map(len, values)), *values[0].shape[1:]), dtype)
    begin = 0
    for value in values:
        place = out[begin : begin + len(value)]
        begin += len(value)
        if place.__array_interface__["data"] != value.__array_interface__["data"]:
            # numpy copies a structured row field by field, and a void row by memcpy.
            raw = np.dtype((np.void, dtype.itemsize)) if dtype.names else dtype
            place.view(raw)[...] = np.ascontiguousarray(value).view(raw)
    return out
