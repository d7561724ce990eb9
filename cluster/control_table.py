"""What `millrace status` and `millrace logs` print for a person."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cluster.control import Line, Process, Status

MOST_ROWS = 40  # of the table of processes; of more, actors without anything to tell are counted only
# Metric, what a reader should call it, whether it is a share.
_FIGURES = (
    ("steps_per_s", "steps/s", False),
    ("samples_per_s", "completions/s", False),
    ("updates_per_s", "updates/s", False),
    ("samples_per_insert", "samples per insert", False),
    ("policy_lag", "policy lag", False),
    ("return_mean_100", "mean return, last 100", False),
    ("replay_fill", "replay fill", True),
    ("waste/share", "wasted steps", True),
    ("restarts", "restarts", False),
)
# Figure of a process, what a reader should call it; the first two that it has are shown.
_OF_A_PROCESS = (
    *(("env_steps", "steps"), ("samples", "completions"), ("episodes", "episodes"), ("updates", "updates")),
    *(("inserted", "inserted"), ("sampled", "sampled")),
)
_TIMES = ("actor", "learner")  # kinds whose states, time/<kind>/<state>_s, are parts of time/<kind>/wall_s


def shown(found: Status, *, every: bool) -> Iterator[RenderableType]:
    """The parts of what `status` prints."""
    from rich.table import Table
    from rich.text import Text

    from cluster.live import duration, number

    counts = ((found["actors"], "actor"), (found["shards"], "shard"), (found["learners"], "learner"))
    yield Text(
        f"{found['run']}: {found['state']}, step {number(found['step'])}, {number(found['updates'])} updates, "
        f"{duration(found['time_s'])} gone; "
        + ", ".join(
            f"{count['running']} of " * (count["running"] != count["wanted"]) + several(count["wanted"], what)
            for count, what in counts
        )
    )
    yield Text(_figures(found))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("process", "state", "node", "pid", "so far"):
        table.add_column(heading, justify="right" if heading == "pid" else "left", overflow="fold")
    for row in _rows(found["processes"], every=every or len(found["processes"]) <= MOST_ROWS):
        table.add_row(*map(Text, row))
    yield table
    for line in waiting(found):
        yield Text(line)


def waiting(found: Status, *, running: bool = True) -> list[str]:
    """What waits for what, a sentence each; without `running`, none about processes that run."""
    lines = dict.fromkeys(found["waiting"])
    for one in found["processes"]:
        if one["waits_for"]:
            line = f"{one['name']} waits for {one['waits_for']}"
            lines[line] = None
            if not running and one["state"] == "running":
                del lines[line]
    return list(lines)


def several(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count} {what}{'s' * (count != 1)}"


def _figures(found: Status) -> str:
    """Rates and shares in one line, and one of what the time of actors and learners goes into."""
    from cluster.live import number, share

    metrics = found["metrics"]
    known = [(label, metrics.get(name), is_share) for name, label, is_share in _FIGURES]
    lines = [
        ", ".join(
            f"{label} {share(value) if is_share else number(value, 0 if abs(value) >= 100 or value == int(value) else 1)}"
            for label, value, is_share in known
            if value is not None and abs(value) < float("inf")
        )
    ]
    for kind in _TIMES:
        start = f"time/{kind}/"
        spent = {name.removeprefix(start): s for name, s in metrics.items() if name.startswith(start) and s}
        if whole := spent.pop("wall_s", 0.0):
            parts = (
                f"{name.removesuffix('_s').replace('_', ' ')} {share(seconds / whole)}"
                for name, seconds in sorted(spent.items(), key=lambda each: -each[1])
            )
            lines.append(f"time of {kind}s: {', '.join(parts)}")
    return "\n".join(line for line in lines if line)


def _rows(processes: Sequence[Process], *, every: bool) -> Iterator[tuple[str, ...]]:
    """Rows of the table of processes."""
    from cluster.live import compact

    counted: Counter[str] = Counter()
    for one in processes:
        if not every and one["kind"] == "actor" and one["state"] == "running" and not one["waits_for"]:
            counted[one["node"]] += 1
            continue
        figures = [f"{compact(one['figures'][key])} {word}" for key, word in _OF_A_PROCESS if key in one["figures"]]
        pid = str(one["pid"] or "")
        yield one["name"], one["state"], one["node"], pid, ", ".join(figures[:2])
    for node, count in sorted(counted.items()):
        yield several(count, "actor"), "running", node, "", ""


def log_line(line: Line) -> str:
    """A line of the log, for a person."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line["time"]))
    whom = f"{line['role']} {line['id']}".strip()
    # A text from another program must not steer the terminal.
    text = "".join(c if c.isprintable() else " " for c in line["text"])
    return f"{at}  {line['level']:<7}  {whom:<10}  {text}"
