"""A policy in the lanes of one vector environment: what each lane remembers from one decision to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actors.protocol import EnvStep, FloatArray, IntArray
from learners.policy import Lanes, Policy
from replay.schema import StepSchema


class Decision(NamedTuple):
    """What the lanes of one result do next."""

    action: NDArray[Any]  # (batch, *action shape); void where the lane's episode is over
    version: int | NDArray[np.int32]  # of the policy that chose each, (batch,) or one for all; 0 for random actions
    state: FloatArray | None  # (batch, state_size): recurrent state before the action, where the policy has one


class Agent:
    """Feeds a policy and executes its chunks, in the same way for rollouts and evaluation.

    A chunk is executed open loop: a lane is asked for again when its chunk is used up or a new episode begins, which drops
    the rest. Lanes come out of phase, so a step asks the policy for some lanes only. Large fields (frames) are stacked as
    the replay does it: before an episode's start its first frame is repeated. The recurrent state is zero at an episode's
    start, and stays so while actions are random.
    """

    def __init__(
        self, policy: Policy, schema: StepSchema, lanes: int, *, stack: int = 1, first_lane: int = 0, of: int = 0
    ):
        """
        Args:
            policy: acts; loaded by the caller.
            schema: of the environment's steps.
            lanes: of the vector environment.
            stack: frames that the policy sees at once.
            first_lane: number of lane 0 among all lanes of a run.
            of: lanes of the run, 0 for these alone; with `first_lane` it gives each lane's place on the ladder of exploration,
                where those behind the last lane explore as little as that.
        """
        self.policy = policy
        self._chunk = policy.chunk
        self._action = schema.action
        rank = np.minimum(1.0, (first_lane + np.arange(lanes)) / max(1, (of or lanes) - 1))
        self._rank: FloatArray = rank.astype(np.float32)
        self._state: FloatArray = np.zeros((lanes, policy.state_size), np.float32)
        self._frames: dict[str, NDArray[Any]] = {}
        if stack > 1:
            self._frames = {f.name: np.zeros((lanes, stack, *f.shape), f.dtype) for f in schema.large}
        self._remembers = bool(self._frames) or policy.state_size > 0 or self._chunk > 1
        if self._chunk > 1:
            self._chunks = np.zeros((lanes, self._chunk, *schema.action.shape), schema.action.dtype)
            self._left = np.zeros(lanes, np.int64)  # actions of each lane's chunk that are still to be taken
            self._version = np.zeros(lanes, np.int32)  # of the policy that chose each lane's chunk

    def observe(self, result: EnvStep) -> None:
        """Take in a result; every result goes here once, before `act` or in place of it."""
        if not self._remembers:
            return
        lanes, reset = result.env_id, result.reset
        for name, frames in self._frames.items():
            frames[lanes, :-1] = frames[lanes, 1:]
            frames[lanes, -1] = result.observation[name]
        if reset.any():
            begun = lanes[reset]
            for name, frames in self._frames.items():
                frames[begun] = result.observation[name][reset][:, None]
            self._state[begun] = 0.0
            if self._chunk > 1:
                self._left[begun] = 0

    def state(self, lanes: IntArray) -> FloatArray | None:
        """Recurrent states (batch, state_size) of lanes (batch,); None if the policy has none."""
        return self._state[lanes] if self._state.shape[1] else None

    def act(
        self, result: EnvStep, *, deterministic: bool, generator: np.random.Generator, version: int = 0
    ) -> Decision:
        """The lanes' next actions after an observed result, chosen where they must be by the policy, whose version is given.

        Where an episode is over the environment ignores the action, so the policy is not asked.
        """
        lanes, over = result.env_id, result.terminated | result.truncated
        if not (self._remembers or over.any()):  # the common case, at the cost of the policy alone
            memory = Lanes(self._rank[lanes], self._state[: len(lanes)])
            action = self.policy.act(result.observation, memory, deterministic=deterministic, generator=generator)
            return Decision(action[:, 0], version, None)
        before, going = self.state(lanes), ~over
        asked = going if self._chunk == 1 else going & (self._left[lanes] == 0)
        chosen = self._ask(result, asked, deterministic=deterministic, generator=generator)
        if self._chunk == 1:
            if chosen is not None and len(chosen) == len(lanes):
                return Decision(chosen[:, 0], version, before)
            action = np.zeros((len(lanes), *self._action.shape), self._action.dtype)
            if chosen is not None:
                action[asked] = chosen[:, 0]
            return Decision(action, version, before)
        if chosen is not None:
            who = lanes[asked]
            self._chunks[who], self._left[who], self._version[who] = chosen, self._chunk, version
        action = self._chunks[lanes, (self._chunk - self._left[lanes]) % self._chunk]
        action[over] = 0
        self._left[lanes] -= 1  # where an episode is over too: the reset that follows sets it anew
        return Decision(action, self._version[lanes], before)

    def _ask(
        self, result: EnvStep, asked: NDArray[np.bool_], *, deterministic: bool, generator: np.random.Generator
    ) -> NDArray[Any] | None:
        """Chunks (asked, chunk, *action shape) for the lanes `asked` (batch,) of a result; None if there are none."""
        lanes, observation = result.env_id, result.observation
        if not asked.all():
            if not asked.any():
                return None
            lanes = lanes[asked]
            observation = {name: values[asked] for name, values in observation.items() if name not in self._frames}
        if self._frames:
            observation = {**observation, **{name: frames[lanes] for name, frames in self._frames.items()}}
        memory = Lanes(self._rank[lanes], self._state[lanes])
        chosen = self.policy.act(observation, memory, deterministic=deterministic, generator=generator)
        if memory.state.shape[1]:
            self._state[lanes] = memory.state
        return chosen
