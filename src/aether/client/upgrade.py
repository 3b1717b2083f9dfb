"""A call that turns its connection into a stream of bytes (RFC 9110, 7.8): the head by hand, then the socket.

`http.client` reads ahead of an answer's head, so what follows a 101 would be lost in its buffer.
"""

from __future__ import annotations

import socket
from typing import Final

import msgspec

from aether.api.operation import ErrorReply
from aether.client.transport import Call, UnixConnection
from aether.contract.errors import AetherError

HEAD_BYTES_MAX: Final = 32 * 1024
BODY_BYTES_MAX: Final = 1 << 20


def open_stream(connection: UnixConnection, call: Call, protocol: str) -> socket.socket:
    """The socket after the 101, the caller's; raises the AetherError that was answered, UNREACHABLE, PROTOCOL."""
    try:
        connection.connect()
        sock = connection.sock
        sock.sendall(_head(call, protocol))
        status, rest = _read_head(sock)
        if status == 101:
            sock.settimeout(None)
            return sock
        raise _refusal(sock, status, rest)
    except OSError as error:
        connection.close()
        raise AetherError("UNREACHABLE", f"cannot reach {connection.path}: {error.strerror or error}") from error
    except AetherError:
        connection.close()
        raise


def _head(call: Call, protocol: str) -> bytes:
    headers = {"Host": "localhost", **call.headers, "Connection": "Upgrade", "Upgrade": protocol, "Content-Length": "0"}
    lines = [f"{call.method} {call.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _read_head(sock: socket.socket) -> tuple[int, bytes]:
    """The status, and what came of the body. A byte at a time until the head ends: what follows is not ours."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte or len(head) > HEAD_BYTES_MAX:
            raise AetherError("PROTOCOL", "cannot read the answer: its head is cut off")
        head += byte
    status = head.split(b" ", 2)[1]
    if not status.isdigit():
        raise AetherError("PROTOCOL", "cannot read the answer: it has no status")
    return int(status), head


def _refusal(sock: socket.socket, status: int, head: bytes) -> AetherError:
    length = next(
        (row.split(b":")[1] for row in head.lower().split(b"\r\n") if row.startswith(b"content-length:")), b"0"
    )
    body = b""
    while len(body) < min(int(length), BODY_BYTES_MAX) and (data := sock.recv(65536)):
        body += data
    try:
        return AetherError.of(msgspec.json.decode(body, type=ErrorReply).error)
    except msgspec.MsgspecError:
        return AetherError("PROTOCOL", f"cannot read the answer: status {status} without an error body")
