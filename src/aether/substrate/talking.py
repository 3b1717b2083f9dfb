"""Talking to a running executable: signals, its terminal, its standard input.

An attached connection carries raw bytes, pumped both ways with one bounded buffer each; nothing here reads them.
Detaching (the client goes) leaves an executable with a terminal as it is: what it writes waits in the terminal's
buffer, and then it waits. Of a `pipe` the client's end is the end of the standard input. The end of the executable
closes the connection. One connection at a time talks to an executable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Final

from aether.contract import ids, limits
from aether.contract.calls import Caller
from aether.contract.cellcalls import STREAM_PROTOCOL, AttachCall, SignalCall, UpgradeReply, WindowCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView, Stdio
from aether.contract.records import RecordType
from aether.substrate import cellentries as entries
from aether.substrate.access.access import Admission, Resource
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.execution import Execution
from aether.substrate.gate import Gate
from aether.substrate.ledger import OpenJob
from aether.substrate.lines import Held
from aether.substrate.reading import Reading

START_WAIT_S: Final = 15.0
_POLL_S: Final = 0.01
_CHUNK_BYTES: Final = 64 * 1024


class Talking:
    """Handlers of `job.signal`, `job.attach`, `job.window`."""

    def __init__(
        self, gate: Gate, book: Book, house: CellHouse, cells: CellSupervisor, execution: Execution, reading: Reading
    ) -> None:
        self._gate = gate
        self._execution = execution
        self._book = book
        self._house = house
        self._cells = cells
        self._reading = reading
        self._attached: set[str] = set()

    def __repr__(self) -> str:
        return f"<Talking attached={len(self._attached)}>"

    async def signal(self, caller: Caller, call: SignalCall) -> JobView:
        """`job.signal`: recorded, then sent."""
        if not 1 <= call.signal < signal.NSIG:
            raise AetherError("BAD_FIELD", f"cannot send signal {call.signal}: it is none of 1..{signal.NSIG - 1}")
        admission, job = await self._running(caller, "job.signal", call.job_id)
        order = self._house.order(caller, admission, "job.signal")
        await self._record("job.signal", job, order, {"signal": str(call.signal)})
        await self._cells.signal(job.place, job.executable, call.signal)
        return await self._reading.view_in_tenant(call.job_id, admission)

    async def window(self, caller: Caller, call: WindowCall) -> JobView:
        """`job.window`: the program hears of it by SIGWINCH."""
        for name in ("rows", "columns"):
            if not 1 <= getattr(call, name) <= limits.TERMINAL_SIZE_MAX:
                raise AetherError("BAD_FIELD", f"cannot size a terminal: {name} must be 1..{limits.TERMINAL_SIZE_MAX}")
        admission, job = await self._running(caller, "job.window", call.job_id)
        await self._cells.window(job.place, job.executable, call.rows, call.columns)
        return await self._reading.view_in_tenant(call.job_id, admission)

    async def attach(self, caller: Caller, call: AttachCall) -> UpgradeReply:
        """`job.attach`: waits for the start of an executable that is about to; raises NOT_READY for one that has
        neither terminal nor standard input, or that somebody else is attached to."""
        if call.job_id in self._attached or len(self._attached) >= limits.ATTACHED_MAX:
            why = f"cannot attach to {call.job_id}: another connection is attached"
            raise AetherError("NOT_READY", why, "detach the other connection first")
        self._attached.add(call.job_id)
        try:
            stdio, fd = await self._line(caller, call.job_id)
        except BaseException:
            self._attached.discard(call.job_id)
            raise

        async def run(connection: int) -> None:
            try:
                await relay(stdio, fd, connection)
            finally:
                self._attached.discard(call.job_id)

        def refuse() -> None:
            os.close(fd)
            self._attached.discard(call.job_id)

        return UpgradeReply(STREAM_PROTOCOL, run, refuse)

    async def _line(self, caller: Caller, job_id: str) -> tuple[Stdio, int]:
        """What to attach to, once that is recorded. The terminal of a command that is over already is at hand too."""
        admission, job, held = await self._told(caller, job_id)
        if job is None:
            assert held is not None
            fd = self._execution.lines.take(job_id)
            if fd is None:
                raise AetherError("NOT_READY", f"cannot attach to {job_id}: it is over")
            return "tty", fd
        order = self._house.order(caller, admission, "job.attach")
        fd = self._execution.lines.take(job_id)
        stdio: Stdio = "tty"
        if fd is None:
            stdio, fd = await self._cells.terminal(job.place, job.executable)
        try:
            await self._record("job.attach", job, order, {"stdio": stdio})
        except BaseException:
            os.close(fd)
            raise
        return stdio, fd

    async def _told(self, caller: Caller, job_id: str) -> tuple[Admission, OpenJob | None, Held | None]:
        """Leave to attach, and the running job, or the terminal that one left."""
        held = self._execution.lines.find(job_id)
        job = self._book.ledger.open.get(job_id)
        if held is not None and (job is None or job.end is not None):
            admission = self._gate.admit(caller, "job.attach", Resource(kind="job", id=job_id))
            if held.tenant_id != admission.principal.tenant_id or not admission.sees(held.cell):
                raise AetherError("NOT_FOUND", f"cannot find job {job_id}")
            return admission, None, held
        try:
            admission, job = await self._running(caller, "job.attach", job_id, START_WAIT_S)
        except AetherError as error:
            if error.code != "NOT_READY" or self._execution.lines.find(job_id) is None:
                raise
            return await self._told(caller, job_id)  # it was over as soon as it began
        return admission, job, None

    async def _running(
        self, caller: Caller, operation: str, job_id: str, wait_s: float = 0.0
    ) -> tuple[Admission, OpenJob]:
        """Leave, and the job with a living executable; raises NOT_FOUND, NOT_READY."""
        ids.parse(ids.JOB, job_id)
        admission = self._gate.admit(caller, operation, Resource(kind="job", id=job_id))
        job = self._book.ledger.open.get(job_id)
        if job is None:
            view = await self._reading.view_in_tenant(job_id, admission)
            raise AetherError("NOT_READY", f"cannot {operation}: {job_id} is {view.state}", "run the command again")
        name = job.intent.detail.get("cell")
        if job.intent.tenant_id != admission.principal.tenant_id or not (name is None or admission.sees(name)):
            raise AetherError("NOT_FOUND", f"cannot find job {job_id}")
        deadline_s = asyncio.get_running_loop().time() + wait_s
        while job.started is None and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(_POLL_S)
            if self._book.ledger.open.get(job_id) is not job:
                break
        if job.started is None or job.end is not None:
            raise AetherError("NOT_READY", f"cannot {operation}: the executable of {job_id} does not run")
        return admission, job

    async def _record(self, kind: RecordType, job: OpenJob, order: Order, detail: dict[str, str]) -> None:
        record = self._house.write(order, lambda index, now: entries.told(job.intent, kind, order, detail, index, now))
        await self._book.durable(record)


# ---- the relay


async def relay(stdio: Stdio, inside: int, connection: int) -> None:
    """Pumps until either side ends; owns and closes both descriptors.

    `inside` is the other side of a terminal (read and written), or the writing end of a pipe. A terminal whose last
    program is gone answers EIO (tty_ioctl(4), hang-up), which is its end of file.
    """
    os.set_blocking(inside, False)
    os.set_blocking(connection, False)
    pumps = [asyncio.ensure_future(_pump(connection, inside))]
    if stdio == "tty":
        pumps.append(asyncio.ensure_future(_pump(inside, connection)))
    else:
        pumps.append(asyncio.ensure_future(_broken(inside)))
    try:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        os.close(inside)
        with socket.socket(fileno=connection) as sock, contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


async def _pump(source: int, target: int) -> None:
    """Until the end of `source`, or until `target` takes no more."""
    try:
        while data := await _read(source):
            view = memoryview(data)
            while view:
                view = view[await _write(target, view) :]
    except OSError:
        return


async def _broken(pipe: int) -> None:
    """Returns when nobody reads the pipe any more (POLLERR, poll(2))."""
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pipe, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pipe)


async def _read(fd: int) -> bytes:
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(fd, _set, ready)
            try:
                await ready
            finally:
                loop.remove_reader(fd)


async def _write(fd: int, data: memoryview) -> int:
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.write(fd, data)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_writer(fd, _set, ready)
            try:
                await ready
            finally:
                loop.remove_writer(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
