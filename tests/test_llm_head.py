"""The books of a language-model run, fed with made-up statuses of processes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cluster.books import STALL_S
from cluster.files import without_nonfinite
from cluster.llm.head import BARREN_BATCHES, LlmEvaluation, LlmHead, LlmTick, with_settings
from configs.llm import LlmConfig

COUNTERS = ("tokens", "groups", "kept_groups", "passes", "scored", "unscored", "cut_off", "failed")


def make_head(state: dict[str, Any] | None = None, **settings: Any) -> LlmHead:
    return LlmHead(LlmConfig.model_validate({"kind": "llm", **settings}), wall_started=0.0, state=state)


def actor(samples: int = 0, **more: Any) -> dict[str, Any]:
    return dict.fromkeys(COUNTERS, 0) | {"samples": samples, "version": 1, "running": 0.0, "waiting_for": None, **more}


def learner(updates: int, version: int = 1, **more: Any) -> dict[str, Any]:
    return {"updates": float(updates), "version": float(version), "waiting_for": None, **more}


def shard(inserted: int = 0, consumed: int = 0, stale: int = 0, **more: Any) -> dict[str, Any]:
    counters = {"inserted_groups": inserted, "consumed_groups": consumed, "dropped_stale_groups": stale}
    return {**counters, "waiting_groups": inserted - consumed - stale, "leased_groups": 0, **more}


def evaluation(step: int, score: float = 0.25, greedy: float = 0.5, seconds: float = 1.0) -> LlmEvaluation:
    figures = {"pass_at_1": score, "pass_at_8": 0.75, "3 numbers/pass_at_1": 0.1, "pass_at_1_error": 0.02}
    return LlmEvaluation(step, 1, {**figures, "greedy": greedy, "prompts": 64.0, "seconds": seconds})


def test_counts_are_sums_over_actors_and_over_their_restarts() -> None:
    head = make_head()
    first = actor(100, tokens=900, groups=20, kept_groups=12, passes=40, scored=90, unscored=10, cut_off=5, failed=1)
    head.tick(LlmTick(1.0, {"actor 0": first, "actor 1": actor(30, tokens=100)}, learner=learner(3)))
    head.rebase("actor 0", {})  # it died, and the counters of the new one start from zero
    row = head.tick(LlmTick(2.0, {"actor 0": actor(7, tokens=50, unscored=1), "actor 1": actor(31, tokens=110)}))
    assert (row["samples"], row["sampled_tokens"]) == (138, 1060)
    assert (row["groups"], row["kept_groups"], row["passes"], row["scored"]) == (20, 12, 40, 90)
    assert (row["unscored"], row["cut_off"], row["failed"]) == (11, 5, 1)
    assert (row["kept_share"], row["pass_rate"]) == pytest.approx((12 / 20, 40 / 90))
    assert (row["length_mean"], row["cut_off_share"]) == pytest.approx((1060 / 138, 5 / 138))
    assert head.step == 3
    assert head.work == 138


def test_a_learners_own_tokens_do_not_cover_those_sampled() -> None:
    head = make_head()
    metrics = {"tokens": 64.0, "loss": 0.5, "staleness/lag_0": 3.0}
    row = head.tick(LlmTick(1.0, {"actor 0": actor(5, tokens=50)}, learner=learner(1), learner_metrics=metrics))
    assert (row["sampled_tokens"], row["tokens"], row["staleness/lag_0"]) == (50, 64, 3)


def test_groups_are_counted_over_shards_restored_and_recovered() -> None:
    head = make_head()
    head.rebase("shard 0", shard(10, 6, 1))  # what a checkpoint brought was counted before
    row = head.tick(LlmTick(1.0, shards={"shard 0": shard(15, 9, 1), "shard 1": shard(4, 0, 2)}))
    assert (row["inserted_groups"], row["consumed_groups"], row["dropped_stale_groups"]) == (9, 3, 2)
    assert row["waiting_groups"] == 5 + 2
    head.recovered("shard 1", shard(6, 1, 2))
    row = head.tick(LlmTick(2.0, shards={"shard 0": shard(15, 9, 1), "shard 1": shard(6, 1, 2)}))
    assert (row["inserted_groups"], row["consumed_groups"], row["dropped_stale_groups"]) == (11, 4, 2)


def test_tokens_per_second_are_of_what_was_done_since_the_last_row_after_a_resumption_too() -> None:
    head = make_head()

    def tick(
        time: float, tokens: int, updates: int, decode: float, update: float, step_tokens: float
    ) -> dict[str, float]:
        actors = {"actor 0": actor(tokens, tokens=tokens, decode_s=decode)}
        metrics = {"tokens": step_tokens} if step_tokens else {}
        return head.tick(
            LlmTick(time, actors, learner=learner(updates, update_s=update), learner_metrics=metrics, first_step=0.5)
        )

    assert tick(1.0, 100, 2, 2.0, 4.0, 30.0)["decode_tokens_per_s"] == 50.0
    row = tick(2.0, 400, 5, 3.0, 6.0, 50.0)
    assert (row["decode_tokens_per_s"], row["learner_tokens_per_s"]) == (300.0, 3 * 50.0 / 2.0)
    row = tick(3.0, 400, 5, 3.0, 6.0, 0.0)
    assert not {"decode_tokens_per_s", "learner_tokens_per_s"} & row.keys()
    head = make_head(state=json.loads(json.dumps(without_nonfinite(head.state()))))
    assert tick(1.0, 80, 6, 2.0, 1.0, 40.0)["decode_tokens_per_s"] == 40.0
    assert head.counts.tokens == 480


def test_the_first_evaluation_is_of_the_policy_before_anything_was_learnt_by_reward() -> None:
    head = make_head(eval={"every": 10})
    assert not head.evaluation_due()  # there are no weights yet
    head.tick(LlmTick(1.0, learner=learner(0, version=1)))
    assert [head.evaluation_due(), head.evaluation_due()] == [True, False]
    head.evaluated(evaluation(0, 0.2, 0.3))
    head.tick(LlmTick(2.0, learner=learner(9)))
    assert not head.evaluation_due()
    head.tick(LlmTick(3.0, learner=learner(23)))
    assert [head.evaluation_due(), head.evaluation_due()] == [True, False]
    assert head.next_due == 30
    assert head.evaluated(evaluation(23, 0.6, 0.7))
    assert not head.evaluated(evaluation(30, 0.5, 0.9))
    found = head.summary(stop_reason="done")
    assert (found["pass_at_1_before"], found["greedy_before"]) == (0.2, 0.3)
    assert (found["pass_at_1"], found["greedy"], found["best_pass_at_1"]) == (0.5, 0.9, 0.6)
    again = make_head(eval={"every": 10}, state=json.loads(json.dumps(head.state())))
    again.tick(LlmTick(1.0, learner=learner(30)))
    assert not again.evaluation_due()  # a resumed run has been measured before
    assert again.summary(stop_reason="")["pass_at_1_before"] == 0.2


def test_where_evaluation_is_off_there_is_none() -> None:
    head = make_head(eval={"every": 0}, stop={"updates": 5})
    head.tick(LlmTick(1.0, learner=learner(5)))
    assert not head.evaluation_due()
    assert not head.final_evaluation_due
    found = head.summary(stop_reason="done")
    assert (found["pass_at_1"], found["pass_at_1_before"], found["best_pass_at_1"]) == (None, None, None)


def test_an_evaluation_says_and_records_what_it_found() -> None:
    one = evaluation(40)
    assert one.text == (
        "evaluation at learner step 40: pass@1 0.250 ± 0.020, greedy 0.500, pass@8 0.750 over 64 prompts in 1.0 s"
    )
    assert one.row()["eval/step"] == 40
    assert one.row()["eval/3 numbers/pass_at_1"] == 0.1
    head = make_head()
    head.evaluated(one)
    assert head.tick(LlmTick(1.0))["eval/pass_at_8"] == 0.75
    assert "eval/pass_at_8" not in head.tick(LlmTick(2.0))
    assert head.counts.eval_s == 1.0


def test_evaluations_take_no_part_in_throughput() -> None:
    head = make_head()
    head.tick(LlmTick(1.0, {"actor 0": actor(0)}, learner=learner(0), first_step=0.5))
    row = head.tick(LlmTick(11.0, {"actor 0": actor(50)}, learner=learner(5), paused_s=5.0, first_step=0.5))
    assert (row["samples_per_s"], row["updates_per_s"]) == (10.0, 1.0)
    row = head.tick(LlmTick(12.0, {"actor 0": actor(50)}, learner=learner(5), evaluating=True, first_step=0.5))
    assert "samples_per_s" not in row
    row = head.tick(LlmTick(14.0, {"actor 0": actor(70)}, learner=learner(7), first_step=0.5))
    assert "samples_per_s" not in row
    assert head.summary(stop_reason="")["samples_per_s"] == 10.0


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        ({"updates": 30}, "30 of 30 learner steps done"),
        ({"updates": None, "samples": 400}, "450 of 400 completions sampled"),
        ({"updates": None, "wall_s": 8.0}, "9 of 8 s are over"),
        ({"updates": 30, "pass_at_1": 0.5}, "solved: pass@1 0.550 ≥ 0.5"),
        ({"updates": 31, "samples": 500, "wall_s": 10.0, "pass_at_1": 0.6}, None),
    ],
)
def test_a_run_ends_at_the_first_condition_that_is_met(stop: dict[str, Any], reason: str | None) -> None:
    head = make_head(stop=stop, eval={"every": 10})
    head.tick(LlmTick(1.0, {"actor 0": actor(0)}, learner=learner(0), first_step=1.0))
    assert head.stop_reason() is None
    head.tick(LlmTick(10.0, {"actor 0": actor(450)}, learner=learner(30), first_step=1.0))
    head.evaluated(evaluation(20, 0.55))
    assert head.stop_reason() == reason
    # A run that was solved has just been evaluated; others are once more, with their last weights.
    assert head.final_evaluation_due == (reason is not None and not reason.startswith("solved"))
    head.evaluated(evaluation(30, 0.56))
    assert not head.final_evaluation_due
    assert head.evaluation_now == 0.56


def test_a_resumed_run_goes_on_with_its_counts() -> None:
    head = make_head()
    counters = {"tokens": 70, "groups": 4, "kept_groups": 3, "passes": 8, "scored": 16}
    tick = LlmTick(5.0, {"actor 0": actor(16, **counters)}, {"shard 0": shard(3, 2)}, learner(2, 3), first_step=1.0)
    head.tick(tick)
    head.evaluated(evaluation(2, 0.3))
    again = make_head(state=json.loads(json.dumps(head.state())))
    again.rebase("shard 0", shard(3, 2))
    row = again.tick(
        LlmTick(9.0, {"actor 0": actor(4, tokens=20)}, {"shard 0": shard(5, 3)}, learner(3, 5), first_step=8.0)
    )
    assert (row["samples"], row["sampled_tokens"], row["groups"], row["passes"]) == (20, 90, 4, 8)
    assert (row["inserted_groups"], row["consumed_groups"], row["updates"]) == (5, 3, 3)
    assert row["time_s"] == pytest.approx(4.0 + 1.0)  # the pause between is not part of it
    assert again.best == 0.3
    assert again.counts.incarnation == head.counts.incarnation + 1


def test_the_age_of_actors_is_measured_while_they_have_weights() -> None:
    head = make_head()
    actors = {"actor 0": actor(1, version=5), "actor 1": actor(1, version=8), "actor 2": actor(0, version=0)}
    row = head.tick(LlmTick(1.0, actors, learner=learner(9, version=9)))
    assert row["policy_lag"] == pytest.approx(9 - 6.5)
    assert "policy_lag" not in head.tick(LlmTick(2.0, actors, learner=learner(9, version=9), ending=True))


def test_a_stall_names_who_waits_for_whom() -> None:
    head = make_head()
    waiting = {"actor 0": actor(8, waiting_for="the queue at grpc://a: max_waiting_groups is 2")}
    tick: dict[str, Any] = {"actors": waiting, "shards": {"shard 0": shard(waiting=["reader x waits for writers"])}}
    tick["learner"] = learner(3, waiting_for="a batch from replay for 40 s")
    head.tick(LlmTick(1.0, **tick))
    assert head.stall() is None
    head.tick(LlmTick(2.0 + STALL_S, **tick))
    said = head.stall()
    assert said is not None
    for part in ("actor 0 waits for the queue at", "shard 0: reader x", "learner waits for a batch"):
        assert part in said
    assert head.stall() is None


def test_desk_metrics_are_part_of_the_row_and_figures_may_be_missing() -> None:
    head = make_head()
    row = head.tick(LlmTick(1.0, desk={"waste/share": 0.25, "family/a/drawn": 1.0}))
    assert (row["waste/share"], row["family/a/drawn"]) == (0.25, 1.0)
    assert not {"kept_share", "pass_rate", "length_mean", "policy_lag"} & row.keys()
    nothing = LlmEvaluation(0, 1, {**evaluation(0).figures, "pass_at_1": math.nan, "pass_at_1_error": math.nan})
    assert not head.evaluated(nothing)  # no completion could be judged
    assert head.evaluated(evaluation(5, 0.1))
    assert not head.evaluated(nothing)
    assert head.best == 0.1
    assert not head.evaluated(evaluation(6, 0.05))


def test_sampling_from_which_nothing_can_be_learnt_is_told_once_and_again_after_progress() -> None:
    head = make_head(learners={"batch_groups": 4})
    enough = BARREN_BATCHES * 4

    def told(kept: int = 0, updates: int = 0, reason: str = "", **fates: int) -> str | None:
        counts = {f"{fate}_groups": count for fate, count in fates.items()}
        status = actor(1, groups=kept + sum(fates.values()), kept_groups=kept, unscored_reason=reason, **counts)
        head.tick(LlmTick(1.0, {"actor 0": status}, learner=learner(updates)))
        return head.barren()

    assert told(too_hard=enough - 1) is None
    line = told(too_hard=enough - 8, too_easy=2, unscored=6, reason="verifier v raised " + "x" * 900)
    assert line is not None
    assert line.startswith(
        f"no group was kept of the last {enough}: 80 % too hard, 5 % too easy, 15 % unscored (last reason: verifier v raised"
    )
    assert "warm_start.steps" in line
    assert len(line) < 1_000
    assert told(too_hard=3 * enough) is None  # once
    assert told(kept=1, too_hard=3 * enough) is None
    assert told(kept=1, too_hard=3 * enough, unscored=enough - 1) is None
    line = told(kept=1, too_hard=3 * enough, unscored=enough, reason="verifier v is not there")
    assert line is not None
    assert (
        "0 % too hard, 0 % too easy, 100 % unscored (last reason: verifier v is not there); the verifier fails" in line
    )
    assert told(kept=1, too_hard=3 * enough, unscored=enough, updates=1) is None  # a learner step is progress as well
    line = told(kept=1, too_hard=3 * enough, unscored=enough, too_easy=enough, updates=1)
    assert line is not None
    assert "100 % too easy" in line
    assert "curriculum.high" in line
    again = make_head(state=json.loads(json.dumps(head.state())), learners={"batch_groups": 4})
    assert again.barren() is None  # what was sampled before the stop is not told again
    assert again.counts.too_hard_groups == 3 * enough


def test_sampled_tokens_per_second_are_those_of_all_actors_between_two_rows() -> None:
    head = make_head()
    head.tick(LlmTick(1.0, {"actor 0": actor(1, tokens=10)}, first_step=0.5))
    actors = {"actor 0": actor(2, tokens=50), "actor 1": actor(2, tokens=60)}
    row = head.tick(LlmTick(6.0, actors, first_step=0.5))
    assert row["sampled_tokens_per_s"] == 100.0 / 5.0


@pytest.mark.parametrize(
    ("limit", "setting"), [("capacity_bytes", "replay.capacity_mb"), ("max_message_bytes", "replay.capacity_mb")]
)
def test_a_limit_of_a_queue_is_told_with_the_setting_it_follows_from(limit: str, setting: str) -> None:
    assert setting in with_settings(f"actor 0 waits for readers to take groups: {limit} is 9")
    assert with_settings("nothing of the kind") == "nothing of the kind"
    head = make_head()
    waiting = {"actor 0": actor(8, waiting_for=f"readers of queue 'q' to take groups: {limit} is 9")}
    head.tick(LlmTick(1.0, waiting))
    head.tick(LlmTick(2.0 + STALL_S, waiting))
    assert setting in (head.stall() or "")
