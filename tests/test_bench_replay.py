"""The replay benchmark: every kind of case runs at tiny sizes and says what it is; how fast is not asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import replay, replay_cases, replay_peers
from tests.benchmarks.replay_roles import LANES, episodes

KEYS = {"transport", "op", "selector", "shape", "batch", "shards", "calls_per_s", "rows_per_s", "bytes_per_s", "p50_us"}
TINY = ["--seconds", "0.05", "--repeats", "1", "--rows", "3000", "--frames", "600", "--json"]
TINY += ["--writer-rows", "100000", "--writer-frames", "2000"]


def bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """The lines that the benchmark prints, its first, which is about the machine, left out."""
    assert replay.main([*TINY, "--directory", str(tmp_path), *words]) == 0
    about, *found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert about["rows"] == 3000
    assert list(tmp_path.iterdir()) == []
    return found


@pytest.mark.parametrize(
    ("pattern", "nbytes"),
    [
        ("numpy/sample/uniform/transition/256/1/*take of packed", 256 * 2 * 104),
        ("memcpy/sample/uniform/frames/256/1/", 256 * 2 * 4 * 84 * 84),
        ("numpy/sample/uniform/frames/256/1/quiet/take of stored", 256 * 2 * 4 * 84 * 84),
    ],
)
def test_limits_deliver_the_bytes_they_are_compared_for(
    pattern: str, nbytes: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for found in bench(capsys, tmp_path, "--only", pattern):
        assert found.keys() >= KEYS
        assert found["bytes_per_s"] == pytest.approx(found["calls_per_s"] * nbytes)
        assert found["rows_per_s"] == pytest.approx(found["calls_per_s"] * 256)
        assert 0 < found["p50_us"] <= found["p99_us"]
        assert ("writer_rows_per_s" in found) == found["writer"]


@pytest.mark.parametrize(
    ("pattern", "cases"),
    [("flight/*/prioritised/transition/256/2/", 3), ("local/sample/uniform/frames/256/1/", 3)],
)
def test_shards_writer_and_reader_run_as_processes_of_their_own(
    pattern: str, cases: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [
        line for line in bench(capsys, tmp_path, "--only", pattern) if line.get("transport") in ("local", "flight")
    ]
    assert len(found) == cases
    for line in found:
        assert "missing" not in line, line
        assert line.keys() >= KEYS
        framed = line["shape"] == "frames"
        assert line["items"] >= (600 if framed else 3000)  # a table that is not full proves nothing
        if line["op"] == "sample":
            stacks = 2 * 4 * 84 * 84
            least, most = (stacks // 2, stacks) if line["how"] else (stacks, 2 * stacks)
            least, most = (least, most) if framed else (2 * 104, 3 * 104)
            assert least < line["bytes_per_s"] / line["rows_per_s"] < most
        if line["writer"]:
            assert line["writer_rows_per_s"] > 0


def test_episodes_go_on_where_the_calls_are_repeated() -> None:
    """Steps of each lane: is_first exactly at the first, is_last exactly at the last; rows of all calls differ."""
    lanes, calls = episodes("transition")
    steps = np.concatenate([rows[lanes == 5] for rows in calls])
    assert len(steps) == 1000
    assert np.flatnonzero(steps["is_first"]).tolist() == [0]
    assert np.flatnonzero(steps["is_last"]).tolist() == [999]
    assert sorted(set(lanes.tolist())) == list(range(LANES))
    assert len(np.unique(steps["reward"])) > 990


def test_a_case_is_chosen_by_a_part_of_its_name_or_a_pattern() -> None:
    cases = [*replay_cases.limit_cases(), *replay_cases.millrace_cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {c.transport for c in replay_cases.chosen(cases, "flight/sample")} == {"flight"}
    for case in replay_cases.chosen(cases, "local/*/4096/*/writer"):
        assert (case.transport, case.batch, case.writer) == ("local", 4096, True)


def test_goals_are_judged_by_the_lines_of_the_cases_they_name() -> None:
    """Every goal's cases exist, and ratios are those of the figures."""
    cases = {case.name for case in (*replay_cases.limit_cases(), *replay_cases.millrace_cases())}
    for goal in replay_cases.goals():
        assert goal.case in cases
        assert not goal.over or goal.over in cases or goal.over.startswith("cpprb/")
        mine, other = {goal.figure: 6.0}, {goal.figure: 4.0}
        found = goal.judge({goal.case: mine, goal.over: other})
        assert found is not None
        assert found["value"] == (1.5 if goal.over else 6.0)
        bound = float(goal.wanted.split()[1])
        assert found["met"] == (found["value"] >= bound if "≥" in goal.wanted else found["value"] <= bound)
        assert goal.judge({}) is None


def test_rounds_become_one_line_of_medians() -> None:
    rounds = [{"op": "sample", "batch": 256, "calls_per_s": value} for value in (3.0, 1.0, 2.0)]
    assert replay_peers.medians(rounds) == {"op": "sample", "batch": 256, "calls_per_s": 2.0}
    failed = {"op": "sample", "missing": "no time"}
    assert replay_peers.medians([failed, rounds[0]]) == rounds[0]
    assert replay_peers.medians([failed, failed]) == failed


def test_measure_counts_calls_and_tells_their_latency() -> None:
    seen: list[int] = []
    found = replay_peers.measure(seen.append, 0.02)
    assert seen == list(range(len(seen)))
    assert 0 < found["p50_us"] <= found["p99_us"]
    assert 0 < found["calls_per_s"] * 0.02 <= len(seen)


def test_a_peer_that_cannot_be_installed_says_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_peers, "ROOT", tmp_path)
    monkeypatch.setitem(replay_peers.PEERS, "cpprb", ((str(tmp_path / "no_such-1.0-py3-none-any.whl"),), 0.1))
    directory = tmp_path / "mapped"
    directory.mkdir()
    words = ["--peers", "--only", "cpprb/sample/uniform/transition"]
    found = bench(capsys, directory, *words)
    assert [(line["transport"], line["batch"]) for line in found] == [("cpprb", 256), ("cpprb", 4096)]
    assert all("no_such-1.0" in line["missing"] for line in found)
    assert not (tmp_path / ".peers" / "cpprb" / "installed.txt").exists()
    assert replay.main([*(word for word in TINY if word != "--json"), *words]) == 0
    assert "cpprb/sample/uniform/transition/256/1/quiet: not installed" in capsys.readouterr().out


def test_transitions_of_the_peers_follow_one_another() -> None:
    """Next observations are those of the next row, also where frames are stacked."""
    for shape in ("transition", "frames"):
        block = replay_peers.blocks(shape)[0]
        assert np.array_equal(block["next_observation"][:-1], block["observation"][1:])
    assert block["observation"].shape == (256, 4, 84, 84)
    assert np.array_equal(block["observation"][1:, :-1], block["observation"][:-1, 1:])


@pytest.mark.parametrize(
    ("words", "message"), [(["--seconds", "0"], "must be positive"), (["--rows", "many"], "--rows"), (["x"], "x")]
)
def test_a_wrong_command_line_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        replay.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
