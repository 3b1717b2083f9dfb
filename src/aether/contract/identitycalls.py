"""Calls about who may call: API keys, and certificates of the embedded authority.

A key or a certificate stands for a ticket that aetherd keeps: nobody has its text, its link is in the records, and what
the ticket says (role, caveats, budget, expiry) holds for whoever shows the key or the certificate. Revoking one is
revoking its link. A key's text is in the answer to `key.create` and in what its holder sends, nowhere else; the private
key of a certificate never leaves whoever asks for it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from aether.contract import limits
from aether.contract.ticketcalls import MintRequest, TicketView

FINGERPRINT_PATTERN: Final = r"^[0-9a-f]{64}$"
LABEL_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9 ._@/-]{0,63}$"


# ---- API keys


class KeyRequest(MintRequest, frozen=True, kw_only=True):
    """The body of `key.create`: what the key allows, as of a ticket. `name` is for people."""

    name: str = ""
    expires_ms: int = limits.KEY_MS_DEFAULT


class KeyCall(msgspec.Struct, frozen=True, kw_only=True):
    """`key.create`."""

    request: KeyRequest


class RevokeKeyCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`key.revoke`."""

    key_id: str


class KeyView(TicketView, frozen=True, kw_only=True):
    """An API key: the ticket that it stands for, and its name."""

    key_id: str
    name: str


class CreatedKey(KeyView, frozen=True, kw_only=True):
    """The answer to `key.create`. `key` is told once: it is null when the call is repeated."""

    key: str | None


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """`key.list`: the tenant's keys that are not expired, newest first."""

    keys: tuple[KeyView, ...]


# ---- certificates


class InitRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `pki.init`."""

    trust_domain: str = limits.TRUST_DOMAIN_DEFAULT


class InitCall(msgspec.Struct, frozen=True, kw_only=True):
    """`pki.init`."""

    request: InitRequest


class RotateCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`pki.rotate`. `at_once`: what was issued before is refused from now on; for a key that leaked."""

    at_once: bool = False


class IssueRequest(MintRequest, frozen=True, kw_only=True):
    """The body of `pki.issue`: what the certificate's holder may do, as with tickets. `name` ends its SPIFFE ID,
    `csr` a PKCS#10 request in PEM (RFC 2986), of which the public key alone is taken."""

    name: str
    csr: str
    expires_ms: int = limits.CERTIFICATE_MS_DEFAULT


class IssueCall(msgspec.Struct, frozen=True, kw_only=True):
    """`pki.issue`."""

    request: IssueRequest


class RevokeCertificateCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`pki.revoke`: a certificate by its fingerprint, SHA-256 over its DER form in hex."""

    fingerprint: str


class CertificateView(TicketView, frozen=True, kw_only=True):
    """A certificate: the ticket that it stands for, and its names. `serial` is hex."""

    fingerprint: str
    serial: str
    spiffe_id: str
    authority: str


class IssuedCertificate(CertificateView, frozen=True, kw_only=True):
    """The answer to `pki.issue`: the certificate and the authorities to trust, both in PEM."""

    certificate: str
    bundle: str


class AuthorityView(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate authority. It issues when `state` is `issuing`; a `trusted` one was replaced, and what it issued
    holds until `retires_at`."""

    authority: str
    state: Literal["issuing", "trusted"]
    created_at: str
    expires_at: str
    retires_at: str | None


class PkiView(msgspec.Struct, frozen=True, kw_only=True):
    """`pki.show`, `pki.init`, `pki.rotate`: the authorities, and the tenant's certificates that are not expired."""

    trust_domain: str
    socket: str
    authorities: tuple[AuthorityView, ...]
    certificates: tuple[CertificateView, ...]
    bundle: str
