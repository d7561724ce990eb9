"""Judges answers in LaTeX by math-verify: the same value counts, however it is written. Needs the package math-verify."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from math_verify import verify as equal

from actors.llm.verifiers.verdict import PASSED, Verdict, failed

MOST_CHARACTERS = 100_000

# math-verify's own time limits turn a comparison that takes too long into "not equal", which would be a reward of 0. They are
# off, and the pool's limit makes it no verdict. It warns of that once.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def verify(completion: str, data: Mapping[str, Any]) -> Verdict:
    r"""Passes a completion whose final answer (in \boxed{}, $…$, or the last expression) equals `data["answer"]`.

    Args:
        completion: text with LaTeX in it.
        data: answer: LaTeX or a number, with or without $…$.

    Raises:
        ValueError: the task's own answer cannot be read.
        MemoryError: memory ran out on the way, which math-verify would take for "not equal". What it keeps of intermediate
            results may be wrong from then on: end the process, as the pool does.
        Exception: whatever reading or comparing raises; that is no verdict.
    """
    if len(completion) > MOST_CHARACTERS:
        return failed(f"more than {MOST_CHARACTERS} characters")
    with _memory_errors_let_through():
        gold = _gold(str(data["answer"]))
        answer = parse(completion, parsing_timeout=None, raise_on_error=True)
        if not answer:
            return failed("no answer found")
        if equal(gold, answer, timeout_seconds=None, raise_on_error=True):
            return PASSED
        return failed(f"answers {str(answer[-1])[:80]}, not {str(data['answer'])[:80]}")


@contextmanager
def _memory_errors_let_through() -> Iterator[None]:
    """Raises MemoryError at the end if there was one within, though somebody caught it.

    math-verify and what it builds on catch every Exception in a dozen places. Only a trace function sees those exceptions, at
    about twice the time.
    """
    seen = False

    def call(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_lines = False
        return within

    def within(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "exception" and issubclass(argument[0], MemoryError):
            seen = True
        return within

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        lost = sys.gettrace() is not call
        sys.settrace(before)
        if seen:
            raise MemoryError("memory ran out while the answer was read or compared")
        if lost:  # by an error at the trace function's own call, for want of memory or stack
            raise RecursionError("the answer is nested too deeply, or too large, to be read or compared")


@lru_cache(4096)
def _gold(answer: str) -> list[Any]:
    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    gold: list[Any] = parse(
        text,
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        parsing_timeout=None,
        raise_on_error=True,
    )
    if not gold:
        raise ValueError(f"the task's answer cannot be read as LaTeX or a number: {answer!r}")
    return gold
