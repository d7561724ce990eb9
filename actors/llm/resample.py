"""Completions of the queue sampled once more from what their rows record."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from actors.llm.engine import Engine, Request, Sample
from learners.llm.rows import ragged


def resample(engine: Engine, rows: pa.RecordBatch) -> list[Sample]:
    """Sample completions again from their recorded prompts and seeds, with the weights that the engine has.

    A completion of which all tokens are of one version comes out with the same tokens, and log-probabilities to rounding, where
    the engine has the weights of that version and the settings that it was sampled with.

    Args:
        engine: with nothing to do.
        rows: (completions,) of `learners.llm.rows.SCHEMA`; `group`, `index`, `seed` and `prompt` are used.

    Returns:
        The samples in the order of the rows.

    Raises:
        ValueError: the engine is at work, or cannot serve a prompt.
    """
    if engine.running or engine.waiting:
        raise ValueError(
            f"expected an engine with nothing to do, received one with {engine.running} completions running and "
            f"{engine.waiting} waiting; step it until they have finished"
        )
    prompts = ragged(rows, "prompt")
    groups, indices, seeds = (rows.column(name).to_pylist() for name in ("group", "index", "seed"))
    tickets = list(zip(groups, indices, strict=True))
    engine.submit(
        [
            Request(group, index, np.ascontiguousarray(prompts[row]), seed)
            for row, ((group, index), seed) in enumerate(zip(tickets, seeds, strict=True))
        ]
    )
    found: dict[tuple[int, int], Sample] = {}
    while engine.running or engine.waiting:
        for sample in engine.step():
            found[sample.request.group, sample.request.index] = sample
    return [found[ticket] for ticket in tickets]
