"""Whether an instance is up, and what its supervisor says about itself: the lock and `instance.json`.

Both lie in `supervisor/`, which belongs to who started the instance (root, for one of the system) and into which
nobody else may write: a role that was taken over can put neither a link nor a pid there. The lock, not a pid file,
says whether an instance lives; what `instance.json` says counts only while the lock is held.

The lock is an open file description lock (fcntl(2)): it can be looked at without taking it, so that who looks
never stands in the way of who starts. It goes with the supervisor, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
from collections.abc import Iterator
from typing import Any, Final

from aether.contract.errors import AetherError
from aether.contract.paths import Layout

_FLOCK: Final = struct.Struct("@hhqqi0q")
"""struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid (0 for these locks)."""
_INSTANCE_BYTES_MAX: Final = 65_536


def acquire(layout: Layout) -> int:
    """Takes the instance's lock for as long as the descriptor lives; raises AetherError ALREADY_RUNNING."""
    with _directory(layout) as directory:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(layout.supervisor_lock.name, flags, 0o600, dir_fd=directory)
    try:
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        os.close(lock)
        raise AetherError("ALREADY_RUNNING", f"cannot start an instance in {layout.root}: one is up") from None
    return lock


def is_up(layout: Layout) -> bool:
    """Whether a supervisor holds the lock; raises AetherError STATE_UNUSABLE for who may not look."""
    try:
        with _directory(layout) as directory:
            lock = os.open(layout.supervisor_lock.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot look at the instance in {layout.root}: {error}") from error
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)
    finally:
        os.close(lock)


def instance(layout: Layout) -> dict[str, Any] | None:
    """What the supervisor wrote about itself; None when no instance is up."""
    if not is_up(layout):
        return None
    with contextlib.suppress(OSError, ValueError), _directory(layout) as directory:
        name, flags = layout.instance_file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=directory), "rb") as file:
            found = json.loads(file.read(_INSTANCE_BYTES_MAX))
        if isinstance(found, dict):
            return found
    return None


def announce(layout: Layout, facts: dict[str, Any]) -> None:
    """Writes `instance.json` as a whole (rename); every user that may enter the directory can read it."""
    name = layout.instance_file.name
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with _directory(layout) as directory:
        with open(os.open(f"{name}.new", flags, 0o644, dir_fd=directory), "w") as file:
            os.fchmod(file.fileno(), 0o644)
            json.dump(facts, file)
        os.rename(f"{name}.new", name, src_dir_fd=directory, dst_dir_fd=directory)


def withdraw(layout: Layout) -> None:
    """Removes `instance.json`."""
    with contextlib.suppress(FileNotFoundError), _directory(layout) as directory:
        os.unlink(layout.instance_file.name, dir_fd=directory)


@contextlib.contextmanager
def _directory(layout: Layout) -> Iterator[int]:
    """The supervisor's directory, of root or of this user and writable by no other; raises OSError."""
    directory = os.open(layout.supervisor, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if found.st_uid not in (0, layout.root.stat().st_uid) or stat.S_IMODE(found.st_mode) & 0o022:
            raise PermissionError(f"{layout.supervisor} can be written by others than its instance's owner")
        yield directory
    finally:
        os.close(directory)
