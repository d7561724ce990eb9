"""The control plane, served for a small run without Ray: calls, who may make them, errors, hostile callers, the commands."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.control as control
from cluster.cli import main
from cluster.control import ControlServer, Saved
from cluster.control_client import ControlClient, ControlError, UnreachableError
from cluster.control_messages import SERVICE, as_dict, message
from cluster.runs import CONTROL, RunFolder
from configs.schema import RunConfig
from replay.guests import join_token
from replay.security import Security, grpc_channel

from .control_for_tests import Run, policy

ROOT = Path(__file__).parents[1]
TOKEN = "the-token-of-the-tests"
PATH = f"/{SERVICE.full_name}/"


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def server(run: Run) -> Iterator[ControlServer]:
    found = ControlServer(run, "127.0.0.1", 0, Security(TOKEN))
    yield found
    run.pause.set()
    found.close()


@pytest.fixture
def client(server: ControlServer) -> Iterator[ControlClient]:
    with ControlClient(server.address, TOKEN, timeout_s=20.0) as found:
        yield found


def call(server: ControlServer, method: str, *, token: str = TOKEN, **asked: Any) -> list[Any]:
    """The replies of a call as any other program would make it."""
    found = SERVICE.methods_by_name[method]
    with grpc_channel(server.address, Security(token)) as channel:
        replies = channel.unary_stream(
            PATH + method,
            request_serializer=message(found.input_type.name).SerializeToString,
            response_deserializer=message(found.output_type.name).FromString,
        )(message(found.input_type.name)(**asked), timeout=20.0)
        return list(replies)


def eventually(what: Callable[[], Any]) -> Any:
    """What a call answers that is refused at first."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return what()
        except (ControlError, grpc.RpcError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def refused(server: ControlServer, method: str, **asked: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as told:
        call(server, method, **asked)
    error: Any = told.value
    return error.code(), error.details()


# -- calls ------------------------------------------------------------------------------------------------------------


def test_status_arrives_as_it_was_told(run: Run, client: ControlClient) -> None:
    told: Any = run.status()
    found: Any = client.status()
    assert found["step"] == 2**40
    assert math.isnan(found["metrics"].pop("return_mean_100"))
    assert found["metrics"] == {
        "steps_per_s": 2500.0,
        "replay_fill": 0.25,
        "time/actor/env_s": 30.0,
        "time/actor/infer_s": 10.0,
        "time/actor/wall_s": 50.0,
    }
    assert found["processes"] == [{**one, "figures": {"env_steps": 1234.0}} for one in told["processes"]]
    same = told.keys() - {"metrics", "processes"}
    assert {key: found[key] for key in same} == {key: told[key] for key in same}


def test_a_run_of_ten_thousand_actors_fits_into_an_answer(run: Run, client: ControlClient) -> None:
    figures: dict[str, float | None] = {f"a figure of some length, number {i}": 1.0 for i in range(30)}
    for index in range(10_000):
        run.extra.append(
            {
                "name": f"actor {index}",
                "kind": "actor",
                "index": index,
                "node": "fd00:1234:5678:9abc:def0:1234:5678:9abc",
                "pid": 4_000_000,
                "state": "running",
                "waits_for": "room in shard 63, table steps, behind the limiter",
                "figures": figures,
            }
        )
    found = client.status()["processes"]
    assert [one["index"] for one in found[2:]] == list(range(10_000))
    assert not found[-1]["figures"]
    assert found[-1]["waits_for"]


def test_scale_says_what_is_wanted_now(run: Run, client: ControlClient) -> None:
    assert client.scale(actors=128) == {"actors": 128, "shards": 1}
    assert client.scale(shards=4) == {"actors": 128, "shards": 4}
    assert client.status()["actors"] == {"wanted": 128, "running": 128}
    for asked, text in (
        ({}, "neither"),
        ({"actors": 0}, "at least 1"),
        ({"shards": -3}, "-3"),
        ({"actors": 5000}, "1000"),
    ):
        with pytest.raises(ValueError, match=text):
            client.scale(**asked)
    assert run.wanted == {"actors": 128, "shards": 4}


def test_checkpoint_waits_until_it_is_whole_and_is_one_at_a_time(run: Run, client: ControlClient) -> None:
    run.pause.clear()
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(client.checkpoint)
        assert run.saving.wait(20)
        with pytest.raises(ControlError, match="is being written"):
            client.checkpoint()
        assert client.status()["run"] == "pond"  # nobody else waits
        run.pause.set()
        assert saved.result(20) == {"path": "/runs/pond/checkpoints/000012", "step": 12}
    assert client.checkpoint()["step"] == 12
    client.stop("enough")
    with pytest.raises(ControlError, match="the run is ending"):
        client.checkpoint()


def test_stop_gives_the_reason(run: Run, client: ControlClient) -> None:
    with pytest.raises(ValueError, match="at most 200 characters, received 201"):
        client.stop("x" * 201)
    assert run.stopped is None
    client.stop("the paper is due — « enough »")
    assert run.stopped == "the paper is due — « enough »"


@settings(max_examples=15)
@given(total=st.integers(0, 30), lines=st.integers(0, 40), after=st.integers(0, 40))
def test_logs_are_the_newest_lines_in_order(total: int, lines: int, after: int) -> None:
    run = Run()
    for number in range(total):
        run.say(f"line {number}")
    server = ControlServer(run, "127.0.0.1", 0, Security(TOKEN))
    with closing(server), ControlClient(server.address, TOKEN) as client:
        found = [line["number"] for line in client.logs(lines=lines, after=after)]
    beyond = range(after + 1, total + 1)
    assert found == list(beyond)[max(0, len(beyond) - lines) :]


def test_logs_of_one_process_and_those_to_come(run: Run, client: ControlClient) -> None:
    run.say("began")
    run.say("first step", role="actor", id="3")
    (line,) = client.logs(process="actor 3")
    assert line == run.lines[1]
    with pytest.raises(ValueError, match="nobody"):
        list(client.logs(process="nobody"))
    with pytest.raises(ValueError, match="10000 lines, received 10001"):
        list(client.logs(lines=10_001))
    stream = client.logs(follow=True, lines=1)
    assert next(stream)["text"] == "first step"
    run.say("later")
    assert next(stream)["text"] == "later"
    stream.close()  # type: ignore[attr-defined]


def test_an_outside_actor_joins_gets_the_policy_and_leaves(run: Run, server: ControlServer) -> None:
    (joined,) = call(server, "Join", name="robot-7", lanes=4)
    assert as_dict(joined) == {
        "name": "robot-7",
        "writer": "outside-robot-7",
        "token": "a guest's",
        "shard": "grpc://10.0.0.1:5000",
        "arrow_schema": bytes(range(256)),
        "step_schema": '[["observation", "float32", [3]]]',
        "task": '{"env": "Pendulum-v1"}',
        "limits": {"lanes": 8, "message_rows": 1024, "rows_per_s": 500.0, "bad_messages": 10, "lease_s": 60.0},
        "rules": "in order",
    }
    assert call(server, "Join", name="robot-7", lanes=4, writer="outside-robot-7-3")[0].writer == "outside-robot-7-3"
    assert refused(server, "Join", name="robot-8", lanes=9)[0] is grpc.StatusCode.INVALID_ARGUMENT

    run.newest = policy(version=7, size=3 * 2**20 + 5)
    header, *parts = call(server, "Policy", name="robot-7", have=-1)
    assert header.header.version == 7
    assert [as_dict(one) for one in header.header.inputs] == [
        {"name": "observation", "dtype": "float32", "shape": [3], "holds": "observation"},
        {"name": "noise", "dtype": "float32", "shape": [1], "holds": "standard_normal"},
    ]
    onnx = b"".join(part.onnx for part in parts)
    weights = b"".join(part.weights for part in parts)
    assert (onnx, weights) == (run.newest.onnx, b"weights")
    assert (header.header.onnx_bytes, header.header.weights_bytes) == (len(onnx), len(weights))
    assert [part.WhichOneof("part") for part in parts] == ["onnx"] * 4 + ["weights"]
    assert call(server, "Policy", name="robot-7", have=7) == []

    assert len(call(server, "Leave", name="robot-7")) == 1
    code, text = refused(server, "Policy", name="robot-7", have=-1)
    assert (code, text) == (grpc.StatusCode.INVALID_ARGUMENT, "robot-7 has no place; join again")


# -- who may call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_no_call_is_answered_without_the_token(run: Run, server: ControlServer, method: str) -> None:
    code, text = refused(server, method, token="another")
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "the token is in the file `token` in the run's folder" in text
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as told:
        list(channel.unary_stream(PATH + method)(b"", timeout=20.0))
    assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert (run.stopped, run.joined) == (None, {})


def test_health_and_reflection_ask_for_it_too(server: ControlServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as told:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20.0)
        assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError):
            ProtoReflectionDescriptorDatabase(channel).get_services()
    with grpc_channel(server.address, Security(TOKEN)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE.full_name):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20.0)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_the_token_of_actors_outside_ray_allows_their_calls_alone(run: Run, server: ControlServer, method: str) -> None:
    token = join_token(TOKEN)
    if method in ("Join", "Policy", "Leave"):
        call(server, "Join", token=token, name="robot-7", lanes=4)
        assert call(server, method, token=token, name="robot-7", **({"lanes": 4} if method == "Join" else {}))
        assert refused(server, method, token=join_token("another"))[0] is grpc.StatusCode.UNAUTHENTICATED
        return
    code, text = refused(server, method, token=token)
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert f"/millrace.Control/{method}, received one that allows Check, Join, Leave, Policy and nothing else" in text
    assert (run.stopped, run.wanted) == (None, {"actors": 2, "shards": 1})


def test_what_else_the_token_of_actors_outside_ray_allows(run: Run, server: ControlServer) -> None:
    token = join_token(TOKEN)
    with grpc_channel(server.address, Security(token)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
        assert stub.Check(request, timeout=20.0).status == health_pb2.HealthCheckResponse.SERVING
        refused_calls: list[Callable[[], Any]] = [
            lambda: list(stub.Watch(request, timeout=20.0)),
            lambda: channel.unary_unary(PATH + "Nothing")(b"", timeout=20.0),
        ]
        for make in refused_calls:
            with pytest.raises(grpc.RpcError) as told:
                make()
            assert told.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError):
            ProtoReflectionDescriptorDatabase(channel).get_services()
    with ControlClient(server.address, token) as client:
        for refuse in (client.stop, client.status, lambda: list(client.logs())):
            with pytest.raises(ControlError, match="in the file `token` in its folder"):
                refuse()
    assert run.stopped is None
    with grpc_channel(server.address, Security(token[:-1])) as channel, pytest.raises(grpc.RpcError) as told:
        health_pb2_grpc.HealthStub(channel).Check(request, timeout=20.0)
    assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_reflection_describes_the_service(server: ControlServer) -> None:
    with grpc_channel(server.address, Security(TOKEN)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"millrace.Control", "grpc.health.v1.Health"} <= set(database.get_services())
        found = DescriptorPool(database).FindServiceByName("millrace.Control")
    kinds = {method.name: (method.client_streaming, method.server_streaming) for method in found.methods}
    assert kinds == {name: (False, name in ("Logs", "Policy")) for name in SERVICE.methods_by_name}
    assert found.methods_by_name["Scale"].input_type.fields_by_name["actors"].has_presence


def test_tls_with_the_certificate_of_the_run(run: Run, tmp_path: Path) -> None:
    from .test_replay_security import make_certificate

    security = Security(TOKEN, *make_certificate(tmp_path, "server"))
    other, _ = make_certificate(tmp_path, "other")
    server = ControlServer(run, "127.0.0.1", 0, security)
    with closing(server):
        with ControlClient(server.address, TOKEN, authority=security.certificate) as client:
            assert client.status()["run"] == "pond"
        for authority, text in ((None, "speaks TLS, and no certificate"), (other, "received another one")):
            client = ControlClient(server.address, TOKEN, authority=authority)
            with client, pytest.raises(ControlError, match=text):
                client.status()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_defect_is_told_shortly_and_logged(server: ControlServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        code, text = refused(server, "Leave", name="defect")
    assert code is grpc.StatusCode.INTERNAL
    assert "a defect of the head" in text
    assert "Traceback" not in text
    assert "Traceback" in caplog.text


def test_an_answer_that_does_not_fit_is_no_fault_of_the_caller(run: Run, client: ControlClient) -> None:
    run.extra.append({"name": "actor 9", "kind": "actor", "colour": "blue"})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(ControlError, match=r"is no StatusReply: .*colour.*\(INTERNAL\)"):
        client.status()


def test_a_long_error_is_cut(run: Run, client: ControlClient) -> None:
    def checkpoint() -> Saved:
        raise RuntimeError("ü" * 100_000)

    run.checkpoint = checkpoint  # type: ignore[method-assign]
    with pytest.raises(ControlError, match=r"ü{500}"):
        client.checkpoint()


def test_the_client_says_what_is_wrong(run: Run, server: ControlServer) -> None:
    with ControlClient(server.address, "another") as client, pytest.raises(ControlError, match="another token"):
        client.status()
    run.pause.clear()
    with ControlClient(server.address, TOKEN) as client, pytest.raises(ControlError, match=r"within 0\.3 s"):
        client.checkpoint(timeout_s=0.3)
    with ControlClient(free_address(), TOKEN) as client:
        with pytest.raises(UnreachableError, match="the run has ended, or its head is being started again"):
            client.status()
        with pytest.raises(UnreachableError):
            list(client.logs())


def test_a_taken_port_is_told(run: Run, server: ControlServer) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(RuntimeError, match=r"choose another control\.host or control\.port"):
        ControlServer(run, "127.0.0.1", port, Security(TOKEN))


def free_address() -> str:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


# -- callers that hurt ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(method=st.sampled_from([method.name for method in SERVICE.methods] + ["Nothing"]), data=st.binary(max_size=200))
def test_garbage_is_refused_and_changes_nothing(method: str, data: bytes) -> None:
    run, server = shared()
    with grpc_channel(server.address, Security(TOKEN)) as channel:
        with suppress(grpc.RpcError):
            list(channel.unary_stream(PATH + method)(b"\xff" + data, timeout=20.0))
        with suppress(grpc.RpcError):  # no request at all
            list(channel.stream_stream(PATH + method)(iter(()), timeout=20.0))
    assert (run.stopped, run.joined, run.wanted) == (None, {}, {"actors": 2, "shards": 1})


_SHARED: list[tuple[Run, ControlServer]] = []


def shared() -> tuple[Run, ControlServer]:
    """One server for all examples of a property."""
    if not _SHARED:
        run = Run()
        _SHARED.append((run, ControlServer(run, "127.0.0.1", 0, Security(TOKEN))))
    return _SHARED[0]


@pytest.fixture(autouse=True, scope="module")
def _end_shared() -> Iterator[None]:
    yield
    for _, server in _SHARED:
        server.close()


def test_a_request_is_bounded(run: Run, server: ControlServer) -> None:
    code, _ = refused(server, "Stop", reason="x" * (5 * 2**20))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert run.stopped is None


def test_calls_that_never_send_their_request_keep_nobody_waiting(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_REQUEST_S", 0.5)
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(30)
        yield from ()

    with grpc_channel(server.address, Security(TOKEN)) as channel:
        held = [channel.stream_stream(PATH + "Status")(nothing(), timeout=30.0) for _ in range(control.THREADS)]
        with ControlClient(server.address, TOKEN, timeout_s=20.0) as client:
            assert client.status()["run"] == "pond"
        for one in held:
            assert one.code() is grpc.StatusCode.CANCELLED
        never.set()


def test_a_client_that_does_not_read_is_cut_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_SEND_S", 0.5)
    monkeypatch.setattr(control, "MOST_POLICIES", 2)
    server = ControlServer(run, "127.0.0.1", 0, Security(TOKEN))
    run.newest = policy(version=9, size=20 * 2**20)
    request = message("PolicyRequest")(name="slow", have=-1).SerializeToString()
    with closing(server), grpc_channel(server.address, Security(TOKEN)) as channel:
        call(server, "Join", name="slow", lanes=1)
        held = [channel.unary_stream(PATH + "Policy")(request, timeout=60.0) for _ in range(2)]
        for one in held:
            next(one)
        assert refused(server, "Policy", name="slow", have=-1)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        with ControlClient(server.address, TOKEN, timeout_s=20.0) as client:
            assert client.status()["run"] == "pond"
        # Neither is ever read, and yet their places are free again.
        found = eventually(lambda: call(server, "Policy", name="slow", have=-1))
        assert len(found) == 1 + 20 + 1


def test_only_so_many_follow_the_log_and_who_leaves_makes_room(run: Run, server: ControlServer) -> None:
    run.say("began")
    with ControlClient(server.address, TOKEN, timeout_s=20.0) as client:
        held = [client.logs(follow=True) for _ in range(control.MOST_LOGS)]
        assert [next(one)["text"] for one in held] == ["began"] * control.MOST_LOGS
        with pytest.raises(ControlError, match=f"{control.MOST_LOGS} streams of the log are open"):
            next(client.logs(follow=True))
        assert client.status()["run"] == "pond"
        held[0].close()  # type: ignore[attr-defined]
        assert eventually(lambda: next(client.logs(follow=True)))["text"] == "began"
        run.say("all hear it")
        assert [next(one)["text"] for one in held[1:]] == ["all hear it"] * (control.MOST_LOGS - 1)


def test_closing_ends_open_streams_at_once(run: Run) -> None:
    run.say("began")
    server = ControlServer(run, "127.0.0.1", 0, Security(TOKEN))
    with ControlClient(server.address, TOKEN) as client:
        held = [client.logs(follow=True) for _ in range(3)]
        for one in held:
            next(one)
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < 5.0
        assert [list(one) for one in held] == [[], [], []]  # ended in order
        with pytest.raises(UnreachableError):
            client.status()


# -- commands ---------------------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run a command in this process and an empty folder; its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delenv("MILLRACE_TOKEN", raising=False)

    def made(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as ended:  # argparse's way out
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return made


@pytest.fixture
def folder(tmp_path: Path, server: ControlServer) -> Path:
    """The folder of a run that is going."""
    made = RunFolder.create(RunConfig(root=str(tmp_path / "runs"), name="pond"), ["millrace", "train"])
    (made.path / "token").write_text(TOKEN + "\n")
    (made.path / CONTROL).write_text(json.dumps({"address": server.address}))
    return made.path


def test_status_shows_a_table(command: Command, folder: Path, run: Run) -> None:
    run.scale(3, None)
    run.extra.append({"name": "shard 0", "kind": "shard", "state": "starting", "waits_for": "a node with 1 CPU"})
    code, out, _ = command("status", str(folder))
    assert code == 0
    assert "pond: training, step 1,099,511,627,776, 17 updates, 1:01:02 gone; 3 actors, 1 shard, 1 learner" in unfolded(
        out
    )
    assert "steps/s 2,500, replay fill 25%" in out
    assert "time of actors: env 60%, infer 20%" in out
    assert "actor 0 running 10.0.0.1 100 1.2k steps actor 1 running" in unfolded(out)
    assert out.splitlines()[-2:] == ["actor 1 waits for room in shard 0", "shard 0 waits for a node with 1 CPU"]
    found = json.loads(command("status", str(folder), "--json")[1])
    assert found["metrics"]["return_mean_100"] is None
    assert [one["name"] for one in found["processes"]] == ["actor 0", "actor 1", "actor 2", "shard 0"]


def unfolded(text: str) -> str:
    return " ".join(text.split())


def test_status_counts_the_many_and_names_those_that_wait(command: Command, folder: Path, run: Run) -> None:
    run.scale(100, None)
    _, out, _ = command("status", str(folder))
    assert "99 actors" in out
    assert out.count("actor 1 waits for room in shard 0") == 1
    assert len(out.splitlines()) < 12
    assert len(command("status", str(folder), "--all")[1].splitlines()) > 100


def test_scale_waits_until_it_is_so(command: Command, folder: Path, run: Run) -> None:
    assert command("scale", str(folder), "--actors", "5")[:2] == (0, "wanted: 5 actors, 1 shard\n")
    run.late = 1.0
    began = time.monotonic()
    code, out, _ = command("scale", str(folder), "--actors", "6", "--shards", "2", "--wait", "20", "--json")
    assert (code, json.loads(out)) == (0, {"actors": 6, "shards": 2, "reached": True})
    assert time.monotonic() - began >= 1.0
    run.late = 60.0
    run.extra.append({"name": "actor 9", "kind": "actor", "state": "starting", "waits_for": "a node with 1 CPU"})
    code, out, err = command("scale", str(folder), "--actors", "9", "--wait", "0.1", "--json")
    assert (code, json.loads(out)["reached"]) == (1, False)
    assert (
        "6 of 9 actors run; 2 of 2 shards run; actor 9 waits for a node with 1 CPU; what is wanted stays wanted" in err
    )


def test_checkpoint_and_logs_print_what_they_got(command: Command, folder: Path, run: Run) -> None:
    assert command("checkpoint", str(folder))[:2] == (0, "/runs/pond/checkpoints/000012, at step 12\n")
    assert json.loads(command("checkpoint", str(folder), "--json")[1])["step"] == 12
    run.say("first step", role="actor", id="3")
    run.say("turns the terminal \x1b[31mred")
    _, out, _ = command("logs", str(folder))
    first, second = out.splitlines()
    assert first.split(maxsplit=2)[2] == "info     actor 3     first step"
    assert "\x1b" not in second
    _, out, _ = command("logs", str(folder), "--json", "--process", "actor 3")
    assert json.loads(out) == run.lines[0]


def test_logs_are_followed_until_the_run_ends(command: Command, folder: Path, run: Run, server: ControlServer) -> None:
    def later() -> None:
        time.sleep(0.5)
        run.say("the last line")
        time.sleep(0.5)
        (folder / CONTROL).unlink()
        server.close()

    run.say("began")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(later)
        code, out, _ = command("logs", str(folder), "--follow")
    assert code == 0
    assert [line.rsplit("  ", 1)[1] for line in out.splitlines()] == ["began", "the last line"]


def test_logs_are_followed_to_the_next_head(command: Command, folder: Path, run: Run, server: ControlServer) -> None:
    """A head that is killed ends its streams with an error; the one in its place listens elsewhere."""
    code = (
        "import sys\n"
        "from cluster.control import ControlServer\n"
        "from replay.security import Security\n"
        "from tests.control_for_tests import Run\n"
        "run = Run()\n"
        "run.say('began')\n"
        f"print(ControlServer(run, '127.0.0.1', 0, Security({TOKEN!r})).address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        (folder / CONTROL).write_text(json.dumps({"address": head.stdout.readline().strip()}))
        run.say("began")
        run.say("a new head")

        def later() -> None:
            time.sleep(1.0)
            head.kill()
            (folder / CONTROL).write_text(json.dumps({"address": server.address}))
            assert run.followed.wait(20)
            (folder / CONTROL).unlink()
            server.close()

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(later)
            ended, out, _ = command("logs", str(folder), "--follow")
            done.result(20)
        assert ended == 0
        assert [line.rsplit("  ", 1)[1] for line in out.splitlines()] == ["began", "a new head"]
    finally:
        head.kill()
        head.communicate()


def test_stop_waits_until_the_run_has_ended(command: Command, folder: Path, run: Run, server: ControlServer) -> None:
    def trained() -> None:
        """What the process of `millrace train` does: the folder is its own until the report is written."""
        with RunFolder.open(folder).held():
            held.set()
            stopping.wait(20)
            time.sleep(0.5)
            (folder / CONTROL).unlink()
            server.close()
            time.sleep(1.0)
            (folder / "report.html").write_text("done")

    held, stopping = threading.Event(), threading.Event()
    run.on_stop = stopping.set
    with ThreadPoolExecutor(1) as pool:
        pool.submit(trained)
        assert held.wait(20)
        code, out, _ = command("stop", str(folder), "--reason", "enough")
        assert (folder / "report.html").exists()
    assert (code, out.splitlines()[-1], run.stopped) == (0, "pond has ended", "enough")
    code, _, err = command("status", str(folder))
    assert code == 1
    assert "is not going" in err


def test_stop_need_not_wait(command: Command, folder: Path, run: Run) -> None:
    code, out, _ = command("stop", str(folder), "--no-wait", "--json")
    assert (code, json.loads(out)) == (0, {"run": "pond", "ended": False})
    assert run.stopped == ""


def test_a_run_is_named_by_its_address_too(
    command: Command, folder: Path, server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command("status", server.address)
    assert code == 2
    assert "give --token-file FILE or set MILLRACE_TOKEN" in err
    assert command("status", server.address, "--token-file", str(folder / "token"))[0] == 0
    monkeypatch.setenv("MILLRACE_TOKEN", TOKEN)
    assert command("status", server.address)[0] == 0
    monkeypatch.setenv("MILLRACE_TOKEN", "another")
    code, _, err = command("status", server.address)
    assert code == 1
    assert "another token" in err


def test_the_only_run_that_is_going_need_not_be_named(command: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "killed").mkdir()
    (tmp_path / "runs" / "killed" / CONTROL).write_text(json.dumps({"address": free_address()}))
    code, out, _ = command("status", "--json")
    assert (code, json.loads(out)["run"]) == (0, "pond")
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / CONTROL).write_text((folder / CONTROL).read_text())
    code, _, err = command("status")
    assert code == 2
    assert "2 runs are going: runs/other, runs/pond; name the folder of a run" in err
    os.chdir("/")
    assert "no run below ./runs is going" in command("status")[2]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["scale"], "give --actors N, --shards N, or both"),
        (["scale", "--actors", "0"], "expected a whole number ≥ 1"),
        (["scale", "--actors", "2", "--wait", "-1"], "expected seconds ≥ 0"),
        (["logs", "--lines", "10001"], "from 0 to 10000"),
        (["status", "nowhere"], "nowhere is neither the folder of a run nor HOST:PORT"),
        (["status", "."], "is not the folder of a run"),
        (["scale", "RUN", "--actors", "5000"], "expected at most 1000 actors, received 5000"),
        (["logs", "RUN", "--process", "nobody"], "received 'nobody'"),
        (["statsu"], "did you mean status?"),
    ],
)
def test_wrong_words_are_told(command: Command, folder: Path, words: list[str], text: str) -> None:
    code, _, err = command(*(str(folder) if word == "RUN" else word for word in words))
    assert code == 2
    assert text in err


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_messages_load_anywhere_and_quickly(tmp_path: Path) -> None:
    """In a fresh process and another folder; the head waits for it when it starts."""
    code = (
        "import time, cluster, grpc; began = time.perf_counter()\n"
        "from cluster.control_messages import message\n"
        "print(time.perf_counter() - began, message('ScaleReply')(actors=3).actors)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, actors = done.stdout.split()
    assert (float(seconds) < 2.0, actors) == (True, "3")  # some hundredths of a second where nothing else runs
