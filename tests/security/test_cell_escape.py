"""Attempts to get out of a cell, harmless by construction: each would only show that a wall is missing.

Everything is tried inside a cell by a plain program; the expected answers are the kernel's own.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import secrets
import signal
import socket
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


def test_calls_checked_by_argument(host: Host) -> None:
    answers = inside(
        host,
        """
flags = (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x80)
sockets = [(1, 1, 0), (2, 1, 0), (10, 2, 0), (16, 3, 0), (16, 3, 9), (17, 3, 0), (38, 5, 0), (40, 1, 0)]
clone = {'x86_64': 56, 'aarch64': 220}[os.uname().machine]
unshare = {'x86_64': 272, 'aarch64': 97}[os.uname().machine]
print(json.dumps({
    'unshare': [call(unshare, f) for f in flags], 'files': call(unshare, 0x400),
    'clone': [call(clone, f | 17, 0, 0, 0, 0) for f in flags[:7]],
    'sockets': [told(lambda s=s: socket.socket(*s).close()) for s in sockets],
    'tiocsti': told(lambda: fcntl.ioctl(0, 0x5412, b'x')), 'tioclinux': told(lambda: fcntl.ioctl(0, 0x541C, b'x')),
    'prlimit': call({'x86_64': 302, 'aarch64': 261}[os.uname().machine], 1, 7, 0, 0), 'unknown': call(900),
}))""",
    )
    assert set(answers["unshare"]) == set(answers["clone"]) == {errno.EPERM}
    assert answers["files"] == 0
    assert answers["sockets"] == [0, 0, 0, 0] + [errno.EAFNOSUPPORT] * 4
    assert answers["tiocsti"] == answers["tioclinux"] == answers["prlimit"] == errno.EPERM
    assert answers["unknown"] == errno.ENOSYS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="foreign calls of x86-64")
def test_foreign_calls_kill(host: Host) -> None:
    code = """
def i386():
    import mmap
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex('b814000000cd80c3'))  # mov eax, getpid of i386; int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print(json.dumps([in_child(lambda: call(0x40000000 + 39)), in_child(i386)]))
"""
    assert inside(host, code) == [-signal.SIGSYS, -signal.SIGSYS]


def test_files_of_the_host_are_absent(host: Host, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (tmp_path, *list(tmp_path.parents)[:-2]):
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o055)
    places = [str(secret), "/etc/shadow", "/var/log", "/home", "/sys", "/proc/1/root", "/proc/1/cwd", "/proc/1/fd"]
    answers = inside(host, f"print(json.dumps([told(lambda p=p: os.stat(p) and os.listdir(p)) for p in {places!r}]))")
    assert answers[:5] == [errno.ENOENT] * 5
    assert set(answers[5:]) <= {errno.EACCES, errno.EPERM, errno.ENOENT}


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


def test_only_the_cells_own_processes_exist(host: Host) -> None:
    outsider = os.getpid()
    code = f"""
print(json.dumps([sorted(int(p) for p in os.listdir('/proc') if p.isdigit()), told(lambda: os.kill({outsider}, 0)),
    [len(open(p).read()) for p in ('/proc/kcore', '/proc/keys') if os.path.exists(p)]]))"""
    pids, killed, masked = inside(host, code)
    assert pids == [1, 2]
    assert killed == errno.ESRCH
    assert set(masked) <= {0}


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


def test_the_hosts_network_is_out_of_reach(host: Host) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        code = f"""
def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s: s.sendto(b'x', address)
def own():
    with socket.create_server(('127.0.0.1', 0)) as s: socket.create_connection(s.getsockname()).close()
print(json.dumps([told(lambda: socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 2)),
    told(lambda: send(('192.0.2.1', 9))), told(lambda: send(('127.0.0.1', {udp.getsockname()[1]}))), told(own)]))"""
        refused, unreachable, _, own = inside(host, code)
        assert refused == errno.ECONNREFUSED
        assert unreachable == errno.ENETUNREACH
        assert own == 0  # its own loopback works
        with pytest.raises(BlockingIOError):
            udp.recv(1)


def test_abstract_sockets_of_the_host_are_out_of_reach(host: Host) -> None:
    name = "\0aether-test-" + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        code = f"""
s = socket.socket(socket.AF_UNIX)
print(json.dumps(told(lambda: s.connect({name!r}))))"""
        assert inside(host, code) in (errno.ECONNREFUSED, errno.EPERM)


def test_setuid_programs_gain_nothing(host: Host) -> None:
    code = """
found = [p for p in ('/usr/bin/passwd', '/usr/bin/su', '/usr/bin/mount', '/usr/bin/chsh') if os.path.exists(p)]
nosuid = all(os.statvfs(p).f_flag & os.ST_NOSUID for p in [*found, '/work', '/tmp', '/dev/shm'])
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps([nosuid, status['NoNewPrivs'].strip(), status['CapBnd'].strip(), told(lambda: os.setuid(0)),
    told(lambda: os.chown('/work', 0, 0)), told(lambda: os.setgroups([0]))]))"""
    nosuid, no_new_privs, bounding, *denied = inside(host, code)
    assert nosuid
    assert (no_new_privs, int(bounding, 16)) == ("1", 0)
    assert set(denied) <= {errno.EPERM, errno.EINVAL}


def test_descriptors_of_the_spawner_are_not_inherited(host: Host) -> None:
    code = "print(json.dumps([n for n in range(3, 2048) if told(lambda: os.fstat(n)) == 0]))"
    assert inside(host, code) == []


def test_mounts_show_no_path_of_the_host(host: Host, directory: str) -> None:
    code = "print(json.dumps(open('/proc/self/mountinfo').read()))"
    table = inside(host, code)
    assert directory not in table
    roots = [line.split()[4] for line in table.splitlines()]
    assert roots[0] == "/"
    assert all("nosuid" in line.split()[5].split(",") for line in table.splitlines())


def test_ordinary_work_still_works(host: Host) -> None:
    code = """
import asyncio, multiprocessing, sqlite3, subprocess, tempfile, threading
async def main():
    server = await asyncio.start_unix_server(lambda r, w: w.close(), '/work/s')
    reader, writer = await asyncio.open_unix_connection('/work/s')
    await reader.read()
    process = await asyncio.create_subprocess_exec('true')
    return await process.wait()
db = sqlite3.connect('/work/db'); db.execute('pragma journal_mode=wal'); db.execute('create table t (x)'); db.commit()
thread = threading.Thread(target=lambda: None); thread.start(); thread.join()
shared = multiprocessing.Value('i', 3)
print(json.dumps([asyncio.run(main()), subprocess.run(['sh', '-c', 'exit 4']).returncode, shared.value,
    socket.if_nameindex()[0][1], os.sysconf('SC_NPROCESSORS_ONLN') > 0]))"""
    assert inside(host, code) == [0, 4, 3, "lo", True]


def test_git_and_node_work(host: Host) -> None:
    script = "git init -q /work/r && cd /work/r && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x"
    if Path("/usr/bin/git").exists():
        assert host.run(["sh", "-c", script]).of("Exited")["code"] == 0
    if Path("/usr/bin/node").exists():
        program = "require('os').networkInterfaces(); require('http').createServer().listen(0, () => process.exit(5))"
        assert host.run(["node", "-e", program]).of("Exited")["code"] == 5


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
