"""How the records of approvals are built, and the view that is made of them: pure functions."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from aether.contract.approvals import ApprovalView
from aether.contract.calls import Caller
from aether.contract.records import Record, RecordType
from aether.substrate.access.access import Admission
from aether.substrate.approvalbook import Approval, Ask
from aether.substrate.cellentries import Order
from aether.substrate.entries import Node, follow_up


def for_job(intent: Record, ask: Ask, index: int, time: str) -> Record:
    """`approval.requested` of an admitted job: by whom and with which ticket, as its intent says."""
    base = follow_up("approval.requested", intent, index, time)
    return replace(
        base, operation="job.submit", effect="control", ticket=intent.ticket, policy=ask.demand, detail=ask.detail
    )


def for_cell(
    node: Node,
    caller: Caller,
    admission: Admission,
    ask: Ask,
    input_hash: str,
    labels: tuple[str, ...],
    named: Mapping[str, str],
    index: int,
    time: str,
) -> Record:
    """`approval.requested` of a cell that was asked for; `named` are its name and the digest of its specification."""
    return Record(
        type="approval.requested",
        log_index=index,
        time=time,
        node_id=node.node_id,
        tenant_id=admission.principal.tenant_id,
        principal=admission.principal.name,
        request_id=caller.request_id,
        traceparent=caller.traceparent,
        operation="cell.allocate",
        effect="control",
        kind="cell",
        input_hash=input_hash,
        labels=labels,
        ticket=admission.ticket,
        policy=ask.demand,
        created_at=time,
        detail={**ask.detail, **named},
    )


def decided(kind: RecordType, of: Approval, order: Order, reason: str | None, index: int, time: str) -> Record:
    """`approval.granted`, `approval.denied`: who decided, by which ticket and which policy."""
    detail = {"approval": of.approval_id, "requested_index": str(of.requested.log_index)}
    return replace(
        follow_up(kind, of.requested, index, time),
        principal=order.admission.principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        effect="control",
        ticket=order.admission.ticket,
        policy=order.admission.policy,
        budget=order.budget,
        detail={**detail, **({"reason": reason} if reason else {})},
    )


def expired(of: Approval, index: int, time: str) -> Record:
    """`approval.expired`: nobody decided, or came for what was granted, in time."""
    detail = {"approval": of.approval_id, "requested_index": str(of.requested.log_index)}
    return replace(follow_up("approval.expired", of.requested, index, time), effect="control", detail=detail)


def view(of: Approval) -> ApprovalView:
    """The approval as interfaces show it."""
    asked, made = of.requested, of.decided
    assert asked.ticket is not None and asked.policy is not None
    return ApprovalView(
        approval_id=of.approval_id,
        state=of.state,
        operation=asked.operation or "",
        job_id=asked.job_id,
        cell=asked.detail.get("name"),
        kind=asked.kind,
        op=asked.op,
        labels=asked.labels,
        hosts=tuple(host for host in asked.detail["hosts"].split(", ") if host),
        input_hash=asked.input_hash or "",
        tenant_id=asked.tenant_id or "",
        principal=asked.principal or "",
        role=asked.ticket.role,
        links=asked.ticket.link_ids,
        demanded_by=asked.policy.determining,
        policy_digest=asked.policy.digest,
        requested_at=asked.time,
        expires_at=asked.detail["expires_at"],
        requested_index=asked.log_index,
        decided_at=made.time if made else None,
        decided_by=made.principal if made and made.type != "approval.expired" else None,
        reason=made.detail.get("reason") if made else None,
        decided_index=made.log_index if made else None,
    )
