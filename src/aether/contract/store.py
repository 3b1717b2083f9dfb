"""The job store port: what aurorad keeps, and the verbs of whoever keeps it.

Semantics that every implementation shares (`tests/conformance/store` holds them)
- A write is durable when its awaitable resolves. Writes take effect in the order of the calls, so a caller
  may issue several and await only the last. Issuing is synchronous: the row is on its way when the call
  returns, before anything is awaited.
- `submit` is idempotent per job id. `advance` is a compare-and-set: it applies only when the stored row has
  the same attempt and the revision just before the new one; so a claim is an advance out of `queued`, and
  of two claimants one wins. Both are safe to repeat.
- A write that fails for want of space raises DISK_FULL where nothing was promised yet (`submit`, `put_blob`,
  `add_artifact`) and nothing of it is kept. Every other failed write ends the process through the `on_fatal`
  given at construction: after a failed fsync the state of the file is unknown (PostgreSQL's fsyncgate).
- Reads see what is durable, never block the event loop, and may run while a write waits for the disk.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Literal, Protocol

import msgspec

from aether.contract.cells import ExecEnd, ExitStatus, Usage
from aether.contract.errors import ErrorBody
from aether.contract.jobs import ArtifactRef, JobRequest, JobState, JobView
from aether.contract.records import CodeRef
from aether.contract.wire import ArtifactInfo, ArtifactQuery, Grant, JobQuery

Phase = Literal["held", "queued", "launching", "running", "collecting", "finishing", "done"]
"""Where a job is on its way; finer than JobState."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What aurorad makes of a job's end: the body of `job.finish` without the grant."""

    state: JobState
    exit: ExitStatus | None = None
    error: ErrorBody | None = None
    result_digest: str | None = None
    result_bytes: int | None = None
    artifacts: tuple[ArtifactRef, ...] = ()
    model_id: str | None = None
    model_version: str | None = None
    code: CodeRef | None = None
    usage: Usage | None = None
    timings_us: dict[str, int] = {}


class Facts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was learned about the attempt so far. `stop_grace_ms` is set once a stop was asked for; `collects`: it
    declared outputs, so there is something to look for when it has ended."""

    collects: bool = True
    cell_id: str | None = None
    exec_id: str | None = None
    started_at: str | None = None
    stop_grace_ms: int | None = None
    end: ExecEnd | None = None
    verdict: Verdict | None = None


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is kept. `revision` counts its changes; `request` is null where it is not needed again."""

    job_id: str
    tenant_id: str
    node_id: str
    attempt: int
    revision: int
    kind: str
    effect: str
    labels: tuple[str, ...]
    phase: Phase
    state: JobState
    batch_key: str
    grant: Grant | None
    view: JobView
    facts: Facts = Facts()
    request: JobRequest | None = None
    intent_index: int | None = None
    outcome_index: int | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a job's history: the machine's event as JSON text, at `time` (RFC 3339)."""

    time: str
    event: bytes


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """Up to RESULT_INLINE_BYTES_MAX bytes, kept under their digest."""

    digest: str
    data: bytes


class Store(Protocol):
    """See the module's head for durability, order and idempotence."""

    async def open(self) -> None:
        """Opens or creates the store and brings its schema up to date; raises STATE_UNUSABLE."""
        ...

    async def close(self) -> None:
        """Waits for the writes that were issued, then lets go of the files."""
        ...

    # ---- jobs

    def submit(self, row: JobRow, entry: Entry, blob: Blob | None = None) -> Awaitable[bool]:
        """Keeps a new row (its `request` too); False when the job is there already, which changes nothing."""
        ...

    def advance(self, row: JobRow, entry: Entry, lazy: bool = False) -> Awaitable[bool]:
        """Replaces a row but for its request; False when its attempt or revision is not the expected one.

        `lazy`: nothing waits for it, so it may wait a little for a write that does.
        """
        ...

    def drop(self, job_ids: Sequence[str]) -> Awaitable[None]:
        """Forgets rows that have no outcome, with their history. Rows with an outcome stay."""
        ...

    async def get(self, job_id: str) -> JobRow | None: ...

    async def list_jobs(self, query: JobQuery) -> list[JobView]:
        """Newest first, at most `query.limit`, strictly older than `query.cursor`."""
        ...

    async def open_jobs(self) -> list[JobRow]:
        """Every row that is not `done`, oldest first, without requests."""
        ...

    async def history(self, job_id: str) -> list[Entry]:
        """In order; empty for an unknown job."""
        ...

    # ---- the audit log, as far as it was applied

    async def applied_index(self) -> int:
        """Every outcome below this log index was applied; 0 at first."""
        ...

    def set_applied_index(self, index: int) -> Awaitable[None]:
        """Raises the applied index; a lower one changes nothing."""
        ...

    # ---- blobs and the artifact index

    def put_blob(self, blob: Blob) -> Awaitable[None]: ...

    async def get_blob(self, digest: str) -> bytes | None: ...

    def add_artifact(self, info: ArtifactInfo) -> Awaitable[None]:
        """Indexes an artifact under (tenant, digest, job, name); the same key again only adds its labels."""
        ...

    async def find_artifact(self, digest: str, tenant_id: str | None = None) -> ArtifactInfo | None:
        """The oldest row of the digest, of one tenant if named; its labels are those of all matching rows."""
        ...

    async def list_artifacts(self, query: ArtifactQuery) -> list[tuple[str, ArtifactInfo]]:
        """Newest first with each row's cursor, at most `query.limit`, strictly after `query.cursor`."""
        ...
