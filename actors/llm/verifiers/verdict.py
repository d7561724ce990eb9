"""What a verifier is, and what it says."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

BUILT_IN = {
    "countdown": "actors.llm.countdown:verify",
    "arithmetic": "actors.llm.arithmetic:verify",
    "math": "actors.llm.verifiers.math_answers:verify",
    "regex": "actors.llm.verifiers.patterns:verify",
    "tests": "actors.llm.verifiers.unit_tests:verify",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one completion."""

    reward: float  # of the outcome
    passed: bool
    reason: str = ""  # why it did not pass, in words; empty where it did
    shaped: float = 0.0  # reward besides, for progress or form; kept apart from that of the outcome
    steps: tuple[tuple[int, float], ...] = ()  # (characters up to the end of the step, its reward), rising


@dataclass(frozen=True, slots=True)
class Unscored:
    """No verdict: the verifier raised, ran out of time or memory, or its process died. Such a completion has no reward, not 0."""

    reason: str


PASSED = Verdict(1.0, True)


def failed(reason: str) -> Verdict:
    """The verdict that a completion is wrong."""
    return Verdict(0.0, False, reason)


Verifier = Callable[[str, Mapping[str, Any]], Verdict | float | bool]
"""Judges a completion by its task's data. A number is the reward, and passes from 1 on; True is reward 1, False reward 0."""


class VerifierError(Exception):
    """A verifier that cannot be found, or whose answer is no verdict."""


def load_verifier(name: str) -> Verifier:
    """A built-in verifier by its name, or one of your own by `package.module:function`.

    Raises:
        VerifierError: there is none such.
    """
    module_name, colon, function_name = BUILT_IN.get(name, name).partition(":")
    if not (module_name and colon and function_name):
        raise VerifierError(f"a verifier is one of {', '.join(BUILT_IN)} or package.module:function, received {name!r}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise VerifierError(f"verifier {name}: module {module_name} cannot be imported: {error}") from error
    except AttributeError:
        raise VerifierError(f"verifier {name}: module {module_name} has no {function_name}") from None
    if not callable(function):
        raise VerifierError(f"verifier {name} must be a function, received {type(function).__name__}")
    verifier: Verifier = function
    return verifier


def as_verdict(answer: object) -> Verdict:
    """What a verifier returned, as a verdict.

    Raises:
        VerifierError: it is none, or a reward in it is not finite.
    """
    if callable(item := getattr(answer, "item", None)):
        answer = item()  # a number of numpy or torch
    if isinstance(answer, Verdict):
        verdict = answer
    elif isinstance(answer, bool):
        return PASSED if answer else failed("wrong")
    elif isinstance(answer, int | float):
        verdict = Verdict(float(answer), answer >= 1.0, "" if answer >= 1.0 else f"reward {float(answer):g}")
    else:
        raise VerifierError(f"a verifier must return a Verdict, a number or a bool, received {type(answer).__name__}")
    if not all(map(math.isfinite, (verdict.reward, verdict.shaped, *(reward for _, reward in verdict.steps)))):
        raise VerifierError(f"the rewards of a verdict must be finite, received {verdict}")
    ends = [end for end, _ in verdict.steps]
    if ends != sorted(set(ends)) or (ends and ends[0] < 0):
        raise VerifierError(f"the steps of a verdict must end one after another, received ends {ends}")
    return verdict
