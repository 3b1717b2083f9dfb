"""Opening paths that a cell may have shaped: openat2(2) below a descriptor, never through a symbolic link.

Every step is resolved by the kernel with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS |
RESOLVE_NO_XDEV, so no rename or swap during the walk leads out of the directory.
"""

from __future__ import annotations

import ctypes
import os
import struct

_SYS_OPENAT2 = 437
_RESOLVE = 0x01 | 0x02 | 0x04 | 0x08  # NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH
_HOW = struct.Struct("<QQQ")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PATH_BYTES_MAX = 1024
NAME_BYTES_MAX = 255


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """A close-on-exec descriptor of `path` below `directory`; raises OSError."""
    raw = os.fsencode(path)
    how = _HOW.pack(flags | os.O_CLOEXEC, mode, _RESOLVE)
    while True:
        fd = _libc.syscall(ctypes.c_long(_SYS_OPENAT2), ctypes.c_long(directory), raw, how, ctypes.c_long(_HOW.size))
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code not in (4, 11):  # EINTR; EAGAIN: a rename raced with the lookup of `..` (openat2(2))
            raise OSError(code, os.strerror(code), path)


def safe_path(path: str) -> bool:
    """Whether `path` is a plain relative path: UTF-8, no empty, `.` or `..` parts, no control characters."""
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return False
    parts = path.split("/")
    return 0 < len(raw) <= PATH_BYTES_MAX and all(
        part not in ("", ".", "..")
        and len(part.encode()) <= NAME_BYTES_MAX
        and not any(ord(char) < 0x20 or ord(char) == 0x7F for char in part)
        for part in parts
    )
