"""Cells by installed OCI runtimes: the same init, the same events, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.contract.cellplan import NAMESPACES
from aether.spawner.linux import oci
from tests.support import cells
from tests.support.cells import Host, Result
from tests.support.machine import SLOW

KINDS = ("runc", "crun", "runsc")
SHARED = tuple(name for name in NAMESPACES if name not in ("pid", "cgroup"))
"""Namespaces that all three make on the host: gVisor's kernel has its own processes and cgroups."""


class Runtime(Host):
    @property
    def is_sandbox(self) -> bool:
        return self.executor == "runsc"

    def start(self, argv: list[str], **request: Any) -> Result:
        return self.run(argv, **{"landlock": not self.is_sandbox, **request})


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest, directory: str) -> Runtime:
    found = oci.find_runtimes(os.environ)[request.param]
    if found.reason:
        pytest.skip(f"{found.reason}: {found.remedy}")
    cells.open_host("native", False, directory)
    return Runtime(request.param, False, directory)


def wait_gone(*pids: int) -> bool:
    end = time.monotonic() + 5 * SLOW
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_exit_code_output_and_usage(host: Runtime) -> None:
    result = host.start(["sh", "-c", "echo out; echo err >&2; exit 7"])
    ended = result.of("Exited")
    assert (ended["code"], ended["signal"], ended["maxrss_kb"] > 100) == (7, None, True)
    assert sorted(result.out.split()) == ["err", "out"]
    assert wait_gone(result.pid, result.of("Container")["pid"])


def test_what_the_kernel_shows_is_told(host: Runtime) -> None:
    result = host.start(["true"])
    seen = result.of("Container")
    assert seen["no_new_privs"] and seen["seccomp_mode"] == 2 and seen["setup_us"] > 0
    kinds = SHARED if host.is_sandbox else NAMESPACES
    assert all(seen["namespaces"][kind] not in (0, result.host_ns[kind]) for kind in kinds)
    facts = result.of("Started")["enforced"]
    assert (facts["uid"], facts["gid"], facts["groups"]) == (1000, 1000, 0)
    assert facts["no_new_privs"] and facts["seccomp_mode"] == 2 and not facts["dumpable"]
    assert [facts[f"cap_{name}"] for name in ("effective", "permitted", "inheritable", "bounding")] == [0] * 4
    if not host.is_sandbox:
        assert result.of("Ready")["namespaces"] == seen["namespaces"]
        assert (result.of("Ready")["landlock_abi"] > 0) == ("landlock" not in cells.missing())


def test_several_executables_and_their_signals(host: Runtime) -> None:
    actions = [
        ["exec", "second", ["sh", "-c", "echo second > /work/file"]],
        ["wait", "second"],
        ["exec", "third", ["cat", "/work/file"]],
        ["wait", "third"],
        ["signal", "first", int(signal.SIGTERM)],
        ["wait", "first"],
    ]
    script = "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    result = host.start(["sh", "-c", script], actions=actions)
    assert {"up", "second", "told"} <= set(result.out.split())
    assert result.of("Exited", "third")["code"] == 0 and result.of("Exited", "first")["code"] == 3


def test_descriptors_and_limits_are_those_asked_for(host: Runtime) -> None:
    code = "import os, resource as r; print(sorted(map(int, os.listdir('/proc/self/fd')))[:5]);"
    code += "print(os.read(3, 9), os.read(4, 9), r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE))"
    limits = [["nofile", 64, 64], ["core", 0, 0]]
    result = host.start([cells.PYTHON, "-IS", "-c", code], extra=["three", "four"], rlimits=limits)
    assert result.out.splitlines() == ["[0, 1, 2, 3, 4]", "b'three' b'four' (64, 64) (0, 0)"]


def test_a_program_that_cannot_run_is_named(host: Runtime) -> None:
    failed = host.start(["/usr/bin/absent"]).of("ExecFailed")
    assert (failed["step"], failed["errno"]) == ("exec", errno.ENOENT)


ROOT = """
import errno, json, os, socket
def told(f):
    try: f()
    except OSError as e: return errno.errorcode[e.errno]
    return "done"
def mode(path): return oct(os.stat(path).st_mode & 0o7777)
def write(path): open(path, "w").write("x")
def empty(path): return not os.path.exists(path) or not open(path).read()
print(json.dumps({
    "root": told(lambda: write("/file")), "usr": told(lambda: write("/usr/file")),
    "dev": told(lambda: write("/dev/file")), "null": told(lambda: write("/dev/null")),
    "proc": told(lambda: write("/proc/sys/kernel/hostname")),
    "mount": told(lambda: os.chroot("/")), "inet": told(lambda: socket.create_connection(("192.0.2.1", 9), 1)),
    "raw": told(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "modes": [mode(p) for p in ("/tmp", "/work", "/dev/shm")], "host": socket.gethostname(),
    "keys": empty("/proc/keys"), "passwd": "job:x:1000" in open("/etc/passwd").read(),
    "pids": sorted(int(p) for p in os.listdir("/proc") if p.isdigit())[0],
    "devices": sorted(d for d in os.listdir("/dev") if d[0] in "fnruz"),
}))
"""


def test_the_root_is_that_of_the_plan(host: Runtime) -> None:
    seen = json.loads(host.start([cells.PYTHON, "-IS", "-c", ROOT]).out)
    assert all(seen[name] in ("EROFS", "EACCES", "EPERM") for name in ("root", "usr", "dev", "proc", "mount"))
    assert seen["null"] == "done" and seen["inet"] in ("ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL")
    assert seen["raw"] in ("EAFNOSUPPORT", "EPERM")
    assert seen["modes"] == ["0o1777", "0o1777", "0o1777"] and seen["host"] == "cell"
    assert seen["keys"] and seen["passwd"] and seen["pids"] == 1
    assert {"fd", "full", "null", "random", "urandom", "zero"} <= set(seen["devices"])


def test_a_pty_is_there_when_asked_for(host: Runtime) -> None:
    code = "import os; m, s = os.openpty(); os.write(m, b'x\\n'); print(os.ttyname(s))"
    steps = [{"op": "dev_minimal", "pty": True}]
    result = host.start([cells.PYTHON, "-IS", "-c", code], replaced=steps)
    assert result.out.startswith("/dev/pts/")


def test_a_tmpfs_is_as_large_as_the_plan_says(host: Runtime) -> None:
    code = "import os; s = os.statvfs('/small'); print(s.f_blocks * s.f_frsize); n = 0\n"
    code += "try:\n  f = open('/small/x', 'wb', 0)\n  while n < 9: f.write(bytes(65536)); n += 1\n"
    code += "except OSError as e: print(n, e.errno)"
    steps = [{"op": "tmpfs", "path": "/small", "size_bytes": 131072}]
    result = host.start([cells.PYTHON, "-IS", "-c", code], steps=steps, landlock=False)
    assert result.out.splitlines() == ["131072", f"2 {errno.ENOSPC}"]


def test_what_the_runtime_refuses_is_repeated(host: Runtime) -> None:
    steps = [{"op": "bind_ro", "path": "/data", "source": "/usr/absent"}]
    result = host.start(["true"], steps=steps, actions=[])
    refused = result.of("RuntimeRefused")
    assert refused["why"].startswith(host.executor + " ") and "No such file" in refused["why"]
    assert wait_gone(result.pid)


def test_what_a_bundle_cannot_say_is_refused_before_anything_starts(host: Runtime) -> None:
    late = [{"op": "file", "path": "/work/late", "content": "x"}]
    error = host.request(["true"], steps=late, landlock=False)["launch_error"]
    assert error["step"].startswith("plan.steps") and "order it before" in error["remedy"]
    if host.is_sandbox and cells.abi():
        assert host.request(["true"])["launch_error"]["step"] == "plan.landlock"


def test_closing_the_socket_ends_everything(host: Runtime) -> None:
    result = host.start(["sh", "-c", "setsid sleep 30 & sleep 30"], actions=[["sleep", 0.2], ["close"]])
    assert wait_gone(result.pid, result.of("Container")["pid"])


def test_killing_the_shim_ends_the_container(host: Runtime) -> None:
    result = host.start(["sh", "-c", "setsid sleep 30 & sleep 30"], actions=[["sleep", 0.2], ["kill"], ["close"]])
    assert wait_gone(result.pid, result.of("Container")["pid"])


def test_the_cell_dies_with_its_spawner(host: Runtime) -> None:
    answer = host.request(["sleep", "31.5"], actions=[["sleep", 0.2], ["die"]], landlock=not host.is_sandbox)
    assert wait_gone(answer["pid"], answer["container"])


def test_without_a_user_namespace(host: Runtime) -> None:
    plan = {"namespaces": [name for name in NAMESPACES if name != "user"]}
    if host.is_sandbox:
        assert host.request(["true"], plan=plan, landlock=False)["launch_error"]["step"] == "plan.namespaces"
        return
    result = host.start(["sh", "-c", "id -u; id -g"], plan=plan)
    enforced = result.of("Started")["enforced"]
    assert enforced["uid"] == cells.BLOCK + 1000 and not enforced["cap_bounding"]
    assert result.out.split() == [str(cells.BLOCK + 1000)] * 2


def test_nothing_is_left_of_a_bundle(host: Runtime) -> None:
    before = Path("/proc/self/mountinfo").read_text().splitlines()
    host.start(["true"])
    assert len(Path("/proc/self/mountinfo").read_text().splitlines()) == len(before)
    assert not Path("/run/bundle").exists() and not Path("/run/src").exists()
