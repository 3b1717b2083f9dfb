"""How the kernel schedules a cell's processes: class, priority, nice value, I/O class.

Set on PID 1 before it starts anything, because children inherit all of it (sched(7), ioprio_set(2)), save
SCHED_DEADLINE, under which no process may fork: an executable gets that itself, once it has started, with
SCHED_FLAG_RESET_ON_FORK. Nice values weigh processes of one cell against each other; cells are weighed by
cpu.weight. Real-time classes know no cpu.max: the host's sched_rt_runtime_us, and on v1 the cell's, bound them.
Raising priority takes CAP_SYS_NICE; who is refused is told so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.spawner.linux import idspace, kernel

POLICIES: Final = {"other": 0, "fifo": 1, "rr": 2, "batch": 3, "idle": 5, "deadline": 6}
IO_CLASSES: Final = {"none": 0, "realtime": 1, "best-effort": 2, "idle": 3}
_CAP_SYS_NICE: Final = 23
_RESET_ON_FORK: Final = 1
_IO_CLASS_SHIFT: Final = 13
_WHO_PROCESS: Final = 1
_ATTR: Final = struct.Struct("=IIQiIQQQ")
"""struct sched_attr, version 0: size, policy, flags, nice, priority, runtime, deadline, period."""
_REMEDY: Final = "real time, a nice value below 0 and the realtime I/O class take CAP_SYS_NICE: start the node as root"


@dataclass(frozen=True, slots=True)
class Sched:
    """`priority` 1..99 is for fifo and rr; the three times are for deadline; `io_class` none follows the nice value,
    of which 0 leaves the spawner's.

    Raises ValueError where these do not go together.
    """

    policy: str = "other"
    priority: int = 0
    runtime_us: int = 0
    deadline_us: int = 0
    period_us: int = 0
    nice: int = 0
    io_class: str = "none"
    io_priority: int = 4

    def __post_init__(self) -> None:
        realtime, deadline = self.policy in ("fifo", "rr"), self.policy == "deadline"
        if realtime != (self.priority > 0):
            raise ValueError("a priority from 1 to 99 goes with fifo and rr, and with them alone")
        times = (self.runtime_us, self.deadline_us, self.period_us)
        if deadline != any(times) or (deadline and not 2 <= times[0] <= times[1] <= times[2]):
            raise ValueError("deadline, and it alone, takes 2 <= runtime_us <= deadline_us <= period_us")
        if self.nice and self.policy not in ("other", "batch"):
            raise ValueError("a nice value goes with other and batch")

    @property
    def realtime(self) -> bool:
        return self.policy in ("fifo", "rr")

    def describe(self) -> str:
        """One line, as reports show it."""
        words = [self.policy]
        if self.realtime:
            words.append(f"priority {self.priority}")
        if self.policy == "deadline":
            words.append(f"{self.runtime_us}/{self.deadline_us}/{self.period_us} us")
        if self.nice:
            words.append(f"nice {self.nice}")
        if self.io_class != "none":
            words.append(f"I/O {self.io_class}" + (f" {self.io_priority}" if self.io_class != "idle" else ""))
        return ", ".join(words)


class SchedError(Exception):
    """A class that this process may not have; `remedy` says what helps."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


def apply(pid: int, sched: Sched) -> None:
    """What PID 1 can have and hand down. Raises SchedError."""
    if sched.io_class != "none":
        data = 0 if sched.io_class == "idle" else sched.io_priority
        _set("I/O class", "ioprio_set", _WHO_PROCESS, pid, IO_CLASSES[sched.io_class] << _IO_CLASS_SHIFT | data)
    if sched.policy != "deadline":
        nice = sched.nice or os.getpriority(os.PRIO_PROCESS, pid)
        attr = (_ATTR.size, POLICIES[sched.policy], 0, nice, sched.priority, 0, 0, 0)
        _set(sched.describe(), "sched_setattr", pid, _ATTR.pack(*attr), 0)


def apply_deadline(pid: int, sched: Sched) -> None:
    """SCHED_DEADLINE for one executable; what it forks is back at `other`. Raises SchedError."""
    times = (sched.runtime_us * 1000, sched.deadline_us * 1000, sched.period_us * 1000)
    attr = _ATTR.pack(_ATTR.size, POLICIES["deadline"], _RESET_ON_FORK, 0, 0, *times)
    _set(sched.describe(), "sched_setattr", pid, attr, 0)


def _set(what: str, call: str, *args: int | bytes) -> None:
    try:
        kernel.syscall(call, *args)
    except OSError as error:
        remedy = _REMEDY if error.errno == errno.EPERM else ""
        if error.errno == errno.EBUSY:
            remedy = "the CPUs have no bandwidth left: ask for less runtime_us in each period_us"
        raise SchedError(f"cannot schedule as {what}: {(error.strerror or '').partition(': ')[2]}", remedy) from error


def seen(pid: int) -> Sched:
    """What the kernel says of `pid`; raises OSError."""
    buffer = ctypes.create_string_buffer(_ATTR.size)
    kernel.syscall("sched_getattr", pid, buffer, _ATTR.size, 0)
    _, policy, _, nice, priority, runtime, deadline, period = _ATTR.unpack(buffer.raw)
    io = kernel.syscall("ioprio_get", _WHO_PROCESS, pid)
    names = {number: name for name, number in POLICIES.items()}
    classes = {number: name for name, number in IO_CLASSES.items()}
    io_class = classes.get(io >> _IO_CLASS_SHIFT, "none")
    own = policy == POLICIES["deadline"]  # newer kernels tell a slice as the runtime of every class
    return Sched(
        names[policy],
        priority,
        runtime // 1000 if own else 0,
        deadline // 1000 if own else 0,
        period // 1000 if own else 0,
        nice if policy in (0, 3) else 0,
        io_class,
        io & 7 if io_class in ("realtime", "best-effort") else 4,
    )


def missing() -> dict[str, str]:
    """What this process may not give its cells, with the reason."""
    try:
        rows = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        # The kernel asks for it in the initial user namespace (sched(7)), whose ids alone are all there.
        if int(rows["CapEff"], 16) >> _CAP_SYS_NICE & 1 and idspace.here().kind != "subordinate":
            return {}
    except (OSError, KeyError, ValueError):
        pass
    return dict.fromkeys(("fifo", "rr", "deadline", "nice below 0", "io_class realtime"), "no CAP_SYS_NICE here")
