"""What a cell may be limited to: the fields, how they bound one another, and no kernel file. Pure.

A limit that is None leaves the kernel's default at the start and what there is at a resize. The tightest limit on
the way up holds (every controller is hierarchical); `exceeding` refuses a child that asks for more than it could
get, so that what a cell is told is what it has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Final

from aether.contract import limits

CPU_PERIOD_US: Final = 100_000
IO_LIMITS: Final = ("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops")
_BOUNDED: Final = ("memory_bytes", "cpu_millis", "pids", *IO_LIMITS)
_SETS: Final = ("cpuset_cpus", "cpuset_mems")
_LIST: Final = re.compile(limits.CPU_LIST_PATTERN)
NUMBER_MAX: Final = 8191
"""Above the largest NR_CPUS that Linux can be built for (8192)."""


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What to enforce. `cpu_millis` are thousandths of one CPU, weights go from 1 to 10000 (100 is everybody's
    default), `cpuset_*` are lists such as `0-3,6`; the `io_*` rates hold for the device of the state directory.

    memory: `max` kills, `high` slows down and reclaims, `low` is protected while others have something to give,
    `min` always. `swap_bytes` is swap alone, on top of memory.
    """

    memory_bytes: int | None = None
    memory_min_bytes: int | None = None
    memory_low_bytes: int | None = None
    memory_high_bytes: int | None = None
    swap_bytes: int | None = None
    cpu_millis: int | None = None
    cpu_weight: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    pids: int | None = None
    io_weight: int | None = None
    io_read_bps: int | None = None
    io_write_bps: int | None = None
    io_read_iops: int | None = None
    io_write_iops: int | None = None

    def asked(self) -> tuple[str, ...]:
        """Names of the limits that are set."""
        return tuple(name for name in NAMES if getattr(self, name) is not None)

    def over(self, older: CgroupLimits) -> CgroupLimits:
        """`older`, with every limit that is set here in its place."""
        return replace(older, **{name: getattr(self, name) for name in self.asked()})


NAMES: Final = tuple(field.name for field in fields(CgroupLimits))
NO_LIMITS: Final = CgroupLimits()


def parse_list(text: str) -> frozenset[int]:
    """The numbers of a list in the kernel's syntax (cpuset(7), "List format"); raises ValueError."""
    if len(text) > limits.CPU_LIST_CHARS_MAX or not _LIST.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no list such as 0-3,6")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high or high > NUMBER_MAX:
            raise ValueError(f"{part} is no range within 0-{NUMBER_MAX}")
        found.update(range(low, high + 1))
    return frozenset(found)


def show_list(numbers: frozenset[int]) -> str:
    """The inverse of `parse_list`: the shortest text."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def exceeding(child: CgroupLimits, bounds: CgroupLimits) -> str | None:
    """Why `child` would be more than `bounds` allow; None when it is not."""
    for name in _BOUNDED:
        asked, bound = getattr(child, name), getattr(bounds, name)
        if asked is not None and bound is not None and asked > bound:
            return f"{name} {asked} is above the {bound} of the cell around it"
    for name in _SETS:
        asked, bound = getattr(child, name), getattr(bounds, name)
        if asked is not None and bound is not None and not parse_list(asked) <= parse_list(bound):
            return f"{name} {asked} is not within the {bound} of the cell around it"
    return None


def quota_us(cpu_millis: int) -> int:
    """The share of each CPU_PERIOD_US; the kernel takes no quota below 1 ms (cgroup-v1/sched-bwc)."""
    return max(1000, cpu_millis * CPU_PERIOD_US // 1000)
