"""report.html: one self-contained page about a run, made from what its folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from cluster.charts import Chart, Curves, Series, learning_curve_png, time_axis
from cluster.page import (
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
from cluster.task_report import curriculum_maps, success_section, task_facts, task_tables, waste_charts, wastes
from configs.algorithms import CLASSIFICATION
from configs.llm import LlmConfig
from configs.schema import RunConfig

__all__ = ["learning_curve_png", "write_report"]

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


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    Only config.yaml has to be there; a sentence stands for whatever else is missing.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        DiskFullError: no room for the page; an older one is kept.
    """
    run = RunFolder.open(run_folder)
    if isinstance(run.config, LlmConfig):
        from cluster.llm.report import write_report as write_llm_report

        return write_llm_report(run_folder)
    facts = facts_of(run_folder)
    curves = Curves.read(run_folder)
    remark = "The rate limiter holds back whoever runs ahead of the set samples per insert; several callers may wait at once."
    sections = (
        _summary(run.config, facts, curves),
        *(_task_sections(run.config, curves) if run.config.has_tasks else ()),
        "<h2>Return</h2>",
        charts_html(_return_charts(run.config, curves), "No episode had ended when the metrics were last written."),
        "<h2>Throughput</h2>",
        charts_html(_throughput_charts(run.config, curves), "No throughput was measured."),
        "<h2>Replay and policy lag</h2>",
        charts_html(_replay_charts(run.config, curves), "Nothing was measured of the replay service."),
        "<h2>Losses</h2>",
        charts_html(_loss_charts(run.config, curves), "No update had been made when the metrics were last written."),
        "<h2>Where time went</h2>",
        time_table(curves, _STATES, remark),
        "<h2>Events</h2>",
        event_table(events_of(run_folder)),
        "<h2>How it was run</h2>",
        how(run_folder, facts),
    )
    return write_page(run_folder, run.config.name or run_folder.name, sections)


def _task_sections(config: RunConfig, curves: Curves) -> Iterator[str]:
    yield "<h2>Success</h2>"
    yield success_section(config, curves)
    maps = [m for kind in ("task", "family") for m in curriculum_maps(curves, kind, "env_steps", "environment steps")]
    yield "<h2>Tasks</h2>"
    yield charts_html(iter(()), "No task had been drawn when the metrics were last written.", maps)
    yield task_tables(curves)


def _summary(config: RunConfig, facts: dict[str, Any], curves: Curves) -> str:
    steps_at, returns, spreads = curves.evaluations("env_steps")
    success = (
        curves.get("eval/mean_success")[np.isfinite(curves.get("eval/mean_return"))] if config.has_tasks else returns
    )

    def evaluation(index: int | None) -> str:
        if index is None:
            return "none"
        mean = f"{number(returns[index], 1)}</b> ± {number(spreads[index], 1)}"
        if config.has_tasks:
            return f"<b>success {number(success[index], 2)}</b>, return {mean.replace('</b>', '')} at {number(steps_at[index])} steps"
        return f"<b>{mean} at {number(steps_at[index])} steps"

    broken = curves.last("broken_episodes") or 0.0
    episodes = number(curves.last("episodes")) + (f" ({number(broken)} broken)" if broken else "")
    pairs = (
        *(task_facts(config, curves) if config.has_tasks else [("Environment", f"<b>{escape(config.env.id)}</b>")]),
        ("Algorithm", f"<b>{escape(config.algorithm.name)}</b>"),
        ("Seed", f"<b>{config.seed}</b>"),
        ("Best evaluation", evaluation(int(np.argmax(success)) if len(returns) else None)),
        ("Last evaluation", evaluation(len(returns) - 1 if len(returns) else None)),
        ("Stop condition", _stop(config, facts, curves)),
        ("Environment steps", f"<b>{number(curves.last('env_steps'))}</b>"),
        ("Updates", f"<b>{number(curves.last('updates'))}</b>"),
        ("Wall time", f"<b>{duration(curves.total('wall_s'))}</b>"),
        ("Episodes", escape(episodes)),
        ("Started", started_text(facts)),
        ("Machine", machine_text(facts)),
    )
    return fact_list(pairs)


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
        (met if reached else missed).append(f"mean return ≥ {number(stop.mean_return, 1)}")
    if stop.success is not None:
        success = curves.get("eval/mean_success")
        (met if (success >= stop.success).any() else missed).append(f"success ≥ {number(stop.success, 2)}")
    return verdict(met, missed, facts)


def _return_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    unit_s, time_label = time_axis(curves.total("time_s") or 0.0)
    goal = config.stop.mean_return
    levels = {f"goal {number(goal, 1)}": goal} if goal is not None else {}
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


def _throughput_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    yield from over_time(curves, "Environment steps per second", "steps/s", "steps_per_s", from_zero=True)
    yield from over_time(curves, "Updates per second", "updates/s", "updates_per_s", from_zero=True, colour="green")
    if config.has_tasks and wastes(config, curves):
        yield from waste_charts(curves, "steps")


def _replay_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    fill = {"scale": 100.0, "from_zero": True}
    yield from over_time(curves, "Replay fill", "% of capacity", "replay_fill", **fill)
    target = {f"target {config.samples_per_insert:g}": config.samples_per_insert}
    unit = "windows sampled per step inserted"
    yield from over_time(
        curves, "Samples per insert", unit, "samples_per_insert", from_zero=True, colour="green", levels=target
    )
    unit = "versions behind the newest weights"
    yield from over_time(curves, "Policy lag", unit, "policy_lag", from_zero=True, colour="purple")


def _loss_charts(config: RunConfig, curves: Curves) -> Iterator[Chart]:
    critic = curves.get("loss/critic")
    positive = critic[np.isfinite(critic)]
    log = bool(len(positive) and positive.min() > 0 and positive.max() > 30 * positive.min())
    kind = "" if config.algorithm.name == "custom" else config.algorithm.head.kind
    # A head of the user's may measure its loss in anything.
    unit = "cross-entropy, nats" if kind in CLASSIFICATION else "half the squared error" if kind == "mse" else "loss"
    yield from over_time(curves, "Critic loss", unit, "loss/critic", log=log)
    yield from over_time(curves, "Loss of the distilled critic", unit, "loss/distilled", colour="purple")
    unit = "temperature × log-probability − value"
    yield from over_time(curves, "Policy loss", unit, "loss/policy", colour="orange")
    yield from over_time(curves, "Loss of the value network", "implicit regression loss", "loss/value", colour="orange")
    yield from over_time(curves, "Flow loss", "squared error of the velocity", "loss/flow", colour="purple")
    unit = "discounted return"
    names = {"critics": ("q/mean", "green"), "targets": ("q/target", "orange"), "value network": ("value/mean", "blue")}
    yield from together(curves, "Mean value estimate", unit, names)
    share = {"scale": 100.0, "from_zero": True, "colour": "orange"}
    yield from over_time(curves, "Targets outside of the support", "% of targets", "value/clipped_fraction", **share)
    ends = {"highest value": ("support/high", "blue"), "lowest value": ("support/low", "purple")}
    yield from together(curves, "Support of the value head", unit, ends)
    yield from over_time(curves, "Temperature", "reward per nat", "temperature", colour="purple")
    yield from over_time(curves, "Policy entropy", "nats", "entropy", colour="blue")
