"""Classes and functions of users, imported by name; no torch here, for actors need it only where a user's class does."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class ModuleError(ValueError):
    """A class or function of a user cannot be imported, or is not what it must be."""


def load_class(path: str, what: str, *, base: type | None = None, methods: Sequence[str] = ()) -> type[Any]:
    """The class that `path`, "package.module:Class", names; the current folder is looked in too.

    Args:
        path: where it is.
        what: the setting that named it, for messages.
        base: a class it must be derived from.
        methods: attributes it must have.

    Raises:
        ModuleError: there is no such class, or it is another kind of class; the message says which, and what to do.
    """
    module, attribute = _module(path, what, "Class")
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        classes = [n for n in dir(module) if isinstance(getattr(module, n), type)]
        near = difflib.get_close_matches(attribute, classes, n=3)
        held = "has no class" if found is None else f"holds {type(found).__name__}, expected a class, in"
        raise ModuleError(
            f"{what} {path!r}: the module {module.__name__!r} ({getattr(module, '__file__', 'built in')}) {held} {attribute!r}"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )
    if base is not None and not issubclass(found, base):
        bases = ", ".join(f"{parent.__module__}.{parent.__qualname__}" for parent in found.__bases__)
        raise ModuleError(
            f"{what} {path!r}: expected a class derived from {base.__module__}.{base.__qualname__}, got one derived from {bases}"
        )
    missing = [method for method in methods if not hasattr(found, method)]
    if missing:
        raise ModuleError(
            f"{what} {path!r}: expected a class with {', '.join(methods)}; {', '.join(missing)} is missing"
        )
    return found


def load_function(path: str, what: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """The function that `path`, "package.module:function", names; the current folder is looked in too.

    Args:
        path: where it is.
        what: the setting that named it, for messages.
        arguments: what it will be called with, by position.

    Raises:
        ModuleError: there is no such function, or it cannot be called with as many arguments.
    """
    module, attribute = _module(path, what, "function")
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        held = "has nothing named" if found is None else f"holds {type(found).__name__}, expected a function, in"
        raise ModuleError(f"{what} {path!r}: the module {module.__name__!r} {held} {attribute!r}")
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise ModuleError(f"{what} {path!r}: expected a function of ({', '.join(arguments)}): {error}") from error
    except ValueError:  # of a function written in C: calling it will tell
        pass
    return found


def _module(path: str, what: str, kind: str) -> tuple[ModuleType, str]:
    """The module of `path`, "package.module:name", imported, and the name."""
    name, colon, attribute = path.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in name.split(".")):
        raise ModuleError(f"{what} {path!r}: expected package.module:{kind}")
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(name)
    except Exception as error:  # importing runs the user's code: anything may come
        raise ModuleError(
            f"{what} {path!r}: importing the module {name!r} raised {type(error).__name__}: {error}; install it, or start "
            f"from the folder that holds it (now {folder})"
        ) from error
    return module, attribute
