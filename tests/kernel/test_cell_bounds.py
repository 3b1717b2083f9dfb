"""Limits and scheduling of real cells: what the executable inside sees, what the report says, how cells nest."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.contract import ids
from aether.contract.cells import CellSpec, Limits, Sched
from aether.contract.errors import AetherError
from aether.spawner.linux import sched as scheduling
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Order
from aether.substrate.cells.logs import JobLogs
from aether.substrate.cells.plan import blueprint
from tests.support.machine import SLOW, cgroups, children

MIB = 1 << 20
Step = Callable[[NativeDriver], Awaitable[None]]
TELL = """
import ctypes, json, os
print(json.dumps({
    "cpus": sorted(os.sched_getaffinity(0)), "policy": os.sched_getscheduler(0), "nice": os.nice(0),
    "priority": os.sched_getparam(0).sched_priority,
}), flush=True)
"""


@pytest.fixture
def state() -> Iterator[Path]:
    """The state directory of a spawner that runs; nothing is left of it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="aether-bounds-"))
    directory.chmod(0o711)
    process = subprocess.Popen([sys.executable, "-m", "aether.spawner.main", "--state", str(directory)], cwd="/")
    deadline = time.monotonic() + 15 * SLOW
    while not (directory / "run/spawner.sock").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the spawner did not start"
        time.sleep(0.02)
    instance = (directory / "cells/.instances").read_text().strip()
    yield directory
    process.terminate()
    assert process.wait(20 * SLOW) == 0
    assert not cgroups(instance)
    shutil.rmtree(directory)


def with_driver(state: Path, step: Step) -> None:
    async def main() -> None:
        driver = NativeDriver(state / "run/spawner.sock")
        driver.start()
        async with asyncio.timeout(60 * SLOW):
            for _ in range(500 * SLOW):
                if not driver.reason:
                    break
                await asyncio.sleep(0.01)
            try:
                await step(driver)
            finally:
                await driver.close()

    asyncio.run(main())


async def tell(driver: NativeDriver, state: Path, limits: Limits) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a Python program sees of itself in a cell with `limits`, and what the report says is enforced."""
    cell_id = ids.new(ids.CELL)
    spec = CellSpec(argv=("python3", "-IS", "-c", TELL), limits=limits)
    started = await driver.launch(Order(cell_id, "exec" + cell_id[4:], spec))
    end = await driver.wait(started.handle, started.exec_id)
    assert end.exit.code == 0, end
    text = b""
    for _ in range(100 * SLOW):  # an end is told without its output where the keeper has not started in two seconds
        read = JobLogs(state / "logs/jobs").read(str(started.handle), started.exec_id, "stdout", 0, True)
        if text := b"".join([chunk async for chunk in read]):
            break
        await asyncio.sleep(0.02)
    seen = json.loads(text)
    await driver.free(started.handle)
    return seen, started.report.enforced | {"missing": started.report.missing}


def test_an_executable_sees_its_cpus_and_its_class(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        cpu = max(os.sched_getaffinity(0))
        quiet = Sched(policy="batch", nice=7, io_class="idle")
        limits = Limits(cpuset_cpus=str(cpu), cpu_weight=20, sched=quiet, memory_high_bytes=256 * MIB)
        seen, enforced = await tell(driver, state, limits)
        assert (seen["policy"], seen["nice"]) == (os.SCHED_BATCH, 7)
        assert enforced["sched"] == "batch, nice 7, I/O idle"
        missing = driver.facts.limits_missing
        for name in ("cpuset_cpus", "cpu_weight", "memory_high_bytes"):
            assert (name in enforced) != (name in enforced["missing"])
            assert enforced["missing"].get(name) == missing.get(name)
        if "cpuset_cpus" not in missing:
            assert seen["cpus"] == [cpu]

    with_driver(state, step)


def test_real_time_takes_a_privilege(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        limits = Limits(sched=Sched(policy="fifo", priority=5))
        if scheduling.missing():
            with pytest.raises(AetherError, match="CELL_FAILED"):
                await tell(driver, state, limits)
            return
        seen, enforced = await tell(driver, state, limits)
        assert (seen["policy"], seen["priority"]) == (os.SCHED_FIFO, 5)
        assert enforced["sched"] == "fifo, priority 5"

    with_driver(state, step)


def test_cells_of_one_blueprint_are_warm_with_a_class_too(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        for _ in range(3):
            seen, _ = await tell(driver, state, Limits(sched=Sched(policy="idle")))
            assert seen["policy"] == os.SCHED_IDLE
            await asyncio.sleep(0.1)

    with_driver(state, step)


def test_real_cells_nest_freeze_and_end_together(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        if "pids" in driver.facts.limits_missing:
            pytest.skip(driver.facts.limits_missing["pids"])
        link = driver._connector.require()
        outer, inner = ids.new(ids.CELL), ids.new(ids.CELL)
        spin = ("sh", "-c", "while :; do :; done")
        asked: tuple[tuple[str, dict[str, Any]], ...] = (
            (outer, {"nestable": True}),
            (inner, {"parent": outer, "limits": {"pids": 5, "cpu_millis": 50}}),
        )
        for slot, (cell, more) in enumerate(asked):
            drawn = blueprint(CellSpec(argv=spin), cell, "exec" + cell[4:], driver.facts, 100 + slot)
            executable = {"spec": drawn.executable, "stdio": ["null", "null", "null"]}
            args: dict[str, Any] = {"plan": drawn.plan, "limits": drawn.limits, "work": True, "exec": executable} | more
            (await link.call("cell.create", args, key=cell)).close()
        with pytest.raises(AetherError, match="LIMIT_REFUSED"):
            await link.call("cell.limit", {"cell": inner, "limits": {"pids": 100_000}})
        with pytest.raises(AetherError, match="LIMIT_REFUSED"):
            await link.call("cell.limit", {"cell": outer, "limits": {"pids": 2}})
        counted = []
        for frozen in (True, False):
            await link.call("cell.freeze", {"cell": outer, "frozen": frozen})
            await asyncio.sleep(0.2 * SLOW)
            before = (await link.call("cell.usage", {"cell": inner})).value
            await asyncio.sleep(0.3 * SLOW)
            after = (await link.call("cell.usage", {"cell": inner})).value
            counted.append(after["cpu_user_us"] - before["cpu_user_us"])
        assert counted[0] == 0 and counted[1] > 0
        assert after["throttled_count"] > 0
        views = {view["cell"]: view for view in (await link.call("cell.list", {})).json()["cells"]}
        assert views[inner]["parent"] == outer
        await link.call("cell.free", {"cell": outer})
        views = {view["cell"]: view for view in (await link.call("cell.list", {})).json()["cells"]}
        assert set(views) == {inner} and views[inner]["reason"] == "parent-ended"
        await link.call("cell.free", {"cell": inner})

    with_driver(state, step)


def test_a_real_cell_that_somebody_took_out_is_brought_back(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        if os.geteuid() != 0 or "pids" in driver.facts.limits_missing:
            pytest.skip("needs root and the pids controller")
        cell_id = ids.new(ids.CELL)
        spec = CellSpec(argv=("sleep", "60"))
        started = await driver.launch(Order(cell_id, "exec" + cell_id[4:], spec))
        instance = (state / "cells/.instances").read_text().strip()
        (bound,) = (path for path in Path("/sys/fs/cgroup").glob(f"**/aether-{instance}/{cell_id}/pids.max"))
        members = (bound.parent / "cgroup.procs").read_text().split()
        assert len(members) == 2 and any(children(int(pid)) for pid in members)
        top = bound.parent.parent.parent / "cgroup.procs"
        bound.write_text("max")
        for pid in members:
            top.write_text(pid)
        bound.parent.rmdir()
        deadline = time.monotonic() + 10 * SLOW
        while not bound.exists() or sorted((bound.parent / "cgroup.procs").read_text().split()) != sorted(members):
            assert time.monotonic() < deadline, "it was not mended"
            await asyncio.sleep(0.05)
        assert bound.read_text() == f"{spec.limits.pids + 1}\n"
        (view,) = (await driver._connector.require().call("cell.list", {})).json()["cells"]
        assert any("was removed" in line for line in view["altered"]), view["altered"]
        await driver.free(started.handle)

    with_driver(state, step)


def test_allocated_cells_lie_in_one_another(state: Path) -> None:
    async def step(driver: NativeDriver) -> None:
        if "pids" in driver.facts.limits_missing:
            pytest.skip(driver.facts.limits_missing["pids"])
        outer, inner = ids.new(ids.CELL), ids.new(ids.CELL)
        around = await driver.allocate(outer, CellSpec(argv=(), limits=Limits(pids=50)))
        within = await driver.allocate(inner, CellSpec(argv=(), limits=Limits(pids=20)), around.handle)
        instance = (state / "cells/.instances").read_text().strip()
        (bound,) = Path("/sys/fs/cgroup").glob(f"**/aether-{instance}/{outer}/{inner}/pids.max")
        assert bound.read_text() == "21\n"
        with pytest.raises(AetherError, match="LIMIT_REFUSED"):
            await driver.allocate(ids.new(ids.CELL), CellSpec(argv=(), limits=Limits(pids=60)), around.handle)
        await driver.resize(within.handle, Limits(pids=40, cpu_weight=50))
        assert bound.read_text() == "41\n"
        with pytest.raises(AetherError, match="LIMIT_REFUSED"):
            await driver.resize(around.handle, Limits(pids=30))
        spec = CellSpec(argv=("sh", "-c", "while :; do :; done"))
        await driver.start_exec(within.handle, "exec" + inner[4:], spec)
        await driver.freeze(around.handle, True)
        await asyncio.sleep(0.2 * SLOW)
        before = await driver.usage(within.handle)
        await asyncio.sleep(0.2)
        assert (await driver.usage(within.handle)).cpu_user_us == before.cpu_user_us
        await driver.free(within.handle)
        await driver.free(around.handle)

    with_driver(state, step)
