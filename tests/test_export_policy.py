"""Exported policies: the torch modules decide as actors do, and so do their graphs; what cannot be exported is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped,unused-ignore]
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load, save
from torch import Tensor, nn

from actors.spaces import SpaceMap
from cluster.checkpoint import Checkpoints, save_tensors
from cluster.cli import main
from cluster.export import action_space, compare, to_onnx
from cluster.recorder import LEARNER, POLICY
from cluster.runs import RunFolder
from configs.algorithms import (
    AlgorithmSettings,
    ChainSettings,
    CustomSettings,
    DqnSettings,
    FlowSettings,
    HeadSettings,
    R2d2Settings,
    SacSettings,
    TargetSettings,
)
from configs.schema import EnvSettings, RunConfig
from learners.dqn import Dqn
from learners.flow import Flow
from learners.heads import Label
from learners.policy import STATE, Lanes, Policy, acting_policy, row_schema
from learners.policy_modules import PolicyModule
from learners.r2d2 import RecurrentDqn
from learners.sac import Sac
from replay.schema import StepSchema, WindowBatch

BATCH, HIDDEN = 4, (24, 16)
FAST = 0.01  # step size with which two updates show
LEARNERS: dict[str, Any] = {"sac": Sac, "flow": Flow, "dqn": Dqn, "r2d2": RecurrentDqn}
LOW, HIGH = np.array([-2.0, 0.5], np.float32), np.array([2.0, 30.0], np.float32)
VECTOR = spaces.Dict({"bytes": spaces.Box(0, 255, (3,), np.uint8), "position": spaces.Box(-9, 9, (2,), np.float32)})
SMALL_FRAMES = spaces.Dict({"frame": spaces.Box(0, 255, (9, 10, 2), np.uint8), "place": spaces.Discrete(5)})
LARGE_FRAMES = spaces.Dict(
    {"frame": spaces.Box(0, 255, (64, 66), np.uint8), "speed": spaces.Box(-1, 1, (), np.float32)}
)
BOX, NUMBERS = spaces.Box(LOW, HIGH), spaces.Discrete(3, start=2)


class Features(nn.Module):
    """A user's encoder, which stands for the whole observation vector."""

    def __init__(self, frame_shape: tuple[int, int, int] | None, vector_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vector_size, 7)

    def forward(self, frames: Tensor | None, vector: Tensor) -> Tensor:
        return torch.tanh(self.linear(vector))


class Signed:
    """A user's value head: two outputs, whose difference is the value."""

    outputs = 2

    def __init__(self, settings: HeadSettings, *, device: torch.device, dtype: torch.dtype) -> None:
        """Has no settings."""

    def mean(self, logits: Tensor) -> Tensor:
        return logits[..., 0] - logits[..., 1]

    def mean_gradient(self, logits: Tensor, of_mean: Tensor) -> Tensor:
        return torch.stack((of_mean, -of_mean), -1)

    def label(self, logits: Tensor, reward: Tensor, discount: Tensor, shift: Tensor | float) -> Label:
        value = reward + discount * (self.mean(logits) + shift)
        return Label(value, value)

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        error = self.mean(logits) - target
        return 0.5 * error.square(), self.mean_gradient(logits, error)

    def mixture(self, logits: Tensor, dim: int) -> Tensor:
        return logits.mean(dim)


class Bessel(Features):
    """An encoder with a function that ONNX lacks."""

    def forward(self, frames: Tensor | None, vector: Tensor) -> Tensor:
        features: Tensor = torch.special.bessel_j0(vector.sum(1, keepdim=True).detach())
        return features + super().forward(frames, vector)


class Case(NamedTuple):
    """A policy of an algorithm, and the environment it acts in."""

    settings: AlgorithmSettings
    observation: spaces.Dict = VECTOR
    stack: int = 1

    @property
    def spaces(self) -> SpaceMap:
        return SpaceMap("test", self.observation, NUMBERS if isinstance(self.settings, DqnSettings) else BOX)


def head(kind: str) -> HeadSettings:
    return HeadSettings.model_validate({"kind": kind, "bins": 11, "low": -3.0, "high": 5.0})


def chunks(of: type[AlgorithmSettings], length: int, **more: Any) -> Any:
    return of(hidden=HIDDEN, chunk=length, target=TargetSettings(kind="chunk", length=length), **more)


CASES = {
    "sac": Case(SacSettings(hidden=HIDDEN, layer_norm=True)),
    "sac-normalised-chunk": Case(chunks(SacSettings, 3, normalise_observations=True)),
    "sac-frames": Case(SacSettings(hidden=HIDDEN), SMALL_FRAMES),
    "sac-user": Case(
        SacSettings(hidden=HIDDEN, encoder="tests.test_export_policy:Features", normalise_observations=True)
    ),
    "flow-mse": Case(FlowSettings(hidden=HIDDEN, proposals=5, ensemble=3, aggregate="mean")),
    "flow-hl_gauss-chunk": Case(
        chunks(FlowSettings, 2, proposals=6, flow_steps=4, head=head("hl_gauss"), layer_norm=True)
    ),
    "dqn-mse": Case(DqnSettings(hidden=HIDDEN, lr=FAST, layer_norm=True, normalise_observations=True)),
    "dqn-hl_gauss-chain": Case(
        DqnSettings(hidden=HIDDEN, lr=FAST, head=head("hl_gauss"), chain=ChainSettings(length=3))
    ),
    "dqn-two_hot-chunk": Case(chunks(DqnSettings, 2, lr=FAST, head=head("two_hot"))),
    "dqn-c51-dueling-frames": Case(
        chunks(DqnSettings, 2, lr=FAST, head=head("c51"), dueling=True, chain=ChainSettings(length=2)),
        LARGE_FRAMES,
        stack=3,
    ),
    "dqn-user": Case(
        DqnSettings(hidden=HIDDEN, lr=FAST, dueling=True, head=HeadSettings(kind="tests.test_export_policy:Signed"))
    ),
    "r2d2-mse": Case(R2d2Settings(hidden=HIDDEN, lr=FAST, recurrent=6, normalise_observations=True, dueling=True)),
    "r2d2-hl_gauss": Case(
        R2d2Settings(
            hidden=HIDDEN, lr=FAST, recurrent=6, head=head("hl_gauss"), chain=ChainSettings(length=2), layer_norm=True
        )
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_windows(schema: StepSchema, settings: AlgorithmSettings, stack: int) -> WindowBatch:
    """Whole windows of random steps."""
    generator = np.random.default_rng(0)
    start = settings.burn_in if isinstance(settings, R2d2Settings) else 0
    rows = settings.window_steps + 1
    steps = np.zeros((BATCH, rows), schema.packed)
    for field in (*schema.observations, *schema.extra, schema.action):
        if field not in schema.large:
            shape = steps[field.name].shape
            whole = field.dtype != "float32"
            steps[field.name] = generator.integers(3, size=shape) if whole else generator.uniform(-1, 1, shape)
    steps["reward"] = generator.uniform(-1, 1, steps["reward"].shape)
    frames = {
        f.name: generator.integers(256, size=(BATCH, rows, stack, *f.shape)).astype(np.uint8) for f in schema.large
    }
    zeros = np.zeros(BATCH, np.int32)
    return WindowBatch(
        steps,
        zeros + rows - 1 - start,
        zeros.astype(np.int64),
        zeros,
        np.ones(BATCH),
        burn_in=zeros + start if start else None,
        start=start,
        frames=frames,
    )


class Parts(NamedTuple):
    """A learner after two updates, and its policy as actors and as an exported module have it."""

    learner: Any
    policy: Policy
    module: PolicyModule
    data: bytes


def make(case: Case, *, seed: int = 0, updates: int = 2) -> Parts:
    schema, settings = case.spaces.schema, case.settings
    policy = acting_policy(schema, settings, stack=case.stack)
    rows = row_schema(schema, policy)
    learner = LEARNERS[settings.name](  # type: ignore[attr-defined]
        rows, settings, batch_size=BATCH, seed=seed, device="cpu", products="torch", stack=case.stack
    )
    for _ in range(updates):
        learner.update(random_windows(rows, settings, case.stack))
    data: bytes = learner.policy_bytes()
    policy.load(data)
    return Parts(
        learner, policy, PolicyModule(schema, settings, action_space(case.spaces), data, stack=case.stack).eval(), data
    )


def given(module: PolicyModule, count: int) -> tuple[tuple[Tensor, ...], dict[str, np.ndarray]]:
    """Random inputs; a flow's noise is that which an acting policy draws from a generator of seed 7."""
    inputs = module.example(count, np.random.default_rng(count))
    if module.inputs[-1] == "noise":
        noise = np.random.default_rng(7).standard_normal(tuple(inputs[-1].shape), np.float32)
        inputs = (*inputs[:-1], torch.from_numpy(noise))
    return inputs, {name: values.numpy() for name, values in zip(module.inputs, inputs, strict=True)}


def in_units(action: np.ndarray) -> np.ndarray:
    """Actions as the environment takes them: within its bounds, or numbered from 2."""
    if action.dtype == np.int64:
        return action + 2
    return LOW + (action + 1) / 2 * (HIGH - LOW)


# --------------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("name", CASES)
def test_modules_decide_as_actors_do(name: str) -> None:
    case = CASES[name]
    learner, policy, module, _ = make(case)
    inputs, named = given(module, 33)
    with torch.inference_mode():
        made = dict(zip(module.outputs, (values.numpy() for values in module(*inputs)), strict=True))
    fields = {field: named[field] for field in (f.name for f in case.spaces.schema.observations)}
    lanes = None
    if policy.state_size:
        lanes = Lanes(np.zeros(33, np.float32), named[STATE].copy())
    acted = in_units(policy.act(fields, lanes, deterministic=True, generator=np.random.default_rng(7)))
    if policy.chunk == 1:
        acted = acted[:, 0]
    assert made["action"].shape == acted.shape
    assert made["action"].dtype == acted.dtype
    np.testing.assert_allclose(made["action"], acted, atol=2e-4)  # of bounds 29.5 apart
    assert made[module.outputs[-1]].std(0).max() > 1e-3  # different observations are told apart
    if isinstance(case.settings, DqnSettings):
        values = learner.values(fields, *(() if lanes is None else (named[STATE],)))
        if lanes is not None:
            values, state = values
            np.testing.assert_allclose(made["next_state"], state, atol=1e-5)
            np.testing.assert_allclose(made["next_state"], lanes.state, atol=1e-5)
        np.testing.assert_allclose(made["values"], values.mean(0), atol=1e-5)
        assert np.array_equal(
            (made["action"].reshape(33, -1) - 2) @ 3 ** np.arange(policy.chunk)[::-1], values.mean(0).argmax(1)
        )


@pytest.mark.parametrize("name", ["sac-normalised-chunk", "flow-mse", "dqn-two_hot-chunk"])
def test_distance_is_that_to_the_nearest_right_action(name: str) -> None:
    _, _, module, _ = make(CASES[name])
    inputs, _ = given(module, 9)
    with torch.inference_mode():
        action = module(*inputs)[0]
        assert module.distance(inputs, action).max() <= 1e-6
        assert module.distance(inputs, action, torch.float64).max() <= 1e-5
        other = action.clone()
        if action.dtype == torch.int64:
            other[4] = (other[4] - 2 + 1) % 3 + 2
        else:
            other[4].clamp_(max=0.0).sub_(0.5)
        far = module.distance(inputs, other)
    assert far[4] > 1e-4
    assert far[torch.arange(9) != 4].max() <= 1e-6


def test_examples_of_normalised_observations_are_spread_as_those_seen() -> None:
    module = make(CASES["dqn-mse"]).module
    with torch.inference_mode():
        vector, _ = module.eyes(module.example(4000, np.random.default_rng(0)), torch.float32)
    position = vector[:, 3:]  # behind the bytes
    assert position.mean(0).abs().max() < 0.1
    assert (position.std(0) - 1).abs().max() < 0.1


# ---------------------------------------------------------------------------------------------------------- the graphs


@pytest.fixture(scope="module")
def exported() -> Callable[[str], tuple[Parts, bytes]]:
    """A case's parts and graph, made once."""
    made: dict[str, tuple[Parts, bytes]] = {}

    def get(name: str) -> tuple[Parts, bytes]:
        if name not in made:
            parts = make(CASES[name])
            made[name] = parts, to_onnx(parts.module, {"algorithm": CASES[name].settings.name})  # type: ignore[attr-defined]
        return made[name]

    return get


@pytest.mark.parametrize("name", ["flow-hl_gauss-chunk", "dqn-c51-dueling-frames", "r2d2-hl_gauss"])
def test_graphs_decide_as_modules_do(name: str, exported: Callable[[str], tuple[Parts, bytes]]) -> None:
    (_, policy, module, _), graph = exported(name)
    differences = compare(graph, module, policy, CASES[name].spaces, seed=3)
    assert differences.allowed == 1e-5
    assert 0.0 <= max(differences.torch, differences.acting, differences.rounding) <= 1e-5

    onnx.checker.check_model(onnx.load_from_string(graph), full_check=True)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(module.inputs)
    assert [o.name for o in session.get_outputs()] == list(module.outputs)
    assert {i.shape[0] for i in session.get_inputs()} == {o.shape[0] for o in session.get_outputs()} == {"batch"}
    for count in (1, 5):
        inputs, named = given(module, count)
        with torch.inference_mode():
            for got, expected in zip(session.run(None, named), module(*inputs), strict=True):
                np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)


def test_a_graph_of_other_weights_is_found(exported: Callable[[str], tuple[Parts, bytes]]) -> None:
    name = "r2d2-hl_gauss"
    parts, graph = exported(name)
    other = make(CASES[name], seed=1)
    with pytest.raises(RuntimeError, match=r"differs from the torch module by \d\.\d+, "):
        compare(graph, other.module, parts.policy, CASES[name].spaces, seed=0)
    with pytest.raises(RuntimeError, match="differs from the acting policy by"):
        compare(graph, parts.module, other.policy, CASES[name].spaces, seed=0)


def test_a_policy_of_the_users_has_no_graph() -> None:
    spaces, settings = CASES["sac"].spaces, CustomSettings(learner="mine:Learner", policy="mine:Policy")
    with pytest.raises(ValueError, match="a class of your own is not"):
        PolicyModule(spaces.schema, settings, action_space(spaces), b"")


def test_an_encoder_that_onnx_has_no_operators_for_is_refused() -> None:
    settings = SacSettings(hidden=HIDDEN, encoder="tests.test_export_policy:Bessel")
    module = make(Case(settings), updates=0).module
    with pytest.raises(RuntimeError, match=r"^the policy cannot be written as ONNX: .*bessel_j0[^\n]*$"):
        to_onnx(module, {})


# ---------------------------------------------------------------------------------------------------------- the command

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run a command in this process and an empty folder; its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as ended:  # argparse's way out
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run without a checkpoint yet."""
    settings = SacSettings(hidden=HIDDEN, normalise_observations=True)
    config = RunConfig(
        name="a", root=str(tmp_path / "runs"), env=EnvSettings(id="Pendulum-v1"), algorithm=settings, mode="sync"
    )
    return RunFolder.create(config, ["millrace", "train"])


def add_checkpoint(run: RunFolder, step: int, policy: bytes, *, mean_return: float | None = None) -> Path:
    with Checkpoints(run.checkpoints).write(env_steps=step, updates=step // 2, eval_mean_return=mean_return) as path:
        save_tensors(path / LEARNER, {"x": np.zeros(1)}, {"version": step // 10})
        (path / POLICY).write_bytes(policy)
    return run.checkpoints / f"step_{step:012d}"


def pendulum(run: RunFolder) -> tuple[Policy, bytes]:
    from actors.envs import check_env

    schema = check_env(run.config.env)
    settings = run.config.algorithm
    assert isinstance(settings, SacSettings)
    learner = Sac(schema, settings, batch_size=BATCH, seed=0, device="cpu", products="torch")
    for _ in range(2):
        learner.update(random_windows(schema, settings, 1))
    policy = acting_policy(schema, settings)
    policy.load(learner.policy_bytes())
    return policy, learner.policy_bytes()


def test_command_writes_the_best_policy(run: RunFolder, call: Call, tmp_path: Path) -> None:
    policy, data = pendulum(run)
    foreign = {name: array for name, array in load(data).items() if not name.startswith("policy.1")}
    best = add_checkpoint(run, 100, data, mean_return=-150.0)
    newest = add_checkpoint(run, 200, save(foreign))
    file = tmp_path / "made" / "policy.onnx"

    code, out, err = call("export", str(run.path), str(file), "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["checkpoint"], found["inputs"], found["outputs"]) == (str(best), ["observation"], ["action"])
    assert max(found["difference_from_torch"], found["difference_from_actors"]) <= 1e-5

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    noted = session.get_modelmeta().custom_metadata_map
    assert {name: noted[name] for name in ("run", "algorithm", "environment")} == {
        "run": "a",
        "algorithm": "sac",
        "environment": "Pendulum-v1",
    }
    assert {name: json.loads(noted[name]) for name in ("policy_version", "env_steps", "chunk", "mean_return")} == {
        "policy_version": 10,
        "env_steps": 100,
        "chunk": 1,
        "mean_return": -150.0,
    }
    assert json.loads(noted["action_low"]) == [-2.0]
    assert json.loads(noted["action_high"]) == [2.0]
    observation = np.random.default_rng(0).uniform(-3, 3, (6, 3)).astype(np.float32)
    acted = policy.act({"observation": observation}, deterministic=True, generator=np.random.default_rng(0))
    (action,) = session.run(None, {"observation": observation})
    np.testing.assert_allclose(action, 2.0 * acted[:, 0], atol=1e-5)  # Pendulum's torque is within ±2

    before = file.read_bytes()
    code, out, err = call("export", str(run.path), str(file), "--checkpoint", "latest")
    assert (code, out) == (2, "")
    assert str(newest / POLICY) in err
    assert "policy.1.weight" in err
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["policy.onnx"]


def test_what_is_impossible_is_refused_with_a_clear_message(
    run: RunFolder, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> tuple[int, str]:
        code, out, err = call("export", *words)
        assert (out, list(tmp_path.glob("*.onnx"))) == ("", [])
        return code, err

    code, message = refused("nowhere", "policy.onnx")
    assert (code, message) == (2, "millrace: nowhere is not the folder of a run: it holds no config.yaml\n")
    code, message = refused(str(run.path), "policy.onnx")
    assert code == 2
    assert "holds no whole checkpoint yet" in message
    assert refused(str(run.path))[0] == 2

    path = add_checkpoint(run, 100, b"no weights at all")
    code, message = refused(str(run.path), "policy.onnx")
    assert code == 2
    assert f"{path / POLICY} cannot be exported: expected policy weights as a safetensors buffer" in message

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, message = refused(str(run.path), "policy.onnx")
    assert (code, message) == (1, "millrace: writing ONNX needs onnxscript: pip install 'millrace[export]'\n")


def test_help_explains_the_command(call: Call) -> None:
    code, out, _ = call("export", "--help")
    assert code == 0
    assert "usage: millrace export" in out
    assert "--checkpoint {best,latest}" in out
    assert "millrace export RUN FILE.onnx" in call("--help")[1]
