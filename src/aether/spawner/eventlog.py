"""Files of cells' events: `logs/jobs/<cell>/events.jsonl`, one JSON object per line, and `trace.json`.

Every event has the same fields, null where they do not apply:
    time_us       when, microseconds since the epoch
    kind          exec, exit, signal, oom, throttle, dropped or ended
    pid, ppid     in the cell's innermost pid namespace; a ppid of 0 lives outside
    host_pid      the same process as the host counts
    comm          its name, at most 15 bytes; what is not printable is escaped
    path          exec: the file that was executed
    code          exit: its status, when it ended by itself
    signal        exit and signal: the signal's number
    sender, sender_pid, sender_comm     signal: `process` (of this cell), `outside` or `kernel`
    count         throttle: microseconds for want of CPU quota; dropped and ended: events not kept so far

A file only grows. Beyond head + tail its middle is punched out (fallocate(2)), so that offsets stay true; what was
there reads as NUL bytes, which no line contains. The last line of a cell that is over has the kind `ended`.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, Final

from aether.contract.limits import EVENTS_HEAD_BYTES_MAX, EVENTS_TAIL_BYTES_MAX
from aether.spawner.joblog import punch
from aether.spawner.linux.bpf import layout
from aether.spawner.linux.bpf.syscalls import names

EVENTS: Final = "events.jsonl"
TRACE: Final = "trace.json"
FILE_MODE: Final = 0o640
PUNCH_STEP_BYTES: Final = 128 * 1024
_BLOCK: Final = 4096
_CELL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KINDS: Final = {layout.EXEC: "exec", layout.EXIT: "exit", layout.SIGNAL: "signal", layout.OOM: "oom"}
_FROM_PROCESS: Final = frozenset({0, -1, -6})
"""si_code of a signal that a process sent: SI_USER, SI_QUEUE, SI_TKILL (sigaction(2))."""
_EMPTY: Final[dict[str, Any]] = dict.fromkeys(
    (
        "time_us", "kind", "pid", "ppid", "host_pid", "comm", "path", "code", "signal", "sender", "sender_pid",
        "sender_comm", "count",
    )
)  # fmt: skip
_OTHER: Final = "(others)"


def line(**fields: Any) -> bytes:
    """One event as it is kept."""
    return json.dumps(_EMPTY | fields, separators=(",", ":")).encode() + b"\n"


def shown(raw: bytes) -> str:
    """Untrusted bytes as text of printable characters; all others are escaped."""
    text = raw.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(char: str) -> str:
    """By hand: the codec would be a module to load, which a process without privileges may not be able to read."""
    code = ord(char)
    if char.isprintable():
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def event_line(event: layout.Event, epoch_us: int) -> bytes:
    """`epoch_us`: the wall time at which the monotonic clock was 0."""
    fields: dict[str, Any] = {
        "time_us": epoch_us + event.time_ns // 1000,
        "kind": _KINDS.get(event.kind, "unknown"),
        "pid": event.pid,
        "host_pid": event.host_pid,
        "comm": shown(event.comm),
    }
    if event.kind in (layout.EXEC, layout.EXIT):
        fields["ppid"] = event.parent
    if event.kind == layout.EXEC:
        fields["path"] = shown(event.path)
    elif event.kind == layout.EXIT:
        signo = event.value & 0x7F  # wait(2): a status holds the signal in its low 7 bits, else the code above 8
        fields |= {"signal": signo} if signo else {"code": event.value >> 8 & 0xFF}
    elif event.kind == layout.SIGNAL:
        fields |= {"signal": event.value, **_sender(event)}
    return line(**fields)


def _sender(event: layout.Event) -> dict[str, Any]:
    if event.si_code not in _FROM_PROCESS:
        return {"sender": "kernel"}
    if event.sender == 0:
        return {"sender": "outside"}
    return {"sender": "process", "sender_pid": event.sender, "sender_comm": shown(event.sender_comm)}


def trace_document(trace: layout.Trace, arch: str, duration_ms: int, epoch_us: int) -> bytes:
    """The JSON of `trace.json`: calls by count, the last ones in order. Addresses and numbers of arguments are hex."""
    known = names(arch)
    counted = sorted((-count, number) for number, count in enumerate(trace.counts) if count)
    calls = [{"number": number, "name": known.get(number, _OTHER), "count": -count} for count, number in counted]
    last = [
        {
            "time_us": epoch_us + call.time_ns // 1000,
            "pid": call.pid,
            "thread": call.thread,
            "number": call.number,
            "name": known.get(call.number, _OTHER),
            "arguments": [hex(argument) for argument in call.arguments],
            "comm": shown(call.comm),
        }
        for call in trace.last
    ]
    total = sum(trace.counts)
    document = {"arch": arch, "duration_ms": duration_ms, "total": total, "calls": calls, "last": last}
    return json.dumps(document, separators=(",", ":")).encode()


class EventLogs:
    """Writer of the files below `directory`, a descriptor of `logs/jobs`. Holds no file open."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._punches = True

    def append(self, cell: str, lines: bytes) -> bool:
        """Add whole lines; False when they were not kept: a name that is none, a full or failing disk."""
        try:
            fd = self._open(cell, EVENTS, os.O_WRONLY | os.O_APPEND)
        except (OSError, ValueError):
            return False
        try:
            before = os.fstat(fd).st_size
            if not self._punches and before > EVENTS_HEAD_BYTES_MAX + EVENTS_TAIL_BYTES_MAX:
                return False
            if os.write(fd, lines) != len(lines):
                os.ftruncate(fd, before)
                return False
            self._bound(fd, before, before + len(lines))
        except OSError:
            return False
        finally:
            os.close(fd)
        return True

    def replace(self, cell: str, name: str, data: bytes) -> None:
        """Put a whole file in place; raises OSError."""
        fd = self._open(cell, f"{name}.new", os.O_WRONLY | os.O_TRUNC)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(f"{cell}/{name}.new", f"{cell}/{name}", src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _open(self, cell: str, name: str, flags: int) -> int:
        if _CELL.fullmatch(cell) is None:
            raise ValueError(f"cannot keep events of {cell[:80]!r}: it is no cell's name")
        flags |= os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        path = f"{cell}/{name}"
        try:
            return os.open(path, flags, FILE_MODE, dir_fd=self._directory)
        except FileNotFoundError:
            os.mkdir(cell, 0o750, dir_fd=self._directory)
            return os.open(path, flags, FILE_MODE, dir_fd=self._directory)

    def _bound(self, fd: int, before: int, size: int) -> None:
        """Punch the middle out, a step at a time."""
        kept = EVENTS_HEAD_BYTES_MAX + EVENTS_TAIL_BYTES_MAX
        if size // PUNCH_STEP_BYTES == before // PUNCH_STEP_BYTES or size <= kept or not self._punches:
            return
        try:
            punch(fd, EVENTS_HEAD_BYTES_MAX, (size - EVENTS_TAIL_BYTES_MAX) // _BLOCK * _BLOCK)
        except OSError:  # a file system without holes: from now on the head alone is kept
            self._punches = False
