"""Metering: from what a job may use to a reservation, from what it used to a settlement. Pure.

CPU is integer milliseconds, rounded up. What the kernel counted for one cell is `measured`; a share of a runtime
that served several jobs at once is `apportioned` by the caller, and each figure of the usage says which.
"""

from __future__ import annotations

from typing import Final

import msgspec

from aether.contract.cells import ExecEnd, Limits, Usage
from aether.contract.records import BudgetRef
from aether.substrate.access.tickets import Limit

MEASURED: Final = "measured"
APPORTIONED: Final = "apportioned"
JOB_OPS: Final = 1
"""A submission is one operation that is not a read."""


def reservation(
    reservation_id: str, accounts: tuple[str, ...], budgets: tuple[Limit, ...], cell: Limits | None
) -> BudgetRef:
    """What a job holds while it is open. CPU only where a link's budget limits it: all that the cell could use."""
    limited = any(limit.unit == "cpu_ms" for limit in budgets)
    held = cpu_ms_max(cell) if limited and cell is not None else 0
    return BudgetRef(reservation_id=reservation_id, accounts=accounts, ops=JOB_OPS, cpu_ms=held, settled=False)


def cpu_ms_max(cell: Limits) -> int:
    """The most CPU a cell can use within its wall time and its share of the CPUs."""
    wall_ms = cell.timeout_ms + cell.grace_ms
    return -(-wall_ms * cell.cpu_millis // 1000)


def cpu_ms(usage: Usage | None) -> int:
    """CPU time in whole milliseconds; 0 where nothing was measured."""
    if usage is None:
        return 0
    return -(-((usage.cpu_user_us or 0) + (usage.cpu_system_us or 0)) // 1000)


def settlement(reserved: BudgetRef, usage: Usage | None) -> BudgetRef:
    """The movement that ends a reservation: the operation is spent, CPU as used."""
    return msgspec.structs.replace(reserved, cpu_ms=cpu_ms(usage), settled=True)


def with_basis(usage: Usage, basis: str) -> Usage:
    """`usage` with `basis` for every figure it has and says nothing of yet."""
    figures = {name: basis for name in usage.__struct_fields__ if name != "basis" and getattr(usage, name) is not None}
    return msgspec.structs.replace(usage, basis=figures | usage.basis)


def usage_of(end: ExecEnd) -> Usage:
    """The usage of an executable that had its cell to itself."""
    return with_basis(end.usage, MEASURED)


def apportion(total: Usage, batch_size: int) -> Usage:
    """One job's share of a batch: equal parts of CPU time, the batch's wall time, every figure marked."""
    share = {
        name: -(-value // batch_size)
        for name in ("cpu_user_us", "cpu_system_us")
        if (value := getattr(total, name)) is not None
    }
    return with_basis(msgspec.structs.replace(total, batch_size=batch_size, **share), APPORTIONED)
