"""The server of a queue shard: what it lets in, what it hands on, and what it leaves behind."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from replay.files import storage_path
from replay.queue_sampler import QueueSampler, queue_sampler
from replay.queue_server import QueueServer
from replay.queue_service import queue_message
from replay.queue_spec import QueueSpec
from replay.queue_writers import QueueWriter
from replay.queues import Queue
from replay.security import Security, flight_client

SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),
        pa.field("group_size", pa.int32(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
    ]
)
SECURITY = Security(token=secrets.token_hex(16))


def spec(**changes: Any) -> QueueSpec:
    return QueueSpec(**{"name": "completions", "schema": SCHEMA, "capacity_bytes": 1 << 20, **changes})


def group(number: int, size: int = 2, version: int = 1) -> pa.RecordBatch:
    columns = [[number] * size, [size] * size, [version] * size, [[number, i] for i in range(size)]]
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def path_of(folder: Path) -> Path:
    return storage_path(str(folder), run="a", shard=0, part="queue_completions")


def serve(folder: Path, security: Security = SECURITY, **options: Any) -> QueueServer:
    return QueueServer(options.pop("spec", spec()), security, run="a", index=0, directory=str(folder), **options)


def writer(server: QueueServer, security: Security = SECURITY, **options: Any) -> QueueWriter:
    connect = partial(flight_client, security=security)
    return QueueWriter(server.address, SCHEMA, table="completions", name="actor-0-0", connect=connect, **options)


def sampler(server: QueueServer, groups: int) -> QueueSampler:
    connect = partial(flight_client, security=SECURITY)
    return queue_sampler([server.address], SCHEMA, table="completions", groups=groups, connect=connect)


def groups_of(rows: pa.RecordBatch) -> list[int]:
    return list(dict.fromkeys(rows.column("group").to_pylist()))


def act(server: QueueServer, kind: str, body: bytes, security: Security = SECURITY) -> Any:
    client = flight_client(server.address, security)
    try:
        (answer,) = client.do_action(flight.Action(kind, body))
        return json.loads(answer.body.to_pybytes())
    finally:
        client.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QueueServer]:
    found = serve(tmp_path)
    yield found
    found.close()


def test_what_is_written_is_read_once_and_in_order(server: QueueServer) -> None:
    out = writer(server)
    for number in range(6):
        out.append(group(number))
    out.flush()
    reader = sampler(server, 2)
    seen = []
    for _ in range(3):
        batch = reader.sample(10.0, version=1)
        seen += groups_of(batch.rows)
        reader.acknowledge(batch)
    reader.flush()
    assert seen == list(range(6))
    assert server.queue.stats()["consumed_groups"] == 6
    reader.close()
    out.close()


@pytest.mark.parametrize("token", ["", "wrong" * 4])
def test_a_caller_without_the_runs_token_is_refused_everywhere(server: QueueServer, token: str) -> None:
    stranger = Security(token=token) if token else None
    client = flight_client(server.address, stranger) if stranger else flight.connect(server.address)
    refused = (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)
    with pytest.raises(refused):
        list(client.do_action(flight.Action("stats", b"")))
    with pytest.raises(refused):
        client.do_get(flight.Ticket(json.dumps({"queue": "completions"}).encode())).read_all()
    client.close()
    if stranger is not None:
        with pytest.raises(refused):
            writer(server, stranger)
    assert server.queue.stats()["writers"] == 0


@pytest.mark.parametrize(("token", "found"), [(SECURITY.token, True), ("wrong" * 4, False)], ids=["right", "wrong"])
def test_health_is_told_to_who_shows_the_token(server: QueueServer, token: str, found: bool) -> None:
    with grpc.insecure_channel(server.health_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        metadata = [("authorization", f"Bearer {token}")]
        ask = partial(stub.Check, health_pb2.HealthCheckRequest(), timeout=5.0, metadata=metadata)
        if found:
            assert ask().status == health_pb2.HealthCheckResponse.SERVING
        else:
            with pytest.raises(grpc.RpcError) as refused:
                ask()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_statistics_are_those_of_the_queue_whether_it_is_named_or_not(server: QueueServer) -> None:
    out = writer(server)
    out.append(group(0))
    out.flush()
    of_all = act(server, "stats", b"")
    named = act(server, "stats", b'{"queue": "completions"}')
    assert of_all["queues"]["completions"]["waiting_groups"] == named["waiting_groups"] == 1
    out.close()


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b"nonsense", b'{"table": "steps"}', b"[" * 100_000])
def test_what_names_no_queue_is_refused_and_told_why(server: QueueServer, body: bytes) -> None:
    assert queue_message(body) is None
    with pytest.raises(flight.FlightServerError, match="serves queue tables"):
        act(server, "end_writer", body)
    with pytest.raises(flight.FlightServerError, match="no queue 'other' here"):
        act(server, "stats", b'{"queue": "other"}')


def test_groups_that_come_while_nobody_reads_wait_and_hold_writers_back(tmp_path: Path) -> None:
    server = serve(tmp_path, spec=spec(max_waiting_groups=2))
    out = writer(server, in_flight=1)
    out.append(group(0))
    out.append(group(1))
    out.append(group(2))  # one message may be on its way
    reader = sampler(server, 1)
    seen = []
    for _ in range(3):
        batch = reader.sample(10.0, version=1)
        seen += groups_of(batch.rows)
        reader.acknowledge(batch)
    out.flush()
    assert seen == [0, 1, 2]
    reader.close()
    out.close()
    server.close()


def test_a_server_takes_over_the_groups_of_one_that_died(tmp_path: Path) -> None:
    first = serve(tmp_path)
    out = writer(first)
    for number in range(4):
        out.append(group(number))
    out.flush()
    reader = sampler(first, 1)
    reader.acknowledge(reader.sample(10.0, version=1))
    reader.flush()
    reader.close()
    out.close()
    first.close(remove=False)  # as a crash leaves it
    assert path_of(tmp_path).exists()

    def not_called(queue: Queue) -> None:
        raise AssertionError("what is taken over is not prepared")

    second = serve(tmp_path, recover=True, prepare=not_called)
    assert second.recovered
    reader = sampler(second, 3)
    assert groups_of(reader.sample(10.0, version=1).rows) == [1, 2, 3]
    reader.close()
    second.close()
    assert not path_of(tmp_path).exists()


def test_without_recovery_a_server_begins_afresh_prepared_or_empty(tmp_path: Path) -> None:
    first = serve(tmp_path)
    out = writer(first)
    out.append(group(7))
    out.close()
    first.close(remove=False)

    def prepare(queue: Queue) -> None:
        assert queue.empty
        queue.connect("from a checkpoint")
        assert queue.insert("from a checkpoint", 0, group(9), timeout_s=0.0)
        queue.disconnect("from a checkpoint", closed=True)

    second = serve(tmp_path, prepare=prepare)
    assert not second.recovered
    reader = sampler(second, 1)
    assert groups_of(reader.sample(10.0, version=1).rows) == [9]
    reader.close()
    second.close()
    assert not path_of(tmp_path).exists()


def test_recovery_without_a_file_is_a_beginning(tmp_path: Path) -> None:
    calls: list[Queue] = []
    server = serve(tmp_path, recover=True, prepare=calls.append)
    assert not server.recovered
    assert len(calls) == 1
    server.close()


def test_a_server_that_cannot_listen_or_prepare_leaves_no_new_file_and_keeps_one_taken_over(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot listen on .* set replay\.host"):
        serve(tmp_path, host="203.0.113.7")
    assert not path_of(tmp_path).exists()

    def broken(queue: Queue) -> None:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        serve(tmp_path, prepare=broken)
    assert not path_of(tmp_path).exists()

    first = serve(tmp_path)
    out = writer(first)
    out.append(group(1))
    out.close()
    first.close(remove=False)
    with pytest.raises(OSError, match="cannot listen"):
        serve(tmp_path, host="203.0.113.7", recover=True)
    second = serve(tmp_path, recover=True)
    assert second.queue.waiting_groups == 1
    second.close()


def test_closing_ends_streams_that_wait_and_may_be_done_again(tmp_path: Path) -> None:
    server = serve(tmp_path)
    reader = sampler(server, 1)
    out = writer(server, retry_s=0.5)
    with pytest.raises(TimeoutError):
        reader.sample(0.2, version=1)
    server.close()
    with pytest.raises(flight.FlightError):  # noqa: PT012 (either may be the first to find out)
        out.append(group(0))
        out.flush()
    reader.close()
    server.close()
