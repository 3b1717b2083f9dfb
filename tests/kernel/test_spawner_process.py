"""The spawner as a process, with real cells: ends, bounds, deaths, and that nothing is left behind.

Run as root it is tested twice: as root with a block of uids per cell, and as an ordinary user (uid 64999) with the
system's Python and a copy of the source, because the interpreter at hand may lie where only root may read.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aether.contract import ids
from aether.contract.cellplan import LandlockRule
from aether.contract.cells import CellSpec, ExecEnd, Limits
from aether.contract.errors import AetherError
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Adopted, Handle, Order, Started
from aether.substrate.cells.logs import JobLogs
from tests.support import subids
from tests.support.machine import SLOW
from tests.support.spawnerprocess import (
    MIB,
    ORDINARY,
    SYSTEM_PYTHON,
    Spawner,
    assert_nothing_left,
    launch,
    processes,
    run,
    sessions,
    with_driver,
)


@pytest.fixture(params=["own", "ordinary", "lent"])
def spawner(request: pytest.FixtureRequest) -> Iterator[Spawner]:
    uid = None
    if request.param == "lent":
        subids.needed()
    if request.param != "own":
        if os.geteuid() != 0:
            pytest.skip("this process is an ordinary user already")
        if not Path(SYSTEM_PYTHON).exists():
            pytest.skip("no system Python that an ordinary user may run")
        uid = ORDINARY
    running = Spawner(uid, lent=request.param == "lent")
    yield running
    running.close()


def enforced(driver: NativeDriver, word: str) -> None:
    if word in driver.facts.missing:
        pytest.skip(f"{word} is not enforced here: {driver.facts.missing[word].reason}")


def test_the_report_is_what_the_kernel_shows(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        started, end = await run(driver, "exit 4")
        assert end.exit.code == 4 and started.report.level == driver.facts.level
        for word in ("seccomp", "no_new_privs", "no_capabilities", "landlock"):
            assert word in started.report.enforced or word in started.report.missing
        if driver.facts.is_root:
            assert {"userns", "pidns", "netns", "cell"} <= set(started.report.enforced)
            assert started.report.uid is not None and started.report.uid >= 0x7000_0000
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_kill_takes_the_whole_tree(spawner: Spawner) -> None:
    """Double-forked, in other sessions, deaf to SIGTERM."""
    marker = "aether-test-" + os.urandom(8).hex()

    async def step(driver: NativeDriver) -> None:
        stubborn = f"trap '' TERM HUP INT; while :; do sleep 1; done; : {marker}"
        script = f'(setsid sh -c "{stubborn}" &); (setsid setsid sh -c "{stubborn}" & ); {stubborn}'
        started = await launch(driver, script)
        for _ in range(200 * SLOW):
            if sessions(marker) >= 3:
                break
            await asyncio.sleep(0.02)
        assert sessions(marker) >= 3
        await driver.kill(started.handle)
        assert processes(marker) == []
        end = await driver.wait(started.handle, started.exec_id)
        assert end.exit.signal == signal.SIGKILL and end.exit.reason == "killed"
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_what_outlives_the_program_is_killed_with_it(spawner: Spawner) -> None:
    marker = "aether-test-" + os.urandom(8).hex()

    async def step(driver: NativeDriver) -> None:
        started, end = await run(driver, f"(setsid sh -c 'sleep 60; : {marker}' &); sleep 0.2; exit 0")
        assert end.exit.code == 0
        for _ in range(100):
            if not processes(marker):
                break
            await asyncio.sleep(0.01)
        assert processes(marker) == []
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_out_of_memory_is_visible(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        enforced(driver, "cgroup-memory")
        program = 'python3 -c "x = bytearray(300 << 20)"'
        started, end = await run(driver, f"exec {program}", limits=Limits(memory_bytes=48 * MIB))
        assert end.exit.oom_killed and end.exit.signal == signal.SIGKILL
        assert end.usage.oom_kills and end.usage.memory_peak_bytes and end.usage.memory_peak_bytes <= 48 * MIB
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_memory_is_bounded_by_rlimit_where_there_is_no_cgroup(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        if "cgroup-memory" not in driver.facts.missing:
            pytest.skip("a cgroup bounds memory here")
        started, end = await run(
            driver, 'exec python3 -c "x = bytearray(300 << 20)"', limits=Limits(memory_bytes=100 * MIB)
        )
        assert end.exit.code == 1
        assert "RLIMIT_DATA" in started.report.missing["cgroup-memory"]
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_fork_bomb_is_bounded_and_others_are_unharmed(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        if "cgroup-pids" in driver.facts.missing and "userns" in driver.facts.missing:
            pytest.skip("nothing bounds processes here")
        script = "f() { while :; do (sleep 5 &) ; done; }; f 2>/dev/null"
        bomb = await launch(driver, script, limits=Limits(pids=20, cpu_millis=300))
        await asyncio.sleep(0.5)
        neighbour, end = await run(driver, "echo fine")
        assert end.exit.code == 0
        usage = await driver.usage(bomb.handle)
        if usage.pids_peak is not None:
            assert usage.pids_peak <= 21
        await driver.kill(bomb.handle)
        for handle in (bomb.handle, neighbour.handle):
            await driver.free(handle)

    with_driver(spawner, step)


def test_cpu_is_measured(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        code = "import time\nwhile time.process_time() < 0.3: pass"
        started, end = await run(driver, f'exec python3 -Sc "{code}"')
        used = (end.usage.cpu_user_us or 0) + (end.usage.cpu_system_us or 0)
        assert 290_000 <= used <= 900_000
        assert end.usage.wall_us is not None and end.usage.wall_us >= 290_000
        assert end.usage.basis["cpu_user_us"] == "measured"
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_deadline(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        script = "trap '' TERM; while :; do sleep 0.01; done"
        started, end = await run(driver, script, limits=Limits(timeout_ms=200 * SLOW, grace_ms=100))
        assert end.exit.timed_out and end.exit.signal == signal.SIGKILL and end.exit.reason == "timed-out"
        assert end.usage.wall_us is not None and 300_000 <= end.usage.wall_us < 3_000_000 * SLOW
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_flood_is_bounded_and_others_are_unharmed(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        flood = await launch(driver, "exec yes", limits=Limits(cpu_millis=500))
        times = []
        for _ in range(10):
            began = time.monotonic()
            started, end = await run(driver, "echo fine")
            times.append(time.monotonic() - began)
            assert end.usage.stdout_bytes == 5
            await driver.free(started.handle)
        assert sorted(times)[5] < 1.0
        await asyncio.sleep(1.0)
        await driver.kill(flood.handle)
        end = await driver.wait(flood.handle, flood.exec_id)
        assert end.usage.stdout_bytes is not None and end.usage.stdout_bytes < 64 * MIB
        directory = spawner.state / "logs/jobs" / str(flood.handle)
        kept = sum(file.stat().st_blocks * 512 for file in directory.iterdir())
        assert kept < 8 * MIB
        await driver.free(flood.handle)

    with_driver(spawner, step)


def test_logs_are_followed_while_they_are_written(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        started = await launch(driver, f"for i in 1 2 3; do echo $i; sleep {0.2 * SLOW}; done; echo done >&2")
        logs = JobLogs(spawner.state / "logs/jobs")
        chunks = [c async for c in logs.read(str(started.handle), started.exec_id, "all", 0, True)]
        assert b"".join(chunks) == b"1\n2\n3\ndone\n" and len(chunks) >= 3
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_killed_spawner_takes_its_cells_and_the_next_one_sweeps(spawner: Spawner) -> None:
    marker = "aether-test-" + os.urandom(8).hex()

    async def first(driver: NativeDriver) -> None:
        await launch(driver, f"(setsid sh -c 'sleep 60; : {marker}' &); echo x > file; sleep 60; : {marker}")
        for _ in range(200):
            if len(processes(marker)) >= 2:
                break
            await asyncio.sleep(0.02)
        spawner.kill()

    with_driver(spawner, first)
    for _ in range(200):
        if not processes(marker):
            break
        time.sleep(0.01)
    if not _has_pid_namespace(spawner):
        pytest.skip("without a pid namespace only the next spawner can find grandchildren")
    assert processes(marker) == []
    dead = spawner.instances
    assert len(dead) == 1
    assert list((spawner.state / "cells" / dead[0]).iterdir())
    spawner.start()

    async def second(driver: NativeDriver) -> None:
        assert await driver.adopt() == []
        for _ in range(200):
            if len(spawner.instances) == 1:
                break
            await asyncio.sleep(0.01)

    with_driver(spawner, second)
    assert spawner.instances != dead and len(spawner.instances) == 1
    assert not (spawner.state / "cells" / dead[0]).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/aether-{dead[0]}*"))


def _has_pid_namespace(spawner: Spawner) -> bool:
    return os.geteuid() == 0 or Path("/proc/sys/user/max_user_namespaces").exists()


def test_reconnect_finds_the_exits_that_were_missed(spawner: Spawner) -> None:
    handles: list[Started] = []

    async def first(driver: NativeDriver) -> None:
        handles.append(await launch(driver, "sleep 0.2; echo after; exit 9"))
        handles.append(await launch(driver, "sleep 60"))

    with_driver(spawner, first)
    time.sleep(0.6 * SLOW)

    async def second(driver: NativeDriver) -> None:
        told: list[ExecEnd] = []
        driver.on_end(told.append)
        found = {adopted.handle: adopted for adopted in await driver.adopt()}
        ended, lives = found[handles[0].handle], found[handles[1].handle]
        assert ended.end is not None and ended.end.exit.code == 9 and ended.end.usage.stdout_bytes == 6
        assert lives.end is None and isinstance(lives, Adopted)
        for started in handles:
            await driver.free(started.handle)

    with_driver(spawner, second)


def test_a_connection_lost_in_the_middle_is_taken_up_again(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        told: list[ExecEnd] = []
        driver.on_end(told.append)
        started = await launch(driver, "sleep 0.3; exit 6")
        waiting = asyncio.ensure_future(driver.wait(started.handle, started.exec_id))
        await asyncio.sleep(0)
        link = driver._connector.link
        assert link is not None
        with spawner.acting():
            link.close()
            assert (await waiting).exit.code == 6
        assert len(told) == 1
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_hostile_outputs_are_refused(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        script = """
            ln -s /etc/passwd link; ln -s / root; mkfifo fifo; echo x > one; ln one two
            printf x > "$(printf 'bad\\377name')"; truncate -s 900G sparse 2>/dev/null || truncate -s 2G sparse
            mkdir -p deep/a/b; echo ok > deep/a/b/good; chmod 000 one
        """
        started, end = await run(driver, script, limits=Limits(file_bytes=1 << 41))
        assert end.exit.code == 0
        found = await driver.collect(started.handle, ["**"])
        assert [file.path for file in found.files] == ["deep/a/b/good"]
        for name in ("link", "root", "fifo", "one", "two", "sparse"):
            assert name in found.refused, name
        for path in ("link", "root/etc/passwd", "fifo", "two", "../../../etc/passwd"):
            with pytest.raises(AetherError) as refused:
                os.close(await driver.open(started.handle, path))
            assert refused.value.code == "OUTPUT_REFUSED"
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_a_channel_joins_the_authority_and_the_program(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        started = await launch(driver, "read line <&3; echo got $line >&3", channel=True)
        assert started.channel_fd is not None
        with socket.socket(fileno=started.channel_fd) as channel:
            channel.sendall(b"hello\n")
            channel.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(channel, 100) == b"got hello\n"
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_terminated_spawner_leaves_nothing(spawner: Spawner) -> None:
    marker = "aether-test-" + os.urandom(8).hex()

    async def step(driver: NativeDriver) -> None:
        for _ in range(3):
            await launch(driver, f"trap '' TERM; echo x > file; sleep 60; : {marker}")

    with_driver(spawner, step)
    named = spawner.instances
    spawner.process.terminate()
    assert spawner.process.wait(20) == 0
    assert processes(marker) == []
    assert_nothing_left(spawner, named)
    assert spawner.instances == []


def test_only_one_spawner_per_state(spawner: Spawner) -> None:
    command = [spawner._python, "-m", "aether.spawner.main", "--state", str(spawner.state)]
    ids_of: dict[str, Any] = {} if spawner.uid is None else {"user": spawner.uid, "group": spawner.uid}
    second = subprocess.run(command, env=spawner._env, capture_output=True, timeout=20, **ids_of)
    assert second.returncode == 1 and b"another spawner" in second.stderr


def test_strangers_may_not_connect(spawner: Spawner) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become a stranger")
    path = spawner.state / "run/spawner.sock"
    path.chmod(0o777)
    for directory in (spawner.directory, spawner.state, spawner.state / "run"):
        directory.chmod(0o755)
    code = f"""
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect({str(path)!r})
s.settimeout(5)
try:
    s.send(b'{{"id": 1, "op": "cell.list"}}')
    print(len(s.recv(1000)))
except OSError:
    print(0)
"""
    out = subprocess.run([SYSTEM_PYTHON, "-Ic", code], user=64_998, group=64_998, capture_output=True, cwd="/")
    assert out.stdout == b"0\n", out


def test_handle_is_opaque(spawner: Spawner) -> None:
    async def step(driver: NativeDriver) -> None:
        with pytest.raises(AetherError) as refused:
            await driver.usage(Handle(ids.new(ids.CELL)))
        assert refused.value.code == "NO_SUCH_CELL"

    with_driver(spawner, step)


def test_process_level_without_namespaces_dies_whole_too(spawner: Spawner) -> None:
    """No pid namespace, and for an ordinary user no cgroup: what double-forked comes to the spawner and is killed."""
    marker = "aether-test-" + os.urandom(8).hex()

    async def step(driver: NativeDriver) -> None:
        driver._facts = replace(driver.facts, level="process", namespaces=(), root=(), landlock_rules=HOST_RULES)
        stubborn = f"trap '' TERM; while :; do sleep 1; done; : {marker}"
        beside = f"{marker[::-1]}-neighbour"
        neighbour = await launch(driver, f"(setsid sh -c 'sleep 60; : {beside}' &); sleep 60")
        started = await launch(driver, f'(setsid sh -c "{stubborn}" &); (setsid setsid sh -c "{stubborn}" &); sleep 60')
        assert started.report.level == "process" and "cell" not in started.report.enforced
        for _ in range(200 * SLOW):
            if sessions(marker) >= 3 and processes(beside):
                break
            await asyncio.sleep(0.02)
        await driver.kill(started.handle)
        assert processes(marker) == [] and processes(beside)
        await driver.free(started.handle)
        await driver.free(neighbour.handle)
        assert processes(beside) == []

    with_driver(spawner, step)


HOST_RULES = tuple(
    LandlockRule(path, ("read", "execute", "write")) for path in ("/usr", "/proc", "/dev") if Path(path).is_dir()
) + tuple(LandlockRule(path, ("read", "execute")) for path in ("/bin", "/lib", "/lib64") if Path(path).is_dir())


def test_the_interpreter_of_this_installation_runs_in_a_cell(spawner: Spawner) -> None:
    if spawner.uid is not None:
        pytest.skip("an ordinary user may not read this interpreter")

    async def step(driver: NativeDriver) -> None:
        cell_id = ids.new(ids.CELL)
        installed = ", msgspec, numpy, aether.contract.cells" if msgspec.__file__.startswith(sys.prefix) else ""
        code = f"import aether.contract.cellplan, asyncio, sqlite3{installed}; print('fine')"
        spec = CellSpec(argv=(sys.executable, "-c", code), env={"OMP_NUM_THREADS": "1"})
        started = await driver.launch(Order(cell_id, "exec" + cell_id[4:], spec))
        end = await driver.wait(started.handle, started.exec_id)
        log = JobLogs(spawner.state / "logs/jobs").open(cell_id, started.exec_id).read("all", 0)
        assert end.exit.code == 0 and log.data == b"fine\n", log.data
        await driver.free(started.handle)

    with_driver(spawner, step)


def test_an_orphaned_spawner_ends(tmp_path: Path) -> None:
    """Its parent is killed: it kills its cells, cleans up and gives the state directory free."""
    command = [sys.executable, "-m", "aether.spawner.main", "--state", str(tmp_path)]
    code = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 15 * SLOW
        while not (tmp_path / "run/spawner.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.kill()
    while processes(str(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (tmp_path / "run/spawner.sock").exists()
    assert (tmp_path / "cells/.instances").read_text() == ""
