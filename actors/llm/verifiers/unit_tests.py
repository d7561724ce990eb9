"""Judges code by running it: against assertions, or by what it prints for given input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from actors.llm.verifiers.sandbox import Outcome, run
from actors.llm.verifiers.verdict import PASSED, Verdict, failed

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def verify(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Passes code that runs to its end in the sandbox (`actors.llm.verifiers.sandbox`) and meets all of the task's tests.

    The code is the last block between ``` of the completion; all of it where there is none. `data` holds one of:

    - tests: Python statements that run after the code, in the same program, such as "assert double(2) == 4". A program that
      exits early has not passed. Code that sets out to deceive its tests (by an object that equals everything, say, or by
      looking for the runner's secret on the stack) can: use cases where that matters.
    - cases: objects {"stdin": text, "stdout": text}; the code is run for each, and must print the same lines, spaces at the end
      of a line or of the whole aside, and end with status 0, be it by sys.exit. What is compared never comes near the code.

    besides, if wished, cpu_s (seconds of CPU time for each run, 2) and memory_mb (512), whole numbers from 1 on. Code that takes more of
    these fails. Wall time is limited by the pool alone, and gives no verdict: a busy machine is not the code's fault.

    Raises:
        SandboxError: the kernel refuses the sandbox.
        ValueError: `data` holds neither tests nor cases, or limits that are none.
    """
    code = extract_code(completion)
    cpu_s, memory_mb = _limit(data, "cpu_s", 2), _limit(data, "memory_mb", 512)
    if "tests" in data:
        outcome = run(f"{code}\n\n{data['tests']}\n", cpu_s=cpu_s, memory_mb=memory_mb)
        return PASSED if outcome.completed else failed(outcome.reason)
    if not data.get("cases"):
        raise ValueError(f"unit tests need data with tests or cases, received the keys {', '.join(data) or 'none'}")
    for number, case in enumerate(data["cases"], 1):
        outcome = run(code, stdin=case["stdin"], cpu_s=cpu_s, memory_mb=memory_mb)
        if problem := _differs(outcome, case["stdout"]):
            return failed(f"case {number} of {len(data['cases'])}: {problem}")
    return PASSED


def extract_code(completion: str) -> str:
    """The last fenced block of a completion, also an unclosed one; all of it where there is none."""
    blocks = _FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _limit(data: Mapping[str, Any], name: str, default: int) -> int:
    value = data.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 1 and value % 1 == 0):
        raise ValueError(
            f"{name} of unit tests must be a whole number from 1 on, received {value!r}; change the task's data"
        )
    return int(value)


def _differs(outcome: Outcome, expected: str) -> str:
    if outcome.status != 0:  # not `completed`, which would fail a program that ends by sys.exit(0)
        return outcome.reason
    printed, wanted = _lines(outcome.stdout), _lines(expected)
    if printed == wanted:
        return ""
    if len(printed) != len(wanted):
        return f"printed {len(printed)} lines, not {len(wanted)}"
    number = next(number for number, pair in enumerate(zip(printed, wanted, strict=True)) if pair[0] != pair[1])
    return f"printed {printed[number][:80]!r}, not {wanted[number][:80]!r}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
