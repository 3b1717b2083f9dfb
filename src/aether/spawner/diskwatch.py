"""The watcher: a helper of the spawner that says when a cell keeps more on disk than it may.

Protocol, JSON over SOCK_SEQPACKET: `{"op": "watch", "cells": [{cell, trees, pids, uids, bytes_max}]}` (again: with
other bounds; each is looked at on arrival), `{"op": "forget", cell}`; it answers `{"ev": "over", cell, size_bytes,
entries}` once and forgets the cell. The trees are names below `--directory`, the work root.

A look at a cell costs time in proportion to what it keeps, so most looks are not taken: a cell that had room for n
more bytes cannot be above its bound while what the whole file system holds has not risen by n since (statfs(2), one
call for all cells). What others free hides what a cell writes, but then the disk is no fuller; and every cell is
looked at again after RECHECK_S. Looks take at most a fifth of one CPU: after one comes a pause four times as long.

It reads names and numbers, never contents. As root it keeps three capabilities and no more: to list directories that
are others', to see what others' processes hold open, and to follow their mappings.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any, Final

from aether.contract import limits
from aether.spawner.diskuse import Use, count_nameless, count_tree
from aether.spawner.linux import idspace, kernel
from aether.spawner.linux.confine import PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS

INTERVAL_S: Final = 0.25
RECHECK_S: Final = 5.0
PAUSE_FACTOR: Final = 4
_CAP_DAC_READ_SEARCH, _CAP_SYS_PTRACE, _CAP_CHECKPOINT_RESTORE = 2, 19, 40


@dataclass(frozen=True, slots=True)
class Held:
    """What a whole file system holds. `inodes` stays 0 where none are counted (btrfs)."""

    size_bytes: int
    inodes: int


@dataclass(frozen=True, slots=True)
class Look:
    """What a cell could still add when it was last looked at, and what the file system held just before."""

    time_s: float
    held: Held
    room_bytes: int
    room_entries: int


@dataclass(slots=True)
class Watched:
    """One cell. `uids` may own what it holds open without a name."""

    trees: tuple[str, ...]
    pids: tuple[int, ...]
    uids: range
    bytes_max: int
    last: Look | None = None


def must_look(last: Look | None, held: Held, now_s: float) -> bool:
    """Pure: whether a cell may be above its bound by now."""
    if last is None or now_s - last.time_s >= RECHECK_S:
        return True
    grown_bytes, grown_inodes = held.size_bytes - last.held.size_bytes, held.inodes - last.held.inodes
    return grown_bytes > last.room_bytes or grown_inodes > last.room_entries


def held_by(directory: int) -> Held:
    about = os.fstatvfs(directory)
    return Held((about.f_blocks - about.f_bfree) * about.f_frsize, about.f_files - about.f_ffree)


def measure(directory: int, cell: Watched) -> Use:
    """Count until it is above its bounds, or to the end."""
    use = Use(cell.bytes_max, limits.WORK_ENTRIES_MAX)
    for tree in cell.trees:
        count_tree(directory, tree, use)
    if not use.full:
        count_nameless(cell.pids, directory, cell.uids, use)
    return use


class Watcher:
    """The cells that are watched, until the spawner is gone."""

    def __init__(self, link: socket.socket, directory: int) -> None:
        self._link = link
        self._directory = directory
        self._cells: dict[str, Watched] = {}

    def run(self) -> None:
        pause_s = INTERVAL_S
        while self._receive(pause_s):
            began_s = time.monotonic()
            self.look(began_s)
            pause_s = max(INTERVAL_S, PAUSE_FACTOR * (time.monotonic() - began_s))

    def look(self, now_s: float) -> None:
        """At every cell that may be above its bounds by now."""
        held = held_by(self._directory)
        for name, cell in list(self._cells.items()):
            if must_look(cell.last, held, now_s):
                self._look_at(name, cell, held, now_s)

    def _look_at(self, name: str, cell: Watched, held: Held, now_s: float) -> None:
        use = measure(self._directory, cell)
        room = cell.bytes_max - use.size_bytes, limits.WORK_ENTRIES_MAX - use.entries
        cell.last = Look(now_s, held, *room)
        if use.full:
            del self._cells[name]
            over = {"ev": "over", "cell": name, "size_bytes": use.size_bytes, "entries": use.entries}
            self._link.send(json.dumps(over).encode())

    def _receive(self, wait_s: float) -> bool:
        """All messages that come before the time is over; False when the spawner is gone."""
        until_s = time.monotonic() + wait_s
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            if not select.select([self._link], [], [], left_s)[0]:
                return True
            data = self._link.recv(limits.SPAWNER_MESSAGE_BYTES_MAX)
            if not data:
                return False
            self._perform(json.loads(data))

    def _perform(self, message: dict[str, Any]) -> None:
        if message["op"] == "forget":
            self._cells.pop(message["cell"], None)
            return
        held, now_s = held_by(self._directory), time.monotonic()
        for each in message["cells"]:
            trees, pids, (first, end) = tuple(each["trees"]), tuple(each["pids"]), each["uids"]
            cell = self._cells[each["cell"]] = Watched(trees, pids, range(first, end), each["bytes_max"])
            self._look_at(each["cell"], cell, held, now_s)


def keep_looking_rights(uid: int, gid: int) -> None:
    """As root: become `uid`/`gid` with the three capabilities that looking takes, which the root of a user namespace
    keeps of its own. Raises OSError."""
    if os.geteuid() == 0:
        kept = 1 << _CAP_DAC_READ_SEARCH | 1 << _CAP_SYS_PTRACE | 1 << _CAP_CHECKPOINT_RESTORE
        kernel.prctl(PR_SET_KEEPCAPS, 1)
        if idspace.here().kind == "root":
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        kernel.set_capabilities(kept)
    kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(PR_SET_DUMPABLE, 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aether-diskwatch")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--uid", type=int, default=-1)
    parser.add_argument("--gid", type=int, default=-1)
    options = parser.parse_args(argv)
    link = socket.socket(fileno=options.socket_fd)
    os.set_inheritable(options.socket_fd, False)
    directory = os.open(options.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its spawner has ended
        signal.signal(signo, signal.SIG_IGN)
    keep_looking_rights(options.uid, options.gid)
    Watcher(link, directory).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
