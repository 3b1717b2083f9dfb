"""What real cells may keep on disk: who is killed, what counts, and the kernel's own quotas where it has them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract.cells import ExecEnd, Limits
from aether.substrate.cells.drivers.native import NativeDriver
from tests.support.machine import SLOW, argv_of, children
from tests.support.spawnerprocess import MIB, Spawner, launch, run, with_driver

KILLED = "disk-limit"
LINGER = "; sleep 20"
LOOKING = 1 << 2 | 1 << 19 | 1 << 40
"""CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE, CAP_CHECKPOINT_RESTORE (linux/capability.h)."""


@pytest.fixture(params=["root", "ordinary"])
def spawner(request: pytest.FixtureRequest) -> Iterator[Spawner]:
    if request.param == "ordinary" and os.geteuid() != 0:
        pytest.skip("it is an ordinary user already")
    made = Spawner(None if request.param == "root" else 64_999)
    yield made
    made.close()


def disk(size_bytes: int) -> Limits:
    return Limits(disk_bytes=size_bytes, memory_bytes=256 * MIB)


async def bounded(driver: NativeDriver, script: str, size_bytes: int = 20 * MIB) -> ExecEnd:
    started, end = await run(driver, script, limits=disk(size_bytes))
    assert started.report.enforced["disk"] == "watched"
    await driver.free(started.handle)
    return end


def test_a_cell_above_its_bound_is_killed_and_its_space_comes_back(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        script = "for n in $(seq 100); do head -c 1048576 /dev/zero > $n; done; ls | wc -l" + LINGER
        end = await bounded(driver, script)
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)
        assert not list((spawner.state / "cells" / spawner.instances[-1]).glob("*/*"))

    with_driver(spawner, step)


def test_what_counts_is_blocks_once(spawner: Spawner) -> None:
    """Sparse files by their blocks, hard links once: none of this is above 20 MiB."""

    async def step(driver: NativeDriver) -> None:
        script = (
            "truncate -s 1G sparse; head -c 4194304 /dev/zero > one; for n in $(seq 50); do ln one $n; done;"
            " mkdir a; touch a/b; chmod 0 a; sleep 1.5; chmod 700 a; ls a"
        )
        end = await bounded(driver, script)
        assert (end.exit.code, end.exit.reason) == (0, None)

    with_driver(spawner, step)


@pytest.mark.parametrize(
    "script",
    [
        "mkdir a; head -c 30M /dev/zero > a/b; chmod 0 a",
        "exec 9> gone; rm gone; head -c 30M /dev/zero >&9",
        "mkdir -p $(printf 'd/%.0s' $(seq 300))",
    ],
    ids=["behind a closed directory", "without a name", "too deep"],
)
def test_what_is_hidden_counts(spawner: Spawner, script: str) -> None:
    async def step(driver: NativeDriver) -> None:
        end = await bounded(driver, script + LINGER)
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)

    with_driver(spawner, step)


HOLDERS = {
    "a thread's own table": """
import ctypes, os, threading, time
def hold():
    assert ctypes.CDLL(None).unshare(0x400) == 0
    fd = os.open("gone", os.O_RDWR | os.O_CREAT)
    os.unlink("gone")
    os.write(fd, bytes(30 << 20))
    time.sleep(20)
threading.Thread(target=hold).start()
""",
    "a mapping": """
import mmap, os, ctypes, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
fd = os.open("gone", os.O_RDWR | os.O_CREAT)
os.unlink("gone")
os.write(fd, bytes(30 << 20))
assert libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) != 2**64 - 1
os.close(fd)
time.sleep(20)
""",
}


@pytest.mark.skipif(os.geteuid() != 0, reason="following other processes' mappings takes root")
@pytest.mark.parametrize("held", HOLDERS)
def test_files_without_a_name_are_found(held: str) -> None:
    spawner = Spawner(None)

    async def step(driver: NativeDriver) -> None:
        end = await bounded(driver, f"exec python3 -IS -c '{HOLDERS[held]}'")
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)

    try:
        with_driver(spawner, step)
    finally:
        spawner.close()


def test_many_empty_files_are_too_many() -> None:
    spawner = Spawner(None)

    async def step(driver: NativeDriver) -> None:
        code = "import os,time\nfor n in range(250_000): os.close(os.open(str(n), os.O_CREAT))\ntime.sleep(20)"
        end = await bounded(driver, f"exec python3 -IS -c '{code}'", 1 << 30)
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)

    try:
        with_driver(spawner, step)
    finally:
        spawner.close()


def test_the_watcher_dies_and_the_bound_holds() -> None:
    spawner = Spawner(None)

    async def step(driver: NativeDriver) -> None:
        started = await launch(
            driver, f"sleep {1.5 * SLOW}; head -c 30M /dev/zero > big" + LINGER, limits=disk(20 * MIB)
        )
        await asyncio.sleep(0.8 * SLOW)
        (watcher,) = [pid for pid in children(spawner.process.pid) if any("diskwatch" in word for word in argv_of(pid))]
        about = dict(line.split(":\t", 1) for line in Path(f"/proc/{watcher}/status").read_text().splitlines())
        if os.geteuid() == 0:
            assert "0" not in about["Uid"].split() and int(about["CapEff"], 16) == LOOKING
        os.kill(watcher, signal.SIGKILL)
        end = await driver.wait(started.handle, started.exec_id)
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)
        await driver.free(started.handle)

    try:
        with_driver(spawner, step)
    finally:
        spawner.close()


def test_a_running_cell_gets_another_bound(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        script = "head -c 30M /dev/zero > big" + LINGER
        started = await launch(driver, script, limits=disk(100 * MIB))
        await asyncio.sleep(0.8 * SLOW)
        await driver.resize(started.handle, disk(20 * MIB))
        end = await driver.wait(started.handle, started.exec_id)
        assert (end.exit.signal, end.exit.reason) == (9, KILLED)
        await driver.free(started.handle)

    with_driver(spawner, step)


IN_A_QUOTA = """
set -e
mount --make-rprivate /
mount -o loop,prjquota {image} {place}
chmod 711 {place}
exec {python} {script} {place}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system takes root")
def test_the_kernel_holds_it_where_project_quotas_are_on() -> None:
    """On an ext4 with project quotas in a file, mounted for this test alone."""
    if shutil.which("mkfs.ext4") is None or shutil.which("unshare") is None:
        pytest.skip("mkfs.ext4 or unshare is not installed")
    directory = Path(tempfile.mkdtemp(prefix="aether-quota-"))
    directory.chmod(0o711)
    try:
        image, place = directory / "disk.ext4", directory / "state"
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(256 * MIB)
        make = ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", str(image)]
        subprocess.run(make, check=True)
        mountable = f"mount --make-rprivate / && mount -o loop,prjquota {image} {place}"
        tried = subprocess.run(["unshare", "-m", "sh", "-c", mountable], capture_output=True, text=True)
        if tried.returncode != 0:
            pytest.skip(f"cannot mount a loop device with quotas here: {tried.stderr.strip()}")
        script = Path(__file__).parents[1] / "support/quotacell.py"
        command = IN_A_QUOTA.format(image=image, place=place, python=sys.executable, script=script)
        done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "held by the kernel", done.stdout
    finally:
        _free_loop(directory)


def _free_loop(directory: Path) -> None:
    """The loop device goes with its last mount, a moment later."""
    deadline = time.monotonic() + 5
    while str(directory) in subprocess.run(["losetup", "-a"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "the loop device is still there"
        time.sleep(0.05)
    shutil.rmtree(directory)
