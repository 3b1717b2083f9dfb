"""Which cgroup driver this host allows: read /proc/self/mountinfo and /proc/self/cgroup, decide, start it.

The decision is pure (`locate`); `open_driver` performs it and falls back to `NoCgroups` with the reason.
Sources: proc(5) for mountinfo, cgroups(7) for /proc/self/cgroup.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from aether.spawner.linux.blockdev import Disk, disk_under
from aether.spawner.linux.cgroup import CgroupDriver, NoCgroups
from aether.spawner.linux.cgroup_v1 import CONTROLLERS, CgroupV1
from aether.spawner.linux.cgroup_v2 import CgroupV2


@dataclass(frozen=True, slots=True)
class Located:
    """Own directories: `v1` by controller, `v2` of the unified hierarchy; absent ones are not mounted."""

    v1: dict[str, str] = field(default_factory=dict)
    v2: str | None = None


def locate(mountinfo: str, own: str) -> Located:
    """Join mounts with the own cgroup paths. A mount whose root is not `/` shows a part of the hierarchy:
    the own path is then taken relative to that root."""
    paths: dict[str, str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else [""]:
            paths[name] = path
    v1: dict[str, str] = {}
    v2: str | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, tail = before.split(), after.split()
        if len(fields) < 5 or len(tail) < 3:
            continue
        root, point, kind = fields[3], fields[4], tail[0]
        if kind == "cgroup2" and v2 is None and "" in paths:
            v2 = _below(point, root, paths[""])
        elif kind == "cgroup":
            for name in tail[2].split(","):
                if name in paths and name not in v1:
                    v1[name] = _below(point, root, paths[name])
    return Located(v1, v2)


def _below(point: str, root: str, path: str) -> str:
    if root != "/":
        path = path[len(root) :] if path == root or path.startswith(root + "/") else "/"
    return os.path.normpath(point + "/" + path.lstrip("/"))


def open_driver(instance: str, base: str | None = None, disk_of: str = "/") -> CgroupDriver:
    """A started driver. `base` names a delegated v2 directory to use instead of the own cgroup; I/O limits hold for
    the disk that `disk_of` lies on."""
    try:
        with open("/proc/self/mountinfo") as mounts, open("/proc/self/cgroup") as own:
            found = locate(mounts.read(), own.read())
    except (OSError, ValueError) as error:
        return NoCgroups(f"cannot read this process's cgroups: {error}")
    disk: Disk | str
    try:
        disk = disk_under(disk_of)
    except OSError as error:
        disk = error.strerror or str(error)
    driver: CgroupDriver
    if base is not None:
        driver = CgroupV2(base, instance, disk=disk)
    elif any(name in found.v1 for name in CONTROLLERS):
        driver = CgroupV1(found.v1, found.v2, instance, disk)
    elif found.v2 is not None:
        driver = CgroupV2(found.v2, instance, disk=disk)
    else:
        return NoCgroups("no cgroup hierarchy is mounted")
    try:
        driver.start()
    except OSError as error:
        return NoCgroups(f"cannot make a cgroup below the own one: {error.strerror}")
    return driver
