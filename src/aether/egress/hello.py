"""Reads the server name out of a ClientHello without ending the TLS session. Pure, bounded, strict.

RFC 8446 section 4.1.2 and 5.1 (records, handshake), RFC 6066 section 3 (server_name). The message may be cut into
records and into reads at any place. What cannot be read for certain is an error, never "no name": the peer behind
the proxy must not be able to read another name out of the same bytes.

An encrypted ClientHello (extension 0xfe0d, and its forerunner 0xffce) names another host inside than outside, so it
is refused wherever it appears; a client that merely pads with it (GREASE) must be told not to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HELLO_BYTES_MAX: Final = 16 * 1024 + 5
"""More than one full record of handshake is no ClientHello that anybody sends."""
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_RECORD_BYTES_MAX: Final = 1 << 14
_SERVER_NAME, _HOST_NAME = 0, 0
_ENCRYPTED: Final = frozenset({0xFE0D, 0xFFCE})


class NotTlsError(ValueError):
    """The first bytes are no TLS handshake at all."""


class EncryptedHelloError(ValueError):
    """The ClientHello hides its real name."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What the ClientHello says openly; `server_name` is None where the extension is absent."""

    server_name: str | None


class _Cursor:
    """Reads big-endian fields out of bytes; raises ValueError beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise ValueError("a field is longer than what holds it")
        self._at += count
        return part

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "big")

    def vector(self, width: int) -> bytes:
        """A field behind its own length of `width` bytes."""
        return self.take(self.number(width))

    @property
    def rest(self) -> int:
        return len(self._data) - self._at


def read_hello(data: bytes) -> Hello | None:
    """The ClientHello at the beginning of `data`, or None while it is incomplete.

    Raises NotTlsError, EncryptedHelloError, or ValueError for what is malformed or too long.
    """
    message = _handshake(data)
    if message is None:
        if len(data) >= HELLO_BYTES_MAX:
            raise ValueError("the ClientHello is too long")
        return None
    return _parse(message)


def _handshake(data: bytes) -> bytes | None:
    """The body of the first handshake message, put together from its records; None while it is incomplete."""
    body = bytearray()
    at = 0
    while True:
        head = data[at : at + 5]
        _check_head(head)
        if len(head) < 5:
            return None
        length = int.from_bytes(head[3:5], "big")
        if not 0 < length <= _RECORD_BYTES_MAX:
            raise ValueError("a TLS record has an impossible length")
        body += data[at + 5 : at + 5 + length]
        at += 5 + length
        if body and body[0] != _CLIENT_HELLO:
            raise ValueError("the handshake does not begin with a ClientHello")
        if len(body) >= 4:
            wanted = 4 + int.from_bytes(body[1:4], "big")
            if wanted > HELLO_BYTES_MAX:
                raise ValueError("the ClientHello is too long")
            if len(body) >= wanted:
                return bytes(body[4:wanted])
        if at > len(data):
            return None


def _check_head(head: bytes) -> None:
    """As much of a record's head as is there; raises NotTlsError."""
    if head[:1] and head[0] != _HANDSHAKE:
        raise NotTlsError("the first bytes are no TLS handshake")
    if head[1:2] and head[1] != 3:
        raise NotTlsError("the first bytes are of no known TLS version")


def _parse(message: bytes) -> Hello:
    body = _Cursor(message)
    body.take(2 + 32)  # legacy_version, random
    body.vector(1)  # legacy_session_id
    body.vector(2)  # cipher_suites
    body.vector(1)  # legacy_compression_methods
    if not body.rest:
        return Hello(None)
    extensions = _Cursor(body.vector(2))
    if body.rest:
        raise ValueError("bytes follow the extensions")
    seen: set[int] = set()
    name: str | None = None
    while extensions.rest:
        kind = extensions.number(2)
        value = extensions.vector(2)
        if kind in seen:  # RFC 8446 4.2: one of each; two readers might choose different ones
            raise ValueError(f"extension {kind} appears twice")
        seen.add(kind)
        if kind in _ENCRYPTED:
            raise EncryptedHelloError("an encrypted ClientHello hides the name")
        if kind == _SERVER_NAME:
            name = _server_name(value)
    return Hello(name)


def _server_name(value: bytes) -> str:
    outer = _Cursor(value)
    names = _Cursor(outer.vector(2))
    if outer.rest or names.number(1) != _HOST_NAME:
        raise ValueError("the server name extension is malformed")
    name = names.vector(2)
    if names.rest:
        raise ValueError("the ClientHello names more than one host")
    return name.decode("ascii")
