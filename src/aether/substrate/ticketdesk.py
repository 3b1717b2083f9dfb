"""Operations on tickets: `ticket.mint`, `ticket.list`, `ticket.show`, `ticket.verify`, `ticket.revoke`.

Who may
- mint: whom the policy permits `ticket.mint`, in the tenant and with the role of the ticket that its uid has by
  itself; another role only with `ticket.grant` (context.id is the role). Whoever shows a ticket, a key, a certificate
  or a token cannot mint: that would shed what narrows it, or outlive it. Narrowing a ticket needs no authority. API
  keys (`keydesk`) and certificates (`pkidesk`) are made by the same rules.
- list and show: the tenant's; whoever shows a ticket sees that one alone.
- revoke: a link of a ticket of the tenant that was minted, or that an open job or a cell was admitted with; whoever
  shows a ticket only its own last link and what was derived from that. And whoever has a ticket's text, its last link.

A minted ticket expires; until it is forgotten (TicketBook) it counts among TICKETS_MAX.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final

import msgspec

from aether.contract import limits
from aether.contract import ticketcalls as wire
from aether.contract.calls import Caller, Nothing
from aether.contract.caveats import Caveat
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.substrate import ticketentries as entries
from aether.substrate.access.access import Access, Admission, Resource
from aether.substrate.access.tickets import Verified, check_expiry
from aether.substrate.book import Book
from aether.substrate.budgetviews import budgets_of
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.fence import Fence
from aether.substrate.gate import Gate
from aether.substrate.keymark import MARK
from aether.substrate.ledger import KeyEntry
from aether.substrate.ticketbook import Ticket

EXPIRES_MS_MIN: Final = 1_000
_NONCE_BYTES: Final = 16


class TicketDesk:
    """The handlers."""

    def __init__(self, gate: Gate, book: Book, access: Access, house: CellHouse, fence: Fence) -> None:
        self._gate = gate
        self._book = book
        self._access = access
        self._house = house
        self._fence = fence

    async def mint(self, caller: Caller, call: wire.MintCall) -> wire.MintedTicket:
        """`ticket.mint`: answers when the record is durable; repeated under its Idempotency-Key with the same text."""
        request = call.request
        admission, role = self.asked(caller, "ticket.mint", request)
        said = self.said(admission, request, role, limits.TICKET_MS_MAX)
        mark = MARK.get()
        nonce = _nonce(mark.key_hash) if mark is not None else os.urandom(_NONCE_BYTES)
        _, minted = self._access.mint(admission.principal.tenant_id, nonce, said, admission.principal)
        order = self._house.order(caller, admission, "ticket.mint")
        node = self._gate.node
        record = self._house.write(order, lambda index, now: entries.minted(node, order, minted, said, index, now))
        await self._book.durable(record)
        ticket = self._book.ledger.tickets.find(minted.ticket.link_ids[0])
        assert ticket is not None
        return self._told(ticket, nonce)

    async def again(self, caller: Caller, call: wire.MintCall, known: KeyEntry, key_hash: str) -> wire.MintedTicket:
        """The answer to a repeated `ticket.mint`: its text is made anew, since it is kept nowhere."""
        self._gate.admit(caller, "ticket.mint", Resource(kind="ticket"))
        ticket = self._book.ledger.tickets.find(known.job_id)
        if ticket is None:
            raise AetherError("GONE", "cannot tell the ticket again: it expired", "mint another one")
        return self._told(ticket, _nonce(key_hash))

    async def listing(self, caller: Caller, call: Nothing) -> wire.TicketList:
        admission = self._gate.admit(caller, "ticket.list", Resource(kind="ticket"))
        tickets = self._book.ledger.tickets.of_tenant(admission.principal.tenant_id, self._now_ms())
        return wire.TicketList(tickets=tuple(self.view(each) for each in tickets if _sees(admission, each)))

    async def show(self, caller: Caller, call: wire.LinkCall) -> wire.TicketView:
        admission = self._gate.admit(caller, "ticket.show", Resource(kind="ticket", id=call.link_id))
        ticket = self._book.ledger.tickets.find(call.link_id)
        if ticket is None or ticket.minted.tenant_id != admission.principal.tenant_id or not _sees(admission, ticket):
            raise _unknown(call.link_id)
        return self.view(ticket)

    async def verify(self, caller: Caller, call: wire.VerifyCall) -> wire.VerifiedTicket:
        """`ticket.verify`: raises BAD_TICKET, TICKET_REVOKED, TICKET_EXPIRED."""
        self._gate.admit(caller, "ticket.verify", Resource(kind="ticket"))
        verified = self._access.verify(call.ticket)
        check_expiry(verified, self._now_ms())
        return wire.VerifiedTicket(
            kid=verified.kid,
            tenant_id=verified.tenant,
            roles=verified.roles,
            links=tuple(
                wire.LinkView(link_id=link, caveats=tuple(map(str, said)), budget=self._budget(link, said))
                for link, said in zip(verified.link_ids, verified.links, strict=True)
            ),
        )

    async def revoke(self, caller: Caller, call: wire.RevokeCall) -> wire.Revoked:
        """`ticket.revoke`: recorded durably, then done; answers when what it ends has ended. Repeating it does what
        is left to do. It costs nothing, so that an exhausted ticket can be revoked by itself."""
        if (call.ticket is None) == (call.link_id is None):
            raise AetherError("BAD_FIELD", "cannot revoke: name either a ticket or the id of a link")
        admission = self._gate.admit(caller, "ticket.revoke", Resource(kind="ticket", id=call.link_id))
        ticket, link = self._by_text(call.ticket) if call.ticket is not None else self._by_link(admission, call)
        return await self.end(Order(caller, admission, "ticket.revoke"), ticket, link)

    async def end(self, order: Order, ticket: Ticket, link: str) -> wire.Revoked:
        """Revokes a link of a ticket, on leave that was given; raises TICKET_LIMIT."""
        record = ticket.revoked.get(link)
        if record is None:
            if link != ticket.link_id and len(ticket.revoked) >= limits.TICKET_LINKS_REVOKED_MAX:
                why = f"{limits.TICKET_LINKS_REVOKED_MAX} links of its ticket are already"
                raise AetherError("TICKET_LIMIT", f"cannot revoke the link: {why}", "revoke the ticket itself")
            record = self._book.write(lambda index, now: entries.revoked(ticket, link, order, index, now))
        await self._book.durable(record)
        fenced = await self._fence.apply((link,))
        return wire.Revoked(
            link_id=link,
            revoked_at=record.time,
            log_index=record.log_index,
            jobs=fenced.jobs,
            cells=fenced.cells,
        )

    # ---- making a ticket, also for a key or a certificate

    def asked(self, caller: Caller, operation: str, request: wire.MintRequest) -> tuple[Admission, str]:
        """Leave to make a ticket, or what stands for one, and its role; raises AetherError."""
        admission = self._gate.admit(caller, operation, Resource(kind="ticket"))
        if not admission.ticket.implicit or admission.principal.kind != "user":
            raise AetherError(
                "TICKET_DENIED",
                f"cannot {operation} by a ticket, key, certificate or token: what narrows it would be shed",
                "narrow a ticket with `aether ticket attenuate`, which needs no authority",
            )
        role = request.role or admission.ticket.role
        if role != admission.ticket.role:
            self._gate.admit(caller, "ticket.grant", Resource(kind="ticket", id=role))
        return admission, role

    def said(
        self, admission: Admission, request: wire.MintRequest, role: str, expires_ms_max: int
    ) -> tuple[Caveat, ...]:
        """The caveats that were asked for; raises AetherError BAD_FIELD, TICKET_LIMIT."""
        if not EXPIRES_MS_MIN <= request.expires_ms <= expires_ms_max:
            bounds = f"{EXPIRES_MS_MIN}..{expires_ms_max}"
            raise AetherError("BAD_FIELD", f"cannot mint a ticket: expires_ms must be within {bounds}")
        now_ms = self._now_ms()
        said = wire.caveats_of(msgspec.structs.replace(request, role=role), now_ms + request.expires_ms)
        if len(self._book.ledger.tickets.of_tenant(admission.principal.tenant_id, now_ms)) >= limits.TICKETS_MAX:
            raise AetherError("TICKET_LIMIT", f"cannot mint a ticket: {limits.TICKETS_MAX} are not expired")
        return said

    # ---- inside

    def _now_ms(self) -> int:
        return self._book.now_ns() // 1_000_000

    def _told(self, ticket: Ticket, nonce: bytes) -> wire.MintedTicket:
        minted = ticket.minted
        assert minted.ticket is not None
        text = self._access.text(minted.ticket.kid, minted.tenant_id or "", nonce, ticket.said)
        return wire.MintedTicket(**msgspec.structs.asdict(self.view(ticket)), ticket=text)

    def _by_text(self, text: str | None) -> tuple[Ticket, str]:
        verified: Verified = self._access.read(text or "")
        ticket = self._book.ledger.tickets.find(verified.link_ids[0])
        if ticket is None:
            raise AetherError("NOT_FOUND", "cannot revoke the ticket: it expired, or was not minted on request")
        return ticket, verified.link_ids[-1]

    def _by_link(self, admission: Admission, call: wire.RevokeCall) -> tuple[Ticket, str]:
        link = wire.link(call.link_id or "")
        path = self._path_to(link, admission.principal.tenant_id)
        ticket = self._book.ledger.tickets.find(path[0]) if path else None
        own = () if admission.ticket.implicit else admission.ticket.link_ids
        if ticket is None or ticket.minted.tenant_id != admission.principal.tenant_id or path[: len(own)] != own:
            raise _unknown(link)
        return ticket, link

    def _path_to(self, link: str, tenant_id: str) -> tuple[str, ...]:
        """The links from a ticket's first to `link`: a ticket that was minted, or one that an open job or a cell of
        the tenant was admitted with; empty when it is neither."""
        ledger = self._book.ledger
        if ledger.tickets.find(link) is not None:
            return (link,)
        records = [*(job.intent for job in ledger.open.values()), *(c.allocated for c in ledger.cells.live.values())]
        for record in records:
            if record.tenant_id == tenant_id and record.ticket is not None and link in record.ticket.link_ids:
                return record.ticket.link_ids[: record.ticket.link_ids.index(link) + 1]
        return ()

    def view(self, ticket: Ticket) -> wire.TicketView:
        """What is told of a ticket."""
        minted, link = ticket.minted, ticket.link_id
        assert minted.ticket is not None
        own = ticket.revoked.get(link)
        return wire.TicketView(
            link_id=link,
            role=minted.ticket.role,
            tenant_id=minted.tenant_id or "",
            principal=minted.principal or "",
            kid=minted.ticket.kid,
            minted_at=minted.time,
            expires_at=rfc3339(ticket.expires_at_ms * 1_000_000),
            caveats=tuple(map(str, ticket.said)),
            budget=self._budget(link, ticket.said),
            revoked_at=own.time if own is not None else None,
            revoked_links=tuple(each for each in ticket.revoked if each != link),
            credential=ticket.credential,
        )

    def _budget(self, link: str, said: tuple[Caveat, ...]) -> tuple[wire.Budget, ...]:
        limits: dict[str, int] = {}
        for caveat in said:
            if caveat.type == "budget":
                limits[caveat.items[0]] = min(caveat.number, limits.get(caveat.items[0], caveat.number))
        return budgets_of(self._book.accounts, link, limits)


def _sees(admission: Admission, ticket: Ticket) -> bool:
    return admission.ticket.implicit or admission.ticket.link_ids[0] == ticket.link_id


def _unknown(link: str) -> AetherError:
    return AetherError("NOT_FOUND", f"cannot find the ticket {link[:40]}", "list the tickets with `aether ticket list`")


def _nonce(key_hash: str) -> bytes:
    """The nonce of a ticket that a keyed call minted: the same when it is repeated. A nonce is no secret."""
    return hashlib.sha256(f"aether mint v1\0{key_hash}".encode()).digest()[:_NONCE_BYTES]
