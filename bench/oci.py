"""/bin/true in a cell by each driver, and by the runtimes' nearest peer, bwrap: interleaved in one run.

A cold launch is asked for through the spawner's socket, to the word of the exit with all output kept; a prepared one
is given time to stand before it is asked for. Runtimes that are not installed are left out.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable
from itertools import count as numbers
from pathlib import Path
from typing import Any

from aether.contract.cells import CellSpec
from aether.substrate.cells.drivers.native import NativeDriver
from aether.substrate.cells.drivers.port import Handle, Order
from bench import harness
from bench.launch import BWRAP, peer, spawner

PREPARED_AFTER_S = 0.4
"""A gVisor sandbox stands within this time."""
_numbers = numbers(1)


async def launch(driver: NativeDriver, name: str, *, cold: bool) -> float:
    """Milliseconds of one launch. A channel is nothing that /bin/true uses: it keeps the plan out of the pool."""
    if not cold:
        await asyncio.sleep(PREPARED_AFTER_S)
    cell = f"cell-{next(_numbers)}"
    start = time.perf_counter()
    spec = CellSpec(argv=("/bin/true",), require=(name,), channel=cold)
    started = await driver.launch(Order(cell, f"exec-{cell}", spec))
    end = await driver.wait(started.handle, started.exec_id)
    taken_ms = (time.perf_counter() - start) * 1e3
    if end.exit.code != 0:
        raise SystemExit(f"cannot measure: a launch by {name} ended with {end.exit}")
    await driver.free(Handle(cell))
    return taken_ms


async def measure(socket: Path, count: int, prepared: int) -> dict[str, list[float]]:
    driver = NativeDriver(socket)
    connected = asyncio.Event()
    driver.on_connect(lambda _: connected.set())
    driver.start()
    await connected.wait()
    names: list[str] = (await driver.fingerprint()).facts["drivers"]
    kinds: dict[str, Callable[[], Awaitable[float]]] = {}
    if bwrap := shutil.which("bwrap"):
        kinds["bwrap"] = peer([bwrap, *BWRAP, "/bin/true"])
    for name in names:
        kinds[name] = lambda name=name: launch(driver, name, cold=True)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(count):
        for name, kind in kinds.items():
            times[name].append(await kind())
    for name in names:
        await launch(driver, name, cold=False)
        times[f"{name} prepared"] = [await launch(driver, name, cold=False) for _ in range(prepared)]
    await driver.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--prepared", type=int, default=40)
    asked = parser.parse_args()
    with spawner() as socket:
        times = asyncio.run(measure(socket, asked.count, asked.prepared))
    base = statistics.median(times.get("bwrap") or times["native"])
    rows: list[dict[str, Any]] = [
        {
            "driver": name,
            "n": len(values),
            "p50_ms": statistics.median(values),
            "p99_ms": harness.percentile(values, 0.99),
            "ratio_to_bwrap": statistics.median(values) / base,
        }
        for name, values in times.items()
    ]
    harness.report("oci", rows)


if __name__ == "__main__":
    main()
