"""User namespaces that this process makes ahead for cells: blocks of ids, and the mapping of layers.

A namespace lives as long as a descriptor of it. Its maps are written from outside by this process, which may (root
or, in a user namespace, its root): user_namespaces(7). A block serves one cell at a time, so its namespace is kept
for the next; mounts that belong to our own user namespace cannot be undone from inside it.
"""

from __future__ import annotations

import os
import signal
from typing import Final

from aether.contract.cellplan import IdMap
from aether.spawner.linux import kernel
from aether.spawner.linux.executor import LaunchError
from aether.spawner.linux.program import NO_ID, Program
from aether.spawner.linux.remedies import remedy

KEPT_MAX: Final = 1024
Extents = tuple[tuple[int, int, int], ...]
"""Lines of inside, outside, length."""


class Blocks:
    """The namespaces of id blocks, kept by block; the oldest goes first."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, int], int] = {}

    def of(self, program: Program) -> int | None:
        """The namespace that `program` joins, None if it joins none; ours to close. Raises LaunchError."""
        return self.make(program.ids) if program.join_userns else None

    def make(self, ids: IdMap) -> int:
        """The namespace of the block `ids`; ours to close. Raises LaunchError."""
        key = (ids.host_uid, ids.host_gid, ids.count)
        if key not in self._kept:
            fd = _make(ids.extents(ids.host_uid, ids.job_uid), ids.extents(ids.host_gid, ids.job_gid))
            if len(self._kept) >= KEPT_MAX:
                os.close(self._kept.pop(next(iter(self._kept))))
            self._kept[key] = fd
        return self._kept[key]

    def close(self) -> None:
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()


def of_layers(program: Program) -> int | None:
    """For mount_setattr(2), MOUNT_ATTR_IDMAP: ids of the file system are "inside", those that are seen "host".

    None without mapped layers. The caller closes it. Raises LaunchError.
    """
    if NO_ID in program.layer_owner:
        return None
    uids, gids = (((owner, seen, 1),) for owner, seen in zip(program.layer_owner, program.ids.job_host, strict=True))
    return _make(uids, gids)


def _make(uids: Extents, gids: Extents) -> int:
    """A user namespace with these maps."""
    try:
        pid = kernel.clone(kernel.CLONE_NEWUSER, None)
        if pid == 0:
            signal.pause()
            os._exit(0)
        try:
            for name, extents in (("uid_map", uids), ("gid_map", gids)):
                with open(f"/proc/{pid}/{name}", "w") as f:
                    f.write("".join(f"{inside} {outside} {length}\n" for inside, outside, length in extents))
            return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    except OSError as error:
        code = error.errno or 0
        raise LaunchError("user namespace", code, remedy("user namespace", code)) from error
