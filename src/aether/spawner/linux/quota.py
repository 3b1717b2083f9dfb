"""Project quotas: the kernel's own bound on a directory tree, where its file system has them switched on.

A directory gets a project id that everything made in it inherits (ioctl_xfs_fsgetxattr(2); ext4 takes the same call),
and the id gets hard limits on blocks and inodes; above them writes fail with EDQUOT. Only the initial user namespace
may change an id (fs/ioctl.c, fileattr_set_prepare), so a job in its own cannot leave its project. quotactl_fd(2),
Linux 5.14, names the file system by a descriptor; without it, and where quotas are not enforced, there is none here.
"""

from __future__ import annotations

import ctypes
import fcntl
import struct
from typing import Final

from aether.spawner.linux import kernel

_PROJECT: Final = 2
_Q_GETQUOTA, _Q_SETQUOTA, _Q_XGETQSTATV = 0x800007, 0x800008, 0x5808
_ENFORCED: Final = 1 << 5
"""FS_QUOTA_PDQ_ENFD of linux/dqblk_xfs.h."""
_BLOCK_BYTES: Final = 1024
"""QIF_DQBLKSIZE: the unit of limits; use is told in bytes."""
_DQBLK: Final = struct.Struct("=8QI4x")
_LIMITS_VALID: Final = 1 | 4
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_FSXATTR: Final = struct.Struct("=5I8x")
_PROJECT_INHERITED: Final = 0x200


def enforced(directory: int) -> bool:
    """Whether the file system of `directory` enforces project quotas."""
    answer = ctypes.create_string_buffer(b"\x01", 512)  # struct fs_quota_statv, version 1
    try:
        _quotactl(directory, _Q_XGETQSTATV, 0, answer)
    except OSError:
        return False
    flags: int = struct.unpack_from("=H", answer.raw, 2)[0]
    return bool(flags & _ENFORCED)


def assign(directory: int, project: int) -> None:
    """An empty directory and all that will be made in it belong to `project`; raises OSError."""
    flags, extent, extents, _, copied = _FSXATTR.unpack(fcntl.ioctl(directory, _FSGETXATTR, bytes(_FSXATTR.size)))
    new = _FSXATTR.pack(flags | _PROJECT_INHERITED, extent, extents, project, copied)
    fcntl.ioctl(directory, _FSSETXATTR, new)


def limit(directory: int, project: int, bytes_max: int, inodes_max: int) -> None:
    """Bound a project on the file system of `directory`; 0 is no bound. Raises OSError."""
    blocks = -(-bytes_max // _BLOCK_BYTES)
    wanted = _DQBLK.pack(blocks, 0, 0, inodes_max, 0, 0, 0, 0, _LIMITS_VALID)
    _quotactl(directory, _Q_SETQUOTA, project, ctypes.create_string_buffer(wanted, _DQBLK.size))


def used(directory: int, project: int) -> int:
    """Bytes that a project holds; raises OSError."""
    answer = ctypes.create_string_buffer(_DQBLK.size)
    _quotactl(directory, _Q_GETQUOTA, project, answer)
    return int(_DQBLK.unpack(answer.raw)[2])


def _quotactl(directory: int, command: int, project: int, data: ctypes.Array[ctypes.c_char]) -> None:
    kernel.syscall("quotactl_fd", directory, command << 8 | _PROJECT, project, data)
