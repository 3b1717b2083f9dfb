"""Allocated cells: named cells that outlive their executables; what is asked, shown and answered about them.

Every ancestor of a cell, by its name (`contract.cellnames`), exists and belongs to the same tenant; a tenant's live
cells have different names.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import msgspec

from aether.contract import limits
from aether.contract.cellnames import check_name
from aether.contract.cells import Contention, Images, Limits, Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import check_bounds, check_images, check_labels, check_require
from aether.contract.network import Network, check_network


class CellState(StrEnum):
    """`starting` until the kernel has confined it; `freed` on request or when idle; `lost` when it died otherwise."""

    STARTING = "starting"
    RUNNING = "running"
    FROZEN = "frozen"
    FREED = "freed"
    LOST = "lost"


class CellRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `cell.allocate`. `limits.timeout_ms` bounds no cell, only its executables.

    `network` is what all its executables may reach through egressd; without it there is no way out.
    `idle_timeout_ms`: freed after so long without an executable and without a file operation; null: never.
    Isolation is given up only by explicit permission (action `cell.unisolate` of the policy).
    """

    name: str
    limits: Limits = Limits()
    require: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    isolate_network: bool = True
    isolate_process: bool = True
    idle_timeout_ms: int | None = None
    images: Images | None = None
    network: Network | None = None


class CellExecutable(msgspec.Struct, frozen=True, kw_only=True):
    """An executable that lives in a cell: the command job it belongs to, and the name it was given, if any."""

    job_id: str
    exec_id: str | None
    name: str | None
    argv: tuple[str, ...] | None
    state: str
    started_at: str | None


class CellView(msgspec.Struct, frozen=True, kw_only=True):
    """An allocated cell as every interface shows it. `reason` says why it ended, when it ended."""

    cell_id: str
    name: str
    parent: str | None
    state: CellState
    tenant_id: str
    node_id: str
    principal: str
    labels: tuple[str, ...]
    limits: Limits
    require: tuple[str, ...]
    isolate_network: bool
    isolate_process: bool
    idle_timeout_ms: int | None
    level: str | None
    executables: tuple[CellExecutable, ...]
    created_at: str
    started_at: str | None
    ended_at: str | None
    reason: str | None
    spec_digest: str
    plan_digest: str | None
    sandbox_digest: str | None
    allocated_index: int
    network: Network | None = None


class CellList(msgspec.Struct, frozen=True, kw_only=True):
    """Live cells by name, parents before children."""

    cells: tuple[CellView, ...]


class CellStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell uses now: everything in it since it started. `executables` counts those that live."""

    cell_id: str
    name: str
    state: CellState
    time: str
    usage: Usage
    limits: Limits
    executables: int
    contention: Contention = Contention()


class CellEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One audit record about a cell or an executable of it; `job_id` where it is about an executable."""

    time: str
    type: str
    log_index: int
    principal: str | None
    job_id: str | None
    state: str | None
    detail: dict[str, str]


class CellEvents(msgspec.Struct, frozen=True, kw_only=True):
    """A page of events, oldest first; go on at `next_index`."""

    cell_id: str
    events: tuple[CellEvent, ...]
    next_index: int


FileKind = Literal["file", "directory", "other"]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One name in a directory of the work directory. `other`: a link, FIFO, socket or device, which is never read."""

    name: str
    kind: FileKind
    size_bytes: int
    mode: int
    modified_at: str


class FileListing(msgspec.Struct, frozen=True, kw_only=True):
    """A directory by name. `truncated`: there are more entries than FILES_LISTED_MAX."""

    path: str
    entries: tuple[FileEntry, ...]
    truncated: bool


class FileKept(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `cell.put`."""

    cell_id: str
    path: str
    size_bytes: int
    digest: str


def check_request(request: CellRequest) -> None:
    """What the types do not say; raises AetherError BAD_FIELD naming the field."""
    check_name(request.name)
    check_labels(request.labels)
    check_require(request.require)
    check_bounds(request.limits)
    check_images(request.images)
    if request.images is not None and request.images.keep_diff:
        raise AetherError("BAD_FIELD", "cannot keep the changes of an allocated cell: a job's cell alone keeps them")
    check_idle(request.idle_timeout_ms)
    if request.network is not None:
        if not request.isolate_network:
            raise AetherError("BAD_FIELD", "cannot give the cell a network of rules: it shares the host's")
        check_network(request.network)


def check_idle(idle_timeout_ms: int | None) -> None:
    """Raises BAD_FIELD for an idle timeout out of bounds."""
    low, high = limits.CELL_IDLE_MS_MIN, limits.TIMEOUT_MS_MAX
    if idle_timeout_ms is not None and not low <= idle_timeout_ms <= high:
        raise AetherError("BAD_FIELD", f"cannot accept idle_timeout_ms = {idle_timeout_ms}: not within {low}..{high}")


def specification(request: CellRequest) -> dict[str, Any]:
    """The document that records name by digest: the request without its name."""
    spec: dict[str, Any] = msgspec.to_builtins(request)
    del spec["name"]
    return spec
