# mypy: disable-error-code="no-untyped-call"
"""Heads, targets, chains and ensembles as `Sac` and `Flow` compose them, against plain networks under autograd, float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.algorithms import ChainSettings, FlowSettings, HeadSettings, SacSettings, TargetSettings
from learners.flow import Flow
from learners.heads import ValueHead
from learners.networks import Mlp, Network
from learners.sac import Sac
from learners.staging import Batch
from learners.trained import Trained
from replay.schema import Field, StepSchema, WindowBatch

OBSERVATION_DIM, ACTION_DIM, BATCH = 4, 2, 16
SCHEMA = StepSchema(
    {"observation": Field("observation", "float32", (OBSERVATION_DIM,))}, Field("action", "float32", (ACTION_DIM,))
)
HEADS = ("mse", "two_hot", "hl_gauss", "c51")
TARGETS = {
    "one_step": (TargetSettings(), 1),
    "n_step": (TargetSettings(kind="n_step", length=3), 1),
    "chunk": (TargetSettings(kind="chunk", length=3), 3),
    "decoupled": (TargetSettings(kind="decoupled", length=3, distill_expectile=0.7), 2),
    "annealed": (TargetSettings(expectile=0.9, expectile_updates=4), 1),
}
HIDDEN = (16, 12)
RATE = 3e-3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def windows(generator: np.random.Generator, length: int) -> WindowBatch:
    """Random windows: some cut short by a terminal state, some by a time limit."""
    steps = np.zeros((BATCH, length + 1), SCHEMA.dtype)
    for name in ("observation", "action", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    lengths = generator.integers(1, length + 1, BATCH).astype(np.int32)
    steps["is_terminal"][np.arange(BATCH), lengths] = generator.random(BATCH) < 0.5
    zeros = np.zeros(BATCH, np.int32)
    return WindowBatch(steps, lengths, zeros.astype(np.int64), zeros, np.ones(BATCH))


class Plain:
    """One network of a group as torch modules, with an Adam of its own."""

    def __init__(self, mlp: Mlp, flat: Tensor, member: int, *, weight_decay: float = 0.0) -> None:
        modules: list[nn.Module] = []
        for layer in mlp.views(flat):
            _, inputs, outputs = layer.weight.shape
            linear = nn.Linear(inputs, outputs, dtype=flat.dtype)
            with torch.no_grad():
                linear.weight.copy_(layer.weight[member].T)
                linear.bias.copy_(layer.bias[member, 0])
            modules.append(linear)
            if layer.scale is not None and layer.shift is not None:
                norm = nn.LayerNorm(layer.weight.shape[2], dtype=flat.dtype)
                with torch.no_grad():
                    norm.weight.copy_(layer.scale[member, 0])
                    norm.bias.copy_(layer.shift[member, 0])
                modules.append(norm)
            modules.append(nn.ReLU())
        self.module = nn.Sequential(*modules[:-1])
        kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
        self.adam = kind(self.module.parameters(), lr=RATE, weight_decay=weight_decay)

    def __call__(self, *x: Tensor) -> Tensor:
        found: Tensor = self.module(torch.cat(x, -1))
        return found

    def copy(self, other: Plain, share: float = 1.0) -> None:
        with torch.no_grad():
            for own, theirs in zip(self.module.parameters(), other.module.parameters(), strict=True):
                own.lerp_(theirs, share)

    def descend(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def plain_group(network: Network, flat: Tensor, **options: float) -> list[Plain]:
    assert isinstance(network, Mlp)
    return [Plain(network, flat, n, **options) for n in range(network.networks)]


def loss_of(head: ValueHead, logits: Tensor, label: Tensor) -> Tensor:
    """The head's loss as a formula for autograd, (batch,)."""
    if head.outputs == 1:
        return 0.5 * (logits.squeeze(-1) - label).square()
    return -(label * torch.log_softmax(logits, -1)).sum(-1)


def asymmetry(error: Tensor, expectile: float) -> Tensor:
    return 2.0 * torch.where(error < 0, 1.0 - expectile, expectile)


@dataclass
class Reference:
    """The critics of an algorithm, network by network: chain k, member e is network k·E + e."""

    head: ValueHead
    chain: int
    online: list[Plain]
    targets: list[Plain]
    chunk: list[Plain] | None

    @property
    def ensemble(self) -> int:
        return len(self.online) // self.chain

    def members(self, networks: list[Plain], k: int) -> list[Plain]:
        return networks[k * self.ensemble : (k + 1) * self.ensemble]

    def least(self, networks: list[Plain], *x: Tensor, chosen: list[int] | None = None) -> Tensor:
        """Outputs (batch, outputs) of the member with the smallest value."""
        outputs = torch.stack([networks[i](*x) for i in (chosen if chosen is not None else range(len(networks)))])
        values = self.head.mean(outputs)
        return outputs[values.argmin(0), torch.arange(outputs.shape[1])]

    def learn(self, batch: Batch, labels: list[Any], *, acted: int, expectile: float, distill: float) -> list[Tensor]:
        """A step of every network towards the label of its function; the absolute errors of each."""
        now, weight = batch.observation[: len(batch.action)], batch.weight
        scale = torch.ones(len(batch.action), dtype=now.dtype) if weight is None else weight
        errors = []
        for n, network in enumerate(self.chunk or self.online):
            target, value = labels[n // self.ensemble]
            logits = network(now, batch.action)
            error = (value - self.head.mean(logits)).detach()
            errors.append(error.abs())
            chunk_logits = logits.detach()
            network.descend((loss_of(self.head, logits, target) * asymmetry(error, expectile) * scale).mean())
            if self.chunk is None:
                continue
            one = torch.ones((), dtype=now.dtype)
            label = self.head.label(chunk_logits, 0.0 * one, one, 0.0)
            logits = self.online[n](now, batch.action[:, :acted])
            error = (label.value - self.head.mean(logits)).detach()
            self.online[n].descend(
                (loss_of(self.head, logits, label.target) * asymmetry(error, distill) * scale).mean()
            )
        return errors

    def follow(self, share: float, *, copied: bool) -> None:
        for e in range(self.ensemble):
            self.targets[e].copy(self.online[e], share)
        if copied:
            for n in range(self.ensemble, len(self.online)):
                self.targets[n].copy(self.online[n - self.ensemble])


def reference_of(critic: Any, chunk_critic: Any, *, weight_decay: float) -> Reference:
    network = critic.online.network
    online = plain_group(network, critic.online.value, weight_decay=weight_decay)
    chunk = None
    if chunk_critic is not None:
        chunk = plain_group(chunk_critic.online.network, chunk_critic.online.value, weight_decay=weight_decay)
    return Reference(critic.head, critic.chain, online, plain_group(network, critic.target), chunk)


def difference(group: Trained | Any, networks: list[Plain], flat: Tensor | None = None) -> float:
    assert isinstance(group.network, Mlp)
    theirs = [Plain(group.network, group.value if flat is None else flat, n) for n in range(len(networks))]
    pairs = zip(theirs, networks, strict=True)
    return max(
        (a - b).abs().max().item()
        for mine, plain in pairs
        for a, b in zip(mine.module.parameters(), plain.module.parameters(), strict=True)
    )


def expectile_at(settings: TargetSettings, update: int) -> float:
    return 0.5 + (settings.expectile - 0.5) * max(0.0, 1.0 - update / settings.expectile_updates)


def settings_of(head: str, target: str, **more: Any) -> dict[str, Any]:
    wanted, chunk = TARGETS[target]
    return {
        "head": HeadSettings(kind=head, bins=21, low=-4.0, high=4.0),  # type: ignore[arg-type]
        "target": wanted,
        "chunk": chunk,
        "hidden": HIDDEN,
        "critic_lr": RATE,
        "policy_lr": RATE,
        "polyak": 0.1,
        "discount": 0.9,
        **more,
    }


CHAINS = ((1, "mean"), (3, "mean"), (3, "one"))
CASES = [
    *((head, target, chain, False) for head, target, chain in itertools.product(HEADS, TARGETS, CHAINS)),
    ("mse", "one_step", CHAINS[0], True),
    ("c51", "chunk", CHAINS[1], True),
]


@pytest.mark.parametrize(
    ("head", "target", "functions", "layer_norm"),
    CASES,
    ids=[f"{head}-{target}-K{k}-{of}{'-norm' * norm}" for head, target, (k, of), norm in CASES],
)
def test_sac_is_its_plain_networks(
    head: str, target: str, functions: tuple[int, Literal["mean", "one"]], layer_norm: bool
) -> None:
    chain, policy_value = functions
    more: dict[str, Any] = {"ensemble": 3, "subset": 2} if chain == 3 else {}
    settings = SacSettings(
        **settings_of(head, target, layer_norm=layer_norm, weight_decay=0.01 * layer_norm, **more),
        chain=ChainSettings(length=chain, copy_every=2, policy_value=policy_value),
        temperature_lr=RATE,
    )
    learner = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0, dtype=torch.float64)
    plain = reference_of(learner._critic, learner._chunk_critic, weight_decay=settings.weight_decay)
    actor = Plain(learner._actor.network, learner._actor.value, 0)  # type: ignore[arg-type]
    log_temperature = learner._log_temperature.clone().requires_grad_()
    temperature_adam = torch.optim.Adam([log_temperature], lr=RATE)
    acted = settings.chunk * ACTION_DIM
    generator, noise = np.random.default_rng(1), torch.Generator().manual_seed(0)

    def act(observation: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = actor(observation).chunk(2, -1)
        log_std = -5.0 + 3.5 * (torch.tanh(raw) + 1.0)
        u = mean + log_std.exp() * normal
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
        return torch.tanh(u), (log_prob - 2.0 * (math.log(2.0) - u - nn.functional.softplus(-2.0 * u))).sum(-1)

    for update in range(4):
        (batch,) = learner.stage(
            windows(generator, settings.target.length), generator.random(BATCH) if update % 2 else None
        )
        errors = learner.update([batch])

        normal = torch.randn((2 * BATCH, acted), generator=noise, dtype=torch.float64)
        chosen = torch.randperm(3, generator=noise)[:2].tolist() if settings.subset else None
        one = int(torch.randint(chain, (1,), generator=noise)) if policy_value == "one" else None
        now, after = batch.observation[:BATCH], batch.observation[BATCH:]
        temperature = log_temperature.exp().detach()
        with torch.no_grad():
            next_action, next_log_prob = act(after, normal[BATCH:])
            labels = []
            for k in range(chain):
                logits = plain.least(plain.members(plain.targets, k), after, next_action, chosen=chosen)
                labels.append(plain.head.label(logits, batch.reward, batch.discount, -temperature * next_log_prob))
        expected = plain.learn(
            batch,
            labels,
            acted=acted,
            expectile=expectile_at(settings.target, update),
            distill=settings.target.distill_expectile,
        )
        action, log_prob = act(now, normal[:BATCH])
        climbed = range(chain) if one is None else [one]
        values = [
            plain.head.mean(torch.stack([q(now, action) for q in plain.members(plain.online, k)])).amin(0)
            for k in climbed
        ]
        actor.descend((temperature * log_prob - torch.stack(values).mean(0)).mean())
        temperature_adam.zero_grad()
        (-log_temperature * (log_prob.detach() - acted)).mean().backward()
        temperature_adam.step()
        plain.follow(settings.polyak, copied=(update + 1) % 2 == 0)
        if batch.weight is not None:
            assert errors is not None
            wanted = torch.stack(expected).mean(0) * (batch.weight > 0)
            torch.testing.assert_close(errors, wanted, rtol=0, atol=1e-7)

    assert difference(learner._critic.online, plain.online) < 1e-7
    assert difference(learner._critic.online, plain.targets, learner._critic.target) < 1e-7
    assert difference(learner._actor, [actor]) < 1e-7
    if plain.chunk is not None:
        assert learner._chunk_critic is not None
        assert difference(learner._chunk_critic.online, plain.chunk) < 1e-7
    torch.testing.assert_close(learner._log_temperature, log_temperature.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("value_loss", "aggregate"), [("quantile", "min"), ("expectile", "mean")])
def test_flow_is_its_plain_networks(
    head: str, target: str, value_loss: Literal["quantile", "expectile"], aggregate: Literal["min", "mean"]
) -> None:
    settings = FlowSettings(
        **settings_of(head, target), value_loss=value_loss, aggregate=aggregate, value_expectile=0.8
    )
    learner = Flow(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0, dtype=torch.float64)
    plain = reference_of(learner._critic, learner._chunk_critic, weight_decay=0.0)
    velocity = Plain(learner._velocity.network, learner._velocity.value, 0)  # type: ignore[arg-type]
    value = Plain(learner._value.online.network, learner._value.online.value, 0)  # type: ignore[arg-type]
    acted = settings.chunk * ACTION_DIM
    generator, noise = np.random.default_rng(1), torch.Generator().manual_seed(0)
    one = torch.ones((), dtype=torch.float64)
    for update in range(3):
        (batch,) = learner.stage(windows(generator, settings.target.length))
        learner.update([batch])

        start = torch.randn((BATCH, acted), generator=noise, dtype=torch.float64)
        time = torch.rand((BATCH, 1), generator=noise, dtype=torch.float64)
        now, after = batch.observation[:BATCH], batch.observation[BATCH:]
        action = batch.action[:, :acted]
        weight = torch.ones(BATCH, dtype=torch.float64) if batch.weight is None else batch.weight
        logits = value(now)
        with torch.no_grad():
            outputs = torch.stack([q(now, action) for q in plain.targets])
            if aggregate == "min":
                replayed = plain.least(plain.targets, now, action)
            else:
                replayed = torch.log(torch.softmax(outputs, -1).mean(0)) if plain.head.outputs > 1 else outputs.mean(0)
            implicit = plain.head.label(replayed, 0.0 * one, one, 0.0)
            label = plain.head.label(value(after), batch.reward, batch.discount, 0.0)
            above = implicit.value - plain.head.mean(logits)
        if value_loss == "expectile":
            loss = loss_of(plain.head, logits, implicit.target) * asymmetry(above, 0.8)
        else:
            loss = torch.where(above < 0, -0.2, 0.8) * (implicit.value - plain.head.mean(logits))
        plain.learn(
            batch,
            [label],
            acted=acted,
            expectile=expectile_at(settings.target, update),
            distill=settings.target.distill_expectile,
        )
        value.descend((loss * weight).mean())
        point = (1.0 - time) * start + time * action
        off = velocity(now, point, time) - (action - start)
        velocity.descend((off * (weight > 0).unsqueeze(-1)).square().mean())
        plain.follow(settings.polyak, copied=False)

    assert difference(learner._critic.online, plain.online) < 1e-7
    assert difference(learner._critic.online, plain.targets, learner._critic.target) < 1e-7
    assert difference(learner._value.online, [value]) < 1e-7
    assert difference(learner._velocity, [velocity]) < 1e-7


def test_a_chain_of_one_and_chunks_of_one_are_soft_actor_critic_bit_for_bit() -> None:
    plain = SacSettings(hidden=HIDDEN, polyak=0.1)
    variants = {
        "decoupled with chunks of one": SacSettings(
            hidden=HIDDEN, polyak=0.1, target=TargetSettings(kind="decoupled", length=1)
        ),
        "chunks of one": SacSettings(hidden=HIDDEN, polyak=0.1, target=TargetSettings(kind="chunk", length=1)),
        "a chain of one": SacSettings(hidden=HIDDEN, polyak=0.1, chain=ChainSettings(length=1, copy_every=1)),
        "an expectile of a half": SacSettings(
            hidden=HIDDEN, polyak=0.1, target=TargetSettings(expectile=0.5, expectile_updates=1)
        ),
    }
    states = {}
    for name, settings in {"plain": plain, **variants}.items():
        learner = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0)
        generator = np.random.default_rng(1)
        for _ in range(10):
            learner.update(windows(generator, 1))
        states[name] = learner.state()
    for name in variants:
        assert states[name].keys() == states["plain"].keys()
        differing = [key for key, tensor in states["plain"].items() if not torch.equal(tensor, states[name][key])]
        assert not differing, name


def test_updates_of_one_call_are_those_of_many() -> None:
    settings = SacSettings(**settings_of("hl_gauss", "n_step"))
    generator = np.random.default_rng(3)
    batches = [windows(generator, 3) for _ in range(4)]
    steps, length = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("steps", "length"))
    zeros = np.zeros(len(length), np.int32)
    together = WindowBatch(steps, length, zeros.astype(np.int64), zeros, np.ones(len(length)))
    single = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0)
    for batch in batches:
        single.update(batch)
    several = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0, updates_per_call=4)
    several.update(together)
    assert several.updates == 4
    one, other = single.state(), several.state()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_products_in_bfloat16_leave_parameters_and_targets_in_float32() -> None:
    settings = SacSettings(**settings_of("mse", "one_step", hidden=(64, 64)))
    exact = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0)
    rough = Sac(SCHEMA, settings, batch_size=BATCH, device="cpu", seed=0, precision="bfloat16")
    start = exact.state()
    generator = np.random.default_rng(3)
    for _ in range(20):
        batch = windows(generator, 1)
        exact.update(batch)
        rough.update(batch)
    for name, tensor in rough.state().items():
        assert tensor.dtype != torch.bfloat16
        if name.endswith("value") and tensor.numel() > 1:
            moved = (exact.state()[name] - start[name]).norm()
            assert (tensor - exact.state()[name]).norm() < 0.25 * moved, name
            assert not torch.equal(tensor, exact.state()[name])
