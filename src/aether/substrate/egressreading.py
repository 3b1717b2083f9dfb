"""The operation `job.egress`: the records of a cell's network, found from the last one backwards.

Each record names the one before it of the same cell; the outcome, or the open job, names the last (`egress_index`).
"""

from __future__ import annotations

from aether.contract.calls import Caller, JobCall
from aether.contract.egresswire import EgressCall, EgressConnection, EgressPage, EgressSums
from aether.contract.jobs import JobView
from aether.contract.limits import PAGE_ITEMS_MAX
from aether.contract.records import Record
from aether.substrate.book import Book
from aether.substrate.egress import connection_of
from aether.substrate.reading import Reading


class EgressReading:
    """Its handler."""

    def __init__(self, book: Book, reading: Reading) -> None:
        self._book = book
        self._reading = reading

    async def egress(self, caller: Caller, call: EgressCall) -> EgressPage:
        """One page; of a job without a network an empty one. Raises NOT_FOUND."""
        view = await self._reading.view(caller, "job.egress", JobCall(job_id=call.job_id))
        rows: list[EgressConnection] = []
        sums: EgressSums | None = None
        index: int | None = call.cursor or self._last(view)
        while index is not None and len(rows) < min(call.limit, PAGE_ITEMS_MAX):
            found = self._book.log.read(index, 1)
            if not found or found[0].job_id != view.job_id:  # not durable yet, or a cursor that nobody gave out
                break
            record = found[0]
            if record.type == "egress.connection":
                rows.append(connection_of(record))
            elif record.type == "egress.closed" and "unknown" not in record.detail:
                sums = _sums(record)
            index = int(record.detail["previous"]) if "previous" in record.detail else None
        return EgressPage(job_id=view.job_id, connections=tuple(rows), closed=sums, next_cursor=index)

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
