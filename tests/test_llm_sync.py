"""Small whole runs that train a language model in one process: repeated, stopped, resumed, evaluated, exported."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.api import Run, train
from cluster.checkpoint import Checkpoints, load_tensors
from cluster.cli import main
from cluster.curriculum.desk_files import DESK, load_desk
from cluster.llm import parts
from cluster.llm.examples import FILE, read_examples
from cluster.llm.head import LlmHead
from cluster.llm.sync import LlmSyncRun
from cluster.metrics import read_metrics
from cluster.recorder import LEARNER, POLICY
from cluster.runs import RunFolder
from configs.llm import LlmConfig
from configs.load import load_run
from learners.llm.models import load_weights
from learners.llm.rows import TABLE, Completion, to_rows
from replay.queue_snapshot import queue_files
from replay.queue_writers import CallQueueWriter
from replay.queues import Queue
from tests import runs_for_tests as runs

BY_CLOCK = re.compile(r"time(_s|/.*)|wall_s|.*_per_s|eval/seconds")  # columns read from a clock
EVEN, FRAGILE, BROKEN = (f"tests.verifiers_for_tests:{name}" for name in ("even", "fragile", "broken"))
GROUPS, SIZE = 3, 4
SMALL = f"""
    --mode sync --report_every_s 600 --model.layers 1 --model.width 16 --model.heads 2 --model.inner 16 --warm_start.steps 4
    --warm_start.batch_size 16 --tasks.count 200 --tasks.kwargs low=2 high=5 largest=30 largest_target=99 --sampling.group_size {SIZE} --sampling.max_tokens 8 --actors.slots 24
    --actors.prompts_ahead 1 --learners.batch_groups {GROUPS} --learners.threads 1 --eval.every 3 --eval.prompts 8 --eval.samples 2
    --eval.attempts 1 2 --eval.families --stop.updates 6
""".split()
BASE = [
    "--name",
    "base",
    "--curriculum.filter",
    "band",
    "--curriculum.low",
    "0.5",
    "--curriculum.high",
    "0.5",
    "--eval.every",
    "4",
]
BASE += ["--eval.families", "2 numbers"]
Trained = Callable[..., Run]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(folder: Path, *more: str, verifier: str = EVEN) -> LlmConfig:
    there = ["--root", str(folder / "runs"), "--replay.directory", str(folder), "--tasks.verifier", verifier]
    config = load_run("countdown", [*SMALL, *there, *more])
    assert isinstance(config, LlmConfig)
    return config


@pytest.fixture
def sync(tmp_path: Path) -> Trained:
    """Train in this process, with more settings; keywords go to `train`."""

    def run(*more: str, verifier: str = EVEN, resume: Path | None = None, **options: Any) -> Run:
        options.setdefault("show", lambda *_: None)
        return train(config_of(tmp_path, *more, verifier=verifier), resume=resume, **options)

    return run


def rows(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if v is not None} for row in read_metrics(run).to_pylist()]


def frontier(counts: dict[str, Any], waiting: float) -> None:
    """Every group that was written is consumed, dropped, or waits."""
    assert counts["inserted_groups"] == counts["kept_groups"]
    assert counts["inserted_groups"] == counts["consumed_groups"] + counts["dropped_stale_groups"] + waiting


def test_prompts_the_model_cannot_read_end_the_run_with_a_reason(sync: Trained, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"ü{n}"}) + "\n" for n in range(200)))
    settings = ["--name", "a", "--tasks.source", str(file), "--warm_start.steps", "0", "--tasks.kwargs", "none"]
    with pytest.raises(RuntimeError, match=r"none of the first 64 prompts can be sampled.*printable ASCII"):
        sync(*settings, "--eval.every", "0")
    (event,) = runs.events(tmp_path / "runs" / "a", "error")
    assert "set model.path to a pretrained model" in event["text"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Under the filter, with completions that nobody can judge; the tests below look at it from several sides."""
    return train(config_of(tmp_path_factory.mktemp("base"), *BASE, verifier=FRAGILE), show=lambda *_: None)


def test_the_same_seed_gives_the_same_groups_and_updates_to_the_last_digit(base: Run, sync: Trained) -> None:
    def found(run: Run) -> tuple[pa.Table, dict[str, Any], str]:
        table = read_metrics(run.path)
        exact = table.select(sorted(c for c in table.column_names if not BY_CLOCK.fullmatch(c)))
        return exact, load_tensors(runs.newest_checkpoint(run.path) / LEARNER)[0], (run.path / FILE).read_text()

    one, learner_one, texts = found(base)
    two, learner_two, again = found(sync(*BASE, verifier=FRAGILE))
    assert {"loss", "reward/mean", "eval/pass_at_1", "unscored", "waste/share", "staleness/mean"} <= set(
        one.column_names
    )
    assert one.column("unscored")[-1].as_py() > 0
    assert one.column_names == two.column_names
    for name in one.column_names:  # in numpy, where a mean of nothing is like itself
        np.testing.assert_array_equal(one[name].to_numpy(), two[name].to_numpy(), err_msg=name)
    assert texts == again
    assert learner_one.keys() == learner_two.keys()
    assert all(learner_one[name].tobytes() == learner_two[name].tobytes() for name in learner_one)


def test_every_update_has_whole_groups_in_the_same_number_and_surplus_ones_wait(base: Run) -> None:
    """`completions` is what the learner was given."""
    learnt = [row for row in rows(base.path) if "loss" in row]
    assert [row["updates"] for row in learnt] == list(range(1, 7))
    assert {row["completions"] for row in learnt} == {GROUPS * SIZE}
    assert {row["reward/pass_rate"] for row in learnt} == {0.5}  # of every group, so of every batch
    for row in rows(base.path):
        frontier(row, row["waiting_groups"])
        assert row["consumed_groups"] == GROUPS * row["updates"]
        assert row["leased_groups"] == 0
    assert any(row["waiting_groups"] > 0 for row in learnt)
    last = rows(base.path)[-1]
    assert last["kept_groups"] < last["groups"]
    wasted = last["waste/too_hard"] + last["waste/too_easy"] + last["waste/unscored"]
    assert last["waste/share"] == pytest.approx(wasted)
    assert last["waste/sampled_groups"] == last["groups"]
    assert base.summary["consumed_groups"] == 6 * GROUPS
    assert base.summary["stop_reason"] == "6 of 6 learner steps done"


def test_tokens_per_second_are_of_the_time_since_the_last_row(base: Run) -> None:
    found = rows(base.path)
    for before, row in pairwise(found):
        if "decode_tokens_per_s" in row:
            seconds = row["time/actor/decode_s"] - before["time/actor/decode_s"]
            tokens = row["sampled_tokens"] - before["sampled_tokens"]
            assert row["decode_tokens_per_s"] == pytest.approx(tokens / seconds)
        assert ("learner_tokens_per_s" in row) == ("loss" in row)
        if "loss" in row:
            seconds = row["time/learner/update_s"] - before["time/learner/update_s"]
            assert row["learner_tokens_per_s"] == pytest.approx(row["tokens"] / seconds)


def test_evaluations_come_before_anything_is_learnt_when_due_and_at_the_end(base: Run) -> None:
    evaluated = [row for row in rows(base.path) if "eval/pass_at_1" in row]
    assert [row["eval/step"] for row in evaluated] == [0, 4, 6]
    assert evaluated[0]["samples"] == 0
    assert all("samples_per_s" not in row for row in evaluated)  # nothing was sampled meanwhile
    summary = base.summary
    first_and_last = tuple(evaluated[i]["eval/pass_at_1"] for i in (0, -1))
    assert (summary["pass_at_1_before"], summary["pass_at_1"]) == first_and_last
    assert summary["best_pass_at_1"] == max(row["eval/pass_at_1"] for row in evaluated)


def test_evaluate_export_and_report_of_a_run(base: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = base
    capsys.readouterr()
    assert main(["eval", str(run.path), "--checkpoint", "latest", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = [row for row in rows(run.path) if "eval/pass_at_1" in row][-1]
    assert found["pass_at_1"] == pytest.approx(last["eval/pass_at_1"])  # the same prompts, weights and seeds
    assert found["greedy"] == pytest.approx(last["eval/greedy"])
    assert main(["eval", str(run.path), "--episodes", "2", "--seed", "5"]) == 0
    text = capsys.readouterr().out
    assert "2 held-out prompts, 2 completions of each" in text
    assert re.search(r"^  2 numbers: pass@1 \S+, pass@2 \S+, greedy \S+$", text, re.MULTILINE)
    assert main(["eval", str(run.path), "--episodes", "9"]) == 2
    assert "may have been trained on the prompts beyond" in capsys.readouterr().err

    target = tmp_path / "exported"
    assert main(["export", str(run.path), str(target), "--checkpoint", "latest"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(target)
    config = RunFolder.open(run.path).config
    model = parts.make_model(config, device="cpu")
    load_weights(model.network, (Checkpoints(run.path / "checkpoints").all()[-1].path / POLICY).read_bytes())
    ids = torch.tensor([model.tokenizer.encode_prompt("1,2=3:")])
    with torch.no_grad():
        np.testing.assert_allclose(loaded(ids).logits, model.network(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(target)("1,2=3:")["input_ids"] == ids[0].tolist()
    assert main(["export", str(run.path), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err

    (run.path / "report.html").unlink()
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    for section in (
        "Held-out prompts",
        "Policy",
        "Staleness and weight synchronisation",
        "Completions",
        "Where time went",
    ):
        assert f"<h2>{section}</h2>" in page
    for otherwise in ("when the metrics were last written", "No completions were kept"):
        assert otherwise not in page
    assert "<b>Actors</b>" in page
    assert "<b>Learner</b>" in page
    examples = list(read_examples(run.path))
    assert {"step", "family", "prompt", "completion", "reward", "passed", "reason"} <= examples[0].keys()
    assert max(example["step"] for example in examples) == 6


def test_a_resumed_run_goes_on_where_it_was(sync: Trained) -> None:
    # The queue keeps groups at the stop: one decode step finishes more than a batch has. Published are the weights of step 2 last.
    settings = ["--name", "a", "--actors.slots", "48", "--sampling.max_tokens", "2"]
    settings += ["--model.lora_rank", "2", "--learners.publish_every", "2"]
    first = sync(*settings, "--stop.updates", "3")
    before = runs.newest_checkpoint(first.path)
    counts = runs.head_counts(before)
    assert counts["updates"] == 3
    waiting = rows(first.path)[-1]["waiting_groups"]
    assert waiting > 0
    assert queue_files(before / "replay", TABLE)

    # The checkpoint is of one moment: what is evaluated, exported and resumed is one and the same.
    config = RunFolder.open(first.path).config
    learner = parts.make_learner(config, parts.make_model(config, device="cpu"))
    parts.load_learner(before / LEARNER, learner)
    assert learner.updates == 3
    assert learner.policy_bytes() == (before / POLICY).read_bytes()
    about = json.loads((before / DESK).read_text())
    assert about["next_group"] >= first.summary["groups"]
    desk = parts.make_desk(config)
    load_desk(desk, before)
    assert [one.group for one in desk.take("actor 0", 2)] == [
        about["next_group"],
        about["next_group"] + 1,
    ]

    second = sync(*settings, "--stop.updates", "6", resume=first.path)
    later = [row for row in rows(second.path) if row["policy_version"] > counts["version"]]
    assert later[0]["waiting_groups"] == waiting  # what waited is what is learnt from first
    assert later[0]["consumed_groups"] == 3 * GROUPS
    for row in later:
        frontier(row, row["waiting_groups"])
        assert row["consumed_groups"] == GROUPS * row["updates"]
    assert second.summary["updates"] == 6
    assert second.summary["samples"] > first.summary["samples"]
    assert (
        second.summary["pass_at_1_before"] == first.summary["pass_at_1_before"]
    )  # measured once, at the very beginning
    evaluations = [e["text"].split(":")[0] for e in runs.events(first.path, "evaluation")]
    assert evaluations == [f"evaluation at learner step {step}" for step in (0, 3, 6)]
    assert sum("warm start" in e["text"] for e in runs.events(first.path, "start")) == 1


def test_a_run_that_is_told_to_stop_ends_with_a_checkpoint_and_lets_go_of_what_is_under_way(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--name", "a", "--stop.updates", "10000", "--eval.every", "0")
    stopping = threading.Event()

    def show(row: dict[str, float] | None, line: str | None) -> None:
        if row is not None and row["updates"] >= 2:
            stopping.set()

    folder = RunFolder.create(config, [])
    run = LlmSyncRun(folder, wall_started=time.monotonic(), resume=None, show=show)
    reported: set[str] = set()
    report = run._learner.metrics

    def metrics() -> dict[str, float]:
        found = report()
        reported.update(found)
        return found

    run._learner.metrics = metrics  # type: ignore[method-assign]
    summary = run.run(stopping)
    assert (summary["stop_reason"], summary["updates"]) == ("stopped by a signal", 2)
    assert summary["pass_at_1"] is None
    assert not runs.events(folder.path, "evaluation")
    assert runs.head_counts(runs.newest_checkpoint(folder.path))["updates"] == 2
    assert rows(folder.path)[-1]["groups_out"] > 0
    assert not list(tmp_path.glob("*queue*"))
    assert (folder.path / "report.html").exists()

    # A metrics row is a union: a name with two meanings would have whichever came last.
    desk, head = set(run._desk.metrics()), set(LlmHead(config, wall_started=0.0)._counted())
    assert not reported & (desk | head)
    assert not desk & head
    assert {"tokens", "length/mean", "gap/mean"} <= reported
    assert {"sampled_tokens", "samples"} <= head


def test_groups_too_old_for_the_learner_are_dropped_and_counted_as_waste(sync: Trained) -> None:
    run = sync("--name", "a", "--replay.max_policy_lag", "0", "--stop.updates", "5", "--eval.every", "0")
    last = rows(run.path)[-1]
    assert last["dropped_stale_groups"] > 0
    frontier(last, last["waiting_groups"])
    learnt = [row for row in rows(run.path) if "loss" in row]
    assert {row["completions"] for row in learnt} == {GROUPS * SIZE}
    assert {row["staleness/max"] for row in learnt} == {0}
    about = json.loads((runs.newest_checkpoint(run.path) / DESK).read_text())
    assert about["waste"]["stale"][0] == last["dropped_stale_groups"]
    assert last["waste/stale"] > 0
    assert last["waste/kept_groups"] + last["dropped_stale_groups"] == last["kept_groups"]


def test_weights_are_held_back_and_groups_used_several_times_as_was_asked_for(sync: Trained) -> None:
    settings = ["--actors.hold_back", "2", "--replay.times_used", "2"]
    run = sync("--name", "a", *settings, "--stop.updates", "8", "--eval.every", "0")
    learnt = [row for row in rows(run.path) if "loss" in row]
    assert min(row["staleness/mean"] for row in learnt[3:]) >= 2.0
    assert {row["completions"] for row in learnt} == {GROUPS * SIZE}
    last = rows(run.path)[-1]
    assert last["consumed_groups"] == 8 * GROUPS
    assert last["inserted_groups"] - last["waiting_groups"] <= 4 * GROUPS


def test_a_verifier_that_always_fails_is_told_with_its_reason(sync: Trained) -> None:
    settings = ["--report_every_s", "0.2", "--stop.samples", "400", "--eval.every", "0", "--warm_start.steps", "0"]
    run = sync("--name", "a", *settings, "--tasks.retries", "0", verifier=BROKEN)
    assert run.summary["updates"] == run.summary["kept_groups"] == 0
    (told,) = (e["text"] for e in runs.events(run.path, "warning") if "no group was kept" in e["text"])
    assert "100 % unscored (last reason: " in told
    assert "no opinion" in told
    assert "tasks.verifier" in told


def test_what_waits_is_learnt_from_before_more_is_sampled(sync: Trained) -> None:
    """One decode step finishes up to four batches here."""
    settings = ["--name", "a", "--actors.slots", "48", "--sampling.max_tokens", "2", "--curriculum.filter", "none"]
    run = sync(*settings, "--stop.updates", "24", "--eval.every", "0", "--warm_start.steps", "0")
    found = rows(run.path)
    slots_groups = 48 // SIZE
    assert max(row["waiting_groups"] for row in found) <= slots_groups + GROUPS
    assert max(row["staleness/max"] for row in found if "loss" in row) <= slots_groups // GROUPS + 1
    assert found[-1]["dropped_stale_groups"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--tasks.verifier", "no_such_module:fn"], r"no_such_module cannot be imported.*correct the name"),
        (["--tasks.verifier", "tests.verifiers_for_tests:nothing"], "has no nothing"),
        (["--algorithm.advantage", "no_such_module:fn"], "algorithm.advantage"),
        (["--algorithm.loss", "tests.verifiers_for_tests:nothing"], "algorithm.loss"),
        (["--sampling.engine", "no_such_module:Class"], "sampling.engine"),
        (["--sampling.engine", "collections:Counter"], "submit.*missing"),
        (["--replay.capacity_mb", "1", "--sampling.max_tokens", "9000"], r"replay.capacity_mb: expected at least 3,"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_begins(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_of(tmp_path, "--name", "a", *settings), show=lambda *_: None)
    assert not (tmp_path / "runs").exists()


def test_a_batch_fits_into_the_memory_that_the_refusal_asks_for(tmp_path: Path) -> None:
    largest = ["--sampling.max_tokens", "9000"]
    config = config_of(tmp_path, "--replay.capacity_mb", "3", *largest)
    assert not any("end the run" in line for line in parts.check(config))
    rows_of_one = [
        Completion(
            group=0, index=index, task=0, family="2 numbers", seed=1, finish="length", reward=0.0, passed=False,
            prompt=np.zeros(16, np.int32), tokens=np.zeros(9000, np.int32), log_probs=np.zeros(9000, np.float32),
            kept=np.zeros(9000, np.float32), versions=np.ones(9000, np.int32),
        )
        for index in range(SIZE)
    ]  # fmt: skip
    queue = Queue(parts.queue_spec(config), tmp_path / "queue")
    writer = CallQueueWriter(queue)
    for group in range(GROUPS):
        writer.append(to_rows([replace(one, group=group) for one in rows_of_one]))
    assert queue.waiting_groups == GROUPS
    queue.close(remove=True)
