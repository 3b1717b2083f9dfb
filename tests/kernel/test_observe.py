"""Observation in the kernel: what a cell's processes do is shown, exactly and of no other; traces; nothing is left.

Needs root (eBPF); what remains without it is tested as an ordinary user.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aether.contract.activity import ActivityEvent
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.limits import CELL_EVENTS_BURST, CELL_EVENTS_PER_S
from aether.spawner.linux import kernel
from aether.spawner.linux.bpf import permission
from aether.substrate.cells.activity import ActivityLogs
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Started
from tests.support.machine import SLOW
from tests.support.spawnerprocess import ORDINARY, SYSTEM_PYTHON, Spawner, launch, processes, with_driver


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    lack = permission.lacking()
    if lack is not None:
        pytest.skip(f"{lack[0]}: {lack[1]}")
    running = Spawner(None)
    yield running
    ours = held(running)
    assert len(ours) >= 3
    running.close()
    assert gone(ours), "the programs outlive their spawner"


def loaded() -> set[int]:
    """Ids of all programs in this kernel (bpf(2), BPF_PROG_GET_NEXT_ID)."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[kernel.ARCH]
    found: set[int] = set()
    last = 0
    while True:
        following = ctypes.create_string_buffer(struct.pack("<III", last, 0, 0), 128)
        if libc.syscall(number, 11, following, 128) < 0:
            return found
        last = struct.unpack_from("<I", following, 4)[0]
        found.add(last)


def held(spawner: Spawner) -> set[int]:
    """Ids of the programs that the spawner holds, by themselves or by their links (proc(5), fdinfo)."""
    found = set()
    for entry in Path(f"/proc/{spawner.process.pid}/fdinfo").iterdir():
        try:
            rows = dict(line.split(":", 1) for line in entry.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if "prog_id" in rows:
            found.add(int(rows["prog_id"]))
    return found


async def ready(spawner: Spawner) -> None:
    """The observer loads its programs beside the start of the spawner."""
    for _ in range(500):
        if held(spawner):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the observer did not load its programs")


def gone(programs: set[int]) -> bool:
    """The kernel frees a program a moment after its last descriptor is closed."""
    deadline_s = time.monotonic() + 2
    while programs & loaded() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not programs & loaded()


async def events(spawner: Spawner, cell: str) -> list[ActivityEvent]:
    """All of a cell that is over."""
    logs = ActivityLogs(spawner.state / "logs/jobs")
    data = b"".join([chunk async for chunk in logs.read(cell, 0, lambda: True)])
    return [msgspec.json.decode(line, type=ActivityEvent) for line in data.splitlines()]


async def finish(driver: NativeDriver, spawner: Spawner, started: Started) -> list[ActivityEvent]:
    async with asyncio.timeout(30 * SLOW):
        await driver.wait(started.handle, started.exec_id)
        await driver.kill(started.handle)
        found = await events(spawner, started.handle)
    await driver.free(started.handle)
    return found


def of(found: list[ActivityEvent], kind: str) -> list[ActivityEvent]:
    return [event for event in found if event.kind == kind]


def test_a_job_shows_exactly_what_it_did(spawner: Spawner) -> None:
    """Three programs, one signal from a client, ends by code and by signal."""
    script = 'trap "exit 7" USR1; /bin/true; /bin/ls / > /dev/null; while :; do :; done'

    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        other = await asyncio.create_subprocess_exec("/bin/sh", "-c", "while :; do /bin/date > /dev/null; done")
        try:
            started = await launch(driver, script)
            await asyncio.sleep(0.3 * SLOW)
            await driver.signal(started.handle, started.exec_id, signal.SIGUSR1)
            found = await finish(driver, spawner, started)
        finally:
            other.kill()
            await other.wait()
        assert [event.kind for event in found] == ["exec", "exec", "exit", "exec", "exit", "signal", "exit", "ended"]
        assert [Path(event.path or "").name for event in of(found, "exec")] == ["sh", "true", "ls"]
        assert [event.comm for event in of(found, "exec")] == ["sh", "true", "ls"]
        first, second, third = of(found, "exec")
        assert (first.ppid, second.ppid, third.ppid) == (1, first.pid, first.pid)
        assert 1 < (first.pid or 0) < (second.pid or 0) < (third.pid or 0) < 100, "pids as the cell counts"
        assert first.host_pid != first.pid
        [sent] = of(found, "signal")
        assert (sent.signal, sent.pid, sent.sender, sent.sender_pid) == (signal.SIGUSR1, first.pid, "process", 1)
        assert [(event.pid, event.code) for event in of(found, "exit")] == [
            (second.pid, 0),
            (third.pid, 0),
            (first.pid, 7),
        ]
        times = [event.time_us for event in found if event.time_us]
        assert times == sorted(times)
        assert found[-1].count == 0

    with_driver(spawner, step)


def test_senders_and_deaths_by_signal(spawner: Spawner) -> None:
    script = "sleep 9 & sleep 0.1; kill -TERM $!; wait $!; sleep 9"

    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        started = await launch(driver, script)
        await asyncio.sleep(0.3 * SLOW)
        own = [event for event in await live(started.handle) if event.kind == "exec" and event.comm == "sleep"]
        os.kill(own[-1].host_pid or 0, signal.SIGINT)
        found = await finish(driver, spawner, started)
        assert [(e.signal, e.sender) for e in of(found, "signal")][:2] == [(15, "process"), (2, "outside")]
        assert of(found, "signal")[0].sender_comm == "sh" and of(found, "signal")[1].sender_comm is None
        ends = {event.signal: event.pid for event in of(found, "exit") if event.signal}
        assert set(ends) == {15, 2} and ends[2] == own[-1].pid != ends[15]

    async def live(cell: str) -> list[ActivityEvent]:
        logs = ActivityLogs(spawner.state / "logs/jobs")
        data = b"".join([chunk async for chunk in logs.read(cell, 0, None)])
        return [msgspec.json.decode(line, type=ActivityEvent) for line in data.splitlines()]

    with_driver(spawner, step)


def test_a_process_cannot_write_on_the_terminal_by_its_name(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        started = await launch(driver, "cp /bin/true \"$(printf 'e\\033[2J\\nx')\"; ./e*; true")
        found = await finish(driver, spawner, started)
        shown = [event for event in of(found, "exec") if (event.comm or "").startswith("e\\x1b")]
        assert [(e.comm, e.path) for e in shown] == [("e\\x1b[2J\\x0ax", "./e\\x1b[2J\\x0ax")]
        raw = (spawner.state / "logs/jobs" / started.handle / "events.jsonl").read_bytes()
        assert b"\x1b" not in raw and b"\\u001b" not in raw

    with_driver(spawner, step)


def test_a_storm_of_processes_is_bounded_and_others_are_heard(spawner: Spawner) -> None:
    """A cell that starts programs as fast as it can fills its own bucket; another cell's events are all there."""

    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        loop = "while :; do /bin/true & /bin/true & wait; done"
        storm = await launch(driver, f"({loop}) & ({loop}) & ({loop}) & {loop}")
        await asyncio.sleep(3)
        quiet = await launch(driver, "for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done")
        seen = await finish(driver, spawner, quiet)
        assert len(of(seen, "exec")) == 11 and len(of(seen, "exit")) == 11 and seen[-1].count == 0
        await driver.kill(storm.handle)
        found = await finish(driver, spawner, storm)
        kept = [event for event in found if event.kind in ("exec", "exit", "signal")]
        seconds = (kept[-1].time_us or 0) / 1e6 - (kept[0].time_us or 0) / 1e6
        assert len(kept) <= CELL_EVENTS_BURST + (seconds + 1) * CELL_EVENTS_PER_S
        if found[-1].count:
            assert of(found, "dropped"), "what was dropped is said where it was dropped"
        alive = [
            pid for pid in processes(str(spawner.state)) if b"observer" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(alive) == 1 and Path(f"/proc/{alive[0]}").stat().st_uid != 0

    with_driver(spawner, step)


def test_want_of_memory_is_told(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        if "cgroup-memory" in driver.facts.missing:
            pytest.skip("memory is not limited here")
        script = "x=$(head -c 200000000 /dev/zero | tr '\\0' a); echo ${#x}"
        started = await launch(driver, script, limits=Limits(memory_bytes=32 << 20))
        found = await finish(driver, spawner, started)
        assert of(found, "oom") and any(e.sender == "kernel" and e.signal == 9 for e in of(found, "signal"))

    with_driver(spawner, step)


def test_time_lost_to_the_quota_is_told(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        if "cgroup-cpu" in driver.facts.missing:
            pytest.skip("CPU is not limited here")
        # 5% of a CPU: a machine as busy as that gives more to anybody
        started = await launch(driver, "timeout 1 sh -c 'while :; do :; done'; true", limits=Limits(cpu_millis=50))
        found = await finish(driver, spawner, started)
        [lost] = of(found, "throttle")
        assert lost.count is not None and 50_000 < lost.count < 20_000_000

    with_driver(spawner, step)


def test_a_trace_counts_the_calls_of_one_cell(spawner: Spawner) -> None:
    """`umask` is called by nobody else; calls of other cells and of the host are not counted."""
    code = "import os, time\nwhile True:\n os.umask(0o22)\n time.sleep(0.001)"

    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        logs = ActivityLogs(spawner.state / "logs/jobs")
        started = await launch(driver, f"exec python3 -c '{code}'")
        other = await launch(driver, "while :; do cd /; done")
        await asyncio.sleep(0.5)
        before = held(spawner)
        task = asyncio.ensure_future(driver.trace(started.handle, 400))
        await asyncio.sleep(0.1)
        tracing = held(spawner) - before
        assert len(tracing) == 1
        with pytest.raises(AetherError, match="being traced"):
            await driver.trace(started.handle, 10)
        await task
        assert held(spawner) == before and gone(tracing)
        trace = logs.trace(started.handle)
        counted = {call.name: call.count for call in trace.calls}
        assert 50 < counted["umask"] < 1_000 and "chdir" not in counted
        assert sum(counted.values()) == trace.total and 400 <= trace.duration_ms < 2_000
        umask = [call for call in trace.last if call.name == "umask"]
        assert umask and umask[0].arguments[0] == "0x12" and umask[0].comm == "python3" and umask[0].pid == 2
        await driver.free(started.handle)
        await driver.free(other.handle)

    with_driver(spawner, step)


def test_a_trace_ends_with_its_cell_and_with_its_caller(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        started = await launch(driver, "while :; do cd /; done")
        task = asyncio.ensure_future(driver.trace(started.handle, 30_000))
        await asyncio.sleep(0.2)
        await driver.kill(started.handle)
        async with asyncio.timeout(5):
            await task
        assert ActivityLogs(spawner.state / "logs/jobs").trace(started.handle).total > 0
        await driver.free(started.handle)
        with pytest.raises(AetherError, match="NO_SUCH_CELL"):
            await driver.trace(started.handle, 10)
        abandoned, before = await launch(driver, "while :; do cd /; done"), held(spawner)
        task = asyncio.ensure_future(driver.trace(abandoned.handle, 30_000))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert held(spawner) == before
        await driver.free(abandoned.handle)

    with_driver(spawner, step)


def test_an_observer_that_dies_is_replaced(spawner: Spawner) -> None:
    """The kernel's ring outlives it: the next one goes on where it was."""

    def observer() -> int:
        found = processes(str(spawner.state))
        [pid] = [pid for pid in found if b"spawner.observer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return pid

    async def step(driver: NativeDriver) -> None:
        await ready(spawner)
        started = await launch(driver, "sleep 0.3; /bin/true; sleep 1; /bin/ls / > /dev/null")
        await asyncio.sleep(0.1)
        old = observer()
        os.kill(old, signal.SIGKILL)
        found = await finish(driver, spawner, started)
        assert [Path(e.path or "").name for e in of(found, "exec")] == ["sh", "sleep", "true", "sleep", "ls"]
        assert observer() != old

    with_driver(spawner, step)


def test_without_permission_pid_1_still_tells() -> None:
    """An ordinary user: the reason is given, and what PID 1 knows is there."""
    if os.geteuid() != 0:
        uid = None
    elif not Path(SYSTEM_PYTHON).exists():
        pytest.skip("no system Python that an ordinary user may run")
    else:
        uid = ORDINARY
    ordinary = Spawner(uid)

    async def step(driver: NativeDriver) -> None:
        assert "bpf" in driver.facts.missing and driver.facts.missing["bpf"].remedy
        started = await launch(driver, "trap 'exit 3' USR1; while :; do :; done")
        await asyncio.sleep(0.3 * SLOW)
        await driver.signal(started.handle, started.exec_id, signal.SIGUSR1)
        with pytest.raises(AetherError, match="LEVEL_UNMET"):
            await driver.trace(started.handle, 10)
        found = await finish(driver, ordinary, started)
        assert [event.kind for event in found] == ["exec", "signal", "exit", "ended"]
        assert (found[1].signal, found[1].sender, found[2].code) == (signal.SIGUSR1, "outside", 3)

    try:
        with_driver(ordinary, step)
    finally:
        ordinary.close()
