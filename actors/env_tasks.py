"""The tasks of a run of control: environments with their arguments, listed, multiplied out, read or generated."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import envpool
import gymnasium
from pydantic import ValidationError

from actors import envpool_env, gymnasium_env
from actors.envs import EnvError, check_env
from actors.task_set import TaskError, TaskSet, from_json, import_generator, is_file, key_of, read_rows
from configs.fields import nearest, walk
from configs.schema import EnvSettings, EnvTasksSettings
from configs.settings import Argument
from configs.sources import got
from configs.tasks import MOST_TASKS, EnvTaskRow

__all__ = ["EnvTask", "make_env_tasks"]

FLAGS = ("success", "is_success")  # of EnvPool's infos, where no other is asked for
MOST_STAGES = 64  # tasks that are each a stage of their own; of more a family is one


@dataclass(frozen=True)
class EnvTask:
    """An environment with its arguments, and when an episode of it has passed.

    An episode has passed if its return is at least `threshold`; where that is None, if the flag `success` in the
    environment's info was true at any of its steps. One of the two is set.
    """

    id: str
    kwargs: Mapping[str, Argument]  # all of them, those of env.kwargs too
    name: str  # what metrics call it, distinct within a task set
    family: str  # of tasks alike in difficulty
    stage: int  # its place in the order of difficulty, from 0
    threshold: float | None = None
    success: str | None = None
    embedding: tuple[float, ...] | None = None  # where the encoding is one: as long for every task of the set

    @cached_property
    def key(self) -> int:
        """63 bits that follow from id and arguments alone: the same in every run and process."""
        return key_of(_identity(self.id, self.kwargs))

    def settings(self, env: EnvSettings) -> EnvSettings:
        """The settings of the environment that plays it: `env` with the task's id and arguments."""
        return env.model_copy(update={"id": self.id, "kwargs": dict(self.kwargs)})


def make_env_tasks(tasks: EnvTasksSettings, env: EnvSettings) -> TaskSet[EnvTask]:
    """The run's tasks, in the order in which they are configured; a product's last argument changes fastest.

    A file (.jsonl, one JSON object on each line, or .parquet) holds a row for each task, with the keys of `EnvTaskRow`:
    all may be left out, and `kwargs` is an object, in Parquet also as JSON text. A generator, package.module:function, is
    called as function(**tasks.kwargs) and gives such rows.

    What a row leaves out:
        id: env.id.
        kwargs: env.kwargs, which hold for all tasks; a row's own come over them.
        name: the id without what stands before its "/", and the arguments in which tasks of this id differ.
        family: the id without what stands before its "/".
        stage: of at most 64 tasks the position, of more that of the family's first appearance among families.
        threshold: tasks.threshold; else the flag tasks.success in the environment's info, or success or is_success where
            EnvPool has one; else the environment's own reward_threshold.
        embedding: where tasks.encoding is embedding, the numeric arguments that differ between tasks, by name, each scaled so
            that its smallest value becomes −1 and its largest 1.

    Args:
        tasks: the tasks' settings, `tasks.configured`.
        env: the environment's settings, which the tasks' ids and arguments come over.

    Raises:
        TaskError: a row is none; two tasks are the same or have one name; a task's environment is unknown, or nothing says
            when an episode of it has passed. Says which, and what to do.
    """
    found = list(itertools.islice(_rows(tasks), MOST_TASKS + 1))
    if not found:
        raise TaskError(f"tasks.source: {tasks.source} gave no tasks, expected at least one")
    if len(found) > MOST_TASKS:
        raise TaskError(f"tasks: there are more than {MOST_TASKS} tasks, which is the most; leave some out")
    rows = [row for _, row in found]
    ids = [row.id or env.id for row in rows]
    arguments: list[dict[str, Argument]] = [{**env.kwargs, **row.kwargs} for row in rows]
    _check_distinct([_identity(*one) for one in zip(ids, arguments, strict=True)], [where for where, _ in found])
    names = _names(rows, ids, arguments)
    families = [row.family or _short(id) for row, id in zip(rows, ids, strict=True)]
    stages = _stages(rows, families)
    embeddings = _embeddings(rows, arguments, names) if tasks.encoding == "embedding" else [None] * len(rows)
    made = []
    for row, id, kwargs, name, family, stage, embedding in zip(
        rows, ids, arguments, names, families, stages, embeddings, strict=True
    ):
        threshold, success = _criterion(row, id, kwargs, name, tasks, env)
        made.append(EnvTask(id, kwargs, name, family, stage, threshold, success, embedding))
    return TaskSet(made)


def _rows(tasks: EnvTasksSettings) -> Iterator[tuple[str, EnvTaskRow]]:
    """Each task's row and, before it, where it stands, as errors name it."""
    if tasks.source is not None:
        given = _from_file(Path(tasks.source)) if is_file(tasks.source) else _generated(tasks.source, tasks.kwargs)
        yield from ((where, _row(row, where)) for where, row in given)
    elif tasks.list:
        yield from ((f"tasks.list.{number}", row) for number, row in enumerate(tasks.list))
    else:
        combinations = itertools.product(tasks.ids or (None,), *tasks.product.values())
        for number, (id, *values) in enumerate(combinations):
            kwargs = dict(zip(tasks.product, values, strict=True))
            # Its parts have been judged, and a million rows are not judged again.
            yield f"tasks.product, combination {number}", EnvTaskRow.model_construct(id=id, kwargs=kwargs)


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    for where, row in read_rows(path):
        if path.suffix == ".parquet":
            if isinstance(kwargs := row.get("kwargs"), str):
                row["kwargs"] = from_json(kwargs, f"{where}, kwargs")
            elif isinstance(kwargs, dict):  # a column of structs has every row's arguments in each, as null
                row["kwargs"] = {name: value for name, value in kwargs.items() if value is not None}
        yield where, row


def _generated(name: str, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    generate = import_generator(name)
    try:
        found: Iterable[Any] = iter(generate(**kwargs))
    except TypeError as error:
        raise TaskError(f"generator {name} with arguments {dict(kwargs)}: {error}") from error
    for number, row in enumerate(found):
        yield f"generator {name}, task {number}", row


_FIELDS = {field.path: field for field in walk(EnvTaskRow)}


def _row(row: object, where: str) -> EnvTaskRow:
    if isinstance(row, EnvTaskRow):
        return row
    if not isinstance(row, Mapping):
        raise TaskError(f"{where}: expected an object with keys among {', '.join(_FIELDS)}, received {got(row)}")
    try:
        # As JSON, in which pydantic is strict and still takes lists for tuples.
        return EnvTaskRow.model_validate_json(json.dumps(dict(row), allow_nan=False), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise TaskError(f"{where}: a task must be as in JSON: {error}") from error
        wrong = error.errors(include_url=False)[0]
        name, *rest = map(str, wrong["loc"])
        if name not in _FIELDS:
            close = nearest(name, _FIELDS)
            hint = f"did you mean {close}? " if close else ""
            raise TaskError(f"{where}: there is no key {name}; {hint}a task has {', '.join(_FIELDS)}") from error
        field = _FIELDS[name]
        expected = field.element if rest else field.allowed
        path = ".".join([name, *rest[:1]])
        raise TaskError(f"{where}: {path}: expected {expected}, received {got(wrong['input'])}") from error


def _identity(id: str, kwargs: Mapping[str, Argument]) -> str:
    return json.dumps([id, dict(kwargs)], sort_keys=True, separators=(",", ":"))


def _check_distinct(identities: Sequence[str], places: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for identity, where in zip(identities, places, strict=True):
        if identity in first:
            raise TaskError(
                f"{where}: the same environment with the same arguments as {first[identity]}; leave one of the two out"
            )
        first[identity] = where


def _short(id: str) -> str:
    return id.rpartition("/")[2]


def _text(kwargs: Mapping[str, object]) -> str:
    def one(value: object) -> str:
        return ",".join(map(one, value)) if isinstance(value, tuple) else str(value)

    return " ".join(f"{name}={one(value)}" for name, value in kwargs.items())


def _differing(arguments: Sequence[Mapping[str, Argument]]) -> list[str]:
    """Names of the arguments that are not the same for all, by name."""
    absent = object()
    names = sorted({name for kwargs in arguments for name in kwargs})
    values = {name: {(type(v := kwargs.get(name, absent)), v) for kwargs in arguments} for name in names}
    return [name for name in names if len(values[name]) > 1]


def _names(rows: Sequence[EnvTaskRow], ids: Sequence[str], arguments: Sequence[Mapping[str, Argument]]) -> list[str]:
    by_id: dict[str, list[Mapping[str, Argument]]] = {}
    for id, kwargs in zip(ids, arguments, strict=True):
        by_id.setdefault(id, []).append(kwargs)
    telling = {id: _differing(group) for id, group in by_id.items()}
    shorts = Counter(map(_short, by_id))
    names = []
    for row, id, kwargs in zip(rows, ids, arguments, strict=True):
        # A "/" would divide the name of the task's metrics.
        short = _short(id) if shorts[_short(id)] == 1 else id.replace("/", ".")
        made = f"{short} {_text({name: kwargs[name] for name in telling[id] if name in kwargs})}".rstrip()
        names.append(row.name or made)
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise TaskError(f"{count} tasks have the name {name!r}, and metrics go by names; give each a name of its own")
    return names


def _stages(rows: Sequence[EnvTaskRow], families: Sequence[str]) -> list[int]:
    given = [row.stage for row in rows if row.stage is not None]
    if len(given) == len(rows):
        return given
    if given:
        raise TaskError(f"{len(given)} of the {len(rows)} tasks have a stage; give one to all, or to none")
    if len(rows) <= MOST_STAGES:
        return list(range(len(rows)))
    order = {family: stage for stage, family in enumerate(dict.fromkeys(families))}
    return [order[family] for family in families]


def _embeddings(
    rows: Sequence[EnvTaskRow], arguments: Sequence[Mapping[str, Argument]], names: Sequence[str]
) -> list[tuple[float, ...]]:
    given = [row.embedding for row in rows if row.embedding is not None]
    if given:
        lengths = {len(embedding) for embedding in given}
        if len(given) != len(rows) or len(lengths) > 1:
            raise TaskError(
                f"tasks.encoding embedding: {len(given)} of the {len(rows)} tasks have an embedding, of "
                f"{' or '.join(map(str, sorted(lengths)))} numbers; give one of the same length to all, or to none"
            )
        return given
    columns = [
        column for name in _differing(arguments) for column in _columns([kwargs.get(name) for kwargs in arguments])
    ]
    found: list[tuple[float, ...]] = list(zip(*map(_scaled, columns), strict=True)) or [()] * len(rows)
    first: dict[tuple[float, ...], str] = {}
    for embedding, name in zip(found, names, strict=True):
        if embedding in first:
            raise TaskError(
                f"tasks.encoding embedding: the tasks {first[embedding]!r} and {name!r} do not differ in numeric arguments that "
                "all tasks have, expected an embedding for each; give embeddings in the tasks' rows, or take one_hot"
            )
        first[embedding] = name
    return found


def _columns(values: Sequence[Argument | None]) -> list[tuple[float, ...]]:
    """The components of an argument, each with its value for every task; none where not all are as many numbers."""
    parts = [value if isinstance(value, tuple) else (value,) for value in values]
    if len({len(part) for part in parts}) > 1 or any(not isinstance(v, int | float) for part in parts for v in part):
        return []
    columns = [tuple(float(v) for v in column if isinstance(v, int | float)) for column in zip(*parts, strict=True)]
    return [column for column in columns if len(set(column)) > 1]


def _scaled(values: tuple[float, ...]) -> list[float]:
    low, high = min(values), max(values)
    return [2 * (value - low) / (high - low) - 1 for value in values]


def _criterion(
    row: EnvTaskRow, id: str, kwargs: Mapping[str, Argument], name: str, tasks: EnvTasksSettings, env: EnvSettings
) -> tuple[float | None, str | None]:
    """The return from which on an episode has passed, or else the flag that says so."""
    try:
        flags, threshold = _criteria(id, env.backend)
    except EnvError as error:
        raise TaskError(f"task {name!r}: {error}") from error
    if (own := row.threshold if row.threshold is not None else tasks.threshold) is not None:
        return own, None
    if tasks.success is not None and (flags is None or tasks.success in flags):
        return None, tasks.success
    if tasks.success is None and flags is not None and (flag := next((f for f in FLAGS if f in flags), None)):
        return None, flag
    given = kwargs.get("reward_threshold", threshold)
    if isinstance(given, int | float):
        return float(given), None
    info = f", whose info has {', '.join(flags) or 'nothing'}," if flags is not None else ""
    raise TaskError(
        f"task {name!r}: nothing says when an episode of {id}{info} has passed: it has neither the flag "
        f"{tasks.success or ' or '.join(FLAGS)} nor a reward_threshold; set tasks.threshold, or threshold in the task's row, to "
        "the return from which on it has, or tasks.success to another flag"
    )


@lru_cache(maxsize=4096)
def _criteria(id: str, backend: Literal["auto", "envpool", "gymnasium"]) -> tuple[tuple[str, ...] | None, float | None]:
    """What an environment's info holds, None where only playing an episode tells, and its reward_threshold."""
    if backend == "gymnasium" or id not in envpool_env.ids():
        if id not in gymnasium.registry and not gymnasium_env.is_own(id):
            check_env(EnvSettings(id=id, backend=backend))  # which raises where it is unknown, and names the nearest
        spec = gymnasium.registry.get(id)
        return None, spec.reward_threshold if spec is not None else None
    try:
        made = envpool.make_spec(id)
    except Exception as error:  # such as ImportError, where a library is missing
        raise EnvError(f"EnvPool cannot build {id!r}: {error}") from error
    names = sorted(name.removeprefix("info:") for name in made.state_array_spec if name.startswith("info:"))
    # EnvPool's reward_threshold is 0 where the environment's authors give none.
    threshold = getattr(made.config, "reward_threshold", None) or None
    return tuple(n for n in names if n != "env_id" and not n.startswith("players.")), threshold
