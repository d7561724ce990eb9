"""The acting network as others run it: it explores as actors do, by numpy and ONNX Runtime, and new weights take its graph over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped,unused-ignore]
import pytest
import torch
from safetensors.numpy import load, save

from cluster import acting_export
from cluster.acting_export import PolicyExporter
from cluster.export import action_space
from cluster.onnx_graph import write_graph
from configs.algorithms import CustomSettings, DqnSettings
from configs.schema import EnvSettings, RunConfig
from learners.acting_modules import RANK, STATE, UNIFORM, ActingModule
from learners.policy import Lanes, Policy
from tests import test_export_policy
from tests.test_export_policy import BOX, NUMBERS, Case, in_units, make

CUSTOM = CustomSettings(learner="tests.test_custom:Learner", policy="tests.test_custom:Policy")
GRAPHS = ["sac-user", "flow-hl_gauss-chunk", "dqn-c51-dueling-frames", "r2d2-hl_gauss"]  # each kind of network once


def exploring(case: Case) -> Case:
    """With so much exploration that half of the first lane's actions and some of the others' are random."""
    if isinstance(case.settings, DqnSettings):
        return case._replace(settings=case.settings.model_copy(update={"epsilon": 0.5, "epsilon_ladder": 2.0}))
    return case


CASES = {name: exploring(case) for name, case in test_export_policy.CASES.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Env(gymnasium.Env[Any, Any]):
    """An environment with the spaces of a case, never stepped."""

    def __init__(self, case: str) -> None:
        settings = CASES[case].settings
        self.observation_space = CASES[case].observation
        discrete = isinstance(settings, DqnSettings)
        self.action_space = NUMBERS if discrete else BOX


def config_of(name: str) -> RunConfig:
    case = CASES[name]
    env = EnvSettings(id="tests.test_acting_export:Env", kwargs={"case": name}, stack=case.stack)
    return RunConfig(env=env, algorithm=case.settings)  # type: ignore[arg-type]


def module_of(name: str, data: bytes) -> ActingModule:
    case = CASES[name]
    return ActingModule(case.spaces.schema, case.settings, action_space(case.spaces), data, stack=case.stack).eval()


def act(policy: Policy, settings: Any, given: dict[str, np.ndarray], *, seed: int) -> dict[str, np.ndarray]:
    """What an actor does with the observations, ranks and states of `given`, into which go the numbers that it draws."""
    count = len(next(iter(given.values())))
    fields = {name: values for name, values in given.items() if name.startswith("observation")}
    lanes = Lanes(
        given.get(RANK, np.zeros(count, np.float32)), given.get(STATE, np.zeros((count, 0), np.float32)).copy()
    )
    row = policy.act(fields, lanes, deterministic=False, generator=np.random.default_rng(seed))
    drawn = np.random.default_rng(seed)
    if "noise" in given:
        given["noise"] = drawn.standard_normal(given["noise"].shape, np.float32)
    else:
        uniform = given[UNIFORM]
        if settings.chain.length > 1:
            uniform[:, 2] = (drawn.integers(settings.chain.length) + 0.5) / settings.chain.length
        uniform[:, 0] = drawn.random(count)
        explores = uniform[:, 0] < settings.epsilon ** (1 + settings.epsilon_ladder * lanes.rank)
        sequences = 3**settings.chunk
        uniform[explores, 1] = (drawn.integers(sequences, size=int(explores.sum())) + 0.5) / sequences
    if policy.chunk == 1:
        row = row[:, 0]
    return {"action": in_units(row), "row_action": row, **({"next_state": lanes.state} if policy.state_size else {})}


def check_same(made: dict[str, np.ndarray], acted: dict[str, np.ndarray]) -> None:
    assert made.keys() == acted.keys()
    for name, expected in acted.items():
        assert (made[name].shape, made[name].dtype) == (expected.shape, expected.dtype)
        # Actions to be taken lie in bounds 29.5 apart.
        np.testing.assert_allclose(made[name], expected, atol=2e-4 if name == "action" else 1e-5, rtol=0, err_msg=name)


def example(module: ActingModule, count: int, *, seed: int = 1) -> dict[str, np.ndarray]:
    inputs = module.example(count, np.random.default_rng(seed))
    return {name: values.numpy() for name, values in zip(module.inputs, inputs, strict=True)}


def run(graph: bytes, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_modules_act_as_actors_do(name: str) -> None:
    parts = make(CASES[name])
    module = module_of(name, parts.data)
    given = example(module, 33)
    acted = act(parts.policy, CASES[name].settings, given, seed=5)
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(given[key]) for key in module.inputs))
    check_same({k: v.numpy() for k, v in zip(module.outputs, outputs, strict=True)}, acted)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_act_as_actors_do_with_the_first_weights_and_with_later_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    exporter = PolicyExporter(config_of(name), case.spaces.schema)
    written = []

    def counted(module: ActingModule, *, optimise: bool) -> onnx.ModelProto:
        written.append(module)
        return write_graph(module, optimise=optimise)

    monkeypatch.setattr(acting_export, "write_graph", counted)
    for version, updates in ((3, 1), (4, 3), (5, 2)):
        parts = make(case, updates=updates)
        exported = exporter.export(version, parts.data)
        module = module_of(name, parts.data)
        for count in (1, 9):
            given = example(module, count, seed=version)
            acted = act(parts.policy, case.settings, given, seed=count)
            check_same(run(exported.onnx, given), acted)
        assert (exported.version, exported.weights) == (version, parts.data)
        model = onnx.load_from_string(exported.onnx)
        onnx.checker.check_model(model, full_check=True)
        assert {p.key: p.value for p in model.metadata_props}["policy_version"] == str(version)
    assert len(written) == 1  # the other weights have gone into the first one's graph
    assert [(p.name, p.dtype, p.shape) for p in exported.inputs] == [
        (key, values.dtype.name, values.shape[1:]) for key, values in given.items()
    ]
    assert [(p.name, p.dtype, p.shape) for p in exported.outputs] == [
        (key, values.dtype.name, values.shape[1:]) for key, values in acted.items()
    ]


def test_without_noise_actions_are_those_of_evaluation() -> None:
    name = "sac-normalised-chunk"
    parts = make(CASES[name])
    exporter = PolicyExporter(config_of(name), CASES[name].spaces.schema)
    given = example(module_of(name, parts.data), 20)
    given["noise"][:] = 0.0
    made = run(exporter.export(1, parts.data).onnx, given)
    fields = {key: values for key, values in given.items() if key != "noise"}
    expected = parts.policy.act(fields, deterministic=True, generator=np.random.default_rng(0))
    np.testing.assert_allclose(made["row_action"], expected, atol=1e-5)


def test_lanes_explore_as_often_as_their_ranks_say() -> None:
    name = "dqn-mse"
    module = module_of(name, make(CASES[name]).data)
    count = 30_000
    given = {key: np.repeat(values, count, 0) for key, values in example(module, 1).items()}
    generator = np.random.default_rng(0)
    given[UNIFORM] = generator.random((count, 2), np.float32)
    for rank in (0.0, 0.5, 1.0):
        given[RANK][:] = rank
        with torch.inference_mode():
            row = module(*(torch.from_numpy(given[key]) for key in module.inputs))[1].numpy()
        share = np.bincount(row, minlength=3) / count
        epsilon = 0.5 ** (1 + 2 * rank)
        np.testing.assert_allclose(sorted(share), [epsilon / 3, epsilon / 3, 1 - 2 * epsilon / 3], atol=0.01)


def test_weights_of_another_run_are_refused_and_the_old_graph_stays() -> None:
    name = "sac"
    parts = make(CASES[name])
    exporter = PolicyExporter(config_of(name), CASES[name].spaces.schema)
    before = exporter.export(1, parts.data)
    tensors = load(parts.data)
    tensors["policy.0.bias"] = tensors["policy.0.bias"][..., :-1].copy()
    with pytest.raises(ValueError, match="actor and learner must have the same environment"):
        exporter.export(2, save(tensors))
    assert exporter.export(1, parts.data) == before


def test_a_policy_of_the_users_is_refused() -> None:
    own = RunConfig(env=EnvSettings(id="tests.test_acting_export:Env", kwargs={"case": "sac"}), algorithm=CUSTOM)
    exporter = PolicyExporter(own, CASES["sac"].spaces.schema)
    with pytest.raises(ValueError, match="policies of sac, flow, dqn and r2d2"):
        exporter.export(1, save({}))
