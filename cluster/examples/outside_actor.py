"""An actor outside Ray: a program of its own that joins a Millrace run, acts by its policy and writes experience to it.

    pip install grpcio grpcio-tools numpy onnxruntime pyarrow
    python outside_actor.py --address HOST:PORT --token outside_token        # of a run of Pendulum-v1

It imports nothing of Millrace, neither Ray nor torch; beside it only the file control.proto is needed. Copy it, and put your
own environment, robot or simulator in the place of `Pendulum`. The address is in the file `control.json` of the run's folder,
the token in the file `outside_token` beside it, which allows these calls alone. What the calls mean is told in control.proto,
and the rules of rows in the reply to Join.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import grpc
import numpy as np
import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]
import pyarrow as pa
import pyarrow.flight as flight

PATIENCE_S = 120.0  # how long a run that cannot be reached is waited for
SEQUENCE = struct.Struct("<q")
REFUSED = (flight.FlightUnauthorizedError, flight.FlightUnauthenticatedError, flight.FlightServerError)
LOST = (flight.FlightError, pa.ArrowException, OSError)


def fail(why: str) -> NoReturn:
    """End the program, from whatever thread."""
    print(why, flush=True)
    os._exit(1)


class Pendulum:
    """Many pendulums to be swung up by a torque, as gymnasium's Pendulum-v1: each is a lane."""

    low, high, steps = -2.0, 2.0, 200  # bounds of the action, and length of an episode

    def __init__(self, lanes: int, generator: np.random.Generator) -> None:
        self._generator = generator
        self._angle, self._speed, self._step = np.zeros(lanes), np.zeros(lanes), np.zeros(lanes, np.int64)

    def reset(self, lanes: np.ndarray) -> np.ndarray:
        """Begin an episode in each of `lanes`, bool (n,); all observations, float32 (n, 3)."""
        self._angle[lanes] = self._generator.uniform(-np.pi, np.pi, lanes.sum())
        self._speed[lanes] = self._generator.uniform(-1.0, 1.0, lanes.sum())
        self._step[lanes] = 0
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Observations, rewards, and where an episode ended or was cut short, after `action` float32 (n, 1)."""
        torque = np.clip(action[:, 0], self.low, self.high)
        angle = (self._angle + np.pi) % (2 * np.pi) - np.pi
        reward = -(angle**2 + 0.1 * self._speed**2 + 0.001 * torque**2)
        self._speed = np.clip(self._speed + (15.0 * np.sin(self._angle) + 3.0 * torque) * 0.05, -8.0, 8.0)
        self._angle = self._angle + self._speed * 0.05
        self._step += 1
        return self._observe(), reward, np.zeros(len(reward), bool), self._step >= self.steps

    def _observe(self) -> np.ndarray:
        return np.stack([np.cos(self._angle), np.sin(self._angle), self._speed], 1).astype(np.float32)


class Run:
    """The run's control plane: a gRPC service."""

    def __init__(self, address: str, token: str, certificate: bytes | None, proto: Path, name: str, lanes: int) -> None:
        sys.path.append(str(proto.resolve().parent))  # where grpc looks for it
        self.messages, services = grpc.protos_and_services(proto.name)
        credentials = None if certificate is None else grpc.ssl_channel_credentials(certificate)
        channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        self._calls = services.ControlStub(channel)
        self._options: dict[str, Any] = {"metadata": [("authorization", f"Bearer {token}")], "timeout": 30.0}
        self.name, self._lanes, self.certificate = name, lanes, certificate

    def join(self, writer: str = "") -> Any:
        """A JoinReply. `writer`: as whom to go on, if that can be. Waits for a run that cannot be reached."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                request = self.messages.JoinRequest(name=self.name, lanes=self._lanes, writer=writer)
                return self._calls.Join(request, **self._options)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > give_up:
                    fail(f"cannot join: {error.details()}")
            time.sleep(1.0)

    def policy(self, have: int) -> tuple[Any, bytes] | None:
        """A PolicyHeader and the ONNX file; None: `have` is the newest version."""
        parts = list(self._calls.Policy(self.messages.PolicyRequest(name=self.name, have=have), **self._options))
        return (parts[0].header, b"".join(part.onnx for part in parts[1:])) if parts else None

    def leave(self) -> None:
        with suppress(grpc.RpcError):  # the run has ended already
            self._calls.Leave(self.messages.LeaveRequest(name=self.name), **self._options)


class Actor:
    """Acts by the newest policy, which a thread fetches; at random until there is one."""

    def __init__(self, run: Run, env: Pendulum, generator: np.random.Generator) -> None:
        self._run, self._env, self._generator = run, env, generator
        self._newest: tuple[Any, Any] | None = None  # header, session
        threading.Thread(target=self._fetch, daemon=True).start()

    def __call__(self, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Actions for the environment, the same as rows hold them, and the version of the policy that chose them."""
        if (newest := self._newest) is None:
            row = self._generator.uniform(-1.0, 1.0, (len(observation), 1)).astype(np.float32)
            return self._env.low + (row + 1) / 2 * (self._env.high - self._env.low), row, 0
        header, session = newest
        given = {}
        for tensor in header.inputs:  # what an actor draws, it draws anew for each step
            shape = (len(observation), *tensor.shape)
            if tensor.holds == "observation":
                given[tensor.name] = observation
            elif tensor.holds == "standard_normal":
                given[tensor.name] = self._generator.standard_normal(shape, np.float32)
            else:  # "uniform", "rank" and "state", of policies for discrete actions
                fail(f"this program does not know what the policy's input {tensor.name} is")
        action, row = session.run(["action", "row_action"], given)
        return action, row, header.version

    def _fetch(self) -> None:
        while True:
            try:
                found = self._run.policy(-1 if self._newest is None else self._newest[0].version)
            except grpc.RpcError as error:  # the run may come back
                print(f"no newer policy: {error.details()}", flush=True)
                found = None
            if found is not None:
                header, graph = found
                self._newest = header, onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            time.sleep(2.0)


class Shard:
    """Where rows go: a stream of messages to a shard of the run, one at a time. Each is stored once or not at all."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._number = -1  # of the last message
        self._connect("")
        self._schema = pa.ipc.read_schema(pa.py_buffer(self.joined.arrow_schema))
        layout = json.loads(self._schema.metadata[b"millrace.layout"])  # name: [type, shape, offset]
        types, shapes, offsets = zip(*layout.values(), strict=True)
        formats = list(zip(types, map(tuple, shapes), strict=True))
        size = self._schema.field("row").type.byte_width
        self.dtype = np.dtype({"names": [*layout], "formats": formats, "offsets": [*offsets], "itemsize": size})

    def write(self, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Write int32 (n,) lanes and (n,) rows. Returns which lanes have lost some and are to begin an episode, bool (lanes,)."""
        most, writer = self.joined.limits.message_rows, self.joined.writer
        begin = np.zeros(lanes.max() + 1, bool)
        for at in range(0, len(rows), most):
            part = np.arange(at, min(at + most, len(rows)))
            part = part[~begin[lanes[part]]]  # without those whose row before was not stored
            if len(part) and not self._send(lanes[part], rows[part]):
                begin[lanes[part] if self.joined.writer == writer else slice(None)] = True
        return begin

    def _send(self, lanes: np.ndarray, rows: np.ndarray) -> bool:
        """One message. False: it was refused, or this is another writer now, all of whose lanes begin anew."""
        width = self._schema.field("row").type
        column = pa.Array.from_buffers(width, len(rows), [None, pa.py_buffer(rows.tobytes())])
        batch = pa.RecordBatch.from_arrays([pa.array(lanes, pa.int32()), column], schema=self._schema)
        number, writer = self._number + 1, self.joined.writer
        while True:
            try:
                self._put.write_with_metadata(batch, SEQUENCE.pack(number))
                self._number, why = self._answer()
                if why:
                    print(f"refused: {why}", flush=True)
                return not why
            except LOST as error:
                print(f"lost {self.joined.shard}: {error}", flush=True)
            self._connect(writer)
            if self.joined.writer != writer:  # what was not answered is given up: it may be stored
                return False
            if self._number >= number:  # it was stored, and the answer was lost
                return True

    def _connect(self, writer: str) -> None:
        """Join, as the writer of before if that can be, and open the stream."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            self.joined = joined = self._run.join(writer)
            client = flight.FlightClient(
                joined.shard,
                tls_root_certs=self._run.certificate,
                generic_options=[("grpc.keepalive_time_ms", 10_000)],  # to notice a machine that is gone
            )
            headers = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {joined.token}".encode())])
            descriptor = flight.FlightDescriptor.for_command(json.dumps({"writer": joined.writer}))
            schema = pa.ipc.read_schema(pa.py_buffer(joined.arrow_schema))
            try:
                self._put, self._answers = client.do_put(descriptor, schema, headers)
                self._number, _ = self._answer()
                print(f"joined as {joined.writer}, writing to {joined.shard}", flush=True)
                return
            except LOST as error:
                if isinstance(error, REFUSED) or time.monotonic() > give_up:
                    fail(f"cannot write to {joined.shard}: {error}")
                time.sleep(1.0)

    def _answer(self) -> tuple[int, str]:
        """The number of a message, and why it was refused, if it was."""
        answer = self._answers.read()
        if answer is None:
            raise flight.FlightUnavailableError("the shard has ended the stream")
        (number,) = SEQUENCE.unpack(answer.to_pybytes()[:8])
        return number, answer.to_pybytes()[8:].decode()

    def close(self) -> None:
        """End in order: open episodes are cut short where they are."""
        self._put.write_metadata(b"close")
        self._put.close()


def play(env: Pendulum, actor: Actor, shard: Shard, lanes: int, stopping: threading.Event) -> None:
    """Step the environments and write each step."""
    everyone = np.arange(lanes)
    first = np.ones(lanes, bool)  # where an episode begins
    observation = env.reset(first)
    total, returns, told = np.zeros(lanes), [], time.monotonic()
    while not stopping.is_set():
        action, row_action, version = actor(observation)
        following, reward, ended, cut_short = env.step(action)
        over = ended | cut_short
        rows = np.zeros(lanes + over.sum(), shard.dtype)  # a step of each lane; then the ends of episodes that are over
        steps, ends = rows[:lanes], rows[lanes:]
        steps["observation"], steps["action"], steps["reward"] = observation, row_action, reward
        steps["is_first"] = first
        ends["observation"], ends["is_last"], ends["is_terminal"] = following[over], True, ended[over]
        rows["policy_version"] = version
        begin = shard.write(np.concatenate((everyone, everyone[over])), rows)
        total += reward
        returns += total[over].tolist()
        first = over | begin
        total[first] = 0.0
        observation = env.reset(first)
        if returns and time.monotonic() - told > 5.0:
            print(f"policy {version}, mean return of {len(returns)} episodes {np.mean(returns):.0f}", flush=True)
            returns, told = [], time.monotonic()


def check(joined: Any) -> None:
    """Leave a run that this program was not written for."""
    task = json.loads(joined.task)
    fields = {name: [dtype, shape] for name, dtype, shape, *_ in json.loads(joined.step_schema)}
    bounds = task["action"].get("low"), task["action"].get("high")
    if (
        fields["observation"] != ["float32", [3]]
        or bounds != ([Pendulum.low], [Pendulum.high])
        or (task["chunk"], task["stack"]) != (1, 1)
    ):
        fail(f"this program plays Pendulum-v1, one action at a time; the run plays {joined.task}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", required=True, help="host:port of the run's control plane")
    parser.add_argument(
        "--token", type=Path, required=True, help="the file outside_token of the run's folder, or a copy"
    )
    parser.add_argument("--name", default="pendulum", help="of this program; another one for each")
    parser.add_argument("--lanes", type=int, default=8, help="environments")
    parser.add_argument("--certificate", type=Path, help="PEM file to trust, where the run has TLS")
    parser.add_argument("--proto", type=Path, default=Path(__file__).parents[1] / "control.proto")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    certificate = given.certificate.read_bytes() if given.certificate else None
    run = Run(given.address, given.token.read_text().strip(), certificate, given.proto, given.name, given.lanes)
    shard = Shard(run)
    check(shard.joined)
    of_env, of_actor = np.random.default_rng([given.seed, *given.name.encode()]).spawn(2)
    env = Pendulum(given.lanes, of_env)
    actor, stopping = Actor(run, env, of_actor), threading.Event()
    # In a thread: where a message waits for the learner, this one still hears Ctrl-C.
    player = ThreadPoolExecutor(1).submit(play, env, actor, shard, given.lanes, stopping)
    try:
        player.result()
    except KeyboardInterrupt:
        stopping.set()
    wait([player], timeout=2.0)  # a message may wait for the learner for longer
    if player.done():
        with suppress(*LOST):
            shard.close()
    run.leave()
    print("left", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
