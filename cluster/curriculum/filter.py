"""Which groups are worth learning from, and what it costs to sample those that are not.

Balanced online difficulty filtering (Bae et al. 2025, "Online Difficulty Filtering for Reasoning Oriented Reinforcement
Learning", arXiv 2504.03380): groups whose pass rate lies outside a band are not learnt from, and sampling goes on until the
learner's batch is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from configs.curriculum import pass_counts

Verdict = Literal["kept", "too_easy", "too_hard"]
Reason = Literal["too_easy", "too_hard", "unscored", "stale"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class GroupFilter:
    """Keeps groups by their number of passes.

    Passes are counted, and rewards not compared: a variance of rewards that is 0 on paper is seldom 0 in floating point.
    """

    def __init__(self, low: float, high: float, group_size: int) -> None:
        """
        Args:
            low, high: lowest and highest pass rate that is kept, inclusive; 0 and 1 keep every group.
            group_size: attempts of a whole group, 1 or more.

        Raises:
            ValueError: the rates are not a band within 0 and 1, or no count of passes of a whole group lies within them.
        """
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"the band {low:g}–{high:g} is none; expected 0 ≤ low ≤ high ≤ 1")
        if group_size < 1:
            raise ValueError(f"group_size is {group_size}; expected 1 or more")
        self.low, self.high, self.group_size = low, high, group_size
        fewest, most = pass_counts(low, high, group_size)
        if fewest > most:
            raise ValueError(
                f"the band {low:g}–{high:g} keeps no group of {group_size} attempts; widen it or enlarge the group"
            )
        self.counts = fewest, most

    @property
    def text(self) -> str:
        """The rule in words, with the counts that it comes to."""
        fewest, most = self.counts
        rule = f"band {self.low:g}–{self.high:g} of {self.group_size} attempts"
        if (fewest, most) == (0, self.group_size):
            return f"{rule}: every group is kept"
        passes = f"exactly {fewest}" if fewest == most else f"{fewest} to {most}"
        return f"{rule}: groups with {passes} passes are kept"

    def verdict(self, passes: int, size: int | None = None) -> Verdict:
        """What becomes of a group with `passes` of `size` attempts; None is a whole group.

        A group of another size, some of its attempts unscored, is judged by the same rates, turned into counts for that size.
        Where no count lies within them, as for a single attempt from 0.2 to 0.8, it is not kept.

        Raises:
            ValueError: passes are not within 0 and size.
        """
        size = self.group_size if size is None else size
        if not 0 <= passes <= size or size < 1:
            raise ValueError(
                f"a group came with {passes} passes of {size}; expected 0 to size, and a size of 1 or more"
            )
        fewest, most = pass_counts(self.low, self.high, size)
        if fewest <= passes <= most:
            return "kept"
        return "too_hard" if passes < fewest else "too_easy"

    def keeps(self, passes: int, size: int | None = None) -> bool:
        """Whether a group with `passes` of `size` attempts is learnt from; as `verdict`.

        Raises:
            ValueError: passes are not within 0 and size.
        """
        return self.verdict(passes, size) == "kept"


@dataclass(frozen=True)
class Amount:
    """What was sampled, in three units."""

    groups: int = 0
    attempts: int = 0  # completions or episodes
    units: int = 0  # tokens or environment steps

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.groups + other.groups, self.attempts + other.attempts, self.units + other.units)


class Waste:
    """Counts what was sampled, and what became of it; those of several actors are merged.

    What still waits for the learner is kept; if it grows too old to be used, it is moved to `stale`.
    """

    def __init__(self) -> None:
        self.kept = Amount()
        self.rejected: dict[Reason, Amount] = {reason: Amount() for reason in REASONS}

    def count(self, verdict: Verdict | Reason, amount: Amount) -> None:
        """Add something sampled that was kept, or rejected for a reason.

        A completion that was dropped alone, unscored out of a group that went on, has an amount of 0 groups.
        """
        if verdict == "kept":
            self.kept += amount
        else:
            self.rejected[verdict] += amount

    def discard(self, reason: Reason, amount: Amount) -> None:
        """Move what was counted as kept to a reason, as when it was found stale later."""
        self.kept += Amount(-amount.groups, -amount.attempts, -amount.units)
        self.rejected[reason] += amount

    @property
    def wasted(self) -> Amount:
        """What was rejected, for any reason."""
        return sum(self.rejected.values(), Amount())

    @property
    def sampled(self) -> Amount:
        """Everything that was counted."""
        return self.kept + self.wasted

    @property
    def share(self) -> float:
        """Share of the units sampled that was thrown away; 0 before there are any."""
        sampled = self.sampled.units
        return self.wasted.units / sampled if sampled else 0.0

    def merge(self, other: Waste) -> None:
        """Add what another one counted."""
        self.kept += other.kept
        for reason in REASONS:
            self.rejected[reason] += other.rejected[reason]

    def metrics(self, *, attempts: str = "completions", units: str = "tokens") -> dict[str, float]:
        """Totals and shares under `waste/`: units, attempts (by these names) and groups sampled, and the share of units by reason."""
        sampled = self.sampled
        found = {
            "waste/share": self.share,
            f"waste/sampled_{units}": float(sampled.units),
            f"waste/sampled_{attempts}": float(sampled.attempts),
            "waste/sampled_groups": float(sampled.groups),
            "waste/kept_groups": float(self.kept.groups),
        }
        for reason, amount in self.rejected.items():
            found[f"waste/{reason}"] = amount.units / sampled.units if sampled.units else 0.0
        return found

    def state(self) -> dict[str, list[int]]:
        """The counts, fit for JSON: groups, attempts and units of what was kept, and of each reason."""
        rows = [("kept", self.kept), *self.rejected.items()]
        return {name: [amount.groups, amount.attempts, amount.units] for name, amount in rows}

    @classmethod
    def from_state(cls, state: Mapping[str, list[int]]) -> Waste:
        """What `state` gave, again.

        Raises:
            ValueError: it is not what `state` gave.
        """
        expected = {"kept", *REASONS}
        if set(state) != expected or any(len(row) != 3 for row in state.values()):
            raise ValueError(
                f"the counts are {dict(state)}; expected three numbers for each of {', '.join(sorted(expected))}"
            )
        waste = cls()
        waste.kept = Amount(*map(int, state["kept"]))
        waste.rejected = {reason: Amount(*map(int, state[reason])) for reason in REASONS}
        return waste
