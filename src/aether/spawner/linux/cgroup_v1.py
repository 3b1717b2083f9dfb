"""cgroup v1 for hosts whose controllers still live there, with a v2 directory beside it for kill and freeze.

Each controller may have a hierarchy of its own or share one (`cpu,cpuacct`); a process joins a hierarchy once.
The cell's own thread joins by writing `0` to `tasks`: it costs 0.05 ms, where `cgroup.procs` waits for a grace
period. Counters: memory.* and pids.* files, cpu from v2 `cpu.stat` (counted with or without controllers).
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from aether.spawner.linux.cgroup import CPU_PERIOD_US, CgroupHandle, CgroupLimits, CgroupUsage, Tree, left_by, parent_of
from aether.spawner.linux.cgroup_v2 import CgroupV2, remove_all

CONTROLLERS = ("memory", "cpu", "pids")
SHARES_PER_WEIGHT = 1024 / 100
"""cpu.weight 100 is the default as cpu.shares 1024 is (kernel/sched/core.c, sched_weight_from_cgroup)."""


def limit_files(limits: CgroupLimits) -> list[tuple[str, str, str, str]]:
    """Pure: `(limit name, controller, file, value)` in the order in which v1 accepts them.

    memory.memsw is memory plus swap and may never be below memory.limit_in_bytes, hence after it.
    """
    files: list[tuple[str, str, str, str]] = []
    if limits.memory_bytes is not None:
        files.append(("memory_bytes", "memory", "memory.limit_in_bytes", str(limits.memory_bytes)))
        if limits.swap_bytes is not None:
            both = limits.memory_bytes + limits.swap_bytes
            files.append(("swap_bytes", "memory", "memory.memsw.limit_in_bytes", str(both)))
    if limits.cpu_millis is not None:
        quota = limits.cpu_millis * CPU_PERIOD_US // 1000
        files.append(("cpu_millis", "cpu", "cpu.cfs_quota_us", str(quota)))
    if limits.cpu_weight is not None:
        shares = max(2, round(limits.cpu_weight * SHARES_PER_WEIGHT))
        files.append(("cpu_weight", "cpu", "cpu.shares", str(shares)))
    if limits.pids is not None:
        files.append(("pids", "pids", "pids.max", str(limits.pids)))
    return files


class CgroupV1:
    """The hybrid driver. `bases` maps a controller to the spawner's own directory in its hierarchy."""

    kind = "v1"

    def __init__(self, bases: dict[str, str], v2_base: str | None, instance: str) -> None:
        self.instance = instance
        self.bases = {name: bases[name] for name in CONTROLLERS if name in bases}
        self.v2 = CgroupV2(v2_base, instance, wanted=()) if v2_base else None
        self.freezer: Tree | None = None
        if self.v2 is None and "freezer" in bases:
            self.freezer = Tree(parent_of(bases["freezer"], instance))
        parents: dict[str, Tree] = {}
        for base in self.bases.values():
            parents.setdefault(base, Tree(parent_of(base, instance)))
        self._of = {name: parents[base] for name, base in self.bases.items()}
        self._trees = list(parents.values()) + ([self.freezer] if self.freezer else [])
        self.missing = {"io_weight": "the v1 blkio controller does not see buffered writes"}

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
            for tree in self._trees:
                tree.open()
                opened.append(tree)
            if self.v2 is not None:
                self.v2.start()
        except OSError:
            for tree in opened:
                tree.close()
            raise

    def create(self, name: str, limits: CgroupLimits) -> CgroupHandle:
        handle = CgroupHandle(name)
        fds: list[int] = []
        try:
            for tree in self._trees:
                tree.mkdir(name)
                fds.append(tree.open_file(f"{name}/tasks", os.O_WRONLY))
            self.set_limits(handle, limits)
            if self.v2 is not None:
                handle.v2_fd = self.v2.create(name, CgroupLimits()).v2_fd
        except OSError:
            handle.attach_fds = tuple(fds)
            self.remove(handle)
            raise
        handle.attach_fds = tuple(fds)
        return handle

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        for limit, controller, file, value in limit_files(limits):
            tree = self._of.get(controller)
            if tree is None:
                self.missing.setdefault(limit, f"the controller {controller} is not mounted")
                continue
            try:
                tree.write(f"{handle.name}/{file}", value)
            except FileNotFoundError:  # memsw needs swap accounting, cfs quota CONFIG_CFS_BANDWIDTH
                self.missing.setdefault(limit, f"this kernel has no {file}")
                continue
            except OSError as error:
                # Lowering memory and memsw needs the opposite order; raising them needs this one.
                if error.errno != 22 or file != "memory.limit_in_bytes" or limits.swap_bytes is None:
                    raise
                both = (limits.memory_bytes or 0) + limits.swap_bytes
                tree.write(f"{handle.name}/memory.memsw.limit_in_bytes", str(both))
                tree.write(f"{handle.name}/{file}", value)
            handle.enforced[limit] = f"cgroup1:{file}"

    def usage(self, handle: CgroupHandle) -> CgroupUsage:
        name = handle.name
        unified = self.v2.usage(handle) if self.v2 is not None else CgroupUsage()
        sources = dict(unified.sources)
        memory, pids, cpu = (self._of.get(controller) for controller in ("memory", "pids", "cpu"))
        peak = memory.number(f"{name}/memory.max_usage_in_bytes") if memory else None
        pids_peak = pids.number(f"{name}/pids.peak") if pids else None
        throttled = cpu.table(f"{name}/cpu.stat").get("throttled_time") if cpu else None
        if peak is not None:
            sources["memory_peak"] = "cgroup1:memory.max_usage_in_bytes"
        if pids_peak is not None:
            sources["pids_peak"] = "cgroup1:pids.peak"
        return CgroupUsage(
            cpu_user_us=unified.cpu_user_us,
            cpu_system_us=unified.cpu_system_us,
            memory_peak_bytes=peak,
            memory_bytes=memory.number(f"{name}/memory.usage_in_bytes") if memory else None,
            pids_peak=pids_peak,
            oom_kills=memory.table(f"{name}/memory.oom_control").get("oom_kill") if memory else None,
            throttled_us=None if throttled is None else throttled // 1000,
            sources=sources,
        )

    def procs(self, handle: CgroupHandle) -> tuple[int, ...]:
        if self.v2 is not None:
            return self.v2.procs(handle)
        seen: set[int] = set()
        for tree in self._trees:
            seen.update(tree.pids(f"{handle.name}/cgroup.procs"))
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

    def remove(self, handle: CgroupHandle) -> bool:
        gone = [tree.rmdir(handle.name) for tree in self._trees]
        if self.v2 is not None:
            gone.append(self.v2.tree.rmdir(handle.name))
        if not all(gone):
            return False
        handle.close()
        return True

    def sweep(self, instance: str) -> int:
        swept = self.v2.sweep(instance) if self.v2 is not None else 0
        for own in self._trees:
            for path in left_by(str(Path(own.path).parent), instance):
                tree = Tree(str(path))
                tree.open()

                def kill(name: str, tree: Tree = tree) -> None:
                    for pid in tree.pids(f"{name}/cgroup.procs"):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)

                swept = max(swept, remove_all(tree, kill))
                tree.close()
        return swept

    def close(self) -> None:
        for tree in self._trees:
            tree.close()
        if self.v2 is not None:
            self.v2.close()
