"""The learner benchmark: what it counts and compares is right, and every case is one that a run could have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import learner, learner_cases
from tests.benchmarks.learner_cases import SCHEMAS, Case, cases, chosen, judge, random_windows
from tests.benchmarks.plain_sac import POLICY_EVERY, PlainBatch, PlainSac

MFLOP_OF_PLAIN = 692.3  # by hand: 2 × 256 × the products' sizes of CleanRL's loop, one policy update per critic update
MFLOP_OF_SAC = 577.1  # by hand: the same with no product that nobody reads


def case_of(name: str, device: str = "cpu") -> Case:
    (found,) = [case for case in cases(device) if case.name == name]
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_a_legal_run_and_groups_share_a_batch_size_and_data(device: str) -> None:
    found = cases(device)
    assert len({case.name for case in found}) == len(found)
    for group in {case.group for case in found}:
        members = [case for case in found if case.group == group]
        configs = [learner._config(case, "cpu") for case in members]
        assert len({config.learners.batch_size for config in configs}) == 1
        assert len({case.data for case in members}) == 1
        assert [config.learners.precision for config in configs] == [case.dtype for case in members]


def test_the_plain_loop_computes_as_many_products_as_a_single_file_implementation() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    plain, batch = PlainSac(17, 6), PlainBatch.random(256, 17, 6, "cpu", seed=0)
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(POLICY_EVERY):
            plain.update(batch)
    assert counter.get_total_flops() / POLICY_EVERY / 1e6 == pytest.approx(MFLOP_OF_PLAIN, abs=0.1)


def test_the_plain_loop_learns_what_sac_learns() -> None:
    """Rewards of −‖a − 0.5‖² that end the episode: the critics find them, and the policy moves to 0.5."""
    torch.manual_seed(0)
    plain = PlainSac(3, 2, hidden=32)
    generator = torch.Generator().manual_seed(0)
    for seed in range(400):
        batch = PlainBatch.random(64, 3, 2, "cpu", seed=seed)
        reward = -(batch.action - 0.5).square().sum(1, keepdim=True)
        plain.update(batch._replace(reward=reward, done=torch.ones_like(reward)))
        plain.alpha = 0.0
    observation = torch.randn(256, 3, generator=generator)
    with torch.no_grad():
        action, _ = plain.actor.sample(observation)
        value = plain.qf1(observation, torch.full((256, 2), 0.5))
    assert action.mean().item() == pytest.approx(0.5, abs=0.2)
    assert value.mean().item() == pytest.approx(0.0, abs=0.1)


def test_the_products_of_the_update_are_counted_for_its_batch() -> None:
    flops = learner._flops_per_update(case_of("sac/256"))
    # Outer products of the single output are not counted: 0.1 % of all.
    assert flops is not None
    assert flops / 1e6 == pytest.approx(MFLOP_OF_SAC, rel=2e-3)
    assert learner._flops_per_update(case_of("sac/1024")) == 4 * flops
    assert learner._flops_per_update(case_of("sac/256/bfloat16")) == flops


def test_a_line_says_what_was_measured_and_is_kept_under_the_machines_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(learner, "RESULTS", tmp_path / "results")
    words = [
        "--json",
        "--save",
        "--seconds",
        "0.02",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--only",
        "sac/64",
    ]
    assert learner.main(words) == 0
    printed = capsys.readouterr().out
    about, *lines = [json.loads(text) for text in printed.splitlines()]
    assert (tmp_path / "results" / f"learner-{about['machine']}.jsonl").read_text() == printed
    assert about["torch"] == torch.__version__
    assert [(line["case"], line["dtype"]) for line in lines] == [("sac/64", "float32"), ("sac/64/bfloat16", "bfloat16")]
    for line in lines:
        assert "skipped" not in line, line
        assert (line["threads"], line["device"], line["batch"]) == (1, "cpu", 64)
        assert line["updates_per_s"] > 0
        assert line["plain_updates_per_s"] == lines[0]["plain_updates_per_s"] > 0
        assert line["ms_lowest"] <= line["ms_per_update"] <= line["ms_highest"]
        limit = line["gemm_gflops"] * 1e9 / line["flops_per_update"]
        assert line["gemm_limit_share"] == pytest.approx(line["updates_per_s"] / limit)
        assert line["gemm_gflops"] == max(v for k, v in line.items() if k.startswith("gemm_") and k.count("_gflops"))


def test_a_case_that_cannot_run_is_skipped_and_says_why() -> None:
    broken = Case("broken", "broken", ("--algorithm.chain.length=0",))
    (line,) = learner.measure_group([case_of("sac/64"), broken], device="cpu", threads=1, seconds=0.01, repeats=1)[1:]
    assert "algorithm.chain.length" in line["skipped"]
    assert "updates_per_s" not in line


def test_rates_are_paired_by_round() -> None:
    """A machine that is half as fast in the second round leaves the ratio what it is."""
    line = {"dtype": "float32", "flops_per_update": 1e9}
    rates = {"mine": [40.0, 20.0, 10.0], "plain": [10.0, 5.0, 2.5]}
    rates |= {
        "gemm/float32/mm": [100.0, 50.0, 25.0],
        "gemm/float32/bmm": [80.0, 80.0, 80.0],
        "gemm/bfloat16/mm": [900.0],
    }
    found = learner._figures(line, rates, "mine")
    assert (found["updates_per_s"], found["ratio"]) == (20.0, 4.0)
    assert (found["gemm_gflops"], found["gemm_way"]) == (80.0, "bmm")
    assert found["gemm_limit_share"] == pytest.approx(0.25)
    assert (found["ms_lowest"], found["ms_highest"]) == (25.0, 100.0)


def line_of(case: str, **figures: Any) -> dict[str, Any]:
    known = {"case": case, "group": "sac", "device": "cpu", "threads": 1, "ms_per_update": 1.0, "flops_per_update": 1.0}
    return {**known, **figures}


def test_goals_are_judged_by_their_own_cases() -> None:
    lines = [
        line_of("sac/256", ratio=2.5),
        line_of("sac/256/compile", ratio=2.7),
        line_of("sac/256/bfloat16", ratio=3.9),
        line_of("sac/256", ratio=9.0, threads=2),
        line_of("sac/256/mse"),
        line_of("sac/256/hl_gauss/51 bins", ms_per_update=1.2),
        line_of("sac/256/hl_gauss/101 bins", ms_per_update=1.5),
        line_of("sac/256/K=1"),
        line_of("sac/256/K=4/mean", ms_per_update=3.0, flops_per_update=3.24),
        {"case": "sac/256/K=4/one", "threads": 1, "device": "cpu", "skipped": "no such thing"},
    ]
    verdicts = judge(lines)
    assert [(v["value"], v["met"]) for v in verdicts] == [
        (2.7, True),
        (3.9, False),
        (1.2, True),
        (1.5, False),
        (3.0, True),
    ]
    on_gpu = judge([line_of("sac/256/compile", device="cuda", updates_per_s=3100.0)])
    assert [(v["value"], v["met"]) for v in on_gpu] == [(3100.0, True)]


@pytest.mark.parametrize("name", ["sac/256", "sac/256/decoupled 5 to 1", "dqn/256", "dqn/32/nature", "r2d2/32"])
def test_made_up_windows_have_the_shape_and_types_of_sampled_ones(name: str) -> None:
    from cluster import parts

    case = case_of(name)
    config = learner._config(case, "cpu")
    schema = parts.row_schema(config, SCHEMAS[case.data])
    window = parts.window(config, schema)
    windows = random_windows(schema, window, 8, seed=0)
    assert windows.steps.shape == (8, window.rows)
    assert (windows.length == window.length).all()
    actions = windows.steps["action"]
    if schema.action.choices:
        assert set(np.unique(actions)) <= set(range(schema.action.choices))
    else:
        assert np.abs(actions).max() <= 1.0
    again = random_windows(schema, window, 8, seed=0)
    assert again.steps.tobytes() == windows.steps.tobytes()


def test_patterns_choose_cases() -> None:
    names = [case.name for case in chosen(cases("cpu"), "K=4/*")]
    assert names == ["sac/256/K=4/mean", "sac/256/K=4/one"]
    with pytest.raises(SystemExit):
        learner.main(["--only", "nothing of this name"])
    assert learner_cases.chosen(cases("cpu"), "") == cases("cpu")
