"""Rollouts write RLDS steps that equal those of plain loops over single environments."""

from __future__ import annotations

import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import envpool
import numpy as np
import pytest
from numpy.typing import NDArray

from actors.envs import make_env
from actors.protocol import Observation
from actors.rollout import Rollout
from actors.spaces import lane_seeds
from configs.schema import EnvSettings
from learners.policy import Lanes
from replay.process import ShardProcess
from replay.schema import StepSchema
from replay.security import flight_client
from replay.shard import ShardSpec
from replay.writers import FlightWriter

OWN = "tests.envs_for_tests:"
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
ROOM: dict[str, Any] = {"random_steps": 0, "rows_per_write": 64, "write_every_s": 60.0, "seed": 0}


class Sink:
    """Keeps what is written."""

    waiting_for: str | None = None

    def __init__(self) -> None:
        self.writes: list[tuple[NDArray[np.int32], NDArray[Any]]] = []
        self.closed = False

    def append(self, lanes: NDArray[np.int32], rows: NDArray[Any]) -> None:
        self.writes.append((lanes, rows.copy()))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def lanes(self) -> dict[int, NDArray[Any]]:
        """Rows of each lane, in the order they were written."""
        rows: dict[int, list[Any]] = defaultdict(list)
        for lanes, written in self.writes:
            for lane, row in zip(lanes.tolist(), written, strict=True):
                rows[lane].append(row)
        return {lane: np.array(values) for lane, values in rows.items()}


class Linear:
    """A policy without noise: each action is a clipped, scaled entry of the observation."""

    chunk, state_size = 1, 0

    def __init__(self, schema: StepSchema) -> None:
        self._action = schema.action
        self.calls = 0

    def load(self, data: bytes) -> None:
        self.gain = np.float32(data)

    def act(
        self,
        observation: Observation,
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        self.calls += 1
        values = observation["observation"]
        if self._action.shape:
            action: NDArray[Any] = np.clip(self.gain * values[:, None, -self._action.shape[0] :], -1, 1)
            return action
        return (self.gain * values[:, 1:2] < 0).astype(np.int64)


def reference(settings: EnvSettings, schema: StepSchema, *, seed: int, steps: int) -> NDArray[Any]:
    """Rows of one environment, by a plain loop over EnvPool with one lane."""
    env = envpool.make(settings.id, env_type="gymnasium", num_envs=1, seed=[seed])
    policy = Linear(schema)
    policy.load(b"3")
    rows: list[Any] = []
    while len(rows) < steps:
        observation, _ = env.reset()
        first, ended = True, False
        while not ended:
            row = schema.zeros(1)
            row["observation"] = observation
            action = policy.act(
                {"observation": row["observation"]}, deterministic=True, generator=np.random.default_rng(0)
            )[:, 0]
            row["action"], row["is_first"], row["policy_version"] = action, first, 1
            high = getattr(env.action_space, "high", np.ones(1))
            observation, reward, terminated, truncated, _ = env.step(action * high if schema.action.shape else action)
            row["reward"] = reward
            rows.append(row[0])
            first, ended = False, bool(terminated[0] or truncated[0])
        row = schema.zeros(1)
        row["observation"], row["is_last"], row["is_terminal"], row["policy_version"] = observation, True, terminated, 1
        rows.append(row[0])
    return np.array(rows)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Hopper-v4"])
def test_rows_equal_a_plain_loop(env_id: str, batch_size: int | None) -> None:
    settings = EnvSettings(id=env_id)
    env = make_env(settings, num_envs=5, batch_size=batch_size, threads=2, seed=3)
    schema, sink = env.schema, Sink()
    rollout = Rollout(env, Linear(schema), sink, **ROOM)
    rollout.set_policy(1, b"3")
    steps = 0
    while min((len(rows) for rows in sink.lanes().values()), default=0) < 220 or len(sink.lanes()) < 5:
        steps += sum(rollout.step() for _ in range(50))
    rollout.close()
    assert sink.closed
    written = sink.lanes()
    for lane, seed in enumerate(lane_seeds(3, 5)):
        rows = written[lane]
        expected = reference(settings, schema, seed=seed, steps=len(rows))
        for name in schema.dtype.names or ():
            np.testing.assert_array_equal(rows[name], expected[name][: len(rows)], err_msg=f"lane {lane}: {name}")
        assert expected["is_last"].sum() >= 1
    transitions = sum(int((~rows["is_last"]).sum()) for rows in written.values())
    assert transitions == steps == rollout.stats()["env_steps"]

    # The episodes logged are those written, with the sums of their rewards.
    found = []
    for lane, rows in written.items():
        ends = np.flatnonzero(rows["is_last"])
        for begin, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            assert rows["is_first"][begin : end + 1].tolist() == [True] + [False] * (end - begin)
            found.append(
                (lane, end - begin, bool(rows["is_terminal"][end]), rows["reward"][begin:end].astype(float).sum())
            )
    logged = [(e.lane, e.length, e.terminated, e.return_) for e in rollout.episodes]
    for (*left, one), (*right, other) in zip(sorted(found), sorted(logged), strict=True):
        assert left == right
        assert one == pytest.approx(other, rel=1e-9)
    assert [e.index for e in rollout.episodes] == list(range(len(found)))
    assert rollout.stats()["episodes"] == len(found)
    assert (env_id == "Pendulum-v1") == (not any(e.terminated for e in rollout.episodes))


def test_random_actions_first_then_the_policy() -> None:
    """Random steps carry version 0 and spread over [−1, 1]; without weights a rollout stays random; later rows name their policy."""
    env = make_env(EnvSettings(id="Pendulum-v1"), num_envs=4, seed=0)
    sink, policy = Sink(), Linear(env.schema)
    rollout = Rollout(env, policy, sink, **{**ROOM, "random_steps": 400})
    for _ in range(111):
        rollout.step()
    assert rollout.version == policy.calls == 0
    rollout.set_policy(5, b"0")
    rollout.step()
    rollout.set_policy(9, b"0.5")
    for _ in range(40):
        rollout.step()
    rollout.close()
    rows = sink.lanes()[0]
    assert sorted(sink.lanes()) == [0, 1, 2, 3]
    assert {e.lane for e in rollout.episodes} <= {0, 1, 2, 3}
    assert rows["policy_version"].tolist() == [0] * 111 + [5] + [9] * 39
    assert rows["action"][111] == 0
    random = np.concatenate([lane["action"][:111, 0] for lane in sink.lanes().values()])
    assert -1 <= random.min() < -0.95
    assert 0.95 < random.max() <= 1
    assert abs(random.mean()) < 0.15

    # With weights from the start the random share still comes first.
    env = make_env(EnvSettings(id="Pendulum-v1"), num_envs=4, seed=0)
    sink = Sink()
    rollout = Rollout(env, Linear(env.schema), sink, **{**ROOM, "random_steps": 40})
    rollout.set_policy(1, b"1")
    for _ in range(30):
        rollout.step()
    rollout.close()
    versions = np.array([lane["policy_version"] for lane in sink.lanes().values()])
    assert int((versions == 0).sum()) == 44  # 40 steps, and the four that were chosen before the fortieth was complete
    assert (np.diff(versions, axis=1) >= 0).all()


@pytest.mark.parametrize("rows_per_write", [1, 8, 20])
def test_writes_are_bounded(rows_per_write: int) -> None:
    """No write holds more transitions than rows_per_write, or than one recv brings if that is more."""
    env = make_env(EnvSettings(id="CartPole-v1"), num_envs=8, batch_size=4, threads=1, seed=0)
    sink = Sink()
    rollout = Rollout(env, Linear(env.schema), sink, **{**ROOM, "rows_per_write": rows_per_write})
    for _ in range(300):
        rollout.step()
    rollout.close()
    sizes = [int((~rows["is_last"]).sum()) for _, rows in sink.writes]
    assert max(sizes) == max(rows_per_write - rows_per_write % 4, 4)
    assert rollout.stats()["episodes"] > 20


def test_rows_do_not_wait_longer_than_asked() -> None:
    env = make_env(EnvSettings(id="Pendulum-v1"), num_envs=2, seed=0)
    sink = Sink()
    rollout = Rollout(env, Linear(env.schema), sink, **{**ROOM, "rows_per_write": 1000, "write_every_s": 0.05})
    rollout.step()
    rollout.step()
    assert not sink.writes
    time.sleep(0.06)
    rollout.step()
    assert [len(lanes) for lanes, _ in sink.writes] == [4]
    rollout.step()
    rollout.close()
    assert [len(lanes) for lanes, _ in sink.writes] == [4, 2]


def test_a_broken_episode_ends_in_its_last_known_observation() -> None:
    """Truncated, void, counted, and in no episode's return."""
    kwargs: dict[str, Any] = {"terminate_at": 3, "raise_at": 2}
    env = make_env(EnvSettings(id=OWN + "make_counter", kwargs=kwargs), num_envs=2, seed=0)
    sink = Sink()
    rollout = Rollout(env, Linear(env.schema), sink, **ROOM)
    steps = sum(rollout.step() for _ in range(12))
    rollout.close()
    assert steps == 14  # per lane 3, 1 before the exception, 3
    assert rollout.stats()["broken_episodes"] == 2
    assert [(e.length, e.return_, e.terminated) for e in rollout.episodes] == [(3, 6.0, True)] * 4
    for rows in sink.lanes().values():
        assert rows["observation"].tolist() == [
            [0, 0],
            [0, 1],
            [0, 2],
            [0, 3],
            [1, 0],
            [1, 1],
            [0, 0],
            [0, 1],
            [0, 2],
            [0, 3],
        ]
        assert rows["reward"].tolist() == [1, 2, 3, 0, 1, 0, 1, 2, 3, 0]
        assert np.flatnonzero(rows["is_first"]).tolist() == [0, 4, 6]
        assert np.flatnonzero(rows["is_last"]).tolist() == [3, 5, 9]
        assert np.flatnonzero(rows["is_terminal"]).tolist() == [3, 9]
        assert (rows["action"][[3, 5, 9]] == 0).all()


def test_dict_observations_and_pictures() -> None:
    env = make_env(EnvSettings(id=OWN + "make_camera"), num_envs=3, seed=0)
    sink = Sink()
    rollout = Rollout(env, Linear(env.schema), sink, **ROOM)
    for _ in range(20):
        rollout.step()
    rollout.close()
    for rows in sink.lanes().values():
        value = np.concatenate([[0], rows["action"][:-1] + 1])  # the camera shows the last action, counted from 1
        assert len(set(value[1:].tolist())) == 3
        np.testing.assert_array_equal(rows["observation/picture"], value[:, None, None, None] * np.ones((1, 4, 5, 3)))
        np.testing.assert_array_equal(rows["observation/body/gear"], value)
        np.testing.assert_allclose(rows["observation/body/joints"], value[:, None] / 10 * np.ones(3), rtol=1e-6)
        np.testing.assert_array_equal(rows["reward"], rows["action"] + 1)


def test_into_a_real_shard(tmp_path: Path) -> None:
    """Through Arrow Flight: the shard counts as many steps as the rollout, final rows aside."""
    env = make_env(EnvSettings(id=OWN + "make_counter", kwargs={"truncate_at": 7}), num_envs=4, seed=0)
    spec = ShardSpec(
        schema=env.schema.to_json(),
        run="test-rollout",
        index=0,
        capacity=4096,
        segment_steps=64,
        seed=0,
        directory=str(tmp_path),
    )
    with ShardProcess(spec) as shard:
        connect = partial(flight_client, security=shard.security)
        rollout = Rollout(env, Linear(env.schema), FlightWriter(shard.address, env.schema, connect=connect), **ROOM)
        steps = sum(rollout.step() for _ in range(12 * 8))  # twelve episodes: a reset and 7 steps
        rollout.close()
        stats = shard.stats()
    found = stats["tables"]["steps"]
    assert found["limiter"]["inserted"] == found["inserted"] == steps == rollout.stats()["env_steps"] == 4 * 12 * 7
