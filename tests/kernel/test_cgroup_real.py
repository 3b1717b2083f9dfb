"""The cgroup drivers on this machine's own hierarchies: limits bite, counters count, kill and freeze work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.spawner.linux.cgroup import CgroupDriver, CgroupHandle
from aether.spawner.linux.cgroup_host import locate, open_driver
from aether.spawner.linux.cgroup_limits import CgroupLimits
from tests.support.machine import cgroups


@pytest.fixture
def driver() -> Iterator[CgroupDriver]:
    instance = os.urandom(4).hex()
    opened = open_driver(instance)
    if opened.kind == "none":
        pytest.skip(f"no cgroup is lent to this process: {opened.probe()['missing']['memory_bytes']}")
    yield opened
    opened.sweep(instance)
    opened.close()
    assert cgroups(f"aether-{instance}") == []


def run(handle: CgroupHandle, code: str) -> subprocess.Popen[bytes]:
    """A Python process that joins the cell's cgroups itself, then runs `code`."""
    fds = list(handle.attach_fds)
    paths = []
    if handle.v2_fd is not None:
        fds.append(os.open("cgroup.procs", os.O_WRONLY, dir_fd=handle.v2_fd))
        paths.append(fds[-1])
    join = f"import os\nfor fd in {fds!r}: os.write(fd, b'0')\n"
    process = subprocess.Popen([sys.executable, "-IS", "-c", join + code], pass_fds=fds, stdout=subprocess.PIPE)
    for fd in paths:
        os.close(fd)
    return process


def limited(driver: CgroupDriver, name: str) -> bool:
    return name not in driver.probe()["missing"]


def remove(driver: CgroupDriver, handle: CgroupHandle) -> None:
    deadline = time.monotonic() + 5
    while not driver.remove(handle):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_limit_kills_and_is_counted(driver: CgroupDriver) -> None:
    if not limited(driver, "memory_bytes"):
        pytest.skip("no memory controller")
    handle = driver.create("oom", CgroupLimits(memory_bytes=32 << 20, swap_bytes=0))
    process = run(handle, "x = bytearray(200 << 20)\n")
    assert process.wait(20) == -signal.SIGKILL
    usage = driver.usage(handle)
    assert (usage.oom_kills or 0) >= 1
    assert 8 << 20 < (usage.memory_peak_bytes or 0) <= 32 << 20
    process.communicate()
    remove(driver, handle)


def test_pids_limit_bounds_a_fork_bomb(driver: CgroupDriver) -> None:
    if not limited(driver, "pids"):
        pytest.skip("no pids controller")
    handle = driver.create("pids", CgroupLimits(pids=10))
    code = """
import signal
n = 0
try:
    while n < 200:
        if os.fork() == 0:
            signal.pause()
        n += 1
except BlockingIOError:
    pass
print(n, flush=True)
signal.pause()
"""
    process = run(handle, code)
    assert process.stdout is not None
    assert int(process.stdout.readline()) == 9
    assert len(driver.procs(handle)) == 10
    driver.kill(handle)
    process.wait(10)
    remove(driver, handle)


def test_cpu_is_counted_and_bounded(driver: CgroupDriver) -> None:
    handle = driver.create("cpu", CgroupLimits(cpu_millis=200))
    process = run(handle, "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass\n")
    process.wait(10)
    usage = driver.usage(handle)
    used = (usage.cpu_user_us or 0) + (usage.cpu_system_us or 0)
    if limited(driver, "cpu_millis"):
        assert 50_000 < used < 450_000
        assert (usage.throttled_us or 0) > 0
    else:
        assert used > 500_000
    process.communicate()
    remove(driver, handle)


def test_freeze_and_kill_reach_the_whole_tree(driver: CgroupDriver) -> None:
    handle = driver.create("tree", CgroupLimits())
    code = """
import signal, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(0.001)
print("up", flush=True)
signal.pause()
"""
    process = run(handle, code)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    driver.freeze(handle, True)
    time.sleep(0.1)
    before = driver.usage(handle).cpu_user_us
    time.sleep(0.2)
    assert driver.usage(handle).cpu_user_us == before
    driver.freeze(handle, False)
    pids = driver.procs(handle)
    assert len(pids) == 4
    driver.kill(handle)
    process.wait(10)
    remove(driver, handle)
    assert driver.procs(handle) == ()


def test_sweep_removes_only_its_instance(driver: CgroupDriver) -> None:
    theirs, keep = os.urandom(4).hex(), driver.create("keep", CgroupLimits())
    dead = open_driver(theirs)
    handle = dead.create("left", CgroupLimits())
    process = run(handle, "import time\ntime.sleep(60)\n")
    while process.pid not in driver_procs(handle):
        time.sleep(0.01)
    handle.close()
    assert driver.sweep(theirs) == 1
    assert process.wait(10) == -signal.SIGKILL
    assert not list(Path("/sys/fs/cgroup").glob(f"**/aether-{theirs}*"))
    remove(driver, keep)


def driver_procs(handle: CgroupHandle) -> tuple[int, ...]:
    """Who is in the v2 directory of `handle`."""
    if handle.v2_fd is None:
        pytest.skip("no v2 hierarchy")
    fd = os.open("cgroup.procs", os.O_RDONLY, dir_fd=handle.v2_fd)
    text = os.read(fd, 65536).decode()
    os.close(fd)
    return tuple(int(word) for word in text.split())


def test_base_is_the_own_cgroup() -> None:
    found = locate(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    for path in (*found.v1.values(), *([found.v2] if found.v2 else [])):
        assert Path(path).is_dir()


def test_sweep_finds_an_instance_that_lived_in_another_cgroup(driver: CgroupDriver) -> None:
    found = locate(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    if found.v2 is None or driver.kind != "v1":
        pytest.skip("needs a hybrid host")
    theirs = os.urandom(4).hex()
    other = Path(found.v2) / f"aether-elsewhere-{theirs}"
    left = other / f"aether-{theirs}" / "cell"
    left.mkdir(parents=True)
    try:
        assert driver.sweep(theirs) == 1
        assert not left.parent.exists()
    finally:
        other.rmdir()
