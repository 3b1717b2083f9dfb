"""Typed identifiers: a prefix, an underscore and a UUIDv7 (RFC 9562), so they sort by creation time.

`new(JOB)` gives `job_0190f6a2-7b3c-7def-8123-456789abcdef`. Parsing is strict; an id is never a path or a
shell word without having passed `parse`.
"""

from __future__ import annotations

import re
from typing import Final, NewType

import uuid_utils

from aether.contract.errors import AetherError

JobId = NewType("JobId", str)
CellId = NewType("CellId", str)
RequestId = NewType("RequestId", str)
Digest = NewType("Digest", str)

JOB: Final = "job"
CELL: Final = "cell"
EXECUTABLE: Final = "exec"
REQUEST: Final = "req"
TICKET: Final = "tkt"
NODE: Final = "node"
GRANT: Final = "grant"
RESERVATION: Final = "rsv"
APPROVAL: Final = "approval"

_UUID7 = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_ID = re.compile(rf"(?P<prefix>[a-z]{{2,8}})_{_UUID7}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REQUEST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def new(prefix: str) -> str:
    """A fresh id with `prefix`."""
    return f"{prefix}_{uuid_utils.uuid7()}"


def sibling(prefix: str, of: str) -> str:
    """The id with `prefix` and the UUID of another: what belongs to one job is found again after a crash."""
    return f"{prefix}_{of.partition('_')[2]}"


def parse(prefix: str, text: str) -> str:
    """`text` if it is an id with `prefix`; raises AetherError BAD_ID."""
    match = _ID.fullmatch(text)
    if match is None or match["prefix"] != prefix:
        raise AetherError("BAD_ID", f"cannot read {text[:80]!r}: not a {prefix} id")
    return text


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:<64 hex digits>`."""
    return _DIGEST.fullmatch(text) is not None


def parse_digest(text: str) -> Digest:
    """`text` as a digest; raises AetherError BAD_ID."""
    if not is_digest(text):
        raise AetherError("BAD_ID", f"cannot read {text[:80]!r}: not a sha256:<hex> digest")
    return Digest(text)


def is_request_id(text: str) -> bool:
    """Whether a client's own request id may be used as it stands (visible ASCII, bounded)."""
    return _REQUEST.fullmatch(text) is not None
