"""Security of the wire: the token, TLS, and messages that are damaged, too large or not what they claim to be."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.ending import end_serving
from replay.schema import SchemaError
from replay.security import (
    GRPC_OPTIONS,
    MAX_JSON_BYTES,
    REFUSED,
    Between,
    Rule,
    Security,
    TokenInterceptor,
    check_batch,
    check_host,
    check_schema,
    diagnose,
    flight_client,
    flight_location,
    flight_server_options,
    grpc_channel,
    grpc_listen,
    new_token,
    parse_json,
    read_chunks,
)

from .replay_for_tests import SCHEMA, numbered

ROOT = Path(__file__).parents[1]
WIDTH = 24  # bytes of a row
ROWS = pa.schema([("lane", pa.int32()), ("row", pa.binary(WIDTH))], metadata={"layout": "one"})
TEXTS = pa.schema([("tokens", pa.list_(pa.int32())), ("prompt", pa.string())])
SEQUENCE = struct.Struct("<q")
TOKEN = "the-token-of-the-tests"


# -- a service that guards itself by nothing but replay.security ------------------------------------------------------


class Service(flight.FlightServerBase):  # type: ignore[misc]
    """Keeps the rows it is sent, of the schema that the put's command names, and tells what it holds."""

    def __init__(self, security: Security) -> None:
        self.lock = threading.Lock()
        self.rows = 0
        self.total = 0
        self.calls = 0
        super().__init__(flight_location("127.0.0.1", 0, security), **flight_server_options(security))
        self.health = grpc.server(
            ThreadPoolExecutor(2), interceptors=[TokenInterceptor(security)], options=GRPC_OPTIONS
        )
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self.health)
        self.health_port = grpc_listen(self.health, "127.0.0.1:0", security)
        self.health.start()

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self.calls += 1
        try:
            kind = parse_json(descriptor.command, what="put", required={"schema": ("rows", "texts")})["schema"]
            expected = ROWS if kind == "rows" else TEXTS
            check_schema(reader.schema, expected)
            for chunk in read_chunks(reader):
                columns = check_batch(chunk.data, expected, max_rows=1000, max_bytes=100_000)
                total = sum(self._read_all(column) for column in columns)
                with self.lock:
                    self.rows += len(columns[0])
                    self.total += total
                writer.write(SEQUENCE.pack(len(columns[0])))
        except SchemaError as error:
            raise flight.FlightServerError(str(error)) from None

    @staticmethod
    def _read_all(column: pa.Array) -> int:
        """Every byte the column claims to have, as a shard's kernels would read it: without asking Arrow again."""
        if column.type == pa.binary(WIDTH):
            return int(np.frombuffer(column.buffers()[1], np.uint8, len(column) * WIDTH).sum())
        if column.type == pa.int32():
            return int(np.frombuffer(column.buffers()[1], np.int32, len(column)).sum())
        return len(json.dumps(column.to_pylist()))

    def do_get(self, context: Any, ticket: Any) -> Any:
        self.calls += 1
        return flight.GeneratorStream(ROWS, iter([good_batch(2)]))

    def do_action(self, context: Any, request: Any) -> list[bytes]:
        self.calls += 1
        return [json.dumps({"rows": self.rows, "total": self.total}).encode()]

    def close(self) -> None:
        self.health.stop(grace=None)
        end_serving(self, grace_s=1.0)


def serve() -> None:
    """In a process of its own: a Service by the settings on standard input, until that ends."""
    service = Service(Security(**json.loads(sys.stdin.readline())))
    print(json.dumps({"address": f"127.0.0.1:{service.port}"}), flush=True)
    sys.stdin.read()
    service.close()


def serve_shard() -> None:
    """In a process of its own: a shard by the settings on standard input, until that ends."""
    from replay.server import ShardServer
    from replay.shard import ShardSpec

    security, directory = json.loads(sys.stdin.readline())
    spec = ShardSpec(
        schema=SCHEMA.to_json(), run="damage", index=0, capacity=1024, segment_steps=16, seed=0, directory=directory
    )
    server = ShardServer(spec, Security(**security))
    print(json.dumps({"address": server.address}), flush=True)
    sys.stdin.read()
    server.close()
    os._exit(0)  # as replay.process: a stream still open would hold up the interpreter's own end


class Child:
    """A service in a child process, so that a crash of it is seen and survived."""

    def __init__(self, serve: str, settings: object) -> None:
        code = f"from tests.test_replay_security import {serve}; {serve}()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        security = Security(TOKEN)
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        self.address = json.loads(self.process.stdout.readline())["address"]
        self.client = flight_client(self.address, security)
        channel = grpc_channel(self.address, security)
        self._put = channel.stream_stream("/arrow.flight.protocol.FlightService/DoPut", bytes, bytes)
        self._action = channel.unary_stream("/arrow.flight.protocol.FlightService/DoAction", bytes, bytes)
        self._get = channel.unary_stream("/arrow.flight.protocol.FlightService/DoGet", bytes, bytes)

    def put(self, messages: Sequence[bytes]) -> tuple[list[int], grpc.RpcError | None]:
        """Send raw protobuf messages on a DoPut stream. Returns the numbers it answered, and the error."""
        answers = []
        try:
            for answer in self._put(iter(messages), timeout=20.0):
                answers += SEQUENCE.unpack(answer[-8:])
        except grpc.RpcError as error:
            return answers, error
        return answers, None

    def act(self, message: bytes) -> grpc.RpcError | None:
        """Send a raw protobuf message as a DoAction."""
        try:
            list(self._action(message, timeout=20.0))
        except grpc.RpcError as error:
            return error
        return None

    def get(self, message: bytes) -> grpc.RpcError | None:
        """Send a raw protobuf message as a DoGet, and hang up after the first batch."""
        stream = self._get(message, timeout=20.0)
        try:
            for _ in range(2):  # the schema comes first
                next(stream, None)
        except grpc.RpcError as error:
            return error
        stream.cancel()
        return None

    def state(self, action: str = "stats") -> dict[str, Any]:
        assert self.process.poll() is None, f"the service died with {self.process.returncode}"
        (answer,) = self.client.do_action(flight.Action(action, b"{}"))
        found: dict[str, Any] = json.loads(answer.body.to_pybytes())
        return found

    def close(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    found = Child("serve", asdict(Security(TOKEN)))
    yield found
    found.close()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    found = Child("serve_shard", [asdict(Security(TOKEN)), str(tmp_path_factory.mktemp("shard"))])
    rows = put_messages(steps_batch(20), {"writer": "first"}, SEQUENCE.pack(0))
    assert found.put([b"".join(parts) for parts in rows]) == ([-1, 0], None)
    yield found
    found.close()


# -- messages, good and bad -------------------------------------------------------------------------------------------


def good_batch(count: int) -> pa.RecordBatch:
    rows = np.full(count * WIDTH, 1, np.uint8)
    column = pa.Array.from_buffers(pa.binary(WIDTH), count, [None, pa.py_buffer(rows)])
    return pa.RecordBatch.from_arrays([pa.array(np.ones(count, np.int32)), column], schema=ROWS)


def text_batch(count: int) -> pa.RecordBatch:
    return pa.record_batch(
        [pa.array([list(range(i)) for i in range(count)], pa.list_(pa.int32())), pa.array(["wörd"] * count)],
        schema=TEXTS,
    )


def protobuf(number: int, data: bytes) -> bytes:
    """A field of bytes."""

    def varint(value: int) -> bytes:
        low = value & 0x7F
        return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + varint(value >> 7)

    return varint(number << 3 | 2) + varint(len(data)) + data


def split(message: bytes) -> tuple[bytes, bytes]:
    """Header and body of an encapsulated IPC message."""
    size = struct.unpack_from("<i", message, 4)[0]
    return message[8 : 8 + size], message[8 + size :]


def put_messages(batch: pa.RecordBatch, said: dict[str, str], note: bytes = b"x") -> list[tuple[bytes, bytes, bytes]]:
    """The (descriptor and header, metadata, body) of a put of one batch: its schema, then its rows with a note."""
    command = protobuf(2, json.dumps(said).encode())
    descriptor = protobuf(1, b"\x08\x02" + command)  # type CMD
    schema, _ = split(batch.schema.serialize().to_pybytes())
    header, body = split(batch.serialize().to_pybytes())
    return [
        (descriptor + protobuf(2, schema), b"", b""),
        (protobuf(2, header), protobuf(3, note), protobuf(1000, body)),
    ]


PUTS = {
    "rows": put_messages(good_batch(20), {"schema": "rows"}),
    "texts": put_messages(text_batch(20), {"schema": "texts"}),
}
KNOWN_LENGTHS = (0, 1, 20, 21, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63))


def damaged(message: bytes, pick: random.Random) -> bytes:
    """The message with a few bytes or whole integers changed, cut out or put in."""
    data = bytearray(message)
    for _ in range(pick.choice((1, 1, 1, 2, 3, 8))):
        at = pick.randrange(len(data)) if data else 0
        match pick.randrange(6):
            case 0 | 1 if data:
                data[at] = pick.randrange(256)
            case 2 if data:
                data[at] ^= 1 << pick.randrange(8)
            case 3 if len(data) > 8:  # flatbuffers keep integers where their size divides the offset, from some start
                struct.pack_into("<q", data, min(at, len(data) - 8), pick.choice(KNOWN_LENGTHS))
            case 4:
                del data[at : at + pick.choice((1, 4, 8, 64))]
            case _:
                data[at:at] = pick.randbytes(pick.choice((1, 4, 8)))
    return bytes(data)


def damaged_put(kind: str, where: str, seed: int) -> list[bytes]:
    """A put whose schema, rows (header, body) or protobuf framing is damaged."""
    return damaged_parts(PUTS[kind], where, random.Random(f"{kind} {where} {seed}"))


def damaged_parts(parts: list[tuple[bytes, bytes, bytes]], where: str, pick: random.Random) -> list[bytes]:
    (schema, _, _), (header, metadata, body) = parts
    match where:
        case "schema":
            schema = schema[:-200] + damaged(schema[-200:], pick) if pick.random() < 0.5 else damaged(schema, pick)
        case "header":
            # Behind the field's number and length, so that the damage reaches Arrow and not protobuf alone.
            header = header[:3] + damaged(header[3:], pick)[: len(header) - 3].ljust(len(header) - 3, b"\0")
        case "metadata":
            metadata = metadata[:2] + damaged(metadata[2:], pick)[: len(metadata) - 2].ljust(len(metadata) - 2, b"\0")
        case "body":
            body = damaged(body, pick)
    rows = header + metadata + body
    if where == "framing":
        rows = damaged(rows, pick)
    return [schema, rows]


def attack(child: Child, messages: Sequence[bytes]) -> str:
    """Send a damaged put; the service must be there afterwards with the rows it acknowledged, and take a good one."""
    before = child.state()
    rows, error = child.put(messages)
    after = child.state()
    assert after["rows"] == before["rows"] + sum(rows)
    if not rows:
        assert after == before
    code: grpc.StatusCode | None = None if error is None else error.code()  # type: ignore[attr-defined]
    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED
    assert error is None or "Traceback" not in error.details()  # type: ignore[attr-defined]
    return "accepted" if code is None else code.name


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    st.sampled_from(sorted(PUTS)),
    st.sampled_from(["schema", "header", "header", "body", "framing"]),
    st.integers(0, 2**40),
)
def test_a_damaged_put_neither_kills_the_service_nor_leaves_a_trace(
    child: Child, kind: str, where: str, seed: int
) -> None:
    attack(child, damaged_put(kind, where, seed))


@pytest.mark.parametrize("kind", sorted(PUTS))
def test_the_undamaged_put_is_accepted(child: Child, kind: str) -> None:
    """Else the tests of damaged ones would show nothing."""
    rows, error = child.put([b"".join(parts) for parts in PUTS[kind]])
    assert (rows, error) == ([20], None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.integers(0, 2**40))
def test_a_damaged_action_does_not_kill_the_service(child: Child, seed: int) -> None:
    pick = random.Random(seed)
    before = child.state()
    child.act(damaged(protobuf(1, b"state") + protobuf(2, b'{"schema": "rows"}'), pick))
    assert child.state() == before


@pytest.mark.parametrize("kind", sorted(PUTS))
def test_an_array_that_claims_more_than_it_holds_is_refused(child: Child, kind: str) -> None:
    """Arrow itself lets it pass: see the assertion in the middle."""
    count = 23  # a number that flatbuffers have no use for themselves
    batch = good_batch(count) if kind == "rows" else text_batch(count)
    header, body = split(batch.serialize().to_pybytes())
    words = np.frombuffer(header, np.int64).copy()  # flatbuffers align their integers
    words[words == count] = 900  # the rows of the batch and of each of its arrays
    longer = words.tobytes()
    message = struct.pack("<ii", -1, len(longer)) + longer + body
    received = pa.ipc.read_record_batch(pa.py_buffer(message), batch.schema)
    assert received.num_rows == 900
    with pytest.raises(SchemaError, match=r"expected whole columns .*, received damaged ones: .*length 900"):
        check_batch(received, batch.schema, max_rows=1000, max_bytes=100_000)

    schema = b"".join(PUTS[kind][0])
    before = child.state()
    rows, error = child.put([schema, protobuf(2, longer) + protobuf(3, b"x") + protobuf(1000, body)])
    assert rows == []
    assert "received damaged ones" in error.details()  # type: ignore[union-attr]
    assert child.state() == before


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            good_batch(20).replace_schema_metadata({"layout": "two"}),
            r"metadata \{b'layout': b'one'\}, received .*b'two'",
        ),
        (text_batch(2), r"expected the columns lane: int32, row: fixed_size_binary\[24\], received tokens: list<item"),
        (good_batch(21), "expected at most 20 rows in a batch, received 21; send smaller ones"),
        (
            pa.RecordBatch.from_arrays([pa.array([1, None], pa.int32()), good_batch(2).column(1)], schema=ROWS),
            "expected no nulls, received 1 of 2 in column lane",
        ),
    ],
)
def test_a_batch_that_does_not_fit_shows_expected_and_received(batch: pa.RecordBatch, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check_batch(batch, ROWS, max_rows=20, max_bytes=10_000)
    with pytest.raises(SchemaError, match=r"expected at most 50 bytes in a batch, received 56"):
        check_batch(good_batch(2), ROWS, max_rows=20, max_bytes=50)


def test_a_batch_that_fits_is_given_back_column_by_column() -> None:
    lanes, rows = check_batch(good_batch(20), ROWS, max_rows=20, max_bytes=20 * (4 + WIDTH))
    assert lanes.to_pylist() == [1] * 20
    assert len(rows) == 20
    sliced = check_batch(good_batch(20).slice(5, 7), ROWS, max_rows=20, max_bytes=1000)
    assert len(sliced[0]) == 7
    assert check_batch(good_batch(0), ROWS, max_rows=20, max_bytes=1000)[0].to_pylist() == []


def test_what_arrow_cannot_read_is_told_with_what_was_expected(child: Child) -> None:
    (schema, _, _), (header, metadata, body) = PUTS["rows"]
    _, error = child.put([schema, header[:3] + b"\xff" * (len(header) - 3) + metadata + body])
    text = error.details()  # type: ignore[union-attr]
    assert "expected Arrow messages with the columns lane: int32, row: fixed_size_binary[24], received one" in text


def test_metadata_without_rows_is_refused_where_rows_are_due(child: Child) -> None:
    (schema, _, _), (_, metadata, _) = PUTS["rows"]
    before = child.state()
    _, error = child.put([schema, metadata])
    assert "received metadata alone" in error.details()  # type: ignore[union-attr]
    assert child.state() == before


# -- a shard ----------------------------------------------------------------------------------------------------------

PLACES = ["schema", "header", "header", "metadata", "body", "framing"]
SHARD_TICKET = {
    "stream": "s",
    "table": "steps",
    "window": {"length": 2},
    "gather": "shard",
    "least": 1,
    "block": 8,
    "ahead": 16,
}


def steps_batch(count: int) -> pa.RecordBatch:
    schema = SCHEMA.arrow()
    rows = numbered(count, last=True)
    column = pa.Array.from_buffers(schema.field("row").type, count, [None, pa.py_buffer(rows.view(np.uint8))])
    return pa.RecordBatch.from_arrays([pa.array(np.zeros(count, np.int32)), column], schema=schema)


def told(error: grpc.RpcError | None) -> str:
    """What an error said; it must not be one that nobody thought of."""
    if error is None:
        return ""
    assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    text: str = error.details()  # type: ignore[attr-defined]
    assert "Traceback" not in text
    return text


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.sampled_from(PLACES), st.integers(0, 2**40))
def test_damaged_steps_neither_kill_a_shard_nor_leave_a_trace(shard: Child, where: str, seed: int) -> None:
    parts = put_messages(steps_batch(20), {"writer": f"writer-{seed % 20}"}, SEQUENCE.pack(seed))
    before = shard.state()["tables"]["steps"]["inserted"]
    answers, error = shard.put(damaged_parts(parts, where, random.Random(seed)))
    told(error)
    after = shard.state()["tables"]["steps"]["inserted"]
    if len(answers) < 2:  # the first tells the last sequence number from before
        assert after == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.integers(0, 2**40))
def test_damaged_requests_do_not_kill_a_shard(shard: Child, seed: int) -> None:
    pick = random.Random(seed)
    told(shard.get(protobuf(1, damaged(json.dumps(SHARD_TICKET).encode(), pick))))
    asked = {"table": "steps", "side": "sample", "least": 1, "most": 1, "deleted": 0, "timeout_s": 0.0}
    told(shard.act(protobuf(1, b"lease") + protobuf(2, damaged(json.dumps(asked).encode(), pick))))
    shard.state()


@pytest.mark.parametrize("value", [0, -1, 2, 1.5, 10**9, 2**40, 2**63, 10**30, "all", None, [], True])
@pytest.mark.parametrize("key", ["length", "burn_in", "stack", "observations", "stack_on_device"])
def test_no_window_kills_a_shard(shard: Child, key: str, value: object) -> None:
    ticket = {**SHARD_TICKET, "window": {"length": 2, key: value}}
    told(shard.get(protobuf(1, json.dumps(ticket).encode())))
    shard.state()


def test_a_request_nested_too_deep_is_refused_as_any_other(shard: Child) -> None:
    deep = b"[" * 60_000
    for found in (shard.get(protobuf(1, deep)), shard.act(protobuf(1, b"stats") + protobuf(2, deep))):
        assert "RecursionError" not in str(found)
        assert "expected a JSON object" in str(found) or "bytes of JSON" in str(found)
    shard.state()


def test_a_shard_still_takes_good_steps_after_all_that(shard: Child) -> None:
    before = shard.state()["tables"]["steps"]["inserted"]
    answers, error = shard.put(
        [b"".join(p) for p in put_messages(steps_batch(20), {"writer": "good"}, SEQUENCE.pack(0))]
    )
    assert (answers, error) == ([-1, 0], None)
    assert shard.state()["tables"]["steps"]["inserted"] == before + 19, "the last of an episode is no item"


# -- JSON messages ----------------------------------------------------------------------------------------------------

TICKET: dict[str, Rule] = {
    "stream": str,
    "batch": range(1, 65_537),
    "side": ("insert", "sample"),
    "timeout_s": Between(0, 60),
}
TICKET_OK = {"stream": "a", "batch": 256, "side": "insert", "timeout_s": 1}


def test_a_good_json_message_is_given_back() -> None:
    data = json.dumps(TICKET_OK).encode()
    assert parse_json(data, what="x", required=TICKET) == TICKET_OK
    assert parse_json(pa.py_buffer(data), what="x", required=TICKET) == TICKET_OK
    found = parse_json(b'{"a": 1.5, "b": {}}', what="x", required={"a": float}, optional={"b": dict, "c": list})
    assert found == {"a": 1.5, "b": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the ticket: expected a JSON object, received b''"),
        (b"{", "expected a JSON object"),
        (b"[1]", r"expected a JSON object, received b'\[1\]'"),
        (b"\xff\xfe", "expected a JSON object"),
        (b"[" * 60_000, "expected a JSON object"),
        (b'{"a": ' * 10_000, "expected a JSON object"),
        (b" " * (MAX_JSON_BYTES + 1), "expected at most 65536 bytes of JSON, received 65537"),
        (
            b'{"stream": "a"}',
            r"expected stream \(a text.*batch \(a whole number from 1 to 65536\).*; received \{'stream': 'a'\}",
        ),
        ({"batch": 0}, "expected batch to be a whole number from 1 to 65536, received 0"),
        ({"batch": 1.0}, "expected batch to be a whole number"),
        ({"batch": True}, "expected batch to be a whole number"),
        ({"batch": "1"}, "expected batch to be a whole number"),
        ({"batch": None}, "expected batch to be a whole number"),
        ({"batch": 10**300}, "expected batch to be a whole number"),
        ({"stream": 5}, "expected stream to be a text of up to 1024 characters, received 5"),
        ({"stream": "a" * 1025}, "expected stream to be a text"),
        ({"stream": "\ud800"}, "expected stream to be a text"),
        ({"side": "both"}, "expected side to be one of insert, sample, received 'both'"),
        ({"side": []}, "expected side to be one of"),
        ({"timeout_s": 61}, "expected timeout_s to be a number from 0 to 60, received 61"),
        ({"timeout_s": float("nan")}, "NaN is no number of JSON"),
        ({"timeout_s": float("inf")}, "Infinity is no number of JSON"),
        (json.dumps(TICKET_OK).replace(": 1}", ": 1e999}").encode(), "expected timeout_s to be a number"),
        ({"extra": 1}, r"received .*'extra': 1"),
    ],
)
def test_a_json_message_that_does_not_fit_shows_expected_and_received(
    data: bytes | dict[str, Any], message: str
) -> None:
    if isinstance(data, dict):
        data = json.dumps({**TICKET_OK, **data}).encode()
    with pytest.raises(SchemaError, match=message) as error:
        parse_json(data, what="the ticket", required=TICKET)
    assert str(error.value).startswith("the ticket: ")
    assert len(str(error.value)) < 1000


@given(st.binary(max_size=40) | st.text('{}[]:,"\\ue1-.batchNI ', max_size=40).map(str.encode))
def test_no_json_ends_in_anything_but_an_object_or_a_schema_error(data: bytes) -> None:
    with suppress(SchemaError):
        assert isinstance(parse_json(data, what="x", required={}, optional={"batch": int}), dict)


# -- the token --------------------------------------------------------------------------------------------------------


def run_put(client: flight.FlightClient) -> None:
    descriptor = flight.FlightDescriptor.for_command(b'{"schema": "rows"}')
    writer, replies = client.do_put(descriptor, ROWS)
    writer.write_with_metadata(good_batch(3), b"x")
    writer.done_writing()
    replies.read()
    writer.close()


DESCRIPTOR = flight.FlightDescriptor.for_path("x")
CALLS: dict[str, Callable[[flight.FlightClient], object]] = {
    "do_action": lambda client: list(client.do_action(flight.Action("state", b""))),
    "do_get": lambda client: client.do_get(flight.Ticket(b"")).read_all(),
    "do_put": run_put,
    "do_exchange": lambda client: client.do_exchange(DESCRIPTOR)[1].read_chunk(),
    "list_flights": lambda client: list(client.list_flights()),
    "list_actions": lambda client: list(client.list_actions()),
    "get_flight_info": lambda client: client.get_flight_info(DESCRIPTOR),
    "handshake": lambda client: client.authenticate_basic_token("a", "b"),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    found = Service(Security(TOKEN))
    yield found
    found.close()


@pytest.mark.parametrize("token", [None, "another", TOKEN[:-1], TOKEN + "x"])
@pytest.mark.parametrize("call", CALLS)
def test_every_flight_call_needs_the_token(service: Service, call: str, token: str | None) -> None:
    address = f"127.0.0.1:{service.port}"
    before = service.calls, service.rows
    client = flight.FlightClient(f"grpc://{address}") if token is None else flight_client(address, Security(token))
    with client, pytest.raises(flight.FlightUnauthenticatedError, match="expected the token of this run") as error:
        CALLS[call](client)
    assert isinstance(error.value, REFUSED)
    if call != "handshake":  # which has a header of that name of its own
        assert f"received {'none' if token is None else 'another one'}" in str(error.value)
    assert TOKEN not in str(error.value)
    assert (service.calls, service.rows) == before, "no handler was reached"


@pytest.mark.parametrize("call", ["do_action", "do_get", "do_put"])
def test_with_the_token_they_pass(service: Service, call: str) -> None:
    with flight_client(f"grpc://127.0.0.1:{service.port}", Security(TOKEN)) as client:
        before = service.calls
        CALLS[call](client)
        CALLS[call](client)
        assert service.calls == before + 2


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (("authorization", "Bearer another"),),
        (("authorization", TOKEN),),
        (("authorization", f"bearer {TOKEN}"),),
        (("authorization", ""),),
        (("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer another")),
        (("authorization-bin", f"Bearer {TOKEN}".encode()),),
    ],
)
def test_every_grpc_call_needs_the_token(service: Service, metadata: Any) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.health_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        calls: list[Callable[[], object]] = [
            lambda: stub.Check(request, metadata=metadata, timeout=10),
            lambda: next(stub.Watch(request, metadata=metadata, timeout=10)),
            lambda: channel.unary_unary("/no.such.Service/Call")(b"", metadata=metadata, timeout=10),
            lambda: list(
                channel.stream_stream("/no.such.Service/Call")(iter([b""] * 3), metadata=metadata, timeout=10)
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "expected the token of this run" in error.value.details()
            assert TOKEN not in error.value.details()


def test_a_channel_with_the_token_passes(service: Service) -> None:
    with grpc_channel(f"127.0.0.1:{service.health_port}", Security(TOKEN)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert stub.Check(request, metadata=(("other", "kept"),)).status == health_pb2.HealthCheckResponse.SERVING
        assert next(stub.Watch(request)).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/no.such.Service/Call")(b"")
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_grpc_message_that_is_too_large_is_refused(service: Service) -> None:
    request = health_pb2.HealthCheckRequest(service="x" * (5 * 2**20))
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(f"127.0.0.1:{service.health_port}", options=options) as channel:
        with pytest.raises(grpc.RpcError) as error:
            health_pb2_grpc.HealthStub(channel).Check(request, metadata=(("authorization", f"Bearer {TOKEN}"),))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.value.details()


# -- TLS --------------------------------------------------------------------------------------------------------------


def make_certificate(folder: Path, name: str, *, address: str = "127.0.0.1", days: int = 1) -> tuple[str, str]:
    """A self-signed certificate and its key. Returns their paths."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(pem), str(key_pem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def secure(folder: Path) -> Security:
    return Security(TOKEN, *make_certificate(folder, "server"))


@pytest.fixture(scope="module")
def tls_service(secure: Security) -> Iterator[Service]:
    found = Service(secure)
    yield found
    found.close()


def test_tls_serves_who_trusts_the_certificate(tls_service: Service, secure: Security) -> None:
    assert tls_service.health_port > 0
    for client_side in (secure, Security(TOKEN, authority=secure.certificate)):
        for address in (f"127.0.0.1:{tls_service.port}", f"grpc+tls://127.0.0.1:{tls_service.port}"):
            with flight_client(address, client_side) as client:
                run_put(client)
            assert diagnose(address, client_side) is None
        with grpc_channel(f"127.0.0.1:{tls_service.health_port}", client_side) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert diagnose(f"127.0.0.1:{tls_service.health_port}", client_side) is None


@pytest.mark.parametrize("call", ["do_action", "do_get", "do_put"])
@pytest.mark.parametrize(
    ("token", "authority", "reason"),
    [
        (TOKEN, None, "speaks TLS, and no certificate to trust is set; set replay.tls_authority"),
        (TOKEN, "other", "to show a certificate that .* vouches for, received another one"),
        ("another", "server", None),
    ],
)
def test_tls_refuses_the_rest(
    tls_service: Service, folder: Path, call: str, token: str, authority: str | None, reason: str | None
) -> None:
    make_certificate(folder, "other")
    before = tls_service.calls, tls_service.rows
    security = Security(token, authority=None if authority is None else str(folder / f"{authority}.pem"))
    address = f"127.0.0.1:{tls_service.port}"
    expected = flight.FlightUnauthenticatedError if reason is None else flight.FlightUnavailableError
    with flight_client(address, security) as client, pytest.raises(expected):
        CALLS[call](client)
    with grpc_channel(f"127.0.0.1:{tls_service.health_port}", security) as channel, pytest.raises(grpc.RpcError):
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    for url in (address, f"127.0.0.1:{tls_service.health_port}"):
        found = diagnose(url, security)
        if reason is None:
            assert found is None
        else:
            assert found is not None
            assert re.search(reason, found)
    assert (tls_service.calls, tls_service.rows) == before


def test_a_certificate_for_another_address_is_told(folder: Path) -> None:
    security = Security(TOKEN, *make_certificate(folder, "elsewhere", address="10.1.2.3"))
    service = Service(security)
    try:
        found = diagnose(f"127.0.0.1:{service.port}", security)
        assert found is not None
        assert "IP address mismatch" in found
        assert "must name 127.0.0.1" in found
        client = flight_client(f"127.0.0.1:{service.port}", security)
        with client, pytest.raises(flight.FlightUnavailableError):
            CALLS["do_action"](client)
    finally:
        service.close()


def test_an_expired_certificate_is_told(folder: Path) -> None:
    security = Security(TOKEN, *make_certificate(folder, "old", days=-1))
    service = Service(security)
    try:
        found = diagnose(f"127.0.0.1:{service.port}", security)
        assert found is not None
        assert "certificate has expired" in found
    finally:
        service.close()


def test_a_tls_client_of_a_plain_service_is_told(service: Service, secure: Security) -> None:
    address = f"127.0.0.1:{service.port}"
    with flight_client(address, secure) as client, pytest.raises(flight.FlightUnavailableError):
        CALLS["do_action"](client)
    found = diagnose(address, secure)
    assert found is not None
    assert "to speak TLS, and it does not" in found
    assert diagnose(address, Security(TOKEN)) is None


def test_nobody_listening_is_no_matter_of_the_transport(secure: Security) -> None:
    with flight.FlightServerBase("grpc://127.0.0.1:0") as gone:
        port = gone.port
    assert diagnose(f"127.0.0.1:{port}", secure) is None
    assert diagnose(f"grpc://127.0.0.1:{port}", Security(TOKEN)) is None


def test_an_address_with_tls_is_never_called_without() -> None:
    with pytest.raises(ValueError, match=r"grpc\+tls://127.0.0.1:1 serves TLS.*set replay.tls_authority"):
        flight_client("grpc+tls://127.0.0.1:1", Security(TOKEN))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_token_is_never_shown_and_goes_to_a_child_as_json() -> None:
    security = Security(new_token(), "a.pem", "a.key", "ca.pem")
    assert security.token not in f"{security} {security!r} {[security]}"
    assert Security(**json.loads(json.dumps(asdict(security)))) == security


def test_tokens_are_long_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 43 for token in tokens), "256 bits"
    for token in tokens:
        Security(token)


@pytest.mark.parametrize("token", ["", "two words", "tökén", "line\n", "\x00"])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match=r"expected a token of printable ASCII.*new_token\(\)") as error:
        Security(token)
    assert not token or token not in str(error.value)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="received the certificate alone; add the key"):
        Security(TOKEN, certificate="a.pem")
    with pytest.raises(ValueError, match="received the key alone; add the certificate"):
        Security(TOKEN, key="a.key")


def test_tls_files_that_cannot_be_used_are_named_at_start(folder: Path, secure: Security) -> None:
    other, other_key = make_certificate(folder, "third")
    text = folder / "text"
    text.write_text("no PEM")
    assert secure.certificate is not None
    assert secure.key is not None
    cases = [
        (
            Security(TOKEN, str(folder / "none"), secure.key),
            r"cannot read the TLS certificate .*none on .*tls_certificate",
        ),
        (Security(TOKEN, secure.certificate, str(folder / "none")), "cannot read the TLS key .*correct replay.tls_key"),
        (Security(TOKEN, secure.certificate, other_key), "KEY_VALUES_MISMATCH"),
        (Security(TOKEN, str(text), secure.key), "expected a PEM certificate and its unencrypted key"),
        (Security(TOKEN, other, other_key, str(text)), "expected PEM certificates, received .*text"),
    ]
    for security, message in cases:
        with pytest.raises(ValueError, match=message):
            flight_server_options(security)
    secure.check_files()


@pytest.mark.parametrize(
    ("host", "warned"),
    [
        ("127.0.0.1", False),
        ("127.8.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("[::1]", False),
        ("0.0.0.0", True),
        ("::", True),
        ("10.0.0.5", True),
        ("node", True),
        ("replay.example.org", True),
    ],
)
def test_a_token_in_clear_on_a_network_is_warned_about(host: str, warned: bool) -> None:
    found = check_host(host, Security(TOKEN))
    assert (found is not None) == warned
    if found is not None:
        assert f"replay.host is {host}" in found
        assert "set replay.tls_certificate" in found
    assert check_host(host, Security(TOKEN, "a.pem", "a.key")) is None


def test_locations() -> None:
    plain, tls = Security(TOKEN), Security(TOKEN, "a.pem", "a.key")
    assert flight_location("127.0.0.1", 5, plain) == "grpc://127.0.0.1:5"
    assert flight_location("::1", 5, tls) == "grpc+tls://[::1]:5"
    assert flight_location("[::1]", 5, plain) == "grpc://[::1]:5"
