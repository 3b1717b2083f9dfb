"""Operations on approvals: who may see what waits, and who decides on it.

A decision is one record, durable before the answer; it binds the input hash that was asked for, is made once, and
cannot be changed. Rules, in this order:
- the caller may decide at all (`approval.approve`, `approval.deny`), and on another tenant's only with
  `approval.oversee`: else the approval is NOT_FOUND;
- it waits (APPROVAL_DECIDED; the same decision by the same principal again is answered, not made again);
- the ticket of the request is not revoked (TICKET_REVOKED): its job is being ended;
- whoever asked does not decide: the same principal, or a ticket with a link in common, needs `approval.own`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from aether.contract import approvals as wire
from aether.contract import ids, limits
from aether.contract.approvals import ApprovalState
from aether.contract.calls import Caller
from aether.contract.canonical import input_hash
from aether.contract.errors import AetherError
from aether.contract.records import RecordType
from aether.contract.wire import Empty, JobKey, KeptRequest
from aether.substrate import approvalentries as entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.approvalbook import Approval
from aether.substrate.asking import Asking
from aether.substrate.audit.redact import redact
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate
from aether.substrate.orchestra import Orchestra

_KIND: Final = "approval"


class ApprovalDesk:
    """The handlers."""

    def __init__(self, gate: Gate, book: Book, orchestra: Orchestra, house: CellHouse, asking: Asking) -> None:
        self._gate = gate
        self._book = book
        self._orchestra = orchestra
        self._house = house
        self._asking = asking

    async def listing(self, caller: Caller, call: wire.ListApprovalsCall) -> wire.ApprovalList:
        admission = self._gate.admit(caller, "approval.list", Resource(kind=_KIND))
        states = frozenset(call.state or (ApprovalState.WAITING,))
        oversees = self._oversees(caller)
        own = admission.principal.tenant_id
        found = [each for each in self._book.ledger.approvals.all() if each.state in states]
        shown = [each for each in found if oversees or each.requested.tenant_id == own]
        return wire.ApprovalList(approvals=tuple(map(entries.view, shown)))

    async def show(self, caller: Caller, call: wire.ApprovalCall) -> wire.ApprovalDetail:
        """`approval.show`: what is to be decided, as it was asked; raises GONE when that is not kept any more."""
        approval = self._find(caller, "approval.show", call.approval_id)[1]
        asked = approval.requested
        if asked.job_id is not None:
            kept = await self._orchestra.link().call("job.request", JobKey(job_id=asked.job_id), KeptRequest)
            request: dict[str, Any] = msgspec.to_builtins(kept.request)
            said = {name: request[name] for name in ("schema_version", "kind", "op", "params", "inputs")}
            if input_hash(**said) != asked.input_hash:
                raise AetherError("INTERNAL", f"cannot show {approval.approval_id}: its job keeps another request")
        else:
            request = msgspec.json.decode(self._book.log.document(asked.detail["spec"]))
        return wire.ApprovalDetail(**msgspec.structs.asdict(entries.view(approval)), request=request)

    async def approve(self, caller: Caller, call: wire.DecideCall) -> wire.ApprovalView:
        return await self._decide(caller, call, "approval.approve", "approval.granted")

    async def deny(self, caller: Caller, call: wire.DecideCall) -> wire.ApprovalView:
        return await self._decide(caller, call, "approval.deny", "approval.denied")

    # ---- inside

    def _oversees(self, caller: Caller) -> bool:
        """Whether the caller may know of every tenant's approvals."""
        try:
            self._gate.admit(caller, "approval.oversee", Resource(kind=_KIND))
        except AetherError:
            return False
        return True

    def _find(self, caller: Caller, operation: str, approval_id: str) -> tuple[Admission, Approval]:
        identity = ids.parse(ids.APPROVAL, approval_id)
        admission = self._gate.admit(caller, operation, Resource(kind=_KIND, id=identity))
        approval = self._book.ledger.approvals.find(identity)
        if approval is not None and approval.requested.tenant_id == admission.principal.tenant_id:
            return admission, approval
        if approval is None or not self._oversees(caller):
            raise AetherError("NOT_FOUND", f"cannot find {identity}", "list what waits with `aether approvals list`")
        return admission, approval

    async def _decide(
        self, caller: Caller, call: wire.DecideCall, operation: str, kind: RecordType
    ) -> wire.ApprovalView:
        reason = _reason(call.reason)
        admission, approval = self._find(caller, operation, call.approval_id)
        job = self._book.ledger.open.get(approval.requested.job_id or "")
        if self._repeats(approval, kind, admission):
            await self._asking.tell(approval, None, None)
            await self._release(approval)
            return entries.view(approval)
        self._check(caller, admission, approval)
        denies = kind == "approval.denied"  # which is free, and possible on a full disk: it takes back
        order = Order(caller, admission, operation) if denies else self._house.order(caller, admission, operation)
        self._house.write(order, lambda index, now: entries.decided(kind, approval, order, reason, index, now))
        outcome = None
        if denies:
            why = f"{admission.principal.name} denied it" + (f": {reason}" if reason else "")
            outcome = self._asking.end(approval, "APPROVAL_DENIED", why)
        await self._asking.tell(approval, job, outcome)
        await self._release(approval)
        return entries.view(approval)

    def _repeats(self, approval: Approval, kind: RecordType, admission: Admission) -> bool:
        made = approval.decided
        return made is not None and (made.type, made.principal) == (kind, admission.principal.name)

    def _check(self, caller: Caller, admission: Admission, approval: Approval) -> None:
        if approval.expires_ns <= self._book.now_ns():
            self._asking.watch()
        if approval.state is not ApprovalState.WAITING:
            details = {"state": approval.state.value}
            why = f"it is {approval.state}"
            raise AetherError("APPROVAL_DECIDED", f"cannot decide on {approval.approval_id}: {why}", details=details)
        asked = approval.requested
        assert asked.ticket is not None
        if self._book.ledger.tickets.revocation(asked.ticket) is not None:
            raise AetherError("TICKET_REVOKED", f"cannot decide on {approval.approval_id}: its ticket was revoked")
        shared = not set(asked.ticket.link_ids).isdisjoint(admission.ticket.link_ids)
        if shared or admission.principal.name == asked.principal:
            try:
                self._gate.admit(caller, "approval.own", Resource(kind=_KIND, id=asked.ticket.role))
            except AetherError as error:
                remedy = "let somebody else decide, or ask the operator to permit action approval.own"
                raise AetherError(error.code, error.message, remedy, error.details) from error

    async def _release(self, approval: Approval) -> None:
        """Lets a granted job go; while aurorad is away, the next reconciliation does."""
        job_id = approval.requested.job_id
        if job_id is not None and approval.state is ApprovalState.GRANTED and self._orchestra.connected:
            await self._orchestra.link().call("job.release", JobKey(job_id=job_id), Empty)


def _reason(text: str | None) -> str | None:
    """The reason as it is kept: without secrets, in bounds; raises BAD_FIELD."""
    if text is not None and len(text) > limits.APPROVAL_REASON_CHARS_MAX:
        why = f"the reason is longer than {limits.APPROVAL_REASON_CHARS_MAX} characters"
        raise AetherError("BAD_FIELD", f"cannot decide: {why}")
    return redact(text) if text else None
