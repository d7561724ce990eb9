"""The acting policies: what a rollout asks of one, and which one an algorithm's settings name.

Actors evaluate them with numpy alone, but for the convolutions of those that see frames (`learners.acting_torch`).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.algorithms import AlgorithmSettings, CustomSettings, DqnSettings, FlowSettings, R2d2Settings, SacSettings
from learners.acting_continuous import LOG_STD_MAX, LOG_STD_MIN, BestOfNPolicy, SquashedGaussianPolicy
from learners.acting_values import GreedyPolicy, Lanes, RecurrentPolicy
from learners.custom import make_policy
from replay.schema import Field, StepSchema

__all__ = [
    "LOG_STD_MAX",
    "LOG_STD_MIN",
    "STATE",
    "TASK",
    "BestOfNPolicy",
    "GreedyPolicy",
    "Lanes",
    "Policy",
    "RecurrentPolicy",
    "SquashedGaussianPolicy",
    "acting_policy",
    "row_schema",
]

STATE = "state"  # field of a recurrent policy's state before the step
TASK = "task"  # field of the number of the task that the episode is of


class Policy(Protocol):
    """Decides in many lanes at once. What a lane remembers between decisions is the caller's, `actors.agent.Agent`."""

    @property
    def chunk(self) -> int:
        """Actions that one decision chooses, to be taken one after the other."""

    @property
    def state_size(self) -> int:
        """Numbers of the recurrent state of a lane; 0 for none."""

    def load(self, data: bytes) -> None:
        """Takes the weights of one safetensors buffer.

        Raises:
            ValueError: they are another policy's; the old weights are kept.
        """

    def act(
        self,
        observation: dict[str, NDArray[Any]],
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        """Chunks of actions (batch, chunk, action_dim) float32 in [−1, 1], or (batch, chunk) numbers of discrete actions.

        Args:
            observation: fields (batch, *shape) by name; large ones (frames) are (batch, stack, *shape).
            lanes: of each observation; None stands for first lanes at an episode's start.
            deterministic: act without noise for exploration.
            generator: of the noise.

        Raises:
            RuntimeError: no weights were loaded yet.
        """


def acting_policy(schema: StepSchema, settings: AlgorithmSettings, *, stack: int = 1) -> Policy:
    """The policy that an algorithm learns, without weights.

    Args:
        schema: of the environment's steps.
        settings: of the algorithm.
        stack: frames that the networks see at once, `env.stack`.

    Raises:
        ValueError: the policy cannot act in such an environment, or a class of the user's is no policy.
    """
    match settings:
        case SacSettings():
            return SquashedGaussianPolicy(schema, settings, stack=stack)
        case FlowSettings():
            return BestOfNPolicy(schema, settings, stack=stack)
        case R2d2Settings():  # before DqnSettings, which it extends
            return RecurrentPolicy(schema, settings, stack=stack)
        case DqnSettings():
            return GreedyPolicy(schema, settings, stack=stack)
        case CustomSettings():
            own: Policy = make_policy(schema, settings, stack=stack)
            return own
    raise ValueError(f"expected the settings of an algorithm, got {type(settings).__name__}")


def row_schema(schema: StepSchema, policy: Policy, *, tasks: bool = False) -> StepSchema:
    """The rows that actors write: the environment's steps, a recurrent policy's state before each, and with `tasks` the task."""
    extra = []
    if policy.state_size:
        extra.append(Field(STATE, "float32", (policy.state_size,)))
    if tasks:
        extra.append(Field(TASK, "int32"))
    return schema.with_extra(*extra) if extra else schema
