"""Lanes that play many tasks: each takes an assignment, plays it in an environment of that task, and takes the next."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.assignments import Assignment, Outcome
from actors.env_tasks import EnvTask
from actors.envs import make_slots
from actors.episode_filter import EpisodeFilter, Fate
from actors.protocol import BoolArray, EnvError, EnvStep, FloatArray, IntArray, Observation
from actors.sub_pools import SlotEnv, SubPool, SubPools
from actors.task_schema import TASK_FIELD, Layout, encodings, task_schema
from actors.task_set import TaskSet
from configs.schema import EnvSettings, EnvTasksSettings
from replay.schema import StepSchema

RECENT = 64  # assignments whose tasks are played again where no new one is there

Ask = Callable[[int], Sequence[Assignment[EnvTask]]]


@dataclass(eq=False)
class _Group:
    """The episodes of one assignment, and how they went."""

    number: int  # of the group; below 0 where the head knows nothing of it
    task: int  # number of the task
    size: int  # episodes to be played
    begun: int = 0
    sampled: int = 0  # episodes that are over
    attempts: int = 0  # of those, the ones that can be judged: the environment did not raise
    passes: int = 0
    units: int = 0  # environment steps
    returns: float = 0.0


class TaskEnv:
    """A `VectorEnv` whose lanes change their task at episode ends.

    A lane whose episode is over takes the next episode of the assignments at hand, which are asked for ahead and never
    waited for: where there is none, it plays a task among the last ones assigned again, and says nothing of it. It
    keeps its environment where the task is the same and nobody waits, else it moves to one in a pool of the new task
    (`SubPools`). With fewer pools than lanes a lane may find none; it then waits, in turn, until other lanes have
    emptied a pool, and is missing from the results meanwhile.

    Whether an episode has passed follows from the task: its return is at least the threshold, or the flag of success
    was true at any of its steps. Episodes in which an environment raised are not judged. For one thread only, but for
    `take_outcomes`.
    """

    def __init__(
        self,
        env: EnvSettings,
        settings: EnvTasksSettings,
        tasks: TaskSet[EnvTask],
        ask: Ask,
        *,
        num_envs: int,
        threads: int = 0,
        seed: int,
        group_size: int = 1,
        episode_filter: EpisodeFilter | None = None,
        render: bool = False,
    ) -> None:
        """
        Args:
            env: library and stack of frames.
            settings: how tasks are told and padded, and how many pools may live; None of `pools` stands for twice as many
                as there are lanes.
            tasks: what assignments are of.
            ask: gives up to so many assignments at once, each for `group_size` episodes.
            num_envs: lanes.
            threads: EnvPool's threads for all lanes, 0 for one on each core; a pool has its share of them, at least one.
            seed: any integer ≥ 0, of the environments and of the tasks that are played again.
            group_size: episodes of one assignment; 1 without a filter.
            episode_filter: judges groups, and holds the rows back until then; None keeps every episode.
            render: make the environments able to draw themselves.

        Raises:
            EnvError: as `task_schema`.
        """
        self.num_envs = self.batch_size = num_envs
        self.schema: StepSchema = task_schema(env, settings, tasks)
        self._settings, self._tasks, self._ask = env, tasks, ask
        self._pad = settings.pad
        self._threads = threads or os.cpu_count() or 1  # what EnvPool would take for all lanes in one pool
        self._seed, self._render = seed, render
        self._group_size, self._filter = group_size, episode_filter
        self._encodings = encodings(settings, tasks)
        self._layouts: dict[int, Layout] = {}
        limit = 2 * num_envs if settings.pools is None else settings.pools
        self._pools = SubPools(self._make, lanes=num_envs, limit=limit, seed=seed)
        self._outcomes: deque[Outcome] = deque()
        self._lanes: IntArray = np.arange(num_envs, dtype=np.int32)

    def start(self) -> None:
        """Reset every lane; the same answers of `ask` and the same actions then give the same results."""
        lanes = self.num_envs
        self._pools.restart()
        self._generator = np.random.default_rng([self._seed, 1])
        self._outcomes.clear()
        self._assigned: deque[_Group] = deque()  # with episodes that no lane has begun
        self._recent: deque[int] = deque(maxlen=RECENT)  # numbers of the tasks assigned last
        self._unassigned = 0  # groups that were never assigned
        self.unassigned_steps = 0  # environment steps of those that are over
        self._group: list[_Group | None] = [None] * lanes
        self._over: list[int] = list(range(lanes))  # lanes whose episode is over
        self._waiting: list[int] = []  # lanes that have a group and no environment
        self._actions: NDArray[Any] = np.zeros((lanes, *self.schema.action.shape), self.schema.action.dtype)
        self._task: IntArray = np.zeros(lanes, np.int32)
        self._told: FloatArray | None = None  # (lanes, numbers) what each lane's observations say of its task
        if self._encodings is not None:
            self._told = np.zeros((lanes, self._encodings.shape[1]), np.float32)
        self._return = np.zeros(lanes)
        self._length = np.zeros(lanes, np.int64)
        self._success: BoolArray = np.zeros(lanes, np.bool_)
        self._next_episodes()
        self._send()

    def recv(self) -> EnvStep:
        result = self._whole(self._playing[0]) if self._is_whole() else self._merged()
        stepped = ~(result.reset | result.broken)
        if len(result.env_id) == self.num_envs:
            self._return += np.where(stepped, result.reward, 0.0)
            self._length += stepped
            if result.success is not None:
                self._success |= result.success & stepped
        else:
            lanes = result.env_id
            self._return[lanes] += np.where(stepped, result.reward, 0.0)
            self._length[lanes] += stepped
            if result.success is not None:
                self._success[lanes] |= result.success & stepped
        ended = result.terminated | result.truncated
        if ended.any():
            for lane, broken in zip(result.env_id[ended].tolist(), result.broken[ended].tolist(), strict=True):
                self._end(lane, broken)
        return result

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        """As `VectorEnv.send`; lanes whose episode is over begin another, and their action is void."""
        self._actions[env_id] = action
        if self._over or self._waiting:
            self._next_episodes()
        self._send()

    def sample_actions(self, count: int, generator: np.random.Generator) -> NDArray[Any]:
        action = self.schema.action
        if not action.shape:
            return generator.integers(action.choices, size=count)
        return generator.uniform(-1.0, 1.0, (count, *action.shape)).astype(np.float32)

    def frame(self, lane: int) -> NDArray[np.uint8]:
        """As `VectorEnv.frame`.

        Raises:
            EnvError: the lane waits for an environment, or its environment cannot draw itself.
        """
        place = self._pools.slot(lane)
        if place is None:
            raise EnvError(f"lane {lane} has no environment to draw: it waits for one of {len(self._pools)} pools")
        pool, slot = place
        return pool.env.frame(slot)

    def take_outcomes(self) -> list[Outcome]:
        """What became of the assignments all of whose episodes are over, each told once. From any thread."""
        found = []
        while self._outcomes:
            found.append(self._outcomes.popleft())
        return found

    def stats(self) -> dict[str, float]:
        """Pools alive and built since the start, and the environment steps of finished groups that were never assigned."""
        return {
            "pools": len(self._pools),
            "pools_built": self._pools.built,
            "unassigned_steps": self.unassigned_steps,
        }

    def close(self) -> None:
        """Release the environments and their threads."""
        self._pools.close()

    # ------------------------------------------------------------------ stepping

    def _send(self) -> None:
        """Send every lane's action to the pools; lanes that begin an episode have one from before, which is void."""
        self._playing = self._pools.playing
        for pool in self._playing:
            pool.env.send(self._layouts[pool.task].action(self._actions[pool.lanes]), pool.slots)

    def _is_whole(self) -> bool:
        """Whether one pool has all lanes, and its results can be handed on as they are."""
        return (
            len(self._playing) == 1
            and len(self._playing[0].lanes) == self.num_envs
            and self._layouts[self._playing[0].task].plain
        )

    def _whole(self, pool: SubPool) -> EnvStep:
        result = pool.env.recv()
        result.env_id = self._lanes
        result.task = self._task.copy()
        if self._told is not None:
            result.observation[TASK_FIELD] = self._told.copy()
        return result

    def _merged(self) -> EnvStep:
        """The results of all pools that were sent to, in the order of the lanes."""
        count = self.num_envs
        observation: Observation = {
            field.name: np.zeros((count, *field.shape), field.dtype)
            if self._pad
            else np.empty((count, *field.shape), field.dtype)
            for field in self.schema.observations
            if field.name != TASK_FIELD
        }
        reward: FloatArray = np.zeros(count, np.float32)
        terminated, truncated, reset, broken, success = np.zeros((5, count), np.bool_)
        there = 0
        for pool in self._playing:
            result, lanes = pool.env.recv(), pool.lanes
            self._layouts[pool.task].write(result.observation, lanes, observation)
            reward[lanes] = result.reward
            terminated[lanes] = result.terminated
            truncated[lanes] = result.truncated
            reset[lanes] = result.reset
            broken[lanes] = result.broken
            if result.success is not None:
                success[lanes] = result.success
            there += len(lanes)
        if self._told is not None:
            observation[TASK_FIELD] = self._told.copy()
        merged = EnvStep(
            self._lanes, observation, reward, terminated, truncated, reset, broken, success, self._task.copy()
        )
        return merged if there == count else _only(merged, self._playing)

    def _make(self, task: int, slots: int, seed: int) -> SlotEnv:
        """The environments of a pool."""
        share = round(self._threads * slots / self.num_envs)
        one = self._tasks[task]
        env = make_slots(
            one.settings(self._settings),
            num_envs=slots,
            threads=max(1, share),
            seed=seed,
            render=self._render,
            success=one.success if one.threshold is None else None,
        )
        if task not in self._layouts:
            try:
                self._layouts[task] = Layout(self.schema, env.schema, pad=self._pad, name=one.name)
            except EnvError:
                env.close()
                raise
        return env

    # ------------------------------------------------------------------ episodes

    def _next_episodes(self) -> None:
        """Give every lane whose episode is over another one, and an environment as far as there are some."""
        for done, lane in enumerate(self._over):
            before, group = self._group[lane], self._next(len(self._over) - done)
            group.begun += 1
            self._group[lane] = group
            if before is not None and before.task == group.task and not self._waiting:
                self._begin(lane)  # in the environment that it has
            else:
                self._pools.release(lane)
                self._waiting.append(lane)
        self._over.clear()
        # All lanes that wait for a task get in together. The first that cannot keeps out all that came after it, which
        # could hold the pools for ever otherwise.
        lanes_of: dict[int, list[int]] = {}
        for lane in self._waiting:
            lanes_of.setdefault(self._group_of(lane).task, []).append(lane)
        for task, lanes in lanes_of.items():
            placed = self._pools.place(task, lanes)
            for lane in lanes[:placed]:
                self._begin(lane)
                self._waiting.remove(lane)
            if placed < len(lanes):
                break

    def _next(self, wanted: int) -> _Group:
        """A group with an episode to begin, of the `wanted` episodes that are to begin now."""
        if self._assigned and self._assigned[0].begun == self._assigned[0].size:
            self._assigned.popleft()
        if not self._assigned:
            for given in self._ask(-(-wanted // self._group_size)):
                self._assigned.append(_Group(given.group, given.number, self._group_size))
                self._recent.append(given.number)
        if not self._assigned:
            self._unassigned += 1
            if self._recent:
                task = self._recent[int(self._generator.integers(len(self._recent)))]
            else:
                task = int(self._generator.integers(len(self._tasks)))
            self._assigned.append(_Group(-self._unassigned, task, self._group_size))
        return self._assigned[0]

    def _begin(self, lane: int) -> None:
        task = self._group_of(lane).task
        self._task[lane] = task
        self._return[lane], self._length[lane], self._success[lane] = 0.0, 0, False
        if self._told is not None and self._encodings is not None:
            self._told[lane] = self._encodings[task]

    def _end(self, lane: int, broken: bool) -> None:
        """Count an episode that is over, and settle its group if it was the last of it."""
        group = self._group_of(lane)
        group.sampled += 1
        group.units += int(self._length[lane])
        if not broken:
            group.attempts += 1
            group.returns += float(self._return[lane])
            group.passes += passed(self._tasks[group.task], float(self._return[lane]), bool(self._success[lane]))
        if self._filter is not None:
            self._filter.end(lane, group.number)
        if group.sampled == group.size:
            self._settle(group)
        self._over.append(lane)

    def _settle(self, group: _Group) -> None:
        fate: Fate = "kept"
        if self._filter is not None:
            fate = self._filter.settle(group.number, group.passes, group.attempts)
        if group.number < 0:
            self.unassigned_steps += group.units
            return
        self._outcomes.append(
            Outcome(
                group=group.number,
                number=group.task,
                passes=group.passes,
                attempts=group.attempts,
                sampled=group.sampled,
                units=group.units,
                fate=fate,
                returns=group.returns,
            )
        )

    def _group_of(self, lane: int) -> _Group:
        group = self._group[lane]
        assert group is not None, f"lane {lane} has begun no episode"
        return group


def _only(result: EnvStep, pools: Sequence[SubPool]) -> EnvStep:
    """The part of a result of all lanes that is of the lanes in these pools, in their order."""
    lanes = np.sort(np.concatenate([pool.lanes for pool in pools]))
    return EnvStep(
        env_id=lanes,
        observation={name: values[lanes] for name, values in result.observation.items()},
        reward=result.reward[lanes],
        terminated=result.terminated[lanes],
        truncated=result.truncated[lanes],
        reset=result.reset[lanes],
        broken=result.broken[lanes],
        success=None if result.success is None else result.success[lanes],
        task=None if result.task is None else result.task[lanes],
    )


def passed(task: EnvTask, return_: float, success: bool) -> bool:
    """Whether an episode has passed, by its return and whether the flag of success was true at any of its steps."""
    return return_ >= task.threshold if task.threshold is not None else success
