"""Countdown: make a target of given numbers. The prompt "3,7,25=46:" asks for an expression such as "3*7+25"."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from actors.llm.expressions import ExpressionError, parse
from actors.llm.tasks import Task, TaskError, distinct_tasks
from actors.llm.verifiers.verdict import PASSED, Verdict, failed


def generate(
    count: int,
    seed: int,
    *,
    low: int = 2,
    high: int = 3,
    largest: int = 30,
    largest_target: int = 999,
    division: bool = False,
) -> list[Task]:
    """`count` tasks with distinct puzzles (numbers in any order, and a target), each solvable; family "k numbers" for k = `low` … `high` in turn.

    A target is the value of a random expression over random numbers, which is the task's solution; intermediate values are
    positive integers up to `largest_target`. With targets up to 999 there are 1 364 distinct puzzles of two numbers up to 30 and
    11 411 of two up to 99. Where those of a family are used up, the others go on. The
    first n tasks are the same whatever `count` is.

    Args:
        count: tasks, ≥ 0.
        seed: any integer ≥ 0.
        low: fewest numbers in a prompt, ≥ 2.
        high: most numbers, ≤ 8.
        largest: numbers are drawn from 1 … `largest`.
        largest_target: targets lie in 1 … `largest_target`.
        division: use / too; then answers may, and it is exact.

    Raises:
        TaskError: an argument is out of range, or there are not as many distinct puzzles.
    """
    if not 2 <= low <= high <= 8:
        raise TaskError(f"countdown needs 2 ≤ low ≤ high ≤ 8, received low {low}, high {high}")
    if largest < 1 or largest_target < 1 or largest_target > 10**9:
        raise TaskError(
            f"countdown needs largest ≥ 1 and 1 ≤ largest_target ≤ 10^9, received {largest} and {largest_target}"
        )
    generator = random.Random(seed)
    operators = "+-*/" if division else "+-*"

    def draw(size: int) -> Task:
        numbers, target, solution = _puzzle(generator, size, largest, largest_target, operators)
        data = {"numbers": numbers, "target": target, "operators": operators}
        return Task(f"{','.join(map(str, numbers))}={target}:", f"{size} numbers", "countdown", data, solution)

    return distinct_tasks(
        count,
        range(low, high + 1),
        draw,
        puzzle=lambda task: (tuple(sorted(task.data["numbers"])), task.data["target"]),
    )


def _puzzle(
    generator: random.Random, size: int, largest: int, largest_target: int, operators: str
) -> tuple[list[int], int, str]:
    """Numbers, a target, and an expression that makes it of them."""
    uniform = (
        generator.random
    )  # several times as fast as randrange and choice, which this is called millions of times for
    while True:
        numbers = [1 + int(uniform() * largest) for _ in range(size)]
        # (value, text, how tightly its operator binds): two at a time become one.
        terms = [(number, str(number), 3) for number in numbers]
        while len(terms) > 1:
            left = terms.pop(int(uniform() * len(terms)))
            right = terms.pop(int(uniform() * len(terms)))
            term = _join(left, right, operators[int(uniform() * len(operators))])
            if term is None or term[0] > largest_target:
                break
            terms.append(term)
        else:
            value, text, _ = terms[0]
            if value <= largest_target:
                return numbers, value, text


def _join(left: tuple[int, str, int], right: tuple[int, str, int], operator: str) -> tuple[int, str, int] | None:
    """The two terms under `operator`, with no more parentheses than needed; None where that is not a positive integer."""
    (a, a_text, a_binds), (b, b_text, b_binds) = left, right
    if operator == "+":
        return a + b, f"{a_text}+{b_text}", 1
    if operator == "-":
        if a <= b:
            return None
        return a - b, f"{a_text}-({b_text})" if b_binds == 1 else f"{a_text}-{b_text}", 1
    a_text = f"({a_text})" if a_binds == 1 else a_text
    if operator == "*":
        return a * b, f"{a_text}*({b_text})" if b_binds == 1 else f"{a_text}*{b_text}", 2
    if a % b:
        return None
    return a // b, f"{a_text}/({b_text})" if b_binds < 3 else f"{a_text}/{b_text}", 2


def verify(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Passes an expression that uses every given number exactly once, no other number, and makes the target exactly.

    Args:
        completion: all of it must be the expression; spaces around its parts do not matter.
        data: numbers, target, and the operators allowed (all four where it does not say).
    """
    try:
        expression = parse(completion)
    except ExpressionError as error:
        return failed(f"not an expression: {error}")
    numbers = data["numbers"]
    if sorted(expression.numbers) != sorted(numbers):
        return failed(_misused(Counter(expression.numbers), Counter(numbers)))
    if not expression.operators.issubset(data.get("operators", "+-*/")):
        unwanted = sorted(expression.operators.difference(data["operators"]))
        return failed(f"uses {' '.join(unwanted)}, which is not allowed")
    if expression.value != data["target"]:
        return failed(f"makes {expression.value}, not {data['target']}")
    return PASSED


def _misused(used: Counter[int], given: Counter[int]) -> str:
    for number, times in used.items():
        if number not in given:
            return f"uses {number}, which is not given"
        if times > given[number]:
            return f"uses {number} {_times(times)}, given {_times(given[number])}"
    missing = next(iter(given - used))
    return f"does not use {missing}" if missing not in used else f"uses {missing} only {_times(used[missing])}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
