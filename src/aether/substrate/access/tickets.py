"""The authority over tickets: mints and verifies them. Their text is `aether.contract.tickets`. Pure.

Verification, in this order: the text parses within its bounds (BAD_TICKET), its key is known, the last tag matches in
constant time (BAD_TICKET), no link is revoked (TICKET_REVOKED). `check` then asks every caveat of every link.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aether.contract import caveats as c
from aether.contract.caveats import Caveat, Request
from aether.contract.errors import AetherError
from aether.contract.tickets import NONCE_BYTES, encode_block, link_id, parse, text8, write

SECRET_BYTES: Final = 32
_DOMAIN: Final = b"aetk1\x00"
_CACHED_MAX: Final = 1_024


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `amount` of `unit` may be spent on the account of `link_id`."""

    link_id: str
    unit: str
    amount: int


@dataclass(frozen=True, slots=True)
class Verified:
    """A ticket that the authority issued, or somebody narrowed since. `links` are its caveats per link."""

    kid: str
    tenant: str
    link_ids: tuple[str, ...]
    links: tuple[tuple[Caveat, ...], ...]
    roles: tuple[str, ...]
    """Each role named by a link, in order: all of them must be allowed, so that naming another never widens."""
    limits: tuple[Limit, ...]
    expires_ms: int | None = None
    """When the first of its links expires, since the epoch."""

    @property
    def role(self) -> str:
        return self.roles[-1]


class Tickets:
    """Mints and verifies. `secrets` maps a key id (the epoch's name) to 32 bytes; `kid` is the one to mint with.
    `revoked` are ids of links, kept by the caller."""

    def __init__(self, secrets: Mapping[str, bytes], kid: str, revoked: Set[str] = frozenset()) -> None:
        _check(secrets, kid)
        self._secrets = dict(secrets)
        self._kid = kid
        self._keys: dict[tuple[str, str], bytes] = {}
        self._cache: OrderedDict[str, Verified] = OrderedDict()
        self._revoked = revoked

    def __repr__(self) -> str:
        return f"<Tickets kid={self._kid} cached={len(self._cache)} revoked={len(self._revoked)}>"

    def rekey(self, secrets: Mapping[str, bytes], kid: str) -> None:
        """From now on these secrets, and `kid` to mint with; tickets of others are not known any more."""
        _check(secrets, kid)
        self._secrets, self._kid = dict(secrets), kid
        self._keys.clear()
        self._cache.clear()

    def mint(self, tenant: str, nonce: bytes, caveats: Sequence[Caveat], kid: str | None = None) -> str:
        """A new ticket's text, or that of one minted before under `kid`. The first link names exactly one role. Raises
        AetherError BAD_FIELD, or BAD_TICKET when that key is gone."""
        roles = [caveat for caveat in caveats if caveat.type == "role"]
        if len(roles) != 1 or len(nonce) != NONCE_BYTES or not 0 < len(tenant.encode()) < 256:
            raise AetherError("BAD_FIELD", "cannot mint a ticket: it needs one role, a tenant and a nonce of 16 bytes")
        kid = kid or self._kid
        if kid not in self._secrets:
            raise _unknown_key()
        header = text8(kid) + text8(tenant) + nonce
        block = encode_block(caveats)
        tag = hmac.digest(self._key(kid, tenant), _DOMAIN + header + block, "sha256")
        return write(header + block + tag)

    def verify(self, text: str) -> Verified:
        """What the ticket says; raises AetherError BAD_TICKET or TICKET_REVOKED. Caveats are not checked here."""
        verified = self.read(text)
        if self._revoked and not self._revoked.isdisjoint(verified.link_ids):
            raise AetherError("TICKET_REVOKED", "cannot use the ticket: it was revoked")
        return verified

    def read(self, text: str) -> Verified:
        """The same of a ticket that may be revoked; raises BAD_TICKET."""
        verified = self._cache.get(text)
        if verified is None:
            verified = self._verify(text)
            self._cache[text] = verified
            if len(self._cache) > _CACHED_MAX:
                self._cache.popitem(last=False)
        return verified

    def _verify(self, text: str) -> Verified:
        parts = parse(text)
        if parts.kid not in self._secrets:
            raise _unknown_key()
        key, first = self._key(parts.kid, parts.tenant), _DOMAIN + parts.header
        link_ids: list[str] = []
        for block in parts.blocks:
            key = hmac.digest(key, first + block, "sha256")
            first = b""
            link_ids.append(link_id(key))
        if not hmac.compare_digest(key, parts.tag):
            raise AetherError("BAD_TICKET", "cannot use the ticket: its tag does not match")
        try:
            links = parts.links()
        except ValueError as error:
            raise AetherError("BAD_TICKET", f"cannot use the ticket: {error}") from error
        return said_by(parts.kid, parts.tenant, tuple(link_ids), links)

    def _key(self, kid: str, tenant: str) -> bytes:
        key = self._keys.get((kid, tenant))
        if key is None:
            info = b"\x00".join((b"aether ticket v1", kid.encode(), tenant.encode()))
            key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._secrets[kid])
            # tenants come from tickets not yet verified: what is kept must not grow with what is sent
            if len(self._keys) >= _CACHED_MAX:
                self._keys.clear()
            self._keys[kid, tenant] = key
        return key


def _check(secrets: Mapping[str, bytes], kid: str) -> None:
    if kid not in secrets or any(len(secret) != SECRET_BYTES for secret in secrets.values()):
        raise ValueError("a ticket authority needs 32-byte secrets and the one to mint with")


def _unknown_key() -> AetherError:
    return AetherError("BAD_TICKET", "cannot use the ticket: its key is not known here")


def said_by(kid: str, tenant: str, link_ids: tuple[str, ...], links: tuple[tuple[Caveat, ...], ...]) -> Verified:
    """What links that are known to be the authority's say together; raises AetherError BAD_TICKET without a role."""
    roles = tuple(dict.fromkeys(caveat.items[0] for link in links for caveat in link if caveat.type == "role"))
    if not roles or not any(caveat.type == "role" for caveat in links[0]):
        raise AetherError("BAD_TICKET", "cannot use the ticket: it names no role")
    limits = tuple(
        Limit(identity, caveat.items[0], caveat.number)
        for identity, link in zip(link_ids, links, strict=True)
        for caveat in link
        if caveat.type == "budget"
    )
    times = [caveat.number for link in links for caveat in link if caveat.type == "expires"]
    return Verified(kid, tenant, link_ids, links, roles, limits, min(times, default=None))


def check_expiry(verified: Verified, now_ms: int) -> None:
    """Raises AetherError TICKET_EXPIRED unless no link has expired."""
    if any(caveat.type == "expires" and now_ms >= caveat.number for link in verified.links for caveat in link):
        raise _expired()


def _expired() -> AetherError:
    return AetherError("TICKET_EXPIRED", "cannot use the ticket: it expired")


def check(verified: Verified, request: Request, now_ms: int) -> None:
    """Raises AetherError TICKET_EXPIRED or TICKET_DENIED unless every caveat of every link allows the request."""
    for link in verified.links:
        for caveat in link:
            if c.allows(caveat, request, now_ms):
                continue
            if caveat.type == "expires":
                raise _expired()
            raise AetherError(
                "TICKET_DENIED",
                f"cannot {request.operation}: the ticket's caveat {caveat.type} does not allow it",
                details={"caveat": caveat.type},
            )
