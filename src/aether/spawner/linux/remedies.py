"""What to do about a launch that failed: one table from (phase, errno) to a sentence for the person."""

from __future__ import annotations

import errno
import os
from typing import Final

from aether.contract.cellplan import Plan, describe
from aether.spawner.linux.initwire import ExecFailed, StepFailed

_USERNS: Final = (
    "allow user namespaces (sysctl user.max_user_namespaces; on Ubuntu kernel.apparmor_restrict_unprivileged_userns "
    "or an AppArmor profile with `userns`; in Docker a seccomp profile that permits unshare), or run as root"
)
_BY_PHASE: Final[dict[tuple[str, int | None], str]] = {
    ("clone", errno.EPERM): _USERNS,
    ("clone", errno.ENOSPC): _USERNS,
    ("clone", errno.EAGAIN): "raise the limit on processes (ulimit -u, pids.max) or end other cells",
    ("clone", errno.ENOSYS): "a kernel of at least 5.7 is needed, and no seccomp filter may refuse clone3",
    ("clone", None): "see dmesg; the cgroup may be gone or frozen",
    ("user namespace", None): _USERNS,
    ("id map", None): _USERNS,
    ("cgroup", None): "check that the cell's cgroup exists and that the spawner may write to it",
    ("namespaces", None): _USERNS,
    ("new root", None): "the kernel must be at least 5.12 and the mount namespace writable",
    ("pivot", None): "the spawner must not run in a chroot or on the initial ramfs",
    ("landlock", errno.ENOENT): "a Landlock rule names a path that the cell's root does not hold",
    ("landlock", None): "add landlock to the lsm= list of the kernel, or leave Landlock out of the plan",
    ("seccomp", None): "the kernel must have CONFIG_SECCOMP_FILTER",
}
_BY_ERRNO: Final = {
    errno.ENOENT: "the source or a mount point does not exist",
    errno.EACCES: "the source is not readable by the spawner",
    errno.EPERM: "the spawner lacks the privilege, or a container masks /proc (run it unmasked, or as root)",
    errno.ELOOP: "the path holds a symbolic link where none is allowed",
    errno.EXDEV: "the source leaves its allowed root through a symbolic link; name the real path",
    errno.ENOSPC: "the root of a cell is small: bind larger files instead of writing them",
    errno.EINVAL: "the kernel is too old for this operation, or the mount is locked by another namespace",
}


def remedy(phase: str, code: int) -> str:
    found = _BY_PHASE.get((phase, code)) or _BY_PHASE.get((phase, None)) or _BY_ERRNO.get(code)
    return found or "see `aether doctor`"


def explain_step(plan: Plan, event: StepFailed) -> tuple[str, str]:
    """(message, remedy) of a launch that failed inside the cell."""
    if event.step is None:
        return f"cannot start cell: {event.phase}: {os.strerror(event.errno)}", remedy(event.phase, event.errno)
    prefix = f"{event.step}. "
    line = next((text[len(prefix) :] for text in describe(plan) if text.startswith(prefix)), f"step {event.step}")
    return f"cannot start cell: {line}: {os.strerror(event.errno)}", remedy("plan", event.errno)


def explain_exec(event: ExecFailed) -> tuple[str, str]:
    """(message, remedy) of an executable that never ran."""
    remedies = {
        ("exec", errno.ENOENT): "the program, or the interpreter it names, is not in the cell's root or PATH",
        ("exec", errno.EACCES): "the program is not executable for the cell, or Landlock does not allow it",
        ("exec", errno.ENOEXEC): "the program is not for this machine",
        ("exec", errno.E2BIG): "arguments and environment are too large",
        ("cwd", errno.ENOENT): "the working directory is not in the cell's root",
    }
    why = remedies.get((event.step, event.errno), "see the cell's plan with `aether cell explain`")
    return f"cannot start executable: {event.step}: {os.strerror(event.errno)}", why
