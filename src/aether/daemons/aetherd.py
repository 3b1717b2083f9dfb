"""Composition root of aetherd: the audit log and its fold, access, cells, the link to aurorad, the API socket.

Order of start: keys and log (which is checked), fold, spawner connection, link socket, API socket. The API
answers from the first moment; what is not there yet answers 503. Order of end: API, link, log.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from aether.api.http import HttpApp
from aether.api.operations import OPERATIONS
from aether.api.server import serve as serve_http
from aether.backends import link as links
from aether.contract.paths import Layout
from aether.contract.records import PolicyRef, Record, RecordType
from aether.daemons import identity as identities
from aether.daemons import process
from aether.daemons.accounts import accounts
from aether.daemons.auditlog import open_log, rotation
from aether.daemons.identity import Identity, SecuredSocket
from aether.daemons.node import open_node
from aether.substrate.access.access import Access, Minted
from aether.substrate.access.budget import Accounts
from aether.substrate.access.keyfile import Keys
from aether.substrate.access.keyfile import settle as settle_keys
from aether.substrate.again import ways
from aether.substrate.approvals import ApprovalDesk
from aether.substrate.asking import Asking
from aether.substrate.audit.receipts import Receipts
from aether.substrate.auditkeeping import AuditKeeping, Rotation
from aether.substrate.auditreading import AuditReading
from aether.substrate.book import Book
from aether.substrate.budgetdesk import BudgetDesk
from aether.substrate.cellfiles import CellFileDesk
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.activity import ActivityLogs
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.logs import JobLogs
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.egress import EgressDesk
from aether.substrate.egressreading import EgressReading
from aether.substrate.entries import Node
from aether.substrate.execution import Execution
from aether.substrate.fence import Fence
from aether.substrate.gate import Gate
from aether.substrate.images import ImageDesk
from aether.substrate.keydesk import KeyDesk
from aether.substrate.labels import LabelDesk
from aether.substrate.meter import Meter
from aether.substrate.orchestra import Orchestra
from aether.substrate.pkidesk import PkiDesk
from aether.substrate.policydesk import PolicyDesk, documents_of, state_of, taken_up
from aether.substrate.reading import Reading
from aether.substrate.reconcile import Reconciler
from aether.substrate.repeats import Keyed, Repeats
from aether.substrate.replay import Replayer
from aether.substrate.service import Parts, Service
from aether.substrate.submission import Submitter
from aether.substrate.talking import Talking
from aether.substrate.ticketdesk import TicketDesk
from aether.substrate.ticketkeys import TicketKeys
from aether.substrate.watching import Watching
from aether.substrate.workers import Workers
from aether.telemetry.metrics import Metrics

KEYED: Final = Keyed(
    frozenset(operation.name for operation in OPERATIONS if operation.keyed),
    frozenset(operation.name for operation in OPERATIONS if operation.idempotent),
    frozenset(operation.name for operation in OPERATIONS if operation.tells_secret),
)
RESTART_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Authority:
    """A composed authority, before it listens."""

    service: Service
    parts: Parts
    identity: Identity


def compose(
    layout: Layout, operators: frozenset[int], log: Any, restart: Callable[[], None] = lambda: None
) -> Authority:
    """Opens keys and log, folds it, and builds the service; raises AetherError when the state is unusable. `restart` is
    to end this process in good order, so that the next one signs the log with another key."""
    node_file = open_node(layout.keys / "node.json")
    node = Node(node_file.node_id, process.package_version())
    audit, signer = open_log(layout, node_file, log)
    book = Book(audit, Accounts(), layout.keys / "ledger.snapshot", time.time_ns)
    log.info("audit log open", records=audit.size, replayed=book.load())
    policy, taken = taken_up(book, layout.policy.read_text() if layout.policy.exists() else None)
    keys = _keys(layout, book)
    identity = identities.compose(layout, node, book, keys.implicit)
    minting, revoked = _minting(node, book), book.ledger.tickets.revoked
    access = Access.create(keys, policy, operators, minting, revoked, identity.proofs)
    for document in documents_of(policy):
        audit.store_document(document)
    record_node(node, book, "node.started", None)
    record_node(node, book, "policy.loaded", state_of(policy)[0], taken)
    identities.read_issuers(identity, book.now_ns(), log)
    receipts, rotating = Receipts(audit, signer), rotation(layout, node_file, restart)
    return _assemble(layout, node, book, access, identity, receipts, rotating, operators)


def _keys(layout: Layout, book: Book) -> Keys:
    """The keys of tickets as the log asks for them."""
    tickets = book.ledger.tickets
    return settle_keys(layout.keys / "tickets.key", tickets.epoch, tickets.kids())


def _assemble(
    layout: Layout,
    node: Node,
    book: Book,
    access: Access,
    identity: Identity,
    receipts: Receipts,
    rotating: Rotation,
    operators: frozenset[int],
) -> Authority:
    gate = Gate(node, access, book)
    orchestra = Orchestra()
    cells = CellSupervisor(NativeDriver(layout.spawner_socket), node.version)
    egress = EgressDesk(node, book)
    execution = Execution(book, cells, orchestra, egress)
    reconciler = Reconciler(book, execution)
    asking = Asking(gate, book, execution, orchestra)
    house = CellHouse(gate, book, cells, egress, asking)
    reading = Reading(gate, book, orchestra, receipts, JobLogs(layout.job_logs))
    fence = Fence(book, execution, cells, house, egress, orchestra, access.links_of)
    tickets = TicketDesk(gate, book, access, house, fence)
    keys = KeyDesk(gate, book, house, tickets, identity.hashing)
    pki = PkiDesk(gate, book, house, tickets, identity.store, str(layout.tls_socket))
    meter = Meter(book, cells, fence, egress)
    book.on_record(meter.heard)
    egress.on_reached(meter.passed)
    tickets = TicketDesk(gate, book, access, house, fence)
    cells.on_end(execution.ended)
    cells.on_gone(house.gone)
    cells.on_connect(reconciler.spawner_connected)
    cells.on_connect(house.spawner_connected)
    cells.on_connect(fence.spawner_connected)
    cells.on_connect(meter.spawner_connected)
    labels = LabelDesk(orchestra)
    submitter = Submitter(gate, book, orchestra, execution, cells, house, asking, labels)
    parts = Parts(
        gate=gate,
        book=book,
        policy=PolicyDesk(gate, book, access, house, reading, operators),
        cells=cells,
        orchestra=orchestra,
        egress=egress,
        egress_reading=EgressReading(book, reading, house),
        submitter=submitter,
        replayer=Replayer(orchestra, reading, labels, submitter),
        asking=asking,
        approvals=ApprovalDesk(gate, book, orchestra, house, asking),
        execution=execution,
        reading=reading,
        reconciler=reconciler,
        workers=Workers(gate, book, execution, layout),
        house=house,
        files=CellFileDesk(house, book, cells),
        talking=Talking(gate, book, house, cells, execution, reading),
        watching=Watching(gate, book, house, cells, reading, ActivityLogs(layout.job_logs)),
        audit=AuditReading(gate, book, orchestra, reading, house),
        audit_keeping=AuditKeeping(gate, book, house, layout.witnesses, rotating),
        images=ImageDesk(gate, book, orchestra, execution, cells, house),
        tickets=tickets,
        keys=keys,
        pki=pki,
        repeats=Repeats(book, access.bearer, KEYED, ways(reading, house, tickets, keys, pki)),
        ticket_keys=TicketKeys(gate, book, access, house, functools.partial(_keys, layout, book)),
        fence=fence,
        meter=meter,
        budgets=BudgetDesk(gate, book, house),
        metrics=Metrics("aetherd"),
    )
    return Authority(Service(parts), parts, identity)


def _minting(node: Node, book: Book) -> Callable[[Minted], None]:
    def minted(ticket: Minted) -> None:
        book.write(
            lambda index, now: Record(
                type="ticket.minted",
                log_index=index,
                time=now,
                node_id=node.node_id,
                tenant_id=ticket.principal.tenant_id,
                principal=ticket.principal.name,
                ticket=ticket.ticket,
                detail=ticket.detail(),
            )
        )

    return minted


def record_node(
    node: Node, book: Book, kind: RecordType, policy: PolicyRef | None, detail: Mapping[str, str] = MappingProxyType({})
) -> Record:
    """Records something about the node itself."""
    return book.write(
        lambda index, now: Record(
            type=kind,
            log_index=index,
            time=now,
            node_id=node.node_id,
            policy=policy,
            detail={"version": node.version, **detail},
        )
    )


async def listen_for_aurorad(authority: Authority, layout: Layout, uid: int, log: Any) -> Callable[[], None]:
    """Serves the link socket to the one uid that aurorad has; returns the function that stops it."""
    orchestra = authority.parts.orchestra

    def make(side: socket.socket) -> links.UnixLink:
        holder: list[links.UnixLink] = []

        def failed(verb: str, error: BaseException) -> None:
            log.error("a call failed", verb=verb, error=f"{type(error).__name__}: {error}")

        link = links.UnixLink(
            side,
            authority.service.verbs(lambda: holder[0], lambda: log.info("aurorad connected")),
            authority.service.events(),
            on_close=orchestra.detach,
            on_error=failed,
        )
        holder.append(link)
        return link

    allowed = {uid, os.geteuid()}
    return await links.serve(layout.authority_socket, 0o660, lambda sock: links.peer_uid(sock) in allowed, make)


async def listen_for_egressd(authority: Authority, layout: Layout, uid: int, log: Any) -> Callable[[], None]:
    """Serves egressd's link socket to the one uid that it has; returns the function that stops it."""
    egress = authority.parts.egress

    def make(side: socket.socket) -> links.UnixLink:
        holder: list[links.UnixLink] = []

        def failed(verb: str, error: BaseException) -> None:
            log.error("a call failed", verb=verb, error=f"{type(error).__name__}: {error}")

        link = links.UnixLink(
            side, egress.verbs(lambda: holder[0]), egress.events(), on_close=egress.detach, on_error=failed
        )
        holder.append(link)
        return link

    allowed = {uid, os.geteuid()}
    return await links.serve(layout.egress_socket, 0o660, lambda sock: links.peer_uid(sock) in allowed, make)


def _soon(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Ends the role once the answer in hand has left."""
    loop.call_later(RESTART_S, stop.set)


async def serve(layout: Layout, log: Any, stop: asyncio.Event) -> None:
    """Runs the role until `stop`."""
    owner = layout.root.stat().st_uid
    loop = asyncio.get_running_loop()
    authority = compose(layout, frozenset({owner}), log, lambda: _soon(loop, stop))
    parts = authority.parts
    await parts.book.log.durable(parts.book.log.size - 1)
    parts.cells.start()
    who = accounts(owner, 0)
    stop_links = [
        await listen_for_aurorad(authority, layout, who.aurorad, log),
        await listen_for_egressd(authority, layout, who.egressd, log),
    ]
    app = HttpApp(authority.service.handlers, layout.spool)
    secured = SecuredSocket(app, layout, authority.identity, parts.gate, parts.book)
    parts.pki.on_created = secured.open
    try:
        await secured.open()
        await serve_http(app, layout.api_socket, stop=stop)
    finally:
        await secured.close()
        for stop_link in stop_links:
            stop_link()
        await parts.asking.drain()
        await parts.meter.drain()
        await parts.fence.drain()
        await parts.house.drain()
        await parts.execution.drain()
        await parts.cells.close()
        stopped = record_node(parts.gate.node, parts.book, "node.stopped", None)
        await parts.book.durable(stopped)
        parts.book.snapshot()
        parts.book.log.close()


def main() -> None:
    process.run("aetherd", serve)


if __name__ == "__main__":
    main()
