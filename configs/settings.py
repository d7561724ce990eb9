"""How a setting and a group of settings are defined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Scalar = bool | int | float | str
Argument = Scalar | tuple[Scalar, ...]
CLASS = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # the form of package.module:Class


def setting(
    default: Any, help: str, *, unit: str, allowed: str | None = None, names: Sequence[str] = (), **bounds: Any
) -> Any:
    """A pydantic field with its help sentence and unit.

    `bounds` are pydantic's (`ge`, `le`, `pattern`, …); `allowed` says in words what a `pattern` lets through, and `names` are
    the words among it that a value may be a slip of.
    """
    extra: dict[str, Any] = {"unit": unit, "names": list(names)} if names else {"unit": unit}
    if allowed is not None:
        extra["allowed"] = allowed
    return Field(default, description=help, json_schema_extra=extra, **bounds)


class Settings(BaseModel):
    """Base of every group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @property
    def changed(self) -> list[str]:
        """Names of the settings that do not have their default."""
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
