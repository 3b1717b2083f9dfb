"""One message and its descriptors over a SOCK_SEQPACKET socket, both ways, non-blocking.

socket.recv_fds ignores its flags in Python 3.11 and returns inheritable descriptors: recvmsg with
MSG_CMSG_CLOEXEC instead, and MSG_CTRUNC means that descriptors were lost, which is an error.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from dataclasses import dataclass

from aether.contract.limits import SPAWNER_MESSAGE_BYTES_MAX
from aether.spawner.loop import READ, WRITE, Loop

FDS_MAX = 250
"""SCM_MAX_FD is 253 (unix(7))."""
_SPACE = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
BACKLOG_MAX = 1024


class ChannelClosedError(Exception):
    """The peer is gone, or broke the protocol; the text says which."""


@dataclass(frozen=True, slots=True)
class Message:
    """Bytes of one message and the descriptors that came with it (ours to close)."""

    data: bytes
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def receive(sock: socket.socket) -> Message | None:
    """The next message; None when there is none now. Raises ChannelClosedError."""
    try:
        data, ancillary, flags, _ = sock.recvmsg(SPAWNER_MESSAGE_BYTES_MAX, _SPACE, socket.MSG_CMSG_CLOEXEC)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError as error:
        raise ChannelClosedError(error.strerror or "error") from error
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    message = Message(data, tuple(fds))
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        message.close()
        raise ChannelClosedError("a message or its descriptors were truncated")
    if not data:
        message.close()
        raise ChannelClosedError("the peer closed the connection")
    return message


def send(sock: socket.socket, data: bytes, fds: tuple[int, ...] = ()) -> bool:
    """Send whole or not at all; False when the buffer is full. Raises ChannelClosedError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError as error:
        raise ChannelClosedError(error.strerror or "error") from error
    return True


class Outbox:
    """Messages that wait for room in a socket's buffer, in order; bounded by BACKLOG_MAX.

    It owns the descriptors handed to it and closes them once they are sent or dropped.
    """

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._waiting: deque[tuple[bytes, tuple[int, ...]]] = deque()

    def put(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send now or keep; raises ChannelClosedError when the peer is gone or does not read."""
        self._waiting.append((data, fds))
        if len(self._waiting) == 1:
            self.flush()
            if self._waiting:
                self._loop.change(self._sock.fileno(), READ | WRITE)
        elif len(self._waiting) > BACKLOG_MAX:
            raise ChannelClosedError("the peer does not read")

    def flush(self) -> None:
        """Send what fits; call when the socket is writable."""
        had = len(self._waiting)
        while self._waiting:
            data, fds = self._waiting[0]
            if not send(self._sock, data, fds):
                return
            self._waiting.popleft()
            for fd in fds:
                os.close(fd)
        if had > 1:
            self._loop.change(self._sock.fileno(), READ)

    def close(self) -> None:
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
