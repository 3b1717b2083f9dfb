"""Submitting a job: access -> budget -> intent and row -> 202, or the short way of a pure model job.

The long way writes the intent and the job row concurrently and answers when both are durable. The short way
(a model job whose caller waits) runs first, because it has no effect until its answer is released: decision
and outcome go into one durable batch, and only then does the answer leave.

An admitted intent whose row could not be kept gets the outcome ABANDONED at once.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Collection
from typing import Final

from msgspec.structs import replace

from aether.contract import ids, limits
from aether.contract.calls import Caller, SubmitCall, SubmittedJob
from aether.contract.canonical import digest_bytes, input_hash
from aether.contract.cells import Limits
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError, ErrorBody
from aether.contract.jobs import JobView, check_labels, parse_command, parse_model
from aether.contract.labels import ISOLATED, LOCAL_ONLY, check_stays, union
from aether.contract.network import NEEDED, NOTHING
from aether.contract.ports import Link
from aether.contract.records import BudgetRef, Record
from aether.contract.wire import Empty, JobRunReply, JobSubmit
from aether.substrate import entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.access.identity import Principal
from aether.substrate.access.questions import routed
from aether.substrate.allocations import Allocation
from aether.substrate.approvalbook import Ask
from aether.substrate.asking import Asking
from aether.substrate.book import Book, outcome_of
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.entries import Submission
from aether.substrate.execution import Execution
from aether.substrate.gate import Gate
from aether.substrate.labels import LabelDesk, explained, named_by
from aether.substrate.ledger import OpenJob, grant_of
from aether.substrate.metering.settle import grants, limits_of, reservation, settlement
from aether.substrate.orchestra import Orchestra, submitted
from aether.substrate.views import queued_view

_PURE_DEADLINE_S: Final = 30.0


class Submitter:
    """The `job.submit` operation."""

    def __init__(
        self,
        gate: Gate,
        book: Book,
        orchestra: Orchestra,
        execution: Execution,
        cells: CellSupervisor,
        house: CellHouse,
        asking: Asking,
        labels: LabelDesk,
    ) -> None:
        self._labels = labels
        self._gate = gate
        self._house = house
        self._asking = asking
        self._cells = cells
        self._book = book
        self._orchestra = orchestra
        self._execution = execution
        self._in_flight: dict[str, asyncio.Event] = {}

    async def submit(self, caller: Caller, call: SubmitCall, first: JobView | None = None) -> SubmittedJob:
        """Raises the AetherError of whatever refused it; nothing is charged then. `first` is the job that it replays,
        whose labels it has."""
        carried = dict.fromkeys(first.labels, first.job_id) if first is not None else {}
        submission = self._admit(caller, call, carried)
        artifacts, images = named_by(call.request)
        if artifacts or images:
            tenant_id = submission.admission.principal.tenant_id
            inherited = {**await self._labels.carried(tenant_id, artifacts, images), **carried}
            try:
                submission = self._admit(caller, call, inherited)
            except AetherError as error:
                raise explained(error, inherited) from error
        if first is not None:
            submission = dataclasses.replace(submission, replay_of=first.job_id)
        if submission.key_hash is None:
            return await self._run(submission, call.wait_ms)
        return await self._once(submission, submission.key_hash, call.wait_ms)

    def _admit(self, caller: Caller, call: SubmitCall, inherited: Collection[str]) -> Submission:
        """The request as it is admitted with the labels that it has and inherits."""
        request = call.request
        check_labels(request.labels)
        params, model = None, None
        if request.kind == "command":
            params, _ = parse_command(request)
            needed = (*params.require, *(NEEDED if params.network is not None else ()))
            if needed:
                self._cells.check_required(needed)
        else:
            model = parse_model(request).model
        cells = (params.cell,) if params is not None and params.cell is not None else ()
        wanted = params.wanted() if params is not None else NOTHING
        resource = Resource(
            kind=request.kind, op=request.op, model=model, labels=union(request.labels, inherited), cells=cells,
            raises=params is not None and not cells and params.limits.raises,
            hosts=wanted.hosts, credentials=wanted.credentials, paths=wanted.paths, **routed(request),
        )  # fmt: skip
        admission = self._gate.admit(caller, "job.submit", resource)
        principal = admission.principal
        key_hash = None
        if caller.idempotency_key is not None:
            key_hash = digest_bytes(f"{principal.tenant_id}\0{principal.name}\0{caller.idempotency_key}".encode())
        job_id = ids.new(ids.JOB)
        cell_id, cell, guest = None, params.limits if params is not None else None, {}
        if params is not None and params.cell is not None and not self._stands_for(key_hash):
            place, granted = self._house.for_guest(principal.tenant_id, params.cell, params.executable)
            cell = replace(granted, timeout_ms=params.limits.timeout_ms, grace_ms=params.limits.grace_ms)
            resource, admission = self._admit_entry(caller, resource, place, admission)
            cell_id, guest = place.cell_id, {"cell": place.name}
            guest |= {"executable": params.executable} if params.executable is not None else {}
        elif not cells and LOCAL_ONLY in resource.labels and request.kind == "command":
            self._cells.check_required(ISOLATED)
        check_stays(resource.labels, reaches=bool(resource.hosts), isolated=True, what="run the job")
        return Submission(
            job_id=job_id,
            caller=caller,
            request=request,
            admission=admission,
            budget=self._reservation(job_id, admission, cell, cell_id is not None),
            input_hash=input_hash(request.schema_version, request.kind, request.op, request.params, request.inputs),
            key_hash=key_hash,
            created=rfc3339(self._book.now_ns()),
            argv=params.argv if params is not None else None,
            cell_id=cell_id,
            guest=guest,
            ask=self._asking.ask(admission, call.approval_ms, resource.hosts, job_id),
            labels=resource.labels,
        )

    def _reservation(self, job_id: str, admission: Admission, cell: Limits | None, is_guest: bool) -> BudgetRef:
        """What the job holds; the memory of an allocated cell is charged to whoever allocated it."""
        tenant_id = admission.principal.tenant_id
        bounds = limits_of(admission.limits, tenant_id, self._book.accounts.tenant_limits(tenant_id))
        name = ids.sibling(ids.RESERVATION, job_id)
        held = reservation(name, admission.ticket.link_ids, bounds, admission.expires_ms, cell)
        return replace(held, grants=grants(cell, memory=False)) if cell is not None and is_guest else held

    def _admit_entry(
        self, caller: Caller, resource: Resource, place: Allocation, admission: Admission
    ) -> tuple[Resource, Admission]:
        """Whoever enters a cell may reach what the cell may, and reads what is in it: a narrower ticket must not gain
        by it, and a label must not get lost."""
        inside = self._house.request_of(place)
        labels = union(resource.labels, place.labels)
        check_stays(labels, reaches=False, isolated=inside.isolate_network, what=f"enter cell {place.name}")
        if inside.network is None and labels == resource.labels:
            return resource, admission
        asked = inside.network.wanted() if inside.network is not None else NOTHING
        wider = dataclasses.replace(
            resource, labels=labels, hosts=asked.hosts, credentials=asked.credentials, paths=asked.paths
        )
        entering = self._gate.admit(caller, "job.submit", wider)
        return wider, admission if entering.demand is None else entering

    def _stands_for(self, key_hash: str | None) -> bool:
        """Whether the key already stands for a job: a repetition enters no cell a second time."""
        return key_hash is not None and (
            key_hash in self._in_flight or self._book.ledger.remembered(key_hash, self._book.now_ns()) is not None
        )

    async def _once(self, submission: Submission, key_hash: str, wait_ms: int) -> SubmittedJob:
        """One job per key: a repeat waits for the first and gets its answer, without a second charge."""
        while (first := self._in_flight.get(key_hash)) is not None:
            await first.wait()
        now_ns = self._book.now_ns()
        known = self._book.ledger.remembered(key_hash, now_ns)
        if known is not None:
            if known.input_hash != submission.input_hash:
                raise AetherError(
                    "IDEMPOTENCY_CONFLICT",
                    f"cannot submit: the Idempotency-Key already stands for {known.job_id} with other input",
                    details={"job_id": known.job_id},
                )
            return await self._repeated(known.job_id, wait_ms)
        if not self._book.ledger.has_room_for_keys(now_ns):
            raise AetherError("BUSY", "cannot submit: too many idempotency keys in the window", retry_after_s=5)
        done = self._in_flight[key_hash] = asyncio.Event()
        try:
            return await self._run(submission, wait_ms)
        finally:
            del self._in_flight[key_hash]
            done.set()

    async def _run(self, submission: Submission, wait_ms: int) -> SubmittedJob:
        self._check_capacity(submission.admission.principal)
        self._book.accounts.reserve(submission.budget, runs=True)
        if submission.request.kind == "model" and wait_ms > 0 and submission.ask is None:
            return await self._run_pure(submission)
        return await self._queue(submission, wait_ms)

    def _check_capacity(self, principal: Principal) -> None:
        if not self._book.log.room():
            raise AetherError("DISK_FULL", "cannot submit: the disk of the state directory is almost full")
        if len(self._book.ledger.open) >= limits.JOBS_OPEN_MAX:
            raise AetherError("BUSY", "cannot submit: too many jobs are open", retry_after_s=1)
        self._book.quotas.check_job(principal.tenant_id, principal.name, len(self._book.ledger.open))
        self._orchestra.link()

    def _write_intent(self, submission: Submission) -> Record:
        try:
            return self._book.write(lambda index, time: entries.intent(self._gate.node, submission, index, time))
        except AetherError:
            self._give_up(submission)  # no record, no charge
            raise

    # ---- the long way

    async def _queue(self, submission: Submission, wait_ms: int) -> SubmittedJob:
        link = self._orchestra.link()
        intent = self._write_intent(submission)
        job = self._book.ledger.open[submission.job_id]
        job.argv, job.row_kept = submission.argv, asyncio.Event()
        last = intent if submission.ask is None else await self._asked(job, submission.ask)
        view = queued_view(intent, submission.argv)
        row = JobSubmit(grant=job.grant, request=submission.request, view=view, held=submission.ask is not None)
        kept, durable = await asyncio.gather(
            self._keep_row(job, link, row), self._book.durable(last), return_exceptions=True
        )
        if isinstance(durable, BaseException):
            raise durable
        if isinstance(kept, BaseException):
            raise await self._abandoned(job, kept)
        return await self._answer(submission.job_id, wait_ms, view)

    async def _asked(self, job: OpenJob, ask: Ask) -> Record:
        """The record of what the job waits for; a job of which that cannot be recorded ends."""
        try:
            return self._asking.for_job(job.intent, ask)
        except AetherError as error:
            raise await self._abandoned(job, error) from error

    async def _keep_row(self, job: OpenJob, link: Link, row: JobSubmit) -> None:
        await link.call("job.submit", row, Empty)
        if job.row_kept is not None:
            job.row_kept.set()

    async def _abandoned(self, job: OpenJob, cause: BaseException) -> AetherError:
        """Ends a job whose row was not kept; returns what the caller is told."""
        told = cause if isinstance(cause, AetherError) else AetherError("INTERNAL", f"cannot keep the job: {cause}")
        await self._execution.abandon(job, told.message)
        return AetherError(told.code, told.message, told.remedy, {"job_id": job.grant.job_id}, told.retry_after_s)

    async def _answer(self, job_id: str, wait_ms: int, queued: JobView | None = None) -> SubmittedJob:
        final = await self._book.wait(job_id, wait_ms / 1000)
        view = final or queued or await self._orchestra.job(job_id)
        return submitted(view, await self._result(view))

    async def _repeated(self, job_id: str, wait_ms: int) -> SubmittedJob:
        """The answer of the first submission: a model job that failed while its caller waited was a refusal."""
        answer = await self._answer(job_id, wait_ms)
        if wait_ms > 0 and answer.kind == "model" and answer.error is not None:
            raise engine_error(answer.error, job_id)
        return answer

    async def _result(self, view: JobView) -> bytes | None:
        """The inline result; none where its bytes died with both roles before any answer was released.

        The repeated submission still names the job then, and `job.result` says GONE.
        """
        try:
            return await self._orchestra.inline_result(view)
        except AetherError as error:
            if error.code != "GONE":
                raise
            return None

    # ---- the short way

    async def _run_pure(self, submission: Submission) -> SubmittedJob:
        book, job_id = self._book, submission.job_id
        draft = entries.intent(self._gate.node, submission, 0, submission.created)
        row = JobSubmit(
            grant=grant_of(draft),
            request=submission.request,
            view=queued_view(draft),
            batch_key="\0".join((draft.tenant_id or "", *draft.labels)),
        )
        kept = self._orchestra.expect_kept(job_id)
        try:
            async with asyncio.timeout(_PURE_DEADLINE_S):
                reply = await self._orchestra.link().call("job.run", row, JobRunReply)
        except TimeoutError:
            self._give_up(submission)
            raise AetherError("UNAVAILABLE", "cannot run the model job: no answer from the engine") from None
        except BaseException:
            self._give_up(submission)
            raise
        # From here on the log holds the job, whatever happens to its caller.
        intent = self._write_intent(submission)
        settled = settlement(submission.budget, reply.usage)
        outcome = book.write(lambda index, time: entries.pure_outcome(intent, reply, settled, index, time))
        try:
            await asyncio.gather(book.durable(outcome), kept)
        finally:
            self._orchestra.forget_kept(job_id)
        told = outcome_of(intent, outcome)
        book.publish(told)
        self._orchestra.tell_outcome(told)
        if reply.error is not None:
            raise engine_error(reply.error, job_id)
        return submitted(told.view, reply.result)

    def _give_up(self, submission: Submission) -> None:
        self._book.accounts.release(submission.budget)
        self._orchestra.forget_kept(submission.job_id)


def engine_error(body: ErrorBody, job_id: str) -> AetherError:
    """The refusal of a pure job, as its caller sees it, with the job it was recorded under."""
    error = AetherError.of(body)
    error.details = {**error.details, "job_id": job_id}
    return error
