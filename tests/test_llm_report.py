"""The page and the live table of a language-model run: numbers that agree with the metrics, everything escaped, nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.llm.rollout import Example
from cluster.charts import Curves
from cluster.llm import report
from cluster.llm.examples import FILE, MOST_PER_STEP, ExampleFile, read_examples
from cluster.llm.live import LlmLive
from cluster.llm.report import write_report
from cluster.metrics import MetricsWriter
from cluster.runs import RunFolder
from configs.llm import LlmConfig
from learners.llm.measures import LAGS
from tests.test_report import Page, cells_of

SETTINGS: dict[str, Any] = {
    "kind": "llm",
    "stop": {"updates": 40, "pass_at_1": 0.9},
    "eval": {"attempts": [1, 4], "samples": 4, "families": ["<2> numbers", "3 numbers"]},
}


def config_of(root: Path, name: str, **more: Any) -> LlmConfig:
    return LlmConfig.model_validate({**SETTINGS, "root": str(root), "name": name, **more})


def a_row(tick: int, families: tuple[str, ...]) -> dict[str, float | None]:
    row: dict[str, float | None] = {
        "time_s": tick,
        "wall_s": tick + 4,
        "step": tick,
        "updates": tick,
        "samples": 100 * tick,
        "sampled_tokens": 900 * tick,
        "groups": 10 * tick,
        "kept_groups": 6 * tick,
        "kept_share": 0.6,
        "unscored": 2 * tick,
        "failed": 3 if tick > 5 else 0,
        "samples_per_s": 100.0,
        "sampled_tokens_per_s": 900.0,
        "decode_tokens_per_s": 5000.0,
        "learner_tokens_per_s": 3000.0,
        "waiting_groups": 2,
        "waste/share": 0.4,
        "waste/too_hard": 0.3,
        "waste/too_easy": 0.1,
        "waste/stale": 0.0,
        "waste/unscored": 0.02,
        "loss": 0.1,
        "tokens": 77.0,
        "entropy": 1.5,
        "gradient_norm": 1.0,
        "reward/mean": tick / 40,
        "length/mean": 9.0,
        "length/cut_fraction": 0.05,
        "ratio/clipped_fraction": 0.01,
        "staleness/mean": 0.5,
        "staleness/max": LAGS + 3,
        "staleness/lag_0": 60,
        "staleness/lag_1": 30,
        "staleness/lag_2": 0,
        f"staleness/lag_{LAGS}": 10,
        "gap/mean": 1e-6,
        "gap/max": 1e-5,
    }
    for name in ("decode_s", "verify_s", "write_s", "idle_s"):
        row[f"time/actor/{name}"] = 0.2 * tick
    for name in ("update_s", "wait_s", "publish_s"):
        row[f"time/learner/{name}"] = 0.3 * tick
    row |= {"time/actor/wall_s": tick, "time/learner/wall_s": tick}
    for number, family in enumerate(families):
        row |= {f"family/{family}/pass_rate": 0.1 * number, f"family/{family}/drawn": 1 / len(families)}
    if tick % 10 == 0 or tick == 1:
        row |= {
            "eval/step": tick - 1,
            "eval/pass_at_1": tick / 80,
            "eval/pass_at_4": tick / 50,
            "eval/greedy": tick / 60,
        }
        row |= {"eval/unscored": 4 if tick == 40 else 0, "eval/failed": 0}
        for family in families:
            row |= {f"eval/{family}/pass_at_1": tick / 80, f"eval/{family}/greedy": tick / 60}
    return row


def make_run(
    root: Path, name: str, *, rows: int = 40, families: tuple[str, ...] = ("<2> numbers", "3 numbers")
) -> Path:
    run = RunFolder.create(config_of(root, name), ["millrace", "train", "--name", "<i>&'\"x"])
    with MetricsWriter(run.path) as metrics:
        for tick in range(1, rows + 1):
            metrics.write(a_row(tick, families))
    run.event("restart", "actor 1 died <script>alert('x')</script>", time_s=12.0)
    run.finished({"stop_reason": "40 of 40 learner steps done"})
    return run.path


def an_example(number: int, **changes: Any) -> Example:
    given: dict[str, Any] = {
        "family": "3 numbers",
        "prompt": f"{number},2,3=6:",
        "hint": "",
        "completion": "1+2+3",
        "reward": 1.0,
        "passed": True,
        "reason": "",
        "version": number,
        "group": number,
    }
    return Example(**{**given, **changes})


NASTY = "</code></td><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028\x85 next"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = make_run(tmp_path_factory.mktemp("runs"), "first")
    file = ExampleFile(path)
    file.add(
        [an_example(0, prompt="<b>4</b>:", completion=NASTY, reason="<u>wrong</u>", reward=-0.5, passed=False)], step=0
    )
    file.add([an_example(1, completion="\ud800 lone", family="<i>family</i>")], step=1)
    file.add([an_example(2, hint="(1+", completion="", passed=False, reward=0.0, reason="ends too early")], step=2)
    file.add([an_example(3, completion="long " * 1000)], step=3)
    with (path / FILE).open("a") as lines:
        lines.write('{"step": 4, "cut sho')  # as a crash leaves it
    assert write_report(path) == path / "report.html"
    return (path / "report.html").read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", Page(html).text)


def test_the_page_is_whole_and_fetches_nothing(html: str) -> None:
    page = Page(html)
    assert {link for link in page.links if not link.startswith("#")} == set()
    assert "http" not in html
    assert {"script", "img", "link", "iframe", "object", "u"} & set(page.tags) == set()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert 0 < len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


@pytest.mark.parametrize(
    "shown",
    [
        "pass@1 over <2> numbers, 3 numbers 0.500 after, 0.013 before",
        "greedy over <2> numbers, 3 numbers 0.667 after, 0.017 before",
        "Completions sampled 4,000 , 36,000 tokens",
        "Groups kept 240 of 400",
        "Tokens wasted 40.0 %",
        "Completions nobody could judge 80",
        "Prompts that could not be sampled 3 , too long for the model, or with unknown characters",
        "Held-out completions nobody could judge 4 , at the last evaluation, left out of it",
        "met : 40 learner steps 40 of 40 learner steps done",
        "Learner steps 40",
        "<2> numbers 0.013 0.500 0.017 0.667 0.000 50.0 %",
        "3 numbers 0.013 0.500 0.017 0.667 0.100 50.0 %",
        f"0 60.0 % 1 30.0 % {LAGS} or more 10.0 %",
        "Actors 40.0 s",
        "decoding 20.0 % 8.0",
        "Learner 40.0 s",
    ],
)
def test_figures_are_those_of_the_metrics(html: str, shown: str) -> None:
    assert shown in text_of(html)


@pytest.mark.parametrize(
    "title",
    [
        *(
            "Against learner steps",
            "Against completions sampled",
            "Against time",
            "pass@1 by family",
            "Greedy by family",
        ),
        *(
            "Predicted pass rate by family",
            "Share of the latest draws by family",
            "Groups kept by the filter",
            "Tokens thrown away, and why",
        ),
        *("Reward of what is learnt from", "Entropy", "Length of completions", "Cut off at the most tokens"),
        *("Clipped tokens", "Gradient norm before clipping", "Loss", "Age of tokens at their update"),
        *("Log-probabilities: actor against learner, same weights", "Completions per second"),
        *("Tokens per second", "Groups that wait for the learner"),
    ],
)
def test_every_curve_is_there(html: str, title: str) -> None:
    assert f"<figcaption>{title}</figcaption>" in html


def test_what_nobody_could_judge_is_waste_too_and_tokens_are_those_of_the_whole_system(tmp_path: Path) -> None:
    curves = Curves.read(make_run(tmp_path, "a"))
    (waste,) = (c for c in report._curriculum_charts(curves) if c.title == "Tokens thrown away, and why")
    assert {line.label: line.y[-1] for line in waste.series}["nobody could judge"] == 0.02
    (tokens,) = (c for c in report._throughput_charts(curves) if c.title == "Tokens per second")
    assert {line.label: line.y[-1] for line in tokens.series}["sampled, over the whole system"] == 900.0


def test_completions_are_text_whatever_they_hold(html: str) -> None:
    text = Page(html).text
    assert "4 of the 4 completions in examples.jsonl. What is pale was given as a hint." in text_of(html)
    assert "</code></td><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028" in text
    assert "<b>4</b>:" in text
    assert "<i>family</i>" in text
    assert "failed: <u>wrong</u>" in text
    assert "−0.5" in text
    assert "? lone" in text  # a surrogate, which UTF-8 has no form for
    assert '<span class="faint">(1+</span></code><span class="faint">(nothing)</span>' in html
    assert "… (4,400 more)" in text
    assert "failed: ends too early" in text
    assert "actor 1 died <script>" in text


def test_a_run_without_metrics_says_what_is_missing(tmp_path: Path) -> None:
    run = RunFolder.create(config_of(tmp_path, "empty"), [])
    text = text_of(write_report(run.path).read_text())
    for sentence in (
        "No evaluation had ended when the metrics were last written.",
        "No group had ended when the metrics were last written.",
        "No update had been made when the metrics were last written.",
        "No group had been learnt from when the metrics were last written.",
        "No throughput had been measured when the metrics were last written.",
        "No completions were kept.",
        "No process had reported its times when the metrics were last written.",
        "No events were recorded.",
        "pass@1 over <2> numbers, 3 numbers not measured",
        "not met : 40 learner steps, pass@1 ≥ 0.90 still going on, or ended without a summary",
    ):
        assert sentence in text, sentence
    assert "nan" not in text
    assert "None" not in text.partition("Resolved settings")[0]


def test_one_evaluation_is_not_called_a_change(tmp_path: Path) -> None:
    text = text_of(write_report(make_run(tmp_path, "short", rows=5)).read_text())
    assert "pass@1 over <2> numbers, 3 numbers 0.013 , measured once" in text


def test_many_families_are_a_table_and_no_tangle_of_lines(tmp_path: Path) -> None:
    families = tuple(f"family {n}" for n in range(9))
    html = write_report(make_run(tmp_path, "many", families=families)).read_text()
    assert "pass@1 by family" not in html
    assert len(cells_of(html, "Predicted pass rate by family of family")) == 9
    for family in families:
        assert f"<td>{family}</td>" in html


def test_families_are_mapped_over_learner_steps(html: str) -> None:
    cells = cells_of(html, "Predicted pass rate by family")
    assert cells == [("<2> numbers\n0 to 40", "0.00"), ("3 numbers\n0 to 40", "0.10")]
    assert {figure for _, figure in cells_of(html, "Share of the latest draws by family")} == {"50.0 %"}
    assert "across: learner steps" in text_of(html)


def test_the_oldest_lag_is_that_of_the_learner() -> None:
    assert report._OLDEST == LAGS


def test_examples_are_a_few_of_every_step(tmp_path: Path) -> None:
    file = ExampleFile(tmp_path)
    file.add([an_example(n) for n in range(3)], step=1)
    file.add([an_example(n) for n in range(3, 9)], step=1)
    file.add([], step=2)
    file.add([an_example(9, completion=NASTY)], step=3)
    found = list(read_examples(tmp_path))
    assert [(one["step"], one["group"]) for one in found] == [(1, n) for n in range(MOST_PER_STEP)] + [(3, 9)]
    assert found[-1]["completion"] == NASTY
    assert list(read_examples(tmp_path / "nothing")) == []
    ExampleFile(tmp_path / "no folder").add([an_example(1)], step=1)  # as on a full disk: the run goes on


def live(**more: Any) -> LlmLive:
    return LlmLive(config_of(Path(), "a", **more), console=Console(width=120, record=True), silent=True)


def test_the_live_table_shows_the_newest_figures() -> None:
    table = live()
    for tick in range(1, 21):
        table.update(a_row(tick, ("3 numbers",)))
    assert table.title() == "countdown · embedded model · clip · a"
    pairs = dict(table.pairs())
    assert pairs["completions/s"] == "100"
    assert pairs["completions sampled"] == "2k"
    assert pairs["groups kept"] == "60%, 40% of the tokens wasted"
    assert pairs["reward learnt from"] == "0.500"
    assert pairs["last pass@1"] == "0.250 at 19 (goal 0.900)"
    assert pairs["age of tokens"] == "0.5 versions"
    assert pairs["entropy"] == "1.50 nats, 9.0 tokens"
    line = table.line()
    for cell in ("steps     20/40", "answers     2k", "pass@1 0.250", "reward  0.500", "waste  40%", "left    0:20"):
        assert cell in line, (cell, line)


def test_the_live_table_begins_without_figures() -> None:
    table = live(stop={"updates": None, "wall_s": 60.0})
    assert "pass@1     –" in table.line()
    assert dict(table.pairs())["last pass@1"] == "none yet"
    table.update({"time_s": 15.0, "updates": 0.0, "reward/mean": float("nan")})
    assert "left    0:45" in table.line()
    assert "reward      –" in table.line()
