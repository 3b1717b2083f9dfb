"""Control groups of cells: one interface over v1, v2 and their absence.

Layout: every hierarchy gets one parent `aether-<instance>` below the cgroup in which the spawner itself lives,
and every cell one directory `<cell>` in each parent. A cell that may have children (`nestable`) keeps its processes
in the leaf `<cell>/_` and its children beside it, because v2 allows no process in a cgroup that passes controllers
down (cgroup-v2.rst, "No Internal Process Constraint"); `_` is no cell's name. Nothing outside these parents is ever
written, save the `cgroup.subtree_control` of a v2 base that was delegated to us.

Invariants: a handle's descriptors belong to the handle and are closed by `remove`; `remove` succeeds only when
the kernel has let go of the last process and no child is left, so `True` proves that the cell is empty. A limit is
in `enforced` only once the kernel has taken it; a change of limits is taken whole or not at all.
Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from aether.spawner.linux.cgroup_limits import NAMES, NO_LIMITS, CgroupLimits

PARENT_PREFIX = "aether-"
LEAF = "_"


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """What the kernel counted for one cell and its children; None where no controller tells.

    `memory_events` are how often a limit was met (low, high, max, oom); `pressure` has the stall times of `cpu`,
    `memory`, `io` (psi.rst) and is filled only when asked for. `sources` names each file read.
    """

    cpu_user_us: int | None = None
    cpu_system_us: int | None = None
    memory_peak_bytes: int | None = None
    memory_bytes: int | None = None
    pids_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    oom_kills: int | None = None
    throttled_us: int | None = None
    throttled_count: int | None = None
    memory_events: dict[str, int] = field(default_factory=dict)
    pressure: dict[str, dict[str, float]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """One limit as a file and its text; `reset` is the text of no limit."""

    limit: str
    controller: str
    file: str
    value: str
    reset: str


@dataclass(slots=True, eq=False)
class CgroupHandle:
    """One cell's directories. A child joins by writing `0` to each of `attach_fds`, or starts in `v2_fd`.

    Writing a *foreign* pid instead costs an RCU grace period (about 6.5 ms after 30 ms idle). `set` is what was
    written, by file; `joined` the v1 hierarchies beyond those that every cell is in.
    """

    name: str
    nestable: bool = False
    parent: CgroupHandle | None = None
    children: list[CgroupHandle] = field(default_factory=list)
    attach_fds: tuple[int, ...] = ()
    v2_fd: int | None = None
    limits: CgroupLimits = NO_LIMITS
    enforced: dict[str, str] = field(default_factory=dict)
    set: dict[tuple[str, str], Setting] = field(default_factory=dict)
    joined: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """The directory of the processes."""
        return f"{self.name}/{LEAF}" if self.nestable else self.name

    def bounds(self) -> CgroupLimits:
        """The limits that hold here: a child's own are never above those around it."""
        return self.limits if self.parent is None else self.limits.over(self.parent.bounds())

    def close(self) -> None:
        self.close_attach()
        if self.v2_fd is not None:
            os.close(self.v2_fd)
            self.v2_fd = None
        if self.parent is not None and self in self.parent.children:
            self.parent.children.remove(self)

    def close_attach(self) -> None:
        """PID 1 has joined: everything it starts is born inside."""
        fds, self.attach_fds = self.attach_fds, ()
        for fd in fds:
            os.close(fd)


class CgroupDriver(Protocol):
    """What the spawner needs from cgroups. Every method but `start` and `create` may be repeated."""

    kind: str

    def probe(self) -> dict[str, Any]:
        """`{kind, base, controllers, missing: {limit: reason}}` as JSON."""

    def start(self) -> None:
        """Make the parents; raises OSError when the host does not let us."""

    def create(
        self, name: str, limits: CgroupLimits, *, parent: CgroupHandle | None = None, nestable: bool = False
    ) -> CgroupHandle:
        """Make the cell's directories with limits, below those of a nestable `parent`; on OSError nothing is left
        behind."""

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        """Apply every limit that is not None and note it in `handle.enforced`; raises OSError, whose text says
        which limit and why, and then nothing is changed."""

    def allow_realtime(self, handle: CgroupHandle) -> None:
        """Let the cell's processes be SCHED_FIFO and SCHED_RR where that takes a budget; raises OSError."""

    def usage(self, handle: CgroupHandle, *, pressure: bool = False) -> CgroupUsage:
        """Counters now."""

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        """Pids (of the spawner's pid namespace) that live in the cell and its children."""

    def kill(self, handle: CgroupHandle) -> None:
        """SIGKILL to every process of the cell and its children."""

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        """Stop or resume every process of the cell and its children; raises OSError when the host cannot."""

    def mend(self, handle: CgroupHandle, pids: tuple[int, ...]) -> tuple[str, ...]:
        """Undo what somebody else did to the cell's directories; what that was, one line each. `pids` are the
        cell's processes: those that were taken out are put back."""

    def remove(self, handle: CgroupHandle) -> bool:
        """Remove the directories; False while a process or a child still lives in them."""

    def sweep(self, instance: str) -> int:
        """Kill and remove all that a dead spawner `instance` left; the number of cells removed."""

    def close(self) -> None:
        """Remove the parents."""


def parent_of(base: str, instance: str) -> str:
    """The directory that holds the cells of `instance` below `base`."""
    return f"{base.rstrip('/')}/{PARENT_PREFIX}{instance}"


def left_by(base: str, instance: str) -> list[Path]:
    """Parents of a dead `instance` anywhere in the hierarchy of `base`: it may have lived in another cgroup."""
    top = Path(base)
    while (top.parent / "cgroup.procs").exists():
        top = top.parent
    return [path for path in top.glob(f"**/{PARENT_PREFIX}{instance}") if path.is_dir()]


class Tree:
    """Files of one cgroup hierarchy below a parent directory; the only place that touches cgroupfs."""

    __slots__ = ("_fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1

    def open(self) -> None:
        """Make the parent directory if need be and hold it."""
        Path(self.path).mkdir(0o755, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            Path(self.path).rmdir()

    def mkdir(self, name: str) -> None:
        os.mkdir(name, 0o755, dir_fd=self._fd)

    def rmdir(self, name: str) -> bool:
        """False while it is busy; a missing directory is a removed one."""
        try:
            os.rmdir(name, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def write(self, file: str, value: str) -> None:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def read(self, file: str) -> str:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.read(fd, 1 << 16).decode()
        finally:
            os.close(fd)

    def open_file(self, file: str, flags: int) -> int:
        return os.open(file, flags | os.O_CLOEXEC, dir_fd=self._fd)

    def number(self, file: str) -> int | None:
        """The file as one integer; None when it is missing or says `max`."""
        try:
            return int(self.read(file))
        except (OSError, ValueError):
            return None

    def table(self, file: str) -> dict[str, int]:
        """A flat-keyed file (`key value` lines); empty when missing."""
        try:
            text = self.read(file)
        except OSError:
            return {}
        rows = (line.split() for line in text.splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}

    def pids(self, file: str) -> tuple[int, ...]:
        try:
            return tuple(int(line) for line in self.read(file).split())
        except FileNotFoundError:
            return ()

    def below(self, name: str) -> Iterator[str]:
        """Directories below `name`, the deepest first, then `name` itself; nothing when it is missing."""
        for directory, _, _ in os.walk(f"{self.path}/{name}", topdown=False):
            yield os.path.relpath(directory, self.path)

    def all_pids(self, name: str, file: str = "cgroup.procs") -> tuple[int, ...]:
        """Pids of `name` and everything below it."""
        return tuple(pid for each in self.below(name) for pid in self.pids(f"{each}/{file}"))

    def children(self) -> list[str]:
        """Names of the child cgroups of the parent directory."""
        with os.scandir(self._fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


class NoCgroups:
    """The driver of a host that lends us no cgroup: nothing is limited and nothing counted, and it says so."""

    kind = "none"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def probe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": None,
            "controllers": [],
            "missing": dict.fromkeys(NAMES, self.reason),
            "remedy": "start it under systemd with Delegate=yes, or as "
            "`systemd-run --user --scope -p Delegate=yes aether ...`",
        }

    def start(self) -> None:
        return None

    def create(
        self, name: str, limits: CgroupLimits, *, parent: CgroupHandle | None = None, nestable: bool = False
    ) -> CgroupHandle:
        return CgroupHandle(name, nestable, parent)

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        return None

    def allow_realtime(self, handle: CgroupHandle) -> None:
        return None

    def usage(self, handle: CgroupHandle, *, pressure: bool = False) -> CgroupUsage:
        return CgroupUsage()

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        return ()

    def kill(self, handle: CgroupHandle) -> None:
        return None

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        raise OSError(95, f"cannot freeze a cell: {self.reason}")

    def mend(self, handle: CgroupHandle, pids: tuple[int, ...]) -> tuple[str, ...]:
        return ()

    def remove(self, handle: CgroupHandle) -> bool:
        handle.close()
        return True

    def sweep(self, instance: str) -> int:
        return 0

    def close(self) -> None:
        return None
