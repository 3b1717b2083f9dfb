"""The proxy of one cell: its listener, its connections, and what is noted of each.

A connection is an HTTP/1.1 proxy's: `CONNECT host:port`, then bytes that stay opaque but for the ClientHello, whose
name must be the host's; or `GET http://host/...`; or `GET http://NAME.internal/...`, which goes to the host of the
credential NAME over TLS with the credential added. An intercepted host's CONNECT ends in TLS of the cell's own
authority, and what comes inside is forwarded like the last.

Every destination passes `Rules` under its name, then under each address, before a byte leaves. Each is noted, once:
a refused one too. Connections beyond the cell's limit wait in the listener's backlog.

Lifetime: from `attach` until `close`, which ends what is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Final

import h11

from aether.contract import limits
from aether.contract.egresswire import EgressConnection, Verdict
from aether.contract.network import Network, parse_host, parse_name, parse_rule
from aether.egress.authority import CellAuthority
from aether.egress.dial import Dialer, FailedError, Resolve
from aether.egress.forward import Side, cell_side, exchange, next_request, request_head, say, server_side
from aether.egress.hello import EncryptedHelloError, NotTlsError, read_hello
from aether.egress.meter import Meter, Watch
from aether.egress.requests import Target, bad, connect_target, forward_target, inner_target
from aether.egress.rules import RefusedError, Rules, destination_of
from aether.egress.secrets import Injection
from aether.egress.stream import PlainStream, ServerTls, Stream, accepted

_ESTABLISHED: Final = b"HTTP/1.1 200 Connection established\r\n\r\n"
_STATUS: Final[Mapping[str, int]] = {"request": 400, "slow": 408, "rate": 429, "bytes": 429}
_ACCEPT_PAUSE_S: Final = 0.1
LINGER_S: Final = 1.0
Note = Callable[[EgressConnection], None]


@dataclass(frozen=True, slots=True)
class Outside:
    """What all cells' proxies share: the resolver, and whom to trust outside."""

    resolve: Resolve
    tls: ssl.SSLContext


@dataclass(slots=True)
class Trip:
    """One destination while it is under way; becomes a row."""

    host: str
    port: int
    rule: str | None = None
    address: str | None = None
    credential: str | None = None
    silent: bool = False
    """What follows is noted by itself."""


@dataclass(slots=True)
class Held:
    """A server's connection that may serve the next request for the same place."""

    key: tuple[str, int, bool]
    side: Side
    stream: PlainStream
    address: str


class CellProxy:
    """See the module head. `secrets` by credential name; `note` hears of every destination."""

    def __init__(
        self,
        cell_id: str,
        job_id: str,
        network: Network,
        secrets: Mapping[str, Injection],
        authority: CellAuthority | None,
        outside: Outside,
        note: Note,
    ) -> None:
        self.job_id = job_id
        self.network = network
        self.authority = authority
        self.connections = 0
        self.refused = 0
        self._cell_id = cell_id
        self._loop = asyncio.get_running_loop()
        self.meter = Meter(network.limits, self._loop.time)
        self._rules = Rules(network)
        self._dialer = Dialer(self._rules, outside.resolve, outside.tls)
        self._secrets = dict(secrets)
        self._places = {
            credential.name: destination_of(parse_rule(credential.host)) for credential in network.credentials
        }
        self._intercepted = {place: name for name, place in self._places.items()} if authority is not None else {}
        self._note = note
        self._slots = asyncio.Semaphore(network.limits.connections)
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<CellProxy {self._cell_id} open={len(self._serving)} connections={self.connections}>"

    def attach(self, listener: socket.socket) -> None:
        """Serves a listening socket, which it owns from now on; a second one replaces the first."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._listener.close()
        listener.setblocking(False)
        self._listener = listener
        self._accepting = self._loop.create_task(self._accept(listener))

    async def close(self) -> None:
        tasks = [*self._serving, *([self._accepting] if self._accepting is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._secrets.clear()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await self._slots.acquire()
            try:
                sock, _ = await self._loop.sock_accept(listener)
            except OSError:  # out of descriptors, or the client left before it was taken
                self._slots.release()
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            except BaseException:
                self._slots.release()
                raise
            task = self._loop.create_task(self._serve(sock))
            self._serving.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._slots.release()

    async def _serve(self, sock: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        stream: PlainStream | None = None
        watch = Watch(self.meter, self._loop, task.cancel)
        try:
            stream = await accepted(sock)
            await self._converse(stream, watch)
            stream.close()
        except (OSError, h11.ProtocolError):
            pass
        except asyncio.CancelledError:
            if watch.over is None:
                raise
        finally:
            watch.close()
            if stream is not None:
                stream.abort()
            else:
                sock.close()

    # ---- one connection

    async def _converse(self, stream: PlainStream, watch: Watch) -> None:
        cell = cell_side(stream)
        held: list[Held] = []
        try:
            while (request := await self._next(cell, watch)) is not None:
                if request.method == b"CONNECT":
                    await self._refusing(cell, self._connect(cell, stream, request, watch))
                    return
                if not await self._refusing(cell, self._forward(cell, request, None, held, watch)):
                    return
        finally:
            for left in held:
                left.stream.close()

    async def _next(self, cell: Side, watch: Watch) -> h11.Request | None:
        try:
            return await next_request(cell)
        except RefusedError as refused:
            self._row(Trip("", 0), watch, (0, 0, 0), "refused", refused.reason)
            await say(cell, _STATUS.get(refused.reason, 403), f"aether: {refused}\n")
            return None

    async def _refusing(self, cell: Side, work: Coroutine[None, None, bool]) -> bool:
        """Runs `work`, and tells the cell why when it is refused or fails."""
        try:
            return await work
        except RefusedError as refused:
            await say(cell, _STATUS.get(refused.reason, 403), f"aether: {refused}\n")
        except FailedError as failed:
            await say(cell, 502, f"aether: {failed}\n")
        return False

    async def _connect(self, cell: Side, stream: PlainStream, request: h11.Request, watch: Watch) -> bool:
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in request.headers):
            raise self._noted(Trip("", 0), watch, bad("CONNECT has no body"))
        target = self._target(connect_target, request, watch)
        async with self._trip(target, watch) as trip:
            self.meter.take_request()
            allowed = self._rules.check_host(target.host, target.port)
            trip.rule = allowed.rule
            intercepted = (str(target.host), target.port) in self._intercepted
            dialled = None
            if not intercepted:
                dialled = await self._dialer.dial(target.host, target.port, tls=False)
                trip.address = dialled.address
            try:
                await stream.write(_ESTABLISHED)
                cell.http.send_failed()  # from here on no answer of ours is HTTP any more
                stream.unread(cell.http.trailing_data[0])
                if not allowed.tcp or intercepted:
                    await _check_hello(stream, target)
                if dialled is not None:
                    await _tunnel(stream, dialled.stream, watch)
                    return False
            finally:
                if dialled is not None:
                    dialled.stream.close()
            tls = await self._terminate(stream, target)
            trip.silent = True
        await self._inside(tls, target, watch)
        return False

    async def _terminate(self, stream: PlainStream, target: Target) -> ServerTls:
        assert self.authority is not None
        tls = ServerTls(stream, self.authority.context(str(target.host)))
        try:
            async with asyncio.timeout(limits.EGRESS_HEADER_TIMEOUT_S):
                await tls.handshake()
        except ssl.SSLError as error:
            raise FailedError("tls", f"the client does not accept the cell's authority: {error.reason}") from error
        except TimeoutError:
            raise RefusedError("slow", "the TLS handshake took too long") from None
        return tls

    async def _inside(self, tls: ServerTls, outer: Target, watch: Watch) -> None:
        """The requests in an intercepted CONNECT."""
        cell = cell_side(tls)
        held: list[Held] = []
        try:
            while (request := await self._next(cell, watch)) is not None:
                if request.method == b"CONNECT":
                    refused = self._noted(Trip(str(outer.host), outer.port), watch, bad("CONNECT within CONNECT"))
                    await say(cell, 400, f"aether: {refused}\n")
                    break
                if not await self._refusing(cell, self._forward(cell, request, outer, held, watch)):
                    break
            await tls.finish()
        finally:
            for left in held:
                left.stream.close()

    async def _forward(
        self, cell: Side, request: h11.Request, outer: Target | None, held: list[Held], watch: Watch
    ) -> bool:
        """One request, plain or inside an intercepted CONNECT (`outer`); whether the connection may go on."""
        read = forward_target if outer is None else lambda asked: inner_target(asked, outer)
        target = self._target(read, request, watch)
        async with self._trip(target, watch) as trip:
            self.meter.take_request()
            name = target.credential if outer is None else self._intercepted[(str(target.host), target.port)]
            injection = self._secrets.get(name) if name is not None else None
            tls = injection is not None
            if injection is not None:
                host, port = self._places[injection.name]
                target = Target(parse_host(host), port, target.path)
                trip.host, trip.port, trip.credential = host, port, injection.name
            trip.rule = self._rules.check_host(target.host, target.port).rule
            head = request_head(request, target, 443 if tls else 80, injection)
            return await self._exchange(cell, head, target, tls, injection, held, watch, trip)

    async def _exchange(
        self,
        cell: Side,
        head: h11.Request,
        target: Target,
        tls: bool,
        injection: Injection | None,
        held: list[Held],
        watch: Watch,
        trip: Trip,
    ) -> bool:
        key = (str(target.host), target.port, tls)
        server = _take(held, key)
        if server is None:
            dialled = await self._dialer.dial(target.host, target.port, tls=tls)
            server = Held(key, server_side(dialled.stream), dialled.stream, dialled.address)
        trip.address = server.address
        again = False
        try:
            goes_on, again = await exchange(cell, server.side, head, injection, watch)
        finally:
            if again:
                held.append(server)
            else:
                server.stream.close()
        return goes_on

    # ---- notes

    def _target(self, read: Callable[[h11.Request], Target], request: h11.Request, watch: Watch) -> Target:
        """Where a request goes; what cannot be read is noted too."""
        try:
            return read(request)
        except RefusedError as refused:
            raise self._noted(Trip("", 0), watch, refused) from None

    def _noted(self, trip: Trip, watch: Watch, refused: RefusedError) -> RefusedError:
        self._row(trip, watch, (watch.sent_bytes, watch.received_bytes, watch.age_ms), "refused", refused.reason)
        return refused

    @contextlib.asynccontextmanager
    async def _trip(self, target: Target, watch: Watch) -> AsyncIterator[Trip]:
        """Notes how the destination fared, whatever happens."""
        trip = Trip(str(target.host), target.port)
        before = (watch.sent_bytes, watch.received_bytes, watch.age_ms)
        verdict: Verdict = "allowed"
        reason: str | None = None
        try:
            yield trip
        except RefusedError as refused:
            verdict, reason = "refused", refused.reason
            raise
        except FailedError as failed:
            verdict, reason = "failed", failed.reason
            raise
        except asyncio.CancelledError:
            reason = watch.over.reason if watch.over is not None else "closed"
            raise
        except (OSError, h11.ProtocolError):
            reason = "reset"
            raise
        finally:
            if not trip.silent:
                self._row(trip, watch, before, verdict, reason)

    def _row(
        self, trip: Trip, watch: Watch, before: tuple[int, int, int], verdict: Verdict, reason: str | None
    ) -> None:
        self.connections += 1
        self.refused += verdict == "refused"
        sent, received, age_ms = before
        self._note(
            EgressConnection(
                cell_id=self._cell_id,
                job_id=self.job_id,
                host=trip.host,
                port=trip.port,
                address=trip.address,
                rule=trip.rule,
                verdict=verdict,
                reason=reason,
                credential=trip.credential,
                sent_bytes=watch.sent_bytes - sent,
                received_bytes=watch.received_bytes - received,
                ms=watch.age_ms - age_ms,
            )
        )


def _take(held: list[Held], key: tuple[str, int, bool]) -> Held | None:
    """The connection for `key`, if it is there and the server has not ended it; any other one is closed."""
    found: Held | None = None
    for server in held:
        if server.key == key and not server.stream.ended:
            found = server
        else:
            server.stream.close()
    held.clear()
    return found


async def _check_hello(stream: PlainStream, target: Target) -> None:
    """Reads the ClientHello and puts it back; raises RefusedError unless it names the target."""
    data = b""
    try:
        async with asyncio.timeout(limits.EGRESS_HEADER_TIMEOUT_S):
            while (hello := read_hello(data)) is None:
                chunk = await stream.read()
                if not chunk:
                    raise RefusedError("no-hello", "the client left before its ClientHello")
                data += chunk
        name = None if hello.server_name is None else parse_name(hello.server_name)
    except TimeoutError:
        raise RefusedError("slow", "the ClientHello took too long") from None
    except NotTlsError as error:
        raise RefusedError("not-tls", f"{error}; allow tcp://{target.host}:{target.port} for other bytes") from error
    except EncryptedHelloError as error:
        raise RefusedError("encrypted-hello", str(error)) from error
    except ValueError as error:
        raise RefusedError("hello", f"the ClientHello cannot be read: {error}") from error
    if isinstance(target.host, str) and name != target.host:
        raise RefusedError("server-name", f"the ClientHello names {name or 'nobody'}, CONNECT {target.host}")
    if not isinstance(target.host, str) and name is not None:  # RFC 6066 3: an address is no server name
        raise RefusedError("server-name", f"the ClientHello names {name}, CONNECT the address {target.host}")
    stream.unread(data)


async def _tunnel(cell: Stream, server: Stream, watch: Watch) -> None:
    """Copies both ways, each at the pace of its reader, until both ended, or the server did LINGER_S ago."""
    up = asyncio.ensure_future(_copy(cell, server, watch.sent))
    down = asyncio.ensure_future(_copy(server, cell, watch.received))
    try:
        done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if up in done:
            up.result()
            await asyncio.wait({down})
        down.result()
        await asyncio.wait({up}, timeout=LINGER_S)
        if up.done():
            up.result()
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def _copy(source: Stream, sink: Stream, count: Callable[[int], None]) -> None:
    while data := await source.read():
        count(len(data))
        await sink.write(data)
    await sink.finish()
