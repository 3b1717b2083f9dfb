"""The process level, where nothing but Landlock, seccomp, ids and rlimits stands between a job and the host."""

from __future__ import annotations

import errno
import json
import secrets
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import cells
from tests.support.cells import Host

CODE = """
import ctypes, json, os, socket, sys
facts = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def told(action, *args):
    try: action(*args)
    except OSError as error: return error.errno
    return 0
def call(number): return ctypes.get_errno() if libc.syscall(number, 0, 0, 0, 0, 0, 0) < 0 else 0
def connect(address): socket.socket(socket.AF_UNIX).connect(address)
numbers = {'x86_64': (101, 165, 321, 425), 'aarch64': (117, 40, 280, 425)}[os.uname().machine]
print(json.dumps({
    'read': [told(open, p) for p in (facts['secret'], '/etc/shadow', '/root/x', '/proc/1/environ')],
    'list': [told(os.listdir, p) for p in ('/', '/tmp', '/var', '/home')],
    'write': [told(os.open, p, os.O_WRONLY | os.O_CREAT) for p in ('/tmp/aether-x', '/dev/shm/aether-x', '/usr/x')],
    'sockets': [told(socket.socket, *s) for s in ((2, 1), (10, 2), (16, 3), (17, 3), (40, 1))],
    'abstract': told(connect, chr(0) + facts['abstract']), 'kill': told(os.kill, facts['outsider'], 0),
    'calls': [call(n) for n in numbers], 'unshare': ctypes.get_errno() if libc.unshare(0x10000000) < 0 else 0,
    'link': told(os.link, facts['secret'], '/tmp/aether-link'),
}))"""


@pytest.fixture(params=cells.variants())
def host(request: pytest.FixtureRequest, directory: str) -> Host:
    if cells.abi() < 6:
        pytest.skip(f"this kernel's Landlock (ABI {cells.abi()}) has no scopes: signals and abstract sockets get out")
    return cells.open_host(*request.param, directory)


@pytest.fixture
def answers(host: Host, planted: Path) -> Iterator[dict[str, Any]]:
    name = "aether-" + secrets.token_hex(8)
    outsider = subprocess.Popen(["sleep", "60"])
    facts = {"secret": str(planted / "secret"), "abstract": name, "outsider": outsider.pid}
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + name)
            listener.listen()
            yield host.run([cells.PYTHON, "-IS", "-c", CODE, json.dumps(facts)], level="process").json()
    finally:
        outsider.kill()
        outsider.wait()


def test_without_namespaces_the_walls_are_landlock_and_seccomp(answers: dict[str, Any]) -> None:
    assert set(answers["read"]) == set(answers["list"]) == set(answers["write"]) == {errno.EACCES}
    assert set(answers["sockets"]) == {errno.EAFNOSUPPORT}
    assert (answers["abstract"], answers["kill"]) == (errno.EPERM, errno.EPERM)
    assert set(answers["calls"]) == {errno.EPERM}
    assert answers["unshare"] == errno.EPERM
    assert answers["link"] in (errno.EACCES, errno.EPERM, errno.EXDEV)
