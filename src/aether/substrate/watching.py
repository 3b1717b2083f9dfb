"""Operations that show what the processes of a cell do: `job.activity`, `cell.activity`, `job.trace`, `cell.trace`.

Events are read from files and passed on as they are. A trace costs every process of the machine a little while it
runs, so it is control and not reading: recorded, and one operation of the budget.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final

from aether.contract import ids
from aether.contract.activity import ActivityCall, CellActivityCall, CellTraceCall, Trace, TraceCall
from aether.contract.calls import Caller, JobCall, StreamReply
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.limits import TRACE_MS_MAX
from aether.contract.records import Record
from aether.substrate import cellentries as entries
from aether.substrate.access.access import Resource
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.activity import ActivityLogs
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.gate import Gate
from aether.substrate.reading import Reading

LINES: Final = "application/x-ndjson"


class Watching:
    """The handlers."""

    def __init__(
        self, gate: Gate, book: Book, house: CellHouse, cells: CellSupervisor, reading: Reading, logs: ActivityLogs
    ) -> None:
        self._gate = gate
        self._book = book
        self._house = house
        self._cells = cells
        self._reading = reading
        self._logs = logs

    async def job_activity(self, caller: Caller, call: ActivityCall) -> StreamReply:
        """The events of the job's cell; an executable of an allocated cell shares it with others."""
        view = await self._reading.view(caller, "job.activity", JobCall(job_id=call.job_id))
        return StreamReply(self._of_job(view, call), LINES)

    async def _of_job(self, view: JobView, call: ActivityCall) -> AsyncIterator[bytes]:
        cell_id, _ = await self._reading.executable(view, call.follow)
        if cell_id is None:
            return
        alive = (lambda: view.job_id in self._book.ledger.open) if call.follow else None
        async for lines in self._logs.read(cell_id, call.cursor, alive):
            yield lines

    async def cell_activity(self, caller: Caller, call: CellActivityCall) -> StreamReply:
        _, cell = self._house.find(caller, "cell.activity", call.cell)
        alive = (lambda: cell.ended is None) if call.follow else None
        return StreamReply(self._logs.read(cell.cell_id, call.cursor, alive), LINES)

    async def job_trace(self, caller: Caller, call: TraceCall) -> Trace:
        check_duration(call.duration_ms)
        job_id = ids.parse(ids.JOB, call.job_id)
        admission = self._gate.admit(caller, "job.trace", Resource(kind="job", id=job_id))
        view = await self._reading.view_in_tenant(job_id, admission)
        job = self._book.ledger.open.get(job_id)
        if job is None or job.started is None or job.end is not None:
            raise AetherError("NOT_READY", f"cannot trace {job_id}: it is {view.state}", "trace a running job")
        order = self._house.order(caller, admission, "job.trace")
        detail = {"duration_ms": str(call.duration_ms)}
        intent = job.intent
        return await self._trace(
            job.place,
            call.duration_ms,
            order,
            lambda index, now: entries.told(intent, "job.trace", order, detail, index, now),
        )

    async def cell_trace(self, caller: Caller, call: CellTraceCall) -> Trace:
        check_duration(call.duration_ms)
        admission, cell = self._house.live(caller, "cell.trace", call.cell)
        order = self._house.order(caller, admission, "cell.trace")
        detail = {"duration_ms": str(call.duration_ms)}
        return await self._trace(
            cell.cell_id,
            call.duration_ms,
            order,
            lambda index, now: entries.changed("cell.trace", cell, order, detail, index, now),
        )

    async def _trace(self, cell_id: str, duration_ms: int, order: Order, make: Callable[[int, str], Record]) -> Trace:
        await self._book.durable(self._house.write(order, make))
        await self._cells.trace(cell_id, duration_ms)
        return self._logs.trace(cell_id)


def check_duration(duration_ms: int) -> None:
    """Raises AetherError BAD_FIELD."""
    if not 1 <= duration_ms <= TRACE_MS_MAX:
        raise AetherError("BAD_FIELD", f"cannot trace: duration_ms must be within 1..{TRACE_MS_MAX}")
