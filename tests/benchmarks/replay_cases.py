"""What the replay benchmark measures, by name, and what is to be reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

from tests.benchmarks.replay_limits import KINDS
from tests.benchmarks.replay_peers import CALL_ROWS

BATCHES = (256, 4096)
SELECTORS = ("uniform", "prioritised")


@dataclass(frozen=True)
class Case:
    """One line of the benchmark. `how` tells apart what is alike in all else."""

    transport: str
    op: str
    selector: str
    shape: str
    batch: int
    shards: int
    writer: bool = False
    how: str = ""

    @property
    def name(self) -> str:
        parts = [self.transport, self.op, self.selector, self.shape, self.batch, self.shards]
        return "/".join(map(str, [*parts, "writer" if self.writer else "quiet", *([self.how] if self.how else [])]))


def millrace_cases() -> Iterator[Case]:
    """What is measured of Millrace, those of one table one after another."""
    for selector in SELECTORS:
        for shape, shard_counts in (("transition", (1, 2, 4)), ("frames", (1,))):
            for shards in shard_counts:
                yield Case("flight", "insert", selector, shape, CALL_ROWS, shards)
                for transport in ("local", "flight"):
                    for batch in BATCHES:
                        for writer in (False, True):
                            yield Case(transport, "sample", selector, shape, batch, shards, writer)
                    if shape == "frames":
                        yield Case(transport, "sample", selector, shape, BATCHES[0], shards, how="distinct frames")


def limit_cases() -> Iterator[Case]:
    """What memory allows, with and without a writer as the cases of Millrace have one."""
    for kind, row_bytes in KINDS.items():
        shape = "transition" if row_bytes < 1024 else "frames"
        for batch in BATCHES:
            for writer in (False, True):
                yield Case(
                    "memcpy" if "memcpy" in kind else "numpy", "sample", "uniform", shape, batch, 1, writer, kind
                )


def chosen(cases: Iterable[Case], pattern: str) -> list[Case]:
    return [case for case in cases if fnmatch(case.name, f"*{pattern}*")]


@dataclass(frozen=True)
class Goal:
    """Something that is to be reached: `figure` of the line of a case, over that of another case where there is one."""

    name: str
    figure: str
    case: str
    wanted: str  # "≥ 0.5"
    over: str = ""

    def judge(self, lines: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        """Value and verdict; None where a case of it was not run."""
        if self.case not in lines or (self.over and self.over not in lines):
            return None
        value = lines[self.case][self.figure]
        if self.over:
            value /= lines[self.over][self.figure]
        sign, bound = self.wanted.split()
        met = value >= float(bound) if sign == "≥" else value <= float(bound)
        return {**asdict(self), "value": value, "met": met}


def goals() -> list[Goal]:
    """What the replay service set out to reach on a machine of two cores."""
    gather = "numpy/sample/uniform/transition/{}/1/{}/take of packed rows"
    mine = "{}/sample/{}/transition/{}/1/{}"
    framed = "{}/sample/uniform/frames/256/1/{}"
    found = []
    for beside in ("quiet", "writer"):
        for batch in BATCHES:
            over = gather.format(batch, beside)
            case = mine.format("local", "uniform", batch, beside)
            found.append(Goal("local over numpy's gather", "calls_per_s", case, "≥ 0.5", over))
    for batch in BATCHES:
        case = mine.format("local", "prioritised", batch, "quiet")
        over = mine.format("cpprb", "prioritised", batch, "quiet") + "/in process"
        found.append(Goal("local prioritised over cpprb in its own process", "calls_per_s", case, "≥ 2", over))
    quiet, busy = (mine.format("flight", "uniform", 256, beside) for beside in ("quiet", "writer"))
    insert = "flight/insert/uniform/transition/256/1/quiet"
    memcpy, stacks = (f"{framed.format(*names)}" for names in (("memcpy", "quiet"), ("numpy", "quiet")))
    return [
        *found,
        Goal("Flight, batches/s", "calls_per_s", quiet, "≥ 15000"),
        Goal("Flight beside a writer, batches/s", "calls_per_s", busy, "≥ 8000"),
        Goal("Flight beside a writer, p99 in µs", "p99_us", busy, "≤ 1000"),
        Goal("Flight beside a writer, rows/s written", "writer_rows_per_s", busy, "≥ 3e6"),
        Goal("insertion, rows/s", "rows_per_s", insert, "≥ 5e6"),
        Goal(
            "frames over memcpy",
            "bytes_per_s",
            framed.format("local", "quiet"),
            "≥ 0.75",
            f"{memcpy}/memcpy of the delivered bytes",
        ),
        Goal(
            "frames over a take of stacks",
            "bytes_per_s",
            framed.format("local", "quiet"),
            "≥ 2",
            f"{stacks}/take of stored stacks",
        ),
        Goal(
            "memory of frames over that of stacks",
            "bytes_per_step",
            framed.format("local", "quiet"),
            "≤ 0.26",
            f"{stacks}/take of stored stacks",
        ),
        Goal(
            "memory of a step over its fields",
            "bytes_per_own_byte",
            mine.format("local", "uniform", 256, "quiet"),
            "≤ 1.15",
        ),
    ]


def name_of(found: dict[str, Any]) -> str:
    """The name of a line's case."""
    return Case(**{field: found[field] for field in Case.__dataclass_fields__ if field in found}).name
