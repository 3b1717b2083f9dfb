"""Rows of the operations table about budgets, usage and quotas."""

from __future__ import annotations

import re
from typing import Any, Final, get_args

from aether.api.operation import JSON_ERRORS, WRITE_ERRORS, Operation
from aether.api.params import Param
from aether.contract import budgetcalls
from aether.contract.errors import AetherError


def _pattern(name: str, pattern: str) -> Any:
    def parse(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise AetherError("BAD_REQUEST", f"cannot read parameter {name}={text[:80]!r}: not of the form {pattern}")
        return text

    return parse


def _param(name: str, pattern: str, summary: str) -> Param:
    return Param(name, name, {"type": "string", "pattern": pattern}, _pattern(name, pattern), summary)


ACCOUNT: Final = _param("account", budgetcalls.ACCOUNT_PATTERN, "The id of a link, or tenant:NAME.")
SUBJECT: Final = _param("subject", budgetcalls.SUBJECT_PATTERN, "tenant:NAME or principal:NAME.")
BY: Final = _param("by", rf"^({'|'.join(get_args(budgetcalls.By))})$", "What rows are for.")
SINCE_DAY: Final = _param("since", budgetcalls.DAY_PATTERN, "From this day (UTC) on.")
UNTIL_DAY: Final = _param("until", budgetcalls.DAY_PATTERN, "Up to this day (UTC), with it.")

BUDGET_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="budget.show",
        method="GET",
        path="/v0/budgets",
        summary="What an account may spend and spent; without one, the accounts that the caller is charged on.",
        request=budgetcalls.ShowBudgetCall,
        reply=budgetcalls.AccountList,
        access="read",
        effect="read",
        idempotent=True,
        query=(ACCOUNT,),
        errors=("NOT_FOUND",),
    ),
    Operation(
        name="budget.set",
        method="POST",
        path="/v0/budgets/set",
        summary="Limit what a tenant may spend from now on. The operator's to do.",
        request=budgetcalls.SetBudgetCall,
        reply=budgetcalls.AccountView,
        access="control",
        effect="control",
        idempotent=False,
        body="json",
        body_type=budgetcalls.SetBudget,
        body_field="request",
        errors=(*JSON_ERRORS, *WRITE_ERRORS),
    ),
    Operation(
        name="budget.top-up",
        method="POST",
        path="/v0/budgets/top-up",
        summary="Add to what an account may spend. The operator's to do.",
        request=budgetcalls.TopUpCall,
        reply=budgetcalls.AccountView,
        access="control",
        effect="control",
        idempotent=False,
        body="json",
        body_type=budgetcalls.TopUp,
        body_field="request",
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "NOT_FOUND"),
    ),
    Operation(
        name="usage",
        method="GET",
        path="/v0/usage",
        summary="What was spent by principal, tenant, kind of job or day.",
        request=budgetcalls.UsageCall,
        reply=budgetcalls.UsageReport,
        access="read",
        effect="read",
        idempotent=True,
        query=(BY, SINCE_DAY, UNTIL_DAY),
    ),
    Operation(
        name="quota.show",
        method="GET",
        path="/v0/quotas",
        summary="What a tenant or principal may have at once, and has; without one, the caller's.",
        request=budgetcalls.ShowQuotaCall,
        reply=budgetcalls.QuotaList,
        access="read",
        effect="read",
        idempotent=True,
        query=(SUBJECT,),
        errors=("NOT_FOUND",),
    ),
    Operation(
        name="quota.set",
        method="POST",
        path="/v0/quotas",
        summary="Bound what a tenant or principal may have at once. The operator's to do.",
        request=budgetcalls.SetQuotaCall,
        reply=budgetcalls.QuotaList,
        access="control",
        effect="control",
        idempotent=False,
        body="json",
        body_type=budgetcalls.SetQuota,
        body_field="request",
        errors=(*JSON_ERRORS, *WRITE_ERRORS),
    ),
)
