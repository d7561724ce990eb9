"""Speed of the learner's updates, against a plain loop and against what matrix products allow.

The cases of a group run in one process, in rounds: in each round every case, the plain loop that single-file implementations
run (`plain_sac`) and bare matrix products are measured one after another, so that a machine that drifts drifts for all. What is
told are medians over the rounds. A thread count is a process of its own. Batches are staged beforehand.

`plain_updates_per_s` is the plain loop's in the same rounds, `ratio` the median over the rounds of one over the other;
`gemm_limit_share` is the share of the updates/s that the products alone would allow: FLOPs of the update's products and
convolutions, counted, over the GFLOP/s of the best way to multiply (batch, 256) with (256, 256) in the same dtype and threads.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.load import load_config
from configs.schema import RunConfig
from tests.benchmarks.learner_cases import (
    ACTION_DIM,
    OBSERVATION_DIM,
    SCHEMAS,
    Case,
    cases,
    chosen,
    judge,
    random_windows,
)

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.benchmarks.learner"  # as a program its __name__ is another
RESULTS = Path(__file__).parent / "results"
BATCHES = 4  # staged batches that updates take in turn
WARM_UPDATES = 8
WIDTH = 256  # of the hidden layers, and so of the products
COUNTED_BATCH = 32  # batch of the update whose products are counted; they grow in proportion to it
GEMM_SHARE = 0.1  # time of a way to multiply, as a share of that of a case


@dataclass(frozen=True)
class Options:
    """As on the command line."""

    seconds: float = 1.0
    repeats: int = 5
    only: str = ""
    threads: tuple[int, ...] = (1, 2)
    device: str = "auto"


@dataclass
class Runner:
    """Something that makes updates: one call, and how many updates a call is."""

    call: Callable[[], object]
    updates: int
    synchronise: Callable[[], object]

    def rate(self, seconds: float) -> float:
        """Updates/s of calling it for so long."""
        self.synchronise()
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            self.call()
            calls += 1
        self.synchronise()
        return calls * self.updates / (time.perf_counter() - began)


# ------------------------------------------------------------------------------------- the program that measures


def measure_group(
    group: Sequence[Case], *, device: str, threads: int, seconds: float, repeats: int
) -> list[dict[str, Any]]:
    """The lines of the cases of one group, in this process.

    A case that cannot be made or run gives a line whose `skipped` says why.
    """
    import torch

    from learners.loop import set_threads

    set_threads(1, threads)
    synchronise = torch.cuda.synchronize if device == "cuda" else _nothing
    batch = _config(group[0], device).learners.batch_size
    runners: dict[str, Runner] = {}
    lines: dict[str, dict[str, Any]] = {}
    for case in group:
        known = {"case": case.name, "group": case.group, "threads": threads, "dtype": case.dtype, "device": device}
        with _warnings() as heard:
            try:
                runner, about = _algorithm_runner(case, device, synchronise)
                for _ in range(-(-WARM_UPDATES // runner.updates)):
                    runner.call()
                synchronise()
            except Exception as error:  # the others can still be measured
                reason = str(error).strip().splitlines()
                lines[case.name] = {**known, "skipped": f"{type(error).__name__}: {reason[0] if reason else ''}"}
                continue
        runners[case.name] = runner
        lines[case.name] = {**known, **about, **({"warnings": heard} if heard else {})}
    if runners:
        rates = _rounds(runners, group, batch, device, synchronise, seconds=seconds, repeats=repeats)
        for name in runners:
            lines[name] |= _figures(lines[name], rates, name)
    return list(lines.values())


def _rounds(
    runners: dict[str, Runner],
    group: Sequence[Case],
    batch: int,
    device: str,
    synchronise: Callable[[], object],
    *,
    seconds: float,
    repeats: int,
) -> dict[str, list[float]]:
    """Rates of each round, by case; those of the plain loop are under `plain`, GFLOP/s under `gemm/<dtype>/<way>`."""
    measured = dict(runners)
    if group[0].data == "continuous":
        measured["plain"] = _plain_runner(batch, device, synchronise)
    products = _products(batch, device, sorted({case.dtype for case in group}), synchronise)
    for runner in (*measured.values(), *products.values()):
        runner.rate(seconds * GEMM_SHARE)
    rates: dict[str, list[float]] = {name: [] for name in (*measured, *products)}
    for _ in range(repeats):
        for name, runner in measured.items():
            rates[name].append(runner.rate(seconds))
        for name, runner in products.items():
            rates[name].append(runner.rate(seconds * GEMM_SHARE) / 1e9)
    return rates


def _figures(line: dict[str, Any], rates: dict[str, list[float]], name: str) -> dict[str, Any]:
    """What is told of a case, from the rates of all."""
    mine = rates[name]
    ways = {n: statistics.median(r) for n, r in rates.items() if n.startswith(f"gemm/{line['dtype']}/")}
    best = max(ways, key=lambda way: ways[way])
    updates_per_s = statistics.median(mine)
    plain = rates.get("plain")
    flops = line["flops_per_update"]
    return {
        "updates_per_s": updates_per_s,
        "plain_updates_per_s": statistics.median(plain) if plain else None,
        "ratio": statistics.median(a / b for a, b in zip(mine, plain, strict=True)) if plain else None,
        "gemm_limit_share": updates_per_s * flops / (ways[best] * 1e9) if flops else None,
        "ms_per_update": 1e3 / updates_per_s,
        "ms_lowest": 1e3 / max(mine),
        "ms_highest": 1e3 / min(mine),
        "gemm_gflops": ways[best],
        "gemm_way": best.rpartition("/")[2],
        **{f"gemm_{way.rpartition('/')[2]}_gflops": value for way, value in ways.items()},
    }


def _config(case: Case, device: str) -> RunConfig:
    return load_config(None, [*case.settings, f"--learners.device={device}"])


def _algorithm_runner(case: Case, device: str, synchronise: Callable[[], object]) -> tuple[Runner, dict[str, Any]]:
    """The algorithm of a case on staged batches, and the figures that need no clock beyond one look."""
    config = _config(case, device)
    algorithm, staged, stage_ms = _staged(case, config)
    turn = 0

    def call() -> None:
        nonlocal turn
        algorithm.update(staged[turn % len(staged)])
        turn += 1

    about = {
        "batch": config.learners.batch_size,
        "flops_per_update": _flops_per_update(case),
        "stage_ms": stage_ms / config.learners.updates_per_call,
    }
    return Runner(call, config.learners.updates_per_call, synchronise), about


def _staged(case: Case, config: RunConfig) -> tuple[Any, list[Any], float]:
    """An algorithm as a run makes it, staged batches of it, and the least time in ms that staging one took."""
    from cluster import parts

    schema = parts.row_schema(config, SCHEMAS[case.data])
    algorithm: Any = parts.make_algorithm(config, schema, incarnation=0)
    count = config.learners.batch_size * config.learners.updates_per_call
    staged, took = [], []
    for seed in range(BATCHES):
        windows = random_windows(schema, parts.window(config, schema), count, seed=seed)
        weights = windows.importance_weights(0.4) if config.replay.selector == "prioritised" else None
        began = time.perf_counter()
        staged.append(algorithm.stage(windows, weights))
        took.append(time.perf_counter() - began)
    return algorithm, staged, 1e3 * min(took)


def _flops_per_update(case: Case) -> float | None:
    """FLOPs of the products and convolutions of one update: counted in one on the CPU, eager and in float32."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = _config(case, "cpu").learners.batch_size
    counted = min(batch, COUNTED_BATCH)
    plain = (f"--learners.batch_size={counted}", "--learners.updates_per_call=1", "--learners.products=torch")
    eager = ("--learners.compile=false", "--learners.precision=float32", "--learners.graphs=false")
    small = Case(case.name, case.group, (*case.settings, *plain, *eager), case.data)
    algorithm, staged, _ = _staged(small, _config(small, "cpu"))
    counter = FlopCounterMode(display=False)
    with counter:
        algorithm.update(staged[0])
    return float(counter.get_total_flops()) * batch / counted or None


def _plain_runner(batch: int, device: str, synchronise: Callable[[], object]) -> Runner:
    from tests.benchmarks.plain_sac import POLICY_EVERY, PlainBatch, PlainSac

    plain = PlainSac(OBSERVATION_DIM, ACTION_DIM, hidden=WIDTH, device=device)
    batches = [PlainBatch.random(batch, OBSERVATION_DIM, ACTION_DIM, device, seed=seed) for seed in range(BATCHES)]

    def call() -> None:
        for _ in range(POLICY_EVERY):  # whole turns of the policy's updates
            plain.update(batches[plain.updates % BATCHES])

    return Runner(call, POLICY_EVERY, synchronise)


def _products(batch: int, device: str, dtypes: Sequence[str], synchronise: Callable[[], object]) -> dict[str, Runner]:
    """Ways to multiply (batch, 256) with (256, 256), by `gemm/<dtype>/<way>`; an update of theirs is a FLOP."""
    import torch

    flops = 2 * batch * WIDTH * WIDTH
    found: dict[str, Runner] = {}
    for name in dtypes:
        x, weight = (torch.randn(2, rows, WIDTH, device=device).to(getattr(torch, name)) for rows in (batch, WIDTH))
        into = torch.empty_like(x)
        ways: dict[str, tuple[Callable[[], object], int]] = {
            "mm": (lambda x=x, w=weight, into=into: torch.mm(x[0], w[0], out=into[0]), flops),  # type: ignore[misc]
            "bmm": (lambda x=x, w=weight, into=into: torch.bmm(x, w, out=into), 2 * flops),  # type: ignore[misc]
        }
        if device == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            linear = torch.ops.mkldnn._linear_pointwise
            ways["onednn"] = (lambda x=x, w=weight, f=linear: f(x[0], w[0], None, "none", [], ""), flops)  # type: ignore[misc]
        for way, (call, count) in ways.items():
            try:
                call()
            except RuntimeError:  # a processor or a build without it
                continue
            found[f"gemm/{name}/{way}"] = Runner(call, count, synchronise)
    return found


class _warnings(logging.Handler):  # noqa: N801  (used as a function)
    """Collects what our modules warn of, such as a compiler that is missing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("learners").addHandler(self)
        return self._texts

    def __exit__(self, *_: object) -> None:
        logging.getLogger("learners").removeHandler(self)


def _nothing() -> None:
    pass


# ------------------------------------------------------------------------------------------------- running it all


def run(options: Options, device: str) -> Iterator[dict[str, Any]]:
    """The lines of all chosen cases, group by group; `device` is cpu or cuda."""
    wanted = chosen(cases(device), options.only)
    groups = list(dict.fromkeys(case.group for case in wanted))
    # Threads matter on the CPU alone; one line serves a GPU.
    for threads in options.threads if device == "cpu" else options.threads[:1]:
        for group in groups:
            members = [case for case in wanted if case.group == group]
            _say(f"{group} on {device}, {threads} threads: {len(members)} cases")
            yield from _in_child(members, options, device, threads)


def _in_child(group: Sequence[Case], options: Options, device: str, threads: int) -> list[dict[str, Any]]:
    asked = {"device": device, "threads": threads, "seconds": options.seconds, "repeats": options.repeats}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # OpenMP and BLAS read their thread counts when they are loaded.
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    child = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-m",
            MODULE,
            "--child",
        ],
        input=json.dumps({**asked, "cases": [asdict(case) for case in group]}),
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == 0:
        found: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
        return found
    last = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
    known = {"group": group[0].group, "threads": threads, "device": device, "skipped": f"its process failed: {last}"}
    return [{"case": case.name, "dtype": case.dtype, **known} for case in group]


def _child() -> int:
    asked = json.loads(sys.stdin.read())
    group = [Case(**{**case, "settings": tuple(case["settings"])}) for case in asked.pop("cases")]
    print(json.dumps(measure_group(group, **asked)))
    return 0


def machine(device: str) -> dict[str, Any]:
    """What this was measured on and with; `machine` names it. `load_1m`: processes that wanted a core in the last minute."""
    import torch

    texts = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((text.split(":")[1].strip() for text in texts if text.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if device == "cuda" else None
    name = gpu or f"{cpu} {cores} cores"
    return {
        "machine": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": cpu,
        "cores": cores,
        "gpu": gpu,
        "load_1m": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def print_table(lines: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> None:
    """Both as tables, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("case", "threads", "dtype")
    for heading in ("updates/s", "ms (lowest to highest)", "plain/s", "ratio", "GFLOP/s of products", "share of limit"):
        table.add_column(heading, justify="right")
    for found in lines:
        if "skipped" in found:
            continue
        times = f"{found['ms_per_update']:.3g} ({found['ms_lowest']:.3g} to {found['ms_highest']:.3g})"
        products = f"{found['gemm_gflops']:,.0f} {found['gemm_way']}"
        figures = (_short(found[name]) for name in ("plain_updates_per_s", "ratio"))
        share, rate = _short(found["gemm_limit_share"]), _short(found["updates_per_s"])
        table.add_row(found["case"], str(found["threads"]), found["dtype"], rate, times, *figures, products, share)
    console.print(table)
    for found in lines:
        for text in [found["skipped"]] if "skipped" in found else found.get("warnings", []):
            console.print(f"{found['case']}, {found['threads']} threads: {text}", highlight=False, markup=False)
    table = Table("goal", "wanted")
    table.add_column("measured", justify="right")
    for goal in judged:
        table.add_row(goal["goal"], goal["wanted"], f"{goal['value']:,.4g}{'' if goal['met'] else ' ✗'}")
    console.print(table)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main(words: Sequence[str]) -> int:
    """`millrace bench learner`; its exit code."""
    if list(words) == ["--child"]:
        return _child()
    parser = argparse.ArgumentParser(prog="millrace bench learner", description=(__doc__ or "").partition("\n")[0])
    default = Options()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="of each case and round (default 1)")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="rounds; medians are told (default 5)")
    parser.add_argument("--only", default="", help="cases whose name has this part or pattern, such as sac/256/K=*")
    parser.add_argument("--threads", type=int, nargs="+", default=default.threads, help="thread counts (default 1 2)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line: the machine, the cases, the goals"
    )
    parser.add_argument("--save", action="store_true", help="keep those lines in tests/benchmarks/results/ as well")
    given = vars(parser.parse_args(words))
    as_json, save = given.pop("json"), given.pop("save")
    options = Options(**{**given, "threads": tuple(given["threads"])})
    if options.seconds <= 0 or min(options.repeats, *options.threads) < 1:
        parser.error("--seconds, --repeats and --threads must be positive")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("millrace: --device cuda needs a GPU that torch sees", file=sys.stderr)
        return 2
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if not chosen(cases(device), options.only):
        parser.error(f"--only {options.only}: no such case; there are {', '.join(case.name for case in cases(device))}")
    about = {**machine(device), "seconds": options.seconds, "repeats": options.repeats}
    print(json.dumps(about) if as_json else " · ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    lines = []
    for found in run(options, device):
        lines.append(found)
        if as_json:
            print(json.dumps(found), flush=True)
    judged = judge(lines)
    if as_json:
        for verdict in judged:
            print(json.dumps(verdict), flush=True)
    else:
        print_table(lines, judged)
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"learner-{about['machine']}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in (about, *lines, *judged)))
        _say(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
