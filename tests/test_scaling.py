"""What the head does with requests to change a run, short of the processes: settings, the queue of requests, and events."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.events import event_line, read_event
from cluster.requests import Requests
from cluster.runs import RunFolder
from cluster.scaling import scaled
from configs.llm import LlmConfig
from configs.load import ConfigError
from configs.schema import RunConfig


def config(**replay: Any) -> RunConfig:
    return RunConfig.model_validate({"actors": {"count": 4}, "replay": {"shards": 2, "capacity": 1_000_000, **replay}})


def test_other_numbers_leave_each_shard_its_capacity() -> None:
    grown = scaled(config(), actors=128, shards=5)
    assert (grown.actors.count, grown.replay.shards, grown.replay.capacity) == (128, 5, 2_500_000)
    assert scaled(grown, actors=4, shards=2) == config()
    assert scaled(config(), actors=None, shards=None) == config()


@pytest.mark.parametrize(
    ("actors", "shards", "message"),
    [
        (0, None, "actors.count: .* received 0"),
        (None, 0, "replay.shards: .* received 0"),
        (None, 5000, "replay.shards: "),
    ],
)
def test_numbers_that_cannot_be_are_refused(actors: int | None, shards: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled(config(), actors=actors, shards=shards)


def test_an_error_buffer_that_is_too_small_for_more_shards_is_refused() -> None:
    tight = config(error_buffer=600, min_size=1000)
    with pytest.raises(ConfigError, match="min_size"):
        scaled(
            tight.model_copy(update={"replay": tight.replay.model_copy(update={"min_size": 600_000})}),
            actors=None,
            shards=1,
        )


def test_a_language_model_keeps_its_shards() -> None:
    llm = LlmConfig()
    assert scaled(llm, actors=3, shards=llm.replay.shards).actors.count == 3
    with pytest.raises(ConfigError, match="keeps its 1 shards"):
        scaled(llm, actors=None, shards=2)


def test_leases_grow_with_the_actors_of_a_shard_unless_the_buffer_is_set() -> None:
    many = scaled(config(), actors=100, shards=2)
    assert many.insert_block == 50 * many.actors.rows_per_write
    assert config(error_buffer=10_000).insert_block == config().actors.rows_per_write
    # There is room for what all shards but the first may have leased.
    room = 2 * many.error_buffer * many.samples_per_insert
    assert room >= many.insert_block * many.samples_per_insert + many.sample_block


def test_the_settings_of_a_run_are_rewritten(tmp_path: Path) -> None:
    folder: RunFolder[Any] = RunFolder.create(config().model_copy(update={"root": str(tmp_path), "name": "a"}), [])
    folder.rewrite(scaled(folder.config, actors=7, shards=3))
    again = RunFolder.open(tmp_path / "a").config
    assert again == folder.config
    assert (again.actors.count, again.replay.shards) == (7, 3)


def test_requests_are_answered_by_the_loop_in_order_each_once() -> None:
    wake = threading.Event()
    requests = Requests(wake)
    made: list[int] = []

    def double(number: int) -> int:
        made.append(number)
        if number == 3:
            raise ValueError("three is refused")
        return 2 * number

    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        try:
            found[number] = requests.ask("double", number=number)
        except ValueError as error:
            found[number] = str(error)

    threads = []
    for number in (1, 2, 3):
        wake.clear()
        threads.append(threading.Thread(target=ask, args=(number,)))
        threads[-1].start()
        assert wake.wait(5.0)
    requests.answer({"double": double})
    for thread in threads:
        thread.join(5.0)
    assert made == [1, 2, 3]
    assert found == {1: 2, 2: 4, 3: "three is refused"}


def test_requests_that_nobody_will_answer_are_refused() -> None:
    wake = threading.Event()
    requests = Requests(wake)
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(RuntimeError, match="the run is ending"):
            requests.ask("scale")
        told.append("refused")

    waiting = threading.Thread(target=ask)
    waiting.start()
    assert wake.wait(5.0)
    requests.close("the run is ending")
    waiting.join(5.0)
    assert told == ["refused"]
    with pytest.raises(RuntimeError, match="the run is ending"):
        requests.ask("scale")


@pytest.mark.parametrize(
    ("text", "role", "number"),
    [
        ("actor 3 died; a new one takes its place", "actor", "3"),
        ("learner: losses are not finite", "learner", ""),
        ("learner 1 died", "learner", "1"),
        ("outside robot-7 has joined with 4 lanes", "outside", "robot-7"),
        ("the head died; a new one goes on", "head", ""),
        ("outside robot has gone", "outside", "robot"),
        ("evaluation at step 10: mean return 3.0", "head", ""),
        ("actors were scaled", "head", ""),
    ],
)
def test_events_say_whom_they_are_about(text: str, role: str, number: str) -> None:
    event = read_event(event_line("warning", text, time_s=None))
    assert event is not None
    assert (event["role"], event["id"], event["level"], event["text"]) == (role, number, "warning", text)


def test_events_that_are_cut_or_of_an_earlier_version_can_be_read() -> None:
    assert read_event(event_line("start", "a", time_s=1.0)[:-20]) is None
    event = read_event(b'{"time_s": 2.0, "kind": "start", "text": "actor 1 runs"}\n')
    assert event is not None
    assert (event["role"], event["level"], event["time"]) == ("head", "info", 0.0)


def test_a_replay_that_has_no_room_for_the_lanes_is_told_of() -> None:
    with pytest.raises(ConfigError, match=r"^replay.capacity \(1000000\) is too small: 8000 lanes"):
        scaled(config(), actors=1000, shards=None)
