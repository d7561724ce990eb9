"""Discrete control through EnvPool: vectors, pictures and Atari frames; stored once, seen as stacks, played and evaluated."""

from __future__ import annotations

from typing import Any

import envpool
import numpy as np
import pytest
import torch
from safetensors.torch import save

from actors.envs import EnvError, check_env, make_env
from actors.evaluate import evaluate
from actors.rollout import Rollout
from actors.spaces import lane_seeds
from configs.algorithms import DqnSettings
from configs.schema import EnvSettings
from learners.encoders import make_network
from learners.observations import ObservationVector, frame_field, frame_shape
from learners.policy import Policy, acting_policy
from replay.schema import Field, StepSchema, Window
from replay.writers import CallWriter
from tests.replay_for_tests import draw_all, make_shard

pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")

SHORT: dict[str, Any] = {"max_episode_steps": 25}
TASKS = [
    EnvSettings(id="CartPole-v1"),
    EnvSettings(id="LunarLander-v3", kwargs=SHORT),
    EnvSettings(id="Catch-v0"),
    EnvSettings(id="MiniGrid-Empty-5x5-v0", kwargs=SHORT),
    EnvSettings(id="Pong-v5", kwargs=SHORT, stack=4),
    EnvSettings(id="Pong-v5", kwargs=SHORT),  # EnvPool stacks: four channels, each stored four times
]
ENCODER = {"MiniGrid-Empty-5x5-v0": "none"}


def greedy(schema: StepSchema, settings: EnvSettings, *, seed: int = 0) -> tuple[Policy, bytes]:
    """An acting policy, and random weights for it, from the networks of a learner."""
    algorithm = DqnSettings(hidden=(16,), epsilon=0.3, epsilon_ladder=0.0, encoder=ENCODER.get(settings.id, "auto"))
    field = frame_field(schema, algorithm.encoder)
    size = ObservationVector(schema, without=field).size
    shape = None if field is None else frame_shape(field, settings.stack)
    network = make_network(
        algorithm, networks=1, inputs=size, outputs=schema.action.choices, vector_size=size, frame_shape=shape
    )
    flat = network.initial(torch.Generator().manual_seed(seed))
    return acting_policy(schema, algorithm, stack=settings.stack), save(network.named("critics", flat))


@pytest.mark.parametrize("settings", TASKS, ids=lambda settings: f"{settings.id}-{settings.stack}")
def test_random_and_greedy_rollouts_and_evaluation(settings: EnvSettings) -> None:
    """Every stored step can be drawn; actions are legal, random ones spread, greedy ones named; evaluation repeats itself."""
    schema = check_env(settings)
    policy, weights = greedy(schema, settings)
    env = make_env(settings, num_envs=4, batch_size=2, threads=1, seed=0)
    shard = make_shard(schema=schema, stack=settings.stack)
    rollout = Rollout(
        env,
        policy,
        CallWriter(shard),
        random_steps=60,
        rows_per_write=16,
        write_every_s=60.0,
        seed=0,
        stack=settings.stack,
        discount=0.9,
    )
    rollout.set_policy(3, weights)
    while rollout.stats()["env_steps"] < 130:
        rollout.step()
    rollout.close()
    batch = draw_all(shard, window=Window(1, stack=settings.stack))
    steps = rollout.stats()["env_steps"]
    assert steps - env.num_envs <= len(batch) <= steps  # what follows a lane's last step is not known yet
    rows = batch.steps[:, 0]
    random, chosen = (rows["action"][rows["policy_version"] == version] for version in (0, 3))
    assert len(random) + len(chosen) == len(rows)
    assert set(random.tolist()) == set(range(schema.action.choices))
    assert set(chosen.tolist()) <= set(range(schema.action.choices))
    assert len(chosen) >= 50
    low, high = rollout.return_extent() or (1.0, -1.0)
    assert rows["reward"].min() - 1e-3 <= high
    assert low <= rows["reward"].max() + 1e-3

    policy.load(weights)
    first = evaluate(settings, policy, episodes=3, seed=5)
    assert len(first) == 3
    assert first == evaluate(settings, policy, episodes=3, seed=5)


def test_atari_frames_are_single_where_the_agent_stacks_them() -> None:
    """With `env.stack` 4 the schema holds one frame, and what the replay stacks are EnvPool's own stacks."""
    stacked, single = (EnvSettings(id="Pong-v5", kwargs=SHORT, stack=n) for n in (1, 4))
    assert check_env(stacked).observations == (Field("observation", "uint8", (4, 84, 84)),)
    schema = check_env(single)
    assert schema.observations == schema.large == (Field("observation", "uint8", (1, 84, 84)),)

    env = make_env(single, num_envs=1, threads=1, seed=3)
    shard = make_shard(schema=schema, stack=4)
    policy, _ = greedy(schema, single)
    rollout = Rollout(
        env, policy, CallWriter(shard), random_steps=0, rows_per_write=1, write_every_s=60.0, seed=1, stack=4
    )
    for _ in range(20):
        rollout.step()
    rollout.close()
    batch = draw_all(shard, window=Window(1, stack=4))
    order = np.argsort(batch.item)
    frames, actions = batch.frames["observation"][order, 0, :, 0], batch.steps["action"][order, 0]

    pool = envpool.make("Pong-v5", env_type="gymnasium", num_envs=1, seed=lane_seeds(3, 1), **SHORT)
    observation, _ = pool.reset()
    for step in range(len(actions)):
        # EnvPool pads the start with black frames, the replay with the first one: from the fourth on they must agree.
        real = min(step + 1, 4)
        np.testing.assert_array_equal(frames[step, -real:], observation[0, -real:])
        assert (frames[step, : 4 - real] == frames[step, 4 - real]).all()
        observation = pool.step(actions[step : step + 1])[0]
    assert len(np.unique(frames.reshape(-1, 84 * 84), axis=0)) > 5


def test_what_has_no_frames_is_not_stacked() -> None:
    settings = EnvSettings(id="CartPole-v1", stack=4)
    with pytest.raises(
        EnvError, match=r"env\.stack \(4\) stacks frames.* has observation float32\[4\]; set env\.stack to 1"
    ):
        check_env(settings)
    with pytest.raises(EnvError, match=r"env\.stack \(4\)"):
        make_env(settings, num_envs=1, seed=0)


def test_a_stack_of_ones_own_is_left_alone() -> None:
    """Frames that the environment was told to stack count as one."""
    settings = EnvSettings(id="Pong-v5", kwargs={"stack_num": 2}, stack=3)
    assert check_env(settings).large == (Field("observation", "uint8", (2, 84, 84)),)
