"""Sums, differences and products of whole numbers: the prompt "12+345=" asks for "357"."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from actors.llm.tasks import Task, TaskError, distinct_tasks
from actors.llm.verifiers.verdict import PASSED, Verdict, failed

MOST_CHARACTERS = 256

_INTEGER = re.compile(r"-?[0-9]+")


def generate(count: int, seed: int, *, low: int = 1, high: int = 4, operators: str = "+-") -> list[Task]:
    """`count` tasks with distinct prompts; family "k digits" for k = `low` … `high` in turn.

    Both numbers of a task have at most k digits, and one of them has k; differences may be negative. The first n tasks are the
    same whatever `count` is. Of one digit there are 100 prompts with each operator, of two digits 9 900; once they are used up,
    the other families go on.

    Args:
        count: tasks, ≥ 0.
        seed: any integer ≥ 0.
        low: fewest digits, ≥ 1.
        high: most digits, ≤ 18.
        operators: those used, among + - and *, equally often.

    Raises:
        TaskError: an argument is out of range, or there are not as many distinct prompts.
    """
    if not 1 <= low <= high <= 18:
        raise TaskError(f"arithmetic needs 1 ≤ low ≤ high ≤ 18, received low {low}, high {high}")
    if not operators or set(operators) - set("+-*"):
        raise TaskError(f"arithmetic needs operators among + - and *, received {operators!r}")
    generator = random.Random(seed)

    def draw(digits: int) -> Task:
        a, b = _numbers(generator, digits)
        operator = operators[int(generator.random() * len(operators))]
        answer = str(a + b if operator == "+" else a - b if operator == "-" else a * b)
        # As text: JSON's numbers are doubles for many readers, and products have up to 36 digits.
        family = "1 digit" if digits == 1 else f"{digits} digits"
        return Task(f"{a}{operator}{b}=", family, "arithmetic", {"answer": answer}, answer)

    return distinct_tasks(count, range(low, high + 1), draw, puzzle=lambda task: _sorted(task.prompt))


def _sorted(prompt: str) -> tuple[str, ...]:
    """What a prompt asks: the order of what is added or multiplied does not matter."""
    parts = re.split(r"([-+*])", prompt.removesuffix("="))
    return tuple(parts if parts[1] == "-" else [parts[1], *sorted((parts[0], parts[2]))])


def _numbers(generator: random.Random, digits: int) -> tuple[int, int]:
    """Two numbers of at most `digits` digits, one of them of exactly as many."""
    least, limit = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    while True:
        a, b = generator.randrange(limit), generator.randrange(limit)
        if a >= least or b >= least:
            return a, b


def verify(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Passes the integer `data["answer"]` (a number, or text), written in decimal; spaces around it and leading zeros do not matter."""
    if len(completion) > MOST_CHARACTERS:
        return failed(f"not an integer: more than {MOST_CHARACTERS} characters")
    text = completion.strip(" \t\r\n")
    if not _INTEGER.fullmatch(text):
        return failed("not an integer")
    answer = int(data["answer"])
    return PASSED if int(text) == answer else failed(f"says {int(text)}, not {answer}")
