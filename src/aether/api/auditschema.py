"""Bounds of the log's keeping in the OpenAPI document (contract.auditcalls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aether.contract import limits


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `CosignCall` and `RetainCall`."""
    schemas["CosignCall"]["properties"]["cosignatures"].update(minItems=1, maxItems=limits.WITNESSES_MAX)
    kept = schemas["RetainCall"]["properties"]["keep_ms"]
    kept.update(minimum=limits.AUDIT_KEEP_MS_MIN, maximum=limits.AUDIT_KEEP_MS_MAX)
