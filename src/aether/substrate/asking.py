"""Asking for approvals, and what becomes of those that nobody gives in time.

A job is admitted and kept, its budget reserved, and waits; a cell is not made: whoever asked repeats the same request
once it is granted. An approval expires after the time that was asked for, at the latest with the ticket of its
request; a job is cancelled then. What waits in the log while aetherd is away expires when it is back.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from aether.contract import ids, limits
from aether.contract.allocations import CellRequest
from aether.contract.approvals import ApprovalState
from aether.contract.calls import Caller
from aether.contract.canonical import canonical, digest_bytes
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.contract.wire import JobFinish
from aether.substrate import approvalentries as entries
from aether.substrate.access.access import Admission
from aether.substrate.approvalbook import Approval, Ask
from aether.substrate.audit.redact import redact
from aether.substrate.book import Book
from aether.substrate.execution import Execution
from aether.substrate.gate import Gate
from aether.substrate.ledger import OpenJob
from aether.substrate.orchestra import Orchestra

_HOSTS_CHARS_MAX: Final = 1_500
_SLEEP_S_MAX: Final = 3_600.0
"""A timer counts monotonic time, an expiry is wall time: it is looked at again at least so often."""


class Asking:
    """See the module head. `watch` arms the one timer of what expires next, until `close`."""

    def __init__(self, gate: Gate, book: Book, execution: Execution, orchestra: Orchestra) -> None:
        self._gate = gate
        self._book = book
        self._execution = execution
        self._orchestra = orchestra
        self._timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Asking {self._book.ledger.approvals!r} timed={self._timer is not None}>"

    # ---- asking

    def ask(self, admission: Admission, approval_ms: int, hosts: tuple[str, ...], job_id: str | None) -> Ask | None:
        """What to ask with, if the policy demands an approval. Raises APPROVAL_LIMIT, BAD_FIELD."""
        if admission.demand is None:
            return None
        if not limits.APPROVAL_MS_MIN <= approval_ms <= limits.APPROVAL_MS_MAX:
            bounds = f"{limits.APPROVAL_MS_MIN}..{limits.APPROVAL_MS_MAX}"
            raise AetherError("BAD_FIELD", f"cannot wait {approval_ms} ms for an approval: not within {bounds}")
        if self._book.ledger.approvals.waiting_of(admission.principal.tenant_id) >= limits.APPROVALS_WAITING_MAX:
            raise AetherError("APPROVAL_LIMIT", f"cannot ask: {limits.APPROVALS_WAITING_MAX} requests wait already")
        expires_ms = self._book.now_ns() // 1_000_000 + approval_ms
        if admission.expires_ms is not None:
            expires_ms = min(expires_ms, admission.expires_ms)
        return Ask(
            approval_id=ids.sibling(ids.APPROVAL, job_id) if job_id is not None else ids.new(ids.APPROVAL),
            demand=admission.demand,
            expires_at=rfc3339(expires_ms * 1_000_000),
            hosts=_few(hosts),
        )

    def for_job(self, intent: Record, ask: Ask) -> Record:
        """Records what an admitted job waits for; not yet durable. Raises DISK_FULL."""
        record = self._book.write(lambda index, now: entries.for_job(intent, ask, index, now))
        self.watch()
        return record

    async def for_cell(
        self, caller: Caller, admission: Admission, request: CellRequest, spec: str, ask: Ask
    ) -> Approval:
        """The unused approval of exactly this request. Raises APPROVAL_NEEDED, once it was asked for durably, and
        APPROVAL_DENIED as long as the one that was denied would have waited."""
        named = {"name": request.name, "spec": spec}
        body: Any = msgspec.to_builtins(request)
        asked = entries.for_cell(
            self._gate.node, caller, admission, ask, digest_bytes(canonical(body)), request.labels, named, 0, ""
        )
        for known in self._book.ledger.approvals.for_cell(asked):
            if known.expires_ns <= self._book.now_ns():
                continue
            if known.state is ApprovalState.GRANTED:
                return known
            if known.state is ApprovalState.DENIED:
                raise _refused("APPROVAL_DENIED", "its approval was denied", known)
            if known.state is ApprovalState.WAITING:
                raise _refused("APPROVAL_NEEDED", "it waits for an approval", known)
        record = self._book.write(lambda index, now: replace(asked, log_index=index, time=now, created_at=now))
        self.watch()
        await self._book.durable(record)
        raise _refused("APPROVAL_NEEDED", "it waits for an approval", self._book.ledger.approvals.live[ask.approval_id])

    # ---- ending

    def end(self, approval: Approval, code: str, why: str) -> Record | None:
        """Cancels the job that an approval was denied to; its outcome, not yet durable."""
        job = self._book.ledger.open.get(approval.requested.job_id or "")
        if job is None or not job.held:
            return None
        error = AetherError(code, f"cannot start the job: {why}").body()
        return self._execution.conclude(job, JobFinish(grant=job.grant, state=JobState.CANCELLED, error=error))

    async def tell(self, approval: Approval, job: OpenJob | None, outcome: Record | None) -> None:
        """Returns when the decision is durable, and the outcome it led to, which is told then."""
        assert approval.decided is not None
        await self._book.durable(outcome or approval.decided)
        if job is not None and outcome is not None:
            self._orchestra.tell_outcome(self._execution.told(job, outcome))

    def watch(self) -> None:
        """Ends what has expired, and comes back when the next does."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ns = self._book.now_ns()
        live = list(self._book.ledger.approvals.live.values())
        for approval in live:
            if approval.expires_ns <= now_ns and self._lapses(approval):
                self._expire(approval)
        left = [a.expires_ns for a in live if not a.is_over and a.expires_ns > now_ns]
        if left:
            sleep_s = min((min(left) - now_ns) / 1e9, _SLEEP_S_MAX)
            self._timer = asyncio.get_running_loop().call_later(sleep_s + 0.001, self.watch)

    def _lapses(self, approval: Approval) -> bool:
        """What waits does; a grant does when no job has it."""
        return approval.state is ApprovalState.WAITING or approval.requested.job_id is None

    def _expire(self, approval: Approval) -> None:
        job = self._book.ledger.open.get(approval.requested.job_id or "")
        self._book.write(lambda index, now: entries.expired(approval, index, now))
        outcome = self.end(approval, "APPROVAL_EXPIRED", "nobody approved it in time")
        task = asyncio.get_running_loop().create_task(self.tell(approval, job, outcome))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """Stops watching."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def drain(self) -> None:
        """Waits for what is being ended."""
        self.close()
        while self._background:
            await asyncio.wait(self._background)


def _few(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """As many as a record holds; the request itself has them all."""
    shown: list[str] = []
    for host in hosts:
        if len(", ".join((*shown, host))) > _HOSTS_CHARS_MAX:
            return (*shown, f"and {len(hosts) - len(shown)} more")
        shown.append(host)
    return tuple(redact(host) for host in shown)


def _refused(code: str, why: str, approval: Approval) -> AetherError:
    by = ", ".join(approval.requested.policy.determining) if approval.requested.policy is not None else ""
    return AetherError(
        code,
        f"cannot allocate cell {approval.requested.detail['name']}: {why}",
        f"`aether approvals approve {approval.approval_id}`, then repeat the same request"
        if code == "APPROVAL_NEEDED"
        else "",
        {
            "approval_id": approval.approval_id,
            "demanded_by": by,
            "expires_at": approval.requested.detail["expires_at"],
        },
    )
