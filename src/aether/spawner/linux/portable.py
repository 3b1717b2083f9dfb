"""The portable executor: the same program in Python and ctypes. The reference, and the fallback without a compiler.

PID 1 is a fork of this process (about a millisecond), so it must be single-threaded. Everything after the fork
runs in the child and ends in `os._exit`; the order of operations is that of native/cell.c, where the reasons are.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import NoReturn

from aether.contract.cellplan import ExecSpec, Plan
from aether.spawner.linux import confine, initwire, kernel, mounts, program
from aether.spawner.linux.executor import Attach, Launched, LaunchError, lower_plan
from aether.spawner.linux.reaper import Reaper
from aether.spawner.linux.remedies import remedy
from aether.spawner.linux.userns import Blocks, of_layers


class PortableExecutor:
    """See executor.Executor."""

    name = "portable"

    def __init__(self, source_roots: Sequence[str], blocks: Blocks | None = None) -> None:
        self._roots = tuple(source_roots)
        self._facts = program.host_facts()
        self._blocks = blocks or Blocks()

    def pids(self) -> frozenset[int]:
        return frozenset()

    def launch(
        self, plan: Plan, attach: Attach, first_exec: ExecSpec | None = None, fds: Sequence[int] = ()
    ) -> Launched:
        if len(fds) != (first_exec.fd_count if first_exec else 0):
            raise LaunchError("descriptors", 0, "pass one descriptor per entry of the specification")
        lowered = lower_plan(plan, self._roots, self._facts)
        userns, layers = self._blocks.of(lowered), of_layers(lowered)
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

    def close(self) -> None:
        self._blocks.close()


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
        reaper = Reaper(lowered, control, started_us)
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
