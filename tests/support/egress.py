"""A cell's proxy on this machine's loopback, with a resolver that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from aether.contract.egresswire import EgressConnection
from aether.contract.network import Address, Network, parse_rule
from aether.egress.authority import CellAuthority
from aether.egress.proxy import CellProxy, Outside
from aether.egress.rules import destination_of
from aether.egress.secrets import Injection

CELL, JOB = "cell_test", "job_test"


@dataclass
class Names:
    """A resolver double: `table` maps a name to its addresses, or to a function that says them anew each time."""

    table: dict[str, list[str] | Callable[[], list[str]]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def resolve(self, name: str, port: int) -> tuple[Address, ...]:
        self.asked.append(name)
        found = self.table.get(name)
        if found is None:
            raise OSError(f"no such name {name}")
        return tuple(ipaddress.ip_address(text) for text in (found() if callable(found) else found))


@dataclass
class Running:
    """A proxy that serves 127.0.0.1:`port`, and what it noted."""

    proxy: CellProxy
    port: int
    rows: list[EgressConnection]
    names: Names

    async def row(self) -> EgressConnection:
        """The next thing noted; waits for it."""
        for _ in range(400):
            if self.rows:
                return self.rows.pop(0)
            await asyncio.sleep(0.005)
        raise AssertionError("nothing was noted")

    async def talk(self, data: bytes, timeout_s: float = 5.0) -> bytes:
        """Sends bytes and reads until the proxy closes; empty where it resets."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            with contextlib.suppress(ConnectionResetError):
                async with asyncio.timeout(timeout_s):
                    return await reader.read()
            return b""
        finally:
            writer.close()

    async def connect(self, target: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        """CONNECT; the status line and the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        return head.split(b"\r\n")[0], reader, writer


@contextlib.asynccontextmanager
async def proxied(
    network: Network,
    names: Names | None = None,
    tls: ssl.SSLContext | None = None,
    secrets: dict[str, Injection] | None = None,
) -> AsyncIterator[Running]:
    """The proxy of one cell while the block runs."""
    names = names or Names()
    rows: list[EgressConnection] = []
    hosts = {destination_of(parse_rule(credential.host))[0] for credential in network.credentials}
    authority = CellAuthority(CELL, hosts, datetime.datetime.now(datetime.UTC)) if network.intercept else None
    outside = Outside(names.resolve, tls or ssl.create_default_context())
    proxy = CellProxy(CELL, JOB, network, secrets or {}, authority, outside, rows.append)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    proxy.attach(listener)
    try:
        yield Running(proxy, port, rows, names)
    finally:
        await proxy.close()
