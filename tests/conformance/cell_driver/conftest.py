"""Every driver behind one harness: the same programs by name, as shell scripts in cells and as functions."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from aether.contract.cellplan import DRIVERS
from aether.spawner.linux.oci import find_runtimes
from aether.substrate.cells.drivers.memory import MemoryDriver, Run
from aether.substrate.cells.drivers.native import NativeDriver
from tests.support.machine import SLOW

SCRIPTS = {
    "ok": "true",
    "exit-3": "exit 3",
    "sleep": "sleep 60",
    "on-term-5": "trap 'exit 5' TERM; while :; do sleep 0.01; done",
    "stubborn": "trap '' TERM; while :; do sleep 0.01; done",
    "write": "mkdir -p out; printf one > out/1.txt; printf two > out/2.txt; ln -s /etc/passwd out/link.txt",
    "copy": "cp in.txt out.txt",
}


async def ok(run: Run) -> int:
    return 0


async def exit_3(run: Run) -> int:
    return 3


async def sleep(run: Run) -> int:
    await asyncio.sleep(60)
    return 0


async def on_term_5(run: Run) -> int:
    await run.terminated.wait()
    return 5


async def stubborn(run: Run) -> int:
    await asyncio.sleep(60)
    return 0


async def write(run: Run) -> int:
    run.files |= {"out/1.txt": b"one", "out/2.txt": b"two"}
    run.refused["out/link.txt"] = "it is a symbolic link"
    return 0


async def copy(run: Run) -> int:
    run.files["out.txt"] = run.files["in.txt"]
    return 0


class Harness(Protocol):
    require: tuple[str, ...]
    """What every cell asks for, so that the driver under test builds it."""

    def argv(self, program: str) -> tuple[str, ...]: ...

    def driver(self) -> Any:
        """An async context manager that gives a driver; a second one sees what the first started."""
        ...


class MemoryHarness:
    def __init__(self) -> None:
        programs = {
            "ok": ok,
            "exit-3": exit_3,
            "sleep": sleep,
            "on-term-5": on_term_5,
            "stubborn": stubborn,
            "write": write,
            "copy": copy,
        }
        self._driver = MemoryDriver(programs, {"netns": ("the double has no network", "use a real driver")})
        self.lacks = "netns"
        self.require: tuple[str, ...] = ()

    def argv(self, program: str) -> tuple[str, ...]:
        return (program,)

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[MemoryDriver]:
        yield self._driver


class NativeHarness:
    """Drivers of one spawner; `name` is required of every cell."""

    def __init__(self, state: Path, name: str) -> None:
        self._socket = state / "run/spawner.sock"
        self.lacks = ""
        self.require: tuple[str, ...] = (name,)

    def argv(self, program: str) -> tuple[str, ...]:
        return ("sh", "-c", SCRIPTS[program])

    @asynccontextmanager
    async def driver(self) -> AsyncIterator[NativeDriver]:
        driver = NativeDriver(self._socket)
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


@pytest.fixture(scope="session")
def spawner_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    state = tmp_path_factory.mktemp("spawner")
    process = subprocess.Popen([sys.executable, "-m", "aether.spawner.main", "--state", str(state)])
    deadline = time.monotonic() + 10 * SLOW
    while not (state / "run/spawner.sock").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the spawner did not start"
        time.sleep(0.02)
    yield state
    process.terminate()
    assert process.wait(20 * SLOW) == 0
    assert {entry.name for entry in (state / "cells").iterdir()} == {".lock", ".instances"}


@pytest.fixture(params=["memory", *DRIVERS])
def harness(request: pytest.FixtureRequest) -> Harness:
    name = request.param
    if name == "memory":
        return MemoryHarness()
    lack = find_runtimes(os.environ)[name] if name != "native" else None
    if lack is not None and lack.reason:
        pytest.skip(f"{lack.reason}: {lack.remedy}")
    return NativeHarness(request.getfixturevalue("spawner_state"), name)
