"""The limits that a table sets to sampling and inserting, and which of them cannot work.

With I items inserted, S sampled and D deleted over the table's life, and spi samples per insert (after Cassirer et al.
2021, "Reverb", arXiv 2102.04736, §3.4):

    sampling n needs   I − D ≥ min_size  and  I·spi − S − n ≥ low
    inserting n needs  I + n − D ≤ min_size  or  (I + n)·spi − S ≤ high
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class DeadlockError(ValueError):
    """Settings under which writers and samplers would wait for each other for ever."""


@dataclass(frozen=True)
class RateLimit:
    """The limits of a table's pace.

    samples_per_insert: items sampled per item inserted; None where only the size counts (low and high are infinite).
    min_size: items in the table before it is sampled.
    low, high: bounds of inserted · samples_per_insert − sampled, in samples; −inf and inf for none.

    Raises:
        ValueError: a bound is no number or on the wrong side of the other, the ratio is not positive or is missing.
    """

    samples_per_insert: float | None
    min_size: int
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        spi = self.samples_per_insert
        if spi is not None and not 0 < spi < math.inf:
            raise ValueError(f"samples_per_insert must be a positive number or None, received {spi}")
        if spi is None and (self.low, self.high) != (-math.inf, math.inf):
            raise ValueError(f"bounds {self.low:g}…{self.high:g} need samples_per_insert, received None")
        if self.min_size < 0:
            raise ValueError(f"min_size must be at least 0, received {self.min_size}")
        if not (self.low <= self.high and self.low < math.inf and self.high > -math.inf):
            raise ValueError(f"low must not exceed high, received low {self.low} and high {self.high}")

    @classmethod
    def from_samples_per_insert(cls, samples_per_insert: float, *, min_size: int, error_buffer: float) -> RateLimit:
        """Hold a ratio; `error_buffer`: samples by which either side may be ahead of it."""
        middle = min_size * samples_per_insert
        return cls(samples_per_insert, min_size, middle - error_buffer, middle + error_buffer)

    @classmethod
    def queue(cls, size: int) -> RateLimit:
        """Every item is sampled once, and at most `size` items wait for it."""
        return cls(1.0, 0, 0.0, float(size))

    @classmethod
    def from_min_size(cls, min_size: int) -> RateLimit:
        """Sample as often as you like once `min_size` items are there."""
        return cls(None, min_size)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> RateLimit:
        """Inverse of `to_dict`."""
        low, high = found["low"], found["high"]
        return cls(
            found["samples_per_insert"],
            int(found["min_size"]),
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )

    def to_dict(self) -> dict[str, float | None]:
        """For JSON; null stands for no bound."""
        return {
            "samples_per_insert": self.samples_per_insert,
            "min_size": self.min_size,
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
        }

    @property
    def ratio(self) -> float:
        """`samples_per_insert`, 1 where it does not count."""
        return 1.0 if self.samples_per_insert is None else self.samples_per_insert

    @property
    def bound_name(self) -> str:
        """What holds the sides together, as the user set it."""
        is_queue = (self.samples_per_insert, self.low) == (1.0, 0.0)
        return f"a queue of {self.high:g}" if is_queue else "replay.error_buffer"

    def check(
        self,
        *,
        insert: int,
        sample: int,
        max_size: int,
        max_times_sampled: int | None = None,
        shards: int = 1,
        insert_block: int = 0,
        sample_block: int = 0,
    ) -> list[str]:
        """Look for a deadlock. Returns a line for each way in which the settings may, but need not, run into one.

        insert, sample: items asked for at once, at most.
        max_size: items the table surely holds when it is full: those left after a segment was recycled.
        max_times_sampled: after so many samples an item is removed; None: never.
        insert_block, sample_block: credits that each shard but the first leases at once.

        Raises:
            DeadlockError: the sides must come to wait for each other, or the ratio cannot be held.
        """
        spi, often = self.ratio, math.inf if max_times_sampled is None else max_times_sampled
        if self.min_size > max_size:
            raise DeadlockError(
                f"sampling would never begin: replay.min_size is {self.min_size} and the table holds {max_size} items; "
                f"lower replay.min_size to at most {max_size} or raise replay.capacity"
            )
        if sample > often * max_size:
            raise DeadlockError(
                f"a batch of {sample} would never be there: the table holds {max_size} items, each sampled at most "
                f"{often:g} times; sample at most {often * max_size:g} at once or raise replay.capacity"
            )
        if math.isinf(self.high):
            return []
        if often < spi:
            raise DeadlockError(
                f"the ratio cannot be held: an item is sampled at most {often:g} times, and samples_per_insert is "
                f"{spi:g}; raise max_times_sampled to at least {math.ceil(spi)} or lower samples_per_insert"
            )
        needed = insert * spi + sample
        if self.high - self.low < needed:
            raise DeadlockError(
                f"writers and samplers would wait for each other: inserting {insert} and sampling {sample} at once need "
                f"a room of {insert} · {spi:g} + {sample} = {needed:g} samples, received {self.high - self.low:g} "
                f"({self.low:g}…{self.high:g}); {self._remedy(needed, self.low)}"
            )
        least, free = max(self.min_size, 1), self.min_size // insert * insert
        room = (least - 1 + insert) * spi
        if free < least and (free + insert) * spi > self.high:
            raise DeadlockError(
                f"the table would never hold {least} items: after {free} the next {insert} need a bound of "
                f"{(free + insert) * spi:g} samples, received {self.high:g}; {self._remedy_high(room)}"
            )
        may = []
        if insert > 1 and room > self.high:
            may.append(
                f"where writes of up to {insert} come in uneven sizes, the table may stop short of {least} items: that "
                f"needs a bound of {room:g} samples, received {self.high:g}; {self._remedy_high(room)}"
            )
        if often < math.inf and self.high < needed:
            may.append(
                f"a batch of {sample} may find too few samples left while writes of {insert} wait: that needs a bound "
                f"of {needed:g} samples, received {self.high:g}; {self._remedy_high(needed)}"
            )
        # Items evicted before their last sample leave a debt that nobody can pay; what the table holds bounds it.
        held = math.ceil(insert * spi + max(sample, self.min_size * max(1.0, spi)))
        if often < math.inf and (often > spi or max_size < max(self.high, self.min_size)) and max_size < held:
            may.append(
                f"items evicted before they were sampled {often:g} times may leave both sides waiting: inserting "
                f"{insert} and sampling {sample} at once then need a table of {held} items, received {max_size}; raise "
                f"replay.capacity"
            )
        low = self.low if math.isinf(often) else max(self.low, 0.0)  # such a table cannot be sampled below 0
        leased = (shards - 1) * (insert_block * spi + sample_block)
        if shards > 1 and self.high - low < needed + leased:
            may.append(
                f"{shards} shards may hold leases of {leased:g} samples that others wait for (blocks of {insert_block} "
                f"inserts and {sample_block} samples): together with the requests they need a room of "
                f"{needed + leased:g}, received {self.high - low:g}; lease smaller blocks or "
                f"{self._remedy(needed + leased, low)}"
            )
        return may

    def _remedy(self, room: float, low: float) -> str:
        if low > self.low:  # the lower bound is the empty table's, so that only the upper one can give way
            return self._remedy_high(low + room)
        middle = self.min_size * self.ratio
        if self.bound_name == "replay.error_buffer" and math.isclose(middle - self.low, self.high - middle):
            return self._remedy_high(middle + room / 2)
        return self._remedy_high(self.low + room)

    def _remedy_high(self, high: float) -> str:
        if self.bound_name != "replay.error_buffer":
            return f"raise the queue's size to at least {math.ceil(high)}, or write and sample less at once"
        samples = high - self.min_size * self.ratio
        return (
            f"raise replay.error_buffer to at least {math.ceil(samples / self.ratio)} steps ({samples:g} samples), or "
            f"write and sample less at once"
        )
