"""Rows of the operations table about what the processes of a cell do."""

from __future__ import annotations

from typing import Final

import msgspec

from aether.api import params
from aether.api.operation import JOB_ERRORS, JOB_PATH, JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import activity, calls, limits

_CELL: Final = "/v0/cells/{cell}"
_CELL_ERRORS: Final = ("BAD_ID", "NO_SUCH_CELL")
_TRACE_ERRORS: Final = (*JSON_ERRORS, *WRITE_ERRORS, "NOT_READY", "NO_SUCH_CELL", "LEVEL_UNMET", "GONE")
LINES: Final = "application/x-ndjson"


class TraceBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `job.trace` and `cell.trace`."""

    duration_ms: int = limits.TRACE_MS_DEFAULT


JOB_WATCH_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="job.activity",
        method="GET",
        path=f"{JOB_PATH}/activity",
        aliases=(f"{JOB_PATH}/events",),
        summary="What the job's processes do, one event per line: exec, exit, signal, want of memory or CPU.",
        request=activity.ActivityCall,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.FOLLOW, params.OFFSET),
        streaming="server",
        media_type=LINES,
        errors=JOB_ERRORS,
    ),
    Operation(
        name="job.trace",
        method="POST",
        path=f"{JOB_PATH}/trace",
        summary="Count the system calls of the job's cell for a while; answers when that is over.",
        request=activity.TraceCall,
        reply=activity.Trace,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=TraceBody,
        errors=(*JOB_ERRORS, *_TRACE_ERRORS),
    ),
)

CELL_WATCH_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="cell.activity",
        method="GET",
        path=f"{_CELL}/activity",
        summary="What the processes of an allocated cell do, one event per line.",
        request=activity.CellActivityCall,
        reply=calls.StreamReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.FOLLOW, params.OFFSET),
        streaming="server",
        media_type=LINES,
        errors=_CELL_ERRORS,
    ),
    Operation(
        name="cell.trace",
        method="POST",
        path=f"{_CELL}/trace",
        summary="Count the system calls of an allocated cell for a while; answers when that is over.",
        request=activity.CellTraceCall,
        reply=activity.Trace,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=TraceBody,
        errors=(*_CELL_ERRORS, *_TRACE_ERRORS),
    ),
)
