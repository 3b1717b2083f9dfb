"""The text of an API key: `aek1_<id>_<secret>`, an id of 16 hex digits and 32 random bytes as base64url. Pure.

The id is public: records, lists and the principal `key:<id>` name it. The secret is told once, to whoever made the key.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Final

from aether.contract.errors import AetherError

PREFIX: Final = "aek1_"
ID_BYTES: Final = 8
SECRET_BYTES: Final = 32
ID_PATTERN: Final = r"^[0-9a-f]{16}$"
_TEXT: Final = re.compile(r"aek1_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key taken apart; nothing of it is proven."""

    key_id: str
    secret: bytes = field(repr=False)


def write(key_id: str, secret: bytes) -> str:
    """The text of a key."""
    return f"{PREFIX}{key_id}_{base64.urlsafe_b64encode(secret).rstrip(b'=').decode()}"


def parse(text: str) -> ApiKey:
    """Takes a key apart; raises AetherError BAD_CREDENTIAL, which names no part of it."""
    found = _TEXT.fullmatch(text)
    if found is not None:
        secret = base64.urlsafe_b64decode(found[2] + "=")
        if write(found[1], secret) == text:  # one spelling per key: the decoder ignores unused bits
            return ApiKey(found[1], secret)
    raise AetherError("BAD_CREDENTIAL", "cannot read the API key: it is malformed")


def check_id(text: str) -> str:
    """The id of a key; raises AetherError BAD_ID."""
    if re.fullmatch(ID_PATTERN, text) is None:
        raise AetherError("BAD_ID", f"cannot read {text[:80]!r}: the id of an API key is 16 hex digits")
    return text
