# mypy: disable-error-code="no-untyped-call"
"""Recurrent deep Q-learning against torch.nn.GRU and a plain implementation: one sequence at a time, gradients by autograd."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configs.algorithms import ChainSettings, HeadSettings, R2d2Settings, TargetSettings
from learners.heads import ValueHead
from learners.networks import Mlp
from learners.policy import STATE, Lanes, acting_policy
from learners.r2d2 import ETA, RecurrentDqn
from learners.recurrent import Gru, Trunk
from replay.buffers import buffers
from replay.schema import Field, SchemaError, StepSchema, Window, WindowBatch

DIM, CHOICES, UNITS, HIDDEN = 4, 3, 6, (7, 8)
SCHEMA = StepSchema(
    {"observation": Field("observation", "float32", (DIM,))},
    Field("action", "int64", choices=CHOICES),
    [Field(STATE, "float32", (UNITS,))],
)
HL_GAUSS = HeadSettings(kind="hl_gauss", bins=11, low=-3.0, high=3.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def algorithm(**more: Any) -> R2d2Settings:
    made = {"hidden": HIDDEN, "recurrent": UNITS, "burn_in": 3, "sequence": 5, "lr": 1e-3, "shift_every": 4} | more
    return R2d2Settings.model_validate(made)


def n_step(length: int) -> TargetSettings:
    return TargetSettings(kind="n_step", length=length)


def recurrent_dqn(
    chosen: R2d2Settings, *, batch_size: int, schema: StepSchema = SCHEMA, **options: Any
) -> RecurrentDqn:
    given: dict[str, Any] = {"seed": 0, "device": "cpu", "products": "torch"} | options
    return RecurrentDqn(schema, chosen, batch_size=batch_size, **given)


def updated(learner: RecurrentDqn, batch: WindowBatch, weights: np.ndarray | None = None) -> Tensor | None:
    return learner.update(learner.stage(batch, weights))  # type: ignore[arg-type]


def windows(steps: np.ndarray, length: np.ndarray, burn_in: np.ndarray, start: int) -> WindowBatch:
    """As a reader delivers them: columns before the first real step and behind the last row repeat these."""
    count, rows = steps.shape
    first, last = (start - burn_in)[:, None], (start + length)[:, None]
    column = np.clip(np.arange(rows), first, last)
    zeros = np.zeros(count, np.int32)
    return WindowBatch(
        steps[np.arange(count)[:, None], column],
        length.astype(np.int32),
        zeros.astype(np.int64),
        zeros,
        np.ones(count),
        burn_in=burn_in.astype(np.int32) if start else None,
        start=start,
    )


def random_windows(generator: np.random.Generator, chosen: R2d2Settings, *, batch: int) -> WindowBatch:
    start, most = chosen.burn_in, chosen.sequence
    steps = np.zeros((batch, start + most + 1), SCHEMA.dtype)
    for name in ("observation", "reward", STATE):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    steps["action"] = generator.integers(CHOICES, size=steps["action"].shape)
    length = generator.integers(1, most + 1, batch)
    steps["is_terminal"][np.arange(batch), start + length] = generator.random(batch) < 0.4
    return windows(steps, length, generator.integers(0, start + 1, batch), start)


# --------------------------------------------------------------------------------------------- the recurrent layer


def torch_gru(gru: Gru, flat: Tensor) -> nn.GRU:
    layer = gru.views(flat)
    made = nn.GRU(gru.inputs, gru.units, dtype=flat.dtype)
    mine = (layer.weight_input.T, layer.weight_state.T, layer.bias_input, layer.bias_state)
    made.load_state_dict(dict(zip(made.state_dict(), mine, strict=True)))
    return made


@given(
    steps=st.integers(1, 5),
    cut=st.integers(0, 2),
    batch=st.integers(1, 4),
    inputs=st.integers(1, 4),
    units=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_states_and_gradients_are_those_of_torch(steps: int, cut: int, batch: int, inputs: int, units: int) -> None:
    cut = min(cut, steps - 1)  # last steps whose states are in no loss
    generator = torch.Generator().manual_seed(7)
    gru = Gru(inputs, units)
    flat = gru.initial(generator).double() * 2.0
    x = torch.randn(steps, batch, inputs, generator=generator, dtype=torch.float64).requires_grad_()
    state = torch.randn(batch, units, generator=generator, dtype=torch.float64)
    of_states = torch.randn(steps - cut, batch, units, generator=generator, dtype=torch.float64)
    reference = torch_gru(gru, flat)
    expected, _ = reference(x, state.unsqueeze(0))
    (expected[: steps - cut] * of_states).sum().backward()

    with torch.no_grad():
        made = gru(gru.views(flat), x, state)
        into = gru.views(torch.full_like(flat, torch.nan))
        of_x = made.gradient(of_states, into)

    torch.testing.assert_close(made.states, expected.detach())
    assert x.grad is not None
    torch.testing.assert_close(of_x, x.grad[: steps - cut])
    torch.testing.assert_close(into.weight_input.T, reference.weight_ih_l0.grad)
    torch.testing.assert_close(into.weight_state.T, reference.weight_hh_l0.grad)
    torch.testing.assert_close(into.bias_input, reference.bias_ih_l0.grad)
    torch.testing.assert_close(into.bias_state, reference.bias_hh_l0.grad)


def test_warming_up_passes_over_what_is_not_real() -> None:
    generator = torch.Generator().manual_seed(0)
    gru = Gru(3, 4)
    flat = gru.initial(generator)
    x, state = torch.randn(3, 2, 3, generator=generator), torch.randn(2, 4, generator=generator)
    is_real = torch.tensor([[False, False], [False, True], [False, True]]).unsqueeze(-1)

    warmed = gru.warmed(gru.views(flat), x, state, is_real)

    with torch.no_grad():
        _, expected = torch_gru(gru, flat)(x[1:, 1:], state[None, 1:])
    assert torch.equal(warmed[0], state[0])
    torch.testing.assert_close(warmed[1], expected[0, 0])


def test_initial_parameters_are_within_the_bounds_of_torch() -> None:
    flat = Gru(50, 16).initial(torch.Generator().manual_seed(0))
    assert float(flat.abs().max()) == pytest.approx(1 / 4, rel=1e-2)
    assert float(flat.mean().abs()) < 0.01


# ----------------------------------------------------------------------------------- a plain learner, by autograd


class Network(nn.Module):
    """An embedding, a recurrent cell, and heads that say the values, as torch modules."""

    def __init__(self, learner: RecurrentDqn, chosen: R2d2Settings, trunk: Tensor, heads: Tensor) -> None:
        super().__init__()
        self.dueling = chosen.dueling
        self.outputs = learner._head.outputs
        embed = Mlp(1, DIM, (), HIDDEN[0], False)
        shape = Trunk(embed, Gru(HIDDEN[0], UNITS))
        views = shape.views(trunk)
        self.embed = self.linear(views.embed[0].weight[0], views.embed[0].bias[0, 0])
        self.cell = nn.GRUCell(HIDDEN[0], UNITS, dtype=trunk.dtype)
        layer = torch_gru(shape.gru, trunk[embed.size :])
        self.cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        outputs = (CHOICES + chosen.dueling) * self.outputs
        mlp = Mlp(chosen.chain.length, UNITS, HIDDEN[1:], outputs)
        self.heads = nn.ModuleList(
            nn.Sequential(
                self.linear(hidden.weight[k], hidden.bias[k, 0]),
                nn.ReLU(),
                self.linear(last.weight[k], last.bias[k, 0]),
            )
            for k in range(chosen.chain.length)
            for hidden, last in [mlp.views(heads)]
        )

    @staticmethod
    def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
        made = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
        with torch.no_grad():
            made.weight.copy_(weight.T)
            made.bias.copy_(bias)
        return made

    def step(self, observation: Tensor, state: Tensor) -> Tensor:
        after: Tensor = self.cell(torch.relu(self.embed(observation[None])), state[None])[0]
        return after

    def logits(self, k: int, state: Tensor) -> Tensor:
        """(choices, m)"""
        values = self.heads[k](state).view(-1, self.outputs)
        if self.dueling:
            values = values[0] + values[1:] - values[1:].mean(0)
        found: Tensor = values
        return found

    def unroll(self, rows: np.ndarray, burn_in: int) -> list[Tensor]:
        """States after each of `rows` (rows,) behind the first `burn_in`."""
        observations = torch.from_numpy(rows["observation"].astype(np.float64))
        state = torch.from_numpy(rows[STATE][0].astype(np.float64))
        with torch.no_grad():
            for observation in observations[:burn_in]:
                state = self.step(observation, state)
        states = []
        for observation in observations[burn_in:]:
            state = self.step(observation, state)
            states.append(state)
        return states


class PlainR2d2:
    def __init__(self, learner: RecurrentDqn, chosen: R2d2Settings) -> None:
        state = learner.state()
        self.chosen = chosen
        self.head: ValueHead = learner._head
        self.online = Network(learner, chosen, state["trunk.value"], state["critic.online.value"])
        self.targets = [deepcopy(self.online) for _ in range(chosen.chain.length)]  # target k is its trunk and head k
        self.adam = torch.optim.AdamW(self.online.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay)
        self.updates = 0

    def update(self, batch: WindowBatch, weights: np.ndarray | None) -> list[float]:
        """One update; returns new priorities."""
        chosen, start, loss, priorities = self.chosen, self.chosen.burn_in, torch.zeros(()), []
        for b, length in enumerate(batch.length.tolist()):
            burn_in = 0 if batch.burn_in is None else int(batch.burn_in[b])
            rows = batch.steps[b, start - burn_in : start + length + 1]
            states = self.online.unroll(rows, burn_in)
            rows = rows[burn_in:]
            errors = torch.zeros(chosen.chain.length, length)
            for k in range(chosen.chain.length):
                with torch.no_grad():
                    target_states = self.targets[k].unroll(
                        batch.steps[b, start - burn_in : start + length + 1], burn_in
                    )
                for t in range(length):
                    count = min(chosen.target.length, length - t)
                    reward = sum(chosen.discount**i * float(rows["reward"][t + i]) for i in range(count))
                    discount = 0.0 if rows["is_terminal"][t + count] else chosen.discount**count
                    with torch.no_grad():
                        valued = self.targets[k].logits(k, target_states[t + count])
                        chooser = self.online.logits(k, states[t + count]) if chosen.double else valued
                        bootstrap = valued[self.head.mean(chooser).argmax()]
                        gained, kept = torch.tensor([[reward], [discount]], dtype=torch.float64)
                        label = self.head.label(bootstrap[None], gained, kept, 0.0)
                    logits = self.online.logits(k, states[t])[rows["action"][t]]
                    if self.head.support is None:
                        each = 0.5 * (logits[0] - label.target[0]).square()
                    else:
                        each = -(label.target[0] * torch.log_softmax(logits, -1)).sum()
                    loss = loss + each * (1.0 if weights is None else float(weights[b]))
                    errors[k, t] = (label.value[0] - self.head.mean(logits)).detach()
            each_step = errors.abs().mean(0)
            priorities.append(float(ETA * each_step.max() + (1 - ETA) * each_step.mean()))
        self.adam.zero_grad()
        (loss / (len(batch) * chosen.sequence)).backward()
        self.adam.step()
        self.updates += 1
        chain = chosen.chain.length
        if chain > 1 and self.updates % chosen.chain.copy_every == 0:
            for k in range(1, chain):
                self.targets[k] = deepcopy(self.online)
                self.targets[k].heads[k] = deepcopy(self.online.heads[k - 1])
        if self.updates % chosen.shift_every == 0:
            self.targets = [deepcopy(self.online) for _ in range(chain)]
            for k in range(chain - 1):
                self.online.heads[k].load_state_dict(self.online.heads[k + 1].state_dict())
        return priorities


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no burn-in, no double": {"burn_in": 0, "double": False},
    "dueling n_step": {"dueling": True, "target": n_step(3)},
    "hl_gauss": {"head": HL_GAUSS, "target": n_step(2)},
    "chain": {"chain": ChainSettings(length=3, copy_every=2), "weight_decay": 1e-2},
    "chain hl_gauss dueling": {"chain": ChainSettings(length=2, copy_every=3), "head": HL_GAUSS, "dueling": True},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_follows_a_plain_implementation(case: dict[str, Any], weighted: bool) -> None:
    chosen, size, generator = algorithm(**case), 6, np.random.default_rng(3)
    learner = recurrent_dqn(chosen, batch_size=size, dtype=torch.float64)
    plain = PlainR2d2(learner, chosen)
    for _ in range(6):
        batch = random_windows(generator, chosen, batch=size)
        weights = generator.uniform(0.1, 1.0, size).astype(np.float32) if weighted else None
        expected = plain.update(batch, weights)
        found = updated(learner, batch, weights)
        assert (found is not None) == weighted
        if found is not None:
            assert found.tolist() == pytest.approx(expected, rel=1e-6)
    state = learner.state()
    names = [(plain.online, "trunk.value", "critic.online.value")]
    names += [(target, f"trunk.target.{min(k, 1)}", "critic.target.value") for k, target in enumerate(plain.targets)]
    for i, (network, trunk, heads) in enumerate(names):
        mine = Network(learner, chosen, state[trunk], state[heads])
        skipped = "heads." if i else "never"
        for name, expected_value in network.state_dict().items():
            if not name.startswith(skipped) or name.startswith(f"heads.{i - 1}."):
                torch.testing.assert_close(mine.state_dict()[name], expected_value, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------------------------------------ what it depends on


def learnt(learner: RecurrentDqn, batch: WindowBatch) -> dict[str, Tensor]:
    """State after one update of a fresh copy."""
    fresh = recurrent_dqn(learner._r2d2, batch_size=len(batch))
    fresh.update(batch)
    return fresh.state()


@pytest.mark.parametrize("burn_in", [0, 3])
def test_begins_with_the_stored_state_of_the_first_real_step_alone(burn_in: int) -> None:
    chosen = algorithm(burn_in=burn_in)
    learner = recurrent_dqn(chosen, batch_size=6)
    batch = random_windows(np.random.default_rng(0), chosen, batch=6)
    before = learnt(learner, batch)["trunk.value"]
    real = np.zeros(6, int) if batch.burn_in is None else batch.burn_in
    column = np.arange(batch.steps.shape[1])
    later = deepcopy(batch)
    later.steps[STATE][column > (burn_in - real)[:, None]] = 5.0
    assert torch.equal(learnt(learner, later)["trunk.value"], before)
    first = deepcopy(batch)
    first.steps[STATE][column <= (burn_in - real)[:, None]] += 0.5
    assert not torch.allclose(learnt(learner, first)["trunk.value"], before, atol=1e-5)


def test_does_not_look_behind_the_end_of_an_episode() -> None:
    chosen = algorithm(target=n_step(3))
    batch = random_windows(np.random.default_rng(0), chosen, batch=6)
    learner = recurrent_dqn(chosen, batch_size=6)
    before = learnt(learner, batch)
    behind = np.arange(batch.steps.shape[1]) > (batch.start + batch.length)[:, None]
    assert behind.any()
    changed = deepcopy(batch)
    for name, void in (("observation", 3.0), ("reward", 100.0), ("action", 1), ("is_terminal", True)):
        changed.steps[name][behind] = void
    # The reward in the last row belongs to no step of the window.
    changed.steps["reward"][np.arange(6), batch.start + batch.length] = 100.0
    for name, value in learnt(learner, changed).items():
        assert torch.equal(value, before[name]), name


def test_refuses_windows_of_another_shape() -> None:
    chosen = algorithm()
    learner = recurrent_dqn(chosen, batch_size=6)
    generator = np.random.default_rng(0)
    with pytest.raises(SchemaError, match=r"expected windows of shape \(6, 9\)"):
        learner.stage(random_windows(generator, algorithm(sequence=6), batch=6))
    with pytest.raises(SchemaError, match="from column 2 on"):
        learner.stage(random_windows(generator, algorithm(burn_in=2, sequence=6), batch=6))
    with pytest.raises(SchemaError, match="state of 9 numbers"):
        recurrent_dqn(algorithm(recurrent=9), batch_size=6).stage(random_windows(generator, chosen, batch=6))


@pytest.mark.parametrize("name", ["plain", "chain"])
def test_goes_on_exactly_from_a_saved_state(name: str) -> None:
    chosen, generator = algorithm(**CASES[name]), np.random.default_rng(0)
    first, second = recurrent_dqn(chosen, batch_size=4), recurrent_dqn(chosen, batch_size=4, seed=1)
    for i in range(9):
        if i == 3:
            second.load_state(first.state())
        batch = random_windows(generator, chosen, batch=4)
        first.update(batch)
        if i >= 3:
            second.update(batch)
    state = second.state()
    for key, expected in first.state().items():
        assert torch.equal(state[key], expected), key


@pytest.mark.parametrize("case", ["plain", "chain hl_gauss dueling"])
@pytest.mark.parametrize("normalised", [False, True], ids=["", "normalised"])
def test_actors_remember_and_value_as_the_learner_does(case: str, normalised: bool) -> None:
    chosen = algorithm(**CASES[case], normalise_observations=normalised)
    learner = recurrent_dqn(chosen, batch_size=4)
    learner.update(random_windows(np.random.default_rng(0), chosen, batch=4))
    policy = acting_policy(SCHEMA, chosen)
    policy.load(learner.policy_bytes())
    generator = np.random.default_rng(2)
    lanes = Lanes(np.zeros(16, np.float32), np.zeros((16, UNITS), np.float32))
    state = lanes.state.copy()
    for _ in range(4):
        observation = {"observation": generator.standard_normal((16, DIM)).astype(np.float32)}
        values, state = learner.values(observation, state)
        action = policy.act(observation, lanes, deterministic=True, generator=generator)
        np.testing.assert_array_equal(action[:, 0], values.mean(0).argmax(-1))
        np.testing.assert_allclose(lanes.state, state, atol=1e-5)


@pytest.mark.parametrize("side", [40, 64], ids=["in the rows", "beside the rows"])
def test_sees_frames_as_actors_do(side: int) -> None:
    schema = StepSchema(
        {
            "observation/camera": Field("observation/camera", "uint8", (side, side)),
            "observation/joints": Field("observation/joints", "float32", (2,)),
        },
        Field("action", "int64", choices=CHOICES),
        [Field(STATE, "float32", (UNITS,))],
    )
    chosen = algorithm(burn_in=1, sequence=2, hidden=(8, 8))
    generator = np.random.default_rng(0)
    batch = buffers(schema, Window(length=2, burn_in=1), 4)
    frames = generator.integers(0, 256, (4, 4, side, side), np.uint8)
    if "observation/camera" in batch.frames:
        batch.frames["observation/camera"][:, :, 0] = frames
    else:
        batch.steps["observation/camera"] = frames
    batch.steps["observation/joints"] = generator.standard_normal((4, 4, 2))
    batch.steps[STATE] = generator.uniform(-1, 1, (4, 4, UNITS))
    batch.length[:], batch.burn_in = 2, np.ones(4, np.int32)
    learner = recurrent_dqn(chosen, batch_size=4, schema=schema)
    policy = acting_policy(schema, chosen)
    policy.load(learner.policy_bytes())
    staged = learner.stage(batch)[0]
    rows = [
        {"observation/camera": frames[:, i, None] if side == 64 else frames[:, i], "observation/joints": joints}
        for i, joints in enumerate(np.moveaxis(batch.steps["observation/joints"], 1, 0))
    ]

    lanes = Lanes(np.zeros(4, np.float32), batch.steps[STATE][:, 0].copy())
    with torch.no_grad():
        states = learner._unrolled(learner._views, staged.observation, staged).states
    for i, row in enumerate(rows):
        policy.act(row, lanes, deterministic=True, generator=generator)
        if i >= 1:
            np.testing.assert_allclose(lanes.state, states[i - 1].numpy(), atol=1e-5)
    before = learner.state()["trunk.value"]
    learner.update(batch)
    encoder = sum(p.numel() for name, p in learner._trunk.named(before).items() if name.startswith("embed.encoder"))
    assert encoder > 0
    assert (learner.state()["trunk.value"][:encoder] != before[:encoder]).float().mean() > 0.5


def test_batches_of_one_call_are_the_windows_in_order() -> None:
    chosen = algorithm(target=n_step(2))
    whole = random_windows(np.random.default_rng(0), chosen, batch=8)
    weights = np.linspace(0.1, 1.0, 8, dtype=np.float32)
    first, second = recurrent_dqn(chosen, batch_size=4, updates_per_call=2).stage(whole, weights)
    both = recurrent_dqn(chosen, batch_size=8).stage(whole, weights)[0]
    for name in ("action", "reward", "discount", "mask"):
        parts = [getattr(part, name).view(5, 4) for part in (first, second)]
        assert torch.equal(torch.cat(parts, 1), getattr(both, name).view(5, 8)), name
    assert torch.equal(torch.cat((first.state, second.state)), both.state)
    assert first.weight is not None
    assert second.weight is not None
    assert both.weight is not None
    assert torch.equal(torch.cat((first.weight, second.weight)), both.weight)
    assert torch.equal(torch.cat((first.observation, second.observation), 1), both.observation)


# ------------------------------------------------------------------------------------------------------- it learns

MAZE = StepSchema(
    {"observation": Field("observation", "float32", (2,))},
    Field("action", "int64", choices=2),
    [Field(STATE, "float32", (UNITS,))],
)
CUE, BLANK = np.array([[1, 0], [-1, 0]], np.float32), np.array([0, 1], np.float32)


def maze_windows(burn_in: int) -> WindowBatch:
    """A cue, then a blank junction where action 0 or 1 must be that of the cue: every episode, from its first and second step."""
    steps = np.zeros((8, 2, burn_in + 3), MAZE.dtype)
    length, real = np.zeros((8, 2), int), np.zeros((8, 2), int)
    for episode, (cue, idle, action) in enumerate(np.ndindex(2, 2, 2)):
        for item in range(min(2, burn_in + 1)):
            first = burn_in - item
            rows = steps[episode, item, first : first + 3]
            rows["observation"][:] = [CUE[cue], BLANK, 0 * BLANK]
            rows["action"][:2], rows["reward"][1], rows["is_terminal"][2] = [idle, action], float(action == cue), True
            length[episode, item], real[episode, item] = 2 - item, item
    kept = min(2, burn_in + 1)
    flat = lambda values: values[:, :kept].reshape(8 * kept, *values.shape[2:])  # noqa: E731
    return windows(flat(steps), flat(length), flat(real), burn_in)


@pytest.mark.parametrize("burn_in", [0, 1])
@pytest.mark.parametrize("chain", [1, 2])
def test_learns_to_remember_a_cue(burn_in: int, chain: int) -> None:
    chosen = R2d2Settings(
        discount=0.5,
        hidden=(16, 16),
        recurrent=UNITS,
        burn_in=burn_in,
        sequence=2,
        lr=1e-2,
        shift_every=20,
        chain=ChainSettings(length=chain, copy_every=5),
    )
    sampled = maze_windows(burn_in)
    learner = recurrent_dqn(chosen, batch_size=len(sampled), schema=MAZE)
    for _ in range(300):
        updated(learner, sampled)

    values, state = learner.values({"observation": CUE}, np.zeros((2, UNITS), np.float32))
    np.testing.assert_allclose(values, 0.5, atol=0.05)
    values, _ = learner.values({"observation": np.stack([BLANK, BLANK])}, state)
    np.testing.assert_allclose(values, np.broadcast_to(np.eye(2), (chain, 2, 2)), atol=0.05)
