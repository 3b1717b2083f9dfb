"""The authority's memory of minted tickets and revoked links: a fold of the audit log, like the ledger it is part of.

`apply` is fed every record exactly once, in log order, live and at start. Held: each ticket that was minted on
request, with the revocations of its links, until PRUNED_MS after it expired (then no job that it admitted can run any
more). Tickets that uids get by themselves are not held: they cannot be revoked, the policy governs them.

`revoked` is the set that verification asks. A link that left it is one of a ticket that expired. `epoch` is the number
of the newest key.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from aether.contract import caveats
from aether.contract.caveats import Caveat
from aether.contract.clock import epoch_ns
from aether.contract.errors import AetherError
from aether.contract.limits import STOP_GRACE_MS_MAX, TIMEOUT_MS_MAX
from aether.contract.records import Record, TicketRef
from aether.substrate.access.tickets import Limit

PRUNED_MS: Final = TIMEOUT_MS_MAX + STOP_GRACE_MS_MAX
MINTING: Final = frozenset({"ticket.minted", "key.created", "pki.issued"})
"""Records after which there is one more ticket."""
_UNCHECKED: Final = MINTING | {"access.denied"}


@dataclass(slots=True)
class Ticket:
    """A minted ticket. `revoked` has the records by link: its own first, if that was, or links derived from it."""

    minted: Record
    said: tuple[Caveat, ...]
    revoked: dict[str, Record] = field(default_factory=dict)

    @property
    def link_id(self) -> str:
        assert self.minted.ticket is not None
        return self.minted.ticket.link_ids[0]

    def limits(self) -> Iterator[Limit]:
        """What its first link may spend."""
        return (Limit(self.link_id, each.items[0], each.number) for each in self.said if each.type == "budget")

    @property
    def expires_at_ms(self) -> int:
        return min(caveat.number for caveat in self.said if caveat.type == "expires")

    @property
    def credential(self) -> str | None:
        """What stands for it, where nobody has its text: `key:<id>` or `certificate:<fingerprint>`."""
        return self.minted.detail.get("credential")


class TicketBook:
    """See the module head."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.epoch = 1
        self._live: dict[str, Ticket] = {}
        self._credentials: dict[str, Ticket] = {}
        self._expiring: list[tuple[int, str]] = []
        self._forgotten: list[str] = []

    def __repr__(self) -> str:
        return f"<TicketBook live={len(self._live)} revoked={len(self.revoked)}>"

    # ---- folding

    def apply(self, record: Record) -> None:
        """Folds one record; those of other types change nothing."""
        if record.type in MINTING and record.ticket is not None and not record.ticket.implicit:
            self._prune(epoch_ns(record.time) // 1_000_000)
            self._add(record)
        elif record.type == "ticket.revoked":
            self._revoke(record)
        elif record.type == "ticket.key-rotated":
            self.epoch = int(record.detail["epoch"])

    def _add(self, minted: Record) -> Ticket | None:
        if "block" not in minted.detail:
            return None
        ticket = Ticket(minted, caveats.decode(unpacked(minted.detail["block"])))
        self._live[ticket.link_id] = ticket
        if ticket.credential is not None:
            self._credentials[ticket.credential] = ticket
        heapq.heappush(self._expiring, (ticket.expires_at_ms, ticket.link_id))
        return ticket

    def _revoke(self, record: Record) -> None:
        ticket = self._live.get(record.detail["root_id"])
        if ticket is not None:
            ticket.revoked[record.detail["link_id"]] = record
            self.revoked.add(record.detail["link_id"])

    def _prune(self, now_ms: int) -> None:
        while self._expiring and self._expiring[0][0] + PRUNED_MS < now_ms:
            ticket = self._live.pop(heapq.heappop(self._expiring)[1])
            self.revoked.difference_update(ticket.revoked)
            self._forgotten.append(ticket.link_id)
            if ticket.credential is not None:
                del self._credentials[ticket.credential]

    def forgotten(self) -> list[str]:
        """The first links of tickets that were forgotten since it was last asked."""
        told, self._forgotten = self._forgotten, []
        return told

    # ---- asking

    def kids(self) -> set[str]:
        """The keys of the tickets that are held."""
        written = (ticket.minted.ticket for ticket in self._live.values() if ticket.credential is None)
        return {reference.kid for reference in written if reference is not None}

    def find(self, link_id: str) -> Ticket | None:
        """The ticket whose first link it is."""
        return self._live.get(link_id)

    def behind(self, credential: str) -> Ticket | None:
        """The ticket that an API key or a certificate stands for (`Ticket.credential`)."""
        return self._credentials.get(credential)

    def of_tenant(self, tenant_id: str, now_ms: int) -> list[Ticket]:
        """The tenant's tickets that are not expired, newest first."""
        tickets = (t for t in self._live.values() if t.minted.tenant_id == tenant_id and t.expires_at_ms > now_ms)
        return list(tickets)[::-1]

    def revocation(self, ticket: TicketRef | None) -> Record | None:
        """The record that revoked a link of the ticket, if one was."""
        if not self.revoked or ticket is None or self.revoked.isdisjoint(ticket.link_ids):
            return None
        revoked = self._live[ticket.link_ids[0]].revoked
        return next(revoked[link] for link in ticket.link_ids if link in revoked)

    def check(self, record: Record) -> None:
        """Raises AetherError TICKET_REVOKED for a record of something done by a ticket that is revoked: between a
        request's admission and its record, its ticket may have been."""
        if record.type not in _UNCHECKED and self.revocation(record.ticket) is not None:
            raise AetherError("TICKET_REVOKED", f"cannot {record.operation or record.type}: the ticket was revoked")

    # ---- snapshots

    def snapshot(self) -> list[tuple[Record, list[Record]]]:
        """The tickets with their revocations; `restore` takes them."""
        return [(ticket.minted, list(ticket.revoked.values())) for ticket in self._live.values()]

    def restore(self, tickets: Iterable[tuple[Record, list[Record]]]) -> None:
        """Takes over a snapshot; only when fresh."""
        for minted, revocations in tickets:
            self._add(minted)
            for record in revocations:
                self._revoke(record)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._live.values())


def packed(block: bytes) -> str:
    """Bytes of a link as a record holds them: base64url without padding."""
    return base64.urlsafe_b64encode(block).rstrip(b"=").decode()


def unpacked(text: str) -> bytes:
    """The way back."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
