"""Accounts, amounts and quotas in the OpenAPI document (contract.budgetcalls)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args

from aether.contract import budgetcalls
from aether.contract.units import AMOUNT_MAX, UNITS

_NULL: Final = {"type": "null"}


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `SetBudget`, `TopUp` and `SetQuota`."""
    limits = schemas["SetBudget"]["properties"]
    limits["tenant_id"]["pattern"] = budgetcalls.TENANT_PATTERN
    _name(limits["limits"], UNITS, {"anyOf": [_integer(0, AMOUNT_MAX), _NULL]})
    more = schemas["TopUp"]["properties"]
    more["account"]["pattern"] = budgetcalls.ACCOUNT_PATTERN
    _name(more["amounts"], UNITS, _integer(1, AMOUNT_MAX))
    bounds = schemas["SetQuota"]["properties"]
    bounds["subject"]["pattern"] = budgetcalls.SUBJECT_PATTERN
    _name(bounds["quotas"], get_args(budgetcalls.Quota), {"anyOf": [_integer(0, budgetcalls.QUOTA_MAX), _NULL]})


def _integer(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def _name(schema: dict[str, Any], names: tuple[str, ...], value: dict[str, Any]) -> None:
    """An object of at least one of these names."""
    schema.pop("propertyNames", None)
    schema.update(properties=dict.fromkeys(names, value), additionalProperties=False, minProperties=1)
