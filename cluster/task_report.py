"""What a report tells of tasks: maps of tasks × time, success and forgetting, a table, and what was thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import numpy as np

from cluster.charts import Chart, Curves, Series
from cluster.curriculum.forgetting import Forgetting
from cluster.page import charts_html, number, together
from cluster.task_map import MOST_ROWS, Scale, TaskMap, binned, columns_for, short_labels
from configs.schema import RunConfig

LINES = ("blue", "orange", "green", "purple")  # of the tasks of one chart; more are a map
_MOST_TABLE_ROWS = 200
_LONGEST_LINE_NAME = 32  # characters in the legend of a chart
_STEPS = "environment steps"


def labels_of(curves: Curves, prefix: str, *suffixes: str) -> list[str]:
    """What stands between `prefix` and one of `suffixes` in the names of metrics, in the order in which they were written."""
    found = (
        name[len(prefix) : -len(suffix)]
        for name in curves.names()
        for suffix in suffixes
        if name.startswith(prefix)
        and name.endswith(suffix)
        and len(name) > len(prefix) + len(suffix)
        and curves.has(name)
    )
    return list(dict.fromkeys(found))


def percent(share: float | None) -> str:
    """A share as a percentage with one digit."""
    return "–" if share is None else f"{number(100 * share, 1)} %"


# ------------------------------------------------------------------------------------------------------------ maps


def curriculum_maps(curves: Curves, kind: str, x: str, x_label: str) -> list[TaskMap]:
    """What the curriculum predicts of each label and how often it draws it, as two maps; none without such metrics.

    Args:
        kind: task or family.
        x: metric along which they are drawn, and `x_label` what it counts.
    """
    labels = labels_of(curves, f"{kind}/", "/pass_rate", "/drawn")
    changes = curriculum_changes(curves, x)
    maps: list[TaskMap] = []
    for title, read, scale in _CURRICULUM_MAPS:
        rows = {label: read(curves, f"{kind}/{label}") for label in labels[:MOST_ROWS]}
        maps += _map(f"{title} by {kind}", x_label, curves.running(x), rows, scale, changes, of=len(labels))
    return maps


def _map(
    title: str,
    x_label: str,
    x: np.ndarray,
    rows: Mapping[str, np.ndarray],
    scale: Scale,
    changes: list[float],
    *,
    of: int,
) -> Iterator[TaskMap]:
    """The map of these rows, where there is anything on it; they are the first `of` so many."""
    if rows and (cells := binned(x, np.stack(list(rows.values())), most=columns_for(len(rows)))) is not None:
        title += f" (the first {len(rows)} of {of:,})" if of > len(rows) else ""
        yield TaskMap(title, x_label, list(rows), *cells, scale, changes)


def predictions(curves: Curves, label: str) -> np.ndarray:
    """(rows,): the predicted pass rate; NaN before the first attempt, for it is then a guess from other tasks."""
    rate = curves.get(f"{label}/pass_rate")
    if curves.has(f"{label}/drawn"):
        tried = (
            np.isfinite(curves.get(f"{label}/length")) if label.startswith("task/") else _drawn_so_far(curves, label)
        )
        rate = np.where(np.logical_or.accumulate(tried), rate, np.nan)
    return rate


def draws(curves: Curves, label: str) -> np.ndarray:
    """(rows,): share of the latest draws; NaN before the first."""
    return np.where(_drawn_so_far(curves, label), curves.get(f"{label}/drawn"), np.nan)


def _drawn_so_far(curves: Curves, label: str) -> np.ndarray:
    found: np.ndarray = np.logical_or.accumulate(curves.get(f"{label}/drawn") > 0)
    return found


_CURRICULUM_MAPS: tuple[tuple[str, Callable[[Curves, str], np.ndarray], Scale], ...] = (
    ("Predicted pass rate", predictions, "rate"),
    ("Share of the latest draws", draws, "share"),
)


def curriculum_changes(curves: Curves, x: str) -> list[float]:
    """Where along `x` the curriculum changed."""
    count, at = curves.get("curriculum/changes"), curves.running(x)
    there = np.isfinite(count) & np.isfinite(at)
    return [float(place) for place in at[there][np.diff(count[there], prepend=count[there][:1]) > 0]]


# ------------------------------------------------------------------------------------------------------------ evaluations


def success_section(config: RunConfig, curves: Curves) -> str:
    """Success in evaluations over all tasks and by task, and how far the worst task has fallen."""
    labels = labels_of(curves, "eval/task/", "/success")
    few = len(labels) <= len(LINES)
    maps: list[TaskMap] = []
    if not few:
        rows = {label: curves.get(f"eval/task/{label}/success") for label in labels[:MOST_ROWS]}
        # A cell is the stretch that led up to an evaluation.
        x = np.where(np.isfinite(list(rows.values())).any(axis=0), curves.evaluated_at("env_steps"), np.nan)
        changes = curriculum_changes(curves, "env_steps")
        maps += _map("Success in evaluations by task", _STEPS, x, rows, "rate", changes, of=len(labels))
    charts = _success_charts(config, curves, labels if few else ())
    return charts_html(charts, "No evaluation had ended when the metrics were last written.", maps)


def _success_charts(config: RunConfig, curves: Curves, labels: Sequence[str]) -> Iterator[Chart]:
    names = {
        "mean over the tasks": ("eval/mean_success", "blue"),
        "worst drop of a task": ("eval/worst_drop", "orange"),
    }
    goal = config.stop.success
    levels = {f"goal {goal:g}": goal} if goal is not None else {}
    overall = list(_evaluation_lines(curves, names))
    if overall:
        yield Chart("Success in evaluations", _STEPS, "share of episodes", overall, from_zero=True, levels=levels)
    tasks = {
        _line_name(short): (f"eval/task/{label}/success", colour)
        for label, short, colour in zip(labels, short_labels(labels)[1], LINES, strict=False)
    }
    if by_task := list(_evaluation_lines(curves, tasks)):
        yield Chart("Success by task", _STEPS, "share of episodes", by_task, from_zero=True)


def _evaluation_lines(curves: Curves, names: Mapping[str, tuple[str, str]]) -> Iterator[Series]:
    at = curves.evaluated_at("env_steps")
    for label, (name, colour) in names.items():
        values = curves.get(name)
        there = np.isfinite(values) & np.isfinite(at)
        if there.any():
            yield Series(label, at[there], values[there], colour, markers=int(there.sum()) <= 60, thin=False)


def _line_name(name: str) -> str:
    half = _LONGEST_LINE_NAME // 2
    return name if len(name) <= _LONGEST_LINE_NAME else f"{name[:half]}…{name[1 - half :]}"


def drops(curves: Curves) -> dict[str, float]:
    """By task, how far its success has fallen from the last evaluation before the curriculum changed to the last one of all.

    At least 0; of tasks that were in both evaluations. The largest is what `eval/worst_drop` said last.
    """
    labels = labels_of(curves, "eval/task/", "/success")
    success = np.array([curves.get(f"eval/task/{label}/success") for label in labels]).reshape(len(labels), curves.rows)
    forgetting, changes = Forgetting(), 0
    for row, count in enumerate(curves.get("curriculum/changes")):
        found = {
            label: float(value) for label, value in zip(labels, success[:, row], strict=True) if np.isfinite(value)
        }
        if found:  # it stands in the row after it was made, so that row's own count came later
            forgetting.evaluated(found, changes=changes)
        changes = int(count) if np.isfinite(count) else changes
    state = forgetting.state()
    before, last = state["reference"], state["last"]
    return {label: max(0.0, before[label] - last[label]) for label in before if label in last}


# ------------------------------------------------------------------------------------------------------------ tables


def task_tables(curves: Curves) -> str:
    """What is known of each task, and of each family where metrics tell of families; columns without figures are left out."""
    tasks = list(
        dict.fromkeys(labels_of(curves, "task/", "/pass_rate", "/drawn") + labels_of(curves, "eval/task/", "/success"))
    )
    fallen = drops(curves)
    columns: dict[str, list[str]] = {
        "predicted pass rate": [number(_last(predictions(curves, f"task/{t}")), 2) for t in tasks],
        "share of the latest draws": [percent(_last(draws(curves, f"task/{t}"))) for t in tasks],
        "training return": [number(curves.last(f"task/{t}/return"), 2) for t in tasks],
        "training length": [number(curves.last(f"task/{t}/length"), 1) for t in tasks],
        "evaluation return, last": [number(curves.last(f"eval/task/{t}/return"), 2) for t in tasks],
        "evaluation return, best": [number(_best(curves, f"eval/task/{t}/return"), 2) for t in tasks],
        "success, last": [number(curves.last(f"eval/task/{t}/success"), 2) for t in tasks],
        "success, best": [number(_best(curves, f"eval/task/{t}/success"), 2) for t in tasks],
        "drop since the last change": [number(fallen.get(t), 2) for t in tasks],
    }
    families = labels_of(curves, "family/", "/pass_rate", "/drawn")
    of_families: dict[str, list[str]] = {
        "predicted pass rate": [number(_last(predictions(curves, f"family/{f}")), 2) for f in families],
        "share of the latest draws": [percent(_last(draws(curves, f"family/{f}"))) for f in families],
    }
    return _table("task", tasks, columns) + _table("family", families, of_families)


def _table(kind: str, names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    columns = {title: cells for title, cells in columns.items() if any(cell != "–" for cell in cells)}
    if not columns:
        return ""
    head = "".join(f'<th class="number wrap">{title}</th>' for title in columns)
    rows = "".join(
        f'<tr><td class="name">{escape(name)}</td>'
        + "".join(f'<td class="number">{cells[row]}</td>' for cells in columns.values())
        + "</tr>"
        for row, name in enumerate(names[:_MOST_TABLE_ROWS])
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>{kind}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        + _left_out(len(names), _MOST_TABLE_ROWS)
    )


def _left_out(count: int, shown: int) -> str:
    return (
        f'<p class="faint">The first {shown:,} of {count:,} rows; all are in the metrics.</p>' if count > shown else ""
    )


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _best(curves: Curves, name: str) -> float | None:
    return float(np.nanmax(curves.get(name))) if curves.has(name) else None


# ------------------------------------------------------------------------------------------------------------ waste, and the head


def waste_charts(curves: Curves, units: str) -> Iterator[Chart]:
    """What was sampled and thrown away; `units` are tokens or steps."""
    yield from together(
        curves,
        f"{units[0].upper()}{units[1:]} thrown away, and why",
        f"share of the {units} sampled so far",
        {
            "in all": ("waste/share", "blue"),
            "too hard": ("waste/too_hard", "orange"),
            "too easy": ("waste/too_easy", "green"),
            "too old": ("waste/stale", "purple"),
            "nobody could judge": ("waste/unscored", "faint"),
        },
        from_zero=True,
    )


def wastes(config: RunConfig, curves: Curves) -> bool:
    """Whether there is a filter, or anything was thrown away."""
    return curves.has("waste/share") and (config.curriculum.filter != "none" or (curves.last("waste/share") or 0.0) > 0)


def task_facts(config: RunConfig, curves: Curves) -> Iterator[tuple[str, str]]:
    """What the head of the report says of tasks; names and HTML."""
    count = task_count(config, curves)
    yield (
        "Tasks",
        f"<b>{number(count)}</b> of {escape(config.env_name)}" if count else f"<b>{escape(config.env_name)}</b>",
    )
    curriculum = config.curriculum
    uniform = f", {100 * curriculum.floor:g} % of the draws uniform" if curriculum.draw != "uniform" else ""
    yield "Curriculum", f"<b>{escape(curriculum.draw)}</b>{uniform}"
    if curriculum.filter == "none":
        yield "Filter", "<b>none</b>"
    else:
        band = f"pass rates {curriculum.low:g} to {curriculum.high:g} of {curriculum.group_size} episodes"
        yield "Filter", f"<b>{escape(curriculum.filter)}</b>, {band}"
    if wastes(config, curves):
        sampled = number(curves.last("waste/sampled_steps"))
        yield "Environment steps wasted", f"<b>{percent(curves.last('waste/share'))}</b> of {sampled}"
    if (drop := curves.last("eval/worst_drop")) is not None:
        fallen = drops(curves)
        worst = max(fallen, key=fallen.__getitem__, default=None) if drop > 0 else None
        since = "the curriculum last changed" if curves.last("curriculum/changes") else "the first evaluation"
        of = f", {escape(worst)}" if worst is not None else ""
        yield f"Worst drop since {since}", f"<b>{number(drop, 2)}</b>{of}"
    if lost := curves.last("outcomes_lost"):
        yield "Outcomes lost", f"<b>{number(lost)}</b>, missing in the record of the tasks"


def task_count(config: RunConfig, curves: Curves) -> int | None:
    """How many tasks there are; None where only their source knows, and they are too many for metrics to tell of each."""
    tasks = config.tasks
    if tasks.list:
        return len(tasks.list)
    if tasks.source is None:
        return max(1, len(tasks.ids)) * int(np.prod([len(values) for values in tasks.product.values()], dtype=np.int64))
    return len(labels_of(curves, "task/", "/pass_rate", "/drawn")) or None
