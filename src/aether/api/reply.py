"""Replies on the wire: typed JSON, raw bytes, a range of a descriptor, a pulled stream.

`send` is ASGI's: it returns when the transport may take more, so a slow reader slows the source and holds at
most one chunk and the transport's buffer. Descriptors and streams are closed on every way out.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Final

import msgspec

from aether.api.operation import ErrorReply
from aether.contract import limits
from aether.contract.calls import FileReply, RawReply, StreamReply
from aether.contract.errors import AetherError
from aether.contract.ids import is_digest

Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

FILE_CHUNK_BYTES: Final = 256 * limits.KIB
RETRY_AFTER_S_DEFAULT: Final = 1
_ENCODER: Final = msgspec.json.Encoder()
_JSON_TYPE: Final = (b"content-type", b"application/json")
_CLOSE: Final = (b"connection", b"close")


async def send_bytes(send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, (b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})


async def send_struct(send: Send, status: int, value: msgspec.Struct, headers: Headers) -> None:
    """Typed JSON."""
    await send_bytes(send, status, _ENCODER.encode(value), (_JSON_TYPE, *headers))


async def send_raw(send: Send, status: int, reply: RawReply, headers: Headers) -> None:
    await send_bytes(send, status, reply.body, ((b"content-type", reply.media_type.encode("latin-1")), *headers))


async def send_file(send: Send, status: int, reply: FileReply, headers: Headers, *, head_only: bool) -> None:
    """Sends the range and closes the descriptor. A file that turns out short ends the connection: the client
    sees fewer bytes than Content-Length says, which every HTTP client reports."""
    try:
        start = [
            (b"content-type", reply.media_type.encode("latin-1")),
            (b"content-length", b"%d" % reply.size_bytes),
            *_digest_headers(reply.digest),
            *headers,
        ]
        await send({"type": "http.response.start", "status": status, "headers": start})
        offset, left = reply.offset, 0 if head_only else reply.size_bytes
        while left > 0:
            size = min(left, FILE_CHUNK_BYTES)
            if size <= limits.RESULT_INLINE_BYTES_MAX:
                chunk = os.pread(reply.fd, size, offset)
            else:
                chunk = await asyncio.to_thread(os.pread, reply.fd, size, offset)
            if not chunk:
                raise OSError(f"cannot send a file: it ends {left} bytes early")
            offset, left = offset + len(chunk), left - len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})
        if head_only or reply.size_bytes == 0:
            await send({"type": "http.response.body", "body": b""})
    finally:
        os.close(reply.fd)


async def send_stream(send: Send, status: int, reply: StreamReply, headers: Headers, *, head_only: bool) -> None:
    """Pulls chunk after chunk; closes the source on every way out."""
    try:
        start = [(b"content-type", reply.media_type.encode("latin-1")), *headers]
        await send({"type": "http.response.start", "status": status, "headers": start})
        if not head_only:
            async for chunk in reply.chunks:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        close = getattr(reply.chunks, "aclose", None)
        if close is not None:
            with suppress(RuntimeError):
                await close()


async def send_error(send: Send, error: AetherError, request_id: str, *, close: bool) -> None:
    """The one shape of an error; `close` when unread body bytes would follow on the connection."""
    kind = error.kind
    status = kind.http if kind.http >= 400 else 500
    headers: Headers = [(b"x-request-id", request_id.encode("ascii"))]
    if status in (429, 503):
        retry_after_s = error.retry_after_s if error.retry_after_s is not None else RETRY_AFTER_S_DEFAULT
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 405:
        headers.append((b"allow", str(error.details.get("allow", "")).encode("ascii")))
    if close:
        headers.append(_CLOSE)
    await send_struct(send, status, ErrorReply(error=error.body(), request_id=request_id), headers)


def _digest_headers(digest: str | None) -> Headers:
    """ETag (RFC 9110) and Repr-Digest (RFC 9530)."""
    if digest is None or not is_digest(digest):
        return []
    encoded = base64.b64encode(bytes.fromhex(digest.removeprefix("sha256:")))
    return [(b"etag", b'"%s"' % digest.encode()), (b"repr-digest", b"sha-256=:%s:" % encoded)]
