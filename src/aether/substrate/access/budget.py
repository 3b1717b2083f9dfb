"""Accounts: what the links of tickets, and tenants, may still spend. Pure, exact, and a fold of the log.

A movement (`BudgetRef`) names the accounts that it charges with what each may spend, so an ancestor's limit binds
whatever is derived from it, and a reader of the log needs no ticket. `reserve` before the record, `apply` with every
record in log order: an intent confirms its reservation (or makes it, when the log is read at start), an outcome turns
it into spending; a movement that is settled at once spends at once. Where nothing is limited nothing is kept.

The limit of a link is in the ticket and thus in the movement; `budget.raised` adds to it. That of a tenant is what the
latest `budget.set` said, from which on its account counts; `budget.raised` adds to that too.

Invariants: spent and reserved are never negative; for every limit, spent + reserved never exceeds it by a reservation.
Metered units are not reserved and may be settled above a limit, by what ran before it was ended (`substrate.meter`).

Accounts of links go when the ticket that they derive from is forgotten; one ticket has at most TICKET_ACCOUNTS_MAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from aether.contract.errors import AetherError
from aether.contract.limits import TICKET_ACCOUNTS_MAX
from aether.contract.records import BudgetRef, Record
from aether.contract.units import METERED, told

TENANT: Final = "tenant:"
"""Begins the name of a tenant's account."""
_NOTHING: Final[Mapping[str, int]] = {}
_METERED: Final = frozenset(METERED)


def tenant_account(tenant_id: str) -> str:
    return TENANT + tenant_id


@dataclass(slots=True)
class Account:
    """Amounts by unit. `root` is the first link of the ticket that it derives from, or the account itself."""

    root: str = ""
    spent: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    stated: dict[str, int] = field(default_factory=dict)
    """What its ticket says that it may spend."""

    def used(self, unit: str) -> int:
        return self.spent.get(unit, 0) + self.reserved.get(unit, 0)


class Reservation(msgspec.Struct, frozen=True):
    """What is held for one open job, on which accounts."""

    accounts: tuple[str, ...]
    amounts: dict[str, int]


class AccountsState(msgspec.Struct, frozen=True):
    """A snapshot of `Accounts`: per account its root, what was spent and what is stated; what is reserved follows from
    the reservations."""

    accounts: dict[str, tuple[str, dict[str, int], dict[str, int]]]
    reservations: dict[str, Reservation]
    raised: dict[str, dict[str, int]]
    tenants: dict[str, dict[str, int]]


class Accounts:
    """See the module head."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._of_root: dict[str, set[str]] = {}
        self._reservations: dict[str, Reservation] = {}
        self._raised: dict[str, dict[str, int]] = {}
        self._tenants: dict[str, dict[str, int]] = {}

    def __repr__(self) -> str:
        return f"<Accounts accounts={len(self._accounts)} reservations={len(self._reservations)}>"

    # ---- asking

    def account(self, account_id: str) -> Account:
        """The account as it stands; empty for one that never spent."""
        return self._accounts.get(account_id) or Account()

    def tenant_limits(self, tenant_id: str) -> Mapping[str, int]:
        """What `budget.set` said for the tenant, without what was added; empty when nothing is limited."""
        return self._tenants.get(tenant_account(tenant_id), {})

    def tenants(self) -> Iterator[str]:
        """The tenants that have a budget."""
        return (name.removeprefix(TENANT) for name in self._tenants)

    def limit(self, account_id: str, unit: str, stated: int) -> int | None:
        """What an account may spend in all, `stated` by whoever charges it; None when it is not limited any more."""
        if account_id.startswith(TENANT):
            own = self._tenants.get(account_id, {}).get(unit)
            if own is None:
                return None
            stated = own
        raised = self._raised.get(account_id)
        return stated + raised.get(unit, 0) if raised is not None else stated

    # ---- moving

    def reserve(self, budget: BudgetRef, runs: bool = False) -> None:
        """Holds `budget` on all the accounts that it limits; raises AetherError BUDGET_EXHAUSTED, or TICKET_LIMIT for
        one account too many, and then holds nothing. `runs`: metered units are going to be spent, so that some must
        be left. Reserving an id twice changes nothing."""
        if not budget.limits or budget.reservation_id in self._reservations:
            return
        amounts = amounts_of(budget)
        for account_id, limits in budget.limits.items():
            account = self._accounts.get(account_id)
            if account is None:
                self._check_room(_root(account_id, budget))
            for unit, stated in limits.items():
                asked = amounts.get(unit, 0) or int(runs and unit in _METERED)
                used = account.used(unit) if account is not None else 0
                limit = self.limit(account_id, unit, stated)
                if asked and limit is not None and used + asked > limit:
                    raise exhausted(account_id, unit, limit, used)
        self._hold(budget)

    def release(self, budget: BudgetRef) -> None:
        """Gives a reservation back unspent: nothing was recorded under it. Releasing twice changes nothing."""
        held = self._unhold(budget.reservation_id)
        for account_id in held.accounts if held is not None else ():
            account = self._accounts.get(account_id)
            idle = account is not None and not (account.spent or account.reserved)
            if idle and account_id not in self._tenants and account_id not in self._raised:
                self._close(account_id)

    def settle(self, budget: BudgetRef) -> None:
        """Spends what a record says and ends its reservation."""
        held = self._unhold(budget.reservation_id)
        amounts = amounts_of(budget)
        for account_id in held.accounts if held is not None else budget.limits:
            stated = budget.limits.get(account_id, _NOTHING)
            _add(self._opened(account_id, _root(account_id, budget), stated).spent, amounts, 1)

    def apply(self, record: Record) -> None:
        """Folds one record; records come in log order, each once."""
        if record.type in ("budget.set", "budget.raised"):
            self._apply_order(record)
        if record.budget is None:
            return
        if record.budget.settled:
            self.settle(record.budget)
        elif record.type == "job.intent" and record.budget.reservation_id not in self._reservations:
            self._hold(record.budget)

    def forget(self, root: str) -> None:
        """The ticket of that first link is forgotten: no job that it admitted can run any more."""
        for account_id in self._of_root.pop(root, ()):
            del self._accounts[account_id]
            self._raised.pop(account_id, None)

    # ---- snapshots

    def snapshot(self) -> AccountsState:
        """The state as data; `restore` takes it, also after a trip through msgpack."""
        spent = {name: (account.root, account.spent, account.stated) for name, account in self._accounts.items()}
        return AccountsState(spent, dict(self._reservations), self._raised, self._tenants)

    def restore(self, state: object) -> None:
        """Takes over a snapshot; only on fresh accounts."""
        snapshot = msgspec.convert(msgspec.to_builtins(state), AccountsState)
        for name, (root, spent, stated) in snapshot.accounts.items():
            self._opened(name, root, stated).spent.update(spent)
        self._raised, self._tenants = snapshot.raised, snapshot.tenants
        for reservation_id, held in snapshot.reservations.items():
            self._reservations[reservation_id] = held
            self._reserved(held, 1)

    # ---- inside

    def _apply_order(self, record: Record) -> None:
        account_id, unit = record.detail["account"], record.detail["unit"]
        if record.type == "budget.raised":
            _add(self._raised.setdefault(account_id, {}), {unit: int(record.detail["amount"])}, 1)
            self._opened(account_id, record.detail["root_id"], _NOTHING)
            return
        limits = self._tenants.setdefault(account_id, {})
        if record.detail["amount"] == "none":
            limits.pop(unit, None)
        else:
            limits[unit] = int(record.detail["amount"])
        self._opened(account_id, account_id, _NOTHING).spent.pop(unit, None)
        self._raised.get(account_id, {}).pop(unit, None)
        if not limits:
            del self._tenants[account_id]

    def _check_room(self, root: str) -> None:
        if len(self._of_root.get(root, ())) >= TICKET_ACCOUNTS_MAX:
            why = f"{TICKET_ACCOUNTS_MAX} links with a budget were derived from its ticket"
            raise AetherError("TICKET_LIMIT", f"cannot charge the link: {why}", "mint another ticket")

    def _opened(self, account_id: str, root: str, stated: Mapping[str, int]) -> Account:
        account = self._accounts.get(account_id)
        if account is None:
            account = self._accounts[account_id] = Account(root, stated=dict(stated))
            self._of_root.setdefault(root, set()).add(account_id)
        return account

    def _close(self, account_id: str) -> None:
        root = self._accounts.pop(account_id).root
        of_root = self._of_root[root]
        of_root.discard(account_id)
        if not of_root:
            del self._of_root[root]

    def _hold(self, budget: BudgetRef) -> None:
        if not budget.limits:
            return
        held = Reservation(tuple(sorted(budget.limits)), amounts_of(budget))
        self._reservations[budget.reservation_id] = held
        for account_id in held.accounts:
            self._opened(account_id, _root(account_id, budget), budget.limits[account_id])
        self._reserved(held, 1)

    def _unhold(self, reservation_id: str) -> Reservation | None:
        held = self._reservations.pop(reservation_id, None)
        if held is not None:
            self._reserved(held, -1)
        return held

    def _reserved(self, held: Reservation, sign: int) -> None:
        for account_id in held.accounts:
            if (account := self._accounts.get(account_id)) is not None:
                _add(account.reserved, held.amounts, sign)


def amounts_of(budget: BudgetRef) -> dict[str, int]:
    """What a movement moves, by unit; no zeros."""
    amounts = {"ops": budget.ops, "cpu_ms": budget.cpu_ms, **budget.amounts}
    return {unit: amount for unit, amount in amounts.items() if amount}


def exhausted(account_id: str, unit: str, limit: int, used: int) -> AetherError:
    """What is told when an account has not enough left."""
    whose = f"tenant {account_id.removeprefix(TENANT)}" if account_id.startswith(TENANT) else f"link {account_id}"
    return AetherError(
        "BUDGET_EXHAUSTED",
        f"cannot spend more: {told(unit, used)} of {told(unit, limit)} are used or reserved by {whose}",
        details={"account": account_id, "unit": unit, "limit": limit, "used": used},
    )


def _add(amounts: dict[str, int], moved: Mapping[str, int], sign: int) -> None:
    """Adds in place; what becomes zero is dropped, so that equal states are equal."""
    for unit, amount in moved.items():
        if total := amounts.get(unit, 0) + sign * amount:
            amounts[unit] = total
        else:
            amounts.pop(unit, None)


def _root(account_id: str, budget: BudgetRef) -> str:
    return account_id if account_id.startswith(TENANT) else budget.accounts[0]
