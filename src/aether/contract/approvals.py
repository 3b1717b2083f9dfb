"""Approvals: what waits for somebody's leave, and the calls about it.

A policy demands an approval by not letting an operation go ahead without one (`job.unapproved`, `cell.unapproved`;
docs/approvals.md). An approval is for one request: the exact input, of one principal by one ticket, once, until it
expires. The approval of a job has the UUID of the job.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Final

import msgspec

from aether.contract import ids, limits
from aether.contract.errors import AetherError

_DURATION: Final = re.compile(r"([0-9]{1,6})(ms|s|m|h|d)", re.ASCII)
_UNIT_MS: Final = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class ApprovalState(StrEnum):
    """`waiting` may become `granted`, `denied`, `expired`, or `withdrawn` when what asked for it ended first; what was
    `granted` is `used` once its job has ended or its cell was allocated, or `expired` when nobody came for it."""

    WAITING = "waiting"
    GRANTED = "granted"
    DENIED = "denied"
    EXPIRED = "expired"
    USED = "used"
    WITHDRAWN = "withdrawn"


class ListApprovalsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`approval.list`: newest first; without states those that wait."""

    state: tuple[ApprovalState, ...] = ()


class ApprovalCall(msgspec.Struct, frozen=True, kw_only=True):
    """`approval.show`."""

    approval_id: str


class DecideCall(msgspec.Struct, frozen=True, kw_only=True):
    """`approval.approve`, `approval.deny`. `reason` is for people; it is kept in the audit log."""

    approval_id: str
    reason: str | None = None


class ApprovalView(msgspec.Struct, frozen=True, kw_only=True):
    """An approval as every interface shows it. `operation` asked for it, `demanded_by` are the policies that did not
    let it go ahead; `input_hash` is what it is for, and nothing else."""

    approval_id: str
    state: ApprovalState
    operation: str
    job_id: str | None
    cell: str | None
    kind: str | None
    op: str | None
    labels: tuple[str, ...]
    hosts: tuple[str, ...]
    input_hash: str
    tenant_id: str
    principal: str
    role: str
    links: tuple[str, ...]
    demanded_by: tuple[str, ...]
    policy_digest: str
    requested_at: str
    expires_at: str
    requested_index: int
    decided_at: str | None = None
    decided_by: str | None = None
    reason: str | None = None
    decided_index: int | None = None


class ApprovalDetail(ApprovalView, frozen=True, kw_only=True):
    """`approval.show`: with the request itself, whose hash the authority checked."""

    request: dict[str, Any] = {}


class ApprovalList(msgspec.Struct, frozen=True, kw_only=True):
    """`approval.list`."""

    approvals: tuple[ApprovalView, ...]


def approval_id(text: str) -> str:
    """The id of an approval, also by the id of its job; raises AetherError BAD_ID."""
    if text.startswith(f"{ids.JOB}_"):
        return ids.sibling(ids.APPROVAL, ids.parse(ids.JOB, text))
    return ids.parse(ids.APPROVAL, text)


def parse_expiry(text: str) -> int:
    """`30m`, `24h`, `7d` as ms, cut to APPROVAL_MS_MIN..APPROVAL_MS_MAX; raises AetherError BAD_REQUEST."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise AetherError("BAD_REQUEST", f"cannot read the duration {text[:80]!r}: it is like 30m, 24h or 7d")
    asked_ms = int(match[1]) * _UNIT_MS[match[2]]
    return min(max(asked_ms, limits.APPROVAL_MS_MIN), limits.APPROVAL_MS_MAX)
