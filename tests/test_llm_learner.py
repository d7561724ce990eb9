"""The learner of language models: against plain autograd on one completion at a time, in pieces, and round a real queue."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from torch import Tensor

from configs.llm import LlmConfig, LlmLearnersSettings, ModelSettings, SamplingSettings
from configs.policy_gradient import PolicyGradientSettings
from learners.llm.advantages import make_advantage, pass_rate
from learners.llm.batching import buckets, micro_batch, rollouts
from learners.llm.divergences import reference_term
from learners.llm.learner import PolicyGradient, make_learner
from learners.llm.log_probs import token_log_probs
from learners.llm.loop import LlmLoop
from learners.llm.losses import Tokens, make_loss
from learners.llm.models import Model, make_model, save_model
from learners.llm.rows import SCHEMA, Completion, to_rows
from learners.llm.scoring import Scorer
from replay.queue_readers import CallQueueSource
from replay.queue_sampler import QueueSampler
from replay.queue_spec import QueueSpec
from replay.queue_writers import CallQueueWriter
from replay.queues import Queue

SIZE: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "inner": 24}
MAX_TOKENS = 9
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(seed: int = 0, dtype: torch.dtype = DOUBLE, **changes: Any) -> Model:
    made = make_model(ModelSettings(**SIZE, **changes), seed=seed, dtype=dtype)
    with torch.no_grad():  # a fresh model is all but uniform, whatever it reads
        for parameter in made.network.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.mul_(8.0)
    return made


def completions(
    seed: int, *, groups: int = 4, size: int = 4, version: int = 0, first: int = 0, noise: float = 0.3
) -> pa.RecordBatch:
    """Groups of completions of differing length, with log-probabilities made up: `noise` about those of a uniform choice."""
    generator = np.random.default_rng(seed)
    batches = []
    for group in range(first, first + groups):
        prompt = generator.integers(3, 60, generator.integers(2, 8)).astype(np.int32)
        made = []
        for index in range(size):
            count = int(generator.integers(1, MAX_TOKENS + 1))
            passed = bool(generator.random() < 0.5) if index else True
            ends = np.unique(generator.integers(1, count + 1, 2)).astype(np.int32)
            made.append(
                Completion(
                    group=group,
                    index=index,
                    task=group,
                    family="test",
                    seed=index,
                    prompt=prompt,
                    tokens=generator.integers(3, 60, count).astype(np.int32),
                    log_probs=generator.normal(-4.5, noise, count).astype(np.float32),
                    kept=-generator.random(count).astype(np.float32) / 10,
                    versions=np.full(count, version, np.int32),
                    finish="length" if count == MAX_TOKENS else "stop",
                    reward=float(passed),
                    passed=passed,
                    shaped=float(generator.random() / 10),
                    step_ends=ends,
                    step_rewards=generator.random(len(ends)).astype(np.float32),
                )
            )
        batches.append(to_rows(made))
    (batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return batch


def replaced(rows: pa.RecordBatch, name: str, values: np.ndarray) -> pa.RecordBatch:
    """The rows with other numbers in a column, of lists or not."""
    at = SCHEMA.get_field_index(name)
    column = rows.column(at)
    if pa.types.is_list(column.type):
        column = pa.ListArray.from_arrays(column.offsets, pa.array(values, column.type.value_type), type=column.type)
    else:
        column = pa.array(values, column.type)
    return rows.set_column(at, SCHEMA.field(at), column)


def learner(
    made: Model,
    *,
    temperature: float = 0.8,
    seed: int = 0,
    learners: dict[str, Any] | None = None,
    **algorithm: Any,
) -> PolicyGradient:
    return PolicyGradient(
        made,
        PolicyGradientSettings(**algorithm),
        LlmLearnersSettings(**{"learning_rate": 1e-3, **(learners or {})}),
        SamplingSettings(max_tokens=MAX_TOKENS, temperature=temperature),
        seed=seed,
    )


def weights(made: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in made.network.named_parameters()}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), rtol=0.0, atol=tolerance, err_msg=name)


def naive(network: Any, rows: pa.RecordBatch, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of each completion, from logits of a forward pass of its own."""
    found = []
    for prompt, tokens, kept in zip(*(rows[name].to_pylist() for name in ("prompt", "tokens", "kept")), strict=True):
        logits = network(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        log_probs, entropy = token_log_probs(logits, torch.tensor(tokens), temperature)
        found.append((log_probs - torch.tensor(kept), entropy))
    return found


# -- an update is what the formulas say -------------------------------------------------------------------------------


def reference_updates(made: Model, batches: list[pa.RecordBatch], temperature: float, **algorithm: Any) -> None:
    """Learner steps of one update each, one completion after another."""
    options = PolicyGradientSettings(**algorithm)
    network: Any = made.network
    frozen = make_model(ModelSettings(**SIZE), seed=0, dtype=DOUBLE).network
    frozen.load_state_dict(network.state_dict())
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    for rows in batches:
        reward, passed = torch.tensor(rows["reward"].to_pylist()), torch.tensor(rows["passed"].to_pylist())
        group, shaped = torch.tensor(rows["group"].to_pylist()), torch.tensor(rows["shaped"].to_pylist())
        lengths = [len(tokens) for tokens in rows["tokens"].to_pylist()]
        advantage = make_advantage(options)(reward + shaped, group, passed)
        rates = pass_rate(passed, group)
        with torch.no_grad():
            reference = naive(frozen, rows, temperature)
        total = torch.zeros((), dtype=DOUBLE)
        for row, (new, _) in enumerate(naive(network, rows, temperature)):
            old = torch.tensor(rows["log_probs"][row].as_py())
            tokens = Tokens(
                new=new,
                old=old,
                advantage=advantage[row].expand(len(new)),
                sequence=torch.zeros(len(new), dtype=torch.int64),
                proximal=new.detach(),
                passed=passed[row].expand(len(new)),
                pass_rate=rates[row].expand(len(new)),
            )
            loss = make_loss(options)(tokens).per_token
            if options.kl.coefficient:
                loss = loss + reference_term(options.kl, new, reference[row][0], old)
            divisor = {
                "token": sum(lengths),
                "sequence": len(lengths) * lengths[row],
                "constant": len(lengths) * MAX_TOKENS,
            }[options.mean]
            total = total + (loss / divisor).sum()
        adam.zero_grad()
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "Dr. GRPO": {"advantage": "dr_grpo", "mean": "constant"},
    "RLOO, a mean per completion": {"advantage": "rloo", "mean": "sequence", "loss": "reinforce"},
    "whitened, truncated": {"advantage": "whiten", "loss": "truncated"},
    "GSPO": {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05, "mean": "sequence"},
    "CISPO with divergence": {"loss": "cispo", "kl": {"coefficient": 0.5}},
    "decoupled": {"loss": "decoupled", "kl": {"coefficient": 0.3, "estimator": "k1"}},
    "NFT": {"loss": "nft"},
    "W-REINFORCE": {"advantage": "sign", "dual_clip": 3.0},
}


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_those_of_plain_autograd_one_completion_at_a_time(case: str) -> None:
    batches = [completions(seed, groups=2) for seed in range(2)]
    one, two = model(), model()
    start = weights(one)
    algorithm = learner(one, **CASES[case])
    for rows in batches:
        algorithm.update(rows)
    reference_updates(two, batches, 0.8, **CASES[case])
    moved = max(float((start[name] - tensor).abs().max()) for name, tensor in weights(one).items())
    assert moved > 1e-3, "a comparison of weights that have hardly moved says little"
    assert_close(weights(one), weights(two), 1e-9)


EVERYTHING: dict[str, dict[str, Any]] = {
    "default": {},
    "clip_cov": {"entropy": {"kind": "clip_cov", "fraction": 0.2, "low": 0.0, "high": 9.0}},
    "kl_cov": {"entropy": {"kind": "kl_cov", "fraction": 0.1}},
    "masked, steps": {"overlong": {"kind": "mask"}, "steps": {"coefficient": 0.5}},
    "shaped, part of it": {"overlong": {"kind": "shape"}, "subsample": {"rollouts": 2, "tokens": 0.5}},
    "GSPO": {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
    "decoupled, corrected": {"loss": "decoupled", "correction_cap": 1.5},
}


@pytest.mark.parametrize("case", EVERYTHING)
def test_micro_batches_do_not_change_what_is_learnt(case: str) -> None:
    found = []
    for micro_tokens in (10_000, 40, 1):
        made = model()
        start = weights(made)
        algorithm = learner(made, learners={"micro_tokens": micro_tokens, "minibatches": 2}, **EVERYTHING[case])
        for seed in range(2):
            algorithm.update(completions(seed, groups=2))
        found.append(weights(made))
        assert max(float((start[name] - tensor).abs().max()) for name, tensor in found[-1].items()) > 1e-3
        assert len(algorithm.metrics()) > 10
    assert_close(found[0], found[1], 1e-9)
    assert_close(found[0], found[2], 1e-9)


def test_parts_of_the_objective_change_what_is_learnt() -> None:
    """None of the settings is forgotten."""
    found = {}
    changes = EVERYTHING | {
        "kl": {"kl": {"coefficient": 1.0}},
        "dual": {"advantage": "sign", "dual_clip": 1.0001},
        "sign": {"advantage": "sign"},
        "floor": {"loss": "nft", "negative_floor": 0.1},
        "nft": {"loss": "nft"},
        "truncated": {"loss": "truncated", "weight_cap": 0.5},
        "uncapped": {"loss": "truncated"},
        "corrected": {"correction_cap": 0.5},
    }
    for case, algorithm in changes.items():
        made = model()
        updated = learner(made, learners={"minibatches": 2}, **algorithm)
        updated.update(completions(1, noise=1.5))
        found[case] = torch.cat([tensor.flatten() for tensor in weights(made).values()])
    names = list(found)
    for at, one in enumerate(names):
        for two in names[:at]:
            assert float((found[one] - found[two]).abs().max()) > 1e-6, f"{one} learns as {two}"


def test_truncated_completions_are_on_policy_at_the_weights_that_sampled_them() -> None:
    """The ratio is 1 where the actor's log-probabilities are renormalised over what truncation kept."""
    made = model(dtype=torch.float32)
    rows = completions(0)
    with torch.no_grad():
        found = torch.cat([new for new, _ in naive(made.network, rows, 0.8)])
    rows = replaced(rows, "log_probs", found.numpy())
    algorithm = learner(made)
    algorithm.published(0)
    algorithm.update(rows)
    row = algorithm.metrics()
    assert row["ratio/mean"] == pytest.approx(1.0, abs=1e-5)
    assert row["ratio/clipped_fraction"] == 0.0
    assert row["gap/max"] < 1e-4
    assert row["staleness/max"] == 0.0
    assert row["staleness/lag_0"] == row["tokens"]


# -- log-probabilities ------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), micro_tokens=st.integers(1, 200), groups=st.integers(1, 4))
def test_buckets_hold_every_completion_once_within_their_tokens(seed: int, micro_tokens: int, groups: int) -> None:
    batch = rollouts(completions(seed, groups=groups, size=3), device="cpu")
    found = buckets(batch, np.arange(3 * groups), micro_tokens)
    assert sorted(np.concatenate(found)) == list(range(3 * groups))
    places = []
    for chosen in found:
        micro = micro_batch(batch, chosen, pad=0)
        assert micro.ids.numel() <= micro_tokens or len(chosen) == 1
        places.append(micro.places)
        # The position that predicts a token holds the one before it.
        at = micro.places[1:][micro.places.diff() == 1]
        before = micro.ids.flatten()[micro.predicts][1:][micro.places.diff() == 1]
        same = batch.sequence[at] == batch.sequence[at - 1]
        assert torch.equal(before[same], batch.tokens[at - 1][same])
    assert torch.equal(torch.cat(places).sort().values, torch.arange(len(batch.tokens)))


def test_prompts_and_tokens_are_where_the_model_reads_them() -> None:
    rows = completions(3)
    batch = rollouts(rows, device="cpu")
    chosen = np.array([5, 2, 9])
    micro = micro_batch(batch, chosen, pad=7)
    for ids, row in zip(micro.ids.tolist(), chosen.tolist(), strict=True):
        expected = rows["prompt"][row].as_py() + rows["tokens"][row].as_py()[:-1]
        assert ids == expected + [7] * (len(ids) - len(expected))
    assert batch.tokens[micro.places].tolist() == [t for row in chosen.tolist() for t in rows["tokens"][row].as_py()]


@pytest.mark.parametrize("logits", [1 << 28, 300])
@pytest.mark.parametrize("lora", [None, 4])
def test_log_probabilities_equal_those_of_one_sequence_at_a_time(logits: int, lora: int | None) -> None:
    made = model(lora_rank=lora)
    rows = completions(5)
    batch = rollouts(rows, device="cpu")
    scorer = Scorer(made.network, temperature=0.7, logits=logits)
    expected = naive(made.network, rows, 0.7)
    for chosen in buckets(batch, np.arange(16), 60):
        micro = micro_batch(batch, chosen, pad=0)
        log_probs, entropy = scorer(micro, batch.tokens[micro.places], batch.kept[micro.places])
        torch.testing.assert_close(log_probs, torch.cat([expected[row][0] for row in chosen]), rtol=0.0, atol=1e-6)
        torch.testing.assert_close(entropy, torch.cat([expected[row][1] for row in chosen]), rtol=0.0, atol=1e-5)


def test_a_model_that_changes_its_logits_afterwards_is_scored_by_all_of_it() -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=80, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0, sliding_window=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(20.0)
    rows = completions(5)
    batch = rollouts(rows, device="cpu")
    micro = micro_batch(batch, np.arange(16), pad=0)
    log_probs, _ = Scorer(network, temperature=1.0)(micro, batch.tokens, batch.kept)
    expected = torch.cat([new for new, _ in naive(network, rows, 1.0)])
    torch.testing.assert_close(log_probs, expected, rtol=0.0, atol=1e-5)


# -- what the settings of the learners do -----------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4])
def test_activation_checkpointing_changes_nothing(lora: int | None) -> None:
    found = []
    for is_on in (False, True):
        made = model(lora_rank=lora)
        algorithm = learner(made, learners={"activation_checkpointing": is_on}, kl={"coefficient": 0.1})
        for seed in range(2):
            algorithm.update(completions(seed))
        found.append(weights(made))
    assert made.network.training
    layers = [module for module in made.network.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(layers) >= SIZE["layers"]
    assert_close(found[0], found[1], 1e-9)


def test_lora_trains_the_additions_alone_and_its_reference_is_the_model_below() -> None:
    made, twin = model(lora_rank=4), model()
    start = weights(made)
    algorithm = learner(made, kl={"coefficient": 0.2})
    plain = learner(twin, kl={"coefficient": 0.2})
    for seed in range(3):
        algorithm.update(completions(seed))
        plain.update(completions(seed))
        row = algorithm.metrics()
        assert (row["kl/reference"] > 1e-9) == (seed > 0), "before the first update both are the same model"
    changed = {name for name, tensor in weights(made).items() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if "lora_" in name}
    assert load(algorithm.policy_bytes()).keys() == load(plain.policy_bytes()).keys()


def test_bfloat16_learns_nearly_the_same_and_keeps_float32_weights() -> None:
    one, two = model(dtype=torch.float32), model(dtype=torch.float32)
    start = torch.cat([tensor.flatten() for tensor in weights(one).values()])
    for made, precision in ((one, "float32"), (two, "bfloat16")):
        learner(made, learners={"precision": precision}).update(completions(0))
    first, second = (torch.cat([t.flatten() for t in weights(made).values()]) - start for made in (one, two))
    assert second.dtype == torch.float32
    assert 0.8 < float(torch.cosine_similarity(first, second, dim=0)) < 0.99999


def test_the_step_size_warms_up_and_the_gradient_is_clipped() -> None:
    made = model()
    algorithm = learner(made, learners={"warm_up": 4, "max_gradient_norm": 1e-3, "minibatches": 2})
    rates = []
    for seed in range(3):
        algorithm.update(completions(seed))
        row = algorithm.metrics()
        rates.append(row["learning_rate"])
        assert row["gradient_norm"] > 1e-3
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3])


def test_a_teacher_of_the_same_weights_has_no_divergence(tmp_path: Path) -> None:
    save_model(model(dtype=torch.float32), tmp_path)
    config = LlmConfig.model_validate(
        {
            "model": SIZE,
            "sampling": {"max_tokens": MAX_TOKENS, "group_size": 4},
            "learners": {"batch_groups": 4, "learning_rate": 1e-3},
            "algorithm": {"teacher": {"path": str(tmp_path), "coefficient": 1.0}},
        }
    )
    algorithm = make_learner(config, model(dtype=torch.float32))
    terms = []
    for seed in range(2):
        algorithm.update(completions(seed))
        terms.append(algorithm.metrics()["kl/teacher"])
    assert terms[0] == pytest.approx(0.0, abs=1e-9)
    assert terms[1] > 1e-9


# -- metrics and faults -----------------------------------------------------------------------------------------------


def test_metrics_are_of_the_batch() -> None:
    rows = replaced(completions(0), "versions", np.arange(len(completions(0)["versions"].flatten())) % 3)
    algorithm = learner(model())
    assert algorithm.metrics() == {}
    algorithm.published(3)
    algorithm.update(rows)
    row = algorithm.metrics()
    lengths = [len(tokens) for tokens in rows["tokens"].to_pylist()]
    lags = 3 - np.arange(sum(lengths)) % 3
    assert row["tokens"] == sum(lengths)
    assert row["completions"] == 16
    assert row["length/mean"] == pytest.approx(np.mean(lengths))
    assert row["reward/mean"] == pytest.approx(np.mean(rows["reward"].to_pylist()))
    assert row["staleness/mean"] == pytest.approx(lags.mean())
    assert row["staleness/max"] == 3.0
    assert [row.get(f"staleness/lag_{lag}", 0.0) for lag in range(4)] == np.bincount(lags, minlength=4).tolist()
    assert "gap/mean" not in row, "no completion is of the learner's own weights"
    made = naive(model().network, rows, 0.8)
    old = [torch.tensor(one) for one in rows["log_probs"].to_pylist()]
    gaps = {
        lag: torch.cat([(n - o).abs() for (n, _), o, v in zip(made, old, versions, strict=True) if 3 - min(v) == lag])
        for versions in [rows["versions"].to_pylist()]
        for lag in {3 - min(v) for v in versions}
    }
    for lag, expected in gaps.items():
        assert row[f"gap/lag_{lag}"] == pytest.approx(float(expected.detach().mean()), abs=1e-5)
    assert row["entropy"] == pytest.approx(float(torch.cat([e for _, e in made]).detach().mean()), abs=1e-4)
    assert algorithm.metrics() == {}


def test_a_wide_gap_at_the_same_weights_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    algorithm = learner(model())
    with caplog.at_level(logging.WARNING, "learners"):
        for version in range(4):
            algorithm.published(version)
            algorithm.update(completions(version, version=max(0, version - 1)))
        assert not [r for r in caplog.records if "at the same weights" in r.message][1:]
        assert algorithm.metrics()["gap/mean"] > 0.05
        assert "learners.gap_warning" in caplog.text
        caplog.clear()
        algorithm.update(completions(1, version=3))
        assert not caplog.records
        gaps = [name for name in algorithm.metrics() if name.startswith("gap/")]
        assert not gaps, "since the update the weights are no longer those published"


@pytest.mark.parametrize("name", ["reward", "log_probs"])
def test_numbers_that_are_not_finite_end_it_and_leave_the_weights(name: str) -> None:
    made = model()
    algorithm = learner(made, advantage="sign")
    start = weights(made)
    rows = completions(0)
    column = rows[name].flatten() if name == "log_probs" else rows[name]
    values = column.to_numpy(zero_copy_only=False).copy()
    values[3] = np.nan
    if name == "reward":
        algorithm = learner(made)
        with pytest.raises(ValueError, match="finite rewards"):
            algorithm.update(replaced(rows, name, values))
    else:
        with pytest.raises(FloatingPointError, match="not finite in learner step 1: the loss is nan"):
            algorithm.update(replaced(rows, name, values))
    assert_close(weights(made), start, 0.0)
    algorithm.check_finite()
    with torch.no_grad():
        next(made.network.parameters())[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"1 weights, the first model\.embed_tokens\.weight"):
        algorithm.check_finite()


def test_what_cannot_be_learnt_from_is_said() -> None:
    made = model()
    with pytest.raises(ValueError, match=r"exactly where algorithm\.teacher\.path is set, received none for 'x'"):
        learner(made, teacher={"path": "x"})
    with pytest.raises(ValueError, match="among several learners, and there is one"):
        learner(made, learners={"shard_parameters": True})
    with pytest.raises(ValueError, match=r"at least 5 groups for as many updates \(learners.minibatches\), received 4"):
        learner(made, learners={"minibatches": 5}).update(completions(0))
    with pytest.raises(ValueError, match="a batch of completions, received one of no rows"):
        learner(made).update(completions(0)[:0])
    rows = completions(0)
    short = pa.array([[], *[p.as_py() for p in rows["prompt"]][1:]], SCHEMA.field("prompt").type)
    with pytest.raises(ValueError, match="received an empty one in row 0"):
        learner(made).update(rows.set_column(SCHEMA.get_field_index("prompt"), SCHEMA.field("prompt"), short))


def test_batches_that_are_cut_off_as_a_whole_teach_nothing() -> None:
    made = model()
    start = weights(made)
    rows = completions(0)
    rows = rows.set_column(
        SCHEMA.get_field_index("finish"), SCHEMA.field("finish"), pa.array(["length"] * rows.num_rows)
    )
    algorithm = learner(made, overlong={"kind": "mask"})
    algorithm.update(rows)
    assert algorithm.updates == 1
    assert algorithm.metrics()["gradient_norm"] == 0.0
    assert_close(weights(made), start, 0.0)


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, 4])
def test_going_on_from_a_saved_state_is_as_not_having_stopped(lora: int | None) -> None:
    options: dict[str, Any] = {
        "learners": {"minibatches": 2, "warm_up": 5, "weight_decay": 0.1},
        "kl": {"coefficient": 0.1},
        "entropy": {"kind": "clip_cov", "fraction": 0.3, "low": -1.0, "high": 9.0},
    }
    straight, stopped = model(lora_rank=lora), model(lora_rank=lora)
    one = learner(straight, **options)
    two = learner(stopped, **options)
    for seed in range(2):
        one.update(completions(seed))
        two.update(completions(seed))
    state = two.state()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    two.update(completions(9))  # the state is a copy
    other = model(seed=1, lora_rank=lora)
    resumed = learner(other, seed=5, **options)
    resumed.load_state(state)
    for seed in range(2, 4):
        one.update(completions(seed))
        resumed.update(completions(seed))
    assert resumed.updates == one.updates == 4
    assert resumed.state().keys() == one.state().keys()
    for name, tensor in one.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert one.policy_bytes() == resumed.policy_bytes()


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    made = model()
    algorithm = learner(made)
    start = weights(made)
    with pytest.raises(ValueError, match=r"tensors differ: reference\.lm_head|tensors differ: reference\.model"):
        algorithm.load_state(learner(model(seed=1), kl={"coefficient": 0.1}).state())
    assert_close(weights(made), start, 0.0)


# -- the loop ---------------------------------------------------------------------------------------------------------


class Log:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[int, bytes]] = []

    def __call__(self, version: int, data: bytes) -> None:
        self.published.append((version, data))


def queue(tmp_path: Path, *, lag: int | None = 4, times: int = 1) -> Queue:
    spec = QueueSpec(
        name="completions", schema=SCHEMA, max_waiting_groups=64, max_policy_lag=lag, times_sampled=times,
        capacity_bytes=1 << 20,
    )  # fmt: skip
    return Queue(spec, tmp_path / "queue")


def two_groups(table: Queue) -> QueueSampler:
    return QueueSampler([CallQueueSource(table, groups=2)], groups=2)


def make_loop(
    sampler: QueueSampler, publish: Callable[[int, bytes], None], **arguments: Any
) -> tuple[PolicyGradient, LlmLoop]:
    algorithm = learner(model(dtype=torch.float32))
    return algorithm, LlmLoop(algorithm, sampler, publish=publish, **arguments)


def groups_of(rows: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for at in range(0, rows.num_rows, 4):
        yield rows[at : at + 4]


def test_a_loop_learns_from_each_group_once_and_publishes(tmp_path: Path) -> None:
    table, log = queue(tmp_path), Log()
    algorithm, loop = make_loop(two_groups(table), log, publish_every=2, version=7)
    assert loop.stats()["version"] == -1.0
    assert loop.waiting_for is None
    writer = CallQueueWriter(table)
    until = threading.Event()
    running = threading.Thread(target=loop.run, args=(until,))
    running.start()
    for group in groups_of(completions(0, groups=9, version=7)):
        writer.append(group)
    wait(lambda: algorithm.updates == 4 and loop.waiting_for is not None)
    assert loop.waiting_for is not None
    assert loop.waiting_for.startswith("a batch from replay for 0 s")
    assert table.waiting_groups == 1
    assert loop.metrics()["tokens"] > 0
    state = loop.state()
    until.set()
    running.join(10.0)
    assert not running.is_alive()
    assert next(version for version, _ in log.published) == 7
    assert log.published[-1] == (9, algorithm.policy_bytes())
    stats = loop.stats()
    assert stats["version"] == 9.0
    assert stats["updates"] == 4.0
    assert stats["wall_s"] >= stats["update_s"] + stats["wait_s"] > 0.0
    assert all(torch.equal(tensor, algorithm.state()[name]) for name, tensor in state.items())


def wait(until: Any, seconds: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_steps_in_lock_step_measure_the_age_of_tokens(tmp_path: Path) -> None:
    table, log = queue(tmp_path), Log()
    _algorithm, loop = make_loop(two_groups(table), log)
    writer = CallQueueWriter(table)
    with pytest.raises(TimeoutError, match="no batch within 0 s"):
        loop.step(timeout_s=0.0)
    assert [version for version, _ in log.published] == [0], "the first weights are out before anything is learnt"
    for step in range(3):
        for group in groups_of(completions(step, groups=2, version=0, first=2 * step)):
            writer.append(group)
        loop.step(timeout_s=0.0)
        row = loop.metrics()
        assert row["staleness/mean"] == row["staleness/max"] == step
        assert ("gap/mean" in row) == (step == 0)
    assert [version for version, _ in log.published] == [0, 1, 2, 3]


def test_groups_that_lag_too_far_behind_the_weights_are_dropped(tmp_path: Path) -> None:
    table, log = queue(tmp_path, lag=1), Log()
    _, loop = make_loop(two_groups(table), log)
    writer = CallQueueWriter(table)
    for group in groups_of(completions(0, groups=8, version=0)):
        writer.append(group)
    loop.step(timeout_s=0.0)
    loop.step(timeout_s=0.0)  # version 1
    with pytest.raises(TimeoutError):
        loop.step(timeout_s=0.0)
    assert loop.stats()["updates"] == 2.0


def test_a_batch_is_acknowledged_after_its_update_and_not_if_that_fails(tmp_path: Path) -> None:
    table, log = queue(tmp_path), Log()
    sampler = two_groups(table)
    algorithm, loop = make_loop(sampler, log)
    writer = CallQueueWriter(table)
    rows = completions(0, groups=2)
    values = rows["log_probs"].flatten().to_numpy().copy()
    values[0] = np.nan
    for group in groups_of(replaced(rows, "log_probs", values)):
        writer.append(group)
    before = algorithm.policy_bytes()
    with pytest.raises(FloatingPointError):
        loop.run(threading.Event())
    assert algorithm.policy_bytes() == before
    again = two_groups(table)
    with pytest.raises(TimeoutError):
        again.sample(0.0)  # still lent
    sampler.close()
    assert again.sample(1.0).rows.num_rows == 8


def test_an_error_of_publishing_ends_the_loop(tmp_path: Path) -> None:
    def fail(version: int, data: bytes) -> None:
        raise ConnectionError("the head is gone")

    _, loop = make_loop(two_groups(queue(tmp_path)), fail)
    with pytest.raises(ConnectionError, match="the head is gone"):
        loop.run(threading.Event())
