"""Small file effects that the log's parts share: whole-file replacement, durable directories, allocation."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from typing import Final

_FALLOC_FL_KEEP_SIZE: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


def write_file(path: Path, data: bytes, *, mode: int = 0o640, sync: bool = False) -> None:
    """Replaces `path` by rename; with `sync` its bytes are durable first (the directory is the caller's)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            write_all(fd, data)
            if sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except OSError:
        # ENOSPC must not leave a fragment behind that takes what little room there is
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_all(fd: int, data: bytes) -> None:
    """write(2) may be short (signals, a nearly full disk); goes on until all is written or it fails."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def fsync_dir(path: Path) -> None:
    """Makes names in `path` durable (a rename is only durable with its directory: fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def allocate(fd: int, offset: int, length: int) -> bool:
    """Owns the blocks of the range without changing the file's size; False when there is no room.

    fallocate(2) with FALLOC_FL_KEEP_SIZE, which Python does not offer; posix_fallocate(3) would write zeros
    where the file system cannot allocate. Raises OSError for anything but ENOSPC and EDQUOT, EOPNOTSUPP included.
    """
    while True:
        result = _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length))
        if result == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT):
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
