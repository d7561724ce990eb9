"""What a person sees while a run goes on: a live table on a terminal, one short line every few seconds elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

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


class Live:
    """Shows the newest metrics row of a run, and lines of text above it.

    With no console given it writes to stdout; `Console(stderr=True)` leaves stdout to a program's own output, as `--json`
    wants it. On a terminal the table is drawn anew at each `update`; elsewhere a plain line follows at most every
    `line_every_s` seconds. A silent one shows nothing, the lines of `say` included.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        console: Console | None = None,
        silent: bool = False,
        line_every_s: float = 5.0,
    ) -> None:
        self._config = config
        self._console = console or Console()
        self._silent = silent
        self._line_every_s = line_every_s
        self._last_line: float | None = None
        self._unprinted = False
        self._row: dict[str, float] = {}
        # (time_s, env_steps) of the last minute: the pace the time left is reckoned with, evaluations included.
        self._pace: deque[tuple[float, float]] = deque()
        self._evaluation: tuple[float, float] | None = None
        self._table: RichLive | None = None
        if self._console.is_terminal and not silent:
            self._table = RichLive(console=self._console, auto_refresh=False, get_renderable=self.render)

    def __enter__(self) -> Live:
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
        if (evaluation := _finite(row, "eval/mean_return")) is not None:
            step = _finite(row, "eval/step")
            self._evaluation = evaluation, self._row.get("env_steps", 0.0) if step is None else step
        now, steps = _finite(row, "time_s"), _finite(row, "env_steps")
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
        """Seconds until `stop.steps` or `stop.wall_s`, whichever comes first; None while the pace is unknown."""
        stop, left = self._config.stop, []
        if stop.steps is not None and len(self._pace) > 1:
            (then, steps_then), (now, steps_now) = self._pace[0], self._pace[-1]
            if steps_now > steps_then and now > then:
                left.append((stop.steps - steps_now) * (now - then) / (steps_now - steps_then))
            elif steps_now >= stop.steps:
                left.append(0.0)
        if stop.wall_s is not None and "time_s" in self._row:
            left.append(stop.wall_s - self._row["time_s"])
        return max(0.0, min(left)) if left else None

    def line(self) -> str:
        """The newest row as one line of fixed columns."""
        get = self._row.get
        evaluation = f"{_number(self._evaluation[0], 1)}" if self._evaluation else "–"
        cells = (
            f"{_duration(get('wall_s', get('time_s'))):>8}",
            f"steps {_compact(get('env_steps')):>6}/{_compact(self._config.stop.steps)}",
            f"{_number(get('steps_per_s')):>7}/s",
            f"updates {_compact(get('updates')):>6}",
            f"{_number(get('updates_per_s')):>7}/s",
            f"return {_number(get('return_mean_100'), 1):>9}",
            f"eval {evaluation:>9}",
            f"lag {_number(get('policy_lag'), 1):>5}",
            f"fill {_share(get('replay_fill')):>4}",
            f"left {_duration(self.time_left_s()):>7}",
        )
        return "  ".join(cells)

    def render(self) -> RenderableType:
        """The newest row as a table: two pairs of columns, or one where the terminal is narrow."""
        get, config = self._row.get, self._config
        pairs = [
            ("environment steps/s", _number(get("steps_per_s"))),
            ("updates/s", _number(get("updates_per_s"))),
            (
                "samples per insert",
                f"{_number(get('samples_per_insert'), 1)} of {_number(config.samples_per_insert, 1)}",
            ),
            (
                "replay fill",
                f"{_share(get('replay_fill'))} of {_compact(get('replay_capacity', config.replay.capacity))}",
            ),
            ("mean return, last 100", _number(get("return_mean_100"), 1)),
            ("last evaluation", self._evaluation_text()),
            ("policy lag", f"{_number(get('policy_lag'), 1)} versions"),
            ("episodes", self._episodes_text()),
        ]
        columns = 1 if self._console.width < _NARROW else 2
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(justify="left", ratio=1, no_wrap=True)
        for start in range(0, len(pairs), columns):
            grid.add_row(*(cell for pair in pairs[start : start + columns] for cell in pair))
        title = f"{config.env.id} · {config.algorithm.name}" + (f" · {config.name}" if config.name else "")
        return Panel(
            Group(grid, Text(""), self._progress()),
            title=Text(title),
            title_align="left",
            box=box.ROUNDED,
            border_style="dim",
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        steps, target = self._row.get("env_steps"), self._config.stop.steps
        done = f"{_number(steps)} of {_number(target)} steps" if target is not None else f"{_number(steps)} steps"
        times = f"{_duration(self._row.get('time_s'))} gone · {_duration(self.time_left_s())} left"
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        share = self._share_done()
        bar = ProgressBar(total=1.0, completed=share, complete_style="green") if share is not None else Text("")
        row.add_row(done, bar, times)
        return row

    def _share_done(self) -> float | None:
        stop, shares = self._config.stop, []
        if stop.steps is not None:
            shares.append(self._row.get("env_steps", 0.0) / stop.steps)
        if stop.wall_s is not None:
            shares.append(self._row.get("time_s", 0.0) / stop.wall_s)
        return min(1.0, max(shares)) if shares else None

    def _evaluation_text(self) -> str:
        goal = self._config.stop.mean_return
        wanted = f" (goal {_number(goal, 1)})" if goal is not None else ""
        if self._evaluation is None:
            return f"none yet{wanted}"
        mean, step = self._evaluation
        return f"{_number(mean, 1)} at {_compact(step)}{wanted}"

    def _episodes_text(self) -> str:
        broken = self._row.get("broken_episodes", 0.0)
        return _number(self._row.get("episodes")) + (f" ({_number(broken)} broken)" if broken else "")

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._unprinted = False
        self._console.print(Text(self.line()), soft_wrap=True)


def _finite(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _compact(value: float | None) -> str:
    """1234 as 1.2k: three significant figures at most, so that columns keep their width."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.0f}{unit}" if scaled >= 100 or scaled == round(scaled) else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def _duration(seconds: float | None) -> str:
    """65 s as 1:05, 3700 s as 1:01:40."""
    if seconds is None:
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
