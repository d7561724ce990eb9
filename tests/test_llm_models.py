"""Tokenizers, models, their weights as bytes, log-probabilities and the warm start of language models."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rules
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configs.llm import ModelSettings, WarmStartSettings
from learners.llm import warm_start as phase
from learners.llm.log_probs import token_log_probs
from learners.llm.models import Model, load_weights, make_model, save_model, weights_bytes
from learners.llm.tokenizers import CHARACTERS, CharacterTokenizer, PretrainedTokenizer
from learners.llm.warm_start import warm_start

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXTS = st.text(CHARACTERS, max_size=40)
LORA = ModelSettings(lora_rank=4, lora_alpha=8.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bpe(**arguments: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as pretrained models have them."""
    rules = Rules(BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator(["make 24 of the numbers 3 8 1 1", "the answer is 3*8*1*1"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|stop|>", **arguments)


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PretrainedTokenizer:
    tokenizer.save_pretrained(folder)
    return PretrainedTokenizer(AutoTokenizer.from_pretrained(folder))


def logits(network: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        result: Tensor = network(input_ids=torch.tensor([ids])).logits
    return result


def perturbed(network: nn.Module) -> None:
    """Other values for all that is trained; low-rank additions would otherwise still be zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


class TestCharacterTokenizer:
    @given(TEXTS, TEXTS)
    def test_text_survives_the_round_trip(self, text: str, hint: str) -> None:
        tokenizer = CharacterTokenizer()
        ids = tokenizer.encode_prompt(text, hint)
        assert ids == [tokenizer.begin, *tokenizer.encode(text + hint)]
        assert len(ids) == 1 + len(text) + len(hint)
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        assert tokenizer.decode(np.array([*ids, tokenizer.end, tokenizer.pad], np.int32)) == text + hint

    @given(TEXTS, TEXTS)
    def test_its_copy_for_hugging_face_gives_the_same_tokens(self, text: str, hint: str) -> None:
        ours, theirs = CharacterTokenizer(), PRETRAINED_CHARACTERS
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.encode_prompt(text, hint) == ours.encode_prompt(text, hint)
        assert theirs.decode([*ours.encode(text), ours.end]) == text
        assert (theirs.vocab_size, theirs.end, theirs.pad) == (ours.vocab_size, ours.end, ours.pad)

    def test_unknown_characters_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"got \['×', 'é'\]"):
            CharacterTokenizer().encode("3×8é×1")
        with pytest.raises(ValueError, match="'3×8'"):
            PRETRAINED_CHARACTERS.encode("3×8")

    def test_unknown_ids_are_an_error(self) -> None:
        tokenizer = CharacterTokenizer()
        with pytest.raises(ValueError, match=r"from 0 to 98, got \[-1, 99\]"):
            tokenizer.decode([3, 99, -1])


PRETRAINED_CHARACTERS = CharacterTokenizer().pretrained()


class TestPretrainedTokenizer:
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def test_text_survives_the_round_trip(self, text: str) -> None:
        ids = BYTES.encode(text)
        assert BYTES.decode([*ids, BYTES.end]) == text

    def test_without_a_chat_template_the_prompt_is_plain_text(self, tmp_path: Path) -> None:
        tokenizer = saved(bpe(), tmp_path)
        assert tokenizer.encode_prompt("make 24", " of") == tokenizer.encode("make 24") + tokenizer.encode(" of")
        assert tokenizer.pad == tokenizer.end == 1
        assert (
            max(tokenizer.encode("make 24 of the numbers"))
            < tokenizer.vocab_size
            == len(tokenizer.tokenizer.get_vocab())
        )

    def test_with_one_it_is_a_users_message_and_the_hint_begins_the_answer(self, tmp_path: Path) -> None:
        tokenizer = saved(bpe(chat_template=CHAT, pad_token="<|start|>"), tmp_path)
        ids = tokenizer.encode_prompt("make 24", "3*")
        text = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        assert text == "<|start|>user\nmake 24<|stop|>\n<|start|>assistant\n3*"
        assert ids[: len(ids) - len(tokenizer.encode("3*"))] == tokenizer.encode_prompt("make 24")
        assert tokenizer.pad == 0

    def test_an_end_token_that_it_appends_is_no_part_of_the_prompt(self) -> None:
        inner = bpe(bos_token="<|start|>")
        inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A <|stop|>", special_tokens=[("<|start|>", 0), ("<|stop|>", 1)]
        )
        tokenizer = PretrainedTokenizer(inner)
        assert inner.encode("24")[-1] == tokenizer.end
        assert tokenizer.encode_prompt("24", "8") == [0, *tokenizer.encode("24"), *tokenizer.encode("8")]

    def test_one_without_an_end_token_is_refused(self) -> None:
        tokenizer = bpe()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match="end-of-sequence"):
            PretrainedTokenizer(tokenizer)


BYTES = PretrainedTokenizer(bpe())


class TestEmbedded:
    def test_its_size_and_tied_embeddings(self) -> None:
        network = make_model(ModelSettings(), seed=0).network
        assert 90_000 < sum(parameter.numel() for parameter in network.parameters()) < 120_000
        assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
        assert not network.training
        assert network.config.max_position_embeddings >= 4096

    def test_the_seed_decides_the_weights_and_global_random_state_stays(self) -> None:
        torch.manual_seed(3)
        state = torch.random.get_rng_state()
        first, again, other = (weights_bytes(make_model(ModelSettings(), seed=seed).network) for seed in (1, 1, 2))
        assert first == again != other
        make_model(LORA, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_bfloat16_rounds_the_same_weights_and_not_the_rotary_frequencies(self) -> None:
        full = make_model(ModelSettings(), seed=1).network
        half = make_model(ModelSettings(), seed=1, dtype=torch.bfloat16).network
        for name, parameter in half.named_parameters():
            assert torch.equal(parameter, full.get_parameter(name).bfloat16())
        for name, buffer in half.named_buffers():
            assert torch.equal(buffer, full.get_buffer(name))

    def test_heads_must_divide_the_width(self) -> None:
        with pytest.raises(ValueError, match="got 20 and 4"):
            make_model(ModelSettings(width=20, heads=4), seed=0)

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ValueError, match=r"pip install 'millrace\[llm\]'"):
            make_model(LORA, seed=0)


def pretrained(folder: Path) -> Any:
    """A model of two tensors' names other than the embedded one's, untied, with a chat tokenizer."""
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    network = Qwen2ForCausalLM(config).eval()
    network.save_pretrained(folder)
    bpe(chat_template=CHAT).save_pretrained(folder)
    return network


class TestFolders:
    @pytest.mark.parametrize("settings", [ModelSettings(), LORA], ids=["embedded", "lora"])
    def test_a_saved_model_is_read_again(self, settings: ModelSettings, tmp_path: Path) -> None:
        model = make_model(settings, seed=4)
        perturbed(model.network)
        save_model(model, tmp_path)
        again = make_model(ModelSettings(path=str(tmp_path)), seed=0)
        ids = model.tokenizer.encode_prompt("24=3,8:")
        assert again.tokenizer.encode_prompt("24=3,8:") == ids
        assert again.tokenizer.decode([*ids, again.tokenizer.end]) == "24=3,8:"
        torch.testing.assert_close(logits(again.network, ids), logits(model.network, ids), rtol=1e-5, atol=1e-5)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(
            logits(plain, AutoTokenizer.from_pretrained(tmp_path).encode("24=3,8:")), logits(again.network, ids)
        )
        assert plain.generation_config.eos_token_id == model.tokenizer.end

    def test_a_pretrained_model_keeps_its_weights(self, tmp_path: Path) -> None:
        network = pretrained(tmp_path)
        model = make_model(ModelSettings(path=str(tmp_path)), seed=0)
        ids = model.tokenizer.encode_prompt("make 24", "3*")
        assert torch.equal(logits(model.network, ids), logits(network, ids))
        assert "lm_head.weight" in dict(model.network.named_parameters())
        copy = make_model(ModelSettings(path=str(tmp_path)), seed=0, dtype=torch.bfloat16).network
        assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}
        save_model(model, tmp_path / "again")
        assert torch.equal(
            logits(make_model(ModelSettings(path=str(tmp_path / "again")), seed=0).network, ids), logits(network, ids)
        )

    @pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/model", "a/b/c"])
    def test_a_missing_folder_is_told_at_once(self, path: str) -> None:
        begun = time.perf_counter()
        with pytest.raises(ValueError, match="no folder"):
            make_model(ModelSettings(path=path), seed=0)
        assert time.perf_counter() - begun < 1.0

    def test_a_folder_without_a_model_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"config\.json"):
            make_model(ModelSettings(path=str(tmp_path)), seed=0)

    def test_missing_weights_are_an_error(self, tmp_path: Path) -> None:
        pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"missing are model\.layers\.1\.mlp\.up_proj\.weight"):
            make_model(ModelSettings(path=str(tmp_path)), seed=0)

    def test_weights_other_than_safetensors_are_refused(self, tmp_path: Path) -> None:
        network = pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(weights_bytes(network))
        with pytest.raises(ValueError, match="safetensors"):
            make_model(ModelSettings(path=str(tmp_path)), seed=0)

    def test_a_tokenizer_of_another_model_is_refused(self, tmp_path: Path) -> None:
        model = make_model(ModelSettings(), seed=0)
        save_model(Model(model.network, BYTES), tmp_path)
        with pytest.raises(ValueError, match=r"at most the model's 99 tokens, got 2\d\d"):
            make_model(ModelSettings(path=str(tmp_path)), seed=0)


class TestWeights:
    def test_they_are_what_safetensors_reads_with_tied_ones_once(self) -> None:
        network = make_model(ModelSettings(), seed=1).network
        tensors = safetensors.torch.load(weights_bytes(network))
        parameters = dict(network.named_parameters())
        assert tensors.keys() == parameters.keys()
        assert "lm_head.weight" not in tensors
        assert all(torch.equal(tensors[name], parameter) for name, parameter in parameters.items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_another_model_takes_them(self, dtype: torch.dtype) -> None:
        data = weights_bytes(make_model(ModelSettings(), seed=1, dtype=dtype).network)
        other = make_model(ModelSettings(), seed=2).network
        pointers = [parameter.data_ptr() for parameter in other.parameters()]
        load_weights(other, data)
        assert [parameter.data_ptr() for parameter in other.parameters()] == pointers
        for name, parameter in make_model(ModelSettings(), seed=1, dtype=dtype).network.named_parameters():
            assert torch.equal(other.get_parameter(name), parameter.float())

    def test_those_that_safetensors_wrote_are_taken(self) -> None:
        source, target = (nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 3)) for _ in range(2))
        load_weights(target, safetensors.torch.save({name: p.detach() for name, p in source.named_parameters()}))
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("model.norm.weight"), r"missing: model\.norm\.weight"),
            (lambda tensors: tensors.update(extra=torch.zeros(2)), "unknown: extra"),
            (
                lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)}),
                r"another shape: model\.norm\.weight \(63,\) for \(64,\)",
            ),
            (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)}), "F32"),
        ],
        ids=["missing", "extra", "shape", "type"],
    )
    def test_misfits_change_nothing(self, change: Any, message: str) -> None:
        network = make_model(ModelSettings(), seed=1).network
        before = weights_bytes(network)
        tensors = safetensors.torch.load(weights_bytes(make_model(ModelSettings(), seed=2).network))
        change(tensors)
        with pytest.raises(ValueError, match=message):
            load_weights(network, safetensors.torch.save(tensors))
        assert weights_bytes(network) == before

    @given(st.binary(max_size=40), st.integers(0, 3000))
    def test_anything_else_is_an_error(self, garbage: bytes, cut: int) -> None:
        network = nn.Linear(3, 2)
        data = weights_bytes(network)
        for wrong in (garbage, data[: cut % len(data)], len(garbage).to_bytes(8, "little") + garbage):
            with pytest.raises(ValueError, match="expected weights"):
                load_weights(network, wrong)

    @pytest.mark.parametrize("offsets", [[0, 20], [8, 32], [-24, 0], [24, 0], [0], "ab", None])
    def test_impossible_offsets_are_an_error(self, offsets: Any) -> None:
        text = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}}).encode()
        with pytest.raises(ValueError, match="safetensors buffer"):
            load_weights(nn.Linear(3, 2, bias=False), len(text).to_bytes(8, "little") + text + bytes(24))


class TestLowRankAdditions:
    def test_published_weights_are_merged_and_the_training_model_is_left_alone(self) -> None:
        trained = make_model(LORA, seed=1).network
        plain = make_model(ModelSettings(), seed=9).network
        ids = list(range(2, 40))
        load_weights(plain, weights_bytes(trained))
        assert torch.equal(logits(plain, ids), logits(make_model(ModelSettings(), seed=1).network, ids))
        perturbed(trained)
        before = logits(trained, ids)
        state = {name: value.clone() for name, value in trained.state_dict().items()}
        data = weights_bytes(trained)
        assert torch.equal(logits(trained, ids), before)
        assert all(torch.equal(trained.state_dict()[name], value) for name, value in state.items())
        assert safetensors.torch.load(data).keys() == dict(plain.named_parameters()).keys()
        assert (before - logits(plain, ids)).abs().max() > 0.1
        load_weights(plain, data)
        torch.testing.assert_close(logits(plain, ids), before, rtol=1e-4, atol=1e-4)

    def test_only_additions_are_trained(self) -> None:
        network = make_model(LORA, seed=1).network
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)

    def test_a_pretrained_model_with_biases_takes_them(self, tmp_path: Path) -> None:
        base = pretrained(tmp_path)
        trained = make_model(LORA.model_copy(update={"path": str(tmp_path)}), seed=1).network
        perturbed(trained)
        plain = make_model(ModelSettings(path=str(tmp_path)), seed=0).network
        load_weights(plain, weights_bytes(trained))
        torch.testing.assert_close(logits(plain, [1, 5, 9]), logits(trained, [1, 5, 9]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(plain, [1, 5, 9]), logits(base, [1, 5, 9]), atol=1e-2)

    def test_a_model_with_them_takes_no_weights(self) -> None:
        network = make_model(LORA, seed=1).network
        with pytest.raises(ValueError, match="lora_rank None"):
            load_weights(network, weights_bytes(network))


def reference(scores: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """In float64, by the definition."""
    logs = torch.log_softmax(scores.double() / temperature, -1)
    return logs.gather(-1, tokens[..., None])[..., 0], -(logs.exp() * logs).sum(-1)


class LargestFloat32(TorchDispatchMode):
    """Notes the most numbers of any float32 tensor that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numbers = max(self.numbers, tensor.numel())
        return result


class TestLogProbs:
    @given(
        seed=st.integers(0, 2**31),
        shape=st.sampled_from([(1, 2), (7, 99), (2, 3, 11), (5, 60_000), (0, 4), (1, 1)]),
        temperature=st.sampled_from([0.3, 1.0, 2.5]),
        spread=st.sampled_from([0.1, 3.0, 30.0]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    )
    @examples(max_examples=60)
    def test_values_and_gradients_are_those_of_float64(
        self, seed: int, shape: tuple[int, ...], temperature: float, spread: float, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scores = (spread * torch.randn(shape, generator=generator) + 50.0).to(dtype).requires_grad_()
        tokens = torch.randint(0, shape[-1], shape[:-1], generator=generator)
        exact = scores.detach().double().requires_grad_()
        ours, theirs = token_log_probs(scores, tokens, temperature), reference(exact, tokens, temperature)
        for value, expected in zip(ours, theirs, strict=True):
            assert value.dtype == torch.float32
            assert value.shape == tokens.shape
            torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
        weights = [torch.randn(tokens.shape, generator=generator) for _ in range(2)]
        sum((w * v).sum() for w, v in zip(weights, ours, strict=True)).backward()  # type: ignore[union-attr]
        sum((w * v).sum() for w, v in zip(weights, theirs, strict=True)).backward()  # type: ignore[union-attr]
        rough = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert scores.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=rough, atol=rough / temperature)

    @pytest.mark.parametrize("which", [0, 1])
    def test_the_gradient_of_either_alone(self, which: int) -> None:
        scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        exact = scores.detach().double().requires_grad_()
        tokens = torch.arange(6)
        token_log_probs(scores, tokens, 0.7)[which].sum().backward()
        reference(exact, tokens, 0.7)[which].sum().backward()
        assert scores.grad is not None
        torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)

    def test_impossible_tokens_take_no_part(self) -> None:
        scores = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
        log_probs, entropies = token_log_probs(scores, torch.tensor([1]))
        expected = reference(scores[:, :2].detach(), torch.tensor([1]), 1.0)
        torch.testing.assert_close((log_probs.double(), entropies.double()), expected, rtol=1e-6, atol=1e-6)
        (log_probs + entropies).sum().backward()
        assert scores.grad is not None
        assert scores.grad.isfinite().all()
        assert scores.grad[0, 2] == 0.0
        assert token_log_probs(scores, torch.tensor([2]))[0].item() == -torch.inf

    def test_no_float32_copy_of_the_logits_is_made(self) -> None:
        scores = torch.zeros(64, 30_000, dtype=torch.bfloat16, requires_grad=True)
        with LargestFloat32() as largest:
            log_probs, entropies = token_log_probs(scores, torch.zeros(64, dtype=torch.int64))
            (log_probs + entropies).sum().backward()
        assert 0 < largest.numbers < scores.numel() / 4

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"so \(2, 3\), got \(2,\)"):
            token_log_probs(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match="above 0"):
            token_log_probs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), 0.0)


def copying(seed: int) -> Iterator[tuple[str, str]]:
    """Say two letters again."""
    generator = np.random.default_rng(seed)
    while True:
        pair = "".join(generator.choice(list("abcdef"), 2))
        yield f"{pair}=", pair


SHORT = WarmStartSettings(steps=3, batch_size=16)


class TestWarmStart:
    def test_it_learns_to_copy(self) -> None:
        model = make_model(ModelSettings(layers=2, width=32, heads=2, inner=64), seed=0)
        lines: list[str] = []
        settings = WarmStartSettings(steps=150, batch_size=64, learning_rate=5e-3)
        metrics = warm_start(model, copying(0), settings, max_tokens=4, tell=lines.append)
        losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
        assert losses[0] > 3 * losses[-1]
        assert metrics["loss"] == pytest.approx(losses[-1], abs=1e-3)
        assert metrics["tokens"] == 150 * 64 * 3
        right = 0
        pairs = ["".join(pair) for pair in itertools.product("abcdef", repeat=2)]
        for pair in pairs:
            ids = model.tokenizer.encode_prompt(f"{pair}=")
            for _ in range(3):
                ids.append(int(logits(model.network, ids)[0, -1].argmax()))
            right += ids[-1] == model.tokenizer.end and model.tokenizer.decode(ids) == f"{pair}={pair}"
        assert right / len(pairs) > 0.9
        assert all(parameter.grad is None for parameter in model.network.parameters())

    def test_the_examples_alone_decide_the_result(self) -> None:
        results = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(noise)
            model = make_model(ModelSettings(), seed=0)
            warm_start(model, copying(seed), SHORT, max_tokens=4)
            results.append(weights_bytes(model.network))
        assert results[0] == results[1] != results[2]

    def test_additions_alone_are_trained_where_there_are_some(self) -> None:
        model = make_model(LORA, seed=0)
        before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
        warm_start(model, copying(0), SHORT, max_tokens=4)
        changed = {name for name, p in model.network.named_parameters() if not torch.equal(p, before[name])}
        assert changed
        assert all(".lora_" in name for name in changed)

    @given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
    @examples(max_examples=25)
    def test_the_loss_is_that_of_each_answer_by_itself(self, texts: list[tuple[str, str]]) -> None:
        batch = [phase._encode(MODEL.tokenizer, prompt, answer, 10) for prompt, answer in texts]
        expected = 0.0
        for prompt, answer in batch:
            assert len(answer) <= 10
            scores = logits(MODEL.network, prompt + answer)[0, len(prompt) - 1 : -1]
            expected -= reference(scores, torch.tensor(answer), 1.0)[0].sum().item()
        loss = sum(
            phase._loss(MODEL.network, part, 0, torch.device("cpu"))[0].item() for part in phase._parts(batch, 60)
        )
        assert loss == pytest.approx(expected, rel=1e-5)

    @given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=40), st.integers(1, 200))
    def test_a_batch_is_divided_whole_into_parts_that_fit(self, lengths: list[tuple[int, int]], most: int) -> None:
        batch = [([number] * prompt, [number] * answer) for number, (prompt, answer) in enumerate(lengths)]
        parts = list(phase._parts(batch, most))
        assert sorted(example for part in parts for example in part) == sorted(batch)
        for part in parts:
            assert len(part) == 1 or len(part) * max(len(p) + len(a) for p, a in part) <= most

    def test_too_few_examples_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="got 4 in batch 2"):
            warm_start(make_model(ModelSettings(), seed=0), itertools.islice(copying(0), 20), SHORT, max_tokens=4)

    def test_other_architectures_and_their_tokenizers(self) -> None:
        config = GPT2Config(vocab_size=BYTES.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64)
        model = Model(GPT2LMHeadModel(config).eval(), BYTES)
        metrics = warm_start(model, copying(0), SHORT, max_tokens=8)
        assert 4.0 < metrics["loss"] < 7.0
        with pytest.raises(ValueError, match="no tokens"):
            warm_start(model, iter([("", "1")] * 16), SHORT, max_tokens=8)


MODEL = make_model(ModelSettings(), seed=0)
