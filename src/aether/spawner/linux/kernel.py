"""The few kernel calls that the standard library lacks, by ctypes, with their numbers and constants.

Numbers from 424 up are the same on every architecture; older ones differ (asm/unistd_64.h for x86-64,
asm-generic/unistd.h for aarch64). Every function raises OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
CLONE_INTO_CGROUP: Final = 0x200000000

NAMESPACE_FLAGS: Final = {
    "user": CLONE_NEWUSER,
    "pid": CLONE_NEWPID,
    "mnt": CLONE_NEWNS,
    "net": CLONE_NEWNET,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "cgroup": CLONE_NEWCGROUP,
}

ARCH: Final = platform.machine()
_NUMBERS: Final = {
    "x86_64": {
        "capget": 125, "capset": 126, "clone": 56, "pivot_root": 155, "seccomp": 317, "setgroups": 116,
        "sched_setattr": 314, "sched_getattr": 315, "ioprio_set": 251, "ioprio_get": 252, "kcmp": 312,
    },
    "aarch64": {
        "capget": 90, "capset": 91, "clone": 220, "pivot_root": 41, "seccomp": 277, "setgroups": 159,
        "sched_setattr": 274, "sched_getattr": 275, "ioprio_set": 30, "ioprio_get": 31, "kcmp": 272,
    },
}  # fmt: skip
_COMMON: Final = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "clone3": 435,
    "close_range": 436, "openat2": 437, "mount_setattr": 442, "quotactl_fd": 443, "landlock_create_ruleset": 444,
    "landlock_add_rule": 445, "landlock_restrict_self": 446,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def syscall(name: str, *args: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Raw system call; integers are passed as longs, bytes and buffers as pointers."""
    number = _COMMON.get(name) or _NUMBERS[ARCH][name]
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result: int = _syscall(ctypes.c_long(number), *values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _checked(name: str, *args: int | bytes | None) -> int:
    values = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    result: int = getattr(_libc, name)(*values)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def mount(target: bytes, flags: int) -> None:
    """mount(2) without source and type: changes propagation or flags."""
    _checked("mount", None, target, None, flags, None)


def umount_detach(target: bytes) -> None:
    _checked("umount2", target, 2)


def unshare(flags: int) -> None:
    _checked("unshare", flags)


def setns(fd: int, kind: int) -> None:
    _checked("setns", fd, kind)


def prctl(option: int, arg: int = 0) -> int:
    return _checked("prctl", option, arg, 0, 0, 0)


def set_capabilities(kept: int) -> None:
    """Effective and permitted capabilities of this process, by number as in capabilities(7); none is inheritable."""
    low, high = kept & 0xFFFF_FFFF, kept >> 32
    header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    syscall("capset", header, struct.pack("<6I", low, low, 0, high, high, 0))


def last_capability() -> int:
    """Highest capability number that this kernel knows (capabilities(7))."""
    try:
        with open("/proc/sys/kernel/cap_last_cap") as f:
            return min(int(f.read()), 63)
    except (OSError, ValueError):
        return 40


def clone(flags: int, cgroup_dir: int | None) -> int:
    """clone3(2) that returns twice, like fork: the pid, and 0 in the child. Single-threaded callers only.

    Where a seccomp filter answers it with ENOSYS, as Docker's default profile does, clone(2) serves.
    """
    cgroup = 0
    if cgroup_dir is not None:
        flags |= CLONE_INTO_CGROUP
        cgroup = cgroup_dir
    args = struct.pack("<11Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup)
    try:
        return syscall("clone3", args, len(args))
    except OSError as error:
        if error.errno != errno.ENOSYS or cgroup_dir is not None:
            raise
        return syscall("clone", flags | signal.SIGCHLD, None, None, None, None)
