# mypy: disable-error-code="no-untyped-call"
"""SAC against hand-computed targets, torch.distributions, and a plain implementation that leaves gradients to autograd."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.algorithms import SacSettings, TargetSettings
from learners.networks import Mlp
from learners.policy import SquashedGaussianPolicy
from learners.sac import Sac, Squashed
from replay.buffers import buffers
from replay.schema import Field, SchemaError, StepSchema, Window, WindowBatch

OBSERVATION_DIM, ACTION_DIM = 5, 3
SCHEMA = StepSchema(
    {"observation": Field("observation", "float32", (OBSERVATION_DIM,))}, Field("action", "float32", (ACTION_DIM,))
)


THREE_STEPS = TargetSettings(kind="n_step", length=3)


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


def random_windows(generator: np.random.Generator, *, batch: int, n_step: int) -> WindowBatch:
    """Windows with random lengths; a third of the short ones terminated, the rest truncated."""
    steps = np.zeros((batch, n_step + 1), SCHEMA.dtype)
    for name in ("observation", "action", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    length = generator.integers(1, n_step + 1, batch)
    steps["is_terminal"][np.arange(batch), length] = generator.random(batch) < 0.3
    return windows(steps, length)


def sac(settings: SacSettings, *, batch_size: int, seed: int = 0) -> Sac:
    return Sac(SCHEMA, settings, batch_size=batch_size, device="cpu", seed=seed)


# ------------------------------------------------------------------------------------------------- known answers

# gamma = 1/2; rewards 1, 2, 4 at the window's steps; the row after the window's last transition has reward 8, which is void.
KNOWN_WINDOWS = {
    "full": (3, False, 1 + 2 / 2 + 4 / 4, 1 / 8),
    "terminated": (2, True, 1 + 2 / 2, 0.0),
    "truncated": (2, False, 1 + 2 / 2, 1 / 4),
    "terminated at once": (1, True, 1.0, 0.0),
}


@pytest.mark.parametrize(("length", "terminal", "reward", "discount"), KNOWN_WINDOWS.values(), ids=KNOWN_WINDOWS)
def test_target_of_a_three_step_window(length: int, terminal: bool, reward: float, discount: float) -> None:
    steps = np.zeros((1, 4), SCHEMA.dtype)
    steps["reward"] = [[1, 2, 4, 8]]
    steps["is_terminal"][0, length] = terminal
    learner = sac(SacSettings(discount=0.5, target=THREE_STEPS, hidden=(4,), initial_temperature=0.2), batch_size=1)
    # All weights zero but the last biases: the twins say 3 and 7, mean and raw log sigma are 0, so log sigma is -1.5.
    state = learner.state()
    critics = Mlp(2, OBSERVATION_DIM + ACTION_DIM, (4,), 1)
    for name in ("actor.value", "critic.online.value", "critic.target.value"):
        state[name].zero_()
    critics.views(state["critic.target.value"])[-1].bias[:, 0, 0] = torch.tensor([3.0, 7.0])
    learner.load_state(state)
    noise = torch.randn((2, ACTION_DIM), generator=torch.Generator().set_state(state["noise"]))[1].double()
    u = math.exp(-1.5) * noise
    log_prob = torch.distributions.Normal(0.0, math.exp(-1.5)).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)

    learner.update(windows(steps, [length]))

    expected = reward + discount * (3.0 - 0.2 * log_prob.sum().item())
    assert learner.metrics()["q/target"] == pytest.approx(expected, abs=1e-5)


def test_stage_takes_the_observation_after_the_window_and_scales_bytes() -> None:
    schema = StepSchema(
        {
            "observation/camera": Field("observation/camera", "uint8", (2, 2)),
            "observation/joints": Field("observation/joints", "float32", (2,)),
        },
        Field("action", "float32", (1,)),
    )
    steps = np.zeros((2, 4), schema.dtype)
    steps["observation/joints"] = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    steps["observation/camera"][0, 0], steps["observation/camera"][1, 1] = 255, 51
    steps["action"][:, 0, 0] = [0.25, -0.5]
    learner = Sac(schema, SacSettings(target=THREE_STEPS, hidden=(4,)), batch_size=2, device="cpu", seed=0)

    (staged,) = learner.stage(windows(steps, [3, 1]))

    expected = [
        [1, 1, 1, 1, 0, 1],
        [0, 0, 0, 0, 8, 9],
        [0, 0, 0, 0, 6, 7],
        [0.2, 0.2, 0.2, 0.2, 10, 11],
    ]
    torch.testing.assert_close(staged.observation, torch.tensor(expected))
    torch.testing.assert_close(staged.action, torch.tensor([[0.25], [-0.5]]))
    torch.testing.assert_close(staged.discount, torch.tensor([0.99**3, 0.99]))


def test_stage_takes_large_fields_from_beside_the_packed_rows() -> None:
    camera = Field("observation/camera", "uint8", (64, 64))
    joints = Field("observation/joints", "float32", (2,))
    schema = StepSchema({f.name: f for f in (camera, joints)}, Field("action", "float32", (1,)))
    batch = buffers(schema, Window(length=3), 2)
    batch.length[:] = [3, 1]
    batch.steps["observation/joints"] = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    batch.frames[camera.name][:] = np.array([[0, 51, 102, 153], [255, 204, 1, 1]])[..., None, None, None]

    settings = SacSettings(target=THREE_STEPS, hidden=(4,), encoder="none")
    (staged,) = Sac(schema, settings, batch_size=2, device="cpu", seed=0).stage(batch)
    observation = staged.observation

    assert observation.shape == (4, 64 * 64 + 2)
    torch.testing.assert_close(observation[:, :4096].amin(1), torch.tensor([0.0, 1.0, 0.6, 0.8]))
    torch.testing.assert_close(observation[:, :4096].amax(1), torch.tensor([0.0, 1.0, 0.6, 0.8]))
    torch.testing.assert_close(observation[:, 4096:], torch.tensor([[0.0, 1], [8, 9], [6, 7], [10, 11]]))


def test_log_probability_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn((64, 2 * ACTION_DIM), generator=generator, dtype=torch.float64) * 1.5
    noise = torch.randn((64, ACTION_DIM), generator=generator, dtype=torch.float64)
    sample = Squashed.sample(head, noise)
    mean, raw = head.chunk(2, -1)
    sigma = torch.exp(-5.0 + 3.5 * (torch.tanh(raw) + 1.0))
    transform = torch.distributions.TanhTransform(cache_size=1)
    reference = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, sigma), [transform])
    action = transform(mean + sigma * noise)
    torch.testing.assert_close(sample.action, action)
    torch.testing.assert_close(sample.log_prob, reference.log_prob(action).sum(-1))


def test_log_probability_keeps_its_precision_where_tanh_saturates() -> None:
    head = torch.tensor([[15.0, 0.0], [-15.0, 0.0]])
    noise = torch.zeros(2, 1)
    sample = Squashed.sample(head, noise)
    # 1 - tanh(15)^2 is 3.7e-13, which float32 rounds to 0 when it is computed as written.
    expected = 1.5 - 0.5 * math.log(2 * math.pi) - math.log(4 * math.exp(-30.0))
    assert sample.action.abs().tolist() == [[1.0], [1.0]]
    assert sample.log_prob.tolist() == pytest.approx([expected, expected], rel=1e-6)


# ------------------------------------------------------------------------------------- a plain SAC, by autograd


class PlainSac:
    """SAC as a single file writes it: torch.nn.Linear, two separate critics, autograd, three torch.optim.Adam."""

    def __init__(self, settings: SacSettings, state: dict[str, Tensor]) -> None:
        self.settings = settings
        observed_and_acted = OBSERVATION_DIM + ACTION_DIM
        self.policy = self.networks(Mlp(1, OBSERVATION_DIM, settings.hidden, 2 * ACTION_DIM), state["actor.value"])[0]
        critics = Mlp(2, observed_and_acted, settings.hidden, 1)
        self.critics = self.networks(critics, state["critic.online.value"])
        self.targets = self.networks(critics, state["critic.target.value"])
        self.log_temperature = state["log_temperature.value"].clone().requires_grad_()
        critic_parameters = [p for critic in self.critics for p in critic.parameters()]
        self.policy_adam = torch.optim.Adam(self.policy.parameters(), lr=settings.policy_lr)
        self.critic_adam = torch.optim.Adam(critic_parameters, lr=settings.critic_lr)
        self.temperature_adam = torch.optim.Adam([self.log_temperature], lr=settings.temperature_lr)
        self.noise = torch.Generator().set_state(state["noise"])

    @staticmethod
    def networks(shape: Mlp, flat: Tensor) -> list[nn.Sequential]:
        networks = []
        for n in range(shape.networks):
            modules: list[nn.Module] = []
            for layer in shape.views(flat):
                linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[2])
                with torch.no_grad():
                    linear.weight.copy_(layer.weight[n].T)
                    linear.bias.copy_(layer.bias[n, 0])
                modules += [linear, nn.ReLU()]
            networks.append(nn.Sequential(*modules[:-1]))
        return networks

    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.policy(observation).chunk(2, -1)
        log_std = -5.0 + 3.5 * (torch.tanh(raw) + 1.0)
        normal = torch.distributions.Normal(mean, log_std.exp())
        u = mean + log_std.exp() * noise
        correction = 2.0 * (math.log(2.0) - u - nn.functional.softplus(-2.0 * u))
        return torch.tanh(u), (normal.log_prob(u) - correction).sum(-1)

    @staticmethod
    def q(critics: list[nn.Sequential], observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat((observation, action), -1)
        return critics[0](x).squeeze(-1), critics[1](x).squeeze(-1)

    def update(self, batch: WindowBatch) -> None:
        rows = np.arange(len(batch))
        first, last = batch.steps[:, 0], batch.steps[rows, batch.length]
        now, after = torch.tensor(first["observation"]), torch.tensor(last["observation"])
        returns = torch.zeros(len(batch))
        for b, length in enumerate(batch.length):
            for i in range(length):
                returns[b] += self.settings.discount**i * batch.steps["reward"][b, i]
        noise = torch.randn((2 * len(batch), ACTION_DIM), generator=self.noise)
        temperature = self.log_temperature.exp().detach()

        with torch.no_grad():
            next_action, next_log_prob = self.act(after, noise[len(batch) :])
            soft_value = torch.minimum(*self.q(self.targets, after, next_action)) - temperature * next_log_prob
            alive = torch.tensor(~last["is_terminal"]).float()
            target = returns + self.settings.discount ** torch.tensor(batch.length) * alive * soft_value
        q1, q2 = self.q(self.critics, now, torch.tensor(first["action"]))
        self.critic_adam.zero_grad()
        (0.5 * ((q1 - target) ** 2).mean() + 0.5 * ((q2 - target) ** 2).mean()).backward()
        self.critic_adam.step()

        action, log_prob = self.act(now, noise[: len(batch)])
        self.policy_adam.zero_grad()
        (temperature * log_prob - torch.minimum(*self.q(self.critics, now, action))).mean().backward()
        self.policy_adam.step()

        self.temperature_adam.zero_grad()
        (-self.log_temperature * (log_prob.detach() - ACTION_DIM)).mean().backward()
        self.temperature_adam.step()

        for critic, target_critic in zip(self.critics, self.targets, strict=True):
            for online, slow in zip(critic.parameters(), target_critic.parameters(), strict=True):
                slow.data.lerp_(online.data, self.settings.polyak)


def difference(shape: Mlp, flat: Tensor, networks: list[nn.Sequential]) -> float:
    largest = 0.0
    for i, layer in enumerate(shape.views(flat)):
        for n, network in enumerate(networks):
            linear = network[2 * i]
            assert isinstance(linear, nn.Linear)
            largest = max(largest, (layer.weight[n].T - linear.weight).abs().max().item())
            largest = max(largest, (layer.bias[n, 0] - linear.bias).abs().max().item())
    return largest


@pytest.mark.parametrize("n_step", [1, 3])
def test_twenty_updates_agree_with_a_plain_implementation(n_step: int) -> None:
    settings = SacSettings(
        target=TargetSettings(kind="n_step", length=n_step), hidden=(32, 24), polyak=0.1, discount=0.9
    )
    learner = sac(settings, batch_size=32)
    plain = PlainSac(settings, learner.state())
    before = learner.state()
    generator = np.random.default_rng(2)
    for _ in range(20):
        batch = random_windows(generator, batch=32, n_step=n_step)
        learner.update(batch)
        plain.update(batch)
    state = learner.state()
    critics = Mlp(2, OBSERVATION_DIM + ACTION_DIM, settings.hidden, 1)
    assert difference(critics, state["critic.online.value"], plain.critics) < 1e-5
    assert difference(critics, state["critic.target.value"], plain.targets) < 1e-5
    assert (
        difference(Mlp(1, OBSERVATION_DIM, settings.hidden, 2 * ACTION_DIM), state["actor.value"], [plain.policy])
        < 1e-5
    )
    torch.testing.assert_close(state["log_temperature.value"], plain.log_temperature.detach(), rtol=0, atol=1e-6)
    for name in ("critic.online.value", "critic.target.value", "actor.value", "log_temperature.value"):
        assert (state[name] - before[name]).abs().max() > 1e-3, f"{name} hardly moved, so agreement would mean nothing"


# ----------------------------------------------------------------------------------------- state, acting, learning


def test_state_goes_on_bit_for_bit() -> None:
    settings = SacSettings(hidden=(16, 16))
    generator = np.random.default_rng(3)
    batches = [random_windows(generator, batch=8, n_step=1) for _ in range(6)]
    straight, resumed = sac(settings, batch_size=8, seed=1), sac(settings, batch_size=8, seed=2)
    for batch in batches[:3]:
        straight.update(batch)
    resumed.load_state(straight.state())
    for batch in batches[3:]:
        straight.update(batch)
        resumed.update(batch)
    ours, theirs = straight.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.updates == 6


def test_state_of_other_networks_is_refused_and_changes_nothing() -> None:
    learner = sac(SacSettings(hidden=(16,)), batch_size=8)
    before = learner.state()
    with pytest.raises(ValueError, match=r"algorithm\.hidden"):
        learner.load_state(sac(SacSettings(hidden=(8,)), batch_size=8, seed=5).state())
    after = learner.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_policy_acts_as_the_torch_network() -> None:
    settings = SacSettings(hidden=(32, 24))
    learner = sac(settings, batch_size=8, seed=4)
    policy = SquashedGaussianPolicy(SCHEMA, settings)
    observation = np.random.default_rng(0).normal(size=(7, OBSERVATION_DIM)).astype(np.float32)
    with pytest.raises(RuntimeError, match="no weights"):
        policy.act({"observation": observation}, deterministic=True, generator=np.random.default_rng(0))
    policy.load(learner.policy_bytes())
    network = PlainSac(settings, learner.state())

    mean = policy.act({"observation": observation}, deterministic=True, generator=np.random.default_rng(0))[:, 0]
    noisy = policy.act({"observation": observation}, deterministic=False, generator=np.random.default_rng(9))[:, 0]
    noise = np.random.default_rng(9).standard_normal(mean.shape, np.float32)

    with torch.no_grad():
        zero, _ = network.act(torch.tensor(observation), torch.zeros(7, ACTION_DIM))
        expected, _ = network.act(torch.tensor(observation), torch.tensor(noise))
    assert mean.dtype == noisy.dtype == np.float32
    np.testing.assert_allclose(mean, zero.numpy(), atol=1e-5)
    np.testing.assert_allclose(noisy, expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match="actor and learner"):
        policy.load(sac(SacSettings(hidden=(8,)), batch_size=8).policy_bytes())
    with pytest.raises(ValueError, match="safetensors"):
        policy.load(b"not weights")
    with pytest.raises(SchemaError, match="'observation'"):
        policy.act({"pixels": observation}, deterministic=True, generator=np.random.default_rng(0))


def test_learns_a_one_step_task() -> None:
    """Reward 1 - |a - goal(o)|^2 and the episode ends: the best action is the goal, everywhere."""
    schema = StepSchema({"observation": Field("observation", "float32", (2,))}, Field("action", "float32", (1,)))
    settings = SacSettings(
        hidden=(64, 64),
        policy_lr=3e-3,
        critic_lr=3e-3,
        temperature_lr=3e-3,
        initial_temperature=0.1,
        target_entropy=-3.0,
    )
    learner = Sac(schema, settings, batch_size=128, device="cpu", seed=0)
    policy = SquashedGaussianPolicy(schema, settings)
    generator = np.random.default_rng(0)

    def goal(observation: np.ndarray) -> np.ndarray:
        return np.asarray(0.7 * observation[..., 0] * observation[..., 1])

    def error() -> float:
        policy.load(learner.policy_bytes())
        observation = np.random.default_rng(1).uniform(-1, 1, (256, 2)).astype(np.float32)
        action = policy.act({"observation": observation}, deterministic=True, generator=generator)
        return float(np.sqrt(np.mean((action[:, 0, 0] - goal(observation)) ** 2)))

    untrained = error()
    steps = np.zeros((128, 2), schema.dtype)
    steps["is_terminal"][:, 1] = True
    for _ in range(1000):
        steps["observation"] = generator.uniform(-1, 1, steps["observation"].shape)
        steps["action"] = generator.uniform(-1, 1, steps["action"].shape)
        steps["reward"][:, 0] = 1 - (steps["action"][:, 0, 0] - goal(steps["observation"][:, 0])) ** 2
        learner.update(windows(steps, [1] * 128))
    assert untrained > 0.2
    assert error() < 0.06


def test_metrics_are_means_since_the_last_call() -> None:
    learner = sac(SacSettings(hidden=(8,)), batch_size=8)
    assert learner.metrics() == {}
    steps = np.zeros((8, 2), SCHEMA.dtype)
    for reward in (1.0, 4.0):
        steps["reward"] = reward
        learner.update(windows(steps, [1] * 8))
    row = learner.metrics()
    assert row["batch/reward"] == pytest.approx(2.5)
    assert row["batch/largest_return"] == 4.0
    assert row["temperature"] == pytest.approx((1.0 + math.exp(-3e-4)) / 2, abs=1e-6)
    assert learner.metrics() == {}


def test_a_loss_that_is_not_finite_is_reported_with_the_batch() -> None:
    learner = sac(SacSettings(hidden=(8,)), batch_size=8)
    good, bad = (random_windows(np.random.default_rng(5), batch=8, n_step=1) for _ in range(2))
    learner.update(good)
    learner.check_finite()
    bad.steps["reward"][3, 0] = np.inf
    learner.update(bad)
    with pytest.raises(FloatingPointError, match=r"updates 1 to 2: .*loss/critic = inf.*\|return\| inf"):
        learner.check_finite()
    with pytest.raises(FloatingPointError):
        learner.metrics()


def test_windows_of_another_table_are_refused() -> None:
    learner = sac(SacSettings(hidden=(8,), target=THREE_STEPS), batch_size=8)
    with pytest.raises(SchemaError, match=r"shape \(8, 4\).*got \(8, 2\)"):
        learner.update(random_windows(np.random.default_rng(0), batch=8, n_step=1))
