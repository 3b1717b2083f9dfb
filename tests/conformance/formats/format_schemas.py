"""JSON Schemas of public records, generated from the types they are written from."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import msgspec

from aether.contract.caveats import Caveat
from aether.contract.records import Receipt, Record

OMITTED: dict[str, set[str]] = {"BudgetRef": {"amounts", "grants", "limits", "expires_ms"}}
SCHEMAS: dict[str, Any] = {"record.schema.json": Record, "receipt.schema.json": Receipt, "caveat.schema.json": Caveat}


def texts() -> dict[str, str]:
    """File name -> text of each schema of schema/v1/, the policy's schema included."""
    found = {name: _schema(name, kind) for name, kind in SCHEMAS.items()}
    policy = resources.files("aether.substrate.access").joinpath("aether.cedarschema.json")
    found["policy.cedarschema.json"] = policy.read_text(encoding="utf-8")
    return found


def _schema(name: str, kind: Any) -> str:
    schema = msgspec.json.schema(kind)
    # what is written has every field and no other, but for those that the type leaves out where they are empty
    for definition in schema["$defs"].values():
        if "properties" in definition:
            definition["required"] = sorted(definition["properties"].keys() - OMITTED.get(definition["title"], set()))
            definition["additionalProperties"] = False
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:aether:v1:{name}"}
    return json.dumps(head | schema, indent=1, ensure_ascii=False) + "\n"
