"""Limits onto files: checked before, written whole or not at all, and compared with what is there later.

Works on `Place`s, a setting with the directory it belongs to, so that v1 and v2 share it: they differ in which
file says what (their `limit_files`) and in little else.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Iterable
from typing import NamedTuple

from aether.spawner.linux.cgroup import CgroupHandle, Setting, Tree
from aether.spawner.linux.cgroup_limits import CgroupLimits, exceeding, parse_list


class Place(NamedTuple):
    """A setting, and the file of a hierarchy that it is written to."""

    tree: Tree
    file: str
    setting: Setting


def check_nesting(handle: CgroupHandle, limits: CgroupLimits) -> None:
    """A cell within the one around it, its children within it; raises OSError EINVAL saying which is not."""
    if handle.parent is not None:
        why = exceeding(limits, handle.parent.bounds())
        if why is not None:
            raise OSError(errno.EINVAL, why)
    for child in handle.children:
        why = exceeding(child.limits, limits)
        if why is not None:
            inner = child.name.rpartition("/")[2]
            raise OSError(errno.EINVAL, f"cell {inner} within has more: {why}")


def check_lists(limits: CgroupLimits, lent: dict[str, str | None]) -> None:
    """`lent` says by limit what the cgroup around lends; raises OSError EINVAL. The kernel itself would take a list
    of CPUs that are not there and give the cell all it can have (cgroup-v2.rst, cpuset.cpus)."""
    for name, text in lent.items():
        asked = getattr(limits, name)
        if asked is None:
            continue
        try:
            wanted = parse_list(asked)
            there = parse_list(text.strip()) if text and text.strip() else None
        except ValueError as error:
            raise OSError(errno.EINVAL, f"cannot set {name}: {error}") from error
        if there is not None and not wanted <= there:
            raise OSError(errno.EINVAL, f"cannot set {name} to {asked}: there is {(text or '').strip()}")


def apply(places: Iterable[Place], handle: CgroupHandle, missing: dict[str, str], version: str) -> None:
    """Write all, note each in `handle`; a file that this kernel lacks goes to `missing` with its limit.

    Raises OSError naming the limit; what was written before it is then written back.
    """
    done: list[Place] = []
    for place in places:
        tree, file, setting = place
        try:
            tree.write(file, setting.value)
        except FileNotFoundError:
            missing.setdefault(setting.limit, f"this kernel has no {setting.file}")
            continue
        except OSError as error:
            for written in reversed(done):
                known = handle.set.get((written.file, written.setting.limit))
                with contextlib.suppress(OSError):
                    written.tree.write(written.file, known.value if known else written.setting.reset)
            why = f"cannot set {setting.limit} to {setting.value}: {error.strerror}"
            raise OSError(error.errno or errno.EINVAL, why) from error
        done.append(place)
    for _, file, setting in done:
        handle.set[file, setting.limit] = setting
        handle.enforced[setting.limit] = f"{version}:{setting.file}"


def is_set(setting: Setting, text: str) -> bool:
    """Whether `text`, read from the setting's file, still says what was written. The kernel keeps whole pages, the
    shortest form of a list, and one line per device."""
    value, lines = setting.value, text.split("\n")
    if setting.file.startswith("cpuset."):
        try:
            return parse_list(value) == parse_list(text.strip())
        except ValueError:
            return False
    if value.isdigit():
        found = text.strip()
        page = int(value) // mmap.PAGESIZE * mmap.PAGESIZE
        return found.isdigit() and int(found) in (int(value), page)
    device, _, rest = value.partition(" ")
    if ":" not in device:
        return lines[0].strip() == value
    row = next((line.split()[1:] for line in lines if line.split()[:1] == [device]), [])
    return rest in row


def mend_directory(tree: Tree, name: str, made: list[str]) -> None:
    """Make a directory again that somebody removed, and what is missing above it."""
    parts = name.split("/")
    for count in range(1, len(parts) + 1):
        path = "/".join(parts[:count])
        try:
            tree.mkdir(path)
        except FileExistsError:
            continue
        made.append(path)


def mend_settings(handle: CgroupHandle, places: Iterable[Place]) -> tuple[str, ...]:
    """Write again what no longer says what was set; what it said, one line each."""
    found: list[str] = []
    for place in places:
        setting = place.setting
        if (place.file, setting.limit) not in handle.set:
            continue
        try:
            text = place.tree.read(place.file)
        except OSError:
            continue
        if not is_set(setting, text):
            said = " ".join(text.split())[:80] or "nothing"
            with contextlib.suppress(OSError):
                place.tree.write(place.file, setting.value)
            found.append(f"{setting.limit} was changed to {said}")
    return tuple(found)


def bring_back(tree: Tree, name: str, home: str, pids: tuple[int, ...]) -> int:
    """Move those of `pids` that are not at or below `name` to `home`; how many there were."""
    inside = set(tree.all_pids(name))
    moved = 0
    for pid in pids:
        if pid in inside or not _alive(pid):
            continue
        with contextlib.suppress(OSError):
            tree.write(f"{home}/cgroup.procs", str(pid))
            moved += 1
    return moved


def _alive(pid: int) -> bool:
    """A zombie is in no cgroup's list and cannot be moved."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def pressure_of(tree: Tree, name: str) -> dict[str, dict[str, float]]:
    """`{cpu|memory|io: {some_us, some_avg10_percent, full_us, full_avg10_percent}}` (accounting/psi.rst)."""
    found: dict[str, dict[str, float]] = {}
    for resource in ("cpu", "memory", "io"):
        try:
            text = tree.read(f"{name}/{resource}.pressure")
        except OSError:  # PSI is off: a boot without psi=1, or cgroup.pressure is 0
            continue
        row: dict[str, float] = {}
        for line in text.splitlines():
            kind, *pairs = line.split()
            values = dict(pair.split("=", 1) for pair in pairs)
            row[f"{kind}_us"] = int(values["total"])
            row[f"{kind}_avg10_percent"] = float(values["avg10"])
        found[resource] = row
    return found
