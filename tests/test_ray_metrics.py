"""What Ray's metrics are told of a run, and whether the dashboard for Grafana asks for what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import ray_metrics
from cluster.curriculum.filter import Waste
from cluster.head import Evaluation, TaskEvaluation, Tick
from cluster.llm.head import LlmTick
from cluster.ray_metrics import RayMetrics, gauge_of
from tests import test_head, test_llm_head
from tests.runs_for_tests import ROOT, wait_for

DASHBOARD = ROOT / "cluster" / "grafana.json"
CONTROL_LEARNER = {"loss/critic": 1.0, "loss/policy": -2.0}
LLM_LEARNER = {"loss": 0.5, "tokens": 64.0}


def control_rows() -> list[dict[str, float]]:
    """Rows of a control run with tasks, from its books."""
    head = test_head.make_head(replay={"min_size": 100})
    rows = []
    for second in range(1, 4):
        seconds = {f"{state}_s": 0.3 * second for state in ("env", "infer", "write")} | {"wall_s": 1.0 * second}
        states = ("inserting", "sampling", "waiting_for_samples", "waiting_for_inserts", "wall")
        shard = test_head.shard(500 * second, sampled=90) | {f"time/{state}_s": 0.2 * second for state in states}
        learner = {f"{state}_s": 0.2 * second for state in ("wait", "update", "publish", "wall")}
        tick = Tick(
            float(second),
            actors={"actor 0": test_head.actor(2 * second, **seconds)},
            shards={"shard 0": shard},
            learner={**test_head.learner(5 * second), **learner},
            learner_metrics=CONTROL_LEARNER,
            first_step=0.5,
            returns=[1.0],
            lengths=[10],
            desk=Waste().metrics(attempts="episodes", units="steps"),
        )
        rows.append(head.tick(tick))
    tasks = {name: TaskEvaluation((1.0,), (True,)) for name in ("walk", "jump/high")}
    return [*rows, Evaluation(1, 1, (1.0, 1.0), 1.0, tasks).row()]


def llm_rows() -> list[dict[str, float]]:
    """Rows of a run with a language model, from its books."""
    head = test_llm_head.make_head()
    rows = []
    for second in range(1, 4):
        counters = dict.fromkeys(test_llm_head.COUNTERS, 10 * second)
        actor = {**test_llm_head.actor(10 * second, decode_s=0.5 * second, wall_s=1.0 * second), **counters}
        learner = test_llm_head.learner(second, update_s=0.2 * second, wall_s=1.0 * second)
        tick = LlmTick(
            float(second),
            actors={"actor 0": actor},
            shards={"shard 0": test_llm_head.shard(10 * second, 5 * second)},
            learner=learner,
            learner_metrics=LLM_LEARNER,
            first_step=0.5,
            desk={"family/3 numbers/pass_rate": 0.5},
        )
        rows.append(head.tick(tick))
    return [*rows, test_llm_head.evaluation(1).row()]


@pytest.mark.parametrize(
    ("key", "name", "tags"),
    [
        ("env_steps", "millrace_env_steps", {}),
        ("loss/critic", "millrace_loss_critic", {}),
        ("time/actor/env_s", "millrace_seconds", {"role": "actor", "state": "env"}),
        ("time/shard/waiting_for_inserts_s", "millrace_seconds", {"role": "shard", "state": "waiting_for_inserts"}),
        ("eval/task/jump/high/success", "millrace_eval_task_success", {"task": "jump/high"}),
        ("task/walk/pass_rate", "millrace_task_pass_rate", {"task": "walk"}),
        ("family/3 numbers/pass_rate", "millrace_family_pass_rate", {"family": "3 numbers"}),
        ("eval/3 numbers/pass_at_1", "millrace_eval_3_numbers_pass_at_1", {}),
        ("time_s", "millrace_time_s", {}),
    ],
)
def test_figures_become_gauges_with_tags(key: str, name: str, tags: dict[str, str]) -> None:
    assert gauge_of(key) == (name, tags)


def test_a_gauge_always_has_the_same_tags() -> None:
    found: dict[str, set[str]] = {}
    for row in control_rows() + llm_rows():
        for key in row:
            name, tags = gauge_of(key)
            assert found.setdefault(name, set(tags)) == set(tags)


def test_what_fails_is_left_alone_and_tasks_are_not_without_number(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[dict[str, str]] = []

    class Recorded:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            if name == "millrace_broken":
                raise RuntimeError("no metrics agent")

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append(tags)

    monkeypatch.setattr(ray_metrics, "Gauge", Recorded)
    metrics = RayMetrics("a")
    for _ in range(2):
        metrics.row({f"eval/task/{n}/success": 1.0 for n in range(1000)})
    assert len({tags["task"] for tags in told}) == len(told) / 2 == ray_metrics.MOST_TAGGED
    told.clear()
    metrics.row({"none": None, "nan": float("nan"), "inf": float("inf"), "loss": 1.0})
    assert told == [{"run": "a"}]
    for _ in range(3):
        metrics.row({"broken": 1.0})
    assert caplog.text.count("no more figures") == 1


# ----------------------------------------------------------- with a real Ray

SERVE = """if True:
    import json, sys, time, ray
    rows, port = json.loads(sys.argv[1]), int(sys.argv[2])
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", object_store_memory=80 << 20,
             _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500})

    @ray.remote
    class Head:
        def tell(self, run, rows):
            from cluster.ray_metrics import RayMetrics
            self.metrics = RayMetrics(run)
            self.metrics.row({key: value for row in rows for key, value in row.items()})  # the first makes the gauges
            for row in rows:
                self.metrics.row(row)
            began = time.process_time()
            for row in rows:
                self.metrics.row(row)
            return (time.process_time() - began) / len(rows)

    heads = {run: Head.options(num_cpus=0).remote() for run in rows}
    took = ray.get([head.tell.remote(run, rows[run]) for run, head in heads.items()])
    print(json.dumps({"address": ray.util.get_node_ip_address(), "row_s": max(took)}), flush=True)
    for number in range(1, 1000):  # counters go on, so that there are rates
        time.sleep(0.5)
        for run, head in heads.items():
            more = [{key: value + number for key, value in row.items()} for row in rows[run]]
            ray.get(head.tell.remote(run, more))
"""


@contextmanager
def told_to_ray() -> Iterator[tuple[str, float]]:
    """A Ray that was told the rows of two runs: where its metrics are, and the seconds that a row has cost."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    rows = json.dumps({"control": control_rows(), "llm": llm_rows()})
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, rows, str(port)], stdout=subprocess.PIPE, env=env, cwd=ROOT, text=True
    )
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        yield f"{found['address']}:{port}", found["row_s"]
    finally:
        process.terminate()  # Ray's own handler ends what it has started
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.stdout is not None
        process.stdout.close()


def expressions() -> list[str]:
    """All that the dashboard asks Prometheus for, with its variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(found) > 20
    return [expr.replace("$run", ".*").replace("$__rate_interval", "10s") for expr in found]


def test_the_dashboard_asks_for_what_ray_shows() -> None:
    with told_to_ray() as (address, row_s):
        assert row_s < 0.01  # of each second that there is a row for
        gauges: set[str] = set()
        text, deadline = "", time.monotonic() + 60.0
        wanted = {name for expr in expressions() for name in re.findall(r"\b(ray_millrace_\w+)\{", expr)}
        while not wanted <= gauges and time.monotonic() < deadline:
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            gauges = set(re.findall(r"^(ray_millrace_\w+)\{", text, re.MULTILINE))
    assert wanted - gauges == set()
    every = {f"ray_{gauge_of(key)[0]}" for row in control_rows() + llm_rows() for key in row}
    assert every - gauges == set()
    patterns = [found for expr in expressions() for found in re.findall(r'__name__=~"([^"]+)"', expr)]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in gauges), pattern
    states = dict.fromkeys(re.findall(r'state="(\w+)"', text))
    for asked in (found for expr in expressions() for found in re.findall(r'state=~"([^"]+)"', expr)):
        assert set(asked.split("|")) <= states.keys()
    assert 'run="control"' in text
    assert 'run="llm"' in text
    assert 'task="jump/high"' in text


def test_the_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.slow
def test_prometheus_answers_every_question_of_the_dashboard(tmp_path: Path) -> None:
    if (prometheus := shutil.which("prometheus")) is None:
        pytest.skip("there is no prometheus (Debian's package prometheus)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"

    def ask(expr: str) -> list[Any]:
        with urllib.request.urlopen(
            f"http://{at}/api/v1/query?{urllib.parse.urlencode({'query': expr})}", timeout=10
        ) as answer:
            found: list[Any] = json.loads(answer.read())["data"]["result"]
            return found

    def is_ready() -> bool:
        try:
            return len(ask("ray_millrace_time_s")) == 2
        except (urllib.error.URLError, OSError):
            return False

    with told_to_ray() as (address, _):
        (tmp_path / "prometheus.yml").write_text(
            f"scrape_configs: [{{job_name: ray, scrape_interval: 1s, static_configs: [{{targets: ['{address}']}}]}}]"
        )
        process = subprocess.Popen(
            [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={at}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(is_ready, process)
            time.sleep(8.0)  # of which rates are made
            without = [expr for expr in expressions() if not ask(expr)]
        finally:
            process.kill()
            process.wait()
    assert without == []
