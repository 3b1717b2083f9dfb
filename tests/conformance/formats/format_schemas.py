"""JSON Schemas of public records, generated from the types they are written from."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from aether.contract.caveats import Caveat
from aether.contract.records import BudgetRef, PolicyRef, QuestionRef, Receipt, Record
from aether.substrate.access.schema import json_text, schema

OMITTED: dict[str, set[str]] = {
    kind.__name__: {field.name for field in msgspec.structs.fields(kind) if not field.required}
    for kind in (BudgetRef, PolicyRef, QuestionRef)
}
SCHEMAS: dict[str, Any] = {"record.schema.json": Record, "receipt.schema.json": Receipt, "caveat.schema.json": Caveat}


def texts() -> dict[str, str]:
    """File name -> text of each schema of schema/v1/, the policy's schema included."""
    found = {name: _schema(name, kind) for name, kind in SCHEMAS.items()}
    found["policy.cedarschema.json"] = json_text()
    found["policy.cedarschema"] = schema().text()
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
