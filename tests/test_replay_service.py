"""Shards behind real Arrow Flight, most of them in processes of their own."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from replay import kernels
from replay.files import StorageFile, leftovers, map_for_reading
from replay.layout import TableSpec
from replay.priorities import PriorityWriter
from replay.process import ShardProcess
from replay.queue_spec import QueueSpec
from replay.rate_limit import RateLimit
from replay.samplers import Sampler, stream_sampler
from replay.schema import Field, SchemaError, StepSchema, Window, WindowBatch
from replay.security import Security, grpc_channel, new_token
from replay.server import ShardServer
from replay.shard import ShardSpec
from replay.storage import StorageError
from replay.streams import StreamSource, Transport
from replay.wire import SEQUENCE
from replay.writers import FlightWriter

from .shards_for_tests import (
    FRAMES,
    FREE,
    SCHEMA,
    SECURITY,
    addresses,
    check_whole,
    checked,
    connect,
    number_of,
    shards,
    spec_of,
    wait_until,
    write,
    writer_to,
)

OTHER = StepSchema({"observation": Field("observation", "float32", (5,))}, Field("action", "float32", (2,)))
TRANSPORTS: tuple[Transport, ...] = ("flight", "local")
LIST = TableSpec("list", "fifo")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@contextmanager
def served(directory: Path, **changes: object) -> Iterator[ShardServer]:
    """A shard in this process, whose insides the test looks at."""
    server = ShardServer(spec_of(directory, **changes), SECURITY)
    try:
        yield server
    finally:
        server.close()


def pace(min_size: int, error_buffer: float) -> tuple[RateLimit]:
    """The limit of one table with one sample per insert."""
    return (RateLimit.from_samples_per_insert(1.0, min_size=min_size, error_buffer=error_buffer),)


def table_of(server: ShardServer | ShardProcess, name: str = "steps") -> dict[str, Any]:
    found: dict[str, Any] = server.stats()["tables"][name]
    return found


def sampler_of(*addresses: str, schema: StepSchema = SCHEMA, **settings: Any) -> Sampler:
    values = {"batch_size": 16, "seed": 0, "security": SECURITY, "prefetch": 2, **settings}
    return stream_sampler(addresses, schema, **values)


def source_of(address: str, **settings: Any) -> StreamSource:
    values = {"window": Window(), "security": SECURITY, "least": 4, "block": 4, "ahead": 12, **settings}
    return StreamSource(address, SCHEMA, **values)


def take(source: StreamSource, count: int, timeout_s: float) -> WindowBatch | None:
    sampler = Sampler([source], SCHEMA, window=Window(), batch_size=count, seed=0)
    out = sampler.buffers()
    return out if source.take(count, out, 0, timeout_s) else None


def all_numbers(server: ShardServer | ShardProcess, table: TableSpec = LIST) -> list[int]:
    """The numbers of all items of a table, in order."""
    count = int(table_of(server, table.name)["items"])
    sampler = sampler_of(server.address, batch_size=count, table=table, prefetch=1)
    found = number_of(sampler.sample(10.0))
    sampler.close()
    return sorted(found.tolist())


class Link:
    """A TCP connection in the middle, to cut."""

    def __init__(self, address: str) -> None:
        self._target = int(address.rsplit(":", 1)[1])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"grpc://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[socket.socket] = []
        self.drop_replies = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [near, far]
            threading.Thread(target=self._carry, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        try:
            while data := source.recv(65_536):
                if not (replies and self.drop_replies):
                    sink.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        """End every connection; new ones are let through."""
        pairs, self._pairs = self._pairs, []
        for end_ in pairs:
            with socket.socket(fileno=end_.detach()) as closing:
                closing.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # close alone would leave the blocked accept one more connection
        self._listener.close()
        self.cut()


def wire(rows: np.ndarray, lane: int = 0) -> pa.RecordBatch:
    columns = [
        pa.array(np.full(len(rows), lane, np.int32)),
        pa.array([r.tobytes() for r in rows], SCHEMA.arrow().field(1).type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA.arrow())


def by_hand(client: flight.FlightClient) -> tuple[Any, Any]:
    """A DoPut stream of the writer `by-hand`, opened."""
    descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": "by-hand"}).encode())
    put, replies = client.do_put(descriptor, SCHEMA.arrow())
    return put, replies


# ------------------------------------------------------------------------ data


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_come_back_bit_for_bit(memory: Path, transport: Transport) -> None:
    with ShardProcess(spec_of(memory), SECURITY) as shard:
        writer = writer_to(shard.address)
        rng = np.random.default_rng(0)
        written = {}
        for lane in range(3):
            rows = SCHEMA.zeros(100)
            for f in SCHEMA.fields:
                values = rows[f.name]
                values[:] = np.frombuffer(rng.bytes(values.nbytes), f.dtype).reshape(values.shape)  # NaNs too
            rows["policy_version"] = np.arange(100) + 1000 * lane
            rows["is_first"] = rows["is_last"] = rows["is_terminal"] = False
            rows["is_last"][49::50] = True
            for k in range(0, 100, 20):
                buffer, lanes = rows[k : k + 20].copy(), np.full(20, lane, np.int32)
                writer.append(lanes, buffer)
                buffer["policy_version"], lanes[:] = -1, 77  # ours again as soon as append returns
            for row in rows:
                written[int(row["policy_version"])] = [row[f.name].tobytes() for f in SCHEMA.fields]
        writer.flush()
        sampler = sampler_of(shard.address, batch_size=64, window=Window(length=3), transport=transport)
        seen: set[int] = set()
        while len(seen) < 3 * 98:
            batch = sampler.sample(5.0)
            assert batch.steps.dtype == SCHEMA.dtype
            for window, length in zip(batch.steps, batch.length, strict=True):
                start = int(window[0]["policy_version"])
                seen.add(start)
                for k in range(length + 1):
                    assert [window[k][f.name].tobytes() for f in SCHEMA.fields] == written[start + k]
            assert np.all(batch.probability == 1 / (3 * 98))
            assert batch.size == 3 * 98
        assert table_of(shard)["inserted"] == 3 * 98
        sampler.close()
        writer.close()
        assert shard.stats()["writers"] == 0


WINDOWS = (
    Window(),
    Window(length=5),
    Window(length=5, observations="ends"),
    Window(length=3, burn_in=4),
    Window(stack=4),
    Window(length=4, stack=3, observations="ends"),
    Window(length=2, burn_in=2, stack=2, stack_on_device=True),
)


def delivered(batch: WindowBatch, window: Window) -> dict[str, np.ndarray]:
    """All that a batch holds, frames stacked."""
    found = {name: batch.steps[name] for name in batch.steps.dtype.names or ()}
    if batch.ends is not None:
        found |= {f"ends/{name}": batch.ends[name] for name in batch.ends.dtype.names or ()}
    if batch.burn_in is not None:
        found["burn_in"] = batch.burn_in
    for name, frames in batch.frames.items():
        if batch.frame_index is not None:
            assert batch.frame_index.max() < batch.frame_count <= len(frames)
            frames = frames[batch.frame_index]
        assert frames.shape[:3] == (len(batch), window.observed, window.stack)
        found[name] = frames
    return {**found, "length": batch.length, "item": batch.item, "probability": batch.probability}


def test_windows_are_the_same_through_both_transports_and_right(memory: Path) -> None:
    """Also of several tables over one storage, each with a stride of its own."""
    tables = (LIST, TableSpec("sequences", "fifo", stride=3))
    spec = spec_of(
        memory, schema=FRAMES.to_json(), tables=tables, limits=(FREE, FREE), capacity=800, segment_steps=20, stack=4
    )
    episode, size = 17, 32
    with ShardProcess(spec, SECURITY) as shard:
        writer = writer_to(shard.address, FRAMES)
        for lane in range(3):  # more than is kept: the storage has wrapped around
            for k in range(0, 510, 30):  # 30 episodes
                write(writer, checked(FRAMES, 1700 * lane + k, 30, episode=episode), lane=lane)
        for table in tables:
            for window in WINDOWS:
                found = []
                for transport in TRANSPORTS:
                    sampler = sampler_of(
                        shard.address, schema=FRAMES, batch_size=size, window=window, table=table, transport=transport
                    )
                    batch = sampler.sample(10.0, sampler.buffers())
                    batch = sampler.sample(10.0)  # the oldest items again
                    check_whole(batch, window, episode=episode, settled=True)
                    check_frames(batch, window, episode)
                    found.append(delivered(batch, window))
                    assert sampler._sources[0].transport == transport  # type: ignore[attr-defined]
                    sampler.close()
                assert found[0].keys() == found[1].keys()
                for name in found[0]:
                    assert (found[0][name] == found[1][name]).all(), (table.name, window, name)
                assert len(np.unique(found[0]["item"])) == size
                if table.stride == 3:
                    assert ((found[0]["action"][:, window.burn_in, 0] % episode) % 3 == 0).all()
        writer.close()


def check_frames(batch: WindowBatch, window: Window, episode: int) -> None:
    """Every frame of every stack is its step's; before an episode's begin the first one again."""
    number = batch.steps["action"][..., 0]
    if window.observations == "ends":
        assert batch.ends is not None
        number = batch.ends["action"][..., 0]
        assert (number[:, 0] == batch.steps["action"][:, window.burn_in, 0]).all()
        assert (number[:, 1] == number[:, 0] + batch.length).all()
        assert (batch.ends["observation/state"] == (number % 251)[..., None] + np.arange(2)).all()
    else:
        assert (batch.steps["observation/state"] == (number % 251)[..., None] + np.arange(2)).all()
    back = np.arange(window.stack - 1, -1, -1)
    stacked = np.maximum(number[..., None] - back, (number - number % episode)[..., None])
    frames = batch.frames["observation/frame"]
    frames = frames[batch.frame_index] if batch.frame_index is not None else frames
    expected = (stacked % 251)[..., None] + np.arange(64 * 64) % 5
    assert (frames.reshape(expected.shape) == expected.astype(np.uint8)).all()


def test_a_batch_comes_in_the_callers_buffers_again_and_again(memory: Path) -> None:
    with ShardProcess(spec_of(memory, tables=(LIST,)), SECURITY) as shard:
        writer = writer_to(shard.address)
        write(writer, checked(SCHEMA, 0, 33))
        for transport in TRANSPORTS:
            sampler = sampler_of(shard.address, table=LIST, transport=transport, window=Window(length=2))
            out = sampler.buffers()
            places = [array.ctypes.data for array in (out.steps, out.length, out.item, out.shard, out.probability)]
            for _ in range(5):
                out.steps["action"], out.item[:], out.length[:] = -1, -1, -1
                out.shard[:], out.probability[:] = -1, -1.0
                batch = sampler.sample(5.0, out)
                assert batch is out
                assert number_of(out).tolist() == list(range(16))
                assert (out.item >= 0).all()
                assert (out.length == 2).all()
                assert (out.shard == 0).all()
                assert (out.probability > 0).all()
                assert places == [a.ctypes.data for a in (out.steps, out.length, out.item, out.shard, out.probability)]
            kept = sampler.sample(5.0)  # arrays of its own
            kept_numbers = number_of(kept)
            sampler.sample(5.0)
            assert kept is not out
            assert (number_of(kept) == kept_numbers).all()
            sampler.close()
        writer.close()


OVERWRITE = """
import sys
import numpy as np
from replay.security import Security, flight_client
from replay.writers import FlightWriter
from tests.shards_for_tests import SCHEMA, checked
security = Security(sys.stdin.readline().strip())
writer = FlightWriter(sys.argv[1], SCHEMA, connect=lambda address: flight_client(address, security))
rows = [checked(SCHEMA, 25 * k, 25, episode=50) for k in range(400)]  # which come again and again
k = 0
print("writing", flush=True)
while True:
    writer.append(np.full(25, int(sys.argv[2]), np.int32), rows[k % 400])
    k += 1
"""


@contextmanager
def overwriting(address: str, lane: int) -> Iterator[None]:
    """A process that writes as fast as it can."""
    child = subprocess.Popen(
        [sys.executable, "-c", OVERWRITE, address, str(lane)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(SECURITY.token + "\n")
        child.stdin.flush()
        assert child.stdout.readline() == "writing\n"
        yield
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


@pytest.mark.parametrize(("prefetch", "capacity", "segment_steps"), [(2, 120, 3), (32, 600, 50)])
def test_no_window_read_without_a_lock_is_torn_by_a_fast_writer(
    memory: Path, prefetch: int, capacity: int, segment_steps: int
) -> None:
    """The whole table is overwritten many times over: before what was drawn ahead is read, and while it is."""
    window = Window(length=4, burn_in=6)
    spec = spec_of(memory, run=f"torn{prefetch}", capacity=capacity, segment_steps=segment_steps)
    with ShardProcess(spec, SECURITY) as shard, overwriting(shard.address, 0):
        wait_until(lambda: table_of(shard)["deleted"] > 1000)
        sampler = sampler_of(shard.address, batch_size=64, window=window, transport="local", prefetch=prefetch)
        out = sampler.buffers()
        before = table_of(shard)["inserted"]
        last = np.full(capacity, -1, np.int64)
        for _ in range(60_000 // 64 + 1):
            batch = sampler.sample(10.0, out)
            check_whole(batch, window, episode=50)
            # An item's id tells its row, and how often that was overwritten: never less often than seen before.
            sequence, row = np.divmod(batch.item, capacity)
            assert (sequence >= last[row]).all()
            np.maximum.at(last, row, sequence)
        overwritten = (table_of(shard)["inserted"] - before) / capacity
        assert overwritten > 20, "the writer was too slow for the test to show anything"
        sampler.close()


@pytest.mark.slow
@pytest.mark.parametrize("segment_steps", [2, 7, 64])
def test_no_window_is_torn_in_a_million(memory: Path, segment_steps: int) -> None:
    window = Window(length=6, burn_in=3)
    spec = spec_of(memory, run=f"torn-{segment_steps}", capacity=8 * segment_steps, segment_steps=segment_steps)
    with ShardProcess(spec, SECURITY) as shard, overwriting(shard.address, 0), overwriting(shard.address, 1):
        wait_until(lambda: table_of(shard)["deleted"] > 1000)
        sampler = sampler_of(shard.address, batch_size=64, window=window, transport="local", prefetch=4)
        out = sampler.buffers()
        for _ in range(350_000 // 64):
            batch = sampler.sample(10.0, out)
            number = batch.steps["action"][..., 0]
            assert (batch.length > 0).all()
            check_whole(batch, window)
            assert (np.diff(number) >= 0).all()
        sampler.close()


def test_several_writers_and_samplers_of_several_tables_at_once(memory: Path) -> None:
    prioritised = TableSpec("prioritised", "prioritised")
    once = TableSpec("once", "fifo", max_times_sampled=1)
    tables = (TableSpec(), prioritised, once)
    limits = (FREE, FREE, RateLimit.queue(600))
    spec = spec_of(memory, run="crowd", tables=tables, limits=limits, capacity=20_000)
    each, writers, episode = 1500, 3, 30
    with ShardProcess(spec, SECURITY) as shard:
        stop = threading.Event()
        failed: list[BaseException] = []
        items = writers * each // episode * (episode - 1)
        given: list[np.ndarray] = []

        def run(work: Callable[[], None]) -> threading.Thread:
            def guarded() -> None:
                try:
                    work()
                except BaseException as error:
                    failed.append(error)
                    stop.set()

            thread = threading.Thread(target=guarded)
            thread.start()
            return thread

        def writes(index: int) -> None:
            writer = writer_to(shard.address, message_rows=30, retry_s=5.0)
            for k in range(0, each, 15):
                if stop.is_set():
                    return
                rows = checked(SCHEMA, 3000 * index + k, 15, episode=episode)
                writer.append(np.zeros(15, np.int32), rows)
            writer.close()

        def reads(table: TableSpec, transport: Transport) -> None:
            window = Window(length=3)
            sampler = sampler_of(shard.address, table=table, transport=transport, window=window)
            rng = np.random.default_rng(0)
            while not stop.is_set():
                batch = sampler.sample(10.0)
                check_whole(batch, window, episode=episode)
                if table is prioritised:
                    sampler.update_priorities(batch, rng.uniform(0.1, 2.0, 16))
            sampler.close()

        def consumes() -> None:
            sampler = sampler_of(shard.address, table=once, window=Window(length=3), batch_size=6)
            while sum(map(len, given)) < items and not stop.is_set():
                batch = sampler.sample(20.0)
                check_whole(batch, Window(length=3), episode=episode)
                given.append(number_of(batch))
            stop.set()
            sampler.close()

        readers = [(TableSpec(), "flight"), (TableSpec(), "local"), (prioritised, "flight"), (prioritised, "local")]
        threads = [run(lambda i=i: writes(i)) for i in range(writers)]  # type: ignore[misc]
        threads += [run(lambda t=t, w=w: reads(t, w)) for t, w in readers]  # type: ignore[misc]
        threads.append(run(consumes))
        for thread in threads:
            thread.join(60.0)
        assert not failed, failed
        # Each item of the queue was served once, though it was written and drawn from all sides meanwhile.
        served_once = np.concatenate(given)
        assert len(np.unique(served_once)) == len(served_once) == items
        for name in ("steps", "prioritised"):
            assert table_of(shard, name)["items"] == items
        assert table_of(shard, "once")["items"] == 0


# ------------------------------------------------------------------- refusals


def unchanged(server: ShardServer) -> dict[str, Any]:
    """What a shard counts."""
    found = server.stats()
    found["tables"] = {
        name: {key: value for key, value in table.items() if not key.startswith("time/")}
        for name, table in found["tables"].items()
    }
    return found


def test_another_schema_is_refused_to_writers_and_readers(memory: Path) -> None:
    with served(memory) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 3))
        before = unchanged(server)
        with pytest.raises(flight.FlightServerError, match=r"expected(.|\n)*32(.|\n)*received(.|\n)*40"):
            writer_to(server.address, OTHER)
        with pytest.raises(SchemaError, match=r"rows have the layout .*the table expects"):
            writer.append(np.zeros(1, np.int32), OTHER.zeros(1))
        for count in (1, 2):
            sampler = sampler_of(*[server.address] * count, schema=OTHER)
            with pytest.raises(SchemaError, match=r"expected .*\[5\].*received .*int64\[2\]"):
                sampler.sample(5.0)
            sampler.close()
        sampler = sampler_of(server.address, window=Window(stack=2))
        with pytest.raises(SchemaError, match="expected a field of frames"):
            sampler.sample(5.0)
        sampler.close()
        assert unchanged(server) == before
        write(writer, checked(SCHEMA, 3, 1))
        assert table_of(server)["items"] == 3
        writer.close()


def test_refused_rows_are_named_to_the_writer_and_not_sent_for_ever(memory: Path) -> None:
    with served(memory) as server:
        writer = writer_to(server.address)
        writer.append(np.array([70_000], np.int32), checked(SCHEMA, 0, 1))
        with pytest.raises(flight.FlightServerError, match="expected lane numbers from 0 to 65535, received 70000"):
            writer.flush()
        assert table_of(server)["inserted"] == 0


GOOD_TICKET = {
    "stream": "s",
    "table": "steps",
    "window": {"length": 2},
    "gather": "shard",
    "least": 2,
    "block": 4,
    "ahead": 8,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"least": 0}, r"expected least to be .*received 0"),
        ({"block": 1}, r"expected least ≤ block ≤ ahead, received .*'block': 1"),
        ({"ahead": 3}, r"expected least ≤ block ≤ ahead"),
        ({"table": "stepz"}, r"expected a table of shard 0, which has steps; received 'stepz'"),
        ({"gather": "nobody"}, r"expected gather to be .*shard.*reader.*received .*nobody"),
        ({"window": {"length": 0}}, r"expected length to be .*received 0"),
        ({"window": {"stack": 4}}, r"expected a field of frames"),
        ({"window": {"size": 4}}, r"the window of DoGet: expected .*length.*received .*size"),
        ({"more": 1}, r"the ticket of DoGet: expected .*stream.*received .*more"),
        (None, r"the ticket of DoGet: expected a JSON object, received"),
    ],
)
def test_a_ticket_that_does_not_fit_is_refused(
    service: ShardServer, change: dict[str, object] | None, said: str
) -> None:
    before = unchanged(service)
    text = "no ticket" if change is None else json.dumps({**GOOD_TICKET, **change})
    with connect(service.address) as client, pytest.raises(flight.FlightServerError, match=said):
        client.do_get(flight.Ticket(text.encode())).read_chunk()
    assert unchanged(service) == before


@pytest.fixture(scope="module")
def service(memory: Path) -> Iterator[ShardServer]:
    with served(memory, run="refusals") as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 20))
        yield server
        writer.close()


def test_a_stream_has_a_name_of_its_own_and_acknowledges_what_it_was_sent(service: ShardServer) -> None:
    with connect(service.address) as client:
        stream = client.do_get(flight.Ticket(json.dumps(GOOD_TICKET).encode()))
        while not stream.read_chunk().data.num_rows:
            pass
        with pytest.raises(flight.FlightServerError, match="expected a stream id of its own, received 's'"):
            client.do_get(flight.Ticket(json.dumps(GOOD_TICKET).encode())).read_chunk()
        wait_until(lambda: table_of(service)["sampled"] == 8)
        for count in (9, -9):
            said = "expected at most [48] windows"  # drawn are 8; the second half of them may not have been sent yet
            descriptor = flight.FlightDescriptor.for_command(json.dumps({"acknowledge": "s"}).encode())
            put, _ = client.do_put(descriptor, pa.schema([]))
            put.write_metadata(SEQUENCE.pack(count))
            with pytest.raises(flight.FlightServerError, match=said):
                put.close()
        assert table_of(service)["sampled"] == 8
        stream.cancel()
        wait_until(lambda: table_of(service)["sampled"] == 0)


def test_unknown_actions_streams_and_tables_are_refused(service: ShardServer) -> None:
    before = unchanged(service)
    with connect(service.address) as client:
        with pytest.raises(flight.FlightServerError, match=r"expected one of the actions describe.*received 'erase'"):
            list(client.do_action(flight.Action("erase", b"{}")))
        for command, said in (
            ({"eraser": "x"}, "the descriptor of DoPut: expected writer .*received .*eraser"),
            (
                {"writer": "x", "priorities": "steps"},
                "expected one of writer, priorities, acknowledge, receive; received",
            ),
            ({"priorities": "none"}, "expected a table of shard 0, which has steps; received 'none'"),
        ):
            descriptor = flight.FlightDescriptor.for_command(json.dumps(command).encode())
            schema = pa.schema([("item", pa.int64()), ("priority", pa.float64())])
            put, _ = client.do_put(descriptor, schema)
            with pytest.raises(flight.FlightServerError, match=said):
                put.close()
    for count in (1, 2):
        sampler = sampler_of(*[service.address] * count, table=TableSpec("none"))
        with pytest.raises(flight.FlightServerError, match="received 'none'"):
            sampler.sample(5.0)
        sampler.close()
    assert unchanged(service) == before


def test_priorities_that_are_none_are_refused_and_change_nothing(memory: Path) -> None:
    table = TableSpec("prioritised", "prioritised", priority_exponent=1.0)
    with served(memory, run="priorities", tables=(table,)) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 21))
        for count in (1, 2):  # also with the same shard twice, as several
            sampler = sampler_of(*[server.address] * count, table=table)
            batch = sampler.sample(5.0)
            for wrong in (np.nan, np.inf, -1.0):
                priorities = np.ones(16)
                priorities[5] = wrong
                with pytest.raises(SchemaError, match=r"finite and ≥ 0, received (nan|inf|-1.0) at place 5"):
                    sampler.update_priorities(batch, priorities)
            for shape in ((15,), (17,), (16, 1), ()):
                with pytest.raises(SchemaError, match="expected a priority for each of the 16 items"):
                    sampler.update_priorities(batch, np.ones(shape))
            sampler.close()
        assert table_of(server, "prioritised")["mass"] == 20.0
        sampler = sampler_of(server.address, table=table)
        batch = sampler.sample(5.0)
        gone = replace(batch, item=np.array([2**40 + k for k in range(16)]))
        sampler.update_priorities(gone, np.full(16, 50.0))
        wait_until(lambda: table_of(server, "prioritised")["evicted_updates"] == 16)
        assert table_of(server, "prioritised")["mass"] == 20.0
        sampler.update_priorities(batch, np.full(16, 3.0))
        distinct = len(np.unique(batch.item))
        wait_until(lambda: table_of(server, "prioritised")["mass"] == 20.0 + 2.0 * distinct)
        sampler.close()
        writer.close()


def test_without_the_token_nothing_is_served(memory: Path) -> None:
    stranger = Security(new_token())
    with served(memory, run="token") as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 5))
        before = unchanged(server)
        for count in (1, 2):
            sampler = sampler_of(*[server.address] * count, security=stranger)
            with pytest.raises(flight.FlightUnauthenticatedError):
                sampler.sample(5.0)
            sampler.close()
        with pytest.raises(flight.FlightUnauthenticatedError):
            FlightWriter(server.address, SCHEMA)
        assert unchanged(server) == before
        for security, expected in ((SECURITY, None), (stranger, grpc.StatusCode.UNAUTHENTICATED)):
            with grpc_channel(server.health_address, security) as channel:
                code = None
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0)
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.RpcError as error:
                    code = error.code()
            assert code == expected
        writer.close()


# ------------------------------------------------------------------ transports


def test_local_transport_is_taken_where_it_can_be_and_refused_clearly_where_not(memory: Path) -> None:
    once, few = TableSpec("once", "fifo", max_times_sampled=1), TableSpec("few", max_size=5)
    tables = (TableSpec(), once, few)

    def transport_of(address: str, wanted: Transport, table: TableSpec) -> str | None:
        sampler = sampler_of(address, batch_size=4, table=table, transport=wanted)
        try:
            check_whole(sampler.sample(5.0), Window())
            return sampler._sources[0].transport  # type: ignore[attr-defined, no-any-return]
        finally:
            sampler.close()

    with ShardProcess(spec_of(memory, run="transports", tables=tables), SECURITY) as shard:
        writer = writer_to(shard.address)
        write(writer, checked(SCHEMA, 0, 40))
        assert transport_of(shard.address, "auto", TableSpec()) == "local"
        assert transport_of(shard.address, "local", TableSpec()) == "local"
        assert transport_of(shard.address, "flight", TableSpec()) == "flight"
        for table in (once, few):
            assert transport_of(shard.address, "auto", table) == "flight"
            with pytest.raises(SchemaError, match=f"cannot be read with transport local: items of table {table.name}"):
                transport_of(shard.address, "local", table)
        # Another host has no such file; or one of another run, left behind.
        (path,) = memory.glob("millrace.transports.*")
        path.rename(memory / "elsewhere")
        assert transport_of(shard.address, "auto", TableSpec()) == "flight"
        with pytest.raises(SchemaError, match=r"local: its storage .*is not on this host; use auto or flight"):
            transport_of(shard.address, "local", TableSpec())
        path.write_bytes(bytes(1000))
        assert transport_of(shard.address, "auto", TableSpec()) == "flight"
        path.unlink()
        with ShardProcess(spec_of(memory, run="transports", tables=tables), SECURITY):
            assert transport_of(shard.address, "auto", TableSpec()) == "flight"
        (memory / "elsewhere").rename(path)
        assert transport_of(shard.address, "auto", TableSpec()) == "local"
        writer.close()


# ----------------------------------------------------------------- exactly once


def test_a_sequence_number_sent_twice_is_applied_once(memory: Path) -> None:
    with served(memory) as server, connect(server.address) as client:
        for expected_last in (-1, 7):
            put, replies = by_hand(client)
            assert SEQUENCE.unpack(replies.read()) == (expected_last,)
            put.write_with_metadata(wire(checked(SCHEMA, 0, 5)), SEQUENCE.pack(7))
            assert SEQUENCE.unpack(replies.read()) == (7,)
            put.close()
        assert table_of(server)["inserted"] == 4
        assert server.stats()["duplicates"] == 1


def test_lost_connections_neither_lose_nor_double_a_step(memory: Path) -> None:
    with served(memory, tables=(TableSpec(), LIST)) as server:
        link = Link(server.address)
        writer = writer_to(link.address, in_flight=8, message_rows=10, retry_s=10.0)
        for k in range(60):
            # Replies are lost before some of the cuts: what was applied is then sent again.
            if k % 20 == 17:
                writer.flush()
                link.drop_replies = True
            lanes, rows = np.zeros(10, np.int32), checked(SCHEMA, 10 * k, 10)
            writer.append(lanes, rows)
            lanes[:], rows["action"] = 77, -1  # ours again: what is sent again is the writer's own copy
            if k % 20 == 19:
                wait_until(lambda k=k: table_of(server)["items"] >= 10 * k - 71)  # type: ignore[misc]
                link.drop_replies = False
                link.cut()
        writer.flush()
        assert all_numbers(server) == list(range(599))
        writer.close()
        link.close()
        wait_until(lambda: server.stats()["writers"] == 0)
        assert server.stats()["leases_ended"] == 0


def test_two_streams_of_one_writer_apply_a_batch_once(memory: Path) -> None:
    """One hangs in the limiter with a batch when its writer comes back and sends that batch again: both are let in at once."""
    with served(memory, limits=pace(10, 10.0)) as server, connect(server.address) as client:
        streams = [by_hand(client) for _ in range(2)]
        for _, replies in streams:
            assert SEQUENCE.unpack(replies.read()) == (-1,)
        streams[0][0].write_with_metadata(wire(checked(SCHEMA, 0, 20)), SEQUENCE.pack(0))
        assert SEQUENCE.unpack(streams[0][1].read()) == (0,)
        waited = table_of(server)["time/waiting_for_samples_s"]
        for put, _ in streams:
            put.write_with_metadata(wire(checked(SCHEMA, 20, 5)), SEQUENCE.pack(1))
        wait_until(lambda: table_of(server)["time/waiting_for_samples_s"] > waited + 0.5)
        sampler = sampler_of(server.address, batch_size=10, prefetch=1)
        sampler.sample(5.0)
        for put, replies in streams:
            assert SEQUENCE.unpack(replies.read()) == (1,)
            put.close()
        sampler.close()
        found = table_of(server)
        assert (found["inserted"], server.stats()["duplicates"], found["limiter"]["inserted"]) == (24, 1, 25)


# ------------------------------------------------------------------------- pace


def test_inserting_waits_for_sampling_and_says_so(memory: Path) -> None:
    with served(memory, limits=pace(10, 20.0)) as server:
        writer = writer_to(server.address, in_flight=2, message_rows=10)
        assert writer.waiting_for is None

        def fill() -> None:
            for k in range(10):
                writer.append(np.zeros(10, np.int32), checked(SCHEMA, 10 * k, 10))
            writer.flush()

        thread = threading.Thread(target=fill)
        thread.start()
        wait_until(lambda: bool(server.stats()["waiting"]))
        (why,) = server.stats()["waiting"]
        assert why.startswith(
            "writer of table steps for 1 s: waiting for the learner to sample: 0 samples drawn, too few"
        )
        assert "replay.error_buffer" in why
        assert writer.waiting_for is not None
        assert writer.waiting_for.startswith(f"replay at {server.address} for ")
        assert table_of(server)["limiter"]["inserted"] == 30  # min_size + error_buffer
        assert table_of(server)["time/waiting_for_samples_s"] > 0.9
        sampler = sampler_of(server.address, batch_size=10, prefetch=1)
        while thread.is_alive():
            sampler.sample(5.0)
            thread.join(timeout=0.01)
        assert writer.waiting_for is None
        assert table_of(server)["items"] == 99
        sampler.close()
        writer.close()


def test_sampling_waits_for_inserting_and_says_so(memory: Path) -> None:
    with served(memory, limits=pace(50, 20.0)) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 31))
        sampler = sampler_of(server.address, batch_size=10, prefetch=1)
        with pytest.raises(TimeoutError, match=r"shard 0 gave no windows within 1\.5 s"):
            sampler.sample(1.5)
        (why,) = server.stats()["waiting"]
        assert why.startswith(
            "sampler of table steps for 1 s: waiting for actors to insert: the table holds 31 of the 50"
        )
        assert "replay.min_size" in why
        times = {name[5:-2]: s for name, s in table_of(server).items() if name.startswith("time/")}
        assert times.keys() == {"inserting", "sampling", "waiting_for_inserts", "waiting_for_samples", "wall"}
        assert times["waiting_for_inserts"] > 0.9
        assert times["waiting_for_samples"] == 0.0
        assert times["sampling"] == 0.0
        write(writer, checked(SCHEMA, 31, 20))
        sampler.sample(5.0)
        wait_until(lambda: not server.stats()["waiting"])
        assert table_of(server)["time/sampling_s"] > 0.0
        assert table_of(server)["time/inserting_s"] > 0.0
        sampler.close()
        writer.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_more_is_drawn_than_was_asked_for_ahead_and_what_is_unused_goes_back(
    memory: Path, transport: Transport
) -> None:
    with ShardProcess(spec_of(memory, run=f"ahead-{transport}", capacity=65_536), SECURITY) as shard:
        writer = writer_to(shard.address)
        write(writer, checked(SCHEMA, 0, 5000))
        size, prefetch = 2048, 4
        sampler = sampler_of(
            shard.address, batch_size=size, window=Window(length=5), prefetch=prefetch, transport=transport
        )
        wait_until(lambda: table_of(shard)["sampled"] == prefetch * size)
        before = psutil.Process(shard.pid).memory_info().rss
        threading.Event().wait(1.2)
        assert table_of(shard)["sampled"] == prefetch * size
        # One batch is 0.6 MB: a stream without bounds would have sent gigabytes.
        assert psutil.Process(shard.pid).memory_info().rss - before < 4e6
        for used in range(1, 8):
            sampler.sample(5.0)
            assert table_of(shard)["sampled"] <= (used + prefetch) * size
            wait_until(lambda used=used: table_of(shard)["sampled"] == (used + prefetch) * size)  # type: ignore[misc]
        sampler.close()
        wait_until(lambda: table_of(shard)["limiter"]["sampled"] == 7 * size)
        assert table_of(shard)["sampled"] == 7 * size
        writer.close()


def test_a_reader_that_vanishes_gives_back_what_it_did_not_acknowledge(memory: Path) -> None:
    """Without a close, from the middle of a wait for the limiter: the stream's generator still ends."""
    with served(memory, limits=pace(10, 40.0)) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 30))
        link = Link(server.address)
        source = source_of(link.address, least=8, block=8, ahead=800)
        wait_until(lambda: table_of(server)["sampled"] == 56)  # (30 − 10) + 40, in whole blocks
        gc.disable()
        try:
            link.close()
            wait_until(lambda: table_of(server)["sampled"] == 0)
        finally:
            gc.enable()
        assert table_of(server)["limiter"]["sampled"] == 0
        source.close()
        writer.close()


def test_a_take_that_times_out_loses_no_window(memory: Path) -> None:
    with served(memory, limits=pace(10, 20.0)) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 20))
        source = source_of(server.address)
        for _ in range(5):
            assert take(source, 40, 0.05) is None
        for _ in range(7):
            assert take(source, 4, 5.0) is not None
        assert take(source, 4, 0.2) is None  # (20 − 10) + 20 = 30 samples: 7 blocks of 4
        assert table_of(server)["sampled"] == 28
        source.close()
        wait_until(lambda: table_of(server)["limiter"]["sampled"] == 28)
        writer.close()


def test_draws_of_a_table_whose_items_are_used_up_are_not_given_back(memory: Path) -> None:
    """Their items are gone: given back, they would hold up writers for samples that cannot come."""
    once = TableSpec("once", "fifo", max_times_sampled=1)
    with served(memory, run="once", tables=(once,), limits=(RateLimit.queue(20),)) as server:
        writer = writer_to(server.address, message_rows=10)
        for k in range(10):
            write(writer, checked(SCHEMA, 10 * k, 10, episode=10))
            sampler = sampler_of(server.address, batch_size=3, prefetch=4, table=once)
            assert len(np.unique(number_of(sampler.sample(5.0)))) == 3
            wait_until(lambda: table_of(server, "once")["items"] == 0)
            sampler.close()
        assert table_of(server, "once")["inserted"] == 90
        writer.close()


def test_a_table_without_mass_is_waited_for(memory: Path) -> None:
    """And does not keep its shard busy: each turn of a stream's wait lasts its half second."""
    table = TableSpec("prioritised", "prioritised", priority_exponent=1.0)
    with served(memory, run="massless", tables=(table, LIST)) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 21))
        items = sampler_of(server.address, batch_size=20, table=LIST, prefetch=1)
        batch = items.sample(5.0)
        items.close()
        sampler = sampler_of(server.address, table=table, prefetch=1)
        sampler.update_priorities(batch, np.zeros(20))
        wait_until(lambda: table_of(server, "prioritised")["mass"] == 0.0)
        waited = False
        for _ in range(4):  # some were drawn before
            try:
                sampler.sample(0.5)
            except TimeoutError:
                waited = True
        assert waited
        with connect(server.address) as client:
            ticket = {**GOOD_TICKET, "stream": "massless", "table": "prioritised"}
            stream = client.do_get(flight.Ticket(json.dumps(ticket).encode()))
            began = time.monotonic()
            blocks = [stream.read_chunk().data.num_rows for _ in range(3)]
            assert blocks == [0, 0, 0]
            assert time.monotonic() - began > 0.9
            stream.cancel()
        sampler.update_priorities(replace(batch, item=batch.item[:1]), np.ones(1))
        assert (number_of(sampler.sample(5.0)) == 0).all()
        sampler.close()
        writer.close()


# --------------------------------------------------------------- several shards


def test_two_shards_are_drawn_in_proportion_and_share_one_limiter(memory: Path) -> None:
    with shards(spec_of(memory, run="two", limits=pace(1000, 500.0)), 2) as (first, second):
        writers = [writer_to(shard.address, in_flight=1, message_rows=30) for shard in (first, second)]
        sampler = sampler_of(first.address, second.address, batch_size=64)
        with pytest.raises(TimeoutError, match="no shard has a window to give"):
            sampler.sample(0.05)
        for k in range(0, 1200, 40):  # three of four steps go to the first shard
            writers[0].append(np.arange(30, dtype=np.int32) % 6, checked(SCHEMA, k, 30))
            writers[1].append(np.arange(10, dtype=np.int32) % 2, checked(SCHEMA, 10_000 + k, 10))
        for writer in writers:
            writer.flush()
        masses = [table_of(shard)["items"] for shard in (first, second)]
        assert masses == [894, 298]
        wait_until(lambda: [source.mass for source in sampler._sources.values()] == masses)
        drawn = of_second = 0
        try:
            while drawn < 10_000:
                batch = sampler.sample(1.0)
                drawn += 64
                of_second += int((batch.shard == 1).sum())
                assert ((number_of(batch) >= 10_000) == (batch.shard == 1)).all()
        except TimeoutError:
            pass
        # 1200 inserted, 1000 of them the minimum: 200 + 500 samples are allowed, and a lease may lie unused.
        limiter = table_of(first)["limiter"]
        assert 1200 <= limiter["inserted"] <= 1200 + 64
        assert limiter["sampled"] <= limiter["inserted"] - 1000 + 500
        assert 200 <= drawn <= limiter["sampled"]
        assert abs(of_second - drawn / 4) < 5 * np.sqrt(drawn * 3 / 16)
        sampler.close()
        for writer in writers:
            writer.close()


def test_a_shards_mass_is_known_while_its_stream_is_not_read(memory: Path) -> None:
    """Else a shard that was nearly empty when its batches were drawn would stay nearly unread."""
    with served(memory) as server:
        writer = writer_to(server.address)
        write(writer, checked(SCHEMA, 0, 3))
        source = source_of(server.address)
        wait_until(lambda: source.mass == 2)
        write(writer, checked(SCHEMA, 3, 1000))
        wait_until(lambda: source.mass == 1002, timeout_s=5.0)
        source.close()
        writer.close()


def test_the_first_batch_waits_until_every_shard_has_told_its_mass(memory: Path) -> None:
    """Else it would come from whoever is connected first, and the others' items had no chance."""
    with shards(spec_of(memory, run="first"), 2) as running:
        for k, shard in enumerate(running):
            writer = writer_to(shard.address)
            write(writer, checked(SCHEMA, 1000 * k, 101))
            writer.close()
        for _ in range(10):
            sampler = sampler_of(*addresses(running), batch_size=200, prefetch=1)
            batch = sampler.sample(5.0)
            assert (batch.probability == 1 / 200).all()
            assert 40 < np.count_nonzero(batch.shard) < 160
            sampler.close()


def test_one_shard_may_give_every_window_of_a_batch(memory: Path) -> None:
    """Though its share of what is drawn ahead is only that of one of many shards."""
    with ShardProcess(spec_of(memory, run="alone"), SECURITY) as full:
        writer = writer_to(full.address)
        write(writer, checked(SCHEMA, 0, 101))
        with ShardProcess(spec_of(memory, run="alone", index=1), SECURITY) as empty:
            sampler = sampler_of(full.address, *[empty.address] * 7, batch_size=64, prefetch=1)
            for _ in range(50):
                assert (sampler.sample(5.0).shard == 0).all()
            sampler.close()
        writer.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_shard_killed_is_read_around_and_comes_back_with_every_step(memory: Path, transport: Transport) -> None:
    """On its port, with its file: the writer and the readers that it had go on."""
    tables = (TableSpec(), LIST, TableSpec("prioritised", "prioritised", priority_exponent=1.0))
    spec = spec_of(memory, run=f"back-{transport}", tables=tables)
    with shards(spec, 2) as (first, second):
        writers = [writer_to(shard.address, retry_s=30.0) for shard in (first, second)]
        for k, writer in enumerate(writers):
            write(writer, checked(SCHEMA, 10_000 * k, 51))
        sampler = sampler_of(first.address, second.address, transport=transport, batch_size=64)
        alone = sampler_of(second.address, transport=transport)
        prioritised = sampler_of(second.address, table=tables[2], transport=transport)
        batch = prioritised.sample(5.0)
        prioritised.update_priorities(batch, np.full(16, 3.0))
        mass = 50.0 + 2.0 * len(np.unique(batch.item))
        wait_until(lambda: table_of(second, "prioritised")["mass"] == mass)
        alone.sample(5.0)
        assert set(sampler.sample(5.0).shard.tolist()) == {0, 1}
        second.kill()
        # Batches come from the shard that lives; at most those drawn ahead hold windows of the other.
        batch = sampler.sample(10.0)
        wait_until(lambda: bool((sampler.sample(10.0).shard == 0).all()))
        batch = sampler.sample(10.0)
        assert batch.size == 50
        assert (batch.probability == 1 / 50).all()
        writers[1].append(np.zeros(20, np.int32), checked(SCHEMA, 10_051, 20))  # meanwhile
        again = replace(spec, index=1, port=second.port, limiter_address=first.address)
        with ShardProcess(again, SECURITY, recover=True) as third:
            assert third.stats()["recovered"]
            assert third.address == second.address
            writers[1].flush()
            write(writers[1], checked(SCHEMA, 10_071, 30))
            assert all_numbers(third) == list(range(10_000, 10_100))
            assert table_of(third, "prioritised")["mass"] == mass + 50 * 3.0  # new items: the highest priority so far
            wait_until(lambda: [source.mass for source in sampler._sources.values()] == [50, 100])
            for one in (alone, sampler, prioritised):
                seen: set[int] = set()
                while not {10_050, 10_099} <= seen:
                    batch = one.sample(10.0)
                    check_whole(batch, Window())
                    seen |= set(number_of(batch).tolist())
            prioritised.update_priorities(batch, np.full(16, 5.0))  # over a new stream
            wait_until(lambda: table_of(third, "prioritised")["mass"] > mass + 50 * 3.0)
            for one in (alone, sampler, prioritised):
                one.close()
            for writer in writers:
                writer.close()


def test_a_shard_that_comes_back_empty_is_written_and_read_again(memory: Path) -> None:
    first = ShardProcess(spec_of(memory, run="empty"), SECURITY)
    writer = writer_to(first.address, retry_s=20.0)
    write(writer, checked(SCHEMA, 0, 50))
    sampler = sampler_of(first.address, batch_size=8, prefetch=4)
    sampler.sample(5.0)
    first.kill()
    # What a killed shard leaves is found, and only that.
    (left,) = [file for file in leftovers(memory) if file.run == "empty"]
    assert (left.run, left.shard, left.size) == ("empty", 0, spec_of(memory, run="empty").layout.size)
    with ShardProcess(spec_of(memory, run="empty", port=first.port), SECURITY) as second:
        assert not second.stats()["recovered"]
        assert not [file for file in leftovers(memory) if file.run == "empty"]
        write(writer, checked(SCHEMA, 1000, 20))
        source = sampler._sources[0]
        wait_until(lambda: source.mass == 19)
        starts = np.concatenate([number_of(sampler.sample(5.0)) for _ in range(12)])
        assert (starts >= 1000).all()
        assert table_of(second)["sampled"] <= (12 + 4) * 8
        sampler.close()
        writer.close()


# ------------------------------------------------------------- life and death


WRITE_FOR_EVER = """
import sys, time
import numpy as np
from replay.security import Security, flight_client
from replay.writers import FlightWriter
from tests.shards_for_tests import SCHEMA, checked
security = Security(sys.stdin.readline().strip())
writer = FlightWriter(sys.argv[1], SCHEMA, connect=lambda address: flight_client(address, security))
writer.append(np.array([0, 0, 0, 4, 4], np.int32), checked(SCHEMA, 0, 5))
writer.flush()
print("written", flush=True)
time.sleep(60)
"""


def test_the_lanes_of_a_killed_writer_end_truncated_with_its_lease(memory: Path) -> None:
    with served(memory, run="lease", lease_s=0.3, tables=(LIST,)) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, server.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(SECURITY.token + "\n")
            child.stdin.flush()
            assert child.stdout.readline() == "written\n"
            threading.Event().wait(0.5)
            assert server.stats()["leases_ended"] == 0  # connected, however long it is silent
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        wait_until(lambda: server.stats()["leases_ended"] == 1)
        sampler = sampler_of(server.address, batch_size=3, window=Window(length=5), table=LIST)
        windows = sampler.sample(5.0)
        sampler.close()
        ends = windows.steps[np.arange(3), windows.length]
        assert number_of(windows).tolist() == [0, 1, 3]
        assert windows.length.tolist() == [2, 1, 1]
        assert ends["policy_version"].tolist() == [2, 2, 4]
        assert ends["is_last"].all()
        assert not ends["is_terminal"].any()
        assert not ends["reward"].any()
        # The two newest steps, which can never be drawn, are no inserts any more.
        assert table_of(server, "list")["limiter"]["inserted"] == 3


def test_a_shard_ends_at_once_though_writers_and_readers_are_connected(memory: Path) -> None:
    shard = ShardProcess(spec_of(memory, run="ends"), SECURITY)
    writer = writer_to(shard.address)
    writer.append(np.zeros(10, np.int32), checked(SCHEMA, 0, 10, episode=10))
    source = source_of(shard.address, window=Window(length=2))
    out = Sampler([source], SCHEMA, window=Window(length=2), batch_size=4, seed=0).buffers()
    assert source.take(4, out, 0, 5.0)
    shard.close()
    assert shard._child.returncode == 0
    assert not list(memory.glob("millrace.ends.*"))
    source.close()
    writer.close()


# ---------------------------------------------------------------- storage files


def test_too_little_space_is_said_at_the_start(memory: Path) -> None:
    with pytest.raises(OSError, match=r"MiB free and the replay shard needs \d+ MiB; lower replay\.capacity") as caught:
        StorageFile("/dev/shm", run="huge-test", shard=0, size=2**45)
    assert caught.value.errno == errno.ENOSPC
    assert not list(Path("/dev/shm").glob("*huge-test*"))
    with pytest.raises(OSError, match=r"cannot make a storage file in .*nowhere .*set replay\.directory"):
        StorageFile(memory / "nowhere", run="r", shard=0, size=1024)
    with pytest.raises(OSError, match=r"the replay shard needs \d+ MiB; lower replay\.capacity"):
        ShardServer(spec_of("/dev/shm", run="huge-test", capacity=2**38, segment_steps=2**30), SECURITY)
    assert not list(Path("/dev/shm").glob("*huge-test*"))


def test_a_storage_file_in_use_is_not_taken_over(memory: Path) -> None:
    file = StorageFile(memory, run="mine", shard=3, size=1024)
    file.array()[:] = 5
    for keep in (False, True):
        with pytest.raises(OSError, match="is in use by another process; give this run another name"):
            StorageFile(memory, run="mine", shard=3, size=1024, keep=keep)
    assert (file.array() == 5).all()
    assert file.path.exists()
    assert not [left for left in leftovers(memory) if left.run == "mine"]
    file.close()
    assert not file.path.exists()
    file.close()


def test_what_a_dead_process_left_is_taken_over_or_replaced_and_never_emptied_under_a_reader(memory: Path) -> None:
    def left(size: int = 8192) -> np.ndarray:
        """A file as a dead process leaves it, and a reader that has it mapped."""
        file = StorageFile(memory, run="dead", shard=0, size=size)
        file.array()[:] = 7
        file.close(remove=False)
        (found,) = [f for f in leftovers(memory) if f.run == "dead"]
        assert (found.path, found.shard, found.size) == (file.path, 0, size)
        return map_for_reading(file.path)

    reader = left()
    kept = StorageFile(memory, run="dead", shard=0, size=8192, keep=True)
    assert kept.found
    assert (kept.array() == 7).all()
    kept.array()[0] = 9
    assert reader[0] == 9
    kept.close()
    for size, keep in ((8192, False), (4096, True), (4096, False)):
        reader = left()
        fresh = StorageFile(memory, run="dead", shard=0, size=size, keep=keep)
        assert not fresh.found
        assert fresh.path.stat().st_size == size
        assert not fresh.array().any()
        fresh.array()[:] = 3
        assert (reader == 7).all()  # pages cut off would be a SIGBUS
        fresh.close()
        assert (reader == 7).all()
        with pytest.raises(ValueError, match="read-only"):
            reader[0] = 1
    assert not os.path.exists(fresh.path)


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_removed_while_it_was_waited_for_is_made_anew(
    memory: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Or two shards would hold one name, and a crash would lose the one whose file has none."""
    first = StorageFile(memory, run="race", shard=0, size=8192)
    first.array()[:] = 7
    flock = fcntl.flock

    def close_first(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            first.close()
        flock(fd, operation)

    monkeypatch.setattr("fcntl.flock", close_first)
    second = StorageFile(memory, run="race", shard=0, size=8192, keep=keep)
    assert not second.found
    second.array()[0] = 5
    assert map_for_reading(second.path)[0] == 5
    with pytest.raises(OSError, match="is in use"):
        StorageFile(memory, run="race", shard=0, size=8192, keep=keep)
    second.close()


def test_a_shard_killed_before_its_file_was_made_starts_afresh(memory: Path) -> None:
    spec = spec_of(memory, run="unmade")
    file = StorageFile(memory, run="unmade", shard=0, size=spec.layout.size)
    segments = spec.layout.carve(file.array())["segments"]
    segments[kernels.NEXT :] = -1  # as far as `SegmentStorage` had come
    file.close(remove=False)
    del segments
    server = ShardServer(spec, SECURITY, recover=True)
    assert not server.shard.recovered
    with closing(writer_to(server.address)) as writer:
        write(writer, checked(SCHEMA, 0, 5))
    server.close(remove=False)
    server = ShardServer(spec, SECURITY, recover=True)
    assert server.shard.recovered
    assert table_of(server)["items"] == 4
    path = Path(str(server.shard.path))
    server.close(remove=False)
    with path.open("r+b") as damaged:  # one whose steps were acknowledged is never thrown away unasked
        damaged.write(bytes(8))
    with pytest.raises(StorageError, match="is no replay storage"):
        ShardServer(spec, SECURITY, recover=True)
    path.unlink()


# ----------------------------------------------------------- what errors leave

PROMPTS = pa.schema([("group", pa.int64()), ("policy_version", pa.int32())])


def with_queue(directory: Path, run: str) -> tuple[ShardSpec, Path, Path]:
    """A shard's settings, and the files of its steps and its queue as a dead process leaves them, with rows in both."""
    spec = spec_of(directory, run=run, queues=(QueueSpec(name="prompts", schema=PROMPTS, group_size=1),))
    server = ShardServer(spec, SECURITY)
    with closing(writer_to(server.address)) as writer:
        write(writer, checked(SCHEMA, 0, 5))
    queue = server._opened["prompts"]
    queue.connect("w")
    assert queue.insert("w", 0, pa.record_batch([[1, 2], [0, 0]], schema=PROMPTS), timeout_s=0.0)
    steps = Path(str(server.shard.path))
    server.close(remove=False)
    return spec, steps, steps.with_name(steps.name.replace(".steps", ".queue_prompts"))


def waiting_rows(server: ShardServer) -> int:
    return int(server.stats()["queues"]["prompts"]["waiting_rows"])


def test_damaged_steps_begin_afresh_where_told_and_the_queues_stay(memory: Path) -> None:
    spec, steps, queue = with_queue(memory, "damaged")
    with steps.open("r+b") as damaged:
        damaged.write(b"something else")
    with pytest.raises(StorageError, match="is no replay storage"):
        ShardServer(spec, SECURITY, recover=True)
    assert steps.exists()
    assert queue.exists()
    server = ShardServer(spec, SECURITY, recover=True, afresh_if_damaged=True)
    assert server.damage == "the file is no replay storage"
    assert not server.shard.recovered
    assert table_of(server)["items"] == 0
    assert waiting_rows(server) == 2
    server.close()
    assert not steps.exists()
    assert not queue.exists()


@pytest.mark.parametrize("lost", ["nothing", "the steps", "the queue"])
def test_an_error_at_the_start_removes_only_what_was_not_there_before(memory: Path, lost: str) -> None:
    spec, steps, queue = with_queue(memory, lost.replace(" ", "_"))
    gone = {"nothing": None, "the steps": steps, "the queue": queue}[lost]
    if gone is not None:
        gone.unlink()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="cannot listen on"):
        ShardServer(replace(spec, port=taken.getsockname()[1]), SECURITY, recover=True)
    assert [path.exists() for path in (steps, queue)] == [path != gone for path in (steps, queue)]
    server = ShardServer(spec, SECURITY, recover=True)
    assert table_of(server)["items"] == (0 if lost == "the steps" else 4)
    assert waiting_rows(server) == (0 if lost == "the queue" else 2)
    server.close()


def test_a_shard_listens_on_an_address_of_version_6(memory: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no ::1")
    with served(memory, run="v6", host="::1") as server:
        assert server.health_address.startswith("[::1]:")
        with closing(writer_to(server.address)) as writer:
            write(writer, checked(SCHEMA, 0, 5))
        assert table_of(server)["items"] == 4
        with grpc_channel(server.health_address, SECURITY) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10.0)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


FORGETFUL = """
import sys
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from replay.samplers import stream_sampler
from replay.security import grpc_channel
from replay.server import ShardServer
from tests.shards_for_tests import SCHEMA, SECURITY, checked, spec_of, write, writer_to
server = ShardServer(spec_of(sys.argv[1], run="forgetful"), SECURITY)
writer = writer_to(server.address)
write(writer, checked(SCHEMA, 0, 20))
sampler = stream_sampler([server.address], SCHEMA, batch_size=4, seed=0, security=SECURITY, transport="flight")
sampler.update_priorities(sampler.sample(10.0), np.ones(4))
channel = grpc_channel(server.health_address, SECURITY)
watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
next(watch)
if sys.argv[2] == "the clients":
    server.close()
print("done")
"""


@pytest.mark.parametrize("forgotten", ["the clients", "all"])
def test_a_program_that_forgot_to_close_ends(memory: Path, forgotten: str) -> None:
    words = [sys.executable, "-c", FORGETFUL, str(memory), forgotten]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60.0)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    # Only `close` removes files.
    left = [path for path in memory.iterdir() if "forgetful" in path.name]
    assert bool(left) is (forgotten == "all")
    for path in left:
        path.unlink()


def test_a_server_ends_though_its_clients_stay(memory: Path) -> None:
    with served(memory, run="stays") as server:
        writer = writer_to(server.address, retry_s=0.1)
        write(writer, checked(SCHEMA, 0, 5))
    assert not [thread for thread in threading.enumerate() if thread.name == "shutdown"]
    writer.close()


def test_what_ends_the_sending_of_priorities_is_raised_and_not_waited_for() -> None:
    def connect() -> flight.FlightClient:
        raise ValueError("the file to trust cannot be read")

    writer = PriorityWriter(connect, "steps")
    writer.put(np.arange(3), np.ones(3))
    waiting = threading.Thread(target=writer.flush, daemon=True)
    waiting.start()
    waiting.join(timeout=10.0)
    assert not waiting.is_alive()
    with pytest.raises(ValueError, match="file to trust"):
        writer.put(np.arange(3), np.ones(3))
    writer.close()


class Garbled(flight.FlightServerBase):  # type: ignore[misc]
    """Answers as no shard does."""

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        return [b"{}"]


def test_what_ends_the_reading_of_a_stream_is_raised_and_not_waited_for() -> None:
    with Garbled("grpc://127.0.0.1:0") as server:
        source = source_of(f"127.0.0.1:{server.port}")
        with pytest.raises(KeyError):
            source.take(4, Sampler([source], SCHEMA, window=Window(), batch_size=4, seed=0).buffers(), 0, 10.0)
        assert isinstance(source.refused, KeyError)
        source.close()


def test_a_spec_survives_its_line(memory: Path) -> None:
    tables = (TableSpec("a", "max_heap", max_size=5, remover="lifo", max_times_sampled=2, stride=3), TableSpec("b"))
    limits = (*pace(5, 20.0), FREE)
    spec = spec_of(memory, tables=tables, limits=limits, lease_s=2.5, limiter_address="grpc://x:1", port=7)
    assert ShardSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert asdict(spec)["tables"][0]["remover"] == "lifo"
