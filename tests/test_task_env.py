"""Lanes that play many tasks: rows of whole episodes of one task each, and outcomes that a recount confirms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import envpool
import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.assignments import Assignment, Outcome
from actors.env_tasks import EnvTask
from actors.envs import EnvError, make_env
from actors.episode_filter import EpisodeFilter
from actors.protocol import EnvStep
from actors.rollout import Rollout
from actors.sub_pools import SubPools
from actors.task_env import TaskEnv
from actors.task_schema import task_schema
from actors.task_set import TaskSet
from configs.schema import EnvSettings, EnvTasksSettings
from replay.schema import Field
from tests.test_rollout import ROOM, Linear, Sink

LEVEL = "tests.test_task_env:make_level"
PLAIN = EnvTasksSettings()
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")


class Level(gymnasium.Env[Any, Any]):
    """Episodes of `length` steps that observe [level, episode, step]; the reward of a step is the level.

    The flag `won` is true at step `wins_at` alone, in every episode whose number is even; step `raises_at` raises in every
    episode whose number is odd.
    """

    def __init__(self, level: int, length: int, wins_at: int = 0, raises_at: int = 0, size: int = 3) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (size - 1,), np.float32)
        self._level, self._length, self._wins_at, self._raises_at = level, length, wins_at, raises_at
        self._episode = -1

    def _observe(self) -> NDArray[np.float32]:
        seen = np.full(self.observation_space.shape or (), 7.0, np.float32)
        seen[:3] = self._level, self._episode, self._step
        return seen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._episode += 1
        self._step = 0
        return self._observe(), {"won": True}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert np.shape(action) == self.action_space.shape
        self._step += 1
        if self._step == self._raises_at and self._episode % 2 == 1:
            raise RuntimeError("physics exploded")
        won = self._step == self._wins_at and self._episode % 2 == 0
        return self._observe(), float(self._level), self._step == self._length, False, {"won": won}


def make_level(**kwargs: Any) -> Level:
    return Level(**kwargs)


def task(env_id: str, name: str, threshold: float | None = None, success: str | None = None, **kwargs: Any) -> EnvTask:
    return EnvTask(env_id, kwargs, name, "all", 0, threshold, success)


def level(number: int, length: int, **kwargs: Any) -> EnvTask:
    return task(LEVEL, f"level {number}", level=number, length=length, **kwargs)


class Asked:
    """Hands out assignments of the tasks listed, `at_once` per call at most."""

    def __init__(self, tasks: TaskSet[EnvTask], numbers: Sequence[int], at_once: int = 1_000_000) -> None:
        self._tasks, self._numbers, self._at_once = tasks, list(numbers), at_once
        self.given: dict[int, int] = {}  # group → task
        self.wanted: list[int] = []

    def __call__(self, count: int) -> list[Assignment[EnvTask]]:
        self.wanted.append(count)
        now, self._numbers = self._numbers[: (few := min(count, self._at_once))], self._numbers[few:]
        found = [Assignment(len(self.given) + i, number, self._tasks[number]) for i, number in enumerate(now)]
        self.given |= {a.group: a.number for a in found}
        return found


def episodes(rows: NDArray[Any]) -> list[NDArray[Any]]:
    """The finished episodes among a lane's rows."""
    ends = np.flatnonzero(rows["is_last"]) + 1
    return [rows[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)] if len(ends) else []


# ---------------------------------------------------------------------------------------------------------- EnvPool


def test_one_task_is_the_plain_pool() -> None:
    """With a single task the results are those of a pool with the same seeds, step by step."""
    tasks = TaskSet([task("Hopper-v4", "hopper", threshold=0.0)])
    asked = Asked(tasks, [0] * 10_000)
    env = TaskEnv(EnvSettings(id="Hopper-v4"), PLAIN, tasks, asked, num_envs=5, threads=2, seed=3)
    plain = make_env(
        EnvSettings(id="Hopper-v4"), num_envs=5, seed=int(np.random.SeedSequence(3).spawn(1)[0].generate_state(1)[0])
    )
    for _ in range(2):  # `start` begins again
        env.start()
        plain.start()
        generator = np.random.default_rng(0)
        for _ in range(150):
            ours, theirs = env.recv(), plain.recv()
            for name in ("env_id", "reward", "terminated", "truncated", "reset", "broken"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            np.testing.assert_array_equal(ours.observation["observation"], theirs.observation["observation"])
            action = plain.sample_actions(5, generator)
            env.send(action, ours.env_id)
            plain.send(action, theirs.env_id)
        assert env.stats()["pools_built"] == 1
    assert sum(o.attempts for o in env.take_outcomes()) > 10
    env.close()
    plain.close()


@pytest.mark.parametrize("pools", [None, 2])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_rows_equal_plain_loops_over_single_environments(env_id: str, pools: int | None) -> None:
    """Each environment, told by its seed, plays the episodes that one alone with that seed and the task's arguments plays."""
    arguments: list[dict[str, Any]] = [{"max_episode_steps": steps} for steps in (4, 9, 23)]
    tasks = TaskSet([task(env_id, str(i), threshold=5.0, **kwargs) for i, kwargs in enumerate(arguments)])
    asked = Asked(tasks, np.random.default_rng(1).integers(3, size=10_000).tolist())
    setting = EnvTasksSettings(pools=pools, encoding="one_hot")
    env = TaskEnv(EnvSettings(id=env_id), setting, tasks, asked, num_envs=6, threads=4, seed=5)
    sink, policy = Sink(), Linear(env.schema)
    rollout = Rollout(env, policy, sink, **ROOM, tasks=True)
    rollout.set_policy(1, b"3")
    played: dict[int, list[tuple[int, int]]] = defaultdict(list)  # lane → seed of the environment, task, by episode
    for _ in range(300):
        places = [env._pools.slot(lane) for lane in range(6)]
        ended = rollout.stats()["episodes"]
        rollout.step()
        for episode in [e for e in rollout.episodes if e.index >= ended]:
            place = places[episode.lane]
            assert place is not None
            pool, slot = place
            played[episode.lane].append((pool.env._arguments["seed"][slot], pool.task))  # type: ignore[attr-defined]
            assert episode.task == pool.task
    rollout.close()
    assert {number for rows in sink.lanes().values() for number in rows["task"].tolist()} == {0, 1, 2}

    of_env: dict[tuple[int, int], list[NDArray[Any]]] = defaultdict(list)
    for lane, rows in sink.lanes().items():
        for key, found in zip(played[lane], episodes(rows), strict=True):
            assert (found["task"] == key[1]).all()
            np.testing.assert_array_equal(found["observation/task"], np.tile(np.eye(3)[key[1]], (len(found), 1)))
            of_env[key].append(found)
    checked = 0
    for (seed, number), ours in of_env.items():
        expected = _alone(env_id, arguments[number], seed, len(ours))
        # One environment's episodes may lie in several lanes: as a set they are those of the loop.
        some, other = (
            sorted(e["observation"].tobytes() + e["reward"].tobytes() for e in of) for of in (ours, expected)
        )
        assert some == other
        checked += len(ours)
    assert checked > 80


def _alone(env_id: str, kwargs: dict[str, Any], seed: int, count: int) -> list[NDArray[Any]]:
    """Rows of the first episodes of one environment."""
    env = envpool.make(env_id, env_type="gymnasium", num_envs=1, seed=[seed], **kwargs)
    schema = make_env(EnvSettings(id=env_id, kwargs=kwargs), num_envs=1, seed=0).schema
    policy = Linear(schema)
    policy.load(b"3")
    found = []
    for _ in range(count):
        observation, _ = env.reset()
        rows, ended = [], False
        while not ended:
            row = schema.zeros(1)
            row["observation"] = observation
            action = policy.act(
                {"observation": row["observation"]}, deterministic=True, generator=np.random.default_rng(0)
            )
            observation, row["reward"], terminated, truncated, _ = env.step(action[:, 0])
            rows.append(row[0])
            ended = bool(terminated[0] or truncated[0])
        row = schema.zeros(1)
        row["observation"] = observation
        found.append(np.array([*rows, row[0]]))
    return found


def test_success_of_envpool_counts_at_any_step() -> None:
    """The flag comes from EnvPool's info; a name that is not there is refused."""
    tasks = TaskSet([task("MetaWorld/Reach-v3", "reach", success="success", max_episode_steps=3)])
    env = TaskEnv(EnvSettings(id="MetaWorld/Reach-v3"), PLAIN, tasks, Asked(tasks, [0] * 100), num_envs=2, seed=0)
    env.start()
    for _ in range(9):
        result = env.recv()
        assert result.success is not None
        env.send(np.zeros((2, 4), np.float32), result.env_id)
    assert [(o.attempts, o.units, o.passes) for o in env.take_outcomes()] == [(1, 3, 0)] * 4
    env.close()
    tasks = TaskSet([task("MetaWorld/Reach-v3", "reach", success="solved")])
    env = TaskEnv(EnvSettings(id="MetaWorld/Reach-v3"), PLAIN, tasks, Asked(tasks, [0]), num_envs=1, seed=0)
    with pytest.raises(EnvError, match="no 'solved' in its info"):
        env.start()


# ------------------------------------------------------------------------------------------------------- assignments

LEVELS = TaskSet(
    [
        level(0, 1, threshold=0.5),
        level(1, 2, threshold=2.0),
        level(2, 3, success="won", wins_at=2),
        level(3, 5, success="won", wins_at=4, raises_at=3),
        level(4, 4, threshold=16.5),
    ]
)


# Tasks assigned: few, after which lanes play what nobody asked for, or more than there are steps.
ASSIGNED = st.lists(st.integers(0, 4), max_size=12) | st.integers(0, 2**20).map(
    lambda seed: np.random.default_rng(seed).integers(5, size=500).tolist()
)


def recount(rows: NDArray[Any], number: int) -> tuple[int, int, int, float]:
    """(passes, attempts, steps, return) of one episode's rows, by the rules of `Level`."""
    steps, episode = len(rows) - 1, int(rows["observation"][0, 1])
    kwargs: dict[str, Any] = dict(LEVELS[number].kwargs)
    broken = bool(kwargs.get("raises_at")) and episode % 2 == 1
    assert rows["is_first"].tolist() == [True] + [False] * steps
    assert rows["is_last"].tolist() == [False] * steps + [True]
    assert rows["is_terminal"].tolist() == [False] * steps + [not broken]
    assert (rows["task"] == number).all()
    assert (rows["observation"][:, 0] == number).all()
    assert (rows["observation"][:, 1] == episode).all()
    assert rows["observation"][:, 2].tolist() == list(range(steps + 1))
    assert rows["reward"].tolist() == [number] * steps + [0]
    if broken:
        assert steps == int(kwargs["raises_at"]) - 1
        return 0, 0, steps, 0.0
    assert steps == kwargs["length"]
    passes = {0: 0, 1: 1, 2: 1 - episode % 2, 3: 1, 4: 0}[number]
    return passes, 1, steps, float(number * steps)


def play(
    numbers: Sequence[int],
    *,
    lanes: int,
    at_once: int = 1_000_000,
    pools: int | None = None,
    steps: int = 60,
    group_size: int = 1,
    judge: Any = None,
    rows_per_write: int = 64,
) -> tuple[TaskEnv, Sink, list[Outcome], Asked, list[list[int]]]:
    """A rollout over the levels: its environments, what was written, the outcomes, and the lanes of each result."""
    asked, sink, seen = Asked(LEVELS, numbers, at_once), Sink(), []

    class Watched(TaskEnv):
        def recv(self) -> EnvStep:
            result = super().recv()
            seen.append(result.env_id.tolist())
            assert len(self._pools) <= (2 * lanes if pools is None else pools)
            np.testing.assert_array_equal(result.task, self._task[result.env_id])
            return result

    writer: Any = sink
    if judge is not None:
        writer = EpisodeFilter(sink, judge, rows_per_write=rows_per_write)
    env = Watched(
        EnvSettings(id=LEVEL),
        EnvTasksSettings(pools=pools),
        LEVELS,
        asked,
        num_envs=lanes,
        seed=0,
        group_size=group_size,
        episode_filter=writer if judge is not None else None,
    )
    rollout = Rollout(env, Linear(env.schema), writer, **{**ROOM, "rows_per_write": rows_per_write}, tasks=True)
    for _ in range(steps):
        rollout.step()
    rollout._hand_over()
    writer.flush()
    rollout.close()
    return env, sink, env.take_outcomes(), asked, seen


@given(
    numbers=ASSIGNED,
    lanes=st.integers(1, 6),
    at_once=st.integers(1, 7),
    pools=st.none() | st.integers(1, 4),
)
@settings(max_examples=20)
def test_lanes_play_whole_episodes_of_what_was_assigned(
    numbers: list[int], lanes: int, at_once: int, pools: int | None
) -> None:
    """Every row is of a whole episode of one task, outcomes equal a recount, and each assignment is played once."""
    env, sink, outcomes, asked, seen = play(numbers, lanes=lanes, at_once=at_once, pools=pools)
    found: dict[int, list[tuple[int, int, int, float]]] = defaultdict(list)
    for rows in sink.lanes().values():
        for episode in episodes(rows):
            number = int(episode["task"][0])
            found[number].append(recount(episode, number))
    told: dict[int, list[tuple[int, int, int, float]]] = defaultdict(list)
    for outcome in outcomes:
        assert outcome.number == asked.given[outcome.group]
        assert (outcome.sampled, outcome.fate) == (1, "kept")
        told[outcome.number].append((outcome.passes, outcome.attempts, outcome.units, outcome.returns))
    assert len({o.group for o in outcomes}) == len(outcomes)
    unassigned = 0
    for number, episodes_of in found.items():
        left = list(episodes_of)
        for one in told[number]:
            left.remove(one)
        unassigned += sum(steps for _, _, steps, _ in left)
    assert set(told) <= set(found)
    assert unassigned == env.stats()["unassigned_steps"]
    if len(asked.given) < len(numbers):
        assert unassigned == 0
    # Results come in order, and without a bound for every lane at every step.
    assert all(lanes_of == sorted(set(lanes_of)) and lanes_of for lanes_of in seen)
    if pools is None or pools >= lanes:
        assert all(len(lanes_of) == lanes for lanes_of in seen)


@pytest.mark.parametrize("pools", [1, 2])
def test_lanes_wait_in_turn_for_few_pools(pools: int) -> None:
    """With a single pool every lane still plays, and every task gets its turn though others would fit in at once."""
    numbers = np.random.default_rng(0).integers(5, size=2_000).tolist()
    env, sink, outcomes, asked, seen = play(numbers, lanes=5, pools=pools, steps=400)
    assert min(len(lanes_of) for lanes_of in seen) < 5
    assert sorted(sink.lanes()) == list(range(5))
    assert {o.number for o in outcomes} == set(range(5))
    assert len(asked.given) - len(outcomes) <= 5  # none was left behind
    assert env.stats()["pools_built"] > 50


def test_a_waiting_lane_is_not_kept_out_for_ever() -> None:
    """The others play the task of the only pool again and again, and end at different times; they leave it all the same."""
    falls = TaskSet([task("CartPole-v1", str(n), threshold=1.0, max_episode_steps=n) for n in (400, 3)])
    asked = Asked(falls, [0, 0, 0, 1] + [0] * 1_000)
    env = TaskEnv(EnvSettings(id="CartPole-v1"), EnvTasksSettings(pools=1), falls, asked, num_envs=4, seed=1)
    env.start()
    seen: list[tuple[int, ...]] = []
    for _ in range(20):
        result = env.recv()
        seen.append(tuple(result.env_id.tolist()))
        env.send(np.zeros(len(result.env_id), np.int64), result.env_id)
    env.close()
    assert seen[0] == (0, 1, 2)
    assert len(set(seen[: seen.index((3,))])) > 1  # not all fell at once

    tasks = TaskSet([level(0, 3, threshold=0.0), level(1, 2, threshold=0.0)])
    asked = Asked(tasks, [0, 0, 1] + [0] * 1_000)
    env = TaskEnv(EnvSettings(id=LEVEL), EnvTasksSettings(pools=1), tasks, asked, num_envs=3, seed=0)
    env.start()
    lanes = []
    for _ in range(12):
        result = env.recv()
        lanes.append(result.env_id.tolist())
        env.send(np.zeros((len(result.env_id), 2), np.float32), result.env_id)
    env.close()
    assert lanes == [[0, 1]] * 4 + [[2]] * 3 + [[0, 1, 2]] * 5


def test_a_pool_that_is_needed_again_is_still_there() -> None:
    """Idle pools are kept up to the bound, the one longest unused goes, and none is ever built with another's seed."""
    made: list[tuple[int, int, int]] = []

    def make(number: int, slots: int, seed: int) -> Any:
        made.append((number, slots, seed))
        return make_env(EnvSettings(id="CartPole-v1"), num_envs=slots, seed=seed)

    pools = SubPools(make, lanes=4, limit=2, seed=0)
    for number in (0, 1, 0, 1, 2, 1, 0):  # 0 goes for 2, then 2 for 0
        assert pools.place(number, [3]) == 1
        assert len(pools) <= 2
        assert len(pools._pools) <= 2  # nothing is kept of tasks without pools, of which there may be a million
        pools.release(3)
    assert [number for number, *_ in made] == [0, 1, 2, 0]
    assert len({seed for *_, seed in made}) == 4
    pools.close()


def test_pools_of_a_task_grow_by_doubling() -> None:
    tasks = TaskSet([level(0, 1, threshold=0.0), level(1, 1_000, threshold=0.0)])
    asked = Asked(tasks, [0] * 7 + [1] + [0] * 7 + [1] + [0] * 7 + [1] + [0] * 7 + [1])
    env = TaskEnv(EnvSettings(id=LEVEL), PLAIN, tasks, asked, num_envs=8, seed=0)
    env.start()
    for _ in range(200):
        result = env.recv()
        env.send(np.zeros((len(result.env_id), 2), np.float32), result.env_id)
    slots = [len(pool.lane_of_slot) for pool in env._pools._pools[1]]
    assert slots[-3:] == [2, 1, 1]
    assert sum(slots) <= 8
    env.close()


def test_nothing_to_do_never_stalls() -> None:
    """Lanes play what they were given last again, unreported; before anything was given, any task."""
    env, sink, outcomes, asked, seen = play([], lanes=3)
    assert outcomes == []
    assert len(seen) == 60
    assert {int(n) for rows in sink.lanes().values() for n in rows["task"]} == set(range(5))
    assert env.stats()["unassigned_steps"] > 0
    assert max(asked.wanted) == 3

    env, sink, outcomes, asked, seen = play([2, 4], lanes=3)
    assert sorted((o.group, o.number) for o in outcomes) == [(0, 2), (1, 4)]
    later = [int(n) for rows in sink.lanes().values() for e in episodes(rows)[1:] for n in e["task"][:1]]
    assert set(later) == {2, 4}
    assert all(len(lanes_of) == 3 for lanes_of in seen)


def test_start_begins_again() -> None:
    tasks = TaskSet([task("CartPole-v1", str(n), threshold=1.0, max_episode_steps=n) for n in (3, 6, 11)])
    numbers = np.random.default_rng(2).integers(3, size=40).tolist()
    traces = []
    asked = Asked(tasks, numbers)
    env = TaskEnv(EnvSettings(id="CartPole-v1"), PLAIN, tasks, lambda count: asked(count), num_envs=4, seed=9)
    for _ in range(2):
        asked = Asked(tasks, numbers)
        env.start()
        generator, trace = np.random.default_rng(0), []
        for _ in range(150):
            result = env.recv()
            trace.append((result.task, result.reset, result.observation["observation"]))
            env.send(env.sample_actions(4, generator), result.env_id)
        traces.append((trace, env.take_outcomes(), env.stats()))
    for one, other in zip(traces[0][0], traces[1][0], strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert traces[0][1:] == traces[1][1:]
    assert len(traces[0][1]) == 40
    env.close()


# ------------------------------------------------------------------------------------------------------------ filter

Verdict = Literal["kept", "too_easy", "too_hard"]


def half(passes: int, attempts: int) -> Verdict:
    """Keeps groups of which some pass and some do not."""
    return "too_hard" if passes == 0 else "too_easy" if passes == attempts else "kept"


@given(
    numbers=ASSIGNED,
    lanes=st.integers(1, 5),
    size=st.integers(1, 4),
    pools=st.none() | st.just(1),
    rows_per_write=st.sampled_from([1, 7, 64]),
)
@settings(max_examples=12)
def test_the_filter_keeps_exactly_the_groups_in_the_band(
    numbers: list[int], lanes: int, size: int, pools: int | None, rows_per_write: int
) -> None:
    _, free, *_ = play(numbers, lanes=lanes, pools=pools, group_size=size, steps=70)
    _, sink, outcomes, asked, _ = play(
        numbers, lanes=lanes, pools=pools, group_size=size, steps=70, judge=half, rows_per_write=rows_per_write
    )
    kept: dict[int, int] = defaultdict(int)  # steps of the kept groups of each task
    for outcome in outcomes:
        assert outcome.sampled == size
        assert outcome.number == asked.given[outcome.group]
        expected = half(outcome.passes, outcome.attempts) if outcome.attempts else "unscored"
        assert outcome.fate == expected
        if outcome.fate == "kept":
            kept[outcome.number] += outcome.units
    written: dict[int, int] = defaultdict(int)
    pool_of = {lane: [e.tobytes() for e in episodes(rows)] for lane, rows in free.lanes().items()}
    for lane, rows in sink.lanes().items():
        assert bool(rows["is_last"][-1])  # nothing is written by halves
        for episode in episodes(rows):
            number = int(episode["task"][0])
            written[number] += recount(episode, number)[2]
            pool_of[lane].remove(episode.tobytes())  # the same episode as without a filter, in the same lane, once
    # What was played without an assignment is judged alike, and comes on top.
    assert all(written[number] >= steps for number, steps in kept.items())
    if len(asked.given) < len(numbers):
        assert dict(written) == dict(kept)
    assert set(written) <= {2, 3}  # of the others every episode passes, or none


# ------------------------------------------------------------------------------------------------- schemas of many


def test_tasks_that_differ_are_told_apart() -> None:
    env = EnvSettings(id=LEVEL)
    short, long = level(0, 3, threshold=0.0), task(LEVEL, "long", 0.0, level=1, length=2, size=6)
    with pytest.raises(
        EnvError,
        match=r"'level 0' and 'long' differ: observation float32\[3\] against observation float32\[6\]; set tasks.pad",
    ):
        task_schema(env, PLAIN, [short, long])
    pad = EnvTasksSettings(pad=True)
    schema = task_schema(env, pad, [short, long])
    assert schema.observations == (Field("observation/state", "float32", (6,)),)
    assert schema.action == Field("action", "float32", (5,))
    pole, lake = task("CartPole-v1", "pole", 1.0), task("MountainCar-v0", "car", 1.0)
    with pytest.raises(EnvError, match=r"'pole' and 'car' differ in their actions: action of 2 .* against action of 3"):
        task_schema(env, pad, [pole, lake])
    with pytest.raises(EnvError, match=r"'pole' and 'level 0' differ in their actions"):
        task_schema(env, pad, [pole, short])
    with pytest.raises(EnvError, match="'pole' and 'pong' differ in their frames"):
        task_schema(env, pad, [pole, task("Pong-v5", "pong", 1.0)])
    with pytest.raises(
        EnvError, match=r"1024 tasks is too long, expected at most 1023; set tasks.encoding to embedding"
    ):
        task_schema(env, EnvTasksSettings(encoding="one_hot"), [pole] * 1024)
    with pytest.raises(EnvError, match="'pole' has none"):
        task_schema(env, EnvTasksSettings(encoding="embedding"), [pole])


def test_padded_lanes_see_zeros_beyond_their_own() -> None:
    """Vectors of every task start the state, actions are cut to what the environment takes, and embeddings follow the task."""
    tasks = TaskSet(
        [
            EnvTask(LEVEL, {"level": 0, "length": 2, "size": 3}, "a", "all", 0, 0.0, None, (0.5, -1.0)),
            EnvTask(LEVEL, {"level": 1, "length": 3, "size": 5}, "b", "all", 1, 0.0, None, (0.25, 1.0)),
            EnvTask("CheetahRun-v1", {"max_episode_steps": 4}, "c", "all", 2, 0.0, None, (0.0, 0.0)),
        ]
    )
    settings_ = EnvTasksSettings(pad=True, encoding="embedding")
    env = TaskEnv(EnvSettings(id=LEVEL), settings_, tasks, Asked(tasks, [0, 1, 2] * 50), num_envs=4, seed=0)
    assert env.schema.observations == (
        Field("observation/state", "float32", (17,)),
        Field("observation/task", "float32", (2,)),
    )
    assert env.schema.action.shape == (6,)
    env.start()
    seen: set[int] = set()
    cheetahs = []
    for _ in range(40):
        result = env.recv()
        assert result.task is not None
        for row, number in enumerate(result.task.tolist()):
            state = result.observation["observation/state"][row]
            assert result.observation["observation/task"][row].tolist() == list(tasks[number].embedding or ())
            if number < 2:
                size = int(tasks[number].kwargs["size"])
                assert state[0] == number
                assert (state[3:size] == 7).all()
                assert (state[size:] == 0).all()
            elif not result.reset[row]:
                cheetahs.append(state)
            seen.add(number)
        env.send(env.sample_actions(4, np.random.default_rng(0)), result.env_id)
    assert seen == {0, 1, 2}
    assert len(cheetahs) > 20
    assert all(np.count_nonzero(state) == 17 for state in cheetahs)  # 8 positions and 9 velocities
    env.close()


def test_what_is_built_later_must_fit() -> None:
    """Of very many tasks a sample is looked at; one that does not fit is an error when it is built."""
    many = [task("CartPole-v1", str(n), 1.0, max_episode_steps=n) for n in range(1, 200)]
    odd = 1  # not in a sample of 64 spread over 200
    many[odd] = task("CartPole-v1", "odd", 1.0, max_episode_steps=7)
    tasks = TaskSet(many)
    env = TaskEnv(EnvSettings(id="CartPole-v1"), PLAIN, tasks, Asked(tasks, [odd]), num_envs=1, seed=0)
    env.start()
    env.close()
    levels = [level(n, 1, threshold=0.0) for n in range(199)]
    levels[odd] = task(LEVEL, "odd", 0.0, level=1, length=1, size=4)
    tasks = TaskSet(levels)
    env = TaskEnv(EnvSettings(id=LEVEL), PLAIN, tasks, Asked(tasks, [odd]), num_envs=1, seed=0)
    with pytest.raises(
        EnvError, match=r"'odd' does not fit .* observation float32\[3\] against observation float32\[4\]"
    ):
        env.start()
