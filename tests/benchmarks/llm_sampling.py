"""The models and requests of the language-model benchmark, the two ways to sample that it compares, and new weights meanwhile.

Both ways sample the same requests from the same model in the same process: groups of completions of random prompts, each completion
with its own most tokens, drawn evenly from `LENGTHS`; the tokens that each completion gives are counted, up to its own most.
`generate` takes the requests in batches of as many as the engine has slots, and as it does, goes on until a batch's longest
completion is done; it is not asked for log-probabilities, which the engine always gives.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actors.llm.engine import Engine, Request, Sample, make_engine
from configs.llm import ModelSettings, SamplingSettings
from learners.llm.models import make_model

LENGTHS = (8, 64)  # fewest and most of the most tokens of a completion
PROMPTS = (12, 24)  # fewest and most tokens of a prompt
SWAPS = 12  # of weights, where they are timed and where samples are counted
STEPS_BETWEEN = 3  # decode steps between two of them
SHORT = 12  # most tokens of a completion where samples are counted
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"cache": "recompute"},
    {"swap": "finish"},
)  # what a swap may do to running completions
PAD, END, SPECIAL = 0, 1, 3  # two tokens, and the first that stands for text


@dataclass(frozen=True)
class Case:
    """A model and how much is asked of it."""

    name: str
    make: Callable[[str], PreTrainedModel]  # on a device; the same float32 weights each time
    slots: int
    batches: int  # of as many completions as there are slots
    learner_groups: int  # in a learner step
    group_size: int = 16
    precision: Literal["float32", "bfloat16"] = "float32"  # of the actor's weights and of the learner's products
    on_cpu: bool = True

    def network(self, device: str, *, samples: bool) -> PreTrainedModel:
        """The model on a device, to sample with or to be trained."""
        network = self.make(device).eval()
        if samples and self.precision == "bfloat16":
            # Not network.to(dtype): the rotary frequencies are buffers, which lose their precision by it.
            for parameter in network.parameters():
                parameter.data = parameter.data.bfloat16()
        return network


def embedded(device: str) -> PreTrainedModel:
    """The model that trains when no other is named, before training."""
    return make_model(ModelSettings(), seed=0, device=device).network


def medium(device: str) -> PreTrainedModel:
    """A Llama-shaped model of 30 M parameters with random weights."""
    return _random(
        device,
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def large(device: str) -> PreTrainedModel:
    """One of 0.5 B parameters, in the shape of the small models that are published: many tokens, few heads of keys."""
    return _random(
        device,
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def _random(device: str, **shape: object) -> PreTrainedModel:
    config = LlamaConfig(**shape, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=None, eos_token_id=END)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


CASES = (
    Case("embedded", embedded, slots=256, batches=4, learner_groups=32),
    Case("30M", medium, slots=64, batches=3, learner_groups=2),
    Case("0.5B", large, slots=256, batches=4, learner_groups=32, precision="bfloat16", on_cpu=False),
)


def requests_of(case: Case, vocab: int) -> list[Request]:
    """The same requests each time."""
    rng = np.random.default_rng(0)
    requests = []
    for group in range(case.slots * case.batches // case.group_size):
        prompt = rng.integers(SPECIAL, vocab, rng.integers(PROMPTS[0], PROMPTS[1] + 1)).astype(np.int32)
        for index in range(case.group_size):
            most = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
            requests.append(Request(group, index, prompt, int(rng.integers(2**62)), max_tokens=most))
    return requests


def samples_of(network: PreTrainedModel, requests: Sequence[Request], slots: int) -> list[Sample]:
    """What the engine samples, as the completions finish."""
    engine = make_engine(SamplingSettings(max_tokens=LENGTHS[1]), network, end=END, slots=slots)
    engine.submit(requests)
    samples: list[Sample] = []
    while engine.running or engine.waiting:
        samples += engine.step()
    return samples


def by_engine(network: PreTrainedModel, requests: Sequence[Request], slots: int) -> int:
    """Tokens sampled."""
    return sum(len(sample.tokens) for sample in samples_of(network, requests, slots))


def by_generate(network: PreTrainedModel, requests: Sequence[Request], slots: int) -> int:
    """Tokens that count."""
    tokens = 0
    for first in range(0, len(requests), slots):
        batch = requests[first : first + slots]
        longest = max(len(request.prompt) for request in batch)
        ids = np.full((len(batch), longest), PAD, np.int64)
        for row, request in zip(ids, batch, strict=True):
            row[longest - len(request.prompt) :] = request.prompt
        most = np.array([request.max_tokens or LENGTHS[1] for request in batch])
        with torch.inference_mode():
            sequences = network.generate(
                input_ids=torch.from_numpy(ids).to(network.device),
                attention_mask=torch.from_numpy((ids != PAD).astype(np.int64)).to(network.device),
                max_new_tokens=int(most.max()),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        ends = sequences[:, longest:].cpu().numpy() == END
        lengths = np.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1])
        tokens += int(np.minimum(lengths, most).sum())
    return tokens


# ------------------------------------------------------------------------------------------------------ new weights


def sync_times(
    case: Case,
    network: PreTrainedModel,
    requests: Sequence[Request],
    pack: Callable[[], bytes],
    synchronise: Callable[[], object],
) -> dict[str, Any]:
    """Seconds from the learner's weights, which `pack` gives as bytes, to an engine that has taken them, with its slots full.

    synchronise: waits for the device.
    """
    engine = make_engine(SamplingSettings(max_tokens=LENGTHS[1]), network, end=END, slots=case.slots)
    times: list[tuple[float, float, float]] = []
    running, data = [], b""
    for version in range(1, SWAPS + 1):
        if engine.waiting < case.slots:
            engine.submit(requests)
        for _ in range(STEPS_BETWEEN):
            began = time.perf_counter()
            engine.step()
            synchronise()
            step_s = time.perf_counter() - began
        running.append(engine.running)
        began = time.perf_counter()
        data = pack()
        packed = time.perf_counter()
        engine.load(version, data)
        synchronise()
        times.append((packed - began, time.perf_counter() - packed, step_s))
        if engine.version != version:
            raise RuntimeError(
                f"expected the engine to have version {version} between two steps, it has {engine.version}"
            )
    pack_s, load_s, step_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "weight_sync_s": statistics.median(packed + loaded for packed, loaded, _ in times),
        "pack_s": pack_s,
        "load_s": load_s,
        "step_s": step_s,
        "weight_mb": len(data) / 1e6,
        "running_at_swap": statistics.median(running),
    }


def samples_lost(
    case: Case, network: PreTrainedModel, requests: Sequence[Request], weights: Sequence[bytes]
) -> dict[str, Any]:
    """Requests that did not come back as they should, of those submitted before, during and after swaps between `weights`.

    Each has to come back once, with as many versions as tokens: rising ones, none older than the weights at its submission, the
    last that of the step which returned it, and only one where completions finish before a swap.
    """
    found: Counter[str] = Counter()
    for changes in SETTINGS:
        settings = SamplingSettings(max_tokens=SHORT, **changes)
        engine = make_engine(settings, network, end=END, slots=case.slots)
        asked = [replace(r, max_tokens=min(SHORT, r.max_tokens or SHORT)) for r in requests[: 2 * case.slots]]
        oldest: dict[tuple[int, int], int] = {}  # version at the submission
        back: Counter[tuple[int, int]] = Counter()
        for part in _with_swaps(engine, asked, weights):
            if part:  # before the next step
                oldest |= {(request.group, request.index): engine.version for request in part}
                engine.submit(part)
            for sample in engine.step():
                name = sample.request.group, sample.request.index
                back[name] += 1
                versions = sample.versions
                right = (
                    name in oldest
                    and len(versions) == len(sample.tokens) == len(sample.log_probs) > 0
                    and bool((np.diff(versions) >= 0).all())
                    and oldest[name] <= versions[0]
                    and versions[-1] == engine.version
                    and (settings.swap != "finish" or versions[0] == versions[-1])
                )
                found["wrong"] += not right
                found["swapped"] += bool(versions[0] != versions[-1])
        found["submitted"] += len(asked)
        found["missing"] += sum(back[name] == 0 for name in oldest)
        found["repeated"] += sum(back.values()) - len(back)
        found["swaps"] += int(engine.stats().get("engine/swaps", 0))
    return {
        "samples_lost": found["missing"] + found["repeated"] + found["wrong"],
        "samples_submitted": found["submitted"],
        "samples_swapped": found["swapped"],  # whose weights changed while they were sampled
        "swaps": found["swaps"],
    }


def _with_swaps(engine: Engine, requests: Sequence[Request], weights: Sequence[bytes]) -> Iterator[Sequence[Request]]:
    """What to submit before each of the engine's steps: a third at once, a third between swaps, a third after the last."""
    third = len(requests) // 3
    during = requests[third : 2 * third]
    yield requests[:third]
    for number in range(SWAPS):
        engine.load(number + 1, weights[number % len(weights)])
        yield during[number * third // SWAPS : (number + 1) * third // SWAPS]
        for _ in range(STEPS_BETWEEN - 1):
            yield ()
    yield requests[2 * third :]
    while engine.running or engine.waiting:
        yield ()
