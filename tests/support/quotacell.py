"""A program for one test: cells whose state directory lies on a file system with project quotas.

The directory is `argv[1]`; it prints `held by the kernel` when all is as promised.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from aether.contract import ids
from aether.contract.cells import CellSpec, Limits
from aether.contract.errors import AetherError
from aether.spawner.linux import quota
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Order, Started
from aether.substrate.cells.logs import JobLogs

MIB = 1 << 20
FILL = "head -c 40M /dev/zero > big; wc -c < big; rm big; head -c 10M /dev/zero > ok; echo $?"


async def _launch(driver: NativeDriver, script: str) -> Started:
    cell_id = ids.new(ids.CELL)
    spec = CellSpec(argv=("sh", "-c", script), limits=Limits(disk_bytes=20 * MIB))
    return await driver.launch(Order(cell_id, "exec" + cell_id[4:], spec))


async def _output(state: Path, started: Started, stream: str) -> str:
    chunks = JobLogs(state / "logs/jobs").read(str(started.handle), started.exec_id, stream, 0, True)
    return b"".join([chunk async for chunk in chunks]).decode()


async def _check(state: Path) -> None:
    driver = NativeDriver(state / "run/spawner.sock")
    driver.start()
    for _ in range(500):
        if not driver.reason:
            break
        await asyncio.sleep(0.01)
    for _ in range(3):  # cold, then from the pool
        started = await _launch(driver, FILL)
        assert started.report.enforced["disk"] == "project-quota", started.report.enforced
        await driver.wait(started.handle, started.exec_id)
        told, failed = (await _output(state, started, "stdout")).split(), await _output(state, started, "stderr")
        assert 19 * MIB <= int(told[0]) <= 20 * MIB, told
        assert told[1] == "0", told
        assert "quota" in failed, failed
        await driver.free(started.handle)
        await asyncio.sleep(0.2)
    started = await _launch(driver, "head -c 15M /dev/zero > kept; sleep 30")
    await asyncio.sleep(0.5)
    try:
        await driver.resize(started.handle, Limits(disk_bytes=10 * MIB))
        raise AssertionError("the resize was not refused")
    except AetherError as error:
        assert error.code == "LIMIT_REFUSED", error
    await driver.resize(started.handle, Limits(disk_bytes=30 * MIB))
    await driver.free(started.handle)
    await driver.close()


def main(state: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "aether.spawner.main", "--state", str(state)], cwd="/")
    try:
        deadline = time.monotonic() + 15
        while not (state / "run/spawner.sock").exists():
            assert process.poll() is None and time.monotonic() < deadline, "the spawner did not start"
            time.sleep(0.02)
        asyncio.run(_check(state))
    finally:
        process.terminate()
        assert process.wait(20) == 0
    here = os.open(state, os.O_RDONLY)
    assert quota.enforced(here)
    os.close(here)
    print("held by the kernel")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
