"""Who descends from a process, by proc(5). A snapshot: what forks meanwhile may be missing."""

from __future__ import annotations

from pathlib import Path


def children(pid: int) -> tuple[int, ...]:
    """Of the one thread of `pid` (proc(5)); empty when it is gone."""
    try:
        return tuple(int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    except (OSError, ValueError):
        return ()


def family(pid: int) -> tuple[int, ...]:
    """`pid` and its descendants, those of every thread."""
    found, wanted = [], [pid]
    while wanted:
        each = wanted.pop()
        found.append(each)
        try:
            threads = [entry.name for entry in Path(f"/proc/{each}/task").iterdir()]
        except OSError:
            continue
        for thread in threads:
            try:
                wanted += [int(word) for word in Path(f"/proc/{each}/task/{thread}/children").read_text().split()]
            except (OSError, ValueError):
                continue
    return tuple(found)


def inner_number(pid: int) -> int:
    """Its number in the innermost pid namespace it is in."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except (OSError, ValueError):
        pass
    return 0
