"""From a name to a connection: resolve once, check every address, dial the checked address and no other.

The name is not looked up again between the check and the connection, so an answer that changes (DNS rebinding) has
nothing to change. Look-ups run in threads, few at a time per cell: getaddrinfo(3) cannot be interrupted, and a cell
that asks for names on a dead server must not hold up the others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from aether.contract.network import Address
from aether.egress.rules import RefusedError, Rules
from aether.egress.stream import CHUNK_BYTES, PlainStream

Resolve = Callable[[str, int], Awaitable[tuple[Address, ...]]]
"""All addresses of a name for TCP; raises OSError when there is none."""
LOOKUP_TIMEOUT_S: Final = 10.0
LOOKUPS_PER_CELL_MAX: Final = 4
LOOKUP_THREADS: Final = 32
DIAL_TIMEOUT_S: Final = 10.0
ADDRESSES_TRIED_MAX: Final = 4


class FailedError(Exception):
    """The destination is allowed but could not be reached: `reason` is a stable word for the record."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection and the address that was dialled."""

    stream: PlainStream
    address: str


class SystemNames:
    """The host's resolver in threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="names")

    async def resolve(self, name: str, port: int) -> tuple[Address, ...]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        )
        return tuple(dict.fromkeys(ipaddress.ip_address(str(entry[4][0])) for entry in found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Dialer:
    """Reaches what one cell's rules allow."""

    def __init__(self, rules: Rules, resolve: Resolve, tls: ssl.SSLContext) -> None:
        self._rules = rules
        self._resolve = resolve
        self._tls = tls
        self._lookups = asyncio.Semaphore(LOOKUPS_PER_CELL_MAX)
        self._running: set[asyncio.Future[tuple[Address, ...]]] = set()

    async def addresses(self, host: str | Address, port: int) -> list[Address]:
        """The addresses that may be dialled for an admitted host.

        Raises RefusedError `address` when there are some but none may, FailedError `name` when there is none.
        """
        found = await self._lookup(host, port) if isinstance(host, str) else (host,)
        refused: RefusedError | None = None
        allowed: list[Address] = []
        for address in found:
            try:
                self._rules.check_address(address, port)
                allowed.append(address)
            except RefusedError as error:
                refused = error
        if not allowed:
            raise refused or FailedError("name", f"{host} has no address")
        return allowed[:ADDRESSES_TRIED_MAX]

    async def _lookup(self, name: str, port: int) -> tuple[Address, ...]:
        await self._lookups.acquire()
        lookup = asyncio.ensure_future(self._resolve(name, port))
        self._running.add(lookup)
        lookup.add_done_callback(self._looked_up)  # the thread is busy until then, whoever waits for it
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                return await asyncio.shield(lookup)
        except TimeoutError:
            raise FailedError("name", f"{name} was not resolved in {LOOKUP_TIMEOUT_S:.0f} s") from None
        except (OSError, ValueError) as error:
            raise FailedError("name", f"{name} cannot be resolved: {error}") from error

    def _looked_up(self, lookup: asyncio.Future[tuple[Address, ...]]) -> None:
        self._running.discard(lookup)
        self._lookups.release()
        if not lookup.cancelled():
            lookup.exception()

    async def dial(self, host: str | Address, port: int, *, tls: bool) -> Dialled:
        """A connection to an admitted host, with its certificate verified for that name if `tls`.

        Raises RefusedError or FailedError (`name`, `dial`, `tls`).
        """
        last = ""
        for address in await self.addresses(host, port):
            try:
                async with asyncio.timeout(DIAL_TIMEOUT_S):
                    return Dialled(await self._open(address, port, str(host) if tls else None), str(address))
            except ssl.SSLError as error:
                raise FailedError("tls", f"TLS with {host} failed: {error.reason or error}") from error
            except TimeoutError:
                last = f"no answer in {DIAL_TIMEOUT_S:.0f} s"
            except OSError as error:
                last = error.strerror or str(error)
        raise FailedError("dial", f"{host}:{port} cannot be reached: {last}")

    async def _open(self, address: Address, port: int, verify_for: str | None) -> PlainStream:
        loop = asyncio.get_running_loop()
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, (str(address), port))
            if verify_for is None:
                return PlainStream(*await asyncio.open_connection(sock=sock, limit=CHUNK_BYTES))
            return PlainStream(
                *await asyncio.open_connection(sock=sock, limit=CHUNK_BYTES, ssl=self._tls, server_hostname=verify_for)
            )
        except BaseException:
            sock.close()
            raise


def client_tls() -> ssl.SSLContext:
    """Verifies servers against the host's trusted certificates (or SSL_CERT_FILE, as OpenSSL reads it)."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
