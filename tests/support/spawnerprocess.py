"""The spawner as a process for tests: as this user, or as an ordinary one (uid 64999) with a copy of the source."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aether
from aether.contract import ids
from aether.contract.cells import CellSpec, ExecEnd
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Order, Started
from tests.support import subids
from tests.support.machine import SLOW

ORDINARY = 64_999
SYSTEM_PYTHON = "/usr/bin/python3"
MIB = 1 << 20


class Spawner:
    """One state directory and the spawner processes that use it, one after the other."""

    def __init__(self, uid: int | None, *, lent: bool = False, executor: str = "auto") -> None:
        """With `lent`, which takes root, ids are lent to `uid` (subuid(5)), as far as this spawner can see."""
        self.directory = Path(tempfile.mkdtemp(prefix="aether-test-"))
        self.state = self.directory / "state"
        self.state.mkdir()
        self.uid = uid
        self._lent = lent
        self._executor = executor
        self._python, self._env = sys.executable, dict(os.environ)
        if uid is not None:
            source = Path(aether.__file__).parents[1]
            shutil.copytree(source / "aether", self.directory / "src/aether", ignore=shutil.ignore_patterns("*.pyc"))
            self._python, self._env = SYSTEM_PYTHON, {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{self.directory}/src"}
            os.chown(self.state, uid, uid)
        self.directory.chmod(0o711)
        self.state.chmod(0o711)
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [self._python, "-m", "aether.spawner.main", "--state", str(self.state), "--executor", self._executor]
        command += ["--root", str(self.state / "cache/images")]
        ids_of: dict[str, Any] = {} if self.uid is None else {"user": self.uid, "group": self.uid, "extra_groups": []}
        if self._lent and self.uid is not None:
            command, ids_of = [*subids.lending(self.uid, self.directory), *command], {}
        process = subprocess.Popen(command, env=self._env, cwd="/", **ids_of)
        self.process = process
        deadline = time.monotonic() + 15 * SLOW
        while not self._answers():
            assert process.poll() is None and time.monotonic() < deadline, "the spawner did not start"
            time.sleep(0.02)
        return process

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            return sock.connect_ex(str(self.state / "run/spawner.sock")) == 0

    @property
    def instances(self) -> list[str]:
        return (self.state / "cells/.instances").read_text().split()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        named = self.instances
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(20 * SLOW) == 0
        assert_nothing_left(self, named)
        shutil.rmtree(self.directory)

    def acting(self) -> AbstractContextManager[None]:
        """For whoever connects: this root is nobody in the user namespace of a spawner with lent ids."""
        return subids.acting_as(self.uid if self._lent else None)

    @asynccontextmanager
    async def driver(self) -> Any:
        driver = NativeDriver(self.state / "run/spawner.sock")
        with self.acting():
            driver.start()
            for _ in range(500):
                if not driver.reason:
                    break
                await asyncio.sleep(0.01)
        assert not driver.reason, driver.reason
        try:
            yield driver
        finally:
            await driver.close()


def assert_nothing_left(spawner: Spawner, instances: list[str]) -> None:
    for instance in instances:
        assert not list(Path("/sys/fs/cgroup").glob(f"**/aether-{instance}*"))
    assert {entry.name for entry in (spawner.state / "cells").iterdir()} == {".lock", ".instances"}
    assert str(spawner.state) not in Path("/proc/self/mountinfo").read_text()
    assert not processes(str(spawner.state))


def processes(marker: str) -> list[int]:
    """Pids whose command line or environment holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if marker.encode() in text:
                found.append(int(entry.name))
    return found


def sessions(marker: str) -> int:
    """How many sessions those processes are in: a shell on its way to one of its own does not count."""
    found = set()
    for pid in processes(marker):
        with contextlib.suppress(ProcessLookupError):
            found.add(os.getsid(pid))
    return len(found)


Step = Callable[[NativeDriver], Awaitable[None]]


def with_driver(spawner: Spawner, step: Step) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), spawner.driver() as driver:
            await step(driver)

    asyncio.run(main())


async def launch(driver: NativeDriver, script: str, **more: Any) -> Started:
    cell_id = ids.new(ids.CELL)
    spec = CellSpec(argv=("sh", "-c", script), **more)
    return await driver.launch(Order(cell_id, "exec" + cell_id[4:], spec))


async def run(driver: NativeDriver, script: str, **more: Any) -> tuple[Started, ExecEnd]:
    started = await launch(driver, script, **more)
    return started, await driver.wait(started.handle, started.exec_id)
