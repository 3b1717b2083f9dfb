"""The head of an HTTP request: who calls, under which ids, and what the body will be.

Only what is listed here is taken from headers; each is bounded and checked, and one of them given twice with
different meanings (Authorization, Idempotency-Key, Content-Length) is refused rather than resolved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aether.contract import apikeys, ids, limits, tickets
from aether.contract.calls import PeerCertificate
from aether.contract.errors import AetherError

_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", re.ASCII)
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_IDEMPOTENCY_KEY: Final = re.compile(rf"[\x21-\x7e]{{1,{limits.IDEMPOTENCY_KEY_CHARS_MAX}}}", re.ASCII)
_MEDIA_TYPE: Final = re.compile(
    r"[A-Za-z0-9!#$&^_.+-]{1,63}/[A-Za-z0-9!#$&^_.+-]{1,127}(?:[ \t]*;[ \t]*[\x21-\x3a\x3c-\x7e]{1,128})*", re.ASCII
)
_TAKEN: Final = frozenset(
    {
        b"authorization", b"x-request-id", b"traceparent", b"idempotency-key", b"content-type", b"content-length",
        b"content-encoding", b"transfer-encoding", b"expect", b"upgrade",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Peer:
    """SO_PEERCRED of the connection (unix(7), struct ucred), and its client certificate where it speaks TLS."""

    uid: int
    gid: int
    pid: int
    certificate: PeerCertificate | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The raw values of the headers in `_TAKEN`, and the request id that every answer carries."""

    values: dict[bytes, bytes]
    request_id: str

    @property
    def has_body(self) -> bool:
        """Whether body bytes may follow."""
        return b"transfer-encoding" in self.values or self.values.get(b"content-length", b"0") != b"0"

    @property
    def upgrade(self) -> str:
        """The protocol that the client would speak instead (RFC 9110, 7.8); empty when it asked for none."""
        return self.values.get(b"upgrade", b"").decode("latin-1").lower()

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for leave before it sends the body (RFC 9110, 10.1.1)."""
        return self.values.get(b"expect", b"").lower() == b"100-continue"


def read_head(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Head, AetherError | None]:
    """The head, and why it must be refused, if so (the answer still carries the request id)."""
    values: dict[bytes, bytes] = {}
    error = None
    for name, value in headers:
        if name in _TAKEN:
            if name in values:
                error = AetherError("BAD_REQUEST", f"cannot accept header {name.decode()}: it is given twice")
            values[name] = value
    asked = values.get(b"x-request-id", b"").decode("ascii", "replace")
    return Head(values, asked if ids.is_request_id(asked) else ids.new(ids.REQUEST)), error


def credential(head: Head) -> str | None:
    """The ticket, API key or token as sent, unverified; raises UNAUTHENTICATED, BAD_TICKET or BAD_CREDENTIAL for what
    is none of them."""
    raw = head.values.get(b"authorization")
    if raw is None:
        return None
    scheme, _, token = raw.decode("latin-1").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer":
        raise AetherError("UNAUTHENTICATED", "cannot read Authorization: only `Bearer ...` is understood")
    if token.startswith(tickets.PREFIX):
        if len(token) > tickets.TICKET_CHARS_MAX or not token.isascii():
            raise AetherError("BAD_TICKET", "cannot read the ticket: it is not of the form aetk1_...")
    elif not token.startswith(apikeys.PREFIX) and (
        len(token) > limits.TOKEN_CHARS_MAX or _TOKEN.fullmatch(token) is None
    ):
        raise AetherError(
            "BAD_CREDENTIAL", "cannot read Authorization: it holds no ticket (aetk1_...), API key (aek1_...) or token"
        )
    return token


def idempotency_key(head: Head) -> str | None:
    """The client's key; raises BAD_REQUEST when it is not short visible ASCII."""
    raw = head.values.get(b"idempotency-key")
    if raw is None:
        return None
    text = raw.decode("latin-1")
    if _IDEMPOTENCY_KEY.fullmatch(text) is None:
        raise AetherError(
            "BAD_REQUEST",
            f"cannot accept Idempotency-Key: not 1..{limits.IDEMPOTENCY_KEY_CHARS_MAX} visible ASCII characters",
        )
    return text


def traceparent(head: Head) -> str | None:
    """W3C Trace Context level 1, version 00, when well formed; anything else is ignored, as the standard asks."""
    raw = head.values.get(b"traceparent")
    if raw is None:
        return None
    text = raw.decode("latin-1")
    return text if _TRACEPARENT.fullmatch(text) else None


def content_length(head: Head) -> int | None:
    """The announced body size; null when chunked or absent."""
    raw = head.values.get(b"content-length")
    if raw is None:
        return None
    if not raw.isdigit() or len(raw) > 18:
        raise AetherError("BAD_REQUEST", "cannot read Content-Length: not a number")
    return int(raw)


def require_json(head: Head) -> None:
    """Raises MEDIA_TYPE unless the body is announced as plain, uncompressed JSON in UTF-8."""
    content_type = head.values.get(b"content-type", b"").lower()
    if content_type == b"application/json":
        _require_identity(head)
        return
    kind, _, parameter = content_type.partition(b";")
    if kind.strip() != b"application/json" or parameter.strip().replace(b'"', b"") not in (b"", b"charset=utf-8"):
        shown = content_type[:80].decode("latin-1") or "no Content-Type"
        raise AetherError("MEDIA_TYPE", f"cannot read a body of {shown}: it must be application/json")
    _require_identity(head)


def raw_media_type(head: Head) -> str:
    """The media type of an upload; raises MEDIA_TYPE for a malformed or compressed one."""
    _require_identity(head)
    raw = head.values.get(b"content-type")
    if raw is None:
        return "application/octet-stream"
    text = raw.decode("latin-1").strip()
    if len(text) > 200 or _MEDIA_TYPE.fullmatch(text) is None:
        raise AetherError(
            "MEDIA_TYPE", f"cannot accept Content-Type {text[:80]!r}: not a media type", "send a type/subtype"
        )
    return text


def _require_identity(head: Head) -> None:
    encoding = head.values.get(b"content-encoding", b"identity").lower()
    if encoding != b"identity":
        raise AetherError(
            "MEDIA_TYPE", f"cannot read Content-Encoding {encoding[:40].decode('latin-1')}: send the body uncompressed"
        )
