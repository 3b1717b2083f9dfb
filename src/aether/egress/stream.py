"""Byte streams with bounded buffers: plain over a socket, and the server's end of TLS over one.

A read gives at most CHUNK_BYTES; a write returns when the peer's buffer has room again, so a slow reader holds back
the one who writes and nothing grows. TLS is done over memory BIOs and not by the event loop, since the first bytes
were already read to see the ClientHello.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Final, Protocol

CHUNK_BYTES: Final = 64 * 1024


class Stream(Protocol):
    """Raises OSError (or ssl.SSLError, which is one) when the peer breaks off."""

    async def read(self) -> bytes:
        """What has arrived; empty at the end."""
        ...

    async def write(self, data: bytes) -> None: ...

    async def finish(self) -> None:
        """Says that nothing more will be written."""
        ...

    def abort(self) -> None: ...


class PlainStream:
    """A connected socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unread = b""

    async def read(self) -> bytes:
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        return await self._reader.read(CHUNK_BYTES)

    def unread(self, data: bytes) -> None:
        """Puts bytes back in front of what is to be read."""
        self._unread = data + self._unread

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def finish(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            if self._writer.can_write_eof():
                self._writer.write_eof()

    def close(self) -> None:
        """Sends what is buffered, then closes."""
        self._writer.close()

    @property
    def ended(self) -> bool:
        """Whether the peer has ended it and nothing is left to read."""
        return self._reader.at_eof() or self._writer.is_closing()

    def abort(self) -> None:
        """Ends it at once, unless it is being closed: then what is buffered may still leave."""
        if not self._writer.is_closing():
            self._writer.transport.abort()


class ServerTls:
    """The server's end of TLS over a plain stream."""

    def __init__(self, under: PlainStream, context: ssl.SSLContext) -> None:
        self._under = under
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)

    async def handshake(self) -> None:
        """Raises ssl.SSLError, or ConnectionError when the client leaves."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                await self._flush()  # the alert that says why
                raise
            else:
                await self._flush()
                return

    async def read(self) -> bytes:
        while True:
            try:
                return self._tls.read(CHUNK_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._fill():
                    return b""
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view[:CHUNK_BYTES]) :]
            await self._flush()

    async def finish(self) -> None:
        with contextlib.suppress(ssl.SSLError, OSError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            await self._flush()
        await self._under.finish()

    def abort(self) -> None:
        self._under.abort()

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._under.write(self._outgoing.read())

    async def _fill(self) -> bool:
        data = await self._under.read()
        if not data:
            self._incoming.write_eof()
            if not self._tls.version():
                raise ConnectionResetError("the client left during the TLS handshake")
            return False
        self._incoming.write(data)
        return True


async def accepted(sock: socket.socket) -> PlainStream:
    """A stream over a connected socket, which it owns from now on."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return PlainStream(*await asyncio.open_connection(sock=sock, limit=CHUNK_BYTES))
