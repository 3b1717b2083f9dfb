"""What aurorad may do, each under the grant of one open job: launch its cell, stop it, collect, finish.

Every verb checks the grant against the ledger again after each await. The end of an executable and what it
used are the authority's own observations; aurorad only says what it made of them. A finished job's cell is
freed here, so a dead aurorad leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from aether.contract import ids
from aether.contract.canonical import canonical_record, input_hash
from aether.contract.cells import CellSpec, ExecEnd, ExitStatus, InputFile, Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, parse_command
from aether.contract.ports import Link
from aether.contract.records import CodeRef, Record
from aether.contract.wire import (
    CellCollect,
    CellExited,
    CellFiles,
    CellKey,
    CellLaunch,
    CellLaunched,
    CellOpen,
    CellStop,
    Empty,
    Grant,
    JobFinish,
    JobOutcome,
    Token,
)
from aether.substrate import entries
from aether.substrate.book import Book, outcome_of
from aether.substrate.cells.supervisor import CellSupervisor, Launched
from aether.substrate.ledger import OpenJob
from aether.substrate.metering.settle import settlement
from aether.substrate.orchestra import Orchestra

SPAWNER_DIED: Final = "spawner-died"


def cell_of(job_id: str) -> str:
    """The cell of a job; derived, so that a launch repeated after a crash finds the same cell."""
    return ids.sibling(ids.CELL, job_id)


def job_of(cell_id: str) -> str:
    """The job that a cell belongs to."""
    return ids.sibling(ids.JOB, cell_id)


class Execution:
    """Handlers of the verbs `cell.*` and `job.finish`."""

    def __init__(self, book: Book, cells: CellSupervisor, orchestra: Orchestra) -> None:
        self._book = book
        self._cells = cells
        self._orchestra = orchestra
        self._launching: dict[str, asyncio.Lock] = {}
        self._background: set[asyncio.Task[None]] = set()

    # ---- verbs

    async def launch(self, link: Link, body: CellLaunch) -> CellLaunched:
        """`cell.launch`; repeated for the same grant it answers with the cell that is there."""
        fds = [await link.take_fd(token) for token in body.tokens]
        try:
            job = self.granted(body.grant)
            spec, inputs = _spec_of(job, body)
            if len(fds) != len(inputs):
                raise AetherError("PROTOCOL", "cannot launch: one descriptor per input file is needed")
            self._check_again(job, body.again)
            launched, channel = await self.start(job, spec, list(zip(inputs, fds, strict=True)))
            if job.end is not None:  # it ended while nobody listened
                self._tell_exit(job, job.end)
            return await hand_over(link, launched, channel)
        finally:
            for fd in fds:
                os.close(fd)

    async def stop(self, body: CellStop) -> Empty:
        """`cell.stop`: the end arrives as an event."""
        job = self.granted(body.grant)
        if job.end is not None:  # told again: whoever stops it may not have heard
            self._tell_exit(job, job.end)
        elif job.started is not None:
            await self._cells.stop(cell_of(body.grant.job_id), body.grace_ms)
        return Empty()

    async def collect(self, body: CellCollect) -> CellFiles:
        self.granted(body.grant)
        return await self._cells.collect(cell_of(body.grant.job_id), body.globs)

    async def open(self, link: Link, body: CellOpen) -> Token:
        self.granted(body.grant)
        fd = await self._cells.open(cell_of(body.grant.job_id), body.path)
        try:
            return Token(token=await link.send_fd(fd))
        finally:
            os.close(fd)

    async def free_now(self, body: CellKey) -> Empty:
        """`cell.free`: answers when nothing of the job's cell is left; its job must be finished."""
        if body.grant.job_id in self._book.ledger.open:
            raise AetherError("NO_GRANT", f"cannot free the cell of {body.grant.job_id}: the job is open")
        await self._cells.free(cell_of(body.grant.job_id))
        return Empty()

    async def finish(self, body: JobFinish) -> JobOutcome:
        """`job.finish`: records the outcome, settles, and answers when it is durable."""
        job_id = body.grant.job_id
        if (known := self._book.recent_outcome(job_id)) is not None:
            return known
        job = self.granted(body.grant)
        outcome = self.conclude(job, _judged(job, body, self._cells.gone(cell_of(job_id))))
        await self._book.durable(outcome)
        return self.told(job, outcome)

    # ---- the same steps for the authority's own use

    def granted(self, grant: Grant) -> OpenJob:
        """The open job of a grant; raises NO_GRANT for any other."""
        job = self._book.ledger.open.get(grant.job_id)
        if job is None or job.grant != grant:
            raise AetherError("NO_GRANT", f"cannot act for {grant.job_id}: the grant is not live")
        return job

    async def start(
        self, job: OpenJob, spec: CellSpec, files: Sequence[tuple[InputFile, int]]
    ) -> tuple[CellLaunched, int | None]:
        """Starts the job's cell once its intent is durable; records `job.started`. The caller owns the channel."""
        grant = job.grant
        lock = self._launching.setdefault(grant.job_id, asyncio.Lock())
        try:
            async with lock:
                if job.started is not None:
                    return _launched(job.started), None
                await self._book.durable(job.intent)
                if job.row_kept is not None:
                    await job.row_kept.wait()  # set, or the job is abandoned: `granted` tells
                self.granted(grant)
                job.launched_on = job.launched_on or self._cells.instance
                found = await self._cells.launch(cell_of(grant.job_id), spec, files)
                if self._book.ledger.open.get(grant.job_id) is not job:
                    self._discard(found)
                    raise AetherError("NO_GRANT", f"cannot launch {grant.job_id}: it ended meanwhile")
                return _launched(self._record_start(job, found)), found.channel_fd
        finally:
            if not lock.locked():
                self._launching.pop(grant.job_id, None)

    def conclude(self, job: OpenJob, finish: JobFinish) -> Record:
        """Writes the outcome, not yet durable."""
        assert job.intent.budget is not None
        settled = settlement(job.intent.budget, job.end.usage if job.end else finish.usage)
        outcome = self._book.write(lambda index, time: entries.cell_outcome(job, finish, settled, index, time))
        if job.row_kept is not None:
            job.row_kept.set()  # a launch that still waits learns that its grant is gone
        return outcome

    def told(self, job: OpenJob, outcome: Record) -> JobOutcome:
        """Tells waiters of a durable outcome; only then frees the cell, so that nobody waits for that."""
        told = outcome_of(job.intent, outcome, job.argv)
        self._book.publish(told)
        self.free(told.view.job_id)
        self._book.maybe_snapshot()
        return told

    async def abandon(self, job: OpenJob, why: str) -> None:
        """Ends a job that nobody will run: `failed` when it never started, else `lost`."""
        if job.started is None:
            state, error = JobState.FAILED, AetherError("ABANDONED", f"cannot start the job: {why}")
        else:
            state, error = JobState.LOST, AetherError("LOST", f"cannot say how the job ended: {why}")
        outcome = self.conclude(job, JobFinish(grant=job.grant, state=state, error=error.body()))
        await self._book.durable(outcome)
        self._orchestra.tell_outcome(self.told(job, outcome))

    def ended(self, end: ExecEnd) -> None:
        """An executable ended: kept with its job until it is finished, and aurorad is told."""
        job = self._book.ledger.open.get(job_of(end.cell_id))
        if job is None:
            self.free(job_of(end.cell_id))
        elif job.end is None:
            job.end = end
            self._tell_exit(job, end)

    def adopt(self, job: OpenJob) -> None:
        """Records the start of a cell that is there although the record of its start was lost in a crash."""
        found = self._cells.found(cell_of(job.grant.job_id)) if job.started is None else None
        if found is not None:
            self._record_start(job, found)

    def vanished(self, job: OpenJob) -> None:
        """The spawner no longer knows the job's cell: it died with the spawner."""
        exit_status = ExitStatus(reason=SPAWNER_DIED)
        cell_id = cell_of(job.grant.job_id)
        self.ended(ExecEnd(cell_id=cell_id, exec_id=job.exec_id or "", exit=exit_status, usage=Usage()))

    def free(self, job_id: str) -> None:
        """Frees the job's cell in the background: kills what is left, removes cgroups and work directory."""
        self._in_background(self._free(cell_of(job_id)))

    async def drain(self) -> None:
        """Waits for cells that are being freed."""
        while self._background:
            await asyncio.wait(self._background)

    # ---- inside

    def _check_again(self, job: OpenJob, again: bool) -> None:
        """A launch that may have happened is not repeated: raises LOST unless its cell is there, or it cannot be.

        The launch of this attempt is known not to have happened when this process admitted the job and never
        asked a spawner that is gone. A repetition at the same spawner is answered with the cell that it has.
        """
        if job.started is not None or self._cells.found(cell_of(job.grant.job_id)) is not None:
            return
        elsewhere = job.launched_on is not None and job.launched_on != self._cells.instance
        forgotten = again and job.argv is None
        if elsewhere or forgotten:
            raise AetherError("LOST", f"cannot launch {job.grant.job_id} again: it may have run, and its cell is gone")

    def _tell_exit(self, job: OpenJob, end: ExecEnd) -> None:
        self._orchestra.tell_exit(CellExited(job_id=job.grant.job_id, attempt=job.grant.attempt, end=end))

    def _record_start(self, job: OpenJob, found: Launched) -> Record:
        log = self._book.log
        # What is the same for every such cell is stored once; the uid block is this cell's own.
        sandbox = log.store_document(canonical_record(replace(found.report, uid=None)))
        plan = log.store_document(found.plan_text) if found.plan_text else None
        code = CodeRef(
            plan_digest=plan, sandbox_digest=sandbox, route="local", engine=job.intent.kind, rung=found.report.level
        )
        cell_id = cell_of(job.grant.job_id)
        return self._book.write(
            lambda index, time: entries.started(job.intent, cell_id, found.exec_id, found.report.uid, code, index, time)
        )

    def _discard(self, found: Launched) -> None:
        if found.channel_fd is not None:
            os.close(found.channel_fd)
        self._in_background(self._free(found.cell_id))

    async def _free(self, cell_id: str) -> None:
        with contextlib.suppress(AetherError):  # the spawner is away: what it lists when it is back is freed then
            await self._cells.free(cell_id)

    def _in_background(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _spec_of(job: OpenJob, body: CellLaunch) -> tuple[CellSpec, tuple[InputFile, ...]]:
    """The cell of the admitted request; raises NO_GRANT for any other request."""
    request = body.request
    if request.kind != "command" or job.intent.input_hash != input_hash(
        request.schema_version, request.kind, request.op, request.params, request.inputs
    ):
        raise AetherError("NO_GRANT", f"cannot launch {body.grant.job_id}: it was admitted with another request")
    params, inputs = parse_command(request)
    spec = CellSpec(
        argv=params.argv,
        env=params.env,
        cwd=params.cwd,
        limits=params.limits,
        require=params.require,
        labels=tuple(sorted({*request.labels, *body.labels})),
    )
    return spec, inputs.files


def _launched(started: Record) -> CellLaunched:
    assert started.cell_id is not None and started.code is not None
    return CellLaunched(
        cell_id=started.cell_id,
        exec_id=started.detail["exec_id"],
        started_at=started.time,
        plan_digest=started.code.plan_digest,
    )


async def hand_over(link: Link, launched: CellLaunched, channel: int | None) -> CellLaunched:
    """Sends the channel's descriptor, if there is one, and names it in the answer."""
    if channel is None:
        return launched
    try:
        token = await link.send_fd(channel)
    finally:
        os.close(channel)
    return CellLaunched(
        cell_id=launched.cell_id,
        exec_id=launched.exec_id,
        started_at=launched.started_at,
        plan_digest=launched.plan_digest,
        channel=token,
    )


def _judged(job: OpenJob, finish: JobFinish, gone: bool) -> JobFinish:
    """The verdict as the authority may record it: aurorad's word about an end needs the authority's own sight of it.

    Raises UNAVAILABLE while that is still to come (the spawner tells it again after a reconnect), PROTOCOL for a
    failure called success. An end that only aurorad saw, because the spawner died with it, is LOST; `gone`: the
    spawner does not know the cell, of which even the start may not have been durable.
    """
    job_id, end = finish.grant.job_id, job.end
    if end is None and finish.exit is not None and not gone:
        raise AetherError("UNAVAILABLE", f"cannot finish {job_id} yet: its end is not known here", retry_after_s=1)
    if (end is None or end.exit.reason == SPAWNER_DIED) and _tells_more(finish):
        error = AetherError("LOST", "cannot finish the job: how it ended was lost with its spawner")
        return replace(finish, state=JobState.LOST, error=error.body())
    if job.intent.kind == "command" and finish.state is JobState.SUCCEEDED and (end is None or end.exit.code != 0):
        raise AetherError("PROTOCOL", f"cannot finish {job_id} as succeeded: its executable did not")
    return finish


def _tells_more(finish: JobFinish) -> bool:
    """Whether it states an end that the authority did not see; a stop was recorded, so it may stand."""
    return finish.exit is not None and finish.exit.reason != SPAWNER_DIED and finish.state is not JobState.CANCELLED
