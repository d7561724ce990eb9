"""What an agent remembers for its lanes: chunks of actions, stacks of frames, recurrent states, and how far returns reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.agent import Agent
from actors.evaluate import evaluate
from actors.protocol import Observation
from actors.returns import MOST_LANES, MOST_STEPS, ReturnExtent
from actors.rollout import Rollout
from configs.schema import EnvSettings
from learners.policy import Lanes
from replay.schema import Window
from replay.writers import CallWriter
from tests.envs_for_tests import Scripted
from tests.replay_for_tests import draw_all, make_shard
from tests.test_rollout import OWN, Sink


class Clockwork:
    """Chooses actions that tell where they come from, counts steps in its state, and remembers what it was shown."""

    def __init__(self, chunk: int, *, state_size: int = 0) -> None:
        self.chunk, self.state_size = chunk, state_size
        self.version = 0
        self.asked: list[tuple[int, ...]] = []  # (lane, episode, step) of each decision
        self.frames: dict[tuple[int, ...], NDArray[np.uint8]] = {}

    def load(self, data: bytes) -> None:
        self.version = int(data)

    def act(
        self,
        observation: Observation,
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        assert lanes is not None
        seen = observation["observation/state"].astype(int)
        if self.state_size:
            np.testing.assert_array_equal(lanes.state[:, 0], seen[:, 2])
            lanes.state[:] += 1.0
        self.asked += map(tuple, seen.tolist())
        if "observation/frame" in observation:
            for key, frames in zip(map(tuple, seen.tolist()), observation["observation/frame"], strict=True):
                self.frames[key] = frames.copy()
        action = np.empty((len(seen), self.chunk, 5), np.float32)
        action[:, :, :3] = seen[:, None]
        action[:, :, 3] = np.arange(self.chunk)
        action[:, :, 4] = self.version
        return action


def rollout_of(env: Scripted, policy: Clockwork, sink: Any, **settings: Any) -> Rollout:
    room: dict[str, Any] = {"random_steps": 0, "rows_per_write": 16, "write_every_s": 60.0, "seed": 0}
    return Rollout(env, policy, sink, **{**room, **settings})


@given(
    chunk=st.integers(1, 6),
    lanes=st.integers(1, 5),
    share=st.floats(0.1, 1.0),
    longest=st.integers(1, 9),
    random_steps=st.integers(0, 20),
    seed=st.integers(0, 2**20),
)
def test_chunks_are_executed_open_loop(
    chunk: int, lanes: int, share: float, longest: int, random_steps: int, seed: int
) -> None:
    """Action t of an episode is entry t mod chunk of the decision at step t − t mod chunk, by the policy of that time.

    Whatever the episodes' lengths and the order of lanes: an end drops the rest of a chunk, and the call that resets takes
    none of the next. The policy is asked exactly when a chunk begins.
    """
    env = Scripted(lanes, max(1, round(share * lanes)), longest=longest, seed=seed)
    policy, sink = Clockwork(chunk), Sink()
    rollout = rollout_of(env, policy, sink, random_steps=random_steps)
    generator = np.random.default_rng(seed)
    rollout.set_policy(1, b"1")
    for _ in range(60):
        rollout.step()
        if generator.random() < 0.3:
            rollout.set_policy(rollout.version + 1, str(rollout.version + 1).encode())
    rollout.close()

    expected: list[tuple[int, ...]] = []
    for lane, rows in sink.lanes().items():
        first_of_chunk, version = 0, 0
        for row in rows:
            step, episode = int(row["observation/state"][2]), int(row["observation/state"][1])
            cut = (
                bool(row["is_last"]) and (lane, episode) in env.broken
            )  # its action was chosen, and its result is lost
            if row["is_last"]:
                assert (row["action"] == 0).all()
            if row["policy_version"] == 0 or (row["is_last"] and not cut):
                assert row["is_last"] or (row["action"] == -1).all()
                continue
            if row["is_first"] or version == 0 or step - first_of_chunk == chunk:
                first_of_chunk = step
                expected.append((lane, episode, step))
                assert row["policy_version"] >= version
                version = int(row["policy_version"])
            assert row["policy_version"] == version
            if not cut:
                assert row["action"].tolist() == [lane, episode, first_of_chunk, step - first_of_chunk, version]
        asked = [key for key in policy.asked if key[0] == lane]
        written = [key for key in expected if key[0] == lane]
        assert asked[: len(written)] == written
        assert len(asked) - len(written) <= 1  # the step whose reward is not known yet


def test_states_start_at_zero_and_are_stored_before_the_step() -> None:
    """The counter that the policy keeps as its state equals the step within the episode, in the rows and in the policy."""
    env, policy, sink = Scripted(4, 2, longest=7, seed=1), Clockwork(1, state_size=3), Sink()
    rollout = rollout_of(env, policy, sink)
    rollout.set_policy(1, b"1")
    for _ in range(200):
        rollout.step()
    rollout.close()
    for rows in sink.lanes().values():
        assert rows["state"].shape == (len(rows), 3)
        np.testing.assert_array_equal(rows["state"], np.repeat(rows["observation/state"][:, 2:], 3, axis=1))
        assert rows["state"].max() > 2


@pytest.mark.parametrize("stack", [2, 4])
def test_stacks_are_those_that_replay_rebuilds(stack: int) -> None:
    """At every stored step the policy saw the very frames that the learner gets, short episodes and cut ones included."""
    env, policy = Scripted(3, 2, longest=6, seed=2, frames=True), Clockwork(1)
    shard = make_shard(schema=env.schema, stack=stack)
    rollout = rollout_of(env, policy, CallWriter(shard), stack=stack)
    rollout.set_policy(1, b"1")
    for _ in range(300):
        rollout.step()
    rollout.close()
    batch = draw_all(shard, window=Window(1, stack=stack))
    assert len(batch) > 300
    differ = 0
    for row, frames in zip(batch.steps[:, 0], batch.frames["observation/frame"][:, 0], strict=True):
        key = tuple(row["observation/state"].astype(int).tolist())
        np.testing.assert_array_equal(policy.frames[key], frames)
        differ += len(np.unique(frames))
    assert differ > 1.5 * len(batch)


@pytest.mark.parametrize("chunk", [1, 3])
def test_evaluation_executes_chunks_as_a_rollout_does(chunk: int) -> None:
    class Climber(Clockwork):
        """Asks at the steps where a chunk begins, and only there."""

        def act(
            self,
            observation: Observation,
            lanes: Lanes | None = None,
            *,
            deterministic: bool,
            generator: np.random.Generator,
        ) -> NDArray[Any]:
            assert deterministic
            seen = observation["observation"].astype(int)
            self.asked += map(tuple, seen.tolist())
            return np.zeros((len(seen), self.chunk, 2), np.float32)

    policy = Climber(chunk)
    settings = EnvSettings(id=OWN + "make_counter", kwargs={"terminate_at": 7})
    assert evaluate(settings, policy, episodes=2, seed=0) == [28.0, 28.0]
    begins = sorted((0, step) for step in range(0, 7, chunk) for _ in range(2))
    assert sorted(policy.asked) == begins


def test_lanes_know_their_place_among_all_lanes() -> None:
    env, policy = Scripted(2, 2, longest=3, seed=0), Clockwork(1)
    for first, of, expected in ((0, 0, [0.0, 1.0]), (2, 5, [0.5, 0.75]), (3, 5, [0.75, 1.0])):
        agent = Agent(policy, env.schema, 2, first_lane=first, of=of)
        np.testing.assert_allclose(agent._rank, expected)
    np.testing.assert_array_equal(Agent(policy, env.schema, 1)._rank, [0.0])


# ---------------------------------------------------------------------------------------------------- return extents


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    discount=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    running=st.integers(0, 100),
    seed=st.integers(0, 2**20),
)
def test_return_extents_equal_a_plain_sum(lengths: list[int], discount: float, running: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    extent = ReturnExtent(2, discount)
    assert extent.extent() is None
    episodes = [generator.normal(size=n).astype(np.float32) for n in (*lengths, *[running] * bool(running))]
    for i, rewards in enumerate(episodes):
        for reward in rewards:
            extent.add(np.array([1], np.int32), np.array([reward]))
        if i < len(lengths):
            extent.end(np.array([1], np.int32))
    returns = [
        sum(discount**k * float(r) for k, r in enumerate(rewards[t:]))
        for rewards in episodes
        for t in range(len(rewards))
    ]
    found = extent.extent()
    assert found is not None
    np.testing.assert_allclose(found, (min(returns), max(returns)), rtol=1e-6, atol=1e-6)


def test_return_extents_of_endless_episodes_and_many_lanes_stay_small() -> None:
    extent = ReturnExtent(10 * MOST_LANES, 0.5)
    lanes = np.arange(10 * MOST_LANES, dtype=np.int32)
    for _ in range(MOST_STEPS + 10):
        extent.add(lanes, np.ones(len(lanes), np.float32))
    assert extent._rewards.shape == (MOST_LANES, MOST_STEPS)
    np.testing.assert_allclose(extent.extent() or (), (1.0, 2.0))
    extent.add(lanes, np.full(len(lanes), np.nan, np.float32))
    np.testing.assert_allclose(extent.extent() or (), (1.0, 2.0))


def test_a_rollout_measures_only_where_it_is_asked_to() -> None:
    env = Scripted(3, 2, longest=4, seed=0)
    plain, measuring = (rollout_of(env, Clockwork(1), Sink(), discount=discount) for discount in (None, 0.5))
    for _ in range(100):
        plain.step()
    env.start()
    assert measuring.return_extent() is None
    for _ in range(100):
        measuring.step()
    assert plain.return_extent() is None
    # Rewards 1, 2, 3, 4: the lowest return is that of a one-step episode, the highest 3 + 4 / 2 or what a broken end left.
    low, high = measuring.return_extent() or (0.0, 0.0)
    assert low == 1.0
    assert high == 5.0
