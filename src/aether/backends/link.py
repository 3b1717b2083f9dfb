"""The link between two roles over a Unix stream socket, with a SEQPACKET side socket for descriptors.

Protocol: `aether.contract.wire` envelopes in `aether.contract.codec` frames. The listener accepts, makes a
SEQPACKET pair and sends one end with the first byte (SCM_RIGHTS); from then on both directions are equal:
either side may call, answer, notify and hand over descriptors.

Invariants: calls in flight are bounded; frames written in one turn of the loop leave in one `write`; a broken
link fails every pending call with UNAVAILABLE and calls `on_close` once. Nothing is retried here.

Lifetime: from `accept`/`connect`/`pair` until `close`, end of file or a protocol error.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import msgspec

from aether.contract.codec import UNREADABLE, FrameBuffer, encode_frame
from aether.contract.errors import AetherError, ErrorBody
from aether.contract.limits import LINK_CALLS_IN_FLIGHT_MAX, LINK_WRITE_BUFFER_BYTES_MAX
from aether.contract.ports import EventHandler, Handler
from aether.contract.wire import ERROR, EVENT, REPLY, REQUEST

B = TypeVar("B", bound=msgspec.Struct)

Handlers = Mapping[str, tuple[type[msgspec.Struct], Handler]]
EventHandlers = Mapping[str, tuple[type[msgspec.Struct], EventHandler]]

_FD_WAIT_S: Final = 5.0
_FDS_UNCLAIMED_MAX: Final = 1024
_TOKEN: Final = struct.Struct(">Q")
_FD_BYTES: Final = array.array("i").itemsize


class _Envelope(msgspec.Struct, array_like=True):
    type: int
    id: int
    verb: str | None
    body: msgspec.Raw


_ENVELOPE: Final = msgspec.msgpack.Decoder(_Envelope)
_ENCODE: Final = msgspec.msgpack.Encoder().encode
_ERROR_BODY: Final = msgspec.msgpack.Decoder(ErrorBody)


class UnixLink(asyncio.Protocol):
    """One end of a link; implements `aether.contract.ports.Link`."""

    def __init__(
        self,
        side: socket.socket,
        handlers: Handlers,
        events: EventHandlers,
        on_close: Callable[[UnixLink], None] | None = None,
        on_error: Callable[[str, BaseException], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._side = _Side(side, self._loop)
        self._handlers = {verb: (msgspec.msgpack.Decoder(kind), run) for verb, (kind, run) in handlers.items()}
        self._events = {verb: (msgspec.msgpack.Decoder(kind), run) for verb, (kind, run) in events.items()}
        self._on_close = on_close
        self._on_error = on_error
        self._frames = FrameBuffer()
        self._pending: dict[int, tuple[asyncio.Future[Any], type[msgspec.Struct]]] = {}
        self._decoders: dict[type[msgspec.Struct], msgspec.msgpack.Decoder[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._outgoing: list[bytes] = []
        self._next_id = 1
        self._transport: asyncio.Transport | None = None
        self.closed = False

    def __repr__(self) -> str:
        return f"<UnixLink pending={len(self._pending)} serving={len(self._tasks)} closed={self.closed}>"

    # ---- Link

    async def call(self, verb: str, body: msgspec.Struct, reply: type[B]) -> B:
        """Sends a request and waits for its reply; raises the peer's AetherError, BUSY or UNAVAILABLE."""
        if self.closed:
            raise AetherError("UNAVAILABLE", f"cannot call {verb}: the other role is not connected", retry_after_s=1)
        if len(self._pending) >= LINK_CALLS_IN_FLIGHT_MAX:
            raise AetherError("BUSY", f"cannot call {verb}: too many calls in flight", retry_after_s=1)
        call_id = self._next_id
        self._next_id += 1
        future: asyncio.Future[B] = self._loop.create_future()
        self._pending[call_id] = (future, reply)
        try:
            self._send(REQUEST, call_id, verb, body)
            return await future
        finally:
            self._pending.pop(call_id, None)

    def notify(self, verb: str, body: msgspec.Struct) -> None:
        """Sends an event; silently nothing on a closed link (the peer reconciles when it returns)."""
        if not self.closed:
            self._send(EVENT, 0, verb, body)

    async def send_fd(self, fd: int) -> int:
        return await self._side.send(fd)

    async def take_fd(self, token: int) -> int:
        return await self._side.take(token)

    def close(self) -> None:
        if self._transport is not None:
            self._flush()
            self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                self._dispatch(_ENVELOPE.decode(payload))
        except (AetherError, *UNREADABLE) as error:
            self._report("frame", error)
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._side.close()
        for future, _ in self._pending.values():
            if not future.done():
                future.set_exception(AetherError("UNAVAILABLE", "cannot finish the call: the other role went away"))
        for task in self._tasks:
            task.cancel()
        if self._on_close is not None:
            self._on_close(self)

    # ---- inside

    def _send(self, kind: int, call_id: int, verb: str | None, body: msgspec.Struct) -> None:
        assert self._transport is not None
        frame = encode_frame((kind, call_id, verb, msgspec.Raw(_ENCODE(body))))
        if self._transport.get_write_buffer_size() > LINK_WRITE_BUFFER_BYTES_MAX:
            raise AetherError("BUSY", "cannot send: the other role reads too slowly", retry_after_s=1)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)

    def _flush(self) -> None:
        if self._outgoing and self._transport is not None and not self.closed:
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def _dispatch(self, envelope: _Envelope) -> None:
        if envelope.type == REQUEST:
            task = self._loop.create_task(self._serve(envelope))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif envelope.type == EVENT:
            verb = envelope.verb or ""
            if verb not in self._events:
                raise AetherError("PROTOCOL", f"cannot take event {verb!r}: unknown")
            decoder, run = self._events[verb]
            run(decoder.decode(envelope.body))
        elif envelope.type in (REPLY, ERROR):
            self._resolve(envelope)
        else:
            raise AetherError("PROTOCOL", f"cannot read an envelope of type {envelope.type}")

    def _resolve(self, envelope: _Envelope) -> None:
        future, kind = self._pending.get(envelope.id, (None, None))
        if future is None or kind is None or future.done():
            return
        if envelope.type == ERROR:
            future.set_exception(AetherError.of(_ERROR_BODY.decode(envelope.body)))
            return
        decoder = self._decoders.get(kind)
        if decoder is None:
            decoder = self._decoders[kind] = msgspec.msgpack.Decoder(kind)
        future.set_result(decoder.decode(envelope.body))

    async def _serve(self, envelope: _Envelope) -> None:
        verb = envelope.verb or ""
        try:
            if verb not in self._handlers:
                raise AetherError("PROTOCOL", f"cannot serve verb {verb!r}: unknown")
            decoder, run = self._handlers[verb]
            answer = await run(decoder.decode(envelope.body))
            if not self.closed:
                self._send(REPLY, envelope.id, None, answer)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if not isinstance(error, AetherError):
                self._report(verb, error)
                error = AetherError("INTERNAL", f"cannot serve {verb}: {type(error).__name__}: {error}")
            if not self.closed:
                with contextlib.suppress(AetherError):
                    self._send(ERROR, envelope.id, None, error.body())

    def _report(self, what: str, error: BaseException) -> None:
        if self._on_error is not None:
            self._on_error(what, error)


class _Side:
    """Descriptors in both directions, each with the sender's token. Unclaimed ones are bounded and closed."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._next_token = 1
        self._arrived: dict[int, int] = {}
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._sending = asyncio.Lock()
        loop.add_reader(sock.fileno(), self._readable)

    async def send(self, fd: int) -> int:
        async with self._sending:
            token = self._next_token
            self._next_token += 1
            while True:
                try:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
                    self._sock.sendmsg([_TOKEN.pack(token)], rights)
                    return token
                except BlockingIOError:
                    await _writable(self._loop, self._sock)
                except OSError as error:
                    raise AetherError("UNAVAILABLE", f"cannot hand over a descriptor: {error}") from error

    async def take(self, token: int) -> int:
        if (fd := self._arrived.pop(token, None)) is not None:
            return fd
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting[token] = future
        try:
            async with asyncio.timeout(_FD_WAIT_S):
                return await future
        except TimeoutError:
            raise AetherError("PROTOCOL", f"cannot take descriptor {token}: it did not arrive") from None
        finally:
            self._waiting.pop(token, None)

    def _readable(self) -> None:
        while True:
            try:
                # Python's socket.recv_fds drops the flags and returns inheritable descriptors (3.11).
                data, ancillary, flags, _ = self._sock.recvmsg(
                    _TOKEN.size, socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            except OSError:
                data, ancillary, flags = b"", [], 0
            fds = _descriptors(ancillary)
            if not data and not fds:
                self._loop.remove_reader(self._sock.fileno())
                return
            if len(data) != _TOKEN.size or len(fds) != 1 or flags & socket.MSG_CTRUNC:
                for fd in fds:
                    os.close(fd)
                continue
            self._deliver(_TOKEN.unpack(data)[0], fds[0])

    def _deliver(self, token: int, fd: int) -> None:
        waiting = self._waiting.get(token)
        if waiting is not None and not waiting.done():
            waiting.set_result(fd)
            return
        self._arrived[token] = fd
        if len(self._arrived) > _FDS_UNCLAIMED_MAX:
            os.close(self._arrived.pop(next(iter(self._arrived))))

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for fd in self._arrived.values():
            os.close(fd)
        self._arrived.clear()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(AetherError("UNAVAILABLE", "cannot take a descriptor: the other role went away"))


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(data[: len(data) - len(data) % _FD_BYTES])
            fds += received
    return fds


async def _writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_writer(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock.fileno())


MakeLink = Callable[[socket.socket], UnixLink]
"""Builds one end around its side socket; the caller chooses handlers."""


async def serve(path: Path, mode: int, accept: Callable[[socket.socket], bool], make: MakeLink) -> Callable[[], None]:
    """Listens on `path`; each connection that `accept` admits (by its peer credentials) becomes a link.

    Returns the function that stops listening.
    """
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    path.unlink(missing_ok=True)
    listener.bind(str(path))
    path.chmod(mode)
    listener.listen(8)

    async def accepting() -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            if not accept(sock):
                sock.close()
                continue
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
                sock.sendmsg([b"\0"], rights)
            link = make(ours)
            await loop.connect_accepted_socket(lambda link=link: link, sock)  # type: ignore[misc]

    task = loop.create_task(accepting())

    def stop() -> None:
        task.cancel()
        listener.close()

    return stop


async def connect(path: Path, make: MakeLink) -> UnixLink:
    """Connects to a listening role; raises OSError when nobody listens, AetherError on a bad greeting."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await loop.sock_connect(sock, str(path))
        side = await _receive_side(loop, sock)
    except BaseException:
        sock.close()
        raise
    _, link = await loop.create_connection(lambda: make(side), sock=sock)
    return link


async def _receive_side(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> socket.socket:
    ready = asyncio.Event()
    loop.add_reader(sock.fileno(), ready.set)
    try:
        async with asyncio.timeout(_FD_WAIT_S):
            await ready.wait()
    except TimeoutError:
        raise AetherError("PROTOCOL", "cannot connect to the other role: no greeting") from None
    finally:
        loop.remove_reader(sock.fileno())
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC)
    fds = _descriptors(ancillary)
    if data != b"\0" or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise AetherError("UNAVAILABLE", "cannot connect to the other role: it refused the connection")
    return socket.socket(fileno=fds[0])


async def pair(make_a: MakeLink, make_b: MakeLink) -> tuple[UnixLink, UnixLink]:
    """Two linked ends in one process: the roles of a test still speak through the codec."""
    loop = asyncio.get_running_loop()
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    side_a, side_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _, link_a = await loop.connect_accepted_socket(lambda: make_a(side_a), a)
    _, link_b = await loop.connect_accepted_socket(lambda: make_b(side_b), b)
    return link_a, link_b


def peer_uid(sock: socket.socket) -> int:
    """The uid that connected (SO_PEERCRED, unix(7)), fixed at connect time."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)
