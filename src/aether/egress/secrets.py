"""Credentials: read from their reference when a cell is opened, put into requests to their host, taken out of answers.

A value lives in this process only, for as long as its cell. It has no representation as text, so that no log line,
record or traceback shows it. A server that echoes what it was sent would hand it to the cell: `Mask` blanks it in
everything that comes back (answers to such requests are asked for uncompressed, so that it can be seen).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from aether.contract.network import Credential
from aether.egress.references import References

MASK_BYTES_MIN: Final = 6
"""Shorter values would be found by chance in ordinary bytes."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A header to send for one credential."""

    name: str
    header: bytes
    value: bytes = field(repr=False)
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sources(References):
    """References as credentials use them."""

    def load(self, credential: Credential) -> Injection:
        """Raises AetherError BAD_FIELD when the value cannot be had or cannot be a header."""
        secret = self.read(f"credential {credential.name}", credential.source)
        header = credential.header.lower().encode()
        return Injection(credential.name, header, credential.prefix.encode() + secret, secret)


class Mask:
    """Replaces every occurrence of a secret in a stream of bytes by as many `*`, whatever way the stream is cut."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret if len(secret) >= MASK_BYTES_MIN else b""
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What can be passed on now; an end that may be the beginning of the secret is held back."""
        if not self._secret:
            return data
        data = (self._held + data).replace(self._secret, b"*" * len(self._secret))
        keep = next(
            (n for n in range(min(len(self._secret) - 1, len(data)), 0, -1) if data.endswith(self._secret[:n])), 0
        )
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back, at the end."""
        held, self._held = self._held, b""
        return held

    def whole(self, data: bytes) -> bytes:
        """The same for a value that is all there."""
        return data.replace(self._secret, b"*" * len(self._secret)) if self._secret else data
