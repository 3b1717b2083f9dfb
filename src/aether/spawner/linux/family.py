"""Who descends from a process, by proc(5). A snapshot: what forks meanwhile may be missing."""

from __future__ import annotations

from pathlib import Path


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
