"""PID 1 of a portable cell: starts executables on request, reports how they end, reaps everything else.

The twin of native/exec.c, where the reasons are. Only this process holds the control socket.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from aether.contract.cellplan import ExecSpec, Rlimit
from aether.spawner.linux import confine, initwire, kernel
from aether.spawner.linux.program import RESOURCES, Program

EXECUTABLES_MAX: Final = 32
_HIGH: Final = 128
_REPORT: Final = struct.Struct("<14IQ")  # step, errno, and what `encode_started` takes
_PR_GET_DUMPABLE, _PR_GET_SECCOMP, _PR_CAPBSET_READ, _PR_GET_NO_NEW_PRIVS = 3, 21, 23, 39


@dataclass(slots=True)
class _Executable:
    exec_id: str
    pipe: int


class Reaper:
    def __init__(self, program: Program, control: socket.socket, started_us: int) -> None:
        self._program = program
        self._control = control
        self._started_us = started_us
        self._live: dict[int, _Executable] = {}

    def serve(self, first: ExecSpec | None, fds: Sequence[int]) -> NoReturn:
        """Until the spawner says so or goes away; then the process ends, and the namespace with it."""
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for signo in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
            signal.signal(signo, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        if first is not None:
            self._start(first, fds)
        for fd in fds:
            os.close(fd)
        self._send_ready()
        while True:
            pipes = {e.pipe: pid for pid, e in self._live.items() if e.pipe >= 0}
            ready = select.select([self._control.fileno(), wake_read, *pipes], [], [])[0]
            for fd in ready:
                if fd in pipes:
                    self._settle(pipes[fd])
            if wake_read in ready:
                os.read(wake_read, 4096)
                self._reap()
            if self._control.fileno() in ready:
                self._handle()

    def _send(self, message: bytes) -> None:
        try:
            initwire.send(self._control, message)
        except OSError:
            os._exit(0)

    def _send_ready(self) -> None:
        inodes = []
        for kind in initwire.NAMESPACE_KINDS:
            try:
                inodes.append(os.stat(f"/proc/self/ns/{kind}").st_ino)  # noqa: PTH116
            except OSError:
                inodes.append(0)
        abi = self._program.landlock.abi if self._program.landlock is not None else 0
        self._send(initwire.encode_ready(inodes, abi, time.monotonic_ns() // 1000 - self._started_us))

    def _start(self, spec: ExecSpec, fds: Sequence[int]) -> None:
        if len(self._live) >= EXECUTABLES_MAX or len(fds) != spec.fd_count:
            step, code = ("fork", errno.EAGAIN) if len(fds) == spec.fd_count else ("descriptors", errno.EINVAL)
            self._send(initwire.encode_exec_failed(spec.exec_id, step, code))
            return
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(read_end)
            os.close(write_end)
            self._send(initwire.encode_exec_failed(spec.exec_id, "fork", error.errno or 0))
            return
        if pid == 0:
            _become(self._program, spec, fds, write_end)
        os.close(write_end)
        self._live[pid] = _Executable(spec.exec_id, read_end)

    def _settle(self, pid: int) -> bool:
        """The executable runs (True), or it never will. Reading blocks until exec or the end: microseconds."""
        executable = self._live[pid]
        with open(executable.pipe, "rb") as f:
            data = f.read(2 * _REPORT.size)
        executable.pipe = -1
        reports = [_REPORT.unpack_from(data, at) for at in range(0, len(data), _REPORT.size)]
        failed = next((r for r in reports if r[1]), None)
        if failed is not None or not reports:
            step = initwire.EXEC_STEPS[failed[0]] if failed else "fork"
            self._send(initwire.encode_exec_failed(executable.exec_id, step, failed[1] if failed else errno.ECHILD))
            if self._live.pop(pid, None):
                os.waitpid(pid, 0)
            return False
        self._send(initwire.encode_started(executable.exec_id, pid, reports[0][2:]))
        return True

    def _reap(self) -> None:
        while True:
            try:
                # Peek first: a failed start reaps its own child.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            pid = info.si_pid
            executable = self._live.get(pid)
            if executable is not None and executable.pipe >= 0 and not self._settle(pid):
                continue
            _, status, usage = os.wait4(pid, 0)
            if self._live.pop(pid, None) is None or executable is None:
                continue
            code = os.waitstatus_to_exitcode(status)
            times = (int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6), usage.ru_maxrss)
            self._send(initwire.encode_exited(executable.exec_id, code, times))

    def _handle(self) -> None:
        try:
            request, fds = initwire.receive_request(self._control)
        except (OSError, initwire.WireError):
            request, fds = None, []
        if isinstance(request, ExecSpec):
            self._start(request, fds)
        elif isinstance(request, initwire.Signal):
            self._signal(request)
        else:
            self._end()
        for fd in fds:
            os.close(fd)

    def _signal(self, request: initwire.Signal) -> None:
        for pid, executable in self._live.items():
            if executable.exec_id == request.exec_id:
                _signal_group(pid, request.signo)

    def _end(self) -> NoReturn:
        if not self._program.clone_flags & kernel.CLONE_NEWPID:
            for pid in self._live:
                _signal_group(pid, signal.SIGKILL)
        os._exit(0)


def _signal_group(pid: int, signo: int) -> None:
    for send in (os.killpg, os.kill):
        try:
            send(pid, signo)
        except OSError:  # before its setsid there is no such group
            continue
        return


def _become(program: Program, spec: ExecSpec, fds: Sequence[int], pipe: int) -> NoReturn:
    """In the executable's process: never returns."""
    step = "session"
    try:
        os.setsid()
        step = "stdio"
        pipe = _place(spec, fds, pipe)
        if spec.tty:
            step = "terminal"
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        step = "rlimits"
        _limit((*program.rlimits, *spec.rlimits))
        step = "ids"
        ids = program.ids
        if ids.count > 1:
            uid, gid = program.seen_ids(ids.job_uid, ids.job_gid)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        step = "capabilities"
        kernel.set_capabilities(0)
        if program.landlock is not None and program.per_exec_landlock:
            step = "landlock"
            confine.apply_landlock(program.landlock)
        step = "cwd"
        os.chdir(spec.cwd)
        for signo in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(signo, signal.SIG_DFL)
        if not program.clone_flags & kernel.CLONE_NEWPID:
            kernel.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(pipe, _facts(program.last_cap))
        step = "exec"
        _run(spec)
    except OSError as error:
        os.write(pipe, _REPORT.pack(initwire.EXEC_STEPS.index(step), error.errno or 1, *[0] * 13))
    finally:
        os._exit(127)


def _place(spec: ExecSpec, fds: Sequence[int], pipe: int) -> int:
    """Descriptors to 0, 1, 2, 3, ... and the report pipe after them; everything else closed."""
    rest = iter(fds)
    pipe = fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, _HIGH)
    wanted = []
    for number in range(3 + spec.extra_fds):
        if number < 3 and spec.stdio[number] == "null":
            source = os.open("/dev/null", (os.O_WRONLY if number else os.O_RDONLY) | os.O_CLOEXEC)
        else:
            source = next(rest)
        wanted.append(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _HIGH))
    for number, source in enumerate(wanted):
        os.dup2(source, number, inheritable=True)
    last = len(wanted)
    os.dup2(pipe, last, inheritable=False)
    kernel.syscall("close_range", last + 1, 0xFFFFFFFF, 0)
    return last


def _limit(limits: Sequence[Rlimit]) -> None:
    for limit in limits:
        number = RESOURCES[limit.name]
        old = resource.getrlimit(number)[1]
        hard = min(limit.hard, old if old != resource.RLIM_INFINITY else 1 << 64)
        pair = [min(limit.soft, hard), hard]
        soft, hard = (v if v < (1 << 63) else resource.RLIM_INFINITY for v in pair)
        resource.setrlimit(number, (soft, hard))


def _facts(last_cap: int) -> bytes:
    import ctypes

    data = ctypes.create_string_buffer(24)
    header = struct.pack("<Ii", 0x20080522, 0)
    kernel.syscall("capget", header, data)
    bounding = sum(1 << c for c in range(last_cap + 1) if kernel.prctl(_PR_CAPBSET_READ, c) == 1)
    return _REPORT.pack(
        0, 0, os.geteuid(), os.getegid(), len(os.getgroups()), kernel.prctl(_PR_GET_NO_NEW_PRIVS),
        kernel.prctl(_PR_GET_SECCOMP), kernel.prctl(_PR_GET_DUMPABLE),
        *struct.unpack("<6I", data.raw), bounding,
    )  # fmt: skip


def _run(spec: ExecSpec) -> NoReturn:
    env = dict(spec.env)
    name = spec.argv[0]
    if "/" in name:
        os.execve(name, spec.argv, env)
    failure = OSError(errno.ENOENT, "not in PATH")
    for directory in env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":"):
        if not directory:
            continue
        try:
            os.execve(f"{directory}/{name}", spec.argv, env)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error
    raise failure
