"""Rows of the operations table about allocated cells, and about talking to an executable of one."""

from __future__ import annotations

from typing import Final

import msgspec

from aether.api import params
from aether.api.operation import CELL_ERRORS, JOB_ERRORS, JOB_PATH, JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import allocations, calls, cellcalls, limits
from aether.contract.cells import Limits
from aether.contract.jobs import JobView

_CELL: Final = "/v0/cells/{cell}"
_ERRORS: Final = ("BAD_ID", "NO_SUCH_CELL")


class FreeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optional body of `cell.free`."""

    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT


class ResizeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `cell.resize`."""

    limits: Limits
    idle_timeout_ms: int | None = None


class SignalBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `job.signal`: a number of signal(7)."""

    signal: int


class WindowBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `job.window`."""

    rows: int
    columns: int


CELL_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="cell.allocate",
        method="POST",
        path="/v0/cells",
        summary="Make a cell that lives until it is freed; command jobs that name it run in it.",
        request=cellcalls.AllocateCall,
        reply=allocations.CellView,
        access="control",
        effect="cell",
        idempotent=False,
        query=(params.APPROVAL,),
        body="json",
        body_type=allocations.CellRequest,
        body_field="request",
        statuses=(201,),
        errors=(
            *JSON_ERRORS,
            *WRITE_ERRORS,
            *CELL_ERRORS,
            "NAME_TAKEN",
            "NO_SUCH_CELL",
            "CELL_FROZEN",
            "APPROVAL_NEEDED",
            "APPROVAL_DENIED",
            "APPROVAL_LIMIT",
            "LABEL_REFUSED",
        ),
    ),
    Operation(
        name="cell.list",
        method="GET",
        path="/v0/cells",
        summary="The tenant's live cells by name, with the executables that live in them.",
        request=cellcalls.ListCellsCall,
        reply=allocations.CellList,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.WITHIN,),
        errors=("BAD_ID",),
    ),
    Operation(
        name="cell.show",
        method="GET",
        path=_CELL,
        summary="One cell as it stands; for some time also one that ended.",
        request=cellcalls.CellCall,
        reply=allocations.CellView,
        access="read",
        effect="read",
        idempotent=True,
        errors=_ERRORS,
    ),
    Operation(
        name="cell.free",
        method="POST",
        path=f"{_CELL}/free",
        summary="End a cell: SIGTERM to its executables, the grace, then everything in it and below it is gone.",
        request=cellcalls.FreeCall,
        reply=allocations.CellView,
        access="control",
        effect="control",
        idempotent=True,
        body="optional_json",
        body_type=FreeBody,
        errors=(*_ERRORS, *JSON_ERRORS, *WRITE_ERRORS),
    ),
    Operation(
        name="cell.freeze",
        method="POST",
        path=f"{_CELL}/freeze",
        summary="Pause every process of a cell where it stands.",
        request=cellcalls.CellCall,
        reply=allocations.CellView,
        access="control",
        effect="control",
        idempotent=True,
        errors=(*_ERRORS, *WRITE_ERRORS, "LEVEL_UNMET"),
    ),
    Operation(
        name="cell.thaw",
        method="POST",
        path=f"{_CELL}/thaw",
        summary="Let a frozen cell go on.",
        request=cellcalls.CellCall,
        reply=allocations.CellView,
        access="control",
        effect="control",
        idempotent=True,
        errors=(*_ERRORS, *WRITE_ERRORS, "LEVEL_UNMET"),
    ),
    Operation(
        name="cell.resize",
        method="POST",
        path=f"{_CELL}/resize",
        summary="Give a live cell other limits.",
        request=cellcalls.ResizeCall,
        reply=allocations.CellView,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=ResizeBody,
        errors=(*_ERRORS, *JSON_ERRORS, *WRITE_ERRORS, "LEVEL_UNMET", "CELL_FAILED"),
    ),
    Operation(
        name="cell.stats",
        method="GET",
        path=f"{_CELL}/stats",
        summary="What a cell uses, as the kernel counts it.",
        request=cellcalls.CellCall,
        reply=allocations.CellStats,
        access="read",
        effect="read",
        idempotent=True,
        errors=_ERRORS,
    ),
    Operation(
        name="cell.events",
        method="GET",
        path=f"{_CELL}/events",
        summary="What the audit log says of a cell and its executables, oldest first.",
        request=cellcalls.CellEventsCall,
        reply=allocations.CellEvents,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.START, params.LIMIT, params.WAIT),
        errors=_ERRORS,
    ),
    Operation(
        name="cell.files",
        method="GET",
        path=f"{_CELL}/files",
        summary="The names in a directory of a cell's work directory.",
        request=cellcalls.FileCall,
        reply=allocations.FileListing,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.DIRECTORY,),
        errors=(*_ERRORS, "BAD_FIELD", "NOT_FOUND"),
    ),
    Operation(
        name="cell.get",
        method="GET",
        path=f"{_CELL}/file",
        summary="The bytes of a regular file in a cell's work directory.",
        request=cellcalls.FileCall,
        reply=calls.FileReply,
        access="read",
        effect="read",
        idempotent=True,
        query=(params.FILE,),
        descriptor=True,
        media_type="application/octet-stream",
        errors=(*_ERRORS, "BAD_FIELD", "NOT_FOUND", "OUTPUT_REFUSED"),
    ),
    Operation(
        name="cell.put",
        method="PUT",
        path=f"{_CELL}/file",
        summary="Write the body to a file in a cell's work directory; the old one is replaced whole.",
        request=cellcalls.PutCall,
        reply=allocations.FileKept,
        access="control",
        effect="control",
        idempotent=True,
        query=(params.FILE, params.EXECUTABLE, params.LABEL),
        body="raw",
        streaming="upload",
        statuses=(201,),
        errors=(*_ERRORS, *WRITE_ERRORS, "BAD_FIELD", "MEDIA_TYPE", "OUTPUT_REFUSED", "CELL_FAILED", "LABEL_REFUSED"),
    ),
    Operation(
        name="job.signal",
        method="POST",
        path=f"{JOB_PATH}/signal",
        summary="Send a signal to a running command and its process group.",
        request=cellcalls.SignalCall,
        reply=JobView,
        access="control",
        effect="control",
        idempotent=False,
        body="json",
        body_type=SignalBody,
        errors=(*JOB_ERRORS, *JSON_ERRORS, *WRITE_ERRORS, "NOT_READY", "NO_SUCH_CELL"),
    ),
    Operation(
        name="job.attach",
        method="POST",
        path=f"{JOB_PATH}/attach",
        summary="Become the terminal or the standard input of an executable: an upgraded connection of raw bytes.",
        request=cellcalls.AttachCall,
        reply=cellcalls.UpgradeReply,
        access="control",
        effect="control",
        idempotent=True,
        streaming="both",
        media_type="application/octet-stream",
        statuses=(101,),
        errors=(*JOB_ERRORS, *WRITE_ERRORS, "NOT_READY", "NO_SUCH_CELL"),
    ),
    Operation(
        name="job.window",
        method="POST",
        path=f"{JOB_PATH}/window",
        summary="Tell an executable the size of its terminal.",
        request=cellcalls.WindowCall,
        reply=JobView,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=WindowBody,
        errors=(*JOB_ERRORS, *JSON_ERRORS, *WRITE_ERRORS, "NOT_READY", "NO_SUCH_CELL"),
    ),
)
