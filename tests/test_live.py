"""The live table and its plain lines, as they come out of a console."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.live import Live
from configs.schema import EnvSettings, RunConfig, StopSettings

CONFIG = RunConfig(name="first", env=EnvSettings(id="HalfCheetah-v4"), stop=StopSettings(steps=1000, mean_return=900.0))


def row(time_s: float, env_steps: float, **more: float | None) -> dict[str, float | None]:
    return {"time_s": time_s, "wall_s": time_s + 3, "env_steps": env_steps, **more}


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=300), out


@pytest.mark.parametrize("width", [120, 60])
def test_the_table_shows_what_a_person_asks_first(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, record=True)
    with Live(CONFIG, console=console) as live:
        live.update(row(0, 0))
        live.update(
            row(10, 400, steps_per_s=40.0, updates_per_s=39.0, replay_fill=0.25, policy_lag=1.5)
            | {"samples_per_insert": 250.0, "return_mean_100": -12.5, "eval/mean_return": 55.5, "eval/step": 300.0}
        )
    text = console.export_text()
    last = text[text.rindex("HalfCheetah-v4 · sac · first") :]
    for label, value in (
        ("environment steps/s", "40"),
        ("updates/s", "39"),
        ("samples per insert", "250.0 of 256.0"),
        ("replay fill", "25% of 1M"),
        ("mean return, last 100", "-12.5"),
        ("last evaluation", "55.5 at 300 (goal 900.0)"),
        ("policy lag", "1.5 versions"),
    ):
        line = next(line for line in last.splitlines() if label in line)
        assert value in line.split(label)[1], line
    assert "400 of 1,000 steps" in last
    assert "0:15 left" in last
    # Every line of the frame is as wide as the terminal, its first one cut off above.
    assert {len(line) for line in last.splitlines()[1:]} == {width}


def test_without_a_terminal_lines_come_at_most_every_few_seconds() -> None:
    console, out = plain()
    with Live(CONFIG, console=console, line_every_s=3600.0) as live:
        for second in range(20):
            live.update(row(second, 10 * second))
        assert len(out.getvalue().splitlines()) == 1
    first, last = out.getvalue().splitlines()
    assert "steps      0/1k" in first
    # The last row is never lost, and columns stay under each other.
    assert "steps    190/1k" in last
    assert len(first) == len(last)
    assert "\x1b" not in out.getvalue()


def test_what_a_row_lacks_keeps_its_last_value() -> None:
    console, out = plain()
    with Live(CONFIG, console=console, line_every_s=0.0) as live:
        live.update({"eval/mean_return": 7.25, "eval/step": 5.0, "policy_lag": 2.0})
        live.update({"env_steps": 10.0, "policy_lag": None, "eval/mean_return": float("nan")})
    last = out.getvalue().splitlines()[-1]
    assert "7.2" in last
    assert "lag   2.0" in last


def test_lines_are_shown_as_they_are_and_silence_is_silent() -> None:
    console, out = plain()
    with Live(CONFIG, console=console) as live:
        live.say("actor [bold]3[/bold] died; see runs/first")
    assert out.getvalue() == "actor [bold]3[/bold] died; see runs/first\n"
    console, out = plain()
    with Live(CONFIG, console=console, silent=True) as live:
        live.say("hello")
        live.update(row(1, 10))
    assert out.getvalue() == ""


def time_left(stop: StopSettings, *rows: dict[str, float | None]) -> float | None:
    live = Live(CONFIG.model_copy(update={"stop": stop}), silent=True)
    for each in rows:
        live.update(each)
    return live.time_left_s()


def test_time_left_is_what_comes_first() -> None:
    half = (row(0, 0), row(50, 500))
    assert time_left(StopSettings(steps=1000), *half) == pytest.approx(50)
    assert time_left(StopSettings(steps=1000, wall_s=60), *half) == pytest.approx(10)
    assert time_left(StopSettings(steps=1000, wall_s=6000), *half) == pytest.approx(50)
    assert time_left(StopSettings(steps=None, wall_s=40), *half) == 0.0
    assert time_left(StopSettings(steps=None, mean_return=1.0), *half) is None
    assert time_left(StopSettings(steps=1000), row(0, 0)) is None
    assert time_left(StopSettings(steps=500), *half) == 0.0


def test_time_left_follows_the_pace_of_the_last_minute() -> None:
    fast = [row(second, 100 * second) for second in range(11)]
    slow = [row(10 + second, 1000 + second) for second in range(1, 101)]
    assert time_left(StopSettings(steps=1200), *fast, *slow) == pytest.approx(100)


TASKS = CONFIG.model_validate(
    {**CONFIG.model_dump(), "tasks": {"product": {"size": [5, 8]}}, "curriculum": {"draw": "band", "filter": "band"}}
    | {"stop": {"steps": 1000, "success": 0.9}}
)


def test_of_tasks_success_and_waste_are_shown() -> None:
    live = Live(TASKS, silent=True)
    assert live.title() == "HalfCheetah-v4 · band · sac · first"
    pairs = dict(live.pairs())
    assert (pairs["pass rate of what is drawn"], pairs["last success"]) == ("–", "none yet (goal 0.90)")
    live.update(
        row(10, 400, return_mean_100=7.0, **{"eval/mean_success": 0.25, "eval/mean_return": 55.5, "eval/step": 300})
    )
    live.update(
        row(11, 440, episodes=12.0, **{"waste/share": 0.4})
        | {"task/a b/drawn": 0.75, "task/a b/pass_rate": 0.2, "task/c/d/drawn": 0.25, "task/c/d/pass_rate": 1.0}
        | {"task/e/drawn": 0.5, "task/e/pass_rate": float("nan")}
    )
    pairs = dict(live.pairs())
    assert pairs["pass rate of what is drawn"] == "0.40"
    assert pairs["last success"] == "0.25 at 300 (goal 0.90)"
    assert pairs["episodes"] == "12, 40% of the steps wasted"
    assert "mean return, last 100" not in pairs
    line = live.line()
    for cell in ("passed  0.40", "success  0.25", "waste  40%"):
        assert cell in line, (cell, line)
    assert "return" not in line


def test_without_tasks_nothing_is_said_of_them() -> None:
    live = Live(CONFIG, silent=True)
    live.update(row(10, 400, **{"eval/mean_success": 0.25, "waste/share": 0.4, "episodes": 3.0}))
    assert dict(live.pairs())["last evaluation"] == "none yet (goal 900.0)"
    assert dict(live.pairs())["episodes"] == "3"
    assert "waste" not in live.line()
