"""cgroup v2: limits where controllers are delegated; kill, freeze and CPU counting wherever v2 is mounted.

On a hybrid host v2 has no controllers, and still gives `cgroup.kill`, `cgroup.freeze` and `cpu.stat`, so the
v1 driver carries one of these for every cell.

The rule against internal processes (cgroup-v2.rst, "No Internal Process Constraint") forbids controllers below
a cgroup that holds processes: the base's own processes move to the leaf `<parent>-roles` first, all of them when
systemd marked the base as delegated (xattr user.delegate or trusted.delegate), else only the spawner.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from aether.spawner.linux.blockdev import Disk
from aether.spawner.linux.cgroup import (
    LEAF,
    CgroupHandle,
    CgroupUsage,
    Setting,
    Tree,
    left_by,
    parent_of,
)
from aether.spawner.linux.cgroup_apply import (
    Place,
    apply,
    bring_back,
    check_lists,
    check_nesting,
    mend_directory,
    mend_settings,
    pressure_of,
)
from aether.spawner.linux.cgroup_limits import CPU_PERIOD_US, IO_LIMITS, CgroupLimits, quota_us

WANTED = ("cpu", "memory", "pids", "io", "cpuset")
_FILES = {
    "memory_bytes": ("memory", "memory.max", "max"),
    "memory_min_bytes": ("memory", "memory.min", "0"),
    "memory_low_bytes": ("memory", "memory.low", "0"),
    "memory_high_bytes": ("memory", "memory.high", "max"),
    "swap_bytes": ("memory", "memory.swap.max", "max"),
    "cpu_millis": ("cpu", "cpu.max", f"max {CPU_PERIOD_US}"),
    "cpu_weight": ("cpu", "cpu.weight", "100"),
    "cpuset_cpus": ("cpuset", "cpuset.cpus", "\n"),
    "cpuset_mems": ("cpuset", "cpuset.mems", "\n"),
    "pids": ("pids", "pids.max", "max"),
    "io_weight": ("io", "io.weight", "default 100"),
    "io_read_bps": ("io", "io.max", "rbps"),
    "io_write_bps": ("io", "io.max", "wbps"),
    "io_read_iops": ("io", "io.max", "riops"),
    "io_write_iops": ("io", "io.max", "wiops"),
}
"""Limit to controller, file, and the text of no limit (for io.max the key of a rate)."""
SWEEP_WAIT_S = 2.0


@lru_cache(maxsize=256)
def limit_files(limits: CgroupLimits, disk: Disk | None, bfq: bool = False) -> tuple[Setting, ...]:
    """Pure: a setting for every limit that is set; rates need the disk's numbers. Kept: most cells are alike."""
    found: list[Setting] = []
    for name in limits.asked():
        controller, file, reset = _FILES[name]
        value = str(getattr(limits, name))
        if name in IO_LIMITS:
            if disk is None:
                continue
            value, reset = f"{disk.numbers} {reset}={value}", f"{disk.numbers} {reset}=max"
        elif name == "cpu_millis":
            value = f"{quota_us(int(value))} {CPU_PERIOD_US}"
        elif name == "io_weight" and bfq:
            file, value, reset = "io.bfq.weight", f"default {min(int(value), 1000)}", "default 100"
        elif name == "io_weight":
            value = f"default {value}"
        found.append(Setting(name, controller, file, value, reset))
    return tuple(found)


def _weights_missing(base: str, disk: Disk | None, why: str) -> str | None:
    """Why weights do nothing on the disk: they take BFQ, or the cost model switched on (cgroup-v2.rst, io.weight)."""
    if disk is None:
        return why
    root = Path(base)
    while (root.parent / "cgroup.procs").exists():
        root = root.parent
    with contextlib.suppress(OSError):
        if f"{disk.numbers} enable=1" in (root / "io.cost.qos").read_text():
            return None
    name = disk.scheduler()
    return None if name == "bfq" else f"the scheduler of {disk.name} is {name}, not bfq, and io.cost.qos is off"


class CgroupV2:
    """The v2 driver. `base` is the directory of the cgroup to work below; `wanted` the controllers to enable;
    `disk` what I/O limits hold for, or why there is none."""

    kind = "v2"

    def __init__(
        self, base: str, instance: str, wanted: tuple[str, ...] = WANTED, disk: Disk | str = "no disk was looked for"
    ) -> None:
        self.base = base
        self.instance = instance
        self.wanted = wanted
        self.controllers: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        self.tree = Tree(parent_of(base, instance))
        self._disk = disk if isinstance(disk, Disk) else None
        self._no_disk = disk if isinstance(disk, str) else ""
        self._bfq = self._disk is not None and self._disk.scheduler() == "bfq"
        self._roles: Tree | None = None

    def probe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": self.base,
            "controllers": list(self.controllers),
            "missing": dict(self.missing),
            "remedy": "start it under systemd with Delegate=yes" if self.missing else "",
        }

    def start(self) -> None:
        self.tree.open()
        if not self.wanted:
            return
        offered = self._words(f"{self.base}/cgroup.controllers")
        for name, (controller, _, _) in _FILES.items():
            if controller in self.wanted and controller not in offered:
                self.missing[name] = f"the controller {controller} is not available in {self.base}"
        usable = [controller for controller in self.wanted if controller in offered]
        self.controllers = tuple(controller for controller in usable if self._enable(controller))
        if self._disk is None:
            for name in IO_LIMITS:
                self.missing.setdefault(name, self._no_disk)
        weights = _weights_missing(self.base, self._disk, self._no_disk)
        if weights is not None:
            self.missing.setdefault("io_weight", weights)

    @staticmethod
    def _words(path: str) -> list[str]:
        with open(path) as file:
            return file.read().split()

    def _enable(self, controller: str) -> bool:
        """Pass `controller` down to the cells; on refusal the reason goes to `missing`."""
        try:
            if controller not in self._words(f"{self.base}/cgroup.subtree_control"):
                self._enable_in_base(controller)
            self.tree.write("cgroup.subtree_control", f"+{controller}")
        except OSError as error:
            for name, (of, _, _) in _FILES.items():
                if of == controller:
                    self.missing[name] = f"cannot enable {controller} in {self.base}: {error.strerror}"
            return False
        return True

    def _enable_in_base(self, controller: str) -> None:
        control = f"{self.base}/cgroup.subtree_control"
        for attempt in (0, 1):
            try:
                with open(control, "w") as file:
                    file.write(f"+{controller}")
                return
            except OSError:
                if attempt or self._roles is not None:
                    raise
                self._leave_base()

    def _leave_base(self) -> None:
        """Move processes out of the base into a leaf, so that controllers may be enabled below it."""
        self._roles = Tree(self.tree.path + "-roles")
        self._roles.open()
        delegated = False
        for name in ("user.delegate", "trusted.delegate"):
            with contextlib.suppress(OSError):
                delegated = delegated or os.getxattr(self.base, name) == b"1"
        pids = self._words(f"{self.base}/cgroup.procs") if delegated else [str(os.getpid())]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                self._roles.write("cgroup.procs", pid)

    def create(
        self, name: str, limits: CgroupLimits, *, parent: CgroupHandle | None = None, nestable: bool = False
    ) -> CgroupHandle:
        handle = CgroupHandle(name if parent is None else f"{parent.name}/{name}", nestable, parent)
        self._check(handle, limits)
        self.tree.mkdir(handle.name)
        try:
            self._apply(handle, limits)
            handle.limits = limits
            if nestable:
                self._open_leaf(handle)
            handle.v2_fd = self.tree.open_file(handle.home, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            self.remove(handle)
            raise
        if parent is not None:
            parent.children.append(handle)
        return handle

    def _open_leaf(self, handle: CgroupHandle) -> None:
        """Controllers go down only from a cgroup without processes, which from now on this one is."""
        if self.controllers:
            words = " ".join(f"+{controller}" for controller in self.controllers)
            self.tree.write(f"{handle.name}/cgroup.subtree_control", words)
        self.tree.mkdir(handle.home)

    def _check(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        if limits.cpuset_cpus is not None or limits.cpuset_mems is not None:
            above = f"{handle.parent.name}/" if handle.parent is not None else ""
            lent = {name: self._text(f"{above}{_FILES[name][1]}.effective") for name in ("cpuset_cpus", "cpuset_mems")}
            check_lists(limits, lent)
        check_nesting(handle, limits)

    def _text(self, file: str) -> str | None:
        try:
            return self.tree.read(file)
        except OSError:
            return None

    def _places(self, handle: CgroupHandle, limits: CgroupLimits) -> list[Place]:
        return [
            Place(self.tree, f"{handle.name}/{setting.file}", setting)
            for setting in limit_files(limits, self._disk, self._bfq)
            if setting.limit not in self.missing
        ]

    def _apply(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        apply(self._places(handle, limits), handle, self.missing, "cgroup2")

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        merged = limits.over(handle.limits)
        self._check(handle, merged)
        high = self._squeeze(handle, limits.memory_bytes)
        try:
            self._apply(handle, limits)
            handle.limits = merged
        finally:
            if high is not None and (limits.memory_high_bytes is None or handle.limits is not merged):
                self.tree.write(f"{handle.name}/memory.high", high)

    def _squeeze(self, handle: CgroupHandle, memory_bytes: int | None) -> str | None:
        """Make what is in use fit `memory_bytes`: memory.max below it would kill (cgroup-v2.rst), where the write
        of memory.high reclaims and returns. The text of memory.high to write back, None when nothing was done.

        Raises OSError EBUSY when it does not fit.
        """
        current, high = f"{handle.name}/memory.current", f"{handle.name}/memory.high"
        if memory_bytes is None or "memory" not in self.controllers or (self.tree.number(current) or 0) <= memory_bytes:
            return None
        before = self.tree.read(high).strip()
        self.tree.write(high, str(memory_bytes))
        used = self.tree.number(current) or 0
        if used > memory_bytes:
            self.tree.write(high, before)
            raise OSError(errno.EBUSY, f"cannot lower memory_bytes to {memory_bytes}: {used} bytes are in use")
        return before

    def allow_realtime(self, handle: CgroupHandle) -> None:
        """v2 has no budget for it: with CONFIG_RT_GROUP_SCHED the kernel refuses the cpu controller instead."""

    def usage(self, handle: CgroupHandle, *, pressure: bool = False) -> CgroupUsage:
        tree, name = self.tree, handle.name
        cpu = tree.table(f"{name}/cpu.stat")
        io = self._io(name)
        sources = {"cpu": "cgroup2:cpu.stat"} if cpu else {}
        memory = "memory" in self.controllers
        events = tree.table(f"{name}/memory.events") if memory else {}
        peak = tree.number(f"{name}/memory.peak") if memory else None
        pids = tree.number(f"{name}/pids.peak") if "pids" in self.controllers else None
        for key, value, source in (
            ("memory_peak", peak, "memory.peak"),
            ("pids_peak", pids, "pids.peak"),
            ("io", io[0], "io.stat"),
        ):
            if value is not None:
                sources[key] = f"cgroup2:{source}"
        return CgroupUsage(
            cpu_user_us=cpu.get("user_usec"),
            cpu_system_us=cpu.get("system_usec"),
            memory_peak_bytes=peak,
            memory_bytes=tree.number(f"{name}/memory.current") if memory else None,
            pids_peak=pids,
            io_read_bytes=io[0],
            io_write_bytes=io[1],
            oom_kills=events.get("oom_kill"),
            throttled_us=cpu.get("throttled_usec"),
            throttled_count=cpu.get("nr_throttled"),
            memory_events={key: events[key] for key in ("low", "high", "max", "oom") if key in events},
            pressure=pressure_of(tree, name) if pressure else {},
            sources=sources,
        )

    def _io(self, name: str) -> tuple[int | None, int | None]:
        if "io" not in self.controllers:
            return None, None
        try:
            words = self.tree.read(f"{name}/io.stat").split()
        except OSError:
            return None, None
        total = {"rbytes": 0, "wbytes": 0}
        for word in words:
            key, _, value = word.partition("=")
            if key in total:
                total[key] += int(value)
        return total["rbytes"], total["wbytes"]

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        if handle.nestable:
            return self.tree.all_pids(handle.name)
        return self.tree.pids(f"{handle.name}/cgroup.procs")

    def kill(self, handle: CgroupHandle) -> None:
        self._kill(handle.name)

    def _kill(self, name: str) -> None:
        try:
            self.tree.write(f"{name}/cgroup.kill", "1")
        except FileNotFoundError:  # before Linux 5.14, or the cell is gone
            for pid in self.tree.all_pids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        self.tree.write(f"{handle.name}/cgroup.freeze", "1" if frozen else "0")

    def mend(self, handle: CgroupHandle, pids: tuple[int, ...]) -> tuple[str, ...]:
        made: list[str] = []
        mend_directory(self.tree, handle.name, made)
        found = [f"the directory {name} was removed" for name in made]
        if made:
            self._apply(handle, handle.limits)
        if handle.nestable and not (Path(self.tree.path) / handle.home).is_dir():
            self._open_leaf(handle)
        found += mend_settings(handle, self._places(handle, handle.limits))
        moved = bring_back(self.tree, handle.name, handle.home, pids)
        return (*found, *([f"{moved} processes were taken out"] if moved else []))

    def remove(self, handle: CgroupHandle) -> bool:
        if handle.nestable:
            self.tree.rmdir(f"{handle.name}/{LEAF}")
        if not self.tree.rmdir(handle.name):
            return False
        handle.close()
        return True

    def sweep(self, instance: str) -> int:
        swept = 0
        for path in left_by(self.base, instance):
            left = CgroupV2(str(path.parent), instance, wanted=())
            left.tree.open()
            swept += remove_all(left.tree, left._kill)
            left.close()
            with contextlib.suppress(OSError):  # busy while its roles live, which is then right
                Path(f"{path}-roles").rmdir()
        return swept

    def close(self) -> None:
        self.tree.close()
        if self._roles is not None:
            self._roles.close()


def remove_all(tree: Tree, kill: Any) -> int:
    """Kill and remove every child of `tree` with what is below it, waiting at most SWEEP_WAIT_S; the number of
    children removed."""
    names = tree.children()
    deadline = time.monotonic() + SWEEP_WAIT_S
    removed = 0
    for name in names:
        while not all(tree.rmdir(each) for each in tree.below(name)):
            kill(name)
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        else:
            removed += 1
    return removed
