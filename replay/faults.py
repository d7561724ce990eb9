"""Named points at which a test may kill this process, to see what a crash there leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

VARIABLE = "MILLRACE_FAULT"  # "<point>:<n>": die at the n-th passing of the point, counted from 1


def _wanted() -> tuple[str, int]:
    text = os.environ.get(VARIABLE, "")
    if not text:
        return "", 0
    point, _, times = text.rpartition(":")
    if not point or not times.isdigit() or int(times) < 1:
        raise ValueError(f"{VARIABLE} is {text!r}; expected '<point>:<n>' with n from 1, such as 'queue.commit:3'")
    return point, int(times)


_point, _left = _wanted()
_armed = bool(_point)


def wanted(points: Sequence[str]) -> tuple[int, int]:
    """Which of the points is asked for, counted from 1, and its passings until then; (0, 0) when none is.

    For compiled loops, which count by themselves and then ask for `die`.
    """
    return (points.index(_point) + 1, _left) if _armed and _point in points else (0, 0)


def die() -> None:
    """Kill this process as a crash would."""
    os.kill(os.getpid(), signal.SIGKILL)


def fault(point: str) -> None:
    """Kill this process with SIGKILL if `MILLRACE_FAULT` names this passing of `point`; else do nothing."""
    global _left
    if _armed and point == _point:
        _left -= 1
        if _left == 0:
            die()
