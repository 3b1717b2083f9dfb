"""Stopping one executable of a cell that lives on: SIGTERM, the grace, then SIGKILL to all that is its own.

What belongs to it is looked up when the stop is asked for, and again at every kill, so a process that forks
meanwhile is followed; the kill is repeated until nothing of it is seen any more, or KILLS_MAX times.
"""

from __future__ import annotations

import signal

from aether.spawner import proctree
from aether.spawner.cells import Cell, Exec
from aether.spawner.linux.cgroup import CgroupDriver
from aether.spawner.loop import Loop
from aether.spawner.proctree import Identity

KILL_AGAIN_S = 0.01
KILLS_MAX = 500


class Stopping:
    """Stops executables. Where no cgroup lists a cell's processes, they are found below its PID 1."""

    def __init__(self, loop: Loop, cgroups: CgroupDriver) -> None:
        self._loop = loop
        self._cgroups = cgroups

    def stop(self, cell: Cell, executable: Exec, grace_ms: int) -> None:
        """Returns at once; asking again with a shorter grace is the shorter one."""
        if executable.state == "ended" or cell.launched is None:
            return
        session, seen = self._look(cell, executable, None, frozenset())
        if grace_ms > 0 and not cell.frozen:
            cell.launched.signal(executable.exec_id, signal.SIGTERM)
            kill = self._loop.after(grace_ms / 1000, lambda: self._kill(cell, executable, session, seen, KILLS_MAX))
            executable.timers.append(kill)
            executable.stop = (session, seen)
        else:
            self._kill(cell, executable, session, seen, KILLS_MAX)

    def ended(self, cell: Cell, executable: Exec) -> None:
        """The first process of a stopped executable is gone: what else it left goes too."""
        if executable.stop is not None:
            (session, seen), executable.stop = executable.stop, None
            self._kill(cell, executable, session, seen, KILLS_MAX)

    def _look(
        self, cell: Cell, executable: Exec, session: int | None, seen: frozenset[Identity]
    ) -> tuple[int | None, frozenset[Identity]]:
        pids = self._cgroups.procs(cell.cgroup) or proctree.below(cell.pid)
        if session is None and executable.pid is not None:
            session = proctree.leader(pids, executable.pid) if cell.has_pid_namespace else executable.pid
        processes = [process for process in proctree.look(pids) if process.pid != cell.pid]
        return session, proctree.belonging(processes, session, seen)

    def _kill(self, cell: Cell, executable: Exec, session: int | None, seen: frozenset[Identity], tries: int) -> None:
        if cell.state != "running":
            return
        session, alive = self._look(cell, executable, session, seen)
        proctree.kill(alive)
        if executable.exit is None:
            cell.launched.signal(executable.exec_id, signal.SIGKILL)
        if alive and tries > 0:
            known = seen | alive
            self._loop.after(KILL_AGAIN_S, lambda: self._kill(cell, executable, session, known, tries - 1))
