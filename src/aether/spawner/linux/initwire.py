"""The binary messages between the spawner, the launcher and PID 1 of a cell.

One message is one SOCK_SEQPACKET datagram, little-endian, at most MESSAGE_BYTES_MAX:
    u16 type, u16 version, u32 total length, then fields.
A text field is u32 length, the bytes, one NUL (so that the C side reads it in place). Descriptors travel with
the message by SCM_RIGHTS. A message that does not parse to its last byte is refused by both sides.

Requests to PID 1: Exec, Signal, Shutdown. Events from PID 1: Ready, StepFailed, Started, ExecFailed, Exited.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from aether.contract.cellplan import ExecSpec, Rlimit

WIRE_VERSION: Final = 1
MESSAGE_BYTES_MAX: Final = 160 * 1024
FDS_MAX: Final = 64

LAUNCH, EXEC, SIGNAL, SHUTDOWN = 1, 2, 3, 4
LAUNCHED, READY, STEP_FAILED, STARTED, EXEC_FAILED, EXITED = 16, 17, 18, 19, 20, 21

HEADER: Final = struct.Struct("<HHI")
NAMESPACE_KINDS: Final = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
EXEC_STEPS: Final = (
    "none", "session", "stdio", "descriptors", "terminal", "rlimits", "ids", "capabilities", "no_new_privs",
    "landlock", "seccomp", "cwd", "exec", "fork",
)  # fmt: skip


class WireError(ValueError):
    """Bytes that are not a message of this protocol."""


@dataclass(frozen=True, slots=True)
class Ready:
    """PID 1 stands. `namespaces` are inode numbers as PID 1 sees them, 0 where unreadable."""

    namespaces: dict[str, int]
    landlock_abi: int
    setup_us: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The launch ended at `step` (index into the program's operations) with `errno`."""

    step: int
    errno: int


@dataclass(frozen=True, slots=True)
class Enforced:
    """What the kernel answered when the executable asked about itself, after its last setup step."""

    uid: int
    gid: int
    groups: int
    no_new_privs: bool
    seccomp_mode: int
    dumpable: bool
    cap_effective: int
    cap_permitted: int
    cap_inheritable: int
    cap_bounding: int


@dataclass(frozen=True, slots=True)
class Started:
    """execve succeeded; `pid` as seen by PID 1."""

    exec_id: str
    pid: int
    enforced: Enforced


@dataclass(frozen=True, slots=True)
class ExecFailed:
    """The executable never ran; `step` is one of EXEC_STEPS."""

    exec_id: str
    step: str
    errno: int


@dataclass(frozen=True, slots=True)
class Exited:
    """The executable ended: exactly one of `code` and `signal` is not None. Usage covers its reaped tree."""

    exec_id: str
    code: int | None
    signal: int | None
    utime_us: int
    stime_us: int
    maxrss_kb: int


Event = Ready | StepFailed | Started | ExecFailed | Exited
