"""One step schema for the environments of many tasks, and how the observations of each lie in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.env_tasks import EnvTask
from actors.envs import check_env
from actors.protocol import EnvError, FloatArray, IntArray, Observation
from configs.schema import EnvSettings, EnvTasksSettings
from replay.schema import LARGE_BYTES, OBSERVATION, Field, StepSchema

STATE_FIELD = f"{OBSERVATION}/state"  # all of a padded observation but frames
TASK_FIELD = f"{OBSERVATION}/task"  # what tells the task
MOST_CHECKED = 64  # tasks with other arguments whose specifications are asked for; one of each id comes on top


def task_schema(env: EnvSettings, settings: EnvTasksSettings, tasks: Sequence[EnvTask]) -> StepSchema:
    """The schema that the steps of all tasks have in common, from specifications: as `check_env`, nothing is left behind.

    With `settings.pad` everything of an observation but frames becomes one vector, `observation/state`, in the order of the
    fields and filled up with zeros to the longest; continuous actions are as long as the longest, and an environment
    leaves out those that it has no use for. What tells the task is added as `observation/task`.

    Args:
        env: library and stack of frames.
        settings: whether to pad, and how the task is told.
        tasks: at least one. Of more than 64 different ones, one of each id is looked at and a sample of the others;
            environments are checked again when they are built.

    Raises:
        EnvError: an environment is unknown or does not fit, two tasks differ in what cannot be padded or is not to be, or
            tasks cannot be told in the way asked for.
    """
    schemas = [(task.name, check_env(task.settings(env))) for task in _checked(tasks)]
    first, common = schemas[0]
    if settings.pad:
        common = _padded(schemas)
    else:
        for name, schema in schemas[1:]:
            if difference := _difference(common, schema):
                raise EnvError(
                    f"tasks {first!r} and {name!r} differ: {difference}; set tasks.pad to fill up vectors and continuous "
                    "actions with zeros, or run them apart"
                )
    encoding = encodings(settings, tasks)
    if encoding is None:
        return common
    fields = {field.name: field for field in common.observations}
    if TASK_FIELD in fields:
        raise EnvError(f"task {first!r} observes a field {TASK_FIELD!r} of its own; set tasks.encoding to none")
    return StepSchema({**fields, TASK_FIELD: Field(TASK_FIELD, "float32", encoding.shape[1:])}, common.action)


def encodings(settings: EnvTasksSettings, tasks: Sequence[EnvTask]) -> FloatArray | None:
    """What observations say of each task, (tasks, numbers); None where `tasks.encoding` is none.

    Raises:
        EnvError: there are too many tasks or numbers, or a task has no embedding as long as the others'.
    """
    if settings.encoding == "none":
        return None
    if settings.encoding == "one_hot":
        _check_length(len(tasks), f"tasks.encoding one_hot of {len(tasks)} tasks", "set tasks.encoding to embedding")
        return np.eye(len(tasks), dtype=np.float32)
    length = len(tasks[0].embedding or ())
    for task in tasks:
        if task.embedding is None or len(task.embedding) != length:
            found = "none" if task.embedding is None else f"one of {len(task.embedding)} numbers"
            raise EnvError(
                f"tasks.encoding embedding: task {task.name!r} has {found}, and {tasks[0].name!r} one of {length}; give every "
                "task an embedding of the same length, or set tasks.encoding to one_hot"
            )
    table = np.array([task.embedding for task in tasks], np.float32)
    _check_length(table.shape[1], f"an embedding of {table.shape[1]} numbers", "give shorter ones")
    return table


class Layout:
    """Where the observations and actions of one environment lie in those of all tasks."""

    def __init__(self, common: StepSchema, own: StepSchema, *, pad: bool, name: str) -> None:
        """
        Args:
            common: as `task_schema` gave it.
            own: of the environment.
            pad: whether `common` is padded.
            name: of the task, for errors.

        Raises:
            EnvError: the environment does not fit.
        """
        fields = [field for field in common.observations if field.name != TASK_FIELD]
        expected = StepSchema({field.name: field for field in fields}, common.action)
        found = _padded([(name, own)], to=expected) if pad else own
        if difference := _difference(expected, found):
            raise EnvError(f"task {name!r} does not fit the tasks looked at before: {difference}")
        self._parts: list[tuple[str, int, int]] = []  # a field, and where it lies in the state
        if pad:
            at = 0
            for field in own.observations:
                if field not in own.large:
                    size = int(np.prod(field.shape, dtype=np.int64))
                    self._parts.append((field.name, at, at + size))
                    at += size
        small = {name for name, *_ in self._parts}
        self._whole = [field.name for field in own.observations if field.name not in small]
        self._action = own.action.shape
        self.plain = not self._parts and own.action.shape == common.action.shape  # nothing is padded

    def write(self, observation: Observation, lanes: IntArray, into: Observation) -> None:
        """Put the observations of `lanes` (n,) into those of all lanes, whose padding is 0."""
        for name in self._whole:
            into[name][lanes] = observation[name]
        for name, begin, end in self._parts:
            into[STATE_FIELD][lanes, begin:end] = observation[name].reshape(len(lanes), -1)

    def action(self, action: NDArray[Any]) -> NDArray[Any]:
        """The environment's part of actions (n, *the common shape)."""
        return action[:, : self._action[0]] if self._action else action


def _checked(tasks: Sequence[EnvTask]) -> list[EnvTask]:
    """Tasks to look at: the different ones, or one of each id and a sample spread over all."""
    if not len(tasks):
        raise EnvError("there are no tasks; expected at least one")
    first_of = _distinct(tasks)
    if len(first_of) <= MOST_CHECKED:
        return first_of
    spread = np.linspace(0, len(first_of) - 1, MOST_CHECKED).astype(int).tolist()
    of_ids = {task.id: task for task in reversed(first_of)}
    return _distinct([*of_ids.values(), *(first_of[number] for number in spread)])


def _distinct(tasks: Sequence[EnvTask]) -> list[EnvTask]:
    found: dict[str, EnvTask] = {}
    for task in tasks:
        found.setdefault(json.dumps([task.id, dict(task.kwargs)], sort_keys=True), task)
    return list(found.values())


def _padded(schemas: Sequence[tuple[str, StepSchema]], *, to: StepSchema | None = None) -> StepSchema:
    """The padded schema of all these, and at least as long as `to`."""
    known = [] if to is None else [("the others", to)]
    (first, begin), *others = [*known, *schemas]
    for name, schema in others:
        frames = _fields(begin.large), _fields(schema.large)
        actions = _fields([begin.action]), _fields([schema.action])
        if frames[0] != frames[1]:
            raise EnvError(
                f"tasks {first!r} and {name!r} differ in their frames: {frames[0]} against {frames[1]}; frames are not padded"
            )
        if actions[0] != actions[1] and not (begin.action.shape and schema.action.shape):
            raise EnvError(
                f"tasks {first!r} and {name!r} differ in their actions: {actions[0]} against {actions[1]}; only continuous "
                "actions are padded"
            )
    all_of = [schema for _, schema in (*known, *schemas)]
    length = max(sum(int(np.prod(f.shape, dtype=np.int64)) for f in _small(schema)) for schema in all_of)
    fields = {field.name: field for field in begin.large}
    if length:
        _check_length(length, f"a padded observation of {length} numbers", "run tasks with shorter ones")
        if STATE_FIELD in fields:
            raise EnvError(
                f"tasks {first!r} have frames named {STATE_FIELD!r}, the name of what is padded; rename them"
            )
        fields[STATE_FIELD] = Field(STATE_FIELD, "float32", (length,))
    return StepSchema(fields, max((schema.action for schema in all_of), key=lambda action: action.shape))


def _small(schema: StepSchema) -> list[Field]:
    return [field for field in schema.observations if field not in schema.large]


def _difference(one: StepSchema, other: StepSchema) -> str:
    """How two schemas differ, in words; nothing if they do not."""
    for a, b in (
        (_fields(one.observations), _fields(other.observations)),
        (_fields([one.action]), _fields([other.action])),
    ):
        if a != b:
            return f"{a} against {b}"
    return ""


def _fields(fields: Sequence[Field]) -> str:
    return (
        ", ".join(
            f"{f.name} {f'of {f.choices} choices' if f.choices else f.dtype + str(list(f.shape))}"
            for f in sorted(fields, key=lambda f: f.name)
        )
        or "none"
    )


def _check_length(numbers: int, what: str, instead: str) -> None:
    """Fields as large as frames are stored and seen as frames."""
    if 4 * numbers >= LARGE_BYTES:
        raise EnvError(f"{what} is too long, expected at most {LARGE_BYTES // 4 - 1}; {instead}")
