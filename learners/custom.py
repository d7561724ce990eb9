"""Algorithms of users: a learner and a policy, imported by the names that `algorithm.name custom` gives; custom.md is the guide.

The two classes are all that a run needs of an algorithm: what `learners.loop.LearnerLoop` asks of the one, and
`learners.policy.Policy` of the other. No torch is imported here, so an actor has it only where the policy's module imports it.
"""

from __future__ import annotations

import inspect
from typing import Any

from configs.algorithms import CustomSettings
from learners.classes import ModuleError, load_class
from replay.schema import StepSchema

LEARNER_METHODS = ("stage", "update", "state", "load_state", "metrics", "check_finite", "policy_bytes")
POLICY_METHODS = ("load", "act")


def load_learner_class(settings: CustomSettings) -> type[Any]:
    """The class of `algorithm.learner`.

    Raises:
        ModuleError: it cannot be imported, or lacks a method.
    """
    return _load("algorithm.learner", settings.learner, LEARNER_METHODS)


def load_policy_class(settings: CustomSettings) -> type[Any]:
    """The class of `algorithm.policy`; raises ModuleError as `load_learner_class`."""
    return _load("algorithm.policy", settings.policy, POLICY_METHODS)


def make_learner(schema: StepSchema, settings: CustomSettings, **arguments: Any) -> Any:
    """The learner, a `learners.loop.Algorithm`, constructed as `Class(schema, settings, **arguments)`.

    `arguments` are `batch_size`, `seed` and those of `learners.updates.Options`, as for the algorithms that come with Millrace.

    Raises:
        ModuleError: it is no such class, or does not take these arguments, or its instances lack `updates`.
    """
    made = _construct("algorithm.learner", settings.learner, load_learner_class(settings), schema, settings, arguments)
    _check_number(f"algorithm.learner {settings.learner!r}", made, "updates", least=0)
    return made


def make_policy(schema: StepSchema, settings: CustomSettings, *, stack: int) -> Any:
    """The policy, a `learners.policy.Policy`, constructed as `Class(schema, settings, stack=stack)`.

    Raises:
        ModuleError: it is no such class, or does not take these arguments, or its instances lack `chunk` or `state_size`.
    """
    cls = load_policy_class(settings)
    made = _construct("algorithm.policy", settings.policy, cls, schema, settings, {"stack": stack})
    what = f"algorithm.policy {settings.policy!r}"
    _check_number(what, made, "chunk", least=1)
    _check_number(what, made, "state_size", least=0)
    return made


def _load(what: str, path: str | None, methods: tuple[str, ...]) -> type[Any]:
    if path is None:
        raise ModuleError(f"{what}: expected package.module:Class, got nothing")
    return load_class(path, what, methods=methods)


def _construct(
    what: str,
    path: str | None,
    cls: type[Any],
    schema: StepSchema,
    settings: CustomSettings,
    arguments: dict[str, Any],
) -> Any:
    try:
        signature = inspect.signature(cls)
    except ValueError:  # of a class written in C: calling it will tell
        return cls(schema, settings, **arguments)
    try:
        signature.bind(schema, settings, **arguments)
    except TypeError as error:
        names = ", ".join(f"{name}=" for name in arguments)
        raise ModuleError(
            f"{what} {path!r}: expected a class that is called as Class(schema, settings, {names}), got one with the signature "
            f"{signature} ({error}); let it take **_ for arguments that it has no use for"
        ) from error
    return cls(schema, settings, **arguments)


def _check_number(what: str, made: Any, name: str, *, least: int) -> None:
    value = getattr(made, name, None)
    if not isinstance(value, int) or value < least:
        found = f"{value!r}" if hasattr(made, name) else "none"
        raise ModuleError(f"{what}: expected instances with a whole number {name}, at least {least}, got {found}")
