"""report.html: one self-contained page about a run, made from what its folder holds."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cluster.charts import COLOURS, Chart, Curves, Series, learning_curve_png, time_axis, to_svg
from cluster.files import read_json, size_text, write_atomically
from cluster.runs import RunFolder
from configs.algorithms import CLASSIFICATION
from configs.schema import RunConfig

__all__ = ["learning_curve_png", "write_report"]

_MOST_EVENTS = 300

# Process kind → its states: metric below time/<kind>/, what a reader should call it, colour. What is left of the wall
# time is "other". The limiter's states are those of the shards' callers, which wait while the shard goes on.
_STATES: dict[str, tuple[str, str, tuple[tuple[str, str, str], ...]]] = {
    "Actors": (
        "actor",
        "other",
        (
            ("env_s", "stepping environments", "blue"),
            ("infer_s", "policy inference", "orange"),
            ("write_s", "writing steps", "green"),
        ),
    ),
    "Learner": (
        "learner",
        "other",
        (
            ("update_s", "updates", "blue"),
            ("wait_s", "waiting for data", "orange"),
            ("publish_s", "publishing weights", "green"),
        ),
    ),
    "Replay shards": (
        "shard",
        "idle or other",
        (("inserting_s", "inserting", "blue"), ("sampling_s", "sampling", "green")),
    ),
    "Rate limiter": (
        "shard",
        "nobody held back",
        (
            ("waiting_for_samples_s", "writers held back", "orange"),
            ("waiting_for_inserts_s", "samplers held back", "purple"),
        ),
    ),
}

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
table.times { max-width: 46rem; } th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--faint); font-weight: 400; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tbody + tbody td { border-top: 0; } td.bars { padding: .9rem 0 .4rem; border: 0; }
pre { background: var(--soft); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; line-height: 1.45; }
details > summary { cursor: pointer; } .kind-warning td, .kind-restart td { color: var(--orange); }
"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    Only config.yaml has to be there; a sentence stands for whatever else is missing.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        DiskFullError: no room for the page; an older one is kept.
    """
    run = RunFolder.open(run_folder)
    facts = _facts_of(run_folder)
    curves = Curves.read(run_folder)
    events = _events(run_folder)
    light = " ".join(f"--{name}: {colour};" for name, colour in COLOURS.items())
    name = run.config.name or run_folder.name
    page = "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(name)} · Millrace</title>",
            f"<style>{_STYLE.replace('LIGHT', light)}</style></head><body>",
            f'<p class="faint">Millrace run</p><h1>{escape(name)}</h1>',
            _summary(run.config, facts, curves),
            "<h2>Return</h2>",
            _charts(_return_charts(run.config, curves), "No episode had ended when the metrics were last written."),
            "<h2>Throughput</h2>",
            _charts(_throughput_charts(curves), "No throughput was measured."),
            "<h2>Replay and policy lag</h2>",
            _charts(_replay_charts(run.config, curves), "Nothing was measured of the replay service."),
            "<h2>Losses</h2>",
            _charts(_loss_charts(run.config, curves), "No update had been made when the metrics were last written."),
            "<h2>Where time went</h2>",
            _time_table(curves),
            "<h2>Events</h2>",
            _event_table(events),
            "<h2>How it was run</h2>",
            _how(run_folder, facts),
            "</body></html>\n",
        )
    )
    path = run_folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _facts_of(run_folder: Path) -> dict[str, Any]:
    file = run_folder / "run.json"
    try:
        facts = read_json(file) if file.exists() else {}
    except ValueError as error:
        warnings.warn(f"{error}; the report goes without it", RuntimeWarning, stacklevel=3)
        facts = {}
    return facts if isinstance(facts, dict) else {}


def _events(run_folder: Path) -> list[dict[str, Any]]:
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


def _summary(config: RunConfig, facts: dict[str, Any], curves: Curves) -> str:
    _, returns, spreads = curves.evaluations("env_steps")
    steps_at = curves.evaluations("env_steps")[0]

    def evaluation(index: int | None) -> str:
        if index is None:
            return "none"
        return f"<b>{_number(returns[index], 1)}</b> ± {_number(spreads[index], 1)} at {_number(steps_at[index])} steps"

    machine = facts.get("machine") or {}
    machine_text = ", ".join(
        text
        for text in (
            f"{machine['cpus']} CPUs" if machine.get("cpus") else "",
            f"{size_text(machine['memory_bytes'])} memory" if machine.get("memory_bytes") else "",
            str(machine.get("platform") or ""),
        )
        if text
    )
    broken = curves.last("broken_episodes") or 0.0
    episodes = _number(curves.last("episodes")) + (f" ({_number(broken)} broken)" if broken else "")
    pairs = (
        ("Environment", f"<b>{escape(config.env.id)}</b>"),
        ("Algorithm", f"<b>{escape(config.algorithm.name)}</b>"),
        ("Seed", f"<b>{config.seed}</b>"),
        ("Best evaluation", evaluation(int(np.argmax(returns)) if len(returns) else None)),
        ("Last evaluation", evaluation(len(returns) - 1 if len(returns) else None)),
        ("Stop condition", _stop(config, facts, curves)),
        ("Environment steps", f"<b>{_number(curves.last('env_steps'))}</b>"),
        ("Updates", f"<b>{_number(curves.last('updates'))}</b>"),
        ("Wall time", f"<b>{_duration(curves.total('wall_s'))}</b>"),
        ("Episodes", escape(episodes)),
        ("Started", escape(str(facts.get("started") or "unknown").replace("T", " "))),
        ("Machine", escape(machine_text or "unknown")),
    )
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"


def _stop(config: RunConfig, facts: dict[str, Any], curves: Curves) -> str:
    """Which of the stop conditions were met; the text is escaped."""
    stop = config.stop
    steps, seconds = curves.last("env_steps"), curves.total("time_s")
    _, returns, _ = curves.evaluations("env_steps")
    met: list[str] = []
    missed: list[str] = []
    if stop.steps is not None:
        (met if steps is not None and steps >= stop.steps else missed).append(f"{stop.steps:,} steps")
    if stop.wall_s is not None:
        reached = seconds is not None and seconds >= stop.wall_s
        (met if reached else missed).append(f"{stop.wall_s:,g} s")
    if stop.mean_return is not None:
        reached = len(returns) > 0 and float(returns.max()) >= stop.mean_return
        (met if reached else missed).append(f"mean return ≥ {_number(stop.mean_return, 1)}")
    verdict = f"<b>met</b>: {escape(', '.join(met))}" if met else f"<b>not met</b>: {escape(', '.join(missed))}"
    reason = (facts.get("summary") or {}).get("stop_reason")
    if reason:
        verdict += f'<br><span class="faint">{escape(str(reason))}</span>'
    elif not facts.get("finished"):
        verdict += '<br><span class="faint">still going on, or ended without a summary</span>'
    return verdict


def _return_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    unit_s, time_label = time_axis(curves.total("time_s") or 0.0)
    goal = config.stop.mean_return
    levels = {f"goal {_number(goal, 1)}": goal} if goal is not None else {}
    for title, column, unit, label in (
        ("Return against environment steps", "env_steps", 1.0, "environment steps"),
        ("Return against time", "time_s", unit_s, time_label),
    ):
        series = []
        if curves.has("return_mean_100"):
            training = curves.get("return_mean_100")
            series.append(Series("training, last 100 episodes", curves.running(column) / unit, training, "orange"))
        at, mean, spread = curves.evaluations(column)
        if len(at):
            dots = len(at) <= 60
            series.append(Series("evaluation, mean ± std", at / unit, mean, "blue", spread, markers=dots, thin=False))
        if series:
            yield Chart(title, label, "return per episode", series, levels=levels)


def _over_time(curves: Curves, title: str, unit: str, name: str, **options: Any) -> Iterator[Chart]:
    if curves.has(name) and curves.has("time_s"):
        unit_s, label = time_axis(curves.total("time_s") or 0.0)
        x = curves.running("time_s") / unit_s
        colour, scale = options.pop("colour", "blue"), options.pop("scale", 1.0)
        y = curves.get(name) * scale
        # Before the first update actors run freely for a moment; that peak would flatten the hours after it.
        most, usual = float(np.nanmax(y)), float(np.nanpercentile(y, 97))
        if options.get("from_zero") and most > 3 * usual > 0:
            options["top"] = 1.5 * usual
            unit = f"{unit} (axis cut off, the highest is {_number(most)})"
        yield Chart(title, label, unit, [Series("", x, y, colour)], **options)


def _together(curves: Curves, title: str, unit: str, names: Mapping[str, tuple[str, str]]) -> Iterator[Chart]:
    """One chart of several columns over time: `names` maps what a line is called to its column and its colour."""
    there = {label: found for label, found in names.items() if curves.has(found[0])}
    if there and curves.has("time_s"):
        unit_s, label = time_axis(curves.total("time_s") or 0.0)
        x = curves.running("time_s") / unit_s
        yield Chart(title, label, unit, [Series(line, x, curves.get(name), c) for line, (name, c) in there.items()])


def _throughput_charts(curves: Curves) -> Iterator[Chart]:
    yield from _over_time(curves, "Environment steps per second", "steps/s", "steps_per_s", from_zero=True)
    yield from _over_time(curves, "Updates per second", "updates/s", "updates_per_s", from_zero=True, colour="green")


def _replay_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    fill = {"scale": 100.0, "from_zero": True}
    yield from _over_time(curves, "Replay fill", "% of capacity", "replay_fill", **fill)
    target = {f"target {config.samples_per_insert:g}": config.samples_per_insert}
    unit = "windows sampled per step inserted"
    yield from _over_time(
        curves, "Samples per insert", unit, "samples_per_insert", from_zero=True, colour="green", levels=target
    )
    unit = "versions behind the newest weights"
    yield from _over_time(curves, "Policy lag", unit, "policy_lag", from_zero=True, colour="purple")


def _loss_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    critic = curves.get("loss/critic")
    positive = critic[np.isfinite(critic)]
    log = bool(len(positive) and positive.min() > 0 and positive.max() > 30 * positive.min())
    kind = "" if config.algorithm.name == "custom" else config.algorithm.head.kind
    # A head of the user's may measure its loss in anything.
    unit = "cross-entropy, nats" if kind in CLASSIFICATION else "half the squared error" if kind == "mse" else "loss"
    yield from _over_time(curves, "Critic loss", unit, "loss/critic", log=log)
    yield from _over_time(curves, "Loss of the distilled critic", unit, "loss/distilled", colour="purple")
    unit = "temperature × log-probability − value"
    yield from _over_time(curves, "Policy loss", unit, "loss/policy", colour="orange")
    yield from _over_time(
        curves, "Loss of the value network", "implicit regression loss", "loss/value", colour="orange"
    )
    yield from _over_time(curves, "Flow loss", "squared error of the velocity", "loss/flow", colour="purple")
    unit = "discounted return"
    names = {"critics": ("q/mean", "green"), "targets": ("q/target", "orange"), "value network": ("value/mean", "blue")}
    yield from _together(curves, "Mean value estimate", unit, names)
    share = {"scale": 100.0, "from_zero": True, "colour": "orange"}
    yield from _over_time(curves, "Targets outside of the support", "% of targets", "value/clipped_fraction", **share)
    ends = {"highest value": ("support/high", "blue"), "lowest value": ("support/low", "purple")}
    yield from _together(curves, "Support of the value head", unit, ends)
    yield from _over_time(curves, "Temperature", "reward per nat", "temperature", colour="purple")
    yield from _over_time(curves, "Policy entropy", "nats", "entropy", colour="blue")


def _charts(charts: Iterator[Chart], otherwise: str) -> str:
    figures = [
        f'<figure role="img" aria-label="{escape(chart.title)}"><figcaption>{escape(chart.title)}</figcaption>{to_svg(chart)}</figure>'
        for chart in charts
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else f'<p class="faint">{escape(otherwise)}</p>'


def _time_table(curves: Curves) -> str:
    bodies = []
    for kind, (prefix, rest, states) in _STATES.items():
        wall = curves.total(f"time/{prefix}/wall_s")
        if not wall or not curves.has(*(f"time/{prefix}/{name}" for name, _, _ in states)):
            continue
        spent = [(label, curves.total(f"time/{prefix}/{name}") or 0.0, colour) for name, label, colour in states]
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
            f'<td class="number">{100 * seconds / wall:.1f} %</td><td class="number">{_number(seconds, 1)}</td></tr>'
            for label, seconds, colour in spent
        )
        bodies.append(
            f'<tbody><tr><td class="bars" colspan="3"><b>{kind}</b> <span class="faint">{_number(wall, 1)} s</span>'
            f'<div class="bar">{bar}</div></td></tr>{rows}</tbody>'
        )
    if not bodies:
        return '<p class="faint">No process had reported its times when the metrics were last written.</p>'
    return (
        '<p class="faint">Shares of the wall time of each kind of process, summed over its processes. '
        "The rate limiter holds back whoever runs ahead of the set samples per insert; several callers may wait at once.</p>"
        '<table class="times"><thead><tr><th>state</th><th class="number">share</th><th class="number">seconds</th></tr></thead>'
        f"{''.join(bodies)}</table>"
    )


def _event_table(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return '<p class="faint">No events were recorded.</p>'
    shown = events[-_MOST_EVENTS:]
    omitted = f'<p class="faint">The {len(events) - len(shown):,} events before these are in events.jsonl.</p>'
    rows = "".join(
        f'<tr class="kind-{escape(_word(event.get("kind")))}"><td class="number">{escape(_duration(event.get("time_s")))}</td>'
        f"<td>{escape(str(event.get('kind', '')))}</td><td>{escape(str(event.get('text', '')))}</td></tr>"
        for event in shown
    )
    return (
        (omitted if len(shown) < len(events) else "")
        + '<div class="scroll"><table><thead><tr><th class="number">time</th><th>kind</th><th>what happened</th></tr></thead>'
        + f"<tbody>{rows}</tbody></table></div>"
    )


def _how(run_folder: Path, facts: dict[str, Any]) -> str:
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


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")


def _duration(seconds: Any) -> str:
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
