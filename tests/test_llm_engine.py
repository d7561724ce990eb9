"""The engine: what it samples, how probable it says that was, and that nothing is lost whatever happens meanwhile."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.llm import forward as forward_module
from actors.llm import slots as slots_module
from actors.llm.engine import Engine, Request, Sample, make_engine
from actors.llm.forward import Prefilled
from actors.llm.slot_cache import SlotCache
from actors.llm.slots import SlotEngine
from configs.llm import SamplingSettings
from learners.classes import ModuleError
from learners.llm.log_probs import token_log_probs
from learners.llm.models import weights_bytes
from tests.truncation_for_tests import naive_truncation

VOCAB, END, LONGEST = 61, 1, 256
SIZES = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 0}
LLAMA = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_network(make: Callable[[], PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """With larger weights than at initialisation, or all tokens would be about as probable and attention would not matter."""
    torch.manual_seed(seed)
    network = make().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return network


def llama(seed: int = 0) -> PreTrainedModel:
    return random_network(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), seed)


def qwen3() -> PreTrainedModel:
    return random_network(lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=16)))


def gpt_neox() -> PreTrainedModel:
    sizes = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    return random_network(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)))


def gpt2() -> PreTrainedModel:
    return random_network(
        lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST))
    )


NETWORKS = {"llama": llama, "qwen3": qwen3, "gpt_neox": gpt_neox, "gpt2": gpt2}


def engine_of(network: PreTrainedModel, slots: int = 8, version: int = 0, **kwargs: object) -> Engine:
    return make_engine(SamplingSettings(**kwargs), network, end=END, slots=slots, version=version)


def random_requests(seed: int, groups: int, group_size: int, longest: int = 40) -> list[Request]:
    rng = np.random.default_rng(seed)
    requests = []
    for group in range(groups):
        prompt = rng.integers(2, VOCAB, rng.integers(1, longest)).astype(np.int32)
        for index in range(group_size):
            most = int(rng.integers(1, longest))
            requests.append(Request(group, index, prompt, int(rng.integers(-(2**63), 2**63)), max_tokens=most))
    return requests


def drain(engine: Engine) -> list[Sample]:
    samples = []
    while engine.running or engine.waiting:
        samples += engine.step()
    return samples


def by_number(samples: Sequence[Sample]) -> dict[tuple[int, int], Sample]:
    found = {(sample.request.group, sample.request.index): sample for sample in samples}
    assert len(found) == len(samples)
    return found


def plain_logits(network: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """(tokens, V): of one pass over prompt and completion without any cache."""
    prompt = sample.request.prompt
    with torch.no_grad():
        ids = torch.from_numpy(np.concatenate([prompt, sample.tokens])).long()
        logits: torch.Tensor = network(input_ids=ids[None]).logits
    return logits[0, len(prompt) - 1 : -1]


def plain_log_probs(network: PreTrainedModel, sample: Sample, temperature: float) -> np.ndarray:
    tokens = torch.from_numpy(sample.tokens).long()
    found: np.ndarray = token_log_probs(plain_logits(network, sample), tokens, temperature)[0].numpy()
    return found


def assert_sound(sample: Sample) -> None:
    most = sample.request.max_tokens
    assert 1 <= len(sample.tokens) <= most
    assert END not in sample.tokens[:-1]
    assert sample.finish == ("stop" if sample.tokens[-1] == END else "length")
    assert sample.finish == "stop" or len(sample.tokens) == most
    kinds = [array.dtype for array in (sample.tokens, sample.log_probs, sample.kept, sample.versions)]
    assert kinds == [np.int32, np.float32, np.float32, np.int32]
    assert len({len(sample.tokens), len(sample.log_probs), len(sample.kept), len(sample.versions)}) == 1


# What is sampled, and its probability


@pytest.mark.parametrize(
    ("name", "sampling"),
    [(name, sampling) for name in NETWORKS for sampling in ({"temperature": 1.3}, {"top_k": 20, "top_p": 0.6})]
    + [("llama", {"temperature": 0.7, "top_k": 9}), ("llama", {"top_p": 0.8})],
    ids=str,
)
def test_log_probs_are_those_of_one_plain_pass(name: str, sampling: dict[str, float]) -> None:
    """With refills, prompts read once for a group, rows moved together, columns moved and room grown, all in one run."""
    network = NETWORKS[name]()
    engine = engine_of(network, slots=9, **sampling)
    engine.submit(random_requests(seed=1, groups=10, group_size=4))
    samples = drain(engine)
    assert len(by_number(samples)) == 40
    temperature = sampling.get("temperature", 1.0)
    for sample in samples:
        assert_sound(sample)
        plain = plain_log_probs(network, sample, temperature)
        np.testing.assert_allclose(sample.log_probs, plain - sample.kept, atol=1e-4)
        if len(sampling) == 1 and "temperature" in sampling:
            assert not sample.kept.any()
        else:
            scaled = plain_logits(network, sample) / temperature
            allowed, kept = naive_truncation(scaled, sampling.get("top_k"), sampling.get("top_p", 1.0))
            assert allowed[torch.arange(len(sample.tokens)), torch.from_numpy(sample.tokens).long()].all()
            np.testing.assert_allclose(sample.kept, kept, atol=1e-4)
    stats = engine.stats()
    assert stats["engine/tokens"] == sum(len(sample.tokens) for sample in samples)
    prompts = {sample.request.group: len(sample.request.prompt) for sample in samples}
    assert stats["engine/prompt_tokens"] == sum(prompts.values())
    assert stats["engine/shared_tokens"] == 3 * sum(prompts.values())


def test_a_completion_is_the_same_alone_and_in_a_crowd() -> None:
    network = llama()
    requests = random_requests(seed=2, groups=8, group_size=4)
    crowd = engine_of(network, slots=11)
    crowd.submit(requests)
    together = by_number(drain(crowd))
    alone = engine_of(network, slots=1)
    for request in requests[::3]:
        alone.submit([request])
        (sample,) = drain(alone)
        np.testing.assert_array_equal(sample.tokens, together[request.group, request.index].tokens)
        np.testing.assert_allclose(sample.log_probs, together[request.group, request.index].log_probs, atol=1e-5)


def test_the_same_group_again_is_the_same_to_the_bit() -> None:
    network = llama()
    runs = []
    for _ in range(2):
        engine = engine_of(network, slots=7, top_p=0.9)
        engine.submit(random_requests(seed=3, groups=4, group_size=6))
        runs.append(by_number(drain(engine)))
    for number, sample in runs[0].items():
        np.testing.assert_array_equal(sample.tokens, runs[1][number].tokens)
        np.testing.assert_array_equal(sample.log_probs, runs[1][number].log_probs)


@pytest.mark.parametrize("name", NETWORKS)
def test_greedy_completions_are_those_of_generate(name: str) -> None:
    network = NETWORKS[name]()
    requests = [
        Request(one.group, one.index, one.prompt, one.seed, temperature=0.0, max_tokens=one.max_tokens)
        for one in random_requests(seed=4, groups=7, group_size=1)
    ]
    engine = engine_of(network, slots=5, top_p=0.5)
    engine.submit(requests)
    for sample in drain(engine):
        prompt = torch.from_numpy(sample.request.prompt).long()[None]
        expected = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sample.request.max_tokens,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=0,
        )
        np.testing.assert_array_equal(sample.tokens, expected[0, prompt.shape[1] :].numpy())
        assert not sample.log_probs.any()
        assert not sample.kept.any()


def test_several_tokens_may_end_a_completion() -> None:
    """As chat models have them: the end of a turn and the end of all text."""
    network = llama()
    ends = (END, 7, 11, 30, 58)
    requests = [
        Request(one.group, one.index, one.prompt, one.seed, temperature=0.0, max_tokens=30)
        for one in random_requests(seed=11, groups=12, group_size=1)
    ]
    engine = SlotEngine(SamplingSettings(), network, end=ends, slots=5)
    engine.submit(requests)
    stopped = set()
    for sample in drain(engine):
        prompt = torch.from_numpy(sample.request.prompt).long()[None]
        expected = network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )
        np.testing.assert_array_equal(sample.tokens, expected[0, prompt.shape[1] :].numpy())
        assert sample.finish == ("stop" if sample.tokens[-1] in ends else "length")
        if sample.finish == "stop":
            stopped.add(int(sample.tokens[-1]))
    assert len(stopped) > 1
    for wrong in ((), VOCAB, -1, (END, VOCAB)):
        with pytest.raises(ValueError, match=f"one or more tokens of the model, 0 to {VOCAB - 1}, received"):
            SlotEngine(SamplingSettings(), network, end=wrong, slots=1)


CHI_SQUARE_999 = 99.6  # of 60 degrees of freedom: a right sampler stays below it in 999 of 1,000 seeds


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def test_sampled_frequencies_are_the_models_probabilities() -> None:
    """Power: the same counts reject temperatures 1.05 and 0.95, with which some 2 % of the mass lie elsewhere."""
    network = random_network(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), seed=5)
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(3.0)
    prompt = np.array([5, 9, 4], np.int32)
    engine = engine_of(network, slots=2_000)
    engine.submit([Request(0, index, prompt, index, max_tokens=1) for index in range(40_000)])
    first = np.array([sample.tokens[0] for sample in drain(engine)])
    with torch.no_grad():
        logits = network(input_ids=torch.from_numpy(prompt).long()[None]).logits[0, -1].double()
    counts = np.bincount(first, minlength=VOCAB)
    assert chi_square(counts, torch.softmax(logits, -1).numpy()) < CHI_SQUARE_999
    for wrong in (1.05, 0.95):
        assert chi_square(counts, torch.softmax(logits / wrong, -1).numpy()) > CHI_SQUARE_999


# New weights


def test_tokens_after_new_weights_carry_their_version_and_none_is_lost() -> None:
    engine = engine_of(llama(0), slots=6, version=3)
    requests = random_requests(seed=6, groups=10, group_size=3)
    engine.submit(requests)
    samples = []
    for step in range(10_000):
        if step == 7:
            engine.load(4, weights_bytes(llama(1)))
            assert engine.version == 4
        if step == 8:
            engine.load(5, weights_bytes(llama(2)))
            engine.load(9, weights_bytes(llama(0)))
        samples += engine.step()
        if not engine.running and not engine.waiting:
            break
    assert set(by_number(samples)) == {(one.group, one.index) for one in requests}
    seen = set()
    for sample in samples:
        assert_sound(sample)
        assert (np.diff(sample.versions) >= 0).all()
        assert (sample.versions == 4).sum() <= 2, "of one decode step, and of the first token before it"
        seen |= set(sample.versions.tolist())
    assert seen == {3, 4, 9}


@pytest.mark.parametrize("cache_setting", ["keep", "recompute"])
def test_log_probs_after_new_weights(cache_setting: str) -> None:
    """Kept keys and values stay those of the old weights; recomputed ones make later tokens the new policy's alone."""
    old, new = llama(0), llama(1)
    engine = engine_of(llama(0), slots=4, cache=cache_setting)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(2, VOCAB, length).astype(np.int32) for length in (1, 9, 17)]
    engine.submit([Request(group, 0, prompt, group, max_tokens=30) for group, prompt in enumerate(prompts)])
    samples = [sample for _ in range(6) for sample in engine.step()]
    engine.load(1, weights_bytes(new))
    samples += drain(engine)
    later = 0
    for sample in samples:
        before = int((sample.versions == 0).sum())
        np.testing.assert_allclose(sample.log_probs[:before], plain_log_probs(old, sample, 1.0)[:before], atol=1e-4)
        plain = plain_log_probs(new, sample, 1.0)[before:]
        later += len(plain)
        if cache_setting == "recompute":
            np.testing.assert_allclose(sample.log_probs[before:], plain, atol=1e-4)
        elif len(plain):
            np.testing.assert_allclose(sample.log_probs[before:], kept_log_probs(old, new, sample, before), atol=1e-4)
            assert np.abs(sample.log_probs[before:] - plain).max() > 1e-2
    assert later > 30
    recomputed = engine.stats()["engine/recomputed_tokens"]
    assert (recomputed > 0) == (cache_setting == "recompute")


def kept_log_probs(old: PreTrainedModel, new: PreTrainedModel, sample: Sample, before: int) -> np.ndarray:
    """Of the tokens from number `before` on, by the new network over the old one's keys and values of those until then."""
    ids = torch.from_numpy(np.concatenate([sample.request.prompt, sample.tokens])).long()[None]
    read = len(sample.request.prompt) + before - 1
    with torch.no_grad():
        states = old(input_ids=ids[:, :read], use_cache=True).past_key_values
        logits = new(input_ids=ids[:, read:-1], past_key_values=states).logits[0]
    found: np.ndarray = token_log_probs(logits, ids[0, read + 1 :])[0].numpy()
    return found


def test_finish_lets_completions_end_before_the_newest_weights_are_taken() -> None:
    engine = engine_of(llama(0), slots=4, swap="finish")
    engine.submit(random_requests(seed=8, groups=6, group_size=2))
    samples = engine.step() + engine.step()
    running = engine.running
    assert running > 1
    for version in (1, 3, 2):
        engine.load(version, weights_bytes(llama(version)))
    assert engine.version == 0
    waiting = engine.waiting
    while engine.version == 0 and engine.running:
        samples += engine.step()
        assert engine.waiting == waiting, "none begins before the weights are taken"
    samples += drain(engine)
    assert len(by_number(samples)) == 12
    assert engine.version == 3
    assert all(len(set(sample.versions.tolist())) == 1 for sample in samples)
    assert {int(sample.versions[0]) for sample in samples} == {0, 3}
    for sample in samples:
        network = llama(int(sample.versions[0]))
        np.testing.assert_allclose(sample.log_probs, plain_log_probs(network, sample, 1.0), atol=1e-4)


def test_prompts_read_with_old_weights_are_not_used_with_new_ones() -> None:
    """A group that is begun in part before new weights: the rest of it is the new policy's from the first token on."""
    engine = engine_of(llama(0), slots=2)
    prompt = np.arange(2, 20, dtype=np.int32)
    engine.submit([Request(0, index, prompt, index, max_tokens=3) for index in range(6)])
    samples = engine.step()
    engine.load(1, weights_bytes(llama(1)))
    samples += drain(engine)
    new = [sample for sample in samples if (sample.versions == 1).all()]
    assert len(new) == 4
    for sample in new:
        np.testing.assert_allclose(sample.log_probs, plain_log_probs(llama(1), sample, 1.0), atol=1e-4)


def test_wrong_weights_are_an_error_and_change_nothing() -> None:
    network = llama(0)
    engine = engine_of(network, slots=2)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        engine.load(1, weights_bytes(gpt2()))
    assert engine.version == 0
    assert weights_bytes(network) == weights_bytes(llama(0))


# Bookkeeping


@cache
def two_weights() -> tuple[PreTrainedModel, tuple[bytes, bytes]]:
    return llama(0), (weights_bytes(llama(0)), weights_bytes(llama(1)))


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 7), st.integers(1, 30), st.integers(1, 12)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0), st.just(0)),
        st.tuples(st.just("load"), st.integers(0, 1), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(
    actions=ACTIONS,
    slots=st.integers(1, 20),
    swap=st.sampled_from(["between_steps", "finish"]),
    cache_setting=st.sampled_from(["keep", "recompute"]),
)
def test_every_request_is_answered_exactly_once(
    actions: list[tuple[str, int, int, int]], slots: int, swap: str, cache_setting: str
) -> None:
    network, weights = two_weights()
    engine = engine_of(network, slots=slots, swap=swap, cache=cache_setting)
    rng = np.random.default_rng(0)
    asked: dict[tuple[int, int], Request] = {}
    samples: list[Sample] = []
    version = 0
    for number, (action, first, length, most) in enumerate(actions):
        if action == "submit":
            prompt = rng.integers(2, VOCAB, length).astype(np.int32)
            group = [
                Request(number, index, prompt, index, max_tokens=int(rng.integers(1, most + 1)))
                for index in range(first)
            ]
            asked.update({(one.group, one.index): one for one in group})
            engine.submit(group)
        elif action == "load":
            version += 1
            engine.load(version, weights[first])
        else:
            for _ in range(first):
                samples += engine.step()
        assert engine.running <= slots
        assert len(samples) + engine.running + engine.waiting == len(asked)
    samples += drain(engine)
    found = by_number(samples)
    assert set(found) == set(asked)
    for key, sample in found.items():
        assert sample.request is asked[key]
        assert_sound(sample)
        assert (np.diff(sample.versions) >= 0).all()
    engine.step()
    assert engine.version == version


def test_few_running_completions_cost_few_rows() -> None:
    """One long completion after many short ones: the rows computed stay near the tokens sampled."""
    engine = engine_of(llama(), slots=32)
    prompt = np.arange(2, 8, dtype=np.int32)
    lengths = [40] + [5] * 63
    engine.submit([Request(0, index, prompt, 0, max_tokens=most) for index, most in enumerate(lengths)])
    samples = drain(engine)
    tokens = sum(len(sample.tokens) for sample in samples)
    longest = max(len(sample.tokens) for sample in samples)
    assert longest > 20
    assert engine.stats()["engine/steps"] < longest
    assert engine.stats()["engine/rows"] < 1.15 * tokens


def test_groups_begun_in_parts_are_read_once() -> None:
    """Also where more prompts wait in part than are remembered: then some are read again, and all is right still."""
    engine = engine_of(llama(), slots=2)
    prompts = [np.arange(2, 5 + group, dtype=np.int32) for group in range(slots_module.PREFILLED_KEPT + 4)]
    mixed = [
        Request(group, index, prompt, index, max_tokens=2) for index in range(3) for group, prompt in enumerate(prompts)
    ]
    engine.submit(mixed)
    samples = drain(engine)
    assert len(by_number(samples)) == len(mixed)
    network = llama()
    for sample in samples:
        np.testing.assert_allclose(sample.log_probs, plain_log_probs(network, sample, 1.0), atol=1e-4)


def prefilled_alive() -> list[Prefilled]:
    return [one for one in gc.get_objects() if type(one) is Prefilled]


def test_prompts_of_one_pass_at_a_time_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both when completions begin and when running ones are read again by new weights."""
    monkeypatch.setattr(forward_module, "PASS_TOKENS", 64)
    network = llama()
    engine = engine_of(network, slots=16, cache="recompute")
    gc.collect()
    assert not prefilled_alive()
    alive, widths = [], []

    def note(_: object, inputs: object, arguments: dict[str, torch.Tensor]) -> None:
        widths.append(arguments["input_ids"].shape[1])
        alive.append(len(prefilled_alive()))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    prompts = [np.arange(2, 22 + group, dtype=np.int32) for group in range(16)]
    engine.submit([Request(group, 0, prompt, group, max_tokens=30) for group, prompt in enumerate(prompts)])
    engine.step()
    begun = sum(width > 1 for width in widths)
    assert begun >= 6
    engine.load(1, weights_bytes(llama(1)))
    engine.step()
    assert sum(width > 1 for width in widths) >= begun + 4
    assert max(alive) == 0
    hook.remove()


def test_of_prompts_that_are_kept_no_more_is_kept_than_themselves() -> None:
    gc.collect()
    engine = engine_of(llama(), slots=9)
    prompts = [np.arange(2, 6 + 3 * group, dtype=np.int32) for group in range(9)]
    # All but the last one's group begin whole, in one pass with its first.
    requests = [Request(group, 0, prompt, group, max_tokens=20) for group, prompt in enumerate(prompts)]
    requests += [Request(8, index, prompts[8], index, max_tokens=20) for index in range(1, 5)]
    engine.submit(requests)
    engine.step()
    (kept,) = prefilled_alive()
    for states in (*kept.states[0], *kept.states[1]):
        assert states.shape == (1, 2, len(prompts[8]), 8)
        assert states.untyped_storage().nbytes() == 4 * states.numel()
    assert kept.logits.untyped_storage().nbytes() == 4 * VOCAB
    del kept
    samples = drain(engine)
    assert len(by_number(samples)) == 13
    for sample in samples:
        np.testing.assert_allclose(sample.log_probs, plain_log_probs(llama(), sample, 1.0), atol=1e-4)
    assert not prefilled_alive()


# What is refused


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, 0, np.zeros(0, np.int32), 0), "at least one token"),
        (Request(0, 0, np.array([VOCAB], np.int32), 0), f"from 0 to {VOCAB - 1}, received {VOCAB}"),
        (Request(0, 0, np.array([3], np.int32), 0, max_tokens=0), "max_tokens of at least 1, received 0"),
        (Request(0, 0, np.array([3], np.int32), 0, temperature=-1.0), "temperature of 0 .* received -1"),
        (Request(3, 2, np.full(9, 3, np.int32), 0, max_tokens=248), "request 2 of group 3: .* make 257, .* is 256"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_together(request_: Request, message: str) -> None:
    engine = engine_of(llama())
    with pytest.raises(ValueError, match=message):
        engine.submit([Request(0, 0, np.array([3], np.int32), 0), request_])
    assert engine.waiting == 0
    engine.submit([Request(3, 2, np.full(9, 3, np.int32), 0, max_tokens=247)])


def test_models_with_other_caches_are_refused() -> None:
    window = random_network(lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=8)))
    with pytest.raises(ValueError, match=r"MistralForCausalLM .*DynamicSlidingWindowLayer"):
        engine_of(window)
    engine_of(random_network(lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None))))
    state = random_network(lambda: MambaForCausalLM(MambaConfig(**SIZES, hidden_size=16, num_hidden_layers=2)))
    with pytest.raises(ValueError, match=r"MambaForCausalLM .*LinearAttentionLayer"):
        engine_of(state)
    stretched = {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="rope_type 'dynamic'"):
        engine_of(random_network(lambda: LlamaForCausalLM(LlamaConfig(**stretched))))


class OwnEngine:
    """An engine of a user that cannot sample yet."""

    def __init__(self, settings: SamplingSettings, network: object, *, end: int, slots: int, version: int) -> None:
        self.made_with = end, slots, version

    version = running = waiting = 0
    submit = step = load = stats = lambda self: None


def test_engines_of_ones_own_are_made_by_name() -> None:
    made = engine_of(llama(), slots=3, version=5, engine=f"{__name__}:OwnEngine")
    assert made.made_with == (END, 3, 5)
    with pytest.raises(ModuleError, match="submit"):
        engine_of(llama(), engine=f"{__name__}:Sample")


def test_bfloat16_and_eager_attention_sample_too() -> None:
    network = llama().to(torch.bfloat16)
    engine = engine_of(network, slots=4)
    engine.submit(random_requests(seed=9, groups=3, group_size=3))
    assert all(np.isfinite(sample.log_probs).all() for sample in drain(engine))
    network = random_network(lambda: LlamaForCausalLM._from_config(LlamaConfig(**LLAMA), attn_implementation="eager"))
    engine = engine_of(network, slots=4)
    engine.submit(random_requests(seed=10, groups=4, group_size=2))
    for sample in drain(engine):
        np.testing.assert_allclose(sample.log_probs, plain_log_probs(network, sample, 1.0), atol=1e-4)


def test_logits_that_are_not_finite_are_an_error() -> None:
    network = llama()
    engine = engine_of(network)
    with torch.no_grad():
        network.get_output_embeddings().weight.fill_(math.nan)
    engine.submit([Request(0, 0, np.array([3], np.int32), 0)])
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.step()


@pytest.mark.parametrize("by", [3, -3, 40, -40])
def test_columns_keep_their_content_when_moved(by: int) -> None:
    """To the left and right, onto themselves in part or not, with and without more room."""
    cache = SlotCache(slots=3, layers=2)
    width, first = 20, 50
    cache.make_room(0, 0, first + width, 100)
    states = [(torch.randn(2, 2, width, 4), torch.randn(2, 2, width, 3)) for _ in range(2)]
    cache.place(torch.tensor([2, 0]), torch.tensor([0, 1]), states)
    moved = cache.make_room(3, first, first + width + by, 0) if by > 0 else 0
    if by < 0:
        for layer in cache.layers:
            layer.relocate(3, first, first + width, first + by)
    at = first - moved if by > 0 else first + by
    assert at == first + by
    for layer, (keys, values) in zip(cache.layers, states, strict=True):
        torch.testing.assert_close(layer.keys[[2, 0], :, at : at + width], keys)
        torch.testing.assert_close(layer.values[[2, 0], :, at : at + width], values)
    capacity = layer.keys.shape[2]
    at -= cache.make_room(3, at, 0, 10 * capacity)
    assert layer.keys.shape[2] > 10 * capacity
    torch.testing.assert_close(layer.keys[[2, 0], :, at : at + width], states[1][0])
