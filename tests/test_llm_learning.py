"""Does reinforcement learn? Whole runs in one process, from one supervised warm start, judged on held-out prompts.

The figures are those of seed 0; evaluations are over 200 prompts with 8 completions each, where the standard error of pass@1
is about 0.02 and what two evaluations have in common (the prompts) makes that of a difference smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.api import train
from cluster.llm import parts
from configs.llm import LlmConfig
from configs.load import load_run
from learners.llm.models import save_model

COMMON = [
    "--mode=sync",
    "--tasks.kwargs",
    "low=2",
    "high=3",
    "largest=50",
    "largest_target=99",
    "--tasks.count=5000",
    "--eval.prompts=200",
    "--learners.threads=1",
    "--checkpoints.replay=false",
]


def config_of(*words: str) -> LlmConfig:
    config = load_run("countdown", [*COMMON, *words])
    assert isinstance(config, LlmConfig)
    return config


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model after its supervised phase, as a folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = config_of()
    model = parts.make_model(config, device="cpu")
    parts.warm_start(config, model, lambda text: None)
    folder = tmp_path_factory.mktemp("model") / "warm"
    save_model(model, folder)
    yield folder
    torch.set_num_threads(threads)


def run(warm: Path, folder: Path, name: str, *words: str) -> dict[str, Any]:
    """The summary of a run from the warm start."""
    config = config_of(f"--model.path={warm}", "--warm_start.steps=0", f"--root={folder}", f"--name={name}", *words)
    return train(config, show=lambda row, line: None).summary


@pytest.mark.timeout(900)
def test_reinforcement_lifts_pass_at_1(warm: Path, tmp_path: Path) -> None:
    found = run(warm, tmp_path, "a", "--stop.updates=100", "--eval.every=100")
    before, after = found["pass_at_1_before"], found["pass_at_1"]
    assert 0.05 < before < 0.3  # else it is another test
    assert after >= before + 0.15, f"pass@1 {before:.3f} → {after:.3f}"
    assert found["greedy"] >= found["greedy_before"] + 0.03
    assert found["unscored"] == 0
    assert found["consumed_groups"] == 100 * 32


@pytest.mark.timeout(900)
def test_clipping_against_the_behaviour_policy_bears_stale_data_that_ruins_plain_reinforce(
    warm: Path, tmp_path: Path
) -> None:
    stale = [
        "--actors.hold_back=8",
        "--learners.minibatches=4",
        "--learners.learning_rate=3e-4",
        "--sampling.group_size=8",
        "--curriculum.filter=none",
        "--curriculum.draw=uniform",
        "--tasks.count=1800",  # as many prompts of two numbers as of three
        "--stop.updates=60",
        "--eval.every=60",
    ]
    clip = run(warm, tmp_path, "clip", *stale, "--algorithm.loss=clip")
    plain = run(warm, tmp_path, "plain", *stale, "--algorithm.loss=reinforce")
    assert clip["pass_at_1_before"] == plain["pass_at_1_before"]
    assert clip["pass_at_1"] >= plain["pass_at_1"] + 0.1, (
        f"clip {clip['pass_at_1']:.3f}, plain {plain['pass_at_1']:.3f}"
    )
    assert plain["pass_at_1"] < 0.5 * plain["pass_at_1_before"]
