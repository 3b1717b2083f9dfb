"""HTTP/1.1 over a Unix socket, in TLS where asked, with the standard library; connections are kept and shared between
threads.

Invariants
- A connection is used by one call at a time and goes back only after its answer was read to the end.
- A request is sent twice only when it is safe: the operation is idempotent (or carries an Idempotency-Key), or
  the kept connection was closed by the server before it took anything of it.
- Failures are AetherError: the server's own code, UNREACHABLE when nobody listens, PROTOCOL for nonsense.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from aether.api.address import bind_address
from aether.api.operation import ErrorReply
from aether.client.identity import SERVER_NAME
from aether.contract.errors import AetherError

RETRIES_MAX: Final = 4
RETRY_FIRST_S: Final = 0.1
RETRY_AFTER_S_MAX: Final = 5.0
KEPT_CONNECTIONS_MAX: Final = 8
_RETRIED: Final = frozenset({"BUSY", "UNAVAILABLE", "DRAINING", "UNREACHABLE"})


class UnixConnection(http.client.HTTPConnection):
    """`http.client` over AF_UNIX. `used` says whether an answer came over it before."""

    def __init__(self, path: Path, timeout_s: float, secured: ssl.SSLContext | None = None) -> None:
        super().__init__(SERVER_NAME, timeout=timeout_s)
        self.path = path
        self.secured = secured
        self.used = False

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.settimeout(self.timeout)
            with bind_address(self.path) as address:
                connection.connect(address)
            if self.secured is not None:
                connection = self.secured.wrap_socket(connection, server_hostname=SERVER_NAME)
        except OSError:
            connection.close()
            raise
        self.sock = connection


@dataclass(frozen=True, slots=True)
class Call:
    """One request. A file-like `body` is sent from its current position, `size_bytes` of it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes | BinaryIO | None = None
    repeatable: bool = True
    timeout_s: float | None = None


class Transport:
    """Sends calls to one socket. Safe to use from several threads."""

    def __init__(
        self,
        socket_path: Path,
        timeout_s: float,
        retries: int = RETRIES_MAX,
        secured: ssl.SSLContext | None = None,
    ) -> None:
        self.socket_path = socket_path
        self.timeout_s = timeout_s
        self._secured = secured
        self._retries = retries
        self._kept: list[UnixConnection] = []
        self._lock = threading.Lock()

    def connection(self, timeout_s: float) -> UnixConnection:
        """A connection that is not open yet."""
        return UnixConnection(self.socket_path, timeout_s, self._secured)

    def reachable(self) -> bool:
        """Whether somebody listens."""
        connection = self.connection(1.0)
        try:
            connection.connect()
        except OSError:
            return False
        self._keep(connection)
        return True

    def send(self, call: Call) -> bytes:
        """The whole body of a success; raises AetherError. Retries where that is safe."""
        with self.open(call) as response:
            try:
                return response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error) from error

    @contextmanager
    def open(self, call: Call) -> Iterator[http.client.HTTPResponse]:
        """The response of a success, to be read inside the block; raises AetherError."""
        connection, response = self._respond(call)
        try:
            yield response
        finally:
            self._release(connection, response)

    def close(self) -> None:
        """Closes the kept connections."""
        with self._lock:
            kept, self._kept = self._kept, []
        for connection in kept:
            connection.close()

    def _respond(self, call: Call) -> tuple[UnixConnection, http.client.HTTPResponse]:
        start = call.body.tell() if call.body is not None and not isinstance(call.body, bytes) else 0
        attempt = 0
        while True:
            try:
                return self._attempt(call)
            except AetherError as error:
                if not call.repeatable or error.code not in _RETRIED or attempt >= self._retries:
                    raise
                pause_s = RETRY_FIRST_S * 2**attempt
                if error.retry_after_s is not None:
                    pause_s = max(pause_s, min(float(error.retry_after_s), RETRY_AFTER_S_MAX))
            attempt += 1
            time.sleep(pause_s)
            if call.body is not None and not isinstance(call.body, bytes):
                call.body.seek(start)

    def _attempt(self, call: Call) -> tuple[UnixConnection, http.client.HTTPResponse]:
        connection = self._take(call.timeout_s or self.timeout_s)
        while True:
            try:
                response = self._exchange(connection, call)
                break
            except http.client.RemoteDisconnected as error:
                connection.close()
                # RFC 9112, 9.3.1: a kept connection may be closed by the server at any moment.
                if not connection.used or not isinstance(call.body, bytes | None) or not call.repeatable:
                    raise _unreachable(self.socket_path, error) from error
                connection = self.connection(call.timeout_s or self.timeout_s)
            except TimeoutError as error:
                connection.close()
                raise AetherError(
                    "UNREACHABLE", f"cannot get an answer: none came in {connection.timeout} s"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise _unreachable(self.socket_path, error) from error
        if response.status < 400:
            return connection, response
        try:
            raise _refusal(response)
        finally:
            self._release(connection, response)

    def _exchange(self, connection: UnixConnection, call: Call) -> http.client.HTTPResponse:
        try:
            connection.request(call.method, call.target, call.body, dict(call.headers))
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses early (413, 429) answers and closes while the body is still being sent; its
            # answer is in our receive queue already (unix(7) keeps what was sent before the close).
            pass
        else:
            return connection.getresponse()
        response = http.client.HTTPResponse(connection.sock, method=call.method)
        try:
            response.begin()
        except (ConnectionResetError, BrokenPipeError) as error:
            raise http.client.RemoteDisconnected(str(error)) from error
        response.will_close = True
        return response

    def _take(self, timeout_s: float) -> UnixConnection:
        with self._lock:
            connection = self._kept.pop() if self._kept else None
        if connection is None:
            return self.connection(timeout_s)
        connection.timeout = timeout_s
        connection.sock.settimeout(timeout_s)
        return connection

    def _release(self, connection: UnixConnection, response: http.client.HTTPResponse) -> None:
        # isclosed: read to the end. Anything else leaves bytes that belong to this answer.
        if response.isclosed() and not response.will_close:
            connection.used = True
            self._keep(connection)
        else:
            response.close()
            connection.close()

    def _keep(self, connection: UnixConnection) -> None:
        with self._lock:
            if len(self._kept) < KEPT_CONNECTIONS_MAX:
                self._kept.append(connection)
                return
        connection.close()


def _refusal(response: http.client.HTTPResponse) -> AetherError:
    try:
        reply = msgspec.json.decode(response.read(), type=ErrorReply)
    except (msgspec.MsgspecError, OSError, http.client.HTTPException) as error:
        return AetherError(
            "PROTOCOL", f"cannot read the answer: status {response.status} without an error body: {error}"
        )
    refusal = AetherError.of(reply.error)
    refusal.details = {**refusal.details, "request_id": reply.request_id}
    retry_after = response.headers.get("Retry-After", "")
    refusal.retry_after_s = int(retry_after) if retry_after.isdigit() else None
    return refusal


def _unreachable(path: Path, error: Exception) -> AetherError:
    if isinstance(error, ssl.SSLError):
        return _refused_by_tls(error)
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    remedy = ""
    if isinstance(error, PermissionError):
        remedy = "join the group of the socket, or start your own instance with `aether up`"
    return AetherError("UNREACHABLE", f"cannot reach {path}: {why}", remedy)


def _refused_by_tls(error: ssl.SSLError) -> AetherError:
    """Why a handshake failed: our own check of the server, or the alert that it sent (RFC 8446, 6.2)."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the instance's certificate does not hold ({error.verify_message})"
        remedy = "get the bundle of its authorities with `aether pki show --bundle`"
        return AetherError("BAD_CREDENTIAL", f"cannot trust the instance: {why}", remedy)
    why = (error.reason or str(error)).lower().replace("_", " ")
    remedy = "get another certificate with `aether pki issue`"
    return AetherError("UNAUTHENTICATED", f"cannot get in: the instance refused the certificate ({why})", remedy)


def _broken(error: Exception) -> AetherError:
    return AetherError("PROTOCOL", f"cannot read the answer: the connection ended early ({type(error).__name__})")
