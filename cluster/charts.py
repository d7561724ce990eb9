"""Charts of a run, drawn by matplotlib: inline SVG for the report, PNG for other pages.

In the SVG every colour is a CSS variable, so the page decides on light and dark. The colours are Okabe and Ito's, told
apart by readers with any common colour vision.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.metrics import read_metrics

# CSS variable → its colour on a light page, in which matplotlib draws; the report's style sheet holds the dark ones.
COLOURS = {
    "ink": "#1c2024",
    "faint": "#6b7177",
    "grid": "#dfe3e6",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#aa4499",
}
_MOST_POINTS = 400
_FONT = ["DejaVu Sans"]
_STEPS = [1, 2, 2.5, 5, 10]

Array = np.ndarray


class Curves:
    """The metrics of a run as arrays, made ready for plotting.

    A run that was resumed from a checkpoint took some steps twice: the rows of the lost first time are left out. Clocks and
    counters that began again at zero with a new process are put on top of what they had reached.
    """

    def __init__(self, columns: dict[str, Array]) -> None:
        steps = columns.get("env_steps", columns.get("step", np.empty(0)))
        later = np.minimum.accumulate(np.where(np.isfinite(steps), steps, np.inf)[::-1])[::-1]
        keep = ~(steps > np.append(later[1:], np.inf))
        self._columns = {name: values[keep] for name, values in columns.items()} if len(steps) else columns
        self.rows = int(keep.sum()) if len(steps) else max((len(values) for values in columns.values()), default=0)

    @classmethod
    def read(cls, run_folder: Path) -> Curves:
        """The metrics of the run in `run_folder`."""
        table = read_metrics(run_folder)
        return cls({name: np.asarray(table[name].to_numpy(), np.float64) for name in table.column_names})

    def names(self) -> tuple[str, ...]:
        """The columns that there are."""
        return tuple(self._columns)

    def get(self, name: str) -> Array:
        """Values of a column, NaN where a row lacks it."""  # (rows,)
        return self._columns.get(name, np.full(self.rows, np.nan))

    def has(self, *names: str) -> bool:
        """Whether some row has a finite value for one of the names."""
        return any(bool(np.isfinite(self.get(name)).any()) for name in names)

    def last(self, name: str) -> float | None:
        """The newest finite value."""
        values = self.get(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def total(self, name: str) -> float | None:
        """What a column that only grows has reached in the end, restarts from zero bridged."""
        values = self.running(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None

    def running(self, name: str) -> Array:
        """A column that only grows, restarts from zero bridged; NaN where a row lacks it."""  # (rows,)
        values = self.get(name)
        present = np.isfinite(values)
        known = values[present]
        gained = np.diff(known, prepend=0.0)
        gained[gained < 0] = known[gained < 0]
        result = np.full(len(values), np.nan)
        result[present] = np.cumsum(gained)
        return result

    def evaluations(self, x: str) -> tuple[Array, Array, Array]:
        """Where along `x` evaluations ended, their mean returns and standard deviations; each (evaluations,)."""
        at, mean, spread = self.evaluated_at(x), self.get("eval/mean_return"), self.get("eval/std_return")
        there = np.isfinite(mean) & np.isfinite(at)
        return at[there], mean[there], np.nan_to_num(spread[there])

    def evaluated_at(self, x: str) -> Array:
        """Where along `x` a row stands; one with an evaluation, along environment steps, where the evaluated policy stood."""
        at = self.running(x)  # (rows,)
        if x == "env_steps":
            return np.where(np.isfinite(self.get("eval/step")), self.get("eval/step"), at)
        return at


@dataclass(frozen=True)
class Series:
    """One line of a chart: `spread` draws a band of y ± spread, `markers` a dot at each point, `background` a hairline."""

    label: str
    x: Array
    y: Array
    colour: str = "blue"
    spread: Array | None = None
    markers: bool = False
    thin: bool = True
    background: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: what is drawn, in which units; `top` cuts the y axis off there."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log: bool = False
    from_zero: bool = False
    top: float | None = None
    levels: dict[str, float] = field(default_factory=dict)


def time_axis(longest_s: float) -> tuple[float, str]:
    """Seconds in the unit that suits a time axis of this length, and the axis' label."""
    for limit, size, unit in ((300.0, 1.0, "s"), (3 * 3600.0, 60.0, "min"), (72 * 3600.0, 3600.0, "h")):
        if longest_s <= limit:
            return size, f"time since the first step ({unit})"
    return 86400.0, "time since the first step (days)"


def to_svg(chart: Chart) -> str:
    """The chart as an `<svg>` element without size, ids of groups or anything that is fetched from elsewhere."""
    import matplotlib

    figure = _figure((4.4, 2.7))
    # Text stays text; ids of clip paths are salted, for two charts on one page may not share them.
    settings = {"svg.fonttype": "none", "svg.hashsalt": chart.title + chart.x_label, "font.sans-serif": _FONT}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _draw(figure, chart)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", head)
    for name, colour in COLOURS.items():
        rest = rest.replace(colour, f"var(--{name})")
    return f"{head}>{rest}"


def learning_curve_png(run_folders: Sequence[Path], out: Path, title: str) -> Path:
    """Draw the evaluation returns of one run (mean ± standard deviation over its episodes) or of several seeds of it.

    Of several runs, each evaluation mean is interpolated onto common steps as far as the shortest run goes; the line is
    their mean, the band their standard deviation, and each run is a thin line.

    Raises:
        ValueError: a run has no evaluation.
    """
    curves = [Curves.read(folder) for folder in run_folders]
    for folder, curve in zip(run_folders, curves, strict=True):
        if not curve.has("eval/mean_return"):
            raise ValueError(f"{folder} has no evaluation to draw; was eval.every 0, or the run too short?")
    if len(curves) == 1:
        steps, mean, spread = curves[0].evaluations("env_steps")
        series = [Series("evaluation, mean ± std over episodes", steps, mean, "blue", spread, markers=True, thin=False)]
        if curves[0].has("return_mean_100"):
            training = Series(
                "training, last 100 episodes", curves[0].get("env_steps"), curves[0].get("return_mean_100"), "orange"
            )
            series.append(training)
    else:
        each = [curve.evaluations("env_steps") for curve in curves]
        start, end = max(steps[0] for steps, _, _ in each), min(steps[-1] for steps, _, _ in each)
        grid = np.linspace(start, end, 200)
        returns = np.stack([np.interp(grid, steps, mean) for steps, mean, _ in each])  # (runs, points)
        label = f"evaluation, mean ± std over {len(each)} seeds"
        series = [Series("", steps, mean, thin=False, background=True) for steps, mean, _ in each]
        series.append(Series(label, grid, returns.mean(axis=0), "blue", returns.std(axis=0), thin=False))
    chart = Chart(title, "environment steps", "return per episode", series)
    import matplotlib

    figure = _figure((7.0, 3.6))
    with matplotlib.rc_context({"font.sans-serif": _FONT}):
        _draw(figure, chart, heading=title)
        figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out


def _figure(size: tuple[float, float]) -> Any:
    # A Figure of its own and the Agg canvas: no window system, and none of pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(figure: Any, chart: Chart, heading: str | None = None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = figure.add_subplot()
    # Room for the name above a level that lies at the top.
    axes.margins(y=0.15 if chart.levels else 0.05)
    for series in chart.series:
        there = np.isfinite(series.x) & np.isfinite(series.y)
        x, y = series.x[there], series.y[there]
        colour = COLOURS[series.colour]
        if series.spread is not None:
            spread = series.spread[there]
            axes.fill_between(x, y - spread, y + spread, color=colour, alpha=0.2, linewidth=0)
        if series.thin:
            x, y = _thinned(x), _thinned(y)
        marker = {"marker": "o", "markersize": 3.5} if series.markers or len(x) == 1 else {}
        # A dollar would begin a formula, and what begins with an underscore is left out of the legend.
        label = series.label.replace("$", r"\$") or "_hidden"
        label = f"\u200b{label}" if series.label.startswith("_") else label
        stroke = {"linewidth": 0.8, "alpha": 0.5} if series.background else {"linewidth": 1.6}
        axes.plot(x, y, color=colour, label=label, solid_joinstyle="round", **stroke, **marker)
    for name, level in chart.levels.items():
        axes.axhline(level, color=COLOURS["faint"], linewidth=1, linestyle=(0, (4, 3)))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "left"}
        axes.annotate(name, (0, level), (4, 3), fontsize=8, color=COLOURS["faint"], **place)
    if chart.levels:  # a level between the highest point and the margin above it would leave its name no room
        axes.autoscale_view(scalex=False)
    if chart.log:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(tick_text))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(tick_text))
    if chart.from_zero:
        axes.set_ylim(bottom=0, top=chart.top)
    axes.set_xlim(left=0)
    axes.set_xlabel(chart.x_label, fontsize=9, color=COLOURS["faint"], loc="right")
    axes.set_title(chart.y_label, fontsize=9, color=COLOURS["faint"], loc="left", pad=8)
    axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=COLOURS["ink"], which="both")
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["faint"])
    if sum(bool(series.label) for series in chart.series) > 1 or heading is not None:
        columns = 1 if heading is None else 2
        box = {"frameon": False, "fontsize": 9, "labelcolor": COLOURS["ink"], "ncols": columns, "borderaxespad": 0}
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.02), handlelength=1.2, **box)
    if heading is not None:
        figure.suptitle(heading, fontsize=12, color=COLOURS["ink"], x=0.01, ha="left")


def _thinned(values: Array) -> Array:
    """Means of equal stretches, so that a run of days stays a small file."""
    if len(values) <= _MOST_POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MOST_POINTS)])


def tick_text(value: float, _: int | None = None) -> str:
    """What stands at a tick of an axis: 20000 as 20k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")
