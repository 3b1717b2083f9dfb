"""What a test looks at on the machine: processes, cgroups and mounts that carry an instance's mark."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

SLOW = 5 if "AETHER_GUEST" in os.environ else 1
"""What a wait is multiplied with in the emulated guest of `make test-v2`."""


def children(pid: int) -> list[int]:
    """Child pids of `pid` (proc(5)); empty when it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(word) for word in (task / "children").read_text().split()]
    return found


def family(pid: int) -> list[int]:
    """`pid` and its descendants."""
    return [pid, *(found for child in children(pid) for found in family(child))]


def argv_of(pid: int) -> list[str]:
    """The command line; empty when the process is gone or a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return []


def mentioning(text: str) -> list[int]:
    """Processes other than this one whose command line mentions `text` (a state directory, say)."""
    found = []
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and int(entry.name) != os.getpid()
            and any(text in word for word in argv_of(int(entry.name)))
        ):
            found.append(int(entry.name))
    return found


def cgroups(mark: str) -> list[Path]:
    """cgroup directories below any hierarchy whose name holds `mark`."""
    found: list[Path] = []
    for base, names, _ in os.walk("/sys/fs/cgroup"):
        if base.count("/") > 6:
            names.clear()
        found += [Path(base) / name for name in names if mark in name]
    return found


def mounts(mark: str) -> list[str]:
    """Lines of this process's mountinfo that hold `mark`."""
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if mark in line]
