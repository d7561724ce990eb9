"""The language-model benchmark: what it counts is right, and a sample lost by a swap of weights would be seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from actors.llm.engine import Engine, Request, Sample, make_engine
from learners.llm.models import weights_bytes
from learners.llm.rows import SCHEMA
from tests.benchmarks import llm, llm_sampling
from tests.benchmarks.llm_sampling import CASES, END, LENGTHS, Case

SMALL = replace(CASES[0], slots=32, batches=2, learner_groups=1)


@pytest.fixture(scope="module")
def network() -> Any:
    return SMALL.network("cpu", samples=True)


@pytest.fixture(scope="module")
def requests(network: Any) -> list[Request]:
    return llm_sampling.requests_of(SMALL, network.config.vocab_size)


@pytest.fixture(scope="module")
def weights(network: Any) -> list[bytes]:
    other = SMALL.network("cpu", samples=True)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    return [weights_bytes(network), weights_bytes(other)]


def test_both_ways_are_asked_for_as_many_tokens(network: Any, requests: list[Request]) -> None:
    """Without an end of sequence each completion has exactly its own most tokens, whoever samples them."""
    asked = [replace(request, max_tokens=1 + number % 5) for number, request in enumerate(requests[:48])]
    wanted = sum(request.max_tokens or 0 for request in asked)
    found = [run(network, asked, 32) for run in (llm_sampling.by_engine, llm_sampling.by_generate)]
    # One of the vocabulary's 98 tokens ends a completion: few end before their fifth.
    assert all(0.9 * wanted < tokens <= wanted for tokens in found)


def test_requests_are_of_mixed_lengths_and_the_same_each_time(requests: list[Request]) -> None:
    again = llm_sampling.requests_of(SMALL, 98)
    assert [(r.group, r.index, r.seed, r.max_tokens) for r in again] == [
        (r.group, r.index, r.seed, r.max_tokens) for r in requests
    ]
    most = [request.max_tokens or 0 for request in requests]
    assert min(most) >= LENGTHS[0]
    assert max(most) <= LENGTHS[1]
    assert len(set(most)) > 20


def test_learner_batches_are_what_was_sampled_and_their_padding_is_counted(
    network: Any, requests: list[Request]
) -> None:
    samples = llm_sampling.samples_of(network, requests, SMALL.slots)
    batches = llm.batches_of(SMALL, samples)
    assert [batch.num_rows for batch in batches] == [SMALL.group_size] * (len(requests) // SMALL.group_size)
    assert all(batch.schema.equals(SCHEMA) for batch in batches)
    first = [sample for sample in samples if sample.request.group == 0]
    response = sum(len(sample.tokens) for sample in first)
    inputs = [len(sample.request.prompt) + len(sample.tokens) - 1 for sample in first]
    # So few are one micro-batch, as wide as its longest.
    assert llm.tokens_of(batches[0]) == (response, sum(inputs), len(first) * max(inputs))


def test_no_sample_is_lost_by_swaps(network: Any, requests: list[Request], weights: list[bytes]) -> None:
    found = llm_sampling.samples_lost(SMALL, network, requests, weights)
    assert found["samples_lost"] == 0
    assert found["samples_submitted"] == len(llm_sampling.SETTINGS) * len(requests)
    assert found["samples_swapped"] > SMALL.slots
    assert found["swaps"] > 2 * llm_sampling.SWAPS


class Faulty:
    """An engine that spoils one of its samples."""

    def __init__(self, inner: Engine, kind: str) -> None:
        self._inner, self._kind = inner, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self) -> Sequence[Sample]:
        found = self._inner.step()
        if not found or self._kind == "none":
            return found
        kind, self._kind = self._kind, "none"
        one = found[0]
        changed = {
            "missing": [],
            "repeated": [one, one],
            "older": [replace(one, versions=np.maximum(one.versions - 1, -1))],
            "newer": [replace(one, versions=one.versions + 1)],
            "cut": [replace(one, versions=one.versions[1:])],
            "falling": [replace(one, versions=np.append(one.versions[:-1] + 100, one.versions[-1]))],
        }
        return changed[kind] + found[1:]


@pytest.mark.parametrize("kind", ["none", "missing", "repeated", "older", "newer", "cut", "falling"])
def test_a_lost_or_spoilt_sample_is_counted(
    kind: str, network: Any, requests: list[Request], weights: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_sampling, "SETTINGS", ({},))
    monkeypatch.setattr(llm_sampling, "make_engine", lambda *a, **k: Faulty(make_engine(*a, **k), kind))
    case = replace(SMALL, slots=16)
    found = llm_sampling.samples_lost(case, network, requests, weights)
    assert found["samples_lost"] == (kind != "none")


def test_weights_are_taken_between_two_steps_while_all_slots_run(
    network: Any, requests: list[Request], weights: list[bytes]
) -> None:
    found = llm_sampling.sync_times(SMALL, network, requests, lambda: weights[1], lambda: None)
    assert found["weight_sync_s"] == pytest.approx(found["pack_s"] + found["load_s"], rel=0.9)
    assert 0 < found["load_s"] < 10
    assert found["weight_mb"] == pytest.approx(len(weights[1]) / 1e6)
    assert found["running_at_swap"] >= SMALL.slots * 0.8
    assert weights_bytes(network) == weights[1]
    network.load_state_dict(SMALL.network("cpu", samples=True).state_dict())


def test_a_line_says_what_was_measured_and_is_kept_under_the_machines_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llm, "RESULTS", tmp_path)
    monkeypatch.setattr(llm, "SHORT", 6)
    monkeypatch.setattr(llm, "_in_child", lambda name, options, device, threads: small_line(device, threads))
    assert llm.main(["--only", "embedded", "--json", "--save", "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    about, measured, *judged = lines
    names = ("sampled_tokens_per_s", "generate_tokens_per_s", "ratio", "actor_tokens_per_s", "learner_tokens_per_s")
    for name in (*names, "weight_sync_s", "memory_mb"):
        assert measured[name] > 0, name
    assert measured["samples_lost"] == 0
    assert measured["ratio"] == pytest.approx(measured["sampled_tokens_per_s"] / measured["generate_tokens_per_s"])
    assert measured["learner_tokens_per_s"] < measured["learner_processed_tokens_per_s"]
    assert measured["learner_processed_tokens_per_s"] <= measured["learner_padded_tokens_per_s"]
    assert [goal["wanted"] for goal in judged] == [f"≥ {llm.RATIO}", "0"]
    (saved,) = tmp_path.iterdir()
    assert saved.name == f"llm-{about['machine']}.jsonl"
    assert [json.loads(line) for line in saved.read_text().splitlines()] == lines


def small_line(device: str, threads: int) -> dict[str, Any]:
    found = llm.measure(SMALL, device=device, threads=threads, rounds=1, seconds=0.1)
    return dict(json.loads(json.dumps(found)))


def test_goals_are_judged_and_a_case_that_failed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"case": "a", "device": "cpu", "threads": 1, "ratio": 1.4, "samples_lost": 1}
    assert [goal["met"] for goal in llm.judge([line, {"case": "b", "skipped": "no"}])] == [False, False]
    assert [goal["met"] for goal in llm.judge([{**line, "ratio": 1.5, "samples_lost": 0}])] == [True, True]
    assert [goal["goal"][:12] for goal in llm.judge([{**line, "threads": 2}])] == ["samples lost"]
    llm.print_table([line, {"case": "b", "threads": 1, "skipped": "[no] model"}], llm.judge([line]))
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a, 1 threads", "b, 1 threads: [no] model", "1.4 ✗"))
    with pytest.raises(SystemExit):
        llm.main(["--only", "huge"])
    assert "embedded, 30M" in capsys.readouterr().err


def test_cases_are_models_of_the_sizes_they_name(network: Any) -> None:
    def parameters(case: Case) -> int:
        return sum(p.numel() for p in case.network("meta", samples=True).parameters())

    assert sum(p.numel() for p in network.parameters()) == pytest.approx(0.1e6, rel=0.1)
    assert [parameters(case) / 1e6 for case in CASES[1:]] == pytest.approx([30, 494], rel=0.05)
    assert network.config.eos_token_id == END
