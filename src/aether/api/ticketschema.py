"""What a minted ticket may say and how one is named to be revoked, in the OpenAPI document (contract.ticketcalls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.api.schemas import refine_optional
from aether.contract import apikeys, identitycalls, spiffe, ticketcalls
from aether.contract.units import AMOUNT_MAX, UNITS

_NULL: Final = {"type": "null"}
_TEXT: Final = {"type": "string"}


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to the bodies that make a ticket or what stands for one, and to those that revoke."""
    for name in ("MintRequest", "KeyRequest", "IssueRequest"):
        said = schemas[name]["properties"]
        amount = {"type": "integer", "minimum": 0, "maximum": AMOUNT_MAX}
        said["budget"].update(properties={unit: dict(amount) for unit in UNITS}, additionalProperties=False)
        refine_optional(said["role"], "string", pattern=ticketcalls.ROLE_PATTERN)
    schemas["KeyRequest"]["properties"]["name"]["pattern"] = f"^$|{identitycalls.LABEL_PATTERN}"
    schemas["IssueRequest"]["properties"]["name"]["pattern"] = spiffe.NAME_PATTERN
    schemas["InitRequest"]["properties"]["trust_domain"]["pattern"] = spiffe.TRUST_DOMAIN_PATTERN
    schemas["RevokeKeyCall"]["properties"]["key_id"]["pattern"] = apikeys.ID_PATTERN
    schemas["RevokeCertificateCall"]["properties"]["fingerprint"]["pattern"] = identitycalls.FINGERPRINT_PATTERN
    revoke = schemas["RevokeCall"]
    refine_optional(revoke["properties"]["link_id"], "string", pattern=ticketcalls.LINK_PATTERN)
    revoke["oneOf"] = [
        {"properties": {"link_id": _TEXT, "ticket": _NULL}, "required": ["link_id"]},
        {"properties": {"ticket": _TEXT, "link_id": _NULL}, "required": ["ticket"]},
    ]
