"""Operations on certificates: `pki.init`, `pki.issue`, `pki.rotate`, `pki.revoke`, `pki.show`.

- `pki.init` makes the authority, `pki.rotate` replaces it; both are the operator's by default (action group `admin`).
  The authority that was replaced is trusted until the last certificate that it issued has ended; with `at_once` none
  but the new one is trusted from now on, and what the others issued is revoked.
- `pki.issue` is as making a ticket (`ticketdesk`), for a key that whoever asks keeps to itself. The SPIFFE ID is
  `spiffe://<trust domain>/<tenant>/<name>`, so that no tenant can take another's names.
- `pki.revoke` ends a certificate and what it admitted, as `ticket.revoke` does with a ticket.
The second socket listens from the moment there is an authority: `on_created`.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import os
import re
from collections.abc import Awaitable, Callable

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from aether.contract import identitycalls as wire
from aether.contract import limits, spiffe
from aether.contract.calls import Caller, Nothing
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.records import RecordType
from aether.contract.ticketcalls import Revoked
from aether.substrate import credentialentries as entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.credentialentries import Kept
from aether.substrate.gate import Gate
from aether.substrate.keydesk import LINK_BYTES, sees
from aether.substrate.ledger import KeyEntry
from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Leaf
from aether.substrate.pki.store import AuthorityStore, serial, utc
from aether.substrate.repeats import Handler
from aether.substrate.ticketbook import Ticket
from aether.substrate.ticketdesk import TicketDesk


class PkiDesk:
    """The handlers. `socket` is the path of the second socket, to be told."""

    def __init__(
        self, gate: Gate, book: Book, house: CellHouse, tickets: TicketDesk, store: AuthorityStore, socket: str
    ) -> None:
        self._gate = gate
        self._book = book
        self._house = house
        self._tickets = tickets
        self._store = store
        self._socket = socket
        self._changing = asyncio.Lock()
        self.handlers: dict[str, Handler] = {
            "pki.init": self.init,
            "pki.issue": self.issue,
            "pki.rotate": self.rotate,
            "pki.revoke": self.revoke,
            "pki.show": self.show,
        }
        self.on_created: Callable[[], Awaitable[None]] | None = None

    async def init(self, caller: Caller, call: wire.InitCall) -> wire.PkiView:
        """`pki.init`: makes the authority; the same again changes nothing. Raises NAME_TAKEN for another domain."""
        admission = self._gate.admit(caller, "pki.init", Resource(kind="node"))
        domain = spiffe.check_trust_domain(call.request.trust_domain)
        async with self._changing:
            if not self._store.known:
                await self._replace(caller, admission, "pki.init", domain, None)
        if self._store.trust_domain != domain:
            why = f"it has the trust domain {self._store.trust_domain}"
            raise AetherError("NAME_TAKEN", f"cannot make another certificate authority: {why}", "rotate it instead")
        if self.on_created is not None:
            await self.on_created()
        return self._show(admission)

    async def rotate(self, caller: Caller, call: wire.RotateCall) -> wire.PkiView:
        """`pki.rotate`: a new authority issues from now on."""
        admission = self._gate.admit(caller, "pki.rotate", Resource(kind="node"))
        async with self._changing:
            name, now_ms = self._store.issuing.name, self._now_ms()
            ends = [t.expires_at_ms for t in self._book.ledger.tickets if t.minted.detail.get("authority") == name]
            retires_at = None if call.at_once else rfc3339(max([now_ms, *ends]) * 1_000_000)
            await self._replace(caller, admission, "pki.rotate", self._store.trust_domain, retires_at)
        if call.at_once:
            await self._end_untrusted(caller, admission)
        return self._show(admission)

    async def issue(self, caller: Caller, call: wire.IssueCall) -> wire.IssuedCertificate:
        """`pki.issue`: answers when the record is durable."""
        request = call.request
        admission, role = self._tickets.asked(caller, "pki.issue", request)
        authority, tenant = self._store.issuing, admission.principal.tenant_id
        holder = str(spiffe.parse(f"spiffe://{self._store.trust_domain}/{tenant}/{spiffe.check_name(request.name)}"))
        public = certificates.requested_key(request.csr)
        said = self._tickets.said(admission, request, role, limits.CERTIFICATE_MS_MAX)
        now = utc(self._book.now_ns())
        # X.509 counts whole seconds: the certificate ends with the second in which its ticket does
        until = now + dt.timedelta(seconds=request.expires_ms // 1000 + 1)
        certificate = certificates.issue(authority, public, Leaf(holder, "client", serial(), now, until))
        fingerprint = certificates.fingerprint(certificate)
        facts = {
            "authority": authority.name,
            "certificate": base64.b64encode(certificate.public_bytes(Encoding.DER)).decode(),
            "serial": f"{certificate.serial_number:032x}",
        }
        kept = Kept(os.urandom(LINK_BYTES).hex(), role, said, f"certificate:{fingerprint}", holder, facts)
        order, node = self._house.order(caller, admission, "pki.issue"), self._gate.node
        record = self._house.write(order, lambda i, t: entries.made("pki.issued", node, order, kept, i, t))
        await self._book.durable(record)
        ticket = self._book.ledger.tickets.find(kept.link_id)
        assert ticket is not None
        return self._told(ticket)

    async def again(
        self, caller: Caller, call: wire.IssueCall, known: KeyEntry, key_hash: str
    ) -> wire.IssuedCertificate:
        """The answer to a repeated `pki.issue`: the same certificate."""
        self._gate.admit(caller, "pki.issue", Resource(kind="ticket"))
        ticket = self._book.ledger.tickets.find(known.job_id)
        if ticket is None:
            raise AetherError("GONE", "cannot tell of the certificate again: it expired", "issue another one")
        return self._told(ticket)

    async def revoke(self, caller: Caller, call: wire.RevokeCertificateCall) -> Revoked:
        """`pki.revoke`: as `ticket.revoke` of the certificate's link."""
        if re.fullmatch(wire.FINGERPRINT_PATTERN, call.fingerprint) is None:
            raise AetherError("BAD_ID", f"cannot read {call.fingerprint[:80]!r}: a fingerprint is 64 hex digits")
        name = f"certificate:{call.fingerprint}"
        admission = self._gate.admit(caller, "pki.revoke", Resource(kind="ticket", id=name))
        ticket = self._book.ledger.tickets.behind(name)
        if ticket is None or ticket.minted.tenant_id != admission.principal.tenant_id or not sees(admission, ticket):
            why = f"cannot find the certificate {call.fingerprint[:16]}"
            raise AetherError("NOT_FOUND", why, "list the certificates with `aether pki show`")
        return await self._tickets.end(Order(caller, admission, "pki.revoke"), ticket, ticket.link_id)

    async def show(self, caller: Caller, call: Nothing) -> wire.PkiView:
        """`pki.show`; raises NO_PKI."""
        admission = self._gate.admit(caller, "pki.show", Resource(kind="node"))
        _ = self._store.issuing
        return self._show(admission)

    # ---- inside

    def _now_ms(self) -> int:
        return self._book.now_ns() // 1_000_000

    async def _replace(
        self, caller: Caller, admission: Admission, operation: str, domain: str, retires_at: str | None
    ) -> None:
        fresh = certificates.new_authority(domain, serial(), utc(self._book.now_ns()))
        detail = {"authority": fresh.name, "trust_domain": domain, "certificate": fresh.pem}
        if self._store.known:
            replaced = retires_at or rfc3339(self._book.now_ns())
            detail |= {"replaces": self._store.issuing.name, "retires_at": replaced}
        order, node = self._house.order(caller, admission, operation), self._gate.node
        kind: RecordType = "pki.rotated" if self._store.known else "pki.created"
        record = self._house.write(order, lambda i, now: entries.authority(kind, node, order, detail, i, now))
        await self._book.durable(record)
        self._store.replace(domain, fresh, retires_at, self._now_ms())

    async def _end_untrusted(self, caller: Caller, admission: Admission) -> None:
        """Revokes what authorities issued that are trusted no more, of every tenant."""
        now_ms = self._now_ms()
        for ticket in list(self._book.ledger.tickets):
            name = ticket.minted.detail.get("authority")
            if name is not None and ticket.expires_at_ms > now_ms and not self._store.trusts(name, now_ms):
                await self._tickets.end(Order(caller, admission, "pki.rotate"), ticket, ticket.link_id)

    def _show(self, admission: Admission) -> wire.PkiView:
        now_ms = self._now_ms()
        tickets = self._book.ledger.tickets.of_tenant(admission.principal.tenant_id, now_ms)
        return wire.PkiView(
            trust_domain=self._store.trust_domain,
            socket=self._socket,
            authorities=tuple(
                wire.AuthorityView(
                    authority=known.authority.name,
                    state="issuing" if known.retires_at is None else "trusted",
                    created_at=_told_time(known.authority.certificate.not_valid_before_utc),
                    expires_at=_told_time(known.authority.certificate.not_valid_after_utc),
                    retires_at=known.retires_at,
                )
                for known in self._store.trusted(now_ms)
            ),
            certificates=tuple(self._view(t) for t in tickets if _is_certificate(t) and sees(admission, t)),
            bundle=self._bundle(),
        )

    def _bundle(self) -> str:
        return "".join(known.authority.pem for known in self._store.trusted(self._now_ms()))

    def _view(self, ticket: Ticket) -> wire.CertificateView:
        detail = ticket.minted.detail
        return wire.CertificateView(
            **msgspec.structs.asdict(self._tickets.view(ticket)),
            fingerprint=detail["credential"].removeprefix("certificate:"),
            serial=detail["serial"],
            spiffe_id=detail["holder"],
            authority=detail["authority"],
        )

    def _told(self, ticket: Ticket) -> wire.IssuedCertificate:
        der = base64.b64decode(ticket.minted.detail["certificate"])
        return wire.IssuedCertificate(
            **msgspec.structs.asdict(self._view(ticket)),
            certificate=certificates.pem_of(x509.load_der_x509_certificate(der)),
            bundle=self._bundle(),
        )


def _is_certificate(ticket: Ticket) -> bool:
    return (ticket.credential or "").startswith("certificate:")


def _told_time(when: dt.datetime) -> str:
    return rfc3339(int(when.timestamp()) * 1_000_000_000)
