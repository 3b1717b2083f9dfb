"""How the records of tickets are built: pure functions. None holds the text or a tag of a ticket."""

from __future__ import annotations

from aether.contract.caveats import Caveat, encode
from aether.contract.records import Record
from aether.substrate.access.access import Minted
from aether.substrate.access.keyfile import epoch_name
from aether.substrate.audit.redact import redact
from aether.substrate.cellentries import Order, ordered
from aether.substrate.entries import Node
from aether.substrate.ticketbook import Ticket, packed


def minted(node: Node, order: Order, ticket: Minted, said: tuple[Caveat, ...], index: int, time: str) -> Record:
    """`ticket.minted` on request: `ticket` is the new one, `detail.by` the link of who asked."""
    detail = {
        "block": packed(encode(said)),
        "by": order.admission.ticket.link_ids[-1],
        "caveats": redact("; ".join(ticket.caveats)),
    }
    return ordered("ticket.minted", node, order, index, time, ticket=ticket.ticket, detail=detail)


def revoked(ticket: Ticket, link_id: str, order: Order, index: int, time: str) -> Record:
    """`ticket.revoked`: `ticket` is that of who asked; the link and the first link of its ticket are in `detail`."""
    return Record(
        type="ticket.revoked",
        log_index=index,
        time=time,
        node_id=ticket.minted.node_id,
        tenant_id=ticket.minted.tenant_id,
        principal=order.admission.principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        effect="control",
        ticket=order.admission.ticket,
        policy=order.admission.policy,
        detail={"link_id": link_id, "root_id": ticket.link_id},
    )


def key_rotated(node: Node, order: Order, epoch: int, index: int, time: str) -> Record:
    """`ticket.key-rotated`: tickets are minted with the key of this epoch from here on. Nothing of the key is told."""
    detail = {"epoch": str(epoch), "kid": epoch_name(epoch)}
    return ordered("ticket.key-rotated", node, order, index, time, detail=detail)
