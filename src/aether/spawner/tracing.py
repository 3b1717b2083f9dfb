"""System-call traces on demand: a program of its own per trace, attached only while somebody asks.

`cell.trace` with `on` answers once the trace is over and `trace.json` of the cell is written: after its time, when
somebody turns it off, or with the cell. What sys_enter costs is paid by every process of the machine meanwhile (a
comparison) and by the traced cell (see docs/cells.md), hence the bounds on time and number.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from aether.contract import limits
from aether.spawner.cells import Cell
from aether.spawner.linux.bpf import calls, layout, permission, programs
from aether.spawner.loop import Loop, Timer
from aether.spawner.observerlink import ObserverLink
from aether.spawner.protocol import RefusedError
from aether.spawner.roster import Reply


@dataclass(slots=True)
class _Trace:
    """A running trace; `link` and `area` are -1 once it is over and being written."""

    reply: Reply
    area: int
    link: int
    began_s: float
    timer: Timer


class Tracer:
    """The traces of all cells, at most one of each and TRACES_LIVE_MAX together."""

    def __init__(self, loop: Loop, observer: ObserverLink) -> None:
        self._loop = loop
        self._observer = observer
        self._traces: dict[str, _Trace] = {}
        observer.traces = self

    def start(self, cell: Cell, duration_ms: int, reply: Reply) -> None:
        """Raises RefusedError when nothing was attached."""
        if cell.cell_id in self._traces:
            raise RefusedError("BUSY", f"cannot trace cell {cell.cell_id}: it is being traced")
        if len(self._traces) >= limits.TRACES_LIVE_MAX:
            raise RefusedError("BUSY", f"cannot trace cell {cell.cell_id}: {limits.TRACES_LIVE_MAX} traces run")
        if cell.state != "running":
            raise RefusedError("NO_SUCH_CELL", f"cannot trace cell {cell.cell_id}: it is {cell.state}")
        v2 = cell.cgroup.v2_fd
        if self._observer.reason or v2 is None:
            why = self._observer.reason or "this host has no cgroup v2 hierarchy"
            raise RefusedError("LEVEL_UNMET", f"cannot trace a cell: {why}", self._observer.remedy)
        try:
            area, link = _attach(os.fstat(v2).st_ino, _pid_namespace(cell))
        except OSError as error:
            why, remedy = permission.explain(error)
            raise RefusedError("LEVEL_UNMET", f"cannot trace a cell: {why}", remedy) from error
        timer = self._loop.after(duration_ms / 1000, lambda: self.stop(cell.cell_id))
        self._traces[cell.cell_id] = _Trace(reply, area, link, self._loop.clock_s(), timer)

    def stop(self, cell_id: str) -> None:
        """Detach; what was seen is written down, then the trace's request is answered."""
        trace = self._traces.get(cell_id)
        if trace is None or trace.link < 0:
            return
        trace.timer.cancel()
        os.close(trace.link)
        duration_ms = int((self._loop.clock_s() - trace.began_s) * 1000)
        self._observer.put({"op": "traced", "cell": cell_id, "duration_ms": duration_ms}, (trace.area,))
        trace.link = trace.area = -1

    def written(self, cell_id: str) -> None:
        trace = self._traces.pop(cell_id, None)
        if trace is not None:
            trace.reply.ok({})

    def cell_ended(self, cell_id: str) -> None:
        self.stop(cell_id)

    def observer_died(self) -> None:
        """What was on the way to be written is lost; running traces go on."""
        for cell_id in [cell_id for cell_id, trace in self._traces.items() if trace.link < 0]:
            lost = RefusedError("UNAVAILABLE", f"cannot trace cell {cell_id}: the observer ended; ask again")
            self._traces.pop(cell_id).reply.refuse(lost)

    def close(self) -> None:
        """Detach everything; nobody is left to answer."""
        for trace in self._traces.values():
            for fd in (trace.link, trace.area):
                if fd >= 0:
                    os.close(fd)
        self._traces.clear()


def _attach(cgroup_id: int, pid_namespace: tuple[int, int] | None) -> tuple[int, int]:
    """(area, link) of a new trace; raises OSError."""
    area = calls.create_map(calls.ARRAY, 4, layout.TRACE_BYTES, 1, "aether_trace", shared=True)
    try:
        program = calls.load(programs.trace_program(cgroup_id, area, pid_namespace), "aether_trace")
        try:
            return area, calls.attach(program, "sys_enter")
        finally:
            os.close(program)
    except OSError:
        os.close(area)
        raise


def _pid_namespace(cell: Cell) -> tuple[int, int] | None:
    """Device and inode of the one whose pids the cell's own tools show."""
    if not cell.has_pid_namespace:
        return None
    try:
        found = os.stat(f"/proc/{cell.pid}/ns/pid")  # noqa: PTH116
    except OSError:
        return None
    return found.st_dev, found.st_ino
