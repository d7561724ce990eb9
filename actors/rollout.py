"""The actor's loop: receive results, act, send, and write the steps that became complete."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from actors.agent import Agent, Decision
from actors.protocol import BoolArray, EnvStep, IntArray, Policy, VectorEnv
from actors.returns import ReturnExtent
from learners.policy import STATE, TASK, row_schema
from replay.writers import Writer

EPISODE_LOG = 1_000  # finished episodes kept


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode; `index` counts from 0 over all lanes of the rollout."""

    index: int
    return_: float  # sum of rewards, not discounted
    length: int  # environment steps
    terminated: bool  # False: truncated
    lane: int
    task: int | None = None  # number of its task, where there are several


class Rollout:
    """Steps a vector of environments with a policy and writes RLDS steps (Ramos et al. 2021, arXiv 2111.02767).

    The row of step t waits in `_pending` until its reward is known. At the end of an episode a final row follows at once:
    the last observation, action and reward void. Where an environment raised, the action's result is unknown, so the
    waiting row itself becomes the final one. For one thread only.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        writer: Writer,
        *,
        random_steps: int,
        rows_per_write: int,
        write_every_s: float,
        seed: int,
        stack: int = 1,
        first_lane: int = 0,
        of_lanes: int = 0,
        discount: float | None = None,
        tasks: bool = False,
    ) -> None:
        """Starts the environments.

        Args:
            env: lanes to step; closed by `close`.
            policy: acts once `random_steps` are over and `set_policy` has given it weights.
            writer: takes the rows; closed by `close`.
            random_steps: steps of this rollout with uniformly random actions.
            rows_per_write: rows gathered before they are handed over, unless one `recv` brings more.
            write_every_s: longest time, in seconds, that a row waits to be handed over while the environments answer.
            seed: of the action noise and the random actions.
            stack: frames that the policy sees at once.
            first_lane: number of this rollout's lane 0 among all lanes of the run, for the ladder of exploration.
            of_lanes: lanes of the run; 0 for this rollout's alone.
            discount: of the returns whose extent is to be found; None finds none.
            tasks: the environments tell tasks apart: each row has the number of its episode's.
        """
        self.version = 0  # of the policy; 0 is none yet
        self.episodes: deque[Episode] = deque(maxlen=EPISODE_LOG)
        self._env = env
        self._agent = Agent(policy, env.schema, env.num_envs, stack=stack, first_lane=first_lane, of=of_lanes)
        self._extent = None if discount is None else ReturnExtent(env.num_envs, discount)
        self._writer = writer
        self._random_steps = random_steps
        self._rows_per_write = rows_per_write
        self._write_every_s = write_every_s
        self._generator = np.random.default_rng(seed)

        self._tasks = tasks
        schema = row_schema(env.schema, policy, tasks=tasks)
        self._pending = schema.zeros(env.num_envs)  # (num_envs,) the row of each lane whose reward is not known yet
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, np.int64)
        # One recv adds at most a transition and a final row per result to what waits already.
        room = max(rows_per_write, env.batch_size) + 2 * env.batch_size
        self._rows = schema.zeros(room)
        self._lanes: IntArray = np.zeros(room, np.int32)
        self._waiting = 0  # rows in `_rows` not handed over
        self._waiting_since = 0.0
        # Whole rows as opaque bytes: numpy copies structured rows field by field otherwise.
        opaque = np.dtype((np.void, schema.dtype.itemsize))
        self._pending_bytes, self._rows_bytes = self._pending.view(opaque), self._rows.view(opaque)

        self._env_steps = self._episode_count = self._broken_count = 0
        self._infer_s = self._env_s = self._write_s = 0.0
        self._began = time.perf_counter()
        env.start()

    def set_policy(self, version: int, data: bytes) -> None:
        """Decide with these weights from the next step on; `data` is one flat safetensors buffer."""
        self._agent.policy.load(data)
        self.version = version

    def step(self) -> int:
        """One receive, act, send; hands over the rows that are due. Returns the environment steps that were completed."""
        began = time.perf_counter()
        result = self._env.recv()
        received = time.perf_counter()
        decision = self._decide(result)
        acted = time.perf_counter()
        self._env.send(decision.action, result.env_id)
        sent = time.perf_counter()
        # Rows are made after `send`, while the environments already compute.
        steps = self._complete(result, decision)
        self._begin(result, decision)
        if self._waiting and (
            # What the next recv completes must fit as well: a write never holds more transitions than announced.
            self._waiting + self._env.batch_size > self._rows_per_write
            or time.perf_counter() - self._waiting_since >= self._write_every_s
        ):
            self._hand_over()
        self._env_s += received - began + sent - acted
        self._infer_s += acted - received
        return steps

    def stats(self) -> dict[str, float]:
        """Counts and seconds since the start: acting, in the environments, waiting for the writer, and in all."""
        return {
            "env_steps": self._env_steps,
            "episodes": self._episode_count,
            "broken_episodes": self._broken_count,
            "infer_s": self._infer_s,
            "env_s": self._env_s,
            "write_s": self._write_s,
            "wall_s": time.perf_counter() - self._began,
        }

    def return_extent(self) -> tuple[float, float] | None:
        """Lowest and highest discounted return-to-go of recent steps (`ReturnExtent`). From any thread.

        None before the first reward, and without `discount`.
        """
        return None if self._extent is None else self._extent.extent()

    def close(self) -> None:
        """Write what is complete, and end the writer and the environments; open episodes are closed by the shard."""
        try:
            self._hand_over()
            self._writer.close()
        finally:
            self._env.close()

    def _decide(self, result: EnvStep) -> Decision:
        """Random actions at first, each for itself; then those of the policy."""
        self._agent.observe(result)
        if self.version == 0 or self._env_steps < self._random_steps:
            action = self._env.sample_actions(len(result.env_id), self._generator)
            return Decision(action, 0, self._agent.state(result.env_id))
        return self._agent.act(result, deterministic=False, generator=self._generator, version=self.version)

    def _complete(self, result: EnvStep, decision: Decision) -> int:
        """Write the rows whose rewards have come, and end the episodes that are over."""
        stepped = ~(result.reset | result.broken)
        lanes, reward = result.env_id, result.reward
        if not stepped.all():
            lanes, reward = lanes[stepped], reward[stepped]
        count = len(lanes)
        if count:
            self._pending["reward"][lanes] = reward
            begin, end = self._reserve(lanes)
            # mode="clip" writes into `out` without a buffer between; lanes are never out of bounds.
            self._pending_bytes.take(lanes, out=self._rows_bytes[begin:end], mode="clip")
            self._return[lanes] += reward
            self._length[lanes] += 1
            self._env_steps += count
            if self._extent is not None:
                self._extent.add(lanes, reward)
        ended = result.terminated | result.truncated
        if ended.any():
            self._end(result, ended, decision)
        return count

    def _begin(self, result: EnvStep, decision: Decision) -> None:
        """Keep the step that each lane now takes, until its reward is known."""
        pending, lanes = self._pending, result.env_id
        for name, values in result.observation.items():
            pending[name][lanes] = values
        pending["action"][lanes] = decision.action
        pending["is_first"][lanes] = result.reset
        pending["policy_version"][lanes] = decision.version
        if decision.state is not None:
            pending[STATE][lanes] = decision.state
        if self._tasks:
            pending[TASK][lanes] = result.task

    def _end(self, result: EnvStep, ended: BoolArray, decision: Decision) -> None:
        """Write the final rows of the episodes that are over, and log those that did not break."""
        whole = ended & ~result.broken
        if whole.any():
            lanes = result.env_id[whole]
            begin, end = self._reserve(lanes)
            rows = self._rows[begin:end]
            rows.view(np.uint8)[:] = 0
            for name, values in result.observation.items():
                rows[name] = values[whole]
            if decision.state is not None:
                rows[STATE] = decision.state[whole]
            if self._tasks:
                rows[TASK] = self._pending[TASK][lanes]
            rows["policy_version"] = self._pending["policy_version"][lanes]
            rows["is_last"] = True
            rows["is_terminal"] = result.terminated[whole]
            for lane, terminated in zip(lanes.tolist(), result.terminated[whole].tolist(), strict=True):
                episode = Episode(
                    index=self._episode_count,
                    return_=float(self._return[lane]),
                    length=int(self._length[lane]),
                    terminated=terminated,
                    lane=lane,
                    task=int(self._pending[TASK][lane]) if self._tasks else None,
                )
                self.episodes.append(episode)
                self._episode_count += 1
        if result.broken.any():
            lanes = result.env_id[result.broken]
            begin, end = self._reserve(lanes)
            rows = self._rows[begin:end]
            rows[:] = self._pending[lanes]
            rows["action"] = 0
            rows["reward"] = 0.0
            rows["is_last"] = True
            self._broken_count += len(lanes)
        over = result.env_id[ended]
        if self._extent is not None:
            self._extent.end(over)
        self._return[over] = 0.0
        self._length[over] = 0

    def _reserve(self, lanes: IntArray) -> tuple[int, int]:
        """Place for one row per lane at the end of what waits to be handed over."""
        if not self._waiting:
            self._waiting_since = time.perf_counter()
        begin, end = self._waiting, self._waiting + len(lanes)
        self._lanes[begin:end] = lanes
        self._waiting = end
        return begin, end

    def _hand_over(self) -> None:
        if self._waiting:
            began = time.perf_counter()
            # Copies, because a writer may keep what it was given until it is acknowledged.
            self._writer.append(self._lanes[: self._waiting].copy(), self._rows[: self._waiting])
            self._waiting = 0
            self._write_s += time.perf_counter() - began
