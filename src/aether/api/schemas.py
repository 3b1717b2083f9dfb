"""Steps that the modules which refine the OpenAPI document share."""

from __future__ import annotations

from typing import Any


def refine_optional(schema: dict[str, Any], kind: str, **rule: Any) -> None:
    """Adds `rule` to the branch of type `kind` of a field that may also be null."""
    for way in schema["anyOf"]:
        if way["type"] == kind:
            way.update(rule)
