"""The prompts of a run: generated, or read from a file; those to learn from and those held out."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.task_set import TaskError, TaskSet, from_json, import_generator, is_file, is_generator, key_of, read_rows

if TYPE_CHECKING:  # verifier processes import this module, and should start at once
    from configs.llm import TasksSettings

__all__ = ["Task", "TaskError", "distinct_tasks", "make_tasks"]

GENERATORS = {"countdown": "actors.llm.countdown:generate", "arithmetic": "actors.llm.arithmetic:generate"}
ONE_IN_HELD_OUT = 4  # of a file's prompts, those that may be held out
MOST_REPEATS = 3000  # draws in a row without a new prompt, after which a kind of task counts as used up


@dataclass(frozen=True)
class Task:
    """A prompt, and what its completions are judged by."""

    prompt: str
    family: str  # of prompts alike in difficulty, such as "3 numbers"
    verifier: str  # a built-in one's name, or package.module:function
    data: Mapping[str, Any] = field(default_factory=dict)  # what the verifier needs, as in JSON
    solution: str | None = None  # a completion that passes, where one is known

    @cached_property
    def key(self) -> int:
        """63 bits that follow from the prompt and its data alone: the same in every run and process."""
        return key_of(self.prompt + "\0" + json.dumps(self.data, sort_keys=True, separators=(",", ":")))


def distinct_tasks(
    count: int, kinds: Sequence[int], draw: Callable[[int], Task], *, puzzle: Callable[[Task], Hashable]
) -> list[Task]:
    """`count` tasks with distinct puzzles, as `draw` gives them, of each kind in turn.

    A kind that gives nothing new any more is left out from then on.

    Args:
        puzzle: what a task asks, however it is written: held-out prompts must not be those to learn from in another order.

    Raises:
        TaskError: there are not as many distinct puzzles of all kinds.
    """
    tasks: list[Task] = []
    seen: set[Hashable] = set()
    open_kinds = list(kinds)
    turn = 0
    while len(tasks) < count:
        if not open_kinds:
            raise TaskError(
                f"there are only {len(tasks)} distinct puzzles, expected {count}; raise the generator's limits by tasks.kwargs, "
                "or lower tasks.count"
            )
        turn %= len(open_kinds)
        for _ in range(MOST_REPEATS):
            task = draw(open_kinds[turn])
            if (asked := puzzle(task)) not in seen:
                seen.add(asked)
                tasks.append(task)
                turn += 1
                break
        else:
            del open_kinds[turn]
    return tasks


def make_tasks(settings: TasksSettings, *, seed: int, held_out: int) -> tuple[TaskSet[Task], TaskSet[Task]]:
    """The run's tasks: `settings.count` to learn from, and `held_out` with other prompts.

    Of a generator, the first `held_out` tasks are held out, so that they stay the same when `settings.count` changes; generators
    therefore mix their families. Of a file, the first `held_out` among every fourth prompt (by a hash of the prompt) are, so
    that they stay the same when lines are added at its end; a file of fewer than about 4 · `held_out` prompts gives fewer.

    A generator of your own, package.module:function, is called as function(count, seed, **settings.kwargs), and gives tasks, or
    mappings with the columns of a file. A file (.jsonl, one JSON object on each line, or .parquet) has the columns prompt (needed), family, verifier, solution and
    data (a JSON object, in Parquet also as text); any further columns become part of `data`, such as answer. A prompt that
    comes again is left out.

    Args:
        settings: the source, its arguments, the count, and the verifier unless it is auto.
        seed: of the generator; any integer ≥ 0.
        held_out: tasks for evaluation, ≥ 0.

    Raises:
        TaskError: the source does not exist, or a task of it is not one; names the line.
    """
    name = GENERATORS.get(settings.source, settings.source)
    if is_file(name):
        if settings.kwargs:
            raise TaskError(f"tasks.kwargs are a generator's; the file {name} takes none, received {settings.kwargs}")
        return _split((_task(row, where) for where, row in read_rows(Path(name))), settings, held_out)
    if not is_generator(name):
        raise TaskError(
            f"tasks.source must be {', '.join(GENERATORS)}, a .jsonl or .parquet file, or package.module:function, received "
            f"{settings.source!r}"
        )
    found = list(_distinct(_generated(name, settings, seed, settings.count + held_out)))
    if len(found) < settings.count + held_out:
        raise TaskError(
            f"generator {name} gave {len(found)} distinct prompts, expected {settings.count} to learn from and {held_out} to "
            "hold out; lower tasks.count or eval.prompts"
        )
    chosen = [_with_verifier(task, settings, f"generator {name}") for task in found]
    return TaskSet(chosen[held_out : held_out + settings.count]), TaskSet(chosen[:held_out])


def _generated(name: str, settings: TasksSettings, seed: int, count: int) -> Iterator[Task]:
    generate = import_generator(name)
    try:
        found: Iterable[Any] = generate(count, seed, **settings.kwargs)
    except TypeError as error:
        raise TaskError(f"generator {name} with arguments {dict(settings.kwargs)}: {error}") from error
    for number, task in enumerate(found):
        yield task if isinstance(task, Task) else _task(task, f"generator {name}, task {number}")


def _split(tasks: Iterable[Task], settings: TasksSettings, held_out: int) -> tuple[TaskSet[Task], TaskSet[Task]]:
    """Task by task, so that what comes later changes nothing for those before it."""
    training: list[Task] = []
    held: list[Task] = []
    for task in _distinct(tasks):
        if len(held) < held_out and key_of(task.prompt) % ONE_IN_HELD_OUT == 0:
            held.append(task)
        elif len(training) < settings.count:
            training.append(task)
        elif len(held) == held_out:
            break
    if not training or (held_out and not held):
        raise TaskError(
            f"{settings.source} holds too few distinct prompts: {len(training)} to learn from and {len(held)} to hold out, "
            "expected at least one of each; one in four is held out"
        )
    return tuple(TaskSet(_with_verifier(t, settings, settings.source) for t in part) for part in (training, held))  # type: ignore[return-value]


def _distinct(tasks: Iterable[Task]) -> Iterator[Task]:
    seen: set[str] = set()
    for task in tasks:
        if task.prompt not in seen:
            seen.add(task.prompt)
            yield task


def _with_verifier(task: Task, settings: TasksSettings, where: str) -> Task:
    if settings.verifier != "auto":
        return task if task.verifier == settings.verifier else replace(task, verifier=settings.verifier)
    if not task.verifier:
        raise TaskError(f"{where}: the prompt {task.prompt[:80]!r} names no verifier; add one, or set tasks.verifier")
    return task


def _task(row: object, where: str) -> Task:
    """A task of a file's row or of what a generator gave."""
    if not isinstance(row, Mapping):
        raise TaskError(f"{where}: expected an object with the key prompt, received {type(row).__name__}")
    texts = {name: row.get(name) for name in ("prompt", "family", "verifier", "solution")}
    if not texts["prompt"]:
        raise TaskError(f"{where}: expected a prompt, received the keys {', '.join(map(str, row)) or 'none'}")
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise TaskError(f"{where}: {name} must be text, received {value!r}")
    data = row.get("data")
    if isinstance(data, str):
        data = from_json(data, f"{where}, data")
    if data is not None and not isinstance(data, Mapping):
        raise TaskError(f"{where}: data must be an object, received {data!r}")
    more = {key: value for key, value in row.items() if key not in ("data", *texts)}
    data = more | dict(data or {})
    try:
        json.dumps(data)
    except (TypeError, ValueError) as error:
        raise TaskError(f"{where}: what a verifier is given must be as in JSON: {error}") from error
    return Task(texts["prompt"], texts["family"] or "all", texts["verifier"] or "", data, texts["solution"])
