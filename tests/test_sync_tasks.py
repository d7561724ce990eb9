"""The one-process mode with tasks: what is counted, drawn, kept, evaluated, resumed and exported, in whole runs on MiniGrid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors.assignments import Outcome
from cluster.api import Run, train
from cluster.checkpoint import load_tensors
from cluster.cli import main
from cluster.curriculum.curricula import Curriculum
from cluster.curriculum.desk_files import DESK, TRACKER
from cluster.curriculum.records import Records
from cluster.metrics import read_metrics
from cluster.parts import episodes_in_group, make_desk, make_tasks
from cluster.runs import RunFolder
from configs.curriculum import CurriculumSettings
from configs.load import load_config
from tests import runs_for_tests as runs
from tests.test_sync import BY_CLOCK

SETTINGS = """
env: {id: MiniGrid-Empty-Random-5x5-v0, kwargs: {max_episode_steps: 30, action_max: 2}}  # it turns and walks
tasks:
  threshold: 0.01
  encoding: one_hot
  list:
    - {name: small, kwargs: {size: 4}}
    - {name: middle, kwargs: {size: 5}}
    - {name: large, kwargs: {size: 8}}
algorithm: {name: dqn, encoder: none, hidden: [16]}
actors: {envs: 4, random_steps: 200}
replay: {capacity: 8192, min_size: 200, segment_steps: 64}
learners: {updates_per_step: 0.05, batch_size: 16}
eval: {every: 0, episodes: 2}
stop: {steps: 600}
"""
NAMES = ("small", "middle", "large")
MOST_STEPS = 30  # of an episode
Trained = Callable[..., Run]


class Hardest(Curriculum):
    """A user's curriculum: the task of the last stage alone."""

    def __init__(self, settings: CurriculumSettings, group_size: int, *, stage: int) -> None:
        super().__init__(settings, group_size)
        self.stage = stage

    def weights(self, records: Records) -> np.ndarray:
        weights: np.ndarray = (records.stages == self.stage).astype(np.float64)
        return weights


@pytest.fixture
def sync(tmp_path: Path) -> Trained:
    """Train in this process, with more settings."""
    file = tmp_path / "tasks.yaml"
    file.write_text(SETTINGS)

    def run(*words: str, resume: Path | None = None, name: str = "a") -> Run:
        where = ["--mode", "sync", "--root", str(tmp_path / "runs"), "--replay.directory", str(tmp_path)]
        config = load_config(str(file), [*where, "--name", name, *words])
        return train(config, resume=resume, show=lambda *_: None)

    return run


@dataclass(frozen=True)
class Played:
    """An episode that is whole in the replay."""

    task: int
    steps: int
    return_: float

    @property
    def passed(self) -> bool:
        return self.return_ >= 0.01


def lanes_of(checkpoint: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of each lane in the replay files of a checkpoint, in the order in which they were written."""
    for folder in sorted((checkpoint / "replay").glob("shard-*")):
        (manifest,) = folder.glob("manifest-*.json")
        files = [record["name"] for record in json.loads(manifest.read_text())["files"]]
        (index,) = (name for name in files if name.startswith("segments-"))
        readers = {name: pa.ipc.open_file(pa.memory_map(str(folder / name))) for name in files}
        segments = {s["segment"]: s for s in readers[index].read_all().to_pylist()}
        columns = ["task", "reward", "is_first", "is_last", "is_terminal", "observation/task"]
        for first in segments.keys() - {s["next_segment"] for s in segments.values()}:
            rows: list[dict[str, Any]] = []
            at: int = first
            while at in segments:
                s = segments[at]
                rows += readers[s["file"]].get_batch(s["batch"]).slice(s["row"], s["rows"]).select(columns).to_pylist()
                at = s["next_segment"]
            yield rows


def recount(checkpoint: Path) -> tuple[list[Played], int]:
    """The whole episodes in the replay, and the steps of those that were not over when their lanes were closed."""
    found, begun = [], 0
    for rows in lanes_of(checkpoint):
        ends = [number + 1 for number, row in enumerate(rows) if row["is_last"]]
        for begin, end in zip([0, *ends], ends, strict=False):
            episode = rows[begin:end]
            assert [row["is_first"] for row in episode] == [True] + [False] * (len(episode) - 1)
            (task,) = {row["task"] for row in episode}
            assert all(row["observation/task"] == [float(n == task) for n in range(len(NAMES))] for row in episode)
            steps = len(episode) - 1  # the last row holds what was observed at the end
            if episode[-1]["is_terminal"] or steps == MOST_STEPS:
                found.append(Played(task, steps, sum(row["reward"] for row in episode[:-1])))
            else:
                begun += steps
        assert not rows[ends[-1] :]
    return found, begun


def desk_of(checkpoint: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    about: dict[str, Any] = json.loads((checkpoint / DESK).read_text())
    return about, load_tensors(checkpoint / TRACKER)[0]


def last_row(run: Run) -> dict[str, float]:
    """The newest value of each metric."""
    found: dict[str, float] = {}
    for row in read_metrics(run.path).to_pylist():
        found |= {name: value for name, value in row.items() if value is not None}
    return found


def check_counts(run: Run) -> None:
    """What the desk's record and the metrics say is what the rows in the replay say."""
    checkpoint = runs.newest_checkpoint(run.path)
    played, begun = recount(checkpoint)
    about, arrays = desk_of(checkpoint)
    steps = sum(episode.steps for episode in played)
    by_task = [[episode for episode in played if episode.task == number] for number in range(len(NAMES))]
    assert about["waste"]["kept"] == [len(played), len(played), steps]
    assert sum(sum(amount) for name, amount in about["waste"].items() if name != "kept") == 0
    assert sum(about["reported"].values()) == len(played)
    assert steps + begun == run.summary["steps"] == runs.head_counts(checkpoint)["env_steps"]
    assert run.summary["episodes"] == len(played)
    assert arrays["tracker.attempts"].tolist() == [len(episodes) for episodes in by_task]
    solved = [any(episode.passed for episode in episodes) for episodes in by_task]
    assert (arrays["tracker.last_solved"] >= 0).tolist() == solved
    assert about["lost"] == 0
    row = last_row(run)
    assert (row["waste/sampled_steps"], row["waste/sampled_episodes"]) == (steps, len(played))
    assert sum(row[f"task/{name}/drawn"] for name in NAMES) == pytest.approx(1.0)


def test_the_desk_counts_every_finished_episode_once_and_evaluations_play_every_task(sync: Trained) -> None:
    # Without discount the record is of plain counts and means.
    run = sync(
        "--curriculum.discount",
        "1",
        "--actors.count",
        "2",
        "--eval.every",
        "300",
        "--replay.shards",
        "2",
        "--stop.steps",
        "1000",
    )
    check_counts(run)
    played, _ = recount(runs.newest_checkpoint(run.path))
    _, arrays = desk_of(runs.newest_checkpoint(run.path))
    row = last_row(run)
    for number, name in enumerate(NAMES):
        mine = [episode for episode in played if episode.task == number]
        assert arrays["tracker.passes"][number] == sum(episode.passed for episode in mine)
        assert arrays["tracker.failures"][number] == sum(not episode.passed for episode in mine)
        assert row[f"task/{name}/return"] == pytest.approx(np.mean([episode.return_ for episode in mine]))
        assert row[f"task/{name}/length"] == pytest.approx(np.mean([episode.steps for episode in mine]))
        assert 0.0 < row[f"task/{name}/pass_rate"] < 1.0
        assert 0.0 <= row[f"eval/task/{name}/success"] <= 1.0
    assert sum(episode.passed for episode in played) > 5
    assert row["eval/episodes"] == 6  # two of each task
    assert row["eval/mean_success"] == pytest.approx(np.mean([row[f"eval/task/{name}/success"] for name in NAMES]))
    assert row["eval/mean_return"] == pytest.approx(np.mean([row[f"eval/task/{name}/return"] for name in NAMES]))
    assert row["eval/worst_drop"] >= 0.0
    assert row["curriculum/changes"] == 0.0
    assert run.summary["success"] == row["eval/mean_success"]
    assert run.report.stat().st_size > 10_000


def test_the_same_seed_gives_the_same_metrics_to_the_last_digit(sync: Trained) -> None:
    words = ["--curriculum.draw", "level_replay", "--actors.count", "2", "--eval.every", "300"]

    def metrics(name: str, seed: int) -> tuple[pa.Table, dict[str, np.ndarray]]:
        run = sync(*words, "--seed", str(seed), name=name)
        table = read_metrics(run.path)
        exact = table.select(sorted(c for c in table.column_names if not BY_CLOCK.fullmatch(c)))
        return exact, desk_of(runs.newest_checkpoint(run.path))[1]

    (one, desk_one), (two, desk_two), (other, _) = metrics("a", 7), metrics("b", 7), metrics("c", 8)
    assert {"loss/critic", "task/small/drawn", "task/large/pass_rate", "eval/task/small/return"} <= set(
        one.column_names
    )
    assert one.equals(two)
    assert {name: array.tobytes() for name, array in desk_one.items()} == {
        name: array.tobytes() for name, array in desk_two.items()
    }
    assert one.column("task/small/drawn") != other.column("task/small/drawn")


def test_a_resumed_run_goes_on_with_the_counts_and_with_what_is_known_of_tasks(sync: Trained) -> None:
    words = ["--curriculum.draw", "staged", "--curriculum.unlock", "0.2"]
    first = sync(*words)
    check_counts(first)
    before, known = desk_of(runs.newest_checkpoint(first.path))
    changes = last_row(first)["curriculum/changes"]
    assert changes >= 1.0
    second = sync(*words, "--stop.steps", "1000", resume=first.path)
    # Episodes that were open when the first run ended are nobody's outcomes: they are in the replay, cut off.
    after, learnt = desk_of(runs.newest_checkpoint(first.path))
    assert after["next_group"] > before["next_group"]
    (name,) = before["reported"]
    assert after["reported"][name] == before["reported"][name]
    (other,) = after["reported"].keys() - {name}
    assert after["reported"][other] == second.summary["episodes"] - first.summary["episodes"] > 0
    assert (learnt["tracker.attempts"] >= known["tracker.attempts"]).all()
    assert learnt["tracker.attempts"].sum() == second.summary["episodes"] == after["waste"]["kept"][1]
    assert last_row(second)["curriculum/changes"] >= changes
    # The stages that were unlocked are drawn from at once.
    rows = [row for row in read_metrics(second.path).to_pylist() if row["env_steps"] >= 600]
    assert all(row["curriculum/changes"] >= changes for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks.list.2.kwargs", "size=7"], r"tasks\.list: the checkpoint was trained with .*, or start a new run"),
        (
            ["--env.kwargs", "max_episode_steps=20", "action_max=2"],
            r"tasks: the checkpoint's record is of other tasks than there are now",
        ),
        (["--curriculum.draw", "staged"], r"go on with the curriculum that it was saved with"),
    ],
)
def test_a_run_is_not_resumed_with_other_tasks(words: list[str], message: str, sync: Trained, tmp_path: Path) -> None:
    first = sync("--curriculum.draw", "band", "--stop.steps", "250")
    settings = (first.path / "config.yaml").read_bytes()
    if words[0].startswith("--tasks.list"):
        (tmp_path / "tasks.yaml").write_text(SETTINGS.replace("size: 8", "size: 7"))
        words = []
    with pytest.raises(ValueError, match=message):
        sync("--curriculum.draw", "band", *words, "--stop.steps", "400", resume=first.path)
    assert (first.path / "config.yaml").read_bytes() == settings


def test_a_filter_learns_from_whole_episodes_of_groups_within_the_band_and_counts_the_waste(sync: Trained) -> None:
    run = sync("--curriculum.filter", "band", "--curriculum.group_size", "2", "--learners.updates_per_step", "0.2")
    checkpoint = runs.newest_checkpoint(run.path)
    played, begun = recount(checkpoint)
    about, arrays = desk_of(checkpoint)
    waste = about["waste"]
    # A pair is kept if one of its episodes passed and the other did not; the last to be kept may not be written any more.
    by_task = [[episode for episode in played if episode.task == number] for number in range(len(NAMES))]
    groups = waste["kept"][0]
    assert groups > 10
    assert waste["kept"][1] == 2 * groups
    for episodes in by_task:
        assert abs(sum(episode.passed for episode in episodes) - sum(not episode.passed for episode in episodes)) <= 1
    assert 0 <= 2 * groups - len(played) <= 2
    steps = sum(episode.steps for episode in played)
    assert 0 <= waste["kept"][2] - steps - begun <= 60
    assert run.summary["steps"] == steps + begun >= 600
    # Waste is counted in environment steps, of episodes that are in no table.
    assert waste["too_hard"][0] > 0
    rejected = [sum(waste[reason][unit] for reason in ("too_easy", "too_hard")) for unit in range(3)]
    assert rejected[1] == 2 * rejected[0]
    row = last_row(run)
    assert row["waste/sampled_steps"] == waste["kept"][2] + rejected[2]
    assert row["waste/share"] == pytest.approx(rejected[2] / (waste["kept"][2] + rejected[2]))
    assert row["waste/sampled_steps"] > row["env_steps"]
    assert arrays["tracker.attempts"].sum() == waste["kept"][1] + rejected[1]
    # The learner has whole batches, as many as without a filter.
    counts = runs.head_counts(checkpoint)
    assert counts["sampled"] == 16 * counts["updates"]
    ahead = counts["sampled"] / (0.2 * 16) - (counts["env_steps"] - 200)  # in steps
    assert abs(ahead) <= RunFolder.open(run.path).config.error_buffer + 3


def test_a_run_ends_by_the_clock_where_the_filter_keeps_nothing(sync: Trained) -> None:
    run = sync(
        "--curriculum.filter", "band", "--curriculum.group_size", "2", "--tasks.threshold", "2", "--stop.wall_s", "1"
    )  # fmt: skip
    assert run.summary["stop_reason"].endswith("of 1 s are over")
    assert run.summary["steps"] == 0
    row = last_row(run)
    assert (row["waste/share"], row["waste/too_hard"]) == (1.0, 1.0)
    assert row["waste/sampled_steps"] > 100


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        ("uniform", []),
        ("band", []),
        ("staged", ["--curriculum.unlock", "1"]),
        ("learning_progress", []),
        ("level_replay", []),
        ("rehearsal", []),
        ("tests.test_sync_tasks:Hardest", ["--curriculum.kwargs", "stage=2"]),
    ],
)
def test_every_curriculum_trains(draw: str, words: list[str], sync: Trained) -> None:
    run = sync("--curriculum.draw", draw, *words, "--stop.steps", "500", "--curriculum.floor", "0.5")
    check_counts(run)
    _, arrays = desk_of(runs.newest_checkpoint(run.path))
    shares = np.array([last_row(run)[f"task/{name}/drawn"] for name in NAMES])
    # The learner tells of its errors on every task of which rows were learnt from.
    played = arrays["tracker.attempts"] > 0
    assert np.isfinite(arrays["tracker.losses"][played]).all()
    assert np.isnan(arrays["tracker.losses"][~played]).sum() >= (draw == "staged")
    if draw == "staged":
        assert shares.tolist() == [1.0, 0.0, 0.0]
    elif draw.endswith("Hardest"):
        assert shares[2] > 0.5
        assert played.sum() > 1  # by the floor
    else:
        assert (shares > 0.0).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_tasks_are_drawn_by_their_weights_however_many_are_asked_for_at_once(count: int, tmp_path: Path) -> None:
    """Lanes whose episodes are of one length end together, and ask for as many tasks as there are."""
    file = tmp_path / "tasks.yaml"
    file.write_text(SETTINGS)
    config = load_config(
        str(file), ["--curriculum.draw", "tests.test_sync_tasks:Hardest", "--curriculum.kwargs", "stage=2"]
    )
    tasks = make_tasks(config)
    assert tasks is not None
    desk = make_desk(config, tasks)
    numbers = [one.number for _ in range(600 // count) for one in desk.take("actor 0", count)]
    shares = np.bincount(numbers, minlength=3) / len(numbers)
    floor = config.curriculum.floor
    np.testing.assert_allclose(shares, [floor / 3, floor / 3, 1 - 2 * floor / 3], atol=0.06)  # 4 standard deviations


@pytest.mark.parametrize("words", [[], ["--curriculum.filter", "band", "--curriculum.group_size", "4"]])
def test_records_fade_by_the_episode_in_groups_as_alone(words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(SETTINGS)
    config = load_config(str(file), ["--curriculum.discount", "0.9", *words])
    tasks = make_tasks(config)
    assert tasks is not None
    desk, size = make_desk(config, tasks), episodes_in_group(config)
    for number in range(12 // size):
        passed = size if number == 0 else 0
        desk.report("a", number, [Outcome(number, 0, passed, size, size, 30 * size, "kept", 0.0)])
    _, arrays = desk.state()
    assert arrays["tracker.attempts"].tolist() == [12, 0, 0]
    # The passes of the first group have been followed by so many episodes.
    assert arrays["tracker.passes"][0] == pytest.approx(size * 0.9 ** (12 - size))


def test_a_run_with_tasks_is_evaluated_and_exported(
    sync: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sync("--eval.every", "300", "--eval.deterministic", "false", "--stop.steps", "400")
    assert main(["eval", str(run.path), "--episodes", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["episodes"] == 9
    assert list(found["tasks"]) == list(NAMES)
    assert found["success"] == pytest.approx(np.mean([task["success"] for task in found["tasks"].values()]))
    assert found["mean_return"] == pytest.approx(np.mean([task["mean_return"] for task in found["tasks"].values()]))
    assert main(["eval", str(run.path), "--episodes", "3"]) == 0
    assert re.search(
        r"success 0\.\d\d over 3 tasks, mean return .* over 9 episodes\n  small: ", capsys.readouterr().out
    )
    assert main(["eval", str(run.path), "--video", str(tmp_path / "a.gif")]) == 2
    assert "--video draws the environment of a run without tasks" in capsys.readouterr().err
    onnx = pytest.importorskip("onnx")
    assert main(["export", str(run.path), str(tmp_path / "policy.onnx"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert "observation/task" in exported["inputs"]
    noted = {p.key: p.value for p in onnx.load(tmp_path / "policy.onnx").metadata_props}
    told = json.loads(noted["millrace"]) if "millrace" in noted else noted
    assert told["environment"] == "MiniGrid-Empty-Random-5x5-v0"
    assert 0.0 <= float(told["success"]) <= 1.0
    assert "mean_return" not in told


def test_a_policy_that_is_not_deterministic_explores_in_evaluations(sync: Trained) -> None:
    """Untrained and greedy it does the same in every state alike; with noise for exploration it does not."""
    words = ["--eval.every", "250", "--stop.steps", "250", "--algorithm.epsilon", "1", "--eval.episodes", "8"]
    returns = {}
    for flag in ("true", "false"):
        run = sync(*words, "--eval.deterministic", flag, name=flag)
        returns[flag] = last_row(run)["eval/mean_return"]
    assert returns["true"] != returns["false"]
