"""A run's settings from a YAML file and command-line flags, and back to YAML.

Both are laid over each other and checked once, so a mistake reads the same in a file, as a flag and in a combination of
the two: the setting's dotted path, what is allowed, what was given, the nearest name, and where it was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.fields import Setting, group, nearest, nearest_path, row_model, settings_help, tags, walk
from configs.llm import LlmConfig
from configs.schema import RunConfig
from configs.sources import ConfigError, Dumper, Sources, Words, got, scalar

__all__ = ["ConfigError", "dump_config", "find_config", "load", "load_config", "load_run", "nearest", "settings_help"]

PACKAGED = Path(__file__).parent
KINDS = ("control", "llm")

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path | None, flags: Sequence[str] = ()) -> RunConfig:
    """The settings in the YAML file `path` (None: the defaults), overridden by `flags` (`["--actors.count", "4", …]`).

    `path` may be short: `pendulum_sac` or `configs/pendulum_sac.yaml` find the packaged file from any folder.
    Raises ConfigError, whose message lists every problem found.
    """
    return load(RunConfig, path, flags)


def load_run(path: str | Path | None, flags: Sequence[str] = ()) -> RunConfig | LlmConfig:
    """As `load_config`, for a run of whatever kind: the setting `kind` says which settings there are."""
    sources = _sources(path, flags)
    kind = str(sources.values.get("kind", "control"))
    if kind == "llm":
        return _checked(LlmConfig, sources)
    if kind != "control":  # which settings there may be hangs on it, so the rest is not judged
        sources.problem("kind", _rejected(f"one of {', '.join(KINDS)}", sources.values["kind"], KINDS))
        raise ConfigError("\n".join(sources.problems))
    return _checked(RunConfig, sources)


def load(model: type[Model], path: str | Path | None, flags: Sequence[str] = ()) -> Model:
    """`load_config` for any tree of settings."""
    return _checked(model, _sources(path, flags))


def _sources(path: str | Path | None, flags: Sequence[str]) -> Sources:
    sources = Sources()
    if path is not None:
        sources.read_file(find_config(path))
    sources.read_flags(flags)
    return sources


def _checked(model: type[Model], sources: Sources) -> Model:
    config = _Check(model, sources).config()
    if config is None or sources.problems:
        raise ConfigError("\n".join(dict.fromkeys(sources.problems)))
    return config


def dump_config(config: BaseModel) -> str:
    """`config` as YAML text that `load` reads back to an equal config."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def find_config(path: str | Path) -> Path:
    """The YAML file meant by `path`: that file, or the packaged one of this name; `.yaml` may be left out.

    Raises ConfigError with the names of the packaged files.
    """
    path = Path(path)
    places = [path.parent] if path.parent not in (Path("."), Path("configs")) else [path.parent, PACKAGED]
    for place in places:
        for name in (path.name, path.name + ".yaml"):
            if (place / name).is_file():
                return place / name
    packaged = sorted(p.stem for p in PACKAGED.glob("*.yaml"))
    close = nearest(path.stem, packaged)
    hint = f"did you mean {close}? " if close else ""
    raise ConfigError(f"{path}: no such config file; {hint}Millrace comes with {', '.join(packaged)}")


class _WrongError(ValueError):
    """What is wrong with one value, without its path and origin."""


class _Check(Generic[Model]):
    """Turns sources into a config, or into problems noted in them."""

    def __init__(self, model: type[Model], sources: Sources) -> None:
        self.model = model
        self.sources = sources
        self.settings = {s.path: s for s in walk(model, sources.values)}
        self.in_rows: dict[str, Setting] = {}  # those of each mapping in a list of them, by path

    def config(self) -> Model | None:
        """The config, or None where pydantic refuses; the problems are in the sources."""
        values = self._group(self.model, self.sources.values, "")
        try:
            return self.model.model_validate(values)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self._explain(item)
            return None

    def _group(self, model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """The values of one group as pydantic takes them, less those already reported."""
        clean: dict[str, Any] = {}
        for name, value in values.items():
            path, info = prefix + name, model.model_fields.get(name)
            try:
                if info is None:
                    self._unknown(path, value, model)
                elif (inner := group(info, value)) is None:
                    setting = self.settings.get(path) or self.in_rows[path]
                    row = row_model(setting)
                    clean[name] = _convert(setting, value) if row is None else self._rows(row, value, path)
                elif isinstance(value, dict):
                    clean[name] = self._group(inner, self._tagged(info, inner, value, path), path + ".")
                else:
                    names = ", ".join(f"{path}.{n}" for n in inner.model_fields)
                    raise _WrongError(f"expected a group of settings ({names}), got {got(value)}")
            except _WrongError as error:
                self.sources.problem(path, str(error))
        return clean

    def _rows(self, row: type[BaseModel], value: object, path: str) -> object:
        """The values of a list of mappings, each judged like a group of settings."""
        if isinstance(value, Words) and value:
            raise _WrongError(f"is a list of mappings, which flags cannot give; write it in a file, got {got(value)}")
        if not isinstance(value, list):
            return value
        clean: list[object] = []
        for number, item in enumerate(value):
            prefix = f"{path}.{number}."
            self.in_rows |= {setting.path: setting for setting in walk(row, prefix=prefix)}
            if not isinstance(item, dict):
                keys = ", ".join(row.model_fields)
                self.sources.problem(f"{path}.{number}", f"expected a mapping with keys among {keys}, got {got(item)}")
            clean.append(self._group(row, item, prefix) if isinstance(item, dict) else {})
        return clean

    def _tagged(self, info: FieldInfo, inner: type[BaseModel], value: dict[str, Any], path: str) -> dict[str, Any]:
        """The values of a group that one of several models describes, with the name of the model that does."""
        if info.discriminator is None:
            return value
        tag, choices = str(info.discriminator), tags(info)
        if tag in value and str(value[tag]) not in choices:
            # What else the group may hold depends on this choice, so the rest is not judged.
            self.sources.problem(f"{path}.{tag}", _rejected(f"one of {', '.join(choices)}", value[tag], choices))
            value = {}
        return {tag: Setting(tag, inner.model_fields[tag]).choices[0]} | value

    def _unknown(self, path: str, value: object, model: type[BaseModel]) -> None:
        """Note a name that is no setting: the file's key, or each flag below it."""
        origins = self.sources.origins
        below = [p for p in origins if p.startswith(path + ".") and origins[p].startswith("flag ")]
        where = path.rpartition(".")[0] or "the top level"
        if (elsewhere := self._elsewhere(path)) is not None:
            for given in below or [path]:
                self.sources.problem(given, elsewhere)
            return
        for wrong in below or [path]:
            if isinstance(value, dict) and not below:
                close = nearest(path, {s.rpartition(".")[0] for s in self.settings} - {""})
            else:
                within = [p for p in self.in_rows if p.startswith(where + ".")]
                close = nearest_path(wrong, within or self.settings)
            hint = f"did you mean {close}? " if close else ""
            self.sources.problem(wrong, f"no such setting; {hint}{where} has {', '.join(model.model_fields)}")

    def _elsewhere(self, path: str) -> str | None:
        """What to say of a setting that the group has under another of its names; None of one that it never has."""
        name, _, below = path.partition(".")
        info = self.model.model_fields.get(name)
        if info is None or info.discriminator is None or not below:
            return None
        tag = str(info.discriminator)
        having = []
        for choice in tags(info):
            there = [setting.path for setting in walk(self.model, {name: {tag: choice}})]
            if any(p == path or p.startswith(path + ".") for p in there):
                having.append(choice)
        return (
            f"is a setting of {name}.{tag} {', '.join(having)}; set {name}.{tag}, or leave it out" if having else None
        )

    def _explain(self, item: Any) -> None:
        """Note an error of pydantic's."""
        path, setting = "", None
        for part in item["loc"]:
            step = f"{path}.{part}" if path else str(part)
            if step in self.in_rows or any(p.startswith(step + ".") for p in self.in_rows):
                path, setting = step, self.in_rows.get(step, setting)
            elif setting is not None:
                path = step if setting.kind in (tuple, dict) else path
                break
            elif step in self.settings or any(p.startswith(step + ".") for p in self.settings):
                path, setting = step, self.settings.get(step)
            # Else the part is the name of a union's member, which is no part of the path.
        if setting is not None:
            expected = setting.allowed if path == setting.path else setting.element
            self.sources.problem(path, _rejected(expected, item["input"], setting.choices))
        elif not self.sources.problems:  # A combination is judged only where every setting is right by itself.
            for line in str(item.get("ctx", {}).get("error", item["msg"])).splitlines():
                self.sources.problems.append((f"{path}: " if path else "") + line + self._mentioned(line))

    def _mentioned(self, text: str) -> str:
        """Where the settings that `text` mentions were given."""
        paths = [p for p in self.settings if re.search(rf"(?<![\w.]){re.escape(p)}(?![\w]|\.\w)", text)]
        origins = "; ".join(f"{p}: {self.sources.origins.get(p, 'default')}" for p in paths)
        return f" ({origins})" if origins else ""


def _convert(setting: Setting, value: object) -> object:
    """`value` as pydantic takes it; raises `_WrongError` for what pydantic would let through, or not explain."""
    if isinstance(value, Words):
        value = _from_words(setting, value)
    if setting.optional and (value is None or value in ("None", "none", "null", "~", "")):
        return None
    if isinstance(value, bool) and setting.kind in (int, float):
        raise _WrongError(_rejected(setting.allowed, value))
    if setting.kind is int:
        return _whole(value)
    if setting.kind is tuple and isinstance(value, list) and not setting.holds_text:
        if any(isinstance(v, bool) for v in value):
            raise _WrongError(_rejected(setting.allowed, value))
        return [_whole(v) for v in value]
    if setting.kind is dict and isinstance(value, dict):
        return {k: _argument(setting, v) if isinstance(v, Words) else v for k, v in value.items()}
    return value


def _argument(setting: Setting, words: Words) -> object:
    """The words after the flag of one named argument, which takes one value or several."""
    return [scalar(word) for word in words] if setting.holds_lists else scalar(str(words))


def _from_words(setting: Setting, words: Words) -> object:
    """The words after a flag, as many as its setting takes."""
    if words.negated and setting.kind is not bool:
        raise _WrongError(f"is no switch, so it takes no --no-; expected {setting.allowed}")
    if setting.kind is bool and not words:
        return not words.negated
    if setting.kind is tuple:
        return list(words)
    if setting.kind is dict:
        pairs = [word.partition("=") for word in words if word != "none"]
        if not words or any(not equals for _, equals, _ in pairs):
            raise _WrongError(f"expected NAME=VALUE …, or none, got {got(words)}")
        if setting.holds_lists:
            return {name: [scalar(value) for value in values.split(",")] for name, _, values in pairs}
        return {name: scalar(value) for name, _, value in pairs}
    if len(words) != 1 or words.negated:
        number = f"{len(words)} words ({words})" if words else "no value"
        raise _WrongError(f"expected {setting.allowed}, got {number}")
    return words[0]


def _whole(value: object) -> object:
    """3e5 or "3e5" as the whole number it is; anything else as it came, for pydantic to judge."""
    try:
        number = float(value) if isinstance(value, str) and not value.strip().isdecimal() else None
    except ValueError:
        return value
    return int(number) if number is not None and number.is_integer() else value


def _rejected(expected: str, value: object, choices: Sequence[str] = ()) -> str:
    text = f"expected {expected}, got {got(value)}"
    if isinstance(value, str | Words) and (close := nearest(str(value), choices)):
        text += f"; did you mean {close}?"
    elif expected.startswith("text") and value is not None and not isinstance(value, str | dict | list):
        text += "; put it in quotes"
    return text
