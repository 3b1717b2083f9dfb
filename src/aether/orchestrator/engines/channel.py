"""The conversation with one model runtime: pipelined requests over its socket (`contract.modelwire`).

The runtime is untrusted: its frames are bounded and typed, an answer to an unknown request is let go, and
anything malformed ends the channel. Requests written in one turn of the loop leave in one write.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final, TypeVar, cast

import msgspec

from aether.contract.codec import UNREADABLE, FrameBuffer, encode_frame
from aether.contract.errors import AetherError
from aether.contract.modelwire import PROTOCOL_VERSION, Hello, InferReply, InferRequest

T = TypeVar("T")
_SWEEP_S: Final = 0.25
_HELLO: Final = msgspec.msgpack.Decoder(Hello)
_REPLY: Final = msgspec.msgpack.Decoder(InferReply)


class Channel(asyncio.Protocol):
    """Alive from `open` until `closed` resolves. Requests in flight then fail with ENGINE_DIED."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._frames = FrameBuffer()
        self._transport: asyncio.WriteTransport | None = None
        self._outgoing: list[bytes] = []
        self._pending: dict[str, tuple[asyncio.Future[InferReply], float]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self.hello: asyncio.Future[Hello] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def __repr__(self) -> str:
        return f"<Channel pending={len(self._pending)} closed={self.closed.done()}>"

    @property
    def pending(self) -> int:
        """Requests without an answer yet."""
        return len(self._pending)

    @classmethod
    async def open(cls, fd: int, hello_within_s: float) -> Channel:
        """Takes over the connected socket `fd`; returns after the runtime's Hello.

        Raises ENGINE_DIED when it ends first, VERSION_MISMATCH, and TIMED_OUT when it stays silent.
        """
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        _, channel = await asyncio.get_running_loop().create_unix_connection(cls, sock=sock)
        try:
            async with asyncio.timeout(hello_within_s):
                hello = await asyncio.shield(channel.hello)
        except TimeoutError:
            channel.close()
            raise AetherError("TIMED_OUT", f"cannot start the model runtime: silent for {hello_within_s} s") from None
        except BaseException:
            channel.close()
            raise
        if hello.protocol_version != PROTOCOL_VERSION:
            channel.close()
            raise AetherError(
                "VERSION_MISMATCH",
                f"cannot talk to the model runtime: protocol {hello.protocol_version}, not {PROTOCOL_VERSION}",
            )
        return channel

    def infer(self, request: InferRequest, within_s: float) -> asyncio.Future[InferReply]:
        """Sends a request, whose id must be its own; the future fails with TIMED_OUT or ENGINE_DIED.

        `within_s` is one constant per channel, so that the oldest request is the next to expire.
        """
        future: asyncio.Future[InferReply] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(_died())
            return future
        frame = encode_frame(request)
        self._pending[request.request_id] = (future, self._loop.time() + within_s)
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frame)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        return future

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of asyncio's

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._frames.feed(data):
                if self.hello.done():
                    self._answer(_REPLY.decode(payload))
                else:
                    self.hello.set_result(_HELLO.decode(payload))
        except (AetherError, *UNREADABLE) as error:
            self._end(AetherError("ENGINE_DIED", f"cannot understand the model runtime: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(_died())

    # ---- inside

    def _answer(self, reply: InferReply) -> None:
        future, _ = self._pending.pop(reply.request_id, (None, 0.0))
        if future is not None and not future.done():
            future.set_result(reply)

    def _flush(self) -> None:
        if self._transport is not None and not self.closed.done():
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def _sweep(self) -> None:
        now = self._loop.time()
        while self._pending:
            request_id, (future, deadline) = next(iter(self._pending.items()))
            if deadline > now and not future.done():
                break
            del self._pending[request_id]
            _fail(future, AetherError("TIMED_OUT", "cannot finish the model request: no answer within its deadline"))
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep) if self._pending else None

    def _end(self, error: AetherError) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._sweeper is not None:
            self._sweeper.cancel()
        _fail(self.hello, error)
        self.hello.exception()  # seen: nobody may be waiting for it any more
        for future, _ in self._pending.values():
            _fail(future, error)
        self._pending.clear()


def _fail(future: asyncio.Future[T], error: AetherError) -> None:
    if not future.done():
        future.set_exception(error)


def _died() -> AetherError:
    return AetherError("ENGINE_DIED", "cannot finish the model request: the model runtime ended")
