"""API keys and certificates of the embedded authority: which kept ticket one stands for. Pure but for the log's fold.

A record (`key.created`, `pki.issued`) binds the credential to a ticket that has no text; the ticket's link, caveats and
revocation are the credential's. Rules, in this order:

- API key: its id is known, and HMAC-SHA256 over id and secret is the one on record, compared in constant time. The key
  of the HMAC never leaves `keys/`, so that a copy of the log lets nobody test a guess. No slow hash: those make up for
  passwords that can be guessed, and 256 random bits cannot (NIST SP 800-63B, 5.1.2.2, asks for one below 112 bits).
- certificate: its fingerprint, over the whole DER form, is on record: a certificate that merely has a good signature
  and a known serial is refused. Its authority is still trusted, and it is within its time.
- neither is revoked (CREDENTIAL_REVOKED) nor expired (CREDENTIAL_EXPIRED). This is asked at every request, so that a
  connection that is kept open does not outlive its certificate.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from aether.contract import apikeys
from aether.contract.calls import PeerCertificate
from aether.contract.errors import AetherError
from aether.substrate.access.identity import Principal
from aether.substrate.access.tickets import Verified, said_by
from aether.substrate.ticketbook import Ticket, TicketBook

KEPT_KID: Final = "kept"
"""Stands for the key id of a ticket that was never written, so that no key signs it."""
_UNKNOWN_HASH: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class Shown:
    """What stands behind a call: who asks, and the ticket in force. `implicit`: the one that it has by itself."""

    principal: Principal
    verified: Verified
    implicit: bool


def hashing_key(secret: bytes) -> bytes:
    """The key of the hashes of API keys, from a secret of the instance that does not change."""
    return hashlib.sha256(b"aether api keys v1\0" + secret).digest()


def key_hash(hashing: bytes, key: apikeys.ApiKey) -> str:
    """What is kept of a key: hex."""
    return hmac.digest(hashing, key.key_id.encode() + b"\0" + key.secret, "sha256").hex()


class Credentials:
    """Finds the ticket behind a key or a certificate. `trusts` says whether an authority's certificates still hold."""

    def __init__(self, tickets: TicketBook, hashing: bytes, trusts: Callable[[str], bool]) -> None:
        self._tickets = tickets
        self.hashing = hashing
        self._trusts = trusts

    def of_key(self, text: str, now_ms: int) -> Shown:
        """Whom an API key stands for; raises BAD_CREDENTIAL, CREDENTIAL_REVOKED, CREDENTIAL_EXPIRED."""
        key = apikeys.parse(text)
        name = f"key:{key.key_id}"
        ticket = self._tickets.behind(name)
        known = ticket.minted.detail["hash"] if ticket is not None else _UNKNOWN_HASH
        matches = hmac.compare_digest(key_hash(self.hashing, key), known)
        if ticket is None or not matches:
            raise AetherError("BAD_CREDENTIAL", "cannot use the API key: it is not known here")
        return self._held(ticket, name, "key", now_ms)

    def knows(self, certificate: PeerCertificate) -> bool:
        """Whether the certificate is on record."""
        return self._tickets.behind(f"certificate:{certificate.fingerprint}") is not None

    def of_certificate(self, certificate: PeerCertificate, now_ms: int) -> Shown:
        """Whom a certificate stands for; raises BAD_CREDENTIAL, CREDENTIAL_REVOKED, CREDENTIAL_EXPIRED."""
        check_time(certificate, now_ms)
        ticket = self._tickets.behind(f"certificate:{certificate.fingerprint}")
        if ticket is None:
            raise AetherError("BAD_CREDENTIAL", "cannot use the certificate: it is not on record here")
        if not self._trusts(ticket.minted.detail["authority"]):
            raise AetherError("BAD_CREDENTIAL", "cannot use the certificate: its authority was replaced")
        return self._held(ticket, ticket.minted.detail["holder"], "workload", now_ms)

    def links(self, credential: str) -> tuple[str, ...]:
        """The link behind a credential (`Ticket.credential`), also of one that does not hold any more."""
        ticket = self._tickets.behind(credential)
        return (ticket.link_id,) if ticket is not None else ()

    def _held(self, ticket: Ticket, name: str, kind: Literal["workload", "key"], now_ms: int) -> Shown:
        revocation, details = ticket.revoked.get(ticket.link_id), {"credential": name}
        if revocation is not None:
            why = f"cannot use the {_WORDS[kind]}: it was revoked"
            raise AetherError("CREDENTIAL_REVOKED", why, details=details)
        if ticket.expires_at_ms <= now_ms:
            raise AetherError("CREDENTIAL_EXPIRED", f"cannot use the {_WORDS[kind]}: it expired", details=details)
        verified = self._verified(ticket)
        return Shown(Principal(name, verified.tenant, kind, None, verified.roles), verified, False)

    def _verified(self, ticket: Ticket) -> Verified:
        return said_by(KEPT_KID, ticket.minted.tenant_id or "", (ticket.link_id,), (ticket.said,))


_WORDS: Final = {"key": "API key", "workload": "certificate"}


def check_time(certificate: PeerCertificate, now_ms: int) -> None:
    """Raises AetherError CREDENTIAL_EXPIRED, or BAD_CREDENTIAL for one that is not valid yet."""
    if now_ms < certificate.not_before_ms:
        raise AetherError("BAD_CREDENTIAL", "cannot use the certificate: it is not valid yet", "set the clocks right")
    if now_ms >= certificate.not_after_ms:
        raise AetherError("CREDENTIAL_EXPIRED", "cannot use the certificate: it expired")
