"""The tasks of a run, whatever they are of, and the rows of files and of generators that they are made from."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from actors.assignments import Task

AnyTask = TypeVar("AnyTask", bound=Task)


class TaskError(ValueError):
    """Tasks that cannot be generated, read or made."""


class TaskSet(Sequence[AnyTask], Generic[AnyTask]):
    """Distinct tasks; the position of each is its number."""

    def __init__(self, tasks: Iterable[AnyTask]) -> None:
        self._tasks = list(tasks)
        numbers: dict[str, list[int]] = {}
        for number, task in enumerate(self._tasks):
            numbers.setdefault(task.family, []).append(number)
        self._numbers = dict(sorted(numbers.items()))

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> AnyTask: ...
    @overload
    def __getitem__(self, index: slice) -> list[AnyTask]: ...
    def __getitem__(self, index: int | slice) -> AnyTask | list[AnyTask]:
        return self._tasks[index]

    @property
    def families(self) -> tuple[str, ...]:
        """The families' names, sorted."""
        return tuple(self._numbers)

    def of(self, family: str) -> list[int]:
        """Numbers of the tasks of one family."""
        return self._numbers[family]


def key_of(text: str) -> int:
    """63 bits that follow from `text` alone: the same in every run and process."""
    # A surrogate that came in by JSON's \ud800 has no UTF-8.
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_file(source: str) -> bool:
    """Whether `source` names a file of rows, and no generator."""
    return source.endswith((".jsonl", ".parquet"))


def is_generator(source: str) -> bool:
    """Whether `source` has the form package.module:function."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) is not None


def import_generator(name: str) -> Callable[..., Any]:
    """The function that `name`, package.module:function, stands for; raises TaskError where there is none."""
    module_name, _, function_name = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"generator {name} cannot be imported: {error}") from error
    return function


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a .jsonl or .parquet file and, before it, where it stands, as errors name it.

    A row of JSON may be anything; a row of Parquet is a dict without its null columns.

    Raises:
        TaskError: the file does not exist, or is not of its kind.
    """
    if not path.is_file():
        raise TaskError(f"tasks.source: there is no file {path} (in {Path.cwd()})")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, from_json(line, where)
        except UnicodeDecodeError as error:
            raise TaskError(f"{path}: expected UTF-8 text: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", {key: value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError) as error:
        raise TaskError(f"{path}: expected a Parquet file: {error}") from error


def from_json(text: str, where: str) -> Any:
    """What JSON `text` stands for; raises TaskError, which names the place `where`, if it is none."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TaskError(f"{where}: expected a JSON object: {error}") from error
