"""The policy of a run as an ONNX file, which runtimes without Python can evaluate: `millrace export`.

The graph is that of `learners.policy_modules.PolicyModule`, normalisation of observations and scaling of actions included.
A file is written only after it has decided as the torch module and as the actors' own policy do.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from actors import envpool_env, gymnasium_env
from actors.env_tasks import EnvTask
from actors.spaces import SpaceMap
from actors.task_set import TaskSet
from cluster import parts
from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.files import write_atomically
from cluster.onnx_graph import PACKAGES, write_graph
from cluster.recorder import LEARNER, POLICY
from cluster.runs import RunFolder
from configs.schema import EnvSettings, RunConfig
from learners.policy import Lanes, Policy

if TYPE_CHECKING:
    from learners.policy_modules import ActionSpace, PolicyModule

TOLERANCE = 1e-5  # of actions in [−1, 1], values in units of the largest, and states
ROUNDING = 4.0  # times float32's own rounding by which results may differ where that is more
MOST = 1e-3  # that they may differ by all the same
COUNTS = (1, 2, 64)  # decisions in the batches on which a graph is tried


@dataclass(frozen=True)
class Differences:
    """The largest differences found: of actions in [−1, 1], values in units of the largest (at least 1), and states."""

    torch: float  # between the file in onnxruntime and the torch module
    acting: float  # between the file in onnxruntime and the policy that actors run, at most
    rounding: float  # between the torch module in float32 and in float64

    @property
    def allowed(self) -> float:
        """What two right answers in float32 may differ by."""
        return min(max(TOLERANCE, ROUNDING * self.rounding), MOST)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    checkpoint: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, Any]
    differences: Differences

    def to_json(self) -> dict[str, Any]:
        """What `millrace export --json` prints."""
        return {
            "path": str(self.path),
            "checkpoint": str(self.checkpoint),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            **self.metadata,
            "difference_from_torch": self.differences.torch,
            "difference_from_actors": self.differences.acting,
        }


def export(run: Path, to: Path, *, checkpoint: Literal["best", "latest"] = "best") -> Exported:
    """Write the deterministic policy of a run as ONNX.

    Args:
        run: folder of the run.
        to: the file; folders of it are made, and one that is there is replaced.
        checkpoint: the one with the best evaluation, or where none has one or `latest` is asked for, the newest.

    Raises:
        FileNotFoundError: there is no such run, or it holds no whole checkpoint with a policy.
        ValueError: the run trains a language model; the checkpoint's policy does not fit the run's settings, or the environment is unknown.
        RuntimeError: a package is missing, the policy cannot be a graph, or the graph decides otherwise than the policy.
    """
    folder = RunFolder.open(run)
    config = folder.config
    if config.kind == "llm":
        raise ValueError(f"{run} holds a language model; `millrace export {run} FOLDER` writes it for transformers")
    checkpoints = Checkpoints(folder.checkpoints, keep=config.checkpoints.keep)
    found = (checkpoints.best() if checkpoint == "best" else None) or checkpoints.latest()
    if found is None:
        raise FileNotFoundError(f"{run} holds no whole checkpoint yet")
    check_packages()
    data = (found.path / POLICY).read_bytes()
    module, policy, spaces = build(config, data, source=found.path / POLICY)
    metadata = _metadata(config, found, spaces)
    graph = to_onnx(module, metadata)
    differences = compare(graph, module, policy, spaces, seed=config.seed)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, graph)
    return Exported(to, found.path, module.inputs, module.outputs, metadata, differences)


def check_packages() -> None:
    """Raises RuntimeError if a package that writes or runs ONNX is missing."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            raise RuntimeError(f"writing ONNX needs {package}: pip install 'millrace[export]'") from None


def build(config: RunConfig, data: bytes, *, source: Path | None = None) -> tuple[PolicyModule, Policy, SpaceMap]:
    """The torch module of a policy's weights, the policy as actors run it, and the environment's spaces.

    Raises:
        ValueError: the weights are no policy of such a run; the message names `source`.
    """
    from learners.policy_modules import PolicyModule

    tasks = parts.make_tasks(config)
    schema = parts.env_schema(config, tasks)
    spaces = space_map(config.env) if tasks is None else _common_actions(config, tasks)
    policy = parts.make_policy(config, schema)
    try:
        policy.load(data)
        module = PolicyModule(schema, config.algorithm, action_space(spaces), data, stack=config.env.stack)
    except ValueError as error:
        raise ValueError(f"{source or 'the policy'} cannot be exported: {error}") from error
    return module.eval(), policy, spaces


def space_map(settings: EnvSettings) -> SpaceMap:
    """The spaces of an environment, by the library that `actors.envs` takes for it."""
    if settings.backend != "gymnasium" and settings.id in envpool_env.ids():
        kwargs = envpool_env.single_frames(settings.id, settings.kwargs) if settings.stack > 1 else settings.kwargs
        return envpool_env.space_map(settings.id, kwargs)
    return gymnasium_env.space_map(settings.id, settings.kwargs)


def _common_actions(config: RunConfig, tasks: TaskSet[EnvTask]) -> SpaceMap:
    """The spaces of the task with the longest actions, of which those of all others are the beginning.

    Raises:
        ValueError: tasks take the same action of the policy for different ones of their own.
    """
    of_ids = {task.id: task for task in tasks}  # arguments leave the actions as they are
    found = [(task.name, space_map(task.settings(config.env))) for task in of_ids.values()]
    first, widest = max(found, key=lambda one: one[1].schema.action.shape)
    space = action_space(widest)
    for name, spaces in found:
        other = action_space(spaces)
        length = len(other.low)
        if (
            other.start != space.start
            or not np.array_equal(other.low, space.low[:length])
            or not np.array_equal(other.high, space.high[:length])
        ):
            raise ValueError(
                f"the policy cannot be exported for tasks {first!r} and {name!r} together: their actions have other bounds"
            )
    return widest


def action_space(spaces: SpaceMap) -> ActionSpace:
    """The actions that an environment takes."""
    from learners.policy_modules import ActionSpace

    field = spaces.schema.action
    none = np.zeros(0, np.float32)
    if spaces.actions is not None:
        return ActionSpace((), none, none, int(spaces.action(np.zeros(1, np.int64))[0]))
    # What lies beyond [−1, 1] is cut at the bounds, so these are exact.
    low = spaces.action(np.full((1, *field.shape), -2.0, np.float32))
    high = spaces.action(np.full((1, *field.shape), 2.0, np.float32))
    return ActionSpace(low.shape[1:], low.reshape(-1), high.reshape(-1))


def to_onnx(module: PolicyModule, metadata: dict[str, Any]) -> bytes:
    """The module as a serialised ONNX model with a dynamic batch size; `metadata` becomes properties, as JSON.

    Raises:
        RuntimeError: something in the policy, such as a user's encoder, has no counterpart in ONNX.
    """
    import onnx

    graph = write_graph(module, optimise=True)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(graph, texts)
    data: bytes = graph.SerializeToString()
    return data


def compare(graph: bytes, module: PolicyModule, policy: Policy, spaces: SpaceMap, *, seed: int) -> Differences:
    """Decide on random observations by the graph, the torch module and the acting policy; the largest differences.

    Raises:
        RuntimeError: they are more than 1e-5, and more than what float32 rounds.
    """
    import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import torch

    try:
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise RuntimeError(f"onnxruntime does not take the graph: {error}") from error
    generator = np.random.default_rng(seed)
    largest = np.zeros(3)
    for count in COUNTS:
        inputs = module.example(count, generator)
        if "noise" in module.inputs:  # the acting policy draws it, as the first that it draws
            noise = np.random.default_rng(seed).standard_normal(tuple(inputs[-1].shape), np.float32)
            inputs = (*inputs[:-1], torch.from_numpy(noise))
        given = {name: values.numpy() for name, values in zip(module.inputs, inputs, strict=True)}
        made = dict(zip(module.outputs, session.run(list(module.outputs), given), strict=True))
        acted = _acted(policy, spaces, given, seed=seed)
        with torch.inference_mode():
            expected, exact = (
                {name: values.numpy() for name, values in zip(module.outputs, found, strict=True)}
                for found in (module(*inputs), module.evaluate(inputs, torch.float64))
            )
            # Of two proposals of equal value either is right, so actions are compared with the torch module's choices.
            of_graph = module.distance(inputs, torch.tensor(made["action"])).max()
            of_actors = module.distance(inputs, torch.tensor(acted["action"])).max()
            rounded = module.distance(inputs, torch.tensor(expected["action"]), torch.float64).max()
        actions = np.array([of_graph, of_graph + of_actors, rounded], np.float64)
        others = [_apart(made, expected), _apart(made, acted), _apart(expected, exact)]
        largest = np.maximum(largest, np.maximum(actions, others))
    differences = Differences(*map(float, largest))
    for what, size in (("torch module", differences.torch), ("acting policy", differences.acting)):
        if not size <= differences.allowed:  # also where it is NaN
            raise RuntimeError(
                f"the ONNX policy differs from the {what} by {size:.2g}, and at most {differences.allowed:.2g} is allowed; "
                "nothing was written"
            )
    return differences


def _acted(policy: Policy, spaces: SpaceMap, given: dict[str, NDArray[Any]], *, seed: int) -> dict[str, NDArray[Any]]:
    """What the acting policy decides, by the names and in the units of the graph's outputs."""
    observation = {name: values for name, values in given.items() if name not in ("noise", "state")}
    count = len(next(iter(observation.values())))
    lanes = Lanes(np.zeros(count, np.float32), given["state"].copy()) if policy.state_size else None
    action = policy.act(observation, lanes, deterministic=True, generator=np.random.default_rng(seed))
    in_units = spaces.action(action.reshape(-1, *action.shape[2:]))
    chunk = () if policy.chunk == 1 else (policy.chunk,)
    found = {"action": in_units.reshape(count, *chunk, *in_units.shape[1:])}
    return found if lanes is None else {**found, "next_state": lanes.state}


def _apart(some: dict[str, NDArray[Any]], others: dict[str, NDArray[Any]]) -> float:
    """The largest difference of what both hold besides actions, in units of the largest absolute value, and at least 1."""
    largest = 0.0
    for name in some.keys() & others.keys() - {"action"}:
        apart = np.abs(np.subtract(some[name], others[name], dtype=np.float64)).max()
        largest = np.maximum(largest, apart / max(1.0, np.abs(others[name]).max()))  # keeps a NaN
    return largest


def _metadata(config: RunConfig, checkpoint: Checkpoint, spaces: SpaceMap) -> dict[str, Any]:
    """What the file says of itself."""
    metadata: dict[str, Any] = {
        "run": config.name or "",
        "environment": config.env_names if len(config.env_names) > 1 else config.env_names[0],
        "algorithm": config.algorithm.name,
        "policy_version": _policy_version(checkpoint),
        "env_steps": checkpoint.env_steps,
        "updates": checkpoint.updates,
        "success" if config.has_tasks else "mean_return": checkpoint.eval_mean_return,
        "chunk": config.algorithm.chunk,
        "stack": config.env.stack,
    }
    space = action_space(spaces)
    if spaces.actions is not None:
        return {**metadata, "actions": spaces.actions, "action_start": space.start}
    return {**metadata, "action_low": space.low.tolist(), "action_high": space.high.tolist()}


def _policy_version(checkpoint: Checkpoint) -> int | None:
    """The newest policy version when the checkpoint was written."""
    try:
        with safe_open(checkpoint.path / LEARNER, framework="numpy") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {}).get("json", "{}"))
    except (OSError, SafetensorError, ValueError):
        return None
    return found.get("version")
