"""Who may call a service of a run, over what transport, and what a message must look like before anything acts on it.

Every Flight and gRPC call carries the run's token in its `authorization` header; TLS is used where a certificate is set.
Arrow checks of a message that its buffers lie within it, but not that they are as long as its arrays claim to be: that is
what `check_batch` is for, without which one wrong length makes a process read outside its memory.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import secrets
import socket
import ssl
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pyarrow as pa
import pyarrow.flight as flight

from .schema import SchemaError

HEADER = "authorization"
MAX_JSON_BYTES = 65_536
MAX_TEXT = 1024  # characters of a text within a JSON message
SHOWN = 200  # characters of a received message that an error repeats
MAX_GRPC_BYTES = 4 * 2**20
GRPC_OPTIONS = (("grpc.max_receive_message_length", MAX_GRPC_BYTES), ("grpc.max_send_message_length", MAX_GRPC_BYTES))
# What a server has refused on purpose and will refuse again: to be told at once and not retried.
REFUSED = (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError, flight.FlightServerError)


@dataclass(frozen=True)
class Security:
    """What a server asks of its callers, and what a caller shows: the run's token, and the files of TLS.

    token: printable ASCII without spaces, see `new_token`. It is never shown.
    certificate, key: PEM files of a server's certificate chain and of its key; None serves without TLS.
    authority: PEM file with what a client trusts; None trusts `certificate` and nothing else, and is without TLS where
        that is None too.
    """

    token: str = field(repr=False)
    certificate: str | None = None
    key: str | None = None
    authority: str | None = None

    def __post_init__(self) -> None:
        if not (self.token and self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise ValueError(
                f"expected a token of printable ASCII characters without spaces, received {len(self.token)} characters "
                "that are not; make one with new_token()"
            )
        if (self.certificate is None) != (self.key is None):
            given, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise ValueError(f"expected a TLS certificate and its key, received the {given} alone; add the {missing}")

    @property
    def trusted(self) -> str | None:
        """PEM file of the certificates that a client trusts; None: no TLS."""
        return self.authority or self.certificate

    def check_files(self) -> None:
        """Read the TLS files as a server will.

        Raises:
            ValueError: one cannot be read, is no PEM, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self.certificate is not None and self.key is not None:
            _read(self.certificate, "certificate")
            _read(self.key, "key")
            try:
                # An encrypted key would be asked for at the terminal.
                context.load_cert_chain(self.certificate, self.key, password="")
            except ssl.SSLError as error:
                raise ValueError(
                    f"expected a PEM certificate and its unencrypted key, received {self.certificate} and {self.key} "
                    f"({error.reason or error}); correct replay.tls_certificate and replay.tls_key"
                ) from None
        if self.authority is not None:
            _read(self.authority, "authority")
            try:
                context.load_verify_locations(self.authority)
            except ssl.SSLError as error:
                raise ValueError(
                    f"expected PEM certificates, received {self.authority} ({error.reason or error}); correct "
                    "replay.tls_authority"
                ) from None


def new_token() -> str:
    """A fresh token of 256 random bits."""
    return secrets.token_urlsafe(32)


class ListenError(OSError):
    """A service cannot listen on its address, which another one may have."""


def check_host(host: str, security: Security, *, setting: str = "replay.host") -> str | None:
    """A warning where a service on `host` sends its token over a network in clear text; else None."""
    if security.certificate is not None or host == "localhost":
        return None
    try:
        if ipaddress.ip_address(host.strip("[]")).is_loopback:
            return None
    except ValueError:  # a name, which may stand for any address
        pass
    return (
        f"{setting} is {host} and TLS is off: the run's token and all that is sent cross the network in clear text; set "
        "replay.tls_certificate and replay.tls_key, or listen on 127.0.0.1"
    )


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"cannot read the TLS {what} {path} on {socket.gethostname()} ({error.strerror}); correct replay.tls_{what}"
        ) from None


def _host_port(address: str) -> str:
    return address.rpartition("://")[2]


def _shows(given: Sequence[str | bytes], token: str) -> bool:
    """Whether these `authorization` headers hold the token."""
    if len(given) != 1:
        return False
    got = given[0] if isinstance(given[0], bytes) else given[0].encode()
    return hmac.compare_digest(got, f"Bearer {token}".encode())


def unauthenticated(given: Sequence[str | bytes], security: Security) -> str | None:
    """Why a call with these `authorization` headers is refused; None: it is not."""
    if _shows(given, security.token):
        return None
    received = "none" if not given else "another one" if len(given) == 1 else f"{len(given)} headers"
    return (
        f"expected the token of this run as `{HEADER}: Bearer <token>`, received {received}; the token is in the file "
        "`token` in the run's folder"
    )


# ----------------------------------------------------------------------------------------------------------- Flight


class _FlightCheck(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses every Flight call, of whatever kind, that comes without the token, before its stream is read."""

    def __init__(self, security: Security) -> None:
        self._security = security

    def start_call(self, info: Any, headers: Mapping[str, list[str | bytes]]) -> None:
        why = unauthenticated(headers.get(HEADER, []), self._security)
        if why is not None:
            raise flight.FlightUnauthenticatedError(why)


class _FlightToken(flight.ClientMiddlewareFactory, flight.ClientMiddleware):  # type: ignore[misc]
    """Puts the token into every call's headers."""

    def __init__(self, security: Security) -> None:
        self._headers = {HEADER: f"Bearer {security.token}"}

    def start_call(self, info: Any) -> _FlightToken:
        return self  # it keeps nothing of a call

    def sending_headers(self) -> dict[str, str]:
        return self._headers


def flight_location(host: str, port: int, security: Security) -> str:
    """Where a Flight server is to listen, and its scheme: `grpc://` or, with a certificate, `grpc+tls://`."""
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'grpc' if security.certificate is None else 'grpc+tls'}://{host}:{port}"


def flight_server_options(security: Security, *, check: flight.ServerMiddlewareFactory | None = None) -> dict[str, Any]:
    """Keyword arguments for `FlightServerBase`: the check of the token, and TLS.

    check: looks at each call in place of the one that lets in who shows the run's token and nobody else.

    Raises:
        ValueError: the TLS files cannot be used.
    """
    security.check_files()
    options: dict[str, Any] = {"middleware": {"token": check or _FlightCheck(security)}}
    if security.certificate is not None and security.key is not None:
        options["tls_certificates"] = [(_read(security.certificate, "certificate"), _read(security.key, "key"))]
    return options


def flight_client(
    address: str, security: Security, *, options: Sequence[tuple[str, int | str]] = ()
) -> flight.FlightClient:
    """A client of the Flight server at `address` (`host:port`, with or without a scheme) that shows the token.

    The settings decide on TLS, whatever the address says, so that the token is never sent in clear by mistake.
    options: channel arguments of gRPC.

    Raises:
        ValueError: the address asks for TLS and the settings name nothing to trust, or the file cannot be read.
    """
    if security.trusted is None and address.startswith("grpc+tls:"):
        raise ValueError(f"{address} serves TLS, and no certificate to trust is set; set replay.tls_authority")
    scheme, roots = "grpc", None
    if security.trusted is not None:
        scheme, roots = "grpc+tls", _read(security.trusted, "authority")
    return flight.FlightClient(
        f"{scheme}://{_host_port(address)}",
        tls_root_certs=roots,
        middleware=[_FlightToken(security)],
        generic_options=list(options),
    )


# ------------------------------------------------------------------------------------------------------------- gRPC


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses every gRPC call without the token, those of the health service and of unknown methods included."""

    def __init__(self, security: Security, *, lesser: Mapping[str, Collection[str]] | None = None) -> None:
        """lesser: tokens that allow a few methods alone, and which: `/package.Service/Method`."""
        self._security = security
        self._lesser = dict(lesser or {})

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        given = [value for key, value in handler_call_details.invocation_metadata if key == HEADER]
        code, why = grpc.StatusCode.UNAUTHENTICATED, unauthenticated(given, self._security)
        method = handler_call_details.method
        for token, methods in self._lesser.items():
            if why is not None and _shows(given, token):
                code = grpc.StatusCode.PERMISSION_DENIED
                why = None if method in methods else _forbidden(method, methods)
        if why is None:
            return continuation(handler_call_details)

        def refuse(request: Any, context: Any) -> Iterator[bytes]:
            context.abort(code, why)
            yield b""  # never reached; makes this the generator that a handler of streams is

        # For calls of every kind: a handler of streams answers before it has read anything.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _forbidden(method: str, allowed: Collection[str]) -> str:
    names = ", ".join(name.rpartition("/")[2] for name in sorted(allowed))
    return (
        f"expected the token of this run for {_cut(method)}, received one that allows {names} and nothing else; the run's is in "
        "the file `token` in its folder"
    )


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]] | None
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _GrpcToken(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Puts the token into every call's metadata."""

    def __init__(self, security: Security) -> None:
        self._entry = (HEADER, f"Bearer {security.token}")

    def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(
            _CallDetails(
                details.method,
                details.timeout,
                [*(details.metadata or ()), self._entry],
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _call


def grpc_listen(server: grpc.Server, address: str, security: Security) -> int:
    """Let a gRPC server, made with a `TokenInterceptor` and `GRPC_OPTIONS`, listen on `host:port`. Returns the port.

    Raises:
        ValueError: the TLS files cannot be used.
        RuntimeError: the address cannot be bound.
    """
    if security.certificate is None or security.key is None:
        return int(server.add_insecure_port(address))
    security.check_files()
    pair = (_read(security.key, "key"), _read(security.certificate, "certificate"))
    return int(server.add_secure_port(address, grpc.ssl_server_credentials([pair])))


def grpc_channel(address: str, security: Security) -> grpc.Channel:
    """A channel to the gRPC server at `host:port` that shows the token, over TLS where the settings say so.

    Raises:
        ValueError: the file to trust cannot be read.
    """
    target = _host_port(address)
    if security.trusted is None:
        channel = grpc.insecure_channel(target, options=GRPC_OPTIONS)
    else:
        roots = _read(security.trusted, "authority")
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(roots), options=GRPC_OPTIONS)
    return grpc.intercept_channel(channel, _GrpcToken(security))


def diagnose(address: str, security: Security, *, timeout_s: float = 2.0) -> str | None:
    """Why no client with these settings will ever reach `address`, for a call that found it unavailable.

    gRPC tells a failed TLS handshake and a server that is away alike; only the second is worth another try. None where the
    transport is not the cause, or nobody listens now.
    """
    url = _host_port(address)
    host, _, port = url.rpartition(":")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if security.trusted is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(security.trusted)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: a certificate may be trusted without its root
    try:
        with closing(socket.create_connection((host, int(port)), timeout=timeout_s)) as connection:
            context.wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return (
            f"expected {url} to show a certificate that {security.trusted} vouches for, received another one "
            f"({error.verify_message}); set replay.tls_authority to the authority of the server's certificate, which must "
            f"name {host}"
        )
    except ssl.SSLError:
        if security.trusted is None:
            return None
        return f"expected {url} to speak TLS, and it does not; leave out replay.tls_authority, or set its certificate"
    except OSError:
        return None
    if security.trusted is None:
        return f"{url} speaks TLS, and no certificate to trust is set; set replay.tls_authority"
    return None


# --------------------------------------------------------------------------------------------------------- messages


def check_schema(received: pa.Schema, expected: pa.Schema) -> None:
    """Compare the schema of a stream with the one it must have, metadata included.

    Raises:
        SchemaError: they differ.
    """
    if received.equals(expected, check_metadata=True):
        return
    if not received.equals(expected):
        raise SchemaError(f"expected the columns {_columns(expected)}, received {_columns(received)}")
    want, got = expected.metadata or {}, received.metadata or {}
    keys = [key for key in {**want, **got} if want.get(key) != got.get(key)]
    raise SchemaError(
        f"expected the schema's metadata {_shown({key: want.get(key) for key in keys})}, received "
        f"{_shown({key: got.get(key) for key in keys})}"
    )


def read_chunks(reader: Any) -> Iterator[Any]:
    """The messages of a DoPut stream, unlike the reader's own iterator those without rows too.

    Raises:
        SchemaError: one does not parse.
        flight.FlightError: the connection is lost.
    """
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            return
        except flight.FlightError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise SchemaError(
                f"expected Arrow messages with the columns {_columns(reader.schema)}, received one that does not parse: "
                f"{_cut(str(error))}"
            ) from None
        yield chunk


def check_batch(
    received: pa.RecordBatch | None, expected: pa.Schema, *, max_rows: int, max_bytes: int
) -> list[pa.Array]:
    """The columns of a batch from the wire, once they are known to be safe to read and without nulls.

    `received` is None where a message held metadata alone. Afterwards every value of every column lies within its buffers, also those of variable length. For columns of fixed
    size the cost does not depend on the rows; for lists and texts the offsets are read, and the texts decoded.

    Raises:
        SchemaError: another schema, too many rows or bytes, nulls, or an array that claims more than its buffers hold.
    """
    if received is None:
        raise SchemaError(f"expected a batch with the columns {_columns(expected)}, received metadata alone")
    check_schema(received.schema, expected)
    if received.num_rows > max_rows:
        raise SchemaError(
            f"expected at most {max_rows} rows in a batch, received {received.num_rows}; send smaller ones"
        )
    size = received.get_total_buffer_size()
    if size > max_bytes:
        raise SchemaError(f"expected at most {max_bytes} bytes in a batch, received {size}; send smaller ones")
    try:
        received.validate(full=True)
    except pa.ArrowException as error:
        raise SchemaError(f"expected whole columns {_columns(expected)}, received damaged ones: {error}") from None
    columns: list[pa.Array] = received.columns
    for name, column in zip(expected.names, columns, strict=True):
        if column.null_count:
            raise SchemaError(f"expected no nulls, received {column.null_count} of {len(column)} in column {name}")
    return columns


@dataclass(frozen=True)
class Between:
    """Rule of `parse_json`: a finite number from `low` to `high`."""

    low: float
    high: float


Rule = type | range | tuple[str, ...] | Between


def parse_json(
    data: bytes | pa.Buffer, *, what: str, required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None
) -> dict[str, Any]:
    """A JSON object from the wire whose keys and values are known to be as expected.

    what: names the message in errors: "the ticket of a sample stream".
    required, optional: the keys and what each may hold: a type (`str`: up to `MAX_TEXT` characters; `float`: any finite
        number; `int`, `bool`, `list`, `dict`), a `range` of whole numbers, a tuple of the texts allowed, or `Between`.

    Raises:
        SchemaError: too long, no JSON, no object, a key missing or unknown, or a value of another type or out of range.
    """
    view = memoryview(data)
    if view.nbytes > MAX_JSON_BYTES:
        raise SchemaError(f"{what}: expected at most {MAX_JSON_BYTES} bytes of JSON, received {view.nbytes}")
    text = view.tobytes()
    try:
        found = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{what}: expected a JSON object, received {_shown(text)} ({error})") from None
    if not isinstance(found, dict):
        raise SchemaError(f"{what}: expected a JSON object, received {_shown(text)}")
    check_object(found, what=what, required=required, optional=optional)
    return found


def check_object(
    found: Mapping[str, Any], *, what: str, required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None
) -> None:
    """Check an object within a JSON message by the rules of `parse_json`.

    Raises:
        SchemaError: a key missing or unknown, or a value of another type or out of range.
    """
    rules = {**required, **(optional or {})}
    if not (required.keys() <= found.keys() <= rules.keys()):
        words = ", ".join(f"{key} ({_rule(rule)})" for key, rule in rules.items()) or "no keys"
        raise SchemaError(f"{what}: expected {words}; received {_shown(found)}")
    for key, value in found.items():
        if not _fits(value, rules[key]):
            raise SchemaError(f"{what}: expected {key} to be {_rule(rules[key])}, received {_shown(value)}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _fits(value: object, rule: Rule) -> bool:
    if isinstance(rule, tuple):
        return isinstance(value, str) and value in rule
    if isinstance(value, bool) and rule is not bool:
        return False
    if isinstance(rule, range):
        return isinstance(value, int) and value in rule
    if rule is str:
        # A lone half of a surrogate pair is legal in JSON and cannot be written anywhere.
        return isinstance(value, str) and len(value) <= MAX_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)
    if rule is float or isinstance(rule, Between):
        low, high = (rule.low, rule.high) if isinstance(rule, Between) else (-math.inf, math.inf)
        return (
            isinstance(value, int | float) and (isinstance(value, int) or math.isfinite(value)) and low <= value <= high
        )
    return isinstance(value, rule)


def _rule(rule: Rule) -> str:
    """A rule in words."""
    if isinstance(rule, tuple):
        return "one of " + ", ".join(rule)
    if isinstance(rule, range):
        return f"a whole number from {rule.start} to {rule.stop - 1}"
    if isinstance(rule, Between):
        return f"a number from {rule.low:g} to {rule.high:g}"
    words = {
        str: f"a text of up to {MAX_TEXT} characters",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        list: "a list",
        dict: "an object",
    }
    return words[rule]


def _columns(schema: pa.Schema) -> str:
    try:
        return _cut(", ".join(f"{f.name}: {f.type}" for f in schema) or "(none)")
    except UnicodeDecodeError:  # Arrow hands names over as they came
        return f"{len(schema)} with names that are no UTF-8"


def _shown(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
