"""The operations table: everything the substrate does for a caller, once, as data.

Each row states the operation's name, its spelling over HTTP, request and reply types, who may ask, what it
leaves behind, whether repeating it is harmless, how it streams, and which error codes it may answer besides
those in COMMON_ERRORS. Interfaces (`api.http`, `client`, `cli`, `/openapi.json`, docs/api.md) are spellings
of this table and hold no list of their own; the authority implements one handler per name.

Invariants (tests hold them): names and (method, path) pairs are unique; every error code is in
`contract.errors.KINDS`; an operation that is not `read` accepts an Idempotency-Key or is idempotent by nature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from aether.api import params
from aether.contract import calls, limits, wire
from aether.contract.errors import ErrorBody
from aether.contract.jobs import Effect, JobRequest, JobView
from aether.contract.records import Receipt

Access = Literal["open", "read", "submit", "control"]
ACCESS: Final[Mapping[str, str]] = {
    "open": "any principal that can connect",
    "read": "a principal whose ticket and the policy allow reading its tenant's objects",
    "submit": "a principal whose ticket and the policy allow this job; spends one `ops` of the budget",
    "control": "a principal whose ticket and the policy allow changing the tenant's objects; spends one `ops`",
}
Streaming = Literal["none", "server", "upload"]
Body = Literal["none", "json", "optional_json", "raw"]

COMMON_ERRORS: Final = (
    "BAD_REQUEST",
    "UNAUTHENTICATED",
    "BAD_TICKET",
    "TICKET_EXPIRED",
    "TICKET_REVOKED",
    "TICKET_DENIED",
    "POLICY_DENIED",
    "REQUEST_TIMEOUT",
    "TOO_LARGE",
    "HEADERS_TOO_LARGE",
    "BUSY",
    "UNAVAILABLE",
    "DRAINING",
    "INTERNAL",
    "PROTOCOL",
)
_WRITE_ERRORS: Final = ("BUDGET_EXHAUSTED", "DISK_FULL")
_JSON_ERRORS: Final = ("BAD_JSON", "BAD_FIELD", "MEDIA_TYPE")
_MODEL_ERRORS: Final = (
    "NO_SUCH_MODEL", "NONFINITE", "SHAPE", "UNIT", "DT_NONPOSITIVE", "DT_OUT_OF_RANGE", "STATE_MODEL_MISMATCH",
    "ENGINE_DIED",
)  # fmt: skip
_CELL_ERRORS: Final = ("LEVEL_UNMET", "BAD_PLAN", "CELL_LIMIT", "CELL_FAILED")


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorBody
    request_id: str


class StopBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `job.stop`."""

    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One row. `request` is what the handler gets: path arguments and query parameters fill its fields, the
    decoded body fills `body_field`, or its own fields when that is empty.
    """

    name: str
    method: str
    path: str
    summary: str
    request: type
    reply: type
    access: Access
    effect: Effect
    idempotent: bool
    aliases: tuple[str, ...] = ()
    query: tuple[params.Param, ...] = ()
    body: Body = "none"
    body_type: type | None = None
    body_field: str = ""
    streaming: Streaming = "none"
    descriptor: bool = False
    media_type: str = "application/json"
    statuses: tuple[int, ...] = (200,)
    errors: tuple[str, ...] = ()

    @property
    def all_errors(self) -> tuple[str, ...]:
        """Every code this operation may answer."""
        return tuple(dict.fromkeys((*COMMON_ERRORS, *self.errors)))

    @property
    def path_argument(self) -> str | None:
        """The one argument in the path, `job_id` or `digest`, if there is one."""
        return self.path.partition("{")[2].partition("}")[0] or None


_JOB_PATH: Final = "/v0/jobs/{job_id}"
_JOB_ERRORS: Final = ("BAD_ID", "NOT_FOUND")

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="health",
        method="GET",
        path="/v0/health",
        aliases=("/healthz",),
        summary="Whether the node works: versions and the state of every role.",
        request=calls.Nothing,
        reply=calls.Health,
        access="open",
        effect="read",
        idempotent=True,
    ),
    Operation(
        name="metrics",
        method="GET",
        path="/v0/metrics",
        summary="Metrics of all roles in the Prometheus text format.",
        request=calls.Nothing,
        reply=calls.RawReply,
        access="read",
        effect="read",
        idempotent=True,
        media_type="text/plain",
    ),
    Operation(
        name="job.submit",
        method="POST",
        path="/v0/jobs",
        aliases=("/jobs",),
        summary="Submit a job. 202: intent and row are durable; 200: it is terminal already.",
        request=calls.SubmitCall,
        reply=calls.SubmittedJob,
        access="submit",
        effect="cell",
        idempotent=False,
        query=(params.WAIT,),
        body="json",
        body_type=JobRequest,
        body_field="request",
        statuses=(202, 200),
        errors=(
            *_JSON_ERRORS,
            *_WRITE_ERRORS,
            *_MODEL_ERRORS,
            *_CELL_ERRORS,
            "IDEMPOTENCY_CONFLICT",
            "NOT_FOUND",
            "BAD_ID",
        ),
    ),
    Operation(
        name="job.list",
        method="GET",
        path="/v0/jobs",
        aliases=("/jobs",),
        summary="The tenant's jobs, newest first.",
        request=calls.ListJobsCall,
        reply=wire.JobPage,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.STATE, params.JOB_CURSOR, params.LIMIT),
        errors=("BAD_ID",),
    ),
    Operation(
        name="job.get",
        method="GET",
        path=_JOB_PATH,
        aliases=("/jobs/{job_id}",),
        summary="One job as it stands.",
        request=calls.JobCall,
        reply=JobView,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=_JOB_ERRORS,
    ),
    Operation(
        name="job.result",
        method="GET",
        path=f"{_JOB_PATH}/result",
        summary="The result of a succeeded job, as JSON.",
        request=calls.JobCall,
        reply=calls.RawReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        descriptor=True,
        errors=(*_JOB_ERRORS, "NOT_READY", "NO_RESULT", "GONE"),
    ),
    Operation(
        name="job.logs",
        method="GET",
        path=f"{_JOB_PATH}/logs",
        summary="What the executable wrote, as bytes; with `follow` until it ends.",
        request=calls.LogsCall,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.FOLLOW, params.STREAM, params.OFFSET),
        streaming="server",
        media_type="text/plain",
        errors=(*_JOB_ERRORS, "NOT_READY", "NO_RESULT", "GONE"),
    ),
    Operation(
        name="job.receipt",
        method="GET",
        path=f"{_JOB_PATH}/receipt",
        summary="The job's receipt: its audit records with proofs, checkable offline.",
        request=calls.JobCall,
        reply=Receipt,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=(*_JOB_ERRORS, "NOT_READY"),
    ),
    Operation(
        name="job.story",
        method="GET",
        path=f"{_JOB_PATH}/story",
        summary="What happened to the job, step by step.",
        request=calls.JobCall,
        reply=wire.Story,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=_JOB_ERRORS,
    ),
    Operation(
        name="job.stop",
        method="POST",
        path=f"{_JOB_PATH}/stop",
        aliases=("/jobs/{job_id}/stop",),
        summary="Stop a job: SIGTERM, the grace, then its whole cell is killed. A terminal job stays as it is.",
        request=calls.StopCall,
        reply=JobView,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=StopBody,
        errors=(*_JOB_ERRORS, *_JSON_ERRORS, *_WRITE_ERRORS),
    ),
    Operation(
        name="artifact.put",
        method="PUT",
        path="/v0/artifacts",
        summary=f"Keep the body (at most {limits.UPLOAD_BYTES_MAX} bytes) under its SHA-256 digest.",
        request=calls.UploadCall,
        reply=wire.ArtifactInfo,
        access="control",
        effect="control",
        idempotent=True,
        body="raw",
        streaming="upload",
        statuses=(201,),
        errors=(*_WRITE_ERRORS, "MEDIA_TYPE"),
    ),
    Operation(
        name="artifact.list",
        method="GET",
        path="/v0/artifacts",
        summary="The tenant's artifacts, or those of one job.",
        request=calls.ListArtifactsCall,
        reply=wire.ArtifactPage,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.JOB, params.CURSOR, params.LIMIT),
        errors=("BAD_ID", "NOT_FOUND"),
    ),
    Operation(
        name="artifact.get",
        method="GET",
        path="/v0/artifacts/{digest}",
        summary="An artifact's bytes.",
        request=calls.ArtifactCall,
        reply=calls.FileReply,
        access="read",
        effect="read",
        idempotent=True,
        descriptor=True,
        media_type="application/octet-stream",
        errors=("BAD_ID", "NOT_FOUND", "GONE"),
    ),
    Operation(
        name="model.list",
        method="GET",
        path="/v0/models",
        summary="The installed models, their versions, operations and schemas.",
        request=calls.Nothing,
        reply=wire.ModelList,
        access="read",
        effect="read",
        idempotent=True,
    ),
    Operation(
        name="audit.checkpoint",
        method="GET",
        path="/v0/audit/checkpoint",
        summary="The signed checkpoint of the audit log (C2SP tlog-checkpoint note); keep it elsewhere.",
        request=calls.Nothing,
        reply=calls.RawReply,
        access="read",
        effect="read",
        idempotent=True,
        media_type="text/plain",
    ),
    Operation(
        name="cell.explain",
        method="POST",
        path="/v0/cells/explain",
        summary="The plan that a command would get, and what this host cannot enforce. Starts nothing.",
        request=calls.ExplainCall,
        reply=calls.Explanation,
        access="read",
        effect="read",
        idempotent=True,
        body="json",
        body_type=calls.ExplainCall,
        errors=(*_JSON_ERRORS, "LEVEL_UNMET", "BAD_PLAN"),
    ),
    Operation(
        name="node.doctor",
        method="GET",
        path="/v0/doctor",
        summary="What this machine can enforce, with reasons and remedies.",
        request=calls.Nothing,
        reply=calls.Doctor,
        access="open",
        effect="read",
        idempotent=True,
    ),
)

BY_NAME: Final[Mapping[str, Operation]] = {operation.name: operation for operation in OPERATIONS}
