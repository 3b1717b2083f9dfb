"""The listening Unix socket: it appears under its name with its final mode, by rename; a stale one is replaced
only when nobody listens on it. Two starters at once are kept apart by the supervisor's lock, not here.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Final

from aether.api.address import bind_address
from aether.contract.errors import AetherError

BACKLOG: Final = 512


def listen(path: Path, *, mode: int, gid: int | None) -> socket.socket:
    """A listening Unix socket at `path`, replacing a stale one. Raises ALREADY_RUNNING, STATE_UNUSABLE.

    It is bound under a temporary name and renamed, so nobody can connect before its mode is set.
    """
    _check_stale(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        fresh.unlink(missing_ok=True)
        with bind_address(fresh) as address:
            listener.bind(address)
        fresh.chmod(mode)
        if gid is not None:
            os.chown(fresh, -1, gid)
        listener.listen(BACKLOG)
        fresh.rename(path)
    except OSError as error:
        listener.close()
        fresh.unlink(missing_ok=True)
        raise AetherError("STATE_UNUSABLE", f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _check_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot listen on {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise AetherError("STATE_UNUSABLE", f"cannot listen on {path}: it exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, bind_address(path) as address:
        probe.setblocking(False)
        try:
            probe.connect(address)
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
        except OSError:
            return
    raise AetherError("ALREADY_RUNNING", f"cannot listen on {path}: another process does")
