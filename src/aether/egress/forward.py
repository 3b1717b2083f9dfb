"""One HTTP exchange between a cell and a server: the request goes up while the answer already comes down.

Both sides are read and written by h11, which frames bodies as it understood them: no byte of a head or of a chunk's
frame is copied, so the two sides cannot disagree about where a message ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import h11

from aether.contract import limits
from aether.egress.dial import FailedError
from aether.egress.meter import Watch
from aether.egress.requests import Headers, Target, authority, check_framing, onward
from aether.egress.rules import RefusedError
from aether.egress.secrets import Injection, Mask
from aether.egress.stream import Stream


@dataclass(slots=True)
class Side:
    """A stream and the parser of what comes over it."""

    stream: Stream
    http: h11.Connection

    async def event(self) -> object:
        """The next event that is one."""
        while True:
            event = self.http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.http.receive_data(await self.stream.read())

    async def send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            await self.stream.write(data)


def cell_side(stream: Stream) -> Side:
    return Side(stream, h11.Connection(h11.SERVER, limits.EGRESS_HEADER_BYTES_MAX))


def server_side(stream: Stream) -> Side:
    return Side(stream, h11.Connection(h11.CLIENT, limits.EGRESS_HEADER_BYTES_MAX))


async def next_request(cell: Side) -> h11.Request | None:
    """The next request's head, or None when the client is done.

    The first byte may take as long as the connection may idle, the rest of the head not. Raises RefusedError.
    """
    try:
        if cell.http.trailing_data[0] == b"":
            data = await cell.stream.read()
            if not data:
                return None
            cell.http.receive_data(data)
        async with asyncio.timeout(limits.EGRESS_HEADER_TIMEOUT_S):
            event = await cell.event()
    except h11.RemoteProtocolError as error:
        raise RefusedError("request", f"the request cannot be read: {error}") from error
    except TimeoutError:
        raise RefusedError("slow", "the request's head took too long") from None
    if not isinstance(event, h11.Request):
        return None
    if event.http_version not in (b"1.0", b"1.1"):
        raise RefusedError("request", "the request is of no version that this proxy speaks")
    check_framing(event.headers)
    return event


def request_head(request: h11.Request, target: Target, default_port: int, injection: Injection | None) -> h11.Request:
    """The request as it goes on: end-to-end headers, our own Host, and the credential in place of any of its name."""
    headers: Headers = [(b"host", authority(target.host, target.port, default_port))]
    headers += onward(request.headers, without=injection.header if injection else b"")
    if injection is not None:
        headers = [(name, value) for name, value in headers if name != b"accept-encoding"]
        headers += [(b"accept-encoding", b"identity"), (injection.header, injection.value)]
    return h11.Request(method=request.method, target=target.path, headers=headers)


async def exchange(
    cell: Side, server: Side, head: h11.Request, injection: Injection | None, watch: Watch
) -> tuple[bool, bool]:
    """Sends one request and passes its answer back; says of the cell's and the server's connection if it may go on.

    Raises FailedError when the server breaks off, RefusedError when the request is malformed or a limit ended it.
    An answer that has begun cannot be taken back: then the connection to the cell is cut.
    """
    await _write(server, head)
    up = asyncio.ensure_future(_send_body(cell, server, watch))
    down = asyncio.ensure_future(_answer(cell, server, injection, watch))
    try:
        done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if down not in done and (error := up.exception()) is not None and not isinstance(error, FailedError):
            raise error
        await asyncio.wait({down})  # a server may answer without having read all, and then says more than the failure
        down.result()
    finally:
        for task in (up, down):
            task.cancel()
        await asyncio.gather(up, down, return_exceptions=True)
    cell_goes_on = _next_cycle(cell)
    return cell_goes_on, _next_cycle(server)


def _next_cycle(side: Side) -> bool:
    if side.http.our_state is not h11.DONE or side.http.their_state is not h11.DONE:
        return False
    side.http.start_next_cycle()
    return True


async def _send_body(cell: Side, server: Side, watch: Watch) -> None:
    while True:
        try:
            event = await cell.event()
        except h11.RemoteProtocolError as error:
            raise RefusedError("request", f"the request's body cannot be read: {error}") from error
        if isinstance(event, h11.Data):
            watch.sent(len(event.data))
            await _write(server, h11.Data(data=event.data))
        elif isinstance(event, h11.EndOfMessage):
            await _write(server, h11.EndOfMessage())
            return
        else:
            raise ConnectionResetError("the client left")


async def _answer(cell: Side, server: Side, injection: Injection | None, watch: Watch) -> None:
    mask = Mask(injection.secret if injection is not None else b"")
    while True:
        event = await _read(server)
        if isinstance(event, h11.InformationalResponse):
            if event.status_code == 100:
                await cell.send(h11.InformationalResponse(status_code=100, headers=[]))
        elif isinstance(event, h11.Response):
            await cell.send(_response(event, mask))
        elif isinstance(event, h11.Data):
            watch.received(len(event.data))
            if data := mask.feed(bytes(event.data)):
                await cell.send(h11.Data(data=data))
        elif isinstance(event, h11.EndOfMessage):
            if data := mask.rest():
                await cell.send(h11.Data(data=data))
            await cell.send(h11.EndOfMessage())
            return
        else:
            raise FailedError("broken", "the server closed without an answer")


def _response(event: h11.Response, mask: Mask) -> h11.Response:
    headers = [(name, mask.whole(value)) for name, value in onward(event.headers)]
    if any(name == b"transfer-encoding" for name, _ in headers):
        headers = [(name, value) for name, value in headers if name != b"content-length"]
    return h11.Response(status_code=event.status_code, reason=mask.whole(event.reason), headers=headers)


async def _write(server: Side, event: h11.Event) -> None:
    try:
        await server.send(event)
    except OSError as error:
        raise FailedError("broken", f"the server broke off: {error}") from error


async def _read(server: Side) -> object:
    try:
        return await server.event()
    except (h11.RemoteProtocolError, OSError) as error:
        raise FailedError("broken", f"the server's answer cannot be read: {error}") from error


async def say(cell: Side, status: int, text: str) -> None:
    """A short answer of our own; the connection ends after it. Nothing where an answer has already begun."""
    if cell.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (b"proxy-agent", b"aether"),
    ]
    with contextlib.suppress(OSError, h11.LocalProtocolError):
        await cell.send(h11.Response(status_code=status, headers=headers))
        await cell.send(h11.Data(data=body))
        await cell.send(h11.EndOfMessage())
