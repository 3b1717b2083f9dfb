"""Calls about allocated cells and about talking to an executable: the typed request of each operation.

`cell` is a cell's id or name, as `contract.allocations.reference` read it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from aether.contract import limits
from aether.contract.allocations import CellRequest
from aether.contract.cells import Limits

STREAM_PROTOCOL: Final = "aether-stream"
"""What an attached connection speaks once it was upgraded: bytes, as they are."""


class AllocateCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.allocate`."""

    request: CellRequest
    approval_ms: int = limits.APPROVAL_MS_DEFAULT
    """How long an approval is waited for, if the policy demands one."""


class CellCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.show`, `cell.freeze`, `cell.thaw`, `cell.stats`."""

    cell: str


class ListCellsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.list`: the tenant's live cells, or those within `within`."""

    within: str | None = None


class FreeCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.free`: SIGTERM to its executables, `grace_ms`, then the whole cell, and the cells in it, are gone."""

    cell: str
    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT


class ResizeCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.resize`: new limits for a live cell, all of them at once; null leaves the idle timeout as it is."""

    cell: str
    limits: Limits
    idle_timeout_ms: int | None = None


class CellEventsCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.events`: the records about a cell and its executables from log index `start` on; `wait_ms` > 0: wait for
    one when there is none."""

    cell: str
    start: int = 0
    limit: int = limits.PAGE_ITEMS_DEFAULT
    wait_ms: int = 0


class FileCall(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.get` (a file) and `cell.files` (a directory, "" for the work directory itself)."""

    cell: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class PutCall:
    """`cell.put`: the body was spooled to `fd` (an unlinked file the callee owns and closes)."""

    cell: str
    path: str
    fd: int
    size_bytes: int
    media_type: str
    executable: bool = False
    labels: tuple[str, ...] = ()


class SignalCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.signal`: to the executable and its process group."""

    job_id: str
    signal: int


class AttachCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.attach`: the connection becomes the executable's terminal, or its standard input."""

    job_id: str


class WindowCall(msgspec.Struct, frozen=True, kw_only=True):
    """`job.window`: the size of the executable's terminal."""

    job_id: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class UpgradeReply:
    """The connection leaves HTTP: `run` gets its socket as a descriptor that it owns, after the 101 was sent."""

    protocol: str
    run: Callable[[int], Awaitable[None]]
    refuse: Callable[[], None]
    """Called instead when the connection cannot be handed over."""
