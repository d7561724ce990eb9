"""Prior data in every batch: read from whatever holds steps, a share that is exact, and refusals that name what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import parts
from cluster.api import Run, train
from cluster.cli import main
from cluster.prior import check_source, prior_shard, with_prior
from cluster.replay_cli import snapshots_of
from configs.load import load_config
from configs.schema import RunConfig
from replay.datasets import Chunk
from replay.imports import import_into_snapshot
from replay.layout import Layout, TableSpec
from replay.limiter import RateLimiter
from replay.rate_limit import RateLimit
from replay.samplers import CallSource, Sampler
from replay.schema import Field, SchemaError, StepSchema
from replay.shard import Shard
from replay.snapshot import SnapshotStore
from replay.writers import CallWriter
from tests import runs_for_tests as runs

PENDULUM = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "float32", (1,)))
Trained = Callable[..., Run]


def config(source: Path, *words: str) -> RunConfig:
    return load_config("pendulum_sac", [*runs.SMALL, "--mode", "sync", "--prior.source", str(source), *words])


@pytest.fixture
def sync(tmp_path: Path) -> Trained:
    def run(*words: str, **more: Any) -> Run:
        words = ("--mode", "sync", "--root", str(tmp_path / "runs"), "--replay.directory", str(tmp_path), *words)
        return train(load_config("pendulum_sac", [*runs.SMALL, *words]), show=more.pop("show", lambda *_: None), **more)

    return run


def rows(count: int, *, reward: float, terminal: bool = False) -> np.ndarray:
    """One episode of `count` transitions."""
    found = PENDULUM.zeros(count + 1)
    found["reward"][:-1] = reward
    found["is_first"][0] = found["is_last"][-1] = True
    found["is_terminal"][-1] = terminal
    return found


# -- reading ----------------------------------------------------------------------------------------------------------


def test_an_exported_replay_a_run_and_a_checkpoint_hold_the_same_steps(sync: Trained, tmp_path: Path) -> None:
    run = sync("--name", "a", "--actors.envs", "3", "--stop.steps", "700", "--replay.segment_steps", "64",
        "--learners.updates_per_step", "0.1")  # fmt: skip
    file = tmp_path / "steps.parquet"
    assert main(["replay", "export", str(run.path), str(file)]) == 0
    checkpoint = runs.newest_checkpoint(run.path)
    steps = run.summary["steps"]
    for source in (file, run.path, checkpoint, checkpoint / "replay"):
        shard = prior_shard(config(source), PENDULUM)
        # Lanes that were cut off have no observation after their last action, which is no transition any more.
        assert steps - 3 <= shard.table(parts.TABLE).items <= steps, source
        drawn = shard.sample(parts.TABLE, 4, 4, parts.window(config(source), PENDULUM), timeout_s=0.0)
        assert drawn is not None
        assert (drawn[1].steps["reward"][:, 0] < 0.0).all()  # as all of Pendulum are


def test_a_minari_file_is_read_whole(tmp_path: Path) -> None:
    source = runs.minari(tmp_path / "data", [700, 1, 300])
    shard = prior_shard(config(source), PENDULUM)
    assert shard.table(parts.TABLE).items == 1001
    drawn = shard.sample(parts.TABLE, 5000, 5000, parts.window(config(source), PENDULUM), timeout_s=0.0)
    assert drawn is not None
    assert set(drawn[1].steps["reward"][:, 0].tolist()) == {1000.0, 1001.0, 1002.0}


def test_snapshots_of_several_imports_are_read_together(tmp_path: Path) -> None:
    store = SnapshotStore(str(tmp_path / "prior"))
    for number in range(2):
        episode = rows(5000, reward=float(number))
        import_into_snapshot([Chunk(episode, episode["is_first"])], PENDULUM, store)
    assert len(snapshots_of(str(tmp_path / "prior"))) == 2
    shard = prior_shard(config(tmp_path / "prior"), PENDULUM)
    assert shard.table(parts.TABLE).items == 10_000


def test_data_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    other = runs.minari(tmp_path / "other", [20], width=4)
    with pytest.raises(
        SchemaError, match=r"does not fit env.id Pendulum-v1: expected .*observation: float32\[3\]"
    ) as why:
        prior_shard(config(other), PENDULUM)
    assert "received StepSchema(observation: float64[4]" in str(why.value)

    unscaled = runs.minari(tmp_path / "unscaled", [20], scale=2.0)
    with pytest.raises(ValueError, match=r"expected actions .* values in \[-1, 1\].*received -1\.\d+ to 1\.\d+"):
        prior_shard(config(unscaled), PENDULUM)

    store = SnapshotStore(str(tmp_path / "store"))
    wide = StepSchema({"observation": Field("observation", "float32", (9,))}, PENDULUM.action)
    episode = wide.zeros(10)
    episode["is_last"][-1] = True
    import_into_snapshot([Chunk(episode, np.arange(10) == 0)], wide, store)
    with pytest.raises(SchemaError, match=r"expected .*float32\[3\].* received .*float32\[9\]"):
        prior_shard(config(tmp_path / "store"), PENDULUM)

    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        prior_shard(config(tmp_path / "nowhere"), PENDULUM)
    with pytest.raises(ValueError, match="holds no transition"):
        prior_shard(config(runs.minari(tmp_path / "empty", [0])), PENDULUM)


def test_a_source_is_looked_at_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = runs.minari(tmp_path / "data", [20])
    monkeypatch.chdir(tmp_path)
    assert check_source(config(Path("data")), PENDULUM).prior.source == str(source)
    with pytest.raises(FileNotFoundError, match=r"^prior.source: .*/nowhere does not exist"):
        check_source(config(Path("nowhere")), PENDULUM)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"^prior.source: .*notes.txt: expected one of .parquet"):
        check_source(config(Path("notes.txt")), PENDULUM)
    (tmp_path / "broken.hdf5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"^prior.source.*broken.hdf5"):
        check_source(config(Path("broken.hdf5")), PENDULUM)
    other = runs.minari(tmp_path / "other", [20], width=4)
    with pytest.raises(SchemaError, match=r"^prior.source .*/other does not fit env.id Pendulum-v1: expected "):
        check_source(config(other), PENDULUM)


def test_data_without_the_recurrent_state_say_whose_field_it_is(tmp_path: Path) -> None:
    cartpole = StepSchema({"observation": Field("observation", "float32", (4,))}, Field("action", "int64", choices=2))
    store = SnapshotStore(str(tmp_path / "store"))
    episode = cartpole.zeros(10)
    episode["is_first"][0] = episode["is_last"][-1] = True
    import_into_snapshot([Chunk(episode, episode["is_first"])], cartpole, store)
    words = ["--env.id", "CartPole-v1", "--prior.source", str(tmp_path / "store"), "--algorithm.name"]
    check_source(load_config(None, [*words, "dqn"]), cartpole)
    with pytest.raises(SchemaError, match=r"field state is that of .*algorithm.name r2d2 with algorithm.recurrent 128"):
        check_source(load_config(None, [*words, "r2d2"]), cartpole)


# -- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "updates", "learners"), [(0.5, 1, 1), (0.25, 3, 1), (0.1, 2, 2)])
def test_every_update_holds_exactly_its_share(tmp_path: Path, share: float, updates: int, learners: int) -> None:
    source = runs.minari(tmp_path / "data", [300])
    words = ["--prior.share", str(share), "--learners.updates_per_call", str(updates)]
    settings = load_config(
        "pendulum_sac",
        [*runs.SMALL, "--prior.source", str(source), *words, "--learners.count", str(learners)],
    )
    own = Shard(
        Layout(PENDULUM, 8, 256, (TableSpec(parts.TABLE),)),
        {parts.TABLE: RateLimiter(RateLimit.from_min_size(1))},
        index=0,
        seed=0,
    )
    writer = CallWriter(own)
    writer.append(np.zeros(401, np.int32), rows(400, reward=-1.0))
    window = parts.window(settings, PENDULUM)
    sampler = Sampler([CallSource(own, window=window)], PENDULUM, window=window, batch_size=settings.draw_size, seed=0)
    mixed = with_prior(settings, PENDULUM, sampler, seed=1)
    part = 32 // learners
    for _ in range(20):
        batch = mixed.sample(0.0)
        assert len(batch) == part * updates
        for update in range(updates):
            reward = batch.steps["reward"][update * part : (update + 1) * part, 0]
            assert np.count_nonzero(reward == 1000.0) == round(share * part)
            assert np.count_nonzero(reward == -1.0) == part - round(share * part)
    # Only the run's own windows count.
    assert own.table(parts.TABLE).sampled == 20 * updates * (part - round(share * part))
    assert settings.samples_per_insert == learners * (part - round(share * part))


def test_a_run_with_prior_data_keeps_its_own_pace_and_goes_on(sync: Trained, tmp_path: Path) -> None:
    source = runs.minari(tmp_path / "data", [500, 500])
    words = [
        "--name",
        "a",
        "--prior.source",
        str(source),
        "--prior.share",
        "0.25",
        "--learners.updates_per_step",
        "0.5",
    ]
    words += ["--learners.updates_per_call", "2"]
    first = sync(*words, "--stop.steps", "700")
    second = sync(*words, "--stop.steps", "1000", resume=first.path)
    assert second.summary["steps"] < 1000 + 64
    counts = runs.head_counts(runs.newest_checkpoint(second.path))
    assert counts["sampled"] == 24 * counts["updates"]
    assert counts["updates"] % 2 == 0
    # The error buffer is 100 steps; the newest step of each of 8 lanes is known to the limiter before it counts.
    assert counts["updates"] == pytest.approx(0.5 * (counts["env_steps"] - 200), abs=0.5 * (100 + 8) + 2)


def test_a_run_whose_prior_data_do_not_fit_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = runs.minari(tmp_path / "other", [20], width=4)
    assert main(["train", "pendulum_sac", *runs.sync_words(tmp_path), "--prior.source", str(other)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"millrace: prior.source {other} does not fit env.id Pendulum-v1: expected ")
    assert message.count("\n") == 1
    assert not (tmp_path / "runs" / "a").exists()
