"""Evaluation takes exactly the episodes it should; recording draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.utils import seeding
from numpy.typing import NDArray

from actors.env_tasks import EnvTask
from actors.envs import EnvError
from actors.evaluate import MAX_FRAMES, MAX_LANES, Evaluator, TaskEvaluator, evaluate, record
from actors.protocol import Observation
from actors.spaces import lane_seeds
from actors.task_set import TaskSet
from configs.schema import EnvSettings, EnvTasksSettings
from learners.policy import Lanes

OWN = "tests.envs_for_tests:"


class Still:
    """Always the middle action; fails when asked for anything but a deterministic one."""

    chunk, state_size = 1, 0

    def __init__(self, action: Any = (0.0,)) -> None:
        self._action = np.asarray(action)

    def load(self, data: bytes) -> None:
        raise AssertionError("evaluation must not change weights")

    def act(
        self,
        observation: Observation,
        lanes: Lanes | None = None,
        *,
        deterministic: bool,
        generator: np.random.Generator,
    ) -> NDArray[Any]:
        assert deterministic
        count = len(next(iter(observation.values())))
        return np.broadcast_to(self._action, (count, 1, *self._action.shape)).copy()


@pytest.mark.parametrize("episodes", [1, 10, 40])
def test_every_lane_gives_its_share(episodes: int) -> None:
    """Lanes whose episodes are ten times longer count as much as the others: no bias to short episodes."""
    settings = EnvSettings(id=OWN + "make_counter", kwargs={"terminate_at": 5, "spread": 50})
    lanes = min(episodes, MAX_LANES)
    expected = []
    for lane, seed in enumerate(lane_seeds(11, lanes)):
        length = 5 + int(seeding.np_random(seed)[0].integers(51))
        count = episodes // lanes + (lane < episodes % lanes)
        expected += [length * (length + 1) / 2] * count
    assert evaluate(settings, Still((0.0, 0.0)), episodes=episodes, seed=11) == expected
    assert episodes == 1 or max(expected) > 5 * min(expected)


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_evaluator_repeats_itself(backend: str) -> None:
    settings = EnvSettings(id="Pendulum-v1", backend=backend)  # type: ignore[arg-type]
    evaluator = Evaluator(settings, episodes=6, seed=2)
    first, again = evaluator.run(Still()), evaluator.run(Still())
    evaluator.close()
    assert first == again == evaluate(settings, Still(), episodes=6, seed=2)
    assert len(set(first)) == 6
    assert all(-2000 < value < 0 for value in first)
    assert evaluate(settings, Still(), episodes=6, seed=3) != first


def test_broken_episodes_are_not_scored() -> None:
    kwargs: dict[str, Any] = {"terminate_at": 4, "raise_at": 2}
    settings = EnvSettings(id=OWN + "make_counter", kwargs=kwargs)
    assert evaluate(settings, Still((0.0, 0.0)), episodes=70, seed=0) == [10.0] * 70


def test_tasks_one_after_another() -> None:
    """Each task's episodes by its own rule, in the order asked for, alike at every evaluation and whatever the list."""
    pendulum: dict[str, Any] = {"max_episode_steps": 30}
    tasks = TaskSet(
        [
            EnvTask("Pendulum-v1", pendulum, "p", "all", 0, threshold=-100.0),
            EnvTask("Pendulum-v1", {"max_episode_steps": 5}, "q", "all", 1),
            EnvTask(
                "tests.test_task_env:make_level", {"level": 2, "length": 4, "wins_at": 2}, "w", "all", 2, None, "won"
            ),
            EnvTask("tests.test_task_env:make_level", {"level": 2, "length": 4, "raises_at": 3}, "r", "all", 3, 8.0),
        ]
    )
    env, settings = EnvSettings(), EnvTasksSettings(encoding="one_hot", pad=True)

    class Telling(Still):
        """Remembers which tasks it was told of."""

        def __init__(self) -> None:
            super().__init__(np.zeros(2))
            self.told: list[int] = []

        def act(self, observation: Observation, *args: Any, **kwargs: Any) -> NDArray[Any]:
            self.told += observation["observation/task"].argmax(1).tolist()
            return super().act(observation, *args, **kwargs)

    policy = Telling()
    evaluator = TaskEvaluator(env, settings, tasks, [3, 0, 2, 1], episodes=3, seed=5)
    results = evaluator.run(policy)
    assert policy.told == sorted(policy.told, key=[3, 0, 2, 1].index)
    assert set(policy.told) == {0, 1, 2, 3}
    assert evaluator.run(policy) == results
    evaluator.close()
    assert [r.number for r in results] == [3, 0, 2, 1]
    assert (results[0].returns, results[0].successes) == ([8.0] * 3, [True] * 3)
    assert len(set(results[1].returns)) == 3
    assert results[1].successes == [value >= -100.0 for value in results[1].returns]
    assert (results[2].returns, results[2].successes) == (
        [8.0] * 3,
        [True] * 3,
    )  # the first episode of each of three lanes
    assert results[3].successes is None
    alone = TaskEvaluator(env, settings, tasks, [0], episodes=3, seed=5)
    assert alone.run(policy) == [results[1]]
    alone.close()
    # With one task the episodes are those of its environment under the plain evaluator with the pool's seed.
    seed = int(np.random.SeedSequence(5).spawn(1)[0].generate_state(1)[0])
    assert results[1].returns == evaluate(EnvSettings(kwargs=pendulum), Still(), episodes=3, seed=seed)


def test_recording(tmp_path: Path) -> None:
    """EnvPool's renderer and an environment's own; the return is that of an evaluation with the same seed."""
    pendulum = EnvSettings(id="Pendulum-v1", kwargs={"max_episode_steps": 60})
    total = record(pendulum, Still(), path=tmp_path / "pendulum.gif", seed=4)
    assert [total] == evaluate(pendulum, Still(), episodes=1, seed=4)
    frames = imageio.imread(tmp_path / "pendulum.gif")
    assert len(frames) == 61
    assert frames.std(axis=0).max() > 10  # the pole moves

    own = EnvSettings(id=OWN + "make_counter", kwargs={"truncate_at": 3 * MAX_FRAMES})
    record(own, Still((0.0, 0.0)), path=tmp_path / "own.gif", seed=0)
    assert MAX_FRAMES / 2 < imageio.improps(tmp_path / "own.gif").shape[0] <= MAX_FRAMES + 1


def test_recording_mujoco(tmp_path: Path) -> None:
    """A machine without OpenGL gets a clear error, where MuJoCo itself would end the process."""
    settings = EnvSettings(id="HalfCheetah-v4", kwargs={"max_episode_steps": 10})
    reason = None
    try:
        record(settings, Still(np.zeros(6)), path=tmp_path / "cheetah.gif", seed=0)
    except EnvError as error:
        reason = str(error)
    if reason is None:
        frames = imageio.imread(tmp_path / "cheetah.gif")
        assert len(frames) == 11
        assert frames.std() > 5
    else:
        assert "libegl1" in reason
        assert not list(tmp_path.iterdir())


def test_recording_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(EnvError, match=r"cannot draw 'FrozenLake-v1' .* not implemented"):
        record(EnvSettings(id="FrozenLake-v1"), Still(0), path=tmp_path / "lake.gif", seed=0)
    with pytest.raises(EnvError, match=r"make_camera.*render_mode"):
        record(EnvSettings(id=OWN + "make_camera"), Still(0), path=tmp_path / "camera.gif", seed=0)
    assert not list(tmp_path.iterdir())
