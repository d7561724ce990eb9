"""What a rollout needs from environments and from a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from learners.policy import Policy
from replay.schema import StepSchema

__all__ = ["BoolArray", "EnvError", "EnvStep", "FloatArray", "IntArray", "Observation", "Policy", "VectorEnv"]

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
Observation = dict[str, NDArray[Any]]  # schema field name → (batch, *shape)


class EnvError(ValueError):
    """An environment is unknown, cannot be built, or has spaces that do not fit the step schema."""


@dataclass(slots=True)
class EnvStep:
    """Results of `batch` lanes, each at most once.

    Of `terminated` and `truncated` at most one is True: where an environment sets both, the episode terminated.
    """

    env_id: IntArray  # (batch,) lanes the results belong to
    observation: Observation  # (batch, *shape) each
    reward: FloatArray  # (batch,)
    terminated: BoolArray  # (batch,)
    truncated: BoolArray  # (batch,)
    reset: BoolArray  # (batch,) first observation of a new episode: reward and the action sent before are void
    broken: BoolArray  # (batch,) the environment raised: a truncated episode whose last action has no result
    success: BoolArray | None = None  # (batch,) the success flag in the environment's info, where one was asked for
    task: IntArray | None = None  # (batch,) number of each lane's task, where there are several


class VectorEnv(Protocol):
    """Lanes stepped together. Lanes are numbered from 0; a result is answered by one action for the same lane.

    With `batch_size == num_envs` results come in the order of the lanes; below it in the order they are finished. A lane
    whose environment is not there yet (`actors.task_env`) is missing from them.
    """

    @property
    def num_envs(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def schema(self) -> StepSchema: ...

    def start(self) -> None:
        """Reset every lane from its own seed. Called again, it begins again: the same actions give the same results."""

    def recv(self) -> EnvStep:
        """Wait for the results of `batch_size` lanes; of fewer where some have none coming."""

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        """Act in the lanes `env_id` (batch,): `action` (batch, action_dim) in [−1, 1], or (batch,) numbers of discrete actions."""

    def sample_actions(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        """`count` uniformly random actions, as `send` takes them."""

    def frame(self, lane: int) -> NDArray[np.uint8]:
        """Picture of a lane, (height, width, 3); the environments must have been made with `render=True`."""

    def close(self) -> None:
        """Release the environments and their threads."""
