"""Lines of a run's events.jsonl: what happened, when, and which process it is about."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from cluster.files import without_nonfinite

LEVELS = {"warning": "warning", "error": "error"}  # of the kinds of event that are more than news
# At the beginning of a text: "actor 3 died; …", "learner: …".
_ABOUT = re.compile(r"(outside) ([\w.-]+)|(actor|shard|learner|evaluator|exporter|relay) ?([\w.-]*\d[\w.-]*)?\b")


def event_line(kind: str, text: str, *, time_s: float | None) -> bytes:
    """One event as a line of JSON: `kind`, `text`, `time_s` on the run's clock, `time` (epoch), `level`, `role` and `id`.

    role, id: of the process that the text begins with, such as "actor" and "3"; else of the head, who tells it.
    """
    about = _ABOUT.match(text)
    role, number = ("head", "") if about is None else (about[1] or about[3], about[2] or about[4] or "")
    level = LEVELS.get(kind, "info")
    event = {
        "time_s": time_s,
        "kind": kind,
        "text": text,
        "time": time.time(),
        "level": level,
        "role": role,
        "id": number,
    }
    return json.dumps(without_nonfinite(event)).encode() + b"\n"


def read_event(line: bytes) -> dict[str, Any] | None:
    """An event that `event_line` wrote, perhaps an earlier version of it; None where a crash has cut the line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return {"time_s": None, "kind": "", "text": "", "time": 0.0, "level": "info", "role": "head", "id": ""} | found
