"""What a policy unlearns once the curriculum turns to other tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Forgetting:
    """Follows the success of the same tasks from one evaluation to the next.

    The reference is the last evaluation made before the curriculum last changed, and the first one where it never has.
    """

    def __init__(self) -> None:
        self._reference: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._changes = 0  # of the curriculum, at the last evaluation

    def evaluated(self, success: Mapping[str, float], *, changes: int) -> tuple[float, str | None]:
        """Take in an evaluation. Returns the largest fall of a task's success since the reference, at least 0, and that task.

        Args:
            success: of each task of the fixed list, a share from 0 to 1.
            changes: how often the curriculum has changed so far.
        """
        if changes != self._changes or not self._reference:
            self._reference = self._last or dict(success)
        self._changes, self._last = changes, dict(success)
        falls = {name: before - success[name] for name, before in self._reference.items() if name in success}
        worst = max(falls, key=falls.__getitem__, default=None)
        return (0.0, None) if worst is None or falls[worst] <= 0.0 else (falls[worst], worst)

    def state(self) -> dict[str, Any]:
        """What `load_state` takes, as JSON."""
        return {"reference": dict(self._reference), "last": dict(self._last), "changes": self._changes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was called."""
        self._reference, self._last = dict(state["reference"]), dict(state["last"])
        self._changes = int(state["changes"])
