"""How often a verifier is wrong, counted on completions whose truth is known.

A false negative is a right completion that fails: reward withheld for what should be learnt. A false positive is a wrong one
that passes: reward for what should not be, which training finds and exploits.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.llm import arithmetic, countdown
from actors.llm.tasks import TaskError
from actors.llm.verifiers.pool import VerifierPool
from actors.llm.verifiers.verdict import Unscored

MOST_EXAMPLES = 10  # of completions judged wrongly, that are kept to look at


@dataclass(frozen=True)
class Labelled:
    """A completion, what it is judged by, and whether it truly is right."""

    completion: str
    data: Mapping[str, Any]
    passed: bool


@dataclass(frozen=True)
class Audit:
    """What a verifier said of a labelled sample."""

    total: int
    right: int  # of total, those that truly are right
    false_negatives: int  # right, but failed
    false_positives: int  # wrong, but passed
    unscored: int  # without a verdict
    examples: tuple[tuple[Labelled, str], ...] = ()  # the first ones misjudged or unscored, and the reason given

    @property
    def false_negative_rate(self) -> float:
        """Of the right completions; 0 where there are none."""
        return self.false_negatives / self.right if self.right else 0.0

    @property
    def false_positive_rate(self) -> float:
        """Of the wrong completions; 0 where there are none."""
        return self.false_positives / (self.total - self.right) if self.total > self.right else 0.0


def audit(verifier: str, labelled: Iterable[Labelled], *, pool: VerifierPool | None = None) -> Audit:
    """Have `verifier` (a built-in one's name or package.module:function) judge a labelled sample.

    Args:
        verifier: what is audited.
        labelled: the sample.
        pool: processes to judge in, with nothing else waiting; None takes one of its own, with the default limits.

    Raises:
        ValueError: the pool has other completions to judge.
    """
    if pool is None:
        with VerifierPool() as own:
            return audit(verifier, labelled, pool=own)
    if pool.waiting:
        raise ValueError(f"an audit needs a pool with nothing waiting, received one with {pool.waiting} completions")
    sample = list(labelled)
    for number, one in enumerate(sample):
        pool.submit(number, verifier, one.completion, one.data)
    negatives = positives = unscored = 0
    examples: list[tuple[Labelled, str]] = []
    while pool.waiting:
        for number, verdict in pool.ready(1.0):
            assert isinstance(number, int)
            one = sample[number]
            if isinstance(verdict, Unscored):
                unscored += 1
            elif verdict.passed == one.passed:
                continue
            elif one.passed:
                negatives += 1
            else:
                positives += 1
            examples.append((one, verdict.reason))
    right = sum(one.passed for one in sample)
    return Audit(len(sample), right, negatives, positives, unscored, tuple(examples[:MOST_EXAMPLES]))


def read_labelled(path: Path) -> Iterator[Labelled]:
    """A labelled sample from a file: on each line a JSON object with completion (text), data (an object) and passed (a bool).

    Raises:
        TaskError: a line is none; says which.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{path}, line {number}: expected a JSON object: {error}") from error
            kinds = {"completion": str, "data": dict, "passed": bool}
            if not isinstance(row, dict) or not all(isinstance(row.get(name), kind) for name, kind in kinds.items()):
                raise TaskError(
                    f"{path}, line {number}: expected completion (text), data (an object) and passed (true or false), received "
                    f"{line.strip()[:200]}"
                )
            yield Labelled(row["completion"], row["data"], row["passed"])


def labelled_sample(verifier: str, count: int, seed: int) -> list[Labelled]:
    """`count` completions for a built-in verifier, right and wrong in turn, with labels that do not come from the verifier.

    Countdown and arithmetic are generated; of math, regex and tests there is a short fixed list, and no more.

    Raises:
        ValueError: there is no sample for `verifier`; make one and give it to `audit`.
    """
    if verifier == "countdown":
        return _countdown(count, seed)
    if verifier == "arithmetic":
        return _arithmetic(count, seed)
    if verifier not in _FIXED:
        known = ", ".join(("countdown", "arithmetic", *_FIXED))
        raise ValueError(f"there are labelled samples for {known}, received {verifier!r}; label some of your own")
    fixed = [Labelled(*row) for row in _FIXED[verifier]]
    return fixed[:count]


def _countdown(count: int, seed: int) -> list[Labelled]:
    """Right: a generated solution. Wrong: for another target, with a number more, less or changed, or cut off at an operator."""
    generator = random.Random(seed)
    sample = []
    for number, task in enumerate(countdown.generate(count, seed, high=5)):
        assert task.solution is not None
        completion, data, right = task.solution, task.data, number % 2 == 0
        if not right:
            completion, data = generator.choice(
                (
                    (completion, {**data, "target": data["target"] + generator.randint(1, 9)}),
                    (f"{completion}+0", data),
                    (f"{completion}*1", data),
                    (f"{completion}=", data),
                    (f"({completion}", data),
                    (str(data["target"]), data),
                    ("", data),
                )
            )
        sample.append(Labelled(completion, data, right))
    return sample


def _arithmetic(count: int, seed: int) -> list[Labelled]:
    generator = random.Random(seed)
    sample = []
    for number, task in enumerate(arithmetic.generate(count, seed, operators="+-*")):
        assert task.solution is not None
        right = number % 2 == 0
        wrong = (str(int(task.solution) + generator.randint(1, 9)), f"{task.solution}1", f"{task.solution}.5", "")
        written = (task.solution, f" {task.solution}\n")
        sample.append(Labelled(generator.choice(written if right else wrong), task.data, right))
    return sample


_DOUBLE = {"tests": "assert double(3) == 6\nassert double(-1) == -2"}
_ECHO = {"cases": [{"stdin": "3\n", "stdout": "6\n"}, {"stdin": "-1\n", "stdout": "-2\n"}]}
_FIXED: dict[str, list[tuple[str, dict[str, Any], bool]]] = {
    "math": [
        (r"The answer is $\boxed{\frac{1}{2}}$.", {"answer": "0.5"}, True),
        (r"So it is $\boxed{\frac{1}{3}}$.", {"answer": "0.5"}, False),
        (r"$x = 2\sqrt{3}$", {"answer": r"\sqrt{12}"}, True),
        (r"$\sqrt{13}$", {"answer": r"\sqrt{12}"}, False),
        (r"\boxed{(x+1)^2}", {"answer": "x^2+2x+1"}, True),
        (r"\boxed{(x+1)^2}", {"answer": "x^2+1"}, False),
        (r"$\{1, 2, 3\}$", {"answer": r"\{3, 2, 1\}"}, True),
        (r"I do not know.", {"answer": "7"}, False),
        (r"$\boxed{1{,}000}$", {"answer": "1000"}, True),
        (r"$\boxed{100}$", {"answer": "1000"}, False),
    ],
    "regex": [
        ("#### 42", {"pattern": "#### (-?[0-9]+)", "mode": "search", "answer": "42"}, True),
        ("#### 41", {"pattern": "#### (-?[0-9]+)", "mode": "search", "answer": "42"}, False),
        ("first #### 7, then #### 42", {"pattern": "#### (-?[0-9]+)", "mode": "search", "answer": "42"}, True),
        ("first #### 42, then #### 7", {"pattern": "#### (-?[0-9]+)", "mode": "search", "answer": "42"}, False),
        ("YES", {"pattern": "yes", "flags": "i"}, True),
        ("yes, or no", {"pattern": "yes"}, False),
    ],
    "tests": [
        ("def double(x):\n    return 2 * x", _DOUBLE, True),
        ("def double(x):\n    return x * x", _DOUBLE, False),
        ("Here it is:\n```python\ndef double(x):\n    return x + x\n```\nDone.", _DOUBLE, True),
        ("import sys\nsys.exit(0)", _DOUBLE, False),
        ("print(2 * int(input()))", _ECHO, True),
        ("print(6)", _ECHO, False),
        ("import sys\nprint(2 * int(input()))\nsys.exit(0)", _ECHO, True),
        ("import sys\nprint(2 * int(input()))\nsys.exit(1)", _ECHO, False),
    ],
}
