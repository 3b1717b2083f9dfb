"""The rules of `contract.network.check_network` in the public schema, as far as a schema can say them.

Of addresses it shows the plain forms: IPv4 with the usual prefix lengths, IPv6 written out. Others are taken too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.contract import limits
from aether.contract.network import FORBIDDEN_HEADERS
from aether.contract.secrets import SECRETS_MAX, SOURCE_PATTERN, VARIABLE_PATTERN

_PORT: Final = r"[1-9][0-9]{0,3}"
_NAME: Final = r"([a-z0-9_]([a-z0-9_-]{0,30}[a-z0-9_])?\.){0,4}[a-z]([a-z-]{0,20}[a-z])?"
_BYTE: Final = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = (
    rf"({_BYTE}(\.{_BYTE}){{3}}|{_BYTE}\.0\.0\.0/8|{_BYTE}\.{_BYTE}\.0\.0/16|{_BYTE}\.{_BYTE}\.{_BYTE}\.0/24)"
)
_IPV6: Final = r"\[([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}\]"
RULE: Final = rf"^(tcp://)?((\*\.)?{_NAME}|{_IPV4}|{_IPV6}):({_PORT}|\*)$"
HOST: Final = rf"^{_NAME}:{_PORT}$"


def _any_case(word: str) -> str:
    return "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word)


_FORBIDDEN: Final = "|".join(map(_any_case, sorted(FORBIDDEN_HEADERS)))
HEADER: Final = rf"^(?!({_FORBIDDEN})$)[A-Za-z0-9!#$%&'*+.^_`|~-]{{1,64}}$"
SOURCE: Final = rf"^(?!.*[:/]\.\.([/#]|$))({SOURCE_PATTERN})$"


_SHARED_HAS_NONE: Final = {
    "if": {"required": ["isolate_network"], "properties": {"isolate_network": {"const": False}}},
    "then": {"properties": {"network": {"type": "null"}}},
}
"""A cell that shares the host's network has no rules."""


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds the rules to the schemas of Network, Credential, NetworkLimits, CommandParams and CellRequest."""
    network = schemas["Network"]
    network["properties"]["allow"].update(items={"type": "string", "pattern": RULE}, maxItems=limits.EGRESS_RULES_MAX)
    network["properties"]["credentials"]["maxItems"] = limits.EGRESS_CREDENTIALS_MAX
    network["anyOf"] = [
        {"required": ["allow"], "properties": {"allow": {"minItems": 1}}},
        {"required": ["credentials"], "properties": {"credentials": {"minItems": 1}}},
        {"required": ["learn"], "properties": {"learn": {"const": True}}},
    ]
    credential = schemas["Credential"]["properties"]
    credential["name"]["pattern"] = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
    credential["host"]["pattern"] = HOST
    credential["header"]["pattern"] = HEADER
    credential["source"]["pattern"] = SOURCE
    credential["prefix"]["pattern"] = r"^[ -~]{0,64}$"
    schemas["CommandParams"]["properties"]["secrets"].update(
        propertyNames={"pattern": f"^{VARIABLE_PATTERN}$"},
        additionalProperties={"type": "string", "pattern": SOURCE},
        maxProperties=SECRETS_MAX,
    )
    bounds = {
        "connections": (1, limits.EGRESS_CONNECTIONS_MAX),
        "requests_per_s": (1, limits.EGRESS_REQUESTS_PER_S_MAX),
        "sent_bytes": (0, 1 << 50),
        "received_bytes": (0, 1 << 50),
        "connection_ms": (1, limits.TIMEOUT_MS_MAX),
        "idle_ms": (1, limits.TIMEOUT_MS_MAX),
    }
    for name, (low, high) in bounds.items():
        schemas["NetworkLimits"]["properties"][name].update(minimum=low, maximum=high)
    guest = schemas["CommandParams"].setdefault("else", {"properties": {}})
    guest["properties"]["network"] = {"type": "null"}
    schemas["CellRequest"].setdefault("allOf", []).append(_SHARED_HAS_NONE)
