"""cgroup v1 for hosts whose controllers still live there, with a v2 directory beside it for kill and freeze.

Each controller may have a hierarchy of its own or share one (`cpu,cpuacct`); a process joins a hierarchy once.
The cell's own thread joins by writing `0` to `tasks`: it costs 0.05 ms, where `cgroup.procs` waits for a grace
period. Every cell is in the hierarchies of CONTROLLERS; cpuset and blkio are joined by cells whose limits ask for
them, now or at a resize, and by all that nest. Counters: memory.* and pids.* files, cpu from v2 `cpu.stat`
(counted with or without controllers).

What v1 cannot say: memory.min and memory.high have no counterpart; memory.soft_limit_in_bytes stands for low;
blkio rates bind each directory alone, not what is below it, so a child gets its parent's as its own, and they see
no buffered writes (cgroup-v1/blkio-controller.rst, "Hierarchical Cgroups", "What works").
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from dataclasses import replace
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
)
from aether.spawner.linux.cgroup_limits import IO_LIMITS, NO_LIMITS, CgroupLimits, parse_list, quota_us, show_list
from aether.spawner.linux.cgroup_v2 import CgroupV2, remove_all

CONTROLLERS = ("memory", "cpu", "pids")
ON_DEMAND = ("cpuset", "blkio")
SHARES_PER_WEIGHT = 1024 / 100
"""cpu.weight 100 is the default as cpu.shares 1024 is (kernel/sched/core.c, sched_weight_from_cgroup)."""
REALTIME_US = 100_000
"""Of each second, for a cell with real-time processes: they starve what is not."""
_REALTIME = "cpu.rt_runtime_us"
_JOIN_TRIES = 20
_FILES = {
    "memory_bytes": ("memory", "memory.limit_in_bytes", "-1"),
    "memory_low_bytes": ("memory", "memory.soft_limit_in_bytes", "-1"),
    "cpu_millis": ("cpu", "cpu.cfs_quota_us", "-1"),
    "cpu_weight": ("cpu", "cpu.shares", "1024"),
    "cpuset_cpus": ("cpuset", "cpuset.cpus", ""),
    "cpuset_mems": ("cpuset", "cpuset.mems", ""),
    "pids": ("pids", "pids.max", "max"),
    "io_weight": ("blkio", "blkio.bfq.weight", "100"),
    "io_read_bps": ("blkio", "blkio.throttle.read_bps_device", "0"),
    "io_write_bps": ("blkio", "blkio.throttle.write_bps_device", "0"),
    "io_read_iops": ("blkio", "blkio.throttle.read_iops_device", "0"),
    "io_write_iops": ("blkio", "blkio.throttle.write_iops_device", "0"),
}
"""Limit to controller, file, and the text of no limit."""


@lru_cache(maxsize=256)
def limit_files(limits: CgroupLimits, disk: Disk | None) -> tuple[Setting, ...]:
    """Pure: a setting for every limit that is set and that v1 knows, in the order in which v1 accepts them. Kept:
    most cells are alike.

    memory.memsw is memory plus swap and may never be below memory.limit_in_bytes, hence after it.
    """
    found: list[Setting] = []
    for name in limits.asked():
        if name == "swap_bytes" and limits.memory_bytes is not None:
            both = str(limits.memory_bytes + (limits.swap_bytes or 0))
            found.append(Setting(name, "memory", "memory.memsw.limit_in_bytes", both, "-1"))
        if name not in _FILES:
            continue
        controller, file, reset = _FILES[name]
        value = str(getattr(limits, name))
        if name in IO_LIMITS:
            if disk is None:
                continue
            value, reset = f"{disk.numbers} {value}", f"{disk.numbers} 0"
        elif name == "cpu_millis":
            value = str(quota_us(int(value)))
        elif name == "cpu_weight":
            value = str(max(2, round(int(value) * SHARES_PER_WEIGHT)))
        elif name == "io_weight":
            value = str(min(int(value), 1000))
        found.append(Setting(name, controller, file, value, reset))
    return tuple(found)


class CgroupV1:
    """The hybrid driver. `bases` maps a controller to the spawner's own directory in its hierarchy; `disk` is what
    I/O limits hold for, or why there is none."""

    kind = "v1"

    def __init__(
        self, bases: dict[str, str], v2_base: str | None, instance: str, disk: Disk | str = "no disk was looked for"
    ) -> None:
        self.instance = instance
        self.bases = {name: bases[name] for name in (*CONTROLLERS, *ON_DEMAND) if name in bases}
        self.v2 = CgroupV2(v2_base, instance, wanted=()) if v2_base else None
        self.freezer: Tree | None = None
        if self.v2 is None and "freezer" in bases:
            self.freezer = Tree(parent_of(bases["freezer"], instance))
        parents: dict[str, Tree] = {}
        for base in self.bases.values():
            parents.setdefault(base, Tree(parent_of(base, instance)))
        self._of = {name: parents[base] for name, base in self.bases.items()}
        always = [self._of[name] for name in CONTROLLERS if name in self._of]
        self._trees = list(dict.fromkeys(always)) + ([self.freezer] if self.freezer else [])
        self._extra = {name: self._of[name] for name in ON_DEMAND if name in self._of and self._of[name] not in always}
        self._disk = disk if isinstance(disk, Disk) else None
        self.missing = self._not_here(disk if isinstance(disk, str) else "")

    def _not_here(self, no_disk: str) -> dict[str, str]:
        missing = {
            "memory_min_bytes": "cgroup v1 protects no memory for good",
            "memory_high_bytes": "cgroup v1 has no limit that slows down",
        }
        for name, (controller, _, _) in _FILES.items():
            if controller not in self._of:
                missing[name] = f"the controller {controller} is not mounted"
            elif controller == "blkio" and self._disk is None:
                missing[name] = no_disk
        if self._disk is not None and self._disk.scheduler() != "bfq":
            why = f"the scheduler of {self._disk.name} is {self._disk.scheduler()}, and only bfq shares by weight"
            missing.setdefault("io_weight", why)
        if "memory" not in self._of:
            missing["swap_bytes"] = missing["memory_bytes"]
        return missing

    def probe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": dict(self.bases) | ({"unified": self.v2.base} if self.v2 else {}),
            "controllers": list(self.bases),
            "missing": dict(self.missing),
            "remedy": "",
        }

    def start(self) -> None:
        opened: list[Tree] = []
        try:
            for tree in (*self._trees, *self._extra.values()):
                tree.open()
                opened.append(tree)
            if "cpuset" in self._of:
                self._inherit_cpuset()
            if self.v2 is not None:
                self.v2.start()
        except OSError:
            for tree in opened:
                tree.close()
            raise

    def _inherit_cpuset(self) -> None:
        """A v1 cpuset takes no process until it has CPUs and nodes: the parent gets all that there are, and
        clone_children (cpuset(7)) hands them to every directory made below."""
        tree, base = self._of["cpuset"], Path(self.bases["cpuset"])
        for name in ("cpus", "mems"):
            tree.write(f"cpuset.{name}", (base / f"cpuset.{name}").read_text().strip())
        tree.write("cgroup.clone_children", "1")

    def create(
        self, name: str, limits: CgroupLimits, *, parent: CgroupHandle | None = None, nestable: bool = False
    ) -> CgroupHandle:
        handle = CgroupHandle(name if parent is None else f"{parent.name}/{name}", nestable, parent)
        self._check(handle, limits)
        handle.joined = tuple(self._extra) if nestable or parent is not None else self._needed(limits)
        fds: list[int] = []
        try:
            for tree in self._trees_of(handle):
                tree.mkdir(handle.name)
                if nestable:
                    tree.mkdir(handle.home)
                fds.append(tree.open_file(f"{handle.home}/tasks", os.O_WRONLY))
            apply(self._places(handle, self._own(handle, limits)), handle, self.missing, "cgroup1")
            if self.v2 is not None:
                above = None if parent is None else CgroupHandle(parent.name, nestable=True)
                handle.v2_fd = self.v2.create(name, NO_LIMITS, parent=above, nestable=nestable).v2_fd
        except OSError:
            handle.attach_fds = tuple(fds)
            self.remove(handle)
            raise
        handle.attach_fds = tuple(fds)
        handle.limits = limits
        if parent is not None:
            parent.children.append(handle)
        return handle

    def _needed(self, limits: CgroupLimits) -> tuple[str, ...]:
        """Hierarchies on demand that these limits ask for."""
        wanted = {each.controller for each in limit_files(limits, self._disk) if each.limit not in self.missing}
        return tuple(name for name in self._extra if name in wanted)

    def _trees_of(self, handle: CgroupHandle) -> list[Tree]:
        return [*self._trees, *(self._extra[name] for name in handle.joined)]

    def _own(self, handle: CgroupHandle, limits: CgroupLimits) -> CgroupLimits:
        """With the rates of the cells around it: v1 does not apply those to what is below."""
        if handle.parent is None:
            return limits
        around = handle.parent.bounds()
        rates = {name: getattr(around, name) for name in IO_LIMITS if getattr(limits, name) is None}
        return replace(limits, **rates)

    def _check(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        if limits.cpuset_cpus is not None or limits.cpuset_mems is not None:
            tree, above = self._of.get("cpuset"), f"{handle.parent.name}/" if handle.parent is not None else ""
            lent: dict[str, str | None] = {}
            for name, file in (("cpuset_cpus", "effective_cpus"), ("cpuset_mems", "effective_mems")):
                lent[name] = tree.read(f"{above}cpuset.{file}") if tree is not None else None
            check_lists(limits, lent)
        check_nesting(handle, limits)

    def _places(self, handle: CgroupHandle, limits: CgroupLimits) -> list[Place]:
        """Rates go where the processes are."""
        places: list[Place] = []
        for setting in limit_files(limits, self._disk):
            tree = self._of.get(setting.controller)
            if tree is not None and setting.limit not in self.missing:
                directory = handle.home if setting.controller == "blkio" else handle.name
                places.append(Place(tree, f"{directory}/{setting.file}", setting))
        return places

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        merged = limits.over(handle.limits)
        self._check(handle, merged)
        late = [name for name in self._needed(limits) if name not in handle.joined]
        for name in late:
            with contextlib.suppress(FileExistsError):
                self._extra[name].mkdir(handle.name)
        places = self._places(handle, self._with_swap(handle, limits))
        if self._grows_memory(handle, merged):
            places.reverse()
        narrowed = self._narrow_below(handle, limits)
        try:
            apply(places, handle, self.missing, "cgroup1")
        except OSError:
            self._widen(narrowed)
            raise
        handle.limits = merged
        for name in late:
            self._join(self._extra[name], handle)
            handle.joined = (*handle.joined, name)
        self._spread(handle)

    def _with_swap(self, handle: CgroupHandle, limits: CgroupLimits) -> CgroupLimits:
        """Memory and swap are one number in v1: a change of the one is a change of the other."""
        merged = limits.over(handle.limits)
        if limits.memory_bytes is None and limits.swap_bytes is None:
            return limits
        return replace(limits, memory_bytes=merged.memory_bytes, swap_bytes=merged.swap_bytes)

    def _grows_memory(self, handle: CgroupHandle, merged: CgroupLimits) -> bool:
        """memory.limit_in_bytes may never be above memory.memsw.limit_in_bytes: growing moves memsw first."""
        before = handle.limits.memory_bytes
        return before is not None and merged.memory_bytes is not None and merged.memory_bytes > before

    def _join(self, tree: Tree, handle: CgroupHandle) -> None:
        """Move the living over; what they start meanwhile follows in the next round."""
        for _ in range(_JOIN_TRIES):
            outside = set(self.procs(handle)) - set(tree.pids(f"{handle.name}/cgroup.procs"))
            if not outside:
                break
            for pid in outside:
                with contextlib.suppress(OSError):
                    tree.write(f"{handle.name}/cgroup.procs", str(pid))

    def _inner(self, handle: CgroupHandle) -> list[str]:
        """cpuset directories below the cell that have no list of their own, the deepest first."""
        tree = self._of.get("cpuset")
        if tree is None or not handle.nestable:
            return []
        own = {child.name for child in _family(handle) if child.limits.cpuset_cpus or child.limits.cpuset_mems}
        own.discard(handle.name)
        inner = [name for name in tree.below(handle.name) if name != handle.name]
        return [name for name in inner if not any(name == each or name.startswith(f"{each}/") for each in own)]

    def _narrow_below(self, handle: CgroupHandle, limits: CgroupLimits) -> list[tuple[str, str]]:
        """A v1 cpuset may not become less than those below it: these first. What they were, to write back."""
        before: list[tuple[str, str]] = []
        tree = self._of.get("cpuset")
        for name, file in (("cpuset_cpus", "cpuset.cpus"), ("cpuset_mems", "cpuset.mems")):
            asked = getattr(limits, name)
            if asked is None or tree is None or name in self.missing:
                continue
            for inner in self._inner(handle):
                text = tree.read(f"{inner}/{file}").strip()
                both = parse_list(asked) & parse_list(text)
                if both:
                    before.append((f"{inner}/{file}", text))
                    tree.write(f"{inner}/{file}", show_list(both))
        return before

    def _widen(self, before: list[tuple[str, str]]) -> None:
        for file, text in reversed(before):
            with contextlib.suppress(OSError):
                self._of["cpuset"].write(file, text)

    def _spread(self, handle: CgroupHandle) -> None:
        """Those below follow: v1 keeps a list of its own in every directory, and a rate."""
        tree = self._of.get("cpuset")
        for inner in reversed(self._inner(handle)):
            for name, file in (("cpuset_cpus", "cpuset.cpus"), ("cpuset_mems", "cpuset.mems")):
                asked = getattr(handle.limits, name)
                if asked is not None and tree is not None and name not in self.missing:
                    tree.write(f"{inner}/{file}", asked)
        for child in _family(handle):
            if child is not handle:
                rates = [place for place in self._places(child, self._own(child, child.limits)) if _is_rate(place)]
                apply(rates, child, self.missing, "cgroup1")

    def allow_realtime(self, handle: CgroupHandle) -> None:
        """cpu.rt_runtime_us of a new group is 0, which no real-time process may join, and all levels above must
        hold the sum of what is below them (sched-rt-group.rst)."""
        tree = self._of.get("cpu")
        if tree is None or "realtime" in handle.enforced or tree.number(f"{handle.home}/{_REALTIME}") is None:
            return
        try:
            self._lend_realtime(tree, handle, REALTIME_US)
        except OSError as error:
            why = f"cannot lend {REALTIME_US} us of each second to real time, others have it: {error.strerror}"
            raise OSError(error.errno or errno.EINVAL, why) from error
        handle.enforced["realtime"] = f"cgroup1:{_REALTIME}"

    @staticmethod
    def _lend_realtime(tree: Tree, handle: CgroupHandle, more_us: int) -> None:
        """From the top down when it grows, from the bottom up when it shrinks; undone when a level refuses."""
        files = [f"{directory}{_REALTIME}" for directory in _down_to(handle)]
        done: list[str] = []
        for file in files if more_us > 0 else reversed(files):
            try:
                tree.write(file, str((tree.number(file) or 0) + more_us))
            except OSError:
                for each in reversed(done):
                    tree.write(each, str((tree.number(each) or 0) - more_us))
                raise
            done.append(file)

    def usage(self, handle: CgroupHandle, *, pressure: bool = False) -> CgroupUsage:
        name = handle.name
        unified = self.v2.usage(handle, pressure=pressure) if self.v2 is not None else CgroupUsage()
        sources = dict(unified.sources)
        memory, pids, cpu = (self._of.get(controller) for controller in ("memory", "pids", "cpu"))
        peak = memory.number(f"{name}/memory.max_usage_in_bytes") if memory else None
        pids_peak = pids.number(f"{name}/pids.peak") if pids else None
        throttled = cpu.table(f"{name}/cpu.stat") if cpu else {}
        if peak is not None:
            sources["memory_peak"] = "cgroup1:memory.max_usage_in_bytes"
        if pids_peak is not None:
            sources["pids_peak"] = "cgroup1:pids.peak"
        met = memory.number(f"{name}/memory.failcnt") if memory and pressure else None
        return CgroupUsage(
            cpu_user_us=unified.cpu_user_us,
            cpu_system_us=unified.cpu_system_us,
            memory_peak_bytes=peak,
            memory_bytes=memory.number(f"{name}/memory.usage_in_bytes") if memory else None,
            pids_peak=pids_peak,
            oom_kills=self._oom_kills(handle),
            throttled_us=throttled["throttled_time"] // 1000 if "throttled_time" in throttled else None,
            throttled_count=throttled.get("nr_throttled"),
            memory_events={} if met is None else {"max": met},
            pressure=unified.pressure,
            sources=sources,
        )

    def _oom_kills(self, handle: CgroupHandle) -> int | None:
        """v1 counts a kill where the process was, and nowhere above (mm/memcontrol-v1.c, memory_events_local)."""
        memory = self._of.get("memory")
        if memory is None:
            return None
        names = memory.below(handle.name) if handle.nestable else (handle.name,)
        counts = [memory.table(f"{name}/memory.oom_control").get("oom_kill") for name in names]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        if self.v2 is not None:
            return self.v2.procs(handle)
        seen: set[int] = set()
        for tree in self._trees:
            seen.update(tree.all_pids(handle.name))
        return tuple(sorted(seen))

    def kill(self, handle: CgroupHandle) -> None:
        if self.v2 is not None:
            self.v2.kill(handle)
            return
        for pid in self.procs(handle):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        if self.v2 is not None:
            self.v2.freeze(handle, frozen)
        elif self.freezer is not None:
            self.freezer.write(f"{handle.name}/freezer.state", "FROZEN" if frozen else "THAWED")
        else:
            raise OSError(95, "cannot freeze a cell: neither cgroup v2 nor the freezer is mounted")

    def mend(self, handle: CgroupHandle, pids: tuple[int, ...]) -> tuple[str, ...]:
        made: list[str] = []
        for tree in self._trees_of(handle):
            mend_directory(tree, handle.home, made)
        found = [f"the directory {name} was removed" for name in dict.fromkeys(made)]
        places = self._places(handle, self._own(handle, handle.limits))
        if made:
            apply(places, handle, self.missing, "cgroup1")
        found += mend_settings(handle, places)
        moved = [bring_back(tree, handle.name, handle.home, pids) for tree in self._trees_of(handle)]
        if max(moved, default=0):
            found.append(f"{max(moved)} processes were taken out")
        rest = self.v2.mend(handle, pids) if self.v2 is not None else ()
        return tuple(dict.fromkeys((*found, *rest)))

    def remove(self, handle: CgroupHandle) -> bool:
        cpu = self._of.get("cpu")
        if cpu is not None and "realtime" in handle.enforced and not self.procs(handle):
            with contextlib.suppress(OSError):
                self._lend_realtime(cpu, handle, -REALTIME_US)
                del handle.enforced["realtime"]
        gone: list[bool] = []
        trees = self._trees_of(handle) + ([self.v2.tree] if self.v2 is not None else [])
        for tree in trees:
            if handle.nestable:
                tree.rmdir(f"{handle.name}/{LEAF}")
            gone.append(tree.rmdir(handle.name))
        if not all(gone):
            return False
        handle.close()
        return True

    def sweep(self, instance: str) -> int:
        swept = self.v2.sweep(instance) if self.v2 is not None else 0
        for own in (*self._trees, *self._extra.values()):
            for path in left_by(str(Path(own.path).parent), instance):
                tree = Tree(str(path))
                tree.open()

                def kill(name: str, tree: Tree = tree) -> None:
                    for pid in tree.all_pids(name):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

                swept = max(swept, remove_all(tree, kill))
                tree.close()
        return swept

    def close(self) -> None:
        for tree in (*self._trees, *self._extra.values()):
            tree.close()
        if self.v2 is not None:
            self.v2.close()


def _family(handle: CgroupHandle) -> list[CgroupHandle]:
    """The cell and all below it, parents first."""
    return [handle, *(each for child in handle.children for each in _family(child))]


def _down_to(handle: CgroupHandle) -> list[str]:
    """Prefixes of the directories from the parent of all cells to the processes of this one."""
    above = (
        _down_to(CgroupHandle(handle.parent.name, parent=handle.parent.parent)) if handle.parent is not None else [""]
    )
    return [*above, *(f"{name}/" for name in dict.fromkeys((handle.name, handle.home)))]


def _is_rate(place: Place) -> bool:
    return place.setting.limit in IO_LIMITS
