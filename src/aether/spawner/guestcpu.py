"""What an executable is charged of the CPU of a cell that lives on.

wait4(2) tells of the first process and of what it waited for: not of what it left behind, nor of children that nobody
waits for (with SIGCHLD ignored the kernel adds them to no account). The cell's own cgroup counts them all. So whatever
it counted that no executable accounts for, neither one that ended nor one that runs, is charged to the next one that
ends, and told as apportioned. Less than CARRIED_US waits for the next: PID 1 and starting cost something too.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Final

from aether.spawner import proctree
from aether.spawner.cells import Cell, Exec
from aether.spawner.linux.cgroup import CgroupDriver, CgroupHandle, CgroupUsage

CARRIED_US: Final = 50_000
"""Above the resolution of the clocks that are compared, one tick of each living process."""
_TICK_US: Final = 1_000_000 // os.sysconf("SC_CLK_TCK")


def note_start(cgroups: CgroupDriver, cell: Cell, executable: Exec) -> None:
    """What was counted before an executable began; what it took to make the cell is charged to none."""
    executable.oom_kills_before = cgroups.usage(cell.cgroup).oom_kills or 0
    if cell.cpu_charged_us == 0:
        cell.cpu_charged_us = _cpu_us(cgroups.usage(CgroupHandle(cell.cgroup.home))) or 0


def usage_of_ended(cgroups: CgroupDriver, cell: Cell, executable: Exec, counted: CgroupUsage) -> CgroupUsage:
    """What the cell counted, as far as it says something of `executable`, which has ended: the peaks of all that is
    in it, and CPU that wait4(2) told nobody of. Without a cgroup only wait4's word is left."""
    shared = {"memory_peak_bytes": "cell", "pids_peak": "cell"}
    told = CgroupUsage(memory_peak_bytes=counted.memory_peak_bytes, pids_peak=counted.pids_peak, sources=shared)
    own = executable.rusage or {"utime_us": 0, "stime_us": 0}
    own_us = own["utime_us"] + own["stime_us"]
    total_us = _cpu_us(cgroups.usage(CgroupHandle(cell.cgroup.home)))
    if total_us is None:
        return told
    left_us = total_us - cell.cpu_charged_us - own_us - _running_us(cgroups, cell, executable)
    if left_us < CARRIED_US:
        cell.cpu_charged_us += own_us
        return told
    cell.cpu_charged_us += own_us + left_us
    told.sources.update({"cpu_user_us": "cell", "cpu_system_us": "cell", "cpu": "cell"})
    return replace(told, cpu_user_us=own["utime_us"] + left_us, cpu_system_us=own["stime_us"])


def _cpu_us(counted: CgroupUsage) -> int | None:
    if counted.cpu_user_us is None or counted.cpu_system_us is None:
        return None
    return counted.cpu_user_us + counted.cpu_system_us


def _running_us(cgroups: CgroupDriver, cell: Cell, ended: Exec) -> int:
    """CPU so far of the executables that go on: of their processes, and of what these have waited for."""
    others = [each for each in cell.running() if each is not ended and each.pid is not None]
    if not others:
        return 0
    pids = [pid for pid in cgroups.procs(cell.cgroup) if pid != cell.pid]
    processes = proctree.look(pids)
    mine: set[proctree.Identity] = set()
    for each in others:
        session = proctree.leader(pids, each.pid or 0) if cell.has_pid_namespace else each.pid
        if session is not None:
            mine |= proctree.belonging(processes, session, frozenset())
    return _TICK_US * sum(process.ticks for process in processes if process.identity in mine)
