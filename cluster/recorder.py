"""What a run leaves in its folder while it goes on: metrics, events, checkpoints, and the summary and report at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.books import Books
from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.files import DiskFullError, read_json, write_atomically, write_json
from cluster.metrics import MetricsWriter
from cluster.runs import AnyConfig, RunFolder
from configs.llm import LlmConfig

POLICY = "policy.safetensors"
LEARNER = "learner.safetensors"
HEAD = "head.json"


def replay_folder(checkpoint: Path) -> Path:
    """Where a checkpoint keeps the replay's rows (`replay.snapshot`); absent where it holds none."""
    return checkpoint / "replay"


def settings_changed(checkpoint: Path, config: AnyConfig) -> list[str]:
    """A line for each setting of the replay that is another one than when the checkpoint was written."""
    from replay.restore import settings_differences

    saved = read_json(checkpoint / HEAD).get("replay")
    return [] if saved is None else settings_differences(saved, replay_settings(config))


def replay_settings(config: AnyConfig) -> dict[str, Any]:
    """What decides what the replay holds and at which pace it is read; as JSON."""
    if isinstance(config, LlmConfig):
        queue = {
            name: getattr(config.replay, name) for name in ("shards", "times_used", "max_policy_lag", "capacity_mb")
        }
        return {**queue, "max_waiting_groups": config.waiting_groups}
    settings = config.replay
    chosen = {name: getattr(settings, name) for name in ("shards", "capacity", "segment_steps", "min_size")}
    return {**chosen, "error_buffer": config.error_buffer, "samples_per_insert": config.samples_per_insert}


class Recorder:
    """Writes the folder of one run; a full disk costs what could not be written, and is told, but ends no training."""

    def __init__(
        self,
        folder: RunFolder[Any],
        head: Books,
        *,
        show: Callable[[dict[str, float] | None, str | None], None],
        resume: Checkpoint | None,
    ) -> None:
        """
        show: called with each metrics row, and with each line of text.
        resume: the checkpoint that the run goes on from.
        """
        self._folder = folder
        self._head = head
        self._show = show
        self._metrics = MetricsWriter(folder.path)
        self._checkpoints = Checkpoints(folder.checkpoints, keep=folder.config.checkpoints.keep)
        self._disk_full_told = False
        self._written: tuple[int, float | None, bytes] | None = None  # step, evaluation, policy of the last checkpoint
        if resume is not None:
            self._replaces(resume)

    def _replaces(self, checkpoint: Checkpoint) -> None:
        policy = (checkpoint.path / POLICY).read_bytes()
        self._written = (checkpoint.env_steps, checkpoint.eval_mean_return, policy)

    def waiting(self) -> dict[str, Any]:
        """What would be lost with this process, as JSON, for `go_on`."""
        return self._metrics.waiting()

    def go_on(self, waiting: Mapping[str, Any]) -> None:
        """Go on where a recorder that was killed has left off, in the middle of a checkpoint perhaps; nobody may write into it still."""
        self._metrics.restore(waiting)
        self._checkpoints.clean()
        for newest in self._checkpoints.all()[-1:]:
            self._replaces(newest)

    def row(self, row: dict[str, float]) -> None:
        """Keep and show one metrics row."""
        try:
            self._metrics.write(row)
            self._disk_full_told = False
        except DiskFullError as error:
            if not self._disk_full_told:
                self._disk_full_told = True
                self.event("warning", f"metrics are held back: {error}")
        self._show(row, None)

    def event(self, kind: str, text: str, *, shown: bool = True) -> None:
        """Keep, and show, one line about something that happened."""
        with suppress(OSError):  # where the disk is full the line is shown all the same
            self._folder.event(kind, text, time_s=self._head.counts.time_s)
        if shown:
            self._show(None, text)

    def checkpoint(
        self,
        *,
        save_learner: Callable[[Path], int],
        save_shards: Callable[[Path, Path | None], Mapping[str, Mapping[str, int]]],
        policy: bytes,
        evaluation: float | None = None,
        save_more: Callable[[Path], None] | None = None,
    ) -> bool:
        """Write a checkpoint of the learner, the shards, the acting policy and the head's counts.

        `save_learner` returns the updates made. `save_shards` has every shard write its rows into a folder, those left out
        that the second folder, of an earlier checkpoint, holds and links can be made to; it returns the shards' counters
        then, by the names of the shards. `evaluation` is the score of `policy`, where it was measured. `save_more` writes further files into the
        checkpoint's folder, after the shards. Returns whether the checkpoint is there; if not, for the disk is full, a line
        has said so.
        """
        head, replay = self._head, self._folder.config.checkpoints.replay
        began, step = time.monotonic(), head.step
        if self._written is not None and self._written[0] == step:
            # A checkpoint of the same step is replaced; a policy that was found better stays the one that it holds.
            _, before, better = self._written
            if before is not None and (evaluation is None or evaluation < before):
                evaluation, policy = before, better
        try:
            with self._checkpoints.write(
                env_steps=step, updates=head.counts.updates, eval_mean_return=evaluation
            ) as path:
                head.counts.updates = save_learner(path / LEARNER)
                write_atomically(path / POLICY, policy)
                if replay:
                    counters = save_shards(replay_folder(path), self._replay_before())
                    # Rows that came in since the last tick are in the files, so they are in the counts as well.
                    head.count_shards(counters)
                if save_more is not None:
                    save_more(path)
                write_json(path / HEAD, {**head.state(), "replay": replay_settings(self._folder.config)})
        except DiskFullError as error:
            self.event("warning", f"no checkpoint was written: {error}")
            return False
        finally:
            head.checkpointed(time.monotonic())
        self._written = (step, evaluation, policy)
        self.event("checkpoint", f"checkpoint at step {step} in {time.monotonic() - began:.1f} s", shown=False)
        return True

    def _replay_before(self) -> Path | None:
        """The rows that the newest checkpoint holds."""
        folders = [replay_folder(checkpoint.path) for checkpoint in self._checkpoints.all()]
        return folders[-1] if folders and folders[-1].is_dir() else None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary and the report."""
        from cluster.report import write_report

        self.close()
        try:
            self._folder.finished(summary)
            write_report(self._folder.path)
        except Exception as error:  # what was trained is worth more than a page about it
            self.event(
                "warning", f"summary or report were not written: {error}; `millrace report` makes the report again"
            )

    def close(self) -> None:
        """Write the metrics that wait; a second call does nothing."""
        try:
            self._metrics.close()
        except DiskFullError as error:
            self.event("warning", f"the last metrics are lost: {error}")
