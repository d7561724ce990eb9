"""Judges answers in LaTeX by math-verify: the same value counts, however it is written. Needs the package math-verify."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
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
        Exception: whatever the comparison raises; that is no verdict.
    """
    if len(completion) > MOST_CHARACTERS:
        return failed(f"more than {MOST_CHARACTERS} characters")
    gold = _gold(str(data["answer"]))
    answer = parse(completion, parsing_timeout=None)
    if not answer:
        return failed("no answer found")
    if equal(gold, answer, timeout_seconds=None, raise_on_error=True):
        return PASSED
    return failed(f"answers {str(answer[-1])[:80]}, not {str(data['answer'])[:80]}")


@lru_cache(4096)
def _gold(answer: str) -> list[Any]:
    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    gold: list[Any] = parse(
        text, extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None
    )
    if not gold:
        raise ValueError(f"the task's answer cannot be read as LaTeX or a number: {answer!r}")
    return gold
