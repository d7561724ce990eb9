"""The settings of the curriculum: which tasks are drawn, and which groups of attempts are learnt from.

The same for prompts and for environments; what a run of control has besides is in `EpisodeCurriculumSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from configs.settings import CLASS, Scalar, Settings, setting

CURRICULA = ("uniform", "staged", "band", "learning_progress", "level_replay", "rehearsal")


def pass_counts(low: float, high: float, size: int) -> tuple[int, int]:
    """The fewest and the most passes of a group of `size` whose pass rate is from `low` to `high`, both inclusive.

    The first exceeds the second where no count does: of one attempt, none is from 0.2 to 0.8.
    """
    # Rates such as 0.2 have no exact binary form: 0.2 · 15 must give 3, not 4.
    return math.ceil(low * size - 1e-9), math.floor(high * size + 1e-9)


class CurriculumSettings(Settings):
    """Which tasks are drawn, and which groups are worth learning from (Bae et al. 2025, arXiv 2504.03380)."""

    draw: str = setting(
        "band",
        "How tasks are drawn: uniform; staged, in order of difficulty; band, by the predicted probability that a group has "
        "more than one outcome within the band; learning_progress; level_replay, by the learner's value loss; rehearsal, "
        "band with a share for tasks once solved and now failing; or package.module:Class of your own.",
        unit="name",
        pattern=rf"^({'|'.join(CURRICULA)}|{CLASS})$",
        allowed=f"{', '.join(CURRICULA)} or package.module:Class",
        names=CURRICULA,
    )
    kwargs: dict[str, Scalar] = setting({}, "Arguments passed on to a curriculum of your own.", unit="name value")
    floor: float = setting(
        0.1,
        "Share of the draws that stays uniform, so that every task is tried again; staged draws unlocked stages alone.",
        unit="share",
        ge=0.0,
        le=1.0,
    )
    filter: Literal["none", "band"] = setting(
        "band",
        "none keeps every group; band keeps those whose pass rate lies within low and high, and samples on until the "
        "learner's batch is full.",
        unit="choice",
    )
    low: float = setting(0.2, "Lowest pass rate of a group that is kept.", unit="pass rate", ge=0.0, le=1.0)
    high: float = setting(0.8, "Highest pass rate of a group that is kept.", unit="pass rate", ge=0.0, le=1.0)
    sharpness: float = setting(
        3.0,
        "Exponent of that probability, and of the movement that learning_progress draws by: the higher, the fewer tasks the "
        "draws go to; 0 is uniform.",
        unit="exponent",
        ge=0.0,
        le=100.0,
    )
    discount: float = setting(
        0.8,
        "What a task's earlier outcomes weigh after each new group of it; its pass rate changes while the policy learns.",
        unit="per group",
        gt=0.0,
        le=1.0,
    )
    unlock: float = setting(
        0.8,
        "staged: mean predicted pass rate of the newest stage's tasks at which the next stage is unlocked.",
        unit="pass rate",
        gt=0.0,
        le=1.0,
    )
    temperature: float = setting(
        0.1,
        "level_replay: a task's weight is (1 / the rank of its value loss) to the power of 1 / temperature (Jiang et al. "
        "2021, arXiv 2010.03934, section 3).",
        unit="temperature",
        gt=0.0,
        le=100.0,
    )
    rehearsal: float = setting(
        0.25,
        "rehearsal: share of the draws that are not uniform for tasks once solved and now failing, where there are any.",
        unit="share",
        ge=0.0,
        lt=1.0,
    )

    def conflicts(self, *, group_size: int) -> Iterator[str]:
        """One line for each combination of settings, each legal by itself, that cannot run with groups of this size."""
        if self.low > self.high:
            yield f"curriculum.low ({self.low:g}) must not exceed curriculum.high ({self.high:g})"
        low, high = pass_counts(self.low, self.high, group_size)
        if self.filter == "band" and low > high:
            yield (
                f"curriculum.filter band keeps no group: with groups of {group_size} no pass rate lies within "
                f"{self.low:g} and {self.high:g}; widen the band"
            )
        if self.kwargs and self.draw in CURRICULA:
            yield f"curriculum.kwargs are for a curriculum of your own; {self.draw} takes none"
        if self.draw == "learning_progress" and self.discount == 1.0:
            yield "curriculum.draw learning_progress needs a curriculum.discount below 1: without one nothing is recent"


class EpisodeCurriculumSettings(CurriculumSettings):
    """Which environments are drawn, and which groups of episodes are worth learning from."""

    draw: str = setting(
        "uniform",
        CurriculumSettings.model_fields["draw"].description or "",
        unit="name",
        pattern=rf"^({'|'.join(CURRICULA)}|{CLASS})$",
        allowed=f"{', '.join(CURRICULA)} or package.module:Class",
        names=CURRICULA,
    )
    filter: Literal["none", "band"] = setting(
        "none",
        "none keeps every episode; band plays group_size episodes of a task and keeps them where their pass rate lies within "
        "low and high, and plays on meanwhile. Episodes thrown away count as waste, and not as environment steps of the run.",
        unit="choice",
    )
    discount: float = setting(
        0.95,
        "What a task's earlier outcomes weigh after each new episode of it; its pass rate changes while the policy learns.",
        unit="per episode",
        gt=0.0,
        le=1.0,
    )
    group_size: int = setting(
        8,
        "Episodes of one task that the band is judged on; without a filter they are played one by one.",
        unit="episodes",
        ge=2,
        le=4096,
    )
