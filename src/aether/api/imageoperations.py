"""Rows of the operations table about images."""

from __future__ import annotations

from typing import Final

import msgspec

from aether.api import params
from aether.api.operation import JSON_ERRORS, WRITE_ERRORS, Operation
from aether.contract import calls, cellcalls, images, limits

_IMAGE: Final = "/v0/images/{image}"


class CommitBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `image.commit`: a job that kept its diff, or what `cell.diff` answered; the new image's name."""

    job_id: str | None = None
    base: str | None = None
    layer: str | None = None
    name: str | None = None


IMAGE_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="image.import",
        method="PUT",
        path="/v0/images",
        summary=f"Unpack the body, the tar of an OCI image layout (at most {limits.UPLOAD_BYTES_MAX} bytes).",
        request=images.ImportCall,
        reply=images.ImageInfo,
        access="control",
        effect="control",
        idempotent=True,
        query=(params.IMAGE_NAME,),
        body="raw",
        streaming="upload",
        statuses=(201,),
        errors=(*WRITE_ERRORS, "MEDIA_TYPE", "BAD_FIELD", "BAD_IMAGE"),
    ),
    Operation(
        name="image.list",
        method="GET",
        path="/v0/images",
        summary="The tenant's images, newest first.",
        request=calls.Nothing,
        reply=images.ImageList,
        access="read",
        effect="read",
        idempotent=True,
    ),
    Operation(
        name="image.commit",
        method="POST",
        path="/v0/images/commit",
        summary="A new image: what a job or a cell changed, on top of the image that it ran in.",
        request=images.CommitCall,
        reply=images.ImageInfo,
        access="control",
        effect="control",
        idempotent=True,
        body="json",
        body_type=CommitBody,
        statuses=(201,),
        errors=(*JSON_ERRORS, *WRITE_ERRORS, "BAD_ID", "NOT_FOUND", "NO_LAYER", "GONE", "BAD_IMAGE"),
    ),
    Operation(
        name="cell.diff",
        method="POST",
        path="/v0/cells/{cell}/diff",
        summary="What an allocated cell changed in its image so far, kept as two artifacts: a listing and a layer.",
        request=cellcalls.CellCall,
        reply=images.CellDiffReply,
        access="control",
        effect="control",
        idempotent=True,
        errors=(*WRITE_ERRORS, "BAD_ID", "NO_SUCH_CELL", "NO_LAYER", "OUTPUT_REFUSED"),
    ),
    Operation(
        name="image.show",
        method="GET",
        path=_IMAGE,
        summary="One image by name or digest: its layers, and what of its configuration is honoured.",
        request=images.ImageCall,
        reply=images.ImageInfo,
        access="read",
        effect="read",
        idempotent=True,
        errors=("BAD_ID", "NOT_FOUND", "GONE"),
    ),
    Operation(
        name="image.remove",
        method="DELETE",
        path=_IMAGE,
        summary="Take a name away, or by digest the image with all its names; its files go with the last.",
        request=images.ImageCall,
        reply=images.ImageInfo,
        access="control",
        effect="control",
        idempotent=True,
        errors=(*WRITE_ERRORS, "BAD_ID", "NOT_FOUND", "GONE"),
    ),
)
