"""The binary messages between the spawner, the launcher and PID 1 of a cell.

One message is one SOCK_SEQPACKET datagram, little-endian, at most MESSAGE_BYTES_MAX:
    u16 type, u16 version, u32 total length, then fields.
A text field is u32 length, the bytes, one NUL (so that the C side reads it in place). Descriptors travel with
the message by SCM_RIGHTS. A message that does not parse to its last byte is refused by both sides.

Requests to PID 1: Exec, Signal, Shutdown. Events from PID 1: Ready, StepFailed, Started, ExecFailed, Exited; before
them from a shim (`oci_shim`): Container or RuntimeRefused.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from aether.contract.cellplan import ExecSpec, Rlimit
from aether.spawner.linux import kernel
from aether.spawner.linux.program import NO_ID, RESOURCES, STEPS_KEPT, Op, Program

WIRE_VERSION: Final = 4
MESSAGE_BYTES_MAX: Final = 160 * 1024
FDS_MAX: Final = 64

LAUNCH, EXEC, SIGNAL, SHUTDOWN = 1, 2, 3, 4
LAUNCHED, READY, STEP_FAILED, STARTED, EXEC_FAILED, EXITED = 16, 17, 18, 19, 20, 21
CONTAINER, RUNTIME_REFUSED = 22, 23

HEADER: Final = struct.Struct("<HHI")
_EXITED: Final = struct.Struct("<I4x5Q104s")  # wait4(2): status, then struct rusage of a 64-bit machine
NAMESPACE_KINDS: Final = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
EXEC_STEPS: Final = (
    "none", "session", "stdio", "descriptors", "terminal", "rlimits", "ids", "capabilities", "no_new_privs",
    "landlock", "seccomp", "cwd", "exec", "fork",
)  # fmt: skip

PHASE_BASE: Final = 0x10000
PHASES: Final = (
    "program", "user namespace", "clone", "cgroup", "namespaces", "id map", "host name", "loopback", "new root",
    "pivot", "ids", "capabilities", "no_new_privs", "landlock", "seccomp", "signals",
)  # fmt: skip
PROGRAM_JOIN_USERNS, PROGRAM_PER_EXEC_LANDLOCK, PROGRAM_EXEC, PROGRAM_LAYERS = 1, 2, 4, 8
EXEC_TTY: Final = 8


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
    """The launch ended with `errno` at a step of the plan (its index), or in a fixed phase (`step` None)."""

    step: int | None
    phase: str
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


@dataclass(frozen=True, slots=True)
class Signal:
    """A request: signal the process group of an executable."""

    exec_id: str
    signo: int


@dataclass(frozen=True, slots=True)
class Container:
    """What /proc shows, from outside, of the container that an OCI runtime has built, before our init goes on: of its
    PID 1, or of the sandbox that it runs in. `namespaces` as in Ready; `setup_us` since the launch was asked for."""

    pid: int
    namespaces: dict[str, int]
    seccomp_mode: int
    no_new_privs: bool
    cap_bounding: int
    setup_us: int


@dataclass(frozen=True, slots=True)
class RuntimeRefused:
    """An OCI runtime built no container; `why` names it and repeats its words."""

    why: str


Event = Ready | StepFailed | Started | ExecFailed | Exited | Container | RuntimeRefused


# ---------------------------------------------------------------------------------------------- writing


def _text(value: str) -> bytes:
    data = os.fsencode(value)
    return struct.pack("<I", len(data)) + data + b"\0"


def _message(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    total = HEADER.size + len(body)
    if total > MESSAGE_BYTES_MAX:
        raise WireError(f"a message of {total} bytes is too large")
    return HEADER.pack(kind, WIRE_VERSION, total) + body


def _limits(limits: Sequence[Rlimit]) -> bytes:
    rows = (struct.pack("<IQQ", RESOURCES[r.name], r.soft, r.hard) for r in limits)
    return struct.pack("<I", len(limits)) + b"".join(rows)


def _exec_body(spec: ExecSpec) -> bytes:
    flags = sum(1 << i for i, kind in enumerate(spec.stdio) if kind == "null")
    flags |= EXEC_TTY if spec.tty else 0
    parts = [_text(spec.exec_id), _text(spec.cwd), struct.pack("<II", flags, spec.extra_fds), _limits(spec.rlimits)]
    for strings in (spec.argv, tuple(f"{k}={v}" for k, v in spec.env)):
        parts.append(struct.pack("<I", len(strings)))
        parts.extend(_text(s) for s in strings)
    return b"".join(parts)


def encode_exec(spec: ExecSpec) -> bytes:
    return _message(EXEC, _exec_body(spec))


def encode_signal(exec_id: str, signo: int) -> bytes:
    return _message(SIGNAL, _text(exec_id), struct.pack("<I", signo))


def encode_shutdown() -> bytes:
    return _message(SHUTDOWN)


def encode_ready(inodes: Sequence[int], landlock_abi: int, setup_us: int) -> bytes:
    return _message(READY, struct.pack("<7QIQ", *inodes, landlock_abi, setup_us))


def encode_step_failed(number: int, code: int) -> bytes:
    """`number` is a step of the plan, or as from `phase_number`."""
    return _message(STEP_FAILED, struct.pack("<II", number, code))


def encode_started(exec_id: str, pid: int, facts: Sequence[int]) -> bytes:
    """`facts`: six as in Enforced, two rows of capget(2) (effective, permitted, inheritable; low, then high), the
    bounding set."""
    return _message(STARTED, _text(exec_id), struct.pack("<13IQ", pid, *facts))


def encode_exec_failed(exec_id: str, step: str, code: int) -> bytes:
    return _message(EXEC_FAILED, _text(exec_id), struct.pack("<II", EXEC_STEPS.index(step), code))


def encode_exited(exec_id: str, exit_code: int, usage: tuple[int, int, int]) -> bytes:
    """`exit_code` as of os.waitstatus_to_exitcode: negative is a signal."""
    status = -exit_code if exit_code < 0 else exit_code << 8
    utime, stime = (divmod(us, 1_000_000) for us in usage[:2])
    return _message(EXITED, _text(exec_id), _EXITED.pack(status, *utime, *stime, usage[2], b""))


def encode_container(seen: Container) -> bytes:
    inodes = [seen.namespaces[kind] for kind in NAMESPACE_KINDS]
    flags = (seen.pid, seen.seccomp_mode, seen.no_new_privs)
    return _message(CONTAINER, struct.pack("<3I9Q", *flags, *inodes, seen.cap_bounding, seen.setup_us))


def encode_runtime_refused(why: str) -> bytes:
    return _message(RUNTIME_REFUSED, _text(why))


@lru_cache(maxsize=STEPS_KEPT)
def _operation(op: Op) -> bytes:
    numbers = struct.pack("<IIII", op.kind, op.step, op.mode, op.flags)
    return numbers + _text(op.path) + _text(op.text) + _text(op.text2)


def encode_launch(program: Program, started_us: int, attach_count: int, cgroup2: bool, spec: ExecSpec | None) -> bytes:
    """The whole program and, if any, the first executable, for the native launcher; `started_us` of the monotonic
    clock is where Ready.setup_us counts from."""
    flags = PROGRAM_JOIN_USERNS * program.join_userns
    flags |= PROGRAM_LAYERS * (NO_ID not in program.layer_owner)
    flags |= PROGRAM_PER_EXEC_LANDLOCK * program.per_exec_landlock | PROGRAM_EXEC * (spec is not None)
    ids = program.ids
    clone_flags = program.clone_flags | kernel.CLONE_INTO_CGROUP * cgroup2
    parts = [struct.pack("<QQQII", started_us, clone_flags, program.unshare_flags, flags, attach_count)]
    job = (ids.job_uid, ids.job_gid)
    if ids.count > 1:
        job = program.seen_ids(*job)
    init = program.seen_ids(ids.init_uid, ids.init_uid)
    parts.append(struct.pack("<7I", ids.host_uid, ids.host_gid, ids.count, *init, *job))
    parts += [struct.pack("<I", program.last_cap), _text(program.hostname), struct.pack("<I", len(program.ops))]
    parts += [_operation(op) for op in program.ops]
    landlock = program.landlock
    if landlock is None:
        parts.append(struct.pack("<IIQQQI", 0, 0, 0, 0, 0, 0))
    else:
        parts.append(struct.pack("<IIQQQI", landlock.abi, landlock.size, *landlock.attr, len(landlock.rules)))
        parts += [struct.pack("<Q", access) + _text(path) for path, access in landlock.rules]
    parts += [_limits(program.rlimits), struct.pack("<I", len(program.filter) // 8), program.filter]
    if spec is not None:
        parts.append(_exec_body(spec))
    return _message(LAUNCH, *parts)


def send(sock: socket.socket, message: bytes, fds: Sequence[int] = ()) -> None:
    """One datagram with its descriptors. Raises OSError: BrokenPipeError when the other side is gone."""
    if len(fds) > FDS_MAX:
        raise WireError(f"{len(fds)} descriptors are too many")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([message], rights, socket.MSG_NOSIGNAL)


def send_exec(sock: socket.socket, spec: ExecSpec, fds: Sequence[int]) -> None:
    """Ask PID 1 to start `spec`; `fds` as in Executor.launch. Answered by Started or ExecFailed."""
    if len(fds) != spec.fd_count:
        raise WireError(f"{spec.fd_count} descriptors are needed, {len(fds)} given")
    send(sock, encode_exec(spec), fds)


def send_signal(sock: socket.socket, exec_id: str, signo: int) -> None:
    """Signal the process group of an executable; unknown or ended ones are ignored."""
    send(sock, encode_signal(exec_id, signo))


def send_shutdown(sock: socket.socket) -> None:
    """End PID 1 and with it every process of the cell."""
    send(sock, encode_shutdown())


# ---------------------------------------------------------------------------------------------- reading


class Reader:
    """Bounded reading of one message; `finish` refuses what is left over."""

    def __init__(self, data: bytes) -> None:
        if len(data) < HEADER.size:
            raise WireError("a message is shorter than its header")
        self.kind, version, total = HEADER.unpack_from(data)
        if version != WIRE_VERSION or total != len(data):
            raise WireError("a message has the wrong version or length")
        self._data = data
        self._at = HEADER.size

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise WireError("a message ends too early")
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, bytes_max: int = MESSAGE_BYTES_MAX) -> str:
        size = self.u32()
        if size > bytes_max:
            raise WireError("a text is too long")
        data = self.take(size + 1)
        if data.find(0) != size:
            raise WireError("a text holds NUL or lacks its end")
        return os.fsdecode(data[:-1])

    def finish(self) -> None:
        if self._at != len(self._data):
            raise WireError("a message goes on after its end")


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"unknown ({index})"


def phase_number(phase: str) -> int:
    """The number of a fixed phase on the wire."""
    return PHASE_BASE + PHASES.index(phase)


def phase_of(number: int) -> tuple[int | None, str]:
    """(index of the plan's step, phase) from the number on the wire."""
    return (number, "plan") if number < PHASE_BASE else (None, _name(PHASES, number - PHASE_BASE))


def _decode_event(r: Reader) -> Event:
    match r.kind:
        case 17:
            inodes = {kind: r.u64() for kind in NAMESPACE_KINDS}
            return Ready(inodes, r.u32(), r.u64())
        case 18:
            step, phase = phase_of(r.u32())
            return StepFailed(step, phase, r.u32())
        case 19:
            exec_id, pid = r.text(64), r.u32()
            uid, gid, groups, nnp, mode, dumpable = (r.u32() for _ in range(6))
            words = [r.u32() for _ in range(6)]
            caps = [low | high << 32 for low, high in zip(words[:3], words[3:], strict=True)]
            caps.append(r.u64())
            return Started(exec_id, pid, Enforced(uid, gid, groups, nnp == 1, mode, dumpable == 1, *caps))
        case 20:
            return ExecFailed(r.text(64), _name(EXEC_STEPS, r.u32()), r.u32())
        case 21:
            exec_id = r.text(64)
            status, user_s, user_us, system_s, system_us, maxrss_kb, _ = _EXITED.unpack(r.take(_EXITED.size))
            signal = status & 0x7F
            code = None if signal else status >> 8 & 0xFF
            times = (user_s * 1_000_000 + user_us, system_s * 1_000_000 + system_us)
            return Exited(exec_id, code, signal or None, *times, maxrss_kb)
        case 22:
            pid, mode, nnp = (r.u32() for _ in range(3))
            inodes = {kind: r.u64() for kind in NAMESPACE_KINDS}
            return Container(pid, inodes, mode, nnp == 1, r.u64(), r.u64())
        case 23:
            return RuntimeRefused(r.text(2048))
    raise WireError(f"message type {r.kind} is not an event")


def decode_event(data: bytes) -> Event:
    """One event, or WireError."""
    reader = Reader(data)
    event = _decode_event(reader)
    reader.finish()
    return event


def decode_launched(data: bytes) -> tuple[int, int, int]:
    """The launcher's answer: pid (or -1), phase number, errno."""
    reader = Reader(data)
    if reader.kind != LAUNCHED:
        raise WireError(f"message type {reader.kind} does not answer a launch")
    pid, phase, code = struct.unpack("<iII", reader.take(12))
    reader.finish()
    return pid, phase, code


def receive(sock: socket.socket) -> Event | None:
    """The next event; None when PID 1 has closed its end. Raises BlockingIOError when there is none yet."""
    try:
        data = sock.recv(4096)
    except ConnectionResetError:  # it died with requests of ours unread
        return None
    return decode_event(data) if data else None


def _decode_exec(r: Reader) -> ExecSpec:
    exec_id, cwd, flags, extra = r.text(64), r.text(1024), r.u32(), r.u32()
    limits = []
    for _ in range(r.u32()):
        number, soft, hard = r.u32(), r.u64(), r.u64()
        name = next((n for n, value in RESOURCES.items() if value == number), None)
        if name is None:
            raise WireError("a limit has an unknown number")
        limits.append(Rlimit(name, soft, hard))
    argv = tuple(r.text() for _ in range(r.u32()))
    env = tuple(r.text().partition("=")[::2] for _ in range(r.u32()))
    kinds = ["null" if flags >> i & 1 else "fd" for i in range(3)]
    stdio = (kinds[0], kinds[1], kinds[2])
    return ExecSpec(exec_id, argv, env, cwd, stdio, extra, tuple(limits), bool(flags & EXEC_TTY))


def decode_request(data: bytes) -> ExecSpec | Signal | None:
    """What PID 1 is asked: an executable, a signal, or (None) to end. Raises WireError."""
    reader = Reader(data)
    request: ExecSpec | Signal | None
    if reader.kind == EXEC:
        request = _decode_exec(reader)
    elif reader.kind == SIGNAL:
        request = Signal(reader.text(64), reader.u32())
    elif reader.kind == SHUTDOWN:
        request = None
    else:
        raise WireError(f"message type {reader.kind} is not a request")
    reader.finish()
    return request


def receive_request(sock: socket.socket) -> tuple[ExecSpec | Signal | None, list[int]]:
    """In PID 1: the next request and its descriptors; None also at the end of the socket."""
    fds: list[int] = []
    data, rights, flags, _ = sock.recvmsg(MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4 * FDS_MAX), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds = list(memoryview(content[: len(content) // 4 * 4]).cast("i"))
    if not data:
        return None, fds
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise WireError("a message was cut short")
    return decode_request(data), fds
