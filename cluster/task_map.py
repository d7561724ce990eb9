"""A map of tasks × time in a report: a row for each task, a cell for each stretch of a run, its colour a figure of the task.

It is HTML and SVG without ids or scripts: names stay readable at any width, and a cell tells its figure when pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import takewhile
from typing import Literal

import numpy as np

from cluster.charts import tick_text

MOST_ROWS = 64
_MOST_COLUMNS = 120
_MOST_CELLS = 4_000  # of one map: with more of them a browser is slow and the page large
_SHADES = 20  # steps between the two ends of a scale

# Pass rate from 0 to 1: ever lighter, so that the order is seen without seeing hues, and apart from both the white and the
# dark page. The points are evenly spaced.
_RAMP = ((0x5C, 0x10, 0x2E), (0xA8, 0x2A, 0x35), (0xDB, 0x66, 0x2E), (0xF2, 0xA9, 0x48), (0xFB, 0xE8, 0x9C))

Array = np.ndarray
Scale = Literal["rate", "share"]  # a rate from 0 to 1, or a share from 0 to the largest there is


@dataclass(frozen=True)
class TaskMap:
    """What is drawn."""

    title: str
    x_label: str
    labels: Sequence[str]  # (tasks,)
    edges: Array  # (cells + 1,), from 0: where along x each cell begins and ends
    values: Array  # (tasks, cells); NaN: nothing is known, the cell stays empty
    scale: Scale = "rate"
    changes: Sequence[float] = field(default_factory=tuple)  # where along x the curriculum changed


def binned(x: Array, values: Array, *, most: int = _MOST_COLUMNS) -> tuple[Array, Array] | None:
    """Means of `values` over stretches of `x`; None where there is no value, or no length to draw it along.

    The line from 0 to the largest `x` is cut into `most` equal parts. One that no row falls in is joined to the next, for a
    row tells of the stretch that led up to it.

    Args:
        x: (rows,), NaN where a row lacks it.
        values: (tasks, rows), NaN where a row lacks it.

    Returns:
        edges (cells + 1,) from 0, and means (tasks, cells), NaN where no row of a cell has a value; cells ≤ most.
    """
    there = np.isfinite(x) & (x >= 0)
    x, values = x[there], values[:, there]
    if not np.isfinite(values).any() or x.max() <= 0:
        return None
    end = float(x.max())
    # A row at the very beginning, before the first step, belongs to what comes next.
    part = np.ceil(np.maximum(x, x[x > 0].min()) * most / end).astype(int) - 1
    filled, cell = np.unique(part, return_inverse=True)
    known = np.isfinite(values)
    sums, counts = np.zeros((2, len(values), len(filled)))
    np.add.at(sums.T, cell, np.where(known, values, 0.0).T)
    np.add.at(counts.T, cell, known.T.astype(float))
    with np.errstate(invalid="ignore"):
        means = sums / np.where(counts > 0, counts, np.nan)
    return np.append(0.0, (filled + 1) * end / most), means


def columns_for(rows: int) -> int:
    """How many cells a row of a map with that many rows may have."""
    return max(1, min(_MOST_COLUMNS, _MOST_CELLS // max(1, rows)))


def short_labels(labels: Sequence[str]) -> tuple[str, list[str]]:
    """What all the labels begin with, up to a space or slash, and what is left of each: never nothing."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*labels, strict=False))
    alike = "".join(letters[0] for letters in same) if len(labels) > 1 else ""
    cut = max(alike.rfind(" "), alike.rfind("/")) + 1
    if any(len(label) == cut for label in labels):
        cut = 0
    return alike[: max(0, cut - 1)], [label[cut:] for label in labels]


def map_style() -> str:
    """Style rules of the maps; colours of cells are classes, for a page has thousands of them."""
    rate = "".join(f".rate{shade}{{fill:{_colour(shade / _SHADES)}}}" for shade in range(_SHADES + 1))
    # Even the smallest share differs from a cell without any: that one is hatched.
    # Even the smallest share differs from a cell without any: that one is hatched.
    mixed = (
        f"color-mix(in srgb,var(--blue) {5 + 95 * shade / _SHADES:.0f}%,var(--page))" for shade in range(_SHADES + 1)
    )
    share = "".join(f".share{shade}{{fill:{colour}}}" for shade, colour in enumerate(mixed))
    return _STYLE + rate + share


_STYLE = """
.map { display: grid; grid-template-columns: minmax(0, max-content) minmax(55%, 1fr); column-gap: .5rem; align-content: start; }
.map figcaption, .map .key-line { grid-column: 1 / -1; }
.map .names { min-width: 0; color: var(--faint); font-size: min(.8rem, calc(var(--row) - 1px)); }
.map .names span { display: block; height: var(--row); line-height: var(--row); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.map svg { background: repeating-linear-gradient(135deg, var(--grid) 0 1px, transparent 1px 6px); shape-rendering: crispEdges; }
.map rect:hover { stroke: var(--ink); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.map .change { stroke: var(--ink); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.map .halo { stroke: var(--page); stroke-width: 4px; vector-effect: non-scaling-stroke; }
.map .axis { grid-column: 2; position: relative; height: 1.3rem; font-size: .8rem; border-top: 1px solid var(--faint); }
.map .axis span { position: absolute; transform: translateX(-50%); } .map .axis .first { transform: none; }
.map .axis .last { transform: translateX(-100%); }
.map .key-line { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem 1.25rem; font-size: .8rem; color: var(--faint); }
.map .key-line > span { display: flex; align-items: center; gap: .4rem; }
.map .key-line svg { width: 6rem; height: .8rem; } .map .key-line .empty { width: 1.2rem; }
.map .key-line i { width: 1.5px; height: .9rem; background: var(--ink); }
"""


def map_figure(shown: TaskMap) -> str:
    """The map as a `<figure>` with its axis and legend."""
    rows = len(shown.labels)
    common, names = short_labels(shown.labels)
    height = 22 if rows <= 12 else 16 if rows <= 32 else 13
    top = 1.0 if shown.scale == "rate" else _largest(shown.values)
    cells = "".join(
        _row(shown, row, name, values, top) for row, (name, values) in enumerate(zip(names, shown.values, strict=True))
    )
    end = float(shown.edges[-1])
    lines = "".join(
        f'<g><title>{_text(shown.x_label, at)}: the curriculum changed</title><line class="halo" {place}/>'
        f'<line class="change" {place}/></g>'
        for at in shown.changes
        if 0 <= at <= end
        for place in (f'x1="{1000 * at / end:.1f}" x2="{1000 * at / end:.1f}" y1="0" y2="{rows}"',)
    )
    labels = "".join(
        f'<span title="{escape(whole)}">{escape(name)}</span>' for whole, name in zip(shown.labels, names, strict=True)
    )
    of = f' <span class="faint">of {escape(common)}</span>' if common else ""
    return (
        f'<figure class="map" style="--row:{height}px"><figcaption>{escape(shown.title)}{of}</figcaption>'
        f'<div class="names">{labels}</div><svg role="img" aria-label="{escape(shown.title)}" viewBox="0 0 1000 {rows}" '
        f'preserveAspectRatio="none" style="height:{height * rows}px">{cells}{lines}</svg>'
        f'<div class="axis">{_axis(end)}</div>{_key(shown, top, changes=bool(lines))}</figure>'
    )


def _row(shown: TaskMap, row: int, name: str, values: Array, top: float) -> str:
    """The cells of a task; neighbours with the same figure are one."""
    ends = 1000 * shown.edges / shown.edges[-1]
    found = ""
    for first, last, figure in _runs([_figure_text(shown.scale, float(value)) for value in values]):
        part = min(1.0, max(0.0, float(values[first]) / top))
        # One task may have most of the draws for a while; by the root, shares among many still differ.
        shade = round(_SHADES * (part if shown.scale == "rate" else math.sqrt(part)))
        span = f"{_count(shown.edges[first])} to {_count(shown.edges[last])}"
        found += (
            f'<rect class="{shown.scale} {shown.scale}{shade}" x="{ends[first]:.1f}" y="{row}" '
            f'width="{ends[last] - ends[first]:.1f}" height="1"><title>{escape(name)}\n{span}: {figure}</title></rect>'
        )
    return found


def _runs(figures: Sequence[str | None]) -> Iterator[tuple[int, int, str]]:
    """Stretches of the same text: first, one past the last, and the text; None is left out."""
    first = 0
    for index in range(1, len(figures) + 1):
        if index == len(figures) or figures[index] != figures[first]:
            if (figure := figures[first]) is not None:
                yield first, index, figure
            first = index


def _figure_text(scale: str, value: float) -> str | None:
    if not math.isfinite(value):
        return None
    return f"{value:.2f}" if scale == "rate" else f"{100 * value:.1f} %"


def _largest(values: Array) -> float:
    return max(float(np.nanmax(values)), 1e-9)


def _colour(share: float) -> str:
    place = share * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    parts = (round(a + (b - a) * (place - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def _key(shown: TaskMap, top: float, *, changes: bool) -> str:
    steps = "".join(
        f'<rect class="{shown.scale} {shown.scale}{shade}" x="{shade}" y="0" width="1" height="1"/>'
        for shade in range(_SHADES + 1)
    )
    high = "1" if shown.scale == "rate" else f"{100 * top:.1f} %, in the middle {25 * top:.1f} %"
    found = f'<span>0 <svg viewBox="0 0 {_SHADES + 1} 1" preserveAspectRatio="none" aria-hidden="true">{steps}</svg> {high}</span>'
    if not np.isfinite(shown.values).all():
        found += '<span><svg class="empty" viewBox="0 0 1 1" aria-hidden="true"></svg> nothing known</span>'
    if changes:
        found += "<span><i></i> the curriculum changed</span>"
    return f'<div class="key-line">{found}<span>across: {escape(shown.x_label)}</span></div>'


def _axis(end: float) -> str:
    """Round numbers from 0 to `end`, five at most."""
    size = 10.0 ** math.floor(math.log10(end))
    step = next(s for s in (0.2 * size, 0.25 * size, 0.5 * size, size, 2 * size, 2.5 * size) if end / s <= 5)
    found = ""
    for index in range(math.floor(end / step + 1e-9) + 1):
        place = min(100.0, 100 * index * step / end)
        side = ' class="first"' if index == 0 else ' class="last"' if place > 94 else ""
        found += f'<span{side} style="left:{place:.2f}%">{tick_text(index * step)}</span>'
    return found


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _text(x_label: str, at: float) -> str:
    return f"{_count(at)} {escape(x_label)}"
