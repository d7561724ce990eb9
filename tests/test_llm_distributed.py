"""Several learners of a language model: what one learns from their batches together, with weights whole and divided."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.distributed.tensor import DTensor

from configs.llm import LlmLearnersSettings, SamplingSettings
from configs.policy_gradient import PolicyGradientSettings
from learners.distributed import Group
from learners.llm.learner import PolicyGradient
from learners.llm.loop import LlmLoop
from learners.llm.rows import SCHEMA
from learners.staging import ALONE, Share
from replay.queue_readers import CallQueueSource
from replay.queue_sampler import QueueSampler
from replay.queue_spec import QueueSpec
from replay.queue_writers import CallQueueWriter
from replay.queues import Queue
from tests.test_distributed import PROCESSES, in_a_group
from tests.test_llm_learner import MAX_TOKENS, completions, groups_of, model, naive, replaced, wait

PROCESSES.set_forkserver_preload(
    ["learners.llm.learner", "learners.llm.loop", "transformers", "tests.test_llm_learner"]
)
GROUPS, STEPS = 4, 2

CASES: dict[str, dict[str, Any]] = {
    "whitened, Clip-Cov, kl": {
        "advantage": "whiten",
        "entropy": {"kind": "clip_cov", "fraction": 0.3, "low": 0.0, "high": 9.0},
        "kl": {"coefficient": 0.1},
        "mean": "sequence",
    },
    "KL-Cov on part of the tokens": {
        "entropy": {"kind": "kl_cov", "fraction": 0.1},
        "subsample": {"tokens": 0.5, "rollouts": 3},
        "overlong": {"kind": "mask"},
    },
    "decoupled": {"loss": "decoupled", "correction_cap": 1.5, "mean": "constant"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    share: Share, *, dtype: torch.dtype = torch.float64, algorithm: dict[str, Any], **learners: Any
) -> PolicyGradient:
    return PolicyGradient(
        model(dtype=dtype, **learners.pop("model", {})),
        PolicyGradientSettings(**algorithm),
        LlmLearnersSettings(learning_rate=1e-3, micro_tokens=90, **learners),
        SamplingSettings(max_tokens=MAX_TOKENS, temperature=0.8),
        seed=0,
        share=share,
    )


def part(rows: pa.RecordBatch, share: Share) -> pa.RecordBatch:
    """A learner's groups; the first has more of the tokens, and more micro-batches."""
    if share.count == 1:
        return rows
    return rows[:12] if share.rank == 0 else rows[12:]


def batch(seed: int, **options: Any) -> pa.RecordBatch:
    """Groups, all completions of the last of which were cut off: where these are masked the second learner has nothing to learn."""
    rows = completions(seed, groups=GROUPS, **options)
    finish = pa.array(["stop"] * 12 + ["length"] * 4)
    return rows.set_column(SCHEMA.get_field_index("finish"), SCHEMA.field("finish"), finish)


def train(learner: PolicyGradient, share: Share) -> tuple[dict[str, Any], dict[str, float]]:
    """The state after some learner steps, as numpy arrays, and the metrics."""
    for seed in range(STEPS):
        learner.published(seed)
        learner.update(part(batch(seed, version=max(0, seed - 1)), share))
    return {name: tensor.numpy() for name, tensor in learner.state().items()}, learner.metrics()


def assert_same(alone: tuple[Any, Any], found: list[tuple[Any, Any]], tolerance: float) -> None:
    state, row = alone
    for other, other_row in found:
        assert other.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_allclose(other[name], array, rtol=0.0, atol=tolerance, err_msg=name)
            np.testing.assert_array_equal(other[name], found[0][0][name], err_msg=name)
        assert other_row == pytest.approx(row, rel=1e-6, abs=1e-9)


def _whole(group: Group) -> list[Any]:
    share = Share(group.rank, group.count, group.mean_)
    return [train(make(share, algorithm=algorithm), share) for algorithm in CASES.values()]


def test_two_learners_learn_what_one_does_from_their_batches_together() -> None:
    """Of unequal parts: a mean over each learner's tokens would not do."""
    found = in_a_group(_whole, 2)
    for number, algorithm in enumerate(CASES.values()):
        alone = make(ALONE, algorithm=algorithm)
        start = alone.state()
        state = train(alone, ALONE)
        moved = max(float(np.abs(state[0][name] - t.numpy()).max()) for name, t in start.items() if "model." in name)
        assert moved > 1e-3, "a comparison of weights that have hardly moved says little"
        assert_same(state, [learner[number] for learner in found], 1e-9)


DIVIDED: list[dict[str, Any]] = [
    {"algorithm": {"kl": {"coefficient": 0.1}, "entropy": {"kind": "kl_cov", "fraction": 0.1}}},
    {"algorithm": {"overlong": {"kind": "mask"}}, "activation_checkpointing": True},
    {"algorithm": {"kl": {"coefficient": 0.1}}, "model": {"lora_rank": 4}},
]


def _divided(group: Group) -> list[Any]:
    share = Share(group.rank, group.count, group.mean_)
    found: list[Any] = []
    for options in DIVIDED:
        learner = make(share, shard_parameters=True, **_copy(options))
        found.append(train(learner, share))
        found.append(learner.policy_bytes())
    assert all(isinstance(p, DTensor) for p in learner._network.parameters())
    again = make(share, shard_parameters=True, **_copy(options))
    again.load_state(learner.state())
    for one in (learner, again):
        one.update(part(batch(7), share))
    found.append([{name: t.numpy() for name, t in one.state().items()} for one in (learner, again)])
    single = make(share, dtype=torch.float32, shard_parameters=True, precision="bfloat16", algorithm={})
    single.update(part(batch(0), share))
    found.append(single.metrics())
    return found


def _copy(options: dict[str, Any]) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}


def test_divided_weights_learn_what_whole_ones_do() -> None:
    found = in_a_group(_divided, 2)
    for number, options in enumerate(DIVIDED):
        learner = make(ALONE, **_copy(options))
        assert_same(train(learner, ALONE), [one[2 * number] for one in found], 1e-9)
        assert all(len(one[2 * number + 1]) == len(learner.policy_bytes()) for one in found)
    for straight, resumed in (one[-2] for one in found):
        for name, array in straight.items():
            np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert all(0.0 < one[-1]["gradient_norm"] < 100.0 for one in found)


LAGGING: list[dict[str, Any]] = [
    {"algorithm": {"advantage": "whiten"}},
    {
        "algorithm": {"kl": {"coefficient": 0.1}, "entropy": {"kind": "kl_cov", "fraction": 0.1}},
        "shard_parameters": True,
    },
    {"algorithm": {"overlong": {"kind": "mask"}}, "shard_parameters": True, "activation_checkpointing": True},
    {"algorithm": {}, "model": {"lora_rank": 4}, "shard_parameters": True},
]


def lag_by_one(share: Share, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The state and metrics of three steps; in the second, after an update, the last group is of the first weights.

    That is the second learner's; actors give its log-probabilities wrong by 0.3.
    """
    learner = make(share, **_copy(options))
    learner.published(0)
    learner.update(part(batch(0, version=-1), share))
    learner.published(1)
    rows = batch(1, version=-1)
    versions, log_probs = (rows[name].flatten().to_numpy().copy() for name in ("versions", "log_probs"))
    begin = int(sum(map(len, rows["tokens"].to_pylist()[:12])))
    new = torch.cat([found for found, _ in naive(model(**options.get("model", {})).network, rows, 0.8)])
    versions[begin:], log_probs[begin:] = 0, new[begin:].detach().numpy() + 0.3
    learner.update(part(replaced(replaced(rows, "versions", versions), "log_probs", log_probs), share))
    learner.published(2)
    learner.update(part(batch(2, version=0), share))
    return {name: tensor.numpy() for name, tensor in learner.state().items()}, learner.metrics()


def _lagging(group: Group) -> list[Any]:
    share = Share(group.rank, group.count, group.mean_)
    return [lag_by_one(share, options) for options in LAGGING]


def test_past_weights_are_scored_by_learners_that_have_none_of_their_samples_too() -> None:
    found = in_a_group(_lagging, 2)
    for number, options in enumerate(LAGGING):
        alone = {name: value for name, value in _copy(options).items() if name != "shard_parameters"}
        state, row = lag_by_one(ALONE, alone)
        assert row["gap/mean"] == pytest.approx(0.3, abs=1e-6)
        assert row["gap/max"] == pytest.approx(0.3, abs=1e-5)
        assert row["gap/lag_1"] != pytest.approx(0.3, abs=1e-3)
        assert_same((state, row), [learner[number] for learner in found], 1e-9)


# -- the loop ---------------------------------------------------------------------------------------------------------


def _loop(group: Group) -> tuple[Any, ...]:
    """A loop that learner 1 is told to end, and learner 0 for its state; the groups of learner 1 come late."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spec = QueueSpec(name="completions", schema=SCHEMA, max_waiting_groups=64, capacity_bytes=1 << 20)
        table = Queue(spec, f"{folder}/queue")
        writer = CallQueueWriter(table)
        sampler = QueueSampler([CallQueueSource(table, groups=2)], groups=2)
        share = Share(group.rank, group.count, group.mean_)
        learner = make(share, dtype=torch.float32, algorithm={}, shard_parameters=True)
        published: list[int] = []
        loop = LlmLoop(
            learner,
            sampler,
            publish=(lambda version, data: published.append(version)) if group.rank == 0 else None,
            publish_every=2,
            group=group,
        )
        until, states = threading.Event(), []

        def outside() -> None:
            if group.rank == 1:
                wait(lambda: (loop.waiting_for or "").startswith("a batch from replay"))
            for rows in groups_of(completions(group.rank, groups=8)):
                writer.append(rows)
            if group.rank == 0:
                wait(lambda: learner.updates == 4)
                states.append(loop.state())
            else:
                wait(lambda: learner.updates == 4 and loop.waiting_for is not None)
                threading.Event().wait(1.0)
                until.set()

        thread = threading.Thread(target=outside)
        thread.start()
        loop.run(until)
        thread.join()
        after = {name: tensor.numpy() for name, tensor in learner.state().items()}
        gathered = [{name: tensor.numpy() for name, tensor in state.items()} for state in states]
        return learner.updates, published, loop.stats()["version"], table.waiting_groups, after, gathered


def test_loops_make_the_same_steps_end_together_and_gather_divided_weights_when_one_is_asked() -> None:
    (updates, published, version, left, state, (gathered,)), other = in_a_group(_loop, 2)
    assert (updates, version, left) == (4, 2.0, 0) == (other[0], other[2], other[3])
    assert published[0] in (0, 1, 2)
    assert published[-1] == 2
    assert other[1] == []
    for name, array in state.items():
        np.testing.assert_array_equal(array, other[4][name], err_msg=name)
        np.testing.assert_array_equal(array, gathered[name], err_msg=name)
