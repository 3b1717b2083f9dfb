"""The ids that this process may give its cells, and how an ordinary user comes by more than its own.

subuid(5) lends a user a range of ids; newuidmap(1), which is setuid root, writes them into the map of a namespace of
that user. `enter` has one made and mapped (0 is the user, 1 and up are the lent ids) and joins it: from then on this
process is root there, as far as what belongs to that namespace goes, and the host's kernel still sees the user. It has
to execute itself anew: memory that was made outside belongs to the outer namespace, and so would, for every check of
ptrace(2), the cells that are forked from it.

Two ids are enough for a cell, and no more are taken than its cells can need.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.contract import limits
from aether.contract.cellids import PAIR, UID_MAX
from aether.spawner.linux import kernel

TOOL_TIMEOUT_S: Final = 5.0
IDS_MAX: Final = PAIR * limits.CELL_UID_SLOTS
SETTING: Final = "AETHER_SUBORDINATE_IDS"
"""`off` in the environment: cells have the user's own id, as where none are lent."""


@dataclass(frozen=True, slots=True)
class Lent:
    """The first and the number of the ids that are lent to a user, uids and gids."""

    uids: tuple[int, int]
    gids: tuple[int, int]

    @property
    def count(self) -> int:
        return min(self.uids[1], self.gids[1], IDS_MAX)


def largest_range(text: str, names: tuple[str, ...]) -> tuple[int, int]:
    """(first, count) of the largest range that subuid(5) lines of these names lend; (0, 0) without one."""
    found = (0, 0)
    for line in text.splitlines():
        name, *numbers = line.strip().split(":")
        if name in names and len(numbers) == 2 and all(n.isascii() and n.isdigit() and len(n) <= 10 for n in numbers):
            first, count = map(int, numbers)
            if first > 0 and first + count <= UID_MAX and count > found[1]:
                found = (first, count)
    return found


def names_of(uid: int) -> tuple[str, ...]:
    """What a user's lines begin with: the number, and the name where there is one."""
    with contextlib.suppress(KeyError):
        return str(uid), pwd.getpwuid(uid).pw_name
    return (str(uid),)


def lent(uid: int, root: Path = Path("/")) -> Lent:
    """Of the files; a name service may know others, which newuidmap would accept and we do not look for."""
    names = names_of(uid)
    return Lent(*(largest_range(_read(root / "etc" / name), names) for name in ("subuid", "subgid")))


def lacking(uid: int, root: Path = Path("/")) -> tuple[str, str] | None:
    """(reason, remedy) when an ordinary user's cells cannot have ids of their own; `root` stands in for the files."""
    if os.environ.get(SETTING) == "off":
        return f"{SETTING} is off", f"unset {SETTING}"
    name = names_of(uid)[-1]
    if lent(uid, root).count < PAIR:
        return (
            "no subordinate ids are lent to this user",
            f"as root: usermod --add-subuids 200000-265535 --add-subgids 200000-265535 {name}",
        )
    if not all(shutil.which(tool) for tool in ("newuidmap", "newgidmap")):
        return "newuidmap is not installed", "apt-get install uidmap"
    return None


def enter() -> bool:
    """Become root of a namespace of lent ids; False where that cannot be, and then nothing has changed.

    The caller executes itself anew. Single-threaded callers only.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or lacking(uid) is not None:
        return False
    try:
        namespace = _mapped(lent(uid), uid, gid)
    except (OSError, subprocess.SubprocessError):
        return False
    try:
        if not _serves(namespace):
            return False
        kernel.setns(namespace, kernel.CLONE_NEWUSER)
    except OSError:
        return False
    finally:
        os.close(namespace)
    return True


def _mapped(found: Lent, uid: int, gid: int) -> int:
    """A user namespace of ours with the ids in it. Raises OSError, SubprocessError."""
    pid = kernel.clone(kernel.CLONE_NEWUSER, None)
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        for tool, own, (first, _) in (("newuidmap", uid, found.uids), ("newgidmap", gid, found.gids)):
            words = (pid, 0, own, 1, 1, first, found.count)
            command = [shutil.which(tool) or tool, *map(str, words)]
            subprocess.run(command, check=True, capture_output=True, timeout=TOOL_TIMEOUT_S)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serves(namespace: int) -> bool:
    """Whether one gains the right to make namespaces there: AppArmor may map the ids and give no capability."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.setns(namespace, kernel.CLONE_NEWUSER)
            kernel.unshare(kernel.CLONE_NEWNS)
            os.setresuid(1, 1, 1)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
