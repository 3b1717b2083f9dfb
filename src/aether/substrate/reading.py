"""Operations that read: jobs, results, logs, artifacts, receipts. All of them within the caller's tenant.

aurorad keeps the rows; the authority checks that what comes back belongs to the caller's tenant before it
answers. A job of another tenant is NOT_FOUND, never forbidden, so that ids cannot be probed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from aether.contract import ids
from aether.contract.calls import (
    ArtifactCall,
    Caller,
    FileReply,
    JobCall,
    ListArtifactsCall,
    ListJobsCall,
    LogsCall,
    Nothing,
    RawReply,
    StreamReply,
    UploadCall,
)
from aether.contract.errors import AetherError
from aether.contract.jobs import TERMINAL, JobState, JobView, check_labels
from aether.contract.labels import union
from aether.contract.limits import PAGE_ITEMS_MAX
from aether.contract.records import Receipt
from aether.contract.wire import (
    ArtifactInfo,
    ArtifactKey,
    ArtifactPage,
    ArtifactPut,
    ArtifactQuery,
    Empty,
    JobKey,
    JobPage,
    JobQuery,
    ModelList,
    Story,
)
from aether.substrate.access.access import Admission, Resource
from aether.substrate.audit.receipts import Receipts
from aether.substrate.book import Book
from aether.substrate.cells.logs import JobLogs
from aether.substrate.gate import Gate
from aether.substrate.orchestra import Orchestra

_START_POLL_S: Final = 0.01
_OUTCOME_S: Final = 5.0
_JSON: Final = "application/json"


class Reading:
    """Handlers of the read operations and of `artifact.put`."""

    def __init__(self, gate: Gate, book: Book, orchestra: Orchestra, receipts: Receipts, logs: JobLogs) -> None:
        self._gate = gate
        self._book = book
        self._orchestra = orchestra
        self._receipts = receipts
        self._logs = logs

    # ---- jobs

    async def job(self, caller: Caller, call: JobCall) -> JobView:
        return await self.view(caller, "job.get", call)

    async def jobs(self, caller: Caller, call: ListJobsCall) -> JobPage:
        admission = self._gate.admit(caller, "job.list", Resource(kind="job"))
        if call.cursor is not None:
            ids.parse(ids.JOB, call.cursor)
        query = JobQuery(
            tenant_id=admission.principal.tenant_id,
            states=call.state,
            cursor=call.cursor,
            limit=min(call.limit, PAGE_ITEMS_MAX),
        )
        page = await self._orchestra.link().call("job.list", query, JobPage)
        seen = tuple(view for view in page.jobs if _seen(view, admission))
        return page if len(seen) == len(page.jobs) else JobPage(jobs=seen, next_cursor=page.next_cursor)

    async def result(self, caller: Caller, call: JobCall) -> RawReply | FileReply:
        view = await self.view(caller, "job.result", call)
        if view.state not in TERMINAL:
            raise AetherError("NOT_READY", f"cannot give the result of {view.job_id}: it is {view.state}")
        if view.kind == "command" and view.state is JobState.SUCCEEDED:
            return RawReply(command_result(view), _JSON)
        if view.state is not JobState.SUCCEEDED or view.result_digest is None:
            raise AetherError("NO_RESULT", f"cannot give the result of {view.job_id}: it {view.state}")
        inline = await self._orchestra.inline_result(view)
        if inline is not None:
            return RawReply(inline, _JSON)
        return await self._artifact(view.result_digest, view.tenant_id, _JSON)

    async def story(self, caller: Caller, call: JobCall) -> Story:
        view = await self.view(caller, "job.story", call)
        return await self._orchestra.link().call("job.story", JobKey(job_id=view.job_id), Story)

    async def receipt(self, caller: Caller, call: JobCall) -> Receipt:
        view = await self.view(caller, "job.receipt", call)
        if view.state not in TERMINAL:
            raise AetherError("NOT_READY", f"cannot give the receipt of {view.job_id}: it is {view.state}")
        if view.outcome_index is None:
            raise AetherError("NOT_READY", f"cannot give the receipt of {view.job_id}: its outcome is being recorded")
        return self._receipts.build(view.job_id, self._book.log.read(view.outcome_index, 1)[0])

    async def logs(self, caller: Caller, call: LogsCall) -> StreamReply:
        view = await self.view(caller, "job.logs", JobCall(job_id=call.job_id))
        if view.kind != "command":
            return StreamReply(_nothing(), "text/plain; charset=utf-8")
        return StreamReply(self._output(view, call), "text/plain; charset=utf-8")

    # ---- artifacts and models

    async def put(self, caller: Caller, call: UploadCall) -> ArtifactInfo:
        """`artifact.put`; `call.fd` is ours to close."""
        try:
            admission = self._gate.admit(caller, "artifact.put", Resource(kind="artifact"))
            if not self._book.log.room():
                raise AetherError(
                    "DISK_FULL", "cannot keep the artifact: the disk of the state directory is almost full"
                )
            check_labels(call.labels)
            link = self._orchestra.link()
            body = ArtifactPut(
                token=await link.send_fd(call.fd),
                size_bytes=call.size_bytes,
                media_type=call.media_type,
                tenant_id=admission.principal.tenant_id,
                labels=union(call.labels, admission.labels),
            )
            return await link.call("artifact.put", body, ArtifactInfo)
        finally:
            os.close(call.fd)

    async def artifact(self, caller: Caller, call: ArtifactCall) -> FileReply:
        ids.parse_digest(call.digest)
        admission = self._gate.admit(caller, "artifact.get", Resource(kind="artifact", id=call.digest))
        return await self._artifact(call.digest, admission.principal.tenant_id)

    async def artifacts(self, caller: Caller, call: ListArtifactsCall) -> ArtifactPage:
        admission = self._gate.admit(caller, "artifact.list", Resource(kind="artifact"))
        query = ArtifactQuery(
            tenant_id=admission.principal.tenant_id,
            job_id=ids.parse(ids.JOB, call.job_id) if call.job_id is not None else None,
            cursor=call.cursor,
            limit=min(call.limit, PAGE_ITEMS_MAX),
        )
        return await self._orchestra.link().call("artifact.list", query, ArtifactPage)

    async def models(self, caller: Caller, call: Nothing) -> ModelList:
        self._gate.admit(caller, "model.list", Resource(kind="model"))
        return await self._orchestra.link().call("model.list", Empty(), ModelList)

    async def checkpoint(self, caller: Caller, call: Nothing) -> RawReply:
        self._gate.admit(caller, "audit.checkpoint", Resource(kind="audit"))
        return RawReply(self._book.log.published()[0].encode(), "text/plain; charset=utf-8")

    # ---- for the other parts of the authority

    async def view(self, caller: Caller, operation: str, call: JobCall) -> JobView:
        """Leave for a reading operation on a job, and its view; waits as the call says."""
        job_id = ids.parse(ids.JOB, call.job_id)
        admission = self._gate.admit(caller, operation, await self._resource(operation, job_id))
        view = await self._book.wait(job_id, call.wait_ms / 1000)
        return self._own(view or await self._orchestra.job(job_id), admission)

    async def _resource(self, operation: str, job_id: str) -> Resource:
        """The job as the policy sees it; whose an old one is, is asked only where the policy looks at it."""
        plain = Resource(kind="job", id=job_id)
        if not self._gate.looks_at(operation, "job") or self._book.remembers(job_id):
            return plain
        try:
            view = await self._orchestra.job(job_id)
        except AetherError as error:
            if error.code != "NOT_FOUND":
                raise
            return plain
        return Resource(kind="job", id=job_id, labels=view.labels, owner=view.principal, tenant=view.tenant_id)

    async def view_in_tenant(self, job_id: str, admission: Admission) -> JobView:
        """The job's view; raises NOT_FOUND when it is not of the caller's tenant."""
        return self._own(await self._orchestra.job(job_id), admission)

    def _own(self, view: JobView, admission: Admission) -> JobView:
        if view.tenant_id != admission.principal.tenant_id or not _seen(view, admission):
            raise AetherError("NOT_FOUND", f"cannot find job {view.job_id}")
        return view

    async def _artifact(self, digest: str, tenant_id: str, media_type: str | None = None) -> FileReply:
        link = self._orchestra.link()
        info = await link.call("artifact.get", ArtifactKey(digest=digest, tenant_id=tenant_id), ArtifactInfo)
        if info.token is None:
            raise AetherError("GONE", f"cannot read artifact {digest}: its bytes are gone")
        fd = await link.take_fd(info.token)
        return FileReply(fd, 0, info.size_bytes, media_type or info.media_type, digest)

    async def _output(self, view: JobView, call: LogsCall) -> AsyncIterator[bytes]:
        cell_id, exec_id = await self.executable(view, call.follow)
        if cell_id is None or exec_id is None:
            return
        async for chunk in self._logs.read(cell_id, exec_id, call.stream, call.cursor, call.follow):
            yield chunk

    async def executable(self, view: JobView, follow: bool) -> tuple[str | None, str | None]:
        """The job's cell and executable; a follower waits until the job starts or ends."""
        while (job := self._book.ledger.open.get(view.job_id)) is not None:
            if job.started is not None or not follow:
                return job.cell_id, job.exec_id
            await asyncio.sleep(_START_POLL_S)
        # The row may lag behind an outcome that is being made durable; whoever waits for that is told.
        ended = await self._book.wait(view.job_id, _OUTCOME_S)
        if ended is None:
            ended = view if view.state in TERMINAL else await self._orchestra.job(view.job_id)
        return ended.cell_id, ended.exec_id


def _seen(view: JobView, admission: Admission) -> bool:
    """Whether the ticket lets its bearer know of a job: one in an allocated cell is as narrow as that."""
    return view.cell is None or admission.sees(view.cell)


def command_result(view: JobView) -> bytes:
    """The result of a command: how it ended, what it left, what it used; all of it is in the outcome record."""
    return msgspec.json.encode(
        {"exit_code": view.exit_code, "signal": view.signal, "artifacts": view.artifacts, "usage": view.usage}
    )


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
