"""What the head hands to actors, and what they tell it of the outcome."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from actors.llm.tasks import Task


@dataclass(frozen=True)
class Assignment:
    """A group of completions to be sampled for one prompt."""

    group: int  # counts up over the whole run
    number: int  # of the prompt in the task set
    task: Task
    hint: float = 0.0  # share of the reference solution that the prompt ends with


@dataclass(frozen=True)
class Outcome:
    """What became of an assignment.

    `fate` says whether its rows were written (kept), or why not: too_easy or too_hard, outside the band; unscored, too few
    completions could be judged; failed, the prompt could not be sampled.
    """

    group: int
    number: int
    passes: int
    attempts: int  # completions judged
    completions: int  # sampled, those dropped included
    tokens: int  # of all of them
    fate: Literal["kept", "too_easy", "too_hard", "unscored", "failed"]
    hint: float = 0.0


def sample_seed(run: int, task: int, group: int, index: int) -> int:
    """Seed of one completion, 63 bits: a group can be sampled again from the run's seed, the prompt's key and its number."""
    packed = struct.pack("<4Q", run, task & (2**64 - 1), group, index)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") >> 1
