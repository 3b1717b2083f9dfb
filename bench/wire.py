"""A load generator that costs little: keep-alive HTTP/1.1 over a Unix socket, one request in flight per client."""

from __future__ import annotations

import asyncio
import time
from typing import cast


class Connection(asyncio.Protocol):
    """One client. `ask` sends prepared bytes and returns (status, body)."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0 or self._answer is None:
            return
        head = bytes(self._buffer[:head_end]).lower()
        at = head.index(b"content-length:") + len(b"content-length:")
        length = int(head[at : head.find(b"\r\n", at) if head.find(b"\r\n", at) > 0 else None])
        if len(self._buffer) < head_end + 4 + length:
            return
        body = bytes(self._buffer[head_end + 4 : head_end + 4 + length])
        self._buffer.clear()
        self._answer.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer


def post(path: str, body: bytes, headers: str = "") -> bytes:
    """A prepared request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def connect(socket_path: str) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_unix_connection(Connection, socket_path)
    return connection


async def closed_loop(socket_path: str, request: bytes, clients: int, seconds: float) -> tuple[list[float], int]:
    """`clients` clients ask as fast as they are answered; (latencies in ms, answers that were not 200)."""
    latencies: list[float] = []
    failures = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal failures
        connection = await connect(socket_path)
        while (start := time.perf_counter()) < end:
            status, _ = await connection.ask(request)
            latencies.append((time.perf_counter() - start) * 1e3)
            failures += status != 200
        connection.transport.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies, failures
