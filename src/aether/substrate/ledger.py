"""The authority's memory of jobs: a fold of the audit log, never a second source of truth.

`apply` is fed every record exactly once, in log order, both live and at start; the two ways give the same
state (a test holds them together). Held: jobs with an intent and no outcome, allocated cells, minted tickets,
approvals, idempotency keys within their window. Everything older is found in the log through the indexes that the
job store keeps.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from aether.contract import ids
from aether.contract.approvals import ApprovalState
from aether.contract.cells import ExecEnd
from aether.contract.clock import epoch_ns
from aether.contract.limits import IDEMPOTENCY_KEYS_MAX, IDEMPOTENCY_WINDOW_S
from aether.contract.records import Record
from aether.contract.wire import Grant
from aether.substrate.allocations import Allocations
from aether.substrate.approvalbook import TYPES as APPROVAL_TYPES
from aether.substrate.approvalbook import Approval, ApprovalBook
from aether.substrate.keymark import request_hash
from aether.substrate.policybook import PolicyBook
from aether.substrate.ticketbook import MINTING, TicketBook

EGRESS_TYPES: Final = frozenset({"egress.opened", "egress.connection", "egress.closed"})
_WINDOW_NS: Final = IDEMPOTENCY_WINDOW_S * 1_000_000_000


@dataclass(slots=True)
class OpenJob:
    """An admitted job without an outcome. `end` is set once its executable ended; `egress_index` is the last record
    about its cell's network, `exhausted` says which budget ran out while it ran, `approval` what it waits or waited
    for. What the log does not hold is
    known only to the process that admitted it: `argv`, the spawner that was asked to launch it, and whether its row
    is durable."""

    intent: Record
    started: Record | None = None
    stop: Record | None = None
    exhausted: Record | None = None
    argv: tuple[str, ...] | None = None
    launched_on: str | None = None
    row_kept: asyncio.Event | None = None
    end: ExecEnd | None = None
    egress_index: int | None = None
    approval: Approval | None = None

    @property
    def held(self) -> bool:
        """Whether it waits for an approval: nothing of it may be done."""
        granted = self.approval is not None and self.approval.state is ApprovalState.GRANTED
        return "approval" in self.intent.detail and not granted

    @property
    def grant(self) -> Grant:
        return grant_of(self.intent)

    @property
    def cell_id(self) -> str | None:
        return self.started.cell_id if self.started else None

    @property
    def exec_id(self) -> str | None:
        return self.started.detail.get("exec_id") if self.started else None

    @property
    def is_guest(self) -> bool:
        """Whether it is an executable of an allocated cell, which outlives it."""
        return self.intent.cell_id is not None

    @property
    def place(self) -> str:
        """Its cell: the allocated one, or one of its own; derived, so that a launch repeated after a crash finds it."""
        assert self.intent.job_id is not None
        return self.intent.cell_id or ids.sibling(ids.CELL, self.intent.job_id)

    @property
    def executable(self) -> str:
        """Its executable, whichever cell that is in; derived too."""
        assert self.intent.job_id is not None
        return ids.sibling(ids.EXECUTABLE, self.intent.job_id)


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What an idempotency key stands for until `expires_ns`: the job, cell or ticket that the first call was about, if
    it was, and the record that it left."""

    job_id: str
    input_hash: str
    expires_ns: int
    log_index: int = 0


def grant_of(intent: Record) -> Grant:
    """The grant of an admitted job; derived, so that it is the same after a restart."""
    assert intent.job_id is not None and intent.attempt is not None and intent.budget is not None
    return Grant(
        grant_id=ids.sibling(ids.GRANT, intent.job_id),
        job_id=intent.job_id,
        attempt=intent.attempt,
        reservation_id=intent.budget.reservation_id,
    )


def _link_of(minted: Record) -> str | None:
    return minted.ticket.link_ids[0] if minted.type in MINTING and minted.ticket is not None else None


def _subject_of(order: Record) -> str | None:
    """The account or the subject that an order of the operator's is about."""
    return order.detail.get("account") or order.detail.get("subject")


class Ledger:
    """Open jobs and idempotency keys; see the module head."""

    def __init__(self) -> None:
        self.open: dict[str, OpenJob] = {}
        self.cells = Allocations()
        self.tickets = TicketBook()
        self.policies = PolicyBook()
        self.approvals = ApprovalBook()
        self.applied = 0
        self._keys: OrderedDict[str, KeyEntry] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Ledger applied={self.applied} open={len(self.open)} keys={len(self._keys)}>"

    def apply(self, record: Record) -> None:
        """Folds one record in; records come in log order, each once."""
        if record.log_index != self.applied:
            raise ValueError(f"record {record.log_index} applied out of order, expected {self.applied}")
        self.applied += 1
        self.cells.apply(record)
        self.tickets.apply(record)
        self.policies.apply(record)
        self.approvals.apply(record)
        job_id = record.job_id
        self._remember(record, job_id or record.cell_id or _link_of(record) or _subject_of(record) or "")
        if job_id is None:
            return
        if record.type == "job.intent":
            self.open[job_id] = OpenJob(record)
            if record.cell_id is not None:
                self.cells.entered(record.cell_id, job_id, record.labels)
        elif record.type == "job.outcome":
            ended = self.open.pop(job_id, None)
            if ended is not None and ended.is_guest:
                cpu_ms = record.budget.cpu_ms if record.budget is not None else 0
                self.cells.left(ended.place, job_id, record.time, cpu_ms)
        elif (job := self.open.get(job_id)) is not None:
            if record.type == "job.started":
                job.started = record
            elif record.type == "job.stop":
                job.stop = record
            elif record.type == "budget.exhausted":
                job.exhausted = record
            elif record.type in EGRESS_TYPES:
                job.egress_index = record.log_index
            elif record.type in APPROVAL_TYPES and job.approval is None:
                job.approval = self.approvals.of_job(job_id)

    def remembered(self, key_hash: str, now_ns: int) -> KeyEntry | None:
        """The job that `key_hash` already stands for, if its window is still open."""
        self._forget(now_ns)
        return self._keys.get(key_hash)

    def has_room_for_keys(self, now_ns: int) -> bool:
        self._forget(now_ns)
        return len(self._keys) < IDEMPOTENCY_KEYS_MAX

    def keys(self) -> list[tuple[str, KeyEntry]]:
        """The remembered keys, oldest first; for a snapshot."""
        return list(self._keys.items())

    def restore(self, applied: int, jobs: list[OpenJob], keys: list[tuple[str, KeyEntry]]) -> None:
        """Takes over a snapshot; only on a fresh ledger."""
        self.applied = applied
        self.open = {job.intent.job_id: job for job in jobs if job.intent.job_id is not None}
        for job_id, job in self.open.items():
            job.approval = self.approvals.of_job(job_id)
            if job.is_guest:
                self.cells.entered(job.place, job_id, job.intent.labels)
        self._keys = OrderedDict(keys)

    def _remember(self, record: Record, subject: str) -> None:
        if record.idempotency_hash is not None and (asked := request_hash(record)) is not None:
            expires_ns = epoch_ns(record.time) + _WINDOW_NS
            self._keys[record.idempotency_hash] = KeyEntry(subject, asked, expires_ns, record.log_index)

    def _forget(self, now_ns: int) -> None:
        while self._keys:
            key, entry = next(iter(self._keys.items()))
            if entry.expires_ns > now_ns:
                return
            del self._keys[key]
