"""The settings of the tasks of a run of control: which environments with which arguments, and when an episode has passed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from configs.settings import CLASS, Argument, Scalar, Settings, setting

MOST_TASKS = 1_000_000

Name = Annotated[str, Field(min_length=1)]
Values = Annotated[tuple[Argument, ...], Field(min_length=1, max_length=100_000)]
Component = Annotated[float, Field(ge=-1e6, le=1e6)]


class EnvTaskRow(Settings):
    """A task: an environment with its arguments."""

    id: str | None = setting(None, "Environment id; None takes env.id.", unit="name", min_length=1)
    kwargs: dict[str, Argument] = setting(
        {}, "Arguments passed on to the environment's constructor, over those of env.kwargs.", unit="name value"
    )
    name: str | None = setting(
        None, "What metrics call the task; None makes a name from id and arguments.", unit="name", min_length=1
    )
    family: str | None = setting(
        None,
        "Name of the tasks alike in difficulty that this one is of; None takes the id's.",
        unit="name",
        min_length=1,
    )
    stage: int | None = setting(
        None,
        "Place of the task in the order of difficulty, from 0, for curriculum.draw staged.",
        unit="stage",
        ge=0,
        le=10**6,
    )
    threshold: float | None = setting(
        None, "Return from which on an episode of this task has passed.", unit="reward", ge=-1e12, le=1e12
    )
    embedding: tuple[Component, ...] | None = setting(
        None, "Numbers that describe the task to the networks.", unit="numbers", min_length=1, max_length=4096
    )


class EnvTasksSettings(Settings):
    """Tasks, of which a curriculum draws one for each episode; with none configured every episode plays env.id."""

    ids: tuple[Name, ...] = setting(
        (), "Environment ids of the tasks; empty takes env.id.", unit="name", min_length=0, max_length=10_000
    )
    product: dict[str, Values] = setting(
        {},
        "Values of arguments: every combination of them, with every one of the ids, is a task.",
        unit="name values",
    )
    list: tuple[EnvTaskRow, ...] = setting(
        (), "The tasks one by one, in place of ids and product.", unit="tasks", min_length=0, max_length=10_000
    )
    source: str | None = setting(
        None,
        "Tasks from a file, .jsonl or .parquet, or from package.module:function, a generator of your own, in place of ids, "
        "product and list.",
        unit="name",
        pattern=rf"^(.*\.jsonl|.*\.parquet|{CLASS})$",
        allowed="a .jsonl or .parquet file, or package.module:function",
    )
    kwargs: dict[str, Scalar] = setting({}, "Arguments passed on to the generator.", unit="name value")
    threshold: float | None = setting(
        None,
        "Return from which on an episode has passed, for tasks without one of their own; None goes by the success flag where "
        "the environment has one, else by its reward_threshold.",
        unit="reward",
        ge=-1e12,
        le=1e12,
    )
    success: str | None = setting(
        None,
        "Flag of the environment's info that says, at any step, that an episode has passed; None takes success or is_success, "
        "where EnvPool has it.",
        unit="name",
        min_length=1,
    )
    encoding: Literal["none", "one_hot", "embedding"] = setting(
        "none",
        "What observations say of the task: nothing; a one-hot vector of its number; or its embedding, which is its numeric "
        "arguments scaled to -1 to 1 unless its row gives one.",
        unit="choice",
    )
    pad: bool = setting(
        False, "Fill up tasks' observations and actions with zeros where their shapes differ.", unit="switch"
    )
    pools: int | None = setting(
        None,
        "Most tasks whose environments an actor keeps alive at once; None keeps those of twice as many as actors.envs.",
        unit="tasks",
        ge=1,
        le=1_000_000,
    )

    @property
    def configured(self) -> bool:
        """Whether there are tasks."""
        return bool(self.ids or self.product or self.list or self.source is not None)

    def conflicts(self) -> Iterator[str]:
        """One line for each combination of settings, each legal by itself, that cannot run."""
        given = {
            "tasks.ids": bool(self.ids) and not self.product,
            "tasks.product": bool(self.product),
            "tasks.list": bool(self.list),
            "tasks.source": self.source is not None,
        }
        ways = [path for path, there in given.items() if there]
        if len(ways) > 1:
            yield f"{' and '.join(ways)} each say what the tasks are, expected one of them; leave the others out"
        if not ways:
            if changed := [f"tasks.{name}" for name in self.changed]:
                yield (
                    f"{', '.join(changed)} is set and there are no tasks; set one of tasks.ids, tasks.product, tasks.list and "
                    "tasks.source"
                )
        elif self.kwargs and (self.source is None or ":" not in self.source):
            yield "tasks.kwargs are a generator's, and tasks.source names none; environments take env.kwargs"
        count = max(1, len(self.ids)) * math.prod(map(len, self.product.values()))
        if count > MOST_TASKS:
            yield f"tasks.product and tasks.ids make {count} tasks, expected at most {MOST_TASKS}; leave some values out"
