"""Cells that live until they are freed: every driver's guests come, go, are stopped and talked to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aether.contract import ids
from aether.contract.cells import CellSpec, ExecEnd, Limits
from aether.contract.errors import AetherError
from aether.contract.limits import MIB
from aether.substrate.cells.drivers.port import Started
from tests.conformance.cell_driver.conftest import NativeHarness

Step = Callable[[Any, Any], Awaitable[None]]


class Guests:
    """One allocated cell and what is started in it."""

    def __init__(self, harness: Any, driver: Any, started: Started) -> None:
        self._harness, self._driver = harness, driver
        self.cell = started.handle
        self.started = started

    async def start(self, argv: tuple[str, ...], stdio: str = "logs", **limits: int) -> str:
        exec_id = ids.new(ids.EXECUTABLE)
        await self._driver.start_exec(self.cell, exec_id, CellSpec(argv=argv, limits=Limits(**limits)), stdio)
        return exec_id

    async def run(self, program: str) -> ExecEnd:
        exec_id = await self.start(self._harness.argv(program))
        end: ExecEnd = await self._driver.wait(self.cell, exec_id)
        await self._driver.acknowledge(self.cell, exec_id)
        return end


def check(harness: Any, step: Step) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), harness.driver() as driver:
            cell_id = ids.new(ids.CELL)
            spec = CellSpec(argv=(), limits=Limits(memory_bytes=64 * MIB, pids=64))
            guests = Guests(harness, driver, await driver.allocate(cell_id, spec))
            try:
                await step(driver, guests)
            finally:
                await driver.free(guests.cell)
            assert cell_id not in {found.cell_id for found in await driver.adopt()}

    asyncio.run(main())


def native_only(harness: Any) -> None:
    if not isinstance(harness, NativeHarness):
        pytest.skip("the double has no processes of its own")


def test_guests_share_files_and_the_cell_outlives_them(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        assert guests.started.exec_id == "" and guests.started.report.level in ("cell", "process")
        assert (await guests.run("write")).exit.code == 0
        assert (await guests.run("exit-3")).exit.code == 3
        found = await driver.collect(guests.cell, ["out/*.txt"])
        assert {file.path for file in found.files} >= {"out/1.txt", "out/2.txt"}
        for _ in range(70):  # more than a cell may have at once: those that were acknowledged are forgotten
            assert (await guests.run("ok")).exit.code == 0

    check(harness, step)


def test_allocating_again_finds_the_cell(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        again = await driver.allocate(str(guests.cell), CellSpec(argv=(), limits=Limits(memory_bytes=64 * MIB)))
        assert (again.handle, again.exec_id) == (guests.cell, "")

    check(harness, step)


def test_a_guest_is_adopted_with_its_cell(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        lives = await guests.start(harness.argv("sleep"))
        ended = await guests.start(harness.argv("exit-3"))
        await driver.wait(guests.cell, ended)
        async with harness.driver() as second:
            (found,) = [each for each in await second.adopt() if each.cell_id == str(guests.cell)]
            assert (found.exec_id, found.end, found.gone) == ("", None, None)
            assert found.execs[lives] is None and found.execs[ended].exit.code == 3
            assert second.has_exec(guests.cell, lives)
        await driver.acknowledge(guests.cell, ended)
        assert not driver.has_exec(guests.cell, ended)

    check(harness, step)


def test_stopping_one_leaves_the_others(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        stays, goes, stubborn = [await guests.start(harness.argv(p)) for p in ("sleep", "on-term-5", "stubborn")]
        await asyncio.sleep(0.2)
        await driver.stop_exec(guests.cell, goes, 5_000)
        await driver.stop_exec(guests.cell, stubborn, 100)
        assert (await driver.wait(guests.cell, goes)).exit.code == 5
        assert (await driver.wait(guests.cell, stubborn)).exit.signal == 9
        assert (await guests.run("ok")).exit.code == 0
        assert driver.has_exec(guests.cell, stays)

    check(harness, step)


def test_files_are_put_listed_and_read(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        for data in (b"first", b"second"):
            fd = os.memfd_create("source")
            os.write(fd, data)
            await driver.put(guests.cell, "deep/in.txt", fd, False)
            os.close(fd)
        fd = await driver.open(guests.cell, "deep/in.txt")
        assert os.pread(fd, 100, 0) == b"second"
        os.close(fd)
        listing = await driver.files(guests.cell, "")
        assert [(entry.name, entry.kind) for entry in listing.entries] == [("deep", "directory")]
        (entry,) = (await driver.files(guests.cell, "deep")).entries
        assert (entry.name, entry.kind, entry.size_bytes) == ("in.txt", "file", 6)
        for missing in ("nothing", "deep/in.txt"):
            if missing == "deep/in.txt" and not isinstance(harness, NativeHarness):
                continue
            with pytest.raises(AetherError) as caught:
                await driver.files(guests.cell, missing)
            assert caught.value.code == "NOT_FOUND"

    check(harness, step)


def test_a_frozen_cell_stands_still_and_is_freed_all_the_same(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        exec_id = await guests.start(harness.argv("on-term-5"))
        try:
            await driver.freeze(guests.cell, True)
        except AetherError as error:
            pytest.skip(error.message)
        await driver.freeze(guests.cell, False)
        await asyncio.sleep(0.1)
        await driver.signal(guests.cell, exec_id, 15)
        assert (await driver.wait(guests.cell, exec_id)).exit.code == 5
        await guests.start(harness.argv("sleep"))
        await driver.freeze(guests.cell, True)

    check(harness, step)


def test_stop_reaches_what_left_the_session(harness: Any) -> None:
    native_only(harness)
    marker = f"7{os.getpid()}"

    async def step(driver: Any, guests: Guests) -> None:
        tree = f"setsid sleep {marker}1 & (trap '' TERM; sleep {marker}2) & sleep {marker}3"
        exec_id = await guests.start(("sh", "-c", tree))
        other = await guests.start(("sh", "-c", f"sleep {marker}4; true"))
        await until(lambda: len(alive(marker)) == 4)
        await driver.stop_exec(guests.cell, exec_id, 100)
        await driver.wait(guests.cell, exec_id)
        await until(lambda: alive(marker) == {f"{marker}4"})
        assert driver.has_exec(guests.cell, other)

    check(harness, step)


def test_an_executable_that_runs_too_long_ends_alone(harness: Any) -> None:
    async def step(driver: Any, guests: Guests) -> None:
        exec_id = await guests.start(harness.argv("sleep"), timeout_ms=200, grace_ms=100)
        assert (await driver.wait(guests.cell, exec_id)).exit.timed_out
        assert (await guests.run("ok")).exit.code == 0

    check(harness, step)


def test_a_terminal_is_one(harness: Any) -> None:
    native_only(harness)

    async def step(driver: Any, guests: Guests) -> None:
        script = (
            "test -t 0 && test -t 1 && test -t 2 || exit 9; stty size; read line; echo got $line; stty size; exit 4"
        )
        exec_id = await guests.start(("sh", "-c", script), "tty")
        kind, fd = await driver.terminal(guests.cell, exec_id)
        assert kind == "tty"
        await said(fd, b"0 0\r\n")
        await driver.window(guests.cell, exec_id, 33, 101)
        os.write(fd, b"word\n")
        await said(fd, b"got word\r\n33 101\r\n")
        assert (await driver.wait(guests.cell, exec_id)).exit.code == 4
        os.close(fd)

    check(harness, step)


def test_standard_input_is_handed_out_once(harness: Any) -> None:
    native_only(harness)

    async def step(driver: Any, guests: Guests) -> None:
        exec_id = await guests.start(("sh", "-c", "cat > got.txt"), "pipe")
        kind, fd = await driver.terminal(guests.cell, exec_id)
        assert kind == "pipe"
        with pytest.raises(AetherError) as caught:
            await driver.terminal(guests.cell, exec_id)
        assert caught.value.code == "NOT_READY"
        os.write(fd, b"through the pipe")
        os.close(fd)
        assert (await driver.wait(guests.cell, exec_id)).exit.code == 0
        found = await driver.open(guests.cell, "got.txt")
        assert os.pread(found, 100, 0) == b"through the pipe"
        os.close(found)

    check(harness, step)


def test_guest_usage_is_its_own_for_cpu_and_the_cells_for_memory(harness: Any) -> None:
    native_only(harness)

    async def step(driver: Any, guests: Guests) -> None:
        burn = await guests.start(("sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"))
        busy = await driver.wait(guests.cell, burn)
        idle = await guests.run("ok")
        assert (busy.usage.cpu_user_us or 0) > 5_000 > (idle.usage.cpu_user_us or 0)
        assert busy.usage.basis["cpu_user_us"] == busy.usage.basis["wall_us"] == "measured"
        assert idle.usage.basis.get("memory_peak_bytes", "apportioned") == "apportioned"

    check(harness, step)


def test_cpu_that_nobody_waited_for_is_charged_to_who_ends_next(harness: Any) -> None:
    """A daemon that lost its parent, and children of one that ignores their ends: wait4(2) tells of neither."""
    native_only(harness)
    burn = "i=0; while [ $i -lt 250000 ]; do i=$((i+1)); done"

    async def step(driver: Any, guests: Guests) -> None:
        if (await driver.usage(guests.cell)).cpu_user_us is None:
            pytest.skip("no cgroup counts here")
        keeps = await guests.start(("sh", "-c", f"{burn}; sleep 30"))
        left = await guests.start(("sh", "-c", f"(setsid sh -c '{burn}; touch done' &)"))
        assert ((await driver.wait(guests.cell, left)).usage.cpu_user_us or 0) < 100_000
        ends = await driver.wait(
            guests.cell, await guests.start(("sh", "-c", "while [ ! -e done ]; do sleep 0.01; done"))
        )
        assert (ends.usage.cpu_user_us or 0) > 100_000 and ends.usage.basis["cpu_user_us"] == "apportioned"
        code = "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        code += f"try: os.waitpid(os.spawnv(os.P_NOWAIT, '/bin/sh', ['sh', '-c', '{burn}']), 0)\n"
        code += "except ChildProcessError: pass"
        hidden = await driver.wait(guests.cell, await guests.start(("python3", "-IS", "-c", code)))
        assert (hidden.usage.cpu_user_us or 0) > 100_000 and hidden.usage.basis["cpu_user_us"] == "apportioned"
        await driver.stop_exec(guests.cell, keeps, 0)
        own = await driver.wait(guests.cell, keeps)
        assert own.usage.basis["cpu_user_us"] == "measured" and (own.usage.cpu_user_us or 0) > 100_000
        whole = (await driver.usage(guests.cell)).cpu_user_us or 0
        told = sum(each.usage.cpu_user_us or 0 for each in (ends, hidden, own))
        assert told <= whole + 100_000, "nothing is charged twice"

    check(harness, step)


def test_a_cell_killed_from_outside_is_told(harness: Any) -> None:
    native_only(harness)

    async def step(driver: Any, guests: Guests) -> None:
        gone: list[tuple[str, str | None]] = []
        driver.on_gone(lambda cell, reason: gone.append((cell, reason)))
        marker = f"8{os.getpid()}"
        exec_id = await guests.start(("sh", "-c", f"sleep {marker}; true"))
        await until(lambda: bool(alive(marker)))
        init = pid1_of(marker)
        if init is None:
            pytest.skip("the cell's PID 1 is not to be seen from here")
        os.kill(init, 9)
        end = await driver.wait(guests.cell, exec_id)
        assert (end.exit.signal, end.exit.reason) == (9, "cell-died")
        await until(lambda: gone == [(str(guests.cell), None)] or bool(gone))

    check(harness, step)


def test_the_network_is_shared_only_when_asked_and_processes_never(harness: Any) -> None:
    native_only(harness)
    if os.geteuid() != 0:
        pytest.skip("without root the cell's user namespace owns no part of the host's network anyway")

    async def main() -> None:
        async with asyncio.timeout(60), harness.driver() as driver:
            seen = {}
            for isolated in (True, False):
                cell_id = ids.new(ids.CELL)
                spec = CellSpec(argv=(), limits=Limits(memory_bytes=64 * MIB), isolate_network=isolated)
                guests = Guests(harness, driver, await driver.allocate(cell_id, spec))
                try:
                    assert ("netns" in guests.started.report.enforced) is isolated
                    exec_id = await guests.start(("sh", "-c", "readlink /proc/self/ns/net > ns"))
                    assert (await driver.wait(guests.cell, exec_id)).exit.code == 0
                    fd = await driver.open(guests.cell, "ns")
                    seen[isolated] = os.pread(fd, 100, 0).decode().strip()
                    os.close(fd)
                finally:
                    await driver.free(guests.cell)
            ours = os.readlink("/proc/self/ns/net")  # noqa: PTH115 - a name, no path
            assert seen[False] == ours != seen[True]
            with pytest.raises(AetherError) as caught:
                await driver.allocate(ids.new(ids.CELL), CellSpec(argv=(), isolate_process=False))
            assert caught.value.code == "LEVEL_UNMET"

    asyncio.run(main())


# ---- looking from outside


def alive(marker: str) -> set[str]:
    """The arguments of living `sleep`s that begin with `marker`."""
    return {argv[1] for argv, _ in sleeps(marker)}


def sleeps(marker: str) -> list[tuple[list[str], int]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if argv[0].endswith("sleep") and len(argv) > 1 and argv[1].startswith(marker):
                found.append((argv, int(entry.name)))
    return found


def pid1_of(marker: str) -> int | None:
    """The host pid of the init above a marked process."""
    ((_, pid),) = sleeps(marker)
    while pid > 1:
        status = dict(
            row.split(":\t", 1) for row in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in row
        )
        if status["NSpid"].split()[-1] == "1" and len(status["NSpid"].split()) > 1:
            return pid
        pid = int(status["PPid"])
    return None


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)


async def said(fd: int, wanted: bytes) -> None:
    """Reads on until the terminal showed `wanted` (after the echo of what was typed)."""
    seen = b""
    os.set_blocking(fd, False)
    async with asyncio.timeout(10):
        while wanted not in seen:
            try:
                seen += os.read(fd, 4096)
            except BlockingIOError:
                await asyncio.sleep(0.01)
