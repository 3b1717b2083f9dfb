"""The spawner's socket: connections, requests, replies, events. Bytes become typed operations here.

Only the uids given at start may connect (SO_PEERCRED, checked at accept). A connection that breaks the protocol
or does not read its replies is closed; its client reconnects and asks `cell.list`. Replies may come in any order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aether.spawner.channel import ChannelClosedError, Message, Outbox, receive
from aether.spawner.loop import WRITE, Loop
from aether.spawner.protocol import RefusedError, Request, encode_error, encode_event, encode_ok, parse_request

CONNECTIONS_MAX = 64
TAKE_FDS = frozenset({"cell.create", "exec.start", "work.prepare", "work.put"})


@dataclass(slots=True, eq=False)
class Connection:
    """One client; `events`: it asked for them in hello."""

    sock: socket.socket
    outbox: Outbox
    events: bool = False
    closed: bool = False


class Answer:
    """The reply to one request. Takes over the descriptors given to `ok`."""

    def __init__(self, server: Server, connection: Connection, request_id: int) -> None:
        self._server = server
        self.connection = connection
        self._id = request_id

    def ok(self, value: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self._server.put(self.connection, encode_ok(self._id, value), fds)

    def refuse(self, refused: RefusedError) -> None:
        self._server.put(self.connection, encode_error(self._id, refused))


Handle = Callable[[Request, Message, Answer], None]
"""Performs a request; owns the message's descriptors; raises RefusedError or OSError when nothing was done."""


class Server:
    """Connections and what goes over them. `handle` is set before `listen`."""

    def __init__(self, loop: Loop, uids: frozenset[int]) -> None:
        self._loop = loop
        self._uids = uids
        self._connections: set[Connection] = set()
        self.handle: Handle | None = None

    def listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._loop.add(listener.fileno(), lambda _: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", raw)
        if uid not in self._uids or len(self._connections) >= CONNECTIONS_MAX:
            sock.close()
            return
        self.adopt(sock)

    def adopt(self, sock: socket.socket) -> None:
        """Serve a connection that is already trusted (an accepted one, or a socketpair's end)."""
        sock.setblocking(False)
        connection = Connection(sock, Outbox(self._loop, sock))
        self._connections.add(connection)
        self._loop.add(sock.fileno(), lambda events: self._on_socket(connection, events))

    def _on_socket(self, connection: Connection, events: int) -> None:
        try:
            if events & WRITE:
                connection.outbox.flush()
            message = receive(connection.sock)
            if message is not None:
                self._on_message(connection, message)
        except ChannelClosedError:
            self._close(connection)

    def _on_message(self, connection: Connection, message: Message) -> None:
        try:
            request = parse_request(message.data)
        except RefusedError as refused:
            message.close()
            self.put(connection, encode_error(refused.request_id, refused))
            return
        answer = Answer(self, connection, request.id)
        if self.handle is None or (message.fds and request.op not in TAKE_FDS):
            message.close()
            answer.refuse(RefusedError("PROTOCOL", f"cannot perform {request.op}: it takes no descriptors"))
            return
        try:
            self.handle(request, message, answer)
        except RefusedError as refused:
            answer.refuse(refused)
        except OSError as error:
            code = "DISK_FULL" if error.errno == errno.ENOSPC else "INTERNAL"
            answer.refuse(RefusedError(code, f"cannot perform {request.op}: {error.strerror}"))

    def put(self, connection: Connection, data: bytes, fds: tuple[int, ...] = ()) -> None:
        if connection.closed:
            for fd in fds:
                os.close(fd)
            return
        try:
            connection.outbox.put(data, fds)
        except ChannelClosedError:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        if not connection.closed:
            connection.closed = True
            self._connections.discard(connection)
            self._loop.remove(connection.sock.fileno())
            connection.outbox.close()
            connection.sock.close()

    def emit(self, name: str, value: dict[str, Any]) -> None:
        data = encode_event(name, value)
        for connection in list(self._connections):
            if connection.events:
                self.put(connection, data)

    def close(self) -> None:
        for connection in list(self._connections):
            self._close(connection)
