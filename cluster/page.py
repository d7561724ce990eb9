"""What the reports of all kinds of runs share: the frame of the page, its tables, and how charts and numbers are set."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cluster.charts import COLOURS, Chart, Curves, Series, time_axis, to_svg
from cluster.files import read_json, size_text, write_atomically
from cluster.task_map import TaskMap, map_figure, map_style

_MOST_EVENTS = 300

# Process kind → its states: metric below time/<kind>/, what a reader should call it, colour. What is left of the wall time has
# the second name.
States = Mapping[str, tuple[str, str, tuple[tuple[str, str, str], ...]]]

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --soft: #f4f6f7; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --soft: #1e2327; --ink: #e6e9eb; --faint: #9aa3aa; --grid: #343b41;
          --blue: #56b4e9; --orange: #f0894a; --green: #2fc59b; --purple: #d68ad6; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.faint { color: var(--faint); } p { margin: .25rem 0; max-width: 46rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .75rem 1.25rem; margin: 1.5rem 0 0; }
.facts div { border-top: 1px solid var(--grid); padding-top: .4rem; min-width: 0; }
dt { color: var(--faint); font-size: .85rem; } dd { margin: 0; overflow-wrap: anywhere; }
dd b { font-weight: 600; font-size: 1.15rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.25rem 2rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.bar { display: flex; height: 1.6rem; border-radius: 4px; overflow: hidden; background: var(--soft); }
.bar span { min-width: 0; }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; background: var(--grid); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.charts + .scroll, .charts + table, .charts + .charts { margin-top: 1.25rem; }
.name { min-width: 13rem; overflow-wrap: anywhere; } th.wrap { white-space: normal; vertical-align: bottom; }
table.times { max-width: 46rem; } .part { height: .7em; border-radius: 2px; background: var(--blue); } th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--faint); font-weight: 400; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody + tbody td { border-top: 0; } td.bars { padding: .9rem 0 .4rem; border: 0; }
pre { background: var(--soft); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
td code { white-space: pre-wrap; overflow-wrap: anywhere; }
details > summary { cursor: pointer; } .kind-warning td, .kind-restart td { color: var(--orange); }
"""


def write_page(run_folder: Path, name: str, sections: Sequence[str]) -> Path:
    """Write `report.html` into the folder of a run from its sections, and return its path.

    Raises:
        DiskFullError: no room for the page; an older one is kept.
    """
    light = " ".join(f"--{variable}: {colour};" for variable, colour in COLOURS.items())
    style = _STYLE.replace("LIGHT", light) + (map_style() if any('class="map"' in part for part in sections) else "")
    page = "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)} · Millrace</title>",
            f"<style>{style}</style></head><body>",
            f'<p class="faint">Millrace run</p><h1>{escape(name)}</h1>',
            *sections,
            "</body></html>\n",
        )
    )
    path = run_folder / "report.html"
    write_atomically(path, page.encode(errors="replace"))  # a lone surrogate has no UTF-8
    return path


def fact_list(pairs: Sequence[tuple[str, str]]) -> str:
    """Names with their values, which are HTML, as a grid."""
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"


def machine_text(facts: Mapping[str, Any]) -> str:
    """The machine that a run was started on, in words; escaped."""
    machine = facts.get("machine") or {}
    parts = (
        f"{machine['cpus']} CPUs" if machine.get("cpus") else "",
        f"{size_text(machine['memory_bytes'])} memory" if machine.get("memory_bytes") else "",
        str(machine.get("platform") or ""),
    )
    return escape(", ".join(part for part in parts if part) or "unknown")


def started_text(facts: Mapping[str, Any]) -> str:
    """When a run was started; escaped."""
    return escape(str(facts.get("started") or "unknown").replace("T", " "))


def verdict(met: Sequence[str], missed: Sequence[str], facts: Mapping[str, Any]) -> str:
    """Which stop conditions were met, and why the run ended; HTML."""
    found = f"<b>met</b>: {escape(', '.join(met))}" if met else f"<b>not met</b>: {escape(', '.join(missed))}"
    reason = (facts.get("summary") or {}).get("stop_reason")
    if reason:
        found += f'<br><span class="faint">{escape(str(reason))}</span>'
    elif not facts.get("finished"):
        found += '<br><span class="faint">still going on, or ended without a summary</span>'
    return found


def facts_of(run_folder: Path) -> dict[str, Any]:
    """What run.json tells of a run; empty where it is missing or broken."""
    file = run_folder / "run.json"
    try:
        facts = read_json(file) if file.exists() else {}
    except ValueError as error:
        warnings.warn(f"{error}; the report goes without it", RuntimeWarning, stacklevel=3)
        facts = {}
    return facts if isinstance(facts, dict) else {}


def events_of(run_folder: Path) -> list[dict[str, Any]]:
    """Events in order; a line that was cut short, as a crash leaves it, is left out."""
    file = run_folder / "events.jsonl"
    events = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def over_time(curves: Curves, title: str, unit: str, name: str, **options: Any) -> Iterator[Chart]:
    """One column over time; nothing where it was not measured. `options` are colour, scale, and those of `Chart`."""
    if curves.has(name) and curves.has("time_s"):
        unit_s, label = time_axis(curves.total("time_s") or 0.0)
        x = curves.running("time_s") / unit_s
        colour, scale = options.pop("colour", "blue"), options.pop("scale", 1.0)
        y = curves.get(name) * scale
        # Before the first update actors run freely for a moment; that peak would flatten the hours after it.
        most, usual = float(np.nanmax(y)), float(np.nanpercentile(y, 97))
        if options.get("from_zero") and most > 3 * usual > 0:
            options["top"] = 1.5 * usual
            unit = f"{unit} (axis cut off, the highest is {number(most)})"
        yield Chart(title, label, unit, [Series("", x, y, colour)], **options)


def together(
    curves: Curves, title: str, unit: str, names: Mapping[str, tuple[str, str]], *, from_zero: bool = False
) -> Iterator[Chart]:
    """One chart of several columns over time: `names` maps what a line is called to its column and its colour."""
    there = {label: found for label, found in names.items() if curves.has(found[0])}
    if there and curves.has("time_s"):
        unit_s, label = time_axis(curves.total("time_s") or 0.0)
        x = curves.running("time_s") / unit_s
        lines = [Series(line, x, curves.get(name), colour) for line, (name, colour) in there.items()]
        yield Chart(title, label, unit, lines, from_zero=from_zero)


def charts_html(charts: Iterator[Chart], otherwise: str, maps: Sequence[TaskMap] = ()) -> str:
    """The charts, then the maps, as HTML, or a sentence where there are none."""
    figures = [
        f'<figure role="img" aria-label="{escape(chart.title)}"><figcaption>{escape(chart.title)}</figcaption>{to_svg(chart)}</figure>'
        for chart in charts
    ]
    figures += [map_figure(shown) for shown in maps]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else f'<p class="faint">{escape(otherwise)}</p>'


def time_table(curves: Curves, states: States, remark: str) -> str:
    """Where the time of each kind of process went."""
    bodies = []
    for kind, (prefix, rest, named) in states.items():
        wall = curves.total(f"time/{prefix}/wall_s")
        if not wall or not curves.has(*(f"time/{prefix}/{name}" for name, _, _ in named)):
            continue
        spent = [(label, curves.total(f"time/{prefix}/{name}") or 0.0, colour) for name, label, colour in named]
        left = wall - sum(seconds for _, seconds, _ in spent)
        # Several callers may wait at once, so the parts may be more than the whole; then nothing is left over.
        if left > 0:
            spent.append((rest, left, "grid"))
        whole = max(wall, sum(seconds for _, seconds, _ in spent))
        bar = "".join(
            f'<span style="width:{100 * seconds / whole:.2f}%;background:var(--{colour})" title="{label}"></span>'
            for label, seconds, colour in spent
        )
        rows = "".join(
            f'<tr><td><span class="key" style="background:var(--{colour})"></span>{label}</td>'
            f'<td class="number">{100 * seconds / wall:.1f} %</td><td class="number">{number(seconds, 1)}</td></tr>'
            for label, seconds, colour in spent
        )
        bodies.append(
            f'<tbody><tr><td class="bars" colspan="3"><b>{kind}</b> <span class="faint">{number(wall, 1)} s</span>'
            f'<div class="bar">{bar}</div></td></tr>{rows}</tbody>'
        )
    if not bodies:
        return '<p class="faint">No process had reported its times when the metrics were last written.</p>'
    return (
        f'<p class="faint">Shares of the wall time of each kind of process, summed over its processes. {remark}</p>'
        '<table class="times"><thead><tr><th>state</th><th class="number">share</th><th class="number">seconds</th></tr></thead>'
        f"{''.join(bodies)}</table>"
    )


def event_table(events: Sequence[dict[str, Any]]) -> str:
    """What happened, newest last."""
    if not events:
        return '<p class="faint">No events were recorded.</p>'
    shown = events[-_MOST_EVENTS:]
    omitted = f'<p class="faint">The {len(events) - len(shown):,} events before these are in events.jsonl.</p>'
    rows = "".join(
        f'<tr class="kind-{escape(_word(event.get("kind")))}"><td class="number">{escape(duration(event.get("time_s")))}</td>'
        f"<td>{escape(str(event.get('kind', '')))}</td><td>{escape(str(event.get('text', '')))}</td></tr>"
        for event in shown
    )
    return (
        (omitted if len(shown) < len(events) else "")
        + '<div class="scroll"><table><thead><tr><th class="number">time</th><th>kind</th><th>what happened</th></tr></thead>'
        + f"<tbody>{rows}</tbody></table></div>"
    )


def how(run_folder: Path, facts: dict[str, Any]) -> str:
    """The command, commit, versions and settings of a run."""
    commands = [facts.get("command"), *(again.get("command") for again in facts.get("resumed") or [])]
    lines = "\n".join(shlex.join(str(word) for word in command) for command in commands if command)
    command = f"<pre>{escape(lines)}</pre>" if lines else '<p class="faint">The command was not recorded.</p>'
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items() if version)
    config = (run_folder / "config.yaml").read_text(encoding="utf-8")
    return (
        f'{command}<p class="faint">Commit {escape(str(facts.get("commit") or "unknown"))}'
        f"{'. ' + escape(versions) if versions else ''}</p>"
        f"<details><summary>Resolved settings</summary><pre>{escape(config)}</pre></details>"
    )


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands apart; a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def duration(seconds: Any) -> str:
    """Seconds as 42 s, 3 min 5 s or 2 h 10 min."""
    if not isinstance(seconds, (int, float)):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:,} h {minute} min" if hours else f"{minute} min {second} s"


def _word(kind: Any) -> str:
    return "".join(character for character in str(kind) if character.isalnum() or character == "-")
