"""The operations table: everything the substrate does for a caller, once, as data.

Each row states the operation's name, its spelling over HTTP, request and reply types, who may ask, what it
leaves behind, whether repeating it is harmless, how it streams, and which error codes it may answer besides
those in COMMON_ERRORS. Interfaces (`api.http`, `client`, `cli`, `/openapi.json`, docs/api.md) are spellings
of this table and hold no list of their own; the authority implements one handler per name.

Invariants (tests hold them): names and (method, path) pairs are unique; every error code is in
`contract.errors.KINDS`; an operation that is not `read` accepts an Idempotency-Key (`keyed`); `idempotent` says that it
is harmless to repeat without one, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from aether.api import params
from aether.api.approvaloperations import APPROVAL_OPERATIONS
from aether.api.auditoperations import AUDIT_OPERATIONS
from aether.api.budgetoperations import BUDGET_OPERATIONS
from aether.api.celloperations import CELL_OPERATIONS
from aether.api.egressoperations import EGRESS_OPERATIONS
from aether.api.identityoperations import IDENTITY_OPERATIONS
from aether.api.imageoperations import IMAGE_OPERATIONS
from aether.api.operation import (
    CELL_ERRORS,
    JOB_ERRORS,
    JOB_PATH,
    JSON_ERRORS,
    MODEL_ERRORS,
    WRITE_ERRORS,
    Operation,
)
from aether.api.policyoperations import POLICY_OPERATIONS
from aether.api.ticketoperations import TICKET_OPERATIONS
from aether.api.watchoperations import CELL_WATCH_OPERATIONS, JOB_WATCH_OPERATIONS
from aether.contract import calls, limits, wire
from aether.contract.jobs import JobRequest, JobView
from aether.contract.records import Receipt


class StopBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `job.stop`."""

    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT


class ReplayBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `job.replay`."""

    allow_effects: bool = False


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
        query=(params.WAIT, params.APPROVAL),
        body="json",
        body_type=JobRequest,
        body_field="request",
        statuses=(202, 200),
        errors=(
            *JSON_ERRORS,
            *WRITE_ERRORS,
            *MODEL_ERRORS,
            *CELL_ERRORS,
            "APPROVAL_LIMIT",
            "LABEL_REFUSED",
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
        path=JOB_PATH,
        aliases=("/jobs/{job_id}",),
        summary="One job as it stands.",
        request=calls.JobCall,
        reply=JobView,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=JOB_ERRORS,
    ),
    Operation(
        name="job.result",
        method="GET",
        path=f"{JOB_PATH}/result",
        summary="The result of a succeeded job, as JSON.",
        request=calls.JobCall,
        reply=calls.RawReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        descriptor=True,
        errors=(*JOB_ERRORS, "NOT_READY", "NO_RESULT", "GONE"),
    ),
    Operation(
        name="job.logs",
        method="GET",
        path=f"{JOB_PATH}/logs",
        summary="What the executable wrote, as bytes; with `follow` until it ends.",
        request=calls.LogsCall,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.FOLLOW, params.STREAM, params.OFFSET),
        streaming="server",
        media_type="text/plain",
        errors=(*JOB_ERRORS, "NOT_READY", "NO_RESULT", "GONE"),
    ),
    Operation(
        name="job.receipt",
        method="GET",
        path=f"{JOB_PATH}/receipt",
        summary="The job's receipt: its audit records with proofs, checkable offline.",
        request=calls.JobCall,
        reply=Receipt,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=(*JOB_ERRORS, "NOT_READY"),
    ),
    Operation(
        name="job.story",
        method="GET",
        path=f"{JOB_PATH}/story",
        summary="What happened to the job, step by step.",
        request=calls.JobCall,
        reply=wire.Story,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WAIT,),
        errors=JOB_ERRORS,
    ),
    Operation(
        name="job.replay",
        method="POST",
        path=f"{JOB_PATH}/replay",
        summary="Run a finished job's input once more, as a new job that names it; compare what both left.",
        request=calls.ReplayCall,
        reply=calls.SubmittedJob,
        access="submit",
        effect="cell",
        idempotent=False,
        query=(params.WAIT, params.APPROVAL),
        body="optional_json",
        body_type=ReplayBody,
        statuses=(202, 200),
        errors=(
            *JOB_ERRORS,
            *JSON_ERRORS,
            *WRITE_ERRORS,
            *MODEL_ERRORS,
            *CELL_ERRORS,
            "NOT_READY",
            "NOT_REPEATABLE",
            "GONE",
            "IDEMPOTENCY_CONFLICT",
            "APPROVAL_LIMIT",
            "LABEL_REFUSED",
        ),
    ),
    Operation(
        name="job.stop",
        method="POST",
        path=f"{JOB_PATH}/stop",
        aliases=("/jobs/{job_id}/stop",),
        summary="Stop a job: SIGTERM, the grace, then its whole cell is killed. A terminal job stays as it is.",
        request=calls.StopCall,
        reply=JobView,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=StopBody,
        errors=(*JOB_ERRORS, *JSON_ERRORS, *WRITE_ERRORS),
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
        query=(params.LABEL,),
        body="raw",
        streaming="upload",
        statuses=(201,),
        errors=(*WRITE_ERRORS, "BAD_FIELD", "MEDIA_TYPE"),
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
    *AUDIT_OPERATIONS,
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
        errors=(*JSON_ERRORS, "LEVEL_UNMET", "BAD_PLAN"),
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
    *EGRESS_OPERATIONS,
    *JOB_WATCH_OPERATIONS,
    *CELL_WATCH_OPERATIONS,
    *CELL_OPERATIONS,
    *IMAGE_OPERATIONS,
    *TICKET_OPERATIONS,
    *POLICY_OPERATIONS,
    *APPROVAL_OPERATIONS,
    *BUDGET_OPERATIONS,
    *IDENTITY_OPERATIONS,
)

BY_NAME: Final[Mapping[str, Operation]] = {operation.name: operation for operation in OPERATIONS}
