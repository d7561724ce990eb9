"""Evaluation of a language model on held-out prompts: pass@1, pass@k, greedy, by family."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from actors.llm.engine import Engine, Request
from actors.llm.seeds import sample_seed
from actors.llm.tasks import Task
from actors.llm.verifiers.pool import VerifierPool
from actors.llm.verifiers.verdict import Unscored
from learners.llm.tokenizers import Tokenizer

GREEDY = -1  # index of the greedy completion


@dataclass(frozen=True)
class Passes:
    """What became of each held-out prompt's completions."""

    families: tuple[str, ...]  # of each prompt
    attempts: np.ndarray  # int64 (prompts,): completions sampled and judged
    passes: np.ndarray  # int64 (prompts,)
    greedy: (
        np.ndarray
    )  # float64 (prompts,): 1 where the greedy completion passed, 0 where not, NaN where it was not judged
    tokens: int
    mean_length: float  # tokens of a sampled completion
    cut_off: float  # share of the sampled completions that reached the most tokens
    unscored: int  # completions that could not be judged: in no attempts, passes or greedy
    failed: int  # prompts that could not be sampled
    seconds: float


def pass_at_k(attempts: np.ndarray, passes: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that one of k completions passes, for each prompt (Chen et al. 2021, §2.1).

    attempts, passes: int (prompts,), n and c: 1 − C(n − c, k) / C(n, k). NaN where fewer than k were judged.
    """
    found = np.full(len(attempts), math.nan)
    for i, (n, c) in enumerate(zip(attempts.tolist(), passes.tolist(), strict=True)):
        if n >= k:
            found[i] = 1.0 - math.comb(n - c, k) / math.comb(n, k)
    return found


def summary(found: Passes, *, attempts: Sequence[int], families: Sequence[str]) -> dict[str, float]:
    """The figures of an evaluation.

    attempts: the k of pass@k; 1 is always among the figures. families: those that `pass_at_<k>` and `greedy` are means over, empty
    for all; each family has figures of its own besides. A mean is over the prompts of which enough completions were judged,
    `prompts` counts those that pass@1 is over, and is NaN where there are none.
    """
    of = np.array(found.families)
    chosen = np.isin(of, list(families)) if families else np.ones(len(of), bool)
    figures: dict[str, float] = {}
    for k in dict.fromkeys((1, *attempts)):
        each = pass_at_k(found.attempts, found.passes, k)
        figures[f"pass_at_{k}"] = _mean(each[chosen])
        for family in dict.fromkeys(found.families):
            figures[f"{family}/pass_at_{k}"] = _mean(each[of == family])
    figures["greedy"] = _mean(found.greedy[chosen])
    for family in dict.fromkeys(found.families):
        figures[f"{family}/greedy"] = _mean(found.greedy[of == family])
    first = pass_at_k(found.attempts, found.passes, 1)[chosen]
    first = first[np.isfinite(first)]
    figures["pass_at_1_error"] = float(first.std(ddof=1) / math.sqrt(len(first))) if len(first) > 1 else math.nan
    figures |= {"mean_length": found.mean_length, "cut_off": found.cut_off}
    figures |= {"unscored": float(found.unscored), "failed": float(found.failed)}
    return figures | {"prompts": float(len(first)), "seconds": found.seconds}


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


class Evaluator:
    """Samples and judges completions for held-out prompts. The same prompts and seeds at every call."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        verifiers: VerifierPool,
        tasks: Sequence[Task],
        *,
        samples: int,
        temperature: float,
        seed: int,
    ) -> None:
        """samples: for each prompt, beside one greedy completion; temperature: theirs."""
        self._engine = engine
        self._tokenizer = tokenizer
        self._verifiers = verifiers
        self._tasks = list(tasks)
        self._samples = samples
        self._temperature = temperature
        self._seed = seed

    def run(self, version: int, weights: bytes | memoryview | None) -> Passes:
        """Evaluate a policy; without weights the one that the engine has.

        Raises:
            ValueError: none of the prompts can be sampled.
        """
        began = time.monotonic()
        if weights is not None:
            self._engine.load(version, weights)
        failed = self._submit()
        count = len(self._tasks)
        attempts, passes, greedy = np.zeros(count, np.int64), np.zeros(count, np.int64), np.full(count, math.nan)
        begun = (count - failed) * self._samples
        open_, tokens, sampled, cut_off, unscored = begun + count - failed, 0, 0, 0, 0
        while open_:
            busy = bool(self._engine.running or self._engine.waiting)
            for sample in self._engine.step() if busy else ():
                request = sample.request
                tokens += len(sample.tokens)
                if request.index != GREEDY:
                    sampled += len(sample.tokens)
                    cut_off += sample.finish == "length"
                task = self._tasks[request.group]
                text = self._tokenizer.decode(sample.tokens.tolist())
                self._verifiers.submit((request.group, request.index), task.verifier, text, task.data)
            for ticket, verdict in self._verifiers.ready(0.0 if busy else 0.05):
                group, index = cast(tuple[int, int], ticket)
                open_ -= 1
                if isinstance(verdict, Unscored):
                    unscored += 1
                elif index == GREEDY:
                    greedy[group] = verdict.passed
                else:
                    attempts[group] += 1
                    passes[group] += verdict.passed
        return Passes(
            families=tuple(task.family for task in self._tasks),
            attempts=attempts,
            passes=passes,
            greedy=greedy,
            tokens=tokens,
            mean_length=sampled / begun,
            cut_off=cut_off / begun,
            unscored=unscored,
            failed=failed,
            seconds=time.monotonic() - began,
        )

    def _submit(self) -> int:
        """All prompts into the engine. Returns how many of them cannot be sampled."""
        failures: list[ValueError] = []
        for group, task in enumerate(self._tasks):
            try:
                prompt = np.asarray(self._tokenizer.encode_prompt(task.prompt), np.int32)
                seeds = [sample_seed(self._seed, task.key, 0, index) for index in range(self._samples)]
                sampled = [
                    Request(group, i, prompt, seed, temperature=self._temperature) for i, seed in enumerate(seeds)
                ]
                self._engine.submit([*sampled, Request(group, GREEDY, prompt, 0, temperature=0.0)])
            except ValueError as error:  # too long, or with characters unknown to the tokenizer
                failures.append(error)
        if len(failures) == len(self._tasks):
            raise ValueError(
                f"none of the {len(failures)} held-out prompts can be sampled; the last one: {failures[-1]}"
            )
        return len(failures)

    def close(self) -> None:
        """End the verifiers."""
        self._verifiers.close()
