"""Writes `schema/model-package/v1/` from the types: `python tests/conformance/model_package/package_schemas.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from aether.contract.modelwire import DsseEnvelope, Manifest, ModelSchema, ModelStats

FOLDER = Path(__file__).parents[3] / "schema" / "model-package" / "v1"
TYPES: dict[str, Any] = {
    "manifest": Manifest,
    "schema": ModelSchema,
    "stats": ModelStats,
    "signature": DsseEnvelope,
}


def rendered(name: str) -> str:
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:aether:model-package:v1:{name}.schema.json",
    }
    return json.dumps({**head, **msgspec.json.schema(TYPES[name])}, indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for one in TYPES:
        (FOLDER / f"{one}.schema.json").write_text(rendered(one))
