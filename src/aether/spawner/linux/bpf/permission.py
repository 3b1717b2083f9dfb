"""Whether this process may load and attach programs, and what helps when not."""

from __future__ import annotations

import contextlib
import errno
import os

from aether.spawner.linux.bpf import calls
from aether.spawner.linux.bpf.btf import VMLINUX, BtfError

_NEEDS_PRIVILEGE = "run the spawner as root, or give it CAP_BPF and CAP_PERFMON"


def explain(error: OSError | BtfError) -> tuple[str, str]:
    """(reason, remedy) for a refusal."""
    if isinstance(error, BtfError):
        return str(error), "a kernel with CONFIG_DEBUG_INFO_BTF"
    if isinstance(error, calls.LoadError):
        return str(error.strerror), "report this with the kernel's version"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"eBPF programs are refused: {os.strerror(error.errno)}", _NEEDS_PRIVILEGE
    if error.errno == errno.ENOSYS:
        return "this kernel has no bpf(2)", "a kernel with CONFIG_BPF_SYSCALL"
    return f"eBPF does not work: {os.strerror(error.errno or 0)}", "Linux 5.12 with CONFIG_BPF_EVENTS"


def lacking() -> tuple[str, str] | None:
    """(reason, remedy) when this process may not observe cells; it loads a program that does nothing."""
    if not os.access(VMLINUX, os.R_OK):
        return explain(BtfError(f"{VMLINUX} is missing"))
    nothing = b"\xb7" + bytes(7) + b"\x95" + bytes(7)  # r0 = 0; exit
    try:
        program = calls.load(nothing, "aether_probe")
        try:
            ring = calls.create_map(calls.RING_BUFFER, 0, 0, os.sysconf("SC_PAGESIZE"), "aether_probe")
            os.close(ring)
            os.close(calls.attach(program, "sched_process_exec"))
        finally:
            with contextlib.suppress(OSError):
                os.close(program)
    except OSError as error:
        return explain(error)
    return None
