# mypy: disable-error-code="no-untyped-call"
"""Deep Q-learning against hand-computed targets and a plain implementation: lists of networks, gradients by autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.algorithms import ChainSettings, DqnSettings, HeadSettings, TargetSettings
from learners.dqn import ActionValues, Dqn, taken
from learners.heads import ValueHead, make_head
from learners.networks import Mlp
from learners.policy import acting_policy
from learners.staging import Batch
from replay.schema import Field, StepSchema, WindowBatch

DIM, CHOICES, HIDDEN = 5, 3, (16, 8)
SCHEMA = StepSchema({"observation": Field("observation", "float32", (DIM,))}, Field("action", "int64", choices=CHOICES))
HL_GAUSS = HeadSettings(kind="hl_gauss", bins=11, low=-3.0, high=3.0)
C51 = HeadSettings(kind="c51", bins=11, low=-3.0, high=3.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def windows(steps: np.ndarray, length: list[int] | np.ndarray) -> WindowBatch:
    count = len(steps)
    zeros = np.zeros(count, np.int32)
    return WindowBatch(steps, np.asarray(length, np.int32), zeros.astype(np.int64), zeros, np.ones(count))


def random_windows(generator: np.random.Generator, *, batch: int, length: int) -> WindowBatch:
    """Windows of random lengths; a third of them ends in a terminal state, the short ones of the rest in a truncation."""
    steps = np.zeros((batch, length + 1), SCHEMA.dtype)
    for name in ("observation", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    steps["action"] = generator.integers(CHOICES, size=steps["action"].shape)
    lengths = generator.integers(1, length + 1, batch)
    steps["is_terminal"][np.arange(batch), lengths] = generator.random(batch) < 0.3
    return windows(steps, lengths)


def target(kind: str, length: int = 1, **more: Any) -> TargetSettings:
    return TargetSettings.model_validate({"kind": kind, "length": length, **more})


def dqn(algorithm: DqnSettings, *, batch_size: int, seed: int = 0, **options: Any) -> Dqn:
    return Dqn(SCHEMA, algorithm, batch_size=batch_size, seed=seed, device="cpu", products="torch", **options)


# ------------------------------------------------------------------------------------------------- known answers


def constant_values(learner: Dqn, name: str, values: list[list[float]]) -> dict[str, Tensor]:
    """The learner's state with networks `name` whose function k says `values[k]` everywhere."""
    state = learner.state()
    flat = state[name].zero_()
    Mlp(len(values), DIM, HIDDEN, len(values[0])).views(flat)[-1].bias[:, 0] = torch.tensor(values)
    return state


@pytest.mark.parametrize(("double", "next_value"), [(True, 20.0), (False, 30.0)], ids=["double", "plain"])
@pytest.mark.parametrize(("terminal", "length"), [(False, 3), (False, 2), (True, 2)])
def test_target_of_a_three_step_window(double: bool, next_value: float, terminal: bool, length: int) -> None:
    steps = np.zeros((1, 4), SCHEMA.dtype)
    steps["reward"] = [[1, 2, 4, 8]]
    steps["is_terminal"][0, length] = terminal
    learner = dqn(DqnSettings(discount=0.5, target=target("n_step", 3), hidden=HIDDEN, double=double), batch_size=1)
    online = constant_values(
        learner, "critic.online.value", [[0.0, 3.0, 1.0]]
    )  # chooses 1, which the target says is 20
    learner.load_state(
        online
        | {
            "critic.target.value": constant_values(learner, "critic.target.value", [[10.0, 20.0, 30.0]])[
                "critic.target.value"
            ]
        }
    )

    learner.update(windows(steps, [length]))

    reward = {2: 1 + 2 / 2, 3: 1 + 2 / 2 + 4 / 4}[length]
    discount = 0.0 if terminal else 0.5**length
    assert learner.metrics()["q/target"] == pytest.approx(reward + discount * next_value)


def test_every_function_of_a_chain_learns_from_the_target_before_it_and_chooses_for_it() -> None:
    learner = dqn(
        DqnSettings(discount=0.5, hidden=HIDDEN, chain=ChainSettings(length=3)), batch_size=2, dtype=torch.float64
    )
    state = constant_values(learner, "critic.online.value", [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    targets = constant_values(learner, "critic.target.value", [[1, 2, 4], [8, 16, 32], [64, 128, 256]])
    learner.load_state(state | {"critic.target.value": targets["critic.target.value"]})
    batch = learner.stage(windows(np.zeros((2, 2), SCHEMA.dtype), [1, 1]), np.ones(2, np.float32))

    errors = learner.update(batch)

    # Labels 0.5 * (2, 8, 256) of action 0, which the functions say is worth 0, 1 and 0.
    assert errors is not None
    assert errors.tolist() == pytest.approx([(1 + 3 + 128) / 3] * 2)


@given(length=st.integers(1, 4), prefix=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_numbers_of_sequences_begin_with_the_number_of_what_is_acted(length: int, prefix: int, seed: int) -> None:
    prefix = min(prefix, length)
    algorithm = DqnSettings(target=target("decoupled", length), chunk=prefix, hidden=(4,))
    generator = np.random.default_rng(seed)
    steps = np.zeros((8, length + 1), SCHEMA.dtype)
    steps["action"] = generator.integers(CHOICES, size=steps["action"].shape)
    learner = dqn(algorithm, batch_size=8)

    number = learner.stage(windows(steps, [length] * 8))[0].action.numpy()

    digits = steps["action"][:, :length]
    expected = np.array([int("".join(map(str, row)), CHOICES) for row in digits])
    begun = np.array([int("".join(map(str, row)), CHOICES) for row in digits[:, :prefix]])
    np.testing.assert_array_equal(number, expected)
    np.testing.assert_array_equal(number // learner._shared, begun)


# ------------------------------------------------------------------------------------- a plain DQN, by autograd

Parameters = list[Tensor]


class PlainDqn:
    """Iterated and decoupled deep Q-learning as a list of networks, one after the other, whose gradients autograd finds."""

    def __init__(self, algorithm: DqnSettings, state: dict[str, Tensor]) -> None:
        self.algorithm = algorithm
        head = algorithm.head
        dtype = state["critic.online.value"].dtype
        self.head: ValueHead = make_head(
            head, None if head.low is None or head.high is None else (head.low, head.high), dtype=dtype
        )
        length = algorithm.target.length if algorithm.target.kind in ("chunk", "decoupled") else 1
        self.acted, self.all = CHOICES**algorithm.chunk, CHOICES**length
        self.online = self.networks(state["critic.online.value"], self.acted)
        self.target = [[p.detach().clone() for p in n] for n in self.networks(state["critic.target.value"], self.acted)]
        chunk = state.get("chunk_critic.online.value")
        self.chunk = None if chunk is None else self.networks(chunk, self.all)
        self.adams = [
            torch.optim.AdamW(
                [p for n in networks for p in n], lr=algorithm.lr, weight_decay=algorithm.weight_decay, fused=True
            )
            for networks in (self.online, self.chunk or [])
            if networks
        ]
        self.updates = 0

    def networks(self, flat: Tensor, sequences: int) -> list[Parameters]:
        algorithm = self.algorithm
        outputs = (sequences + algorithm.dueling) * self.head.outputs
        chain = algorithm.chain.length
        shape = Mlp(chain, DIM, HIDDEN, outputs, algorithm.layer_norm)
        return [[p[0].clone().requires_grad_() for p in shape.members(flat, slice(k, k + 1))] for k in range(chain)]

    def logits(self, network: Parameters, x: Tensor, sequences: int) -> Tensor:
        """(batch, sequences, m)"""
        parameters = iter(network)
        for i in range(len(HIDDEN) + 1):
            x = self.affine(x, parameters)
            if i < len(HIDDEN):
                if self.algorithm.layer_norm:
                    scale, shift = next(parameters), next(parameters)
                    x = torch.nn.functional.layer_norm(x, x.shape[-1:], scale[0], shift[0])
                x = torch.relu(x)
        values = x.view(len(x), -1, self.head.outputs)
        if self.algorithm.dueling:
            value, advantage = values[:, 0], values[:, 1:]
            values = torch.stack(
                [
                    value + advantage[:, a] - sum(advantage[:, b] for b in range(sequences)) / sequences
                    for a in range(sequences)
                ],
                1,
            )
        return values

    @staticmethod
    def affine(x: Tensor, parameters: Iterator[Tensor]) -> Tensor:
        weight = next(parameters)
        return torch.addmm(next(parameters), x, weight)

    def update(self, batch: Batch, expectile: float) -> Tensor:
        """One update; returns the errors (K, batch)."""
        algorithm, rows = self.algorithm, torch.arange(len(batch.action))
        now, after = batch.observation.chunk(2)
        weight = torch.ones_like(batch.reward) if batch.weight is None else batch.weight
        learners, sequences = (self.online, self.acted) if self.chunk is None else (self.chunk, self.all)
        losses, errors, chunk_logits = [], [], []
        for k in range(algorithm.chain.length):
            with torch.no_grad():
                valued = self.logits(self.target[k], after, self.acted)
                chooser = self.logits(self.online[k], after, self.acted) if algorithm.double else valued
                best = self.head.mean(chooser).argmax(-1)
                label = self.head.label(valued[rows, best], batch.reward, batch.discount, 0.0)
            logits = self.logits(learners[k], now, sequences)[rows, batch.action]
            error = label.value - self.head.mean(logits)
            losses.append(self.loss(logits, label.target, error, expectile, weight))
            errors.append(error.detach())
            chunk_logits.append(logits.detach())
        self.descend(sum(losses), self.adams[-1])
        if self.chunk is not None:
            begun = batch.action // CHOICES ** (algorithm.target.length - algorithm.chunk)
            losses = []
            for k in range(algorithm.chain.length):
                label = self.head.label(chunk_logits[k], torch.zeros(()), torch.ones((), dtype=batch.reward.dtype), 0.0)
                logits = self.logits(self.online[k], now, self.acted)[rows, begun]
                error = label.value - self.head.mean(logits)
                losses.append(self.loss(logits, label.target, error, algorithm.target.distill_expectile, weight))
            self.descend(sum(losses), self.adams[0])
        self.updates += 1
        self.move()
        return torch.stack(errors)

    def loss(self, logits: Tensor, label: Tensor, error: Tensor, expectile: float, weight: Tensor) -> Tensor:
        if self.head.support is None:
            each = 0.5 * (logits.squeeze(-1) - label).square()
        else:
            each = -(label * torch.log_softmax(logits, -1)).sum(-1)
        if expectile != 0.5:
            each = each * 2.0 * (error.detach() < 0).to(each.dtype).sub(expectile).abs()
        return (each * weight).mean()

    @staticmethod
    def descend(loss: Any, adam: torch.optim.Optimizer) -> None:
        adam.zero_grad()
        loss.backward()
        adam.step()

    def move(self) -> None:
        """θ̄_k ← θ_k inside the chain, and its shift: θ̄_k ← θ_{k+1}, then θ_k ← θ_{k+1}."""
        chain, algorithm = self.algorithm.chain.length, self.algorithm
        copied = lambda network: [p.detach().clone() for p in network]  # noqa: E731
        if chain > 1 and self.updates % algorithm.chain.copy_every == 0:
            self.target[1:] = [copied(self.online[k - 1]) for k in range(1, chain)]
        if self.updates % algorithm.shift_every == 0:
            self.target = [copied(network) for network in self.online]
            for networks in (self.online, self.chunk or []):
                for k in range(len(networks) - 1):
                    for parameter, following in zip(networks[k], networks[k + 1], strict=True):
                        parameter.data.copy_(following.data)

    def flat(self, name: str) -> Tensor:
        """The networks as the learner keeps them."""
        networks = {"online": self.online, "target": self.target, "chunk": self.chunk or []}[name]
        return torch.cat([torch.stack([p.detach() for p in same]).flatten() for same in zip(*networks, strict=True)])


def follow(
    algorithm: DqnSettings, *, updates: int, weighted: bool = False, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of what learner and plain implementation have after some updates of the same windows."""
    generator = np.random.default_rng(3)
    batch_size = 32
    learner = dqn(algorithm, batch_size=batch_size, **options)
    plain = PlainDqn(algorithm, learner.state())
    for i in range(updates):
        sampled = random_windows(generator, batch=batch_size, length=algorithm.target.length)
        weights = generator.uniform(0.1, 1.0, batch_size).astype(np.float32) if weighted else None
        batch = learner.stage(sampled, weights)[0]
        share = max(0.0, 1.0 - i / algorithm.target.expectile_updates)
        errors = plain.update(batch, 0.5 + (algorithm.target.expectile - 0.5) * share)
        found = learner.update([batch])
        if found is not None:
            assert batch.weight is not None
            yield found, errors.abs().mean(0) * (batch.weight > 0)
    state = learner.state()
    yield state["critic.online.value"], plain.flat("online")
    yield state["critic.target.value"], plain.flat("target")
    if plain.chunk is not None:
        yield state["chunk_critic.online.value"], plain.flat("chunk")


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_chain_of_one_is_plain_deep_q_learning_bit_for_bit(double: bool, length: int) -> None:
    algorithm = DqnSettings(
        hidden=HIDDEN,
        double=double,
        target=target("one_step" if length == 1 else "n_step", length),
        shift_every=5,
        lr=1e-3,
    )
    for found, expected in follow(algorithm, updates=23):
        assert torch.equal(found, expected)


CASES: dict[str, dict[str, Any]] = {
    "dueling": {"dueling": True},
    "dueling hl_gauss": {"dueling": True, "head": HL_GAUSS},
    "hl_gauss": {"head": HL_GAUSS},
    "c51": {"head": C51, "double": False},
    "layer norm": {"layer_norm": True, "weight_decay": 1e-2},
    "chain": {"chain": ChainSettings(length=3, copy_every=3)},
    "chain n_step": {"chain": ChainSettings(length=3, copy_every=3), "target": target("n_step", 3), "double": False},
    "chain dueling c51": {"chain": ChainSettings(length=3, copy_every=3), "dueling": True, "head": C51},
    "annealed": {"target": target("one_step", expectile=0.9, expectile_updates=10)},
    "chunk": {"target": target("chunk", 2), "chunk": 2},
    "decoupled": {"target": target("decoupled", 3, distill_expectile=0.8), "chunk": 1},
    "decoupled as one": {"target": target("decoupled", 2), "chunk": 2},
    "decoupled to the same": {"target": target("decoupled", 2, distill_expectile=0.7), "chunk": 2},
    "decoupled chain hl_gauss": {
        "target": target("decoupled", 3, expectile=0.7),
        "chunk": 2,
        "chain": ChainSettings(length=3, copy_every=3),
        "head": HL_GAUSS,
    },
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_follows_a_plain_implementation(case: dict[str, Any], weighted: bool) -> None:
    algorithm = DqnSettings(hidden=HIDDEN, shift_every=7, lr=1e-3, **case)
    for found, expected in follow(algorithm, updates=16, weighted=weighted, dtype=torch.float64):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- its parts


@given(
    sequences=st.integers(1, 5),
    bins=st.integers(1, 4),
    dueling=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_gradient_of_the_outputs_is_the_numerical_one(sequences: int, bins: int, dueling: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = ActionValues(sequences, dueling)
    output = torch.randn(2, 3, values.values * bins, generator=generator, dtype=torch.float64)
    number = torch.randint(sequences, (3,), generator=generator)
    of_taken = torch.randn(2, 3, bins, generator=generator, dtype=torch.float64)

    def objective(at: Tensor) -> float:
        return float((taken(values.logits(at), number) * of_taken).sum())

    numerical = torch.zeros_like(output)
    for index in np.ndindex(*output.shape):
        step = torch.zeros_like(output)
        step[index] = 1e-4
        numerical[index] = (objective(output + step) - objective(output - step)) / 2e-4
    torch.testing.assert_close(values.gradient(of_taken, number), numerical, rtol=1e-7, atol=1e-8)


def test_dueling_adds_what_all_sequences_share() -> None:
    output = torch.tensor([[10.0, 20.0, 1.0, 2.0, 3.0, 6.0]])  # v, a_0, a_1 of two outputs each
    assert ActionValues(2, True).logits(output).tolist() == [[[9.0, 18.0], [11.0, 22.0]]]


@pytest.mark.parametrize("chain", [1, 3])
@pytest.mark.parametrize("head", [HeadSettings(), HL_GAUSS], ids=["mse", "hl_gauss"])
@pytest.mark.parametrize("dueling", [False, True], ids=["", "dueling"])
def test_learns_the_values_of_a_corridor(chain: int, head: HeadSettings, dueling: bool) -> None:
    """Three cells; action 2 goes right, the others stay; the last step right earns 1 and ends the episode."""
    algorithm = DqnSettings(
        discount=0.5,
        hidden=(32,),
        lr=1e-2,
        shift_every=20,
        chain=ChainSettings(length=chain, copy_every=5),
        head=head,
        dueling=dueling,
    )
    steps = np.zeros((3 * CHOICES, 2), SCHEMA.dtype)
    for i in range(len(steps)):
        cell, action = divmod(i, CHOICES)
        after = cell + (action == 2)
        steps["observation"][i, 0, cell], steps["observation"][i, 1, after] = 1.0, 1.0
        steps["action"][i, 0], steps["reward"][i, 0], steps["is_terminal"][i, 1] = action, after == 3, after == 3
    learner = dqn(algorithm, batch_size=len(steps))
    batch = learner.stage(windows(steps, [1] * len(steps)))
    for _ in range(500):
        learner.update(batch)

    values = learner.values({"observation": np.eye(DIM, dtype=np.float32)[:3]})

    expected = [[0.125, 0.125, 0.25], [0.25, 0.25, 0.5], [0.5, 0.5, 1.0]]
    np.testing.assert_allclose(values, np.broadcast_to(expected, (chain, 3, CHOICES)), atol=0.01)


@pytest.mark.parametrize("name", ["chain", "decoupled chain hl_gauss"])
def test_goes_on_exactly_from_a_saved_state(name: str) -> None:
    algorithm = DqnSettings(hidden=HIDDEN, shift_every=7, lr=1e-3, **CASES[name])
    generator = np.random.default_rng(0)
    batches = [random_windows(generator, batch=8, length=algorithm.target.length) for _ in range(12)]
    first, second = dqn(algorithm, batch_size=8), dqn(algorithm, batch_size=8, seed=1)
    for i, batch in enumerate(batches):
        if i == 5:
            second.load_state(first.state())
        staged = first.stage(batch)
        first.update(staged)
        if i >= 5:
            second.update(staged)
    state = second.state()
    for key, expected in first.state().items():
        assert torch.equal(state[key], expected), key
    with pytest.raises(ValueError, match="the checkpoint is of another algorithm"):
        dqn(DqnSettings(hidden=(4,)), batch_size=8).load_state(state)


def test_errors_of_several_updates_are_those_of_their_windows() -> None:
    algorithm = DqnSettings(hidden=HIDDEN)
    learner = dqn(algorithm, batch_size=4, updates_per_call=2)
    sampled = random_windows(np.random.default_rng(1), batch=8, length=1)
    before = learner.values({"observation": sampled.steps["observation"][:4, 0]})
    staged = learner.stage(sampled, np.ones(8, np.float32))

    errors = learner.update(staged)

    assert errors is not None
    assert errors.shape == (8,)
    after = learner.update(learner.stage(sampled))  # no weights: nobody asks for priorities
    assert after is None
    values = before[0, np.arange(4), sampled.steps["action"][:4, 0]]
    bootstrap = dqn(algorithm, batch_size=4).values({"observation": sampled.steps["observation"][:4, 1]})[0].max(-1)
    wanted = sampled.steps["reward"][:4, 0] + 0.99 * ~sampled.steps["is_terminal"][:4, 1] * bootstrap
    np.testing.assert_allclose(errors[:4].numpy(), np.abs(wanted - values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["dueling hl_gauss", "chain", "decoupled", "chunk"])
def test_actors_act_greedily_by_the_mean_of_the_chain(case: str) -> None:
    algorithm = DqnSettings(hidden=HIDDEN, **CASES[case])
    learner = dqn(algorithm, batch_size=4)
    policy = acting_policy(SCHEMA, algorithm)
    policy.load(learner.policy_bytes())
    observation = {"observation": np.random.default_rng(2).standard_normal((64, DIM)).astype(np.float32)}

    action = policy.act(observation, deterministic=True, generator=np.random.default_rng(0))

    best = learner.values(observation).mean(0).argmax(-1)
    places = CHOICES ** np.arange(algorithm.chunk - 1, -1, -1)
    np.testing.assert_array_equal(action @ places, best)


def test_learns_from_frames_what_vectors_do_not_tell() -> None:
    schema = StepSchema({"observation": Field("observation", "uint8", (40, 40))}, Field("action", "int64", choices=2))
    steps = np.zeros((4, 2), schema.dtype)
    steps["is_terminal"][:, 1] = True
    for i, (bright, action) in enumerate(np.ndindex(2, 2)):  # the action must be 1 where the frame is bright
        steps["observation"][i, 0] = 255 * bright
        steps["action"][i, 0], steps["reward"][i, 0] = action, bright == action
    algorithm = DqnSettings(hidden=(16,), lr=1e-3, chain=ChainSettings(length=2), target=target("n_step", 1))
    learner = Dqn(schema, algorithm, batch_size=4, seed=0, device="cpu")
    batch = learner.stage(windows(steps, [1] * 4))
    for _ in range(60):
        learner.update(batch)
    values = learner.values({"observation": steps["observation"][[0, 2], 0]})
    np.testing.assert_allclose(values, [np.eye(2)] * 2, atol=0.1)


def test_refuses_continuous_actions_and_too_many_sequences() -> None:
    continuous = StepSchema({"observation": Field("observation", "float32", (2,))}, Field("action", "float32", (1,)))
    with pytest.raises(ValueError, match="needs discrete actions"):
        Dqn(continuous, DqnSettings(), batch_size=2, seed=0, device="cpu")
    with pytest.raises(ValueError, match=r"at most 4096 action sequences, got 3\^8"):
        dqn(DqnSettings(target=target("chunk", 8), chunk=8), batch_size=2)


def test_bfloat16_products_learn_nearly_the_same() -> None:
    algorithm = DqnSettings(hidden=HIDDEN, dueling=True, chain=ChainSettings(length=2), lr=1e-3)
    exact, low = dqn(algorithm, batch_size=32), dqn(algorithm, batch_size=32, precision="bfloat16")
    generator = np.random.default_rng(5)
    for _ in range(10):
        batch = exact.stage(random_windows(generator, batch=32, length=1))
        exact.update(batch)
        low.update(batch)
    assert low.state()["critic.online.value"].dtype == torch.float32
    found = low.metrics()
    for name, value in exact.metrics().items():
        assert found[name] == pytest.approx(value, rel=0.1, abs=0.05)
