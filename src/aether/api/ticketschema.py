"""What a minted ticket may say and how one is named to be revoked, in the OpenAPI document (contract.ticketcalls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.contract import ticketcalls
from aether.contract.caveats import UNITS

_NULL: Final = {"type": "null"}
_TEXT: Final = {"type": "string"}


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `MintRequest` and `RevokeCall`."""
    mint = schemas["MintRequest"]["properties"]
    amount = {"type": "integer", "minimum": 0, "maximum": ticketcalls.AMOUNT_MAX}
    mint["budget"].update(properties={unit: dict(amount) for unit in UNITS}, additionalProperties=False)
    for way in mint["role"]["anyOf"]:
        if way["type"] == "string":
            way["pattern"] = ticketcalls.ROLE_PATTERN
    revoke = schemas["RevokeCall"]
    for way in revoke["properties"]["link_id"]["anyOf"]:
        if way["type"] == "string":
            way["pattern"] = ticketcalls.LINK_PATTERN
    revoke["oneOf"] = [
        {"properties": {"link_id": _TEXT, "ticket": _NULL}, "required": ["link_id"]},
        {"properties": {"ticket": _TEXT, "link_id": _NULL}, "required": ["ticket"]},
    ]
