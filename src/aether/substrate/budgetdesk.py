"""Operations on budgets and quotas: `budget.show`, `budget.set`, `budget.top-up`, `usage`, `quota.show`, `quota.set`.

Who may
- see: whoever shows a ticket, its own links; else the tenant's accounts, and every tenant's with `audit.inspect`;
- change: whom the policy permits `budget.set`, `budget.top-up` or `quota.set` (by default the operator alone), for any
  tenant. Not whoever shows a ticket: it would widen what narrows it.

A top-up adds to one account; what its ancestors and its tenant may spend binds as before.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from aether.contract import budgetcalls as wire
from aether.contract.calls import Caller
from aether.contract.errors import AetherError
from aether.contract.records import Record, RecordType
from aether.contract.ticketcalls import LINK_PATTERN
from aether.substrate.access.access import Admission, Resource
from aether.substrate.access.budget import TENANT, tenant_account
from aether.substrate.book import Book
from aether.substrate.budgetviews import budgets_of
from aether.substrate.cellentries import Order, ordered
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate
from aether.substrate.metering.settle import limits_of
from aether.substrate.quotas import principal_subject, tenant_subject

_KIND: Final = "budget"


class BudgetDesk:
    """The handlers."""

    def __init__(self, gate: Gate, book: Book, house: CellHouse) -> None:
        self._gate = gate
        self._book = book
        self._house = house

    def handlers(self) -> Mapping[str, Callable[[Caller, Any], Awaitable[Any]]]:
        return {
            "budget.show": self.show,
            "budget.set": self.set,
            "budget.top-up": self.top_up,
            "usage": self.usage,
            "quota.show": self.show_quota,
            "quota.set": self.set_quota,
        }

    # ---- budgets

    async def show(self, caller: Caller, call: wire.ShowBudgetCall) -> wire.AccountList:
        """`budget.show`; raises NOT_FOUND for an account that is not there or not the caller's to see."""
        admission = self._gate.admit(caller, "budget.show", Resource(kind=_KIND, id=call.account))
        own = self._own(admission)
        if call.account is None:
            return wire.AccountList(accounts=tuple(self._view(name, stated) for name, stated in own.items()))
        if call.account in own:
            return wire.AccountList(accounts=(self._view(call.account, own[call.account]),))
        tenant_id = self._tenant_of(call.account)
        seen = tenant_id == admission.principal.tenant_id or self._inspects(caller)
        if tenant_id is None or not seen or not admission.ticket.implicit:
            raise _unknown(call.account)
        return wire.AccountList(accounts=(self._view(call.account, self._stated(call.account)),))

    async def set(self, caller: Caller, call: wire.SetBudgetCall) -> wire.AccountView:
        """`budget.set`: one record for each unit, durable when it answers."""
        request, account = call.request, tenant_account(call.request.tenant_id)
        wire.check_set(request)
        details = [
            {"account": account, "unit": unit, "amount": "none" if amount is None else str(amount)}
            for unit, amount in sorted(request.limits.items())
        ]
        await self._ordered(caller, "budget.set", account, details)
        return self._view(account, self._stated(account))

    async def top_up(self, caller: Caller, call: wire.TopUpCall) -> wire.AccountView:
        """`budget.top-up`; raises NOT_FOUND, and BAD_FIELD for a unit that the account does not limit."""
        request = call.request
        wire.check_top_up(request)
        self._gate.admit(caller, "budget.top-up", Resource(kind=_KIND, id=request.account))  # before anything is told
        root, stated = self._root_of(request.account), self._stated(request.account)
        if root is not None and (missing := sorted(request.amounts.keys() - stated.keys())):
            raise AetherError("BAD_FIELD", f"cannot top up: {request.account} has no budget in {', '.join(missing)}")
        details = [
            {"account": request.account, "unit": unit, "amount": str(amount), "root_id": root or ""}
            for unit, amount in sorted(request.amounts.items())
        ]
        await self._ordered(caller, "budget.raised", request.account, details, found=root is not None)
        return self._view(request.account, stated)

    async def usage(self, caller: Caller, call: wire.UsageCall) -> wire.UsageReport:
        admission = self._gate.admit(caller, "usage", Resource(kind=_KIND))
        tenant_id = None if self._inspects(caller) else admission.principal.tenant_id
        return wire.UsageReport(by=call.by, rows=self._book.usage.report(call.by, tenant_id, call.since, call.until))

    # ---- quotas

    async def show_quota(self, caller: Caller, call: wire.ShowQuotaCall) -> wire.QuotaList:
        admission = self._gate.admit(caller, "quota.show", Resource(kind=_KIND, id=call.subject))
        principal = admission.principal
        own = (tenant_subject(principal.tenant_id), principal_subject(principal.name))
        if call.subject is None or call.subject in own:
            return wire.QuotaList(quotas=self._book.quotas.views(own if call.subject is None else (call.subject,)))
        if not self._inspects(caller):
            raise _unknown(call.subject)
        return wire.QuotaList(quotas=self._book.quotas.views((call.subject,)))

    async def set_quota(self, caller: Caller, call: wire.SetQuotaCall) -> wire.QuotaList:
        """`quota.set`: one record for each quota, durable when it answers."""
        request = call.request
        wire.check_quota(request)
        details = [
            {"subject": request.subject, "quota": quota, "amount": "default" if amount is None else str(amount)}
            for quota, amount in sorted(request.quotas.items())
        ]
        await self._ordered(caller, "quota.set", request.subject, details)
        return wire.QuotaList(quotas=self._book.quotas.views((request.subject,)))

    # ---- inside

    async def _ordered(
        self,
        caller: Caller,
        kind: RecordType,
        subject: str,
        details: list[dict[str, str]],
        found: bool = True,
    ) -> None:
        """Admits the order and writes its records, the first of which pays for it."""
        operation = "budget.top-up" if kind == "budget.raised" else kind
        admission = self._gate.admit(caller, operation, Resource(kind=_KIND, id=subject))
        if not admission.ticket.implicit:
            raise AetherError("TICKET_DENIED", f"cannot {operation} with a ticket: what narrows it would be shed")
        if not found:
            raise _unknown(subject)
        order = self._house.order(caller, admission, operation)
        for number, detail in enumerate(details):
            paid = order if number == 0 else Order(caller, admission, operation)
            record = self._write(paid, kind, detail)
        await self._book.durable(record)

    def _write(self, order: Order, kind: RecordType, detail: dict[str, str]) -> Record:
        node = self._gate.node
        return self._house.write(order, lambda index, now: ordered(kind, node, order, index, now, detail=detail))

    def _own(self, admission: Admission) -> dict[str, dict[str, int]]:
        """The accounts that whoever asks is charged on, and what is stated of each."""
        tenant_id = admission.principal.tenant_id
        return limits_of(admission.limits, tenant_id, self._book.accounts.tenant_limits(tenant_id))

    def _view(self, account: str, stated: Mapping[str, int]) -> wire.AccountView:
        return wire.AccountView(account=account, budget=budgets_of(self._book.accounts, account, stated))

    def _stated(self, account: str) -> dict[str, int]:
        """What an account may spend as its ticket, or the latest `budget.set`, says."""
        accounts = self._book.accounts
        if account.startswith(TENANT):
            return dict(accounts.tenant_limits(account.removeprefix(TENANT)))
        ticket = self._book.ledger.tickets.find(account)
        if ticket is None:
            return dict(accounts.account(account).stated)
        return dict(limits_of(ticket.limits(), "", {}).get(account, {}))

    def _root_of(self, account: str) -> str | None:
        """The first link of the ticket that the link derives from; the account itself of a tenant."""
        if account.startswith(TENANT) or self._book.ledger.tickets.find(account) is not None:
            return account
        return self._book.accounts.account(account).root or None

    def _tenant_of(self, account: str) -> str | None:
        if account.startswith(TENANT):
            return account.removeprefix(TENANT)
        ticket = self._book.ledger.tickets.find(self._root_of(account) or "")
        return ticket.minted.tenant_id if ticket is not None else None

    def _inspects(self, caller: Caller) -> bool:
        try:
            self._gate.admit(caller, "audit.inspect", Resource(kind="audit"))
        except AetherError:
            return False
        return True


def _unknown(name: str) -> AetherError:
    what = "link" if re.fullmatch(LINK_PATTERN, name) else "account"
    return AetherError("NOT_FOUND", f"cannot find the {what} {name[:80]}", "list the tickets with `aether ticket list`")
