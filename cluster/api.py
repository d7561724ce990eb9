"""The Python door: `run = train(config)`."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from configs.algorithms import MAX_SEQUENCES, CustomSettings, DqnSettings
from configs.llm import LlmConfig
from configs.schema import RunConfig

if TYPE_CHECKING:
    from cluster.checkpoint import Checkpoint
    from cluster.runs import RunFolder
    from replay.schema import StepSchema

Show = Callable[[dict[str, float] | None, str | None], None]


class Display(Protocol):
    """What a person sees while a run goes on."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, row: Mapping[str, float | None]) -> None:
        """Show a metrics row."""

    def say(self, text: str) -> None:
        """Show a line of text."""


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    path: Path
    summary: dict[str, Any]  # stop_reason, updates, time_s, …; steps, mean_return, …; or samples, pass_at_1, …

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"


def train(
    config: RunConfig | LlmConfig,
    *,
    resume: str | Path | None = None,
    console: Console | None = None,
    show: Show | None = None,
    command: Sequence[str] | None = None,
    started: float | None = None,
) -> Run:
    """Train as `millrace train` does.

    Args:
        config: every setting, of a control run or of one that trains a language model; of a resumed run as well, which may
            change them.
        resume: folder of the run to go on with, from its newest whole checkpoint.
        console: where the live table is shown; None is standard output.
        show: called with each metrics row, and with each line of text, in place of the live table.
        command: what is noted in run.json as the command.
        started: epoch seconds at which the command was started.

    Raises:
        ValueError: the environment is unknown or does not fit the algorithm; actors and learner would wait for each other;
            `prior.source` is no dataset that fits; the model or the tasks cannot be used; in mode sync, `learners.device` is
            not there; a resumed run changes what its networks are made of.
        FileExistsError, FileNotFoundError: the run's folder is there already; the one to resume is not, or has no checkpoint.
        RuntimeError: the run failed; the message says why.
    """
    from cluster.recorder import settings_changed
    from cluster.runs import RunFolder

    started = time.time() if started is None else started
    command = [sys.executable, *sys.argv] if command is None else command
    config, warnings, frames = _checked(config)
    folder: RunFolder[Any] = RunFolder.create(config, command) if resume is None else RunFolder.open(Path(resume))
    with folder.held(), _stop_signals() as stopping, _removed_unless_begun(folder.path), ExitStack() as begun:
        checkpoint = None
        if resume is not None:
            folder, checkpoint = _resumed(folder, config, command, frames=frames, begun=begun)
            warnings += settings_changed(checkpoint.path, folder.config)
        if show is not None:
            for line in warnings:
                show(None, line)
            return Run(folder.path, _run(folder, started, checkpoint, show, stopping))
        with _display(folder.config, console) as live:

            def display(row: dict[str, float] | None, line: str | None) -> None:
                if row is not None:
                    live.update(row)
                if line is not None:
                    live.say(line)

            for line in warnings:
                live.say(line)
            return Run(folder.path, _run(folder, started, checkpoint, display, stopping))


def _checked(config: RunConfig | LlmConfig) -> tuple[RunConfig | LlmConfig, list[str], bool]:
    """The settings, made whole by what they name, with lines to warn of, and whether the environment shows frames.

    Raises:
        ValueError: as `train` says.
    """
    if isinstance(config, LlmConfig):
        from cluster.llm.parts import check

        return config, check(config), False
    from cluster.parts import check_device, check_limits, env_schema, make_tasks
    from learners.observations import frame_field

    warnings = check_limits(config)
    schema = env_schema(config, make_tasks(config))
    check_algorithm(config, schema)
    if config.prior.source is not None:
        from cluster.prior import check_source  # it compiles kernels, which no other driver has use for

        config = check_source(config, schema)
    if config.mode == "sync":  # under Ray the learner may run where there is another device than here
        check_device(config)
    return config, warnings, frame_field(schema, "auto") is not None


def _display(config: RunConfig | LlmConfig, console: Console | None) -> Display:
    if isinstance(config, LlmConfig):
        from cluster.llm.live import LlmLive

        return LlmLive(config, console=console)
    from cluster.live import Live

    return Live(config, console=console)


def _resumed(
    folder: RunFolder[Any], config: RunConfig | LlmConfig, command: Sequence[str], *, frames: bool, begun: ExitStack
) -> tuple[RunFolder[Any], Checkpoint]:
    """The folder of an earlier run with its new settings, and the checkpoint to go on from.

    Where `begun` is left by an exception, the settings may be put back (`cluster.resume.settings_kept_with`).
    """
    from cluster.checkpoint import Checkpoints
    from cluster.recorder import replay_folder
    from cluster.resume import check_resumable, settings_kept_with
    from cluster.runs import RunFolder

    path = folder.path
    config = config.model_copy(update={"name": path.name, "root": str(path.parent)})
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoints.keep)
    checkpoints.clean()
    checkpoint = checkpoints.latest()
    if checkpoint is None:
        raise FileNotFoundError(f"{path} holds no whole checkpoint to go on from; start a new run")
    if config.checkpoints.replay and not replay_folder(checkpoint.path).is_dir():
        raise ValueError(
            f"{checkpoint.path} holds no {'groups' if config.kind == 'llm' else 'steps'}; resume with --no-checkpoints.replay, to begin with an empty replay"
        )
    check_resumable(folder.config, config, frames=frames)
    begun.enter_context(settings_kept_with(checkpoints, path / "config.yaml", config))
    folder = RunFolder(path, config)
    folder.resumed(command)
    return folder, checkpoint


def _run(
    folder: RunFolder[Any], started: float, checkpoint: Checkpoint | None, show: Show, stopping: threading.Event
) -> dict[str, Any]:
    wall_started = time.monotonic() - (time.time() - started)
    if folder.config.mode == "sync" and isinstance(folder.config, LlmConfig):
        from cluster.llm.sync import LlmSyncRun

        return LlmSyncRun(folder, wall_started=wall_started, resume=checkpoint, show=show).run(stopping)
    if folder.config.mode == "sync":
        from cluster.sync import SyncRun

        return SyncRun(folder, wall_started=wall_started, resume=checkpoint, show=show).run(stopping)
    from cluster.auth import show_token

    if folder.config.address or os.environ.get("RAY_ADDRESS"):
        show_token()
    from cluster.ray_launch import run_on_ray

    return run_on_ray(folder, wall_started=started, resume=checkpoint, show=show, stopping=stopping)


def check_algorithm(config: RunConfig, schema: StepSchema) -> None:
    """
    Raises:
        ValueError: the algorithm cannot act in the environment whose steps have this schema, or its networks would need
            what the environment lacks.
    """
    algorithm, env, choices = config.algorithm, config.env, schema.action.choices
    discrete = isinstance(algorithm, DqnSettings)
    custom = isinstance(algorithm, CustomSettings)
    if choices and not discrete and not custom:
        raise ValueError(
            f"{config.env_name} has {choices} discrete actions, and algorithm.name {algorithm.name} needs continuous ones; set "
            "algorithm.name to dqn, or to r2d2 where the task is partly observed"
        )
    if discrete and not choices:
        raise ValueError(
            f"{config.env_name} has continuous actions, and algorithm.name {algorithm.name} needs discrete ones; set "
            "algorithm.name to sac, or to flow"
        )
    length = algorithm.target.length if algorithm.target.kind in ("chunk", "decoupled") else 1
    # By logarithms: the number itself may have thousands of digits.
    if choices > 1 and not custom and length * math.log(choices) > math.log(MAX_SEQUENCES) + 1e-9:
        most = int(math.log(MAX_SEQUENCES) / math.log(choices) + 1e-9)
        raise ValueError(
            f"algorithm.target.length: a critic of {length} actions out of {choices} would list {choices}^{length} sequences, "
            f"and at most {MAX_SEQUENCES} are allowed; for {config.env_name} algorithm.target.length can be at most {most}"
        )
    if isinstance(algorithm, CustomSettings):
        from learners.custom import load_learner_class, make_policy

        load_learner_class(algorithm)
        make_policy(schema, algorithm, stack=env.stack)
    elif algorithm.head.is_own:
        from learners.heads import make_head

        make_head(algorithm.head, None)


@contextmanager
def _removed_unless_begun(path: Path) -> Iterator[None]:
    """A run that could not even start leaves no folder: its name is free for the next try."""
    try:
        yield
    except BaseException:
        if {file.name for file in path.iterdir()} <= {"config.yaml", "run.json", "token", "outside_token", ".lock"}:
            shutil.rmtree(path)
        raise


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGTERM and the first Ctrl-C set the event; the second Ctrl-C interrupts at once."""
    stopping = threading.Event()

    def stop(number: int, _frame: Any) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
