"""Accounts: what the links of tickets may still spend. Pure, exact, and a fold of the log.

Each link that carries a budget has an account. A reservation charges every link of the ticket, so an ancestor's
limit binds whatever is derived from it. `reserve` before the intent, `apply` with every record in log order: an
intent confirms its reservation (or makes it, when the log is read at start), an outcome turns it into spending;
the record of an operation that is done at once spends at once.

A link's id fixes its caveats, hence its limits. Links without a budget need no account; while the log is read their
limits are not known, so all are kept until a ticket is shown that says otherwise.

Invariants: spent and reserved are never negative; for every limit, spent + reserved never exceeds it by a reservation
(an outcome may settle above what it reserved: CPU is measured after the fact).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from aether.contract.errors import AetherError
from aether.contract.records import BudgetRef, Record
from aether.substrate.access.tickets import Limit


@dataclass(slots=True)
class Account:
    """Amounts on one link: `ops` and `cpu_ms`, spent and reserved."""

    ops_spent: int = 0
    ops_reserved: int = 0
    cpu_ms_spent: int = 0
    cpu_ms_reserved: int = 0

    def spent(self, unit: str) -> int:
        return self.ops_spent if unit == "ops" else self.cpu_ms_spent

    def used(self, unit: str) -> int:
        return self.ops_spent + self.ops_reserved if unit == "ops" else self.cpu_ms_spent + self.cpu_ms_reserved


class Reservation(msgspec.Struct, frozen=True):
    """What is held for one open job, on which accounts."""

    links: tuple[str, ...]
    ops: int
    cpu_ms: int


class AccountsState(msgspec.Struct, frozen=True):
    """A snapshot of `Accounts`."""

    accounts: dict[str, tuple[int, int]]
    """Spent ops and cpu_ms per link; what is reserved follows from the reservations."""
    reservations: dict[str, Reservation]


class Accounts:
    """See the module head."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._reservations: dict[str, Reservation] = {}

    def __repr__(self) -> str:
        return f"<Accounts links={len(self._accounts)} reservations={len(self._reservations)}>"

    def account(self, link_id: str) -> Account:
        """The account of a link as it stands; zero for one that never spent."""
        return self._accounts.get(link_id) or Account()

    def reserve(self, budget: BudgetRef, limits: Sequence[Limit]) -> None:
        """Holds `budget` on all its links; raises AetherError BUDGET_EXHAUSTED and then holds nothing.

        `limits` are those of the verified ticket. Reserving an id twice changes nothing.
        """
        if budget.reservation_id in self._reservations:
            return
        for limit in limits:
            asked = budget.ops if limit.unit == "ops" else max(budget.cpu_ms, 1)
            used = self.account(limit.link_id).used(limit.unit)
            if used + asked > limit.amount:
                raise AetherError(
                    "BUDGET_EXHAUSTED",
                    f"cannot spend {asked} {limit.unit}: {used} of {limit.amount} are used or reserved",
                    details={"link_id": limit.link_id, "unit": limit.unit, "limit": limit.amount, "used": used},
                )
        limited = {limit.link_id for limit in limits}
        for link in budget.accounts:
            if link not in limited:
                self._accounts.pop(link, None)
        self._hold(budget, tuple(link for link in budget.accounts if link in limited))

    def release(self, budget: BudgetRef) -> None:
        """Gives a reservation back unspent: nothing was recorded under it. Releasing twice changes nothing."""
        self._unhold(budget.reservation_id)

    def settle(self, budget: BudgetRef) -> None:
        """Spends what an outcome says and ends its reservation."""
        held = self._unhold(budget.reservation_id)
        for link in held.links if held is not None else budget.accounts:
            account = self._accounts.get(link)
            if account is None and held is None:
                account = self._accounts[link] = Account()
            if account is not None:
                account.ops_spent += budget.ops
                account.cpu_ms_spent += budget.cpu_ms

    def apply(self, record: Record) -> None:
        """Folds one record; records come in log order, each once."""
        if record.budget is None:
            return
        if record.type == "job.intent" and record.budget.reservation_id not in self._reservations:
            self._hold(record.budget, record.budget.accounts)
        elif record.budget.settled:
            self.settle(record.budget)

    def snapshot(self) -> AccountsState:
        """The state as data; `restore` takes it, also after a trip through msgpack."""
        spent = {link: (a.ops_spent, a.cpu_ms_spent) for link, a in self._accounts.items()}
        return AccountsState(spent, dict(self._reservations))

    def restore(self, state: object) -> None:
        """Takes over a snapshot; only on fresh accounts."""
        snapshot = msgspec.convert(msgspec.to_builtins(state), AccountsState)
        self._accounts = {link: Account(ops, 0, cpu, 0) for link, (ops, cpu) in snapshot.accounts.items()}
        for reservation_id, held in snapshot.reservations.items():
            self._reservations[reservation_id] = held
            self._reserved(held, 1)

    def _hold(self, budget: BudgetRef, links: tuple[str, ...]) -> None:
        held = Reservation(links, budget.ops, budget.cpu_ms)
        self._reservations[budget.reservation_id] = held
        for link in links:
            self._accounts.setdefault(link, Account())
        self._reserved(held, 1)

    def _unhold(self, reservation_id: str) -> Reservation | None:
        held = self._reservations.pop(reservation_id, None)
        if held is not None:
            self._reserved(held, -1)
        return held

    def _reserved(self, held: Reservation, sign: int) -> None:
        for link in held.links:
            account = self._accounts.get(link)
            if account is not None:
                account.ops_reserved += sign * held.ops
                account.cpu_ms_reserved += sign * held.cpu_ms
