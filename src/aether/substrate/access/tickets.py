"""Tickets: bearer capabilities as chains of HMAC-SHA256 (the macaroon construction). Pure.

A ticket is a header, one or more links (blocks of caveats) and the tag of the last link:

    key    = HKDF-SHA256(secret of the epoch, info = "aether ticket v1" 0x00 kid 0x00 tenant), 32 bytes
    tag[0] = HMAC(key, "aetk1" 0x00 || header || u16 length || block[0])
    tag[i] = HMAC(tag[i-1], u16 length || block[i])
    text   = "aetk1_" base64url(header || (u16 length || block)* || tag[n])
    header = u8 length, kid, u8 length, tenant, 16 bytes nonce

Whoever holds a ticket can append a link without asking anybody, and cannot remove one. The id of a link is the first 16
bytes of SHA-256 over its tag, in hex: accounts and revocation name it, and it says nothing about the tag.

Verification, in this order: the text parses within its bounds (BAD_TICKET), its key is known, the last tag matches in
constant time (BAD_TICKET), no link is revoked (TICKET_REVOKED). `check` then asks every caveat of every link.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from aether.contract.errors import AetherError
from aether.substrate.access import caveats as c
from aether.substrate.access.caveats import Caveat, Request

PREFIX: Final = "aetk1_"
TICKET_CHARS_MAX: Final = 8_192
LINKS_MAX: Final = 16
NONCE_BYTES: Final = 16
TAG_BYTES: Final = 32
SECRET_BYTES: Final = 32
_DOMAIN: Final = b"aetk1\x00"
_CACHED_MAX: Final = 1_024
_U16: Final = struct.Struct(">H")


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

    @property
    def role(self) -> str:
        return self.roles[-1]


@dataclass(frozen=True, slots=True)
class _Parts:
    header: bytes
    kid: str
    tenant: str
    blocks: tuple[bytes, ...]
    tag: bytes = field(repr=False)


class Tickets:
    """Mints and verifies. `secrets` maps a key id (the epoch's name) to 32 bytes; `kid` is the one to mint with."""

    def __init__(self, secrets: Mapping[str, bytes], kid: str) -> None:
        if kid not in secrets or any(len(secret) != SECRET_BYTES for secret in secrets.values()):
            raise ValueError("a ticket authority needs 32-byte secrets and the one to mint with")
        self._secrets = dict(secrets)
        self._kid = kid
        self._keys: dict[tuple[str, str], bytes] = {}
        self._cache: OrderedDict[str, Verified] = OrderedDict()
        self.revoked: set[str] = set()

    def __repr__(self) -> str:
        return f"<Tickets kid={self._kid} cached={len(self._cache)} revoked={len(self.revoked)}>"

    def mint(self, tenant: str, nonce: bytes, caveats: Sequence[Caveat]) -> str:
        """A new ticket's text. The first link names exactly one role. Raises AetherError BAD_FIELD."""
        roles = [caveat for caveat in caveats if caveat.type == "role"]
        if len(roles) != 1 or len(nonce) != NONCE_BYTES or not 0 < len(tenant.encode()) < 256:
            raise AetherError("BAD_FIELD", "cannot mint a ticket: it needs one role, a tenant and a nonce of 16 bytes")
        header = _text8(self._kid) + _text8(tenant) + nonce
        block = _encode(caveats)
        tag = hmac.digest(self._key(self._kid, tenant), _DOMAIN + header + block, "sha256")
        return _write(header + block + tag)

    def verify(self, text: str) -> Verified:
        """What the ticket says; raises AetherError BAD_TICKET or TICKET_REVOKED. Caveats are not checked here."""
        verified = self._cache.get(text)
        if verified is None:
            verified = self._verify(text)
            self._cache[text] = verified
            if len(self._cache) > _CACHED_MAX:
                self._cache.popitem(last=False)
        if self.revoked and not self.revoked.isdisjoint(verified.link_ids):
            raise AetherError("TICKET_REVOKED", "cannot use the ticket: it was revoked")
        return verified

    def _verify(self, text: str) -> Verified:
        parts = _parse(text)
        if parts.kid not in self._secrets:
            raise AetherError("BAD_TICKET", "cannot use the ticket: its key is not known here")
        key, first = self._key(parts.kid, parts.tenant), _DOMAIN + parts.header
        link_ids: list[str] = []
        for block in parts.blocks:
            key = hmac.digest(key, first + block, "sha256")
            first = b""
            link_ids.append(link_id(key))
        if not hmac.compare_digest(key, parts.tag):
            raise AetherError("BAD_TICKET", "cannot use the ticket: its tag does not match")
        try:
            links = tuple(c.decode(block[2:]) for block in parts.blocks)
        except ValueError as error:
            raise AetherError("BAD_TICKET", f"cannot use the ticket: {error}") from error
        roles = tuple(dict.fromkeys(caveat.items[0] for link in links for caveat in link if caveat.type == "role"))
        if not roles or not any(caveat.type == "role" for caveat in links[0]):
            raise AetherError("BAD_TICKET", "cannot use the ticket: it names no role")
        limits = tuple(
            Limit(identity, caveat.items[0], caveat.number)
            for identity, link in zip(link_ids, links, strict=True)
            for caveat in link
            if caveat.type == "budget"
        )
        return Verified(parts.kid, parts.tenant, tuple(link_ids), links, roles, limits)

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


def attenuate(text: str, caveats: Sequence[Caveat]) -> str:
    """The ticket narrowed by one more link; needs no key. Raises AetherError BAD_TICKET or BAD_FIELD."""
    parts = _parse(text)
    if len(parts.blocks) == LINKS_MAX:
        raise AetherError("BAD_FIELD", f"cannot narrow the ticket: it has {LINKS_MAX} links already")
    block = _encode(caveats)
    tag = hmac.digest(parts.tag, block, "sha256")
    return _write(b"".join((parts.header, *parts.blocks, block, tag)))


def check(verified: Verified, request: Request, now_ms: int) -> None:
    """Raises AetherError TICKET_EXPIRED or TICKET_DENIED unless every caveat of every link allows the request."""
    for link in verified.links:
        for caveat in link:
            if c.allows(caveat, request, now_ms):
                continue
            if caveat.type == "expires":
                raise AetherError("TICKET_EXPIRED", "cannot use the ticket: it expired")
            raise AetherError(
                "TICKET_DENIED",
                f"cannot {request.operation}: the ticket's caveat {caveat.type} does not allow it",
                details={"caveat": caveat.type},
            )


def link_id(tag: bytes) -> str:
    """The name of a link: 32 hex digits."""
    return hashlib.sha256(tag).hexdigest()[:32]


def _encode(caveats: Sequence[Caveat]) -> bytes:
    try:
        block = c.encode(caveats)
        return _U16.pack(len(block)) + block
    except (ValueError, KeyError, struct.error) as error:
        raise AetherError("BAD_FIELD", f"cannot write the ticket: {error}") from error


def _text8(text: str) -> bytes:
    raw = text.encode()
    return bytes((len(raw),)) + raw


def _write(body: bytes) -> str:
    text = PREFIX + base64.urlsafe_b64encode(body).rstrip(b"=").decode()
    if len(text) > TICKET_CHARS_MAX:
        raise AetherError("BAD_FIELD", f"cannot write the ticket: it would have {len(text)} characters")
    return text


def _parse(text: str) -> _Parts:
    try:
        return _split(_decode(text))
    except (ValueError, IndexError, struct.error, binascii.Error) as error:
        # the text is a secret: what is said about it names no part of it
        raise AetherError("BAD_TICKET", "cannot read the ticket: it is malformed") from error


def _decode(text: str) -> bytes:
    if not text.startswith(PREFIX) or len(text) > TICKET_CHARS_MAX or not text.isascii():
        raise ValueError("no ticket")
    encoded = text[len(PREFIX) :]
    body = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    # one spelling per ticket: the decoder ignores the unused bits of the last character
    if base64.urlsafe_b64encode(body).rstrip(b"=").decode() != encoded:
        raise ValueError("no canonical base64url")
    return body


def _split(body: bytes) -> _Parts:
    kid_end = 1 + body[0]
    tenant_end = kid_end + 1 + body[kid_end]
    at = tenant_end + NONCE_BYTES
    end = len(body) - TAG_BYTES
    kid, tenant = body[1:kid_end].decode(), body[kid_end + 1 : tenant_end].decode()
    blocks: list[bytes] = []
    header = body[:at]
    while at < end:
        stop = at + 2 + int(_U16.unpack_from(body, at)[0])
        if stop > end or len(blocks) == LINKS_MAX:
            raise ValueError("links are cut off, or there are too many")
        blocks.append(body[at:stop])
        at = stop
    if at != end or not blocks or not tenant:
        raise ValueError("no link")
    return _Parts(header, kid, tenant, tuple(blocks), body[end:])
