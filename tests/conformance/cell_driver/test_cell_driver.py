"""The driver contract: every driver passes this suite."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from aether.contract import ids
from aether.contract.cells import CellSpec, ExecEnd, InputFile, Limits
from aether.contract.errors import AetherError
from aether.substrate.cells.drivers.port import Handle, Order, Started

Step = Callable[[Any, "Cells"], Awaitable[None]]


class Cells:
    """Launches by program name and frees what it launched."""

    def __init__(self, harness: Any, driver: Any) -> None:
        self._harness, self._driver = harness, driver
        self.launched: list[Handle] = []

    def order(self, program: str, cell_id: str | None = None, **more: Any) -> Order:
        files = more.pop("files", ())
        more["require"] = (*self._harness.require, *more.get("require", ()))
        spec = CellSpec(argv=self._harness.argv(program), **more)
        cell_id = cell_id or ids.new(ids.CELL)
        return Order(cell_id, "exec" + cell_id[4:], spec, files)

    async def launch(self, program: str, **more: Any) -> Started:
        started: Started = await self._driver.launch(self.order(program, **more))
        self.launched.append(started.handle)
        return started

    async def run(self, program: str, **more: Any) -> tuple[Started, ExecEnd]:
        started = await self.launch(program, **more)
        return started, await self._driver.wait(started.handle, started.exec_id)


def check(harness: Any, step: Step) -> None:
    async def main() -> None:
        async with asyncio.timeout(30), harness.driver() as driver:
            cells = Cells(harness, driver)
            try:
                await step(driver, cells)
            finally:
                for handle in cells.launched:
                    await driver.free(handle)

    asyncio.run(main())


def test_fingerprint_is_healthy_and_names_what_is_missing(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        found = await driver.fingerprint()
        assert found.healthy and not found.reason and "process" in found.levels
        assert all(reason for reason, _ in found.missing.values())

    check(harness, step)


def test_exit_code_and_measured_usage(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started, end = await cells.run("exit-3")
        assert (end.exit.code, end.exit.signal, end.exit.timed_out, end.exit.reason) == (3, None, False, None)
        assert end.usage.wall_us is not None and end.usage.wall_us > 0
        figures = {
            name for name in end.usage.__struct_fields__ if name != "basis" and getattr(end.usage, name) is not None
        }
        assert set(end.usage.basis) == figures
        assert (end.cell_id, end.exec_id) == (started.handle, started.exec_id)
        assert await driver.wait(started.handle, started.exec_id) == end

    check(harness, step)


def test_launch_is_idempotent(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("sleep")
        again = await driver.launch(cells.order("sleep", cell_id=str(started.handle)))
        assert (again.handle, again.exec_id, again.report) == (started.handle, started.exec_id, started.report)
        assert [found.cell_id for found in await driver.adopt()].count(str(started.handle)) == 1

    check(harness, step)


def test_stop_gives_grace(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("on-term-5")
        await asyncio.sleep(0.1)
        await driver.stop(started.handle, 5_000)
        end = await driver.wait(started.handle, started.exec_id)
        assert end.exit.code == 5 and end.exit.signal is None

    check(harness, step)


def test_stop_kills_after_the_grace(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("stubborn")
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await driver.stop(started.handle, 200)
        end = await driver.wait(started.handle, started.exec_id)
        assert 0.15 <= time.monotonic() - began < 3
        assert end.exit.signal == signal.SIGKILL and end.exit.reason == "killed" and not end.exit.timed_out

    check(harness, step)


def test_kill_returns_when_it_is_over(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("stubborn")
        await driver.kill(started.handle)
        async with asyncio.timeout(1):
            end = await driver.wait(started.handle, started.exec_id)
        assert end.exit.signal == signal.SIGKILL
        await driver.kill(started.handle)

    check(harness, step)


def test_deadline(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        _, end = await cells.run("sleep", limits=Limits(timeout_ms=150, grace_ms=1_000))
        assert end.exit.timed_out and end.exit.code is None and end.exit.signal == signal.SIGTERM

    check(harness, step)


def test_signal_reaches_the_executable(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("on-term-5")
        await asyncio.sleep(0.1)
        await driver.signal(started.handle, started.exec_id, signal.SIGTERM)
        assert (await driver.wait(started.handle, started.exec_id)).exit.code == 5

    check(harness, step)


def test_a_cell_holds_several_executables(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("sleep")
        second = ids.new(ids.EXECUTABLE)
        spec = cells.order("exit-3").spec
        await driver.start_exec(started.handle, second, spec)
        await driver.start_exec(started.handle, second, spec)
        assert (await driver.wait(started.handle, second)).exit.code == 3

    check(harness, step)


def test_inputs_and_outputs(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        fd = os.memfd_create("input")
        os.write(fd, b"data")
        file = InputFile(path="in.txt", artifact="sha256:" + "0" * 64)
        started, end = await cells.run("copy", files=((file, fd),))
        os.close(fd)
        assert end.exit.code == 0
        output = await driver.open(started.handle, "out.txt")
        assert os.read(output, 10) == b"data"
        os.close(output)

    check(harness, step)


def test_outputs_are_listed_and_refused(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started, _ = await cells.run("write")
        found = await driver.collect(started.handle, ["out/*.txt"])
        assert [(file.path, file.size_bytes) for file in found.files] == [("out/1.txt", 3), ("out/2.txt", 3)]
        assert "symbolic link" in found.refused["out/link.txt"]
        for path in ("out/link.txt", "../x", "missing"):
            with pytest.raises(AetherError) as refused:
                await driver.open(started.handle, path)
            assert refused.value.code == "OUTPUT_REFUSED"

    check(harness, step)


def test_adopt_tells_ends_until_acknowledged(harness: Any) -> None:
    handles: list[Handle] = []

    async def first(driver: Any, cells: Cells) -> None:
        live, (done, _) = await cells.launch("sleep"), await cells.run("exit-3")
        handles.extend((live.handle, done.handle))
        found = {adopted.handle: adopted for adopted in await driver.adopt()}
        assert found[live.handle].end is None and found[done.handle].end.exit.code == 3
        await driver.acknowledge(done.handle, done.exec_id)
        found = {adopted.handle: adopted for adopted in await driver.adopt()}
        assert done.handle not in found or found[done.handle].end is None
        assert live.handle in found

    check(harness, first)

    async def freed(driver: Any, cells: Cells) -> None:
        assert not {adopted.handle for adopted in await driver.adopt()} & set(handles)

    check(harness, freed)


def test_free_is_final_and_repeatable(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        started = await cells.launch("stubborn")
        await driver.free(started.handle)
        await driver.free(started.handle)
        for call in (driver.usage(started.handle), driver.wait(started.handle, started.exec_id)):
            with pytest.raises(AetherError) as refused:
                await call
            assert refused.value.code == "NO_SUCH_CELL"

    check(harness, step)


def test_every_end_is_told_once(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        told: list[str] = []
        driver.on_end(lambda end: told.append(end.exec_id))
        started, _ = await cells.run("ok")
        await driver.adopt()
        assert told.count(started.exec_id) == 1

    check(harness, step)


def test_a_program_that_is_not_there(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        order = cells.order("ok")
        missing = Order(order.cell_id, order.exec_id, msgspec.structs.replace(order.spec, argv=("/no/such/program",)))
        with pytest.raises(AetherError) as refused:
            await driver.launch(missing)
        assert refused.value.code == "CELL_FAILED" and "exec" in refused.value.message
        assert order.cell_id not in {found.cell_id for found in await driver.adopt()}

    check(harness, step)


def test_explain_starts_nothing(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        before = len(await driver.adopt())
        found = driver.explain(cells.order("ok").spec)
        assert found.lines and found.plan and found.plan_text.startswith(b"{")
        assert len(await driver.adopt()) == before

    check(harness, step)


def test_an_unmet_requirement_fails_closed(harness: Any) -> None:
    async def step(driver: Any, cells: Cells) -> None:
        missing = (await driver.fingerprint()).missing
        if not missing:
            pytest.skip("this host lacks nothing that could be required")
        word = next(iter(missing))
        with pytest.raises(AetherError) as refused:
            await cells.launch("ok", require=(word,))
        assert refused.value.code == "LEVEL_UNMET" and word in refused.value.message and refused.value.remedy

    check(harness, step)
