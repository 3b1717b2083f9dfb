"""Rows of the operations table about approvals."""

from __future__ import annotations

from typing import Final

import msgspec

from aether.api import params
from aether.api.operation import JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import approvals

_APPROVAL: Final = "/v0/approvals/{approval_id}"
_DECIDING: Final = ("BAD_ID", "NOT_FOUND", *JSON_ERRORS, *WRITE_ERRORS, "APPROVAL_DECIDED")


class DecisionBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `approval.approve` and `approval.deny`."""

    reason: str | None = None


APPROVAL_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="approval.list",
        method="GET",
        path="/v0/approvals",
        summary="What waits for an approval, newest first; with `state` what became of the latest ones.",
        request=approvals.ListApprovalsCall,
        reply=approvals.ApprovalList,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.APPROVAL_STATE,),
    ),
    Operation(
        name="approval.show",
        method="GET",
        path=_APPROVAL,
        summary="One approval and the exact request that it is for.",
        request=approvals.ApprovalCall,
        reply=approvals.ApprovalDetail,
        access="read",
        effect="read",
        idempotent=True,
        errors=("BAD_ID", "NOT_FOUND", "GONE"),
    ),
    Operation(
        name="approval.approve",
        method="POST",
        path=f"{_APPROVAL}/approve",
        summary="Let exactly this request go ahead, once: its job starts, or its cell may be allocated.",
        request=approvals.DecideCall,
        reply=approvals.ApprovalView,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=DecisionBody,
        errors=_DECIDING,
    ),
    Operation(
        name="approval.deny",
        method="POST",
        path=f"{_APPROVAL}/deny",
        summary="Refuse the request: its job is cancelled, its cell is not allocated.",
        request=approvals.DecideCall,
        reply=approvals.ApprovalView,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=DecisionBody,
        errors=_DECIDING,
    ),
)
