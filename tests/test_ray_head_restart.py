"""The head of a run is killed under a real Ray: a new one takes over the processes, which live on, and counts nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint import Checkpoints, load_tensors
from cluster.files import read_json
from cluster.head import Evaluation, Head, Tick
from cluster.head_state import STATE, HeadStateFile, Shown, read_head_state
from cluster.metrics import MetricsWriter, read_metrics
from cluster.runs import RunFolder
from configs.schema import RunConfig
from tests import runs_for_tests as runs
from tests.runs_for_tests import RayCluster
from tests.test_ray_llm import SETTINGS, WORDS, ledger, wait_for_updates, wait_until_gone
from tests.test_ray_run import inserted

Started = Callable[..., subprocess.Popen[str]]
GENTLE = ["--actors.cpus", "0.5", "--actors.threads", "1"]
CONTROL = ["pendulum_sac", *runs.SMALL, *GENTLE, "--name", "a", "--learners.updates_per_step", "0.25"]
LLM = ["countdown", *WORDS, *(word for pair in SETTINGS.items() for word in pair)]
TASKS = [  # each task is drawn once
    *("--tasks.source", "tests.tasks_for_tests:many_tasks", "--tasks.kwargs", "count=20000", "--name", "a"),
    *("--curriculum.draw", "tests.tasks_for_tests:Untried", *GENTLE, "--actors.envs", "4", "--env.id", "CartPole-v1"),
    *("--algorithm.name", "dqn", "--algorithm.hidden", "16", "--learners.updates_per_step", "1"),
    *("--learners.batch_size", "32", "--replay.min_size", "200", "--actors.random_steps", "200"),
    *("--replay.capacity", "131072", "--stop.steps", "1e9", "--eval.every", "0", "--report_every_s", "0.25"),
]
COUNTS = ("env_steps", "updates", "episodes", "policy_version", "time_s", "wall_s", "restarts")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Started]:
    """Start `millrace train` in `tmp_path`; what is left of it at the end of the test is killed."""
    started = []
    (tmp_path / "storage").mkdir()

    def run(*words: str, cluster: RayCluster) -> subprocess.Popen[str]:
        process = runs.start(
            "train", *words, "--replay.directory", str(tmp_path / "storage"), "--address", cluster.address,
            cwd=tmp_path, log=tmp_path / "log", env=cluster.env,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:  # so that a run in the cluster, whose driver this is, ends as well
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        for left in runs.session(process.pid):
            left.kill()
        process.wait()
    if (tmp_path / "log").exists():  # pytest shows it where the test has failed
        print((tmp_path / "log").read_text())


def ended(process: subprocess.Popen[str], tmp_path: Path, cluster: RayCluster) -> str:
    """What a run that ended well has printed; it left no storage, no process and no state of its head."""
    code = process.wait(timeout=120)
    log = (tmp_path / "log").read_text()
    assert code == 0, log
    assert "Traceback" not in log
    assert not list((tmp_path / "storage").iterdir())
    assert not (tmp_path / "runs" / "a" / STATE).exists()
    wait_until_gone(cluster)
    return log


def state(run: Path) -> dict[str, Any]:
    """What the head would be started again with."""
    with suppress(FileNotFoundError):
        found: dict[str, Any] = read_json(run / STATE)
        return found
    return {}


def kill(run: Path, *names: str) -> None:
    """Kill processes of a run at the same moment."""
    found = runs.pids(run)
    for name in names:
        os.kill(found[name], signal.SIGKILL)


def kill_head(run: Path, process: subprocess.Popen[str], *others: str) -> None:
    """Kill the head, others with it, and wait until a new one has taken over."""
    dead, told = runs.pids(run)["head"], len(lived_on(run))
    kill(run, "head", *others)
    runs.wait_for(lambda: runs.pids(run)["head"] != dead, process)
    runs.wait_for(lambda: len(lived_on(run)) > told, process)


def lived_on(run: Path) -> list[str]:
    """What new heads have told when they had taken over."""
    return [
        event["text"] for event in runs.events(run, "restart") if event["text"].startswith("the head died; a new one")
    ]


def never_falls(run: Path, *names: str) -> None:
    """In no row of the metrics is one of these less than before."""
    rows = read_metrics(run).to_pylist()
    for name in names:
        values = [row[name] for row in rows]
        assert values == sorted(values), name


def told_once(log: str, run: Path) -> None:
    """Every line that is told of as an event was shown, and shown once."""
    for kind in ("restart", "start", "evaluation", "warning"):
        for event in runs.events(run, kind):
            assert log.count(event["text"]) == 1, event["text"]


def test_the_head_dies_twice_and_its_run_goes_on_with_the_same_processes_and_right_counts(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        *CONTROL, "--actors.count", "2", "--actors.envs", "4", "--replay.shards", "2", "--stop.steps", "5000",
        "--eval.every", "2000", "--eval.episodes", "2", "--report_every_s", "0.25", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: runs.events(run, "start") and "learner" in runs.pids(run), process, 120.0)
    first = runs.pids(run)
    generator = np.random.default_rng(0)
    for _ in range(2):
        time.sleep(generator.uniform(0.2, 1.5))
        kill_head(run, process)
    log = ended(process, tmp_path, ray_cluster)

    last = runs.pids(run)
    assert last.pop("head") != first.pop("head")
    assert {name: last[name] for name in first} == first
    assert len(lived_on(run)) == 2
    summary, checkpoint = runs.summary(run), runs.newest_checkpoint(run)
    assert summary["stop_reason"].endswith("of 5000 environment steps done")
    assert summary["restarts"] == 2
    assert summary["updates_lost"] == 0
    # What the head has counted, what the files hold, and what actors have finished in whole episodes agree.
    assert runs.recount(checkpoint) == (summary["steps"], summary["episodes"])
    assert summary["steps"] == runs.head_counts(checkpoint)["env_steps"]
    assert runs.head_counts(checkpoint)["incarnation"] == 1
    never_falls(run, *COUNTS)
    rows = read_metrics(run).to_pylist()
    # The head in the middle may be killed before it has written a row.
    assert {0.0, 2.0} <= {row["restarts"] for row in rows} <= {0.0, 1.0, 2.0}
    evaluated = [row["eval/step"] for row in rows if row.get("eval/step") is not None]
    assert evaluated == sorted(set(evaluated))
    assert len(evaluated) == len(runs.events(run, "evaluation")) >= 1
    assert summary["mean_return"] is not None
    assert "warning" not in {event["kind"] for event in runs.events(run)}
    told_once(log, run)


def test_the_head_dies_while_it_starts_while_it_writes_a_checkpoint_and_while_it_ends(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        *CONTROL, "--stop.steps", "1e9", "--replay.shards", "2", "--checkpoints.every_s", "1", cluster=ray_cluster
    )
    # The first of two shards has begun.
    runs.wait_for(lambda: list((tmp_path / "storage").iterdir()) and "head" in runs.pids(run), process, 120.0)
    assert not state(run)["is_started"]
    kill(run, "head")
    runs.wait_for(lambda: runs.events(run, "restart"), process)
    runs.wait_for(lambda: runs.events(run, "checkpoint"), process, 120.0)
    runs.wait_for(lambda: list((run / "checkpoints").glob(".writing-*")), process)
    kill_head(run, process)
    written = len(runs.events(run, "checkpoint"))
    runs.wait_for(lambda: len(runs.events(run, "checkpoint")) > written + 1, process)
    process.send_signal(signal.SIGTERM)
    runs.wait_for(lambda: state(run)["stop_reason"], process)
    kill_head(run, process)
    log = ended(process, tmp_path, ray_cluster)

    told = [event["text"] for event in runs.events(run, "restart")]
    assert told[0] == "the head died while the run was starting; everything is started afresh"
    assert len(told) == 3
    summary, last = runs.summary(run), runs.newest_checkpoint(run)
    assert summary["stop_reason"] == "stopped by a signal"
    assert summary["restarts"] == 3
    assert runs.recount(last) == (summary["steps"], summary["episodes"])
    assert summary["steps"] == runs.head_counts(last)["env_steps"] > 0
    found = Checkpoints(run / "checkpoints")
    latest = found.latest()
    assert latest is not None
    assert latest.path == last
    assert not list((run / "checkpoints").glob(".*"))
    never_falls(run, *COUNTS)
    told_once(log, run)


def test_the_head_of_a_language_model_run_dies_and_every_group_is_counted_once(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(*LLM, "--stop.updates", "1000000", "--checkpoints.every_s", "1", cluster=ray_cluster)
    runs.wait_for(lambda: runs.events(run, "start"), process, 120.0)
    runs.wait_for(lambda: Checkpoints(run / "checkpoints").all(), process)
    first = runs.pids(run)
    for _ in range(2):
        wait_for_updates(run, process, 5)
        kill_head(run, process)
    wait_for_updates(run, process, 5)
    process.send_signal(signal.SIGTERM)
    log = ended(process, tmp_path, ray_cluster)

    last = runs.pids(run)
    assert last.pop("head") != first.pop("head")
    assert {name: last[name] for name in first} == first
    for checkpoint in Checkpoints(run / "checkpoints").all():
        ledger(checkpoint.path).check()
    counted = ledger(runs.newest_checkpoint(run))
    # One may have come into the queue whose actor had been stopped before it could tell.
    assert 0 <= counted.counters["inserted_groups"] - counted.kept <= 1
    assert counted.counts["kept_groups"] == counted.kept
    assert runs.summary(run)["restarts"] == 2
    never_falls(run, "samples", "updates", "policy_version", "consumed_groups", "inserted_groups", "time_s")
    assert log.count("supervised training come first") == 1


def every_episode_was_reported_once(checkpoint: Path) -> int:
    """The record of tasks in a checkpoint is that of the episodes in its replay. Returns how many were reported.

    For a run whose actors all stopped by themselves and whose tasks are drawn once each. An actor that has no assignment
    plays the last tasks again, and says nothing of that.
    """
    finished, cut_off = runs.episodes_of_tasks(checkpoint)
    desk, record = read_json(checkpoint / "desk.json"), load_tensors(checkpoint / "tracker.safetensors")[0]
    attempts = record["tracker.attempts"]
    played = np.bincount([task for task, _ in finished], minlength=len(attempts))
    assert np.all(attempts <= played)
    # One that had been drawn may be drawn once more before its outcome is known: seldom, of so many.
    assert np.sum(attempts[attempts > 0] - 1) <= 2
    unreported = set(np.flatnonzero((played > 0) & (attempts == 0)).tolist())
    assert unreported <= cut_off  # it is played again in one lane, and for the first time in another
    reported = sum(desk["reported"].values())
    assert reported == attempts.sum() == desk["waste"]["kept"][0] == desk["waste"]["kept"][1]
    assert desk["lost"] == 0
    # Of tasks that were played once it is known which episode was reported.
    once = {task: steps for task, steps in finished if played[task] == attempts[task] == 1}
    lengths = record["tracker.lengths"]
    for task, steps in once.items():
        assert lengths[task, 0] / lengths[task, 1] == pytest.approx(steps)
    others = desk["waste"]["kept"][2] - sum(once.values())
    possible = sorted(steps for task, steps in finished if task not in once)
    count = reported - len(once)
    assert sum(possible[:count]) <= others <= sum(possible[len(possible) - count :])
    return int(reported)


def test_the_head_of_a_run_with_tasks_dies_and_no_attempt_is_counted_twice(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(*TASKS, "--checkpoints.every_s", "1", cluster=ray_cluster)
    runs.wait_for(lambda: runs.events(run, "checkpoint"), process, 120.0)
    generator = np.random.default_rng(int(os.environ.get("MILLRACE_MOMENT", "0")))
    for _ in range(2):
        time.sleep(generator.uniform(0.2, 1.5))
        kill_head(run, process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path, ray_cluster)
    summary = runs.summary(run)
    assert summary["restarts"] == 2
    assert 0 < every_episode_was_reported_once(runs.newest_checkpoint(run)) <= summary["episodes"]
    for checkpoint in Checkpoints(run / "checkpoints").all():
        desk = read_json(checkpoint.path / "desk.json")
        assert sum(desk["reported"].values()) == desk["waste"]["kept"][0]
    never_falls(run, *COUNTS)
    assert "warning" not in {event["kind"] for event in runs.events(run)}


def test_actors_play_on_while_the_head_gives_no_answer(ray_cluster: RayCluster, start: Started, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    process = start(*TASKS, "--checkpoints.every_s", "1000", cluster=ray_cluster)
    runs.wait_for(lambda: state(run).get("books", {}).get("counts", {}).get("updates", 0) > 100, process, 120.0)
    head = runs.pids(run)["head"]
    os.kill(head, signal.SIGSTOP)
    try:
        time.sleep(1.0)
        before = sum(inserted(run))
        time.sleep(4.0)
        after = sum(inserted(run))
    finally:
        os.kill(head, signal.SIGCONT)
    # More than the limiter lets them run ahead: the learner goes on as well.
    assert after - before > 2 * RunFolder.open(run).config.error_buffer
    runs.wait_for(lambda: state(run)["books"]["counts"]["env_steps"] >= after, process)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path, ray_cluster)
    assert runs.summary(run)["restarts"] == 0
    every_episode_was_reported_once(runs.newest_checkpoint(run))


@pytest.mark.slow
def test_whatever_dies_together_with_the_head_is_replaced(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        *CONTROL, "--actors.count", "2", "--actors.envs", "4", "--replay.shards", "2", "--stop.steps", "1e9",
        "--checkpoints.every_s", "1", "--replay.capacity", "131072", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: [c for c in Checkpoints(run / "checkpoints").all() if c.updates], process, 120.0)
    for names in (("actor 1",), ("shard 0", "shard 1"), ("learner",), ("shard 0", "actor 0", "learner")):
        before = runs.pids(run)
        kill_head(run, process, *names)
        runs.wait_for(lambda names=names, before=before: all(runs.pids(run)[n] != before[n] for n in names), process)  # type: ignore[misc]
        goal = state(run)["books"]["counts"]["env_steps"] + 400
        runs.wait_for(lambda goal=goal: state(run)["books"]["counts"]["env_steps"] > goal, process)  # type: ignore[misc]
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path, ray_cluster)
    summary, last = runs.summary(run), runs.newest_checkpoint(run)
    assert summary["restarts"] == 4 + 7
    assert runs.recount(last)[0] == summary["steps"] == runs.head_counts(last)["env_steps"]
    never_falls(run, "env_steps", "episodes", "policy_version", "time_s", "wall_s", "restarts")


@pytest.mark.slow
def test_a_language_model_run_whose_head_dies_at_its_beginning_and_in_an_evaluation(
    ray_cluster: RayCluster, start: Started, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "a"
    process = start(
        *LLM, "--stop.updates", "30", "--eval.every", "10", "--warm_start.steps", "400", "--eval.prompts", "64",
        "--actors.hold_back", "2", cluster=ray_cluster,
    )  # fmt: skip
    runs.wait_for(lambda: "supervised" in (tmp_path / "log").read_text() and state(run)["is_started"], process, 180.0)
    kill_head(run, process)  # the learner is still at its supervised phase, which goes on
    runs.wait_for(lambda: state(run)["is_evaluating"], process, 180.0)
    kill_head(run, process)
    log = ended(process, tmp_path, ray_cluster)
    assert log.count("supervised training come first") == 1
    assert log.index("warm start: step 50 of") < log.index("warm start: step 400 of")
    evaluated = [event["text"] for event in runs.events(run, "evaluation")]
    assert len(evaluated) == len(set(evaluated)) >= 2  # the one that was lost is of newer weights now
    assert runs.summary(run)["updates"] == 30
    assert runs.summary(run)["restarts"] == 2
    ledger(runs.newest_checkpoint(run)).check()
    never_falls(run, "samples", "updates", "policy_version", "consumed_groups", "inserted_groups", "time_s")


def control_config(**changes: Any) -> RunConfig:
    return RunConfig.model_validate({"env": {"id": "Pendulum-v1"}, **changes})


def moment(time: float, steps: int, episodes: int, *, act_s: float) -> Tick:
    """One shard, one actor and the learner, as they tell at a time."""
    return Tick(
        time=time,
        actors={"actor 0": {"episodes": episodes, "broken_episodes": 0, "act_s": act_s, "version": 1}},
        shards={"shard 0": {"inserted": steps, "sampled": 4 * steps, "items": steps, "capacity": 1000}},
        learner={"updates": steps // 2, "version": 3, "update_s": 0.5 * act_s},
        first_step=10.0,
    )


def test_books_go_on_from_any_earlier_moment_as_if_nothing_had_happened() -> None:
    config = control_config()
    books = Head(config, wall_started=0.0)
    one, two, three = (
        moment(12.0, 100, 1, act_s=1.0),
        moment(20.0, 300, 4, act_s=5.0),
        moment(30.0, 500, 5, act_s=9.0),
    )
    books.tick(one)
    evaluation = Evaluation(100, 2, (1.0, 3.0), 0.5)
    books.evaluated(evaluation)
    kept = books.live_state()
    assert books.evaluation_row_due
    books.tick(two)  # which the dead head saw and told nobody of
    expected = books.tick(three)

    shift = 1000.0  # the monotonic clock of another process
    again = Head(config, wall_started=shift, state=kept)
    again.restore_evaluation(evaluation, row_due=True)
    three.time += shift
    three.first_step = None
    row = again.tick(three)
    assert again.counts.env_steps == 500
    for name in ("env_steps", "episodes", "updates", "time_s", "wall_s", "policy_version", "time/actor/act_s"):
        assert row[name] == pytest.approx(expected[name]), name
    assert row["eval/mean_return"] == 2.0
    assert again.counts.incarnation == books.counts.incarnation
    assert again.counts.sampled == books.counts.sampled == 2000
    assert again.evaluated(Evaluation(500, 3, (1.9,), 0.1)) is False


def test_rows_that_waited_for_the_disk_are_neither_lost_nor_repeated(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path)
    first.write({"step": 1.0, "loss": float("nan")})
    kept = first.waiting()
    second = MetricsWriter(tmp_path)
    second.restore(kept)
    second.write({"step": 2.0})
    later = second.waiting()
    second.flush()  # and then it is killed, before anybody can tell that these are on disk
    third = MetricsWriter(tmp_path)
    third.restore(later)
    third.write({"step": 3.0})
    third.close()
    assert read_metrics(tmp_path).column("step").to_pylist() == [1.0, 2.0, 3.0]


def test_the_state_of_another_start_of_the_run_is_none_of_this_one(tmp_path: Path) -> None:
    told: list[str] = []
    file = HeadStateFile(tmp_path, tell=told.append)
    assert read_head_state(tmp_path, 5.0) is None
    file.write({"wall_started": 5.25, "value": np.float32(0.5)})
    assert read_head_state(tmp_path, 5.0) is None
    found = read_head_state(tmp_path, 5.25)
    assert found is not None
    assert found["value"] == 0.5
    gone = HeadStateFile(tmp_path / "nowhere", tell=told.append)
    gone.write({})
    gone.write({})
    assert len(told) == 1
    assert not list(tmp_path.glob(".*"))


@given(st.lists(st.sampled_from(["show", "ask", "keep", "die"]), max_size=40))
def test_a_driver_is_shown_every_line_once_and_in_order_whenever_the_head_dies(steps: list[str]) -> None:
    """Lines that the dead head showed after its last state are lost where the driver had not asked for them, and no others."""
    shown, kept, at, count = Shown(), Shown().state(), 0, 0
    safe: list[str] = []  # must come: shown before the last state, or by the living head
    unsafe: list[str] = []
    got: list[str | None] = []
    for step in [*steps, "ask"]:
        if step == "show":
            shown.add(None, line := f"line {count}")
            unsafe.append(line)
            count += 1
        elif step == "ask":
            lines, at = shown.after(at)
            got += [line for _, line in lines]
            safe, unsafe = safe + unsafe, []
        elif step == "keep":
            kept = json.loads(json.dumps(shown.state()))
            safe, unsafe = safe + unsafe, []
        else:
            shown, unsafe = Shown(kept), []
            kept = json.loads(json.dumps(shown.state()))  # as the first thing that a new head does
    assert got == safe
