"""Completions kept as text beside the metrics: `<run folder>/examples.jsonl`, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.llm.rollout import Example

FILE = "examples.jsonl"
MOST_PER_STEP = 4


class ExampleFile:
    """Appends a few completions of every learner step; a full disk costs those that found no room."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._step = -1
        self._written = 0

    def add(self, examples: Sequence[Example], *, step: int) -> None:
        """Keep the first few examples of a learner step."""
        if step != self._step:
            self._step, self._written = step, 0
        chosen = list(examples)[: MOST_PER_STEP - self._written]
        if not chosen:
            return
        self._written += len(chosen)
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            for example in chosen:
                # In ASCII: what a model writes may hold line separators, and surrogates, which UTF-8 has no form for.
                file.write(json.dumps({"step": step, **asdict(example)}) + "\n")


def read_examples(folder: Path) -> Iterator[dict[str, Any]]:
    """What `ExampleFile` has written, in order; a line that was cut short is left out."""
    file = folder / FILE
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found
