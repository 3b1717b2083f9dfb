"""cgroup v2: limits where controllers are delegated; kill, freeze and CPU counting wherever v2 is mounted.

On a hybrid host v2 has no controllers, and still gives `cgroup.kill`, `cgroup.freeze` and `cpu.stat`, so the
v1 driver carries one of these for every cell.

The rule against internal processes (cgroup-v2.rst, "No Internal Process Constraint") forbids controllers below
a cgroup that holds processes: the base's own processes move to the leaf `<parent>-roles` first, all of them when
systemd marked the base as delegated (xattr user.delegate or trusted.delegate), else only the spawner.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from aether.spawner.linux.cgroup import CPU_PERIOD_US, CgroupHandle, CgroupLimits, CgroupUsage, Tree, left_by, parent_of

WANTED = ("cpu", "memory", "pids", "io")
_LIMIT_CONTROLLER = {
    "memory_bytes": "memory",
    "swap_bytes": "memory",
    "cpu_millis": "cpu",
    "cpu_weight": "cpu",
    "pids": "pids",
    "io_weight": "io",
}
SWEEP_WAIT_S = 2.0


def limit_files(limits: CgroupLimits) -> list[tuple[str, str, str, str]]:
    """Pure: `(limit name, controller, file, value)` for every limit that is set."""
    asked: dict[str, tuple[str, int | None, str]] = {
        "memory_bytes": ("memory.max", limits.memory_bytes, "{}"),
        "swap_bytes": ("memory.swap.max", limits.swap_bytes, "{}"),
        "cpu_weight": ("cpu.weight", limits.cpu_weight, "{}"),
        "pids": ("pids.max", limits.pids, "{}"),
        "io_weight": ("io.weight", limits.io_weight, "default {}"),
    }
    files = [
        (name, _LIMIT_CONTROLLER[name], file, form.format(value))
        for name, (file, value, form) in asked.items()
        if value is not None
    ]
    if limits.cpu_millis is not None:
        files.append(("cpu_millis", "cpu", "cpu.max", f"{limits.cpu_millis * CPU_PERIOD_US // 1000} {CPU_PERIOD_US}"))
    return files


class CgroupV2:
    """The v2 driver. `base` is the directory of the cgroup to work below; `wanted` the controllers to enable."""

    kind = "v2"

    def __init__(self, base: str, instance: str, wanted: tuple[str, ...] = WANTED) -> None:
        self.base = base
        self.instance = instance
        self.wanted = wanted
        self.controllers: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        self.tree = Tree(parent_of(base, instance))
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
        for name, controller in _LIMIT_CONTROLLER.items():
            if controller in self.wanted and controller not in offered:
                self.missing[name] = f"the controller {controller} is not available in {self.base}"
        usable = [controller for controller in self.wanted if controller in offered]
        self.controllers = tuple(controller for controller in usable if self._enable(controller))

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
            for name, of in _LIMIT_CONTROLLER.items():
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

    def create(self, name: str, limits: CgroupLimits) -> CgroupHandle:
        self.tree.mkdir(name)
        handle = CgroupHandle(name)
        try:
            self.set_limits(handle, limits)
            handle.v2_fd = self.tree.open_file(name, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            self.remove(handle)
            raise
        return handle

    def set_limits(self, handle: CgroupHandle, limits: CgroupLimits) -> None:
        for limit, controller, file, value in limit_files(limits):
            if controller not in self.controllers:
                continue
            try:
                self.tree.write(f"{handle.name}/{file}", value)
            except FileNotFoundError:
                # memory.swap.* exists only with swap accounting, io.weight only with an I/O policy that has weights
                self.missing.setdefault(limit, f"this kernel has no {file}")
                continue
            handle.enforced[limit] = f"cgroup2:{file}"

    def usage(self, handle: CgroupHandle) -> CgroupUsage:
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
        return self.tree.pids(f"{handle.name}/cgroup.procs")

    def kill(self, handle: CgroupHandle) -> None:
        self._kill(handle.name)

    def _kill(self, name: str) -> None:
        try:
            self.tree.write(f"{name}/cgroup.kill", "1")
        except FileNotFoundError:  # before Linux 5.14, or the cell is gone
            for pid in self.tree.pids(f"{name}/cgroup.procs"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def freeze(self, handle: CgroupHandle, frozen: bool) -> None:
        self.tree.write(f"{handle.name}/cgroup.freeze", "1" if frozen else "0")

    def remove(self, handle: CgroupHandle) -> bool:
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
    """Kill and remove every child of `tree`, waiting at most SWEEP_WAIT_S; the number removed."""
    names = tree.children()
    deadline = time.monotonic() + SWEEP_WAIT_S
    removed = 0
    for name in names:
        while not tree.rmdir(name):
            kill(name)
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        else:
            removed += 1
    return removed
