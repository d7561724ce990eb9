"""Evaluation takes exactly the episodes it should; recording draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.utils import seeding
from numpy.typing import NDArray

from actors.envs import EnvError
from actors.evaluate import MAX_FRAMES, MAX_LANES, Evaluator, evaluate, record
from actors.protocol import Observation
from actors.spaces import lane_seeds
from configs.schema import EnvSettings, Scalar
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
    kwargs: dict[str, Scalar] = {"terminate_at": 4, "raise_at": 2}
    settings = EnvSettings(id=OWN + "make_counter", kwargs=kwargs)
    assert evaluate(settings, Still((0.0, 0.0)), episodes=70, seed=0) == [10.0] * 70


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
