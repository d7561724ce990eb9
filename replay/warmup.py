"""Compile the loops of the replay service and keep the machine code on disk: `python -m replay.warmup`.

Without it the first shard and the first local reader do so when they start, which takes them about a minute in all; it
has to be done again when the code or numba changes.
"""

from __future__ import annotations

import tempfile
import time
from typing import get_args

import numpy as np

from .buffers import buffers
from .files import StorageFile, map_for_reading
from .gather import WindowReader
from .layout import Layout, SelectorName, TableSpec
from .limiter import RateLimiter
from .rate_limit import RateLimit
from .schema import Field, StepSchema, Window
from .shard import Shard

_STEPS = 8


def warm_up() -> float:
    """Run every loop once, in a small storage of its own. Returns the seconds it took."""
    began = time.monotonic()
    observation = {"observation": Field("observation", "uint8", (64, 64))}
    schema = StepSchema(observation, Field("action", "float32", (1,)))
    names: tuple[SelectorName, ...] = get_args(SelectorName)
    tables = [TableSpec(name, name, max_size=20, remover=name) for name in names[:6]]
    tables.append(TableSpec("strided", stride=2))
    layout = Layout(schema, 8, _STEPS, tuple(tables))
    limiters = {table.name: RateLimiter(RateLimit.from_min_size(1)) for table in tables}
    windows = (
        Window(),
        Window(length=3, burn_in=2, observations="ends", stack=4),
        Window(stack=2, stack_on_device=True),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = StorageFile(folder, run="warmup", shard=0, size=layout.size)
        shard = Shard(layout, limiters, index=0, seed=0, stack=4, file=file)
        shard.connect("writer")
        for sequence in range(12):
            rows = schema.zeros(_STEPS)
            rows["is_first"][0], rows["is_last"][-1] = sequence % 4 == 0, sequence % 4 == 3
            shard.insert("writer", sequence, np.zeros(_STEPS, np.int32), rows, timeout_s=1.0)
        for table in tables:
            for window in windows:
                found = shard.sample(table.name, 4, 4, window, timeout_s=1.0)
                assert found is not None
                shard.update_priorities(table.name, found[1].item, np.ones(4))
        draw = shard.draw("uniform", 4, 4, timeout_s=1.0)
        assert draw is not None
        memory = map_for_reading(file.path)[: layout.size]
        for window in windows:
            reader = WindowReader(layout, layout.carve(memory), window)
            reader.read(draw.rows, buffers(schema, window, 4), 0, drawn=draw.taken)
        Shard(layout, limiters, index=0, seed=0, stack=4, file=file)  # as `recover` would: other loops
        shard.close()
    return time.monotonic() - began


if __name__ == "__main__":
    warm_up()
