"""Shards behind real Arrow Flight, most of them in processes of their own."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from replay.files import StorageFile, leftovers
from replay.process import ShardProcess
from replay.samplers import Sampler, StreamSource, stream_sampler
from replay.schema import Field, SchemaError, StepSchema
from replay.server import ShardServer
from replay.wire import SEQUENCE
from replay.writers import FlightWriter

from .replay_for_tests import FREE, SCHEMA, draw_all, end, joined, make_spec, numbered, wait_until

FIELDS = 35  # bytes of a row's fields; the last byte is padding
OTHER = StepSchema({"observation": Field("observation", "float32", (5,))}, Field("action", "float32", (2,)))


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@contextmanager
def served(directory: Path, **changes: object) -> Iterator[ShardServer]:
    """A shard in this process, whose insides the test looks at."""
    server = ShardServer(make_spec(directory, **changes))
    try:
        yield server
    finally:
        server.close()


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


# ------------------------------------------------------------------------ data


def test_rows_come_back_bit_for_bit(memory: Path) -> None:
    with ShardProcess(make_spec(memory)) as shard:
        writer = FlightWriter(shard.address, SCHEMA)
        rng = np.random.default_rng(0)
        written = {}
        for lane in range(5):
            rows = SCHEMA.zeros(200)
            for f in SCHEMA.fields:
                values = rows[f.name]
                values[:] = np.frombuffer(rng.bytes(values.nbytes), f.dtype).reshape(values.shape)  # NaNs too
            rows["policy_version"] = np.arange(200) + 1000 * lane
            rows["is_first"] = rows["is_last"] = rows["is_terminal"] = False
            rows["is_last"][49::50] = True
            for k in range(0, 200, 40):
                buffer, lanes = rows[k : k + 40].copy(), np.full(40, lane, np.int32)
                writer.append(lanes, buffer)
                buffer["policy_version"], lanes[:] = -1, 77  # ours again as soon as append returns
            written.update({int(row["policy_version"]): row.tobytes()[:FIELDS] for row in rows})
        writer.flush()
        sampler = stream_sampler([shard.address], SCHEMA, batch_size=64, horizon=3, prefetch=2, seed=0)
        seen: set[int] = set()
        while len(seen) < 5 * 196:
            batch = sampler.sample(5.0)
            assert batch.steps.dtype == SCHEMA.dtype
            for window, length in zip(batch.steps, batch.length, strict=True):
                start = int(window[0]["policy_version"])
                seen.add(start)
                for k in range(length + 1):
                    assert window[k].tobytes()[:FIELDS] == written[start + k]
            assert np.all(batch.probability == 1 / (5 * 196))
        assert shard.stats()["inserted"] == 5 * 196
        sampler.close()
        writer.close()
        assert shard.stats()["writers"] == 0


def test_a_writer_with_another_schema_is_refused(memory: Path) -> None:
    with served(memory) as server:
        with pytest.raises(flight.FlightServerError, match=r"expected .*observation/image.*received .*\[5\]"):
            FlightWriter(server.address, OTHER)
        writer = FlightWriter(server.address, SCHEMA)
        with pytest.raises(SchemaError, match=r"rows have the layout .*the table expects"):
            writer.append(np.zeros(1, np.int32), OTHER.zeros(1))
        writer.append(np.zeros(3, np.int32), numbered(3))
        writer.flush()
        assert server.shard.items == 2
        with pytest.raises(SchemaError, match=r"expected .*\[5\].*received .*observation/image"):
            StreamSource(server.address, OTHER, index=0, block=4, horizon=1, prefetch=1).take(4, 5.0)
        assert server.shard.items == 2
        writer.close()


def test_refused_rows_are_named_to_the_writer_and_not_sent_for_ever(memory: Path) -> None:
    with served(memory) as server:
        writer = FlightWriter(server.address, SCHEMA)
        writer.append(np.array([70_000], np.int32), numbered(1))
        with pytest.raises(flight.FlightServerError, match="lanes 70000…70000 lie outside"):
            writer.flush()
        assert server.stats()["inserted"] == 0


def test_a_ticket_out_of_bounds_is_refused(memory: Path) -> None:
    with served(memory) as server, flight.FlightClient(server.address) as client:
        ticket = flight.Ticket(json.dumps({"stream": "s", "batch": 0, "horizon": 1, "prefetch": 1}).encode())
        with pytest.raises(flight.FlightServerError, match=r"must be at least 1, received .*'batch': 0"):
            client.do_get(ticket).read_chunk()
        with pytest.raises(flight.FlightServerError, match=r"unknown action 'erase'; known are"):
            list(client.do_action(flight.Action("erase", b"{}")))


# ----------------------------------------------------------------- exactly once


def test_a_sequence_number_sent_twice_is_applied_once(memory: Path) -> None:
    with served(memory) as server, flight.FlightClient(server.address) as client:
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": "by-hand"}).encode())
        for expected_last in (-1, 7):
            put, replies = client.do_put(descriptor, SCHEMA.arrow())
            assert SEQUENCE.unpack(replies.read()) == (expected_last,)
            put.write_with_metadata(wire(numbered(5)), SEQUENCE.pack(7))
            assert SEQUENCE.unpack(replies.read()) == (7,)
            put.close()
        stats = server.stats()
        assert (stats["inserted"], stats["duplicates"]) == (4, 1)


def test_lost_connections_neither_lose_nor_double_a_step(memory: Path) -> None:
    with served(memory) as server:
        link = Link(server.address)
        writer = FlightWriter(link.address, SCHEMA, in_flight=8, retry_s=10.0)
        for k in range(60):
            # Replies are lost before some of the cuts: what was applied is then sent again.
            if k % 20 == 17:
                writer.flush()
                link.drop_replies = True
            lanes, rows = np.zeros(10, np.int32), numbered(10, 10 * k)
            writer.append(lanes, rows)
            lanes[:], rows["policy_version"] = 77, -1  # ours again: what is sent again is the writer's own copy
            if k % 20 == 19:
                wait_until(lambda k=k: server.shard.items >= 10 * k - 71)  # type: ignore[misc]
                link.drop_replies = False
                link.cut()
        writer.flush()
        assert server.shard.items == 599
        assert np.sort(draw_all(server.shard).steps["policy_version"][:, 0]).tolist() == list(range(599))
        writer.close()
        link.close()
        wait_until(lambda: server.stats()["writers"] == 0)
        assert server.stats()["leases_ended"] == 0


def test_an_old_stream_still_waiting_applies_nothing_twice(memory: Path) -> None:
    """The first stream hangs in the limiter with a batch when its writer comes back and sends that batch again."""
    with served(memory, min_size=10, error_buffer=10.0) as server:
        shard = server.shard
        link = Link(server.address)
        writer = FlightWriter(link.address, SCHEMA)
        writer.append(np.zeros(20, np.int32), numbered(20))
        writer.flush()
        writer.append(np.zeros(5, np.int32), numbered(5, 20))
        wait_until(lambda: shard.clock.longest("wait_insert_s") > 0.05)
        link.cut()
        flushed = threading.Thread(target=writer.flush)
        flushed.start()
        wait_until(lambda: sum(w.connections for w in shard._writers.values()) >= 1 and writer._error is None)
        assert shard.sample(10, 1, timeout_s=1.0) is not None
        flushed.join(timeout=10.0)
        assert not flushed.is_alive()
        assert shard.items == 24
        assert server.stats()["limiter"]["inserted"] == 25
        writer.close()
        link.close()


def test_two_streams_of_one_writer_apply_a_batch_once(memory: Path) -> None:
    """The same race by hand: both streams are let in by the limiter at the same moment."""
    with served(memory, min_size=10, error_buffer=10.0) as server, flight.FlightClient(server.address) as client:
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": "by-hand"}).encode())
        streams = [client.do_put(descriptor, SCHEMA.arrow()) for _ in range(2)]
        for _, replies in streams:
            assert SEQUENCE.unpack(replies.read()) == (-1,)
        streams[0][0].write_with_metadata(wire(numbered(20)), SEQUENCE.pack(0))
        assert SEQUENCE.unpack(streams[0][1].read()) == (0,)
        for put, _ in streams:
            put.write_with_metadata(wire(numbered(5, 20)), SEQUENCE.pack(1))
        wait_until(lambda: len(server.shard.clock._inside) == 2)
        assert server.shard.sample(10, 1, timeout_s=1.0) is not None
        for put, replies in streams:
            assert SEQUENCE.unpack(replies.read()) == (1,)
            put.close()
        stats = server.stats()
        assert (stats["inserted"], stats["duplicates"], stats["limiter"]["inserted"]) == (24, 1, 25)


# ------------------------------------------------------------------------- pace


def test_inserting_waits_for_sampling_and_says_so(memory: Path) -> None:
    with served(memory, min_size=10, error_buffer=20.0) as server:
        writer = FlightWriter(server.address, SCHEMA, in_flight=2)
        assert writer.waiting_for is None

        def write() -> None:
            for k in range(10):
                writer.append(np.zeros(10, np.int32), numbered(10, 10 * k))
            writer.flush()

        thread = threading.Thread(target=write)
        thread.start()
        wait_until(lambda: bool(server.stats()["waiting"]))
        (why,) = server.stats()["waiting"]
        assert why.startswith("writer for 1 s: waiting for the learner to sample: ")
        assert "replay.error_buffer" in why
        assert writer.waiting_for is not None
        assert writer.waiting_for.startswith(f"replay at {server.address} for ")
        assert server.stats()["limiter"]["inserted"] == 30  # min_size + error_buffer
        assert server.stats()["time/wait_insert_s"] > 0.9
        sampler = stream_sampler([server.address], SCHEMA, batch_size=10, horizon=1, prefetch=1, seed=0)
        while thread.is_alive():
            sampler.sample(5.0)
            thread.join(timeout=0.01)
        assert writer.waiting_for is None
        assert server.shard.items == 99
        sampler.close()
        writer.close()


def test_an_idle_reader_makes_no_shard_grow_and_unused_samples_go_back(memory: Path) -> None:
    with ShardProcess(make_spec(memory, capacity=65_536)) as shard:
        writer = FlightWriter(shard.address, SCHEMA)
        writer.append(np.zeros(5000, np.int32), numbered(5000))
        writer.flush()
        sampler = stream_sampler([shard.address], SCHEMA, batch_size=2048, horizon=5, prefetch=4, seed=0)
        sampler.sample(5.0)
        wait_until(lambda: shard.stats()["sampled"] == 4 * 2048)
        before = psutil.Process(shard.pid).memory_info().rss
        threading.Event().wait(1.2)
        assert shard.stats()["sampled"] == 4 * 2048
        # One batch is 0.6 MB: a stream without bounds would have sent gigabytes.
        assert psutil.Process(shard.pid).memory_info().rss - before < 4e6
        for _ in range(6):
            sampler.sample(5.0)
        sampler.close()
        wait_until(lambda: shard.stats()["limiter"]["sampled"] == 7 * 2048)
        assert shard.stats()["sampled"] == 7 * 2048
        writer.close()


def test_a_reader_that_vanishes_gives_back_what_it_did_not_acknowledge(memory: Path) -> None:
    """Without a close, from the middle of a wait for the limiter: the stream's generator still ends."""
    with served(memory, min_size=10, error_buffer=40.0) as server:
        writer = FlightWriter(server.address, SCHEMA)
        writer.append(np.zeros(30, np.int32), numbered(30))
        writer.flush()
        link = Link(server.address)
        source = StreamSource(link.address, SCHEMA, index=0, block=8, horizon=1, prefetch=100)
        wait_until(lambda: server.stats()["sampled"] == 56)  # (30 − 10) + 40, in whole blocks
        gc.disable()
        try:
            link.close()
            wait_until(lambda: server.stats()["sampled"] == 0)
        finally:
            gc.enable()
        assert not server._streams
        assert server.stats()["limiter"]["sampled"] == 0
        source.close()
        writer.close()


def test_a_take_that_times_out_loses_no_window(memory: Path) -> None:
    with served(memory, min_size=10, error_buffer=20.0) as server:
        writer = FlightWriter(server.address, SCHEMA)
        writer.append(np.zeros(20, np.int32), numbered(20))
        writer.flush()
        source = StreamSource(server.address, SCHEMA, index=0, block=4, horizon=1, prefetch=3)
        for _ in range(5):
            assert source.take(40, 0.05) is None
        for _ in range(7):
            part = source.take(4, 5.0)
            assert part is not None
        assert source.take(4, 0.2) is None  # (20 − 10) + 20 = 30 samples: 7 blocks of 4
        assert server.stats()["sampled"] == 28
        assert next(iter(server._streams.values())).unused >= 0
        source.close()
        wait_until(lambda: not server._streams)
        assert server.stats()["limiter"]["sampled"] == 28
        writer.close()


# --------------------------------------------------------------- several shards


def test_two_shards_are_drawn_in_proportion_and_share_one_limiter(memory: Path) -> None:
    with (
        ShardProcess(make_spec(memory, min_size=1000, error_buffer=500.0)) as first,
        ShardProcess(
            make_spec(memory, index=1, min_size=1000, error_buffer=500.0, limiter_address=first.address)
        ) as second,
    ):
        writers = [FlightWriter(shard.address, SCHEMA, in_flight=1) for shard in (first, second)]
        sampler = stream_sampler([first.address, second.address], SCHEMA, batch_size=64, horizon=1, prefetch=2, seed=0)
        with pytest.raises(TimeoutError):
            sampler.sample(0.05)
        for k in range(0, 1200, 40):  # three of four steps go to the first shard
            writers[0].append(np.arange(30, dtype=np.int32) % 6, numbered(30, k))
            writers[1].append(np.arange(10, dtype=np.int32) % 2, numbered(10, 10_000 + k))
        for writer in writers:
            writer.flush()
        masses = [shard.stats()["items"] for shard in (first, second)]
        assert masses == [894, 298]
        wait_until(lambda: [source.mass for source in sampler._sources] == masses)
        drawn = of_second = 0
        try:
            while drawn < 10_000:
                batch = sampler.sample(0.5)
                drawn += 64
                of_second += int((batch.shard == 1).sum())
                assert ((batch.steps["policy_version"][:, 0] >= 10_000) == (batch.shard == 1)).all()
                # The first batches were drawn ahead, when the table had just reached its minimum size.
                assert drawn <= 5 * 64 or np.allclose(batch.probability, 1 / 1192, rtol=1e-6)
        except TimeoutError:
            pass
        # 1200 inserted, 1000 of them the minimum: 200 + 500 samples are allowed, and a lease may lie unused.
        limiter = first.stats()["limiter"]
        assert 1200 <= limiter["inserted"] <= 1200 + 64
        assert limiter["sampled"] <= limiter["inserted"] - 1000 + 500
        assert 300 <= drawn <= limiter["sampled"]
        assert abs(of_second - drawn / 4) < 4 * np.sqrt(drawn * 3 / 16)
        sampler.close()
        for writer in writers:
            writer.close()


def test_a_shards_mass_is_known_while_its_stream_is_not_read(memory: Path) -> None:
    """Else a shard that was nearly empty when its batches were drawn would stay nearly unread."""
    with served(memory) as server:
        writer = FlightWriter(server.address, SCHEMA)
        writer.append(np.zeros(3, np.int32), numbered(3))
        writer.flush()
        source = StreamSource(server.address, SCHEMA, index=0, block=4, horizon=1, prefetch=1)
        wait_until(lambda: source.mass == 2)
        writer.append(np.zeros(1000, np.int32), numbered(1000, 3))
        writer.flush()
        wait_until(lambda: source.mass == 1002, timeout_s=3.0)
        source.close()
        writer.close()


def test_a_shard_that_comes_back_empty_is_written_and_read_again(memory: Path) -> None:
    first = ShardProcess(make_spec(memory))
    port = int(first.address.rsplit(":", 1)[1])
    writer = FlightWriter(first.address, SCHEMA, retry_s=20.0)
    writer.append(np.zeros(50, np.int32), numbered(50))
    writer.flush()
    source = StreamSource(first.address, SCHEMA, index=0, block=8, horizon=1, prefetch=4)
    sampler = Sampler([source], batch_size=8, seed=0)
    sampler.sample(5.0)
    os.kill(first.pid, signal.SIGKILL)
    first.close()
    # What a killed shard leaves is found, and only that.
    (left,) = [file for file in leftovers(memory) if file.pid == first.pid]
    assert (left.run, left.size) == ("test", 4096 * SCHEMA.dtype.itemsize)
    left.path.unlink()
    wait_until(lambda: source.mass == 0)
    with ShardProcess(make_spec(memory, port=port)) as second:
        assert not [file for file in leftovers(memory) if file.pid == second.pid]
        writer.append(np.zeros(20, np.int32), numbered(20, 1000))
        writer.flush()
        wait_until(lambda: source.mass == 19, timeout_s=20.0)
        starts = np.concatenate([sampler.sample(5.0).steps["policy_version"][:, 0] for _ in range(12)])
        assert (starts[-32:] >= 1000).all()
        assert second.stats()["sampled"] <= (12 + 4) * 8
        sampler.close()
        writer.close()


# ------------------------------------------------------------- life and death


def test_health_is_served_by_the_standard_protocol(memory: Path) -> None:
    with ShardProcess(make_spec(memory)) as shard, grpc.insecure_channel(shard.health) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


WRITE_FOR_EVER = """
import sys, time
import numpy as np
from replay.writers import FlightWriter
from tests.replay_for_tests import SCHEMA, numbered
writer = FlightWriter(sys.argv[1], SCHEMA)
writer.append(np.array([0, 0, 0, 4, 4], np.int32), numbered(5))
writer.flush()
print("written", flush=True)
time.sleep(60)
"""


def test_the_lanes_of_a_killed_writer_end_truncated_with_its_lease(memory: Path) -> None:
    with served(memory, lease_s=0.3) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOR_EVER, server.address], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "written\n"
        threading.Event().wait(0.5)
        assert server.stats()["leases_ended"] == 0  # connected, however long it is silent
        child.kill()
        child.wait()
        child.stdout.close()
        wait_until(lambda: server.stats()["leases_ended"] == 1)
        windows = draw_all(server.shard, horizon=5)
        ends = windows.steps[np.arange(3), windows.length]
        assert windows.length.tolist() == [2, 1, 1]
        assert ends["policy_version"].tolist() == [2, 2, 4]
        assert ends["is_last"].all()
        assert not ends["is_terminal"].any()
        assert not ends["reward"].any()
        # The two newest steps, which can never be drawn, are no inserts any more.
        assert server.stats()["limiter"]["inserted"] == 3


def test_a_shard_ends_at_once_though_writers_and_readers_are_connected(memory: Path) -> None:
    shard = ShardProcess(make_spec(memory))
    writer = FlightWriter(shard.address, SCHEMA)
    rows = joined(numbered(5), numbered(5, 5))
    end(rows, terminal=True)
    writer.append(np.zeros(10, np.int32), rows)
    source = StreamSource(shard.address, SCHEMA, index=0, block=4, horizon=2, prefetch=2)
    assert source.take(4, 5.0) is not None
    shard.close()
    assert shard._child.returncode == 0
    assert not [file for file in memory.iterdir() if str(shard.pid) in file.name]
    source.close()
    writer.close()


def test_too_little_space_is_said_at_the_start(memory: Path) -> None:
    with pytest.raises(OSError, match=r"MiB free and the replay shard needs \d+ MiB; lower replay\.capacity") as caught:
        StorageFile("/dev/shm", run="huge-test", shard=0, size=2**45)
    assert caught.value.errno == errno.ENOSPC
    assert not list(Path("/dev/shm").glob("*huge-test*"))
    with pytest.raises(OSError, match=r"cannot make a storage file in .*nowhere .*set replay\.directory"):
        StorageFile(memory / "nowhere", run="r", shard=0, size=1024)


def test_a_storage_file_in_use_is_not_taken_over(memory: Path) -> None:
    file = StorageFile(memory, run="mine", shard=3, size=1024)
    file.array()[:] = 5
    with pytest.raises(OSError, match="is in use by another shard"):
        StorageFile(memory, run="mine", shard=3, size=1024)
    assert (file.array() == 5).all()
    assert file.path.exists()
    file.close()
    assert not file.path.exists()


def test_a_spec_survives_its_line(memory: Path) -> None:
    spec = make_spec(memory, error_buffer=FREE, lease_s=2.5)
    assert type(spec)(**json.loads(json.dumps(asdict(spec)))) == spec
