"""What the programs in the kernel and the observer share: map values, events, the trace area. Pure.

Little endian, naturally aligned. A cell is known by the id of its cgroup v2 directory (its inode number,
cgroups(7)); the name travels with every event, so that its reader needs no state.

    watched   key u64 cgroup id -> name[64], u32 flags, u32 0, u64 bucket (ns), u64 dropped
    event     u64 time (ns, CLOCK_MONOTONIC), name[64], u64 dropped so far, u32 kind, u32 pid on the host,
              u32 pid and u32 parent in the cell's innermost pid namespace (parent 0: outside), u32 value (exit word
              or signal number), i32 si_code, u32 sender on the host, u32 sender in the cell (0: outside),
              comm[16], sender's comm[16]; an exec has path[112] besides
    trace     u64 per system call number, u64 calls so far, then a ring of the last calls:
              u64 number in order (from 1), u64 time, u32 pid, u32 thread, u64 system call, 3 u64 arguments, comm[16]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

NAME_BYTES: Final = 64
PID1_IS_OURS: Final = 1
"""Flag: PID 1 of the cell is the reaper and not the workload; its own events are not shown."""

WATCHED: Final = struct.Struct(f"<{NAME_BYTES}sI4xQQ")
WATCHED_FLAGS, WATCHED_BUCKET, WATCHED_DROPPED = 64, 72, 80

EXEC, EXIT, SIGNAL, OOM = 1, 2, 3, 4
TIME, NAME, DROPPED, KIND, HOST_PID, PID, PARENT, VALUE, SI_CODE, SENDER_HOST, SENDER, COMM, SENDER_COMM, PATH = (
    0, 8, 72, 80, 84, 88, 92, 96, 100, 104, 108, 112, 128, 144,
)  # fmt: skip
COMM_BYTES: Final = 16
PATH_BYTES: Final = 112
EVENT: Final = struct.Struct(f"<Q{NAME_BYTES}sQIIIIIiII{COMM_BYTES}s{COMM_BYTES}s")
EVENT_BYTES: Final = EVENT.size
EXEC_BYTES: Final = EVENT_BYTES + PATH_BYTES

CALLS_MAX: Final = 512
"""Numbers from here on are counted together in the last place."""
LAST_CALLS: Final = 256
CALL: Final = struct.Struct(f"<QQIIQQQQ{COMM_BYTES}s")
CALLS_SO_FAR: Final = CALLS_MAX * 8
LAST_AT: Final = CALLS_SO_FAR + 8
CALL_BYTES: Final = 80
TRACE_BYTES: Final = LAST_AT + LAST_CALLS * CALL_BYTES


@dataclass(frozen=True, slots=True)
class Event:
    """One event as the kernel wrote it; see the module's head."""

    time_ns: int
    name: str
    dropped: int
    kind: int
    host_pid: int
    pid: int
    parent: int
    value: int
    si_code: int
    sender_host: int
    sender: int
    comm: bytes
    sender_comm: bytes
    path: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One of the last system calls of a trace."""

    time_ns: int
    pid: int
    thread: int
    number: int
    arguments: tuple[int, int, int]
    comm: bytes


@dataclass(frozen=True, slots=True)
class Trace:
    """What was counted: calls by number, the last place for all from CALLS_MAX - 1 on, and the last calls in order."""

    counts: tuple[int, ...]
    last: tuple[Call, ...]


def watched_value(name: str, flags: int) -> bytes:
    """A new element of `watched`; raises ValueError for a name that does not fit."""
    raw = name.encode()
    if len(raw) > NAME_BYTES:
        raise ValueError(f"cannot watch {name[:80]!r}: its name is too long")
    return WATCHED.pack(raw, flags, 0, 0)


def dropped_of(value: bytes) -> int:
    """The events dropped so far, from an element of `watched`."""
    return int(WATCHED.unpack(value)[3])


def read_event(data: bytes | memoryview) -> Event:
    """Raises ValueError for bytes that are no event."""
    if len(data) not in (EVENT_BYTES, EXEC_BYTES):
        raise ValueError(f"cannot read an event of {len(data)} bytes")
    time_ns, name, dropped, kind, *numbers, comm, sender_comm = EVENT.unpack_from(data)
    path = _text(bytes(data[EVENT_BYTES:]))
    host_pid, pid, parent, value, si_code, sender_host, sender = numbers
    shown = _text(name).decode(errors="replace")
    return Event(
        time_ns, shown, dropped, kind, host_pid, pid, parent, value, si_code, sender_host, sender,
        _text(comm), _text(sender_comm), path,
    )  # fmt: skip


def read_trace(data: bytes) -> Trace:
    """Raises ValueError for an area of another size."""
    if len(data) < TRACE_BYTES:
        raise ValueError(f"cannot read a trace of {len(data)} bytes")
    counts = struct.unpack_from(f"<{CALLS_MAX}Q", data)
    rows = [CALL.unpack_from(data, LAST_AT + slot * CALL_BYTES) for slot in range(LAST_CALLS)]
    rows = sorted(row for row in rows if row[0])
    last = tuple(Call(row[1], row[2], row[3], row[4], (row[5], row[6], row[7]), _text(row[8])) for row in rows)
    return Trace(counts, last)


def _text(raw: bytes) -> bytes:
    return raw.split(b"\0", 1)[0]
