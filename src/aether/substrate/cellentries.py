"""How the records of allocated cells are built, and the views that are made of them: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from aether.contract.allocations import CellEvent, CellExecutable, CellRequest, CellView
from aether.contract.calls import Caller
from aether.contract.cellnames import parent_of
from aether.contract.cells import Usage
from aether.contract.errors import ErrorBody
from aether.contract.jobs import JobState
from aether.contract.records import BudgetRef, CodeRef, Record, RecordType
from aether.substrate.access.access import Admission
from aether.substrate.allocations import Allocation
from aether.substrate.entries import Node, masked
from aether.substrate.ledger import OpenJob


@dataclass(frozen=True, slots=True)
class Order:
    """Who asked for a change, on what authority, what it costs."""

    caller: Caller
    admission: Admission
    operation: str
    budget: BudgetRef | None = None


def ordered(kind: RecordType, node: Node, order: Order, index: int, time: str, **more: Any) -> Record:
    """What somebody had done, on what authority; `more` are the fields of a record that say what."""
    principal = order.admission.principal
    by = {"ticket": order.admission.ticket, "policy": order.admission.policy, "budget": order.budget}
    fields: dict[str, Any] = {"effect": "control", **by, **more}
    return Record(
        type=kind,
        log_index=index,
        time=time,
        node_id=node.node_id,
        tenant_id=principal.tenant_id,
        principal=principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        **fields,
    )


def allocated(
    node: Node, order: Order, cell_id: str, request: CellRequest, said: Mapping[str, str], index: int, time: str
) -> Record:
    """`cell.allocated`: what was asked, before the cell is made. `said` are its name, the digest of its specification
    and the approval that it uses."""
    return ordered(
        "cell.allocated",
        node,
        order,
        index,
        time,
        effect="cell",
        cell_id=cell_id,
        labels=request.labels,
        created_at=time,
        detail={**said, "memory_bytes": str(request.limits.memory_bytes)},
    )


def changed(
    kind: RecordType, cell: Allocation, order: Order | None, detail: Mapping[str, str], index: int, time: str
) -> Record:
    """A later record of a cell: by somebody's order, or the node's own doing."""
    first = cell.allocated
    base = Record(
        type=kind,
        log_index=index,
        time=time,
        node_id=first.node_id,
        tenant_id=first.tenant_id,
        principal=first.principal,
        effect="control",
        cell_id=first.cell_id,
        labels=cell.labels,
        created_at=first.created_at,
        detail={"name": cell.name, **detail},
    )
    if order is None:
        return base
    return replace(
        base,
        principal=order.admission.principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        ticket=order.admission.ticket,
        policy=order.admission.policy,
        budget=order.budget,
    )


def started(cell: Allocation, code: CodeRef, host_uid: int | None, index: int, time: str) -> Record:
    """`cell.started`: the sandbox as the kernel enforced it and the plan, by digest."""
    base = changed("cell.started", cell, None, {"host_uid": str(host_uid)}, index, time)
    return replace(base, effect="cell", code=code, started_at=time)


def ended(
    kind: RecordType, cell: Allocation, order: Order | None, reason: str, usage: Usage | None, error: ErrorBody | None,
    charge: BudgetRef | None, index: int, time: str,
) -> Record:  # fmt: skip
    """`cell.freed` (before it is done) or `cell.lost` (found); `charge` is what it cost while it was there."""
    base = changed(kind, cell, order, {"reason": reason}, index, time)
    return replace(base, usage=usage, error=masked(error), finished_at=time, budget=charge)


def told(of: Record, kind: RecordType, order: Order, detail: Mapping[str, str], index: int, time: str) -> Record:
    """`job.signal`, `job.attach`: who talked to an executable."""
    return Record(
        type=kind,
        log_index=index,
        time=time,
        node_id=of.node_id,
        tenant_id=of.tenant_id,
        principal=order.admission.principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        effect="control",
        job_id=of.job_id,
        attempt=of.attempt,
        kind=of.kind,
        op=of.op,
        cell_id=of.cell_id,
        labels=of.labels,
        ticket=order.admission.ticket,
        policy=order.admission.policy,
        budget=order.budget,
        detail=dict(detail),
    )


def view(cell: Allocation, request: CellRequest, guests: Iterable[OpenJob]) -> CellView:
    """The cell as interfaces show it."""
    first, code = cell.allocated, cell.started.code if cell.started else None
    return CellView(
        cell_id=cell.cell_id,
        name=cell.name,
        parent=parent_of(cell.name),
        state=cell.state,
        tenant_id=cell.tenant_id,
        node_id=first.node_id,
        principal=first.principal or "",
        labels=cell.labels,
        limits=request.limits,
        require=request.require,
        isolate_network=request.isolate_network,
        isolate_process=request.isolate_process,
        idle_timeout_ms=request.idle_timeout_ms,
        level=code.rung if code else None,
        executables=tuple(map(executable, guests)),
        created_at=first.time,
        started_at=cell.started.time if cell.started else None,
        ended_at=cell.ended.time if cell.ended else None,
        reason=cell.reason,
        spec_digest=cell.spec,
        plan_digest=code.plan_digest if code else None,
        sandbox_digest=code.sandbox_digest if code else None,
        allocated_index=first.log_index,
        network=request.network,
    )


def executable(job: OpenJob) -> CellExecutable:
    """A guest of a cell, by its open job."""
    return CellExecutable(
        job_id=job.grant.job_id,
        exec_id=job.exec_id,
        name=job.intent.detail.get("executable"),
        argv=job.argv,
        state=JobState.QUEUED if job.started is None else JobState.RUNNING,
        started_at=job.started.time if job.started else None,
    )


def event(record: Record) -> CellEvent:
    """A record about a cell, as `cell.events` shows it."""
    detail = {name: text for name, text in record.detail.items() if name not in ("spec", "host_uid", "memory_bytes")}
    if record.exit is not None:
        shown = {"exit_code": record.exit.code, "signal": record.exit.signal, "reason": record.exit.reason}
        detail |= {name: str(value) for name, value in shown.items() if value is not None}
        if record.exit.oom_killed:
            detail["oom_killed"] = "true"
    return CellEvent(
        time=record.time,
        type=record.type,
        log_index=record.log_index,
        principal=record.principal,
        job_id=record.job_id,
        state=record.state,
        detail=detail,
    )
