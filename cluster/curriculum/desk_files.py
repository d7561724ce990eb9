"""Where the desk's record lies: in each checkpoint whole, and what came since in the journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoints, load_tensors, save_tensors
from cluster.curriculum.desk import Desk
from cluster.curriculum.journal import Journal
from cluster.files import read_json, write_json

DESK, TRACKER = "desk.json", "tracker.safetensors"
JOURNAL = "desk"  # folder within that of the run


def load_desk(desk: Desk, checkpoint: Path | None) -> None:
    """Go on with what a checkpoint holds; None, or one without a record, leaves the desk as it is.

    Raises:
        ValueError: it is of other tasks.
    """
    if checkpoint is not None and (checkpoint / DESK).exists():
        desk.load_state(read_json(checkpoint / DESK), load_tensors(checkpoint / TRACKER)[0])


def save_desk(desk: Desk, checkpoint: Path) -> None:
    """Write the desk's part of a checkpoint into its folder, which is not whole yet."""
    with desk.lock:
        end = None if desk.journal is None else desk.journal.rotate()
        about, arrays = desk.state()
    write_json(checkpoint / DESK, {**about, "journal": end})
    save_tensors(checkpoint / TRACKER, arrays)


def begin_journal(desk: Desk, run: Path, checkpoint: Path | None, *, tell: Callable[[str], None]) -> None:
    """Journal what the desk is told from now on in the run's folder; its state is that of a checkpoint, or empty.

    tell: as `Journal`'s.
    """
    desk.journal = Journal(run / JOURNAL, tell=tell)
    desk.journal.begin(checkpoint)


def recover_desk(desk: Desk, run: Path, *, tell: Callable[[str], None]) -> int:
    """After the head died: load everything that was acknowledged, and journal on. Returns the outcomes that the journal held.

    Raises:
        FileNotFoundError: the head had not begun a journal.
    """
    journal = Journal(run / JOURNAL, tell=tell)
    whole = [found.path for found in Checkpoints(run / "checkpoints").all()]
    checkpoint, entries = journal.recover([(path, end) for path in whole if (end := _end(path)) is not None])
    load_desk(desk, checkpoint)
    count = desk.replay(entries)
    desk.journal = journal
    return count


def checkpoint_is_whole(desk: Desk, checkpoint: Path) -> None:
    """Let go of what the journal holds from before a checkpoint that `save_desk` wrote into."""
    if desk.journal is not None and (end := _end(checkpoint)) is not None:
        desk.journal.saved(checkpoint, end)


def _end(checkpoint: Path) -> dict[str, Any] | None:
    """Where the record in a checkpoint ends in the journal; None where it has none."""
    path = checkpoint / DESK
    found: dict[str, Any] | None = read_json(path).get("journal") if path.exists() else None
    return found
