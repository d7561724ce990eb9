"""The head's bookkeeping, fed with made-up statuses of processes."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.books import STALL_S
from cluster.head import Evaluation, Head, Tick
from configs.schema import RunConfig


def make_head(**settings: Any) -> Head:
    return Head(RunConfig.model_validate(settings), wall_started=0.0)


def shard(inserted: int, *, sampled: int = 0, items: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "inserted": inserted,
        "sampled": sampled,
        "items": inserted if items is None else items,
        "capacity": 100,
        **more,
    }


def actor(episodes: int = 0, **more: Any) -> dict[str, Any]:
    return {"episodes": episodes, "broken_episodes": 0, "version": 1, "waiting_for": None, **more}


def learner(updates: int, version: int = 1, **more: Any) -> dict[str, Any]:
    return {"updates": float(updates), "version": float(version), "waiting_for": None, **more}


def evaluation(step: int, *returns: float, seconds: float = 1.0) -> Evaluation:
    return Evaluation(step, 1, returns, seconds)


def test_counts_are_sums_over_processes_and_over_their_restarts() -> None:
    head = make_head()
    head.tick(Tick(1.0, {"actor 0": actor(2)}, {"shard 0": shard(30, sampled=64), "shard 1": shard(12)}, learner(5)))
    assert (head.counts.env_steps, head.counts.sampled, head.counts.episodes) == (42, 64, 2)

    # Actor 0 died: the counters of the new one start from zero. Shard 1 was restored with 10 of its 12 steps.
    head.rebase("actor 0", {})
    head.rebase("shard 1", shard(10))
    row = head.tick(
        Tick(
            2.0,
            {"actor 0": actor(1, broken_episodes=3)},
            {"shard 0": shard(40, sampled=60), "shard 1": shard(15)},
            learner(9),
        )
    )
    assert row["env_steps"] == 42 + 10 + 5
    assert head.counts.sampled == 60  # a stream gave back what its reader had not used
    assert (row["episodes"], row["broken_episodes"]) == (3, 3)
    assert row["replay_size"] == 55
    assert row["replay_fill"] == pytest.approx(55 / 200)


def test_a_shard_that_recovered_its_steps_counts_those_after_its_last_status_as_well() -> None:
    head = make_head()
    clocks = {"time/inserting_s": 3.0}
    head.tick(Tick(1.0, shards={"shard 0": shard(30, sampled=64, **clocks)}))
    head.recovered("shard 0", shard(34, sampled=70, **{"time/inserting_s": 0.5}))
    row = head.tick(Tick(2.0, shards={"shard 0": shard(40, sampled=80, **{"time/inserting_s": 1.0})}))
    assert (row["env_steps"], head.counts.sampled) == (40, 80)
    assert row["time/shard/inserting_s"] == pytest.approx(3.0 + 0.5)  # those of the new one began at zero


def test_a_restarted_learner_goes_back_in_updates_and_never_in_versions() -> None:
    head = make_head()
    head.tick(Tick(1.0, learner=learner(100, version=7)))
    head.rebase("learner", {})
    row = head.tick(Tick(2.0, learner=learner(80, version=-1)))
    assert (row["updates"], row["policy_version"]) == (80, 7)
    assert head.tick(Tick(3.0, learner=learner(81, version=8)))["policy_version"] == 8


def test_steps_that_arrive_between_the_last_tick_and_a_checkpoint_are_counted_once() -> None:
    head = make_head()
    head.tick(Tick(1.0, shards={"shard 0": shard(30)}))
    head.count_shards({"shard 0": {"inserted": 34, "sampled": 0}})
    assert head.state()["counts"]["env_steps"] == 34
    assert head.tick(Tick(2.0, shards={"shard 0": shard(36)}))["env_steps"] == 36


def test_seconds_in_states_are_summed_over_processes_and_restarts() -> None:
    head = make_head()
    actors = {"actor 0": actor(env_s=1.0, silent_s=3.0), "actor 1": actor(env_s=2.0)}
    head.tick(Tick(1.0, actors, {"shard 0": shard(1, **dict[str, Any]({"time/inserting_s": 0.5}))}))
    head.rebase("actor 0", {})
    row = head.tick(
        Tick(2.0, {"actor 0": actor(env_s=0.25)}, {"shard 0": shard(1, **dict[str, Any]({"time/inserting_s": 0.75}))})
    )
    assert row["time/actor/env_s"] == pytest.approx(3.25)
    assert row["time/shard/inserting_s"] == pytest.approx(0.75)
    assert "time/actor/silent_s" not in row  # how long a process has not answered is no state of it


def test_throughput_leaves_evaluations_out_and_time_starts_with_the_first_step() -> None:
    head = make_head()
    steps = [
        (10.0, 0, False),
        (11.0, 100, False),
        (12.0, 200, False),
        (15.0, 300, True),
        (16.0, 310, False),
        (17.0, 410, False),
    ]
    rows = [head.tick(Tick(at, shards={"shard 0": shard(n)}, evaluating=on)) for at, n, on in steps]
    assert "steps_per_s" not in rows[0]
    assert [row.get("steps_per_s") for row in rows[2:]] == [100.0, None, None, 100.0]
    assert rows[-1]["time_s"] == pytest.approx(17.0 - 11.0)
    assert rows[-1]["wall_s"] == 17.0
    # The second that brought the first step counts as well; those beside the evaluation do not.
    assert head.summary(stop_reason="test")["steps_per_s"] == pytest.approx(300 / 3)


def test_time_in_which_training_stood_still_is_left_out_of_throughput() -> None:
    head = make_head()
    head.tick(Tick(0.0, shards={"shard 0": shard(0)}))
    head.tick(Tick(1.0, shards={"shard 0": shard(10)}))
    row = head.tick(Tick(7.0, shards={"shard 0": shard(30)}, paused_s=4.0))
    assert row["steps_per_s"] == pytest.approx(20 / 2)


def test_samples_per_insert_are_reckoned_from_the_minimum_size_on() -> None:
    head = make_head(replay={"min_size": 50})
    assert "samples_per_insert" not in head.tick(Tick(1.0, shards={"shard 0": shard(50)}))
    assert head.tick(Tick(2.0, shards={"shard 0": shard(60, sampled=320)}))["samples_per_insert"] == 32.0


def test_the_policy_lag_is_the_mean_over_actors_that_have_a_policy() -> None:
    head = make_head()
    actors = {"actor 0": actor(version=6), "actor 1": actor(version=9), "actor 2": actor(version=0)}
    assert head.tick(Tick(1.0, actors, learner=learner(1, version=10)))["policy_lag"] == pytest.approx(2.5)


def test_returns_are_averaged_over_the_last_100_episodes() -> None:
    head = make_head()
    head.tick(Tick(1.0, returns=[1000.0], lengths=[1000]))
    row = head.tick(Tick(2.0, returns=[float(n) for n in range(100)], lengths=[7] * 100))
    assert (row["return_mean_100"], row["length_mean_100"]) == (49.5, 7.0)


def test_evaluations_are_due_once_per_multiple_and_only_with_a_policy() -> None:
    head = make_head(eval={"every": 100})
    head.tick(Tick(1.0, shards={"shard 0": shard(150)}))
    assert not head.evaluation_due()  # no weights yet
    head.tick(Tick(2.0, shards={"shard 0": shard(150)}, learner=learner(1)))
    assert [head.evaluation_due(), head.evaluation_due()] == [True, False]
    head.tick(Tick(3.0, shards={"shard 0": shard(199)}, learner=learner(1)))
    assert not head.evaluation_due()
    # 200 and 300 passed while an evaluation ran: one makes up for both.
    head.tick(Tick(4.0, shards={"shard 0": shard(310)}, learner=learner(1)))
    assert [head.evaluation_due(), head.evaluation_due()] == [True, False]
    assert head.next_due == 400
    never = make_head(eval={"every": 0})
    never.tick(Tick(1.0, shards={"shard 0": shard(10**6)}, learner=learner(1)))
    assert not never.evaluation_due()


def test_an_evaluation_stands_in_one_row_and_the_best_is_kept() -> None:
    head = make_head(eval={"every": 100})
    head.tick(Tick(1.0, shards={"shard 0": shard(100)}, learner=learner(1)))
    assert head.evaluated(evaluation(100, 1.0, 3.0, seconds=2.5))
    assert head.evaluation_now == 2.0
    row = head.tick(Tick(2.0, shards={"shard 0": shard(110)}, learner=learner(1)))
    assert {k: row[k] for k in row if k.startswith("eval/")} == {
        "eval/mean_return": 2.0,
        "eval/std_return": 1.0,
        "eval/episodes": 2,
        "eval/seconds": 2.5,
        "eval/step": 100,
    }
    assert head.evaluation_now is None
    assert not head.evaluated(evaluation(110, 2.0))  # as good is not better
    assert head.evaluated(evaluation(120, 2.5))
    assert (head.best, head.counts.eval_s) == (2.5, 4.5)


def test_stop_reasons() -> None:
    head = make_head(stop={"steps": 100, "wall_s": 20.0, "mean_return": 5.0}, eval={"every": 10})
    head.tick(Tick(1.0, shards={"shard 0": shard(0)}))
    head.tick(Tick(2.0, shards={"shard 0": shard(99)}, learner=learner(1)))
    head.evaluated(evaluation(99, 4.9))
    assert head.stop_reason() is None
    head.tick(Tick(3.0, shards={"shard 0": shard(103)}, learner=learner(1)))
    assert head.stop_reason() == "103 of 100 environment steps done"
    assert head.final_evaluation_due
    head.evaluated(evaluation(103, 5.0))
    assert head.stop_reason() == "solved: mean return 5.0 ≥ 5"
    assert not head.final_evaluation_due

    head = make_head(stop={"steps": None, "wall_s": 20.0})
    head.tick(Tick(100.0, shards={"shard 0": shard(0)}))
    head.tick(Tick(101.0, shards={"shard 0": shard(1)}))
    head.tick(Tick(120.5, shards={"shard 0": shard(2)}))
    assert head.stop_reason() is None  # counted from the first environment step
    head.tick(Tick(121.5, shards={"shard 0": shard(2)}))
    assert head.stop_reason() == "20 of 20 s are over"


def test_a_stall_is_told_once_and_names_who_waits_for_whom() -> None:
    head = make_head()
    stuck: dict[str, Any] = {
        "actors": {"actor 0": actor(waiting_for="replay at grpc://host:1 for 31 s"), "actor 1": actor()},
        "shards": {"shard 0": shard(40, waiting=["writer for 31 s: waiting for the learner to sample"])},
        "learner": learner(9, waiting_for="a batch from replay for 30 s", silent_s=0.3),
    }
    head.tick(Tick(10.0, **stuck))
    head.tick(Tick(11.0 + STALL_S - 2.0, **stuck))
    assert head.stall() is None
    head.tick(Tick(10.0 + STALL_S, **stuck))
    assert head.stall() == (
        "nothing moved for 30 s: actor 0 waits for replay at grpc://host:1 for 31 s; shard 0: writer for 31 s: waiting for "
        "the learner to sample; learner waits for a batch from replay for 30 s"
    )
    head.tick(Tick(20.0 + STALL_S, **stuck))
    assert head.stall() is None  # told already
    head.tick(Tick(21.0 + STALL_S, **{**stuck, "learner": learner(10)}))  # it moved
    head.tick(Tick(21.0 + 2 * STALL_S, **{**stuck, "learner": learner(10, silent_s=29.0)}))
    told = head.stall()
    assert told is not None
    assert "learner has not answered for 29 s" in told


def test_a_stall_at_the_start_names_what_is_not_there() -> None:
    head = make_head()
    for at in (0.0, STALL_S):
        head.tick(Tick(at))
    told = head.stall()
    assert told is not None
    assert "the learner has not started" in told
    assert "no actor has started" in told


def test_a_resumed_head_goes_on_with_its_counts() -> None:
    settings = {"eval": {"every": 100}, "actors": {"random_steps": 1000, "count": 2}}
    before = make_head(**settings)
    before.tick(Tick(5.0, shards={"shard 0": shard(0)}))
    before.tick(
        Tick(6.0, {"actor 0": actor(3)}, {"shard 0": shard(50)}, learner(10, 4), returns=[1.0, 2.0], lengths=[10, 20])
    )
    before.tick(Tick(9.0, {"actor 0": actor(4)}, {"shard 0": shard(150)}, learner(20, 5)))
    assert before.evaluation_due()
    before.evaluated(evaluation(150, 7.0))

    head = Head(RunConfig.model_validate(settings), wall_started=1000.0, state=before.state())
    assert (head.counts.env_steps, head.counts.updates, head.counts.version, head.best) == (150, 20, 5, 7.0)
    assert head.counts.incarnation == before.counts.incarnation + 1
    assert head.random_steps_left == (1000 - 150) // 2
    head.rebase("shard 0", shard(150))
    head.tick(Tick(1010.0, {"actor 0": actor(0)}, {"shard 0": shard(150)}, learner(20, 6)))
    row = head.tick(Tick(1012.0, {"actor 0": actor(1)}, {"shard 0": shard(160)}, learner(21, 6)))
    assert (row["env_steps"], row["updates"], row["episodes"], row["policy_version"]) == (160, 21, 5, 6)
    assert row["return_mean_100"] == 1.5
    assert row["time_s"] == pytest.approx(3.0)  # time stood still between the stop and the first step after it
    assert not head.evaluation_due()  # the next one is due at step 200, as before


def test_checkpoints_are_due_by_the_clock() -> None:
    head = make_head(checkpoints={"every_s": 10.0})
    assert not head.checkpoint_due(9.0)
    assert head.checkpoint_due(10.0)
    head.checkpointed(12.0)
    assert not head.checkpoint_due(21.0)
    assert head.checkpoint_due(22.0)
