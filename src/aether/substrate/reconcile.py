"""After every (re)connect of aurorad or the spawner: what the log says and what is there are brought together.

The log decides. A row without an intent is dropped; an intent without a row gets the outcome ABANDONED; a
started job whose cell is gone ended with its spawner; a cell without an open job is freed. A worker has no row:
it is listed with the cells, and the aurorad that does not hold its channel retires it.
"""

from __future__ import annotations

from typing import Final

from aether.contract.records import Record
from aether.contract.wire import LiveCell, LogPage, LogRead, Reconcile, Reconciled
from aether.substrate.book import Book
from aether.substrate.cells.drivers.port import Adopted
from aether.substrate.execution import Execution, job_of
from aether.substrate.ledger import OpenJob
from aether.substrate.workers import WORKER_OP

_PAGE_BYTES_MAX: Final = 160 * 1024
_JOB_TYPES: Final = frozenset({"job.intent", "job.outcome"})


class Reconciler:
    """Handlers of `reconcile` and `log.read`, and the reaction to a spawner that (re)connected."""

    def __init__(self, book: Book, execution: Execution) -> None:
        self._book = book
        self._execution = execution

    async def reconcile(self, body: Reconcile, stated: set[str]) -> Reconciled:
        """`reconcile`: idempotent; after the last page the rows of aurorad and the open jobs of the log agree.

        `stated` gathers the rows of all pages of one connection.
        """
        ledger, log = self._book.ledger, self._book.log
        await log.durable(log.size - 1)
        rows = {row.job_id for row in body.open_jobs}
        stated |= rows
        for job in ledger.open.values():
            self._execution.adopt(job)
        if body.last:
            await self._abandon_all_but(stated)
        decided = self._outcomes_since(body.applied_index)
        shown = [job for job_id, job in ledger.open.items() if job_id in rows or (body.last and job_id not in stated)]
        return Reconciled(
            drop=tuple(sorted(rows - ledger.open.keys() - decided)),
            grants=tuple(job.grant for job in shown if job.grant.job_id in rows),
            cells=tuple(_live(job) for job in shown if job.started is not None),
            held=tuple(job.grant.job_id for job in shown if job.held),
            log_size=log.durable_size,
        )

    async def _abandon_all_but(self, stated: set[str]) -> None:
        for job in list(self._book.ledger.open.values()):
            is_worker = job.intent.op == WORKER_OP and job.started is not None
            if job.grant.job_id not in self._book.ledger.open:
                continue
            if job.grant.job_id not in stated and not is_worker:
                await self._execution.abandon(job, "its row was not kept")
            elif job.held and job.approval is None:
                await self._execution.abandon(job, "its approval was not asked for durably")

    async def read_log(self, body: LogRead) -> LogPage:
        """`log.read`: job records from `start` on; `next_index` is where to go on."""
        found: list[Record] = []
        size = 0
        index = max(body.start, self._book.log.first)  # what is pruned had ended, and was told long ago
        while index < self._book.log.durable_size and size < _PAGE_BYTES_MAX and len(found) < body.limit:
            for record in self._book.log.read(index, min(body.limit, 50)):
                if size >= _PAGE_BYTES_MAX or len(found) >= body.limit:
                    break
                index = record.log_index + 1
                if record.type in _JOB_TYPES:
                    found.append(record)
                    size += len(self._book.log.entry(record.log_index))
        return LogPage(records=tuple(found), next_index=index)

    def spawner_connected(self, found: list[Adopted]) -> None:
        """The spawner (re)connected; `found` is all that it has."""
        ledger = self._book.ledger
        live = {adopted.cell_id: adopted for adopted in found}
        for job in list(ledger.open.values()):
            if job.started is not None and job.end is None:
                there = live.get(job.place)
                if there is None or (job.is_guest and job.executable not in there.execs):
                    self._execution.vanished(job)
        for cell_id, adopted in live.items():
            if cell_id in ledger.cells.live:
                self._execution.forget_strangers(adopted)
            elif job_of(cell_id) not in ledger.open:
                self._execution.free(cell_id)

    def _outcomes_since(self, index: int) -> set[str]:
        found: set[str] = set()
        index = max(index, self._book.log.first)
        while index < self._book.log.durable_size:
            page = self._book.log.read(index, 500)
            found |= {record.job_id for record in page if record.type == "job.outcome" and record.job_id is not None}
            index += len(page)
        return found


def _live(job: OpenJob) -> LiveCell:
    assert job.started is not None
    return LiveCell(
        grant=job.grant,
        cell_id=job.cell_id or "",
        exec_id=job.exec_id or "",
        started_at=job.started.time,
        end=job.end,
    )
