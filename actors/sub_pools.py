"""Environments of many tasks, kept in pools of one task each: built when lanes need them, and kept for a while after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.gymnasium_env import GymnasiumEnv
from actors.protocol import BoolArray, EnvStep, IntArray
from actors.spaces import lane_seeds
from replay.schema import StepSchema


class SlotEnv(Protocol):
    """Environments of one task, the slots, any of which can be stepped without the others: `EnvPoolEnv` is one."""

    @property
    def schema(self) -> StepSchema: ...

    def build(self) -> None:
        """Build them without a reset; the first action of each slot, which is void, then resets it."""

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        """Act in some slots; in a slot that was never started or whose episode is over, an episode begins."""

    def recv(self) -> EnvStep:
        """Wait for the results of the slots that were sent to, in that order."""

    def frame(self, lane: int) -> NDArray[np.uint8]:
        """Picture of a slot, (height, width, 3)."""

    def close(self) -> None:
        """Release the environments and their threads."""


class GymnasiumSlots:
    """Gymnasium environments of one task behind the `SlotEnv` protocol, one `GymnasiumEnv` in each slot."""

    def __init__(
        self,
        env_id: str,
        kwargs: Mapping[str, Any],
        *,
        num_envs: int,
        seed: int,
        render: bool = False,
        success: str | None = None,
    ) -> None:
        """As `GymnasiumEnv`."""
        self._slots = [
            GymnasiumEnv(env_id, kwargs, num_envs=1, seed=slot_seed, render=render, success=success)
            for slot_seed in lane_seeds(seed, num_envs)
        ]
        self._only: IntArray = np.zeros(1, np.int32)
        self._sent: IntArray = self._only[:0]
        self._started: BoolArray = np.zeros(num_envs, np.bool_)

    @property
    def schema(self) -> StepSchema:
        return self._slots[0].schema

    def build(self) -> None:
        for slot in self._slots:
            slot.start()
        self._started[:] = False

    def send(self, action: NDArray[Any], env_id: IntArray) -> None:
        for row, slot in enumerate(env_id.tolist()):
            if self._started[slot]:  # else the first `recv` resets it
                self._slots[slot].send(action[row : row + 1], self._only)
        self._started[env_id] = True
        self._sent = env_id

    def recv(self) -> EnvStep:
        results = [self._slots[slot].recv() for slot in self._sent.tolist()]
        success = [r.success for r in results if r.success is not None]
        return EnvStep(
            env_id=self._sent,
            observation={
                name: np.concatenate([r.observation[name] for r in results]) for name in results[0].observation
            },
            reward=np.concatenate([r.reward for r in results]),
            terminated=np.concatenate([r.terminated for r in results]),
            truncated=np.concatenate([r.truncated for r in results]),
            reset=np.concatenate([r.reset for r in results]),
            broken=np.concatenate([r.broken for r in results]),
            success=np.concatenate(success) if success else None,
        )

    def frame(self, lane: int) -> NDArray[np.uint8]:
        return self._slots[lane].frame(0)

    def close(self) -> None:
        for slot in self._slots:
            slot.close()


@dataclass(eq=False)
class SubPool:
    """Environments of one task, and the lanes that play in them."""

    task: int  # number of the task
    env: SlotEnv
    lane_of_slot: IntArray  # (slots,) -1 where a slot is free
    lanes: IntArray  # those that play in it, in order
    slots: IntArray  # of each of the lanes
    used: int = 0  # when a lane last took a slot, in calls of `SubPools.place`

    def refresh(self) -> None:
        """Find `lanes` and `slots` anew after a change of `lane_of_slot`."""
        slots = np.flatnonzero(self.lane_of_slot >= 0)
        slots = slots[np.argsort(self.lane_of_slot[slots])]
        self.lanes, self.slots = self.lane_of_slot[slots], slots.astype(np.int32)


class SubPools:
    """Which lanes play in which pool.

    A pool's environments are fixed when it is built. Where lanes need more environments of a task than there are, a further
    pool of it is built, with a power of two of slots, and at least as many as the task has already, up to one for each
    lane in all: few large pools are stepped faster than many small ones. Pools without a lane stay, to be used again,
    until there are `limit` pools and another is needed: then the one longest unused goes.
    """

    def __init__(self, make: Callable[[int, int, int], SlotEnv], *, lanes: int, limit: int, seed: int) -> None:
        """
        Args:
            make: the environments of a task, not built yet, called with its number, how many, and their seed.
            lanes: that play, numbered from 0.
            limit: most pools alive at once, ≥ 1.
            seed: of the pools' seeds; any integer ≥ 0.
        """
        if limit < 1:
            raise ValueError(f"the limit of pools is {limit}; expected at least 1")
        self._make = make
        self._limit = limit
        self._seed = seed
        self._pool: list[SubPool | None] = [None] * lanes  # each lane's
        self._pools: dict[int, list[SubPool]] = {}  # those of each task
        self.restart()

    def restart(self) -> None:
        """Close every pool, and begin again with the first seed."""
        self.close()
        self._seeds = np.random.SeedSequence(self._seed)
        self.built = 0  # pools since then
        self._clock = 0

    def __len__(self) -> int:
        """Pools alive."""
        return sum(map(len, self._pools.values()))

    @property
    def playing(self) -> list[SubPool]:
        """The pools that have lanes in them."""
        return [pool for pools in self._pools.values() for pool in pools if len(pool.lanes)]

    def slot(self, lane: int) -> tuple[SubPool, int] | None:
        """The pool that a lane plays in and its slot there; None where it has none."""
        pool = self._pool[lane]
        return None if pool is None else (pool, int(np.flatnonzero(pool.lane_of_slot == lane)[0]))

    def place(self, task: int, lanes: Sequence[int]) -> int:
        """Give lanes a slot of a task each, as far as there is room for them. Returns how many, the first ones, have got one.

        Raises:
            EnvError: the task's environments cannot be built.
        """
        self._clock += 1
        missing = list(lanes)
        pools = self._pools.get(task, [])
        for pool in pools:
            self._fill(pool, missing)
        if missing and self._make_room():
            there = sum(len(pool.lane_of_slot) for pool in pools)
            wanted = max(1 << (len(missing) - 1).bit_length(), there)
            pool = self._build(task, min(wanted, len(self._pool) - there))
            # The largest in front, to be filled first.
            pools.insert(0, pool)
            self._pools[task] = pools
            self._fill(pool, missing)
        return len(lanes) - len(missing)

    def release(self, lane: int) -> None:
        """Take a lane, whose episode must be over, out of its pool."""
        pool = self._pool[lane]
        if pool is not None:
            self._pool[lane] = None
            pool.lane_of_slot[pool.lane_of_slot == lane] = -1
            pool.refresh()

    def close(self) -> None:
        """Release every pool."""
        for pools in self._pools.values():
            for pool in pools:
                pool.env.close()
        self._pools.clear()
        self._pool = [None] * len(self._pool)

    def _fill(self, pool: SubPool, missing: list[int]) -> None:
        """Put lanes into the free slots of a pool, and take them off the list."""
        free = np.flatnonzero(pool.lane_of_slot < 0)[: len(missing)]
        if not len(free):
            return
        lanes = missing[: len(free)]
        del missing[: len(free)]
        pool.lane_of_slot[free] = lanes
        pool.refresh()
        pool.used = self._clock
        for lane in lanes:
            self._pool[lane] = pool

    def _make_room(self) -> bool:
        """Close the pool longest unused if there are as many as may be. Returns whether another one may be built."""
        if len(self) < self._limit:
            return True
        idle = [pool for pools in self._pools.values() for pool in pools if not len(pool.lanes)]
        if not idle:
            return False
        oldest = min(idle, key=lambda pool: pool.used)
        self._pools[oldest.task].remove(oldest)
        if not self._pools[oldest.task]:  # of many tasks few have pools at a time
            del self._pools[oldest.task]
        oldest.env.close()
        return True

    def _build(self, task: int, slots: int) -> SubPool:
        # Each pool has a seed of its own: one that was closed and is built again must not repeat its episodes.
        seed = int(self._seeds.spawn(1)[0].generate_state(1)[0])
        env = self._make(task, slots, seed)
        env.build()
        self.built += 1
        none: IntArray = np.empty(0, np.int32)
        return SubPool(task, env, np.full(slots, -1, np.int32), none, none)
