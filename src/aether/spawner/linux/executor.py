"""The executor protocol: a validated plan becomes a running cell whose PID 1 is our init.

Two executors do the same work and pass one conformance suite: `native.NativeExecutor` (a resident static C
launcher) and `portable.PortableExecutor` (Python and ctypes, the reference and the fallback).

Lifetimes
- PID 1 of a cell is a child of the calling process, which must be single-threaded (PDEATHSIG follows the
  thread) and must reap it through `Launched.pidfd`.
- `Launched.control` is a SOCK_SEQPACKET socket to PID 1. It carries the messages of `initwire`. The first
  event is `Ready` or `StepFailed`; closing the socket ends PID 1 and with it the pid namespace.
- PID 1 stays when its executables have ended, until `Shutdown`, the end of the socket, or SIGKILL.
- The caller owns every descriptor that it passes and may close it as soon as `launch` or `start` returns.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from aether.contract.cellplan import ExecSpec, Plan, PlanError
from aether.spawner.linux.program import LAYER_MAPPED, OP_LAYER, HostFacts, Op, Program, lower


class LaunchError(Exception):
    """A cell that could not be started. `step` names the operation, `errno` the kernel's answer (0 if none)."""

    def __init__(self, step: str, errno: int, remedy: str) -> None:
        why = os.strerror(errno) if errno else "refused"
        super().__init__(f"cannot start cell: {step}: {why}")
        self.step = step
        self.errno = errno
        self.remedy = remedy


def lower_plan(plan: Plan, roots: Sequence[str], facts: HostFacts) -> Program:
    """program.lower, with a plan that this kernel cannot carry out as LaunchError."""
    try:
        program = lower(plan, roots, facts)
    except PlanError as error:
        raise LaunchError(error.field, 0, f"{error.why}: leave it out of the plan") from error
    mapped = [op for op in program.ops if op.kind == OP_LAYER and op.flags & LAYER_MAPPED]
    return replace(program, layer_owner=_owner(mapped)) if mapped else program


def _owner(layers: Sequence[Op]) -> tuple[int, int]:
    """Who owns the directories of layers that the job shall own in its cell: one owner for all."""
    try:
        found = {(about.st_uid, about.st_gid) for about in (os.lstat(f"{op.text}/{op.text2}") for op in layers)}
    except OSError as error:
        raise LaunchError("layers", error.errno or 0, "the image is not unpacked here: import it again") from error
    if len(found) != 1:
        raise LaunchError("layers", 0, "layers of one cell must belong to one user")
    return found.pop()


@dataclass(frozen=True, slots=True)
class Attach:
    """Where PID 1 attaches itself before anything else.

    `write_zero`: descriptors of v1 `tasks` or v2 `cgroup.procs` files, opened for writing; the child writes "0"
    itself, because the write of a foreign pid waits for an RCU grace period (6 ms).
    `cgroup2_dir`: a v2 directory for CLONE_INTO_CGROUP, or None.
    """

    write_zero: Sequence[int] = field(default=())
    cgroup2_dir: int | None = None


@dataclass(frozen=True, slots=True)
class Launched:
    """A cell under way: the caller owns `pidfd` and `control` (non-blocking) and closes them."""

    pid: int
    pidfd: int
    control: socket.socket


class Executor(Protocol):
    """Starts cells from validated plans."""

    @property
    def name(self) -> str:
        """`native` or `portable`, for reports."""
        ...

    def launch(
        self,
        plan: Plan,
        attach: Attach,
        first_exec: ExecSpec | None = None,
        fds: Sequence[int] = (),
    ) -> Launched:
        """Start PID 1 of `plan`; with `first_exec`, its first executable travels along with `fds`.

        `fds` are the descriptors of `first_exec` in order: one per "fd" of stdio, then the extra ones. Returns
        when PID 1 exists; what follows arrives as events on the control socket. Raises LaunchError.
        """
        ...

    def pids(self) -> frozenset[int]:
        """Children of this process that belong to the executor itself, not to a cell."""
        ...

    def close(self) -> None:
        """Release what the executor itself holds; running cells are not touched."""
        ...
