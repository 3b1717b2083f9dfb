"""The double of every driver: no processes, the same contract.

Programs are functions: `programs[argv[0]]` gets a `Run` and returns the exit code. What it writes to `files` are the
outputs, what it awaits can be ended by signals. The object is also the spawner that such a driver connects to: it
outlives the authority (`close`, then `start` of the next one), and `die` takes its cells with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from aether.contract.allocations import FileEntry, FileKind, FileListing
from aether.contract.canonical import canonical, digest_bytes
from aether.contract.cells import CellSpec, Contention, ExecEnd, ExitStatus, Limits, SandboxReport, Usage
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import Stdio
from aether.contract.wire import CellFile, CellFiles
from aether.substrate.cells.drivers.port import Adopted, Explained, Fingerprint, Handle, Listening, Order, Started

LEVELS = ("process", "cell")


@dataclass(slots=True)
class Run:
    """What a program of the double sees. `terminated` is set by SIGTERM; one that ignores it is killed."""

    spec: CellSpec
    files: dict[str, bytes]
    refused: dict[str, str] = field(default_factory=dict)
    terminated: asyncio.Event = field(default_factory=asyncio.Event)
    channel: socket.socket | None = None
    """The executable's end, the program's to close; of its terminal or standard input too."""
    signals: list[int] = field(default_factory=list)
    window: tuple[int, int] | None = None


Program = Callable[[Run], Coroutine[None, None, int]]


@dataclass(slots=True)
class _Exec:
    run: Run
    began_s: float
    work: asyncio.Future[int]
    end: ExecEnd | None = None
    timed_out: bool = False
    acknowledged: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stdio: Stdio = "logs"
    outside: int = -1


@dataclass(slots=True)
class _Cell:
    started: Started
    started_wall_us: int
    files: dict[str, bytes]
    limits: Limits
    execs: dict[str, _Exec] = field(default_factory=dict)
    reason: str | None = None
    frozen: bool = False


class MemoryDriver:
    """See the module. `missing` are mechanisms that this double claims not to have."""

    name = "memory"

    def __init__(self, programs: dict[str, Program], missing: dict[str, tuple[str, str]] | None = None) -> None:
        self._programs = programs
        self._missing = missing or {}
        self._cells: dict[str, _Cell] = {}
        self._on_end: list[Callable[[ExecEnd], None]] = []
        self._on_gone: list[Callable[[str, str | None], None]] = []
        self._on_connect: list[Callable[[list[Adopted]], None]] = []
        self._watching: set[asyncio.Task[None]] = set()
        self._lives = 1
        self.reason = ""

    # ---- the spawner

    @property
    def instance(self) -> str:
        return f"{self.name}-{self._lives}"

    def on_connect(self, call: Callable[[list[Adopted]], None]) -> None:
        self._on_connect.append(call)

    def start(self) -> None:
        """Connects: what lives is told first, then what ended."""
        found = self._adopted()
        for call in self._on_connect:
            call(found)
        for adopted in found:
            for end in adopted.execs.values():
                if end is not None:
                    self._tell(end)

    async def close(self) -> None:
        """Disconnects; the cells live on."""
        self._on_end.clear()
        self._on_gone.clear()
        self._on_connect.clear()

    def die(self) -> None:
        """Every cell is gone without a word, and another spawner is there."""
        cells, self._cells = list(self._cells.values()), {}
        self._lives += 1
        for cell in cells:
            for executable in cell.execs.values():
                executable.work.cancel()
        self.start()

    def lose(self, cell_id: str, reason: str) -> None:
        """One cell dies from outside."""
        cell = self._cells.pop(cell_id)
        for executable in cell.execs.values():
            executable.work.cancel()
        for call in self._on_gone:
            call(cell_id, reason)

    def found(self, handle: Handle) -> Started | None:
        known = self._cells.get(handle)
        if known is None:
            return None
        first = known.started
        return Started(first.handle, first.exec_id, first.report, first.plan_text, None)

    def check_required(self, words: Sequence[str]) -> None:
        self._require(words)

    async def bundle(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        return None

    async def probe(self) -> dict[str, Any]:
        cgroup = {"kind": self.name, "missing": {}, "remedy": ""}
        return {"checks": [], "cgroup_driver": cgroup}

    # ---- the contract

    def on_end(self, call: Callable[[ExecEnd], None]) -> None:
        self._on_end.append(call)

    def on_gone(self, call: Callable[[str, str | None], None]) -> None:
        self._on_gone.append(call)

    async def fingerprint(self) -> Fingerprint:
        return Fingerprint(True, "", LEVELS, {}, dict(self._missing))

    def explain(self, spec: CellSpec) -> Explained:
        self._require(spec.require)
        missing = {name: reason for name, (reason, _) in self._missing.items()}
        text = canonical({"argv": list(spec.argv), "cwd": spec.cwd})
        return Explained((f"run {' '.join(spec.argv)}",), {"argv": list(spec.argv)}, text, missing)

    def _require(self, words: Sequence[str]) -> None:
        for word in words:
            if word in self._missing:
                reason, remedy = self._missing[word]
                raise AetherError("LEVEL_UNMET", f"cannot meet the required level {word}: {reason}", remedy)

    async def launch(self, order: Order) -> Started:
        known = self._cells.get(order.cell_id)
        if known is not None:
            first = known.started
            return Started(first.handle, first.exec_id, first.report, first.plan_text, None)
        text, report = self._confined(order.spec)
        ours, theirs = socket.socketpair() if order.spec.channel else (None, None)
        channel = ours.detach() if ours is not None else None
        started = Started(Handle(order.cell_id), order.exec_id, report, text, channel)
        await _serve(order.listening)
        files = {file.path: os.pread(fd, os.fstat(fd).st_size, 0) for file, fd in order.files}
        cell = _Cell(started, time.time_ns() // 1000, files, order.spec.limits)
        self._start(cell, order.exec_id, order.spec, theirs)
        self._cells[order.cell_id] = cell
        return started

    async def allocate(
        self, cell_id: str, spec: CellSpec, within: Handle | None = None, listening: Listening | None = None
    ) -> Started:
        known = self.found(Handle(cell_id))
        if known is not None:
            return known
        if within is not None and within not in self._cells:
            raise AetherError("NO_SUCH_CELL", f"cannot find cell {within}")
        text, report = self._confined(spec)
        await _serve(listening)
        started = Started(Handle(cell_id), "", report, text, None)
        self._cells[cell_id] = _Cell(started, time.time_ns() // 1000, {}, spec.limits)
        return started

    def _confined(self, spec: CellSpec) -> tuple[bytes, SandboxReport]:
        self._require(spec.require)
        text = self.explain(spec).plan_text
        report = SandboxReport(
            level="cell",
            executor=self.name,
            enforced=dict.fromkeys(spec.require, True),
            missing={name: reason for name, (reason, _) in self._missing.items()},
            plan_digest=digest_bytes(text),
        )
        return text, report

    def _start(self, cell: _Cell, exec_id: str, spec: CellSpec, channel: socket.socket | None = None) -> None:
        program = self._programs.get(spec.argv[0])
        if program is None:
            raise AetherError("CELL_FAILED", f"cannot start {exec_id}: exec: no program {spec.argv[0]}")
        run = Run(spec, cell.files, channel=channel)
        work = asyncio.ensure_future(program(run))
        executable = _Exec(run, time.monotonic(), work)
        cell.execs[exec_id] = executable
        watch = asyncio.create_task(self._watch(cell, exec_id, executable))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)

    async def _watch(self, cell: _Cell, exec_id: str, executable: _Exec) -> None:
        """Waits for the program; it may be cancelled before it has begun."""
        done, _ = await asyncio.wait({executable.work}, timeout=executable.run.spec.limits.timeout_ms / 1000)
        code, signo = None, None
        if not done:
            executable.timed_out, signo = True, signal.SIGTERM
            executable.work.cancel()
        elif executable.work.cancelled():
            signo = signal.SIGKILL
        else:
            code = executable.work.result()
        wall_us = int((time.monotonic() - executable.began_s) * 1e6)
        status = ExitStatus(
            code=code,
            signal=signo,
            timed_out=executable.timed_out,
            reason=cell.reason if signo is not None else None,
        )
        executable.end = ExecEnd(
            cell_id=str(cell.started.handle),
            exec_id=exec_id,
            exit=status,
            usage=Usage(wall_us=wall_us, basis={"wall_us": "measured"}),
        )
        executable.ended.set()
        if str(cell.started.handle) in self._cells:
            self._tell(executable.end)

    def _tell(self, end: ExecEnd) -> None:
        for call in self._on_end:
            call(end)

    async def adopt(self) -> list[Adopted]:
        return self._adopted()

    def _adopted(self) -> list[Adopted]:
        found = []
        for cell_id, cell in self._cells.items():
            execs = {exec_id: each.end for exec_id, each in cell.execs.items() if not each.acknowledged}
            first = cell.started.exec_id
            found.append(Adopted(cell.started.handle, cell_id, first, cell.started_wall_us, execs.get(first), execs))
        return found

    async def start_exec(self, handle: Handle, exec_id: str, spec: CellSpec, stdio: Stdio = "logs") -> None:
        cell = self._cell(handle)
        if exec_id in cell.execs:
            return
        ours, theirs = socket.socketpair() if stdio != "logs" else (None, None)
        self._start(cell, exec_id, spec, theirs)
        if ours is not None:
            cell.execs[exec_id].stdio, cell.execs[exec_id].outside = stdio, ours.detach()

    def has_exec(self, handle: Handle, exec_id: str) -> bool:
        cell = self._cells.get(handle)
        return cell is not None and exec_id in cell.execs

    async def terminal(self, handle: Handle, exec_id: str) -> tuple[Stdio, int]:
        executable = self._exec(handle, exec_id)
        if executable.outside < 0:
            raise AetherError("NOT_READY", f"cannot attach to {exec_id}: it has no terminal or standard input")
        if executable.stdio == "tty":
            return "tty", os.dup(executable.outside)
        fd, executable.outside = executable.outside, -1
        return executable.stdio, fd

    async def window(self, handle: Handle, exec_id: str, rows: int, columns: int) -> None:
        executable = self._exec(handle, exec_id)
        if executable.stdio != "tty":
            raise AetherError("NOT_READY", f"cannot size the terminal of {exec_id}: it has none")
        executable.run.window = (rows, columns)

    async def freeze(self, handle: Handle, frozen: bool) -> None:
        self._cell(handle).frozen = frozen

    async def resize(self, handle: Handle, limits: Limits) -> None:
        self._cell(handle).limits = limits

    async def stop_exec(self, handle: Handle, exec_id: str, grace_ms: int) -> None:
        executable = self._exec(handle, exec_id)
        executable.run.terminated.set()
        asyncio.get_running_loop().call_later(grace_ms / 1000, executable.work.cancel)

    async def diff(self, handle: Handle) -> tuple[int, int]:
        self._cell(handle)
        raise AetherError("NO_LAYER", f"cannot tell what cell {handle} changed: it has no image")

    async def put(self, handle: Handle, path: str, fd: int, executable: bool) -> None:
        files = self._cell(handle).files
        if any(other.startswith(path + "/") or path.startswith(other + "/") for other in files):
            raise AetherError("OUTPUT_REFUSED", f"cannot put {path!r}: a directory is in its place")
        files[path] = os.pread(fd, os.fstat(fd).st_size, 0)

    async def files(self, handle: Handle, path: str) -> FileListing:
        inside = f"{path}/" if path else ""
        found: dict[str, FileEntry] = {}
        for name, data in sorted(self._cell(handle).files.items()):
            if name.startswith(inside):
                first, below, _ = name[len(inside) :].partition("/")
                kind: FileKind = "directory" if below else "file"
                size = 0 if below else len(data)
                found[first] = FileEntry(name=first, kind=kind, size_bytes=size, mode=0o644, modified_at=rfc3339(0))
        if path and not found:
            raise AetherError("NOT_FOUND", f"cannot list {path!r}: no such directory")
        return FileListing(path=path, entries=tuple(found.values()), truncated=False)

    async def signal(self, handle: Handle, exec_id: str, signo: int) -> None:
        executable = self._exec(handle, exec_id)
        if signo == signal.SIGKILL:
            executable.work.cancel()
        else:
            executable.run.signals.append(signo)
            if signo == signal.SIGTERM:
                executable.run.terminated.set()

    async def stop(self, handle: Handle, grace_ms: int) -> None:
        cell = self._cell(handle)
        cell.reason = cell.reason or "killed"
        for executable in cell.execs.values():
            executable.run.terminated.set()
            asyncio.get_running_loop().call_later(grace_ms / 1000, executable.work.cancel)

    async def kill(self, handle: Handle) -> None:
        cell = self._cell(handle)
        cell.reason = cell.reason or "killed"
        for executable in cell.execs.values():
            executable.work.cancel()
            await executable.ended.wait()

    async def wait(self, handle: Handle, exec_id: str) -> ExecEnd:
        executable = self._exec(handle, exec_id)
        await executable.ended.wait()
        assert executable.end is not None
        return executable.end

    async def trace(self, handle: Handle, duration_ms: int) -> None:
        raise AetherError("LEVEL_UNMET", f"cannot trace {handle}: its programs make no system calls of their own")

    async def contention(self, handle: Handle) -> Contention:
        self._cell(handle)
        return Contention()

    async def usage(self, handle: Handle) -> Usage:
        cell = self._cell(handle)
        first = cell.execs.get(cell.started.exec_id)
        if first is not None and first.end is not None:
            return first.end.usage
        wall_us = time.time_ns() // 1000 - cell.started_wall_us
        return Usage(wall_us=wall_us, basis={"wall_us": "measured"})

    async def report(self, handle: Handle) -> SandboxReport:
        return self._cell(handle).started.report

    async def collect(self, handle: Handle, globs: Sequence[str]) -> CellFiles:
        cell = self._cell(handle)
        refused: dict[str, str] = {}
        for executable in cell.execs.values():
            refused.update(executable.run.refused)
        files = tuple(
            CellFile(path=path, size_bytes=len(data))
            for path, data in sorted(cell.files.items())
            if any(_matches(glob, path) for glob in globs)
        )
        return CellFiles(files=files, refused=refused)

    async def open(self, handle: Handle, path: str) -> int:
        cell = self._cell(handle)
        if path not in cell.files:
            raise AetherError("OUTPUT_REFUSED", f"cannot open an output: {path!r} is not there")
        fd = os.memfd_create("output")
        os.write(fd, cell.files[path])
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    async def acknowledge(self, handle: Handle, exec_id: str) -> None:
        cell, executable = self._cell(handle), self._exec(handle, exec_id)
        executable.acknowledged = True
        if not cell.started.exec_id:
            cell.execs.pop(exec_id)
            _close(executable)

    async def free(self, handle: Handle) -> None:
        if handle in self._cells:
            await self.kill(handle)
            cell = self._cells.pop(handle, None)
            for executable in cell.execs.values() if cell else ():
                _close(executable)

    def _cell(self, handle: Handle) -> _Cell:
        cell = self._cells.get(handle)
        if cell is None:
            raise AetherError("NO_SUCH_CELL", f"cannot find cell {handle}")
        return cell

    def _exec(self, handle: Handle, exec_id: str) -> _Exec:
        executable = self._cell(handle).execs.get(exec_id)
        if executable is None:
            raise AetherError("NOT_FOUND", f"cannot find {exec_id} in cell {handle}")
        return executable


def _close(executable: _Exec) -> None:
    if executable.outside >= 0:
        os.close(executable.outside)
        executable.outside = -1


def _matches(glob: str, path: str) -> bool:
    """Within one part only; the double needs no `**`."""
    parts, names = glob.split("/"), path.split("/")
    return len(parts) == len(names) and all(map(fnmatchcase, names, parts))


async def _serve(listening: Listening | None) -> None:
    if listening is not None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            await listening(listener.fileno())
