"""The token that a Ray cluster asks of whoever attaches to it."""

from __future__ import annotations

import os
from pathlib import Path


def token_place() -> str | None:
    """Where Ray finds a token; None where it finds none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the variable RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return str(path) if path.is_file() else None


def show_token() -> None:
    """Have Ray show the token that there is; to be called before Ray is imported.

    It does so unasked only where it has found a cluster by itself, not at an address.
    """
    if "RAY_AUTH_MODE" not in os.environ and token_place() is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
