"""What a cell keeps on disk: its trees, counted without following anything, and files that are open and have no name.

Bytes are allocated blocks (stat(2), `st_blocks`), so a sparse file counts what it holds; a file with several names
counts once. Entries are names. The trees were shaped by the job: every directory is opened from the one above it with
`open_beneath`, so at most WORK_DEPTH_MAX descriptors are held, and what lies deeper counts as too many entries.

A file that was unlinked keeps its blocks while a descriptor or a mapping refers to it (unlink(2)): they are looked for
in /proc, thread by thread, since a thread may have descriptors of its own (unshare(2), CLONE_FILES). What is only
under way between two sockets (SCM_RIGHTS) is in no table and is not seen.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from aether.contract import limits
from aether.spawner.beneath import open_beneath
from aether.spawner.linux import kernel
from aether.spawner.linux.family import family

BLOCK_BYTES: Final = 512
"""The unit of `st_blocks`, whatever the file system's own is."""
DESCRIPTORS_MAX: Final = 500_000
"""Looked at in one count: above what the cell's limits on processes and open files leave an honest job."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_SEEN: Final = stat.S_IRUSR | stat.S_IXUSR
_KCMP_FILES: Final = 2
_DELETED: Final = " (deleted)"


@dataclass(slots=True)
class Use:
    """A count under way; `full` once it is above what was asked about."""

    bytes_max: int
    entries_max: int
    size_bytes: int = 0
    entries: int = 0
    descriptors: int = 0
    seen: set[tuple[int, int]] = field(default_factory=set)

    @property
    def full(self) -> bool:
        return self.size_bytes > self.bytes_max or self.entries > self.entries_max

    def add(self, about: os.stat_result) -> None:
        """One file, once."""
        key = about.st_dev, about.st_ino
        if key not in self.seen:
            self.seen.add(key)
            self.size_bytes += about.st_blocks * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class _Level:
    """An open directory, the names of the directories in it that are still to be counted, and the mode to give back."""

    here: int
    below: list[str]
    mode: int | None

    def leave(self) -> None:
        if self.mode is not None:
            os.fchmod(self.here, self.mode)
        os.close(self.here)


def count_tree(parent: int, name: str, use: Use) -> None:
    """Add what lies in the directory `name` below the descriptor `parent`, itself not; a missing one is empty."""
    levels: list[_Level] = []
    try:
        _enter(parent, name, use, levels)
        while levels and not use.full:
            if not levels[-1].below:
                levels.pop().leave()
            elif len(levels) > limits.WORK_DEPTH_MAX:
                use.entries = use.entries_max + 1
            else:
                _enter(levels[-1].here, levels[-1].below.pop(), use, levels)
    finally:
        while levels:
            levels.pop().leave()


def _enter(parent: int, name: str, use: Use, levels: list[_Level]) -> None:
    """Add the entries of one directory, and it to `levels` with the names of the directories in it."""
    try:
        level = _open_level(parent, name)
    except OSError:
        return  # removed or replaced meanwhile
    levels.append(level)
    with os.scandir(level.here) as entries:
        for entry in entries:
            use.entries += 1
            with contextlib.suppress(OSError):  # removed meanwhile
                about = entry.stat(follow_symlinks=False)
                use.add(about)
                if stat.S_ISDIR(about.st_mode):
                    level.below.append(entry.name)
            if use.full:
                return


def _open_level(parent: int, name: str) -> _Level:
    """Where cells and daemons have one uid, its own mode may keep a directory from being read or searched: it gets
    another for as long as it is looked at."""
    found = open_beneath(parent, name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        mode = stat.S_IMODE(os.fstat(found).st_mode)
        closed = os.geteuid() != 0 and os.fstat(found).st_uid == os.geteuid() and mode & _SEEN != _SEEN
        if closed:
            os.chmod(f"/proc/self/fd/{found}", mode | _SEEN)  # noqa: PTH101
        return _Level(open_beneath(found, ".", _DIRECTORY), [], mode if closed else None)
    finally:
        os.close(found)


def count_nameless(pids: Iterable[int], work: int, uids: range, use: Use) -> None:
    """Add the files of `uids` without a name that the processes `pids` and their descendants hold on the file system
    of the descriptor `work`, or on one that the cell lays over it."""
    members = {each for pid in pids for each in family(pid)}
    devices = {os.fstat(work).st_dev}
    for pid in members:
        for place in (f"/proc/{pid}/root", f"/proc/{pid}/root/work"):
            with contextlib.suppress(OSError):
                devices.add(os.stat(place).st_dev)  # noqa: PTH116
    held = _Held(frozenset(devices), uids, use)
    for pid in members:
        for directory in _tables(pid):
            held.count_open(directory)
        held.count_mapped(pid)
        if use.full or use.descriptors > DESCRIPTORS_MAX:
            return


def _tables(pid: int) -> list[str]:
    """A directory of /proc for each table of descriptors that the threads of a process have."""
    try:
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208
    except OSError:
        return []
    own = [thread for thread in threads if thread == pid or not _same_table(pid, thread)]
    return [f"/proc/{pid}/task/{thread}/fd" for thread in own]


def _same_table(one: int, other: int) -> bool:
    """kcmp(2); False where it cannot be told."""
    try:
        return kernel.syscall("kcmp", one, other, _KCMP_FILES, 0, 0) == 0
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class _Held:
    """Which of the files that processes hold count: without a name, the cell's own, on its file systems."""

    devices: frozenset[int]
    uids: range
    use: Use

    def count_open(self, directory: str) -> None:
        try:
            names = os.listdir(directory)  # noqa: PTH208
        except OSError:
            return
        self.use.descriptors += len(names)
        for name in names:
            self._look(f"{directory}/{name}")

    def count_mapped(self, pid: int) -> None:
        """Mappings whose descriptor was closed; without the right to follow them (proc(5), map_files) none is seen."""
        try:
            with open(f"/proc/{pid}/maps", errors="replace") as file:
                rows = [line.split(None, 1)[0] for line in file if line.endswith(f"{_DELETED}\n")]
        except OSError:
            return
        self.use.descriptors += len(rows)
        for area in rows:
            first, _, end = area.partition("-")
            self._look(f"/proc/{pid}/map_files/{int(first, 16):x}-{int(end, 16):x}")

    def _look(self, path: str) -> None:
        with contextlib.suppress(OSError):
            about = os.stat(path)  # noqa: PTH116
            ours = about.st_nlink == 0 and about.st_dev in self.devices and about.st_uid in self.uids
            if ours and stat.S_ISREG(about.st_mode):
                self.use.add(about)
