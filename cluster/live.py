"""What a person sees while a run goes on: a live table on a terminal, one short line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs.schema import RunConfig

_RATE_WINDOW_S = 60.0
_NARROW = 76

Row = Mapping[str, float | None]


class LiveTable(ABC):
    """Shows the newest metrics row of a run, and lines of text above it; what is shown is up to the kind of run.

    With no console given it writes to stdout; `Console(stderr=True)` leaves stdout to a program's own output, as `--json`
    wants it. On a terminal the table is drawn anew at each `update`; elsewhere a plain line follows at most every
    `line_every_s` seconds. A silent one shows nothing, the lines of `say` included.

    A kind of run defines `UNIT`, `SCORE`, `title`, `pairs`, `cells` and `stop_at`.
    """

    UNIT: ClassVar[tuple[str, str]]  # metric that progress is counted in, and what one of it is called
    SCORE: ClassVar[tuple[str, str]]  # metrics of an evaluation: its figure, and when it was

    def __init__(
        self,
        *,
        stop_wall_s: float | None,
        console: Console | None = None,
        silent: bool = False,
        line_every_s: float = 5.0,
    ) -> None:
        self._stop_wall_s = stop_wall_s
        self._console = console or Console()
        self._silent = silent
        self._line_every_s = line_every_s
        self._last_line: float | None = None
        self._unprinted = False
        self._row: dict[str, float] = {}
        # (time_s, progress) of the last minute: the pace the time left is reckoned with, evaluations included.
        self._pace: deque[tuple[float, float]] = deque()
        self._evaluation: tuple[float, float] | None = None
        self._table: RichLive | None = None
        if self._console.is_terminal and not silent:
            self._table = RichLive(console=self._console, auto_refresh=False, get_renderable=self.render)

    # ------------------------------------------------------- of the kind of run

    @abstractmethod
    def title(self) -> str:
        """What stands above the table."""

    @abstractmethod
    def pairs(self) -> list[tuple[str, str]]:
        """What the table shows: names with their values."""

    @abstractmethod
    def cells(self) -> Sequence[str]:
        """The newest row in columns of fixed width."""

    @abstractmethod
    def stop_at(self) -> int | None:
        """The progress at which the run ends."""

    def score(self) -> tuple[str, str]:
        """Metrics of an evaluation: the figure that is shown, and when it was."""
        return self.SCORE

    # ------------------------------------------------------------------ showing

    def __enter__(self) -> Self:
        if self._table is not None:
            self._table.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._table is not None:
            self._table.stop()
        elif self._unprinted and not self._silent:
            self._print_line()

    def update(self, row: Row) -> None:
        """Take a metrics row; what it lacks keeps its last value."""
        self._row |= {key: value for key, value in row.items() if value is not None and math.isfinite(value)}
        figure, at = self.score()
        if (evaluation := _finite(row, figure)) is not None:
            step = _finite(row, at)
            self._evaluation = evaluation, self._row.get(self.UNIT[0], 0.0) if step is None else step
        now, steps = _finite(row, "time_s"), _finite(row, self.UNIT[0])
        if now is not None and steps is not None:
            if self._pace and now < self._pace[-1][0]:
                self._pace.clear()
            self._pace.append((now, steps))
            while len(self._pace) > 2 and self._pace[0][0] < now - _RATE_WINDOW_S:
                self._pace.popleft()
        self._unprinted = True
        if self._table is not None:
            self._table.refresh()
        elif not self._silent and (self._last_line is None or time.monotonic() - self._last_line >= self._line_every_s):
            self._print_line()

    def say(self, text: str) -> None:
        """Print a line above the table; `text` is shown as it is, without markup."""
        if not self._silent:
            self._console.print(Text(text), soft_wrap=self._table is None)

    def time_left_s(self) -> float | None:
        """Seconds until the run has made its way or its wall time is over, whichever is first; None while the pace is unknown."""
        goal, left = self.stop_at(), []
        if goal is not None and len(self._pace) > 1:
            (then, steps_then), (now, steps_now) = self._pace[0], self._pace[-1]
            if steps_now > steps_then and now > then:
                left.append((goal - steps_now) * (now - then) / (steps_now - steps_then))
            elif steps_now >= goal:
                left.append(0.0)
        if self._stop_wall_s is not None and "time_s" in self._row:
            left.append(self._stop_wall_s - self._row["time_s"])
        return max(0.0, min(left)) if left else None

    def line(self) -> str:
        """The newest row as one line of fixed columns."""
        return "  ".join(self.cells())

    def render(self) -> RenderableType:
        """The newest row as a table: two pairs of columns, or one where the terminal is narrow."""
        pairs = self.pairs()
        columns = 1 if self._console.width < _NARROW else 2
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="left", ratio=1, no_wrap=True)
        for start in range(0, len(pairs), columns):
            grid.add_row(*(cell for pair in pairs[start : start + columns] for cell in pair))
        return Panel(
            Group(grid, Text(""), self._progress()),
            title=Text(self.title()),
            title_align="left",
            box=box.ROUNDED,
            border_style="dim",
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        (metric, unit), target = self.UNIT, self.stop_at()
        steps = self._row.get(metric)
        done = f"{number(steps)} of {number(target)} {unit}" if target is not None else f"{number(steps)} {unit}"
        times = f"{duration(self._row.get('time_s'))} gone · {duration(self.time_left_s())} left"
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        done_share = self._share_done()
        bar = (
            ProgressBar(total=1.0, completed=done_share, complete_style="green") if done_share is not None else Text("")
        )
        row.add_row(done, bar, times)
        return row

    def _share_done(self) -> float | None:
        goal, shares = self.stop_at(), []
        if goal is not None:
            shares.append(self._row.get(self.UNIT[0], 0.0) / goal)
        if self._stop_wall_s is not None:
            shares.append(self._row.get("time_s", 0.0) / self._stop_wall_s)
        return min(1.0, max(shares)) if shares else None

    def evaluation_text(self, goal: float | None, digits: int) -> str:
        """The last evaluation, and what is wanted of it."""
        wanted = f" (goal {number(goal, digits)})" if goal is not None else ""
        if self._evaluation is None:
            return f"none yet{wanted}"
        mean, step = self._evaluation
        return f"{number(mean, digits)} at {compact(step)}{wanted}"

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._unprinted = False
        self._console.print(Text(self.line()), soft_wrap=True)


class Live(LiveTable):
    """The live table of a control run."""

    UNIT = ("env_steps", "steps")
    SCORE = ("eval/mean_return", "eval/step")

    def __init__(
        self, config: RunConfig, *, console: Console | None = None, silent: bool = False, line_every_s: float = 5.0
    ) -> None:
        self._config = config  # first, for the table may be drawn at once
        super().__init__(stop_wall_s=config.stop.wall_s, console=console, silent=silent, line_every_s=line_every_s)

    def title(self) -> str:
        config = self._config
        played = f"{config.env_name} · {config.curriculum.draw}" if config.has_tasks else config.env.id
        return f"{played} · {config.algorithm.name}" + (f" · {config.name}" if config.name else "")

    def score(self) -> tuple[str, str]:
        # The mean over tasks whose rewards have nothing in common tells little; the share of passed episodes does.
        return ("eval/mean_success", "eval/step") if self._config.has_tasks else self.SCORE

    def stop_at(self) -> int | None:
        return self._config.stop.steps

    def cells(self) -> Sequence[str]:
        get = self._row.get
        shown = number(self._evaluation[0], 2 if self._config.has_tasks else 1) if self._evaluation else "–"
        outcome = (
            (f"passed {number(self._passing(), 2):>5}", f"success {shown:>5}", f"waste {share(get('waste/share')):>4}")
            if self._config.has_tasks
            else (f"return {number(get('return_mean_100'), 1):>9}", f"eval {shown:>9}")
        )
        return (
            f"{duration(get('wall_s', get('time_s'))):>8}",
            f"steps {compact(get('env_steps')):>6}/{compact(self._config.stop.steps)}",
            f"{number(get('steps_per_s')):>7}/s",
            f"updates {compact(get('updates')):>6}",
            f"{number(get('updates_per_s')):>7}/s",
            *outcome,
            f"lag {number(get('policy_lag'), 1):>5}",
            f"fill {share(get('replay_fill')):>4}",
            f"left {duration(self.time_left_s()):>7}",
        )

    def pairs(self) -> list[tuple[str, str]]:
        get, config = self._row.get, self._config
        if config.has_tasks:
            passed = ("pass rate of what is drawn", number(self._passing(), 2))
            evaluated = ("last success", self.evaluation_text(config.stop.success, 2))
        else:
            passed = ("mean return, last 100", number(get("return_mean_100"), 1))
            evaluated = ("last evaluation", self.evaluation_text(config.stop.mean_return, 1))
        return [
            ("environment steps/s", number(get("steps_per_s"))),
            ("updates/s", number(get("updates_per_s"))),
            ("samples per insert", f"{number(get('samples_per_insert'), 1)} of {number(config.samples_per_insert, 1)}"),
            (
                "replay fill",
                f"{share(get('replay_fill'))} of {compact(get('replay_capacity', config.replay.capacity))}",
            ),
            passed,
            evaluated,
            ("policy lag", f"{number(get('policy_lag'), 1)} versions"),
            ("episodes", self._episodes_text()),
        ]

    def _passing(self) -> float | None:
        """Predicted pass rate of the tasks as they were drawn lately; None while nothing is known of them."""
        drawn = [
            (weight, rate)
            for name, weight in self._row.items()
            if name.endswith("/drawn")
            and (rate := self._row.get(f"{name.removesuffix('/drawn')}/pass_rate")) is not None
        ]
        whole = math.fsum(weight for weight, _ in drawn)
        return math.fsum(weight * rate for weight, rate in drawn) / whole if whole > 0 else None

    def _episodes_text(self) -> str:
        broken = self._row.get("broken_episodes", 0.0)
        text = number(self._row.get("episodes")) + (f" ({number(broken)} broken)" if broken else "")
        return f"{text}, {share(self._row.get('waste/share'))} of the steps wasted" if self._config.has_tasks else text


def _finite(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands apart; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def compact(value: float | None) -> str:
    """1234 as 1.2k: three significant figures at most, so that columns keep their width."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled == round(scaled) else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "–" if value is None else f"{100 * value:.0f}%"


def duration(seconds: float | None) -> str:
    """65 s as 1:05, 3700 s as 1:01:40."""
    if seconds is None:
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
