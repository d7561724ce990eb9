"""What the head hands to actors, and what they tell it of the outcome: alike for prompts and for environments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar


class Task(Protocol):
    """What an episode or a completion is about."""

    @property
    def family(self) -> str:
        """Name of the tasks alike in difficulty that this one is of."""
        ...

    @property
    def key(self) -> int:
        """63 bits that tell it from every other task: the same in every run and process."""
        ...


AnyTask = TypeVar("AnyTask", bound=Task, covariant=True)


@dataclass(frozen=True)
class Assignment(Generic[AnyTask]):
    """A group of attempts, completions or episodes, to be made at one task."""

    group: int  # counts up over the whole run
    number: int  # of the task in the task set
    task: AnyTask
    hint: float = 0.0  # share of the reference solution that a prompt ends with


@dataclass(frozen=True)
class Outcome:
    """What became of an assignment.

    `fate` says whether its rows were written (kept), or why not: too_easy or too_hard, outside the band; unscored, too few
    attempts could be judged; failed, none could be made.
    """

    group: int
    number: int
    passes: int
    attempts: int  # that could be judged
    sampled: int  # attempts made, those dropped included
    units: int  # tokens or environment steps of all of them
    fate: Literal["kept", "too_easy", "too_hard", "unscored", "failed"]
    hint: float = 0.0
    returns: float = 0.0  # sum over the judged attempts of their undiscounted returns; 0 for completions
