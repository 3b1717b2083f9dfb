"""What a minted ticket may say and how one is named to be revoked, in the OpenAPI document (contract.ticketcalls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.api.schemas import refine_optional
from aether.contract import ticketcalls
from aether.contract.units import AMOUNT_MAX, UNITS

_NULL: Final = {"type": "null"}
_TEXT: Final = {"type": "string"}


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `MintRequest` and `RevokeCall`."""
    mint = schemas["MintRequest"]["properties"]
    amount = {"type": "integer", "minimum": 0, "maximum": AMOUNT_MAX}
    mint["budget"].update(properties={unit: dict(amount) for unit in UNITS}, additionalProperties=False)
    refine_optional(mint["role"], "string", pattern=ticketcalls.ROLE_PATTERN)
    revoke = schemas["RevokeCall"]
    refine_optional(revoke["properties"]["link_id"], "string", pattern=ticketcalls.LINK_PATTERN)
    revoke["oneOf"] = [
        {"properties": {"link_id": _TEXT, "ticket": _NULL}, "required": ["link_id"]},
        {"properties": {"ticket": _TEXT, "link_id": _NULL}, "required": ["ticket"]},
    ]
