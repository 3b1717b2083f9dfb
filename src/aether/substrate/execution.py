"""What aurorad may do, each under the grant of one open job: launch its cell, stop it, collect, finish.

Every verb checks the grant against the ledger again after each await. The end of an executable and what it
used are the authority's own observations; aurorad only says what it made of them. A finished job's own cell is
freed here, so a dead aurorad leaves nothing behind; of an allocated cell's guest only the executable is forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from aether.contract import ids
from aether.contract.canonical import canonical_record, input_hash
from aether.contract.cells import CellSpec, ExecEnd, ExitStatus, InputFile, Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import CommandInputs, CommandParams, JobState, Stdio, parse_command
from aether.contract.labels import ISOLATED, LOCAL_ONLY
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
from aether.substrate.allocations import Allocation
from aether.substrate.book import Book, outcome_of
from aether.substrate.cells.drivers.port import Adopted
from aether.substrate.cells.supervisor import CellSupervisor, Launched
from aether.substrate.egress import EgressDesk
from aether.substrate.ledger import OpenJob
from aether.substrate.lines import Held, Lines
from aether.substrate.metering.exhaustion import ended_by
from aether.substrate.metering.settle import settlement
from aether.substrate.orchestra import Orchestra

SPAWNER_DIED: Final = "spawner-died"
CELL_FREED: Final = "cell-freed"


def job_of(identity: str) -> str:
    """The job that an executable, or a cell of its own, belongs to."""
    return ids.sibling(ids.JOB, identity)


class Execution:
    """Handlers of the verbs `cell.*` and `job.finish`."""

    def __init__(self, book: Book, cells: CellSupervisor, orchestra: Orchestra, egress: EgressDesk) -> None:
        self._book = book
        self._cells = cells
        self._orchestra = orchestra
        self._egress = egress
        self._launching: dict[str, asyncio.Lock] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.lines = Lines()

    # ---- verbs

    async def launch(self, link: Link, body: CellLaunch) -> CellLaunched:
        """`cell.launch`; repeated for the same grant it answers with the cell that is there."""
        fds = [await link.take_fd(token) for token in body.tokens]
        try:
            job = self.granted(body.grant)
            params, inputs = _asked(job, body)
            if len(fds) != len(inputs.files):
                raise AetherError("PROTOCOL", "cannot launch: one descriptor per input file is needed")
            check_labels_of(job, body)
            self._check_again(job, body.again)
            files = list(zip(inputs.files, fds, strict=True))
            launched, channel = await self.start(job, _spec_of(params, job), files, params.stdio)
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
            if job.is_guest:
                await self._stop_guest(job, body.grace_ms)
            else:
                await self._cells.stop(job.place, body.grace_ms)
        return Empty()

    async def _stop_guest(self, job: OpenJob, grace_ms: int) -> None:
        try:
            await self._cells.stop_exec(job.place, job.executable, grace_ms)
        except AetherError as error:
            if error.code != "NOT_FOUND":  # it ended this moment, and its end is on its way
                raise

    async def collect(self, body: CellCollect) -> CellFiles:
        job = self.granted(body.grant)
        found = await self._cells.collect(job.place, body.globs)
        cell = self._book.ledger.cells.live.get(job.place) if job.is_guest else None
        return found if cell is None else replace(found, labels=cell.labels)

    async def open(self, link: Link, body: CellOpen) -> Token:
        job = self.granted(body.grant)
        fd = await self._cells.open(job.place, body.path)
        try:
            return Token(token=await link.send_fd(fd))
        finally:
            os.close(fd)

    async def free_now(self, body: CellKey) -> Empty:
        """`cell.free`: answers when nothing of the job's own cell is left; its job must be finished."""
        if body.grant.job_id in self._book.ledger.open:
            raise AetherError("NO_GRANT", f"cannot free the cell of {body.grant.job_id}: the job is open")
        await self._cells.free(ids.sibling(ids.CELL, body.grant.job_id))
        return Empty()

    async def finish(self, body: JobFinish) -> JobOutcome:
        """`job.finish`: records the outcome, settles, and answers when it is durable."""
        job_id = body.grant.job_id
        if (known := self._book.recent_outcome(job_id)) is not None:
            return known
        job = self.granted(body.grant)
        if job.egress_index is not None:  # its last word belongs before the outcome
            await self._egress.close(job.place)
            if (known := self._book.recent_outcome(job_id)) is not None:
                return known
            job = self.granted(body.grant)
        outcome = self.conclude(job, _judged(job, body, self._cells.gone(job.place)))
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
        self, job: OpenJob, spec: CellSpec, files: Sequence[tuple[InputFile, int]], stdio: Stdio = "logs"
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
                check_approved(job)
                if self._book.ledger.tickets.revocation(job.intent.ticket) is not None:
                    raise AetherError("REVOKED", f"cannot launch {grant.job_id}: its ticket was revoked")
                job.launched_on = job.launched_on or self._cells.instance
                found = await self._launch(job, spec, files, stdio)
                if self._book.ledger.open.get(grant.job_id) is not job:
                    self._discard(found)
                    raise AetherError("NO_GRANT", f"cannot launch {grant.job_id}: it ended meanwhile")
                return _launched(self._record_start(job, found)), found.channel_fd
        finally:
            if not lock.locked():
                self._launching.pop(grant.job_id, None)

    async def _launch(
        self, job: OpenJob, spec: CellSpec, files: Sequence[tuple[InputFile, int]], stdio: Stdio
    ) -> Launched:
        """In a cell of its own, or in the allocated one if that still lives; raises NO_SUCH_CELL, CELL_FROZEN."""
        if spec.secrets:  # read as late as can be: the value of this moment, held by nobody before
            spec = replace(spec, env=spec.env | await self._egress.secrets(spec.secrets), secrets={})
        if not job.is_guest:
            if spec.network is None:
                return await self._cells.launch(job.place, spec, files)
            start = functools.partial(self._cells.launch, job.place)
            return await self._egress.launch(job.place, job.intent, spec, files, start)
        cell = check_enterable(self._book.ledger.cells.live.get(job.place), job.place)
        spec = self._egress.guest(cell, spec)
        found = await self._cells.join(job.place, job.executable, spec, stdio, files)
        if stdio == "tty":
            await self._hold_terminal(job)
        return found

    async def _hold_terminal(self, job: OpenJob) -> None:
        with contextlib.suppress(AetherError):  # whoever attaches asks for it, and hears why there is none
            _, fd = await self._cells.terminal(job.place, job.executable)
            self.lines.keep(job.grant.job_id, Held(fd, job.intent.tenant_id or "", job.intent.detail["cell"]))
        if job.end is not None or job.grant.job_id not in self._book.ledger.open:
            self.lines.ended(job.grant.job_id)

    def conclude(self, job: OpenJob, finish: JobFinish) -> Record:
        """Writes the outcome, not yet durable. Whatever it was to be: a job whose ticket is revoked ends as revoked."""
        assert job.intent.budget is not None
        revocation = self._book.ledger.tickets.revocation(job.intent.ticket)
        if revocation is not None:
            finish = _revoked(finish)
        if job.exhausted is not None:
            finish = ended_by(job.exhausted, finish)
        settled = settlement(job.intent.budget, job.end.usage if job.end else finish.usage)
        cell = self._book.ledger.cells.find_any(job.place) if job.is_guest else None
        if cell is not None and cell.ended is not None:
            settled = replace(settled, cpu_ms=0)  # the end of the cell paid for all that ran in it
        outcome = self._book.write(
            lambda index, time: entries.cell_outcome(job, finish, settled, revocation, index, time)
        )
        if job.row_kept is not None:
            job.row_kept.set()  # a launch that still waits learns that its grant is gone
        return outcome

    def told(self, job: OpenJob, outcome: Record) -> JobOutcome:
        """Tells waiters of a durable outcome; only then frees the cell, so that nobody waits for that."""
        told = outcome_of(job.intent, outcome, job.argv)
        self._book.publish(told)
        if job.is_guest:
            self._in_background(self._acknowledge(job.place, job.executable))
        elif job.started is not None or job.launched_on is not None or self._found(job) is not None:
            self.free(job.place)
        self._book.maybe_snapshot()
        return told

    async def abandon(self, job: OpenJob, why: str) -> None:
        """Ends a job that nobody will run: `failed` when it never started, else `lost`."""
        if job.started is None:
            state, error = JobState.FAILED, AetherError("ABANDONED", f"cannot start the job: {why}")
        else:
            state, error = JobState.LOST, AetherError("LOST", f"cannot say how the job ended: {why}")
        if job.egress_index is not None:
            await self._egress.close(job.place)
            if self._book.ledger.open.get(job.grant.job_id) is not job:
                return
        outcome = self.conclude(job, JobFinish(grant=job.grant, state=state, error=error.body()))
        await self._book.durable(outcome)
        self._orchestra.tell_outcome(self.told(job, outcome))

    def ended(self, end: ExecEnd) -> None:
        """An executable ended: kept with its job until it is finished, and aurorad is told."""
        job = self._book.ledger.open.get(job_of(end.exec_id))
        cell = self._book.ledger.cells.find_any(end.cell_id)
        if cell is not None and cell.ended is not None and end.exit.reason != SPAWNER_DIED:
            end = replace(end, exit=replace(end.exit, reason=CELL_FREED if cell.reason == "freed" else cell.reason))
        if job is not None and job.end is None:
            job.end = end
            self.lines.ended(job.grant.job_id)
            self._tell_exit(job, end)
        elif job is None and cell is None:
            self.free(end.cell_id)
        elif job is None:
            self._in_background(self._acknowledge(end.cell_id, end.exec_id))

    def adopt(self, job: OpenJob) -> None:
        """Records the start of a cell that is there although the record of its start was lost in a crash."""
        found = self._found(job) if job.started is None else None
        if found is not None:
            self._record_start(job, found)

    def _found(self, job: OpenJob) -> Launched | None:
        """Its executable, if it is there."""
        return self._cells.found_exec(job.place, job.executable) if job.is_guest else self._cells.found(job.place)

    def vanished(self, job: OpenJob) -> None:
        """The spawner no longer knows the job's cell: it died with the spawner."""
        exit_status = ExitStatus(reason=SPAWNER_DIED)
        self.ended(ExecEnd(cell_id=job.place, exec_id=job.executable, exit=exit_status, usage=Usage()))

    def forget_strangers(self, adopted: Adopted) -> None:
        """Ends executables of an allocated cell that no open job knows: their start was never admitted durably."""
        for exec_id, end in adopted.execs.items():
            if job_of(exec_id) in self._book.ledger.open:
                continue
            if end is None:
                self._in_background(self._end_stranger(adopted.cell_id, exec_id))
            else:
                self._in_background(self._acknowledge(adopted.cell_id, exec_id))

    def free(self, cell_id: str) -> None:
        """Frees a cell in the background: kills what is left, removes cgroups and work directory."""
        self._in_background(self._free(cell_id))

    async def drain(self) -> None:
        """Waits for cells that are being freed; lets go of the terminals."""
        self.lines.close()
        while self._background:
            await asyncio.wait(self._background)

    # ---- inside

    def _check_again(self, job: OpenJob, again: bool) -> None:
        """A launch that may have happened is not repeated: raises LOST unless its cell is there, or it cannot be.

        The launch of this attempt is known not to have happened when this process admitted the job and never
        asked a spawner that is gone. A repetition at the same spawner is answered with the cell that it has.
        """
        if job.started is not None or self._found(job) is not None:
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
        plan: str | None = log.store_document(found.plan_text) if found.plan_text else None
        cell = self._book.ledger.cells.live.get(job.place) if job.is_guest else None
        if cell is not None and cell.started is not None and cell.started.code is not None:
            plan = cell.started.code.plan_digest
        code = CodeRef(
            plan_digest=plan, sandbox_digest=sandbox, route="local", engine=job.intent.kind, rung=found.report.level
        )
        return self._book.write(
            lambda index, time: entries.started(
                job.intent, job.place, found.exec_id, found.report.uid, code, index, time
            )
        )

    def _discard(self, found: Launched) -> None:
        if found.channel_fd is not None:
            os.close(found.channel_fd)
        if found.cell_id in self._book.ledger.cells.live:
            self._in_background(self._end_stranger(found.cell_id, found.exec_id))
        else:
            self._in_background(self._free(found.cell_id))

    async def _end_stranger(self, cell_id: str, exec_id: str) -> None:
        """Its end finds no job, and is acknowledged then."""
        with contextlib.suppress(AetherError):
            await self._cells.stop_exec(cell_id, exec_id, 0)

    async def _acknowledge(self, cell_id: str, exec_id: str) -> None:
        with contextlib.suppress(AetherError):  # gone with its cell, or told again after the next connect
            await self._cells.acknowledge(cell_id, exec_id)

    async def _free(self, cell_id: str) -> None:
        with contextlib.suppress(AetherError):  # the spawner is away: what it lists when it is back is freed then
            await self._cells.free(cell_id)
        await self._egress.close(cell_id)

    def _in_background(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _asked(job: OpenJob, body: CellLaunch) -> tuple[CommandParams, CommandInputs]:
    """What the admitted request asks for; raises NO_GRANT for any other request."""
    request = body.request
    if request.kind != "command" or job.intent.input_hash != input_hash(
        request.schema_version, request.kind, request.op, request.params, request.inputs
    ):
        raise AetherError("NO_GRANT", f"cannot launch {body.grant.job_id}: it was admitted with another request")
    return parse_command(request)


def check_labels_of(job: OpenJob, body: CellLaunch) -> None:
    """Raises LABEL_REFUSED when an input carries what it did not when the job was admitted: nobody was asked that."""
    if more := sorted(set(body.labels) - set(job.intent.labels)):
        job_id, shown = body.grant.job_id, ", ".join(more[:5])
        why = f"an input of it has been labelled {shown} since it was admitted"
        raise AetherError("LABEL_REFUSED", f"cannot launch {job_id}: {why}", "submit it again")


def _spec_of(params: CommandParams, job: OpenJob) -> CellSpec:
    labels = job.intent.labels
    isolated = ISOLATED if LOCAL_ONLY in labels and not job.is_guest else ()
    return CellSpec(
        argv=params.argv,
        env=params.env,
        cwd=params.cwd,
        limits=params.limits,
        require=tuple(dict.fromkeys((*params.require, *isolated))),
        labels=labels,
        network=params.network,
        python=params.python,
        images=params.images,
        secrets=params.secrets,
    )


def check_approved(job: OpenJob) -> None:
    """Raises NO_GRANT for a job that waits for an approval."""
    if job.held:
        raise AetherError("NO_GRANT", f"cannot act for {job.grant.job_id}: it waits for an approval")


def check_enterable(cell: Allocation | None, reference: str) -> Allocation:
    """A live cell in which an executable can start now; raises NO_SUCH_CELL, NOT_READY, CELL_FROZEN."""
    if cell is None or cell.ended is not None:
        raise AetherError("NO_SUCH_CELL", f"cannot find cell {reference}", "list the cells with `aether cell list`")
    if cell.started is None:
        raise AetherError("NOT_READY", f"cannot use cell {cell.name}: it is being made")
    if cell.frozen:
        raise AetherError("CELL_FROZEN", f"cannot start an executable in cell {cell.name}: it is frozen")
    return cell


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
    if finish.state is JobState.SUCCEEDED or finish.exit is not None:
        check_approved(job)
    if end is None and finish.exit is not None and not gone:
        raise AetherError("UNAVAILABLE", f"cannot finish {job_id} yet: its end is not known here", retry_after_s=1)
    if (end is None or end.exit.reason == SPAWNER_DIED) and _tells_more(finish):
        error = AetherError("LOST", "cannot finish the job: how it ended was lost with its spawner")
        return replace(finish, state=JobState.LOST, error=error.body())
    if job.intent.kind == "command" and finish.state is JobState.SUCCEEDED and (end is None or end.exit.code != 0):
        raise AetherError("PROTOCOL", f"cannot finish {job_id} as succeeded: its executable did not")
    return finish


def _revoked(finish: JobFinish) -> JobFinish:
    """The verdict on a job whose ticket is revoked: nothing that it made is kept. What was lost stays lost."""
    if finish.state is JobState.LOST:
        return finish
    error = AetherError("REVOKED", "cannot finish the job: its ticket was revoked").body()
    grant, code = finish.grant, finish.code
    return JobFinish(
        grant=grant, state=JobState.CANCELLED, error=error, exit=finish.exit, code=code, usage=finish.usage
    )


def _tells_more(finish: JobFinish) -> bool:
    """Whether it states an end that the authority did not see; a stop was recorded, so it may stand."""
    return finish.exit is not None and finish.exit.reason != SPAWNER_DIED and finish.state is not JobState.CANCELLED
