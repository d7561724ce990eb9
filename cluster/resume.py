"""What a resumed run may not change: the settings that a checkpoint's networks are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.checkpoint import MANIFEST, Checkpoints
from cluster.files import write_atomically
from cluster.runs import AnyConfig
from configs.algorithms import AlgorithmSettings
from configs.fields import show
from configs.llm import LlmConfig
from configs.load import dump_config
from configs.schema import RunConfig

_NETWORKS = (
    *("chain.length", "chunk", "hidden", "layer_norm", "encoder", "ensemble", "dueling", "recurrent"),
    *("normalise_observations", "learner", "policy"),
)
_DISTILS = "algorithm.target.distill_expectile"  # whether there is a distilled critic
_EMBEDDED = ("layers", "width", "heads", "inner")  # what decides on a language model that is not read from a folder


def check_resumable(before: AnyConfig, after: AnyConfig, *, frames: bool = False) -> None:
    """Look for changes that the networks of a checkpoint cannot follow.

    Step sizes, the discount, whether targets are of one step or of several, and expectiles may change (unless a distilled critic
    comes or goes by them). Of a run that trains a language model everything may but the model itself and its
    prompts: with other held-out ones it would be judged by what it was trained on.

    Args:
        before: settings of the run so far.
        after: those that it is to go on with.
        frames: whether a control run's environment shows any, on which the encoder that `auto` stands for depends.

    Raises:
        ValueError: there are some; the message has one line for each.
    """
    old, new = _made_of(before, frames), _made_of(after, frames)
    # What only one of them has hangs on a choice that differs as well.
    paths = [path for path in old if path in new and old[path] != new[path]]
    for choice in ("kind", "algorithm.name"):  # the others hang on these
        if choice in paths:
            paths = [choice]
    if len(paths) > 1 and _DISTILS in paths:
        paths.remove(_DISTILS)
    if paths:
        raise ValueError("\n".join(_refusal(path, before, after) for path in paths))


def _refusal(path: str, before: AnyConfig, after: AnyConfig) -> str:
    old, new = (show(_value(config, path)) for config in (before, after))
    return (
        f"{path}: the checkpoint was trained with {old}, received {new}; resume with --{path} {old}, or start a new run"
    )


def _value(config: AnyConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _made_of(config: AnyConfig, frames: bool) -> dict[str, Any]:
    """What decides on the networks, by the path of its setting; different values may stand for the same."""
    own = _model_of(config) if isinstance(config, LlmConfig) else _networks_of(config, frames)
    return {"kind": config.kind, **own}


def _model_of(config: LlmConfig) -> dict[str, Any]:
    """The model, and what decides which prompts there are and which of them are held out."""
    names = ["path", "lora_rank"]
    names += _EMBEDDED if config.model.path is None else ()
    names += ["lora_alpha"] if config.model.lora_rank is not None else ()
    prompts = ["seed", "tasks.source", "tasks.kwargs", "tasks.count", "eval.prompts"]
    return {path: _value(config, path) for path in (*(f"model.{name}" for name in names), *prompts)}


# What decides which tasks there are, and what networks see of them.
_TASKS = ("ids", "product", "list", "source", "kwargs", "encoding", "pad")


def _networks_of(config: RunConfig, frames: bool) -> dict[str, Any]:
    algorithm = config.algorithm
    target = algorithm.target
    paths = ["algorithm.name", "env.stack", "algorithm.head.kind", *(f"tasks.{name}" for name in _TASKS)]
    paths += [f"algorithm.head.{name}" for name in _head_settings(algorithm)]
    paths += [f"algorithm.{path}" for path in _NETWORKS if hasattr(algorithm, path.partition(".")[0])]
    found = {path: _value(config, path) for path in paths}
    # Targets of one step and of several have the same critic.
    sequences = target.kind in ("chunk", "decoupled")
    found["algorithm.target.kind"] = target.kind if sequences else "steps"
    if sequences:
        found["algorithm.target.length"] = target.length
    if algorithm.encoder == "auto":
        found["algorithm.encoder"] = "nature" if frames else "none"
    found[_DISTILS] = algorithm.distils
    return found


def _head_settings(algorithm: AlgorithmSettings) -> tuple[str, ...]:
    """Settings of the value head that decide on what its outputs stand for."""
    match algorithm.head.kind:
        case "mse":
            return ()
        case "two_hot" | "c51":
            return ("bins", "low", "high")
    return ("bins", "low", "high", "sigma")


@contextmanager
def settings_kept_with(checkpoints: Checkpoints, file: Path, config: AnyConfig) -> Iterator[None]:
    """`config` in the place of the settings in `file`; where the run fails before its next checkpoint they are put back.

    So the settings beside a checkpoint are always some that it can be resumed with.
    """
    before, newest = file.read_bytes(), _newest(checkpoints)
    write_atomically(file, dump_config(config).encode())
    try:
        yield
    except BaseException:
        if _newest(checkpoints) == newest:
            write_atomically(file, before)
        raise


def _newest(checkpoints: Checkpoints) -> tuple[Path, int] | None:
    """The newest checkpoint, and when it was written: one of the same step takes the place of the one before."""
    found = checkpoints.all()
    return (found[-1].path, (found[-1].path / MANIFEST).stat().st_mtime_ns) if found else None
