"""The authority's memory of approvals: a fold of the audit log, part of the ledger.

`apply` is fed every record once, in log order, live and at start. Live are approvals that wait, and granted ones whose
job is open or whose cell was not allocated yet; the latest others are remembered, so that whoever asks again hears
what became of them. An approval is closed by the record that used it or took it over: an outcome, an allocation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from aether.contract import ids
from aether.contract.approvals import ApprovalState
from aether.contract.clock import epoch_ns
from aether.contract.records import PolicyRef, Record

CLOSED_KEPT: Final = 512
DECISIONS: Final = frozenset({"approval.granted", "approval.denied", "approval.expired"})
TYPES: Final = DECISIONS | {"approval.requested"}


@dataclass(frozen=True, slots=True)
class Ask:
    """What an approval is asked with: its id, the policy's refusal to do without one, when it expires (RFC 3339) and
    what the request wants to reach."""

    approval_id: str
    demand: PolicyRef
    expires_at: str
    hosts: tuple[str, ...] = ()

    @property
    def detail(self) -> dict[str, str]:
        return {"approval": self.approval_id, "expires_at": self.expires_at, "hosts": ", ".join(self.hosts)}


@dataclass(slots=True)
class Approval:
    """One approval: the record that asked for it, the latest decision, and the record that closed it."""

    requested: Record
    decided: Record | None = None
    closed: Record | None = None

    @property
    def approval_id(self) -> str:
        return self.requested.detail["approval"]

    @property
    def expires_ns(self) -> int:
        """When it expires (epoch)."""
        return epoch_ns(self.requested.detail["expires_at"])

    @property
    def state(self) -> ApprovalState:
        if self.decided is None:
            return ApprovalState.WAITING if self.closed is None else ApprovalState.WITHDRAWN
        if self.decided.type == "approval.granted":
            return ApprovalState.GRANTED if self.closed is None else ApprovalState.USED
        return ApprovalState.DENIED if self.decided.type == "approval.denied" else ApprovalState.EXPIRED

    @property
    def is_over(self) -> bool:
        """Whether nothing can become of it any more."""
        return self.state not in (ApprovalState.WAITING, ApprovalState.GRANTED)


Kept = tuple[Record, Record | None, Record | None]


class ApprovalBook:
    """See the module head."""

    def __init__(self) -> None:
        self.live: dict[str, Approval] = {}
        self._closed: OrderedDict[str, Approval] = OrderedDict()

    def __repr__(self) -> str:
        return f"<ApprovalBook live={len(self.live)}>"

    def apply(self, record: Record) -> None:
        """Folds one record; those about nothing that waits change nothing."""
        if record.type == "approval.requested":
            self.live[record.detail["approval"]] = Approval(record)
            return
        if record.type in DECISIONS:
            approval = self.live.get(record.detail["approval"])
            if approval is not None:
                approval.decided = record
        elif record.type == "job.outcome" and self.live:
            approval = self.of_job(record.job_id or "")
            if approval is not None:
                approval.closed = record
        elif record.type == "cell.allocated" and self.live:
            approval = self.live.get(record.detail.get("approval", ""))
            if approval is not None:
                approval.closed = record
        else:
            return
        if approval is not None and approval.is_over:
            self._close(approval)

    def of_job(self, job_id: str) -> Approval | None:
        """The live approval of a job."""
        return self.live.get(ids.sibling(ids.APPROVAL, job_id))

    def find(self, approval_id: str) -> Approval | None:
        """A live one, or one of the latest that are over."""
        return self.live.get(approval_id) or self._closed.get(approval_id)

    def waiting_of(self, tenant_id: str) -> int:
        """How many requests of a tenant wait."""
        return sum(a.requested.tenant_id == tenant_id and a.state is ApprovalState.WAITING for a in self.live.values())

    def for_cell(self, asked: Record) -> Iterator[Approval]:
        """Those for exactly this request for a cell: the same input, principal, tenant and ticket; the newest first."""
        for approval in (*reversed(self.live.values()), *reversed(self._closed.values())):
            if _identity(approval.requested) == _identity(asked):
                yield approval

    def all(self) -> list[Approval]:
        """Newest first."""
        return sorted((*self.live.values(), *self._closed.values()), key=lambda a: -a.requested.log_index)

    def snapshot(self) -> list[Kept]:
        """Oldest first; `restore` takes it."""
        return [(each.requested, each.decided, each.closed) for each in self.all()[::-1]]

    def restore(self, kept: list[Kept]) -> None:
        """Takes over a snapshot; only when fresh."""
        for requested, decided, closed in kept:
            approval = Approval(requested, decided, closed)
            into = self._closed if approval.is_over else self.live
            into[approval.approval_id] = approval

    def _close(self, approval: Approval) -> None:
        del self.live[approval.approval_id]
        self._closed[approval.approval_id] = approval
        if len(self._closed) > CLOSED_KEPT:
            self._closed.popitem(last=False)


def _identity(asked: Record) -> tuple[object, ...]:
    links = asked.ticket.link_ids if asked.ticket is not None else ()
    return asked.operation, asked.input_hash, asked.tenant_id, asked.principal, links
