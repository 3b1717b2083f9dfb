"""egressd's verbs: a proxy per cell, made by aetherd's word and ended by it.

Nothing is decided here: rules, credentials and limits come from the authority, which admitted them. While aetherd is
away live cells are served on; what happens meanwhile waits in their journals, which are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aether.backends.link import EventHandlers, Handlers
from aether.contract import limits
from aether.contract.egresswire import (
    EgressCell,
    EgressClosed,
    EgressConnections,
    EgressDrop,
    EgressListen,
    EgressOpen,
    EgressOpened,
    EgressReached,
    EgressSecret,
    EgressServing,
    EgressSums,
    EgressWatch,
)
from aether.contract.errors import AetherError
from aether.contract.network import check_network, parse_rule
from aether.contract.ports import Link
from aether.contract.secrets import check_source
from aether.contract.wire import Empty, Hello, RoleHealth, Token
from aether.egress.authority import CellAuthority, bundle
from aether.egress.journal import Journal
from aether.egress.proxy import CellProxy, Outside
from aether.egress.rules import destination_of
from aether.egress.secrets import Injection, Sources

ROLE: Final = "egressd"


@dataclass(slots=True)
class _Cell:
    proxy: CellProxy
    journal: Journal


class Egress:
    """All cells that have a network. `now` is the wall clock, aware."""

    def __init__(self, sources: Sources, outside: Outside, version: str, now: Callable[[], datetime.datetime]) -> None:
        self._sources = sources
        self._outside = outside
        self._version = version
        self._now = now
        self._cells: dict[str, _Cell] = {}
        self._link: Link | None = None
        self._telling: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Egress cells={len(self._cells)}>"

    # ---- the link

    async def attach(self, link: Link) -> None:
        """Shakes hands and says which cells are served; raises AetherError."""
        mine = Hello(role=ROLE, protocol_version=limits.PROTOCOL_VERSION, version=self._version)
        theirs = await link.call("hello", mine, Hello)
        if theirs.version != self._version or theirs.protocol_version != limits.PROTOCOL_VERSION:
            raise AetherError("VERSION_MISMATCH", f"cannot work with aetherd {theirs.version}")
        drop = await link.call("egress.serving", EgressServing(cell_ids=tuple(self._cells)), EgressDrop)
        for cell_id in drop.cell_ids:
            await self._forget(cell_id)
        self._link = link
        self._telling = self._telling or asyncio.get_running_loop().create_task(self._tell())

    def detach(self, link: Link) -> None:
        if self._link is link:
            self._link = None

    async def close(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._telling
        for cell_id in list(self._cells):
            await self._forget(cell_id)

    def handlers(self, link: Callable[[], Link]) -> Handlers:
        """The verbs of one connection."""
        return {
            "egress.open": (EgressOpen, lambda body: self.open(link(), body)),
            "egress.listen": (EgressListen, lambda body: self.listen(link(), body)),
            "egress.secret": (EgressSecret, lambda body: self.secret(link(), body)),
            "egress.close": (EgressCell, self.close_cell),
            "egress.passed": (EgressWatch, self.passed),
            "health": (Empty, self._health),
        }

    def events(self) -> EventHandlers:
        return {}

    # ---- verbs

    async def open(self, link: Link, body: EgressOpen) -> EgressOpened:
        """`egress.open`; raises BAD_FIELD for rules or credentials that cannot be used."""
        cell = self._cells.get(body.cell_id)
        if cell is None:
            secrets = await asyncio.to_thread(self._loaded, body)
            cell = self._cells.get(body.cell_id) or self._cells.setdefault(body.cell_id, self._made(body, secrets))
        if cell.proxy.authority is None:
            return EgressOpened()
        fd = os.memfd_create("aether-trusted", os.MFD_CLOEXEC)
        with open(fd, "wb") as file:
            file.write(bundle(cell.proxy.authority.pem))
            file.flush()
            file.seek(0)
            return EgressOpened(ca_token=await link.send_fd(fd))

    async def secret(self, link: Link, body: EgressSecret) -> Token:
        """`egress.secret`; raises BAD_FIELD. The value crosses as a descriptor, in no frame."""
        check_source(f"secret {body.name}", body.source)
        value = await asyncio.to_thread(self._sources.read, f"secret {body.name}", body.source)
        fd = os.memfd_create("aether-secret", os.MFD_CLOEXEC)
        with open(fd, "wb") as file:
            file.write(value)
            file.flush()
            return Token(token=await link.send_fd(fd))

    def _loaded(self, body: EgressOpen) -> dict[str, Injection]:
        """The secrets of a cell; may block on files and on Vault."""
        check_network(body.network)
        return {credential.name: self._sources.load(credential) for credential in body.network.credentials}

    def _made(self, body: EgressOpen, secrets: dict[str, Injection]) -> _Cell:
        network = body.network
        hosts = {destination_of(parse_rule(credential.host))[0] for credential in network.credentials}
        authority = CellAuthority(body.cell_id, hosts, self._now()) if network.intercept and hosts else None
        journal = Journal()
        proxy = CellProxy(body.cell_id, body.job_id, network, secrets, authority, self._outside, journal.add)
        return _Cell(proxy, journal)

    async def listen(self, link: Link, body: EgressListen) -> Empty:
        """`egress.listen`; raises NO_SUCH_CELL, or PROTOCOL for what is no listening TCP socket."""
        fd = await link.take_fd(body.token)
        cell = self._cells.get(body.cell_id)
        try:
            if cell is None:
                raise AetherError("NO_SUCH_CELL", f"cannot serve {body.cell_id}: it was not opened")
            _check_listener(fd)
        except AetherError:
            os.close(fd)
            raise
        cell.proxy.attach(socket.socket(fileno=fd))
        return Empty()

    async def close_cell(self, body: EgressCell) -> EgressClosed:
        """`egress.close`: what was not told yet, and the sums."""
        cell = await self._forget(body.cell_id)
        if cell is None:
            return EgressClosed()
        sums = _sums(cell)
        return EgressClosed(rows=cell.journal.take(), sums=sums)

    async def passed(self, body: EgressWatch) -> EgressSums:
        """`egress.passed`; raises NO_SUCH_CELL."""
        cell = self._cells.get(body.cell_id)
        if cell is None:
            raise AetherError("NO_SUCH_CELL", f"cannot count for {body.cell_id}: it is not served")
        if body.sent_bytes is not None and body.received_bytes is not None:
            reached = functools.partial(self._reached, body.cell_id)
            cell.proxy.meter.tell_at(body.sent_bytes, body.received_bytes, reached)
        return _sums(cell)

    def _reached(self, cell_id: str) -> None:
        if self._link is not None and not self._link.closed:
            with contextlib.suppress(AetherError):  # whoever asked asks again after a reconnect
                self._link.notify("egress.reached", EgressReached(cell_id=cell_id))

    async def _forget(self, cell_id: str) -> _Cell | None:
        cell = self._cells.pop(cell_id, None)
        if cell is not None:
            await cell.proxy.close()
        return cell

    async def _health(self, body: Empty) -> RoleHealth:
        return RoleHealth(
            role=ROLE, ok=True, version=self._version, facts={"cells": len(self._cells), "uid": os.getuid()}
        )

    # ---- telling

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(limits.EGRESS_BATCH_INTERVAL_S)
            for cell in list(self._cells.values()):
                link = self._link
                if link is None or link.closed or not cell.journal:
                    continue
                with contextlib.suppress(AetherError):  # aetherd does not read: the sums still count what is lost
                    link.notify("egress.connections", EgressConnections(rows=cell.journal.take()))


def _sums(cell: _Cell) -> EgressSums:
    return EgressSums(
        connections=cell.proxy.connections,
        refused=cell.proxy.refused,
        sent_bytes=cell.proxy.meter.sent_bytes,
        received_bytes=cell.proxy.meter.received_bytes,
        unlisted=cell.journal.unlisted,
    )


def _check_listener(fd: int) -> None:
    """What is to be served must be a listening TCP socket on a loopback address; raises PROTOCOL."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            inet = sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM
            local = inet and sock.getsockname()[0] == "127.0.0.1"
    except OSError as error:
        raise AetherError("PROTOCOL", f"cannot serve the descriptor: {error.strerror}") from error
    if not (listening and local):
        raise AetherError("PROTOCOL", "cannot serve the descriptor: it is no listener on 127.0.0.1")
