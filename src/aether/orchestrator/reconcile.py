"""After every connect: what is true, from the audit log and the live cells, against the rows that are open.

Order
1. State the open rows; learn which were never admitted (dropped), the grants, the cells.
2. Read the log from the applied index on: every outcome ends its row, or makes the row that was lost.
3. Each row that is still in the phase that was stated goes on from there (machine.Reconciled).
4. A cell of nobody's (a model runtime of an earlier aurorad, a job whose outcome is durable) is retired.

Running it again changes nothing more. A row that moved meanwhile, because the link already brought news of it,
is left alone: its news is fresher than what was stated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aether.contract.jobs import JobState, JobView
from aether.contract.limits import RECONCILE_JOBS_MAX
from aether.contract.ports import Link
from aether.contract.records import Record
from aether.contract.store import JobRow, Phase, Store
from aether.contract.wire import LiveCell, LogPage, LogRead, OpenJob, Reconcile, Reconciled
from aether.orchestrator.jobs import machine
from aether.orchestrator.jobs.desk import Desk

_PAGE_RECORDS: Final = 200
_STATED: Final = frozenset[Phase]({"held", "queued", "launching", "running", "collecting", "finishing"})


class Watermark:
    """How far the log is applied while the link stands; outcomes do not arrive in the order of the log.

    An outcome below an index that was seen is either applied, or that of a job which was `finishing` then.
    So an index may be stored once all that were finishing when it was noted have come to their end.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._noted: tuple[int, frozenset[str]] | None = None

    def saw(self, log_index: int) -> None:
        self._seen = max(self._seen, log_index + 1)

    def turn(self, finishing: frozenset[str]) -> int | None:
        """Called now and then with the jobs that are finishing; the index that may be stored, if any."""
        stored = None
        if self._noted is not None and not (self._noted[1] & finishing):
            stored, self._noted = self._noted[0], None
        if self._noted is None and self._seen > 0:
            self._noted = (self._seen, finishing)
        return stored


async def reconcile(link: Link, store: Store, desk: Desk, owned: Callable[[LiveCell], bool]) -> list[LiveCell]:
    """Brings the open rows up to date and sets them going; returns the cells of nobody's.

    `owned` says whether a cell is one that this process looks after outside the rows (a model runtime).
    Raises AetherError when the link breaks; the next connect does it all again.
    """
    stated = {row.job_id: row.phase for row in desk.open.values() if row.phase in _STATED}
    applied = await store.applied_index()
    cells: dict[str, LiveCell] = {}
    held: set[str] = set()
    log_size = 0
    for body in _pages(applied, [_open_job(desk.open[job_id]) for job_id in stated]):
        truth = await link.call("reconcile", body, Reconciled)
        await desk.drop(truth.drop)
        for grant in truth.grants:
            desk.regrant(grant)
        cells |= {cell.grant.job_id: cell for cell in truth.cells}
        held.update(truth.held)
        log_size = truth.log_size
    await _catch_up(link, store, desk, applied, log_size)
    ours = stated.keys() | desk.open.keys()
    orphans = [cell for job_id, cell in cells.items() if not owned(cell) and job_id not in ours]
    for job_id, phase in stated.items():
        row = desk.open.get(job_id)
        if row is not None and row.phase == phase:
            desk.post(job_id, machine.Reconciled(cell=cells.get(job_id), held=job_id in held))
    return orphans


def _pages(applied: int, rows: list[OpenJob]) -> list[Reconcile]:
    """At least one page; the last says so."""
    starts = range(0, max(len(rows), 1), RECONCILE_JOBS_MAX)
    return [
        Reconcile(
            applied_index=applied,
            open_jobs=tuple(rows[start : start + RECONCILE_JOBS_MAX]),
            last=start + RECONCILE_JOBS_MAX >= len(rows),
        )
        for start in starts
    ]


async def _catch_up(link: Link, store: Store, desk: Desk, start: int, log_size: int) -> None:
    """Applies the outcomes in [start, log_size)."""
    intents: dict[str, Record] = {}
    while start < log_size:
        page = await link.call("log.read", LogRead(start=start, limit=_PAGE_RECORDS), LogPage)
        writes = []
        for record in page.records:
            if record.job_id is None:
                continue
            if record.type == "job.intent":
                intents[record.job_id] = record
            elif record.type == "job.outcome":
                intent = intents.pop(record.job_id, None)
                row = desk.open.get(record.job_id)
                view = outcome_view(record, intent, row.view if row is not None else None)
                if (write := desk.outcome(view, record.log_index)) is not None:
                    writes.append(write)
        await asyncio.gather(*writes)
        start = max(page.next_index, start + 1)
        await store.set_applied_index(min(start, log_size))


def outcome_view(outcome: Record, intent: Record | None, known: JobView | None) -> JobView:
    """The final view of a job from its outcome record and whatever else is known of it."""
    first = intent or outcome
    return JobView(
        job_id=outcome.job_id or "",
        request_id=(known.request_id if known else first.request_id) or "",
        kind=(known.kind if known else first.kind) or "",
        op=(known.op if known else first.op) or "",
        state=JobState(outcome.state or JobState.FAILED),
        tenant_id=(known.tenant_id if known else first.tenant_id) or "",
        node_id=outcome.node_id,
        principal=(known.principal if known else first.principal) or "",
        attempt=outcome.attempt or 1,
        labels=known.labels if known else first.labels,
        schema_version=known.schema_version if known else first.schema_version,
        input_hash=(known.input_hash if known else first.input_hash) or "",
        model_id=outcome.model_id,
        model_version=outcome.model_version,
        created_at=known.created_at if known else first.created_at or first.time,
        started_at=outcome.started_at,
        finished_at=outcome.finished_at or outcome.time,
        exit_code=outcome.exit.code if outcome.exit else None,
        signal=outcome.exit.signal if outcome.exit else None,
        error=outcome.error,
        result_digest=outcome.result_digest,
        result_bytes=outcome.result_bytes,
        artifacts=outcome.artifacts,
        usage=outcome.usage,
        cell_id=outcome.cell_id,
        exec_id=outcome.detail.get("exec_id") or (known.exec_id if known else None),
        intent_index=_index(outcome, intent, known),
        outcome_index=outcome.log_index,
        argv=known.argv if known else None,
        cell=known.cell if known else first.detail.get("cell"),
        executable=known.executable if known else first.detail.get("executable"),
        approval_id=known.approval_id if known else first.detail.get("approval"),
        replay_of=known.replay_of if known else first.detail.get("replay_of"),
    )


def _index(outcome: Record, intent: Record | None, known: JobView | None) -> int | None:
    if intent is not None:
        return intent.log_index
    said = outcome.detail.get("intent_index")
    return int(said) if said is not None else (known.intent_index if known else None)


def _open_job(row: JobRow) -> OpenJob:
    return OpenJob(job_id=row.job_id, attempt=row.attempt, state=row.state)
