"""Allocated cells for programs: every `cell.*` operation as a method, and a session object on top.

    with Client() as client, client.cell("agent") as cell:
        cell.put("task.py", "task.py")
        result = cell.exec(["python3", "task.py"])
        print(result.exit_code, result.stdout)

Leaving the `with` of a session frees its cell; without `with` it stays until `free`, or until it was idle too long.
"""

from __future__ import annotations

import io
import os
import signal as signals
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, TypeVar

import msgspec

from aether.client.approvals import approval_query
from aether.contract import ids, limits
from aether.contract.activity import ActivityEvent, Trace
from aether.contract.allocations import (
    CellEvent,
    CellEvents,
    CellList,
    CellRequest,
    CellStats,
    CellView,
    FileEntry,
    FileKept,
    FileListing,
)
from aether.contract.cellnames import in_path
from aether.contract.cells import Limits
from aether.contract.egresswire import CellEgressPage
from aether.contract.errors import AetherError
from aether.contract.jobs import CommandParams, JobRequest, JobView, Stdio

T = TypeVar("T")
Source = str | os.PathLike[str] | bytes | BinaryIO
_JSON: Final = {"Content-Type": "application/json"}
FOLLOW_S: Final = 20.0
FOREVER: Final = Limits(timeout_ms=limits.TIMEOUT_MS_MAX)
"""Of a guest's limits only the time is its own: by default as long as there is."""


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...

    def copy(self, name: str, argument: str, query: Sequence[tuple[str, str]], out: BinaryIO) -> int: ...

    def activity_of(self, name: str, of: str, follow: bool, cursor: int) -> Iterator[tuple[ActivityEvent, int]]: ...

    def trace_of(self, name: str, of: str, duration_ms: int) -> Trace: ...

    def upload_to(
        self, name: str, reply: type[T], argument: str, query: Sequence[tuple[str, str]], source: Any
    ) -> T: ...

    def submit(self, request: JobRequest, *, wait_s: float = 0.0, idempotency_key: str | None = None) -> JobView: ...

    def get(self, job_id: str, *, wait_s: float = 0.0) -> JobView: ...

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobView: ...

    def logs(self, job_id: str, *, stream: str = "all", follow: bool = False, cursor: int = 0) -> Iterator[bytes]: ...

    def stop(self, job_id: str, *, grace_ms: int = ...) -> JobView: ...

    def signal(self, job_id: str, signal: int) -> JobView: ...


class Cells:
    """`client.cells`: the operations. A cell is named by its name or id. All methods raise AetherError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def allocate(
        self,
        name: str,
        *,
        limits: Limits | None = None,
        require: Sequence[str] = (),
        labels: Sequence[str] = (),
        idle_timeout_ms: int | None = None,
        isolate_network: bool = True,
        isolate_process: bool = True,
        idempotency_key: str | None = None,
        approval_ms: int | None = None,
        **more: Any,
    ) -> CellView:
        """Makes a cell; `more` are further fields of `CellRequest`. Raises APPROVAL_NEEDED when the policy demands an
        approval, which waits for `approval_ms`: call again with the same arguments once it is granted."""
        request = CellRequest(
            name=name,
            limits=limits or Limits(),
            require=tuple(require),
            labels=tuple(labels),
            idle_timeout_ms=idle_timeout_ms,
            isolate_network=isolate_network,
            isolate_process=isolate_process,
            **more,
        )
        headers = {**_JSON, "Idempotency-Key": idempotency_key or ids.new(ids.REQUEST)}
        body, query = msgspec.json.encode(request), approval_query(approval_ms)
        return self._calls.call_json("cell.allocate", CellView, query=query, body=body, headers=headers)

    def list(self, within: str | None = None) -> tuple[CellView, ...]:
        """The live cells by name, or one and those in it."""
        query = [("within", in_path(within) if within else None)]
        return self._calls.call_json("cell.list", CellList, query=query).cells

    def show(self, cell: str) -> CellView:
        return self._calls.call_json("cell.show", CellView, in_path(cell))

    def free(self, cell: str, *, grace_ms: int = limits.STOP_GRACE_MS_DEFAULT) -> CellView:
        """Ends the cell and all in it."""
        body = msgspec.json.encode({"grace_ms": grace_ms})
        extra_s = grace_ms / 1000
        return self._calls.call_json("cell.free", CellView, in_path(cell), body=body, headers=_JSON, extra_s=extra_s)

    def freeze(self, cell: str) -> CellView:
        return self._calls.call_json("cell.freeze", CellView, in_path(cell))

    def thaw(self, cell: str) -> CellView:
        return self._calls.call_json("cell.thaw", CellView, in_path(cell))

    def resize(self, cell: str, limits: Limits, *, idle_timeout_ms: int | None = None) -> CellView:
        """Other limits, all at once."""
        body = msgspec.json.encode({"limits": limits, "idle_timeout_ms": idle_timeout_ms})
        return self._calls.call_json("cell.resize", CellView, in_path(cell), body=body, headers=_JSON)

    def stats(self, cell: str) -> CellStats:
        return self._calls.call_json("cell.stats", CellStats, in_path(cell))

    def egress(self, cell: str, *, cursor: int = 0, limit: int = limits.PAGE_ITEMS_DEFAULT) -> CellEgressPage:
        """What the cell reached or tried to reach, newest first; the next page is at its `next_cursor`."""
        query = [("cursor", str(cursor)), ("limit", str(limit))]
        return self._calls.call_json("cell.egress", CellEgressPage, in_path(cell), query=query)

    def events(self, cell: str, *, follow: bool = False, start: int = 0) -> Iterator[CellEvent]:
        """The records about the cell and its executables, oldest first; with `follow` until it ended."""
        while True:
            wait_s = FOLLOW_S if follow else 0.0
            query = [("start", str(start)), ("limit", str(limits.PAGE_ITEMS_MAX))]
            query += [("wait", f"{int(wait_s * 1000)}ms")] if follow else []
            page = self._calls.call_json("cell.events", CellEvents, in_path(cell), query=query, extra_s=wait_s)
            yield from page.events
            ended = any(event.type in ("cell.freed", "cell.lost") for event in page.events)
            if ended or (page.next_index <= start and not follow):
                return
            start = max(start, page.next_index)

    def activity(self, cell: str, *, follow: bool = False, cursor: int = 0) -> Iterator[tuple[ActivityEvent, int]]:
        """What its processes did, and the cursor behind each event; with `follow` until the cell is freed."""
        return self._calls.activity_of("cell.activity", cell, follow, cursor)

    def trace(self, cell: str, *, duration_ms: int = limits.TRACE_MS_DEFAULT) -> Trace:
        """Counts its system calls; returns when that is over."""
        return self._calls.trace_of("cell.trace", cell, duration_ms)

    def put(
        self, cell: str, path: str, source: Any, *, executable: bool = False, labels: Sequence[str] = ()
    ) -> FileKept:
        """Writes a file (path or seekable binary file) or bytes to `path` of the work directory; the cell and all that
        comes out of it carry `labels` from now on."""
        query = [("path", path), ("executable", "1" if executable else "0"), *(("label", name) for name in labels)]
        return self._calls.upload_to("cell.put", FileKept, in_path(cell), query, source)

    def get(self, cell: str, path: str, out: BinaryIO) -> int:
        """Writes a file of the work directory to `out`; returns its size."""
        return self._calls.copy("cell.get", in_path(cell), [("path", path)], out)

    def files(self, cell: str, path: str = "") -> FileListing:
        return self._calls.call_json("cell.files", FileListing, in_path(cell), query=[("path", path)])

    def start(
        self,
        cell: str,
        argv: Sequence[str],
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/work",
        limits: Limits | None = None,
        outputs: Sequence[str] = (),
        labels: Sequence[str] = (),
        stdio: Stdio = "logs",
        idempotency_key: str | None = None,
    ) -> JobView:
        """Starts an executable and returns its accepted job."""
        params = CommandParams(
            argv=tuple(argv),
            env=dict(env or {}),
            cwd=cwd,
            limits=limits or FOREVER,
            outputs=tuple(outputs),
            cell=cell if not cell.startswith(f"{ids.CELL}_") else self.show(cell).name,
            executable=name,
            stdio=stdio,
        )
        said = {key: value for key, value in msgspec.to_builtins(params).items() if value is not None}
        request = JobRequest(kind="command", op="run", params=said, labels=tuple(labels))
        return self._calls.submit(request, idempotency_key=idempotency_key)

    def executable(self, cell: str, name: str) -> str:
        """The job of an executable that lives in the cell, by its name or job id; raises NOT_FOUND."""
        for each in self.show(cell).executables:
            if name in (each.name, each.job_id):
                return each.job_id
        raise AetherError(
            "NOT_FOUND", f"cannot find executable {name} in cell {cell}", "list them with `aether cell show`"
        )


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How an executable ended and what it wrote. `exit_code` is null when a signal ended it."""

    job: JobView
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        return self.exit_code == 0


class Process:
    """An executable that runs in the background of a cell."""

    def __init__(self, calls: Calls, job: JobView) -> None:
        self._calls = calls
        self.job_id = job.job_id
        self.name = job.executable

    def __repr__(self) -> str:
        return f"Process({self.name or self.job_id!r})"

    def wait(self, timeout_s: float | None = None) -> JobView:
        """The terminal job; after `timeout_s` the job as it stands."""
        return self._calls.wait(self.job_id, timeout_s)

    def logs(self, *, stream: str = "all", follow: bool = False) -> Iterator[bytes]:
        return self._calls.logs(self.job_id, stream=stream, follow=follow)

    def signal(self, signal: int = signals.SIGTERM) -> None:
        self._calls.signal(self.job_id, signal)

    def stop(self, *, grace_ms: int = limits.STOP_GRACE_MS_DEFAULT) -> JobView:
        """SIGTERM, the grace, then all of it is killed; its cell lives on."""
        self._calls.stop(self.job_id, grace_ms=grace_ms)
        return self._calls.wait(self.job_id)


class Session:
    """One cell. Made when it is not there (with the given fields of `Cells.allocate`), else taken as it is."""

    def __init__(self, calls: Calls, cells: Cells, name: str, fields: Mapping[str, Any]) -> None:
        self._calls = calls
        self._cells = cells
        self.name = name
        try:
            self.cell_id = cells.show(name).cell_id if not fields else cells.allocate(name, **fields).cell_id
        except AetherError as error:
            if error.code != "NO_SUCH_CELL" or fields:
                raise
            self.cell_id = cells.allocate(name).cell_id
        else:
            if cells.show(self.cell_id).ended_at is not None:
                self.cell_id = cells.allocate(name).cell_id

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.free()

    def __repr__(self) -> str:
        return f"Session({self.name!r}, {self.cell_id!r})"

    @property
    def info(self) -> CellView:
        return self._cells.show(self.cell_id)

    @property
    def stats(self) -> CellStats:
        return self._cells.stats(self.cell_id)

    def exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        """Runs a command and waits for its end; `options` are those of `Cells.start`."""
        job = self._calls.wait(self._cells.start(self.name, argv, **options).job_id)
        written = {name: b"".join(self._calls.logs(job.job_id, stream=name)) for name in ("stdout", "stderr")}
        if job.exit_code is None and job.signal is None and job.error is not None:
            raise AetherError.of(job.error)
        return ExecResult(job, job.exit_code, job.signal, written["stdout"], written["stderr"])

    def start(self, argv: Sequence[str], **options: Any) -> Process:
        """Starts a command in the background."""
        return Process(self._calls, self._cells.start(self.name, argv, **options))

    def put(
        self, path: str, source: str | os.PathLike[str] | bytes | BinaryIO, *, executable: bool = False
    ) -> FileKept:
        """Writes a file of the work directory: from a path here, bytes, or a seekable binary file."""
        return self._cells.put(self.cell_id, path, source, executable=executable)

    def get(self, path: str) -> bytes:
        """A small file of the work directory."""
        out = io.BytesIO()
        self._cells.get(self.cell_id, path, out)
        return out.getvalue()

    def files(self, path: str = "") -> tuple[FileEntry, ...]:
        return self._cells.files(self.cell_id, path).entries

    def pause(self) -> CellView:
        """Freezes every process of the cell."""
        return self._cells.freeze(self.cell_id)

    def resume(self) -> CellView:
        return self._cells.thaw(self.cell_id)

    def free(self) -> CellView:
        """Ends the cell and all in it; again it changes nothing."""
        return self._cells.free(self.cell_id)
