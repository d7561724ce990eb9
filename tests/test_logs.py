"""The log of a process: every line whole JSON that says where it is from, and the newest of them at hand."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import logs
from cluster.logs import MOST_CHARACTERS, MOST_LINES, ProcessLog

ABOUT = {"run": "a", "role": "actor", "id": "3", "node": "10.0.0.7"}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What `install` changes in this process is as before afterwards."""
    root, hook = logging.getLogger(), threading.excepthook
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in logs.OURS}
    yield
    root.handlers[:] = handlers
    logging.captureWarnings(False)
    threading.excepthook = hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def installed() -> tuple[ProcessLog, io.StringIO]:
    stream = io.StringIO()
    return ProcessLog.install(**ABOUT, stream=stream), stream


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_and_where() -> None:
    log, stream = installed()
    logging.getLogger("cluster.ray_workers").warning("shard %d is away", 2)
    (line,) = read(stream)
    assert line.pop("time") > 1.7e9
    assert line == {**ABOUT, "pid": os.getpid(), "level": "warning", "logger": "cluster.ray_workers", "text": "shard 2 is away"}  # fmt: skip
    (kept,), following = log.after(0)
    assert (kept["number"], kept["kind"], following) == (1, "log", 1)
    assert {key: kept[key] for key in ("level", "role", "id", "text")} == {key: line[key] for key in ("level", "role", "id", "text")}  # fmt: skip
    assert log.after(1) == ([], 1)


def test_ours_are_told_from_info_on_and_others_from_warnings_on() -> None:
    _, stream = installed()
    for name in ("replay.server", "cluster", "some.library"):
        for tell in ("debug", "info", "warning", "error", "critical"):
            getattr(logging.getLogger(name), tell)(tell)
    told = [(line["logger"], line["text"], line["level"]) for line in read(stream)]
    levels = [("info", "info"), ("warning", "warning"), ("error", "error"), ("critical", "error")]
    assert told == [
        *(("replay.server", *level) for level in levels),
        *(("cluster", *level) for level in levels),
        *(("some.library", *level) for level in levels[1:]),
    ]


def test_exceptions_warnings_and_the_end_of_a_thread_are_told_whole() -> None:
    log, stream = installed()
    try:
        raise ValueError("wrong\nin two lines")
    except ValueError:
        logging.getLogger("cluster").exception("it failed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("take care", RuntimeWarning, stacklevel=1)
    thread = threading.Thread(target=lambda: 1 / 0, name="rollout-3")
    thread.start()
    thread.join()
    failed, warned, ended = read(stream)
    assert failed["exception"].endswith("ValueError: wrong\nin two lines")
    assert "take care" in warned["text"]
    assert ended["text"] == "rollout-3 has ended with an error"
    assert ended["exception"].endswith("ZeroDivisionError: division by zero")
    lines, following = log.after(0)
    assert following == 3
    assert lines[0]["text"].startswith("it failed\nTraceback (most recent call last):\n")


def test_the_newest_lines_are_kept_and_numbered() -> None:
    log, _ = installed()
    for number in range(1, MOST_LINES + 11):
        logging.getLogger("cluster").info("%d", number)
    lines, following = log.after(0)
    assert following == MOST_LINES + 10
    assert [line["number"] for line in lines] == [int(line["text"]) for line in lines] == list(range(11, following + 1))
    assert [line["number"] for line in log.after(following - 2)[0]] == [following - 1, following]


def test_a_long_text_is_cut_and_a_wrong_format_or_a_closed_stream_harms_nobody() -> None:
    log, stream = installed()
    logging.getLogger("cluster").info("x" * 10 * MOST_CHARACTERS)
    log.handle(logging.LogRecord("cluster", logging.INFO, "", 0, "%d steps", ("many",), None))
    stream.close()
    logging.getLogger("cluster").info("nobody reads this")
    lines, _ = log.after(0)
    assert len(lines[0]["text"]) == MOST_CHARACTERS + 1
    assert "'%d steps' % ('many',)" in lines[1]["text"]
    assert lines[2]["text"] == "nobody reads this"


def test_another_log_takes_the_place_of_the_first() -> None:
    first, before = installed()
    second, stream = installed()
    logging.getLogger("cluster").info("once")
    assert before.getvalue() == ""
    assert len(read(stream)) == len(second.after(0)[0]) == 1
    assert first.after(0) == ([], 0)


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_is_one_line_and_comes_back(texts: list[str]) -> None:
    stream = io.StringIO()
    log = ProcessLog(**ABOUT, stream=stream)
    for text in texts:
        log.handle(logging.LogRecord("cluster", logging.INFO, "", 0, text, None, None))
    found = [json.loads(line)["text"] for line in stream.getvalue().split("\n")[:-1]]
    assert found == texts == [line["text"] for line in log.after(0)[0]]


def test_lines_of_many_threads_do_not_mix() -> None:
    log, stream = installed()

    def tell(thread: int) -> None:
        for number in range(100):
            logging.getLogger("actors").info("%d %d", thread, number)

    threads = [threading.Thread(target=tell, args=(thread,)) for thread in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(line["text"] for line in read(stream)) == sorted(f"{t} {n}" for t in range(8) for n in range(100))
    assert [line["number"] for line in log.after(0)[0]] == list(range(1, 801))
