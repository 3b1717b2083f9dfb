"""The HTTP server on a Unix socket: uvicorn's httptools protocol under our own listener, caps and deadlines.

What uvicorn's `Server` adds (signal handlers, a 100 ms tick, a Date header) is not wanted in a role that has
its own life cycle, so connections are accepted here and only the protocol is uvicorn's.

Invariants
- Who calls is SO_PEERCRED at accept (unix(7)): later changes of the peer's uid do not matter. With `tls` the client's
  certificate is told besides (`api.tls`).
- A connection is bounded in time: HTTP_HEADER_TIMEOUT_S for a request's head (and for its first byte),
  HTTP_BODY_IDLE_TIMEOUT_S without body bytes and BODY_BYTES_PER_S_MIN on average after that,
  HTTP_WRITE_IDLE_TIMEOUT_S without the reader taking anything of an answer that is not a stream of its own pace.
- ... and in space: HTTP_HEADER_BYTES_MAX of head, PIPELINE_MAX requests ahead, reading paused while a body waits.
- One uid has at most HTTP_CONNECTIONS_PER_UID_MAX connections; all together HTTP_CONNECTIONS_MAX, above which
  only root and the server's own uid are let in, so that an operator can always look.
- Malformed HTTP is answered 400 and closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httptools
import msgspec
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from aether.api import tls
from aether.api.head import Peer
from aether.api.http import CONNECTION_EXTENSION
from aether.api.listener import BACKLOG, listen
from aether.api.operation import ErrorReply
from aether.api.tls import Acceptor, Tls
from aether.contract import ids, limits
from aether.contract.errors import AetherError

BODY_BYTES_PER_S_MIN: Final = 1024
PIPELINE_MAX: Final = 16
KEEP_ALIVE_S: Final = 60
SWEEP_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The bounds that tests shorten."""

    header_s: float = limits.HTTP_HEADER_TIMEOUT_S
    body_idle_s: float = limits.HTTP_BODY_IDLE_TIMEOUT_S
    write_idle_s: float = limits.HTTP_WRITE_IDLE_TIMEOUT_S
    sweep_s: float = SWEEP_INTERVAL_S


@dataclass(slots=True)
class ConnectionInfo:
    """What the application sees of a connection (`http.Connection`)."""

    peer: Peer
    lost: bool = False
    reader: asyncio.Task[Any] | None = None
    take_over: Callable[[], int | None] | None = None


@dataclass(slots=True)
class _Shared:
    """State of all connections of one server."""

    per_uid: Counter[int] = field(default_factory=Counter)
    total: int = 0
    refused: int = 0
    malformed: int = 0
    expired: int = 0


class _HeadTooLargeError(Exception):
    """Raised inside a parser callback, which httptools turns into HttpParserCallbackError."""


class PeerProtocol(HttpToolsProtocol):
    """One connection. `stage` says whose turn it is: `head`, `body` (the client's) or `answer` (ours)."""

    shared: _Shared

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.info = ConnectionInfo(_peer(transport))
        self._extensions = {CONNECTION_EXTENSION: self.info}
        self._counted = False
        self.stage = "head"
        self.since = self.loop.time()
        self._message_since = self.since
        self._body_bytes = 0
        self._head_bytes = 0
        self.write_paused_since: float | None = None
        self.closing_since: float | None = None
        self._admit()

    def _admit(self) -> None:
        shared, uid = self.shared, self.info.peer.uid
        operator = uid in (0, os.geteuid())
        if shared.per_uid[uid] >= limits.HTTP_CONNECTIONS_PER_UID_MAX or (
            shared.total >= limits.HTTP_CONNECTIONS_MAX and not operator
        ):
            shared.refused += 1
            self.refuse(AetherError("BUSY", f"cannot take another connection of uid {uid}: too many are open"))
            return
        shared.per_uid[uid] += 1
        shared.total += 1
        self._counted = True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.info.lost = True
        if self._counted:
            self._counted = False
            shared, uid = self.shared, self.info.peer.uid
            shared.total -= 1
            shared.per_uid[uid] -= 1
            if not shared.per_uid[uid]:
                del shared.per_uid[uid]
        if self.info.reader is not None:
            self.info.reader.cancel()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        in_head = self.stage == "head"
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The request is answered, by taking the connection over or as any other; what follows is not read here.
            self.cycle.keep_alive = False
            self.flow.pause_reading()
            if upgrade.args[0] == len(data) and not self.pipeline:
                self.info.take_over = self._take_over
            return
        except httptools.HttpParserError as error:
            self.shared.malformed += 1
            if isinstance(error.__context__, _HeadTooLargeError):
                self.refuse(_head_too_large())
            else:
                self.refuse(AetherError("BAD_REQUEST", "cannot read the request: malformed HTTP"))
            return
        if in_head and self.stage == "head":
            # The parser keeps an unfinished line to itself, so what it was fed is counted here.
            self._head_bytes += len(data)
            if self._head_bytes > limits.HTTP_HEADER_BYTES_MAX:
                self.refuse(_head_too_large())

    def _take_over(self) -> int | None:
        """The socket as a descriptor of the caller's, while this side forgets it; None when answers are unsent.

        Closing our descriptor leaves the connection open, for the duplicate refers to the same socket (dup(2)).
        """
        if self.transport.is_closing() or self.transport.get_write_buffer_size() > 0:
            return None
        taken = os.dup(self.transport.get_extra_info("socket").fileno())
        self.transport.abort()
        return taken

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= PIPELINE_MAX:
            raise ConnectionError("too many requests ahead")
        super().on_message_begin()
        self.scope["extensions"] = self._extensions  # type: ignore[typeddict-item]
        self.stage = "head"
        self.since = self.loop.time()
        self._line_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._line_bytes += len(url)
        if self._line_bytes > limits.HTTP_HEADER_BYTES_MAX:
            raise _HeadTooLargeError
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.stage != "head":
            return  # A trailer (RFC 9110, 6.5.1) must not pass for a header.
        self._line_bytes += len(name) + len(value) + 4
        if self._line_bytes > limits.HTTP_HEADER_BYTES_MAX:
            raise _HeadTooLargeError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.stage = "body"
        self._head_bytes = 0
        self._body_bytes = 0
        self.since = self._message_since = self.loop.time()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.since = self.loop.time()
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.stage = "answer"
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.stage == "answer":
            self.stage = "idle"  # uvicorn's keep-alive timer runs from here
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.write_paused_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.write_paused_since = None
        super().resume_writing()

    def refuse(self, error: AetherError) -> None:
        """Answers `error` unless an answer is under way or due before it, and closes."""
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            self.transport.write(_plain_answer(error))
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True  # the application's own answer would come second
                cycle.message_event.set()
        self.close()

    def close(self) -> None:
        self.closing_since = self.loop.time()
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(AetherError("BAD_REQUEST", f"cannot read the request: {msg}"))

    def sweep(self, now: float, deadlines: Deadlines) -> None:
        """Ends this connection if the client let a deadline pass."""
        if self.closing_since is None and self.transport.is_closing():
            self.closing_since = now
        stuck_since = self.closing_since if self.closing_since is not None else self.write_paused_since
        streaming = self.cycle is not None and self.cycle.chunked_encoding is True and self.closing_since is None
        if stuck_since is not None and not streaming and now - stuck_since > deadlines.write_idle_s:
            self.shared.expired += 1
            self.transport.abort()
        elif self.closing_since is None and self._is_late(now, deadlines):
            self.shared.expired += 1
            self.refuse(AetherError("REQUEST_TIMEOUT", "cannot wait longer for the rest of the request"))

    def _is_late(self, now: float, deadlines: Deadlines) -> bool:
        if self.stage == "head":
            return now - self.since > deadlines.header_s
        if self.stage != "body" or self.flow.read_paused:
            return False
        on_time_s = deadlines.body_idle_s + self._body_bytes / BODY_BYTES_PER_S_MIN
        return now - self.since > deadlines.body_idle_s or now - self._message_since > on_time_s


class HttpServer:
    """A listening server; make one with `start`."""

    def __init__(
        self, listener: socket.socket, path: Path, config: Config, deadlines: Deadlines, secured: Tls | None
    ) -> None:
        self._listener = listener
        self._secured = secured
        self._path = path
        self._inode = path.stat().st_ino
        self._config = config
        self._state = ServerState()
        self._shared = _Shared()
        self._deadlines = deadlines
        self._server: asyncio.AbstractServer | None = None
        self._acceptor: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None

    def statistics(self) -> dict[str, int]:
        """Connections now; refused, malformed and expired ones since the start."""
        shared = self._shared
        return {
            "connections": shared.total,
            "requests": self._state.total_requests,
            "refused": shared.refused,
            "malformed": shared.malformed,
            "expired": shared.expired,
        }

    @classmethod
    async def start(
        cls,
        app: Callable[..., Any],
        socket_path: Path,
        *,
        mode: int = 0o660,
        gid: int | None = None,
        deadlines: Deadlines | None = None,
        secured: Tls | None = None,
    ) -> HttpServer:
        """Listens on `socket_path`, over TLS with `secured`; raises ALREADY_RUNNING or STATE_UNUSABLE."""
        listener = listen(socket_path, mode=mode, gid=gid)
        config = Config(
            app,
            loop="none",
            http=PeerProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            date_header=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        server = cls(listener, socket_path, config, deadlines or Deadlines(), secured)
        await server._open()
        return server

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        protocol = type("Connection", (PeerProtocol,), {"shared": self._shared})

        def make() -> asyncio.Protocol:
            made: PeerProtocol = protocol(config=self._config, server_state=self._state, app_state={}, _loop=loop)
            return made

        if self._secured is not None:
            self._acceptor = loop.create_task(Acceptor(self._listener, make, self._secured).run())
        else:
            self._server = await loop.create_unix_server(make, sock=self._listener, backlog=BACKLOG)
        self._sweeper = loop.create_task(self._sweep())

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._deadlines.sweep_s)
            now = loop.time()
            for connection in list(self._state.connections):
                if isinstance(connection, PeerProtocol):
                    connection.sweep(now, self._deadlines)

    async def close(self, grace_s: float = 5.0) -> None:
        """Stops accepting, lets running requests end within `grace_s`, then cuts them. Removes the socket."""
        with suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        if self._server is not None:
            self._server.close()
        if self._acceptor is not None:
            self._acceptor.cancel()
            with suppress(asyncio.CancelledError):
                await self._acceptor
            self._listener.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=grace_s)
        # First the connections, which ends the reads among them quietly; then what still runs without one.
        for connection in list(self._state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(set(self._state.tasks), timeout=1.0)
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.sleep(0)


async def serve(
    app: Callable[..., Any],
    socket_path: Path,
    *,
    stop: asyncio.Event,
    ready: Callable[[], None] | None = None,
    mode: int = 0o660,
    gid: int | None = None,
    grace_s: float = 5.0,
) -> None:
    """Serves until `stop` is set. Installs no signal handler; runs in the caller's loop."""
    server = await HttpServer.start(app, socket_path, mode=mode, gid=gid)
    try:
        if ready is not None:
            ready()
        await stop.wait()
    finally:
        await server.close(grace_s)


def _peer(transport: asyncio.Transport) -> Peer:
    peer, secured = tls.peer_of(transport.get_extra_info("socket")), transport.get_extra_info("ssl_object")
    return peer if secured is None else replace(peer, certificate=tls.certificate_of(secured))


def _head_too_large() -> AetherError:
    return AetherError(
        "HEADERS_TOO_LARGE", f"cannot read the request: its head exceeds {limits.HTTP_HEADER_BYTES_MAX} bytes"
    )


def _plain_answer(error: AetherError) -> bytes:
    """A whole HTTP/1.1 answer, for when there is no request to answer."""
    request_id = ids.new(ids.REQUEST)
    body = msgspec.json.encode(ErrorReply(error=error.body(), request_id=request_id))
    retry = b"retry-after: 1\r\n" if error.kind.http in (429, 503) else b""
    return (
        STATUS_LINE[error.kind.http]
        + b"content-type: application/json\r\nconnection: close\r\nx-request-id: %s\r\n" % request_id.encode()
        + retry
        + b"content-length: %d\r\n\r\n" % len(body)
        + body
    )
