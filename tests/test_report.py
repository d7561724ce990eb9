"""report.html: one page, nothing fetched, everything escaped, and numbers that agree with the metrics."""

from __future__ import annotations

import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.charts import Curves
from cluster.metrics import MetricsWriter
from cluster.report import learning_curve_png, write_report
from cluster.runs import RunFolder
from configs.schema import EnvSettings, RunConfig, StopSettings

VOID = {"meta", "br", "path", "use", "line", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers the text and what a page could fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def cells_of(html: str, title: str) -> list[tuple[str, str]]:
    """The cells of a map, as a reader who points at them is told: task and stretch, and the figure."""
    for figure in re.findall(r'<figure class="map".*?</figure>', html, flags=re.DOTALL):
        caption = re.search(r"<figcaption>(.*?)</figcaption>", figure)
        if caption is not None and unescape(re.sub(r"<[^>]*>", "", caption[1])) == title:
            rects = re.findall(r"<rect[^>]*><title>(.*?): ([^:]*)</title>", figure, flags=re.DOTALL)
            return [(unescape(task), value) for task, value in rects]
    raise AssertionError(f"no map is called {title!r}")


def make_run(root: Path, name: str, *, seed: int = 0, rows: int = 40) -> Path:
    stop = StopSettings(steps=rows * 100, mean_return=500.0)
    config = RunConfig(root=str(root), name=name, seed=seed, env=EnvSettings(id="HalfCheetah-v4"), stop=stop)
    run = RunFolder.create(config, ["millrace", "train", "--name", "<i>&'\"x"])
    generator = np.random.default_rng(seed)
    with MetricsWriter(run.path) as metrics:
        for tick in range(1, rows + 1):
            row: dict[str, float | None] = {
                "time_s": tick,
                "wall_s": tick + 4,
                "env_steps": 100 * tick,
                "updates": 90 * tick,
                "episodes": tick // 5,
                "steps_per_s": 100 + generator.normal(),
                "updates_per_s": 90 + generator.normal(),
                "samples_per_insert": 250.0,
                "replay_fill": tick / rows,
                "policy_lag": 1.0,
                "return_mean_100": 10.0 * tick if tick > 5 else None,
                "loss/critic": 1 / tick,
                "time/learner/update_s": 0.75 * tick,
                "time/learner/wait_s": 0.15 * tick,
                "time/learner/wall_s": tick,
                "time/shard/waiting_for_samples_s": 1.5 * tick,
                "time/shard/wall_s": tick,
            }
            if tick % 10 == 0:
                row |= {"eval/mean_return": 12.0 * tick + seed, "eval/std_return": 20.0, "eval/step": 100 * tick - 50}
            metrics.write(row)
    run.event("restart", "actor 1 died <script>alert('x')</script>", time_s=12.0)
    run.finished({"stop_reason": "4,000 steps & done"})
    return run.path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), "first")


@pytest.fixture(scope="module")
def html(run_folder: Path) -> str:
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_fetches_nothing(html: str) -> None:
    page = Page(html)
    assert {link for link in page.links if not link.startswith("#")} == set()
    assert "http" not in html
    assert "@import" not in html
    assert {"script", "img", "link", "iframe", "object"} & set(page.tags) == set()
    assert html.count("<svg") == 8
    # A clip path's or marker's id that two charts shared would make one of them vanish.
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert 0 < len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_losses_are_labelled_by_what_the_value_head_measures(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"root": str(tmp_path), "name": "bins", "algorithm": {"name": "flow", "head": {"kind": "hl_gauss"}}}
    )
    columns = ["loss/critic", "loss/distilled", "loss/value", "loss/flow", "q/mean", "q/target", "value/mean"]
    columns += ["value/clipped_fraction", "support/low", "support/high"]
    run = RunFolder.create(config, [])
    with MetricsWriter(run.path) as metrics:
        for tick in range(3):
            metrics.write({"time_s": tick, "env_steps": tick, **dict.fromkeys(columns, 0.5 + tick)})
    html = write_report(run.path).read_text(encoding="utf-8")
    text = Page(html).text
    for title in ("Critic loss", "Loss of the distilled critic", "Loss of the value network", "Flow loss"):
        assert title in text
    assert text.count("cross-entropy, nats") == 2
    assert "half the squared error" not in text
    for line in ("critics", "targets", "value network", "highest value", "lowest value", "% of targets"):
        assert line in text
    assert html.count("<svg") == 7


def test_values_are_escaped(html: str) -> None:
    assert "<script" not in html
    assert "actor 1 died &lt;script&gt;" in html
    assert "<i>" not in html
    text = Page(html).text
    assert "actor 1 died <script>alert('x')</script>" in text
    assert "millrace train --name" in text


def test_the_facts_agree_with_the_metrics(html: str) -> None:
    text = re.sub(r"\s+", " ", Page(html).text)
    for fact in (
        "Environment HalfCheetah-v4",
        "Best evaluation 480.0 ± 20.0 at 3,950 steps",
        "Last evaluation 480.0 ± 20.0 at 3,950 steps",
        "Stop condition met : 4,000 steps 4,000 steps & done",
        "Environment steps 4,000",
        "Updates 3,600",
        "Wall time 44.0 s",
        "updates 75.0 % 30.0",
        "waiting for data 15.0 % 6.0",
        "other 10.0 % 4.0",
        "writers held back 150.0 % 60.0",
        "12.0 s restart",
        "min_size: 5000",
    ):
        assert fact in text, fact


def test_colours_follow_the_page(html: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        drawn = re.findall(r"(?:fill|stroke): ?(#[0-9a-f]{6})", svg)
        assert drawn == []
        assert "var(--" in svg


def test_a_run_without_metrics_gets_sentences_instead_of_charts(tmp_path: Path) -> None:
    run = RunFolder.create(RunConfig(root=str(tmp_path), name="empty"), ["millrace"])
    html = write_report(run.path).read_text(encoding="utf-8")
    text = Page(html).text
    assert "<svg" not in html
    for sentence in ("No episode had ended", "No throughput", "No update had been made", "No events were recorded"):
        assert sentence in text
    assert "not met" in text
    (run.path / "run.json").write_text("{")
    with pytest.warns(RuntimeWarning, match=r"run\.json is not JSON"):
        write_report(run.path)


def test_a_loss_of_regression_is_labelled_so(html: str) -> None:
    assert "half the squared error" in html
    assert "cross-entropy" not in html
    assert "Flow loss" not in html


def test_few_and_odd_numbers_are_drawn(tmp_path: Path) -> None:
    run = RunFolder.create(RunConfig(root=str(tmp_path), name="odd"), ["millrace"])
    with MetricsWriter(run.path) as metrics:
        metrics.write({"time_s": 0.0, "env_steps": 0.0, "steps_per_s": 0.0, "replay_fill": float("inf")})
        metrics.write({"time_s": 1.0, "env_steps": 5.0, "loss/critic": float("nan"), "eval/mean_return": 3.0})
    html = write_report(run.path).read_text(encoding="utf-8")
    Page(html)
    assert html.count("<svg") == 3


def test_steps_taken_twice_after_a_resume_count_once() -> None:
    curves = Curves(
        {
            "env_steps": np.array([10.0, 20.0, 30.0, 40.0, 25.0, 35.0]),
            "time_s": np.array([1.0, 2.0, 3.0, 4.0, 0.5, 1.5]),
            "return_mean_100": np.array([1.0, 2.0, 99.0, 99.0, 3.0, np.nan]),
        }
    )
    assert curves.get("env_steps").tolist() == [10, 20, 25, 35]
    assert curves.running("time_s").tolist() == [1.0, 2.0, 2.5, 3.5]
    assert curves.last("return_mean_100") == 3.0
    assert np.isnan(curves.get("unknown")).all()


def test_learning_curves_of_one_run_and_of_several(run_folder: Path, tmp_path: Path) -> None:
    others = [make_run(tmp_path, f"seed-{seed}", seed=seed, rows=30) for seed in (1, 2)]
    one = learning_curve_png([run_folder], tmp_path / "one.png", "SAC")
    three = learning_curve_png([run_folder, *others], tmp_path / "three.png", "SAC")
    assert one.read_bytes()[:8] == three.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert one.read_bytes() != three.read_bytes()
    empty = RunFolder.create(RunConfig(root=str(tmp_path), name="empty"), [])
    with pytest.raises(ValueError, match="empty has no evaluation"):
        learning_curve_png([run_folder, empty.path], tmp_path / "none.png", "SAC")


def test_the_report_needs_neither_torch_nor_ray_nor_a_display(run_folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import cluster.checkpoint, cluster.live; from cluster.report import write_report\n"
        "assert 'matplotlib' not in sys.modules, 'a command that draws nothing should not wait for matplotlib'\n"
        f"write_report(Path({str(run_folder)!r}))\n"
        "assert not {'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
