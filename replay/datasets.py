"""Episodes from other programs' files, as rows of a step schema.

    Parquet or Arrow IPC, RLDS form (Ramos et al. 2021, arXiv 2111.02767)
        a row per step: observation (or observation/<key>, or a struct), action, reward, is_first, is_last, is_terminal;
        or a row per episode: the same columns as lists, or one column `steps`, a list of structs.
    HDF5 as Minari writes it (main_data.hdf5, or the folder it is in)
        episode_<n>/ observations (T + 1), actions, rewards, terminations, truncations (T)

Files are read a piece at a time: memory does not grow with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .columns import SCHEMA_KEY, concatenate_rows
from .schema import OBSERVATION, Field, SchemaError, StepSchema

CHUNK_ROWS, CHUNK_BYTES = 32_768, 32 << 20  # read at once
CHUNK_EPISODES = 8  # of files with a row per episode
_FLAGS = ("is_first", "is_last", "is_terminal")
_MINARI = {"observations": OBSERVATION, "actions": "action", "rewards": "reward"}
Mapped = Mapping[str, str]  # a file's column → ours


@dataclass(frozen=True)
class Chunk:
    """Steps one after another.

    rows: structured (n,) of the schema's dtype.
    starts: bool (n,), rows that do not go on from the row before them.
    """

    rows: np.ndarray
    starts: np.ndarray


def files_of(paths: Sequence[str | Path]) -> list[Path]:
    """The files to read: those given, and in the place of a folder its Minari file, or its Parquet and Arrow files by name.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds none.
        ValueError: a file's name tells of no format known.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            minari = [p for p in (path / "main_data.hdf5", path / "data" / "main_data.hdf5") if p.is_file()]
            inside = minari or sorted(p for p in path.iterdir() if p.suffix in (*_PARQUET, *_ARROW))
            if not inside:
                raise FileNotFoundError(f"{path} holds no main_data.hdf5, *.parquet or *.arrow")
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        elif path.suffix not in (*_PARQUET, *_ARROW, *_HDF5):
            raise ValueError(f"{path}: expected one of {', '.join((*_PARQUET, *_ARROW, *_HDF5))}")
        else:
            found.append(path)
    return found


_PARQUET, _ARROW, _HDF5 = (".parquet", ".pq"), (".arrow", ".feather", ".ipc"), (".hdf5", ".h5")


def infer_schema(path: Path, mapped: Mapped | None = None) -> StepSchema:
    """The schema of the steps in a file.

    Raises:
        SchemaError: it has no observation or no action.
    """
    if path.suffix in _HDF5:
        found = _minari_fields(path, mapped or {})
    else:
        first = next(_batches(path, 1), None)
        if first is None:
            raise SchemaError(f"{path} holds no rows")
        if (text := (first.schema.metadata or {}).get(SCHEMA_KEY)) is not None:
            return StepSchema.from_json(text.decode())
        columns, _ = _steps(path, first, mapped or {})
        found = {name: _field(name, column) for name, column in columns.items() if _wanted(name)}
    action = found.pop("action", None)
    if action is None or not found:
        raise SchemaError(
            f"{path}: expected columns observation and action, found {sorted(found)}; name yours by --map"
        )
    return StepSchema(found, action)


def read_chunks(paths: Sequence[Path], schema: StepSchema, mapped: Mapped | None = None) -> Iterator[Chunk]:
    """The steps of files, in order; episodes that end without an `is_last` row are closed as truncated.

    Raises:
        SchemaError: a file lacks a column, or holds values of another type or shape.
    """
    held: Chunk | None = None  # the newest row: whether its episode goes on is known with the next
    for path in paths:
        read = _read_minari if path.suffix in _HDF5 else _read_arrow
        fresh = True
        for chunk in read(path, schema, mapped or {}):
            rows, starts = chunk.rows, chunk.starts.copy()
            if not len(rows):
                continue
            starts[0] |= fresh
            fresh = False
            starts[1:] |= rows["is_last"][:-1]
            if held is not None:
                starts[0] |= bool(held.rows["is_last"][0])
                rows = concatenate_rows([held.rows, rows])
                starts = np.concatenate([held.starts, starts])
            _close(rows, np.flatnonzero(starts[1:] & ~rows["is_last"][:-1]))
            rows["is_first"] |= starts  # an episode whose beginning is missing begins where the file has it
            held = Chunk(rows[-1:].copy(), starts[-1:])
            yield Chunk(rows[:-1], starts[:-1])
    if held is not None:
        _close(held.rows, np.flatnonzero(~held.rows["is_last"]))
        yield held


def _close(rows: np.ndarray, last: np.ndarray) -> None:
    """Make these rows the last of truncated episodes: their action and reward are void."""
    rows["is_last"][last], rows["is_terminal"][last], rows["reward"][last] = True, False, 0.0
    rows["action"][last] = 0


def _wanted(name: str) -> bool:
    return name == "action" or name.split("/")[0] == OBSERVATION


def _renamed(name: str, mapped: Mapped) -> str:
    for theirs, ours in mapped.items():
        if name == theirs or name.startswith(theirs + "/"):
            return ours + name[len(theirs) :]
    return name


def _put(path: Path, rows: np.ndarray, field: Field, values: np.ndarray) -> None:
    """Values into a field of rows; floats may lose digits, whole numbers nothing."""
    place = rows[field.name]
    if values.shape != place.shape:
        raise SchemaError(
            f"{path}: {field.name}: expected shape {list(field.shape)} for each step, received {list(values.shape[1:])}"
        )
    wanted = np.dtype(field.dtype)
    whole = values.dtype.kind in "iu" and wanted.kind in "iub"
    if not whole and not np.can_cast(values.dtype, wanted, "same_kind"):
        raise SchemaError(f"{path}: {field.name}: expected {wanted}, received {values.dtype}")
    if whole and values.size:
        least, most = (0, 1) if wanted.kind == "b" else (np.iinfo(wanted).min, np.iinfo(wanted).max)
        if not least <= int(values.min()) <= int(values.max()) <= most:
            raise SchemaError(f"{path}: {field.name}: {values.min()} … {values.max()} do not fit {wanted}")
    place[...] = values


# ---------------------------------------------------------------------- Arrow


def _batches(path: Path, size: int) -> Iterator[pa.RecordBatch]:
    try:
        if path.suffix in _PARQUET:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                for batch in file.iter_batches(batch_size=size):
                    yield batch.replace_schema_metadata(schema.metadata)
        else:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number)
                    for begin in range(0, batch.num_rows, size):
                        yield batch.slice(begin, size)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{path} cannot be read: {error}") from error


def _read_arrow(path: Path, schema: StepSchema, mapped: Mapped) -> Iterator[Chunk]:
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // schema.dtype.itemsize))
    first = next(_batches(path, 1), None)
    if first is None:
        return
    if _nested(first, mapped):
        size = CHUNK_EPISODES
    before: tuple[Any, ...] | None = None
    for batch in _batches(path, size):
        columns, starts = _steps(path, batch, mapped)
        count = len(columns["reward"]) if "reward" in columns else 0
        missing = [f.name for f in schema.fields if f.name not in columns and f.name != "policy_version"]
        known = starts is not None or "episode" in columns
        missing = [name for name in missing if not (name == "is_first" or (name == "is_last" and known))]
        if missing:
            raise SchemaError(
                f"{path}: expected columns {', '.join(missing)}, received {', '.join(columns)}; name yours by --map"
            )
        if starts is None:
            keys = [columns[name].to_numpy(zero_copy_only=False) for name in ("shard", "episode") if name in columns]
            starts = np.zeros(count, bool)
            for key in keys:
                starts[1:] |= key[1:] != key[:-1]
            if count and keys:
                starts[0] = before is not None and before != tuple(key[0] for key in keys)
                before = tuple(key[-1] for key in keys)
        rows = schema.zeros(count)
        for field in schema.fields:
            if field.name in columns:
                _put(path, rows, field, _values(path, field.name, columns[field.name], field.shape))
        if "is_first" in columns:
            starts |= rows["is_first"]
        else:
            rows["is_first"] = starts
            rows["is_first"][1:] |= rows["is_last"][:-1]
        yield Chunk(rows, starts)


def _nested(batch: pa.RecordBatch, mapped: Mapped) -> bool:
    """Whether a row is an episode."""
    for name, type_ in zip(batch.schema.names, batch.schema.types, strict=True):
        ours = _renamed(name, mapped)
        if ours == "reward" or (ours == "steps" and _is_list(type_) and pa.types.is_struct(type_.value_type)):
            return _is_list(type_)
    return False


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _steps(path: Path, batch: pa.RecordBatch, mapped: Mapped) -> tuple[dict[str, pa.Array], np.ndarray | None]:
    """Columns with a value for each step, by our names, and which steps begin a row of the file if a row is an episode."""
    flat: dict[str, pa.Array] = {}

    def add(name: str, column: pa.Array) -> None:
        if isinstance(column, pa.ExtensionArray):  # fixed_shape_tensor
            column = column.storage
        if pa.types.is_struct(column.type):
            for field, child in zip(column.type, column.flatten(), strict=True):
                add(f"{name}/{field.name}" if name else field.name, child)
        else:
            flat[_renamed(name, mapped)] = column

    nested = _nested(batch, mapped)
    lengths: np.ndarray | None = None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if nested and _renamed(name, mapped) == "steps":
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            add("", column.flatten())
        else:
            add(name, column)
    if not nested:
        return flat, None
    if lengths is None:
        lengths = pc.list_value_length(flat["reward"]).to_numpy(zero_copy_only=False)
        lists = {name: column for name, column in flat.items() if _is_list(column.type)}
        for name, column in lists.items():
            theirs = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            if (theirs != lengths).any():
                row = int(np.flatnonzero(theirs != lengths)[0])
                raise SchemaError(f"{path}: an episode of {lengths[row]} rewards has {theirs[row]} of {name}")
        flat = {name: column.flatten() for name, column in lists.items()}
    starts = np.zeros(int(lengths.sum()), bool)
    starts[np.cumsum(lengths)[:-1][lengths[1:] > 0]] = True
    starts[:1] = True
    if "is_last" not in flat:
        ends = np.zeros(len(starts), bool)
        ends[np.cumsum(lengths)[lengths > 0] - 1] = True
        flat["is_last"] = pa.array(ends)
    return flat, starts


def _values(path: Path, name: str, column: pa.Array, shape: tuple[int, ...]) -> np.ndarray:
    """A column as (n, *shape), lists in lists taken apart."""
    count, sizes = len(column), []
    while _is_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise SchemaError(
                f"{path}: {name}: expected {list(shape)} values for each step, received lists of {lengths}"
            )
        sizes += lengths
        column = column.flatten()
    if column.null_count:
        raise SchemaError(f"{path}: {name}: expected a value in every row, received {column.null_count} nulls")
    try:
        flat = column.to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{path}: {name}: expected numbers, received {column.type}") from error
    if flat.dtype.kind not in "fiub":
        raise SchemaError(f"{path}: {name}: expected numbers, received {column.type}")
    # A list in C order may stand for any shape of its size.
    fits = math.prod(sizes) == math.prod(shape)
    found: np.ndarray = flat.reshape((count, *(shape if fits else sizes)))
    return found


def _field(name: str, column: pa.Array) -> Field:
    sizes: list[int] = []
    while _is_list(column.type):
        sizes.append(len(column[0]))
        column = column[0].values if len(sizes) == 1 else column.flatten()
    return Field(name, str(np.dtype(column.type.to_pandas_dtype())), tuple(sizes))


# --------------------------------------------------------------------- Minari


def _open_hdf5(path: Path) -> Any:
    try:
        import h5py  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        raise RuntimeError(f"reading {path} needs h5py: pip install 'millrace[minari]'") from None
    return h5py.File(path, "r")


def _episodes(file: Any) -> list[Any]:
    names = [name for name in file if name.startswith("episode_")]
    return [file[name] for name in sorted(names, key=lambda name: int(name.removeprefix("episode_")))]


def _datasets(path: Path, episode: Any, mapped: Mapped) -> dict[str, Any]:
    """An episode's arrays by our names; those in groups (Dict spaces) by their path."""
    found: dict[str, Any] = {}

    def add(name: str, node: Any) -> None:
        if hasattr(node, "shape"):
            found[_renamed(name, {**mapped, **_MINARI})] = node
        else:
            for key in node:
                add(f"{name}/{key}", node[key])

    for name in episode:
        if name in (*_MINARI, "terminations", "truncations", *mapped):
            add(name, episode[name])
    needed = ("action", "reward", "terminations", "truncations")
    missing = [name for name in needed if name not in found]
    if missing or not any(name.split("/")[0] == OBSERVATION for name in found):
        raise SchemaError(
            f"{path}{episode.name}: expected {', '.join((OBSERVATION, *needed))}, received {list(episode)}"
        )
    return found


def _minari_fields(path: Path, mapped: Mapped) -> dict[str, Field]:
    with _open_hdf5(path) as file:
        episodes = _episodes(file)
        if not episodes:
            raise SchemaError(f"{path} holds no episode_<n>")
        arrays = _datasets(path, episodes[0], mapped)
        return {n: Field(n, str(a.dtype), tuple(a.shape[1:])) for n, a in arrays.items() if _wanted(n)}


def _read_minari(path: Path, schema: StepSchema, mapped: Mapped) -> Iterator[Chunk]:
    size = max(1, min(CHUNK_ROWS, CHUNK_BYTES // schema.dtype.itemsize))
    fields = [f for f in schema.fields if f.name != "policy_version" and f.name not in _FLAGS]
    with _open_hdf5(path) as file:
        for episode in _episodes(file):
            arrays = _datasets(path, episode, mapped)
            count = len(arrays["reward"])
            for field in fields:
                if field.name not in arrays:
                    raise SchemaError(f"{path}{episode.name}: expected {field.name}, received {', '.join(arrays)}")
                expected = count + (field in schema.observations)
                if len(arrays[field.name]) != expected:
                    raise SchemaError(
                        f"{path}{episode.name}: expected {expected} of {field.name} with {count} rewards, "
                        f"received {len(arrays[field.name])}"
                    )
            terminal = bool(count and arrays["terminations"][count - 1])
            for begin in range(0, count + 1, size):
                end = min(begin + size, count + 1)
                rows = schema.zeros(end - begin)
                for field in fields:
                    values = arrays[field.name][begin : min(end, len(arrays[field.name]))]
                    _put(path, rows[: len(values)], field, values)
                rows["is_first"][0] = begin == 0
                if end == count + 1:
                    rows["is_last"][-1], rows["is_terminal"][-1] = True, terminal
                yield Chunk(rows, rows["is_first"].copy())
