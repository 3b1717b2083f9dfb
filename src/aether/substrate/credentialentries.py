"""How the records of API keys, certificates and authorities are built: pure functions. None holds a secret."""

from __future__ import annotations

from dataclasses import dataclass

from aether.contract.caveats import Caveat, encode
from aether.contract.records import Record, RecordType, TicketRef
from aether.substrate.access.credentials import KEPT_KID
from aether.substrate.audit.redact import redact
from aether.substrate.cellentries import Order, ordered
from aether.substrate.entries import Node
from aether.substrate.ticketbook import packed


@dataclass(frozen=True, slots=True)
class Kept:
    """A ticket that aetherd keeps for a credential: its link, what it says, and how the credential is told."""

    link_id: str
    role: str
    said: tuple[Caveat, ...]
    credential: str
    holder: str
    """The name of the principal that the credential proves."""
    facts: dict[str, str]


def made(kind: RecordType, node: Node, order: Order, kept: Kept, index: int, time: str) -> Record:
    """`key.created`, `pki.issued`: `ticket` is the kept one, `detail.by` the link of who asked."""
    ticket = TicketRef(kid=KEPT_KID, role=kept.role, link_ids=(kept.link_id,), implicit=False)
    detail = {
        "block": packed(encode(kept.said)),
        "by": order.admission.ticket.link_ids[-1],
        "caveats": redact("; ".join(map(str, kept.said))),
        "credential": kept.credential,
        "holder": kept.holder,
        **kept.facts,
    }
    return ordered(kind, node, order, index, time, ticket=ticket, detail=detail)


def authority(kind: RecordType, node: Node, order: Order, detail: dict[str, str], index: int, time: str) -> Record:
    """`pki.created`, `pki.rotated`: `ticket` is that of who asked."""
    return ordered(kind, node, order, index, time, detail=detail)
