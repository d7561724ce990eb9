"""report.html of a run that trains a language model: pass rates against steps, answers and seconds, waste, staleness, samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cluster.charts import Chart, Curves, Series, time_axis
from cluster.llm.examples import read_examples
from cluster.page import (
    States,
    charts_html,
    duration,
    event_table,
    events_of,
    fact_list,
    facts_of,
    how,
    machine_text,
    number,
    over_time,
    started_text,
    time_table,
    together,
    verdict,
    write_page,
)
from cluster.runs import RunFolder
from cluster.task_report import curriculum_maps, percent, waste_charts
from configs.llm import LlmConfig

_MOST_EXAMPLES = 12
_MOST_CHARACTERS = 600  # of an example's prompt and of its completion
_OLDEST = 64  # `learners.llm.measures.LAGS`: older tokens count as this old
_COLOURS = ("blue", "orange", "green", "purple")

_STATES: States = {
    "Actors": (
        "actor",
        "other",
        (
            ("decode_s", "decoding", "blue"),
            ("verify_s", "handing to verifiers, taking verdicts", "green"),
            ("write_s", "writing groups, held back by the queue included", "orange"),
            ("idle_s", "nothing to decode", "purple"),
        ),
    ),
    "Learner": (
        "learner",
        "other",
        (
            ("update_s", "updates", "blue"),
            ("wait_s", "waiting for groups", "orange"),
            ("publish_s", "publishing weights", "green"),
        ),
    ),
}


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        DiskFullError: no room for the page; an older one is kept.
    """
    run: RunFolder[LlmConfig] = RunFolder.open(run_folder)
    config, facts, curves = run.config, facts_of(run_folder), Curves.read(run_folder)
    examples = list(read_examples(run_folder))
    sections = (
        _summary(config, facts, curves),
        "<h2>Held-out prompts</h2>",
        charts_html(_pass_charts(config, curves), "No evaluation had ended when the metrics were last written."),
        *_family_section(curves),
        "<h2>Training prompts and difficulty</h2>",
        charts_html(
            _curriculum_charts(curves),
            "No group had ended when the metrics were last written.",
            curriculum_maps(curves, "family", "updates", "learner steps"),
        ),
        "<h2>Policy</h2>",
        charts_html(_policy_charts(curves), "No update had been made when the metrics were last written."),
        "<h2>Staleness and weight synchronisation</h2>",
        charts_html(_staleness_charts(curves), "No group had been learnt from when the metrics were last written."),
        _lags(curves),
        "<h2>Throughput</h2>",
        charts_html(_throughput_charts(curves), "No throughput had been measured when the metrics were last written."),
        "<h2>Completions</h2>",
        _example_table(examples),
        "<h2>Where time went</h2>",
        time_table(curves, _STATES, "An actor that writes while the queue is full waits for the learner."),
        "<h2>Events</h2>",
        event_table(events_of(run_folder)),
        "<h2>How it was run</h2>",
        how(run_folder, facts),
    )
    return write_page(run_folder, config.name or run_folder.name, sections)


def _summary(config: LlmConfig, facts: Mapping[str, Any], curves: Curves) -> str:
    def before_after(name: str) -> str:
        _, values = _evaluations(curves, "step", name)
        if not len(values):
            return "not measured"
        if len(values) == 1:
            return f"<b>{number(values[0], 3)}</b>, measured once"
        return f"<b>{number(values[-1], 3)}</b> after, {number(values[0], 3)} before"

    over = f" over {', '.join(config.eval.families)}" if config.eval.families else ""
    model = config.model.path or f"embedded, {config.model.layers} layers of width {config.model.width}"
    kept, groups = curves.total("kept_groups"), curves.total("groups")
    pairs = (
        ("Model", f"<b>{escape(model)}</b>"),
        ("Prompts", f"<b>{escape(config.tasks.source)}</b>"),
        ("Loss", f"<b>{escape(config.algorithm.loss)}</b>, advantage {escape(config.algorithm.advantage)}"),
        (f"pass@1{escape(over)}", before_after("eval/pass_at_1")),
        (f"greedy{escape(over)}", before_after("eval/greedy")),
        ("Stop condition", _stop(config, facts, curves)),
        ("Learner steps", f"<b>{number(curves.last('updates'))}</b>"),
        (
            "Completions sampled",
            f"<b>{number(curves.total('samples'))}</b>, {number(curves.total('sampled_tokens'))} tokens",
        ),
        ("Groups kept", f"<b>{number(kept)}</b> of {number(groups)}"),
        ("Tokens wasted", f"<b>{percent(curves.last('waste/share'))}</b>"),
        ("Completions nobody could judge", f"<b>{number(curves.total('unscored'))}</b>"),
        *_failed(curves),
        ("Seed", f"<b>{config.seed}</b>"),
        ("Wall time", f"<b>{duration(curves.total('wall_s'))}</b>"),
        ("Started", started_text(facts)),
        ("Machine", machine_text(facts)),
    )
    return fact_list(pairs)


def _failed(curves: Curves) -> Iterator[tuple[str, str]]:
    """What should not be, where it is: prompts that cannot be sampled, and evaluations that lack some completions."""
    for name, told, count in (
        (
            "Prompts that could not be sampled",
            "too long for the model, or with unknown characters",
            curves.total("failed"),
        ),
        (
            "Held-out completions nobody could judge",
            "at the last evaluation, left out of it",
            curves.last("eval/unscored"),
        ),
        ("Held-out prompts that could not be sampled", "left out of the evaluations", curves.last("eval/failed")),
    ):
        if count:
            yield name, f"<b>{number(count)}</b>, {told}"


def _stop(config: LlmConfig, facts: Mapping[str, Any], curves: Curves) -> str:
    stop = config.stop
    _, values = _evaluations(curves, "step", "eval/pass_at_1")
    reached: tuple[tuple[str, float | None, float | None], ...] = (
        (f"{number(stop.updates)} learner steps", stop.updates, curves.last("updates")),
        (f"{number(stop.samples)} completions", stop.samples, curves.total("samples")),
        (f"{number(stop.wall_s)} s", stop.wall_s, curves.total("time_s")),
        (f"pass@1 ≥ {number(stop.pass_at_1, 2)}", stop.pass_at_1, float(values.max()) if len(values) else None),
    )
    met = [text for text, goal, value in reached if goal is not None and value is not None and value >= goal]
    return verdict(met, [text for text, goal, _ in reached if goal is not None and text not in met], facts)


def _evaluations(curves: Curves, x: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where along `x` evaluations ended, and what they gave; each (evaluations,)."""
    values = curves.get(name)
    at = curves.get("eval/step") if x == "step" else curves.running(x)
    there = np.isfinite(values) & np.isfinite(at)
    return at[there], values[there]


def _pass_charts(config: LlmConfig, curves: Curves) -> Iterator[Chart]:
    unit_s, time_label = time_axis(curves.total("time_s") or 0.0)
    names = {**{f"pass@{k}": f"eval/pass_at_{k}" for k in config.eval.attempts}, "greedy": "eval/greedy"}
    goal = config.stop.pass_at_1
    levels = {f"goal {goal:g}": goal} if goal is not None else {}
    for title, x, unit, label in (
        ("Against learner steps", "step", 1.0, "learner steps"),
        ("Against completions sampled", "samples", 1.0, "completions sampled"),
        ("Against time", "time_s", unit_s, time_label),
    ):
        series = []
        for colour, (line, name) in zip(_COLOURS * len(names), names.items(), strict=False):
            at, values = _evaluations(curves, x, name)
            if len(at):
                series.append(Series(line, at / unit, values, colour, markers=len(at) <= 60, thin=False))
        if series:
            yield Chart(title, label, "share of held-out prompts", series, levels=levels, from_zero=True)


def _families(curves: Curves, prefix: str, suffix: str) -> list[str]:
    shortest = len(prefix) + len(suffix)
    names = (n for n in curves.names() if n.startswith(prefix) and n.endswith(suffix) and len(n) > shortest)
    return sorted({name[len(prefix) : -len(suffix)] for name in names})


def _family_section(curves: Curves) -> Iterator[str]:
    """Each family by itself: lines where there are few, and figures in any case."""
    families = _families(curves, "eval/", "/pass_at_1")
    if not families:
        return
    if len(families) <= len(_COLOURS):
        yield charts_html(_family_charts(curves), "")
    columns = {"pass@1": "pass_at_1", "greedy": "greedy"}
    head = "".join(f'<th class="number">{c} before</th><th class="number">after</th>' for c in columns)
    rows = ""
    for family in families:
        cells = ""
        for name in columns.values():
            _, values = _evaluations(curves, "step", f"eval/{family}/{name}")
            for value in (values[0], values[-1]) if len(values) else (None, None):
                cells += f'<td class="number">{number(value, 3)}</td>'
        predicted, drawn = (curves.last(f"family/{family}/{name}") for name in ("pass_rate", "drawn"))
        cells += f'<td class="number">{number(predicted, 3)}</td><td class="number">{percent(drawn)}</td>'
        rows += f"<tr><td>{escape(family)}</td>{cells}</tr>"
    yield (
        f'<div class="scroll"><table><thead><tr><th>family</th>{head}<th class="number">predicted for training</th>'
        f'<th class="number">share of the latest draws</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _family_charts(curves: Curves) -> Iterator[Chart]:
    for title, suffix in (("pass@1 by family", "/pass_at_1"), ("Greedy by family", "/greedy")):
        series = []
        for colour, family in zip(_COLOURS, _families(curves, "eval/", suffix), strict=False):
            at, values = _evaluations(curves, "step", f"eval/{family}{suffix}")
            if len(at):
                series.append(Series(family, at, values, colour, markers=len(at) <= 60, thin=False))
        if series:
            yield Chart(title, "learner steps", "share of held-out prompts", series, from_zero=True)


def _curriculum_charts(curves: Curves) -> Iterator[Chart]:
    share = {"from_zero": True, "scale": 100.0}
    yield from over_time(curves, "Groups kept by the filter", "% of the groups so far", "kept_share", **share)
    yield from waste_charts(curves, "tokens")


def _policy_charts(curves: Curves) -> Iterator[Chart]:
    yield from over_time(curves, "Reward of what is learnt from", "reward", "reward/mean")
    yield from over_time(curves, "Entropy", "nats per token", "entropy", from_zero=True, colour="purple")
    yield from over_time(curves, "Length of completions", "tokens", "length/mean", from_zero=True, colour="green")
    yield from over_time(
        curves, "Cut off at the most tokens", "% of completions", "length/cut_fraction", scale=100.0, from_zero=True
    )
    yield from over_time(
        curves, "Clipped tokens", "% of tokens", "ratio/clipped_fraction", scale=100.0, from_zero=True, colour="orange"
    )
    yield from over_time(curves, "Gradient norm before clipping", "norm", "gradient_norm", from_zero=True)
    yield from over_time(curves, "Loss", "loss", "loss", colour="orange")
    yield from over_time(curves, "Divergence from the reference", "nats per token", "kl/reference", colour="purple")


def _staleness_charts(curves: Curves) -> Iterator[Chart]:
    names = {"mean": ("staleness/mean", "blue"), "oldest": ("staleness/max", "orange")}
    yield from together(curves, "Age of tokens at their update", "versions behind the learner", names, from_zero=True)
    names = {"mean": ("gap/mean", "blue"), "largest": ("gap/max", "orange")}
    yield from together(
        curves, "Log-probabilities: actor against learner, same weights", "|difference|, nats", names, from_zero=True
    )


def _lags(curves: Curves) -> str:
    """How many tokens were learnt from at each lag, over the whole run."""
    prefix = "staleness/lag_"
    lags = sorted(int(name[len(prefix) :]) for name in curves.names() if name[len(prefix) :].isdecimal())
    counts = {lag: float(np.nansum(curves.get(f"{prefix}{lag}"))) for lag in lags}
    whole = sum(counts.values())
    if not whole:
        return ""
    rows = "".join(
        f"<tr><td>{lag}{' or more' if lag == _OLDEST else ''}</td>"
        f'<td class="number">{100 * count / whole:.1f} %</td>'
        f'<td style="width:50%"><div class="part" style="width:{100 * count / whole:.2f}%"></div></td></tr>'
        for lag, count in counts.items()
        if count
    )
    return (
        '<table class="times"><thead><tr><th>versions behind</th><th class="number">share of the tokens learnt from'
        f"</th><th></th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _throughput_charts(curves: Curves) -> Iterator[Chart]:
    yield from over_time(curves, "Completions per second", "completions/s", "samples_per_s", from_zero=True)
    names = {
        "sampled, over the whole system": ("sampled_tokens_per_s", "green"),
        "while decoding": ("decode_tokens_per_s", "blue"),
        "while updating": ("learner_tokens_per_s", "orange"),
    }
    yield from together(curves, "Tokens per second", "tokens/s", names, from_zero=True)
    yield from over_time(curves, "Groups that wait for the learner", "groups", "waiting_groups", from_zero=True)


def _example_table(examples: Sequence[Mapping[str, Any]]) -> str:
    """Some completions, evenly over the run."""
    if not examples:
        return '<p class="faint">No completions were kept.</p>'
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(_MOST_EXAMPLES, len(examples))).astype(int))
    shown = [examples[int(index)] for index in chosen]
    given = " What is pale was given as a hint." if any(one.get("hint") for one in shown) else ""
    rows = "".join(
        f'<tr><td class="number">{escape(str(one.get("step")))}</td><td>{_cut(one.get("family"))}</td>'
        f"<td><code>{_cut(one.get('prompt'))}</code></td><td>{_answer(one)}</td>"
        f'<td class="number">{_reward(one.get("reward"))}</td><td>{_verdict(one)}</td></tr>'
        for one in shown
    )
    return (
        f'<p class="faint">{len(chosen)} of the {len(examples):,} completions in examples.jsonl.{given}</p><div class="scroll"><table>'
        '<thead><tr><th class="number">step</th><th>family</th><th>prompt</th><th>completion</th><th class="number">reward</th>'
        f"<th>verdict</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cut(text: Any) -> str:
    """Text of any length as escaped HTML."""
    text = str(text)
    more = len(text) - _MOST_CHARACTERS
    return escape(text) if more <= 0 else f"{escape(text[:_MOST_CHARACTERS])}… ({more:,} more)"


def _answer(one: Mapping[str, Any]) -> str:
    hint, text = str(one.get("hint") or ""), str(one.get("completion"))
    given = f'<span class="faint">{_cut(hint)}</span>' if hint else ""
    return f"<code>{given}{_cut(text)}</code>" if text else f'<code>{given}</code><span class="faint">(nothing)</span>'


def _reward(value: Any) -> str:
    return f"{value:g}".replace("-", "−") if isinstance(value, (int, float)) else "–"


def _verdict(one: Mapping[str, Any]) -> str:
    passed, reason = one.get("passed"), str(one.get("reason") or "")
    return ("passed" if passed else "failed") + (f": {_cut(reason)}" if reason else "")
