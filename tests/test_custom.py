"""Users' value heads, learners and policies: the guides' examples as they stand, and how what is none of these is refused."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from cluster.api import train
from cluster.metrics import read_metrics
from configs.algorithms import (
    AlgorithmSettings,
    CustomSettings,
    DqnSettings,
    FlowSettings,
    HeadSettings,
    R2d2Settings,
    SacSettings,
)
from configs.load import ConfigError, load_config
from learners.classes import ModuleError
from learners.critic import smallest
from learners.custom import make_learner, make_policy
from learners.dqn import Dqn
from learners.flow import Flow
from learners.heads import Label, Mse, make_head
from learners.policy import STATE, Lanes, acting_policy
from learners.r2d2 import RecurrentDqn
from learners.sac import Sac
from learners.staging import Share
from replay.schema import Field, StepSchema, WindowBatch
from tests import runs_for_tests as runs

HERE = "tests.test_custom"
BATCH = 8
CONTINUOUS = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (2,)))
DISCRETE = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "int64", (), choices=3))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(guide: str) -> str:
    """The first program of a guide."""
    found = re.search(r"```python\n(.*?)```", (runs.ROOT / "learners" / guide).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


QUANTILES = "quantiles_of_the_guide:Quantiles"


@pytest.fixture(scope="module", autouse=True)
def guides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the examples of both guides, importable."""
    folder = tmp_path_factory.mktemp("guides")
    (folder / "quantiles_of_the_guide.py").write_text(example("value_heads.md"))
    (folder / "ddpg.py").write_text(example("custom.md"))
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def windows(schema: StepSchema, *, length: int = 1, rows: int = 2, start: int = 0, seed: int = 0) -> WindowBatch:
    """Random windows, half of which end in a terminal state."""
    generator = np.random.default_rng(seed)
    steps = np.zeros((BATCH, rows), schema.packed)
    for name in ("observation", "reward"):
        steps[name] = generator.uniform(-1, 1, steps[name].shape)
    if schema.action.choices:
        steps["action"] = generator.integers(schema.action.choices, size=steps["action"].shape)
    else:
        steps["action"] = generator.uniform(-1, 1, steps["action"].shape)
    steps["is_terminal"][:, start + length :] = generator.random((BATCH, 1)) < 0.5
    zeros, lengths = np.zeros(BATCH, np.int32), np.full(BATCH, length, np.int32)
    burn_in = np.full(BATCH, start, np.int32) if start else None
    return WindowBatch(steps, lengths, zeros.astype(np.int64), zeros, np.ones(BATCH), burn_in=burn_in, start=start)


# ------------------------------------------------------------------------------------------------------- value heads


def test_the_guides_head_is_quantile_regression_as_published() -> None:
    settings = HeadSettings(kind=QUANTILES, bins=5)
    head = make_head(settings, None, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn((3, 4, 5), generator=generator, dtype=torch.float64)
    target = 2 * torch.randn((1, 4, 7), generator=generator, dtype=torch.float64)
    loss, gradient = head.loss(logits, target)
    x = logits.clone().requires_grad_()
    losses = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(
        5
    ):  # Dabney et al. 2018, equations 9 and 10: a sum over quantiles, a mean over samples of the target
        for j in range(7):
            u = target[..., j] - x[..., i]
            huber = torch.where(u.abs() <= 1, 0.5 * u.square(), u.abs() - 0.5)
            losses = losses + ((i + 0.5) / 5 - (u < 0).double()).abs() * huber / 7
    (wanted,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(loss, losses.detach())
    torch.testing.assert_close(gradient, wanted)


def test_values_of_terminal_states_are_learnt_with_a_users_head() -> None:
    settings = DqnSettings(hidden=(32,), lr=1e-2, shift_every=20, head=HeadSettings(kind=QUANTILES, bins=8))
    learner = Dqn(DISCRETE, settings, batch_size=BATCH, seed=0, device="cpu")
    sampled = windows(DISCRETE)
    sampled.steps["is_terminal"][:, 1] = True
    batch = learner.stage(sampled)
    for _ in range(500):
        learner.update(batch)
    first = sampled.steps[:, 0]
    values = learner.values({"observation": first["observation"]})[0, np.arange(BATCH), first["action"]]
    np.testing.assert_allclose(values, first["reward"], atol=0.05)
    assert not {name for name in learner.metrics() if name.startswith(("support/", "value/clipped"))}
    policy = acting_policy(DISCRETE, settings)
    policy.load(learner.policy_bytes())
    acted = policy.act({"observation": first["observation"]}, deterministic=True, generator=np.random.default_rng(0))
    assert acted[:, 0].tolist() == learner.values({"observation": first["observation"]})[0].argmax(1).tolist()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (Sac, SacSettings(hidden=(16,), ensemble=3)),
        (Flow, FlowSettings(hidden=(16,), proposals=4, flow_steps=2)),
        (Flow, FlowSettings(hidden=(16,), proposals=4, flow_steps=2, aggregate="mean", value_loss="expectile")),
        (Dqn, DqnSettings(hidden=(16,), dueling=True)),
        (RecurrentDqn, R2d2Settings(hidden=(16,), recurrent=6, burn_in=2, sequence=3)),
    ],
)
def test_every_algorithm_learns_and_acts_with_a_users_head(make: Any, settings: AlgorithmSettings) -> None:
    settings = settings.model_copy(update={"head": HeadSettings(kind=QUANTILES, bins=6)})
    schema = DISCRETE if isinstance(settings, DqnSettings) else CONTINUOUS
    policy = acting_policy(schema, settings)
    sampled = windows(schema)
    if policy.state_size:
        schema = schema.with_extra(Field(STATE, "float32", (policy.state_size,)))
        sampled = windows(schema, length=3, rows=6, start=2)
    learner = make(schema, settings, batch_size=BATCH, seed=0, device="cpu")
    before = learner.policy_bytes()
    for _ in range(3):
        learner.update(learner.stage(sampled))
    assert all(map(math.isfinite, learner.metrics().values()))
    assert learner.policy_bytes() != before
    policy.load(learner.policy_bytes())
    generator = np.random.default_rng(0)
    action = policy.act({"observation": np.zeros((4, 3), np.float32)}, deterministic=True, generator=generator)
    assert action.shape[:2] == (4, 1)
    mse = acting_policy(schema, settings.model_copy(update={"head": HeadSettings()}))
    if make is Sac:
        mse.load(learner.policy_bytes())  # its actors have no critics
    else:
        with pytest.raises(ValueError, match=r"same algorithm\.head"):
            mse.load(learner.policy_bytes())


class Negated:
    """Half the squared error of a value that falls as the output grows."""

    def __init__(self, settings: HeadSettings, *, device: torch.device, dtype: torch.dtype) -> None:
        self.outputs = 1

    def mean(self, logits: Tensor) -> Tensor:
        return -logits[..., 0]

    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        return -of_mean.unsqueeze(-1)

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        value = reward + discount * (self.mean(logits) + shift)
        return Label(value, value)

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        error = self.mean(logits) - target
        return 0.5 * error.square(), -error.unsqueeze(-1)

    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        return logits.mean(dim)


def test_a_users_head_decides_which_critic_is_the_smallest_and_which_action_the_best() -> None:
    head = make_head(HeadSettings(kind=f"{HERE}:Negated"), None)
    logits = torch.tensor([[1.0, -2.0], [3.0, -4.0]]).unsqueeze(-1)  # (E, batch, 1)
    assert smallest(head, logits).squeeze(-1).tolist() == [3.0, -2.0]
    assert smallest(Mse(), logits).squeeze(-1).tolist() == [1.0, -4.0]
    settings = DqnSettings(hidden=(16,), head=HeadSettings(kind=f"{HERE}:Negated"))
    learner = Dqn(DISCRETE, settings, batch_size=BATCH, seed=0, device="cpu")
    policy = acting_policy(DISCRETE, settings)
    policy.load(learner.policy_bytes())
    observation = {"observation": np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)}
    acted = policy.act(observation, deterministic=True, generator=np.random.default_rng(0))
    assert acted[:, 0].tolist() == learner.values(observation)[0].argmax(1).tolist()


class WrongLoss(Negated):
    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = super().loss(logits, target)
        return loss, -gradient


class WrongMean(Negated):
    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        return of_mean.unsqueeze(-1)


class WrongLabel(Negated):
    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        return super().label(logits, reward, discount, 0.0)


class WrongShape(Negated):
    def mean(self, logits: Tensor) -> Tensor:
        return -logits


class NoOutputs(Negated):
    def __init__(self, settings: HeadSettings, *, device: torch.device, dtype: torch.dtype) -> None:
        pass


class Unlike:
    def mean(self, logits: Tensor) -> Tensor:
        return logits


class Fails(Negated):
    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        raise ArithmeticError("no mixtures")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("WrongLoss", ["the gradient of loss is not the derivative", "by differences, got"]),
        ("WrongMean", ["mean_gradient is not the derivative"]),
        ("WrongLabel", ["expected label(…).value to be reward + discount * (mean(logits) + shift)"]),
        ("WrongShape", ["expected mean(logits) to be a finite tensor (2, 5), got (2, 5, 1)"]),
        ("NoOutputs", ["whole number outputs, at least 1, got None"]),
        ("Unlike", ["mean_gradient, label, loss, mixture is missing"]),
        ("Fails", ["raised ArithmeticError: no mixtures"]),
        ("Negate", ["has no class 'Negate'; nearest: Negated"]),
    ],
)
def test_what_is_no_value_head_is_refused_with_the_setting_and_the_reason(kind: str, parts: list[str]) -> None:
    with pytest.raises(ModuleError) as refused:
        make_head(HeadSettings(kind=f"{HERE}:{kind}"), None)
    for part in [f"algorithm.head.kind '{HERE}:{kind}'", *parts]:
        assert part in str(refused.value)


def test_a_users_head_has_no_support_that_grows() -> None:
    own, bins = HeadSettings(kind="a.b:C"), HeadSettings(kind="hl_gauss")
    assert (own.classifies, own.is_automatic, own.is_own) == (False, False, True)
    assert (bins.classifies, bins.is_automatic, bins.is_own) == (True, True, False)
    flags = ["--env.id", "CartPole-v1", "--algorithm.name", "dqn", "--algorithm.dueling", "--learners.count", "2"]
    assert load_config(None, [*flags, "--algorithm.head.kind", "a.b:C"]).algorithm.head == own


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--algorithm.head.kind hl_gaus",
            "mse, two_hot, hl_gauss, c51 or package.module:Class, got 'hl_gaus'; did you",
        ),
        ("--algorithm.head.kind a:b:c", "algorithm.head.kind: expected mse, two_hot"),
        ("--algorithm.name custom", "algorithm.name custom needs algorithm.learner: the package.module:Class"),
        ("--algorithm.name custom --algorithm.learner a:B", "algorithm.name custom needs algorithm.policy"),
        ("--algorithm.name custom --algorithm.learner a.B", "expected package.module:Class, or None, got 'a.B'"),
    ],
)
def test_settings_name_what_is_allowed(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, flags.split())
    assert message in str(refused.value)


# ------------------------------------------------------------------------------------------------ the guide's learner


def ddpg(**options: Any) -> CustomSettings:
    return CustomSettings(learner="ddpg:Learner", policy="ddpg:Policy", hidden=(16,), options=options)


def guides_learner(seed: int = 0) -> Any:
    arguments = {"device": "cpu", "updates_per_call": 1, "share": Share()}
    return make_learner(CONTINUOUS, ddpg(), batch_size=BATCH, seed=seed, **arguments)


def test_the_guides_learner_makes_the_updates_that_it_describes() -> None:
    learner = guides_learner()
    before: dict[str, Tensor] = {name: tensor.double() for name, tensor in learner.state().items()}
    batch = learner.stage(windows(CONTINUOUS))
    learner.update(batch)
    row = learner.metrics()

    def forward(group: str, network: str, x: Tensor) -> Tensor:
        def weight(layer: str) -> Tensor:
            return before[f"{group}.{network}.{layer}"]

        first, last = ("0.0", "0.2") if network == "actor" else ("0", "2")
        x = torch.relu(x @ weight(f"{first}.weight").T + weight(f"{first}.bias"))
        found: Tensor = x @ weight(f"{last}.weight").T + weight(f"{last}.bias")
        return found

    now, after = batch[0].observation.double().chunk(2)
    next_action = torch.tanh(forward("target", "actor", after))
    next_value = forward("target", "critic", torch.cat((after, next_action), 1))[:, 0]
    wanted = batch[0].reward + batch[0].discount * next_value
    value = forward("online", "critic", torch.cat((now, batch[0].action), 1))[:, 0]
    action = torch.tanh(forward("online", "actor", now))
    assert row["loss/critic"] == pytest.approx(float((value - wanted).square().mean()), rel=1e-5)
    best = forward("online", "critic", torch.cat((now, action), 1)).mean()
    assert row["loss/actor"] == pytest.approx(-float(best), rel=1e-5)
    moved = learner.state()
    for name in ("online.actor.0.0.weight", "online.critic.0.weight"):
        other = name.replace("online", "target")
        expected = before[other].lerp(moved[name].double(), 0.005)
        torch.testing.assert_close(moved[other].double(), expected, rtol=1e-5, atol=1e-7)


def test_the_guides_learner_goes_on_exactly_and_its_policy_acts_by_its_weights() -> None:
    learner, other = guides_learner(), guides_learner(seed=1)
    batch = learner.stage(windows(CONTINUOUS))
    for _ in range(3):
        learner.update(batch)
    other.load_state(learner.state())
    for each in (learner, other):
        each.update(batch)
    for name, tensor in learner.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    policy = acting_policy(CONTINUOUS, ddpg(noise=0.3))
    policy.load(learner.policy_bytes())
    observation = {"observation": np.ones((500, 3), np.float32)}
    generator = np.random.default_rng(0)
    greedy = policy.act(observation, deterministic=True, generator=generator)
    assert greedy.shape == (500, 1, 2)
    assert (greedy == greedy[0]).all()
    noise = policy.act(observation, deterministic=False, generator=generator) - greedy
    assert 0.2 < noise.std() < 0.4


def test_the_guides_run_trains_evaluates_and_resumes_from_the_command_line(guides: Path) -> None:
    words = [*runs.sync_words(guides), "--env.id", "Pendulum-v1", "--actors.envs", "4", "--eval.episodes", "2"]
    words += ["--algorithm.name", "custom", "--algorithm.learner", "ddpg:Learner", "--algorithm.policy", "ddpg:Policy"]
    words += ["--algorithm.options.noise", "0.2", "--eval.every", "400", "--stop.steps", "600"]
    process = runs.start("train", *words, cwd=guides)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    run = guides / "runs" / "a"
    rows = read_metrics(run).to_pylist()
    updates = rows[-1]["updates"]
    assert updates > 300
    assert max(row["loss/critic"] or 0.0 for row in rows) > 0
    assert -2000 < rows[-1]["eval/mean_return"] < 0
    process = runs.start("train", "--resume", "runs/a", "--stop.steps", "700", cwd=guides)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert read_metrics(run).to_pylist()[-1]["updates"] > updates
    process = runs.start("eval", "runs/a", "--episodes", "1", "--json", cwd=guides)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert '"mean_return"' in out


# --------------------------------------------------------------------------------------------- learners and policies


class Watcher:
    """Learns nothing; keeps what it was given, and adds up the rewards that it saw."""

    made: ClassVar[dict[str, Any]] = {}

    def __init__(self, schema: StepSchema, settings: CustomSettings, **arguments: Any) -> None:
        Watcher.made = {"schema": schema, "settings": settings, **arguments}
        self.updates = 0
        self._reward = torch.zeros(())

    def stage(self, batch: WindowBatch, weights: NDArray[np.float32] | None = None) -> Tensor:
        assert batch.ends is None
        assert batch.steps["observation"].shape == (32, 3, 4)
        state = batch.steps[STATE][:, 0]  # before the step: zero at an episode's start
        decided = state[:, 0] > 0
        np.testing.assert_array_equal(state[:, 1], np.where(decided, 7.0, 0.0))
        Watcher.made["decided"] = Watcher.made.get("decided", 0) + int(decided.sum())
        return torch.from_numpy(batch.steps["reward"][:, :-1].copy())

    def update(self, batch: Tensor) -> None:
        self._reward += batch.sum()
        self.updates += 1

    def check_finite(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {"watched/reward": float(self._reward)}

    def policy_bytes(self) -> bytes:
        return save({"action": torch.tensor([self.updates % 2])})

    def state(self) -> dict[str, Tensor]:
        return {"reward": self._reward.clone(), "updates": torch.tensor(self.updates)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._reward, self.updates = state["reward"].clone(), int(state["updates"])


class Stubborn:
    """Repeats one action; remembers in its first number how many decisions it has made, the second is 7."""

    def __init__(self, schema: StepSchema, settings: CustomSettings, *, stack: int) -> None:
        assert settings.options["patience"] == 2
        self.chunk, self.state_size = 1, 2

    def load(self, data: bytes) -> None:
        self._action = int(load(data)["action"])

    def act(
        self,
        observation: dict[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        if lanes is not None:
            assert ((lanes.state[:, 1] == 7.0) | (lanes.state[:, 0] == 0.0)).all()
            lanes.state[:, 0] += 1.0
            lanes.state[:, 1] = 7.0
        return np.full((len(observation["observation"]), 1), self._action)


def flags(learner: str, policy: str) -> list[str]:
    words = ["--env.id", "CartPole-v1", "--algorithm.name", "custom", "--algorithm.options.patience", "2"]
    return [*words, "--algorithm.learner", f"{HERE}:{learner}", "--algorithm.policy", f"{HERE}:{policy}"]


def test_a_recurrent_policy_of_discrete_actions_and_a_learner_of_whole_windows(tmp_path: Path) -> None:
    words = [*runs.sync_words(tmp_path), *flags("Watcher", "Stubborn"), "--root", str(tmp_path)]
    words += ["--algorithm.observations", "all", "--algorithm.target.kind", "n_step", "--algorithm.target.length", "2"]
    run = train(load_config(None, [*words, "--stop.steps", "600"]), show=lambda row, line: None)
    made = Watcher.made
    assert made["decided"] > 0
    assert made["settings"].options == {"patience": 2}
    assert made["batch_size"] == 32
    assert {"seed", "device", "compile", "graphs", "precision", "products", "updates_per_call", "stack"} <= made.keys()
    assert made["share"] == Share()
    assert STATE in (made["schema"].packed.names or ())
    rows = read_metrics(run.path).to_pylist()
    assert rows[-1]["watched/reward"] > 32 * rows[-1]["updates"]


class NoUpdates(Watcher):
    def __init__(self, schema: StepSchema, settings: CustomSettings, **arguments: Any) -> None:
        pass


class Picky(Watcher):
    def __init__(self, schema: StepSchema, settings: CustomSettings, *, batch_size: int) -> None:
        pass


class Half:
    def load(self, data: bytes) -> None:
        pass


class NoChunk(Stubborn):
    def __init__(self, schema: StepSchema, settings: CustomSettings, *, stack: int) -> None:
        self.state_size = 0


class ChunkOfNone(Stubborn):
    def __init__(self, schema: StepSchema, settings: CustomSettings, *, stack: int) -> None:
        self.chunk, self.state_size = 0, 0


@pytest.mark.parametrize(
    ("learner", "policy", "parts"),
    [
        ("Watcher", "Half", ["algorithm.policy", "Half", "expected a class with load, act; act is missing"]),
        (
            "Half",
            "Stubborn",
            ["algorithm.learner", "stage, update, state, load_state, metrics, check_finite, policy_bytes"],
        ),
        ("Watcher", "Stuborn", ["algorithm.policy", "has no class 'Stuborn'; nearest: Stubborn"]),
        ("BATCH", "Stubborn", ["algorithm.learner", "holds int, expected a class"]),
        ("Watcher", "NoChunk", ["algorithm.policy", "a whole number chunk, at least 1, got none"]),
        ("Watcher", "ChunkOfNone", ["algorithm.policy", "a whole number chunk, at least 1, got 0"]),
        ("Watcher", "Watcher", ["algorithm.policy", "load, act is missing"]),
    ],
)
def test_what_is_no_learner_or_policy_is_refused_before_anything_starts(
    learner: str, policy: str, parts: list[str], tmp_path: Path
) -> None:
    words = [*runs.sync_words(tmp_path), *flags(learner, policy), "--root", str(tmp_path / "runs")]
    with pytest.raises(ModuleError) as refused:
        train(load_config(None, words), show=lambda row, line: None)
    for part in parts:
        assert part in str(refused.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ("NoUpdates", "expected instances with a whole number updates, at least 0, got none"),
        (
            "Picky",
            "called as Class(schema, settings, batch_size=, seed=, share=), got one with the signature (schema: ",
        ),
    ],
)
def test_a_learner_that_cannot_be_made_is_refused(learner: str, message: str) -> None:
    settings = CustomSettings(learner=f"{HERE}:{learner}", policy=f"{HERE}:Stubborn")
    with pytest.raises(ModuleError) as refused:
        make_learner(DISCRETE, settings, batch_size=1, seed=0, share=Share())
    assert message in str(refused.value)
    assert f"algorithm.learner '{HERE}:{learner}'" in str(refused.value)


def test_a_module_that_cannot_be_imported_is_refused_with_the_setting() -> None:
    settings = CustomSettings(learner="no_such_module:A", policy="no_such_module:B")
    with pytest.raises(ModuleError, match=r"algorithm\.policy 'no_such_module:B': importing .* ModuleNotFoundError"):
        make_policy(DISCRETE, settings, stack=1)


def test_a_policy_without_torch_acts_in_a_process_without_torch(tmp_path: Path) -> None:
    (tmp_path / "still.py").write_text(
        "class Still:\n    chunk, state_size = 1, 0\n"
        "    def __init__(self, schema, settings, *, stack): pass\n"
        "    def load(self, data): pass\n"
        "    def act(self, observation, lanes=None, *, deterministic, generator): return None\n"
    )
    code = (
        "import sys\n"
        "from configs.algorithms import CustomSettings\n"
        "from learners.policy import acting_policy\n"
        "from replay.schema import Field, StepSchema\n"
        "schema = StepSchema({'o': Field('o', 'float32', (3,))}, Field('action', 'float32', (2,)))\n"
        "made = acting_policy(schema, CustomSettings(learner='still:Still', policy='still:Still'))\n"
        "print(type(made).__name__, 'torch' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["Still", "False"]
