"""Verbs between aetherd and aurorad, and their bodies. Envelopes are msgpack arrays on a framed stream.

`[REQUEST, id, verb, body]`, `[REPLY, id, null, body]`, `[ERROR, id, null, ErrorBody]`, `[EVENT, 0, verb, body]`.
The first call on a connection is `hello`; different protocol versions refuse each other. aurorad connects
to aetherd. Descriptors cross on a SEQPACKET side socket, which the listener hands over as the first byte's
SCM_RIGHTS, and are named in bodies by integer tokens.

A verb that changes something carries the key that makes it idempotent: job id and attempt.
"""

from __future__ import annotations

from typing import Any

import msgspec

from aether.contract.cells import ExecEnd, ExitStatus, Usage
from aether.contract.errors import ErrorBody
from aether.contract.jobs import ArtifactRef, JobRequest, JobState, JobView
from aether.contract.records import CodeRef, Record

REQUEST, REPLY, ERROR, EVENT = 0, 1, 2, 3


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Version handshake: the first call on a link, both ways."""

    role: str
    protocol_version: int
    version: str
    node_id: str = ""


class Empty(msgspec.Struct, frozen=True):
    """No parameters, or nothing to answer."""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """Leave to act for one attempt of one admitted job; aetherd checks every use against its open jobs."""

    grant_id: str
    job_id: str
    attempt: int
    reservation_id: str


# ---- aetherd -> aurorad


class JobSubmit(msgspec.Struct, frozen=True, kw_only=True):
    """`job.submit`: keep the row; the reply means it is durable. Also the body of `job.run` (pure model jobs)."""

    grant: Grant
    request: JobRequest
    view: JobView
    batch_key: str = ""
    """Tenant and labels: a runtime never mixes two keys in one batch."""
    held: bool = False
    """It waits for an approval: nothing of it is done before `job.release`."""


class JobRunReply(msgspec.Struct, frozen=True, kw_only=True):
    """`job.run`: the result of a pure model job, before it is durable; event `job.kept` follows.

    `result` is JSON text, null when it is too large to be inline; `error` is set when the job failed.
    """

    state: JobState
    result: bytes | None
    result_digest: str | None
    result_bytes: int | None
    error: ErrorBody | None
    model_id: str | None
    model_version: str | None
    code: CodeRef
    usage: Usage
    timings_us: dict[str, int]


class JobKey(msgspec.Struct, frozen=True, kw_only=True):
    """Names a job; `job.get`, `job.story`, `job.request`, and `job.release`: its approval was granted."""

    job_id: str


class KeptRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`job.request`: the request as it was submitted, while it is kept."""

    request: JobRequest


class JobKept(msgspec.Struct, frozen=True, kw_only=True):
    """Event `job.kept`: the row and blob of a job answered by `job.run` are durable, or cannot be (`error`)."""

    job_id: str
    error: ErrorBody | None = None


class JobOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Event `job.outcome` to aurorad: the outcome record of a job is durable at `log_index`."""

    view: JobView
    log_index: int


class JobStop(msgspec.Struct, frozen=True, kw_only=True):
    """`job.stop`: cancel a queued job or stop a running one; the grace lies between SIGTERM and SIGKILL."""

    job_id: str
    grace_ms: int


class JobQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`job.list`: newest first, rows after `cursor` (a job id); empty filters mean all."""

    tenant_id: str
    states: tuple[JobState, ...] = ()
    cursor: str | None = None
    limit: int = 50


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    jobs: tuple[JobView, ...]
    next_cursor: str | None


class ResultKey(msgspec.Struct, frozen=True, kw_only=True):
    """`job.result`: the result that the outcome names; aetherd knows it before the row does."""

    digest: str
    size_bytes: int


class ResultReply(msgspec.Struct, frozen=True, kw_only=True):
    """`job.result`: JSON text inline up to RESULT_INLINE_BYTES_MAX, else only the reference."""

    result: bytes | None
    digest: str
    size_bytes: int


class ArtifactKey(msgspec.Struct, frozen=True, kw_only=True):
    """`artifact.get`: an artifact as far as the tenant has it; another tenant's is NOT_FOUND."""

    digest: str
    tenant_id: str


class ArtifactPut(msgspec.Struct, frozen=True, kw_only=True):
    """`artifact.put`: take the bytes behind descriptor `token`; `size_bytes` as the sender counted."""

    token: int
    size_bytes: int
    media_type: str
    tenant_id: str
    labels: tuple[str, ...] = ()


class ArtifactInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact in the store. `token` names its descriptor in the reply to `artifact.get`, else null."""

    digest: str
    size_bytes: int
    media_type: str
    created_at: str
    tenant_id: str
    labels: tuple[str, ...] = ()
    job_id: str | None = None
    name: str | None = None
    token: int | None = None


class ArtifactQuery(msgspec.Struct, frozen=True, kw_only=True):
    tenant_id: str
    job_id: str | None = None
    cursor: str | None = None
    limit: int = 50


class ArtifactPage(msgspec.Struct, frozen=True, kw_only=True):
    artifacts: tuple[ArtifactInfo, ...]
    next_cursor: str | None


class StoryLine(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a job's story: what happened to the machine, when."""

    time: str
    event: str
    text: str


class Story(msgspec.Struct, frozen=True, kw_only=True):
    job_id: str
    lines: tuple[StoryLine, ...]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model package in the store and, when it is served, its worker's state."""

    model_id: str
    version: str
    digest: str
    state: str
    ops: tuple[str, ...]
    schema: dict[str, Any] = {}


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelInfo, ...]


class RoleHealth(msgspec.Struct, frozen=True, kw_only=True):
    """`health`: one role's state; `ok` is false with a `reason`."""

    role: str
    ok: bool
    version: str
    reason: str | None = None
    facts: dict[str, Any] = {}


class MetricsReply(msgspec.Struct, frozen=True, kw_only=True):
    """`metrics`: Prometheus text exposition of the role."""

    text: bytes


# ---- aurorad -> aetherd


class CellLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.launch`: start the job's cell under `grant`, once per attempt.

    `request` must be the admitted one: its input hash is compared with the intent's, and the authority itself
    makes the cell of it. Inputs are descriptors (`tokens`), one per input file, in order. `labels` are those of
    the request and of its inputs. `again`: this attempt may have been launched before a crash.
    """

    grant: Grant
    request: JobRequest
    labels: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    again: bool = False


class CellLaunched(msgspec.Struct, frozen=True, kw_only=True):
    """The cell runs; `job.started` is recorded. `channel` is the token of the stream socket, if asked for."""

    cell_id: str
    exec_id: str
    started_at: str
    plan_digest: str | None
    channel: int | None = None


class CellKey(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.free`: the cell of a finished job; answers when nothing of it is left."""

    grant: Grant
    cell_id: str


class CellStop(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.stop`: SIGTERM, grace, then the whole cell is killed; the end arrives as event `cell.exited`."""

    grant: Grant
    cell_id: str
    grace_ms: int


class CellCollect(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.collect`: regular files in the work directory that match the globs, with bounds applied."""

    grant: Grant
    cell_id: str
    globs: tuple[str, ...]


class CellFile(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int


class CellFiles(msgspec.Struct, frozen=True, kw_only=True):
    files: tuple[CellFile, ...]
    refused: dict[str, str] = {}
    """Paths that matched and were refused, with the reason (symlink, device, too large, ...)."""
    labels: tuple[str, ...] = ()
    """What an allocated cell carries by now, which others may have brought in."""


class CellOpen(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.open`: a read-only descriptor of one collected file; answered by `Token`."""

    grant: Grant
    cell_id: str
    path: str


class Token(msgspec.Struct, frozen=True, kw_only=True):
    token: int


class CellExited(msgspec.Struct, frozen=True, kw_only=True):
    """Event `cell.exited` to aurorad; repeated after a reconnect until the job is finished."""

    job_id: str
    attempt: int
    end: ExecEnd


class JobFinish(msgspec.Struct, frozen=True, kw_only=True):
    """`job.finish`: what aurorad made of the end; aetherd adds what it measured, records and settles.

    Answered by JobOutcome once the record is durable. Idempotent per job and attempt. `exit` and the usage of
    a cell are aetherd's own; the fields from `model_id` on are for jobs that an engine answered.
    """

    grant: Grant
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


class WorkerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """`worker.launch`: a long-lived job of the node itself that serves a model package in a cell.

    aetherd admits it under the node's own principal, records it, launches it with a channel and answers
    CellLaunched with the grant under which it is stopped and finished.
    """

    model_id: str
    model_version: str
    model_digest: str
    package_dir: str


class WorkerLaunched(msgspec.Struct, frozen=True, kw_only=True):
    grant: Grant
    cell: CellLaunched


class OpenJob(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is not terminal, for `reconcile`."""

    job_id: str
    attempt: int
    state: JobState


class Reconcile(msgspec.Struct, frozen=True, kw_only=True):
    """`reconcile`: after every connect, aurorad states where it stands and learns what is true.

    In pages of at most RECONCILE_JOBS_MAX rows, so that each fits a frame; only after the `last` one are
    intents without a row abandoned, and only then is new work sent.
    """

    applied_index: int
    open_jobs: tuple[OpenJob, ...]
    last: bool = True


class LiveCell(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that lives, or ended without being finished (`end` set)."""

    grant: Grant
    cell_id: str
    exec_id: str
    started_at: str
    end: ExecEnd | None = None


class Reconciled(msgspec.Struct, frozen=True, kw_only=True):
    """About one page. `drop`: rows without an intent. `grants`: for open rows. `cells`: of its rows, and on the
    last page those without a row (workers). `held`: its rows that wait for an approval. Outcomes follow as pages of
    `log.read` from `applied_index`."""

    drop: tuple[str, ...]
    grants: tuple[Grant, ...]
    cells: tuple[LiveCell, ...]
    log_size: int
    held: tuple[str, ...] = ()


class LogRead(msgspec.Struct, frozen=True, kw_only=True):
    """`log.read`: job records from `start` (a log index) on, in order, bounded by a frame."""

    start: int
    limit: int = 200


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    records: tuple[Record, ...]
    next_index: int
