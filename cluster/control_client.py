"""A client of a run's control plane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, cast

import grpc

from cluster.control import Line, Saved, Status, Wanted
from cluster.control_messages import SERVICE, as_dict, message
from replay.security import Security, diagnose, grpc_channel


class ControlError(RuntimeError):
    """The control plane refused a call, or did not answer it; the text says why and what to do."""


class UnreachableError(ControlError):
    """Nothing answers where the control plane should be: the run has ended, or its head is being started again."""


class ControlClient:
    """Calls to the control plane of one run. Of each call:

    Raises:
        ValueError: it asks for something that cannot be.
        UnreachableError: nothing answers.
        ControlError: it was refused, or failed.
    """

    def __init__(self, address: str, token: str, *, authority: str | None = None, timeout_s: float = 30.0) -> None:
        """Args:
            address: host:port, from control.json in the run's folder.
            token: the run's.
            authority: PEM file of the certificate to trust, where the run uses TLS.
            timeout_s: how long a call may take, but for checkpoints and streams of the log.

        Raises:
            ValueError: the token is none, or the file cannot be read.
        """
        self.address = address
        self._security = Security(token, authority=authority)
        self._timeout_s = timeout_s
        self._channel = grpc_channel(address, self._security)
        self._methods: dict[str, Callable[..., Any]] = {
            method.name: (
                self._channel.unary_stream if method.name in ("Logs", "Policy") else self._channel.unary_unary
            )(
                f"/{SERVICE.full_name}/{method.name}",
                request_serializer=message(method.input_type.name).SerializeToString,
                response_deserializer=message(method.output_type.name).FromString,
            )
            for method in SERVICE.methods
        }

    def status(self) -> Status:
        """What the run is and does at this moment."""
        return cast(Status, self._call("Status", self._timeout_s))

    def scale(self, *, actors: int | None = None, shards: int | None = None) -> Wanted:
        """Change how many are wanted, None leaves a number as it is. Returns at once what is wanted now."""
        return cast(Wanted, self._call("Scale", self._timeout_s, actors=actors, shards=shards))

    def checkpoint(self, *, timeout_s: float = 600.0) -> Saved:
        """Have a checkpoint written, and wait until it is whole."""
        return cast(Saved, self._call("Checkpoint", timeout_s))

    def stop(self, reason: str = "") -> None:
        """Have the run end, with a checkpoint first. Returns at once."""
        self._call("Stop", self._timeout_s, reason=reason)

    def logs(self, *, process: str = "", lines: int = 100, follow: bool = False, after: int = 0) -> Iterator[Line]:
        """The newest lines of the run's log with numbers above `after`; with `follow`, those to come until the run ends."""
        asked = {"process": process, "lines": lines, "follow": follow, "after": after}
        try:
            replies = self._methods["Logs"](
                message("LogsRequest")(**asked), timeout=None if follow else self._timeout_s
            )
            try:
                for reply in replies:
                    yield cast(Line, as_dict(reply))
            finally:
                replies.cancel()
        except grpc.RpcError as error:
            raise self._told(error, self._timeout_s) from None

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: str, timeout_s: float, **asked: Any) -> dict[str, Any]:
        try:
            return as_dict(self._methods[method](message(f"{method}Request")(**asked), timeout=timeout_s))
        except grpc.RpcError as error:
            raise self._told(error, timeout_s) from None

    def _told(self, error: Any, timeout_s: float) -> Exception:
        """What a caller is told of an error of gRPC."""
        match error.code():
            case grpc.StatusCode.INVALID_ARGUMENT:
                return ValueError(error.details())
            case grpc.StatusCode.UNAVAILABLE:
                return UnreachableError(
                    diagnose(self.address, self._security)
                    or f"no control plane answers at {self.address}: the run has ended, or its head is being started again"
                )
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return ControlError(
                    f"{self.address} did not answer within {timeout_s:g} s; ask again, and look into the run's log"
                )
            case grpc.StatusCode.UNAUTHENTICATED:
                return ControlError(f"{self.address} is a run with another token: {error.details()}")
            case grpc.StatusCode.UNIMPLEMENTED:
                return ControlError(
                    f"{self.address} is no control plane of this version of Millrace: {error.details()}"
                )
            case (
                grpc.StatusCode.FAILED_PRECONDITION
                | grpc.StatusCode.RESOURCE_EXHAUSTED
                | grpc.StatusCode.PERMISSION_DENIED
            ):
                return ControlError(error.details())
            case code:
                return ControlError(f"{error.details()} ({code.name})")
