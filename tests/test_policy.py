"""Acting policies in numpy equal plain torch networks with the same weights; exploration has the shares it should."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from configs.algorithms import (
    AlgorithmSettings,
    ChainSettings,
    DqnSettings,
    FlowSettings,
    HeadSettings,
    R2d2Settings,
    SacSettings,
    TargetSettings,
)
from learners.encoders import make_network
from learners.networks import Network
from learners.policy import Lanes, acting_policy, row_schema
from replay.schema import Field, SchemaError, StepSchema

ROOT = Path(__file__).parents[1]
WIDTH = 5  # of the observation vector: a position of 2 and a picture of 3 bytes
OBSERVATION = {
    "observation/position": Field("observation/position", "float32", (2,)),
    "observation/bytes": Field("observation/bytes", "uint8", (3,)),
}
CONTINUOUS = StepSchema(OBSERVATION, Field("action", "float32", (2,)))
DISCRETE = StepSchema(OBSERVATION, Field("action", "int64", choices=3))
KINDS = ("mse", "two_hot", "hl_gauss", "c51")
LOW, HIGH = -4.0, 9.0


def observations(count: int, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Fields, and the vector (count, WIDTH) that networks see."""
    generator = np.random.default_rng(seed)
    position = generator.normal(size=(count, 2)).astype(np.float32)
    pixels = generator.integers(256, size=(count, 3)).astype(np.uint8)
    vector = np.concatenate((position, pixels / 255.0), axis=1)
    return {"observation/position": position, "observation/bytes": pixels}, torch.tensor(vector)


def group(
    name: str,
    inputs: int,
    hidden: tuple[int, ...],
    outputs: int,
    *,
    networks: int = 1,
    layer_norm: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random weights of a group."""
    generator = torch.Generator().manual_seed(seed)
    widths = (inputs, *hidden, outputs)
    tensors = {}
    for i, (before, after) in enumerate(pairwise(widths)):
        scale = 1.5 / math.sqrt(before)
        tensors[f"{name}.{i}.weight"] = scale * torch.randn(networks, before, after, generator=generator)
        tensors[f"{name}.{i}.bias"] = 0.3 * torch.randn(networks, 1, after, generator=generator)
        if layer_norm and i < len(hidden):
            tensors[f"{name}.{i}.scale"] = 1.0 + 0.3 * torch.randn(networks, 1, after, generator=generator)
            tensors[f"{name}.{i}.shift"] = 0.3 * torch.randn(networks, 1, after, generator=generator)
    return tensors


def forward(tensors: Mapping[str, Tensor], name: str, x: Tensor, network: int = 0) -> Tensor:
    """Outputs of one network of a group at `x` (batch, inputs), in float64 and by torch's own functions."""
    layers = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in tensors)
    for i in range(layers):

        def part(kind: str, i: int = i) -> Tensor:
            return tensors[f"{name}.{i}.{kind}"][network].double()

        x = functional.linear(x.double(), part("weight").T, part("bias")[0])
        if f"{name}.{i}.scale" in tensors:
            x = functional.layer_norm(x, x.shape[-1:], part("scale")[0], part("shift")[0])
        if i + 1 < layers:
            x = functional.relu(x)
    return x


def value(kind: str, logits: Tensor) -> Tensor:
    """Values (…) of a head's outputs (…, bins)."""
    if kind == "mse":
        return logits.squeeze(-1)
    return logits.softmax(-1) @ torch.linspace(LOW, HIGH, logits.shape[-1], dtype=torch.float64)


def support(kind: str) -> dict[str, Tensor]:
    return {} if kind == "mse" else {"support": torch.tensor([LOW, HIGH])}


def target(chunk: int) -> TargetSettings:
    return TargetSettings(kind="chunk", length=chunk) if chunk > 1 else TargetSettings()


# ------------------------------------------------------------------------------------------------ continuous actions


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("normalise", [False, True])
def test_squashed_gaussian(chunk: int, normalise: bool) -> None:
    settings = SacSettings(hidden=(32, 24), chunk=chunk, target=target(chunk))
    tensors = group("policy", WIDTH, (32, 24), 4 * chunk)
    fields, x = observations(7)
    if normalise:
        mean, scale = torch.linspace(-1, 1, WIDTH), torch.tensor([1e3, 0.5, 2.0, 1.0, 3.0])
        tensors |= {"normaliser.mean": mean, "normaliser.scale": scale}
        x = ((x - mean) * scale).clamp(-10, 10)
        assert x.abs().max() == 10
    policy = acting_policy(CONTINUOUS, settings)
    with pytest.raises(RuntimeError, match="no weights"):
        policy.act(fields, deterministic=True, generator=np.random.default_rng(0))
    policy.load(save(tensors))
    assert (policy.chunk, policy.state_size) == (chunk, 0)
    center, raw = forward(tensors, "policy", x).chunk(2, -1)
    log_std = -5 + 0.5 * (2 - -5) * (raw.tanh() + 1)

    still = policy.act(fields, deterministic=True, generator=np.random.default_rng(9))
    noisy = policy.act(fields, deterministic=False, generator=np.random.default_rng(9))
    noise = torch.tensor(np.random.default_rng(9).standard_normal(center.shape, np.float32))
    assert still.shape == noisy.shape == (7, chunk, 2)
    assert still.dtype == noisy.dtype == np.float32
    np.testing.assert_allclose(still, center.tanh().view(7, chunk, 2), atol=1e-5)
    np.testing.assert_allclose(noisy, (center + log_std.exp() * noise).tanh().view(7, chunk, 2), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregate", ["min", "mean"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_best_of_n(kind: Any, aggregate: Any, layer_norm: bool) -> None:
    """Each lane's chunk is the proposal that a plain loop finds best."""
    chunk, proposals, steps, count = 2, 6, 4, 5
    settings = FlowSettings(
        hidden=(24, 16),
        chunk=chunk,
        target=target(chunk),
        proposals=proposals,
        flow_steps=steps,
        ensemble=3,
        aggregate=aggregate,
        layer_norm=layer_norm,
        head=HeadSettings(kind=kind, bins=11),
    )
    bins = 1 if kind == "mse" else 11
    tensors = group("velocity", WIDTH + 2 * chunk + 1, (24, 16), 2 * chunk)
    tensors |= group("critics", WIDTH + 2 * chunk, (24, 16), bins, networks=3, layer_norm=layer_norm, seed=1)
    policy = acting_policy(CONTINUOUS, settings)
    policy.load(save(tensors | support(kind)))
    fields, vectors = observations(count)
    chosen = policy.act(fields, deterministic=True, generator=np.random.default_rng(3))

    noise = np.random.default_rng(3).standard_normal((count * proposals, 2 * chunk), np.float32)
    places, clipped = [], 0
    for lane in range(count):
        found = []
        for n in range(proposals):
            x = torch.tensor(noise[lane * proposals + n], dtype=torch.float64)[None]
            for step in range(steps):
                tau = torch.full((1, 1), step / steps)
                x = x + forward(tensors, "velocity", torch.cat((vectors[lane : lane + 1], x, tau), -1)) / steps
            clipped += int((x.abs() > 1).any())
            x = x.clamp(-1, 1)
            seen = torch.cat((vectors[lane : lane + 1], x), -1)
            values = torch.cat([value(kind, forward(tensors, "critics", seen, e)) for e in range(3)])
            found.append((float(values.min() if aggregate == "min" else values.mean()), x))
        best = max(range(proposals), key=lambda n: found[n][0])
        places.append(best)
        np.testing.assert_allclose(chosen[lane].reshape(-1), found[best][1][0], atol=1e-5)
    assert len(set(places)) > 1
    assert clipped


# --------------------------------------------------------------------------------------------------- discrete actions


def reference_values(settings: DqnSettings, tensors: Mapping[str, Tensor], x: Tensor, sequences: int) -> Tensor:
    """Values (K, batch, sequences) of every function of the chain."""
    found = []
    for k in range(settings.chain.length):
        logits = forward(tensors, "critics", x, k).view(len(x), sequences + settings.dueling, -1)
        if settings.dueling:
            state, advantage = logits[:, :1], logits[:, 1:]
            logits = state + advantage - advantage.mean(1, keepdim=True)
        found.append(value(settings.head.kind, logits))
    return torch.stack(found)


def digits(sequence: int, chunk: int) -> list[int]:
    """The actions of a sequence of three choices each."""
    return [sequence // 3 ** (chunk - 1 - i) % 3 for i in range(chunk)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize(("chunk", "chain"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_greedy(kind: Any, dueling: bool, chunk: int, chain: int) -> None:
    """Deterministic decisions climb the chain's mean; others one function's value, the same for all lanes of a call."""
    settings = DqnSettings(
        hidden=(32,),
        chunk=chunk,
        target=target(chunk),
        chain=ChainSettings(length=chain),
        dueling=dueling,
        layer_norm=dueling,
        epsilon=0.0,
        head=HeadSettings(kind=kind, bins=13),
    )
    sequences = 3**chunk
    outputs = (sequences + dueling) * (1 if kind == "mse" else 13)
    tensors = group("critics", WIDTH, (32,), outputs, networks=chain, layer_norm=dueling, seed=4)
    tensors["critics.1.bias"].zero_()  # or one action is the best everywhere
    policy = acting_policy(DISCRETE, settings)
    policy.load(save(tensors | support(kind)))
    fields, x = observations(40)
    values = reference_values(settings, tensors, x, sequences)
    greedy = values.argmax(-1).tolist()  # (K, batch)
    generator = np.random.default_rng(0)
    still = policy.act(fields, deterministic=True, generator=generator)
    assert still.dtype == np.int64
    assert still.tolist() == [digits(s, chunk) for s in values.mean(0).argmax(-1).tolist()]
    assert len({tuple(row) for row in still.tolist()}) > 1

    expected = [[digits(s, chunk) for s in row] for row in greedy]
    counts = np.zeros(chain)
    for _ in range(400):
        actions = policy.act(fields, deterministic=False, generator=generator).tolist()
        counts[expected.index(actions)] += 1
    # 400 draws: a function of a uniform K ≤ 4 is drawn within 5 deviations of its share (a false alarm in 10^6).
    assert abs(counts - 400 / chain).max() <= 5 * math.sqrt(400 / chain)


def test_ladder_of_exploration() -> None:
    """ε_i = ε^(1 + 7 i / (N − 1)), and that share of decisions is random; a deterministic one never is.

    20 000 decisions a lane: a share off by 0.02 or more is found with probability above 0.999 (σ ≤ 0.0035), a right one is
    refused once in 10^5 runs.
    """
    settings = DqnSettings(hidden=(4,), epsilon=0.4, epsilon_ladder=7.0)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in group("critics", WIDTH, (4,), 3).items()}
    tensors["critics.1.bias"][0, 0, 1] = 1.0  # action 1 is best
    policy = acting_policy(DISCRETE, settings)
    policy.load(save(tensors))
    count, lanes = 20_000, 5
    fields = {name: np.repeat(values[:1], count, 0) for name, values in observations(1)[0].items()}
    generator = np.random.default_rng(1)
    for lane in range(lanes):
        epsilon = 0.4 ** (1 + 7 * lane / (lanes - 1))
        rank = np.full(count, lane / (lanes - 1), np.float32)
        memory = Lanes(rank, np.zeros((count, 0), np.float32))
        actions = policy.act(fields, memory, deterministic=False, generator=generator)[:, 0]
        for action, share in ((0, epsilon / 3), (1, 1 - 2 * epsilon / 3), (2, epsilon / 3)):
            assert abs((actions == action).mean() - share) < 4.6 * math.sqrt(share * (1 - share) / count) + 1e-4
        assert (policy.act(fields, memory, deterministic=True, generator=generator) == 1).all()
    # One lane alone has ε itself.
    actions = policy.act(fields, deterministic=False, generator=generator)[:, 0]
    assert abs((actions != 1).mean() - 0.4 * 2 / 3) < 0.016


def test_exploration_draws_whole_sequences() -> None:
    settings = DqnSettings(hidden=(4,), chunk=2, target=target(2), epsilon=1.0, epsilon_ladder=0.0)
    policy = acting_policy(DISCRETE, settings)
    policy.load(save(group("critics", WIDTH, (4,), 9)))
    fields, _ = observations(9000)
    actions = policy.act(fields, deterministic=False, generator=np.random.default_rng(0))
    counts = np.bincount(actions @ [3, 1], minlength=9)
    assert counts.shape == (9,)
    assert abs(counts - 1000).max() < 5 * math.sqrt(1000)


@pytest.mark.parametrize("hidden", [(16,), (16, 12)])
def test_recurrent_states_and_actions_equal_torchs_gru(hidden: tuple[int, ...]) -> None:
    units, count, steps = 10, 4, 12
    settings = R2d2Settings(hidden=hidden, recurrent=units, dueling=True, epsilon=0.0)
    gru = torch.nn.GRU(hidden[0], units, batch_first=True)
    generator = torch.Generator().manual_seed(5)
    for parameter in gru.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    tensors = group("embed", WIDTH, (), hidden[0]) | group("critics", units, hidden[1:], 4, seed=2)
    weights = {name: parameter.detach() for name, parameter in gru.named_parameters()}
    tensors |= {
        "recurrent.weight_input": weights["weight_ih_l0"].T.contiguous(),
        "recurrent.weight_state": weights["weight_hh_l0"].T.contiguous(),
        "recurrent.bias_input": weights["bias_ih_l0"].clone(),
        "recurrent.bias_state": weights["bias_hh_l0"].clone(),
    }
    policy = acting_policy(DISCRETE, settings)
    policy.load(save(tensors))
    assert policy.state_size == units
    seen = [observations(count, seed) for seed in range(steps)]
    embedded = torch.stack([forward(tensors, "embed", x).relu() for _, x in seen], 1)
    with torch.no_grad():
        states, _ = gru.double()(embedded)
    lanes = Lanes(np.zeros(count, np.float32), np.zeros((count, units), np.float32))
    taken = set()
    for t, (fields, _) in enumerate(seen):
        actions = policy.act(fields, lanes, deterministic=True, generator=np.random.default_rng(0))
        np.testing.assert_allclose(lanes.state, states[:, t], atol=2e-5)
        best = reference_values(settings, tensors, states[:, t], 3)[0].argmax(-1)
        assert actions[:, 0].tolist() == best.tolist()
        taken |= set(best.tolist())
    assert len(taken) > 1


# ---------------------------------------------------------------------------------------------------------------- frames


def encoded(
    settings: AlgorithmSettings, inputs: int, outputs: int, networks: int, shape: tuple[int, int, int]
) -> tuple[Network, Tensor]:
    network = make_network(
        settings, networks=networks, inputs=inputs, outputs=outputs, vector_size=2, frame_shape=shape
    )
    return network, network.initial(torch.Generator().manual_seed(3))


@pytest.mark.parametrize("encoder", ["nature", "impala"])
@pytest.mark.parametrize("last", [False, True])
def test_policies_that_see_frames_equal_the_learners_networks(encoder: str, last: bool) -> None:
    """Stacked frames through the encoder, the vector beside it; colours last or first; K = 2 networks with encoders of their own."""
    field = Field("observation/frame", "uint8", (44, 40, 2) if last else (2, 44, 40))
    position = OBSERVATION["observation/position"]
    schema = StepSchema({position.name: position, field.name: field}, CONTINUOUS.action)
    assert not schema.large
    generator = np.random.default_rng(0)
    frames = generator.integers(256, size=(6, *field.shape)).astype(np.uint8)
    fields: dict[str, Any] = {position.name: generator.normal(size=(6, 2)).astype("f4"), field.name: frames}
    seen = torch.tensor(np.moveaxis(frames, 3, 1) if last else frames)
    vector = torch.tensor(fields[position.name])

    settings = SacSettings(hidden=(16,), encoder=encoder)
    network, flat = encoded(settings, 2, 4, 1, (2, 44, 40))
    policy = acting_policy(schema, settings)
    policy.load(save(network.named("policy", flat)))
    action = policy.act(fields, deterministic=True, generator=generator)
    expected = network(network.views(flat), vector, seen).output[0, :, :2].tanh()
    np.testing.assert_allclose(action[:, 0], expected.detach(), atol=1e-5)
    assert np.ptp(action, axis=0).max() > 1e-3

    discrete = DqnSettings(hidden=(16,), encoder=encoder, chain=ChainSettings(length=2), epsilon=0.0)
    network, flat = encoded(discrete, 2, 3, 2, (2, 44, 40))
    greedy = acting_policy(StepSchema({position.name: position, field.name: field}, DISCRETE.action), discrete)
    greedy.load(save(network.named("critics", flat)))
    values = network(network.views(flat), vector, seen).output
    chosen = greedy.act(fields, deterministic=True, generator=generator)[:, 0].tolist()
    assert chosen == values.mean(0).argmax(-1).tolist()
    by_function = [row.tolist() for row in values.argmax(-1)]
    for _ in range(20):
        assert greedy.act(fields, deterministic=False, generator=generator)[:, 0].tolist() in by_function


@pytest.mark.parametrize("encoder", ["auto", "none"])
def test_vectors_alone_need_no_torch(encoder: str) -> None:
    """An actor process of a task without frames never imports it."""
    code = (
        "import sys; import actors.rollout; from configs.algorithms import SacSettings; from replay.schema import *\n"
        "from learners.policy import acting_policy\n"
        "schema = StepSchema({'observation': Field('observation', 'float32', (3,))}, Field('action', 'float32', (1,)))\n"
        f"acting_policy(schema, SacSettings(encoder={encoder!r})); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------- what is refused


def test_weights_that_do_not_fit_leave_the_old_ones() -> None:
    policy = acting_policy(CONTINUOUS, SacSettings(hidden=(8,)))
    good = group("policy", WIDTH, (8,), 4)
    policy.load(save(good))
    fields, _ = observations(3)
    before = policy.act(fields, deterministic=True, generator=np.random.default_rng(0))
    layer = good["policy.1.bias"]
    for wrong, message in (
        (save(group("policy", WIDTH, (9,), 4)), "actor and learner must have the same"),
        (save(group("policy", WIDTH, (8, 8), 4)), "actor and learner must have the same"),
        (save(group("critics", WIDTH, (8,), 4)), r"policy\.0\.weight \(1, 5, 8\)"),
        (save(good | group("critics", WIDTH, (8,), 4, seed=1)), "nothing like"),
        (save({name: t for name, t in good.items() if name != "policy.1.bias"}), r"policy\.1\.bias"),
        (save(good | {"policy.1.bias": layer.double()}), "float64"),
        (b"not weights", "safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.load(wrong)
    after = policy.act(fields, deterministic=True, generator=np.random.default_rng(0))
    np.testing.assert_array_equal(before, after)
    with pytest.raises(SchemaError, match="'observation/position'"):
        policy.act({"pixels": np.ones((1, 2))}, deterministic=True, generator=np.random.default_rng(0))


def test_weights_of_another_head_are_refused() -> None:
    policy = acting_policy(DISCRETE, DqnSettings(hidden=(8,), head=HeadSettings(kind="two_hot", bins=11)))
    policy.load(save(group("critics", WIDTH, (8,), 3 * 21) | support("two_hot")))  # a support may have grown
    for outputs, with_support in ((3, True), (3 * 11, False), (3 * 11 + 1, True)):
        tensors = group("critics", WIDTH, (8,), outputs) | (support("two_hot") if with_support else {})
        with pytest.raises(ValueError, match=r"algorithm\.head"):
            policy.load(save(tensors))


@pytest.mark.parametrize("settings", [SacSettings(), FlowSettings()])
def test_continuous_policies_need_continuous_actions(settings: AlgorithmSettings) -> None:
    with pytest.raises(ValueError, match="needs continuous actions"):
        acting_policy(DISCRETE, settings)


@pytest.mark.parametrize("settings", [DqnSettings(), R2d2Settings()])
def test_discrete_policies_need_discrete_actions(settings: AlgorithmSettings) -> None:
    with pytest.raises(ValueError, match="needs discrete actions"):
        acting_policy(CONTINUOUS, settings)


def test_stacked_frames_without_an_encoder_are_columns() -> None:
    frame = Field("observation", "uint8", (64, 64))
    schema = StepSchema({"observation": frame}, DISCRETE.action)
    settings = DqnSettings(hidden=(8,), encoder="none", epsilon=0.0)
    policy = acting_policy(schema, settings, stack=2)
    tensors = group("critics", 2 * 64 * 64, (8,), 3)
    policy.load(save(tensors))
    frames = np.random.default_rng(0).integers(256, size=(9, 2, 64, 64)).astype(np.uint8)
    actions = policy.act({"observation": frames}, deterministic=True, generator=np.random.default_rng(0))
    x = torch.tensor(frames.reshape(9, -1) / 255.0)
    assert actions[:, 0].tolist() == forward(tensors, "critics", x).argmax(-1).tolist()


# ------------------------------------------------------------------------------------------------------------ the rows


@given(units=st.integers(1, 600), dtype=st.sampled_from(["float32", "uint8", "float64"]), width=st.integers(1, 70))
def test_rows_of_a_recurrent_policy_hold_its_state(units: int, dtype: str, width: int) -> None:
    """The schema with the state reads back from its text, keeps every field apart, and aligned."""
    schema = StepSchema({"observation": Field("observation", dtype, (width,))}, DISCRETE.action)
    rows = row_schema(schema, acting_policy(schema, R2d2Settings(recurrent=units, encoder="none")))
    assert rows.fields == (*schema.fields, Field("state", "float32", (units,)))
    assert StepSchema.from_json(rows.to_json()) == rows
    assert StepSchema.from_json(rows.to_json()).extra == rows.extra
    held = rows.zeros(2)
    held["state"] = np.inf
    assert all((held[f.name] == 0).all() for f in schema.fields)
    assert held.dtype.itemsize % 8 == 0
    assert "state" in (rows.rest.names or ())
    assert row_schema(schema, acting_policy(schema, DqnSettings(encoder="none"))) == schema


def test_extra_fields_must_have_names_of_their_own() -> None:
    for name in ("reward", "observation/more", "action"):
        with pytest.raises(SchemaError, match="different names"):
            CONTINUOUS.with_extra(Field(name, "float32"))
