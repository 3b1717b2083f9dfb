"""aetherd's side of the link to aurorad: who is connected, and what is asked of it.

At most one aurorad is connected; a newer connection replaces an older one. While none is, calls fail with
UNAVAILABLE and a Retry-After; nothing is queued here.
"""

from __future__ import annotations

import asyncio

import msgspec

from aether.contract.calls import SubmittedJob
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.limits import RESULT_INLINE_BYTES_MAX
from aether.contract.ports import Link
from aether.contract.wire import CellExited, JobKept, JobKey, JobOutcome, ResultKey, ResultReply


class Orchestra:
    """The connected aurorad, if any."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._kept: dict[str, asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"<Orchestra connected={self.connected} awaiting={len(self._kept)}>"

    @property
    def connected(self) -> bool:
        return self._link is not None and not self._link.closed

    def attach(self, link: Link) -> None:
        """Takes a connection that has shaken hands."""
        old, self._link = self._link, link
        if old is not None and not old.closed:
            old.close()

    def detach(self, link: Link) -> None:
        """Forgets a connection that ended; those who wait for a row learn that it may not be kept."""
        if self._link is not link:
            return
        self._link = None
        for future in self._kept.values():
            if not future.done():
                future.set_exception(AetherError("UNAVAILABLE", "cannot keep the job: aurorad went away"))

    def link(self) -> Link:
        """The connection; raises UNAVAILABLE."""
        if self._link is None or self._link.closed:
            raise AetherError("UNAVAILABLE", "cannot reach aurorad: it is not connected", retry_after_s=1)
        return self._link

    # ---- rows of pure jobs

    def expect_kept(self, job_id: str) -> asyncio.Future[None]:
        """A future for the event that the row and blob of a pure job are durable."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept[job_id] = future
        return future

    def forget_kept(self, job_id: str) -> None:
        future = self._kept.pop(job_id, None)
        if future is not None and not future.cancel() and not future.cancelled():
            future.exception()

    def kept(self, event: JobKept) -> None:
        """Event `job.kept`."""
        future = self._kept.get(event.job_id)
        if future is None or future.done():
            return
        if event.error is None:
            future.set_result(None)
        else:
            future.set_exception(AetherError.of(event.error))

    # ---- telling and asking

    def tell_outcome(self, outcome: JobOutcome) -> None:
        if self._link is not None:
            self._link.notify("job.outcome", outcome)

    def tell_exit(self, event: CellExited) -> None:
        if self._link is not None:
            self._link.notify("cell.exited", event)

    async def job(self, job_id: str) -> JobView:
        return await self.link().call("job.get", JobKey(job_id=job_id), JobView)

    async def inline_result(self, view: JobView) -> bytes | None:
        """The result text of a succeeded job when it is small enough to answer inline."""
        size_bytes = view.result_bytes or 0
        if view.state is not JobState.SUCCEEDED or view.result_digest is None or size_bytes > RESULT_INLINE_BYTES_MAX:
            return None
        key = ResultKey(digest=view.result_digest, size_bytes=size_bytes)
        return (await self.link().call("job.result", key, ResultReply)).result


def submitted(view: JobView, result: bytes | None) -> SubmittedJob:
    """The answer to a submission: the view, and the result inline when there is one."""
    fields = {name: getattr(view, name) for name in JobView.__struct_fields__}
    return SubmittedJob(**fields, result=None if result is None else msgspec.Raw(result))
