"""Speed of the replay service between processes, against what memory allows and against the buffers people use instead.

Shards, writer and reader are processes of their own. A table is filled first; then every case runs `--seconds` long, in
`--repeats` rounds over all cases, so that a machine that drifts drifts for all; what is told are the medians. Rows of 104 bytes
have the shape of HalfCheetah's steps, frames are 84×84 uint8 stacked by 4. A case is named

    local/sample/uniform/transition/256/1/quiet        transport/op/selector/shape/batch/shards/quiet or writer

and runs where `--only` is a part of its name, or a pattern such as `flight/*/writer`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks import replay_roles as roles
from tests.benchmarks.replay_cases import BATCHES, SELECTORS, Case, chosen, goals, limit_cases, millrace_cases, name_of
from tests.benchmarks.replay_limits import child, limits, writing
from tests.benchmarks.replay_peers import CALL_ROWS, PEERS, STACK, line, medians, run_peer

MOST_SEGMENT_STEPS = 256
SLACK = 1.2  # room for what lanes have begun and not filled
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """How long, how large, and beside what: as on the command line."""

    seconds: float = 1.0
    repeats: int = 3
    rows: int = 1_000_000
    frames: int = 100_000
    writer_rows: float = 3.2e6
    writer_frames: float = 2e4
    ahead: int = 65_536
    only: str = ""
    peers: bool = False
    directory: str = "/dev/shm"

    def size(self, shape: str) -> int:
        return self.rows if shape == "transition" else self.frames

    def batches_ahead(self, case: Case) -> int:
        """Batches drawn ahead of the reader: few of frames, of which one has 14 MB."""
        return max(4, self.ahead // case.batch) if case.shape == "transition" else 4

    def pace(self, case: Case) -> float:
        """Rows/s of the writer beside a case; 0 for none."""
        return (self.writer_rows if case.shape == "transition" else self.writer_frames) if case.writer else 0.0


def machine() -> dict[str, Any]:
    """What this was measured on and with. `load_1m`: processes that wanted a core in the last minute, this one's aside."""
    model = next((t.split(":")[1].strip() for t in _lines("/proc/cpuinfo") if t.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = {name: version(name) for name in ("numpy", "numba", "pyarrow")}
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "load_1m": os.getloadavg()[0],
        "python": platform.python_version(),
        "kernel": platform.release(),
        **packages,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def run_table(cases: Sequence[Case], options: Options) -> Iterator[dict[str, Any]]:
    """The lines of cases that share a table: its shards are started and filled, and each case is run once."""
    from replay.layout import TableSpec
    from replay.process import ShardProcess
    from replay.rate_limit import RateLimit
    from replay.security import Security, new_token
    from replay.shard import ShardSpec

    shape, selector, shards = cases[0].shape, cases[0].selector, cases[0].shards
    schema, rows = roles.schema_of(shape), options.size(shape)
    segment_steps = 1 << min(MOST_SEGMENT_STEPS, max(16, rows // 1024)).bit_length() - 1
    # Each writer leaves the segment that each of its lanes has begun.
    needed = max(rows * SLACK, rows + 4 * roles.LANES * segment_steps)
    capacity = -(-int(needed / shards) // segment_steps) * segment_steps
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="millrace-bench-", dir=options.directory))
        started: list[ShardProcess] = []
        token = new_token()
        for index in range(shards):
            spec = ShardSpec(
                schema=schema.to_json(),
                run=f"bench-{os.getpid()}",
                index=index,
                capacity=capacity,
                segment_steps=segment_steps,
                seed=index,
                directory=folder,
                tables=(TableSpec(name=roles.TABLE, selector=selector),),  # type: ignore[arg-type]
                limits=(RateLimit.from_min_size(1),),
                stack=STACK if shape == "frames" else 1,
                limiter_address=started[0].address if started else None,
            )
            started.append(stack.enter_context(ShardProcess(spec, security=Security(token))))
        common = {"addresses": [shard.address for shard in started], "shape": shape, "token": token}
        child(roles.MODULE, "fill", {**common, "rows": capacity * shards})
        own = sum(field.nbytes for field in schema.fields)
        stored = sum(path.stat().st_blocks * 512 for path in Path(folder).iterdir()) / (capacity * shards)
        for case in cases:
            known = {
                **asdict(case),
                "rows": rows,
                "bytes_per_step": stored,
                "bytes_per_own_byte": stored / own,
                "segment_steps": segment_steps,
            }
            program = {
                **common,
                **asdict(case),
                "seconds": options.seconds,
                "batches_ahead": options.batches_ahead(case),
            }
            program |= {"stack_on_device": case.how == "distinct frames", "writer_rows_per_s": options.pace(case)}
            try:
                found = _run_case(case, program)
            except RuntimeError as error:  # the others can still be measured
                yield {**known, "missing": str(error)}
                continue
            stats = [shard.stats()["tables"][roles.TABLE] for shard in started]
            known |= {name: found.pop(name) for name in ("writer_rows_per_s", "batches_ahead") if name in found}
            known |= {"items": sum(table["items"] for table in stats)}
            del known["batch"]
            yield line(found, batch=case.batch, nbytes=found.pop("nbytes"), **known)


def _run_case(case: Case, program: dict[str, Any]) -> dict[str, Any]:
    """Figures of one case, from the programs that measure it."""
    if case.op == "insert":
        found: dict[str, Any] = child(roles.MODULE, "insert", program)
        return found
    with ExitStack() as meanwhile:
        wrote = meanwhile.enter_context(writing(roles.MODULE, "write", program)) if case.writer else {}
        found = child(roles.MODULE, "read", program)
    return {**found, "batches_ahead": program["batches_ahead"], **{f"writer_{n}": value for n, value in wrote.items()}}


def run(options: Options) -> Iterator[dict[str, Any]]:
    """The lines of all chosen cases, medians over the rounds; those of the peers come last.

    Raises:
        OSError: the directory has too little room.
        RuntimeError: a measuring process failed.
    """
    ours = chosen(millrace_cases(), options.only)
    bare = chosen(limit_cases(), options.only)
    tables = {(c.shape, c.selector, c.shards): [o for o in ours if _table(o) == _table(c)] for c in ours}
    rounds: dict[str, list[dict[str, Any]]] = {case.name: [] for case in (*bare, *ours)}
    for number in range(options.repeats):
        for case in bare:
            _say(f"round {number + 1} of {options.repeats}: {case.name}")
            settings = {"kind": case.how, "rows": options.size(case.shape), "batch": case.batch}
            settings |= {"seconds": options.seconds, "writer_rows_per_s": options.pace(case)}
            with tempfile.TemporaryDirectory(prefix="millrace-bench-", dir=options.directory) as folder:
                rounds[case.name].append({**limits(folder, settings), "writer": case.writer})
        for cases in tables.values():
            _say(f"round {number + 1} of {options.repeats}: {len(cases)} cases like {cases[0].name}")
            for case, found in zip(cases, run_table(cases, options), strict=True):
                rounds[case.name].append(found)
    for found_rounds in rounds.values():
        yield medians(found_rounds)
    if options.peers:
        for peer in PEERS:
            for shape in ("transition", "frames"):
                for selector in SELECTORS:
                    yield from _peer_lines(peer, shape, selector, options)


def _table(case: Case) -> tuple[str, str, int]:
    return case.shape, case.selector, case.shards


def _peer_lines(peer: str, shape: str, selector: str, options: Options) -> Iterator[dict[str, Any]]:
    batches = BATCHES if shape == "transition" else BATCHES[:1]
    cases = [Case(peer, "insert", selector, shape, CALL_ROWS, 1)]
    cases += [Case(peer, "sample", selector, shape, batch, 1) for batch in batches]
    names = {case.name for case in chosen(cases, options.only)}
    if not names:
        return
    _say(f"{peer}, {selector}, {shape}")
    for found in run_peer(
        peer,
        shape=shape,
        selector=selector,
        rows=options.size(shape),
        batches=batches,
        seconds=options.seconds,
        repeats=options.repeats,
    ):
        if Case(peer, found["op"], selector, shape, found["batch"], 1).name in names:
            yield found


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------ telling


def print_table(lines: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> None:
    """Both as tables, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("case", "rows/s written")
    for heading in ("calls/s", "M rows/s", "GB/s", "p50 µs", "p99 µs"):
        table.add_column(heading, justify="right")
    for found in lines:
        if "missing" in found:
            continue
        wrote = f"{found['writer_rows_per_s']:,.0f}" if "writer_rows_per_s" in found else ""
        figures = [
            found["calls_per_s"],
            found["rows_per_s"] / 1e6,
            found["bytes_per_s"] / 1e9,
            found["p50_us"],
            found["p99_us"],
        ]
        table.add_row(
            name_of(found), wrote, *(f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}" for figure in figures)
        )
    console.print(table)
    for found in lines:
        if "missing" in found:
            console.print(f"{name_of(found)}: {found['missing']}", highlight=False, markup=False)
    table = Table("goal", "case", "wanted")
    table.add_column("measured", justify="right")
    for goal in judged:
        table.add_row(goal["name"], goal["case"], goal["wanted"], f"{goal['value']:,.4g}{'' if goal['met'] else ' ✗'}")
    console.print(table)


def main(words: Sequence[str]) -> int:
    """`millrace bench replay`; its exit code."""
    parser = argparse.ArgumentParser(prog="millrace bench replay", description=(__doc__ or "").partition("\n")[0])
    default = Options()
    helps = {
        "seconds": "of each case and round",
        "repeats": "rounds; medians of them are told",
        "rows": "filled rows of a table",
        "frames": "filled rows of a table of frames",
        "writer_rows": "rows/s of the writer beside a reader (0: as fast as it goes)",
        "writer_frames": "the same for frames",
        "ahead": "windows drawn ahead of a reader, 4 batches at least; of frames 4 batches",
        "only": "cases whose name has this part or pattern, such as flight/sample/*/256/1",
        "directory": "folder of the mapped files",
    }
    for name, text in helps.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{text} (default {value!r})"
        )
    parser.add_argument("--peers", action="store_true", help="measure cpprb, Stable-Baselines3, TorchRL and Reverb too")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line: the machine, the cases, the goals"
    )
    given = vars(parser.parse_args(words))
    as_json = given.pop("json")
    options = Options(**given)
    if options.seconds <= 0 or min(options.repeats, options.rows, options.frames, options.ahead) < 1:
        parser.error("--seconds, --repeats, --rows, --frames and --ahead must be positive")
    lines = []
    about = {**machine(), **given}
    print(json.dumps(about) if as_json else " · ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    try:
        for found in run(options):
            lines.append(found)
            if as_json:
                print(json.dumps(found), flush=True)
    except (RuntimeError, OSError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 1
    named = {name_of(found): found for found in lines if "missing" not in found}
    judged = [verdict for goal in goals() if (verdict := goal.judge(named)) is not None]
    if as_json:
        for verdict in judged:
            print(json.dumps({"goal": verdict.pop("name"), **verdict}), flush=True)
    else:
        print_table(lines, judged)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
