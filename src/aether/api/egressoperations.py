"""Rows of the operations table about the network of cells."""

from __future__ import annotations

from typing import Final

from aether.api import params
from aether.api.operation import JOB_ERRORS, JOB_PATH, Operation
from aether.contract import egresswire

PAGE: Final = params.Param(
    "cursor",
    "cursor",
    {"type": "integer", "minimum": 0, "maximum": (1 << 53) - 1, "default": 0},
    params.parse_offset,
    "The previous page's `next_cursor`.",
)
EGRESS_OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation(
        name="job.egress",
        method="GET",
        path=f"{JOB_PATH}/egress",
        summary="What the job reached or tried to reach, newest first: records of its cell's network.",
        request=egresswire.EgressCall,
        reply=egresswire.EgressPage,
        access="read",
        effect="read",
        idempotent=True,
        query=(PAGE, params.LIMIT),
        errors=JOB_ERRORS,
    ),
    Operation(
        name="cell.egress",
        method="GET",
        path="/v0/cells/{cell}/egress",
        summary="What an allocated cell reached or tried to reach, newest first.",
        request=egresswire.CellEgressCall,
        reply=egresswire.CellEgressPage,
        access="read",
        effect="read",
        idempotent=True,
        query=(PAGE, params.LIMIT),
        errors=("BAD_ID", "NO_SUCH_CELL"),
    ),
)
