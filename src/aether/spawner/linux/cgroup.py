"""Control groups of cells: one interface over v1, v2 and their absence.

Layout: every hierarchy gets one parent `aether-<instance>` below the cgroup in which the spawner itself lives,
and every cell one directory `<cell>` in each parent. Nothing outside these parents is ever written, save the
`cgroup.subtree_control` of a v2 base that was delegated to us.

Invariants: a handle's descriptors belong to the handle and are closed by `remove`; `remove` succeeds only when
the kernel has let go of the last process, so `True` proves that the cell is empty.
Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PARENT_PREFIX = "aether-"
CPU_PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What to enforce; None leaves the kernel's default. `cpu_millis` are thousandths of one CPU."""

    memory_bytes: int | None = None
    swap_bytes: int | None = None
    cpu_millis: int | None = None
    cpu_weight: int | None = None
    pids: int | None = None
    io_weight: int | None = None


@dataclass(frozen=True, slots=True)
class CgroupUsage:
    """What the kernel counted for one cell; None where no controller tells. `sources` names each file read."""

    cpu_user_us: int | None = None
    cpu_system_us: int | None = None
    memory_peak_bytes: int | None = None
    memory_bytes: int | None = None
    pids_peak: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    oom_kills: int | None = None
    throttled_us: int | None = None
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class CgroupHandle:
    """One cell's directories. A child joins by writing `0` to each of `attach_fds`, or starts in `v2_fd`.

    Writing a *foreign* pid instead costs an RCU grace period (about 6.5 ms after 30 ms idle).
    """

    name: str
    attach_fds: tuple[int, ...] = ()
    v2_fd: int | None = None
    enforced: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        fds, self.attach_fds = self.attach_fds, ()
        for fd in fds:
            os.close(fd)
        if self.v2_fd is not None:
            os.close(self.v2_fd)
            self.v2_fd = None

    def close_attach(self) -> None:
        """PID 1 has joined: everything it starts is born inside."""
        fds, self.attach_fds = self.attach_fds, ()
        for fd in fds:
            os.close(fd)


class CgroupDriver(Protocol):
    """What the spawner needs from cgroups. Every method but `start` may be repeated."""

    kind: str

    def probe(self) -> dict[str, Any]:
        """`{kind, base, controllers, missing: {limit: reason}}` as JSON."""

    def start(self) -> None:
        """Make the parents; raises OSError when the host does not let us."""

    def create(self, name: str, limits: CgroupLimits) -> CgroupHandle:
        """Make the cell's directories with limits; on OSError nothing is left behind."""

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        """Apply every limit that is not None and note it in `handle.enforced`."""

    def usage(self, handle: CgroupHandle) -> CgroupUsage:
        """Counters now."""

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        """Pids (of the spawner's pid namespace) that live in the cell."""

    def kill(self, handle: CgroupHandle) -> None:
        """SIGKILL to every process of the cell."""

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        """Stop or resume every process of the cell; raises OSError when the host cannot."""

    def remove(self, handle: CgroupHandle) -> bool:
        """Remove the directories; False while a process still lives in them."""

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

    def children(self) -> list[str]:
        """Names of the child cgroups of the parent."""
        with os.scandir(self._fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


class NoCgroups:
    """The driver of a host that lends us no cgroup: nothing is limited and nothing counted, and it says so."""

    kind = "none"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def probe(self) -> dict[str, Any]:
        names = ("memory_bytes", "swap_bytes", "cpu_millis", "cpu_weight", "pids", "io_weight")
        return {
            "kind": self.kind,
            "base": None,
            "controllers": [],
            "missing": dict.fromkeys(names, self.reason),
            "remedy": "start it under systemd with Delegate=yes, or as "
            "`systemd-run --user --scope -p Delegate=yes aether ...`",
        }

    def start(self) -> None:
        return None

    def create(self, name: str, limits: CgroupLimits) -> CgroupHandle:
        return CgroupHandle(name)

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        return None

    def usage(self, handle: CgroupHandle) -> CgroupUsage:
        return CgroupUsage()

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        return ()

    def kill(self, handle: CgroupHandle) -> None:
        return None

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        raise OSError(95, f"cannot freeze a cell: {self.reason}")

    def remove(self, handle: CgroupHandle) -> bool:
        handle.close()
        return True

    def sweep(self, instance: str) -> int:
        return 0

    def close(self) -> None:
        return None
