"""The operations `job.egress` and `cell.egress`: the records of a cell's network, from the last one backwards.

Each record names the one before it of the same cell; the outcome, the open job or the allocated cell names the last
(`egress_index`).
"""

from __future__ import annotations

from collections.abc import Callable

from aether.contract.calls import Caller, JobCall
from aether.contract.egresswire import (
    CellEgressCall,
    CellEgressPage,
    EgressCall,
    EgressConnection,
    EgressPage,
    EgressSums,
)
from aether.contract.jobs import JobView
from aether.contract.limits import PAGE_ITEMS_MAX
from aether.contract.records import Record
from aether.substrate.book import Book
from aether.substrate.cellhouse import CellHouse
from aether.substrate.egress import connection_of
from aether.substrate.reading import Reading


class EgressReading:
    """Their handlers."""

    def __init__(self, book: Book, reading: Reading, house: CellHouse) -> None:
        self._house = house
        self._book = book
        self._reading = reading

    async def egress(self, caller: Caller, call: EgressCall) -> EgressPage:
        """One page; of a job without a network an empty one. Raises NOT_FOUND."""
        view = await self._reading.view(caller, "job.egress", JobCall(job_id=call.job_id))
        rows, sums, index = self._page(call.cursor or self._last(view), call.limit, lambda r: r.job_id == view.job_id)
        return EgressPage(job_id=view.job_id, connections=rows, closed=sums, next_cursor=index)

    async def of_cell(self, caller: Caller, call: CellEgressCall) -> CellEgressPage:
        """One page about an allocated cell, live or lately ended. Raises NO_SUCH_CELL."""
        _, cell = self._house.find(caller, "cell.egress", call.cell)
        start = call.cursor or cell.egress_index
        rows, sums, index = self._page(start, call.limit, lambda r: r.job_id is None and r.cell_id == cell.cell_id)
        return CellEgressPage(cell_id=cell.cell_id, connections=rows, closed=sums, next_cursor=index)

    def _page(
        self, index: int | None, limit: int, belongs: Callable[[Record], bool]
    ) -> tuple[tuple[EgressConnection, ...], EgressSums | None, int | None]:
        """Its rows, the sums if they lie in it, and where to go on."""
        rows: list[EgressConnection] = []
        sums: EgressSums | None = None
        while index is not None and len(rows) < min(limit, PAGE_ITEMS_MAX):
            found = self._book.log.read(index, 1)
            if not found or not belongs(found[0]):  # not durable yet, or a cursor that nobody gave out
                break
            record = found[0]
            if record.type == "egress.connection":
                rows.append(connection_of(record))
            elif record.type == "egress.closed" and "unknown" not in record.detail:
                sums = _sums(record)
            index = int(record.detail["previous"]) if "previous" in record.detail else None
        return tuple(rows), sums, index

    def _last(self, view: JobView) -> int | None:
        job = self._book.ledger.open.get(view.job_id)
        if job is not None:
            return job.egress_index
        if view.outcome_index is None:
            return None
        outcome = self._book.log.read(view.outcome_index, 1)[0]
        return int(outcome.detail["egress_index"]) if "egress_index" in outcome.detail else None


def _sums(record: Record) -> EgressSums:
    return EgressSums(**{name: int(record.detail.get(name, "0")) for name in EgressSums.__struct_fields__})
