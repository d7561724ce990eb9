"""What the page tells of tasks: the maps, the table and the curves hold the figures of the rows, whatever tasks are called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.charts import Curves
from cluster.metrics import MetricsWriter
from cluster.report import write_report
from cluster.runs import RunFolder
from cluster.task_map import binned, map_style, short_labels
from cluster.task_report import curriculum_changes, curriculum_maps, drops, labels_of, task_count
from configs.schema import RunConfig
from tests.test_report import Page, cells_of

NAMES = ("Grid/easy <1>", "Grid/hard & long", "Grid/never")
Row = dict[str, float | None]


def config_of(root: Path, names: tuple[str, ...] = NAMES, **more: Any) -> RunConfig:
    given: dict[str, Any] = {
        "root": str(root),
        "name": "tasks",
        "env": {"id": "Grid<b>-v0"},
        "tasks": {"list": [{"name": name} for name in names]},
        "curriculum": {"draw": "staged", "filter": "band"},
        "stop": {"steps": 400, "success": 0.5},
    }
    return RunConfig.model_validate(given | more)


def a_row(tick: int) -> Row:
    """The second task is drawn from tick 3 on, the third never; at tick 3 the curriculum changes."""
    easy, hard, never = (f"task/{name}" for name in NAMES)
    row: Row = {
        "time_s": tick,
        "wall_s": tick,
        "env_steps": 100 * tick,
        "curriculum/changes": float(tick >= 3),
        "outcomes_lost": 2.0,
        "waste/share": 0.25,
        "waste/too_hard": 0.25,
        "waste/sampled_steps": 130.0 * tick,
        f"{easy}/pass_rate": 0.1 * tick,
        f"{easy}/drawn": 1.0 if tick < 3 else 0.6,
        f"{easy}/return": 3.5,
        f"{easy}/length": 20.0,
        f"{hard}/pass_rate": 0.5 if tick < 4 else 0.05,
        f"{hard}/drawn": 0.0 if tick < 3 else 0.4,
        f"{never}/pass_rate": 0.5,
        f"{never}/drawn": 0.0,
    }
    if tick >= 4:
        row |= {f"{hard}/return": -1.25, f"{hard}/length": 40.0}
    if tick in (2, 4):
        success = {2: (0.75, 0.25), 4: (0.25, 0.5)}[tick]
        row |= {"eval/mean_return": 2.0, "eval/std_return": 1.0, "eval/step": 100 * tick - 10}
        row |= {"eval/mean_success": sum(success) / 2, "eval/worst_drop": 0.5 if tick == 4 else 0.0}
        for name, share in zip(NAMES, success, strict=False):
            row |= {f"eval/task/{name}/success": share, f"eval/task/{name}/return": 10 * share}
    return row


def page_of(config: RunConfig, rows: list[Row]) -> str:
    run = RunFolder.create(config, ["millrace"])
    with MetricsWriter(run.path) as metrics:
        for row in rows:
            metrics.write(row)
    html = write_report(run.path).read_text(encoding="utf-8")
    Page(html)
    return html


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(config_of(tmp_path_factory.mktemp("runs")), [a_row(tick) for tick in range(5)])


def test_cells_are_the_rows(html: str) -> None:
    assert cells_of(html, "Predicted pass rate by task of Grid") == [
        ("easy <1>\n0 to 100", "0.05"),  # the row at step 0 and the one at 100
        ("easy <1>\n100 to 200", "0.20"),
        ("easy <1>\n200 to 300", "0.30"),
        ("easy <1>\n300 to 400", "0.40"),
        ("hard & long\n300 to 400", "0.05"),  # drawn before, but no episode had ended
    ]
    assert cells_of(html, "Share of the latest draws by task of Grid") == [
        ("easy <1>\n0 to 200", "100.0 %"),
        ("easy <1>\n200 to 400", "60.0 %"),
        ("hard & long\n200 to 400", "40.0 %"),
    ]
    assert html.count("300 environment steps: the curriculum changed") == 2


@pytest.mark.parametrize(
    "shown",
    [
        "Tasks 3 of Grid<b>-v0",
        "Curriculum staged , 10 % of the draws uniform",
        "Filter band , pass rates 0.2 to 0.8 of 8 episodes",
        "Environment steps wasted 25.0 % of 520",
        "Worst drop since the curriculum last changed 0.50 , Grid/easy <1>",
        "Outcomes lost 2 , missing in the record of the tasks",
        "Best evaluation success 0.50 , return 2.0 ± 1.0 at 190 steps",
        "Last evaluation success 0.38 , return 2.0 ± 1.0 at 390 steps",
        "met : 400 steps, success ≥ 0.50",
        "Grid/easy <1> 0.40 60.0 % 3.50 20.0 2.50 7.50 0.25 0.75 0.50",
        "Grid/hard & long 0.05 40.0 % −1.25 40.0 5.00 5.00 0.50 0.50 0.00",
        "Grid/never – – – – – – – – –",
    ],
)
def test_figures_are_those_of_the_metrics(html: str, shown: str) -> None:
    assert shown in text_of(html)


def test_curves_are_there_and_names_are_escaped(html: str) -> None:
    for title in ("Success in evaluations", "Success by task", "Steps thrown away, and why"):
        assert f"<figcaption>{title}</figcaption>" in html
    assert "<1>" not in html
    assert "<b>-v0" not in html
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg) == []


def test_many_tasks_are_a_map_of_success_and_no_tangle_of_lines(tmp_path: Path) -> None:
    names = tuple(f"{'a long name of a task ' * 4}{number}" for number in range(64))
    row: Row = {
        "env_steps": 1000.0,
        "time_s": 1.0,
        "eval/mean_return": 1.0,
        "eval/mean_success": 0.5,
        "eval/step": 1000.0,
    }
    for number, name in enumerate(names):
        row |= {f"task/{name}/pass_rate": number / 100, f"task/{name}/drawn": 1 / 64, f"task/{name}/length": 5.0}
        row |= {f"eval/task/{name}/success": number / 200}
    html = page_of(config_of(tmp_path, names), [row])
    beginning = f"of {'a long name of a task ' * 4}".rstrip()
    # In the order of the set, which is not that of the alphabet.
    cells = cells_of(html, f"Predicted pass rate by task {beginning}")
    assert cells == [(f"{number}\n0 to 1,000", f"{number / 100:.2f}") for number in range(64)]
    cells = cells_of(html, f"Success in evaluations by task {beginning}")
    assert [figure for _, figure in cells] == [f"{number / 200:.2f}" for number in range(64)]
    assert "Success by task" not in html
    assert html.count('<td class="name">') == 64


def test_more_families_than_fit_are_said_to_be_left_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, tasks={"source": "tasks.jsonl"})
    row: Row = {"env_steps": 10.0}
    row |= {f"family/f{number}/drawn": 0.01 for number in range(100)}
    row |= {f"family/f{number}/pass_rate": 0.5 for number in range(100)}
    html = page_of(config, [row])
    assert len(cells_of(html, "Predicted pass rate by family (the first 64 of 100)")) == 64
    assert "Tasks tasks.jsonl" in text_of(html)
    assert html.count('<td class="name">') == 100


@pytest.mark.parametrize("name", ["$\\frac{", "_a/b", "x" * 300, "pass_rate", "</title><script>"])
def test_a_single_task_of_any_name(tmp_path: Path, name: str) -> None:
    row: Row = {"env_steps": 5.0, "eval/mean_return": 1.0, "eval/step": 5.0}
    row |= {f"task/{name}/pass_rate": 0.25, f"task/{name}/drawn": 1.0, f"task/{name}/length": 9.0}
    row |= {f"eval/task/{name}/success": 0.5, f"eval/task/{name}/return": 1.0}
    html = page_of(config_of(tmp_path, (name,)), [row])
    assert cells_of(html, "Predicted pass rate by task") == [(f"{name}\n0 to 5", "0.25")]
    assert "<script" not in html
    assert "Success by task" in html


def test_rows_without_figures_leave_sentences(tmp_path: Path) -> None:
    html = page_of(config_of(tmp_path), [])
    assert "No task had been drawn" in html
    assert 'class="map"' not in html
    assert "nan" not in text_of(html)
    some: Row = {"env_steps": 0.0, "task/a/pass_rate": 0.5, "task/a/drawn": 1.0, "task/b/pass_rate": float("nan")}
    html = page_of(config_of(tmp_path, name="beginning"), [some, {"env_steps": None, "task/a/drawn": 1.0}])
    assert 'class="map"' not in html, "there is no length to draw along"
    html = page_of(
        config_of(tmp_path, name="gaps"), [{**a_row(1), f"task/{NAMES[0]}/pass_rate": float("nan")}, a_row(2)]
    )
    assert cells_of(html, "Predicted pass rate by task of Grid") == [("easy <1>\n100 to 200", "0.20")]
    assert "nan" not in text_of(html)


def test_without_tasks_the_page_says_nothing_of_them(tmp_path: Path) -> None:
    html = page_of(
        RunConfig(root=str(tmp_path), name="plain"), [{"env_steps": 10.0, "time_s": 1.0, "eval/mean_return": 1.0}]
    )
    text = text_of(html)
    assert "Environment Pendulum-v1" in text
    assert "Curriculum" not in text.partition("Resolved settings")[0]
    assert ".map" not in html


def curves_of(rows: list[Row]) -> Curves:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Curves({name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names})


def test_drops_count_from_the_last_evaluation_before_the_curriculum_changed() -> None:
    def row(step: int, changes: int, *success: float) -> Row:
        found: Row = {"env_steps": step, "curriculum/changes": changes}
        return found | {f"eval/task/{name}/success": value for name, value in zip("abc", success, strict=False)}

    rows = [row(1, 0, 0.9, 0.2), row(2, 0, 0.5, 0.6), row(3, 1), row(4, 1, 0.1, 0.7), row(5, 1, 0.25, 0.5, 1.0)]
    assert drops(curves_of(rows)) == {"a": 0.25, "b": pytest.approx(0.1)}
    # An evaluation stands in the row after it, whose count is newer than the evaluation.
    assert drops(curves_of([*rows[:2], row(4, 1, 0.1, 0.7)])) == {"a": pytest.approx(0.8), "b": 0.0}
    assert drops(curves_of([])) == {}
    assert curriculum_changes(curves_of(rows), "env_steps") == [3.0]


def test_families_are_known_once_they_are_drawn() -> None:
    rows: list[Row] = [
        {
            "updates": 1.0,
            "family/a/pass_rate": 0.5,
            "family/a/drawn": 0.0,
            "family/b/pass_rate": 0.3,
            "family/b/drawn": 1.0,
        },
        {
            "updates": 2.0,
            "family/a/pass_rate": 0.4,
            "family/a/drawn": 0.1,
            "family/b/pass_rate": 0.2,
            "family/b/drawn": 0.9,
        },
    ]
    rate, drawn = curriculum_maps(curves_of(rows), "family", "updates", "learner steps")
    np.testing.assert_array_equal(rate.values, [[np.nan, 0.4], [0.3, 0.2]])
    np.testing.assert_array_equal(drawn.values, [[np.nan, 0.1], [1.0, 0.9]])


@given(steps=st.lists(st.integers(0, 10**9), min_size=1, max_size=40), most=st.integers(1, 12), seed=st.integers(0, 99))
def test_cells_hold_the_means_of_their_rows_and_leave_no_gap(steps: list[int], most: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = np.where(generator.random((3, len(steps))) < 0.3, np.nan, generator.random((3, len(steps))))
    found = binned(np.array(steps, np.float64), values, most=most)
    end = max(steps)
    if not np.isfinite(values).any() or end == 0:
        assert found is None
        return
    assert found is not None
    begin = min(step for step in steps if step)
    rows_of: dict[int, list[int]] = {}
    for row, step in enumerate(steps):
        rows_of.setdefault(-(-(step or begin) * most // end), []).append(row)
    edges, means = found
    np.testing.assert_allclose(edges, [0, *(part * end / most for part in sorted(rows_of))])
    for cell, part in enumerate(sorted(rows_of)):
        for task in range(3):
            known = [value for value in values[task, rows_of[part]] if np.isfinite(value)]
            assert means[task, cell] == pytest.approx(np.mean(known) if known else np.nan, nan_ok=True)


def test_binned_means_by_hand() -> None:
    edges, means = binned(np.array([0.0, 10, 50, 60, np.nan, 100]), np.array([[1.0, 2, 3, np.nan, 9, 5]]), most=4) or (
        (),
        (),
    )
    np.testing.assert_allclose(edges, [0, 25, 50, 75, 100])
    np.testing.assert_allclose(means, [[1.5, 3, np.nan, 5]])


def test_labels_and_their_beginnings() -> None:
    curves = curves_of(
        [{"task/b/x/pass_rate": 1.0, "task/a/drawn": 1.0, "task/none/drawn": None, "eval/task/c/success": 1.0}]
    )
    assert labels_of(curves, "task/", "/pass_rate", "/drawn") == ["b/x", "a"]
    assert short_labels(["M/reach-v2", "M/push-v2"]) == ("M", ["reach-v2", "push-v2"])
    assert short_labels(["G size=5", "G size=6 n=2"]) == ("G", ["size=5", "size=6 n=2"])
    assert short_labels(["G ", "G x"]) == ("", ["G ", "G x"])
    assert short_labels(["G x"]) == ("", ["G x"])
    assert short_labels([]) == ("", [])


def test_the_number_of_tasks_is_that_of_the_settings(tmp_path: Path) -> None:
    def count(tasks: dict[str, Any], *rows: Row) -> int | None:
        return task_count(config_of(tmp_path, tasks=tasks), curves_of(list(rows)))

    assert count({"ids": ["A-v0", "B-v0"]}) == 2
    assert count({"ids": ["A-v0", "B-v0"], "product": {"size": [1, 2, 3]}}) == 6
    assert count({"list": [{"id": "A-v0"}]}) == 1
    assert count({"source": "a.jsonl"}) is None
    assert count({"source": "a.jsonl"}, {"task/a/drawn": 1.0, "task/b/pass_rate": 0.5}) == 2


def test_pass_rates_get_lighter_all_the_way() -> None:
    colours = re.findall(r"\.rate\d+\{fill:#(\w\w)(\w\w)(\w\w)\}", map_style())
    light = [0.2126 * int(r, 16) + 0.7152 * int(g, 16) + 0.0722 * int(b, 16) for r, g, b in colours]
    assert len(light) == 21
    assert (np.diff(light) > 0).all()
