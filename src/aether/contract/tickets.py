"""The text of a ticket: how it is written, read and narrowed. Pure, and needs no key.

A ticket is a header, one or more links (blocks of caveats) and the tag of the last link:

    key    = HKDF-SHA256(secret of the epoch, info = "aether ticket v1" 0x00 kid 0x00 tenant), 32 bytes
    tag[0] = HMAC(key, "aetk1" 0x00 || header || u16 length || block[0])
    tag[i] = HMAC(tag[i-1], u16 length || block[i])
    text   = "aetk1_" base64url(header || (u16 length || block)* || tag[n])
    header = u8 length, kid, u8 length, tenant, 16 bytes nonce

Whoever holds a ticket can append a link without asking anybody, and cannot remove one. The id of a link is the first 16
bytes of SHA-256 over its tag, in hex: accounts and revocation name it, and it says nothing about the tag. Of a ticket
without its key only the id of the last link can be told.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from aether.contract import caveats as c
from aether.contract.caveats import Caveat
from aether.contract.errors import AetherError

PREFIX: Final = "aetk1_"
TICKET_CHARS_MAX: Final = 8_192
LINKS_MAX: Final = 16
NONCE_BYTES: Final = 16
TAG_BYTES: Final = 32
_U16: Final = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Parts:
    """A ticket taken apart. Each block begins with its length; `header` is what the first tag covers beside it."""

    header: bytes
    kid: str
    tenant: str
    blocks: tuple[bytes, ...]
    tag: bytes = field(repr=False)

    def links(self) -> tuple[tuple[Caveat, ...], ...]:
        """The caveats of each link; raises ValueError when a block is malformed."""
        return tuple(c.decode(block[2:]) for block in self.blocks)


def attenuate(text: str, caveats: Sequence[Caveat]) -> str:
    """The ticket narrowed by one more link; needs no key. Raises AetherError BAD_TICKET or BAD_FIELD."""
    parts = parse(text)
    if len(parts.blocks) == LINKS_MAX:
        raise AetherError("BAD_FIELD", f"cannot narrow the ticket: it has {LINKS_MAX} links already")
    block = encode_block(caveats)
    tag = hmac.digest(parts.tag, block, "sha256")
    return write(b"".join((parts.header, *parts.blocks, block, tag)))


def link_id(tag: bytes) -> str:
    """The name of a link: 32 hex digits."""
    return hashlib.sha256(tag).hexdigest()[:32]


def encode_block(caveats: Sequence[Caveat]) -> bytes:
    """The length and bytes of one link; raises AetherError BAD_FIELD."""
    try:
        block = c.encode(caveats)
        return _U16.pack(len(block)) + block
    except (ValueError, KeyError, struct.error) as error:
        raise AetherError("BAD_FIELD", f"cannot write the ticket: {error}") from error


def text8(text: str) -> bytes:
    """A text of the header."""
    raw = text.encode()
    return bytes((len(raw),)) + raw


def write(body: bytes) -> str:
    """The text of a ticket's bytes; raises AetherError BAD_FIELD when it is too long."""
    text = PREFIX + base64.urlsafe_b64encode(body).rstrip(b"=").decode()
    if len(text) > TICKET_CHARS_MAX:
        raise AetherError("BAD_FIELD", f"cannot write the ticket: it would have {len(text)} characters")
    return text


def parse(text: str) -> Parts:
    """Takes a ticket apart, its tag unchecked; raises AetherError BAD_TICKET."""
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


def _split(body: bytes) -> Parts:
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
    return Parts(header, kid, tenant, tuple(blocks), body[end:])
