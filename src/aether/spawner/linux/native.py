"""The native executor: a resident launcher (`native/aether-init`) clones cells with this process as parent.

The launcher starts with the first cell and is replaced when it dies; cells do not depend on it. It is a child of
this process: whoever reaps or kills children must leave those of `pids` alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aether.contract.cellplan import ExecSpec, Plan
from aether.spawner.linux import initwire, program
from aether.spawner.linux.executor import Attach, Launched, LaunchError, lower_plan
from aether.spawner.linux.remedies import remedy
from aether.spawner.linux.userns import Blocks, of_layers

BINARY: Final = Path(__file__).resolve().parent.parent / "native" / "aether-init"
ANSWER_TIMEOUT_S: Final = 10.0
_SOCKET_FD: Final = 3


class NativeExecutor:
    """See executor.Executor. Raises FileNotFoundError when the binary has not been built."""

    name = "native"

    def __init__(self, source_roots: Sequence[str], blocks: Blocks | None = None, binary: Path = BINARY) -> None:
        if not os.access(binary, os.X_OK):
            raise FileNotFoundError(f"cannot use native executor: {binary} is missing")
        self._roots = tuple(source_roots)
        self._binary = str(binary)
        self._facts = program.host_facts()
        self._blocks = blocks or Blocks()
        self._socket: socket.socket | None = None
        self.launcher_pid = 0

    def pids(self) -> frozenset[int]:
        return frozenset({self.launcher_pid} if self.launcher_pid else ())

    def launch(
        self, plan: Plan, attach: Attach, first_exec: ExecSpec | None = None, fds: Sequence[int] = ()
    ) -> Launched:
        if len(fds) != (first_exec.fd_count if first_exec else 0):
            raise LaunchError("descriptors", 0, "pass one descriptor per entry of the specification")
        started_us = time.monotonic_ns() // 1000
        lowered = lower_plan(plan, self._roots, self._facts)
        cgroup2 = attach.cgroup2_dir is not None
        try:
            message = initwire.encode_launch(lowered, started_us, len(attach.write_zero), cgroup2, first_exec)
        except initwire.WireError as error:
            raise LaunchError("program", errno.E2BIG, "use fewer steps, or shorter arguments") from error
        userns, layers = self._blocks.of(lowered), of_layers(lowered)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            optional = [fd for fd in (attach.cgroup2_dir, userns, layers) if fd is not None]
            answer = self._call(message, [theirs.fileno(), *optional, *attach.write_zero, *fds])
            pid, phase, code = initwire.decode_launched(answer)
            if pid <= 0:
                name = initwire.phase_of(phase)[1]
                raise LaunchError(name, code, remedy(name, code))
            ours.setblocking(False)
            # No race: nobody but this process reaps the child.
            return Launched(pid, os.pidfd_open(pid), ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if layers is not None:
                os.close(layers)

    def _call(self, message: bytes, fds: Sequence[int]) -> bytes:
        for attempt in (1, 2):
            sock = self._socket or self._start_launcher()
            try:
                initwire.send(sock, message, fds)
                answer = sock.recv(initwire.MESSAGE_BYTES_MAX)
            except TimeoutError:
                self._end_launcher()
                why = "the launcher did not answer; see whether the host is overloaded"
                raise LaunchError("launcher", 0, why) from None
            except (BrokenPipeError, ConnectionResetError):
                answer = b""
            if answer:
                return answer
            self._end_launcher()
            if attempt == 2:
                break
        raise LaunchError("launcher", 0, f"{self._binary} ended at once: run it by hand to see why")

    def _start_launcher(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            actions = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)]
            # Duplicated first: it could itself be number 3, and dup2 onto itself keeps close-on-exec.
            high = os.dup(theirs.fileno())
            spare = os.dup(high)
            try:
                moved = spare if high == _SOCKET_FD else high
                self.launcher_pid = os.posix_spawn(
                    self._binary,
                    ["aether-init", str(_SOCKET_FD)],  # what a cell sees as the command line of PID 1
                    {},
                    file_actions=[*actions, (os.POSIX_SPAWN_DUP2, moved, _SOCKET_FD)],
                    setsigmask=(),
                    # What whoever started us ignores (nohup, a shell's background) no job could ever catch.
                    setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
                )
            finally:
                os.close(high)
                os.close(spare)
        ours.settimeout(ANSWER_TIMEOUT_S)
        self._socket = ours
        return ours

    def close(self) -> None:
        self._blocks.close()
        self._end_launcher()

    def _end_launcher(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.launcher_pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.launcher_pid, signal.SIGKILL)
                os.waitpid(self.launcher_pid, 0)
            self.launcher_pid = 0
