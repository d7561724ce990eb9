"""The control plane of a run: a gRPC service in the head's process, by `control.proto`, which says what each call means.

The service knows nothing of Ray: it serves whatever implements `Controlled`, and tells callers what that answers or raises.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NotRequired, Protocol, TypedDict

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.control_messages import SERVICE, message
from cluster.outside import Joined, Policy
from replay.guests import join_token
from replay.security import GRPC_OPTIONS, Security, TokenInterceptor, flight_location, grpc_listen

THREADS = 24
MOST_LOGS = 8  # streams of log lines at once
MOST_POLICIES = 8  # policies that are being sent at once
MOST_CHECKPOINTS = 1
MOST_LINES = 10_000  # of a log, in one answer
MOST_FIGURES = 1000  # processes of a run whose figures are told: one answer holds 4 MiB
PIECE = 2**20  # bytes of a policy in one message
REASON = 200  # characters
# What the token of actors outside Ray allows. Health's Watch is not among it: each stream of it takes a place without end.
OUTSIDE = (*(f"/{SERVICE.full_name}/{name}" for name in ("Join", "Policy", "Leave")), f"/{health.SERVICE_NAME}/Check")
_REQUEST_S = 10.0  # for a client to send its request
_SEND_S = 30.0  # for a client to take one message
_WATCH_S = 0.5
_POLL_S = 0.25  # between two looks for new log lines
_END_S = 2.0  # for calls to end by themselves
_DETAILS = 1000  # characters of an error's text: gRPC sends it among the headers, which are small

log = logging.getLogger(__name__)


class Count(TypedDict):
    """How many processes of a kind there should be, and how many run."""

    wanted: int
    running: int


class Process(TypedDict, total=False):
    """One process of a run; what is not known is left out. The words are explained in `control.proto`."""

    name: str
    kind: str
    index: int
    node: str
    pid: int
    state: str
    waits_for: str
    figures: Mapping[str, float | None]


class Status(TypedDict):
    """What a run is and does at a moment. The words are explained in `control.proto`."""

    run: str
    state: str
    step: int
    updates: int
    time_s: float
    actors: Count
    shards: Count
    learners: Count
    processes: Sequence[Process]
    metrics: Mapping[str, float | None]
    waiting: Sequence[str]


class Wanted(TypedDict):
    """How many actors and shards are wanted."""

    actors: int
    shards: int


class Saved(TypedDict):
    """A checkpoint that is whole: its folder, and the environment steps at that moment."""

    path: str
    step: int


class Line(TypedDict):
    """A line of a run's log. The words are explained in `control.proto`."""

    number: int
    time: float
    level: str
    kind: str
    role: str
    id: str
    text: str
    time_s: NotRequired[float | None]


class Controlled(Protocol):
    """What the control plane serves: the head of a run. Its methods are called from several threads at once.

    Of each: ValueError means that the request asks for what cannot be, RuntimeError that the run cannot do it now; their texts
    are told to the caller.
    """

    def status(self) -> Status:
        """What the run is and does at this moment."""
        ...

    def scale(self, actors: int | None, shards: int | None) -> Wanted:
        """Change how many are wanted, None leaves a number as it is; returns at once what is wanted now."""
        ...

    def checkpoint(self) -> Saved:
        """Write a checkpoint; returns once it is whole."""
        ...

    def stop(self, reason: str) -> None:
        """End the run, with a checkpoint first; returns at once. The reason may be empty."""
        ...

    def logs(self, after: int, process: str | None) -> tuple[Sequence[Line], int]:
        """The lines that are kept with numbers above `after`, oldest first, and the number to ask for the next ones with.

        process: whose log, such as "actor 3"; None: that of the run.
        """
        ...

    def join(self, name: str, lanes: int, writer: str) -> Joined:
        """Let an actor outside Ray in, see `cluster.outside.OutsideActors.join`."""
        ...

    def policy(self, name: str, have: int) -> Policy | None:
        """The newest policy for the outside actor `name`; None where `have` is its version, or none is exported yet."""
        ...

    def leave(self, name: str) -> None:
        """An outside actor has ended."""
        ...


class ControlServer:
    """Serves the control plane of a run, gRPC's health and its reflection, to callers that show the run's token; the calls `OUTSIDE`
    also to those that show the token of actors outside Ray."""

    def __init__(self, controlled: Controlled, host: str, port: int, security: Security) -> None:
        """Args:
            controlled: what is served; what it raises is told to the callers.
            host: address to listen on.
            port: 0 takes a free one.
            security: the run's token, from which the other follows, and its certificate where it has one.

        Raises:
            ValueError: the TLS files cannot be used.
            RuntimeError: the address cannot be listened on.
        """
        self._closing = threading.Event()
        self._watch = _Watch()
        self._calls = _Calls(controlled, self._closing)
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="control"),
            interceptors=[TokenInterceptor(security, lesser={join_token(security): OUTSIDE})],
            # Else a second run could take the port of the first and get half of its calls; and a client whose machine is gone
            # would never be missed.
            options=(
                *GRPC_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ),
            maximum_concurrent_rpcs=4 * THREADS,
        )
        handlers = {
            method.name: grpc.stream_stream_rpc_method_handler(
                partial(self._serve, getattr(self._calls, method.name.lower())),
                request_deserializer=message(method.input_type.name).FromString,
                response_serializer=message(method.output_type.name).SerializeToString,
            )
            for method in SERVICE.methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        self._health = health.HealthServicer()
        for name in ("", SERVICE.full_name):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

        place = flight_location(host, port, security).partition("://")[2]  # IPv6 in brackets
        try:
            bound = grpc_listen(self._server, place, security)
        except RuntimeError as error:
            self._watch.close()
            raise RuntimeError(
                f"the control plane cannot listen on {place} ({error}); choose another control.host or control.port"
            ) from None
        self.address = f"{place.rpartition(':')[0]}:{bound}"
        self._server.start()

    def close(self) -> None:
        """Let calls end by themselves for a moment, log streams at once, and stop."""
        self._closing.set()
        self._health.enter_graceful_shutdown()
        self._server.stop(grace=_END_S).wait()
        self._watch.close()

    def _serve(
        self, call: Callable[[Any, Any], Generator[Any]], requests: Iterator[Any], context: Any
    ) -> Iterator[Any]:
        """One call, of any kind: on the wire, a call with one request is a stream that ends after it.

        As a stream the handler has the thread before the request is there, and so can give up waiting for it.
        """
        try:
            with self._watch.limit(context, _REQUEST_S):
                request = next(requests, None)
            if request is None:
                raise ValueError("expected a request, received none")
            with closing(call(request, context)) as replies:
                for reply in replies:
                    with self._watch.limit(context, _SEND_S):
                        yield reply
            return
        except ValueError as error:
            code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except RuntimeError as error:
            code, text = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except TimeoutError:
            code, text = grpc.StatusCode.DEADLINE_EXCEEDED, "the head has not done it in time; it may still do it"
        except _TooManyError as error:
            code, text = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        except Exception as error:
            if not context.is_active():  # the client has gone, or was cut off
                return
            log.exception("a call of the control plane failed")
            code, text = grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}; the run's log holds the details"
        context.abort(code, text if len(text) <= _DETAILS else text[: _DETAILS - 1] + "…")


class _TooManyError(Exception):
    """More calls of a kind at once than there may be."""


class _Calls:
    """The methods of the service: of each request, the replies.

    What a `Controlled` answers is put into messages here, so that a defect in an answer is none of the caller's request.
    """

    def __init__(self, controlled: Controlled, closing: threading.Event) -> None:
        self._controlled = controlled
        self._closing = closing
        self._logs = threading.BoundedSemaphore(MOST_LOGS)
        self._policies = threading.BoundedSemaphore(MOST_POLICIES)
        self._checkpoints = threading.BoundedSemaphore(MOST_CHECKPOINTS)

    def status(self, request: Any, context: Any) -> Generator[Any]:
        found = self._controlled.status()
        if len(found["processes"]) > MOST_FIGURES:
            found = {**found, "processes": [{**one, "figures": {}} for one in found["processes"]]}
        yield _reply("StatusReply", found)

    def scale(self, request: Any, context: Any) -> Generator[Any]:
        actors, shards = (getattr(request, key) if request.HasField(key) else None for key in ("actors", "shards"))
        if actors is None and shards is None:
            raise ValueError("expected a number of actors or of shards, received neither")
        for what, count in (("actors", actors), ("shards", shards)):
            if count is not None and count < 1:
                raise ValueError(f"expected at least 1 of the {what}, received {count}")
        yield _reply("ScaleReply", self._controlled.scale(actors, shards))

    def checkpoint(self, request: Any, context: Any) -> Generator[Any]:
        with _one_of(self._checkpoints, "a checkpoint that was asked for is being written; ask again when it is done"):
            yield _reply("CheckpointReply", self._controlled.checkpoint())

    def stop(self, request: Any, context: Any) -> Generator[Any]:
        if len(request.reason) > REASON:
            raise ValueError(f"expected a reason of at most {REASON} characters, received {len(request.reason)}")
        self._controlled.stop(request.reason)
        yield message("StopReply")()

    def logs(self, request: Any, context: Any) -> Generator[Any]:
        if request.lines > MOST_LINES:
            raise ValueError(f"expected at most {MOST_LINES} lines, received {request.lines}")
        process = request.process or None
        with _one_of(self._logs, f"{MOST_LOGS} streams of the log are open, the most there may be; close one"):
            found, after = self._controlled.logs(request.after, process)
            lines: Sequence[Line] = found[len(found) - min(request.lines, len(found)) :]
            while True:
                for line in lines:
                    yield _reply("LogLine", line)
                if not request.follow or self._closing.wait(_POLL_S) or not context.is_active():
                    return
                lines, after = self._controlled.logs(after, process)

    def join(self, request: Any, context: Any) -> Generator[Any]:
        yield _reply("JoinReply", asdict(self._controlled.join(request.name, request.lanes, request.writer)))

    def policy(self, request: Any, context: Any) -> Generator[Any]:
        found = self._controlled.policy(request.name, request.have)
        if found is None:
            return
        part = message("PolicyPart")
        with _one_of(self._policies, f"{MOST_POLICIES} policies are being sent, the most there may be; ask again"):
            header = {
                "version": found.version,
                "onnx_bytes": len(found.onnx),
                "weights_bytes": len(found.weights),
                "inputs": [asdict(one) for one in found.inputs],
                "outputs": [asdict(one) for one in found.outputs],
            }
            yield _reply("PolicyPart", {"header": header})
            for kind, data in (("onnx", found.onnx), ("weights", found.weights)):
                for start in range(0, len(data), PIECE):
                    yield part(**{kind: data[start : start + PIECE]})

    def leave(self, request: Any, context: Any) -> Generator[Any]:
        self._controlled.leave(request.name)
        yield message("LeaveReply")()


@contextmanager
def _one_of(places: threading.BoundedSemaphore, full: str) -> Iterator[None]:
    if not places.acquire(blocking=False):
        raise _TooManyError(full)
    try:
        yield
    finally:
        places.release()


def _reply(name: str, found: Mapping[str, Any]) -> Any:
    """An answer of a `Controlled` as a message.

    Raises:
        TypeError: it is not what `Controlled` says.
    """
    try:
        return message(name)(**_known(found))
    except ValueError as error:
        raise TypeError(f"the head's answer is no {name}: {error}") from error


def _known(found: Any) -> Any:
    """The same without the figures that are None: not known yet."""
    if isinstance(found, Mapping):
        return {key: _known(value) for key, value in found.items() if value is not None}
    if isinstance(found, list | tuple):
        return [_known(value) for value in found]
    return found


class _Watch:
    """Ends calls whose client does not do its part in time: sends its request, takes an answer.

    A thread of gRPC's pool waits for a client without end, and there are few of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[int, tuple[float, Any]] = {}  # of a call: until when (monotonic) it may wait, and its context
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="control-watch", daemon=True).start()

    @contextmanager
    def limit(self, context: Any, seconds: float) -> Iterator[None]:
        """Cancel the call unless the block is left within `seconds`, or half a second more."""
        with self._lock:
            self._due[id(context)] = (time.monotonic() + seconds, context)
        try:
            yield
        finally:
            with self._lock:
                self._due.pop(id(context), None)

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(_WATCH_S):
            now = time.monotonic()
            with self._lock:
                late = [context for due, context in self._due.values() if due < now]
            for context in late:
                context.cancel()
