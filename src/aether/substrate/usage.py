"""Who used how much, by day: a fold of the audit log, like the ledger.

A row is a day (UTC), tenant, principal and kind of job (`operation` for what is no job). Rows of more than
USAGE_DAYS_KEPT days are dropped when a new day begins; a day has at most USAGE_ROWS_MAX rows, further principals of it
are counted as `(others)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from aether.contract.budgetcalls import By, UsageRow
from aether.contract.limits import USAGE_DAYS_KEPT, USAGE_ROWS_MAX
from aether.contract.records import Record
from aether.substrate.access.budget import amounts_of

OTHERS: Final = "(others)"
OPERATION: Final = "operation"
_JOBS: Final = "jobs"
Key = tuple[str, str, str]
"""Tenant, principal, kind."""
_PLACE: Final[dict[By, int]] = {"tenant": 0, "principal": 1, "kind": 2}


class UsageBook:
    """See the module head."""

    def __init__(self) -> None:
        self._days: dict[str, dict[Key, dict[str, int]]] = {}

    def __repr__(self) -> str:
        return f"<UsageBook days={len(self._days)}>"

    def apply(self, record: Record) -> None:
        """Folds one record; those that spend nothing change nothing."""
        budget = record.budget
        if budget is None or not budget.settled:
            return
        rows = self._day(record.time[:10])
        key = (record.tenant_id or "", record.principal or "", record.kind or OPERATION)
        if key not in rows and len(rows) >= USAGE_ROWS_MAX:
            key = (record.tenant_id or "", OTHERS, record.kind or OPERATION)
        row = rows.setdefault(key, {})
        for unit, amount in amounts_of(budget).items():
            row[unit] = row.get(unit, 0) + amount
        if record.type == "job.outcome":
            row[_JOBS] = row.get(_JOBS, 0) + 1

    def report(self, by: By, tenant_id: str | None, since: str | None, until: str | None) -> tuple[UsageRow, ...]:
        """Sums under each name; `tenant_id` None means all tenants. Days both within."""
        found: dict[str, dict[str, int]] = {}
        for day, rows in self._days.items():
            if (since is not None and day < since) or (until is not None and day > until):
                continue
            for key, row in rows.items():
                if tenant_id is None or key[0] == tenant_id:
                    sums = found.setdefault(day if by == "day" else key[_PLACE[by]], {})
                    for unit, amount in row.items():
                        sums[unit] = sums.get(unit, 0) + amount
        return tuple(
            UsageRow(name=name, jobs=sums.pop(_JOBS, 0), amounts=dict(sorted(sums.items())))
            for name, sums in sorted(found.items())
        )

    def snapshot(self) -> list[tuple[str, Key, dict[str, int]]]:
        """All rows; `restore` takes them."""
        return [(day, key, row) for day, rows in self._days.items() for key, row in rows.items()]

    def restore(self, rows: Iterable[tuple[str, Key, dict[str, int]]]) -> None:
        """Takes over a snapshot; only when fresh."""
        for day, key, row in rows:
            self._days.setdefault(day, {})[key] = row

    def _day(self, day: str) -> dict[Key, dict[str, int]]:
        rows = self._days.get(day)
        if rows is None:
            rows = self._days[day] = {}
            for old in sorted(self._days)[:-USAGE_DAYS_KEPT]:
                del self._days[old]
        return rows
