"""The writer's side of exactly-once insertion, against a Flight server in a process of its own that misbehaves on demand."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.flight as flight
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.schema import Field, SchemaError, StepSchema
from replay.writers import FlightWriter, LaneWriter

ROOT = Path(__file__).parents[1]
SCHEMA = StepSchema({"observation": Field("observation", "float32", (5,))}, Field("action", "float32", (2,)))
OTHER = StepSchema({"observation": Field("observation", "float32", (9,))}, Field("action", "float32", (2,)))
RECORD = struct.Struct("<32sqqq")  # writer, sequence, rows (−1: the writer's close), their bytes

# It keeps what it applied in a log, which survives its death as a shard's mapped files do. A record that is cut short by
# the death was not acknowledged; the next start cuts it off.
SERVER = r"""
import json, os, struct, sys, threading, time
import pyarrow.flight as flight

path, port, lazy = sys.argv[1], sys.argv[2], sys.argv[3] == "lazy"
SEQUENCE, RECORD = struct.Struct("<q"), struct.Struct("<32sqqq")
applied, faults, open_ = {}, [], threading.Event()
open_.set()
log = os.open(path, os.O_RDWR | os.O_CREAT)
data, at = os.read(log, 1 << 30), 0
while at + RECORD.size <= len(data):
    name, sequence, count, size = RECORD.unpack_from(data, at)
    if at + RECORD.size + size > len(data):
        break
    applied[name] = max(sequence, applied.get(name, -1))
    at += RECORD.size + size
os.ftruncate(log, at)
os.lseek(log, at, os.SEEK_SET)


class Server(flight.FlightServerBase):
    def do_put(self, context, descriptor, reader, writer):
        name = json.loads(descriptor.command)["writer"].encode().ljust(32, b"\0")
        if reader.schema.names != ["lane", "row"] or reader.schema.field(1).type.byte_width != 40:
            raise flight.FlightServerError("expected rows of 40 bytes")
        last = applied.get(name, -1)
        writer.write(SEQUENCE.pack(last))
        over = threading.Event()

        def answer_now_and_then(answered):
            while not over.wait(0.01):
                if (newest := applied.get(name, -1)) > answered:
                    writer.write(SEQUENCE.pack(newest))
                    answered = newest

        answers = threading.Thread(target=answer_now_and_then, args=(last,))
        if lazy:
            answers.start()
        try:
            while True:
                try:
                    chunk = reader.read_chunk()
                except StopIteration:
                    break
                if chunk.data is None:
                    os.write(log, RECORD.pack(name, -1, -1, 0))
                    break
                while not open_.wait(0.1):
                    if context.is_cancelled():
                        return
                fault = faults.pop(0) if faults else ""
                if fault == "before":
                    raise flight.FlightUnavailableError("cut off before the message was applied")
                if fault == "refuse":
                    raise flight.FlightServerError("lanes 70000…70000 lie outside 0…65535")
                (sequence,) = SEQUENCE.unpack(chunk.app_metadata)
                if sequence > applied.get(name, -1):
                    lanes, rows = (
                        c.buffers()[1].to_pybytes()[: len(c) * width]
                        for c, width in zip(chunk.data.columns, (4, 40))
                    )
                    count = chunk.data.num_rows
                    os.write(log, RECORD.pack(name, sequence, count, len(lanes + rows)) + lanes + rows)
                    applied[name] = sequence
                if fault == "after":
                    raise flight.FlightUnavailableError("cut off before the reply")
                if not lazy:
                    writer.write(SEQUENCE.pack(sequence))
        finally:
            over.set()
            if lazy:
                answers.join()

    def do_action(self, context, action):
        if action.type == "faults":
            faults[:] = json.loads(action.body.to_pybytes())
        if action.type == "reset":
            applied.clear()
            faults.clear()
            os.ftruncate(log, 0)
            os.lseek(log, 0, os.SEEK_SET)
        (open_.clear if action.type == "hold" else open_.set)()
        return []


server = Server(f"grpc://127.0.0.1:{port}")
print(server.port, flush=True)
sys.stdin.read()
os._exit(0)
"""


@dataclass
class Message:
    writer: str
    sequence: int
    lanes: np.ndarray
    rows: np.ndarray


class Server:
    """The process; it ends with its parent."""

    def __init__(self, log: Path, *, lazy: bool = False) -> None:
        self._log = log
        self._lazy = lazy
        self._port = 0
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-c", SERVER, str(self._log), str(self._port), "lazy" if self._lazy else "prompt"]
        self._child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self._port = int(self._child.stdout.readline())
        self.address = f"grpc://127.0.0.1:{self._port}"

    def kill(self) -> None:
        """As kill -9."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()

    def tell(self, what: str, body: object = None) -> None:
        """hold: apply nothing more; release; faults: one word for each message to come; reset: forget everything."""
        with flight.FlightClient(self.address) as client:
            list(client.do_action(flight.Action(what, json.dumps(body).encode())))

    def messages(self, writer: str | None = None) -> list[Message]:
        """What was applied, in order, without the closes."""
        return [m for m in self._records() if m.sequence >= 0 and writer in (None, m.writer)]

    def closed(self) -> list[str]:
        """The writers whose close has come."""
        return [m.writer for m in self._records() if m.sequence < 0]

    def _records(self) -> list[Message]:
        data, at, found = self._log.read_bytes(), 0, []
        while at + RECORD.size <= len(data):
            name, sequence, count, size = RECORD.unpack_from(data, at)
            at += RECORD.size
            if at + size > len(data):
                break
            lanes = np.frombuffer(data, np.int32, max(count, 0), at)
            rows = np.frombuffer(data, SCHEMA.dtype, max(count, 0), at + lanes.nbytes)
            found.append(Message(name.rstrip(b"\0").decode(), sequence, lanes, rows))
            at += size
        return found


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("server") / "log")
    yield one
    one.kill()


@pytest.fixture
def server(process: Server) -> Server:
    """The process, which knows nothing yet. A test that kills it starts it again."""
    process.tell("reset")
    return process


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [t.name for t in threading.enumerate() if t not in before]
    assert not left


def steps(count: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Steps `first` … of three lanes in turn: their lanes and rows; every byte of a row tells which it is."""
    k = np.arange(first, first + count)
    rows = SCHEMA.zeros(count)
    rows["observation"] = k[:, None] + np.arange(5) / 8
    rows["action"] = -k[:, None]
    rows["reward"] = k * 2
    rows["policy_version"] = k
    rows["is_last"] = k % 7 == 0
    return (k % 3).astype(np.int32), rows


def check(messages: list[Message], count: int) -> None:
    """Steps 0 … count − 1 were applied once each, in order, with their lanes and all their bytes."""
    lanes, rows = steps(count)
    assert b"".join(m.rows.tobytes() for m in messages) == rows.tobytes()
    assert np.concatenate([m.lanes for m in messages]).tolist() == lanes.tolist()
    numbers = [m.sequence for m in messages]
    assert numbers == sorted(set(numbers))


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


# ----------------------------------------------------------------- order, staging


def test_batches_that_come_while_messages_are_away_share_a_message(server: Server) -> None:
    server.tell("hold")
    writer = FlightWriter(server.address, SCHEMA, in_flight=2)
    for k in range(0, 400, 4):
        lanes, rows = steps(4, k)
        writer.append(lanes, rows)
        lanes[:], rows["policy_version"] = 77, -1  # ours again as soon as append returns
    server.tell("release")
    writer.flush()
    check(server.messages(), 400)
    assert [len(m.rows) for m in server.messages()] == [4, 4, 392]
    assert [m.sequence for m in server.messages()] == [0, 1, 2]
    writer.close()
    assert len(server.closed()) == 1


def test_an_idle_writer_sends_at_once_and_without_a_flush(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, in_flight=1)
    server.tell("hold")
    writer.append(*steps(2))
    writer.append(*steps(3, 2))  # staged: the first is not acknowledged
    server.tell("release")
    wait_until(lambda: len(server.messages()) == 2)  # sent by nobody's call
    check(server.messages(), 5)
    writer.close()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), max_size=30),
    in_flight=st.integers(1, 4),
    message_rows=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_any_batches_arrive_whole_and_in_order(
    shared_server: Server, sizes: list[int], in_flight: int, message_rows: int, seed: int
) -> None:
    rng, name, count = np.random.default_rng(seed), f"{seed}-{time.monotonic_ns()}", 0
    writer = FlightWriter(shared_server.address, SCHEMA, in_flight=in_flight, message_rows=message_rows, name=name)
    for size in sizes:
        lanes, rows = steps(size, count)
        match rng.integers(4):
            case 0:  # every other row of an array twice as long
                wide = SCHEMA.zeros(2 * size)
                for name_ in SCHEMA.dtype.names or ():
                    wide[name_][::2] = rows[name_]
                rows = wide[::2]
            case 1:
                lanes = lanes.astype(np.int64)
            case 2:
                rows.flags.writeable = False
            case _:
                pass
        writer.append(lanes, rows)
        count += size
        if rng.random() < 0.1:
            writer.flush()
            assert sum(len(m.rows) for m in shared_server.messages(name)) == count
    writer.close()
    found = shared_server.messages(name)
    if count:
        check(found, count)
    assert all(1 <= len(m.rows) <= message_rows for m in found)


@pytest.fixture(scope="module", params=[False, True], ids=["prompt", "lazy"])
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`lazy`: one reply answers many messages."""
    one = Server(tmp_path_factory.mktemp("shared") / "log", lazy=request.param)
    yield one
    one.kill()


def test_append_blocks_when_its_memory_is_full_and_says_so(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, in_flight=3, message_rows=10)
    server.tell("hold")
    done = [0]

    def write() -> None:
        for k in range(100):
            writer.append(*steps(5, 5 * k))
            done[0] += 5

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: writer.waiting_for is not None and done[0] >= 25)
    time.sleep(0.2)
    # The messages away hold 5 rows or more, the one being filled 10: never more than (3 + 1) · 10.
    assert done[0] == 25
    assert writer.waiting_for == f"replay at {server.address} for 0 s: 25 rows not acknowledged"
    server.tell("release")
    thread.join(timeout=10.0)
    assert done[0] == 500
    writer.flush()
    assert writer.waiting_for is None
    check(server.messages(), 500)
    writer.close()


# ------------------------------------------------------------------ exactly once


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_connection_cut_before_or_after_a_message_is_applied_loses_and_doubles_nothing(
    server: Server, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    writer = FlightWriter(server.address, SCHEMA, in_flight=int(rng.integers(1, 5)), message_rows=50, retry_s=10.0)
    server.tell("faults", rng.choice(["", "", "", "before", "after"], 20).tolist())
    count = 0
    while count < 2000:
        size = int(rng.integers(1, 80))
        lanes, rows = steps(size, count)
        writer.append(lanes, rows)
        lanes[:], rows["policy_version"] = 77, -1  # what is sent again is the writer's own copy
        count += size
    writer.flush()
    check(server.messages(), count)
    writer.close()
    assert len(server.closed()) == 1


def test_a_killed_server_that_comes_back_has_every_row_once(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, in_flight=3, message_rows=200, retry_s=20.0)
    count, stop, acknowledged = [0], threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            writer.append(*steps(16, count[0]))
            count[0] += 16
            if count[0] % 4096 == 0:
                writer.flush()
                acknowledged.append(count[0])

    thread = threading.Thread(target=write)
    thread.start()
    rng = np.random.default_rng(0)
    for _ in range(4):
        before = count[0]
        wait_until(lambda before=before: count[0] > before + 5000)  # type: ignore[misc]
        time.sleep(float(rng.uniform(0.0, 0.05)))
        server.kill()
        flushed = acknowledged[-1] if acknowledged else 0
        assert sum(len(m.rows) for m in server.messages()) >= flushed
        wait_until(lambda: writer.waiting_for is not None)
        wait_until(lambda: "connection lost" in (writer.waiting_for or ""))
        server.start()
    stop.set()
    thread.join(timeout=20.0)
    writer.close()
    check(server.messages(), count[0])
    assert len(server.closed()) == 1


def test_a_server_away_while_there_is_nothing_to_write_is_no_failure(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, retry_s=0.5)
    writer.append(*steps(5))
    writer.flush()
    server.kill()
    time.sleep(1.0)  # longer than retry_s
    writer.flush()
    assert writer.waiting_for is None
    server.start()
    writer.append(*steps(5, 5))
    writer.close()
    check(server.messages(), 10)


def test_a_writer_that_takes_a_name_over_goes_on_with_its_numbers(server: Server) -> None:
    for first in (0, 5):
        writer = FlightWriter(server.address, SCHEMA, name="actor-0")
        writer.append(*steps(5, first))
        writer.close()
    check(server.messages("actor-0"), 10)


# ------------------------------------------------------------------------ errors


def test_refused_rows_are_named_by_every_call_after(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA)
    server.tell("faults", ["", "refuse"])
    writer.append(*steps(3))
    writer.flush()
    writer.append(*steps(3, 3))
    for call in (writer.flush, lambda: writer.append(*steps(3, 6)), writer.close, writer.close):
        with pytest.raises(flight.FlightServerError, match="lanes 70000…70000 lie outside"):
            call()
    check(server.messages(), 3)


def test_a_blocked_append_is_woken_by_a_refusal(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, in_flight=1, message_rows=4)
    server.tell("faults", ["refuse"])
    server.tell("hold")
    threading.Timer(0.3, server.tell, ("release",)).start()
    with pytest.raises(flight.FlightServerError, match="lie outside"):
        writer.append(*steps(1000))
    with pytest.raises(flight.FlightServerError, match="lie outside"):
        writer.close()
    wait_until(lambda: not any(isinstance(t, threading.Timer) for t in threading.enumerate()))


def test_a_server_that_stays_away_is_an_error_after_retry_s(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA, retry_s=0.5)
    server.kill()
    writer.append(*steps(3))
    with pytest.raises((flight.FlightError, OSError), match=r"refused|connect|reset|closed"):
        writer.flush()
    with pytest.raises((flight.FlightError, OSError)):
        writer.append(*steps(3))
    with pytest.raises((flight.FlightError, OSError)):
        writer.close()
    server.start()


def test_a_writer_is_refused_at_once_and_an_absent_server_named(server: Server) -> None:
    with pytest.raises(flight.FlightServerError, match="expected rows of 40 bytes"):
        FlightWriter(server.address, OTHER)
    with pytest.raises((flight.FlightError, OSError), match="connect"):
        FlightWriter("grpc://127.0.0.1:1", SCHEMA, retry_s=0.3)
    with pytest.raises(
        ValueError, match=r"expected in_flight of at least 1 and message_rows of 1 to .*received 1 and 0"
    ):
        FlightWriter(server.address, SCHEMA, in_flight=1, message_rows=0)


def test_rows_that_do_not_fit_change_nothing(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA)
    lanes, rows = steps(3)
    with pytest.raises(SchemaError, match=r"rows have the layout .*the table expects"):
        writer.append(lanes, OTHER.zeros(3))
    for few in (lanes[:1], lanes[:2], lanes[:, None]):
        with pytest.raises(SchemaError, match="expected one lane for each row"):
            writer.append(few, rows)
    writer.append(lanes, rows)
    writer.close()
    check(server.messages(), 3)


# ------------------------------------------------------------------------- close


def test_close_ends_the_thread_and_the_writer(server: Server) -> None:
    writers = [FlightWriter(server.address, SCHEMA, name=f"writer-{k}") for k in range(3)]
    assert sum(t.name == f"writer to {server.address}" for t in threading.enumerate()) == 3
    for writer in writers:
        writer.append(*steps(5))
        writer.close()
        writer.close()
        with pytest.raises(ValueError, match="is closed"):
            writer.append(*steps(5))
        writer.flush()
    assert server.closed() == ["writer-0", "writer-1", "writer-2"]


def test_close_with_the_server_gone_is_no_error_when_all_is_stored(server: Server) -> None:
    writer = FlightWriter(server.address, SCHEMA)
    writer.append(*steps(5))
    writer.flush()
    server.kill()
    writer.close()
    server.start()
    check(server.messages(), 5)


def test_the_client_is_made_by_the_caller_again_for_every_connection(server: Server) -> None:
    addresses = []

    def connect(address: str) -> flight.FlightClient:
        addresses.append(address)
        return flight.FlightClient(address)

    writer = FlightWriter(server.address, SCHEMA, connect=connect)
    server.tell("faults", ["after"])
    writer.append(*steps(5))
    writer.close()
    assert addresses == [server.address] * 2
    check(server.messages(), 5)


# ------------------------------------------------------------------------- lanes


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_lanes_are_spread_over_writers_in_order(server: Server, count: int) -> None:
    rng = np.random.default_rng(count)
    writer = LaneWriter([FlightWriter(server.address, SCHEMA, name=f"shard-{k}") for k in range(count)])
    given_lanes, given_rows = [], []
    for k in range(20):
        size = int(rng.integers(0, 300))
        lanes, rows = rng.integers(0, 40, size).astype(np.int32), steps(size, 1000 * k)[1]
        given_lanes.append(lanes.copy())
        given_rows.append(rows.view("V40").copy())
        writer.append(lanes, rows)
        lanes[:], rows["policy_version"] = 77, -1
    writer.flush()
    for k in range(count):
        found = server.messages(f"shard-{k}")
        mine = [lanes % count == k for lanes in given_lanes]
        expected = [lanes[m].tolist() for lanes, m in zip(given_lanes, mine, strict=True)]
        assert np.concatenate([m.lanes for m in found]).tolist() == np.concatenate(expected).tolist()
        # Opaque rows above: numpy leaves padding out when it copies structured ones.
        kept = b"".join(rows[m].tobytes() for rows, m in zip(given_rows, mine, strict=True))
        assert b"".join(m.rows.tobytes() for m in found) == kept
    assert writer.waiting_for is None
    writer.close()
    assert len(server.closed()) == count


def test_all_writers_are_closed_though_one_has_failed(server: Server) -> None:
    parts = [FlightWriter(server.address, SCHEMA, name=f"shard-{k}") for k in range(2)]
    writer = LaneWriter(parts)
    server.tell("faults", ["refuse"])
    writer.append(np.zeros(3, np.int32), steps(3)[1])
    with pytest.raises(flight.FlightServerError, match="lie outside"):
        parts[0].flush()
    writer.append(np.ones(3, np.int32), steps(3)[1])
    with pytest.raises(flight.FlightServerError, match="lie outside"):
        writer.close()
    assert server.closed() == ["shard-1"]


def test_an_actor_that_writes_imports_neither_numba_nor_torch() -> None:
    code = "import sys, replay.writers; print(sorted({'numba', 'torch', 'ray', 'replay.shard'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
