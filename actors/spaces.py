"""From the spaces of an environment to the fields of a step, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.protocol import EnvError, Observation
from replay.schema import OBSERVATION, Field, StepSchema


class SpaceMap:
    """Translates observations and actions between one environment's spaces and its step schema.

    A Dict observation, nested or not, becomes one field `observation/<key>[/<key>…]` per entry; float64 becomes float32
    and every other type stays. A Box action is flattened and scaled from [−1, 1] to its bounds; a Discrete action is its
    number, counted from 0.

    Raises:
        EnvError: a space has no fixed-shape fields, or an action space has no finite bounds.
    """

    def __init__(self, env_id: str, observation: Any, action: Any) -> None:
        self._paths: dict[str, tuple[str, ...]] = {}
        fields: dict[str, Field] = {}
        for path, space in _leaves(observation, ()):
            name = "/".join((OBSERVATION, *map(str, path)))
            if name in fields:
                raise EnvError(f"environment {env_id!r}: two observation keys make the field {name!r}; rename one")
            fields[name] = _observation_field(env_id, name, space)
            self._paths[name] = path
        if not fields:
            raise EnvError(f"environment {env_id!r}: its observation space has no entries: {observation}")
        self.actions: int | None = None  # number of discrete actions; None where actions are continuous
        if isinstance(action, spaces.Discrete):
            self.actions, self._start = int(action.n), int(action.start)
            action_field = Field("action", "int64", choices=self.actions)
        elif isinstance(action, spaces.Box) and np.issubdtype(action.dtype, np.floating):
            low, high = action.low.astype(np.float64), action.high.astype(np.float64)
            if not (np.isfinite(low).all() and np.isfinite(high).all() and np.isfinite(high - low).all()):
                raise EnvError(
                    f"environment {env_id!r}: its action space {action} has no finite bounds to scale [−1, 1] to; "
                    "wrap the environment so that its action space is a bounded Box"
                )
            # float32 as the policy's actions are; the bounds hold to the last bit because of the clip in `action`.
            self._low, self._high = low.astype(np.float32).reshape(-1), high.astype(np.float32).reshape(-1)
            self._half, self._middle = (self._high - self._low) / 2, (self._high + self._low) / 2
            self._shape = action.shape
            action_field = Field("action", "float32", (max(1, int(np.prod(action.shape))),))
        else:
            raise EnvError(
                f"environment {env_id!r}: its action space {action} is none of Box of floats and Discrete; wrap the environment"
            )
        self._dtypes = {name: np.dtype(field.dtype) for name, field in fields.items()}
        self.schema = StepSchema(fields, action_field)

    def observation(self, observation: Any) -> Observation:
        """Named fields (batch, *shape) of a batch of observations."""
        named = {}
        for name, path in self._paths.items():
            values = observation
            for key in path:
                values = values[key]
            named[name] = np.asarray(values, self._dtypes[name])
        return named

    def action(self, action: NDArray[Any]) -> NDArray[Any]:
        """Actions as the environment takes them, (batch, *its shape), from (batch, action_dim) in [−1, 1] or (batch,) numbers."""
        if self.actions is not None:
            return action + self._start
        scaled = action * self._half + self._middle
        np.clip(scaled, self._low, self._high, out=scaled)
        return scaled.reshape(len(action), *self._shape)

    def sample(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        """Uniformly random actions before scaling: (count, action_dim) in [−1, 1], or (count,) numbers."""
        if self.actions is not None:
            return generator.integers(self.actions, size=count)
        return generator.uniform(-1.0, 1.0, (count, *self.schema.action.shape)).astype(np.float32)


def lane_seeds(seed: int, lanes: int) -> list[int]:
    """Independent seeds for the environments of one actor, each in 0 … 2³¹ − 1."""
    return [int(value) & 0x7FFFFFFF for value in np.random.SeedSequence(seed).generate_state(lanes)]


def _leaves(space: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(space, Mapping | spaces.Dict):
        for key in space:
            yield from _leaves(space[key], (*path, key))
    else:
        yield path, space


def _observation_field(env_id: str, name: str, space: Any) -> Field:
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        dtype, shape = np.dtype(space.dtype), tuple(int(size) for size in space.shape or ())
        if dtype == np.float64:
            dtype = np.dtype(np.float32)
        if dtype.kind in "fiub":
            return Field(name, dtype.name, shape)
    raise EnvError(
        f"environment {env_id!r}: {name} has the space {space}; steps hold arrays of fixed shape (Box, Discrete, "
        "MultiDiscrete, MultiBinary and Dicts of them), so wrap the environment to observe one of these"
    )
