"""What aurorad answers about jobs, results, artifacts and models; nothing here moves a job."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from aether.contract import ids, wire
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.limits import PAGE_ITEMS_MAX, RESULT_INLINE_BYTES_MAX
from aether.contract.ports import Handler, Link
from aether.contract.store import Store
from aether.orchestrator.artifacts.store import ArtifactStore
from aether.orchestrator.engines.model import ModelEngine
from aether.orchestrator.jobs import story
from aether.orchestrator.jobs.desk import Desk

PAGE_BYTES_MAX: Final = 192 * 1024
"""A page must fit in a frame; views with many artifacts are large, so the page may be shorter than its limit."""
_encode: Final = msgspec.msgpack.Encoder().encode


class Queries:
    """Handlers without effects on jobs. Reads of open jobs come from memory, the others from the store."""

    def __init__(
        self,
        store: Store,
        artifacts: ArtifactStore,
        desk: Desk,
        models: ModelEngine,
        clock_ns: Callable[[], int],
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._desk = desk
        self._models = models
        self._clock_ns = clock_ns

    def handlers(self, link: Callable[[], Link | None]) -> Mapping[str, tuple[type[msgspec.Struct], Handler]]:
        """The verbs; `link` is the connection that descriptors come and go by."""

        async def put(body: wire.ArtifactPut) -> wire.ArtifactInfo:
            return await self.artifact_put(_connected(link()), body)

        async def get(body: wire.ArtifactKey) -> wire.ArtifactInfo:
            return await self.artifact_get(_connected(link()), body)

        return {
            "job.get": (wire.JobKey, self.job_get),
            "job.list": (wire.JobQuery, self.job_list),
            "job.result": (wire.ResultKey, self.job_result),
            "job.story": (wire.JobKey, self.job_story),
            "job.request": (wire.JobKey, self.job_request),
            "artifact.put": (wire.ArtifactPut, put),
            "artifact.get": (wire.ArtifactKey, get),
            "artifact.list": (wire.ArtifactQuery, self.artifact_list),
            "model.list": (wire.Empty, self.model_list),
        }

    # ---- jobs

    async def job_get(self, body: wire.JobKey) -> JobView:
        row = self._desk.open.get(body.job_id) or await self._store.get(body.job_id)
        if row is None:
            raise _no_job(body.job_id)
        return row.view

    async def job_list(self, body: wire.JobQuery) -> wire.JobPage:
        limit = min(max(body.limit, 1), PAGE_ITEMS_MAX)
        cursor = None if body.cursor is None else ids.parse(ids.JOB, body.cursor)
        query = msgspec.structs.replace(body, limit=limit + 1, cursor=cursor)
        found = await self._store.list_jobs(query)
        shown = _fitting(found[:limit])
        more = len(found) > len(shown)
        return wire.JobPage(jobs=tuple(shown), next_cursor=shown[-1].job_id if more else None)

    async def job_result(self, body: wire.ResultKey) -> wire.ResultReply:
        if body.size_bytes > RESULT_INLINE_BYTES_MAX:
            return wire.ResultReply(result=None, digest=body.digest, size_bytes=body.size_bytes)
        result = await self._store.get_blob(body.digest)
        if result is None:
            raise AetherError("GONE", f"cannot give the result {body.digest}: its bytes were lost in a crash")
        return wire.ResultReply(result=result, digest=body.digest, size_bytes=body.size_bytes)

    async def job_story(self, body: wire.JobKey) -> wire.Story:
        view = await self.job_get(body)
        return story.tell(view.job_id, view.kind, await self._store.history(view.job_id))

    async def job_request(self, body: wire.JobKey) -> wire.KeptRequest:
        row = await self._store.get(body.job_id)
        if row is None:
            raise _no_job(body.job_id)
        if row.request is None:
            raise AetherError("GONE", f"cannot give the request of {body.job_id}: it is not kept")
        return wire.KeptRequest(request=row.request)

    # ---- artifacts

    async def artifact_put(self, link: Link, body: wire.ArtifactPut) -> wire.ArtifactInfo:
        fd = await link.take_fd(body.token)
        try:
            kept = await self._artifacts.ingest(fd)
        finally:
            os.close(fd)
        if kept.size_bytes != body.size_bytes:
            raise AetherError(
                "BAD_REQUEST", f"cannot keep the upload: {kept.size_bytes} bytes came, {body.size_bytes} were announced"
            )
        info = wire.ArtifactInfo(
            digest=kept.digest,
            size_bytes=kept.size_bytes,
            media_type=body.media_type,
            created_at=rfc3339(self._clock_ns()),
            tenant_id=body.tenant_id,
            labels=body.labels,
        )
        await self._artifacts.index(info)
        return info

    async def artifact_get(self, link: Link, body: wire.ArtifactKey) -> wire.ArtifactInfo:
        info = await self._store.find_artifact(ids.parse_digest(body.digest), body.tenant_id)
        if info is None:
            raise AetherError("NOT_FOUND", f"cannot find artifact {body.digest}")
        fd, _ = await self._artifacts.open_fd(info.digest)
        try:
            return msgspec.structs.replace(info, token=await link.send_fd(fd))
        finally:
            os.close(fd)

    async def artifact_list(self, body: wire.ArtifactQuery) -> wire.ArtifactPage:
        limit = min(max(body.limit, 1), PAGE_ITEMS_MAX)
        if body.cursor is not None and not (body.cursor.isascii() and body.cursor.isdigit() and len(body.cursor) < 19):
            raise AetherError("BAD_FIELD", f"cannot go on from cursor {body.cursor[:80]!r}: it is not one of ours")
        found = await self._store.list_artifacts(msgspec.structs.replace(body, limit=limit + 1))
        shown = found[:limit]
        more = len(found) > limit
        return wire.ArtifactPage(artifacts=tuple(info for _, info in shown), next_cursor=shown[-1][0] if more else None)

    # ---- models

    async def model_list(self, _: wire.Empty) -> wire.ModelList:
        return await self._models.list()


def _fitting(views: list[JobView]) -> list[JobView]:
    """As many of `views` as fit in a frame, at least one."""
    size = 0
    shown: list[JobView] = []
    for view in views:
        size += len(_encode(view))
        if shown and size > PAGE_BYTES_MAX:
            break
        shown.append(view)
    return shown


def _connected(link: Link | None) -> Link:
    if link is None:
        raise AetherError("UNAVAILABLE", "cannot hand over a descriptor: not connected")
    return link


def _no_job(job_id: str) -> AetherError:
    return AetherError("NOT_FOUND", f"cannot find job {job_id[:80]!r}")
