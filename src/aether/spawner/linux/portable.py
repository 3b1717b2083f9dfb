"""The portable executor: the same program in Python and ctypes. The reference, and the fallback without a compiler.

PID 1 is a fork of this process (about a millisecond), so it must be single-threaded. Everything after the fork
runs in the child and ends in `os._exit`; the order of operations is that of native/cell.c, where the reasons are.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import NoReturn

from aether.contract.cellplan import ExecSpec, Plan
from aether.spawner.linux import confine, initwire, kernel, mounts, program
from aether.spawner.linux.executor import Attach, Launched, LaunchError, lower_plan
from aether.spawner.linux.reaper import Reaper
from aether.spawner.linux.remedies import remedy

USERNS_KEPT = 64


class PortableExecutor:
    """See executor.Executor."""

    name = "portable"

    def __init__(self, source_roots: Sequence[str]) -> None:
        self._roots = tuple(source_roots)
        self._facts = program.host_facts()
        self._kept: dict[tuple[int, int, int], int] = {}

    def pids(self) -> frozenset[int]:
        return frozenset()

    def launch(
        self, plan: Plan, attach: Attach, first_exec: ExecSpec | None = None, fds: Sequence[int] = ()
    ) -> Launched:
        if len(fds) != (first_exec.fd_count if first_exec else 0):
            raise LaunchError("descriptors", 0, "pass one descriptor per entry of the specification")
        lowered = lower_plan(plan, self._roots, self._facts)
        userns = self._userns(lowered) if lowered.join_userns else None
        layers = layers_userns(lowered)
        started_us = time.monotonic_ns() // 1000
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = kernel.clone(lowered.clone_flags, attach.cgroup2_dir)
        except OSError as error:
            ours.close()
            theirs.close()
            raise LaunchError("clone", error.errno or 0, remedy("clone", error.errno or 0)) from error
        if pid == 0:
            _become_init(lowered, theirs, (userns, layers), attach.write_zero, first_exec, fds, started_us)
        theirs.close()
        if layers is not None:
            os.close(layers)
        ours.setblocking(False)
        return Launched(pid, os.pidfd_open(pid), ours)

    def _userns(self, lowered: program.Program) -> int:
        """A user namespace with the block mapped; kept, because a block serves one cell at a time."""
        ids = lowered.ids
        key = (ids.host_uid, ids.host_gid, ids.count)
        if key in self._kept:
            return self._kept[key]
        try:
            fd = _make_userns((0, 0), key[:2], key[2])
        except OSError as error:
            raise _no_userns(error) from error
        if len(self._kept) >= USERNS_KEPT:
            os.close(self._kept.pop(next(iter(self._kept))))
        self._kept[key] = fd
        return fd

    def close(self) -> None:
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()


def _no_userns(error: OSError) -> LaunchError:
    code = error.errno or 0
    return LaunchError("user namespace", code, remedy("user namespace", code))


def layers_userns(lowered: program.Program) -> int | None:
    """For mount_setattr(2), MOUNT_ATTR_IDMAP: ids of the file system are "inside", those that are seen "host"."""
    if program.NO_ID in lowered.layer_owner:
        return None
    ids = lowered.ids
    try:
        return _make_userns(lowered.layer_owner, (ids.host_uid + ids.job_uid, ids.host_gid + ids.job_gid), 1)
    except OSError as error:
        raise _no_userns(error) from error


def _make_userns(inside: tuple[int, int], host: tuple[int, int], count: int) -> int:
    """A user namespace with `count` uids and gids mapped from `inside` on to `host` on."""
    pid = kernel.clone(kernel.CLONE_NEWUSER, None)
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        for i, name in enumerate(("uid_map", "gid_map")):
            with open(f"/proc/{pid}/{name}", "w") as f:
                f.write(f"{inside[i]} {host[i]} {count}")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become_init(
    lowered: program.Program,
    control: socket.socket,
    namespaces: tuple[int | None, int | None],
    write_zero: Sequence[int],
    first_exec: ExecSpec | None,
    fds: Sequence[int],
    started_us: int,
) -> NoReturn:
    """In the child: never returns, whatever is raised."""
    phase: list[int] = [initwire.phase_number("program")]
    try:
        kept = _own_descriptors(control, namespaces, write_zero, fds)
        control = socket.socket(fileno=kept.control)
        confine.enter_namespaces(lowered, kept.write_zero, phase)
        if lowered.unshare_flags & kernel.CLONE_NEWNS:
            mounts.build_root(lowered.ops, kept.layers, phase)
        os.setsid()
        confine.drop_privilege(lowered, kept.userns, phase)
        confine.restrict(lowered, phase)
        reaper = Reaper(lowered, control, kept.userns is not None, started_us)
        reaper.serve(first_exec, kept.fds)
    except OSError as error:
        with contextlib.suppress(OSError):
            initwire.send(control, initwire.encode_step_failed(phase[0], error.errno or 0))
    finally:
        os._exit(1)


class _Kept:
    """The descriptors of a cell, all others closed. `userns` is to be joined, `layers` maps layers of its root."""

    def __init__(
        self, control: int, userns: int | None, layers: int | None, write_zero: list[int], fds: list[int]
    ) -> None:
        self.control, self.userns, self.layers = control, userns, layers
        self.write_zero, self.fds = write_zero, fds


def _own_descriptors(
    control: socket.socket, namespaces: tuple[int | None, int | None], write_zero: Sequence[int], fds: Sequence[int]
) -> _Kept:
    """A fork has every descriptor of the spawner: those of the cell move up together, the rest is closed."""
    wanted = [control.detach(), *(fd for fd in namespaces if fd is not None), *write_zero, *fds]
    first = 1000
    with contextlib.suppress(OSError):
        first = min(first, max(64, os.sysconf("SC_OPEN_MAX") // 2))
    import fcntl

    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first) for fd in wanted]
    kernel.syscall("close_range", 3, min(moved) - 1, 0)
    kernel.syscall("close_range", max(moved) + 1, 0xFFFFFFFF, 0)
    rest = iter(moved)
    own_control = next(rest)
    userns, layers = (next(rest) if fd is not None else None for fd in namespaces)
    zero = [next(rest) for _ in write_zero]
    return _Kept(own_control, userns, layers, zero, list(rest))
