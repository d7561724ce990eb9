"""What a shard keeps when it or its writers are killed: at every named point of its write path, and at random moments.

Writers in processes of their own write numbered steps and note, in a file both sides map, what they hand over and what was
acknowledged. After each death the shard's file is copied, the copy is recovered and all its rows are read and compared
with those notes. Then a new shard takes over the file itself, and the same writers go on.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from replay import kernels
from replay.copies import SegmentCopy
from replay.kernels import NONE
from replay.layout import TableSpec
from replay.process import ShardProcess
from replay.rate_limit import RateLimit
from replay.samplers import stream_sampler
from replay.schema import Field, StepSchema, WindowBatch
from replay.security import Security, flight_client, new_token
from replay.shard import Shard, ShardSpec, WriterClosedError
from replay.storage import StorageError
from replay.writers import FlightWriter

ROOT = Path(__file__).parents[1]
POINTS = (*kernels.FAULTS, "shard.before_reply")
UNFINISHED = {"record_published", "segment_published"}  # deaths there leave a change that recovery must complete
WHO, LANE, STEP = range(3)  # what a step's observation says of it
LANES = 4  # of a writer
STEPS = 40_000  # of a lane, more than are ever written
SMALL = StepSchema({"observation": Field("observation", "float64", (3,))}, Field("action", "int64", (2,)))
FRAMES = StepSchema(
    {
        "observation": Field("observation", "float64", (3,)),
        "observation/frame": Field("observation/frame", "uint8", (64, 64)),
    },
    Field("action", "int64", (2,)),
)
ROOMY = ShardSpec(
    schema=SMALL.to_json(),
    run="faults",
    index=0,
    capacity=256 * 1024,  # nothing that a test writes is ever overwritten
    segment_steps=256,
    seed=0,
    directory="",
    tables=(TableSpec(), TableSpec("prioritised", "prioritised"), TableSpec("every third", "fifo", stride=3)),
    limits=(RateLimit.from_min_size(1),) * 3,
    lease_s=60.0,
)
# Segments are recycled all the time, and items need the frame before theirs.
TIGHT = replace(ROOMY, schema=FRAMES.to_json(), capacity=64 * 8, segment_steps=8, stack=2)


@pytest.fixture
def memory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="millrace-faults-", dir="/dev/shm") as folder:
        yield Path(folder)


def wait_until(true: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------------------- steps


def episodes(schema: StepSchema, who: int, count: int, mean: float = 12.0) -> np.ndarray:
    """The packed rows of a writer's lanes, (LANES, count): episodes of random lengths, every step told from every other.

    A frame, where there is one, is filled with the step's number.
    """
    rng = np.random.default_rng([7, who])
    rows = np.zeros((LANES, count), schema.packed)
    step = np.arange(count)
    for lane in range(LANES):
        lengths = rng.geometric(1.0 / mean, size=count)
        last = np.zeros(count, bool)
        ends = np.cumsum(lengths) - 1
        last[ends[ends < count]] = True
        of_lane = rows[lane]
        of_lane["observation"] = np.stack([np.full(count, who), np.full(count, lane), step], axis=1)
        of_lane["policy_version"] = step
        of_lane["is_last"] = last
        of_lane["is_terminal"] = last & (rng.random(count) < 0.5)
        of_lane["is_first"] = np.concatenate([[True], last[:-1]])
        of_lane["reward"] = np.where(last, 0.0, step + 0.5)
        of_lane["action"] = np.where(last, 0, step + 1)[:, None] * [1, -1]
    return rows


WRITER = """
import json, sys, threading, time
import numpy as np
from replay.schema import StepSchema
from replay.security import Security, flight_client
from replay.writers import FlightWriter

told = json.loads(sys.stdin.readline())
schema, security = StepSchema.from_json(told["schema"]), Security(**told["security"])
steps = np.memmap(told["steps"], schema.packed, "r").reshape(told["lanes"], -1)
acknowledged, appended = np.memmap(told["marks"], np.int64, "r+").reshape(2, -1)
rng = np.random.default_rng(told["seed"])
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
writer = FlightWriter(
    told["address"], schema, name=told["name"], message_rows=512, connect=lambda address: flight_client(address, security)
)
at = np.zeros(len(steps), np.int64)
while not over.is_set():
    for _ in range(rng.integers(1, 6)):
        # Lanes in any order, now and then enough steps of one for several segments.
        lanes = rng.integers(0, len(steps), size=rng.integers(1, 24)).astype(np.int32)
        if rng.random() < told["long"]:
            lanes = np.repeat(lanes, 40)[:200]
        counts = np.bincount(lanes, minlength=len(steps))
        if (at + counts > steps.shape[1]).any():
            break
        seen = np.zeros(len(steps), np.int64)
        numbers = np.empty(len(lanes), np.int64)
        for k, lane in enumerate(lanes):
            numbers[k] = at[lane] + seen[lane]
            seen[lane] += 1
        rows = schema.zeros(len(lanes))
        for name in schema.packed.names:
            rows[name] = steps[name][lanes, numbers]
        for frame in schema.large:
            rows[frame.name] = (numbers % 251)[:, None, None]
        at += counts
        appended[:] = at
        writer.append(lanes, rows)
        if rng.random() < 0.2:
            time.sleep(rng.exponential(0.002))
    writer.flush()
    acknowledged[:] = at
    time.sleep(rng.exponential(told["pause_s"]))
if told["close"]:
    writer.close()
"""


class Writing:
    """A process that writes until it is told to stop, or is killed."""

    def __init__(
        self, folder: Path, address: str, spec: ShardSpec, security: Security, *, who: int, count: int
    ) -> None:
        """count: steps per lane, at most."""
        schema = StepSchema.from_json(spec.schema)
        self.name = f"writer {who}"
        self.who = who
        self.closes = who % 2 == 0  # the others end without a word
        self.killed = False
        self.sequence = NONE  # of the last batch that the shard was seen to have
        self.steps = episodes(schema, who, count)
        step = np.arange(count)
        self.index = step - np.maximum.accumulate(np.where(self.steps["is_first"], step, 0), axis=1)  # in its episode
        steps, marks = folder / f"steps{who}", folder / f"marks{who}"
        self.steps.tofile(steps)
        np.zeros((2, LANES), np.int64).tofile(marks)
        self._marks = np.memmap(marks, np.int64, "r").reshape(2, LANES)
        told = {
            "schema": spec.schema,
            "security": asdict(security),
            "address": address,
            "name": self.name,
            "seed": who,
            "lanes": LANES,
            "steps": str(steps),
            "marks": str(marks),
            "long": 0.1,
            "pause_s": 0.008,
            "close": self.closes,
        }
        self._child = subprocess.Popen([sys.executable, "-c", WRITER], stdin=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(told) + "\n")
        self._child.stdin.flush()

    @property
    def acknowledged(self) -> np.ndarray:
        """Steps of each lane that the shard has answered for: int64 (LANES,)."""
        found: np.ndarray = self._marks[0].copy()
        return found

    @property
    def appended(self) -> np.ndarray:
        """Steps of each lane that were handed over, or are just being: int64 (LANES,)."""
        found: np.ndarray = self._marks[1].copy()
        return found

    def alive(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        self._child.kill()
        self._child.communicate()
        self.killed = True

    def stop(self) -> int:
        """Have it stored what it has handed over, and end. Returns its exit code."""
        self._child.communicate(timeout=60)
        return self._child.returncode


class Served:
    """A shard that dies again and again and comes back on its port. The process to come is started ahead, for its imports."""

    def __init__(self, spec: ShardSpec, faults: list[str]) -> None:
        """faults: for each life the point at which it ends, "" where it is killed from outside or lives on."""
        self.spec = spec
        self.security = Security(new_token())
        self._faults = list(faults)
        self._lives = 0
        self._child = self._next = self._spawn()

    def _spawn(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "replay.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MILLRACE_FAULT": self._faults.pop(0) if self._faults else ""},
        )

    def start(self) -> None:
        """The next life. It takes over what the last one left."""
        self._child = self._next
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        start = {"spec": self.spec.to_json(), "security": asdict(self.security), "recover": self._lives > 0}
        self._child.stdin.write(json.dumps(start) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        assert line, "the shard did not start"
        answer = json.loads(line)
        self.address: str = answer["address"]
        self.spec = replace(self.spec, port=answer["port"])
        self._lives += 1
        self._next = self._spawn()

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)

    def wait_for_death(self) -> None:
        assert self._child.wait(timeout=60) == -signal.SIGKILL, "it ended otherwise than by the kill"
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        for child in {self._child, self._next}:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                assert pipe is not None
                pipe.close()


# ------------------------------------------------------------------------------------------------- what a dead shard left


@dataclass
class Left:
    """The contents of a shard's file after recovery."""

    segments: list[SegmentCopy]  # oldest first
    tables: dict[str, dict[str, int]]  # counters
    sequences: dict[str, int | None]  # last batch of each writer, None for closed ones
    finished: bool = field(default=True, compare=False)  # the last change was complete already

    def bytes(self) -> list[bytes]:
        parts = []
        for segment in self.segments:
            assert segment.rows is not None
            assert segment.index is not None
            parts += [segment.rows.tobytes(), segment.index.tobytes()]
            parts += [table.member.tobytes() for table in segment.tables.values()]
            parts.append(repr((segment.sequence, segment.following, segment.complete)).encode())
        return parts


def storage_path(spec: ShardSpec) -> Path:
    return Path(spec.directory) / f"millrace.{spec.run}.shard{spec.index}.steps"


def control(spec: ShardSpec) -> dict[str, np.ndarray]:
    """The arrays of a dead shard's file, to be changed."""
    return spec.layout.carve(np.memmap(storage_path(spec), np.uint8, "r+"))


def recovered(spec: ShardSpec) -> Shard:
    return Shard.from_spec(spec, spec.limiters(), recover=True)


def read_left(spec: ShardSpec, writers: list[str]) -> Left:
    """Recover the file, which stays, and read all of it."""
    state = control(spec)["state"]
    finished = bool(state[kernels.HEAD] == state[kernels.APPLIED])
    shard = recovered(spec)
    try:
        assert shard.recovered
        header, segments = shard.copy()
        sequences: dict[str, int | None] = {}
        found = list(segments)
        for name in writers:
            try:
                sequences[name] = shard.connect(name)
            except WriterClosedError:
                sequences[name] = None
        tables = {name: table["counters"] for name, table in header["tables"].items()}
        return Left(found, tables, sequences, finished)
    finally:
        shard.close(remove=False)


def read_copy(spec: ShardSpec, writers: list[str], rng: np.random.Generator) -> Left:
    """As `read_left`, of a copy.

    A change that recovery had to complete is completed again from states that a kill in the midst of it could have left,
    with some of its words stored: recovery, which stores them in the same order, may be killed too.
    """
    folder = Path(spec.directory) / "copy"
    folder.mkdir()
    try:
        copied = replace(spec, directory=str(folder))
        shutil.copyfile(storage_path(spec), storage_path(copied))
        left = read_left(copied, writers)
        if left.finished:
            return left
        before, after = (spec.layout.carve(np.fromfile(storage_path(s), np.uint8)) for s in (spec, copied))
        assert after["state"][kernels.APPLIED] == before["state"][kernels.HEAD], "what was begun was completed"
        assert (after["segments"] != before["segments"]).any()
        for share in (0.2, 0.8, 1.0):
            shutil.copyfile(storage_path(spec), storage_path(copied))
            torn = control(copied)
            for name in ("state", "segments", "lanes", "writers", "flags"):
                stored = (before[name] != after[name]) & (rng.random(before[name].shape) < share)
                torn[name][stored] = after[name][stored]
            for word in (kernels.APPLIED, kernels.TOLD):  # the last ones to be stored
                torn["state"][word] = before["state"][word]
            again = read_left(copied, writers)
            assert not again.finished
            assert again.bytes() == left.bytes()
            assert again.tables == left.tables
        return left
    finally:
        shutil.rmtree(folder)


def check(left: Left, spec: ShardSpec, writers: list[Writing], *, all_kept: bool) -> None:
    """Compare what a shard left with what its writers have noted.

    all_kept: the storage is large enough for all that was ever written.
    """
    schema = StepSchema.from_json(spec.schema)
    lives: dict[tuple[int, int], list[SegmentCopy]] = {}
    for segment in left.segments:
        assert segment.rows is not None
        who, lane, _ = segment.rows["observation"][0].astype(int).tolist()
        assert (segment.rows["observation"][:, :STEP] == [who, lane]).all(), "a segment is one lane's"
        lives.setdefault((who, lane), []).append(segment)
    items = dict.fromkeys(left.tables, 0)
    least, most = dict.fromkeys(left.tables, 0), dict.fromkeys(left.tables, 0)
    for writer in writers:
        acknowledged, appended = writer.acknowledged, writer.appended
        sequence = left.sequences[writer.name]
        if sequence is not None:
            assert sequence >= writer.sequence, "a writer's sequence numbers go on"
            writer.sequence = sequence
        for lane in range(LANES):
            steps, index = writer.steps[lane], writer.index[lane]
            there = lives.pop((writer.who, lane), [])
            if there:
                newest = check_lane(
                    there, spec, steps, index, items, closed=sequence is None, begins_at_0=all_kept, schema=schema
                )
                assert acknowledged[lane] <= newest + 1 <= appended[lane], "lost, or never written"
                newest_least = newest_most = newest
            else:
                assert not all_kept or acknowledged[lane] == 0
                newest_least, newest_most = int(acknowledged[lane]) - 1, int(appended[lane]) - 1
            for table in spec.tables:
                for counts, end in ((least, newest_least), (most, newest_most)):
                    before = slice(0, max(0, end))
                    inserted = ~steps["is_last"][before] & (index[before] % table.stride == 0)
                    counts[table.name] += int(np.count_nonzero(inserted))
    assert not lives, "steps that nobody wrote"
    for name, counters in left.tables.items():
        assert counters["items"] == items[name]
        assert least[name] <= counters["inserted"] <= most[name]
        assert not all_kept or counters["inserted"] == counters["items"]


def check_lane(
    segments: list[SegmentCopy],
    spec: ShardSpec,
    steps: np.ndarray,
    index: np.ndarray,
    items: dict[str, int],
    *,
    closed: bool,
    begins_at_0: bool,
    schema: StepSchema,
) -> int:
    """The rows that are left of a lane are what was written, once and in order, and those that should be are items.

    steps: those that the lane was to write, (n,); index: their places in their episodes; items: counts up the items of each
    table. Returns the newest step's number.
    """
    for one, following in pairwise(segments):
        assert one.count == spec.segment_steps
        assert one.following == following.sequence, "a lane's segments are linked in order"
    known = {segment.sequence for segment in segments}
    assert segments[-1].following not in known
    rows = np.concatenate([segment.rows for segment in segments])
    number = rows["observation"][:, STEP].astype(int)
    begin, newest = int(number[0]), int(number[-1])
    assert number.tolist() == list(range(begin, newest + 1)), "in order, without a gap, nothing twice"
    assert begin == 0 or not begins_at_0
    expected = steps[begin : newest + 1].copy()
    if closed and not expected["is_last"][-1]:
        end = expected[-1:]
        end["is_last"], end["reward"], end["action"] = True, 0.0, 0
    for name in schema.packed.names or ():
        wrong = np.flatnonzero((rows[name] != expected[name]).reshape(len(rows), -1).any(axis=1))
        assert not len(wrong), f"{name} of step {begin + int(wrong[0])}"
    for frame in schema.large:
        assert (rows[frame.name] == (number % 251)[:, None, None]).all()
    assert np.concatenate([s.index for s in segments]).tolist() == index[begin : newest + 1].tolist()
    transition = ~steps["is_last"][begin : newest + 1]
    transition[-1] = False
    if schema.large:  # the frames before it, of its episode, must be there
        transition &= np.minimum(index[begin : newest + 1], spec.stack - 1) <= np.arange(len(rows))
    for table in spec.tables:
        member = np.concatenate([segment.tables[table.name].member for segment in segments])
        assert member.tolist() == (transition & (index[begin : newest + 1] % table.stride == 0)).tolist()
        items[table.name] += int(np.count_nonzero(member))
    return newest


def kill_again_and_again(
    memory: Path, spec: ShardSpec, faults: list[str], *, writer_kills: int, seed: int, all_kept: bool
) -> None:
    """Two writers over a shard that dies of each of the faults, "" being a kill at a random moment.

    Now and then, `writer_kills` times in all, a writer is killed as well, and another one begins.
    """
    rng, torn = random.Random(seed), np.random.default_rng(seed)
    spec = replace(spec, directory=str(memory))
    served = Served(spec, faults)
    writers: list[Writing] = []

    def begin_writer() -> None:
        writers.append(Writing(memory, served.address, spec, served.security, who=len(writers), count=STEPS))

    def killed() -> int:
        return sum(writer.killed for writer in writers)

    def kill_writer() -> None:
        """One that has written something, if there is one."""
        victims = [writer for writer in writers if writer.alive() and writer.appended.any()]
        if victims and killed() < writer_kills:
            rng.choice(victims).kill()
            begin_writer()

    def progress() -> int:
        return sum(int(writer.acknowledged.sum()) for writer in writers)

    try:
        for fault in faults:
            served.start()
            while len(writers) < 2:
                begin_writer()
            if rng.random() < 0.6:
                kill_writer()
            if not fault:
                before = progress()
                wait_until(lambda before=before: progress() > before)  # type: ignore[misc]
                time.sleep(rng.uniform(0.0, 0.1))
                served.kill()
            served.wait_for_death()
            if rng.random() < 0.3:
                kill_writer()
            left = read_copy(spec, [writer.name for writer in writers], torn)
            check(left, spec, writers, all_kept=all_kept)
            if fault:
                assert left.finished == (fault.split(":")[0] not in UNFINISHED)
        served.start()
        while killed() < writer_kills:
            wait_until(lambda: all(writer.killed or writer.acknowledged.any() for writer in writers))
            time.sleep(rng.uniform(0.0, 0.02))
            kill_writer()
        wait_until(lambda: all(writer.killed or writer.acknowledged.any() for writer in writers))
        for writer in writers:
            if not writer.killed:
                assert writer.stop() == 0
                assert (writer.acknowledged == writer.appended).all()
        served.kill()
        served.wait_for_death()
        left = read_left(spec, [writer.name for writer in writers])
        check(left, spec, writers, all_kept=all_kept)
        for writer in writers:
            assert (left.sequences[writer.name] is None) == (writer.closes and not writer.killed)
    finally:
        served.close()
        for writer in writers:
            writer.kill()


def at_every_point(rng: random.Random, *, most: int) -> list[str]:
    return [f"{point}:{n}" for point in POINTS for n in (1, rng.randint(2, most))]


VARIANTS = pytest.mark.parametrize(
    ("spec", "all_kept"), [pytest.param(ROOMY, True, id="roomy"), pytest.param(TIGHT, False, id="tight")]
)


@VARIANTS
def test_killed_at_every_point_and_at_random_moments_it_loses_and_doubles_nothing(
    memory: Path, spec: ShardSpec, all_kept: bool
) -> None:
    """16 times the shard, 10 times a writer."""
    rng = random.Random(0)
    faults = at_every_point(rng, most=30) + [""] * 4
    rng.shuffle(faults)
    kill_again_and_again(memory, spec, faults, writer_kills=10, seed=0, all_kept=all_kept)


@pytest.mark.slow
@pytest.mark.timeout(900)
@VARIANTS
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_hundreds_of_times_it_loses_and_doubles_nothing(
    memory: Path, spec: ShardSpec, all_kept: bool, seed: int
) -> None:
    """84 times the shard, 30 times a writer."""
    rng = random.Random(seed)
    faults = at_every_point(rng, most=100) + at_every_point(rng, most=10) + at_every_point(rng, most=3) + [""] * 48
    rng.shuffle(faults)
    spec = replace(spec, capacity=4 * spec.capacity)
    kill_again_and_again(memory, spec, faults, writer_kills=30, seed=seed, all_kept=all_kept)


# ------------------------------------------------------------------------------------------------------------ one death


def served_writer(process: ShardProcess, name: str = "w") -> FlightWriter:
    return FlightWriter(
        process.address, SMALL, name=name, connect=lambda address: flight_client(address, process.security)
    )


def one_episode(count: int, first: int = 0) -> np.ndarray:
    """Steps `first` … of one long episode; each tells its number."""
    rows = SMALL.zeros(count)
    number = np.arange(first, first + count)
    rows["policy_version"] = number
    rows["reward"] = number + 0.5
    rows["action"] = number[:, None]
    rows["is_first"] = number == 0
    return rows


def priorities_left(spec: ShardSpec, table: str) -> dict[int, float]:
    """Number of a step → priority of the item, read from a dead shard's file."""
    shard = recovered(spec)
    found: dict[int, float] = {}
    _, segments = shard.copy()
    for segment in segments:
        assert segment.rows is not None
        known = segment.tables[table]
        assert known.priority is not None
        numbers = segment.rows["policy_version"][known.member].tolist()
        found |= dict(zip(numbers, known.priority[known.member].tolist(), strict=True))
    shard.close(remove=False)
    return found


@pytest.mark.parametrize("transport", ["local", "flight"])
def test_priorities_outlive_the_shard_and_the_same_reader_goes_on(memory: Path, transport: Any) -> None:
    spec = replace(ROOMY, directory=str(memory), capacity=4096, segment_steps=64, run=transport)
    table = spec.tables[1]
    with ShardProcess(spec) as first:
        spec = replace(spec, port=first.port)
        writer = served_writer(first)
        writer.append(np.zeros(201, np.int32), one_episode(201))
        writer.flush()
        sampler = stream_sampler(
            [first.address], SMALL, batch_size=64, seed=0, security=first.security, table=table, transport=transport
        )
        wanted = dict.fromkeys(range(200), 1.0)

        def raise_priorities(batch: WindowBatch, factor: float) -> None:
            numbers = batch.steps["policy_version"][:, 0]
            priorities = factor * (1.0 + numbers)
            sampler.update_priorities(batch, priorities)
            wanted.update(zip(numbers.tolist(), priorities.tolist(), strict=True))

        def mass() -> float:
            return float(sum(priority**table.priority_exponent for priority in wanted.values()))

        for _ in range(3):
            raise_priorities(sampler.sample(20.0), 2.0)
        assert 64 < len({number for number, priority in wanted.items() if priority != 1.0}) < 200
        wait_until(lambda: first.stats()["tables"]["prioritised"]["mass"] == pytest.approx(mass()))
        first.kill()
        assert priorities_left(spec, "prioritised") == pytest.approx(wanted)
        with ShardProcess(spec, first.security, recover=True) as second:
            stats = second.stats()
            assert stats["recovered"]
            assert stats["tables"]["prioritised"]["mass"] == pytest.approx(mass())
            # Nothing is inserted any more: what is there must do, for the limiter too.
            batch = sampler.sample(20.0)
            while batch.size == 0 or batch.probability[0] == pytest.approx(1 / 200):  # drawn before the kill
                batch = sampler.sample(20.0)
            for _ in range(12):  # the last ones were drawn after it
                batch = sampler.sample(20.0)
            numbers = batch.steps["policy_version"][:, 0].tolist()
            shares = [wanted[number] ** table.priority_exponent / mass() for number in numbers]
            assert batch.probability == pytest.approx(shares)
            raise_priorities(batch, 5.0)
            wait_until(lambda: second.stats()["tables"]["prioritised"]["mass"] == pytest.approx(mass()))
            writer.append(np.zeros(1, np.int32), one_episode(1, 201))
            writer.flush()
            wanted[200] = max(wanted.values())  # new items are drawn soon at least once
            sampler.close()
            second.kill()
        assert priorities_left(spec, "prioritised") == pytest.approx(wanted)
        writer.close()


def test_every_item_of_a_queue_is_drawn_though_the_shard_died_between_two_steps(memory: Path) -> None:
    """The recovered limiter still counts the step whose successor was to come."""
    table, limit = TableSpec("queue", "fifo", max_times_sampled=1), RateLimit.queue(100)
    spec = replace(ROOMY, directory=str(memory), capacity=4096, tables=(table,), limits=(limit,))
    with ShardProcess(spec) as first:
        writer = served_writer(first)
        writer.append(np.zeros(3, np.int32), one_episode(3))
        writer.flush()
        first.kill()
        with ShardProcess(replace(spec, port=first.port), first.security, recover=True) as second:
            writer.append(np.zeros(2, np.int32), one_episode(2, 3))
            writer.flush()
            assert second.stats()["tables"]["queue"]["limiter"] == {"inserted": 5, "sampled": 0, "removed": 0}
            writer.close()  # step 4 will have none
            wait_until(lambda: second.stats()["tables"]["queue"]["limiter"]["inserted"] == 4)
            with closing(
                stream_sampler(
                    [second.address], SMALL, batch_size=1, seed=0, security=second.security, table=table, prefetch=1
                )
            ) as sampler:
                drawn = [int(sampler.sample(20.0).steps["policy_version"][0, 0]) for _ in range(4)]
            assert drawn == [0, 1, 2, 3]


def test_an_item_in_a_recycled_place_has_nothing_of_the_one_before(memory: Path) -> None:
    """Killed when the rows are committed and the tables not told yet, that the place is another item's now."""
    tables = (TableSpec(), TableSpec("prioritised", "prioritised"), TableSpec("thrice", max_times_sampled=3))
    spec = replace(ROOMY, directory=str(memory), capacity=4 * 16, segment_steps=16, tables=tables)
    with ShardProcess(spec) as first:
        spec = replace(spec, port=first.port)
        writer = served_writer(first)
        writer.append(np.zeros(64, np.int32), one_episode(64))
        writer.flush()
        counting, sampler = (
            stream_sampler(
                [first.address], SMALL, batch_size=32, seed=0, security=first.security, table=table, prefetch=1
            )
            for table in (tables[2], tables[1])
        )
        counting.sample(20.0)
        with suppress(TimeoutError):  # nothing is drawn any more once all priorities are 0
            while first.stats()["tables"]["prioritised"]["mass"] > 0.0:
                sampler.update_priorities(sampler.sample(1.0), np.zeros(32))
        counting.close()
        sampler.close()
        wait_until(lambda: first.stats()["tables"]["prioritised"]["mass"] == 0.0)
        first.kill()
        times = control(spec)["times_sampled2"]
        assert 0 < times.max() <= 3
        fault = {"MILLRACE_FAULT": "record_applied:2"}
        with ShardProcess(spec, first.security, recover=True, environment=fault) as second:
            writer.append(np.zeros(40, np.int32), one_episode(40, 64))  # takes a segment, fills it, takes another
            assert second.wait(20.0) == -signal.SIGKILL
        left = priorities_left(spec, "prioritised")
        assert {number: p for number, p in left.items() if number >= 64} == dict.fromkeys(range(64, 95), 1.0)
        for segment in read_left(spec, []).segments:
            thrice = segment.tables["thrice"]
            assert segment.rows is not None
            assert thrice.times_sampled is not None
            assert not thrice.times_sampled[segment.rows["policy_version"] >= 64].any()
        with ShardProcess(spec, first.security, recover=True) as third:
            writer.flush()
            third.kill()
        writer.close()


def test_a_damaged_file_is_refused_and_a_fresh_start_stays_possible(
    memory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = replace(ROOMY, directory=str(memory), capacity=4096)
    with ShardProcess(spec, environment={"MILLRACE_FAULT": "record_published:3"}) as first:
        spec = replace(spec, port=first.port)
        writer = served_writer(first)
        for lane in range(3):
            writer.append(np.full(5, lane, np.int32), one_episode(5))
            if lane < 2:
                writer.flush()
        assert first.wait(20.0) == -signal.SIGKILL
    arrays = control(spec)
    head = int(arrays["state"][kernels.HEAD])
    assert head == arrays["state"][kernels.APPLIED] + 1
    record = arrays["journal"][head & 1]
    words = kernels.RECORD_HEAD + 4 * int(record[kernels.COUNT]) + 1  # with the checksum
    before = record.copy()
    for byte in range(8 * words):
        for bit in (1, 128):
            record.view(np.uint8)[byte] ^= bit
            with pytest.raises(StorageError, match="checksum of the journal's last record is wrong"):
                recovered(spec)
            record[:] = before
    with pytest.raises(StorageError, match=r"another layout: expected .*stride=5.*, found .*stride=3"):
        recovered(replace(spec, tables=(*spec.tables[:2], replace(spec.tables[2], stride=5))))
    record[words - 1] += 1
    with pytest.raises(RuntimeError, match="exit code 1"):
        ShardProcess(spec, first.security, recover=True)
    assert "StorageError: the checksum of the journal's last record is wrong" in capfd.readouterr().err
    record[:] = before
    # It is as it was: what was refused, was not changed.
    left = read_left(spec, ["w"])
    assert (left.sequences, sum(segment.count for segment in left.segments)) == ({"w": 2}, 15)
    arrays["state"][kernels.APPLIED] -= 1
    record[words - 1] += 1
    with ShardProcess(spec, first.security) as second:
        assert not second.stats()["recovered"]
        writer.append(np.zeros(1, np.int32), one_episode(1))
        writer.flush()
        writer.close()


def test_a_lane_that_was_half_closed_keeps_no_segment(memory: Path) -> None:
    spec = replace(ROOMY, directory=str(memory), capacity=4096)
    with ShardProcess(spec) as first:
        writer = served_writer(first)
        writer.append(np.array([0, 0, 1, 1], np.int32), np.tile(one_episode(2), 2))
        writer.flush()
        first.kill()
        lanes, segments = control(spec)["lanes"], control(spec)["segments"]
        half, whole = lanes[kernels.SEGMENT, :2].tolist()
        lanes[kernels.NEWEST : kernels.INDEX + 1, 0] = NONE  # killed here
        assert segments[kernels.OWNER, [half, whole]].tolist() == [0, 1]
        left = read_left(spec, ["w"])
        assert segments[kernels.OWNER, [half, whole]].tolist() == [NONE, 1]
        assert [segment.count for segment in left.segments] == [2, 2]
        with ShardProcess(replace(spec, port=first.port), first.security, recover=True):
            writer.append(np.zeros(1, np.int32), one_episode(1))
            writer.close()


def test_the_lanes_of_a_writer_that_died_with_the_shard_end_with_its_lease(memory: Path) -> None:
    spec = replace(ROOMY, directory=str(memory), capacity=4096, lease_s=0.5)
    with ShardProcess(spec) as first:
        spec = replace(spec, port=first.port)
        writing = Writing(memory, first.address, spec, first.security, who=0, count=STEPS)
        try:
            wait_until(lambda: bool(writing.acknowledged.all()))
        finally:
            writing.kill()
        first.kill()
    assert read_left(spec, [writing.name]).sequences[writing.name] is not None, "its lanes are open"
    with ShardProcess(spec, first.security, recover=True) as second:
        assert second.stats()["writers"] == 1
        wait_until(lambda: second.stats()["leases_ended"] == 1)
        assert second.stats()["writers"] == 0
        second.kill()
    left = read_left(spec, [writing.name])
    assert left.sequences[writing.name] is None
    check(left, spec, [writing], all_kept=True)
    newest = {}
    for segment in left.segments:
        assert segment.rows is not None
        newest[int(segment.rows["observation"][0, LANE])] = segment.rows[-1]
    for lane in range(LANES):
        last = newest[lane]
        assert last["is_last"]
        if not writing.steps[lane, int(last["observation"][STEP])]["is_last"]:
            assert (last["is_terminal"], last["reward"], last["action"].tolist()) == (False, 0.0, [0, 0])
