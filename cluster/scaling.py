"""The settings of a run with other numbers of processes."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError

from configs.llm import LlmConfig
from configs.load import ConfigError
from configs.schema import RunConfig

Config = TypeVar("Config", RunConfig, LlmConfig)


def scaled(config: Config, *, actors: int | None, shards: int | None) -> Config:
    """The settings with other numbers of processes, None for as many as now; each shard keeps its capacity.

    Raises:
        ConfigError: there cannot be so many.
    """
    if isinstance(config, RunConfig):
        return _scaled_control(config, actors=actors, shards=shards)
    if shards not in (None, config.replay.shards):
        raise ConfigError(
            f"replay.shards: the queue of a run that trains a language model keeps its {config.replay.shards} shards while it "
            "goes; stop it and go on with --resume and another --replay.shards"
        )
    return _with(config, {"actors": {"count": actors}})


def _scaled_control(config: RunConfig, *, actors: int | None, shards: int | None) -> RunConfig:
    from cluster.parts import check_limits

    each = config.replay.capacity // config.replay.shards
    replay = {"shards": shards, "capacity": None if shards is None else each * shards}
    changed = _with(config, {"actors": {"count": actors}, "replay": replay})
    check_limits(changed)
    return changed


def _with(config: Config, changes: dict[str, dict[str, int | None]]) -> Config:
    values = config.model_dump()
    for group, settings in changes.items():
        values[group] |= {name: value for name, value in settings.items() if value is not None}
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        found = [
            (".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, "), each["input"])
            for each in error.errors()
        ]
        lines = [f"{path}: {text}, received {value}" if path else text for path, text, value in found]
        raise ConfigError("\n".join(lines)) from None
