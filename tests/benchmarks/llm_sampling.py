"""Tokens per second that an actor's engine samples, against plain `model.generate`.

Both sample the same requests from the same model in the same process: groups of completions of random prompts, each completion
with its own most tokens, drawn evenly from `LENGTHS`; the tokens that each completion gives are counted, up to its own most.
`generate` takes the requests in batches of as many as the engine has slots, and as it does, goes on until a batch's longest
completion is done; it is not asked for log-probabilities, which the engine always gives. In each round one runs after the other,
so that a machine that drifts drifts for both; tokens per second are medians over the rounds, and so is `ratio`, of one over the
other in the same round. `ratio_cpu` is the same by the process's CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actors.llm.engine import Request, make_engine
from configs.llm import ModelSettings, SamplingSettings
from learners.llm.models import make_model

LENGTHS = (8, 64)  # fewest and most of the most tokens of a completion
PROMPTS = (12, 24)  # fewest and most tokens of a prompt
PAD, END = 0, 1


@dataclass(frozen=True)
class Case:
    """A model and how much is asked of it."""

    name: str
    make: Callable[[], PreTrainedModel]
    slots: int
    batches: int  # of as many completions as there are slots
    group_size: int


@dataclass(frozen=True)
class Result:
    """Speeds are medians over the rounds."""

    name: str
    parameters: int
    slots: int
    completions: int  # in each round
    sampled_tokens_per_s: float
    generate_tokens_per_s: float
    ratio: float
    ratio_cpu: float  # means something where the model runs on the CPU
    ratios: tuple[float, ...]  # of the rounds


def embedded() -> PreTrainedModel:
    """The model that trains when no other is named, before training."""
    return make_model(ModelSettings(), seed=0).network


def medium() -> PreTrainedModel:
    """A Llama-shaped model of 30 M parameters with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


CASES = (
    Case("embedded", embedded, slots=256, batches=4, group_size=16),
    Case("30M", medium, slots=64, batches=3, group_size=16),
)


def requests_of(case: Case, vocab: int) -> list[Request]:
    """The same requests each time."""
    rng = np.random.default_rng(0)
    requests = []
    for group in range(case.slots * case.batches // case.group_size):
        prompt = rng.integers(3, vocab, rng.integers(PROMPTS[0], PROMPTS[1] + 1)).astype(np.int32)
        for index in range(case.group_size):
            most = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
            requests.append(Request(group, index, prompt, int(rng.integers(2**62)), max_tokens=most))
    return requests


def by_engine(network: PreTrainedModel, requests: Sequence[Request], slots: int) -> int:
    """Tokens sampled."""
    engine = make_engine(SamplingSettings(max_tokens=LENGTHS[1]), network, end=END, slots=slots)
    tokens = 0
    engine.submit(requests)
    while engine.running or engine.waiting:
        tokens += sum(len(sample.tokens) for sample in engine.step())
    return tokens


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
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy((ids != PAD).astype(np.int64)),
                max_new_tokens=int(most.max()),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        ends = sequences[:, longest:].numpy() == END
        lengths = np.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1])
        tokens += int(np.minimum(lengths, most).sum())
    return tokens


def measure(case: Case, rounds: int) -> Result:
    """Both in alternation, after one warm-up of each on a part of the requests."""
    network = case.make()
    requests = requests_of(case, network.config.vocab_size)
    for run in (by_engine, by_generate):
        run(network, requests[: case.slots], case.slots)
    speeds = [[_speeds(run, network, requests, case.slots) for run in (by_engine, by_generate)] for _ in range(rounds)]
    (engine, engine_cpu), (generate, generate_cpu) = np.array(speeds).transpose(1, 2, 0)
    return Result(
        name=case.name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        slots=case.slots,
        completions=len(requests),
        sampled_tokens_per_s=round(float(np.median(engine)), 1),
        generate_tokens_per_s=round(float(np.median(generate)), 1),
        ratio=round(float(np.median(engine / generate)), 3),
        ratio_cpu=round(float(np.median(engine_cpu / generate_cpu)), 3),
        ratios=tuple((engine / generate).round(3).tolist()),
    )


Run = Callable[[PreTrainedModel, Sequence[Request], int], int]


def _speeds(run: Run, network: PreTrainedModel, requests: Sequence[Request], slots: int) -> tuple[float, float]:
    """Tokens per second and per second of CPU time."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    tokens = run(network, requests, slots)
    return tokens / (time.perf_counter() - begin), tokens / (time.process_time() - begin_cpu)


def sampling_speeds(names: Sequence[str] = (), rounds: int = 3, threads: int = 1) -> list[dict[str, object]]:
    """Results of the cases named, all by default, as `Result` in dictionaries."""
    torch.set_num_threads(threads)
    return [asdict(measure(case, rounds)) for case in CASES if not names or case.name in names]


def main() -> None:
    """Prints the results as JSON."""
    parser = argparse.ArgumentParser(description="Tokens per second of the engine and of model.generate.")
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(sampling_speeds(options.only, options.rounds, options.threads), indent=2))


if __name__ == "__main__":
    main()
