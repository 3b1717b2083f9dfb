"""The disk under a path, for I/O limits, which the kernel sets by the numbers of whole disks.

Sources: proc(5) for mountinfo, Documentation/ABI/testing/sysfs-block; block/blk-throttle.c takes no partition.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Disk:
    """`numbers` is `major:minor`."""

    name: str
    numbers: str
    directory: str

    def scheduler(self) -> str:
        """The I/O scheduler in use; `none` without one."""
        try:
            words = (Path(self.directory) / "queue/scheduler").read_text().split()
        except OSError:
            return "none"
        return next((word.strip("[]") for word in words if word.startswith("[")), "none")


def disk_under(path: str, sys_root: str = "/sys", mountinfo: str | None = None) -> Disk:
    """The whole disk that holds `path`; raises OSError saying why there is none (memory, network, several disks).

    A file system whose device number is its own (btrfs, overlay) is looked up by its mount: btrfs names a disk
    as its source, overlay names none, then what is below its upper directory is not known here.
    """
    number = os.stat(path).st_dev  # noqa: PTH116
    if os.major(number) == 0:
        source, kind = _mounted(os.path.realpath(path), mountinfo)
        try:
            status = os.stat(source)  # noqa: PTH116
        except OSError:
            status = None
        if status is None or not stat.S_ISBLK(status.st_mode):
            raise OSError(19, f"{path} lies on {kind}, which has no disk of its own")
        number = status.st_rdev
    directory = Path(sys_root) / f"dev/block/{os.major(number)}:{os.minor(number)}"
    try:
        directory = directory.resolve(strict=True)
        if (directory / "partition").exists():
            directory = directory.parent
        return Disk(directory.name, (directory / "dev").read_text().strip(), str(directory))
    except OSError as error:
        raise OSError(19, f"cannot find the disk of {path} in {sys_root}: {error.strerror}") from error


def _mounted(path: str, mountinfo: str | None) -> tuple[str, str]:
    """Source and kind of the innermost mount that holds `path`."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    best, found = -1, ("", "an unknown file system")
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        point, tail = before.split()[4], after.split()
        holds = point == "/" or path == point or path.startswith(point + "/")
        if holds and len(point) >= best and len(tail) > 1:  # a later mount on the same point covers the earlier
            best, found = len(point), (tail[1], tail[0])
    return found
