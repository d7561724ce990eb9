"""Speed of a language-model run's parts: sampling against plain `model.generate`, learner steps, and new weights for actors.

A model and a thread count are a process of their own. There the parts are measured in rounds, one after another, so that a
machine that drifts drifts for all; what is told are medians over the rounds, and `ratio` is that of one way of sampling over the
other in the same round (`ratio_cpu`: by the process's CPU time, which other processes disturb less). In tokens/s:

`sampled_`     the actor's engine, on completions of mixed lengths; `generate_` the same requests by `model.generate`.
`actor_`       the whole actor: engine, verifier process, groups into a queue; countdown prompts, up to 24 tokens each.
`learner_`     response tokens of learner steps, on what the engine has sampled; `learner_processed_` counts prompts as well and
               `learner_padded_` padding too: what the model computes.

`weight_sync_s` is how long new weights take from the learner to an engine whose slots all run: `pack_s`, the learner's weights as
bytes, and `load_s`, the engine having taken them between two steps. Not in it: the way between two machines, and that a step
which has begun ends first, within `step_s`. `samples_lost` counts requests, submitted before, during and after a series of swaps,
that did not come back exactly once with the versions of the weights they were sampled with, under each setting of what a swap
does to running completions. `memory_mb` is the process's largest resident set, or on a GPU the most that was allocated there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tests.benchmarks.learner import RESULTS, ROOT, machine

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel

    from actors.assignments import Assignment
    from actors.llm.engine import Sample
    from learners.llm.learner import PolicyGradient
    from tests.benchmarks.llm_sampling import Case

MODULE = "tests.benchmarks.llm"  # as a program its __name__ is another
RATIO = 1.5  # that sampling is to reach over model.generate
SHORT = 24  # most tokens of a completion of the whole actor
QUEUE_BYTES, MESSAGE_BYTES = 32 << 20, 1 << 20


@dataclass(frozen=True)
class Options:
    """As on the command line."""

    rounds: int = 3
    seconds: float = 2.0
    only: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1,)
    device: str = "auto"


# ------------------------------------------------------------------------------------- the program that measures


def measure(case: Case, *, device: str, threads: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The line of one model, in this process."""
    import torch

    from learners.loop import set_threads
    from tests.benchmarks.llm_sampling import (
        by_engine,
        by_generate,
        requests_of,
        samples_lost,
        samples_of,
        sync_times,
    )

    set_threads(1, threads)
    clock = _Clock(device)
    network = case.network(device, samples=True)
    requests = requests_of(case, network.config.vocab_size)
    learner = make_learner(case, device)
    first = learner.policy_bytes()
    batches = batches_of(case, samples_of(network, requests, case.slots))
    by_generate(network, requests[: case.slots], case.slots)  # once, as the engine has sampled once
    _learn(learner, batches, 0.0)
    with TemporaryDirectory() as folder:
        actor = Actor(case, network, Path(folder))
        actor.run(0.0)
        for _ in range(rounds):
            clock.measure("sampled", lambda: by_engine(network, requests, case.slots))
            clock.measure("generate", lambda: by_generate(network, requests, case.slots))
            clock.measure("actor", lambda: actor.run(seconds))
            clock.measure("learner", lambda: _learn(learner, batches, seconds))
        decode_share = actor.decode_share
        actor.close()
    rates, cpu_rates = clock.rates, clock.cpu_rates
    response, processed, padded = map(sum, zip(*(tokens_of(batch) for batch in batches), strict=True))
    learner_tokens = statistics.median(rates["learner"])
    return {
        "case": case.name,
        "device": device,
        "threads": threads,
        "precision": case.precision,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "slots": case.slots,
        "completions": len(requests),
        "sampled_tokens_per_s": statistics.median(rates["sampled"]),
        "generate_tokens_per_s": statistics.median(rates["generate"]),
        "ratio": _median_ratio(rates),
        "ratio_cpu": _median_ratio(cpu_rates) if device == "cpu" else None,
        "actor_tokens_per_s": statistics.median(rates["actor"]),
        "actor_decode_share": decode_share,
        "learner_tokens_per_s": learner_tokens,
        "learner_processed_tokens_per_s": learner_tokens * processed / response,
        "learner_padded_tokens_per_s": learner_tokens * padded / response,
        "learner_step_tokens": response / len(batches),
        **sync_times(case, network, requests, learner.policy_bytes, clock.synchronise),
        **samples_lost(case, network, requests, [first, learner.policy_bytes()]),
        "memory_mb": clock.memory_mb(),
        **{f"{name}_memory_mb": peak for name, peak in clock.peaks_mb.items()},
        "rounds": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "torch_threads": torch.get_num_threads(),
    }


class _Clock:
    """Tokens/s of each round by name, and on a GPU the most memory that was allocated meanwhile."""

    def __init__(self, device: str) -> None:
        import torch

        self._on_gpu = device == "cuda"
        self.synchronise: Callable[[], object] = torch.cuda.synchronize if self._on_gpu else _nothing
        self.rates: dict[str, list[float]] = {}
        self.cpu_rates: dict[str, list[float]] = {}
        self.peaks_mb: dict[str, float] = {}

    def measure(self, name: str, run: Callable[[], int]) -> None:
        """`run` returns the tokens of its work."""
        import torch

        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.synchronise()
        began, began_cpu = time.perf_counter(), time.process_time()
        tokens = run()
        self.synchronise()
        self.rates.setdefault(name, []).append(tokens / (time.perf_counter() - began))
        self.cpu_rates.setdefault(name, []).append(tokens / (time.process_time() - began_cpu))
        if self._on_gpu:
            self.peaks_mb[name] = max(self.peaks_mb.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**20)

    def memory_mb(self) -> float:
        """The most so far: of the GPU, or of the process."""
        return max(self.peaks_mb.values(), default=0.0) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _median_ratio(rates: dict[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(rates["sampled"], rates["generate"], strict=True))


def _nothing() -> None:
    pass


# ------------------------------------------------------------------------------------------------------- learner


def make_learner(case: Case, device: str) -> PolicyGradient:
    """A learner with the default settings, of a copy of the actor's model with weights in float32."""
    from configs.llm import LlmLearnersSettings, SamplingSettings
    from configs.policy_gradient import PolicyGradientSettings
    from learners.llm.learner import PolicyGradient
    from learners.llm.models import Model
    from learners.llm.tokenizers import CharacterTokenizer
    from tests.benchmarks.llm_sampling import LENGTHS

    return PolicyGradient(
        # Of the tokenizer it needs the token that pads, which is the same in all cases.
        Model(case.network(device, samples=False), CharacterTokenizer()),
        PolicyGradientSettings(),
        LlmLearnersSettings(batch_groups=case.learner_groups, precision=case.precision),
        SamplingSettings(group_size=case.group_size, max_tokens=LENGTHS[1]),
        seed=0,
    )


def batches_of(case: Case, samples: Iterable[Sample]) -> list[pa.RecordBatch]:
    """Learner batches of samples, with verdicts drawn at random."""
    import numpy as np
    import pyarrow as pa

    from learners.llm.rows import Completion, to_rows

    rng = np.random.default_rng(0)
    groups: dict[int, list[Completion]] = {}
    for sample in sorted(samples, key=lambda one: (one.request.group, one.request.index)):
        request, passed = sample.request, bool(rng.random() < 0.5)
        groups.setdefault(request.group, []).append(
            Completion(
                group=request.group,
                index=request.index,
                task=request.group,
                family="",
                seed=request.seed,
                prompt=request.prompt,
                tokens=sample.tokens,
                log_probs=sample.log_probs,
                kept=sample.kept,
                versions=sample.versions,
                finish=sample.finish,
                reward=float(passed),
                passed=passed,
            )
        )
    rows = [to_rows(group) for group in groups.values()]
    found = []
    for first in range(0, len(rows) - case.learner_groups + 1, case.learner_groups):
        table = pa.Table.from_batches(rows[first : first + case.learner_groups]).combine_chunks()
        found += table.to_batches()
    return found


def tokens_of(batch: pa.RecordBatch) -> tuple[int, int, int]:
    """Response tokens of a batch; those that the model reads, prompts included; and with padding, as the learner pads it."""
    import numpy as np

    from configs.llm import LlmLearnersSettings
    from learners.llm.batching import buckets, rollouts

    flat = rollouts(batch, device="cpu")
    lengths = flat.inputs.lengths
    parts = buckets(flat, np.arange(batch.num_rows), LlmLearnersSettings().micro_tokens)
    return len(flat.tokens), int(lengths.sum()), sum(len(part) * int(lengths[part].max()) for part in parts)


def _learn(learner: PolicyGradient, batches: Sequence[pa.RecordBatch], seconds: float) -> int:
    """Learner steps for so long, at least one of each batch; the response tokens in them."""
    from learners.llm.rows import ragged

    tokens, began = 0, time.perf_counter()
    for number in count():
        if number >= len(batches) and time.perf_counter() - began >= seconds:
            break
        batch = batches[number % len(batches)]
        learner.update(batch)
        learner.published(learner.updates)
        tokens += len(ragged(batch, "tokens").values)
    learner.metrics()
    return tokens


# --------------------------------------------------------------------------------------------------- whole actor


class Actor:
    """An actor as a run has it, which keeps every group, with a queue that is emptied as it fills."""

    def __init__(self, case: Case, network: PreTrainedModel, folder: Path) -> None:
        from actors.llm.engine import make_engine
        from actors.llm.rollout import GroupRollout
        from actors.llm.tasks import make_tasks
        from actors.llm.verifiers.pool import VerifierPool
        from configs.llm import SamplersSettings, SamplingSettings, TasksSettings
        from learners.llm.rows import SCHEMA, TABLE
        from learners.llm.tokenizers import CharacterTokenizer
        from replay.queue_readers import CallQueueSource
        from replay.queue_spec import QueueSpec
        from replay.queue_writers import CallQueueWriter
        from replay.queues import Queue
        from tests.benchmarks.llm_sampling import END

        self._tasks, _ = make_tasks(TasksSettings(count=1000), seed=0, held_out=1)
        self._numbers = count()
        spec = QueueSpec(name=TABLE, schema=SCHEMA, capacity_bytes=QUEUE_BYTES, max_message_bytes=MESSAGE_BYTES)
        self._queue = Queue(spec, folder / TABLE)
        self._source = CallQueueSource(self._queue, groups=case.learner_groups, partial=True)
        sampling = SamplingSettings(group_size=case.group_size, max_tokens=SHORT)
        self._rollout = GroupRollout(
            make_engine(sampling, network, end=END, slots=case.slots),
            _Folded(CharacterTokenizer()),
            VerifierPool(),
            CallQueueWriter(self._queue),
            ask=self._ask,
            judge=lambda passes, attempts: "kept",
            group_size=case.group_size,
            slots=case.slots,
            prompts_ahead=SamplersSettings().prompts_ahead,
            seed=0,
        )

    def run(self, seconds: float) -> int:
        """Steps for so long, and at least so many that every slot has finished twice; tokens sampled."""
        before, began = self._tokens(), time.perf_counter()
        for number in count():
            if number >= 2 * SHORT and time.perf_counter() - began >= seconds:
                break
            self._rollout.step()
            self._rollout.take_outcomes()
        while self._queue.waiting_groups and (delivery := self._source.take(0.0)) is not None:
            self._source.acknowledge(delivery.leases)
        return self._tokens() - before

    @property
    def decode_share(self) -> float:
        """Share of the actor's time that the engine takes."""
        stats = self._rollout.stats()
        return stats["decode_s"] / stats["wall_s"]

    def close(self) -> None:
        self._rollout.close()
        self._queue.close(remove=True)

    def _ask(self, most: int) -> list[Assignment]:
        from actors.assignments import Assignment

        numbers = [next(self._numbers) for _ in range(most)]
        return [Assignment(n, n % len(self._tasks), self._tasks[n % len(self._tasks)]) for n in numbers]

    def _tokens(self) -> int:
        return int(self._rollout.stats()["engine/tokens"])


class _Folded:
    """A tokenizer for models with more tokens than it has: numbers beyond its own stand for the same characters again."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size, self.end, self.pad = inner.vocab_size, inner.end, inner.pad

    def encode(self, text: str) -> list[int]:
        return list(self._inner.encode(text))

    def encode_prompt(self, text: str, hint: str = "") -> list[int]:
        return list(self._inner.encode_prompt(text, hint))

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._inner.decode([index % self.vocab_size for index in ids]))


# ------------------------------------------------------------------------------------------------- running it all


def run(cases: Sequence[Case], options: Options, device: str) -> Iterator[dict[str, Any]]:
    """The lines of all cases; `device` is cpu or cuda."""
    # Threads matter on the CPU alone; one line serves a GPU.
    for threads in options.threads if device == "cpu" else options.threads[:1]:
        for case in cases:
            _say(f"{case.name} on {device}, {threads} threads")
            yield _in_child(case.name, options, device, threads)


def _in_child(name: str, options: Options, device: str, threads: int) -> dict[str, Any]:
    asked = {"device": device, "threads": threads, "rounds": options.rounds, "seconds": options.seconds}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # OpenMP and BLAS read their thread counts when they are loaded.
    environment = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    child = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", MODULE, "--child"],
        input=json.dumps({**asked, "case": name}),
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == 0:
        found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return found
    last = (child.stderr.strip() or f"exit status {child.returncode}").splitlines()[-1]
    return {"case": name, "device": device, "threads": threads, "skipped": f"its process failed: {last}"}


def _child() -> int:
    from tests.benchmarks.llm_sampling import CASES

    asked = json.loads(sys.stdin.read())
    name = asked.pop("case")
    (case,) = (case for case in CASES if case.name == name)
    print(json.dumps(measure(case, **asked)))
    return 0


def judge(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached, and whether it is: sampling on one thread or on a GPU, and no sample lost anywhere."""
    found = []
    for line in lines:
        if "skipped" in line:
            continue
        where = f"{line['case']} on {line['device']}, {line['threads']} threads"
        if line["threads"] == 1:
            goal, value = f"tokens/s over model.generate: {where}", line["ratio"]
            found.append({"goal": goal, "value": value, "wanted": f"≥ {RATIO}", "met": value >= RATIO})
        value = line["samples_lost"]
        found.append({"goal": f"samples lost by swaps: {where}", "value": value, "wanted": "0", "met": value == 0})
    return found


def print_table(lines: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> None:
    """Both as tables, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)
    measured = [line for line in lines if "skipped" not in line]
    table = Table("tokens/s, and more", *(f"{line['case']}, {line['threads']} threads" for line in measured))
    left_out = ("case", "device", "threads", "rounds", "torch_threads")
    for name in [name for name in (measured[0] if measured else ()) if name not in left_out]:
        table.add_row(name, *(_short(line.get(name)) for line in measured))
    console.print(table)
    for line in lines:
        if "skipped" in line:
            console.print(
                f"{line['case']}, {line['threads']} threads: {line['skipped']}", highlight=False, markup=False
            )
    table = Table("goal", "wanted", "measured")
    for goal in judged:
        table.add_row(goal["goal"], goal["wanted"], f"{goal['value']:,.4g}{'' if goal['met'] else ' ✗'}")
    console.print(table)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _commit() -> str | None:
    """Of the checkout, with a + where files in it have changed since; None without git."""
    try:
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(words: Sequence[str]) -> int:
    """`millrace bench llm`; its exit code."""
    if list(words) == ["--child"]:
        return _child()
    parser = argparse.ArgumentParser(prog="millrace bench llm", description=(__doc__ or "").partition("\n")[0])
    default = Options()
    parser.add_argument("--rounds", type=int, default=default.rounds, help="medians over them are told (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, help="of learner and whole actor in each round (default 2)"
    )
    parser.add_argument("--only", nargs="+", default=default.only, help="models: embedded, 30M, and on a GPU 0.5B")
    parser.add_argument("--threads", type=int, nargs="+", default=default.threads, help="thread counts (default 1)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per line: the machine, the models, the goals"
    )
    parser.add_argument("--save", action="store_true", help="keep those lines in tests/benchmarks/results/ as well")
    given = vars(parser.parse_args(words))
    as_json, save = given.pop("json"), given.pop("save")
    options = Options(**{**given, "only": tuple(given["only"]), "threads": tuple(given["threads"])})
    if options.seconds <= 0 or min(options.rounds, *options.threads) < 1:
        parser.error("--seconds, --rounds and --threads must be positive")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("millrace: --device cuda needs a GPU that torch sees", file=sys.stderr)
        return 2
    try:
        from tests.benchmarks.llm_sampling import CASES
    except ImportError as error:
        print(f"millrace: {error}; language models need pip install 'millrace[llm]'", file=sys.stderr)
        return 2
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    there = {case.name: case for case in CASES if case.on_cpu or device == "cuda"}
    if unknown := set(options.only) - there.keys():
        parser.error(f"--only {' '.join(sorted(unknown))}: expected some of {', '.join(there)}")
    about = {**machine(device), "commit": _commit(), "rounds": options.rounds, "seconds": options.seconds}
    print(json.dumps(about) if as_json else " · ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    lines = []
    for found in run([there[name] for name in options.only or there], options, device):
        lines.append(found)
        if as_json:
            print(json.dumps(found), flush=True)
    judged = judge(lines)
    if as_json:
        for verdict in judged:
            print(json.dumps(verdict, ensure_ascii=False), flush=True)
    else:
        print_table(lines, judged)
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"llm-{about['machine']}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in (about, *lines, *judged)))
        _say(f"written to {path}")
    return 1 if any("skipped" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
