"""Operations on API keys: `key.create`, `key.list`, `key.revoke`.

Who may is as for tickets (`ticketdesk`): a key is made by a uid on the Unix socket, for its own tenant, and another
role needs `ticket.grant`. Whoever shows a key sees that key alone, and may revoke it. A key always expires. Its secret
is random, is told once and is kept as a keyed hash (`access.credentials`).
"""

from __future__ import annotations

import os
import re
from typing import Final

import msgspec

from aether.contract import apikeys, limits
from aether.contract import identitycalls as wire
from aether.contract.calls import Caller, Nothing
from aether.contract.errors import AetherError
from aether.contract.ticketcalls import Revoked
from aether.substrate import credentialentries as entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.access.credentials import key_hash
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.credentialentries import Kept
from aether.substrate.gate import Gate
from aether.substrate.ledger import KeyEntry
from aether.substrate.repeats import Handler
from aether.substrate.ticketbook import Ticket
from aether.substrate.ticketdesk import TicketDesk

LINK_BYTES: Final = 16


class KeyDesk:
    """The handlers. `hashing` is the key of the hashes."""

    def __init__(self, gate: Gate, book: Book, house: CellHouse, tickets: TicketDesk, hashing: bytes) -> None:
        self._gate = gate
        self._book = book
        self._house = house
        self._tickets = tickets
        self._hashing = hashing
        self.handlers: dict[str, Handler] = {
            "key.create": self.create,
            "key.list": self.listing,
            "key.revoke": self.revoke,
        }

    async def create(self, caller: Caller, call: wire.KeyCall) -> wire.CreatedKey:
        """`key.create`: answers when the record is durable."""
        request = call.request
        admission, role = self._tickets.asked(caller, "key.create", request)
        if request.name and re.fullmatch(wire.LABEL_PATTERN, request.name) is None:
            raise AetherError("BAD_FIELD", f"cannot name the key {request.name[:80]!r}", "write it like build server")
        said = self._tickets.said(admission, request, role, limits.TICKET_MS_MAX)
        fresh = apikeys.ApiKey(os.urandom(apikeys.ID_BYTES).hex(), os.urandom(apikeys.SECRET_BYTES))
        name = f"key:{fresh.key_id}"
        facts = {"hash": key_hash(self._hashing, fresh), "name": request.name}
        kept = Kept(os.urandom(LINK_BYTES).hex(), role, said, name, name, facts)
        order, node = self._house.order(caller, admission, "key.create"), self._gate.node
        record = self._house.write(order, lambda i, now: entries.made("key.created", node, order, kept, i, now))
        await self._book.durable(record)
        ticket = self._book.ledger.tickets.find(kept.link_id)
        assert ticket is not None
        text = apikeys.write(fresh.key_id, fresh.secret)
        return wire.CreatedKey(**msgspec.structs.asdict(self._view(ticket)), key=text)

    async def again(self, caller: Caller, call: wire.KeyCall, known: KeyEntry, key_hash: str) -> wire.CreatedKey:
        """The answer to a repeated `key.create`: the same key, without its text, which is kept nowhere."""
        self._gate.admit(caller, "key.create", Resource(kind="ticket"))
        ticket = self._book.ledger.tickets.find(known.job_id)
        if ticket is None:
            raise AetherError("GONE", "cannot tell of the API key again: it expired", "create another one")
        return wire.CreatedKey(**msgspec.structs.asdict(self._view(ticket)), key=None)

    async def listing(self, caller: Caller, call: Nothing) -> wire.KeyList:
        """`key.list`."""
        admission = self._gate.admit(caller, "key.list", Resource(kind="ticket"))
        now_ms = self._book.now_ns() // 1_000_000
        tickets = self._book.ledger.tickets.of_tenant(admission.principal.tenant_id, now_ms)
        return wire.KeyList(keys=tuple(self._view(t) for t in tickets if _is_key(t) and sees(admission, t)))

    async def revoke(self, caller: Caller, call: wire.RevokeKeyCall) -> Revoked:
        """`key.revoke`: as `ticket.revoke` of the key's link."""
        key_id = apikeys.check_id(call.key_id)
        admission = self._gate.admit(caller, "key.revoke", Resource(kind="ticket", id=f"key:{key_id}"))
        ticket = self._book.ledger.tickets.behind(f"key:{key_id}")
        if ticket is None or ticket.minted.tenant_id != admission.principal.tenant_id or not sees(admission, ticket):
            raise AetherError("NOT_FOUND", f"cannot find the API key {key_id}", "list the keys with `aether key list`")
        return await self._tickets.end(Order(caller, admission, "key.revoke"), ticket, ticket.link_id)

    def _view(self, ticket: Ticket) -> wire.KeyView:
        detail = ticket.minted.detail
        key_id = detail["credential"].removeprefix("key:")
        return wire.KeyView(**msgspec.structs.asdict(self._tickets.view(ticket)), key_id=key_id, name=detail["name"])


def _is_key(ticket: Ticket) -> bool:
    return (ticket.credential or "").startswith("key:")


def sees(admission: Admission, ticket: Ticket) -> bool:
    """Whether who asks may know of the ticket: the tenant's, but only its own to whoever shows one."""
    return admission.ticket.implicit or admission.ticket.link_ids[0] == ticket.link_id
