"""Seeds of completions."""

from __future__ import annotations

import struct
from hashlib import blake2b


def sample_seed(run: int, task: int, group: int, index: int) -> int:
    """Seed of one completion, 63 bits: a group can be sampled again from the run's seed, the prompt's key and its number."""
    packed = struct.pack("<4Q", run, task & (2**64 - 1), group, index)
    return int.from_bytes(blake2b(packed, digest_size=8).digest(), "little") >> 1
