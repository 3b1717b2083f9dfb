"""The spawner's side of observation: which cells are watched, what it saw itself, and the observer that writes.

With eBPF a cell is watched by one element of a map in the kernel, keyed by the id of its cgroup v2 directory; events
go from there to the observer and never through this process. Programs are attached with the first cell and stay
until the end; this process holds them, so an observer that dies costs at most what it was about to write.

Without eBPF, or without a cgroup v2 directory, the observer is told what PID 1 reports: executables that start and
end, signals that clients send. Deaths for want of memory (where no program sees them) and time lost to a CPU quota
are told in either case.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Any, Protocol

from aether.spawner.cells import Cell, Exec
from aether.spawner.helper import Helper, HelperOptions
from aether.spawner.linux.bpf import calls, layout, permission
from aether.spawner.loop import Loop

_ID_BYTES = 8
_OOM = "mark_victim"


class Traces(Protocol):
    """The system-call traces, which the observer writes down."""

    def observer_died(self) -> None: ...

    def written(self, cell_id: str) -> None: ...

    def cell_ended(self, cell_id: str) -> None: ...


class ObserverLink:
    """One running observer, the kernel's map, and the cells that are observed."""

    def __init__(self, loop: Loop, options: HelperOptions) -> None:
        self.reason, self.remedy = "the observer is starting", ""
        self.traces: Traces | None = None
        self._cells: dict[str, tuple[bytes | None, int]] = {}
        self._in_kernel: set[str] = set()
        self._watched = self._ring = -1
        self._asked = False
        self._programs: dict[str, int] = {}
        self._links: dict[str, int] = {}
        self._helper = Helper(loop, "aether.spawner.observer", options, self._started, self._on_message)
        self._helper.start()

    @property
    def pid(self) -> int:
        return self._helper.pid

    def facts(self) -> dict[str, Any]:
        """`ebpf`: whether the kernel tells; else why not."""
        return {"ebpf": not self.reason, "reason": self.reason, "remedy": self.remedy, "cells": len(self._cells)}

    # ---- the observer

    def _started(self) -> None:
        if self._ring >= 0:
            self._helper.put({"op": "ring"}, [os.dup(self._ring)])
        else:
            self._asked = True
            self._helper.put({"op": "setup"})
        if self.traces is not None:
            self.traces.observer_died()

    def _on_message(self, event: dict[str, Any], fds: tuple[int, ...]) -> None:
        if event["ev"] == "ready" and self._asked:
            self._asked = False  # said while it has privileges, once
            self.reason, self.remedy = event["reason"], event["remedy"]
            if fds:
                self._watched, self._ring, *programs = fds
                self._programs = dict(zip(event["tracepoints"], programs, strict=True))
                for cell_id in self._cells:
                    self._tell_kernel(cell_id)
            return
        for fd in fds:
            os.close(fd)
        if event["ev"] == "traced" and self.traces is not None:
            self.traces.written(event["cell"])

    def put(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """To the observer; takes over the descriptors."""
        self._helper.put(message, fds)

    def _tell_kernel(self, cell_id: str) -> None:
        """From now on the kernel tells of this cell; if it will not, PID 1's reports remain."""
        key, flags = self._cells[cell_id]
        if self._watched < 0 or key is None:
            return
        try:
            if self._programs:
                self._attach()
            calls.update(self._watched, key, layout.watched_value(cell_id, flags))
        except OSError as error:
            self.reason, self.remedy = permission.explain(error)
        else:
            self._in_kernel.add(cell_id)

    def _attach(self) -> None:
        programs, self._programs = self._programs, {}
        try:
            for tracepoint, program in programs.items():
                try:
                    self._links[tracepoint] = calls.attach(program, tracepoint)
                except OSError as error:
                    if error.errno != errno.ENOENT or tracepoint != _OOM:
                        raise
        finally:
            for program in programs.values():
                os.close(program)

    # ---- cells

    def watch(self, cell: Cell) -> None:
        """From now on; before its first executable starts."""
        v2 = cell.cgroup.v2_fd
        # The id of a cgroup is its inode number (kernfs); that of a directory never changes.
        key = os.fstat(v2).st_ino.to_bytes(_ID_BYTES, "little") if v2 is not None else None
        flags = layout.PID1_IS_OURS if cell.has_pid_namespace else 0
        self._cells[cell.cell_id] = key, flags
        self._tell_kernel(cell.cell_id)

    def started(self, cell: Cell, executable: Exec) -> None:
        if cell.cell_id not in self._in_kernel:
            self._note(cell, kind="exec", pid=executable.pid)

    def signalled(self, cell: Cell, executable: Exec, signo: int) -> None:
        if cell.cell_id not in self._in_kernel:
            self._note(cell, kind="signal", pid=executable.pid, signal=signo, sender="outside")

    def ended(self, cell: Cell, executable: Exec) -> None:
        """`executable` has its exit and usage."""
        end, usage = executable.exit or {}, executable.usage or {}
        if executable.oom and (cell.cell_id not in self._in_kernel or _OOM not in self._links):
            self._note(cell, kind="oom", pid=executable.pid)
        if usage.get("throttled_us"):
            self._note(cell, kind="throttle", count=usage["throttled_us"])
        if cell.cell_id not in self._in_kernel:
            self._note(cell, kind="exit", pid=executable.pid, code=end.get("code"), signal=end.get("signal"))

    def _note(self, cell: Cell, **event: Any) -> None:
        event["time_us"] = time.time_ns() // 1000
        self._helper.put({"op": "note", "cell": cell.cell_id, "event": event})

    def end(self, cell_id: str, *, started: bool) -> None:
        """Nothing of the cell lives; what it did is in the ring. A cell that never `started` leaves no file."""
        if cell_id not in self._cells:
            return
        key, _ = self._cells.pop(cell_id)
        dropped = 0
        if cell_id in self._in_kernel and key is not None:
            self._in_kernel.discard(cell_id)
            value = calls.lookup(self._watched, key, layout.WATCHED.size)
            dropped = layout.dropped_of(value) if value is not None else 0
            calls.delete(self._watched, key)
        if started:
            self._helper.put({"op": "end", "cell": cell_id, "dropped": dropped})
        if self.traces is not None:
            self.traces.cell_ended(cell_id)

    def close(self, wait_s: float = 1.0) -> None:
        """Let the observer end; then nothing of ours is left in the kernel."""
        self._helper.close(wait_s)
        for fd in (*self._links.values(), *self._programs.values(), self._watched, self._ring):
            if fd >= 0:
                os.close(fd)
        self._links, self._programs, self._watched, self._ring = {}, {}, -1, -1
