"""Where a cell goes and how it is scheduled: in which other cell, and with what priority. Raises RefusedError."""

from __future__ import annotations

from typing import Any

from aether.contract import limits
from aether.spawner.cells import Cell
from aether.spawner.linux import sched as scheduling
from aether.spawner.linux.cgroup import CgroupDriver
from aether.spawner.linux.cgroup_limits import CgroupLimits
from aether.spawner.linux.sched import Sched, SchedError
from aether.spawner.proctree import leader
from aether.spawner.protocol import RefusedError


def check_parent(parent: Cell, cgroups: CgroupDriver) -> None:
    """Whether a cell may be created in `parent` now."""
    if parent.state != "running" or parent.reason is not None:
        raise RefusedError("NO_SUCH_CELL", f"cannot nest in cell {parent.cell_id}: it is {parent.state}")
    if not parent.cgroup.nestable and cgroups.kind != "none":
        raise RefusedError("BAD_FIELD", f"cannot nest in cell {parent.cell_id}: it was not created nestable")
    depth, above = 1, parent.parent
    while above is not None:
        depth, above = depth + 1, above.parent
    if depth >= limits.CELL_DEPTH_MAX:
        raise RefusedError("CELL_LIMIT", f"cannot nest in cell {parent.cell_id}: it is {depth} deep")


def split_limits(asked: dict[str, Any]) -> tuple[CgroupLimits, int | None]:
    """What the cgroup is to hold, and what the cell may keep on disk."""
    rest = {name: value for name, value in asked.items() if name != "disk_bytes"}
    return CgroupLimits(**rest), asked.get("disk_bytes")


def read_sched(asked: dict[str, Any] | None) -> Sched | None:
    """The fields as one; BAD_FIELD where they do not go together."""
    try:
        return Sched(**asked) if asked is not None else None
    except ValueError as error:
        raise RefusedError("BAD_FIELD", f"cannot schedule the cell: {error}") from error


def schedule(cell: Cell, sched: Sched, cgroups: CgroupDriver) -> None:
    """PID 1 gets its class, before it starts anything."""
    if cell.report.get("level") == "gvisor":
        why = f"cannot schedule cell {cell.cell_id}: gVisor runs its processes as threads of its own"
        raise RefusedError("CELL_FAILED", why, "use the native driver, or a CPU quota or weight")
    try:
        if sched.realtime:
            cgroups.allow_realtime(cell.cgroup)
        scheduling.apply(cell.pid, sched)
    except OSError as error:
        raise RefusedError("CELL_FAILED", error.strerror or str(error)) from error
    except SchedError as error:
        raise RefusedError("CELL_FAILED", str(error), error.remedy) from error
    cell.sched = sched


def schedule_started(cell: Cell, inner_pid: int, cgroups: CgroupDriver) -> str:
    """An executable of a cell with deadlines gets its own, which PID 1 cannot hand down; what the kernel says of
    it then, or of PID 1."""
    sched = cell.sched
    if sched is None:
        return ""
    try:
        if sched.policy == "deadline":
            pid = leader(cgroups.procs(cell.cgroup), inner_pid)
            if pid is None:
                return sched.describe()  # it has ended meanwhile
            scheduling.apply_deadline(pid, sched)
            return scheduling.seen(pid).describe()
        return scheduling.seen(cell.pid).describe()
    except SchedError as error:
        raise RefusedError("CELL_FAILED", str(error), error.remedy) from error
    except OSError:
        return sched.describe()  # it has ended meanwhile
