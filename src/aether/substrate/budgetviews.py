"""Accounts as interfaces show them. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from aether.contract.ticketcalls import Budget
from aether.substrate.access.budget import Accounts


def budgets_of(accounts: Accounts, account_id: str, stated: Mapping[str, int]) -> tuple[Budget, ...]:
    """What the account may spend of each unit that is limited, with what was added, and what it spent and holds."""
    account = accounts.account(account_id)
    found = []
    for unit in sorted(stated):
        limit = accounts.limit(account_id, unit, stated[unit])
        if limit is not None:
            spent, reserved = account.spent.get(unit, 0), account.reserved.get(unit, 0)
            found.append(Budget(unit=unit, limit=limit, spent=spent, reserved=reserved))
    return tuple(found)
