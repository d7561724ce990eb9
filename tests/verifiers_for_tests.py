"""Verifiers for the tests of rollouts and evaluations; the processes that judge import nothing else of the tests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from actors.llm.verifiers.verdict import Verdict


def weight(text: str) -> int:
    """A number that follows from a text, so that tests can tell what a verifier had to say of it."""
    return sum(map(ord, text))


def even(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Passes about half of all texts; the reason is the text that it was given."""
    passed = weight(completion) % 2 == 0
    return Verdict(float(passed), passed, completion, shaped=0.25)


def fragile(completion: str, data: Mapping[str, Any]) -> Verdict:
    """As `even`, but cannot judge about a third of all texts."""
    if weight(completion) % 3 == 0:
        raise RuntimeError("no opinion")
    return even(completion, data)


def broken(completion: str, data: Mapping[str, Any]) -> Verdict:
    raise RuntimeError("no opinion")


def slow(completion: str, data: Mapping[str, Any]) -> Verdict:
    time.sleep(data["seconds"])
    return even(completion, data)


def stepwise(completion: str, data: Mapping[str, Any]) -> Verdict:
    """Scores the steps that end at data["ends"] with 1, 2, …"""
    return Verdict(1.0, True, completion, steps=tuple((end, i + 1.0) for i, end in enumerate(data["ends"])))
