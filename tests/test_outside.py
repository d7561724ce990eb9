"""Actors outside Ray: their places and leases in the head, and the example program against a real shard and control plane."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest
import torch

from cluster import outside, parts
from cluster.acting_export import PolicyExporter
from cluster.control import ControlServer
from cluster.outside import LEASE_S, Joined, OutsideActors, Policy
from cluster.runs import RunFolder
from configs.algorithms import R2d2Settings
from configs.cluster import OutsideSettings
from configs.llm import LlmConfig
from configs.schema import RunConfig
from replay.guests import guest_named, guest_token, join_token
from replay.process import ShardProcess
from replay.schema import StepSchema
from replay.security import Security, flight_client, new_token
from replay.server import ShardServer
from replay.wire import action
from tests import control_for_tests, runs_for_tests

SECURITY = Security(new_token())
ROUTES = {0: "grpc://10.0.0.1:5000", 2: "grpc://10.0.0.2:5000", 3: "grpc://10.0.0.3:5000"}
EXAMPLE = Path(outside.__file__).with_name("examples") / "outside_actor.py"
NODE_MODULES = Path(os.environ.get("NODE_MODULES", EXAMPLE.with_name("node_modules")))  # of outside_actor.mjs
LANES = 4
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ray", "actors", "cluster", "configs", "learners", "replay", "millrace"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refuse())
"""


def make_config(tmp_path: Path, **settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "env": {"id": "Pendulum-v1"},
            "algorithm": {"name": "sac", "hidden": [16, 16]},
            "replay": {"capacity": 400_000, "min_size": 200_000, "directory": str(tmp_path)},
            "learners": {"device": "cpu"},
            "outside": {"most": 3, "lanes": 8, "rows_per_s": 2000.0},
            **settings,
        }
    )


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path)


def schema_of(config: RunConfig) -> StepSchema:
    return parts.env_schema(config, None)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_actors(config: RunConfig, **more: Any) -> OutsideActors:
    return OutsideActors(config, schema_of(config), SECURITY, **more)


# -------------------------------------------------------------------------------------------------------------- places


def test_each_gets_a_writer_a_token_for_it_and_the_shard_with_the_fewest(config: RunConfig) -> None:
    actors = make_actors(config)
    joined = [actors.join(name, 4, ROUTES) for name in ("a", "b.c-d_E", "f")]
    assert [one.shard for one in joined] == [*ROUTES.values()]
    assert len({one.writer for one in joined}) == 3
    for one in joined:
        assert one.writer.startswith(f"outside-{one.name}-")
        assert one.token == guest_token(SECURITY.token, one.writer)
        assert SECURITY.token not in repr(one)
    actors.leave("b.c-d_E")
    assert actors.join("g", 1, ROUTES).shard == ROUTES[2]
    assert actors.stats() == {
        "outside": 3,
        "outside_lanes": 9,
        "outside_joined": 4,
        "outside_left": 1,
        "outside_lost": 0,
        "outside_shut_out": 0,
    }
    assert [(p["name"], p["kind"], p["figures"]["lanes"]) for p in actors.processes()] == [
        ("outside a", "outside", 4),
        ("outside f", "outside", 4),
        ("outside g", "outside", 1),
    ]


def test_the_token_to_join_lies_in_the_folder_of_a_run_that_takes_any(config: RunConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"root": str(tmp_path), "name": "a"})
    run = RunFolder.create(config, ["test"])
    file, token = run.path / "outside_token", join_token(run.security())
    assert file.read_text() == token + "\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert run.security().token not in token
    assert join_token(run.security().token) == token != guest_token(run.security(), "outside-join")
    for text in ("", "of an earlier token\n"):  # a write that was cut short, a `token` that was removed
        file.write_text(text)
        run.security()
        assert file.read_text() == token + "\n"
    (run.path / "token").unlink()
    assert join_token(run.security()) + "\n" == file.read_text() != token + "\n"
    run.rewrite(config.model_copy(update={"outside": OutsideSettings(most=0)}))
    run.security()
    assert not file.exists()
    llm = RunFolder.create(LlmConfig(root=str(tmp_path), name="b"), ["test"])
    assert not (llm.path / "outside_token").exists()


def test_the_token_to_join_is_worth_nothing_to_a_shard(config: RunConfig) -> None:
    assert guest_named(SECURITY, join_token(SECURITY)) is None
    spec = parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0)
    server = ShardServer(spec, SECURITY)
    try:
        with flight_client(server.address, Security(join_token(SECURITY))) as client:
            for kind in ("stats", "quarantine"):
                with pytest.raises(flight.FlightUnauthenticatedError):
                    action(client, kind, {"writer": "outside-a"})
            descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": "outside-a"}))
            with pytest.raises(flight.FlightUnauthenticatedError):
                client.do_put(descriptor, schema_of(config).arrow())[1].read()
    finally:
        server.close()


def test_what_one_is_told(config: RunConfig) -> None:
    joined = make_actors(config).join("a", 4, ROUTES)
    schema = schema_of(config)
    assert pa.ipc.read_schema(pa.py_buffer(joined.arrow_schema)).equals(schema.arrow(), check_metadata=True)
    assert StepSchema.from_json(joined.step_schema) == schema
    assert json.loads(joined.task) == {
        "environment": {"id": "Pendulum-v1", "backend": "auto", "kwargs": {}},
        "algorithm": "sac",
        "discount": config.algorithm.discount,
        "action": {"shape": [1], "low": [-2.0], "high": [2.0]},
        "chunk": 1,
        "stack": 1,
    }
    assert joined.limits == outside.Limits(
        lanes=8, message_rows=config.actors.rows_per_write, rows_per_s=2000.0, bad_messages=10, lease_s=LEASE_S
    )


def test_discrete_actions_and_recurrent_states_are_told(tmp_path: Path) -> None:
    config = make_config(tmp_path, env={"id": "CartPole-v1"}, algorithm=R2d2Settings(recurrent=5))
    joined = make_actors(config).join("a", 1, ROUTES)
    assert json.loads(joined.task)["action"] == {"choices": 2, "start": 0}
    schema = schema_of(config)
    assert StepSchema.from_json(joined.step_schema) == parts.row_schema(config, schema)


def test_a_program_that_was_started_again_gets_its_place_as_another_writer(config: RunConfig) -> None:
    actors = make_actors(config)
    for name in ("a", "b", "c"):
        actors.join(name, 1, ROUTES)
    before = actors.join("b", 2, ROUTES, writer="outside-b-of-another-time")
    assert [shard for shard, _ in actors.ended()] == [2]
    after = actors.join("b", 3, ROUTES)
    assert after.shard == before.shard
    assert after.writer != before.writer
    assert actors.ended() == [(2, before.writer)]
    assert actors.ended() == []
    assert actors.stats()["outside_joined"] == 3
    with pytest.raises(ValueError, match="another program has joined as b"):
        actors.join("b", 2, ROUTES, writer=before.writer)


def test_a_lost_connection_goes_on_as_the_same_writer_where_the_shard_lives(config: RunConfig) -> None:
    actors = make_actors(config)
    first = actors.join("a", 1, ROUTES)
    moved = {**ROUTES, 0: "grpc://10.0.0.9:7"}
    same = actors.join("a", 1, moved, writer=first.writer)
    assert (same.writer, same.token, same.shard) == (first.writer, first.token, moved[0])
    assert actors.ended() == []
    del moved[0]
    other = actors.join("a", 1, moved, writer=first.writer)
    assert other.writer != first.writer
    assert other.shard in moved.values()


def test_one_that_is_silent_is_gone_and_makes_room(config: RunConfig) -> None:
    clock = Clock()
    actors = make_actors(config, clock=clock)
    writers = {name: actors.join(name, 1, ROUTES).writer for name in ("a", "b", "c")}
    with pytest.raises(ValueError, match=r"has 3 actors outside Ray .* raise outside\.most"):
        actors.join("d", 1, ROUTES)
    actors.join("a", 1, ROUTES, writer=writers["a"])  # who has a place is not one more
    clock.now += LEASE_S
    actors.seen("b")
    actors.seen("nobody")
    clock.now += 1.0
    assert sorted(actors.ended()) == sorted([(0, writers["a"]), (3, writers["c"])])
    assert actors.stats()["outside_lost"] == 2
    actors.join("d", 1, ROUTES)
    again = actors.join("a", 1, ROUTES, writer=writers["a"])
    assert again.writer != writers["a"]  # it was told to the shard that this one has ended


def test_one_that_a_shard_shut_out_stays_out(config: RunConfig) -> None:
    actors = make_actors(config)
    writer = actors.join("a", 1, ROUTES).writer
    actors.shut_out(writer, "10 bad messages")
    actors.shut_out(writer, "10 bad messages")
    for again in ("", writer):
        with pytest.raises(ValueError, match="a was shut out: 10 bad messages"):
            actors.join("a", 1, ROUTES, writer=again)
    assert actors.stats()["outside_shut_out"] == 1
    assert actors.join("b", 1, ROUTES).shard == ROUTES[0]


def test_a_new_head_goes_on(config: RunConfig) -> None:
    clock = Clock()
    actors = make_actors(config, clock=clock)
    a, b = actors.join("a", 1, ROUTES), actors.join("b", 2, ROUTES)
    actors.join("b", 2, ROUTES)
    actors.shut_out(actors.join("c", 1, ROUTES).writer, "wrong")
    state = json.loads(json.dumps(actors.state()))
    after = Clock()
    after.now = 1e6
    new = make_actors(config, clock=after, state=state)
    assert new.state() == state
    assert new.stats() == actors.stats()
    assert new.join("a", 1, ROUTES, writer=a.writer).writer == a.writer
    with pytest.raises(ValueError, match="was shut out: wrong"):
        new.join("c", 1, ROUTES)
    assert (2, b.writer) in new.ended()
    after.now += LEASE_S + 1
    assert len(new.ended()) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outside": {"most": 0}}, "outside.most is 0"),
        ({"algorithm": {"name": "custom", "learner": "a:B", "policy": "a:C"}}, "custom cannot be exported"),
    ],
)
def test_runs_that_take_none_say_so(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    config = make_config(tmp_path, **settings)
    actors = OutsideActors(config, schema_of(make_config(tmp_path)), SECURITY)
    with pytest.raises(ValueError, match=message):
        actors.join("a", 1, ROUTES)


def test_what_does_not_fit_is_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    actors = make_actors(config)
    for name in ("", "a b", "ä", "x" * 65, "a\n", "../a"):
        with pytest.raises(ValueError, match="expected a name of 1 to 64"):
            actors.join(name, 1, ROUTES)
    for lanes in (0, -1, 9):
        with pytest.raises(ValueError, match=rf"expected 1 to 8 lanes \(outside.lanes\), received {lanes}"):
            actors.join("a", lanes, ROUTES)
    with pytest.raises(ValueError, match="no shard at present"):
        actors.join("a", 1, {})
    monkeypatch.setattr(outside, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ValueError, match=r"need no_such_package .* pip install 'millrace\[export\]'"):
        actors.join("a", 1, ROUTES)
    assert actors.stats()["outside"] == 0


# ---------------------------------------------------------------------------------------------------------- the example


class Head(control_for_tests.Run):
    """As much of a head as outside actors need."""

    def __init__(self, config: RunConfig, routes: dict[int, str]) -> None:
        super().__init__()
        self.actors = make_actors(config)
        self.routes = routes
        self.exported: Policy | None = None

    def join(self, name: str, lanes: int, writer: str) -> Joined:
        return self.actors.join(name, lanes, self.routes, writer=writer)

    def policy(self, name: str, have: int) -> Policy | None:
        self.actors.seen(name)
        return None if self.exported is None or self.exported.version == have else self.exported

    def leave(self, name: str) -> None:
        self.actors.leave(name)


@contextmanager
def serving(head: Head, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address of a head's control plane, and the file with the token for actors outside Ray."""
    (tmp_path / "outside_token").write_text(join_token(SECURITY) + "\n")
    server = ControlServer(head, "127.0.0.1", 0, SECURITY)
    try:
        yield server.address, str(tmp_path / "outside_token")
    finally:
        server.close()


@contextmanager
def running(command: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program, where neither Millrace nor torch nor Ray can be imported; its output goes to the file `output`."""
    blocked = tmp_path / "blocked"
    blocked.mkdir(parents=True)
    (blocked / "sitecustomize.py").write_text(BLOCK)
    paths = {"PYTHONPATH": os.pathsep.join((str(blocked), str(EXAMPLE.parent)))}
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **paths}, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def example(tmp_path: Path, head: Head, *, program: str = "") -> Iterator[subprocess.Popen[str]]:
    """The example, or another `program` with its arguments."""
    with serving(head, tmp_path) as (address, token):
        command = [sys.executable, *(["-c", program] if program else [str(EXAMPLE)])]
        with running([*command, "--address", address, "--token", token, "--lanes", str(LANES)], tmp_path) as process:
            yield process


def wait_for(true: Callable[[], Any], process: subprocess.Popen[str], tmp_path: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        said = (tmp_path / "output").read_text()
        assert process.poll() is None, f"the program has ended: {said}"
        assert time.monotonic() < deadline, f"it did not happen in time: {said}"
        time.sleep(0.05)


def policies(config: RunConfig) -> Callable[[int], Policy]:
    """Versions of a policy, each with other weights."""
    torch.set_num_threads(1)
    schema = schema_of(config)
    exporter = PolicyExporter(config, schema)

    def policy(version: int) -> Policy:
        learner = parts.make_algorithm(config, parts.row_schema(config, schema), incarnation=version)
        return exporter.export(version, learner.policy_bytes())

    return policy


def test_the_example_writes_whole_episodes_through_the_death_of_its_shard(config: RunConfig, tmp_path: Path) -> None:
    spec = parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0)
    policy = policies(config)
    shard = ShardProcess(spec, SECURITY)
    head = Head(config, {0: shard.address})
    try:
        with example(tmp_path, head) as process:
            wait_for(lambda: rows_of(shard) > 500, process, tmp_path)  # at random
            head.exported = policy(1)
            wait_for(lambda: newest_version(shard, tmp_path) == 1, process, tmp_path)
            shard.kill()
            shard = ShardProcess(spec, SECURITY, recover=True)
            head.routes[0] = shard.address
            head.exported = policy(2)
            wait_for(lambda: newest_version(shard, tmp_path) == 2, process, tmp_path)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        said = (tmp_path / "output").read_text()
        assert said.endswith("left\n")
        assert "refused" not in said
        assert len(set(re.findall(r"joined as (\S+),", said))) == 1  # the same writer all the time
        assert head.actors.stats()["outside_left"] == 1
        stored = list(read(shard, tmp_path))
        assert len(stored) == LANES
        for rows in stored:
            check_episodes(rows)
            assert (np.diff(np.flatnonzero(rows["is_last"]))[:-1] == 201).all()
            assert np.unique(rows["policy_version"]).tolist() == [0, 1, 2]
    finally:
        shard.close()


def rows_of(shard: ShardProcess | ShardServer) -> int:
    return sum(guest["rows"] for guest in shard.stats()["guests"].values())


def read(shard: ShardProcess | ShardServer, tmp_path: Path) -> Iterator[dict[str, np.ndarray]]:
    """All rows of each lane, by field."""
    folder = tmp_path / f"checkpoint-{time.monotonic_ns()}"
    with flight_client(shard.address, SECURITY) as client:
        action(client, "snapshot", {"location": str(folder / "replay")})
    names = ("observation", "action", "reward", "policy_version", "is_first", "is_last", "is_terminal")
    for table in runs_for_tests.lanes(folder, *names):
        yield {name: np.array(table[name].to_pylist()) for name in names}


def newest_version(shard: ShardProcess, tmp_path: Path) -> int:
    return max((int(rows["policy_version"].max()) for rows in read(shard, tmp_path)), default=-1)


def check_episodes(rows: dict[str, np.ndarray]) -> None:
    """Each row follows from the one before it as gymnasium's pendulum has it: none is lost, doubled or changed."""
    first, last = rows["is_first"], rows["is_last"]
    assert first[0]
    assert last[-1]  # the program has left
    assert (first[1:] == last[:-1]).all()
    assert not rows["is_terminal"].any()
    assert (np.diff(rows["policy_version"]) >= 0).all()
    steps = np.flatnonzero(~last)
    env: Any = gymnasium.make("Pendulum-v1").unwrapped
    cosine, sine, speed = rows["observation"][steps].astype(np.float64).T
    env.state = np.array([np.arctan2(sine, cosine), speed])  # all at once
    following, reward, *_ = env.step(2.0 * rows["action"][steps].T)
    np.testing.assert_allclose(rows["observation"][steps + 1], following.T, atol=1e-4)
    np.testing.assert_allclose(rows["reward"][steps], reward, atol=1e-3)


def test_the_example_leaves_its_name_to_another_program(config: RunConfig, tmp_path: Path) -> None:
    spec = parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0)
    server = ShardServer(spec, SECURITY)
    head = Head(config, {0: server.address})
    try:
        with example(tmp_path, head) as process:
            wait_for(lambda: any(g["rows"] > 100 for g in server.stats()["guests"].values()), process, tmp_path)
            head.join("pendulum", 1, "")
            for _, writer in head.actors.ended():
                server.end_writer(writer)
            assert process.wait(20) == 1
        assert "another program has joined as pendulum" in (tmp_path / "output").read_text()
    finally:
        server.close()


def test_the_example_can_be_stopped_while_a_message_waits_for_the_learner(tmp_path: Path) -> None:
    config = make_config(tmp_path, replay={"capacity": 40_000, "min_size": 300, "directory": str(tmp_path)})
    server = ShardServer(parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0), SECURITY)
    head = Head(config, {0: server.address})

    def waits() -> bool:
        before = rows_of(server)
        time.sleep(0.5)
        return before >= 300 and rows_of(server) == before

    try:
        with example(tmp_path, head) as process:
            wait_for(waits, process, tmp_path)
            before = rows_of(server)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert rows_of(server) == before
        assert head.actors.stats()["outside_left"] == 1
    finally:
        server.close()


BROKEN = """
import numpy as np, outside_actor
step, count = outside_actor.Pendulum.step, 0
def broken(self, action):
    global count
    count += 1
    observation, reward, *over = step(self, action)
    if count % 30 == 0:
        reward[2] = np.nan
    return observation, reward, *over
outside_actor.Pendulum.step = broken
outside_actor.main()
"""


@pytest.mark.slow  # seen to hang: what ends its stream may come while it waits for an answer
def test_the_example_goes_on_after_a_refusal_and_ends_when_it_is_shut_out(tmp_path: Path) -> None:
    config = make_config(tmp_path, outside={"bad_messages": 4, "rows_per_s": 2000.0})
    spec = parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0)
    server = ShardServer(spec, SECURITY)
    head = Head(config, {0: server.address})
    try:
        with example(tmp_path, head, program=BROKEN) as process:
            assert process.wait(60) == 1
        said = (tmp_path / "output").read_text()
        assert said.count("refused: message ") == 4
        assert said.count("expected reward to be finite, received nan") >= 4
        assert "is shut out: 4 of its messages were refused" in said
        assert "Traceback" not in said
        stored = list(read(server, tmp_path))
        assert len(stored) == 4 * LANES  # a lane goes on as another where its episode was cut
        for rows in stored:
            check_episodes(rows)
            assert len(rows["reward"]) == 29
    finally:
        server.close()


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE_MODULES / "apache-arrow").is_dir(), reason="needs node and its modules"
)
def test_the_example_in_javascript_writes_whole_episodes(config: RunConfig, tmp_path: Path) -> None:
    policy = policies(config)
    server = ShardServer(parts.shard_spec(config, schema_of(config), 0, run="test", incarnation=0), SECURITY)
    head = Head(config, {0: server.address})
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    program = str(shutil.copy(EXAMPLE.with_suffix(".mjs"), tmp_path))
    try:
        with serving(head, tmp_path) as (address, token):
            command = ["node", program, address, token, str(EXAMPLE.parents[1] / "control.proto")]
            with running(command, tmp_path) as process:
                wait_for(lambda: rows_of(server) > 100, process, tmp_path)
                head.exported = policy(1)
                wait_for(lambda: newest_version(server, tmp_path) == 1, process, tmp_path)
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
        assert head.actors.stats()["outside_left"] == 1
        stored = list(read(server, tmp_path))
        assert len(stored) == LANES
        for rows in stored:
            check_episodes(rows)
    finally:
        server.close()
