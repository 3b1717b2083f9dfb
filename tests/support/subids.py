"""Ids lent to an ordinary user for one command: /etc/subuid, subgid and passwd of a mount namespace of its own.

The machine's files stay as they are; newuidmap(1), which reads them, is the machine's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

FIRST, COUNT = 1_000_000, 4096
_TOOLS = ("newuidmap", "newgidmap", "unshare", "setpriv", "mount")


def needed() -> None:
    """Skips without root or the tools."""
    if os.geteuid() != 0:
        pytest.skip("needs root to lend ids to an ordinary user")
    lacks = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if lacks:
        pytest.skip(f"{', '.join(lacks)} missing: apt-get install uidmap util-linux")


def lending(uid: int, directory: Path) -> list[str]:
    """The words before a command that make it one of `uid`, to whom ids from FIRST on are lent."""
    name = f"lent{uid}"
    texts = {
        "passwd": Path("/etc/passwd").read_text() + f"{name}:x:{uid}:{uid}::/nonexistent:/bin/sh\n",
        "subuid": f"{name}:{FIRST}:{COUNT}\n",
        "subgid": f"{name}:{FIRST}:{COUNT}\n",
    }
    binds = []
    for file, text in texts.items():
        (directory / file).write_text(text)
        (directory / file).chmod(0o644)
        binds.append(f"mount --bind {directory / file} /etc/{file}")
    ids = f"--reuid={uid} --regid={uid} --clear-groups"
    return ["unshare", "--mount", "sh", "-c", " && ".join([*binds, f'exec setpriv {ids} "$@"']), "sh"]


@contextlib.contextmanager
def acting_as(uid: int | None) -> Iterator[None]:
    """Connections made meanwhile are that user's (SO_PEERCRED has the effective ids)."""
    if uid is None:
        yield
        return
    gid = os.getegid()
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
