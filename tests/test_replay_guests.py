"""Guests of a shard: what their token allows, how their rows are checked, and that none of them hurts anybody else."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.ending import end_serving
from replay.guests import PREFIX, Fault, GuestLimits, RowBudget, RowCheck, guest_named, guest_token
from replay.process import ShardProcess
from replay.rate_limit import RateLimit
from replay.samplers import stream_sampler
from replay.schema import Field, StepSchema, Window
from replay.security import Security, flight_client, flight_location, flight_server_options, grpc_channel, new_token
from replay.server import ShardServer
from replay.shard import ShardSpec
from replay.wire import CLOSE, LOST, SEQUENCE, action, column

from .shards_for_tests import SECURITY, checked, connect, wait_until, writer_to
from .shards_for_tests import spec_of as any_spec
from .test_replay_security import damaged_parts, put_messages

NAME = PREFIX + "a"
SCHEMA = StepSchema(
    {"observation": Field("observation", "float32", (3,))},
    Field("action", "float32", (2,)),
    (Field("state", "float16", (2,)), Field("seen", "bool", (2,))),
)
DISCRETE = StepSchema({"observation": Field("observation", "uint8", (4,))}, Field("action", "int64", choices=5))
DO_PUT = "/arrow.flight.protocol.FlightService/DoPut"


def spec_of(directory: Path, *, schema: StepSchema = SCHEMA, **changes: Any) -> ShardSpec:
    return any_spec(directory, schema=schema.to_json(), **changes)


@contextmanager
def serving(spec: ShardSpec, *, recover: bool = False, keep: bool = False) -> Iterator[ShardServer]:
    server = ShardServer(spec, SECURITY, recover=recover)
    try:
        yield server
    finally:
        server.close(remove=not keep)


def batch_of(rows: np.ndarray, lanes: Sequence[int] | int = 0, schema: StepSchema = SCHEMA) -> pa.RecordBatch:
    numbers = np.broadcast_to(np.asarray(lanes, np.int32), len(rows))
    columns = [
        pa.array(numbers),
        column(pa.binary(schema.dtype.itemsize), np.frombuffer(rows.tobytes(), np.uint8), len(rows)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema.arrow())


def episode(count: int, first: int = 0, *, begins: bool = True, ends: bool = False) -> np.ndarray:
    """Steps of one lane whose reward is their number, from `first` on."""
    rows = SCHEMA.zeros(count)
    rows["reward"] = np.arange(first, first + count)
    rows["observation"] = rows["reward"][:, None]
    rows["is_first"][0], rows["is_last"][-1] = begins, ends
    return rows


class Guest:
    """What a program outside writes with: a plain Flight client."""

    def __init__(self, address: str, name: str = NAME, *, schema: StepSchema = SCHEMA, writer: str = "") -> None:
        self.client = flight_client(address, Security(guest_token(SECURITY, name)))
        descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": writer or name}).encode())
        self._put, self._answers = self.client.do_put(descriptor, schema.arrow())
        self.last = self.number = self.answer()[0]  # of the last message applied

    def answer(self) -> tuple[int, str]:
        """The number and the text of an answer."""
        found = self._answers.read()
        if found is None:
            self._put.close()  # raises why
            raise AssertionError("the stream ended without an error")
        said = found.to_pybytes()
        return SEQUENCE.unpack(said[:8])[0], said[8:].decode()

    def send(self, batch: pa.RecordBatch, note: bytes | None = None) -> None:
        self.number += 1
        self._put.write_with_metadata(batch, SEQUENCE.pack(self.number) if note is None else note)

    def write(self, rows: np.ndarray, lanes: Sequence[int] | int = 0, schema: StepSchema = SCHEMA) -> str:
        """Send a message. Returns why it was refused; "": it was not."""
        self.send(batch_of(rows, lanes, schema))
        number, why = self.answer()
        assert number == self.number
        return why

    def close(self, *, done: bool = True) -> None:
        with suppress(*LOST):
            if done:
                self._put.write_metadata(CLOSE)
            self._put.close()
        self.client.close()


def stored(server: ShardServer) -> list[tuple[float, float]]:
    """The rewards of each item and of the row after it."""
    items = server.shard.table("steps").items
    if not items:
        return []
    drawn = server.shard.sample("steps", 40 * items, 40 * items, Window(), timeout_s=5.0)
    assert drawn is not None
    steps = drawn[1].steps
    return sorted({(float(a), float(b)) for a, b in steps["reward"]})


# -- tokens -----------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"outside-[A-Za-z0-9._-]{1,100}", fullmatch=True)


@given(NAMES, NAMES, st.integers(0, 2**30))
def test_a_guests_token_is_that_of_its_name_and_run_alone(name: str, other: str, at: int) -> None:
    token = guest_token(SECURITY, name)
    assert guest_named(SECURITY, token) == name
    assert guest_token(SECURITY.token, name) == token  # nothing else goes into it
    assert guest_named(new_token(), token) is None
    seal = token.partition(":")[2]
    assert guest_named(SECURITY, f"{other}:{seal}") == (name if other == name else None)
    at %= len(token)
    for changed in (token[:at] + chr(ord(token[at]) ^ 1) + token[at + 1 :], token[:at], token + "=", token + "\n"):
        assert guest_named(SECURITY, changed) is None
    assert SECURITY.token not in token


@pytest.mark.parametrize(
    "name", ["", "a", "outside", PREFIX, "Outside-a", "outside-a b", "outside-a\n", "outside-ä", "outside-" + 101 * "a"]
)
def test_only_names_of_guests_have_tokens(name: str) -> None:
    with pytest.raises(ValueError, match="expected a guest's name, 'outside-'"):
        guest_token(SECURITY, name)
    with pytest.raises(ValueError, match="expected a guest's name, 'outside-'"):
        guest_named(SECURITY, guest_token(SECURITY, "outside-b").replace("outside-b", name)) or guest_token("x", name)


def test_a_guests_token_allows_writing_as_it_and_nothing_else(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server:
        before = server.stats()["tables"]["steps"]["items"]
        client = flight_client(server.address, Security(guest_token(SECURITY, NAME)))

        def put(command: bytes, schema: pa.Schema | None = None) -> None:
            descriptor = flight.FlightDescriptor.for_command(command)
            stream, answers = client.do_put(descriptor, schema or SCHEMA.arrow())
            assert answers.read() is None
            stream.close()

        priorities = pa.schema([("item", pa.int64()), ("priority", pa.float64())])
        ticket = {"stream": "s", "table": "steps", "window": {}, "gather": "shard", "least": 1, "block": 1, "ahead": 1}
        descriptor = flight.FlightDescriptor.for_command(b"{}")
        queue = json.dumps({"queue": "q", "writer": NAME}).encode()
        refused: list[Callable[[], object]] = [
            lambda: client.do_get(flight.Ticket(json.dumps(ticket).encode())).read_all(),
            lambda: list(client.list_flights()),
            lambda: client.get_flight_info(descriptor),
            lambda: client.get_schema(descriptor),
            lambda: list(client.list_actions()),
            lambda: client.do_exchange(descriptor)[1].read_chunk(),
            lambda: put(b'{"priorities": "steps"}', priorities),
            lambda: put(b'{"acknowledge": "s"}'),
            lambda: put(json.dumps({"writer": PREFIX + "b"}).encode()),
            lambda: put(b'{"writer": "actor-0"}'),
            lambda: put(json.dumps({"writer": NAME, "priorities": "steps"}).encode()),
            lambda: put(b""),
            lambda: put(queue),
        ]
        for kind in ("stats", "describe", "snapshot", "lease", "take_back", "quarantine", "readmit", "no such"):
            refused.append(lambda kind=kind: action(client, kind, {"writer": NAME}))  # type: ignore[misc]
        for call in refused:
            # Of get_schema pyarrow tells the error as an OSError.
            with pytest.raises((flight.FlightUnauthorizedError, OSError), match=f"the token of {NAME} lets it write"):
                call()
        stats = server.stats()
        assert (stats["tables"]["steps"]["items"], stats["writers"]) == (before, 0)
        assert stats["guests"][NAME]["refused"] == 0
        client.close()
        with closing(Guest(server.address)) as guest:  # the same token, for what it is there for
            assert guest.write(episode(3)) == ""


def test_who_shows_another_token_is_told_so_as_ever(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server:
        for token in (new_token(), guest_token(new_token(), NAME), guest_token(SECURITY, NAME)[:-1]):
            with (
                closing(flight_client(server.address, Security(token))) as client,
                pytest.raises(flight.FlightUnauthenticatedError, match="expected the token of this run"),
            ):
                action(client, "stats", {})
        assert server.stats()["guests"] == {}


def test_a_service_that_takes_no_guests_refuses_their_tokens() -> None:
    class Plain(flight.FlightServerBase):  # type: ignore[misc]
        def do_action(self, context: Any, request: Any) -> list[bytes]:
            return [b"{}"]

    server = Plain(flight_location("127.0.0.1", 0, SECURITY), **flight_server_options(SECURITY))
    try:
        client = flight_client(f"127.0.0.1:{server.port}", Security(guest_token(SECURITY, NAME)))
        with closing(client), pytest.raises(flight.FlightUnauthenticatedError, match="expected the token of this run"):
            action(client, "stats", {})
    finally:
        end_serving(server, grace_s=1.0)


# -- rows -------------------------------------------------------------------------------------------------------------

LANES = 4


def reference(
    schema: StepSchema, lanes: np.ndarray, rows: np.ndarray, is_open: dict[int, bool], begin: int
) -> tuple[int, str, bool] | None:
    """The rules of `RowCheck`, step by step: the first wrong row, the field it is told for, and whether that is its lane
    having no episode."""
    going = dict(is_open)
    for row, (lane, step) in enumerate(zip(lanes.tolist(), rows, strict=True)):
        # numpy makes a bool of 0 or 1 of every byte that is read as one.
        places = {f.name: schema.dtype.fields[f.name][1] for f in schema.fields}  # type: ignore[index]
        raw = {f.name: rows[row : row + 1].tobytes()[places[f.name] :][: f.nbytes] for f in schema.fields}
        first, last, terminal = (raw[name] != b"\0" for name in ("is_first", "is_last", "is_terminal"))
        wrong: list[tuple[str, bool]] = []
        if not 0 <= lane < LANES:
            wrong.append(("a lane from 0 to 3", False))
        for field in schema.fields:
            if field.dtype == "bool" and any(byte > 1 for byte in raw[field.name]):
                wrong.append((f"{field.name} to be 0 or 1", False))
        for field in schema.fields:
            if "float" in field.dtype and any(
                value != value or abs(value) == np.inf for value in np.ravel(step[field.name])
            ):
                wrong.append((f"{field.name} to be finite", False))
        for value in np.ravel(step["action"]):
            if schema.action.choices and not 0 <= value < schema.action.choices:
                wrong.append((f"action to be from 0 to {schema.action.choices - 1}", False))
            if not schema.action.choices and not (-1 <= value <= 1) and not np.isnan(value):
                wrong.append(("action to be within", False))
        if step["policy_version"] < 0:
            wrong.append(("policy_version to be 0 or more", False))
        if terminal and not last:
            wrong.append(("is_last where is_terminal", False))
        if row >= begin:
            if going.get(lane, False) == first:
                wrong.append(("before is_first", False) if first else ("expected is_first", True))
            going[lane] = not last
        if wrong:
            return row, *wrong[0]
    return None


@st.composite
def messages(draw: Any) -> tuple[StepSchema, np.ndarray, np.ndarray, dict[int, bool], int]:
    """Rows in order, but for a few faults."""
    schema = draw(st.sampled_from([SCHEMA, DISCRETE]))
    pick = random.Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 24))
    begin = draw(st.integers(0, min(count, 3)))
    lanes = np.array([pick.randrange(LANES) for _ in range(count)], np.int32)
    rows = schema.zeros(count)
    is_open = {lane: pick.random() < 0.5 for lane in range(LANES)}
    going = dict(is_open)
    for row, lane in enumerate(lanes.tolist()):
        if row >= begin:
            rows["is_first"][row] = not going[lane]
            going[lane] = pick.random() < 0.7
            rows["is_last"][row] = not going[lane]
            rows["is_terminal"][row] = not going[lane] and pick.random() < 0.5
    floats = [f.name for f in schema.fields if "float" in f.dtype]
    for _ in range(draw(st.integers(0, 3)) if count else 0):
        row = pick.randrange(count)
        match pick.randrange(7):
            case 0:
                lanes[row] = pick.choice([-1, LANES, 2**31 - 1, -(2**31), pick.randrange(LANES)])
            case 1:
                name = pick.choice(floats)
                values = rows[name].reshape(count, -1)  # a copy where it is strided
                values[row, pick.randrange(values.shape[1])] = pick.choice([np.nan, np.inf, -np.inf])
                rows[name] = values.reshape(rows[name].shape)
            case 2:
                values = rows["action"].reshape(count, -1)
                at = pick.randrange(values.shape[1])
                if schema.action.choices:
                    values[row, at] = pick.choice([-1, 0, 4, 5, 2**62, -(2**63)])
                else:
                    values[row, at] = pick.choice([-1.0, 1.0, np.nextafter(np.float32(1), np.float32(2)), -1e30])
                rows["action"] = values.reshape(rows["action"].shape)
            case 3:
                rows["policy_version"][row] = pick.choice([-1, -(2**31), 2**31 - 1])
            case 4:
                flag = pick.choice([f.name for f in schema.fields if f.dtype == "bool"])
                rows[flag].view(np.uint8)[row] = pick.choice([2, 255])
            case _:
                flag = pick.choice(["is_first", "is_last", "is_terminal"])
                rows[flag][row] ^= True
    return schema, lanes, rows, is_open, begin


@settings(max_examples=250, deadline=None)
@given(messages())
def test_the_check_of_rows_finds_what_one_that_looks_at_each_step_finds(
    message: tuple[StepSchema, np.ndarray, np.ndarray, dict[int, bool], int],
) -> None:
    schema, lanes, rows, is_open, begin = message
    open_now = np.array([is_open.get(lane, False) for lane in lanes.tolist()], bool)
    found = RowCheck(schema, LANES)(lanes, rows, open_now, begin=begin)
    expected = reference(schema, lanes, rows, is_open, begin)
    if expected is None:
        assert found is None
    else:
        row, words, unopened = expected
        assert found is not None
        assert (found.row, found.unopened) == (row, unopened)
        assert words in found.what


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reward": np.nan}, "row 2: expected reward to be finite, received nan"),
        ({"observation": (0, np.inf, 0)}, "row 2: expected observation to be finite, received inf at [1]"),
        ({"action": (0, -1.5)}, "row 2: expected action to be within [−1, 1], received -1.5 at [1]"),
        ({"policy_version": -7}, "row 2: expected policy_version to be 0 or more, received -7"),
        ({"is_terminal": True}, "row 2: expected is_last where is_terminal is set, received is_terminal alone"),
        ({"is_first": True}, "row 2: expected is_last in lane 1 before is_first, received is_first in an open episode"),
    ],
)
def test_a_fault_tells_row_field_value_and_what_was_expected(change: dict[str, Any], expected: str) -> None:
    rows = episode(4)
    for name, value in change.items():
        rows[name][2] = value
    fault = RowCheck(SCHEMA, 2)(np.ones(4, np.int32), rows, np.zeros(4, bool))
    assert isinstance(fault, Fault)
    assert str(fault) == expected


def test_a_discrete_action_must_be_one_of_its_choices(tmp_path: Path) -> None:
    rows = DISCRETE.zeros(3)
    rows["is_first"][0], rows["action"] = True, [0, 4, 5]
    with (
        serving(spec_of(tmp_path, schema=DISCRETE)) as server,
        closing(Guest(server.address, schema=DISCRETE)) as guest,
    ):
        why = guest.write(rows, schema=DISCRETE)
        assert "message 0, row 2: expected action to be from 0 to 4, received 5" in why
        rows["action"][2] = 3
        assert guest.write(rows, schema=DISCRETE) == ""


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refused_message_leaves_nothing_and_the_guest_goes_on_with_its_next(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server, closing(Guest(server.address)) as guest:
        assert guest.write(episode(3)) == ""
        assert guest.write(episode(2, 10), 1) == ""
        assert stored(server) == [(0, 1), (1, 2), (10, 11)]
        bad = episode(4, 3, begins=False)
        bad["reward"][3] = np.nan
        why = guest.write(bad)
        assert "row 3: expected reward to be finite, received nan; nothing of it is stored" in why
        assert stored(server) == [
            (0, 1),
            (1, 0),
            (10, 11),
        ]  # what was the newest row is an episode's last now, and void
        assert "row 0: expected is_first, for lane 0 has no open episode" in guest.write(episode(1, 7, begins=False))
        assert guest.write(episode(2, 20)) == ""
        assert guest.write(episode(2, 12, begins=False), 1) == ""  # the other lane has gone on all along
        assert stored(server) == [(0, 1), (1, 0), (10, 11), (11, 12), (12, 13), (20, 21)]
        found = server.stats()["guests"][NAME]
        assert (found["rows"], found["refused"], found["quarantined"]) == (9, 2, False)
        assert "message 3, row 0: expected is_first" in found["last_refusal"]
        limiter = server.stats()["tables"]["steps"]["limiter"]
        assert limiter["inserted"] == 8  # six items, and the newest row of each open lane, which is to be one
    assert guest.number == 5


def test_what_was_in_flight_when_a_message_was_refused_is_refused_and_not_held_against_the_guest(
    tmp_path: Path,
) -> None:
    limits = GuestLimits(bad_messages=2)
    with serving(spec_of(tmp_path, guests=limits)) as server, closing(Guest(server.address)) as guest:
        bad = episode(2)
        bad["reward"] = np.inf
        for message in (bad, *(episode(2, 2 * k, begins=False) for k in range(1, 9)), episode(2, 90)):
            guest.send(batch_of(message))
        answers = [guest.answer() for _ in range(10)]
        assert [number for number, _ in answers] == list(range(10))
        assert [bool(why) for _, why in answers] == [True] * 9 + [False]
        assert stored(server) == [(90, 91)]
        assert guest.write(episode(1, 92, begins=False, ends=True)) == ""
        assert not server.stats()["guests"][NAME]["quarantined"]
        assert "has no open episode" in guest.write(episode(1, 93, begins=False))  # that is a fault of its own
        assert server.stats()["guests"][NAME]["quarantined"]


@pytest.mark.parametrize("rows", [1025, 100_000])
def test_a_message_with_too_many_rows_is_refused(tmp_path: Path, rows: int) -> None:
    with serving(spec_of(tmp_path)) as server, closing(Guest(server.address)) as guest:
        assert f"expected at most 1024 rows in a batch, received {rows}" in guest.write(episode(rows))
        assert guest.write(episode(1024)) == ""  # the most there may be are not too many bytes


def test_guests_together_leave_most_lanes_to_the_runs_own_writers(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, guests=GuestLimits(lanes=12))  # 64 segments: guests may have 16 lanes
    with serving(spec) as server, ExitStack() as stack:
        first, second = (stack.enter_context(closing(Guest(server.address, PREFIX + name))) for name in "ab")
        rows = SCHEMA.zeros(12)
        rows["is_first"] = True
        assert first.write(rows, range(12)) == ""
        second.send(batch_of(rows, range(12)))
        with pytest.raises(flight.FlightServerError, match=r"at most 16 lanes .*, received 12 more beside 12"):
            second.answer()
        assert "expected a lane from 0 to 11, received 12" in first.write(rows[:1], 12)
        with closing(writer_to(server.address, SCHEMA)) as writer:
            many = SCHEMA.zeros(40)
            many["is_first"] = True
            writer.append(np.arange(40, dtype=np.int32), many)
            writer.flush()


def test_a_message_sent_again_after_a_lost_connection_is_applied_once(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server:
        guest = Guest(server.address)
        assert guest.write(episode(3)) == ""
        guest.close(done=False)
        with closing(Guest(server.address)) as again:
            assert again.last == 0
            again.number = -1
            assert again.write(episode(3)) == ""  # begins an episode in an open lane, and was applied all the same
            assert again.write(episode(2, 3, begins=False, ends=True)) == ""
        assert stored(server) == [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert server.stats()["guests"][NAME]["rows"] == 5


def test_a_message_that_a_crash_cut_in_two_is_gone_on_with_where_it_was_cut(tmp_path: Path) -> None:
    """Its first row begins an episode, and that episode's rows up to the crash are there already."""
    spec = spec_of(tmp_path, segment_steps=16)
    whole = episode(100)
    whole["is_last"][49] = whole["is_first"][50] = True
    with ShardProcess(spec, SECURITY, environment={"MILLRACE_FAULT": "record_applied:4"}) as first:
        guest = Guest(first.address)
        guest.send(batch_of(whole))
        with pytest.raises(LOST):
            guest.answer()
        guest.close(done=False)
        first.wait(20)
    with serving(spec, recover=True) as server:
        assert 0 < server.stats()["tables"]["steps"]["items"] < 90
        with closing(Guest(server.address)) as again:
            assert again.last == -1
            assert again.write(whole) == ""
            assert again.write(episode(2, 100, begins=False)) == ""
            assert stored(server) == [(k, k + 1) for k in range(101) if k != 49]


# -- shutting out -----------------------------------------------------------------------------------------------------


def quarantined(server: ShardServer, *, most: int) -> None:
    """Have a guest shut out, with one lane in an episode."""
    guest = Guest(server.address)
    assert guest.write(episode(3), 1) == ""
    for k in range(most):
        bad = episode(2)
        bad["policy_version"][1] = -1
        assert "row 1: expected policy_version to be 0 or more, received -1" in guest.write(bad)
        assert server.stats()["guests"][NAME]["quarantined"] == (k == most - 1)
    with pytest.raises(
        flight.FlightUnauthorizedError, match=rf"{NAME} is shut out: {most} of its messages were refused"
    ):
        guest.answer()
    guest.close(done=False)


def test_a_guest_is_shut_out_after_its_bad_messages_until_it_is_let_in_again(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path, guests=GuestLimits(bad_messages=3))) as server:
        quarantined(server, most=3)
        assert stored(server) == [(0, 1), (1, 0)]  # its lane's episode was truncated
        assert server.stats()["tables"]["steps"]["limiter"]["inserted"] == 2
        for _ in range(2):
            with pytest.raises(
                flight.FlightUnauthorizedError, match=r"3 of its messages .* the last: message 3, row 1"
            ):
                Guest(server.address)
        with closing(grpc_channel(server.address, Security(guest_token(SECURITY, NAME)))) as channel:
            over = threading.Event()
            nothing: Iterator[bytes] = iter(over.wait, True)  # type: ignore[arg-type]
            with pytest.raises(grpc.RpcError, match=f"{NAME} is shut out"):  # before it has sent anything
                list(channel.stream_stream(DO_PUT, bytes, bytes)(nothing, timeout=20))
            over.set()
        with closing(Guest(server.address, PREFIX + "b")) as other:  # nobody else is
            assert other.write(episode(2, 50, ends=True)) == ""
        with closing(connect(server.address)) as operator:
            action(operator, "readmit", {"writer": NAME})
            with pytest.raises(flight.FlightServerError, match="expected a guest's name"):
                action(operator, "quarantine", {"writer": "actor-0", "why": "it is none"})
        with closing(Guest(server.address)) as guest:
            assert guest.last == 0
            guest.number = 3
            assert guest.write(episode(2, 70, ends=True), 1) == ""
        assert stored(server) == [(0, 1), (1, 0), (50, 51), (70, 71)]


def test_a_guest_stays_shut_out_when_the_shard_comes_back(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, guests=GuestLimits(bad_messages=1))
    with serving(spec, keep=True) as server:
        quarantined(server, most=1)
    with serving(spec, recover=True, keep=True) as server:
        with pytest.raises(flight.FlightUnauthorizedError, match=f"writer {NAME} was closed"):
            Guest(server.address)
        server.readmit(NAME)
        guest = Guest(server.address)
        assert guest.last == 0
        guest.number = 1
        assert guest.write(episode(2, 70)) == ""
        guest.close(done=False)
    with serving(spec, recover=True) as server, closing(Guest(server.address)) as guest:
        assert guest.last == 2  # nor is it shut out again


def test_an_operator_shuts_a_guest_out_whatever_it_is_doing(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server, closing(connect(server.address)) as operator:
        guest = Guest(server.address)
        assert guest.write(episode(3)) == ""
        action(operator, "quarantine", {"writer": NAME, "why": "its rewards are made up"})
        wait_until(lambda: server.stats()["guests"][NAME]["streams"] == 0)  # it has sent nothing, and is gone
        with pytest.raises(flight.FlightUnauthorizedError, match="shut out: its rewards are made up"):
            Guest(server.address)
        guest.close(done=False)
        assert server.stats()["writers"] == 0


def test_a_newer_stream_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server:
        streams = []
        for k in range(5):  # each of the older ones waits for ever
            wait_until(lambda: server.stats()["guests"].get(NAME, {"streams": 0})["streams"] <= 1)
            streams.append(Guest(server.address))
            assert streams[-1].write(episode(2, 10 * k, begins=k == 0)) == ""
        wait_until(lambda: server.stats()["guests"][NAME]["streams"] == 1)
        with pytest.raises(LOST):
            streams[0].answer()
        for guest in streams:
            guest.close(done=False)


def test_a_guest_has_no_more_than_two_streams_at_once(tmp_path: Path) -> None:
    with serving(spec_of(tmp_path)) as server:

        def refusal() -> str:
            try:
                Guest(server.address).close(done=False)
            except flight.FlightUnavailableError as error:
                return str(error)
            return ""

        over = threading.Event()
        with ExitStack() as stack:
            stack.callback(over.set)

            def is_full() -> bool:
                if f"{NAME} has 2 streams open, as many as it may" in refusal():
                    return True
                stalled(server.address, NAME, [], over, stack)  # the try before may have been quicker than one of these
                time.sleep(0.1)
                return False

            wait_until(is_full)
            with closing(Guest(server.address, PREFIX + "b")) as other:
                assert other.write(episode(2)) == ""

        wait_until(lambda: not refusal())  # they have ended


# -- pace -------------------------------------------------------------------------------------------------------------


@given(st.floats(1.0, 1e5), st.lists(st.tuples(st.integers(1, 2000), st.floats(0.0, 3.0)), min_size=1, max_size=50))
def test_no_more_rows_pass_than_the_rate_and_one_second_of_it_allow(rate: float, sent: list[tuple[int, float]]) -> None:
    now = 0.0
    budget = RowBudget(rate, lambda: now)
    passed = 0
    for rows, pause in sent:
        wait = budget.spend(rows)
        assert passed <= rate * (now + 1) * (1 + 1e-9)  # whatever came before, when this one was read
        passed += rows
        assert wait == pytest.approx(max(0.0, wait))
        now += wait + pause


def test_a_budget_holds_nobody_back_who_keeps_to_his_rate() -> None:
    now = 0.0
    budget = RowBudget(100.0, lambda: now)
    for _ in range(50):
        assert budget.spend(50) == 0.0
        now += 0.5
    assert budget.spend(100) == 0.0
    assert budget.spend(50) == pytest.approx(0.5)


def test_a_guest_that_is_too_fast_is_read_later_and_nobody_else_is(tmp_path: Path) -> None:
    rate, rows = 2000.0, 512
    with serving(spec_of(tmp_path, guests=GuestLimits(rows_per_s=rate))) as server:
        guest = Guest(server.address)
        began = time.monotonic()
        for k in range(12):
            guest.send(batch_of(episode(rows, begins=k == 0)))
        with closing(writer_to(server.address, SCHEMA)) as writer:
            writer.append(np.zeros(3000, np.int32), episode(3000))
            writer.flush()
        assert server.stats()["guests"][NAME]["rows"] < 12 * rows  # the writer was not behind it
        for _ in range(12):
            assert guest.answer()[1] == ""
        assert time.monotonic() - began >= (11 * rows - rate) / rate - 0.1
        assert server.stats()["guests"][NAME]["waiting_s"] > 1.0
        guest.close()


def test_a_guest_that_waits_for_a_limiter_holds_up_neither_sampling_nor_questions(tmp_path: Path) -> None:
    limit = RateLimit.from_samples_per_insert(1.0, min_size=4, error_buffer=8.0)
    with serving(spec_of(tmp_path, limits=(limit,))) as server:
        guest = Guest(server.address)
        for k in range(8):
            guest.send(batch_of(episode(4, begins=k == 0)))
        wait_until(lambda: server.stats()["tables"]["steps"]["time/waiting_for_samples_s"] > 0)
        held = server.stats()["tables"]["steps"]["items"]
        assert 0 < held < 31
        sampled = 0
        deadline = time.monotonic() + 20
        while server.stats()["tables"]["steps"]["items"] < 31:
            assert time.monotonic() < deadline
            drawn = server.shard.draw("steps", 1, 4, timeout_s=1.0)
            sampled += 0 if drawn is None else len(drawn)
        assert sampled > 0
        guest.close()


# -- hostile guests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardProcess]:
    """In a process of its own, so that a crash of it is seen and survived."""
    spec = spec_of(tmp_path_factory.mktemp("guests"), schema=CHECKED, capacity=65_536)
    with ShardProcess(replace(spec, guests=GuestLimits(lanes=8)), SECURITY) as process:
        yield process


CHECKED = StepSchema({"observation": Field("observation", "float32", (3,))}, Field("action", "int64", (2,)))


def stats_of(shard: ShardProcess) -> dict[str, Any]:
    return shard.stats()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.sampled_from(["schema", "header", "header", "metadata", "body", "body", "framing"]), st.integers(0, 2**40))
def test_a_damaged_message_of_a_guest_changes_nothing_but_what_was_answered(
    shard: ShardProcess, where: str, seed: int
) -> None:
    pick = random.Random(f"{where} {seed}")
    name = f"{PREFIX}{where}-{seed}"
    rows = checked(CHECKED, 0, 20, episode=5)
    parts = put_messages(batch_of(rows, 0, CHECKED), {"writer": name}, SEQUENCE.pack(0))
    before = stats_of(shard)["tables"]["steps"]["inserted"]
    answers: list[bytes] = []
    code = None
    with closing(grpc_channel(shard.address, Security(guest_token(SECURITY, name)))) as channel:
        try:
            for answer in channel.stream_stream(DO_PUT, bytes, bytes)(
                iter(damaged_parts(parts, where, pick)), timeout=20
            ):
                answers.append(answer)
        except grpc.RpcError as error:
            code = error.code()
    assert code is not grpc.StatusCode.DEADLINE_EXCEEDED
    after = stats_of(shard)
    applied = after["guests"].get(name, {"rows": 0})["rows"]
    assert applied in (0, 20)
    assert after["tables"]["steps"]["inserted"] == before + 16 * (applied // 20)
    # Rows told as refused are not there: a first answer, then one of 8 bytes alone for what was applied.
    assert applied == 0 or any(len(answer) < 24 for answer in answers[1:])


class Trickle:
    """A way to a port that lets the first bytes through at once and then one at a time, slowly."""

    def __init__(self, address: str, at_once: int) -> None:
        self._target = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._at_once = at_once
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                threading.Thread(target=self._forth, args=(near, far), daemon=True).start()
                threading.Thread(target=self._back, args=(far, near), daemon=True).start()

    def _forth(self, near: socket.socket, far: socket.socket) -> None:
        left = self._at_once
        with near, far, suppress(OSError):
            while not self._over.is_set() and (data := near.recv(left if left > 0 else 1)):
                far.sendall(data)
                left -= len(data)
                if left <= 0:
                    self._over.wait(0.2)

    def _back(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(65_536):
                near.sendall(data)

    def close(self) -> None:
        self._over.set()
        self._listener.close()


def stalled(address: str, name: str, messages: Sequence[bytes], over: threading.Event, stack: ExitStack) -> None:
    """A guest that sends these messages at once, and then neither sends, nor reads, nor ends."""

    def sending() -> Iterator[bytes]:
        yield from messages
        over.wait()

    channel = stack.enter_context(closing(grpc_channel(address, Security(guest_token(SECURITY, name)))))
    call = channel.stream_stream(DO_PUT, bytes, bytes)(sending())
    stack.callback(call.cancel)


def test_a_writer_and_a_reader_go_on_beside_hostile_guests(shard: ShardProcess) -> None:
    """Sixteen of them: silent from the start, silent after the schema, deaf to answers, and a byte at a time."""
    good = batch_of(checked(CHECKED, 0, 4, episode=2), 0, CHECKED)
    bad_rows = checked(CHECKED, 0, 4, episode=2)
    bad_rows["reward"] = np.nan
    bad = batch_of(bad_rows, 0, CHECKED)
    over = threading.Event()
    began = stats_of(shard)["tables"]["steps"]["inserted"]
    with ExitStack() as stack:
        stack.callback(over.set)
        slow = stack.enter_context(closing(Trickle(shard.address, 1500)))
        for k in range(4):
            schema, message = put_messages(good, {"writer": f"{PREFIX}deaf-{k}"}, SEQUENCE.pack(0))
            stalled(shard.address, f"{PREFIX}silent-{k}", [], over, stack)
            mute, _ = put_messages(good, {"writer": f"{PREFIX}mute-{k}"})
            stalled(shard.address, f"{PREFIX}mute-{k}", [mute[0]], over, stack)
            again = [b"".join(put_messages(bad, {"writer": ""}, SEQUENCE.pack(n))[1]) for n in range(1, 200)]
            stalled(shard.address, f"{PREFIX}deaf-{k}", [schema[0], b"".join(message), *again], over, stack)
            drip = put_messages(good, {"writer": f"{PREFIX}drip-{k}"}, SEQUENCE.pack(0))
            stalled(slow.address, f"{PREFIX}drip-{k}", [b"".join(part) for part in drip], over, stack)
        wait_until(lambda: sum(known["quarantined"] for known in stats_of(shard)["guests"].values()) == 4)

        first, count = 1_000_000, 20_000
        with closing(writer_to(shard.address, CHECKED)) as writer:
            sampler = stream_sampler(
                [shard.address], CHECKED, batch_size=64, seed=0, security=SECURITY, transport="flight"
            )
            stack.callback(sampler.close)
            for at in range(0, count, 500):
                writer.append(np.zeros(500, np.int32), checked(CHECKED, first + at, 500, episode=10))
            writer.flush()
            for _ in range(20):
                assert len(sampler.sample(timeout_s=20.0)) == 64
        found = stats_of(shard)
        deaf = [known for name, known in found["guests"].items() if name.startswith(PREFIX + "deaf")]
        assert [known["rows"] for known in deaf] == [4] * 4
        # Every step of the writer but its episodes' last, and what the deaf ones sent before.
        assert found["tables"]["steps"]["inserted"] - began == count * 9 // 10 + 4 * 2
