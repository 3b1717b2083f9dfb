"""The Store port in memory: the double for tests, and the reference for what the verbs mean.

Writes take effect at once and are "durable" within the object: it outlives the service that uses it, so a
test may kill the one and keep the other. It has no disk to fill: `full` stands in for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import msgspec

from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.store import Blob, Entry, JobRow
from aether.contract.wire import ArtifactInfo, ArtifactQuery, JobQuery

T = TypeVar("T")


class MemoryStore:
    """Implements `aether.contract.store.Store`."""

    def __init__(self) -> None:
        self.full = False
        self._jobs: dict[str, JobRow] = {}
        self._history: dict[str, list[Entry]] = {}
        self._blobs: dict[str, bytes] = {}
        self._artifacts: list[ArtifactInfo] = []
        self._applied = 0

    def __repr__(self) -> str:
        return f"<MemoryStore jobs={len(self._jobs)} blobs={len(self._blobs)} artifacts={len(self._artifacts)}>"

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None

    # ---- jobs

    def submit(self, row: JobRow, entry: Entry, blob: Blob | None = None) -> Awaitable[bool]:
        if self.full:
            return _refused()
        if row.job_id in self._jobs:
            return _done(False)
        self._jobs[row.job_id] = row
        self._history[row.job_id] = [entry]
        if blob is not None:
            self._blobs.setdefault(blob.digest, blob.data)
        return _done(True)

    def advance(self, row: JobRow, entry: Entry, lazy: bool = False) -> Awaitable[bool]:
        old = self._jobs.get(row.job_id)
        if old is None or (old.attempt, old.revision) != (row.attempt, row.revision - 1):
            return _done(False)
        self._jobs[row.job_id] = msgspec.structs.replace(row, request=old.request)
        self._history[row.job_id].append(entry)
        return _done(True)

    def drop(self, job_ids: Sequence[str]) -> Awaitable[None]:
        for job_id in job_ids:
            row = self._jobs.get(job_id)
            if row is not None and row.outcome_index is None:
                del self._jobs[job_id], self._history[job_id]
        return _done(None)

    async def get(self, job_id: str) -> JobRow | None:
        return self._jobs.get(job_id)

    async def list_jobs(self, query: JobQuery) -> list[JobView]:
        found = [
            row.view
            for job_id, row in sorted(self._jobs.items(), reverse=True)
            if row.tenant_id == query.tenant_id
            and (query.cursor is None or job_id < query.cursor)
            and (not query.states or row.state in query.states)
        ]
        return found[: query.limit]

    async def open_jobs(self) -> list[JobRow]:
        found = [row for _, row in sorted(self._jobs.items()) if row.phase != "done"]
        return [msgspec.structs.replace(row, request=None) for row in found]

    async def history(self, job_id: str) -> list[Entry]:
        return list(self._history.get(job_id, ()))

    # ---- the audit log

    async def applied_index(self) -> int:
        return self._applied

    def set_applied_index(self, index: int) -> Awaitable[None]:
        self._applied = max(self._applied, index)
        return _done(None)

    # ---- blobs and artifacts

    def put_blob(self, blob: Blob) -> Awaitable[None]:
        if self.full:
            return _refused()
        self._blobs.setdefault(blob.digest, blob.data)
        return _done(None)

    async def get_blob(self, digest: str) -> bytes | None:
        return self._blobs.get(digest)

    def add_artifact(self, info: ArtifactInfo) -> Awaitable[None]:
        if self.full:
            return _refused()
        for at, other in enumerate(self._artifacts):
            if _key(info) == _key(other):
                labels = tuple(sorted({*other.labels, *info.labels}))
                self._artifacts[at] = msgspec.structs.replace(other, labels=labels)
                return _done(None)
        self._artifacts.append(info)
        return _done(None)

    async def find_artifact(self, digest: str, tenant_id: str | None = None) -> ArtifactInfo | None:
        found = [a for a in self._artifacts if a.digest == digest and tenant_id in (None, a.tenant_id)]
        if not found:
            return None
        labels = sorted({label for info in found for label in info.labels})
        return msgspec.structs.replace(found[0], labels=tuple(labels))

    async def list_artifacts(self, query: ArtifactQuery) -> list[tuple[str, ArtifactInfo]]:
        end = len(self._artifacts) if query.cursor is None else int(query.cursor)
        found = [
            (str(seq), info)
            for seq, info in reversed(list(enumerate(self._artifacts[:end])))
            if info.tenant_id == query.tenant_id and query.job_id in (None, info.job_id)
        ]
        return found[: query.limit]


def _key(info: ArtifactInfo) -> tuple[str, str, str, str]:
    return info.digest, info.tenant_id, info.job_id or "", info.name or ""


def _done(value: T) -> Awaitable[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def _refused() -> Awaitable[T]:
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_exception(AetherError("DISK_FULL", "cannot keep it in the job store: it is full"))
    return future
