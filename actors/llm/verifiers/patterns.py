"""Judges completions by a regular expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from actors.llm.verifiers.verdict import PASSED, Verdict, failed

FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}


def verify(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Passes a completion that `data["pattern"]` matches.

    `data` holds pattern (Python's syntax) and, if wished, mode: full (the default: all of the completion) or search (any part of
    it); flags: of i (either case), m (^ and $ at every line), s (a dot takes newlines); answer: what the pattern's first group
    must be. With an answer, the last match counts, so that "#### (-?[0-9]+)" finds the final one.

    A pattern that backtracks without end holds the process until the pool ends it, and gives no verdict.

    Raises:
        ValueError: the pattern, mode or flags are none.
    """
    mode = data.get("mode", "full")
    if mode not in ("full", "search"):
        raise ValueError(f"the mode of a pattern is full or search, received {mode!r}")
    pattern = _compiled(data["pattern"], data.get("flags", ""))
    match = pattern.fullmatch(completion) if mode == "full" else None
    if mode == "search":
        for found in pattern.finditer(completion):
            match = found
            if "answer" not in data:
                break
    if match is None:
        return failed("the pattern does not match")
    if "answer" not in data:
        return PASSED
    if pattern.groups < 1:
        raise ValueError(f"a pattern with an answer needs a group, received {data['pattern']!r}")
    answer = str(data["answer"])
    return PASSED if match[1] == answer else failed(f"says {(match[1] or '')[:80]!r}, not {answer[:80]!r}")


@lru_cache(1024)
def _compiled(pattern: str, flags: str) -> re.Pattern[str]:
    value = re.RegexFlag(0)
    for flag in flags:
        if flag not in FLAGS:
            raise ValueError(f"flags of a pattern are {', '.join(FLAGS)}, received {flag!r}")
        value |= FLAGS[flag]
    try:
        return re.compile(pattern, value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}: {pattern!r}") from error
