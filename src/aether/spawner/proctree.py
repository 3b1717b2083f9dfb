"""The processes of one executable among all of its cell, as the spawner sees them in /proc.

An executable's first process leads a session (setsid(2) before exec). Its processes are those of that session and
all that descend from one of them, also in sessions of their own. A process whose parents are all dead and that has
left the session looks like any other child of PID 1; `seen` carries what an earlier look knew, so that what was a
descendant when the stop was asked for does not get away by losing its parent meanwhile. Pids are named with their
start times (proc(5), field 22), so that a number that was used again is not taken for the old process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass

Identity = tuple[int, int]
"""Host pid and start time in clock ticks."""


@dataclass(frozen=True, slots=True)
class Process:
    """One row of /proc: numbers of the spawner's own pid namespace."""

    pid: int
    parent: int
    session: int
    start: int
    ticks: int = 0
    """CPU of its own and of the children that it waited for, in clock ticks."""

    @property
    def identity(self) -> Identity:
        return self.pid, self.start


def look(pids: Iterable[int]) -> list[Process]:
    """The processes that are there now; those that went meanwhile are left out."""
    return [process for pid in pids if (process := _read(pid)) is not None]


def children(pid: int) -> list[int]:
    """The children of a process's first thread (proc(5), /proc/pid/task/tid/children); none when it is gone."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def below(root: int) -> list[int]:
    """Every descendant of a process: of a cell's PID 1 all that is in the cell, for orphans become its children
    (pid_namespaces(7); without a namespace it is their subreaper, prctl(2)). For hosts without cgroups."""
    everything = look(int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    found = belonging([process for process in everything if process.pid != root], None, frozenset(), root)
    return [pid for pid, _ in found]


def leader(pids: Iterable[int], inner_pid: int) -> int | None:
    """The host pid of the process that is `inner_pid` in the cell's pid namespace (proc(5), NSpid)."""
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            for row in file:
                if row.startswith("NSpid:"):
                    if int(row.split()[-1]) == inner_pid:
                        return pid
                    break
    return None


def belonging(
    processes: list[Process], session: int | None, seen: frozenset[Identity], root: int | None = None
) -> frozenset[Identity]:
    """Pure: the processes of `session`, those seen before, and all descendants of these and of `root`."""
    found = {p.identity for p in processes if p.session == session or p.pid == session or p.identity in seen}
    members = {pid for pid, _ in found} | ({root} if root is not None else set())
    grew = True
    while grew:
        grew = False
        for process in processes:
            if process.parent in members and process.pid not in members:
                members.add(process.pid)
                found.add(process.identity)
                grew = True
    return frozenset(found)


def kill(identities: Iterable[Identity]) -> None:
    """SIGKILL to each that is still the same process."""
    for pid, start in identities:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            fd = os.pidfd_open(pid)
            try:
                process = _read(pid)  # looked at again while the pidfd holds the process
                if process is not None and process.start == start:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)


def _read(pid: int) -> Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except OSError:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before may hold anything
    ticks = sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), ticks)
