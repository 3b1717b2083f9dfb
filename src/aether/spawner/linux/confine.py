"""Namespaces, ids, capabilities, Landlock and seccomp of a cell, in Python; see native/cell.c for every reason.

Each function runs in the process that becomes PID 1 and keeps `phase[0]` at the number of what it is doing, so
that an OSError can be reported by name.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Final

from aether.spawner.linux import kernel
from aether.spawner.linux.initwire import phase_number
from aether.spawner.linux.landlock import FILE_RIGHTS, Lowered
from aether.spawner.linux.program import Program

CAP_KILL, CAP_SETGID, CAP_SETUID = 5, 6, 7
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME, PR_CAPBSET_DROP = 1, 4, 8, 15, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
_SIOCSIFFLAGS: Final = 0x8914


def enter_namespaces(program: Program, write_zero: Sequence[int], phase: list[int]) -> None:
    ids = program.ids
    if program.clone_flags & kernel.CLONE_NEWUSER:
        phase[0] = phase_number("id map")
        # After a change of ids without exec, /proc/self belongs to root (proc(5)); `drop_privilege` sets it back.
        kernel.prctl(PR_SET_DUMPABLE, 1)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{ids.job_uid} {ids.host_uid} 1"),
            ("gid_map", f"{ids.job_gid} {ids.host_gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    phase[0] = phase_number("cgroup")
    for fd in write_zero:
        os.write(fd, b"0")
        os.close(fd)
    phase[0] = phase_number("namespaces")
    if program.unshare_flags:
        kernel.unshare(program.unshare_flags)
    if program.unshare_flags & kernel.CLONE_NEWUTS:
        phase[0] = phase_number("host name")
        socket.sethostname(program.hostname)
    if program.unshare_flags & kernel.CLONE_NEWNET:
        phase[0] = phase_number("loopback")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", 1))


def drop_privilege(program: Program, userns: int | None, phase: list[int]) -> None:
    ids = program.ids
    block = ids.count > 1
    (uid, gid), kept = program.seen_ids(ids.init_uid, ids.init_uid), 0
    if block:
        phase[0] = phase_number("ids")
        kernel.syscall("setgroups", 0, None)
    if userns is not None:
        phase[0] = phase_number("user namespace")
        kernel.setns(userns, kernel.CLONE_NEWUSER)
        os.close(userns)
    phase[0] = phase_number("capabilities")
    for cap in range(program.last_cap + 1):
        try:
            kernel.prctl(PR_CAPBSET_DROP, cap)
        except PermissionError:
            break
    if block:
        phase[0] = phase_number("ids")
        kept = 1 << CAP_SETUID | 1 << CAP_SETGID | 1 << CAP_KILL
        kernel.prctl(PR_SET_KEEPCAPS, 1)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        kernel.prctl(PR_SET_KEEPCAPS, 0)
    phase[0] = phase_number("capabilities")
    kernel.prctl(PR_CAP_AMBIENT, 4)
    kernel.set_capabilities(kept)
    phase[0] = phase_number("no_new_privs")
    kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(PR_SET_DUMPABLE, 0)


def apply_landlock(lowered: Lowered) -> None:
    attr = struct.pack("<3Q", *lowered.attr)
    ruleset = kernel.syscall("landlock_create_ruleset", attr, lowered.size, 0)
    try:
        for path, access in lowered.rules:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                mask = access if stat.S_ISDIR(os.fstat(fd).st_mode) else access & FILE_RIGHTS
                kernel.syscall("landlock_add_rule", ruleset, 1, struct.pack("<Qi", mask, fd), 0)
            finally:
                os.close(fd)
        kernel.syscall("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def restrict(program: Program, phase: list[int]) -> None:
    phase[0] = phase_number("signals")
    kernel.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not program.clone_flags & kernel.CLONE_NEWPID:
        kernel.prctl(PR_SET_CHILD_SUBREAPER, 1)
    name = ctypes.create_string_buffer(b"aether-init")
    kernel.prctl(PR_SET_NAME, ctypes.addressof(name))
    if program.landlock is not None and not program.per_exec_landlock:
        phase[0] = phase_number("landlock")
        apply_landlock(program.landlock)
    phase[0] = phase_number("seccomp")
    code = ctypes.create_string_buffer(program.filter, len(program.filter))
    fprog = struct.pack("<H6xQ", len(program.filter) // 8, ctypes.addressof(code))
    kernel.syscall("seccomp", 1, 0, fprog)
