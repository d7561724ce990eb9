"""The settings as a flat list: what each is called, what it may hold, and how `--help` shows it."""

from __future__ import annotations

import difflib
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

WIDTH = 80


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted path, its pydantic field and, where its value chooses among models, their names."""

    path: str
    info: FieldInfo
    tags: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        """Whether `None` is a value of its own."""
        return type(None) in members(self.info.annotation)

    @property
    def type(self) -> Any:
        """The annotation without `None`: `int`, `Literal[…]`, `tuple[…]`, `dict[str, …]`, …"""
        return next(a for a in members(self.info.annotation) if a is not type(None))

    @property
    def kind(self) -> Any:
        """`bool`, `int`, `float`, `str`, `Literal`, `tuple` or `dict`."""
        return get_origin(self.type) or self.type

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a `Literal`, or those of a text that have names of their own."""
        if self.kind is Literal:
            return self.tags or tuple(str(v) for v in get_args(self.type))
        return self.tags or tuple(self._extra.get("names", ()))

    @property
    def unit(self) -> str:
        return str(self._extra.get("unit", ""))

    @property
    def expected(self) -> str:
        """What the setting may hold, in words: type and bounds, or choices."""
        metadata = self.info.metadata
        if self.kind is Literal:
            text = "one of " + ", ".join(self.choices)
        elif "allowed" in self._extra:
            text = str(self._extra["allowed"])
        elif self.kind is tuple:
            text = _describe(self.type, metadata)
        elif self.kind is dict:
            text = f"names with values, each {self.element}"
        else:
            text = _describe(self.kind, metadata)
        return text + (", or None" if self.optional else "")

    @property
    def allowed(self) -> str:
        """`expected`, with the unit of a quantity."""
        return f"{self.expected} [{self.unit}]" if self.kind in (int, float, tuple) else self.expected

    @property
    def element(self) -> str:
        """What one value of a list or of named arguments may hold, in words."""
        return _describe(self._inner)

    @property
    def holds_text(self) -> bool:
        """Whether the values of a list are text."""
        return _bare(self._inner) is str

    @property
    def holds_lists(self) -> bool:
        """Whether each named argument has several values."""
        return get_origin(_bare(self._inner)) is tuple

    @property
    def _inner(self) -> Any:
        return get_args(self.type)[0 if self.kind is tuple else 1]

    @property
    def _extra(self) -> Mapping[str, Any]:
        extra = self.info.json_schema_extra
        return extra if isinstance(extra, Mapping) else {}


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; anything else is its own only member."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def group(info: FieldInfo, value: object = None) -> type[BaseModel] | None:
    """The model behind a field that holds a group of settings, or None.

    Where several models share the field (a discriminated union), `value` decides by its discriminator, a mapping as it
    stands in a YAML file or a model; without one, and for an unknown one, the field's default does.
    """
    models = _models(info)
    if len(models) < 2:
        return models[0] if models else None
    if isinstance(value, BaseModel):
        return type(value)
    tag = str(info.discriminator)
    named = str(value.get(tag)) if isinstance(value, Mapping) else None
    default = type(info.get_default(call_default_factory=True))
    return next((m for m in models if named in Setting(tag, m.model_fields[tag]).choices), default)


def row_model(setting: Setting) -> type[BaseModel] | None:
    """The model behind each element of a setting that is a list of mappings, or None."""
    inner = get_args(setting.type)[0] if setting.kind is tuple else None
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def tags(info: FieldInfo) -> tuple[str, ...]:
    """The names that choose among the models of a discriminated union; empty for any other field."""
    tag = info.discriminator
    if tag is None:
        return ()
    return tuple(c for m in _models(info) for c in Setting("", m.model_fields[str(tag)]).choices)


def walk(
    model: type[BaseModel], values: object = None, prefix: str = "", of: FieldInfo | None = None
) -> Iterator[Setting]:
    """Every setting of `model`, group by group; `values` (a mapping or a model) decides among the members of a union.

    `of` is the field that holds `model`, in the recursion.
    """
    for name, info in model.model_fields.items():
        value = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        inner = group(info, value)
        if inner is None:
            yield Setting(prefix + name, info, tags(of) if of and of.discriminator == name else ())
        else:
            yield from walk(inner, value, f"{prefix}{name}.", info)


def _models(info: FieldInfo) -> list[type[BaseModel]]:
    return [a for a in members(info.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is most likely a slip of, or None."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest_path(path: str, paths: Iterable[str]) -> str | None:
    """The dotted path most likely meant by `path`: the same last name in another group, a slip, or a slip of the last name."""
    paths = list(paths)
    last = {p: p.rpartition(".")[2] for p in paths}
    name = path.rpartition(".")[2]
    same = [p for p in paths if last[p] == name]
    if same:
        return max(same, key=lambda p: difflib.SequenceMatcher(None, path, p).ratio())
    slip = nearest(path, paths)
    if slip is None and (word := nearest(name, last.values())) is not None:
        slip = next(p for p in paths if last[p] == word)
    return slip


def settings_help(config: BaseModel) -> str:
    """Every setting with its value in `config` as the default, its sentence, type, bounds and unit, in 80 columns."""
    text = textwrap.fill(
        "Settings, as flags and as keys of the YAML file: --actors.count 4 is count: 4 under actors:. A switch reads "
        "--learners.compile or --no-learners.compile. A list takes several words. --env.kwargs.NAME VALUE sets one "
        "argument, --env.kwargs NAME=VALUE … all of them, --env.kwargs none removes them. --tasks.product NAME=VALUE,VALUE … "
        "gives several values to each.",
        WIDTH,
    )
    room: object = None
    for setting in walk(type(config), config):
        owner: Any = config
        *groups, name = setting.path.split(".")
        for part in groups:
            owner = getattr(owner, part)
        if owner is not room:
            room = owner
            about = (type(owner).__doc__ or "").strip().splitlines()[0]
            text += "\n\n" + textwrap.fill(f"{'.'.join(groups) or 'run'}: {about}", WIDTH)
        text += f"\n  --{setting.path} (default: {show(getattr(owner, name))})\n"
        about = f"{setting.info.description} Takes {setting.expected} [{setting.unit}]."
        text += textwrap.fill(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return text + "\n"


def show(value: object) -> str:
    """A setting's value as it reads on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(show, value))
    if isinstance(value, BaseModel):
        return "{" + show(value.model_dump(exclude_defaults=True)) + "}"
    if isinstance(value, Mapping):
        texts = {k: ",".join(map(show, v)) if isinstance(v, tuple) else show(v) for k, v in value.items()}
        return " ".join(f"{k}={text}" for k, text in texts.items()) or "none"
    return str(value)


def _bare(kind: Any) -> Any:
    """A type without its bounds."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _describe(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """A type and its bounds in words."""
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
    if len(members(kind)) > 1:
        words = ("a number" if k in (int, float) else _describe(k) for k in members(kind))
        return " or ".join(dict.fromkeys(words))
    if get_origin(kind) is tuple:
        low, high = _bound("min_length", metadata), _bound("max_length", metadata)
        if high is None:
            return "a list of these"
        return f"a list of {low or 0} to {high} values, each {_describe(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys among {', '.join(kind.model_fields)}"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text" + (", not empty" if _bound("min_length", metadata) else "")
    text = "a whole number" if kind is int else "a number"
    low, high = _bound("ge", metadata), _bound("le", metadata)
    above, below = _bound("gt", metadata), _bound("lt", metadata)
    if low is not None and high is not None:
        return f"{text} from {_number(low)} to {_number(high)}"
    parts = [
        f"{word} {_number(bound)}"
        for word, bound in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return f"{text} {' and '.join(parts)}".rstrip()


def _bound(name: str, metadata: Iterable[Any]) -> Any:
    """The bound `name` (`ge`, `max_length`, …) among a field's constraints, or None."""
    for item in metadata:
        if isinstance(item, FieldInfo):
            return _bound(name, item.metadata)
        if getattr(item, name, None) is not None:
            return getattr(item, name)
    return None


def _number(value: float) -> str:
    """A bound as people write it: 1_000_000, 0.05, 1e+09."""
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}"
