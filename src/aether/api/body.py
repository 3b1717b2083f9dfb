"""Request bodies: JSON bounded before it is decoded, uploads spooled to an unlinked file.

A body is never larger in memory than HTTP_BODY_BYTES_MAX plus the server's read buffer. An announced length
above the bound is refused before a byte is read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.api import head as heads
from aether.api.head import Head
from aether.contract import limits
from aether.contract.errors import AetherError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

# Possessive and closed by the end of text, so that no input makes it scan a byte twice.
_STRINGS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_TO_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_INLINE_WRITE_BYTES_MAX: Final = 64 * limits.KIB


_WHY_CHARS_MAX: Final = 400
"""A refusal names the field, and a client may have chosen a name as long as a body."""


class ClientGoneError(Exception):
    """The connection closed before the request was complete; there is nobody to answer."""


async def read_body(head: Head, receive: Receive, bytes_max: int = limits.HTTP_BODY_BYTES_MAX) -> bytes:
    """The whole body; raises TOO_LARGE or ClientGoneError."""
    _check_announced(head, bytes_max)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGoneError
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(body) > bytes_max:
            raise _too_large(len(body), bytes_max)
        return body
    parts = [body]
    size = len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > bytes_max:
            raise _too_large(size, bytes_max)
    return b"".join(parts)


async def discard(receive: Receive, bytes_max: int) -> bool:
    """Throws body bytes away as they come; whether the body ended within the bound. Raises ClientGoneError."""
    more = True
    while more and bytes_max >= 0:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        more = bool(message.get("more_body"))
        bytes_max -= len(message.get("body", b""))
    return not more


async def spool_body(head: Head, receive: Receive, directory: Path, bytes_max: int) -> tuple[int, int]:
    """Writes the body to an unlinked file below `directory`; returns its descriptor (at offset 0) and size.

    Raises TOO_LARGE, DISK_FULL, ClientGoneError; the file is gone then.
    """
    _check_announced(head, bytes_max)
    fd = await asyncio.to_thread(_unlinked_file, directory)
    try:
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            chunk: bytes = message.get("body", b"")
            more = bool(message.get("more_body"))
            size += len(chunk)
            if size > bytes_max:
                raise _too_large(size, bytes_max)
            if size <= _INLINE_WRITE_BYTES_MAX:
                _write_all(fd, chunk)
            else:
                await asyncio.to_thread(_write_all, fd, chunk)
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd, size


def decode_json(body: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """One typed JSON value; raises BAD_JSON for what is no JSON, BAD_FIELD for what does not fit the type."""
    if body.count(b"[") + body.count(b"{") > limits.JSON_DEPTH_MAX and _deeper_than(body, limits.JSON_DEPTH_MAX):
        raise AetherError(
            "BAD_JSON", f"cannot read the body: nested deeper than {limits.JSON_DEPTH_MAX}, or unbalanced"
        )
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise AetherError("BAD_FIELD", f"cannot read the body: {str(error)[:_WHY_CHARS_MAX]}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AetherError("BAD_JSON", f"cannot read the body: {error}") from error


def _deeper_than(body: bytes, depth_max: int) -> bool:
    """Whether brackets outside strings nest deeper (or do not balance). Each pass removes the leaves."""
    brackets = _STRINGS.sub(b"", body).translate(_TO_BRACKETS, _NOT_BRACKETS)
    for _ in range(depth_max):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _check_announced(head: Head, bytes_max: int) -> None:
    announced = heads.content_length(head)
    if announced is not None and announced > bytes_max:
        raise _too_large(announced, bytes_max)


def _too_large(size: int, bytes_max: int) -> AetherError:
    return AetherError(
        "TOO_LARGE",
        f"cannot accept a body of {size} bytes or more: the bound is {bytes_max}",
        details={"bytes_max": bytes_max},
    )


def _unlinked_file(directory: Path) -> int:
    """A file that vanishes with its descriptor: open(2) O_TMPFILE, or create and unlink where that is missing."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | os.O_EXCL, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(error) from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise AetherError("STATE_UNUSABLE", f"cannot spool an upload: {error}") from error
    fd, name = tempfile.mkstemp(dir=directory)
    Path(name).unlink()
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(error) from error
        raise AetherError("STATE_UNUSABLE", f"cannot spool an upload: {error}") from error


def _disk_full(error: OSError) -> AetherError:
    return AetherError("DISK_FULL", f"cannot spool an upload: {error.strerror}")
