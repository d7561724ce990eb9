"""The head's desk: what it hands out, what it counts, and what it remembers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.assignments import Assignment, Outcome
from actors.llm.seeds import sample_seed
from actors.llm.tasks import Task
from actors.task_set import TaskSet
from cluster.llm.desk import PromptDesk
from configs.llm import LlmConfig

SIZE = 4


def task(number: int, family: str = "easy", solution: str | None = "12345678") -> Task:
    return Task(f"{number}:", family, "countdown", {"number": number}, solution)


TASKS = TaskSet([task(n, "easy" if n % 2 else "hard", "12345678" if n % 3 else None) for n in range(60)])


class Desk(PromptDesk):
    """With a number for each report, as an actor gives it."""

    def record(self, outcomes: Sequence[Outcome]) -> None:
        first = self._reported.get("actor 0", 0)
        assert self.report("actor 0", first, outcomes) == first + len(outcomes)


def make(seed: int = 0, tasks: TaskSet[Task] = TASKS, **changes: Any) -> Desk:
    values: dict[str, Any] = {"kind": "llm", "sampling": {"group_size": SIZE}, "algorithm": {}, **changes}
    return Desk(LlmConfig.model_validate(values), tasks, seed=seed)


def outcome(one: Assignment, passes: int, fate: Any = "kept", **changes: Any) -> Outcome:
    given = {"attempts": SIZE, "sampled": SIZE, "units": 10, "hint": one.hint, **changes}
    return Outcome(one.group, one.number, passes, fate=fate, **given)


def test_groups_are_numbered_over_the_whole_run_and_name_their_prompts() -> None:
    desk = make()
    found = desk.take("actor 0", 5) + desk.take("actor 1", 3) + desk.take("actor 0", 0)
    assert [one.group for one in found] == list(range(8))
    assert all(one.task is TASKS[one.number] and one.hint == 0.0 for one in found)
    assert len({one.number for one in found[:5]}) == 5  # no prompt twice in one hand
    assert desk.metrics()["groups_out"] == 8


def test_waste_is_counted_in_tokens_by_reason_and_a_failed_prompt_is_none() -> None:
    desk = make()
    a, b, c, d, e = desk.take("actor 0", 5)
    desk.record(
        [
            outcome(a, 2, units=40),
            outcome(b, 0, "too_hard", units=30),
            outcome(c, 4, "too_easy", units=20),
            outcome(d, 1, "unscored", attempts=2, sampled=2 * SIZE, units=10),
            outcome(e, 0, "failed", attempts=0, sampled=0, units=0),
        ]
    )
    row = desk.metrics()
    assert row["waste/share"] == pytest.approx(60 / 100)
    reasons = [row[f"waste/{name}"] for name in ("too_hard", "too_easy", "unscored", "stale")]
    assert reasons == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert row["waste/sampled_completions"] == 5 * SIZE
    assert (row["waste/sampled_groups"], row["waste/kept_groups"], row["groups_out"]) == (4, 1, 0)


def test_groups_found_too_old_are_moved_from_kept_to_wasted_once() -> None:
    desk = make()
    desk.record(
        [outcome(one, 2, units=tokens) for one, tokens in zip(desk.take("actor 0", 4), (10, 20, 30, 40), strict=True)]
    )
    for total in (0, 1, 1, 3, 2):
        desk.stale(total)
    row = desk.metrics()
    assert (row["waste/sampled_tokens"], row["waste/sampled_groups"]) == (100, 4)
    assert row["waste/kept_groups"] == 1
    assert row["waste/stale"] == row["waste/share"] == pytest.approx(0.75)
    about, arrays = desk.state()
    again = make()
    again.load_state(json.loads(json.dumps(about)), arrays)
    again.stale(3)  # what was counted before the run was stopped
    assert again.metrics() == row


def test_families_that_pass_about_half_of_the_time_are_drawn_more() -> None:
    desk = make(curriculum={"floor": 0.1})
    for _ in range(60):
        found = desk.take("actor 0", 4)
        desk.record([outcome(one, 2 if one.task.family == "easy" else 0) for one in found])
    row = desk.metrics()
    assert row["family/easy/pass_rate"] > 0.4
    assert row["family/hard/pass_rate"] < 0.1
    assert row["family/easy/drawn"] > 0.75
    assert row["family/easy/drawn"] + row["family/hard/drawn"] == pytest.approx(1.0)


@settings(max_examples=20)
@given(st.integers(0, 5), st.sampled_from(["band", "uniform"]), st.integers(0, 2**31))
def test_after_a_round_trip_of_the_state_the_same_draws_follow(rounds: int, draw: str, seed: int) -> None:
    changes: dict[str, Any] = {"curriculum": {"draw": draw}, "algorithm": {"hints": {"shares": [0.25, 0.5]}}}
    desk = make(seed, **changes)
    for turn in range(rounds):
        desk.learnt(turn)
        desk.record([outcome(one, (one.number + turn) % 3) for one in desk.take("actor 0", 6)])
    desk.take("actor 0", 3)  # under way: not part of the state
    about, arrays = desk.state()
    again = make(seed + 1, **changes)
    again.load_state(json.loads(json.dumps(about)), arrays)
    assert again.metrics() == {**desk.metrics(), "groups_out": 0.0}
    for turn in range(3):
        first, second = desk.take("actor 0", 7), again.take("actor 0", 7)
        assert first == second
        for found, one in ((first, desk), (second, again)):
            one.record([outcome(a, (a.number + turn) % 4) for a in found])


def test_a_state_of_other_prompts_is_refused() -> None:
    about, arrays = make().state()
    other = make(tasks=TaskSet([task(n) for n in range(61)]))
    as_many = make(tasks=TaskSet([task(n, TASKS[n].family) for n in range(1, 60)] + [task(60, TASKS[0].family)]))
    for desk in (other, as_many):
        with pytest.raises(ValueError, match="other tasks than there are now"):
            desk.load_state(about, arrays)


def hints(**more: Any) -> dict[str, Any]:
    return {"algorithm": {"hints": {"shares": [0.25, 0.5], **more}}}


def test_a_prompt_nobody_solved_comes_again_with_more_and_more_of_its_solution() -> None:
    desk = make(**hints())
    found = desk.take("actor 0", 6)
    desk.record([outcome(one, 0, "too_hard") for one in found])
    solved = [one.number for one in found if one.task.solution is not None]
    assert 0 < len(solved) < 6
    assert desk.metrics()["hinted_waiting"] == len(solved)
    again = desk.take("actor 1", len(solved) + 2)
    assert [(one.number, one.hint) for one in again[: len(solved)]] == [(number, 0.25) for number in solved]
    assert [one.hint for one in again[len(solved) :]] == [0.0, 0.0]
    assert [one.group for one in again] == list(range(6, 6 + len(again)))
    desk.record([outcome(again[0], 0, "too_hard"), outcome(again[1], 1)])
    (third,) = desk.take("actor 0", 1)
    assert (third.number, third.hint) == (solved[0], 0.5)
    desk.record([outcome(third, 0, "too_hard")])
    assert desk.metrics()["hinted_waiting"] == 0  # there is no more to give


def test_what_passes_with_a_hint_says_nothing_of_the_prompt_without() -> None:
    hinted = make(**hints())
    hinted.record([outcome(one, 0, "too_hard") for one in hinted.take("actor 0", 6)])

    def known() -> dict[str, list[float]]:
        return {name: a.tolist() for name, a in hinted.state()[1].items() if name.startswith("tracker.")}

    before = known()
    again = hinted.take("actor 0", 2)
    assert {one.hint for one in again} == {0.25}
    hinted.record([outcome(one, SIZE, "too_easy") for one in again])
    np.testing.assert_equal(known(), before)
    assert hinted.metrics()["waste/sampled_groups"] == 8


def test_hints_wait_for_their_time_and_need_a_solution() -> None:
    desk = make(**hints(after=10))
    desk.record([outcome(one, 0, "too_hard") for one in desk.take("actor 0", 4)])
    assert desk.metrics()["hinted_waiting"] == 0
    desk.learnt(10)
    desk.record([outcome(one, 0, "too_hard") for one in desk.take("actor 0", 12)])
    assert desk.metrics()["hinted_waiting"] > 0
    failed = make(**hints())
    failed.record([outcome(one, 0, "failed", attempts=0, sampled=0, units=0) for one in failed.take("actor 0", 6)])
    assert failed.metrics()["hinted_waiting"] == 0  # it was never tried


def test_seeds_differ_in_everything_they_are_made_of() -> None:
    base = (1, 2**62, 3, 4)
    seeds = {sample_seed(*base)}
    for place in range(4):
        seeds.add(sample_seed(*(value + (i == place) for i, value in enumerate(base))))
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(*base) == sample_seed(*base)


def test_prompts_of_which_nothing_comes_do_not_draw_the_groups_to_themselves() -> None:
    """A tenth of the prompts cannot be sampled, and the others pass seldom."""
    desk = make(tasks=TaskSet([task(n) for n in range(400)]))
    drawn = broken = 0
    for _ in range(60):
        given = desk.take("actor 0", 20)
        drawn += len(given)
        broken += sum(one.number % 10 == 0 for one in given)
        nothing = {"attempts": 0, "sampled": 0, "units": 0}
        desk.record(
            [
                outcome(one, 0, "failed", **nothing) if one.number % 10 == 0 else outcome(one, int(one.number % 7 == 0))
                for one in given
            ]
        )
    assert broken < 0.15 * drawn
