"""The desk and its journal: what is reported counts once, also after the head was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.assignments import Assignment, Outcome
from actors.env_tasks import EnvTask
from actors.task_set import TaskSet
from cluster.curriculum.desk import CHANGED, RECENT, RESERVED, Desk, families_of
from cluster.curriculum.desk_client import DeskClient
from cluster.curriculum.desk_files import (
    DESK,
    JOURNAL,
    begin_journal,
    checkpoint_is_whole,
    load_desk,
    recover_desk,
    save_desk,
)
from cluster.curriculum.drawing import make_drawing
from cluster.curriculum.tracker import Tracker
from configs.curriculum import EpisodeCurriculumSettings

TASKS = TaskSet([EnvTask(f"Env-{n}", {}, f"task {n}", "even" if n % 2 else "odd", n, threshold=1.0) for n in range(12)])


def make(seed: int = 0, tasks: TaskSet[EnvTask] = TASKS, draw: str = "band") -> Desk:
    config = EpisodeCurriculumSettings(draw=draw)
    families = families_of(tasks)
    tracker = Tracker(families, discount=config.discount)
    drawing = make_drawing(
        config, tracker, group_size=8, seed=seed, stages=np.array([task.stage for task in tasks], np.int64)
    )
    return Desk(tasks, tracker, drawing, group_size=8, names=("episodes", "steps"))


def outcome(one: Assignment[EnvTask], passed: int, steps: int = 10, **more: Any) -> Outcome:
    given = {"attempts": 1, "sampled": 1, "fate": "kept", "returns": float(passed), **more}
    return Outcome(one.group, one.number, passed, units=steps, **given)


def known(desk: Desk) -> dict[str, list[Any]]:
    """What the tracker and the waste say, and who reported how much: all that outcomes decide."""
    about, arrays = desk.state()
    found: dict[str, Any] = {name: array.tolist() for name, array in arrays.items() if name.startswith("tracker.")}
    return {**found, "waste": about["waste"], "reported": about["reported"]}


def same(one: Desk, other: Desk) -> None:
    np.testing.assert_equal(known(one), known(other))


def quiet(text: str) -> None:
    pytest.fail(f"a warning came: {text}")


def test_what_is_reported_again_counts_once() -> None:
    once, twice = make(), make()
    for desk, times in ((once, 1), (twice, 3)):
        first = 0
        for turn in range(20):
            found = [outcome(one, (one.number + turn) % 2) for one in desk.take("a", 3)]
            for _ in range(times):
                assert desk.report("a", first, found) == first + 3
            first += 3
    same(once, twice)
    assert once.metrics() == twice.metrics()
    assert once.metrics()["waste/sampled_episodes"] == 60
    assert once.metrics()["waste/sampled_steps"] == 600


def test_an_overlap_is_cut_off_and_a_gap_is_counted_as_lost() -> None:
    desk = make()
    found = [outcome(one, 1) for one in desk.take("a", 6)]
    assert desk.report("a", 0, found[:4]) == 4
    assert desk.report("a", 2, found[2:]) == 6
    assert desk.report("b", 0, []) == 0
    assert desk.metrics()["waste/sampled_episodes"] == 6
    assert desk.report("a", 8, found[:1]) == 9
    assert (desk.metrics()["waste/sampled_episodes"], desk.metrics()["outcomes_lost"]) == (7, 2)
    assert desk.report("a", 7, found[:2]) == 9
    assert desk.metrics()["outcomes_lost"] == 2


def test_assignments_under_way_follow_what_an_actor_says_it_holds() -> None:
    desk = make()
    mine = desk.take("a", 4)
    desk.take("b", 3)
    assert desk.metrics()["groups_out"] == 7
    desk.report("a", 0, [outcome(mine[0], 1)])
    assert desk.metrics()["groups_out"] == 6
    desk.take("a", 2, held=0)  # the answer with the first four never arrived
    assert desk.metrics()["groups_out"] == 5
    assert desk.forget("b") == 3
    assert desk.forget("b") == 0
    assert desk.metrics()["groups_out"] == 2


def test_few_tasks_are_told_one_by_one_and_many_by_family() -> None:
    desk = make()
    desk.report("a", 0, [outcome(one, 1, steps=7, returns=2.5) for one in desk.take("a", 12)])
    row = desk.metrics()
    for n in range(12):
        assert row[f"task/task {n}/return"] == 2.5
        assert row[f"task/task {n}/length"] == 7
        assert row[f"task/task {n}/pass_rate"] > 0.5
    assert sum(row[f"task/task {n}/drawn"] for n in range(12)) == pytest.approx(1.0)
    many = TaskSet([EnvTask(f"Env-{n}", {}, f"task {n}", f"family {n % 3}", 0, threshold=1.0) for n in range(65)])
    row = make(tasks=many).metrics()
    assert {name for name in row if name.endswith("/pass_rate")} == {f"family/family {n}/pass_rate" for n in range(3)}


def test_a_state_of_other_tasks_is_refused() -> None:
    about, arrays = make().state()
    other = TaskSet([EnvTask(f"Env-{n}", {"size": 5}, f"task {n}", "odd", 0, threshold=1.0) for n in range(12)])
    with pytest.raises(ValueError, match="other tasks than there are now"):
        make(tasks=other).load_state(about, arrays)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 12), st.booleans(), st.integers(0, 2**31))
def test_a_killed_head_comes_back_with_everything_acknowledged(
    tmp_path_factory: pytest.TempPathFactory, turns: list[int], saved_at: int, whole: bool, seed: int
) -> None:
    """Whatever was reported, before or after a checkpoint, whether that was finished or not."""
    run = tmp_path_factory.mktemp("run")
    checkpoint = run / "checkpoints" / "step_1"
    desk = make(seed)
    begin_journal(desk, run, None, tell=quiet)
    firsts: dict[str, int] = {}
    taken: set[int] = set()
    for turn, count in enumerate(turns):
        actor = f"actor {turn % 2}"
        given = desk.take(actor, count)
        assert not taken & {one.group for one in given}
        taken |= {one.group for one in given}
        found = [outcome(one, (one.number + turn) % 2, steps=turn) for one in given]
        firsts[actor] = desk.report(actor, firsts.get(actor, 0), found)
        if turn % 3 == 0:
            desk.score(np.array([turn % 12, 1]), np.array([0.5, 1.5]), np.array([3, 4]))
        if turn == saved_at:
            checkpoint.mkdir(parents=True)
            save_desk(desk, checkpoint)
            if whole:
                checkpoint_is_whole(desk, checkpoint)
    # The process is gone: nothing of the old desk is used.
    again = make(seed + 1)
    recover_desk(again, run, tell=quiet)
    same(again, desk)
    assert not taken & {one.group for one in again.take("actor 0", 3)}
    # What an actor repeats, for it never heard that it was taken in, is known.
    for actor, count in firsts.items():
        assert again.report(actor, max(0, count - 1), []) == count
    # And it may die again.
    found = [outcome(one, 1) for one in again.take("actor 0", 2)]
    again.report("actor 0", firsts.get("actor 0", 0), found)
    third = make(seed + 2)
    recover_desk(third, run, tell=quiet)
    same(third, again)


def test_a_line_cut_off_by_the_kill_is_left_out(tmp_path: Path) -> None:
    desk = make()
    begin_journal(desk, tmp_path, None, tell=quiet)
    desk.report("a", 0, [outcome(one, 1) for one in desk.take("a", 2)])
    before = known(desk)
    desk.report("a", 2, [outcome(one, 1) for one in desk.take("a", 2)])
    (path,) = (tmp_path / JOURNAL).glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    again = make()
    assert recover_desk(again, tmp_path, tell=quiet) == 2
    np.testing.assert_equal(known(again), before)
    assert again.report("a", 2, [outcome(one, 1) for one in again.take("a", 2)]) == 4  # the actor tells it again


def test_a_checkpoint_of_an_earlier_session_does_not_shorten_the_journal(tmp_path: Path) -> None:
    old, checkpoint = make(), tmp_path / "step_1"
    checkpoint.mkdir()
    begin_journal(old, tmp_path, None, tell=quiet)
    for _ in range(3):
        save_desk(old, checkpoint)  # its journal ends in file 4
    old.report("a", 0, [outcome(one, 1) for one in old.take("a", 2)])
    resumed = make()
    load_desk(resumed, checkpoint)
    begin_journal(resumed, tmp_path, checkpoint, tell=quiet)
    resumed.report("b", 0, [outcome(one, 1) for one in resumed.take("b", 5)])
    checkpoint_is_whole(resumed, checkpoint)
    again = make()
    assert recover_desk(again, tmp_path, tell=quiet) == 5  # and nothing of what was reported before the resumption
    same(again, resumed)


def test_old_files_go_with_a_checkpoint(tmp_path: Path) -> None:
    desk = make()
    begin_journal(desk, tmp_path, None, tell=quiet)
    for step in range(4):
        desk.report("a", step, [outcome(one, 1) for one in desk.take("a", 1)])
        checkpoint = tmp_path / f"step_{step}"
        checkpoint.mkdir()
        save_desk(desk, checkpoint)
        checkpoint_is_whole(desk, checkpoint)
        assert len(list((tmp_path / JOURNAL).glob("*.jsonl"))) == 1
    assert json.loads((tmp_path / "step_3" / DESK).read_text())["journal"]["first"] == 5


def test_a_full_disk_costs_the_entries_it_did_not_take_and_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    desk = make()
    begin_journal(desk, tmp_path, None, tell=told.append)
    assert desk.journal is not None
    desk.report("a", 0, [outcome(one, 1) for one in desk.take("a", 1)])
    full = open("/dev/full", "w")  # noqa: SIM115 - the journal closes it
    desk.journal._file = full
    desk.report("a", 1, [outcome(one, 1) for one in desk.take("a", 1)])
    assert full.closed
    assert len(told) == 1
    assert "held in memory alone" in told[0]
    assert desk.metrics()["waste/sampled_episodes"] == 2
    again = make()
    recover_desk(again, tmp_path, tell=quiet)
    assert again.metrics()["waste/sampled_episodes"] == 1
    # The actor was told that the second is safe, and goes on with the third.
    assert again.report("a", 2, [outcome(one, 1) for one in again.take("a", 1)]) == 3
    assert (again.metrics()["waste/sampled_episodes"], again.metrics()["outcomes_lost"]) == (2, 1)


def test_the_curriculum_has_changed_when_half_of_the_draws_go_elsewhere(tmp_path: Path) -> None:
    desk = make(draw="uniform")
    begin_journal(desk, tmp_path, None, tell=quiet)
    numbers = iter(range(10**9))
    desk._choose = lambda count: [(next(numbers) % 4, 0.0) for _ in range(count)]  # type: ignore[method-assign]
    for _ in range(3):
        desk.take("a", RECENT)
        assert desk.metrics()["curriculum/changes"] == 0
    desk._choose = lambda count: [(next(numbers) % 4 + 2, 0.0) for _ in range(count)]  # type: ignore[method-assign]
    for _ in range(6):
        desk.take("a", RECENT)
        desk.metrics()
    assert desk.changes == 0  # half of the draws moved, and not more than half
    desk._choose = lambda count: [(next(numbers) % 4 + 6, 0.0) for _ in range(count)]  # type: ignore[method-assign]
    for _ in range(6):
        desk.take("a", RECENT)
        desk.metrics()
    assert desk.changes == 1
    # One that a killed head has counted is not counted again, or taken back: evaluations are compared across it.
    again = make(draw="uniform")
    recover_desk(again, tmp_path, tell=quiet)
    again._choose = desk._choose  # type: ignore[method-assign]
    for _ in range(6):
        assert again.changes == 1
        again.take("a", RECENT)
        again.metrics()
    assert CHANGED == 0.5
    assert RESERVED > RECENT


def test_a_stage_that_is_unlocked_is_one_change_however_many_draws_it_moves() -> None:
    desk = make(draw="staged")
    reported = 0
    for turn in range(200):
        found = [outcome(one, int(turn >= 50)) for one in desk.take("a", RECENT // 10)]
        reported = desk.report("a", reported, found)
        desk.metrics()
    assert desk._drawing.changes == len(TASKS) - 1
    assert desk.changes == desk._drawing.changes


def test_a_client_never_waits_and_loses_nothing_while_the_head_is_away() -> None:
    desk, client = make(), DeskClient(ahead=4)
    assert client.ask(2) == []

    def away(*_: Any) -> None:
        return None

    def answer_lost(*call: Any) -> None:
        desk.report("a", call[0], call[1])

    def there(first: int, outcomes: Any, want: int, held: int) -> tuple[int, list[Assignment[Any]]]:
        return desk.report("a", first, outcomes), desk.take("a", want, held=held)

    assert client.exchange(away)
    assert client.exchange(there)
    assert desk.metrics()["groups_out"] == 6  # two that were asked for, and four ahead
    found = client.ask(2)
    assert len(found) == 2
    client.add([outcome(found[0], 1)])
    client.exchange(answer_lost)
    client.add([outcome(found[1], 0)])
    client.exchange(away)
    client.exchange(there)
    assert desk.metrics()["waste/sampled_episodes"] == 2
    assert desk.metrics()["groups_out"] == 4
    assert not client.exchange(there)
    assert client.ask(9) != []
    assert not client.exchange(there, fetch=False)
