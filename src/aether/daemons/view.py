"""What a daemon that gives up root may still see: a mount namespace in which its files can be reached.

A virtual environment or an interpreter below a home directory of mode 0700 is out of reach for another uid, and
Python reads modules and codecs as late as it likes. So, before the uid changes, each directory that others may
not enter is covered by an empty tmpfs, and only what the daemon needs is bound into it again at its own place:
the interpreter, the package, the state directory. The rest of that home is out of its sight, which is as well.

Needs CAP_SYS_ADMIN. Where every path can be entered by others, nothing is done (mount_namespaces(7)).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import aether
from aether.contract.errors import AetherError

_CLONE_NEWNS: Final = 0x0002_0000
_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]


def needed(state: Path) -> tuple[Path, ...]:
    """What a daemon reads after it gave up root."""
    package = Path(aether.__file__).resolve().parent
    return tuple({Path(sys.prefix), Path(sys.base_prefix).resolve(), package.parent, state.resolve()})


def closed_ancestors(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """The outermost directory above each path that others may not enter, with the paths below it."""
    found: dict[Path, list[Path]] = {}
    for path in sorted(paths):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                found.setdefault(parent, []).append(path)
                break
    return found


def open_up(state: Path) -> None:
    """Makes `needed` reachable for another uid in this process; raises AetherError STATE_UNUSABLE."""
    closed = closed_ancestors(needed(state))
    if not closed:
        return
    try:
        if _libc.unshare(_CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
        for top, paths in closed.items():
            _cover(top, paths)
    except OSError as error:
        raise AetherError(
            "STATE_UNUSABLE",
            f"cannot run as another user: {', '.join(map(str, closed))} may not be entered by others ({error})",
            "install AetherOS and Python where every user may read them, for instance in /opt",
        ) from error


def _cover(top: Path, paths: list[Path]) -> None:
    handles = [(path, os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) for path in paths]
    _mount("tmpfs", str(top), "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    for path, handle in handles:
        path.mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{handle}", str(path), "", _MS_BIND | _MS_REC)
        os.close(handle)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")
