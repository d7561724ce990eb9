"""Environments behind one protocol: schema, scaling, resets, order, errors."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import envpool
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from actors.envs import EnvError, EnvStep, VectorEnv, check_env, make_env
from actors.gymnasium_env import MAX_FAILURES, GymnasiumEnv
from actors.spaces import lane_seeds
from configs.schema import EnvSettings
from replay.schema import Field

OWN = "tests.envs_for_tests:"
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")


def run(env: VectorEnv, recvs: int, seed: int = 0) -> list[EnvStep]:
    """Results of `recvs` receives with random actions."""
    generator = np.random.default_rng(seed)
    env.start()
    results = []
    for _ in range(recvs):
        results.append(env.recv())
        env.send(env.sample_actions(env.batch_size, generator), results[-1].env_id)
    return results


@pytest.mark.parametrize(
    ("env_id", "observation", "action"),
    [
        ("HalfCheetah-v4", [Field("observation", "float32", (17,))], Field("action", "float32", (6,))),
        ("CartPole-v1", [Field("observation", "float32", (4,))], Field("action", "int64")),
        (
            "CheetahRun-v1",
            [Field("observation/position", "float32", (8,)), Field("observation/velocity", "float32", (9,))],
            Field("action", "float32", (6,)),
        ),
        ("FrozenLake-v1", [Field("observation", "int64")], Field("action", "int64")),
        ("CarRacing-v3", [Field("observation", "uint8", (96, 96, 3))], Field("action", "float32", (3,))),
        (
            OWN + "make_camera",
            [
                Field("observation/body/gear", "int64"),
                Field("observation/body/joints", "float32", (3,)),
                Field("observation/picture", "uint8", (4, 5, 3)),
            ],
            Field("action", "int64"),
        ),
    ],
)
def test_schema_and_arrays(env_id: str, observation: list[Field], action: Field) -> None:
    """The announced fields are what arrives, in EnvPool, for Dicts, and for an environment of one's own."""
    settings = EnvSettings(id=env_id)
    schema = check_env(settings)
    assert sorted(schema.observations, key=lambda f: f.name) == observation
    assert schema.action == action
    env = make_env(settings, num_envs=3, seed=1)
    for result in run(env, 3):
        assert {n: (v.dtype.name, v.shape) for n, v in result.observation.items()} == {
            f.name: (f.dtype, (3, *f.shape)) for f in observation
        }
        assert result.reward.dtype == np.float32
        assert env.schema == schema
    env.close()


def test_actions_scale_to_the_bounds_of_each_dimension() -> None:
    env = make_env(EnvSettings(id=OWN + "make_counter"), num_envs=3, seed=0)
    env.start()
    ids = env.recv().env_id
    env.send(np.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.5]], np.float32), ids)
    env.recv()
    sent = [lane.unwrapped.last_action for lane in env._envs.envs]  # type: ignore[attr-defined]
    np.testing.assert_allclose(
        sent, [[-1.0, 0.0], [1.0, 5.0], [3.0, 10.0]]
    )  # bounds [-1, 3] and [0, 10]; 1.5 is clipped
    env.close()


def test_envpool_gets_scaled_actions() -> None:
    """Pendulum's torque bound is 2: its result equals that of EnvPool stepped with twice our action."""
    env = make_env(EnvSettings(id="Pendulum-v1"), num_envs=2, seed=4)
    action = np.array([[0.75], [-0.3]], np.float32)
    env.start()
    env.send(action, env.recv().env_id)
    plain = envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=2, seed=lane_seeds(4, 2))
    plain.reset()
    observation, reward, *_ = plain.step(2 * action)
    ours = env.recv()
    np.testing.assert_array_equal(ours.observation["observation"], observation)
    np.testing.assert_array_equal(ours.reward, reward)
    env.close()


def test_discrete_actions_count_from_zero() -> None:
    env = make_env(EnvSettings(id=OWN + "make_camera"), num_envs=3, seed=0)
    env.start()
    env.send(np.array([2, 0, 1]), env.recv().env_id)
    result = env.recv()
    np.testing.assert_array_equal(result.reward, [3, 1, 2])  # the environment's own numbers start at 1
    np.testing.assert_array_equal(result.observation["observation/picture"][:, 0, 0, 0], [3, 1, 2])
    np.testing.assert_array_equal(result.observation["observation/body/gear"], [3, 1, 2])
    assert set(env.sample_actions(200, np.random.default_rng(0)).tolist()) == {0, 1, 2}
    env.close()


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_a_finished_lane_resets_on_the_next_call(backend: str) -> None:
    """Both libraries: the result after an end is a reset with void reward, and no other result is."""
    env = make_env(EnvSettings(id="CartPole-v1", backend=backend), num_envs=4, seed=0)  # type: ignore[arg-type]
    results = run(env, 80)
    ended = np.array([r.terminated | r.truncated for r in results])  # (recv, lane)
    reset = np.array([r.reset for r in results])
    assert reset[0].all()
    np.testing.assert_array_equal(reset[1:], ended[:-1])
    assert ended.any(axis=0).all()
    assert not (reset & ended).any()
    observation = np.array([r.observation["observation"] for r in results])
    assert np.abs(observation[reset]).max() <= 0.05  # CartPole begins within ± 0.05 and ends far from it
    assert np.abs(observation[ended][:, [0, 2]]).max(axis=1).min() > 0.2
    env.close()


def test_terminated_and_truncated() -> None:
    """A step limit truncates, a fall terminates, both at once terminates."""
    cases: tuple[tuple[dict[str, Any], tuple[bool, bool]], ...] = (
        ({"terminate_at": 3}, (True, False)),
        ({"truncate_at": 3}, (False, True)),
        ({"terminate_at": 3, "truncate_at": 3}, (True, False)),
    )
    for kwargs, expected in cases:
        env = make_env(EnvSettings(id=OWN + "make_counter", kwargs=kwargs), num_envs=2, seed=0)
        results = run(env, 5)
        flags = [(r.terminated.tolist(), r.truncated.tolist()) for r in results]
        assert flags == [([f and i == 3] * 2, [t and i == 3] * 2) for i, (f, t) in enumerate([expected] * 5)]
        env.close()
    pendulum = make_env(EnvSettings(id="Pendulum-v1"), num_envs=1, seed=0)
    last = run(pendulum, 201)[-1]
    assert last.truncated.all()
    assert not last.terminated.any()
    pendulum.close()


def test_asynchronous_lanes_match_synchronous_ones() -> None:
    """batch_size < num_envs: per lane, the same results as stepping that lane synchronously with the same actions."""
    lanes, steps = 6, 60

    def actions(lane: int, step: int) -> NDArray[np.float32]:
        wave: NDArray[np.float32] = np.sin(np.arange(3, dtype=np.float32) + np.float32(lane + 0.7 * step))
        return wave

    def collect(batch_size: int | None) -> tuple[list[list[tuple[object, ...]]], int]:
        env = make_env(EnvSettings(id="Hopper-v4"), num_envs=lanes, batch_size=batch_size, threads=2, seed=5)
        env.start()
        seen: list[list[tuple[object, ...]]] = [[] for _ in range(lanes)]
        unordered = 0
        while min(map(len, seen)) < steps:
            r = env.recv()
            assert len(r.env_id) == env.batch_size
            unordered += r.env_id.tolist() != list(range(lanes))
            for i, lane in enumerate(r.env_id.tolist()):
                observation = tuple(r.observation["observation"][i].tolist())
                seen[lane].append((observation, float(r.reward[i]), bool(r.terminated[i]), bool(r.reset[i])))
            env.send(np.stack([actions(i, len(seen[i])) for i in r.env_id.tolist()]), r.env_id)
        env.close()
        return [lane[:steps] for lane in seen], unordered

    synchronous, unordered = collect(None)
    assert unordered == 0
    asynchronous, unordered = collect(2)
    assert unordered > 0
    assert asynchronous == synchronous
    assert any(row[2] for lane in synchronous for row in lane)  # some hopper fell, so resets were compared too


@pytest.mark.parametrize("backend", ["envpool", "gymnasium"])
def test_seeds(backend: str) -> None:
    """The same seed starts the same, `start` starts again, lanes and seeds differ."""
    settings = EnvSettings(id="Pendulum-v1", backend=backend)  # type: ignore[arg-type]

    def trace(env: VectorEnv) -> np.ndarray:
        return np.array([r.observation["observation"] for r in run(env, 210)])

    env = make_env(settings, num_envs=3, seed=7)
    first, again = trace(env), trace(env)
    other = make_env(settings, num_envs=3, seed=8)
    np.testing.assert_array_equal(first, again)
    different = np.concatenate([first[0], trace(other)[0]])
    assert len(np.unique(different.round(6), axis=0)) == 6
    env.close()
    other.close()
    assert len(set(lane_seeds(0, 1000))) == 1000


def test_a_raising_environment_is_built_anew_and_its_episode_cut() -> None:
    """Episode 1 of each build raises at step 2; the lane goes on with a new environment, the other episodes are whole."""
    env = make_env(EnvSettings(id=OWN + "make_counter", kwargs={"terminate_at": 3, "raise_at": 2}), num_envs=2, seed=0)
    results = run(env, 12)
    # reset, 1, 2, 3 (end), reset, 1, raises; a new environment: reset, 1, 2, 3 (end), reset
    assert [bool(r.broken[0]) for r in results] == [i == 6 for i in range(12)]
    assert [bool(r.truncated[1]) for r in results] == [i == 6 for i in range(12)]
    assert [bool(r.terminated[1]) for r in results] == [i in (3, 10) for i in range(12)]
    assert [bool(r.reset[0]) for r in results] == [i in (0, 4, 7, 11) for i in range(12)]
    np.testing.assert_array_equal(results[7].observation["observation"], [[0, 0], [0, 0]])  # episode 0 of the new build
    env.close()


def test_an_environment_that_only_raises_is_given_up() -> None:
    env = make_env(EnvSettings(id=OWN + "make_counter", kwargs={"broken_reset": True}), num_envs=1, seed=0)
    env.start()
    with pytest.raises(EnvError, match=rf"raised {MAX_FAILURES} times .* reset\(\): OSError: simulator lost"):
        env.recv()
    env.close()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"id": "HalfCheeta-v4"},
            ["'HalfCheeta-v4' is unknown to EnvPool", "and gymnasium", "nearest: HalfCheetah-v4"],
        ),
        ({"id": "pendulum-v1", "backend": "gymnasium"}, ["is unknown to gymnasium", "Pendulum-v1"]),
        ({"id": "Pendulum-v1x", "backend": "envpool"}, ["is unknown to EnvPool", "nearest: Pendulum-v1"]),
        (
            {"id": "HalfCheetah-v4", "kwargs": {"ctrl_cost_wieght": 1}},
            ["'ctrl_cost_wieght'", "nearest: ctrl_cost_weight"],
        ),
        ({"id": "HalfCheetah-v4", "kwargs": {"num_envs": 3}}, ["must not hold num_envs"]),
        ({"id": "HalfCheetah-v4", "kwargs": {"frame_skip": "five"}}, ["EnvPool cannot build", "five"]),
        (
            {"id": "no_such_module.here:make"},
            ["importing the module 'no_such_module.here'", "ModuleNotFoundError", os.getcwd()],
        ),
        ({"id": OWN + "make_countr"}, ["has no function 'make_countr'", "nearest: make_counter"]),
        ({"id": OWN + "not_a_function"}, ["has no function 'not_a_function'"]),
        ({"id": OWN + "make_number"}, ["must return a gymnasium.Env, and returned int"]),
        ({"id": OWN + "make_failing"}, ["raised RuntimeError: no licence file"]),
        ({"id": OWN + "make_counter", "kwargs": {"speed": 3}}, ["raised TypeError", "'speed'"]),
        ({"id": OWN + "make_unbounded"}, ["has no finite bounds", "bounded Box"]),
        ({"id": OWN + "make_tuple"}, ["Tuple(Discrete(2), Discrete(3))", "wrap the environment"]),
        ({"id": OWN + "make_multi_discrete"}, ["none of Box of floats and Discrete"]),
    ],
)
def test_errors_name_the_cause(settings: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(EnvError) as error:
        check_env(EnvSettings(**settings))  # type: ignore[arg-type]
    for part in parts:
        assert part in str(error.value)


def test_asynchronous_gymnasium_is_refused() -> None:
    settings = EnvSettings(id="Pendulum-v1", backend="gymnasium")
    with pytest.raises(EnvError, match=r"batch_size \(2\) below actors.envs \(4\)"):
        make_env(settings, num_envs=4, batch_size=2, seed=0)
    with pytest.raises(EnvError, match=r"batch_size \(2\) below actors.envs \(4\)"):
        check_env(settings, num_envs=4, batch_size=2)


def test_own_environment_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pole.py").write_text("import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert check_env(EnvSettings(id="my_pole:make")).action == Field("action", "int64")


def test_check_leaves_nothing_behind() -> None:
    check_env(EnvSettings(id="HalfCheetah-v4"))  # loads the library
    process = psutil.Process()
    before = (process.num_threads(), threading.active_count(), len(process.children()))
    for env_id in ("HalfCheetah-v4", OWN + "make_camera"):
        check_env(EnvSettings(id=env_id))
    assert (process.num_threads(), threading.active_count(), len(process.children())) == before
    env = make_env(EnvSettings(id="HalfCheetah-v4"), num_envs=4, threads=2, seed=0)
    env.start()
    env.recv()
    assert process.num_threads() > before[0]
    env.close()
    assert process.num_threads() == before[0]


def test_a_flag_of_success_that_info_never_has_is_an_error() -> None:
    env = GymnasiumEnv("CartPole-v1", {}, num_envs=2, seed=0, success="won")
    env.start()

    def play() -> None:
        for _ in range(600):
            result = env.recv()
            env.send(np.zeros(2, np.int64), result.env_id)

    with pytest.raises(EnvError, match=r"info never had 'won'; it has nothing: correct tasks\.success"):
        play()
    env.close()
