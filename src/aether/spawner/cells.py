"""What the spawner knows of each cell and executable, and how it is told: plain state, no effects.

A cell is `starting` until PID 1 says ready, `running`, then `gone` once PID 1 is reaped and its cgroup is empty;
`cell.free` forgets it. An executable is `starting`, `running`, then `ended` once its exit is known *and* its
output is kept; it stays listed until `exit.ack` or `cell.free`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from aether.contract import limits
from aether.spawner.linux.cgroup import CgroupDriver, CgroupHandle, CgroupUsage
from aether.spawner.linux.sched import Sched
from aether.spawner.loop import Timer
from aether.spawner.proctree import Identity
from aether.spawner.terminal import Line
from aether.spawner.workdir import Owner


@dataclass(slots=True)
class Exec:
    """One executable. `exit` is `{code, signal, reason}`; `output` what the keeper kept."""

    exec_id: str
    key: str
    grace_ms: int
    logged: bool
    started_ns: int
    started_wall_us: int
    state: str = "starting"
    pid: int | None = None
    oom_kills_before: int = 0
    exit: dict[str, Any] | None = None
    rusage: dict[str, int] | None = None
    output: dict[str, Any] | None = None
    output_final: bool = False
    wall_us: int | None = None
    timed_out: bool = False
    oom: bool = False
    usage: dict[str, Any] | None = None
    acked: bool = False
    line: Line | None = None
    stop: tuple[int | None, frozenset[Identity]] | None = None
    """Its session and what was seen of it when it was stopped, until what it leaves is killed."""
    waiting: list[Any] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)

    def cancel_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()

    def close(self) -> None:
        """It is forgotten: its terminal hangs up."""
        self.cancel_timers()
        if self.line is not None:
            self.line.close()

    def view(self) -> dict[str, Any]:
        """The executable as `cell.list`, replies and `exec.exited` show it."""
        return {
            "exec": self.exec_id,
            "state": self.state,
            "started_wall_us": self.started_wall_us,
            "code": self.exit["code"] if self.exit else None,
            "signal": self.exit["signal"] if self.exit else None,
            "reason": self.exit["reason"] if self.exit else None,
            "oom": self.oom,
            "timed_out": self.timed_out,
            "usage": self.usage,
        }


@dataclass(slots=True, eq=False)
class Cell:
    """One cell. `once`: it ends with its first executable. `reason` says who ended it, when not itself.

    `place` names its cgroup and its work directory; `warm` until somebody takes it from the pool. `children` are
    the cells inside that live; `altered` what somebody else last did to its cgroup. `disk` holds `disk_bytes`;
    `cpu_charged_us` is what the executables that ended were charged.
    """

    cell_id: str
    place: str
    key: str
    owner: Owner
    uid_block: range
    cgroup: CgroupHandle
    has_pid_namespace: bool
    started_ns: int
    started_wall_us: int
    once: bool = False
    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT
    has_work: bool = False
    state: str = "starting"
    pid: int = -1
    pidfd: int = -1
    launched: Any = None
    report: dict[str, Any] = field(default_factory=dict)
    execs: dict[str, Exec] = field(default_factory=dict)
    reason: str | None = None
    parent: Cell | None = None
    children: list[Cell] = field(default_factory=list)
    sched: Sched | None = None
    altered: tuple[str, ...] = ()
    frozen: bool = False
    warm: bool = False
    disk: str | None = None
    disk_bytes: int = 0
    cpu_charged_us: int = 0
    usage: dict[str, Any] | None = None
    io: tuple[int, int] | None = None
    timers: list[Timer] = field(default_factory=list)
    waiting_start: list[Any] = field(default_factory=list)
    waiting_gone: list[Any] = field(default_factory=list)

    def cancel_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.timers.clear()

    def running(self) -> list[Exec]:
        return [each for each in self.execs.values() if each.state != "ended"]

    def enforced(self) -> dict[str, str]:
        """Its limits, each with what holds it."""
        return self.cgroup.enforced | ({"disk_bytes": self.disk} if self.disk is not None else {})

    def held(self) -> bool:
        """Whether its processes are stopped, by itself or with a cell around it."""
        return self.frozen or (self.parent is not None and self.parent.held())

    def view(self) -> dict[str, Any]:
        """The cell as `cell.list` and replies show it."""
        return {
            "cell": self.cell_id,
            "state": self.state,
            "once": self.once,
            "uid_first": self.uid_block.start,
            "started_wall_us": self.started_wall_us,
            "reason": self.reason,
            "parent": self.parent.cell_id if self.parent is not None else None,
            "frozen": self.held(),
            "altered": list(self.altered),
            "report": self.report,
            "usage": self.usage,
            "execs": [each.view() for each in self.execs.values() if not each.acked],
        }


def usage_view(
    counted: CgroupUsage, *, wall_us: int, io: tuple[int, int] | None, rusage: dict[str, int] | None
) -> dict[str, Any]:
    """Usage as JSON: what a cgroup counted, else what the kernel told PID 1, each with its source; else null.

    Without a memory controller the peak is null: ru_maxrss is that of the largest process, not of the cell.
    """
    sources = dict(counted.sources)
    user, system = counted.cpu_user_us, counted.cpu_system_us
    if user is None and rusage is not None:
        user, system = rusage["utime_us"], rusage["stime_us"]
        sources["cpu"] = "rusage"
    read, written = counted.io_read_bytes, counted.io_write_bytes
    if read is None and io is not None:
        read, written = io
        sources["io"] = "proc-io"
    sources["wall"] = "monotonic"
    return {
        "wall_us": wall_us,
        "cpu_user_us": user,
        "cpu_system_us": system,
        "memory_peak_bytes": counted.memory_peak_bytes,
        "memory_bytes": counted.memory_bytes,
        "pids_peak": counted.pids_peak,
        "io_read_bytes": read,
        "io_write_bytes": written,
        "oom_kills": counted.oom_kills,
        "throttled_us": counted.throttled_us,
        "throttled_count": counted.throttled_count,
        "memory_events": counted.memory_events,
        "pressure": counted.pressure,
        "sources": sources,
    }


def counted(cell: Cell, cgroups: CgroupDriver, now_ns: int, *, pressure: bool = False) -> dict[str, Any]:
    """Usage of a cell up to now, with what it waited for when `pressure` is asked."""
    found = cgroups.usage(cell.cgroup, pressure=pressure)
    return usage_view(found, wall_us=(now_ns - cell.started_ns) // 1000, io=cell.io, rusage=None)


def last_usage(cell: Cell, cgroups: CgroupDriver, now_ns: int) -> dict[str, Any]:
    """Of a cell that lived for one executable it is that one's, which was read when that ended."""
    told = [each.usage for each in cell.execs.values() if each.usage is not None]
    return told[-1] if cell.once and told else counted(cell, cgroups, now_ns)


def proc_io(pid: int) -> tuple[int, int] | None:
    """Bytes that PID 1's reaped descendants read and wrote on storage (proc(5), /proc/pid/io; wait(2) adds a
    child's account to its parent's). None when the kernel does not count or PID 1 is gone."""
    try:
        with open(f"/proc/{pid}/io") as file:
            rows = dict(line.split(": ") for line in file.read().splitlines())
        return int(rows["read_bytes"]), int(rows["write_bytes"])
    except (OSError, KeyError, ValueError):
        return None


def now_wall_us() -> int:
    return time.time_ns() // 1000
