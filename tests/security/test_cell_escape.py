"""Walls that take a cell of their own to try: PID 1, every refused call, what the host reads afterwards.

What one probe can try in one cell is in `escape/`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.spawner.linux import seccomp
from tests.support import cells
from tests.support.cells import Host

PRELUDE = """
import ctypes, errno, fcntl, json, os, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    return ctypes.get_errno() if result < 0 else 0
def told(action):
    try: action()
    except OSError as error: return error.errno
    return 0
def in_child(action):
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(params=cells.variants())
def host(request: pytest.FixtureRequest, directory: str) -> Host:
    return cells.open_host(*request.param, directory)


def inside(host: Host, code: str, **request: Any) -> Any:
    return host.python(PRELUDE + code, **request).json()


def test_refused_calls_answer_as_reviewed(host: Host) -> None:
    arch = platform.machine()
    numbers = {
        name: getattr(entry, arch) for name, entry in seccomp.REFUSED.items() if getattr(entry, arch) is not None
    }
    answers = inside(
        host, f"numbers = {numbers!r}\nprint(json.dumps({{n: call(k, 0, 0, 0, 0, 0, 0) for n, k in numbers.items()}}))"
    )
    assert answers == {name: seccomp.REFUSED[name].errno for name in numbers}


def test_nothing_outside_work_and_tmp_is_writable(host: Host) -> None:
    answers = inside(
        host,
        """
places = ['/x', '/usr/x', '/etc/x', '/dev/x', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/bin/x', '/run/x']
tried = {p: told(lambda p=p: open(p, 'w')) for p in places}
tried['/work/x'] = told(lambda: open('/work/x', 'w')); tried['/tmp/x'] = told(lambda: open('/tmp/x', 'w'))
tried['/dev/shm/x'] = told(lambda: open('/dev/shm/x', 'w')); tried['/dev/null'] = told(lambda: open('/dev/null', 'w'))
tried['node'] = told(lambda: os.mknod('/work/node', 0o20666, os.makedev(1, 5)))
print(json.dumps(tried))""",
    )
    for path in ("/work/x", "/tmp/x", "/dev/shm/x", "/dev/null"):
        assert answers.pop(path) == 0, path
    assert set(answers.values()) <= {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}, answers


def test_pid_1_is_out_of_reach(host: Host) -> None:
    code = """
ptrace = {'x86_64': 101, 'aarch64': 117}[os.uname().machine]
for s in range(1, 65):
    told(lambda: os.kill(1, s))
told(lambda: os.kill(-1, 9))
print(json.dumps([call(ptrace, 16, 1, 0, 0), told(lambda: open('/proc/1/mem', 'r+b')),
    told(lambda: open('/proc/1/environ', 'rb').read()), told(lambda: os.listdir('/proc/1/fd')),
    told(lambda: open('/proc/1/oom_score_adj', 'w').write('1000'))]))
sys.stdout.flush()
os._exit(0)
"""
    result = host.python(PRELUDE + code, actions=[["wait", "first"], ["exec", "after", ["true"]], ["wait", "after"]])
    assert not {0} & set(json.loads(result.out)), "PID 1 can be traced, read or changed"
    assert result.of("Exited", "after")["code"] == 0


def test_a_job_that_kills_everything_reports_its_own_death(host: Host) -> None:
    code = "told(lambda: os.kill(-1, 9)); os.kill(os.getpid(), signal.SIGKILL)"
    ended = host.python(PRELUDE + code).of("Exited")
    assert ended["signal"] == signal.SIGKILL


def test_links_left_in_a_work_directory_lead_nowhere(host: Host, tmp_path: Path) -> None:
    """A mount point below a writable bind is resolved without following what an earlier job left there."""
    if host.user and os.geteuid() == 0:
        pytest.skip("the directory belongs to root")
    work = tmp_path / "work"
    work.mkdir()
    (work / "link").symlink_to("/usr")
    steps = [
        {"op": "bind_rw", "path": "/data", "source": str(work)},
        {"op": "tmpfs", "path": "/data/link/bin", "size_bytes": 4096},
    ]
    result = host.run(["true"], steps=steps, roots=[str(tmp_path)], actions=[])
    assert result.of("StepFailed")["errno"] == errno.ELOOP


def test_a_source_that_leaves_its_root_is_refused(host: Host, tmp_path: Path) -> None:
    if host.user and os.geteuid() == 0:
        pytest.skip("the directory belongs to root")
    (tmp_path / "out").symlink_to("/etc")
    steps = [{"op": "bind_ro", "path": "/data", "source": str(tmp_path / "out")}]
    result = host.run(["true"], steps=steps, roots=[str(tmp_path)], actions=[])
    assert result.of("StepFailed")["errno"] == errno.EXDEV


def test_no_process_is_left(host: Host) -> None:
    mark = "77." + str(secrets.randbelow(10**6))
    host.run(["sh", "-c", f"setsid sleep {mark} & exit 0"])
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"sleep {mark}" not in found


assert ctypes.sizeof(ctypes.c_long) == 8, "system calls are passed as 64-bit longs"
