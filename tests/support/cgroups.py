"""Processes in cgroups that a test made."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from aether.spawner.linux.cgroup import CgroupDriver, CgroupHandle


def join(handle: CgroupHandle, code: str) -> subprocess.Popen[bytes]:
    """A Python process that joins the cell's cgroups itself, then runs `code`; `os` is imported."""
    fds = list(handle.attach_fds)
    own = []
    if handle.v2_fd is not None:
        own.append(os.open("cgroup.procs", os.O_WRONLY, dir_fd=handle.v2_fd))
    fds += own
    enter = f"import os\nfor fd in {fds!r}: os.write(fd, b'0')\n"
    process = subprocess.Popen(
        [sys.executable, "-IS", "-c", enter + code], pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for fd in own:
        os.close(fd)
    return process


def remove(driver: CgroupDriver, handle: CgroupHandle) -> None:
    """The kernel lets go of a dead process's cgroup a little after its parent may reap it."""
    until(lambda: driver.remove(handle))


def until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
