"""Where settings come from: a YAML file and command-line flags, read into one nested mapping that knows each value's origin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """Settings that cannot run. The message is all a person needs: one line for each problem."""


class Words(list[str]):
    """The words after a flag, not yet turned into the setting's type; `negated` for `--no-<switch>`."""

    def __init__(self, words: Sequence[str] = (), *, negated: bool = False) -> None:
        super().__init__(words)
        self.negated = negated

    def __str__(self) -> str:
        return " ".join(self)


class Loader(yaml.SafeLoader):
    """yaml's safe loader, with YAML 1.2's floats: 3e-4 and 1e6 are numbers, as everywhere else."""


class Dumper(yaml.SafeDumper):
    """yaml's safe dumper, which quotes text that `Loader` would take for a number, and writes tuples as lists."""


_COLLECTIONS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
Dumper.add_representer(
    tuple, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def scalar(word: str) -> bool | int | float | str:
    """A word as YAML reads it: true, 3, 3e-4, or else text."""
    try:
        value = Loader(word).get_single_data()
    except (yaml.YAMLError, ValueError):
        return word
    return value if isinstance(value, bool | int | float) else word


@dataclass
class Sources:
    """A file's and flags' values by name, each value's origin by dotted path (`file:line`, or `flag --…`), and problems."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def problem(self, path: str, text: str) -> None:
        """Note what is wrong with the setting at `path`."""
        origin = self.origins.get(path) or self.origins.get(path.rpartition(".")[0])
        self.problems.append(f"{path}: {text}" + (f" ({origin})" if origin else ""))

    def read_file(self, path: Path) -> None:
        """Take the values of a YAML file; raises ConfigError where it is none."""
        try:
            loader = Loader(path.read_bytes())
            node = loader.get_single_node()
            values = {} if node is None else self._plain(loader, node, "", path, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        except RecursionError:
            raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected settings such as 'seed: 1', one on a line, got {got(values)}")
        self.values = values

    def _plain(self, loader: Loader, node: yaml.Node, prefix: str, file: Path, parents: tuple[yaml.Node, ...]) -> Any:
        """A YAML node as nested dicts and lists; notes the line of every key, and keys given twice."""
        if node in parents:
            raise ValueError(f"line {node.start_mark.line + 1} contains itself")
        parents = (*parents, node)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            raise ValueError(f"line {node.start_mark.line + 1}: unknown tag {node.tag}")
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, f"{prefix}{i}.", file, parents) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            self.origins[prefix + key] = f"{file}:{line}"
            if key in lines and key != "<<":
                self.problem(prefix + key, f"given twice, on lines {lines[key]} and {line}")
            lines[key] = line
        loader.flatten_mapping(node)  # Merge keys, `<<: *shared`.
        # A key is its text, not its value: `on` and `1` stay what the file says.
        return {
            str(key.value): self._plain(loader, value, f"{prefix}{key.value}.", file, parents)
            for key, value in node.value
        }

    def read_flags(self, flags: Sequence[str]) -> None:
        """Lay the words of each flag over the values, at the flag's dotted path; a flag given twice counts once, the last."""
        given: dict[str, Words] = {}
        words: Words | None = None
        for word in flags:
            if re.match(r"--[A-Za-z_]", word):
                name, equals, value = word[2:].partition("=")
                negated = name.startswith("no-")
                words = Words([value] if equals else [], negated=negated)
                given[name.removeprefix("no-").replace("-", "_")] = words
            elif words is None:
                self.problems.append(f"{word}: unexpected word; settings are given as --group.name value")
            else:
                words.append(word)
        for path in sorted(given, key=lambda path: path.count(".")):
            self._place(path, given[path])

    def _place(self, path: str, words: Words) -> None:
        *parents, name = path.split(".")
        at, prefix = self.values, ""
        self.origins[path] = f"flag --{'no-' if words.negated else ''}{path}"
        for parent in parents:
            prefix += parent
            inner = at.setdefault(parent, {})
            if isinstance(inner, Words):
                self.problem(path, f"contradicts --{prefix}, which gives the whole of it; use one of the two")
                return
            if isinstance(inner, list):
                self.problem(
                    path, f"is within a list that the file gives, and flags change lists as a whole: --{prefix}"
                )
                return
            if not isinstance(inner, dict):
                return  # The file has no mapping here, which is reported as such.
            at, prefix = inner, prefix + "."
        at[name] = words


def got(value: object) -> str:
    """A value that was given, as a message shows it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    text = repr(str(value) if isinstance(value, Words) else value) if isinstance(value, str | list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
