"""The launcher alone: /bin/true with everything on, cold and from the pool, and a Python job, beside their peers.

`aether ...` goes through the spawner's socket, from the request to the word of the exit with all output kept;
`executor cold` is the native executor called directly, cgroups made for it: what bwrap does, and no more. Interleaved.
The pooled cell and the interpreter are given time to stand before they are asked for: this is what a caller waits.
`sustained` is the other question: launches one after the other and four at a time, without a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from aether.contract.cellplan import ExecSpec, Plan, parse_plan, placed
from aether.contract.cells import CellSpec, Interpreter
from aether.spawner.linux import initwire
from aether.spawner.linux.cgroup import CgroupHandle
from aether.spawner.linux.cgroup_host import open_driver
from aether.spawner.linux.cgroup_limits import CgroupLimits
from aether.spawner.linux.executor import Attach
from aether.spawner.linux.native import NativeExecutor
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Handle, Order
from aether.substrate.cells.plan import cgroup_limits
from bench import harness
from bench.cells import spawn_and_wait
from tests.support import machine

BWRAP = (
    "--unshare-user", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--die-with-parent",
)  # fmt: skip
PAUSE_S = 0.06
"""An interpreter is started within this time, a cell prepared well before."""
_numbers = itertools.count(1)


@contextmanager
def spawner() -> Iterator[Path]:
    """A spawner of its own; the path of its socket."""
    state = Path(tempfile.mkdtemp(prefix="aether-bench-"))
    process = subprocess.Popen([sys.executable, "-m", "aether.spawner.main", "--state", str(state)])
    try:
        while not (state / "run/spawner.sock").exists():
            time.sleep(0.02)
        yield state / "run/spawner.sock"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(state, ignore_errors=True)


class Launches:
    """Kinds of launches of one driver. A cold one asks for a plan that nobody has asked for before."""

    def __init__(self, driver: NativeDriver) -> None:
        self._driver = driver

    async def _run(self, spec: CellSpec) -> float:
        name = f"cell-{next(_numbers)}"
        start = time.perf_counter()
        started = await self._driver.launch(Order(name, f"exec-{name}", spec))
        end = await self._driver.wait(started.handle, started.exec_id)
        taken_ms = (time.perf_counter() - start) * 1e3
        if end.exit.code != 0:
            raise SystemExit(f"cannot measure: a launch ended with {end.exit}")
        await self._driver.free(Handle(name))
        return taken_ms

    async def cold(self) -> float:
        # A channel is nothing that /bin/true uses: it keeps the plan out of the pool.
        return await self._run(CellSpec(argv=("/bin/true",), channel=True))

    async def pooled(self) -> float:
        return await self._run(CellSpec(argv=("/bin/true",)))

    async def python(self) -> float:
        return await self._run(CellSpec(argv=("-c", "pass"), python=Interpreter()))

    async def python_cold(self) -> float:
        return await self._run(CellSpec(argv=(sys.executable, "-c", "pass"), channel=True))


class Bare:
    """The native executor without the spawner: a plan, a cgroup and a work directory of our own."""

    def __init__(self, plan: Plan, roots: tuple[str, ...], asked: dict[str, Any], directory: Path) -> None:
        self._executor = NativeExecutor((*roots, str(directory)))
        self._instance = os.urandom(4).hex()
        self._cgroups = open_driver(self._instance)
        self._limits = CgroupLimits(**asked)
        steps = tuple(placed(step, str(directory)) for step in plan.steps)
        self._plan = replace(plan, steps=steps)

    async def cold(self) -> float:
        start = time.perf_counter()
        cgroup = self._cgroups.create(f"bare-{next(_numbers)}", self._limits)
        spec = ExecSpec("exec", ("/bin/true",))
        launched = self._executor.launch(self._plan, Attach(cgroup.attach_fds, cgroup.v2_fd), spec)
        launched.control.setblocking(True)
        while not isinstance(event := initwire.receive(launched.control), initwire.Exited):
            if event is None or isinstance(event, initwire.StepFailed | initwire.ExecFailed):
                raise SystemExit(f"cannot measure: {event}")
        taken_ms = (time.perf_counter() - start) * 1e3
        launched.control.close()
        self._remove(launched.pidfd, cgroup)
        return taken_ms

    def _remove(self, pidfd: int, cgroup: CgroupHandle) -> None:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        cgroup.close_attach()
        while not self._cgroups.remove(cgroup):
            time.sleep(0.002)

    def close(self) -> None:
        self._executor.close()
        self._cgroups.sweep(self._instance)
        self._cgroups.close()


def peer(argv: list[str]) -> Callable[[], Awaitable[float]]:
    async def run() -> float:
        start = time.perf_counter()
        spawn_and_wait(argv)
        return (time.perf_counter() - start) * 1e3

    return run


async def measure(socket: Path, count: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    driver = NativeDriver(socket)
    connected = asyncio.Event()
    driver.on_connect(lambda _: connected.set())
    driver.start()
    await connected.wait()
    launches = Launches(driver)
    bare = _bare(driver, socket.parents[1] / "cells")
    kinds: dict[str, Callable[[], Awaitable[float]]] = {
        "posix_spawn": peer(["/bin/true"]),
        "executor cold": bare.cold,
        "aether cold": launches.cold,
        "aether pooled": launches.pooled,
        "aether python": launches.python,
        "aether python cold": launches.python_cold,
        "python3 -IS": peer(["python3", "-IS", "-c", "pass"]),
    }
    if bwrap := shutil.which("bwrap"):
        kinds["bwrap"] = peer([bwrap, *BWRAP, "/bin/true"])
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(count + 10):
        for name, kind in kinds.items():
            await asyncio.sleep(PAUSE_S / len(kinds))
            taken_ms = await kind()
            if number >= 10:
                times[name].append(taken_ms)
    rates = {}
    for width in (1, 4):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < 5.0:
            await asyncio.gather(*(launches.pooled() for _ in range(width)))
            done += width
        rates[f"sustained_{width}_per_s"] = done / (time.perf_counter() - start)
    bare.close()
    rates["burst_100_ms"], _ = await burst(driver, 100)
    rates["burst_1000_ms"], rates["own_kib_per_live_cell"] = await burst(driver, 1000)
    await driver.close()
    return times, rates


def _bare(driver: NativeDriver, beside: Path) -> Bare:
    explained = driver.explain(CellSpec(argv=("/bin/true",)))
    work = beside / "bare"
    work.mkdir()
    work.chmod(0o777)
    sources = [step["source"] for step in explained.plan["steps"] if "source" in step]
    plan = parse_plan(explained.plan, source_roots=sources)
    limits = cgroup_limits(CellSpec(argv=("/bin/true",)).limits)
    known = {field.name for field in fields(CgroupLimits)}
    asked = {name: value for name, value in limits.items() if name in known}
    roots = {path if Path(path).is_dir() else str(Path(path).parent) for path in sources}
    return Bare(plan, tuple(roots), asked, work)


async def burst(driver: NativeDriver, count: int) -> tuple[float, float]:
    """`count` cells at once: ms until the last has started, and KiB of our own processes for each."""
    names = [f"cell-{next(_numbers)}" for _ in range(count)]
    spec = CellSpec(argv=("/bin/sleep", "300"))
    before = own_kib()
    start = time.perf_counter()
    await asyncio.gather(*(driver.launch(Order(name, f"exec-{name}", spec)) for name in names))
    taken_ms = (time.perf_counter() - start) * 1e3
    each_kib = (own_kib() - before) / count
    await asyncio.gather(*(driver.free(Handle(name)) for name in names))
    return taken_ms, each_kib


def own_kib() -> int:
    """Memory (PSS) of this process's descendants that are ours: the jobs' own programs are theirs."""
    total = 0
    for pid in machine.family(os.getpid())[1:]:
        with suppress(OSError):
            if machine.argv_of(pid)[:1] != ["/bin/sleep"]:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(rollup.split("Pss:", 1)[1].split()[0])
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    with spawner() as socket:
        times, rates = asyncio.run(measure(socket, count))
    base = statistics.median(times.get("bwrap") or times["posix_spawn"])
    rows: list[dict[str, Any]] = [
        {
            "launcher": name,
            "n": len(values),
            "p50_ms": statistics.median(values),
            "p99_ms": harness.percentile(values, 0.99),
            "ratio_to_peer": statistics.median(values) / base,
        }
        for name, values in times.items()
    ]
    harness.report("launch", rows, rates)
    for name, value in rates.items():
        print(f"{name} {value:.1f}")


if __name__ == "__main__":
    main()
