"""SPIFFE IDs: `spiffe://<trust domain>/<path>`, as a certificate carries one in its URI SAN. Pure.

Rules are those of the SPIFFE-ID and X509-SVID standards (github.com/spiffe/spiffe, standards/): a trust domain of
lowercase letters, digits, dots, dashes and underscores; path segments of letters, digits, dots, dashes and
underscores, none of them empty, `.` or `..`; no query, fragment, port or percent-encoding; at most 2,048 bytes. A
certificate of a workload carries exactly one URI SAN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from aether.contract.errors import AetherError

ENDPOINT_VARIABLE: Final = "SPIFFE_ENDPOINT_SOCKET"
"""Names the socket of the Workload API (SPIFFE Workload Endpoint, section 4): `unix:///path`."""
ID_BYTES_MAX: Final = 2_048
TRUST_DOMAIN_PATTERN: Final = r"^[a-z0-9._-]{1,255}$"
NAME_PATTERN: Final = r"^[A-Za-z0-9._-]{1,64}(/[A-Za-z0-9._-]{1,64}){0,7}$"
"""The part of a path that whoever asks for a certificate chooses."""
_ID: Final = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A parsed id. `path` is empty, or begins with a slash."""

    trust_domain: str
    path: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}{self.path}"


def parse(text: str) -> SpiffeId:
    """The id; raises AetherError BAD_CREDENTIAL."""
    found = _ID.fullmatch(text) if len(text) <= ID_BYTES_MAX else None
    if found is None or any(part in (".", "..") for part in found[2].split("/")):
        raise AetherError("BAD_CREDENTIAL", "cannot read the certificate: its URI is no SPIFFE ID")
    return SpiffeId(found[1], found[2])


def check_name(text: str) -> str:
    """A name to be put into a path; raises AetherError BAD_FIELD."""
    if re.fullmatch(NAME_PATTERN, text) is None or any(part in (".", "..") for part in text.split("/")):
        raise AetherError("BAD_FIELD", f"cannot use the name {text[:80]!r}: write it like agent or team/agent-1")
    return text


def check_trust_domain(text: str) -> str:
    """A trust domain; raises AetherError BAD_FIELD."""
    if re.fullmatch(TRUST_DOMAIN_PATTERN, text) is None:
        raise AetherError(
            "BAD_FIELD", f"cannot use the trust domain {text[:80]!r}: lowercase letters, digits, dots and dashes only"
        )
    return text
