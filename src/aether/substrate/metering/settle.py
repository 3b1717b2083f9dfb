"""Metering: from what a job may use to a reservation, from what it used to a settlement. Pure.

CPU is integer milliseconds, rounded up. What the kernel counted for one cell is `measured`; a share of a runtime
that served several jobs at once is `apportioned` by the caller, and each figure of the usage says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from aether.contract import ids
from aether.contract.cells import ExecEnd, Limits, Usage
from aether.contract.records import BudgetRef
from aether.substrate.access.budget import tenant_account
from aether.substrate.access.tickets import Limit
from aether.substrate.allocations import Allocation

MEASURED: Final = "measured"
APPORTIONED: Final = "apportioned"
JOB_OPS: Final = 1
"""A submission is one operation that is not a read."""


def limits_of(links: Iterable[Limit], tenant_id: str, tenant: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What each account may spend, by account and unit: those of a ticket's links, and the tenant's own."""
    found: dict[str, dict[str, int]] = {}
    for limit in links:
        units = found.setdefault(limit.link_id, {})
        units[limit.unit] = min(limit.amount, units.get(limit.unit, limit.amount))
    if tenant:
        found[tenant_account(tenant_id)] = dict(tenant)
    return found


def reservation(
    reservation_id: str,
    accounts: tuple[str, ...],
    limits: Mapping[str, Mapping[str, int]],
    expires_ms: int | None,
    cell: Limits | None = None,
) -> BudgetRef:
    """What a job holds while it is open: the operation, and what its cell (if it has one) is granted. Metered units are
    not held."""
    return BudgetRef(
        reservation_id=reservation_id,
        accounts=accounts,
        ops=JOB_OPS,
        cpu_ms=0,
        settled=False,
        limits={account: dict(units) for account, units in limits.items()},
        grants={} if cell is None else grants(cell),
        expires_ms=expires_ms,
    )


def grants(cell: Limits, memory: bool = True) -> dict[str, int]:
    """What a cell may use at most: thousandths of a CPU, and the memory that is kept for it."""
    return {"cpu_millis": cell.cpu_millis} | ({"memory_bytes": cell.memory_bytes} if memory else {})


def memory_byte_s(memory_bytes: int, wall_us: int) -> int:
    """The memory granted over that time; rounded up."""
    return -(-memory_bytes * wall_us // 1_000_000)


def cpu_ms(usage: Usage | None) -> int:
    """CPU time in whole milliseconds; 0 where nothing was measured."""
    if usage is None:
        return 0
    return -(-((usage.cpu_user_us or 0) + (usage.cpu_system_us or 0)) // 1000)


def settlement(reserved: BudgetRef, usage: Usage | None) -> BudgetRef:
    """The movement that ends a reservation: the operation is spent, and what was used while it ran."""
    wall_us = (usage.wall_us if usage is not None else None) or 0
    amounts = {
        "wall_ms": -(-wall_us // 1000),
        "memory_byte_s": memory_byte_s(reserved.grants.get("memory_bytes", 0), wall_us),
    }
    return BudgetRef(
        reservation_id=reserved.reservation_id,
        accounts=reserved.accounts,
        ops=reserved.ops,
        cpu_ms=cpu_ms(usage),
        settled=True,
        amounts={unit: amount for unit, amount in amounts.items() if amount},
    )


def cell_charge(cell: Allocation, usage: Usage | None, now_ns: int) -> BudgetRef | None:
    """What an allocated cell cost until now: its memory, and of its CPU time what nobody paid who ran in it."""
    allocated = cell.allocated.budget
    if allocated is None:
        return None
    amounts = {"memory_byte_s": -(-cell.memory.until(now_ns) // 1_000_000)}
    return BudgetRef(
        reservation_id=ids.sibling(ids.RESERVATION, cell.cell_id),
        accounts=allocated.accounts,
        ops=0,
        cpu_ms=max(0, cpu_ms(usage) - cell.paid_cpu_ms),
        settled=True,
        amounts={unit: amount for unit, amount in amounts.items() if amount},
        limits=allocated.limits,
    )


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
