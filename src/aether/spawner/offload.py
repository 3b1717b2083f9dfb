"""Long file work in a forked child, so that the one loop of the spawner never waits for a disk.

The spawner has a single thread, so fork is safe. The child keeps nothing but the descriptors it needs, dies with
the spawner (PDEATHSIG), writes its answer as JSON to a memfd and leaves. The answer travels to the client as that
descriptor; the spawner never parses it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_PR_SET_PDEATHSIG = 1
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 0x1, 0x2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Offloaded:
    """A running child: readable `pidfd` means it ended; `answer` then holds JSON."""

    pid: int
    pidfd: int
    answer: int

    def finish(self) -> bool:
        """Reap; True when the child succeeded. Closes the pidfd; `answer` stays the caller's."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status) == 0


def json_memfd(value: Any) -> int:
    """A memfd that holds `value` as JSON, positioned at its start."""
    fd = os.memfd_create("aether-answer", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    _write_all(fd, json.dumps(value).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def offload(work: Callable[[], Any], keep: tuple[int, ...] = ()) -> Offloaded:
    """Run `work` in a child with only the descriptors in `keep`; its value or `{"error": text}` is the answer."""
    answer = os.memfd_create("aether-answer", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _isolate(parent, (*keep, answer))
            _write_all(answer, json.dumps(work()).encode())
            os.lseek(answer, 0, os.SEEK_SET)
            status = 0
        except BaseException as error:
            os.ftruncate(answer, 0)
            os.lseek(answer, 0, os.SEEK_SET)
            _write_all(answer, json.dumps({"error": str(error)}).encode())
            os.lseek(answer, 0, os.SEEK_SET)
        finally:
            os._exit(status)
    return Offloaded(pid, os.pidfd_open(pid), answer)


def _isolate(parent: int, keep: tuple[int, ...]) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the spawner died before prctl
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    low = 3
    for fd in sorted(set(keep)):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
