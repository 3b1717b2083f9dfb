"""The fake authority's cells: named, kept in memory; their files are bytes, their terminal says what it hears."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import msgspec

from aether.contract import allocations, calls, cellcalls, cellnames, ids, limits
from aether.contract.allocations import CellState, CellView
from aether.contract.cells import Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView, check_bounds, check_relative_path

NOW = "2026-09-21T13:33:20.123456Z"
DIGEST = "sha256:" + "0" * 64


class FakeCells:
    """Handlers by operation name."""

    def __init__(self, job: Any) -> None:
        self.cells: dict[str, CellView] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.windows: list[tuple[int, int]] = []
        self._job = job
        self.handlers = {
            "cell.allocate": self.allocate,
            "cell.list": self.list,
            "cell.show": self.show,
            "cell.free": self.free,
            "cell.freeze": self.freeze,
            "cell.thaw": self.thaw,
            "cell.resize": self.resize,
            "cell.stats": self.stats,
            "cell.events": self.events,
            "cell.put": self.put,
            "cell.get": self.get,
            "cell.files": self.listing,
            "job.signal": self.signal,
            "job.attach": self.attach,
            "job.window": self.window,
        }

    def _find(self, reference: str) -> CellView:
        for view in self.cells.values():
            if reference in (view.cell_id, view.name):
                return view
        raise AetherError("NO_SUCH_CELL", f"cannot find cell {reference}")

    def _change(self, reference: str, **fields: Any) -> CellView:
        view = msgspec.structs.replace(self._find(reference), **fields)
        self.cells[view.name] = view
        return view

    async def allocate(self, caller: calls.Caller, call: cellcalls.AllocateCall) -> CellView:
        request = call.request
        allocations.check_request(request)
        if request.name in self.cells:
            raise AetherError("NAME_TAKEN", f"cannot allocate cell {request.name}: there is one")
        view = CellView(
            cell_id=ids.new(ids.CELL), name=request.name, parent=cellnames.parent_of(request.name),
            state=CellState.RUNNING, tenant_id="t", node_id="node_x", principal=f"uid:{caller.uid}",
            labels=request.labels, limits=request.limits, require=request.require,
            isolate_network=request.isolate_network, isolate_process=request.isolate_process,
            idle_timeout_ms=request.idle_timeout_ms, level="cell", executables=(), created_at=NOW, started_at=NOW,
            ended_at=None, reason=None, spec_digest=DIGEST, plan_digest=DIGEST, sandbox_digest=DIGEST,
            allocated_index=1,
        )  # fmt: skip
        self.cells[request.name] = view
        return view

    async def list(self, caller: calls.Caller, call: cellcalls.ListCellsCall) -> allocations.CellList:
        shown = [v for v in self.cells.values() if call.within is None or cellnames.is_within(v.name, call.within)]
        return allocations.CellList(cells=tuple(shown))

    async def show(self, caller: calls.Caller, call: cellcalls.CellCall) -> CellView:
        return self._find(call.cell)

    async def free(self, caller: calls.Caller, call: cellcalls.FreeCall) -> CellView:
        if not 0 <= call.grace_ms <= limits.STOP_GRACE_MS_MAX:
            raise AetherError("BAD_FIELD", f"cannot accept grace_ms = {call.grace_ms}")
        view = self._change(call.cell, state=CellState.FREED, ended_at=NOW, reason="freed")
        del self.cells[view.name]
        return view

    async def freeze(self, caller: calls.Caller, call: cellcalls.CellCall) -> CellView:
        return self._change(call.cell, state=CellState.FROZEN)

    async def thaw(self, caller: calls.Caller, call: cellcalls.CellCall) -> CellView:
        return self._change(call.cell, state=CellState.RUNNING)

    async def resize(self, caller: calls.Caller, call: cellcalls.ResizeCall) -> CellView:
        check_bounds(call.limits)
        allocations.check_idle(call.idle_timeout_ms)
        return self._change(call.cell, limits=call.limits)

    async def stats(self, caller: calls.Caller, call: cellcalls.CellCall) -> allocations.CellStats:
        view = self._find(call.cell)
        usage = Usage(wall_us=5_000_000, cpu_user_us=1_000, cpu_system_us=500, memory_peak_bytes=1 << 20, pids_peak=3)
        return allocations.CellStats(
            cell_id=view.cell_id, name=view.name, state=view.state, time=NOW, usage=usage, limits=view.limits,
            executables=0,
        )  # fmt: skip

    async def events(self, caller: calls.Caller, call: cellcalls.CellEventsCall) -> allocations.CellEvents:
        view = self._find(call.cell)
        event = allocations.CellEvent(
            time=NOW, type="cell.allocated", log_index=1, principal=view.principal, job_id=None, state=None,
            detail={"name": view.name},
        )  # fmt: skip
        return allocations.CellEvents(cell_id=view.cell_id, events=(event,) if call.start < 2 else (), next_index=2)

    async def put(self, caller: calls.Caller, call: cellcalls.PutCall) -> allocations.FileKept:
        try:
            check_relative_path(call.path, "file")
            view = self._find(call.cell)
            self.files[view.name, call.path] = os.pread(call.fd, call.size_bytes, 0)
        finally:
            os.close(call.fd)
        return allocations.FileKept(cell_id=view.cell_id, path=call.path, size_bytes=call.size_bytes, digest=DIGEST)

    async def get(self, caller: calls.Caller, call: cellcalls.FileCall) -> calls.FileReply:
        check_relative_path(call.path, "file")
        data = self.files.get((self._find(call.cell).name, call.path))
        if data is None:
            raise AetherError("NOT_FOUND", f"cannot open {call.path!r}")
        fd = os.memfd_create("file", os.MFD_CLOEXEC)
        os.write(fd, data)
        return calls.FileReply(fd, 0, len(data), "application/octet-stream")

    async def listing(self, caller: calls.Caller, call: cellcalls.FileCall) -> allocations.FileListing:
        name = self._find(call.cell).name
        entries = tuple(
            allocations.FileEntry(name=path, kind="file", size_bytes=len(data), mode=0o644, modified_at=NOW)
            for (cell, path), data in self.files.items()
            if cell == name and "/" not in path
        )
        return allocations.FileListing(path=call.path, entries=entries, truncated=False)

    async def signal(self, caller: calls.Caller, call: cellcalls.SignalCall) -> JobView:
        if not 1 <= call.signal <= 64:
            raise AetherError("BAD_FIELD", f"cannot send signal {call.signal}")
        view: JobView = self._job(call.job_id).view
        return view

    async def window(self, caller: calls.Caller, call: cellcalls.WindowCall) -> JobView:
        if not all(1 <= size <= limits.TERMINAL_SIZE_MAX for size in (call.rows, call.columns)):
            raise AetherError("BAD_FIELD", "cannot size a terminal")
        view: JobView = self._job(call.job_id).view
        self.windows.append((call.rows, call.columns))
        return view

    async def attach(self, caller: calls.Caller, call: cellcalls.AttachCall) -> cellcalls.UpgradeReply:
        self._job(call.job_id)
        return cellcalls.UpgradeReply(cellcalls.STREAM_PROTOCOL, _echo, lambda: None)


async def _echo(fd: int) -> None:
    """A program that says what it hears, in capitals, until the line `bye`."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    while (line := await reader.readline()) not in (b"", b"bye\n"):
        writer.write(line.upper())
        await writer.drain()
    writer.close()
    await writer.wait_closed()
