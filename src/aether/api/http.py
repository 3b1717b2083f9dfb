"""HTTP spelling of the operations table: one raw ASGI application over the authority's handlers.

Protocol
- Requests and replies are JSON typed by `contract.calls`; an error is `{"error": {code, message, remedy,
  details}, "request_id"}` with the status of its code. Every answer carries X-Request-Id.
- The caller is SO_PEERCRED of the connection (`scope["extensions"]["aether.connection"]`, set by `api.server`),
  and the ticket in Authorization, unverified: only the authority judges.

Invariants
- Bodies and queries are bounded and parsed into frozen types before a handler sees them.
- Operations of effect `read` end with their connection; all others run to their end, whoever hangs up.
- One uid has at most HTTP_CONNECTIONS_PER_UID_MAX handlers running, also when it drops its connections.
- A handler's unexpected exception answers INTERNAL, is logged with the request id, and harms nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from aether.api import body as bodies
from aether.api import head as heads
from aether.api import reply as replies
from aether.api.head import Head, Peer
from aether.api.operation import Operation
from aether.api.operations import OPERATIONS
from aether.api.params import parse_query
from aether.api.router import Router
from aether.contract import limits
from aether.contract.calls import Caller, FileReply, RawReply, Reply, SubmittedJob
from aether.contract.cellcalls import STREAM_PROTOCOL, UpgradeReply
from aether.contract.errors import AetherError
from aether.contract.jobs import TERMINAL

Handler = Callable[[Caller, Any], Awaitable[Reply | UpgradeReply]]
Scope = Mapping[str, Any]

CONNECTION_EXTENSION: Final = "aether.connection"
OPENAPI_PATH: Final = "/openapi.json"
UPLOADS_MAX: Final = 32
"""Uploads being spooled at once, of all callers: each may hold UPLOAD_BYTES_MAX of disk before it is judged."""
UPLOADS_PER_UID_MAX: Final = 8
DRAIN_BYTES_MAX: Final = 1 * limits.MIB
"""A refused body up to this size is read and thrown away; beyond it the connection is closed."""

_LOG: Final = logging.getLogger("aether.api")


class Connection(Protocol):
    """What the server tells about a connection; `reader` is the task that dies with it."""

    peer: Peer
    lost: bool
    reader: asyncio.Task[Any] | None
    take_over: Callable[[], int | None] | None
    """Hands out the socket; set once a request asked to leave HTTP and nothing else is under way."""


class HttpApp:
    """The ASGI application. `handlers` holds one handler per operation name; `spool` takes uploads."""

    def __init__(self, handlers: Mapping[str, Handler], spool: Path) -> None:
        missing = [operation.name for operation in OPERATIONS if operation.name not in handlers]
        if missing:
            raise ValueError(f"cannot serve: no handler for {', '.join(missing)}")
        self._handlers = handlers
        self._spool = spool
        self._router = Router(OPERATIONS, (OPENAPI_PATH,))
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {
            o.name: msgspec.json.Decoder(o.body_type) for o in OPERATIONS if o.body_type is not None
        }
        self._running: Counter[int] = Counter()
        self._uploading: Counter[int] = Counter()

    def statistics(self) -> dict[str, int]:
        """Handlers and uploads in progress."""
        return {"running": self._running.total(), "uploading": self._uploading.total()}

    async def __call__(self, scope: Scope, receive: bodies.Receive, send: replies.Send) -> None:
        head, error = heads.read_head(scope["headers"])
        connection: Connection | None = scope.get("extensions", {}).get(CONNECTION_EXTENSION)
        exchange = _Exchange(head, receive, send)
        try:
            if error is not None:
                raise error
            if connection is None:
                raise AetherError("UNAUTHENTICATED", "cannot tell who is calling: the connection has no peer")
            await self._answer(scope, exchange, connection)
        except AetherError as refusal:
            with suppress(bodies.ClientGoneError):
                await exchange.refuse(refusal)
        except bodies.ClientGoneError:
            return
        except asyncio.CancelledError:
            if connection is None or not connection.lost:
                raise
        except Exception:
            _LOG.exception("request %s failed", head.request_id)
            if exchange.started:
                raise
            await exchange.refuse(AetherError("INTERNAL", "cannot answer: an unexpected error, see the daemon log"))

    async def _answer(self, scope: Scope, exchange: _Exchange, connection: Connection) -> None:
        method, path = scope["method"], scope["path"]
        if self._router.is_extra(method, path) and method != "OPTIONS":
            return await exchange.send_openapi()
        if method == "OPTIONS":
            return await exchange.send_allow(self._router.allowed(path))
        operation, fields = self._router.find(method, path)
        uid = connection.peer.uid
        if self._running[uid] >= limits.HTTP_CONNECTIONS_PER_UID_MAX:
            raise AetherError("BUSY", f"cannot take more calls of uid {uid}: too many are running", retry_after_s=1)
        fields.update(parse_query(scope["query_string"], operation.query))
        caller = _caller(exchange.head, connection.peer)
        self._running[uid] += 1
        try:
            request = await self._request(operation, fields, exchange, uid)
            if operation.effect == "read":
                connection.reader = asyncio.current_task()
            if operation.streaming == "both":
                _require_upgrade(exchange.head, connection)
            try:
                reply = await self._handlers[operation.name](caller, request)
                if isinstance(reply, UpgradeReply):
                    await upgrade(reply, connection, exchange.head.request_id)
                else:
                    await exchange.send_reply(operation, reply, head_only=method == "HEAD")
            finally:
                connection.reader = None
        finally:
            self._running[uid] -= 1
            if not self._running[uid]:
                del self._running[uid]
        return None

    async def _request(self, operation: Operation, fields: dict[str, Any], exchange: _Exchange, uid: int) -> Any:
        """The typed request, from path, query and body."""
        if operation.body == "none":
            return operation.request(**fields)
        if operation.body == "raw":
            fd, size = await self._upload(exchange, uid)
            return operation.request(fd=fd, size_bytes=size, media_type=heads.raw_media_type(exchange.head), **fields)
        if operation.body == "optional_json" and not exchange.head.has_body:
            return operation.request(**fields)
        heads.require_json(exchange.head)
        raw = await bodies.read_body(exchange.head, exchange.receive)
        exchange.body_read = True
        if not raw and operation.body == "optional_json":
            return operation.request(**fields)
        decoded = bodies.decode_json(raw, self._decoders[operation.name])
        if operation.body_field:
            fields[operation.body_field] = decoded
        elif not fields:
            return decoded
        else:
            fields.update({name: getattr(decoded, name) for name in decoded.__struct_fields__})
        return operation.request(**fields)

    async def _upload(self, exchange: _Exchange, uid: int) -> tuple[int, int]:
        """The body as an unlinked file, and its size."""
        heads.raw_media_type(exchange.head)
        if self._uploading[uid] >= UPLOADS_PER_UID_MAX or self._uploading.total() >= UPLOADS_MAX:
            raise AetherError("BUSY", "cannot take the upload: too many are in progress", retry_after_s=1)
        self._uploading[uid] += 1
        try:
            fd, size = await bodies.spool_body(exchange.head, exchange.receive, self._spool, limits.UPLOAD_BYTES_MAX)
        finally:
            self._uploading[uid] -= 1
            if not self._uploading[uid]:
                del self._uploading[uid]
        exchange.body_read = True
        return fd, size


class _Exchange:
    """One request and its answer: remembers whether the answer began and whether the body was read."""

    __slots__ = ("_send", "body_read", "head", "receive", "started")

    def __init__(self, head: Head, receive: bodies.Receive, send: replies.Send) -> None:
        self.head = head
        self.receive = receive
        self._send = send
        self.started = False
        self.body_read = False

    async def refuse(self, error: AetherError) -> None:
        """Answers an error; once an answer began, all that is left is to end the connection."""
        if self.started:
            raise error
        await self._drain()
        self.started = True
        await replies.send_error(self._send, error, self.head.request_id, close=self._must_close)

    async def _drain(self) -> None:
        """Reads an unread body of some size to its end: a client that sends head and body apart would otherwise get
        EPIPE instead of the answer, and lose its connection. One that asked first (Expect) is just told no."""
        announced = self.head.values.get(b"content-length", b"0")
        small = announced.isdigit() and len(announced) < 10 and int(announced) <= DRAIN_BYTES_MAX
        if self._must_close and small and not self.head.expects_continue:
            self.body_read = await bodies.discard(self.receive, DRAIN_BYTES_MAX)

    async def send_allow(self, methods: tuple[str, ...]) -> None:
        self.started = True
        headers = [(b"allow", ", ".join(methods).encode()), *self._headers()]
        await self._send({"type": "http.response.start", "status": 204, "headers": headers})
        await self._send({"type": "http.response.body", "body": b""})

    async def send_openapi(self) -> None:
        self.started = True
        reply = RawReply(_openapi(), "application/json")
        await replies.send_raw(self._send, 200, reply, self._headers())

    async def send_reply(self, operation: Operation, reply: Reply, *, head_only: bool) -> None:
        status = operation.statuses[0]
        self.started = True
        headers = self._headers()
        if isinstance(reply, SubmittedJob):
            if reply.state in TERMINAL:
                status = 200
            headers.append((b"location", b"/v0/jobs/" + reply.job_id.encode("ascii")))
            await replies.send_struct(self._send, status, reply, headers)
        elif isinstance(reply, msgspec.Struct):
            await replies.send_struct(self._send, status, reply, headers)
        elif isinstance(reply, RawReply):
            await replies.send_raw(self._send, status, reply, headers)
        elif isinstance(reply, FileReply):
            await replies.send_file(self._send, status, reply, headers, head_only=head_only)
        else:
            await replies.send_stream(self._send, status, reply, headers, head_only=head_only)

    def _headers(self) -> replies.Headers:
        headers = [(b"x-request-id", self.head.request_id.encode("ascii"))]
        if self._must_close:
            headers.append((b"connection", b"close"))
        return headers

    @property
    def _must_close(self) -> bool:
        # What is left of a body that nobody read would be taken for the next request's, or drained for nothing.
        return not self.body_read and self.head.has_body


def _require_upgrade(head: Head, connection: Connection) -> None:
    if head.upgrade != STREAM_PROTOCOL or connection.take_over is None:
        raise AetherError(
            "BAD_REQUEST",
            "cannot attach: the request does not upgrade the connection",
            f"send `Connection: Upgrade` and `Upgrade: {STREAM_PROTOCOL}`, and nothing more before the answer",
        )


async def upgrade(reply: UpgradeReply, connection: Connection, request_id: str) -> None:
    """Answers 101 and gives the socket to `reply.run`, which closes it. Not sent through ASGI: it has no such answer.

    The socket takes so short a head whole: nothing was written to it that is not sent.
    """
    taken = connection.take_over() if connection.take_over is not None and not connection.lost else None
    if taken is None:
        reply.refuse()
        raise bodies.ClientGoneError
    head = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {reply.protocol}\r\n"
    try:
        os.write(taken, f"{head}X-Request-Id: {request_id}\r\n\r\n".encode("ascii"))
    except OSError as error:
        os.close(taken)
        reply.refuse()
        raise bodies.ClientGoneError from error
    await reply.run(taken)


def _caller(head: Head, peer: Peer) -> Caller:
    return Caller(
        peer.uid,
        peer.gid,
        peer.pid,
        heads.credential(head),
        head.request_id,
        heads.traceparent(head),
        heads.idempotency_key(head),
        peer.certificate,
    )


@cache
def _openapi() -> bytes:
    # Imported on first use: the document costs 20 ms, and most instances are never asked for it.
    from aether.api.openapi import document_bytes

    return document_bytes()
